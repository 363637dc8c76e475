"""Operands and sums over the classes of each row, and the losses and slopes that follow from them.

The sums come from `sweeps.py`, block by block in place, or from `plain.py`, in operations that torch differentiates.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lsce_spec import GAP_UNIT
from lsce_torch.reference import is_nothing


class Operands(NamedTuple):
    """The loss of rows, apart from the logits. `on`, `off` and `at_max` are differentiable."""

    labels: Int[Tensor, "*batch"] | None  # None for soft labels, whose target is `factor`
    counted: Bool[Tensor, "*batch"] | None
    bad: Bool[Tensor, "*batch"] | None
    class_mask: Bool[Tensor, "*#batch K"] | None
    factor: Float[Tensor, "*#batch K"] | None  # w, which multiplies `off` and `at_max`; None for 1
    on: float | Float[Tensor, "*#batch"]  # target at the label, class weight included
    off: float | Float[Tensor, "*#batch"]  # target away from the label, before w
    other_mass: float | Float[Tensor, "*#batch"]  # sum of w over all classes but the label
    at_max: float | Float[Tensor, "*#batch"] | None  # added to the target at the largest logit, before w
    z_loss: float
    softcap: float | None
    with_stats: bool
    differentiable: bool  # whether gradients flow through the statistics
    kernels: bool  # whether the kernels for GPUs may compute it


# The operands with one value per row that are differentiable.
TARGETS = ("on", "off", "other_mass", "at_max")
# The operands with one value per row.
ROWS = ("labels", "counted", "bad", "on", "off", "other_mass", "at_max")


class Sums(NamedTuple):
    """Sums over the classes, one number per row of each. Losses and gradients follow from them."""

    peak: Float[Tensor, "*batch"]  # the largest logit m, after the softcap
    log_sum: Float[Tensor, "*batch"]  # log of the sum of exp(z - m)
    label_gap: Float[Tensor, "*batch"]  # m - z at the label
    other_gaps: Float[Tensor, "*batch"]  # sum of w (m - z) over all classes but the label, in units of GAP_UNIT
    largest: Float[Tensor, "*batch"]  # the largest logit before the softcap, which makes large logits equal
    # Only with statistics; 0 if there is only `at_max`:
    mean_gap: Float[Tensor, "*batch"] | None = None  # mean of m - z under the softmax
    # Only with `at_max`:
    num_largest: Float[Tensor, "*batch"] | None = None  # how many logits equal the largest
    largest_mass: Float[Tensor, "*batch"] | None = None  # mean of w over them
    # Not from the sweeps, since its value is 0; needed for its derivative:
    largest_gap: Float[Tensor, "*batch"] | None = None  # mean of w (m - z) over the largest logits


class Upstreams(NamedTuple):
    """Gradients with respect to what follows from the sums, one number per row of each; None for 0."""

    loss: Float[Tensor, "*#batch"] | None
    nll: Float[Tensor, "*batch"] | None = None
    lse: Float[Tensor, "*batch"] | None = None
    entropy: Float[Tensor, "*batch"] | None = None

    @property
    def present(self) -> list[Tensor]:
        """The gradients that are not 0."""
        return [of_rows for of_rows in self if of_rows is not None]

    def of_rows(self, part: slice) -> "Upstreams":
        """Return those of some rows, which are in one dimension."""
        return Upstreams(*(None if of_rows is None else of_rows[part] for of_rows in self))


def in_gap_units(gap: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return differences of logits in the unit in which their sum does not overflow."""
    return gap * (1 / GAP_UNIT)


def num_sums(operands: Operands) -> int:
    """Return how many of the `Sums` the sweeps compute."""
    if operands.at_max is not None:
        return Sums._fields.index("largest_gap")
    return Sums._fields.index("num_largest" if operands.with_stats else "mean_gap")


def unstacked(stacked: Float[Tensor, "sums ..."]) -> Sums:
    """Return the sums by name."""
    return Sums(*stacked.unbind())


