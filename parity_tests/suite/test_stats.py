"""The statistics of every case, in both frameworks and all implementations, against the truth.

The nll is the loss of the same case without smoothing, weights and z-loss, and `smoothed` that without z-loss; so the
oracle and the bounds of the loss serve for them too.
"""

from dataclasses import replace
from itertools import product
from typing import Any

import jax
import numpy as np
import pytest
import torch

import lsce_jax
import lsce_torch
from lsce_spec import IMPLEMENTATIONS
from parity_tests.losses.adapters import JaxAdapter, TorchAdapter, operands_of, to_torch
from parity_tests.suite.chosen import CHOSEN
from parity_tests.suite.jax_results import STATISTICS_DTYPES, Statistics, statistics_of
from parity_tests.suite.jax_results import statistics as jax_statistics
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.bounds import error_bound
from parity_tests.truth.cases import Case, case_names, is_class, make_case
from parity_tests.truth.model import model_bound, solve_model
from parity_tests.truth.oracle import solve
from parity_tests.truth.precision import FORMATS, compute_dtype, round_to

ARITHMETIC = {"jax": JaxAdapter().arithmetic, "torch": TorchAdapter().arithmetic}


def torch_statistics(implementation: str, case: Case) -> Statistics:
    arrays, options = operands_of(case)
    arrays.pop("upstream")
    tensors = {name: to_torch(value) for name, value in arrays.items()}
    loss, stats = lsce_torch.label_smoothed_cross_entropy_with_stats(
        **tensors, **options, implementation=implementation
    )
    return loss.numpy(), {name: value.numpy().reshape(-1) for name, value in stats._asdict().items()}


# JAX has compiled the same for the tests of the losses (jax_results.py). As there, most in bfloat16 are slow tests.
@pytest.mark.parametrize(("name", "dtype"), [
    pytest.param(name, dtype, marks=[] if dtype == "float32" or name in CHOSEN else [pytest.mark.slow])
    for name, dtype in product(case_names(), STATISTICS_DTYPES) if name != "wide"
])  # fmt: skip
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_statistics(name: str, framework: str, implementation: str, dtype: str) -> None:
    case = make_case(name, dtype)
    loss, stats = (
        jax_statistics(implementation, name, dtype) if framework == "jax" else torch_statistics(implementation, case)
    )
    assert_statistics(case, loss, stats, ARITHMETIC[framework])


def assert_statistics(case: Case, loss: Any, stats: dict[str, Any], arithmetic: Arithmetic) -> None:
    """Hold the statistics of a case against the truth."""
    dtype = case.dtype
    for field, values in stats.items():
        if field == "prediction":
            assert values.dtype.name in {"int32", "int64"}
        else:
            assert values.dtype.name == ("bool" if field in {"correct", "valid"} else compute_dtype(dtype)), field
    counted = solve(replace(case, options={**case.options, "reduction": "none"})).counted
    divided_by_zero = case.options.get("denominator") == 0
    if divided_by_zero:
        counted = np.zeros_like(counted)
    assert np.array_equal(stats["valid"], counted)

    plain = {**case.options, "reduction": "none", "z_loss": 0.0}
    plain.pop("denominator", None)
    smoothed = replace(case, options=plain)
    unsmoothed = replace(
        case,
        options={**plain, "convention": "uniform", "subtract_entropy": False},
        smoothing=0.0,
        class_weight=None,
        prior=None,
    )
    assert_within(stats["smoothed"], smoothed, counted, arithmetic)
    nll_bound = assert_within(stats["nll"], unsmoothed, counted, arithmetic)

    assert_entropy(case, stats["entropy"], counted, arithmetic)
    exact_lse, confidence, prediction, correct = expected_lse_and_guess(case, counted)
    assert np.array_equal(stats["prediction"], prediction)
    roundoff = FORMATS[compute_dtype(dtype)].roundoff
    known = np.isfinite(nll_bound)
    bound = nll_bound + 4 * roundoff * (np.abs(exact_lse) + np.max(np.abs(finite_rows(case)), axis=-1, initial=0))
    assert np.all(np.abs(stats["lse"] - exact_lse)[known] <= bound[known])
    # What is off in the log-sum-exp, which the nll holds too, is off in the confidence as a factor.
    factor = np.expm1(nll_bound[known]) + 4 * roundoff
    assert np.all(np.abs(stats["confidence"] - confidence)[known] <= factor * confidence[known])
    assert np.array_equal(stats["correct"], correct)

    z_loss = np.float32(case.options.get("z_loss", 0.0))
    assert np.all(np.abs(stats["z"] - z_loss * stats["lse"] ** 2) <= 3 * roundoff * np.abs(stats["z"]))
    if case.options.get("reduction", "none") == "none":
        total = stats["smoothed"] + stats["z"]
        same = np.isnan(total) & np.isnan(loss.ravel())
        with np.errstate(invalid="ignore"):
            error = np.abs(loss.ravel() - total)
        assert np.all(same | (loss.ravel() == total) | (error <= 2 * roundoff * (np.abs(total) + stats["z"])))


