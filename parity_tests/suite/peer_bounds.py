"""How large the rounding errors of the frameworks' own losses can be, in float64, computed from the data."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.bounds import Bound
from parity_tests.truth.cases import Case
from parity_tests.truth.oracle import Truth
from parity_tests.truth.precision import FORMATS, FloatArray


class LogSoftmax(NamedTuple):
    """[N, K], classes last: size of log p and its error, as a peer computes it in two forms. 0 where no class counts.

    Args:
        size: -log p = d + L, with the gap d = max z - z and L = log sum exp(-d).
        error: of (z - m) - log(s), as torch's and JAX's log_softmax compute it.
        unshifted_error: of (log(s) + m) - z, as Optax computes it for integer labels.
    """

    size: FloatArray
    error: FloatArray
    unshifted_error: FloatArray


def log_softmax(case: Case, truth: Truth, arithmetic: Arithmetic) -> LogSoftmax:
    """Return the size of log p and its error as a peer computes it.

    A gap is one rounded difference: u d. So exp(-d) has the relative error u (c_e + d), and s, their sum of depth h
    with the 1 of the largest logit inside, u (h + c_e + D) with D = sum p d. L = log(s) has that as its absolute error,
    and c_l u L. The subtraction of L adds u |log p|. The unshifted form has no gap to round; it adds u |m + L| instead.
    """
    rows, u = case.rows(), FORMATS["float64"].roundoff
    counts = counted_classes(case, truth)
    logits = np.where(counts, rows.logits, -np.inf)
    peak = np.max(logits, axis=-1, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    # A class of logit -inf has p = 0 exactly; as a target it makes the loss infinite, which needs no bound.
    gap = np.where(np.isfinite(logits), peak - logits, 0.0)
    log_sum = np.log(np.maximum(np.sum(np.exp(logits - peak), axis=-1, keepdims=True), 1.0))
    mean_gap = np.sum(truth.probabilities * gap, axis=-1, keepdims=True)
    size = gap + log_sum
    depth = arithmetic.depth(case.num_classes)
    log_sum_error = u * (depth + arithmetic.exp + mean_gap + arithmetic.log1p * log_sum)
    forms = (size, log_sum_error + u * (gap + size), log_sum_error + u * (np.abs(peak + log_sum) + size))
    return LogSoftmax(*(np.where(counts, form, 0.0) for form in forms))


def counted_classes(case: Case, truth: Truth) -> NDArray[np.bool_]:
    """Return [N, K]: the classes of the mask in the rows that count."""
    return truth.counted[:, None] & case.rows().allowed


def peer_bound(case: Case, truth: Truth, arithmetic: Arithmetic, unshifted: bool = False) -> Bound:
    """Return the first-order bound of a peer, which sums w q log p.

    Each of the products w_k q_k log p_k has the error of log p_k and up to 5 roundings: (1 - e) t + e/K has 3, and w
    and log p come in with one product each. (For indices torch rounds 1 - e, its product, w's, and the sum of the two
    parts.) Their sum over the classes has depth h. All terms have one sign, so nothing cancels. A sum over rows adds
    its own depth; the division by a denominator that was summed likewise adds that once more, and 1.

    A gradient entry is G p_k - g_k, where g_k = w_k q_k upstream / denominator is rounded up to 6 times besides the
    denominator, G is the sum of them, and p_k is either exp(log p_k) or exp(-d_k) / s, whose error is no larger. With
    the division or the product by p_k, and the difference, that makes
    G p_k (error of log p_k + u (c_e + h + 8 + denominator)) + g_k u (6 + denominator) + u |G p_k - g_k|.
    """
    u, tiny = FORMATS["float64"].roundoff, FORMATS["float64"].smallest_normal
    log_p = log_softmax(case, truth, arithmetic)
    depth, num_rows = arithmetic.depth(case.num_classes), truth.counted.size
    wq = truth.target_size * (1.0 if case.class_weight is None else case.class_weight)
    of_log_p = log_p.unshifted_error if unshifted else log_p.error
    row = np.sum(wq * (of_log_p + u * (depth + 5) * log_p.size), axis=-1)

    reduction = case.options["reduction"]
    of_denominator = arithmetic.depth(num_rows) + 1 if reduction == "mean" else 0
    factor = np.abs(truth.factor)
    loss = row
    if reduction != "none":
        # Torch adds up the terms of all rows and classes of soft labels at once.
        terms = num_rows * (case.num_classes if case.labels.dtype.kind == "f" else 1)
        roundings = arithmetic.depth(terms) + of_denominator
        scale = np.max(factor) / np.max(np.abs(case.rows().upstream))
        finite = np.where(np.isfinite(truth.row_loss), np.abs(truth.row_loss), 0.0)
        loss = np.asarray(scale * np.sum(row + u * roundings * finite))

    mass = np.sum(wq, axis=-1, keepdims=True)
    p = truth.probabilities
    gradient = mass * p * (log_p.error + u * (arithmetic.exp + depth + 8 + of_denominator))
    gradient += u * (6 + of_denominator) * wq + u * np.abs(mass * p - wq)
    smallest = np.where(counted_classes(case, truth), 2 * tiny, 0.0)
    return Bound(loss=loss, gradient=factor[:, None] * gradient + smallest)


def leaf_bounds(case: Case, truth: Truth, arithmetic: Arithmetic) -> dict[str, FloatArray]:
    """Return the bounds of the gradients with respect to soft labels, [N, K], and class weights, [K], on either side.

    They are (1 - e) w_k log p_k and the sum over rows of q_k log p_k, each times upstream / denominator: the error of
    log p_k, the peer's being the larger, up to 8 roundings, and the sum's depth.
    """
    u, num_rows = FORMATS["float64"].roundoff, truth.counted.size
    log_p = log_softmax(case, truth, arithmetic)
    factor = np.abs(truth.factor)[:, None]
    weight = 1.0 if case.class_weight is None else case.class_weight
    kept = (1 - case.rows().smoothing)[:, None]
    of_labels = factor * kept * weight * (log_p.error + 8 * u * log_p.size)
    of_weight = factor * truth.target_size * (log_p.error + u * (8 + arithmetic.depth(num_rows)) * log_p.size)
    return {"labels": of_labels, "weight": np.sum(of_weight, axis=0)}
