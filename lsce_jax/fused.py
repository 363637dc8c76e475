r"""The fast implementation: no target is written out, and nothing as large as the logits is kept for the gradient.

An integer label's target is `on` at the label y and `off` times a weight w_k elsewhere, so the loss of a row needs a
few sums over the classes and nothing else that is K wide. With m the largest logit,

    rest = sum_k exp(z_k - m) - 1    label_gap = m - z_y    other_gaps = sum_{k != y} w_k (m - z_k)

    loss = on w_y label_gap + off other_gaps + S log1p(rest) + z_loss (m + log1p(rest))^2 - H(q)

All else is arithmetic on one number per row. The loss does not depend on m, which may therefore count as a constant.

Why a custom_jvp and not a custom_vjp: forward mode and derivatives of every order follow from it. Its tangent is that
of the plain sums at a constant m, under `jax.checkpoint`, so what the backward pass keeps is the logits and m, and the
gradient is one fused pass that computes exp again. That costs less than to write exp to memory and read it back.

Why two ways to the sums: XLA for accelerators fuses all of them into one sweep over the logits. XLA for CPUs writes
every comparison of a term out, as large as the logits; so there the sums go through blocks of rows, whose intermediate
arrays stay in the cache. On accelerators the label is found by comparison with an iota, not by a gather, for which the
TPU compiler would write out the logits in float32.

Soft labels are as wide as the logits anyway. They take the reference under `jax.checkpoint`.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.scipy.special import entr
from jaxtyping import Array, Bool, Float, Int

from lsce_jax import reference
from lsce_jax.inputs import Batch, at_labels, compute_dtype, is_sharded
from lsce_jax.stats import LossStats, make_stats
from lsce_spec import LossOptions

# Elements of a block of rows: 1 MiB in float32, so that the few arrays that a block needs fit into the cache.
_BLOCK_SIZE = 2**18


class _Plan(NamedTuple):
    """Which sums are needed; hashable, so that compiled functions can be kept by it."""

    softcap: float | None
    prior_entropy: bool
    largest: bool
    correct: bool
    block_size: int
    in_loop: bool  # whether within a loop that JAX may differentiate twice


class _Operands(NamedTuple):
    """What the sums are taken over. `prior` and `class_weight` multiply the target away from the label."""

    logits: Float[Array, "*batch K"]
    labels: Int[Array, "*batch"]
    counted: Bool[Array, "*batch"] | None
    class_mask: Bool[Array, " K"] | None
    prior: Float[Array, " K"] | None
    class_weight: Float[Array, " K"] | None


class _Peaks(NamedTuple):
    """What counts as a constant to the derivatives."""

    peak: Float[Array, "*batch"]  # the largest logit m, after the softcap
    largest: Float[Array, "*batch"]  # the largest logit before the softcap, which makes large logits equal
    correct: Float[Array, "*batch"] | None  # above 0 where the label is the first largest logit


class _Sums(NamedTuple):
    """One number per row of each; None where the plan or the operands have no use for it."""

    rest: Float[Array, "*batch"]  # sum of exp(z - m), less 1
    label_gap: Float[Array, "*batch"]  # m - z at the label
    other_gaps: Float[Array, "*batch"]  # sum of w (m - z) over the other classes
    other_mass: Float[Array, "*batch"] | None  # sum of w over the other classes
    other_prior: Float[Array, "*batch"] | None  # sum of the prior over the other classes
    other_entropy: Float[Array, "*batch"] | None  # sum of -prior log prior over the other classes
    largest_gap: Float[Array, "*batch"] | None  # mean of w (m - z) over the largest logits
    largest_mass: Float[Array, "*batch"] | None  # mean of w over the largest logits


class Targets(NamedTuple):
    """What makes the target of an integer label, for all rows or for each; see `make_targets`."""

    on: Float[Array, "*#batch"]
    off: Float[Array, "*#batch"]
    at_max: Float[Array, "*#batch"] | None


def make_targets(batch: Batch, options: LossOptions) -> Targets:
    """Return the unweighted target at the label, but for a prior; what it is proportional to elsewhere; and `at_max`.

    From the smoothing itself where that is a number: in float32 1 - 0.99999 would be 0.1 % off.
    """
    on, off = reference.on_off(batch, options) if batch.prior is None else (1 - batch.smoothing, batch.smoothing)
    at_max = None if options.convention.at_max is None else _per_row(reference.at_max(batch, options), batch)
    return Targets(_per_row(on, batch), _per_row(off, batch), at_max)


def row_losses(
    batch: Batch,
    options: LossOptions,
    with_stats: bool = False,
    targets: Targets | None = None,
    in_loop: bool = False,
) -> tuple[Float[Array, "*batch"], LossStats | None]:
    """Return the loss of each row, 0 for rows that do not count and NaN for bad labels, and the statistics if asked.

    Args:
        batch: the rows.
        options: of the loss.
        with_stats: whether to return statistics.
        targets: those of the rows; None makes them from the batch's smoothing.
        in_loop: whether the call is within a loop of this package's, with derivatives of any order.
    """
    if batch.soft:
        kept: tuple[Array, LossStats | None] = jax.checkpoint(
            lambda: reference.row_losses(batch, options, with_stats)
        )()
        return kept
    plan = _Plan(
        softcap=options.softcap,
        prior_entropy=options.subtract_entropy and batch.prior is not None,
        largest=options.convention.at_max is not None,
        correct=with_stats,
        block_size=_BLOCK_SIZE,
        in_loop=in_loop,
    )
    operands = _Operands(
        batch.logits, batch.labels.astype(jnp.int32), batch.counted, batch.class_mask, batch.prior, batch.class_weight
    )
    peaks, sums = _peaks_and_sums(plan, operands)
    log_sum = jnp.log1p(sums.rest)
    lse = peaks.peak + log_sum

    targets = targets or make_targets(batch, options)
    on, off, num_others = _on_off_others(batch, targets, sums)
    at_label, other_mass = on, num_others
    if batch.class_weight is not None:
        at_label = on * at_labels(batch.class_weight, batch.labels)
    if sums.other_mass is not None:
        other_mass = sums.other_mass
    mass = at_label + off * other_mass
    smoothed = _product(at_label, sums.label_gap) + _product(off, sums.other_gaps)
    if targets.at_max is not None:
        at_max = jnp.where(jnp.asarray(batch.bad), 0, targets.at_max)
        smoothed += at_max * sums.largest_gap
        mass += at_max * sums.largest_mass
    smoothed += mass * log_sum
    if options.subtract_entropy:
        smoothed -= _entropy(on, off, num_others, sums)
    losses = smoothed + options.z_loss * lse**2 if options.z_loss else smoothed
    if batch.counted is not None:
        losses = jnp.where(batch.counted, losses, 0)
    if peaks.correct is None:
        return losses, None
    nll, correct = log_sum + sums.label_gap, peaks.correct > 0
    return losses, make_stats(batch, options, nll=nll, smoothed=smoothed, lse=lse, log_sum=log_sum, correct=correct)


def _on_off_others(
    batch: Batch, targets: Targets, sums: _Sums
) -> tuple[Float[Array, "*#batch"], Float[Array, "*#batch"], Float[Array, "*#batch"]]:
    """Return the unweighted target at the label, what it is proportional to elsewhere, and the sum of that."""
    on, off = targets.on, targets.off
    if batch.prior is None:
        num_others = jnp.asarray(reference.count_allowed(batch) - 1, batch.dtype)
    else:
        on = on + off * at_labels(batch.prior, batch.labels)
        num_others = jnp.asarray(sums.other_mass if sums.other_prior is None else sums.other_prior)
    # NaN at the label makes loss and gradient NaN; 0 elsewhere leaves the derivatives of all else alone.
    bad = jnp.asarray(batch.bad)
    return jnp.where(bad, jnp.nan, on), jnp.where(bad, 0, off), num_others


def _per_row(value: float | Array, batch: Batch) -> Float[Array, "*#batch"]:
    """Return a number, or an array with a last dimension of 1, as an array over the rows."""
    value = jnp.asarray(value, batch.dtype)
    return jnp.squeeze(value, axis=-1) if value.ndim else value


def _product(target: Float[Array, "*#batch"], gap: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Return target * gap, where 0 * inf counts as 0."""
    # Only infinite gaps are replaced: the derivative by the target is the gap.
    return target * jnp.where((target == 0) & jnp.isinf(gap), 0, gap)


