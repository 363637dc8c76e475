"""What XLA makes of the dense loss for NVIDIA's GPUs, by its compiler: kernels, and how often they move the logits.

Needs JAX's plugin for CUDA, and `lsce_cost.devices.ENVIRONMENTS["gpu"]` set before the import.
"""

from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.engines.timing import Shape
from lsce_cost import hlo
from lsce_cost.compilers import describe_devices
from lsce_cost.devices import CARDS
from lsce_jax import label_smoothed_cross_entropy, label_smoothed_cross_entropy_with_stats

ROWS, CLASSES, DTYPES = 8192, (1000, 32768, 128256), ("bfloat16", "float32")
STATISTICS = "statistics"
# Keyword arguments for a number of classes.
OPTIONS: dict[str, Any] = {
    "plain": lambda _: {},
    "ignored rows": lambda _: {"ignore_index": -100},
    "class mask": lambda classes: {"class_mask": np.arange(classes) % 8 > 0},
    "softcap, z-loss": lambda _: {"softcap": 30.0, "z_loss": 1e-4},
    "max_sup": lambda _: {"convention": "max_sup"},
    STATISTICS: lambda _: {},
}


class Count(NamedTuple):
    """What one loss with its gradient is on a GPU.

    Args:
        card: the GPU.
        name: of the options.
        shape: of the logits.
        dtype: of the logits.
        launches: how many kernels.
        moved: bytes that they read and write, as a multiple of the logits' bytes.
    """

    card: str
    name: str
    shape: Shape
    dtype: str
    launches: int
    moved: float


def measure() -> list[Count]:
    """Count each loss on each GPU."""
    return [count(*each) for each in product(CARDS, OPTIONS, CLASSES, DTYPES)]


def count(card: str, name: str, classes: int, dtype: str) -> Count:
    """Count one of `OPTIONS` on a GPU."""
    function = label_smoothed_cross_entropy_with_stats if name == STATISTICS else label_smoothed_cross_entropy
    loss = partial(function, reduction="mean", **OPTIONS[name](classes))
    step = jax.value_and_grad(
        lambda logits, labels, smoothing: loss(logits, labels, smoothing=smoothing), has_aux=name == STATISTICS
    )
    (core,) = describe_devices(card)
    describe: Any = partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(core))
    logits = describe((ROWS, classes), dtype)
    operands = logits, describe((ROWS,), jnp.int32), describe((), jnp.float32)
    program = hlo.parse(jax.jit(step).lower(*operands).compile().as_text())
    launches = sum(kernel.times for kernel in program.kernels)
    moved = program.hbm_bytes / (logits.size * logits.dtype.itemsize)
    return Count(card, name, Shape(ROWS, classes), dtype, launches, moved)
