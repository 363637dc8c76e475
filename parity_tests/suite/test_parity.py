"""The three-way verdict in every case and dtype: JAX and torch against the oracle, and against each other.

What passes here is what the README's support matrix says.
"""

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from lsce_jax import cpu
from lsce_jax.row_sums import row_sums
from lsce_spec import IMPLEMENTATIONS
from lsce_torch import lean
from parity_tests.evidence.cards import find_device
from parity_tests.losses.adapters import Adapter
from parity_tests.losses.registry import make_adapter
from parity_tests.plugin import Recorder
from parity_tests.studies.verdicts import examine
from parity_tests.suite import jax_results
from parity_tests.suite.chosen import CHOSEN, EVERY_OPTION
from parity_tests.suite.large_logits import PLAIN, assert_right_near_the_largest_number
from parity_tests.truth.cases import case_names, make_case
from parity_tests.truth.comparison import AnyResult, against_each_other, against_oracle
from parity_tests.truth.oracle import Truth, solve
from parity_tests.truth.precision import DTYPES

ADAPTERS = [f"{framework}-{implementation}" for framework in ("jax", "torch") for implementation in IMPLEMENTATIONS]

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_case = pytest.mark.parametrize("name", case_names())
# JAX compiles each case. The other dtypes differ from float32 by their precision only: most are slow tests.
QUICK = {"float32": case_names(), "bfloat16": CHOSEN, "float64": EVERY_OPTION, "float16": EVERY_OPTION}
each_dtype_of_each_case = pytest.mark.parametrize(("name", "dtype"), [
    pytest.param(name, dtype, marks=[] if name in QUICK[dtype] else [pytest.mark.slow])
    for name, dtype in product(case_names(), DTYPES)
])  # fmt: skip
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@cache
def adapter(name: str, device: str) -> Adapter:
    return make_adapter(name, device)


@cache
def truth(name: str, dtype: str) -> Truth:
    return solve(make_case(name, dtype))


@cache
def result(framework: str, name: str, dtype: str, device: str) -> AnyResult:
    package, _, implementation = framework.partition("-")
    if package == "jax":
        return jax_results.result(implementation, name, dtype, device)
    return adapter(framework, device)(make_case(name, dtype))


@each_dtype_of_each_case
@pytest.mark.parametrize("framework", ADAPTERS)
def test_against_oracle(framework: str, name: str, dtype: str, parity_ledger: Recorder) -> None:
    parity_ledger.record(framework, "cpu", dtype, "executed")
    case = make_case(name, dtype)
    outcome = result(framework, name, dtype, "cpu")
    comparison = against_oracle(case, truth(name, dtype), outcome, adapter(framework, "cpu").arithmetic)
    assert comparison.agrees, comparison


# Plain smoothing has several ways in torch; sizes and other options decide. Each must hold wherever it could be taken.
WAYS: dict[str, dict[str, int]] = {
    "operations": {"_FEW": 2**30, "_FEWEST": 2**30},
    "few, gradient with the loss": {"_FEW": 2**30, "_FEWEST": 0},
    "blocks": {"_FEW": 0, "_BLOCK_SIZE": 64},
    "blocks of many classes": {"_FEW": 0, "_BLOCK_SIZE": 64, "_SEQUENTIAL": 0},
    "sweeps": {"_ENABLED": False},
}


