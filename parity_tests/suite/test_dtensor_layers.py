"""The linear loss of lsce_torch with a weight that is a DTensor, in four processes of gloo."""

from typing import Any

import pytest

from parity_tests.losses.adapters import TorchAdapter, operands_of
from parity_tests.losses.sharded import on_shards
from parity_tests.losses.sharded_torch import PROCESSES, run_on_ranks, same
from parity_tests.suite import on_meshes
from parity_tests.suite.on_meshes import Layout
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import AnyResult, against_oracle
from parity_tests.truth.linear_cases import linear_case_names, make_linear_case
from parity_tests.truth.oracle import solve

TENSOR_PARALLEL: Layout = ((4, "whole", "classes"),)
FSDP: Layout = ((4, "rows", "classes"),)
BOTH: Layout = ((2, "rows", "classes"), (2, "whole", "classes"))
LAYOUTS: dict[str, tuple[Layout, bool]] = {
    "tensor parallel, plain hidden": (TENSOR_PARALLEL, True),
    "tensor parallel": (TENSOR_PARALLEL, False),
    "FSDP": (FSDP, False),
    "FSDP and tensor parallel": (BOTH, False),
    "FSDP and tensor parallel, plain hidden": (BOTH, True),
    "data and tensor parallel": (((2, "rows", "whole"), (2, "whole", "classes")), False),
    "HSDP": (((2, "rows", "whole"), (2, "rows", "classes")), False),
    "rows alone": (((4, "rows", "whole"),), False),
    "features": (((2, "features", "features"), (2, "features", "classes")), False),
}


class LayerAdapter(TorchAdapter):
    """The linear loss of `lsce_torch` with DTensors on a mesh of all processes.

    Args:
        name: of `LAYOUTS`.
        compiled: whether each process compiles it.
    """

    def __init__(self, name: str, compiled: bool = False) -> None:
        """Choose the mesh."""
        super().__init__(name=f"torch DTensor layer, {name}", linear=True)
        self.layout, self.is_plain = LAYOUTS[name]
        self.is_compiled = compiled
        self.arithmetic = on_shards(self.arithmetic, PROCESSES)

    def __call__(self, case: Case) -> AnyResult:
        """Return loss and gradients of a case."""
        arrays, options = operands_of(case)
        given = (options, arrays, self.layout, self.is_plain, self.is_compiled)
        answers = run_on_ranks(on_meshes.loss_and_gradients, [given] * PROCESSES)
        return self.result(case, {part: same([answer[part] for answer in answers]) for part in answers[0]})


def assert_agrees(name: str, dtype: str, loss: LayerAdapter) -> Any:
    case = make_linear_case(name, dtype)
    comparison = against_oracle(case, solve(case), loss(case), loss.arithmetic)
    assert comparison.agrees, (name, comparison)
    return comparison


WAYS = [
    pytest.param(name, dtype, marks=[] if (name, dtype) in {("FSDP and tensor parallel", "float32")} else pytest.mark.distributed)
    for name in LAYOUTS
    for dtype in ("float32", "bfloat16", "float64")
]


@pytest.mark.parametrize(("layout", "dtype"), WAYS)
def test_against_oracle(layout: str, dtype: str) -> None:
    """Loss and gradients of every case. The gradients are placed as what they belong to."""
    loss = LayerAdapter(layout)
    for name in linear_case_names():
        assert_agrees(name, dtype, loss)
