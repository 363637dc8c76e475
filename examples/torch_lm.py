"""Train a small language model in torch, with the last linear layer and the loss in one.

    .venv/bin/python -m examples.torch_lm --steps 256 --vocabulary 8192

A language model has more logits than anything else: a row of the size of the vocabulary for each token of a batch, and
its gradient. `linear_label_smoothed_cross_entropy` takes what goes into the last layer, and never has more than a few
rows of logits in memory. The layer is the embedding table, turned over: its gradient is that of both ends.

The text is documentation that comes with Python, in tokens of a BPE that is trained on it (lm_text.py). What the model
has learnt is told by the perplexity of documents that it has not seen, beside the one of a model that knows how
frequent each token is, and no more.

What comes out: two tables, and in the output folder a plot and the losses of all steps. The same in JAX: jax_lm.py,
from the same weights, with the same batches. The losses of the two differ by rounding at first, and after a hundred
steps by what has become of it.

Where other programs want the cores too, one thread is many times faster than several: OMP_NUM_THREADS=1.
"""

import json
import os
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from jaxtyping import Float32, Int32
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from examples import lm_text
from examples.lm_text import CONTEXT, HEADS, LAYERS, NORM_EPSILON, Options, Run, Text, Weights
from lsce_spec import check_smoothing
from lsce_torch import (
    label_smoothed_cross_entropy,
    linear_label_smoothed_cross_entropy,
    linear_label_smoothed_cross_entropy_with_stats,
)
from lsce_torch.metrics import Perplexity

EVALUATIONS = 8  # in training, besides the one before

# --- Network --------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Attention to the tokens so far, then a layer for each by itself; both add to the residual stream."""

    def __init__(self, width: int) -> None:
        """Make the modules."""
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=NORM_EPSILON)
        self.attend = nn.Linear(width, 3 * width, bias=False)
        self.gather = nn.Linear(width, width, bias=False)
        self.norm2 = nn.RMSNorm(width, eps=NORM_EPSILON)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.contract = nn.Linear(4 * width, width, bias=False)

    def forward(self, stream: Float32[Tensor, "N T D"]) -> Float32[Tensor, "N T D"]:
        """Return the stream with what the layer adds."""
        split = self.attend(self.norm1(stream)).reshape(*stream.shape[:2], 3, HEADS, -1)
        query, key, value = (split[:, :, part].transpose(1, 2) for part in range(3))
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.gather(seen.transpose(1, 2).reshape(stream.shape))
        return stream + self.contract(F.silu(self.expand(self.norm2(stream))))


class LanguageModel(nn.Module):
    """Tokens to what goes into the last linear layer, whose weight is the embedding table."""

    def __init__(self, weights: Weights) -> None:
        """Make the modules, with these weights."""
        super().__init__()
        vocabulary, width = weights["embed"].shape
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(width, eps=NORM_EPSILON)
        for path, module in self.named_modules():
            if path in weights:
                given = torch.from_numpy(weights[path])
                with torch.no_grad():
                    module.weight.copy_(given.T if isinstance(module, nn.Linear) else given)

    def forward(self, tokens: Int32[Tensor, "N T"]) -> Float32[Tensor, "N T D"]:
        """Return the hidden states."""
        stream = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for layer in self.layers:
            stream = layer(stream)
        return self.norm(stream)


# --- Training -------------------------------------------------------------------------------------------------------

Optimizer = torch.optim.Optimizer


def learning_rate(step: int) -> float:
    """Return the learning rate of a step, from 0: it rises at first, when Adam knows little of the gradients."""
    return lm_text.LEARNING_RATE * min(step + 1, lm_text.WARM_UP) / lm_text.WARM_UP


def make_optimizer(model: LanguageModel) -> Optimizer:
    """Return AdamW."""
    return torch.optim.AdamW(
        model.parameters(),
        betas=(lm_text.BETA1, lm_text.BETA2),
        eps=lm_text.EPSILON,
        weight_decay=lm_text.WEIGHT_DECAY,
    )


def mean_loss(model: LanguageModel, windows: Tensor, options: Options) -> Float32[Tensor, ""]:
    """Return the mean loss of the tokens that follow."""
    return linear_label_smoothed_cross_entropy(
        model(windows[:, :-1]),
        model.embed.weight,
        windows[:, 1:],
        smoothing=options.smoothing,
        chunk_size=options.chunk_size,
    )


