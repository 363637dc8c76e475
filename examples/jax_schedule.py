"""Smoothing from a schedule, in Flax and Optax: none, constant, and annealed to 0.

    .venv/bin/python -m examples.jax_schedule --epochs 20

Constant smoothing makes more predictions right and all of them too modest: nll and calibration error rise. Annealed
to 0 it keeps part of the gain for a small part of the cost, and has the lowest nll of the three.

Any Optax schedule will do. `nnx.jit` traces the schedule, so that a change of the smoothing does not compile the step
again: it is compiled once for each schedule. The smoothing is kept beside the learning rate, in the hyperparameters of
the optimizer's state: loggers look there, checkpoints keep it, and a loop without a schedule can set it.

The script prints a table with means over the repeats and the number of compilations, and draws a plot. Table and plot
are in schedule_common.py. The same in torch: torch_schedule.py, from the same weights on the same batches; the two
tables differ by rounding only.
"""

from collections.abc import Callable
from pathlib import Path

import optax
from flax import nnx
from jaxtyping import Array, Float32

from examples import common_jax
from examples.common import PlotFolder, batch_rows, new_app, read_digits
from examples.common_jax import Network, evaluate
from examples.schedule_common import (
    BATCH_SIZE,
    Epochs,
    Options,
    Repeats,
    Run,
    Seed,
    StartSmoothing,
    compare,
    count_steps,
)
from lsce_jax import label_smoothed_cross_entropy

HIDDEN = (128,)
LEARNING_RATE = 2.0**-8

Optimizer = nnx.Optimizer[Network]
Schedule = Callable[[Array], Array]


@optax.inject_hyperparams
def adam(learning_rate: float, smoothing: float) -> optax.GradientTransformation:
    """Return Adam. The smoothing is for the loss; `inject_hyperparams` only keeps it beside the learning rate."""
    del smoothing
    return common_jax.adam(learning_rate)


ADAM = adam(LEARNING_RATE, smoothing=0.0)


def make_optimizer(network: Network) -> Optimizer:
    """Return Adam, with a place for the smoothing."""
    return nnx.Optimizer(network, ADAM, wrt=nnx.Param)


def make_schedules(smoothing: float, steps: int) -> dict[str, Schedule]:
    """Return the schedules to compare."""
    none: dict[str, Schedule] = {"none": optax.constant_schedule(0.0)}
    if smoothing == 0:
        return none
    return none | {
        "constant": optax.constant_schedule(smoothing),
        "annealed": optax.linear_schedule(smoothing, 0.0, steps),
    }


compilations: list[str] = []


def loss_fn(network: Network, images: Array, labels: Array, smoothing: Float32[Array, ""]) -> Float32[Array, ""]:
    """Return the mean loss of a batch."""
    compilations.append("loss_fn")  # Python gets here when the step is traced, not when it runs
    return label_smoothed_cross_entropy(network(images), labels, smoothing=smoothing, reduction="mean")


@nnx.jit(static_argnames="schedule")
def train_step(
    network: Network, optimizer: Optimizer, images: Array, labels: Array, *, schedule: Schedule
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Train on one batch, and return its loss and the smoothing of the loss."""
    # `inject_hyperparams` takes schedules too, but its state holds the value of the last update, one step late.
    smoothing = optimizer.opt_state.hyperparams["smoothing"]
    smoothing[...] = schedule(optimizer.step[...])
    loss, gradients = nnx.value_and_grad(loss_fn)(network, images, labels, smoothing[...])
    optimizer.update(network, gradients)
    return loss, smoothing[...]


def train(schedule: Schedule, epochs: int, seed: int, on_epoch: Callable[[], None]) -> Run:
    """Train a network."""
    digits = read_digits(seed)
    rows, run = len(digits.train_labels), Run([], [])
    network = Network(HIDDEN, seed)
    optimizer = make_optimizer(network)
    for _ in range(epochs):
        for _ in range(rows // BATCH_SIZE):
            batch = batch_rows(rows, BATCH_SIZE, seed, len(run.smoothing))
            images, labels = digits.train_images[batch], digits.train_labels[batch]
            _, smoothing = train_step(network, optimizer, images, labels, schedule=schedule)
            run.smoothing.append(float(smoothing))
        run.metrics.append(evaluate(network, digits.test_images, digits.test_labels))
        on_epoch()
    return run


app = new_app()


@app.command()
def main(
    epochs: Epochs = 20,
    smoothing: StartSmoothing = 0.1,
    repeats: Repeats = 3,
    seed: Seed = 0,
    output: PlotFolder = Path("out/jax_schedule"),
) -> None:
    """Train on handwritten digits in JAX with smoothing from three schedules.

    These are: none, constant, and annealed to 0. The table and the plot compare accuracy, nll and calibration error on
    test images. The last line shows how often the training was compiled.
    """
    options = Options(epochs, smoothing, repeats, seed)
    schedules = make_schedules(smoothing, count_steps(options))
    compilations.clear()

    def count_compilations() -> str:
        return f"{len(compilations)} compilation(s): one for each"

    compare(train, schedules, options, count_compilations, "JAX", output)


if __name__ == "__main__":
    app()
