"""What the compilers of TPUs and GPUs say that loss and gradient cost, without a device.

Needs libtpu or JAX's plugin for CUDA, and one of `lsce_spec.devices.ENVIRONMENTS` set before the import.
Without a cast Optax's loss of integer labels is one in bfloat16; cast to float32, as accurate as the others, it costs
more.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from benchmarks.dense_jax import ours
from benchmarks.linear_jax import LOSSES as ALL_LINEAR_LOSSES
from benchmarks.linear_jax import with_gradients
from benchmarks.timing import LinearShape, Shape
from lsce_jax.aot.compilers import describe_devices
from lsce_jax.aot.ways import integer_labels, integer_labels_float32, one_hot
from lsce_jax.chunked import preferred_rows
from lsce_spec import ChunkOptions
from lsce_spec.devices import CARDS, TOPOLOGIES

SHAPE = Shape(8192, 32768)
LINEAR_SHAPE = LinearShape(8192, 2048, 131072)
LINEAR_DEVICE = "tpu-v6e"


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

LOSSES = {
    "Optax one-hot, smoothed": one_hot,
    "Optax integer, unsmoothed": integer_labels,
    "Optax integer, cast to float32": integer_labels_float32,
    "lsce fused": ours("fused"),
    "lsce fused, softcap": ours("fused", softcap=30.0),
    "lsce fused, max_sup": ours("fused", convention="max_sup"),
    SOFT: ours("fused"),
    "lsce reference": ours("reference"),
}
LINEAR_LOSSES = {
    name: ALL_LINEAR_LOSSES[name] for name in ("lse form", "lsce fused", "lsce linear", "lsce linear, recompute")
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
    """Compile each loss of hidden and weight with its gradients; both bfloat16."""
    rows, features, classes = LINEAR_SHAPE
    arguments = _arguments(
        LINEAR_DEVICE,
        ((rows, features), jnp.bfloat16),
        ((features, classes), jnp.bfloat16),
        ((rows,), jnp.int32),
        ((), jnp.float32),
    )
    costs = []
    for name, loss in LINEAR_LOSSES.items():
        compiled = _compile(with_gradients(loss), arguments)
        counted = compiled.cost_analysis()
        if name.startswith("lsce linear"):  # the others have no loop
            with unrolled():
                counted = _compile(with_gradients(loss), arguments).cost_analysis()
        costs.append(
            LinearCost(
                topology=TOPOLOGIES[LINEAR_DEVICE],
                name=name,
                loss_dtype=compiled.out_info[0].dtype.name,
                temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
                accessed_bytes=counted["bytes accessed"],
                operations=counted["flops"],
            )
        )
    return costs


def linear_chunk_bytes() -> int:
    """Return what the logits of one chunk take."""
    rows, features, classes = LINEAR_SHAPE
    return 4 * min(ChunkOptions().rows_at_most(preferred_rows(features), classes), rows) * classes


@contextmanager
def unrolled() -> Iterator[None]:
    """Trace each round of a loop for itself: the compiler's count takes a loop for one round."""
    as_it_is = jax.lax.fori_loop

    def fori_loop(lower: int, upper: int | jax.Array, body: Callable[[Any, Any], Any], carry: Any) -> Any:
        if not isinstance(upper, int):
            return as_it_is(lower, upper, body, carry)  # the data decide how many rounds it has
        for i in range(lower, upper):
            carry = body(jnp.int32(i), carry)
        return carry

    jax.clear_caches()
    try:
        with mock.patch.multiple(jax.lax, fori_loop=fori_loop, scan=partial(jax.lax.scan, unroll=True)):
            yield
    finally:
        jax.clear_caches()


def _compile(function: Callable[..., Any], arguments: list[jax.ShapeDtypeStruct]) -> jax.stages.Compiled:
    return jax.jit(function).lower(*arguments).compile()


def _arguments(device: str, *described: tuple[tuple[int, ...], Any]) -> list[jax.ShapeDtypeStruct]:
    sharding = SingleDeviceSharding(describe_devices(device)[0])
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in described]
