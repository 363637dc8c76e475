"""Kernels that eager torch would start on a GPU for loss and gradient, counted on a CPU, and how often logits move.

`lsce_torch` is told that its tensors are on a GPU. Of its own kernels each is counted as it would be started, and not
run; torch's operations are seen as they run on the CPU. Only accesses to whole logits count as moved. A row that is
read again by the same kernel counts again, although it is mostly still in the cache.

The linear loss is run with fewer rows and features, in as many chunks as the shape has, and counted with the rows and
features of the shape. Its matrix products count apart: each reads its operands and writes its result once.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lsce_torch import (
    label_smoothed_cross_entropy,
    label_smoothed_cross_entropy_with_stats,
    layer,
    linear_label_smoothed_cross_entropy,
)
from lsce_torch.chunked import preferred_rows
from parity_tests.losses.triton_kernels import Launch, on_pretended_gpu

# No kernel: they make views, or memory.
VIEWS = frozenset(
    (
        *("alias", "as_strided", "detach", "expand", "movedim", "permute", "reshape", "select", "slice", "squeeze"),
        *("t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view"),
        *("empty", "empty_like", "empty_strided", "new_empty"),
    )
)
# Kernels of an operation, where they are not one: one fills the gradient with zeros, the next writes to it.
KERNELS = {"nll_loss_backward": 2}
ROWS, CLASSES = 64, (32768, 1000)
_PRODUCTS = frozenset(("mm", "addmm", "baddbmm", "mv"))
# Rows of a chunk and features that are run. No other size is the same.
_FEW_ROWS, _FEW_FEATURES = 11, 16


class Count(NamedTuple):
    """What one loss with its gradient starts.

    Args:
        name: of the loss.
        classes: of the logits, which have `ROWS` rows; their number changes nothing.
        dtype: of the logits.
        launches: how many kernels.
        moved: bytes of accesses to whole logits, or to what is as large, as a multiple of the logits' bytes.
    """

    name: str
    classes: int
    dtype: str
    launches: int
    moved: float


class Layer(NamedTuple):
    """Sizes of a linear layer and its batch."""

    rows: int
    features: int
    classes: int


LAYER = Layer(8192, 2048, 131072)


LOSSES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "F.cross_entropy, smoothed": partial(F.cross_entropy, label_smoothing=0.1),
    "lsce triton": partial(label_smoothed_cross_entropy, smoothing=0.1),
    "lsce triton, ignored rows": partial(label_smoothed_cross_entropy, smoothing=0.1, ignore_index=-100),
    "lsce triton, softcap": partial(label_smoothed_cross_entropy, smoothing=0.1, softcap=30.0),
    "lsce triton, denominator": partial(label_smoothed_cross_entropy, smoothing=0.1, denominator=torch.tensor(64)),
    "lsce triton, class weights": lambda logits, labels: label_smoothed_cross_entropy(
        logits, labels, smoothing=0.1, class_weight=torch.empty(logits.shape[-1])
    ),
    "lsce triton, statistics": partial(label_smoothed_cross_entropy_with_stats, smoothing=0.1),
    "lsce fused": partial(label_smoothed_cross_entropy, smoothing=0.1, implementation="fused"),
}


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the kernels that torch would start, and the bytes of whole logits that they would move."""

    def __init__(self, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size, self.launches, self.bytes = size, 0, 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = operation(*args, **(kwargs or {}))
        schema = operation._schema
        name = schema.name.removeprefix("aten::")
        if name in VIEWS:
            return results
        self.launches += KERNELS.get(name, 1)
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | (kwargs or {})
        written = [given.get(each.name) for each in schema.arguments if each.alias_info and each.alias_info.is_write]
        read = [given.get(each.name) for each in schema.arguments if not each.is_out]
        if name in {"copy_", "fill_", "zero_"}:
            read.remove(args[0])
        if name in {"gather", "scatter_", "index", "nll_loss_forward", "nll_loss_backward", "zeros_like"}:
            # Of whole logits these touch a few; what they make is written in full.
            read, written = [], []
            if name == "scatter_":
                return results
        self.bytes += self._whole(read) + self._whole(written or results)
        return results

    def _whole(self, tensors: Any) -> int:
        found = (leaf for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))
        return sum(tensor.numel() * tensor.element_size() for tensor in found if tensor.numel() >= self.size)


class LinearCount(NamedTuple):
    """What one linear loss with its gradients starts.

    Args:
        name: of the loss.
        launches: how many kernels.
        of_chunk: how many of them another chunk would add; 0 without chunks.
        of_products: bytes of the operands and results of the matrix products.
        moved: bytes that the other kernels read and write.
    """

    name: str
    launches: int
    of_chunk: int
    of_products: int
    moved: int


def _with_all_logits(hidden: Tensor, weight: Tensor, labels: Tensor, **_: int) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels, label_smoothing=0.1)


