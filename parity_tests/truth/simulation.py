"""The arithmetic of a device that is not here, in NumPy.

Operations that IEEE 754 defines are rounded as it says. The others are computed in a wider format, moved by as much as
the table of devices allows (see `devices.py`), and rounded: exp, log, log1p, tanh and quotients, and functions that are
made of these. Numbers below the smallest normal one become 0 where the device flushes them. Sums are as deep as the
device may make them. Matrix products are added one term after another, and those of float32 keep as many bits of their
operands as the device.

The errors are functions of the operand, as they are on a device: equal operands have equal errors. exp(0) is 1 on
every device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity_tests.truth.arithmetic import BLOCK, FULL, Arithmetic, tree_depth
from parity_tests.truth.precision import FORMATS

Floating = NDArray[Any]

# How the errors of a run are chosen, each as large as the device's arithmetic allows; and the order of its sums.
PATTERNS = {
    "up": "every result is too large in size; sums in order",
    "down": "every result is too small in size; sums in reverse order",
    "random": "the signs are random; sums in random order",
    "smooth": "errors change slowly with the operand; sums of every eighth term at a time",
}
# Functions without a column in the table, and whose error they take; others are rounded correctly.
LIKE = {"exp2": "exp", "expm1": "exp", "log2": "log", "log10": "log"}
# Errors of functions that are asked for accuracy.HIGHEST: 1.5 units in the last place (jax docs/accuracy.md).
HIGHEST = 3.0
_LANES = 8


@dataclass(frozen=True)
class Simulation:
    """One choice of the errors that a device's arithmetic may have.

    Args:
        arithmetic: the largest errors.
        flushes: whether float32 numbers below the smallest normal one become 0.
        pattern: one of `PATTERNS`; None for no errors but the last rounding, and NumPy's order of sums.
    """

    arithmetic: Arithmetic
    flushes: bool
    pattern: str | None

    def apply(self, name: str, values: Floating, *, highest: bool = False) -> Floating:
        """Return the function of that name in NumPy, as the device computes it.

        Args:
            name: of the function, such as "exp".
            values: the operand.
            highest: whether the program asks for the device's most accurate version.
        """
        error: float = getattr(self.arithmetic, LIKE.get(name, name), 1.0)
        result = self._near(getattr(np, name)(_wide(values)), values, min(error, HIGHEST) if highest else error)
        return np.where(values == 0, values.dtype.type(1), result) if name in ("exp", "exp2") else result

    def logistic(self, values: Floating) -> Floating:
        """Return 1 / (1 + exp(-x)) as the device computes it."""
        one = values.dtype.type(1)
        return self.divide(one, np.asarray(one + self.apply("exp", -values), values.dtype))

    def divide(self, numerator: Floating, denominator: Floating) -> Floating:
        """Return the quotient of two arrays of the same dtype, as the device computes it."""
        exact = _wide(np.asarray(numerator)) / _wide(np.asarray(denominator))
        return self._near(exact, np.asarray(denominator), self.arithmetic.division)

    def sum(self, values: Floating, axes: Sequence[int]) -> Floating:
        """Return the sum over some dimensions. Narrow numbers are added up in float32."""
        kept = [axis for axis in range(values.ndim) if axis not in axes]
        shape, summed = ([values.shape[axis] for axis in some] for some in (kept, axes))
        terms = values.transpose(*kept, *axes).reshape(*shape, math.prod(summed))
        wide = _accumulator(values.dtype)
        if self.pattern is None or not terms.size:
            return np.asarray(np.sum(terms, axis=-1, dtype=wide)).astype(values.dtype)
        ordered = terms[..., self._order(terms.shape[-1])].astype(wide)
        return self.flush(self._added_up(ordered).astype(values.dtype))

    def _added_up(self, terms: Floating) -> Floating:
        """Return the sum over the last dimension in the deepest way that the device may take."""
        while self.arithmetic.depth is tree_depth and terms.shape[-1] > BLOCK:
            missing = [(0, 0)] * (terms.ndim - 1) + [(0, -terms.shape[-1] % BLOCK)]
            blocks = np.pad(terms, missing).reshape(*terms.shape[:-1], -1, BLOCK)
            terms = np.add.accumulate(blocks, axis=-1)[..., -1]
        return np.asarray(np.add.accumulate(terms, axis=-1)[..., -1])

    def matmul(
        self, first: Floating, second: Floating, dtype: np.dtype[Any] | None = None, bits: int | None = None
    ) -> Floating:
        """Return first @ second, [..., M, C] times [..., C, N], term after term.

        Args:
            first: the left factor.
            second: the right factor, of the same dtype.
            dtype: of the result; None for that of the factors.
            bits: how many bits of a float32 operand to keep; None for those of the device's default.
        """
        bits = self.arithmetic.matmul_bits if bits is None else bits
        wide = _accumulator(first.dtype)
        if first.dtype == np.float32 and bits < FULL:
            first, second = rounded_to_bits(first, bits), rounded_to_bits(second, bits)
        first, second = first.astype(wide), second.astype(wide)
        batch = np.broadcast_shapes(first.shape[:-2], second.shape[:-2])
        total = np.zeros((*batch, first.shape[-2], second.shape[-1]), wide)
        for index in self._order(first.shape[-1]):
            total += first[..., :, index, None] * second[..., None, index, :]
        return self.flush(total.astype(dtype or first.dtype))

    def flush(self, values: Floating) -> Floating:
        """Return what the device keeps of an array: 0 in place of subnormal numbers, if it flushes them."""
        name = values.dtype.name
        if not self.flushes or name not in ("float32", "bfloat16"):
            return values
        is_tiny = np.abs(values) < values.dtype.type(FORMATS[name].smallest_normal)
        return np.where(is_tiny, np.copysign(values.dtype.type(0), values), values)

    def _near(self, exact: Floating, operand: Floating, error: float) -> Floating:
        """Return a result with the error of a function of `operand`, rounded to the operand's dtype.

        Narrow operands are computed in float32 and rounded once more.
        """
        dtype = _accumulator(operand.dtype)
        room = (error - 1) * FORMATS[dtype.name].roundoff  # the rounding has one unit
        moved = exact * (1 + room * self._signs(operand)) if room > 0 and self.pattern is not None else exact
        return self.flush(moved.astype(dtype).astype(operand.dtype))

    def _signs(self, operand: Floating) -> Floating:
        """Return numbers from -1 to 1 for the error at each operand."""
        if self.pattern in ("up", "down"):
            return np.asarray(1.0 if self.pattern == "up" else -1.0)
        if self.pattern == "smooth":
            magnitude = np.abs(_wide(operand)).astype(np.float64)
            return np.asarray(np.sin(3 * np.log(np.where((magnitude > 0) & np.isfinite(magnitude), magnitude, 1.0))))
        bits = _wide(operand).astype(np.float64).view(np.uint64)
        mixed = (bits ^ (bits >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15)
        return np.where((mixed >> np.uint64(40)) & np.uint64(1), 1.0, -1.0)

    def _order(self, length: int) -> NDArray[np.intp]:
        """Return the order in which the terms of a sum are added."""
        order = np.arange(length)
        if self.pattern == "down":
            return order[::-1]
        if self.pattern == "random":
            return np.random.default_rng(length).permutation(length)
        if self.pattern == "smooth":
            return np.argsort(order % _LANES, kind="stable")
        return order


def _wide(values: Floating) -> Floating:
    """Return values in a format in which the functions' own errors do not matter."""
    return values.astype(np.longdouble if values.dtype == np.float64 else np.float64)


def _accumulator(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def rounded_to_bits(values: Floating, bits: int) -> Floating:
    """Round float32 numbers to that many significant bits, ties to even."""
    fraction, exponent = np.frexp(values)
    rounded: Floating = np.ldexp(np.rint(np.ldexp(fraction, bits)), exponent - bits).astype(values.dtype)
    return np.where(np.isfinite(values), rounded, values)


def shares(bits: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """Return a number from -1 to 1 for each of some integers, at random but the same for equal ones.

    Example:
        >>> shares(np.array([5, 6, 5]), 1).round(3).tolist()
        [0.251, 0.609, 0.251]
    """
    mixed = np.asarray(bits, np.int64).astype(np.uint64)
    mixed = mixed ^ (mixed >> np.uint64(29)) ^ np.uint64(seed * 0x2545F4914F6CDD1D % 2**64)
    with np.errstate(over="ignore"):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return np.asarray((mixed >> np.uint64(11)) * 2.0**-52 - 1.0)


# Every function rounded correctly, as in IEEE 754.
EXACT = Simulation(Arithmetic(), flushes=False, pattern=None)