def stacked_of(operands: Operands, sums: Sums) -> Float[Tensor, "sums ..."]:
    """Return in one tensor the sums that the sweeps compute."""
    of_rows = (torch.zeros_like(sums.peak) if value is None else value for value in sums[: num_sums(operands)])
    return torch.stack(list(of_rows))


def target_mass(operands: Operands, sums: Sums) -> float | Tensor:
    """Return the sum of the weighted target."""
    mass = operands.on + operands.off * operands.other_mass
    if operands.at_max is None or sums.largest_mass is None:
        return mass
    return mass + operands.at_max * sums.largest_mass


def losses_of(operands: Operands, sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses, the losses without the z-loss, and the log-sum-exp."""
    lse = sums.peak + sums.log_sum
    smoothed = target_mass(operands, sums) * sums.log_sum
    smoothed = smoothed + _product(operands.on, sums.label_gap) + _product(operands.off, sums.other_gaps, GAP_UNIT)
    if operands.at_max is not None and sums.largest_gap is not None:
        smoothed = smoothed + operands.at_max * sums.largest_gap
    if operands.bad is not None:
        # As a factor, so that the gradient of the row becomes NaN as well.
        smoothed = smoothed * torch.where(operands.bad, torch.nan, 1)
    losses = smoothed + operands.z_loss * lse**2 if operands.z_loss else smoothed
    if operands.counted is not None:
        losses = losses.masked_fill(~operands.counted, 0)
    return losses, smoothed, lse


def statistics_of(operands: Operands, sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
    """Return the statistics that may have gradients: nll, lse and entropy. See `LossStats`."""
    assert sums.mean_gap is not None
    nll = sums.log_sum + sums.label_gap
    if operands.bad is not None:
        nll = nll * torch.where(operands.bad, torch.nan, 1)  # as in `losses_of`
    return nll, sums.peak + sums.log_sum, sums.log_sum + sums.mean_gap


def _product(target: float | Tensor, gap: Tensor, unit: float = 1.0) -> Tensor | float:
    """Return target * gap * unit, where 0 * inf counts as 0."""
    if isinstance(target, Tensor):
        return target * unit * _finite(gap, target)
    if abs(target) >= torch.finfo(gap.dtype).tiny:
        return target * unit * gap
    return target * unit * gap.masked_fill(torch.isinf(gap), 0) if target else 0.0


def _finite(gap: Tensor, target: Tensor) -> Tensor:
    # Only infinite gaps are replaced: the derivative with respect to the target is the gap.
    return torch.where(is_nothing(target) & torch.isinf(gap), 0, gap)


def target_slopes(operands: Operands, sums: Sums, names: Sequence[str]) -> dict[str, Float[Tensor, "*batch"]]:
    """Return the derivatives of each row's loss with respect to what is named of `TARGETS`."""
    slopes: dict[str, Tensor] = {}
    if "other_mass" in names:
        slopes["other_mass"] = operands.off * sums.log_sum
    parts: dict[str, tuple[Tensor | None, float, Any]] = {
        "on": (sums.label_gap, 1, 1),
        "off": (sums.other_gaps, GAP_UNIT, operands.other_mass),
        "at_max": (sums.largest_gap, 1, sums.largest_mass),
    }
    for name, (gap, unit, mass) in parts.items():
        if name in names:
            slope = mass * sums.log_sum
            if gap is not None:
                slope = slope + _finite(gap, getattr(operands, name)) * unit
            slopes[name] = slope
    if operands.counted is None:
        return slopes
    return {name: torch.where(operands.counted, slope, 0) for name, slope in slopes.items()}


def target_gradients(
    operands: Operands, slopes: dict[str, Tensor], upstream: Float[Tensor, "*batch"]
) -> dict[str, Tensor | None]:
    """Return the gradients with respect to what has slopes of `TARGETS`."""
    return {
        name: (upstream * slopes[name]).sum_to_size(getattr(operands, name).shape) for name in TARGETS if name in slopes
    }
