"""One network in Flax NNX and in torch, and a port of it with a mistake, for `lsce-parity layers`.

    lsce-parity layers jax:examples.ported_block:in_flax torch:examples.ported_block:in_torch

Each of the functions that are named there returns the model, an example batch, and a loss of the model's output. The
harness copies the weights from the first to the second. Write the same for a model of your own: docs/models.md.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx

from lsce_jax import label_smoothed_cross_entropy
from lsce_torch import label_smoothed_cross_entropy as torch_label_smoothed_cross_entropy

WORDS, LENGTH, WIDTH, HEADS = 50, 6, 16, 4


def batch() -> tuple[Any, Any]:
    """Return words [4, LENGTH], and the words that follow."""
    words = np.random.default_rng(0).integers(0, WORDS, size=(4, LENGTH + 1))
    return words[:, :-1], words[:, 1:]


# --- Flax -------------------------------------------------------------------------------------------------------------


class JaxAttention(nnx.Module):
    """Attention to earlier words."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Make four linear layers."""
        self.query, self.key, self.value, self.out = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array of the same shape, [B, T, D]."""
        query, key, value = (layer(x).reshape(*x.shape[:2], HEADS, -1) for layer in (self.query, self.key, self.value))
        return self.out(jax.nn.dot_product_attention(query, key, value, is_causal=True).reshape(x.shape))


class JaxModel(nnx.Module):
    """A transformer of one block."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Make the layers."""
        self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.norm_1, self.norm_2 = (nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs) for _ in range(2))
        self.attention = JaxAttention(rngs)
        self.wide, self.narrow = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, WORDS, rngs=rngs)

    def __call__(self, words: jax.Array) -> jax.Array:
        """Return logits, [B, T, WORDS]."""
        x = self.embed(words)
        x = x + self.attention(self.norm_1(x))
        x = x + self.narrow(jax.nn.gelu(self.wide(self.norm_2(x)), approximate=False))
        return self.head(x)


def in_flax() -> tuple[Any, Any, Any]:
    """Return the model in Flax, its batch, and its loss."""
    words, following = batch()

    def loss(logits: jax.Array) -> jax.Array:
        return jnp.mean(label_smoothed_cross_entropy(logits, jnp.asarray(following), smoothing=0.1))

    return JaxModel(nnx.Rngs(0)), jnp.asarray(words), loss


# --- torch ------------------------------------------------------------------------------------------------------------


class TorchAttention(torch.nn.Module):
    """Attention to earlier words."""

    def __init__(self) -> None:
        """Make four linear layers."""
        super().__init__()
        self.query, self.key, self.value, self.out = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the same shape, [B, T, D]."""
        query, key, value = (
            layer(x).view(*x.shape[:2], HEADS, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


class TorchModel(torch.nn.Module):
    """A transformer of one block."""

    def __init__(self, eps: float = 1e-5, approximate: str = "none") -> None:
        """Make the layers."""
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, WIDTH)
        self.norm1, self.norm2 = torch.nn.LayerNorm(WIDTH, eps=eps), torch.nn.LayerNorm(WIDTH, eps=eps)
        self.attention = TorchAttention()
        self.wide, self.narrow = torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.Linear(2 * WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, WORDS)
        self.approximate = approximate

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Return logits, [B, T, WORDS]."""
        x = self.embed(words)
        x = x + self.attention(self.norm1(x))
        x = x + self.narrow(F.gelu(self.wide(self.norm2(x)), approximate=self.approximate))
        return self.head(x)


def in_torch(**options: Any) -> tuple[Any, Any, Any]:
    """Return the model in torch, the same batch, and the same loss."""
    words, following = batch()

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return torch_label_smoothed_cross_entropy(logits, torch.tensor(following), smoothing=0.1)

    return TorchModel(**options), torch.tensor(words), loss
