"""The three-way verdict in every case and dtype: JAX and torch against the oracle, and against each other."""

from functools import cache

import numpy as np
import pytest
import torch

from parity_tests.adapters import Adapter, JaxAdapter, TorchAdapter
from parity_tests.cases import case_names, make_case
from parity_tests.comparison import Result, against_each_other, against_oracle
from parity_tests.oracle import Truth, solve
from parity_tests.precision import DTYPES

ADAPTERS: dict[str, type[JaxAdapter] | type[TorchAdapter]] = {"jax": JaxAdapter, "torch": TorchAdapter}

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_case = pytest.mark.parametrize("name", case_names())


@cache
def adapter(name: str) -> Adapter:
    return ADAPTERS[name]()


@cache
def truth(name: str, dtype: str) -> Truth:
    return solve(make_case(name, dtype))


@cache
def result(framework: str, name: str, dtype: str) -> Result:
    return adapter(framework)(make_case(name, dtype))


@each_dtype
@each_case
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_against_oracle(framework: str, name: str, dtype: str) -> None:
    case = make_case(name, dtype)
    comparison = against_oracle(case, truth(name, dtype), result(framework, name, dtype), adapter(framework).arithmetic)
    assert comparison.agrees, comparison


@each_dtype
@each_case
def test_jax_against_torch(name: str, dtype: str) -> None:
    case = make_case(name, dtype)
    results = (result("jax", name, dtype), result("torch", name, dtype))
    arithmetic = (adapter("jax").arithmetic, adapter("torch").arithmetic)
    comparison = against_each_other(case, truth(name, dtype), results, arithmetic)
    assert comparison.agrees, comparison


# Without jit every operation rounds to memory; with it XLA fuses. Both must hold, on cases that use every option.
@each_dtype
@pytest.mark.parametrize("name", ["everything", "class_mask", "bad_labels", "soft_clamp", "axis_in_the_middle"])
def test_jax_eager(name: str, dtype: str) -> None:
    case, eager = make_case(name, dtype), JaxAdapter(jit=False)
    comparison = against_oracle(case, truth(name, dtype), eager(case), eager.arithmetic)
    assert comparison.agrees, comparison


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["everything", "class_mask", "bad_labels", "soft_clamp", "axis_in_the_middle"])
def test_torch_compiled(name: str, dtype: str) -> None:
    torch.compiler.reset()  # or the many combinations of options reach the limit of recompilations
    case, compiled = make_case(name, dtype), TorchAdapter(compiled=True)
    comparison = against_oracle(case, truth(name, dtype), compiled(case), compiled.arithmetic)
    assert comparison.agrees, comparison


@pytest.mark.parametrize("part", ["loss", "gradient"])
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_bounds_are_used(framework: str, part: str) -> None:
    """A bound that is never used past a few per cent protects nothing."""
    shares = []
    for name in case_names():
        case = make_case(name, "float32")
        outcome = result(framework, name, "float32")
        comparison = against_oracle(case, truth(name, "float32"), outcome, adapter(framework).arithmetic)
        shares.append(getattr(comparison, part))
    print(f"{framework} {part}: at most {max(shares):.2f} of the bound used, median {np.median(shares):.2f}")
    assert max(shares) > 0.1
