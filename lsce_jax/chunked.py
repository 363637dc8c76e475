r"""The linear layer and the loss, some rows at a time: no more than one chunk of logits is ever in memory.

The gradient of a chunk's logits z = h W + b gives those of h, W and b by two matrix products, and the fused loss gives
the gradient of the logits. That is all; what remains is when.

With the loss. A sum of losses hands every row the same upstream gradient, so the gradients of all inputs are computed
with the loss, while the logits are at hand (6 N D K operations), and multiplied with the upstream gradient later. They
are kept until then: one array as large as the weight, in float32 for narrower dtypes. It is a custom_jvp whose tangent
is their inner product with the tangents that come in: its transpose is the multiplication, so that reverse mode costs
what it should and forward mode works as well.

After it. Losses of single rows may be weighted by anything afterwards, so their chunks are computed again for the
gradient (8 N D K): a scan over `jax.checkpoint`, differentiated by JAX, to any order. Derivatives of the gradients
above go this way too.

A chunk takes rows that lie `num_chunks` apart: where rows are divided over devices, each device has a part of every
chunk. On a single device the rows that count come first, and the chunks without any cost nothing.
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

from lsce_jax import fused
from lsce_jax.inputs import Batch, compute_dtype, is_sharded
from lsce_jax.stats import LossStats
from lsce_spec import ChunkOptions, LossOptions

# Classes of a part of the weight's gradient, on the CPU; and of those that `gradient_filter` keeps.
_TILE = 1024


class Layer(NamedTuple):
    """The linear layer that makes the logits.

    Args:
        hidden: what goes in, in the dtype to multiply in.
        weight: in any dtype, which its gradient has.
        bias: likewise, or None.
    """

    hidden: Float[Array, "*batch D"]
    weight: Float[Array, "D K"]
    bias: Float[Array, " K"] | None


class _Plan(NamedTuple):
    """What is fixed when the functions are compiled."""

    options: LossOptions
    with_stats: bool
    skip: bool  # whether the rows that count come first
    gradient_filter: float


class _Rows(NamedTuple):
    """What each row has of its own, in C chunks; without that dimension, in one."""

    hidden: Float[Array, "n C D"]
    on: Float[Array, "n C"]
    off: Float[Array, "n C"]
    at_max: Float[Array, "n C"] | None
    labels: Int[Array, "n C"]
    counted: Bool[Array, "n C"] | None
    bad: Bool[Array, "n C"]


class _Shared(NamedTuple):
    """What the rows share."""

    weight: Float[Array, "D K"]
    bias: Float[Array, " K"] | None
    prior: Float[Array, " K"] | None
    class_weight: Float[Array, " K"] | None
    class_mask: Bool[Array, " K"] | None


class _Operands(NamedTuple):
    rows: _Rows
    shared: _Shared


# By which of them there are derivatives.
_FLOATING = {
    "rows": ("hidden", "on", "off", "at_max"),
    "shared": ("weight", "bias", "prior", "class_weight"),
}
_Results = tuple[Float[Array, "n C"], LossStats | None]
_Gradients = dict[str, Array]


def losses(
    batch: Batch, layer: Layer, options: LossOptions, chunks: ChunkOptions, with_stats: bool
) -> tuple[Float[Array, "..."], LossStats | None]:
    """Return the loss of each row, or their sum if gradients are computed with it, and the statistics if asked.

    Args:
        batch: of one row at least; its logits are only a shape.
        layer: makes the logits.
        options: of the loss.
        chunks: how to go through the rows.
        with_stats: whether to return statistics.
    """
    if layer.hidden.shape[-1] == 1:
        # A product of single numbers would be fused into the loss, and rounded in some of its uses and not in others.
        hidden = jnp.concatenate([layer.hidden, jnp.zeros_like(layer.hidden)], axis=-1)
        layer = Layer(hidden, jnp.concatenate([layer.weight, jnp.zeros_like(layer.weight)]), layer.bias)
    batch_shape, num_features = batch.batch_shape, layer.hidden.shape[-1]
    num_rows, num_classes = math.prod(batch_shape), batch.logits.shape[-1]
    num_chunks, chunk_rows = 1, num_rows
    if all(isinstance(size, int) for size in (num_rows, num_features, num_classes)):  # and not symbolic
        num_chunks = -(-num_rows // chunks.rows_at_most(preferred_rows(num_features), num_classes))
        if is_sharded(layer.hidden):
            # Rows of a mesh cannot be padded, and each device needs as many of each chunk.
            size = jax.sharding.get_abstract_mesh().size
            fitting = (number for number in range(num_chunks, num_rows + 1) if num_rows % (number * size) == 0)
            num_chunks = next(fitting, 1)
        chunk_rows = -(-num_rows // num_chunks)
    counted, order = batch.counted, None
    if counted is None and num_rows != num_chunks * chunk_rows:
        counted = jnp.ones(batch_shape, bool)

    def padded(array: Array) -> Array:
        of_row = array.shape[len(batch_shape) :]
        array = jnp.broadcast_to(array, (*batch_shape, *of_row)).reshape(num_rows, *of_row)
        if num_rows == num_chunks * chunk_rows:
            return array
        # With rows like the last one, whose derivatives are finite; but none that counts, or has a bad label.
        added = jnp.broadcast_to(array[-1:], (num_chunks * chunk_rows - num_rows, *of_row))
        return jnp.concatenate([array, jnp.zeros_like(added) if array.dtype == bool else added])

    if batch.counted is not None and num_chunks > 1 and jax.device_count() == 1:
        first_counted = jnp.argsort(~padded(batch.counted), stable=True)
        order = first_counted.reshape(num_chunks, chunk_rows).T.reshape(-1)

    def in_chunks(array: Array) -> Array:
        array = padded(array)
        if order is not None:
            array = array[order]
        return array.reshape(chunk_rows, num_chunks, *array.shape[1:])

    def by_row(array: Array) -> Array:
        array = array.reshape(-1)
        if order is not None:
            array = jnp.zeros_like(array).at[order].set(array, unique_indices=True)
        return array[:num_rows].reshape(batch_shape)

    rows = _Rows(
        layer.hidden,
        *fused.make_targets(batch, options),
        batch.labels.astype(jnp.int32),
        counted,
        jnp.asarray(batch.bad),
    )
    shared = _Shared(layer.weight, layer.bias, batch.prior, batch.class_weight, batch.class_mask)
    operands = _Operands(jax.tree.map(in_chunks, rows), shared)
    # All that the smoothing does is in the targets; without its value, plans for different ones are the same.
    plan = _Plan(replace(options, smoothing=0.0), with_stats, order is not None, chunks.gradient_filter)
    if chunks.recompute or is_sharded(layer.hidden):
        # On an explicit mesh JAX wants to be told how the sum over the rows of a matrix product is divided.
        row_losses, stats = _row_losses(plan, operands)
        result = by_row(row_losses) if chunks.recompute else row_losses.sum()
    else:
        result, stats = _total_loss(plan, operands)
    return result, None if stats is None else jax.lax.stop_gradient(jax.tree.map(by_row, stats))


def preferred_rows(num_features: int) -> int:
    """Return how many rows a chunk should have.

    Each reads the weight twice and reads and writes its gradient: 4 D K numbers, against 6 n D K operations. With D
    rows the logits take as much memory as the gradient of the weight, which is there anyway, and on a CPU reading the
    weight hardly shows. Compiled for a TPU v6e, D = 2048, K = 131072, bfloat16, the temporary memory is 1.1 GB with
    1024 rows, that of the weight's gradient, and 3.3 GB with 2048, hence no more.
    """
    return min(max(num_features, 256), 1024)


def _chunk(i: int | Array, array: Array) -> Array:
    part: Array = jax.lax.dynamic_index_in_dim(array, i, axis=1, keepdims=False)
    return part


def _with_chunk(i: Array, array: Array, part: Array) -> Array:
    updated: Array = jax.lax.dynamic_update_index_in_dim(array, part, i, axis=1)
    return updated


def _without_ignored(rows: _Rows) -> _Rows:
    """Return rows whose `hidden` is 0 where they do not count: 0 times a NaN would reach the weight's gradient."""
    if rows.counted is None:
        return rows
    return rows._replace(hidden=jnp.where(rows.counted[..., None], rows.hidden, 0))


