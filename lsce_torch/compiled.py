"""The chunked loss as operators, which torch.compile puts into its graph without looking into them.

An operator takes and returns tensors and plain values only. So the named tuples are flat here, operands that may be
numbers are tensors, and an empty tensor stands for a missing result.
"""

from typing import Any

import torch
from torch import Tensor

from lsce_torch import saved
from lsce_torch.inputs import compute_dtype, tensor_of
from lsce_torch.layer import Layer, Settings, layer_gradients, losses_and_gradients
from lsce_torch.sums import TARGETS, Operands, num_sums, target_gradients, target_slopes, unstacked

_ARGUMENTS = (Layer, Operands, Settings)
_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? counted, Tensor? bad, Tensor? class_mask, "
    "Tensor? factor, Tensor on, Tensor off, Tensor other_mass, Tensor? at_max, float z_loss, float? softcap, "
    "bool with_stats, bool kernels, int chunk_size, bool total, float gradient_filter, bool[] needs"
)


def chunked_losses(layer: Layer, operands: Operands, settings: Settings) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the losses or their sum, the `Sums`, and the first largest logits' indices."""
    dtype, device = compute_dtype(layer.hidden), layer.hidden.device

    targets = {name: getattr(operands, name) for name in TARGETS}
    tensors: dict[str, Any] = {
        name: None if value is None else tensor_of(value, dtype, device) for name, value in targets.items()
    }
    results = torch.ops.lsce.chunked_losses(*layer, *operands._replace(**tensors), *settings)
    return results[0], results[1], results[2] if operands.with_stats else None


def _gradients_or_empty(gradients: dict[str, Tensor], like: Tensor) -> list[Tensor]:
    return [gradients.get(name, like.new_empty(0)) for name in Layer._fields]


@torch.library.custom_op("lsce::chunked_losses", mutates_args=(), schema=f"({_SCHEMA}) -> Tensor[]")
def _losses(*arguments: Any) -> list[Tensor]:
    result, stacked, first, gradients = losses_and_gradients(*saved.grouped(arguments, *_ARGUMENTS))
    first = result.new_empty(0, dtype=torch.int64) if first is None else first
    return [result, stacked, first, *_gradients_or_empty(gradients, result)]


@_losses.register_fake
def _(*arguments: Any) -> list[Tensor]:
    layer, operands, settings = saved.grouped(arguments, *_ARGUMENTS)
    num_rows, dtype = layer.hidden.shape[0], compute_dtype(layer.hidden)
    result = layer.hidden.new_empty(() if settings.total else num_rows, dtype=dtype)
    # The gradient of hidden has the dtype of the matrix product.
    narrow = torch.bfloat16 if layer.hidden.dtype == torch.bfloat16 else dtype
    gradients = {
        name: torch.empty_like(tensor, dtype=narrow if name == "hidden" else dtype)
        for name, tensor, needed in zip(Layer._fields, layer, settings.needs, strict=True)
        if tensor is not None and needed
    }
    first = result.new_empty(num_rows if operands.with_stats else 0, dtype=torch.int64)
    return [result, result.new_empty(num_sums(operands), num_rows), first, *_gradients_or_empty(gradients, result)]


@torch.library.custom_op(
    "lsce::chunked_gradients", mutates_args=(), schema=f"({_SCHEMA}, Tensor stacked, Tensor upstream) -> Tensor[]"
)
def _gradients(*arguments: Any) -> list[Tensor]:
    *given, stacked, upstream = arguments
    layer, operands, settings = saved.grouped(given, *_ARGUMENTS)
    return _gradients_or_empty(layer_gradients(layer, operands, settings, stacked, upstream), upstream)


@_gradients.register_fake
def _(*arguments: Any) -> list[Tensor]:
    *given, _, upstream = arguments
    layer, _, settings = saved.grouped(given, *_ARGUMENTS)
    parts = zip(Layer._fields, layer, settings.needs, strict=True)
    gradients = {name: torch.empty_like(tensor) for name, tensor, needed in parts if tensor is not None and needed}
    return _gradients_or_empty(gradients, upstream)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, stacked, _, *gradients = output
    saved.save(ctx, (stacked, *gradients), inputs, forward_mode=False)


def _backward(ctx: Any, upstreams: list[Tensor | None]) -> tuple[Any, ...]:
    upstream = upstreams[0]
    (stacked, *with_loss), layer, operands, settings = saved.saved(ctx, *_ARGUMENTS)
    gradients: dict[str, Tensor | None] = {}
    if upstream is None:
        return saved.in_order(gradients, *_ARGUMENTS)
    needed = saved.needed_by(ctx, *_ARGUMENTS)
    if settings.total:
        of_layer = {name: of * upstream for name, of in zip(Layer._fields, with_loss, strict=True) if name in needed}
        gradients |= {name: of.to(getattr(layer, name).dtype) for name, of in of_layer.items()}
    else:
        settings = settings._replace(needs=[name in needed for name in Layer._fields])
        computed = torch.ops.lsce.chunked_gradients(*layer, *operands, *settings, stacked, upstream)
        gradients |= {name: of for name, of in zip(Layer._fields, computed, strict=True) if name in needed}
    rows = upstream.expand(layer.hidden.shape[0])
    gradients |= target_gradients(operands, target_slopes(operands, unstacked(stacked), needed), rows)
    return saved.in_order(gradients, *_ARGUMENTS)


_losses.register_autograd(_backward, setup_context=_keep)
