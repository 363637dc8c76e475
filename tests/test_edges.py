"""Edge rules of both packages that no case of the parity tests has: what an oracle has no number for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lsce_jax
import lsce_spec
import lsce_torch

LOGITS, LABELS = np.random.default_rng(3).normal(size=(4, 5)).astype(np.float32), np.array([0, 1, 2, 0])


def from_jax(variable: Any, loss: Callable[..., Any]) -> tuple[Any, Any]:
    """Return sum of the losses and derivative by `variable`."""
    return jax.value_and_grad(lambda v: loss(lsce_jax.label_smoothed_cross_entropy, jnp.asarray, v).sum())(
        jnp.asarray(variable)
    )


def from_torch(variable: Any, loss: Callable[..., Any]) -> tuple[Any, Any]:
    leaf = torch.from_numpy(np.array(variable)).requires_grad_()
    value = loss(lsce_torch.label_smoothed_cross_entropy, torch.from_numpy, leaf).sum()
    value.backward()
    return value.detach().numpy(), leaf.grad.numpy()


each_framework = pytest.mark.parametrize("evaluate", [from_jax, from_torch])


@each_framework
def test_mask_without_classes_is_loud(evaluate: Callable[..., Any]) -> None:
    for labels in (LABELS, np.full((4, 5), 0.2, np.float32)):
        loss, _ = evaluate(
            LOGITS, lambda f, array, z, y=labels: f(z, array(y), class_mask=array(np.zeros(5, bool)), reduction="sum")
        )
        assert np.isnan(loss)


@each_framework
def test_entropy_of_a_prior_with_zeros_has_a_slope(evaluate: Callable[..., Any]) -> None:
    """By hand: q = (1 - e/2, e/2, 0), equal logits; d/de (log 3 - H(q)) = (log q_2 - log q_1) / 2."""
    prior = np.array([0.5, 0.5, 0], np.float32)
    zeros, label = np.zeros((1, 3), np.float32), np.array([0])
    _, slope = evaluate(
        np.float32(0.3),
        lambda f, array, e: f(
            array(zeros), array(label), smoothing=e, prior=array(prior), subtract_entropy=True, reduction="sum"
        ),
    )
    assert abs(slope - (np.log(0.15) - np.log(0.85)) / 2) < 1e-6


@each_framework
def test_rows_that_do_not_count_have_no_slope_by_the_smoothing(evaluate: Callable[..., Any]) -> None:
    where = np.array([True, False, True, True])
    _, slopes = evaluate(
        np.array([0.1, 0.0, 0.2, 0.3], np.float32),
        lambda f, array, e: f(
            array(LOGITS), array(LABELS), smoothing=e, where=array(where), subtract_entropy=True, reduction="sum"
        ),
    )
    assert slopes[1] == 0
    assert np.isfinite(slopes).all()


@each_framework
def test_weights_that_sum_to_zero(evaluate: Callable[..., Any]) -> None:
    """Divided by 0 nothing counts. But a bad label has no weight that could be 0: it stays loud."""
    weights = np.array([0, 0, 0, 1, 1], np.float32)
    for labels, expected in (([0, 2, 1, 2], 0), ([0, 7, 1, 2], np.nan)):
        loss, gradient = evaluate(
            LOGITS,
            lambda f, array, z, y=labels: f(z, array(np.array(y)), class_weight=array(weights), reduction="mean"),
        )
        assert np.array_equal(loss, expected, equal_nan=True)
        assert np.array_equal(gradient[1], np.full(5, expected), equal_nan=True)
        assert np.isfinite(np.asarray(gradient)[[0, 2, 3]]).all()


@pytest.mark.parametrize("implementation", lsce_spec.IMPLEMENTATIONS)
@pytest.mark.parametrize("convention", lsce_spec.CONVENTIONS)
@each_framework
def test_bad_labels_have_no_slope_by_the_smoothing(
    evaluate: Callable[..., Any], convention: str, implementation: str
) -> None:
    labels = np.array([0, 7, 2, 1])
    options = {"convention": convention, "implementation": implementation, "reduction": "none"}
    _, slopes = evaluate(
        np.full(4, 0.3, np.float32), lambda f, array, e: f(array(LOGITS), array(labels), smoothing=e, **options)[1:]
    )
    assert slopes[1] == 0
    assert np.all(slopes[2:] != 0)


@pytest.mark.parametrize("implementation", lsce_spec.IMPLEMENTATIONS)
def test_nll_is_infinite_where_the_label_is_impossible(implementation: str) -> None:
    """Also where the label is no target, and 0 * inf counts as 0 in the loss."""
    logits, weights = np.array([[-np.inf, 0, 1]], np.float32), np.array([0, 1, 1], np.float32)
    options = {"implementation": implementation, "reduction": "sum"}
    _, stats = lsce_jax.label_smoothed_cross_entropy_with_stats(
        logits, np.array([0]), class_weight=jnp.asarray(weights), **options
    )
    assert np.isposinf(stats.nll).all()
    _, stats = lsce_torch.label_smoothed_cross_entropy_with_stats(
        torch.from_numpy(logits), torch.tensor([0]), class_weight=torch.from_numpy(weights), **options
    )
    assert stats.nll.isposinf().all()


@pytest.mark.parametrize("implementation", lsce_spec.IMPLEMENTATIONS)
def test_rows_of_nan_are_not_correct(implementation: str) -> None:
    logits, labels = np.array([[1, np.nan, 0], [0, 1, 0]], np.float32), np.array([1, 1])
    _, stats = lsce_jax.label_smoothed_cross_entropy_with_stats(logits, labels, implementation=implementation)
    assert stats.correct.tolist() == [False, True]
    _, stats = lsce_torch.label_smoothed_cross_entropy_with_stats(
        torch.from_numpy(logits), torch.from_numpy(labels), implementation=implementation
    )
    assert stats.correct.tolist() == [False, True]


def test_numpy_scalars_do_not_widen_the_result() -> None:
    with jax.enable_x64(True):
        options = {"z_loss": np.float64(0.5), "softcap": np.float64(5), "smoothing": np.float64(0.1)}
        assert lsce_jax.label_smoothed_cross_entropy(jnp.asarray(LOGITS), LABELS, **options).dtype == np.float32


def test_convention_of_the_name_uniform_is_not_uniform() -> None:
    own = lsce_jax.Convention("uniform", on=lambda e, k: 1 - e, off=lambda e, k: 0 * e)
    with pytest.raises(ValueError, match="prior replaces the uniform distribution"):
        lsce_jax.label_smoothed_cross_entropy(LOGITS, LABELS, convention=own, prior=np.full(5, 0.2, np.float32))


@pytest.mark.parametrize("implementation", ["fused", "reference"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("smoothing", [1e-46, 1e-40])
def test_smoothing_too_small_for_float32(smoothing: float, per_row: bool, implementation: str) -> None:
    """It counts as 0 at a logit of -inf, whether or not the device flushes subnormal numbers to 0."""
    logits = np.array([[0.0, 1.0, -np.inf], [2.0, 0.0, 1.0]], np.float32)
    labels, options = np.array([0, 1]), {"reduction": "none", "implementation": implementation}
    given: Any = np.full(2, smoothing, np.float32) if per_row else smoothing
    of_torch = torch.from_numpy(given) if per_row else given
    losses = lsce_torch.label_smoothed_cross_entropy
    exact = losses(torch.from_numpy(logits), torch.from_numpy(labels), smoothing=0.0, **options)
    leaf = torch.from_numpy(logits).requires_grad_()
    ours = losses(leaf, torch.from_numpy(labels), smoothing=of_torch, **options)
    (gradient,) = torch.autograd.grad(ours.sum(), leaf)
    # Both round log1p(1.37) and the sums before it.
    tolerance = {"rtol": 4 * 2.0**-23, "atol": 0.0}
    torch.testing.assert_close(ours.detach(), exact, **tolerance)
    assert gradient.isfinite().all()
    of_jax = lsce_jax.label_smoothed_cross_entropy(logits, labels, smoothing=given, **options)
    np.testing.assert_allclose(of_jax, exact.numpy(), **tolerance)


def test_statistics_of_the_reference_with_x64() -> None:
    """`argmax` gives int64 there, and strict promotion compares no int64 with the int32 of the labels."""
    with jax.enable_x64(True):
        _, stats = lsce_jax.label_smoothed_cross_entropy_with_stats(
            jnp.asarray(LOGITS), jnp.asarray(LABELS, jnp.int32), implementation="reference"
        )
    assert np.array_equal(stats.correct, LOGITS.argmax(axis=-1) == LABELS)
