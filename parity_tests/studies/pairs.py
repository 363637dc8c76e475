"""Compares two losses, values and gradients, and names the known difference between them.

Where one of the two is a loss that the harness knows, the results are held against its true values. Where that leaves a
difference, or neither is known, both run in float64: are they the same function, and is each as accurate?
"""

import re
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from parity_tests.faults.linear import describe, is_known
from parity_tests.losses.adapters import Adapter
from parity_tests.losses.user_losses import is_user_loss
from parity_tests.studies.derivatives import Cause, cause_of_loss
from parity_tests.studies.diagnosis import (
    AS_STATED,
    Candidate,
    Diagnosis,
    Explanation,
    departures,
    faults_as_candidates,
    plain_candidates,
)
from parity_tests.studies.probes import Question, is_edge, is_edge_name, plain_cases
from parity_tests.studies.recognition import ENTROPY_SUBTRACTED, Recognised, Sample, recognise
from parity_tests.studies.sameness import (
    ROUGH_BY_TRUTH,
    Accuracy,
    Runs,
    Sameness,
    are_the_same,
    compare_accuracy,
)
from parity_tests.studies.survey import Member, Survey
from parity_tests.studies.verdicts import Difference, Outcome, attempt, compare_outcomes, judge
from parity_tests.texts import count_of, share_text
from parity_tests.truth.cases import CONVENTIONS, Case, LinearCase
from parity_tests.truth.comparison import AnyResult, Result, within
from parity_tests.truth.linear_cases import all_case_names, make_any_case
from parity_tests.truth.oracle import solve

# How many of many findings are named.
SHOWN = 5
# Parameters of a formula that the oracle has, and the relative distance up to which they are those of the question.
OF_ORACLE = {"z-loss": "z_loss", "softcap": "softcap"}
SAME_PARAMETER = 1e-6
# The fault that is the same function, in other roundings. Most losses without smoothing have it, such as
# torch.nn.functional.cross_entropy.
LESS_ACCURATE = "log_for_log1p"


@dataclass(frozen=True)
class Side:
    """One of the two losses.

    Args:
        adapter: the loss.
        reduction: the reduction that it returns, "none", "mean" or "elements"; None if it takes the reduction from the
            case.
        recorded: its runs by wide dtype, if they were recorded; otherwise it is run.
        exact: the loss without the simulated errors of a device, if `adapter` has them; None if it has none.
    """

    adapter: Adapter
    reduction: str | None = None
    recorded: Mapping[str, Runs] = field(default_factory=dict)
    exact: Adapter | None = None


@dataclass(frozen=True)
class Tolerance:
    """What the user allows in place of what rounding explains: two values may differ by atol + rtol |value|."""

    rtol: float
    atol: float

    def __str__(self) -> str:
        """Return the options that set it."""
        return f"--rtol {self.rtol:g} --atol {self.atol:g}"


