"""Statistics of each row, for metrics and logs."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lsce_spec import LossOptions
from lsce_torch.inputs import Batch


class LossStats(NamedTuple):
    """Statistics of each row. Rows that do not count have 0, False and the prediction -1.

    No gradient flows through them. With `differentiable=True` it flows through nll, lse and entropy; it is 0 for rows
    that do not count.

    Args:
        nll: cross-entropy with the labels as they are, neither smoothed nor weighted; exp(nll) is the perplexity. NaN
            for a bad label.
        smoothed: the training loss without the z-loss.
        z: the z-loss, z_loss * lse^2; with `smoothed` it adds up to the loss.
        lse: log of the sum of the exponentials of the (softcapped) logits.
        confidence: probability of the largest logit, exp(max - lse).
        prediction: index of the first largest logit among the classes of the mask, int64; -1 where lse is NaN.
        entropy: entropy of the softmax of the (softcapped) logits, in nats. Small ones keep their relative accuracy.
        correct: whether the prediction is the label; for soft labels, that of their first largest entry.
        valid: whether the row counts: False if `where`, `ignore_index` or a denominator of 0 leaves it out.
    """

    nll: Float[Tensor, "*batch"]
    smoothed: Float[Tensor, "*batch"]
    z: Float[Tensor, "*batch"]
    lse: Float[Tensor, "*batch"]
    confidence: Float[Tensor, "*batch"]
    prediction: Int[Tensor, "*batch"]
    entropy: Float[Tensor, "*batch"]
    correct: Bool[Tensor, "*batch"]
    valid: Bool[Tensor, "*batch"]


def make_stats(
    batch: Batch,
    options: LossOptions,
    *,
    nll: Float[Tensor, "*batch"],
    smoothed: Float[Tensor, "*batch"],
    lse: Float[Tensor, "*batch"],
    log_sum: Float[Tensor, "*batch"],
    first: Int[Tensor, "*batch"],
    entropy: Float[Tensor, "*batch"],
    differentiable: bool,
) -> LossStats:
    """Return the statistics of rows.

    Args:
        batch: the rows.
        options: the options of the loss.
        nll: as in `LossStats`, of all rows; NaN for bad labels.
        smoothed: as in `LossStats`, of all rows.
        lse: likewise.
        log_sum: lse minus the largest logit. With a large offset that difference would have lost its digits.
        first: index of the first largest logit.
        entropy: as in `LossStats`, of all rows.
        differentiable: whether nll, lse and entropy keep their derivatives.
    """
    smoothed, log_sum = smoothed.detach(), log_sum.detach()
    if not differentiable:
        nll, lse, entropy = nll.detach(), lse.detach(), entropy.detach()
    prediction = torch.where(torch.isnan(lse), -1, first)
    labels = torch.argmax(batch.labels, dim=-1) if batch.soft else batch.labels
    # Neither a bad label nor a row of NaN is correct.
    correct = torch.eq(prediction, labels) & ~torch.isnan(nll)
    z, confidence = options.z_loss * lse.detach() ** 2, torch.exp(-log_sum)
    if batch.counted is None:
        valid = torch.ones_like(correct)
    else:
        valid = batch.counted
        correct, prediction = correct & valid, torch.where(valid, prediction, -1)
        nll, smoothed, z, lse, confidence, entropy = (
            torch.where(valid, value, 0) for value in (nll, smoothed, z, lse, confidence, entropy)
        )
    return LossStats(nll, smoothed, z, lse, confidence, prediction, entropy, correct, valid)
