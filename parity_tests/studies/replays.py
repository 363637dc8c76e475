"""Replays: the adapters that are here, held against the truth and against what other adapters gave elsewhere.

A bundle is stale, and refused, if this checkout makes another case of a recorded name, or if its definition gives
another truth for a recorded case. Both are computed again and compared bit for bit: a changed formula, and a NumPy that
draws other random numbers, make a bundle stale, and a changed comment does not. A case whose name is not in
`all_case_names()`, such as a worst case that was found, stands for itself: only its truth is checked. The truth of more
than `WIDE` classes is computed in float64, where it may depend on the machine's libm; there the two may differ by
float64's bounds.

Results are held against the truth of today, which by then is known to be the recorded one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from parity_tests.evidence.ledger import Evidence
from parity_tests.losses.adapters import Adapter, UnavailableError
from parity_tests.losses.registry import ENTRIES, make_adapter, match_names
from parity_tests.studies.bundle import AGAIN, Bundle, BundleError, Record, case_to_arrays, differing, truth_to_arrays
from parity_tests.studies.verdicts import Difference, Outcome, compare_outcomes, examine
from parity_tests.truth.bounds import Arithmetic
from parity_tests.truth.comparison import Result, against_each_other
from parity_tests.truth.linear_cases import all_case_names, make_any_case
from parity_tests.truth.oracle import WIDE, Truth, solve

TRUTH = "truth"


@dataclass(frozen=True)
class Line:
    """An adapter here held against a recorded one, or either against the truth, over all cases.

    Args:
        here: the adapter that ran here, or `TRUTH`.
        recorded: the recorded one, or `TRUTH`.
        cases: number of cases in which it was.
        share: largest share of a bound; inf for a failure.
        agrees: whether every case does.
        worst: the worst case, for people; empty if there is none.
    """

    here: str
    recorded: str
    cases: int
    share: float
    agrees: bool
    worst: str

    def __str__(self) -> str:
        """Return who is held against whom, and the worst case."""
        if self.here == TRUTH:
            return f"recorded {self.recorded} against the {TRUTH}, {self.worst}"
        other = f"the {TRUTH}" if self.recorded == TRUTH else f"recorded {self.recorded}"
        return f"{self.here} against {other}, {self.worst}"


@dataclass(frozen=True)
class Replay:
    """What came of replaying a bundle.

    Args:
        bundle: the bundle.
        adapters: those that ran here.
        outcomes: of those against the truth.
        recorded: of the recorded adapters against the truth.
        differences: of each that ran here against each recorded one, in this order.
    """

    bundle: Bundle
    adapters: Sequence[Adapter]
    outcomes: list[Outcome] = field(default_factory=list)
    recorded: list[Outcome] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        """Whether all is within the bounds of the truth and of each other, the recorded results included."""
        return all(line.agrees for line in self.lines())

    def lines(self) -> list[Line]:
        """Return each adapter here against the truth and the recorded ones, and these against the truth."""
        lines = []
        for here in self.adapters:
            lines.append(_line(here.name, TRUTH, [each for each in self.outcomes if each.adapter == here.name]))
            lines += [_line(here.name, name, self._between(here.name, name)) for name in self.bundle.adapters]
        for name in self.bundle.adapters:
            lines.append(_line(TRUTH, name, [each for each in self.recorded if each.adapter == name]))
        return lines

    def evidence(self) -> list[Evidence]:
        """Return what is known: "executed" of what ran here and agrees, "replayed" of what was recorded and agrees.

        A recorded adapter agrees if it does with the truth and with every adapter that was called here, at least one.
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
    """Return the adapters that can be made here, and of the others why not.

    Args:
        names: which, with * and ?; with none all of ours that no compiler must be waited for.
        device: where they run.

    Raises:
        ValueError: there is no adapter of a name.
    """
    if not names:
        names = [entry.name for entry in ENTRIES.values() if entry.kind == "ours" and "-compiled" not in entry.name]
    found, missing = [], {}
    for name in match_names(names):
        try:
            found.append(make_adapter(name, device))
        except UnavailableError as error:
            missing[name] = str(error)
    return found, missing


def replay(bundle: Bundle, adapters: Sequence[Adapter], records: Iterable[Record] | None = None) -> Replay:
    """Run adapters on the recorded inputs, and hold them against the truth and against the recorded results.

    Args:
        bundle: what was recorded.
        adapters: what to run here; with none the recorded results are held against the truth only.
        records: which to replay; all of the bundle by default.

    Raises:
        BundleError: the bundle is stale, or holds results of an adapter that is not known here.
    """
    for name in bundle.adapters:
        _check_known(name)
    found = Replay(bundle, adapters)
    for each in bundle.records if records is None else records:
        truth = truth_of_today(each)
        recorded = [(adapter, examine(adapter, each.case, truth)) for adapter in bundle.adapters.values()]
        found.recorded.extend(outcome for _, outcome in recorded)
        for here in adapters:
            outcome = examine(here, each.case, truth)
            found.outcomes.append(outcome)
            for other, theirs in recorded:
                difference = compare_outcomes(each.case, truth, (outcome, theirs), (here, other))
                if difference is not None:
                    found.differences.append(difference)
    return found


def _check_known(name: str) -> None:
    if name not in ENTRIES:
        try:
            make_adapter(name)  # loads no framework: only those in ENTRIES do
        except ValueError as error:
            hint = "Replay the bundle with the lsce that recorded it."
            raise BundleError(
                f"the bundle has results of an adapter that is not known here: {error}. {hint}"
            ) from error


def truth_of_today(recorded: Record) -> Truth:
    """Return what the definition gives for a recorded case now.

    Raises:
        BundleError: it is not what was recorded, or the case of that name is another one by now.
    """
    case, title = recorded.case, f"case {recorded.case.name!r} in {recorded.case.dtype}"
    if case.name in all_case_names():
        (entry, arrays), (entry_today, arrays_today) = map(case_to_arrays, (case, make_any_case(case.name, case.dtype)))
        changed = [name for name in entry if entry[name] != entry_today.get(name)] + differing(arrays, arrays_today)
        if changed:
            raise BundleError(f"stale: this checkout makes {title} with other {', '.join(changed)}. {AGAIN}")
    truth = solve(case)
    if not _same_truth(recorded, truth):
        raise BundleError(f"stale: the definition now gives another truth for {title}. {AGAIN}")
    return truth


def _same_truth(recorded: Record, today: Truth) -> bool:
    case = recorded.case
    if case.num_classes <= WIDE or case.dtype == "float64":
        return not differing(truth_to_arrays(recorded.truth), truth_to_arrays(today))
    then, now = (
        Result(truth.loss.high, truth.gradient.high, "float64", "float64") for truth in (recorded.truth, today)
    )
    return against_each_other(replace(case, dtype="float64"), today, (then, now), (Arithmetic(), Arithmetic())).agrees
