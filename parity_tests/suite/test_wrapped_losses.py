"""Other libraries' linear losses, which have no smoothing, with smoothing added: against the oracle.

torch's own runs where torch has it. For the others, which no extra brings:

    pip install liger-kernel triton cut-cross-entropy tokamax
    python -m pytest -m devices parity_tests/suite/test_wrapped_losses.py

Liger's kernels run in Triton's interpreter, cut-cross-entropy as its CPU way, Tokamax as its XLA way. QuACK and the
kernels of cut-cross-entropy need a GPU.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from parity_tests.losses.adapters import Adapter, UnavailableError
from parity_tests.losses.wrapped import (
    INTERPRETED,
    cut_cross_entropy_adapter,
    liger_adapter,
    linear_cross_entropy_adapter,
    tokamax_adapter,
)
from parity_tests.suite.added_smoothing import bounds_of_added
from parity_tests.truth.comparison import within
from parity_tests.truth.linear_cases import make_linear_case
from parity_tests.truth.oracle import solve

pytestmark = pytest.mark.usefixtures("one_thread")

OF_ROWS = ("none", "mean", "trained", "smoothing_per_row", "class_weight", "prior", "z_loss", "batch_of_sequences")
OF_MEANS = ("mean", "sum", "trained", "prior", "square")


@cache
def made(make: Callable[[], Adapter]) -> Adapter | str:
    try:
        return make()
    except UnavailableError as problem:
        return str(problem)


def check(make: Callable[[], Adapter], name: str) -> None:
    adapter = made(make)
    if isinstance(adapter, str):
        pytest.skip(adapter)
    case = make_linear_case(f"linear_{name}", "float32")
    assert adapter.unsupported(case) is None
    comparison = within(case, solve(case), adapter(case), bounds_of_added(case, adapter.arithmetic))
    print(f"{adapter.name}: {comparison.share:.2f} of the bounds of {case.name}")
    assert comparison.agrees, comparison


def whole() -> Adapter:
    return linear_cross_entropy_adapter(in_chunks=False)


def in_chunks() -> Adapter:
    return linear_cross_entropy_adapter(in_chunks=True)


@pytest.mark.parametrize("name", OF_ROWS)
def test_torch(name: str) -> None:
    check(whole, name)


@pytest.mark.parametrize("name", OF_ROWS)
def test_torch_in_chunks(name: str) -> None:
    check(in_chunks, name)


@pytest.mark.parametrize("name", OF_ROWS)
@pytest.mark.devices
def test_liger(name: str) -> None:
    check(liger_adapter, name)


@pytest.mark.parametrize("name", OF_ROWS)
@pytest.mark.devices
def test_cut_cross_entropy(name: str) -> None:
    check(cut_cross_entropy_adapter, name)


@pytest.mark.parametrize("name", OF_MEANS)
@pytest.mark.devices
def test_tokamax(name: str) -> None:
    check(tokamax_adapter, name)


PAGE = Path(__file__).parents[2] / "docs" / "smoothing.md"
MODULES = {"Tokamax": "tokamax", "cut-cross-entropy": "cut_cross_entropy", "Liger": "liger_kernel"}


@pytest.mark.parametrize("library", MODULES)
@pytest.mark.devices
def test_the_block_of_the_page_runs(library: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(MODULES[library]) is None:
        pytest.skip(f"{MODULES[library]} is not installed. Run: pip install {library}")
    found = re.search(rf"### {library}\n\n```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    script = tmp_path / "block.py"
    script.write_text(found[1], encoding="utf-8")
    environment = (
        os.environ | INTERPRETED | {"PYTHONPATH": os.pathsep.join(filter(None, [str(PAGE.parents[1]), *sys.path]))}
    )
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
