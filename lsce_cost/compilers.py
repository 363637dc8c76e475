"""The compilers of devices that are not there, in processes of their own.

A compiler reads environment variables as it is loaded, which must not change what JAX does elsewhere, and an internal
error ends its process.
"""

import atexit
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from math import prod
from typing import Any, ParamSpec, TypeVar

from jax.experimental import topologies

from lsce_cost.devices import CARDS, TOPOLOGIES

Answer = TypeVar("Answer")
Arguments = ParamSpec("Arguments")

# The slices that are offered, in chips, the smallest first. Those of 2 dimensions end with a pod of 256 chips.
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SLICES = {"tpu-v4": _CUBES, "tpu-v5e": _FLAT, "tpu-v5p": _CUBES, "tpu-v6e": _FLAT, "tpu-v7x": _CUBES}
DEVICES_OF_CHIP = {"tpu-v4": 2, "tpu-v7x": 2}  # others: 1
GPUS_OF_HOST = 8


class CompilerEndedError(Exception):
    """The process of a compiler ended before it answered."""


class CompilerProcess:
    """A process for a compiler. It starts with the first call, and again after it has ended.

    As with all of Python's multiprocessing, a script that uses it needs `if __name__ == "__main__":`.

    Args:
        environment: variables to set before the compiler is loaded.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Keep the environment."""
        self._environment = dict(environment)
        self._pool: ProcessPoolExecutor | None = None

    def call(
        self, function: Callable[Arguments, Answer], *arguments: Arguments.args, **keywords: Arguments.kwargs
    ) -> Answer:
        """Return what a function returns in that process.

        Raises:
            CompilerEndedError: the process ended.
        """
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            atexit.register(self._pool.shutdown)  # before the interpreter takes its modules away
        try:
            with _variables(self._environment):  # the first call starts the process, which inherits them
                answer = self._pool.submit(function, *arguments, **keywords)
            return answer.result()
        except BrokenProcessPool as error:
            self._pool = None
            raise CompilerEndedError("the process of the compiler ended") from error


@contextmanager
def _variables(added: Mapping[str, str]) -> Iterator[None]:
    """Add to the environment, and restore what was there."""
    old = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def largest_mesh(target: str) -> int:
    """Return of how many devices a mesh can be: a slice of TPUs, or a host of GPUs."""
    if target in CARDS:
        return GPUS_OF_HOST
    return _devices_of(target, SLICES[target][-1])


def slice_for(target: str, count: int) -> str:
    """Return the smallest slice that has so many devices, as in "4x4"; for GPUs one host."""
    if target in CARDS:
        return f"1x1x{count}"
    return next(slice_ for slice_ in SLICES[target] if _devices_of(target, slice_) >= count)


def _devices_of(target: str, slice_: str) -> int:
    return DEVICES_OF_CHIP.get(target, 1) * prod(map(int, slice_.split("x")))


def describe_devices(target: str, count: int = 1) -> list[Any]:
    """Return JAX's descriptions of devices, for a process with the environment of their compiler."""
    if target in CARDS:
        topology = slice_for(target, count)
        described = topologies.get_topology_desc(
            platform="cuda", topology=topology, target_config=CARDS[target].as_text()
        )
    else:
        generation, _, smallest = TOPOLOGIES[target].partition(":")
        name = f"{generation}:{smallest if count == 1 else slice_for(target, count)}"
        described = topologies.get_topology_desc(platform="tpu", topology_name=name)
    return list(described.devices[:count])
