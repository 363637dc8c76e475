"""The constants of the bounds, measured: elementary functions, the depth of sums, and the oracle's own accuracy."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import torch

from parity_tests.losses.adapters import JaxAdapter, TorchAdapter
from parity_tests.truth.arithmetic import Arithmetic, tree_depth
from parity_tests.truth.cases import make_case
from parity_tests.truth.oracle import solve
from parity_tests.truth.precision import FORMATS, ulp

ARITHMETIC: dict[str, Arithmetic] = {"jax": JaxAdapter().arithmetic, "torch": TorchAdapter().arithmetic}


def run(framework: str, function: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if framework == "torch":
        operation: Callable[[torch.Tensor], torch.Tensor] = getattr(torch, function)
        return operation(torch.from_numpy(values)).numpy()
    with jax.enable_x64(values.dtype == np.float64):
        return np.asarray(jax.jit(getattr(jnp, function))(values))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("function", ["exp", "log1p", "log", "tanh"])
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_elementary_functions(framework: str, function: str, dtype: str) -> None:
    generator = np.random.default_rng(0)
    values = {
        "exp": -np.concatenate([generator.uniform(0, 80, 2000), 10 ** generator.uniform(-8, 0, 500)]),
        "log1p": 10 ** generator.uniform(-12, 5.5, 2500),
        "log": generator.uniform(1e-6, 1, 2500),
        "tanh": generator.normal(size=2500) * 3,
    }[function].astype(dtype)
    with mpmath.workdps(40):
        exact = [getattr(mpmath, function)(mpmath.mpf(float(v))) for v in values]
        errors = [
            abs(e - mpmath.mpf(float(g))) / abs(e) for e, g in zip(exact, run(framework, function, values), strict=True)
        ]
        worst = float(max(errors)) / FORMATS[dtype].roundoff
    limit = getattr(ARITHMETIC[framework], function)
    print(f"{framework} {dtype} {function}: {worst:.2f} u of {limit} u")
    assert worst <= limit


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_exponentials_that_softmax_leaves(dtype: str) -> None:
    """The fused loss of torch takes exp from softmax, whose results share a factor that is divided out again."""
    generator = np.random.default_rng(0)
    limit, worst = ARITHMETIC["torch"].exp, 0.0
    for length in (2, 3, 17, 1000, 5003):
        gaps = np.concatenate([[0.0], generator.uniform(0, 60, length - 1)]).astype(dtype)
        p = torch.softmax(torch.from_numpy(-gaps), dim=-1)
        with mpmath.workdps(40):
            exact = [mpmath.exp(-mpmath.mpf(float(gap))) for gap in gaps]
            errors = [abs(e - mpmath.mpf(float(q))) / e for e, q in zip(exact, p / p[0], strict=True)]
            worst = max(worst, float(max(errors)) / FORMATS[dtype].roundoff)
    print(f"torch {dtype} exp within softmax: {worst:.2f} u of {limit} u")
    assert worst <= limit


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("length", [2, 9, 33, 127, 128, 129, 1009, 4096, 32768])
def test_depth_of_sums(framework: str, length: int) -> None:
    """2^24 swallows each 1 that is added to it alone: a lower bound of its additions, also for sums too long to count.

    `test_fingerprint` counts the additions exactly, up to 2047 terms.
    """
    generator = np.random.default_rng(length)
    for position in {0, length - 1, *generator.integers(length, size=4).tolist()}:
        values = np.ones((1, length), np.float32)
        values[0, position] = 2.0**24
        if framework == "torch":
            total = float(torch.from_numpy(values).sum(-1)[0])
        else:
            total = float(jax.jit(lambda array: array.sum(-1))(values)[0])
        missing = length - 1 - (total - 2.0**24)
        assert missing <= tree_depth(length)


def test_float64_serves_as_oracle_for_narrow_dtypes() -> None:
    """Where there are too many classes for 50 digits, float64 stands in: its error is nothing to a float32 bound."""
    for name in ("everything", "classes_1009", "large_logits", "softcap", "z_loss"):
        case = make_case(name, "float32")
        exact, double = solve(case), solve(case, maths=math)
        scale = np.maximum(np.abs(exact.loss.high), 1e-3)
        assert np.max(exact.loss.error_of(double.loss.high) / scale) < 1e-13
        assert np.max(exact.gradient.error_of(double.gradient.high)) < 1e-13


def test_ulp() -> None:
    for dtype, numpy_type in (("float64", np.float64), ("float32", np.float32), ("float16", np.float16)):
        values = np.array([1.0, 1.5, 2.0, 3e-3, 1000.0])
        np.testing.assert_array_equal(ulp(values, dtype), np.spacing(values.astype(numpy_type)).astype(np.float64))
