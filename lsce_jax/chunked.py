r"""The linear layer and the loss, some rows at a time: memory never holds more than one chunk of logits.

The fused loss gives the gradient with respect to a chunk's logits, and layer.py those with respect to hidden, weight
and bias. The only choice left is when to compute them.

With the loss. In a sum of losses every row has the same upstream gradient. So all gradients are computed with the loss,
from logits that are there anyway (6 N D K operations), and multiplied with the upstream gradient later. Until then one
array as large as the weight is kept, in float32 for narrower dtypes. This is a custom_jvp whose tangent is the inner
product of these gradients with the incoming tangents. Its transpose is the multiplication, so reverse mode costs no
more than that, and forward mode works too.

After the loss. Losses of single rows may be weighted by anything later, so the sums over the classes are computed
first, and the logits again for the gradient (8 N D K operations): see layer_sums.py. Derivatives of the gradients above
are computed in the same way.

A chunk takes rows that lie `num_chunks` apart: if the rows are divided over devices, each device has a part of every
chunk. On a single device the rows that count come first, and chunks without any are skipped.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from lsce_jax import fused, tiles
from lsce_jax.inputs import Batch, compute_dtype, is_sharded, varying_like, with_whole_features
from lsce_jax.layer import Filter, Gradients, Layer, LayerOperands, add_all, add_large, chunk_logits
from lsce_jax.layer_sums import layer_sums
from lsce_jax.stats import LossStats
from lsce_jax.sums import class_factor
from lsce_spec import ChunkOptions, LossOptions


class _Plan(NamedTuple):
    """The settings that are fixed when JAX compiles the functions."""

    options: LossOptions
    with_stats: bool
    skip: bool  # whether the rows that count come first
    gradient_filter: float


class _Rows(NamedTuple):
    """The operands with one value per row, in C chunks; without that dimension, in one."""

    hidden: Float[Array, "n C D"]
    on: Float[Array, "n C"]
    off: Float[Array, "n C"]
    at_max: Float[Array, "n C"] | None
    labels: Int[Array, "n C"]
    counted: Bool[Array, "n C"] | None
    bad: Bool[Array, "n C"]
    class_mask: Bool[Array, "n C K"] | None  # None if the rows share one


class _Shared(NamedTuple):
    """The operands that all rows share."""

    weight: Float[Array, "D K"]
    bias: Float[Array, " K"] | None
    prior: Float[Array, " K"] | None
    class_weight: Float[Array, " K"] | None
    class_mask: Bool[Array, " K"] | None


class _Operands(NamedTuple):
    rows: _Rows
    shared: _Shared


# The differentiable operands.
_FLOATING = {
    "rows": ("hidden", "on", "off", "at_max"),
    "shared": ("weight", "bias", "prior", "class_weight"),
}
_Results = tuple[Float[Array, "n C"], LossStats | None]


class Arrangement(NamedTuple):
    """The place of each row in the chunks."""

    batch_shape: tuple[int, ...]
    num_chunks: int
    chunk_rows: int
    order: Int[Array, " rows"] | None  # the row at each place; None if rows keep their order

    def padded(self, array: Array) -> Array:
        """Return an array over the batch as one over the rows of all chunks, in the order of the batch."""
        num_rows, num_places = math.prod(self.batch_shape), self.num_chunks * self.chunk_rows
        of_row = array.shape[len(self.batch_shape) :]
        array = jnp.broadcast_to(array, (*self.batch_shape, *of_row)).reshape(num_rows, *of_row)
        if num_rows == num_places:
            return array
        # Copies of the last row have finite derivatives if it has. None of them counts or has a bad label.
        added = jnp.broadcast_to(array[-1:], (num_places - num_rows, *of_row))
        if array.dtype == bool:
            added = jnp.full_like(added, bool(of_row))  # a class mask has every class
        return jnp.concatenate([array, added])

    def in_chunks(self, array: Array) -> Array:
        """Return an array over the batch in chunks."""
        array = self.padded(array)
        if self.order is not None:
            array = array[self.order]
        return array.reshape(self.chunk_rows, self.num_chunks, *array.shape[1:])

    def by_row(self, array: Array) -> Array:
        """Return an array in chunks as one over the batch."""
        array = array.reshape(-1)
        if self.order is not None:
            array = jnp.zeros_like(array).at[self.order].set(array, unique_indices=True)
        return array[: math.prod(self.batch_shape)].reshape(self.batch_shape)


def losses(
    batch: Batch, layer: Layer, options: LossOptions, chunks: ChunkOptions, with_stats: bool
) -> tuple[Float[Array, "..."], LossStats | None]:
    """Return the loss of each row, or their sum if the gradients are computed with it, and statistics if asked for.

    The statistics have derivatives if the logits are computed again for them.

    Args:
        batch: at least one row; its logits are only a shape.
        layer: makes the logits.
        options: the options of the loss.
        chunks: how to go through the rows.
        with_stats: whether to return statistics.
    """
    if layer.hidden.shape[-1] == 1:
        # XLA would fuse a product of single numbers into the loss, and round it in some of its uses only.
        hidden = jnp.concatenate([layer.hidden, jnp.zeros_like(layer.hidden)], axis=-1)
        layer = Layer(hidden, jnp.concatenate([layer.weight, jnp.zeros_like(layer.weight)]), layer.bias)
    arrangement = arrange(batch, layer.hidden, chunks)
    counted = batch.counted
    if counted is None and math.prod(batch.batch_shape) != arrangement.num_chunks * arrangement.chunk_rows:
        counted = jnp.ones(batch.batch_shape, bool)
    rows = _Rows(
        layer.hidden,
        *fused.make_targets(batch, options),
        batch.labels.astype(jnp.int32),
        counted,
        jnp.asarray(batch.bad),
        batch.class_mask if batch.has_row_masks else None,
    )
    mask_of_all = None if batch.has_row_masks else batch.class_mask
    shared = _Shared(layer.weight, layer.bias, batch.prior, batch.class_weight, mask_of_all)
    operands = _Operands(jax.tree.map(arrangement.in_chunks, rows), shared)
    operands = varying_like(operands, operands)  # see `sum_rules.bind`
    # The smoothing is part of the targets. Without its value here, every smoothing shares one compiled function.
    skip = arrangement.order is not None
    plan = _Plan(replace(options, smoothing=0.0), with_stats, skip, chunks.gradient_filter)
    if chunks.recompute or is_sharded(layer.hidden) or is_sharded(layer.weight):
        # Then JAX asks no more how the sums over rows and classes in matrix products are divided.
        row_losses, stats = _row_losses(plan, operands)
        result = arrangement.by_row(row_losses) if chunks.recompute else row_losses.sum()
    else:
        result, stats = _total_loss(plan, operands)
    if stats is None:
        return result, None
    stats = jax.tree.map(arrangement.by_row, stats)
    # Rows of chunks that were left out hold zeros.
    return result, stats._replace(prediction=jnp.where(stats.valid, stats.prediction, -1))


def preferred_rows(num_features: int) -> int:
    """Return how many rows a chunk should have.

    Each chunk reads the weight twice and reads and writes its gradient: 4 D K numbers, against 6 n D K operations. With
    D rows the logits take as much memory as the gradient of the weight, which is there anyway, and on a CPU the reads
    of the weight hardly show. Compiled for a TPU v6e with D = 2048, K = 131072 and bfloat16, the temporary memory is
    1.1 GB with 1024 rows, as much as the weight's gradient takes, but 3.3 GB with 2048. So 1024 is the most.
    """
    return min(max(num_features, 256), 1024)


def saves_time(batch: Batch, layer: Layer, chunks: ChunkOptions) -> bool:
    """Return whether computing the logits again is faster than computing the gradients with the loss.

    So it is on some TPUs: see `tiles.saves_time`.
    """
    num_rows, (num_features, num_classes) = math.prod(batch.batch_shape), layer.weight.shape
    if chunks.gradient_filter or not all(isinstance(size, int) for size in (num_rows, num_features, num_classes)):
        return False
    chunk_rows = chunks.rows_at_most(preferred_rows(num_features), num_classes)
    return tiles.saves_time(num_rows, num_features, num_classes, layer.hidden.dtype, chunk_rows)


def arrange(batch: Batch, hidden: Float[Array, "*batch D"], chunks: ChunkOptions) -> Arrangement:
    """Return which rows each chunk has."""
    num_rows, num_features, num_classes = math.prod(batch.batch_shape), hidden.shape[-1], batch.logits.shape[-1]
    arrangement = Arrangement(batch.batch_shape, 1, num_rows, None)
    if not all(isinstance(size, int) for size in (num_rows, num_features, num_classes)):
        return arrangement  # symbolic sizes: one chunk
    num_chunks = -(-num_rows // chunks.rows_at_most(preferred_rows(num_features), num_classes))
    chunk_rows = -(-num_rows // num_chunks)
    arrangement = arrangement._replace(num_chunks=num_chunks, chunk_rows=chunk_rows)
    if batch.counted is None or num_chunks == 1 or jax.device_count() > 1:
        return arrangement
    first_counted = jnp.argsort(~arrangement.padded(batch.counted), stable=True)
    return arrangement._replace(order=first_counted.reshape(num_chunks, chunk_rows).T.reshape(-1))


def _chunk(i: int | Array, array: Array) -> Array:
    part: Array = jax.lax.dynamic_index_in_dim(array, i, axis=1, keepdims=False)
    return part


def _with_chunk(i: Array, array: Array, part: Array) -> Array:
    updated: Array = jax.lax.dynamic_update_index_in_dim(array, part, i, axis=1)
    return updated


def _without_ignored(rows: _Rows) -> _Rows:
    """Return the rows with `hidden` 0 where they do not count: 0 times a NaN would reach the weight's gradient."""
    if rows.counted is None:
        return rows
    return rows._replace(hidden=jnp.where(rows.counted[..., None], rows.hidden, 0))


