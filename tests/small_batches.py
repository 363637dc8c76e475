"""Small batches in float64, every option, and how both packages are called: losses against their reference."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import lsce_jax
import lsce_torch
from lsce_spec import Convention

EPSILON = 2.0**-52

# --- Logits -----------------------------------------------------------------------------------------------------------

LOGITS = np.random.default_rng(0).normal(size=(6, 5))
LABELS = np.array([0, 4, 2, 2, 1, 3])
SOFT = np.random.default_rng(1).dirichlet(np.ones(5), size=6)
WEIGHT = np.linspace(0.5, 2, 5)
MASK = np.arange(5) != 1
PRIOR = np.array([0.1, 0.2, 0.3, 0.2, 0.2])

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unsmoothed": {"smoothing": 0.0},
    "capped": {"convention": "non_target", "z_loss": 0.01, "softcap": 3.0},
    "where": {"convention": "clamp", "where": np.arange(6) != 3, "reduction": "none"},
    "weighted": {"class_weight": WEIGHT, "class_mask": MASK, "ignore_index": 1, "reduction": "sum"},
    "weighted_non_target": {"class_weight": WEIGHT, "convention": "non_target", "smoothing": 1.0, "reduction": "mean"},
    "zero_weight": {"class_weight": np.array([0.0, 1, 0, 2, 1])},
    "prior": {"prior": PRIOR, "subtract_entropy": True},
    "prior_weighted": {"prior": PRIOR, "class_weight": WEIGHT, "smoothing": np.linspace(0.01, 0.99, 6)},
    "entropy": {"subtract_entropy": True, "class_mask": MASK, "ignore_index": 1},
    "per_row": {
        "smoothing": np.linspace(0, 1, 6), "convention": "non_target", "softcap": 2.0, "class_mask": MASK,
        "ignore_index": 1,
    },
    "max_sup": {"convention": "max_sup", "class_weight": WEIGHT, "softcap": 3.0, "z_loss": 0.1},
    "not_summing_to_one": {"convention": Convention("leaky", on=lambda e, k: 1 - e, off=lambda e, k: e / k)},
}  # fmt: skip
SOFT_OPTIONS: dict[str, dict[str, Any]] = {
    "soft": {},
    "soft_weighted": {"class_weight": WEIGHT, "class_mask": MASK, "where": np.arange(6) != 3},
    "soft_clamp": {"convention": "clamp", "subtract_entropy": True, "z_loss": 0.01, "softcap": 2.0},
    "soft_prior": {"prior": PRIOR, "smoothing": np.linspace(0, 1, 6)},
    "soft_max_sup": {"convention": "max_sup"},
}
CALLS = {name: (LABELS, options) for name, options in OPTIONS.items()}
CALLS |= {name: (SOFT, options) for name, options in SOFT_OPTIONS.items()}

# --- A layer ----------------------------------------------------------------------------------------------------------

ROWS, FEATURES, CLASSES = 7, 3, 5
_GENERATOR = np.random.default_rng(0)
HIDDEN, KERNEL, BIAS = (_GENERATOR.normal(size=shape) for shape in ((ROWS, FEATURES), (FEATURES, CLASSES), (CLASSES,)))
LAYER_LABELS = np.array([0, 4, 2, 2, 1, 3, 1])
COUNTED = np.arange(ROWS) % 3 != 0

LAYER_OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {"reduction": "mean"},
    "none": {"reduction": "none"},
    "recompute": {"reduction": "sum", "recompute": True},
    "where": {"reduction": "mean", "where": COUNTED},
    "where_none": {"reduction": "none", "where": COUNTED, "softcap": 3.0},
    "everything": {
        "reduction": "mean", "class_weight": WEIGHT, "class_mask": np.arange(CLASSES) != 0, "ignore_index": 0,
        "z_loss": 0.01, "softcap": 2.0, "convention": "non_target", "smoothing": np.linspace(0.1, 0.9, ROWS),
    },
    "max_sup": {"reduction": "sum", "convention": "max_sup", "class_weight": WEIGHT},
    "prior": {"reduction": "mean", "prior": np.full(CLASSES, 0.2), "subtract_entropy": True, "denominator": 3.0},
}  # fmt: skip


def without_chunks(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that the reference takes."""
    return {name: value for name, value in options.items() if name != "recompute"}


