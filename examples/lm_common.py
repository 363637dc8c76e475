"""What jax_lm and torch_lm share, without a framework: text, tokens, batches, initial weights, tables and plot.

The text is documentation that comes with Python: the topics of `help()`, and the docstrings of the standard library,
parsed from its source without running a module. The topics repeat one another, so repeated paragraphs are left out;
otherwise the held-out text would not be new.
"""

import ast
import json
import math
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from jaxtyping import Int32
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from examples.common import Weight, made_folder, print_written

# Modules of one file each, in all of Python 3.11 to 3.14, with much documentation.
# fmt: off
MODULES = (
    "_collections_abc", "_pydecimal", "_pyio", "abc", "argparse", "ast", "base64", "bdb", "bz2", "calendar", "cmd",
    "code", "codecs", "codeop", "configparser", "contextlib", "copy", "csv", "dataclasses", "difflib", "dis",
    "doctest", "enum", "filecmp", "fileinput", "fractions", "ftplib", "functools", "getopt", "graphlib", "gzip",
    "heapq", "hmac", "imaplib", "inspect", "ipaddress", "locale", "lzma", "mailbox", "mimetypes", "numbers",
    "operator", "optparse", "os", "pdb", "pickle", "pickletools", "pkgutil", "platform", "plistlib", "poplib",
    "pprint", "profile", "pstats", "py_compile", "pyclbr", "pydoc", "queue", "random", "runpy", "sched",
    "selectors", "shelve", "shlex", "shutil", "site", "smtplib", "socket", "socketserver", "ssl", "statistics",
    "subprocess", "symtable", "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "trace",
    "traceback", "typing", "uuid", "warnings", "wave", "weakref", "webbrowser",
)
# fmt: on
END_OF_TEXT = "<|end|>"
HELD_OUT_EVERY = 16  # documents
HELD_OUT_BATCH = 16  # windows
CONTEXT, LAYERS, HEADS = 128, 2, 4

LEARNING_RATE = 2.0**-8
WARM_UP = 64
WEIGHT_DECAY = 2.0**-5
NORM_EPSILON = 2.0**-20

Weights = Mapping[str, Weight]
Windows = Int32[np.ndarray, "windows 129"]


class Mesh(NamedTuple):
    """Devices in rows and columns.

    Args:
        data: how many parts the batch is divided into.
        model: how many parts the table and the layers of each token are divided into.
    """

    data: int
    model: int

    def __str__(self) -> str:
        """Return what the command line takes."""
        return f"{self.data}x{self.model}"


class Options(NamedTuple):
    """What the command line asks for."""

    steps: int
    smoothing: float
    vocabulary: int
    width: int
    batch_size: int
    chunk_size: int | None
    seed: int
    mesh: Mesh = Mesh(1, 1)


class Checkpoints(NamedTuple):
    """Where and how often to write checkpoints.

    Args:
        folder: for them and nothing else.
        every: steps; None for no checkpoints.
        resume: whether to go on from the last one.
    """

    folder: Path
    every: int | None
    resume: bool

    def due(self, step: int, steps: int) -> bool:
        """Return whether to write one after a step."""
        return self.every is not None and (step % self.every == 0 or step == steps)


NO_CHECKPOINTS = Checkpoints(Path("never"), None, resume=False)


def checked_width(width: int) -> int:
    """Return the width if it divides into heads."""
    if width % HEADS:
        raise typer.BadParameter(f"{width} features do not divide into {HEADS} heads.")
    return width


def parsed_mesh(text: str) -> Mesh:
    """Return the mesh of a text such as 2x4."""
    parts = str(text).split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"{text} is not of the form 2x4, devices for data x devices for the model.")
    return Mesh(*map(int, parts))


def check_mesh(options: Options) -> None:
    """Raise unless the mesh divides what it is to divide."""
    data, model = options.mesh
    for size, what, parts in (
        (options.batch_size, "windows of a batch", data),
        (HELD_OUT_BATCH, "windows of a held-out batch", data),
        (options.vocabulary, "tokens of the vocabulary", model),
        (4 * options.width, "features of a layer", model),
    ):
        if size % parts:
            problem = f"{size} {what} do not divide into {parts} parts."
            raise typer.BadParameter(problem, param_hint="'--mesh'")


