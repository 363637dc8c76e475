"""Statistics of each row from the sweep of the loss, for metrics and logs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lsce_jax.inputs import Batch
from lsce_spec import LossOptions


class LossStats(NamedTuple):
    """Values of each row, which no gradient flows through. 0 and False for rows that do not count.

    Args:
        nll: cross-entropy with the labels as they are: not smoothed, not weighted. Its exponential is the perplexity.
        smoothed: the training loss without its z-loss.
        z: the z-loss, z_loss * lse^2; `smoothed` + `z` is the loss.
        lse: log of the sum of the exponentials of the (softcapped) logits.
        confidence: probability of the largest logit, exp(max - lse).
        correct: whether the label is the (first) largest logit; for soft labels, their own (first) largest.
        valid: whether the row counts: False where `where`, `ignore_index` or a denominator of 0 leaves it out.
    """

    nll: Float[Array, "*batch"]
    smoothed: Float[Array, "*batch"]
    z: Float[Array, "*batch"]
    lse: Float[Array, "*batch"]
    confidence: Float[Array, "*batch"]
    correct: Bool[Array, "*batch"]
    valid: Bool[Array, "*batch"]


def make_stats(
    batch: Batch,
    options: LossOptions,
    *,
    nll: Float[Array, "*batch"],
    smoothed: Float[Array, "*batch"],
    lse: Float[Array, "*batch"],
    log_sum: Float[Array, "*batch"],
    correct: Bool[Array, "*batch"],
) -> LossStats:
    """Return the statistics, 0 where rows do not count, without derivatives.

    `log_sum` is lse minus the largest logit, more accurate than that difference if the logits have a large offset.
    """
    # Neither a bad label nor a row of NaN is correct.
    if batch.bad is not None:
        nll = jnp.where(batch.bad, jnp.nan, nll)
    correct = correct & ~jnp.isnan(nll)
    valid = jnp.ones_like(correct) if batch.counted is None else batch.counted
    nll, smoothed, z, lse, confidence = (
        jax.lax.stop_gradient(jnp.where(valid, value, 0))
        for value in (nll, smoothed, options.z_loss * lse**2, lse, jnp.exp(-log_sum))
    )
    return LossStats(nll, smoothed, z, lse, confidence, correct & valid, valid)
