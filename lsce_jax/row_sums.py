"""`row_sums` as JAX primitives, with one rule for each thing that JAX does to a function.

- `lsce_row_sums`: the sums. XLA for CPUs writes out arrays that XLA for accelerators fuses, so there the sums are
  computed as in cpu.py. gpu.py has what XLA for GPUs fuses better.
- `lsce_row_slopes`: their derivative, that of the plain sums at constant peaks. Operands and peaks are kept for it, and
  nothing more: the backward pass computes exp again, which is faster than writing it to memory and reading it back.
  Forward mode and derivatives of every order follow.

Under vmap the new dimension becomes one of rows.

A function with custom_jvp and custom_vmap would not do: where JAX differentiates a scan twice it drops the former, and
the latter has no second derivatives.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jaxtyping import Array

from lsce_jax import cpu, gpu
from lsce_jax.primitives import define
from lsce_jax.sums import CLASS_VECTORS, Operands, Peaks, Sums, is_label, sums, sums_at

ByName = dict[str, Any]  # values for the operands with these names


# Both compiled, so that calls outside `jit` are fused as well.


@jax.jit
def row_sums(operands: Operands) -> tuple[Peaks, Sums]:
    """Return the sums of each row, and the constants that they are relative to."""
    results: tuple[Peaks, Sums] = _bind(_row_sums_p, sums, operands)
    return results


@jax.jit
def row_slopes(operands: Operands, peaks: Peaks, tangents: ByName) -> Sums:
    """Return the tangents of the sums for tangents of some operands."""
    results: Sums = _bind(_row_slopes_p, _slopes, operands, peaks, tangents)
    return results


def _bind(primitive: Primitive, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a primitive computes, in the structure that its plain function gives."""
    leaves, structure = jax.tree.flatten(arguments)
    results = primitive.bind(*leaves, structure=structure)  # type: ignore[no-untyped-call]
    return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(function, *arguments)), results)


def _on_leaves(function: Callable[..., Any]) -> Callable[..., list[Array]]:
    def of_leaves(*leaves: Array, structure: Any) -> list[Array]:
        results: list[Array] = jax.tree.leaves(function(*jax.tree.unflatten(structure, leaves)))
        return results

    return of_leaves


def _slopes(operands: Operands, peaks: Peaks, tangents: ByName) -> Sums:
    by_name = {name: getattr(operands, name) for name in tangents}
    slopes: Sums = jax.jvp(partial(_at_peaks, operands, peaks), (by_name,), (tangents,))[1]
    return slopes


def _at_peaks(operands: Operands, peaks: Peaks, by_name: ByName) -> Sums:
    """Return the sums for other values of some operands; only their derivatives by these are right."""
    return sums_at(replace(operands, **by_name), peaks, is_label(operands), differentiable=True)


# --- Rules ------------------------------------------------------------------------------------------------------------


def _derivative(primals: Sequence[Array], tangents: Sequence[Any], *, structure: Any) -> tuple[list[Array], list[Any]]:
    (operands,) = jax.tree.unflatten(structure, primals)
    (index_of,) = jax.tree.unflatten(structure, list(range(len(primals))))
    peaks, results = row_sums(operands)
    given = {
        name: tangents[index]
        for name in ("logits", "prior", "class_weight")
        if (index := getattr(index_of, name)) is not None and not isinstance(tangents[index], ad.Zero)
    }
    slopes = row_slopes(operands, peaks, given)
    return jax.tree.leaves((peaks, results)), jax.tree.leaves((jax.tree.map(jnp.zeros_like, peaks), slopes))


def _derivative_of_slopes(
    primals: Sequence[Array], tangents: Sequence[Any], *, structure: Any
) -> tuple[list[Array], list[Array]]:
    slopes = _row_slopes_p.bind(*primals, structure=structure)  # type: ignore[no-untyped-call]
    given = {i: tangent for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)}

    @jax.checkpoint
    def of_given(by: dict[int, Array]) -> list[Array]:
        return _on_leaves(_slopes)(*(by.get(i, primal) for i, primal in enumerate(primals)), structure=structure)

    return slopes, jax.jvp(of_given, ({i: primals[i] for i in given},), (given,))[1]


