"""What the Pallas kernel costs on TPUs that are not there, beside what XLA makes of the fused loss: bytes and bundles.

Needs libtpu, and its flags and environment set before the import: see `benchmarks.__main__.tpu_kernel`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.engines.timing import Shape
from lsce_cost.bundles import count_bundles, schedules
from lsce_cost.compilers import describe_devices
from lsce_cost.devices import TOPOLOGIES
from lsce_jax import label_smoothed_cross_entropy

SHAPE = Shape(8192, 32768)
IMPLEMENTATIONS = ("fused", "pallas")
# Looks up the class weight of each label, in a loop whose rounds depend on the labels: not counted.
GATHER = "gather_fusion"
EVERYTHING = {
    "class_mask": np.arange(SHAPE.classes) % 8 > 0,
    "class_weight": np.linspace(0.5, 2, SHAPE.classes),
    "ignore_index": 0,
    "z_loss": 1e-4,
    "softcap": 30.0,
}


class Program(NamedTuple):
    """A program to compile."""

    options: dict[str, Any]
    dtype: str = "bfloat16"
    gradient: bool = True


PROGRAMS = {
    "mean": Program({"reduction": "mean"}),
    "mean, float32": Program({"reduction": "mean"}, "float32"),
    "losses of rows": Program({}),
    "loss alone": Program({"reduction": "mean"}, gradient=False),
    "max_sup": Program({"reduction": "mean", "convention": "max_sup"}),
    "everything": Program({"reduction": "mean", **EVERYTHING}),
}


class KernelCost(NamedTuple):
    """What the compiler gives for one program on one core.

    Args:
        topology: of the TPU.
        name: of the program.
        implementation: "fused" or "pallas".
        temp_bytes: of memory beyond arguments and results.
        accessed_bytes: of memory read and written.
        logits_bytes: of the logits.
        bundles: that the core executes.
    """

    topology: str
    name: str
    implementation: str
    temp_bytes: int
    accessed_bytes: float
    logits_bytes: int
    bundles: int


def measure(
    dump: Path, names: Sequence[str] = tuple(PROGRAMS), implementations: Sequence[str] = IMPLEMENTATIONS
) -> list[KernelCost]:
    """Compile programs for each topology. The compiler writes what it makes to `dump`."""
    return [
        _cost(dump, device, name, implementation)
        for device in TOPOLOGIES
        for name in names
        for implementation in implementations
    ]


def _cost(dump: Path, device: str, name: str, implementation: str) -> KernelCost:
    program = PROGRAMS[name]
    (core,) = describe_devices(device)
    describe: Any = partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(core))
    logits, labels = describe(SHAPE.sizes, program.dtype), describe(SHAPE[:1], jnp.int32)
    before = set(dump.iterdir())
    compiled = jax.jit(_function(program, implementation)).lower(logits, labels).compile()
    files = [file for kernel, file in schedules(set(dump.iterdir()) - before) if not kernel.startswith(GATHER)]
    if not files:
        raise ValueError(f"the compiler has written no schedule to {dump} for {TOPOLOGIES[device]}")
    memory: Any = compiled.memory_analysis()
    return KernelCost(
        topology=TOPOLOGIES[device],
        name=name,
        implementation=implementation,
        temp_bytes=memory.temp_size_in_bytes,
        accessed_bytes=compiled.cost_analysis()["bytes accessed"],
        logits_bytes=logits.size * logits.dtype.itemsize,
        bundles=sum(map(count_bundles, files)),
    )


def _function(program: Program, implementation: str) -> Callable[[jax.Array, jax.Array], Any]:
    def total(logits: jax.Array, labels: jax.Array) -> jax.Array:
        losses = label_smoothed_cross_entropy(logits, labels, implementation=implementation, **program.options)
        return losses.sum()

    return jax.value_and_grad(total) if program.gradient else total
