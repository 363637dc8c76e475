"""A search for the case in which a loss uses the largest share of its bounds, or exceeds them.

Bounds are per row, so one call judges many attempts: each row of a case is one. Most calls draw new cases. The others
vary the best few cases: the best rows, down to single roundings, where a row is kept if its share of the bound grew; or
an option; or the number of classes.

A linear case is varied as a whole, in hidden, weight or bias: all rows share the weight.

Why not `hypothesis.target()`: it learns one number from a call, and this learns one from each row.

The search maximises the share of the bound beyond the rounding of the result: (error - r) / (bound - r), where r is
half a unit in the last place of a bfloat16 or float16 gradient, and 0 elsewhere. It passes 1 where error / bound does.
For those gradients error / bound is always near 1, because some element needs r in full, and says nothing about how
they are computed.
"""

import math
import time
import zlib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from parity_tests.losses.adapters import Adapter, forget_programs
from parity_tests.studies.drawn_cases import Generator, draw_case, draw_linear_case, vary_layer, vary_options, vary_rows
from parity_tests.studies.simpler_cases import shrink
from parity_tests.studies.verdicts import Outcome, examine
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.bounds import last_rounding
from parity_tests.truth.cases import Case, LinearCase, features
from parity_tests.truth.comparison import AnyResult, bounds_of, error_over_bound
from parity_tests.truth.oracle import Truth, solve
from parity_tests.truth.precision import DTYPES, FORMATS, FloatArray

PARTS, LINEAR_PARTS = ("loss", "gradient"), ("loss", "hidden", "weight", "bias")

LINEAGES = 6  # cases that are varied further
NEW = 0.6  # how often a new case is drawn instead
OTHER_OPTIONS = 0.3  # how often an option of a case is varied, and not its rows
SEARCHED = 0.8  # of the time that is given; the rest is for making the find simpler
CALLS = 64  # after so many JAX drops its compiled programs
KEPT_SHARE = 0.98  # how much of its share a case keeps when it is made simpler


