"""The last linear layer and the loss in one: no array holds all logits."""

from dataclasses import replace
from typing import Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from lsce_jax import chunked, reference
from lsce_jax.errors import error
from lsce_jax.inputs import Batch, as_array, compute_dtype, on_automatic_axes, prepare, warn_of_bad_labels, within_int32
from lsce_jax.keywords import LinearLossKeywords, LinearStatsKeywords
from lsce_jax.layer import Layer
from lsce_jax.reductions import mean_divisor, reduce_losses
from lsce_jax.stats import LossStats
from lsce_spec import LINEAR_IMPLEMENTATIONS, ChunkOptions, LossOptions, check_flag, check_layer, is_floating
from lsce_spec.keywords import takes


@takes(LinearLossKeywords)
def linear_label_smoothed_cross_entropy(
    hidden: Float[ArrayLike, "... D"],
    weight: Float[ArrayLike, "D K"],
    labels: Int[ArrayLike, "..."],
    **keywords: Unpack[LinearLossKeywords],
) -> Float[Array, "..."]:
    r"""Return `label_smoothed_cross_entropy` of the logits hidden @ weight + bias, without ever holding all logits.

    The loss takes some rows at a time. For a sum or mean it computes all gradients with the loss, so that no logits are
    computed twice. With `reduction="none"` the gradients depend on later operations, so differentiation computes the
    logits again.

    Args:
        hidden: [..., D] features. float64, float32, bfloat16 or float16: the dtype of the matrix products, except that
            float16 is multiplied in float32 for a sum or mean, whose gradients are computed before they are scaled.
        weight: [D, K], the kernel of a Flax layer, of any of these dtypes. It is multiplied in the dtype of hidden. Its
            gradient is added up in float32 or wider and returned in the weight's dtype.
        labels: [...] class indices, of any integer dtype.
        bias: K numbers, or None.
        smoothing, convention, prior, where, ignore_index, class_weight, class_mask, z_loss, softcap, subtract_entropy,
            bad_labels, reduction, denominator: see `label_smoothed_cross_entropy`.
        implementation: "chunked"; "reference", which computes all logits at once; None chooses "chunked".
        chunk_size: how many rows' logits to hold in memory at most. None chooses D, but at least 256 and at most 1024,
            and more if K is below 4096.
        recompute: whether to compute the logits again for the gradient, and hold no gradient before. None does so for
            reduction="none", which allows nothing else, and on a TPU where it takes less time.
        gradient_filter: leave a class out of the two matrix products for the gradient if its part of the gradient of
            the logits, not counting the part from smoothing alone, is at most this in every row of a chunk. The part
            from smoothing is always included. 0 leaves nothing out.

    Returns:
        Losses, with `reduction="none"` of shape [...], else a scalar. float64 for float64 hidden, otherwise float32.

    Raises:
        TypeError: wrong type or dtype, or labels that are probabilities.
        ValueError: wrong shape, value out of range, or options that exclude each other.
        IndexError: a label outside the classes, with `bad_labels="raise"`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> hidden, weight = jnp.array([[2.0, 0.0], [0.0, 3.0]]), jnp.eye(2, 3)
        >>> labels = jnp.array([0, 1])
        >>> step = jax.value_and_grad(linear_label_smoothed_cross_entropy, argnums=(0, 1))
        >>> loss, (of_hidden, of_weight) = step(hidden, weight, labels, reduction="mean")
        >>> f"{loss:.4f}", of_hidden.shape, of_weight.shape
        ('0.3339', (2, 2), (2, 3))

    References:
        Gradient with the loss: Hsu et al., "Liger Kernel", 2024, arXiv:2410.10989. Leaving out what the softmax makes
        negligible: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, arXiv:2411.09009.
    """
    return _evaluate(hidden, weight, labels, keywords, with_stats=False)[0]


