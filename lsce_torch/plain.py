"""The sums of rows and the slopes of their losses in plain operations on whole tensors.

torch differentiates them in any mode and to any order, and its compiler fuses them. Comparisons with the largest logits
and with the label make constants: the loss does not depend on m, and the target does not depend on the logits.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lsce_torch.accurate import divide, log1p
from lsce_torch.inputs import compute_dtype, tensor_of
from lsce_torch.sums import Operands, Sums, Upstreams, in_gap_units, target_gradients, target_mass, target_slopes


class Peaks(NamedTuple):
    """The largest logit of each row among all classes, where the logits at hand are a shard of them."""

    largest: Float[Tensor, "*batch"]  # before the softcap
    peak: Float[Tensor, "*batch"]  # after it
    num_largest: Float[Tensor, "*batch"] | None = None  # with `at_max`, for gradients: how many logits are the largest


class Parts(NamedTuple):
    """Sums over some of the classes, one number per row of each. Those of all shards add up to those of all classes."""

    rest: Float[Tensor, "*batch"]  # of exp(z - m), without the terms that are 1
    num_peaks: Float[Tensor, "*batch"]  # how many terms are 1
    label_gap: Float[Tensor, "*batch"]  # see `Sums`
    other_gaps: Float[Tensor, "*batch"]  # likewise
    gap_mass: Float[Tensor, "*batch"] | None  # with statistics: of exp(z - m) (m - z)
    # With `at_max`, over the largest logits, of which each counts as much as its share:
    num_largest: Float[Tensor, "*batch"] | None  # how many they are
    largest_mass: Float[Tensor, "*batch"] | None  # of w
    largest_gap: Float[Tensor, "*batch"] | None  # of w (m - z)


class _Classes(NamedTuple):
    """Values for every class of every row."""

    gap: Float[Tensor, "*batch K"]  # m - z after the softcap, 0 outside the mask
    is_peak: Float[Tensor, "*batch K"]  # 1 where the gap is 0, else 0
    is_label: Bool[Tensor, "*batch K"] | None  # None for soft labels
    num_largest: Float[Tensor, "*batch 1"] | None  # with `at_max`: how many logits are the largest
    is_largest: Float[Tensor, "*batch K"] | None  # with `at_max`: at the largest logits 1 divided by their number
    share: Float[Tensor, "*batch K"] | None  # that times w
    cap_slope: Float[Tensor, "*batch K"] | None  # derivative of the softcap
    constants: Float[Tensor, "*batch K"]  # the logits before the softcap without derivatives, -inf outside the mask


def _classes(
    logits: Float[Tensor, "*batch K"], operands: Operands, of_all: Peaks | None = None
) -> tuple[Tensor, Tensor, _Classes]:
    """Return the largest logits after and before the softcap, and the values of the classes.

    `of_all` says that the logits are a shard: what the largest logits of all classes are.
    """
    logits = logits.to(compute_dtype(logits))
    if operands.counted is not None:
        logits = torch.where(operands.counted[..., None], logits, 0)
    allowed = operands.class_mask
    if allowed is not None:
        logits = torch.where(allowed, logits, 0)
    capped, cap_slope = logits, None
    if operands.softcap is not None:
        tanh = torch.tanh(logits / operands.softcap)
        capped, cap_slope = operands.softcap * tanh, 1 - tanh**2
    constants = [logits.detach(), capped.detach()]
    if allowed is not None:
        constants = [torch.where(allowed, values, -torch.inf) for values in constants]
    if of_all is None:
        largest, peak = (torch.amax(values, dim=-1, keepdim=True) for values in constants)
    else:
        largest, peak = of_all.largest[..., None], of_all.peak[..., None]
    gap = peak - capped
    is_peak = (constants[1] == peak).to(gap.dtype)
    if allowed is not None:
        gap, is_peak = torch.where(allowed, gap, 0), torch.where(allowed, is_peak, 0)
    is_label = num_largest = is_largest = share = None
    if operands.labels is not None:
        is_label = torch.arange(gap.shape[-1], device=gap.device) == operands.labels[..., None]
    if operands.at_max is not None:
        at_largest = constants[0] == largest
        num_largest = torch.sum(at_largest, dim=-1, keepdim=True, dtype=gap.dtype)
        share_of = num_largest
        if of_all is not None:
            share_of = torch.ones_like(num_largest) if of_all.num_largest is None else of_all.num_largest[..., None]
        is_largest = at_largest / share_of
        share = is_largest if operands.factor is None else is_largest * operands.factor
    classes = _Classes(gap, is_peak, is_label, num_largest, is_largest, share, cap_slope, constants[0])
    return peak.squeeze(-1), largest.squeeze(-1), classes


def plain_sums(logits: Float[Tensor, "*batch K"], operands: Operands) -> tuple[Sums, Int[Tensor, "*batch"] | None]:
    """Return the sums of each row and, for statistics, the index of the first largest logit."""
    peak, largest, classes = _classes(logits, operands)
    first = torch.argmax(classes.constants, dim=-1) if operands.with_stats else None
    return _sums(peak, largest, classes, operands), first


def plain_sums_and_slopes(
    logits: Float[Tensor, "*batch K"], operands: Operands
) -> tuple[Sums, Int[Tensor, "*batch"] | None, Float[Tensor, "*batch K"]]:
    """Return what `plain_sums` returns, and the derivatives of each row's loss with respect to the logits."""
    peak, largest, classes = _classes(logits, operands)
    first = torch.argmax(classes.constants, dim=-1) if operands.with_stats else None
    sums = _sums(peak, largest, classes, operands)
    return sums, first, _logit_slopes(classes, sums, operands)


