"""The definition, held against values worked out by hand and against its own derivative at 50 digits."""

import inspect
import math
import string
from typing import Annotated, TypedDict, Unpack

import mpmath
import numpy as np
import pytest

import lsce_torch.errors
from lsce_spec import (
    MESSAGES,
    Convention,
    check_prior_values,
    error,
    loss_row,
    mean_denominator,
    smoothing_weights,
    target_distribution,
)
from lsce_spec.keywords import Default, takes

LOG = math.log


@pytest.mark.parametrize(("convention", "smoothing", "num_classes", "expected"), [
    ("uniform", 0.1, 10, (0.91, 0.01)),
    ("uniform", 1.0, 4, (0.25, 0.25)),
    ("non_target", 0.1, 5, (0.9, 0.025)),
    ("non_target", 1.0, 5, (0.0, 0.25)),
    ("clamp", 0.1, 5, (0.9, 0.025)),
    # Beyond (K-1)/K the bounds of the clamp cross, and the upper one wins.
    ("clamp", 0.9, 5, (0.1, 0.1)),
    ("clamp", 1.0, 5, (0.0, 0.0)),
    ("uniform", 0.3, 1, (1.0, 0.0)),
    ("non_target", 0.3, 1, (1.0, 0.0)),
    ("clamp", 0.3, 1, (1.0, 0.0)),
])  # fmt: skip
def test_conventions(convention: str, smoothing: float, num_classes: int, expected: tuple[float, float]) -> None:
    assert smoothing_weights(convention, smoothing, num_classes) == pytest.approx(expected, rel=1e-15, abs=1e-16)


@pytest.mark.parametrize("convention", ["uniform", "non_target", "clamp"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.8, 0.95, 1.0])
def test_one_hot_probabilities_are_integer_labels(convention: str, smoothing: float) -> None:
    for label in range(5):
        one_hot = [float(k == label) for k in range(5)]
        soft = target_distribution(one_hot, 5, smoothing=smoothing, convention=convention)
        hard = target_distribution(label, 5, smoothing=smoothing, convention=convention)
        assert soft == pytest.approx(hard, rel=1e-15, abs=1e-16)


def test_own_convention_interpolates_soft_labels() -> None:
    leaky = Convention("leaky", on=lambda e, k: 1 - e, off=lambda e, k: e / k)
    assert target_distribution(0, 2, smoothing=0.5, convention=leaky) == [0.5, 0.25]
    assert target_distribution([0.5, 0.5], 2, smoothing=0.5, convention=leaky) == [0.375, 0.375]


def test_prior_and_mask() -> None:
    assert target_distribution(0, 3, smoothing=0.5, prior=[0.5, 0.25, 0.25]) == [0.75, 0.125, 0.125]
    assert target_distribution(0, 3, smoothing=0.5, class_mask=[True, False, True]) == [0.75, 0, 0.25]
    assert target_distribution(1, 3, smoothing=0.5, class_mask=[False, True, False]) == [0, 1, 0]


def test_worked_example() -> None:
    """K = 5, label 3, p = [.1, .1, .1, .36, .34], e = 0.1. In nats: 1.0217 plain, 1.0997 smoothed."""
    logits = [LOG(p) for p in (0.1, 0.1, 0.1, 0.36, 0.34)]
    target = target_distribution(3, 5, smoothing=0.1)
    assert target == pytest.approx([0.02, 0.02, 0.02, 0.92, 0.02], rel=1e-15)
    smoothed, plain = loss_row(logits, target).loss, loss_row(logits, [0, 0, 0, 1, 0]).loss
    assert (round(plain, 4), round(smoothed, 4)) == (1.0217, 1.0997)
    assert (round(plain / LOG(2), 2), round(smoothed / LOG(2), 4)) == (1.47, 1.5865)


def test_terms_by_hand() -> None:
    """Logits log 1, log 2, log 5: probabilities 1/8, 2/8, 5/8, lse log 8."""
    logits, target = [0.0, LOG(2), LOG(5)], [0.5, 0.25, 0.25]
    nats = 0.5 * LOG(8) + 0.25 * LOG(4) + 0.25 * LOG(8 / 5)
    row = loss_row(logits, target)
    assert row.loss == pytest.approx(nats, rel=1e-15)
    assert row.lse == pytest.approx(LOG(8), rel=1e-15)
    assert row.probabilities == pytest.approx([1 / 8, 2 / 8, 5 / 8], rel=1e-15)
    assert row.gradient == pytest.approx([1 / 8 - 1 / 2, 0, 5 / 8 - 1 / 4], rel=1e-14, abs=1e-16)
    assert loss_row(logits, target, z_loss=0.1).loss == pytest.approx(nats + 0.1 * LOG(8) ** 2, rel=1e-15)
    entropy = 0.5 * LOG(2) + 0.5 * LOG(4)
    assert loss_row(logits, target, subtract_entropy=True).loss == pytest.approx(nats - entropy, rel=1e-14)
    weighted = loss_row(logits, target, class_weight=[2, 1, 4])
    assert weighted.loss == pytest.approx(LOG(8) + 0.25 * LOG(4) + LOG(8 / 5), rel=1e-15)
    assert weighted.gradient == pytest.approx([2.25 / 8 - 1, 2.25 / 4 - 0.25, 2.25 * 5 / 8 - 1], rel=1e-14)
    capped = loss_row([3.0, -1.0], [1.0, 0.0], softcap=2.0).loss
    assert capped == pytest.approx(math.log1p(math.exp(2 * math.tanh(-0.5) - 2 * math.tanh(1.5))), rel=1e-14)
    masked = loss_row([0.0, math.nan, LOG(3)], [1.0, 0.0, 0.0], class_mask=[True, False, True])
    assert masked.loss == pytest.approx(LOG(4), rel=1e-15)
    assert masked.gradient == pytest.approx([-0.75, 0, 0.75], rel=1e-15)


