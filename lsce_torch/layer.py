r"""The linear layer before the loss: sums and gradients, some rows at a time, so that no tensor holds all logits.

The gradient with respect to a chunk's logits z = h W^T + b gives those with respect to h, W and b by two matrix
products. The sweeps of the fused loss write it over the logits.

On NVIDIA's GPUs a chunk is four launches: the logits, the sweep over them, and a product for hidden and one for the
weight, which adds to the float32 sum as it multiplies. Elsewhere the product for the weight has the narrow dtype, and
is added to the sum tile by tile.

A TPU's compiler copies a tensor to write to a part of it. So there a chunk gets memory of its own, and the weight's
gradient is added as a whole. On TPUs and GPUs the negligible classes of `gradient_filter` become 0 instead of being
taken out: how many they are would be a value to wait for.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch._subclasses import FakeTensor

from lsce_torch.device import is_on_cpu, may_wait, takes_plain_operations
from lsce_torch.inputs import compute_dtype, tensor_of
from lsce_torch.memory import in_large_pages
from lsce_torch.sums import ROWS, Operands, Upstreams
from lsce_torch.sweeps import Results, logits_gradient, sweep_into

# Classes of a part of the weight's gradient, if the product has a narrower dtype than the sum. The product of a part
# stays in a GPU's cache until it is added, and that of all classes would take half as much memory as the sum.
_TILE = 8192


class Layer(NamedTuple):
    """The linear layer that makes the logits.

    Args:
        hidden: its input, in the dtype to multiply in.
        weight: in any dtype; its gradient has the same.
        bias: in any dtype, or None; its gradient has the same.
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
        needs: for each part of the layer, whether to compute the gradient with respect to it.
    """

    chunk_size: int
    total: bool
    gradient_filter: float
    needs: Sequence[bool]


def losses_and_gradients(
    layer: Layer, operands: Operands, settings: Settings
) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
    """Return the losses or their sum, the `Sums`, the first largest logits' indices, and the layer's gradients.

    The gradients are those of the sum of the losses.
    """
    num_rows = layer.hidden.shape[0]
    results = Results.empty((num_rows,), operands, compute_dtype(layer.hidden), layer.hidden.device)
    rounded = multiplied(layer, settings)
    gradients = Gradients(rounded, operands, settings)
    with_gradients = any(settings.needs)
    for part, logits, rows in chunks(rounded, operands, settings):
        sweep_into(results.of_rows(part), logits, rows, with_gradient=with_gradients)
        if with_gradients:
            gradients.add(part, logits, rows)
    losses, stacked, first = results
    return (losses.sum() if settings.total else losses), stacked, first, gradients.finish()


def layer_gradients(
    layer: Layer, operands: Operands, settings: Settings, stacked: Tensor, upstreams: Upstreams
) -> dict[str, Tensor]:
    """Return the gradients with respect to the layer, in its dtypes, from recomputed logits and the given sums."""
    rounded = multiplied(layer, settings)
    gradients = Gradients(rounded, operands, settings)
    if any(settings.needs):
        results = Results.empty((layer.hidden.shape[0],), operands, stacked.dtype, stacked.device)
        for part, logits, rows in chunks(rounded, operands, settings):
            if settings.total:
                # The same arithmetic as with the loss, to the last bit. The upstream gradient comes in at the end.
                sweep_into(results.of_rows(part), logits, rows, with_gradient=True)
            else:
                logits_gradient(logits, rows, stacked[:, part], upstreams.of_rows(part), logits)
            gradients.add(part, logits, rows)
    factor = upstreams.loss if settings.total else None
    return {name: scaled(of, factor, getattr(layer, name).dtype) for name, of in gradients.finish().items()}


def scaled(gradient: Tensor, upstream: Float[Tensor, ""] | None, dtype: torch.dtype) -> Tensor:
    """Return gradient * upstream, or the gradient, in that dtype, in the same memory if possible."""
    if upstream is None:
        return gradient.to(dtype)
    if gradient.dtype == dtype == compute_dtype(gradient):
        return gradient.mul_(upstream)
    if is_on_cpu(gradient) or takes_plain_operations(gradient):
        return (gradient * upstream).to(dtype)
    # One kernel, and nothing in float32. A GPU would round a scalar to the narrow dtype before it multiplies.
    result = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, upstream.reshape((1,) * gradient.ndim), out=result)


def multiplied(layer: Layer, settings: Settings) -> Layer:
    """Return the layer as it is multiplied: weight and bias rounded to the dtype of hidden, without derivatives."""
    dtype = layer.hidden.dtype
    # Gradients that are computed with the loss are not scaled yet. In float16 many would be 0.
    wide = torch.float32 if dtype == torch.float16 and settings.total else dtype
    return Layer(*(None if tensor is None else tensor.detach().to(dtype).to(wide) for tensor in layer))  # type: ignore[arg-type]


def chunks(layer: Layer, operands: Operands, settings: Settings) -> Iterator[tuple[slice, Tensor, Operands]]:
    """Yield some rows at a time: which, their logits, which the next chunk overwrites, and their operands.

    The layer is one of `multiplied`.
    """
    num_rows = layer.hidden.shape[0]
    # As few chunks as possible, all of about the same size.
    step = -(-num_rows // -(-num_rows // settings.chunk_size))
    is_plain = takes_plain_operations(layer.hidden)
    buffer = None if is_plain else in_large_pages(layer.weight.new_empty((step, layer.weight.shape[0])))
    for start in range(0, num_rows, step):
        part = slice(start, start + step)
        hidden = layer.hidden[part]
        out = None if buffer is None else buffer[: hidden.shape[0]]
        with _without_autocast(hidden):
            if layer.bias is None:
                logits = torch.mm(hidden, layer.weight.T, out=out)
            else:
                logits = torch.addmm(layer.bias, hidden, layer.weight.T, out=out)
        rows = {name: getattr(operands, name) for name in ROWS}
        rows = {name: v[part] if isinstance(v, Tensor) and v.ndim else v for name, v in rows.items()}
        if operands.class_mask is not None and operands.class_mask.ndim > 1:
            rows["class_mask"] = operands.class_mask[part]
        yield part, logits, operands._replace(**rows)


def _without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


class Gradients:
    """The gradients of a layer of `multiplied`, added up chunk by chunk; of weight and bias in the compute dtype."""

    def __init__(self, layer: Layer, operands: Operands, settings: Settings) -> None:
        """Allocate the gradients that are needed."""
        self.layer, self.threshold, self.dtype = layer, settings.gradient_filter, compute_dtype(layer.hidden)
        needs = dict(zip(Layer._fields, settings.needs, strict=True))
        self.sums: dict[str, Tensor] = {}
        if needs["hidden"]:
            self.sums["hidden"] = torch.empty_like(layer.hidden, memory_format=torch.contiguous_format)
        if needs["weight"]:
            self.sums["weight"] = in_large_pages(torch.empty_like(layer.weight, dtype=self.dtype))
        if needs["bias"]:
            self.sums["bias"] = torch.zeros(layer.weight.shape[0], dtype=self.dtype, device=layer.weight.device)
        self.factor = self.sum_of_weights = self.off_hidden = None
        if self.threshold:
            self.factor = _factor(operands, layer.weight, self.dtype)
            self.sum_of_weights = torch.mv(layer.weight.T, self.factor.to(layer.weight.dtype)).to(self.dtype)
            self.off_hidden = torch.zeros_like(self.sum_of_weights)

    def add(self, part: slice, of_logits: Float[Tensor, "n K"], rows: Operands) -> None:
        """Add the gradients of a chunk, from the gradient with respect to its logits."""
        hidden = self.layer.hidden[part]
        if rows.counted is not None:
            # Even multiplied by 0, a NaN would reach the weight's gradient.
            hidden = hidden.masked_fill(~rows.counted[:, None], 0)
        with _without_autocast(hidden):
            if "bias" in self.sums:
                self.sums["bias"] += of_logits.sum(dim=0, dtype=self.dtype)
            if self.factor is not None:
                self._add_large(part, rows, of_logits, hidden)
                return
            if "hidden" in self.sums:
                torch.mm(of_logits, self.layer.weight, out=self.sums["hidden"][part])
            if "weight" in self.sums:
                _add_product(self.sums["weight"], of_logits, hidden, is_first=part.start == 0)

    def _add_large(self, part: slice, rows: Operands, of_logits: Tensor, hidden: Tensor) -> None:
        """Add the products without the classes whose probability is negligible in every row.

        Away from the label the gradient of a logit is S p_k - off w_k. The second term is a product of a number per row
        and a number per class, and needs no matrix product: sum_k w_k W_k is the same for all rows, and the sum of
        off h over all rows is added up. Only the first term is left out where it is small.
        """
        assert self.factor is not None
        assert self.sum_of_weights is not None
        assert self.off_hidden is not None
        off = tensor_of(rows.off, self.dtype, hidden.device).expand(hidden.shape[0])
        for excluded in (rows.bad, None if rows.counted is None else ~rows.counted):
            if excluded is not None:
                off = off.masked_fill(excluded, 0)
        rest = of_logits.addcmul_(off[:, None], self.factor)
        is_small = torch.linalg.vector_norm(rest, torch.inf, dim=0) <= self.threshold  # False for NaN
        large, weight = None, self.layer.weight
        if is_on_cpu(rest):
            large = (~is_small).nonzero().squeeze(-1)
            rest, weight = rest[:, large], weight[large]
        else:
            rest = rest.masked_fill_(is_small, 0)
        if "hidden" in self.sums:
            product = torch.mm(rest, weight).to(self.dtype)
            self.sums["hidden"][part] = product.addcmul_(off[:, None], self.sum_of_weights, value=-1)
        if "weight" in self.sums:
            is_first = part.start == 0
            if large is None:
                _add_product(self.sums["weight"], rest, hidden, is_first=is_first)
            else:
                if is_first:
                    self.sums["weight"].zero_()
                self.sums["weight"].index_add_(0, large, torch.mm(rest.T, hidden).to(self.dtype))
            self.off_hidden.add_(off @ hidden.to(self.dtype))

    def finish(self) -> dict[str, Tensor]:
        """Return the gradients, by the name of their part of the layer."""
        if self.factor is not None and self.off_hidden is not None and "weight" in self.sums:
            self.sums["weight"].addcmul_(self.factor[:, None], self.off_hidden, value=-1)
        return self.sums


def _factor(operands: Operands, weight: Float[Tensor, "K D"], dtype: torch.dtype) -> Float[Tensor, " K"]:
    """Return w, to which the target is proportional away from the label: 0 outside the mask."""
    factor = torch.ones(weight.shape[0], dtype=dtype, device=weight.device)
    if operands.factor is not None:
        factor = factor * operands.factor
    return factor if operands.class_mask is None else factor.masked_fill(~operands.class_mask, 0)


def _add_product(
    total: Float[Tensor, "K D"], of_logits: Float[Tensor, "n K"], hidden: Float[Tensor, "n D"], *, is_first: bool
) -> None:
    """Add of_logits.T @ hidden to the total, or set the total to it."""
    old = 0 if is_first else 1
    if total.dtype == hidden.dtype:
        torch.addmm(total, of_logits.T, hidden, beta=old, out=total)
        return
    if _adds_to_float32(hidden):
        # torch 2.9 has no addmm of a float32 and narrow tensors.
        sums = total[None]
        torch.baddbmm(sums, of_logits.T[None], hidden[None], beta=old, out_dtype=total.dtype, out=sums)
        return
    step = total.shape[0] if takes_plain_operations(total) else _TILE
    for start in range(0, total.shape[0], step):
        part = slice(start, start + step)
        if is_on_cpu(total):
            tile, wide = of_logits[:, part].T.to(total.dtype), hidden.to(total.dtype)
            torch.addmm(total[part], tile, wide, beta=old, out=total[part])
            continue
        # In the narrow dtype, for which accelerators have matrix units.
        product = torch.mm(of_logits[:, part].T, hidden)
        if takes_plain_operations(total):
            total[part] = product if is_first else total[part] + product
        elif is_first:
            total[part].copy_(product)
        else:
            total[part].add_(product)


def _adds_to_float32(narrow: Tensor) -> bool:
    """Return whether a matrix product of narrow tensors can be added to float32 numbers, without being rounded."""
    if not narrow.is_cuda or isinstance(narrow, FakeTensor):
        return False
    return _has_float32_products(narrow.device, narrow.dtype, torch.cuda.tunable.is_enabled())


@cache
def _has_float32_products(device: torch.device, dtype: torch.dtype, _is_tunable: bool) -> bool:
    """Try it once: torch has it for NVIDIA's GPUs, later for AMD's, and not where products are tuned."""
    narrow, wide = (torch.ones((1, 16, 16), dtype=each, device=device) for each in (dtype, torch.float32))
    try:
        torch.baddbmm(wide, narrow, narrow, out_dtype=torch.float32, out=wide)
    except RuntimeError:
        return False
    return not may_wait(wide) or bool((wide == 17).all())
