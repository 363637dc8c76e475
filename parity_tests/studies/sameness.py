"""Are two losses the same function? And is each as accurate in the dtype of a training?

No oracle is needed. Both losses run in float64 on the same inputs. There two ports of one formula differ by roundings
of 1e-16, and the smallest mistake by far more: a focal exponent of 2.1 for 2 by 1e-2. What rounding explains is
measured on the losses themselves: each runs again with its logits moved by one rounding step, of themselves and of
their exponentials, a few times with random signs; and as often with the result of every operation moved, forward and
backward (`losses/noisy.py`). An element may differ by

    8 (moved_A + moved_B) + 64 u (size_A + size_B),    size = max(|value|, typical value of the case's shape)

where u is the roundoff, and moved the largest change in these reruns. Where a loss jumps, as a hinge does at its
corner, an element is moved by as much as its typical value; there nothing can be said, and the element is left out.

Three finer points:

- A loss may hold constants in float32, such as 0.1. Two losses that differ in float64, but by no more than constants
  in float32 explain, are the same function in float32 and below: 8 moved + 64 u |value| with the u of float32.
- A loss may convert its logits to float32 itself. Its float64 results for logits rounded to float32 are equal to the
  bit to those for the logits. Then u is that of float32 in the formula above.
- With a large u the formula allows large differences. If more than 1e-3 of the typical value is allowed, a mistake of
  1 % may hide, and there is no verdict.

Whether a loss is as accurate as the other is a second question. The results in the training's dtype are compared with
the loss's own in float64, as shares of the formula above with 8 u, and the errors of the device's exp, log, log1p and
tanh, for 64 u. A loss is less accurate than the other if its share is above 4 and eight times that of the other. Two
losses that round in the same rough way agree.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from parity_tests.losses.adapters import Adapter
from parity_tests.losses.noisy import noisy
from parity_tests.studies.verdicts import Difference, attempt
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.cases import Case, LinearCase
from parity_tests.truth.comparison import AnyResult, Parts, error_over_bound, exactly, within
from parity_tests.truth.precision import FORMATS, FloatArray, compute_dtype, round_to

# How often a loss runs again with moved logits, and how many times as far as in these runs rounding may move it:
# random signs reach a third to a half of what the worst signs do.
RERUNS = 4
FARTHER = 8
# How far noise moves the result of an operation at most, in units of the roundoff.
NOISE = 4
# Roundings of a loss's operations, in units of the roundoff: for the function, and for its accuracy.
ROUNDINGS, FEW_ROUNDINGS = 64, 8
# The largest share of a typical value that may be allowed: one tenth of a mistake of 1 %.
FINE = 1e-3
# An element that moves by this share of a typical value jumps.
JUMP = 1e-2
# A loss is less accurate than another if its error is this many times as large, and this many times what rounding
# explains: a loss that rounds each of its operations to bfloat16 reaches 3. Bounds of the truth are those of an
# accurate implementation, and a plain one exceeds them by tens.
LESS_ACCURATE = 8
ROUGH, ROUGH_BY_TRUTH = 4.0, 100.0
# From wide to narrow.
PRECISIONS = ("float64", "float32", "float16", "bfloat16")
CONSTANTS = "but for constants that are rounded to float32"
# Cases that show the dtype that a loss computes in.
PROBES = 3


class Runs:
    """The results of a loss in some cases in a wide dtype, and how far rounding may move them.

    Args:
        adapter: the loss.
        cases: the cases; their logits are numbers of the dtype of the case, and of the wide one.
        is_ordinary: whether typical values are taken from a case.
        dtype: the wide dtype, "float64" if the loss takes it.
    """

    def __init__(
        self, adapter: Adapter, cases: Sequence[Case], is_ordinary: Callable[[Case], bool], dtype: str = "float64"
    ) -> None:
        """Run the loss in every case."""
        self.adapter, self.cases, self.dtype = adapter, cases, dtype
        self.ordinary = [i for i, case in enumerate(cases) if is_ordinary(case)]
        self.results = [attempt(adapter, in_dtype(case, dtype)) for case in cases]
        self._moved: dict[tuple[int, float], Parts] = {}
        self._typical: dict[int, dict[str, float]] = {}
        self._noise: dict[int, Parts] = {}

    @property
    def gave_results(self) -> bool:
        """Whether any case has a result."""
        return any(not isinstance(result, str) for result in self.results)

    def is_random(self) -> bool:
        """Return whether a second call gives another result in any ordinary case: in a few rows it may be the same."""
        ran = (i for i in self.ordinary if not isinstance(self.results[i], str))
        return any(not _equal(self.results[i], self._again(i, _operand(self.cases[i]))) for i in ran)

    @cached_property
    def precision(self) -> str:
        """The dtype that the loss computes in: the narrowest in which it takes its logits without a change."""
        found = self.dtype
        for dtype in PRECISIONS[PRECISIONS.index(self.dtype) + 1 :]:
            if all(self._ignores_rounding(i, dtype) for i in self.ordinary[:PROBES]):
                found = dtype
        return found

    def _ignores_rounding(self, i: int, dtype: str) -> bool:
        # Thirds use every bit of the wide dtype.
        full = round_to(_operand(self.cases[i]) / 3, self.dtype)
        return self.has_numbers(i) and _equal(self._again(i, full), self._again(i, round_to(full, dtype)))

    def moved(self, i: int, roundoff: float) -> Parts:
        """Return the largest change of each element in case i when its logits move by a rounding step."""
        if (i, roundoff) not in self._moved:
            self._moved[i, roundoff] = self._move(i, roundoff)
        return self._moved[i, roundoff]

    def _move(self, i: int, roundoff: float) -> Parts:
        operand = _operand(self.cases[i])
        generator = np.random.default_rng(i)
        again = []
        for _ in range(RERUNS):
            step = 2 * roundoff * generator.choice([-1.0, 1.0], size=operand.shape)
            with np.errstate(invalid="ignore"):
                # A step of the logit itself, and one of its exponential.
                stepped = np.where(np.isfinite(operand), operand + step * (np.abs(operand) + 1), operand)
            again.append(self._again(i, round_to(stepped, self.dtype)))
        return self._largest(i, again)

    def noise(self, i: int, roundoff: float) -> Parts:
        """Return the largest change of each element in case i when the loss's operations are off by a rounding step.

        It is found for the roundoff of the dtype that the loss computes in, and scaled.
        """
        own = FORMATS[self.precision].roundoff
        if i not in self._noise:
            self._noise[i] = self._make_noise(i, NOISE * own)
        return {part: values * (roundoff / own) for part, values in self._noise[i].items()}

    def _make_noise(self, i: int, step: float) -> Parts:
        try:
            call = noisy(self.adapter, in_dtype(self.cases[i], self.dtype))
            again = [call(step, seed) for seed in range(RERUNS)] if call else []
        except (Exception, SystemExit):  # a loss of the user's, which takes no tensors with noise
            again = []
        return self._largest(i, again)

    def _largest(self, i: int, results: Iterable[AnyResult | str]) -> Parts:
        """Return the largest distance of some results from that of case i; NaN counts as none."""
        first = self.result(i).parts
        largest = {part: np.zeros_like(values) for part, values in first.items()}
        for result in results:
            for part, values in {} if isinstance(result, str) else result.parts.items():
                with np.errstate(invalid="ignore"):
                    largest[part] = np.fmax(largest[part], np.abs(values - first[part]))
        return largest

    def _again(self, i: int, operand: FloatArray) -> AnyResult | str:
        return attempt(self.adapter, _with_operand(in_dtype(self.cases[i], self.dtype), operand))

    def result(self, i: int) -> AnyResult:
        """Return the result in case i, which must have one."""
        result = self.results[i]
        if isinstance(result, str):
            raise ValueError(f"{self.adapter.name} has no result in {self.cases[i].name}: {result}")
        return result

    def has_numbers(self, i: int) -> bool:
        """Return whether any element of the losses of case i is finite."""
        result = self.results[i]
        return not isinstance(result, str) and bool(np.isfinite(result.parts["loss"]).any())

    def typical(self, i: int) -> dict[str, float]:
        """Return the typical size of each part with as many classes as case i has.

        That is the median of the losses, and of the largest gradient of each row, in the ordinary cases.
        """
        num_classes = self.cases[i].num_classes
        if num_classes not in self._typical:
            sizes: dict[str, list[FloatArray]] = {}
            for j in (j for j in self.ordinary if self.cases[j].num_classes == num_classes):
                result = self.results[j]
                for part, values in {} if isinstance(result, str) else result.parts.items():
                    rows = np.abs(values) if part == "loss" else np.max(np.abs(values), axis=-1, initial=0.0)
                    sizes.setdefault(part, []).append(rows[np.isfinite(rows) & (rows > 0)].ravel())
            joined = {part: np.concatenate(rows) for part, rows in sizes.items()}
            self._typical[num_classes] = {part: float(np.median(each)) for part, each in joined.items() if each.size}
        return self._typical[num_classes]

    def allowed_in(self, i: int, dtype: str, arithmetic: Arithmetic) -> dict[str, FloatArray]:
        """Return how far results in a dtype may be from those in the wide one, element by element in case i."""
        roundoff = FORMATS[dtype].roundoff
        functions = arithmetic.exp + arithmetic.log + arithmetic.log1p + arithmetic.tanh
        # The functions of a narrow dtype are computed in float32.
        return self._allowed(
            i,
            self.moved(i, roundoff),
            FEW_ROUNDINGS * roundoff + functions * FORMATS[compute_dtype(dtype)].roundoff,
        )

    def allowed_to_differ(self, i: int, roundoff: float) -> dict[str, FloatArray]:
        """Return how far another loss that is the same function may be in case i; infinity where the loss jumps."""
        moved = self.moved(i, roundoff)
        # Below float32 noise explains anything.
        if roundoff <= FORMATS["float32"].roundoff:
            noise = self.noise(i, roundoff)
            moved = {part: np.fmax(values, noise[part]) for part, values in moved.items()}
        return self._allowed(i, moved, ROUNDINGS * roundoff)

    def _allowed(self, i: int, moved: Parts, share: float) -> dict[str, FloatArray]:
        typical = self.typical(i)
        found = {}
        for part, values in self.result(i).parts.items():
            size = np.maximum(np.abs(values), typical.get(part, 0.0))
            bound = FARTHER * moved[part] + share * np.where(np.isfinite(size), size, 0.0)
            found[part] = np.where(moved[part] > JUMP * size, np.inf, bound)
        return found

    def allowed_constants(self, i: int) -> dict[str, FloatArray]:
        """Return how far constants in float32 may move each element in case i."""
        roundoff = FORMATS["float32"].roundoff
        moved = self.moved(i, roundoff)
        return {
            part: FARTHER * moved[part] + ROUNDINGS * roundoff * np.where(np.isfinite(values), np.abs(values), 0.0)
            for part, values in self.result(i).parts.items()
        }


class RecordedRuns(Runs):
    """The runs of a loss on another machine, which cannot be run again.

    Args:
        adapter: stands for the loss: its name and arithmetic.
        cases, is_ordinary, dtype: as in `Runs`.
        results: the results in every case, or what was raised.
        moved: the largest changes when the logits move, by case and roundoff.
        noise: those when the results of operations move, by case, for the roundoff of the dtype it computes in.
        precision: the dtype that it computes in.
        random: whether a second call gave another result.
    """

    def __init__(
        self,
        adapter: Adapter,
        cases: Sequence[Case],
        is_ordinary: Callable[[Case], bool],
        dtype: str,
        *,
        results: list[AnyResult | str],
        moved: dict[tuple[int, float], Parts],
        noise: dict[int, Parts],
        precision: str,
        random: bool,
    ) -> None:
        """Take what was recorded."""
        self.adapter, self.cases, self.dtype, self.results = adapter, cases, dtype, results
        self.ordinary = [i for i, case in enumerate(cases) if is_ordinary(case)]
        self._moved, self._noise, self._typical = moved, noise, {}
        self.__dict__["precision"] = precision  # in place of what `Runs` finds by running
        self._random = random

    def is_random(self) -> bool:
        """Return whether a second call gave another result."""
        return self._random


def _operand(case: Case) -> FloatArray:
    return case.hidden if isinstance(case, LinearCase) else case.logits


def in_dtype(case: Case, dtype: str) -> Case:
    """Return a case with operands of a dtype."""
    if isinstance(case, LinearCase):
        return replace(case, dtype=dtype, weight_dtype=dtype)
    return replace(case, dtype=dtype)


def _with_operand(case: Case, operand: FloatArray) -> Case:
    return replace(case, hidden=operand) if isinstance(case, LinearCase) else replace(case, logits=operand)


def _equal(first: AnyResult | str, second: AnyResult | str) -> bool:
    if isinstance(first, str) or isinstance(second, str):
        return False
    return all(np.array_equal(values, second.parts[part], equal_nan=True) for part, values in first.parts.items())


# --- The same function? -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sameness:
    """Whether two losses are the same function.

    Args:
        same: whether they are; None if it cannot be said.
        why: what they agree to, or why it cannot be said.
        dtype: the dtype in which both ran.
        precisions: the dtypes that they compute in when they are given that one.
        differences: one for each case in which both gave a result, in that dtype.
        sees: the smallest difference that would have been seen, as a share of a typical value.
        left_out: how many elements were left out because a loss jumps there.
        constants: whether they are the same only but for constants in float32.
        random: "A" or "B", if that one is random; else empty.
    """

    same: bool | None
    why: str
    dtype: str = "float64"
    precisions: tuple[str, str] = ("float64", "float64")
    differences: tuple[Difference, ...] = ()
    sees: float = 0.0
    left_out: int = 0
    constants: bool = False
    random: str = ""


def are_the_same(first: Runs, second: Runs) -> Sameness:
    """Return whether two losses are the same function in the cases in which both ran, with the same wide dtype."""
    runs, results = (first, second), (first.results, second.results)
    for letter, each in zip("AB", runs, strict=True):
        if each.is_random():
            why = f"{letter} is random: two calls with the same inputs differ"
            return Sameness(None, why, first.dtype, random=letter)
        if not any(each.has_numbers(i) for i in each.ordinary):
            return Sameness(None, f"{letter} has no finite loss in any ordinary case", first.dtype)
    precisions = (first.precision, second.precision)
    narrow = max(precisions, key=PRECISIONS.index)
    both = [i for i in range(len(first.cases)) if not any(isinstance(each.results[i], str) for each in runs)]
    if not any(i in first.ordinary and first.has_numbers(i) and second.has_numbers(i) for i in both):
        return Sameness(None, "no ordinary case has a finite loss of both", first.dtype, precisions)
    roundoff = FORMATS[narrow].roundoff
    bounds = {i: _sum(*(each.allowed_to_differ(i, roundoff) for each in runs)) for i in both}
    differences, why = _compare(runs, results, bounds, first.dtype), f"to the rounding of {narrow}"
    if narrow == "float64" and not all(each.agrees for each in differences):
        of_constants = {i: _sum(*(each.allowed_constants(i) for each in runs)) for i in both}
        looser = {i: _sum(bounds[i], of_constants[i]) for i in both}
        compared = _compare(runs, results, looser, first.dtype)
        # Where constants explain how the values differ, a difference of the gradients alone is left to be shown.
        apart = any(each.comparison.loss > 1 for each in differences)
        if all(each.agrees or (apart and each.comparison.loss <= 1) for each in compared):
            bounds, differences, why = looser, compared, CONSTANTS
    same: bool | None = all(each.agrees for each in differences)
    constants = bool(same) and why == CONSTANTS
    sees, left_out = _power(first, bounds)
    if same and sees > FINE:
        same, why = None, f"the rounding of {narrow} explains differences of up to {sees:.1g} of a typical value"
    why = "" if same is False else why
    return Sameness(same, why, first.dtype, precisions, tuple(differences), sees, left_out, constants)


def _sum(first: Parts, second: Parts) -> dict[str, FloatArray]:
    return {part: values + second[part] for part, values in first.items()}


def _compare(
    runs: tuple[Runs, Runs],
    results: tuple[Sequence[AnyResult | str], Sequence[AnyResult | str]],
    bounds: Mapping[int, Parts],
    dtype: str,
) -> list[Difference]:
    """Compare the results of two losses in the cases that have bounds."""
    names = (runs[0].adapter.name, runs[1].adapter.name)
    found = []
    for i, allowed in bounds.items():
        case, first, second = replace(runs[0].cases[i], dtype=dtype), results[0][i], results[1][i]
        if not isinstance(first, str) and not isinstance(second, str):
            comparison = within(case, None, first, allowed, second)
            found.append(Difference(case.name, dtype, names, comparison, None))
    return found


def _power(runs: Runs, bounds: dict[int, dict[str, FloatArray]]) -> tuple[float, int]:
    """Return the smallest difference that is seen in half of the elements of every part, and how many jump.

    The first is a share of a typical value, in the ordinary case in which it is largest; infinity where most jump.
    """
    sees, left_out = 0.0, 0
    for i, allowed in bounds.items():
        typical = runs.typical(i)
        for part, bound in allowed.items():
            left_out += int(np.isinf(bound).sum())
            if i in runs.ordinary and typical.get(part):
                sees = max(sees, float(np.median(bound)) / typical[part])
    return sees, left_out


# --- As accurate? -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy:
    """How accurate two losses that are the same function are in a dtype.

    Args:
        dtype: the dtype.
        errors: the largest error of each, as a share of what rounding explains.
        worst: the cases of these errors.
        differences: one for each case in which both gave a result.
        rough: the share from which on a loss may be less accurate than the other.
    """

    dtype: str
    errors: tuple[float, float]
    worst: tuple[str, str]
    differences: tuple[Difference, ...]
    rough: float = ROUGH

    @property
    def alike(self) -> bool:
        """Whether neither loss is less accurate than the other."""
        return not self.less_accurate

    @property
    def less_accurate(self) -> str:
        """The letter of the loss that is less accurate than the other; empty if neither is."""
        for letter, (own, other) in zip("AB", (self.errors, self.errors[::-1]), strict=True):
            if own > max(self.rough, LESS_ACCURATE * other):
                return letter
        return ""


def compare_accuracy(
    runs: tuple[Runs, Runs],
    results: tuple[Sequence[AnyResult | str], Sequence[AnyResult | str]],
    dtype: str,
    arithmetic: tuple[Arithmetic, Arithmetic],
) -> Accuracy:
    """Return how accurate two losses are in a dtype, as measured by their own results in the wide dtype.

    Args:
        runs: both losses in the wide dtype.
        results: of both in the dtype of each case, case by case.
        dtype: the dtype.
        arithmetic: the accuracy of the elementary functions of each.
    """
    accurate = [each.precision == each.dtype for each in runs]
    both = [
        i
        for i, case in enumerate(runs[0].cases)
        if case.dtype == dtype
        and not any(isinstance(each[i], str) for each in (*results, *(of.results for of in runs)))
    ]
    errors, worst = [0.0, 0.0], ["", ""]
    allowed = {
        i: [of.allowed_in(i, dtype, accuracy) for of, accuracy in zip(runs, arithmetic, strict=True)] for i in both
    }
    for i in both:
        # What a loss that computes in a narrow dtype returned in the wide one is no reference for the other.
        references = [runs[side if accurate[side] or not accurate[1 - side] else 1 - side].result(i) for side in (0, 1)]
        shares = [_shares(results[side][i], references[side], allowed[i][side]) for side in (0, 1)]
        for part in shares[0]:
            same_trouble = np.isinf(shares[0][part]) & np.isinf(shares[1][part])
            for side in (0, 1):
                largest = float(np.max(shares[side][part], initial=0.0, where=~same_trouble))
                if largest > errors[side]:
                    errors[side], worst[side] = largest, runs[0].cases[i].name
    found = Accuracy(dtype, (errors[0], errors[1]), (worst[0], worst[1]), ())
    # Losses that are rough alike may differ by as much as both are rough.
    rough = 1.0 if found.less_accurate else max(1.0, *(error for error in errors if np.isfinite(error)))
    bounds = {i: {part: rough * values for part, values in _sum(*allowed[i]).items()} for i in both}
    return replace(found, differences=tuple(_compare(runs, results, bounds, dtype)))


def _shares(result: AnyResult | str, reference: AnyResult, allowed: Parts) -> dict[str, FloatArray]:
    if isinstance(result, str):
        raise TypeError(f"no result: {result}")
    return {
        part: error_over_bound(exactly(reference.parts[part]).error_of(values), allowed[part])
        for part, values in result.parts.items()
    }
