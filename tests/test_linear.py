"""The linear loss of both packages: against the reference, or in exact equality. The parity tests have the truth."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tests.small_batches import (
    BIAS,
    COUNTED,
    EPSILON,
    FEATURES,
    FRAMEWORKS,
    HIDDEN,
    KERNEL,
    LAYER_LABELS,
    LAYER_OPTIONS,
    ROWS,
    WEIGHT,
    Framework,
    assert_close,
    without_chunks,
)

LAYER = HIDDEN, KERNEL, BIAS, LAYER_LABELS
RANDOM = np.random.default_rng(5)


@pytest.fixture(params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> Iterator[Framework]:
    with jax.enable_x64(True):
        yield FRAMEWORKS[request.param]


def reference_of(framework: Framework) -> Any:
    return framework.linear(implementation="reference")


@pytest.mark.parametrize("options", LAYER_OPTIONS.values(), ids=LAYER_OPTIONS)
def test_equals_the_reference(framework: Framework, options: dict[str, Any]) -> None:
    theirs = framework.outcome(reference_of(framework), *LAYER, **without_chunks(options))
    for chunk_size in (3, 100) if framework.name == "jax" else (1, 3, 7, 100, None):
        assert_close(framework.outcome(framework.linear(chunk_size=chunk_size), *LAYER, **options), theirs)


def test_gradient_filter(framework: Framework) -> None:
    """The error is bounded by the threshold; a threshold below every gradient gives the exact gradients."""
    loss, layer = framework.linear(chunk_size=3), (4 * HIDDEN, *LAYER[1:])
    of_torch = () if framework.name == "jax" else ("mean", "max_sup", "prior")
    for name in ("where", "everything", *of_torch):
        options = LAYER_OPTIONS[name]
        exact = framework.outcome(loss, *layer, **options)
        assert_close(framework.outcome(loss, *layer, gradient_filter=1e-300, **options), exact)
    threshold = 0.05
    value, *gradients = framework.outcome(loss, *layer, reduction="sum")
    same_value, *filtered = framework.outcome(loss, *layer, reduction="sum", gradient_filter=threshold)
    assert value == same_value
    bounds = (threshold * np.abs(KERNEL).sum(1), threshold * np.abs(layer[0]).sum(0)[:, None], 0.0)
    for exact, approximate, bound in zip(gradients, filtered, bounds, strict=True):
        assert np.all(np.abs(exact - approximate) <= bound + 32 * EPSILON)
    assert np.any(np.abs(gradients[1] - filtered[1]) > 32 * EPSILON)


@pytest.mark.parametrize("options", [{"reduction": "mean"}, {"reduction": "mean", "recompute": True},
                                     {"reduction": "none"}], ids=str)  # fmt: skip
def test_ignored_rows_are_free_of_nan(framework: Framework, options: dict[str, Any]) -> None:
    """Rows that do not count may hold NaN, in chunks with and without rows that count."""
    loss, spoilt = framework.linear(chunk_size=3), np.where(COUNTED[:, None], HIDDEN, np.nan)
    ours = framework.outcome(loss, spoilt, *LAYER[1:], where=COUNTED, **options)
    theirs = framework.outcome(reference_of(framework), *LAYER, where=COUNTED, **without_chunks(options))
    assert_close(ours, theirs)
    assert np.all(ours[1][~COUNTED] == 0)


def test_ignored_rows_in_the_reference_and_no_row_that_counts(framework: Framework) -> None:
    spoilt = np.where(COUNTED[:, None], HIDDEN, np.nan)
    _, _, of_weight, _ = framework.outcome(reference_of(framework), spoilt, *LAYER[1:], where=COUNTED)
    assert np.isfinite(of_weight).all()
    for options in ({}, {"recompute": True}, {"reduction": "none"}) if framework.name == "torch" else ({},):
        given = {"where": np.zeros(ROWS, bool), "reduction": "mean", **options}
        none = framework.outcome(framework.linear(chunk_size=3), spoilt, *LAYER[1:], **given)
        assert all(np.all(values == 0) for values in none)


def test_bad_label_is_nan_and_raises(framework: Framework) -> None:
    labels = np.where(np.arange(ROWS) == 4, 9, LAYER_LABELS)
    call = partial(framework.linear(chunk_size=3), *map(framework.array, (HIDDEN, KERNEL, BIAS, labels)))
    assert np.isnan(np.asarray(call(reduction="none"))).tolist() == [row == 4 for row in range(ROWS)]
    with pytest.raises(IndexError, match="label 9 at index"):
        call(bad_labels="raise")


@pytest.mark.parametrize("shape", [(0,), (), (2, 0), (1,), (2, 3)])
def test_shapes(framework: Framework, shape: tuple[int, ...]) -> None:
    hidden, labels = np.asarray(RANDOM.normal(size=(*shape, FEATURES))), np.ones(shape, np.int8)

    def of_each_reduction(*operands: Any, loss: Any) -> Any:
        results = [loss(*operands, reduction=name) for name in ("none", "sum", "mean")]
        assert [each.shape for each in results] == [shape, (), ()]
        return (jnp if framework.name == "jax" else torch).stack([each.sum() for each in results])

    ours, theirs = (
        framework.outcome(partial(of_each_reduction, loss=loss), hidden, KERNEL, BIAS, labels)
        for loss in (framework.linear(chunk_size=3), reference_of(framework))
    )
    assert_close(ours, theirs)


def test_statistics(framework: Framework) -> None:
    package, array = framework.package, framework.array
    weight, logits = KERNEL if framework.name == "jax" else KERNEL.T, HIDDEN @ KERNEL + BIAS
    labels, where = array(LAYER_LABELS), array(COUNTED)
    for reduction in ("mean", "none"):
        loss, stats = package.linear_label_smoothed_cross_entropy_with_stats(
            array(HIDDEN), array(weight), labels, bias=array(BIAS), where=where, chunk_size=3, reduction=reduction,
            z_loss=0.1,
        )  # fmt: skip
        theirs, *_ = framework.outcome(reference_of(framework), *LAYER, where=COUNTED, reduction=reduction, z_loss=0.1)
        nll = framework.dense()(array(logits), labels, smoothing=0.0, where=where, reduction="none")
        assert_close((np.asarray(loss), np.asarray(stats.nll)), (theirs, np.asarray(nll)))
        assert np.array_equal(stats.valid, COUNTED)
        assert np.array_equal(stats.correct, COUNTED & (logits.argmax(-1) == LAYER_LABELS))


def test_module(framework: Framework) -> None:
    array = framework.array
    module = framework.package.LinearLabelSmoothedCrossEntropyLoss(
        0.2, reduction="mean", chunk_size=2, class_weight=array(WEIGHT)
    )
    call = nnx.jit(module) if framework.name == "jax" else module
    weight = KERNEL if framework.name == "jax" else KERNEL.T
    theirs, *_ = framework.outcome(
        reference_of(framework), HIDDEN, KERNEL, 0 * BIAS, LAYER_LABELS, smoothing=0.2, reduction="mean",
        class_weight=WEIGHT,
    )  # fmt: skip
    assert_close((np.asarray(call(*map(array, (HIDDEN, weight, LAYER_LABELS)))),), (theirs,))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_is_scaled_in_time(framework: Framework, reduction: str) -> None:
    """A loss scale of 2^16 saves gradients that would be 0 in float16, even if they are computed with the loss."""
    hidden, weight = RANDOM.normal(size=(64, 16)), 2 * RANDOM.normal(size=(16, 20000))

    def scaled(*operands: Any) -> Any:
        loss = framework.linear(smoothing=0.0, reduction=reduction)(*operands[:2], None, operands[2])
        return 2.0**16 * (loss.astype(np.float32) if framework.name == "jax" else loss.float()).mean()

    _, _, of_weight = framework.outcome(scaled, hidden.astype(np.float16), weight.astype(np.float16), np.arange(64))
    assert of_weight.dtype == np.float16
    assert np.all(np.any(of_weight != 0, axis=0))
