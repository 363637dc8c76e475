"""Train on mixed digits in Flax and Optax: MixUp and CutMix, with and without label smoothing on top.

    .venv/bin/python -m examples.jax_mixup --epochs 40

MixUp averages two images, CutMix pastes a box of one into the other; the labels are averaged in the same proportion.
The loss takes such soft labels t as they are, and smooths them like any other: (1 - e) t + e/K.

The script prints accuracy, nll and calibration error of six trainings on 300 images, and draws mixed images. Mixing
makes a network less confident, as smoothing does, and the two effects add up: use less of one when you use the other.
Batches, table and plot are in mixup_common.py. The same in torch: torch_mixup.py, from the same weights on the same
batches; the two tables differ by rounding only.
"""

from pathlib import Path

from flax import nnx
from jaxtyping import Array, Float32

from examples.common import Digits, Metrics, PlotFolder, Smoothing, new_app
from examples.common_jax import Network, adamw, evaluate
from examples.mixup_common import Epochs, Mix, Options, Seed, batches, compare
from lsce_jax import label_smoothed_cross_entropy

HIDDEN = (128, 128)
LEARNING_RATE, WEIGHT_DECAY = 2.0**-9, 2.0**-7


Optimizer = nnx.Optimizer[Network]
# Made once: `nnx.jit` would compile again for another one, even if it is equal.
ADAMW = adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def make_optimizer(network: Network) -> Optimizer:
    """Return AdamW."""
    return nnx.Optimizer(network, ADAMW, wrt=nnx.Param)


@nnx.jit
def train_step(
    network: Network, optimizer: Optimizer, images: Array, targets: Array, smoothing: float
) -> Float32[Array, ""]:
    """Train on one batch with soft labels, and return its loss."""

    def loss_fn(network: Network) -> Float32[Array, ""]:
        return label_smoothed_cross_entropy(network(images), targets, smoothing=smoothing, reduction="mean")

    loss, gradients = nnx.value_and_grad(loss_fn)(network)
    optimizer.update(network, gradients)
    return loss


def train_and_evaluate(digits: Digits, mix: Mix, smoothing: float, epochs: int, seed: int) -> Metrics:
    """Train a network on mixed batches, and return the metrics of the test images."""
    network = Network(HIDDEN, seed)
    optimizer = make_optimizer(network)
    for images, targets in batches(digits, mix, epochs, seed):
        train_step(network, optimizer, images, targets, smoothing)
    return evaluate(network, digits.test_images, digits.test_labels)


app = new_app()


@app.command()
def main(
    epochs: Epochs = 40, smoothing: Smoothing = 0.1, seed: Seed = 0, output: PlotFolder = Path("out/jax_mixup")
) -> None:
    """Train on handwritten digits in JAX: unmixed, with MixUp and with CutMix, each without and with smoothing.

    A table and a plot compare accuracy, nll and calibration error of the trainings. Mixing makes a network less
    confident, as smoothing does, and the two effects add up.
    """
    compare(train_and_evaluate, Options(epochs, smoothing, seed), "JAX", output)


if __name__ == "__main__":
    app()
