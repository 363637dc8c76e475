"""The linear loss in both frameworks: against the oracle, against the dense loss, and against each other.

Where the weight is the identity the logits are what comes in, bit for bit, so every dense case is one of the linear
loss, with the same oracle and bounds. The cases of `linear_cases` have layers of their own, and the bounds of
`linear_bounds`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lsce_jax
import lsce_torch
from parity_tests.faults.linear import evaluate_linear
from parity_tests.losses.adapters import Adapter, JaxAdapter, TorchAdapter
from parity_tests.losses.registry import JAX_NARROW, TORCH_NARROW, make_adapter
from parity_tests.plugin import Recorder
from parity_tests.suite.large_logits import FIELDS, assert_right_near_the_largest_number
from parity_tests.truth.bounds import Bound, error_bound
from parity_tests.truth.cases import Case, case_names, make_case
from parity_tests.truth.comparison import AnyResult, Comparison, Parts, against_each_other, against_oracle, within
from parity_tests.truth.linear_bounds import largest_logit_is_clear
from parity_tests.truth.linear_cases import SOME, linear_case_names, make_linear_case
from parity_tests.truth.oracle import LinearTruth, solve
from parity_tests.truth.precision import DTYPES, FORMATS, compute_dtype

pytestmark = pytest.mark.usefixtures("one_thread")

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


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
    "class_mask_of_rows": INFINITE,
    "class_mask_of_rows_soft": SOFT,
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
    if "class_mask" in options and options["class_mask"].ndim > 1:
        options["class_mask"] = jnp.moveaxis(options["class_mask"], axis, -1)
    weight = jnp.eye(hidden.shape[-1], dtype=hidden.dtype)
    return lsce_jax.linear_label_smoothed_cross_entropy(hidden, weight, labels, chunk_size=CHUNK_SIZE, **options)


def torch_identity(chunk_size: int | None) -> Callable[..., Any]:
    def loss(logits: Any, labels: Any, axis: int = -1, **options: Any) -> Any:
        hidden = torch.movedim(logits, axis, -1)
        if "class_mask" in options and options["class_mask"].ndim > 1:
            options["class_mask"] = torch.movedim(options["class_mask"], axis, -1)
        weight = torch.eye(hidden.shape[-1], dtype=hidden.dtype)
        return lsce_torch.linear_label_smoothed_cross_entropy(hidden, weight, labels, chunk_size=chunk_size, **options)

    return loss


DENSE_ADAPTERS: dict[str, Adapter] = {
    "jax linear": JaxAdapter(jax_identity),
    "torch linear": TorchAdapter(torch_identity(CHUNK_SIZE)),
    "torch linear at once": TorchAdapter(torch_identity(None)),
    "jax dense": JaxAdapter(),
    "torch dense": TorchAdapter(),
}


@cache
def dense_result(adapter: str, name: str, dtype: str) -> AnyResult:
    return DENSE_ADAPTERS[adapter](make_case(name, dtype))


def dense_bounds(adapter: str, name: str, dtype: str) -> Parts:
    """Return the bounds of the loss, and one more rounding of a narrow gradient, before it is scaled."""
    case = make_case(name, dtype)
    truth = solve(case)
    bound = error_bound(case, truth, DENSE_ADAPTERS[adapter].arithmetic)
    if dtype == compute_dtype(dtype) or case.options.get("reduction", "none") == "none" or "linear" not in adapter:
        return bound.parts
    size = np.abs(truth.gradient.high)
    half = FORMATS[dtype].smallest / 2 * np.abs(truth.factor)[:, None]
    return Bound(bound.loss, bound.gradient + np.where(size == 0, 0.0, FORMATS[dtype].roundoff * size + half)).parts


def check_dense(adapter: str, name: str, dtype: str) -> None:
    case = make_case(name, dtype)
    result, bounds = dense_result(adapter, name, dtype), dense_bounds(adapter, name, dtype)
    comparison = within(case, solve(case), result, bounds)
    assert comparison.agrees, comparison


def check_dense_pair(first: str, second: str, name: str, dtype: str) -> None:
    case = make_case(name, dtype)
    one, other = (dense_bounds(adapter, name, dtype) for adapter in (first, second))
    results = [dense_result(adapter, name, dtype) for adapter in (first, second)]
    comparison = within(case, solve(case), results[0], {part: one[part] + other[part] for part in one}, results[1])
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
@pytest.mark.slow
def test_jax_identity(name: str, dtype: str) -> None:
    check_dense("jax linear", name, dtype)
    check_dense_pair("jax linear", "torch linear", name, dtype)


@pytest.mark.parametrize("adapter", ["torch linear", "torch linear at once", "jax linear"])
def test_logits_near_the_largest_number(adapter: str) -> None:
    hard = [name for name in FIELDS if name != "soft labels"]
    assert_right_near_the_largest_number(DENSE_ADAPTERS[adapter], names=hard)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EVERY_OPTION)
def test_jax_identity_against_dense(name: str, dtype: str) -> None:
    check_dense_pair("jax linear", "jax dense", name, dtype)


# Part 2: layers of their own.


def jax_dense(hidden: Any, weight: Any, labels: Any, bias: Any = None, **options: Any) -> Any:
    """Return the dense loss of logits in the compute dtype."""
    del options["chunk_size"]
    dtype = compute_dtype(hidden.dtype.name)
    logits = jnp.matmul(hidden, weight.astype(hidden.dtype), preferred_element_type=dtype)
    if bias is not None:
        logits = logits + bias.astype(dtype).reshape((1,) * (logits.ndim - 1) + (-1,))
    return lsce_jax.label_smoothed_cross_entropy(logits, labels, **options)


def torch_dense(hidden: Any, weight: Any, labels: Any, bias: Any = None, **options: Any) -> Any:
    del options["chunk_size"]
    bias = None if bias is None else bias.to(hidden.dtype)
    logits = torch.nn.functional.linear(hidden, weight.to(hidden.dtype), bias)
    return lsce_torch.label_smoothed_cross_entropy(logits, labels, **options)


JAX, TORCH = "jax-linear-chunked", "torch-linear-chunked"
JAX_REFERENCE, TORCH_REFERENCE = "jax-linear-reference", "torch-linear-reference"
jax_again = partial(lsce_jax.linear_label_smoothed_cross_entropy, recompute=True)
torch_again = partial(lsce_torch.linear_label_smoothed_cross_entropy, recompute=True)
ADAPTERS: dict[str, Adapter] = {
    **{name: make_adapter(name) for name in (JAX, TORCH, JAX_REFERENCE, TORCH_REFERENCE)},
    "jax recompute": JaxAdapter(jax_again, linear=True, narrow=JAX_NARROW["reference"]),
    "jax dense": JaxAdapter(jax_dense, linear=True, narrow=JAX_NARROW["reference"]),
    "torch recompute": TorchAdapter(torch_again, linear=True, narrow=TORCH_NARROW["chunked"]),
    "torch dense": TorchAdapter(torch_dense, linear=True, narrow=TORCH_NARROW["reference"]),
}
# JAX compiles each for most of a second. The dtypes differ by their precision only: most of one are slow tests.
JAX_LINEAR_CASES = [
    *product(linear_case_names(), ["float32"]),
    *product([*SOME, "linear_no_rows"], ["bfloat16", "float64", "float16"]),
    *(
        pytest.param(name, "bfloat16", marks=pytest.mark.slow)
        for name in linear_case_names()
        if name not in {*SOME, "linear_no_rows"}
    ),
]
FEW = [(f"linear_{name}", dtype) for dtype in ("float32", "bfloat16") for name in ("master_weight_mean", "everything")]
# In a dense layer 0 times what a row holds that does not count reaches the weight.
HOLDS_NAN = ("linear_where_none", "linear_where_mean", "linear_everything")


@cache
def result_of(adapter: str, name: str, dtype: str, whole: bool = False) -> AnyResult:
    """Return what an adapter gives, in chunks of the case's size, or with all rows in one."""
    case = make_linear_case(name, dtype)
    return ADAPTERS[adapter](replace(case, chunk_size=10**6) if whole else case)


