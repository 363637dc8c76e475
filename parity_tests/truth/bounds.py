"""Bounds of the rounding error of a correct implementation, for each element, computed from the data.

First-order bounds. u is the unit roundoff of the compute precision, h the depth of a sum over the classes. c_e, c_l,
c_t and c_d are the errors of exp, log1p, tanh and of a quotient in units of u; a quotient that is rounded correctly has
c_d = 1 and is one of the roundings that are counted below, and the code adds c_d - 1. With d_k = max z - z_k,
p = softmax, s = sum exp(-d), L = log s:

- A gap d_k is one rounded difference: its error is u d_k plus the error of the softcap. So exp(-d_k) has the relative
  error e_k = c_e u + (error of d_k). The largest term is exactly 1 and left out of the sum: the rest s - 1 has the
  error h u (s - 1) + sum_k exp(-d_k) e_k, and L = log1p(s - 1) has 1/s of that, plus c_l u L.
- The loss is S L + sum_k w_k q_k d_k, all terms >= 0. A target has up to 3 roundings (smoothing, division, addition),
  its weight one, the product with the gap one, the sum h: (h + 6) u of each term, plus the errors of the gaps.
- A gradient entry is factor * (S p_k - w_k q_k). p_k has the relative error of exp(-d_k) and of s, and 6 u for the sum
  with 1, the division and the products; q_k has 7 u; the difference 4 u of itself.

Terms for z_loss, softcap and entropy are derived at their lines. After Blanchard, Higham & Higham, "Accurately
computing the log-sum-exp and softmax functions", IMA J. Numer. Anal. 41 (2021), for the shifted form.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.cases import Case
from parity_tests.truth.oracle import Truth
from parity_tests.truth.precision import FORMATS, FloatArray, compute_dtype


@dataclass(frozen=True)
class Bound:
    """Largest error of a correct implementation: of the loss, and [N, K] of its gradient, classes last."""

    loss: FloatArray
    gradient: FloatArray

    @property
    def parts(self) -> dict[str, FloatArray]:
        """The bounds by part of the result."""
        return {"loss": self.loss, "gradient": self.gradient}


def error_bound(case: Case, truth: Truth, arithmetic: Arithmetic) -> Bound:
    """Return the bound for a correct implementation of `case` on a device of that arithmetic."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return _error_bound(case, truth, arithmetic)


@dataclass(frozen=True)
class Terms:
    """The exact quantities of the formula, [N, K] or [N], and the precision: see the module's docstring.

    Args:
        u, tiny: unit roundoff and smallest normal number of the compute precision.
        h: depth of a sum over the classes.
        allowed: [N, K], classes of the mask.
        live: [N], rows that count and whose label is a class.
        raw, logits: [N, K], before and after the softcap.
        peak: [N], the largest logit.
        gap: [N, K], peak - logits.
        finite_gap: the gap, 0 where it is infinite.
        log_sum: [N], log sum exp(-gap).
        signed_wq: [N, K], target times class weight.
        wq: [N, K], its size.
        mass: [N], the sum of wq.
    """

    u: float
    tiny: float
    h: int
    allowed: NDArray[np.bool_]
    live: NDArray[np.bool_]
    raw: FloatArray
    logits: FloatArray
    peak: FloatArray
    gap: FloatArray
    finite_gap: FloatArray
    log_sum: FloatArray
    signed_wq: FloatArray
    wq: FloatArray
    mass: FloatArray

    @property
    def lse(self) -> FloatArray:
        """Log-sum-exp [N]."""
        return self.peak + self.log_sum


class Errors(NamedTuple):
    """Absolute errors of the largest logit [N], of the gaps [N, K], of L and of log-sum-exp [N]."""

    peak: FloatArray
    gap: FloatArray
    log_sum: FloatArray
    lse: FloatArray


def _error_bound(case: Case, truth: Truth, arithmetic: Arithmetic) -> Bound:
    terms, errors = terms_and_errors(case, truth, arithmetic)
    row = _row_bound(case, truth, arithmetic, terms, errors)
    gradient = _gradient_bound(case, truth, arithmetic, terms, errors)
    second_order = 1 + 2 * terms.u * _largest_error(case, arithmetic)
    factor = np.abs(truth.factor)[:, None]
    gradient = second_order * factor * gradient
    weight_depth = arithmetic.depth(len(truth.counted)) + 2
    gradient += terms.u * weight_depth * np.abs(truth.gradient.high) if case.class_weight is not None else 0.0
    # Products may be flushed to zero once or twice on the way, and exp before it is multiplied.
    coefficient = _coefficient(case, terms)
    flushed = (2 + factor * (1 + coefficient)) * terms.tiny
    gradient = np.where(terms.allowed & terms.live[:, None], gradient + flushed, 0.0)
    gradient = gradient + last_rounding(truth.gradient.high, case.dtype, gradient)
    return Bound(loss=_reduced(case, truth, second_order * row, arithmetic), gradient=gradient)


