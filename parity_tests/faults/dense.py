"""Wrong losses, to prove that the bounds reject them.

`evaluate` is one more implementation of the loss, in NumPy, with a switch for each fault. Without a fault it is within
every bound, so a mutant is rejected for its fault alone. Transcendental functions and quotients are those of the
device, rounded correctly if none is given; everything else happens in the compute dtype. Results are rounded to the
dtypes that the packages return.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity_tests.truth.cases import Case, is_class
from parity_tests.truth.comparison import Result
from parity_tests.truth.precision import FloatArray, compute_dtype, round_to
from parity_tests.truth.simulation import EXACT, Simulation

# Name -> what is wrong. The names are the switches of `evaluate`.
FAULTS = {
    "zero_gradient": "the gradient is 0",
    "zero_non_target_gradient": "the gradient is 0 except at the label",
    "other_off": "e/(K-1) for e/K, or e/K for e/(K-1)",
    "unsmoothed_gradient": "the smoothing is missing in the gradient",
    "smoothing_detached": "the smoothing term of the loss has no gradient",
    "unsmoothed_loss": "the smoothing is missing in the loss",
    "sum_for_mean": "the sum is returned for the mean",
    "all_rows_counted": "the mean divides by all rows, not by those that count",
    "ignored_rows_leak": "rows that do not count enter the smoothing term",
    "weight_not_in_smoothing": "class weights are missing from the smoothing term",
    "weight_not_in_denominator": "the mean divides by the number of rows, not by the sum of the labels' weights",
    "gradient_sign": "the gradient has the other sign",
    "label_off_by_one": "each label is the next class",
    "z_loss_gradient": "the z-loss is missing in the gradient",
    "softcap_derivative": "the derivative of the softcap is missing",
    "padding_joins": "the classes are padded to a multiple of 128 with logits 0 that join the softmax",
    "local_classes": "e/K with the K of half a vocabulary, as on a shard",
    "maximum_kept": "the maximum is not subtracted before exp",
    "bfloat16_sum": "the sum of exponentials is rounded to bfloat16",
    "bfloat16_loss": "the loss is rounded to bfloat16",
    "infinity_to_nan": "a logit of -inf makes its row NaN",
    "upstream_ignored": "the gradient is not multiplied by the incoming gradient",
    "last_block_dropped": "classes beyond the last multiple of 4 are left out of the sum of exponentials",
    "stale_lse": "each row uses the log-sum-exp of the previous row",
    "entropy_kept": "the entropy of the target is not subtracted",
    "log_for_log1p": "log(1 + x) is used for log1p(x)",
    "z_loss_slightly_off": "the z-loss is too large by a factor of 1.001",
    "softcap_slightly_off": "the softcap is too large by a factor of 1.0001",
    "entropy_slightly_off": "the entropy is too large by a factor of 1.0001",
    "max_sup_at_label": "the smoothing is taken from the label, not from the largest logit",
    "max_sup_first": "the smoothing is taken from the first of several largest logits alone",
    "label_without_share": "1-e at the label and e/K elsewhere: the label misses its share of the smoothing",
    "label_kept_whole": "1 at the label and e/K elsewhere: nothing is taken from the label",
    "pad_class_left_out": "no smoothing goes to class 0, the padding: e/(K-2) elsewhere",
    "local_mean": "the smoothing goes to the first half of the classes alone, as with the mean of a shard's logits",
    "bfloat16_logits": "the logits are rounded to bfloat16",
    "bfloat16_gradient": "the gradient is rounded to bfloat16",
    "entropy_subtracted": "the entropy of the target is subtracted",
    "gradient_of_sum": "the gradient is that of the sum, the loss is the mean",
    "base_two": "the loss is in bits, not in nats",
    "masked_classes_smoothed": "the smoothing is divided by all K classes, not by those of the class mask",
    "first_class_mask": "every row has the class mask of the first row",
    "prior_ignored": "the smoothing goes to all classes alike, not to the prior",
}

# Name -> what to change, as the end of "Change in B: ".
CURES = {
    "zero_gradient": "let the gradient reach the logits",
    "zero_non_target_gradient": "let the gradient reach all classes, through the log-sum-exp",
    "other_off": "give the smoothing to the other number of classes, K or K - 1",
    "unsmoothed_gradient": "differentiate the smoothed target, not the one-hot label",
    "smoothing_detached": "remove the detach or stop_gradient from the smoothing term",
    "unsmoothed_loss": "return the loss of the smoothed target",
    "sum_for_mean": "return the mean",
    "all_rows_counted": "divide by the number of rows that count",
    "ignored_rows_leak": "mask the smoothing term too",
    "weight_not_in_smoothing": "multiply every term of the sum over the classes with its class weight",
    "weight_not_in_denominator": "divide by the sum of the labels' weights",
    "gradient_sign": "change the sign of the gradient",
    "label_off_by_one": "take the labels as they are, from 0 to K - 1",
    "z_loss_gradient": "remove the detach or stop_gradient from the z-loss",
    "softcap_derivative": "multiply the gradient with 1 - tanh(z / c)^2",
    "padding_joins": "mask the padded classes with -inf",
    "local_classes": "divide the smoothing by the number of all classes, not of those on one device",
    "maximum_kept": "subtract the largest logit before exp, as log_softmax does",
    "bfloat16_sum": "add up the exponentials in float32",
    "bfloat16_loss": "return the loss in float32",
    "infinity_to_nan": "let 0 times infinity be 0",
    "upstream_ignored": "multiply the gradient with the incoming gradient",
    "last_block_dropped": "take the last block of classes too",
    "stale_lse": "take each row's own log-sum-exp",
    "entropy_kept": "subtract the entropy of the target",
    "log_for_log1p": "use log1p, or log_softmax",
    "max_sup_at_label": "take the smoothing from the largest logit",
    "max_sup_first": "share what is taken among all largest logits",
    "label_without_share": "give the label its share too: 1 - e + e/K",
    "label_kept_whole": "take the smoothing from the label: 1 - e + e/K",
    "pad_class_left_out": "give class 0 its share of the smoothing",
    "local_mean": "take the mean over all classes, not over those on one device",
    "bfloat16_logits": "keep the logits in float32",
    "bfloat16_gradient": "return the gradient in the dtype of the logits",
    "entropy_subtracted": "take the cross-entropy, not the KL divergence",
    "gradient_of_sum": "divide the gradient too",
    "base_two": "use the natural logarithm",
    "masked_classes_smoothed": "divide the smoothing by the number of classes that the mask allows",
    "first_class_mask": "give each row its own class mask",
    "prior_ignored": "give the smoothing to the classes as the prior says",
}


def evaluate(case: Case, fault: str | None = None, arithmetic: Simulation = EXACT) -> Result:
    """Return loss and gradient of a case, wrong in the way that `fault` names, on a device of that arithmetic."""
    assert fault is None or fault in FAULTS, fault
    with np.errstate(all="ignore"):
        return _evaluate(case, fault, arithmetic)


@dataclass(frozen=True)
class _Inputs:
    """A call as the formulas take it: N rows, K classes last, in the compute dtype.

    Args:
        case: the call.
        fault: what is wrong.
        arithmetic: of the device.
        dtype: the compute dtype.
        labels: [N], 0 where a row does not count or its label is no class; or [N, K].
        bad: [N], rows that count and whose label is no class.
        allowed: [N, K], classes of the mask.
        raw: [N, K], logits before the softcap; 0 outside of the mask and in rows that do not count.
        softcap: the softcap, or None.
        logits: [N, K], after the softcap.
        weight: [K].
    """

    case: Case
    fault: str | None
    arithmetic: Simulation
    dtype: np.dtype[Any]
    labels: NDArray[Any]
    bad: NDArray[np.bool_]
    allowed: NDArray[np.bool_]
    raw: NDArray[Any]
    softcap: float | None
    logits: NDArray[Any]
    weight: NDArray[Any]

    @property
    def soft(self) -> bool:
        """Whether the labels are probabilities."""
        return self.case.labels.dtype.kind == "f"

    @property
    def z_loss(self) -> Any:
        """The factor of the z-loss, in the compute dtype."""
        slightly_off = 1.001 if self.fault == "z_loss_slightly_off" else 1
        return self.dtype.type(self.case.options.get("z_loss", 0.0) * slightly_off)

    @property
    def max_sup(self) -> bool:
        """Whether the smoothing is taken from the largest logits."""
        return self.case.options.get("convention") == "max_sup"

    def is_label(self) -> NDArray[np.bool_]:
        """Return [N, K]: where the class is the row's label."""
        return np.asarray(np.arange(self.case.num_classes) == self.labels[:, None])