def compare(adapter: str, name: str, dtype: str, whole: bool = False) -> Comparison:
    case = make_linear_case(name, dtype)
    return against_oracle(case, solve(case), result_of(adapter, name, dtype, whole), ADAPTERS[adapter].arithmetic)


def check(adapter: str, name: str, dtype: str, whole: bool = False, other: str | None = None) -> None:
    """Check a result against the truth, and against another adapter's."""
    comparison = compare(adapter, name, dtype, whole)
    assert comparison.agrees, comparison
    if other is not None:
        case, pair = make_linear_case(name, dtype), (ADAPTERS[adapter].arithmetic, ADAPTERS[other].arithmetic)
        results = (result_of(adapter, name, dtype, whole), result_of(other, name, dtype))
        comparison = against_each_other(case, solve(case), results, pair)
        assert comparison.agrees, comparison


@each_dtype
@pytest.mark.parametrize("name", linear_case_names())
def test_torch_against_oracle(name: str, dtype: str, parity_ledger: Recorder) -> None:
    """And whether the chunk size, or when the gradient is computed, or the implementation matters."""
    for adapter in (TORCH, TORCH_REFERENCE):
        parity_ledger.record(adapter, "cpu", dtype, "executed")
    check(TORCH, name, dtype)
    check(TORCH, name, dtype, whole=True, other=TORCH)
    check("torch recompute", name, dtype, other=TORCH)
    check(TORCH_REFERENCE, name, dtype, other=TORCH)


