"""The two sweeps of the fused implementation over the logits: one for the sums, one for the gradient.

On the CPU a sweep takes blocks of rows that fit in the cache, and runs several operations in place on each. On whole
arrays each operation would read and write memory, which takes longer than the arithmetic. Each kernel below computes
one `Block`, whose tensors it takes by name. On a TPU a sweep is `plain.py`, which the compiler fuses.

For exponentials the CPU uses `torch.softmax`, which is faster than `torch.exp`. Its sum is not accurate enough, since
it adds thousands of terms in sequence, so the kernels add up its results themselves.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lsce_spec import GAP_UNIT
from lsce_torch.device import is_on_cpu, takes_plain_operations
from lsce_torch.inputs import compute_dtype, tensor_of
from lsce_torch.kernels import NOT_CUDA, launch, reason_against
from lsce_torch.plain import plain_gradients, plain_sums, plain_sums_and_slopes
from lsce_torch.sums import (
    Operands,
    Sums,
    Upstreams,
    in_gap_units,
    losses_of,
    num_sums,
    stacked_of,
    target_mass,
    unstacked,
)
from lsce_torch.threads import in_threads

# Elements of a block: 4 MiB in float32.
_BLOCK_SIZE = 2**20
# A gap at least this large has a probability of 0, in float64 as well.
_LARGEST_GAP = 1000.0
# Classes among which the first largest logit is searched in one go: torch takes ten times as long to find it as to
# compare. Of fewer classes, and of fewer logits, starting operations would take longer.
_SEARCHED, _FEW_CLASSES, _FEW_LOGITS = 64, 512, 2**17


class Block(NamedTuple):
    """The tensors of some rows, by name. None for what a call does not have or a kernel does not use."""

    # The `Sums`: written by the sweep for the sums, read by the sweep for the gradient.
    stacked: Float[Tensor, "sums ..."]
    # Rows and classes, or a vector over the classes.
    logits: Float[Tensor, "*rows K"]
    gradient: Float[Tensor, "*rows K"] | None  # written; may be the logits
    allowed: Bool[Tensor, "*#rows K"] | None  # True for classes of the mask
    factor: Float[Tensor, "*#rows K"] | None
    # One value per row.
    labels: Int[Tensor, "*rows"] | None
    counted: Bool[Tensor, "*rows"] | None
    bad: Bool[Tensor, "*rows"] | None = None
    first: Int[Tensor, "*rows"] | None = None  # index of the first largest logit, written
    on: Float[Tensor, "*rows"] | None = None
    off: Float[Tensor, "*rows"] | None = None
    mass: Float[Tensor, "*rows"] | None = None  # of the target
    # The gradient of a row is (p_slope + gap_slope (m - z)) p - other_slope w, replaced by label_gradient at the label,
    # minus max_slope w at the largest logits.
    p_slope: Float[Tensor, "*rows"] | None = None
    gap_slope: Float[Tensor, "*rows"] | None = None
    other_slope: Float[Tensor, "*rows"] | None = None
    label_gradient: Float[Tensor, "*rows"] | None = None
    max_slope: Float[Tensor, "*rows"] | None = None
    # Made for one block at a time: of all rows it may be as many as there are logits.
    excluded: Bool[Tensor, "*#rows K"] | None = None  # True for classes outside the mask


class Results(NamedTuple):
    """What the sweep for the sums returns, or memory for it."""

    losses: Float[Tensor, "*batch"]
    stacked: Float[Tensor, "sums ..."]  # the `Sums`
    first: Int[Tensor, "*batch"] | None  # index of the first largest logit, for statistics

    @staticmethod
    def empty(shape: tuple[int, ...], operands: Operands, dtype: torch.dtype, device: torch.device) -> "Results":
        """Return memory for rows of that shape. Sums that nothing uses are not written, and 0."""
        return Results(
            losses=torch.empty(shape, dtype=dtype, device=device),
            stacked=torch.zeros((num_sums(operands), *shape), dtype=dtype, device=device),
            first=torch.empty(shape, dtype=torch.int64, device=device) if operands.with_stats else None,
        )

    def of_rows(self, part: slice) -> "Results":
        """Return the memory of some rows, which are in one dimension."""
        return Results(self.losses[part], self.stacked[:, part], None if self.first is None else self.first[part])


_WIDE = ("logits", "gradient", "allowed", "factor")


class _Engine(NamedTuple):
    """What computes a sweep.

    Args:
        sums: returns the losses, the `Sums`, stacked, and for statistics the index of the first largest logit.
        with_gradient: returns the same, and overwrites the logits by the gradient of the sum of the losses.
        gradient: writes the gradient.
    """

    sums: Callable[[Tensor, Operands], tuple[Tensor, Tensor, Tensor | None]]
    with_gradient: Callable[[Tensor, Operands], tuple[Tensor, Tensor, Tensor | None]]
    gradient: Callable[[Tensor, Operands, Tensor, Upstreams, Tensor], None]


def tried(logits: Tensor, why_no_kernels: str | None) -> dict[str, str | None]:
    """Return the engines that are tried, in order, with why each is passed over; the last, with None, is taken.

    `why_no_kernels` says why those for GPUs are not asked for.
    """
    if takes_plain_operations(logits):
        return {"plain operations": None}
    passed_over: dict[str, str | None] = {"plain operations": "they are for torch.compile and TPUs"}
    passed_over["triton sweeps"] = reason = why_no_kernels or reason_against(logits)
    return passed_over if reason is None else passed_over | {"sweeps": None}


def _engine(logits: Tensor, operands: Operands) -> _Engine:
    return _ENGINES[next(reversed(tried(logits, None if operands.kernels else NOT_CUDA)))]


def sweep(logits: Float[Tensor, "*batch K"], operands: Operands) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the losses, the `Sums`, stacked, and, for statistics, the index of the first largest logit of each row."""
    return _engine(logits, operands).sums(logits, operands)


