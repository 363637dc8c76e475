"""Gradients of the statistics nll, lse and entropy, in both frameworks and all implementations, against the truth."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lsce_jax
import lsce_torch
from lsce_spec import IMPLEMENTATIONS
from parity_tests.losses.adapters import JaxAdapter, TorchAdapter, operands_of, to_torch
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.bounds import error_bound
from parity_tests.truth.cases import Case, make_case
from parity_tests.truth.model import model_bound, solve_model
from parity_tests.truth.oracle import Exact, solve
from parity_tests.truth.precision import FORMATS, FloatArray

ARITHMETIC = {"jax": JaxAdapter().arithmetic, "torch": TorchAdapter().arithmetic}
STATISTICS = ("nll", "lse", "entropy")
NAMES = (
    *("classes_1", "classes_33", "classes_1009", "large_logits", "large_offset", "dominant", "ties", "near_uniform"),
    *(
        "minus_infinity_unsmoothed",
        "class_mask",
        "class_mask_of_rows",
        "class_mask_of_groups",
        "class_mask_of_rows_soft",
    ),
    *("ignored", "where_soft", "denominator_of_zero", "no_rows", "bad_labels", "class_weight", "softcap"),
    *("everything", "axis_in_the_middle", "no_batch", "labels_int8"),
)
# Soft labels take the reference in every implementation, and float64 and float16 differ by their precision only.
DTYPES = ("float32", "bfloat16")
# JAX compiles each for a second or more, so the other cases are slow tests.
FEW = ("classes_33", "large_offset", "class_mask_of_rows", "bad_labels", "everything", "softcap")
RUNS = [pytest.param(name, dtype, marks=() if name in FEW else pytest.mark.slow) for name in NAMES for dtype in DTYPES]


def factors(case: Case) -> FloatArray:
    """Return the incoming gradient of each row: powers of 2, by which the bounds can be multiplied."""
    generator = np.random.default_rng(0)
    return np.asarray(
        np.exp2(generator.integers(-2, 3, case.batch_shape)) * generator.choice([-1, 1], case.batch_shape)
    )


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


def torch_gradients(implementation: str, case: Case) -> dict[str, Any]:
    arrays, options = operands_of(case)
    arrays.pop("upstream")
    tensors = {name: to_torch(value) for name, value in arrays.items()}
    logits = tensors.pop("logits").requires_grad_()
    _, stats = lsce_torch.label_smoothed_cross_entropy_with_stats(
        logits, **tensors, **options, implementation=implementation, differentiable=True
    )
    upstream = torch.from_numpy(factors(case)).to(stats.nll.dtype)
    found = {}
    for name in STATISTICS:
        (gradient,) = torch.autograd.grad(getattr(stats, name), logits, upstream, retain_graph=True)
        found[name] = gradient.double().numpy()
    return found


def in_rows(case: Case, gradient: Any) -> FloatArray:
    """Return a gradient with the classes last and the rows flattened."""
    return np.moveaxis(np.asarray(gradient, np.float64), case.axis, -1).reshape(-1, case.num_classes)


@cache
def truth_and_bounds(name: str, dtype: str, framework: str) -> dict[str, tuple[Exact, FloatArray]]:
    return truth_and_bounds_of(make_case(name, dtype), ARITHMETIC[framework])


def truth_and_bounds_of(case: Case, arithmetic: Arithmetic) -> dict[str, tuple[Exact, FloatArray]]:
    factor = factors(case).reshape(-1, 1)
    kept = {name: value for name, value in case.options.items() if name in ("softcap", "ignore_index")}
    unsmoothed = replace(case, options=kept, smoothing=0.0, class_weight=None, prior=None, upstream=factors(case))
    if case.options.get("denominator") == 0:
        unsmoothed, factor = replace(unsmoothed, where=np.zeros(case.batch_shape, bool)), 0 * factor
    of_nll, model, bound = solve(unsmoothed), solve_model(case), model_bound(case, arithmetic)
    # A narrow result that is rounded before it is multiplied may be subnormal.
    least = (factor != 0) * FORMATS[case.dtype].smallest

    def scaled(exact: Exact, error: FloatArray) -> tuple[Exact, FloatArray]:
        return Exact(exact.high * factor, exact.low * factor), np.where(error > 0, error * np.abs(factor) + least, 0)

    return {
        "nll": (of_nll.gradient, error_bound(unsmoothed, of_nll, arithmetic).gradient),
        "lse": scaled(model.lse_gradient, bound.lse_gradient),
        "entropy": scaled(model.entropy_gradient, bound.entropy_gradient),
    }


def agrees(exact: Exact, bound: FloatArray, values: FloatArray) -> bool:
    error = exact.error_of(values)
    return bool(np.all((error <= bound) | (error == 0)))


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
