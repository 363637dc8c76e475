"""Converting smoothings, and recognising conventions: from what both packages make of a known one, back to it."""

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import lsce_jax
import lsce_torch
from lsce_spec import CONVENTIONS, Convention, convert_smoothing, identify_loss, identify_targets, smoothing_weights
from lsce_spec.migration import ADDED, LEAKY

CLASSES = (2, 3, 10, 1000)
LOGITS = {k: np.random.default_rng(k).normal(size=(12, k)) * 2 for k in CLASSES}
LABELS = {k: np.random.default_rng(k).integers(k, size=12) for k in CLASSES}
EXTRAS: tuple[dict[str, Any], ...] = (
    {},
    {"subtract_entropy": True},
    {"z_loss": 1e-4},
    {"subtract_entropy": True, "z_loss": 1e-4},
)


# --- Converting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 3, 10, 1000, 128256])
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(["uniform", "non_target", "clamp"], 2)))
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3, 0.5])
def test_the_target_stays(source: str, target: str, smoothing: float, num_classes: int) -> None:
    converted = convert_smoothing(source, target, smoothing, num_classes)
    for before, after in zip(
        smoothing_weights(source, Fraction(smoothing), num_classes),
        smoothing_weights(target, Fraction(converted), num_classes),
        strict=True,
    ):
        # Rounded once: half an ulp of a number up to 1.
        assert abs(before - after) <= Fraction(2) ** -53
    assert convert_smoothing(target, source, converted, num_classes) == pytest.approx(smoothing, rel=2**-51)


def test_known_values() -> None:
    assert convert_smoothing("non_target", "uniform", 0.1, num_classes=1000) == 100 / 999
    assert convert_smoothing("uniform", "non_target", 1.0, num_classes=4) == 0.75
    assert convert_smoothing("clamp", "clamp", 0.9, num_classes=4) == 0.9
    assert convert_smoothing("non_target", "uniform", np.float32(0.25), num_classes=5) == 0.3125
    # Nothing to spread over.
    assert convert_smoothing("uniform", "max_sup", 0.3, num_classes=1) == 0.3
    half = Convention("half", on=lambda e, k: 1 - e / 2 + e / 2 / k, off=lambda e, k: e / 2 / k)
    assert convert_smoothing("uniform", half, 0.1, num_classes=8) == 0.2
    assert convert_smoothing(half, "uniform", 0.2, num_classes=8) == 0.1


@pytest.mark.parametrize(
    ("source", "target", "smoothing", "num_classes"),
    [
        ("max_sup", "uniform", 0.1, 10),
        ("uniform", "max_sup", 0.1, 10),
        ("uniform", LEAKY, 0.1, 10),
        (LEAKY, "non_target", 0.1, 10),
        ("non_target", "uniform", 0.95, 10),  # 1.06
        ("clamp", "uniform", 0.95, 10),  # at the label 0.05, like elsewhere: no distribution
        ("uniform", Convention("none", lambda e, k: 1 + 0 * e, lambda e, k: 0 * e), 0.1, 10),
    ],
)
def test_where_there_is_none(source: Any, target: Any, smoothing: float, num_classes: int) -> None:
    name = source if isinstance(source, str) else source.name
    with pytest.raises(ValueError, match=f"no smoothing of convention .* at the label, .* Pass convention='{name}'"):
        convert_smoothing(source, target, smoothing, num_classes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("uniform", "non_target", 1.5, 10), r"smoothing must be in \[0, 1\]"),
        (("uniform", "non_target", np.array([0.1]), 10), "smoothing must be a Python number"),
        (("uniform", "non_target", True, 10), "smoothing must be a Python number"),
        (("uniform", "non_target", 0.1, 0), "num_classes must be an integer >= 1"),
        (("fairseq", "uniform", 0.1, 10), "unknown convention 'fairseq'"),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        convert_smoothing(*arguments)


# --- Recognising ----------------------------------------------------------------------------------------------------


