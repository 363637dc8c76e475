"""Ports of `torch_original_loss` to JAX: two that look right, and two that are. See docs/parity.md."""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lsce_jax import label_smoothed_cross_entropy


def first_try(logits: Array, labels: Array, smoothing: float = 0.1) -> Array:
    """Return the mean over the batch, with what Optax offers: its smoothing goes to all K classes."""
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, smoothing)).mean()


def ported(logits: Array, labels: Array, smoothing: float = 0.1) -> Array:
    """Return the mean over the batch, by the convention of the original."""
    return label_smoothed_cross_entropy(logits, labels, smoothing=smoothing, convention="non_target", reduction="mean")


def focal_first_try(logits: Array, labels: Array, gamma: float = 2.0) -> Array:
    """Return the focal loss of each row. Its weight is held constant, as if it were the target."""
    at_label = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
    weight = jax.lax.stop_gradient((1 - jnp.exp(at_label)) ** gamma)
    return -weight * at_label


def focal(logits: Array, labels: Array, gamma: float = 2.0) -> Array:
    """Return the focal loss of each row."""
    at_label = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
    return -((1 - jnp.exp(at_label)) ** gamma) * at_label
