r"""The linear layer and the loss, some rows at a time: at most one chunk of logits is in memory.

`layer.py` computes losses and gradients of the layer. This file decides when to compute the gradients.

With the loss. In a sum of losses every row has the same upstream gradient. So the gradients of the layer are computed
with the loss, from the same logits (6 N D K operations), and multiplied by the upstream gradient in `backward`. Until
then they take memory: one tensor as large as the weight, in float32 for narrower dtypes. `backward` gives them away; a
second `backward` over the same graph computes them again.

After the loss. The losses of single rows may be weighted by anything, so `backward` computes the chunks again (8 N D K)
from the sums of each row, which are kept.

Both are one autograd Function, and for torch.compile an operator that the compiler does not look into (`compiled.py`).
Second derivatives and forward mode take all logits at once, in plain operations.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn import functional as F

from lsce_spec import ChunkOptions, LossOptions
from lsce_torch import compiled, fused, saved
from lsce_torch.device import may_wait, takes_plain_operations
from lsce_torch.inputs import Batch, tensor_of
from lsce_torch.layer import Layer, Settings, layer_gradients, losses_and_gradients, scaled
from lsce_torch.overwrite import has_memory
from lsce_torch.plain import Tangents, plain_gradients, plain_tangents
from lsce_torch.stats import LossStats
from lsce_torch.sums import ROWS, Operands, Upstreams, target_gradients, target_slopes, unstacked


def losses(
    batch: Batch, layer: Layer, options: LossOptions, chunks: ChunkOptions, with_stats: bool, differentiable: bool
) -> tuple[Float[Tensor, "..."], LossStats | None]:
    """Return the loss of each row, or their sum if gradients are computed with it, and the statistics if asked.

    Args:
        batch: of one row at least; of its logits only shape and dtype are used.
        layer: makes the logits.
        options: of the loss.
        chunks: how to go through the rows.
        with_stats: whether to return statistics.
        differentiable: whether gradients flow through them.
    """
    layer = layer._replace(hidden=layer.hidden.reshape(batch.labels.numel(), layer.hidden.shape[-1]))
    index = _rows_that_count(batch, layer)
    if index is None:
        return _losses_of_all(batch, layer, options, chunks, with_stats, differentiable)
    selected = layer._replace(hidden=layer.hidden[index])
    some, some_stats = _losses_of_all(_selected(batch, index), selected, options, chunks, with_stats, differentiable)

    def scattered(values: Tensor, rest: int = 0) -> Tensor:
        whole = values.new_full((batch.labels.numel(),), rest)
        return whole.index_put((index,), values).reshape(batch.batch_shape)

    stats = None
    if some_stats is not None:
        stats = LossStats(*map(scattered, some_stats))
        stats = stats._replace(prediction=scattered(some_stats.prediction, -1))
    return (scattered(some) if chunks.recompute else some), stats


def preferred_rows(num_features: int, *, on_tpu: bool = False) -> int:
    """Return how many rows a chunk should have.

    A chunk of n rows reads the weight twice and reads and writes its gradient: 4 D K numbers for 6 n D K operations.
    With n = 3/4 D the logits take three quarters of the memory of the weight's gradient, and on a CPU the time to read
    the weight hardly shows. Accelerators do more operations per byte and need as many rows, but not more than 4096.

    If there is more than one chunk, a TPU's compiler keeps two copies of the sum of the weight's gradients, in float32.
    With n = 2 D narrow logits take as much memory as one of them.
    """
    return min(max(2 * num_features if on_tpu else 3 * num_features // 4, 256), 4096)


def _losses_of_all(
    batch: Batch, layer: Layer, options: LossOptions, chunks: ChunkOptions, with_stats: bool, differentiable: bool
) -> tuple[Float[Tensor, "..."], LossStats | None]:
    """Return what `losses` does, from all rows; those of the layer are in one dimension."""
    operands, entropy = fused.make_operands(batch, options, with_stats, differentiable)
    in_batch = {name: getattr(operands, name) for name in ROWS}
    operands = operands._replace(**{name: _flat(value, batch.batch_shape) for name, value in in_batch.items()})
    if batch.class_mask is not None and batch.has_row_masks:
        operands = operands._replace(class_mask=batch.class_mask.reshape(-1, layer.weight.shape[0]))
    preferred = preferred_rows(layer.hidden.shape[1], on_tpu=takes_plain_operations(layer.hidden))
    chunk_size = chunks.rows_at_most(preferred, layer.weight.shape[0])
    settings = Settings(chunk_size, not chunks.recompute, chunks.gradient_filter, _needs(layer, chunks))
    if torch.compiler.is_compiling():
        result, stacked, first, *found = compiled.chunked_losses(layer, operands, settings)
    else:
        result, stacked, first, *found = _ChunkedLosses.apply(*layer, *operands, *settings)[:6]  # type: ignore[no-untyped-call]
    if not settings.total:
        result = result.reshape(batch.batch_shape)
    if entropy is not None:
        entropy = tensor_of(entropy, batch.dtype, layer.hidden.device).expand(batch.batch_shape)
        if batch.counted is not None:
            entropy = torch.where(batch.counted, entropy, 0)
        result = result - (entropy.sum() if settings.total else entropy)
    if first is None:
        return result, None
    sums = unstacked(stacked.reshape(-1, *batch.batch_shape))
    operands = operands._replace(**in_batch)
    statistics = None
    if differentiable:
        nll, lse, model_entropy = (of_rows.reshape(batch.batch_shape) for of_rows in found)
        statistics = nll, lse, model_entropy
    first = first.reshape(batch.batch_shape)
    return result, fused.stats_of(batch, options, operands, entropy, sums, first, statistics)


def _needs(layer: Layer, chunks: ChunkOptions) -> tuple[bool, ...]:
    """Return for each part of the layer whether to compute its gradient with the loss."""
    with_loss = not chunks.recompute and torch.is_grad_enabled()
    if with_loss and not torch.compiler.is_compiling():
        with_loss = has_memory(*(tensor for tensor in layer if tensor is not None))
    return tuple(tensor is not None and tensor.requires_grad and with_loss for tensor in layer)


def _flat(value: Any, batch_shape: tuple[int, ...]) -> Any:
    """Return an operand with its rows in one dimension; numbers, and scalars for many rows, as they are."""
    if not isinstance(value, Tensor) or (not value.ndim and batch_shape):
        return value
    return value.expand(batch_shape).reshape(-1)


def _rows_that_count(batch: Batch, layer: Layer) -> Int[Tensor, " n"] | None:
    """Return the indices of the rows that count, if these are not all and it is possible to take only them.

    How many they are is a value to wait for, once in a call. A GPU then runs dry for as long as the host takes to start
    the next kernels, but is spared the matrix products of all other rows, which take longer unless these are few.
    """
    if batch.counted is None or torch.compiler.is_compiling():
        return None
    if batch.counted.is_meta or isinstance(batch.counted, FakeTensor) or takes_plain_operations(layer.hidden):
        return None
    tensors = [t for t in (batch.counted, batch.labels, batch.smoothing, layer.hidden) if isinstance(t, Tensor)]
    if not has_memory(*tensors) or not may_wait(batch.counted):
        return None
    index = batch.counted.reshape(-1).nonzero().squeeze(-1)
    return None if index.numel() in {0, batch.counted.numel()} else index


def _selected(batch: Batch, index: Int[Tensor, " n"]) -> Batch:
    """Return a batch of these rows only, all of which count."""
    smoothing, class_mask = batch.smoothing, batch.class_mask
    if isinstance(smoothing, Tensor):
        smoothing = smoothing.reshape(-1, 1)[index]
    if class_mask is not None and batch.has_row_masks:
        class_mask = class_mask.reshape(-1, class_mask.shape[-1])[index]
    return replace(
        batch,
        logits=batch.logits.new_zeros(1).expand(index.numel(), batch.logits.shape[-1]),
        labels=batch.labels.reshape(-1)[index],
        smoothing=smoothing,
        counted=None,
        bad=None if batch.bad is None else batch.bad.reshape(-1)[index],
        class_mask=class_mask,
    )


_ARGUMENTS = (Layer, Operands, Settings)


class _ChunkedLosses(torch.autograd.Function):
    """The losses of rows, or their sum."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
        """Return the losses or their sum, the `Sums`, the first largest logits' indices, and the layer's gradients.

        Before the gradients come the statistics that gradients flow through, or None for each.
        """
        layer, operands, settings = saved.grouped(arguments, *_ARGUMENTS)
        result, stacked, first, gradients = losses_and_gradients(layer, operands, settings)
        statistics = fused.statistics_or_none(operands, stacked)
        return result, stacked, first, *statistics, *saved.in_order(gradients, Layer)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        """Keep the arguments, the sums and the gradients."""
        stacked, first, gradients = output[1], output[2], output[6:]
        assert stacked is not None
        ctx.mark_non_differentiable(stacked, *(tensor for tensor in (first, *gradients) if tensor is not None))
        saved.save(ctx, (stacked,), inputs)
        # Not as saved tensors: `backward` takes them out.
        ctx.gradients = {name: of for name, of in zip(Layer._fields, gradients, strict=True) if of is not None}

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to the layer and to `on`, `off` and `at_max`."""
        (stacked,), layer, operands, settings = saved.saved(ctx, *_ARGUMENTS)
        gradients: dict[str, Tensor | None] = {}
        upstreams = Upstreams(upstream, *others[2:5])
        if not upstreams.present:
            return saved.in_order(gradients, *_ARGUMENTS)
        needed = saved.needed_by(ctx, *_ARGUMENTS)
        rows = None if upstream is None else upstream.expand(layer.hidden.shape[0])
        if torch.is_grad_enabled() or not has_memory(*upstreams.present, layer.hidden, layer.weight):
            gradients = _plain_gradients(layer, operands, needed, upstreams._replace(loss=rows))
            return saved.in_order(gradients, *_ARGUMENTS)
        of_layer = [name for name in Layer._fields if name in needed]
        if upstream is not None and all(name in ctx.gradients for name in of_layer):
            # Taken out, so that nothing else holds them and autograd need not copy them.
            of_total = {name: ctx.gradients.pop(name) for name in of_layer}
            gradients |= {name: scaled(of, upstream, getattr(layer, name).dtype) for name, of in of_total.items()}
        else:
            settings = settings._replace(needs=tuple(name in needed for name in Layer._fields))
            gradients |= layer_gradients(layer, operands, settings, stacked, upstreams)
        if rows is not None:
            gradients |= target_gradients(operands, target_slopes(operands, unstacked(stacked), needed), rows)
        return saved.in_order(gradients, *_ARGUMENTS)

    @staticmethod
    @saved.nestable
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        """Return the tangents of the losses and the statistics."""
        _, layer, operands, settings = saved.saved(ctx, *_ARGUMENTS)
        of_loss, *others = _plain_tangents(layer, operands, saved.given(tangents, *_ARGUMENTS))
        return of_loss.sum() if settings.total else of_loss, None, None, *others, *(None for _ in Layer._fields)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        """Take one example after the other: each may have a weight of its own."""
        dims = [dim if isinstance(value, Tensor) else None for dim, value in zip(in_dims, arguments, strict=True)]
        results = [
            _ChunkedLosses.apply(  # type: ignore[no-untyped-call]
                *(v if d is None else v.select(d, i) for v, d in zip(arguments, dims, strict=True))
            )
            for i in range(info.batch_size)
        ]
        # The sums of an example come first; the new dimension follows.
        out_dims = (0, 1, *(0 if result is not None else None for result in results[0][2:]))
        stacked = [
            None if dim is None else torch.stack(values, dim=dim)
            for values, dim in zip(zip(*results, strict=True), out_dims, strict=True)
        ]
        return tuple(stacked), out_dims


# --- Second derivatives and forward mode: from all logits at once, in operations that torch differentiates ----------


def _plain_gradients(
    layer: Layer, operands: Operands, needed: Sequence[str], upstreams: Upstreams
) -> dict[str, Tensor | None]:
    """Return the gradients with respect to what is needed of the layer and of the operands."""
    rounded = _rounded(layer, operands)
    gradients = plain_gradients(_logits(rounded), operands, ["logits", *needed], upstreams)
    of_logits = cast("Tensor", gradients.pop("logits")).to(rounded.hidden.dtype)
    if "hidden" in needed:
        of_hidden = of_logits @ rounded.weight
        gradients["hidden"] = of_hidden if operands.counted is None else _where_counted(of_hidden, operands)
    if "weight" in needed:
        gradients["weight"] = (of_logits.T @ rounded.hidden).to(layer.weight.dtype)
    if "bias" in needed and layer.bias is not None:
        gradients["bias"] = of_logits.sum(dim=0).to(layer.bias.dtype)
    return gradients


def _plain_tangents(layer: Layer, operands: Operands, tangents: dict[str, Tensor]) -> Tangents:
    """Return the tangents of the losses and the statistics."""
    rounded = _rounded(layer, operands)
    tangents = dict(tangents)
    of_layer = {name: tangents.pop(name) for name in Layer._fields if name in tangents}
    if of_layer:
        given = _rounded(layer._replace(**of_layer), operands)
        parts = []
        if "hidden" in of_layer:
            parts.append(F.linear(given.hidden, rounded.weight))
        if "weight" in of_layer:
            parts.append(F.linear(rounded.hidden, given.weight))
        if "bias" in of_layer and given.bias is not None:
            parts.append(given.bias)
        tangents["logits"] = functools.reduce(torch.add, parts)
    return plain_tangents(_logits(rounded), operands, tangents)


def _rounded(layer: Layer, operands: Operands) -> Layer:
    """Return the layer in the dtype of hidden, which is 0 where rows do not count."""
    dtype = layer.hidden.dtype
    hidden = layer.hidden if operands.counted is None else _where_counted(layer.hidden, operands)
    return Layer(hidden, layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))


def _where_counted(hidden: Float[Tensor, "n D"], operands: Operands) -> Float[Tensor, "n D"]:
    assert operands.counted is not None
    return torch.where(operands.counted[:, None], hidden, 0)


def _logits(layer: Layer) -> Float[Tensor, "n K"]:
    return F.linear(layer.hidden, layer.weight, layer.bias)
