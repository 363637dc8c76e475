"""Every transform of JAX around every loss, and transforms around transforms, against a loss in three plain lines.

A composition works if it gives what the plain loss gives under the same composition. So each test is a row of the
table TRANSFORMS x TRANSFORMS, and a single exception or a wrong number fails it.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import count, product
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsce_jax import (
    LossStats,
    kernels,
    label_smoothed_cross_entropy,
    label_smoothed_cross_entropy_with_stats,
    linear_label_smoothed_cross_entropy,
    linear_label_smoothed_cross_entropy_with_stats,
    vocab_parallel_label_smoothed_cross_entropy,
    vocab_parallel_linear_label_smoothed_cross_entropy,
)
from parity_tests.losses.sharded import divided

ROWS, CLASSES = 3, 3
LABELS = np.array([1, 0, 2])
COUNTED = np.array([True, True, False])
MASKS = np.array([[True, True, False], [True, True, True], [False, True, True]])
WEIGHT = np.random.default_rng(0).normal(size=(CLASSES, CLASSES))
POINT = np.random.default_rng(1).normal(size=(ROWS, CLASSES))
SMOOTHING = 0.1
# Float64 rounds at 1e-16; third derivatives of sums over three classes lose a few digits of that.
TOLERANCE = 1e-12
TESTS_DONE = count()

Function = Callable[[jax.Array], jax.Array]


def plain_losses(logits: jax.Array) -> jax.Array:
    target = jnp.where(np.arange(CLASSES) == LABELS[:, None], 1 - SMOOTHING, 0) + SMOOTHING / CLASSES
    return -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)


def plain_capped(logits: jax.Array) -> jax.Array:
    capped = 3 * jnp.tanh(logits / 3)
    losses = plain_losses(capped) + 0.1 * jax.nn.logsumexp(capped, axis=-1) ** 2
    return jnp.where(COUNTED, losses, 0)


def plain_total(hidden: jax.Array) -> jax.Array:
    return jnp.sum(plain_losses(hidden @ WEIGHT))


def plain_of_masks(logits: jax.Array) -> jax.Array:
    """Return smoothed losses, and products of nll, lse and entropy, over the classes of each row's mask."""
    masked = jnp.where(MASKS, logits, -1e9)
    log_p, lse = jax.nn.log_softmax(masked), jax.nn.logsumexp(masked, axis=-1)
    target = (1 - SMOOTHING) * (np.arange(CLASSES) == LABELS[:, None]) + SMOOTHING * MASKS / MASKS.sum(axis=1)[:, None]
    nll = -log_p[np.arange(ROWS), LABELS]
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return -jnp.sum(target * log_p, axis=-1) + nll * entropy + jnp.sin(lse)


def of_masks(loss: Callable[..., tuple[jax.Array, LossStats]], logits: jax.Array) -> jax.Array:
    losses, stats = loss(logits, class_mask=MASKS, differentiable=True)
    return losses + stats.nll * stats.entropy + jnp.sin(stats.lse)


dense = partial(label_smoothed_cross_entropy, labels=LABELS, smoothing=SMOOTHING)
linear = partial(linear_label_smoothed_cross_entropy, weight=WEIGHT, labels=LABELS, smoothing=SMOOTHING, chunk_size=1)
dense_stats = partial(label_smoothed_cross_entropy_with_stats, labels=LABELS, smoothing=SMOOTHING)
linear_stats = partial(
    linear_label_smoothed_cross_entropy_with_stats, weight=WEIGHT, labels=LABELS, smoothing=SMOOTHING, chunk_size=1
)


def by_primitives(loss: Function) -> Function:
    """Return a loss of the primitives that are a kernel on TPUs, although there it takes neither float64 nor so few."""

    def of_logits(logits: jax.Array) -> jax.Array:
        with mock.patch.object(kernels, "why_passed_over", return_value=None):
            return loss(logits)

    return of_logits


