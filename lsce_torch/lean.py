"""Plain smoothing on the CPU, from log-probabilities: as few operations as the loss needs.

Without options that have a part of their own in the loss, it is

    loss = (on - off) (-log p_y) + off sum_k (-log p_k)

whose terms have one sign, so that nothing cancels. `log_softmax` is off by about a unit roundoff of 1, which a loss far
below 1 would feel. So either the entropy of the target, below which no loss can be, is large enough, or the losses
themselves are.

A few logits take torch's own operations, whose derivatives run in C++: starting operations is all the time they take.
More of them take blocks of rows. The gradient of a sum or mean is computed with the loss, from the same softmax, and
kept until `backward`, unless it is large or narrow: then `backward` computes the softmax again, and nothing as large as
the logits is kept. In a block of few classes, or of images, the rows lie side by side and not the classes, so that the
processor takes many rows at a time.
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

from lsce_spec import Convention, LossOptions, smoothing_weights
from lsce_torch.errors import error
from lsce_torch.inputs import Batch
from lsce_torch.memory import in_large_pages
from lsce_torch.overwrite import forbid_use, has_memory
from lsce_torch.threads import in_threads

# Tests compute plain smoothing by the sweeps as well.
_ENABLED = True
# Up to this many logits, starting operations takes much of the time.
_SMALL = 2**18
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


def loss(batch: Batch, options: LossOptions, divisor: float | Tensor) -> Float[Tensor, "..."] | None:
    """Return the loss, reduced as asked, or None if this is not the way to compute it."""
    plan = _make_plan(batch, options, divisor) if _is_plain(batch, options) else None
    if plan is None:
        return None
    if batch.counted is not None and bool(batch.counted.all()):
        batch = replace(batch, counted=None)
    unusual = batch.counted is not None or batch.overwritten is not None
    if batch.logits.numel() <= _SMALL and batch.logits.shape[-1] <= _SEQUENTIAL and not unusual:
        return _composite(batch, plan)
    if _layout(batch.logits) is None:
        return None
    # A narrow gradient would be rounded before it is scaled, and a large one would take memory early.
    pays = batch.logits.dtype == batch.dtype and plan.scale is not None and batch.logits.numel() <= _LARGEST_KEPT
    with_gradient = pays and batch.logits.requires_grad and torch.is_grad_enabled() and batch.overwritten is None
    rows, gradient = _rows_and_gradient(batch.logits, batch.labels, batch.counted, plan, with_gradient=with_gradient)
    if not _are_accurate(rows, batch.counted, plan):
        return None
    arguments = batch.logits, rows, batch.labels, batch.counted, plan, gradient, batch.overwritten
    result: Tensor = _PlainLosses.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


def _make_plan(batch: Batch, options: LossOptions, divisor: float | Tensor) -> _Plan | None:
    """Return what is the same for all rows, or None if the target or the divisor is unusual."""
    if isinstance(divisor, Tensor):
        divisor = 0.0 if divisor.requires_grad or not has_memory(divisor) else divisor.item()
    on, off, entropy = _weights(options.convention, options.smoothing, batch.logits.shape[-1])
    # A factor of 0 makes NaN of an infinite -log p, as one does that is rounded to 0.
    smallest = torch.finfo(batch.dtype).tiny
    if not divisor or not on - off >= smallest or not (off == 0 or off >= smallest):
        return None
    mass = on + off * (batch.logits.shape[-1] - 1)
    least = _ACCURATE * mass
    scale = None if options.reduction == "none" else 1 / divisor
    return _Plan(on, off, mass, scale, 0.0 if entropy >= least else least)


def _is_plain(batch: Batch, options: LossOptions) -> bool:
    """Whether the call has plain logits on the CPU, good labels, and no option with a part of its own in the loss."""
    logits = batch.logits
    if not _ENABLED or logits.device.type != "cpu" or not logits.numel():
        return False
    if options.z_loss or options.softcap is not None or options.subtract_entropy or options.convention.at_max:
        return False
    tensors = (batch.prior, batch.class_weight, batch.class_mask)
    if batch.soft or not isinstance(batch.smoothing, float) or any(tensor is not None for tensor in tensors):
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return has_memory(logits) and not _any(batch.bad)


def _any(bad: Bool[Tensor, "*batch"] | None) -> bool:
    """Whether any row is bad, or may be: fake tensors have no values."""
    try:
        return bad is not None and bool(bad.any())
    except RuntimeError:
        return True


@lru_cache(256)
def _weights(convention: Convention, smoothing: float, num_classes: int) -> tuple[float, float, float]:
    """Return `on`, `off` and the entropy of the target."""
    on, off = smoothing_weights(convention, smoothing, num_classes)
    values = ((on, 1), (off, num_classes - 1))
    return on, off, -sum(number * value * math.log(value) for value, number in values if value > 0)


def _are_accurate(losses: Tensor, counted: Tensor | None, plan: _Plan, factor: float = 1.0) -> bool:
    """Whether all losses that count, times a factor, are large enough; not if one is NaN."""
    if not plan.least:
        return True
    if counted is not None:
        losses = losses.masked_fill(~counted, torch.inf)
    return bool(torch.amin(losses.detach()).item() >= plan.least * factor)


def _composite(batch: Batch, plan: _Plan) -> Float[Tensor, "..."] | None:
    """Return the loss by torch's own operations, or None if it is not accurate."""
    logits, labels, num_classes = batch.logits, batch.labels, batch.logits.shape[-1]
    if logits.ndim != 2:
        logits, labels = logits.reshape(-1, num_classes), labels.reshape(-1)
    log_p = torch.log_softmax(logits, dim=-1, dtype=batch.dtype)
    scale = 1 if plan.scale is None else plan.scale
    # As a weight of the classes the factor takes no operation of its own, forward or backward.
    factor = log_p.new_full((num_classes,), (plan.on - plan.off) * scale)
    by_row = plan.scale is None or plan.least > 0
    losses = F.nll_loss(log_p, labels, factor, reduction="none" if by_row else "sum")
    if not _are_accurate(losses, None, plan, scale):
        return None
    if plan.scale is None:
        return (losses - plan.off * log_p.sum(dim=-1) if plan.off else losses).reshape(batch.batch_shape)
    total = losses.sum() if by_row else losses
    return total.sub(log_p.sum(), alpha=plan.off * scale) if plan.off else total


