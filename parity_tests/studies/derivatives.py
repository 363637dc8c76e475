"""Is a gradient the derivative of its own values? And if not, which line cuts it?

The values f are computed along a random direction, at 0, +-h and +-2h. The slope of the gradient in that direction may
differ from D(h) = (f(h) - f(-h)) / 2h by

    8 (|D(2h) - D(h)| + noise / h) + |2 S(h) - S(2h)| / 2 + slack,    S(h) = (f(h) - 2 f(0) + f(-h)) / h

The first term is the truncation error. `noise` is what rounding explains of f, and `slack` of the slope. The term with
S is half the jump of the derivative at a corner, where any slope between both sides is right. h = (64 u)^(1/3) makes
the rounding of f and the truncation error alike.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity_tests.losses.cuts import Cut, watched
from parity_tests.losses.models import Given, Model, Result
from parity_tests.studies.layer_arithmetic import as_float64, changed, named, room_for_rounding
from parity_tests.studies.sameness import FARTHER, ROUNDINGS, Runs, in_dtype
from parity_tests.studies.verdicts import attempt
from parity_tests.truth.comparison import AnyResult
from parity_tests.truth.precision import FORMATS

# The operands of a loss, by the part of its result that is the gradient with respect to them.
_OPERANDS = {"gradient": "logits", "hidden": "hidden", "weight": "weight", "bias": "bias"}


class Stencil:
    """The values around a point in one direction.

    Args:
        value: returns the values at a distance.
        dtype: the dtype that they are computed in.
        noise: what rounding explains of a value.
    """

    def __init__(self, value: Callable[[float], float], dtype: str, noise: float) -> None:
        """Compute the values."""
        step = float((ROUNDINGS * FORMATS[dtype].roundoff) ** (1 / 3))
        below, low, middle, high, above = (value(times * step) for times in (-2, -1, 0, 1, 2))
        self.derivative, far = (high - low) / (2 * step), (above - below) / (4 * step)
        corner = 2 * (high - 2 * middle + low) / step - (above - 2 * middle + below) / (2 * step)
        self.allowed = FARTHER * (abs(far - self.derivative) + noise / step) + abs(corner) / 2

    def may_be(self, slope: float, slack: float) -> bool:
        """Return whether a slope may be the derivative; where either is NaN, nothing is said."""
        return not abs(slope - self.derivative) > self.allowed + slack


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
        is_derivative = _check_of_loss(runs, values, i, result)
        if not is_derivative(result):
            return find_cause(partial(_rerun_loss, runs, i, is_derivative))
    return None


def _check_of_loss(runs: Runs, values: Runs, i: int, result: AnyResult) -> Callable[[AnyResult], bool]:
    """Return what tells whether the gradient of a result of case i is the derivative."""
    case, generator = in_dtype(runs.cases[i], runs.dtype), np.random.default_rng(i)
    parts = [part for part in result.parts if part in _OPERANDS]
    directions = {part: generator.choice([-1.0, 1.0], size=result.parts[part].shape) for part in parts}
    upstream = np.asarray(1.0 if case.upstream is None else case.upstream)

    def value(distance: float) -> float:
        moved = {_OPERANDS[part]: getattr(case, _OPERANDS[part]) + distance * directions[part] for part in parts}
        found = attempt(values.adapter, replace(case, **moved))
        return float("nan") if isinstance(found, str) else float((found.parts["loss"] * upstream).sum())

    bounds = runs.allowed_to_differ(i, FORMATS[runs.precision].roundoff)
    slack = sum(float(bounds[part].sum()) for part in parts)
    stencil = Stencil(value, runs.precision, float((bounds["loss"] * np.abs(upstream)).sum()))

    def is_derivative(result: AnyResult) -> bool:
        return stencil.may_be(sum(float((result.parts[part] * directions[part]).sum()) for part in parts), slack)

    return is_derivative


def _rerun_loss(
    runs: Runs, i: int, is_derivative: Callable[[AnyResult], bool], undone: Iterable[Cut]
) -> tuple[bool, list[Cut]]:
    with watched(runs.adapter.framework, frozenset(undone)) as seen:
        result = attempt(runs.adapter, in_dtype(runs.cases[i], runs.dtype))
    return not isinstance(result, str) and is_derivative(result), list(seen)


def cause_of_layer(model: Model, key: str, given: Given, replicas: int, random: np.random.Generator) -> Cause | None:
    """Return why the gradient of a layer alone is not the derivative of what it computes in float64; None if it is.

    Args:
        model: the model.
        key: the call of the layer.
        given: what it is given.
        replicas: as in `room_for_rounding`.
        random: as there.
    """
    weights = model.run(key, given, "float64").weight_gradients
    given = as_float64(replace(given, weights={name: model.tensors[name] for name in weights}))
    children = {child: child for child in given.child_outputs}

    def run(given: Given) -> Result:
        return model.run(key, given, "float64")

    room = room_for_rounding(lambda given: named(run(given), children), given, "float64", replicas, random)
    noise, slack = (max(value for (way, _), value in room.items() if way == one) for one in ("forward", "backward"))
    seeds = [*given.output_gradients, *chain(*(given.child_input_gradients[child] for child in children))]

    def moved(distance: float) -> Given:
        generator = np.random.default_rng(0)
        found = changed(given, lambda values: values + distance * generator.choice([-1.0, 1.0], size=values.shape))
        return replace(given, inputs=found.inputs, child_outputs=found.child_outputs, weights=found.weights)

    def value(distance: float) -> float:
        result = run(moved(distance))
        values = [*result.outputs, *chain(*(result.child_inputs[child] for child in children))]
        return sum(float((seed * each).sum()) for seed, each in zip(seeds, values, strict=True) if seed is not None)

    size = sum(float(np.abs(seed).sum()) for seed in seeds if seed is not None)
    stencil = Stencil(value, "float64", noise * size)

    def is_derivative(result: Result) -> bool:
        of_children = chain(*(result.child_output_gradients[child] for child in children))
        gradients = [*result.input_gradients, *of_children, *(result.weight_gradients[name] for name in weights)]
        operands = zip(gradients, _operands(given), _operands(moved(1.0)), strict=True)
        known = [(gradient, ahead - here) for gradient, here, ahead in operands if gradient is not None]
        slope = sum(float((gradient * direction).sum()) for gradient, direction in known)
        return stencil.may_be(slope, slack * sum(direction.size for _, direction in known))

    def rerun(undone: Iterable[Cut]) -> tuple[bool, list[Cut]]:
        model.forget_programs()
        with watched(model.framework, frozenset(undone)) as seen:
            result = run(given)
        model.forget_programs()
        return is_derivative(result), list(seen)

    return None if is_derivative(run(given)) else find_cause(rerun)


def _operands(given: Given) -> list[NDArray[Any]]:
    return [*given.inputs, *chain(*given.child_outputs.values()), *given.weights.values()]


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
