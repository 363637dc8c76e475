"""Losses of the user, named `torch:package.module:name` or `jax:package.module:name`.

A loss is called as `loss(logits, labels)` with logits [N, K] and integer labels [N]. A linear loss is called as
`loss(hidden, weight, labels)` with hidden [N, D] and the weight of its framework: [K, D] in torch, [D, K] in JAX. The
loss returns a scalar or one loss per row; the harness computes the gradients. A class is instantiated, and the object
is called. Options are keyword arguments of the function or class.
"""

import ast
import importlib
import inspect
import json
import sys
import warnings
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
    """Return the keyword arguments of `key=value` pairs. Values are read as Python or JSON, any other text as a string.

    Example:
        >>> parse_options(["smoothing=.1", "reduction=mean", "weight=[1, 2]", "flag=False", "cap=None", "old=true"])
        {'smoothing': 0.1, 'reduction': 'mean', 'weight': [1, 2], 'flag': False, 'cap': None, 'old': True}
    """
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise SpecificationError(f"an option must be like smoothing=0.1, got {pair!r}")
        options[key] = _value(text)
    return options


def _value(text: str) -> Any:
    for read in (ast.literal_eval, json.loads):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # of a backslash in a text
                return read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return text


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
    specification: str,
    options: Mapping[str, Any],
    device: str = "cpu",
    jit: bool = False,
    linear: bool = False,
    arrays: Sequence[str] = (),
) -> Adapter:
    """Return the adapter of a user's loss, or of a name that `make_adapter` knows.

    Args:
        specification: name of the loss.
        options: keyword arguments of the function or class.
        device: the device.
        jit: whether to compile a loss of JAX.
        linear: whether the loss takes a linear layer.
        arrays: names of further arrays that a user's loss takes by keyword.

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
    framework = specification.partition(":")[0]
    # Load the framework first, so that its absence does not look like an error of the user's module.
    adapter = _make_adapter(framework, device, jit, linear)
    return _take(adapter, specification, find(specification), options, arrays)


def adapt(
    loss: Callable[..., Any],
    framework: str,
    name: str,
    options: Mapping[str, Any],
    device: str = "cpu",
    linear: bool = False,
    arrays: Sequence[str] = (),
) -> Adapter:
    """Return the adapter of a loss that is at hand.

    Args:
        loss: a function of (logits, labels) or (hidden, weight, labels); a class is instantiated.
        framework: "torch" or "jax".
        name: name in reports; `framework:package.module:name`.
        options: keyword arguments of the function or class.
        device: the device.
        linear: whether it takes a linear layer.
        arrays: names of further arrays that it takes by keyword.

    Raises:
        SpecificationError: the loss does not take the options.
        UnavailableError: the framework or the device is not on this machine.
    """
    return _take(_make_adapter(framework, device, False, linear), name, loss, options, arrays)


def _make_adapter(framework: str, device: str, jit: bool, linear: bool) -> TorchAdapter | JaxAdapter:
    if framework == "torch":
        return TorchAdapter(device=device, linear=linear)
    return JaxAdapter(None, jit, device=device, linear=linear)


def _take(
    adapter: TorchAdapter | JaxAdapter, name: str, found: Any, options: Mapping[str, Any], arrays: Sequence[str]
) -> Adapter:
    operands = ("hidden", "weight", "labels") if adapter.linear else ("logits", "labels")
    as_array = _to_torch if adapter.framework == "torch" else _to_jax
    loss = _bind(name, found, options, operands, arrays, as_array)

    def call(*inputs: Any, labels: Any, **settings: Any) -> Any:
        return loss(*inputs, labels, **{name: settings[name] for name in arrays if name in settings})

    adapter.name = name
    adapter.take(call)
    return adapter


def _bind(
    specification: str,
    found: Any,
    options: Mapping[str, Any],
    operands: Sequence[str],
    arrays: Sequence[str],
    as_array: Callable[[list[Any]], Any],
) -> Callable[..., Any]:
    arguments = {key: as_array(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        if inspect.isclass(found):
            return _make(specification, found, arguments)
        inspect.signature(found).bind(*operands, **arguments, **dict.fromkeys(arrays))
    except TypeError as error:
        also = f", nor {', '.join(arrays)} of your batch by keyword" if arrays else ""
        raise SpecificationError(f"{specification} does not take these options{also}: {error}") from error
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


def keep_shape(adapter: Any, shapes: Mapping[int, tuple[int, ...]], per_row: frozenset[str]) -> None:
    """Make the adapter of a user's loss call it with the leading shapes that its batches had, instead of rows.

    Args:
        adapter: the adapter, which gets rows.
        shapes: the leading shape of a batch, by its number of rows.
        per_row: names of the arrays, besides inputs and labels, that have a value for each row.
    """
    of_rows = adapter.loss

    def call(*inputs: Any, labels: Any, **settings: Any) -> Any:
        shape = shapes[labels.shape[0]]

        def folded(array: Any) -> Any:
            return array.reshape((*shape, *array.shape[1:]))

        given = {name: folded(value) if name in per_row else value for name, value in settings.items()}
        loss = of_rows(folded(inputs[0]), *inputs[1:], labels=folded(labels), **given)
        whole = tuple(getattr(loss, "shape", ()))
        return loss.reshape((-1, *whole[len(shape) :])) if whole and whole[: len(shape)] == shape else loss

    adapter.loss = call


def take_mean(adapter: Any, ignore_index: int | None) -> None:
    """Make the adapter of a user's loss return the mean over the rows that are not ignored, nor masked by `where`."""
    rows = adapter.loss

    def mean(*inputs: Any, labels: Any, **settings: Any) -> Any:
        losses = rows(*inputs, labels=labels, **settings)
        counted = settings.get("where")
        if ignore_index is not None:
            counted = labels != ignore_index if counted is None else counted & (labels != ignore_index)
        if counted is None:
            return losses.mean()
        counted = counted.sum()
        return losses.sum() / (counted.astype if hasattr(counted, "astype") else counted.to)(losses.dtype)

    adapter.loss = mean
