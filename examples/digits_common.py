"""What jax_digits and torch_digits share, without a framework: the files of a run, table and plot."""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from rich.table import Table
from scipy.special import entr

from examples.common import CLASSES, Metrics, made_folder, write_whole
from lsce_spec import smoothing_weights

Epochs = Annotated[int, typer.Option(min=1, help="Passes over the training images.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of weights, split and batches.")]
BFloat16 = Annotated[bool, typer.Option("--bfloat16", help="Network in bfloat16; the loss stays float32.")]
CheckpointEvery = Annotated[int, typer.Option(min=1, help="Steps from one checkpoint to the next.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Remove the run that the output folder holds.")]
RunFolder = Annotated[Path, typer.Option(callback=made_folder, help="Folder of the run.")]


# --- The files of a run ---------------------------------------------------------------------------------------------


def open_run(folder: Path, options: dict[str, Any], fresh: bool) -> Path:
    """Return the folder for checkpoints, unless the output folder holds another run. Remove only this program's own."""
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
    return checkpoints


def read_options(path: Path) -> dict[str, Any]:
    """Return the options that a file holds, none if it is missing or damaged."""
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


def describe_progress(first: int, last: int) -> str:
    """Return how many steps are done, in words."""
    if first > last:
        return f"{first} steps are done already, which is more than {last}: nothing to train"
    return f"{first} of {last} steps are done"


# --- Results --------------------------------------------------------------------------------------------------------


def target_entropy(smoothing: float) -> float:
    """Return the entropy of a smoothed target: the least loss that any network can have."""
    on, off = smoothing_weights("uniform", smoothing, CLASSES)
    return float(entr([on] + [off] * (CLASSES - 1)).sum())


def make_table(train: Metrics, test: Metrics, smoothing: float) -> Table:
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


def plot_losses(losses: Path, smoothing: float, framework: str, picture: Path) -> None:
    """Draw loss and nll of all steps, also those before a stop."""
    lines = [json.loads(line) for line in losses.read_text().splitlines()]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([line["loss"] for line in lines], linewidth=1, label=f"loss, smoothing {smoothing:g}")
    if smoothing:  # without smoothing both are the same line, and the least possible loss is 0
        axes.plot([line["nll"] for line in lines], linewidth=1, label="nll: the same without smoothing")
        axes.axhline(target_entropy(smoothing), color="black", linestyle="--", linewidth=1, label="least possible loss")
    axes.set(title=f"Handwritten digits in {framework}: each training batch", xlabel="step", ylabel="nats per image")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(picture, dpi=100)
