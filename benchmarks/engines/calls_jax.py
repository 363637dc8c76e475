"""How each loss is called in JAX. Each function loads what it needs, and returns the loss for a device.

Other libraries' losses are called as their sources say: Optax 0.2.8, Keras 3.15 and Tokamax 0.0.12. T5X and MaxText are
not on PyPI; their formula is that of their files t5x/losses.py and max_utils.py, written here again.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import lsce_jax
from benchmarks.engines.losses import SMOOTHING, load
from lsce_cost import ways
from parity_tests.losses.adapters import UnavailableError

Function = Callable[..., Any]


# --- Optax and ours -------------------------------------------------------------------------------------------------


def one_hot(_: str) -> Function:
    """Return what Optax offers for smoothed labels."""
    return ways.one_hot


def integer_labels(_: str) -> Function:
    """Return what Optax offers for integer labels, which are not smoothed."""
    return ways.integer_labels


def integer_labels_float32(_: str) -> Function:
    """Return the same with a loss as accurate as the others'."""
    return ways.integer_labels_float32


def lse_form(_: str) -> Function:
    """Return the smoothed loss as one would write it for many classes: no array of targets; in float32."""

    def loss(logits: Array, labels: Array, smoothing: Array) -> Array:
        logits = logits.astype(jnp.float32)
        at_label = jnp.take_along_axis(logits, labels[:, None], axis=-1).squeeze(-1)
        lse = jax.nn.logsumexp(logits, axis=-1)
        return (lse - (1 - smoothing) * at_label - smoothing * logits.mean(axis=-1)).mean()

    return loss


def dense(_: str, **options: Any) -> Function:
    """Return our loss of labels or of soft labels."""

    def loss(logits: Array, labels: Array, smoothing: Array) -> Any:
        return lsce_jax.label_smoothed_cross_entropy(logits, labels, smoothing=smoothing, reduction="mean", **options)

    return loss


def dense_with_statistics(_: str) -> Function:
    """Return the same with statistics."""

    def loss(logits: Array, labels: Array, smoothing: Array) -> Any:
        return lsce_jax.label_smoothed_cross_entropy_with_stats(logits, labels, smoothing=smoothing, reduction="mean")

    return loss


def linear(_: str, **options: Any) -> Function:
    """Return our loss of a layer, whose logits are never whole in memory; with its own smoothing if that is given."""

    def loss(hidden: Array, weight: Array, labels: Array, smoothing: Array) -> Any:
        return lsce_jax.linear_label_smoothed_cross_entropy(
            hidden, weight, labels, **{"smoothing": smoothing, "reduction": "mean", **options}
        )

    return loss


def none_then_mean(device: str) -> Function:
    """Return the mean of our losses of rows."""
    of_rows = linear(device, reduction="none")
    return lambda *given: of_rows(*given).mean()


def on_logits(device: str, call: str, **options: Any) -> Function:
    """Return a loss of a layer that is given all logits."""
    loss = getattr(sys.modules[__name__], call)(device, **options)
    return lambda hidden, weight, labels, smoothing: loss(hidden @ weight, labels, smoothing)


def add_smoothing(loss: Function, of_rows: bool) -> Function:
    """Return a linear loss with smoothing added: to the loss of each row, or to the mean."""

    def smoothed(hidden: Array, weight: Array, labels: Array, smoothing: Array) -> Array:
        found = loss(hidden, weight, labels, smoothing)
        rows = found if of_rows else jnp.zeros(labels.shape, jnp.float32)
        added: Array = lsce_jax.linear_add_smoothing(rows, hidden, weight, labels, smoothing=smoothing).mean()
        return added if of_rows else found + added

    return smoothed


# --- Floors ---------------------------------------------------------------------------------------------------------


def write(_: str) -> Function:
    """Only write an array."""
    return lambda logits, labels, smoothing: logits + 1


def exp_and_write(_: str) -> Function:
    """Only exponentials, and a few operations, of what is written."""
    return lambda logits, labels, smoothing: jnp.exp(logits) * 0.5 - 0.25


def products(_: str) -> Function:
    """Only the products: with the logits in the place of their gradient."""

    def products_of(hidden: Array, weight: Array, labels: Array, smoothing: Array) -> tuple[Array, Array]:
        del labels, smoothing
        logits = hidden @ weight
        return logits @ weight.T, hidden.T @ logits

    return products_of


# --- Other libraries ------------------------------------------------------------------------------------------------


def tokamax(_: str, implementation: str, widened: bool = False) -> Function:
    """Return Tokamax's loss, whose gradients are in float32.

    Args:
        implementation: as Tokamax takes it.
        widened: whether its operands are widened and narrowed before, so that JAX adds its gradients to those of
            another loss in the narrow dtype. XLA leaves that out.
    """
    loss = load("tokamax", "tokamax").linear_softmax_cross_entropy_loss

    def call(hidden: Array, weight: Array, labels: Array, smoothing: Array) -> Array:
        del smoothing
        if widened:
            hidden, weight = (of.astype(jnp.float32).astype(of.dtype) for of in (hidden, weight))
        value: Array = loss(hidden, labels, weight, reduction="mean", implementation=implementation)
        return value

    return call


def t5x(_: str, z_loss: float) -> Function:
    """Return the mean of T5X's loss of labels, with z-loss; without the entropy of the target, a constant."""

    def loss(logits: Array, labels: Array, smoothing: Array) -> Array:
        classes = logits.shape[-1]
        on, off = 1 - smoothing, smoothing / (classes - 1)
        targets = jnp.where(labels[:, None] == jnp.arange(classes), on, off).astype(jnp.float32)
        return _cross_entropy_with_logits(logits, targets, z_loss).mean()

    return loss


def _forward(logits: Array, targets: Array, z_loss: float) -> tuple[Array, tuple[Array, Array, Array]]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    exponentials = jnp.exp(shifted)
    total = exponentials.sum(axis=-1, keepdims=True)
    log_softmax = shifted - jnp.log(total)
    lse = jnp.log(total)[..., 0] + logits.max(axis=-1)
    losses = -(targets * log_softmax).sum(axis=-1) + z_loss * jnp.square(lse)
    return losses, (targets, exponentials / total, lse)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cross_entropy_with_logits(logits: Array, targets: Array, z_loss: float) -> Array:
    return _forward(logits, targets, z_loss)[0]


def _backward(z_loss: float, residuals: tuple[Array, Array, Array], upstream: Array) -> tuple[Array, None]:
    targets, softmax, lse = residuals
    slope = (1 + 2 * z_loss * lse)[..., None] * softmax - targets
    return (upstream[..., None] * slope).astype(softmax.dtype), None


_cross_entropy_with_logits.defvjp(_forward, _backward)


def keras(_: str) -> Function:
    """Return Keras's loss of one-hot targets."""
    library = load("keras", "keras")
    if library.backend.backend() != "jax":
        raise UnavailableError("Keras has another backend: KERAS_BACKEND must be jax when it is imported")
    loss = library.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=SMOOTHING)

    def call(logits: Array, labels: Array, smoothing: Array) -> Any:
        del smoothing  # it must be a number of Python
        return loss(library.ops.one_hot(labels, logits.shape[-1]), logits)

    return call
