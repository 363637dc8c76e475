"""Adapters turn a framework's loss into NumPy arrays of loss and gradient. Each loads its framework when it is made."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from parity_tests.bounds import Arithmetic
from parity_tests.cases import Case
from parity_tests.comparison import Result
from parity_tests.precision import as_dtype, compute_dtype


class Adapter(Protocol):
    """A loss of some framework on some device."""

    name: str
    arithmetic: Arithmetic

    def __call__(self, case: Case) -> Result:
        """Return loss and gradient of a case."""
        ...


class JaxAdapter:
    """`lsce_jax` or a function of the same signature.

    Args:
        loss: the function; `lsce_jax.label_smoothed_cross_entropy` by default.
        jit: whether to compile it.
        implementation: which one to choose; None leaves that to the function.
    """

    def __init__(
        self, loss: Callable[..., Any] | None = None, jit: bool = True, implementation: str | None = None
    ) -> None:
        """Load JAX."""
        import lsce_jax

        self.loss = loss or lsce_jax.label_smoothed_cross_entropy
        if implementation is not None:
            self.loss = partial(self.loss, implementation=implementation)
        self.jit = jit
        self.name = _name("jax", implementation, "" if jit else "eager")
        # XLA's expansions of exp, log1p and tanh for CPUs, measured up to 1.9, 3.2 and 3.6.
        self.arithmetic = Arithmetic(exp=3.0, log1p=4.0, tanh=5.0)

    def __call__(self, case: Case) -> Result:
        """Return loss and gradient of a case."""
        import jax

        arrays, options = operands_of(case)
        with jax.enable_x64(case.dtype == "float64"):
            operands = {name: jax.numpy.asarray(value) for name, value in arrays.items()}
            upstream = operands.pop("upstream")

            def total(logits: Any, operands: dict[str, Any], upstream: Any) -> tuple[Any, Any]:
                loss = self.loss(logits, **operands, **options)
                return (loss * upstream).sum(), loss

            step = jax.value_and_grad(total, has_aux=True)
            (_, loss), gradient = (jax.jit(step) if self.jit else step)(operands.pop("logits"), operands, upstream)
            return _result(case, np.asarray(loss), np.asarray(gradient), loss.dtype.name, gradient.dtype.name)


class TorchAdapter:
    """`lsce_torch` or a function of the same signature.

    Args:
        loss: the function; `lsce_torch.label_smoothed_cross_entropy` by default.
        compiled: whether to compile it, as one graph.
        implementation: which one to choose; None leaves that to the function.
    """

    def __init__(
        self, loss: Callable[..., Any] | None = None, compiled: bool = False, implementation: str | None = None
    ) -> None:
        """Load torch."""
        import torch

        import lsce_torch

        self.loss = loss or lsce_torch.label_smoothed_cross_entropy
        if implementation is not None:
            self.loss = partial(self.loss, implementation=implementation)
        if compiled:
            self.loss = torch.compile(self.loss, fullgraph=True)
        self.name = _name("torch", implementation, "compiled" if compiled else "")
        # SLEEF and libm, measured up to 1.2; exp within softmax up to 2.6.
        self.arithmetic = Arithmetic(exp=3.0, log1p=2.0, tanh=2.0)

    def __call__(self, case: Case) -> Result:
        """Return loss and gradient of a case."""
        arrays, options = operands_of(case)
        operands = {name: to_torch(value) for name, value in arrays.items()}
        upstream = operands.pop("upstream")
        logits = operands.pop("logits").requires_grad_()
        loss = self.loss(logits, **operands, **options)
        (loss * upstream).sum().backward()
        gradient, kept = logits.grad, loss.detach()
        names = [str(tensor.dtype).removeprefix("torch.") for tensor in (kept, gradient)]
        return _result(case, kept.double().numpy(), gradient.double().numpy(), *names)


def _name(*parts: str | None) -> str:
    return " ".join(part for part in parts if part)


def operands_of(case: Case) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Split a case into arrays and plain options, arrays that are no logits in the compute dtype."""
    compute = compute_dtype(case.dtype)
    soft = case.labels.dtype.kind == "f"
    arrays: dict[str, Any] = {
        "logits": as_dtype(case.logits, case.dtype),
        "labels": as_dtype(case.labels, case.dtype) if soft else case.labels,
        "where": case.where,
        "class_mask": case.class_mask,
        "upstream": as_dtype(np.asarray(1.0 if case.upstream is None else case.upstream), compute),
    }
    for name in ("class_weight", "prior"):
        values = getattr(case, name)
        arrays[name] = None if values is None else as_dtype(values, compute)
    options = {"reduction": "none", **case.options, "axis": case.axis}
    if isinstance(case.smoothing, float):
        options["smoothing"] = case.smoothing
    else:
        arrays["smoothing"] = as_dtype(case.smoothing, compute)
    return {name: value for name, value in arrays.items() if value is not None}, options


def to_torch(array: NDArray[Any]) -> Any:
    """Return an array as a tensor of the same bits."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape).copy())


def _result(case: Case, loss: NDArray[Any], gradient: NDArray[Any], loss_dtype: str, gradient_dtype: str) -> Result:
    moved = np.moveaxis(gradient.astype(np.float64), case.axis, -1)
    num_rows = int(np.prod(case.batch_shape))
    loss = loss.astype(np.float64)
    return Result(
        loss=loss.reshape(num_rows) if case.options.get("reduction", "none") == "none" else loss,
        gradient=moved.reshape(num_rows, case.num_classes),
        loss_dtype=loss_dtype,
        gradient_dtype=gradient_dtype,
    )