def _sums(
    peak: Float[Tensor, "*batch"], largest: Float[Tensor, "*batch"], classes: _Classes, operands: Operands
) -> Sums:
    return sums_of_parts(_parts(classes, operands), Peaks(largest, peak), operands)


def _parts(classes: _Classes, operands: Operands) -> Parts:
    gap, factor = classes.gap, operands.factor
    # Each term that is 1 becomes 0, and all of these but one are added again, so that small losses keep their accuracy.
    exponentials = torch.exp(-gap)
    terms = exponentials - classes.is_peak
    if operands.class_mask is not None:
        terms = torch.where(operands.class_mask, terms, 0)
    gap_mass = None
    if operands.with_stats:
        # Outside the mask the gap is 0. 0 * inf counts as 0.
        gap_mass = torch.sum(exponentials * torch.where(torch.isinf(gap), 0, gap), dim=-1)
    rest = torch.sum(terms, dim=-1)
    label_gap, other_gap = torch.zeros_like(rest), gap
    if classes.is_label is not None:
        label_gap = torch.sum(torch.where(classes.is_label, gap, 0), dim=-1)
        other_gap = torch.where(classes.is_label, 0, gap)
    other_gap = in_gap_units(other_gap)
    if factor is not None:
        other_gap = factor * torch.where((factor == 0) & torch.isinf(other_gap), 0, other_gap)
    largest_mass = largest_gap = None
    if classes.share is not None:
        shared_gap = torch.where(classes.share == 0, 0, gap)
        largest_mass, largest_gap = torch.sum(classes.share, dim=-1), torch.sum(classes.share * shared_gap, dim=-1)
    return Parts(
        rest=rest,
        num_peaks=torch.sum(classes.is_peak, dim=-1),
        label_gap=label_gap,
        other_gaps=torch.sum(other_gap, dim=-1),
        gap_mass=gap_mass,
        num_largest=None if classes.num_largest is None else classes.num_largest.squeeze(-1),
        largest_mass=largest_mass,
        largest_gap=largest_gap,
    )


def sums_of_parts(parts: Parts, of_all: Peaks, operands: Operands) -> Sums:
    """Return the sums of rows from their parts over all classes."""
    rest = parts.rest + (parts.num_peaks - 1)
    mean_gap = None
    if operands.with_stats and parts.gap_mass is not None:
        if operands.class_mask is not None:
            # Below 0 without any class. The loss is NaN without this, and takes one kernel less on a GPU.
            rest = torch.where(rest < 0, torch.nan, rest)
        mean_gap = divide(parts.gap_mass, 1 + rest)
    return Sums(
        peak=of_all.peak,
        log_sum=log1p(rest),
        label_gap=parts.label_gap,
        other_gaps=parts.other_gaps,
        largest=of_all.largest,
        mean_gap=mean_gap,
        num_largest=parts.num_largest,
        largest_mass=parts.largest_mass,
        largest_gap=parts.largest_gap,
    )


