"""What jax_schedule and torch_schedule share, without a framework: the trainings of all schedules, table and plot."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from examples.common import METRICS, Metrics, checked_smoothing, print_written, read_digits

BATCH_SIZE = 32


class Run(NamedTuple):
    """One training: the smoothing of each step, and the metrics on the test images after each epoch."""

    smoothing: list[float]
    metrics: list[Metrics]


class Options(NamedTuple):
    """What the command line asks for."""

    epochs: int
    smoothing: float
    repeats: int
    seed: int


Epochs = Annotated[int, typer.Option(min=1, help="Passes over the training images.")]
StartSmoothing = Annotated[
    float, typer.Option(callback=checked_smoothing, help="Constant and initial label smoothing, from 0 to 1.")
]
Repeats = Annotated[int, typer.Option(min=1, help="Trainings of each schedule, each with a seed of its own.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31, help="First seed of weights, split and batches.")]


def count_steps(options: Options) -> int:
    """Return the number of steps of a training."""
    return options.epochs * (len(read_digits(options.seed).train_labels) // BATCH_SIZE)


def compare(
    train: Callable[..., Run],
    schedules: dict[str, Any],
    options: Options,
    count_compilations: Callable[[], str],
    framework: str,
    output: Path,
) -> None:
    """Train with each schedule, print the table and the number of compilations, and draw the plot.

    Args:
        train: takes a schedule, the number of epochs, a seed, and a function to call after each epoch.
        schedules: by name, as `train` takes them.
        options: of the command line.
        count_compilations: returns how often the training was compiled, in words.
        framework: its name, for the plot.
        output: the folder for the plot.
    """
    console = Console()
    runs: dict[str, list[Run]] = {name: [] for name in schedules}
    trainings = len(schedules) * options.repeats
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=trainings * options.epochs)
        for name, schedule in schedules.items():
            for seed in range(options.seed, options.seed + options.repeats):
                runs[name].append(train(schedule, options.epochs, seed, lambda: progress.advance(task)))
    console.print(make_table(runs))
    steps = trainings * count_steps(options)
    console.print(f"{steps} steps, {len(schedules)} schedule(s), {count_compilations()}", highlight=False)
    plot(runs, framework, output / "schedule.png")
    print_written(console, output / "schedule.png")


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


def plot(runs: dict[str, list[Run]], framework: str, picture: Path) -> None:
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
    figure.suptitle(f"Digits in {framework}: smoothing from a schedule")
    figure.savefig(picture, dpi=100)
