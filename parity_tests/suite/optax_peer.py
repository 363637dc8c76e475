"""Optax's losses as peers: their argument space as cases, and how to run them and ours."""

import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.typing import NDArray

import lsce_jax
from parity_tests.suite.drop_in import JAX, REDUCTIONS, SMOOTHINGS, PeerSetting, as_result, hard_logits, make_setting
from parity_tests.truth.cases import Case, soft_labels
from parity_tests.truth.comparison import Result

# Each position of the classes in up to three dimensions, and one in four. Optax reduces nothing itself, but its users
# take the sum or the mean. One shape is enough for these: compiling is what takes time.
PLACES = [
    ((5,), 0, ("all",), ("none",)),
    ((4, 6), 0, ("rows",), ("none",)),
    ((6, 5), -1, ("all",), REDUCTIONS),
    ((6, 5), -1, ("rows",), ("none", "mean")),
    ((4, 3, 5), 0, ("classes",), ("none",)),
    ((3, 4, 5), 1, ("all", "rows", "classes"), ("none",)),
    ((2, 3, 5), -1, ("rows",), ("none",)),
    ((2, 3, 4, 2), -2, ("all",), ("none",)),
]
KINDS = ("integer", "one-hot", "soft")
each_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def optax_settings(kind: str) -> tuple[PeerSetting, ...]:
    return tuple(_optax_settings(kind))


def _optax_settings(kind: str) -> Iterator[PeerSetting]:
    for shape, axis, wheres, reductions in PLACES:
        for where, reduction in product(wheres, reductions):
            case = optax_case(kind, shape, axis, where, reduction)
            for smoothing in (0.0,) if kind == "integer" else SMOOTHINGS:
                yield make_setting(replace(case, smoothing=smoothing), JAX, unshifted=kind == "integer")


def optax_case(kind: str, shape: tuple[int, ...], axis: int, where: str, reduction: str) -> Case:
    """Return a case with NaN in the rows or classes that are left out; the labels of such rows are no classes."""
    generator = np.random.default_rng(zlib.crc32(f"{shape} {axis} {where} {kind}".encode()))
    num_classes, batch_shape = shape[axis], tuple(np.delete(shape, axis).tolist())
    num_rows = int(np.prod(batch_shape))
    counted, mask = np.arange(num_rows) % 3 != 1, np.arange(num_classes) % 3 != 1
    labels: NDArray[Any] = generator.choice(np.flatnonzero(mask) if where == "classes" else num_classes, num_rows)
    if kind == "soft":
        labels = soft_labels("float64", generator, (num_rows, num_classes))
    logits = hard_logits(generator, num_rows, num_classes, labels)
    if where == "rows":
        logits[~counted] = np.nan
        labels[~counted] = 99
    if where == "classes":
        logits[:, ~mask] = np.nan

    def placed(rows: NDArray[Any]) -> NDArray[Any]:
        return np.moveaxis(rows.reshape(*batch_shape, num_classes), -1, axis)

    return Case(
        f"{kind}, {shape} axis {axis}, where {where}, {reduction}",
        "float64",
        placed(logits),
        placed(labels) if kind == "soft" else labels.reshape(batch_shape),
        {"reduction": reduction},
        axis=axis,
        where=counted.reshape(batch_shape) if where == "rows" else None,
        class_mask=mask if where == "classes" else None,
        upstream=generator.uniform(-2, 2, batch_shape) if reduction == "none" else np.asarray(-0.75),
    )


def optax_loss(logits: jax.Array, operands: dict[str, jax.Array], *, kind: str, axis: int, reduction: str) -> jax.Array:
    """Return the loss as a user of Optax writes it."""
    labels, rows, classes = operands["labels"], operands.get("where"), None
    if "class_mask" in operands:
        mask = jnp.expand_dims(operands["class_mask"], tuple(range(1, logits.ndim)))
        classes = jnp.broadcast_to(jnp.moveaxis(mask, 0, axis), logits.shape)
    where = rows if classes is None else classes
    if kind == "integer":
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels, axis=axis, where=where)
    else:
        if kind == "one-hot":
            labels = jax.nn.one_hot(labels, logits.shape[axis], dtype=logits.dtype, axis=axis)
        labels = optax.smooth_labels(labels, operands["smoothing"], axis=axis, where=classes)
        losses = optax.softmax_cross_entropy(logits, labels, axis=axis, where=where)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.mean(where=rows)


def our_loss(
    logits: jax.Array, operands: dict[str, jax.Array], *, axis: int, reduction: str, implementation: str | None
) -> jax.Array:
    return lsce_jax.label_smoothed_cross_entropy(
        logits, **operands, axis=axis, reduction=reduction, implementation=implementation
    )


@cache
def gradient_step(loss_fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return a compiled function of gradient and loss; cached, so that each combination of options compiles once."""

    def total(logits: jax.Array, operands: dict[str, jax.Array], upstream: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss = loss_fn(logits, operands, **options)
        return (loss * upstream).sum(), loss

    return jax.jit(jax.grad(total, has_aux=True))


def loose_types() -> AbstractContextManager[Any]:
    """Allow dtype promotion: Optax divides numbers by integer arrays, which the tests' strict settings forbid."""
    return jax.numpy_dtype_promotion("standard")


def run_jax(step: Callable[..., Any], case: Case, types: AbstractContextManager[Any] | None = None) -> Result:
    arrays = {"where": case.where, "class_mask": case.class_mask, "smoothing": np.asarray(case.smoothing)}
    with jax.enable_x64(True), types or nullcontext():
        operands = {name: jnp.asarray(array) for name, array in arrays.items() if array is not None}
        operands["labels"] = jnp.asarray(case.labels)
        gradient, loss = step(jnp.asarray(case.logits), operands, jnp.asarray(case.upstream))
    return as_result(case, np.asarray(loss), np.asarray(gradient))


def run_optax(kind: str, case: Case) -> Result:
    options = {"kind": kind, "axis": case.axis, "reduction": case.options["reduction"]}
    return run_jax(gradient_step(optax_loss, **options), case, loose_types())


def optax_two_axes(logits: jax.Array, operands: dict[str, jax.Array]) -> jax.Array:
    """Return Optax's loss of classes that are spread over two axes."""
    logits = logits.reshape(-1, 2, 3)
    return optax.softmax_cross_entropy_with_integer_labels(logits, operands["labels"], axis=(1, 2))


@cache
def optax_peers() -> tuple[list[PeerSetting], list[Result]]:
    pairs = [(kind, setting) for kind in KINDS for setting in optax_settings(kind)]
    return [setting for _, setting in pairs], [run_optax(kind, setting.case) for kind, setting in pairs]