def targets_of(convention: Any, smoothing: float, num_classes: int, dtype: Any) -> Any:
    on, off = smoothing_weights(convention, smoothing, num_classes)
    return np.where(LABELS[num_classes][:, None] == np.arange(num_classes), on, off).astype(dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("smoothing", [0.1, 0.25, 0.05, 1.0])
@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("convention", ["uniform", "non_target", LEAKY, ADDED])
def test_targets(convention: Any, num_classes: int, smoothing: float, dtype: str) -> None:
    targets = targets_of(convention, smoothing, num_classes, dtype)
    name = convention if isinstance(convention, str) else convention.name
    # Where the label has not the most, its place has to be told.
    labels = LABELS[num_classes] if smoothing == 1 else None
    readings = {r.convention.name: r.smoothing for r in identify_targets(targets, labels)}
    assert readings[name] == smoothing
    if dtype == "float64":
        # Only the two that can reach the same target.
        expected = {name: smoothing}
        if convention in ("uniform", "non_target") and (convention, smoothing) != ("non_target", 1):
            expected = {n: convert_smoothing(convention, n, smoothing, num_classes) for n in ("uniform", "non_target")}
        assert readings == pytest.approx(expected, rel=2**-48)


def test_targets_of_every_framework() -> None:
    matrix = targets_of("uniform", 0.1, 10, np.float32)
    expected = identify_targets(matrix)
    assert [(r.convention.name, r.smoothing) for r in expected] == [("uniform", 0.1), ("non_target", 0.09)]
    for same in (matrix.tolist(), torch.from_numpy(matrix), lsce_jax.functional.jnp.asarray(matrix)):
        assert identify_targets(same, LABELS[10]) == expected


def test_no_smoothing_and_most() -> None:
    (plain,) = identify_targets(np.eye(4))
    assert (plain.convention.name, plain.smoothing) == ("uniform", 0.0)
    # The label has least, so its place has to be told.
    matrix = targets_of("non_target", 0.95, 10, np.float64)
    assert identify_targets(matrix) == []
    assert [(r.convention.name, r.smoothing) for r in identify_targets(matrix, LABELS[10])] == [("non_target", 0.95)]


def test_a_class_that_gets_nothing() -> None:
    """The pad class of the Annotated Transformer, e/(K-2) elsewhere: in the softmax there, which targets cannot say."""
    targets = np.array([[0, 0.9, 0.05, 0.05], [0, 0.05, 0.05, 0.9]])
    left_in, taken_out, _ = identify_targets(targets)
    assert (taken_out.convention.name, taken_out.smoothing) == ("non_target", 0.1)
    assert taken_out.options == {"class_mask": [False, True, True, True]}
    assert (left_in.convention.name, left_in.options) == ("uniform", {"prior": [0.0, 1 / 3, 1 / 3, 1 / 3]})
    logits = np.random.default_rng(0).normal(size=(2, 4))
    expected = -(targets * (logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))).sum(axis=-1)
    losses = lsce_torch.label_smoothed_cross_entropy(
        torch.from_numpy(logits),
        torch.tensor([1, 3]),
        smoothing=left_in.smoothing,
        prior=torch.tensor(left_in.options["prior"], dtype=torch.float64),
        reduction="none",
    )
    assert losses.numpy() == pytest.approx(expected, rel=2**-48)


def test_targets_that_are_none_of_them() -> None:
    assert identify_targets(np.random.default_rng(0).dirichlet(np.ones(5), size=4)) == []
    assert identify_targets([[0.5, 0.3, 0.3]]) == []
    assert identify_targets([[-0.1, -2.3, -2.3]]) == []  # log-probabilities
    spoilt = targets_of("uniform", 0.1, 10, np.float64)
    spoilt[3, 2] *= 1 + 1e-6
    assert identify_targets(spoilt) == []


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("convention", ["uniform", "non_target", LEAKY, ADDED])
def test_losses(convention: Any, num_classes: int, extra: dict[str, Any]) -> None:
    labels = torch.from_numpy(LABELS[num_classes])
    for dtype, smoothing in itertools.product((torch.float64, torch.float32), (0.1, 0.05, 0.0)):
        logits = torch.from_numpy(LOGITS[num_classes]).to(dtype)
        losses = lsce_torch.label_smoothed_cross_entropy(
            logits, labels, smoothing=smoothing, convention=convention, reduction="none", **extra
        )
        readings = identify_loss(losses, logits, labels)
        assert readings
        if smoothing:
            name = convention if isinstance(convention, str) else convention.name
            assert {r.convention.name: r.smoothing for r in readings}[name] == smoothing
            assert readings[0].options == extra
        else:
            # Without smoothing the target has no entropy.
            assert len(readings) == 1
            assert readings[0].smoothing == 0
            assert readings[0].options == {n: v for n, v in extra.items() if n == "z_loss"}


@pytest.mark.parametrize("num_classes", CLASSES[1:])
def test_max_sup_losses(num_classes: int) -> None:
    losses = lsce_jax.label_smoothed_cross_entropy(
        LOGITS[num_classes].astype(np.float32), LABELS[num_classes], smoothing=0.1, convention="max_sup"
    )
    (reading,) = identify_loss(losses, LOGITS[num_classes].astype(np.float32), LABELS[num_classes])
    assert (reading.convention.name, reading.smoothing) == ("max_sup", 0.1)


