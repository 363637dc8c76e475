"""Bounds of the rounding error of a correct linear layer with the loss, for each element, computed from the data.

u is the roundoff of the compute precision, v the roundoff of the dtype of hidden if that is narrower, otherwise 0.

- A logit is a sum of D products and the bias: error u (D + 1) sum |h W| + u |b|. Where the layer stores logits and bias
  in the dtype of hidden, v |z| + v |b| more.
- Where a matrix product keeps b significant bits of each operand, and the operands have more, a product of two numbers
  is off by another ((1 + 2^-b)^2 - 1) of its size, in each of the three matrix products.
- An error of up to t_k of each logit z_k is not taken to first order, since errors of bfloat16 logits are too large.
  The largest p_k is reached where z_k is t_k too large and all others t_j too small, so p_k rises by at most
  p_k [(e^t_k - 1) (1 - p_k) + sum_j p_j (1 - e^-t_j)] / [p_k e^t_k + sum_j p_j e^-t_j], the sums over j != k, and falls
  by at most the same with the signs of t reversed. Everything else is monotone or a product: log-sum-exp, softcap and
  its slope, z-loss. The loss changes by at most sum_k t_k times the largest |gradient| on the way.
- The error T of the gradient g with respect to the logits is the sum of that change, the bound of the loss itself, and
  v |g| where g is rounded for the matrix products. Then the error of hidden's gradient is
  sum_k T |W| + u K sum_k |g W|, that of the weight's gradient sum_n T |h| + u (N + 1) sum_n |g h|, and v sum_n |g h|
  more where the product of each chunk is stored in the dtype of hidden; the bias's likewise, with 1 for h.
- 2 u for the multiplication by the incoming gradient and the division by the denominator, and v for each time that the
  result is stored in a narrow dtype.

In float16 half of the smallest number is added to each v. A result of exactly 0 has no error.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.bounds import error_bound
from parity_tests.truth.cases import Case, LinearCase
from parity_tests.truth.oracle import LinearTruth, Truth
from parity_tests.truth.precision import FORMATS, FloatArray, compute_dtype


class _Change(NamedTuple):
    """How far errors of the logits change each row's loss, and its gradient with respect to the logits."""

    loss: FloatArray
    gradient: FloatArray


def linear_bound(case: LinearCase, truth: LinearTruth, arithmetic: Arithmetic) -> dict[str, FloatArray]:
    """Return the bound of each part of the result, for a correct implementation on a device of that arithmetic."""
    with np.errstate(invalid="ignore", over="ignore"):
        return _linear_bound(case, truth, arithmetic)


@dataclass(frozen=True)
class _Layer:
    """What the gradients of a layer are computed from, and its errors.

    Args:
        case, truth: the case.
        narrow: which intermediate results are stored in the dtype of hidden.
        hidden: [N, D], sizes; 0 in rows that do not count.
        weight: [D, K], sizes.
        size: [N, K], size of the gradient with respect to the logits.
        exact_error: [N, K], the error of that gradient.
        error: the error after that gradient is rounded for the matrix products.
        cut: relative error of a product of two numbers of which a matrix product keeps some bits only.
    """

    case: LinearCase
    truth: LinearTruth
    narrow: frozenset[str]
    hidden: FloatArray
    weight: FloatArray
    size: FloatArray
    exact_error: FloatArray
    error: FloatArray
    cut: float

    @property
    def u(self) -> float:
        """Roundoff of the compute precision."""
        return FORMATS[compute_dtype(self.case.dtype)].roundoff

    @property
    def factor(self) -> FloatArray:
        """[N, 1], size of the factor of each row's gradient."""
        return np.abs(self.truth.factor)[:, None]

    @property
    def by_row(self) -> bool:
        """Whether the losses are not reduced."""
        return bool(self.case.options.get("reduction", "none") == "none")

    def stored(self, error: FloatArray, value: FloatArray, dtype: str, scale: FloatArray | float = 1.0) -> FloatArray:
        return _stored(compute_dtype(self.case.dtype), error, value, dtype, scale)