def sweep_with_gradient(logits: Float[Tensor, "*batch K"], operands: Operands) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what `sweep` returns, and overwrite the logits by the gradient of the sum of the losses."""
    return _engine(logits, operands).with_gradient(logits, operands)


def sweep_into(results: Results, logits: Float[Tensor, "*batch K"], operands: Operands, *, with_gradient: bool) -> None:
    """Write what `sweep` or `sweep_with_gradient` returns to given memory: the kernels directly, others by a copy."""
    engine = _engine(logits, operands)
    if engine is _ENGINES["triton sweeps"]:
        launch.sums_into(*results, logits, operands, with_gradient=with_gradient)
        return
    found = (engine.with_gradient if with_gradient else engine.sums)(logits, operands)
    for memory, value in zip(results, found, strict=True):
        if memory is not None and value is not None:
            memory.copy_(value)


def logits_gradient(
    logits: Float[Tensor, "*batch K"],
    operands: Operands,
    stacked: Float[Tensor, "sums ..."],
    upstreams: Upstreams,
    gradient: Float[Tensor, "*batch K"],
) -> None:
    """Write the gradient with respect to the logits.

    Args:
        logits: of the rows.
        operands: of the rows.
        stacked: the sums of these rows.
        upstreams: gradients with respect to the losses and the statistics, of which one at least is there.
        gradient: memory to write to, such as the logits.
    """
    _engine(logits, operands).gradient(logits, operands, stacked, upstreams, gradient)


def _with_losses(operands: Operands, stacked: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return losses_of(operands, unstacked(stacked))[0], stacked, first


# --- Plain operations -------------------------------------------------------------------------------------------------


def _plain_sums(logits: Tensor, operands: Operands) -> tuple[Tensor, Tensor, Tensor | None]:
    sums, first = plain_sums(logits, operands)
    return _with_losses(operands, stacked_of(operands, sums), first)


def _plain_both(logits: Tensor, operands: Operands) -> tuple[Tensor, Tensor, Tensor | None]:
    sums, first, gradient = plain_sums_and_slopes(logits, operands)
    logits.copy_(gradient)
    return _with_losses(operands, stacked_of(operands, sums), first)


def _plain_gradient(
    logits: Tensor, operands: Operands, _stacked: Tensor, upstreams: Upstreams, gradient: Tensor
) -> None:
    of_logits = plain_gradients(logits, operands, ["logits"], upstreams)["logits"]
    assert of_logits is not None
    gradient.copy_(of_logits)


# --- Blocks -----------------------------------------------------------------------------------------------------------


def _block_sums(logits: Tensor, operands: Operands) -> tuple[Tensor, Tensor, Tensor | None]:
    whole = _block_of_sums(logits, operands)
    _run(partial(_fill_sums, softcap=operands.softcap), whole, with_spare=operands.with_stats)
    return _with_losses(operands, *_without_uncounted(whole))


def _block_both(logits: Tensor, operands: Operands) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both come from each block while it is in the cache.

    A softcap or a target at the largest logit takes a second array of the block's size, so there the gradient has a
    sweep of its own.
    """
    if operands.softcap is not None or operands.at_max is not None:
        losses, stacked, first = _block_sums(logits, operands)
        _block_gradient(logits, operands, stacked, Upstreams(torch.ones_like(losses)), logits)
        return losses, stacked, first
    whole = _block_of_sums(logits, operands)
    on, off, mass = (
        tensor_of(value, whole.stacked.dtype, logits.device)
        for value in (operands.on, operands.off, operands.on + operands.off * operands.other_mass)
    )
    whole = whole._replace(gradient=logits, bad=operands.bad, on=on, off=off, mass=mass)
    _run(
        partial(_fill_both, z_loss=operands.z_loss),
        whole,
        in_gradient=logits.dtype == whole.stacked.dtype,
        with_spare=operands.with_stats,
    )
    return _with_losses(operands, *_without_uncounted(whole))


