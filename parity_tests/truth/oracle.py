"""The true loss and gradient of a case: `lsce_spec`'s definition, run at 50 digits on the exact bits of the inputs.

A NumPy array of floats cannot hold 50 digits, so each number is kept as an unevaluated sum of two float64 numbers,
which holds 106 bits. For narrow dtypes and more than `WIDE` classes the same definition runs in float64: its error is
2^-29 of that of the results it is compared with. A test compares the two.

A process solves each case once: `solve` remembers truths by the bits of the inputs, the options and the definition.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import Any

import mpmath
import numpy as np
from numpy.typing import NDArray

from lsce_spec import find_convention, loss_row, mean_denominator, target_distribution
from parity_tests.truth.cases import Case
from parity_tests.truth.precision import FloatArray

DIGITS = 50
WIDE = 4096
# Bytes of truths that are remembered; beyond that the one that was used longest ago is forgotten.
MEMORY = 2**27


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
    """What a case should give, and what the bounds need to know about it. Classes last, rows flattened.

    Args:
        loss: row losses of shape [N] for reduction="none", otherwise of shape [].
        gradient: [N, K], of the sum of losses times upstream.
        row_loss: [N], before the reduction.
        factor: [N], what each row's gradient was multiplied with: upstream over denominator.
        target: [N, K], smoothed, not weighted.
        target_size: [N, K], sum of the sizes of what the target is the sum of.
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


def solve(case: Case, maths: Any = None) -> Truth:
    """Return the truth about a case.

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
        with mpmath.workdps(DIGITS):
            truth = _solve(case, maths)
        _memory.add(key, truth)
    return truth


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
    parts = [getattr(truth, each.name) for each in fields(truth)]
    arrays = [array for part in parts for array in ((part.high, part.low) if isinstance(part, Exact) else (part,))]
    return sum(array.nbytes for array in arrays)


def _key(case: Case, maths: Any) -> Hashable:
    """Return everything that a truth depends on: the bits of the inputs, the options, and the definition itself."""
    digest = hashlib.sha256()
    for name in ("logits", "labels", "smoothing", "where", "class_weight", "class_mask", "prior", "upstream"):
        value = getattr(case, name)
        if value is not None:
            array = np.asarray(value)
            digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    options = tuple(sorted((name, value) for name, value in case.options.items() if name != "convention"))
    convention = find_convention(case.options.get("convention", "uniform"))
    definition = (convention, loss_row, target_distribution, mean_denominator)
    return case.axis, digest.digest(), options, definition, id(maths)


def _solve(case: Case, maths: Any) -> Truth:
    rows, options = case.rows(), case.options
    number: Any = float if maths is math else mpmath.mpf

    def vector(values: FloatArray) -> list[Any]:
        return [number(float(v)) for v in values]

    class_weight = None if case.class_weight is None else vector(case.class_weight)
    prior = None if case.prior is None else vector(case.prior)
    class_mask = None if case.class_mask is None else [bool(member) for member in case.class_mask]
    num_rows, num_classes = rows.logits.shape
    labels = [int(v) if v.ndim == 0 else vector(v) for v in rows.labels]

    convention = find_convention(options.get("convention", "uniform"))
    num_allowed = num_classes if class_mask is None else sum(class_mask)

    losses, gradients, targets, target_sizes, probabilities = [], [], [], [], []
    bad = np.zeros(num_rows, bool)
    for i in range(num_rows):
        label, nothing = labels[i], [number(0)] * num_classes
        bad[i] = rows.counted[i] and isinstance(label, int) and not _is_class(label, num_classes, class_mask)
        if bad[i] or not rows.counted[i]:
            filler = number("nan") if bad[i] else number(0)
            losses.append(filler)
            gradients.append([filler if class_mask is None or class_mask[k] else number(0) for k in range(num_classes)])
            targets.append(nothing)
            target_sizes.append(nothing)
            probabilities.append(nothing)
            continue
        smoothing, at_max = number(float(rows.smoothing[i])), number(0)
        if convention.at_max is not None and num_allowed > 1:
            at_max = number(convention.at_max(smoothing, num_allowed))
        target = target_distribution(
            label,
            num_classes,
            smoothing=smoothing,
            convention=convention,
            prior=prior,
            class_mask=class_mask,
        )
        row = loss_row(
            vector(rows.logits[i]),
            target,
            class_weight=class_weight,
            class_mask=class_mask,
            z_loss=number(options.get("z_loss", 0.0)),
            softcap=None if options.get("softcap") is None else number(options["softcap"]),
            subtract_entropy=options.get("subtract_entropy", False),
            at_max=at_max,
            maths=maths,
        )
        losses.append(row.loss)
        gradients.append(row.gradient)
        targets.append(row.target)
        target_sizes.append([abs(q) + abs(new - q) for q, new in zip(target, row.target, strict=True)])
        probabilities.append(row.probabilities)

    reduction = options.get("reduction", "none")
    denominator = number(1)
    if reduction == "mean":
        denominator = options.get("denominator")
        if denominator is None:
            # A bad label has no weight of its own, and counts as a row.
            good = [labels[i] for i in range(num_rows) if not bad[i]]
            denominator = mean_denominator(good, rows.counted[~bad].tolist(), class_weight, maths) + int(bad.sum())
        denominator = number(denominator)
    upstream = [number(float(v)) for v in rows.upstream]
    factor = [u / denominator if denominator else number(0) for u in upstream]
    if reduction == "none":
        loss = losses
    else:
        total = maths.fsum(losses) if num_rows else number(0)
        loss = [total / denominator if denominator else number(0)]
    # Divided by 0 no row counts, not even one that is NaN.
    gradient = [[factor[i] * g if denominator else number(0) for g in gradients[i]] for i in range(num_rows)]
    exact_loss = _exact(loss, (len(loss),))
    return Truth(
        loss=exact_loss if reduction == "none" else Exact(exact_loss.high[0], exact_loss.low[0]),
        gradient=_exact(_flat(gradient), (num_rows, num_classes)),
        row_loss=_exact(losses, (num_rows,)).high,
        factor=_exact(factor, (num_rows,)).high,
        target=_exact(_flat(targets), (num_rows, num_classes)).high,
        target_size=_exact(_flat(target_sizes), (num_rows, num_classes)).high,
        probabilities=_exact(_flat(probabilities), (num_rows, num_classes)).high,
        counted=rows.counted,
        bad=bad,
    )


def _is_class(label: int, num_classes: int, class_mask: list[bool] | None) -> bool:
    return 0 <= label < num_classes and (class_mask is None or class_mask[label])


def _flat(rows: list[list[Any]]) -> list[Any]:
    return [value for row in rows for value in row]


def _exact(numbers: list[Any], shape: tuple[int, ...]) -> Exact:
    high = np.array([float(v) for v in numbers], dtype=np.float64).reshape(shape)
    low = [float(v - h) if math.isfinite(h) else 0.0 for v, h in zip(numbers, high.ravel().tolist(), strict=True)]
    return Exact(high, np.array(low, dtype=np.float64).reshape(shape))
