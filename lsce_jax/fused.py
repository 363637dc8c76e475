r"""The fast implementation: it never writes a target out, and keeps nothing as large as the logits for the gradient.

The target of an integer label is `on` at the label y and `off` times a weight w_k at every other class. So the loss of
a row is made of a few sums over the classes. With m the largest logit,

    rest = sum_k exp(z_k - m) - 1    label_gap = m - z_y    other_gaps = sum_{k != y} w_k (m - z_k)

    loss = on w_y label_gap + off other_gaps + S log1p(rest) + z_loss (m + log1p(rest))^2 - H(q)

Everything else is arithmetic on one number per row. The loss does not depend on m, so m counts as a constant.

The sums are a JAX primitive, `lsce_row_sums`, with one rule for each thing that JAX does to a function:

- Its derivative is that of the plain sums at a constant m, under `jax.checkpoint`. So the backward pass keeps the
  logits and m, and computes the gradient in one fused pass that evaluates exp again, which is faster than writing exp
  to memory and reading it back. Forward mode and derivatives of every order follow.
- Under vmap the new dimension becomes one of rows.
- XLA for accelerators fuses all sums into one sweep over the logits. XLA for CPUs writes out every comparison, as large
  as the logits; there the sums go through blocks of rows whose intermediate arrays stay in the cache. Accelerators find
  the label by comparison with an iota: for a gather the TPU compiler would write out the logits in float32.

A function with custom_jvp and custom_vmap would not do: where JAX differentiates a scan twice it drops the former, and
the latter has no second derivatives.

Soft labels are as large as the logits anyway. They take the reference implementation under `jax.checkpoint`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Bool, Float, Int

from lsce_jax import reference
from lsce_jax.inputs import Batch, as_last_axis, at_labels, compute_dtype, is_sharded
from lsce_jax.stats import LossStats, make_stats
from lsce_spec import LossOptions

# Logits in a block of rows: 1 MiB in float32, so that the few arrays of a block fit into the cache.
_BLOCK_SIZE = 2**18
_STATIC = {"static": True}  # fixed when JAX traces the function


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Operands:
    """The arrays to sum over, and which sums to compute."""

    logits: Float[Array, "*batch K"]
    labels: Int[Array, "*batch"]
    counted: Bool[Array, "*batch"] | None
    class_mask: Bool[Array, " K"] | None
    prior: Float[Array, " K"] | None
    class_weight: Float[Array, " K"] | None
    softcap: float | None = field(metadata=_STATIC)
    prior_entropy: bool = field(metadata=_STATIC)  # whether to compute other_entropy
    largest: bool = field(metadata=_STATIC)  # whether to compute largest_gap and largest_mass
    correct: bool = field(metadata=_STATIC)  # whether to compute correct


class _Peaks(NamedTuple):
    """Values of each row that count as constants in derivatives."""

    peak: Float[Array, "*batch"]  # the largest logit m, after the softcap
    largest: Float[Array, "*batch"]  # the largest logit before the softcap, which makes large logits equal
    correct: Float[Array, "*batch"] | None  # above 0 where the label is the first largest logit


class _Sums(NamedTuple):
    """Sums of each row; None where the loss does not use them."""

    rest: Float[Array, "*batch"]  # sum of exp(z - m), less 1
    label_gap: Float[Array, "*batch"]  # m - z at the label
    other_gaps: Float[Array, "*batch"]  # sum of w (m - z) over the other classes
    other_mass: Float[Array, "*batch"] | None  # sum of w over the other classes
    other_prior: Float[Array, "*batch"] | None  # sum of the prior over the other classes
    other_entropy: Float[Array, "*batch"] | None  # sum of -prior log prior over the other classes
    largest_gap: Float[Array, "*batch"] | None  # mean of w (m - z) over the largest logits
    largest_mass: Float[Array, "*batch"] | None  # mean of w over the largest logits


class Targets(NamedTuple):
    """The numbers that define the target of an integer label, for all rows or for each; see `make_targets`."""

    on: Float[Array, "*#batch"]
    off: Float[Array, "*#batch"]
    at_max: Float[Array, "*#batch"] | None


def make_targets(batch: Batch, options: LossOptions) -> Targets:
    """Return `on` and `off` without class weights and prior, and `at_max`.

    They are computed from the smoothing as a Python number where it is one: in float32 1 - 0.99999 is 0.1 % off.
    """
    on, off = reference.on_off(batch, options) if batch.prior is None else (1 - batch.smoothing, batch.smoothing)
    at_max = None if options.convention.at_max is None else _per_row(reference.at_max(batch, options), batch)
    return Targets(_per_row(on, batch), _per_row(off, batch), at_max)


def row_losses(
    batch: Batch,
    options: LossOptions,
    with_stats: bool = False,
    targets: Targets | None = None,
) -> tuple[Float[Array, "*batch"], LossStats | None]:
    """Return the loss of each row, 0 for rows that do not count and NaN for bad labels, and statistics if asked for.

    Args:
        batch: the rows.
        options: the options of the loss.
        with_stats: whether to return statistics.
        targets: the targets of the rows; None computes them from the batch's smoothing.
    """
    if batch.soft:
        kept: tuple[Array, LossStats | None] = jax.checkpoint(
            lambda: reference.row_losses(batch, options, with_stats)
        )()
        return kept
    operands = _Operands(
        logits=batch.logits,
        labels=batch.labels.astype(jnp.int32),
        counted=batch.counted,
        class_mask=batch.class_mask,
        prior=batch.prior,
        class_weight=batch.class_weight,
        softcap=options.softcap,
        prior_entropy=options.subtract_entropy and batch.prior is not None,
        largest=options.convention.at_max is not None,
        correct=with_stats,
    )
    peaks, sums = _compiled_peaks_and_sums(operands)
    log_sum = jnp.log1p(sums.rest)
    lse = peaks.peak + log_sum
    smoothed = _smoothed_losses(batch, options, targets or make_targets(batch, options), sums, log_sum)
    losses = smoothed + options.z_loss * lse**2 if options.z_loss else smoothed
    if batch.counted is not None:
        losses = jnp.where(batch.counted, losses, 0)
    if peaks.correct is None:
        return losses, None
    nll, correct = log_sum + sums.label_gap, peaks.correct > 0
    return losses, make_stats(batch, options, nll=nll, smoothed=smoothed, lse=lse, log_sum=log_sum, correct=correct)


def class_factor(
    prior: Float[Array, " K"] | None, class_weight: Float[Array, " K"] | None
) -> Float[Array, " K"] | None:
    """Return w, the factor of `off` at each class: the product of prior and class weight; None if it is 1."""
    if prior is None or class_weight is None:
        return class_weight if prior is None else prior
    return prior * class_weight


def _smoothed_losses(
    batch: Batch, options: LossOptions, targets: Targets, sums: _Sums, log_sum: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Return the loss of each row without its z-loss."""
    on, off, num_others = _on_off_others(batch, targets, sums)
    at_label = on if batch.class_weight is None else on * at_labels(batch.class_weight, batch.labels)
    mass = at_label + off * (num_others if sums.other_mass is None else sums.other_mass)
    smoothed = _product(at_label, sums.label_gap) + _product(off, sums.other_gaps)
    if targets.at_max is not None:
        at_max = jnp.where(jnp.asarray(batch.bad), 0, targets.at_max)
        smoothed += at_max * jnp.asarray(sums.largest_gap)
        mass += at_max * jnp.asarray(sums.largest_mass)
    smoothed += mass * log_sum
    if options.subtract_entropy:
        # The entropy of off times a prior r is off entr(r_k) + r_k entr(off), summed over the classes.
        entropy = reference.entropy_of(on) + num_others * reference.entropy_of(off)
        smoothed -= entropy if sums.other_entropy is None else entropy + off * sums.other_entropy
    return smoothed


