"""What the examples share, without a framework: digits, batches, initial weights, hyperparameters, and command lines.

The jax_ and torch_ example of a pair start from the same weights, which NumPy draws, and see the same batches. Their
optimizers have constants that both frameworks round alike. So whatever a pair prints differs by rounding only.
"""

import math
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import numpy as np
import typer
from jaxtyping import Float32, Int32, Int64
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from lsce_spec import check_smoothing

PIXELS, CLASSES = 64, 10
METRICS = ("accuracy", "nll", "calibration_error")

# Optax and torch compute Adam by the same formula, but round its *constants* differently, and a constant that is off
# pulls every weight the same way at every step. With the usual decimals:
# - Optax computes 1 - beta**t in float32; for 0.999 that is 1.3e-5 off (relative).
# - Optax weighs the first moment by float32(0.9) and float32(0.1), whose sum is not 1; torch interpolates.
# - torch multiplies the weights by float32(1 - learning_rate * weight_decay); for 2e-3 and 1e-2 that is 0.14 % too
#   much decay.
# Float32 holds these numbers and their differences from 1 exactly. The examples take powers of 2 as learning rates and
# weight decays, whose products float32 holds too. What is left is rounding.
BETA1, BETA2 = 1 - 2.0**-3, 1 - 2.0**-6
EPSILON = 2.0**-27

Weight = Float32[np.ndarray, "..."]
WeightOf = Callable[[str, tuple[int, ...]], Weight]
Metrics = dict[str, float]
Value = TypeVar("Value")


# --- Data -----------------------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """The 1797 digits that come with scikit-learn (UCI, 8 x 8 pixels), pixels from 0 to 1."""

    train_images: Float32[np.ndarray, "train 64"]
    test_images: Float32[np.ndarray, "test 64"]
    train_labels: Int32[np.ndarray, " train"]
    test_labels: Int32[np.ndarray, " test"]


def read_digits(seed: int, test_size: float = 1 / 3) -> Digits:
    """Return the digits split at random, with equal shares of each class: `test_size`, a fraction or a number."""
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    return Digits(*train_test_split(images, labels, test_size=test_size, stratify=labels, random_state=seed))


def batch_rows(rows: int, batch_size: int, seed: int, step: int) -> Int64[np.ndarray, " batch"]:
    """Return the rows that a step trains on: its part of the shuffled epoch. Rows that fill no batch are left out."""
    epoch, place = divmod(step, rows // batch_size)
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    return order[place * batch_size : (place + 1) * batch_size]


# --- Weights --------------------------------------------------------------------------------------------------------


def initial_weights(seed: int) -> WeightOf:
    """Return a function that draws a layer's weight from its name and shape [..., in, out], for `set_weights`.

    Weights are normal with the variance 1 / in, as in Flax; `in` counts all dimensions but the last.
    """

    def weight(name: str, shape: tuple[int, ...]) -> Weight:
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return (random.standard_normal(shape) / math.sqrt(math.prod(shape[:-1]))).astype(np.float32)

    return weight


# --- Command lines and files ----------------------------------------------------------------------------------------


def new_app() -> typer.Typer:
    """Return a command line without completion, markup and decorated tracebacks."""
    return typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def checked(check: Callable[[Value], object], value: Value) -> Value:
    """Return the value, or turn the library's ValueError into an error of the command line."""
    try:
        check(value)
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from None
    return value


def checked_smoothing(smoothing: float) -> float:
    """Return the smoothing if it is in [0, 1]."""
    return checked(check_smoothing, smoothing)


def made_folder(folder: Path) -> Path:
    """Return the output folder, made if need be, or turn the error into one of the command line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise typer.BadParameter(f"cannot write to the folder {folder}: {reason}.", param_hint="'--output'") from None
    return folder


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that has its old content or its new one, whenever the process is killed."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array as `write_whole` does, even if another process writes the same."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.save(file, array)
    os.replace(partial, path)


def print_written(console: Console, *files: Path) -> None:
    """Print the paths of files that were written, on lines that are not broken."""
    for file in files:
        console.print(f"wrote {file}", soft_wrap=True, highlight=False)


Smoothing = Annotated[float, typer.Option(callback=checked_smoothing, help="Label smoothing, from 0 to 1.")]
PlotFolder = Annotated[Path, typer.Option(callback=made_folder, help="Folder for the plot.")]
Page = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Page to write the tables into, and pictures beside it."),
]
