"""The readable implementation: the formula in plain torch operations, differentiated by autograd.

The target has one entry per class, so the gradient takes a few tensors of the size of the logits. Forward mode, reverse
mode and second derivatives all come from torch. Two steps need their comments: the sum in `_log_sum_exp`, and the gap
that is set to 0.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lsce_spec import LossOptions, smoothing_weights
from lsce_torch.accurate import divide, entr, log1p
from lsce_torch.inputs import Batch, tensor_of
from lsce_torch.stats import LossStats, make_stats


def row_losses(
    batch: Batch, options: LossOptions, with_stats: bool = False, differentiable: bool = False
) -> tuple[Float[Tensor, "*batch"], LossStats | None]:
    """Return the loss of each row, 0 for rows that do not count and NaN for bad labels, and statistics if asked for.

    `differentiable` says whether gradients flow through the statistics.
    """
    target = target_distribution(batch, options)
    uncapped, allowed = _counted_logits(batch)
    logits = uncapped if options.softcap is None else options.softcap * torch.tanh(uncapped / options.softcap)
    peak, gap, rest = _log_sum_exp(logits, allowed)
    log_sum = log1p(rest)
    if options.convention.at_max is not None:
        target = target + at_max(batch, options) * _share_of_largest(uncapped, allowed)
        if batch.bad is not None:
            target = torch.where(batch.bad[..., None], torch.nan, target)
    weighted = target
    if batch.class_weight is not None:
        weighted = target * batch.class_weight
    # Where the target is 0, the logit may be -inf: 0 * inf counts as 0. Finite gaps keep their value, since the gap is
    # the derivative with respect to the target.
    finite_gap = torch.where(is_nothing(weighted) & torch.isinf(gap), 0, gap)
    lse = peak + log_sum
    smoothed = torch.sum(weighted * finite_gap, dim=-1) + torch.sum(weighted, dim=-1) * log_sum
    if options.subtract_entropy:
        smoothed = smoothed - torch.sum(entropy_terms(target, batch), dim=-1)
    # Needed besides the NaN in the target, which a mask without classes removes.
    if batch.bad is not None:
        smoothed = smoothed + torch.where(batch.bad, torch.nan, 0)
    losses = smoothed + options.z_loss * lse**2 if options.z_loss else smoothed
    if batch.counted is not None:
        losses = torch.where(batch.counted, losses, 0)
    if not with_stats:
        return losses, None
    return losses, make_stats(
        batch,
        options,
        nll=_nll(batch, gap, log_sum, allowed),
        smoothed=smoothed,
        lse=lse,
        log_sum=log_sum,
        first=torch.argmax(_constant(uncapped, allowed), dim=-1),
        entropy=log_sum + _mean_gap(gap, rest),
        differentiable=differentiable,
    )


def is_nothing(target: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """Return where a target is 0 or so small that some devices flush it to 0."""
    return torch.abs(target) < torch.finfo(target.dtype).tiny


def _counted_logits(batch: Batch) -> tuple[Float[Tensor, "*batch K"], Bool[Tensor, "*#batch K"] | None]:
    """Return the logits in the compute dtype, 0 where they do not count, and the mask."""
    logits = batch.logits.to(batch.dtype)
    if batch.counted is not None:
        logits = torch.where(batch.counted[..., None], logits, 0)
    if batch.class_mask is not None:
        logits = torch.where(batch.class_mask, logits, 0)
    return logits, batch.class_mask


def target_distribution(batch: Batch, options: LossOptions) -> Float[Tensor, "*batch K"]:
    """Return the smoothed target of each row: 0 outside the class mask, NaN for bad labels."""
    dtype, num_classes = batch.dtype, batch.logits.shape[-1]
    if batch.soft:
        labels = batch.labels.to(dtype)
        if batch.counted is not None:
            labels = torch.where(batch.counted[..., None], labels, 0)
        target = _smoothed(labels, batch, options)
    else:
        classes = torch.arange(num_classes, device=batch.labels.device)
        is_label = classes == batch.labels[..., None]
        if batch.prior is not None:
            target = _smoothed(is_label.to(dtype), batch, options)
        else:
            on, off = on_off(batch, options)
            target = torch.where(is_label, as_tensor(on, batch), as_tensor(off, batch))
    if batch.bad is not None:
        target = torch.where(batch.bad[..., None], torch.nan, target)
    if batch.class_mask is not None:
        target = torch.where(batch.class_mask, target, 0)
    return target


def _share_of_largest(
    logits: Float[Tensor, "*batch K"], allowed: Bool[Tensor, "*#batch K"] | None
) -> Float[Tensor, "*batch K"]:
    """Return 1 at the largest logit and 0 elsewhere; equal shares of 1 if several logits are the largest."""
    constant = _constant(logits, allowed)
    is_largest = (constant == torch.amax(constant, dim=-1, keepdim=True)).to(logits.dtype)
    return is_largest / torch.sum(is_largest, dim=-1, keepdim=True)


def _nll(
    batch: Batch,
    gap: Float[Tensor, "*batch K"],
    log_sum: Float[Tensor, "*batch"],
    allowed: Bool[Tensor, "*#batch K"] | None,
) -> Float[Tensor, "*batch"]:
    """Return the cross-entropy with the labels as they are, NaN for bad labels."""
    if not batch.soft:
        nll = torch.gather(gap, -1, batch.labels[..., None])[..., 0] + log_sum
        # As a factor, so that the gradient of the row becomes NaN as well.
        return nll if batch.bad is None else nll * torch.where(batch.bad, torch.nan, 1)
    labels = batch.labels.to(gap.dtype)
    if allowed is not None:
        labels = torch.where(allowed, labels, 0)
    terms = labels * torch.where((labels == 0) & torch.isinf(gap), 0, gap)
    return torch.sum(terms, dim=-1) + torch.sum(labels, dim=-1) * log_sum


def _mean_gap(gap: Float[Tensor, "*batch K"], rest: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Return the mean of the gaps under the softmax; 0 * inf counts as 0."""
    finite = torch.where(torch.isinf(gap), 0, gap)
    return divide(torch.sum(torch.exp(-gap) * finite, dim=-1), 1 + rest)


