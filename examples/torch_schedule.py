"""Smoothing from a schedule, in torch: none, constant, and annealed to 0.

    .venv/bin/python -m examples.torch_schedule --epochs 20

Constant smoothing makes more predictions right and all of them too modest: nll and calibration error rise. Annealed
to 0 it keeps part of the gain for a small part of the cost, and has the lowest nll of the three.

Any function of the step will do. The compiled part gets the smoothing as a tensor, so that a change does not compile it
again: it is compiled once for all schedules. (A Python float is compiled in as a constant, compiled again when it first
changes, and once more if it becomes 0 after that.) The smoothing is kept beside the learning rate, in the optimizer's
parameter groups: loggers look there, checkpoints keep it, and a loop without a schedule can set it.

The script prints a table with means over the repeats and the number of compilations, and draws a plot. Table and plot
are in schedule_common.py. The same in JAX: jax_schedule.py, from the same weights on the same batches; the two tables
differ by rounding only.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float32
from torch import Tensor
from torch._dynamo.utils import counters

from examples import common_torch
from examples.common import PlotFolder, batch_rows, new_app, read_digits
from examples.common_torch import Network, evaluate
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
from lsce_torch import label_smoothed_cross_entropy

HIDDEN = (128,)
LEARNING_RATE = 2.0**-8

Optimizer = torch.optim.Optimizer
Schedule = Callable[[int], float]


def adam(network: Network, learning_rate: float, smoothing: float) -> Optimizer:
    """Return Adam. The smoothing is for the loss; the parameter group only keeps it beside the learning rate."""
    return common_torch.adam([{"params": network.parameters(), "smoothing": smoothing}], lr=learning_rate)


def make_optimizer(network: Network) -> Optimizer:
    """Return Adam, with a place for the smoothing."""
    return adam(network, LEARNING_RATE, smoothing=0.0)


def make_schedules(smoothing: float, steps: int) -> dict[str, Schedule]:
    """Return the schedules to compare."""
    none: dict[str, Schedule] = {"none": lambda step: 0.0}
    if smoothing == 0:
        return none
    return none | {
        "constant": lambda step: smoothing,
        "annealed": lambda step: smoothing * (1 - step / steps),
    }


# The backend: "aot_eager" needs no C++ compiler, and saves no time either. The fast one is the default, "inductor".
@torch.compile(fullgraph=True, backend="aot_eager")
def loss_fn(network: Network, images: Tensor, labels: Tensor, smoothing: Tensor) -> Float32[Tensor, ""]:
    """Return the mean loss of a batch."""
    return label_smoothed_cross_entropy(network(images), labels, smoothing=smoothing)


def train_step(
    network: Network, optimizer: Optimizer, images: Tensor, labels: Tensor, *, schedule: Schedule, step: int
) -> tuple[Float32[Tensor, ""], float]:
    """Train on one batch, and return its loss and the smoothing of the loss."""
    group = optimizer.param_groups[0]
    group["smoothing"] = schedule(step)
    optimizer.zero_grad()
    loss = loss_fn(network, images, labels, torch.tensor(group["smoothing"]))
    loss.backward()
    optimizer.step()
    return loss.detach(), group["smoothing"]


def train(schedule: Schedule, epochs: int, seed: int, on_epoch: Callable[[], None]) -> Run:
    """Train a network."""
    digits = read_digits(seed)
    rows, run = len(digits.train_labels), Run([], [])
    network = Network(HIDDEN, seed)
    optimizer = make_optimizer(network)
    for _ in range(epochs):
        for _ in range(rows // BATCH_SIZE):
            step = len(run.smoothing)
            batch = batch_rows(rows, BATCH_SIZE, seed, step)
            images, labels = torch.from_numpy(digits.train_images[batch]), torch.from_numpy(digits.train_labels[batch])
            _, smoothing = train_step(network, optimizer, images, labels, schedule=schedule, step=step)
            run.smoothing.append(smoothing)
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
    output: PlotFolder = Path("out/torch_schedule"),
) -> None:
    """Train on handwritten digits in torch with smoothing from three schedules.

    These are: none, constant, and annealed to 0. The table and the plot compare accuracy, nll and calibration error on
    test images. The last line shows how often the training was compiled.
    """
    options = Options(epochs, smoothing, repeats, seed)
    schedules = make_schedules(smoothing, count_steps(options))
    counters.clear()

    def count_compilations() -> str:
        return f"{counters['stats']['unique_graphs']} compilation(s): one for all"

    compare(train, schedules, options, count_compilations, "torch", output)


if __name__ == "__main__":
    app()
