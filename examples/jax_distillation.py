"""Teacher and student, in Flax and Optax: soft labels, temperature, and whether a smoothed teacher teaches as well.

    .venv/bin/python -m examples.jax_distillation --epochs 16 --rows 120

A teacher sees all training images with their labels, once without and once with smoothing. Students see few images, and
instead of labels the teacher's probabilities at some temperature T, softmax(z / T). All of them train on one loss:
labels may be classes or probabilities.

The smoothed teacher knows more (accuracy) and teaches less: smoothing tells it that all wrong classes are equally
wrong, so that it no longer shows which of them are alike, and its probabilities of them are nearly level (right half of
the plot). Müller, Kornblith and Hinton found the same ("When Does Label Smoothing Help?", 2019, section 4). The
difference appears from temperature 2 on; at 1, where the other teacher says little more than the label, the smoothed
one teaches no worse.

The script prints a table with means over the repeats, and draws a plot. The order of the trainings, table and plot are
in distillation_common.py. The same in torch: torch_distillation.py, from the same weights on the same batches; the two
tables differ by rounding only.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32

from examples.common import PlotFolder, batch_rows, new_app
from examples.common_jax import Network, adam, evaluate
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
from lsce_jax import label_smoothed_cross_entropy

LEARNING_RATE = 2.0**-7

Optimizer = nnx.Optimizer[Network]
# Made once: `nnx.jit` would compile again for another one, even if it is equal.
ADAM = adam(LEARNING_RATE)


def make_optimizer(network: Network) -> Optimizer:
    """Return Adam."""
    return nnx.Optimizer(network, ADAM, wrt=nnx.Param)


@nnx.jit
def train_step(
    network: Network, optimizer: Optimizer, images: Array, targets: Array, smoothing: float, temperature: float
) -> Float32[Array, ""]:
    """Train on one batch, and return its loss. Targets are classes, or the probabilities of a teacher."""

    def loss_fn(network: Network) -> Float32[Array, ""]:
        # Less the entropy of the target: 0 for a student that agrees with its teacher. The gradient is the same.
        loss = label_smoothed_cross_entropy(
            network(images) / temperature, targets, smoothing=smoothing, subtract_entropy=True, reduction="mean"
        )
        # The gradient shrinks with the square of the temperature (Hinton et al. 2015, section 2).
        return temperature**2 * loss

    loss, gradients = nnx.value_and_grad(loss_fn)(network)
    optimizer.update(network, gradients)
    return loss


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
        train_step(network, optimizer, images[rows], targets[rows], smoothing, temperature)
    return network


@nnx.jit
def softmax(network: Network, images: Array, temperature: float) -> Float32[Array, "N 10"]:
    """Return the probabilities of the classes."""
    return jax.nn.softmax(network(images) / temperature, axis=-1)


def probabilities(teacher: Network, images: np.ndarray, temperature: float) -> Probabilities:
    """Return the soft labels of a teacher."""
    return np.asarray(softmax(teacher, images, temperature))


app = new_app()


@app.command()
def main(
    epochs: Epochs = 16,
    smoothing: TeacherSmoothing = 0.1,
    rows: Rows = 120,
    repeats: Repeats = 3,
    seed: Seed = 0,
    output: PlotFolder = Path("out/jax_distillation"),
) -> None:
    """Train students on the probabilities of teachers for handwritten digits in JAX; one teacher was smoothed.

    Each teacher has a student at each of four temperatures, and one more student learns from labels. The table and the
    plot show how well each does on test images; the plot also shows the teachers' probabilities of wrong classes.
    """
    framework = Framework("JAX", train, probabilities, evaluate)
    compare(framework, Options(epochs, smoothing, rows, repeats, seed), output)


if __name__ == "__main__":
    app()
