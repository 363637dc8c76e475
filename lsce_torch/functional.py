"""The public functions: validate, pick an implementation, reduce.

One entry point for every option, rather than one per option: what is not asked for costs nothing, since options are
plain Python values.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lsce_spec import Convention, LossOptions, check_denominator_array
from lsce_torch import reference
from lsce_torch.inputs import Batch, dtype_name, prepare

_ROW_LOSSES = {"reference": reference.row_losses}


def label_smoothed_cross_entropy(
    logits: Float[Tensor, "..."],
    labels: Int[Tensor, "..."] | Float[Tensor, "..."],
    *,
    smoothing: float | Float[Tensor, "..."] = 0.1,
    convention: str | Convention = "uniform",
    prior: Float[Tensor, " K"] | None = None,
    axis: int = -1,
    where: Bool[Tensor, "..."] | None = None,
    ignore_index: int | None = None,
    class_weight: Float[Tensor, " K"] | None = None,
    class_mask: Bool[Tensor, " K"] | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    subtract_entropy: bool = False,
    bad_labels: str = "nan",
    reduction: str = "mean",
    denominator: float | Float[Tensor, ""] | None = None,
    implementation: str | None = None,
) -> Float[Tensor, "..."]:
    r"""Cross-entropy between smoothed labels and the softmax of logits.

    With the target :math:`q` that holds `on` at the label and `off` elsewhere, and class weights :math:`w`,

    .. math:: -\sum_k w_k q_k \log p_k + \text{z\_loss} \cdot \text{lse}^2, \qquad p = \mathrm{softmax}(z)

    computed in float32 (float64 for float64 logits) from :math:`\max z - z_k`, so that large logits, large offsets
    and small losses keep their accuracy.

    Args:
        logits: unnormalised scores of shape [..., K, ...], the K classes at `axis`. float64, float32, bfloat16 or
            float16.
        labels: class indices, of any integer dtype and the shape of the logits without `axis`; or class
            probabilities, floating point and of the shape of the logits.
        smoothing: the probability e to move away from the label, in [0, 1]: a number, or a tensor that broadcasts
            to the losses. Tensors may be traced, differentiated and different for each row; their values are not
            checked.
        convention: where e goes. "uniform": e/K to each of the K classes (torch, Keras). "non_target": e/(K-1) to
            each other class (fairseq, tensor2tensor). "clamp": the one-hot target clamped to [e/(K-1), 1-e]. Or a
            `Convention`.
        prior: K probabilities that replace the uniform distribution in "uniform". Values are checked on the
            CPU, in eager mode.
        axis: dimension of the classes in logits and soft labels.
        where: booleans that broadcast to the losses; False takes a row out: loss 0, gradient 0, not counted.
        ignore_index: rows with this label are taken out likewise.
        class_weight: K factors w.
        class_mask: K booleans; classes marked False take no part, whatever their logits hold.
        z_loss: factor of the squared log-partition function, which keeps it near 0.
        softcap: c of z <- c tanh(z / c), applied first.
        subtract_entropy: subtract the entropy of the target: Kullback-Leibler divergence, 0 at the optimum.
        bad_labels: what a label outside the classes does. "nan": that row's loss and gradient are NaN. "raise":
            IndexError (waits for the device; not within torch.compile or vmap).
        reduction: "none", "sum", or "mean": the sum over `denominator`.
        denominator: what "mean" divides by, if not the sum of the labels' class weights over the rows that count
            (without class weights, and for soft labels: the number of those rows). With 0 the loss is 0.
        implementation: "reference", or None for the best that there is.

    Returns:
        Losses, with `reduction="none"` of the shape of the logits without `axis`, else a scalar. float64 for
        float64 logits, otherwise float32. The gradient has the dtype of the logits.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, value out of range, or options that exclude each other.
        IndexError: a label outside the classes, with `bad_labels="raise"`.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]], requires_grad=True)
        >>> labels = torch.tensor([0, 2])
        >>> losses = label_smoothed_cross_entropy(logits, labels, smoothing=0.1, reduction="none")
        >>> [f"{loss:.4f}" for loss in losses]
        ['0.3729', '0.2949']
        >>> loss = label_smoothed_cross_entropy(logits, labels, smoothing=0.1)
        >>> loss.backward()
        >>> f"{loss:.4f}", logits.grad.shape
        ('0.3339', torch.Size([2, 3]))

    References:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, section 7 (uniform, and
        the prior, which the paper calls u(k)); Vaswani et al., "Attention Is All You Need", 2017 (non_target).
        z-loss: Chowdhery et al., "PaLM", 2022, section 5. Softcap: Gemma Team, "Gemma 2", 2024, section 2.
    """
    options = LossOptions.checked(
        smoothing=smoothing,
        convention=convention,
        has_prior=prior is not None,
        ignore_index=ignore_index,
        z_loss=z_loss,
        softcap=softcap,
        subtract_entropy=subtract_entropy,
        bad_labels=bad_labels,
        reduction=reduction,
        denominator=denominator,
        implementation=implementation,
    )
    batch = prepare(
        logits,
        labels,
        options,
        axis=axis,
        where=where,
        prior=prior,
        class_weight=class_weight,
        class_mask=class_mask,
    )
    if options.reduction != "mean":
        losses = _ROW_LOSSES[options.implementation](batch, options)
        return losses if options.reduction == "none" else losses.sum()

    divisor = _divisor(denominator, batch)
    # Divided by 0, no row counts: neither a NaN in it nor its derivative gets through.
    counts = divisor != 0
    if batch.class_weight is not None or denominator is not None:
        batch = batch.counting_only(counts)
    total = _ROW_LOSSES[options.implementation](batch, options).sum()
    return torch.where(counts, total / torch.where(counts, divisor, 1), 0)


def _divisor(denominator: float | Float[Tensor, ""] | None, batch: Batch) -> Float[Tensor, ""]:
    """Return what the mean divides by, as an array in the compute dtype."""
    if denominator is None:
        denominator = _mean_denominator(batch)
    if not isinstance(denominator, Tensor):
        # Not as_tensor, which would have torch.compile compile again for each number of rows.
        return torch.full((), denominator, dtype=batch.dtype, device=batch.logits.device)
    check_denominator_array(tuple(denominator.shape), dtype_name(denominator))
    return denominator.to(batch.dtype)


def _mean_denominator(batch: Batch) -> int | Tensor:
    if batch.class_weight is not None and not batch.soft:
        weights = batch.class_weight[batch.labels]
        return (weights if batch.counted is None else torch.where(batch.counted, weights, 0)).sum()
    if batch.counted is None:
        return math.prod(batch.batch_shape)
    return batch.counted.sum()
