"""Smoothing from a schedule, in Flax and Optax: none, constant, and annealed to 0.

    .venv/bin/python -m examples.jax_schedule --epochs 20

Constant smoothing makes more predictions right and all of them too modest: nll and calibration error rise. Annealed
to 0 it keeps part of the gain for a small part of the cost, and has the lowest nll of the three.

Any Optax schedule will do. It is evaluated within `nnx.jit`, so the smoothing is traced and its changes compile
nothing again: the step is compiled once for each schedule. The smoothing has its place beside the learning rate, in the
hyperparameters of the optimizer's state: there loggers look, checkpoints keep it, and a loop without a schedule can set
it.

What comes out: a table with means over the repeats, how often the step was compiled, and in the output folder a plot.
The same in torch: torch_schedule.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx
from jaxtyping import Array, Float32, Int32
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from lsce_jax import label_smoothed_cross_entropy, label_smoothed_cross_entropy_with_stats
from lsce_jax.metrics import Accuracy, CalibrationError, MeanNLL
from lsce_spec import check_smoothing

PIXELS, HIDDEN, CLASSES = 64, 128, 10
BATCH_SIZE = 32
LEARNING_RATE = 4e-3

METRICS = ("accuracy", "nll", "calibration_error")

Schedule = Callable[[Array], Array]
Metrics = dict[str, float]


# --- Data -----------------------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """The 1797 digits that ship with scikit-learn (UCI, 8 x 8 pixels), pixels from 0 to 1."""

    train_images: Float32[np.ndarray, "train 64"]
    test_images: Float32[np.ndarray, "test 64"]
    train_labels: Int32[np.ndarray, " train"]
    test_labels: Int32[np.ndarray, " test"]


def read_digits(seed: int) -> Digits:
    """Return the digits, two thirds of each class to train on and one third to test on."""
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    return Digits(*train_test_split(images, labels, test_size=1 / 3, stratify=labels, random_state=seed))


def batch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """Return which rows each batch of an epoch holds; what does not fill a batch is left out of that epoch."""
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    return order[: rows // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE)


# --- Network and optimizer ------------------------------------------------------------------------------------------


class Network(nnx.Module):
    """Pixels to logits, one hidden layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Draw the initial weights."""
        self.hidden = nnx.Linear(PIXELS, HIDDEN, rngs=rngs)
        self.output = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, images: Float32[Array, "N 64"]) -> Float32[Array, "N 10"]:
        """Return the logits."""
        return self.output(nnx.silu(self.hidden(images)))


@optax.inject_hyperparams
def adam(learning_rate: float, smoothing: float) -> optax.GradientTransformation:
    """Return Adam. The smoothing is for the loss; `inject_hyperparams` only keeps it beside the learning rate."""
    del smoothing
    return optax.adam(learning_rate)


def make_schedules(smoothing: float, steps: int) -> dict[str, Schedule]:
    """Return the schedules to compare."""
    none: dict[str, Schedule] = {"none": optax.constant_schedule(0.0)}
    if smoothing == 0:
        return none
    return none | {
        "constant": optax.constant_schedule(smoothing),
        "annealed": optax.linear_schedule(smoothing, 0.0, steps),
    }


# --- Training -------------------------------------------------------------------------------------------------------

ADAM = adam(LEARNING_RATE, smoothing=0.0)

compilations: list[str] = []


def loss_fn(network: Network, images: Array, labels: Array, smoothing: Float32[Array, ""]) -> Float32[Array, ""]:
    """Return the mean loss of a batch."""
    compilations.append("loss_fn")  # Python gets here when the step is traced, not when it runs
    return label_smoothed_cross_entropy(network(images), labels, smoothing=smoothing, reduction="mean")


@nnx.jit(static_argnames="schedule")
def train_step(
    network: Network, optimizer: nnx.Optimizer[Network], images: Array, labels: Array, *, schedule: Schedule
) -> Float32[Array, ""]:
    """Train on one batch, and return the smoothing that it had."""
    # `inject_hyperparams` takes schedules too, but its state holds the value of the last update, one step late.
    smoothing = optimizer.opt_state.hyperparams["smoothing"]
    smoothing[...] = schedule(optimizer.step[...])
    optimizer.update(network, nnx.grad(loss_fn)(network, images, labels, smoothing[...]))
    return smoothing[...]


@nnx.jit
def evaluate(network: Network, images: Array, labels: Array) -> dict[str, Float32[Array, ""]]:
    """Return what the metrics say of some images."""
    metrics = nnx.MultiMetric(accuracy=Accuracy(), nll=MeanNLL(), calibration_error=CalibrationError())
    _, stats = label_smoothed_cross_entropy_with_stats(network(images), labels)
    metrics.update(stats=stats)
    return metrics.compute()


class Run(NamedTuple):
    """One training: the smoothing of each step, and the metrics on the test images after each epoch."""

    smoothing: list[float]
    metrics: list[Metrics]


def train(schedule: Schedule, epochs: int, seed: int, on_epoch: Callable[[], None]) -> Run:
    """Train a network."""
    digits = read_digits(seed)
    test = jnp.asarray(digits.test_images), jnp.asarray(digits.test_labels)
    network = Network(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(network, ADAM, wrt=nnx.Param)
    run = Run([], [])
    for epoch in range(epochs):
        for rows in batch_order(len(digits.train_labels), seed, epoch):
            images, labels = jnp.asarray(digits.train_images[rows]), jnp.asarray(digits.train_labels[rows])
            run.smoothing.append(train_step(network, optimizer, images, labels, schedule=schedule))
        run.metrics.append({name: float(value) for name, value in evaluate(network, *test).items()})
        on_epoch()
    return Run([float(smoothing) for smoothing in run.smoothing], run.metrics)


# --- Results --------------------------------------------------------------------------------------------------------


def mean_metrics(runs: list[Run], epoch: int) -> Metrics:
    """Return the mean over the repeats of each metric after an epoch."""
    return {name: float(np.mean([run.metrics[epoch][name] for run in runs])) for name in METRICS}


def make_table(runs: dict[str, list[Run]]) -> Table:
    """Return the metrics after the last epoch, a row for each schedule."""
    repeats = len(runs["none"])
    table = Table("smoothing", "first step", "last step", "accuracy", "nll", "calibration error")
    table.title = "Test images" if repeats == 1 else f"Test images, mean of {repeats} trainings"
    for name, repeated in runs.items():
        numbers = [repeated[0].smoothing[0], repeated[0].smoothing[-1], *mean_metrics(repeated, -1).values()]
        table.add_row(name, *(f"{number:.4f}" for number in numbers))
    return table


def plot(runs: dict[str, list[Run]], picture: Path) -> None:
    """Draw smoothing by step, and nll and calibration error by epoch."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name, repeated in runs.items():
        means = [mean_metrics(repeated, epoch) for epoch in range(len(repeated[0].metrics))]
        epochs = range(1, len(means) + 1)
        left.plot(repeated[0].smoothing, label=name)
        middle.plot(epochs, [mean["nll"] for mean in means], marker=".", label=name)
        right.plot(epochs, [mean["calibration_error"] for mean in means], marker=".", label=name)
    left.set(title="Schedule", xlabel="step", ylabel="smoothing")
    middle.set(title="Test images: nll", xlabel="epoch", ylabel="nats per image")
    right.set(title="Test images: calibration error", xlabel="epoch", ylabel="|confidence - accuracy|")
    for axes in (middle, right):
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])  # with room above, even if one epoch is all there is
    middle.legend(title="smoothing")
    figure.suptitle("Digits in JAX: smoothing from a schedule")
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


