"""One training, twice: the same network in Flax with Optax and in torch, on handwritten digits.

    python -m examples.digits_parity --epochs 30 --smoothing 0.1

Same initial weights, same batches in the same order, same optimizer; the two losses are `lsce_jax` and `lsce_torch`.
The question is whether the two *trainings* agree. The yardstick is the training itself, started one rounding step (ulp)
away; `parity_tests.trainings.trajectory` explains the rule. The script prints the answer in one line and returns it as
the exit code: 0 if the trainings agree, 1 if not, 2 for a bad option. A web page and a picture show the details.

In this order: batches, the two networks, copying the weights, the two training loops, the replicas, the run, the
command line. Plots and page are in digits_report.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import typer
from flax import nnx
from jaxtyping import Array, Float32, Float64, Int32, Int64
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import lsce_jax
import lsce_torch
from examples import common_jax, common_torch, digits_report
from examples.common import (
    CLASSES,
    PIXELS,
    Digits,
    Smoothing,
    checked,
    made_folder,
    new_app,
    print_written,
    read_digits,
)
from examples.digits_report import EpochSummary, Run, expected_calibration_error
from lsce_spec import find_convention
from parity_tests.trainings.trajectory import compare_trajectories, rounding_floor

HIDDEN = 128
BATCH_SIZE = 32
REPLICAS = 16
LEARNING_RATE, WEIGHT_DECAY = 2.0**-8, 2.0**-7


# --- Data -----------------------------------------------------------------------------------------------------------


def batch_order(rows: int, epochs: int, seed: int) -> Int64[np.ndarray, "epochs batches batch"]:
    """Return the rows of each batch of each epoch. Rows that fill no batch are left out of that epoch."""
    random = np.random.default_rng(seed)
    batches = rows // BATCH_SIZE
    shuffled = np.stack([random.permutation(rows) for _ in range(epochs)])
    return shuffled[:, : batches * BATCH_SIZE].reshape(epochs, batches, BATCH_SIZE)


# --- The network, twice ---------------------------------------------------------------------------------------------


class FlaxNetwork(nnx.Module):
    """Pixels to logits, one hidden layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Draw the initial weights."""
        self.hidden = nnx.Linear(PIXELS, HIDDEN, rngs=rngs)
        self.output = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, images: Float32[Array, "N 64"]) -> Float32[Array, "N 10"]:
        """Return the logits."""
        return self.output(nnx.silu(self.hidden(images)))


class TorchNetwork(nn.Module):
    """Pixels to logits, one hidden layer."""

    def __init__(self) -> None:
        """Make the layers; `carry_weights` replaces their weights."""
        super().__init__()
        self.hidden = nn.Linear(PIXELS, HIDDEN)
        self.output = nn.Linear(HIDDEN, CLASSES)

    def forward(self, images: Float32[Tensor, "N 64"]) -> Float32[Tensor, "N 10"]:
        """Return the logits."""
        return self.output(nn.functional.silu(self.hidden(images)))


def carry_weights(source: FlaxNetwork, target: TorchNetwork) -> None:
    """Give the torch network the weights of the Flax network, bit for bit.

    A Flax kernel is [in, out], a torch weight [out, in].
    """
    for name in ("hidden", "output"):
        flax_layer, torch_layer = getattr(source, name), getattr(target, name)
        with torch.no_grad():
            torch_layer.weight.copy_(torch.tensor(np.asarray(flax_layer.kernel[...]).T))
            torch_layer.bias.copy_(torch.tensor(np.asarray(flax_layer.bias[...])))


# --- The training, twice --------------------------------------------------------------------------------------------


@cache
def jax_loss(smoothing: float, convention: str) -> Callable[..., Float32[Array, ""]]:
    """Return the loss of logits and labels in JAX."""
    return partial(lsce_jax.label_smoothed_cross_entropy, smoothing=smoothing, convention=convention, reduction="mean")


def torch_loss(smoothing: float, convention: str) -> Callable[..., Float32[Tensor, ""]]:
    """Return the loss of logits and labels in torch."""
    return lsce_torch.LabelSmoothedCrossEntropyLoss(label_smoothing=smoothing, convention=convention, reduction="mean")


@cache  # JAX compiles again for another one, even if it is equal
def jax_optimizer() -> optax.GradientTransformation:
    """Return AdamW of Optax."""
    return common_jax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def torch_optimizer(network: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW of torch."""
    return common_torch.adamw(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


class JaxTraining:
    """The training in Flax and Optax."""

    def __init__(self, network: FlaxNetwork, smoothing: float, convention: str) -> None:
        """Set up loss and optimizer for a network."""
        self.network = network
        self.optimizer = nnx.Optimizer(network, jax_optimizer(), wrt=nnx.Param)
        self.train_step = compiled_train_step(jax_loss(smoothing, convention))

    def step(self, images: Float32[np.ndarray, "N 64"], labels: Int32[np.ndarray, " N"]) -> float:
        """Train on one batch and return its loss."""
        return float(self.train_step(self.network, self.optimizer, jnp.asarray(images), jnp.asarray(labels)))

    def probabilities(self, images: Float32[np.ndarray, "N 64"]) -> Float32[np.ndarray, "N 10"]:
        """Return the probabilities of the classes."""
        return np.asarray(jax_probabilities(self.network, jnp.asarray(images)))


@nnx.jit
def jax_probabilities(network: FlaxNetwork, images: Float32[Array, "N 64"]) -> Float32[Array, "N 10"]:
    """Return the probabilities of the classes."""
    return jax.nn.softmax(network(images), axis=-1)


def jax_train_step(loss_fn: Callable[..., Float32[Array, ""]]) -> Callable[..., Float32[Array, ""]]:
    """Return one step of training, a function that `JaxTraining` compiles and `OneUlpReplicas` maps."""

    def train_step(
        network: FlaxNetwork,
        optimizer: nnx.Optimizer[FlaxNetwork],
        images: Float32[Array, "N 64"],
        labels: Int32[Array, " N"],
    ) -> Float32[Array, ""]:
        loss, gradients = nnx.value_and_grad(lambda network: loss_fn(network(images), labels))(network)
        optimizer.update(network, gradients)
        return loss

    return train_step


@cache
def compiled_train_step(loss_fn: Callable[..., Float32[Array, ""]]) -> Callable[..., Float32[Array, ""]]:
    """Return the step of training, compiled once for each loss."""
    return nnx.jit(jax_train_step(loss_fn))


class TorchTraining:
    """The training in torch."""

    def __init__(self, network: TorchNetwork, smoothing: float, convention: str) -> None:
        """Set up loss and optimizer for a network."""
        self.network = network
        self.optimizer = torch_optimizer(network)
        self.loss_fn = torch_loss(smoothing, convention)

    def step(self, images: Float32[np.ndarray, "N 64"], labels: Int32[np.ndarray, " N"]) -> float:
        """Train on one batch and return its loss."""
        loss = self.loss_fn(self.network(torch.from_numpy(images)), torch.from_numpy(labels))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def probabilities(self, images: Float32[np.ndarray, "N 64"]) -> Float32[np.ndarray, "N 10"]:
        """Return the probabilities of the classes."""
        return torch.softmax(self.network(torch.from_numpy(images)), dim=-1).numpy()


# --- The yardstick --------------------------------------------------------------------------------------------------


class OneUlpReplicas:
    """The training in JAX, several times at once, each with its initial weights moved up or down by one ulp.

    torch needs no replicas of its own: how far one ulp carries depends on the training, not on the framework.
    """

    def __init__(self, network: FlaxNetwork, smoothing: float, convention: str, seed: int) -> None:
        """Move the weights of copies of a network and set up their training."""
        random = np.random.default_rng(seed)
        graph, weights = nnx.split(network)

        def start() -> nnx.State:
            moved = nnx.merge(graph, jax.tree.map(lambda weight: one_ulp_away(weight, random), weights))
            self.graph, state = nnx.split((moved, nnx.Optimizer(moved, jax_optimizer(), wrt=nnx.Param)))
            return state

        self.states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[start() for _ in range(REPLICAS)])
        self.train_epoch = compiled_replicas(jax_loss(smoothing, convention), self.graph)

    def epoch(
        self, images: Float32[np.ndarray, "steps N 64"], labels: Int32[np.ndarray, "steps N"]
    ) -> Float64[np.ndarray, "replicas steps"]:
        """Train all replicas on the batches of one epoch and return their losses."""
        self.states, losses = self.train_epoch(self.states, (jnp.asarray(images), jnp.asarray(labels)))
        return np.asarray(losses, np.float64)


