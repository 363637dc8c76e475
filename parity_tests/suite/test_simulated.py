"""Losses on the simulated arithmetic of each device: every case, every pattern of errors, against the truth."""

from typing import Any

import pytest

from lsce_spec import IMPLEMENTATIONS, LINEAR_IMPLEMENTATIONS
from parity_tests.losses.registry import make_adapter
from parity_tests.losses.simulated import SimulatedAdapter, farthest, results_on
from parity_tests.plugin import Recorder
from parity_tests.truth.cases import Case, case_names, make_case
from parity_tests.truth.comparison import against_oracle
from parity_tests.truth.devices import DEVICES, Device
from parity_tests.truth.linear_cases import linear_case_names, make_linear_case
from parity_tests.truth.oracle import solve
from parity_tests.truth.precision import DTYPES

FRAMEWORKS = ("jax", "torch")
# These show every option; the others are slow together.
FAST = {"everything", "bad_labels", "class_mask_max_sup", "soft_clamp", "minus_infinity", "linear_everything"}


def alike(framework: str) -> list[list[Device]]:
    """Return the devices of a framework, those with the same arithmetic together."""
    groups: dict[tuple[object, ...], list[Device]] = {}
    for device in DEVICES:
        if framework in device.frameworks:
            groups.setdefault((device.family, device.arithmetic, device.flushes), []).append(device)
    return list(groups.values())


def cases(names: list[str], kind: str, implementations: tuple[str, ...]) -> list[Any]:
    return [
        pytest.param(
            f"{framework}{kind}-{implementation}",
            name,
            dtype,
            marks=() if name in FAST and dtype in ("float32", "bfloat16") else pytest.mark.devices,
        )
        for framework in FRAMEWORKS
        for implementation in implementations
        for name in names
        for dtype in DTYPES
    ]


def assert_agrees(name: str, case: Case, ledger: Recorder) -> None:
    adapter = make_adapter(name)
    assert adapter.unsupported(case) is None
    truth = solve(case)
    program = None
    for devices in alike(adapter.framework):
        simulated = SimulatedAdapter(adapter, devices[0])
        if simulated.unsupported(case):
            continue
        for device in devices:
            ledger.record(name, device.family, case.dtype, "simulated", device.name)
        program = program or simulated.program(case)  # traced once
        result = farthest(results_on(devices[0], program))
        comparison = against_oracle(case, truth, result, simulated.arithmetic)
        assert comparison.agrees, f"{devices[0].name}: {comparison}"


@pytest.mark.parametrize(("adapter", "name", "dtype"), cases(case_names(), "", IMPLEMENTATIONS))
def test_dense(adapter: str, name: str, dtype: str, parity_ledger: Recorder) -> None:
    assert_agrees(adapter, make_case(name, dtype), parity_ledger)


@pytest.mark.parametrize(("adapter", "name", "dtype"), cases(linear_case_names(), "-linear", LINEAR_IMPLEMENTATIONS))
def test_linear(adapter: str, name: str, dtype: str, parity_ledger: Recorder) -> None:
    assert_agrees(adapter, make_linear_case(name, dtype), parity_ledger)