@takes(LinearStatsKeywords)
def linear_label_smoothed_cross_entropy_with_stats(
    hidden: Float[ArrayLike, "... D"],
    weight: Float[ArrayLike, "D K"],
    labels: Int[ArrayLike, "..."],
    **keywords: Unpack[LinearStatsKeywords],
) -> tuple[Float[Array, "..."], LossStats]:
    """Return the loss of `linear_label_smoothed_cross_entropy` and statistics of each row.

    Args:
        hidden: see `linear_label_smoothed_cross_entropy`.
        weight: see `linear_label_smoothed_cross_entropy`.
        labels: see `linear_label_smoothed_cross_entropy`.
        differentiable: whether gradients flow through nll, lse and entropy. The logits are then computed again for the
            gradient, as with `recompute=True`.
        keywords: the options of `linear_label_smoothed_cross_entropy`, with the same defaults.

    Returns:
        The loss, reduced as asked, and `LossStats` with one value per row; see
        `label_smoothed_cross_entropy_with_stats`.

    Raises:
        TypeError, ValueError, IndexError: see `linear_label_smoothed_cross_entropy`.

    Example: perplexity of a batch.
        >>> import jax.numpy as jnp
        >>> hidden, weight = jnp.array([[2.0, 0.0], [0.0, 3.0]]), jnp.eye(2, 3)
        >>> _, stats = linear_label_smoothed_cross_entropy_with_stats(hidden, weight, jnp.array([0, 1]))
        >>> f"{jnp.exp(stats.nll.mean()):.4f}"
        '1.1820'
    """
    differentiable = keywords.pop("differentiable")
    loss, stats = _evaluate(hidden, weight, labels, keywords, with_stats=True, differentiable=differentiable)
    assert stats is not None
    return loss, stats


@on_automatic_axes
def _evaluate(
    hidden: ArrayLike,
    weight: ArrayLike,
    labels: ArrayLike,
    keywords: LinearLossKeywords,
    *,
    with_stats: bool,
    differentiable: bool = False,
) -> tuple[Float[Array, "..."], LossStats | None]:
    """Return the loss, and the statistics if asked for. See `linear_label_smoothed_cross_entropy`."""
    options = LossOptions.of(keywords, LINEAR_IMPLEMENTATIONS)
    check_flag("differentiable", differentiable)
    chunks = ChunkOptions.of(keywords, options, differentiable=differentiable)
    layer, num_classes = prepare_layer(hidden, weight, keywords["bias"])
    labels = as_array("labels", within_int32(labels))
    if is_floating(labels.dtype.name):
        raise error("linear_soft_labels", given=labels.dtype.name)
    shape = (*layer.hidden.shape[:-1], num_classes)
    logits = jax.ShapeDtypeStruct(shape, layer.hidden.dtype)  # type: ignore[no-untyped-call]
    batch, divisor = mean_divisor(prepare(logits, labels, options, keywords), options, keywords["denominator"])
    warn_of_bad_labels(labels, batch, options)
    if chunks.gradient_filter and batch.has_row_masks:
        raise error("filter_row_mask")
    if options.implementation != "reference" and 0 not in batch.batch_shape:
        if keywords["recompute"] is None and chunked.saves_time(batch, layer, chunks):
            chunks = replace(chunks, recompute=True)
        losses, stats = chunked.losses(batch, layer, options, chunks, with_stats)
    else:
        losses, stats = reference.row_losses(replace(batch, logits=_all_logits(layer, batch)), options, with_stats)
    return reduce_losses(losses, options, divisor), stats if differentiable else jax.lax.stop_gradient(stats)


def prepare_layer(hidden: ArrayLike, weight: ArrayLike, bias: ArrayLike | None, hint: str = "") -> tuple[Layer, int]:
    """Check the arrays of the layer; return the layer and the number of classes.

    The message about the bias ends with `hint`.
    """
    layer = Layer(
        as_array("hidden", hidden),
        as_array("weight", weight),
        None if bias is None else as_array("bias", bias),
    )
    of_hidden, of_weight, *of_bias = ((array.shape, array.dtype.name) for array in layer if array is not None)
    return layer, check_layer(of_hidden, of_weight, *of_bias, features_axis=0, hint=hint)


def _all_logits(layer: Layer, batch: Batch) -> Float[Array, "*batch K"]:
    dtype, hidden = compute_dtype(layer.hidden), layer.hidden
    if batch.counted is not None:
        # Even multiplied by 0, a NaN would reach the weight's gradient.
        hidden = jnp.where(batch.counted[..., None], hidden, 0)
    logits = jnp.matmul(hidden, layer.weight.astype(layer.hidden.dtype), preferred_element_type=dtype)
    return logits if layer.bias is None else logits + layer.bias.astype(dtype).reshape((1,) * (logits.ndim - 1) + (-1,))