def make_tolerance(rtol: float | None, atol: float | None) -> Tolerance | None:
    """Return the tolerance of two options, either of which may be missing; None if both are."""
    return None if rtol is None and atol is None else Tolerance(rtol or 0.0, atol or 0.0)


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
        formula: what it computes according to a fit, if that was looked for and found.
    """

    name: str
    explanations: list[Explanation]
    mutants: list[str]
    others: list[str]
    only_ordinary: bool
    gave_results: bool
    formula: Recognised | None = None

    @property
    def is_exact(self) -> bool:
        """Whether rounding explains the distance of its results from the best explanation."""
        return bool(self.explanations) and self.explanations[0].exact

    @property
    def computes(self) -> str:
        """The diagnosis as text."""
        if not self.gave_results:
            return "nothing that can be compared"
        best = self.explanations[0] if self.explanations else None
        if self.formula is not None and (best is None or not best.exact):
            return str(self.formula)
        if best is None:
            return "no formula that is known here"
        closeness = "" if best.exact else ", but for roundings elsewhere"
        where = "; in the edge cases something else" if self.only_ordinary else ""
        return f"{best.candidate}{closeness}{where}"

    def lines(self) -> list[str]:
        """Return the findings in lines."""
        found = [f"computes: {self.computes}"]
        if self.formula is not None:
            found.append(f"evidence: {self.formula.evidence}")
        if self.mutants:
            found.append(f"known difference: {', '.join(self.mutants)}")
            found += [f"    {name}: {describe(name)}" for name in self.mutants if is_known(name)]
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
        survey: comparisons with the truth, if it is known, and of the two losses with each other.
        cases: what both were compared in.
        failures: of both losses, what they raised and in how many cases.
        sameness: whether they are the same function; None if the true values settle it, or if it was not asked.
        accuracy: for each dtype how accurate they are, if they are the same function.
        tolerance: what the user allows in place of what rounding explains.
        strict: whether one of the two is a loss of the harness: the bounds then decide, and the dtypes count.
        not_derivatives: why the gradient of a side is not the derivative of its values, by its letter. It is asked if
            only the gradients differ, and no known mistake explains that.
    """

    definition: Candidate
    chosen: bool
    known: bool
    readings: tuple[SideReading, SideReading]
    survey: Survey
    cases: list[Case]
    failures: tuple[Counter[str], Counter[str]]
    sameness: Sameness | None = None
    accuracy: tuple[Accuracy, ...] = ()
    tolerance: Tolerance | None = None
    strict: bool = False
    not_derivatives: Mapping[str, Cause] = field(default_factory=dict)

    @property
    def agrees(self) -> bool | None:
        """Whether both gave results in every case, and these agree with each other and with a chosen definition.

        None if it cannot be said.
        """
        if self.silent or (self.sameness is not None and self.sameness.random):
            return None
        if self.chosen and any(reading.mutants or not reading.explanations for reading in self.readings):
            return False
        if self.with_nan or any(self.failures):
            return False
        if self.within_bounds or self.sameness is None or self.tolerance or (self.strict and self.known):
            return self.within_bounds
        if self.sameness.same is not True:
            # Where the truth is known, its bounds have told them apart.
            return False if self.known else self.sameness.same
        return all(each.alike for each in self.accuracy)

    @property
    def within_bounds(self) -> bool:
        """Whether the two are within the sum of their bounds of each other, or within the tolerance, in every case."""
        settled = self.known or self.tolerance is not None
        differences = self.survey.differences
        return settled and bool(differences) and all(each.agrees for each in differences)

    @property
    def verdict(self) -> str:
        """The verdict in a word or two."""
        return {True: "AGREE", False: "DISAGREE", None: "NO VERDICT"}[self.agrees]

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

    def part_agrees(self, part: str) -> bool | None:
        """Whether the losses ("loss") or all gradients ("gradient") agree wherever both gave results; None: nowhere."""
        if not self.survey.differences:
            return None
        return all(getattr(each.comparison, part) <= 1 for each in self.survey.differences)

    @property
    def only_gradients(self) -> bool:
        """Whether only gradients differ in the ordinary cases, and no known mistake explains that exactly."""
        ordinary = [each.comparison for each in self.survey.differences if not is_edge_name(each.case)]
        unknown = not any(each.mutants and each.is_exact for each in self.readings)
        return unknown and all(each.loss <= 1 for each in ordinary) and any(each.gradient > 1 for each in ordinary)

    @property
    def apart(self) -> int:
        """In how many cases the two differ, one has no result, or one is NaN and should not be."""
        troubled = {each.partition(" in ")[2] for each in self.with_nan}
        return len(self.cases) - sum(each.agrees and each.case not in troubled for each in self.survey.differences)

    @property
    def reference(self) -> str:
        """The letter of the loss that is taken as right.

        It is the one whose gradient is the derivative of its values, one of the harness, or else the first that fits.
        """
        if len(self.not_derivatives) == 1:
            return "B" if "A" in self.not_derivatives else "A"
        fitting = [
            (is_user_loss(reading.name), letter)
            for letter, reading in zip("AB", self.readings, strict=True)
            if reading.explanations and not reading.mutants
        ]
        return min(fitting)[1] if self.known and fitting else "A"

    def off(self, difference: Difference) -> str:
        """Return which of the two is wrong in the case of a difference; empty if it is not known what is right."""
        key = difference.case, difference.dtype
        outcomes = [each for each in self.survey.outcomes if (each.case, each.dtype) == key]
        if not outcomes:
            return ""
        wrong = [letter for letter, each in zip("AB", outcomes, strict=False) if each.status == "disagree"]
        if len(wrong) == 1:
            return f"{wrong[0]} is off"
        return "both are off" if wrong else "each is within its own bounds"

    @property
    def formula_differences(self) -> list[tuple[str, str, str]]:
        """What differs in the formulas of the two, if both are known: name, of A, of B."""
        formulas = [reading.formula for reading in self.readings]
        first, second = ({} if formula is None else formula.facts() for formula in formulas)
        if not first or not second:
            return []
        names = dict.fromkeys((*first, *second))
        return [
            (name, first.get(name, "-"), second.get(name, "-")) for name in names if first.get(name) != second.get(name)
        ]

    def troubles(self) -> list[str]:
        """Return sentences on failures and NaN."""
        found = [
            f"{letter} failed in {count} of {count_of(len(self.cases), 'case')}: {reason}"
            for letter, reasons in zip("AB", self.failures, strict=True)
            for reason, count in reasons.items()
        ]
        if self.with_nan:
            more = f" and {len(self.with_nan) - SHOWN} more" if len(self.with_nan) > SHOWN else ""
            found.append(f"NaN where there is none: {'; '.join(self.with_nan[:SHOWN])}{more}")
        return found

    def functions(self) -> list[str]:
        """Return sentences on whether the two are the same function, and as accurate."""
        found = []
        same = self.sameness
        if same is not None:
            found.append(f"function: {_function_text(same)}")
            found += [
                f"    {letter} computes in {precision}, whatever it is given"
                for letter, precision in zip("AB", same.precisions, strict=True)
                if precision != same.dtype
            ]
        found += [f"accuracy in {each.dtype}: {_accuracy_text(each)}" for each in self.accuracy]
        return found + [
            f"gradient of {letter}: not that of its values: {each.what}"
            for letter, each in self.not_derivatives.items()
        ]

    def notes(self) -> list[str]:
        """Return the findings in sentences."""
        sides = zip("AB", self.readings, strict=True)
        readings = [f"{letter}: {each.name} {'; '.join(each.lines())}" for letter, each in sides]
        formulas = [f"they differ: {name}: A {first} | B {second}" for name, first, second in self.formula_differences]
        return [*readings, *formulas, *self.functions(), *self.troubles()]