_linear = partial(linear_label_smoothed_cross_entropy, smoothing=0.1)
LINEAR_LOSSES: dict[str, Callable[..., Tensor]] = {
    "F.linear, F.cross_entropy": _with_all_logits,
    "lsce linear": _linear,
    "lsce linear, ignored rows": partial(_linear, ignore_index=-100),
    "lsce linear, recompute": partial(_linear, recompute=True),
    "lsce linear, filtered": partial(_linear, gradient_filter=2.0**-12),
    "lsce linear, narrow sums": _linear,
    "lsce linear, 4096 rows": _linear,
}


class _CountedLayer(_Counted):  # type: ignore[no-untyped-call]
    """Counts all bytes, at the sizes of the shape.

    Args:
        sizes: that of the shape, for each that is run.
    """

    def __init__(self, sizes: dict[int, int]) -> None:
        super().__init__(0)
        self.sizes, self.of_products = sizes, 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.bytes
        results = super().__torch_dispatch__(operation, types, args, kwargs)
        if operation._schema.name.removeprefix("aten::") in _PRODUCTS:
            self.of_products += self.bytes - before
            if (kwargs or {}).get("beta") == 0:
                self.of_products -= self._whole(args[0])  # not read
            self.bytes = before
        return results

    def _whole(self, tensors: Any) -> int:
        found = (leaf for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))
        return sum(tensor.element_size() * math.prod(map(self._size, tensor.shape)) for tensor in found)

    def _size(self, size: int) -> int:
        return self.sizes.get(size, size)


def measure_linear(shape: Layer = LAYER) -> list[LinearCount]:
    """Count each loss of a bfloat16 layer."""
    return [count_linear(name, shape) for name in LINEAR_LOSSES]


def count_linear(name: str, shape: Layer) -> LinearCount:
    """Count what one of `LINEAR_LOSSES` starts."""
    num_chunks = -(-shape.rows // (4096 if name.endswith("4096 rows") else preferred_rows(shape.features)))
    counted, launches = _linear_launches(name, shape, num_chunks)
    of_products, moved = counted.of_products, counted.bytes
    of_logits = 2 * -(-shape.rows // num_chunks) * shape.classes
    moved += sum(_moved(launch) * of_logits for launch in launches)
    fewer, fewer_launches = _linear_launches(name, shape, num_chunks - 1)
    total = counted.launches + len(launches)
    return LinearCount(name, total, total - fewer.launches - len(fewer_launches), of_products, moved)


def _linear_launches(name: str, shape: Layer, num_chunks: int) -> tuple[_CountedLayer, list[Launch]]:
    """Return what a loss starts in so many chunks."""
    few_rows = num_chunks * _FEW_ROWS
    hidden, weight = (
        torch.zeros(size, _FEW_FEATURES, dtype=torch.bfloat16, requires_grad=True) for size in (few_rows, shape.classes)
    )
    labels = torch.zeros(few_rows, dtype=torch.int64)
    sizes = {few_rows: shape.rows, _FEW_ROWS: -(-shape.rows // num_chunks), _FEW_FEATURES: shape.features}
    counted = _CountedLayer(sizes)
    with ExitStack() as stack:
        launches = stack.enter_context(on_pretended_gpu())
        if name.endswith("narrow sums"):
            stack.enter_context(mock.patch.object(layer, "_adds_to_float32", return_value=False))
        stack.enter_context(counted)
        loss = LINEAR_LOSSES[name](hidden, weight, labels, chunk_size=_FEW_ROWS)
        torch.autograd.grad(loss, (hidden, weight))
    return counted, launches


def measure() -> list[Count]:
    """Count each loss."""
    return [count(name, classes, dtype) for classes in CLASSES for dtype in ("bfloat16", "float32") for name in LOSSES]


def count(name: str, classes: int, dtype: str) -> Count:
    """Count what one of `LOSSES` starts."""
    logits = torch.zeros(ROWS, classes, dtype=getattr(torch, dtype), requires_grad=True)
    labels = torch.zeros(ROWS, dtype=torch.int64)
    counted = _Counted(logits.numel())
    with on_pretended_gpu() as launches, counted:
        output = LOSSES[name](logits, labels)
        loss = output[0] if isinstance(output, tuple) else output
        torch.autograd.grad(loss, logits)
    of_logits = logits.numel() * logits.element_size()
    moved = counted.bytes / of_logits + sum(map(_moved, launches))
    return Count(name, classes, dtype, counted.launches + len(launches), moved)


def _moved(launch: Launch) -> int:
    """Return how often a kernel of ours reads or writes whole logits."""
    given = launch.arguments
    if launch.name == "forward":
        is_kept = given["ALIGN"] == 0
        return 1 if given["gradient"] is None else 2 if is_kept else 3
    if launch.name == "backward":
        return 0 if given["IS_WRITTEN"] else 2  # the upstream gradient of a mean is 1
    return 0
