"""What users of JAX would take in place of our losses, for `benchmarks all`: by session, which is one process.

Other libraries' losses are called as their sources say: Optax 0.2.8, Keras 3.15 and Tokamax 0.0.12. T5X and MaxText are
not on PyPI; their formula is that of their files t5x/losses.py and max_utils.py, written here again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.engines import device_jax
from benchmarks.engines.device_losses import SMOOTHING, Loss, load
from benchmarks.engines.sessions import KERAS_JAX, TOKAMAX
from lsce_jax import label_smoothed_cross_entropy
from parity_tests.losses.adapters import UnavailableError

Z_LOSS: Any = {"convention": "non_target", "z_loss": 1e-4}
# One of these is what `lsce` takes; the pages of the devices have them one by one.
IMPLEMENTATIONS = frozenset({"lsce fused", "lsce pallas"})


def losses(session: str, linear: bool, dtype: str, device: str) -> list[Loss]:
    """Return the losses of a session, the one first that the others are compared with."""
    usual = [loss for loss in device_jax.losses(linear, dtype, device) if loss.name not in IMPLEMENTATIONS]
    few = [loss for loss in usual if loss.name in {device_jax.DENSE_BASELINE, "lsce", "lsce linear"}]
    if session == KERAS_JAX:
        return [*few, Loss("Keras", _keras)]
    if session == TOKAMAX:
        return [*few, *(loss for loss in usual if loss.name.startswith("Tokamax"))]
    usual = [loss for loss in usual if not loss.name.startswith("Tokamax")]
    if linear:
        return usual
    return [
        *usual,
        Loss("T5X, MaxText formula, z-loss", lambda: t5x, options=Z_LOSS),
        Loss("lsce, z-loss", lambda: _ours, ours=True, options=Z_LOSS),
    ]


def _ours(logits: Array, labels: Array, smoothing: Array) -> Array:
    value: Array = label_smoothed_cross_entropy(logits, labels, smoothing=smoothing, reduction="mean", **Z_LOSS)
    return value


def t5x(logits: Array, labels: Array, smoothing: Array) -> Array:
    """Return the mean of T5X's loss of labels, with z-loss; without the entropy of the target, a constant."""
    classes = logits.shape[-1]
    on, off = 1 - smoothing, smoothing / (classes - 1)
    targets = jnp.where(labels[:, None] == jnp.arange(classes), on, off).astype(jnp.float32)
    return _cross_entropy_with_logits(logits, targets, Z_LOSS["z_loss"]).mean()


def _forward(logits: Array, targets: Array, z_loss: float) -> tuple[Array, tuple[Array, Array, Array]]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    exponentials = jnp.exp(shifted)
    total = exponentials.sum(axis=-1, keepdims=True)
    log_softmax = shifted - jnp.log(total)
    lse = jnp.log(total)[..., 0] + logits.max(axis=-1)
    losses = -(targets * log_softmax).sum(axis=-1) + z_loss * jnp.square(lse)
    return losses, (targets, exponentials / total, lse)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cross_entropy_with_logits(logits: Array, targets: Array, z_loss: float) -> Array:
    return _forward(logits, targets, z_loss)[0]


def _backward(z_loss: float, residuals: tuple[Array, Array, Array], upstream: Array) -> tuple[Array, None]:
    targets, softmax, lse = residuals
    slope = (1 + 2 * z_loss * lse)[..., None] * softmax - targets
    return (upstream[..., None] * slope).astype(softmax.dtype), None


_cross_entropy_with_logits.defvjp(_forward, _backward)


def _keras() -> Callable[..., Any]:
    keras = load("keras", "keras")
    if keras.backend.backend() != "jax":
        raise UnavailableError("Keras has another backend: KERAS_BACKEND must be jax when it is imported")
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=SMOOTHING)

    def call(logits: Array, labels: Array, smoothing: Array) -> Any:
        del smoothing  # it must be a number of Python
        return loss(keras.ops.one_hot(labels, logits.shape[-1]), logits)

    return call
