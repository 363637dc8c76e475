"""A search for the cases in which a loss uses most of its bounds, and for those in which it breaks them.

Many rows are judged in one call, since the bounds are per row: each row of a case is an attempt of its own, of one
character (spread, tied, near the optimum, dominated, with infinities). Most calls draw new cases. The others vary the
best few: their best rows, down to single roundings, each row kept where its share of the bound grew; or an option, or
the number of classes.

A linear case is varied as a whole, in hidden, weight or bias: all rows share the weight.

Why not `hypothesis.target()`: it learns one number from a call, and this learns one from each row.

What is maximised is the share of the bound beyond the rounding of the result: (error - r) / (bound - r), r half a unit
in the last place of a bfloat16 or float16 gradient and 0 elsewhere. It passes 1 where error / bound does; but that is
always near 1 for those gradients, because some element needs r in full, and says nothing about how they are computed.
"""

import math
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from lsce_spec import target_distribution
from parity_tests.losses.adapters import Adapter
from parity_tests.studies.verdicts import Outcome, examine
from parity_tests.truth.bounds import Arithmetic, last_rounding
from parity_tests.truth.cases import CONVENTIONS, Case, LinearCase, features, soft_labels
from parity_tests.truth.comparison import AnyResult, bounds_of, error_over_bound
from parity_tests.truth.linear_cases import with_logits
from parity_tests.truth.oracle import Truth, solve
from parity_tests.truth.precision import DTYPES, FORMATS, FloatArray, compute_dtype, round_to

PARTS, LINEAR_PARTS = ("loss", "gradient"), ("loss", "hidden", "weight", "bias")

# Block sizes, their neighbours, and primes. Few, since JAX compiles for each shape.
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 1009, 1024, 2047, 4001)
# Logits of a case: about as many as the oracle judges in the time of one call; at 50 digits it takes 15 times longer.
ELEMENTS = {"float64": 1024, "float32": 8192, "bfloat16": 8192, "float16": 8192}
# Of linear cases, whose logits are exact sums of products.
LINEAR_SIZES, LINEAR_ELEMENTS, NUM_FEATURES = SIZES[:16], 128, (1, 2, 3, 5, 8, 17)
LARGEST_LOGIT = 6e4  # float16 ends at 65504
LARGEST_OPERAND = 30.0  # of a linear layer
LINEAGES = 6  # cases that are varied further
NEW = 0.6  # how often a new case is drawn instead
OTHER_OPTIONS = 0.3  # how often an option of a case is varied, and not its rows
ELITE = 0.1  # part of the rows that the others are made from
KEPT_SHARE = 0.98  # how much of its share a case keeps when it is made simpler

Generator = np.random.Generator


