r"""The linear layer and the loss, some rows at a time: no more than one chunk of logits is ever in memory.

The gradient of a chunk's logits z = h W + b gives those of h, W and b by two matrix products, and the fused loss gives
the gradient of the logits. That is all; what remains is when.

With the loss. A sum of losses hands every row the same upstream gradient, so the gradients of all inputs are computed
with the loss, while the logits are at hand (6 N D K operations), and multiplied with the upstream gradient later. They
are kept until then: one array as large as the weight, in float32 for narrower dtypes. This is a custom_jvp whose tangent
is their inner product with the tangents that come in: its transpose is the multiplication, so that reverse mode costs
what it should and forward mode works as well.

After it. Losses of single rows may be weighted by anything afterwards, so their chunks are computed again for the
gradient (8 N D K): a scan over `jax.checkpoint`, differentiated by JAX, to any order. The derivatives of the first kind's
gradients go this way too.

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
from lsce_jax.inputs import Batch, compute_dtype
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
    """What each row has of its own, in chunks; or for all rows the same number."""

    hidden: Float[Array, "C n D"]
    on: Float[Array, "C n"] | Float[Array, ""]
    off: Float[Array, "C n"] | Float[Array, ""]
    at_max: Float[Array, "C n"] | Float[Array, ""] | None
    labels: Int[Array, "C n"]
    counted: Bool[Array, "C n"] | None
    bad: Bool[Array, "C n"]


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
_Results = tuple[Float[Array, "C n"], LossStats | None]
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
    batch_shape, num_features = batch.batch_shape, layer.hidden.shape[-1]
    num_rows, num_chunks, chunk_rows = math.prod(batch_shape), 1, math.prod(batch_shape)
    if isinstance(num_rows, int):  # and not symbolic
        num_chunks = -(-num_rows // (chunks.chunk_size or choose_chunk_size(num_features)))
        chunk_rows = -(-num_rows // num_chunks)
    counted, order = batch.counted, None
    if counted is None and num_rows != num_chunks * chunk_rows:
        counted = jnp.ones(batch_shape, bool)

    def padded(array: Array) -> Array:
        array = array.reshape(num_rows, *array.shape[len(batch_shape) :])
        if num_rows == num_chunks * chunk_rows:
            return array
        return jnp.pad(array, [(0, num_chunks * chunk_rows - num_rows)] + [(0, 0)] * (array.ndim - 1))

    if batch.counted is not None and num_chunks > 1 and jax.device_count() == 1:
        order = jnp.argsort(~padded(batch.counted), stable=True)

    def in_chunks(array: Array) -> Array:
        if batch_shape and not array.ndim:  # one number for all rows
            return array
        array = padded(array)
        if order is not None:
            return array[order].reshape(num_chunks, chunk_rows, *array.shape[1:])
        return jnp.moveaxis(array.reshape(chunk_rows, num_chunks, *array.shape[1:]), 1, 0)

    def by_row(array: Array) -> Array:
        if order is None:
            array = jnp.moveaxis(array, 0, 1).reshape(-1)
        else:
            array = jnp.zeros_like(array.reshape(-1)).at[order].set(array.reshape(-1), unique_indices=True)
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
    if chunks.recompute:
        row_losses, stats = _row_losses(plan, operands)
        result = by_row(row_losses)
    else:
        result, stats = _total_loss(plan, operands)
    return result, None if stats is None else jax.lax.stop_gradient(jax.tree.map(by_row, stats))


def choose_chunk_size(num_features: int) -> int:
    """Return how many rows to compute the logits of at a time.

    Each chunk reads the weight twice and reads and writes its gradient: 4 D K numbers, against 6 n D K operations. From
    256 rows on that is a small part of the time on a CPU. With D rows the logits take as much memory as the gradient of
    the weight, which is there anyway; an accelerator, with more operations to a byte, has use for that many. Beyond 4096
    none has.
    """
    return min(max(num_features, 256), 4096)


def _logits(
    hidden: Float[Array, "n D"], weight: Float[Array, "D K"], bias: Float[Array, " K"] | None
) -> Float[Array, "n K"]:
    """Return the logits in the compute dtype. The weight has the dtype of hidden."""
    dtype = compute_dtype(hidden)
    logits = jnp.matmul(hidden, weight, preferred_element_type=dtype)
    return logits if bias is None else logits + bias.astype(dtype)[None, :]


def _chunk_losses(
    plan: _Plan, logits: Float[Array, "n K"], rows: _Rows, shared: _Shared
) -> tuple[Float[Array, " n"], LossStats | None]:
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


def _without_ignored(rows: _Rows) -> _Rows:
    """Return rows whose `hidden` is 0 where they do not count: 0 times a NaN would reach the weight's gradient."""
    if rows.counted is None:
        return rows
    return rows._replace(hidden=jnp.where(rows.counted[..., None], rows.hidden, 0))


