"""Teacher and student, in torch: soft labels, temperature, and whether a smoothed teacher teaches as well.

    .venv/bin/python -m examples.torch_distillation --epochs 16 --rows 120

A teacher sees all training images with their labels, once without and once with smoothing. Students see few images, and
instead of labels the teacher's probabilities at some temperature T, softmax(z / T). All of them train on one loss:
labels may be classes or probabilities.

The smoothed teacher knows more (accuracy) and teaches less: smoothing tells it that all wrong classes are equally
wrong, so that it no longer shows which of them are alike, and its probabilities of them are nearly level (right half of
the plot). Müller, Kornblith and Hinton found the same ("When Does Label Smoothing Help?", 2019, section 4). The
difference appears from temperature 2 on; at 1, where the other teacher says little more than the label, the smoothed
one teaches no worse.

The script prints a table with means over the repeats, and draws a plot. The order of the trainings, table and plot are
in distillation_common.py. The same in JAX: jax_distillation.py, from the same weights on the same batches; the two
tables differ by rounding only.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from examples.common import PlotFolder, batch_rows, new_app
from examples.common_torch import Network, adam, evaluate
from examples.distillation_common import (
    BATCH_SIZE,
    Epochs,
    Framework,
    Options,
    Probabilities,
    Repeats,
    Rows,
    Seed,
    TeacherSmoothing,
    compare,
)
from lsce_torch import label_smoothed_cross_entropy

LEARNING_RATE = 2.0**-7

Optimizer = torch.optim.Optimizer


def make_optimizer(network: Network) -> Optimizer:
    """Return Adam."""
    return adam(network.parameters(), LEARNING_RATE)


def train_step(
    network: Network, optimizer: Optimizer, images: Tensor, targets: Tensor, smoothing: float, temperature: float
) -> Float32[Tensor, ""]:
    """Train on one batch, and return its loss. Targets are classes, or the probabilities of a teacher."""
    # Less the entropy of the target: 0 for a student that agrees with its teacher. The gradient is the same.
    loss = label_smoothed_cross_entropy(
        network(images) / temperature, targets, smoothing=smoothing, subtract_entropy=True
    )
    # The gradient shrinks with the square of the temperature (Hinton et al. 2015, section 2).
    loss = temperature**2 * loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def train(
    hidden: Sequence[int],
    images: np.ndarray,
    targets: np.ndarray,
    steps: int,
    seed: int,
    *,
    smoothing: float = 0.0,
    temperature: float = 1.0,
) -> Network:
    """Return a trained network."""
    network = Network(hidden, seed)
    optimizer = make_optimizer(network)
    for step in range(steps):
        rows = batch_rows(len(images), BATCH_SIZE, seed, step)
        batch = torch.from_numpy(images[rows]), torch.from_numpy(targets[rows])
        train_step(network, optimizer, *batch, smoothing, temperature)
    return network


@torch.no_grad()
def softmax(network: Network, images: Tensor, temperature: float) -> Float32[Tensor, "N 10"]:
    """Return the probabilities of the classes."""
    return torch.softmax(network(images) / temperature, dim=-1)


def probabilities(teacher: Network, images: np.ndarray, temperature: float) -> Probabilities:
    """Return the soft labels of a teacher."""
    return softmax(teacher, torch.from_numpy(images), temperature).numpy()


app = new_app()


@app.command()
def main(
    epochs: Epochs = 16,
    smoothing: TeacherSmoothing = 0.1,
    rows: Rows = 120,
    repeats: Repeats = 3,
    seed: Seed = 0,
    output: PlotFolder = Path("out/torch_distillation"),
) -> None:
    """Train students on the probabilities of teachers for handwritten digits in torch; one teacher was smoothed.

    Each teacher has a student at each of four temperatures, and one more student learns from labels. The table and the
    plot show how well each does on test images; the plot also shows the teachers' probabilities of wrong classes.
    """
    framework = Framework("torch", train, probabilities, evaluate)
    compare(framework, Options(epochs, smoothing, rows, repeats, seed), output)


if __name__ == "__main__":
    app()
