"""The linear loss of lsce_torch with a weight that is a DTensor, in four processes of gloo."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lsce_torch.errors import error
from parity_tests.losses.adapters import TorchAdapter, operands_of
from parity_tests.losses.sharded import on_shards
from parity_tests.losses.sharded_torch import PROCESSES, processes, run_on_ranks, same
from parity_tests.suite import on_meshes
from parity_tests.suite.on_meshes import Layout
from parity_tests.suite.stats_truth import assert_statistics
from parity_tests.truth.cases import Case, make_case
from parity_tests.truth.comparison import AnyResult, against_oracle
from parity_tests.truth.linear_cases import linear_case_names, make_linear_case, with_logits
from parity_tests.truth.oracle import solve
from parity_tests.truth.precision import round_to

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
    "sequence": (((2, "rows", "whole"), (2, "sequence", "classes")), False),
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
        divided = on_shards(self.arithmetic, PROCESSES)
        # As in `ShardedTorchAdapter`.
        self.arithmetic = replace(divided, exp=2 * divided.exp + 1)

    def __call__(self, case: Case) -> AnyResult:
        """Return loss and gradients of a case."""
        arrays, options = operands_of(case)
        given = (options, arrays, self.layout, self.is_plain, self.is_compiled)
        answers = run_on_ranks(on_meshes.loss_and_gradients, [given] * PROCESSES)
        return self.result(case, {part: same([answer[part] for answer in answers]) for part in answers[0]})


def assert_agrees(case: Case, loss: LayerAdapter) -> None:
    comparison = against_oracle(case, solve(case), loss(case), loss.arithmetic)
    assert comparison.agrees, (case.name, comparison)


QUICK = {("tensor parallel, plain hidden", "bfloat16"), ("FSDP and tensor parallel", "float32")}
WAYS = [
    pytest.param(name, dtype, marks=[] if (name, dtype) in QUICK else pytest.mark.distributed)
    for name in LAYOUTS
    for dtype in ("float32", "bfloat16", "float64")
    if name != "sequence"
]


@pytest.mark.parametrize(("layout", "dtype"), WAYS)
def test_against_oracle(layout: str, dtype: str) -> None:
    """Loss and gradients of every case. The gradients are placed as what they belong to."""
    loss = LayerAdapter(layout)
    for name in linear_case_names():
        assert_agrees(make_linear_case(name, dtype), loss)


@pytest.mark.parametrize("layout", ["sequence", "FSDP and tensor parallel", "tensor parallel, plain hidden"])
def test_rows_of_two_dimensions(layout: str) -> None:
    """Divided evenly and not, along one of them or both."""
    generator = np.random.default_rng(0)
    case, shape = make_linear_case("linear_everything", "float32"), (3, 5)
    fields: dict[str, Any] = {
        "hidden": round_to(generator.normal(size=(*shape, 5)), "float32"),
        "labels": generator.integers(0, 7, shape),
        "where": generator.random(shape) < 0.7,
        "smoothing": round_to(generator.random(shape), "float32"),
    }
    assert_agrees(with_logits(replace(case, **fields)), LayerAdapter(layout))


@pytest.mark.parametrize(("layout", "dtype"), [
    pytest.param("tensor parallel, plain hidden", "float32", marks=pytest.mark.slow),
    pytest.param("FSDP", "bfloat16", marks=pytest.mark.distributed),
    pytest.param("data and tensor parallel", "float32", marks=pytest.mark.distributed),
])  # fmt: skip
def test_compiled(layout: str, dtype: str) -> None:
    """One graph, with the collectives in it."""
    assert_agrees(make_linear_case("linear_class_weight", dtype), LayerAdapter(layout, compiled=True))


@pytest.mark.parametrize("is_inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("sizes", [(4, 1), (2, 2)], ids=["FSDP", "FSDP and tensor parallel"])
def test_fsdp(sizes: tuple[int, int], is_inside: bool) -> None:
    """A layer of `fully_shard`, with the loss in its forward, and after it. The classes do not divide evenly."""
    case = make_linear_case("linear_sum", "float32")
    loss = LayerAdapter("FSDP")
    arrays, options = operands_of(case)
    answers = run_on_ranks(on_meshes.with_fsdp, [(options, arrays, sizes, is_inside)] * PROCESSES)
    results = {"loss": same([answer["loss"] for answer in answers])}
    results["hidden"] = torch.cat([answers[data * sizes[1]]["hidden"] for data in range(sizes[0])])
    for name in ("weight", "bias"):
        # Divided by class first, and each part by FSDP2.
        order = [data * sizes[1] + model for model in range(sizes[1]) for data in range(sizes[0])]
        results[name] = torch.cat([answers[rank][name] for rank in order])
    comparison = against_oracle(case, solve(case), loss.result(case, results), loss.arithmetic)
    assert comparison.agrees, comparison


@pytest.mark.parametrize("layout", ["FSDP and tensor parallel", "FSDP", "tensor parallel"])
def test_statistics(layout: str) -> None:
    case, loss = make_case("softcap", "float32"), LayerAdapter(layout)
    given = (operands_of(case)[1], operands_of(case)[0], loss.layout)
    answers = run_on_ranks(on_meshes.statistics, [given] * PROCESSES)
    stats = {field: same([answer[field] for answer in answers]).numpy().reshape(-1) for field in answers[0]}
    assert_statistics(case, stats.pop("loss").reshape(()), stats, loss.arithmetic)


def test_gradients_are_added_up_in_float32() -> None:
    """129.5 becomes 130. In bfloat16 the numbers that are added to 128 would be lost."""
    gradient = same(run_on_ranks(on_meshes.sum_of_narrow_gradients, [()] * PROCESSES))
    assert gradient.dtype == torch.bfloat16
    assert gradient[1:].flatten().tolist() == [130.0] * 3


def test_module() -> None:
    for of_module, of_function in run_on_ranks(on_meshes.module, [()] * PROCESSES):
        assert torch.equal(of_module, of_function)


# --- Errors ----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "partial weight": ("dtensor_partial", {"name": "weight", "given": "[Partial(sum), Replicate()]"}),
    "partial hidden": ("dtensor_partial", {"name": "hidden", "given": "[Partial(sum), Replicate()]"}),
    "strided hidden": ("dtensor_placement", {"name": "hidden", "given": "[_StridedShard(dim=0, sf=2), Shard(dim=0)]"}),
    "mesh": ("dtensor_mesh", {"name": "weight", "given": [[0, 1], [2, 3]], "expected": [0, 1, 2, 3]}),
    "gradient of class_weight": ("shard_gradient", {"name": "class_weight"}),
    "labels of a tensor-parallel group": ("ranks_rows", {"name": "labels", "rank": 1}),
    "labels where the weight is gathered": ("ranks_rows", {"name": "labels", "rank": 1}),
    "soft labels": ("linear_soft_labels", {"given": "float32"}),
    "implementation=chunked": ("dtensor_option", {"name": "implementation where the classes are divided"}),
    "recompute=False": ("dtensor_option", {"name": "recompute where the classes are divided"}),
    "gradient_filter=0.1": ("dtensor_option", {"name": "gradient_filter where the classes are divided"}),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_is_refused(how: str) -> None:
    """Each rank raises, with the whole message."""
    key, given = REFUSED[how]
    for problem in processes().on_ranks(on_meshes.refused, [(how,)] * PROCESSES):
        assert str(problem) == str(error(key, **given))
        assert type(problem) is type(error(key, **given))


def test_shapes_in_messages_are_whole() -> None:
    for problem in processes().on_ranks(on_meshes.refused, [("shape",)] * PROCESSES):
        assert isinstance(problem, ValueError)
        assert "hidden [4, 2], got [8, 3]" in str(problem)


@pytest.mark.distributed
def test_what_is_refused_within_compile() -> None:
    for problem in processes().on_ranks(on_meshes.compiled_as_refused, [()] * PROCESSES):
        given = "[Shard(dim=0), Shard(dim=0)]"
        assert str(error("dtensor_placement", name="weight", given=given)) in str(problem)


@pytest.mark.distributed
def test_compiled_with_other_labels() -> None:
    for problem in processes().on_ranks(on_meshes.compiled_with_other_labels, [()] * PROCESSES):
        assert str(problem) == str(error("ranks_rows", name="labels", rank=1))
