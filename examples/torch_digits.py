"""Train on handwritten digits in torch, and go on after a kill as if nothing had happened.

    .venv/bin/python -m examples.torch_digits --epochs 20

Stop it whenever you like (Ctrl-C, `kill -9`) and give the same command again: the losses are those of a run that nobody
stopped, bit for bit (`tests/test_resumption.py`). That takes three things:

- a checkpoint holds the weights, the optimizer's state and the step, and is whole or not there;
- a batch is a function of (seed, step), so no iterator needs saving;
- the losses have one line per step, so a checkpoint of n steps goes with the first n lines.

An output folder serves one process at a time: nothing locks it.

What comes out: a table, and in the output folder the losses, the checkpoints and a plot. Compare `--smoothing 0`: with
smoothing 0.1 the network is right more often here, but has a higher nll and calibration error, because it is less sure
than it could be. The same in JAX: jax_digits.py.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from jaxtyping import Float, Float32, Int32
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.special import entr
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lsce_spec import check_smoothing, smoothing_weights
from lsce_torch import LossStats, label_smoothed_cross_entropy_with_stats
from lsce_torch.metrics import Accuracy, CalibrationError, MeanLoss, MeanNLL, TopKAccuracy

PIXELS, HIDDEN, CLASSES = 64, 128, 10
BATCH_SIZE, EVALUATION_BATCH_SIZE = 32, 599  # 1198 images to train on and 599 to test on
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 1e-2


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


class Network(nn.Module):
    """Pixels to logits, two hidden layers. With bfloat16 the weights stay float32 and the arithmetic is bfloat16."""

    def __init__(self, bfloat16: bool) -> None:
        """Draw the initial weights."""
        super().__init__()
        self.bfloat16 = bfloat16
        self.hidden1 = nn.Linear(PIXELS, HIDDEN)
        self.hidden2 = nn.Linear(HIDDEN, HIDDEN)
        self.output = nn.Linear(HIDDEN, CLASSES)

    def forward(self, images: Float32[Tensor, "N 64"]) -> Float[Tensor, "N 10"]:
        """Return the logits."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            return self.output(torch.relu(self.hidden2(torch.relu(self.hidden1(images)))))


Optimizer = torch.optim.Optimizer


def make_optimizer(network: Network) -> Optimizer:
    """Return AdamW."""
    return torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def train_step(
    network: Network, optimizer: Optimizer, images: Tensor, labels: Tensor, smoothing: float
) -> tuple[Float32[Tensor, ""], LossStats]:
    """Train on one batch. The loss is float32, whatever the dtype of the logits."""
    loss, stats = label_smoothed_cross_entropy_with_stats(network(images), labels, smoothing=smoothing)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss, stats


@torch.no_grad()
def evaluation_step(
    network: Network, metrics: MetricCollection, images: Tensor, labels: Tensor, smoothing: float
) -> None:
    """Feed the metrics with a batch: one sweep over the logits serves all of them."""
    logits = network(images)
    _, stats = label_smoothed_cross_entropy_with_stats(logits, labels, smoothing=smoothing)
    metrics.update(stats=stats, logits=logits, labels=labels)


def evaluate(network: Network, images: np.ndarray, labels: np.ndarray, smoothing: float) -> dict[str, float]:
    """Return what the metrics say of some images."""
    metrics = MetricCollection(
        {
            "loss": MeanLoss(),
            "nll": MeanNLL(),
            "accuracy": Accuracy(),
            "top_3": TopKAccuracy(3),
            "calibration_error": CalibrationError(),
        }
    )
    for start in range(0, len(labels), EVALUATION_BATCH_SIZE):
        rows = slice(start, start + EVALUATION_BATCH_SIZE)
        evaluation_step(network, metrics, torch.from_numpy(images[rows]), torch.from_numpy(labels[rows]), smoothing)
    return {name: float(value) for name, value in metrics.compute().items()}


# --- Checkpoints ----------------------------------------------------------------------------------------------------


class Checkpoints:
    """The latest checkpoint of a run, in a file that a whole new one replaces."""

    def __init__(self, folder: Path) -> None:
        """Create the folder if need be."""
        folder.mkdir(exist_ok=True)
        self.path = folder / "latest.pt"

    def save(self, step: int, network: Network, optimizer: Optimizer) -> None:
        """Save everything that the steps from `step` on depend on."""
        partial = self.path.with_suffix(".partial")
        torch.save({"step": step, "network": network.state_dict(), "optimizer": optimizer.state_dict()}, partial)
        os.replace(partial, self.path)

    def restore(self, network: Network, optimizer: Optimizer) -> int:
        """Load the latest checkpoint and return the step to go on with, 0 if there is none."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"]


def open_run(folder: Path, options: dict[str, Any], fresh: bool) -> Checkpoints:
    """Return the checkpoints in a folder, unless it holds anything else. What is removed is this program's own."""
    options_file, checkpoints, losses = (folder / name for name in ("options.json", "checkpoints", "losses.jsonl"))
    found = read_options(options_file)
    own = found.get("program") == options["program"]
    renew = own and fresh
    if found != options and not renew and any(path.exists() for path in (options_file, checkpoints, losses)):
        other = ", ".join(f"{name}={value}" for name, value in found.items()) or "unknown"
        advice = "Choose another folder, or add --fresh." if own else "Choose another folder."
        raise typer.BadParameter(f"{folder} holds another run ({other}). {advice}")
    if renew and checkpoints.exists():
        shutil.rmtree(checkpoints)
    write_whole(options_file, json.dumps(options).encode())
    return Checkpoints(checkpoints)


