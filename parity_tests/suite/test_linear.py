"""The three-way verdict on the linear layer with the loss: JAX and torch against the oracle, and against each other.

Where the weight is the identity the logits are what comes in, bit for bit, so every case of the loss is one of the
linear loss, with the same oracle and bounds. The cases of `linear_cases` have layers of their own, and the bounds of
`linear_bounds`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lsce_jax
import lsce_torch
from parity_tests.faults.linear import LINEAR_FAULTS, evaluate_linear
from parity_tests.losses.adapters import Adapter, JaxAdapter, TorchAdapter
from parity_tests.losses.linear import JaxLinear, LinearAdapter, TorchLinear
from parity_tests.truth.bounds import Bound, error_bound
from parity_tests.truth.cases import Case, case_names, make_case
from parity_tests.truth.comparison import Result, within
from parity_tests.truth.linear_bounds import LinearResult, largest_logit_is_clear, linear_bound, shares
from parity_tests.truth.linear_cases import (
    PARTS,
    LinearCase,
    LinearTruth,
    linear_case_names,
    make_linear_case,
    solve_linear,
)
from parity_tests.truth.oracle import Exact, Truth, solve
from parity_tests.truth.precision import DTYPES, FORMATS, FloatArray, compute_dtype

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """To wait for other threads takes longer than to multiply matrices this small."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


# Part 1: the identity for a weight.

SOFT = "the linear loss takes class indices only"
INFINITE = "0 times infinity in the product, as in any linear layer"
NOT_APPLICABLE = {
    "soft_uniform": SOFT,
    "soft_non_target": SOFT,
    "soft_clamp": SOFT,
    "soft_max_sup": SOFT,
    "where_soft": SOFT,
    "class_weight_soft": SOFT,
    "prior_soft": SOFT,
    "axis_first": SOFT,
    "minus_infinity": INFINITE,
    "minus_infinity_unsmoothed": INFINITE,
    "class_mask": INFINITE,
    "class_mask_non_target": INFINITE,
    "class_mask_max_sup": INFINITE,
    "wide": "an identity of 262144 classes takes 256 GiB",
}
APPLICABLE = [name for name in case_names() if name not in NOT_APPLICABLE]
# JAX compiles each: of the sizes some are enough, and of the dtypes other than float32 some cases.
EVERY_OPTION = ["everything", "max_sup_mean", "axis_in_the_middle", "no_batch", "ignored"]
SIZES = [name for name in APPLICABLE if name.startswith("classes_")]
JAX_CASES = [(name, "float32") for name in APPLICABLE if name not in SIZES or name in {"classes_1", "classes_1009"}]
JAX_CASES += [(name, dtype) for dtype in DTYPES if dtype != "float32" for name in EVERY_OPTION]
CHUNK_SIZE = 4


def jax_identity(logits: Any, labels: Any, axis: int = -1, **options: Any) -> Any:
    """Return the linear loss of these logits."""
    hidden = jnp.moveaxis(logits, axis, -1)
    weight = jnp.eye(hidden.shape[-1], dtype=hidden.dtype)
    return lsce_jax.linear_label_smoothed_cross_entropy(hidden, weight, labels, chunk_size=CHUNK_SIZE, **options)


def torch_identity(chunk_size: int | None) -> Callable[..., Any]:
    def loss(logits: Any, labels: Any, axis: int = -1, **options: Any) -> Any:
        hidden = torch.movedim(logits, axis, -1)
        weight = torch.eye(hidden.shape[-1], dtype=hidden.dtype)
        return lsce_torch.linear_label_smoothed_cross_entropy(hidden, weight, labels, chunk_size=chunk_size, **options)

    return loss


