"""Measures the arithmetic of a device, and compares it with the assumptions of the bounds.

Flags claim a precision; a probe measures it, with numbers whose sum, product or function shows how the device rounds.
Each probe is a function of a `Backend`, which does one operation on the device. Arrays go in and come out as bits, so
that no conversion on the host rounds or flushes them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from importlib import import_module
from itertools import permutations, product
from typing import Any, Protocol

import ml_dtypes
import mpmath
import numpy as np
from numpy.typing import NDArray

from parity_tests.losses.adapters import JaxAdapter, TorchAdapter
from parity_tests.truth.arithmetic import DEPTHS, ERRORS, Arithmetic
from parity_tests.truth.devices import DEVICES, Device
from parity_tests.truth.precision import DTYPES, FORMATS, FloatArray, as_dtype, compute_dtype, round_to

Array = NDArray[Any]

# Side of square matrices: large enough to get the kernels of real ones, small enough to be fast.
SIDE = 64
# XLA for CPUs sums blocks of 32 terms in sequence. With these lengths blocks, or blocks of blocks, are full or begun.
LENGTHS = (33, 128, 1024, 2047)
REPETITIONS = 10
HOW_MANY = ("alone", "in a batch")
SOURCE = "lsce-parity fingerprint"


class Backend(Protocol):
    """A device, through one framework.

    Args:
        framework, device: their names.
        model: the assumptions of the bounds.
    """

    framework: str
    device: str
    model: Device

    def __call__(self, operation: str, *operands: Array) -> Array:
        """Return the result of one of `OPERATIONS`, in the dtype of the operands."""
        ...


OPERATIONS = ("exp", "log", "log1p", "tanh", "divide", "matmul", "multiply", "multiply_subtract", "sum")
# Operations that frameworks lack by that name: a b - c, and the sum over the last dimension.
COMPOSED: dict[str, Callable[..., Any]] = {
    "multiply_subtract": lambda a, b, c: a * b - c,
    "sum": lambda values: values.sum(-1),
}


class JaxBackend:
    """JAX, each operation compiled, with the current settings.

    Raises:
        UnavailableError: JAX, or the device, is not there.
    """

    framework = "jax"

    def __init__(self, device: str) -> None:
        """Load JAX."""
        self.device, self.model = device, JaxAdapter(device=device).device_model
        self._jax = jax = import_module("jax")
        self._place = jax.devices(device)[0]
        self._operations = {name: jax.jit(COMPOSED.get(name) or getattr(jax.numpy, name)) for name in OPERATIONS}

    def __call__(self, operation: str, *operands: Array) -> Array:
        """Return the result of an operation."""
        with self._jax.enable_x64(operands[0].dtype == np.float64), self._jax.default_device(self._place):
            return np.asarray(self._operations[operation](*map(self._jax.numpy.asarray, operands)))


class TorchBackend:
    """PyTorch, eager, with the current settings.

    Raises:
        UnavailableError: torch, or the device, is not there.
    """

    framework = "torch"

    def __init__(self, device: str) -> None:
        """Load torch."""
        self.device, self.model = device, TorchAdapter(device=device).device_model
        self._torch = torch = import_module("torch")
        self._operations = {name: COMPOSED.get(name) or getattr(torch, name) for name in OPERATIONS}

    def __call__(self, operation: str, *operands: Array) -> Array:
        """Return the result of an operation."""
        result = self._operations[operation](*map(self._tensor, operands)).cpu()
        if result.dtype == self._torch.bfloat16:
            return np.asarray(result.view(self._torch.int16).numpy()).view(ml_dtypes.bfloat16)
        return np.asarray(result.numpy())

    def _tensor(self, array: Array) -> Any:
        """Return a tensor with the bits of an array; torch does not know bfloat16 arrays."""
        if array.dtype == ml_dtypes.bfloat16:
            return self._torch.from_numpy(array.view(np.int16)).view(self._torch.bfloat16).to(self.device)
        return self._torch.from_numpy(array).to(self.device)


BACKENDS: dict[str, Callable[[str], Backend]] = {"jax": JaxBackend, "torch": TorchBackend}


@dataclass(frozen=True)
class Finding:
    """The finding of a probe.

    Args:
        dtype: dtype of the operands.
        probe: the measured property.
        value: its value, to compare devices with; NaN if the device could not do the operation.
        measured: the value as text.
        assumed: the assumption of the bounds as text.
        within: whether the value is within the assumption.
    """

    dtype: str
    probe: str
    value: float
    measured: str
    assumed: str
    within: bool


@dataclass(frozen=True)
class Fingerprint:
    """The findings of all probes on a device.

    Args:
        framework, device: their names.
        model: the name of the row whose assumptions hold here.
        findings: in the order of the dtypes and probes.
    """

    framework: str
    device: str
    model: str
    findings: tuple[Finding, ...]

    @property
    def within(self) -> bool:
        """Whether every finding is within the assumption of the bounds."""
        return all(finding.within for finding in self.findings)


def bits_of(dtype: str) -> int:
    """Return the number of significant bits of a format."""
    return int(-math.log2(FORMATS[dtype].roundoff))


# ---- Products of matrices


def odd_numbers(bits: int) -> FloatArray:
    """Return random numbers in [1, 2) that need exactly this many significant bits.

    1 + 2^-k would not do: it survives if a device splits numbers into narrow parts.
    """
    steps = 2 ** (bits - 1)
    return np.asarray(1 + (2 * np.random.default_rng(bits).integers(steps // 2, size=SIDE) + 1) / steps)


# Formats by the number of bits that they keep.
KNOWN_BITS = {17: "two bfloat16", 16: "two bfloat16", 11: "TF32", 8: "bfloat16"}


def _assumed_bits(backend: Backend, dtype: str) -> int:
    """Return how many bits of an operand the bounds assume that a matrix product keeps."""
    return bits_of(dtype) if dtype == "float64" else min(bits_of(dtype), backend.model.arithmetic.matmul_bits)


def matmul_operand_bits(backend: Backend, dtype: str) -> list[Finding]:
    """Find how many bits of its operands a product of two matrices keeps, and one of a matrix and a vector.

    A diagonal of numbers of b bits, multiplied with the identity from either side, must come back; a vector of such
    numbers likewise. Some devices have a way of their own for vectors, in full precision.
    """
    identity = as_dtype(np.eye(SIDE), dtype)

    def keeps(bits: int, of_vector: bool) -> bool:
        numbers = odd_numbers(bits)
        given = as_dtype(numbers if of_vector else np.diag(numbers), dtype)
        results = (backend("matmul", given, identity), backend("matmul", identity, given))
        return all(np.array_equal(result, given) for result in results)

    wanted, findings = _assumed_bits(backend, dtype), []
    for of_vector, what in ((False, "an operand"), (True, "a vector")):
        lost = (bits for bits in range(2, bits_of(dtype) + 1) if not keeps(bits, of_vector))
        kept = next(lost, bits_of(dtype) + 1) - 1
        known = f" ({KNOWN_BITS[kept]})" if kept in KNOWN_BITS and kept < bits_of(dtype) else ""
        findings.append(Finding(dtype, f"matmul: bits of {what}", kept, f"{kept}{known}", f"{wanted}", kept >= wanted))
    return findings


def matmul_product_error(backend: Backend, dtype: str) -> list[Finding]:
    """Find the error of one product of two numbers: all other terms of the sum are 0."""
    numbers = odd_numbers(bits_of(dtype))
    left, right = (as_dtype(np.diag(each), dtype) for each in (numbers, numbers[::-1]))
    results = np.diagonal(backend("matmul", left, right)).astype(np.float64)
    exact = [Fraction(a) * Fraction(b) for a, b in zip(numbers, numbers[::-1], strict=True)]
    pairs = zip(results, exact, strict=True)
    errors = [float(abs(Fraction(result) - e) / e) if np.isfinite(result) else math.inf for result, e in pairs]
    worst, bits = max(errors) / FORMATS[dtype].roundoff, _assumed_bits(backend, dtype)
    # Both factors rounded to fewer bits, where the device does that.
    limit = 1 + (((1 + 2.0**-bits) ** 2 - 1) / FORMATS[dtype].roundoff if bits < bits_of(dtype) else 0)
    return [Finding(dtype, "matmul: error of a product", worst, f"{worst:.2f} u", f"{limit:g} u", worst <= limit)]


def matmul_sum_bits(backend: Backend, dtype: str) -> list[Finding]:
    """Find how many bits the sum of products has.

    2^k + 1 - 2^k is 1 if the sum has more than k bits, in any order and at any places in the row. 2^k is itself a
    product, so that narrow dtypes reach it.
    """
    wanted = bits_of(compute_dtype(dtype))
    kept, most = 1, wanted + 8
    for k in range(1, most):
        upper, lower = 2.0 ** ((k + 1) // 2), 2.0 ** (k // 2)
        left, right = np.zeros((2, SIDE, SIDE))
        orders = permutations(((upper, lower), (1.0, 1.0), (-upper, lower)))
        places = list(product(orders, ((0, 1, 2), (0, SIDE // 2, SIDE - 1))))
        for row, (terms, columns) in enumerate(places):
            left[row, columns], right[columns, row] = zip(*terms, strict=True)
        sums = np.diagonal(backend("matmul", as_dtype(left, dtype), as_dtype(right, dtype)))
        if np.any(sums[: len(places)] != 1):
            break
        kept = k + 1
    shown = f"{kept}{' or more' if kept == most else ''}"
    return [Finding(dtype, "matmul: bits of a sum", kept, shown, f"{wanted}", kept >= wanted)]


# ---- Elementary functions


def function_errors(backend: Backend, dtype: str) -> list[Finding]:
    """Find the largest relative errors of elementary functions."""
    generator = np.random.default_rng(0)
    small = 10 ** generator.uniform(-8, 0, 500)
    # Down to arguments whose exp is subnormal.
    gaps = generator.uniform(0, -1.1 * math.log(FORMATS[dtype].smallest_normal), 1500)
    arguments = {
        "exp": np.concatenate([-gaps, -small]),
        "log": np.concatenate([generator.uniform(1e-6, 1, 1000), 10 ** generator.uniform(0, 6, 500), 1 + small]),
        "log1p": 10 ** generator.uniform(-12, 6, 2000),
        "tanh": np.concatenate([generator.normal(size=1500) * 3, small]),
    }
    worst = {name: function_error(backend, dtype, name, round_to(values, dtype)) for name, values in arguments.items()}
    worst["division"] = division_error(backend, dtype)
    limits = {name: getattr(backend.model.arithmetic, name) for name in worst}
    return [
        Finding(dtype, f"{name}: error", error, f"{error:.2f} u", f"{limits[name]:g} u", error <= limits[name])
        for name, error in worst.items()
    ]


def division_error(backend: Backend, dtype: str) -> float:
    """Return the largest relative error of a quotient in units of the roundoff."""
    generator = np.random.default_rng(1)
    above, below = (as_dtype(round_to(10 ** generator.uniform(-3, 3, 2000), dtype), dtype) for _ in range(2))
    results = backend("divide", above, below)
    if not np.all(np.isfinite(results.astype(np.float64))):
        return math.inf
    triples = zip(above.tolist(), below.tolist(), results.tolist(), strict=True)
    errors = (abs(Fraction(result) * Fraction(b) / Fraction(a) - 1) for a, b, result in triples)
    return float(max(errors)) / FORMATS[dtype].roundoff


def function_error(backend: Backend, dtype: str, function: str, values: FloatArray) -> float:
    """Return the largest relative error in units of the roundoff, beyond the error of flushing subnormal results."""
    results = backend(function, as_dtype(values, dtype)).astype(np.float64)
    if not np.all(np.isfinite(results)):
        return math.inf
    tiny, worst = FORMATS[dtype].smallest_normal, 0.0
    with mpmath.workdps(40):
        for value, result in zip(values.tolist(), results.tolist(), strict=True):
            exact = getattr(mpmath, function)(mpmath.mpf(value))
            excess = max(abs(result - exact) - tiny, 0)
            worst = max(worst, float(excess / abs(exact)) if exact else 0.0)
    return worst / FORMATS[dtype].roundoff


# ---- Subnormal numbers, and a b - c


def subnormal_numbers(backend: Backend, dtype: str) -> list[Finding]:
    """Find whether numbers below the smallest normal one are flushed to zero, as operands and as results."""
    kind, tiny = as_dtype(np.ones(1), dtype).dtype, FORMATS[dtype].smallest_normal
    bits = np.dtype(f"uint{8 * kind.itemsize}")
    normal, half, one, largest = (as_dtype(np.full(1, value), dtype) for value in (tiny, 0.5, 1.0, 2 / tiny))
    # The smallest subnormal number is made from bits: a host that flushes could not convert to it.
    raised = backend("multiply", np.ones(1, bits).view(kind), largest)
    halved = backend("multiply", normal, half)
    findings = []
    for probe, result in (("subnormal operands", raised), ("subnormal results", halved)):
        flushed = not result.view(bits).any()
        measured = "flushed to zero" if flushed else "kept"
        findings.append(Finding(dtype, probe, float(flushed), measured, "either", True))
    kept = backend("multiply", normal, one).tobytes() == normal.tobytes()
    measured = "kept" if kept else "flushed to zero"
    return [*findings, Finding(dtype, "smallest normal number", float(not kept), measured, "kept", kept)]


def contraction(backend: Backend, dtype: str) -> list[Finding]:
    """Find whether a b - c rounds a b, which needs one bit too many; c is the rounded product."""
    half = (bits_of(dtype) + 1) // 2
    factor, rounded = 1 + 2.0**-half, 1 + 2.0 ** (1 - half)
    operands = (as_dtype(np.full(SIDE, value), dtype) for value in (factor, factor, rounded))
    wider = bool(np.any(backend("multiply_subtract", *operands) != 0))
    measured = "fused, or wider" if wider else "rounded"
    return [Finding(dtype, "a b in a b - c", float(wider), measured, "either", True)]


# ---- Sums


def depth_of_sum(backend: Backend, dtype: str, length: int, alone: bool) -> int:
    """Return the number of additions that a term goes through, the largest over the first, middle and last term.

    Term i is M, term j is -M, all others are 1, and a term added to M is lost. The result is the number of terms that
    are added after i and j have met. Each addition at which some j meets i gives a different number, so the number of
    different results is the number of additions that i goes through. (FPRev, arXiv:2411.00442, uses M and -M.)

    Args:
        backend: the device.
        dtype: of the terms.
        length: number of terms, at most 2^14.
        alone: whether each sum is a batch of one row, or all are rows of one batch.
    """
    huge, kind = 2.0 ** (bits_of(dtype) + 14), as_dtype(np.ones(1), dtype).dtype
    deepest = 0
    for i in {0, length // 2, length - 1}:
        rows = np.ones((length - 1, length), kind)
        rows[:, i] = huge
        rows[np.arange(length - 1), np.delete(np.arange(length), i)] = -huge
        sums = [float(backend("sum", row[None])[0]) for row in rows] if alone else backend("sum", rows).tolist()
        deepest = max(deepest, len(set(sums)))
    return deepest


def depths_of_sums(backend: Backend, dtype: str) -> list[Finding]:
    """Find the longest chains of additions in sums."""
    findings = []
    for length, (alone, how) in product(LENGTHS, zip((True, False), HOW_MANY, strict=True)):
        depth, limit = depth_of_sum(backend, dtype, length, alone), backend.model.arithmetic.depth(length)
        probe = f"sum of {length} {how}: depth"
        findings.append(Finding(dtype, probe, depth, f"{depth}", f"{limit}", depth <= limit))
    return findings


def sums_in_batches(backend: Backend, dtype: str) -> list[Finding]:
    """Find whether the bits of a row's sum depend on the size of the batch or on the place in it."""
    same_size = same_place = True
    for length in (33, 128, 1009, 4099):
        row = as_dtype(round_to(np.random.default_rng(length).normal(size=length), dtype), dtype)
        batches = [backend("sum", np.tile(row, (size, 1))) for size in (1, 2, 7, 64)]
        same_size &= len({sums[:1].tobytes() for sums in batches}) == 1
        same_place &= all(len({total.tobytes() for total in sums}) == 1 for sums in batches)
    return [
        Finding(dtype, f"sum varies with {what}", float(not same), "no" if same else "yes", "either", True)
        for what, same in (("batch size", same_size), ("position", same_place))
    ]


