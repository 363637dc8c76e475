"""Start the kernels of `gpu.py`: how the logits lie in memory, how many classes a program takes, and its arguments."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lsce_torch.inputs import at_labels, compute_dtype
from lsce_torch.kernels import is_interpreted
from lsce_torch.sums import Operands, Upstreams, num_sums

# Up to this many bytes of logits a program keeps its rows, and reads them once.
_RESIDENT_BYTES = 2**14
# Up to this many classes it does so if rows do not begin at multiples of 16: masked blocks are not read in vectors.
_UNALIGNED_RESIDENT = 1024
# Rows that lie side by side, and the classes of their blocks.
_SIDE_BY_SIDE, _BLOCK_SIDE_BY_SIDE = 32, 64
# Logits of a program with several rows.
_TILE = 2048
# Threads that run together, 64 on AMD's GPUs, and logits of a thread. More of these would not stay in its registers.
_WARP, _PER_THREAD = 32, 8
# One program adds up the rows, so many at once.
_MOST_ROWS, _ROWS_AT_ONCE, _WARPS_OF_ROWS = 2**16, 2048, 8
# Rows of a program, where each has its own thread.
_ROWS_OF_STATISTICS = 128


class Layout(NamedTuple):
    """How rows of logits lie in memory.

    Args:
        num_rows: number of rows.
        num_classes: number of classes.
        inner: how many rows lie side by side, class by class; None if the classes of a row do.
        row_stride: step from a row to the next; unused for rows side by side.
    """

    num_rows: int
    num_classes: int
    inner: int | None
    row_stride: int


class Whole(NamedTuple):
    """What the kernels compute themselves if they are given a whole loss. See `gpu.forward` for each."""

    ignore_index: int | None = None
    divisor: float | Float[Tensor, ""] | None = None
    all_mass: Float[Tensor, ""] | None = None


_PART = Whole()


def layout_of(logits: Float[Tensor, "*batch K"]) -> Layout | None:
    """Return the layout, or None if the rows lie in another way than the kernels know."""
    shape, num_classes = logits.shape[:-1], logits.shape[-1]
    num_rows = math.prod(shape)
    if logits.is_contiguous():
        return Layout(num_rows, num_classes, None, num_classes)
    for place in range(logits.ndim - 2, -1, -1):
        if logits.movedim(-1, place).is_contiguous():
            return Layout(num_rows, num_classes, math.prod(shape[place:]), num_classes)
    if logits.stride(-1) != 1:
        return None
    try:
        row_stride = logits.view(num_rows, num_classes).stride(0)
    except RuntimeError:  # the rows are not one step apart
        return None
    return Layout(num_rows, num_classes, None, row_stride) if row_stride >= num_classes else None


class _Plan(NamedTuple):
    """How the work is divided; see `gpu.forward`."""

    rows: int
    block: int
    align: int
    num_warps: int


@lru_cache(maxsize=1024)
def _make_plan(layout: Layout, itemsize: int) -> _Plan:
    num_classes, inner = layout.num_classes, layout.inner
    is_aligned = layout.row_stride % 16 == 0
    whole = max(16, 1 << (num_classes - 1).bit_length())
    if inner is not None:
        rows, block = (
            (_TILE // whole, whole) if num_classes <= _BLOCK_SIDE_BY_SIDE else (_SIDE_BY_SIDE, _BLOCK_SIDE_BY_SIDE)
        )
        return _Plan(rows, block, 0 if block == whole else 1, rows * block // (_WARP * _PER_THREAD))
    if num_classes <= _UNALIGNED_RESIDENT or (is_aligned and whole * itemsize <= _RESIDENT_BYTES):
        rows = max(1, _TILE // whole)
        return _Plan(rows, whole, 0, min(16, max(4, rows * whole // (_WARP * _PER_THREAD))))
    # More threads for a row, and its gradient comes from the cache; but unaligned rows and float64 take more registers.
    num_warps = 8 if is_aligned and itemsize < 8 else 4
    block = num_warps * _WARP * (_PER_THREAD if itemsize < 8 else _PER_THREAD // 2)
    return _Plan(1, block, 1 if is_aligned else 16, num_warps)


def sums(
    logits: Float[Tensor, "*batch K"], operands: Operands, *, with_gradient: bool = False
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "sums ..."], Int[Tensor, "*batch"] | None]:
    """Return the losses, the `Sums`, stacked, and for statistics the index of the first largest logit.

    Args:
        logits: of the rows.
        operands: of the rows.
        with_gradient: whether to overwrite the logits by the gradient of the sum of the losses.
    """
    shape, dtype, device = logits.shape[:-1], compute_dtype(logits), logits.device
    losses = torch.empty(shape, dtype=dtype, device=device)
    stacked = torch.empty((num_sums(operands), *shape), dtype=dtype, device=device)
    first = torch.empty(shape, dtype=torch.int64, device=device) if operands.with_stats else None
    if not _needs_gaps_apart(operands):
        stacked[3:] = 0  # nothing uses them
    sums_into(losses, stacked, first, logits, operands, with_gradient=with_gradient)
    return losses, stacked, first


def sums_into(
    losses: Float[Tensor, "*batch"],
    stacked: Float[Tensor, "sums ..."],
    first: Int[Tensor, "*batch"] | None,
    logits: Float[Tensor, "*batch K"],
    operands: Operands,
    *,
    with_gradient: bool,
) -> None:
    """Write what `sums` returns to given memory, in which the rows of each are contiguous."""
    with _in_known_layout(logits, written=logits if with_gradient else None) as (laid, _):
        gradient = laid if with_gradient else None
        forward(laid, operands, losses, stacked, first, gradient, apart=_needs_gaps_apart(operands))


def _needs_gaps_apart(operands: Operands) -> bool:
    """Return whether the label's gap must not be among the others: these are asked for, or have another sign."""
    targets = operands.on, operands.off, operands.other_mass
    if operands.with_stats or operands.factor is not None or operands.at_max is not None or operands.labels is None:
        return True
    return any(isinstance(value, Tensor) for value in targets) or not may_join(operands.on, operands.off)


