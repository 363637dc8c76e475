"""Keyword arguments that are stated once: names, types and defaults in a TypedDict, for every function that takes them.

    class LossKeywords(TypedDict, total=False):
        smoothing: Annotated[float, Default(0.1)]

    @takes(LossKeywords)
    def loss(logits: Array, labels: Array, **keywords: Unpack[LossKeywords]) -> Array: ...

Type checkers and editors read names and types from the TypedDict. `takes` shows the same to `help()` and
`inspect.signature`, fills in the defaults, and rejects unknown names with the TypeError that Python would raise.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar, get_type_hints

from lsce_spec.errors import error

P = ParamSpec("P")
R = TypeVar("R")


class Default(NamedTuple):
    """The default of a keyword argument, for `Annotated`."""

    value: Any


def parameters_of(keywords: type, names: Iterable[str] | None = None) -> dict[str, inspect.Parameter]:
    """Return the keyword-only parameters that a TypedDict states, by name: all of them, or those of `names`."""
    parameters = {}
    for name, hint in get_type_hints(keywords, include_extras=True).items():
        (default,) = (entry for entry in hint.__metadata__ if isinstance(entry, Default))
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters[name] = inspect.Parameter(name, kind, default=default.value, annotation=hint.__origin__)
    return {name: parameters[name] for name in (parameters if names is None else names)}


def defaults_of(keywords: type) -> dict[str, Any]:
    """Return the default of each keyword argument that a TypedDict states."""
    return {name: parameter.default for name, parameter in parameters_of(keywords).items()}


def completed(function: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given keyword arguments and the defaults of all others.

    Raises:
        TypeError: a name that is not among the defaults.

    Example:
        >>> completed("loss", {"smoothing": 0.2}, {"smoothing": 0.1, "axis": -1})
        {'smoothing': 0.2, 'axis': -1}
    """
    for name in given:
        if name not in defaults:
            close = difflib.get_close_matches(name, defaults, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"help({function}) lists the names."
            raise error("unexpected_keyword", function=function, name=repr(name), hint=hint)
    return {**defaults, **given}


def takes(keywords: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for functions whose last parameter is `**keywords: Unpack[...]` of this TypedDict.

    The function is called with every keyword argument, defaults included.
    """
    parameters = parameters_of(keywords)
    defaults = defaults_of(keywords)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def with_defaults(*operands: P.args, **given: P.kwargs) -> R:
            named = {name: given.pop(name) for name in positional if name in given}
            return function(*operands, **named, **completed(function.__name__, given, defaults))  # type: ignore[arg-type]

        signature = inspect.signature(function)
        *first, _ = signature.parameters.values()
        positional = [parameter.name for parameter in first]
        with_defaults.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*first, *parameters.values()]
        )
        return with_defaults

    return decorate


def refuses(reasons: Mapping[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for functions that do not take some options: each call with one raises and says why.

    Args:
        reasons: the reason for each name, with what to do instead.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def checked(*operands: P.args, **given: P.kwargs) -> R:
            for name in given.keys() & reasons.keys():
                raise error("smoothing_refused", function=function.__name__, name=name, reason=reasons[name])
            return function(*operands, **given)

        return checked

    return decorate
