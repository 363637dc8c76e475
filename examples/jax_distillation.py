"""Teacher and student, in Flax and Optax: soft labels, temperature, and whether a smoothed teacher teaches as well.

    .venv/bin/python -m examples.jax_distillation --epochs 16 --rows 120

A teacher sees all training images with their labels, once without and once with smoothing. Students see few images, and
instead of labels the teacher's probabilities at some temperature T, softmax(z / T). All of them train on one loss:
labels may be classes or probabilities.

The smoothed teacher knows more (accuracy) and teaches less: told that all wrong classes are equally wrong, it no longer
says which of them are alike, and its opinions of them are nearly level (right half of the plot). That is what Müller,
Kornblith and Hinton found ("When Does Label Smoothing Help?", 2019, section 4). It takes a temperature, though: it
shows from 2 on; at 1, where the other teacher says little more than the label, the smoothed one teaches no worse.

What comes out: a table with means over the repeats, and in the output folder a plot. The same in torch:
torch_distillation.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
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

PIXELS, TEACHER_HIDDEN, STUDENT_HIDDEN, CLASSES = 64, 128, 32, 10
BATCH_SIZE = 64
LEARNING_RATE = 1e-2
TEMPERATURES = (1, 2, 4, 8)
METRICS = ("accuracy", "nll", "calibration_error")


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


def batch_rows(rows: int, seed: int, step: int) -> np.ndarray:
    """Return which rows a step trains on: those of its place in the shuffled order of its epoch."""
    epoch, place = divmod(step, rows // BATCH_SIZE)
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    return order[place * BATCH_SIZE : (place + 1) * BATCH_SIZE]


# --- Network and training -------------------------------------------------------------------------------------------


class Network(nnx.Module):
    """Pixels to logits, one hidden layer."""

    def __init__(self, hidden: int, rngs: nnx.Rngs) -> None:
        """Draw the initial weights."""
        self.hidden = nnx.Linear(PIXELS, hidden, rngs=rngs)
        self.output = nnx.Linear(hidden, CLASSES, rngs=rngs)

    def __call__(self, images: Float32[Array, "N 64"]) -> Float32[Array, "N 10"]:
        """Return the logits."""
        return self.output(nnx.silu(self.hidden(images)))


Optimizer = nnx.Optimizer[Network]
ADAM = optax.adam(LEARNING_RATE)


@nnx.jit
def train_step(
    network: Network, optimizer: Optimizer, images: Array, targets: Array, smoothing: float, temperature: float
) -> None:
    """Train on one batch. Targets are classes, or the probabilities of a teacher."""

    def loss_fn(network: Network) -> Float32[Array, ""]:
        # Less the entropy of the target: 0 for a student that agrees with its teacher. The gradient is the same.
        loss = label_smoothed_cross_entropy(
            network(images) / temperature, targets, smoothing=smoothing, subtract_entropy=True, reduction="mean"
        )
        # The gradient shrinks with the square of the temperature (Hinton et al. 2015, section 2).
        return temperature**2 * loss

    optimizer.update(network, nnx.grad(loss_fn)(network))


def train(
    hidden: int,
    images: np.ndarray,
    targets: np.ndarray,
    steps: int,
    seed: int,
    *,
    smoothing: float = 0.0,
    temperature: float = 1.0,
) -> Network:
    """Return a trained network."""
    network = Network(hidden, nnx.Rngs(seed))
    optimizer = nnx.Optimizer(network, ADAM, wrt=nnx.Param)
    for step in range(steps):
        rows = batch_rows(len(images), seed, step)
        train_step(network, optimizer, images[rows], targets[rows], smoothing, temperature)
    return network


@nnx.jit
def probabilities(network: Network, images: Array, temperature: float) -> Float32[Array, "N 10"]:
    """Return what a teacher says: soft labels."""
    return jax.nn.softmax(network(images) / temperature, axis=-1)


@nnx.jit
def evaluate(network: Network, images: Array, labels: Array) -> dict[str, Float32[Array, ""]]:
    """Return what the metrics say of some images."""
    metrics = nnx.MultiMetric(accuracy=Accuracy(), nll=MeanNLL(), calibration_error=CalibrationError())
    _, stats = label_smoothed_cross_entropy_with_stats(network(images), labels)
    metrics.update(stats=stats)
    return metrics.compute()


class Trained(NamedTuple):
    """Which network it is; temperature 0 stands for labels instead of a teacher."""

    role: str
    smoothing: float
    temperature: int


def train_all(
    smoothings: list[float], rows: int, steps: int, seed: int, on_network: Callable[[], None]
) -> tuple[dict[Trained, dict[str, float]], dict[float, np.ndarray]]:
    """Train teachers and students; return their metrics, and the mean wrong probabilities of each teacher, sorted."""
    train_images, test_images, train_labels, test_labels = read_digits(seed)
    few_images, few_labels = train_images[:rows], train_labels[:rows]
    metrics: dict[Trained, dict[str, float]] = {}
    wrong: dict[float, np.ndarray] = {}

    def note(trained: Trained, network: Network) -> None:
        metrics[trained] = {name: float(value) for name, value in evaluate(network, test_images, test_labels).items()}
        on_network()

    note(Trained("student", 0.0, 0), train(STUDENT_HIDDEN, few_images, few_labels, steps, seed))
    for smoothing in smoothings:
        teacher = train(TEACHER_HIDDEN, train_images, train_labels, steps, seed, smoothing=smoothing)
        note(Trained("teacher", smoothing, 0), teacher)
        wrong[smoothing] = np.sort(np.asarray(probabilities(teacher, test_images, 1.0)))[:, -2::-1].mean(axis=0)
        for temperature in TEMPERATURES:
            soft_labels = np.asarray(probabilities(teacher, few_images, float(temperature)))
            student = train(STUDENT_HIDDEN, few_images, soft_labels, steps, seed, temperature=float(temperature))
            note(Trained("student", smoothing, temperature), student)
    return metrics, wrong


# --- Results --------------------------------------------------------------------------------------------------------


def make_table(metrics: list[dict[Trained, dict[str, float]]], rows: int) -> Table:
    """Return the means over the repeats, a row for each network."""
    table = Table("network", "learns from", "T", "accuracy", "nll", "calibration error")
    table.title = f"Test images, mean of {len(metrics)}; students see {rows} images"
    for trained in sorted(metrics[0], key=lambda trained: (trained.role == "student", trained[1:])):
        source = "labels" if trained.temperature == 0 else "teacher"
        source = source if trained == ("student", 0, 0) else f"{source}, smoothing {trained.smoothing:g}"
        means = [np.mean([repeat[trained][name] for repeat in metrics]) for name in METRICS]
        table.add_row(trained.role, source, str(trained.temperature or ""), *(f"{mean:.4f}" for mean in means))
    return table


def plot(metrics: list[dict[Trained, dict[str, float]]], wrong: list[dict[float, np.ndarray]], picture: Path) -> None:
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
    figure.suptitle("Digits in JAX: distillation from teachers with and without smoothing")
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
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes of a teacher over its images; a student takes as many steps.")
    ] = 16,
    smoothing: Annotated[
        float, typer.Option(callback=checked_smoothing, help="Label smoothing of the second teacher, from 0 to 1.")
    ] = 0.1,
    rows: Annotated[int, typer.Option(min=BATCH_SIZE, max=1000, help="Images that students train on.")] = 120,
    repeats: Annotated[int, typer.Option(min=1, help="Times to do it all, each with a seed of its own.")] = 3,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="First seed of weights, split and batches.")] = 0,
    output: Annotated[Path, typer.Option(writable=True, callback=made_folder, help="Folder for the plot.")] = Path(
        "out/jax_distillation"
    ),
) -> None:
    """Train students on what teachers say of handwritten digits in JAX; one teacher was trained with smoothing.

    Each teacher has a student at each of four temperatures, and one more student learns from labels. The table and the
    plot show how well each does on test images; the plot also shows how teachers rate wrong classes.
    """
    console = Console()
    smoothings = sorted({0.0, smoothing})
    steps = epochs * (len(read_digits(seed).train_labels) // BATCH_SIZE)
    metrics, wrong = [], []
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=repeats * (1 + len(smoothings) * (1 + len(TEMPERATURES))))
        for repeat in range(repeats):
            outcome = train_all(smoothings, rows, steps, seed + repeat, lambda: progress.advance(task))
            metrics.append(outcome[0])
            wrong.append(outcome[1])

    console.print(make_table(metrics, rows))
    plot(metrics, wrong, output / "distillation.png")
    console.print(f"wrote {output / 'distillation.png'}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    app()