@app.command()
def main(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 20,
    smoothing: Annotated[
        float, typer.Option(callback=checked_smoothing, help="Constant and initial label smoothing, from 0 to 1.")
    ] = 0.1,
    repeats: Annotated[int, typer.Option(min=1, help="Trainings of each schedule, each with a seed of its own.")] = 3,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="First seed of weights, split and batches.")] = 0,
    output: Annotated[Path, typer.Option(writable=True, callback=made_folder, help="Folder for the plot.")] = Path(
        "out/jax_schedule"
    ),
) -> None:
    """Train on handwritten digits in JAX with smoothing from three schedules.

    These are: none, constant, and annealed to 0. The table and the plot show what each does to accuracy, nll and
    calibration error on test images. The last line says how often the training was compiled.
    """
    console = Console()
    compilations.clear()
    steps = epochs * (len(read_digits(seed).train_labels) // BATCH_SIZE)
    schedules = make_schedules(smoothing, steps)
    runs: dict[str, list[Run]] = {name: [] for name in schedules}
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=len(schedules) * repeats * epochs)
        for name, schedule in schedules.items():
            for repeat in range(repeats):
                runs[name].append(train(schedule, epochs, seed + repeat, lambda: progress.advance(task)))

    console.print(make_table(runs))
    total, count = len(schedules) * repeats * steps, len(compilations)
    console.print(f"{total} steps, {len(schedules)} schedule(s), {count} compilation(s): one for each", highlight=False)
    plot(runs, output / "schedule.png")
    console.print(f"wrote {output / 'schedule.png'}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    app()
