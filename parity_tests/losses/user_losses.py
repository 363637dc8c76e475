"""Losses of the user, named `torch:package.module:name` or `jax:package.module:name`.

A loss is called as `loss(logits, labels)` with logits [N, K] and integer labels [N]. A linear loss is called as
`loss(hidden, weight, labels)` with hidden [N, D] and the weight of its framework: [K, D] in torch, [D, K] in JAX. The
loss returns a scalar or one loss per row; the harness computes the gradients. A class is instantiated, and the object
is called. Options are keyword arguments of the function or class.
"""

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from parity_tests.losses.adapters import Adapter, JaxAdapter, LossError, ShapeError, TorchAdapter
from parity_tests.losses.registry import make_adapter
from parity_tests.texts import did_you_mean
from parity_tests.truth.cases import Case

FRAMEWORKS = ("torch", "jax")


class SpecificationError(ValueError):
    """The name leads to nothing, or to something that cannot be called as a loss."""


def is_user_loss(specification: str) -> bool:
    """Return whether a name is that of a user's loss, not of an adapter of the harness."""
    return specification.partition(":")[0] in FRAMEWORKS


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Return the keyword arguments of `key=value` pairs. Values are read as JSON if possible, else as strings.

    Example:
        >>> parse_options(["smoothing=0.1", "reduction=mean", "weight=[1, 2]", "flag=true"])
        {'smoothing': 0.1, 'reduction': 'mean', 'weight': [1, 2], 'flag': True}
    """
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise SpecificationError(f"an option must be like smoothing=0.1, got {pair!r}")
        try:
            options[key] = json.loads(text)
        except json.JSONDecodeError:
            options[key] = text
    return options


def find(specification: str) -> Any:
    """Return the object named `framework:package.module:name`. The current folder is searched first."""
    parts = specification.split(":")
    if len(parts) != 3 or not all(parts) or parts[0] not in FRAMEWORKS:
        raise SpecificationError(
            f"expected torch:package.module:name or jax:package.module:name, got {specification!r}"
        )
    _, module_name, name = parts
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything
        raise SpecificationError(f"importing {module_name} raised {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise SpecificationError(f"{module_name} has no {name}{did_you_mean(part, dir(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise SpecificationError(f"{specification} cannot be called: it is a {type(found).__name__}")
    return found


def load_adapter(
    specification: str, options: Mapping[str, Any], device: str = "cpu", jit: bool = False, linear: bool = False
) -> Adapter:
    """Return the adapter of a user's loss, or of a name that `make_adapter` knows.

    Raises:
        SpecificationError: there is no such loss, it does not take the options, or an adapter was given options.
        UnavailableError: the framework or the device is not on this machine.
    """
    if not is_user_loss(specification):
        if options:
            raise SpecificationError(f"options are for losses of your own, and {specification} is none")
        try:
            return make_adapter(specification, device)
        except ValueError as error:
            own = "a loss of your own is named torch:package.module:name or jax:package.module:name"
            raise SpecificationError(f"{error} ({own})") from None
    torch = specification.startswith("torch:")
    # Load the framework first, so that its absence does not look like an error of the user's module.
    adapter = (
        TorchAdapter(device=device, linear=linear) if torch else JaxAdapter(None, jit, device=device, linear=linear)
    )
    operands = ("hidden", "weight", "labels") if linear else ("logits", "labels")
    loss = _bind(specification, options, operands, _to_torch if torch else _to_jax)

    def call(*inputs: Any, labels: Any, **settings: Any) -> Any:
        return loss(*inputs, labels)

    adapter.name = specification
    adapter.take(call)
    return adapter


def _bind(
    specification: str, options: Mapping[str, Any], operands: Sequence[str], as_array: Callable[[list[Any]], Any]
) -> Callable[..., Any]:
    found = find(specification)
    arguments = {key: as_array(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        if inspect.isclass(found):
            return _make(specification, found, arguments)
        inspect.signature(found).bind(*operands, **arguments)
    except TypeError as error:
        raise SpecificationError(f"{specification} does not take these options: {error}") from error
    except SpecificationError:
        raise
    except ValueError:
        pass  # a built-in function has no signature
    return partial(found, **arguments)


def _make(specification: str, found: Any, arguments: Mapping[str, Any]) -> Callable[..., Any]:
    inspect.signature(found).bind(**arguments)
    try:
        made: Callable[..., Any] = found(**arguments)
    except (Exception, SystemExit) as error:  # a class of the user's may raise anything
        raise SpecificationError(f"making {specification} raised {type(error).__name__}: {error}") from error
    return made


def _to_torch(values: list[Any]) -> Any:
    return importlib.import_module("torch").tensor(values)


def _to_jax(values: list[Any]) -> Any:
    return importlib.import_module("jax.numpy").asarray(values)


def find_reduction(adapter: Adapter, cases: Sequence[Case]) -> str | None:
    """Return the reduction that the loss returns.

    That is "none" for one number per row, "mean" for a scalar of any reduction, and "elements" for one per logit.
    None if it returns neither in any of the cases; the comparison reports why, case by case.
    """
    for case in cases:
        for reduction in ("none", "mean", "elements"):
            try:
                adapter(replace(case, options={**case.options, "reduction": reduction}))
            except ShapeError:
                continue
            except LossError:
                pass  # the shape is right
            except (Exception, SystemExit):  # a user's loss may raise anything
                break
            return reduction
    return None


def take_mean(adapter: Any, ignore_index: int | None) -> None:
    """Make the adapter of a user's loss return the mean over the rows that are not ignored."""
    rows = adapter.loss

    def mean(*inputs: Any, labels: Any, **settings: Any) -> Any:
        losses = rows(*inputs, labels=labels)
        if ignore_index is None:
            return losses.mean()
        counted = (labels != ignore_index).sum()
        return losses.sum() / (counted.astype if hasattr(counted, "astype") else counted.to)(losses.dtype)

    adapter.loss = mean