def _logits(
    hidden: Float[Array, "n D"], weight: Float[Array, "D K"], bias: Float[Array, " K"] | None
) -> Float[Array, "n K"]:
    """Return the logits in the compute dtype. The weight has the dtype of hidden."""
    dtype = compute_dtype(hidden)
    logits = jnp.matmul(hidden, weight, preferred_element_type=dtype)
    return logits if bias is None else logits + bias.astype(dtype)[None, :]


def _losses_of(plan: _Plan, logits: Float[Array, "n K"], rows: _Rows, shared: _Shared) -> _Results:
    batch = Batch(
        logits=logits,
        labels=rows.labels,
        smoothing=0.0,
        counted=rows.counted,
        bad=rows.bad,
        prior=shared.prior,
        class_weight=shared.class_weight,
        class_mask=shared.class_mask,
    )
    targets = fused.Targets(rows.on, rows.off, rows.at_max)
    return fused.row_losses(batch, plan.options, plan.with_stats, targets, in_loop=True)


@partial(jax.jit, static_argnums=0)
def _row_losses(plan: _Plan, operands: _Operands) -> _Results:
    """Return the losses of all rows, to be differentiated by JAX: each chunk is computed again for that."""
    rows, shared = _without_ignored(operands.rows), operands.shared
    # The gradients of the chunks are added up in the dtype that the scan sees.
    dtype = max(compute_dtype(rows.hidden), compute_dtype(shared.weight), key=lambda dtype: dtype.itemsize)
    bias = None if shared.bias is None else shared.bias.astype(dtype)
    shared = shared._replace(weight=shared.weight.astype(dtype), bias=bias)

    @jax.checkpoint
    def chunk(rows: _Rows, shared: _Shared) -> _Results:
        logits = _logits(rows.hidden, shared.weight.astype(rows.hidden.dtype), shared.bias)
        return _losses_of(plan, logits, rows, shared)

    def step(_: None, rows: _Rows) -> tuple[None, _Results]:
        if not plan.skip:
            return None, chunk(rows, shared)
        shapes = jax.eval_shape(chunk, rows, shared)
        nothing = jax.tree.map(lambda result: jnp.zeros(result.shape, result.dtype), shapes)
        return None, jax.lax.cond(jnp.any(jnp.asarray(rows.counted)), chunk, lambda *_: nothing, rows, shared)

    _, by_chunk = jax.lax.scan(step, None, jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), rows))
    results: _Results = jax.tree.map(lambda array: jnp.moveaxis(array, 0, 1), by_chunk)
    return results


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _total_loss(plan: _Plan, operands: _Operands) -> tuple[Float[Array, ""], LossStats | None]:
    """Return the sum of all losses, and the statistics; with derivatives, its gradients are computed with it."""
    total, stats, _ = _with_gradients(plan, (), operands)
    return total, stats


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
) -> tuple[Float[Array, ""], LossStats | None, _Gradients]:
    """Return the sum of all losses, the statistics, and the gradients of the operands of these names."""
    results: tuple[Array, LossStats | None, _Gradients] = _total_and_gradients(plan, wanted, operands)
    return results


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _total_and_gradients(
    plan: _Plan, wanted: tuple[str, ...], operands: _Operands
) -> tuple[Float[Array, ""], LossStats | None, _Gradients]:
    rows, shared = _without_ignored(operands.rows), operands.shared
    chunk_rows, num_chunks, num_features = rows.hidden.shape
    dtype, floating = compute_dtype(rows.hidden), _floating(operands)
    weight = shared.weight.astype(rows.hidden.dtype)
    if rows.hidden.dtype == jnp.float16:
        # Gradients that are computed with the loss are not scaled yet, and in float16 many would be 0.
        rows, weight = rows._replace(hidden=rows.hidden.astype(dtype)), weight.astype(dtype)
    by_chunk = {*_FLOATING["rows"]}

    def step(i: Array, carry: tuple[_Results, _Gradients]) -> tuple[_Results, _Gradients]:
        results, gradients = carry
        part = _Operands(jax.tree.map(partial(_chunk, i), rows), shared)
        of_part, parts = _chunk_gradients(plan, wanted, part, weight)
        if "logits" in parts:
            of_logits = parts.pop("logits")
            if "bias" in wanted:
                parts["bias"] = jnp.sum(of_logits, axis=0)
            if plan.gradient_filter:
                products = _add_large(plan.gradient_filter, gradients, part, weight, of_logits)
            else:
                products = _add_all(gradients, part.rows.hidden, weight, of_logits)
            parts["hidden"] = products.pop("hidden")
            gradients = gradients | products
        for name in parts.keys() & gradients.keys():
            if name in by_chunk:
                gradients[name] = _with_chunk(i, gradients[name], parts[name])
            else:
                gradients[name] = gradients[name] + parts[name]
        return jax.tree.map(partial(_with_chunk, i), results, of_part), gradients

    first = _Operands(jax.tree.map(partial(_chunk, 0), rows), shared)
    shapes = jax.eval_shape(lambda: _chunk_gradients(plan, (), first, weight)[0])
    results = jax.tree.map(lambda part: jnp.zeros((chunk_rows, num_chunks), part.dtype), shapes)
    gradients = {name: jnp.zeros(floating[name].shape, dtype) for name in wanted}
    if plan.gradient_filter and "weight" in wanted:
        gradients["off_hidden"] = jnp.zeros(num_features, dtype)
    num_needed: int | Array = num_chunks
    if plan.skip:
        num_needed = -(-jnp.sum(jnp.asarray(rows.counted), dtype=jnp.int32) // chunk_rows)
    (losses, stats), gradients = jax.lax.fori_loop(0, num_needed, step, (results, gradients))
    if "off_hidden" in gradients:
        gradients["weight"] -= gradients.pop("off_hidden")[:, None] * _others(shared, dtype)[None, :]
    return losses.sum(), stats, gradients


@_total_and_gradients.defjvp
def _tangent_of_gradients(
    plan: _Plan, wanted: tuple[str, ...], primals: tuple[_Operands], tangents: tuple[_Operands]
) -> tuple[Any, Any]:
    """Differentiate the gradients as JAX does those of `_row_losses`."""
    dtype = compute_dtype(primals[0].rows.hidden)

    def again(operands: _Operands) -> tuple[Array, _Gradients]:
        def total(by: _Gradients) -> Array:
            results: _Results = _row_losses(plan, _replaced(operands, by))
            return results[0].sum()

        floating = _floating(operands)
        value: tuple[Array, _Gradients] = jax.value_and_grad(total)({name: floating[name] for name in wanted})
        total_loss, gradients = value
        return total_loss, {name: gradient.astype(dtype) for name, gradient in gradients.items()}

    total, stats, gradients = _with_gradients(plan, wanted, *primals)
    _, (of_total, of_gradients) = jax.jvp(again, primals, tangents)
    return (total, stats, gradients), (of_total, _zero_tangents(stats), of_gradients)


def _chunk_gradients(
    plan: _Plan, wanted: tuple[str, ...], part: _Operands, weight: Float[Array, "D K"]
) -> tuple[_Results, _Gradients]:
    """Return losses and statistics of a chunk, and the gradients of the logits and of what else the loss depends on."""
    logits = _logits(part.rows.hidden, weight, part.shared.bias)
    floating = _floating(part)
    by = {name: floating[name] for name in wanted if name not in Layer._fields}
    if len(by) < len(wanted):
        by["logits"] = logits

    def total(by: _Gradients) -> tuple[Array, _Results]:
        operands = _replaced(part, by)
        results = _losses_of(plan, by.get("logits", logits), operands.rows, operands.shared)
        return results[0].sum(), results

    if not by:
        return total(by)[1], {}
    gradients, results = jax.grad(total, has_aux=True)(by)
    return results, dict(gradients)


def _add_all(
    gradients: _Gradients, hidden: Float[Array, "n D"], weight: Float[Array, "D K"], of_logits: Float[Array, "n K"]
) -> _Gradients:
    """Return the gradient of hidden, and that of the weight with this chunk's added, if it is wanted."""
    of_logits, dtype = of_logits.astype(hidden.dtype), of_logits.dtype
    products = {"hidden": jnp.matmul(of_logits, weight.T, preferred_element_type=dtype)}
    if "weight" in gradients:
        products["weight"] = _add_product(gradients["weight"], hidden, of_logits)
    return products


def _add_product(
    total: Float[Array, "D K"], hidden: Float[Array, "n D"], of_logits: Float[Array, "n K"]
) -> Float[Array, "D K"]:
    """Return total + hidden.T @ of_logits."""

    def whole(total: Array, hidden: Array, of_logits: Array) -> Array:
        product: Array = jnp.matmul(hidden.T, of_logits, preferred_element_type=total.dtype)
        return total + product

    def in_tiles(total: Array, hidden: Array, of_logits: Array) -> Array:
        """Add it up in place: XLA for CPUs would write out the whole product first."""
        num_classes = total.shape[1]

        def step(j: Array, total: Array) -> Array:
            # Dynamic slices move a start back that leaves too few: what the tile before has had is taken as 0.
            start = jnp.minimum(j * _TILE, num_classes - _TILE)
            tile = jax.lax.dynamic_slice_in_dim(of_logits, start, _TILE, axis=1)
            tile = jnp.where((start + jnp.arange(_TILE, dtype=start.dtype) >= j * _TILE)[None, :], tile, 0)
            old = jax.lax.dynamic_slice_in_dim(total, start, _TILE, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(total, whole(old, hidden, tile), start, axis=1)

        tiled: Array = jax.lax.fori_loop(0, -(-num_classes // _TILE), step, total)
        return tiled

    if total.shape[1] <= _TILE:
        return whole(total, hidden, of_logits)
    added: Array = jax.lax.platform_dependent(total, hidden, of_logits, cpu=in_tiles, default=whole)
    return added


def _add_large(
    threshold: float,
    gradients: _Gradients,
    part: _Operands,
    weight: Float[Array, "D K"],
    of_logits: Float[Array, "n K"],
) -> _Gradients:
    """Return what `_add_all` does, without the classes whose probability is negligible in every row.

    Away from the label the gradient of a logit is S p_k - off w_k, of which the second part is the product of a number
    for each row and one for each class. It needs no matrix product: sum_k w_k W_k is the same for all rows, and the sum
    of off h over all rows is added up as "off_hidden". The first part is left out where it is small.
    """
    rows, dtype = part.rows, of_logits.dtype
    others, num_classes = _others(part.shared, dtype), weight.shape[1]
    off = jnp.where(rows.bad, 0, rows.off)
    if rows.counted is not None:
        off = jnp.where(rows.counted, off, 0)
    rest = of_logits + off[:, None] * others[None, :]
    is_large = ~(jnp.max(jnp.abs(rest), axis=0) <= threshold)  # NaN is large
    num_large = jnp.sum(is_large, dtype=jnp.int32)
    classes = jnp.flatnonzero(is_large, size=-(-num_classes // _TILE) * _TILE, fill_value=0)
    rest = rest.astype(rows.hidden.dtype)

    def step(j: Array, products: _Gradients) -> _Gradients:
        of_tile = jax.lax.dynamic_slice_in_dim(classes, j * _TILE, _TILE)
        tile = jnp.where((j * _TILE + jnp.arange(_TILE, dtype=j.dtype) < num_large)[None, :], rest[:, of_tile], 0)
        products = dict(products)
        products["hidden"] += jnp.matmul(tile, weight[:, of_tile].T, preferred_element_type=dtype)
        if "weight" in products:
            product = jnp.matmul(rows.hidden.T, tile, preferred_element_type=dtype)
            products["weight"] = products["weight"].at[:, of_tile].add(product)
        return products

    products = {"hidden": jnp.zeros(rows.hidden.shape, dtype)}
    if "weight" in gradients:
        products["weight"] = gradients["weight"]
    products = dict(jax.lax.fori_loop(0, -(-num_large // _TILE), step, products))
    sum_of_others = jnp.matmul(weight, others.astype(weight.dtype), preferred_element_type=dtype)
    products["hidden"] -= off[:, None] * sum_of_others[None, :]
    if "weight" in gradients:
        of_hidden = jnp.sum(off[:, None] * rows.hidden.astype(dtype), axis=0)
        products["off_hidden"] = gradients["off_hidden"] + of_hidden
    return products


def _others(shared: _Shared, dtype: jnp.dtype) -> Float[Array, " K"]:
    """Return w, to which the target is proportional away from the label."""
    others = jnp.ones(shared.weight.shape[1], dtype)
    for factor in (shared.prior, shared.class_weight):
        if factor is not None:
            others = others * factor
    return others if shared.class_mask is None else jnp.where(shared.class_mask, others, 0)


def _floating(operands: _Operands) -> dict[str, Any]:
    """Return what there are derivatives by."""
    by_name = {name: getattr(getattr(operands, part), name) for part, names in _FLOATING.items() for name in names}
    return {name: array for name, array in by_name.items() if array is not None}


def _replaced(operands: _Operands, by: _Gradients) -> _Operands:
    rows, shared = ({name: by[name] for name in names if name in by} for names in _FLOATING.values())
    return _Operands(operands.rows._replace(**rows), operands.shared._replace(**shared))


def _zero_tangents(tree: Any) -> Any:
    def zero(array: Array) -> Any:
        if jnp.issubdtype(array.dtype, jnp.floating):
            return jnp.zeros_like(array)
        return np.zeros(array.shape, jax.dtypes.float0)

    return jax.tree.map(zero, tree)