# Compiled, since each operation on its own takes long on an axis of devices.
@jax.jit
def one_class_each(logits: jax.Array) -> jax.Array:
    """Return the losses of logits whose classes are divided over an axis of vmap."""
    loss = partial(vocab_parallel_label_smoothed_cross_entropy, axis_name="model", smoothing=SMOOTHING)
    of_class = jax.vmap(lambda column: loss(column[:, None], LABELS), in_axes=1, out_axes=None, axis_name="model")
    losses: jax.Array = of_class(logits)
    return losses


@jax.jit
def on_two_devices(logits: jax.Array) -> jax.Array:
    """Return the capped losses of logits whose classes are divided over devices: the last one has a class too many."""
    options = {"where": COUNTED, "z_loss": 0.1, "softcap": 3.0, "smoothing": SMOOTHING}
    losses: jax.Array = divided(partial(vocab_parallel_label_smoothed_cross_entropy, **options), 2)(logits, LABELS)
    return losses


@jax.jit
def layer_on_two_devices(hidden: jax.Array) -> jax.Array:
    """Return the same of a layer whose classes are divided over devices, in chunks of two rows."""
    options = {"where": COUNTED, "z_loss": 0.1, "softcap": 3.0, "smoothing": SMOOTHING, "chunk_size": 2}
    loss = partial(vocab_parallel_linear_label_smoothed_cross_entropy, **options)
    losses: jax.Array = divided(loss, 2, linear=True)(hidden, WEIGHT, LABELS)
    return losses


LOSSES: dict[str, tuple[Function, Function]] = {
    "fused": (partial(dense, implementation="fused"), plain_losses),
    "fused, capped": (partial(dense, implementation="fused", where=COUNTED, z_loss=0.1, softcap=3.0), plain_capped),
    "primitives of the kernel": (by_primitives(dense), plain_losses),
    "primitives of the kernel, mean, capped": (
        by_primitives(partial(dense, where=COUNTED, z_loss=0.1, softcap=3.0, reduction="mean")),
        lambda logits: jnp.sum(plain_capped(logits)) / 2,
    ),
    "reference": (partial(dense, implementation="reference"), plain_losses),
    "linear, sum": (partial(linear, reduction="sum"), plain_total),
    "linear, mean of some rows": (
        partial(linear, reduction="mean", where=COUNTED),
        lambda hidden: jnp.sum(jnp.where(COUNTED, plain_losses(hidden @ WEIGHT), 0)) / 2,
    ),
    "linear, by hidden and weight": (
        lambda both: linear(both, weight=both, reduction="sum"),
        lambda both: jnp.sum(plain_losses(both @ both)),
    ),
    "masks of rows, statistics": (partial(of_masks, dense_stats), plain_of_masks),
    "masks of rows, statistics, linear": (
        partial(of_masks, linear_stats),
        lambda hidden: plain_of_masks(hidden @ WEIGHT),
    ),
    "vocab-parallel": (one_class_each, plain_losses),
    "vocab-parallel on two devices, capped": (on_two_devices, plain_capped),
    "vocab-parallel, linear, on two devices, capped": (
        layer_on_two_devices,
        lambda hidden: plain_capped(hidden @ WEIGHT),
    ),
    "linear, none": (partial(linear, recompute=True), lambda hidden: plain_losses(hidden @ WEIGHT)),
}


# --- The transforms: each makes a function of an array from a function of an array ---------------------------------


def _waves(shape: tuple[int, ...]) -> jax.Array:
    return jnp.cos(jnp.arange(1, 1 + np.prod(shape, dtype=int), dtype=jnp.float64)).reshape(shape)


def _vjp(function: Function) -> Function:
    def transformed(x: jax.Array) -> jax.Array:
        value, pullback = jax.vjp(function, x)
        gradient: jax.Array = pullback(_waves(value.shape))[0]
        return gradient

    return transformed


def _twice(x: jax.Array) -> jax.Array:
    return jnp.stack([x, x / 2])


def _custom_jvp(function: Function) -> Function:
    of_user = jax.custom_jvp(function)
    of_user.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return of_user