@cache
def dense_adapter(name: str) -> Adapter:
    adapters: dict[str, Callable[[], Adapter]] = {
        "jax linear": lambda: JaxAdapter(jax_identity),
        "torch linear": lambda: TorchAdapter(torch_identity(CHUNK_SIZE)),
        "torch linear at once": lambda: TorchAdapter(torch_identity(None)),
        "jax dense": JaxAdapter,
        "torch dense": TorchAdapter,
    }
    return adapters[name]()


@cache
def dense_truth(name: str, dtype: str) -> Truth:
    return solve(make_case(name, dtype))


@cache
def dense_result(adapter: str, name: str, dtype: str) -> Result:
    return dense_adapter(adapter)(make_case(name, dtype))


def dense_bound(adapter: str, name: str, dtype: str) -> Bound:
    """Return the bound of the loss, and one more rounding of a narrow gradient, before it is scaled."""
    case, truth = make_case(name, dtype), dense_truth(name, dtype)
    bound = error_bound(case, truth, dense_adapter(adapter).arithmetic)
    if dtype == compute_dtype(dtype) or case.options.get("reduction", "none") == "none" or "linear" not in adapter:
        return bound
    size = np.abs(truth.gradient.high)
    half = FORMATS[dtype].smallest / 2 * np.abs(truth.factor)[:, None]
    return Bound(bound.loss, bound.gradient + np.where(size == 0, 0.0, FORMATS[dtype].roundoff * size + half))


def check_dense(adapter: str, name: str, dtype: str) -> None:
    case, truth, outcome = make_case(name, dtype), dense_truth(name, dtype), dense_result(adapter, name, dtype)
    comparison = within(case, truth, outcome, dense_bound(adapter, name, dtype))
    assert comparison.agrees, comparison


def check_dense_pair(first: str, second: str, name: str, dtype: str) -> None:
    case, truth = make_case(name, dtype), dense_truth(name, dtype)
    one, other = (dense_bound(adapter, name, dtype) for adapter in (first, second))
    both = Bound(one.loss + other.loss, one.gradient + other.gradient)
    results = [dense_result(adapter, name, dtype) for adapter in (first, second)]
    comparison = within(case, truth, results[0], both, results[1])
    assert comparison.agrees, comparison


def is_applicable(case: Case) -> bool:
    rows = case.rows()
    finite = bool(np.all(np.isfinite(rows.logits[rows.counted])))
    return case.labels.dtype.kind != "f" and finite and case.num_classes <= 4096


def test_cases_that_do_not_apply() -> None:
    """Every other case of the loss is one of the linear loss."""
    for dtype in DTYPES:
        assert {name for name in case_names() if not is_applicable(make_case(name, dtype))} == set(NOT_APPLICABLE)


@each_dtype
@pytest.mark.parametrize("name", APPLICABLE)
def test_torch_identity(name: str, dtype: str) -> None:
    for adapter in ("torch linear", "torch linear at once"):
        check_dense(adapter, name, dtype)
        check_dense_pair(adapter, "torch dense", name, dtype)


@pytest.mark.parametrize(("name", "dtype"), JAX_CASES)
def test_jax_identity(name: str, dtype: str) -> None:
    check_dense("jax linear", name, dtype)
    check_dense_pair("jax linear", "torch linear", name, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EVERY_OPTION)
def test_jax_identity_against_dense(name: str, dtype: str) -> None:
    check_dense_pair("jax linear", "jax dense", name, dtype)


# Part 2: layers of their own.

ADAPTERS: dict[str, LinearAdapter] = {
    "jax": JaxLinear(),
    "jax recompute": JaxLinear(recompute=True),
    "jax dense": JaxLinear(dense=True),
    "torch": TorchLinear(),
    "torch recompute": TorchLinear(recompute=True),
    "torch dense": TorchLinear(dense=True),
}
# JAX compiles each for most of a second.
SOME = [
    "sum",
    "master_weight_none",
    "master_weight_mean",
    "where_mean",
    "max_sup",
    "everything",
    "bias_offset",
    "no_rows",
]
JAX_LINEAR_CASES = [(name, dtype) for dtype in ("float32", "bfloat16") for name in linear_case_names()]
JAX_LINEAR_CASES += [(name, dtype) for dtype in ("float64", "float16") for name in SOME]
FEW = [(name, dtype) for dtype in ("float32", "bfloat16") for name in ("master_weight_mean", "everything")]
# In a dense layer 0 times what a row holds that does not count reaches the weight.
HOLDS_NAN = ("where_none", "where_mean", "everything")

