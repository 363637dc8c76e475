"""Train on mixed digits in torch: MixUp and CutMix, with and without label smoothing on top.

    .venv/bin/python -m examples.torch_mixup --epochs 40

MixUp averages two images, CutMix pastes a box of one into the other; the labels are averaged in the same proportion.
Such soft labels t go to the loss as they are, and it smooths them like any other: (1 - e) t + e/K.

What comes out: a table with accuracy, nll and calibration error of six trainings on 300 images, and a plot with mixed
images. Mixing alone already makes a network less sure than it is right, as smoothing does, and the two add up: whoever
turns one on should turn the other down. The same in JAX: jax_mixup.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from jaxtyping import Float32, Int32
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lsce_spec import check_smoothing
from lsce_torch import label_smoothed_cross_entropy, label_smoothed_cross_entropy_with_stats
from lsce_torch.metrics import Accuracy, CalibrationError, MeanNLL

SIDE, HIDDEN, CLASSES = 8, 128, 10
TRAIN_IMAGES, BATCH_SIZE = 300, 30
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 1e-2
MIXUP_ALPHA, CUTMIX_ALPHA = 0.4, 1.0

Images = Float32[np.ndarray, "N 8 8"]
Targets = Float32[np.ndarray, "N 10"]


# --- Data -----------------------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """The 1797 digits that ship with scikit-learn (UCI, 8 x 8 pixels), pixels from 0 to 1."""

    train_images: Float32[np.ndarray, "train 8 8"]
    test_images: Float32[np.ndarray, "test 8 8"]
    train_labels: Int32[np.ndarray, " train"]
    test_labels: Int32[np.ndarray, " test"]


def read_digits(seed: int) -> Digits:
    """Return 30 digits of each class to train on and all others to test on."""
    digits = load_digits()
    images, labels = (digits.images / 16).astype(np.float32), digits.target.astype(np.int32)
    return Digits(*train_test_split(images, labels, train_size=TRAIN_IMAGES, stratify=labels, random_state=seed))


def keep(images: Images, targets: Targets, random: np.random.Generator) -> tuple[Images, Targets]:
    """Mix nothing."""
    return images, targets


def mixup(images: Images, targets: Targets, random: np.random.Generator) -> tuple[Images, Targets]:
    """Average each image with another one of the batch (Zhang et al., "mixup", 2018)."""
    other, share = random.permutation(len(images)), np.float32(random.beta(MIXUP_ALPHA, MIXUP_ALPHA))
    return share * images + (1 - share) * images[other], share * targets + (1 - share) * targets[other]


def cutmix(images: Images, targets: Targets, random: np.random.Generator) -> tuple[Images, Targets]:
    """Paste a box of another image of the batch into each (Yun et al., "CutMix", 2019)."""
    other, share = random.permutation(len(images)), random.beta(CUTMIX_ALPHA, CUTMIX_ALPHA)
    middle, half = random.integers(SIDE, size=2), SIDE * np.sqrt(1 - share) / 2
    (top, left), (bottom, right) = np.clip(np.rint([middle - half, middle + half]), 0, SIDE).astype(int)
    mixed = images.copy()
    mixed[:, top:bottom, left:right] = images[other, top:bottom, left:right]
    # The box may stick out of the image: what counts is the share of the pixels that are left.
    share = np.float32(1 - (bottom - top) * (right - left) / SIDE**2)
    return mixed, share * targets + (1 - share) * targets[other]


MIXES = {"none": keep, "MixUp": mixup, "CutMix": cutmix}


# --- Network and training -------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Pixels to logits, two hidden layers."""

    def __init__(self) -> None:
        """Draw the initial weights."""
        super().__init__()
        self.hidden1 = nn.Linear(SIDE * SIDE, HIDDEN)
        self.hidden2 = nn.Linear(HIDDEN, HIDDEN)
        self.output = nn.Linear(HIDDEN, CLASSES)

    def forward(self, images: Float32[Tensor, "N 8 8"]) -> Float32[Tensor, "N 10"]:
        """Return the logits."""
        pixels = images.reshape(len(images), -1)
        return self.output(torch.relu(self.hidden2(torch.relu(self.hidden1(pixels)))))


