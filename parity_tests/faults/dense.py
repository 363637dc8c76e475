"""Wrong losses, to prove that the bounds reject them.

`evaluate` is one more implementation of the loss, in NumPy, with a switch for each fault. Without a fault it is within
every bound, so what rejects a mutant is its fault. Transcendental functions are evaluated in float64 and rounded, all
else happens in the compute dtype, and the results are rounded to the dtypes that the packages return.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import Result
from parity_tests.truth.precision import FloatArray, compute_dtype, round_to

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
    "weight_not_in_denominator": "the mean divides by the number of rows, not by their weights",
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
    "upstream_ignored": "the gradient is not multiplied with what comes from upstream",
    "last_block_dropped": "classes beyond the last multiple of 4 are left out of the sum of exponentials",
    "stale_lse": "each row uses the log-sum-exp of the row before it",
    "entropy_kept": "the entropy of the target is not subtracted",
    "log_for_log1p": "the logarithm is that of 1 plus the small rest, rounded",
    "z_loss_slightly_off": "the z-loss is a thousandth too large",
    "softcap_slightly_off": "the softcap is 1e-4 of itself too large",
    "entropy_slightly_off": "the entropy is 1e-4 of itself too large",
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
    "prior_ignored": "the smoothing goes to all classes alike, not to the prior",
}


def evaluate(case: Case, fault: str | None = None) -> Result:
    """Return loss and gradient of a case, wrong in the way that `fault` names."""
    assert fault is None or fault in FAULTS, fault
    with np.errstate(all="ignore"):
        return _evaluate(case, fault)


def _evaluate(case: Case, fault: str | None) -> Result:  # noqa: C901, PLR0912, PLR0915 - one formula, a switch a fault
    dtype = np.dtype(compute_dtype(case.dtype))
    rows, options = case.rows(), case.options
    num_rows, num_classes = rows.logits.shape
    counted, soft = rows.counted, case.labels.dtype.kind == "f"
    allowed = np.ones(num_classes, bool) if case.class_mask is None else case.class_mask
    labels = rows.labels
    bad = np.zeros(num_rows, bool)
    if not soft:
        inside = (labels >= 0) & (labels < num_classes)
        bad = counted & ~(inside & allowed[np.where(inside, labels, 0)])
        labels = np.where(counted & ~bad, labels, 0).astype(np.int64)
        if fault == "label_off_by_one":
            labels = (labels + 1) % num_classes

    given = round_to(rows.logits, "bfloat16") if fault == "bfloat16_logits" else rows.logits
    raw = np.where(allowed & counted[:, None], given, 0).astype(dtype)
    cap = options.get("softcap")
    if cap is not None and fault == "softcap_slightly_off":
        cap *= 1 + 1e-4
    logits = raw if cap is None else dtype.type(cap) * _apply(np.tanh, raw / dtype.type(cap))
    target = smoothed_target(case, labels, allowed, dtype, fault)
    gradient_target = target
    if fault in {"unsmoothed_gradient", "unsmoothed_loss"}:
        plain = smoothed_target(replace(case, smoothing=0.0, prior=None), labels, allowed, dtype, None)
        gradient_target, target = (plain, target) if fault == "unsmoothed_gradient" else (target, plain)
    if fault == "smoothing_detached":
        probabilities = labels if soft else np.arange(num_classes) == labels[:, None]
        kept = 1 if options.get("convention") == "max_sup" else 1 - rows.smoothing[:, None]
        gradient_target = np.where(allowed, kept * probabilities, 0).astype(dtype)
    weight = np.ones(num_classes, dtype) if case.class_weight is None else case.class_weight.astype(dtype)

    peak = np.max(np.where(allowed, logits, -np.inf), axis=-1, keepdims=True, initial=-np.inf).astype(dtype)
    gap = np.where(allowed, peak - logits, 0).astype(dtype)
    exponential = np.where(allowed, _apply(np.exp, -gap), 0)
    if fault == "infinity_to_nan":
        exponential = np.where(np.isinf(gap), np.nan, exponential)
    log_sum, total = _log_sum(exponential, gap, logits, allowed, fault)
    p = exponential / total[:, None]
    if fault == "stale_lse":
        log_sum, p = np.roll(log_sum, 1), exponential / np.roll(total, 1)[:, None]
    lse = peak[:, 0] + log_sum

    def weighted(q: NDArray[Any]) -> NDArray[Any]:
        applied = weight
        if fault == "weight_not_in_smoothing" and not soft:
            applied = np.where(np.arange(num_classes) == labels[:, None], weight[labels][:, None], 1)
        product: NDArray[Any] = q * applied
        return product

    if options.get("convention") == "max_sup" and allowed.sum() > 1:
        largest = allowed & (raw == np.max(np.where(allowed, raw, -np.inf), axis=-1, keepdims=True, initial=-np.inf))
        if fault == "max_sup_at_label" and not soft:
            largest = np.arange(num_classes) == labels[:, None]
        if fault == "max_sup_first":
            largest = np.arange(num_classes) == np.argmax(largest, axis=-1)[:, None]
        smoothing = np.broadcast_to(np.asarray(case.smoothing), case.batch_shape).reshape(-1, 1)
        taken = np.where(largest, smoothing / largest.sum(-1, keepdims=True), 0).astype(dtype)
        if fault != "unsmoothed_loss":
            target = target - taken
        if fault not in {"unsmoothed_gradient", "smoothing_detached"}:
            gradient_target = gradient_target - taken
    wq, gradient_wq = weighted(target), weighted(gradient_target)
    terms = np.where((wq == 0) & np.isinf(gap), 0, wq * gap)
    z_loss = dtype.type(options.get("z_loss", 0.0) * (1.001 if fault == "z_loss_slightly_off" else 1))
    losses = terms.sum(-1) + wq.sum(-1) * log_sum + z_loss * lse**2
    if (options.get("subtract_entropy") or fault == "entropy_subtracted") and fault != "entropy_kept":
        log_q = _apply(np.log, np.where(target > 0, target, 1))
        losses = losses + (target * log_q).sum(-1) * dtype.type(1 + 1e-4 * (fault == "entropy_slightly_off"))
    coefficient = gradient_wq.sum(-1)
    if fault != "z_loss_gradient":
        coefficient = coefficient + 2 * z_loss * lse
    gradient = coefficient[:, None] * p - gradient_wq
    if cap is not None and fault != "softcap_derivative":
        gradient = gradient * (1 - (logits / dtype.type(cap)) ** 2)
    gradient = np.where(bad[:, None], np.nan, np.where(counted[:, None], gradient, 0))
    gradient = np.where(allowed, gradient, 0)
    leak = np.where(allowed, peak - logits, 0).mean(-1) * rows.smoothing + 1 if fault == "ignored_rows_leak" else 0
    losses = np.where(bad, np.nan, np.where(counted, losses, leak)).astype(dtype)

    upstream = np.ones(num_rows) if fault == "upstream_ignored" else rows.upstream
    loss, factor = _reduce(case, losses, labels, weight, upstream, fault)
    if fault == "base_two":
        loss, factor = loss / dtype.type(np.log(2)), factor / np.log(2)
    scale = (upstream if fault == "gradient_of_sum" else factor)[:, None].astype(dtype)
    gradient = np.where(scale == 0, 0, scale * gradient)
    if fault == "zero_gradient":
        gradient = np.zeros_like(gradient)
    if fault == "zero_non_target_gradient":
        at_label = labels if not soft else np.argmax(rows.labels, axis=-1)
        gradient = np.where(np.arange(num_classes) == at_label[:, None], gradient, 0)
    if fault == "gradient_sign":
        gradient = -gradient
    if fault == "bfloat16_loss":
        loss = round_to(loss, "bfloat16")
    if fault == "bfloat16_gradient":
        gradient = round_to(gradient, "bfloat16")
    return Result(
        loss=round_to(loss, dtype.name),
        gradient=round_to(gradient, case.dtype),
        loss_dtype=dtype.name,
        gradient_dtype=case.dtype,
    )


def _apply(function: Callable[..., Any], values: NDArray[Any]) -> NDArray[Any]:
    """Evaluate in float64 and round to the dtype of the values."""
    result: NDArray[Any] = function(values.astype(np.float64)).astype(values.dtype)
    return result


def smoothed_target(  # noqa: C901 - a switch for each fault
    case: Case, labels: NDArray[Any], allowed: NDArray[np.bool_], dtype: np.dtype[Any], fault: str | None
) -> NDArray[Any]:
    """Return the smoothed target [N, K] of labels [N] or [N, K], wrong in the way that `fault` names."""
    smoothing = np.broadcast_to(np.asarray(case.smoothing), case.batch_shape).reshape(-1, 1).astype(np.float64)
    spread_over = int(allowed.sum())
    soft = case.labels.dtype.kind == "f"
    probabilities = labels if soft else (np.arange(case.num_classes) == labels[:, None]).astype(np.float64)
    convention = case.options.get("convention", "uniform")
    if fault == "local_classes":
        spread_over = -(-spread_over // 2)
    if fault == "other_off":
        convention = "non_target" if convention == "uniform" else "uniform"
    if fault in {"label_without_share", "label_kept_whole"} and spread_over > 1:
        kept = 1 if fault == "label_kept_whole" else 1 - smoothing
        target = kept * probabilities + smoothing * (1 - probabilities) / spread_over
    elif fault == "pad_class_left_out" and spread_over > 2:
        rest = (1 - probabilities) * (np.arange(case.num_classes) != 0)
        target = (1 - smoothing) * probabilities + smoothing * rest / (spread_over - 2)
    elif fault == "local_mean" and spread_over > 1:
        half = -(-case.num_classes // 2)
        target = (1 - smoothing) * probabilities + smoothing * (np.arange(case.num_classes) < half) / half
    elif case.prior is not None and fault not in {"prior_ignored", "other_off"}:
        target = (1 - smoothing) * probabilities + smoothing * case.prior
    elif spread_over == 1:
        target = probabilities
    elif convention == "uniform":
        target = (1 - smoothing) * probabilities + smoothing / spread_over
    elif convention == "max_sup":
        target = probabilities + smoothing / spread_over
    elif convention == "non_target":
        target = (1 - smoothing) * probabilities + smoothing * (1 - probabilities) / (spread_over - 1)
    else:
        target = np.minimum(np.maximum(probabilities, smoothing / (spread_over - 1)), 1 - smoothing)
    masked: NDArray[Any] = np.where(allowed, target, 0).astype(dtype)
    return masked


def _log_sum(
    exponential: NDArray[Any],
    gap: NDArray[Any],
    logits: NDArray[Any],
    allowed: NDArray[np.bool_],
    fault: str | None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return log sum exp(z - m), and the sum."""
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
    rest = others.sum(-1)
    if fault == "bfloat16_sum":
        rest = round_to(rest, "bfloat16").astype(rest.dtype)
    if fault == "maximum_kept":
        direct = np.where(allowed, np.exp(logits), 0).sum(-1)
        peak = np.max(np.where(allowed, logits, -np.inf), axis=-1)
        return np.log(direct) - peak, (1 + rest) * (direct / direct)
    return _apply(np.log if fault == "log_for_log1p" else np.log1p, rest + (fault == "log_for_log1p")), 1 + rest


def _reduce(
    case: Case,
    losses: NDArray[Any],
    labels: NDArray[Any],
    weight: NDArray[Any],
    upstream: FloatArray,
    fault: str | None,
) -> tuple[NDArray[Any], FloatArray]:
    """Return the reduced loss, and what each row's gradient is multiplied with."""
    reduction, counted = case.options.get("reduction", "none"), case.rows().counted
    if reduction == "none":
        return losses, upstream
    if reduction == "sum" or fault == "sum_for_mean":
        return losses.sum(), upstream
    denominator = case.options.get("denominator")
    if denominator is None:
        counts = np.ones_like(counted) if fault == "all_rows_counted" else counted
        weighted = case.class_weight is not None and labels.ndim == 1 and fault != "weight_not_in_denominator"
        denominator = float((weight[labels] * counts).sum() if weighted else counts.sum())
    if denominator == 0:
        return np.zeros((), losses.dtype), np.zeros_like(upstream)
    return losses.sum() / losses.dtype.type(denominator), upstream / denominator
