"""The reduction of the losses, and the number that a mean divides by."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lsce_spec import LossOptions, check_denominator_array, check_denominator_values
from lsce_torch.accurate import divide
from lsce_torch.inputs import Batch, at_labels, dtype_name, extremes


def mean_divisor(
    batch: Batch,
    options: LossOptions,
    denominator: float | Float[Tensor, ""] | None,
    label_weights: Float[Tensor, "*batch"] | None = None,
) -> tuple[Batch, float | Float[Tensor, ""]]:
    """Return the batch and the number that the mean divides by, 1 for other reductions.

    If the number is 0, no row of the returned batch counts, so that neither a NaN nor its derivative gets through.

    Args:
        batch: of the call.
        options: of the call.
        denominator: of the call.
        label_weights: the class weights of the labels, if the logits are a shard of the classes.
    """
    if options.reduction != "mean":
        return batch, 1
    divisor = denominator_of(batch, label_weights) if denominator is None else denominator
    if not isinstance(divisor, Tensor):
        if divisor:
            return batch, divisor
        return batch.counting_only(torch.zeros((), dtype=torch.bool, device=batch.labels.device)), 1
    check_denominator_array(tuple(divisor.shape), dtype_name(divisor))
    if denominator is not None:
        check_denominator_values(extremes(divisor))
    divisor = divisor.to(batch.dtype)
    if batch.class_weight is not None or denominator is not None:
        batch = batch.counting_only(divisor != 0)
    return batch, divisor


def reduce_losses(
    losses: Float[Tensor, "..."], options: LossOptions, divisor: float | Float[Tensor, ""]
) -> Float[Tensor, "..."]:
    """Return the losses of single rows, their sum, or their mean; `losses` may hold their sum already."""
    if options.reduction == "none":
        return losses
    total = losses.sum()
    if options.reduction == "sum":
        return total
    if not isinstance(divisor, Tensor):
        return total / divisor
    return torch.where(divisor != 0, divide(total, torch.where(divisor != 0, divisor, 1)), 0)


def denominator_of(batch: Batch, label_weights: Float[Tensor, "*batch"] | None) -> int | Float[Tensor, ""]:
    """Return the sum of the labels' class weights over the rows that count; without weights, the number of rows."""
    if batch.class_weight is not None and not batch.soft:
        weights = at_labels(batch.class_weight, batch.labels) if label_weights is None else label_weights
        if batch.bad is not None:
            # A bad label weighs 1: if all other weights are 0, the mean is NaN and not 0.
            weights = torch.where(batch.bad, 1, weights)
        return (weights if batch.counted is None else torch.where(batch.counted, weights, 0)).sum()
    return math.prod(batch.batch_shape) if batch.counted is None else batch.counted.sum()
