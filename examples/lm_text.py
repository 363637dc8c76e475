"""What the two language models have in common: text, tokens, batches, initial weights. No framework is loaded.

The text is documentation that comes with Python: the topics of `help()`, and the docstrings of the standard library,
which are parsed out of its source; no module is run for them. A paragraph that has been seen is left out, as
the topics repeat one another, and what is held out would not be new.

Weights come from NumPy, so that both frameworks start from the same ones, bit for bit; batches too. A linear layer's
are [in, out], as in Flax.
"""

import ast
import json
import math
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

# Modules that are one file each, from Python 3.11 to 3.14, and say much.
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

# AdamW is the same formula in Optax and in torch, but for the rounding of its constants. These, the learning rates of
# the warm-up and their products with the weight decay are exact in float32; digits_parity.py says what others would do.
LEARNING_RATE = 2.0**-8
WARM_UP = 64
BETA1, BETA2 = 1 - 2.0**-3, 1 - 2.0**-6
EPSILON = 2.0**-27
WEIGHT_DECAY = 2.0**-5
NORM_EPSILON = 2.0**-20

Weights = Mapping[str, Float32[np.ndarray, "..."]]
Windows = Int32[np.ndarray, "windows 129"]


class Options(NamedTuple):
    """What the command line asks for."""

    steps: int
    smoothing: float
    vocabulary: int
    width: int
    batch_size: int
    chunk_size: int | None
    seed: int


# --- Text and tokens ------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """Documents in one row, each with END_OF_TEXT behind it.

    Args:
        train: tokens to train on.
        held_out: tokens of other documents.
        vocabulary: number of tokens that there are.
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
    """Return the paragraphs of a document that were not seen, and note them."""
    paragraphs = [paragraph for paragraph in dict.fromkeys(document.split("\n\n")) if paragraph not in seen]
    seen.update(paragraphs)
    return "\n\n".join(paragraphs)


def read_text(vocabulary: int) -> Text:
    """Return the text as tokens of a byte-level BPE of this size, trained on what is not held out."""
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
    """Return the perplexity of the held-out tokens by how often each is in the others, plus once."""
    counts = np.bincount(text.train, minlength=text.vocabulary) + 1.0
    return float(np.exp(-np.log(counts / counts.sum())[text.held_out].mean()))


# --- Batches --------------------------------------------------------------------------------------------------------


def batches(text: Text, options: Options) -> Iterator[Windows]:
    """Yield a batch for each step: windows from anywhere. Each is one token longer than what the model sees of it."""
    random = np.random.default_rng(options.seed)
    for _ in range(options.steps):
        starts = random.integers(len(text.train) - CONTEXT, size=options.batch_size)
        yield text.train[starts[:, None] + np.arange(CONTEXT + 1)]


def held_out_batches(text: Text) -> Iterator[Windows]:
    """Yield what is held out in windows whose first token is the last of the window before, but for the ragged end."""
    windows = np.lib.stride_tricks.sliding_window_view(text.held_out, CONTEXT + 1)[::CONTEXT]
    for start in range(0, len(windows) - HELD_OUT_BATCH + 1, HELD_OUT_BATCH):
        yield windows[start : start + HELD_OUT_BATCH].copy()


# --- Weights --------------------------------------------------------------------------------------------------------


def initial_weights(vocabulary: int, width: int, seed: int) -> dict[str, Float32[np.ndarray, "..."]]:
    """Return weights by the names of the modules that have them in both models.

    As in GPT-2: small numbers, and smaller ones where layers add to the residual stream, whose sum grows with them.
    """
    random = np.random.default_rng([seed, 1])

    def normal(*shape: int, scale: float = 0.02) -> Float32[np.ndarray, "..."]:
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
    """One training: the loss of each step, and the perplexity of what is held out after some of them."""

    losses: list[float]
    perplexities: dict[int, float]


def write_losses(run: Run, file: Path) -> None:
    """Write a run as JSON. Numbers are as long as they need be to be read back exactly."""
    content = {"losses": run.losses, "perplexities": [*run.perplexities.items()]}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
