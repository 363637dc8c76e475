"""A whole loss by the kernels: labels as they are given, the reduction, and the gradient with the loss.

For the usual losses each operation on the rows costs a launch, as much time as a kernel needs for millions of logits.
So one kernel takes the labels as they are, a second adds the losses up, and if labels are ignored or weighted, one
before them counts the others or adds their weights up.

If a sum or mean will be differentiated, the first kernel also writes the gradient for an upstream gradient of 1, while
the logits are in the cache. If the upstream gradient then is 1, the kernel of `backward` leaves it as it is. Otherwise
it computes the gradient again from the logits: to scale a narrow gradient would round it twice. In float16 small values
would be lost before a loss scale could save them, so the gradient is only computed in `backward`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lsce_spec import (
    LossOptions,
    check_denominator_array,
    check_denominator_values,
    is_number,
    smoothing_weights,
)
from lsce_torch.errors import error
from lsce_torch.inputs import Batch, Given, at_labels, canonical, compute_dtype, dtype_name, extremes
from lsce_torch.kernels import check_choice, launch, reason_against, why_not_asked
from lsce_torch.overwrite import forbid_use, has_memory, tensors_to_overwrite
from lsce_torch.plain import plain_gradients
from lsce_torch.stats import LossStats
from lsce_torch.sums import Operands, Upstreams, num_sums

# How much wider than its classes a row may be.
_WIDEST = 1.25
# The kernels take a number in float32.
_LEAST_DIVISOR = 2.0**-100


@dataclass
class _Call:
    """What a call has besides its logits.

    Args:
        given: the tensors of the call, without logits, labels and `where`. Autograd keeps these, and frees them.
        options: the options.
        operands: of the kernels, without labels, `counted` and `factor`.
        divisor: what the sum of the losses is divided by, or a tensor that the call holds apart; None for 1.
        all_mass: see `gpu.forward`.
        apart: see `gpu.forward`.
        with_gradient: whether to compute the gradient with the loss.
        overwritten: see `Batch`.
    """

    given: Given
    options: LossOptions
    operands: Operands
    divisor: float | None
    all_mass: Float[Tensor, ""] | None
    apart: bool
    with_gradient: bool
    overwritten: Any


def loss(
    given: Given,
    options: LossOptions,
    denominator: float | Tensor | None,
    logits: Tensor,
    *,
    inplace_backward: bool,
    with_stats: bool,
) -> tuple[Float[Tensor, "..."], LossStats | None]:
    """Return the loss, reduced as asked, and the statistics if asked, of a call that nothing speaks against.

    Args:
        given: the checked tensors of the call.
        options: of the call.
        denominator: of the call.
        logits: as the caller passed them.
        inplace_backward: of the call.
        with_stats: whether to return statistics.
    """
    check_choice(options.implementation, logits, None, "fused")
    num_rows, num_classes = given.labels.numel(), given.logits.shape[-1]
    overwritten = tensors_to_overwrite(logits) if inplace_backward else None
    on, off = (float(value) for value in smoothing_weights(options.convention, options.smoothing, num_classes))
    operands = Operands(
        labels=None,
        counted=None,
        bad=None,
        class_mask=None,
        factor=None,
        on=on,
        off=off,
        other_mass=float(num_classes - 1),  # without class weights
        at_max=None,
        z_loss=options.z_loss,
        softcap=options.softcap,
        with_stats=with_stats,
        differentiable=False,
        kernels=True,
    )
    divisor: float | Tensor | None = None
    if options.reduction == "mean":
        has_ignored = given.where is not None or options.ignore_index is not None
        divisor = denominator if denominator is None or isinstance(denominator, Tensor) else float(denominator)
        if divisor is None and (has_ignored or given.class_weight is not None):
            dtype = compute_dtype(given.logits)
            divisor = launch.denominator(given.labels, given.where, options.ignore_index, given.class_weight, dtype)
        elif divisor is None:
            divisor = float(num_rows)
    # In float16 a gradient without its loss scale would be lost.
    with_gradient = given.logits.requires_grad and torch.is_grad_enabled() and given.logits.dtype != torch.float16
    with_gradient = with_gradient and options.reduction != "none" and overwritten is None
    nothing = given.logits.new_empty(0)
    is_weighted = given.class_weight is not None
    call = _Call(
        replace(given, logits=nothing, labels=nothing, where=None, class_weight=None),
        options,
        operands,
        divisor=None if isinstance(divisor, Tensor) else divisor,
        all_mass=given.class_weight.sum(dtype=torch.float64) if given.class_weight is not None else None,
        apart=with_stats or is_weighted or not launch.may_join(on, off),
        with_gradient=with_gradient,
        overwritten=overwritten,
    )
    tensors = given.labels, given.where, given.class_weight, divisor if isinstance(divisor, Tensor) else None
    result, numbers, prediction, flags = _WholeLoss.apply(given.logits, *tensors, call)  # type: ignore[no-untyped-call]
    if numbers is None:
        return result, None
    (nll, smoothed, z, lse, confidence, entropy), (correct, valid) = numbers.unbind(), flags.unbind()
    return result, LossStats(nll, smoothed, z, lse, confidence, prediction, entropy, correct, valid)


def why_not(given: Given, options: LossOptions, denominator: float | Tensor | None) -> str | None:
    """Return why this is not the way to compute a call, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile makes kernels of its own"
    return (
        why_not_asked(options.implementation, given.logits)
        or _why_unusual(given, options, denominator)
        or _why_unusual_tensors(given, denominator)
    )


