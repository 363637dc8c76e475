"""What a published test compares, with a fault of `faults/dense.py` in place of the loss under test.

The reference is the sound loss in float64. If a setting holds fewer rows than the test, the results are scaled to all
N rows of the test:

- A mean over N rows makes gradients 1/N as large, so fewer of them exceed an absolute tolerance.
- A sum or mean over N rows averages errors that differ from row to row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np

from parity_tests.faults.dense import evaluate, smoothed_target
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import Result
from parity_tests.truth.precision import FloatArray, compute_dtype, round_to

# With a mean error of 0, Student's t of four rows is larger than this once in a hundred draws.
SIGNIFICANT = 6.0

# Part -> the result of the loss under test, and the value that the test compares it with.
Compared = Mapping[str, tuple[FloatArray, FloatArray]]
Compare = Callable[["Setting", str | None], Compared]


class Tolerance(NamedTuple):
    """|actual - expected| <= atol + rtol * |expected|, as in torch.allclose and numpy.testing.assert_allclose."""

    rtol: float
    atol: float


@dataclass(frozen=True, eq=False)
class Setting:
    """One choice of a published test's parameters.

    Args:
        test: name of the test function.
        logits: distribution of its logits, for the table.
        case: its inputs.
        compare: returns the compared values.
        loss, gradient: tolerances; None if the test does not compare this part. Targets use that of the loss.
        rows: number of rows of the test, if the case holds fewer.
        counted: number of these rows that are not ignored.
    """

    test: str
    logits: str
    case: Case
    compare: Compare
    loss: Tolerance | None = None
    gradient: Tolerance | None = None
    rows: int | None = None
    counted: int | None = None


@dataclass(frozen=True)
class PeerTest:
    """The label-smoothing tests in one file of a library.

    Args:
        name: the name in the tables.
        repository, path, commit: the file that was read.
        make_settings: makes the settings that are judged.
    """

    name: str
    repository: str
    path: str
    commit: str
    make_settings: Callable[[], tuple[Setting, ...]]


def with_reference(setting: Setting, fault: str | None) -> Compared:
    """Compare loss and gradient with a reference implementation or with values worked out by hand."""
    return _of_all_rows(setting, fault, result_of(setting, fault), _expected(setting))


def squared_with_reference(setting: Setting, fault: str | None) -> Compared:
    """Compare the squared loss with a reference; its incoming gradient is twice the loss."""
    upstream = 2 * result_of(setting, fault).loss
    wrong = evaluate(replace(setting.case, upstream=upstream), fault)
    compared = _of_all_rows(setting, fault, wrong, _expected(setting))
    actual, expected = compared["loss"]
    return {**compared, "loss": (actual**2, expected**2)}


def with_own_differences(setting: Setting, fault: str | None) -> Compared:
    """Compare the gradient with central differences of the loss under test: torch.autograd.gradcheck."""
    case, step = setting.case, 1e-6
    differences = np.zeros_like(case.logits)
    for index in np.ndindex(case.logits.shape):
        sides = []
        for sign in (1, -1):
            logits = case.logits.copy()
            logits[index] += sign * step
            result = evaluate(replace(case, logits=logits), fault)
            sides.append(np.sum(result.loss * (1.0 if case.upstream is None else case.upstream)))
        differences[index] = (sides[0] - sides[1]) / (2 * step)
    return {"gradient": (evaluate(case, fault).gradient, differences)}


def whole_with_parts(setting: Setting, fault: str | None) -> Compared:
    """Compare the sum over two sentences, one of them padded, with the sums over each without padding."""
    case = setting.case
    counted, first = case.rows().counted, np.arange(len(case.labels)) < len(case.labels) // 2
    parts = [replace(case, logits=case.logits[rows], labels=case.labels[rows]) for rows in (counted & first, ~first)]
    total = np.sum([evaluate(part, fault).loss for part in parts])
    return {"loss": (evaluate(case, fault).loss, total)}


def sum_with_rows(setting: Setting, fault: str | None) -> Compared:
    """Compare the sum with the sum of the losses of the rows."""
    return {"loss": (evaluate(setting.case, fault).loss, evaluate(_unreduced(setting.case), fault).loss.sum())}


def unsmoothed_with_plain(setting: Setting, fault: str | None) -> Compared:
    """Compare the loss with smoothing 0 with plain cross-entropy."""
    case = replace(setting.case, smoothing=0.0)
    return {"loss": (evaluate(case, fault).loss, reference(case).loss)}


def targets(setting: Setting, fault: str | None) -> Compared:
    """Compare the smoothed targets with values worked out by hand; no loss is computed."""
    case = setting.case
    everywhere, dtype = np.ones(case.num_classes, bool), np.dtype(np.float32)
    actual, expected = (smoothed_target(case, case.labels, everywhere, dtype, each) for each in (fault, None))
    return {"target": (actual, expected)}


def reference(case: Case) -> Result:
    """Return the sound result, computed in float64 and rounded to the dtypes of the case's result."""
    result, compute = evaluate(replace(case, dtype="float64")), compute_dtype(case.dtype)
    return Result(round_to(result.loss, compute), round_to(result.gradient, case.dtype), compute, case.dtype)


def _unreduced(case: Case) -> Case:
    return replace(case, options={**case.options, "reduction": "none"})


def _of_all_rows(setting: Setting, fault: str | None, actual: Result, expected: Result) -> Compared:
    """Return the results scaled to all rows of the test."""
    case, reduction = setting.case, setting.case.options.get("reduction", "none")
    losses, gradients = (actual.loss, expected.loss), (actual.gradient, expected.gradient)
    if setting.counted is None or reduction == "none":
        return {"loss": losses, "gradient": gradients}
    more = setting.counted / int(case.rows().counted.sum())
    if reduction == "mean":
        gradients = (round_to(gradients[0] / more, case.dtype), round_to(gradients[1] / more, case.dtype))
    return {"loss": _loss_of_all_rows(setting, fault, losses, more), "gradient": gradients}


def _loss_of_all_rows(
    setting: Setting, fault: str | None, losses: tuple[FloatArray, FloatArray], more: float
) -> tuple[FloatArray, FloatArray]:
    """Return a mean or sum with the error it would typically have over `more` times as many rows.

    Rows are drawn independently: the squared error of a mean is the squared bias plus variance / rows. A bias that
    is not significant in these few rows counts as 0.
    """
    case, (actual, expected) = setting.case, losses
    counted = case.rows().counted
    rows = _expected_rows(setting)[counted]
    errors = evaluate(_unreduced(case), fault).loss[counted] - rows
    error = actual - expected
    if np.isfinite(error) and np.isfinite(errors).all():
        variance = errors.var(ddof=1) * len(rows) / (rows.sum() / expected) ** 2
        bias = error if error**2 > SIGNIFICANT**2 * variance else 0.0
        error = np.sqrt(bias**2 + variance / more)
    scale = more if case.options["reduction"] == "sum" else 1.0
    return scale * (expected + error), scale * expected


@lru_cache(maxsize=1)
def result_of(setting: Setting, fault: str | None) -> Result:
    """Return loss and gradient with a fault, or of the sound loss."""
    return evaluate(setting.case, fault)


@cache
def _expected(setting: Setting) -> Result:
    return reference(setting.case)


@cache
def _expected_rows(setting: Setting) -> FloatArray:
    return reference(_unreduced(setting.case)).loss
