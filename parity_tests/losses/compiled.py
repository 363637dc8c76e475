"""Losses compiled for devices that are not there, by the compilers that the programs of such devices get.

libtpu has the compiler of every generation of TPUs, and JAX's plugin for CUDA has XLA's for GPUs. Both take the
description of a device in place of a device. They show whether the compiler accepts a program, and how much memory the
program needs. Nothing is run, so they show nothing of its results.

A compiler works in a process of its own. It reads environment variables as it is loaded, which must not change what JAX
does elsewhere, and an internal error ends its process.
"""

import importlib
import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, NamedTuple, TypeVar

from parity_tests.losses.adapters import JaxAdapter, UnavailableError
from parity_tests.truth.cases import Case

Answer = TypeVar("Answer")

# What lets the TPU compiler do without a TPU, and beside another program that uses it.
TPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
ENVIRONMENTS = {"tpu": TPU_ENVIRONMENT, "gpu": {"JAX_PLATFORMS": "cpu"}}
REMEDY = "make test-compiled installs it"
# The smallest topology of each TPU in `parity_tests.truth.devices`.
TOPOLOGIES = {
    "tpu-v4": "v4:2x2x1",
    "tpu-v5e": "v5e:2x2",
    "tpu-v5p": "v5p:2x2x1",
    "tpu-v6e": "v6e:2x2",
    "tpu-v7x": "tpu7x:2x2x1",
}


class Card(NamedTuple):
    """What XLA, Inductor and Triton ask of a GPU.

    The minor number of each capability is 0. All have 64 KiB registers, 2048 threads and 1024 threads in a block for
    each core.
    """

    name: str
    capability: int
    extension: str
    cores: int
    units_of_core: int
    shared_of_core: int
    shared_of_block: int
    cache: int
    memory: int
    bandwidth: int  # bytes a second
    gigahertz: float

    def as_text(self) -> str:
        """Return the text of XLA's `GpuTargetConfigProto`."""
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 7 }}
            gpu_device_info {{
              cuda_compute_capability {{ major: {self.capability} feature_extension: {self.extension} }}
              core_count: {self.cores}
              fpus_per_core: {self.units_of_core}
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared_of_block}
              shared_memory_per_core: {self.shared_of_core}
              registers_per_block_limit: 65536
              registers_per_core_limit: 65536
              threads_per_warp: 32
              threads_per_block_limit: 1024
              threads_per_core_limit: 2048
              thread_dim_limit_x: 1024
              thread_dim_limit_y: 1024
              thread_dim_limit_z: 64
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              l2_cache_size: {self.cache}
              device_memory_size: {self.memory}
              memory_bandwidth: {self.bandwidth}
              clock_rate_ghz: {self.gigahertz}
              runtime_version: "12.8.0"
            }}
        """


# The numbers of the cards, as XLA's descriptions have them (xla/backends/gpu/target_config/specs, 2026-11-26).
CARDS = {
    "gpu-a100": Card(
        "NVIDIA A100-SXM4-80GB", 8, "NONE", 108, 64, 167936, 166912, 41943040, 85100068864, 2039040000000, 1.41
    ),
    "gpu-h100": Card(
        "NVIDIA H100 80GB HBM3",
        9,
        "ACCELERATED_FEATURES",
        132,
        128,
        233472,
        232448,
        52428800,
        84942979072,
        3352320000000,
        1.98,
    ),
    "gpu-b200": Card(
        "NVIDIA B200",
        10,
        "ACCELERATED_FEATURES",
        148,
        128,
        233472,
        232448,
        132644864,
        191514411008,
        7672320000000,
        1.965,
    ),
}


class NotCompiledError(Exception):
    """A compiler did not accept a program; the message says which program, for which device, and why."""


class Figures(NamedTuple):
    """The compiler's figures for one program.

    Args:
        temp_bytes: of memory beyond arguments and results.
        argument_bytes: of the arguments.
        output_bytes: of the results.
        accessed_bytes: of memory read and written; None where the compiler does not count them.
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


def has_libtpu() -> bool:
    """Return whether libtpu is installed, which has the compiler for TPUs."""
    return _is_installed("libtpu")


def has_cuda_plugin() -> bool:
    """Return whether JAX's plugin for CUDA is installed, which has XLA's compiler for GPUs."""
    return any(_is_installed(f"jax_plugins.xla_cuda{version}") for version in (12, 13))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # its package is not there, or sys.modules says that it is not
        return False


# --- The compilers' processes ---------------------------------------------------------------------------------------

_PROCESSES: dict[str, ProcessPoolExecutor] = {}


def _in_process(answer: Callable[..., Answer | str], device: str, *arguments: Any) -> Answer:
    """Return the answer of a function in the process of the device's compiler. A text is the reason for none."""
    family = device.partition("-")[0]
    if family not in _PROCESSES:
        spawn = multiprocessing.get_context("spawn")
        _PROCESSES[family] = ProcessPoolExecutor(1, spawn, initializer=_set, initargs=(ENVIRONMENTS[family],))
    try:
        answered = _PROCESSES[family].submit(answer, device, *arguments).result()
    except BrokenProcessPool as error:
        del _PROCESSES[family]
        raise NotCompiledError(f"not compiled for {device}: the process of the compiler ended") from error
    if isinstance(answered, str):
        raise NotCompiledError(f"not compiled for {device}: {answered}")
    return answered


def _set(environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    # The main module of the program is imported before, and may have imported JAX.
    importlib.import_module("jax").config.update("jax_platforms", environment["JAX_PLATFORMS"])


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

    describe: Any = partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(core_of(device)))
    described = jax.tree.map(lambda array: describe(array.shape, array.dtype), operands)
    compiled = jax.jit(function).lower(*described).compile()
    memory: Any = compiled.memory_analysis()
    costs = compiled.cost_analysis() or {}
    return Figures(
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        costs.get("bytes accessed"),
    )


def core_of(device: str) -> Any:
    """Return JAX's description of one core of a device, for a process with the environment of its compiler."""
    from jax.experimental import topologies

    if device in CARDS:
        target = CARDS[device].as_text()
        return topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target).devices[0]
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[device]).devices[0]