@each_dtype
@each_case
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_torch(way: str, name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, value in WAYS[way].items():
        monkeypatch.setattr(lean, setting, value)
    case, fused = make_case(name, dtype), adapter("torch-fused", "cpu")
    comparison = against_oracle(case, truth(name, dtype), fused(case), fused.arithmetic)
    assert comparison.agrees, comparison


# The ways of JAX on CPUs for many logits, where the number of classes decides. What a few take is what the others test.
JAX_WAYS: dict[str, dict[str, Any]] = {
    "columns": {"_FEW_CLASSES": 2**30},
    "one group": {"_FEW_CLASSES": 0, "_FEW_IN_A_GROUP": 2**30},
    # Most numbers of classes leave a rest.
    "groups": {
        "_FEW_CLASSES": 0,
        "_FEW_IN_A_GROUP": 0,
        "_MANY_CLASSES": 1,
        "_BLOCK_SIZE": 64,
        "_WINDOW_SIZE": 8,
        "_group_size": lambda num_classes: num_classes // 4 + 1,
    },
    "blocks": {"_FEW_CLASSES": 0, "_FEW_IN_A_GROUP": 0, "_MANY_CLASSES": 2**30, "_BLOCK_SIZE": 64},
}


def is_plain(name: str) -> bool:
    """Whether a case takes these ways: no option changes the sums. Very many classes would compile for minutes."""
    case = make_case(name, "float32")
    vectors = (case.class_weight, case.class_mask, case.prior)
    has_options = "softcap" in case.options or case.options.get("convention") == "max_sup"
    is_soft = np.issubdtype(case.labels.dtype, np.floating)
    return not (has_options or is_soft or case.num_classes > 500 or any(vector is not None for vector in vectors))


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    row_sums.clear_cache()
    yield
    row_sums.clear_cache()


@pytest.mark.parametrize(("way", "dtype", "name"), [
    pytest.param(*each, marks=[] if each[:2] == ("groups", "float32") and each[2] in CHOSEN else [pytest.mark.slow])
    for each in product(JAX_WAYS, ["float32", "bfloat16"], filter(is_plain, case_names()))
])  # fmt: skip
@pytest.mark.usefixtures("compiled_anew")
def test_every_way_of_jax(way: str, dtype: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_FEW_LOGITS", 0)
    for setting, value in JAX_WAYS[way].items():
        monkeypatch.setattr(cpu, setting, value)
    case, fused = make_case(name, dtype), adapter("jax-fused", "cpu")
    comparison = against_oracle(case, truth(name, dtype), fused(case), fused.arithmetic)
    assert comparison.agrees, comparison


@each_dtype_of_each_case
@each_implementation
def test_jax_against_torch(implementation: str, name: str, dtype: str, parity_ledger: Recorder) -> None:
    pair = (f"jax-{implementation}", f"torch-{implementation}")
    for framework in pair:
        parity_ledger.record(framework, "cpu", dtype, "executed")
    case = make_case(name, dtype)
    results = (result(pair[0], name, dtype, "cpu"), result(pair[1], name, dtype, "cpu"))
    arithmetic = (adapter(pair[0], "cpu").arithmetic, adapter(pair[1], "cpu").arithmetic)
    comparison = against_each_other(case, truth(name, dtype), results, arithmetic)
    assert comparison.agrees, comparison


# Without jit every operation rounds to memory; with it XLA fuses. Both must hold, on cases that use every option.
@each_implementation
@pytest.mark.parametrize(("name", "dtype"), [
    pytest.param(*each, marks=[] if "everything" in each or "float32" in each else [pytest.mark.slow])
    for each in product(EVERY_OPTION, DTYPES)
])  # fmt: skip
def test_jax_eager(name: str, implementation: str, dtype: str, parity_ledger: Recorder) -> None:
    parity_ledger.record(f"jax-{implementation}-eager", "cpu", dtype, "executed")
    case, eager = make_case(name, dtype), adapter(f"jax-{implementation}-eager", "cpu")
    comparison = against_oracle(case, truth(name, dtype), eager(case), eager.arithmetic)
    assert comparison.agrees, comparison


# Each of these compiles for seconds, so two of the dtypes have one case.
@each_implementation
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *product(["everything"], DTYPES),
        *(
            pytest.param(name, dtype, marks=pytest.mark.slow)
            for name, dtype in product(EVERY_OPTION, ["float32", "bfloat16"])
            if name != "everything"
        ),
    ],
)
def test_torch_compiled(name: str, implementation: str, dtype: str, parity_ledger: Recorder) -> None:
    parity_ledger.record(f"torch-{implementation}-compiled", "cpu", dtype, "executed")
    case, compiled = make_case(name, dtype), adapter(f"torch-{implementation}-compiled", "cpu")
    comparison = against_oracle(case, truth(name, dtype), compiled(case), compiled.arithmetic)
    assert comparison.agrees, comparison


