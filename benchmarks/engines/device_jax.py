"""The losses that `benchmarks device` checks and times in JAX, under jit: ours, Optax's, and that of Tokamax.

Tokamax's loss is called as the source of its version 0.0.12 says.
"""

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

from benchmarks.engines import dense_jax, linear_jax
from benchmarks.engines.device_losses import Loss, Program, load
from benchmarks.engines.timing import Case as TimedCase
from benchmarks.engines.timing import LinearShape
from lsce_cost.ways import integer_labels, integer_labels_float32, one_hot
from parity_tests.losses.adapters import Adapter, JaxAdapter
from parity_tests.losses.peers import PeerAdapter
from parity_tests.losses.torchax import default_promotion
from parity_tests.truth.cases import Case
from parity_tests.truth.precision import as_dtype

DENSE_BASELINE = "Optax one-hot"
LINEAR_BASELINE = "Optax one-hot"


def losses(linear: bool, dtype: str, device: str) -> list[Loss]:
    """Return the losses, the one first that the others are compared with."""
    return _linear(device) if linear else _dense(dtype, device)


def _dense(dtype: str, device: str) -> list[Loss]:
    found = [Loss(DENSE_BASELINE, lambda: one_hot), Loss("Optax integer*", lambda: integer_labels, 0.0)]
    if dtype != "float32":
        found.append(Loss("Optax integer, cast*", lambda: integer_labels_float32, 0.0))
    found += [_ours("lsce", None), _ours("lsce fused", "fused")]
    return found if device == "cuda" else [*found, _ours("lsce pallas", "pallas")]


def _ours(name: str, implementation: str | None) -> Loss:
    return Loss(name, lambda: dense_jax.ours(implementation), ours=True)


def _linear(device: str) -> list[Loss]:
    found = [
        Loss(LINEAR_BASELINE, lambda: linear_jax.on_logits(one_hot)),
        Loss("Optax integer*", lambda: linear_jax.on_logits(integer_labels), 0.0),
        Loss("lse form", lambda: linear_jax.on_logits(linear_jax.lse_form)),
        Loss("lsce, on all logits", lambda: linear_jax.on_logits(dense_jax.ours(None)), ours=True),
        Loss("lsce linear", linear_jax.linear, ours=True),
        Loss("lsce linear, recompute", lambda: linear_jax.linear(recompute=True), ours=True),
        Loss("Tokamax XLA*", lambda: _tokamax("xla"), 0.0),
    ]
    # Without an implementation, Tokamax takes "xla" everywhere.
    return found if device == "cuda" else [*found, Loss("Tokamax*", lambda: _tokamax("mosaic_tpu"), 0.0)]


def _tokamax(implementation: str) -> Callable[..., Array]:
    loss = load("tokamax", "tokamax").linear_softmax_cross_entropy_loss

    def call(hidden: Array, weight: Array, labels: Array, smoothing: Array) -> Array:
        del smoothing
        value: Array = loss(hidden, labels, weight, reduction="mean", implementation=implementation)
        return value

    return call


# --- How they are called --------------------------------------------------------------------------------------------


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


def linear_arguments(shape: LinearShape, dtype: str, device: str) -> tuple[Array, ...]:
    """Return hidden, weight, labels and the smoothing."""
    return linear_jax.make_arguments(shape, device, dtype)


def program(
    loss: Loss, function: Callable[..., Any], arguments: Sequence[Any], device: str, linear: bool, alone: bool = False
) -> Program:
    """Return the loss with its gradients, or alone, compiled; its memory is the temporary memory of the program."""
    with _on(device):
        step = function if alone else jax.value_and_grad(function, argnums=(0, 1) if linear else 0)
        start = time.perf_counter()
        compiled = jax.jit(step).lower(*arguments).compile()
        seconds = time.perf_counter() - start
    case = TimedCase(loss.name, lambda *given: jax.block_until_ready(compiled(*given)), lambda: tuple(arguments))

    def facts() -> dict[str, Any]:
        moved = (compiled.cost_analysis() or {}).get("bytes accessed")
        return {"memory": int(compiled.memory_analysis().temp_size_in_bytes), "compile_s": seconds, "moved": moved}

    return Program(case, facts)


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