def peaks_of_shard(logits: Float[Tensor, "*batch K"], operands: Operands) -> tuple[Peaks, Int[Tensor, "*batch"] | None]:
    """Return the largest logits of a shard, -inf if it has no class, and for statistics the index of the first one."""
    if not logits.shape[-1]:
        least = torch.full(logits.shape[:-1], -torch.inf, dtype=compute_dtype(logits), device=logits.device)
        return Peaks(least, least), torch.zeros_like(least, dtype=torch.int64) if operands.with_stats else None
    peak, largest, classes = _classes(logits, operands)
    return Peaks(largest, peak), torch.argmax(classes.constants, dim=-1) if operands.with_stats else None


def parts_of_shard(logits: Float[Tensor, "*batch K"], operands: Operands, of_all: Peaks) -> Parts:
    """Return the sums over the classes of a shard, relative to the largest logits of all classes.

    The sums over the largest logits are those over all of them once they are divided by their number.
    """
    *_, classes = _classes(logits, operands, of_all)
    return _parts(classes, operands)


def peaks_and_parts_of_shard(
    logits: Float[Tensor, "*batch K"], operands: Operands
) -> tuple[Peaks, Int[Tensor, "*batch"] | None, Parts]:
    """Return what `peaks_of_shard` returns, and the sums over the classes relative to the shard's own largest logits.

    If these are -inf, the sums are relative to a finite number below all logits that matter. See `relative_to`.
    """
    own, first = peaks_of_shard(logits, operands)
    return own, first, parts_of_shard(logits, operands, _finite(own))


def _finite(own: Peaks) -> Peaks:
    least = torch.finfo(own.peak.dtype).min / 4
    return Peaks(own.largest.clamp(min=least), own.peak.clamp(min=least))


def relative_to(
    of_all: Peaks,
    own: Peaks,
    parts: Parts,
    num_labels: Float[Tensor, "*batch"],
    other_mass: Float[Tensor, "*batch"],
) -> Parts:
    """Return the sums of a shard relative to the largest logits of all classes, from those relative to its own.

    With m of the shard and M >= m of all, exp(z - M) = exp(z - m) exp(m - M), and M - z = (m - z) + (M - m).

    Args:
        of_all: the largest logits of all classes.
        own: those of the shard.
        parts: the sums relative to them.
        num_labels: 1 where the label is a class of the shard, else 0.
        other_mass: what the gaps of the shard's other classes are multiplied by, in sum.
    """
    shift = of_all.peak - _finite(own).peak
    scale, mass = torch.exp(-shift), parts.rest + parts.num_peaks
    has_peak, has_largest = own.peak == of_all.peak, own.largest == of_all.largest
    # No number of float64 is so small that its product with exp(-1000) would be more than 0. Infinity would be NaN.
    gap_mass = None if parts.gap_mass is None else scale * (parts.gap_mass + mass * shift.clamp(max=1000))
    return Parts(
        rest=torch.where(has_peak, parts.rest, mass * scale),
        num_peaks=torch.where(has_peak, parts.num_peaks, 0),
        label_gap=parts.label_gap + _product(num_labels, shift),
        other_gaps=parts.other_gaps + _product(other_mass, in_gap_units(shift)),
        gap_mass=gap_mass,
        num_largest=None if parts.num_largest is None else torch.where(has_largest, parts.num_largest, 0),
        largest_mass=None if parts.largest_mass is None else torch.where(has_largest, parts.largest_mass, 0),
        largest_gap=None if parts.largest_gap is None else torch.where(has_largest, parts.largest_gap, 0),
    )


