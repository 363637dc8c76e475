"""Holds results against the truth, and against each other, within their bounds."""

from dataclasses import dataclass

import numpy as np

from parity_tests.bounds import Arithmetic, Bound, error_bound
from parity_tests.cases import Case
from parity_tests.oracle import Exact, Truth
from parity_tests.precision import FloatArray, compute_dtype, ulp


@dataclass(frozen=True)
class Result:
    """What an implementation gave for a case.

    Args:
        loss: float64 array of the shape of the losses, flattened, or of shape [] if reduced.
        gradient: [N, K] float64 array, classes last, rows flattened.
        loss_dtype, gradient_dtype: names of the dtypes that they came in.
    """

    loss: FloatArray
    gradient: FloatArray
    loss_dtype: str
    gradient_dtype: str


@dataclass(frozen=True)
class Comparison:
    """Errors as shares of their bounds: above 1 is wrong. inf stands for a NaN, infinity or dtype out of place.

    Args:
        loss: largest share used by an element of the loss.
        gradient: the same for the gradient.
        gradient_ulps: largest error of the gradient in scaled ULPs, the spacing of numbers at
            |factor| * max(S p_k, w_k q_k); the entry's own spacing means nothing where p and q nearly cancel.
        worst: what the worst element was, for the message.
    """

    loss: float
    gradient: float
    gradient_ulps: float
    worst: str

    @property
    def agrees(self) -> bool:
        """Whether every element is within its bound."""
        return self.loss <= 1 and self.gradient <= 1


def against_oracle(case: Case, truth: Truth, result: Result, arithmetic: Arithmetic) -> Comparison:
    """Compare a result with the truth."""
    bound = error_bound(case, truth, arithmetic)
    return _compare(case, truth, result, bound, (truth.loss, truth.gradient))


def against_each_other(
    case: Case, truth: Truth, results: tuple[Result, Result], arithmetic: tuple[Arithmetic, Arithmetic]
) -> Comparison:
    """Compare two results: they may differ by the sum of their bounds."""
    first, second = (error_bound(case, truth, each) for each in arithmetic)
    both = Bound(first.loss + second.loss, first.gradient + second.gradient)
    other = results[1]
    exact = (Exact(other.loss, np.zeros_like(other.loss)), Exact(other.gradient, np.zeros_like(other.gradient)))
    return _compare(case, truth, results[0], both, exact)


def _compare(case: Case, truth: Truth, result: Result, bound: Bound, expected: tuple[Exact, Exact]) -> Comparison:
    loss, gradient = expected
    if result.loss.shape != loss.high.shape or result.gradient.shape != gradient.high.shape:
        shapes = f"shapes {result.loss.shape}, {result.gradient.shape}"
        return Comparison(np.inf, np.inf, np.inf, f"{shapes} for {loss.high.shape}, {gradient.high.shape}")
    if (result.loss_dtype, result.gradient_dtype) != (compute_dtype(case.dtype), case.dtype):
        return Comparison(np.inf, np.inf, np.inf, f"dtypes {result.loss_dtype}, {result.gradient_dtype}")
    shares = {
        "loss": _share(loss.error_of(result.loss), bound.loss),
        "gradient": _share(gradient.error_of(result.gradient), bound.gradient),
    }
    name = max(shares, key=lambda key: np.max(shares[key], initial=0.0))
    worst = "no elements"
    if shares[name].size:
        index = np.unravel_index(np.argmax(shares[name]), shares[name].shape)
        values = (getattr(result, name)[index], (loss if name == "loss" else gradient).high[index])
        where = [int(i) for i in index]
        worst = f"{name}{where} = {values[0]!r}, expected {values[1]!r}, bound {getattr(bound, name)[index]:.3g}"
    return Comparison(
        loss=float(np.max(shares["loss"], initial=0.0)),
        gradient=float(np.max(shares["gradient"], initial=0.0)),
        gradient_ulps=_scaled_ulps(case, truth, gradient.error_of(result.gradient)),
        worst=worst,
    )


def _share(error: FloatArray, bound: FloatArray) -> FloatArray:
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(error == 0, 0.0, error / bound)
    return np.where(np.isinf(error), np.inf, share)


def _scaled_ulps(case: Case, truth: Truth, error: FloatArray) -> float:
    weight = 1.0 if case.class_weight is None else np.abs(case.class_weight)
    wq = truth.target * weight
    mass = np.sum(wq, axis=-1, keepdims=True)
    scale = np.abs(truth.factor)[:, None] * np.maximum(mass * truth.probabilities, wq)
    with np.errstate(over="ignore"):
        return float(np.max(error / ulp(scale, case.dtype), initial=0.0))
