"""The chunked loss as operators, which torch.compile puts into its graph without looking into them.

An operator takes and returns tensors and plain values only. So the named tuples are flat here, operands that may be
numbers are tensors, and an empty tensor stands for a missing result.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lsce_torch import fused, saved
from lsce_torch.inputs import compute_dtype, tensor_of
from lsce_torch.layer import Layer, Settings, layer_gradients, losses_and_gradients
from lsce_torch.sums import TARGETS, Operands, Upstreams, num_sums, target_gradients, target_slopes, unstacked

_ARGUMENTS = (Layer, Operands, Settings)
_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? counted, Tensor? bad, Tensor? class_mask, "
    "Tensor? factor, Tensor on, Tensor off, Tensor other_mass, Tensor? at_max, float z_loss, float? softcap, "
    "bool with_stats, bool differentiable, bool kernels, int chunk_size, bool total, float gradient_filter, "
    "bool[] needs"
)


def chunked_losses(layer: Layer, operands: Operands, settings: Settings) -> tuple[Any, ...]:
    """Return the losses or their sum, the `Sums`, the first largest logits' indices, and nll, lse and entropy.

    The indices are None without statistics, and the last three are empty unless gradients flow through them.
    """
    dtype, device = compute_dtype(layer.hidden), layer.hidden.device

    targets = {name: getattr(operands, name) for name in TARGETS}
    tensors: dict[str, Any] = {
        name: None if value is None else tensor_of(value, dtype, device) for name, value in targets.items()
    }
    results = torch.ops.lsce.chunked_losses(*layer, *operands._replace(**tensors), *settings)
    result, stacked, first, *statistics = results[:6]
    return result, stacked, first if operands.with_stats else None, *statistics


def _gradients_or_empty(gradients: dict[str, Tensor], like: Tensor) -> list[Tensor]:
    return [gradients.get(name, like.new_empty(0)) for name in Layer._fields]


@torch.library.custom_op("lsce::chunked_losses", mutates_args=(), schema=f"({_SCHEMA}) -> Tensor[]")
def _losses(*arguments: Any) -> list[Tensor]:
    layer, operands, settings = saved.grouped(arguments, *_ARGUMENTS)
    result, stacked, first, gradients = losses_and_gradients(layer, operands, settings)
    first = result.new_empty(0, dtype=torch.int64) if first is None else first
    found = fused.statistics_or_none(operands, stacked)
    statistics = [result.new_empty(0) if of_rows is None else of_rows for of_rows in found]
    return [result, stacked, first, *statistics, *_gradients_or_empty(gradients, result)]


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
    stacked = result.new_empty(num_sums(operands), num_rows)
    statistics = [result.new_empty(num_rows if operands.differentiable else 0) for _ in range(3)]
    return [result, stacked, first, *statistics, *_gradients_or_empty(gradients, result)]


@torch.library.custom_op(
    "lsce::chunked_gradients",
    mutates_args=(),
    schema=f"({_SCHEMA}, Tensor stacked, Tensor? upstream, Tensor? of_nll, Tensor? of_lse, Tensor? of_entropy) "
    "-> Tensor[]",
)
def _gradients(*arguments: Any) -> list[Tensor]:
    layer, operands, settings, (stacked, *upstreams) = _with_upstreams(arguments)
    return _gradients_or_empty(layer_gradients(layer, operands, settings, stacked, Upstreams(*upstreams)), stacked)


def _with_upstreams(arguments: Sequence[Any]) -> tuple[Layer, Operands, Settings, Sequence[Any]]:
    """Return the arguments by kind, and the sums and upstream gradients behind them."""
    number = 1 + len(Upstreams._fields)
    layer, operands, settings = saved.grouped(arguments[:-number], *_ARGUMENTS)
    return layer, operands, settings, arguments[-number:]


@_gradients.register_fake
def _(*arguments: Any) -> list[Tensor]:
    layer, _, settings, (stacked, *_) = _with_upstreams(arguments)
    parts = zip(Layer._fields, layer, settings.needs, strict=True)
    gradients = {name: torch.empty_like(tensor) for name, tensor, needed in parts if tensor is not None and needed}
    return _gradients_or_empty(gradients, stacked)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    saved.save(ctx, (output[1], *output[6:]), inputs, forward_mode=False)


def _backward(ctx: Any, upstreams: list[Tensor | None]) -> tuple[Any, ...]:
    upstream, _, _, *others = upstreams[:6]
    (stacked, *with_loss), layer, operands, settings = saved.saved(ctx, *_ARGUMENTS)
    gradients: dict[str, Tensor | None] = {}
    others = others if operands.differentiable else [None] * 3
    if all(of_rows is None for of_rows in (upstream, *others)):
        return saved.in_order(gradients, *_ARGUMENTS)
    needed = saved.needed_by(ctx, *_ARGUMENTS)
    if settings.total:
        of_layer = {name: of * upstream for name, of in zip(Layer._fields, with_loss, strict=True) if name in needed}
        gradients |= {name: of.to(getattr(layer, name).dtype) for name, of in of_layer.items()}
    else:
        settings = settings._replace(needs=[name in needed for name in Layer._fields])
        computed = torch.ops.lsce.chunked_gradients(*layer, *operands, *settings, stacked, upstream, *others)
        gradients |= {name: of for name, of in zip(Layer._fields, computed, strict=True) if name in needed}
    if upstream is None:
        return saved.in_order(gradients, *_ARGUMENTS)
    rows = upstream.expand(layer.hidden.shape[0])
    gradients |= target_gradients(operands, target_slopes(operands, unstacked(stacked), needed), rows)
    return saved.in_order(gradients, *_ARGUMENTS)


_losses.register_autograd(_backward, setup_context=_keep)