@dataclass(frozen=True)
class Find:
    """The worst case that a search found.

    Args:
        adapter: name of the adapter.
        dtype: of the logits.
        part: of what the share is: the part that was asked for, or the one that broke its bound.
        case: made simpler. It is called "hunted" or, beyond its bounds, "broken", and what of whom.
        share: of the bound beyond the rounding of the result; inf for a failure, or a number of the wrong class.
        evaluations: how often the adapter was called by the search.
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
        seconds: how long it may take; give one of the two. To make the find simpler comes on top.
        seed: of all that is random.

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
    case = shrink(judge.best, lambda simpler: share_of(adapter, simpler, part) >= KEPT_SHARE * judge.share)
    share = share_of(adapter, case, part)
    if share == math.inf:
        # On the way to a simpler case one turned up that is beyond its bounds.
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
    """Return what a case is, in a few words."""
    rows, num_classes = case.rows().logits.shape
    named = {name: value for name, value in case.options.items() if value and value != "none"}
    shown = [f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in named.items()]
    smoothing = f"smoothing {case.smoothing:.3g}" if isinstance(case.smoothing, float) else ""
    arrays = sorted(name for name in features(case) if name not in case.options and "convention" not in name)
    layer = f"{case.hidden.shape[-1]} features" if isinstance(case, LinearCase) else ""
    return ", ".join(filter(None, [f"{rows} x {num_classes}", layer, smoothing, *shown, *arrays]))


# --- the search ---


class _Judge:
    """Calls the adapter, holds its results against the truth, and keeps the worst case and the account of the calls."""

    def __init__(self, adapter: Adapter, part: str, examples: int | None, seconds: float | None) -> None:
        self.adapter, self.part, self.examples = adapter, part, examples
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.evaluations, self.share = 0, -math.inf
        self.best: Case | None = None
        self.broken: Case | None = None

    @property
    def open(self) -> bool:
        """Whether the search may go on. The first case is judged in any time."""
        spent = self.evaluations >= self.examples if self.examples is not None else False
        late = time.monotonic() >= self.deadline if self.deadline is not None else False
        return self.evaluations == 0 or (self.broken is None and not (spent or late))

    def __call__(self, case: Case) -> FloatArray:
        """Return the shares of a case."""
        self.evaluations += 1
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
            # The better, the more often.
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
    """Return the better of each row, or of the two where the rows have one share, or one weight."""
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
    """Return the truth, in float64 where its error of 2^-29 of what it is compared with is enough."""
    return solve(case, None if case.dtype == "float64" else math)


def _broken(adapter: Adapter, judge: _Judge, case: Case) -> Find:
    """Return the find of a case beyond its bounds."""

    def judged(case: Case) -> Outcome:
        return examine(adapter, case, solve(case))

    status = judged(case).status
    case = shrink(case, lambda simpler: judged(simpler).status == status)
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


# --- drawing cases ---


def draw_case(generator: Generator, dtype: str, num_classes: int | None = None) -> Case:
    """Draw a case with any combination of options that is allowed, each of its rows of a character of its own."""
    num_classes = num_classes or int(generator.choice(SIZES))
    num_rows = int(np.clip(ELEMENTS[dtype] // num_classes, 4, 256))
    compute = compute_dtype(dtype)

    def maybe(probability: float, value: Any, otherwise: Any = None) -> Any:
        return value if generator.random() < probability else otherwise

    options = {
        "convention": str(generator.choice(CONVENTIONS)),
        "reduction": str(generator.choice(["none", "none", "sum", "mean"])),
        "z_loss": maybe(0.25, float(10 ** generator.uniform(-6, 0)), 0.0),
        "softcap": maybe(0.25, float(10 ** generator.uniform(-1, 3))),
        "subtract_entropy": maybe(0.2, True, False),
    }
    soft = generator.random() < 0.25
    mask = generator.random(num_classes) < 0.7
    prior = generator.exponential(size=num_classes)
    upstream = generator.normal(size=num_rows) if options["reduction"] == "none" else np.ones(num_rows)
    case = Case(
        name="drawn",
        dtype=dtype,
        logits=np.zeros((num_rows, num_classes)),
        labels=soft_labels(dtype, generator, (num_rows, num_classes))
        if soft
        else generator.integers(num_classes, size=num_rows),
        options=options,
        smoothing=maybe(0.5, _draw_smoothings(generator, num_rows, num_classes, compute), 0.1),
        class_weight=maybe(0.2, round_to(10 ** generator.uniform(-2, 2, num_classes), compute)),
        class_mask=maybe(0.15, mask),
        prior=maybe(0.25, round_to(prior / prior.sum(), compute)),
        upstream=maybe(0.25, round_to(upstream, compute)),
    )
    if isinstance(case.smoothing, float):
        case = replace(case, smoothing=_draw_smoothing(generator, num_classes))
    case = _allowed(case)
    rows = [_draw_row(generator, case, i) for i in range(num_rows)]
    return _finite(replace(case, logits=round_to(np.clip(rows, None, LARGEST_LOGIT), dtype)))


def draw_linear_case(generator: Generator, dtype: str, num_classes: int | None = None) -> LinearCase:
    """Draw a linear case: the options of a dense one, and a layer of moderate numbers."""
    dense = draw_case(generator, dtype, num_classes or int(generator.choice(LINEAR_SIZES)))
    dense = _take_rows(dense, np.arange(min(len(dense.logits), max(2, LINEAR_ELEMENTS // dense.num_classes))))
    # Where rounding makes another logit the largest, no bound is known.
    options = {**dense.options, "convention": str(generator.choice(CONVENTIONS[:-1]))}
    labels = dense.labels if dense.labels.ndim == 1 else np.argmax(dense.labels, axis=-1)
    dense = _allowed(replace(dense, options=options, labels=labels))
    num_features = int(generator.choice(NUM_FEATURES))
    weight_dtype = str(generator.choice([dtype, compute_dtype(dtype)]))
    scale, of_bias = 10 ** generator.uniform(-1, 1, 2)
    hidden = generator.normal(size=(len(dense.logits), num_features)) * scale
    weight = generator.normal(size=(num_features, dense.num_classes))
    bias = generator.normal(size=dense.num_classes) * of_bias
    given = {each.name: getattr(dense, each.name) for each in fields(dense)}
    layer: dict[str, Any] = {
        "hidden": round_to(hidden, dtype),
        "weight": round_to(weight, weight_dtype),
        "weight_dtype": weight_dtype,
        "bias": round_to(bias, weight_dtype) if generator.random() < 0.8 else None,
        "chunk_size": int(generator.choice([1, 2, 3, 5])),
    }
    return with_logits(LinearCase(**given, **layer))


def _draw_smoothing(generator: Generator, num_classes: int) -> float:
    known = (0.0, 1e-8, 1e-3, 0.1, (num_classes - 1) / num_classes, 1 - 1e-6, 1.0, generator.random())
    return float(generator.choice(known))


def _draw_smoothings(generator: Generator, num_rows: int, num_classes: int, compute: str) -> FloatArray:
    return round_to(np.array([_draw_smoothing(generator, num_classes) for _ in range(num_rows)]), compute)


def _draw_row(generator: Generator, case: Case, i: int) -> FloatArray:
    """Draw the logits of a row: spread, tied, near the optimum, dominated or with infinities, and an offset."""
    num_classes, scale = case.num_classes, 10 ** generator.uniform(-3, 4)
    row = generator.normal(size=num_classes) * scale
    kind = generator.choice(
        ["spread", "spread", "tied", "tied at the top", "optimum", "optimum", "dominated", "infinite"]
    )
    if kind == "tied":
        row = np.round(row / scale) * scale
    if kind == "tied at the top":
        row[generator.integers(num_classes, size=2)] = row.max()
    if kind == "optimum":
        row = _optimum(case, i) + generator.normal(size=num_classes) * 10 ** generator.uniform(-7, 0)
    if kind == "dominated":
        row[generator.integers(num_classes)] = row.max() + 10 ** generator.uniform(-1, 2)
    if kind == "infinite":
        row[generator.random(num_classes) < generator.random()] = -np.inf
    offset = float(generator.choice([0, 0, 1, -1])) * 10 ** generator.uniform(-1, 4)
    return row + offset


def _optimum(case: Case, i: int) -> FloatArray:
    """Return the logits whose softmax is the target."""
    rows = case.rows()
    target = target_distribution(
        int(rows.labels[i]) if rows.labels.ndim == 1 else rows.labels[i].tolist(),
        case.num_classes,
        smoothing=float(rows.smoothing[i]),
        convention=case.options["convention"],
        prior=None if case.prior is None else case.prior.tolist(),
        class_mask=None if case.class_mask is None else case.class_mask.tolist(),
    )
    weight = 1.0 if case.class_weight is None else case.class_weight
    return np.log(np.maximum(np.array(target, np.float64) * weight, 1e-30))


def _allowed(case: Case) -> Case:
    """Mend what no loss allows: options that exclude each other, and labels and prior outside of the mask."""
    options, mask, prior, labels = dict(case.options), case.class_mask, case.prior, case.labels
    if options["convention"] == "max_sup":
        options["subtract_entropy"] = False
    if mask is not None and not mask.any():
        mask = None
    if options["convention"] != "uniform":
        prior = None
    if mask is not None:
        if labels.ndim == 1:
            classes = np.flatnonzero(mask)
            labels = np.where(mask[labels], labels, classes[labels % len(classes)])
        if prior is not None and prior[~mask].any():
            inside = np.where(mask, prior, 0)
            prior = round_to(inside / inside.sum(), compute_dtype(case.dtype)) if inside.any() else None
    upstream = case.upstream if options["reduction"] == "none" else None
    return replace(case, options=options, class_mask=mask, prior=prior, labels=labels, upstream=upstream)


def _finite(case: Case) -> Case:
    """Give each row a finite logit that is allowed: without one there is no softmax."""
    first = 0 if case.class_mask is None else int(np.argmax(case.class_mask))
    allowed = np.isfinite(case.logits) & (True if case.class_mask is None else case.class_mask)
    logits = case.logits.copy()
    logits[~allowed.any(axis=-1), first] = 0.0
    return replace(case, logits=logits)


# --- varying cases ---


def vary_options(generator: Generator, case: Case) -> Case:
    """Return a case that differs in one option, or in its number of classes."""
    arrays = ("labels", "smoothing", "class_weight", "class_mask", "prior", "upstream")
    linear = isinstance(case, LinearCase)
    name = str(generator.choice([*arrays, *case.options, *([] if linear else ["num_classes", "num_classes"])]))
    if name == "num_classes":
        return _vary_size(generator, case)
    other = (draw_linear_case if linear else draw_case)(generator, case.dtype, case.num_classes)
    if name in arrays:
        changed = replace(case, **{name: getattr(other, name)})
    else:
        changed = replace(case, options={**case.options, name: other.options[name]})
    return _finite(_allowed(changed))


def _vary_size(generator: Generator, case: Case) -> Case:
    """Return a case of the next number of classes up or down, its classes and rows taken from `case`."""
    position = SIZES.index(case.num_classes) + int(generator.choice([-1, 1]))
    other = draw_case(generator, case.dtype, SIZES[int(np.clip(position, 0, len(SIZES) - 1))])
    classes = np.sort(generator.integers(case.num_classes, size=other.num_classes))
    rows = generator.integers(len(case.logits), size=len(other.logits))
    labels = other.labels if other.labels.ndim == case.labels.ndim else case.labels[rows] % other.num_classes
    if case.labels.ndim == 2 and other.labels.ndim == 1:
        labels = soft_labels(case.dtype, generator, other.logits.shape)
    prior = None if case.prior is None or not case.prior[classes].any() else case.prior[classes]
    changed = replace(
        case,
        logits=case.logits[np.ix_(rows, classes)],
        labels=labels,
        smoothing=case.smoothing if isinstance(case.smoothing, float) else case.smoothing[rows],
        class_weight=None if case.class_weight is None else case.class_weight[classes],
        class_mask=None if case.class_mask is None else case.class_mask[classes],
        prior=None if prior is None else round_to(prior / prior.sum(), compute_dtype(case.dtype)),
        upstream=None if case.upstream is None else case.upstream[rows],
    )
    return _finite(_allowed(changed))


def vary_rows(generator: Generator, case: Case, shares: FloatArray) -> Case:
    """Return a case whose rows are varied: the best of themselves, the others of one of the best."""
    num_rows = len(case.logits)
    parents = np.arange(num_rows)
    if shares.ndim:
        order = np.argsort(-shares, kind="stable")
        best, others = np.split(order, [math.ceil(ELITE * num_rows)])
        parents[others] = generator.choice(best, size=len(others))
        changed = np.ones(num_rows, bool)
    else:
        # All rows have one share: a few of them at a time, or nothing that was won is kept.
        changed = generator.random(num_rows) < generator.choice([1 / num_rows, 0.1, 0.5])
        changed[generator.integers(num_rows)] = True
    child = _take_rows(case, parents)
    logits, labels = child.logits.copy(), child.labels.copy()
    smoothing = child.smoothing if isinstance(child.smoothing, float) else child.smoothing.copy()
    for i in np.flatnonzero(changed):
        other = generator.integers(num_rows)
        logits[i] = _vary_logits(generator, logits[i], case.logits[other], FORMATS[case.dtype].roundoff)
        if generator.random() < 0.1:
            labels[i] = generator.integers(case.num_classes) if labels.ndim == 1 else case.labels[other]
        if generator.random() < 0.1 and not isinstance(smoothing, float):
            smoothing[i] = _draw_smoothings(generator, 1, case.num_classes, compute_dtype(case.dtype))[0]
    logits = round_to(np.clip(logits, None, LARGEST_LOGIT), case.dtype)
    return _finite(_allowed(replace(child, logits=logits, labels=labels, smoothing=smoothing)))


def vary_layer(generator: Generator, case: LinearCase) -> LinearCase:
    """Return a case that differs in some numbers of hidden, weight or bias."""
    name = str(generator.choice(["hidden", "weight"] if case.bias is None else ["hidden", "weight", "bias"]))
    dtype, values = case.result_dtypes[name], getattr(case, name)
    rows = values.reshape(-1, values.shape[-1])
    changed = generator.random(len(rows)) < generator.choice([1 / len(rows), 0.5, 1.0])
    changed[generator.integers(len(rows))] = True
    varied = rows.copy()
    for i in np.flatnonzero(changed):
        varied[i] = _vary_logits(generator, rows[i], rows[generator.integers(len(rows))], FORMATS[dtype].roundoff)
    varied = np.where(np.abs(varied) < LARGEST_OPERAND, varied, rows).reshape(values.shape)
    return with_logits(replace(case, **dict[str, Any]({name: round_to(varied, dtype)})))


def _vary_logits(generator: Generator, row: FloatArray, other: FloatArray, roundoff: float) -> FloatArray:
    """Change some of the logits in one of the ways that matter to roundings."""
    num_classes = len(row)
    some = generator.random(num_classes) < generator.choice([1 / num_classes, 0.2, 0.5, 1.0])
    some[generator.integers(num_classes)] = True
    match generator.integers(10):
        case 0 | 1 | 2:  # by units of the last place
            steps = generator.integers(-6, 7, num_classes) * generator.choice([1, 100])
            return np.where(some, row * (1 + roundoff * steps), row)
        case 3 | 4:  # by something of any size
            return np.where(some, row + generator.normal(size=num_classes) * 10 ** generator.uniform(-6, 1), row)
        case 5 | 6:  # all gaps: just above a power of two their rounding is largest
            return row * 10 ** generator.normal(scale=10 ** generator.uniform(-3, -0.5))
        case 7:
            return row + generator.normal() * 10 ** generator.uniform(-2, 2)
        case 8:
            return np.where(some, other, row)
        case _:  # a tie, a new largest logit, or an infinity
            finite = row[np.isfinite(row)]
            return np.where(some, generator.choice([generator.choice(finite), finite.max() + 1, -np.inf]), row)


def _take_rows(case: Case, rows: Any) -> Case:
    """Return a case of those rows."""
    names = ("logits", "labels", "smoothing", "upstream", "hidden")
    kept: dict[str, Any] = {name: value for name in names if isinstance(value := getattr(case, name, None), np.ndarray)}
    return replace(case, **{name: value[rows] for name, value in kept.items()})


# --- making a case simpler ---


def shrink(case: Case, keeps: Callable[[Case], bool], tries: int = 300) -> Case:
    """Return a case with as few rows, classes and options as can be while `keeps` says that it shows the same."""
    candidates = _simpler(case)
    for _ in range(tries):
        candidate = next(candidates, None)
        if candidate is None:
            break
        if keeps(candidate):
            case, candidates = candidate, _simpler(candidate)
    return case


def _simpler(case: Case) -> Iterator[Case]:
    """Yield simpler cases, those first that leave out most."""
    num_rows, num_classes = case.logits.shape
    for rows in _parts(num_rows):
        yield _take_rows(case, rows)
    if case.options["reduction"] != "none":
        yield replace(case, options={**case.options, "reduction": "none"})
    for classes in _parts(num_classes):
        if case.labels.ndim == 2 or np.isin(case.labels, classes).all():
            yield from _take_classes(case, classes)
    yield from _plainer(case)
    if isinstance(case, LinearCase):
        if case.bias is not None:
            yield with_logits(replace(case, bias=None))
        return
    for simpler in (case.logits - np.max(case.logits, axis=-1, keepdims=True), np.round(case.logits)):
        logits = round_to(simpler, case.dtype)
        if not np.array_equal(logits, case.logits):
            yield replace(case, logits=logits)


def _plainer(case: Case) -> Iterator[Case]:
    """Yield cases with fewer options."""
    plain: dict[str, Any] = {"z_loss": 0.0, "softcap": None, "subtract_entropy": False, "convention": "uniform"}
    for name, value in plain.items():
        if case.options[name] != value:
            yield replace(case, options={**case.options, name: value})
    for name in ("class_weight", "class_mask", "prior", "upstream"):
        if getattr(case, name) is not None:
            yield replace(case, **dict[str, Any]({name: None}))
    if case.labels.ndim == 2:
        yield _allowed(replace(case, labels=np.argmax(case.labels, axis=-1)))
    if not isinstance(case.smoothing, float):
        yield replace(case, smoothing=float(case.smoothing[0]))
    for smoothing in (0.0, 0.1):
        if np.any(~np.isin(case.smoothing, (0.0, smoothing))):
            yield replace(case, smoothing=smoothing)


def _parts(length: int) -> Iterator[Any]:
    """Yield what is left of a range without one part of it: halves, then quarters, and so on."""
    size = length
    while size > 1:
        size = (size + 1) // 2
        for start in range(0, length, size):
            left = np.delete(np.arange(length), slice(start, start + size))
            if left.size:
                yield left


def _take_classes(case: Case, classes: Any) -> Iterator[Case]:
    """Yield a case of those classes, if there is one."""
    layer = ("weight", "bias") if isinstance(case, LinearCase) else ()
    vectors: dict[str, Any] = {name: getattr(case, name) for name in ("class_weight", "class_mask", "prior", *layer)}
    vectors = {name: None if vector is None else vector[..., classes] for name, vector in vectors.items()}
    if vectors["class_mask"] is not None and not vectors["class_mask"].any():
        return
    if vectors["prior"] is not None:
        if not vectors["prior"].any():
            return
        vectors["prior"] = round_to(vectors["prior"] / vectors["prior"].sum(), compute_dtype(case.dtype))
    labels = case.labels[:, classes] if case.labels.ndim == 2 else np.searchsorted(classes, case.labels)
    yield _finite(replace(case, logits=case.logits[:, classes], labels=labels, **vectors))
