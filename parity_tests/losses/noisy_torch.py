"""Noise in the operations of torch, forward and backward: see `parity_tests.losses.noisy`."""

from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode

from parity_tests.losses.simulated_torch import MADE_OF_OTHERS
from parity_tests.truth.simulation import shares

# Operations that round. What others do, such as a kernel of a whole loss, stays as it is.
_ROUND = frozenset(
    {
        *("acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cos", "cosh", "sin", "sinh", "tan", "tanh"),
        *("add", "addcdiv", "addcmul", "cumsum", "div", "lerp", "mean", "mul", "prod", "rsub", "sub", "sum"),
        *("addbmm", "addmm", "addmv", "baddbmm", "bmm", "dot", "mm", "mv", "norm", "std", "var"),
        *("digamma", "erf", "erfc", "exp", "exp2", "expm1", "lgamma", "log", "log10", "log1p", "log2"),
        *("pow", "reciprocal", "rsqrt", "sigmoid", "special_entr", "sqrt"),
    }
)
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


class NoiseMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Moves the result of each operation by a share of it, at random.

    Args:
        step: the largest share.
        seed: of the shares.
    """

    def __init__(self, step: float, seed: int) -> None:
        """Keep both."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.step, self.seed = step, seed

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return the result of an operation, moved."""
        kwargs = kwargs or {}
        name = operation._schema.name.partition("::")[2].removesuffix("_")
        if name in MADE_OF_OTHERS and operation in decomposition_table:
            with self:
                return decomposition_table[operation](*args, **kwargs)
        result = operation(*args, **kwargs)
        if name in _ROUND and isinstance(result, Tensor) and result.is_floating_point():
            bits = result.detach().clone().view(_INTEGERS[result.element_size()]).to(torch.int64).cpu().numpy()
            result.mul_(1 + self.step * torch.from_numpy(shares(bits, self.seed)).to(result.device, result.dtype))
        return result
