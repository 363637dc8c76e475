"""The public functions: validate, pick an implementation, reduce.

One entry point for every option, rather than one per option: what is not asked for costs nothing, since options are
fixed when the function is traced.
"""

import inspect
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from lsce_jax import fused, reference
from lsce_jax.inputs import Batch, at_labels, prepare
from lsce_jax.stats import LossStats
from lsce_spec import Convention, LossOptions, check_denominator_array

_ROW_LOSSES = {"fused": fused.row_losses, "reference": reference.row_losses}


def label_smoothed_cross_entropy(
    logits: Float[ArrayLike, "..."],
    labels: Int[ArrayLike, "..."] | Float[ArrayLike, "..."],
    *,
    smoothing: float | Float[ArrayLike, "..."] = 0.1,
    convention: str | Convention = "uniform",
    prior: Float[ArrayLike, " K"] | None = None,
    axis: int = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    ignore_index: int | None = None,
    class_weight: Float[ArrayLike, " K"] | None = None,
    class_mask: Bool[ArrayLike, " K"] | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    subtract_entropy: bool = False,
    bad_labels: str = "nan",
    reduction: str = "none",
    denominator: float | Float[ArrayLike, ""] | None = None,
    implementation: str | None = None,
) -> Float[Array, "..."]:
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
        smoothing: the probability e to move away from the label, in [0, 1]: a number, or an array that broadcasts
            to the losses. Arrays may be traced, differentiated and different for each row; their values are not
            checked.
        convention: where e goes. "uniform": e/K to each of the K classes (torch, Keras). "non_target": e/(K-1) to
            each other class (fairseq, tensor2tensor). "clamp": the one-hot target clamped to [e/(K-1), 1-e].
            "max_sup" (Max Suppression): lse - z_y + e (max z - mean z), which takes e from the largest logit, not from
            the label's. Or a `Convention`.
        prior: K probabilities that replace the uniform distribution in "uniform". Values are checked unless traced.
        axis: dimension of the classes in logits and soft labels.
        where: booleans that broadcast to the losses; False takes a row out: loss 0, gradient 0, not counted.
        ignore_index: rows with this label are taken out likewise.
        class_weight: K factors w.
        class_mask: K booleans; classes marked False take no part, whatever their logits hold.
        z_loss: factor of the squared log-partition function, which keeps it near 0.
        softcap: c of z <- c tanh(z / c), applied first.
        subtract_entropy: subtract the entropy of the target: Kullback-Leibler divergence, 0 at the optimum.
        bad_labels: what a label outside the classes does. "nan": that row's loss and gradient are NaN. "raise":
            IndexError (under `jit`: needs `jax.experimental.checkify`).
        reduction: "none", "sum", or "mean": the sum over `denominator`.
        denominator: what "mean" divides by, if not the sum of the labels' class weights over the rows that count
            (without class weights, and for soft labels: the number of those rows). With 0 the loss is 0.
        implementation: "fused", which never writes the target out; "reference", the readable one; None chooses "fused".

    Returns:
        Losses, with `reduction="none"` of the shape of the logits without `axis`, else a scalar. float64 for
        float64 logits, otherwise float32. The gradient has the dtype of the logits.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, value out of range, or options that exclude each other.
        IndexError: a label outside the classes, with `bad_labels="raise"`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
        >>> labels = jnp.array([0, 2])
        >>> losses = label_smoothed_cross_entropy(logits, labels, smoothing=0.1)
        >>> [f"{loss:.4f}" for loss in losses]
        ['0.3729', '0.2949']
        >>> step = jax.value_and_grad(label_smoothed_cross_entropy)
        >>> loss, gradient = step(logits, labels, smoothing=0.1, reduction="mean")
        >>> f"{loss:.4f}", gradient.shape
        ('0.3339', (2, 3))

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
    )
    return loss


