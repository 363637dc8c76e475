"""Losses as users bring them, in JAX. `losses_brought_to_torch` has the same ones, written in another way."""

import jax
import jax.numpy as jnp
import optax
from jax import Array


def smoothed(logits: Array, labels: Array, e: float = 0.1) -> Array:
    """Cross-entropy with uniform smoothing, its mean; computed in float32 at least, as torch's kernel does."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), e)
    return optax.softmax_cross_entropy(logits, targets).mean()


def non_target(logits: Array, labels: Array, e: float = 0.1, z: float = 0.0) -> Array:
    """Cross-entropy with the smoothing on the other classes, and a z-loss."""
    num_classes = logits.shape[-1]
    lse = jax.nn.logsumexp(logits, -1, keepdims=True)
    target = jnp.where(labels[:, None] == jnp.arange(num_classes), 1 - e, e / (num_classes - 1))
    return ((target * (lse - logits)).sum(-1) + z * lse[:, 0] ** 2).mean()


def focal(logits: Array, labels: Array, gamma: float = 2.0) -> Array:
    """Focal loss for each row."""
    own = jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]
    return -((1 - jnp.exp(own)) ** gamma) * own


def poly(logits: Array, labels: Array, epsilon: float = 1.0) -> Array:
    """Poly-1 loss, its mean."""
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(nll + epsilon * -jnp.expm1(-nll))


def poly_value_only(logits: Array, labels: Array, epsilon: float = 1.0) -> Array:
    """Poly-1 loss whose second term has no gradient."""
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(nll + epsilon * jax.lax.stop_gradient(-jnp.expm1(-nll)))


def cosine_margin(cosines: Array, labels: Array, margin: float = 0.35, scale: float = 30.0) -> Array:
    """CosFace: a margin on the label's cosine, the mean."""
    rows = jnp.arange(len(labels))
    moved = scale * cosines.at[rows, labels].add(-margin)
    return jnp.mean(jax.nn.logsumexp(moved, -1) - moved[rows, labels])


def hinge(logits: Array, labels: Array, margin: float = 1.0) -> Array:
    """Multi-class hinge loss, its mean."""
    own = jnp.take_along_axis(logits, labels[:, None], -1)
    gaps = jax.nn.relu(margin - own + logits)
    others = jnp.arange(logits.shape[-1]) != labels[:, None]
    return (jnp.where(others, gaps, 0).sum(-1) / logits.shape[-1]).mean()


def multi_label(logits: Array, labels: Array, e: float = 0.1) -> Array:
    """Binary cross-entropy of each class with smoothed labels, an element for each logit."""
    target = labels + e * (0.5 - labels)
    return -target * jax.nn.log_sigmoid(logits) - (1 - target) * jax.nn.log_sigmoid(-logits)


def asymmetric(logits: Array, labels: Array, gamma: float = 4.0, clip: float = 0.05) -> Array:
    """Asymmetric loss of several labels, its sum."""
    positive = jax.nn.sigmoid(logits)
    negative = jnp.minimum(1 - positive + clip, 1)
    is_label = labels == 1
    chosen = jnp.where(is_label, positive, negative)
    exponent = jnp.where(is_label, 1, gamma)
    return -jnp.sum(jnp.log(jnp.maximum(chosen, 1e-8)) * (1 - chosen) ** exponent)


def distillation(logits: Array, labels: Array, temperature: float = 4.0) -> Array:
    """Divergence of the student's distribution from the teacher's, its mean over the rows."""
    teacher, student = (jax.nn.log_softmax(each / temperature) for each in (labels, logits))
    return temperature**2 * (jnp.exp(teacher) * (teacher - student)).sum(-1).mean()