# --- Both packages ----------------------------------------------------------------------------------------------------


def to_torch(value: Any) -> Any:
    """Return NumPy's arrays as tensors, also in a dictionary, and anything else as it is."""
    if isinstance(value, dict):
        return {name: to_torch(each) for name, each in value.items()}
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


@dataclass(frozen=True)
class Framework:
    """A package, and how its losses are differentiated. Operands and results are NumPy's arrays."""

    name: str
    package: Any

    def dense(self, implementation: str = "fused") -> Callable[..., Any]:
        """Return the loss of logits."""
        return partial(self.package.label_smoothed_cross_entropy, implementation=implementation)

    def linear(self, **options: Any) -> Callable[..., Any]:
        """Return the loss of a layer, whose weight is [D, K] in both packages."""
        loss = partial(self.package.linear_label_smoothed_cross_entropy, **options)
        if self.name == "jax":
            return lambda hidden, weight, bias, labels, **given: loss(hidden, weight, labels, bias=bias, **given)
        return lambda hidden, weight, bias, labels, **given: loss(hidden, weight.T, labels, bias=bias, **given)

    def array(self, value: Any) -> Any:
        """Return the framework's array."""
        return to_torch(value) if self.name == "torch" else value

    def outcomes(self, loss: Callable[..., Any], batches: list[tuple[Any, ...]], **options: Any) -> list[Any]:
        """Return the losses of each batch, and the gradients of a sum in which each loss has another factor.

        The last operand of a batch, the labels, is a constant. JAX compiles one program for all of them.
        """
        run = self._in_jax if self.name == "jax" else self._in_torch
        return [tuple(map(np.asarray, found)) for found in run(loss, batches, options)]

    def outcome(self, loss: Callable[..., Any], *operands: Any, **options: Any) -> tuple[Any, ...]:
        """Return the losses of one batch and their gradients."""
        (found,) = self.outcomes(loss, [operands], **options)
        return found

    @staticmethod
    def _in_jax(loss: Callable[..., Any], batches: list[tuple[Any, ...]], options: dict[str, Any]) -> list[Any]:
        def total(operands: Any, labels: Any) -> Any:
            losses = loss(*operands, labels, **options)
            factors = jnp.linspace(1, 2, losses.size, dtype=losses.dtype).reshape(losses.shape)
            return (losses * factors).sum(), losses

        step = jax.jit(jax.value_and_grad(total, has_aux=True))
        results = [step(tuple(map(jnp.asarray, operands)), labels) for *operands, labels in batches]
        return [(losses, *gradients) for (_, losses), gradients in results]

    @staticmethod
    def _in_torch(loss: Callable[..., Any], batches: list[tuple[Any, ...]], options: dict[str, Any]) -> list[Any]:
        results = []
        for *operands, labels in batches:
            leaves = [to_torch(each).clone().requires_grad_() for each in operands]
            losses = loss(*leaves, to_torch(labels), **to_torch(options))
            factors = torch.linspace(1, 2, losses.numel(), dtype=losses.dtype).view(losses.shape)
            results.append((losses.detach(), *torch.autograd.grad((losses * factors).sum(), leaves)))
        return results


FRAMEWORKS = {"jax": Framework("jax", lsce_jax), "torch": Framework("torch", lsce_torch)}


def assert_close(ours: Any, theirs: Any, epsilon: float = EPSILON) -> None:
    """Equal but for a few roundings of sums of some dozen terms, each at most as large as the largest value."""
    for one, other in zip(ours, theirs, strict=True):
        left, right = (each.detach() if isinstance(each, torch.Tensor) else np.asarray(each) for each in (one, other))
        assert left.shape == right.shape
        assert left.dtype == right.dtype
        left, right = (np.asarray(each.double() if isinstance(each, torch.Tensor) else each) for each in (left, right))
        scale = 1 + np.max(np.abs(right), where=np.isfinite(right), initial=0)
        with np.errstate(invalid="ignore"):
            close = np.abs(left - right) <= 32 * epsilon * scale
        assert np.all(close | (left == right) | (np.isnan(left) & np.isnan(right)))
