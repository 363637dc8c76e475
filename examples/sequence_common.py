"""What jax_sequence and torch_sequence share, without a framework: sentences, microbatches, table and plot.

The sentences are made up: a Markov chain of tags, each of which speaks a few of the words. Most words are spoken by
several tags, so that the tagger must look at the neighbours.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from jaxtyping import Bool, Float32, Int32
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from examples.common import METRICS, Metrics, print_written

TAGS, WORDS, PADDING, MAX_LENGTH = 6, 24, 0, 40
SENTENCES, BATCH_SIZE = 1024, 64

Gradient = Float32[np.ndarray, " weights"]


# --- Data -----------------------------------------------------------------------------------------------------------


class Sentences(NamedTuple):
    """Words and their tags, from the left; the rest of a row is PADDING."""

    words: Int32[np.ndarray, "N 40"]
    tags: Int32[np.ndarray, "N 40"]

    @property
    def real(self) -> Bool[np.ndarray, "N 40"]:
        """Whether each place holds a word."""
        return self.words != PADDING


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
    """Return a batch in pieces. Sentences of similar length go together, as usual where padding costs time."""
    order = np.argsort(batch.real.sum(axis=1), kind="stable")
    pieces = np.split(order, microbatches)
    return [Sentences(batch.words[rows], batch.tags[rows]) for rows in pieces]


def denominators(pieces: list[Sentences], shared: bool) -> list[float]:
    """Return the denominator of each microbatch's loss, given that the gradients of the microbatches are summed.

    A shared denominator is the number of words of the whole batch. With denominators of their own the losses are the
    means of the microbatches, over the number of microbatches.
    """
    words = [float(np.count_nonzero(piece.real)) for piece in pieces]
    return [sum(words)] * len(words) if shared else [len(words) * number for number in words]


def relative_error(gradient: Gradient, whole: Gradient) -> float:
    """Return how far a gradient is from that of the whole batch, relative to its length."""
    return float(np.linalg.norm(gradient - whole) / np.linalg.norm(whole))


# --- The trainings and their results --------------------------------------------------------------------------------


class Run(NamedTuple):
    """One training: its options, and the results of each epoch."""

    smoothing: float
    shared: bool
    gradient_errors: list[float]
    metrics: list[Metrics]

    @property
    def names(self) -> tuple[str, str]:
        """Return smoothing and denominator, for tables and plots."""
        return f"{self.smoothing:g}", "shared" if self.shared else "own"


class Options(NamedTuple):
    """What the command line asks for."""

    epochs: int
    smoothing: float
    microbatches: int
    seed: int


def checked_microbatches(microbatches: int) -> int:
    """Return the number of microbatches if it divides a batch."""
    if BATCH_SIZE % microbatches:
        raise typer.BadParameter(
            f"{BATCH_SIZE} sentences do not divide into {microbatches}: take a power of 2 up to {BATCH_SIZE}."
        )
    return microbatches


Epochs = Annotated[int, typer.Option(min=1, help="Passes over the training sentences.")]
Microbatches = Annotated[
    int, typer.Option(min=1, max=BATCH_SIZE, callback=checked_microbatches, help="Pieces of each batch, a power of 2.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of grammar, weights and batches.")]


def compare(train: Callable[..., Iterator[Metrics]], options: Options, framework: str, output: Path) -> None:
    """Train three taggers, print the table and draw the plot.

    Args:
        train: takes training and test sentences, the run and the options; yields the test metrics of each epoch.
        options: of the command line.
        framework: its name, for the plot.
        output: the folder for the plot.
    """
    console = Console()
    sentences = make_sentences(options.seed)
    choices = [(0.0, True), (options.smoothing, True), (options.smoothing, False)]
    runs = [Run(value, shared, [], []) for value, shared in dict.fromkeys(choices)]  # none twice, if smoothing is 0
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=len(runs) * options.epochs)
        for run in runs:
            for metrics in train(*sentences, run, options):
                run.metrics.append(metrics)
                progress.advance(task)
    console.print(make_table(runs))
    plot(runs, framework, output / "sequence.png")
    print_written(console, output / "sequence.png")


def make_table(runs: list[Run]) -> Table:
    """Return the errors of the gradients, and the metrics after the last epoch."""
    table = Table("smoothing", "denominator", "gradient off by", "accuracy", "nll", "calibration")
    table.title = "Gradients in training, mean over the epochs; metrics of the test sentences"
    for run in runs:
        error = f"{np.mean(run.gradient_errors):.1e}"
        table.add_row(*run.names, error, *(f"{run.metrics[-1][name]:.4f}" for name in METRICS))
    return table


def plot(runs: list[Run], framework: str, picture: Path) -> None:
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
    figure.suptitle(f"Sequence tagging in {framework}: gradient accumulation over ragged microbatches")
    figure.savefig(picture, dpi=100)
