"""Kernels, and what chooses between them and what XLA makes of the fused implementation."""

from lsce_jax.kernels.losses import loss_and_stats as loss_and_stats
from lsce_jax.kernels.losses import takes as takes
