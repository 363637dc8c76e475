"""What JAX makes for a TPU or a GPU, compiled by IREE and run on the CPU: against the truth."""

from typing import Any

import pytest

from parity_tests.losses.iree import TARGETS, IreeAdapter
from parity_tests.losses.registry import make_adapter
from parity_tests.plugin import Recorder
from parity_tests.suite.wrong_losses import WRONG_LOSSES
from parity_tests.truth.cases import Case, case_names, make_case
from parity_tests.truth.comparison import against_oracle
from parity_tests.truth.linear_cases import linear_case_names, make_linear_case
from parity_tests.truth.oracle import solve
from parity_tests.truth.precision import DTYPES

# IREE is installed by `make install-devices`.
pytestmark = pytest.mark.devices
NARROW = ("float32", "bfloat16", "float16")
# These show every option.
FEW = ("everything", "bad_labels", "class_mask_max_sup", "soft_clamp", "minus_infinity", "no_rows", "classes_1009")
FEW_LINEAR = ("linear_everything", "linear_many_chunks")


# What IREE 3.13 cannot do; see IreeAdapter.unsupported.
REFUSED = {
    "axis_in_the_middle",
    "class_weight",
    "linear_class_weight",
    "linear_everything",
    "linear_no_rows",
}


def runs(names: list[str], every: str, few: tuple[str, ...], fast: str, reference: str) -> list[Any]:
    """Return every case of the fast implementation, of one dtype and in machine code; a few of each other way."""
    found = [("tpu", f"{fast}-tpu-iree-cpu", name, every) for name in names]
    found += [("tpu", f"{fast}-tpu-iree-cpu", name, dtype) for name in few for dtype in NARROW if dtype != every]
    for adapter in (f"{fast}-tpu-iree-vm", f"{reference}-tpu-iree-cpu"):
        found += [("tpu", adapter, name, dtype) for name in few for dtype in NARROW]
    return found + [("cuda", f"{fast}-cuda-iree-cpu", name, dtype) for name in few for dtype in DTYPES]


def assert_agrees(platform: str, name: str, case: Case, ledger: Recorder) -> None:
    adapter = make_adapter(name)
    if adapter.unsupported(case):
        assert case.name in REFUSED or case.dtype == "float64" or "-vm" in name, adapter.unsupported(case)
        return
    ledger.record(name.partition(f"-{platform}-")[0], platform, case.dtype, "interpreted", f"{platform} by IREE")
    comparison = against_oracle(case, solve(case), adapter(case), adapter.arithmetic)
    assert comparison.agrees, comparison


RUN = ("platform", "adapter", "name", "dtype")


@pytest.mark.parametrize(RUN, runs(case_names(), "bfloat16", FEW, "jax-fused", "jax-reference"))
def test_dense(platform: str, adapter: str, name: str, dtype: str, parity_ledger: Recorder) -> None:
    assert_agrees(platform, adapter, make_case(name, dtype), parity_ledger)


@pytest.mark.parametrize(
    RUN, runs(linear_case_names(), "float32", FEW_LINEAR, "jax-linear-chunked", "jax-linear-reference")
)
def test_linear(platform: str, adapter: str, name: str, dtype: str, parity_ledger: Recorder) -> None:
    assert_agrees(platform, adapter, make_linear_case(name, dtype), parity_ledger)


@pytest.mark.parametrize("target", TARGETS.values())
def test_a_wrong_loss_is_rejected(target: str) -> None:
    """Another convention, and a gradient that is not that of the loss."""
    case = make_case("uniform_mean", "float32")
    for loss in WRONG_LOSSES:
        adapter = IreeAdapter("tpu", target, loss=loss, name="wrong")
        assert not against_oracle(case, solve(case), adapter(case), adapter.arithmetic).agrees