def _why_unusual(given: Given, options: LossOptions, denominator: float | Tensor | None) -> str | None:
    """Return which value or option takes operations of its own, or None."""
    if given.labels.is_floating_point() or given.labels.dtype == torch.uint64 or not is_number(given.smoothing):
        return "it takes labels of signed integers, and the smoothing as a number"
    if given.prior is not None or given.class_mask is not None:
        return "it has no prior and no class mask"
    if options.subtract_entropy or options.convention.at_max is not None or options.bad_labels != "nan":
        return "it has no max_sup, no subtracted entropy and no bad_labels='raise'"
    if isinstance(denominator, Tensor):
        check_denominator_array(tuple(denominator.shape), dtype_name(denominator))
        check_denominator_values(extremes(denominator))
    elif denominator is not None and not _LEAST_DIVISOR <= denominator <= 1 / _LEAST_DIVISOR:
        return "the denominator is 0, or far from 1"
    return None if given.labels.numel() else "there are no rows"


def _why_unusual_tensors(given: Given, denominator: float | Tensor | None) -> str | None:
    """Return which tensors are not plain, or lie as the kernels do not take them, or None."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is at work"
    reason = reason_against(given.logits)
    if reason is not None:
        return reason
    others = given.labels, given.where, given.class_weight, denominator
    tensors = [given.logits, *(tensor for tensor in others if isinstance(tensor, Tensor))]
    if any(type(tensor) not in {Tensor, torch.nn.Parameter} for tensor in tensors) or not has_memory(*tensors):
        return "a tensor is of a class of its own, or has no memory"
    if any(tensor.requires_grad or tensor.device != given.logits.device for tensor in tensors[1:]):
        return "class weights or denominator require a gradient, or are on another device"
    layout = launch.layout_of(given.logits)
    # The gradient has the same layout. Of a narrow part of wide logits it would take the memory of all.
    if layout is None or layout.row_stride > _WIDEST * layout.num_classes:
        return "the rows of the logits lie too far apart in memory"
    return None


class _WholeLoss(torch.autograd.Function):
    """The loss, reduced as asked.

    No transform of torch.func comes here, so `forward` takes the context: torch takes less time to call it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        where: Tensor | None,
        class_weight: Tensor | None,
        denominator: Tensor | None,
        call: _Call,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return the loss, and for statistics their numbers, the predictions and their flags."""
        dtype, device, shape = compute_dtype(logits), logits.device, logits.shape[:-1]
        losses = torch.empty(shape, dtype=dtype, device=device)
        stacked = torch.empty((num_sums(call.operands) if call.apart else 3, *shape), dtype=dtype, device=device)
        gradient = _memory_like(logits) if call.with_gradient else None
        divisor = call.divisor if denominator is None else denominator
        first = torch.empty(shape, dtype=torch.int64, device=device) if call.operands.with_stats else None
        operands = _with_tensors(call.operands, labels, where, class_weight)
        whole = launch.Whole(call.options.ignore_index, divisor, call.all_mass)
        launch.forward(logits.detach(), operands, losses, stacked, first, gradient, whole=whole, apart=call.apart)
        numbers = flags = None
        if first is not None:
            numbers, flags = launch.statistics(logits, operands, stacked, first, whole)
            ctx.mark_non_differentiable(numbers, first, flags)
        ctx.call, ctx.gradient = call, gradient
        ctx.save_for_backward(logits, stacked, labels, where, class_weight, denominator)
        ctx.set_materialize_grads(False)
        result = losses if call.options.reduction == "none" else launch.total(losses, divisor)
        return result, numbers, first, flags

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Return the gradient with respect to the logits."""
        return None if upstream is None else _backward(ctx, upstream), *(None,) * 5


