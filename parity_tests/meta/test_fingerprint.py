"""The fingerprint: of both frameworks here, and of a device whose arithmetic is wrong in each way that it looks for."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parity_tests.losses.adapters import UnavailableError
from parity_tests.meta.running import invoke, run_code
from parity_tests.studies.fingerprint import (
    BACKENDS,
    LENGTHS,
    Array,
    Finding,
    TorchBackend,
    depth_of_sum,
    measured_row,
    rows_that_fit,
    subnormal_numbers,
    take_fingerprint,
)
from parity_tests.truth import devices
from parity_tests.truth.arithmetic import any_order
from parity_tests.truth.devices import device_of_kind
from parity_tests.truth.precision import DTYPES, FORMATS

Operation = Callable[..., Array]


def in_float32(function: Operation) -> Operation:
    """Compute narrow dtypes in float32, as devices do."""

    def operation(*operands: Array) -> Array:
        dtype = operands[0].dtype
        wide = dtype if dtype == np.float64 else np.dtype(np.float32)
        with np.errstate(over="ignore"):
            return function(*(each.astype(wide) for each in operands)).astype(dtype)

    return operation


def rounded_function(name: str) -> Operation:
    return lambda values: getattr(np, name)(values.astype(np.float64)).astype(values.dtype)


SOUND: dict[str, Operation] = {
    **{name: rounded_function(name) for name in ("exp", "log", "log1p", "tanh")},
    "divide": np.divide,
    "sum": in_float32(lambda values: values.sum(-1)),
    "matmul": in_float32(np.matmul),
    "multiply": np.multiply,
    "multiply_subtract": lambda a, b, c: a * b - c,
}


class Device:
    """NumPy as a device, with some operations replaced."""

    framework, device, model = "jax", "cpu", device_of_kind("jax", "cpu", "cpu")

    def __init__(self, **replaced: Operation) -> None:
        """Replace operations."""
        self.operations = {**SOUND, **replaced}

    def __call__(self, operation: str, *operands: Array) -> Array:
        """Return the result of an operation."""
        return self.operations[operation](*operands)


def findings(backend: Any, dtypes: tuple[str, ...]) -> dict[tuple[str, str], Finding]:
    return {(each.dtype, each.probe): each for each in take_fingerprint(backend, dtypes).findings}


def exceeding(found: dict[tuple[str, str], Finding]) -> set[tuple[str, str]]:
    return {key for key, finding in found.items() if not finding.within}


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.slow
def test_this_machine_is_within_what_the_bounds_assume(framework: str) -> None:
    found = findings(BACKENDS[framework]("cpu"), DTYPES)
    for (dtype, probe), each in found.items():
        print(f"{framework} {dtype} {probe}: {each.measured}, assumed {each.assumed}")
    assert not exceeding(found)
    assert {dtype for dtype, _ in found} == set(DTYPES)


def test_a_sound_device_is_within() -> None:
    found = findings(Device(), DTYPES)
    assert not exceeding(found)
    values = {probe: each.measured for (dtype, probe), each in found.items() if dtype == "float32"}
    assert values["matmul: bits of an operand"] == "24"
    assert values["matmul: bits of a sum"] == "24"
    assert values["subnormal operands"] == values["subnormal results"] == "kept"
    assert values["a b in a b - c"] == "rounded"
    assert values["sum varies with batch size"] == values["sum varies with position"] == "no"


# ---- Products of matrices


def to_bits(values: Array, bits: int) -> Array:
    quantum = np.ldexp(1.0, np.frexp(values)[1] - bits)
    return (np.round(values / quantum) * quantum).astype(values.dtype)


def one_pass(bits: int) -> Operation:
    return lambda a, b: np.matmul(to_bits(a, bits), to_bits(b, bits))


def three_passes(a: Array, b: Array) -> Array:
    """Do what "bf16x3" does: both operands in two parts of 8 bits, without the product of the small parts."""
    (a_high, a_low), (b_high, b_low) = (
        (high, to_bits(each - high, 8)) for each in (a, b) for high in (to_bits(each, 8),)
    )
    return a_high @ b_high + (a_high @ b_low + a_low @ b_high)


@pytest.mark.parametrize(("matmul", "measured"), [
    (one_pass(8), "8 (bfloat16)"),
    (one_pass(11), "11 (TF32)"),
    (three_passes, "17 (two bfloat16)"),
    (one_pass(23), "23"),
])  # fmt: skip
def test_narrow_operands(matmul: Operation, measured: str) -> None:
    found = findings(Device(matmul=matmul), ("float32",))
    bits = {("float32", f"matmul: bits of {what}") for what in ("an operand", "a vector")}
    assert {found[key].measured for key in bits} == {measured}
    assert exceeding(found) == bits | {("float32", "matmul: error of a product")}


def narrow_sums(a: Array, b: Array) -> Array:
    """Round every partial sum to the dtype of the operands."""
    if a.ndim == 1 or b.ndim == 1:
        return narrow_sums(np.atleast_2d(a), b if b.ndim == 2 else b[:, None]).reshape(-1)
    total = np.zeros((a.shape[0], b.shape[1]), a.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(a.shape[1]):
            total = total + a[:, k, None] * b[None, k]
    return total


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11), ("float32", 24)])
@pytest.mark.slow
def test_narrow_sums_of_products(dtype: str, bits: int) -> None:
    found = findings(Device(matmul=narrow_sums), (dtype,))
    assert found[dtype, "matmul: bits of a sum"].measured == f"{bits}"
    assert exceeding(found) == ({(dtype, "matmul: bits of a sum")} if bits < 24 else set())


def test_sum_of_products_that_overflows() -> None:
    """A sum of 24 bits that ends at the largest float16."""

    def matmul(a: Array, b: Array) -> Array:
        terms = a.astype(np.float64)[:, :, None] * b.astype(np.float64)[None]
        with np.errstate(invalid="ignore"):
            return np.where(np.abs(terms) > 65504, np.inf * terms, terms).sum(1).astype(a.dtype)

    found = findings(Device(matmul=matmul), ("float16",))
    assert found["float16", "matmul: bits of a sum"].measured == "16"


# ---- Elementary functions


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("function", ["exp", "log", "log1p", "tanh"])
@pytest.mark.slow
def test_inaccurate_functions(function: str, dtype: str) -> None:
    """Off by 8 u, or NaN for one argument."""

    def off(values: Array) -> Array:
        return SOUND[function](values) * values.dtype.type(1 + 8 * FORMATS[dtype].roundoff)

    found = findings(Device(**{function: off}), (dtype,))
    assert exceeding(found) == {(dtype, f"{function}: error")}
    assert 7 < found[dtype, f"{function}: error"].value < 10

    def undefined(values: Array) -> Array:
        return np.where(np.arange(values.size) == 7, np.nan, SOUND[function](values)).astype(values.dtype)

    assert findings(Device(**{function: undefined}), (dtype,))[dtype, f"{function}: error"].value == np.inf


def test_function_that_ends_too_early() -> None:
    """A zero for exp(-80) is no flushed subnormal number."""
    found = findings(Device(exp=lambda values: np.where(values < -80, 0, SOUND["exp"](values))), ("float32",))
    assert exceeding(found) == {("float32", "exp: error")}
    flushing = Device(exp=lambda values: flushed(SOUND["exp"](values)))
    assert not exceeding(findings(flushing, ("float32",)))


# ---- Subnormal numbers, and a b - c


def flushed(values: Array) -> Array:
    tiny = FORMATS[values.dtype.name].smallest_normal
    return np.where(np.abs(values.astype(np.float64)) < tiny, 0, values).astype(values.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.slow
def test_flushing(dtype: str) -> None:
    def states(multiply: Operation) -> tuple[str, str]:
        found = findings(Device(multiply=multiply), (dtype,))
        assert not exceeding(found)
        return found[dtype, "subnormal operands"].measured, found[dtype, "subnormal results"].measured

    assert states(lambda a, b: flushed(a) * flushed(b)) == ("flushed to zero", "kept")
    assert states(lambda a, b: flushed(a * b)) == ("kept", "flushed to zero")
    too_much = Device(multiply=lambda a, b: np.where(a * b <= FORMATS[dtype].smallest_normal, a * 0, a * b))
    assert exceeding(findings(too_much, (dtype,))) == {(dtype, "smallest normal number")}


def test_flushing_of_torch_is_seen() -> None:
    backend = TorchBackend("cpu")

    def states() -> list[str]:
        return [each.measured for each in subnormal_numbers(backend, "float32")]

    assert states() == ["kept", "kept", "kept"]
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot make this processor flush subnormal numbers")
    try:
        assert states() == ["flushed to zero", "flushed to zero", "kept"]
    finally:
        torch.set_flush_denormal(False)
    assert states() == ["kept", "kept", "kept"]


def test_fused_multiply_add() -> None:
    def fused(a: Array, b: Array, c: Array) -> Array:
        return (a.astype(np.float64) * b.astype(np.float64) - c.astype(np.float64)).astype(a.dtype)

    for dtype in ("float32", "bfloat16", "float16"):
        found = findings(Device(multiply_subtract=fused), (dtype,))
        assert found[dtype, "a b in a b - c"].measured == "fused, or wider"
        assert not exceeding(found)


# ---- Sums


def sequential(values: Array) -> Array:
    return np.cumsum(values, axis=-1, dtype=values.dtype)[..., -1]


def pairwise(values: Array) -> Array:
    while values.shape[-1] > 1:
        odd = values[..., -1:] if values.shape[-1] % 2 else values[..., :0]
        even = values[..., : values.shape[-1] // 2 * 2]
        values = np.concatenate([even[..., 0::2] + even[..., 1::2], odd], axis=-1)
    return values[..., 0]


def blocked(values: Array) -> Array:
    """Sum blocks of 32 in sequence, then the sums of the blocks."""
    padding = np.zeros((*values.shape[:-1], -values.shape[-1] % 32), values.dtype)
    blocks = np.concatenate([values, padding], axis=-1).reshape(*values.shape[:-1], -1, 32)
    return sequential(sequential(blocks))


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("total", "depths"), [
    (sequential, {2: 1, 33: 32, 128: 127, 1024: 1023}),
    (pairwise, {2: 1, 33: 6, 128: 7, 1024: 10}),
    (blocked, {2: 1, 32: 31, 64: 32, 1024: 62}),
])  # fmt: skip
def test_depth_of_sum(total: Operation, depths: dict[int, int], dtype: str, alone: bool) -> None:
    for length, depth in depths.items():
        assert depth_of_sum(Device(sum=total), dtype, length, alone) == depth


def test_sums_in_sequence_exceed() -> None:
    found = findings(Device(sum=sequential), ("float32",))
    probes = {f"sum of {n} {how}: depth" for n in LENGTHS for how in ("alone", "in a batch") if n > 33}
    assert exceeding(found) == {("float32", probe) for probe in probes}


def test_sums_that_vary() -> None:
    def by_size(values: Array) -> Array:
        return sequential(values) if len(values) > 2 else pairwise(values)

    def by_position(values: Array) -> Array:
        return np.where(np.arange(len(values)) % 2, sequential(values), pairwise(values))

    for total, varies in ((by_size, ("yes", "no")), (by_position, ("no", "yes"))):
        found = findings(Device(sum=lambda values, total=total: total(values)), ("float32",))
        probes = ("sum varies with batch size", "sum varies with position")
        assert tuple(found["float32", probe].measured for probe in probes) == varies


@pytest.mark.parametrize("operation", ["sum", "matmul"])
def test_results_that_change(operation: str) -> None:
    """As where threads add in the order in which they finish."""
    calls = itertools.count()

    def total(values: Array) -> Array:
        return sequential(values) if next(calls) % 2 else pairwise(values)

    def matmul(a: Array, b: Array) -> Array:
        return np.matmul(a, b) if next(calls) % 2 else np.matmul(a[:, ::-1], b[::-1]) + np.matmul(a * 0, b)

    changing = {"sum": total, "matmul": matmul}
    found = findings(Device(**{operation: changing[operation]}), ("float32",))
    assert found["float32", f"{operation}: repeated"].measured == "2 results in 10"
    assert ("float32", f"{operation}: repeated") in exceeding(found)


def test_an_operation_that_is_missing() -> None:
    def missing(*operands: Array) -> Array:
        raise NotImplementedError("no such kernel\nand a long trace")

    found = findings(Device(multiply=missing), ("float16",))
    assert exceeding(found) == {("float16", "subnormal numbers")}
    assert found["float16", "subnormal numbers"].measured == "NotImplementedError: no such kernel"
    assert ("float16", "sum: repeated") in found


# ---- Rows of the table of devices


def off_by(function: str, units: float) -> Operation:
    """Return a function that is off by so many units of the roundoff, and flushes."""
    return lambda values: flushed(
        (SOUND[function](values.astype(np.float64)) * (1 + units * FORMATS[values.dtype.name].roundoff)).astype(
            values.dtype
        )
    )


def like_tpu(**units: float) -> Device:
    """A device with the errors of a TPU v6e, but where stated otherwise."""
    errors = {"exp": 128.0, "log": 4.0, "log1p": 4000.0, "tanh": 2.0, **units}
    return Device(
        **{name: off_by(name, error) for name, error in errors.items()},
        multiply=lambda a, b: flushed(flushed(a) * flushed(b)),
        matmul=lambda a, b: one_pass(8)(a, b) if a.dtype == np.float32 and a.ndim == b.ndim else SOUND["matmul"](a, b),
        sum=sequential,
    )


def row_of(backend: Device) -> devices.Device:
    row = measured_row(take_fingerprint(backend, ("float32",)))
    assert row is not None
    return row


def test_a_device_fits_the_row_of_its_arithmetic() -> None:
    row = row_of(like_tpu())
    assert (row.arithmetic.matmul_bits, row.flushes, row.arithmetic.depth) == (8, True, any_order)
    assert 128 <= row.arithmetic.exp <= 129
    assert rows_that_fit(row)[0] == "tpu-v6e"
    assert {"cpu", "gpu-h100"}.isdisjoint(rows_that_fit(row))
    assert rows_that_fit(row_of(like_tpu(tanh=100.0)))[0] == "tpu-v5p"
    assert rows_that_fit(row_of(like_tpu(exp=225.0)))[0] == "tpu-v4"
    assert rows_that_fit(row_of(like_tpu(exp=250.0))) == []
    assert rows_that_fit(row_of(Device()))[0] == "gpu-a100"  # on a CPU, JAX flushes


def test_a_vector_may_keep_more_bits_than_a_matrix() -> None:
    found = findings(like_tpu(), ("float32",))
    assert found["float32", "matmul: bits of an operand"].measured == "8 (bfloat16)"
    assert found["float32", "matmul: bits of a vector"].measured == "24"


def test_there_is_no_row_without_the_probes_that_it_needs() -> None:
    def missing(*operands: Array) -> Array:
        raise NotImplementedError

    assert measured_row(take_fingerprint(Device(exp=missing), ("float32",))) is None
    assert measured_row(take_fingerprint(Device(exp=lambda values: values * np.nan), ("float32",))) is None
    assert measured_row(take_fingerprint(Device(), ("bfloat16",))) is None


def test_quotients_that_are_not_rounded_correctly() -> None:
    def by_reciprocal(a: Array, b: Array) -> Array:
        return a * (a.dtype.type(1) / b)

    found = findings(Device(divide=by_reciprocal), ("float32",))
    assert exceeding(found) == {("float32", "division: error")}
    assert 1 < found["float32", "division: error"].value < 3


# ---- Command line


def use(monkeypatch: pytest.MonkeyPatch, **backends: Any) -> None:
    for name in BACKENDS:
        monkeypatch.setitem(BACKENDS, name, backends[name])


def absent(device: str) -> Device:
    raise UnavailableError(f"no {device} here")


def test_command_within(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, jax=absent, torch=lambda device: Device())
    outcome = invoke("fingerprint", "--json", str(tmp_path / "deep" / "fingerprint.json"))
    assert outcome.exit_code == 0, outcome.output
    assert "jax not measured: no cpu here" in outcome.output
    assert "exceeds" not in outcome.output
    content = json.loads((tmp_path / "deep" / "fingerprint.json").read_text(encoding="utf-8"))
    (taken,) = content["fingerprints"]
    assert {each["dtype"] for each in taken["findings"]} == set(DTYPES)
    assert content["missing"] == {"jax": "no cpu here"}
    assert "rows that fit, the tightest first: " in outcome.output
    assert "Device('cpu', 'cpu', ('jax',)" in outcome.output.replace("\n", "")


@pytest.mark.slow
def test_command_exceeds(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, jax=lambda device: Device(), torch=lambda device: Device(matmul=one_pass(11)))
    outcome = invoke("fingerprint")
    assert outcome.exit_code == 1
    assert "11 (TF32)" in outcome.output
    assert "exceeds" in outcome.output
    assert invoke("fingerprint", "--framework", "jax").exit_code == 0


def test_command_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        (("--framework", "keras"), "there is no framework 'keras' here; the frameworks are jax, torch"),
        (("--device", "abacus"), "there is no device 'abacus' here; the devices are cpu, cuda, tpu"),
        (("--framework", "torch", "--device", "tpu"), "torch finds no tpu device on this machine"),
    ):
        outcome = invoke("fingerprint", *arguments)
        assert outcome.exit_code == 2
        assert f"cannot run: {message}" in outcome.stderr
    use(monkeypatch, jax=absent, torch=absent)
    outcome = invoke("fingerprint")
    assert outcome.exit_code == 2
    assert "cannot run: no cpu here; no cpu here" in outcome.stderr


ALONE = """
import sys
import parity_tests.__main__
from parity_tests.studies.fingerprint import BACKENDS, contraction
assert not {{"jax", "torch"}} & set(sys.modules)
print(contraction(BACKENDS[{framework!r}]("cpu"), "bfloat16"))
"""


@pytest.mark.parametrize(("framework", "blocked"), [("torch", ("jax", "flax", "optax")), ("jax", ("torch",))])
@pytest.mark.slow
def test_one_framework_is_enough(framework: str, blocked: tuple[str, ...]) -> None:
    outcome = run_code(ALONE.format(framework=framework), blocked)
    assert "Finding(dtype='bfloat16'" in outcome.stdout, outcome.stderr
    outcome = run_code(ALONE.format(framework="jax" if framework == "torch" else "torch"), blocked)
    assert "UnavailableError" in outcome.stderr
