r"""The fast implementation: it writes no target, and keeps nothing as large as the logits for `backward`.

An integer label's target is `on` at the label y and `off` times a weight w_k elsewhere, so the loss of a row needs only
a few sums over the classes. With m the largest logit and L = log sum_k exp(z_k - m),

    loss = on w_y (m - z_y) + off sum_{k != y} w_k (m - z_k) + S L + z_loss (m + L)^2 - H(q)

and the gradient, (S + 2 z_loss (m + L)) p - w q, comes from the logits in a second sweep. `sweeps.py` has both sweeps.
Plain smoothing on the CPU takes `lean.py` instead where it can.

`_RowLosses` makes them differentiable, with a rule for vmap (the new dimension becomes one of rows) and forward mode.
Second derivatives, forward mode, torch.compile and TPUs use `plain.py`: the same sums and gradients in plain
operations, which torch differentiates and the compiler fuses.

Soft labels take the same way, with a weight for each row. A `class_weight` or `prior` that requires a gradient takes
the reference, as do the rarer combinations that `why_reference` lists.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lsce_spec import LossOptions
from lsce_torch import kernels, reference, saved
from lsce_torch.accurate import entr
from lsce_torch.device import takes_plain_operations
from lsce_torch.errors import error
from lsce_torch.inputs import Batch, at_labels
from lsce_torch.memory import in_large_pages
from lsce_torch.overwrite import forbid_use, has_memory, is_wrapper
from lsce_torch.plain import plain_gradients, plain_sums, plain_tangents
from lsce_torch.stats import LossStats, make_stats
from lsce_torch.sums import (
    ROWS,
    Operands,
    Sums,
    Upstreams,
    losses_of,
    statistics_of,
    target_gradients,
    target_slopes,
    unstacked,
)
from lsce_torch.sweeps import logits_gradient, sweep


def row_losses(
    batch: Batch, options: LossOptions, with_stats: bool = False, differentiable: bool = False
) -> tuple[Float[Tensor, "*batch"], LossStats | None]:
    """Return the loss of each row, 0 for rows that do not count and NaN for bad labels, and the statistics if asked.

    `differentiable` says whether gradients flow through the statistics.
    """
    operands, entropy = make_operands(batch, options, with_stats, differentiable)
    losses: Tensor
    statistics: tuple[Tensor, Tensor, Tensor] | None = None
    if torch.compiler.is_compiling() or takes_plain_operations(batch.logits):
        sums, first = plain_sums(batch.logits, operands)
        losses = losses_of(operands, sums)[0]
    else:
        losses, stacked, first, *rows = _RowLosses.apply(batch.logits, batch.overwritten, *operands)  # type: ignore[no-untyped-call]
        sums = unstacked(stacked)
        statistics = (rows[0], rows[1], rows[2]) if differentiable else None
    if entropy is not None:
        losses = losses - entropy
        if batch.counted is not None:
            losses = torch.where(batch.counted, losses, 0)
    if first is None:
        return losses, None
    return losses, stats_of(batch, options, operands, entropy, sums, first, statistics)


def stats_of(
    batch: Batch,
    options: LossOptions,
    operands: Operands,
    target_entropy: float | Float[Tensor, "*#batch"] | None,
    sums: Sums,
    first: Int[Tensor, "*batch"],
    statistics: tuple[Tensor, Tensor, Tensor] | None,
) -> LossStats:
    """Return the statistics of rows from their sums.

    Args:
        batch: of these rows.
        options: of the call.
        operands: of these rows.
        target_entropy: what the loss subtracts, or None.
        sums: of these rows.
        first: index of the first largest logit.
        statistics: those of `statistics_of` with their derivatives, or None if these are those of the sums.
    """
    nll, lse, entropy = statistics_of(operands, sums) if statistics is None else statistics
    with torch.no_grad():
        smoothed = losses_of(operands, sums)[1]
        if target_entropy is not None:
            smoothed = smoothed - target_entropy
    return make_stats(
        batch,
        options,
        nll=nll,
        smoothed=smoothed,
        lse=lse,
        log_sum=sums.log_sum,
        first=first,
        entropy=entropy,
        differentiable=operands.differentiable,
    )


def why_reference(batch: Batch, options: LossOptions, with_stats: bool) -> str | None:
    """Return why only the reference can compute this call, or None."""
    if batch.logits.device.type == "jax":
        return "the logits are JAX's, through torchax, which cannot write into what it is given"
    if batch.overwritten is not None and takes_plain_operations(batch.logits):
        return "a TPU's compiler decides what is written where"
    if not torch.compiler.is_compiling() and any(map(is_wrapper, vars(batch).values())):
        return "one of the tensors stands for others, and its results cannot be written into plain tensors"
    for name in ("class_weight", "prior"):
        vector = getattr(batch, name)
        if vector is not None and vector.requires_grad:
            return f"{name} requires a gradient"
    return _why_reference_of_soft(batch, options, with_stats) if batch.soft else None


def _why_reference_of_soft(batch: Batch, options: LossOptions, with_stats: bool) -> str | None:
    if batch.labels.requires_grad or (isinstance(batch.smoothing, Tensor) and batch.smoothing.requires_grad):
        return "soft labels or their smoothing require a gradient"
    if options.convention.at_max is not None:
        return f"convention {options.convention.name!r} compares soft labels with every logit"
    return "the statistics of soft labels need the labels once more" if with_stats else None


# Products of class weights and masks that are added up at a time.
_MOST_PRODUCTS = 2**20


class Target(NamedTuple):
    """The weighted target of rows, as `Operands` describes it, and its entropy if the loss subtracts it."""

    factor: Float[Tensor, "*#batch K"] | None
    on: float | Float[Tensor, "*#batch"]
    off: float | Float[Tensor, "*#batch"]
    other_mass: float | Float[Tensor, "*#batch"]
    at_max: float | Float[Tensor, "*#batch"] | None
    entropy: float | Float[Tensor, "*#batch"] | None


def make_operands(
    batch: Batch, options: LossOptions, with_stats: bool, differentiable: bool
) -> tuple[Operands, float | Float[Tensor, "*#batch"] | None]:
    """Return the operands, and the entropy of the target if the loss subtracts it."""
    target = soft_target(batch, options) if batch.soft else _index_target(batch, options)
    return Operands(
        labels=None if batch.soft else batch.labels,
        counted=batch.counted,
        bad=batch.bad,
        class_mask=batch.class_mask,
        factor=target.factor,
        on=target.on,
        off=target.off,
        other_mass=target.other_mass,
        at_max=target.at_max,
        z_loss=options.z_loss,
        softcap=options.softcap,
        with_stats=with_stats,
        differentiable=differentiable,
        kernels=kernels.may_compute(options.implementation, batch.logits),
    ), target.entropy


def soft_target(batch: Batch, options: LossOptions) -> Target:
    """Return the target of soft labels: all of it is in the factor, none at a label."""
    target = reference.target_distribution(batch, options)
    factor = target if batch.class_weight is None else target * batch.class_weight
    entropy = torch.sum(reference.entropy_terms(target, batch), dim=-1) if options.subtract_entropy else None
    return Target(factor, 0.0, 1.0, torch.sum(factor, dim=-1), None, entropy)


def _index_target(batch: Batch, options: LossOptions) -> Target:
    """Return the target of integer labels."""

    def at_label(values: Tensor) -> Tensor:
        return at_labels(values, batch.labels)

    def of_others(_: str, values: Tensor) -> Tensor:
        return sum_of_others(values, batch.class_mask, at_label).to(batch.dtype)

    return index_target(batch, options, lambda _, values: at_label(values), of_others)


# Returns a number of each row, of the vector over the classes that has that name.
_OfClasses = Callable[[str, Float[Tensor, " K"]], Float[Tensor, "*batch"]]


def class_vectors(batch: Batch, options: LossOptions) -> dict[str, Float[Tensor, " K"]]:
    """Return the vectors over the classes that the target of integer labels depends on, by name."""
    vectors: dict[str, Tensor] = {}
    if batch.prior is not None:
        vectors["prior"] = batch.prior
        if options.subtract_entropy:
            # The slope of entr is infinite at 0. Where the prior is 0, the target is 0 for any smoothing.
            vectors["entropy of the prior"] = entr(torch.where(batch.prior == 0, 1, batch.prior))
    if batch.class_weight is not None:
        vectors["class_weight"] = batch.class_weight
    if batch.prior is not None and batch.class_weight is not None:
        vectors["factor"] = batch.prior * batch.class_weight
    elif batch.prior is not None or batch.class_weight is not None:
        vectors["factor"] = vectors["class_weight" if batch.prior is None else "prior"]
    return vectors


def index_target(batch: Batch, options: LossOptions, at_label: _OfClasses, of_others: _OfClasses) -> Target:
    """Return the target of integer labels.

    Args:
        batch: of the rows.
        options: of the call.
        at_label: returns the value at each row's label, of one of `class_vectors`.
        of_others: returns the sum over the other classes of the mask.
    """
    on: float | Tensor
    off: float | Tensor
    num_others: float | Tensor
    vectors = class_vectors(batch, options)
    num_others = _per_row(reference.count_allowed(batch)) - 1
    if batch.prior is None:
        on, off = (_per_row(value) for value in reference.on_off(batch, options))
    else:
        off, num_others = _per_row(batch.smoothing), of_others("prior", vectors["prior"])
        on = 1 - off + off * at_label("prior", vectors["prior"])
    if batch.bad is not None and not isinstance(batch.smoothing, float):
        # A row with a bad label gives the smoothing no derivative.
        on, off = (torch.where(batch.bad, 0, reference.as_tensor(value, batch)) for value in (on, off))
    entropy = None
    if options.subtract_entropy:
        entropy = _entr(on) + num_others * _entr(off)
        if batch.prior is not None:
            entropy = entropy + off * of_others("entropy of the prior", vectors["entropy of the prior"])
    if batch.class_weight is not None:
        on = on * at_label("class_weight", vectors["class_weight"])
    at_max: float | Tensor | None = None
    if options.convention.at_max is not None:
        at_max = _per_row(reference.at_max(batch, options))
        if isinstance(at_max, Tensor) and batch.bad is not None:
            at_max = torch.where(batch.bad, 0, at_max)
    factor = vectors.get("factor")
    return Target(factor, on, off, num_others if factor is None else of_others("factor", factor), at_max, entropy)


def _per_row(value: float | Tensor) -> float | Tensor:
    """Drop the last dimension, of size 1, of a tensor with one value per row."""
    return value.squeeze(-1) if isinstance(value, Tensor) and value.ndim else value


def _entr(value: float | Tensor) -> float | Tensor:
    if isinstance(value, Tensor):
        return entr(value)
    return -value * math.log(value) if value else 0.0


def sum_of_others(
    values: Float[Tensor, " K"], mask: Bool[Tensor, "*#batch K"] | None, at_label: Callable[[Tensor], Tensor]
) -> Float[Tensor, "*batch"]:
    """Return the sum of the values of all allowed classes but the label's.

    In float64: the label's value may be most of the sum, and the difference is the whole target if `on` is 0.

    Args:
        values: one for each class.
        mask: the classes that are allowed, of all rows or of each.
        at_label: returns the entry of a vector over the classes, or of one for each row, at each row's label.
    """
    values = values.double()
    if mask is not None and mask.ndim > 1:
        return _sums_of_rows(values, mask) - at_label(values).masked_fill(~at_label(mask), 0)
    if mask is not None:
        values = torch.where(mask, values, 0)
    return torch.sum(values) - at_label(values)


def _sums_of_rows(values: Float[Tensor, " K"], mask: Bool[Tensor, "*batch K"]) -> Float[Tensor, "*batch"]:
    """Return the sum of the values in the mask of each row, some rows at a time: the products are as many as logits."""
    rows = mask.reshape(math.prod(mask.shape[:-1]), mask.shape[-1])
    step = rows.shape[0] if torch.compiler.is_compiling() else max(1, _MOST_PRODUCTS // max(1, mask.shape[-1]))
    if rows.shape[0] <= step:
        return torch.sum(torch.where(mask, values, 0), dim=-1)
    sums = [torch.sum(torch.where(part, values, 0), dim=-1) for part in torch.split(rows, step)]
    return torch.cat(sums).reshape(mask.shape[:-1])


class _Logits(NamedTuple):
    logits: Float[Tensor, "*batch K"]
    overwritten: Any  # see `Batch`


class _RowLosses(torch.autograd.Function):
    """The losses of rows from one sweep over the logits, and the gradient from another."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
        """Return the losses, their `Sums`, stacked, and the index of the first largest logit.

        Behind them come the statistics that gradients flow through, or None for each.
        """
        (logits, _), operands = saved.grouped(arguments, _Logits, Operands)
        losses, stacked, first = sweep(logits, operands)
        return losses, stacked, first, *statistics_or_none(operands, stacked)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        """Keep the arguments and the sums."""
        _, stacked, first, *_ = output
        assert stacked is not None
        ctx.mark_non_differentiable(*([stacked] if first is None else [stacked, first]))
        saved.save(ctx, (stacked,), inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to the logits, `on`, `off` and `at_max`."""
        (stacked,), (logits, overwritten), operands = saved.saved(ctx, _Logits, Operands)
        gradients: dict[str, Tensor | None] = {}
        upstreams = Upstreams(upstream, *others[2:])
        if not upstreams.present:
            return saved.in_order(gradients, _Logits, Operands)
        needed = saved.needed_by(ctx, _Logits, Operands)
        if torch.is_grad_enabled() or not has_memory(*upstreams.present, logits):
            if overwritten is not None:
                raise error("inplace_transformed")
            gradients = plain_gradients(logits, operands, needed, upstreams)
            of_logits = gradients.get("logits")
            if of_logits is not None:
                gradients["logits"] = of_logits.to(logits.dtype)
        else:
            if upstream is not None:
                gradients = target_gradients(operands, target_slopes(operands, unstacked(stacked), needed), upstream)
            if "logits" in needed:
                gradient = in_large_pages(torch.empty_like(logits)) if overwritten is None else logits.detach()
                logits_gradient(logits, operands, stacked, upstreams, gradient)
                forbid_use(overwritten or ())
                gradients["logits"] = gradient
        return saved.in_order(gradients, _Logits, Operands)

    @staticmethod
    @saved.nestable
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the tangents of the losses and the statistics."""
        _, (logits, _), operands = saved.saved(ctx, _Logits, Operands)
        of_loss, *others = plain_tangents(logits, operands, saved.given(tangents, _Logits, Operands))
        return of_loss, None, None, *others

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        """Make the new dimension one of rows."""
        (logits, overwritten), operands = saved.grouped(arguments, _Logits, Operands)
        if overwritten is not None:
            raise error("inplace_transformed")
        (logits_dim, _), dims = saved.grouped(in_dims, _Logits, Operands)
        batch_ndim = logits.ndim - (logits_dim is not None) - 1

        def in_front(value: Any, dim: int | None, last: int) -> Any:
            """Move the new dimension to the front, with ones up to the last dimensions of a row."""
            if dim is None or not isinstance(value, Tensor):
                return value
            value = value.movedim(dim, 0)
            ones = (1,) * (batch_ndim + last + 1 - value.ndim)
            return value.reshape(info.batch_size, *ones, *value.shape[1:])

        logits = in_front(logits, logits_dim, 1)
        logits = logits.expand(info.batch_size, *logits.shape[-1 - batch_ndim :])
        last_dims = dict.fromkeys(("class_mask", "factor"), 1) | dict.fromkeys(ROWS, 0)
        moved = {name: in_front(getattr(operands, name), getattr(dims, name), last) for name, last in last_dims.items()}
        for name in ("labels", "counted", "bad"):
            moved[name] = None if moved[name] is None else moved[name].expand(logits.shape[:-1])
        results = _RowLosses.apply(logits, None, *operands._replace(**moved))  # type: ignore[no-untyped-call]
        _, _, *others = results
        return results, (0, 1, *(None if of_rows is None else 0 for of_rows in others))


def statistics_or_none(operands: Operands, stacked: Float[Tensor, "sums ..."]) -> tuple[Tensor | None, ...]:
    """Return the statistics of `statistics_of` if gradients flow through them, otherwise None for each."""
    return statistics_of(operands, unstacked(stacked)) if operands.differentiable else (None, None, None)
