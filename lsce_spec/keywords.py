"""Keyword arguments that are stated once: names, types and defaults in a TypedDict, for every function that takes them.

    class LossKeywords(TypedDict, total=False):
        smoothing: Annotated[float, Default(0.1)]

    @takes(LossKeywords)
    def loss(logits: Array, labels: Array, **keywords: Unpack[LossKeywords]) -> Array: ...

Type checkers and editors read names and types from the TypedDict. `takes` shows the same to `help()` and
`inspect.signature`, fills in the defaults, and rejects unknown names with a TypeError that says what was meant.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar, get_type_hints

from lsce_spec import hints
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


def unexpected(name: str, accepted: Collection[str], function: str) -> Exception:
    """Return the TypeError for a keyword argument that a function does not take. It says what to do."""
    hint = hints.for_keyword(name, accepted, function)
    return error("unexpected_keyword", function=function, name=repr(name), hint=hint)


def takes(keywords: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for functions whose last parameter is `**keywords: Unpack[...]` of this TypedDict.

    The function is called with every keyword argument, defaults included.
    """
    parameters = parameters_of(keywords)
    defaults = defaults_of(keywords)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        *first, _ = signature.parameters.values()
        positional = [parameter.name for parameter in first]
        accepted = [name for name in (*positional, *defaults) if name != "self"]
        qualified = function.__qualname__

        @wraps(function)
        def with_defaults(*operands: P.args, **given: P.kwargs) -> R:
            named = {name: given.pop(name) for name in positional if name in given}
            for name in given:
                if name not in defaults:
                    raise unexpected(name, accepted, qualified)
            return function(*operands, **named, **{**defaults, **given})  # type: ignore[arg-type]

        with_defaults.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*first, *parameters.values()]
        )
        return with_defaults

    return decorate


def hinting(function: Callable[P, R]) -> Callable[P, R]:
    """Make the TypeError for an unknown keyword argument say what to do, of a function with plain parameters."""
    accepted = tuple(name for name in inspect.signature(function).parameters if name != "self")
    qualified = function.__qualname__

    @wraps(function)
    def with_hint(*operands: P.args, **given: P.kwargs) -> R:
        for name in given:
            if name not in accepted:
                raise unexpected(name, accepted, qualified)
        return function(*operands, **given)

    return with_hint


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
