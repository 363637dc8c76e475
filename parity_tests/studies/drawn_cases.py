"""Cases for the hunt, drawn at random, and variations of a case.

A drawn case has any allowed combination of options; each of its rows is of one character: spread, tied, near the
optimum, dominated, with infinities.
"""

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np

from lsce_spec import target_distribution
from parity_tests.truth.cases import CONVENTIONS, Case, LinearCase, soft_labels
from parity_tests.truth.linear_cases import with_logits
from parity_tests.truth.precision import FORMATS, FloatArray, compute_dtype, round_to

# Block sizes, their neighbours, and primes. Few, since JAX compiles for each shape.
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 1009, 1024, 2047, 4001)
# Number of logits of a case: the oracle takes about as long as one call. At 50 digits it takes 15 times longer.
ELEMENTS = {"float64": 1024, "float32": 8192, "bfloat16": 8192, "float16": 8192}
# The same for linear cases, whose logits are exact sums of products.
LINEAR_SIZES, LINEAR_ELEMENTS, NUM_FEATURES = SIZES[:16], 128, (1, 2, 3, 5, 8, 17)
LARGEST_LOGIT = 6e4  # float16 ends at 65504
LARGEST_OPERAND = 30.0  # of a linear layer
ELITE = 0.1  # share of the rows that the others are made from

Generator = np.random.Generator


def draw_case(generator: Generator, dtype: str, num_classes: int | None = None) -> Case:
    """Draw a case with any allowed combination of options; the rows differ in character."""
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
    case = mended(case)
    rows = [_draw_row(generator, case, i) for i in range(num_rows)]
    return with_finite_logits(replace(case, logits=round_to(np.clip(rows, None, LARGEST_LOGIT), dtype)))


def draw_linear_case(generator: Generator, dtype: str, num_classes: int | None = None) -> LinearCase:
    """Draw a linear case: the options of a dense one, and a layer of moderate numbers."""
    dense = draw_case(generator, dtype, num_classes or int(generator.choice(LINEAR_SIZES)))
    dense = take_rows(dense, np.arange(min(len(dense.logits), max(2, LINEAR_ELEMENTS // dense.num_classes))))
    # Where rounding makes another logit the largest, no bound is known.
    options = {**dense.options, "convention": str(generator.choice(CONVENTIONS[:-1]))}
    labels = dense.labels if dense.labels.ndim == 1 else np.argmax(dense.labels, axis=-1)
    dense = mended(replace(dense, options=options, labels=labels))
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


def mended(case: Case) -> Case:
    """Return the case without options that exclude each other, and without labels or a prior outside the mask."""
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


def with_finite_logits(case: Case) -> Case:
    """Give each row a finite logit that is allowed: without one there is no softmax."""
    first = 0 if case.class_mask is None else int(np.argmax(case.class_mask))
    allowed = np.isfinite(case.logits) & (True if case.class_mask is None else case.class_mask)
    logits = case.logits.copy()
    logits[~allowed.any(axis=-1), first] = 0.0
    return replace(case, logits=logits)


# --- Varying a case ---------------------------------------------------------------------------------------------------


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
    return with_finite_logits(mended(changed))


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
    return with_finite_logits(mended(changed))


def vary_rows(generator: Generator, case: Case, shares: FloatArray) -> Case:
    """Return the case with its rows varied: each of the best rows, and variations of these in place of the others."""
    num_rows = len(case.logits)
    parents = np.arange(num_rows)
    if shares.ndim:
        order = np.argsort(-shares, kind="stable")
        best, others = np.split(order, [math.ceil(ELITE * num_rows)])
        parents[others] = generator.choice(best, size=len(others))
        changed = np.ones(num_rows, bool)
    else:
        # All rows have one share: vary only a few of them, so that most of what was gained is kept.
        changed = generator.random(num_rows) < generator.choice([1 / num_rows, 0.1, 0.5])
        changed[generator.integers(num_rows)] = True
    child = take_rows(case, parents)
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
    return with_finite_logits(mended(replace(child, logits=logits, labels=labels, smoothing=smoothing)))


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


def take_rows(case: Case, rows: Any) -> Case:
    """Return the case with these rows alone."""
    names = ("logits", "labels", "smoothing", "upstream", "hidden")
    kept: dict[str, Any] = {name: value for name in names if isinstance(value := getattr(case, name, None), np.ndarray)}
    return replace(case, **{name: value[rows] for name, value in kept.items()})