def _function_text(same: Sameness) -> str:
    left_out = f"; {same.left_out} values left out, where a loss jumps" if same.left_out else ""
    if same.same is None:
        return f"cannot be said: {same.why}"
    if same.same:
        return (
            f"the same, {same.why}; a difference of {same.sees:.0e} of a typical value would have been seen{left_out}"
        )
    apart = [each for each in same.differences if not each.agrees]
    edges = all(is_edge_name(each.case) for each in apart)
    return f"DIFFERENT, also in {same.dtype}" + ("; in the ordinary cases the same" if edges else "") + left_out


def _accuracy_text(each: Accuracy) -> str:
    first, second = map(share_text, each.errors)
    errors = f"errors of up to {first} (A) and {second} (B) times what rounding explains"
    if each.alike:
        return f"alike, {errors}"
    side = "AB".index(each.less_accurate)
    return f"{each.less_accurate} is less accurate, {errors}; worst in {each.worst[side]}"


def compare_sides(
    first: Side,
    second: Side,
    question: Question,
    dtypes: Sequence[str],
    tolerance: Tolerance | None = None,
    announce: Callable[[str], None] = lambda text: None,
    batches: Sequence[Case] = (),
) -> Pair:
    """Compare two losses with each other and with the truth, and diagnose each.

    Losses that take all options are compared in every named case, others in plain cases; or all in given batches.

    Args:
        first: one loss.
        second: the other.
        question: what is expected of them, and in which cases they are compared.
        dtypes: the dtypes of the cases.
        tolerance: what is allowed in place of what rounding explains.
        announce: called with each stage and its number, before it starts.
        batches: the cases, if the user gave their own.
    """
    sides = (first, second)
    plain = any(side.reduction is not None for side in sides)
    drawn = (case for dtype in dtypes for case in (plain_cases(question, dtype) if plain else _named_cases(dtype)))
    cases = list(batches) or list(drawn)
    cases = [case for case in cases if not any(side.adapter.unsupported(case) for side in sides)]
    # If both take dense and linear cases, such as a fault and the oracle, the dense cases are enough.
    cases = [case for case in cases if not isinstance(case, LinearCase)] or cases
    expected = AS_STATED
    linear = any(isinstance(case, LinearCase) for case in cases)
    candidates = faults_as_candidates(linear)
    if plain:
        rows = all(side.reduction in ("none", "elements", None) for side in sides)
        common = next((side.reduction for side in sides if side.reduction), "none")
        reductions = [common] if rows else [question.reduction, *({"mean", "sum"} - {question.reduction})]
        expected = Candidate(question.convention or "uniform", reductions[0], question.subtract_entropy)
        candidates = plain_candidates(reductions, question.smoothing, linear) if question.has_oracle else []
        cases = [expected.apply(case) for case in cases]
    # At most: both losses, what they compute, two formulas, float64, two derivatives.
    announce = _numbered(announce, 7 if plain else 2)
    announce(f"running both losses in {count_of(len(cases), 'case')}")
    attempts = [[attempt(side.adapter, case) for case in cases] for side in sides]
    wide = _Wide(sides, cases, announce)
    announce("looking for known losses with these results")
    diagnosed = _diagnose(cases, attempts, expected, candidates)
    if plain and question.has_oracle:
        diagnosed = [wide.recognise(i, found, question) for i, found in enumerate(diagnosed)]
    definition, known = expected, question.has_oracle or question.chosen
    if not question.chosen and all(side.reduction is not None for side in sides):
        found = _definition(diagnosed)
        definition, known = found or expected, found is not None
    cases = [definition.apply(case) for case in cases]
    survey = _judge(sides, cases, attempts, known, tolerance)
    pair = Pair(
        definition=definition,
        chosen=question.chosen,
        known=known,
        readings=_read(sides, diagnosed, definition),
        survey=survey,
        cases=cases,
        failures=_failures(attempts),
        tolerance=tolerance,
        strict=any(side.reduction is None for side in sides),
    )
    if pair.silent or pair.within_bounds or not plain:
        return pair
    return wide.differentiate(wide.examine(pair, question, attempts))


