"""The two sweeps of the fused implementation over the logits: one for the sums, one for the gradient.

On the CPU both go through blocks of rows that stay in the cache while several operations work on them in place. Larger
arrays would go to memory and back at each operation, which costs more than the operations do. `torch.softmax` is among
them for its exp, which is faster than `torch.exp`; its sum is not, since it adds up thousands of terms in a row, so the
sum of its results takes its place.
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lsce_torch.inputs import compute_dtype
from lsce_torch.overwrite import forbid_use

# Elements of a block: 4 MiB in float32.
_BLOCK_SIZE = 2**20
# Bytes from which on memory comes in fresh pages.
_HUGE = 2**23


class Operands(NamedTuple):
    """What the losses of rows are made from. Gradients are taken by the logits, `at_label`, `off` and `at_max` only."""

    logits: Float[Tensor, "*batch K"]
    labels: Int[Tensor, "*batch"] | None  # None for soft labels, whose target is the weight
    counted: Bool[Tensor, "*batch"] | None
    bad: Bool[Tensor, "*batch"] | None
    class_mask: Bool[Tensor, "*#batch K"] | None
    factor: Float[Tensor, "*#batch K"] | None  # w: of the target away from the label; None for 1
    at_label: float | Float[Tensor, "*#batch"]  # weighted target at the label
    off: float | Float[Tensor, "*#batch"]  # target away from the label, but for w
    other_mass: float | Float[Tensor, "*#batch"]  # sum of w over the classes that are not the label
    at_max: float | Float[Tensor, "*#batch"] | None  # what is added at the largest logit, but for w
    z_loss: float
    softcap: float | None
    overwritten: tuple[weakref.ref[Tensor], ...] | None  # tensors whose memory the gradient takes
    with_stats: bool


class Sums(NamedTuple):
    """Sums over the classes, one number per row of each, of which everything else is made."""

    peak: Float[Tensor, "*batch"]  # the largest logit m, after the softcap
    log_sum: Float[Tensor, "*batch"]  # log of the sum of exp(z - m)
    label_gap: Float[Tensor, "*batch"]  # m - z at the label
    other_gaps: Float[Tensor, "*batch"]  # sum of w (m - z) over the classes that are not the label
    largest: Float[Tensor, "*batch"] | None  # the largest logit before the softcap, which makes large logits equal
    num_largest: Float[Tensor, "*batch"] | None  # how many logits are that large
    largest_mass: Float[Tensor, "*batch"] | None  # mean of w over them
    largest_gap: Float[Tensor, "*batch"] | None  # mean of w (m - z) over them, which is 0: for its derivative


def sweep(operands: Operands) -> tuple[Tensor, Tensor | None]:
    """Return the sums, stacked in the order of `Sums`, and the index of the first largest logit if it is asked for."""
    logits, dtype = operands.logits, compute_dtype(operands.logits)
    num_sums = 5 if operands.at_max is None else 7
    stacked = torch.empty((num_sums, *logits.shape[:-1]), dtype=dtype, device=logits.device)
    first = None
    if operands.with_stats:
        first = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    excluded = None if operands.class_mask is None else ~operands.class_mask

    def work(blocks: Iterator[tuple[Any, ...]]) -> None:
        scratch = None
        for z, *others in blocks:
            if scratch is None or scratch.shape != z.shape:
                scratch = torch.empty(z.shape, dtype=dtype, device=z.device)
            _fill_sums(z, scratch, *others, softcap=operands.softcap)

    _in_threads(work, _blocks(logits, (excluded, operands.factor), (operands.labels, first, *stacked.unbind())))
    if operands.counted is not None:
        # What rows hold that do not count must not reach anything, not even as a NaN times 0.
        stacked.masked_fill_(~operands.counted, 0)
    return stacked, first


def sweep_with_gradient(operands: Operands) -> tuple[Tensor, Tensor | None]:
    """Return what `sweep` does, and overwrite the logits by the gradient of the sum of the losses.

    Each block of rows makes both while it is in the cache. Where that takes more than one array of its size, with a
    softcap or something at the largest logit, the gradient comes from a sweep of its own.
    """
    if operands.softcap is not None or operands.at_max is not None:
        stacked, first = sweep(operands)
        upstream = torch.ones_like(stacked[0])
        if operands.counted is not None:
            upstream = upstream.masked_fill(~operands.counted, 0)
        logits_gradient(operands._replace(overwritten=()), unstacked(stacked), upstream)
        return stacked, first
    logits, dtype = operands.logits, compute_dtype(operands.logits)
    stacked = torch.empty((5, *logits.shape[:-1]), dtype=dtype, device=logits.device)
    first = None
    if operands.with_stats:
        first = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    excluded = None if operands.class_mask is None else ~operands.class_mask
    off, at_label, mass = (
        torch.as_tensor(value, dtype=dtype, device=logits.device)
        for value in (operands.off, operands.at_label, operands.at_label + operands.off * operands.other_mass)
    )

    def work(blocks: Iterator[tuple[Any, ...]]) -> None:
        scratch = None
        for z, *others in blocks:
            if z.dtype == dtype:
                scratch = z
            elif scratch is None or scratch.shape != z.shape:
                scratch = torch.empty(z.shape, dtype=dtype, device=z.device)
            _fill_both(z, scratch, *others, z_loss=operands.z_loss)

    rows = (operands.labels, operands.counted, operands.bad, off, at_label, mass, first, *stacked.unbind())
    _in_threads(work, _blocks(logits, (excluded, operands.factor), rows))
    if operands.counted is not None:
        stacked.masked_fill_(~operands.counted, 0)
    return stacked, first


def unstacked(stacked: Tensor) -> Sums:
    """Return the sums by name."""
    sums = stacked.unbind()
    return Sums(*sums, *[None] * (len(Sums._fields) - len(sums)))


def target_mass(operands: Operands, sums: Sums) -> float | Tensor:
    """Return the sum of the weighted target."""
    mass = operands.at_label + operands.off * operands.other_mass
    if operands.at_max is None or sums.largest_mass is None:
        return mass
    return mass + operands.at_max * sums.largest_mass


def _fill_sums(
    z: Float[Tensor, "*rows K"],
    work: Float[Tensor, "*rows K"],  # scratch
    excluded: Bool[Tensor, "*#rows K"] | None,
    weight: Float[Tensor, "*#rows K"] | None,
    label: Int[Tensor, "*rows"] | None,
    first: Int[Tensor, "*rows"] | None,  # written, as all of the following
    peak: Float[Tensor, "*rows"],
    log_sum: Float[Tensor, "*rows"],
    label_gap: Float[Tensor, "*rows"],
    other_gaps: Float[Tensor, "*rows"],
    largest: Float[Tensor, "*rows"],
    num_largest: Float[Tensor, "*rows"] | None = None,
    largest_mass: Float[Tensor, "*rows"] | None = None,
    *,
    softcap: float | None,
) -> None:
    """Compute the sums of one block of rows."""
    if excluded is not None or softcap is not None or z.dtype != work.dtype:
        z = work.copy_(z)
        if excluded is not None:
            work.masked_fill_(excluded, -torch.inf)
    if first is None:
        torch.amax(z, dim=-1, out=largest)
    else:
        torch.max(z, dim=-1, out=(largest, first))
    if num_largest is not None and largest_mass is not None:
        is_largest = z == largest[..., None]
        torch.sum(is_largest, dim=-1, dtype=work.dtype, out=num_largest)
        weights = is_largest.to(work.dtype) if weight is None else is_largest * weight
        torch.div(torch.sum(weights, dim=-1), num_largest, out=largest_mass)
    if softcap is None:
        peak.copy_(largest)
    else:
        _softcap_(work, softcap, excluded)
        torch.amax(work, dim=-1, out=peak)

    torch.sub(z, peak[..., None], out=work)
    if excluded is not None:
        work.masked_fill_(excluded, 0)
    if label is None:
        label_gap.zero_()
    else:
        # The label's gap is left out of the sum, not subtracted from it: it may be infinite, or most of the sum.
        index = label[..., None]
        at_label = torch.gather(work, -1, index)
        torch.neg(at_label.squeeze(-1), out=label_gap)
        work.scatter_(-1, index, 0)
    weighted = work if weight is None else torch.mul(work, weight).masked_fill_(weight == 0, 0)
    torch.sum(weighted, dim=-1, out=other_gaps).neg_()
    if label is not None:
        work.scatter_(-1, index, at_label)
    if excluded is not None:
        work.masked_fill_(excluded, -torch.inf)

    top = _exp_(work)
    total = torch.sum(work, dim=-1).div_(top)
    rest, small = total - 1, total < 2
    # Without its largest term, where that is most of the sum, small losses stay accurate. Of terms between 0 and 1,
    # frac sets those to 0 that are 1.
    if work.device.type != "cpu" or _any(small):
        work.div_(top[..., None]).frac_()
        rest = torch.where(small, torch.sum(work, dim=-1), rest)
    torch.log1p(rest, out=log_sum)


def _fill_both(
    z: Float[Tensor, "*rows K"],  # the logits, and then their gradient
    work: Float[Tensor, "*rows K"],  # z itself, or scratch
    excluded: Bool[Tensor, "*#rows K"] | None,
    weight: Float[Tensor, "*#rows K"] | None,
    label: Int[Tensor, "*rows"],
    counted: Bool[Tensor, "*rows"] | None,
    bad: Bool[Tensor, "*rows"] | None,
    off: Float[Tensor, "*rows"],
    at_label: Float[Tensor, "*rows"],
    mass: Float[Tensor, "*rows"],  # of the target
    first: Int[Tensor, "*rows"] | None,  # written, as all of the following
    peak: Float[Tensor, "*rows"],
    log_sum: Float[Tensor, "*rows"],
    label_gap: Float[Tensor, "*rows"],
    other_gaps: Float[Tensor, "*rows"],
    largest: Float[Tensor, "*rows"],
    *,
    z_loss: float,
) -> None:
    """Compute sums and gradient of one block of rows."""
    if work is not z:
        work.copy_(z)
    if excluded is not None:
        work.masked_fill_(excluded, -torch.inf)
    if first is None:
        torch.amax(work, dim=-1, out=largest)
    else:
        torch.max(work, dim=-1, out=(largest, first))
    peak.copy_(largest)
    work.sub_(peak[..., None])
    if excluded is not None:
        work.masked_fill_(excluded, 0)
    # As in `_fill_sums`: the label's gap is left out of the sum, not subtracted from it.
    index = label[..., None]
    of_label = torch.gather(work, -1, index)
    torch.neg(of_label.squeeze(-1), out=label_gap)
    work.scatter_(-1, index, 0)
    weighted = work if weight is None else torch.mul(work, weight).masked_fill_(weight == 0, 0)
    torch.sum(weighted, dim=-1, out=other_gaps).neg_()
    work.scatter_(-1, index, of_label)
    if excluded is not None:
        work.masked_fill_(excluded, -torch.inf)

    torch.exp_(work)
    total = torch.sum(work, dim=-1)
    rest, small = total - 1, total < 2
    if work.device.type != "cpu" or _any(small):
        # Without its largest term, where that is most of the sum, small losses stay accurate.
        largest_index = (torch.argmax(work, dim=-1) if first is None else first)[..., None]
        work.scatter_(-1, largest_index, 0)
        rest = torch.where(small, torch.sum(work, dim=-1), rest)
        work.scatter_(-1, largest_index, 1)
    torch.log1p(rest, out=log_sum)

    of_p = mass if not z_loss else mass + 2 * z_loss * (peak + log_sum)
    if bad is not None:
        of_p = of_p.masked_fill(bad, torch.nan)
    of_label = of_p * torch.exp(-label_gap) * torch.exp(-log_sum) - at_label
    work.mul_((of_p / total)[..., None])
    if weight is None:
        work.sub_(off[..., None])
    else:
        work.addcmul_(off[..., None], weight, value=-1)
    work.scatter_(-1, index, of_label[..., None])
    if excluded is not None:
        work.masked_fill_(excluded, 0)
    if counted is not None:
        work.masked_fill_(~counted[..., None], 0)
    if work is not z:
        z.copy_(work)


def _any(rows: Bool[Tensor, "*rows"]) -> bool:
    """Whether any is True; taken to be so where values cannot be read, as of fake tensors."""
    try:
        return bool(rows.any())
    except RuntimeError:
        return True


def logits_gradient(operands: Operands, sums: Sums, upstream: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch K"]:
    """Return the gradient of the logits, in memory of its own or, if they are to be overwritten, in theirs."""
    logits, dtype = operands.logits, sums.peak.dtype
    of_p = upstream * target_mass(operands, sums)
    if operands.z_loss:
        of_p = of_p + upstream * (2 * operands.z_loss * (sums.peak + sums.log_sum))
    if operands.bad is not None:
        of_p = of_p.masked_fill(operands.bad, torch.nan)
    of_others = None if isinstance(operands.off, float) and not operands.off else upstream * operands.off
    at_label = of_max = None
    if operands.labels is not None:
        # Not exp of the sum, whose rounding a large gap makes as large as that of the gap itself.
        p_label = torch.exp(-sums.label_gap) * torch.exp(-sums.log_sum)
        at_label = of_p * p_label - upstream * operands.at_label
    if operands.at_max is not None and sums.num_largest is not None:
        of_max = upstream * operands.at_max / sums.num_largest

    gradient = _empty_like(logits) if operands.overwritten is None else logits.detach()
    excluded = None if operands.class_mask is None else ~operands.class_mask
    is_plain = dtype == logits.dtype and logits.is_contiguous() and operands.softcap is None
    wide = (gradient, excluded, operands.factor)
    rows = (operands.labels, operands.counted, of_p, of_others, at_label, of_max, sums.largest)

    def work(blocks: Iterator[tuple[Any, ...]]) -> None:
        scratch = None
        for z, result, *others in blocks:
            if is_plain and of_max is None:
                scratch = result
            elif scratch is None or scratch.shape != z.shape:
                scratch = torch.empty(z.shape, dtype=dtype, device=z.device)
            _fill_gradient(z, result, scratch, *others, softcap=operands.softcap)

    _in_threads(work, _blocks(logits, wide, rows))
    if operands.overwritten is not None:
        forbid_use(operands.overwritten)
    return gradient


def _fill_gradient(
    z: Float[Tensor, "*rows K"],
    result: Float[Tensor, "*rows K"],  # written; may be z
    work: Float[Tensor, "*rows K"],  # scratch; may be the result
    excluded: Bool[Tensor, "*#rows K"] | None,
    weight: Float[Tensor, "*#rows K"] | None,
    label: Int[Tensor, "*rows"] | None,
    counted: Bool[Tensor, "*rows"] | None,
    of_p: Float[Tensor, "*rows"],  # what p is multiplied with
    of_others: Float[Tensor, "*rows"] | None,  # what the weight is multiplied with, and subtracted
    at_label: Float[Tensor, "*rows"] | None,  # the gradient at the label
    of_max: Float[Tensor, "*rows"] | None,  # the same at the largest logits
    largest: Float[Tensor, "*rows"],
    *,
    softcap: float | None,
) -> None:
    """Compute the gradient of one block of rows."""
    if z.dtype == work.dtype and softcap is None and excluded is None:
        source = z
    else:
        source = work.copy_(z)
        if excluded is not None:
            work.masked_fill_(excluded, -torch.inf)
    is_largest = None if of_max is None else source == largest[..., None]
    slope = None
    if softcap is not None:
        _softcap_(work, softcap, excluded)
        # 1 - tanh^2
        slope = torch.div(work, softcap).square_().neg_().add_(1)
    if z.device.type == "cpu":
        torch.softmax(source, dim=-1, out=work)
    else:
        torch.sub(source, torch.amax(source, dim=-1, keepdim=True), out=work).exp_()
    work.mul_((of_p / torch.sum(work, dim=-1))[..., None])
    if of_others is not None:
        if weight is None:
            work.sub_(of_others[..., None])
        else:
            work.addcmul_(of_others[..., None], weight, value=-1)
    if label is not None and at_label is not None:
        work.scatter_(-1, label[..., None], at_label[..., None])
    if is_largest is not None and of_max is not None:
        work.sub_(torch.where(is_largest, of_max[..., None] * (1 if weight is None else weight), 0))
    if slope is not None:
        work.mul_(slope)
    if excluded is not None:
        work.masked_fill_(excluded, 0)
    if counted is not None:
        work.masked_fill_(~counted[..., None], 0)
    if work is not result:
        result.copy_(work)


def _exp_(work: Float[Tensor, "*rows K"]) -> Float[Tensor, "*rows"]:
    """Replace gaps by their exponentials times a factor for each row, and return the largest of each row."""
    if work.device.type == "cpu":
        torch.softmax(work, dim=-1, out=work)
        return torch.amax(work, dim=-1)
    torch.exp_(work)
    return torch.ones(work.shape[:-1], dtype=work.dtype, device=work.device)


def _softcap_(work: Float[Tensor, "*rows K"], softcap: float, excluded: Bool[Tensor, "*#rows K"] | None) -> None:
    work.div_(softcap).tanh_().mul_(softcap)
    if excluded is not None:
        work.masked_fill_(excluded, -torch.inf)


def _blocks(
    logits: Float[Tensor, "*batch K"], wide: tuple[Tensor | None, ...], rows: tuple[Tensor | None, ...]
) -> Iterator[tuple[Any, ...]]:
    """Yield some rows at a time of the logits, of the `wide` tensors (K in the last dimension) and of `rows` (without).

    All at once where they are small, or not on the CPU: to start an operation there costs more than to go to memory.
    """
    if logits.numel() <= _BLOCK_SIZE or logits.device.type != "cpu" or logits.ndim == 1:
        yield (logits, *wide, *rows)
        return
    batch_shape, num_classes = logits.shape[:-1], logits.shape[-1]
    wide = tuple(t if t is None or t.ndim == 1 else t.expand(logits.shape) for t in wide)
    if logits.is_contiguous():
        logits = logits.view(-1, num_classes)
        wide = tuple(t if t is None or t.ndim == 1 else t.reshape(logits.shape) for t in wide)
        rows = tuple(None if t is None else t.expand(batch_shape).reshape(-1) for t in rows)
    elif logits.ndim > 2 and logits[0].numel() > _BLOCK_SIZE:
        for i in range(logits.shape[0]):
            yield from _blocks(
                logits[i],
                tuple(t if t is None or t.ndim == 1 else t[i] for t in wide),
                tuple(None if t is None else t.expand(batch_shape)[i] for t in rows),
            )
        return
    step = max(1, _BLOCK_SIZE // logits[0].numel())
    for start in range(0, logits.shape[0], step):
        part = slice(start, start + step)
        yield (
            logits[part],
            *(t if t is None or t.ndim == 1 else t[part] for t in wide),
            *(None if t is None else t[part] for t in rows),
        )


def _in_threads(work: Callable[[Iterator[tuple[Any, ...]]], None], blocks: Iterator[tuple[Any, ...]]) -> None:
    """Call `work` with the blocks, in as many threads as torch uses, whichever is free taking the next.

    torch's own threads wait for each other at every operation, for milliseconds where other programs want the same
    cores. Threads that take whole blocks meet once; torch's operations on them release the interpreter.
    """
    parts = list(blocks)
    num_threads = min(torch.get_num_threads(), len(parts))
    if num_threads == 1:
        work(iter(parts))
        return
    queue = iter(parts)

    def work_on_queue() -> None:
        # Modes of torch belong to a thread: neither reverse nor forward mode shall see this.
        with torch.inference_mode():
            work(queue)

    pool = _thread_pool(torch.get_num_threads())
    for future in [pool.submit(work_on_queue) for _ in range(num_threads)]:
        future.result()


@cache
def _thread_pool(num_threads: int) -> ThreadPoolExecutor:
    """Return threads in which torch's operations start no threads of their own."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="lsce")
    all_started = Barrier(num_threads)

    def start() -> None:
        # Read first: the first use would set it to the number for all.
        torch.get_num_threads()
        torch.set_num_threads(1)
        all_started.wait()

    try:
        for future in [pool.submit(start) for _ in range(num_threads)]:
            future.result()
    finally:
        torch.set_num_threads(num_threads)
    return pool


# A forked process has none of its parent's threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_thread_pool.cache_clear)


def _empty_like(logits: Tensor) -> Tensor:
    return in_large_pages(torch.empty_like(logits))


def in_large_pages(fresh: Tensor) -> Tensor:
    """Return memory that has not been touched yet, in large pages where the system has them.

    A fresh tensor is not there before it is written: the system stops at each page of 4 KiB to find one and clear it,
    which for 128 MiB takes as long as the whole forward pass. Linux does so for 2 MiB at a time if asked.
    """
    if fresh.device.type == "cpu" and fresh.nbytes >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        start = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        # A hint: if it is refused, the pages are small ones.
        _libc().madvise(start, fresh.data_ptr() + fresh.nbytes - start, mmap.MADV_HUGEPAGE)
    return fresh


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc
