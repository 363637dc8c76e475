"""Compares two losses, values and gradients, and names the known difference between them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, repeat
from typing import Any, NamedTuple

import numpy as np

from parity_tests.faults.linear import BANK
from parity_tests.losses.adapters import Adapter
from parity_tests.studies.diagnosis import (
    ARITHMETIC,
    AS_STATED,
    Candidate,
    Diagnosis,
    Explanation,
    departures,
    faults_as_candidates,
    plain_candidates,
)
from parity_tests.studies.survey import Member, Survey
from parity_tests.studies.verdicts import Difference, Outcome, attempt, compare_outcomes, judge
from parity_tests.truth.cases import Case, LinearCase, random_case
from parity_tests.truth.comparison import AnyResult, Parts, bounds_of, within
from parity_tests.truth.linear_cases import all_case_names, make_any_case, with_logits
from parity_tests.truth.oracle import Truth, solve
from parity_tests.truth.precision import FloatArray, round_to

# With one number of rows, a sum divided by a constant would pass as the mean. JAX compiles for each shape, so only
# "spread" has other numbers of rows: 13 with the first number of classes, 1 with the second.
NUM_ROWS = 7
OTHER_NUM_ROWS = (13, 1)
NUM_CLASSES = (2, 10, 130)
# How many of many findings are named.
SHOWN = 5
# Cases that many losses do not handle. If nothing explains a loss, it is diagnosed again without these cases.
EDGES = frozenset({"large logits", "large offset", "minus infinity", "small loss", "all ignored"})


@dataclass(frozen=True)
class Question:
    """The computation expected of both losses; the options are those of `label_smoothed_cross_entropy`.

    Args:
        smoothing: the smoothing that both were given, or have built in.
        convention: the expected convention; None for that of the first loss, if both are a user's.
        reduction: the expected reduction of a loss that returns a scalar: "mean" or "sum".
        num_classes: numbers of classes to try.
        ignore_index, z_loss, softcap, subtract_entropy: other options that both were given.
        linear: whether both take a linear layer, (hidden, weight, labels), and not (logits, labels).
        chosen: whether the user chose any of these; if not, the first loss is the reference.
    """

    smoothing: float = 0.1
    convention: str | None = None
    reduction: str = "mean"
    num_classes: tuple[int, ...] = NUM_CLASSES
    ignore_index: int | None = None
    z_loss: float = 0.0
    softcap: float | None = None
    subtract_entropy: bool = False
    linear: bool = False
    chosen: bool = False


def plain_cases(question: Question, dtype: str) -> list[Case]:
    """Return cases of logits [N, K], or hidden [N, D] and weight, with only the options of the question."""
    options = {name: getattr(question, name) for name in ("ignore_index", "z_loss", "softcap", "subtract_entropy")}
    options = {name: value for name, value in options.items() if value}
    if question.ignore_index is not None:
        options["ignore_index"] = question.ignore_index
    cases = []
    for num_classes, num_spread in zip(question.num_classes, chain(OTHER_NUM_ROWS, repeat(NUM_ROWS)), strict=False):
        generator = np.random.default_rng(num_classes)
        for name, logits, labels in _inputs(generator, num_classes, question, dtype):
            rows = slice(num_spread if name == "spread" else NUM_ROWS)
            case = random_case(dtype, generator, rows.stop, num_classes, labels=labels[rows], options=dict(options))
            case = replace(case, logits=round_to(logits[rows], dtype), smoothing=question.smoothing)
            if question.linear and not np.isfinite(logits).all():
                continue
            case = _in_layer(case, generator) if question.linear else case
            cases.append(replace(case, name=f"{name}, N = {rows.stop}, K = {num_classes}"))
    return cases


def _in_layer(case: Case, generator: np.random.Generator) -> LinearCase:
    """Return a linear case with the logits of a case, up to rounding: the weight is a random rotation."""
    rotation, _ = np.linalg.qr(generator.normal(size=(case.num_classes, case.num_classes)))
    hidden, weight = round_to(case.logits @ rotation.T, case.dtype), round_to(rotation, case.dtype)
    given: dict[str, Any] = {each.name: getattr(case, each.name) for each in fields(case)}
    layer: dict[str, Any] = {"hidden": hidden, "weight": weight, "weight_dtype": case.dtype, "chunk_size": 3}
    return with_logits(LinearCase(**given, **layer))


def _inputs(
    generator: np.random.Generator, num_classes: int, question: Question, dtype: str
) -> Iterator[tuple[str, FloatArray, Any]]:
    most_rows = max(NUM_ROWS, *OTHER_NUM_ROWS)
    labels = generator.integers(num_classes, size=most_rows)
    rows = np.arange(most_rows)
    normal = generator.normal(size=(most_rows, num_classes))
    kept = labels.copy()
    if question.ignore_index is not None:
        kept[1::3] = question.ignore_index
        yield "all ignored", normal, np.full(most_rows, question.ignore_index)
    yield "plain", 2 * normal, kept
    yield "spread", 10 * normal, kept
    yield "near uniform", 0.05 * normal, kept
    optimum = np.full((most_rows, num_classes), np.log(question.smoothing / num_classes + 1e-3))
    optimum[rows, labels] = np.log(1 - question.smoothing + question.smoothing / num_classes + 1e-3)
    yield "near the optimum", optimum + 0.01 * normal, kept
    yield "ties", np.round(normal), kept
    yield "large logits", 1e4 * normal, kept
    yield "large offset", normal + (1e6 if dtype == "float64" else 1e3), kept
    small = 0.1 * normal
    small[rows, labels] = 20
    yield "small loss", small, kept
    infinite = 2 * normal
    infinite[rows[:3], (labels[:3] + 1) % num_classes] = -np.inf
    yield "minus infinity", infinite, kept


def is_edge(case: Case) -> bool:
    """Return whether many losses do not handle a case of `plain_cases`."""
    return case.name.partition(",")[0] in EDGES


@dataclass(frozen=True)
class Side:
    """One of the two losses.

    Args:
        adapter: the loss.
        reduction: the reduction that it returns, "none" or "mean"; None if it takes the reduction from the case.
    """

    adapter: Adapter
    reduction: str | None = None


@dataclass(frozen=True)
class SideReading:
    """The diagnosis of one of the losses.

    Args:
        name: name of the loss.
        explanations: the known losses that explain its results, the best first; empty if there is none.
        mutants: differences of the best explanation from the definition, by the names of the mutant bank.
        others: mutants that these cases do not tell apart from the best explanation.
        only_ordinary: whether the explanation leaves out the edge cases.
        gave_results: whether it gave a result in any case.
    """

    name: str
    explanations: list[Explanation]
    mutants: list[str]
    others: list[str]
    only_ordinary: bool
    gave_results: bool

    @property
    def computes(self) -> str:
        """The diagnosis as text."""
        if not self.gave_results:
            return "nothing that can be compared"
        if not self.explanations:
            return "no loss that is known here"
        best = self.explanations[0]
        closeness = "" if best.exact else ", but for roundings elsewhere"
        where = "; in the edge cases something else" if self.only_ordinary else ""
        return f"{best.candidate}{closeness}{where}"

    def lines(self) -> list[str]:
        """Return the findings in lines."""
        found = [f"computes: {self.computes}"]
        if self.mutants:
            found.append(f"known difference: {', '.join(self.mutants)}")
            found += [f"    {name}: {BANK[name]}" for name in self.mutants if name in BANK]
        if self.others:
            found.append(f"cannot be told from, in these cases: {', '.join(self.others)}")
        return found


@dataclass(frozen=True)
class Pair:
    """The comparison of two losses.

    Args:
        definition: the loss that the true values and the bounds belong to.
        chosen: whether the user chose the definition; otherwise it is that of the first loss.
        known: whether one of the losses is the definition, or the user chose it.
        readings: the diagnosis of each loss.
        survey: comparisons of both with the truth, and with each other.
        cases: what both were compared in.
    """

    definition: Candidate
    chosen: bool
    known: bool
    readings: tuple[SideReading, SideReading]
    survey: Survey
    cases: list[Case]

    @property
    def agrees(self) -> bool:
        """Whether both gave results in every case, and these agree with each other and with a chosen definition."""
        if self.chosen and any(reading.mutants or not reading.explanations for reading in self.readings):
            return False
        if self.with_nan:
            return False
        failed = any(outcome.status == "failed" for outcome in self.survey.outcomes)
        return not failed and bool(self.survey.differences) and all(each.agrees for each in self.survey.differences)

    @property
    def with_nan(self) -> list[str]:
        """The cases in which a loss or gradient is NaN and the true one is not, even if both losses are NaN."""
        return [
            f"{outcome.adapter} in {outcome.case}"
            for outcome in self.survey.outcomes
            if outcome.comparison
            and outcome.comparison.worst
            and outcome.comparison.worst.true is not None
            and np.isnan(outcome.comparison.worst.value)
            and not np.isnan(outcome.comparison.worst.true)
        ]

    @property
    def silent(self) -> list[str]:
        """The losses that gave no result in any case."""
        return [reading.name for reading in self.readings if not reading.gave_results]

    def part_agrees(self, part: str) -> bool:
        """Whether the losses ("loss") or all gradients ("gradient") agree wherever both gave results."""
        return all(getattr(each.comparison, part) <= 1 for each in self.survey.differences)

    @property
    def judged(self) -> Survey:
        """The survey, without comparisons with a truth that is not that of these losses."""
        return self.survey if self.known else replace(self.survey, outcomes=[])

    def off(self, difference: Difference) -> str:
        """Return which of the two is wrong in the case of a difference; empty if it is not known what is right."""
        if not self.known:
            return ""
        key = difference.case, difference.dtype
        outcomes = [each for each in self.survey.outcomes if (each.case, each.dtype) == key]
        wrong = [letter for letter, each in zip("AB", outcomes, strict=False) if each.status == "disagree"]
        if len(wrong) == 1:
            return f"{wrong[0]} is off"
        return "both are off" if wrong else "each is within its own bounds"

    def troubles(self) -> list[str]:
        """Return sentences on failures and NaN."""
        outcomes = self.survey.outcomes
        failures = Counter(("AB"[i % 2], each.reason) for i, each in enumerate(outcomes) if each.status == "failed")
        found = [
            f"{letter} failed in {count} of {len(outcomes) // 2} cases: {reason}"
            for (letter, reason), count in failures.items()
        ]
        if self.with_nan:
            more = f" and {len(self.with_nan) - SHOWN} more" if len(self.with_nan) > SHOWN else ""
            found.append(f"NaN where there is none: {'; '.join(self.with_nan[:SHOWN])}{more}")
        return found

    def notes(self) -> list[str]:
        """Return the findings in sentences."""
        sides = zip("AB", self.readings, strict=True)
        return [f"{letter}: {each.name} {'; '.join(each.lines())}" for letter, each in sides] + self.troubles()


def compare_sides(first: Side, second: Side, question: Question, dtypes: Sequence[str]) -> Pair:
    """Compare two losses with each other and with the truth, and diagnose each.

    Losses that take all options are compared in every named case, others in plain cases.
    """
    sides = (first, second)
    plain = any(side.reduction is not None for side in sides)
    cases = [case for dtype in dtypes for case in (plain_cases(question, dtype) if plain else _named_cases(dtype))]
    cases = [case for case in cases if not any(side.adapter.unsupported(case) for side in sides)]
    # If both take dense and linear cases, such as a fault and the oracle, the dense cases are enough.
    cases = [case for case in cases if not isinstance(case, LinearCase)] or cases
    expected = AS_STATED
    linear = any(isinstance(case, LinearCase) for case in cases)
    candidates = faults_as_candidates(linear)
    if plain:
        rows = all(side.reduction in ("none", None) for side in sides)
        reductions = ["none"] if rows else [question.reduction, *({"mean", "sum"} - {question.reduction})]
        expected = Candidate(question.convention or "uniform", reductions[0], question.subtract_entropy)
        candidates = plain_candidates(reductions, question.smoothing, linear)
        cases = [expected.apply(case) for case in cases]
    attempts = [[attempt(side.adapter, case) for case in cases] for side in sides]
    diagnosed = _diagnose(cases, attempts, expected, candidates)
    definition = expected
    known = True
    if not question.chosen and all(side.reduction is not None for side in sides):
        found = _definition(diagnosed)
        definition, known = found or expected, found is not None
    readings = [_read(side.adapter.name, found, definition) for side, found in zip(sides, diagnosed, strict=True)]
    cases = [definition.apply(case) for case in cases]
    judged = _judge(sides, cases, attempts, scaled=not known)
    return Pair(definition, question.chosen, known, (readings[0], readings[1]), judged, cases)


def _named_cases(dtype: str) -> list[Case]:
    return [make_any_case(name, dtype) for name in all_case_names() if name != "wide"]


class _Diagnosed(NamedTuple):
    """The explanations of the results of one side."""

    explanations: list[Explanation]
    only_ordinary: bool
    gave_results: bool


def _diagnose(
    cases: list[Case], attempts: list[list[AnyResult | str]], expected: Candidate, candidates: list[Candidate]
) -> list[_Diagnosed]:
    """Explain each side in the cases with a result. Without an exact explanation, try again without edge cases."""
    diagnosis = Diagnosis(cases, candidates)

    def explain(results: list[AnyResult | str], ordinary: bool) -> list[Explanation]:
        given = [
            None if isinstance(result, str) or (ordinary and is_edge(case)) else result
            for case, result in zip(cases, results, strict=True)
        ]
        return diagnosis.explain(given, expected) if any(given) else []

    found = []
    for results in attempts:
        everywhere = explain(results, ordinary=False)
        gave_results = any(not isinstance(result, str) for result in results)
        if everywhere and everywhere[0].exact:
            found.append(_Diagnosed(everywhere, False, gave_results))
            continue
        ordinary = explain(results, ordinary=True)
        better = bool(ordinary) and (ordinary[0].exact or not everywhere)
        found.append(_Diagnosed(ordinary if better else everywhere, better, gave_results))
    return found


def _definition(diagnosed: list[_Diagnosed]) -> Candidate | None:
    """Return the sound loss that explains the first side exactly, or else the second; or None."""
    for explanations, _, _ in diagnosed:
        if explanations and explanations[0].exact and explanations[0].candidate.fault is None:
            return explanations[0].candidate
    return None


def _read(name: str, diagnosed: _Diagnosed, definition: Candidate) -> SideReading:
    if not diagnosed.explanations:
        return SideReading(name, [], [], [], False, diagnosed.gave_results)
    best = diagnosed.explanations[0]
    mutants = departures(best.candidate, definition)
    alike = [departures(each.candidate, definition) for each in diagnosed.explanations if each.exact == best.exact]
    others = {names[0] for names in alike if len(names) == 1 and names != mutants}
    return SideReading(name, diagnosed.explanations, mutants, sorted(others), diagnosed.only_ordinary, True)


def _judge(sides: tuple[Side, Side], cases: list[Case], attempts: list[list[AnyResult | str]], scaled: bool) -> Survey:
    """Compare both results with the truth and with each other.

    If neither is a known loss (`scaled`), the definition is not the truth, and its bounds are scaled to the size of
    their results, since an error that is small relative to the definition may be large relative to them.

    The cases may have another convention or reduction now than when the losses were called. A user's loss was given
    neither, and if the other loss takes them, they have not changed.
    """
    first, second = sides[0].adapter, sides[1].adapter
    members = {adapter.name: Member(adapter, True) for adapter in (first, second)}
    outcomes: list[Outcome] = []
    differences = []
    for case, *attempted in zip(cases, *attempts, strict=True):
        truth = solve(case)
        pair = (judge(first, case, truth, attempted[0]), judge(second, case, truth, attempted[1]))
        outcomes += pair
        difference = compare_outcomes(case, truth, pair, (first, second))
        if difference and scaled and pair[0].result and pair[1].result:
            bounds = _scaled_bounds(case, truth, pair[0].result)
            comparison = within(case, truth, pair[0].result, bounds, pair[1].result)
            worst = replace(comparison.worst, true=None) if comparison.worst else None
            difference = replace(difference, comparison=replace(comparison, worst=worst), blame=None)
        differences += [difference] if difference else []
    return Survey(members, outcomes, differences)


def _scaled_bounds(case: Case, truth: Truth, result: AnyResult) -> Parts:

    def scale(values: FloatArray, true: FloatArray) -> float:
        sizes = [float(np.max(np.abs(each[np.isfinite(each)]), initial=0.0)) for each in (values, true)]
        return sizes[0] / sizes[1] if sizes[1] else 1.0

    bounds, right = bounds_of(case, truth, ARITHMETIC), truth.parts
    return {part: 2 * scale(result.parts[part], right[part].high) * bound for part, bound in bounds.items()}
