"""Wrong uses, each with the code of mypy's error and what its text must name. Nothing here is called."""

from jax import Array
from torch import Tensor

import lsce_jax
import lsce_torch


def with_jax(z: Array, y: Array, w: Array) -> None:
    """Make mistakes with JAX."""
    lsce_jax.label_smoothed_cross_entropy(z, y, reduction="avg")  # error: arg-type reduction
    lsce_jax.label_smoothed_cross_entropy(z, y, reduction=None)  # error: arg-type reduction
    lsce_jax.label_smoothed_cross_entropy(z, y, bad_labels="ignore")  # error: arg-type bad_labels
    lsce_jax.label_smoothed_cross_entropy(z, y, implementation="triton")  # error: arg-type implementation
    lsce_jax.label_smoothed_cross_entropy(z, y, implementation="chunked")  # error: arg-type implementation
    lsce_jax.label_smoothed_cross_entropy(z, y, convention="fairseq")  # error: arg-type convention
    lsce_jax.label_smoothed_cross_entropy(z, y, label_smoothing=0.1)  # error: call-arg label_smoothing
    lsce_jax.label_smoothed_cross_entropy(z, y, z_loss="1e-4")  # error: arg-type z_loss
    lsce_jax.label_smoothed_cross_entropy(z, y, 0.1)  # error: call-arg Too many positional arguments
    lsce_jax.label_smoothed_cross_entropy_with_stats(z, y, reduction="avg")  # error: arg-type reduction
    lsce_jax.linear_label_smoothed_cross_entropy(z, w, y, reduction="avg")  # error: arg-type reduction
    lsce_jax.linear_label_smoothed_cross_entropy(z, w, y, implementation="fused")  # error: arg-type implementation
    lsce_jax.linear_label_smoothed_cross_entropy(z, w, y, axis=1)  # error: call-arg axis
    lsce_jax.LabelSmoothedCrossEntropyLoss(reduction="avg")  # error: arg-type reduction
    lsce_jax.LabelSmoothedCrossEntropyLoss(label_smoothing=0.1)  # error: call-arg label_smoothing
    lsce_jax.LabelSmoothedCrossEntropyLoss()(z, y, mask=y)  # error: call-arg mask
    lsce_jax.LinearLabelSmoothedCrossEntropyLoss(implementation="fused")  # error: arg-type implementation
    lsce_jax.CELossWithLabelSmoothing(convention="clip")  # error: arg-type convention
    lsce_jax.smoothing_weights("keras", 0.1, 10)  # error: arg-type smoothing_weights
    lsce_jax.convert_smoothing("uniform", "fairseq", 0.1, 10)  # error: arg-type convert_smoothing
    lsce_jax.label_smoothed_crossentropy(z, y)  # error: attr-defined label_smoothed_crossentropy


def with_torch(z: Tensor, y: Tensor, w: Tensor) -> None:
    """Make mistakes with torch."""
    lsce_torch.label_smoothed_cross_entropy(z, y, reduction="avg")  # error: arg-type reduction
    lsce_torch.label_smoothed_cross_entropy(z, y, bad_labels="ignore")  # error: arg-type bad_labels
    lsce_torch.label_smoothed_cross_entropy(z, y, implementation="pallas")  # error: arg-type implementation
    lsce_torch.label_smoothed_cross_entropy(z, y, convention="fairseq")  # error: arg-type convention
    lsce_torch.label_smoothed_cross_entropy(z, y, weight=w)  # error: call-arg weight
    lsce_torch.label_smoothed_cross_entropy_with_stats(z, y, reduction="avg")  # error: arg-type reduction
    lsce_torch.linear_label_smoothed_cross_entropy(z, w, y, reduction="avg")  # error: arg-type reduction
    lsce_torch.linear_label_smoothed_cross_entropy(z, w, y, implementation="fused")  # error: arg-type implementation
    lsce_torch.cross_entropy(z, y, reduction="batchmean")  # error: arg-type reduction
    lsce_torch.cross_entropy(z, y, smoothing=0.1)  # error: call-arg smoothing
    lsce_torch.cross_entropy(z, y, axis=-1)  # error: call-arg axis
    lsce_torch.LabelSmoothedCrossEntropyLoss(reduction="avg")  # error: arg-type reduction
    lsce_torch.LabelSmoothedCrossEntropyLoss(convention="keras")  # error: arg-type convention
    lsce_torch.LabelSmoothedCrossEntropyLoss(smoothing=0.1)  # error: call-arg smoothing
    lsce_torch.LinearLabelSmoothedCrossEntropyLoss(reduction="avg")  # error: arg-type reduction
    lsce_torch.LinearLabelSmoothedCrossEntropyLoss(implementation="fused")  # error: arg-type implementation
    lsce_torch.CELossWithLabelSmoothing(convention="clip")  # error: arg-type convention
    lsce_torch.smoothing_weights("keras", 0.1, 10)  # error: arg-type smoothing_weights
    lsce_torch.label_smoothed_crossentropy(z, y)  # error: attr-defined label_smoothed_crossentropy
