"""The modules pass every option on: each call arrives at the function with the values that the module was given."""

from typing import Any

import numpy as np
import pytest
import torch

import lsce_jax.modules
import lsce_torch.drop_in
import lsce_torch.modules

# Each differs from every default.
OPTIONS: dict[str, Any] = {
    "convention": "non_target",
    "prior": None,  # replaced below: it goes with "uniform" only
    "class_mask": np.array([True, True, False]),
    "z_loss": 0.25,
    "softcap": 7.5,
    "subtract_entropy": True,
    "bad_labels": "raise",
    "implementation": "fused",
}
LOGITS, LABELS = np.zeros((2, 3), np.float32), np.array([0, 1])
WEIGHT = np.array([1.0, 2.0, 3.0], np.float32)


def same(given: Any, expected: Any) -> bool:
    if isinstance(expected, np.ndarray):
        return np.array_equal(np.asarray(given), expected)
    return type(given) is type(expected) and given == expected


def check(arrived: dict[str, Any], expected: dict[str, Any]) -> None:
    assert arrived.keys() == expected.keys()
    for name, value in expected.items():
        assert same(arrived[name], value), name


@pytest.fixture
def arrived(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What arrives at the functions."""
    calls: dict[str, Any] = {}
    for package in (lsce_jax.modules, lsce_torch.modules, lsce_torch.drop_in):
        monkeypatch.setattr(package, "label_smoothed_cross_entropy", lambda *_, **options: calls.update(options))
    return calls


@pytest.mark.parametrize("convention", ["non_target", "uniform"])
def test_options_arrive(arrived: dict[str, Any], convention: str) -> None:
    prior = None if convention == "non_target" else np.array([0.5, 0.5, 0.0], np.float32)
    options = {**OPTIONS, "convention": convention, "prior": prior}
    per_call = {"where": np.array([True, False]), "smoothing": 0.375, "denominator": 3.0}

    module = lsce_jax.LabelSmoothedCrossEntropyLoss(
        0.125, axis=-2, ignore_index=5, class_weight=WEIGHT, reduction="mean", **options
    )
    shared = {"ignore_index": 5, "class_weight": WEIGHT, "reduction": "mean", **options}
    module(LOGITS, LABELS)
    check(arrived, {**shared, "axis": -2, "smoothing": 0.125, "where": None, "denominator": None})
    module(LOGITS, LABELS, **per_call)
    check(arrived, {**shared, "axis": -2, **per_call})

    tensors = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in options.items()}
    drop_in = lsce_torch.LabelSmoothedCrossEntropyLoss(
        torch.from_numpy(WEIGHT),
        ignore_index=5,
        reduction="mean",
        label_smoothing=0.125,
        inplace_backward=True,
        **tensors,
    )
    arrived.clear()
    shared["inplace_backward"] = True
    drop_in(torch.from_numpy(LOGITS), torch.from_numpy(LABELS))
    check(arrived, {**shared, "axis": 1, "smoothing": 0.125, "where": None, "denominator": None})
    drop_in(torch.from_numpy(LOGITS[0]), torch.tensor(0), **per_call)
    check(arrived, {**shared, "axis": 0, **per_call})


def test_drop_in_takes_lists_and_no_index_to_ignore() -> None:
    module = lsce_torch.LabelSmoothedCrossEntropyLoss(
        prior=[0.5, 0.5, 0.0], class_mask=np.array([True, True, False]), label_smoothing=0.5, ignore_index=None
    )
    assert module(torch.zeros(2, 3), torch.tensor([0, 1])) > 0
    assert module(torch.zeros(2, 3), torch.softmax(torch.zeros(2, 3), -1)) > 0
    assert "convention='uniform'" in repr(module)
