"""Every way to compute the loss: Optax's, and each implementation of this package."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lsce_jax import kernels
from lsce_jax.chunked import preferred_rows
from lsce_jax.functional import label_smoothed_cross_entropy
from lsce_jax.keywords import Kernel
from lsce_jax.linear import linear_label_smoothed_cross_entropy
from lsce_spec import LINEAR_IMPLEMENTATIONS, ChunkOptions, Implementation

Logits: TypeAlias = Float[Array, "N K"]
Labels: TypeAlias = Int[Array, " N"]
Scalar: TypeAlias = Float[Array, ""]
# Of logits, labels and smoothing; of a layer, of hidden, weight, labels and smoothing.
Loss: TypeAlias = Callable[..., Any]


def one_hot(logits: Logits, labels: Labels, smoothing: Scalar) -> Scalar:
    """Return what Optax offers for smoothed labels."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    loss: Scalar = optax.softmax_cross_entropy(logits, targets).mean()
    return loss


def integer_labels(logits: Logits, labels: Labels, smoothing: Scalar) -> Scalar:
    """Return what Optax offers for integer labels, which are not smoothed."""
    del smoothing
    loss: Scalar = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss


def integer_labels_float32(logits: Logits, labels: Labels, smoothing: Scalar) -> Scalar:
    """Return the same with a loss as accurate as the others'."""
    return integer_labels(logits.astype(jnp.float32), labels, smoothing)


def ours(implementation: Implementation | Kernel) -> Loss:
    """Return the loss of this package."""

    def loss(logits: Logits, labels: Labels, smoothing: Scalar) -> Scalar:
        return label_smoothed_cross_entropy(
            logits, labels, smoothing=smoothing, reduction="mean", implementation=implementation
        )

    return loss


def linear(**options: Any) -> Loss:
    """Return the loss of this package that takes the layer."""

    def loss(hidden: Float[Array, "N D"], weight: Float[Array, "D K"], labels: Labels, smoothing: Scalar) -> Scalar:
        return linear_label_smoothed_cross_entropy(
            hidden, weight, labels, smoothing=smoothing, reduction="mean", **options
        )

    return loss


def of_logits(dtype: str) -> dict[str, Loss]:
    """Return the losses that take logits, by name.

    Args:
        dtype: of the logits. Optax's loss of integer labels is one in that dtype; of narrow logits there is also that
            of logits that are cast to float32.
    """
    found = {"Optax one-hot, smoothed": one_hot, "Optax integer, unsmoothed": integer_labels}
    if dtype in {"bfloat16", "float16"}:
        found["Optax integer, cast to float32"] = integer_labels_float32
    return found | {f"lsce {name}": ours(name) for name in implementations()}


def implementations() -> tuple[Implementation | Kernel, ...]:
    """Return what `implementation` may name, as the package has it, so that a new one is here without a change."""
    return kernels.IMPLEMENTATIONS


def of_layer(
    dtype: str, rows: int, features: int, classes: int, chunks: Sequence[int] | None = None
) -> dict[str, Loss]:
    """Return the losses of a linear layer, by name: those of logits, on all logits at once, and ours by chunks.

    Args:
        dtype: of hidden and weight.
        rows: number of rows.
        features: number of features.
        classes: number of classes.
        chunks: rows of a chunk, a way for each; None: what the package takes, a quarter of that and four times that.
    """

    def on_all_logits(loss: Loss, hidden: Array, weight: Array, labels: Array, smoothing: Array) -> Any:
        return loss(hidden @ weight, labels, smoothing)

    found: dict[str, Loss] = {name: partial(on_all_logits, loss) for name, loss in of_logits(dtype).items()}
    preferred = ChunkOptions().rows_at_most(preferred_rows(features), classes)
    for size in dict.fromkeys(min(size, rows) for size in chunks or (preferred // 4, preferred, 4 * preferred)):
        found[f"lsce linear, {size} rows at a time"] = linear(chunk_size=size)
    found["lsce linear, recompute"] = linear(recompute=True)
    others = [name for name in LINEAR_IMPLEMENTATIONS if name != "chunked"]
    return found | {f"lsce linear {name}": linear(implementation=name) for name in others}