def _block_gradient(
    logits: Tensor, operands: Operands, stacked: Tensor, upstreams: Upstreams, gradient: Tensor
) -> None:
    whole = _with_slopes(
        Block(
            stacked=stacked,
            logits=logits,
            gradient=gradient,
            allowed=operands.class_mask,
            factor=operands.factor,
            labels=operands.labels,
            counted=operands.counted,
        ),
        operands,
        upstreams,
    )
    is_plain = stacked.dtype == logits.dtype and logits.is_contiguous() and operands.softcap is None
    _run(
        partial(_fill_gradient, softcap=operands.softcap),
        whole,
        in_gradient=is_plain and whole.max_slope is None,
        with_spare=whole.gap_slope is not None,
    )


_ENGINES = {
    "plain operations": _Engine(_plain_sums, _plain_both, _plain_gradient),
    "triton sweeps": _Engine(launch.sums, partial(launch.sums, with_gradient=True), launch.logits_gradient),
    "sweeps": _Engine(_block_sums, _block_both, _block_gradient),
}


def _with_slopes(whole: Block, operands: Operands, upstreams: Upstreams) -> Block:
    """Return all rows with the slopes of their gradients."""
    sums = unstacked(whole.stacked)
    if operands.counted is not None:
        uncounted = ~operands.counted
        upstreams = Upstreams(*(None if u is None else u.masked_fill(uncounted, 0) for u in upstreams))
    of_loss, of_nll, of_lse, of_entropy = upstreams
    at_label = None
    if of_loss is None:
        p_slope = torch.zeros_like(sums.peak)
    else:
        p_slope, whole = _slopes_of_loss(whole, operands, sums, of_loss)
        at_label = of_loss * operands.on
    if of_nll is not None:
        p_slope = p_slope + of_nll
        at_label = of_nll if at_label is None else at_label + of_nll
    if operands.bad is not None and at_label is not None:
        p_slope = p_slope.masked_fill(operands.bad, torch.nan)
    if of_lse is not None:
        p_slope = p_slope + of_lse
    at_gap = p_slope
    if of_entropy is not None and sums.mean_gap is not None:
        p_slope = p_slope - of_entropy * sums.mean_gap
        at_gap = p_slope + of_entropy * sums.label_gap.clamp(max=_LARGEST_GAP)
    label_gradient = None
    if operands.labels is not None:
        # Not the exponential of the sum of both: the sum rounds away digits of `log_sum` beside a large gap.
        label_gradient = at_gap * (torch.exp(-sums.label_gap) * torch.exp(-sums.log_sum))
        label_gradient = label_gradient if at_label is None else label_gradient - at_label
    return whole._replace(p_slope=p_slope, gap_slope=of_entropy, label_gradient=label_gradient)


