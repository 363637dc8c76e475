"""The true loss and gradients of a case: `lsce_spec`'s definition, run at 50 digits on the exact bits of the inputs.

A NumPy array of floats cannot hold 50 digits, so each number is kept as an unevaluated sum of two float64 numbers,
which holds 106 bits. For narrower dtypes and more than `WIDE` classes the same definition runs in float64: its error
is 2^-29 of the error of the results it is compared with. A test compares the two.

The logits of a linear layer are computed at 50 digits too. Rounded to float64 they are the logits of a dense case, and
the gradients with respect to hidden, weight and bias are exact sums of products with the gradient of that case.

A process solves each case once: `solve` caches truths by the bits of the inputs, the options and the definition. The
command line caches slow ones on disk too: see `stored.py`.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import mpmath
import numpy as np
from numpy.typing import NDArray

from lsce_spec import find_convention, loss_row, mean_denominator, target_distribution
from parity_tests.truth.cases import Case, LinearCase, is_class
from parity_tests.truth.precision import FloatArray

DIGITS = 50
WIDE = 4096
# Bytes of the cache of truths; beyond that the truth that was used longest ago is dropped.
MEMORY = 2**27
_ARRAYS = (
    *("logits", "labels", "smoothing", "where", "class_weight", "class_mask", "prior", "upstream"),
    *("hidden", "weight", "bias"),
)


@dataclass(frozen=True)
class Exact:
    """Numbers as unevaluated sums of two float64 arrays."""

    high: FloatArray
    low: FloatArray

    def error_of(self, values: FloatArray) -> FloatArray:
        """Return |values - exact|; 0 where both are the same infinity or both NaN, inf where only one is."""
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.abs((values - self.high) - self.low)
        same = (values == self.high) | (np.isnan(values) & np.isnan(self.high))
        same &= ~np.isfinite(self.high)
        finite = np.isfinite(values) & np.isfinite(self.high)
        return np.where(finite, difference, np.where(same, 0.0, np.inf))


@dataclass(frozen=True)
class Truth:
    """The true loss and gradient of a case, and what the bounds are computed from. Classes last, rows flattened.

    Args:
        loss: row losses of shape [N] for reduction="none", otherwise of shape [].
        gradient: [N, K], of the sum of the losses times the incoming gradient.
        row_loss: [N], before the reduction.
        factor: [N], factor of each row's gradient: the incoming gradient over the denominator.
        target: [N, K], smoothed, not weighted.
        target_size: [N, K], sum of the absolute values of the terms of the target.
        probabilities: [N, K], softmax.
        counted: [N], rows that count.
        bad: [N], rows whose label is no class.
    """

    loss: Exact
    gradient: Exact
    row_loss: FloatArray
    factor: FloatArray
    target: FloatArray
    target_size: FloatArray
    probabilities: FloatArray
    counted: NDArray[np.bool_]
    bad: NDArray[np.bool_]

    @property
    def parts(self) -> dict[str, Exact]:
        """What a result is held against, by part."""
        return {"loss": self.loss, "gradient": self.gradient}


@dataclass(frozen=True, kw_only=True)
class LinearTruth(Truth):
    """The truth about a linear case: gradients with respect to hidden [N, D], weight [D, K] and bias [K], if any."""

    hidden: Exact
    weight: Exact
    bias: Exact | None

    @property
    def parts(self) -> dict[str, Exact]:
        """What a result is held against, by part."""
        parts = {"loss": self.loss, "hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {part: exact for part, exact in parts.items() if exact is not None}


def solve(case: Case, maths: Any = None) -> Truth:
    """Return the true loss and gradients of a case.

    Args:
        case: the inputs.
        maths: the maths module to run the definition with; by default mpmath's at 50 digits, or float64 where that
            is known to be enough.
    """
    if maths is None:
        wide = case.num_classes > WIDE and case.dtype != "float64"
        maths = math if wide else mpmath.mp
    key = _key(case, maths)
    truth = _memory.find(key)
    if truth is None:
        compute = partial(_compute, case, maths)
        truth = compute() if disk is None else disk.find_or_compute(case, maths, compute)
        _memory.add(key, truth)
    return truth


class Disk(Protocol):
    """Where truths are kept for other processes."""

    def find_or_compute(self, case: Case, maths: Any, compute: Callable[[], Truth]) -> Truth:
        """Return the truth about a case that is kept, or else of `compute`."""
        ...


# None: each process computes its own. See `stored.py`.
disk: Disk | None = None


def _compute(case: Case, maths: Any) -> Truth:
    with mpmath.workdps(DIGITS):
        truth = _solve(case, maths)
        return _with_layer(case, truth, maths is math) if isinstance(case, LinearCase) else truth


class _Memory:
    """Truths by key, up to `MEMORY` bytes."""

    def __init__(self) -> None:
        self.truths: OrderedDict[Hashable, Truth] = OrderedDict()
        self.bytes = 0

    def find(self, key: Hashable) -> Truth | None:
        if key in self.truths:
            self.truths.move_to_end(key)
        return self.truths.get(key)

    def add(self, key: Hashable, truth: Truth) -> None:
        self.truths[key] = truth
        self.bytes += _size(truth)
        while self.bytes > MEMORY:
            self.bytes -= _size(self.truths.popitem(last=False)[1])


_memory = _Memory()


def _size(truth: Truth) -> int:
    parts = [part for part in vars(truth).values() if part is not None]
    arrays = [array for part in parts for array in ((part.high, part.low) if isinstance(part, Exact) else (part,))]
    return sum(array.nbytes for array in arrays)


def _key(case: Case, maths: Any) -> Hashable:
    """Return everything that a truth depends on: the bits of the inputs, the options, and the definition itself."""
    options = tuple(sorted((name, value) for name, value in case.options.items() if name != "convention"))
    convention = find_convention(case.options.get("convention", "uniform"))
    definition = (convention, loss_row, target_distribution, mean_denominator)
    return case.dtype, case.axis, digest_of_arrays(case), options, definition, id(maths)


def digest_of_arrays(case: Case) -> bytes:
    """Return the SHA-256 of the names, dtypes, shapes and bits of a case's arrays."""
    digest = hashlib.sha256()
    for name in _ARRAYS:
        value = getattr(case, name, None)
        if value is not None:
            array = np.asarray(value)
            digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.digest()


