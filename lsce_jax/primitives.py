"""How primitives of this package are defined: each computes a function, on some platforms by other formulas."""

import sys
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NoReturn

import jax
from jax.experimental import checkify
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_formulas: dict[tuple[str, str | None], Callable[..., Any]] = {}  # by primitive and platform; None is any other


def define(
    name: str,
    function: Callable[..., Any],
    *,
    multiple_results: bool = False,
    undivided: Collection[str] = (),
    **on_platform: Callable[..., Any],
) -> Primitive:
    """Return a primitive without rules for derivatives and vmap.

    Args:
        name: of the primitive.
        function: of the operands and parameters; what the primitive computes.
        multiple_results: whether it returns a list of results, not one result.
        undivided: the platforms that have a way of their own only in programs that no compiler divides over devices.
        on_platform: what it computes on a platform, such as cpu or tpu, instead.
    """

    def types(*operands: Any, **params: Any) -> Any:
        results: list[Any] = jax.make_jaxpr(partial(function, **params))(*operands).out_avals
        return results if multiple_results else results[0]

    primitive = Primitive(name)
    primitive.multiple_results = multiple_results
    primitive.def_impl(function)  # type: ignore[no-untyped-call]
    primitive.def_abstract_eval(types)  # type: ignore[no-untyped-call]
    for platform, lowered in ((None, function), *on_platform.items()):
        _formulas[name, platform] = lowered
        lower = partial(_lower, function if platform in undivided else lowered, lowered, multiple_results)
        mlir.register_lowering(primitive, lower, platform=platform)
    return primitive


def define_checked(name: str, problem: Callable[[], Exception]) -> Primitive:
    """Return the identity, as a primitive that raises `problem()` in programs that checkify has not transformed.

    It belongs before a `checkify.check`, whose own error would not say what to do.
    """

    def refuse(*_: object) -> NoReturn:
        raise problem()

    primitive = Primitive(name)
    primitive.def_impl(lambda operand: operand)  # type: ignore[no-untyped-call]
    primitive.def_abstract_eval(lambda aval: aval)  # type: ignore[no-untyped-call]
    batching.defvectorized(primitive)  # type: ignore[no-untyped-call]
    ad.defjvp(primitive, None)  # type: ignore[no-untyped-call]
    mlir.register_lowering(primitive, refuse)
    # JAX exports its rules nowhere. Without one, checkify would leave the primitive in the program. The last three
    # operands of a rule are the errors so far, which errors count, and the operand of the primitive.
    rules = getattr(sys.modules[checkify.check.__module__], "error_checks", {})
    rules[primitive] = lambda *given: (given[-3], given[-1])
    return primitive


def _lower(
    divided: Callable[..., Any],
    whole: Callable[..., Any],
    multiple_results: bool,
    ctx: Any,
    *operands: Any,
    **params: Any,
) -> Any:
    function = divided if is_divided(ctx) else whole
    if _is_of_one_device(ctx):
        # A loop would have to know which of its values are the same on all devices. That matters no more here.
        types = [jax.core.ShapedArray(aval.shape, aval.dtype, weak_type=aval.weak_type) for aval in ctx.avals_in]
        ctx = ctx.replace(avals_in=types)
    return mlir.lower_fun(function, multiple_results)(ctx, *operands, **params)


def is_divided(ctx: Any) -> bool:
    """Return whether the compiler divides the program over devices, given the context of a lowering."""
    if _is_of_one_device(ctx):
        return False
    context = ctx.module_context.axis_context
    return bool(getattr(context, "manual_axes", None)) or getattr(context, "num_devices", 1) != 1


def _is_of_one_device(ctx: Any) -> bool:
    """Return whether `jax.shard_map` hands each device its own part, over all axes of the mesh."""
    context = ctx.module_context.axis_context
    manual = getattr(context, "manual_axes", None)
    return manual is not None and manual == frozenset(context.mesh.axis_names)


def formula(name: str, platform: str) -> Callable[..., Any]:
    """Return what a primitive computes on a platform, as a function of its operands and parameters."""
    return _formulas.get((name, platform)) or _formulas[name, None]
