"""Names the known loss that gave some results, among all conventions, reductions and faults that the harness knows.

A candidate is a convention, a reduction, with or without the entropy of the target subtracted, and at most one fault of
the mutant bank. It *explains* results if they are within its rounding bounds in every case, or at least 20 times closer
to it than to the expected definition (the fault's implementation may round at other places than the loss). If several
candidates give the same results in these cases, all are named, the plainest first.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from parity_tests.faults.dense import CURES, FAULTS
from parity_tests.faults.linear import OF_LAYER, PREFIX, describe, wrong_result
from parity_tests.faults.sharded import gradient_factor, sharded_faults
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.cases import CONVENTIONS, Case
from parity_tests.truth.comparison import AnyResult, Parts, bounds_of, within
from parity_tests.truth.oracle import Truth, solve

# The loosest arithmetic of any adapter.
ARITHMETIC = Arithmetic()
CLOSER = 20
# Options of a candidate that have a number.
OWN_OPTIONS = ("smoothing", "z_loss", "softcap")
# What the target holds in each convention, for a smoothing e.
TARGETS = {
    "uniform": "1-e+e/K at the label, e/K elsewhere",
    "non_target": "1-e at the label, e/(K-1) elsewhere",
    "clamp": "1 and 0 clamped to [e/(K-1), 1-e]",
    "max_sup": "1+e/K at the label, e/K elsewhere, less e at the largest logit",
    "leaky": "1-e at the label, e/K elsewhere",
    "none": "1 at the label, 0 elsewhere",
}


@dataclass(frozen=True)
class Candidate:
    """A loss that the harness knows. A field that is None comes from the case.

    Args:
        convention: name of the convention, or "none" for no smoothing.
        reduction: "none", "sum" or "mean".
        subtract_entropy: whether the entropy of the target is subtracted.
        fault: name of its fault in the mutant bank, if it has one.
        smoothing, z_loss, softcap: these options of the loss.
    """

    convention: str | None = None
    reduction: str | None = None
    subtract_entropy: bool | None = None
    fault: str | None = None
    smoothing: float | None = None
    z_loss: float | None = None
    softcap: float | None = None

    def apply(self, case: Case) -> Case:
        """Return the case with the options of this candidate."""
        convention = "uniform" if self.convention == "none" else self.convention
        own: dict[str, Any] = {"convention": convention, "reduction": self.reduction}
        own |= {"subtract_entropy": self.subtract_entropy, "z_loss": self.z_loss, "softcap": self.softcap}
        options = {**case.options, **{name: value for name, value in own.items() if value is not None}}
        if self.convention == "none":
            return replace(case, options=options, smoothing=0.0, prior=None)
        return replace(case, options=options, smoothing=case.smoothing if self.smoothing is None else self.smoothing)

    def __str__(self) -> str:
        """Return a description."""
        parts = [convention_text(self.convention or "the stated")]
        own = {name: getattr(self, name) for name in OWN_OPTIONS}
        parts += [f"{name.replace('_', '-')} {value:.6g}" for name, value in own.items() if value is not None]
        if self.reduction not in (None, "none"):
            parts.append(str(self.reduction))
        if self.subtract_entropy:
            parts.append("entropy of the target subtracted")
        return ", ".join(parts) + (f"; {describe(self.fault)}" if self.fault else "")


AS_STATED = Candidate()


@dataclass(frozen=True)
class Explanation:
    """A candidate that explains results, and the largest distance from them as a share of the rounding bound."""

    candidate: Candidate
    share: float

    @property
    def exact(self) -> bool:
        """Whether rounding explains the whole distance."""
        return self.share <= 1


class Diagnosis:
    """Compares results with candidates on given cases. A candidate is computed once a case.

    Args:
        cases: the cases.
        candidates: the known losses.
    """

    def __init__(self, cases: Sequence[Case], candidates: Sequence[Candidate]) -> None:
        """Keep the cases and the candidates."""
        self.cases, self.candidates = cases, candidates
        self._sound: dict[tuple[Candidate, int], tuple[Case, Truth, Parts]] = {}
        self._faulty: dict[tuple[Candidate, int], AnyResult] = {}

    def explain(self, results: Sequence[AnyResult | None], expected: Candidate) -> list[Explanation]:
        """Return the candidates that explain the results, the best first.

        Exact ones come first, then those with fewer departures from `expected`, then closer ones. A fault that stays
        within the bounds in these cases explains nothing.

        Args:
            results: one for each case; cases with None are left out.
            expected: the candidate that limits how far an explanation may be from the results.
        """
        given = {i: result for i, result in enumerate(results) if result is not None}
        finite = (share for share in self._shares(expected, given) if math.isfinite(share))
        limit = max(1.0, max(finite, default=0.0) / CLOSER)
        distances = ((candidate, self._distance(candidate, given, limit)) for candidate in self.candidates)
        found = [
            Explanation(each, share) for each, share in distances if share <= limit and not self._harmless(each, given)
        ]
        return sorted(found, key=lambda each: (not each.exact, _oddity(each.candidate, expected), each.share))

    def _shares(self, candidate: Candidate, given: Mapping[int, AnyResult]) -> Iterator[float]:
        """Yield the distance of the results from the candidate in each case."""
        for i, result in given.items():
            case, truth, bounds = self._of_sound(candidate, i)
            if candidate.fault is None:
                yield within(case, truth, result, bounds).share
            else:
                factor = gradient_factor(candidate.fault)
                twice = {part: 2 * (1 if part == "loss" else factor) * bound for part, bound in bounds.items()}
                yield within(case, truth, result, twice, self._of_fault(candidate, i)).share

    def _distance(self, candidate: Candidate, given: Mapping[int, AnyResult], limit: float) -> float:
        """Return the largest share over the cases, or the first beyond the limit."""
        largest = 0.0
        for share in self._shares(candidate, given):
            largest = max(largest, share)
            if largest > limit:
                break
        return largest

    def _harmless(self, candidate: Candidate, given: Mapping[int, AnyResult]) -> bool:
        """Return whether the candidate has a fault that stays within the bounds of the sound loss."""
        if candidate.fault is None:
            return False
        sound = ((i, *self._of_sound(candidate, i)) for i in given)
        return all(within(case, truth, self._of_fault(candidate, i), bounds).agrees for i, case, truth, bounds in sound)

    def _of_sound(self, candidate: Candidate, i: int) -> tuple[Case, Truth, Parts]:
        """Return case i with the options of the candidate, and its truth and bounds without the fault."""
        key = (replace(candidate, fault=None), i)
        if key not in self._sound:
            case = candidate.apply(self.cases[i])
            # float64 is precise enough for narrower results.
            truth = solve(case, None if case.dtype == "float64" else math)
            self._sound[key] = (case, truth, bounds_of(case, truth, ARITHMETIC))
        return self._sound[key]

    def _of_fault(self, candidate: Candidate, i: int) -> AnyResult:
        """Return the result with the candidate's fault in case i."""
        key = (candidate, i)
        if key not in self._faulty:
            self._faulty[key] = wrong_result(candidate.apply(self.cases[i]), candidate.fault)
        return self._faulty[key]


