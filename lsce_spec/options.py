"""The options that are fixed for a call, checked once, frozen, and read by every implementation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lsce_spec.checks import check_denominator, check_flag, check_smoothing, is_integral, is_number
from lsce_spec.conventions import UNIFORM, Convention, find_convention
from lsce_spec.errors import error, refused
from lsce_spec.hints import for_choice

# The names are stated once, as types, for type checkers and editors.

# The implementations that both packages have. The kernels of each package have names there.
Implementation = Literal["fused", "reference"]
# The implementations of the linear losses that both packages have.
LinearImplementation = Literal["chunked", "reference"]
# What a loss returns: a loss for each row, their sum, or their mean.
Reduction = Literal["none", "sum", "mean"]
# What a label outside the classes does: make loss and gradient NaN, or raise an error.
BadLabels = Literal["nan", "raise"]

# The names of `Implementation`, in order.
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)
# The names of `LinearImplementation`, in order.
LINEAR_IMPLEMENTATIONS: tuple[LinearImplementation, ...] = get_args(LinearImplementation)
# The names of `Reduction` and of `BadLabels`.
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
BAD_LABELS: tuple[BadLabels, ...] = get_args(BadLabels)


@dataclass(frozen=True)
class LossOptions:
    """The options of a call other than its arrays. See `label_smoothed_cross_entropy` for the meaning of each.

    Without arguments it is plain cross-entropy, row by row. `smoothing` is a number, or an array that the framework
    package checks further. Without an `implementation` the package chooses one.
    """

    smoothing: Any = 0.0
    convention: Convention = UNIFORM
    ignore_index: int | None = None
    z_loss: float = 0.0
    softcap: float | None = None
    subtract_entropy: bool = False
    bad_labels: BadLabels = BAD_LABELS[0]
    reduction: Reduction = REDUCTIONS[0]
    implementation: str | None = None

    @staticmethod
    def of(keywords: Mapping[str, Any], implementations: tuple[str, ...] = IMPLEMENTATIONS) -> "LossOptions":
        """Check the keyword arguments of a loss and return its options.

        Args:
            keywords: the arguments, which may lack `denominator`.
            implementations: the names that the caller may choose from.

        Raises:
            ValueError: a value out of its range, or two options that exclude each other.
            TypeError: a value of the wrong type.
        """
        smoothing, ignore_index, softcap = (keywords[name] for name in ("smoothing", "ignore_index", "softcap"))
        check_smoothing(smoothing)
        convention = find_convention(keywords["convention"])
        if keywords["prior"] is not None and convention is not UNIFORM:
            raise error("prior_convention", given=repr(convention.name))
        if ignore_index is not None and not _is_int32(ignore_index):
            raise refused("ignore_index", "ignore_index", ignore_index, wrong_type=not is_integral(ignore_index))
        _check_terms(keywords["z_loss"], softcap, keywords["subtract_entropy"], convention)
        _check_choice("bad_labels", keywords["bad_labels"], BAD_LABELS)
        _check_choice("reduction", keywords["reduction"], REDUCTIONS)
        if keywords.get("denominator") is not None and keywords["reduction"] != "mean":
            raise error("denominator", reduction=repr(keywords["reduction"]))
        check_denominator(keywords.get("denominator"))
        implementation = keywords["implementation"]
        if implementation is not None:
            _check_choice("implementation", implementation, implementations)
        return LossOptions(
            smoothing=float(smoothing) if is_number(smoothing) else smoothing,
            convention=convention,
            ignore_index=None if ignore_index is None else int(ignore_index),
            z_loss=float(keywords["z_loss"]),
            softcap=None if softcap is None else float(softcap),
            subtract_entropy=keywords["subtract_entropy"],
            bad_labels=keywords["bad_labels"],
            reduction=keywords["reduction"],
            implementation=implementation,
        )


def _check_terms(z_loss: Any, softcap: Any, subtract_entropy: Any, convention: Convention) -> None:
    if not is_number(z_loss) or not 0 <= z_loss < math.inf:
        raise refused("non_negative_number", "z_loss", z_loss, wrong_type=not is_number(z_loss))
    if softcap is not None and (not is_number(softcap) or not 0 < softcap < math.inf):
        raise refused("softcap", "softcap", softcap, wrong_type=not is_number(softcap))
    check_flag("subtract_entropy", subtract_entropy)
    if subtract_entropy and convention.at_max is not None:
        raise error("entropy_at_max", given=repr(convention.name))


def _check_choice(name: str, given: Any, known: tuple[str, ...]) -> None:
    wrong_type = not isinstance(given, str)
    if wrong_type or given not in known:
        names = ", ".join(repr(choice) for choice in known)
        raise refused(name, name, given, wrong_type=wrong_type, known=names, hint=for_choice(name, given, known))


@dataclass(frozen=True)
class ChunkOptions:
    """How the linear loss goes through its rows. See `linear_label_smoothed_cross_entropy` for the meaning of each."""

    chunk_size: int | None = None
    recompute: bool = False
    gradient_filter: float = 0.0

    @staticmethod
    def of(keywords: Mapping[str, Any], options: LossOptions, *, differentiable: bool = False) -> "ChunkOptions":
        """Check the keyword arguments of a linear loss and return how it goes through its rows.

        Args:
            keywords: the arguments.
            options: the checked options of the loss.
            differentiable: whether gradients flow through the statistics.

        Raises:
            ValueError: a value out of its range, or two options that exclude each other.
            TypeError: a value of the wrong type.
        """
        given = {name: keywords[name] for name in ("chunk_size", "recompute", "gradient_filter")}
        chunk_size, recompute, gradient_filter = given.values()
        if chunk_size is not None and (not is_integral(chunk_size) or chunk_size < 1):
            raise refused("chunk_size", "chunk_size", chunk_size, wrong_type=not is_integral(chunk_size))
        if recompute is not None:
            check_flag("recompute", recompute)
        by_row = options.reduction == "none"
        if recompute is False and by_row:
            raise error("recompute_none")
        if recompute is False and differentiable:
            raise error("differentiable_recompute")
        if not is_number(gradient_filter) or not 0 <= gradient_filter < 1:
            wrong_type = not is_number(gradient_filter)
            raise refused("gradient_filter", "gradient_filter", gradient_filter, wrong_type=wrong_type)
        if options.implementation == "reference":
            for name, value in (given | {"gradient_filter": gradient_filter or None}).items():
                if value is not None:
                    raise error("chunked_only", name=name, given=repr(value))
        recompute = by_row or differentiable if recompute is None else recompute
        if gradient_filter and recompute:
            raise error("filter_recompute")
        return ChunkOptions(None if chunk_size is None else int(chunk_size), recompute, float(gradient_filter))

    def rows_at_most(self, preferred: int, num_classes: int) -> int:
        """Return the number of rows of a chunk.

        With few classes a chunk has 2^20 logits, so that the cost of starting one does not show.
        """
        return self.chunk_size or max(preferred, 2**20 // num_classes)


def _is_int32(value: object) -> bool:
    return is_integral(value) and -(2**31) <= int(value) < 2**31  # type: ignore[call-overload]  # numbers.Integral
