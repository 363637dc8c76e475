"""What JAX makes for a TPU or a GPU, run by StableHLO's reference interpreter: every case, against the truth."""

from typing import Any

import pytest

from lsce_spec import IMPLEMENTATIONS, LINEAR_IMPLEMENTATIONS
from parity_tests.losses.interpreted import InterpretedAdapter
from parity_tests.losses.registry import make_adapter
from parity_tests.plugin import Recorder
from parity_tests.suite.wrong_losses import WRONG_LOSSES
from parity_tests.truth.arithmetic import any_order
from parity_tests.truth.cases import Case, case_names, make_case
from parity_tests.truth.comparison import against_oracle
from parity_tests.truth.linear_cases import linear_case_names, make_linear_case
from parity_tests.truth.oracle import solve
from parity_tests.truth.precision import DTYPES

PLATFORMS = ("tpu", "cuda")
# These show every option; the others are slow together.
FAST = {"everything", "bad_labels", "class_mask_max_sup", "soft_clamp", "minus_infinity", "linear_everything"}
DENSE = [f"jax-{implementation}" for implementation in IMPLEMENTATIONS]
LINEAR = [f"jax-linear-{implementation}" for implementation in LINEAR_IMPLEMENTATIONS]


def cases(names: list[str], adapters: list[str]) -> list[Any]:
    return [
        pytest.param(
            platform,
            adapter,
            name,
            dtype,
            marks=() if name in FAST and platform == "tpu" and dtype == "float32" else pytest.mark.devices,
        )
        for platform in PLATFORMS
        for adapter in adapters
        for name in names
        for dtype in DTYPES
        if not (platform == "tpu" and dtype == "float64")  # TPUs have no float64
    ]


def assert_agrees(platform: str, adapter: str, case: Case, ledger: Recorder) -> None:
    interpreted = make_adapter(f"{adapter}-{platform}-interpreted")
    if interpreted.unsupported(case):
        assert case.name == "linear_no_rows"
        return
    ledger.record(adapter, platform, case.dtype, "interpreted")
    comparison = against_oracle(case, solve(case), interpreted(case), interpreted.arithmetic)
    assert comparison.agrees, comparison


@pytest.mark.parametrize(("platform", "adapter", "name", "dtype"), cases(case_names(), DENSE))
def test_dense(platform: str, adapter: str, name: str, dtype: str, parity_ledger: Recorder) -> None:
    assert_agrees(platform, adapter, make_case(name, dtype), parity_ledger)


@pytest.mark.parametrize(("platform", "adapter", "name", "dtype"), cases(linear_case_names(), LINEAR))
def test_linear(platform: str, adapter: str, name: str, dtype: str, parity_ledger: Recorder) -> None:
    assert_agrees(platform, adapter, make_linear_case(name, dtype), parity_ledger)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_loss_is_rejected(dtype: str) -> None:
    """Another convention, and a gradient that is not that of the loss."""
    case = make_case("uniform_mean", dtype)
    for loss in WRONG_LOSSES:
        interpreted = InterpretedAdapter("tpu", loss=loss, name="wrong")
        comparison = against_oracle(case, solve(case), interpreted(case), interpreted.arithmetic)
        assert not comparison.agrees


def test_the_branch_for_accelerators_is_what_is_interpreted() -> None:
    """The label is found by comparison there, and by its index on a CPU."""
    case = make_case("uniform_mean", "float32")
    on_cpu, on_tpu = (InterpretedAdapter(platform).module(case)[0] for platform in ("cpu", "tpu"))
    assert "stablehlo.gather" in on_cpu or "stablehlo.dynamic_gather" in on_cpu
    assert "gather" not in on_tpu


def test_sums_of_the_interpreter_may_be_in_any_order() -> None:
    assert make_adapter("jax-fused-tpu-interpreted").arithmetic.depth is any_order
