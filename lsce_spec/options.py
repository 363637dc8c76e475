"""The options that are fixed for a call, checked once, frozen, and read by every implementation."""

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from lsce_spec.checks import check_smoothing, is_number
from lsce_spec.conventions import Convention, find_convention
from lsce_spec.errors import error

IMPLEMENTATIONS = ("reference",)
REDUCTIONS = ("none", "sum", "mean")
BAD_LABELS = ("nan", "raise")


@dataclass(frozen=True)
class LossOptions:
    """Everything about a call but its arrays. See `label_smoothed_cross_entropy` for the meaning of each.

    `smoothing` is a number, or an array that the framework package checks further.
    """

    smoothing: Any
    convention: Convention
    ignore_index: int | None
    z_loss: float
    softcap: float | None
    subtract_entropy: bool
    bad_labels: str
    reduction: str
    implementation: str

    @staticmethod
    def checked(
        *,
        smoothing: Any,
        convention: str | Convention,
        has_prior: bool,
        ignore_index: int | None,
        z_loss: float,
        softcap: float | None,
        subtract_entropy: bool,
        bad_labels: str,
        reduction: str,
        has_denominator: bool,
        implementation: str | None,
    ) -> "LossOptions":
        """Check every option and return them frozen.

        Raises:
            ValueError: a value out of its range, or two options that exclude each other.
            TypeError: a value of the wrong type.
        """
        check_smoothing(smoothing)
        convention = find_convention(convention)
        if has_prior and convention.name != "uniform":
            raise error("prior_convention", given=repr(convention.name))
        if ignore_index is not None and (not isinstance(ignore_index, Integral) or isinstance(ignore_index, bool)):
            raise error("ignore_index_type", given=repr(ignore_index))
        if not is_number(z_loss) or not 0 <= z_loss < math.inf:
            raise error("non_negative_number", name="z_loss", given=repr(z_loss))
        if softcap is not None and (not is_number(softcap) or not 0 < softcap < math.inf):
            raise error("softcap", given=repr(softcap))
        if not isinstance(subtract_entropy, bool):
            raise error("flag", name="subtract_entropy", given=repr(subtract_entropy))
        if bad_labels not in BAD_LABELS:
            raise error("bad_labels", given=repr(bad_labels))
        if reduction not in REDUCTIONS:
            raise error("reduction", given=repr(reduction))
        if has_denominator and reduction != "mean":
            raise error("denominator", reduction=repr(reduction))
        if implementation is not None and implementation not in IMPLEMENTATIONS:
            known = ", ".join(repr(name) for name in IMPLEMENTATIONS)
            raise error("implementation", given=repr(implementation), known=known)
        return LossOptions(
            smoothing=float(smoothing) if is_number(smoothing) else smoothing,
            convention=convention,
            ignore_index=ignore_index,
            z_loss=z_loss,
            softcap=softcap,
            subtract_entropy=subtract_entropy,
            bad_labels=bad_labels,
            reduction=reduction,
            implementation=implementation or IMPLEMENTATIONS[0],
        )
