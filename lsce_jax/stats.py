"""Statistics of each row from the sweep of the loss, for metrics and logs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lsce_jax.inputs import Batch
from lsce_spec import LossOptions


class LossStats(NamedTuple):
    """Values of each row. No gradient flows through them, unless nll, lse and entropy are asked to be differentiable.

    For rows that do not count they are 0 and False, and the prediction is -1.

    Args:
        nll: cross-entropy with the labels as they are: not smoothed, not weighted. Its exponential is the perplexity.
        smoothed: the training loss without its z-loss.
        z: the z-loss, z_loss * lse^2; `smoothed` + `z` is the loss.
        lse: log of the sum of the exponentials of the (softcapped) logits.
        confidence: probability of the largest logit, exp(max - lse).
        prediction: the class of the (first) largest logit, int32; -1 also where the lse is NaN.
        entropy: of the softmax p of the (softcapped) logits, -sum p_k log p_k in nats, from 0 to log K.
        correct: whether the prediction is the label; for soft labels, their own (first) largest.
        valid: whether the row counts: False where `where`, `ignore_index` or a denominator of 0 leaves it out.
    """

    nll: Float[Array, "*batch"]
    smoothed: Float[Array, "*batch"]
    z: Float[Array, "*batch"]
    lse: Float[Array, "*batch"]
    confidence: Float[Array, "*batch"]
    prediction: Int[Array, "*batch"]
    entropy: Float[Array, "*batch"]
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
    first: Int[Array, "*batch"],
    entropy: Float[Array, "*batch"],
) -> LossStats:
    """Return the statistics, with the derivatives of nll, lse and entropy.

    Args:
        batch: the rows.
        options: the options of the loss.
        nll: as in `LossStats`, of all rows.
        smoothed: likewise.
        lse: likewise.
        log_sum: lse minus the largest logit, more accurate than that difference if the logits have a large offset.
        first: the class of the first largest logit.
        entropy: as in `LossStats`, of all rows.
    """
    if batch.bad is not None:
        # A product, so that the derivative is NaN as well.
        nll = nll * jnp.where(batch.bad, jnp.nan, 1)
    prediction = jnp.where(jnp.isnan(lse), -1, first.astype(jnp.int32))
    # Neither a bad label nor a row of NaN is correct.
    correct = (prediction == batch.label.astype(jnp.int32)) & ~jnp.isnan(nll)
    if batch.counted is None:
        valid = jnp.ones_like(correct)
    else:
        valid = batch.counted
        correct, prediction = correct & valid, jnp.where(valid, prediction, -1)
        nll, smoothed, lse, log_sum, entropy = (
            jnp.where(valid, value, 0) for value in (nll, smoothed, lse, log_sum, entropy)
        )
    constants = smoothed, options.z_loss * lse**2, jnp.where(valid, jnp.exp(-log_sum), 0)
    smoothed, z, confidence = map(jax.lax.stop_gradient, constants)
    return LossStats(nll, smoothed, z, lse, confidence, prediction, entropy, correct, valid)
