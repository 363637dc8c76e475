"""Statistics of each row, for metrics and logs."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lsce_spec import LossOptions
from lsce_torch.inputs import Batch


class LossStats(NamedTuple):
    """Statistics of each row. No gradient flows through them. 0 and False for rows that do not count.

    Args:
        nll: cross-entropy with the labels as they are, neither smoothed nor weighted; exp(nll) is the perplexity.
        smoothed: the training loss without the z-loss.
        z: the z-loss, z_loss * lse^2; with `smoothed` it adds up to the loss.
        lse: log of the sum of the exponentials of the (softcapped) logits.
        confidence: probability of the largest logit, exp(max - lse).
        correct: whether the first largest logit is the label's; for soft labels, that of their first largest entry.
        valid: whether the row counts: False if `where`, `ignore_index` or a denominator of 0 leaves it out.
    """

    nll: Float[Tensor, "*batch"]
    smoothed: Float[Tensor, "*batch"]
    z: Float[Tensor, "*batch"]
    lse: Float[Tensor, "*batch"]
    confidence: Float[Tensor, "*batch"]
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
    correct: Bool[Tensor, "*batch"],
) -> LossStats:
    """Return the statistics without derivatives, 0 and False for rows that do not count.

    `log_sum` is lse minus the largest logit. With a large offset that difference would have lost its digits.
    """
    # Neither a bad label nor a row of NaN is correct.
    if batch.bad is not None:
        nll = torch.where(batch.bad, torch.nan, nll)
    correct = correct & ~torch.isnan(nll)
    valid = torch.ones_like(correct) if batch.counted is None else batch.counted
    nll, smoothed, z, lse, confidence = (
        torch.where(valid, value.detach(), 0)
        for value in (nll, smoothed, options.z_loss * lse**2, lse, torch.exp(-log_sum))
    )
    return LossStats(nll, smoothed, z, lse, confidence, correct & valid, valid)
