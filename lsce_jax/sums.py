"""The sums over the classes that the fused implementation makes its loss of: what they are, and their plain formulas.

`sums` and `sums_at` are for accelerators, where XLA fuses all of them into one sweep over the logits. They find the
label by comparison with an iota: for a gather the TPU compiler would write out the logits in float32. What CPUs take
instead is in cpu.py, what GPUs take is in gpu.py, and row_sums.py has the derivatives.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lsce_jax import reference
from lsce_jax.inputs import as_last_axis, compute_dtype
from lsce_spec import GAP_UNIT

_STATIC = {"static": True}  # fixed when JAX traces the function


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operands:
    """The arrays to sum over, and which sums to compute."""

    logits: Float[Array, "*batch K"]
    labels: Int[Array, "*batch"]
    counted: Bool[Array, "*batch"] | None
    class_mask: Bool[Array, " K"] | Bool[Array, "*batch K"] | None
    prior: Float[Array, " K"] | None
    class_weight: Float[Array, " K"] | None
    softcap: float | None = field(metadata=_STATIC)
    prior_entropy: bool = field(metadata=_STATIC)  # whether to compute other_entropy
    largest: bool = field(metadata=_STATIC)  # whether to compute largest_gap and largest_mass
    stats: bool = field(metadata=_STATIC)  # whether to compute first and weighted_gaps
    in_place: bool = field(metadata=_STATIC)  # whether the gradient is to take the memory of the logits


CLASS_VECTORS = ("class_mask", "prior", "class_weight")
NO_CLASS = np.int32(2**30)  # beyond all classes, also as a float32 number
_MOST_NUMBERED = 2**24  # up to here float32 numbers tell classes apart
MASSLESS = -1000.0  # a difference of logits whose exponential is 0 in float64


class Peaks(NamedTuple):
    """Values of each row that count as constants in derivatives."""

    peak: Float[Array, "*batch"]  # m: the largest logit, after the softcap
    largest: Float[Array, "*batch"]  # the largest logit before the softcap, which makes large logits equal
    num_largest: Float[Array, "*batch"] | None  # how many logits are as large; None if `largest` is not asked for
    first: Int[Array, "*batch"] | None  # the first class whose logit is as large; beyond the classes if there is none


class Sums(NamedTuple):
    """Sums of each row; None where the loss does not use them."""

    rest: Float[Array, "*batch"]  # sum of exp(z - m), less 1
    label_gap: Float[Array, "*batch"]  # m - z at the label
    other_gaps: Float[Array, "*batch"]  # sum of w (m - z) over the other classes, in units of GAP_UNIT
    other_mass: Float[Array, "*batch"] | None  # sum of w over the other classes
    other_prior: Float[Array, "*batch"] | None  # sum of the prior over the other classes
    other_entropy: Float[Array, "*batch"] | None  # sum of -prior log prior over the other classes
    weighted_gaps: Float[Array, "*batch"] | None  # sum of exp(z - m) (m - z)
    largest_gap: Float[Array, "*batch"] | None  # mean of w (m - z) over the largest logits
    largest_mass: Float[Array, "*batch"] | None  # mean of w over the largest logits


def class_factor(
    prior: Float[Array, "*rows K"] | None, class_weight: Float[Array, "*rows K"] | None
) -> Float[Array, "*rows K"] | None:
    """Return w, the factor of `off` at each class: the product of prior and class weight; None if it is 1."""
    if prior is None or class_weight is None:
        return class_weight if prior is None else prior
    return prior * class_weight


def sums(operands: Operands, *, by_index: bool = False) -> tuple[Peaks, Sums]:
    """Return the sums of each row, and the constants that they are relative to.

    Args:
        operands: what to sum.
        by_index: whether to find the logit of the label by its index, and not by comparison.
    """
    largest = largest_logits(operands)
    peaks = peaks_at(operands, largest, capped(largest, operands.softcap))
    return peaks, sums_at(operands, peaks, is_label(operands), by_index=by_index)


def largest_logits(operands: Operands) -> Float[Array, "*batch"]:
    """Return the largest logit of each row before the softcap, a constant."""
    raw, allowed = counted_logits(operands)
    return jnp.max(jax.lax.stop_gradient(raw if allowed is None else jnp.where(allowed, raw, -jnp.inf)), axis=-1)


def peaks_at(operands: Operands, largest: Float[Array, "*batch"], peak: Float[Array, "*batch"]) -> Peaks:
    """Return the constants of each row that the sums are relative to, for a largest logit before and after the softcap.

    It may be larger than those of the operands. Then they have none that is as large, and no score.
    """
    raw, allowed = counted_logits(operands)
    is_largest = jax.lax.stop_gradient(raw) >= largest[..., None]
    if allowed is not None:
        is_largest &= allowed
    num_largest, first = None, None
    if operands.largest:
        num_largest = jnp.sum(is_largest, axis=-1, dtype=raw.dtype)
    if operands.stats:
        # Not argmax, which is a sweep of its own. Nor a minimum of integers, which XLA for TPUs joins to no other sums.
        classes, num_classes = _classes(raw), raw.shape[-1]
        if isinstance(num_classes, int) and num_classes <= _MOST_NUMBERED:
            classes = classes.astype(raw.dtype)
        beyond = jnp.asarray(NO_CLASS, classes.dtype)
        first = jnp.min(jnp.where(is_largest, classes, beyond), axis=-1).astype(jnp.int32)
    return Peaks(peak, largest, num_largest, first)


def is_label(operands: Operands) -> Bool[Array, "*batch K"]:
    """Return where the label of each row is."""
    found: Array = _classes(operands.logits) == operands.labels[..., None]
    return found


def sums_at(
    operands: Operands,
    peaks: Peaks,
    at_label: Bool[Array, "*batch K"] | None,
    *,
    differentiable: bool = False,
    by_index: bool = False,
    without: float | Float[Array, "*batch"] = 1,
) -> Sums:
    """Return the sums at given peaks.

    Args:
        operands: what to sum. Their class vectors may also have values for each row.
        peaks: the peaks of these operands.
        at_label: where the label is; None if it is not among the classes.
        differentiable: whether only the derivatives of the sums are used, not their values.
        by_index: whether to find the logit of the label by its index, and not by comparison.
        without: what `rest` leaves out of the sum: 1, or 0 where the operands may have none that is the largest.
    """
    raw, allowed = counted_logits(operands)
    is_largest = jax.lax.stop_gradient(raw) >= peaks.largest[..., None]
    if allowed is not None:
        is_largest &= allowed
    values = capped(raw, operands.softcap)
    below = values - peaks.peak[..., None]
    if operands.softcap is not None:
        # A compiler may compute the tanh of the largest logit differently among others: there the gap must be 0.
        below = jnp.where(is_largest, values - jax.lax.stop_gradient(values), below)
    if allowed is not None:
        below = jnp.where(allowed, below, 0)
    # XLA for CPUs is a third slower with exp(-gap).
    gap, terms, num_peaks = -below, jnp.exp(below), jnp.ones((), below.dtype)
    if not differentiable:
        # Without the largest terms, all of them 1, small losses keep their accuracy. Subtraction leaves them out
        # exactly and keeps their derivatives.
        terms = jnp.where(is_largest, terms - jax.lax.stop_gradient(terms), terms)
        num_peaks = jnp.sum(is_largest, axis=-1, dtype=gap.dtype)
    if allowed is not None:
        terms = jnp.where(allowed, terms, 0)
    return Sums(
        jnp.sum(terms, axis=-1) + (num_peaks - without),
        _label_gap(operands, gap, at_label, by_index),
        *_sums_over_others(operands, gap, at_label, allowed),
        _weighted_gaps(below, allowed) if operands.stats else None,
        *_means_over_largest(operands, gap, is_largest, peaks.num_largest),
    )


def _weighted_gaps(below: Float[Array, "*batch K"], allowed: Bool[Array, "*#batch K"] | None) -> Float[Array, "*batch"]:
    return jnp.sum(weighted_gap(below if allowed is None else jnp.where(allowed, below, 0)), axis=-1)


def weighted_gap(below: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return exp(z - m) (m - z), given z - m; 0 where that is -inf, of which the product would be NaN."""
    # Where exp(z - m) is 0 in any dtype, the other factor does not matter, if its multiples are finite.
    return jnp.exp(below) * -jnp.maximum(below, MASSLESS)