case_of = cache(make_linear_case)


@cache
def truth_of(name: str, dtype: str) -> LinearTruth:
    return solve_linear(case_of(name, dtype))


@cache
def bound_of(adapter: str, name: str, dtype: str) -> dict[str, FloatArray]:
    case = case_of(name, dtype)
    return linear_bound(case, truth_of(name, dtype), ADAPTERS[adapter].arithmetic(case))


@cache
def result_of(adapter: str, name: str, dtype: str, whole: bool) -> LinearResult:
    """Return what an adapter gives, in chunks of the case's size, or with all rows in one."""
    case = case_of(name, dtype)
    return ADAPTERS[adapter](case, None if whole else case.chunk_size)


def assert_within(used: dict[str, float]) -> None:
    assert max(used.values()) <= 1, used


def check(adapter: str, name: str, dtype: str, whole: bool = False) -> None:
    case, result = case_of(name, dtype), result_of(adapter, name, dtype, whole)
    assert_within(shares(case, truth_of(name, dtype).parts, result, bound_of(adapter, name, dtype)))


def between(
    case: LinearCase, one: LinearResult, other: LinearResult, bounds: tuple[dict[str, FloatArray], ...]
) -> dict[str, float]:
    """Return the shares of the sum of their bounds by which two results differ."""
    expected = {part: Exact(values, np.zeros_like(values)) for part, values in other.parts.items()}
    return shares(case, expected, one, {part: bounds[0][part] + bounds[1][part] for part in expected})


def check_pair(first: tuple[str, bool], second: tuple[str, bool], name: str, dtype: str) -> None:
    results = [result_of(adapter, name, dtype, whole) for adapter, whole in (first, second)]
    bounds = tuple(bound_of(adapter, name, dtype) for adapter, _ in (first, second))
    assert_within(between(case_of(name, dtype), results[0], results[1], bounds))


@each_dtype
@pytest.mark.parametrize("name", linear_case_names())
def test_torch_against_oracle(name: str, dtype: str) -> None:
    """And whether the chunk size, or when the gradient is computed, matters."""
    check("torch", name, dtype)
    for other in (("torch", True), ("torch recompute", False)):
        check(other[0], name, dtype, other[1])
        check_pair(("torch", False), other, name, dtype)


@pytest.mark.parametrize(("name", "dtype"), JAX_LINEAR_CASES)
def test_jax_against_oracle(name: str, dtype: str) -> None:
    check("jax", name, dtype)


@pytest.mark.parametrize(("name", "dtype"), JAX_LINEAR_CASES)
def test_jax_against_torch(name: str, dtype: str) -> None:
    check_pair(("jax", False), ("torch", False), name, dtype)


@pytest.mark.parametrize(("name", "dtype"), FEW)
def test_jax_in_one_chunk_and_computed_again(name: str, dtype: str) -> None:
    for other in (("jax", True), ("jax recompute", False)):
        check(other[0], name, dtype, other[1])
        check_pair(("jax", False), other, name, dtype)


@each_dtype
@pytest.mark.parametrize("name", [name for name in linear_case_names() if name not in HOLDS_NAN])
def test_torch_against_dense(name: str, dtype: str) -> None:
    check("torch dense", name, dtype)
    check_pair(("torch", False), ("torch dense", False), name, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["none", "master_weight_mean", "max_sup", "softcap"])