class _PlainLosses(torch.autograd.Function):
    """The losses of rows, or their sum times `scale`.

    No transform of torch.func comes here, so `forward` takes the context: torch takes less time to call it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        rows: Tensor,
        labels: Tensor,
        counted: Tensor | None,
        plan: _Plan,
        gradient: Tensor | None,
        overwritten: Any,
    ) -> Tensor:
        """Reduce the losses of the rows, which are computed already, as is the gradient of their sum, or None."""
        ctx.plan, ctx.gradient, ctx.with_loss, ctx.overwritten = plan, gradient, gradient is not None, overwritten
        ctx.save_for_backward(logits, labels, counted)
        ctx.set_materialize_grads(False)
        if counted is not None:
            rows = rows.masked_fill(~counted, 0)
        return rows.clone() if plan.scale is None else rows.sum().mul_(plan.scale)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradient with respect to the logits."""
        if upstream is None:
            return (None,) * 7
        plain = not torch.is_grad_enabled() and has_memory(upstream)
        gradient: Tensor | None
        if plain and ctx.gradient is not None:
            # Taken out, so that nothing else holds it. A second `backward` computes it again.
            gradient, ctx.gradient = ctx.gradient, None
        else:
            logits, labels, counted = ctx.saved_tensors
            if not plain or not has_memory(logits):
                if ctx.overwritten is not None:
                    raise error("inplace_transformed")
                return (_differentiable_gradient(logits, labels, counted, upstream, ctx.plan), *(None,) * 6)
            if not ctx.with_loss:
                target = in_large_pages(torch.empty_like(logits)) if ctx.overwritten is None else logits.detach()
                _write_gradient(target, logits, labels, counted, upstream, ctx.plan)
                forbid_use(ctx.overwritten or ())
                return (target, *(None,) * 6)
            _, gradient = _rows_and_gradient(logits, labels, counted, ctx.plan, with_gradient=True)
        assert gradient is not None
        factor = upstream.item()
        return (gradient if factor == 1 else gradient.mul_(factor), *(None,) * 6)


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


def _rows_and_gradient(
    logits: Float[Tensor, "*batch K"],
    labels: Int[Tensor, "*batch"],
    counted: Bool[Tensor, "*batch"] | None,
    plan: _Plan,
    *,
    with_gradient: bool,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch K"] | None]:
    """Return the losses of all rows and, if asked for, the gradient of their scaled sum."""
    layout, logits = _layout(logits), logits.detach()
    assert layout is not None
    rows = torch.empty(labels.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    gradient = in_large_pages(torch.empty_like(logits)) if with_gradient else None
    with torch.no_grad():
        whole = _Block(logits, labels, counted, rows, gradient)
        in_threads(partial(_fill_both if with_gradient else _fill_rows, plan), _blocks(layout, whole))
    return rows, gradient


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
    return label_gap - log_p, torch.mean(peak - z, dim=dim, keepdim=True) - log_p


def _total(work: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."] | None:
    """Return the sums of a softmax, None for 1: of many classes it is off, since `softmax` adds them in sequence."""
    return torch.sum(work, dim=dim, keepdim=True) if work.shape[dim] > _SEQUENTIAL else None


def _finish_gradient(
    plan: _Plan, block: _Block, work: Tensor, total: Tensor | None, upstream: float | Float[Tensor, "..."]
) -> None:
    """Make the gradient of the softmax in `work`, and write it to the block."""
    slope = upstream * plan.mass if total is None else upstream * plan.mass / total
    constant = upstream * plan.off
    place = block.labels.unsqueeze(block.dim)
    at_label = work.gather(block.dim, place).mul_(slope).sub_(upstream * plan.on)
    if isinstance(slope, Tensor):
        work.mul_(slope)
        if plan.off:
            work.sub_(constant)
    else:
        # A constant plus a multiple, in one pass.
        torch.add(torch.full((), -float(constant), dtype=work.dtype), work, alpha=slope, out=work)
    work.scatter_(block.dim, place, at_label)
    if block.counted is not None:
        work.masked_fill_(~block.counted.unsqueeze(block.dim), 0)
    if work is not block.gradient:
        assert block.gradient is not None
        block.gradient.copy_(work)


def _like(block: _Block, work: Tensor | None) -> Tensor:
    """Return memory of the shape of the block's logits, the same as before if it fits."""
    if work is not None and work.shape == block.logits.shape:
        return work
    return torch.empty(block.logits.shape, dtype=torch.promote_types(block.logits.dtype, torch.float32))
