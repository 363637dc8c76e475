"""Losses with a cancellation or a steep function in the middle, in torch, as they are found in published code.

`losses_that_cancel_in_jax` has the same functions, written in another way, whose roundings differ by far more than a
rounding step of the logits explains.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _own(logits: Tensor, labels: Tensor) -> Tensor:
    return F.softmax(logits, -1).gather(1, labels[:, None])[:, 0]


def unlikelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Unlikelihood loss (Welleck et al. 2020): -log(1 - p) of a label to avoid."""
    return -torch.log((1 - _own(logits, labels)).clamp(min=1e-5)).mean()


def hellinger(logits: Tensor, labels: Tensor) -> Tensor:
    """Square root of the probability of the other classes."""
    return torch.sqrt((1 - _own(logits, labels)).clamp(min=1e-12)).mean()


def flat_focal(logits: Tensor, labels: Tensor) -> Tensor:
    """Focal loss with gamma 0.5, whose power is steep where 1 - p is small."""
    nll = F.cross_entropy(logits, labels, reduction="none")
    return ((1 - torch.exp(-nll)).clamp(min=1e-12) ** 0.5 * nll).mean()


def asymmetric(logits: Tensor, labels: Tensor) -> Tensor:
    """Asymmetric loss (Ridnik et al. 2021) without its shift: log(1 - sigmoid) of the classes that are no labels."""
    positive = torch.sigmoid(logits)
    negative = 1 - positive
    losses = labels * torch.log(positive.clamp(min=1e-8)) * (1 - positive)
    losses = losses + (1 - labels) * torch.log(negative.clamp(min=1e-8)) * (1 - negative) ** 4
    return -losses.sum()


def arc_margin(cosines: Tensor, labels: Tensor, margin: float = 0.5, scale: float = 64.0) -> Tensor:
    """ArcFace (Deng et al. 2019), by the addition theorem, with cosines that are kept from 1."""
    cosines = cosines.clamp(-1 + 1e-7, 1 - 1e-7)
    sines = torch.sqrt(1 - cosines**2)
    moved = cosines * math.cos(margin) - sines * math.sin(margin)
    is_label = F.one_hot(labels, cosines.shape[-1]).bool()
    return F.cross_entropy(scale * torch.where(is_label, moved, cosines), labels)


def entropy_bonus(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy less a tenth of the entropy of the softmax, by its probabilities."""
    p = F.softmax(logits, -1)
    return F.cross_entropy(logits, labels) + 0.1 * (p * torch.log(p + 1e-12)).sum(-1).mean()


def poisson(logits: Tensor, labels: Tensor) -> Tensor:
    """Poisson loss of the exponentials of the logits, with the label as the count."""
    own = logits.gather(1, labels[:, None])[:, 0].clamp(max=50.0)
    return (torch.exp(own) - labels * own).mean()


def gap_of_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """The log-sum-exp of all logits less that of those of the other classes."""
    others = logits.masked_fill(F.one_hot(labels, logits.shape[-1]).bool(), -torch.inf)
    return (torch.logsumexp(logits, -1) - torch.logsumexp(others, -1)).mean()