class _Softmax(NamedTuple):
    """The softmax of each row: m = max z [N, 1], m - z [N, K], log sum exp(z - m) [N], and the probabilities [N, K]."""

    peak: NDArray[Any]
    gap: NDArray[Any]
    log_sum: NDArray[Any]
    p: NDArray[Any]

    @property
    def lse(self) -> NDArray[Any]:
        """Log-sum-exp [N]."""
        return np.asarray(self.peak[:, 0] + self.log_sum)


def _evaluate(case: Case, fault: str | None, arithmetic: Simulation) -> Result:
    inputs = _inputs(case, fault, arithmetic)
    softmax = _softmax(inputs)
    target, gradient_target = _targets(inputs)
    losses = _row_losses(inputs, softmax, target)
    gradient = _row_gradients(inputs, softmax, gradient_target)
    loss, gradient = _reduced(inputs, losses, gradient)
    loss, gradient = _last_faults(inputs, loss, gradient)
    return Result(
        loss=round_to(loss, inputs.dtype.name),
        gradient=round_to(gradient, case.dtype),
        loss_dtype=inputs.dtype.name,
        gradient_dtype=case.dtype,
    )


def _inputs(case: Case, fault: str | None, arithmetic: Simulation) -> _Inputs:
    dtype = np.dtype(compute_dtype(case.dtype))
    rows, num_classes = case.rows(), case.num_classes
    allowed = rows.allowed
    if fault == "first_class_mask" and len(allowed):
        allowed = np.broadcast_to(allowed[0], allowed.shape)
    labels, bad = rows.labels, np.zeros(len(rows.labels), bool)
    if labels.ndim == 1:
        bad = rows.counted & ~is_class(rows._replace(allowed=allowed))
        labels = np.where(rows.counted & ~bad, labels, 0).astype(np.int64)
        if fault == "label_off_by_one":
            labels = (labels + 1) % num_classes
    given = round_to(rows.logits, "bfloat16") if fault == "bfloat16_logits" else rows.logits
    raw = np.where(allowed & rows.counted[:, None], given, 0).astype(dtype)
    softcap = case.options.get("softcap")
    if softcap is not None and fault == "softcap_slightly_off":
        softcap *= 1 + 1e-4
    return _Inputs(
        case=case,
        fault=fault,
        arithmetic=arithmetic,
        dtype=dtype,
        labels=labels,
        bad=bad,
        allowed=allowed,
        raw=raw,
        softcap=softcap,
        logits=raw if softcap is None else _capped(raw, dtype.type(softcap), arithmetic),
        weight=np.ones(num_classes, dtype) if case.class_weight is None else case.class_weight.astype(dtype),
    )


