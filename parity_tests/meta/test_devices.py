"""The table of devices: names, units, what its numbers do to the bounds, and the page that shows it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity_tests.commands.devices import COMMAND, device_table
from parity_tests.evidence.pages import replace_block
from parity_tests.losses.adapters import JaxAdapter, TorchAdapter
from parity_tests.losses.registry import FaultyAdapter
from parity_tests.meta.running import invoke
from parity_tests.studies.bundle import read_bundle, record, write_bundle
from parity_tests.truth import devices, linear_bounds
from parity_tests.truth.arithmetic import ERRORS, FULL, Arithmetic, any_order, tree_depth
from parity_tests.truth.bounds import error_bound, last_rounding
from parity_tests.truth.cases import Case, make_case
from parity_tests.truth.devices import DEVICES, OWN_LOG1P, Device, arithmetic_of, device_of_kind
from parity_tests.truth.linear_bounds import linear_bound
from parity_tests.truth.linear_cases import make_linear_case
from parity_tests.truth.oracle import solve

# What JAX and torch call devices: jax/_src/pallas/mosaic/tpu_info.py, torch.cuda.get_device_name().
KINDS = [
    ("jax", "tpu", "TPU v4", "tpu-v4"),
    ("jax", "tpu", "TPU v5 lite", "tpu-v5e"),
    ("jax", "tpu", "TPU v5e", "tpu-v5e"),
    ("jax", "tpu", "TPU v5", "tpu-v5p"),
    ("jax", "tpu", "TPU v5p", "tpu-v5p"),
    ("jax", "tpu", "TPU v6 lite", "tpu-v6e"),
    ("jax", "tpu", "TPU v6e", "tpu-v6e"),
    ("torch", "tpu", "TPU7x", "tpu-v7x"),
    ("jax", "cuda", "NVIDIA A100-SXM4-40GB", "gpu-a100"),
    ("torch", "cuda", "NVIDIA H100 80GB HBM3", "gpu-h100"),
    ("torch", "cuda", "NVIDIA H200", "gpu-h100"),
    ("jax", "cuda", "NVIDIA B200", "gpu-b200"),
    ("torch", "cpu", "cpu", "cpu"),
]


def device_named(framework: str, name: str) -> Device:
    (device,) = (each for each in DEVICES if framework in each.frameworks and each.name == name)
    return device


@pytest.mark.parametrize(("framework", "family", "kind", "name"), KINDS)
def test_a_device_has_the_row_of_its_kind(framework: str, family: str, kind: str, name: str) -> None:
    assert device_of_kind(framework, family, kind) is device_named(framework, name)


@pytest.mark.parametrize(("family", "kind"), [("cuda", "Tesla T4"), ("tpu", "TPU v9")])
def test_an_unknown_device_has_the_largest_errors_of_its_family(family: str, kind: str) -> None:
    row = device_of_kind("jax", family, kind)
    family_rows = [each for each in DEVICES if each.family == family and "jax" in each.frameworks]
    assert row.name == kind
    for name in ERRORS:
        assert getattr(row.arithmetic, name) == max(getattr(each.arithmetic, name) for each in family_rows)
    assert row.arithmetic.matmul_bits == min(each.arithmetic.matmul_bits for each in family_rows)
    assert row.arithmetic.depth is any_order


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="no device 'abacus'; the devices are cpu, gpu-a100"):
        arithmetic_of("abacus")


def test_adapters_take_the_row_of_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert JaxAdapter().device_model is device_named("jax", "cpu")
    assert TorchAdapter().device_model is device_named("torch", "cpu")
    assert TorchAdapter().arithmetic.tanh == 2
    monkeypatch.setattr(JaxAdapter, "_device_kind", lambda self: "TPU v5 lite")
    narrow = frozenset({"logits"})
    arithmetic = JaxAdapter(device="tpu", narrow=narrow).arithmetic
    row = device_named("jax", "tpu-v5e").arithmetic
    assert arithmetic == replace(row, narrow=narrow, log1p=OWN_LOG1P)
    users = JaxAdapter(lambda *_: None, device="tpu", narrow=narrow)
    assert users.arithmetic == replace(row, narrow=narrow, exp_of_log=True)


def test_published_errors_are_in_units_of_the_roundoff() -> None:
    """A unit in the last place is up to two of them."""
    arithmetic = device_named("jax", "tpu-v5e").arithmetic
    assert (arithmetic.exp, arithmetic.log1p, arithmetic.division) == (232, 8068, 397)
    assert device_named("torch", "gpu-h100").arithmetic.division == 2


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: f"{device.frameworks[0]}-{device.name}")
def test_a_row_is_what_its_code_says(device: Device) -> None:
    (row,) = eval(device.as_code(), vars(devices) | {"tree_depth": tree_depth})
    assert row == device


# A case, and the errors that its bounds feel.
FELT: dict[str, tuple[dict[str, Any], set[str]]] = {
    "plain": ({}, {"exp", "log1p", "division", "depth"}),
    "softcap": ({"softcap": 3.0}, {"exp", "log1p", "division", "depth", "tanh"}),
    "entropy": ({"subtract_entropy": True}, {"exp", "log1p", "division", "depth", "log"}),
}


@pytest.mark.parametrize("name", FELT)
def test_bounds_grow_with_each_error_that_the_loss_feels(name: str) -> None:
    options, felt = FELT[name]
    case: Case = replace(make_case("classes_127", "float32"), options=options)
    truth = solve(case)

    def bounds(arithmetic: Arithmetic) -> np.ndarray[Any, Any]:
        bound = error_bound(case, truth, arithmetic)
        return np.array([bound.loss.sum(), bound.gradient.sum()])

    least = Arithmetic(depth=tree_depth)
    changed = {error: replace(least, **{error: getattr(least, error) + 10}) for error in ERRORS}
    changed["depth"] = replace(least, depth=any_order)
    grown = {error: bounds(arithmetic) / bounds(least) for error, arithmetic in changed.items()}
    assert {error for error, ratio in grown.items() if np.any(ratio > 1)} == felt
    assert all(np.all(ratio >= 1) for ratio in grown.values())


def test_an_inaccurate_quotient_adds_to_each_part_that_has_one() -> None:
    """To the target, in the loss twice and in the gradient once; to p twice; and to the factor of the reduction."""
    case = replace(make_case("classes_127", "float32"), options={"reduction": "none"})
    truth, more, u = solve(case), 50.0, 2.0**-24
    few, many = (Arithmetic(division=division) for division in (1.0, 1.0 + more))
    # Without the products of two errors, which are twice the largest error of everything.
    of_few, of_many = (
        {part: bound / (1 + 2 * u * largest) for part, bound in error_bound(case, truth, each).parts.items()}
        for each, largest in ((few, few.log1p), (many, many.division))
    )
    logits, p, q = case.rows().logits, truth.probabilities, truth.target
    gap = logits.max(axis=-1, keepdims=True) - logits
    log_sum = np.log(np.exp(-gap).sum(axis=-1))
    of_loss = more * u * ((q * gap).sum(axis=-1) + log_sum)
    np.testing.assert_allclose(of_many["loss"] - of_few["loss"], of_loss, rtol=1e-12)
    factor = np.abs(truth.factor)[:, None]
    of_gradient = factor * more * u * (2 * p + q + np.abs(p - q))
    np.testing.assert_allclose(of_many["gradient"] - of_few["gradient"], of_gradient, rtol=1e-12)


def test_an_inaccurate_quotient_adds_to_the_mean_and_to_the_slope_of_a_softcap() -> None:
    """Where the softcap is flat, nothing is left of its slope but twice the error of tanh, which takes the quotient."""
    more, u = 50.0, 2.0**-24
    few, many = (Arithmetic(division=division) for division in (1.0, 1.0 + more))
    case = replace(make_case("classes_127", "float32"), options={"reduction": "none"}, upstream=None)
    mean = replace(case, options={"reduction": "mean"})
    truth = solve(case)
    by_row = error_bound(case, truth, many).loss - error_bound(case, truth, few).loss
    of_mean = error_bound(mean, solve(mean), many).loss - error_bound(mean, solve(mean), few).loss
    np.testing.assert_allclose(of_mean, np.mean(by_row + u * more * truth.row_loss), rtol=1e-12)

    flat = replace(case, options={"reduction": "none", "softcap": 0.05})
    truth = solve(flat)
    grown = error_bound(flat, truth, many).gradient - error_bound(flat, truth, few).gradient
    saturated = np.abs(flat.rows().logits) > 10 * 0.05
    expected = 2 * u * more * np.abs(truth.probabilities - truth.target)
    assert saturated.sum() > 100
    np.testing.assert_allclose(grown[saturated], expected[saturated], rtol=1e-2)


def test_narrow_operands_add_to_each_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also to those of the gradients alone, where the logits are exact."""
    of_logits = linear_bounds._logit_error
    monkeypatch.setattr(linear_bounds, "_logit_error", lambda *given: of_logits(*given[:-1], 0.0))
    case = make_linear_case("linear_none", "float32")
    truth = solve(case)
    full, cut = (linear_bound(case, truth, Arithmetic(matmul_bits=bits)) for bits in (FULL, 8))
    gradient = np.abs(truth.gradient.high)
    assert np.array_equal(cut["loss"], full["loss"])
    for part, products in (
        ("hidden", gradient @ np.abs(case.multiplied_weight).T),
        ("weight", np.abs(case.hidden_rows).T @ gradient),
    ):
        np.testing.assert_allclose(cut[part] - full[part], 2.0**-7 * products, rtol=4e-3)