def _numbered(announce: Callable[[str], None], most: int) -> Callable[[str], None]:
    """Return a function that announces the stages of some work with their numbers, of at most so many."""
    numbers = count(1)
    return lambda text: announce(f"stage {next(numbers)} of at most {most}: {text}")


def _named_cases(dtype: str) -> list[Case]:
    return [make_any_case(name, dtype) for name in all_case_names() if name != "wide"]


class _Diagnosed(NamedTuple):
    """The explanations of the results of one side."""

    explanations: list[Explanation]
    only_ordinary: bool
    gave_results: bool
    formula: Recognised | None = None

    @property
    def exact(self) -> bool:
        """Whether a known loss explains the results exactly."""
        return bool(self.explanations) and self.explanations[0].exact


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
        return diagnosis.explain(given, expected) if candidates and any(given) else []

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
    """Return the sound loss that the first side is, or else the second, by its results or its formula; or None."""
    for found in diagnosed:
        if (found.exact or found.formula) and found.explanations:
            best = found.explanations[0].candidate
            if best.fault in (None, LESS_ACCURATE):
                return replace(best, fault=None)
    return None


def _read(
    sides: tuple[Side, Side], diagnosed: list[_Diagnosed], definition: Candidate
) -> tuple[SideReading, SideReading]:
    first, second = (
        _read_side(side.adapter.name, found, definition) for side, found in zip(sides, diagnosed, strict=True)
    )
    return first, second


