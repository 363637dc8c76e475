"""Losses of JAX that are wrong in one way each, to prove that whatever runs their programs rejects them."""

from typing import Any

import jax

from lsce_jax import label_smoothed_cross_entropy


@jax.custom_jvp
def _doubled(losses: Any) -> Any:
    return losses


_doubled.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))


def wrong_gradient(*operands: Any, **options: Any) -> Any:
    """Return the loss, with twice its gradient."""
    return _doubled(label_smoothed_cross_entropy(*operands, **options))


def wrong_convention(*operands: Any, **options: Any) -> Any:
    """Return the loss in another convention."""
    return label_smoothed_cross_entropy(*operands, **{**options, "convention": "non_target"})


WRONG_LOSSES = (wrong_convention, wrong_gradient)
