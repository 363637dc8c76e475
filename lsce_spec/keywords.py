"""Keyword arguments that are stated once: names, types and defaults in a TypedDict, for every function that takes them.

    class LossKeywords(TypedDict, total=False):
        smoothing: Annotated[float, Default(0.1)]

    @takes(LossKeywords)
    def loss(logits: Array, labels: Array, **keywords: Unpack[LossKeywords]) -> Array: ...

Type checkers and editors read names and types from the TypedDict. `takes` shows the same to `help()` and
`inspect.signature`, fills in the defaults, and rejects unknown names, and options without a name, with a TypeError that
says what was meant.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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


class _Places:
    """The parameters of a function by how they are passed, for calls that give too many or too few without a name."""

    def __init__(self, signature: inspect.Signature, function: str) -> None:
        self.function = function
        parameters = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
        self.by_position = tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)
        self.options = tuple(each.name for each in parameters if each.kind is each.KEYWORD_ONLY)
        self.most = len(self.by_position) + ("self" in signature.parameters)
        self.required = [name for name, each in signature.parameters.items() if each.default is each.empty]

    def surplus(self, operands: Sequence[object]) -> Exception:
        """Return the TypeError for operands beyond those that have a place. It says which options they may be."""
        hint = hints.for_positional(operands[self.most], self.options, self.function)
        *most, last = self.by_position or ("",)
        names = f"only {', '.join(most)} and {last}" if most else f"only {last}" if last else "nothing"
        return error("positional", function=self.function, names=names, hint=hint)

    def missing(self, given: int, named: Collection[str]) -> Exception | None:
        """Return the TypeError for the first operand that is missing, if there is more to say than its name."""
        name = next((name for name in self.required[given:] if name not in named), "")
        hint = hints.for_missing(name, self.function)
        return error("missing", function=self.function, name=repr(name), hint=hint) if hint else None


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
        whole = signature.replace(parameters=[*first, *parameters.values()])
        places = _Places(whole, qualified)
        most, least = places.most, len(places.required)

        @wraps(function)
        def with_defaults(*operands: P.args, **given: P.kwargs) -> R:
            named = {name: given.pop(name) for name in positional if name in given}
            for name in given:
                if name not in defaults:
                    raise unexpected(name, accepted, qualified)
            if len(operands) > most:
                raise places.surplus(operands)
            if len(operands) + len(named) < least and (problem := places.missing(len(operands), named)):
                raise problem
            return function(*operands, **named, **{**defaults, **given})  # type: ignore[arg-type]

        with_defaults.__signature__ = whole  # type: ignore[attr-defined]
        return with_defaults

    return decorate


def hinting(function: Callable[P, R]) -> Callable[P, R]:
    """Make the TypeErrors for wrong names and places of arguments say what to do, of plain parameters."""
    signature = inspect.signature(function)
    accepted = tuple(name for name in signature.parameters if name != "self")
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    most = _Places(signature, "").most

    def name_of(operands: Sequence[object]) -> str:
        """Return what the caller called: a method by the class of the object, which may have inherited it."""
        is_method = "self" in signature.parameters and operands
        return f"{type(operands[0]).__name__}.{function.__name__}" if is_method else function.__qualname__

    @wraps(function)
    def with_hint(*operands: P.args, **given: P.kwargs) -> R:
        for name in given:
            if name not in accepted and not takes_any:
                raise unexpected(name, accepted, name_of(operands))
        if len(operands) > most:
            raise _Places(signature, name_of(operands)).surplus(operands)
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
