"""The reduction of the losses, and the number that a mean divides by."""

import math
from numbers import Real

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from lsce_jax.accurate import divide
from lsce_jax.inputs import Batch, as_array, extremes
from lsce_spec import LossOptions, check_denominator_array, check_denominator_values


def mean_divisor(
    batch: Batch, options: LossOptions, denominator: float | Float[ArrayLike, ""] | None
) -> tuple[Batch, float | Float[Array, ""]]:
    """Return the batch and the number that the mean divides by, 1 for other reductions.

    If the number is 0, no row of the returned batch counts, so that neither a NaN nor its derivative gets through.
    """
    if options.reduction != "mean":
        return batch, 1.0
    divisor = denominator_of(batch) if denominator is None else denominator
    if isinstance(divisor, Real):
        return (batch, float(divisor)) if divisor else (batch.counting_only(jnp.array(False)), 1.0)
    divisor = as_array("denominator", divisor)
    check_denominator_array(divisor.shape, divisor.dtype.name)
    if denominator is not None:
        check_denominator_values(extremes(divisor))
    divisor = divisor.astype(batch.dtype)
    if batch.class_weight is not None or denominator is not None:
        batch = batch.counting_only(divisor != 0)
    return batch, divisor


def reduce_losses(
    losses: Float[Array, "..."], options: LossOptions, divisor: float | Float[Array, ""]
) -> Float[Array, "..."]:
    """Return the losses of single rows, their sum, or their mean; `losses` may hold their sum already."""
    if options.reduction == "none":
        return losses
    total = losses.sum()
    if options.reduction == "sum":
        return total
    if isinstance(divisor, float):
        return total / divisor
    return jnp.where(divisor != 0, divide(total, jnp.where(divisor != 0, divisor, 1)), 0)


def denominator_of(batch: Batch) -> int | Float[Array, ""]:
    """Return the sum of the labels' class weights over the rows that count; without weights, the number of rows."""
    weights = None if batch.soft else batch.label_weight
    if weights is not None:
        if batch.bad is not None:
            # A bad label weighs 1: if all other weights are 0, the mean is NaN and not 0.
            weights = jnp.where(batch.bad, 1, weights)
        return jnp.sum(weights if batch.counted is None else jnp.where(batch.counted, weights, 0))
    return math.prod(batch.batch_shape) if batch.counted is None else jnp.sum(batch.counted)