def test_jax_against_dense(name: str, dtype: str) -> None:
    check("jax dense", name, dtype)
    check_pair(("jax", False), ("jax dense", False), name, dtype)


@pytest.mark.parametrize(("adapter", "dtypes"), [("jax", ("float32", "bfloat16")), ("torch", DTYPES)])
def test_linear_bounds_are_used(adapter: str, dtypes: tuple[str, ...]) -> None:
    """A bound that is never used past a few per cent protects nothing."""
    for dtype in dtypes:
        used: dict[str, list[float]] = {part: [] for part in PARTS}
        for name in linear_case_names():
            case, result = case_of(name, dtype), result_of(adapter, name, dtype, False)
            of_case = shares(case, truth_of(name, dtype).parts, result, bound_of(adapter, name, dtype))
            for part, share in of_case.items():
                used[part].append(share)
        for part, values in used.items():
            print(f"{adapter} {dtype} {part}: at most {max(values):.2f}, median {np.median(values):.2f}")
            assert max(values) > 0.05


def test_largest_logits_are_clear() -> None:
    for dtype in DTYPES:
        assert largest_logit_is_clear(case_of("max_sup", dtype), truth_of("max_sup", dtype))


# Part 3: what proves that these bounds reject what is wrong.


@cache
def sound(name: str, dtype: str) -> LinearResult:
    return evaluate_linear(case_of(name, dtype))


def judgements(name: str, dtype: str, result: LinearResult) -> dict[str, float]:
    """Return the largest share of each kind of bound that a result uses."""
    case, parts = case_of(name, dtype), truth_of(name, dtype).parts
    bounds = (bound_of("jax", name, dtype), bound_of("torch", name, dtype))
    return {
        "jax": max(shares(case, parts, result, bounds[0]).values()),
        "torch": max(shares(case, parts, result, bounds[1]).values()),
        "each other": max(between(case, result, sound(name, dtype), bounds).values()),
    }


@each_dtype
def test_sound_linear_loss_passes(dtype: str) -> None:
    for name in linear_case_names():
        assert max(judgements(name, dtype, sound(name, dtype)).values()) <= 1, name


@each_dtype
@pytest.mark.parametrize("fault", LINEAR_FAULTS)
def test_linear_fault_is_rejected(fault: str, dtype: str) -> None:
    """By every kind of assertion; where no rounding to a narrow dtype may hide it, in all cases that it changes."""
    used: dict[str, list[float]] = {"jax": [], "torch": [], "each other": []}
    for name in linear_case_names():
        result = evaluate_linear(case_of(name, dtype), fault)
        parts = sound(name, dtype).parts
        if any(not np.array_equal(values, parts[part], equal_nan=True) for part, values in result.parts.items()):
            for assertion, share in judgements(name, dtype, result).items():
                used[assertion].append(share)
    for assertion, of_changed in used.items():
        rejected = [share for share in of_changed if share > 1]
        nearest, largest = (pick(rejected, default=0.0) for pick in (min, max))
        count = f"rejected in {len(rejected)} of {len(of_changed)}"
        print(f"{dtype} {fault}, {assertion}: {count}, nearest {nearest:.3g}, largest {largest:.3g}")
        assert rejected, LINEAR_FAULTS[fault]
        assert dtype != compute_dtype(dtype) or len(rejected) == len(of_changed), LINEAR_FAULTS[fault]


def test_wrong_shapes_and_dtypes_are_rejected() -> None:
    case, parts = case_of("mean", "float32"), truth_of("mean", "float32").parts
    bound, result = bound_of("torch", "mean", "float32"), sound("mean", "float32")
    for wrong in (
        replace(result, dtypes={**result.dtypes, "weight": "bfloat16"}),
        replace(result, parts={**result.parts, "weight": result.parts["weight"].T}),
        replace(result, parts={part: values for part, values in result.parts.items() if part != "hidden"}),
    ):
        assert max(shares(case, parts, wrong, bound).values()) == np.inf
