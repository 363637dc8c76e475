"""Holds results against the truth, and against each other, within their bounds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.bounds import error_bound
from parity_tests.truth.cases import Case, LinearCase, describe_inputs
from parity_tests.truth.linear_bounds import linear_bound
from parity_tests.truth.oracle import Exact, LinearTruth, Truth
from parity_tests.truth.precision import FloatArray, ulp

Parts = Mapping[str, FloatArray]
# Options of a case that a loss which is not known may not have.
OPTIONS_OF_OURS = frozenset({"convention", "smoothing", "subtract_entropy"})


@dataclass(frozen=True)
class Result:
    """What an implementation of the dense loss gave for a case.

    Args:
        loss: float64 array of the shape of the losses, flattened, or of shape [] if reduced.
        gradient: [N, K] float64 array, classes last, rows flattened.
        loss_dtype, gradient_dtype: names of the dtypes that they came in.
    """

    loss: FloatArray
    gradient: FloatArray
    loss_dtype: str
    gradient_dtype: str

    @property
    def parts(self) -> dict[str, FloatArray]:
        """The arrays by part."""
        return {"loss": self.loss, "gradient": self.gradient}

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtypes by part."""
        return {"loss": self.loss_dtype, "gradient": self.gradient_dtype}


@dataclass(frozen=True)
class LinearResult:
    """What an implementation of the linear loss gave: loss, and gradients with respect to hidden, weight and bias.

    Args:
        parts: float64 arrays by part, hidden's rows flattened; the loss as in `Result`.
        dtypes: names of the dtypes that they came in, by part.
    """

    parts: dict[str, FloatArray]
    dtypes: dict[str, str]


AnyResult = Result | LinearResult


def make_result(parts: dict[str, FloatArray], dtypes: dict[str, str]) -> AnyResult:
    """Return a result of these parts: of the dense loss if one of them is the gradient with respect to the logits."""
    if "gradient" in parts:
        return Result(parts["loss"], parts["gradient"], dtypes["loss"], dtypes["gradient"])
    return LinearResult(parts, dtypes)


@dataclass(frozen=True)
class Worst:
    """The element that uses the largest share of its bound.

    Args:
        part: "loss", "gradient", "hidden", "weight" or "bias".
        index: where in that part, whose rows are flattened and whose classes are last.
        value: what the implementation gave.
        other: what the other implementation gave; None if there is no other.
        true: the true value; None if it is not known.
        bound: the error that is allowed.
        share: error over bound; inf for a NaN, infinity or finite number out of place.
        inputs: the inputs of the element, as text for a report.
    """

    part: str
    index: tuple[int, ...]
    value: float
    other: float | None
    true: float | None
    bound: float
    share: float
    inputs: dict[str, str] = field(repr=False, compare=False)

    @property
    def place(self) -> str:
        """Part and index."""
        return f"{self.part}{list(self.index) if self.index else ''}"

    def values(self, show: Callable[[float], str] = repr) -> str:
        """Return the values: "0.9 | true 1.0" of one implementation, "A 0.9 | B 1.0 | true 1.0" of two."""
        given = [show(self.value)] if self.other is None else [f"A {show(self.value)}", f"B {show(self.other)}"]
        return " | ".join(given if self.true is None else [*given, f"true {show(self.true)}"])

    def __str__(self) -> str:
        """Return one line for a message."""
        return f"{self.place}: {self.values()}, bound {self.bound:.3g}"


@dataclass(frozen=True)
class Comparison:
    """Errors as shares of their bounds: above 1 is wrong. inf stands for a NaN, infinity or finite number out of place.

    Args:
        shares: largest share used by an element of each part; inf if its shape is wrong.
        worst: the element with the largest share; None if there is no element, or a shape is wrong.
        problem: what no share can say: wrong shapes or dtypes.
        ulps: error of each entry of the gradient with respect to the logits in scaled ULPs, the spacing of numbers at
            |factor| * max(S p_k, w_k q_k); the entry's own spacing means nothing where p and q nearly cancel.
    """

    shares: dict[str, float]
    worst: Worst | None
    problem: str | None = None
    ulps: FloatArray = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)

    @property
    def agrees(self) -> bool:
        """Whether every element is within its bound, and shapes and dtypes are right."""
        return self.problem is None and self.share <= 1

    @property
    def share(self) -> float:
        """Largest share of a bound that was used; NaN, which is larger than nothing, counts as infinite."""
        return max(np.inf if np.isnan(share) else share for share in self.shares.values())

    @property
    def loss(self) -> float:
        """Largest share used by an element of the loss."""
        return self.shares["loss"]

    @property
    def gradient(self) -> float:
        """Largest share used by an element of a gradient."""
        return max(share for part, share in self.shares.items() if part != "loss")

    def __str__(self) -> str:
        """Return one line for a message."""
        return f"{self.share:.3g} of the bound: {self.problem or self.worst or 'no elements'}"