def label_smoothed_cross_entropy_with_stats(
    logits: Float[ArrayLike, "..."],
    labels: Int[ArrayLike, "..."] | Float[ArrayLike, "..."],
    **options: Any,
) -> tuple[Float[Array, "..."], LossStats]:
    """Return the loss of `label_smoothed_cross_entropy`, and what the same sweep over the logits knows of each row.

    Args:
        logits: as there.
        labels: as there.
        options: as there, with the same defaults.

    Returns:
        The loss, reduced as asked, and `LossStats` with one value per row: nll (neither smoothed nor weighted),
        smoothed, z, lse, confidence, correct and valid. No gradient flows through them: `has_aux=True` is all that
        `grad` needs.

    Raises:
        TypeError, ValueError, IndexError: as there.

    Example: loss, perplexity and accuracy of a batch with one row left out.
        >>> import jax, jax.numpy as jnp
        >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0], [1.0, 1.0, 1.0]])
        >>> labels = jnp.array([0, 1, -100])
        >>> step = jax.value_and_grad(label_smoothed_cross_entropy_with_stats, has_aux=True)
        >>> (loss, stats), gradient = step(logits, labels, ignore_index=-100, reduction="mean")
        >>> nll, accuracy = (values.mean(where=stats.valid) for values in (stats.nll, stats.correct))
        >>> f"{loss:.4f} {jnp.exp(nll):.4f} {accuracy:.2f}"
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
    logits: Float[ArrayLike, "..."],
    labels: Int[ArrayLike, "..."] | Float[ArrayLike, "..."],
    *,
    with_stats: bool,
    smoothing: float | Float[ArrayLike, "..."],
    convention: str | Convention,
    prior: Float[ArrayLike, " K"] | None,
    axis: int,
    where: Bool[ArrayLike, "..."] | None,
    ignore_index: int | None,
    class_weight: Float[ArrayLike, " K"] | None,
    class_mask: Bool[ArrayLike, " K"] | None,
    z_loss: float,
    softcap: float | None,
    subtract_entropy: bool,
    bad_labels: str,
    reduction: str,
    denominator: float | Float[ArrayLike, ""] | None,
    implementation: str | None,
) -> tuple[Float[Array, "..."], LossStats | None]:
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
    denominator: float | Float[ArrayLike, ""] | None,
    row_losses: Callable[[Batch], tuple[Float[Array, "..."], LossStats | None]],
) -> tuple[Float[Array, "..."], LossStats | None]:
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
    if isinstance(divisor, float):
        # Divided by 0, no row counts: neither a NaN in it nor its derivative gets through.
        if divisor == 0:
            batch, divisor = batch.counting_only(jnp.array(False)), 1
        losses, stats = row_losses(batch)
        return losses.sum() / divisor, stats
    counts = divisor != 0
    if batch.class_weight is not None or denominator is not None:
        batch = batch.counting_only(counts)
    losses, stats = row_losses(batch)
    return jnp.where(counts, losses.sum() / jnp.where(counts, divisor, 1), 0), stats


def _divisor(denominator: float | Float[ArrayLike, ""] | None, batch: Batch) -> float | Float[Array, ""]:
    """Return what the mean divides by: a number, or an array in the compute dtype."""
    if denominator is None:
        denominator = _mean_denominator(batch)
    if isinstance(denominator, Real):
        return float(denominator)
    denominator = jnp.asarray(denominator)
    check_denominator_array(denominator.shape, denominator.dtype.name)
    return denominator.astype(batch.dtype)


def _mean_denominator(batch: Batch) -> int | Array:
    if batch.class_weight is not None and not batch.soft:
        weights = at_labels(batch.class_weight, batch.labels)
        if batch.bad is not None:
            # As without class weights; so the loss is NaN also where all others are 0.
            weights = jnp.where(batch.bad, 1, weights)
        return jnp.sum(weights if batch.counted is None else jnp.where(batch.counted, weights, 0))
    if batch.counted is None:
        return math.prod(batch.batch_shape)
    return jnp.sum(batch.counted)