def _capped(raw: NDArray[Any], softcap: Any, arithmetic: Simulation) -> NDArray[Any]:
    return np.asarray(softcap * arithmetic.apply("tanh", arithmetic.divide(raw, softcap)))


# --- The target -----------------------------------------------------------------------------------------------------


def _targets(inputs: _Inputs) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the target [N, K] that the loss has, and the one that its gradient has."""
    case, fault, allowed, dtype = inputs.case, inputs.fault, inputs.allowed, inputs.dtype
    target = smoothed_target(case, inputs.labels, allowed, dtype, fault)
    gradient_target = target
    if fault in {"unsmoothed_gradient", "unsmoothed_loss"}:
        plain = smoothed_target(replace(case, smoothing=0.0, prior=None), inputs.labels, allowed, dtype, None)
        gradient_target, target = (plain, target) if fault == "unsmoothed_gradient" else (target, plain)
    if fault == "smoothing_detached":
        probabilities = inputs.labels if inputs.soft else inputs.is_label()
        kept = 1 if inputs.max_sup else 1 - case.rows().smoothing[:, None]
        gradient_target = np.where(allowed, kept * probabilities, 0).astype(dtype)
    if inputs.max_sup:
        taken = np.where(allowed.sum(-1, keepdims=True) > 1, _taken_from_largest(inputs), 0)
        if fault != "unsmoothed_loss":
            target = target - taken
        if fault not in {"unsmoothed_gradient", "smoothing_detached"}:
            gradient_target = gradient_target - taken
    return target, gradient_target


def smoothed_target(
    case: Case, labels: NDArray[Any], allowed: NDArray[np.bool_], dtype: np.dtype[Any], fault: str | None
) -> NDArray[Any]:
    """Return the smoothed target [N, K] of labels [N] or [N, K], wrong in the way that `fault` names.

    `allowed` are the classes of the mask, [N, K] or [K].
    For "max_sup" it is the target before the smoothing is taken from the largest logits.
    """
    smoothing = np.broadcast_to(np.asarray(case.smoothing), case.batch_shape).reshape(-1, 1).astype(np.float64)
    spread_over = np.broadcast_to(allowed, (len(smoothing), case.num_classes)).sum(-1, keepdims=True)
    if fault == "masked_classes_smoothed":
        spread_over = np.full_like(spread_over, case.num_classes)
    soft = case.labels.dtype.kind == "f"
    probabilities = labels if soft else (np.arange(case.num_classes) == labels[:, None]).astype(np.float64)
    target = _wrong_target(fault, probabilities, smoothing, spread_over)
    if target is None and case.prior is not None and fault not in {"prior_ignored", "other_off"}:
        target = (1 - smoothing) * probabilities + smoothing * case.prior
    if target is None:
        convention = case.options.get("convention", "uniform")
        if fault == "other_off":
            convention = "non_target" if convention == "uniform" else "uniform"
        if fault == "local_classes":
            spread_over = -(-spread_over // 2)
        target = _target_of_convention(convention, probabilities, smoothing, spread_over)
    masked: NDArray[Any] = np.where(allowed, target, 0).astype(dtype)
    return masked


def _wrong_target(
    fault: str | None, probabilities: NDArray[Any], smoothing: FloatArray, spread_over: NDArray[Any]
) -> NDArray[Any] | None:
    """Return the target of a fault that spreads the smoothing in a way of its own; None for any other fault."""
    kept, num_classes = (1 - smoothing) * probabilities, probabilities.shape[1]
    target: NDArray[Any] | None = None
    if fault in {"label_without_share", "label_kept_whole"} and np.any(spread_over > 1):
        target = probabilities if fault == "label_kept_whole" else kept
        target = target + smoothing * (1 - probabilities) / spread_over
    elif fault == "pad_class_left_out" and np.any(spread_over > 2):
        rest = (1 - probabilities) * (np.arange(num_classes) != 0)
        target = kept + smoothing * rest / np.maximum(spread_over - 2, 1)
    elif fault == "local_mean" and np.any(spread_over > 1):
        half = -(-num_classes // 2)
        target = kept + smoothing * (np.arange(num_classes) < half) / half
    return target


def _target_of_convention(
    convention: str, probabilities: NDArray[Any], smoothing: FloatArray, spread_over: NDArray[Any]
) -> NDArray[Any]:
    kept = (1 - smoothing) * probabilities
    if convention == "uniform":
        target = kept + smoothing / spread_over
    elif convention == "max_sup":
        target = probabilities + smoothing / spread_over
    elif convention == "non_target":
        target = kept + smoothing * (1 - probabilities) / (spread_over - 1)
    else:
        target = np.minimum(np.maximum(probabilities, smoothing / (spread_over - 1)), 1 - smoothing)
    return np.where(spread_over == 1, probabilities, target)


def _taken_from_largest(inputs: _Inputs) -> NDArray[Any]:
    """Return [N, K]: what "max_sup" takes from the target of the largest logits, ties sharing."""
    raw, allowed, case = inputs.raw, inputs.allowed, inputs.case
    largest = allowed & (raw == np.max(np.where(allowed, raw, -np.inf), axis=-1, keepdims=True, initial=-np.inf))
    if inputs.fault == "max_sup_at_label" and not inputs.soft:
        largest = inputs.is_label()
    if inputs.fault == "max_sup_first":
        largest = np.arange(case.num_classes) == np.argmax(largest, axis=-1)[:, None]
    smoothing = np.broadcast_to(np.asarray(case.smoothing), case.batch_shape).reshape(-1, 1)
    return np.where(largest, smoothing / largest.sum(-1, keepdims=True), 0).astype(inputs.dtype)


def _weighted(inputs: _Inputs, target: NDArray[Any]) -> NDArray[Any]:
    """Return the target times the class weights."""
    weight = inputs.weight
    if inputs.fault == "weight_not_in_smoothing" and not inputs.soft:
        weight = np.where(inputs.is_label(), weight[inputs.labels][:, None], 1)
    product: NDArray[Any] = target * weight
    return product


# --- The softmax ----------------------------------------------------------------------------------------------------


def _softmax(inputs: _Inputs) -> _Softmax:
    logits, allowed, fault = inputs.logits, inputs.allowed, inputs.fault
    peak = np.max(np.where(allowed, logits, -np.inf), axis=-1, keepdims=True, initial=-np.inf).astype(inputs.dtype)
    gap = np.where(allowed, peak - logits, 0).astype(inputs.dtype)
    exponential = np.where(allowed, inputs.arithmetic.apply("exp", -gap), 0)
    if fault == "infinity_to_nan":
        exponential = np.where(np.isinf(gap), np.nan, exponential)
    log_sum, total = _log_sum(inputs, exponential, gap)
    p = inputs.arithmetic.divide(exponential, total[:, None])
    if fault == "stale_lse":
        log_sum, p = np.roll(log_sum, 1), inputs.arithmetic.divide(exponential, np.roll(total, 1)[:, None])
    return _Softmax(peak, gap, log_sum, p)


def _log_sum(inputs: _Inputs, exponential: NDArray[Any], gap: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return log sum exp(z - m), and the sum."""
    logits, allowed, fault, arithmetic = inputs.logits, inputs.allowed, inputs.fault, inputs.arithmetic
    num_rows, num_classes = exponential.shape
    if num_rows == 0:
        return np.zeros(0, exponential.dtype), np.ones(0, exponential.dtype)
    others = exponential.copy()
    others[np.arange(num_rows), np.argmin(np.where(allowed, gap, np.inf), axis=-1)] = 0
    if fault == "last_block_dropped":
        others[:, num_classes - num_classes % 4 :] = 0
    if fault == "padding_joins":
        peak = gap + logits
        padding = np.exp(-np.max(np.where(allowed, peak, -np.inf), axis=-1, keepdims=True)) * (-num_classes % 128)
        others = np.concatenate([others, padding.astype(others.dtype)], axis=-1)
    rest = arithmetic.sum(others, [1])
    if fault == "bfloat16_sum":
        rest = round_to(rest, "bfloat16").astype(rest.dtype)
    if fault == "maximum_kept":
        direct = np.where(allowed, np.exp(logits), 0).sum(-1)
        peak = np.max(np.where(allowed, logits, -np.inf), axis=-1)
        return np.log(direct) - peak, (1 + rest) * (direct / direct)
    if fault == "log_for_log1p":
        return arithmetic.apply("log", rest + 1), 1 + rest
    return arithmetic.apply("log1p", rest), 1 + rest


