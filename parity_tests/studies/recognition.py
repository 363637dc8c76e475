"""Names the formula of a loss, with its parameters, from its results in float64.

The model of one row has logits u, which are z, z/T or c tanh(z/c), log p = log softmax u, and a target q, the one-hot
label with smoothing e in some convention. Its loss is

    - sum_k f_k q_k log p_k + lambda lse^2 + epsilon (1 - p_y)

with the focal factor f_k = (1 - p_y)^gamma or (1 - p_k)^gamma; the label may be that of the next class or row. With
a_k, the derivative with respect to log p_k, the gradient is

    d loss / d u_k = a_k - p_k sum_j a_j + 2 lambda lse p_k.

A reduction only multiplies the gradient of a row by a number, which the fit leaves open: the gradients of a case are
compared with the model's times one number, or times one for each label. What is found for these numbers names the
reduction, the denominator, ignored rows and class weights. The loss then names constants, such as the entropy of the
target, that a gradient does not show.

Class weights w may also multiply each term of the sum, w_k f_k q_k log p_k, as torch and our losses have it. The
gradient is linear in w, so with the other parameters given w is what a linear least-squares fit finds.

Parameters are fitted by least squares: first in formulas with one departure from smoothed cross-entropy, then in those
with two. In float64 a wrong formula is off by far more than rounding, so a formula is accepted only if it fits every
ordinary case to 1e-6 of the largest gradient, which leaves room for constants in float32.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lstsq
from scipy.optimize import least_squares

from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import Result
from parity_tests.truth.precision import FloatArray

# Largest distance of an accepted formula from the gradients, as a share of the largest of a case, by the dtype that the
# loss computes in.
FITS = {"float64": 1e-6, "float32": 2e-5}
# To how many cases a formula is fitted first, and the distances from these and from all cases up to which it is then
# fitted to all.
FEW, ROUGH, FAR = 2, 1e-3, 3e-2
# How far the numbers that a reduction multiplies gradients with may be off, in units of the largest distance. Near the
# optimum, where gradients are small, their rounding is a large share of them.
SAME_FACTOR = 50
# Parameters beside the smoothing, with the values that the fit starts at.
STARTS = {
    "temperature": 1.5,
    "focal gamma": 1.0,
    "focal gamma of each class": 1.0,
    "softcap": 10.0,
    "z-loss": 1e-3,
    "poly-1 epsilon": 0.5,
}
ENTROPY_SUBTRACTED = "entropy of the target subtracted"
FOCAL = ("focal gamma", "focal gamma of each class")
CLASS_SHIFTS = {"next class": 1, "class before": -1}
ROW_SHIFTS = {"next row": -1, "row before": 1}
SHIFTS = (*CLASS_SHIFTS, *ROW_SHIFTS)
MODELLED = ("uniform", "non_target", "max_sup", "leaky")
COMMON = ("uniform", "non_target")
# Parameters that are fitted together with weights of the terms of the sum.
BESIDE_WEIGHTS = ("temperature", "softcap")
# What class weights multiply: nothing, the loss of a row, each term of the sum over the classes.
Weighted = Literal["", "row", "term"]


class Formula(NamedTuple):
    """The structure of a model of one row: a convention, which parameters it has, whose label it takes."""

    convention: str
    parameters: tuple[str, ...] = ()
    shift: str = ""


def formulas() -> Iterator[Formula]:
    """Yield the formulas with at most two departures from smoothed cross-entropy, the plainest first."""
    for convention in MODELLED:
        yield Formula(convention)
    for convention in MODELLED:
        yield from (Formula(convention, (name,)) for name in STARTS)
        yield from (Formula(convention, shift=shift) for shift in SHIFTS)
    for convention in COMMON:
        yield from (Formula(convention, pair) for pair in combinations(STARTS, 2) if set(pair) != set(FOCAL))
        yield from (Formula(convention, (name,), shift) for name in STARTS for shift in SHIFTS)


def formulas_with_weights() -> Iterator[tuple[Formula, Weighted]]:
    """Yield the formulas without class weights, those with weights of rows, and those with weights of terms."""
    yield from ((formula, "") for formula in formulas())
    yield from ((formula, "row") for formula in formulas() if not formula.parameters[1:])
    for convention in MODELLED:
        yield Formula(convention), "term"
    for convention in COMMON:
        yield from ((Formula(convention, (name,)), "term") for name in BESIDE_WEIGHTS)


class Model(NamedTuple):
    """The loss of each row, and its gradient with respect to the logits; the loss without a constant."""

    loss: FloatArray
    gradient: FloatArray


def evaluate(
    formula: Formula, case: Case, smoothing: float, values: Iterable[float], weight: FloatArray | float = 1.0
) -> Model:
    """Return the model of a formula with these values of its parameters, and these weights of the terms."""
    given = dict(zip(formula.parameters, values, strict=True))
    logits, labels = case.logits, shifted(formula.shift, case)
    rows = np.arange(len(logits))
    slope: FloatArray | float = 1.0
    if "temperature" in given:
        logits, slope = logits / given["temperature"], 1 / given["temperature"]
    if "softcap" in given:
        bent = np.tanh(logits / given["softcap"])
        logits, slope = given["softcap"] * bent, slope * (1 - bent**2)
    top = logits.max(-1, keepdims=True)
    lse = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
    log_p = logits - lse
    p = np.exp(log_p)
    one_hot = _one_hot(formula, case)
    target = weight * _target(formula.convention, one_hot, smoothing, logits)
    own_p = p[rows, labels][:, None]
    derivative, loss = -target, -(target * log_p).sum(-1)
    if gamma := given.get("focal gamma"):
        factor = (1 - own_p) ** gamma
        derivative = factor * derivative - one_hot * loss[:, None] * gamma * (1 - own_p) ** (gamma - 1) * own_p
        loss = factor[:, 0] * loss
    if gamma := given.get("focal gamma of each class"):
        factor = (1 - p) ** gamma
        derivative = target * (gamma * (1 - p) ** (gamma - 1) * p * log_p - factor)
        loss = -(target * factor * log_p).sum(-1)
    if epsilon := given.get("poly-1 epsilon"):
        derivative = derivative - epsilon * one_hot * own_p
        loss = loss + epsilon * (1 - own_p[:, 0])
    strength = given.get("z-loss", 0.0)
    gradient = derivative - p * derivative.sum(-1, keepdims=True) + 2 * strength * lse * p
    return Model(loss + strength * lse[:, 0] ** 2, gradient * slope)


def shifted(shift: str, case: Case) -> FloatArray:
    """Return the labels of a case that a loss with this shift takes."""
    num_classes = case.num_classes
    # Ignored labels, which are no classes, belong to rows that do not count.
    labels = np.where((case.labels >= 0) & (case.labels < num_classes), case.labels, 0)
    if shift in CLASS_SHIFTS:
        return np.asarray((labels + CLASS_SHIFTS[shift]) % num_classes)
    return np.roll(labels, ROW_SHIFTS[shift]) if shift else labels


def _target(convention: str, one_hot: FloatArray, smoothing: float, logits: FloatArray) -> FloatArray:
    num_classes = one_hot.shape[-1]
    at_max = logits == logits.max(-1, keepdims=True)
    target: FloatArray = {
        "uniform": (1 - smoothing) * one_hot + smoothing / num_classes,
        "non_target": (1 - smoothing) * one_hot + smoothing / max(num_classes - 1, 1) * (1 - one_hot),
        "leaky": (1 - smoothing) * one_hot + smoothing / num_classes * (1 - one_hot),
        "max_sup": one_hot - smoothing * at_max / at_max.sum(-1, keepdims=True) + smoothing / num_classes,
    }[convention]
    return target


# --- The fit of a formula ---------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """A case, with what a loss gave for it in float64."""

    case: Case
    result: Result


class Fit(NamedTuple):
    """A fitted formula: the smoothing, the values of its parameters, and the largest distance from the gradients."""

    formula: Formula
    smoothing: float
    values: tuple[float, ...]
    weighted: Weighted
    distance: float


def fit(formula: Formula, samples: Sequence[Sample], start: Sequence[float], weighted: Weighted, fine: bool) -> Fit:
    """Fit a formula to the gradients of some samples by least squares.

    Args:
        formula: the formula.
        samples: ordinary cases.
        start: the smoothing and the parameters to start at.
        weighted: what class weights multiply. With "row", the gradient of a row may be multiplied by a number for each
            label, not for each case.
        fine: whether to fit to the last digits.
    """

    def distances(values: FloatArray) -> FloatArray:
        return _distances(Fit(formula, float(values[0]), tuple(values[1:]), weighted, 0.0), samples)

    tolerance = 1e-15 if fine else 1e-6
    solution = least_squares(
        distances, np.asarray(start, float), method="lm", xtol=tolerance, ftol=tolerance, gtol=tolerance, max_nfev=100
    )
    largest = float(np.max(np.abs(distances(solution.x))))
    return Fit(formula, float(solution.x[0]), tuple(map(float, solution.x[1:])), weighted, largest)


def _distances(found: Fit, samples: Sequence[Sample]) -> FloatArray:
    with np.errstate(all="ignore"):
        weights = weights_of_terms(found, samples)
        of_samples = [_distance(found, sample, weights) for sample in samples]
    return np.nan_to_num(np.concatenate(of_samples), nan=1e3, posinf=1e3, neginf=-1e3)


def weights_of_terms(found: Fit, samples: Sequence[Sample]) -> dict[int, FloatArray]:
    """Return for each number of classes the weights of the terms, relative to the largest; empty without such weights.

    The weights are fitted to the case with the most rows.
    """
    if found.weighted != "term":
        return {}
    largest: dict[int, Sample] = {}
    for sample in samples:
        known = largest.setdefault(sample.case.num_classes, sample)
        if len(sample.case.labels) > len(known.case.labels):
            largest[sample.case.num_classes] = sample
    return {number: _fit_weights(found, sample) for number, sample in largest.items()}


def _fit_weights(found: Fit, sample: Sample) -> FloatArray:
    num_classes = sample.case.num_classes
    counted = np.any(sample.result.gradient != 0, axis=-1)
    # [K, N, K]: the gradients with a weight of 1 for one class, and of 0 for the others.
    units = np.eye(num_classes)[:, None]
    gradients = evaluate(found.formula, sample.case, found.smoothing, found.values, units).gradient[:, counted]
    given = sample.result.gradient[counted].ravel()
    if not np.isfinite(gradients).all() or not np.isfinite(given).all():
        return np.full(num_classes, np.nan)
    weight = lstsq(gradients.reshape(num_classes, -1).T, given, lapack_driver="gelsy")[0]
    relative: FloatArray = weight / np.max(np.abs(weight))
    return relative


def _distance(found: Fit, sample: Sample, weights: dict[int, FloatArray]) -> FloatArray:
    """Return the gradients less the model's, as shares of the largest, with the best number for each case or label."""
    given = sample.result.gradient
    weight = weights.get(sample.case.num_classes, 1.0)
    model = evaluate(found.formula, sample.case, found.smoothing, found.values, weight).gradient
    counted = np.any(given != 0, axis=-1)
    factors = _factors(given, model, counted, _groups(found, sample))
    distance: FloatArray = (given - factors[:, None] * model)[counted] / np.max(np.abs(given), initial=1e-300)
    return distance.ravel()


