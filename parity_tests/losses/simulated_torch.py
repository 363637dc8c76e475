"""A torch program on the simulated arithmetic of a device: one operation after another, forward and backward.

lsce_torch takes the way that it takes on that device. Operations that torch has as one kernel on a CPU, such as
log_softmax, are done as the operations that they are made of.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode

from lsce_torch import device
from parity_tests.losses.adapters import to_torch
from parity_tests.truth.simulation import Simulation

# Functions of one operand that `Simulation.apply` has.
_ELEMENTARY = frozenset({"exp", "exp2", "expm1", "log", "log10", "log1p", "log2", "tanh"})
# Kernels of which torch has a decomposition. Its operations come back here.
MADE_OF_OTHERS = frozenset(
    {
        "_log_softmax",
        "_log_softmax_backward_data",
        "_softmax",
        "_softmax_backward_data",
        "binary_cross_entropy",
        "binary_cross_entropy_backward",
        "binary_cross_entropy_with_logits",
        "log_sigmoid_backward",
        "log_sigmoid_forward",
        "logaddexp",
        "logsumexp",
        "mse_loss",
        "mse_loss_backward",
        "nll_loss2d_backward",
        "nll_loss2d_forward",
        "nll_loss_backward",
        "nll_loss_forward",
        "sigmoid_backward",
        "smooth_l1_loss",
        "softplus",
        "softplus_backward",
        "tanh_backward",
        "xlogy",
    }
)


@contextmanager
def on_device(device_type: str, simulation: Simulation) -> Iterator[None]:
    """Run what follows on the simulated arithmetic, and lsce_torch as on that type of device.

    Args:
        device_type: "cpu", "cuda" or "tpu".
        simulation: the arithmetic.
    """
    with mock.patch.object(device, "device_type", return_value=device_type), _SimulationMode(simulation):
        yield


class _SimulationMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces the arithmetic of torch's operations."""

    def __init__(self, simulation: Simulation) -> None:
        """Keep the arithmetic."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.simulation = simulation

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return the result of an operation on the device."""
        kwargs = kwargs or {}
        name = operation._schema.name.partition("::")[2]
        in_place = name.endswith("_")
        name = name.removesuffix("_")
        if name in MADE_OF_OTHERS and operation in decomposition_table:
            with self:
                return decomposition_table[operation](*args, **kwargs)
        with np.errstate(all="ignore"):
            computed = _computed(self.simulation, name, args, kwargs)
        if computed is not None:
            return _stored(computed, args[0] if in_place else kwargs.get("out"))
        result = operation(*args, **kwargs)
        if isinstance(result, Tensor) and (in_place or not _is_view(operation)):
            _flush(result, self.simulation)
        return result


def _is_view(operation: Any) -> bool:
    return any(each.alias_info is not None and not each.alias_info.is_write for each in operation._schema.returns)


def _flush(result: Tensor, simulation: Simulation) -> None:
    if simulation.flushes and result.dtype in (torch.float32, torch.bfloat16):
        result.masked_fill_(result.abs() < torch.finfo(result.dtype).tiny, 0)


def _stored(result: Tensor, into: Tensor | None) -> Tensor:
    """Return a result, written into the tensor that the operation has to write into, if there is one."""
    if into is None:
        return result
    if into.shape != result.shape:
        into.resize_(result.shape)
    return into.copy_(result)


# --- Arithmetic -------------------------------------------------------------------------------------------------------


def _computed(simulation: Simulation, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the result of an operation on the device; None for one that rounds as IEEE 754 says."""
    given = {key: value for key, value in kwargs.items() if key != "out"}
    if not all(each.is_floating_point() for each in (*args, *given.values()) if isinstance(each, Tensor)):
        return None
    if name in _ELEMENTARY:
        return to_torch(simulation.apply(name, _to_numpy(args[0])))
    return _OPERATIONS[name](simulation, *args, **given) if name in _OPERATIONS else None


def _to_numpy(tensor: Tensor) -> Any:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _divide(simulation: Simulation, first: Tensor, other: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        return None
    dtype = torch.result_type(first, other)
    numerator, denominator = (torch.as_tensor(value).to(dtype) for value in (first, other))
    return to_torch(simulation.divide(_to_numpy(numerator), _to_numpy(denominator)))


def _reciprocal(simulation: Simulation, first: Tensor) -> Any:
    return _divide(simulation, torch.ones((), dtype=first.dtype), first)


def _sigmoid(simulation: Simulation, first: Tensor) -> Any:
    return to_torch(simulation.logistic(_to_numpy(first)))


def _entropy(simulation: Simulation, first: Tensor) -> Any:
    """Return -x log x: 0 at 0, -inf below."""
    values = _to_numpy(first)
    terms = -values * simulation.apply("log", np.where(values > 0, values, values.dtype.type(1)))
    return to_torch(np.where(values < 0, values.dtype.type(-np.inf), np.where(values > 0, terms, values)))


def _sum(
    simulation: Simulation,
    first: Tensor,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    values = _to_numpy(first if dtype is None else first.to(dtype))
    axes = [] if dim is None else [dim] if isinstance(dim, int) else list(dim)
    axes = [axis % max(first.ndim, 1) for axis in axes] or list(range(first.ndim))
    total = to_torch(simulation.sum(values, axes if first.ndim else []))
    for axis in sorted(axes) if keepdim else []:
        total = total.unsqueeze(axis)
    return total


def _mean(simulation: Simulation, first: Tensor, *args: Any, **kwargs: Any) -> Any:
    total = _sum(simulation, first, *args, **kwargs)
    return _divide(simulation, total, torch.tensor(first.numel() / max(total.numel(), 1), dtype=total.dtype))


def _matmul(simulation: Simulation, first: Tensor, second: Tensor) -> Any:
    left, right = _to_numpy(first), _to_numpy(second)
    as_rows = left if left.ndim > 1 else left[None]
    as_columns = right if right.ndim > 1 else right[:, None]
    product = simulation.matmul(as_rows, as_columns)
    return to_torch(product.reshape((*left.shape[:-1], *(right.shape[-1:] if right.ndim > 1 else ()))))


def _add_product(
    simulation: Simulation, added: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1
) -> Any:
    product = _matmul(simulation, first, second) * alpha
    return product if beta == 0 else product + beta * added


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "addmm": _add_product,
    "addmv": _add_product,
    "baddbmm": _add_product,
    "bmm": _matmul,
    "div": _divide,
    "dot": _matmul,
    "mean": _mean,
    "mm": _matmul,
    "mv": _matmul,
    "reciprocal": _reciprocal,
    "sigmoid": _sigmoid,
    "special_entr": _entropy,
    "sum": _sum,
}