def _entropy(
    on: Float[Array, "*#batch"], off: Float[Array, "*#batch"], num_others: Float[Array, "*#batch"], sums: _Sums
) -> Float[Array, "*#batch"]:
    """Return the entropy of the target: that of `off` times a prior r is off entr(r_k) + r_k entr(off), summed."""
    entropy: Array = entr(on) + num_others * entr(off)
    return entropy if sums.other_entropy is None else entropy + off * sums.other_entropy


@partial(jax.jit, static_argnums=0)
def _peaks_and_sums(plan: _Plan, operands: _Operands) -> tuple[_Peaks, _Sums]:
    """Return the sums of each row. Compiled, so that calls outside `jit` are fused as well."""
    return _differentiable(plan, operands)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(plan: _Plan, operands: _Operands) -> tuple[_Peaks, _Sums]:
    # Where JAX differentiates a scan twice, it drops the rule of a custom_jvp, and cannot go on at a custom_vmap.
    results: tuple[_Peaks, _Sums] = _for_platform(plan, operands) if plan.in_loop else _in_blocks(plan)(operands)
    return results


@_differentiable.defjvp
def _derivative(
    plan: _Plan, primals: tuple[_Operands], tangents: tuple[_Operands]
) -> tuple[tuple[_Peaks, _Sums], tuple[_Peaks, _Sums]]:
    peaks, sums = _differentiable(plan, *primals)

    # Nothing is kept but what comes in; the backward pass computes exp again.
    @jax.checkpoint
    def at_peaks(operands: _Operands) -> _Sums:
        return _sums(plan, operands, peaks, differentiable=True)

    _, tangents_out = jax.jvp(at_peaks, primals, tangents)
    # The barrier's transpose is one too: what comes back for each row is computed once, not for every class again.
    # One for each of them: JAX 0.12 cannot transpose a barrier of which a part is known to be zero.
    tangents_out = jax.tree.map(jax.lax.optimization_barrier, tangents_out)
    return (peaks, sums), (jax.tree.map(jnp.zeros_like, peaks), tangents_out)