def train_step(
    model: LanguageModel, optimizer: Optimizer, windows: Tensor, options: Options, step: int
) -> Float32[Tensor, ""]:
    """Move the weights, and return the loss before."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step)
    optimizer.zero_grad()
    loss = mean_loss(model, windows, options)
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def count(model: LanguageModel, windows: Tensor, metric: Perplexity) -> None:
    """Let the metric know the tokens of some windows."""
    _, stats = linear_label_smoothed_cross_entropy_with_stats(
        model(windows[:, :-1]), model.embed.weight, windows[:, 1:]
    )
    metric.update(stats=stats)


def perplexity(model: LanguageModel, text: Text) -> float:
    """Return the perplexity of what is held out."""
    metric = Perplexity()
    for windows in lm_text.held_out_batches(text):
        count(model, torch.from_numpy(windows), metric)
    return float(metric.compute())


def train(
    model: LanguageModel, text: Text, options: Options, on_step: Callable[[float], object] = lambda loss: None
) -> Run:
    """Train, and look at what is held out from time to time."""
    optimizer = make_optimizer(model)
    run = Run([], {0: perplexity(model, text)})
    looks = {options.steps * part // EVALUATIONS for part in range(1, EVALUATIONS + 1)} - {0}
    for step, windows in enumerate(lm_text.batches(text, options), start=1):
        loss = train_step(model, optimizer, torch.from_numpy(windows), options, step - 1)
        run.losses.append(float(loss))
        if step in looks:
            run.perplexities[step] = perplexity(model, text)
        on_step(run.losses[-1])
    return run


# --- Memory ---------------------------------------------------------------------------------------------------------


def loss_memory(rows: int, vocabulary: int, width: int, chunk_size: int | None = None) -> dict[str, int]:
    """Return how many bytes the loss and both of its gradients take beyond hidden states and table, gradients included.

    It is the most that is allocated at a time: the profiler reports every allocation and release of torch's CPU
    allocator in order, and the greatest running total is the peak.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).requires_grad_()
    table = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    labels = torch.randint(vocabulary, (rows,), generator=generator)

    def in_chunks() -> Tensor:
        return linear_label_smoothed_cross_entropy(hidden, table, labels, chunk_size=chunk_size)

    def all_at_once() -> Tensor:
        return label_smoothed_cross_entropy(hidden @ table.T, labels)

    def needed(loss: Callable[[], Tensor]) -> int:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it writes a line to stderr at each start and stop
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            gradients = torch.autograd.grad(loss(), (hidden, table))
        del gradients
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
        return max(accumulate(change for _, change in sorted(changes)), default=0)

    return {"all logits at once": needed(all_at_once), "in chunks": needed(in_chunks)}


# --- Results --------------------------------------------------------------------------------------------------------


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


def plot(run: Run, unigram: float, picture: Path) -> None:
    """Draw the loss by step, and the perplexity of held-out text."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(range(1, len(run.losses) + 1), run.losses, color="C0", linewidth=1)
    left.set(title="Training", xlabel="step", ylabel="smoothed loss, nats per token")
    right.semilogy(run.perplexities.keys(), run.perplexities.values(), color="C0", marker=".", label="transformer")
    right.axhline(unigram, color="C1", linestyle="--", label="frequency of each token")
    right.set(title="Held-out text", xlabel="step", ylabel="perplexity")
    right.legend()
    figure.suptitle("Language model in torch: last linear layer and loss in one")
    figure.savefig(picture, dpi=100)


# --- The command line -----------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def checked_smoothing(smoothing: float) -> float:
    """Turn the error of the library into one of the command line."""
    try:
        check_smoothing(smoothing)
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from None
    return smoothing


def checked_width(width: int) -> int:
    """Refuse what does not divide into heads."""
    if width % HEADS:
        raise typer.BadParameter(f"{width} features do not divide into {HEADS} heads.")
    return width


def made_folder(folder: Path) -> Path:
    """Make the output folder, or turn the error into one of the command line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise typer.BadParameter(f"cannot make the folder {folder}: {problem.strerror}.") from None
    return folder


@app.command()
def main(
    steps: Annotated[int, typer.Option(min=1, help="Batches to train on.")] = 256,
    smoothing: Annotated[float, typer.Option(callback=checked_smoothing, help="Label smoothing, from 0 to 1.")] = 0.1,
    vocabulary: Annotated[int, typer.Option(min=257, help="Tokens that the BPE may make.")] = 8192,
    width: Annotated[int, typer.Option(min=HEADS, callback=checked_width, help="Features, a multiple of 4.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of a batch, of 128 tokens each.")] = 16,
    chunk_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens to have logits of at a time.", show_default="up to the loss")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of weights and batches.")] = 0,
    output: Annotated[
        Path, typer.Option(writable=True, callback=made_folder, help="Folder for the plot and the losses.")
    ] = Path("out/torch_lm"),
) -> None:
    """Train a small language model on the documentation of Python in torch.

    The tables show what it makes of documents that it has not seen, and how much memory the loss takes: with all
    logits at once, and in chunks, which is how the model is trained.
    """
    console = Console()
    text = lm_text.read_text(vocabulary)
    options = Options(steps, smoothing, text.vocabulary, width, batch_size, chunk_size, seed)
    model = LanguageModel(lm_text.initial_weights(text.vocabulary, width, seed))
    columns = (
        TextColumn("training"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps, loss=np.nan)
        run = train(model, text, options, lambda loss: progress.update(task, advance=1, loss=loss))

    unigram = lm_text.unigram_perplexity(text)
    memory = loss_memory(batch_size * CONTEXT, text.vocabulary, width, chunk_size)
    console.print(*make_tables(run, unigram, memory, options), sep="\n")
    plot(run, unigram, output / "lm.png")
    lm_text.write_losses(run, output / "losses.json")
    for file in ("losses.json", "lm.png"):
        console.print(f"wrote {output / file}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    app()