@pytest.mark.parametrize(("name", "dtype"), JAX_LINEAR_CASES)
def test_jax_against_oracle_and_torch(name: str, dtype: str, parity_ledger: Recorder) -> None:
    parity_ledger.record(JAX, "cpu", dtype, "executed")
    check(JAX, name, dtype, other=TORCH)


@each_dtype
@pytest.mark.parametrize("name", SOME)
def test_jax_reference(name: str, dtype: str, parity_ledger: Recorder) -> None:
    parity_ledger.record(JAX_REFERENCE, "cpu", dtype, "executed")
    check(JAX_REFERENCE, name, dtype, other=TORCH_REFERENCE)


@pytest.mark.parametrize(("name", "dtype"), [
    pytest.param(name, dtype, marks=[pytest.mark.slow] * (dtype != "float32")) for name, dtype in FEW
])  # fmt: skip
def test_jax_in_one_chunk_and_computed_again(name: str, dtype: str) -> None:
    check(JAX, name, dtype, whole=True, other=JAX)
    check("jax recompute", name, dtype, other=JAX)


@each_dtype
@pytest.mark.parametrize("name", [name for name in linear_case_names() if name not in HOLDS_NAN])
def test_torch_against_dense(name: str, dtype: str) -> None:
    check("torch dense", name, dtype, other=TORCH)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["none", "master_weight_mean", "max_sup", "softcap"])
def test_jax_against_dense(name: str, dtype: str) -> None:
    check("jax dense", f"linear_{name}", dtype, other=JAX)


@pytest.mark.parametrize(("adapter", "dtypes"), [(JAX, ("float32", "bfloat16")), (TORCH, DTYPES)])
def test_linear_bounds_are_used(adapter: str, dtypes: tuple[str, ...]) -> None:
    """A bound that is never used past a few per cent protects nothing."""
    for dtype in dtypes:
        used: dict[str, list[float]] = {part: [] for part in ("loss", "hidden", "weight", "bias")}
        for name in linear_case_names():
            for part, share in compare(adapter, name, dtype).shares.items():
                used[part].append(share)
        for part, values in used.items():
            print(f"{adapter} {dtype} {part}: at most {max(values):.2f}, median {np.median(values):.2f}")
            assert max(values) > 0.05


def test_largest_logits_are_clear() -> None:
    for dtype in DTYPES:
        case = make_linear_case("linear_max_sup", dtype)
        truth = solve(case)
        assert isinstance(truth, LinearTruth)
        assert largest_logit_is_clear(case, truth)


# Part 3: what proves that these bounds reject what is wrong. `meta/test_power.py` has all faults under looser bounds.


@each_dtype
@pytest.mark.parametrize("adapter", [JAX, TORCH])
def test_sound_linear_loss_passes(adapter: str, dtype: str) -> None:
    for name in linear_case_names():
        case = make_linear_case(name, dtype)
        comparison = against_oracle(case, solve(case), evaluate_linear(case), ADAPTERS[adapter].arithmetic)
        assert comparison.agrees, (name, comparison)


def test_wrong_shapes_and_dtypes_are_rejected() -> None:
    case = make_linear_case("linear_mean", "float32")
    truth, result, arithmetic = solve(case), evaluate_linear(case), ADAPTERS[TORCH].arithmetic
    assert against_oracle(case, truth, result, arithmetic).agrees
    for wrong in (
        replace(result, dtypes={**result.dtypes, "weight": "bfloat16"}),
        replace(result, parts={**result.parts, "weight": result.parts["weight"].T}),
        replace(result, parts={part: values for part, values in result.parts.items() if part != "hidden"}),
    ):
        comparison = against_oracle(case, truth, wrong, arithmetic)
        assert comparison.problem
        assert not comparison.agrees


def test_adapters_take_cases_of_their_kind() -> None:
    layer, dense = make_linear_case("linear_mean", "float32"), make_case("uniform_mean", "float32")
    for name in (TORCH, JAX):
        assert ADAPTERS[name].unsupported(layer) is None
        assert ADAPTERS[name].unsupported(dense) == "takes a linear layer, not logits"
    for name in ("torch-fused", "torch-cross-entropy"):
        assert make_adapter(name).unsupported(layer) == "takes logits, not a linear layer"
    assert make_adapter("mutant:linear_strided_rows").unsupported(dense) == "is a fault of linear layers"
    assert make_adapter("mutant:other_off").unsupported(layer) is None
