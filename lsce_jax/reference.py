"""The readable implementation: the formula in plain jax.numpy operations, differentiated by JAX.

The target is written out per class, so under `jit` the gradient costs a few arrays of the size of the logits.
Forward mode, reverse mode and second derivatives all come from JAX. Comments explain the two lines that surprise: the
sum inside `_log_sum_exp`, and the gap that is set to 0.
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import entr
from jaxtyping import Array, Bool, Float

from lsce_jax.accurate import divide, log1p
from lsce_jax.inputs import Batch, as_last_axis
from lsce_jax.stats import LossStats, make_stats
from lsce_spec import LossOptions, smoothing_weights

# -x log x. Compiled, since its first step is 0 * -inf at 0, where `jax_debug_nans` would stop operations on their own.
entropy_of = jax.jit(entr)


def row_losses(
    batch: Batch, options: LossOptions, with_stats: bool = False
) -> tuple[Float[Array, "*batch"], LossStats | None]:
    """Return the loss of each row, 0 for rows that do not count and NaN for bad labels, and statistics if asked for."""
    target = target_distribution(batch, options)
    uncapped, allowed = _counted_logits(batch)
    logits = uncapped if options.softcap is None else options.softcap * jnp.tanh(uncapped / options.softcap)
    peak, gap, log_sum = _log_sum_exp(logits, allowed)
    if options.convention.at_max is not None:
        target = target + at_max(batch, options) * _share_of_largest(uncapped, allowed)
        if batch.bad is not None:
            target = jnp.where(batch.bad[..., None], jnp.nan, target)
    weighted = target
    if batch.class_weight is not None:
        weighted = target * as_last_axis(batch.class_weight, logits)
    # Where the target is 0, the logit may be -inf: 0 * inf counts as 0. Finite gaps keep their value, since the gap is
    # the derivative with respect to the target.
    finite_gap = jnp.where(is_nothing(weighted) & jnp.isinf(gap), 0, gap)
    lse = peak + log_sum
    smoothed = jnp.sum(weighted * finite_gap, axis=-1) + jnp.sum(weighted, axis=-1) * log_sum
    if options.subtract_entropy:
        smoothed -= jnp.sum(entropy_terms(target, batch), axis=-1)
    # If the mask lets no class through, no target is NaN.
    if batch.bad is not None:
        smoothed += jnp.where(batch.bad, jnp.nan, 0)
    losses = smoothed + options.z_loss * lse**2 if options.z_loss else smoothed
    if batch.counted is not None:
        losses = jnp.where(batch.counted, losses, 0)
    if not with_stats:
        return losses, None
    return losses, make_stats(
        batch,
        options,
        nll=_nll(batch, gap, log_sum, allowed),
        smoothed=smoothed,
        lse=lse,
        log_sum=log_sum,
        first=jnp.argmax(_constant(uncapped, allowed), axis=-1),
        entropy=log_sum + _mean_gap(gap, allowed),
    )


def is_nothing(target: Float[Array, "..."]) -> Bool[Array, "..."]:
    """Return where a target is 0 or so small that some devices flush it to 0."""
    smallest = jnp.asarray(jnp.finfo(target.dtype).tiny)  # type: ignore[no-untyped-call]
    return jnp.abs(target) < smallest


def _counted_logits(batch: Batch) -> tuple[Float[Array, "*batch K"], Bool[Array, "*#batch K"] | None]:
    """Return the logits in the compute dtype, 0 where they do not count, and the mask."""
    logits, allowed = batch.logits.astype(batch.dtype), None
    if batch.counted is not None:
        logits = jnp.where(batch.counted[..., None], logits, 0)
    if batch.class_mask is not None:
        allowed = as_last_axis(batch.class_mask, logits)
        logits = jnp.where(allowed, logits, 0)
    return logits, allowed


def target_distribution(batch: Batch, options: LossOptions) -> Float[Array, "*batch K"]:
    """Return the smoothed target of each row: 0 outside the class mask, NaN for bad labels."""
    dtype, num_classes = batch.dtype, batch.logits.shape[-1]
    if batch.soft:
        labels = batch.labels.astype(dtype)
        if batch.counted is not None:
            labels = jnp.where(batch.counted[..., None], labels, 0)
        target = _smoothed(labels, batch, options)
    else:
        classes = jnp.arange(num_classes, dtype=batch.labels.dtype)
        is_label = as_last_axis(classes, batch.logits) == batch.labels[..., None]
        if batch.prior is not None:
            target = _smoothed(is_label.astype(dtype), batch, options)
        else:
            on, off = on_off(batch, options)
            target = jnp.where(is_label, jnp.asarray(on, dtype), jnp.asarray(off, dtype))
    if batch.bad is not None:
        target = jnp.where(batch.bad[..., None], jnp.nan, target)
    if batch.class_mask is not None:
        target = jnp.where(as_last_axis(batch.class_mask, target), target, 0)
    return target


def _share_of_largest(
    logits: Float[Array, "*batch K"], allowed: Bool[Array, "*#batch K"] | None
) -> Float[Array, "*batch K"]:
    """Return 1 at the largest logit and 0 elsewhere; several largest logits share the 1 equally."""
    constant = _constant(logits, allowed)
    is_largest = (constant == jnp.max(constant, axis=-1, keepdims=True)).astype(logits.dtype)
    return is_largest / jnp.sum(is_largest, axis=-1, keepdims=True)


def _nll(
    batch: Batch,
    gap: Float[Array, "*batch K"],
    log_sum: Float[Array, "*batch"],
    allowed: Bool[Array, "*#batch K"] | None,
) -> Float[Array, "*batch"]:
    """Return the cross-entropy with the labels as they are."""
    if not batch.soft:
        return jnp.take_along_axis(gap, batch.labels[..., None], axis=-1)[..., 0] + log_sum
    labels = batch.labels.astype(gap.dtype)
    if allowed is not None:
        labels = jnp.where(allowed, labels, 0)
    terms = labels * jnp.where((labels == 0) & jnp.isinf(gap), 0, gap)
    return jnp.sum(terms, axis=-1) + jnp.sum(labels, axis=-1) * log_sum


def _mean_gap(gap: Float[Array, "*batch K"], allowed: Bool[Array, "*#batch K"] | None) -> Float[Array, "*batch"]:
    """Return sum_k p_k (m - z_k), the entropy without log sum exp(z - m)."""
    mass = jnp.exp(-gap) if allowed is None else jnp.where(allowed, jnp.exp(-gap), 0)
    products = mass * jnp.where(jnp.isposinf(gap), 0, gap)
    return divide(jnp.sum(products, axis=-1), jnp.sum(mass, axis=-1))


def entropy_terms(target: Float[Array, "*batch K"], batch: Batch) -> Float[Array, "*batch K"]:
    """Return -q log q per class."""
    if batch.prior is not None:
        # Where the prior is 0 the target is always 0. Use 1 there, since the slope of -q log q is infinite at 0.
        target = jnp.where((target == 0) & (as_last_axis(batch.prior, target) == 0), 1, target)
    entropy: Array = entropy_of(target)
    return entropy


def _smoothed(
    probabilities: Float[Array, "*batch K"],
    batch: Batch,
    options: LossOptions,
) -> Float[Array, "*batch K"]:
    """Return the target for class probabilities."""
    smoothing = batch.smoothing
    if batch.prior is not None:
        prior = as_last_axis(batch.prior, probabilities)
        return (1 - smoothing) * probabilities + smoothing * prior
    num_allowed = count_allowed(batch)
    if isinstance(num_allowed, int):
        if num_allowed == 1:
            return probabilities
        target: Array = options.convention.soft_target(probabilities, smoothing, num_allowed)
        return target
    smoothed = options.convention.soft_target(probabilities, smoothing, _two_or_more(num_allowed))
    return jnp.where(num_allowed == 1, probabilities, smoothed)


def on_off(batch: Batch, options: LossOptions) -> tuple[float | Array, float | Array]:
    """Return the target at the label and elsewhere."""
    num_allowed = count_allowed(batch)
    if isinstance(num_allowed, int):
        return smoothing_weights(options.convention, batch.smoothing, num_allowed)
    spread_over = _two_or_more(num_allowed)
    # Convert to an array last: in float32 1 - 0.99999 would be 0.1 % off.
    on = jnp.asarray(options.convention.on(batch.smoothing, spread_over), batch.dtype)
    off = jnp.asarray(options.convention.off(batch.smoothing, spread_over), batch.dtype)
    return jnp.where(num_allowed == 1, 1, on), jnp.where(num_allowed == 1, 0, off)


def at_max(batch: Batch, options: LossOptions) -> float | Array:
    """Return what the convention adds to the target at the largest logit."""
    num_allowed = count_allowed(batch)
    added = options.convention.at_max
    if added is None:
        return 0.0
    if isinstance(num_allowed, int):
        return 0.0 if num_allowed == 1 else added(batch.smoothing, num_allowed)
    return jnp.where(num_allowed == 1, 0, added(batch.smoothing, _two_or_more(num_allowed)))


def _two_or_more(num_allowed: Float[Array, "*#batch"]) -> Float[Array, "*#batch"]:
    """Return the number of classes to spread over, 2 if there are fewer.

    With one class nothing is spread, and without any every label is bad. So the results for 2 are not used, and are
    computed without a division by 0.
    """
    return jnp.maximum(num_allowed, 2)


def count_allowed(batch: Batch) -> int | Float[Array, ""] | Float[Array, "*batch 1"]:
    """Return the number of classes to spread over; an array if it depends on class masks or a symbolic dimension."""
    if batch.whole is not None:
        return batch.whole.num_allowed
    num_classes = batch.logits.shape[-1]
    if batch.class_mask is not None:
        axis = -1 if batch.has_row_masks else None
        return jnp.sum(batch.class_mask, axis=axis, keepdims=batch.has_row_masks).astype(batch.dtype)
    return num_classes if isinstance(num_classes, int) else jnp.asarray(num_classes, batch.dtype)


def _log_sum_exp(
    logits: Float[Array, "*batch K"], allowed: Bool[Array, "*#batch K"] | None
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch K"], Float[Array, "*batch"]]:
    """Return the maximum m, the gaps m - z, and log sum exp(z - m)."""
    constant = _constant(logits, allowed)
    peak = jnp.max(constant, axis=-1, keepdims=True)
    gap = peak - logits
    if allowed is not None:
        gap = jnp.where(allowed, gap, 0)

    # log1p of the sum without its largest term keeps small losses accurate. Subtracting 1 from each largest term, which
    # is exp(0), keeps its derivative: to drop the term would lose the gradient of the largest logit.
    is_peak = (constant == peak).astype(logits.dtype)
    terms = jnp.exp(-gap) - is_peak
    if allowed is not None:
        is_peak, terms = jnp.where(allowed, is_peak, 0), jnp.where(allowed, terms, 0)
    log_sum = log1p(jnp.sum(terms, axis=-1) + (jnp.sum(is_peak, axis=-1) - 1))
    return jnp.squeeze(peak, axis=-1), gap, log_sum


def _constant(logits: Float[Array, "*batch K"], allowed: Bool[Array, "*#batch K"] | None) -> Float[Array, "*batch K"]:
    """Return the logits for comparisons: -inf outside the mask, and without a derivative."""
    constant = jax.lax.stop_gradient(logits)
    return constant if allowed is None else jnp.where(allowed, constant, -jnp.inf)
