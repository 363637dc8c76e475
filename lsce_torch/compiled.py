"""The chunked loss as operators of torch's, which torch.compile takes into its graph without looking into them.

An operator takes and returns tensors and numbers only: the operands are spelled out, what may be either is a tensor,
and an empty tensor stands for a result that there is none of.
"""

from typing import Any

import torch
from torch import Tensor

from lsce_torch import chunked
from lsce_torch.chunked import Layer, Settings
from lsce_torch.fused import target_gradients
from lsce_torch.inputs import compute_dtype
from lsce_torch.sweeps import Operands, unstacked

_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? counted, Tensor? bad, Tensor? class_mask, "
    "Tensor? factor, Tensor at_label, Tensor off, Tensor other_mass, Tensor? at_max, float z_loss, float? softcap, "
    "bool with_stats, int chunk_size, bool total, float gradient_filter, bool[] needs"
)


def chunked_losses(layer: Layer, operands: Operands, settings: Settings) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what the autograd Function of `chunked.py` does."""
    dtype, device = compute_dtype(layer.hidden), layer.hidden.device

    def as_tensor(value: float | Tensor | None) -> Tensor | None:
        if value is None or isinstance(value, Tensor):
            return value
        return torch.full((), value, dtype=dtype, device=device)

    numbers = {name: as_tensor(getattr(operands, name)) for name in ("at_label", "off", "other_mass", "at_max")}
    with_gradients = settings.total and torch.is_grad_enabled()
    needs = [tensor is not None and tensor.requires_grad and with_gradients for tensor in layer]
    given = operands._asdict() | numbers
    losses, stacked, first, *_ = torch.ops.lsce.chunked_losses(
        *layer,
        *(given[name] for name in Operands._fields if name not in {"logits", "overwritten"}),
        *(settings.chunk_size, settings.total, settings.gradient_filter, needs),
    )
    return losses, stacked, first if operands.with_stats else None


def _unpack(arguments: tuple[Any, ...]) -> tuple[Layer, Operands, Settings, dict[str, bool]]:
    hidden, weight, bias, *of_rows, with_stats, chunk_size, total, gradient_filter, needs = arguments
    # Neither logits nor what is overwritten.
    operands = Operands._make([None, *of_rows, None, with_stats])
    settings = Settings(chunk_size, total, gradient_filter, None)
    return Layer(hidden, weight, bias), operands, settings, dict(zip(Layer._fields, needs, strict=True))


@torch.library.custom_op("lsce::chunked_losses", mutates_args=(), schema=f"({_SCHEMA}) -> Tensor[]")
def _losses(*arguments: Any) -> list[Tensor]:
    layer, operands, settings, needs = _unpack(arguments)
    losses, stacked, first, gradients = chunked.run(layer, operands, settings, needs)
    results = [
        losses.sum() if settings.total else losses,
        stacked,
        losses.new_empty(0, dtype=torch.int64) if first is None else first,
    ]
    return results + [gradients.get(name, losses.new_empty(0)) for name in Layer._fields]


@_losses.register_fake
def _(*arguments: Any) -> list[Tensor]:
    layer, operands, settings, needs = _unpack(arguments)
    num_rows, dtype = layer.hidden.shape[0], compute_dtype(layer.hidden)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return layer.hidden.new_empty(shape, dtype=dtype)

    # That of hidden comes in the dtype that it is multiplied in.
    narrow = torch.bfloat16 if layer.hidden.dtype == torch.bfloat16 else dtype
    gradients = {
        name: torch.empty_like(tensor, dtype=narrow if name == "hidden" else dtype)
        for name, tensor in zip(Layer._fields, layer, strict=True)
        if tensor is not None and needs[name]
    }
    return [
        empty() if settings.total else empty(num_rows),
        empty(5 if operands.at_max is None else 7, num_rows),
        empty(num_rows if operands.with_stats else 0, dtype=torch.int64),
        *(gradients.get(name, empty(0)) for name in Layer._fields),
    ]


@torch.library.custom_op(
    "lsce::chunked_gradients", mutates_args=(), schema=f"({_SCHEMA}, Tensor stacked, Tensor upstream) -> Tensor[]"
)
def _gradients(*arguments: Any) -> list[Tensor]:
    *given, stacked, upstream = arguments
    layer, operands, settings, needs = _unpack(tuple(given))
    gradients = chunked.layer_gradients(layer, operands, settings, stacked, upstream, needs)
    return [gradients.get(name, upstream.new_empty(0)) for name in Layer._fields]


@_gradients.register_fake
def _(*arguments: Any) -> list[Tensor]:
    *given, _, upstream = arguments
    layer, _, _, needs = _unpack(tuple(given))
    return [
        torch.empty_like(tensor) if tensor is not None and needs[name] else upstream.new_empty(0)
        for name, tensor in zip(Layer._fields, layer, strict=True)
    ]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, stacked, _, *gradients = output
    ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.save_for_backward(stacked, *gradients, *(value for value in inputs if isinstance(value, Tensor)))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstreams: list[Tensor | None]) -> tuple[Any, ...]:
    upstream, (stacked, *saved) = upstreams[0], ctx.saved_tensors
    names = [*Layer._fields, *(name for name in Operands._fields if name not in {"logits", "overwritten"})]
    names += ["chunk_size", "total", "gradient_filter", "needs"]
    if upstream is None:
        return tuple(None for _ in names)
    with_loss, remaining = saved[: len(Layer._fields)], iter(saved[len(Layer._fields) :])
    pairs = zip(ctx.is_tensor, ctx.others, strict=True)
    arguments = [next(remaining) if is_tensor else other for is_tensor, other in pairs]
    layer, operands, settings, _ = _unpack(tuple(arguments))
    needs = dict(zip(names, ctx.needs_input_grad, strict=True))
    gradients: dict[str, Tensor | None] = {}
    if settings.total:
        for name, tensor, gradient in zip(Layer._fields, layer, with_loss, strict=True):
            if needs[name] and tensor is not None:
                gradients[name] = (gradient * upstream).to(tensor.dtype)
    else:
        of_layer = [needs[name] for name in Layer._fields]
        computed = torch.ops.lsce.chunked_gradients(*arguments[:-1], of_layer, stacked, upstream)
        gradients |= {name: of for name, of in zip(Layer._fields, computed, strict=True) if needs[name]}
    rows = upstream.expand(layer.hidden.shape[0])
    needed = tuple(needs.get(name, False) for name in Operands._fields)
    gradients |= target_gradients(operands, unstacked(stacked), rows, needed)
    return tuple(gradients.get(name) for name in names)


_losses.register_autograd(_backward, setup_context=_keep)
