"""lsce_torch on tensors that JAX computes, through torchax, against the truth."""

import pytest

from parity_tests.losses.adapters import UnavailableError
from parity_tests.losses.registry import make_adapter
from parity_tests.losses.torchax import TorchaxAdapter
from parity_tests.suite.wrong_torch_losses import wrong_convention
from parity_tests.truth.cases import Case, case_names, make_case
from parity_tests.truth.comparison import against_oracle
from parity_tests.truth.linear_cases import linear_case_names, make_linear_case
from parity_tests.truth.oracle import solve
from parity_tests.truth.precision import DTYPES

# torchax needs the torch that it was made for: pip install --pre --upgrade torchax
pytestmark = pytest.mark.devices
FEW = ("everything", "bad_labels", "class_mask_max_sup", "soft_clamp", "minus_infinity")
FEW_LINEAR = ("linear_everything", "linear_mean")


def adapter_of(name: str) -> TorchaxAdapter:
    try:
        adapter = make_adapter(f"{name}-torchax")
    except UnavailableError as error:
        pytest.skip(str(error))
    assert isinstance(adapter, TorchaxAdapter)
    return adapter


def assert_agrees(name: str, case: Case) -> None:
    adapter = adapter_of(name)
    if adapter.unsupported(case):
        assert getattr(case, "bias", None) is not None
        assert case.dtype in ("bfloat16", "float16")
        return
    comparison = against_oracle(case, solve(case), adapter(case), adapter.arithmetic)
    assert comparison.agrees, comparison


@pytest.mark.parametrize("name", case_names())
def test_dense(name: str) -> None:
    assert_agrees("torch-fused", make_case(name, "float32"))


@pytest.mark.parametrize("name", linear_case_names())
def test_linear(name: str) -> None:
    assert_agrees("torch-linear-chunked", make_linear_case(name, "float32"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("adapter", ["torch-fused", "torch-reference"])
def test_every_dtype(adapter: str, name: str, dtype: str) -> None:
    assert_agrees(adapter, make_case(name, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FEW_LINEAR)
@pytest.mark.parametrize("adapter", ["torch-linear-chunked", "torch-linear-reference"])
def test_every_dtype_of_the_linear_loss(adapter: str, name: str, dtype: str) -> None:
    assert_agrees(adapter, make_linear_case(name, dtype))


def test_a_wrong_loss_is_rejected() -> None:
    adapter_of("torch-fused")
    case = make_case("uniform_mean", "float32")
    adapter = TorchaxAdapter(loss=wrong_convention, name="wrong")
    assert not against_oracle(case, solve(case), adapter(case), adapter.arithmetic).agrees
