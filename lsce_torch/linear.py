"""The last linear layer and the loss in one: no tensor holds all logits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from lsce_spec import ChunkOptions, LossOptions, check_flag, check_layer
from lsce_spec.keywords import takes
from lsce_torch import chunked, fused, kernels, reference
from lsce_torch.errors import error
from lsce_torch.inputs import Batch, check_tensor, dtype_name, prepare, warn_of_bad_labels
from lsce_torch.keywords import LinearLossKeywords, LinearStatsKeywords
from lsce_torch.layer import Layer
from lsce_torch.overwrite import is_wrapper
from lsce_torch.reductions import mean_divisor, reduce_losses
from lsce_torch.stats import LossStats

# Other ways to compute the loss, by the name of the class of a tensor of the layer; see `functional`.
LAYER_LOSSES_OF_SUBCLASSES: dict[str, Callable[..., tuple[Tensor, LossStats | None]]] = {}


@takes(LinearLossKeywords)
def linear_label_smoothed_cross_entropy(
    hidden: Float[Tensor, "... D"],
    weight: Float[Tensor, "K D"],
    labels: Int[Tensor, "..."],
    **keywords: Unpack[LinearLossKeywords],
) -> Float[Tensor, "..."]:
    r"""Return `label_smoothed_cross_entropy` of the logits hidden @ weight.T + bias, without ever holding all logits.

    The loss takes some rows at a time. For a sum or mean it computes all gradients with the loss, so that no logits are
    computed twice. With `reduction="none"` the gradients depend on later operations, so `backward` computes the logits
    again.

    Args:
        hidden: [..., D] features. float64, float32, bfloat16 or float16: the dtype of the matrix products, except that
            float16 is multiplied in float32 for a sum or mean, whose gradients are computed before they are scaled.
            A DTensor may be Shard on its dimensions of rows. Without DTensor it is the same on all ranks of the mesh.
        weight: [K, D], that of nn.Linear, of any of these dtypes. It is multiplied in the dtype of hidden. Its gradient
            is added up in float32 or wider and returned in the weight's dtype. A DTensor may be divided in any way, as
            by ColwiseParallel or FSDP2. Along a dimension of the mesh that divides its classes and not the rows each
            rank computes its own classes; along others the weight is gathered, and no logits are.
        labels: [...] class indices, of any integer dtype.
        bias: K numbers, or None.
        class_mask: K booleans, or a mask for each row, which broadcasts to [..., K]; see
            `label_smoothed_cross_entropy`.
        smoothing, convention, prior, where, ignore_index, class_weight, z_loss, softcap, subtract_entropy, bad_labels,
            reduction, denominator: see `label_smoothed_cross_entropy`.
        implementation: "chunked"; "triton", the same with kernels for GPUs; "reference", which computes all logits at
            once. None chooses "triton" for tensors on a CUDA device, otherwise "chunked".
        chunk_size: how many rows' logits to hold in memory at most. None chooses 3/4 D, on TPUs 2 D, but at least
            256 and at most 4096, and more if K is below 4096.
        recompute: whether to compute the logits again for the gradient, and hold no gradient before. None does so for
            reduction="none", which allows nothing else.
        gradient_filter: leave a class out of the two matrix products for the gradient if its part of the gradient of
            the logits, not counting the part from smoothing alone, is at most this in every row of a chunk. The part
            from smoothing is always included. 0 leaves nothing out. On GPUs and TPUs it saves no time. Not with a mask
            for each row.

    Returns:
        Losses, with `reduction="none"` of shape [...], else a scalar. float64 for float64 hidden, otherwise float32.
        A DTensor if hidden is one; gradients are placed as what they belong to.

    Raises:
        TypeError: wrong type or dtype, or labels that are probabilities.
        ValueError: wrong shape, value out of range, or options that exclude each other. Also DTensors that are Partial
            or on different meshes, and ranks that disagree.
        IndexError: a label outside the classes, with `bad_labels="raise"`.

    Example:
        >>> import torch
        >>> hidden, weight = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.eye(3, 2, requires_grad=True)
        >>> loss = linear_label_smoothed_cross_entropy(hidden, weight, torch.tensor([0, 1]))
        >>> loss.backward()
        >>> f"{loss:.4f}", weight.grad.shape
        ('0.3339', torch.Size([3, 2]))

    References:
        Gradient with the loss: Hsu et al., "Liger Kernel", 2024, arXiv:2410.10989. Leaving out what the softmax makes
        negligible: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, arXiv:2411.09009.
    """
    return _evaluate(hidden, weight, labels, keywords, with_stats=False)[0]


@takes(LinearStatsKeywords)
def linear_label_smoothed_cross_entropy_with_stats(
    hidden: Float[Tensor, "... D"],
    weight: Float[Tensor, "K D"],
    labels: Int[Tensor, "..."],
    **keywords: Unpack[LinearStatsKeywords],
) -> tuple[Float[Tensor, "..."], LossStats]:
    """Return the loss of `linear_label_smoothed_cross_entropy` and statistics of each row.

    Args:
        hidden: see `linear_label_smoothed_cross_entropy`.
        weight: see `linear_label_smoothed_cross_entropy`.
        labels: see `linear_label_smoothed_cross_entropy`.
        differentiable: whether gradients flow through nll, lse and entropy as well, to hidden, weight and bias. The
            logits are then computed again for the gradient, a chunk at a time, as with recompute=True.
        keywords: the options of `linear_label_smoothed_cross_entropy`, with the same defaults.

    Returns:
        The loss, reduced as asked, and `LossStats` with one value per row; see
        `label_smoothed_cross_entropy_with_stats`.

    Raises:
        TypeError, ValueError, IndexError: see `linear_label_smoothed_cross_entropy`.

    Example: perplexity of a batch.
        >>> import torch
        >>> hidden, weight = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.eye(3, 2)
        >>> _, stats = linear_label_smoothed_cross_entropy_with_stats(hidden, weight, torch.tensor([0, 1]))
        >>> f"{torch.exp(stats.nll.mean()):.4f}"
        '1.1820'
    """
    differentiable = keywords.pop("differentiable")
    loss, stats = _evaluate(hidden, weight, labels, keywords, with_stats=True, differentiable=differentiable)
    assert stats is not None
    return loss, stats


def _evaluate(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    keywords: LinearLossKeywords,
    *,
    with_stats: bool,
    differentiable: bool = False,
) -> tuple[Float[Tensor, "..."], LossStats | None]:
    """Return the loss, and the statistics if asked for. See `linear_label_smoothed_cross_entropy`."""
    options = LossOptions.of(keywords, kernels.LINEAR_IMPLEMENTATIONS)
    check_flag("differentiable", differentiable)
    chunks = ChunkOptions.of(keywords, options, differentiable=differentiable)
    for tensor in (hidden, weight, labels, keywords["bias"]):
        of_subclass = LAYER_LOSSES_OF_SUBCLASSES.get(type(tensor).__name__)
        if of_subclass is not None:
            return of_subclass(hidden, weight, labels, keywords, with_stats, differentiable)
    layer, num_classes = prepare_layer(hidden, weight, labels, keywords["bias"])
    if labels.is_floating_point():
        raise error("linear_soft_labels", given=dtype_name(labels))
    logits = layer.hidden.new_zeros(1).expand(*layer.hidden.shape[:-1], num_classes)
    batch, divisor = mean_divisor(prepare(logits, labels, options, keywords), options, keywords["denominator"])
    warn_of_bad_labels(labels, batch, options)
    if chunks.gradient_filter and batch.has_row_masks:
        raise error("filter_row_mask")
    reason = _why_reference(batch, layer, options, with_stats)
    kernels.check_choice(options.implementation, batch.logits, reason, "chunked")
    if options.implementation != "reference" and batch.labels.numel() and reason is None:
        losses, stats = chunked.losses(batch, layer, options, chunks, with_stats, differentiable)
    else:
        batch = replace(batch, logits=_all_logits(layer, batch))
        losses, stats = reference.row_losses(batch, options, with_stats, differentiable)
    return reduce_losses(losses, options, divisor), stats


def _why_reference(batch: Batch, layer: Layer, options: LossOptions, with_stats: bool) -> str | None:
    """Return why only the reference can compute this call, or None."""
    if any(map(is_wrapper, layer)):
        return "one of the tensors stands for others"
    if torch.compiler.is_compiling() and _is_transformed():
        return "the operator that torch.compile takes has neither forward mode nor a rule for vmap"
    return fused.why_reference(batch, options, with_stats)


def _is_transformed() -> bool:
    """Whether a transform of torch.func or forward mode is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def prepare_layer(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, hint: str = ""
) -> tuple[Layer, int]:
    """Return the layer as autocast wants it, and the number of classes. See `check_layer_tensors`."""
    layer, num_classes = check_layer_tensors(hidden, weight, labels, bias, hint)
    device = hidden.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        layer = layer._replace(hidden=hidden.to(torch.get_autocast_dtype(device)))
    return layer, num_classes


def check_layer_tensors(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, hint: str = ""
) -> tuple[Layer, int]:
    """Check the tensors of the layer; return it and the number of classes. `hint` is as in `check_layer`."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("labels", labels), ("bias", bias)):
        if tensor is not None:
            check_tensor(name, tensor)
            if tensor.device != hidden.device:
                raise error("layer_device", name=name, given=tensor.device, expected=hidden.device)
    layer = Layer(hidden, weight, bias)
    shapes = ((tuple(tensor.shape), dtype_name(tensor)) for tensor in layer if tensor is not None)
    return layer, check_layer(*shapes, features_axis=1, hint=hint)


def _all_logits(layer: Layer, batch: Batch) -> Float[Tensor, "*batch K"]:
    dtype, hidden = layer.hidden.dtype, layer.hidden
    if batch.counted is not None:
        # Even multiplied by 0, a NaN would reach the weight's gradient.
        hidden = torch.where(batch.counted[..., None], hidden, 0)
    return F.linear(hidden, layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))
