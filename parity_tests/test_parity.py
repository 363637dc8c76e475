"""The three-way verdict in every case and dtype: JAX and torch against the oracle, and against each other."""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest
import torch

from lsce_spec import IMPLEMENTATIONS
from parity_tests.adapters import Adapter, JaxAdapter, TorchAdapter
from parity_tests.cases import case_names, make_case
from parity_tests.comparison import Result, against_each_other, against_oracle
from parity_tests.oracle import Truth, solve
from parity_tests.precision import DTYPES

ADAPTERS: dict[str, Callable[[], Adapter]] = {
    f"{framework}_{implementation}": partial(adapter, implementation=implementation)
    for framework, adapter in (("jax", JaxAdapter), ("torch", TorchAdapter))
    for implementation in IMPLEMENTATIONS
}

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
@pytest.mark.parametrize("framework", ADAPTERS)
def test_against_oracle(framework: str, name: str, dtype: str) -> None:
    case = make_case(name, dtype)
    comparison = against_oracle(case, truth(name, dtype), result(framework, name, dtype), adapter(framework).arithmetic)
    assert comparison.agrees, comparison


@each_dtype
@each_case
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_jax_against_torch(implementation: str, name: str, dtype: str) -> None:
    case = make_case(name, dtype)
    pair = (f"jax_{implementation}", f"torch_{implementation}")
    results = (result(pair[0], name, dtype), result(pair[1], name, dtype))
    arithmetic = (adapter(pair[0]).arithmetic, adapter(pair[1]).arithmetic)
    comparison = against_each_other(case, truth(name, dtype), results, arithmetic)
    assert comparison.agrees, comparison


# Without jit every operation rounds to memory; with it XLA fuses. Both must hold, on cases that use every option.
@each_dtype
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["everything", "class_mask", "bad_labels", "soft_clamp", "axis_in_the_middle"])
def test_jax_eager(name: str, implementation: str, dtype: str) -> None:
    case, eager = make_case(name, dtype), JaxAdapter(jit=False, implementation=implementation)
    comparison = against_oracle(case, truth(name, dtype), eager(case), eager.arithmetic)
    assert comparison.agrees, comparison


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["everything", "class_mask", "bad_labels", "soft_clamp", "axis_in_the_middle"])
def test_torch_compiled(name: str, implementation: str, dtype: str) -> None:
    torch.compiler.reset()  # or the many combinations of options reach the limit of recompilations
    case, compiled = make_case(name, dtype), TorchAdapter(compiled=True, implementation=implementation)
    comparison = against_oracle(case, truth(name, dtype), compiled(case), compiled.arithmetic)
    assert comparison.agrees, comparison


@pytest.mark.parametrize("part", ["loss", "gradient"])
@pytest.mark.parametrize("framework", ADAPTERS)
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