@cache
def compiled_replicas(loss_fn: Callable[..., Float32[Array, ""]], graph: nnx.GraphDef) -> Callable[..., Any]:
    """Return an epoch of all replicas, compiled once for each loss."""
    train_step = jax_train_step(loss_fn)

    def train_replica(state: nnx.State, batches: tuple[Array, Array]) -> tuple[nnx.State, Float32[Array, ""]]:
        network, optimizer = nnx.merge(graph, state)
        loss = train_step(network, optimizer, *batches)
        return nnx.state((network, optimizer)), loss

    return jax.jit(jax.vmap(partial(jax.lax.scan, train_replica), in_axes=(0, None)))


def one_ulp_away(weight: Float32[Array, "..."], random: np.random.Generator) -> Float32[Array, "..."]:
    """Return weights with each one replaced by its upper or lower neighbour in float32, at random."""
    direction = random.choice(np.array([-np.inf, np.inf], np.float32), size=weight.shape)
    return jnp.asarray(np.nextafter(np.asarray(weight), direction))


# --- The run --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    epochs: int
    smoothing: float
    convention: str
    seed: int


def train_both(digits: Digits, options: Options, on_step: Callable[[float, float], object]) -> Run:
    """Train in both frameworks in lockstep, the replicas an epoch at a time, and compare."""
    network, torch_network = FlaxNetwork(nnx.Rngs(options.seed)), TorchNetwork()
    carry_weights(network, torch_network)
    replicas = OneUlpReplicas(network, options.smoothing, options.convention, options.seed)
    jax_training = JaxTraining(network, options.smoothing, options.convention)
    torch_training = TorchTraining(torch_network, options.smoothing, options.convention)

    losses: list[tuple[float, float]] = []
    replica_losses: list[Float64[np.ndarray, "replicas steps"]] = []
    epochs: list[EpochSummary] = []
    for order in batch_order(len(digits.train_labels), options.epochs, options.seed):
        images, labels = digits.train_images[order], digits.train_labels[order]
        for batch_images, batch_labels in zip(images, labels, strict=True):
            losses.append(
                (jax_training.step(batch_images, batch_labels), torch_training.step(batch_images, batch_labels))
            )
            on_step(*losses[-1])
        replica_losses.append(replicas.epoch(images, labels))
        epochs.append(summarize_epoch(losses[-len(order) :], jax_training, torch_training, digits))

    jax_losses, torch_losses = np.array(losses, np.float64).T
    return Run(
        smoothing=options.smoothing,
        jax_losses=jax_losses,
        torch_losses=torch_losses,
        verdict=compare_trajectories(
            jax_losses,
            torch_losses,
            np.concatenate(replica_losses, axis=1),
            floor=rounding_floor(jax_losses, BATCH_SIZE),
        ),
        epochs=epochs,
        jax_probabilities=jax_training.probabilities(digits.test_images),
        torch_probabilities=torch_training.probabilities(digits.test_images),
        test_labels=digits.test_labels,
    )