def _batch_of(logits: Any, rows: _Rows, shared: _Shared) -> tuple[Batch, fused.Targets]:
    """Return a batch of these rows, and their targets; of the logits only shape and dtype have to be known."""
    batch = Batch(
        logits=logits,
        labels=rows.labels,
        smoothing=0.0,
        counted=rows.counted,
        bad=rows.bad,
        prior=shared.prior,
        class_weight=shared.class_weight,
        class_mask=shared.class_mask if rows.class_mask is None else rows.class_mask,
    )
    return batch, fused.Targets(rows.on, rows.off, rows.at_max)


def _losses_of(plan: _Plan, logits: Float[Array, "n K"], rows: _Rows, shared: _Shared) -> _Results:
    batch, targets = _batch_of(logits, rows, shared)
    return fused.row_losses(batch, plan.options, plan.with_stats, targets, in_place=True)


@partial(jax.jit, static_argnums=0)
def _row_losses(plan: _Plan, operands: _Operands) -> _Results:
    """Return the losses of all rows, whose derivatives compute the logits again."""
    rows, shared = _without_ignored(operands.rows), operands.shared
    shared = shared._replace(weight=with_whole_features(shared.weight))
    describe: Any = jax.ShapeDtypeStruct
    logits = describe((*rows.labels.shape, shared.weight.shape[1]), rows.hidden.dtype)
    batch, targets = _batch_of(logits, rows, shared)
    of_logits = fused.make_operands(batch, plan.options, plan.with_stats)
    layer = LayerOperands.of(Layer(rows.hidden, shared.weight, shared.bias), of_logits, skip=plan.skip)
    return fused.losses_of_sums(batch, plan.options, targets, *layer_sums(layer))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _total_loss(plan: _Plan, operands: _Operands) -> tuple[Float[Array, ""], LossStats | None]:
    """Return the sum of all losses, and the statistics. Differentiation computes its gradients with it."""
    losses, stats = _row_losses(plan, operands)
    return losses.sum(), stats