def _groups(found: Fit, sample: Sample) -> NDArray[Any]:
    """Return for each row a number that it shares with the rows whose gradients are multiplied by the same number."""
    return sample.case.labels if found.weighted == "row" else np.zeros(len(sample.case.labels), int)


def _factors(given: FloatArray, model: FloatArray, counted: FloatArray, groups: FloatArray) -> FloatArray:
    """Return for each row the number that brings the model's gradients of its group closest to those given."""
    factors = np.zeros(len(given))
    for group in np.unique(groups[counted]):
        rows = counted & (groups == group)
        square = np.sum(model[rows] ** 2)
        factors[rows] = np.sum(given[rows] * model[rows]) / square if square else 0.0
    return factors


# --- What a loss computes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recognised:
    """What a loss computes.

    Args:
        convention: "uniform", "non_target", "max_sup", "leaky" (1 - e at the label, e/K elsewhere), or "none".
        smoothing: the smoothing.
        parameters: other parameters, by name.
        shift: whose label it takes, if not its own.
        ignored: the label whose rows it leaves out, or None.
        reduction: in words, such as "mean", "sum over N - 1".
        class_weights: for each number of classes, the weight of each label that occurs, relative to the lowest; empty
            without class weights.
        weighted: what these multiply.
        constant: what the loss has beside the model, in words; empty if there is nothing.
        distance: how far the gradients are from the formula, as a share of the largest of a case.
        num_cases: how many cases it was fitted to.
        dtype: the dtype in which the loss ran there.
    """

    convention: str
    smoothing: float
    parameters: dict[str, float]
    shift: str
    ignored: int | None
    reduction: str
    class_weights: dict[int, dict[int, float]]
    weighted: Weighted
    constant: str
    distance: float
    num_cases: int
    dtype: str = "float64"

    def facts(self) -> dict[str, str]:
        """Return what it computes, by name."""
        found = {"convention": self.convention}
        if self.convention != "none":
            found["smoothing"] = f"{self.smoothing:.6g}"
        found |= {name: f"{value:.6g}" for name, value in self.parameters.items()}
        if self.shift:
            found["label of the"] = self.shift
        if self.ignored is not None:
            found["ignored label"] = str(self.ignored)
        if self.class_weights:
            found["class weights"] = _weights_text(self.class_weights)
            if self.convention != "none":  # without smoothing the sum has one term
                found["class weights multiply"] = "each term of the sum" if self.weighted == "term" else "the whole row"
        found["reduction"] = self.reduction
        if self.constant:
            found["constant"] = self.constant
        return found

    def __str__(self) -> str:
        """Return what it computes in one line."""
        found = self.facts()
        convention = "no smoothing" if self.convention == "none" else f"{self.convention} convention"
        ends = [found.pop("reduction"), *([found.pop("constant")] if self.constant else [])]
        found.pop("convention")
        return ", ".join([convention, *(f"{name} {value}" for name, value in found.items()), *ends])

    @property
    def evidence(self) -> str:
        """How well the formula fits."""
        return f"fits its gradients in {self.dtype} to {self.distance:.0e} of the largest"