def repetitions(backend: Backend, dtype: str) -> list[Finding]:
    """Find whether sums and matrix products have the same bits each time; checks of equal bits need that."""
    generator = np.random.default_rng(0)
    rows, square = (
        as_dtype(round_to(generator.normal(size=shape), dtype), dtype) for shape in ((SIDE, 4099), (4 * SIDE, 4 * SIDE))
    )
    findings = []
    for operation, operands in (("sum", (rows,)), ("matmul", (square, square))):
        results = len({backend(operation, *operands).tobytes() for _ in range(REPETITIONS)})
        measured = "same bits" if results == 1 else f"{results} results in {REPETITIONS}"
        findings.append(Finding(dtype, f"{operation}: repeated", results, measured, "same bits", results == 1))
    return findings


Probe = Callable[[Backend, str], list[Finding]]
PROBES: tuple[Probe, ...] = (
    matmul_operand_bits,
    matmul_product_error,
    matmul_sum_bits,
    subnormal_numbers,
    contraction,
    repetitions,
)
# Probes for the dtypes that losses are computed in.
COMPUTE_PROBES: tuple[Probe, ...] = (function_errors, depths_of_sums, sums_in_batches)


def take_fingerprint(backend: Backend, dtypes: Sequence[str] = DTYPES) -> Fingerprint:
    """Run every probe. A probe that raises an error is a finding too, and not within the assumption."""
    findings = []
    for dtype in dtypes:
        for probe in PROBES + (COMPUTE_PROBES if dtype == compute_dtype(dtype) else ()):
            try:
                findings += probe(backend, dtype)
            except Exception as error:  # an operation may be missing, and the other probes must still run
                message = (str(error).strip() or "no message").splitlines()[0]
                name, measured = probe.__name__.replace("_", " "), f"{type(error).__name__}: {message}"
                findings.append(Finding(dtype, name, math.nan, measured, "it works", within=False))
    return Fingerprint(backend.framework, backend.device, backend.model.name, tuple(findings))


