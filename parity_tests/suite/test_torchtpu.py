"""What TorchTPU makes of lsce_torch for a TPU: interpreted, against the truth, and compiled by libtpu."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lsce_spec import IMPLEMENTATIONS, LINEAR_IMPLEMENTATIONS
from parity_tests.losses.adapters import UnavailableError
from parity_tests.losses.registry import make_adapter
from parity_tests.losses.torchtpu import TorchTpuAdapter, find_python, traffic
from parity_tests.plugin import Recorder
from parity_tests.suite import wrong_torch_losses
from parity_tests.suite.wrong_torch_losses import WRONG_LINEAR_LOSSES, WRONG_LOSSES
from parity_tests.truth.cases import Case, LinearCase, case_names, make_case
from parity_tests.truth.comparison import against_oracle
from parity_tests.truth.linear_cases import linear_case_names, make_linear_case
from parity_tests.truth.oracle import solve

# TorchTPU is installed by `make install-torchtpu`, into an environment of its own.
pytestmark = pytest.mark.devices
NARROW = ("float32", "bfloat16", "float16")
GENERATIONS = ("v4", "v5e", "v5p", "v6e", "v7x")
# These show every option.
FEW = ("uniform_mean", "everything", "bad_labels", "class_mask_max_sup", "soft_clamp", "minus_infinity")
FEW_LINEAR = ("linear_everything", "linear_mean")
DENSE = [f"torch-{implementation}" for implementation in IMPLEMENTATIONS]
LINEAR = [f"torch-linear-{implementation}" for implementation in LINEAR_IMPLEMENTATIONS]


@pytest.fixture(autouse=True)
def environment() -> str:
    """Return the Python of TorchTPU's environment, or skip the test with the reason."""
    try:
        return find_python()
    except UnavailableError as error:
        pytest.skip(str(error))


def adapter_of(name: str) -> TorchTpuAdapter:
    adapter = make_adapter(f"{name}-tpu-interpreted")
    assert isinstance(adapter, TorchTpuAdapter)
    return adapter


def assert_agrees(name: str, case: Case, ledger: Recorder) -> None:
    adapter = adapter_of(name)
    if adapter.unsupported(case):
        assert case.name == "linear_no_rows"
        return
    ledger.record(name, "tpu", case.dtype, "interpreted", "tpu by TorchTPU")
    comparison = against_oracle(case, solve(case), adapter(case), adapter.arithmetic)
    assert comparison.agrees, comparison


def runs(adapters: list[str], names: list[str], few: tuple[str, ...]) -> list[Any]:
    """Return every case of the first adapter in every dtype; a few of the other."""
    first, other = adapters
    found = [(first, name, dtype) for name in names for dtype in NARROW]
    return found + [(other, name, dtype) for name in few for dtype in NARROW]


@pytest.mark.parametrize(("adapter", "name", "dtype"), runs(["torch-fused", "torch-reference"], case_names(), FEW))
def test_dense(adapter: str, name: str, dtype: str, parity_ledger: Recorder) -> None:
    assert_agrees(adapter, make_case(name, dtype), parity_ledger)


@pytest.mark.parametrize(
    ("adapter", "name", "dtype"),
    runs(["torch-linear-chunked", "torch-linear-reference"], linear_case_names(), FEW_LINEAR),
)
def test_linear(adapter: str, name: str, dtype: str, parity_ledger: Recorder) -> None:
    assert_agrees(adapter, make_linear_case(name, dtype), parity_ledger)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(
    ("adapter", "name"), [*(("torch-fused", name) for name in FEW), *(("torch-linear-chunked", n) for n in FEW_LINEAR)]
)
def test_by_iree(adapter: str, name: str, dtype: str, parity_ledger: Recorder) -> None:
    case = (make_linear_case if adapter in LINEAR else make_case)(name, dtype)
    by_iree = make_adapter(f"{adapter}-tpu-iree-cpu")
    if reason := by_iree.unsupported(case):
        assert "IREE reads outside" in reason
        return
    parity_ledger.record(adapter, "tpu", dtype, "interpreted", "tpu by TorchTPU and IREE")
    comparison = against_oracle(case, solve(case), by_iree(case), by_iree.arithmetic)
    assert comparison.agrees, comparison


def test_rows_of_minus_infinity() -> None:
    """Their loss is NaN. TorchTPU starts its largest value at the least finite number, which must not show."""
    case = make_case("uniform_none", "float32")
    logits = case.logits.copy()
    logits[0] = -np.inf
    case = replace(case, logits=logits)
    result = adapter_of("torch-fused")(case)
    assert np.isnan(result.parts["loss"].reshape(-1)[0])
    assert np.isfinite(result.parts["loss"].reshape(-1)[1:]).all()
    comparison = against_oracle(case, solve(case), result, adapter_of("torch-fused").arithmetic)
    assert comparison.agrees, comparison


@pytest.mark.parametrize("loss", WRONG_LOSSES)
def test_a_wrong_loss_is_rejected(loss: str) -> None:
    assert_rejected(make_case("uniform_mean", "float32"), loss)


@pytest.mark.parametrize("loss", WRONG_LINEAR_LOSSES)
def test_a_wrong_linear_loss_is_rejected(loss: str) -> None:
    assert_rejected(make_linear_case("linear_mean", "float32"), loss)


def assert_rejected(case: Case, loss: str) -> None:
    linear = isinstance(case, LinearCase)
    for target in (None, "llvm-cpu"):
        name = f"{wrong_torch_losses.__name__}:{loss}"
        adapter = TorchTpuAdapter(name, name="wrong", linear=linear, target=target)
        assert not against_oracle(case, solve(case), adapter(case), adapter.arithmetic).agrees


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    ("adapter", "name"), [*((a, n) for a in DENSE for n in FEW), *((a, n) for a in LINEAR for n in FEW_LINEAR)]
)
def test_libtpu_compiles_it(adapter: str, name: str, generation: str, parity_ledger: Recorder) -> None:
    case = (make_linear_case if adapter in LINEAR else make_case)(name, "bfloat16")
    parity_ledger.record(adapter, "tpu", case.dtype, "compiled", f"tpu-{generation} by TorchTPU")
    assert adapter_of(adapter).compile(case, generation)["bytes accessed"] > 0


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_traffic_of_the_dense_loss(generation: str) -> None:
    """The logits are read three times and their gradient is written, and nothing as large is kept."""
    logits_bytes = 2 * 8192 * 32768
    figures = traffic((8192, 32768), generation)
    print(figures)
    assert figures["bytes accessed"] < 4.1 * logits_bytes
    assert figures["temporary"] < logits_bytes / 10


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_traffic_of_the_linear_loss(generation: str) -> None:
    """One chunk: the layer, the logits and their gradient are read and written a few times, and nothing is copied."""
    rows, features, classes = 2048, 2048, 131072
    logits_bytes, weight_bytes = 2 * rows * classes, 2 * features * classes
    figures = traffic((rows, features, classes), generation)
    print(figures)
    assert figures["bytes accessed"] < 6 * logits_bytes + 3 * weight_bytes
    assert figures["temporary"] < 2.1 * logits_bytes