def _weights_text(weights: dict[int, dict[int, float]]) -> str:
    num_classes = min(weights)
    few = sorted(weights[num_classes].items())[:5]
    return ", ".join(f"{value:.4g} for label {label}" for label, value in few) + f" of {num_classes} classes"


def recognise(samples: Sequence[Sample], precision: str, smoothing: float | FloatArray = 0.1) -> Recognised | None:
    """Return what a loss computes, or None if no formula fits.

    Args:
        samples: ordinary cases with class labels, with the results of the loss in float64.
        precision: the dtype that the loss computes in.
        smoothing: the smoothing that is expected. With one number of classes, uniform smoothing e K / (K - 1) is the
            same as non_target smoothing e; the one with this smoothing is named.
    """
    largest = FITS.get(precision, 0.0)
    numbers = sorted({sample.case.num_classes for sample in samples})
    # Two classes say nothing of the target: the gradients of all rows are multiples of each other.
    screened = next((number for number in numbers if number > 2), numbers[-1])
    few = [sample for sample in samples if sample.case.num_classes == screened][:FEW]
    for formula, weighted in formulas_with_weights():
        start = (0.1, *(STARTS[name] for name in formula.parameters))
        rough = fit(formula, few, start, weighted, fine=False)
        if rough.distance > ROUGH or np.max(np.abs(_distances(rough, samples))) > FAR:
            continue
        found = fit(formula, samples, (rough.smoothing, *rough.values), weighted, fine=True)
        if found.distance <= largest:
            if len(numbers) == 1:
                found = _as_expected(found, numbers[0], samples, smoothing)
            return _interpret(found, samples, largest)
    return None