def read_options(path: Path) -> dict[str, Any]:
    """Return the options of the run that a file tells of, none if it is missing or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def keep_losses(path: Path, steps: int) -> None:
    """Drop the lines of steps that are trained again, a torn last one included."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if len(lines) < steps:
        raise typer.BadParameter(f"{path} lacks steps that the checkpoint has. Start again with --fresh.")
    write_whole(path, b"".join(lines[:steps]))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there with its old content or with its new, whenever the process is killed."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


# --- Results --------------------------------------------------------------------------------------------------------


def target_entropy(smoothing: float) -> float:
    """Return the entropy of a smoothed target: the least loss that any network can have."""
    on, off = smoothing_weights("uniform", smoothing, CLASSES)
    return float(entr([on] + [off] * (CLASSES - 1)).sum())


def make_table(train: dict[str, float], test: dict[str, float], smoothing: float) -> Table:
    """Return the metrics of both parts of the data side by side."""
    table = Table("", "training", "test", title=f"Least possible loss: {target_entropy(smoothing):.4f}")
    labels = {
        "loss": "loss",
        "nll": "nll",
        "accuracy": "accuracy",
        "top_3": "right among the top 3",
        "calibration_error": "calibration error",
    }
    for name, label in labels.items():
        table.add_row(label, f"{train[name]:.4f}", f"{test[name]:.4f}")
    return table


def plot_losses(losses: Path, smoothing: float, picture: Path) -> None:
    """Draw loss and nll by step, of the whole run, however many times it was stopped."""
    lines = [json.loads(line) for line in losses.read_text().splitlines()]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([line["loss"] for line in lines], linewidth=1, label=f"loss, smoothing {smoothing:g}")
    if smoothing:  # without it, both are the same line, and the least possible loss is 0
        axes.plot([line["nll"] for line in lines], linewidth=1, label="nll: the same without smoothing")
        axes.axhline(target_entropy(smoothing), color="black", linestyle="--", linewidth=1, label="least possible loss")
    axes.set(title="Handwritten digits in torch: each training batch", xlabel="step", ylabel="nats per image")
    axes.set_ylim(bottom=0)
    axes.legend()
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
    smoothing: Annotated[float, typer.Option(callback=checked_smoothing, help="Label smoothing, from 0 to 1.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of weights, split and batches.")] = 0,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Network in bfloat16; the loss stays float32.")] = False,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps from one checkpoint to the next.")] = 50,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove the run that the output folder holds.")] = False,
    output: Annotated[Path, typer.Option(callback=made_folder, help="Folder of the run.")] = Path("out/torch_digits"),
) -> None:
    """Train on handwritten digits in torch, going on where the run in the output folder stopped.

    Kill it and give the same command again: the losses are those of a run that nobody stopped, bit for bit. A table
    shows loss, nll, accuracy and calibration error, and a plot the losses by step.
    """
    console = Console()
    options = {"program": "torch_digits", "smoothing": smoothing, "seed": seed, "bfloat16": bfloat16}
    checkpoints = open_run(output, options, fresh)
    losses, picture = output / "losses.jsonl", output / "losses.png"
    digits = read_digits(seed)
    torch.manual_seed(seed)
    network = Network(bfloat16)
    optimizer = make_optimizer(network)
    first, last = checkpoints.restore(network, optimizer), epochs * (len(digits.train_labels) // BATCH_SIZE)
    keep_losses(losses, first)
    done = f"{first} of {last} steps are done"
    if first > last:
        done = f"{first} steps are done already, which is more than {last}: nothing to train"
    console.print(done, highlight=False)

    with losses.open("a", buffering=1) as lines:
        for step in track(range(first, last), description="training", console=console):
            rows = batch_rows(len(digits.train_labels), seed, step)
            images, labels = torch.from_numpy(digits.train_images[rows]), torch.from_numpy(digits.train_labels[rows])
            loss, stats = train_step(network, optimizer, images, labels, smoothing)
            # Python writes the shortest decimals that read back as the same number, so float32 loses nothing.
            line = {"step": step, "loss": loss.item(), "nll": stats.nll.mean().item()}
            lines.write(json.dumps(line) + "\n")
            if (step + 1) % checkpoint_every == 0 or step + 1 == last:
                checkpoints.save(step + 1, network, optimizer)

    on_train = evaluate(network, digits.train_images, digits.train_labels, smoothing)
    on_test = evaluate(network, digits.test_images, digits.test_labels, smoothing)
    console.print(make_table(on_train, on_test, smoothing))
    plot_losses(losses, smoothing, picture)
    console.print(f"wrote {picture}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    app()
