"""How primitives of this package are defined: each computes a function, on some platforms by other formulas."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

_formulas: dict[tuple[str, str | None], Callable[..., Any]] = {}  # by primitive and platform; None is any other


def define(
    name: str, function: Callable[..., Any], *, multiple_results: bool = False, **on_platform: Callable[..., Any]
) -> Primitive:
    """Return a primitive without rules for derivatives and vmap.

    Args:
        name: of the primitive.
        function: of the operands and parameters; what the primitive computes.
        multiple_results: whether it returns a list of results, not one result.
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
        mlir.register_lowering(primitive, mlir.lower_fun(lowered, multiple_results), platform=platform)
    return primitive


def formula(name: str, platform: str) -> Callable[..., Any]:
    """Return what a primitive computes on a platform, as a function of its operands and parameters."""
    return _formulas.get((name, platform)) or _formulas[name, None]