def _as_expected(found: Fit, num_classes: int, samples: Sequence[Sample], smoothing: float | FloatArray) -> Fit:
    """Return the fit in the convention of `COMMON` whose smoothing is the expected one; as it is if neither's is."""
    factors = {"uniform": ("non_target", (num_classes - 1) / num_classes), "non_target": ("uniform", 1.0)}
    if found.formula.convention not in factors or num_classes == 1:
        return found
    convention, factor = factors[found.formula.convention]
    if not np.isclose(found.smoothing * factor, smoothing, rtol=1e-6).all():
        return found
    start = (found.smoothing * factor, *found.values)
    return fit(found.formula._replace(convention=convention), samples, start, found.weighted, fine=True)


def _interpret(found: Fit, samples: Sequence[Sample], largest: float) -> Recognised:
    """Name the reduction, the ignored label, the class weights and the constant of a fitted formula."""
    of_terms = weights_of_terms(found, samples)
    rows = [_rows_of(found, sample, of_terms) for sample in samples]
    smooth = abs(found.smoothing) > largest
    weights = {number: _relative(weight, largest) for number, weight in of_terms.items()}
    if found.weighted == "row":
        weights = _class_weights(samples, rows)
    # The last digits are those of the fit.
    strength, *values = (float(f"{value:.9g}") for value in (found.smoothing, *found.values))
    parameters = dict(zip(found.formula.parameters, values, strict=True))
    return Recognised(
        convention=found.formula.convention if smooth else "none",
        smoothing=strength if smooth else 0.0,
        parameters=parameters,
        shift=found.formula.shift,
        ignored=_ignored(samples),
        reduction=_reduction(samples, rows, weights, found.weighted, largest),
        class_weights=weights,
        weighted=found.weighted,
        constant=_constant(found, samples, rows, largest),
        distance=found.distance,
        num_cases=len(samples),
    )