def terms_and_errors(case: Case, truth: Truth, arithmetic: Arithmetic) -> tuple[Terms, Errors]:
    """Return the exact quantities of the formula, and the errors on the way to log-sum-exp."""
    terms = _terms(case, truth, arithmetic)
    return terms, _errors(case, truth, arithmetic, terms)


def softcap_slope(case: Case, terms: Terms, arithmetic: Arithmetic) -> tuple[FloatArray, FloatArray]:
    """Return the derivative of the softcap [N, K] and its error; 1 and 0 without one.

    1 - tanh^2 is formed from a tanh that is off by c_t u: an absolute error, however small the derivative.
    """
    softcap = case.options.get("softcap")
    if softcap is None:
        return np.ones_like(terms.raw), np.zeros_like(terms.raw)
    error = terms.u * (2 * arithmetic.tanh + 2 * arithmetic.division + 4)
    return 1 - np.tanh(terms.raw / softcap) ** 2, np.full_like(terms.raw, error)


def _largest_error(case: Case, arithmetic: Arithmetic) -> float:
    """Return the largest error of an operation of the loss.

    First-order bounds leave out products of two errors, which show where exp is 100 u off.
    """
    names = ["exp", "log1p", "division"]
    names += ["tanh"] if case.options.get("softcap") is not None else []
    names += ["log"] if case.options.get("subtract_entropy") else []
    return max(float(getattr(arithmetic, name)) for name in names)


def _terms(case: Case, truth: Truth, arithmetic: Arithmetic) -> Terms:
    fmt, num_classes, softcap = FORMATS[compute_dtype(case.dtype)], case.num_classes, case.options.get("softcap")
    # All classes of a row without a bound: its mask may have none.
    live = truth.counted & ~truth.bad
    allowed = case.rows().allowed | ~live[:, None]
    raw = np.where(allowed & live[:, None], case.rows().logits, 0.0)
    logits = raw if softcap is None else softcap * np.tanh(raw / softcap)
    peak = np.max(np.where(allowed, logits, -np.inf), axis=-1, initial=-np.inf, keepdims=True)
    gap = np.where(allowed, peak - logits, 0.0)
    below = np.where(allowed & (gap > 0), np.exp(-gap), 0.0)
    weight = 1.0 if case.class_weight is None else case.class_weight
    wq = truth.target_size * np.abs(weight)
    return Terms(
        u=fmt.roundoff,
        tiny=fmt.smallest_normal,
        h=arithmetic.depth(num_classes),
        allowed=allowed,
        live=live,
        raw=raw,
        logits=logits,
        peak=peak[:, 0],
        gap=gap,
        # A class of logit -inf has p = 0 exactly, and makes the loss infinite if it is a target: no bound is needed.
        finite_gap=np.where(np.isfinite(gap), gap, 0.0),
        # The brackets matter: (tiny + 1) - 1 is 0.
        log_sum=np.log1p(np.sum(below, axis=-1) + (np.sum(allowed & (gap == 0), axis=-1) - 1)),
        signed_wq=truth.target * weight,
        wq=wq,
        mass=np.sum(wq, axis=-1),
    )


def _errors(case: Case, truth: Truth, arithmetic: Arithmetic, terms: Terms) -> Errors:
    """Return the errors on the way to log-sum-exp."""
    u, logits, log_sum = terms.u, terms.logits, terms.log_sum
    # c tanh(z / c): the division is damped by tanh's own conditioning, which is at most 1; then c_t, and the product.
    cap_error = 0.0 if case.options.get("softcap") is None else u * (arithmetic.tanh + arithmetic.division + 1)
    of_peak = np.where(np.isfinite(terms.peak), cap_error * np.abs(terms.peak), 0.0)
    of_logits = np.where(np.isfinite(logits), cap_error * np.abs(logits), 0.0)
    of_gap = u * terms.finite_gap + of_logits + of_peak[:, None]
    # The largest term is exactly 1 and left out; only the rest of the sum is rounded, and small losses stay accurate.
    rest = -np.expm1(-log_sum)
    rest_error = np.sum(np.where(terms.gap > 0, truth.probabilities * of_gap, 0.0), axis=-1)
    of_log_sum = u * ((terms.h + arithmetic.exp) * rest + arithmetic.log1p * log_sum) + rest_error
    of_log_sum = of_log_sum + case.num_classes * terms.tiny
    return Errors(of_peak, of_gap, of_log_sum, lse=of_log_sum + of_peak + u * np.abs(terms.lse))