def test_bounds_of_a_layer_feel_the_bits_of_matrix_products() -> None:
    """One pass in bfloat16 is off by 2^-7 of each product of two numbers; narrow operands lose nothing."""
    for dtype, feels in (("float32", True), ("bfloat16", False), ("float64", False)):
        case = make_linear_case("linear_none", dtype)
        truth = solve(case)
        full, cut = (linear_bound(case, truth, Arithmetic(matmul_bits=bits)) for bits in (FULL, 8))
        for part in ("loss", "hidden", "weight"):
            assert np.any(cut[part] > 10 * full[part]) == feels
            assert np.all(cut[part] >= full[part])


def test_a_bundle_keeps_the_arithmetic_of_a_device(tmp_path: Path) -> None:
    adapter = FaultyAdapter()
    adapter.arithmetic = device_named("jax", "tpu-v6e").arithmetic
    write_bundle(tmp_path, record([adapter], [make_case("ties", "float32")]))
    assert read_bundle(tmp_path).adapters["numpy"].arithmetic == adapter.arithmetic


PAGE = Path(__file__).parents[2] / "docs" / "devices.md"


def test_the_page_shows_the_table() -> None:
    """If it does not: lsce-parity devices --markdown docs/devices.md."""
    page = PAGE.read_text(encoding="utf-8")
    assert page == replace_block(page, COMMAND, device_table())


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    page = tmp_path / "devices.md"
    page.write_text(replace_block(PAGE.read_text(encoding="utf-8"), COMMAND, "stale"), encoding="utf-8")
    outcome = invoke("devices", "--markdown", str(page))
    assert outcome.exit_code == 0, outcome.output
    assert page.read_bytes() == PAGE.read_bytes()
    assert invoke("devices", "--markdown", str(tmp_path / "missing.md")).exit_code == 2


