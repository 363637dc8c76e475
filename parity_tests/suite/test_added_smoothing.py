"""Smoothing that is added to losses without it: against the oracle, and with what would be wrong in it, rejected.

The unsmoothed losses are our linear loss, and those of Optax and torch of all logits. Other libraries' losses are in
`test_wrapped_losses.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lsce_jax
import lsce_torch
from parity_tests.losses.adapters import Adapter, JaxAdapter, TorchAdapter
from parity_tests.losses.registry import JAX_NARROW, TORCH_NARROW
from parity_tests.suite.added_smoothing import (
    NOT_ADDED,
    bounds_of_added,
    cross_entropy_of_logits,
    jax_added,
    optax_of_logits,
    ours_of_jax,
    ours_of_torch,
    torch_added,
)
from parity_tests.truth.comparison import Comparison, within
from parity_tests.truth.linear_cases import linear_case_names, make_linear_case
from parity_tests.truth.oracle import solve
from parity_tests.truth.precision import DTYPES

pytestmark = pytest.mark.usefixtures("one_thread")

of_jax = partial(JaxAdapter, linear=True)
of_torch = partial(TorchAdapter, linear=True)
ADAPTERS: dict[str, Adapter] = {
    "jax around ours": of_jax(jax_added(ours_of_jax), narrow=JAX_NARROW["chunked"]),
    "jax around optax": of_jax(jax_added(optax_of_logits), narrow=JAX_NARROW["reference"]),
    "torch around ours": of_torch(torch_added(ours_of_torch), narrow=TORCH_NARROW["chunked"]),
    "torch around cross_entropy": of_torch(torch_added(cross_entropy_of_logits), narrow=TORCH_NARROW["reference"]),
}
# What a layer of all logits does with rows that hold NaN, or with labels that are no class, is not ours to mend.
OF_OURS_ALONE = ("linear_where_none", "linear_where_mean", "linear_bad_labels")
CASES = [name for name in linear_case_names() if name not in NOT_ADDED]
ON_LOGITS = [name for name in CASES if name not in OF_OURS_ALONE]
# JAX compiles each for a second.
SOME = [
    f"linear_{name}"
    for name in ("none", "master_weight_mean", "smoothing_per_row", "where_mean", "class_weight", "prior", "z_loss")
]


def compare(adapter: Adapter, name: str, dtype: str) -> Comparison:
    case = make_linear_case(name, dtype)
    return within(case, solve(case), adapter(case), bounds_of_added(case, adapter.arithmetic))


def check(adapter: str, name: str, dtype: str) -> None:
    comparison = compare(ADAPTERS[adapter], name, dtype)
    assert comparison.agrees, comparison


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_torch(name: str, dtype: str) -> None:
    check("torch around ours", name, dtype)
    if name in ON_LOGITS:
        check("torch around cross_entropy", name, dtype)


@pytest.mark.parametrize(("name", "dtype"), [(name, "float32") for name in CASES] + [(name, "bfloat16") for name in SOME])
def test_jax(name: str, dtype: str) -> None:
    check("jax around ours", name, dtype)


@pytest.mark.parametrize("name", [name for name in SOME if name in ON_LOGITS])
def test_jax_around_optax(name: str) -> None:
    check("jax around optax", name, "float32")