@cache
def _in_blocks(plan: _Plan) -> Callable[[_Operands], tuple[_Peaks, _Sums]]:
    """Return the function of the operands that the plan asks for."""

    @custom_vmap
    def peaks_and_sums(operands: _Operands) -> tuple[_Peaks, _Sums]:
        return _for_platform(plan, operands)

    @peaks_and_sums.def_vmap
    def batched(
        size: int, batched_arguments: list[_Operands], operands: _Operands
    ) -> tuple[tuple[_Peaks, _Sums], tuple[_Peaks, _Sums]]:
        """Rows in one dimension more: so a loss for one row under vmap is as fast as one for a batch."""
        is_batched = batched_arguments[0]
        vectors = ("class_mask", "prior", "class_weight")
        if any(getattr(is_batched, name) is True for name in vectors):
            axes = jax.tree.map(lambda batched: 0 if batched else None, is_batched)
            out = jax.vmap(partial(_whole, plan), in_axes=(axes,), axis_size=size)(operands)
        else:
            rows = {name: getattr(operands, name) for name in ("logits", "labels", "counted")}
            rows = {
                name: rows[name]
                if rows[name] is None or getattr(is_batched, name)
                else jnp.broadcast_to(rows[name], (size, *rows[name].shape))
                for name in rows
            }
            out = peaks_and_sums(operands._replace(**rows))
        return out, jax.tree.map(lambda _: True, out)

    return peaks_and_sums