def _linear_bound(case: LinearCase, truth: LinearTruth, arithmetic: Arithmetic) -> dict[str, FloatArray]:
    compute, narrow = compute_dtype(case.dtype), arithmetic.narrow
    live = truth.counted & ~truth.bad
    hidden = np.abs(np.where(truth.counted[:, None], case.hidden_rows, 0.0))
    weight = np.abs(case.multiplied_weight)

    # The logits of a masked class and of a row that does not count are never used, and may be anything.
    used = case.rows().allowed & live[:, None]
    logits = np.where(used, case.rows().logits, 0.0)
    cut = _cut(case.dtype, arithmetic.matmul_bits)
    of_logits = _logit_error(case, hidden, weight, logits, "logits" in narrow, cut)
    change = _change(case, truth, logits, np.where(used, of_logits, 0.0))

    # The bound of a gradient that is stored in the compute dtype; rounding it for the products comes after.
    base = error_bound(replace(case, dtype=compute), truth, arithmetic)
    factor = np.abs(truth.factor)[:, None]
    size = np.abs(truth.gradient.high)
    exact_error = base.gradient + factor * change.gradient
    error = _stored(compute, exact_error, size, case.dtype, np.maximum(factor, 1))
    layer = _Layer(case, truth, narrow, hidden, weight, size, exact_error, error, cut)
    bound = {
        "loss": base.loss + _reduced(case, truth, change.loss),
        "hidden": _hidden_bound(layer),
        "weight": _weight_bound(layer),
    }
    return bound if truth.bias is None else {**bound, "bias": _bias_bound(layer, np.abs(truth.bias.high))}


def _hidden_bound(layer: _Layer) -> FloatArray:
    u, error, weight, dtype = layer.u, layer.error, layer.weight, layer.case.dtype
    value, num_classes = np.abs(layer.truth.hidden.high), weight.shape[1]
    relative = u * num_classes + layer.cut
    bound: FloatArray = error @ weight.T + relative * ((layer.size + error) @ weight.T) + 2 * u * value
    if not layer.by_row and "hidden" in layer.narrow:
        bound = layer.stored(bound, value, dtype, layer.factor)
    return layer.stored(bound, value, dtype)


def _weight_bound(layer: _Layer) -> FloatArray:
    u, error, hidden, dtype = layer.u, layer.error, layer.hidden, layer.case.dtype
    value, num_rows, products = np.abs(layer.truth.weight.high), len(hidden), hidden.T @ (layer.size + error)
    bound: FloatArray = hidden.T @ error + (u * (num_rows + 1) + layer.cut) * products + 2 * u * value
    of_product = "products of rows" if layer.by_row else "products"
    if dtype != compute_dtype(dtype) and of_product in layer.narrow:
        fmt, times = FORMATS[dtype], np.max(layer.factor, initial=1.0)
        bound = bound + fmt.roundoff * products + num_rows * times * fmt.smallest / 2 * (products > 0)
    return layer.stored(bound, value, layer.case.weight_dtype)


def _bias_bound(layer: _Layer, value: FloatArray) -> FloatArray:
    u, num_rows = layer.u, len(layer.hidden)
    of_terms = layer.error if "logits" in layer.narrow else layer.exact_error
    bound = np.sum(of_terms, axis=0) + u * (num_rows + 1) * np.sum(layer.size + layer.error, axis=0) + 2 * u * value
    if "bias" in layer.narrow:
        bound = layer.stored(bound, value, layer.case.dtype)
    return layer.stored(bound, value, layer.case.weight_dtype)


def _stored(
    compute: str, error: FloatArray, value: FloatArray, dtype: str, scale: FloatArray | float = 1.0
) -> FloatArray:
    """Return the error after rounding to a dtype, of a value that is multiplied by `scale` afterwards."""
    if dtype == compute:
        return error
    half = FORMATS[dtype].smallest / 2
    rounding = FORMATS[dtype].roundoff * (value + error) + half * scale
    return np.where((value == 0) & (error == 0), 0.0, error + rounding)


def _cut(dtype: str, bits: int) -> float:
    """Return the relative error of a product whose factors are rounded to so many bits. Of float64 all are kept."""
    kept = 2.0**-bits
    return 0.0 if dtype == "float64" or FORMATS[dtype].roundoff >= kept else (1 + kept) ** 2 - 1


