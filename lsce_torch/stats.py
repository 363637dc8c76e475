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


class RowStats(NamedTuple):
    """What an implementation knows of each row, whether it counts or not.

    Args:
        nll: see `LossStats`; NaN for a bad label.
        smoothed: see `LossStats`.
        lse: see `LossStats`.
        log_sum: lse minus the largest logit. With a large offset that difference would have lost its digits.
        entropy: see `LossStats`.
        first: index of the first largest logit.
        labels: class indices; for soft labels those of their first largest entries.
    """

    nll: Float[Tensor, "*batch"]
    smoothed: Float[Tensor, "*batch"]
    lse: Float[Tensor, "*batch"]
    log_sum: Float[Tensor, "*batch"]
    entropy: Float[Tensor, "*batch"]
    first: Int[Tensor, "*batch"]
    labels: Int[Tensor, "*batch"]


def make_stats(batch: Batch, options: LossOptions, rows: RowStats, *, differentiable: bool) -> LossStats:
    """Return the statistics of rows, with derivatives if asked."""
    constant = RowStats(*(value.detach() for value in rows))
    kept = rows if differentiable else constant
    valid = torch.ones_like(constant.first, dtype=torch.bool) if batch.counted is None else batch.counted
    # Neither a bad label nor a row of NaN is correct.
    correct = valid & torch.eq(constant.first, constant.labels) & ~torch.isnan(constant.nll)

    def where_valid(value: Tensor) -> Tensor:
        return value if batch.counted is None else torch.where(valid, value, 0)

    return LossStats(
        nll=where_valid(kept.nll),
        smoothed=where_valid(constant.smoothed),
        z=where_valid(options.z_loss * constant.lse**2),
        lse=where_valid(kept.lse),
        confidence=where_valid(torch.exp(-constant.log_sum)),
        prediction=torch.where(valid & ~torch.isnan(constant.lse), constant.first, -1),
        entropy=where_valid(kept.entropy),
        correct=correct,
        valid=valid,
    )
