"""Losses compiled for devices that are not there, by the compilers that the programs of such devices get.

libtpu has the compiler of every generation of TPUs, and JAX's plugin for CUDA has XLA's for GPUs. Both take the
description of a device in place of a device. They show whether the compiler accepts a program, and how much memory the
program needs. Nothing is run, so they show nothing of its results.

A compiler works in a process of its own: see lsce_cost/compilers.py.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from lsce_cost.devices import CARDS, ENVIRONMENTS, TOPOLOGIES, has_cuda_plugin, has_libtpu
from parity_tests.losses.adapters import JaxAdapter, UnavailableError
from parity_tests.truth.cases import Case

Answer = TypeVar("Answer")

REMEDY = "make test-compiled installs it"


class NotCompiledError(Exception):
    """A compiler did not accept a program; the message says which program, for which device, and why."""


class Figures(NamedTuple):
    """The compiler's figures for one program.

    Args:
        temp_bytes: of memory beyond arguments and results.
        argument_bytes: of the arguments.
        output_bytes: of the results.
        accessed_bytes: of memory read and written, by the compiler; where it does not count them, for GPUs, counted in
            its program. None if that has a loop whose number of rounds is not known.
    """

    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    accessed_bytes: float | None


class StatisticsAdapter(JaxAdapter):
    """A `JaxAdapter` of the losses of `lsce_jax` that return statistics too.

    Args:
        linear: whether of the linear loss.
        options: as in `JaxAdapter`.
    """

    def __init__(self, *, linear: bool = False, **options: Any) -> None:
        """Choose the function."""
        package = importlib.import_module("lsce_jax")
        name = "linear_label_smoothed_cross_entropy_with_stats" if linear else "label_smoothed_cross_entropy_with_stats"
        super().__init__(getattr(package, name), linear=linear, **options)

    def parts_of(self, returned: Any) -> dict[str, Any]:
        """Return the loss and the statistics by name."""
        loss, statistics = returned
        return {"loss": loss, **statistics._asdict()}


class Compiler:
    """The compiler of a device that is not there.

    Its process starts with the first program and ends with this one. As with all of Python's multiprocessing, a script
    that uses it needs `if __name__ == "__main__":`.

    Args:
        device: name of the device, one of `TOPOLOGIES` and `CARDS`.

    Raises:
        ValueError: there is no compiler for such a device.
        UnavailableError: the compiler is not installed.

    Example:
        >>> Compiler("tpu-v9")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: there is no compiler for tpu-v9; there are those for tpu-v4, ..., gpu-a100, gpu-h100, gpu-b200
    """

    def __init__(self, device: str) -> None:
        """Check that the compiler is there."""
        if device not in (*TOPOLOGIES, *CARDS):
            names = ", ".join((*TOPOLOGIES, *CARDS))
            raise ValueError(f"there is no compiler for {device}; there are those for {names}")
        if device in TOPOLOGIES and not has_libtpu():
            raise UnavailableError(f"libtpu is not installed; {REMEDY}")
        if device in CARDS and not has_cuda_plugin():
            raise UnavailableError(f"JAX's plugin for CUDA is not installed; {REMEDY}")
        self.device = device

    def compile(self, make: Callable[[], JaxAdapter], case: Case) -> Figures:
        """Return the figures of the loss and gradients of a case.

        Args:
            make: makes the adapter. It is sent to the compiler's process and called there.
            case: the case; the program depends on its options, and on the shapes and dtypes of its arrays.

        Raises:
            NotCompiledError: the compiler did not accept the program.
        """
        return _in_process(_compile_case, self.device, make, case)

    def compile_function(self, function: Callable[..., Any], *arguments: tuple[Sequence[int], str]) -> Figures:
        """Return the figures of a function of arrays.

        Args:
            function: the function. It is sent to the compiler's process.
            arguments: shape and dtype of each array.

        Raises:
            NotCompiledError: the compiler did not accept the program.
        """
        return _in_process(_compile_function, self.device, function, arguments)


# --- The compilers' processes ---------------------------------------------------------------------------------------

_PROCESSES: dict[str, Any] = {}


def _in_process(answer: Callable[..., Answer | str], device: str, *arguments: Any) -> Answer:
    """Return the answer of a function in the process of the device's compiler. A text is the reason for none."""
    from lsce_cost.compilers import CompilerEndedError, CompilerProcess

    family = device.partition("-")[0]
    process: CompilerProcess = _PROCESSES.setdefault(family, CompilerProcess(ENVIRONMENTS[family]))
    try:
        answered = process.call(answer, device, *arguments)
    except CompilerEndedError as error:
        raise NotCompiledError(f"not compiled for {device}: {error}") from error
    if isinstance(answered, str):
        raise NotCompiledError(f"not compiled for {device}: {answered}")
    return answered


# What follows runs in such a process. An exception is returned as a text: not every one of a compiler can be sent.


def _compile_case(device: str, make: Callable[[], JaxAdapter], case: Case) -> Figures | str:
    adapter = make()
    try:
        with adapter.settings(case.dtype):
            step, operands = adapter.step(case)
            return _figures(step, device, operands)
    except Exception as error:
        return f"{adapter.name}, {case.name} in {case.dtype}: {type(error).__name__}: {error}"


def _compile_function(
    device: str, function: Callable[..., Any], arguments: Sequence[tuple[Sequence[int], str]]
) -> Figures | str:
    import jax

    describe: Any = jax.ShapeDtypeStruct
    try:
        return _figures(function, device, tuple(describe(tuple(shape), dtype) for shape, dtype in arguments))
    except Exception as error:
        return f"{getattr(function, '__name__', function)}: {type(error).__name__}: {error}"


def _figures(function: Callable[..., Any], device: str, operands: Any) -> Figures:
    import jax

    from lsce_cost.compilers import describe_devices

    (core,) = describe_devices(device)
    describe: Any = partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(core))
    described = jax.tree.map(lambda array: describe(array.shape, array.dtype), operands)
    compiled: Any = jax.jit(function).lower(*described).compile()
    memory: Any = compiled.memory_analysis()
    return Figures(
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        _accessed_bytes(compiled),
    )


def _accessed_bytes(compiled: Any) -> float | None:
    from lsce_cost import hlo

    counted: float | None = (compiled.cost_analysis() or {}).get("bytes accessed")
    if counted is not None:
        return counted
    try:
        return hlo.parse(compiled.as_text()).hbm_bytes
    except hlo.HloError:
        return None