def assert_entropy(case: Case, entropy: Any, counted: Any, arithmetic: Arithmetic) -> None:
    """Hold the entropies of rows against the truth."""
    error = solve_model(case).entropy.error_of(entropy.astype(np.float64))
    assert np.all((error <= model_bound(case, arithmetic).entropy)[counted])
    assert np.all(entropy[~counted] == 0)


def assert_within(values: Any, case: Case, counted: Any, arithmetic: Arithmetic) -> Any:
    """Hold values of rows against the losses of a case; return the bound."""
    truth = solve(case)
    bound = error_bound(case, truth, arithmetic).loss
    error = truth.loss.error_of(values.astype(np.float64))
    assert np.all((error <= bound)[counted] | (error == 0)[counted])
    assert np.all(values[~counted] == 0)
    return bound


def finite_rows(case: Case) -> Any:
    rows = case.rows()
    kept = np.where(rows.allowed & rows.counted[:, None], rows.logits, 0)
    return np.where(np.isfinite(kept), kept, 0)


def expected_lse_and_guess(case: Case, counted: Any) -> tuple[Any, Any, Any, Any]:
    """Return the log-sum-exp, the largest probability, its class, and whether that is the label.

    The first two are exact beside float32.
    """
    rows, cap = case.rows(), case.options.get("softcap")
    allowed = rows.allowed | ~rows.allowed.any(axis=-1, keepdims=True)
    raw = np.where(allowed & rows.counted[:, None], rows.logits, np.where(allowed, 0, -np.inf))
    capped = raw if cap is None else np.where(allowed, cap * np.tanh(raw / cap), -np.inf)
    lse = np.logaddexp.reduce(capped, axis=-1) if case.num_classes > 1 else capped[:, 0]
    soft = rows.labels.ndim == 2
    labels = np.argmax(np.where(counted[:, None], rows.labels, 0), axis=-1) if soft else rows.labels
    prediction = np.argmax(raw, axis=-1)
    correct = counted & (prediction == labels) & (True if soft else is_class(rows))
    confidence = np.exp(np.max(capped, axis=-1) - lse)
    return np.where(counted, lse, 0), np.where(counted, confidence, 0), np.where(counted, prediction, -1), correct


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_of_equal_logits_the_first_counts(framework: str, implementation: str) -> None:
    """As with argmax."""
    case = make_case("ties", "float32")
    case = replace(case, logits=np.zeros((6, 16)), labels=np.array([0, 1, 0, 15, 3, 0]))
    _, stats = {"jax": statistics_of, "torch": torch_statistics}[framework](implementation, case)
    assert stats["correct"].tolist() == [True, False, True, False, False, True]
    assert stats["prediction"].tolist() == [0] * 6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_what_a_label_does_not_change(framework: str, implementation: str) -> None:
    """A bad label makes its nll NaN; log-sum-exp, entropy and prediction are those of any label."""
    case = make_case("classes_9", "float32")
    bad = replace(case, labels=np.array([0, -1, 9, 3, 300]))
    find = {"jax": statistics_of, "torch": torch_statistics}[framework]
    (_, stats), (_, good) = (find(implementation, each) for each in (bad, replace(case, labels=np.zeros(5, int))))
    assert np.isnan(stats["nll"]).tolist() == [False, True, True, False, True]
    assert not np.any(stats["correct"][[1, 2, 4]])
    for field in ("lse", "entropy", "prediction", "confidence"):
        assert np.array_equal(stats[field], good[field])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_without_a_largest_logit_there_is_no_prediction(framework: str, implementation: str) -> None:
    logits = np.array([[0.0, np.nan, 1.0], [-np.inf] * 3, [0.0, np.inf, 1.0], [-np.inf, 2.0, 1.0]])
    case = replace(make_case("classes_3", "float32"), logits=logits, labels=np.array([2, 0, 1, 1]), upstream=None)
    _, stats = {"jax": statistics_of, "torch": torch_statistics}[framework](implementation, case)
    assert stats["prediction"].tolist() == [-1, -1, -1, 1]
    assert stats["correct"].tolist() == [False, False, False, True]
    assert np.isnan(stats["entropy"]).tolist() == [True, True, True, False]