# --- Loss and gradient ----------------------------------------------------------------------------------------------


def _row_losses(inputs: _Inputs, softmax: _Softmax, target: NDArray[Any]) -> NDArray[Any]:
    """Return [N]: the loss of each row."""
    rows, options, fault, dtype = inputs.case.rows(), inputs.case.options, inputs.fault, inputs.dtype
    wq = _weighted(inputs, target)
    terms = np.where((wq == 0) & np.isinf(softmax.gap), 0, wq * softmax.gap)
    losses = terms.sum(-1) + wq.sum(-1) * softmax.log_sum + inputs.z_loss * softmax.lse**2
    if (options.get("subtract_entropy") or fault == "entropy_subtracted") and fault != "entropy_kept":
        log_q = inputs.arithmetic.apply("log", np.where(target > 0, target, 1).astype(dtype))
        losses = losses + (target * log_q).sum(-1) * dtype.type(1 + 1e-4 * (fault == "entropy_slightly_off"))
    leak = softmax.gap.mean(-1) * rows.smoothing + 1 if fault == "ignored_rows_leak" else 0
    return np.where(inputs.bad, np.nan, np.where(rows.counted, losses, leak)).astype(dtype)


def _row_gradients(inputs: _Inputs, softmax: _Softmax, target: NDArray[Any]) -> NDArray[Any]:
    """Return [N, K]: the gradient of each row's loss with respect to its logits."""
    fault, counted = inputs.fault, inputs.case.rows().counted
    wq = _weighted(inputs, target)
    coefficient = wq.sum(-1)
    if fault != "z_loss_gradient":
        coefficient = coefficient + 2 * inputs.z_loss * softmax.lse
    gradient = coefficient[:, None] * softmax.p - wq
    if inputs.softcap is not None and fault != "softcap_derivative":
        gradient = gradient * (1 - (inputs.logits / inputs.dtype.type(inputs.softcap)) ** 2)
    gradient = np.where(inputs.bad[:, None], np.nan, np.where(counted[:, None], gradient, 0))
    return np.where(inputs.allowed, gradient, 0)


