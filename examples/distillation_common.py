"""What jax_distillation and torch_distillation share, without a framework: the order of trainings, table and plot."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import numpy as np
import typer
from jaxtyping import Float32
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from examples.common import CLASSES, METRICS, Metrics, checked_smoothing, print_written, read_digits

BATCH_SIZE = 64
TEACHER_HIDDEN, STUDENT_HIDDEN = (128,), (32,)
TEMPERATURES = (1, 2, 4, 8)

Network = TypeVar("Network")
Probabilities = Float32[np.ndarray, "N 10"]


class Options(NamedTuple):
    """What the command line asks for."""

    epochs: int
    smoothing: float
    rows: int
    repeats: int
    seed: int


class Trained(NamedTuple):
    """Which network it is; temperature 0 stands for labels instead of a teacher."""

    role: str
    smoothing: float
    temperature: int


Results = dict[Trained, Metrics]
Opinions = dict[float, np.ndarray]  # of teachers by smoothing: mean probabilities of the wrong classes, sorted

Epochs = Annotated[int, typer.Option(min=1, help="Passes of a teacher over its images; a student takes as many steps.")]
TeacherSmoothing = Annotated[
    float, typer.Option(callback=checked_smoothing, help="Label smoothing of the second teacher, from 0 to 1.")
]
Rows = Annotated[int, typer.Option(min=BATCH_SIZE, max=1000, help="Images that students train on.")]
Repeats = Annotated[int, typer.Option(min=1, help="Times to do it all, each with a seed of its own.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31, help="First seed of weights, split and batches.")]


class Framework(NamedTuple):
    """How a framework trains and evaluates.

    Args:
        name: for the plot.
        train: takes hidden widths, images, targets, number of steps, seed, smoothing and temperature.
        probabilities: takes a network, images and temperature.
        evaluate: takes a network, images and labels.
    """

    name: str
    train: Callable[..., Network]
    probabilities: Callable[..., Probabilities]
    evaluate: Callable[..., Metrics]


def train_all(
    framework: Framework, options: Options, seed: int, on_network: Callable[[], None]
) -> tuple[Results, Opinions]:
    """Train teachers and students; return their metrics on test images, and the teachers' opinions."""
    digits = read_digits(seed)
    few_images, few_labels = digits.train_images[: options.rows], digits.train_labels[: options.rows]
    steps = options.epochs * (len(digits.train_labels) // BATCH_SIZE)
    results: Results = {}
    opinions: Opinions = {}

    def note(trained: Trained, network: Network) -> Network:
        results[trained] = framework.evaluate(network, digits.test_images, digits.test_labels)
        on_network()
        return network

    note(Trained("student", 0.0, 0), framework.train(STUDENT_HIDDEN, few_images, few_labels, steps, seed))
    for smoothing in sorted({0.0, options.smoothing}):
        teacher = note(
            Trained("teacher", smoothing, 0),
            framework.train(TEACHER_HIDDEN, digits.train_images, digits.train_labels, steps, seed, smoothing=smoothing),
        )
        on_test = framework.probabilities(teacher, digits.test_images, 1.0)
        opinions[smoothing] = np.sort(on_test)[:, -2::-1].mean(axis=0)
        for temperature in TEMPERATURES:
            soft_labels = framework.probabilities(teacher, few_images, float(temperature))
            student = framework.train(
                STUDENT_HIDDEN, few_images, soft_labels, steps, seed, temperature=float(temperature)
            )
            note(Trained("student", smoothing, temperature), student)
    return results, opinions


def compare(framework: Framework, options: Options, output: Path) -> None:
    """Do all trainings `options.repeats` times, print the table and draw the plot."""
    console = Console()
    networks = 1 + len({0.0, options.smoothing}) * (1 + len(TEMPERATURES))
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=options.repeats * networks)
        seeds = range(options.seed, options.seed + options.repeats)
        outcomes = [train_all(framework, options, seed, lambda: progress.advance(task)) for seed in seeds]
    results, opinions = [results for results, _ in outcomes], [opinions for _, opinions in outcomes]
    console.print(make_table(results, options.rows))
    plot(results, opinions, framework.name, output / "distillation.png")
    print_written(console, output / "distillation.png")


def make_table(metrics: list[Results], rows: int) -> Table:
    """Return the means over the repeats, a row for each network."""
    table = Table("network", "learns from", "T", "accuracy", "nll", "calibration error")
    table.title = f"Test images, mean of {len(metrics)}; students see {rows} images"
    for trained in sorted(metrics[0], key=lambda trained: (trained.role == "student", trained[1:])):
        source = "labels" if trained.temperature == 0 else "teacher"
        source = source if trained == ("student", 0, 0) else f"{source}, smoothing {trained.smoothing:g}"
        means = [np.mean([repeat[trained][name] for repeat in metrics]) for name in METRICS]
        table.add_row(trained.role, source, str(trained.temperature or ""), *(f"{mean:.4f}" for mean in means))
    return table


def plot(metrics: list[Results], wrong: list[Opinions], framework: str, picture: Path) -> None:
    """Draw the accuracy of students by temperature, and how teachers rate wrong classes."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    alone = 100 * np.mean([repeat[Trained("student", 0.0, 0)]["accuracy"] for repeat in metrics])
    left.axhline(alone, color="black", linestyle="--", label="none: student of labels")
    for smoothing in wrong[0]:
        students = [Trained("student", smoothing, temperature) for temperature in TEMPERATURES]
        accuracy = 100 * np.array([[repeat[student]["accuracy"] for student in students] for repeat in metrics])
        (line,) = left.plot(TEMPERATURES, accuracy.mean(axis=0), label=f"smoothing {smoothing:g}")
        for repeat in accuracy:
            left.plot(TEMPERATURES, repeat, ".", color=line.get_color())
        mean = np.mean([repeat[smoothing] for repeat in wrong], axis=0)
        right.semilogy(range(2, CLASSES + 1), mean, marker=".", label=f"smoothing {smoothing:g}")
    left.set_xscale("log", base=2)
    left.set_xticks(TEMPERATURES, [str(temperature) for temperature in TEMPERATURES])
    left.set(
        title="Students (dots: repeats; lines: their means)", xlabel="temperature", ylabel="accuracy on test images, %"
    )
    right.set(title="Teachers", xlabel="rank of a class in the teacher's opinion", ylabel="mean probability")
    figure.legend(*left.get_legend_handles_labels(), title="teacher", loc="outside lower center", ncols=3)
    figure.suptitle(f"Digits in {framework}: distillation from teachers with and without smoothing")
    figure.savefig(picture, dpi=100)