def _on_off_others(
    batch: Batch, targets: Targets, sums: _Sums
) -> tuple[Float[Array, "*#batch"], Float[Array, "*#batch"], Float[Array, "*#batch"]]:
    """Return `on`, `off`, and the sum of the factors of `off` over the other classes, all without class weights."""
    on, off = targets.on, targets.off
    if batch.prior is None:
        num_others = jnp.asarray(reference.count_allowed(batch) - 1, batch.dtype)
    else:
        on = on + off * at_labels(batch.prior, batch.labels)
        num_others = jnp.asarray(sums.other_mass if sums.other_prior is None else sums.other_prior)
    # NaN at the label makes loss and gradient NaN; 0 elsewhere keeps the derivatives of other operands finite.
    bad = jnp.asarray(batch.bad)
    return jnp.where(bad, jnp.nan, on), jnp.where(bad, 0, off), num_others


def _per_row(value: float | Array, batch: Batch) -> Float[Array, "*#batch"]:
    """Return a number, or an array with a last dimension of 1, as an array over the rows."""
    value = jnp.asarray(value, batch.dtype)
    return jnp.squeeze(value, axis=-1) if value.ndim else value


def _product(target: Float[Array, "*#batch"], gap: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Return target * gap, where 0 * inf counts as 0."""
    # Only infinite gaps are replaced: the gap is the derivative with respect to the target.
    return target * jnp.where(reference.is_nothing(target) & jnp.isinf(gap), 0, gap)


def _peaks_and_sums(operands: _Operands) -> tuple[_Peaks, _Sums]:
    """Return the sums of each row, and the constants that they are relative to."""
    leaves, structure = jax.tree.flatten(operands)
    results = _row_sums_p.bind(*leaves, structure=structure)  # type: ignore[no-untyped-call]
    named: tuple[_Peaks, _Sums] = jax.tree.unflatten(jax.tree.structure(jax.eval_shape(_whole, operands)), results)
    return named


# Compiled, so that calls outside `jit` are fused as well.
_compiled_peaks_and_sums = jax.jit(_peaks_and_sums)


# --- The primitive, on the leaves of `_Operands` and of the results --------------------------------------------------

_row_sums_p = Primitive("lsce_row_sums")
_row_sums_p.multiple_results = True


def _on_leaves(function: Callable[[_Operands], Any]) -> Callable[..., list[Array]]:
    def of_leaves(*leaves: Array, structure: Any) -> list[Array]:
        results: list[Array] = jax.tree.leaves(function(jax.tree.unflatten(structure, leaves)))
        return results

    return of_leaves


def _types(*operands: Any, structure: Any) -> list[Any]:
    of_operands = partial(_on_leaves(_whole), structure=structure)
    types: list[Any] = jax.make_jaxpr(of_operands)(*operands).out_avals
    return types


def _derivative(primals: Sequence[Array], tangents: Sequence[Any], *, structure: Any) -> tuple[list[Array], list[Any]]:
    peaks, sums = _peaks_and_sums(jax.tree.unflatten(structure, primals))
    given = {i: tangent for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)}

    # Only the operands are kept; the backward pass computes exp again.
    @jax.checkpoint
    def at_peaks(by: dict[int, Array]) -> _Sums:
        operands = jax.tree.unflatten(structure, [by.get(i, primal) for i, primal in enumerate(primals)])
        return _sums(operands, peaks, differentiable=True)

    _, tangents_out = jax.jvp(at_peaks, ({i: primals[i] for i in given},), (given,))
    # The transpose of a barrier is a barrier: the cotangents of a row are computed once, not again for every class.
    # One barrier for each sum: JAX 0.12 cannot transpose a barrier of which a part is known to be zero.
    tangents_out = jax.tree.map(jax.lax.optimization_barrier, tangents_out)
    return jax.tree.leaves((peaks, sums)), jax.tree.leaves((jax.tree.map(jnp.zeros_like, peaks), tangents_out))


def _under_vmap(
    leaves: Sequence[Array], dims: Sequence[int | None], *, structure: Any
) -> tuple[list[Array], list[int]]:
    """Make the dimension that vmap adds one of rows, so that a loss of one row under vmap is as fast as a batch."""
    size = next(leaf.shape[dim] for leaf, dim in zip(leaves, dims, strict=True) if dim is not None)
    leaves = [leaf if dim is None else jnp.moveaxis(leaf, dim, 0) for leaf, dim in zip(leaves, dims, strict=True)]
    operands = jax.tree.unflatten(structure, leaves)
    is_batched = jax.tree.unflatten(structure, [dim is not None for dim in dims])
    if any(getattr(is_batched, name) for name in ("class_mask", "prior", "class_weight")):
        axes = jax.tree.map(lambda batched: 0 if batched else None, is_batched)
        results = jax.vmap(_whole, in_axes=(axes,), axis_size=size)(operands)
    else:
        rows = {name: getattr(operands, name) for name in ("logits", "labels", "counted")}
        for name, array in rows.items():
            if array is not None and not getattr(is_batched, name):
                rows[name] = jnp.broadcast_to(array, (size, *array.shape))
        results = _peaks_and_sums(replace(operands, **rows))
    of_rows = jax.tree.leaves(results)
    return of_rows, [0] * len(of_rows)


def _for_cpu(operands: _Operands) -> tuple[_Peaks, _Sums]:
    # Blocks would move rows that are divided over devices, and a symbolic number of rows has no last block.
    shape = operands.logits.shape
    if is_sharded(operands.logits) or not all(isinstance(size, int) for size in shape):
        return _whole(operands)
    return _blocked(max(1, _BLOCK_SIZE // shape[-1]), operands)


def _blocked(block_rows: int, operands: _Operands) -> tuple[_Peaks, _Sums]:
    """Return the sums, computed a block of rows at a time."""
    *batch_shape, num_classes = operands.logits.shape
    num_rows = math.prod(batch_shape)
    if num_rows <= block_rows:
        # If the logits are a product, XLA may fuse it into some of their uses only, which then round it differently:
        # the largest logit would not equal itself. XLA fuses nothing through a select.
        logits = jnp.where(jnp.isnan(operands.logits), jnp.nan, operands.logits)
        return _whole(replace(operands, logits=logits), gather=True)
    flat = replace(
        operands,
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
        return _whole(replace(flat, logits=block(flat.logits), labels=block(flat.labels), counted=counted), gather=True)

    def step(i: Array, results: tuple[_Peaks, _Sums]) -> tuple[_Peaks, _Sums]:
        # A dynamic slice moves back a start that leaves too few rows: the last block may overlap the one before it.
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


def _whole(operands: _Operands, gather: bool = False) -> tuple[_Peaks, _Sums]:
    """Return the sums, computed for all rows at once."""
    raw, capped, allowed = _logits(operands)
    if allowed is not None:
        raw, capped = (jnp.where(allowed, values, -jnp.inf) for values in (raw, capped))
    constant = jax.lax.stop_gradient((raw, capped))
    largest, correct = jnp.max(constant[0], axis=-1), None
    if operands.correct:
        # A sum, so that it joins the sweep: 1 for the label and -1 for each class before it, where they are largest.
        classes, labels = _classes(raw), operands.labels[..., None]
        score = (classes == labels).astype(raw.dtype) - (classes < labels).astype(raw.dtype)
        correct = jnp.sum(jnp.where(constant[0] == largest[..., None], score, 0), axis=-1)
    peaks = _Peaks(largest if operands.softcap is None else jnp.max(constant[1], axis=-1), largest, correct)
    return peaks, _sums(operands, peaks, gather=gather)


def _sums(operands: _Operands, peaks: _Peaks, *, differentiable: bool = False, gather: bool = False) -> _Sums:
    """Return the sums at given peaks.

    Args:
        operands: what to sum.
        peaks: the peaks of these operands.
        differentiable: whether only the derivatives of the sums are used, not their values.
        gather: whether to find the logit of the label by index, and not by comparison.
    """
    raw, capped, allowed = _logits(operands)
    gap = peaks.peak[..., None] - capped
    if allowed is not None:
        gap = jnp.where(allowed, gap, 0)
    terms, num_peaks = jnp.exp(-gap), jnp.ones((), gap.dtype)
    if not differentiable:
        # Without the largest terms, all of them 1, small losses keep their accuracy.
        # With a softcap XLA may fuse its product into the gap, which is then not quite 0 at the peak: compare logits.
        is_peak = gap <= 0 if operands.softcap is None else jax.lax.stop_gradient(raw) >= peaks.largest[..., None]
        is_peak = is_peak if allowed is None else is_peak & allowed
        # Subtraction leaves them out exactly and keeps their derivatives.
        terms = jnp.where(is_peak, terms - jax.lax.stop_gradient(terms), terms)
        num_peaks = jnp.sum(is_peak, axis=-1, dtype=gap.dtype)
    if allowed is not None:
        terms = jnp.where(allowed, terms, 0)

    is_label = _classes(gap) == operands.labels[..., None]
    if gather:
        label_gap = jnp.take_along_axis(gap, operands.labels[..., None], axis=-1)[..., 0]
    else:
        label_gap = jnp.sum(jnp.where(is_label, gap, 0), axis=-1)
    return _Sums(
        jnp.sum(terms, axis=-1) + (num_peaks - 1),
        label_gap,
        *_sums_over_others(operands, gap, is_label, allowed),
        *_means_over_largest(operands, gap, jax.lax.stop_gradient(raw) == peaks.largest[..., None], allowed),
    )


def _sums_over_others(
    operands: _Operands,
    gap: Float[Array, "*batch K"],
    is_label: Bool[Array, "*batch K"],
    allowed: Bool[Array, "*ones K"] | None,
) -> tuple[Float[Array, "*batch"], *tuple[Float[Array, "*batch"] | None, ...]]:
    """Return other_gaps, other_mass, other_prior and other_entropy of `_Sums`."""
    prior, factor = operands.prior, class_factor(operands.prior, operands.class_weight)

    def total(vector: Float[Array, " K"] | None) -> Float[Array, "*batch"] | None:
        if vector is None:
            return None
        is_other = ~is_label if allowed is None else ~is_label & allowed
        return jnp.sum(jnp.where(is_other, as_last_axis(vector, gap), 0), axis=-1)

    other_gap = jnp.where(is_label, 0, gap)
    if factor is not None:
        weight = as_last_axis(factor, gap)
        other_gap = weight * jnp.where((weight == 0) & jnp.isinf(other_gap), 0, other_gap)
    # At 0 the slope of entr is infinite, but a prior of 0 there is a constant.
    entropy = (
        reference.entropy_of(jnp.where(prior == 0, 1, prior)) if prior is not None and operands.prior_entropy else None
    )
    return (
        jnp.sum(other_gap, axis=-1),
        total(factor),
        total(None if operands.class_weight is None else prior),
        total(entropy),
    )


def _means_over_largest(
    operands: _Operands,
    gap: Float[Array, "*batch K"],
    is_largest: Bool[Array, "*batch K"],
    allowed: Bool[Array, "*ones K"] | None,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]] | tuple[None, None]:
    """Return largest_gap and largest_mass of `_Sums`."""
    if not operands.largest:
        return None, None
    if allowed is not None:
        is_largest = is_largest & allowed
    share = is_largest.astype(gap.dtype)
    share = share / jnp.sum(share, axis=-1, keepdims=True)
    if operands.class_weight is not None:
        share = share * as_last_axis(operands.class_weight, gap)
    return jnp.sum(share * jnp.where(is_largest, gap, 0), axis=-1), jnp.sum(share, axis=-1)


def _logits(
    operands: _Operands,
) -> tuple[Float[Array, "*batch K"], Float[Array, "*batch K"], Bool[Array, "*ones K"] | None]:
    """Return the logits before and after the softcap, 0 where they do not count, and the mask."""
    raw = operands.logits.astype(compute_dtype(operands.logits))
    if operands.counted is not None:
        raw = jnp.where(operands.counted[..., None], raw, 0)
    allowed = None
    if operands.class_mask is not None:
        allowed = as_last_axis(operands.class_mask, raw)
        raw = jnp.where(allowed, raw, 0)
    return raw, raw if operands.softcap is None else operands.softcap * jnp.tanh(raw / operands.softcap), allowed


def _classes(like: Float[Array, "*batch K"]) -> Int[Array, "*ones K"]:
    return jax.lax.broadcasted_iota(jnp.int32, (1,) * (like.ndim - 1) + like.shape[-1:], like.ndim - 1)


_row_sums_p.def_impl(_on_leaves(_whole))  # type: ignore[no-untyped-call]
_row_sums_p.def_abstract_eval(_types)  # type: ignore[no-untyped-call]
ad.primitive_jvps[_row_sums_p] = _derivative
batching.primitive_batchers[_row_sums_p] = _under_vmap
mlir.register_lowering(_row_sums_p, mlir.lower_fun(_on_leaves(_whole)))
mlir.register_lowering(_row_sums_p, mlir.lower_fun(_on_leaves(_for_cpu)), platform="cpu")
