"""Conventions of label smoothing: what the target holds at the label and elsewhere.

A convention is the pair (on, off) as a function of the smoothing and the number of classes. Nothing else about
the loss depends on it, so the pair is all that the fast implementations ever see.

The functions use arithmetic operators and, for `clamp`, the `clip` method that NumPy, JAX and torch arrays share.
So one definition serves Python floats, 50-digit numbers, traced arrays and tensors, and derivatives pass through.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lsce_spec.checks import check_class_num, check_smoothing
from lsce_spec.errors import error, refused
from lsce_spec.hints import for_choice

# A Python float, an mpmath number or an array of either framework: whatever has arithmetic operators.
Number = Any
# The names of the conventions below, in their order.
ConventionName = Literal["uniform", "non_target", "clamp", "max_sup"]


@dataclass(frozen=True)
class Convention:
    """One way to spread the smoothing over the classes.

    Args:
        name: what error messages and tables call it.
        on: function (smoothing, num_classes) -> target at the label.
        off: function (smoothing, num_classes) -> target at every other class.
        soft: function (probabilities, smoothing, num_classes) -> target for soft labels. Without it the
            probabilities are interpolated, off + (on - off) * probabilities, which gives (on, off) for a one-hot row.
        at_max: function (smoothing, num_classes) -> what is added to the target where the largest logit is, shared
            alike among the largest if there are several. A constant to the gradient, as the rest of the target is.

    The functions are called with two or more classes; one class has nothing to spread over.

    Example: the convention of CoinCheung/pytorch-loss, whose targets sum to 1 - e/K:
        >>> leaky = Convention("leaky", on=lambda e, k: 1 - e, off=lambda e, k: e / k)
        >>> smoothing_weights(leaky, 0.1, 10)
        (0.9, 0.01)
    """

    name: str
    on: Callable[[Number, Number], Number]
    off: Callable[[Number, Number], Number]
    soft: Callable[[Number, Number, Number], Number] | None = None
    at_max: Callable[[Number, Number], Number] | None = None

    def __post_init__(self) -> None:
        """Raise unless the functions are functions."""
        arguments = {"on": "(smoothing, num_classes)", "off": "(smoothing, num_classes)"}
        if self.soft is not None:
            arguments["soft"] = "(probabilities, smoothing, num_classes)"
        if self.at_max is not None:
            arguments["at_max"] = "(smoothing, num_classes)"
        for name, expected in arguments.items():
            if not callable(getattr(self, name)):
                raise error("convention_functions", name=name, arguments=expected, given=repr(getattr(self, name)))

    def soft_target(self, probabilities: Number, smoothing: Number, num_classes: Number) -> Number:
        """Return the smoothed target for soft labels, element by element."""
        if self.soft is not None:
            return self.soft(probabilities, smoothing, num_classes)
        off = self.off(smoothing, num_classes)
        return off + (self.on(smoothing, num_classes) - off) * probabilities


def _at_most(value: Number, high: Number) -> Number:
    if _is_scalar(value):
        # Not `min`, which torch 2.9 compiles for symbolic numbers into a condition that never holds.
        return high if high < value else value
    return value.clip(max=high)


def _clip(value: Number, low: Number, high: Number) -> Number:
    """Limit `value` to [low, high], `high` winning where the two cross."""
    # In two steps, since one bound may be a number and the other an array.
    return min(max(value, low), high) if _is_scalar(value) else value.clip(min=low).clip(max=high)


def _is_scalar(value: Number) -> bool:
    # The types first: torch.compile cannot ask a symbolic number for its attributes.
    return isinstance(value, (int, float)) or not hasattr(value, "clip")


# The smoothing is spread over all classes, the label included. The default.
UNIFORM = Convention(
    "uniform",
    on=lambda smoothing, num_classes: 1 - smoothing + smoothing / num_classes,
    off=lambda smoothing, num_classes: smoothing / num_classes,
    # Not the interpolation of the default: on - off is 1 - e only up to rounding.
    soft=lambda probabilities, smoothing, num_classes: (1 - smoothing) * probabilities + smoothing / num_classes,
)

# The smoothing is spread over the other classes.
NON_TARGET = Convention(
    "non_target",
    on=lambda smoothing, num_classes: 1 - smoothing,
    off=lambda smoothing, num_classes: smoothing / (num_classes - 1),
    soft=lambda probabilities, smoothing, num_classes: (
        (1 - smoothing) * probabilities + smoothing * (1 - probabilities) / (num_classes - 1)
    ),
)

# The one-hot target, clamped to [e/(K-1), 1-e].
CLAMP = Convention(
    "clamp",
    # e/(K-1) never exceeds 1, so clamping a 1 always ends at the upper bound.
    on=lambda smoothing, num_classes: 1 - smoothing,
    off=lambda smoothing, num_classes: _at_most(smoothing / (num_classes - 1), 1 - smoothing),
    soft=lambda probabilities, smoothing, num_classes: _clip(
        probabilities, smoothing / (num_classes - 1), 1 - smoothing
    ),
)

# With a target of 1 at the label, e/K added everywhere and e taken away at the largest logit,
#   - sum q_k log p_k = lse - z_y + e (max z - mean z)

# Max Suppression, which takes the smoothing from the largest logit.
MAX_SUP = Convention(
    "max_sup",
    on=lambda smoothing, num_classes: 1 + smoothing / num_classes,
    off=lambda smoothing, num_classes: smoothing / num_classes,
    soft=lambda probabilities, smoothing, num_classes: probabilities + smoothing / num_classes,
    at_max=lambda smoothing, num_classes: -smoothing,
)

# The conventions that have a name, by name.
CONVENTIONS: dict[str, Convention] = dict(
    zip(get_args(ConventionName), (UNIFORM, NON_TARGET, CLAMP, MAX_SUP), strict=True)
)


def find_convention(convention: ConventionName | Convention) -> Convention:
    """Return the convention of that name, or the object itself."""
    if isinstance(convention, Convention):
        return convention
    known = ", ".join(repr(name) for name in CONVENTIONS)
    if not isinstance(convention, str):
        raise refused("convention_type", "convention", convention, wrong_type=True, known=known)
    if convention not in CONVENTIONS:
        hint = for_choice("convention", convention, CONVENTIONS)
        raise error("convention_name", given=repr(convention), known=known, hint=hint)
    return CONVENTIONS[convention]


def smoothing_weights(
    convention: ConventionName | Convention, smoothing: Number, num_classes: int
) -> tuple[Number, Number]:
    """Return (on, off): the target at the label and at every other class.

    Args:
        convention: "uniform", "non_target", "clamp", "max_sup" or a `Convention`. What a convention adds at the largest
            logit (`Convention.at_max`) is in neither of the two.
        smoothing: number in [0, 1], or an array of numbers.
        num_classes: number of classes, at least 1.

    Returns:
        The pair: numbers, or arrays for an array of smoothings. The numbers (1.0, 0.0) for a single class, which
        leaves nothing to spread over.

    Raises:
        ValueError: smoothing outside [0, 1], unknown convention, or no class.
        TypeError: convention is neither a name nor a `Convention`.

    Example: the worked example of the README, 0.1 spread over the four other classes of five.
        >>> smoothing_weights("non_target", 0.1, 5)
        (0.9, 0.025)
        >>> smoothing_weights("uniform", 0.1, 5)
        (0.92, 0.02)

    References:
        uniform: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, section 7.
        non_target: Vaswani et al., "Attention Is All You Need", 2017, as in the tensor2tensor and fairseq code.
        max_sup: Zhou et al., "MaxSup: Overcoming Representation Collapse in Label Smoothing", 2025.
    """
    convention = find_convention(convention)
    check_smoothing(smoothing)
    check_class_num(num_classes, name="num_classes")
    if num_classes == 1:
        return 1.0, 0.0
    return convention.on(smoothing, num_classes), convention.off(smoothing, num_classes)
