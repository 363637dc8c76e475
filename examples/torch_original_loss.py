"""A loss to be ported, in the manner of fairseq: the smoothing goes to the K - 1 other classes. See docs/parity.md."""

import torch
from torch import Tensor


def label_smoothed_nll(logits: Tensor, labels: Tensor, smoothing: float = 0.1) -> Tensor:
    """Return the mean over the batch; logits [N, K], labels [N]."""
    log_probabilities = torch.log_softmax(logits, dim=-1)
    at_label = log_probabilities.gather(1, labels[:, None])[:, 0]
    elsewhere = log_probabilities.sum(-1) - at_label
    share = smoothing / (logits.shape[-1] - 1)
    return -((1 - smoothing) * at_label + share * elsewhere).mean()
