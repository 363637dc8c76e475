"""How torch finds a TPU, and TorchTPU's environment."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from parity_tests.losses.adapters import LossError, TorchAdapter, UnavailableError
from parity_tests.losses.registry import make_adapter
from parity_tests.losses.torchtpu import PYTHON, TorchTpuAdapter
from parity_tests.plugin import AbsentError, find_device
from parity_tests.truth.cases import make_case
from parity_tests.truth.devices import arithmetic_of
from parity_tests.truth.linear_cases import make_linear_case

# As torch_tpu 0.2.0 calls them, and the rows of the table of devices.
KINDS = {"v4": "tpu-v4", "v5e": "tpu-v5e", "v5p": "tpu-v5p", "v6e": "tpu-v6e", "v7": "tpu-v7x"}


def pretend(monkeypatch: pytest.MonkeyPatch, kind: str, available: bool = True) -> None:
    """Let torch_tpu be there, which registers `torch.tpu` where it finds a TPU."""
    tpu = SimpleNamespace(is_available=lambda: available, get_device_name=lambda: f"TPU {kind}")
    monkeypatch.setitem(sys.modules, "torch_tpu", ModuleType("torch_tpu"))
    monkeypatch.setattr(torch, "tpu", tpu, raising=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tpu_of_torch_gets_its_row(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, kind)
    adapter = make_adapter("torch-fused", "tpu")
    assert isinstance(adapter, TorchAdapter)
    assert adapter.device_model.name == KINDS[kind]
    assert adapter.arithmetic.exp == arithmetic_of(KINDS[kind]).exp
    assert find_device("torch", "tpu") == f"TPU {kind}"


def test_no_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tpu", None)  # an import of it fails
    with pytest.raises(UnavailableError, match=r"torch finds no tpu device .* pip install torch-tpu"):
        make_adapter("torch-fused", "tpu")
    pretend(monkeypatch, "v6e", available=False)
    with pytest.raises(UnavailableError, match="torch finds no tpu device on this machine; torch_tpu is installed"):
        make_adapter("torch-fused", "tpu")
    with pytest.raises(AbsentError, match="torch finds no tpu device"):
        find_device("torch", "tpu")


def test_no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(PYTHON, str(tmp_path / "python"))
    with pytest.raises(UnavailableError, match="make install-torchtpu, which needs Python"):
        make_adapter("torch-fused-tpu-interpreted")


def test_a_process_that_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its exit code is in the message, for the first case and for the next."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setenv(PYTHON, str(python))
    adapter = TorchTpuAdapter()
    for _ in range(2):
        with pytest.raises(LossError, match="ended with exit code 3"):
            adapter(make_case("uniform_mean", "float32"))


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON, sys.executable)
    dense, linear = (make_adapter(f"torch-{name}-tpu-interpreted") for name in ("fused", "linear-chunked"))
    assert dense.unsupported(make_case("uniform_mean", "float64")) == "is in float64, which TPUs do not have"
    assert "has no rows" in str(linear.unsupported(make_linear_case("linear_no_rows", "float32")))
    assert dense.unsupported(make_case("no_rows", "bfloat16")) is None
    with pytest.raises(UnavailableError, match="on the CPU only, not on tpu"):
        make_adapter("torch-fused-tpu-interpreted", "tpu")
