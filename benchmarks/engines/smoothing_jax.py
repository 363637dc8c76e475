"""Linear losses of JAX that have no smoothing, and what it costs to add it: time, memory, and errors in bfloat16."""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import lsce_jax
from benchmarks.engines import dense_jax, linear_jax
from benchmarks.engines.timing import LinearShape, Row, Schedule, processor_clock
from lsce_cost.ways import integer_labels_float32
from parity_tests.losses.torchax import default_promotion
from parity_tests.losses.wrapped import load_tokamax

Loss = Callable[[Array, Array, Array, Array], Array]


def unsmoothed(**options: Any) -> Loss:
    """Return our linear loss without smoothing."""

    def loss(hidden: Array, weight: Array, labels: Array, smoothing: Array) -> Array:
        del smoothing
        return lsce_jax.linear_label_smoothed_cross_entropy(hidden, weight, labels, smoothing=0.0, **options)

    return loss


def of_rows(loss: Loss) -> Loss:
    """Return the mean of a loss of each row, smoothed."""

    def smoothed(hidden: Array, weight: Array, labels: Array, smoothing: Array) -> Array:
        nll = loss(hidden, weight, labels, smoothing)
        return lsce_jax.linear_add_smoothing(nll, hidden, weight, labels, smoothing=smoothing).mean()

    return smoothed


def of_mean(loss: Loss) -> Loss:
    """Return a loss that is a mean, smoothed."""

    def smoothed(hidden: Array, weight: Array, labels: Array, smoothing: Array) -> Array:
        zeros = jnp.zeros(labels.shape, jnp.float32)
        added = lsce_jax.linear_add_smoothing(zeros, hidden, weight, labels, smoothing=smoothing)
        return loss(hidden, weight, labels, smoothing) + added.mean()

    return smoothed


def tokamax(hidden: Array, weight: Array, labels: Array, smoothing: Array) -> Array:
    """Return Tokamax's loss, as XLA computes it."""
    del smoothing
    # Its gradients are in float32, which JAX does not add to those of bfloat16: this converts them. XLA leaves it out.
    hidden, weight = (of.astype(jnp.float32).astype(of.dtype) for of in (hidden, weight))
    value: Array = load_tokamax().linear_softmax_cross_entropy_loss(
        hidden, labels, weight, reduction="mean", implementation="xla"
    )
    return value


optax = linear_jax.on_logits(integer_labels_float32)
ours, rows = unsmoothed(reduction="mean"), unsmoothed()
# Name -> the loss without smoothing, and with it.
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "Optax integer": (optax, of_mean(optax)),
    "lsce linear": (ours, of_mean(ours)),
    "lsce linear, each row": (lambda *given: rows(*given).mean(), of_rows(rows)),
}
if importlib.util.find_spec("tokamax"):  # no extra brings it
    LOSSES["Tokamax, XLA"] = tokamax, of_mean(tokamax)


def measure(shape: LinearShape, schedule: Schedule) -> list[Row]:
    """Return time and temporary memory of each loss with its gradients, without smoothing and with it, in turns."""
    arguments = linear_jax.make_arguments(shape)
    pairs = [(name, linear_jax.with_gradients(loss)) for name, pair in LOSSES.items() for loss in pair]
    with default_promotion():
        return linear_jax.measure_cases(
            [(name, function, arguments) for name, function in pairs], schedule, processor_clock
        )


def errors(shape: LinearShape) -> dict[str, list[float]]:
    """Return the errors of loss and gradients in bfloat16, relative to the largest, against float64."""
    narrow = linear_jax.make_arguments(shape, dtype="bfloat16")
    dense = linear_jax.on_logits(dense_jax.ours(None))
    with jax.enable_x64(True):
        wide = tuple(of.astype("float64") if of.dtype == jnp.bfloat16 else of for of in narrow)
        truth = [np.asarray(of) for of in jax.tree.leaves(linear_jax.with_gradients(dense)(*wide))]
    losses = {name: smoothed for name, (_, smoothed) in LOSSES.items()}
    losses |= {"lsce linear, smoothed itself": linear_jax.linear(), "lsce, of all logits": dense}
    found: dict[str, list[float]] = {}
    with default_promotion():
        for name, loss in losses.items():
            result = jax.tree.leaves(jax.jit(linear_jax.with_gradients(loss))(*narrow))
            found[name] = [_error(one, other) for one, other in zip(result, truth, strict=True)]
    return found


def _error(value: Array, true: np.ndarray[Any, Any]) -> float:
    return float(np.max(np.abs(np.asarray(value, np.float64) - true)) / np.max(np.abs(true)))