def _oddity(candidate: Candidate, expected: Candidate) -> tuple[int, bool]:
    return len(departures(candidate, expected)), candidate.fault is not None


def _faults(linear: bool) -> list[str | None]:
    return [None, *FAULTS, *sharded_faults(), *([PREFIX + name for name in OF_LAYER] if linear else [])]


def faults_as_candidates(linear: bool = False) -> list[Candidate]:
    """Return the candidates for losses that take every option: sound, and each fault."""
    return [Candidate(fault=fault) for fault in _faults(linear)]


def plain_candidates(reductions: Sequence[str], smoothing: float, linear: bool = False) -> list[Candidate]:
    """Return the candidates for losses that take only logits, or a linear layer, and labels."""
    return list(_plain_candidates(reductions, smoothing, linear))


def _plain_candidates(reductions: Sequence[str], smoothing: float, linear: bool) -> Iterator[Candidate]:
    for fault in _faults(linear):
        for convention in (*CONVENTIONS, "none") if smoothing else ("uniform",):
            for reduction in reductions:
                has_entropy = smoothing and convention not in ("max_sup", "none")
                for subtract_entropy in (False, True) if has_entropy else (False,):
                    yield Candidate(convention, reduction, subtract_entropy, fault)


def departures(candidate: Candidate, expected: Candidate) -> list[str]:
    """Return the differences of a candidate from the expected one, by the names of the mutant bank if it has one.

    Example:
        >>> departures(Candidate("non_target", "sum", False), Candidate("uniform", "mean", False))
        ['other_off', 'sum_for_mean']
    """
    names = []
    if candidate.convention != expected.convention:
        # With smoothing up to (K-1)/K clamp is the same as non_target.
        off = {"uniform": "e/K", "non_target": "e/(K-1)", "clamp": "e/(K-1)"}
        between = {off.get(str(each.convention)) for each in (candidate, expected)}
        if between == {"e/K", "e/(K-1)"}:
            names.append("other_off")
        else:
            names.append("no_smoothing" if candidate.convention == "none" else f"{candidate.convention}_convention")
    own = {name: getattr(candidate, name) for name in OWN_OPTIONS}
    names += [
        f"{name} {value:.6g}"
        for name, value in own.items()
        if value is not None and not math.isclose(value, getattr(expected, name) or 0.0, rel_tol=1e-6)
    ]
    if candidate.reduction != expected.reduction:
        names.append(f"{candidate.reduction}_for_{expected.reduction}")
    if candidate.subtract_entropy != expected.subtract_entropy:
        names.append("entropy_subtracted" if candidate.subtract_entropy else "entropy_kept")
    if candidate.fault not in (None, expected.fault):
        names.append(str(candidate.fault))
    return names