@dataclass(frozen=True)
class Find:
    """The worst case that a search found.

    Args:
        adapter: name of the adapter.
        dtype: of the logits.
        part: the part of the result that the share is of: the one asked for, or the one that exceeded its bound.
        case: the case, made simpler. Its name starts with "hunted" or, beyond the bounds, with "broken".
        share: share of the bound beyond the rounding of the result; inf for a failure, and where NaN or infinity is
            out of place.
        evaluations: number of calls of the adapter by the search.
        problem: what is wrong; None if every result was within its bounds.
    """

    adapter: str
    dtype: str
    part: str
    case: Case
    share: float
    evaluations: int
    problem: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether every result was within its bounds."""
        return self.problem is None


def hunt(
    adapter: Adapter,
    dtype: str,
    part: str,
    *,
    examples: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
) -> Find:
    """Search for the largest share of a bound, and stop at the first result beyond its bound.

    Args:
        adapter: whose results.
        dtype: of the logits.
        part: whose share is maximised. Results are held against the bounds of all parts.
        examples: how many calls of the adapter the search may take; the same find each time.
        seconds: how long it may take, with all that is compiled; give one of the two. The first case is judged in any
            time, and a call of the adapter that has begun is not interrupted.
        seed: seed of all random choices.

    Raises:
        ValueError: an argument is out of its range, or the adapter supports none of the cases.
    """
    _check(dtype, part, parts_of(adapter), examples, seconds)
    judge = _Judge(adapter, part, examples, seconds)
    generator = np.random.default_rng([seed, zlib.crc32(f"{dtype} {part}".encode())])
    _search(judge, generator, dtype)
    if judge.broken is not None:
        return _broken(adapter, judge, judge.broken)
    assert judge.best is not None, "at least one case is judged"
    case = shrink(
        judge.best,
        lambda simpler: share_of(adapter, simpler, part) >= KEPT_SHARE * judge.share,
        deadline=judge.deadline,
    )
    share = share_of(adapter, case, part)
    if share == math.inf:
        # A case beyond its bounds turned up on the way to a simpler one.
        return _broken(adapter, judge, case)
    case = replace(case, name=f"hunted {dtype} {part} {adapter.name}")
    return Find(adapter.name, dtype, part, case, share, judge.evaluations)


def parts_of(adapter: Adapter) -> tuple[str, ...]:
    """Return the parts of the results of an adapter whose shares can be maximised."""
    return LINEAR_PARTS if getattr(adapter, "linear", False) else PARTS


def share_of(adapter: Adapter, case: Case, part: str) -> float:
    """Return the largest share of a case; inf for a result that is not within its bounds."""
    truth = solve(case)
    outcome = examine(adapter, case, truth)
    if outcome.result is None or outcome.status != "agree":
        return math.inf
    return float(np.max(row_shares(case, truth, outcome.result, adapter.arithmetic).get(part, 0.0)))


def row_shares(case: Case, truth: Truth, result: AnyResult, arithmetic: Arithmetic) -> dict[str, FloatArray]:
    """Return the largest share of each row, or of the whole case where its losses are reduced to one."""
    bounds, by_row = bounds_of(case, truth, arithmetic), case.options["reduction"] == "none"
    found = {}
    for part, exact in truth.parts.items():
        rounding = last_rounding(exact.high, case.result_dtypes[part])
        beyond = np.maximum(bounds[part] - rounding, FORMATS["float64"].smallest_normal)
        shares = error_over_bound(exact.error_of(result.parts[part]) - rounding, beyond)
        rows = by_row and part not in ("weight", "bias")
        found[part] = np.max(shares.reshape(len(shares), -1), axis=-1) if rows else np.asarray(np.max(shares))
    return found


def describe(case: Case) -> str:
    """Return a case's size and options in a few words."""
    rows, num_classes = case.rows().logits.shape
    named = {name: value for name, value in case.options.items() if value and value != "none"}
    shown = [f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in named.items()]
    smoothing = f"smoothing {case.smoothing:.3g}" if isinstance(case.smoothing, float) else ""
    arrays = sorted(name for name in features(case) if name not in case.options and "convention" not in name)
    layer = f"{case.hidden.shape[-1]} features" if isinstance(case, LinearCase) else ""
    return ", ".join(filter(None, [f"{rows} x {num_classes}", layer, smoothing, *shown, *arrays]))


# --- The search -------------------------------------------------------------------------------------------------------


class _Judge:
    """Calls the adapter, compares its results with the truth, counts the calls, and keeps the worst case."""

    def __init__(self, adapter: Adapter, part: str, examples: int | None, seconds: float | None) -> None:
        self.adapter, self.part, self.examples = adapter, part, examples
        begin, self.deadline = time.monotonic(), math.inf
        if seconds is not None:
            self.deadline = begin + seconds
        self.end_of_search = begin + SEARCHED * (self.deadline - begin)
        self.evaluations, self.share = 0, -math.inf
        self.best: Case | None = None
        self.broken: Case | None = None

    @property
    def open(self) -> bool:
        """Whether the search may go on. The first case is judged in any time."""
        spent = self.evaluations >= self.examples if self.examples is not None else False
        late = time.monotonic() >= self.end_of_search
        return self.evaluations == 0 or (self.broken is None and not (spent or late))

    def __call__(self, case: Case) -> FloatArray:
        """Return the shares of a case."""
        self.evaluations += 1
        if not self.evaluations % CALLS:
            forget_programs()
        truth = _quick_truth(case)
        outcome = examine(self.adapter, case, truth)
        # The truth at 50 digits has the last word.
        if outcome.status != "agree":
            truth = solve(case)
            outcome = examine(self.adapter, case, truth)
        if outcome.result is None or outcome.status != "agree":
            self.broken = case
            return np.zeros(len(case.logits) if case.options["reduction"] == "none" else ())
        shares = row_shares(case, truth, outcome.result, self.adapter.arithmetic).get(self.part, np.zeros(()))
        if np.max(shares) > self.share:
            self.best, self.share = case, float(np.max(shares))
        return shares


class _Lineage(NamedTuple):
    case: Case
    shares: FloatArray

    @property
    def best(self) -> float:
        return float(np.max(self.shares))