WRONG_ENTROPIES = {
    "in bits": lambda p, gap, log_sum: (np.sum(p * gap, axis=-1) + log_sum) / np.log(2),
    "without log-sum-exp": lambda p, gap, _: np.sum(p * gap, axis=-1),
    "not divided by the sum": lambda p, gap, log_sum: np.sum(p * gap, axis=-1) * np.exp(log_sum) + log_sum,
    "of all but the largest": lambda p, gap, log_sum: np.sum(np.where(gap > 0, p * (gap + log_sum[:, None]), 0), -1),
    "summed in bfloat16": lambda p, gap, log_sum: round_to(np.sum(p * gap, axis=-1), "bfloat16") + log_sum,
    "of probabilities in bfloat16": lambda p, gap, log_sum: np.sum(round_to(p, "bfloat16") * gap, -1) + log_sum,
    "the largest possible": lambda p, gap, log_sum: 0 * log_sum + np.log(p.shape[1]),
}


@pytest.mark.parametrize("wrong", WRONG_ENTROPIES)
def test_wrong_entropies_are_rejected(wrong: str) -> None:
    names = {"classes_9", "large_offset", "near_uniform", "softcap", "class_mask"}
    if wrong == "of probabilities in bfloat16":
        names -= {"near_uniform"}  # 130 small gaps, of which the errors cancel
    for name in sorted(names):
        case = make_case(name, "float32")
        rows, cap = case.rows(), case.options.get("softcap")
        z = np.where(rows.allowed, rows.logits if cap is None else cap * np.tanh(rows.logits / cap), -np.inf)
        gap = np.max(z, axis=-1, keepdims=True) - z
        p = np.exp(-gap) / np.sum(np.exp(-gap), axis=-1, keepdims=True)
        gap, log_sum = np.where(rows.allowed, gap, 0), np.log(np.sum(np.exp(-gap), axis=-1))
        right = np.sum(p * gap, axis=-1) + log_sum
        assert_entropy(case, right, rows.counted, ARITHMETIC["jax"])
        with pytest.raises(AssertionError):
            assert_entropy(case, WRONG_ENTROPIES[wrong](p, gap, log_sum), rows.counted, ARITHMETIC["jax"])


def test_no_gradient_flows_through_them() -> None:
    jax_loss = lsce_jax.label_smoothed_cross_entropy_with_stats
    torch_loss = lsce_torch.label_smoothed_cross_entropy_with_stats
    logits, labels = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32), np.array([0, 1, 2, 3])
    for implementation in IMPLEMENTATIONS:

        def total(z: Any, implementation: str = implementation) -> Any:
            _, stats = jax_loss(z, labels, z_loss=0.1, implementation=implementation)
            return sum(value.sum() for value in stats[:5])

        assert not np.any(jax.grad(total)(logits))
        leaf = torch.from_numpy(logits).requires_grad_()
        loss, stats = torch_loss(leaf, torch.from_numpy(labels), z_loss=0.1, implementation=implementation)
        assert not any(value.requires_grad for value in stats)
        assert loss.requires_grad