def _product(mass: Float[Tensor, "*batch"], shift: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Return mass * shift, where 0 * inf counts as 0: of logits near both ends of the dtype the shift is infinite."""
    return mass * torch.where((mass == 0) & torch.isinf(shift), 0, shift)


def _classes_and_sums(
    logits: Float[Tensor, "*batch K"], operands: Operands, of_all: Sums | None
) -> tuple[_Classes, Sums]:
    """Return the values of the classes and the sums over all of them.

    `of_all` says that the logits are a shard: what the sums over all classes are.
    """
    if of_all is not None:
        return _classes(logits, operands, Peaks(of_all.largest, of_all.peak, of_all.num_largest))[-1], of_all
    peak, largest, classes = _classes(logits, operands)
    return classes, _sums(peak, largest, classes, operands)


def plain_slopes(
    logits: Float[Tensor, "*batch K"], operands: Operands, names: Sequence[str], of_all: Sums | None = None
) -> dict[str, Float[Tensor, "..."]]:
    """Return the derivatives of each row's loss with respect to what is named: "logits", "factor" or of `TARGETS`.

    `of_all` is as in `plain_gradients`.
    """
    classes, sums = _classes_and_sums(logits, operands, of_all)
    slopes = target_slopes(operands, sums, names)
    if "logits" in names:
        slopes["logits"] = _logit_slopes(classes, sums, operands)
    if "factor" in names:
        slopes["factor"] = _factor_slopes(classes, sums, operands)
    return slopes


def _logit_slopes(classes: _Classes, sums: Sums, operands: Operands) -> Float[Tensor, "*batch K"]:
    """Return what `sweeps.logits_gradient` writes for an upstream gradient of 1 with respect to the loss alone."""
    slope = target_mass(operands, sums)
    if operands.z_loss:
        slope = slope + 2 * operands.z_loss * (sums.peak + sums.log_sum)
    if operands.bad is not None:
        slope = slope * torch.where(operands.bad, torch.nan, 1)
    on, off, at_max = (_column(value, classes.gap) for value in (operands.on, operands.off, operands.at_max))
    target = off if operands.factor is None else off * operands.factor
    if classes.is_label is not None:
        target = torch.where(classes.is_label, on, target)
    if classes.share is not None:
        target = target + at_max * classes.share
    return _masked(_column(slope, classes.gap) * _probabilities(classes, sums) - target, classes, operands)


def _statistics_gradient(
    classes: _Classes, sums: Sums, operands: Operands, upstreams: Upstreams
) -> Float[Tensor, "*batch K"]:
    """Return what `sweeps.logits_gradient` writes for the statistics alone."""
    slope = torch.zeros_like(sums.peak)
    for upstream in (upstreams.nll, upstreams.lse):
        if upstream is not None:
            slope = slope + upstream
    if operands.bad is not None and upstreams.nll is not None:
        slope = slope * torch.where(operands.bad, torch.nan, 1)
    slopes = slope[..., None]
    if upstreams.entropy is not None and sums.mean_gap is not None:
        finite = torch.where(torch.isinf(classes.gap), 0, classes.gap)
        slopes = slopes + upstreams.entropy[..., None] * (finite - sums.mean_gap[..., None])
    slopes = slopes * _probabilities(classes, sums)
    if upstreams.nll is not None and classes.is_label is not None:
        slopes = slopes - torch.where(classes.is_label, upstreams.nll[..., None], 0)
    return _masked(slopes, classes, operands)


def _probabilities(classes: _Classes, sums: Sums) -> Float[Tensor, "*batch K"]:
    return torch.exp(-classes.gap) * torch.exp(-sums.log_sum)[..., None]


def _masked(slopes: Float[Tensor, "*batch K"], classes: _Classes, operands: Operands) -> Float[Tensor, "*batch K"]:
    """Return slopes with respect to the capped logits as those with respect to the logits, 0 where none count."""
    if classes.cap_slope is not None:
        slopes = slopes * classes.cap_slope
    if operands.class_mask is not None:
        slopes = torch.where(operands.class_mask, slopes, 0)
    return slopes if operands.counted is None else torch.where(operands.counted[..., None], slopes, 0)


def _factor_slopes(classes: _Classes, sums: Sums, operands: Operands) -> Float[Tensor, "*batch K"]:
    """Return the slopes with respect to w. Its sum over the other classes, `other_mass`, is an operand of its own."""
    assert operands.factor is not None
    finite = torch.where((operands.factor == 0) & torch.isinf(classes.gap), 0, classes.gap)
    slopes = _column(operands.off, classes.gap) * finite
    if classes.is_label is not None:
        slopes = torch.where(classes.is_label, 0, slopes)
    if classes.is_largest is not None:
        at_max = _column(operands.at_max, classes.gap) * classes.is_largest
        slopes = slopes + at_max * (finite + sums.log_sum[..., None])
    if operands.class_mask is not None:
        slopes = torch.where(operands.class_mask, slopes, 0)
    return slopes if operands.counted is None else torch.where(operands.counted[..., None], slopes, 0)


def plain_gradients(
    logits: Float[Tensor, "*batch K"],
    operands: Operands,
    names: Sequence[str],
    upstreams: Upstreams,
    of_all: Sums | None = None,
) -> dict[str, Tensor | None]:
    """Return the gradients with respect to what is named, as in `plain_slopes`; for the logits in the compute dtype.

    `of_all` says that the logits are a shard: what the sums over all classes are.
    """
    gradients: dict[str, Tensor | None] = {}
    classes, sums = _classes_and_sums(logits, operands, of_all)
    upstream = upstreams.loss
    if upstream is not None:
        gradients |= target_gradients(operands, target_slopes(operands, sums, names), upstream)
        if "factor" in names and operands.factor is not None:
            slopes = upstream[..., None] * _factor_slopes(classes, sums, operands)
            gradients["factor"] = slopes.sum_to_size(operands.factor.shape)
    if "logits" in names:
        parts = [] if upstream is None else [upstream[..., None] * _logit_slopes(classes, sums, operands)]
        if any(of_rows is not None for of_rows in upstreams[1:]):
            parts.append(_statistics_gradient(classes, sums, operands, upstreams))
        gradients["logits"] = functools.reduce(torch.add, parts)
    return gradients


class Tangents(NamedTuple):
    """Tangents of the losses, and of the statistics that have any."""

    loss: Float[Tensor, "*batch"]
    nll: Float[Tensor, "*batch"] | None = None
    lse: Float[Tensor, "*batch"] | None = None
    entropy: Float[Tensor, "*batch"] | None = None


def plain_tangents(
    logits: Float[Tensor, "*batch K"],
    operands: Operands,
    tangents: Mapping[str, Tensor],
    of_all: Sums | None = None,
) -> Tangents:
    """Return the tangents from those of what is named as in `plain_slopes`.

    `of_all` is as in `plain_gradients`. Tangents of a shard's logits make the part that it has in those of the losses.
    """
    loss = _tangent_of(plain_slopes(logits, operands, list(tangents), of_all), tangents)
    if not operands.differentiable:
        return Tangents(loss)
    if "logits" not in tangents:
        return Tangents(loss, *(torch.zeros_like(loss) for _ in range(3)))
    classes, sums = _classes_and_sums(logits, operands, of_all)
    one = torch.ones_like(sums.peak)
    units = (Upstreams(None, **{name: one}) for name in Upstreams._fields[1:])
    slopes = (_statistics_gradient(classes, sums, operands, unit) for unit in units)
    return Tangents(loss, *(torch.sum(of_one * tangents["logits"].to(of_one.dtype), dim=-1) for of_one in slopes))


def _tangent_of(slopes: Mapping[str, Tensor], tangents: Mapping[str, Tensor]) -> Float[Tensor, "*batch"]:
    """Return the tangent of the losses from their slopes and the tangents of what these are with respect to."""
    terms = {name: slopes[name] * tangent.to(slopes[name].dtype) for name, tangent in tangents.items()}
    for name in ("logits", "factor"):
        if name in terms:
            terms[name] = torch.sum(terms[name], dim=-1)
    return functools.reduce(torch.add, terms.values())


def _column(value: float | Tensor | None, like: Float[Tensor, "*batch K"]) -> Float[Tensor, "*#batch 1"]:
    """Return numbers of rows, or one for all, with one column; 0 for None."""
    return tensor_of(0.0 if value is None else value, like.dtype, like.device)[..., None]