# --- Errors that first-order bounds leave out -------------------------------------------------------------------------


def test_products_of_errors_are_in_the_bounds() -> None:
    """A bound of first order would grow by the same for each unit of exp."""
    case: Case = replace(make_case("classes_127", "float32"), options={"reduction": "none"})
    truth = solve(case)
    none, some, more = (error_bound(case, truth, Arithmetic(exp=exp)) for exp in (100, 1e4 + 100, 2e4 + 100))
    for first, second, third in zip(*(each.parts.values() for each in (none, some, more)), strict=True):
        assert np.all((third - second)[first > 0] > 1.001 * (second - first)[first > 0])


def test_a_z_loss_whose_parts_cancel_has_the_square_of_their_error() -> None:
    """The largest logit and log-sum-exp relative to it add up to 0, and so does all of first order."""
    logits = np.full((1, 8), np.float64(np.float32(-np.log(8))))
    plain = Case("cancelling", "float32", logits, np.array([3]), {"reduction": "none"})
    squared = replace(plain, options={"reduction": "none", "z_loss": 1.0})
    rough = Arithmetic(log1p=1e4)
    without, with_z_loss = (error_bound(case, solve(case), rough).loss.item() for case in (plain, squared))
    error_of_lse = 2.0**-24 * 1e4 * np.log(8)
    assert with_z_loss - without >= error_of_lse**2


@pytest.mark.parametrize(("error", "rounding"), [(0.0, 0.0), (1e-9, 1e-9), (1e-7, 2.0**-25)])
def test_rounding_a_zero_at_most_doubles_its_error(error: float, rounding: float) -> None:
    assert last_rounding(np.zeros(1), "float16", np.array([error])) == rounding