def entropy_terms(target: Float[Tensor, "*batch K"], batch: Batch) -> Float[Tensor, "*batch K"]:
    """Return -q log q per class."""
    if batch.prior is not None:
        # Where the prior is 0 the target is 0 for any smoothing. The slope of -q log q is infinite there.
        target = torch.where((target == 0) & (batch.prior == 0), 1, target)
    return entr(target)


def _smoothed(
    probabilities: Float[Tensor, "*batch K"],
    batch: Batch,
    options: LossOptions,
) -> Float[Tensor, "*batch K"]:
    """Return the target for class probabilities."""
    smoothing = batch.smoothing
    if batch.prior is not None:
        return (1 - smoothing) * probabilities + smoothing * batch.prior
    num_allowed = count_allowed(batch)
    if isinstance(num_allowed, int):
        if num_allowed == 1:
            return probabilities
        target: Tensor = options.convention.soft_target(probabilities, smoothing, num_allowed)
        return target
    smoothed = options.convention.soft_target(probabilities, smoothing, _two_or_more(num_allowed))
    return torch.where(num_allowed <= 1, probabilities, smoothed)


def on_off(batch: Batch, options: LossOptions) -> tuple[float | Tensor, float | Tensor]:
    """Return the target at the label and elsewhere."""
    num_allowed = count_allowed(batch)
    if isinstance(num_allowed, int):
        return smoothing_weights(options.convention, batch.smoothing, num_allowed)
    spread_over = _two_or_more(num_allowed)
    # From the number itself, not a tensor: in float32 1 - 0.99999 would be 0.1 % off.
    on = as_tensor(options.convention.on(batch.smoothing, spread_over), batch)
    off = as_tensor(options.convention.off(batch.smoothing, spread_over), batch)
    return torch.where(num_allowed <= 1, 1, on), torch.where(num_allowed <= 1, 0, off)


def at_max(batch: Batch, options: LossOptions) -> float | Tensor:
    """Return the convention's addition to the target at the largest logit."""
    num_allowed = count_allowed(batch)
    added = options.convention.at_max
    if added is None:
        return 0.0
    if isinstance(num_allowed, int):
        return 0.0 if num_allowed == 1 else added(batch.smoothing, num_allowed)
    return torch.where(num_allowed <= 1, 0, as_tensor(added(batch.smoothing, _two_or_more(num_allowed)), batch))


def _two_or_more(num_allowed: Float[Tensor, "*#batch"]) -> Float[Tensor, "*#batch"]:
    """Return the number of classes to spread over, 2 if there are fewer.

    With one class nothing is spread, and without any every label is bad. So the results for 2 are not used, and are
    computed without a division by 0.
    """
    return torch.clamp(num_allowed, min=2)


def count_allowed(batch: Batch) -> int | Float[Tensor, ""] | Float[Tensor, "*batch 1"]:
    """Return the number of classes that take part; a tensor if there is a class mask, whose values are not read."""
    if batch.num_allowed is not None:
        return batch.num_allowed
    if batch.class_mask is None:
        return int(batch.logits.shape[-1])
    return torch.sum(batch.class_mask, dim=-1, keepdim=batch.has_row_masks).to(batch.dtype)


def _log_sum_exp(
    logits: Float[Tensor, "*batch K"], allowed: Bool[Tensor, "*#batch K"] | None
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch K"], Float[Tensor, "*batch"]]:
    """Return the maximum m, the gaps m - z, and the sum of exp(z - m) less 1."""
    constant = _constant(logits, allowed)
    peak = torch.amax(constant, dim=-1, keepdim=True)
    gap = peak - logits
    if allowed is not None:
        gap = torch.where(allowed, gap, 0)

    # log1p of the sum without its largest term keeps small losses accurate. Subtracting 1 from each largest term,
    # exp(0), keeps its derivative; leaving the term out would lose the gradient with respect to the largest logit.
    is_peak = (constant == peak).to(logits.dtype)
    terms = torch.exp(-gap) - is_peak
    if allowed is not None:
        is_peak, terms = torch.where(allowed, is_peak, 0), torch.where(allowed, terms, 0)
    rest = torch.sum(terms, dim=-1) + (torch.sum(is_peak, dim=-1) - 1)
    if allowed is not None:
        # Below 0 without any class.
        rest = torch.where(rest < 0, torch.nan, rest)
    return peak.squeeze(-1), gap, rest


def _constant(
    logits: Float[Tensor, "*batch K"], allowed: Bool[Tensor, "*#batch K"] | None
) -> Float[Tensor, "*batch K"]:
    """Return the logits for comparisons: -inf outside the mask, and without a derivative."""
    constant = logits.detach()
    return constant if allowed is None else torch.where(allowed, constant, -torch.inf)


def as_tensor(value: float | Tensor, batch: Batch) -> Tensor:
    """Return a number as a tensor in the compute dtype."""
    return tensor_of(value, batch.dtype, batch.logits.device)