@partial(jax.jit, static_argnums=0)
def _row_losses(plan: _Plan, operands: _Operands) -> _Results:
    """Return the losses of all rows, to be differentiated by JAX: each chunk is computed again for that."""
    shared, rows = operands.shared, _without_ignored(operands.rows)
    dtype = compute_dtype(rows.hidden)
    # The gradients of the chunks are added up in the dtype that the scan sees.
    shared = shared._replace(weight=shared.weight.astype(jnp.promote_types(shared.weight.dtype, dtype)))
    fixed = rows._replace(**{name: None for name, array in rows._asdict().items() if array is not None and array.ndim})

    @jax.checkpoint
    def chunk(shared: _Shared, fixed: _Rows, scanned: dict[str, Array]) -> tuple[Array, LossStats | None]:
        rows = fixed._replace(**scanned)
        logits = _logits(rows.hidden, shared.weight.astype(rows.hidden.dtype), shared.bias)
        return _chunk_losses(plan, logits, rows, shared)

    def step(_: None, scanned: dict[str, Array]) -> tuple[None, tuple[Array, LossStats | None]]:
        if not plan.skip:
            return None, chunk(shared, fixed, scanned)
        shapes = jax.eval_shape(chunk, shared, fixed, scanned)
        nothing = jax.tree.map(lambda result: jnp.zeros(result.shape, result.dtype), shapes)
        some = jnp.any(scanned["counted"])
        return None, jax.lax.cond(some, chunk, lambda *_: nothing, shared, fixed, scanned)

    scanned = {name: array for name, array in rows._asdict().items() if array is not None and array.ndim}
    _, results = jax.lax.scan(step, None, scanned)
    return results


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _total_loss(plan: _Plan, operands: _Operands) -> tuple[Float[Array, ""], LossStats | None]:
    """Return the sum of all losses, and the statistics; with derivatives, its gradients are computed with it."""
    total, stats, _ = _with_gradients(plan, (), operands)
    return total, stats


def _total_tangent(plan: _Plan, primals: tuple[_Operands], tangents: tuple[_Operands]) -> tuple[Any, Any]:
    given = {name: tangent for name, tangent in _floating(tangents[0]).items() if not isinstance(tangent, SymbolicZero)}
    total, stats, gradients = _with_gradients(plan, tuple(given), *primals)
    tangent = jnp.zeros_like(total)
    for name, of in given.items():
        tangent += jnp.sum(gradients[name] * of.astype(gradients[name].dtype))
    return (total, stats), (tangent, _zero_tangents(stats))


_total_loss.defjvp(_total_tangent, symbolic_zeros=True)