def _slopes_of_loss(
    whole: Block, operands: Operands, sums: Sums, upstream: Float[Tensor, "*batch"]
) -> tuple[Float[Tensor, "*batch"], Block]:
    """Return the slope of p in the gradient of the loss, and all rows with the others but the label's."""
    p_slope = upstream * target_mass(operands, sums)
    if operands.z_loss:
        p_slope = p_slope + upstream * (2 * operands.z_loss * (sums.peak + sums.log_sum))
    max_slope = None
    if operands.at_max is not None and sums.num_largest is not None:
        max_slope = upstream * operands.at_max / sums.num_largest
    is_nothing = isinstance(operands.off, float) and not operands.off
    return p_slope, whole._replace(other_slope=None if is_nothing else upstream * operands.off, max_slope=max_slope)


def _block_of_sums(logits: Float[Tensor, "*batch K"], operands: Operands) -> Block:
    """Return all rows, and room for their sums."""
    dtype, shape, device = compute_dtype(logits), logits.shape[:-1], logits.device
    # Of these sums, `at_max` without statistics leaves `mean_gap` unwritten, and 0.
    make = torch.zeros if operands.at_max is not None and not operands.with_stats else torch.empty
    return Block(
        stacked=make((num_sums(operands), *shape), dtype=dtype, device=device),
        logits=logits,
        gradient=None,
        allowed=operands.class_mask,
        factor=operands.factor,
        labels=operands.labels,
        counted=operands.counted,
        first=torch.empty(shape, dtype=torch.int64, device=device) if operands.with_stats else None,
    )


def _without_uncounted(whole: Block) -> tuple[Tensor, Tensor | None]:
    """Return the stacked sums, 0 for rows that do not count, and the index of the first largest logit."""
    if whole.counted is not None:
        # Such a row may hold a NaN, which must not reach any result, not even multiplied by 0.
        whole.stacked.masked_fill_(~whole.counted, 0)
    return whole.stacked, whole.first


def _run(kernel: Callable[..., None], whole: Block, *, in_gradient: bool = False, with_spare: bool = False) -> None:
    """Call a kernel with each block and an array of its size to compute in: the gradient's memory, or scratch.

    `with_spare` says that the kernel takes a second one.
    """
    dtype = whole.stacked.dtype

    def work(blocks: Iterator[Block]) -> None:
        scratch: list[Tensor] = []
        for block in blocks:
            if block.allowed is not None:
                block = block._replace(excluded=~block.allowed)  # noqa: PLW2901
            if not scratch or scratch[0].shape != block.logits.shape:
                shape, device, number = block.logits.shape, block.logits.device, with_spare + (not in_gradient)
                scratch = [torch.empty(shape, dtype=dtype, device=device) for _ in range(number)]
            kernel(block, *([block.gradient] if in_gradient else []), *scratch)

    in_threads(work, _blocks(whole))


def _fill_sums(
    block: Block,
    work: Float[Tensor, "*rows K"],
    spare: Float[Tensor, "*rows K"] | None = None,
    *,
    softcap: float | None,
) -> None:
    """Compute the sums of a block. For statistics it takes a second array."""
    sums = _fill_gaps(block, work, softcap)
    exponentials = work if spare is None else spare
    _exponentials(work, exponentials, is_shifted=True)
    total = torch.sum(exponentials, dim=-1)
    if spare is not None:
        _fill_mean_gap(sums, work, exponentials, total)
    # A quotient by 1 would not do elsewhere: a device without exact quotients need not return what it divides.
    scale = torch.amax(exponentials, dim=-1) if is_on_cpu(work) else None

    def rest() -> Tensor:
        # Of terms between 0 and 1, frac sets those to 0 that are 1.
        terms = exponentials if scale is None else exponentials.div_(scale[..., None])
        return torch.sum(terms.frac_(), dim=-1)

    _fill_log_sum(sums, total if scale is None else total.div_(scale), rest, is_masked=block.excluded is not None)


def _fill_mean_gap(
    sums: Sums,
    differences: Float[Tensor, "*rows K"],
    exponentials: Float[Tensor, "*rows K"],
    total: Float[Tensor, "*rows"],
) -> None:
    """Compute the mean of m - z under the softmax from z - m, which is overwritten, and exponentials with their sum."""
    assert sums.mean_gap is not None
    # The product is NaN, and counts as 0, for a logit of -inf, or if all are NaN. Then the log of the sum is NaN too.
    torch.nansum(differences.mul_(exponentials), dim=-1, out=sums.mean_gap)
    sums.mean_gap.div_(total).neg_()


