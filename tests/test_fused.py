"""The fused loss of both packages against the reference; the parity tests hold its values against the truth."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from lsce_jax import cpu
from lsce_jax.row_sums import row_sums
from lsce_torch import lean, sweeps
from tests.small_batches import (
    CALLS,
    FRAMEWORKS,
    LABELS,
    LOGITS,
    PRIOR,
    WEIGHT,
    Framework,
    assert_close,
)


@pytest.fixture(params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Framework]:
    """A package that takes few logits as many, in blocks of rows. In JAX the last block overlaps the one before it."""
    monkeypatch.setattr(cpu, "_FEW_LOGITS", 0)
    monkeypatch.setattr(cpu, "_BLOCK_SIZE", 20)
    monkeypatch.setattr(lean, "_ENABLED", False)
    monkeypatch.setattr(sweeps, "_BLOCK_SIZE", 10)
    row_sums.clear_cache()
    with jax.enable_x64(True):
        yield FRAMEWORKS[request.param]
    row_sums.clear_cache()


def both(framework: Framework) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return framework.dense("fused"), framework.dense("reference")


@pytest.mark.parametrize(("labels", "options"), CALLS.values(), ids=CALLS)
def test_equals_the_reference(framework: Framework, labels: Any, options: dict[str, Any]) -> None:
    """Also for a bad label, and for logits that are not finite."""
    batches = [(LOGITS, labels)]
    if labels is LABELS:
        batches += [(LOGITS, np.where(np.arange(6) == 5, 7, labels))]
    for value in (np.nan, np.inf, -np.inf):
        logits = LOGITS.copy()
        logits[3, 4] = logits[1, 1] = logits[0, 0] = value  # row 3 may be ignored, class 1 masked, class 0 is a label
        batches += [(logits, labels)]
    ours, theirs = (framework.outcomes(loss, batches, **options) for loss in both(framework))
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("name", ["smoothing", "class_weight", "prior"])
def test_other_operands_are_differentiated(framework: Framework, name: str) -> None:
    values = {"smoothing": np.linspace(0.1, 0.9, 6), "class_weight": WEIGHT, "prior": PRIOR}
    # Of a bad label the reference of JAX makes NaN of every class weight.
    labels = np.array([0, 4, 2, 2, 1, 3 if (framework.name, name) == ("jax", "class_weight") else 9])
    others = {other: framework.array(value) for other, value in values.items() if other != name}
    results = []
    for loss in both(framework):

        def total(operand: Any, given: Any, loss: Callable[..., Any] = loss) -> Any:
            options = {**others, name: operand, "subtract_entropy": True, "reduction": "none"}
            return loss(framework.array(LOGITS), given, **options)[:5].sum()

        results.append(framework.outcome(total, values[name], labels))
    assert_close(*results)


def test_bad_label_leaves_the_derivative_by_smoothing_alone(framework: Framework) -> None:
    labels = np.array([0, 5, 2, 2, 1, 3])
    for loss in both(framework):

        def of_smoothing(smoothing: Any, given: Any, loss: Callable[..., Any] = loss) -> Any:
            return loss(framework.array(LOGITS), given, smoothing=smoothing, reduction="sum")

        _, gradient = framework.outcome(of_smoothing, np.full(6, 0.1), labels)
        assert gradient[1] == 0
        assert gradient[0] != 0


@pytest.mark.parametrize(("label", "smoothing"), [(0, 0.0), (1, 1.0)])
def test_small_losses_are_relatively_accurate(framework: Framework, label: int, smoothing: float) -> None:
    """exp(-d) itself, far below the roundoff of 1; where the label is the largest logit, and where it is not."""
    logits = np.array([[0.0, 0.0], [1.0, 0.0], [20.0, 0.0], [60.0, 0.0], [80.0, 0.0]], np.float32)
    expected = np.log1p(np.exp(-logits[:, 0].astype(float)))
    options = {"smoothing": smoothing, "convention": "non_target", "reduction": "none"}
    losses, _ = framework.outcome(framework.dense(), logits, np.full(5, label), **options)
    assert losses.dtype == np.float32
    allowed = 16 if framework.name == "jax" else 8
    assert np.all(np.abs(losses - expected) <= allowed * 2.0**-24 * expected)