def against_oracle(case: Case, truth: Truth, result: AnyResult, arithmetic: Arithmetic) -> Comparison:
    """Compare a result with the truth."""
    return within(case, truth, result, bounds_of(case, truth, arithmetic))


def against_each_other(
    case: Case, truth: Truth, results: tuple[AnyResult, AnyResult], arithmetic: tuple[Arithmetic, Arithmetic]
) -> Comparison:
    """Compare two results: they may differ by the sum of their bounds."""
    first, second = (bounds_of(case, truth, each) for each in arithmetic)
    return within(case, truth, results[0], {part: first[part] + second[part] for part in first}, results[1])


def bounds_of(case: Case, truth: Truth, arithmetic: Arithmetic) -> Parts:
    """Return the bound of each part of the result of a correct implementation of that arithmetic."""
    if isinstance(case, LinearCase) and isinstance(truth, LinearTruth):
        return linear_bound(case, truth, arithmetic)
    return error_bound(case, truth, arithmetic).parts


def within(
    case: Case, truth: Truth | None, result: AnyResult, bounds: Parts, other: AnyResult | None = None
) -> Comparison:
    """Compare a result with the truth, or with another result, within bounds that are given.

    Without a truth, no value of the comparison is called true, and the dtypes of the result are its own affair.
    """
    if other is not None:
        target: Mapping[str, Exact] = {part: exactly(values) for part, values in other.parts.items()}
    elif truth is not None:
        target = truth.parts
    else:
        raise TypeError("without a truth, the result is compared with another: pass other")
    given = {part: list(values.shape) for part, values in result.parts.items()}
    wanted = {part: list(exact.high.shape) for part, exact in target.items()}
    if given != wanted:
        shapes = ", ".join(f"{part} {shape}" for part, shape in given.items()).replace("loss ", "loss of shape ", 1)
        return Comparison(
            dict.fromkeys(wanted, np.inf),
            None,
            f"{shapes}; {'expected' if other is None else 'the other has'} {_list(wanted)}",
        )
    problem = None
    if truth is not None and result.dtypes != case.result_dtypes:
        dtypes = ", ".join(f"{part} in {dtype}" for part, dtype in result.dtypes.items())
        problem = f"{dtypes}; expected {_list(case.result_dtypes)}"
    errors = {part: exact.error_of(result.parts[part]) for part, exact in target.items()}
    shares = {part: error_over_bound(errors[part], bounds[part]) for part in target}
    largest = {part: float(np.max(share, initial=0.0)) for part, share in shares.items()}
    part = max(largest, key=lambda part: largest[part])
    worst = None
    if shares[part].size:
        index = tuple(int(i) for i in np.unravel_index(np.argmax(shares[part]), shares[part].shape))
        numbers = (result.parts[part], target[part].high, bounds[part], shares[part])
        value, against, allowed, share = (float(array[index]) for array in numbers)
        second = None if other is None else against
        true = None if truth is None else float(truth.parts[part].high[index])
        inputs = describe_inputs(case, index, part)
        if truth is None:
            inputs = {name: text for name, text in inputs.items() if name not in OPTIONS_OF_OURS}
        worst = Worst(part, index, value, second, true, allowed, share, inputs)
    ulps = np.zeros(0) if truth is None or "gradient" not in errors else _scaled_ulps(case, truth, errors["gradient"])
    return Comparison(largest, worst, problem, ulps)


def error_over_bound(error: FloatArray, bound: FloatArray) -> FloatArray:
    """Return errors as shares of their bounds: 0 for no error; inf for an infinite error or a bound that is NaN."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        share = np.where(error == 0, 0.0, error / bound)
    return np.where(np.isinf(error) | np.isnan(share), np.inf, share)


def exactly(values: FloatArray) -> Exact:
    """Return numbers as if they were exact."""
    return Exact(values, np.zeros_like(values))


def _list(parts: Mapping[str, object]) -> str:
    return ", ".join(map(str, parts.values()))


def _scaled_ulps(case: Case, truth: Truth, error: FloatArray) -> FloatArray:
    weight = 1.0 if case.class_weight is None else np.abs(case.class_weight)
    wq = truth.target * weight
    mass = np.sum(wq, axis=-1, keepdims=True)
    scale = np.abs(truth.factor)[:, None] * np.maximum(mass * truth.probabilities, wq)
    with np.errstate(over="ignore"):
        return error / ulp(scale, case.dtype)