def _with_layer(case: LinearCase, truth: Truth, in_float64: bool) -> LinearTruth:
    """Return the truth with the gradients with respect to the operands of the layer."""
    # The values of a row that does not count reach no gradient.
    hidden = np.where(truth.counted[:, None], case.hidden_rows, 0.0)
    if in_float64:
        gradient = truth.gradient.high
        products = (gradient @ case.multiplied_weight.T, hidden.T @ gradient, gradient.sum(axis=0))
        of_hidden, of_weight, of_bias = (Exact(product, np.zeros_like(product)) for product in products)
    else:
        of_hidden, of_weight, of_bias = _exact_products(case, truth, hidden)
    bias = None if case.bias is None else of_bias
    return LinearTruth(**vars(truth), hidden=of_hidden, weight=of_weight, bias=bias)


def _exact_products(case: LinearCase, truth: Truth, hidden: FloatArray) -> tuple[Exact, Exact, Exact]:
    halves = zip(truth.gradient.high.tolist(), truth.gradient.low.tolist(), strict=True)
    rows = [[mpmath.mpf(high) + mpmath.mpf(low) for high, low in zip(*pair, strict=True)] for pair in halves]
    of_classes = [[row[k] for row in rows] for k in range(case.num_classes)]
    sums = _products([[1.0] * len(hidden)], of_classes)
    of_hidden = _products(rows, case.multiplied_weight.tolist())
    return of_hidden, _products(hidden.T.tolist(), of_classes), Exact(sums.high[0], sums.low[0])