def test_edges() -> None:
    assert loss_row([0.0, -math.inf], [1.0, 0.0]).loss == 0
    assert loss_row([0.0, -math.inf], [0.9, 0.1]).loss == math.inf
    assert loss_row([0.0, -math.inf], [0.9, 0.1]).gradient == pytest.approx([0.1, -0.1], rel=1e-15)
    assert loss_row([1e4, 0.0], [0.0, 1.0]).loss == 1e4
    assert loss_row([50.0, 0.0], [1.0, 0.0]).loss == pytest.approx(math.exp(-50), rel=1e-15)
    assert loss_row([3.0], [1.0]).loss == 0


OPTIONS = [
    {},
    {"z_loss": 0.3},
    {"softcap": 1.5},
    {"subtract_entropy": True},
    {"class_weight": [0.5, 2, 1, 3]},
    {"class_mask": [True, True, False, True]},
    {"z_loss": 0.2, "softcap": 2.5, "class_weight": [0.5, 2, 1, 3], "class_mask": [True, False, True, True]},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_gradient_is_the_derivative_of_the_loss(options: dict[str, object]) -> None:
    """Central differences at 50 digits with a step of 1e-15 leave an error of about 1e-30."""
    with mpmath.workdps(50):
        logits = [mpmath.mpf(v) for v in ("0.3", "-1.25", "2.5", "0.75")]
        mask = options.get("class_mask")
        target = target_distribution(0, 4, smoothing=mpmath.mpf(1) / 5, convention="non_target", class_mask=mask)

        def loss(values: list[object]) -> object:
            return loss_row(values, target, maths=mpmath.mp, **options).loss

        gradient = loss_row(logits, target, maths=mpmath.mp, **options).gradient
        step = mpmath.mpf("1e-15")
        for k in range(4):
            up, down = list(logits), list(logits)
            up[k], down[k] = logits[k] + step, logits[k] - step
            assert abs((loss(up) - loss(down)) / (2 * step) - gradient[k]) < mpmath.mpf("1e-28")


def test_mean_denominator() -> None:
    assert mean_denominator([0, 1, 1], [True, False, True]) == 2
    assert mean_denominator([0, 1, 1], [True, True, True], class_weight=[2.0, 0.5]) == 3
    assert mean_denominator([[0.5, 0.5], [1, 0]], [True, True], class_weight=[2.0, 0.5]) == 2


def test_prior_values() -> None:
    check_prior_values([0.25, 0.75], None, 2.0**-53)
    counts = np.arange(1, 50001, dtype=np.float32)
    check_prior_values((counts / counts.sum()).tolist(), None, 2.0**-24)
    for prior, words in (([0.5, 0.6], "sum to 1"), ([1.5, -0.5], ">= 0"), ([math.nan, 1.0], ">= 0")):
        with pytest.raises(ValueError, match=words):
            check_prior_values(prior, None, 2.0**-24)
    with pytest.raises(ValueError, match="outside class_mask"):
        check_prior_values([0.5, 0.5], [True, False], 2.0**-24)


def test_messages_are_whole() -> None:
    """Each message fills in all it names, says what was given, and ends as a sentence."""
    tables = [(MESSAGES, error), (lsce_torch.errors.MESSAGES, lsce_torch.errors.error)]
    for key, text, make in [(key, text, make) for table, make in tables for key, (_, text) in table.items()]:
        names = {name for _, name, _, _ in string.Formatter().parse(text) if name}
        filled = str(make(key, **dict.fromkeys(names, "x")))
        assert "{" not in filled
        assert filled.endswith(".") or text.endswith("{hint}")


class Keywords(TypedDict, total=False):
    """What every function takes."""

    smoothing: Annotated[float, Default(0.1)]


class MoreKeywords(Keywords, total=False):
    """What one function takes besides."""

    axis: Annotated[int, Default(-1)]


@takes(MoreKeywords)
def with_keywords(logits: float, labels: int, **keywords: Unpack[MoreKeywords]) -> tuple[object, ...]:
    return logits, labels, keywords


def test_keywords_are_stated_once() -> None:
    assert str(inspect.signature(with_keywords)) == (
        "(logits: float, labels: int, *, smoothing: float = 0.1, axis: int = -1) -> tuple[object, ...]"
    )
    whole = (1.0, 2, {"smoothing": 0.2, "axis": -1})
    assert with_keywords(1.0, 2, smoothing=0.2) == with_keywords(1.0, labels=2, smoothing=0.2) == whole


def test_unknown_keywords_are_rejected() -> None:
    with pytest.raises(
        TypeError, match=r"with_keywords\(\) got an unexpected keyword argument 'smothing'. Did you mean"
    ):
        with_keywords(1.0, 2, smothing=0.2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"argument 'q'. help\(with_keywords\) lists the names."):
        with_keywords(1.0, 2, q=0.2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'labels'"):
        with_keywords(1.0)  # type: ignore[call-arg]