Optimizer = torch.optim.Optimizer


def train_step(network: Network, optimizer: Optimizer, images: Tensor, targets: Tensor, smoothing: float) -> None:
    """Train on one batch with soft labels."""
    loss = label_smoothed_cross_entropy(network(images), targets, smoothing=smoothing)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def train(
    digits: Digits, mix: Callable[..., tuple[Images, Targets]], smoothing: float, epochs: int, seed: int
) -> Network:
    """Return a network trained on mixed batches."""
    torch.manual_seed(seed)
    network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    targets = np.eye(CLASSES, dtype=np.float32)[digits.train_labels]
    for epoch in range(epochs):
        random = np.random.default_rng([seed, epoch])
        for rows in random.permutation(TRAIN_IMAGES).reshape(-1, BATCH_SIZE):
            mixed = mix(digits.train_images[rows], targets[rows], random)
            train_step(network, optimizer, *map(torch.from_numpy, mixed), smoothing)
    return network


@torch.no_grad()
def evaluation_step(network: Network, metrics: MetricCollection, images: Tensor, labels: Tensor) -> None:
    """Feed the metrics with a batch: one sweep over the logits serves all of them."""
    _, stats = label_smoothed_cross_entropy_with_stats(network(images), labels)
    metrics.update(stats=stats)


def evaluate(network: Network, digits: Digits) -> dict[str, float]:
    """Return what the metrics say of the test images."""
    metrics = MetricCollection({"accuracy": Accuracy(), "nll": MeanNLL(), "calibration_error": CalibrationError()})
    evaluation_step(network, metrics, torch.from_numpy(digits.test_images), torch.from_numpy(digits.test_labels))
    return {name: float(value) for name, value in metrics.compute().items()}


# --- Results --------------------------------------------------------------------------------------------------------

Results = dict[tuple[str, float], dict[str, float]]  # of each mix and smoothing


def make_table(results: Results) -> Table:
    """Return the metrics of each training."""
    table = Table("mixing", "smoothing", "accuracy", "nll", "calibration error", title="1497 test images")
    for (mix, smoothing), metrics in results.items():
        values = (metrics["accuracy"], metrics["nll"], metrics["calibration_error"])
        table.add_row(mix, f"{smoothing:g}", *(f"{value:.4f}" for value in values))
    return table


def plot_mixes(digits: Digits, results: Results, seed: int, picture: Path) -> None:
    """Draw mixed images with their labels, and the calibration errors."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    examples, bars = figure.subfigures(1, 2)
    examples.suptitle("Training images in torch and their labels")
    rows = examples.subplots(len(MIXES), 5)
    targets = np.eye(CLASSES, dtype=np.float32)[digits.train_labels]
    for axes, (name, mix) in zip(rows, MIXES.items(), strict=True):
        axes[0].set_ylabel(name)
        for index, place in enumerate(axes):
            random = np.random.default_rng([seed, index])
            images, labels = mix(digits.train_images[:BATCH_SIZE], targets[:BATCH_SIZE], random)
            place.imshow(images[index], cmap="gray_r", vmin=0, vmax=1)
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
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 40,
    smoothing: Annotated[float, typer.Option(callback=checked_smoothing, help="Label smoothing, from 0 to 1.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of weights, split, batches and mixes.")] = 0,
    output: Annotated[Path, typer.Option(callback=made_folder, help="Folder for the plot.")] = Path("out/torch_mixup"),
) -> None:
    """Train on handwritten digits in torch: unmixed, with MixUp and with CutMix, each without and with smoothing.

    A table and a plot compare accuracy, nll and calibration error of the trainings. Mixing already makes a network
    less sure, as smoothing does, and the two add up.
    """
    console = Console()
    digits, results = read_digits(seed), {}
    runs = [(mix, value) for mix in MIXES for value in sorted({0.0, smoothing})]
    for mix, value in track(runs, description="trainings", console=console):
        results[mix, value] = evaluate(train(digits, MIXES[mix], value, epochs, seed), digits)
    console.print(make_table(results))
    plot_mixes(digits, results, seed, output / "mixes.png")
    console.print(f"wrote {output / 'mixes.png'}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    app()
