"""The sums over the classes of a linear layer, as JAX primitives that never hold all logits.

The logits are computed some rows at a time, again for each derivative; of a forward pass only the sums are kept. A
compiler for TPUs keeps small arrays in the core's memory, so there the classes are divided as well, as in tiles.py.

- `lsce_layer_sums` and `lsce_layer_slopes`: see sum_rules.py.
- `lsce_layer_cotangents`: the transpose of the slopes, for reverse mode.

Under vmap they are the plain functions, which JAX maps and differentiates.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad
from jaxtyping import Array

from lsce_jax import tiles
from lsce_jax.inputs import compute_dtype, varying_like
from lsce_jax.layer import Layer, LayerOperands, chunk_logits
from lsce_jax.primitives import define
from lsce_jax.row_sums import row_sums
from lsce_jax.sum_rules import ByName, Kind, bind, define_sums, derivative_of_plain, map_plainly, on_leaves
from lsce_jax.sums import Operands, Peaks, Sums, is_label, sums_at


def by_chunks(operands: LayerOperands, function: Callable[[Operands, Any], Any], peaks: Peaks | None = None) -> Any:
    """Return the results of a function of the operands of a chunk and its peaks, for all rows."""
    # The scan adds up the gradients of the chunks in the dtype of its operands.
    dtype = max(compute_dtype(operands.hidden), compute_dtype(operands.weight), key=lambda dtype: dtype.itemsize)
    bias = None if operands.bias is None else operands.bias.astype(dtype)
    operands = replace(operands, weight=operands.weight.astype(dtype), bias=bias)

    @jax.checkpoint
    def chunk(part: LayerOperands, peaks: Peaks | None) -> Any:
        layer = Layer(part.hidden, part.weight.astype(part.hidden.dtype), part.bias)
        return function(part.of_logits(chunk_logits(layer)), peaks)

    def step(_: None, rows: tuple[ByName, Peaks | None]) -> tuple[None, Any]:
        of_rows, peaks = rows
        part = replace(operands, **of_rows)
        if not operands.skip:
            return None, chunk(part, peaks)
        shapes = jax.eval_shape(chunk, part, peaks)
        nothing = varying_like(jax.tree.map(lambda result: jnp.zeros(result.shape, result.dtype), shapes), part)
        return None, jax.lax.cond(jnp.any(jnp.asarray(part.counted)), chunk, lambda *_: nothing, part, peaks)

    by_chunk = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (operands.rows, peaks))
    return jax.tree.map(lambda array: jnp.moveaxis(array, 0, 1), jax.lax.scan(step, None, by_chunk)[1])


def _sums(operands: LayerOperands) -> tuple[Peaks, Sums]:
    results: tuple[Peaks, Sums] = by_chunks(operands, lambda of_chunk, _: row_sums(of_chunk))
    return results


def _at_peaks(operands: LayerOperands, peaks: Peaks) -> Sums:
    def of_chunk(operands: Operands, peaks: Peaks) -> Sums:
        return sums_at(operands, peaks, is_label(operands), differentiable=True)

    results: Sums = by_chunks(operands, of_chunk, peaks)
    return results


def _plain_cotangents(
    operands: LayerOperands, peaks: Peaks, given: dict[int, Array], *, names: tuple[str, ...]
) -> ByName:
    given = jax.tree.map(jax.lax.optimization_barrier, given)  # as in `row_sums.cotangents_of_sums`

    def given_sums(by_name: ByName) -> dict[int, Array]:
        results = jax.tree.leaves(_at_peaks(replace(operands, **by_name), peaks))
        return {i: results[i] for i in given}

    results: tuple[ByName] = jax.vjp(given_sums, {name: getattr(operands, name) for name in names})[1](given)
    return results[0]


def _by_tiles(function: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of tiles, or the plain one where the number of rows or classes is a symbol."""

    def of_operands(operands: LayerOperands, *others: Any, **params: Any) -> Any:
        sizes = (*operands.hidden.shape, *operands.weight.shape)
        return (function if all(isinstance(size, int) for size in sizes) else plain)(operands, *others, **params)

    return of_operands


def _cotangents(operands: LayerOperands, peaks: Peaks, given: dict[int, Array], names: list[str]) -> ByName:
    results: ByName = bind(_cotangents_p, _plain_cotangents, operands, peaks, given, names=tuple(names))
    return results


_cotangents_p = define(
    "lsce_layer_cotangents",
    on_leaves(_plain_cotangents),
    multiple_results=True,
    undivided=("tpu",),
    tpu=on_leaves(_by_tiles(tiles.cotangents, _plain_cotangents)),
)
ad.primitive_jvps[_cotangents_p] = partial(derivative_of_plain, _cotangents_p, _plain_cotangents)
map_plainly(_cotangents_p, _plain_cotangents)

_primitives = define_sums(
    Kind("lsce_layer", _sums, _at_peaks, _cotangents, floating=("hidden", "weight", "bias", "prior", "class_weight")),
    undivided=("tpu",),
    tpu=_by_tiles(tiles.sums, _sums),
)
map_plainly(_primitives.sums, _primitives.plain_sums)
map_plainly(_primitives.slopes, _primitives.plain_slopes)


def layer_sums(operands: LayerOperands) -> tuple[Peaks, Sums]:
    """Return the sums of each row, and the constants that they are relative to; both [n, C]."""
    results: tuple[Peaks, Sums] = bind(_primitives.sums, _primitives.plain_sums, operands)
    return results
