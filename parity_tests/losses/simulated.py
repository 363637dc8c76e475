"""Losses on the simulated arithmetic of a device: see `parity_tests.truth.simulation`."""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial

import numpy as np

from parity_tests.faults.linear import wrong_result
from parity_tests.losses.adapters import Adapter, FrameworkAdapter, JaxAdapter, TorchAdapter
from parity_tests.losses.interpreted import InterpretedAdapter
from parity_tests.losses.peers import PeerAdapter
from parity_tests.losses.registry import FaultyAdapter, OracleAdapter
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import AnyResult, make_result
from parity_tests.truth.devices import Device, device_of_name
from parity_tests.truth.precision import FloatArray
from parity_tests.truth.simulation import PATTERNS, Simulation

# The result of a case on some arithmetic, for a platform: "tpu", "cuda" or "cpu".
Program = Callable[[str, Simulation], AnyResult]


class CannotSimulateError(Exception):
    """The adapter has no program whose operations can be replaced one by one."""


def simulate(adapter: Adapter, device_name: str) -> Adapter:
    """Return an adapter of the same loss on the simulated arithmetic of a device.

    Args:
        adapter: of a loss in JAX, in torch without compilation, or of the mutant bank. The oracle is returned as it is.
        device_name: such as "tpu-v5e"; see `parity_tests.truth.devices`.

    Raises:
        ValueError: there is no such device.
        CannotSimulateError: the adapter has no program whose operations can be replaced one by one.
    """
    device = device_of_name(device_name, adapter.framework)
    if isinstance(adapter, OracleAdapter):
        return adapter
    if isinstance(adapter, PeerAdapter):
        simulated = copy(adapter)
        simulated.adapter = simulate(adapter.adapter, device_name)
        simulated.device, simulated.arithmetic = simulated.adapter.device, simulated.adapter.arithmetic
        return simulated
    return SimulatedAdapter(adapter, device)


class SimulatedAdapter:
    """A loss on the simulated arithmetic of a device.

    Of each element it returns, among the results for all patterns of errors (see `PATTERNS`), the one that is farthest
    from the result without errors.

    Args:
        adapter: of the loss.
        device: the device.

    Raises:
        CannotSimulateError: see `simulate`.
    """

    def __init__(self, adapter: Adapter, device: Device) -> None:
        """Keep both."""
        self.program = _program_of(adapter)
        self.adapter, self.device_model = adapter, device
        self.name, self.framework, self.device = adapter.name, adapter.framework, device.family
        self.linear = getattr(adapter, "linear", False)
        if isinstance(adapter, FrameworkAdapter):
            self.arithmetic = adapter.arithmetic_on(device)
        else:
            self.arithmetic = replace(device.arithmetic, narrow=adapter.arithmetic.narrow)

    def unsupported(self, case: Case) -> str | None:
        """Return why the device or the loss cannot handle a case, or None."""
        return unsupported_on(self.device_model, case) or self.adapter.unsupported(case)

    def __call__(self, case: Case) -> AnyResult:
        """Return loss and gradients of a case."""
        return farthest(results_on(self.device_model, self.program(case)))


def simulated_device(adapter: Adapter) -> str | None:
    """Return the name of the device that an adapter of `simulate` simulates; None for any other adapter."""
    inner = adapter.adapter if isinstance(adapter, PeerAdapter) else adapter
    return inner.device_model.name if isinstance(inner, SimulatedAdapter) else None


def unsupported_on(device: Device, case: Case) -> str | None:
    """Return why a device cannot handle a case, or None."""
    return "is simulated on a TPU, which has no float64" if device.family == "tpu" and case.dtype == "float64" else None


def results_on(device: Device, program: Program) -> list[AnyResult]:
    """Return the result on a device without errors, then those for each pattern of errors."""
    return [
        program(device.family, Simulation(device.arithmetic, flushes=bool(device.flushes), pattern=pattern))
        for pattern in (None, *PATTERNS)
    ]


def farthest(results: list[AnyResult]) -> AnyResult:
    """Return for each element the value that is farthest from that of the first result."""
    first = results[0]
    parts = {part: _farthest([result.parts[part] for result in results]) for part in first.parts}
    return make_result(parts, first.dtypes)


def _farthest(values: list[FloatArray]) -> FloatArray:
    stacked = np.stack(values)
    with np.errstate(invalid="ignore"):
        distance = np.abs(stacked - stacked[0])
    # Another class (finite, infinite, NaN) than that of the first is farther than any number.
    is_other = (np.isnan(stacked) != np.isnan(stacked[0])) | (np.isinf(stacked) != np.isinf(stacked[0]))
    distance = np.where(is_other, np.inf, np.nan_to_num(distance))
    return np.asarray(np.take_along_axis(stacked, np.argmax(distance, axis=0)[None], axis=0)[0])


# --- Programs of adapters ---------------------------------------------------------------------------------------------


def _program_of(adapter: Adapter) -> Callable[[Case], Program]:
    if isinstance(adapter, FaultyAdapter):
        return partial(_numpy_program, adapter)
    if isinstance(adapter, InterpretedAdapter):
        raise CannotSimulateError(f"{adapter.name} runs what JAX has lowered already; simulate jax-fused or the like")
    if isinstance(adapter, JaxAdapter):
        return partial(_jax_program, adapter)
    if isinstance(adapter, TorchAdapter) and not adapter.compiled:
        return partial(_torch_program, adapter)
    reason = "it is compiled, or runs in a process of its own"
    raise CannotSimulateError(f"{adapter.name} has no operations that can be replaced one by one: {reason}")


def _numpy_program(adapter: FaultyAdapter, case: Case) -> Program:
    return lambda _, simulation: wrong_result(case, adapter.fault, simulation)


def _jax_program(adapter: JaxAdapter, case: Case) -> Program:
    from parity_tests.losses.simulated_jax import SimulatedDevice, traced

    run_on = traced(adapter, case)
    return lambda platform, simulation: run_on(SimulatedDevice(platform, simulation))


def _torch_program(adapter: TorchAdapter, case: Case) -> Program:
    from parity_tests.losses.simulated_torch import on_device

    def program(platform: str, simulation: Simulation) -> AnyResult:
        with on_device(platform, simulation):
            return adapter(case)

    return program
