"""Facts about floating-point formats, and rounding to them: NumPy and ml_dtypes only."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Format:
    """A binary floating-point format.

    Args:
        roundoff: unit roundoff u, half the distance from 1 to the next number.
        smallest_normal: numbers below it may be flushed to zero.
        smallest: the smallest positive number, a subnormal one.
    """

    roundoff: float
    smallest_normal: float
    smallest: float


FORMATS = {
    "float64": Format(2.0**-53, 2.0**-1022, 2.0**-1074),
    "float32": Format(2.0**-24, 2.0**-126, 2.0**-149),
    "bfloat16": Format(2.0**-8, 2.0**-126, 2.0**-133),
    "float16": Format(2.0**-11, 2.0**-14, 2.0**-24),
}


def compute_dtype(dtype: str) -> str:
    """Return the dtype that the loss of logits of `dtype` is computed and returned in."""
    return "float64" if dtype == "float64" else "float32"


def round_to(values: NDArray[np.floating], dtype: str) -> FloatArray:
    """Round to the nearest number of `dtype`; the result is held in float64.

    Example:
        >>> round_to(np.array([0.1]), "bfloat16")
        array([0.10009766])
    """
    return np.asarray(values).astype(np.dtype(_NUMPY_DTYPES[dtype])).astype(np.float64)


def as_dtype(values: FloatArray, dtype: str) -> NDArray[np.generic]:
    """Return values that are numbers of `dtype` already as a NumPy array of it.

    Raises:
        ValueError: a value is no number of that dtype.
    """
    narrow = values.astype(np.dtype(_NUMPY_DTYPES[dtype]))
    if not np.array_equal(narrow.astype(np.float64), values, equal_nan=True):
        raise ValueError(f"values are not representable in {dtype}; round them with round_to first")
    return narrow


def ulp(values: FloatArray, dtype: str) -> FloatArray:
    """Return the distance between neighbouring numbers of `dtype` at the size of each value.

    Example:
        >>> ulp(np.array([1.0, 1.5, 2.0]), "float16") * 1024
        array([1., 1., 2.])
    """
    kind = FORMATS[dtype]
    exponent = np.floor(np.log2(np.maximum(np.abs(values), kind.smallest_normal)))
    spacing: FloatArray = np.exp2(exponent) * 2 * kind.roundoff
    return spacing


_NUMPY_DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
