"""What the TPU compiler says that loss and gradient cost, without a TPU.

Needs libtpu, and `benchmarks.__main__.TPU_ENVIRONMENT` set before the import. Without a cast Optax's loss of integer
labels is one in bfloat16; cast to float32, as accurate as the others, it costs more.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.dense_jax import Labels, Logits, Scalar, integer_labels, one_hot, ours
from benchmarks.timing import Shape

SHAPE = Shape(8192, 32768)
TOPOLOGIES = ("v5e:2x2", "v6e:2x2")


class Cost(NamedTuple):
    """What the compiler gives for one function on one core."""

    topology: str
    name: str
    loss_dtype: str
    temp_bytes: int
    accessed_bytes: float
    minimal_bytes: int  # the logits read once and the gradient written once


def integer_labels_float32(logits: Logits, labels: Labels, smoothing: Scalar) -> Scalar:
    """What Optax offers, with a loss as accurate as the others'."""
    return integer_labels(logits.astype(jnp.float32), labels, smoothing)


LOSSES = {
    "Optax one-hot, smoothed": one_hot,
    "Optax integer, unsmoothed": integer_labels,
    "Optax integer, cast to float32": integer_labels_float32,
    "lsce fused": ours("fused"),
    "lsce reference": ours("reference"),
}


def measure() -> list[Cost]:
    """Compile each loss with its gradient for each topology; bfloat16 logits."""
    costs = []
    for topology in TOPOLOGIES:
        core = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
        arguments = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(core))
            for shape, dtype in ((SHAPE, jnp.bfloat16), (SHAPE[:1], jnp.int32), ((), jnp.float32))
        ]
        for name, loss in LOSSES.items():
            compiled = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
            costs.append(
                Cost(
                    topology=topology,
                    name=name,
                    loss_dtype=compiled.out_info[0].dtype.name,
                    temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
                    accessed_bytes=compiled.cost_analysis()["bytes accessed"],
                    minimal_bytes=2 * SHAPE.rows * SHAPE.classes * jnp.dtype(jnp.bfloat16).itemsize,
                )
            )
    return costs
