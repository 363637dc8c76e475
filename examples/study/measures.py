"""What the study of smoothing measures, and how it compares two settings: NumPy and SciPy only.

Two settings are compared seed by seed, since a seed fixes the starting weights, the batches and the split of the data:
what is left of the difference is the setting. The interval and the test are those of the paired differences.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Int
from scipy import stats
from scipy.optimize import minimize_scalar

Features = Float[np.ndarray, "N D"]
Labels = Int[np.ndarray, " N"]

Name = TypeVar("Name", bound=Hashable)

LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 0.05, 20.0


def fit_temperature(nll: Callable[[float], float]) -> float:
    """Return the temperature with the least nll (Guo et al. 2017, section 4.2).

    Args:
        nll: the mean nll of rows that were not trained on, when their logits are divided by a temperature.

    Example:
        >>> from scipy.special import logsumexp
        >>> logits, labels = np.array([[6.0, 0.0], [6.0, 0.0], [0.0, 6.0], [0.0, 6.0]]), np.array([0, 0, 1, 0])
        >>> rows = range(4)
        >>> fitted = fit_temperature(lambda t: np.mean(logsumexp(logits / t, axis=1) - logits[rows, labels] / t))
        >>> f"{fitted:.3f}, {6 / np.log(3):.3f}"  # the softmax of the fitted logits is right in 3 of 4 cases
        '5.461, 5.461'
    """
    bounds = (np.log(LEAST_TEMPERATURE), np.log(LARGEST_TEMPERATURE))
    found = minimize_scalar(
        lambda log: nll(float(np.exp(log))), bounds=bounds, method="bounded", options={"xatol": 1e-5}
    )
    return float(np.exp(found.x))


def spread(features: Features, labels: Labels) -> float:
    """Return how far features lie from the mean of their class, relative to how far the classes lie apart.

    The sum of the variances within classes, divided by that of the class means. It is 0 if each class is one point.

    Example:
        >>> features = np.array([[0.0], [2.0], [10.0], [12.0]])
        >>> spread(features, np.array([0, 0, 1, 1]))  # variances: 1 within each class, 25 between the means 1 and 11
        0.04
    """
    classes, indices, counts = np.unique(labels, return_inverse=True, return_counts=True)
    means = np.zeros((len(classes), features.shape[1]))
    np.add.at(means, indices, features)
    means /= counts[:, None]
    within = np.square(features - means[indices]).sum() / len(features)
    between = np.square(means - features.mean(axis=0)).sum(axis=1) @ counts / len(features)
    return float(within / between)


def project(features: Features, templates: Float[np.ndarray, "D 3"]) -> Float[np.ndarray, "N 2"]:
    """Return the coordinates of features in the plane through the weights of three classes.

    Müller, Kornblith and Hinton, "When Does Label Smoothing Help?" (2019), section 2: an orthonormal basis of the plane
    through three templates (columns of the last layer's weight), on which the penultimate activations are projected.

    Example:
        >>> templates = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> corners = project(np.eye(3), templates)
        >>> bool(np.allclose(np.linalg.norm(corners - np.roll(corners, 1, axis=0), axis=1), np.sqrt(2)))
        True
    """
    origin = templates.mean(axis=1)
    basis, _ = np.linalg.qr(templates[:, 1:] - templates[:, :1])
    projected: Float[np.ndarray, "N 2"] = (features - origin) @ basis
    return projected


class Difference(NamedTuple):
    """Mean of paired differences, its 95 % confidence interval, and the p-value of the hypothesis that it is 0."""

    mean: float
    low: float
    high: float
    p: float


def paired(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Return how values differ from those of a baseline with the same seeds, by Student's t for paired samples.

    If all differences are the same number, the interval is that number, and p is 1 for 0 and 0 otherwise.

    Raises:
        ValueError: fewer than two pairs, or values without a partner.

    Example:
        >>> difference = paired([0.92, 0.95, 0.93], [0.90, 0.91, 0.90])
        >>> " ".join(f"{value:.3f}" for value in difference)
        '0.030 0.005 0.055 0.035'
    """
    if len(values) != len(baseline) or len(values) < 2:
        raise ValueError(f"{len(values)} and {len(baseline)} values: pass two or more pairs, one for each seed.")
    differences = np.subtract(values, baseline)
    mean = float(differences.mean())
    if np.ptp(differences) == 0:
        return Difference(mean, mean, mean, float(mean == 0))
    tested = stats.ttest_1samp(differences, 0)
    low, high = tested.confidence_interval(0.95)
    return Difference(mean, float(low), float(high), float(tested.pvalue))


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Return p-values corrected for how many there are (Holm 1979): each may be held against the level by itself.

    Example:
        >>> holm({"first": 0.01, "second": 0.04, "third": 0.03})
        {'first': 0.03, 'third': 0.06, 'second': 0.06}
    """
    corrected, largest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        corrected[name] = largest
    return corrected
