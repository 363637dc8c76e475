"""Losses in JAX, under jit: their arguments, what is timed of them, and what a failure leaves."""

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from benchmarks.engines.losses import SMOOTHING, Loss, Program
from benchmarks.engines.timing import Case as TimedCase
from benchmarks.engines.timing import LinearShape, Shape
from parity_tests.losses.adapters import Adapter, JaxAdapter
from parity_tests.losses.peers import PeerAdapter
from parity_tests.losses.torchax import default_promotion
from parity_tests.truth.cases import Case
from parity_tests.truth.precision import as_dtype

# What a trained model's logits have more at the label.
CONFIDENCE = 20.0


def settings() -> AbstractContextManager[None]:
    """Return what the losses run within: Optax relies on promotion, which a user may have forbidden."""
    return default_promotion()


def begin(device: str) -> None:
    """Forget what was compiled, and give memory back."""
    jax.clear_caches()
    release(device)


def release(device: str) -> None:
    """Give memory back to the device."""
    if device != "cpu":
        gc.collect()


def check_alive(device: str) -> None:
    """Raise if the device takes no more work."""
    with _on(device):
        jax.block_until_ready(jnp.zeros(1) + 1)


def _on(device: str) -> Any:
    return jax.default_device(jax.devices(device)[0])


def adapter(loss: Loss, function: Callable[..., Any], device: str, linear: bool) -> Adapter:
    """Return the function as an adapter of the harness, which calls it in cases of the loss's smoothing."""

    def call(*operands: Any, labels: Any, smoothing: float, **options: Any) -> Any:
        del options  # the function has them
        return function(*operands, labels, jnp.float32(smoothing))

    made = JaxAdapter(call, device=device, name=loss.name, supports=frozenset(), linear=linear)
    if loss.ours:
        made.is_ours = True
        made.arithmetic = made.arithmetic_on(made.device_model)
    return PeerAdapter(made)


def dense_arguments(case: Case, rows: int, device: str) -> tuple[Array, ...]:
    """Return the rows of a case, repeated up to so many, and the smoothing."""
    times = rows // len(case.labels)
    with _on(device):
        logits = jnp.tile(jnp.asarray(as_dtype(case.logits, case.dtype)), (times, 1))
        # The smoothing is an argument, so that no compiler can compute anything beforehand.
        return logits, jnp.tile(jnp.asarray(case.labels, jnp.int32), times), jnp.float32(0.1)


def random_logits(shape: Shape, device: str, trained: bool = False) -> tuple[Array, ...]:
    """Return normally distributed logits, labels and the smoothing; trained: each label is by far the largest logit."""
    with _on(device):
        keys = jax.random.split(jax.random.key(0))
        logits = jax.random.normal(keys[0], shape.sizes, jnp.float32)
        labels = jax.random.randint(keys[1], shape[:1], 0, shape.classes)
        if trained:
            logits = logits.at[jnp.arange(labels.size), labels].add(CONFIDENCE)
        return logits, labels, jnp.float32(SMOOTHING)


def linear_arguments(shape: LinearShape, dtype: str, device: str) -> tuple[Array, ...]:
    """Return hidden, weight, labels and the smoothing; logits of variance 1."""
    with _on(device):
        keys = jax.random.split(jax.random.key(0), 3)
        hidden = jax.random.normal(keys[0], (shape.rows, shape.features), jnp.float32)
        weight = jax.random.normal(keys[1], (shape.features, shape.classes), jnp.float32) / shape.features**0.5
        labels = jax.random.randint(keys[2], (shape.rows,), 0, shape.classes)
        return hidden.astype(dtype), weight.astype(dtype), labels, jnp.float32(SMOOTHING)


def program(
    loss: Loss, function: Callable[..., Any], arguments: Sequence[Any], device: str, linear: bool, alone: bool = False
) -> Program:
    """Return the loss with its gradients, or alone, compiled; its memory is the temporary memory of the program."""
    with _on(device):
        step = function if alone else with_gradients(function, linear, loss.with_statistics)
        start = time.perf_counter()
        compiled = jax.jit(step).lower(*arguments).compile()
        seconds = time.perf_counter() - start
    case = TimedCase(
        loss.name, lambda *given: jax.block_until_ready(compiled(*given)), lambda: tuple(arguments), loss.floor
    )

    def facts() -> dict[str, Any]:
        moved = (compiled.cost_analysis() or {}).get("bytes accessed")
        return {"memory": int(compiled.memory_analysis().temp_size_in_bytes), "compile_s": seconds, "moved": moved}

    return Program(case, facts)


def with_gradients(function: Callable[..., Any], linear: bool, with_statistics: bool = False) -> Callable[..., Any]:
    """Return the function that gives the loss and its gradients: of the logits, or of hidden and weight."""
    return jax.value_and_grad(function, argnums=(0, 1) if linear else 0, has_aux=with_statistics)


def results_of(function: Callable[..., Any], arguments: Sequence[Any], wide: bool) -> list[NDArray[np.float64]]:
    """Return the loss of a layer and its gradients; wide: computed in float64."""
    with jax.enable_x64(wide):
        if wide:
            arguments = [of.astype("float64") if of.dtype == jnp.bfloat16 else of for of in arguments]
        found = jax.jit(with_gradients(function, linear=True))(*arguments)
        return [np.asarray(each, np.float64) for each in jax.tree.leaves(found)]


def spread(result: Any, repeated: int) -> tuple[float, list[NDArray[np.float64]]]:
    """Return the loss, and the least and the largest gradient of each of the rows that are repeated."""
    loss, gradient = result
    rows = gradient.reshape(-1, repeated, gradient.shape[-1])
    return float(loss), [np.asarray(of, np.float64) for of in (rows.min(0), rows.max(0))]


def is_finite(result: Any) -> bool:
    """Return whether loss and gradients are finite numbers."""
    return all(bool(jnp.isfinite(part).all()) for part in jax.tree.leaves(result))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether that is what an exception says."""
    return "RESOURCE_EXHAUSTED" in str(error)