def _scan(function: Function) -> Function:
    def step(carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        value = carry * function(x)
        return carry + jnp.sum(value), value

    return lambda x: jax.lax.scan(step, jnp.ones((), x.dtype), _twice(x))[1]


TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "vjp": _vjp,
    "jvp": lambda function: lambda x: jax.jvp(function, (x,), (_waves(x.shape),))[1],
    "vmap": lambda function: lambda x: jax.vmap(function)(_twice(x)),
    "scan": _scan,
    "checkpoint": jax.checkpoint,
    "jit": jax.jit,
    "map": lambda function: lambda x: jax.lax.map(function, _twice(x)),
    "cond": lambda function: lambda x: jax.lax.cond(jnp.sum(x) > -1e9, function, lambda x: 2 * function(x), x),
    "custom_jvp": _custom_jvp,
    "jacfwd": jax.jacfwd,
    "jacrev": jax.jacrev,
    "hessian": jax.hessian,
}
# The others are made of these.
BASIC = ("vjp", "jvp", "vmap", "scan", "checkpoint")


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    """Drop compiled programs from time to time: each maps memory, and Linux limits the number of mappings."""
    yield
    if next(TESTS_DONE) % 100 == 0:
        jax.clear_caches()


@cache
def _evaluated(function: Function, names: tuple[str, ...], eager: bool) -> np.ndarray:
    """Return the value at POINT of a function that is transformed by the first name first."""
    for name in names:
        function = TRANSFORMS[name](function)
    with jax.enable_x64(True):
        return np.asarray((function if eager else jax.jit(function))(jnp.asarray(POINT)))


def assert_as_plain(loss: str, *names: str) -> None:
    function, plain = LOSSES[loss]
    # One program compiles faster than many operations one by one. These are evaluated so, too.
    actual = _evaluated(function, names, eager=loss in ("fused", "linear, sum"))
    expected = _evaluated(plain, names, eager=False)
    assert actual.shape == expected.shape
    assert np.max(np.abs(actual - expected)) <= TOLERANCE * np.max(np.abs(expected))


# The two that show all of them in `make test`.
OF_EVERY_TRANSFORM = ("fused, capped", "linear, mean of some rows")


@pytest.mark.parametrize(("loss", "name"), [
    pytest.param(loss, name, marks=[] if name in BASIC or loss in OF_EVERY_TRANSFORM else [pytest.mark.slow])
    for loss, name in product(LOSSES, TRANSFORMS)
])  # fmt: skip
def test_transform(loss: str, name: str) -> None:
    assert_as_plain(loss, name)


# The other transforms are made of the basic ones. The first of these losses is one of the others on one device, and the
# second compiles long.
BASIC_PAIRS_ONLY = ("vocab-parallel", "vocab-parallel, linear, on two devices, capped")


def pairs() -> Iterator[Any]:
    for loss, inner, outer in product(LOSSES, TRANSFORMS, TRANSFORMS):
        is_basic = {inner, outer} <= set(BASIC)
        if is_basic or loss not in BASIC_PAIRS_ONLY:
            marks = [pytest.mark.slow]
            if is_basic and loss == "fused" and outer in ("vjp", "jvp"):
                marks = []
            elif not is_basic and loss.startswith("vocab-parallel"):
                marks = [pytest.mark.distributed]
            yield pytest.param(loss, inner, outer, marks=marks)


@pytest.mark.parametrize(("loss", "inner", "outer"), list(pairs()))
def test_transform_of_a_transform(loss: str, inner: str, outer: str) -> None:
    assert_as_plain(loss, inner, outer)


@pytest.mark.slow
@pytest.mark.parametrize("outer", BASIC)
@pytest.mark.parametrize("middle", BASIC)
@pytest.mark.parametrize("inner", BASIC)
@pytest.mark.parametrize("loss", ["fused", "linear, sum", "linear, none"])
def test_three_transforms(loss: str, inner: str, middle: str, outer: str) -> None:
    assert_as_plain(loss, inner, middle, outer)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_wrong_loss_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "wrong", (lambda logits: (1 + 1e-11) * plain_losses(logits), plain_losses))
    with pytest.raises(AssertionError):
        assert_as_plain("wrong", name)
