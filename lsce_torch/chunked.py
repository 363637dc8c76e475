r"""The linear layer and the loss, some rows at a time: no more than one chunk of logits is ever in memory.

The gradient of a chunk's logits z = h W^T + b gives those of h, W and b by two matrix products, and the sweeps of the
fused loss write it over the logits. That is all; what remains is when.

With the loss. A sum of losses hands every row the same upstream gradient, so the gradients of the layer are computed
with the loss, while the logits are at hand (6 N D K operations), and multiplied with the upstream gradient later. They
are kept until then: one tensor as large as the weight, in float32 for narrower dtypes. `backward` gives them away; a
second one over the same graph computes them again.

After it. Losses of single rows may be weighted by anything afterwards, so their chunks are computed again for the
gradient (8 N D K). The sums of each row are kept.

Both are one autograd Function, and for torch.compile an operator that the compiler does not look into (`compiled.py`).
A derivative of the gradient, and forward mode, take all logits at once, in plain operations.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn import functional as F

from lsce_spec import ChunkOptions, LossOptions
from lsce_torch import fused
from lsce_torch.inputs import Batch, compute_dtype
from lsce_torch.overwrite import has_memory
from lsce_torch.stats import LossStats
from lsce_torch.sweeps import Operands, in_large_pages, logits_gradient, sweep, sweep_with_gradient, unstacked

# Classes of a part of the weight's gradient, where the product comes in a narrower dtype than the sum.
_TILE = 8192


class Layer(NamedTuple):
    """The linear layer that makes the logits.

    Args:
        hidden: what goes in, in the dtype to multiply in.
        weight: in any dtype, which its gradient has.
        bias: likewise, or None.
    """

    hidden: Float[Tensor, "*batch D"]
    weight: Float[Tensor, "K D"]
    bias: Float[Tensor, " K"] | None


class Settings(NamedTuple):
    """How to go through the rows.

    Args:
        chunk_size: rows of a chunk, at most.
        total: whether the result is the sum of the losses.
        gradient_filter: see `linear_label_smoothed_cross_entropy`.
        kept: whether each part of the layer needs its gradient, and then the gradients themselves; None computes them
            again.
    """

    chunk_size: int
    total: bool
    gradient_filter: float
    kept: dict[str, Any] | None


ROWS = ("labels", "counted", "bad", "at_label", "off", "other_mass", "at_max")


def losses(
    batch: Batch, layer: Layer, options: LossOptions, chunks: ChunkOptions, with_stats: bool
) -> tuple[Float[Tensor, "..."], LossStats | None]:
    """Return the loss of each row, or their sum if gradients are computed with it, and the statistics if asked.

    Args:
        batch: of one row at least; its logits are only a shape.
        layer: makes the logits.
        options: of the loss.
        chunks: how to go through the rows.
        with_stats: whether to return statistics.
    """
    index = _rows_that_count(batch, layer)
    if index is not None:
        some, some_stats = losses(
            _selected(batch, index),
            layer._replace(hidden=layer.hidden.reshape(batch.labels.numel(), layer.hidden.shape[-1])[index]),
            options,
            chunks,
            with_stats,
        )

        def scattered(values: Tensor) -> Tensor:
            return values.new_zeros(batch.labels.numel()).index_put((index,), values).reshape(batch.batch_shape)

        stats = None if some_stats is None else LossStats(*map(scattered, some_stats))
        return (scattered(some) if chunks.recompute else some), stats

    operands, entropy = fused.make_operands(batch, options, with_stats)
    hidden = layer.hidden.reshape(batch.labels.numel(), layer.hidden.shape[-1])
    operands = operands._replace(logits=cast("Tensor", None), **{name: _flat(operands, name, batch) for name in ROWS})
    chunk_size = chunks.rows_at_most(preferred_rows(hidden.shape[1]), layer.weight.shape[0])
    settings = Settings(chunk_size, not chunks.recompute, chunks.gradient_filter, None)
    if torch.compiler.is_compiling():
        from lsce_torch import compiled  # noqa: PLC0415 - registers operators, which takes a while

        result, stacked, first = compiled.chunked_losses(layer._replace(hidden=hidden), operands, settings)
    else:
        needs = {name: t is not None and t.requires_grad and torch.is_grad_enabled() for name, t in _named(layer)}
        if settings.total and any(needs.values()) and has_memory(*(t for _, t in _named(layer) if t is not None)):
            settings = settings._replace(kept=needs)
        result, stacked, first = _ChunkedLosses.apply(  # type: ignore[no-untyped-call]
            hidden, layer.weight, layer.bias, settings, *operands
        )
    if not settings.total:
        result = result.reshape(batch.batch_shape)
    if entropy is not None:
        entropy = torch.as_tensor(entropy, dtype=batch.dtype, device=hidden.device).expand(batch.batch_shape)
        if batch.counted is not None:
            entropy = torch.where(batch.counted, entropy, 0)
        result = result - (entropy.sum() if settings.total else entropy)
    if first is None:
        return result, None
    sums = unstacked(stacked.reshape(-1, *batch.batch_shape))
    operands = operands._replace(**{name: _batch_shaped(operands, name, batch) for name in ROWS})
    return result, fused.stats_of(batch, options, operands, entropy, sums, first.reshape(batch.batch_shape))


def preferred_rows(num_features: int) -> int:
    """Return how many rows a chunk should have.

    Each reads the weight twice and reads and writes its gradient: 4 D K numbers, against 6 n D K operations. With 3/4 D
    rows the logits take three quarters of the memory of the weight's gradient, which is there anyway, and on a CPU
    reading the weight hardly shows. Accelerators, with more operations to a byte, have use for that many, but not for
    more than 4096.
    """
    return min(max(3 * num_features // 4, 256), 4096)


def _named(layer: Layer) -> list[tuple[str, Tensor | None]]:
    return list(zip(Layer._fields, layer, strict=True))


def _rows_that_count(batch: Batch, layer: Layer) -> Int[Tensor, " n"] | None:
    """Return the indices of the rows that count, if these are not all and it is possible to take only them."""
    if batch.counted is None or torch.compiler.is_compiling():
        return None
    if batch.counted.is_meta or isinstance(batch.counted, FakeTensor):
        return None
    tensors = [t for t in (batch.counted, batch.labels, batch.smoothing, layer.hidden) if isinstance(t, Tensor)]
    if not has_memory(*tensors) or (batch.counted.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    index = batch.counted.reshape(-1).nonzero().squeeze(-1)
    return None if index.numel() in {0, batch.counted.numel()} else index


def _selected(batch: Batch, index: Int[Tensor, " n"]) -> Batch:
    """Return a batch of only these rows, all of which count."""
    smoothing = batch.smoothing
    if isinstance(smoothing, Tensor):
        smoothing = smoothing.reshape(-1, 1)[index]
    return replace(
        batch,
        logits=batch.logits.new_zeros(1).expand(index.numel(), batch.logits.shape[-1]),
        labels=batch.labels.reshape(-1)[index],
        smoothing=smoothing,
        counted=None,
        bad=None if batch.bad is None else batch.bad.reshape(-1)[index],
    )


def _flat(operands: Operands, name: str, batch: Batch) -> Any:
    """Return an operand over the rows with its rows in one dimension; a number as it is."""
    value = getattr(operands, name)
    if not isinstance(value, Tensor) or (not value.ndim and batch.batch_shape):
        return value
    return value.expand(batch.batch_shape).reshape(-1)


def _batch_shaped(operands: Operands, name: str, batch: Batch) -> Any:
    value = getattr(operands, name)
    return value.reshape(batch.batch_shape) if isinstance(value, Tensor) and value.ndim else value


class _ChunkedLosses(torch.autograd.Function):
    """The losses of rows, or their sum."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, *operands: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the losses or their sum, the sums over the classes, stacked, and the first largest logit's index."""
        layer = Layer(hidden, weight, bias)
        kept = settings.kept
        needs = dict.fromkeys(Layer._fields, False) if kept is None else kept
        row_losses, stacked, first, gradients = run(layer, Operands._make(operands), settings, needs)
        if kept is not None:
            kept.update(gradients)
        return (row_losses.sum() if settings.total else row_losses), stacked, first

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor | None]) -> None:
        """Keep what came in, and the sums."""
        _, stacked, first = output
        ctx.mark_non_differentiable(*([stacked] if first is None else [stacked, first]))
        ctx.set_materialize_grads(False)
        ctx.settings = inputs[3]
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        ctx.save_for_backward(stacked, *tensors)
        ctx.save_for_forward(stacked, *tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the layer and of `at_label`, `off` and `at_max`."""
        layer, settings, operands, stacked = _saved(ctx)
        gradients: dict[str, Tensor | None] = {}
        needs = dict(zip(_ARGUMENTS, ctx.needs_input_grad, strict=True))
        if upstream is None:
            return tuple(None for _ in _ARGUMENTS)
        if torch.is_grad_enabled() or not has_memory(upstream, layer.hidden, layer.weight):
            names = [name for name, need in needs.items() if need]
            gradients = dict(_plain_pullback(layer, operands, settings.total, names)(upstream))
        else:
            kept = settings.kept or {}
            of_layer = {name: needs[name] for name in Layer._fields}
            if all(isinstance(kept.get(name), Tensor) for name, need in of_layer.items() if need):
                # Taken out, so that nothing else holds them, and whoever gets them need not copy.
                of_total = {name: kept.pop(name) for name, need in of_layer.items() if need}
                gradients |= {name: _scaled(of, upstream, getattr(layer, name).dtype) for name, of in of_total.items()}
            else:
                gradients |= layer_gradients(layer, operands, settings, stacked, upstream, of_layer)
            rows = upstream.expand(layer.hidden.shape[0])
            needed = [needs.get(name, False) for name in Operands._fields]
            gradients |= fused.target_gradients(operands, unstacked(stacked), rows, tuple(needed))
        return tuple(gradients.get(name) for name in _ARGUMENTS)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, None, None]:
        """Return the tangent of the losses."""
        layer, settings, operands, stacked = _saved(ctx)
        given = {name: t for name, t in zip(_ARGUMENTS, tangents, strict=True) if isinstance(t, Tensor)}
        # The transpose of the gradient, which is linear in what comes from upstream: torch does not nest forward mode.
        pullback = _plain_pullback(layer, operands, settings.total, list(given))
        upstream = torch.zeros_like(stacked[0])
        transposed = torch.func.vjp(pullback, upstream.sum() if settings.total else upstream)[1]
        return transposed(given)[0], None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        """Take one example after the other: each may have a weight of its own."""
        # The settings are a tuple, in which torch looks for dimensions.
        dims = [dim if isinstance(value, Tensor) else None for dim, value in zip(in_dims, arguments, strict=True)]
        results = [
            _ChunkedLosses.apply(  # type: ignore[no-untyped-call]
                *(v if d is None else v.select(d, i) for v, d in zip(arguments, dims, strict=True))
            )
            for i in range(info.batch_size)
        ]
        losses, stacked, first = zip(*results, strict=True)
        firsts = None if first[0] is None else torch.stack(first)
        return (torch.stack(losses), torch.stack(stacked, dim=1), firsts), (0, 1, None if firsts is None else 0)


_ARGUMENTS = (*Layer._fields, "settings", *Operands._fields)


def _saved(ctx: Any) -> tuple[Layer, Settings, Operands, Tensor]:
    stacked, *tensors = ctx.saved_tensors
    remaining = iter(tensors)
    values = [
        next(remaining) if is_tensor else other for is_tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)
    ]
    return Layer(*values[:3]), values[3], Operands._make(values[4:]), stacked


def run(
    layer: Layer, operands: Operands, settings: Settings, needs: dict[str, bool]
) -> tuple[Float[Tensor, " N"], Tensor, Tensor | None, dict[str, Tensor]]:
    """Return the losses, the sums, the first largest logits' indices, and the gradients of the layer that are needed.

    The gradients are those of the sum of the losses.
    """
    num_rows, dtype = layer.hidden.shape[0], compute_dtype(layer.hidden)
    row_losses = torch.empty(num_rows, dtype=dtype, device=layer.hidden.device)
    stacked = torch.empty((5 if operands.at_max is None else 7, num_rows), dtype=dtype, device=layer.hidden.device)
    first = torch.empty(num_rows, dtype=torch.int64, device=layer.hidden.device) if operands.with_stats else None
    multiplied = _multiplied(layer, settings)
    gradients = _Gradients(multiplied, operands, settings, needs)
    for part, rows in _chunks(multiplied, operands, settings):
        stacked[:, part], first_of_rows = (sweep_with_gradient if any(needs.values()) else sweep)(rows)
        if first is not None and first_of_rows is not None:
            first[part] = first_of_rows
        row_losses[part] = fused.losses_of(rows, unstacked(stacked[:, part]))[0]
        if any(needs.values()):
            gradients.add(part, rows)
    return row_losses, stacked, first, gradients.finish()


def layer_gradients(
    layer: Layer, operands: Operands, settings: Settings, stacked: Tensor, upstream: Tensor, needs: dict[str, bool]
) -> dict[str, Tensor]:
    """Return the gradients of the layer, in its dtypes, from logits computed again and the sums as they were."""
    multiplied = _multiplied(layer, settings)
    gradients = _Gradients(multiplied, operands, settings, needs)
    if any(needs.values()):
        for part, rows in _chunks(multiplied, operands, settings):
            if settings.total:
                # As with the loss, to the last bit; what comes from upstream is multiplied in at the end.
                sweep_with_gradient(rows)
            else:
                of_rows = upstream[part]
                if rows.counted is not None:
                    of_rows = of_rows.masked_fill(~rows.counted, 0)
                logits_gradient(rows._replace(overwritten=()), unstacked(stacked[:, part]), of_rows)
            gradients.add(part, rows)
    factor = upstream if settings.total else torch.ones_like(stacked[0, 0])
    return {name: _scaled(of, factor, getattr(layer, name).dtype) for name, of in gradients.finish().items()}


def _without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def _multiplied(layer: Layer, settings: Settings) -> Layer:
    """Return the layer as it is multiplied: weight and bias rounded to the dtype of hidden, without derivatives."""
    dtype = layer.hidden.dtype
    # Gradients that are computed with the loss are not scaled yet, and in float16 many would be 0.
    then = torch.float32 if dtype == torch.float16 and settings.total else dtype
    return Layer(*(None if tensor is None else tensor.detach().to(dtype).to(then) for tensor in layer))  # type: ignore[arg-type]


def _chunks(layer: Layer, operands: Operands, settings: Settings) -> Iterator[tuple[slice, Operands]]:
    """Yield some rows at a time, and their operands with the logits, which only live until the next.

    The layer is one of `_multiplied`.
    """
    num_rows = layer.hidden.shape[0]
    # As many chunks as needed, all of about the same size.
    step = -(-num_rows // -(-num_rows // settings.chunk_size))
    buffer = in_large_pages(layer.weight.new_empty((step, layer.weight.shape[0])))
    for start in range(0, num_rows, step):
        part = slice(start, start + step)
        hidden = layer.hidden[part]
        logits = buffer[: hidden.shape[0]]
        with _without_autocast(hidden):
            if layer.bias is None:
                torch.mm(hidden, layer.weight.T, out=logits)
            else:
                torch.addmm(layer.bias, hidden, layer.weight.T, out=logits)
        rows = {name: getattr(operands, name) for name in ROWS}
        rows = {name: v[part] if isinstance(v, Tensor) and v.ndim else v for name, v in rows.items()}
        yield part, operands._replace(logits=logits, **rows)


class _Gradients:
    """The gradients of a layer of `_multiplied`, added up chunk by chunk; of weight and bias in the compute dtype."""

    def __init__(self, layer: Layer, operands: Operands, settings: Settings, needs: dict[str, bool]) -> None:
        """Make room for those that are needed."""
        self.layer, self.threshold, self.dtype = layer, settings.gradient_filter, compute_dtype(layer.hidden)
        self.sums: dict[str, Tensor] = {}
        if needs["hidden"]:
            self.sums["hidden"] = torch.empty_like(layer.hidden, memory_format=torch.contiguous_format)
        if needs["weight"]:
            self.sums["weight"] = in_large_pages(torch.empty_like(layer.weight, dtype=self.dtype))
        if needs["bias"]:
            self.sums["bias"] = torch.zeros(layer.weight.shape[0], dtype=self.dtype, device=layer.weight.device)
        self.others = self.sum_of_others = self.off_hidden = None
        if self.threshold:
            self.others = _others(operands, layer.weight, self.dtype)
            self.sum_of_others = torch.mv(layer.weight.T, self.others.to(layer.weight.dtype)).to(self.dtype)
            self.off_hidden = torch.zeros_like(self.sum_of_others)

    def add(self, part: slice, rows: Operands) -> None:
        """Add the gradients of a chunk, whose logits have been overwritten by theirs."""
        of_logits = rows.logits
        hidden = self.layer.hidden[part]
        if rows.counted is not None:
            # 0 times a NaN would reach the weight's gradient.
            hidden = hidden.masked_fill(~rows.counted[:, None], 0)
        with _without_autocast(hidden):
            if "bias" in self.sums:
                self.sums["bias"] += of_logits.sum(dim=0, dtype=self.dtype)
            if self.others is None:
                if "hidden" in self.sums:
                    torch.mm(of_logits, self.layer.weight, out=self.sums["hidden"][part])
                if "weight" in self.sums:
                    _add_product(self.sums["weight"], of_logits, hidden, is_first=part.start == 0)
            else:
                self._add_large(part, rows, of_logits, hidden)

    def _add_large(self, part: slice, rows: Operands, of_logits: Tensor, hidden: Tensor) -> None:
        """Add the products without the classes whose probability is negligible in every row.

        Away from the label the gradient of a logit is S p_k - off w_k, of which the second part is the product of a
        number for each row and one for each class. It needs no matrix product: sum_k w_k W_k is the same for all rows,
        and the sum of off h over all rows is added up. The first part is left out where it is small.
        """
        assert self.others is not None
        assert self.sum_of_others is not None
        assert self.off_hidden is not None
        off = torch.as_tensor(rows.off, dtype=self.dtype, device=hidden.device).expand(hidden.shape[0])
        for excluded in (rows.bad, None if rows.counted is None else ~rows.counted):
            if excluded is not None:
                off = off.masked_fill(excluded, 0)
        rest = of_logits.add_(off[:, None] * self.others.to(of_logits.dtype))
        is_small = torch.linalg.vector_norm(rest, torch.inf, dim=0) <= self.threshold  # NaN is not
        large = (~is_small).nonzero().squeeze(-1)
        rest = rest[:, large]
        if "hidden" in self.sums:
            product = torch.mm(rest, self.layer.weight[large]).to(self.dtype)
            self.sums["hidden"][part] = product.addcmul_(off[:, None], self.sum_of_others, value=-1)
        if "weight" in self.sums:
            if part.start == 0:
                self.sums["weight"].zero_()
            self.sums["weight"].index_add_(0, large, torch.mm(rest.T, hidden).to(self.dtype))
            self.off_hidden.add_(off @ hidden.to(self.dtype))

    def finish(self) -> dict[str, Tensor]:
        """Return the gradients."""
        if self.others is not None and self.off_hidden is not None and "weight" in self.sums:
            self.sums["weight"].addcmul_(self.others[:, None], self.off_hidden, value=-1)
        return self.sums


def _others(operands: Operands, weight: Float[Tensor, "K D"], dtype: torch.dtype) -> Float[Tensor, " K"]:
    """Return w, to which the target is proportional away from the label."""
    others = torch.ones(weight.shape[0], dtype=dtype, device=weight.device)
    if operands.factor is not None:
        others = others * operands.factor
    return others if operands.class_mask is None else others.masked_fill(~operands.class_mask, 0)


def _add_product(
    total: Float[Tensor, "K D"], of_logits: Float[Tensor, "n K"], hidden: Float[Tensor, "n D"], *, is_first: bool
) -> None:
    """Add of_logits.T @ hidden to the total, or set it to that."""
    old = 0 if is_first else 1
    if total.dtype == hidden.dtype:
        torch.addmm(total, of_logits.T, hidden, beta=old, out=total)
        return
    for start in range(0, total.shape[0], _TILE):
        part = slice(start, start + _TILE)
        if total.device.type == "cpu":
            tile, narrow = of_logits[:, part].T.to(total.dtype), hidden.to(total.dtype)
            torch.addmm(total[part], tile, narrow, beta=old, out=total[part])
        else:
            # In the narrow dtype, for which accelerators have units of their own.
            product = torch.mm(of_logits[:, part].T, hidden)
            total[part] = product if is_first else total[part] + product


def _scaled(gradient: Tensor, upstream: Float[Tensor, ""], dtype: torch.dtype) -> Tensor:
    """Return gradient * upstream in that dtype, in the same memory if possible."""
    if gradient.dtype == dtype == compute_dtype(gradient):
        return gradient.mul_(upstream)
    return (gradient * upstream).to(dtype)


def _plain_losses(layer: Layer, operands: Operands, total: bool) -> Tensor:
    """Return the losses or their sum, from all logits at once, in operations that torch differentiates."""
    dtype = layer.hidden.dtype
    hidden = layer.hidden
    if operands.counted is not None:
        hidden = torch.where(operands.counted[:, None], hidden, 0)
    logits = F.linear(hidden, layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))
    row_losses = fused.plain_losses(operands._replace(logits=logits))
    return row_losses.sum() if total else row_losses


def _plain_pullback(layer: Layer, operands: Operands, total: bool, names: list[str]) -> Any:
    """Return the function from what comes from upstream to the gradients of the arguments of these names."""
    primals = {name: getattr(layer if name in Layer._fields else operands, name) for name in names}

    def plain(by: dict[str, Any]) -> Tensor:
        of_layer = {name: value for name, value in by.items() if name in Layer._fields}
        of_rows = {name: value for name, value in by.items() if name not in Layer._fields}
        return _plain_losses(layer._replace(**of_layer), operands._replace(**of_rows), total)

    pullback = torch.func.vjp(plain, primals)[1]
    return lambda upstream: pullback(upstream)[0]
