"""Smoothing that is added to losses without it: against the oracle, and with what would be wrong in it, rejected.

The unsmoothed losses are our linear loss, and those of Optax and torch of all logits. Other libraries' losses are in
`test_wrapped_losses.py`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lsce_jax
import lsce_jax.smoothing
import lsce_torch
import lsce_torch.smoothing
from parity_tests.losses.adapters import Adapter, JaxAdapter, TorchAdapter
from parity_tests.losses.registry import JAX_NARROW, TORCH_NARROW
from parity_tests.losses.wrapped import (
    cross_entropy_of_logits,
    jax_added,
    optax_of_logits,
    ours_of_jax,
    ours_of_torch,
    torch_added,
)
from parity_tests.suite.added_smoothing import NOT_ADDED, bounds_of_added, dense_bounds_of_added, torch_dense_added
from parity_tests.truth.cases import Case, case_names, make_case
from parity_tests.truth.comparison import Comparison, bounds_of, within
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
CASES = [name for name in linear_case_names() if name not in NOT_ADDED]
# What a layer of all logits does with rows that hold NaN, or with labels that are no class, is not ours to mend.
ON_LOGITS = [n for n in CASES if n not in ("linear_where_none", "linear_where_mean", "linear_bad_labels")]
# JAX compiles each for a second.
SOME = [
    f"linear_{name}"
    for name in ("master_weight_none", "smoothing_per_row", "where_mean", "class_weight", "class_mask", "z_loss")
]


def compare(adapter: Adapter, name: str, dtype: str) -> Comparison:
    case = make_linear_case(name, dtype)
    return within(case, solve(case), adapter(case), bounds_of_added(case, adapter.arithmetic))


def check(adapter: str, name: str, dtype: str) -> None:
    comparison = compare(ADAPTERS[adapter], name, dtype)
    print(f"{adapter}: {comparison.share:.2f} of the bounds of {name} in {dtype}")
    assert comparison.agrees, comparison


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_torch(name: str, dtype: str) -> None:
    check("torch around ours", name, dtype)
    if name in ON_LOGITS:
        check("torch around cross_entropy", name, dtype)


@pytest.mark.parametrize("name", SOME)
def test_jax(name: str) -> None:
    check("jax around ours", name, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_jax_in_every_dtype(name: str, dtype: str) -> None:
    check("jax around ours", name, dtype)


@pytest.mark.parametrize("name", [name for name in CASES if name in ON_LOGITS])
@pytest.mark.slow
def test_jax_around_optax(name: str) -> None:
    check("jax around optax", name, "float32")


def test_bounds_of_float32_are_those_of_the_linear_loss() -> None:
    """Smoothing from outside needs no more room, but where gradients are narrow and rounded twice."""
    arithmetic = ADAPTERS["torch around ours"].arithmetic
    case = make_linear_case("linear_none", "float32")
    bounds, plain = bounds_of_added(case, arithmetic), bounds_of(case, solve(case), arithmetic)
    assert all(np.array_equal(bounds[part], plain[part]) for part in plain)
    case = make_linear_case("linear_none", "bfloat16")
    bounds, plain = bounds_of_added(case, arithmetic), bounds_of(case, solve(case), arithmetic)
    assert all(np.all(bounds[part] > plain[part]) == (part != "loss") for part in plain)


# --- The dense loss, from its numbers -------------------------------------------------------------------------------


def applies(case: Case) -> bool:
    options = case.options
    is_soft = case.labels.dtype.kind == "f"
    return not (
        is_soft or case.has_row_masks or options.get("subtract_entropy") or options.get("convention") == "max_sup"
    )


def of_rows(name: str, dtype: str) -> Case:
    """Return a case whose losses are not reduced: that is the caller's."""
    case = make_case(name, dtype)
    options = {key: value for key, value in case.options.items() if key not in ("reduction", "denominator")}
    upstream = None if case.upstream is None or not case.upstream.ndim else case.upstream
    return replace(case, options=options, upstream=upstream)


# One case takes 256k classes.
DENSE = [name for name in case_names() if name != "wide" and applies(make_case(name, "float32"))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DENSE)
def test_dense(name: str, dtype: str) -> None:
    case, adapter = of_rows(name, dtype), TorchAdapter(torch_dense_added)
    comparison = within(case, solve(case), adapter(case), dense_bounds_of_added(case, adapter.arithmetic))
    assert comparison.agrees, comparison


