"""The statistics of a case and their gradients, held against the truth."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

import lsce_torch
from parity_tests.losses.adapters import JaxAdapter, TorchAdapter, operands_of, to_torch
from parity_tests.suite.jax_results import Statistics
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.bounds import error_bound
from parity_tests.truth.cases import Case, is_class
from parity_tests.truth.model import model_bound, solve_model
from parity_tests.truth.oracle import Exact, solve
from parity_tests.truth.precision import FORMATS, FloatArray, compute_dtype

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


def torch_statistics(implementation: str, case: Case) -> Statistics:
    arrays, options = operands_of(case)
    arrays.pop("upstream")
    tensors = {name: to_torch(value) for name, value in arrays.items()}
    loss, stats = lsce_torch.label_smoothed_cross_entropy_with_stats(
        **tensors, **options, implementation=implementation
    )
    return loss.numpy(), {name: value.numpy().reshape(-1) for name, value in stats._asdict().items()}


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


def factors(case: Case) -> FloatArray:
    """Return the incoming gradient of each row: powers of 2, by which the bounds can be multiplied."""
    generator = np.random.default_rng(0)
    return np.asarray(
        np.exp2(generator.integers(-2, 3, case.batch_shape)) * generator.choice([-1, 1], case.batch_shape)
    )


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
