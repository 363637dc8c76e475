"""The sums over the classes of logits, as JAX primitives: `lsce_row_sums` and `lsce_row_slopes`.

sum_rules.py has their derivatives. XLA for CPUs writes out arrays that XLA for accelerators fuses, so there the sums
are computed as in cpu.py. gpu.py has what XLA for GPUs fuses better.

Under vmap the new dimension becomes one of rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching
from jaxtyping import Array

from lsce_jax import cpu, gpu
from lsce_jax.sum_rules import ByName, Kind, bind, define_sums, on_leaves
from lsce_jax.sums import CLASS_VECTORS, Operands, Peaks, Sums, is_label, sums, sums_at


def cotangents_of_sums(operands: Operands, peaks: Peaks, given: dict[int, Array], names: list[str]) -> ByName:
    """Return the cotangents of the operands with these names, for those of the sums that are given by their place."""
    # A barrier for each, so that the cotangents of a row are computed once, not again for every class. JAX 0.12 cannot
    # transpose a barrier of which a part is known to be zero.
    given = jax.tree.map(jax.lax.optimization_barrier, given)
    logits = jax.lax.platform_dependent(operands.logits, cuda=gpu.apart, default=lambda logits: logits)
    operands = replace(operands, logits=logits)

    def by_comparison() -> ByName:
        def given_sums(by_name: ByName) -> dict[int, Array]:
            results = jax.tree.leaves(_at_peaks(replace(operands, **by_name), peaks))
            return {i: results[i] for i in given}

        results: tuple[ByName] = jax.vjp(given_sums, {name: getattr(operands, name) for name in names})[1](given)
        return results[0]

    # XLA for CPUs would write a narrow gradient out in float32 to write into it, and any gradient to memory of its own.
    needs_memory = operands.in_place or operands.logits.dtype.itemsize < peaks.peak.dtype.itemsize
    if names != ["logits"] or needs_memory or not cpu.has_index(operands):
        return by_comparison()
    results: ByName = jax.lax.platform_dependent(
        cpu=lambda: {"logits": cpu.logit_cotangents(operands, peaks, given)}, default=by_comparison
    )
    return results


def _at_peaks(operands: Operands, peaks: Peaks) -> Sums:
    return sums_at(operands, peaks, is_label(operands), differentiable=True)


def _under_vmap(
    primitive: Primitive,
    function: Callable[..., Any],
    leaves: Sequence[Array],
    dims: Sequence[int | None],
    *,
    structure: Any,
) -> tuple[list[Array], list[int]]:
    """Make the dimension that vmap adds one of rows, so that a loss of one row under vmap is as fast as a batch."""
    size = next(leaf.shape[dim] for leaf, dim in zip(leaves, dims, strict=True) if dim is not None)
    leaves = [leaf if dim is None else jnp.moveaxis(leaf, dim, 0) for leaf, dim in zip(leaves, dims, strict=True)]
    is_vector = [
        has_name and leaf.ndim - (dim is not None) == 1
        for has_name, leaf, dim in zip(_is_class_vector(structure), leaves, dims, strict=True)
    ]
    if any(dim is not None and vector for dim, vector in zip(dims, is_vector, strict=True)):
        axes = [None if dim is None else 0 for dim in dims]
        of_rows = jax.vmap(
            lambda *given: on_leaves(function)(*given, structure=structure), in_axes=axes, axis_size=size
        )(*leaves)
    else:
        rows = [
            leaf if vector or dim is not None else jnp.broadcast_to(leaf, (size, *leaf.shape))
            for leaf, dim, vector in zip(leaves, dims, is_vector, strict=True)
        ]
        of_rows = primitive.bind(*rows, structure=structure)  # type: ignore[no-untyped-call]
    return of_rows, [0] * len(of_rows)


def _is_class_vector(structure: Any) -> list[bool]:
    """Return for each leaf whether it has one value for each class, by its name; a mask may have them for each row."""
    with_paths, _ = jax.tree_util.tree_flatten_with_path(jax.tree.unflatten(structure, [0] * structure.num_leaves))
    return [getattr(path[-1], "name", getattr(path[-1], "key", None)) in CLASS_VECTORS for path, _ in with_paths]


_primitives = define_sums(
    Kind("lsce_row", sums, _at_peaks, cotangents_of_sums, floating=("logits", "prior", "class_weight")),
    # A compiler that divides groups of classes gathers all of them.
    undivided=("cpu",),
    cpu=cpu.row_sums,
    cuda=gpu.row_sums,
)
batching.primitive_batchers[_primitives.sums] = partial(_under_vmap, _primitives.sums, _primitives.plain_sums)
batching.primitive_batchers[_primitives.slopes] = partial(_under_vmap, _primitives.slopes, _primitives.plain_slopes)


# Both compiled, so that calls outside `jit` are fused as well.


@jax.jit
def row_sums(operands: Operands) -> tuple[Peaks, Sums]:
    """Return the sums of each row, and the constants that they are relative to."""
    results: tuple[Peaks, Sums] = bind(_primitives.sums, _primitives.plain_sums, operands)
    return results


@jax.jit
def row_slopes(operands: Operands, peaks: Peaks, tangents: ByName) -> Sums:
    """Return the tangents of the sums for tangents of some operands."""
    results: Sums = bind(_primitives.slopes, _primitives.plain_slopes, operands, peaks, tangents)
    return results