def _fill_both(
    block: Block, work: Float[Tensor, "*rows K"], spare: Float[Tensor, "*rows K"] | None = None, *, z_loss: float
) -> None:
    """Compute the sums and the gradient of a block. For statistics it takes a second array."""
    sums = _fill_gaps(block, work, None)
    if spare is not None:
        spare.copy_(work)
    # Not `_exponentials`, whose factor for each row the gradient would have to divide out again; beside the matrix
    # products of the linear loss the time of exp does not show.
    torch.exp_(work)
    total = torch.sum(work, dim=-1)
    if spare is not None:
        _fill_mean_gap(sums, spare, work, total)

    def rest() -> Tensor:
        place = (torch.argmax(work, dim=-1) if block.first is None else block.first)[..., None]
        rest = torch.sum(work.scatter_(-1, place, 0), dim=-1)
        work.scatter_(-1, place, 1)
        return rest

    _fill_log_sum(sums, total, rest, is_masked=block.excluded is not None)
    p_slope = block.mass
    assert p_slope is not None
    assert block.on is not None
    if z_loss:
        p_slope = p_slope + 2 * z_loss * (sums.peak + sums.log_sum)
    if block.bad is not None:
        p_slope = p_slope.masked_fill(block.bad, torch.nan)
    label_gradient = p_slope * torch.exp(-sums.label_gap) * torch.exp(-sums.log_sum) - block.on
    block = block._replace(p_slope=p_slope, other_slope=block.off, label_gradient=label_gradient)
    _finish_gradient(block, work, total)


def _fill_gradient(
    block: Block,
    work: Float[Tensor, "*rows K"],
    spare: Float[Tensor, "*rows K"] | None = None,
    *,
    softcap: float | None,
) -> None:
    """Compute the gradient of a block from its sums. With a slope of the gaps it takes a second array."""
    z = _load(block, work, copy=softcap is not None)
    is_largest = slope = None
    if block.max_slope is not None:
        is_largest = z == unstacked(block.stacked).largest[..., None]
    if softcap is not None:
        _softcap_(work, softcap, block.excluded)
        # 1 - tanh^2
        slope = torch.div(work, softcap).square_().neg_().add_(1)
    if spare is not None:
        torch.sub(unstacked(block.stacked).peak[..., None], z, out=spare)
    _exponentials(z, work)
    _finish_gradient(block, work, torch.sum(work, dim=-1), is_largest, slope, spare)


def _load(block: Block, work: Float[Tensor, "*rows K"], *, copy: bool) -> Float[Tensor, "*rows K"]:
    """Return the logits in the compute dtype, -inf outside the mask: as they are, or a copy in `work`."""
    if block.logits.dtype == work.dtype and block.excluded is None and not copy:
        return block.logits
    work.copy_(block.logits)
    return work if block.excluded is None else work.masked_fill_(block.excluded, -torch.inf)


def _softcap_(work: Float[Tensor, "*rows K"], softcap: float, excluded: Bool[Tensor, "*#rows K"] | None) -> None:
    work.div_(softcap).tanh_().mul_(softcap)
    if excluded is not None:
        work.masked_fill_(excluded, -torch.inf)


