"""Losses to be ported: a smoothed one in the manner of fairseq, and a focal one. See docs/parity.md."""

import torch
from torch import Tensor


def label_smoothed_nll(logits: Tensor, labels: Tensor, smoothing: float = 0.1) -> Tensor:
    """Return the mean over the batch; logits [N, K], labels [N]. The smoothing goes to the K - 1 other classes."""
    log_probabilities = torch.log_softmax(logits, dim=-1)
    at_label = log_probabilities.gather(1, labels[:, None])[:, 0]
    elsewhere = log_probabilities.sum(-1) - at_label
    share = smoothing / (logits.shape[-1] - 1)
    return -((1 - smoothing) * at_label + share * elsewhere).mean()


def focal(logits: Tensor, labels: Tensor, gamma: float = 2.0) -> Tensor:
    """Return the focal loss of each row (Lin et al. 2017); logits [N, K], labels [N]."""
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return (1 - torch.exp(-nll)) ** gamma * nll
