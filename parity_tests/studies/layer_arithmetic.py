"""How far two runs of one layer are apart, as shares of what rounding explains, and what explains the rest.

The yardstick is the layer itself, as in `trainings/stepwise.py`. *Replicas* of the layer run with every number that it
is given, weights and gradients too, moved up or down by one unit in the last place, at random:

    envelope = largest |replica - layer|, over replicas and elements of one result
    floor    = u (ceil(log2 n) + 2) times the largest element of the result; n, the size of the largest operand,
               bounds the number of terms in any sum
    allowed  = 2 (envelope + floor)

u is the unit roundoff of the narrowest dtype in which a layer computes anything; of the two layers, the smaller one.

In float64, `allowed` is 4096 times that. Formulas that lose digits, such as E[x^2] - E[x]^2 for the variance, are then
still the same function, while a difference far below the rounding of float32 is none.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from parity_tests.losses.models import Arrays, Given, Gradients, Result
from parity_tests.truth.arithmetic import FULL
from parity_tests.truth.precision import FORMATS, FloatArray

Direction = Literal["forward", "backward"]
Key = tuple[Direction, str]
Named = dict[Key, NDArray[Any]]
Run = Callable[..., Named]

# How much more two ways to compute the same function may differ in float64.
SLACK = 2.0**12
# What matrix products may do to the operands, by the significant bits that they keep.
PASSES = {
    8: "matrix products in one bfloat16 pass",
    11: "matrix products in TF32",
    16: "matrix products in three bfloat16 passes",
}


@dataclass(frozen=True)
class Part:
    """One result of a layer in both models, by its element with the largest share.

    Args:
        direction: "forward" or "backward".
        what: name of the result, such as "output" or "gradient of the input".
        index: of the element, in the layout of the first model.
        first, second: its values in both models.
        exact_first, exact_second: those of the float64 runs; None without.
        share: of what rounding explains; above 1 the models part here.
        is_function: whether the float64 runs part: these are different functions.
        off: the sides that are farther from their own float64 run than rounding explains: "A", "B" or "AB".
        reordered: whether the float64 runs hold the same numbers in another order.
    """

    direction: Direction
    what: str
    index: tuple[int, ...]
    first: float
    second: float
    exact_first: float | None
    exact_second: float | None
    share: float
    is_function: bool
    off: str
    reordered: bool


def named(result: Result, children: Mapping[str, str]) -> Named:
    """Return the results of a layer by direction and name, in the order of forward and backward pass.

    Args:
        result: of the layer alone.
        children: keys of the calls within, and the names to show for them.
    """
    found: dict[Key, NDArray[Any] | None] = {}
    for child, name in children.items():
        found.update(_numbered("forward", f"input of {name}", result.child_inputs[child]))
    found.update(_numbered("forward", "output", result.outputs))
    for child, name in reversed(list(children.items())):
        found.update(_numbered("backward", f"gradient of the output of {name}", result.child_output_gradients[child]))
    found.update(_numbered("backward", "gradient of the input", result.input_gradients))
    for name, gradient in result.weight_gradients.items():
        found["backward", f"gradient of {name}"] = gradient
    return {key: values for key, values in found.items() if values is not None and values.size}


def _numbered(direction: Direction, what: str, arrays: Gradients | Arrays) -> Iterator[tuple[Key, NDArray[Any] | None]]:
    for number, array in enumerate(arrays):
        yield (direction, what if len(arrays) == 1 else f"{what} {number}"), array


def is_floating(values: NDArray[Any]) -> bool:
    """Return whether an array holds floating-point numbers."""
    return values.dtype.name in FORMATS


def as_float64(given: Given) -> Given:
    """Return the same numbers in float64."""
    return changed(given, lambda values: values.astype(np.float64))


def room_for_rounding(
    run: Run, given: Given, dtype: str, replicas: int, random: np.random.Generator
) -> dict[Key, float]:
    """Return envelope + floor of each result; see the module.

    Args:
        run: runs the layer on what it is given.
        given: that.
        dtype: the narrowest in which it computes.
        replicas: number of runs with everything moved.
        random: generator of the directions.
    """
    results = run(given)
    moved = [run(changed(given, lambda values: _moved(values, dtype, random))) for _ in range(replicas)]
    depth = math.ceil(math.log2(max(2, *(array.size for array in _arrays(given))))) + 2
    room = {}
    for key, values in results.items():
        envelope = max(float(np.max(distance(replica[key], values))) for replica in moved)
        finite = np.abs(values[np.isfinite(values)].astype(np.float64)) if is_floating(values) else np.zeros(0)
        room[key] = envelope + FORMATS[dtype].roundoff * depth * float(np.max(finite, initial=0.0))
    return room


def _arrays(given: Given) -> Iterator[NDArray[Any]]:
    for arrays in (given.inputs, *given.child_outputs.values(), [*given.weights.values()]):
        yield from arrays
    for gradients in (given.output_gradients, *given.child_input_gradients.values()):
        yield from (each for each in gradients if each is not None)


def changed(given: Given, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Given:
    """Return the same with all arrays of floating-point numbers changed."""

    def every(arrays: Any) -> Any:
        return [change(array) if array is not None and is_floating(array) else array for array in arrays]

    return Given(
        every(given.inputs),
        {child: every(arrays) for child, arrays in given.child_outputs.items()},
        every(given.output_gradients),
        {child: every(arrays) for child, arrays in given.child_input_gradients.items()},
        dict(zip(given.weights, every(given.weights.values()), strict=True)),
    )


def _moved(values: NDArray[Any], dtype: str, random: np.random.Generator) -> NDArray[Any]:
    """Return numbers moved up or down, at random, by one unit in the last place of a dtype."""
    signs = random.choice([-1.0, 1.0], size=values.shape)
    if values.dtype.name == dtype:
        moved = np.nextafter(values, (signs * np.inf).astype(values.dtype))
    else:
        moved = values.astype(np.float64) * (1 + 2 * FORMATS[dtype].roundoff * signs)
    return np.asarray(np.where(np.isfinite(values), moved, values), values.dtype)


def distance(first: NDArray[Any], second: NDArray[Any]) -> FloatArray:
    """Return |first - second|: 0 between equal infinities, infinite from NaN."""
    one, other = first.astype(np.float64), second.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.where(one == other, 0.0, np.abs(one - other))
    return np.where(np.isnan(difference), np.inf, difference)


def _shares(first: NDArray[Any], second: NDArray[Any], allowed: float) -> FloatArray:
    """Return distance / allowed. Without an allowance that is finite nothing agrees."""
    apart = distance(first, second)
    if not math.isfinite(allowed):
        return np.full(apart.shape, np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(apart == 0, 0.0, apart / allowed)


def part_of(
    key: Key,
    values: tuple[NDArray[Any], NDArray[Any]],
    room: float,
    exact: Sequence[NDArray[Any] | None],
    exact_room: float,
) -> Part:
    """Return how far one result is apart.

    Args:
        key: direction and name of the result.
        values: in both models.
        room: envelope + floor in their dtype.
        exact: the float64 runs of both; None for one without.
        exact_room: envelope + floor in float64.
    """
    shares, is_function, reordered = _shares(*values, 2 * room), False, False
    one, other = exact
    if one is not None and other is not None:
        allowed = 2 * SLACK * exact_room
        of_function = _shares(one, other, allowed)
        is_function = bool(np.max(of_function) > 1)
        shares = np.maximum(shares, of_function)
        reordered = is_function and bool(
            np.max(_shares(np.sort(one, axis=None), np.sort(other, axis=None), allowed)) <= 1
        )
    # A side without a float64 run is held against that of the other.
    true = [
        each for each in (one if one is not None else other, other if other is not None else one) if each is not None
    ]
    off = "".join(
        side for side, result, each in zip("AB", values, true, strict=False) if np.max(_shares(result, each, room)) > 1
    )
    place = tuple(int(index) for index in np.unravel_index(np.argmax(shares), shares.shape))
    return Part(
        *key,
        index=place,
        first=float(values[0][place]),
        second=float(values[1][place]),
        exact_first=None if one is None else float(one[place]),
        exact_second=None if other is None else float(other[place]),
        share=float(shares[place]),
        is_function=is_function,
        off=off,
        reordered=reordered,
    )


def _is_same(result: Named, other: Named, room: Mapping[Key, float]) -> bool:
    return all(np.max(_shares(values, other[key], 2 * room[key])) <= 1 for key, values in result.items())


def explain_by_passes(result: Named, exact: Named, room: Mapping[Key, float], run: Run) -> tuple[str, str] | None:
    """Return which matrix products of fewer bits explain that a layer is far from its float64 run, and why.

    None if none do.

    Args:
        result: of the layer.
        exact: of its float64 run.
        room: envelope + floor of each result.
        run: runs the layer with matrix products that keep `bits` bits of their operands.
    """
    similar = None
    if _is_same(result, run(bits=FULL), room):
        return None
    for bits, name in PASSES.items():
        simulated = run(bits=bits)
        if _is_same(result, simulated, room):
            return name, "a simulation of them has the same results"
        errors = [
            (float(np.max(distance(values, exact[key]))), float(np.max(distance(simulated[key], exact[key]))))
            for key, values in result.items()
            if np.max(_shares(values, exact[key], room[key])) > 1
        ]
        if all(theirs / 2 <= ours <= 2 * theirs for ours, theirs in errors):
            similar = similar or (name, "a simulation of them has errors of that size")
    return similar