def true_logits(hidden: FloatArray, weight: FloatArray, bias: FloatArray | None) -> FloatArray:
    """Return hidden @ weight + bias for hidden [..., D], each rounded once, to float64."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    extended = rows if bias is None else np.concatenate([rows, np.ones((len(rows), 1))], axis=-1)
    columns = weight if bias is None else np.concatenate([weight, bias[None]], axis=0)
    with mpmath.workdps(DIGITS):
        logits = _products(extended.tolist(), columns.T.tolist()).high
    return logits.reshape(*hidden.shape[:-1], weight.shape[1])


def _products(rows: list[list[Any]], columns: list[list[Any]]) -> Exact:
    """Return the inner product of each row with each column."""
    return exact([mpmath.fdot(row, column) for row in rows for column in columns], (len(rows), len(columns)))


class _Inputs(NamedTuple):
    """The inputs of the definition as numbers of `maths`, made by `number`. Each row has a label or probabilities."""

    maths: Any
    number: Any
    labels: list[Any]
    class_weight: list[Any] | None
    prior: list[Any] | None
    class_masks: list[list[bool]] | None

    def mask(self, i: int) -> list[bool] | None:
        return None if self.class_masks is None else self.class_masks[i]

    def vector(self, values: FloatArray) -> list[Any]:
        return [self.number(float(v)) for v in values]


class _Row(NamedTuple):
    """The truth about one row: its loss, and what else the bounds need, by class."""

    loss: Any
    gradient: list[Any]
    target: list[Any]
    target_size: list[Any]
    probabilities: list[Any]


def _solve(case: Case, maths: Any) -> Truth:
    rows, inputs = case.rows(), _inputs(case, maths)
    shape, zero = rows.logits.shape, inputs.number(0)
    bad = rows.counted & ~is_class(rows) if rows.labels.ndim == 1 else np.zeros(shape[0], bool)
    solved = [
        _solve_row(case, inputs, i) if rows.counted[i] and not bad[i] else _constant_row(inputs, shape[1], i, bad[i])
        for i in range(shape[0])
    ]
    losses = [row.loss for row in solved]
    denominator = _denominator(case, inputs, bad)
    factor = [u / denominator if denominator else zero for u in inputs.vector(rows.upstream)]
    if case.options.get("reduction", "none") == "none":
        loss = exact(losses, shape[:1])
    else:
        total = maths.fsum(losses) if losses else zero
        loss = exact([total / denominator if denominator else zero], ())
    # Divided by 0 no row counts, not even one that is NaN.
    gradient = [[f * g if denominator else zero for g in row.gradient] for f, row in zip(factor, solved, strict=True)]
    return Truth(
        loss=loss,
        gradient=exact(_flat(gradient), shape),
        row_loss=exact(losses, shape[:1]).high,
        factor=exact(factor, shape[:1]).high,
        target=exact(_flat([row.target for row in solved]), shape).high,
        target_size=exact(_flat([row.target_size for row in solved]), shape).high,
        probabilities=exact(_flat([row.probabilities for row in solved]), shape).high,
        counted=rows.counted,
        bad=bad,
    )


def _inputs(case: Case, maths: Any) -> _Inputs:
    number: Any = float if maths is math else mpmath.mpf
    inputs = _Inputs(maths, number, [], None, None, None)
    return inputs._replace(
        labels=[int(v) if v.ndim == 0 else inputs.vector(v) for v in case.rows().labels],
        class_weight=None if case.class_weight is None else inputs.vector(case.class_weight),
        prior=None if case.prior is None else inputs.vector(case.prior),
        class_masks=None if case.class_mask is None else case.rows().allowed.tolist(),
    )


def _solve_row(case: Case, inputs: _Inputs, i: int) -> _Row:
    """Return the truth about row i, which counts and has a label that is a class."""
    number, options, class_mask = inputs.number, case.options, inputs.mask(i)
    convention = find_convention(options.get("convention", "uniform"))
    num_allowed = case.num_classes if class_mask is None else sum(class_mask)
    smoothing, at_max = number(float(case.rows().smoothing[i])), number(0)
    if convention.at_max is not None and num_allowed > 1:
        at_max = number(convention.at_max(smoothing, num_allowed))
    target = target_distribution(
        inputs.labels[i],
        case.num_classes,
        smoothing=smoothing,
        convention=convention,
        prior=inputs.prior,
        class_mask=class_mask,
    )
    row = loss_row(
        inputs.vector(case.rows().logits[i]),
        target,
        class_weight=inputs.class_weight,
        class_mask=class_mask,
        z_loss=number(options.get("z_loss", 0.0)),
        softcap=None if options.get("softcap") is None else number(options["softcap"]),
        subtract_entropy=options.get("subtract_entropy", False),
        at_max=at_max,
        maths=inputs.maths,
    )
    target_size = [abs(q) + abs(new - q) for q, new in zip(target, row.target, strict=True)]
    return _Row(row.loss, row.gradient, row.target, target_size, row.probabilities)


def _constant_row(inputs: _Inputs, num_classes: int, i: int, is_bad: bool) -> _Row:
    """Return the truth about row i, whose loss depends on no logit: NaN if its label is no class, else 0."""
    zero, class_mask = inputs.number(0), inputs.mask(i)
    filler, zeros = inputs.number("nan") if is_bad else zero, [zero] * num_classes
    gradient = [filler if class_mask is None or class_mask[k] else zero for k in range(num_classes)]
    return _Row(filler, gradient, zeros, zeros, zeros)


def _denominator(case: Case, inputs: _Inputs, bad: NDArray[np.bool_]) -> Any:
    """Return what the sum of the losses is divided by; 1 unless they are averaged."""
    if case.options.get("reduction", "none") != "mean":
        return inputs.number(1)
    denominator = case.options.get("denominator")
    if denominator is None:
        # A bad label has no weight of its own, and counts as a row.
        good = [label for label, is_bad in zip(inputs.labels, bad, strict=True) if not is_bad]
        counted = case.rows().counted[~bad].tolist()
        denominator = mean_denominator(good, counted, inputs.class_weight, inputs.maths) + int(bad.sum())
    return inputs.number(denominator)


def _flat(rows: list[list[Any]]) -> list[Any]:
    return [value for row in rows for value in row]


def exact(numbers: list[Any], shape: tuple[int, ...]) -> Exact:
    """Return numbers of any precision as an array of that shape."""
    high = np.array([float(v) for v in numbers], dtype=np.float64).reshape(shape)
    low = [float(v - h) if math.isfinite(h) else 0.0 for v, h in zip(numbers, high.ravel().tolist(), strict=True)]
    return Exact(high, np.array(low, dtype=np.float64).reshape(shape))
