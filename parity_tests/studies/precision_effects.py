"""What the arithmetic of a device changes in a loss, source by source, and whether that explains a difference.

Many reports of "the TPU differs from the CPU" are matrix products in one bfloat16 pass. A loss is computed on simulated
arithmetic with one source of errors at a time, and its results are held against those without errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from parity_tests.losses.adapters import Adapter
from parity_tests.losses.simulated import SimulatedAdapter, simulate
from parity_tests.studies.verdicts import attempt
from parity_tests.truth.arithmetic import FULL, Arithmetic, any_order, tree_depth
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import AnyResult
from parity_tests.truth.devices import Device, device_of_name
from parity_tests.truth.precision import FloatArray
from parity_tests.truth.simulation import PATTERNS, Simulation

# Every operation rounded correctly.
_EXACT = Arithmetic(exp=1, log=1, log1p=1, tanh=1, division=1, matmul_bits=FULL, depth=tree_depth)
ALL, OBSERVED = "all of these", "difference of A and B"
# Each of two losses may be moved.
SIDES = 2


@dataclass(frozen=True)
class Effects:
    """What moves the results of two losses, each as a share of the largest element of its part, in the worst case.

    Args:
        device: name of the device.
        changes: for each source of errors, and for the observed difference, the change of each part.
        ratio: the observed difference as a share of what all sources together may make of two losses, in the case in
            which it is largest.
        case: that case; None if there is no case with results.
    """

    device: str
    changes: dict[str, dict[str, float]]
    ratio: float
    case: str | None

    @property
    def explained(self) -> bool:
        """Whether the arithmetic of the device explains the difference in every case."""
        return self.case is not None and self.ratio <= 1


def sources(device: Device) -> dict[str, Arithmetic]:
    """Return by name, for each source of the device's errors, arithmetic with these errors alone; last, with all."""
    row = device.arithmetic
    errors = {name: getattr(row, name) for name in ("exp", "log", "log1p", "tanh", "division")}
    return {
        "matrix products": replace(_EXACT, matmul_bits=row.matmul_bits),
        "exp, log, log1p, tanh, quotients": replace(_EXACT, **errors),
        "order of sums": replace(_EXACT, depth=any_order),
        ALL: replace(row, depth=any_order),
    }


def find_effects(adapters: Sequence[Adapter], cases: Sequence[Case], device_name: str) -> Effects:
    """Return what the arithmetic of a device changes in two losses, and how far these differ.

    Args:
        adapters: of the two losses.
        cases: what to compute; cases in which either loss gives no result are left out.
        device_name: such as "tpu-v5e".

    Raises:
        ValueError: there is no such device.
        CannotSimulateError: see `parity_tests.losses.simulated.simulate`.
    """
    simulated = [simulate(adapter, device_name) for adapter in adapters]
    names = sources(device_of_name(device_name, "jax"))
    changes: dict[str, dict[str, float]] = {name: {} for name in (OBSERVED, *names)}
    ratio, worst_case = 0.0, None
    for case in cases:
        results = [attempt(adapter, case) for adapter in adapters]
        if any(isinstance(result, str) for result in results):
            continue
        observed = _changes(*results)  # type: ignore[arg-type]
        by_source = [_of_sources(each, case) for each in simulated if isinstance(each, SimulatedAdapter)]
        for part, change in observed.items():
            _raise(changes[OBSERVED], part, change)
            for name in names:
                for of_side in by_source:
                    _raise(changes[name], part, of_side.get(name, {}).get(part, 0.0))
            allowed = SIDES * max((of_side.get(ALL, {}).get(part, 0.0) for of_side in by_source), default=0.0)
            share = change / allowed if allowed else float(np.inf) * change if change else 0.0
            if worst_case is None or share > ratio:
                ratio, worst_case = share, case.name
    return Effects(device_name, changes, ratio, worst_case)


def _of_sources(adapter: SimulatedAdapter, case: Case) -> dict[str, dict[str, float]]:
    """Return the change of each part of the results by each source; nothing if the loss cannot be simulated."""
    device = adapter.device_model
    if adapter.unsupported(case):
        return {}
    program = adapter.program(case)
    exact = program(device.family, Simulation(_EXACT, flushes=False, pattern=None))
    found: dict[str, dict[str, float]] = {}
    for name, arithmetic in sources(device).items():
        flushes = name == ALL and bool(device.flushes)
        for pattern in PATTERNS:
            moved = program(device.family, Simulation(arithmetic, flushes, pattern))
            for part, change in _changes(moved, exact).items():
                _raise(found.setdefault(name, {}), part, change)
    return found


def _changes(moved: AnyResult, exact: AnyResult) -> dict[str, float]:
    """Return the largest difference of each part, as a share of its largest finite element."""
    return {part: _change(values, exact.parts[part]) for part, values in moved.parts.items()}


def _change(moved: FloatArray, exact: FloatArray) -> float:
    finite = np.isfinite(exact)
    if not np.array_equal(np.isfinite(moved), finite):
        return float(np.inf)
    scale = np.max(np.abs(exact[finite]), initial=0.0)
    largest = np.max(np.abs(moved[finite] - exact[finite]), initial=0.0)
    return float(largest / scale) if scale else float(largest)


def _raise(largest: dict[str, float], part: str, value: float) -> None:
    largest[part] = max(largest.get(part, 0.0), value)
