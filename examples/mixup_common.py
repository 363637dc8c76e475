"""What jax_mixup and torch_mixup share, without a framework: data, mixed batches, the six trainings, table and plot."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from jaxtyping import Float32
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from examples.common import CLASSES, METRICS, PIXELS, Digits, Metrics, print_written, read_digits

SIDE = 8
TRAIN_IMAGES, TEST_IMAGES, BATCH_SIZE = 300, 1497, 30
MIXUP_ALPHA, CUTMIX_ALPHA = 0.4, 1.0

Images = Float32[np.ndarray, "N 8 8"]
Targets = Float32[np.ndarray, "N 10"]
Mixed = tuple[Images, Targets]
Mix = Callable[[Images, Targets, np.random.Generator], Mixed]
Batch = tuple[Float32[np.ndarray, "30 64"], Float32[np.ndarray, "30 10"]]


# --- Data -----------------------------------------------------------------------------------------------------------


def keep(images: Images, targets: Targets, random: np.random.Generator) -> Mixed:
    """Mix nothing."""
    return images, targets


def mixup(images: Images, targets: Targets, random: np.random.Generator) -> Mixed:
    """Average each image with another one of the batch (Zhang et al., "mixup", 2018)."""
    other, share = random.permutation(len(images)), np.float32(random.beta(MIXUP_ALPHA, MIXUP_ALPHA))
    return share * images + (1 - share) * images[other], share * targets + (1 - share) * targets[other]


def cutmix(images: Images, targets: Targets, random: np.random.Generator) -> Mixed:
    """Paste a box of another image of the batch into each (Yun et al., "CutMix", 2019)."""
    other, share = random.permutation(len(images)), random.beta(CUTMIX_ALPHA, CUTMIX_ALPHA)
    middle, half = random.integers(SIDE, size=2), SIDE * np.sqrt(1 - share) / 2
    (top, left), (bottom, right) = np.clip(np.rint([middle - half, middle + half]), 0, SIDE).astype(int)
    mixed = images.copy()
    mixed[:, top:bottom, left:right] = images[other, top:bottom, left:right]
    # The box may stick out of the image: the share is that of the pixels that are left.
    share = np.float32(1 - (bottom - top) * (right - left) / SIDE**2)
    return mixed, share * targets + (1 - share) * targets[other]


MIXES = {"none": keep, "MixUp": mixup, "CutMix": cutmix}


def images_and_targets(digits: Digits) -> Mixed:
    """Return the training images, and their labels as targets."""
    return digits.train_images.reshape(-1, SIDE, SIDE), np.eye(CLASSES, dtype=np.float32)[digits.train_labels]


def batches(digits: Digits, mix: Mix, epochs: int, seed: int) -> Iterator[Batch]:
    """Yield the mixed batches of a training, images as rows of pixels."""
    images, targets = images_and_targets(digits)
    for epoch in range(epochs):
        random = np.random.default_rng([seed, epoch])
        for rows in random.permutation(TRAIN_IMAGES).reshape(-1, BATCH_SIZE):
            mixed, shares = mix(images[rows], targets[rows], random)
            yield mixed.reshape(-1, PIXELS), shares


# --- The trainings and their results --------------------------------------------------------------------------------


class Options(NamedTuple):
    """What the command line asks for."""

    epochs: int
    smoothing: float
    seed: int


Epochs = Annotated[int, typer.Option(min=1, help="Passes over the training images.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of weights, split, batches and mixes.")]
Results = dict[tuple[str, float], Metrics]  # by mix and smoothing


def compare(train_and_evaluate: Callable[..., Metrics], options: Options, framework: str, output: Path) -> None:
    """Train with each mix, without and with smoothing; print the table and draw the plot.

    Args:
        train_and_evaluate: takes digits, mix, smoothing, epochs and seed, and returns the metrics of the test images.
        options: of the command line.
        framework: its name, for the plot.
        output: the folder for the plot.
    """
    console = Console()
    digits, results = read_digits(options.seed, TEST_IMAGES), {}
    runs = [(mix, value) for mix in MIXES for value in sorted({0.0, options.smoothing})]
    for mix, value in track(runs, description="trainings", console=console):
        results[mix, value] = train_and_evaluate(digits, MIXES[mix], value, options.epochs, options.seed)
    console.print(make_table(results))
    plot(digits, results, options.seed, framework, output / "mixes.png")
    print_written(console, output / "mixes.png")


def make_table(results: Results) -> Table:
    """Return the metrics of each training."""
    table = Table("mixing", "smoothing", "accuracy", "nll", "calibration error", title=f"{TEST_IMAGES} test images")
    for (mix, smoothing), metrics in results.items():
        table.add_row(mix, f"{smoothing:g}", *(f"{metrics[name]:.4f}" for name in METRICS))
    return table


def plot(digits: Digits, results: Results, seed: int, framework: str, picture: Path) -> None:
    """Draw mixed images with their labels, and the calibration errors."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    mixed, bars = figure.subfigures(1, 2)
    mixed.suptitle(f"Training images in {framework} and their labels")
    images, targets = (array[:BATCH_SIZE] for array in images_and_targets(digits))
    for row, (name, mix) in zip(mixed.subplots(len(MIXES), 5), MIXES.items(), strict=True):
        row[0].set_ylabel(name)
        for index, place in enumerate(row):
            examples, labels = mix(images, targets, np.random.default_rng([seed, index]))
            place.imshow(examples[index], cmap="gray_r", vmin=0, vmax=1)
            shares = [f"{share:.2f} of {digit}" for digit, share in enumerate(labels[index]) if share]
            place.set_xlabel("\n".join(shares), fontsize=8)
            place.set(xticks=[], yticks=[])
    axes = bars.subplots()
    smoothings = sorted({smoothing for _, smoothing in results})
    for index, smoothing in enumerate(smoothings):
        errors = [results[mix, smoothing]["calibration_error"] for mix in MIXES]
        axes.bar(np.arange(len(MIXES)) + 0.4 * index, errors, width=0.38, label=f"smoothing {smoothing:g}")
    axes.set_xticks(np.arange(len(MIXES)) + 0.2 * (len(smoothings) - 1), MIXES)
    axes.set(title="Calibration error, test images", ylabel="expected calibration error")
    bars.legend(loc="outside lower center", ncols=2)
    figure.savefig(picture, dpi=100)
