"""Gradients of the statistics nll, lse and entropy, in both frameworks and all implementations, against the truth."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsce_jax
from lsce_spec import IMPLEMENTATIONS
from parity_tests.losses.adapters import operands_of
from parity_tests.suite.stats_truth import (
    ARITHMETIC,
    NAMES,
    STATISTICS,
    agrees,
    factors,
    in_rows,
    torch_gradients,
    truth_and_bounds_of,
)
from parity_tests.truth.cases import Case, make_case
from parity_tests.truth.oracle import Exact
from parity_tests.truth.precision import FloatArray

# Soft labels take the reference in every implementation, and float64 and float16 differ by their precision only.
DTYPES = ("float32", "bfloat16")
# JAX compiles each for a second or more, so the other cases are slow tests.
FEW = ("classes_33", "large_offset", "class_mask_of_rows", "bad_labels", "everything", "softcap")
RUNS = [pytest.param(name, dtype, marks=() if name in FEW else pytest.mark.slow) for name in NAMES for dtype in DTYPES]


def jax_gradients(implementation: str, case: Case) -> dict[str, Any]:
    arrays, options = operands_of(case)
    upstream = factors(case).astype("float64" if case.dtype == "float64" else "float32")

    def statistic(logits: Any, others: dict[str, Any], name: str) -> Any:
        stats = lsce_jax.label_smoothed_cross_entropy_with_stats(
            logits, **others, **options, implementation=implementation, differentiable=True
        )[1]
        return jnp.sum(getattr(stats, name) * upstream)

    @jax.jit
    def gradients(arrays: dict[str, Any]) -> list[Any]:
        others = {name: value for name, value in arrays.items() if name != "logits"}
        return [jax.grad(statistic)(arrays["logits"], others, name) for name in STATISTICS]

    arrays.pop("upstream")
    return dict(zip(STATISTICS, map(np.asarray, gradients(arrays)), strict=True))


@cache
def truth_and_bounds(name: str, dtype: str, framework: str) -> dict[str, tuple[Exact, FloatArray]]:
    return truth_and_bounds_of(make_case(name, dtype), ARITHMETIC[framework])


@pytest.mark.parametrize(("name", "dtype"), RUNS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_gradients(name: str, framework: str, implementation: str, dtype: str) -> None:
    case = make_case(name, dtype)
    found = {"jax": jax_gradients, "torch": torch_gradients}[framework](implementation, case)
    for statistic, (exact, bound) in truth_and_bounds(name, dtype, framework).items():
        assert agrees(exact, bound, in_rows(case, found[statistic])), statistic


WRONG = {
    "nll": {
        "the gradient of log-sum-exp": lambda p, gap, label: p,
        "the label left out": lambda p, gap, label: np.where(label, 0, p),
        "1 % too large": lambda p, gap, label: 1.01 * (p - label),
    },
    "lse": {
        "of the largest logit alone": lambda p, gap, label: (gap == 0) / np.sum(gap == 0, axis=-1, keepdims=True),
        "the gradient of the nll": lambda p, gap, label: p - label,
        "1 % too large": lambda p, gap, label: 1.01 * p,
    },
    "entropy": {
        "without the mean of the gaps": lambda p, gap, label: p * gap,
        "the other sign": lambda p, gap, label: p * (np.sum(p * gap, -1, keepdims=True) - gap),
        "with log-sum-exp left in": lambda p, gap, label: p * (gap - np.sum(p * gap, -1, keepdims=True) + 0.01),
        "1 % too large": lambda p, gap, label: 1.01 * p * (gap - np.sum(p * gap, -1, keepdims=True)),
        "in bits": lambda p, gap, label: p * (gap - np.sum(p * gap, -1, keepdims=True)) / np.log(2),
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_gradients_are_rejected(dtype: str) -> None:
    for name in ("classes_9", "classes_31", "classes_33", "class_mask"):
        case = make_case(name, dtype)
        rows = case.rows()
        z = np.where(rows.allowed, rows.logits, -np.inf)
        gap = np.max(z, axis=-1, keepdims=True) - z
        p = np.exp(-gap) / np.sum(np.exp(-gap), axis=-1, keepdims=True)
        gap, label = np.where(rows.allowed, gap, 0), np.arange(case.num_classes) == rows.labels[:, None]
        factor = factors(case).reshape(-1, 1)
        right = {"nll": p - label, "lse": p, "entropy": p * (gap - np.sum(p * gap, -1, keepdims=True))}
        for statistic, (exact, bound) in truth_and_bounds(name, dtype, "torch").items():
            assert agrees(exact, bound, factor * right[statistic])
            for fault, wrong in WRONG[statistic].items():
                assert not agrees(exact, bound, np.where(rows.allowed, factor * wrong(p, gap, label), 0)), fault