def _search(judge: _Judge, generator: Generator, dtype: str) -> None:
    lineages: list[_Lineage] = []
    while judge.open:
        if len(lineages) < LINEAGES or generator.random() < NEW:
            case = _draw_supported(judge.adapter, generator, dtype)
            lineages.append(_Lineage(case, judge(case)))
        else:
            # The better a lineage, the more often it is chosen.
            chosen = int(np.min(generator.integers(LINEAGES, size=2)))
            case, shares = lineages[chosen]
            if generator.random() < OTHER_OPTIONS:
                varied = vary_options(generator, case)
                if judge.adapter.unsupported(varied) is None:
                    lineages.append(_Lineage(varied, judge(varied)))
            else:
                if isinstance(case, LinearCase):
                    varied = vary_layer(generator, case)
                else:
                    varied = vary_rows(generator, case, shares)
                lineages[chosen] = _better(lineages[chosen], _Lineage(varied, judge(varied)))
        lineages = sorted(lineages, key=lambda lineage: -lineage.best)[:LINEAGES]


def _better(one: _Lineage, other: _Lineage) -> _Lineage:
    """Return the better of each pair of rows; the better case where the rows share one loss or one weight."""
    if not one.shares.ndim or isinstance(one.case, LinearCase):
        return max(one, other, key=lambda lineage: lineage.best)
    case = _choose(other.shares > one.shares, other.case, one.case)
    return _Lineage(case, np.maximum(one.shares, other.shares))


def _choose(which: Any, one: Case, other: Case) -> Case:
    """Return the rows of `one` where `which` is true, and of `other` elsewhere."""

    def rows(name: str) -> Any:
        first, second = getattr(one, name), getattr(other, name)
        if not isinstance(first, np.ndarray):
            return first
        return np.where(which[:, None] if first.ndim == 2 else which, first, second)

    return replace(one, **{name: rows(name) for name in ("logits", "labels", "smoothing", "upstream")})


def _draw_supported(adapter: Adapter, generator: Generator, dtype: str) -> Case:
    draw = draw_linear_case if parts_of(adapter) == LINEAR_PARTS else draw_case
    for _ in range(2000):
        case = draw(generator, dtype)
        reason = adapter.unsupported(case)
        if reason is None:
            return case
    raise ValueError(f"{adapter.name} supports none of 2000 drawn cases; of the last one it {reason}")


def _quick_truth(case: Case) -> Truth:
    """Return the truth, computed in float64 unless the logits are float64."""
    return solve(case, None if case.dtype == "float64" else math)


def _broken(adapter: Adapter, judge: _Judge, case: Case) -> Find:
    """Return the find of a case beyond its bounds."""

    def judged(case: Case) -> Outcome:
        return examine(adapter, case, solve(case))

    status = judged(case).status
    case = shrink(case, lambda simpler: judged(simpler).status == status, deadline=judge.deadline)
    outcome = judged(case)
    part, share, problem = (
        judge.part,
        math.inf,
        outcome.reason or "beyond its bound at first, within it when called again",
    )
    if outcome.comparison is not None and outcome.comparison.worst is not None:
        part = outcome.comparison.worst.part
        share, problem = outcome.comparison.share, str(outcome.comparison)
    case = replace(case, name=f"broken {case.dtype} {part} {adapter.name}")
    return Find(adapter.name, case.dtype, part, case, share, judge.evaluations, problem)


def _check(dtype: str, part: str, parts: tuple[str, ...], examples: int | None, seconds: float | None) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"there is no dtype {dtype!r}; the dtypes are {', '.join(DTYPES)}")
    if part not in parts:
        raise ValueError(f"there is no part {part!r}; the parts are {', '.join(parts)}")
    if (examples is None) == (seconds is None):
        raise ValueError("give one of examples and seconds")
    if examples is not None and examples < 1:
        raise ValueError(f"examples must be at least 1, not {examples}")
    if seconds is not None and not (0 < seconds < math.inf):
        raise ValueError(f"seconds must be above 0 and finite, not {seconds}")