def summarize_epoch(
    losses: list[tuple[float, float]], jax_training: JaxTraining, torch_training: TorchTraining, digits: Digits
) -> EpochSummary:
    """Return the table row of an epoch."""
    jax_losses, torch_losses = np.array(losses, np.float64).T
    jax_probabilities = jax_training.probabilities(digits.test_images)
    torch_probabilities = torch_training.probabilities(digits.test_images)
    return EpochSummary(
        jax_loss=float(jax_losses.mean()),
        torch_loss=float(torch_losses.mean()),
        largest_difference=float(np.abs(jax_losses - torch_losses).max()),
        jax_accuracy=digits_report.accuracy(jax_probabilities, digits.test_labels),
        torch_accuracy=digits_report.accuracy(torch_probabilities, digits.test_labels),
        jax_calibration_error=expected_calibration_error(jax_probabilities, digits.test_labels),
        torch_calibration_error=expected_calibration_error(torch_probabilities, digits.test_labels),
    )


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """Keep both frameworks on the CPU, even with a GPU present, and torch on one thread.

    More threads gain nothing on matrices this small, and lose a lot where other programs use the cores as well.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with jax.default_device(jax.devices("cpu")[0]), torch.device("cpu"):
            yield
    finally:
        torch.set_num_threads(threads)


def run(options: Options, console: Console) -> list[Run]:
    """Train with smoothing 0 and, if it is another, with the given smoothing; show a progress bar."""
    digits = read_digits(options.seed)
    smoothings = sorted({0.0, options.smoothing})
    steps = options.epochs * (len(digits.train_labels) // BATCH_SIZE)
    columns = (
        TextColumn("smoothing {task.fields[smoothing]:g}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("JAX {task.fields[jax_loss]:.4f}  torch {task.fields[torch_loss]:.4f}"),
        TimeElapsedColumn(),
    )
    runs = []
    with on_the_cpu(), Progress(*columns, console=console) as progress:
        for smoothing in smoothings:
            task = progress.add_task("", total=steps, smoothing=smoothing, jax_loss=np.nan, torch_loss=np.nan)

            def show(jax_loss: float, torch_loss: float, task: TaskID = task) -> None:
                progress.update(task, advance=1, jax_loss=jax_loss, torch_loss=torch_loss)

            runs.append(train_both(digits, replace(options, smoothing=smoothing), show))
    return runs


# --- The command line -----------------------------------------------------------------------------------------------

app = new_app()


def checked_convention(convention: str) -> str:
    """Return the convention if its name is known."""
    return checked(find_convention, convention)


@app.command()
def main(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 30,
    smoothing: Smoothing = 0.1,
    convention: Annotated[
        str,
        typer.Option(callback=checked_convention, help="Where the smoothing goes: uniform, non_target or clamp."),
    ] = "uniform",
    output: Annotated[Path, typer.Option(help="Folder for the web page and the picture.")] = Path("out/digits_parity"),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of weights, split, batches and replicas.")] = 0,
) -> None:
    """Train one network on handwritten digits in JAX and in torch, and print whether the two trainings agree.

    Exit code 0: they agree. 1: they do not. 2: bad option.
    """
    made_folder(output)  # here and not as a callback: a superfluous argument is noticed after the callbacks
    console = Console()
    options = Options(epochs, smoothing, convention, seed)
    runs = run(options, console)
    digits_report.print_tables(runs, console)
    paths = digits_report.write(runs, vars(options), output)
    print_written(console, *paths)
    console.print(digits_report.verdict_line(runs), soft_wrap=True, highlight=False)
    if not all(result.verdict.agrees for result in runs):
        raise typer.Exit(code=1)


if __name__ == "__main__":
    app()