def in_gap_units(gap: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return differences of logits in the unit in which their sum does not overflow."""
    return gap * (1 / GAP_UNIT)


def _label_gap(
    operands: Operands, gap: Float[Array, "*batch K"], at_label: Bool[Array, "*batch K"] | None, by_index: bool
) -> Float[Array, "*batch"]:
    if at_label is None:
        return jnp.zeros_like(gap[..., 0])
    if by_index:
        return jnp.take_along_axis(gap, operands.labels[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(at_label, gap, 0), axis=-1)


def _sums_over_others(
    operands: Operands,
    gap: Float[Array, "*batch K"],
    at_label: Bool[Array, "*batch K"] | None,
    allowed: Bool[Array, "*#batch K"] | None,
) -> tuple[Float[Array, "*batch"], *tuple[Float[Array, "*batch"] | None, ...]]:
    """Return other_gaps, other_mass, other_prior and other_entropy of `Sums`."""
    prior, factor = operands.prior, class_factor(operands.prior, operands.class_weight)

    def at_others(values: Float[Array, "*#batch K"]) -> Float[Array, "*#batch K"]:
        return values if at_label is None else jnp.where(at_label, 0, values)

    def total(vector: Float[Array, "*#batch K"] | None) -> Float[Array, "*batch"] | None:
        if vector is None:
            return None
        values = jnp.broadcast_to(as_last_axis(vector, gap), gap.shape)
        return jnp.sum(at_others(values if allowed is None else jnp.where(allowed, values, 0)), axis=-1)

    other_gap = in_gap_units(at_others(gap))
    if factor is not None:
        weight = as_last_axis(factor, gap)
        other_gap = weight * jnp.where((weight == 0) & jnp.isinf(other_gap), 0, other_gap)
    # At 0 the slope of entr is infinite, but a prior of 0 there is a constant.
    entropy = (
        reference.entropy_of(jnp.where(prior == 0, 1, prior)) if prior is not None and operands.prior_entropy else None
    )
    return (
        jnp.sum(other_gap, axis=-1),
        total(factor),
        total(None if operands.class_weight is None else prior),
        total(entropy),
    )


def _means_over_largest(
    operands: Operands,
    gap: Float[Array, "*batch K"],
    is_largest: Bool[Array, "*batch K"],
    num_largest: Float[Array, "*batch"] | None,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]] | tuple[None, None]:
    """Return largest_gap and largest_mass of `Sums`."""
    if num_largest is None:
        return None, None
    vector = operands.class_weight
    weight = jnp.ones((), gap.dtype) if vector is None else as_last_axis(vector, gap)
    # Divided after the sum, so that the number and the sums come from one sweep.
    of_gaps = jnp.sum(weight * jnp.where(is_largest, gap, 0), axis=-1)
    of_weights = jnp.sum(jnp.where(is_largest, weight, 0), axis=-1)
    return of_gaps / num_largest, of_weights / num_largest


def counted_logits(operands: Operands) -> tuple[Float[Array, "*batch K"], Bool[Array, "*#batch K"] | None]:
    """Return the logits before the softcap, 0 where they do not count, and the mask."""
    raw, allowed = operands.logits.astype(compute_dtype(operands.logits)), None
    if operands.counted is not None:
        raw = jnp.where(operands.counted[..., None], raw, 0)
    if operands.class_mask is not None:
        allowed = as_last_axis(operands.class_mask, raw)
        raw = jnp.where(allowed, raw, 0)
    return raw, allowed


def capped(logits: Float[Array, "..."], softcap: float | None) -> Float[Array, "..."]:
    """Return logits after the softcap."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _classes(like: Float[Array, "*batch K"]) -> Int[Array, "*ones K"]:
    return jax.lax.broadcasted_iota(jnp.int32, (1,) * (like.ndim - 1) + like.shape[-1:], like.ndim - 1)