def _read_side(name: str, diagnosed: _Diagnosed, definition: Candidate) -> SideReading:
    if not diagnosed.explanations:
        return SideReading(name, [], [], [], False, diagnosed.gave_results, diagnosed.formula)
    best = diagnosed.explanations[0]
    mutants = departures(best.candidate, definition)
    alike = [departures(each.candidate, definition) for each in diagnosed.explanations if each.exact == best.exact]
    others = {names[0] for names in alike if len(names) == 1 and names != mutants}
    only_ordinary = diagnosed.only_ordinary
    return SideReading(name, diagnosed.explanations, mutants, sorted(others), only_ordinary, True, diagnosed.formula)


def _judge(
    sides: tuple[Side, Side],
    cases: list[Case],
    attempts: list[list[AnyResult | str]],
    known: bool,
    tolerance: Tolerance | None,
) -> Survey:
    """Compare both results with the truth, if it is known, and with each other.

    The cases may have another convention or reduction now than when the losses were called. A user's loss was given
    neither, and if the other loss takes them, they have not changed.
    """
    first, second = sides[0].adapter, sides[1].adapter
    members = {adapter.name: Member(adapter, True) for adapter in (first, second)}
    outcomes: list[Outcome] = []
    differences: list[Difference | None] = []
    for case, *attempted in zip(cases, *attempts, strict=True):
        if tolerance is None and known:
            truth = solve(case)
            pair = (judge(first, case, truth, attempted[0]), judge(second, case, truth, attempted[1]))
            outcomes += pair
            differences.append(compare_outcomes(case, truth, pair, (first, second)))
        elif tolerance is not None and not any(isinstance(each, str) for each in attempted):
            differences.append(_within_tolerance(case, (first, second), attempted, tolerance))
    return Survey(members, outcomes, [each for each in differences if each])


def _within_tolerance(
    case: Case, adapters: tuple[Adapter, Adapter], results: Sequence[AnyResult | str], tolerance: Tolerance
) -> Difference:
    first, second = (result for result in results if not isinstance(result, str))
    with np.errstate(invalid="ignore"):
        bounds = {
            part: tolerance.atol + tolerance.rtol * np.nan_to_num(np.abs(values), posinf=0.0)
            for part, values in second.parts.items()
        }
    comparison = within(case, None, first, bounds, second)
    return Difference(case.name, case.dtype, (adapters[0].name, adapters[1].name), comparison, None)


def _failures(attempts: list[list[AnyResult | str]]) -> tuple[Counter[str], Counter[str]]:
    """Return what each side raised and how often; messages that differ only in numbers, such as shapes, are one."""
    found: list[Counter[str]] = []
    for results in attempts:
        first_of: dict[str, str] = {}
        reasons = [each for each in results if isinstance(each, str)]
        found.append(Counter(first_of.setdefault(re.sub(r"\d+", "0", each), each) for each in reasons))
    return found[0], found[1]


# --- In float64 -------------------------------------------------------------------------------------------------------


