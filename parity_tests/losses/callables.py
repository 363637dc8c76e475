"""Is a callable a loss of torch or of JAX? No framework is loaded to find out.

What says so, the first that does: the type of an object and its bases; what JAX or torch has compiled; the module of a
function; the modules that its code and the functions that it calls name; what the function closes over; annotations.
"""

import inspect
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

# By the name of a top-level module.
_FRAMEWORKS = {
    **dict.fromkeys(("torch", "lsce_torch", "torchvision", "torchmetrics", "timm", "lightning"), "torch"),
    **dict.fromkeys(("jax", "jaxlib", "lsce_jax", "flax", "optax", "chex", "equinox", "haiku"), "jax"),
}
# How many functions call one another.
_DEPTH = 4


class FrameworkError(ValueError):
    """It cannot be told whether a callable is a loss of torch or of JAX."""


def framework_of(loss: Callable[..., Any]) -> str:
    """Return "torch" or "jax".

    Raises:
        FrameworkError: nothing says so, or the callable names both.

    Example:
        >>> import jax
        >>> framework_of(lambda logits, labels: -jax.nn.log_softmax(logits)[labels])
        'jax'
    """
    for found in _evidence(loss):
        if len(found) == 1:
            return found.pop()
        if found:
            raise FrameworkError(f"{name_of(loss)} names both torch and JAX: say which it takes arrays of")
    raise FrameworkError(f"nothing in {name_of(loss)} says whether it takes arrays of torch or of JAX")


def name_of(loss: Callable[..., Any]) -> str:
    """Return the name of a callable, as "package.module:name"."""
    inner = _unwrapped(loss)
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    return f"{named.__module__ or '__main__'}:{named.__qualname__}"


def _unwrapped(loss: Any) -> Any:
    while True:
        if isinstance(loss, partial):
            loss = loss.func
        elif inspect.ismethod(loss):
            loss = loss.__func__
        elif hasattr(loss, "__wrapped__"):
            loss = loss.__wrapped__
        else:
            return loss


def _evidence(loss: Any) -> Iterator[set[str]]:
    """Yield the frameworks that say so, from the strongest evidence to the weakest."""
    yield _of_module(type(loss).__module__)
    inner = _unwrapped(loss)
    owner = loss.__self__ if inspect.ismethod(loss) else inner
    kind = owner if inspect.isclass(owner) else type(owner)
    yield set().union(*(_of_module(base.__module__) for base in kind.__mro__))
    yield _of_module(getattr(inner, "__module__", None))
    function = inner if isinstance(inner, types.FunctionType) else getattr(kind, "__call__", None)  # noqa: B004
    function = _unwrapped(function)
    if isinstance(function, types.FunctionType):
        yield _of_function(function, _DEPTH)
        yield set().union(*(_of_value(each, 0) for each in _annotations(function)))


def _of_module(name: Any) -> set[str]:
    root = str(name).partition(".")[0]
    return {_FRAMEWORKS[root]} if root in _FRAMEWORKS else set()


def _of_function(function: types.FunctionType, depth: int) -> set[str]:
    """Return the frameworks named in a function's code, or in the code of functions it calls."""
    names = set(_names(function.__code__))
    # A module that is imported within the function is a name of its code too.
    found = set().union(*map(_of_module, names))
    values = [function.__globals__[name] for name in names if name in function.__globals__]
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # empty
            continue
    return found.union(*(_of_value(value, depth) for value in values))


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _of_value(value: Any, depth: int) -> set[str]:
    if isinstance(value, types.ModuleType):
        return _of_module(value.__name__)
    found = _of_module(getattr(value, "__module__", None)) | _of_module(type(value).__module__)
    function = _unwrapped(value) if callable(value) else None
    if not found and depth and isinstance(function, types.FunctionType):
        return _of_function(function, depth - 1)
    return found


def _annotations(function: types.FunctionType) -> list[Any]:
    given = list(function.__annotations__.values())
    module = sys.modules.get(function.__module__)
    # Those of `from __future__ import annotations` are texts such as "torch.Tensor".
    return [getattr(module, each.partition(".")[0], None) if isinstance(each, str) else each for each in given]
