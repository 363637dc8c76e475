"""What loss and gradient send between devices: compiled programs against the model of docs/scaling.md.

Programs are compiled for virtual devices of a CPU here, and with the marker `devices` for slices of TPUs and a host of
GPUs. tests/test_scaling_model.py has what needs no compiler.
"""

from dataclasses import replace
from itertools import product
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from lsce_cost.compilers import CompilerProcess, describe_devices
from lsce_cost.devices import ENVIRONMENTS, has_cuda_plugin, has_libtpu
from lsce_jax import linear_label_smoothed_cross_entropy
from parity_tests.losses.collectives import AXES, CPU, Sent, compile_step, find_sent, operands_of
from parity_tests.losses.collectives_model import GATHERED, MEGATRON, NAIVE, OURS, OURS_LOCAL, WAYS, Step, predict
from parity_tests.losses.compiled import REMEDY

NEEDED = {
    "tpu": pytest.mark.skipif(not has_libtpu(), reason=f"libtpu is not installed; {REMEDY}"),
    "gpu": pytest.mark.skipif(not has_cuda_plugin(), reason=f"JAX's plugin for CUDA is not installed; {REMEDY}"),
}


def on(target: str, *others: Any, slow: bool = False) -> Any:
    marks = [pytest.mark.devices, NEEDED[target[:3]], *([pytest.mark.slow] if slow else [])]
    return pytest.param(target, *others, marks=marks)


def small(mesh: tuple[int, int], features: int | None = 24) -> Step:
    return Step(64 * mesh[0], 4096, mesh, features, "float32")


def large(mesh: tuple[int, int], features: int | None = 512) -> Step:
    """Return a step in which XLA for TPUs divides what it would gather if it were small."""
    return Step(512 * mesh[0], 65536, mesh, features)


def assert_predicted(target: str, way: str, step: Step) -> None:
    compiled = compile_step(target, way, step)
    assert compiled.reason is None
    assert compiled.total() == predict(way, step, target[:3])


# --- The model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [None, 24])
@pytest.mark.parametrize("way", WAYS)
def test_bytes_are_those_of_the_model_on_a_cpu(way: str, features: int | None) -> None:
    assert_predicted(CPU, way, small((2, 4), features))


@pytest.mark.parametrize(("mesh", "features"), [*product([(1, 8), (8, 1)], [None, 24])])
def test_other_meshes_of_a_cpu(mesh: tuple[int, int], features: int | None) -> None:
    for way in (OURS, OURS_LOCAL):
        assert_predicted(CPU, way, small(mesh, features))


def test_chunks_on_a_cpu() -> None:
    """XLA for CPUs adds up the weight's gradient over the devices in each chunk of rows."""
    step = Step(2048, 4096, (2, 4), 24, "float32")
    assert_predicted(CPU, OURS, step)
    assert predict(OURS, step, "cpu")["all-reduce", "rows"] > predict(OURS, step)["all-reduce", "rows"]


def test_the_model_can_be_wrong() -> None:
    step = small((2, 4), None)
    assert compile_step(CPU, NAIVE, step).total() != predict(MEGATRON, step, CPU)
    assert compile_step(CPU, NAIVE, step).total() != predict(NAIVE, replace(step, rows=256), CPU)


MANY = [
    *(on("tpu-v5e", (4, 4), way) for way in WAYS),
    *(on("gpu-h100", (2, 4), way) for way in WAYS),
    *(on("tpu-v5e", (16, 16), way) for way in (OURS, OURS_LOCAL, GATHERED)),
    *(on("tpu-v5p", (4, 16), way, slow=True) for way in (OURS, OURS_LOCAL)),
    *(on("tpu-v6e", (16, 16), way, slow=True) for way in (OURS, OURS_LOCAL)),
]


@pytest.mark.parametrize(("target", "mesh", "way"), MANY)
@pytest.mark.parametrize("features", [None, 512])
def test_bytes_are_those_of_the_model(target: str, mesh: tuple[int, int], way: str, features: int | None) -> None:
    assert_predicted(target, way, large(mesh, features))


@pytest.mark.devices
@NEEDED["tpu"]
def test_slices_of_several_hosts() -> None:
    assert compile_step("tpu-v5e", OURS, large((4, 4), None)).hosts == 4
    assert compile_step("tpu-v5e", OURS, large((16, 16), None)).hosts == 64


# --- Nothing as wide as the classes ---------------------------------------------------------------------------------

