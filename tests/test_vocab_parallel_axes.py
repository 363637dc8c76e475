"""The vocab-parallel losses without devices: messages, and axes of vmap. parity_tests/suite has those on devices."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsce_jax
from lsce_jax import label_smoothed_cross_entropy as dense
from lsce_jax import vocab_parallel_label_smoothed_cross_entropy as sharded
from lsce_spec import OF_SHARD

AXIS = "model"
LOGITS = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)
LABELS = np.array([0, 3, 11, 9, 7])
# Float64 rounds at 1e-16, and these sums have 12 terms. The computed bounds are in parity_tests/suite.
TOLERANCE = 1e-12


def assert_close(actual, expected) -> None:
    assert actual.dtype == expected.dtype == np.float64
    assert np.max(np.abs(actual - expected)) <= TOLERANCE * np.max(np.abs(expected))


@pytest.fixture
def logits():
    """Return logits in float64."""
    with jax.enable_x64(True):
        yield jnp.asarray(LOGITS, np.float64)


def on_axis(loss, size, **options):
    """Return a loss of all logits, divided over an axis of vmap."""

    @jax.jit
    def of_all(logits):
        slices = jnp.moveaxis(logits.reshape(*logits.shape[:-1], size, -1), -2, 0)
        return jax.vmap(partial(loss, labels=LABELS, axis_name=AXIS, **options), axis_name=AXIS)(slices)

    return of_all


def test_outside_of_an_axis() -> None:
    for name in ("rows", ("a", "b"), 3, None):
        with pytest.raises(ValueError, match=re.escape(f"axis_name={name!r} names no axis here. Call the loss inside")):
            sharded(LOGITS, LABELS, axis_name=name)


def test_the_axis_has_no_default() -> None:
    with pytest.raises(TypeError, match="axis_name"):
        sharded(LOGITS, LABELS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_weight": np.ones(12, np.float32)}, "class_weight must hold one value per class: expected shape [4]"),
        ({"prior": np.ones(12, np.float32)}, "prior must hold one value per class: expected shape [4]"),
        ({"class_mask": np.ones(12, bool)}, "class_mask must have shape [4]"),
        ({"labels": np.ones((5, 12), np.float32)}, "expected [5, 4], got [5, 12]"),
    ],
)
def test_whole_vectors_are_named(options, message) -> None:
    given = {"labels": LABELS, **options}
    loss = jax.vmap(lambda logits: sharded(logits, axis_name=AXIS, **given), axis_name=AXIS)
    with pytest.raises(ValueError, match=re.escape(message)) as problem:
        loss(LOGITS.reshape(5, 3, 4).swapaxes(0, 1))
    assert str(problem.value).endswith(OF_SHARD)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sharded(LOGITS.astype(int), LABELS, axis_name=AXIS), "logits must be floating point"),
        (lambda: sharded(LOGITS, LABELS, axis_name=AXIS, axis=2), "axis must be an integer in [-2, 1]"),
        (lambda: sharded(LOGITS, LABELS, axis_name=AXIS, reduction="avg"), "Did you mean 'mean'?"),
        (lambda: sharded(LOGITS, LABELS, group=None), "Did you mean 'axis_name'?"),
        (lambda: sharded(logits=LOGITS, labels=LABELS, axis_name=AXIS), "Did you mean 'local_logits'?"),
        (lambda: dense(LOGITS, LABELS, axis_name=AXIS), "whose names begin with vocab_parallel_."),
    ],
)
def test_other_mistakes(call, message) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        call()


@pytest.mark.parametrize("size", [1, 3, 12])
def test_an_axis_of_vmap(size, logits) -> None:
    """Every entry of the axis has the loss, and the derivative of one of them is that of the loss."""
    losses, expected = on_axis(sharded, size)(logits), dense(logits, LABELS)
    assert losses.shape == (size, 5)
    assert_close(losses, jnp.broadcast_to(expected, losses.shape))
    gradient = jax.grad(lambda logits: on_axis(sharded, size)(logits)[size // 2].sum())(logits)
    assert_close(gradient, jax.grad(lambda z: dense(z, LABELS).sum())(logits))


def test_statistics_have_derivatives_on_request(logits) -> None:
    def objective(loss, logits):
        _, stats = loss(logits)
        return jnp.sum(stats.nll * stats.entropy + jnp.sin(stats.lse))

    with_stats = lsce_jax.vocab_parallel_label_smoothed_cross_entropy_with_stats
    for differentiable in (False, True):
        of_axis = on_axis(with_stats, 3, differentiable=differentiable)
        of_one = partial(lsce_jax.label_smoothed_cross_entropy_with_stats, labels=LABELS, differentiable=differentiable)
        first = jax.grad(lambda z, of_axis=of_axis: objective(lambda z: jax.tree.map(lambda x: x[0], of_axis(z)), z))
        expected = jax.grad(partial(objective, of_one))(logits)
        assert np.any(expected) == differentiable
        assert_close(first(logits), expected)
