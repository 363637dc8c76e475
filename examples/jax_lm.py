"""Train a small language model in Flax and Optax, with the last linear layer and the loss in one.

    .venv/bin/python -m examples.jax_lm --steps 256 --vocabulary 8192

A language model has more logits than anything else: a row of the size of the vocabulary for each token of a batch, and
its gradient. `linear_label_smoothed_cross_entropy` takes what goes into the last layer, and never has more than a few
rows of logits in memory. The layer is the embedding table, turned over: its gradient is that of both ends.

The text is documentation that comes with Python, in tokens of a BPE that is trained on it (lm_text.py). What the model
has learnt is told by the perplexity of documents that it has not seen, beside the one of a model that knows how
frequent each token is, and no more.

What comes out: two tables, and in the output folder a plot and the losses of all steps. The same in torch: torch_lm.py,
from the same weights, with the same batches. The losses of the two differ by rounding at first, and after a hundred
steps by what has become of it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx
from jaxtyping import Array, Float32, Int32
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples import lm_text
from examples.lm_text import CONTEXT, HEADS, LAYERS, NORM_EPSILON, Options, Run, Text, Weights
from lsce_jax import (
    label_smoothed_cross_entropy,
    linear_label_smoothed_cross_entropy,
    linear_label_smoothed_cross_entropy_with_stats,
)
from lsce_jax.metrics import Perplexity
from lsce_spec import check_smoothing

EVALUATIONS = 8  # in training, besides the one before

# --- Network --------------------------------------------------------------------------------------------------------


class Layer(nnx.Module):
    """Attention to the tokens so far, then a layer for each by itself; both add to the residual stream."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        """Make the modules."""
        self.norm1 = nnx.RMSNorm(width, epsilon=NORM_EPSILON, rngs=rngs)
        self.attend = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.gather = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.norm2 = nnx.RMSNorm(width, epsilon=NORM_EPSILON, rngs=rngs)
        self.expand = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.contract = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, stream: Float32[Array, "N T D"]) -> Float32[Array, "N T D"]:
        """Return the stream with what the layer adds."""
        split = self.attend(self.norm1(stream)).reshape(*stream.shape[:2], 3, HEADS, -1)
        query, key, value = (split[:, :, part] for part in range(3))
        seen = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.gather(seen.reshape(stream.shape))
        return stream + self.contract(nnx.silu(self.expand(self.norm2(stream))))


class LanguageModel(nnx.Module):
    """Tokens to what goes into the last linear layer, whose weight is the embedding table."""

    def __init__(self, weights: Weights) -> None:
        """Make the modules, with these weights."""
        vocabulary, width = weights["embed"].shape
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.position = nnx.Embed(CONTEXT, width, rngs=rngs)
        self.layers = nnx.List([Layer(width, rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(width, epsilon=NORM_EPSILON, rngs=rngs)
        names = {nnx.Embed: "embedding", nnx.Linear: "kernel", nnx.RMSNorm: "scale"}
        for path, module in nnx.iter_modules(self):
            if type(module) in names:
                getattr(module, names[type(module)])[...] = jnp.asarray(weights[".".join(map(str, path))])

    def __call__(self, tokens: Int32[Array, "N T"]) -> Float32[Array, "N T D"]:
        """Return the hidden states."""
        stream = self.embed(tokens) + self.position.embedding[None, : tokens.shape[1]]
        for layer in self.layers:
            stream = layer(stream)
        return self.norm(stream)


# --- Training -------------------------------------------------------------------------------------------------------

Optimizer = nnx.Optimizer[LanguageModel]


def learning_rate(step: Int32[Array, ""]) -> Float32[Array, ""]:
    """Return the learning rate of a step, from 0: it rises at first, when Adam knows little of the gradients."""
    part = jnp.minimum(step + 1, lm_text.WARM_UP).astype(jnp.float32) / lm_text.WARM_UP
    return lm_text.LEARNING_RATE * part


# One for all runs: for another, `nnx.jit` would compile again.
ADAMW = optax.adamw(
    learning_rate, b1=lm_text.BETA1, b2=lm_text.BETA2, eps=lm_text.EPSILON, weight_decay=lm_text.WEIGHT_DECAY
)


def make_optimizer(model: LanguageModel) -> Optimizer:
    """Return AdamW."""
    return nnx.Optimizer(model, ADAMW, wrt=nnx.Param)


def mean_loss(model: LanguageModel, windows: Array, options: Options) -> Float32[Array, ""]:
    """Return the mean loss of the tokens that follow."""
    return linear_label_smoothed_cross_entropy(
        model(windows[:, :-1]),
        model.embed.embedding.T,
        windows[:, 1:],
        smoothing=options.smoothing,
        reduction="mean",
        chunk_size=options.chunk_size,
    )


@nnx.jit(static_argnames="options")
def train_step(model: LanguageModel, optimizer: Optimizer, windows: Array, options: Options) -> Float32[Array, ""]:
    """Move the weights, and return the loss before."""
    loss, gradient = nnx.value_and_grad(mean_loss)(model, windows, options)
    optimizer.update(model, gradient)
    return loss


@nnx.jit
def count(model: LanguageModel, windows: Array, metric: Perplexity) -> None:
    """Let the metric know the tokens of some windows."""
    _, stats = linear_label_smoothed_cross_entropy_with_stats(
        model(windows[:, :-1]), model.embed.embedding.T, windows[:, 1:]
    )
    metric.update(stats=stats)


def perplexity(model: LanguageModel, text: Text) -> float:
    """Return the perplexity of what is held out."""
    metric = Perplexity()
    for windows in lm_text.held_out_batches(text):
        count(model, jnp.asarray(windows), metric)
    return float(metric.compute())


def train(
    model: LanguageModel, text: Text, options: Options, on_step: Callable[[float], object] = lambda loss: None
) -> Run:
    """Train, and look at what is held out from time to time."""
    optimizer = make_optimizer(model)
    run = Run([], {0: perplexity(model, text)})
    looks = {options.steps * part // EVALUATIONS for part in range(1, EVALUATIONS + 1)} - {0}
    for step, windows in enumerate(lm_text.batches(text, options), start=1):
        run.losses.append(float(train_step(model, optimizer, jnp.asarray(windows), options=options)))
        if step in looks:
            run.perplexities[step] = perplexity(model, text)
        on_step(run.losses[-1])
    return run


# --- Memory ---------------------------------------------------------------------------------------------------------


def loss_memory(rows: int, vocabulary: int, width: int, chunk_size: int | None = None) -> dict[str, int]:
    """Return how many bytes the loss and both of its gradients take beyond hidden states and table, gradients included.

    It is what the compiled programs say of themselves.
    """
    hidden = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    table = jax.ShapeDtypeStruct((vocabulary, width), jnp.float32)
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def in_chunks(hidden: Array, table: Array, labels: Array) -> Array:
        return linear_label_smoothed_cross_entropy(hidden, table.T, labels, reduction="mean", chunk_size=chunk_size)

    def all_at_once(hidden: Array, table: Array, labels: Array) -> Array:
        return label_smoothed_cross_entropy(hidden @ table.T, labels, reduction="mean")

    def needed(loss: Callable[..., Array]) -> int:
        gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        memory = gradients.lower(hidden, table, labels).compile().memory_analysis()
        return int(memory.temp_size_in_bytes + memory.output_size_in_bytes)

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
    figure.suptitle("Language model in JAX: last linear layer and loss in one")
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
    ] = Path("out/jax_lm"),
) -> None:
    """Train a small language model on the documentation of Python in JAX.

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
