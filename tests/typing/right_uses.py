"""Right uses, in which mypy must find nothing. Nothing here is called."""

from typing import Literal

from jax import Array
from torch import Tensor

import lsce_jax
import lsce_torch

LEAKY = lsce_jax.Convention("leaky", on=lambda e, k: 1 - e, off=lambda e, k: e / k)


def with_jax(z: Array, y: Array, w: Array, reduction: Literal["sum", "mean"]) -> Array:
    """Use what a type checker might take for a mistake."""
    lsce_jax.label_smoothed_cross_entropy(z, y, implementation="pallas", convention=LEAKY, bad_labels="raise")
    lsce_jax.label_smoothed_cross_entropy(logits=z, labels=y, implementation=None, reduction=reduction)
    lsce_jax.label_smoothed_cross_entropy(z, y, convention="max_sup" if reduction == "sum" else "clamp")
    loss, stats = lsce_jax.label_smoothed_cross_entropy_with_stats(z, y, reduction="mean")
    lsce_jax.linear_label_smoothed_cross_entropy(z, w, y, implementation="chunked", chunk_size=256)
    lsce_jax.LabelSmoothedCrossEntropyLoss(0.1, reduction="sum", implementation="reference")(z, y, where=y > 0)
    lsce_jax.CELossWithLabelSmoothing(0.1, 10, convention="uniform")
    on, off = lsce_jax.smoothing_weights("uniform", lsce_jax.convert_smoothing("clamp", LEAKY, 0.1, 10), 10)
    print(lsce_jax.__version__, on, off)
    return loss + stats.nll.mean()


def with_torch(z: Tensor, y: Tensor, w: Tensor, reduction: Literal["sum", "mean"]) -> Tensor:
    """Use the same, and torch's own names."""
    lsce_torch.label_smoothed_cross_entropy(z, y, implementation="triton", convention=LEAKY, bad_labels="raise")
    lsce_torch.label_smoothed_cross_entropy(logits=z, labels=y, implementation=None, reduction=reduction)
    loss, stats = lsce_torch.label_smoothed_cross_entropy_with_stats(z, y, reduction="mean")
    lsce_torch.linear_label_smoothed_cross_entropy(z, w, y, implementation="triton", chunk_size=256)
    lsce_torch.cross_entropy(z, y, w, None, -100, None, "sum", 0.1, convention="non_target", where=y > 0)
    lsce_torch.LabelSmoothedCrossEntropyLoss(w, reduction="sum", z_loss=1e-4)(z, y, where=y > 0)
    lsce_torch.LinearLabelSmoothedCrossEntropyLoss(0.1, implementation="chunked")(z, w, y, denominator=3.0)
    lsce_torch.CELossWithLabelSmoothing(0.1, 10, convention="uniform")
    print(lsce_torch.__version__)
    return loss + stats.nll.mean()