def _reduced(inputs: _Inputs, losses: NDArray[Any], gradient: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the reduced loss and its gradient, which is multiplied by the incoming gradient."""
    fault, dtype, given = inputs.fault, inputs.dtype, inputs.case.rows().upstream
    upstream = np.ones(len(given)) if fault == "upstream_ignored" else given
    loss, factor = _reduction(inputs, losses, upstream)
    if fault == "base_two":
        loss, factor = loss / dtype.type(np.log(2)), factor / np.log(2)
    scale = (upstream if fault == "gradient_of_sum" else factor)[:, None].astype(dtype)
    return loss, np.where(scale == 0, 0, scale * gradient)


def reduced(case: Case, losses: FloatArray, gradient: FloatArray | None = None) -> tuple[FloatArray, FloatArray]:
    """Return losses of rows, reduced as a case asks, and the gradient [N, K] of each, as it is then."""
    inputs = _inputs(case, None, EXACT)
    of_rows = np.zeros((len(losses), 1)) if gradient is None else gradient
    loss, scaled = _reduced(inputs, losses, of_rows)
    return np.asarray(loss, np.float64), np.asarray(scaled, np.float64)


def _reduction(inputs: _Inputs, losses: NDArray[Any], upstream: FloatArray) -> tuple[NDArray[Any], FloatArray]:
    """Return the reduced loss, and the factor of each row's gradient."""
    case, fault, counted = inputs.case, inputs.fault, inputs.case.rows().counted
    reduction = case.options.get("reduction", "none")
    if reduction == "none":
        return losses, upstream
    if reduction == "sum" or fault == "sum_for_mean":
        return losses.sum(), upstream
    denominator = case.options.get("denominator")
    if denominator is None:
        counts = np.ones_like(counted) if fault == "all_rows_counted" else counted
        weighted = case.class_weight is not None and not inputs.soft and fault != "weight_not_in_denominator"
        denominator = float((inputs.weight[inputs.labels] * counts).sum() if weighted else counts.sum())
    if denominator == 0:
        return np.zeros((), losses.dtype), np.zeros_like(upstream)
    return losses.sum() / losses.dtype.type(denominator), upstream / denominator


def _last_faults(inputs: _Inputs, loss: NDArray[Any], gradient: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return loss and gradient with the faults that change nothing but the finished result."""
    fault = inputs.fault
    if fault == "zero_gradient":
        gradient = np.zeros_like(gradient)
    if fault == "zero_non_target_gradient":
        at_label = inputs.labels if not inputs.soft else np.argmax(inputs.labels, axis=-1)
        gradient = np.where(np.arange(inputs.case.num_classes) == at_label[:, None], gradient, 0)
    if fault == "gradient_sign":
        gradient = -gradient
    if fault == "bfloat16_loss":
        loss = round_to(loss, "bfloat16")
    if fault == "bfloat16_gradient":
        gradient = round_to(gradient, "bfloat16")
    return loss, gradient
