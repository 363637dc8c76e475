"""Holds results against the truth, and against each other, within their bounds."""

from dataclasses import dataclass, field

import numpy as np

from parity_tests.truth.bounds import Arithmetic, Bound, error_bound
from parity_tests.truth.cases import Case, describe_inputs
from parity_tests.truth.oracle import Exact, Truth
from parity_tests.truth.precision import FloatArray, compute_dtype, ulp


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
class Worst:
    """The element that uses the largest share of its bound.

    Args:
        part: "loss" or "gradient".
        index: where in that part, whose rows are flattened and whose classes are last.
        value: what the implementation gave.
        expected: what it is compared with.
        bound: the error that is allowed.
        share: error over bound; inf for a NaN, infinity or finite number out of place.
        inputs: what goes into the element, for people.
    """

    part: str
    index: tuple[int, ...]
    value: float
    expected: float
    bound: float
    share: float
    inputs: dict[str, str] = field(repr=False, compare=False)

    def __str__(self) -> str:
        """Return one line for a message."""
        place = f"{self.part}{list(self.index) if self.index else ''}"
        return f"{place} = {self.value!r}, expected {self.expected!r}, bound {self.bound:.3g}"


@dataclass(frozen=True)
class Comparison:
    """Errors as shares of their bounds: above 1 is wrong. inf stands for a NaN, infinity or finite number out of place.

    Args:
        loss: largest share used by an element of the loss; inf if the shapes are wrong.
        gradient: the same for the gradient.
        worst: the element with the largest share; None if there is no element, or the shapes are wrong.
        problem: what no share can say: wrong shapes or dtypes.
        ulps: error of each entry of the gradient in scaled ULPs, the spacing of numbers at
            |factor| * max(S p_k, w_k q_k); the entry's own spacing means nothing where p and q nearly cancel.
    """

    loss: float
    gradient: float
    worst: Worst | None
    problem: str | None = None
    ulps: FloatArray = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)

    @property
    def agrees(self) -> bool:
        """Whether every element is within its bound, and shapes and dtypes are right."""
        return self.problem is None and self.loss <= 1 and self.gradient <= 1

    @property
    def share(self) -> float:
        """Largest share of a bound that was used; NaN, which is larger than nothing, counts as infinite."""
        return max(np.inf if np.isnan(part) else part for part in (self.loss, self.gradient))

    def __str__(self) -> str:
        """Return one line for a message."""
        return f"{self.share:.3g} of the bound: {self.problem or self.worst or 'no elements'}"


def against_oracle(case: Case, truth: Truth, result: Result, arithmetic: Arithmetic) -> Comparison:
    """Compare a result with the truth."""
    return within(case, truth, result, error_bound(case, truth, arithmetic))


def against_each_other(
    case: Case, truth: Truth, results: tuple[Result, Result], arithmetic: tuple[Arithmetic, Arithmetic]
) -> Comparison:
    """Compare two results: they may differ by the sum of their bounds."""
    first, second = (error_bound(case, truth, each) for each in arithmetic)
    both = Bound(first.loss + second.loss, first.gradient + second.gradient)
    return within(case, truth, results[0], both, results[1])


def within(case: Case, truth: Truth, result: Result, bound: Bound, other: Result | None = None) -> Comparison:
    """Compare a result with the truth, or with another result, within a bound that is given."""
    loss, gradient = truth.loss, truth.gradient
    if other is not None:
        loss, gradient = _exactly(other.loss), _exactly(other.gradient)
    if result.loss.shape != loss.high.shape or result.gradient.shape != gradient.high.shape:
        shapes = f"loss of shape {list(result.loss.shape)}, gradient {list(result.gradient.shape)}"
        wanted = f"expected {list(loss.high.shape)}, {list(gradient.high.shape)}"
        return Comparison(np.inf, np.inf, None, f"{shapes}; {wanted}")
    problem = None
    if (result.loss_dtype, result.gradient_dtype) != (compute_dtype(case.dtype), case.dtype):
        dtypes = f"loss in {result.loss_dtype}, gradient in {result.gradient_dtype}"
        problem = f"{dtypes}; expected {compute_dtype(case.dtype)}, {case.dtype}"
    gradient_error = gradient.error_of(result.gradient)
    shares = {
        "loss": _share(loss.error_of(result.loss), bound.loss),
        "gradient": _share(gradient_error, bound.gradient),
    }
    part = max(shares, key=lambda key: np.max(shares[key], initial=0.0))
    worst = None
    if shares[part].size:
        index = tuple(int(i) for i in np.unravel_index(np.argmax(shares[part]), shares[part].shape))
        value, wanted = getattr(result, part)[index], (loss if part == "loss" else gradient).high[index]
        allowed = float(getattr(bound, part)[index])
        share = float(shares[part][index])
        worst = Worst(part, index, float(value), float(wanted), allowed, share, describe_inputs(case, index))
    return Comparison(
        loss=float(np.max(shares["loss"], initial=0.0)),
        gradient=float(np.max(shares["gradient"], initial=0.0)),
        worst=worst,
        problem=problem,
        ulps=_scaled_ulps(case, truth, gradient_error),
    )


def _exactly(values: FloatArray) -> Exact:
    return Exact(values, np.zeros_like(values))


def _share(error: FloatArray, bound: FloatArray) -> FloatArray:
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(error == 0, 0.0, error / bound)
    return np.where(np.isinf(error), np.inf, share)


def _scaled_ulps(case: Case, truth: Truth, error: FloatArray) -> FloatArray:
    weight = 1.0 if case.class_weight is None else np.abs(case.class_weight)
    wq = truth.target * weight
    mass = np.sum(wq, axis=-1, keepdims=True)
    scale = np.abs(truth.factor)[:, None] * np.maximum(mass * truth.probabilities, wq)
    with np.errstate(over="ignore"):
        return error / ulp(scale, case.dtype)
