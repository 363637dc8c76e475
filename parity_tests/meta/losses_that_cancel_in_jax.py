"""Losses with a cancellation or a steep function in the middle, in JAX, written so that they round little.

See `losses_that_cancel_in_torch`.
"""

import jax
import jax.numpy as jnp
from jax import Array


def _log_own(logits: Array, labels: Array) -> Array:
    return jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], -1)[:, 0]


def _log_others(logits: Array, labels: Array) -> Array:
    """Return the logarithm of the probability of the other classes."""
    is_label = jnp.arange(logits.shape[-1]) == labels[:, None]
    others = jnp.where(is_label, -jnp.inf, logits)
    return jax.nn.logsumexp(others, -1) - jax.nn.logsumexp(logits, -1)


def _root_of_others(logits: Array, labels: Array) -> Array:
    return jnp.exp(jnp.maximum(_log_others(logits, labels), jnp.log(jnp.asarray(1e-12, logits.dtype))) / 2)


def unlikelihood(logits: Array, labels: Array) -> Array:
    """Unlikelihood loss: the logarithm of the probability of the other classes."""
    return -jnp.maximum(_log_others(logits, labels), jnp.log(jnp.asarray(1e-5, logits.dtype))).mean()


def hellinger(logits: Array, labels: Array) -> Array:
    """Square root of the probability of the other classes."""
    return _root_of_others(logits, labels).mean()


def flat_focal(logits: Array, labels: Array) -> Array:
    """Focal loss with gamma 0.5."""
    return (-_root_of_others(logits, labels) * _log_own(logits, labels)).mean()


def asymmetric(logits: Array, labels: Array) -> Array:
    """Asymmetric loss without its shift, by logarithms of sigmoids."""
    least = jnp.log(jnp.asarray(1e-8, logits.dtype))
    positive = labels * jnp.maximum(jax.nn.log_sigmoid(logits), least) * jax.nn.sigmoid(-logits)
    negative = (1 - labels) * jnp.maximum(jax.nn.log_sigmoid(-logits), least) * jax.nn.sigmoid(logits) ** 4
    return -(positive + negative).sum()


def arc_margin(cosines: Array, labels: Array, margin: float = 0.5, scale: float = 64.0) -> Array:
    """ArcFace, by angles."""
    cosines = jnp.clip(cosines, -1 + 1e-7, 1 - 1e-7)
    is_label = jnp.arange(cosines.shape[-1]) == labels[:, None]
    moved = scale * jnp.where(is_label, jnp.cos(jnp.arccos(cosines) + margin), cosines)
    return -_log_own(moved, labels).mean()


def entropy_bonus(logits: Array, labels: Array) -> Array:
    """Cross-entropy less a tenth of the entropy, by logarithms."""
    log_p = jax.nn.log_softmax(logits)
    entropy = -(jnp.exp(log_p) * jnp.logaddexp(log_p, jnp.log(jnp.asarray(1e-12, logits.dtype)))).sum(-1)
    return (-_log_own(logits, labels) - 0.1 * entropy).mean()


def poisson(logits: Array, labels: Array) -> Array:
    """Poisson loss, the exponential by its half."""
    own = jnp.minimum(jnp.take_along_axis(logits, labels[:, None], -1)[:, 0], 50.0)
    return (jnp.exp(own / 2) ** 2 - labels * own).mean()


def gap_of_sums(logits: Array, labels: Array) -> Array:
    """The log-sum-exp of all logits less that of the others: log(1 + p / (1 - p))."""
    return jax.nn.softplus(_log_own(logits, labels) - _log_others(logits, labels)).mean()