def test_readings_print_the_call_that_gives_the_losses() -> None:
    label_smoothed_cross_entropy = lsce_torch.label_smoothed_cross_entropy
    logits, labels = torch.from_numpy(LOGITS[10]), torch.from_numpy(LABELS[10])
    names = {"label_smoothed_cross_entropy": label_smoothed_cross_entropy, "logits": logits, "labels": labels}
    for convention in (*CONVENTIONS, LEAKY, ADDED):
        losses = label_smoothed_cross_entropy(logits, labels, smoothing=0.1, convention=convention, reduction="none")
        for reading in identify_loss(losses, logits, labels):
            again = eval(str(reading)[:-1] + ", reduction='none')", {"Convention": Convention}, names)
            if (reading.convention.name, reading.smoothing) == (getattr(convention, "name", convention), 0.1):
                assert torch.equal(again, losses)
            # Another convention's smoothing is the shortest decimal within the tolerance, (sqrt(10) + 8) * 2 = 23
            # roundoffs of the loss and the largest logit, which take part in it by less than three times the loss.
            assert torch.all((again - losses).abs() <= 64 * 2.0**-53 * losses)


def test_losses_that_are_none_of_them() -> None:
    logits, labels = LOGITS[10], LABELS[10]
    losses = np.asarray(
        lsce_torch.label_smoothed_cross_entropy(*map(torch.from_numpy, (logits, labels)), reduction="none")
    )
    assert identify_loss(losses, logits, labels)
    assert identify_loss(losses**1.01, logits, labels) == []
    assert identify_loss(losses, logits, (labels + 1) % 10) == []
    spoilt = losses.copy()
    spoilt[5] *= 1 + 1e-12
    assert identify_loss(spoilt, logits, labels) == []


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: identify_targets([]), r"targets must be numbers of shape \[N, K\]"),
        (lambda: identify_targets([[]]), r"targets must be numbers of shape \[N, K\]"),
        (lambda: identify_targets([0.9, 0.1]), r"targets must be numbers of shape \[N, K\]"),
        (lambda: identify_targets([[0.9, 0.1], [1.0]]), r"targets must be numbers of shape \[N, K\]"),
        (lambda: identify_targets([[0.9, 0.1]], [0, 1]), r"labels must be numbers of shape \[1\]"),
        (lambda: identify_targets([[0.9, 0.1]], [2]), "class indices from 0 to 1, got 2 at index 0"),
        (lambda: identify_targets([[0.9, 0.1]], [-100]), "Leave out the rows that the loss ignores"),
        (lambda: identify_targets(np.eye(2, dtype=np.float16)), "targets must be float32 or float64, got float16"),
        (lambda: identify_targets(list(np.eye(2, dtype=np.float16))), "targets must be float32 or float64"),
        (
            lambda: identify_loss(torch.ones(2, dtype=torch.bfloat16), np.eye(2), [0, 1]),
            "losses must be float32 or float64, got bfloat16, which is too coarse",
        ),
        (lambda: identify_targets([[0.9, float("nan")]]), "targets must be finite"),
        (lambda: identify_loss([0.1], [[0.0, 1.0], [1.0, 0.0]], [0, 1]), r"losses must be numbers of shape \[2\]"),
        (lambda: identify_loss(0.1, [[0.0, 1.0]], [0]), r"losses must be numbers of shape \[1\]"),
        (lambda: identify_loss([float("inf")], [[0.0, 1.0]], [0]), "losses must be finite"),
        (lambda: identify_loss([0.1], [[0.0, 1.0]], [0]), "1 rows like these do not tell"),
        (lambda: identify_loss([0.0] * 9, [[float(i)] for i in range(9)], [0] * 9), "9 rows like these do not tell"),
    ],
)
def test_wrong_arrays(call: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        call()


@pytest.mark.parametrize("convention", ["uniform", "non_target"])
def test_logits_of_a_narrow_dtype_are_exact(convention: str) -> None:
    logits = torch.from_numpy(LOGITS[10]).bfloat16()
    labels = torch.from_numpy(LABELS[10])
    losses = lsce_torch.label_smoothed_cross_entropy(
        logits, labels, smoothing=0.12, convention=convention, reduction="none"
    )
    assert {r.convention.name: r.smoothing for r in identify_loss(losses, logits, labels)}[convention] == 0.12


def test_one_row_at_a_time() -> None:
    """A loss that knows the mean only gives scalars, of any framework."""
    logits, labels = LOGITS[10].astype(np.float32), LABELS[10]
    for package, array in ((lsce_jax, np.asarray), (lsce_torch, torch.from_numpy)):
        losses = [
            package.label_smoothed_cross_entropy(array(z[None]), array(y[None]), smoothing=0.1, reduction="mean")
            for z, y in zip(logits, labels, strict=True)
        ]
        assert {r.convention.name: r.smoothing for r in identify_loss(losses, logits, list(labels))}["uniform"] == 0.1
        assert identify_loss([np.float32(loss) for loss in losses], logits, list(torch.from_numpy(labels)))
