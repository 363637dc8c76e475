"""Tag the words of sentences of unequal length, in torch: padding, and batches that do not fit in memory.

    .venv/bin/python -m examples.torch_sequence --epochs 10 --microbatches 4

The mean is over real words: `where` takes padding out of the loss, its gradient and the metrics. A batch is worked
through in microbatches, and as these hold unequally many words, the mean of their means is not the mean of the batch:
a word in a microbatch of short sentences counts for more. `denominator` mends that: all microbatches share one. The
table says how far from the gradient of the whole batch both are: rounding with a shared denominator, about half of its
length with denominators of their own. (What the tagger learns from it hardly differs here, as short sentences and long
ones are of one kind.)

The sentences are made up: a Markov chain of tags, each of which speaks a few of the words, and most words are spoken
by several tags, so that the neighbours have to tell.

What comes out: a table, and in the output folder a plot. The same in JAX: jax_sequence.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from jaxtyping import Float32, Int32
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lsce_spec import check_smoothing
from lsce_torch import label_smoothed_cross_entropy, label_smoothed_cross_entropy_with_stats
from lsce_torch.metrics import Accuracy, CalibrationError, MeanNLL

TAGS, WORDS, PADDING, MAX_LENGTH = 6, 24, 0, 40
WIDTH, KERNEL = 32, 5
SENTENCES, BATCH_SIZE = 1024, 64
LEARNING_RATE = 4e-3
METRICS = ("accuracy", "nll", "calibration_error")


# --- Data -----------------------------------------------------------------------------------------------------------


class Sentences(NamedTuple):
    """Words and their tags, from the left; the rest of a row is PADDING."""

    words: Int32[np.ndarray, "N 40"]
    tags: Int32[np.ndarray, "N 40"]


def make_sentences(seed: int) -> tuple[Sentences, Sentences]:
    """Return sentences to train and to test on, from one grammar."""
    random = np.random.default_rng(seed)
    start = random.dirichlet(np.ones(TAGS))
    follow = random.dirichlet(np.full(TAGS, 0.3), TAGS)
    speak = random.dirichlet(np.full(WORDS - 1, 0.2), TAGS)
    lengths = np.minimum(2 + random.geometric(0.1, 2 * SENTENCES), MAX_LENGTH)
    words, tags = np.full((2, 2 * SENTENCES, MAX_LENGTH), PADDING, np.int32)
    for place in range(MAX_LENGTH):
        chances = follow[tags[:, place - 1]] if place else np.tile(start, (2 * SENTENCES, 1))
        tags[:, place] = draw(chances, random)
        words[:, place] = 1 + draw(speak[tags[:, place]], random)
    beyond = np.arange(MAX_LENGTH) >= lengths[:, None]
    words[beyond], tags[beyond] = PADDING, 0
    return Sentences(words[:SENTENCES], tags[:SENTENCES]), Sentences(words[SENTENCES:], tags[SENTENCES:])


def draw(chances: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return one outcome of each row of probabilities."""
    below = chances.cumsum(axis=1) < random.random((len(chances), 1))
    return np.minimum(below.sum(axis=1), chances.shape[1] - 1)


def batches(data: Sentences, seed: int, epoch: int) -> Iterator[Sentences]:
    """Yield the batches of an epoch."""
    order = np.random.default_rng([seed, epoch]).permutation(len(data.words))
    for rows in order.reshape(-1, BATCH_SIZE):
        yield Sentences(data.words[rows], data.tags[rows])


def split(batch: Sentences, microbatches: int) -> list[Sentences]:
    """Return a batch in pieces. Sentences of like length go together, as they do where padding costs time."""
    order = np.argsort((batch.words != PADDING).sum(axis=1), kind="stable")
    pieces = np.split(order, microbatches)
    return [Sentences(batch.words[rows], batch.tags[rows]) for rows in pieces]