def _transpose_of_slopes(cotangents: Sequence[Any], *arguments: Any, structure: Any) -> list[Any]:
    given = {i: cotangent for i, cotangent in enumerate(cotangents) if not isinstance(cotangent, ad.Zero)}
    is_linear = [ad.is_undefined_primal(argument) for argument in arguments]  # type: ignore[no-untyped-call]
    operands, peaks, tangents = jax.tree.unflatten(
        structure, [None if linear else argument for linear, argument in zip(is_linear, arguments, strict=True)]
    )
    # A tangent that is known, such as an array of zeros, has no cotangent.
    names = [name for name in sorted(tangents) if tangents[name] is None]
    results = cotangents_of_sums(operands, peaks, given, names) if given else {}
    of_leaf = iter([results.get(name) for name in names])
    return [next(of_leaf) if linear else None for linear in is_linear]


def cotangents_of_sums(operands: Operands, peaks: Peaks, given: dict[int, Array], names: list[str]) -> ByName:
    """Return the cotangents of the operands with these names, for those of the sums that are given by their place."""
    # A barrier for each, so that the cotangents of a row are computed once, not again for every class. JAX 0.12 cannot
    # transpose a barrier of which a part is known to be zero.
    given = jax.tree.map(jax.lax.optimization_barrier, given)
    logits = jax.lax.platform_dependent(operands.logits, cuda=gpu.apart, default=lambda logits: logits)
    operands = replace(operands, logits=logits)

    def by_comparison() -> ByName:
        def given_sums(by_name: ByName) -> dict[int, Array]:
            results = jax.tree.leaves(_at_peaks(operands, peaks, by_name))
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
    is_vector = _is_class_vector(structure)
    if any(dim is not None and vector for dim, vector in zip(dims, is_vector, strict=True)):
        axes = [None if dim is None else 0 for dim in dims]
        of_rows = jax.vmap(
            lambda *given: _on_leaves(function)(*given, structure=structure), in_axes=axes, axis_size=size
        )(*leaves)
    else:
        rows = [
            leaf if vector or dim is not None else jnp.broadcast_to(leaf, (size, *leaf.shape))
            for leaf, dim, vector in zip(leaves, dims, is_vector, strict=True)
        ]
        of_rows = primitive.bind(*rows, structure=structure)  # type: ignore[no-untyped-call]
    return of_rows, [0] * len(of_rows)


def _is_class_vector(structure: Any) -> list[bool]:
    """Return for each leaf whether it has one value for each class, by its name."""
    with_paths, _ = jax.tree_util.tree_flatten_with_path(jax.tree.unflatten(structure, [0] * structure.num_leaves))
    return [getattr(path[-1], "name", getattr(path[-1], "key", None)) in CLASS_VECTORS for path, _ in with_paths]


def _define(name: str, function: Callable[..., Any], **on_platform: Callable[..., Any]) -> Primitive:
    """Return a primitive that computes a function of the leaves of its arguments."""
    of_leaves = {platform: _on_leaves(each) for platform, each in on_platform.items()}
    primitive = define(name, _on_leaves(function), multiple_results=True, **of_leaves)
    batching.primitive_batchers[primitive] = partial(_under_vmap, primitive, function)
    return primitive


_row_sums_p = _define("lsce_row_sums", sums, cpu=cpu.row_sums, cuda=gpu.row_sums)
_row_slopes_p = _define("lsce_row_slopes", _slopes)
ad.primitive_jvps[_row_sums_p] = _derivative
ad.primitive_jvps[_row_slopes_p] = _derivative_of_slopes
ad.primitive_transposes[_row_slopes_p] = _transpose_of_slopes
