r"""The fast implementation: no target is written out, and nothing as large as the logits is kept for `backward`.

An integer label's target is `on` at the label y and `off` times a weight w_k elsewhere, so the loss of a row needs a
few sums over the classes and nothing else that is K wide. With m the largest logit and L = log sum_k exp(z_k - m),

    loss = on w_y (m - z_y) + off sum_{k != y} w_k (m - z_k) + S L + z_loss (m + L)^2 - H(q)

and the gradient, (S + 2 z_loss (m + L)) p - w q, is computed from the logits once more.

The autograd Function holds these two passes, which are in `sweeps.py`, its rule for vmap (rows in one dimension more)
and its forward mode. A derivative of the gradient, forward mode and torch.compile take `_plain_sums`, the same sums in
plain operations, which torch differentiates and the compiler fuses by itself.

Soft labels take the same way, with a weight for each row. A `class_weight` or `prior` that requires a gradient takes
the reference, as do the rarer combinations that `why_reference` lists.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lsce_spec import LossOptions, error
from lsce_torch import reference
from lsce_torch.inputs import Batch, at_labels, compute_dtype
from lsce_torch.overwrite import has_memory, what_is_overwritten
from lsce_torch.stats import LossStats, make_stats
from lsce_torch.sweeps import Operands, Sums, logits_gradient, sweep, target_mass, unstacked


def row_losses(
    batch: Batch, options: LossOptions, with_stats: bool = False
) -> tuple[Float[Tensor, "*batch"], LossStats | None]:
    """Return the loss of each row, 0 for rows that do not count and NaN for bad labels, and the statistics if asked."""
    reason = why_reference(batch, options, with_stats)
    if reason is not None:
        if options.inplace_backward:
            raise error("inplace_needs_reference", reason=reason)
        return reference.row_losses(batch, options, with_stats)
    operands, entropy = make_operands(batch, options, with_stats)
    losses: Tensor
    if torch.compiler.is_compiling():
        sums, first = _plain_sums(operands)
        losses = losses_of(operands, sums)[0]
    else:
        losses, stacked, first = _RowLosses.apply(*operands)  # type: ignore[no-untyped-call]
        sums = unstacked(stacked)
    if entropy is not None:
        losses = losses - entropy
        if batch.counted is not None:
            losses = torch.where(batch.counted, losses, 0)
    if first is None:
        return losses, None
    return losses, stats_of(batch, options, operands, entropy, sums, first)


def stats_of(
    batch: Batch,
    options: LossOptions,
    operands: Operands,
    entropy: float | Float[Tensor, "*#batch"] | None,
    sums: Sums,
    first: Int[Tensor, "*batch"],
) -> LossStats:
    """Return the statistics that the sums make; `first` is the index of the first largest logit."""
    with torch.no_grad():
        _, smoothed, lse = losses_of(operands, sums)
        if entropy is not None:
            smoothed = smoothed - entropy
        nll, correct = sums.log_sum + sums.label_gap, torch.eq(first, batch.labels)
        return make_stats(batch, options, nll=nll, smoothed=smoothed, lse=lse, log_sum=sums.log_sum, correct=correct)


def why_reference(batch: Batch, options: LossOptions, with_stats: bool) -> str | None:
    """Return what makes a call take the reference; None if nothing does."""
    if batch.logits.device.type == "jax":
        return "the logits are JAX's, through torchax, which cannot write into what it is given"
    for name in ("class_weight", "prior"):
        vector = getattr(batch, name)
        if vector is not None and vector.requires_grad:
            return f"{name} requires a gradient"
    if batch.soft:
        if batch.labels.requires_grad or (isinstance(batch.smoothing, Tensor) and batch.smoothing.requires_grad):
            return "soft labels or their smoothing require a gradient"
        if options.convention.at_max is not None:
            return f"convention {options.convention.name!r} compares soft labels with every logit"
        if with_stats:
            return "the statistics of soft labels need the labels once more"
    return None


def make_operands(
    batch: Batch, options: LossOptions, with_stats: bool
) -> tuple[Operands, float | Float[Tensor, "*#batch"] | None]:
    """Return the operands, and the entropy of the target if it is to be subtracted."""
    entropy: float | Tensor | None = None
    at_label: float | Tensor
    off: float | Tensor
    num_others: float | Tensor
    other_mass: float | Tensor
    at_max: float | Tensor | None = None
    weight: Tensor | None
    if batch.soft:
        target = reference.target_distribution(batch, options)
        weight = target if batch.class_weight is None else target * batch.class_weight
        at_label, off, other_mass = 0.0, 1.0, torch.sum(weight, dim=-1)
        if options.subtract_entropy:
            entropy = torch.sum(reference.entropy_terms(target, batch), dim=-1)
    else:
        weight, num_others = batch.class_weight, reference.count_allowed(batch) - 1
        if batch.prior is None:
            at_label, off = (_per_row(value) for value in reference.on_off(batch, options))
        else:
            off, num_others = _per_row(batch.smoothing), _sum_of_others(batch.prior, batch)
            at_label = 1 - off + off * at_labels(batch.prior, batch.labels)
            weight = batch.prior if weight is None else batch.prior * weight
        if batch.bad is not None and not isinstance(batch.smoothing, float):
            # No derivative by the smoothing comes from a row whose label is bad.
            at_label, off = (torch.where(batch.bad, 0, reference.as_tensor(v, batch)) for v in (at_label, off))
        if options.subtract_entropy:
            entropy = _entr(at_label) + num_others * _entr(off)
            if batch.prior is not None:
                # The slope of entr is infinite at 0, where a prior is 0 for good.
                terms = torch.special.entr(torch.where(batch.prior == 0, 1, batch.prior))
                entropy = entropy + off * _sum_of_others(terms, batch)
        other_mass = num_others if weight is None else _sum_of_others(weight, batch)
        if batch.class_weight is not None:
            at_label = at_label * at_labels(batch.class_weight, batch.labels)
        if options.convention.at_max is not None:
            at_max = _per_row(reference.at_max(batch, options))
            if isinstance(at_max, Tensor) and batch.bad is not None:
                at_max = torch.where(batch.bad, 0, at_max)
    return Operands(
        logits=batch.logits,
        labels=None if batch.soft else batch.labels,
        counted=batch.counted,
        bad=batch.bad,
        class_mask=batch.class_mask,
        factor=weight,
        at_label=at_label,
        off=off,
        other_mass=other_mass,
        at_max=at_max,
        z_loss=options.z_loss,
        softcap=options.softcap,
        overwritten=what_is_overwritten(batch.given) if options.inplace_backward else None,
        with_stats=with_stats,
    ), entropy


def _per_row(value: float | Tensor) -> float | Tensor:
    """Drop the last dimension, of 1, that a smoothing per row has."""
    return value.squeeze(-1) if isinstance(value, Tensor) and value.ndim else value


def _entr(value: float | Tensor) -> float | Tensor:
    if isinstance(value, Tensor):
        entropy: Tensor = torch.special.entr(value)
        return entropy
    return -value * math.log(value) if value else 0.0


def _sum_of_others(values: Float[Tensor, " K"], batch: Batch) -> Float[Tensor, "*batch"]:
    """Return the sum of the values of all allowed classes but the label's.

    In float64, since the label's value may be most of the sum, and the difference is all that counts if `on` is 0.
    """
    if batch.class_mask is not None:
        values = torch.where(batch.class_mask, values, 0)
    values = values.double()
    return (torch.sum(values) - at_labels(values, batch.labels)).to(batch.dtype)


class _RowLosses(torch.autograd.Function):
    """The losses of rows from one sweep over the logits, and the gradient from another."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the losses, the sums that they are made of, stacked, and the index of the first largest logit."""
        operands = Operands._make(arguments)
        stacked, first = sweep(operands)
        losses, _, _ = losses_of(operands, unstacked(stacked))
        return losses, stacked, first

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor | None]) -> None:
        """Keep the operands and the sums."""
        _, stacked, first = output
        ctx.mark_non_differentiable(*([stacked] if first is None else [stacked, first]))
        ctx.set_materialize_grads(False)
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.numbers = [None if isinstance(value, Tensor) else value for value in inputs]
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        ctx.save_for_backward(stacked, *tensors)
        ctx.save_for_forward(stacked, *tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the logits, `at_label`, `off` and `at_max`."""
        operands, stacked = _kept(ctx)
        gradients: dict[str, Tensor | None] = {}
        if upstream is not None:
            plain = torch.is_grad_enabled() or not has_memory(upstream, operands.logits)
            if plain and operands.overwritten is not None:
                raise error("inplace_transformed")
            if plain:
                gradients = _plain_gradients(operands, upstream, ctx.needs_input_grad)
            else:
                gradients = _gradients(operands, unstacked(stacked), upstream, ctx.needs_input_grad)
        return tuple(gradients.get(name) for name in Operands._fields)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, None, None]:
        """Return the tangent of the losses."""
        operands, stacked = _kept(ctx)
        given = {name: t for name, t in zip(Operands._fields, tangents, strict=True) if t is not None}
        # The transpose of the gradient, which is linear in what comes from upstream: torch does not nest forward mode.
        pullback = _plain_pullback(operands, list(given))
        transposed = torch.func.vjp(pullback, torch.zeros_like(stacked[0]))[1]
        return transposed(given)[0], None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        """Take the new dimension as one more of rows."""
        operands = Operands._make(arguments)
        if operands.overwritten is not None:
            raise error("inplace_transformed")
        dims = Operands._make(in_dims)
        batch_ndim = operands.logits.ndim - (dims.logits is not None) - 1

        def in_front(name: str, last: int) -> Any:
            """Move the new dimension to the front, with ones up to the last dimensions of a row."""
            value, dim = getattr(operands, name), getattr(dims, name)
            if dim is None or not isinstance(value, Tensor):
                return value
            value = value.movedim(dim, 0)
            ones = (1,) * (batch_ndim + last + 1 - value.ndim)
            return value.reshape(info.batch_size, *ones, *value.shape[1:])

        moved = {name: in_front(name, 1) for name in ("logits", "class_mask", "factor")}
        rows = ("labels", "counted", "bad", "at_label", "off", "other_mass", "at_max")
        moved |= {name: in_front(name, 0) for name in rows}
        shape = torch.Size([info.batch_size, *moved["logits"].shape[-1 - batch_ndim :]])
        moved["logits"] = moved["logits"].expand(shape)
        for name in ("labels", "counted", "bad"):
            moved[name] = None if moved[name] is None else moved[name].expand(shape[:-1])
        losses, stacked, first = _RowLosses.apply(*operands._replace(**moved))  # type: ignore[no-untyped-call]
        return (losses, stacked, first), (0, 1, None if first is None else 0)


def _kept(ctx: Any) -> tuple[Operands, Tensor]:
    stacked, *tensors = ctx.saved_tensors
    remaining = iter(tensors)
    pairs = zip(ctx.is_tensor, ctx.numbers, strict=True)
    return Operands._make(next(remaining) if is_tensor else number for is_tensor, number in pairs), stacked


def losses_of(operands: Operands, sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses that the sums make, the losses without the z-loss, and the log-sum-exp."""
    lse = sums.peak + sums.log_sum
    smoothed = target_mass(operands, sums) * sums.log_sum
    smoothed = smoothed + _product(operands.at_label, sums.label_gap) + _product(operands.off, sums.other_gaps)
    if operands.at_max is not None and sums.largest_gap is not None:
        smoothed = smoothed + operands.at_max * sums.largest_gap
    if operands.bad is not None:
        # A factor, through which the gradient of the row becomes NaN as well.
        smoothed = smoothed * torch.where(operands.bad, torch.nan, 1)
    losses = smoothed + operands.z_loss * lse**2 if operands.z_loss else smoothed
    if operands.counted is not None:
        losses = losses.masked_fill(~operands.counted, 0)
    return losses, smoothed, lse


def _product(target: float | Tensor, gap: Tensor) -> Tensor | float:
    """Return target * gap, where 0 * inf counts as 0."""
    if not isinstance(target, Tensor):
        return target * gap if target else 0.0
    return target * _finite_where_zero(gap, target)


def _finite_where_zero(gap: Tensor, target: Tensor) -> Tensor:
    # Only infinite gaps are replaced: the derivative by the target is the gap.
    return torch.where((target == 0) & torch.isinf(gap), 0, gap)


def _gradients(
    operands: Operands, sums: Sums, upstream: Float[Tensor, "*batch"], needed: tuple[bool, ...]
) -> dict[str, Tensor | None]:
    """Return the gradient of each operand that needs one."""
    gradients = target_gradients(operands, sums, upstream, needed)
    if Operands._make(needed).logits:
        if operands.counted is not None:
            upstream = upstream.masked_fill(~operands.counted, 0)
        gradients["logits"] = logits_gradient(operands, sums, upstream)
    return gradients


def target_gradients(
    operands: Operands, sums: Sums, upstream: Float[Tensor, "*batch"], needed: tuple[bool, ...]
) -> dict[str, Tensor | None]:
    """Return the gradients of `at_label`, `off` and `at_max`, where needed; they need no logits."""
    needs = Operands._make(needed)
    gradients: dict[str, Tensor | None] = {}
    parts: dict[str, tuple[Tensor | None, Any]] = {
        "at_label": (sums.label_gap, 1),
        "off": (sums.other_gaps, operands.other_mass),
        "at_max": (None, sums.largest_mass),
    }
    for name, (gap, mass) in parts.items():
        target = getattr(operands, name)
        if getattr(needs, name):
            if operands.counted is not None:
                upstream = upstream.masked_fill(~operands.counted, 0)
            slope = mass * sums.log_sum
            if gap is not None:
                slope = slope + _finite_where_zero(gap, target)
            gradients[name] = (upstream * slope).sum_to_size(target.shape)
    return gradients


def plain_losses(operands: Operands) -> Float[Tensor, "*batch"]:
    """Return the losses in operations that torch differentiates."""
    sums, _ = _plain_sums(operands)
    losses, _, _ = losses_of(operands, sums)
    return losses


def _plain_sums(operands: Operands) -> tuple[Sums, Int[Tensor, "*batch"] | None]:
    """Return what `sweep` does, in operations that torch differentiates."""
    logits = operands.logits.to(compute_dtype(operands.logits))
    if operands.counted is not None:
        logits = torch.where(operands.counted[..., None], logits, 0)
    allowed = operands.class_mask
    if allowed is not None:
        logits = torch.where(allowed, logits, 0)
    capped = logits if operands.softcap is None else operands.softcap * torch.tanh(logits / operands.softcap)
    # The loss does not depend on the largest logit, which may count as a constant. And a target is one.
    constants = [logits.detach(), capped.detach()]
    if allowed is not None:
        constants = [torch.where(allowed, values, -torch.inf) for values in constants]
    largest = torch.amax(constants[0], dim=-1, keepdim=True)
    peak = torch.amax(constants[1], dim=-1, keepdim=True)
    gap = peak - capped
    if allowed is not None:
        gap = torch.where(allowed, gap, 0)
    # Each largest term is taken down to 0, and only one of them left out, so that small losses keep their accuracy.
    is_peak = (constants[1] == peak).to(peak.dtype)
    terms = torch.exp(-gap) - is_peak
    if allowed is not None:
        terms = torch.where(allowed, terms, 0)
    rest = torch.sum(terms, dim=-1) + (torch.sum(is_peak, dim=-1) - 1)

    label_gap, other_gap = torch.zeros_like(rest), gap
    if operands.labels is not None:
        is_label = torch.arange(gap.shape[-1], device=gap.device) == operands.labels[..., None]
        label_gap = torch.sum(torch.where(is_label, gap, 0), dim=-1)
        other_gap = torch.where(is_label, 0, gap)
    weight = operands.factor
    if weight is not None:
        other_gap = weight * torch.where((weight == 0) & torch.isinf(other_gap), 0, other_gap)
    num_largest = largest_mass = largest_gap = None
    if operands.at_max is not None:
        share = (constants[0] == largest).to(gap.dtype)
        num_largest = torch.sum(share, dim=-1)
        share = share / num_largest[..., None] if weight is None else share * weight / num_largest[..., None]
        largest_mass, largest_gap = torch.sum(share, dim=-1), torch.sum(share * gap, dim=-1)
    sums = Sums(
        peak.squeeze(-1),
        torch.log1p(rest),
        label_gap,
        torch.sum(other_gap, dim=-1),
        largest.squeeze(-1),
        num_largest,
        largest_mass,
        largest_gap,
    )
    return sums, torch.argmax(constants[0], dim=-1) if operands.with_stats else None


def _plain_gradients(
    operands: Operands, upstream: Float[Tensor, "*batch"], needed: tuple[bool, ...]
) -> dict[str, Tensor | None]:
    """Return what `_gradients` does, differentiable once more."""
    names = [name for name, need in zip(Operands._fields, needed, strict=True) if need]
    return _plain_pullback(operands, names)(upstream)


def _plain_pullback(operands: Operands, names: list[str]) -> Callable[[Tensor], dict[str, Any]]:
    """Return the function from what comes from upstream to the gradients of the operands of these names."""
    primals = {name: getattr(operands, name) for name in names}
    pullback = torch.func.vjp(lambda of: plain_losses(operands._replace(**of)), primals)[1]
    return lambda upstream: pullback(upstream)[0]