class _Wide:
    """Both losses in float64, each run only when it is needed."""

    def __init__(self, sides: tuple[Side, Side], cases: list[Case], announce: Callable[[str], None]) -> None:
        self.sides, self.cases, self.announce = sides, cases, announce
        self._runs: dict[tuple[int, str], Runs] = {}
        self._formulas: dict[int, Recognised | None] = {}

    def runs(self, i: int, dtype: str) -> Runs:
        """Return the results of one side in a wide dtype."""
        if (i, dtype) not in self._runs:
            side = self.sides[i]
            runs = side.recorded or {
                dtype: Runs(side.exact or side.adapter, self.cases, lambda case: not is_edge(case), dtype)
            }
            self._runs[i, dtype] = runs[dtype]
        return self._runs[i, dtype]

    def dtype(self, i: int) -> str:
        """Return the widest dtype that one side takes: torch's losses take no float64 beside weights in float32."""
        return "float64" if self.runs(i, "float64").gave_results else "float32"

    def formula(self, i: int) -> Recognised | None:
        """Return the formula of one side, if it is found."""
        if i not in self._formulas:
            dtype = self.dtype(i)
            runs = self.runs(i, dtype)
            samples = [
                Sample(runs.cases[j], result)
                for j in runs.ordinary
                if isinstance(result := runs.results[j], Result)
                and runs.cases[j].dtype == runs.cases[0].dtype
                and runs.cases[j].where is None  # the formulas know of no mask
            ]
            self.announce(f"looking for the formula of {'AB'[i]}")
            found = recognise(samples, runs.precision, self.cases[0].smoothing) if samples else None
            self._formulas[i] = found and replace(found, dtype=dtype)
        return self._formulas[i]

    def recognise(self, i: int, diagnosed: _Diagnosed, question: Question) -> _Diagnosed:
        """Explain a side by its formula, if no known loss explains its results exactly."""
        if diagnosed.exact or self.sides[i].reduction is None or question.linear:
            return diagnosed
        formula = self.formula(i)
        candidate = None if formula is None else as_candidate(formula, question)
        explanations = (
            [Explanation(candidate, float("inf"))] if candidate else [] if formula else diagnosed.explanations
        )
        return diagnosed._replace(explanations=explanations, formula=formula)

    def examine(self, pair: Pair, question: Question, attempts: list[list[AnyResult | str]]) -> Pair:
        """Return the comparison with what float64 says of the function and of the accuracy."""
        self.announce("running both losses in float64")
        if not pair.known:
            # A fault that explains a loss with no formula but for roundings is a coincidence.
            sides = zip("AB", pair.readings, strict=True)
            pair = _silenced(pair, [letter for letter, each in sides if not each.formula and not each.is_exact])
        dtype = "float64" if self.dtype(0) == self.dtype(1) == "float64" else "float32"
        runs = (self.runs(0, dtype), self.runs(1, dtype))
        same = are_the_same(*runs)
        dtypes = list(dict.fromkeys(case.dtype for case in self.cases))
        if same.same and same.constants and "float64" in dtypes:
            same = replace(same, same=False)
        accuracy: list[Accuracy] = []
        if same.same:
            arithmetic = (self.sides[0].adapter.arithmetic, self.sides[1].adapter.arithmetic)
            found = (compare_accuracy(runs, (attempts[0], attempts[1]), each, arithmetic) for each in dtypes)
            accuracy = [_by_truth(pair, each) for each in found]
        if same.random:
            # What its results happened to be says nothing.
            survey = Survey(pair.survey.members, [], [])
            return replace(_silenced(pair, same.random), sameness=same, survey=survey)
        readings = pair.readings
        if same.same is not True and question.has_oracle and not question.linear:
            first, second = (replace(reading, formula=self.formula(i)) for i, reading in enumerate(readings))
            readings = (first, second)
        pair = replace(pair, readings=readings, sameness=same, accuracy=tuple(accuracy))
        if pair.tolerance is None and (same.same or not pair.known) and not (pair.strict and pair.known):
            shown = [difference for each in accuracy for difference in each.differences] or list(same.differences)
            if pair.known and not pair.agrees:
                shown = _with_truth(pair.cases, shown)
            pair = replace(pair, survey=Survey(pair.survey.members, [], shown))
        return pair

    def differentiate(self, pair: Pair) -> Pair:
        """Return the comparison with the sides whose gradient is not the derivative of their values."""
        if not pair.only_gradients:
            return pair
        found: dict[str, Cause] = {}
        for i, letter in enumerate("AB"):
            # The values agree, and what was recorded elsewhere cannot be run again.
            values = i if not self.sides[i].recorded else 1 - i
            if not self.sides[values].recorded:
                self.announce(f"differentiating the values of {letter}")
                dtype = self.dtype(i)
                cause = cause_of_loss(self.runs(i, dtype), self.runs(values, dtype))
                found |= {letter: cause} if cause else {}
        # A formula that fits such a gradient is not what the loss computes.
        return replace(_silenced(pair, found), not_derivatives=found)


