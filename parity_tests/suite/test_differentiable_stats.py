"""Gradients of the statistics of every case, in all implementations, against the truth.

That of the nll is the gradient of the same case without smoothing, weights and z-loss, so the oracle and the bounds of
the loss serve for it too. Those of log-sum-exp and entropy have an oracle and bounds of their own.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lsce_spec import IMPLEMENTATIONS
from lsce_torch import label_smoothed_cross_entropy_with_stats
from parity_tests.losses.adapters import TorchAdapter
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.cases import Case, case_names, make_case
from parity_tests.truth.comparison import Result, against_oracle
from parity_tests.truth.model import model_bound, solve_model
from parity_tests.truth.oracle import Exact, solve

NAMES = [name for name in case_names() if name != "wide"]


def torch_statistic(field: str, implementation: str) -> Callable[..., torch.Tensor]:
    """Return a function of logits and labels that returns a statistic as a loss of rows."""

    def statistic(logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        _, stats = label_smoothed_cross_entropy_with_stats(
            logits, labels, differentiable=True, implementation=implementation, **options
        )
        found: torch.Tensor = getattr(stats, field)
        return found

    return statistic


def by_row(case: Case) -> Case:
    """Return the case without its reduction, which the statistics do not take part in."""
    options = {name: value for name, value in case.options.items() if name != "denominator"}
    upstream = case.upstream if case.options.get("reduction", "none") == "none" else None
    return replace(case, options={**options, "reduction": "none"}, upstream=upstream)


def unsmoothed(case: Case) -> Case:
    """Return the case whose loss is the nll of a case."""
    options = {**case.options, "convention": "uniform", "subtract_entropy": False, "z_loss": 0.0}
    return replace(case, options=options, smoothing=0.0, class_weight=None, prior=None)


def found_by_torch(case: Case, field: str, implementation: str) -> tuple[Result, Arithmetic]:
    """Return a statistic and the gradient of its sum, and the arithmetic."""
    adapter = TorchAdapter(torch_statistic(field, implementation))
    result = adapter(case)
    assert isinstance(result, Result)
    return result, adapter.arithmetic


def agrees(case: Case, field: str, result: Result, arithmetic: Arithmetic) -> bool:
    """Return whether a statistic and its gradient are within their bounds."""
    if field == "nll":
        exact = unsmoothed(case)
        return against_oracle(exact, solve(exact), result, arithmetic).agrees
    truth, bound = solve_model(case), model_bound(case, arithmetic)
    pairs = (result.loss, field), (result.gradient, f"{field}_gradient")
    return all(_within(values, getattr(truth, name), getattr(bound, name)) for values, name in pairs)


def _within(values: Any, exact: Exact, bound: Any) -> bool:
    return bool(np.all(exact.error_of(values.reshape(exact.high.shape)) <= bound))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("field", ["nll", "lse", "entropy"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str, field: str, implementation: str, dtype: str) -> None:
    case = by_row(make_case(name, dtype))
    if field != "nll":
        case = replace(case, upstream=None)
    result, arithmetic = found_by_torch(case, field, implementation)
    assert result.gradient_dtype == dtype
    assert agrees(case, field, result, arithmetic)


def softmax_of(case: Case) -> tuple[Any, Any, Any]:
    """Return the softmax of the rows of a case, and entropy terms of the classes and their sum."""
    p = np.exp(case.logits - np.max(case.logits, axis=-1, keepdims=True))
    p /= np.sum(p, axis=-1, keepdims=True)
    terms = -p * np.log(p)
    return p, terms, np.sum(terms, axis=-1, keepdims=True)


WRONG: dict[str, tuple[str, Callable[[Case], Any]]] = {
    "entropy: without its mean": ("entropy", lambda case: softmax_of(case)[1]),
    "entropy: the other sign": (
        "entropy",
        lambda case: softmax_of(case)[0] * softmax_of(case)[2] - softmax_of(case)[1],
    ),
    "entropy: a constant": ("entropy", lambda case: 0 * case.logits),
    "entropy: off by a thousandth": (
        "entropy",
        lambda case: 1.001 * (softmax_of(case)[1] - softmax_of(case)[0] * softmax_of(case)[2]),
    ),
    "lse: of the nll": ("lse", lambda case: softmax_of(case)[0] - np.eye(case.num_classes)[case.labels]),
    "lse: rows that do not sum to 1": ("lse", lambda case: softmax_of(case)[0] * (1 + 1e-5)),
    "nll: of the loss": (
        "nll",
        lambda case: softmax_of(case)[0] - 0.9 * np.eye(case.num_classes)[case.labels] - 0.1 / case.num_classes,
    ),
    "nll: of lse": ("nll", lambda case: softmax_of(case)[0]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_gradients_are_rejected(wrong: str) -> None:
    field, gradient = WRONG[wrong]
    case = replace(by_row(make_case("classes_9", "float32")), upstream=None)
    result, arithmetic = found_by_torch(case, field, "fused")
    assert agrees(case, field, result, arithmetic)
    spoiled = np.asarray(gradient(case), np.float32).astype(np.float64).reshape(result.gradient.shape)
    assert not agrees(case, field, replace(result, gradient=spoiled), arithmetic)