def _fill_gaps(block: Block, work: Float[Tensor, "*rows K"], softcap: float | None) -> Sums:
    """Compute the sums of a block other than `log_sum`, and write z - m to `work`, -inf outside the mask."""
    sums = unstacked(block.stacked)
    z = _load(block, work, copy=softcap is not None)
    if block.first is None:
        torch.amax(z, dim=-1, out=sums.largest)
    else:
        _first_largest(z, sums.largest, block.first)
    if sums.num_largest is not None and sums.largest_mass is not None:
        is_largest = z == sums.largest[..., None]
        torch.sum(is_largest, dim=-1, dtype=work.dtype, out=sums.num_largest)
        weights = is_largest.to(work.dtype) if block.factor is None else is_largest * block.factor
        torch.div(torch.sum(weights, dim=-1), sums.num_largest, out=sums.largest_mass)
    if softcap is None:
        sums.peak.copy_(sums.largest)
    else:
        _softcap_(work, softcap, block.excluded)
        torch.amax(work, dim=-1, out=sums.peak)

    torch.sub(z, sums.peak[..., None], out=work)
    if block.excluded is not None:
        work.masked_fill_(block.excluded, 0)
    place = at_label = None
    if block.labels is None:
        sums.label_gap.zero_()
    else:
        # The sum leaves the label's gap out. Subtracting it later would fail if it is infinite or most of the sum.
        place = block.labels[..., None]
        at_label = torch.gather(work, -1, place)
        torch.neg(at_label.squeeze(-1), out=sums.label_gap)
        work.scatter_(-1, place, 0)
    weighted = work
    if block.factor is not None:
        weighted = torch.mul(work, block.factor).masked_fill_(block.factor == 0, 0)
    _fill_other_gaps(sums.other_gaps, weighted)
    if place is not None and at_label is not None:
        work.scatter_(-1, place, at_label)
    if block.excluded is not None:
        work.masked_fill_(block.excluded, -torch.inf)
    return sums


def _fill_other_gaps(other_gaps: Float[Tensor, "*rows"], weighted: Float[Tensor, "*rows K"]) -> None:
    """Write the sums of m - z in their unit, from w (z - m).

    On the CPU the terms are multiplied one by one, in memory of their own, only if their sum overflows.
    """
    if is_on_cpu(weighted):
        torch.sum(weighted, dim=-1, out=other_gaps).mul_(-1 / GAP_UNIT)
        if not _any(torch.isinf(other_gaps)):
            return
    torch.sum(in_gap_units(weighted), dim=-1, out=other_gaps).neg_()


def _first_largest(z: Float[Tensor, "*rows K"], largest: Float[Tensor, "*rows"], first: Int[Tensor, "*rows"]) -> None:
    """Write the largest logit of each row and the index of the first one.

    Of many classes: the largest of each part, then where it is in the first part that has it.
    """
    num_classes = z.shape[-1]
    num_parts = num_classes // _SEARCHED
    if num_classes < _FEW_CLASSES or z.numel() < _FEW_LOGITS or not is_on_cpu(z):
        torch.max(z, dim=-1, out=(largest, first))
        return
    end = num_parts * _SEARCHED
    peaks = torch.amax(z[..., :end].view(*z.shape[:-1], num_parts, _SEARCHED), dim=-1)
    if end < num_classes:
        peaks = torch.cat([peaks, torch.amax(z[..., end:], dim=-1, keepdim=True)], dim=-1)
    torch.max(peaks, dim=-1, out=(largest, first))
    begin = first[..., None] * _SEARCHED
    # Beyond the last class the last once more, which cannot be the first.
    places = torch.clamp(begin + torch.arange(_SEARCHED), max=num_classes - 1)
    torch.add(begin.squeeze(-1), torch.argmax(torch.gather(z, -1, places), dim=-1), out=first)


def _exponentials(
    z: Float[Tensor, "*rows K"], work: Float[Tensor, "*rows K"], *, is_shifted: bool = False
) -> Float[Tensor, "*rows K"]:
    """Write exp(z - max z) times a factor for each row to `work`. `is_shifted` says that max z is 0."""
    if is_on_cpu(work):
        return torch.softmax(z, dim=-1, out=work)
    shifted = z if is_shifted else torch.sub(z, torch.amax(z, dim=-1, keepdim=True), out=work)
    return torch.exp(shifted, out=work)


def _fill_log_sum(sums: Sums, total: Float[Tensor, "*rows"], rest: Callable[[], Tensor], *, is_masked: bool) -> None:
    """Compute the log of a sum of exponentials from the sum, or, if that is small, from its rest.

    Without its largest term, which is 1, a sum below 2 keeps the relative accuracy of small losses. A mask may leave no
    class: then the sum is 0 or NaN, and the log NaN.
    """
    total_less_1, is_small = total - 1, total < 2
    if is_masked:
        is_there = total > 0
        total_less_1, is_small = torch.where(is_there, total_less_1, torch.nan), is_small & is_there
    if not is_on_cpu(total) or _any(is_small):
        total_less_1 = torch.where(is_small, rest(), total_less_1)
    torch.log1p(total_less_1, out=sums.log_sum)