OURS_EVERYWHERE = [
    *((CPU, mesh, way) for mesh, way in product([(1, 8), (2, 4)], [OURS, OURS_LOCAL])),
    *(on("tpu-v5e", (4, 4), way) for way in (OURS, OURS_LOCAL)),
    *(on("tpu-v5e", mesh, way, slow=True) for mesh, way in product([(1, 16), (16, 1), (16, 16)], [OURS, OURS_LOCAL])),
    *(on("tpu-v5p", (4, 16), way, slow=True) for way in (OURS, OURS_LOCAL)),
    *(on("gpu-h100", (2, 4), way) for way in (OURS, OURS_LOCAL)),
]


def sent_for_twice_the_classes(target: str, way: str, step: Step) -> list[dict[tuple[str, str], int]]:
    return [compile_step(target, way, each).total() for each in (step, replace(step, classes=2 * step.classes))]


@pytest.mark.parametrize(("target", "mesh", "way"), OURS_EVERYWHERE)
def test_nothing_that_is_sent_grows_with_the_classes(target: str, mesh: tuple[int, int], way: str) -> None:
    """Of a loss of logits."""
    step = small(mesh, None) if target == CPU else large(mesh, None)
    once, twice = sent_for_twice_the_classes(target, way, step)
    assert once == twice


@pytest.mark.parametrize(("target", "mesh", "way"), OURS_EVERYWHERE)
def test_of_a_layer_only_the_gradient_of_the_weight_grows(target: str, mesh: tuple[int, int], way: str) -> None:
    """And that goes only to devices that have other rows."""
    step = small(mesh) if target == CPU else large(mesh)
    once, twice = sent_for_twice_the_classes(target, way, step)
    of_weight = "all-reduce", "rows"
    assert twice.pop(of_weight, 0) == 2 * once.pop(of_weight, 0)
    assert once == twice


@pytest.mark.parametrize(("target", "mesh"), [(CPU, (2, 4)), on("tpu-v5e", (4, 4)), on("gpu-h100", (2, 4))])
@pytest.mark.parametrize("features", [None, 24])
def test_gathered_logits_grow(target: str, mesh: tuple[int, int], features: int | None) -> None:
    """So that the tests above can fail."""
    step = small(mesh, features) if target == CPU else large(mesh, features)
    once, twice = (sent["all-gather", "classes"] for sent in sent_for_twice_the_classes(target, GATHERED, step))
    assert twice == 2 * once


# --- A weight whose features are divided ----------------------------------------------------------------------------


def fsdp_here(target: str, step: Step, axis_type: str, recompute: bool) -> tuple[Sent, ...]:
    """Return what the linear loss sends where the rows' devices divide the features of the weight."""
    types = (getattr(jax.sharding.AxisType, axis_type),) * 2
    mesh = Mesh(np.array(describe_devices(target, 16 if target[:3] == "tpu" else 8)).reshape(step.mesh), AXES, types)
    hidden, weight, labels, _ = operands_of(step, mesh)
    spec: Any = jax.P
    sharding = jax.NamedSharding(mesh, spec("rows", "classes"))
    weight = jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=sharding)  # type: ignore[no-untyped-call]

    def loss(hidden: Any, weight: Any, labels: Any) -> Any:
        options: Any = {"reduction": "mean", "chunk_size": 256, "recompute": recompute}
        return linear_label_smoothed_cross_entropy(hidden, weight, labels, **options)

    step_of: Any = jax.value_and_grad(loss, argnums=(0, 1))
    with jax.set_mesh(mesh):
        program = jax.jit(step_of, out_shardings=(None, (hidden.sharding, sharding)))
        return tuple(find_sent(program.lower(hidden, weight, labels).compile().as_text(), step.mesh))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
@pytest.mark.parametrize(("target", "mesh"), [on("tpu-v5e", (4, 4)), on("gpu-h100", (2, 4))])
def test_the_weight_is_gathered_once_and_its_gradient_added_up_once(
    target: str, mesh: tuple[int, int], axis_type: str, recompute: bool
) -> None:
    """As in FSDP, whatever the number of chunks."""
    step = large(mesh)
    sent = CompilerProcess(ENVIRONMENTS[target[:3]]).call(fsdp_here, target, step, axis_type, recompute)
    assert step.features is not None
    of_device = step.features * step.local_classes * 2
    large_ones = [each for each in sent if each.axes == "rows" and each.bytes >= of_device]
    assert [each.times for each in large_ones] == [1, 1]
    assert large_ones[0].kind == "all-gather"
    assert large_ones[1].kind in {"all-reduce", "reduce-scatter"}
