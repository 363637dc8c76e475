"""Losses as users bring them, in torch. `losses_brought_to_jax` has the same ones, written in another way."""

import torch
import torch.nn.functional as F
from torch import Tensor


def smoothed(logits: Tensor, labels: Tensor, e: float = 0.1) -> Tensor:
    """Cross-entropy with uniform smoothing, its mean."""
    return F.cross_entropy(logits, labels, label_smoothing=e)


def non_target(logits: Tensor, labels: Tensor, e: float = 0.1, z: float = 0.0) -> Tensor:
    """Cross-entropy with the smoothing on the other classes, and a z-loss."""
    log_p = F.log_softmax(logits, -1)
    own = log_p.gather(1, labels[:, None])[:, 0]
    others = (log_p.sum(-1) - own) / (logits.shape[-1] - 1)
    return (-(1 - e) * own - e * others + z * logits.logsumexp(-1) ** 2).mean()


def focal(logits: Tensor, labels: Tensor, gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al. 2017) for each row."""
    nll = F.cross_entropy(logits, labels, reduction="none")
    return (1 - torch.exp(-nll)) ** gamma * nll


def poly(logits: Tensor, labels: Tensor, epsilon: float = 1.0) -> Tensor:
    """Poly-1 loss (Leng et al. 2022), its mean."""
    own = F.softmax(logits, -1).gather(1, labels[:, None])[:, 0]
    return (F.cross_entropy(logits, labels, reduction="none") + epsilon * (1 - own)).mean()


def cosine_margin(cosines: Tensor, labels: Tensor, margin: float = 0.35, scale: float = 30.0) -> Tensor:
    """CosFace (Wang et al. 2018): a margin on the label's cosine, the mean."""
    moved = cosines - margin * F.one_hot(labels, cosines.shape[-1])
    return F.cross_entropy(scale * moved, labels)


def hinge(logits: Tensor, labels: Tensor, margin: float = 1.0) -> Tensor:
    """Multi-class hinge loss, its mean."""
    return F.multi_margin_loss(logits, labels, margin=margin)


def multi_label(logits: Tensor, labels: Tensor, e: float = 0.1) -> Tensor:
    """Binary cross-entropy of each class with smoothed labels, an element for each logit."""
    return F.binary_cross_entropy_with_logits(logits, labels * (1 - e) + e / 2, reduction="none")


def asymmetric(logits: Tensor, labels: Tensor, gamma: float = 4.0, clip: float = 0.05) -> Tensor:
    """Asymmetric loss (Ridnik et al. 2021) of several labels, its sum."""
    positive = torch.sigmoid(logits)
    negative = (1 - positive + clip).clamp(max=1)
    losses = labels * positive.clamp(min=1e-8).log() * (1 - positive)
    losses = losses + (1 - labels) * negative.clamp(min=1e-8).log() * (1 - negative) ** gamma
    return -losses.sum()


def distillation(logits: Tensor, labels: Tensor, temperature: float = 4.0) -> Tensor:
    """Divergence of the student's distribution from the teacher's (Hinton et al. 2015), its mean over the rows."""
    teacher = F.softmax(labels / temperature, -1)
    student = F.log_softmax(logits / temperature, -1)
    return F.kl_div(student, teacher, reduction="batchmean") * temperature**2
