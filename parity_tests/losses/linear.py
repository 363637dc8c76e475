"""Linear layers with the loss as NumPy arrays of loss and gradients: JAX's and torch's."""

from dataclasses import replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import torch
from numpy.typing import NDArray

import lsce_jax
import lsce_torch
from parity_tests.losses.adapters import JaxAdapter, TorchAdapter, operands_of, to_torch
from parity_tests.truth.linear_bounds import LayerArithmetic, LinearResult
from parity_tests.truth.linear_cases import LinearCase
from parity_tests.truth.precision import as_dtype, compute_dtype


class LinearAdapter(Protocol):
    """A linear layer with the loss."""

    name: str

    def arithmetic(self, case: LinearCase) -> LayerArithmetic:
        """Return how accurate it is in a case."""
        ...

    def __call__(self, case: LinearCase, chunk_size: int | None = None) -> LinearResult:
        """Return loss and gradients of a case."""
        ...


class JaxLinear:
    """`lsce_jax.linear_label_smoothed_cross_entropy`, or the dense loss of the logits.

    Args:
        dense: whether it is the dense loss, of logits in the compute dtype.
        options: of the call, besides those of the case.
    """

    def __init__(self, dense: bool = False, **options: Any) -> None:
        """Choose the function."""
        self.dense, self.options = dense, options
        self.name = " ".join(["jax", "dense" if dense else "linear", *map(str, options)])

    def arithmetic(self, case: LinearCase) -> LayerArithmetic:
        """Return how accurate it is: what JAX differentiates comes in the dtype that the weight is multiplied in."""
        by_row = case.loss.options.get("reduction", "none") == "none"
        differentiated = by_row or self.dense or bool(self.options.get("recompute"))
        return LayerArithmetic(
            JaxAdapter().arithmetic,
            narrow_logits=False,
            narrow_products=differentiated,
            narrow_hidden=differentiated,
        )

    def __call__(self, case: LinearCase, chunk_size: int | None = None) -> LinearResult:
        """Return loss and gradients of a case."""
        layer, arrays, options = _operands(case)
        options |= self.options

        def loss_of(layer: dict[str, Any], operands: dict[str, Any]) -> Any:
            if not self.dense:
                return lsce_jax.linear_label_smoothed_cross_entropy(
                    **layer, **operands, chunk_size=chunk_size, **options
                )
            hidden, dtype = layer["hidden"], compute_dtype(case.dtype)
            weight = layer["weight"].astype(hidden.dtype)
            logits = jnp.matmul(hidden, weight, preferred_element_type=dtype)
            if "bias" in layer:
                logits = logits + layer["bias"].astype(dtype).reshape((1,) * (logits.ndim - 1) + (-1,))
            return lsce_jax.label_smoothed_cross_entropy(logits, **operands, **options)

        def total(layer: dict[str, Any], operands: dict[str, Any], upstream: Any) -> tuple[Any, Any]:
            loss = loss_of(layer, operands)
            return (loss * upstream).sum(), loss

        with jax.enable_x64(case.dtype == "float64"):
            operands = {name: jnp.asarray(value) for name, value in arrays.items()}
            upstream = operands.pop("upstream")
            given = {name: jnp.asarray(value) for name, value in layer.items()}
            step = jax.jit(jax.value_and_grad(total, has_aux=True))
            (_, loss), gradients = step(given, operands, upstream)
            parts = {"loss": loss, **gradients}
            return _result(case, {name: np.asarray(part) for name, part in parts.items()})


class TorchLinear:
    """`lsce_torch.linear_label_smoothed_cross_entropy`, or the dense loss of the logits.

    Args:
        dense: whether it is the dense loss.
        options: of the call, besides those of the case.
    """

    def __init__(self, dense: bool = False, **options: Any) -> None:
        """Choose the function."""
        self.dense, self.options = dense, options
        self.name = " ".join(["torch", "dense" if dense else "linear", *map(str, options)])

    def arithmetic(self, case: LinearCase) -> LayerArithmetic:
        """Return how accurate it is: a product of torch comes in the dtype of its factors."""
        loss = TorchAdapter().arithmetic
        return LayerArithmetic(
            loss, narrow_logits=True, narrow_products=self.dense, narrow_hidden=True, narrow_bias=self.dense
        )

    def __call__(self, case: LinearCase, chunk_size: int | None = None) -> LinearResult:
        """Return loss and gradients of a case."""
        arrays, operands, options = _operands(case)
        options |= self.options
        tensors = {name: to_torch(value) for name, value in operands.items()}
        upstream = tensors.pop("upstream")
        layer = {name: to_torch(value) for name, value in arrays.items()}
        # JAX has the features first.
        layer["weight"] = layer["weight"].T.contiguous()
        layer = {name: tensor.requires_grad_() for name, tensor in layer.items()}
        if self.dense:
            dtype, bias = layer["hidden"].dtype, layer.get("bias")
            logits = torch.nn.functional.linear(
                layer["hidden"], layer["weight"].to(dtype), None if bias is None else bias.to(dtype)
            )
            loss = lsce_torch.label_smoothed_cross_entropy(logits, **tensors, **options)
        else:
            loss = lsce_torch.linear_label_smoothed_cross_entropy(**layer, **tensors, chunk_size=chunk_size, **options)
        (loss * upstream).sum().backward()
        parts = {"loss": loss.detach(), **{name: tensor.grad for name, tensor in layer.items()}}
        dtypes = {name: str(part.dtype).removeprefix("torch.") for name, part in parts.items()}
        widened = {name: part.double().numpy() for name, part in parts.items()}
        widened["weight"] = widened["weight"].T
        return _result(case, widened, dtypes)


def _operands(case: LinearCase) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Split a case into the arrays of the layer, other arrays, and plain options."""
    arrays, options = operands_of(replace(case.loss, logits=np.zeros_like(case.loss.logits)))
    del arrays["logits"]
    layer = {"hidden": as_dtype(case.hidden, case.dtype), "weight": as_dtype(case.weight, case.weight_dtype)}
    if case.bias is not None:
        layer["bias"] = as_dtype(case.bias, case.weight_dtype)
    return layer, arrays, options


def _result(case: LinearCase, parts: dict[str, NDArray[Any]], dtypes: dict[str, str] | None = None) -> LinearResult:
    dtypes = dtypes or {name: part.dtype.name for name, part in parts.items()}
    widened = {name: part.astype(np.float64) for name, part in parts.items()}
    num_rows = case.loss.rows().logits.shape[0]
    if case.loss.options.get("reduction", "none") == "none":
        widened["loss"] = widened["loss"].reshape(num_rows)
    widened["hidden"] = widened["hidden"].reshape(num_rows, case.hidden.shape[-1])
    return LinearResult(widened, dtypes)
