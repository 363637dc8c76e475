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
from parity_tests.suite.chosen import CHOSEN
from parity_tests.suite.jax_results import STATISTICS_DTYPES, statistics_of
from parity_tests.suite.jax_results import statistics as jax_statistics
from parity_tests.suite.stats_truth import ARITHMETIC, assert_entropy, assert_statistics, torch_statistics
from parity_tests.truth.cases import case_names, make_case
from parity_tests.truth.precision import round_to


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