# --- Network and training -------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """Words to logits of tags; two convolutions see four words to either side."""

    def __init__(self) -> None:
        """Draw the initial weights."""
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.hidden1 = nn.Conv1d(WIDTH, WIDTH, KERNEL, padding="same")
        self.hidden2 = nn.Conv1d(WIDTH, WIDTH, KERNEL, padding="same")
        self.output = nn.Linear(WIDTH, TAGS)

    def forward(self, words: Int32[Tensor, "N 40"]) -> Float32[Tensor, "N 40 6"]:
        """Return the logits."""
        # Padding is 0 in every layer, so that the end of a sentence looks the same however much of it there is.
        real = (words != PADDING)[:, None]
        features = torch.where(real, self.embed(words).mT, 0)
        features = torch.where(real, nn.functional.silu(self.hidden1(features)), 0)
        return self.output(nn.functional.silu(self.hidden2(features)).mT)


Optimizer = torch.optim.Optimizer


def make_optimizer(tagger: Tagger) -> Optimizer:
    """Return Adam."""
    return torch.optim.Adam(tagger.parameters(), LEARNING_RATE)


def mean_loss(
    tagger: Tagger, words: Tensor, tags: Tensor, smoothing: float, denominator: float | None = None
) -> Float32[Tensor, ""]:
    """Return the sum of the losses of real words over a denominator: their number, if not given."""
    return label_smoothed_cross_entropy(
        tagger(words), tags, smoothing=smoothing, where=words != PADDING, denominator=denominator
    )


def denominators(pieces: list[Sentences], shared: bool) -> list[float]:
    """Return what the loss of each microbatch is divided by, given that `backward` sums the gradients.

    If it is to be shared: the number of words in all.
    """
    words = [float(np.count_nonzero(piece.words != PADDING)) for piece in pieces]
    return [sum(words)] * len(words) if shared else [len(words) * number for number in words]


def arrays(data: Sentences) -> tuple[Tensor, Tensor]:
    """Return words and tags as tensors."""
    return torch.from_numpy(data.words), torch.from_numpy(data.tags)


def train_step(tagger: Tagger, words: Tensor, tags: Tensor, smoothing: float, denominator: float) -> None:
    """Add the gradient of a microbatch."""
    mean_loss(tagger, words, tags, smoothing, denominator).backward()


def flat_gradient(
    tagger: Tagger, words: Tensor, tags: Tensor, smoothing: float, denominator: float | None = None
) -> Float32[Tensor, " weights"]:
    """Return the gradient as one vector."""
    loss = mean_loss(tagger, words, tags, smoothing, denominator)
    return nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(tagger.parameters())))


def gradient_error(tagger: Tagger, batch: Sentences, smoothing: float, microbatches: int, shared: bool) -> float:
    """Return how far the accumulated gradient is from that of the whole batch, relative to its length."""
    whole = flat_gradient(tagger, *arrays(batch), smoothing)
    pieces = split(batch, microbatches)
    gradients = [
        flat_gradient(tagger, *arrays(piece), smoothing, denominator)
        for piece, denominator in zip(pieces, denominators(pieces, shared), strict=True)
    ]
    return float(torch.linalg.norm(sum(gradients) - whole) / torch.linalg.norm(whole))


@torch.no_grad()
def evaluate(tagger: Tagger, words: Tensor, tags: Tensor) -> dict[str, Float32[Tensor, ""]]:
    """Return what the metrics say of the real words of some sentences."""
    metrics = MetricCollection({"accuracy": Accuracy(), "nll": MeanNLL(), "calibration_error": CalibrationError()})
    _, stats = label_smoothed_cross_entropy_with_stats(tagger(words), tags, where=words != PADDING)
    metrics.update(stats=stats)
    return metrics.compute()


class Run(NamedTuple):
    """One training: how it was done, and what was seen at each epoch."""

    smoothing: float
    shared: bool
    gradient_errors: list[float]
    metrics: list[dict[str, float]]

    @property
    def names(self) -> tuple[str, str]:
        """Smoothing and denominator, for tables and plots."""
        return f"{self.smoothing:g}", "shared" if self.shared else "own"


