"""What eager torch would start on a GPU for loss and gradient, counted on a CPU: kernels, and how often logits move.

`lsce_torch` is told that its tensors are on a GPU. Of its own kernels each is counted as it would be started, and not
run; torch's operations are seen as they run on the CPU. Only accesses to whole logits count as moved. A row that is
read again by the same kernel counts again, although it is mostly still in the cache.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.timing import Shape
from lsce_torch import label_smoothed_cross_entropy, label_smoothed_cross_entropy_with_stats
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
SHAPES = (Shape(64, 32768), Shape(64, 1000))


class Count(NamedTuple):
    """What one loss with its gradient starts.

    Args:
        name: of the loss.
        shape: of the logits; the number of rows changes nothing.
        dtype: of the logits.
        launches: how many kernels.
        moved: bytes of accesses to whole logits, or to what is as large, as a multiple of the logits' bytes.
    """

    name: str
    shape: Shape
    dtype: str
    launches: int
    moved: float


LOSSES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "F.cross_entropy, smoothed": partial(F.cross_entropy, label_smoothing=0.1),
    "lsce triton": partial(label_smoothed_cross_entropy, smoothing=0.1),
    "lsce triton, ignored rows": partial(label_smoothed_cross_entropy, smoothing=0.1, ignore_index=-100),
    "lsce triton, softcap": partial(label_smoothed_cross_entropy, smoothing=0.1, softcap=30.0),
    "lsce triton, statistics": partial(label_smoothed_cross_entropy_with_stats, smoothing=0.1),
    "lsce fused": partial(label_smoothed_cross_entropy, smoothing=0.1, implementation="fused"),
}


class _Counted(TorchDispatchMode):
    """Counts the kernels that torch would start, and the bytes of whole logits that they would move."""

    def __init__(self, size: int) -> None:
        super().__init__()
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


def measure() -> list[Count]:
    """Count each loss."""
    return [count(name, shape, dtype) for shape in SHAPES for dtype in ("bfloat16", "float32") for name in LOSSES]


def count(name: str, shape: Shape, dtype: str) -> Count:
    """Count what one of `LOSSES` starts."""
    logits = torch.zeros(shape.sizes, dtype=getattr(torch, dtype), requires_grad=True)
    labels = torch.zeros(shape.rows, dtype=torch.int64)
    counted = _Counted(logits.numel())
    with on_pretended_gpu() as launches, counted:
        output = LOSSES[name](logits, labels)
        loss = output[0] if isinstance(output, tuple) else output
        torch.autograd.grad(loss, logits)
    of_logits = logits.numel() * logits.element_size()
    moved = counted.bytes / of_logits + sum(map(_moved, launches))
    return Count(name, shape, dtype, counted.launches + len(launches), moved)


def _moved(launch: Launch) -> int:
    """Return how often a kernel of ours reads or writes whole logits."""
    given = launch.arguments
    if launch.name == "forward":
        is_kept = given["ALIGN"] == 0
        return 1 if given["gradient"] is None else 2 if is_kept else 3
    if launch.name == "backward":
        return 0 if given["IS_WRITTEN"] else 2  # the upstream gradient of a mean is 1
    return 0