class _Rows(NamedTuple):
    """Of each row of a sample: whether it counts, the number that the model is multiplied with, the model's loss.

    The weights are those of the labels where each term has a weight, else 1.
    """

    counted: NDArray[np.bool_]
    factors: FloatArray
    loss: FloatArray
    weights: FloatArray


def _rows_of(found: Fit, sample: Sample, weights: dict[int, FloatArray]) -> _Rows:
    given = sample.result.gradient
    weight = weights.get(sample.case.num_classes, np.ones(sample.case.num_classes))
    model = evaluate(found.formula, sample.case, found.smoothing, found.values, weight)
    counted = np.any(given != 0, axis=-1)
    factors = _factors(given, model.gradient, counted, _groups(found, sample))
    return _Rows(counted, factors, model.loss, weight[shifted("", sample.case)])


def _ignored(samples: Sequence[Sample]) -> int | None:
    """Return the label of all rows without a gradient, if it is one label that no other row has."""
    without: set[int] = set()
    others: set[int] = set()
    for sample in samples:
        has_gradient = np.any(sample.result.gradient != 0, axis=-1)
        without |= set(sample.case.labels[~has_gradient].tolist())
        others |= set(sample.case.labels[has_gradient].tolist())
    return without.pop() if len(without) == 1 and not without & others else None


def _relative(weight: FloatArray, largest: float) -> dict[int, float]:
    """Return the weight of each class relative to the first that is not 0."""
    cleaned = np.where(np.abs(weight) > SAME_FACTOR * largest, weight, 0.0)
    first = cleaned[np.flatnonzero(cleaned)[0]]
    return {k: float(value / first) for k, value in enumerate(cleaned)}


def _class_weights(samples: Sequence[Sample], rows: Sequence[_Rows]) -> dict[int, dict[int, float]]:
    weights: dict[int, dict[int, float]] = {}
    for sample, of_rows in zip(samples, rows, strict=True):
        counted = np.flatnonzero(of_rows.counted)
        if not len(counted):
            continue
        of_labels = weights.setdefault(sample.case.num_classes, {})
        labels = sample.case.labels[counted].tolist()
        # Relative to a label that has a weight already, or to the first.
        known = next((i for i, label in zip(counted, labels, strict=True) if label in of_labels), counted[0])
        unit = of_rows.factors[known] / of_labels.get(int(sample.case.labels[known]), 1.0)
        for i, label in zip(counted, labels, strict=True):
            of_labels.setdefault(label, float(of_rows.factors[i] / unit))
    return {
        number: {label: value / of_labels[min(of_labels)] for label, value in of_labels.items()}
        for number, of_labels in weights.items()
    }