@pytest.mark.parametrize("options", [
    {},
    {"convention": "non_target", "num_classes": 7},
    {"convention": "clamp", "num_classes": 7, "z_loss": 0.01},
    {"convention": "clamp", "num_classes": 1},
    {"label_weight": np.array([0.5, 2.0, 0.0], np.float32), "mean_weight": 1.25},
    {"label_weight": np.array([0.5, 2.0, 0.0], np.float32), "mean_weight": np.array([0.5, 1, 2], np.float32)},
    {"smoothing": np.array([0.0, 0.3, 1.0], np.float32), "where": np.array([True, False, True])},
])  # fmt: skip
def test_both_frameworks_compute_the_same_of_the_numbers(options: dict[str, Any]) -> None:
    """Each rounds four times or less on the way to a term, and three times in the sum."""
    nll, label, mean = (np.array(v, np.float32) for v in ([0.3, 1.7, 4.0], [2.0, -1.0, 0.5], [-0.25, 0.125, 3.0]))
    ours = np.asarray(lsce_jax.add_smoothing(nll, label, mean, **options))
    tensors = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in options.items()}
    theirs = lsce_torch.add_smoothing(*map(torch.from_numpy, (nll, label, mean)), **tensors).numpy()
    sizes = 2.0 * (nll + np.abs(label) + np.abs(mean)) + 0.01 * (nll + label) ** 2
    assert ours.dtype == theirs.dtype == np.float32
    assert np.all(np.abs(ours - theirs) <= 2 * 7 * 2.0**-24 * sizes)


# --- What is wrong is rejected --------------------------------------------------------------------------------------


def with_options(change: Callable[[dict[str, Any]], dict[str, Any]], framework: Any = lsce_torch) -> Any:
    """Return `linear_add_smoothing` with other options than those it is given."""
    return lambda *operands, **options: framework.linear_add_smoothing(*operands, **change(dict(options)))


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda options: {key: value for key, value in options.items() if key != name}


def detached(*names: str) -> Any:
    places = [("nll", "hidden", "weight", "labels").index(name) for name in names]

    def add(*operands: Any, **options: Any) -> Any:
        operands = tuple(of.detach() if place in places else of for place, of in enumerate(operands))
        return lsce_torch.linear_add_smoothing(*operands, **options)

    return add


def of_added_twice(nll: Any, *operands: Any, **options: Any) -> Any:
    return 2 * lsce_torch.linear_add_smoothing(nll, *operands, **options) - nll


def of_transposed(nll: Any, hidden: Any, weight: Any, labels: Any, **options: Any) -> Any:
    return lsce_torch.linear_add_smoothing(nll, hidden, weight.T, labels, **options)


