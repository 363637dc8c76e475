"""Loss and gradient in JAX, under jit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import lsce_jax
from benchmarks.engines.timing import Case, Row, Schedule, Shape, make_rows, time_in_turns
from lsce_cost.ways import integer_labels, one_hot

Logits, Labels, Scalar = Float[Array, "N K"], Int[Array, " N"], Float[Array, ""]


def ours(implementation: str, **options: Any) -> Callable[[Logits, Labels | Logits, Scalar], Scalar]:
    """Return the loss of this project, of labels or of soft labels."""

    def loss(logits: Logits, labels: Labels | Logits, smoothing: Scalar) -> Scalar:
        return lsce_jax.label_smoothed_cross_entropy(
            logits, labels, smoothing=smoothing, reduction="mean", implementation=implementation, **options
        )

    return loss


def with_statistics(logits: Logits, labels: Labels, smoothing: Scalar) -> tuple[Scalar, lsce_jax.LossStats]:
    """Return the loss of this project and its statistics."""
    return lsce_jax.label_smoothed_cross_entropy_with_stats(logits, labels, smoothing=smoothing, reduction="mean")


# Each label is by far the largest logit of its row, as at the end of training: losses are small.
TRAINED = "lsce fused, trained logits"

# The first two are what the others are compared with.
LOSSES = {
    "Optax one-hot, smoothed": one_hot,
    "Optax integer, unsmoothed": integer_labels,
    "lsce fused": ours("fused"),
    TRAINED: ours("fused"),
    "lsce fused, with statistics": with_statistics,
    "lsce reference": ours("reference"),
}
FLOORS = {
    "floor: write an array": lambda logits, labels, smoothing: logits + 1,
    "floor: exp, affine, write": lambda logits, labels, smoothing: jnp.exp(logits) * 0.5 - 0.25,
}


def measure(shape: Shape, schedule: Schedule, device: str = "cpu") -> list[Row]:
    """Return time, and temporary memory as the compiler gives it, of each loss with its gradient and of each floor."""
    functions = {
        name: jax.value_and_grad(loss, has_aux=loss is with_statistics) for name, loss in LOSSES.items()
    } | FLOORS
    with jax.default_device(jax.devices(device)[0]):
        keys = jax.random.split(jax.random.key(0))
        logits = jax.random.normal(keys[0], shape.sizes, jnp.float32)
        labels = jax.random.randint(keys[1], shape[:1], 0, shape.classes)
        # The smoothing is an argument, so that no compiler can compute anything beforehand.
        arguments = (logits, labels, jnp.float32(0.1))
        trained = (logits.at[jnp.arange(labels.size), labels].add(20.0), *arguments[1:])
        compiled = {name: jax.jit(function).lower(*arguments).compile() for name, function in functions.items()}
        cases = [
            Case(
                name,
                run=lambda *given, function=function: jax.block_until_ready(function(*given)),
                arguments=lambda name=name: trained if name == TRAINED else arguments,
                is_floor=name in FLOORS,
            )
            for name, function in compiled.items()
        ]
        timed = time_in_turns(cases, schedule)
    memory = [function.memory_analysis().temp_size_in_bytes for function in compiled.values()]
    return make_rows(cases, timed, memory)
