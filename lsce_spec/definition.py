"""The loss of one row, written once and run at any precision.

    loss = - sum_{k in V} w_k q_k log p_k  +  z_loss * lse^2  [ - H(q) ]
    d loss / d z_k = (S p_k - w_k q_k + 2 z_loss lse p_k) * d softcap,   S = sum_{k in V} w_k q_k

Logits are plain numbers and `maths` is any module with exp, log, log1p, tanh and fsum: Python's `math`, or
mpmath's `mp` context, which makes these very lines the 50-digit oracle of the parity tests. The target q is a
constant to the gradient, also where a convention adds something to it at the largest logit. With
d_k = max(z) - z_k every term of -log p_k = d_k + log sum exp(-d) is >= 0, so a large offset in the logits cancels
nothing, and log1p of the sum without its maximum keeps the relative accuracy of small losses.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lsce_spec.conventions import Convention, ConventionName, Number, find_convention

# Both packages add up differences of logits in this unit. So the sum of up to 2^24 differences near the largest number
# does not overflow before it is multiplied by the target, and a power of two rounds nothing.
GAP_UNIT = 2.0**24


@dataclass(frozen=True)
class Row:
    """What the loss of one row consists of.

    Args:
        loss: the loss, a number.
        gradient: derivative of the loss by each of the K logits; 0 outside the class mask.
        lse: log of the sum of the exponentials of the (softcapped) logits.
        probabilities: softmax of the (softcapped) logits; 0 outside the class mask.
        target: what the loss was taken against: the target that was passed, and `at_max` at the largest logit.
    """

    loss: Number
    gradient: list[Number]
    lse: Number
    probabilities: list[Number]
    target: list[Number]


def target_distribution(
    label: int | Sequence[Number],
    num_classes: int,
    *,
    smoothing: Number,
    convention: ConventionName | Convention = "uniform",
    prior: Sequence[Number] | None = None,
    class_mask: Sequence[bool] | None = None,
) -> list[Number]:
    """Return the smoothed target q of one row.

    Args:
        label: class index, or the probabilities of a soft label.
        num_classes: number of classes K, masked ones included.
        smoothing: number in [0, 1].
        convention: name or `Convention`.
        prior: K probabilities that replace the uniform distribution of "uniform".
        class_mask: K booleans, True for the classes that take part.

    Example: the second of five classes, 0.1 spread over all five.
        >>> target_distribution(1, 5, smoothing=0.1)
        [0.02, 0.92, 0.02, 0.02, 0.02]
    """
    convention = find_convention(convention)
    allowed = [True] * num_classes if class_mask is None else [bool(member) for member in class_mask]
    spread_over = sum(allowed)

    def target(k: int) -> Number:
        if not isinstance(label, int):
            if prior is not None:
                return (1 - smoothing) * label[k] + smoothing * prior[k]
            return label[k] if spread_over == 1 else convention.soft_target(label[k], smoothing, spread_over)
        if prior is not None:
            return (1 - smoothing) * (k == label) + smoothing * prior[k]
        if spread_over == 1:
            return k == label
        side = convention.on if k == label else convention.off
        return side(smoothing, spread_over)

    return [target(k) if allowed[k] else 0 for k in range(num_classes)]


@dataclass(frozen=True)
class ModelRow:
    """The model's distribution of one row, whatever the label.

    Args:
        lse: log of the sum of the exponentials of the (softcapped) logits.
        entropy: -sum p_k log p_k of the softmax p of the (softcapped) logits, in nats.
        lse_gradient: derivative of `lse` by each of the K logits; 0 outside the class mask.
        entropy_gradient: likewise of `entropy`.
    """

    lse: Number
    entropy: Number
    lse_gradient: list[Number]
    entropy_gradient: list[Number]


def model_row(
    logits: Sequence[Number],
    *,
    class_mask: Sequence[bool] | None = None,
    softcap: Number | None = None,
    maths: Any = math,
) -> ModelRow:
    """Return log-sum-exp and entropy of one row, with their derivatives.

    With d_k = max(z) - z_k and L = log sum exp(-d), the entropy is L + sum p_k d_k. Its derivative with respect to z_k
    is p_k (d_k - sum p_j d_j).

    Args:
        logits: K numbers; those outside the mask may be anything.
        class_mask: K booleans, True for the classes that take part.
        softcap: c of z <- c tanh(z / c), or None.
        maths: module with exp, log1p, tanh and fsum for the type of the numbers.

    Example: two classes, equal logits.
        >>> round(model_row([0.0, 0.0]).entropy, 4)
        0.6931
    """
    classes = [k for k in range(len(logits)) if class_mask is None or class_mask[k]]
    capped = {k: logits[k] if softcap is None else softcap * maths.tanh(logits[k] / softcap) for k in classes}
    top = max(classes, key=lambda k: logits[k])
    gap = {k: capped[top] - capped[k] for k in classes}
    exponential = {k: maths.exp(-gap[k]) for k in classes}
    without_top = maths.fsum([exponential[k] for k in classes if k != top])
    log_sum, probability = maths.log1p(without_top), {k: exponential[k] / (1 + without_top) for k in classes}
    # A logit of -inf has the probability 0, and 0 * inf counts as 0.
    product = {k: probability[k] * gap[k] if probability[k] != 0 else 0 for k in classes}
    mean_gap = maths.fsum(product.values())

    lse_gradient: list[Number] = [0] * len(logits)
    entropy_gradient: list[Number] = [0] * len(logits)
    for k in classes:
        slope = 1 if softcap is None else _softcap_slope(logits[k], softcap, maths)
        lse_gradient[k] = probability[k] * slope
        entropy_gradient[k] = (product[k] - probability[k] * mean_gap) * slope
    return ModelRow(capped[top] + log_sum, log_sum + mean_gap, lse_gradient, entropy_gradient)


def loss_row(
    logits: Sequence[Number],
    target: Sequence[Number],
    *,
    class_weight: Sequence[Number] | None = None,
    class_mask: Sequence[bool] | None = None,
    z_loss: Number = 0,
    softcap: Number | None = None,
    subtract_entropy: bool = False,
    at_max: Number = 0,
    maths: Any = math,
) -> Row:
    """Return loss and gradient of one row.

    Args:
        logits: K numbers; those outside the mask may be anything.
        target: K numbers from `target_distribution`.
        class_weight: K numbers w, 1 without.
        class_mask: K booleans, True for the classes that take part.
        z_loss: factor of lse^2.
        softcap: c of z <- c tanh(z / c), or None.
        subtract_entropy: whether to subtract the entropy of the target, which turns cross-entropy into
            Kullback-Leibler divergence.
        at_max: what the convention adds to the target at the largest logit, shared alike among the largest.
        maths: module with exp, log, log1p, tanh and fsum for the type of the numbers.

    Example: two classes, equal logits.
        >>> round(loss_row([0.0, 0.0], [1.0, 0.0]).loss, 4)
        0.6931
    """
    classes = [k for k in range(len(logits)) if class_mask is None or class_mask[k]]
    capped = {k: logits[k] if softcap is None else softcap * maths.tanh(logits[k] / softcap) for k in classes}
    # Largest before the softcap, which is monotonic but, in finite precision, makes large logits equal.
    top = max(classes, key=lambda k: logits[k])
    largest = [k for k in classes if logits[k] == logits[top]]
    target = [target[k] + at_max / len(largest) if k in largest else target[k] for k in range(len(logits))]
    weighted = {k: target[k] if class_weight is None else class_weight[k] * target[k] for k in classes}

    gap = {k: capped[top] - capped[k] for k in classes}
    exponential = {k: maths.exp(-gap[k]) for k in classes}
    without_top = maths.fsum([exponential[k] for k in classes if k != top])
    log_sum = maths.log1p(without_top)
    lse = capped[top] + log_sum
    mass = maths.fsum(weighted.values())

    # 0 * inf counts as 0: a class that is no target may have a logit of -inf.
    loss = maths.fsum([weighted[k] * gap[k] for k in classes if weighted[k] != 0]) + mass * log_sum
    loss += z_loss * lse * lse
    if subtract_entropy:
        loss += maths.fsum([target[k] * maths.log(target[k]) for k in classes if target[k] > 0])

    probabilities: list[Number] = [0] * len(logits)
    gradient: list[Number] = [0] * len(logits)
    for k in classes:
        probabilities[k] = exponential[k] / (1 + without_top)
        gradient[k] = (mass + 2 * z_loss * lse) * probabilities[k] - weighted[k]
        if softcap is not None:
            gradient[k] *= _softcap_slope(logits[k], softcap, maths)
    return Row(loss=loss, gradient=gradient, lse=lse, probabilities=probabilities, target=target)


def _softcap_slope(logit: Number, softcap: Number, maths: Any) -> Number:
    """Return the derivative of the softcap: that of tanh as 1 / cosh^2, without the cancellation of 1 - tanh^2."""
    half = maths.exp(-abs(logit / softcap))
    return (2 * half / (1 + half * half)) ** 2


def mean_denominator(
    labels: Sequence[int | Sequence[Number]],
    counted: Sequence[bool],
    class_weight: Sequence[Number] | None = None,
    maths: Any = math,
) -> Number:
    """Return what `reduction="mean"` divides the sum of the row losses by.

    That is the sum of the class weights of the labels over the rows that count; without class weights, and for
    soft labels, the number of those rows.
    """
    kept = [label for label, counts in zip(labels, counted, strict=True) if counts]
    if class_weight is None:
        return len(kept)
    return maths.fsum([class_weight[label] if isinstance(label, int) else 1 for label in kept])
