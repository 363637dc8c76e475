"""The errors of a device's arithmetic that the bounds assume."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Terms that are added in sequence.
BLOCK = 32


def tree_depth(length: int) -> int:
    """Return the depth of a blocked sum: 32 terms in sequence, then 32 such sums, and so on.

    XLA for CPUs sums one row so, up to 63 deep at 2047 terms; torch adds blocks in pairs and is shallower. The tests
    and `lsce-parity fingerprint` measure that the sums of every framework stay within it.
    """
    return max(0, min(length - 1, BLOCK * int(np.ceil(np.log2(max(length, 1)) / np.log2(BLOCK)))))


def any_order(length: int) -> int:
    """Return the largest depth that a sum can have: one term after another."""
    return max(0, length - 1)


# By name, for files.
DEPTHS: dict[str, Callable[[int], int]] = {"blocks": tree_depth, "any": any_order}
# The fields of `Arithmetic` that are errors.
ERRORS = ("exp", "log", "log1p", "tanh", "division")
NARROW = frozenset({"logits", "products", "products of rows", "hidden", "bias"})
# Significant bits of float32.
FULL = 24


@dataclass(frozen=True)
class Arithmetic:
    """How accurate a device's elementary operations are, in units of the roundoff. The tests measure each.

    Args:
        exp: error of exp, and of expm1 near 0.
        log: error of log.
        log1p: error of log1p.
        tanh: error of tanh.
        division: error of a quotient; 1 if it is rounded correctly.
        matmul_bits: significant bits that a matrix product keeps of a float32 operand, with default settings.
        depth: longest chain of additions in a sum of that many terms.
        exp_of_log: whether the loss may compute the probabilities of its gradient as exp(log_softmax), which have the
            error of the logarithm too.
        narrow: what a linear layer in bfloat16 or float16 stores in that dtype on the way: "logits", with the bias and
            the gradient that the bias sums; "products", the weight's gradient of a chunk, or "products of rows" where
            the losses are not reduced; "hidden", its gradient before the factor of a sum or mean; "bias", its gradient
            before it comes in the dtype of the bias.
    """

    exp: float = 3.0
    log: float = 4.0
    log1p: float = 4.0
    tanh: float = 5.0
    division: float = 1.0
    matmul_bits: int = FULL
    depth: Callable[[int], int] = tree_depth
    exp_of_log: bool = False
    narrow: frozenset[str] = NARROW


def name_of_depth(arithmetic: Arithmetic) -> str | None:
    """Return the name of the depth of its sums; None for one that has no name."""
    return next((name for name, depth in DEPTHS.items() if depth is arithmetic.depth), None)
