"""What the compilers of TPUs and GPUs say that loss and gradient cost, without a device.

Needs libtpu or JAX's plugin for CUDA, and one of `lsce_cost.devices.ENVIRONMENTS` set before the import.
Without a cast Optax's loss of integer labels is one in bfloat16; cast to float32, as accurate as the others, it costs
more.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from benchmarks.engines import calls_jax
from benchmarks.engines.in_turns import available
from benchmarks.engines.on_jax import with_gradients
from benchmarks.engines.timing import LinearShape, Shape
from lsce_cost import hlo
from lsce_cost.compilers import describe_devices
from lsce_cost.devices import CARDS, TOPOLOGIES
from lsce_cost.ways import integer_labels, integer_labels_float32, one_hot
from lsce_jax.chunked import preferred_rows
from lsce_spec import ChunkOptions

SHAPE = Shape(8192, 32768)
LINEAR_SHAPE = LinearShape(8192, 2048, 131072)


class Cost(NamedTuple):
    """What the compiler gives for one function on one core."""

    topology: str
    name: str
    loss_dtype: str
    temp_bytes: int
    accessed_bytes: float
    minimal_bytes: int  # the logits read once and the gradient written once


class LinearCost(NamedTuple):
    """The same for the last linear layer with the loss."""

    topology: str
    name: str
    loss_dtype: str
    temp_bytes: int
    accessed_bytes: float
    operations: float


SOFT = "lsce fused, soft labels"

_ours = partial(calls_jax.dense, "tpu")
LOSSES = {
    "Optax one-hot, smoothed": one_hot,
    "Optax integer, unsmoothed": integer_labels,
    "Optax integer, cast to float32": integer_labels_float32,
    "lsce fused": _ours(implementation="fused"),
    "lsce fused, softcap": _ours(implementation="fused", softcap=30.0),
    "lsce fused, max_sup": _ours(implementation="fused", convention="max_sup"),
    SOFT: _ours(implementation="fused"),
    "lsce reference": _ours(implementation="reference"),
}
LINEAR_LOSSES = {
    name: function
    for name, (_, function) in available("jax", "linear", "linear").items()
    if name in {"lse form", "lsce fused", "lsce linear", "lsce linear, recompute"}
}


def measure() -> list[Cost]:
    """Compile each loss with its gradient for each topology; bfloat16 logits."""
    costs = []
    for device, topology in TOPOLOGIES.items():
        for name in LOSSES:
            compiled = compile_loss(device, name)
            costs.append(
                Cost(
                    topology=topology,
                    name=name,
                    loss_dtype=compiled.out_info[0].dtype.name,
                    temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
                    accessed_bytes=compiled.cost_analysis()["bytes accessed"],
                    minimal_bytes=SHAPE.logits_bytes,  # two bytes each way,
                )
            )
    return costs


def compile_loss(device: str, name: str) -> Any:
    """Compile one of `LOSSES` with its gradient for a device; bfloat16 logits."""
    labels = (SHAPE.sizes, jnp.bfloat16) if name == SOFT else (SHAPE[:1], jnp.int32)
    arguments = _arguments(device, (SHAPE.sizes, jnp.bfloat16), labels, ((), jnp.float32))
    return _compile(jax.value_and_grad(LOSSES[name]), arguments)


def measure_memory() -> dict[str, dict[str, int]]:
    """Return the temporary memory of each loss with its gradient on each GPU; bfloat16 logits."""
    return {
        name: {device: compile_loss(device, name).memory_analysis().temp_size_in_bytes for device in CARDS}
        for name in LOSSES
    }


def measure_linear() -> list[LinearCost]:
    """Compile each loss of hidden and weight with its gradients for each topology; both bfloat16."""
    rows, features, classes = LINEAR_SHAPE
    described = (
        ((rows, features), jnp.bfloat16),
        ((features, classes), jnp.bfloat16),
        ((rows,), jnp.int32),
        ((), jnp.float32),
    )
    costs = []
    for name, loss in LINEAR_LOSSES.items():
        for device, topology in TOPOLOGIES.items():
            compiled = _compile(with_gradients(loss, linear=True), _arguments(device, *described))
            counted = hlo.parse(compiled.as_text())  # the compiler's own count takes a loop for one round
            costs.append(
                LinearCost(
                    topology=topology,
                    name=name,
                    loss_dtype=compiled.out_info[0].dtype.name,
                    temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
                    accessed_bytes=counted.hbm_bytes,
                    operations=sum(counted.matrix_operations.values()),
                )
            )
    return costs


def linear_chunk_bytes() -> int:
    """Return what the logits of one chunk take."""
    rows, features, classes = LINEAR_SHAPE
    return 4 * min(ChunkOptions().rows_at_most(preferred_rows(features), classes), rows) * classes


def _compile(function: Callable[..., Any], arguments: list[jax.ShapeDtypeStruct]) -> jax.stages.Compiled:
    return jax.jit(function).lower(*arguments).compile()


def _arguments(device: str, *described: tuple[tuple[int, ...], Any]) -> list[jax.ShapeDtypeStruct]:
    sharding = SingleDeviceSharding(describe_devices(device)[0])
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in described]