@partial(jax.jit, static_argnums=(0, 1))
@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _with_gradients(
    plan: _Plan, wanted: tuple[str, ...], operands: _Operands
) -> tuple[Float[Array, ""], LossStats | None, _Gradients]:
    """Return the sum of all losses, the statistics, and the gradients of the operands of these names."""
    shared, rows = operands.shared, _without_ignored(operands.rows)
    dtype = compute_dtype(rows.hidden)
    weight = shared.weight.astype(rows.hidden.dtype)
    num_chunks, chunk_rows, _ = rows.hidden.shape
    floating = _floating(operands)
    of_loss = tuple(name for name in wanted if name not in {"hidden", "weight", "bias"})
    wants_logits = len(of_loss) < len(wanted)

    def chunk(i: Array) -> tuple[Any, _Gradients]:
        """Return losses and statistics of a chunk, and the gradients of the loss's operands and of the logits."""
        part = jax.tree.map(lambda array: array[i] if array.ndim else array, rows)
        logits = _logits(part.hidden, weight, shared.bias)

        def total(by: _Gradients) -> tuple[Array, Any]:
            results = _chunk_losses(
                plan,
                by.get("logits", logits),
                part._replace(**{name: by[name] for name in _FLOATING["rows"] if name in by}),
                shared._replace(**{name: by[name] for name in _FLOATING["shared"] if name in by}),
            )
            return results[0].sum(), results

        by = {name: getattr(part, name, None) for name in of_loss}
        by = {name: getattr(shared, name) if by[name] is None else by[name] for name in of_loss}
        if wants_logits:
            by["logits"] = logits
        if not by:
            return total(by)[1], {}
        gradients, results = jax.grad(total, has_aux=True)(by)
        return results, gradients

    def add(gradients: _Gradients, i: Array, parts: _Gradients) -> _Gradients:
        """Return the gradients with those of a chunk added."""
        parts = dict(parts)
        hidden, of_logits = rows.hidden[i], parts.pop("logits", None)
        added = {}
        for name, gradient in gradients.items():
            if name == "hidden":
                part = jnp.matmul(of_logits.astype(hidden.dtype), weight.T, preferred_element_type=dtype)
                added[name] = jax.lax.dynamic_update_index_in_dim(gradient, part, i, axis=0)
            elif name == "weight":
                added[name] = _add_product(gradient, hidden, of_logits.astype(hidden.dtype))
            elif name == "bias":
                added[name] = gradient + jnp.sum(of_logits, axis=0)
            elif name in _FLOATING["rows"] and floating[name].ndim:
                added[name] = jax.lax.dynamic_update_index_in_dim(gradient, parts[name], i, axis=0)
            else:
                added[name] = gradient + parts[name]
        return added

    def step(i: Array, carry: tuple[Any, _Gradients]) -> tuple[Any, _Gradients]:
        results, gradients = carry
        part, parts = chunk(i)
        results = jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, i, axis=0), results, part
        )
        return results, add(gradients, i, parts)

    shapes, _ = jax.eval_shape(chunk, jnp.int32(0))
    results = jax.tree.map(lambda part: jnp.zeros((num_chunks, *part.shape), part.dtype), shapes)
    gradients = {name: jnp.zeros(floating[name].shape, dtype) for name in wanted}
    num_needed: int | Array = num_chunks
    if plan.skip:
        num_needed = -(-jnp.sum(rows.counted, dtype=jnp.int32) // chunk_rows)
    (losses, stats), gradients = jax.lax.fori_loop(0, num_needed, step, (results, gradients))
    return losses.sum(), stats, gradients


@_with_gradients.__wrapped__.defjvp
def _with_gradients_tangent(
    plan: _Plan, wanted: tuple[str, ...], primals: tuple[_Operands], tangents: tuple[_Operands]
) -> tuple[Any, Any]:
    """Differentiate the gradients as JAX does those of `_row_losses`."""

    def again(operands: _Operands) -> tuple[Array, _Gradients]:
        floating = _floating(operands)

        def total(by: _Gradients) -> Array:
            return _row_losses(plan, _replaced(operands, by))[0].sum()

        value, gradients = jax.value_and_grad(total)({name: floating[name] for name in wanted})
        dtype = compute_dtype(operands.rows.hidden)
        return value, {name: gradient.astype(dtype) for name, gradient in gradients.items()}

    total, stats, gradients = _with_gradients(plan, wanted, *primals)
    _, (of_total, of_gradients) = jax.jvp(again, primals, tangents)
    return (total, stats, gradients), (of_total, _zero_tangents(stats), of_gradients)


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
            tile = jnp.where(start + jnp.arange(_TILE) >= j * _TILE, tile, 0)
            old = jax.lax.dynamic_slice_in_dim(total, start, _TILE, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(total, whole(old, hidden, tile), start, axis=1)

        tiled: Array = jax.lax.fori_loop(0, -(-num_classes // _TILE), step, total)
        return tiled

    if total.shape[1] <= _TILE:
        return whole(total, hidden, of_logits)
    added: Array = jax.lax.platform_dependent(total, hidden, of_logits, cpu=in_tiles, default=whole)
    return added


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