def _silenced(pair: Pair, letters: Container[str]) -> Pair:
    """Return the comparison without what some sides were found to compute."""
    first, second = (
        SideReading(each.name, [], [], [], False, each.gave_results) if letter in letters else each
        for letter, each in zip("AB", pair.readings, strict=True)
    )
    return replace(pair, readings=(first, second))


def _with_truth(cases: list[Case], differences: list[Difference]) -> list[Difference]:
    """Add the true value to the worst element of each difference that is beyond what rounding explains."""
    found = []
    for each in differences:
        worst = each.comparison.worst
        case = next(case for case in cases if (case.name, case.dtype) == (each.case, each.dtype))
        if worst is not None and not each.agrees:
            worst = replace(worst, true=float(solve(case).parts[worst.part].high[worst.index]))
        found.append(replace(each, comparison=replace(each.comparison, worst=worst)))
    return found


def as_candidate(formula: Recognised, question: Question) -> Candidate | None:
    """Return the loss of the oracle that a formula is, or None."""
    reductions = {"mean": "mean", "sum": "sum", "a loss per row": "none"}
    constants = {"": False, ENTROPY_SUBTRACTED: True}
    known = formula.parameters.keys() <= OF_ORACLE.keys() and formula.convention in (*CONVENTIONS, "none")
    if not known or formula.shift or formula.class_weights or formula.ignored not in (None, question.ignore_index):
        return None
    if formula.reduction not in reductions or formula.constant not in constants:
        return None
    own: dict[str, Any] = {OF_ORACLE[name]: value for name, value in formula.parameters.items()}
    own |= {} if formula.convention == "none" else {"smoothing": formula.smoothing}
    other = {
        name: value
        for name, value in own.items()
        if not np.isclose(value, getattr(question, name) or 0.0, rtol=SAME_PARAMETER, atol=0)
    }
    return Candidate(formula.convention, reductions[formula.reduction], constants[formula.constant], **other)


def _by_truth(pair: Pair, accuracy: Accuracy) -> Accuracy:
    """Return the accuracy with errors as shares of the bounds of the truth, where there are such.

    In narrower dtypes a loss may round where it likes, and return its result in them.
    """
    outcomes = [each for each in pair.survey.outcomes if each.dtype == accuracy.dtype and each.comparison]
    if not outcomes or accuracy.dtype not in ("float64", "float32"):
        return accuracy
    errors, worst = [], []
    for name in (reading.name for reading in pair.readings):
        share, case = max(
            ((each.comparison.share, each.case) for each in outcomes if each.adapter == name and each.comparison),
            default=(0.0, ""),
        )
        errors.append(share)
        worst.append(case)
    return replace(accuracy, errors=(errors[0], errors[1]), worst=(worst[0], worst[1]), rough=ROUGH_BY_TRUTH)