def _row_bound(case: Case, truth: Truth, arithmetic: Arithmetic, terms: Terms, errors: Errors) -> FloatArray:
    """Return [N]: the bound of each row's loss."""
    u, h, z_loss, lse = terms.u, terms.h, case.options.get("z_loss", 0.0), terms.lse
    division = arithmetic.division - 1
    products = np.sum(terms.wq * terms.finite_gap, axis=-1)
    row = np.sum(terms.wq * errors.gap, axis=-1) + u * (h + 6 + division) * products
    row += terms.mass * errors.log_sum + u * (h + 5 + division) * terms.mass * terms.log_sum
    magnitude = products + terms.mass * terms.log_sum
    if z_loss:
        # (peak + L)^2: the sum rounds once, the square and the product once each. Where peak and L cancel, the square
        # of the error is most of it.
        row += z_loss * (2 * np.abs(lse) * errors.lse + errors.lse**2 + 3 * u * lse**2)
        magnitude += z_loss * lse**2
    if case.options.get("subtract_entropy"):
        # q log q with q off by 3 u: the logarithm's error, the product, the sum, and the change of q log q itself.
        q = truth.target
        log_q = np.log(np.where(q > 0, q, 1.0))
        entropy = np.sum(np.abs(q * log_q), axis=-1)
        row += u * ((h + arithmetic.log + 2) * entropy + (3 + division) * np.sum(q * np.abs(log_q + 1), axis=-1))
        magnitude += entropy
    row += 3 * u * magnitude + case.num_classes * terms.tiny
    return np.where(terms.live, row, 0.0)


def _coefficient(case: Case, terms: Terms) -> FloatArray:
    """Return [N, 1]: the size of what p is multiplied by in the gradient."""
    return np.asarray((terms.mass + 2 * case.options.get("z_loss", 0.0) * np.abs(terms.lse))[:, None])


def _gradient_bound(case: Case, truth: Truth, arithmetic: Arithmetic, terms: Terms, errors: Errors) -> FloatArray:
    """Return [N, K]: the bound of the gradient of each row's loss, before the factor of the reduction."""
    u, h, p, lse, signed_wq = terms.u, terms.h, truth.probabilities, terms.lse, terms.signed_wq
    z_loss, softcap = case.options.get("z_loss", 0.0), case.options.get("softcap")
    division = arithmetic.division - 1
    # Relative error of p_k beyond that of its own gap, then absolute errors of S p_k and of the z-loss term.
    of_p = errors.gap + np.sum(p * errors.gap, axis=-1, keepdims=True) + u * (h + 2 * arithmetic.exp + 6 + division)
    if arithmetic.exp_of_log:
        of_p = of_p + errors.log_sum[:, None] + u * (terms.finite_gap + terms.log_sum[:, None])
    gradient: FloatArray = _coefficient(case, terms) * p * (of_p + u * (h + 8 + division))
    gradient += (7 + division) * u * terms.wq
    if z_loss:
        gradient += (2 * z_loss * (errors.lse + 2 * u * np.abs(lse)))[:, None] * p
    unscaled = np.abs((np.sum(signed_wq, axis=-1) + 2 * z_loss * lse)[:, None] * p - signed_wq)
    gradient += (4 + division) * u * unscaled
    if softcap is not None:
        slope, slope_error = softcap_slope(case, terms, arithmetic)
        # Where tanh rounds to 1 the slope is nothing but error, and so are both factors where p and q are equal.
        gradient = gradient * (slope + slope_error) + unscaled * slope_error
    return gradient


def _reduced(case: Case, truth: Truth, row: FloatArray, arithmetic: Arithmetic) -> FloatArray:
    """Carry the bounds of the row losses through the reduction."""
    reduction = case.options.get("reduction", "none")
    if reduction == "none":
        return row
    u = FORMATS[compute_dtype(case.dtype)].roundoff
    finite = np.where(np.isfinite(truth.row_loss), np.abs(truth.row_loss), 0.0)
    depth = arithmetic.depth(row.size)
    # The denominator is a sum of class weights, of the same depth, and the division rounds.
    relative = u * depth if reduction == "sum" else u * (2 * depth + 2 + arithmetic.division)
    total = np.sum(row) + relative * np.sum(finite)
    if reduction == "sum":
        return np.asarray(total)
    scale = np.max(np.abs(truth.factor), initial=0.0) / _largest_upstream(case)
    return np.asarray(total * scale)


def _largest_upstream(case: Case) -> float:
    return float(np.max(np.abs(case.rows().upstream), initial=0.0)) or 1.0


def last_rounding(values: FloatArray, dtype: str, error: FloatArray | float = 0.0) -> FloatArray:
    """Return half a unit in the last place of a narrow result; 0 where the result is stored in the compute dtype.

    Args:
        values: the true result.
        dtype: what it is stored in.
        error: of the result before it is rounded. Where the result is 0, rounding at most doubles the error.
    """
    if dtype == compute_dtype(dtype):
        return np.zeros_like(values)
    fmt = FORMATS[dtype]
    half = np.maximum(fmt.roundoff * (np.abs(values) + error), fmt.smallest / 2)
    return np.where(values == 0, np.minimum(half, error), half)