class Mistake(NamedTuple):
    """What is wrong in a loss, and what to change: both continue a sentence after a colon."""

    what: str
    cure: str


def mistakes(candidate: Candidate, expected: Candidate, asked: Mapping[str, Any]) -> list[Mistake]:
    """Return the differences of a candidate from the expected one in words, in the order of `departures`.

    Args:
        candidate: what a loss computes.
        expected: what it should.
        asked: the options that a field which is None stands for.

    Example:
        >>> [each.what for each in mistakes(Candidate("none", "sum", False), Candidate("uniform", "mean", False), {})]
        ['no smoothing, not uniform', 'sum, not mean']
    """
    found = []
    if candidate.convention != expected.convention:
        found.append(of_convention(str(candidate.convention), str(expected.convention)))
    for name in OWN_OPTIONS:
        value, other = getattr(candidate, name), getattr(expected, name) or asked.get(name) or 0.0
        if value is not None and not math.isclose(value, other, rel_tol=1e-6):
            option = name.replace("_", "-")
            found.append(Mistake(f"{option} {value:.6g}, not {other:.6g}", f"set the {option} to {other:.6g}"))
    if candidate.reduction != expected.reduction:
        found.append(Mistake(f"{candidate.reduction}, not {expected.reduction}", f"return the {expected.reduction}"))
    if candidate.subtract_entropy != expected.subtract_entropy:
        fault = "entropy_subtracted" if candidate.subtract_entropy else "entropy_kept"
        found.append(Mistake(describe(fault), CURES[fault]))
    if candidate.fault not in (None, expected.fault):
        fault = str(candidate.fault)
        found.append(
            Mistake(describe(fault), CURES.get(fault.removeprefix(PREFIX), f"the place where {describe(fault)}"))
        )
    return found


def of_convention(name: str, expected: str) -> Mistake:
    """Return the mistake of a convention in place of another."""
    other = "without" if expected == "none" else expected
    return Mistake(f"{convention_text(name)}, not {other}", f"make the target {TARGETS[expected]} (smoothing e)")


def convention_text(name: str) -> str:
    """Return a convention as in "uniform convention", or "no smoothing"."""
    return "no smoothing" if name == "none" else f"{name} convention"