def train_epoch(tagger: Tagger, optimizer: Optimizer, data: Sentences, run: Run, microbatches: int, seed: int) -> None:
    """Train for an epoch, and note how far the gradient of its first batch is off."""
    for step, batch in enumerate(batches(data, seed, len(run.metrics))):
        if step == 0:
            run.gradient_errors.append(gradient_error(tagger, batch, run.smoothing, microbatches, run.shared))
        pieces = split(batch, microbatches)
        optimizer.zero_grad()
        for piece, denominator in zip(pieces, denominators(pieces, run.shared), strict=True):
            train_step(tagger, *arrays(piece), run.smoothing, denominator)
        optimizer.step()


# --- Results --------------------------------------------------------------------------------------------------------


def make_table(runs: list[Run]) -> Table:
    """Return how far the gradients were off, and the metrics after the last epoch."""
    table = Table("smoothing", "denominator", "gradient off by", "accuracy", "nll", "calibration")
    table.title = "Gradients in training, mean over the epochs; metrics of the test sentences"
    for run in runs:
        error = f"{np.mean(run.gradient_errors):.1e}"
        table.add_row(*run.names, error, *(f"{run.metrics[-1][name]:.4f}" for name in METRICS))
    return table


def plot(runs: list[Run], picture: Path) -> None:
    """Draw the errors of the gradient and the nll by epoch."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run in runs:
        epochs = range(1, len(run.metrics) + 1)
        left.semilogy(epochs, run.gradient_errors, marker=".", label=", ".join(run.names))
        right.plot(epochs, [metrics["nll"] for metrics in run.metrics], marker=".", label=", ".join(run.names))
    left.set(title="Accumulated gradient", xlabel="epoch", ylabel="distance from the whole batch's, relative")
    right.set(title="Test sentences", xlabel="epoch", ylabel="nll, nats per word")
    left.legend(title="smoothing, denominator")
    figure.suptitle("Sequence tagging in torch: gradient accumulation over ragged microbatches")
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


def made_folder(folder: Path) -> Path:
    """Make the output folder, or turn the error into one of the command line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise typer.BadParameter(f"cannot make the folder {folder}: {problem.strerror}.") from None
    return folder


def checked_microbatches(microbatches: int) -> int:
    """Refuse what does not divide a batch."""
    if BATCH_SIZE % microbatches:
        raise typer.BadParameter(
            f"{BATCH_SIZE} sentences do not divide into {microbatches}: take a power of 2 up to {BATCH_SIZE}."
        )
    return microbatches


@app.command()
def main(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training sentences.")] = 10,
    smoothing: Annotated[float, typer.Option(callback=checked_smoothing, help="Label smoothing, from 0 to 1.")] = 0.1,
    microbatches: Annotated[
        int,
        typer.Option(min=1, max=BATCH_SIZE, callback=checked_microbatches, help="Pieces of each batch, a power of 2."),
    ] = 4,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of grammar, weights and batches.")] = 0,
    output: Annotated[Path, typer.Option(writable=True, callback=made_folder, help="Folder for the plot.")] = Path(
        "out/torch_sequence"
    ),
) -> None:
    """Train taggers on made-up sentences in torch, accumulating gradients over microbatches.

    Three trainings: without smoothing, with it, and with it but with each microbatch divided by its own number of
    words. The table and the plot show how far each one's accumulated gradient is from that of the whole batch, and what
    the tagger makes of test sentences.
    """
    console = Console()
    train, test = make_sentences(seed)
    choices = dict.fromkeys([(0.0, True), (smoothing, True), (smoothing, False)])  # none twice, if smoothing is 0
    runs = [Run(value, shared, [], []) for value, shared in choices]
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=len(runs) * epochs)
        for run in runs:
            torch.manual_seed(seed)
            tagger = Tagger()
            optimizer = make_optimizer(tagger)
            for _ in range(epochs):
                train_epoch(tagger, optimizer, train, run, microbatches, seed)
                run.metrics.append({name: float(value) for name, value in evaluate(tagger, *arrays(test)).items()})
                progress.advance(task)

    console.print(make_table(runs))
    plot(runs, output / "sequence.png")
    console.print(f"wrote {output / 'sequence.png'}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    app()
