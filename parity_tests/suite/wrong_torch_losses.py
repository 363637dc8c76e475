"""Losses of torch that are wrong in one way each, to prove that whatever runs their programs rejects them."""

from typing import Any

import torch

from lsce_torch import label_smoothed_cross_entropy, linear_label_smoothed_cross_entropy


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: torch.Tensor) -> torch.Tensor:
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        return 2 * upstream


def wrong_gradient(*operands: Any, **options: Any) -> Any:
    """Return the loss, with twice its gradient."""
    return _Doubled.apply(label_smoothed_cross_entropy(*operands, **options))


def wrong_convention(*operands: Any, **options: Any) -> Any:
    """Return the loss in another convention."""
    return label_smoothed_cross_entropy(*operands, **{**options, "convention": "non_target"})


def wrong_linear_gradient(*operands: Any, **options: Any) -> Any:
    """Return the linear loss, with twice its gradient."""
    return _Doubled.apply(linear_label_smoothed_cross_entropy(*operands, **options))


def wrong_linear_convention(*operands: Any, **options: Any) -> Any:
    """Return the linear loss in another convention."""
    return linear_label_smoothed_cross_entropy(*operands, **{**options, "convention": "non_target"})


WRONG_LOSSES = ("wrong_convention", "wrong_gradient")
WRONG_LINEAR_LOSSES = ("wrong_linear_convention", "wrong_linear_gradient")