def _logit_error(
    case: LinearCase, hidden: FloatArray, weight: FloatArray, logits: FloatArray, narrow: bool, cut: float
) -> FloatArray:
    """Return the error of the logits; `hidden` and `weight` are absolute values."""
    compute = compute_dtype(case.dtype)
    u, tiny = FORMATS[compute].roundoff, FORMATS[compute].smallest_normal
    terms, num_features = hidden @ weight, hidden.shape[1]
    error: FloatArray = (u * num_features + cut) * terms + num_features * tiny
    if case.bias is not None:
        bias = np.abs(case.bias)
        error = error + u * (terms + bias)
        error = error + _stored(compute, np.zeros_like(bias), bias, case.dtype) if narrow else error
    if narrow:
        error = _stored(compute, error, np.abs(logits), case.dtype)
    # The error of the oracle's logits, which are rounded to float64.
    if case.dtype == "float64":
        error = error + u * np.abs(logits)
    return error


def _change(case: Case, truth: Truth, logits: FloatArray, error: FloatArray) -> _Change:
    """Return by how much logits that are off by up to `error` change loss and gradient at most."""
    z_loss, softcap = case.options.get("z_loss", 0.0), case.options.get("softcap")
    # A row that does not count may have a mask without classes.
    allowed = case.rows().allowed | ~truth.counted[:, None]
    capped, slope, of_slope = logits, np.ones_like(logits), np.zeros_like(logits)
    if softcap is not None:
        capped, above, below = (softcap * np.tanh((logits + way * error) / softcap) for way in (0, 1, -1))
        slope = 1 - np.tanh(logits / softcap) ** 2
        # The slope at both ends of the interval: it is largest at 0 and falls on either side.
        flattest = 1 - np.tanh((np.abs(logits) + error) / softcap) ** 2
        steepest = 1 - np.tanh(np.maximum(np.abs(logits) - error, 0) / softcap) ** 2
        error, of_slope = np.maximum(above - capped, capped - below), np.maximum(slope - flattest, steepest - slope)
    p = truth.probabilities
    up, down = np.expm1(error), -np.expm1(-error)
    # Sums over the other classes, not differences from 1: p may be close to it.
    others = 1 - np.eye(logits.shape[-1])
    rest, rest_up, rest_down = p @ others, (p * up) @ others, (p * down) @ others
    rise = p * (up * rest + rest_down) / (p * (1 + up) + rest - rest_down)
    fall = p * (down * rest + rest_up) / (p * (1 - down) + rest + rest_up)
    of_p = np.where(p > 0, np.maximum(rise, fall), 0.0)

    wq = truth.target * (1.0 if case.class_weight is None else case.class_weight)
    mass = np.sum(wq, axis=-1, keepdims=True)
    peak = np.max(np.where(allowed, capped, -np.inf), axis=-1, initial=-np.inf, keepdims=True)
    lse = peak + np.log(np.sum(np.where(allowed, np.exp(capped - peak), 0.0), axis=-1, keepdims=True))
    of_lse = np.log1p(np.sum(p * up, axis=-1, keepdims=True))
    gradient = np.abs((mass + 2 * z_loss * lse) * p - wq)
    of_gradient = (np.abs(mass) + 2 * z_loss * (np.abs(lse) + of_lse)) * of_p + 2 * z_loss * of_lse * p
    return _Change(
        loss=np.sum((gradient + of_gradient) * error, axis=-1),
        gradient=of_gradient * (slope + of_slope) + gradient * of_slope,
    )


def _reduced(case: Case, truth: Truth, row: FloatArray) -> FloatArray:
    """Return the changes of the losses after the reduction."""
    if case.options.get("reduction", "none") == "none":
        return row
    upstream = float(np.max(np.abs(case.rows().upstream), initial=0.0)) or 1.0
    return np.asarray(np.sum(row) * np.max(np.abs(truth.factor), initial=0.0) / upstream)


def largest_logit_is_clear(case: LinearCase, truth: LinearTruth) -> bool:
    """Return whether rounding cannot change which logit is largest: otherwise no bound is known for "max_sup"."""
    live = truth.counted & ~truth.bad
    ordered = np.sort(case.rows().logits[live], axis=-1)
    # Twice the error of either, with room for the sum of products.
    error = 8 * FORMATS[case.dtype].roundoff * np.max(np.abs(ordered), axis=-1)
    return bool(np.all(ordered[:, -1] - ordered[:, -2] > error))
