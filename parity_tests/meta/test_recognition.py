"""The formula of a loss is named with its parameters, also if it departs twice from smoothed cross-entropy."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lsce_torch
from parity_tests.losses.adapters import TorchAdapter
from parity_tests.meta import losses_brought_to_torch as brought
from parity_tests.studies.probes import Question, is_edge, plain_cases
from parity_tests.studies.recognition import Formula, Sample, evaluate, formulas, recognise
from parity_tests.truth.cases import random_case
from parity_tests.truth.comparison import Result

Loss = Callable[[Tensor, Tensor], Tensor]
WEIGHTS = {number: 1 + torch.arange(number, dtype=torch.float64) % 3 for number in (2, 10, 130)}


def run(loss: Loss, question: Question | None = None, reduction: str = "mean", dtype: str = "float64") -> list[Sample]:
    """Return the results of a loss in the ordinary cases."""
    adapter = TorchAdapter()
    adapter.take(lambda logits, labels, **_: loss(logits, labels))
    cases = [case for case in plain_cases(question or Question(), dtype) if not is_edge(case)]
    samples = []
    for case in cases:
        result = adapter(replace(case, options={"reduction": reduction}))
        assert isinstance(result, Result)
        samples.append(Sample(case, result))
    return samples


def smoothed(logits: Tensor, labels: Tensor, e: float, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=e, reduction=reduction)


def next_row(logits: Tensor, labels: Tensor) -> Tensor:
    return smoothed(logits, labels.roll(-1), 0.05)


def max_sup(logits: Tensor, labels: Tensor) -> Tensor:
    rows = F.cross_entropy(logits, labels, reduction="none") + 0.15 * (logits.amax(-1) - logits.mean(-1))
    return rows.sum()


def leaky(logits: Tensor, labels: Tensor) -> Tensor:
    target = torch.full_like(logits, 0.1 / logits.shape[-1]).scatter(1, labels[:, None], 0.9)
    return -(target * F.log_softmax(logits / 2, -1)).sum(-1).mean()


def divergence(logits: Tensor, labels: Tensor) -> Tensor:
    target = F.one_hot(labels, logits.shape[-1]) * 0.7 + 0.3 / logits.shape[-1]
    return F.kl_div(F.log_softmax(logits / 1.5, -1), target, reduction="batchmean")


def focal_of_next_class(logits: Tensor, labels: Tensor) -> Tensor:
    return brought.focal(logits, (labels + 1) % logits.shape[-1], 2.5).mean()


def focal_of_each_class(logits: Tensor, labels: Tensor) -> Tensor:
    log_p = F.log_softmax(logits, -1)
    target = F.one_hot(labels, logits.shape[-1]) * 0.9 + 0.1 / logits.shape[-1]
    return -(target * (1 - log_p.exp()) ** 2 * log_p).sum() / logits.numel()


def capped(logits: Tensor, labels: Tensor) -> Tensor:
    logits = 30 * torch.tanh(logits / 30)
    return smoothed(logits, labels, 0.1) + 1e-4 * (logits.logsumexp(-1) ** 2).mean()


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, WEIGHTS[logits.shape[-1]])


def weighted_rows(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits / 2, labels, WEIGHTS[logits.shape[-1]], reduction="sum") / len(labels)


def weighted_terms(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, WEIGHTS[logits.shape[-1]], label_smoothing=0.15)


def weighted_rows_smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    rows = smoothed(logits, labels, 0.15, "none") * WEIGHTS[logits.shape[-1]][labels]
    return rows.sum() / WEIGHTS[logits.shape[-1]][labels].sum()


def weighted_terms_of_ours(logits: Tensor, labels: Tensor) -> Tensor:
    return lsce_torch.label_smoothed_cross_entropy(
        logits / 2,
        labels,
        smoothing=0.3,
        convention="non_target",
        class_weight=WEIGHTS[logits.shape[-1]],
        reduction="sum",
    )


def background_of_no_weight(logits: Tensor, labels: Tensor) -> Tensor:
    weight = (torch.arange(logits.shape[-1], dtype=logits.dtype) > 0) * WEIGHTS[logits.shape[-1]]
    rows = F.cross_entropy(30 * torch.tanh(logits / 30), labels, weight, label_smoothing=0.1, reduction="sum")
    return rows / len(labels)


def ignoring(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=0.1, ignore_index=1)


def ignoring_but_counting(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=1, reduction="sum") / len(labels)


def without_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    return smoothed(logits, labels, 0.1) + 0.1 * logits.detach().logsumexp(-1).mean()


MEAN = {"reduction": "mean"}
# Departures from smoothed cross-entropy, one or two of them, and what must be said of them.
HIDDEN: dict[str, tuple[Loss, dict[str, str]]] = {
    "plain": (F.cross_entropy, {"convention": "none", **MEAN}),
    "smoothing": (lambda z, y: smoothed(z, y, 0.05), {"convention": "uniform", "smoothing": "0.05", **MEAN}),
    "smoothing and temperature": (
        lambda z, y: smoothed(z / 2.5, y, 0.2),
        {"convention": "uniform", "smoothing": "0.2", "temperature": "2.5", **MEAN},
    ),
    "distillation's factor": (
        lambda z, y: 9 * smoothed(z / 3, y, 0.1),
        {"convention": "uniform", "smoothing": "0.1", "temperature": "3", "reduction": "9 times the mean"},
    ),
    "convention and z-loss": (
        lambda z, y: len(y) * brought.non_target(z, y, 0.3, 1e-3),
        {"convention": "non_target", "smoothing": "0.3", "z-loss": "0.001", "reduction": "sum"},
    ),
    "softcap and z-loss": (
        capped,
        {"convention": "uniform", "smoothing": "0.1", "softcap": "30", "z-loss": "0.0001", **MEAN},
    ),
    "row and smoothing": (next_row, {"convention": "uniform", "smoothing": "0.05", "label of the": "next row", **MEAN}),
    "Max Suppression": (max_sup, {"convention": "max_sup", "smoothing": "0.15", "reduction": "sum"}),
    "leaky and temperature": (leaky, {"convention": "leaky", "smoothing": "0.1", "temperature": "2", **MEAN}),
    "entropy and temperature": (
        divergence,
        {
            "convention": "uniform",
            "smoothing": "0.3",
            "temperature": "1.5",
            **MEAN,
            "constant": "entropy of the target subtracted",
        },
    ),
    "class and focal": (
        focal_of_next_class,
        {"convention": "none", "focal gamma": "2.5", "label of the": "next class", **MEAN},
    ),
    "focal and denominator": (
        focal_of_each_class,
        {
            "convention": "uniform",
            "smoothing": "0.1",
            "focal gamma of each class": "2",
            "reduction": "sum over N K",
        },
    ),
    "poly and temperature": (
        lambda z, y: brought.poly(z / 0.7, y, 2.0),
        {"convention": "none", "temperature": "0.7", "poly-1 epsilon": "2", **MEAN},
    ),
    "class weights": (
        weighted,
        {
            "convention": "none",
            "class weights": "1 for label 0, 2 for label 1 of 2 classes",
            "reduction": "mean weighted by the class weights",
        },
    ),
    "class weights and temperature": (
        weighted_rows,
        {
            "convention": "none",
            "temperature": "2",
            "class weights": "1 for label 0, 2 for label 1 of 2 classes",
            **MEAN,
        },
    ),
    "class weights and smoothing": (
        weighted_terms,
        {
            "convention": "uniform",
            "smoothing": "0.15",
            "class weights": "1 for label 0, 2 for label 1 of 2 classes",
            "class weights multiply": "each term of the sum",
            "reduction": "mean weighted by the class weights",
        },
    ),
    "class weights of smoothed rows": (
        weighted_rows_smoothed,
        {
            "convention": "uniform",
            "smoothing": "0.15",
            "class weights": "1 for label 0, 2 for label 1 of 2 classes",
            "class weights multiply": "the whole row",
            "reduction": "mean weighted by the class weights",
        },
    ),
    "class weights, convention and temperature": (
        weighted_terms_of_ours,
        {
            "convention": "non_target",
            "smoothing": "0.3",
            "temperature": "2",
            "class weights": "1 for label 0, 2 for label 1 of 2 classes",
            "class weights multiply": "each term of the sum",
            "reduction": "sum",
        },
    ),
    "no weight for a class, softcap and denominator": (
        background_of_no_weight,
        {
            "convention": "uniform",
            "smoothing": "0.1",
            "softcap": "30",
            "class weights": "0 for label 0, 1 for label 1 of 2 classes",
            "class weights multiply": "each term of the sum",
            **MEAN,
        },
    ),
    "ignored label": (
        ignoring,
        {"convention": "uniform", "smoothing": "0.1", "ignored label": "1", **MEAN},
    ),
    "ignored label and denominator": (
        ignoring_but_counting,
        {"convention": "none", "ignored label": "1", "reduction": "mean, ignored rows counted"},
    ),
    "value without gradient": (
        without_gradient,
        {"convention": "uniform", "smoothing": "0.1", **MEAN, "constant": "a value that its gradient is not of"},
    ),
}


# Each of these is fitted for seconds.
SLOW = (
    "class weights of smoothed rows",
    "class weights, convention and temperature",
    "no weight for a class, softcap and denominator",
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in HIDDEN])
def test_a_formula_is_named_with_its_parameters(name: str) -> None:
    loss, facts = HIDDEN[name]
    found = recognise(run(loss), "float64")
    assert found is not None
    assert found.facts() == facts
    assert found.evidence.startswith("fits its gradients in float64 to ")


def test_a_loss_per_row_and_one_in_float32() -> None:
    rows = recognise(run(lambda z, y: smoothed(z, y, 0.2, "none"), reduction="none"), "float64")
    assert rows is not None
    assert str(rows) == "uniform convention, smoothing 0.2, a loss per row"
    narrow = recognise(run(lambda z, y: smoothed(z.float(), y, 0.2).double()), "float32")
    assert narrow is not None
    assert str(narrow) == "uniform convention, smoothing 0.2, mean"


@pytest.mark.parametrize("loss", [
    brought.hinge,
    lambda z, y: smoothed(z, y, 0.1) + 1e-3 * (z**2).mean(),
    lambda z, y: smoothed(z, y, 0.1) * (1 + z[:, 0].detach()).mean(),
])  # fmt: skip
def test_another_loss_has_no_formula(loss: Loss) -> None:
    found = recognise(run(loss), "float64")
    assert found is None or "another number for each case" in str(found)


@pytest.mark.parametrize("formula", list(formulas()), ids=str)
def test_the_gradient_of_a_model_is_that_of_its_loss(formula: Formula) -> None:
    """By central differences, whose error is below 1e-6 of the values here."""
    case = random_case("float64", np.random.default_rng(5), 4, 5, scale=1.0)
    values = [0.7 + 0.2 * i for i in range(len(formula.parameters))]
    weight = np.linspace(0.5, 2, 5)
    gradient = evaluate(formula, case, 0.2, values, weight).gradient
    step = 1e-5
    for k in range(5):
        moved = [replace(case, logits=case.logits + sign * step * np.eye(5)[k]) for sign in (1, -1)]
        upper, lower = (evaluate(formula, each, 0.2, values, weight).loss for each in moved)
        np.testing.assert_allclose(gradient[:, k], (upper - lower) / (2 * step), rtol=0, atol=1e-6)
