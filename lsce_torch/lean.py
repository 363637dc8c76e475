"""Plain smoothing on the CPU, from log-probabilities: as few operations as the loss needs.

Without options that add a term, the loss is

    loss = (on - off) (-log p_y) + off sum_k (-log p_k)

whose terms have one sign, so that nothing cancels. `log_softmax` has an absolute error of about the unit roundoff,
which is too much for losses far below 1. So this way is taken only where the losses are larger: because the entropy of
the target, the least that a loss can be, is larger, or because the computed losses are.

The fewest logits take torch's own operations, whose derivatives run in C++: starting operations is all the time they
take. Otherwise the gradient of a sum or mean is computed with the loss, from the same softmax, and kept until
`backward`, unless it is large or narrow: then `backward` computes the softmax again, and nothing as large as the logits
is kept. Many logits take blocks of rows. In a block of few classes, or of images, the rows lie side by side and not the
classes, so that the processor takes many rows at a time.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from lsce_spec import GAP_UNIT, Convention, LossOptions, smoothing_weights
from lsce_torch.device import is_on_cpu
from lsce_torch.errors import error
from lsce_torch.inputs import Batch
from lsce_torch.memory import in_large_pages
from lsce_torch.overwrite import forbid_use, has_memory
from lsce_torch.sums import in_gap_units
from lsce_torch.threads import in_threads

# Why a loss is computed in another way after all.
UNFIT = "a loss is too close to 0 or infinite, the target or the denominator is unusual, or rows lie apart in memory"
# Tests compute plain smoothing by the sweeps as well.
_ENABLED = True
# Up to this many logits, starting operations takes most of the time; those of torch's own derivatives start in C++.
_FEWEST = 2**14
# Up to this many, it takes much of the time.
_FEW = 2**18
# Up to this many classes the sums of `softmax` and `log_softmax`, which are sequential, are accurate enough.
_SEQUENTIAL = 2**11
# With fewer classes than this, the rows of a block lie side by side.
_FEW_CLASSES = 32
# Fewer logits of rows that lie side by side are no block of their own.
_SMALLEST_GROUP = 2**14
# Logits of a block: 4 MiB in float32. Smaller ones stay in a nearer cache, but there threads wait for the interpreter.
_BLOCK_SIZE = 2**20
# Up to this many logits the gradient is computed with the loss, and kept until `backward`.
_LARGEST_KEPT = 2**28
# Smallest ratio of a difference to the numbers whose difference it is.
_MOST_CANCELLED = 1 / 8
# Up to here exp(-loss) is a normal number.
_LARGEST_LOSS = 80.0
# Losses at least this large are accurate enough.
_ACCURATE = 0.25


class _Plan(NamedTuple):
    """What is the same for all rows."""

    on: float
    off: float
    mass: float  # sum of the target
    scale: float | None  # factor of the sum of the losses, or None for the losses
    least: float  # the least loss that is accurate; 0 if any that this target can have is
    dtype: torch.dtype  # of the computation


def loss(batch: Batch, options: LossOptions, divisor: float | Tensor) -> Float[Tensor, "..."] | None:
    """Return the loss, reduced as asked, of a call that nothing speaks against; or None, for the reason in `UNFIT`."""
    if isinstance(divisor, Tensor):
        divisor = 0.0 if divisor.requires_grad or not has_memory(divisor) else divisor.item()
    logits, num_classes = batch.logits, batch.logits.shape[-1]
    plan = _make_plan(options.convention, options.smoothing, options.reduction, num_classes, batch.dtype, divisor)
    if plan is None:
        return None
    if batch.counted is not None and bool(batch.counted.all()):
        batch = replace(batch, counted=None)
    size = logits.numel()
    few = size <= _FEW and num_classes <= _SEQUENTIAL and batch.overwritten is None
    # A row that does not count may hold anything, of which torch's own derivatives make NaN.
    if few and size <= _FEWEST and batch.counted is None:
        result, _ = _of_few(logits, batch.labels, None, plan)
        return result
    differentiated = logits.requires_grad and torch.is_grad_enabled()
    # In blocks a narrow gradient would be rounded before it is scaled, and a large one would take memory early.
    pays = few or (logits.dtype == batch.dtype and size <= _LARGEST_KEPT)
    with_gradient = differentiated and pays and plan.scale is not None and batch.overwritten is None
    compute = _of_few if few and (with_gradient or not differentiated) else _of_many
    result, gradient = compute(logits.detach(), batch.labels, batch.counted, plan, with_gradient=with_gradient)
    if result is None or not differentiated:
        return result
    loss: Tensor = _PlainLoss.apply(logits, result, gradient, batch, plan, compute)  # type: ignore[no-untyped-call]
    return loss


@lru_cache(256)
def _make_plan(
    convention: Convention,
    smoothing: float,
    reduction: str,
    num_classes: int,
    dtype: torch.dtype,
    divisor: float,
) -> _Plan | None:
    """Return what is the same for all rows, or None if the target or the divisor is unusual."""
    on, off = smoothing_weights(convention, smoothing, num_classes)
    # A factor of 0 makes NaN of an infinite -log p, as one does that is rounded to 0.
    smallest = torch.finfo(dtype).tiny
    if not divisor or not on - off >= smallest or not (off == 0 or off >= smallest):
        return None
    mass = on + off * (num_classes - 1)
    entropy = -sum(number * value * math.log(value) for value, number in ((on, 1), (off, num_classes - 1)) if value > 0)
    least = _ACCURATE * mass
    return _Plan(on, off, mass, None if reduction == "none" else 1 / divisor, 0.0 if entropy >= least else least, dtype)


def why_not(batch: Batch, options: LossOptions) -> str | None:  # noqa: PLR0911 - a reason for each
    """Return why this is not the way to compute a call, whatever the values of the logits; or None.

    It takes plain logits on the CPU, good labels, and no option that has a part of its own in the loss.
    """
    logits = batch.logits
    if options.implementation not in {None, "fused"}:
        return "another implementation was asked for"
    if not _ENABLED or not is_on_cpu(logits) or not logits.numel():
        return "there are no logits on the CPU"
    if options.z_loss or options.softcap is not None or options.subtract_entropy or options.convention.at_max:
        return "it has no z-loss, softcap, max_sup or subtracted entropy"
    if batch.soft or not isinstance(batch.smoothing, float):
        return "it takes labels as classes, and the smoothing as a number"
    if batch.prior is not None or batch.class_weight is not None or batch.class_mask is not None:
        return "it has no prior, class weights or class mask"
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return "a transform of torch.func or torch.compile is at work"
    if batch.bad is not None:
        return "some label is no class"
    return None if has_memory(logits) else "the logits hold no values"


def _are_accurate(losses: Tensor, counted: Tensor | None, plan: _Plan, factor: float = 1.0) -> bool:
    """Whether all losses that count, times a factor, are large enough; not if one is NaN."""
    if not plan.least:
        return True
    if counted is not None:
        losses = losses.masked_fill(~counted, torch.inf)
    return bool(torch.amin(losses.detach()).item() >= plan.least * factor)


def _are_infinite(losses: Tensor) -> bool:
    """Whether one is infinite, as it is if the sum of its -log p is: multiplied by `off` first, it may be finite."""
    return bool(torch.amax(losses.detach()).item() == math.inf)


def _of_few(
    logits: Float[Tensor, "*batch K"],
    labels: Int[Tensor, "*batch"],
    counted: Bool[Tensor, "*batch"] | None,
    plan: _Plan,
    *,
    with_gradient: bool = False,
) -> tuple[Float[Tensor, "..."] | None, Float[Tensor, "*batch K"] | None]:
    """Return the loss, reduced as asked, by torch's own operations, or None if it is not accurate; and its gradient.

    The gradient is in the dtype of the computation.
    """
    log_p = torch.log_softmax(logits, dim=-1, dtype=plan.dtype)
    scale = 1 if plan.scale is None else plan.scale
    by_row = counted is not None or plan.scale is None
    # As a weight of the classes the factor takes no operation of its own.
    factor = log_p.new_full(log_p.shape[-1:], (plan.on - plan.off) * scale)
    reduction = "none" if by_row or plan.least else "sum"
    if log_p.ndim == 2:
        losses = F.nll_loss(log_p, labels, factor, reduction=reduction)
    else:
        losses = F.nll_loss(log_p.reshape(-1, log_p.shape[-1]), labels.reshape(-1), factor, reduction=reduction)
        losses = losses.view(labels.shape) if by_row else losses
    if not _are_accurate(losses, counted, plan, scale):
        return None, None
    if not by_row and plan.least:
        losses = losses.sum()
    if plan.off:
        losses.sub_(log_p.sum(dim=-1) if by_row else log_p.sum(), alpha=plan.off * scale)
    if counted is not None:
        losses.masked_fill_(~counted, 0)
    if _are_infinite(losses):
        return None, None
    gradient = None
    if with_gradient:
        gradient = log_p.exp_()
        _make_gradient(gradient, None, labels, counted, -1, scale, plan)
    return losses.sum() if by_row and plan.scale is not None else losses, gradient


def _of_many(
    logits: Float[Tensor, "*batch K"],
    labels: Int[Tensor, "*batch"],
    counted: Bool[Tensor, "*batch"] | None,
    plan: _Plan,
    *,
    with_gradient: bool,
) -> tuple[Float[Tensor, "..."] | None, Float[Tensor, "*batch K"] | None]:
    """Return the same from blocks of rows, None also if the rows do not lie in blocks."""
    layout = _layout(logits)
    if layout is None:
        return None, None
    rows = torch.empty(labels.shape, dtype=plan.dtype)
    gradient = in_large_pages(torch.empty_like(logits)) if with_gradient else None
    with torch.no_grad():
        whole = _Block(logits, labels, counted, rows, gradient)
        in_threads(partial(_fill_both if with_gradient else _fill_rows, plan), _blocks(layout, whole))
    if not _are_accurate(rows, counted, plan):
        return None, None
    if counted is not None:
        rows.masked_fill_(~counted, 0)
    if _are_infinite(rows):
        return None, None
    return rows if plan.scale is None else rows.sum().mul_(plan.scale), gradient


class _PlainLoss(torch.autograd.Function):
    """The loss, which is computed already, with its gradient.

    No transform of torch.func comes here, so `forward` takes the context: torch takes less time to call it.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, loss: Tensor, gradient: Tensor | None, batch: Batch, plan: _Plan, compute: Any
    ) -> Tensor:
        """Return the loss, and keep what `backward` needs."""
        ctx.plan, ctx.overwritten, ctx.gradient = plan, batch.overwritten, gradient
        ctx.compute_again = None if gradient is None else compute
        ctx.save_for_backward(logits, batch.labels, batch.counted)
        ctx.set_materialize_grads(False)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradient with respect to the logits."""
        return (None if upstream is None else _backward(ctx, upstream), *(None,) * 5)


def _backward(ctx: Any, upstream: Float[Tensor, "*#batch"]) -> Float[Tensor, "*batch K"]:
    logits, labels, counted = ctx.saved_tensors
    if torch.is_grad_enabled() or not has_memory(upstream, logits):
        if ctx.overwritten is not None:
            raise error("inplace_transformed")
        return _differentiable_gradient(logits, labels, counted, upstream, ctx.plan)
    if ctx.compute_again is not None:
        # Taken out, so that nothing else holds it. A second `backward` computes it again.
        gradient: Tensor | None
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            _, gradient = ctx.compute_again(logits, labels, counted, ctx.plan, with_gradient=True)
        assert gradient is not None
        factor = upstream.item()
        gradient = gradient if factor == 1 else gradient.mul_(factor)
        return gradient if gradient.dtype == logits.dtype else gradient.to(logits.dtype)
    target = in_large_pages(torch.empty_like(logits)) if ctx.overwritten is None else logits.detach()
    _write_gradient(target, logits, labels, counted, upstream, ctx.plan)
    forbid_use(ctx.overwritten or ())
    return target


def _differentiable_gradient(
    logits: Float[Tensor, "*batch K"],
    labels: Int[Tensor, "*batch"],
    counted: Bool[Tensor, "*batch"] | None,
    upstream: Float[Tensor, "*#batch"],
    plan: _Plan,
) -> Float[Tensor, "*batch K"]:
    if counted is not None:
        logits = torch.where(counted[..., None], logits, 0)
    p = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    is_label = torch.arange(p.shape[-1], device=p.device) == labels[..., None]
    slopes = plan.mass * p - plan.off - (plan.on - plan.off) * is_label.to(p.dtype)
    slopes = upstream[..., None] * (slopes if plan.scale is None else slopes * plan.scale)
    if counted is not None:
        slopes = torch.where(counted[..., None], slopes, 0)
    return slopes.to(logits.dtype)


# --- Blocks ---------------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """The logits as they lie in memory: `before` groups of K classes of `after` rows that lie side by side."""

    before: int
    num_classes: int
    after: int
    place: int  # the dimension of the classes

    def view(self, tensor: Float[Tensor, "*batch K"]) -> Float[Tensor, "before K after"]:
        """Return a tensor of this layout in three dimensions."""
        return tensor.movedim(-1, self.place).view(self.before, self.num_classes, self.after)


def _layout(logits: Float[Tensor, "*batch K"]) -> _Layout | None:
    """Return the layout, or None if no order of the dimensions is that of the memory, or rows lie in small groups."""
    shape, num_classes = logits.shape[:-1], logits.shape[-1]
    if logits.is_contiguous():
        return _Layout(math.prod(shape), num_classes, 1, logits.ndim - 1)
    for place in range(logits.ndim - 2, -1, -1):
        if logits.movedim(-1, place).is_contiguous():
            layout = _Layout(math.prod(shape[:place]), num_classes, math.prod(shape[place:]), place)
            return layout if layout.before == 1 or layout.after * num_classes >= _SMALLEST_GROUP else None
    return None


class _Block(NamedTuple):
    """Some rows."""

    logits: Float[Tensor, "n K"] | Float[Tensor, "K n"]
    labels: Int[Tensor, " n"]
    counted: Bool[Tensor, " n"] | None
    rows: Float[Tensor, " n"] | None  # the losses to write, or the upstream gradient
    gradient: Float[Tensor, "n K"] | Float[Tensor, "K n"] | None
    dim: int = 1  # that of the classes


def _blocks(layout: _Layout, whole: _Block) -> Iterator[_Block]:
    """Yield the rows of all logits in blocks."""
    num_classes, size = layout.num_classes, whole.logits.numel()
    # Of many classes a row is long enough to be the unit of work; of few, the rows are put side by side.
    by_row = layout.after == 1 and num_classes >= _FEW_CLASSES
    is_whole = size <= 2 * _BLOCK_SIZE
    if by_row and is_whole and whole.logits.ndim == 2:
        yield whole
        return
    whole = _mapped(whole, layout.view, lambda t: t.reshape(layout.before, layout.after))
    if by_row:
        groups = [_mapped(whole, lambda t: t.squeeze(2), lambda t: t.squeeze(1))]
    elif layout.after == 1:
        groups = [_mapped(whole, lambda t: t.squeeze(2).t(), lambda t: t.squeeze(1))._replace(dim=0)]
    else:
        groups = [_mapped(whole, itemgetter(i), itemgetter(i))._replace(dim=0) for i in range(layout.before)]
    for group in groups:
        # An image that is not much larger is one block, which needs no copy of its rows to lie side by side.
        is_block = is_whole or group.logits.numel() <= 2 * _BLOCK_SIZE
        step = size if is_block else max(1, _BLOCK_SIZE // num_classes)
        for start in range(0, group.labels.numel(), step):
            part = slice(start, start + step)
            yield _mapped(group, itemgetter(part if by_row else (slice(None), part)), itemgetter(part))


def _mapped(block: _Block, wide: Callable[[Tensor], Tensor], narrow: Callable[[Tensor], Tensor]) -> _Block:
    """Return a block with a function applied to its tensors over the classes, and one to its tensors over the rows."""
    logits, labels, counted, rows, gradient, dim = block
    return _Block(
        wide(logits),
        narrow(labels),
        None if counted is None else narrow(counted),
        None if rows is None else narrow(rows),
        None if gradient is None else wide(gradient),
        dim,
    )


def _write_gradient(
    gradient: Float[Tensor, "*batch K"],
    logits: Float[Tensor, "*batch K"],
    labels: Int[Tensor, "*batch"],
    counted: Bool[Tensor, "*batch"] | None,
    upstream: Float[Tensor, "*#batch"],
    plan: _Plan,
) -> None:
    """Write the gradient with respect to the logits, which may be the memory to write to."""
    layout = _layout(logits)
    assert layout is not None
    rows = upstream.contiguous() if plan.scale is None else None
    factor = 1.0 if plan.scale is None else plan.scale * upstream.item()
    whole = _Block(logits.detach(), labels, counted, rows, gradient)
    in_threads(partial(_fill_gradient, plan, factor), _blocks(layout, whole))


def _fill_rows(plan: _Plan, blocks: Iterator[_Block]) -> None:
    work = None
    for block in blocks:
        dim, rows = block.dim, block.rows
        assert rows is not None
        work = _like(block, work)
        z = block.logits if dim and block.logits.dtype == work.dtype else work.copy_(block.logits)
        if z.shape[dim] > _SEQUENTIAL:
            _fill_softmax(plan, block, z, work)
            continue
        torch.log_softmax(z, dim=dim, out=work)
        at_label = work.gather(dim, block.labels.unsqueeze(dim)).squeeze(dim)
        if plan.off:
            torch.sum(work, dim=dim, out=rows)
            rows.mul_(-plan.off).add_(at_label, alpha=plan.off - plan.on)
        else:
            torch.mul(at_label, -plan.on, out=rows)


def _fill_both(plan: _Plan, blocks: Iterator[_Block]) -> None:
    """Write the losses and the gradient of their scaled sum."""
    work = None
    for block in blocks:
        assert block.gradient is not None
        assert plan.scale is not None
        work = block.gradient if block.gradient.is_contiguous() else _like(block, work)
        z = block.logits if block.logits.is_contiguous() else work.copy_(block.logits)
        total = _fill_softmax(plan, block, z, work)
        _finish_gradient(plan, block, work, total, plan.scale)


def _fill_gradient(plan: _Plan, factor: float, blocks: Iterator[_Block]) -> None:
    """Write the gradient; `factor` is the upstream gradient of every row, if the block has none for each."""
    work = None
    for block in blocks:
        assert block.gradient is not None
        in_place = block.dim == 1 and block.logits.dtype in {torch.float32, torch.float64}
        work = block.gradient if in_place else _like(block, work)
        torch.softmax(block.logits if in_place else work.copy_(block.logits), dim=block.dim, out=work)
        upstream = factor if block.rows is None else block.rows.unsqueeze(block.dim)
        _finish_gradient(plan, block, work, _total(work, block.dim), upstream)


def _fill_softmax(plan: _Plan, block: _Block, z: Tensor, work: Tensor) -> Tensor | None:
    """Write the losses, and the softmax to `work`, which may be z; return the sums of the softmax, as `_total`."""
    dim, rows, place = block.dim, block.rows, block.labels.unsqueeze(block.dim)
    assert rows is not None
    at_label = z.gather(dim, place)
    # How far the label is above the mean of all.
    above = at_label - torch.mean(z, dim=dim, keepdim=True) if plan.off else torch.zeros_like(at_label)
    torch.softmax(z, dim=dim, out=work)
    total = _total(work, dim)
    p = work.gather(dim, place)
    label_loss = (p if total is None else p.div_(total)).log_().neg_()
    mean_loss = label_loss + above
    # Relative to the label, large numbers may cancel, and its probability may vanish.
    size = torch.maximum(at_label.abs(), label_loss) if plan.off else label_loss
    is_enough = (size * _MOST_CANCELLED <= mean_loss + 1) & (label_loss <= _LARGEST_LOSS)
    if not is_enough.all():
        # Chosen for each row, so that no row changes the result of another.
        exact = _relative_to_peak(block, work, total)
        label_loss, mean_loss = (
            torch.where(is_enough, one, other) for one, other in zip((label_loss, mean_loss), exact, strict=True)
        )
    torch.mul(label_loss.squeeze(dim), plan.on - plan.off, out=rows)
    if plan.off:
        rows.add_(mean_loss.squeeze(dim), alpha=plan.off * z.shape[dim])
    return total


def _relative_to_peak(block: _Block, softmax: Tensor, total: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return -log p at the label and its mean over the classes, from sums that do not cancel."""
    dim, z = block.dim, block.logits.to(softmax.dtype)
    peak, largest = torch.amax(z, dim=dim, keepdim=True), torch.amax(softmax, dim=dim, keepdim=True)
    log_p = (largest if total is None else largest / total).log()  # where the gap is 0
    label_gap = peak - z.gather(dim, block.labels.unsqueeze(dim))
    mean_gap = torch.mean(in_gap_units(peak - z), dim=dim, keepdim=True) * GAP_UNIT
    return label_gap - log_p, mean_gap - log_p