def _total_tangent(plan: _Plan, primals: tuple[_Operands], tangents: tuple[_Operands]) -> tuple[Any, Any]:
    given = {name: of for name, of in _floating(tangents[0]).items() if not isinstance(of, SymbolicZero)}
    total, stats, gradients = _with_gradients(plan, tuple(given), *primals)
    tangent = jnp.zeros_like(total)
    for name, of in given.items():
        tangent += jnp.sum(gradients[name] * of.astype(gradients[name].dtype))
    return (total, stats), (tangent, _zero_tangents(stats))


_total_loss.defjvp(_total_tangent, symbolic_zeros=True)


@partial(jax.jit, static_argnums=(0, 1))
def _with_gradients(
    plan: _Plan, wanted: tuple[str, ...], operands: _Operands
) -> tuple[Float[Array, ""], LossStats | None, Gradients]:
    """Return the sum of all losses, the statistics, and the gradients of the operands of these names."""
    results: tuple[Array, LossStats | None, Gradients] = _total_and_gradients(plan, wanted, operands)
    return results


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _total_and_gradients(
    plan: _Plan, wanted: tuple[str, ...], operands: _Operands
) -> tuple[Float[Array, ""], LossStats | None, Gradients]:
    rows, shared = _without_ignored(operands.rows), operands.shared
    chunk_rows, num_chunks, num_features = rows.hidden.shape
    dtype, floating = compute_dtype(rows.hidden), _floating(operands)
    weight = with_whole_features(shared.weight).astype(rows.hidden.dtype)
    if rows.hidden.dtype == jnp.float16:
        # Gradients that are computed with the loss are not scaled yet, and many would be 0 in float16.
        rows, weight = rows._replace(hidden=rows.hidden.astype(dtype)), weight.astype(dtype)
    kept = _make_filter(plan.gradient_filter, rows, shared) if plan.gradient_filter else None

    def step(i: Array, carry: tuple[_Results, Gradients]) -> tuple[_Results, Gradients]:
        results, gradients = carry
        part = _Operands(jax.tree.map(partial(_chunk, i), rows), shared)
        of_part, parts = _chunk_gradients(plan, wanted, part, weight)
        if "logits" in parts:
            of_rows = None if kept is None else kept._replace(off=_chunk(i, kept.off))
            gradients, parts = _add_layer(gradients, parts, part.rows.hidden, weight, of_rows)
        for name in parts.keys() & gradients.keys():
            if name in _FLOATING["rows"]:
                gradients[name] = _with_chunk(i, gradients[name], parts[name])
            else:
                gradients[name] = gradients[name] + parts[name]
        return jax.tree.map(partial(_with_chunk, i), results, of_part), gradients

    first = _Operands(jax.tree.map(partial(_chunk, 0), rows), shared)
    shapes = jax.eval_shape(lambda: _chunk_gradients(plan, (), first, weight)[0])
    results = jax.tree.map(lambda part: jnp.zeros((chunk_rows, num_chunks), part.dtype), shapes)
    gradients = {name: jnp.zeros(floating[name].shape, dtype) for name in wanted}
    if kept is not None and "weight" in wanted:
        gradients["off_hidden"] = jnp.zeros(num_features, dtype)
    num_needed: int | Array = num_chunks
    if plan.skip:
        num_needed = -(-jnp.sum(jnp.asarray(rows.counted), dtype=jnp.int32) // chunk_rows)
    start = varying_like((results, gradients), operands)
    (losses, stats), gradients = jax.lax.fori_loop(0, num_needed, step, start)
    if kept is not None and "weight" in wanted:
        gradients["weight"] -= gradients.pop("off_hidden")[:, None] * kept.factor[None, :]
    if "weight" in wanted:
        gradients["weight"] = with_whole_features(gradients["weight"])
    return losses.sum(), stats, gradients


@_total_and_gradients.defjvp
def _tangent_of_gradients(
    plan: _Plan, wanted: tuple[str, ...], primals: tuple[_Operands], tangents: tuple[_Operands]
) -> tuple[Any, Any]:
    """Differentiate the gradients as JAX does those of `_row_losses`."""
    dtype = compute_dtype(primals[0].rows.hidden)

    def again(operands: _Operands) -> tuple[Array, Gradients]:
        def total(by: Gradients) -> Array:
            results: _Results = _row_losses(plan, _replaced(operands, by))
            return results[0].sum()

        floating = _floating(operands)
        value: tuple[Array, Gradients] = jax.value_and_grad(total)({name: floating[name] for name in wanted})
        total_loss, gradients = value
        return total_loss, {name: gradient.astype(dtype) for name, gradient in gradients.items()}

    total, stats, gradients = _with_gradients(plan, wanted, *primals)
    _, (of_total, of_gradients) = jax.jvp(again, primals, tangents)
    return (total, stats, gradients), (of_total, _zero_tangents(stats), of_gradients)


def _chunk_gradients(
    plan: _Plan, wanted: tuple[str, ...], part: _Operands, weight: Float[Array, "D K"]
) -> tuple[_Results, Gradients]:
    """Return the losses and statistics of a chunk, and the gradients of its logits and of the other operands."""
    logits = chunk_logits(Layer(part.rows.hidden, weight, part.shared.bias))
    floating = _floating(part)
    by = {name: floating[name] for name in wanted if name not in Layer._fields}
    if len(by) < len(wanted):
        by["logits"] = logits

    def total(by: Gradients) -> tuple[Array, _Results]:
        operands = _replaced(part, by)
        results = _losses_of(plan, by.get("logits", logits), operands.rows, operands.shared)
        return results[0].sum(), results

    if not by:
        return total(by)[1], {}
    gradients, results = jax.grad(total, has_aux=True)(by)
    return results, dict(gradients)


def _add_layer(
    gradients: Gradients,
    parts: Gradients,
    hidden: Float[Array, "n D"],
    weight: Float[Array, "D K"],
    kept: Filter | None,
) -> tuple[Gradients, Gradients]:
    """Return the gradients with those of the weight added, and `parts` with those of hidden and bias, not of logits."""
    parts = dict(parts)
    of_logits = parts.pop("logits")
    if "bias" in gradients:
        parts["bias"] = jnp.sum(of_logits, axis=0)
    if kept is None:
        products = add_all(gradients, hidden, weight, of_logits)
    else:
        products = add_large(gradients, hidden, weight, of_logits, kept)
    parts["hidden"] = products.pop("hidden")
    return gradients | products, parts


def _make_filter(threshold: float, rows: _Rows, shared: _Shared) -> Filter:
    off, factor = jnp.where(rows.bad, 0, rows.off), class_factor(shared.prior, shared.class_weight)
    if rows.counted is not None:
        off = jnp.where(rows.counted, off, 0)
    if factor is None:
        factor = jnp.ones(shared.weight.shape[1], off.dtype)
    return Filter(threshold, off, factor if shared.class_mask is None else jnp.where(shared.class_mask, factor, 0))


def _floating(operands: _Operands) -> dict[str, Any]:
    """Return the differentiable operands, by name."""
    by_name = {name: getattr(getattr(operands, part), name) for part, names in _FLOATING.items() for name in names}
    return {name: array for name, array in by_name.items() if array is not None}


def _replaced(operands: _Operands, by: Gradients) -> _Operands:
    rows, shared = ({name: by[name] for name in names if name in by} for names in _FLOATING.values())
    return _Operands(operands.rows._replace(**rows), operands.shared._replace(**shared))


def _zero_tangents(tree: Any) -> Any:
    def zero(array: Array) -> Any:
        if jnp.issubdtype(array.dtype, jnp.floating):
            return jnp.zeros_like(array)
        return np.zeros(array.shape, jax.dtypes.float0)

    return varying_like(jax.tree.map(zero, tree), tree)