# What is wrong, and a case that shows it.
WRONG: dict[str, tuple[Any, str]] = {
    "e for e K/(K-1)": (with_options(lambda o: {**o, "convention": "uniform"}), "linear_class_mask"),
    "e K/(K-1) for e": (with_options(lambda o: {**o, "convention": "non_target"}), "linear_mean"),
    "class_mask not applied": (with_options(without("class_mask")), "linear_class_mask"),
    "bias forgotten": (with_options(without("bias")), "linear_none"),
    "w forgotten": (with_options(without("class_weight")), "linear_class_weight"),
    "z_loss forgotten": (with_options(without("z_loss")), "linear_z_loss"),
    "prior forgotten": (with_options(without("prior")), "linear_prior"),
    "ignore_index forgotten": (with_options(without("ignore_index")), "linear_class_weight"),
    "where forgotten": (with_options(without("where")), "linear_where_none"),
    "smoothing of the first row": (
        with_options(lambda o: {**o, "smoothing": o["smoothing"][:1]}),
        "linear_smoothing_per_row",
    ),
    "added twice": (of_added_twice, "linear_none"),
    "mean over the other axis": (of_transposed, "linear_square"),
    "no gradient of hidden": (detached("hidden"), "linear_none"),
    "no gradient of the weight": (detached("weight"), "linear_none"),
    "no gradient of nll": (detached("nll"), "linear_none"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_smoothing_is_rejected(wrong: str) -> None:
    add, name = WRONG[wrong]
    for nll in (ours_of_torch, cross_entropy_of_logits):
        if name in ON_LOGITS or nll is ours_of_torch:
            assert compare(of_torch(torch_added(nll)), name, "float32").agrees
            assert not compare(of_torch(torch_added(nll, add)), name, "float32").agrees


def no_gradient_of_the_mean(products: Any, hidden: Any, weight: Any, labels: Any, *others: Any) -> Any:
    at_label = products(hidden, weight, labels, *others)[0]
    return at_label, products(hidden, weight.detach(), labels, *others)[1]


def no_gradient_at_the_label(products: Any, hidden: Any, weight: Any, labels: Any, *others: Any) -> Any:
    at_label = products(hidden, weight.detach(), labels, *others)[0]
    return at_label, products(hidden, weight, labels, *others)[1]


def next_label(products: Any, hidden: Any, weight: Any, labels: Any, *others: Any) -> Any:
    return products(hidden, weight, (labels + 1) % weight.shape[0], *others)[0], products(
        hidden, weight, labels, *others
    )[1]


def one_class_less(products: Any, hidden: Any, weight: Any, labels: Any, factor: Any, *others: Any) -> Any:
    return products(hidden, weight, labels, factor * (weight.shape[0] / (weight.shape[0] - 1)), *others)


def one_row_per_label(products: Any, hidden: Any, weight: Any, labels: Any, *others: Any) -> Any:
    """The gradients of equal labels overwrite each other."""
    at_label, mean = products(hidden, weight, labels, *others)
    rows = torch.arange(labels.numel())
    is_last = torch.stack([(labels[row:] == labels[row]).sum() == 1 for row in rows])
    return torch.where(is_last, at_label, at_label.detach()), mean


@pytest.mark.parametrize(
    "wrong", [no_gradient_of_the_mean, no_gradient_at_the_label, next_label, one_class_less, one_row_per_label]
)
def test_wrong_products_are_rejected(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    products = lsce_torch.smoothing._products
    monkeypatch.setattr(lsce_torch.smoothing, "_products", partial(wrong, products))
    for dtype in ("float32", "bfloat16"):
        assert not compare(ADAPTERS["torch around ours"], "linear_none", dtype).agrees


@pytest.mark.parametrize(("wrong", "name"), [
    (lambda o: {**o, "convention": "uniform"}, "linear_class_mask"),
    (without("bias"), "linear_master_weight_none"),
    (without("class_weight"), "linear_class_weight"),
])  # fmt: skip
def test_wrong_smoothing_of_jax_is_rejected(wrong: Any, name: str) -> None:
    adapter = of_jax(jax_added(ours_of_jax, with_options(wrong, lsce_jax)))
    assert not compare(adapter, name, "float32").agrees


def test_wrong_products_of_jax_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    products = lsce_jax.smoothing._products

    def transposed(hidden: Any, weight: Any, labels: Any, mean_column: Any) -> Any:
        return products(hidden, weight, labels, jnp.mean(weight, axis=0))

    monkeypatch.setattr(lsce_jax.smoothing, "_products", transposed)
    assert not compare(of_jax(jax_added(ours_of_jax)), "linear_square", "float32").agrees


@pytest.mark.parametrize(("wrong", "name"), [
    ({"num_classes": 12}, "non_target_none"),
    ({"convention": "uniform"}, "clamp_none"),
    ({"label_weight": None, "mean_weight": None}, "class_weight"),
    ({"mean_weight": 1.0}, "class_weight"),
    ({"z_loss": 0.0}, "z_loss"),
])  # fmt: skip
def test_wrong_numbers_are_rejected(wrong: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, adapter = of_rows(name, "float32"), TorchAdapter(torch_dense_added)
    bounds, add = dense_bounds_of_added(case, adapter.arithmetic), lsce_torch.add_smoothing
    assert within(case, solve(case), adapter(case), bounds).agrees
    monkeypatch.setattr(lsce_torch, "add_smoothing", lambda *given, **options: add(*given, **{**options, **wrong}))
    assert not within(case, solve(case), adapter(case), bounds).agrees