def _for_platform(plan: _Plan, operands: _Operands) -> tuple[_Peaks, _Sums]:
    # Rows that are divided over devices would have to move; and of a symbolic number there is no last block.
    if is_sharded(operands.logits) or not all(isinstance(size, int) for size in operands.logits.shape):
        return _whole(plan, operands)
    peaks, sums = jax.lax.platform_dependent(operands, cpu=partial(_blocked, plan), default=partial(_whole, plan))
    return peaks, sums


def _blocked(plan: _Plan, operands: _Operands) -> tuple[_Peaks, _Sums]:
    """Return the sums, a block of rows at a time."""
    *batch_shape, num_classes = operands.logits.shape
    num_rows, block_rows = math.prod(batch_shape), max(1, plan.block_size // num_classes)
    if num_rows <= block_rows:
        # A product that makes the logits would be fused into some of their uses and not into others, which round it
        # otherwise: then the largest logit is not equal to itself. Nothing is fused through a choice.
        logits = jnp.where(jnp.isnan(operands.logits), jnp.nan, operands.logits)
        return _whole(plan, operands._replace(logits=logits), gather=True)
    flat = operands._replace(
        logits=operands.logits.reshape(num_rows, num_classes),
        labels=operands.labels.reshape(num_rows),
        counted=None if operands.counted is None else operands.counted.reshape(num_rows),
    )

    def rows_from(start: Array) -> tuple[_Peaks, _Sums]:
        def block(rows: Array) -> Array:
            if rows.dtype != jnp.bfloat16:
                return jax.lax.dynamic_slice_in_dim(rows, start, block_rows)
            # As integers, or XLA would widen all of them to float32 before the loop.
            bits = jax.lax.bitcast_convert_type(rows, jnp.uint16)
            part = jax.lax.dynamic_slice_in_dim(bits, start, block_rows)
            return jax.lax.bitcast_convert_type(part, jnp.bfloat16)

        counted = None if flat.counted is None else block(flat.counted)
        rows_of_block = flat._replace(logits=block(flat.logits), labels=block(flat.labels), counted=counted)
        return _whole(plan, rows_of_block, gather=True)

    def step(i: Array, results: tuple[_Peaks, _Sums]) -> tuple[_Peaks, _Sums]:
        # Dynamic slices move a start back that leaves too few rows: the last block may begin within the one before it.
        start = i * block_rows
        peaks, sums = jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=0),
            results,
            rows_from(start),
        )
        return peaks, sums

    shapes = jax.eval_shape(rows_from, jnp.int32(0))
    results: tuple[_Peaks, _Sums] = jax.tree.map(lambda part: jnp.zeros(num_rows, part.dtype), shapes)
    results = jax.lax.fori_loop(0, -(-num_rows // block_rows), step, results)
    peaks, sums = jax.tree.map(lambda rows: rows.reshape(batch_shape), results)
    return peaks, sums


def _whole(plan: _Plan, operands: _Operands, gather: bool = False) -> tuple[_Peaks, _Sums]:
    """Return the sums of all rows at once."""
    raw, capped, allowed = _logits(plan, operands)
    if allowed is not None:
        raw, capped = (jnp.where(allowed, values, -jnp.inf) for values in (raw, capped))
    constant = jax.lax.stop_gradient((raw, capped))
    largest, correct = jnp.max(constant[0], axis=-1), None
    if plan.correct:
        # A sum, to be one more of the sweep: 1 for the label and -1 for each class before it, if they are largest.
        classes, labels = _classes(raw), operands.labels[..., None]
        score = (classes == labels).astype(raw.dtype) - (classes < labels).astype(raw.dtype)
        correct = jnp.sum(jnp.where(constant[0] == largest[..., None], score, 0), axis=-1)
    peaks = _Peaks(largest if plan.softcap is None else jnp.max(constant[1], axis=-1), largest, correct)
    return peaks, _sums(plan, operands, peaks, gather=gather)


def _sums(
    plan: _Plan, operands: _Operands, peaks: _Peaks, *, differentiable: bool = False, gather: bool = False
) -> _Sums:
    """Return the sums at given peaks.

    Args:
        plan: which sums.
        operands: what to sum.
        peaks: of these operands.
        differentiable: whether only the derivatives are needed, not accurate values.
        gather: whether to find what is at the label by index, and not by comparison.
    """
    raw, capped, allowed = _logits(plan, operands)
    gap = peaks.peak[..., None] - capped
    if allowed is not None:
        gap = jnp.where(allowed, gap, 0)
    terms, num_peaks = jnp.exp(-gap), jnp.ones((), gap.dtype)
    if not differentiable:
        # Without the largest terms, all of them 1, small losses keep their accuracy.
        # Behind a softcap XLA may fuse its product into the gap, which is then not quite 0 at the peak: ask the logits.
        is_peak = gap <= 0 if plan.softcap is None else jax.lax.stop_gradient(raw) >= peaks.largest[..., None]
        is_peak = is_peak if allowed is None else is_peak & allowed
        # Left out by subtraction, which is exact and keeps their derivatives.
        terms = jnp.where(is_peak, terms - jax.lax.stop_gradient(terms), terms)
        num_peaks = jnp.sum(is_peak, axis=-1, dtype=gap.dtype)
    if allowed is not None:
        terms = jnp.where(allowed, terms, 0)

    is_label = _classes(gap) == operands.labels[..., None]
    is_other = ~is_label if allowed is None else ~is_label & allowed
    prior, weight = (
        None if vector is None else vector.reshape((1,) * (gap.ndim - 1) + (-1,))
        for vector in (operands.prior, operands.class_weight)
    )
    factor = prior if weight is None else weight if prior is None else prior * weight
    other_gap = jnp.where(is_label, 0, gap)
    if factor is not None:
        other_gap = factor * jnp.where((factor == 0) & jnp.isinf(other_gap), 0, other_gap)
    largest_gap = largest_mass = None
    if plan.largest:
        is_largest = jax.lax.stop_gradient(raw) == peaks.largest[..., None]
        if allowed is not None:
            is_largest = is_largest & allowed
        share = is_largest.astype(gap.dtype)
        share = share / jnp.sum(share, axis=-1, keepdims=True)
        if weight is not None:
            share = share * weight
        largest_gap = jnp.sum(share * jnp.where(is_largest, gap, 0), axis=-1)
        largest_mass = jnp.sum(share, axis=-1)

    if gather:
        label_gap = jnp.take_along_axis(gap, operands.labels[..., None], axis=-1)[..., 0]
    else:
        label_gap = jnp.sum(jnp.where(is_label, gap, 0), axis=-1)

    def total_of_others(values: Array) -> Array:
        return jnp.sum(jnp.where(is_other, values, 0), axis=-1)

    return _Sums(
        rest=jnp.sum(terms, axis=-1) + (num_peaks - 1),
        label_gap=label_gap,
        other_gaps=jnp.sum(other_gap, axis=-1),
        other_mass=None if factor is None else total_of_others(factor),
        other_prior=None if prior is None or weight is None else total_of_others(prior),
        # The slope of entr is infinite at 0, where a prior is 0 for good.
        other_entropy=None
        if prior is None or not plan.prior_entropy
        else total_of_others(entr(jnp.where(prior == 0, 1, prior))),
        largest_gap=largest_gap,
        largest_mass=largest_mass,
    )


def _logits(
    plan: _Plan, operands: _Operands
) -> tuple[Float[Array, "*batch K"], Float[Array, "*batch K"], Bool[Array, "*ones K"] | None]:
    """Return the logits before and after the softcap, 0 where they do not count, and the mask."""
    raw = operands.logits.astype(compute_dtype(operands.logits))
    if operands.counted is not None:
        raw = jnp.where(operands.counted[..., None], raw, 0)
    allowed = None
    if operands.class_mask is not None:
        allowed = operands.class_mask.reshape((1,) * (raw.ndim - 1) + (-1,))
        raw = jnp.where(allowed, raw, 0)
    return raw, raw if plan.softcap is None else plan.softcap * jnp.tanh(raw / plan.softcap), allowed


def _classes(like: Float[Array, "*batch K"]) -> Int[Array, "*ones K"]:
    return jax.lax.broadcasted_iota(jnp.int32, (1,) * (like.ndim - 1) + like.shape[-1:], like.ndim - 1)