def _any(rows: Bool[Tensor, "*rows"]) -> bool:
    """Whether any is True, or may be: fake tensors have no values to read."""
    try:
        return bool(rows.any())
    except RuntimeError:
        return True


def _finish_gradient(
    block: Block,
    work: Float[Tensor, "*rows K"],
    total: Float[Tensor, "*rows"],
    is_largest: Bool[Tensor, "*rows K"] | None = None,
    slope: Float[Tensor, "*rows K"] | None = None,
    gaps: Float[Tensor, "*rows K"] | None = None,
) -> None:
    """Make the gradient from the exponentials in `work`, and write it to the block.

    Args:
        block: of the gradient, with its slopes.
        work: the exponentials of each row times a factor.
        total: their sum.
        is_largest: True at the largest logits, for `max_slope`.
        slope: derivative of the softcap.
        gaps: m - z, for `gap_slope`; overwritten.
    """
    assert block.p_slope is not None
    assert block.gradient is not None
    p_slope = (block.p_slope / total)[..., None]
    if gaps is not None and block.gap_slope is not None:
        # Where the gap is infinite the probability is 0.
        p_slope = gaps.clamp_(max=_LARGEST_GAP).mul_((block.gap_slope / total)[..., None]).add_(p_slope)
    work.mul_(p_slope)
    if block.other_slope is not None:
        if block.factor is None:
            work.sub_(block.other_slope[..., None])
        else:
            work.addcmul_(block.other_slope[..., None], block.factor, value=-1)
    if block.labels is not None and block.label_gradient is not None:
        work.scatter_(-1, block.labels[..., None], block.label_gradient[..., None])
    if is_largest is not None and block.max_slope is not None:
        factor = 1 if block.factor is None else block.factor
        work.sub_(torch.where(is_largest, block.max_slope[..., None] * factor, 0))
    if slope is not None:
        work.mul_(slope)
    if block.excluded is not None:
        work.masked_fill_(block.excluded, 0)
    if block.counted is not None:
        work.masked_fill_(~block.counted[..., None], 0)
    if work is not block.gradient:
        block.gradient.copy_(work)


def _blocks(whole: Block) -> Iterator[Block]:
    """Yield some rows at a time, or all at once if they are few or not on the CPU.

    For few rows, and on accelerators, starting an operation takes longer than reading memory.
    """
    logits = whole.logits
    batch_shape, num_classes = logits.shape[:-1], logits.shape[-1]
    if logits.numel() <= _BLOCK_SIZE or not is_on_cpu(logits) or logits.ndim == 1:
        yield whole
        return
    whole = _mapped(whole, lambda t: t.expand(logits.shape), lambda t: t.expand(batch_shape), lambda t: t)
    if logits.is_contiguous():
        whole = _mapped(
            whole, lambda t: t.reshape(-1, num_classes), lambda t: t.reshape(-1), lambda t: t.view(t.shape[0], -1)
        )
    elif logits.ndim > 2 and logits[0].numel() > _BLOCK_SIZE:
        for i in range(logits.shape[0]):
            yield from _blocks(_part(whole, i))
        return
    step = max(1, _BLOCK_SIZE // whole.logits[0].numel())
    for start in range(0, whole.logits.shape[0], step):
        yield _part(whole, slice(start, start + step))


def _part(whole: Block, index: int | slice) -> Block:
    return _mapped(whole, lambda t: t[index], lambda t: t[index], lambda t: t[:, index])


def _mapped(
    block: Block,
    wide: Callable[[Tensor], Tensor],
    rows: Callable[[Tensor], Tensor],
    stacked: Callable[[Tensor], Tensor],
) -> Block:
    """Return a block with a function applied to its tensors of each kind; vectors over the classes stay as they are."""
    functions = {"stacked": stacked} | dict.fromkeys(_WIDE, lambda t: t if t.ndim == 1 else wide(t))
    tensors = {name: tensor for name, tensor in block._asdict().items() if tensor is not None}
    return block._replace(**{name: functions.get(name, rows)(tensor) for name, tensor in tensors.items()})
