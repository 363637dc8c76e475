"""Are the losses right that are timed? Held against the truth of the harness, on the device, before and as timed.

Four verdicts: "agrees" is within the harness's bounds. "rounded" is within them if each intermediate result of a row
may be rounded to the dtype of the logits, as losses do that compute in bfloat16. "in sequence" is within them, rounded
or not, if sums may be added one term after another: the error of such a sum grows with the number of terms, while the
harness expects sums in blocks. Anything else is "wrong".
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.engines.losses import one_line
from parity_tests.losses.adapters import Adapter
from parity_tests.truth.arithmetic import NARROW, Arithmetic, any_order
from parity_tests.truth.cases import Case, LinearCase, make_case
from parity_tests.truth.comparison import Comparison, bounds_of, error_over_bound, within
from parity_tests.truth.linear_cases import make_linear_case
from parity_tests.truth.oracle import Truth, solve
from parity_tests.truth.precision import FORMATS, FloatArray, compute_dtype, round_to

# What other libraries take as well: integer labels, the mean, the uniform convention.
DENSE_CASES = ("uniform_mean", "near_uniform", "large_offset", "wide")
# What fails here may still be right for usual logits.
HARD_CASES = ("large_offset", "wide")
LINEAR_CASES = ("linear_mean",)
# Tokamax's kernel takes multiples of 1024 rows.
LAYER, QUICK_LAYER = (1024, 128, 1024), (32, 16, 128)
# Different rows of the logits that are timed, so that the truth is known of all.
REPEATED = 8
STATUSES = ("agrees", "rounded", "in sequence", "wrong")  # from best to worst
AGREES, ROUNDED, IN_SEQUENCE, WRONG = STATUSES
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


class Verdict(NamedTuple):
    """How a result compares with the truth.

    Args:
        status: one of the four.
        share: the largest error as a share of the harness's bound.
        reason: what is wrong; empty if nothing is.
        ulps: the error of each entry of the gradient with respect to the logits, in scaled ULPs: see
            `parity_tests.truth.comparison.Comparison`. Empty where it was not computed.
        loss_error: of the loss, relative to it; None where it was not computed.
    """

    status: str
    share: float
    reason: str = ""
    ulps: FloatArray = np.zeros(0)
    loss_error: float | None = None


def make_cases(
    linear: bool, dtype: str, smoothing: float, quick: bool, options: Mapping[str, Any] = NO_OPTIONS
) -> Iterator[Case]:
    """Yield representative cases.

    Args:
        linear: whether they are of a linear layer.
        dtype: of the logits, or of hidden and weight.
        smoothing: of the loss.
        quick: whether to leave out what takes seconds.
        options: of the loss, such as its convention.
    """
    options = {"reduction": "mean", **options}
    if linear:
        yield replace(layer_case(dtype, smoothing, *(QUICK_LAYER if quick else LAYER)), options=options)
        for name in LINEAR_CASES:
            yield replace(make_linear_case(name, dtype), options=options, smoothing=smoothing, chunk_size=None)
        return
    for name in DENSE_CASES[: 3 if quick else None]:
        yield replace(make_case(name, dtype), options=options, smoothing=smoothing, upstream=None)


def layer_case(dtype: str, smoothing: float, rows: int, features: int, classes: int) -> LinearCase:
    """Return a case of a linear layer as large as kernels want it; its logits are those in float64."""
    generator = np.random.default_rng(0)
    hidden = round_to(generator.normal(size=(rows, features)), dtype)
    weight = round_to(generator.normal(size=(features, classes)) / math.sqrt(features), dtype)
    return LinearCase(
        "layer",
        dtype,
        hidden @ weight,
        generator.integers(classes, size=rows),
        {"reduction": "mean"},
        smoothing,
        hidden=hidden,
        weight=weight,
        weight_dtype=dtype,
    )


def timed_rows(dtype: str, smoothing: float, classes: int, options: Mapping[str, Any] = NO_OPTIONS) -> Case:
    """Return the rows that are repeated in what is timed."""
    generator = np.random.default_rng(0)
    logits = round_to(generator.normal(size=(REPEATED, classes)), dtype)
    labels = generator.integers(classes, size=REPEATED)
    return Case("timed", dtype, logits, labels, {"reduction": "mean", **options}, smoothing)


def truth_of(case: Case) -> Truth:
    """Return the truth; that of many logits in float64, whose error is far below any bound of narrower dtypes."""
    many = case.logits.size > 2**14 and case.dtype != "float64"
    return solve(case, math) if many else solve(case)


def check(adapter: Adapter, cases: Sequence[Case]) -> dict[str, Verdict | str]:
    """Return the verdict in each case, by name, or why there is none."""
    return {case.name: _check(adapter, case) for case in cases}


def _check(adapter: Adapter, case: Case) -> Verdict | str:
    try:
        result = adapter(case)
    except Exception as error:  # another library may raise anything
        return one_line(error)
    truth = truth_of(case)
    verdict = _verdict(
        case,
        truth,
        adapter.arithmetic,
        lambda arithmetic: within(case, truth, result, bounds_of(case, truth, arithmetic)),
    )
    of_loss = truth.loss.error_of(result.parts["loss"]) / np.abs(truth.loss.high)
    return verdict._replace(loss_error=float(np.max(of_loss)))


def check_timed(
    case: Case, rows: int, loss: float, gradients: Sequence[NDArray[np.float64]], arithmetic: Arithmetic
) -> Verdict:
    """Return the verdict on what is timed.

    Args:
        case: the rows that are repeated.
        rows: number of all rows.
        loss: the mean over all.
        gradients: the least and the largest gradient of each row of the case, over its copies.
        arithmetic: what the bounds assume.
    """
    truth, times = truth_of(case), rows // REPEATED
    roundoff = FORMATS[compute_dtype(case.dtype)].roundoff

    def compare(arithmetic: Arithmetic) -> Comparison:
        bounds = bounds_of(case, truth, arithmetic)
        more = arithmetic.depth(rows) - arithmetic.depth(REPEATED)
        of_mean = 2 * roundoff * more * float(np.mean(np.abs(truth.row_loss)))
        of_loss = error_over_bound(truth.loss.error_of(np.asarray(loss)), bounds["loss"] + of_mean)
        # A row's gradient is divided by the number of all rows.
        shares = [error_over_bound(truth.gradient.error_of(times * each), bounds["gradient"]) for each in gradients]
        return Comparison({"loss": float(of_loss), "gradient": float(np.max(shares))}, None)

    return _verdict(case, truth, arithmetic, compare)


def _verdict(case: Case, truth: Truth, arithmetic: Arithmetic, compare: Callable[[Arithmetic], Comparison]) -> Verdict:
    comparison = compare(arithmetic)
    # A loss in a narrow dtype is rounded; a wrong shape has no finite share.
    if comparison.share <= 1:
        return Verdict(AGREES, comparison.share, ulps=comparison.ulps)
    rounded = rounding(case, truth, arithmetic)
    if rounded is not None and compare(rounded).share <= 1:
        return Verdict(ROUNDED, comparison.share, ulps=comparison.ulps)
    if compare(replace(rounded or arithmetic, depth=any_order)).share <= 1:
        return Verdict(IN_SEQUENCE, comparison.share, ulps=comparison.ulps)
    part = max(comparison.shares, key=lambda part: comparison.shares[part])
    reason = str(comparison.worst or f"{part}: {comparison.share:.3g} of the bound")
    return Verdict(WRONG, comparison.share, reason, comparison.ulps)


def rounding(case: Case, truth: Truth, arithmetic: Arithmetic) -> Arithmetic | None:
    """Return the arithmetic of a loss that rounds each intermediate result to the dtype of the logits, or None.

    The errors of `Arithmetic` are in units of the compute precision. A log-probability that is stored in a narrower
    dtype is off by its roundoff times its size, and so is what is computed from it. Sums are still added up in the
    compute precision.
    """
    fine, coarse = FORMATS[compute_dtype(case.dtype)].roundoff, FORMATS[case.dtype].roundoff
    if coarse <= fine:
        return None
    with np.errstate(divide="ignore"):
        sizes = -np.log(truth.probabilities)
    size = float(np.max(sizes, where=np.isfinite(sizes), initial=0.0))
    units = coarse / fine
    worse = dict.fromkeys(("exp", "log", "log1p"), units * (2 + size))
    return replace(arithmetic, **worse, division=units, exp_of_log=True, narrow=NARROW)
