"""Noise in the primitives of JAX: see `parity_tests.losses.noisy`."""

from typing import Any

import numpy as np

from parity_tests.losses.simulated_jax import SimulatedDevice, Values
from parity_tests.truth.simulation import EXACT, shares

# Primitives that round.
_ROUND = frozenset(
    {
        *("acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cos", "cosh", "sin", "sinh", "tan", "tanh"),
        *("add", "add_any", "cumlogsumexp", "cumsum", "div", "dot_general", "mul", "reduce_prod", "reduce_sum", "sub"),
        *("digamma", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "lgamma", "log", "log1p", "logistic"),
        *("cbrt", "integer_pow", "pow", "rsqrt", "sqrt", "square"),
    }
)


class NoisyDevice(SimulatedDevice):
    """Runs programs of which each operation's result is moved by a share of it, at random.

    Args:
        step: the largest share.
        seed: of the shares.
    """

    def __init__(self, step: float, seed: int) -> None:
        """Keep both."""
        super().__init__("cpu", EXACT)
        self.step, self.seed = step, seed

    def _apply(self, equation: Any, operands: Values) -> Values:
        results = super()._apply(equation, operands)
        return [self._moved(each) for each in results] if equation.primitive.name in _ROUND else results

    def _moved(self, values: Any) -> Any:
        kind = np.dtype(f"i{values.dtype.itemsize}") if values.dtype.itemsize in (2, 4, 8) else None
        if kind is None or values.dtype.kind not in "fV" or not np.size(values):
            return values
        values = np.ascontiguousarray(values).reshape(np.shape(values))
        share = 1 + self.step * shares(values.view(kind).astype(np.int64), self.seed)
        return (values.astype(np.float64) * share).astype(values.dtype)
