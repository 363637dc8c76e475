r"""The fast implementation: it never writes a target out, and keeps nothing as large as the logits for the gradient.

The target of an integer label is `on` at the label y and `off` times a weight w_k at every other class. So the loss of
a row is made of a few sums over the classes. With m the largest logit,

    rest = sum_k exp(z_k - m) - 1    label_gap = m - z_y    other_gaps = sum_{k != y} w_k (m - z_k)

    loss = on w_y label_gap + off other_gaps + S log1p(rest) + z_loss (m + log1p(rest))^2 - H(q)

Everything else is arithmetic on one number per row. The loss does not depend on m, so m counts as a constant.

The sums are defined in sums.py. row_sums.py makes them known to JAX with their derivatives, and cpu.py computes them
where XLA does not fuse them.

Soft labels are as large as the logits anyway. They take the reference implementation under `jax.checkpoint`, of which
the backward pass keeps the numbers of rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jaxtyping import Array, Float

from lsce_jax import reference
from lsce_jax.accurate import divide, log1p
from lsce_jax.inputs import Batch
from lsce_jax.row_sums import row_sums
from lsce_jax.stats import LossStats, make_stats
from lsce_jax.sums import Operands, Peaks, Sums
from lsce_spec import GAP_UNIT, LossOptions


class Targets(NamedTuple):
    """The numbers that define the target of an integer label, for all rows or for each; see `make_targets`."""

    on: Float[Array, "*#batch"]
    off: Float[Array, "*#batch"]
    at_max: Float[Array, "*#batch"] | None


def make_targets(batch: Batch, options: LossOptions) -> Targets:
    """Return `on` and `off` without class weights and prior, and `at_max`.

    They are computed from the smoothing as a Python number where it is one: in float32 1 - 0.99999 is 0.1 % off.
    """
    on, off = reference.on_off(batch, options) if batch.prior is None else (1 - batch.smoothing, batch.smoothing)
    at_max = None if options.convention.at_max is None else _per_row(reference.at_max(batch, options), batch)
    return Targets(_per_row(on, batch), _per_row(off, batch), at_max)


def row_losses(
    batch: Batch,
    options: LossOptions,
    with_stats: bool = False,
    targets: Targets | None = None,
    *,
    in_place: bool = False,
) -> tuple[Float[Array, "*batch"], LossStats | None]:
    """Return the loss of each row, 0 for rows that do not count and NaN for bad labels, and statistics if asked for.

    Args:
        batch: the rows.
        options: the options of the loss.
        with_stats: whether to return statistics.
        targets: the targets of the rows; None computes them from the batch's smoothing.
        in_place: whether the gradient is to take the memory of the logits, where nothing else needs them.
    """
    if batch.soft:
        kept: tuple[Array, LossStats | None] = jax.checkpoint(
            lambda: reference.row_losses(batch, options, with_stats), policy=_is_of_a_row
        )()
        return kept
    peaks, sums = row_sums(make_operands(batch, options, with_stats, in_place=in_place))
    return losses_of_sums(batch, options, targets or make_targets(batch, options), peaks, sums)


def make_operands(batch: Batch, options: LossOptions, with_stats: bool, *, in_place: bool = False) -> Operands:
    """Return what the loss sums over the classes, and which sums it needs."""
    return Operands(
        logits=batch.logits,
        labels=batch.labels.astype(jnp.int32),
        counted=batch.counted,
        class_mask=batch.class_mask,
        prior=batch.prior,
        class_weight=batch.class_weight,
        softcap=options.softcap,
        prior_entropy=options.subtract_entropy and batch.prior is not None,
        largest=options.convention.at_max is not None,
        stats=with_stats,
        in_place=in_place,
    )


def losses_of_sums(
    batch: Batch, options: LossOptions, targets: Targets, peaks: Peaks, sums: Sums
) -> tuple[Float[Array, "*batch"], LossStats | None]:
    """Return the loss of each row, and statistics if the sums were made for them."""
    log_sum = log1p(sums.rest)
    smoothed, nll = _smoothed_losses(batch, options, targets, sums, log_sum), log_sum + sums.label_gap
    return with_other_terms(batch, options, peaks, sums, log_sum=log_sum, smoothed=smoothed, nll=nll)


def with_other_terms(
    batch: Batch,
    options: LossOptions,
    peaks: Peaks,
    sums: Sums,
    *,
    log_sum: Float[Array, "*batch"],
    smoothed: Float[Array, "*batch"],
    nll: Float[Array, "*batch"],
) -> tuple[Float[Array, "*batch"], LossStats | None]:
    """Return what `losses_of_sums` does, given log1p of the rest, the losses without z-loss, and those not smoothed."""
    lse = peaks.peak + log_sum
    losses = smoothed + options.z_loss * lse**2 if options.z_loss else smoothed
    if batch.counted is not None:
        losses = jnp.where(batch.counted, losses, 0)
    if peaks.first is None or sums.weighted_gaps is None:
        return losses, None
    return losses, make_stats(
        batch,
        options,
        nll=nll,
        smoothed=smoothed,
        lse=lse,
        log_sum=log_sum,
        first=peaks.first,
        entropy=log_sum + divide(sums.weighted_gaps, 1 + sums.rest),
    )


def _is_of_a_row(primitive: Primitive, *_: object, **__: object) -> bool:
    """Whether the backward pass keeps a result: sums and maxima have one number for each row."""
    return primitive.name in {"reduce_sum", "reduce_max"}


def _smoothed_losses(
    batch: Batch, options: LossOptions, targets: Targets, sums: Sums, log_sum: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Return the loss of each row without its z-loss."""
    on, off, num_others = _on_off_others(batch, targets, sums)
    at_label, mass = _label_and_mass(batch, on, off, num_others, sums)
    smoothed = _product(at_label, sums.label_gap) + _product(off, sums.other_gaps, GAP_UNIT)
    if targets.at_max is not None:
        at_max = jnp.where(jnp.asarray(batch.bad), 0, targets.at_max)
        smoothed += at_max * jnp.asarray(sums.largest_gap)
        mass += at_max * jnp.asarray(sums.largest_mass)
    smoothed += mass * log_sum
    if options.subtract_entropy:
        # The entropy of off times a prior r is off entr(r_k) + r_k entr(off), summed over the classes.
        entropy = reference.entropy_of(on) + num_others * reference.entropy_of(off)
        smoothed -= entropy if sums.other_entropy is None else entropy + off * sums.other_entropy
    return smoothed