def test_more_cases_than_the_compiler_keeps() -> None:
    compiled = adapter("torch-reference-compiled", "cpu")
    with torch._dynamo.config.patch(recompile_limit=1):
        for name in ("one_row", "classes_3", "no_batch"):
            outcome = examine(compiled, make_case(name, "float32"), truth(name, "float32"))
            assert outcome.status == "agree", outcome


@pytest.mark.parametrize("part", ["loss", "gradient"])
@pytest.mark.parametrize("framework", ADAPTERS)
def test_bounds_are_used(framework: str, part: str) -> None:
    """A bound that is never used past a few per cent protects nothing."""
    shares = []
    for name in case_names():
        case = make_case(name, "float32")
        outcome = result(framework, name, "float32", "cpu")
        comparison = against_oracle(case, truth(name, "float32"), outcome, adapter(framework, "cpu").arithmetic)
        shares.append(getattr(comparison, part))
    print(f"{framework} {part}: at most {max(shares):.2f} of the bound used, median {np.median(shares):.2f}")
    assert max(shares) > 0.1


# On the CPU the results are those of the tests above; elsewhere these tests make the first.
@pytest.mark.parity_framework("jax")
@each_dtype
@each_implementation
def test_jax_on_each_device(implementation: str, dtype: str, parity_device: str, parity_ledger: Recorder) -> None:
    check_every_case(f"jax-{implementation}", parity_device, dtype, parity_ledger)


@pytest.mark.parity_framework("torch")
@each_dtype
@each_implementation
@pytest.mark.parametrize(  # torch itself has no TPU
    "parity_device", [pytest.param(device, marks=pytest.mark.parity_device(device)) for device in ("cpu", "cuda")]
)
def test_torch_on_each_device(implementation: str, dtype: str, parity_device: str, parity_ledger: Recorder) -> None:
    check_every_case(f"torch-{implementation}", parity_device, dtype, parity_ledger)


def check_every_case(framework: str, device: str, dtype: str, parity_ledger: Recorder) -> None:
    card = find_device(framework.partition("-")[0], device)
    parity_ledger.record(framework, device, dtype, "executed", card)
    wrong, arithmetic = {}, adapter(framework, device).arithmetic
    # On the CPU test_against_oracle has all cases, most of the other dtypes as slow tests.
    for name in QUICK[dtype] if device == "cpu" else case_names():
        outcome = result(framework, name, dtype, device)
        comparison = against_oracle(make_case(name, dtype), truth(name, dtype), outcome, arithmetic)
        if not comparison.agrees:
            wrong[name] = comparison
    assert not wrong


# --- Logits near the largest number ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "copies"), [("float32", 1), ("bfloat16", 1), ("float32", 64)])
@pytest.mark.parametrize("framework", ADAPTERS)
def test_logits_near_the_largest_number(framework: str, dtype: str, copies: int) -> None:
    assert_right_near_the_largest_number(adapter(framework, "cpu"), dtype, copies=copies)


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_torch_near_the_largest_number(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, value in WAYS[way].items():
        monkeypatch.setattr(lean, setting, value)
    assert_right_near_the_largest_number(adapter("torch-fused", "cpu"), copies=4, names=PLAIN)


@pytest.mark.parametrize("way", JAX_WAYS)
@pytest.mark.usefixtures("compiled_anew")
def test_ways_of_jax_near_the_largest_number(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_FEW_LOGITS", 0)
    for setting, value in JAX_WAYS[way].items():
        monkeypatch.setattr(cpu, setting, value)
    assert_right_near_the_largest_number(adapter("jax-fused", "cpu"), copies=4, names=PLAIN)