def _reduction(
    samples: Sequence[Sample],
    rows: Sequence[_Rows],
    weights: dict[int, dict[int, float]],
    weighted: Weighted,
    largest: float,
) -> str:
    """Return in words what the numbers of the rows are."""
    cases = [(sample.case, each) for sample, each in zip(samples, rows, strict=True) if each.counted.any()]
    if not cases:
        return "no row counts"
    totals = np.array([(each.factors * each.weights)[each.counted].sum() for _, each in cases])
    counts = np.array([each.counted.sum() for _, each in cases], float)
    all_rows = np.array([len(each.counted) for _, each in cases], float)
    classes = np.array([case.num_classes for case, _ in cases], float)
    if weights and np.allclose(totals, 1, rtol=0, atol=SAME_FACTOR * largest):
        return "mean weighted by the class weights"
    unit = np.array([each.factors[each.counted][0] for _, each in cases]) if weights else totals / counts
    if weighted == "row":
        unit /= [weights[case.num_classes][int(case.labels[each.counted][0])] for case, each in cases]
    per_row = samples[0].result.loss.ndim > 0
    if per_row:
        choices = {"a loss per row": np.ones_like(unit)}
    else:
        choices = {
            "mean": 1 / counts,
            "mean, ignored rows counted": 1 / all_rows,
            "sum": np.ones_like(unit),
            "sum over N K": 1 / (all_rows * classes),
            "sum over K": 1 / classes,
            "sum over N - 1": 1 / np.maximum(all_rows - 1, 1),
        }
    relative = {name: unit / choice for name, choice in choices.items()}
    if weights:  # whose unit is that of one label
        first_of = {number: np.flatnonzero(classes == number)[0] for number in classes}
        first = np.array([first_of[number] for number in classes])
        relative = {name: ratio / ratio[first] for name, ratio in relative.items()}
    tolerance = SAME_FACTOR * largest
    for name, ratio in relative.items():
        if np.allclose(ratio, 1, rtol=0, atol=tolerance):
            return name
    for name, ratio in relative.items():
        if np.allclose(ratio, ratio[0], rtol=tolerance, atol=0):
            return f"{ratio[0]:.6g} times {name if per_row else f'the {name}'}"
    return "another number for each case"


def _constant(found: Fit, samples: Sequence[Sample], rows: Sequence[_Rows], largest: float) -> str:
    """Return in words how the losses differ from the model's, which has the same gradients."""
    differences, entropies, scales = [], [], []
    for sample, each in zip(samples, rows, strict=True):
        if not each.counted.any():
            continue
        target = _target(
            found.formula.convention, _one_hot(found.formula, sample.case), found.smoothing, sample.case.logits
        )
        entropy = -np.sum(target * np.log(np.where(target > 0, target, 1.0)), axis=-1)
        per_row = sample.result.loss.ndim > 0
        expected, lost = (
            each.factors * values if per_row else np.sum(each.factors * values) for values in (each.loss, entropy)
        )
        differences.append(np.atleast_1d(sample.result.loss - expected))
        entropies.append(np.atleast_1d(lost))
        scales.append(np.atleast_1d(np.abs(expected) + np.abs(lost) + 1))
    difference, entropy, scale = (np.concatenate(each) for each in (differences, entropies, scales))
    tolerance = SAME_FACTOR * largest * scale
    if np.all(np.abs(difference) <= tolerance):
        return ""
    if np.all(np.abs(difference + entropy) <= tolerance):
        return ENTROPY_SUBTRACTED
    if np.ptp(difference) <= np.max(tolerance):
        return f"{np.mean(difference):+.6g} in the loss"
    return "a value that its gradient is not of"


def _one_hot(formula: Formula, case: Case) -> FloatArray:
    one_hot = np.zeros_like(case.logits)
    one_hot[np.arange(len(one_hot)), shifted(formula.shift, case)] = 1
    return one_hot