def weighted_target(
    batch: Batch, targets: Targets, sums: Sums
) -> tuple[Float[Array, "*#batch"], Float[Array, "*#batch"], Float[Array, "*#batch"]]:
    """Return the target at the label, with its weight, `off`, and the sum of the target without `at_max`.

    It uses only the sums that do not depend on the logits, `other_mass` and `other_prior`.
    """
    on, off, num_others = _on_off_others(batch, targets, sums)
    at_label, mass = _label_and_mass(batch, on, off, num_others, sums)
    return at_label, off, mass


def _label_and_mass(
    batch: Batch, on: Array, off: Array, num_others: Array, sums: Sums
) -> tuple[Float[Array, "*#batch"], Float[Array, "*#batch"]]:
    """Return the target at the label, with its class weight, and the sum of the target over the classes."""
    weight = batch.label_weight
    at_label = on if weight is None else on * weight
    return at_label, at_label + off * (num_others if sums.other_mass is None else sums.other_mass)


def _on_off_others(
    batch: Batch, targets: Targets, sums: Sums
) -> tuple[Float[Array, "*#batch"], Float[Array, "*#batch"], Float[Array, "*#batch"]]:
    """Return `on`, `off`, and the sum of the factors of `off` over the other classes, all without class weights."""
    on, off, prior = targets.on, targets.off, batch.label_prior
    if prior is None:
        num_others = _per_row(reference.count_allowed(batch) - 1, batch)
    else:
        on = on + off * prior
        num_others = jnp.asarray(sums.other_mass if sums.other_prior is None else sums.other_prior)
    # NaN at the label makes loss and gradient NaN; 0 elsewhere keeps the derivatives of other operands finite.
    bad = jnp.asarray(batch.bad)
    return jnp.where(bad, jnp.nan, on), jnp.where(bad, 0, off), num_others


def _per_row(value: float | Array, batch: Batch) -> Float[Array, "*#batch"]:
    """Return a number, or an array with a last dimension of 1, as an array over the rows."""
    value = jnp.asarray(value, batch.dtype)
    return jnp.squeeze(value, axis=-1) if value.ndim else value


def _product(target: Float[Array, "*#batch"], gap: Float[Array, "*batch"], unit: float = 1.0) -> Float[Array, "*batch"]:
    """Return target * gap * unit, where 0 * inf counts as 0."""
    # Only infinite gaps are replaced: the gap is the derivative with respect to the target.
    return target * unit * jnp.where(reference.is_nothing(target) & jnp.isinf(gap), 0, gap)