def _with_tensors(operands: Operands, labels: Tensor, where: Tensor | None, class_weight: Tensor | None) -> Operands:
    counted = None if where is None else where.expand(labels.shape)
    return operands._replace(labels=labels, counted=counted, factor=class_weight)


def _backward(ctx: Any, upstream: Float[Tensor, "*#batch"]) -> Float[Tensor, "*batch K"]:
    logits, stacked, labels, where, class_weight, denominator = ctx.saved_tensors
    call: _Call = ctx.call
    # Taken out, so that nothing else holds it. A second `backward` computes it again.
    gradient: Tensor | None
    gradient, ctx.gradient = ctx.gradient, None
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not has_memory(upstream, logits):
        if call.overwritten is not None:
            raise error("inplace_transformed")
        given = replace(call.given, logits=logits, labels=labels, where=where, class_weight=class_weight)
        return _differentiable_gradient(canonical(given, call.options), call, denominator, upstream)
    is_written = gradient is not None
    if gradient is None:
        gradient = _memory_like(logits) if call.overwritten is None else logits.detach()
    launch.backward(
        logits.detach(),
        _with_tensors(call.operands, labels, where, class_weight),
        stacked,
        Upstreams(upstream),
        gradient,
        whole=launch.Whole(
            call.options.ignore_index, call.divisor if denominator is None else denominator, call.all_mass
        ),
        is_written=is_written,
    )
    forbid_use(call.overwritten or ())
    return gradient


def _differentiable_gradient(
    batch: Batch, call: _Call, denominator: Float[Tensor, ""] | None, upstream: Float[Tensor, "*#batch"]
) -> Float[Tensor, "*batch K"]:
    if denominator is not None:
        divides = denominator != 0
        batch = batch.counting_only(divides)
        upstream = upstream / torch.where(divides, denominator, 1).to(batch.dtype)
    elif call.divisor is not None:
        upstream = upstream / call.divisor
    operands = call.operands._replace(labels=batch.labels, counted=batch.counted, bad=batch.bad)
    if batch.class_weight is not None and call.all_mass is not None:
        weights = at_labels(batch.class_weight, batch.labels)
        other_mass = (call.all_mass - weights.double()).to(batch.dtype)
        operands = operands._replace(factor=batch.class_weight, on=operands.on * weights, other_mass=other_mass)
    rows = upstream.expand(batch.batch_shape)
    gradient = plain_gradients(batch.logits, operands, ["logits"], Upstreams(rows))["logits"]
    assert gradient is not None
    return gradient.to(batch.logits.dtype)


def _memory_like(logits: Tensor) -> Tensor:
    """Return memory of the same strides: the kernels write where they read."""
    return torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)
