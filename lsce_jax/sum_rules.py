"""How sums over the classes become JAX primitives, with one rule for each thing that JAX does to a function.

There are two primitives for each kind of sums, those of logits (row_sums.py) and those of a linear layer
(layer_sums.py):

- `..._sums`: the sums. Platforms may compute them in ways of their own.
- `..._slopes`: their derivative, that of the plain sums at constant peaks. Operands and peaks are kept for it, and
  nothing more: the backward pass computes exp again, which is faster than writing it to memory and reading it back.
  Forward mode and derivatives of every order follow.

A function with custom_jvp and custom_vmap would not do: where JAX differentiates a scan twice it drops the former, and
the latter has no second derivatives.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jaxtyping import Array

from lsce_jax.inputs import varying_like
from lsce_jax.primitives import define
from lsce_jax.sums import Peaks, Sums

ByName = dict[str, Any]  # values for the operands with these names


class Kind(NamedTuple):
    """A kind of sums.

    Args:
        name: the beginning of the primitives' names.
        sums: returns peaks and sums of some operands.
        at_peaks: takes operands and peaks, and returns the sums at these peaks. Their derivatives with respect to the
            operands are right; their values need not be.
        cotangents: takes operands, peaks, the cotangents of some sums by their place, and names of operands. It returns
            the cotangents of these operands by name.
        floating: the names of the operands that sums can be differentiated with respect to.
    """

    name: str
    sums: Callable[[Any], tuple[Peaks, Sums]]
    at_peaks: Callable[[Any, Peaks], Sums]
    cotangents: Callable[[Any, Peaks, dict[int, Array], list[str]], ByName]
    floating: tuple[str, ...]


class Primitives(NamedTuple):
    """The primitives of a kind of sums, and the plain functions that they compute."""

    sums: Primitive
    slopes: Primitive
    plain_sums: Callable[..., Any]
    plain_slopes: Callable[..., Any]


def define_sums(kind: Kind, *, undivided: Collection[str] = (), **on_platform: Callable[..., Any]) -> Primitives:
    """Return the primitives of a kind of sums, with all rules but those for vmap.

    Args:
        kind: what they compute.
        undivided: see `primitives.define`.
        on_platform: how a platform, such as cpu, computes `kind.sums`.
    """

    def slopes(operands: Any, peaks: Peaks, tangents: ByName) -> Sums:
        by_name = {name: getattr(operands, name) for name in tangents}

        def at_peaks(by_name: ByName) -> Sums:
            return kind.at_peaks(replace(operands, **by_name), peaks)

        tangent: Sums = jax.jvp(at_peaks, (by_name,), (tangents,))[1]
        return tangent

    of_leaves = {platform: on_leaves(each) for platform, each in on_platform.items()}
    sums_p = define(f"{kind.name}_sums", on_leaves(kind.sums), multiple_results=True, undivided=undivided, **of_leaves)
    slopes_p = define(f"{kind.name}_slopes", on_leaves(slopes), multiple_results=True)
    primitives = Primitives(sums_p, slopes_p, kind.sums, slopes)
    ad.primitive_jvps[sums_p] = partial(_derivative, kind, primitives)
    ad.primitive_jvps[slopes_p] = partial(derivative_of_plain, slopes_p, slopes)
    ad.primitive_transposes[slopes_p] = partial(_transpose, kind)
    return primitives


def bind(primitive: Primitive, function: Callable[..., Any], *arguments: Any, **params: Any) -> Any:
    """Return what a primitive computes, in the structure that its plain function gives."""
    leaves, structure = jax.tree.flatten(arguments)
    # In shard_map, JAX adds up the cotangents of what all devices share only where it is made to differ.
    leaves = varying_like(leaves, leaves)
    results = primitive.bind(*leaves, structure=structure, **params)  # type: ignore[no-untyped-call]
    of_arguments = partial(function, **params)
    return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(of_arguments, *arguments)), results)


def on_leaves(function: Callable[..., Any]) -> Callable[..., list[Array]]:
    """Return a function of the leaves of its arguments, which returns the leaves of its results."""

    def of_leaves(*leaves: Array, structure: Any, **params: Any) -> list[Array]:
        results: list[Array] = jax.tree.leaves(function(*jax.tree.unflatten(structure, leaves), **params))
        return results

    return of_leaves


def plain_under_vmap(
    function: Callable[..., Any], leaves: Sequence[Array], dims: Sequence[int | None], **params: Any
) -> tuple[list[Array], list[int]]:
    """Map the plain function of a primitive."""
    results = jax.vmap(partial(on_leaves(function), **params), in_axes=tuple(dims))(*leaves)
    return results, [0] * len(results)


def map_plainly(primitive: Primitive, function: Callable[..., Any]) -> None:
    """Make `plain_under_vmap` the rule of a primitive."""
    batching.primitive_batchers[primitive] = partial(plain_under_vmap, function)


# --- Rules ------------------------------------------------------------------------------------------------------------


def _derivative(
    kind: Kind, primitives: Primitives, primals: Sequence[Array], tangents: Sequence[Any], *, structure: Any
) -> tuple[list[Array], list[Any]]:
    (operands,) = jax.tree.unflatten(structure, primals)
    (index_of,) = jax.tree.unflatten(structure, list(range(len(primals))))
    peaks, results = bind(primitives.sums, primitives.plain_sums, operands)
    given = {
        name: tangents[index]
        for name in kind.floating
        if (index := getattr(index_of, name)) is not None and not isinstance(tangents[index], ad.Zero)
    }
    slopes = bind(primitives.slopes, primitives.plain_slopes, operands, peaks, given)
    return jax.tree.leaves((peaks, results)), [*no_tangents(peaks), *jax.tree.leaves(slopes)]


def no_tangents(constants: Any) -> list[Any]:
    """Return the tangents of constants, by leaf: zeros, of the type that JAX has for those of integers."""
    return [
        jnp.zeros_like(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else ad.Zero(jax.typeof(leaf).to_tangent_aval())
        for leaf in jax.tree.leaves(constants)
    ]


def is_tangent(tangent: Any) -> bool:
    """Whether a tangent may be other than 0."""
    return not isinstance(tangent, ad.Zero) and tangent.dtype != jax.dtypes.float0


def derivative_of_plain(
    primitive: Primitive,
    function: Callable[..., Any],
    primals: Sequence[Array],
    tangents: Sequence[Any],
    **params: Any,
) -> tuple[list[Array], list[Array]]:
    """Differentiate a primitive as JAX does its plain function."""
    results: list[Array] = primitive.bind(*primals, **params)  # type: ignore[no-untyped-call]
    given = {i: tangent for i, tangent in enumerate(tangents) if is_tangent(tangent)}

    @jax.checkpoint
    def of_given(by: dict[int, Array]) -> list[Array]:
        return on_leaves(function)(*(by.get(i, primal) for i, primal in enumerate(primals)), **params)

    return results, jax.jvp(of_given, ({i: primals[i] for i in given},), (given,))[1]


def _transpose(kind: Kind, cotangents: Sequence[Any], *arguments: Any, structure: Any) -> list[Any]:
    given = {i: cotangent for i, cotangent in enumerate(cotangents) if not isinstance(cotangent, ad.Zero)}
    is_linear = [ad.is_undefined_primal(argument) for argument in arguments]  # type: ignore[no-untyped-call]
    operands, peaks, tangents = jax.tree.unflatten(
        structure, [None if linear else argument for linear, argument in zip(is_linear, arguments, strict=True)]
    )
    # A tangent that is known, such as an array of zeros, has no cotangent.
    names = [name for name in sorted(tangents) if tangents[name] is None]
    results = kind.cotangents(operands, peaks, given, names) if given else {}
    of_leaf = iter([results.get(name) for name in names])
    return [next(of_leaf) if linear else None for linear in is_linear]