# ---- Rows of the table of devices


def measured_row(taken: Fingerprint) -> Device | None:
    """Return the row that a fingerprint measured; None if a probe failed that it needs.

    A worst error of some thousand arguments is a little below the worst of all, so errors are rounded up.
    """
    found = {(each.dtype, each.probe): each.value for each in taken.findings}
    computing = [dtype for dtype in DTYPES if (dtype, "exp: error") in found]
    try:
        errors = {name: max(found[dtype, f"{name}: error"] for dtype in computing) for name in ERRORS}
        bits = int(found["float32", "matmul: bits of an operand"])
        flushes = bool(found["float32", "subnormal operands"] or found["float32", "subnormal results"])
        depths = {
            length: max(found[dtype, f"sum of {length} {how}: depth"] for dtype in computing for how in HOW_MANY)
            for length in LENGTHS
        }
    except (KeyError, ValueError):
        return None
    enough = (depth for depth in DEPTHS.values() if all(depths[length] <= depth(length) for length in LENGTHS))
    depth = next(enough, None)
    if depth is None or not all(map(math.isfinite, errors.values())):
        return None
    rounded: dict[str, Any] = {name: max(1.0, math.ceil(2 * error) / 2) for name, error in errors.items()}
    arithmetic = Arithmetic(**rounded, matmul_bits=bits, depth=depth)
    today = datetime.now(UTC).date().isoformat()
    kinds = (taken.model.lower(),)
    return Device(taken.model, taken.device, (taken.framework,), kinds, arithmetic, flushes, SOURCE, today)


def rows_that_fit(measured: Device) -> list[str]:
    """Return the names of the rows that what was measured is within, the tightest first."""
    ours = measured.arithmetic

    def fits(row: Device) -> bool:
        theirs = row.arithmetic
        errors = all(getattr(ours, name) <= getattr(theirs, name) for name in ERRORS)
        depths = all(ours.depth(length) <= theirs.depth(length) for length in LENGTHS)
        flushes = row.flushes is None or row.flushes == measured.flushes
        return errors and depths and flushes and ours.matmul_bits >= theirs.matmul_bits

    rows = [row for row in DEVICES if measured.frameworks[0] in row.frameworks and fits(row)]
    rows.sort(key=lambda row: sum(math.log(getattr(row.arithmetic, name)) for name in ERRORS))
    return [row.name for row in rows]
