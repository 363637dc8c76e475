"""The last linear layer, loss and gradients in JAX, under jit."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import lsce_jax
from benchmarks.engines import dense_jax
from benchmarks.engines.timing import Case, Clock, LinearShape, Row, Schedule, make_rows, time_in_turns

Hidden, Weight = Float[Array, "N D"], Float[Array, "D K"]
Labels, Scalar = Int[Array, " N"], Float[Array, ""]
LossFunction = Callable[[Hidden, Weight, Labels, Scalar], Scalar]


def on_logits(loss: Callable[[dense_jax.Logits, Labels, Scalar], Scalar]) -> LossFunction:
    """Return a loss that is given all logits."""
    return lambda hidden, weight, labels, smoothing: loss(hidden @ weight, labels, smoothing)


def lse_form(logits: dense_jax.Logits, labels: Labels, smoothing: Scalar) -> Scalar:
    """The smoothed loss as one would write it for many classes: no array of targets; of narrow logits in float32."""
    logits = logits.astype(jnp.float32)
    at_label = jnp.take_along_axis(logits, labels[:, None], axis=-1).squeeze(-1)
    lse = jax.nn.logsumexp(logits, axis=-1)
    return (lse - (1 - smoothing) * at_label - smoothing * logits.mean(axis=-1)).mean()


def linear(**options: Any) -> LossFunction:
    """Return the loss of this project, whose logits are never whole in memory."""

    def loss(hidden: Hidden, weight: Weight, labels: Labels, smoothing: Scalar) -> Scalar:
        return lsce_jax.linear_label_smoothed_cross_entropy(
            hidden, weight, labels, smoothing=smoothing, **{"reduction": "mean", **options}
        )

    return loss


def products(hidden: Hidden, weight: Weight, labels: Labels, smoothing: Scalar) -> tuple[Hidden, Weight]:
    """Only the products: with the logits in the place of their gradient."""
    del labels, smoothing
    logits = hidden @ weight
    return logits @ weight.T, hidden.T @ logits


# The second is what the others are compared with.
LOSSES = {
    "Optax one-hot, smoothed": on_logits(dense_jax.one_hot),
    "lse form": on_logits(lse_form),
    "lsce fused": on_logits(dense_jax.ours("fused")),
    "lsce linear": linear(),
    "lsce linear, recompute": linear(recompute=True),
    "lsce linear, none then mean": lambda *given: linear(reduction="none")(*given).mean(),
}
FLOORS = {"floor: three matrix products": products}


def measure(shape: LinearShape, schedule: Schedule, device: str = "cpu") -> list[Row]:
    """Return time, and temporary memory as the compiler gives it, of each loss with its gradients and of the floor."""
    arguments = make_arguments(shape, device)
    functions = {name: with_gradients(loss) for name, loss in LOSSES.items()} | FLOORS
    return measure_cases([(name, function, arguments) for name, function in functions.items()], schedule)


def measure_scaling(shapes: Sequence[LinearShape], schedule: Schedule, device: str = "cpu") -> list[Row]:
    """Return the same of the linear loss, for each shape."""
    function = with_gradients(LOSSES["lsce linear"])
    return measure_cases([(str(shape.rows), function, make_arguments(shape, device)) for shape in shapes], schedule)


def make_arguments(
    shape: LinearShape, device: str = "cpu", dtype: str = "float32"
) -> tuple[Hidden, Weight, Labels, Scalar]:
    """Return what a loss is given; logits of variance 1."""
    with jax.default_device(jax.devices(device)[0]):
        keys = jax.random.split(jax.random.key(0), 3)
        hidden = jax.random.normal(keys[0], (shape.rows, shape.features), jnp.float32)
        weight = jax.random.normal(keys[1], (shape.features, shape.classes), jnp.float32) / shape.features**0.5
        labels = jax.random.randint(keys[2], (shape.rows,), 0, shape.classes)
        # The smoothing is an argument, so that no compiler can compute anything beforehand.
        return hidden.astype(dtype), weight.astype(dtype), labels, jnp.float32(0.1)


def with_gradients(loss: LossFunction) -> Callable[..., Any]:
    """Return the function that gives the loss and its gradients by hidden and weight."""
    return jax.value_and_grad(loss, argnums=(0, 1))


def measure_cases(
    named: Sequence[tuple[str, Callable[..., Any], tuple[Array, ...]]], schedule: Schedule, clock: Clock | None = None
) -> list[Row]:
    """Return time, and temporary memory as the compiler gives it, of functions with names and arguments."""
    cases, memory = [], []
    for name, function, arguments in named:
        compiled = jax.jit(function).lower(*arguments).compile()
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
        cases.append(
            Case(
                name,
                run=lambda *given, compiled=compiled: jax.block_until_ready(compiled(*given)),
                arguments=lambda arguments=arguments: arguments,
                is_floor=name in FLOORS,
                clock=clock,
            )
        )
    timed = time_in_turns(cases, schedule)
    return make_rows(cases, timed, memory)
