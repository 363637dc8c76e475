"""Is a gradient the derivative of its own values? And if not, which line cuts it?

The values f are computed along a random direction, at 0, +-h and +-2h. The slope of the gradient in that direction may
differ from D(h) = (f(h) - f(-h)) / 2h by

    8 (|D(2h) - D(h)| + |2 S(h) - S(2h)| + noise / h) + slack,    S(h) = (f(h) - 2 f(0) + f(-h)) / h

The first term is the truncation error, the second the jump of the derivative at a corner, where any slope between both
sides is right. `noise` is what rounding explains of f, and `slack` of the slope. h = (64 u)^(1/3) makes the rounding of
f and the truncation error alike.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from parity_tests.losses.cuts import Cut, watched
from parity_tests.studies.sameness import FARTHER, ROUNDINGS, Runs, in_dtype
from parity_tests.studies.verdicts import attempt
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import AnyResult
from parity_tests.truth.precision import FORMATS

# The operands of a loss, by the part of its result that is the gradient with respect to them.
_OPERANDS = {"gradient": "logits", "hidden": "hidden", "weight": "weight", "bias": "bias"}


def step_of(dtype: str) -> float:
    """Return h for a dtype."""
    return float((ROUNDINGS * FORMATS[dtype].roundoff) ** (1 / 3))


def is_slope(value: Callable[[float], float], slope: float, step: float, noise: float, slack: float) -> bool:
    """Return whether a slope may be the derivative of some values at 0; see the module."""
    below, low, middle, high, above = (value(times * step) for times in (-2, -1, 0, 1, 2))
    near, far = (high - low) / (2 * step), (above - below) / (4 * step)
    corner = 2 * (high - 2 * middle + low) / step - (above - 2 * middle + below) / (2 * step)
    allowed = FARTHER * (abs(far - near) + abs(corner) + noise / step) + slack
    return not abs(slope - near) > allowed  # where it is NaN, nothing is said


class Cause(NamedTuple):
    """Why a gradient is not the derivative of its values.

    Args:
        cuts: those without which it would be; or else the custom gradients in the code.
        is_custom: whether they are custom gradients.
    """

    cuts: tuple[Cut, ...]
    is_custom: bool

    @property
    def what(self) -> str:
        """The cause, as the end of a sentence."""
        places = "; ".join(map(str, self.cuts))
        if not self.cuts:
            return "a detached factor or a custom gradient, in a place that cannot be traced"
        return f"a custom gradient, {places}" if self.is_custom else f"a factor or term is held constant by {places}"

    @property
    def cure(self) -> str:
        """What to change."""
        names = " and ".join(dict.fromkeys(each.what for each in self.cuts))
        if not self.cuts:
            return "let the backward pass be the derivative of the values"
        if self.is_custom:
            return f"make the backward pass of the {names} the derivative of its values"
        return f"remove the {names} there, or hold the same constant on the other side"


def cause_of_loss(runs: Runs, values: Runs) -> Cause | None:
    """Return why the gradient of a loss is not the derivative of its values; None if it is in every ordinary case.

    Args:
        runs: the loss.
        values: it, or a loss with the same values that can be run where it cannot.
    """
    for i in runs.ordinary:
        result = runs.results[i]
        if isinstance(result, str) or isinstance(values.results[i], str):
            continue
        if not _is_derivative(runs, values, i, result):
            return _explain(runs, values, i)
    return None


def _is_derivative(runs: Runs, values: Runs, i: int, result: AnyResult) -> bool:
    case, generator = in_dtype(runs.cases[i], runs.dtype), np.random.default_rng(i)
    directions = {part: generator.choice([-1.0, 1.0], size=result.parts[part].shape) for part in _gradients(result)}
    upstream = np.asarray(1.0 if case.upstream is None else case.upstream)

    def value(distance: float) -> float:
        moved = {
            _OPERANDS[part]: getattr(case, _OPERANDS[part]) + distance * direction
            for part, direction in directions.items()
        }
        found = attempt(values.adapter, replace(case, **moved))
        return float("nan") if isinstance(found, str) else float((found.parts["loss"] * upstream).sum())

    bounds = runs.allowed_to_differ(i, FORMATS[runs.precision].roundoff)
    slope = sum(float((result.parts[part] * direction).sum()) for part, direction in directions.items())
    slack = sum(float(bounds[part].sum()) for part in directions)
    noise = float((bounds["loss"] * np.abs(upstream)).sum())
    return is_slope(value, slope, step_of(runs.precision), noise, slack)


def _gradients(result: AnyResult) -> list[str]:
    return [part for part in result.parts if part in _OPERANDS]


def _explain(runs: Runs, values: Runs, i: int) -> Cause:
    case: Case = in_dtype(runs.cases[i], runs.dtype)

    def run(undone: Iterable[Cut]) -> tuple[bool, list[Cut]]:
        """Return whether the gradient is the derivative without some cuts, and all cuts."""
        with watched(runs.adapter.framework, frozenset(undone)) as seen:
            result = attempt(runs.adapter, case)
        return not isinstance(result, str) and _is_derivative(runs, values, i, result), list(seen)

    return find_cause(run)


def find_cause(run: Callable[[Iterable[Cut]], tuple[bool, list[Cut]]]) -> Cause:
    """Return the fewest cuts without which a gradient is the derivative, or else the custom gradients.

    Args:
        run: returns whether the gradient is the derivative without some cuts, and all cuts.
    """
    _, seen = run(())
    kept = [cut for cut in seen if not cut.is_custom]
    if not kept or not run(kept)[0]:
        # A function with a custom gradient may also be called by its own forward pass.
        return Cause(tuple({cut.what: cut for cut in reversed(seen) if cut.is_custom}.values())[::-1], is_custom=True)
    for cut in list(kept):
        fewer = [each for each in kept if each != cut]
        if run(fewer)[0]:
            kept = fewer
    return Cause(tuple(kept), is_custom=False)