def _total(work: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."] | None:
    """Return the sums of a softmax, None for 1: of many classes it is off, since `softmax` adds them in sequence."""
    return torch.sum(work, dim=dim, keepdim=True) if work.shape[dim] > _SEQUENTIAL else None


def _finish_gradient(
    plan: _Plan, block: _Block, work: Tensor, total: Tensor | None, upstream: float | Float[Tensor, "..."]
) -> None:
    """Make the gradient of the softmax in `work`, and write it to the block."""
    _make_gradient(work, total, block.labels, block.counted, block.dim, upstream, plan)
    if work is not block.gradient:
        assert block.gradient is not None
        block.gradient.copy_(work)


def _make_gradient(
    p: Float[Tensor, "..."],
    total: Float[Tensor, "..."] | None,
    labels: Int[Tensor, "..."],
    counted: Bool[Tensor, "..."] | None,
    dim: int,
    upstream: float | Float[Tensor, "..."],
    plan: _Plan,
) -> None:
    """Turn a softmax, to be divided by its sums unless they are None, into the gradient with respect to the logits.

    `upstream` is that of the loss of each row, or the same for all.
    """
    constant, at_label = -upstream * plan.off, upstream * (plan.off - plan.on)
    slope = upstream * plan.mass if total is None else upstream * plan.mass / total
    if isinstance(slope, Tensor):
        p.mul_(slope)
        if plan.off:
            p.add_(constant)
    else:
        # A constant plus a multiple, in one pass.
        torch.add(torch.full((), float(constant), dtype=p.dtype), p, alpha=slope, out=p)
    place = labels.unsqueeze(dim)
    at_label = at_label if isinstance(at_label, Tensor) else torch.full((), at_label, dtype=p.dtype)
    p.scatter_add_(dim, place, at_label.expand(place.shape))
    if counted is not None:
        p.masked_fill_(~counted.unsqueeze(dim), 0)


def _like(block: _Block, work: Tensor | None) -> Tensor:
    """Return memory of the shape of the block's logits, the same as before if it fits."""
    if work is not None and work.shape == block.logits.shape:
        return work
    return torch.empty(block.logits.shape, dtype=torch.promote_types(block.logits.dtype, torch.float32))