def may_join(on: Any, off: Any) -> bool:
    """Return whether on (m - z_y) + off sum_{k != y} (m - z_k) keeps its accuracy with the label in the sum as well."""
    return bool(on >= off >= 0)


def logits_gradient(
    logits: Float[Tensor, "*batch K"],
    operands: Operands,
    stacked: Float[Tensor, "sums ..."],
    upstreams: Upstreams,
    gradient: Float[Tensor, "*batch K"],
) -> None:
    """Write the gradient with respect to the logits; see `sweeps.logits_gradient`."""
    with _in_known_layout(logits, written=gradient) as (laid, written):
        backward(laid, operands, stacked, upstreams, written)


@contextmanager
def _in_known_layout(logits: Tensor, written: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Give the logits, and what is to be written, in one layout that the kernels know."""
    if layout_of(logits) is not None and (written is None or written.stride() == logits.stride()):
        yield logits, logits if written is None else written
        return
    laid = logits.contiguous()
    scratch = laid if written is None or written is logits else torch.empty_like(laid)
    yield laid, scratch
    if written is not None:
        written.copy_(scratch)


def forward(
    logits: Float[Tensor, "*batch K"],
    operands: Operands,
    losses: Float[Tensor, "*batch"],
    stacked: Float[Tensor, "sums ..."],
    first: Int[Tensor, "*batch"] | None,
    gradient: Float[Tensor, "*batch K"] | None,
    *,
    whole: Whole = _PART,
    apart: bool = True,
) -> None:
    """Write the losses and the sums. See `gpu.forward` for the arguments; `stacked` are the sums."""
    layout = _known_layout(logits)
    if not layout.num_rows:
        return
    plan = _make_plan(layout, logits.element_size())
    _start(
        "forward",
        logits,
        _num_programs(layout, plan),
        plan,
        **_arguments(logits, operands, layout, whole.ignore_index),
        losses=losses,
        sums=stacked,
        sums_step=stacked.stride(0),
        first=first,
        gradient=gradient,
        divisor=_constant(whole.divisor, logits),
        all_mass=whole.all_mass,
        APART=apart,
        PTX=not is_interpreted() and torch.version.hip is None,
    )


def backward(
    logits: Float[Tensor, "*batch K"],
    operands: Operands,
    stacked: Float[Tensor, "sums ..."],
    upstreams: Upstreams,
    gradient: Float[Tensor, "*batch K"],
    *,
    whole: Whole = _PART,
    is_written: bool = False,
) -> None:
    """Write the gradient, which may be over the logits. See `gpu.backward` for the arguments."""
    layout = _known_layout(logits)
    if not layout.num_rows:
        return
    if not stacked[0].is_contiguous():
        stacked = stacked.contiguous()
    plan = _make_plan(layout, logits.element_size())
    num_blocks = -(-(layout.num_classes + max(plan.align - 1, 0)) // plan.block)
    # Many programs that have nothing to do would take time to start.
    programs_of_row = 1 if is_written else num_blocks
    upstream, *others = upstreams
    by_row = upstream is not None and any(upstream.stride())  # not if it is one number for all, expanded
    if upstream is not None:
        upstream = upstream.expand(logits.shape[:-1]).contiguous() if by_row else upstream.detach()
    of_nll, of_lse, of_entropy = (_of_rows(of_rows, logits.shape[:-1], logits) for of_rows in others)
    _start(
        "backward",
        logits,
        _num_programs(layout, plan) * programs_of_row,
        plan,
        **_arguments(logits, operands, layout, whole.ignore_index),
        sums=stacked,
        sums_step=stacked.stride(0),
        upstream=upstream,
        of_nll=of_nll,
        of_lse=of_lse,
        of_entropy=of_entropy,
        divisor=_constant(whole.divisor, logits),
        all_mass=whole.all_mass,
        gradient=gradient,
        num_blocks=num_blocks,
        programs_of_row=programs_of_row,
        BY_ROW=by_row,
        IS_WRITTEN=is_written,
    )


def statistics(
    logits: Float[Tensor, "*batch K"],
    operands: Operands,
    stacked: Float[Tensor, "sums ..."],
    first: Int[Tensor, "*batch"],
    whole: Whole,
) -> tuple[Float[Tensor, "numbers ..."], Bool[Tensor, "flags ..."]]:
    """Return the numbers and flags of the `LossStats`, from the sums of `forward`, and make `first` the prediction."""
    shape, device = logits.shape[:-1], logits.device
    numbers = torch.empty((6, *shape), dtype=stacked.dtype, device=device)
    flags = torch.empty((2, *shape), dtype=torch.bool, device=device)
    given = _arguments(logits, operands, _known_layout(logits), whole.ignore_index)
    names = ("labels", "counted", "on", "off", "other_mass", "factor", "z_loss", "num_rows", "num_classes")
    _run(
        _kernels().statistics,
        -(-given["num_rows"] // _ROWS_OF_STATISTICS),
        logits,
        **{name: given[name] for name in names},
        all_mass=whole.all_mass,
        sums=stacked,
        first=first,
        divisor=_constant(whole.divisor, logits),
        numbers=numbers,
        flags=flags,
        sums_step=stacked.stride(0),
        ignore_index=whole.ignore_index,
        DTYPE=_dtype_of(logits),
        BLOCK=_ROWS_OF_STATISTICS,
        num_warps=_ROWS_OF_STATISTICS // _WARP,
        enable_fp_fusion=True,
    )
    return numbers, flags


def _known_layout(logits: Tensor) -> Layout:
    layout = layout_of(logits)
    assert layout is not None
    return layout


def _num_programs(layout: Layout, plan: _Plan) -> int:
    if layout.inner is None:
        return -(-layout.num_rows // plan.rows)
    return layout.num_rows // layout.inner * -(-layout.inner // plan.rows)


def _arguments(logits: Tensor, operands: Operands, layout: Layout, ignore_index: int | None) -> dict[str, Any]:
    """Return what both kernels take of the operands."""
    shape = logits.shape[:-1]
    is_nothing = isinstance(operands.off, float) and not operands.off
    class_mask, mask_stride = _over_classes(operands.class_mask, logits)
    factor, factor_stride = _over_classes(operands.factor, logits)
    rows = {name: getattr(operands, name) for name in ("labels", "counted", "bad", "on", "off", "other_mass", "at_max")}
    if is_nothing:
        rows |= {"off": None, "other_mass": None}
    return {
        **{name: _of_rows(value, shape, logits) for name, value in rows.items()},
        "logits": logits,
        "class_mask": class_mask,
        "factor": factor,
        "z_loss": _constant(operands.z_loss or None, logits),
        "softcap": _constant(operands.softcap, logits),
        "num_rows": layout.num_rows,
        "num_classes": layout.num_classes,
        "inner": layout.inner,
        "row_stride": layout.row_stride,
        "mask_stride": mask_stride,
        "factor_stride": factor_stride,
        "ignore_index": ignore_index,
    }


def _of_rows(value: Any, shape: tuple[int, ...], logits: Tensor) -> Any:
    """Return a tensor with one value for each row, contiguous; a number as it is, which a kernel takes as float32."""
    if isinstance(value, Tensor):
        return value.detach().expand(shape).contiguous()
    if value is None or logits.dtype != torch.float64:
        return value
    return torch.full(shape, value, dtype=torch.float64, device=logits.device)


def _over_classes(vector: Tensor | None, logits: Tensor) -> tuple[Tensor | None, int]:
    """Return a vector over the classes, or one for each row, contiguous, and the step to the next row's."""
    if vector is None:
        return None, 0
    vector = vector.detach()
    if vector.numel() == logits.shape[-1]:
        return vector.reshape(-1).contiguous(), 0
    return vector.expand(logits.shape).contiguous(), logits.shape[-1]


def _constant(value: float | Tensor | None, logits: Tensor) -> float | Tensor | None:
    """Return a number of all rows, for float64 in memory."""
    if value is None or isinstance(value, Tensor) or logits.dtype != torch.float64:
        return value
    return torch.full((), value, dtype=torch.float64, device=logits.device)


def total(losses: Float[Tensor, "*batch"], divisor: float | Float[Tensor, ""] | None) -> Float[Tensor, ""]:
    """Return the sum of the losses by the divisor, 0 if that is 0."""
    if losses.numel() > _MOST_ROWS:
        whole = losses.sum()
        if divisor is None:
            return whole
        return torch.where(divisor == 0, 0, whole / divisor) if isinstance(divisor, Tensor) else whole / divisor
    result = losses.new_empty(())
    divisor = _constant(divisor, losses)
    _start_one("total", losses, losses=losses, divisor=divisor, result=result, num_rows=losses.numel())
    return result


def denominator(
    labels: Int[Tensor, "*batch"],
    where: Tensor | None,
    ignore_index: int | None,
    class_weight: Float[Tensor, " K"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, ""]:
    """Return the number of rows that count, or the sum of the weights of their labels. A bad label weighs 1."""
    num_classes = 0 if class_weight is None else class_weight.numel()
    if labels.numel() > _MOST_ROWS:
        counts = torch.ones_like(labels, dtype=torch.bool) if where is None else where.expand(labels.shape)
        if ignore_index is not None:
            counts = counts & torch.ne(labels, ignore_index)
        if class_weight is None:
            return counts.sum().to(dtype)
        classes = labels.to(torch.int64)
        is_class = (classes >= 0) & (classes < num_classes)
        weights = at_labels(class_weight, classes.masked_fill(~is_class, 0)).masked_fill(~is_class, 1)
        return weights.masked_fill(~counts, 0).sum()
    result = torch.empty((), dtype=dtype, device=labels.device)
    _start_one(
        "denominator",
        labels,
        labels=labels.contiguous(),
        counted=None if where is None else where.expand(labels.shape).contiguous(),
        weights=None if class_weight is None else class_weight.detach().contiguous(),
        result=result,
        num_rows=labels.numel(),
        num_classes=num_classes,
        ignore_index=ignore_index,
    )
    return result


# --- Triton -----------------------------------------------------------------------------------------------------------


@cache
def _kernels() -> Any:
    """Return the module with the kernels, which loads Triton."""
    from lsce_torch.kernels import gpu  # noqa: PLC0415

    return gpu


def _dtype_of(logits: Tensor) -> Any:
    """Return Triton's name of the dtype to compute in."""
    return _kernels().FLOAT64 if logits.dtype == torch.float64 else _kernels().FLOAT32


def _start(name: str, logits: Tensor, num_programs: int, plan: _Plan, /, **arguments: Any) -> None:
    _run(
        getattr(_kernels(), name),
        num_programs,
        logits,
        **arguments,
        DTYPE=_dtype_of(logits),
        NUM_ROWS=plan.rows,
        BLOCK=plan.block,
        ALIGN=plan.align,
        num_warps=plan.num_warps,
        enable_fp_fusion=True,
    )


def _start_one(name: str, tensor: Tensor, /, **arguments: Any) -> None:
    _run(
        getattr(_kernels(), name),
        1,
        tensor,
        **arguments,
        BLOCK=_ROWS_AT_ONCE,
        num_warps=_WARPS_OF_ROWS,
        enable_fp_fusion=True,
    )


def _run(kernel: Any, num_programs: int, tensor: Tensor, /, **arguments: Any) -> None:
    """Start a kernel on the device of a tensor, in its current stream."""
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            kernel[(num_programs,)](**arguments)
        return
    with warnings.catch_warnings():
        # The interpreter's arithmetic is NumPy's, which warns of each NaN, and of how older versions call it.
        warnings.simplefilter("ignore")
        kernel[(num_programs,)](**arguments)
