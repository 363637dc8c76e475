"""What the lists of losses for a device are made of: `device_torch` and `device_jax`."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from benchmarks.engines.timing import Case
from parity_tests.losses.adapters import UnavailableError

SMOOTHING = 0.1


class Loss(NamedTuple):
    """A loss of a mean.

    Args:
        name: in tables.
        make: loads the library and returns the function, of (logits, labels) or (hidden, weight, labels) in torch; JAX
            has the smoothing as one more argument.
        smoothing: what the function has; 0.0 for libraries that have none.
        ours: whether it is of this project: its results must be within its bounds.
        overwrites: whether it writes over the logits, so that each call needs new ones.
        compiled: whether each shape is compiled anew, for seconds.
        options: what it computes beyond the smoothed mean, by the names of our options, such as the convention.
    """

    name: str
    make: Callable[[], Callable[..., Any]]
    smoothing: float = SMOOTHING
    ours: bool = False
    overwrites: bool = False
    compiled: bool = False
    options: Mapping[str, Any] = MappingProxyType({})


class Program(NamedTuple):
    """A loss, ready to be timed.

    Args:
        case: to be timed.
        facts: returns what else is known of it once it has run: "memory", the bytes that it takes; in JAX also
            "compile_s", the seconds that compiling took, and "moved", the bytes that XLA says it reads and writes.
    """

    case: Case
    facts: Callable[[], dict[str, Any]]


def load(module: str, distribution: str) -> Any:
    """Return a module of a library that may not be here.

    Raises:
        UnavailableError: it is not installed, or cannot be imported here.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise UnavailableError(f"{distribution} is not installed")
    try:
        return importlib.import_module(module)
    except Exception as error:  # the import of a library that looks for a device may raise anything
        raise UnavailableError(f"{distribution} cannot be imported: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Return the kind of an exception and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
