"""Replays compare adapters on this machine with the truth and with recorded results of other adapters.

A bundle is stale, and refused, if this checkout makes a different case of a recorded name, or a different truth for a
recorded case. Both are computed again and compared bit for bit: a changed formula makes a bundle stale, and so does a
NumPy that draws other random numbers; a changed comment does not. A case whose name is not in `all_case_names()`, such
as a worst case of `hunt`, cannot be made again: only its truth is checked. The truth of more than `WIDE` classes is
computed in float64, so it may depend on the machine's libm; there the two may differ by the bounds of float64.

Results are compared with the newly computed truth, after it was found equal to the recorded one.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from parity_tests.evidence.ledger import Evidence
from parity_tests.losses.adapters import Adapter, UnavailableError
from parity_tests.losses.registry import ELSEWHERE, ENTRIES, make_adapter, match_names
from parity_tests.studies.bundle import Bundle, Record, case_to_arrays, differing
from parity_tests.studies.concurrent_calls import Calls, call_each
from parity_tests.studies.sealed_folders import RecordingError, refusing
from parity_tests.studies.verdicts import Difference, Outcome, compare_outcomes, examine
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import Result, against_each_other
from parity_tests.truth.linear_cases import all_case_names, make_any_case
from parity_tests.truth.oracle import WIDE, Truth, solve
from parity_tests.truth.stored import truth_to_arrays

TRUTH = "truth"
AGAIN = "Record the bundle again."


@dataclass(frozen=True)
class Line:
    """An adapter here compared with a recorded one, or either compared with the truth, over all cases.

    Args:
        here: the adapter that ran here, or `TRUTH`.
        recorded: the recorded one, or `TRUTH`.
        cases: number of compared cases.
        share: largest share of a bound; inf for a failure.
        agrees: whether every case agrees.
        worst: the worst case as text; empty if there is none.
    """

    here: str
    recorded: str
    cases: int
    share: float
    agrees: bool
    worst: str

    def __str__(self) -> str:
        """Return the names of both sides, and the worst case."""
        if self.here == TRUTH:
            return f"recorded {self.recorded} against the {TRUTH}, {self.worst}"
        if self.recorded == TRUTH:
            return f"{self.here} against the {TRUTH}, {self.worst}"
        return f"{self.here} (A) against recorded {self.recorded} (B), {self.worst}"


@dataclass(frozen=True)
class Replay:
    """The results of replaying a bundle.

    Args:
        bundle: the bundle.
        adapters: the adapters that ran here.
        outcomes: their comparisons with the truth.
        recorded: comparisons of the recorded adapters with the truth.
        differences: comparisons of each adapter here with each recorded one, in this order.
    """

    bundle: Bundle
    adapters: Sequence[Adapter]
    outcomes: list[Outcome] = field(default_factory=list)
    recorded: list[Outcome] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        """Whether all results, also the recorded ones, are within their bounds of the truth and of each other."""
        return all(line.agrees for line in self.lines())

    def lines(self) -> list[Line]:
        """Return the lines of each adapter here, with the truth and each recorded one, and of these with the truth."""
        lines = []
        for here in self.adapters:
            lines.append(_line(here.name, TRUTH, [each for each in self.outcomes if each.adapter == here.name]))
            lines += [_line(here.name, name, self._between(here.name, name)) for name in self.bundle.adapters]
        for name in self.bundle.adapters:
            lines.append(_line(TRUTH, name, [each for each in self.recorded if each.adapter == name]))
        return lines

    def evidence(self) -> list[Evidence]:
        """Return the evidence: "executed" for adapters that agree here, "replayed" for recorded ones that agree.

        A recorded adapter must agree with the truth and with every adapter that was called here, at least one.
        """
        found = []
        versions = self.bundle.environment["versions"]
        for dtype in dict.fromkeys(case.dtype for case in self.bundle.cases):
            outcomes_here = {
                here: [each for each in self.outcomes if (each.adapter, each.dtype) == (here.name, dtype)]
                for here in self.adapters
            }
            # The linear loss, say, proves nothing about dense cases.
            called = [here for here, outcomes in outcomes_here.items() if _called(outcomes)]
            executed = {(here.name, here.device) for here in called if _all_agree(outcomes_here[here])}
            found += [Evidence(name, device, dtype, "executed") for name, device in sorted(executed)]
            for name, adapter in self.bundle.adapters.items():
                outcomes = [each for each in self.recorded if (each.adapter, each.dtype) == (name, dtype)]
                pairs = [self._between(here.name, name, dtype) for here in called]
                proven = bool(pairs) and _all_agree(outcomes) and all(map(_all_agree, pairs))
                if proven and (name, adapter.device) not in executed:
                    detail = f"{adapter.framework} {versions.get(adapter.framework, '')}".strip()
                    found.append(Evidence(name, adapter.device, dtype, "replayed", detail))
        return found

    def _between(self, here: str, recorded: str, dtype: str | None = None) -> list[Difference]:
        pairs = [each for each in self.differences if each.adapters == (here, recorded)]
        return [each for each in pairs if dtype in (None, each.dtype)]


def _is_right(each: Outcome | Difference) -> bool:
    return each.agrees if isinstance(each, Difference) else each.status == "agree"


def _called(found: Sequence[Outcome | Difference]) -> list[Outcome | Difference]:
    return [each for each in found if isinstance(each, Difference) or each.status != "unsupported"]


def _all_agree(found: Sequence[Outcome | Difference]) -> bool:
    called = _called(found)
    return bool(called) and all(map(_is_right, called))


def _share(each: Outcome | Difference) -> float:
    return float("inf") if each.comparison is None else each.comparison.share


def _line(here: str, recorded: str, found: Sequence[Outcome | Difference]) -> Line:
    called = _called(found)
    worst = max(called, key=lambda each: (not _is_right(each), _share(each)), default=None)
    text = ""
    if worst is not None:
        reason = worst.reason if isinstance(worst, Outcome) and worst.comparison is None else worst.comparison
        text = f"{worst.case} in {worst.dtype}: {reason}"
    share = max(map(_share, called), default=0.0)
    return Line(here, recorded, len(called), share, all(map(_is_right, called)), text)


def adapters_here(names: Sequence[str] | None, device: str) -> tuple[list[Adapter], dict[str, str]]:
    """Return the adapters that run on this machine, and for each other the reason why it does not.

    Args:
        names: names, with * and ?; None for all of ours that need no compiler.
        device: the device.

    Raises:
        ValueError: there is no adapter of that name.
    """
    if not names:
        slow = ("-compiled", "-triton", *ELSEWHERE)
        names = [entry.name for entry in ENTRIES.values() if entry.kind == "ours" and not entry.name.endswith(slow)]
    found, missing = [], {}
    for name in match_names(names):
        try:
            found.append(make_adapter(name, device))
        except UnavailableError as error:
            missing[name] = str(error)
    return found, missing


def replay(
    bundle: Bundle,
    adapters: Sequence[Adapter],
    track: Callable[[Iterator[tuple[Record, Calls]]], Iterable[tuple[Record, Calls]]] = iter,
) -> Replay:
    """Run adapters on the recorded inputs, and compare them with the truth and with the recorded results.

    Args:
        bundle: the bundle.
        adapters: the adapters to run; without any, the recorded results are compared with the truth only.
        track: shows the progress of an iterator that yields once for each case.

    Raises:
        RecordingError: the bundle is stale, or holds results of an adapter that is not known here.
    """
    for name in bundle.adapters:
        _check_known(name)
    found = Replay(bundle, adapters)
    for each, calls in track(zip(bundle.records, call_each(adapters, bundle.cases), strict=True)):
        truth = truth_of_today(each)
        recorded = [(adapter, examine(adapter, each.case, truth)) for adapter in bundle.adapters.values()]
        found.recorded.extend(outcome for _, outcome in recorded)
        for here in adapters:
            outcome = examine(here, each.case, truth, calls.of.get(here.name))
            found.outcomes.append(outcome)
            for other, theirs in recorded:
                difference = compare_outcomes(each.case, truth, (outcome, theirs), (here, other))
                if difference is not None:
                    found.differences.append(difference)
    return found


def _check_known(name: str) -> None:
    if name.partition(":")[0] not in ENTRIES:
        try:
            make_adapter(name)  # loads no framework: only those in ENTRIES do
        except ValueError as error:
            hint = "Replay the bundle with the lsce that recorded it."
            raise RecordingError(
                f"the bundle has results of an adapter that is not known here: {error}. {hint}"
            ) from error


def truth_of_today(recorded: Record) -> Truth:
    """Return the truth of a recorded case, computed anew.

    Raises:
        RecordingError: it differs from the recorded one, or this checkout makes a different case of that name.
    """
    case, title = recorded.case, f"case {recorded.case.name!r} in {recorded.case.dtype}"
    with refusing(f"the bundle has no valid {title}"):
        return _truth_of_today(recorded, case, title)


def _truth_of_today(recorded: Record, case: Case, title: str) -> Truth:
    if case.name in all_case_names():
        (entry, arrays), (entry_today, arrays_today) = map(case_to_arrays, (case, make_any_case(case.name, case.dtype)))
        changed = [name for name in entry if entry[name] != entry_today.get(name)] + differing(arrays, arrays_today)
        if changed:
            raise RecordingError(f"stale: this checkout makes {title} with other {', '.join(changed)}. {AGAIN}")
    truth = solve(case)
    if not _same_truth(recorded, truth):
        raise RecordingError(f"stale: the definition now gives another truth for {title}. {AGAIN}")
    return truth


def _same_truth(recorded: Record, today: Truth) -> bool:
    case = recorded.case
    if case.num_classes <= WIDE or case.dtype == "float64":
        return not differing(truth_to_arrays(recorded.truth), truth_to_arrays(today))
    then, now = (
        Result(truth.loss.high, truth.gradient.high, "float64", "float64") for truth in (recorded.truth, today)
    )
    return against_each_other(replace(case, dtype="float64"), today, (then, now), (Arithmetic(), Arithmetic())).agrees
