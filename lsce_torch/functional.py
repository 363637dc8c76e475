"""The public functions: validate, pick an implementation, reduce.

One entry point for every option, rather than one per option: what is not asked for costs nothing, since options are
plain Python values.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lsce_spec import Convention, LossOptions, check_denominator_array
from lsce_torch import fused, reference
from lsce_torch.inputs import Batch, at_labels, dtype_name, prepare
from lsce_torch.stats import LossStats

_ROW_LOSSES = {"fused": fused.row_losses, "reference": reference.row_losses}


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
    inplace_backward: bool = False,
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
            each other class (fairseq, tensor2tensor). "clamp": the one-hot target clamped to [e/(K-1), 1-e].
            "max_sup" (Max Suppression): lse - z_y + e (max z - mean z), which takes e from the largest logit, not from
            the label's. Or a `Convention`.
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
        implementation: "fused", which never writes the target out; "reference", the readable one; None chooses "fused".
        inplace_backward: whether the gradient may take the logits' memory, so that it needs none of its own. Any use of
            the logits after `backward` raises RuntimeError. Not with implementation="reference", nor within
            torch.compile or where the gradient is differentiated again.

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
        the prior, which the paper calls u(k)); Vaswani et al., "Attention Is All You Need", 2017 (non_target);
        Zhou et al., "MaxSup: Overcoming Representation Collapse in Label Smoothing", 2025, arXiv:2502.15798 (max_sup).
        z-loss: Chowdhery et al., "PaLM", 2022, section 5. Softcap: Gemma Team, "Gemma 2", 2024, section 2.
    """
    loss, _ = _evaluate(
        logits,
        labels,
        with_stats=False,
        smoothing=smoothing,
        convention=convention,
        prior=prior,
        axis=axis,
        where=where,
        ignore_index=ignore_index,
        class_weight=class_weight,
        class_mask=class_mask,
        z_loss=z_loss,
        softcap=softcap,
        subtract_entropy=subtract_entropy,
        bad_labels=bad_labels,
        reduction=reduction,
        denominator=denominator,
        implementation=implementation,
        inplace_backward=inplace_backward,
    )
    return loss


def label_smoothed_cross_entropy_with_stats(
    logits: Float[Tensor, "..."],
    labels: Int[Tensor, "..."] | Float[Tensor, "..."],
    **options: Any,
) -> tuple[Float[Tensor, "..."], LossStats]:
    """Return the loss of `label_smoothed_cross_entropy`, and what the same sweep over the logits knows of each row.

    Args:
        logits: as there.
        labels: as there.
        options: as there, with the same defaults.

    Returns:
        The loss, reduced as asked, and `LossStats` with one value per row: nll (neither smoothed nor weighted),
        smoothed, z, lse, confidence, correct and valid. No gradient flows through them.

    Raises:
        TypeError, ValueError, IndexError: as there.

    Example: loss, perplexity and accuracy of a batch with one row left out.
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0], [1.0, 1.0, 1.0]])
        >>> labels = torch.tensor([0, 1, -100])
        >>> loss, stats = label_smoothed_cross_entropy_with_stats(logits, labels, ignore_index=-100)
        >>> valid = stats.valid.sum()
        >>> f"{loss:.4f} {torch.exp(stats.nll.sum() / valid):.4f} {stats.correct.sum() / valid:.2f}"
        '1.6839 5.2975 0.50'
    """
    loss, stats = _evaluate(logits, labels, with_stats=True, **{**_DEFAULTS, **options})
    assert stats is not None
    return loss, stats


# Written out once, in `label_smoothed_cross_entropy`; help() and editors show them for both.
_DEFAULTS: dict[str, Any] = dict(label_smoothed_cross_entropy.__kwdefaults__ or {})
label_smoothed_cross_entropy_with_stats.__signature__ = inspect.signature(  # type: ignore[attr-defined]
    label_smoothed_cross_entropy
).replace(return_annotation=tuple)


def _evaluate(
    logits: Float[Tensor, "..."],
    labels: Int[Tensor, "..."] | Float[Tensor, "..."],
    *,
    with_stats: bool,
    smoothing: float | Float[Tensor, "..."],
    convention: str | Convention,
    prior: Float[Tensor, " K"] | None,
    axis: int,
    where: Bool[Tensor, "..."] | None,
    ignore_index: int | None,
    class_weight: Float[Tensor, " K"] | None,
    class_mask: Bool[Tensor, " K"] | None,
    z_loss: float,
    softcap: float | None,
    subtract_entropy: bool,
    bad_labels: str,
    reduction: str,
    denominator: float | Float[Tensor, ""] | None,
    implementation: str | None,
    inplace_backward: bool,
) -> tuple[Float[Tensor, "..."], LossStats | None]:
    """Return the loss, and the statistics if asked. For the arguments see `label_smoothed_cross_entropy`."""
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
        inplace_backward=inplace_backward,
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
    row_losses = _ROW_LOSSES[options.implementation]
    return reduce_losses(batch, options, denominator, lambda batch: row_losses(batch, options, with_stats))


def reduce_losses(
    batch: Batch,
    options: LossOptions,
    denominator: float | Float[Tensor, ""] | None,
    row_losses: Callable[[Batch], tuple[Float[Tensor, "..."], LossStats | None]],
) -> tuple[Float[Tensor, "..."], LossStats | None]:
    """Return the losses of a batch, reduced, and the statistics.

    Args:
        batch: what `row_losses` is called with, perhaps with fewer rows that count.
        options: which reduction.
        denominator: see `label_smoothed_cross_entropy`.
        row_losses: returns the losses, 0 for rows that do not count, or their sum, and the statistics.
    """
    if options.reduction != "mean":
        losses, stats = row_losses(batch)
        return (losses if options.reduction == "none" else losses.sum()), stats

    divisor = _divisor(denominator, batch)
    if not isinstance(divisor, Tensor):
        # Divided by 0, no row counts: neither a NaN in it nor its derivative gets through.
        if divisor == 0:
            none = torch.zeros((), dtype=torch.bool, device=batch.labels.device)
            batch, divisor = batch.counting_only(none), 1
        losses, stats = row_losses(batch)
        return losses.sum() / divisor, stats
    counts = divisor != 0
    if batch.class_weight is not None or denominator is not None:
        batch = batch.counting_only(counts)
    losses, stats = row_losses(batch)
    return torch.where(counts, losses.sum() / torch.where(counts, divisor, 1), 0), stats


def _divisor(denominator: float | Float[Tensor, ""] | None, batch: Batch) -> float | Float[Tensor, ""]:
    """Return what the mean divides by: a number, or a tensor in the compute dtype."""
    if denominator is None:
        denominator = _mean_denominator(batch)
    if not isinstance(denominator, Tensor):
        return denominator
    check_denominator_array(tuple(denominator.shape), dtype_name(denominator))
    return denominator.to(batch.dtype)


def _mean_denominator(batch: Batch) -> int | Tensor:
    if batch.class_weight is not None and not batch.soft:
        weights = at_labels(batch.class_weight, batch.labels)
        if batch.bad is not None:
            # As without class weights; so the loss is NaN also where all others are 0.
            weights = torch.where(batch.bad, 1, weights)
        return (weights if batch.counted is None else torch.where(batch.counted, weights, 0)).sum()
    if batch.counted is None:
        return math.prod(batch.batch_shape)
    return batch.counted.sum()