Steps = Annotated[int, typer.Option(min=1, help="Batches to train on.")]
Vocabulary = Annotated[int, typer.Option(min=257, help="Tokens that the BPE may make.")]
Width = Annotated[int, typer.Option(min=HEADS, callback=checked_width, help="Features, a multiple of 4.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Windows of a batch, of 128 tokens each.")]
ChunkSize = Annotated[
    int | None, typer.Option(min=1, help="Tokens to have logits of at a time.", show_default="up to the loss")
]
MeshOption = Annotated[
    Mesh,
    typer.Option(
        parser=parsed_mesh,
        metavar="DATAxMODEL",
        help="Devices that divide the batch, and devices that divide table and layers.",
    ),
]
CheckpointEvery = Annotated[
    int | None, typer.Option(min=1, help="Steps between checkpoints, in the folder for the plot.", show_default="none")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint, on this or another mesh.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of weights and batches.")]
RunFolder = Annotated[Path, typer.Option(callback=made_folder, help="Folder for the plot and the losses.")]


# --- Text and tokens ------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """Documents in one row, each followed by END_OF_TEXT.

    Args:
        train: tokens to train on.
        held_out: tokens of other documents.
        vocabulary: number of different tokens.
    """

    train: Int32[np.ndarray, " N"]
    held_out: Int32[np.ndarray, " M"]
    vocabulary: int


def read_documents() -> list[str]:
    """Return the docstrings of each module, and each topic."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = [(library / f"{name}.py").read_text(encoding="utf-8") for name in MODULES]
    documents = [*map(docstrings, sources), *(topics[name] for name in sorted(topics))]
    seen: set[str] = set()
    return [without_repetition(document, seen) for document in documents]


def docstrings(source: str) -> str:
    """Return all docstrings of a module, in the order of its source."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def without_repetition(document: str, seen: set[str]) -> str:
    """Return the paragraphs of a document that are not in `seen`, and add them to it."""
    paragraphs = [paragraph for paragraph in dict.fromkeys(document.split("\n\n")) if paragraph not in seen]
    seen.update(paragraphs)
    return "\n\n".join(paragraphs)


def read_text(vocabulary: int) -> Text:
    """Return the text as tokens of a byte-level BPE of this size, trained on the documents that are not held out."""
    documents = read_documents()
    held_out = documents[::HELD_OUT_EVERY]
    train = [document for number, document in enumerate(documents) if number % HELD_OUT_EVERY]

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(train, trainer)

    def tokens(documents: list[str]) -> Int32[np.ndarray, " N"]:
        ids = [encoding.ids for encoding in tokenizer.encode_batch([f"{text}{END_OF_TEXT}" for text in documents])]
        return np.concatenate(ids).astype(np.int32)

    return Text(tokens(train), tokens(held_out), tokenizer.get_vocab_size())


def unigram_perplexity(text: Text) -> float:
    """Return the perplexity of the held-out tokens by their frequency in the training text, plus one each."""
    counts = np.bincount(text.train, minlength=text.vocabulary) + 1.0
    return float(np.exp(-np.log(counts / counts.sum())[text.held_out].mean()))


# --- Batches --------------------------------------------------------------------------------------------------------


def batches(text: Text, options: Options, done: int = 0) -> Iterator[Windows]:
    """Yield a batch of random windows for each step that is not done, each one token longer than the model's input."""
    random = np.random.default_rng(options.seed)
    for step in range(options.steps):
        starts = random.integers(len(text.train) - CONTEXT, size=options.batch_size)
        if step < done:
            continue
        yield text.train[starts[:, None] + np.arange(CONTEXT + 1)]


def held_out_batches(text: Text) -> Iterator[Windows]:
    """Yield the held-out text in windows that overlap by one token, without the last tokens that fill no batch."""
    windows = np.lib.stride_tricks.sliding_window_view(text.held_out, CONTEXT + 1)[::CONTEXT]
    for start in range(0, len(windows) - HELD_OUT_BATCH + 1, HELD_OUT_BATCH):
        yield windows[start : start + HELD_OUT_BATCH].copy()


# --- Weights --------------------------------------------------------------------------------------------------------


def initial_weights(vocabulary: int, width: int, seed: int) -> dict[str, Weight]:
    """Return weights by the names of their modules in both models; those of linear layers are [in, out].

    As in GPT-2: small numbers, and smaller ones in layers that add to the residual stream, because it sums them up.
    """
    random = np.random.default_rng([seed, 1])

    def normal(*shape: int, scale: float = 0.02) -> Weight:
        return (scale * random.standard_normal(shape)).astype(np.float32)

    weights = {"embed": normal(vocabulary, width), "position": normal(CONTEXT, width), "norm": np.ones(width, "f4")}
    added = 0.02 / math.sqrt(2 * LAYERS)
    for layer in range(LAYERS):
        weights |= {
            f"layers.{layer}.norm1": np.ones(width, np.float32),
            f"layers.{layer}.attend": normal(width, 3 * width),
            f"layers.{layer}.gather": normal(width, width, scale=added),
            f"layers.{layer}.norm2": np.ones(width, np.float32),
            f"layers.{layer}.expand": normal(width, 4 * width),
            f"layers.{layer}.contract": normal(4 * width, width, scale=added),
        }
    return weights


# --- Results --------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One training: the loss of each step, and the perplexity of the held-out text after some of them."""

    losses: list[float]
    perplexities: dict[int, float]


def as_json(run: Run) -> dict[str, Any]:
    """Return a run as what JSON can hold, with as many digits as it takes to read the same numbers back."""
    return {"losses": run.losses, "perplexities": [*map(list, run.perplexities.items())]}


def fixed_options(options: Options) -> dict[str, Any]:
    """Return the options that a run has to the end, as what JSON can hold."""
    return {name: value for name, value in options._asdict().items() if name not in ("steps", "chunk_size", "mesh")}


def resumed(content: dict[str, Any], options: Options) -> Run:
    """Return the run so far, from the `as_json` and "options" of a checkpoint.

    Raises:
        typer.BadParameter: it was made with other options, or has all the steps.
    """
    made_with, wanted = content["options"], fixed_options(options)
    differing = [f"--{name.replace('_', '-')} {made_with[name]}" for name in wanted if made_with[name] != wanted[name]]
    if differing:
        raise typer.BadParameter(f"the checkpoint was made with {', '.join(differing)}.", param_hint="'--resume'")
    run = Run(content["losses"], {int(step): value for step, value in content["perplexities"]})
    done = len(run.losses)
    if done > options.steps or (done == options.steps and done not in run.perplexities):
        raise typer.BadParameter(f"the checkpoint is of step {done} already.", param_hint="'--steps'")
    return run


def check_checkpoints(checkpoints: Checkpoints, last: int | None) -> None:
    """Raise if there is no checkpoint to go on from, or if there are some of another run."""
    if checkpoints.resume and last is None:
        raise typer.BadParameter(f"there is no checkpoint in {checkpoints.folder}.", param_hint="'--resume'")
    if checkpoints.every and not checkpoints.resume and last is not None:
        problem = f"{checkpoints.folder} has checkpoints. Pass --resume, or another folder."
        raise typer.BadParameter(problem, param_hint="'--output'")


def write_losses(run: Run, file: Path) -> None:
    """Write a run as JSON."""
    content = as_json(run)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def make_tables(run: Run, unigram: float, memory: dict[str, int], options: Options) -> list[Table]:
    """Return the perplexities and the memory."""
    learnt = Table("model", "perplexity", title="Perplexity of held-out text")
    learnt.add_row("frequency of each token", f"{unigram:.1f}")
    learnt.add_row("transformer, untrained", f"{run.perplexities[0]:.1f}")
    learnt.add_row(f"transformer, {options.steps} steps", f"{run.perplexities[options.steps]:.1f}")
    taken = Table("loss", "MiB", title=f"Memory of loss and gradients, {options.batch_size * CONTEXT} tokens")
    for name, size in memory.items():
        taken.add_row(name, f"{size / 2**20:.1f}")
    return [learnt, taken]


def plot(run: Run, unigram: float, framework: str, picture: Path) -> None:
    """Draw the loss by step, and the perplexity of held-out text."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(range(1, len(run.losses) + 1), run.losses, color="C0", linewidth=1)
    left.set(title="Training", xlabel="step", ylabel="smoothed loss, nats per token")
    right.semilogy(run.perplexities.keys(), run.perplexities.values(), color="C0", marker=".", label="transformer")
    right.axhline(unigram, color="C1", linestyle="--", label="frequency of each token")
    right.set(title="Held-out text", xlabel="step", ylabel="perplexity")
    right.legend()
    figure.suptitle(f"Language model in {framework}: last linear layer and loss in one")
    figure.savefig(picture, dpi=100)


Train = Callable[[Text, Options, Callable[[float], object], Checkpoints], Run]
LossMemory = Callable[[int, int, int, int | None], dict[str, int]]


def train_and_report(
    train: Train,
    loss_memory: LossMemory,
    options: Options,
    checkpoints: Checkpoints,
    framework: str,
    output: Path,
    is_first: bool = True,
) -> None:
    """Train a model with a progress bar, print the tables, draw the plot and write the losses.

    Args:
        train: takes the text, the options, a function to call with the loss of each step, and the checkpoints.
        loss_memory: takes rows, vocabulary, width and chunk size, and returns bytes by name.
        options: of the command line; the vocabulary is the largest that the BPE may make.
        checkpoints: of the command line.
        framework: its name, for the plot.
        output: the folder.
        is_first: whether this process is the one that prints and writes; False for the others of several.
    """
    console = Console(quiet=not is_first)
    text = read_text(options.vocabulary)
    options = options._replace(vocabulary=text.vocabulary)
    check_mesh(options)
    columns = (
        TextColumn("training"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=options.steps, loss=np.nan)
        run = train(text, options, lambda loss: progress.update(task, advance=1, loss=loss), checkpoints)
    if not is_first:
        return

    unigram = unigram_perplexity(text)
    memory = loss_memory(options.batch_size * CONTEXT, options.vocabulary, options.width, options.chunk_size)
    console.print(*make_tables(run, unigram, memory, options), sep="\n")
    plot(run, unigram, framework, output / "lm.png")
    write_losses(run, output / "losses.json")
    print_written(console, output / "losses.json", output / "lm.png")
