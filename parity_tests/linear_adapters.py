"""Linear layers with the loss as NumPy arrays of loss and gradients: JAX's, torch's, and wrong ones."""

from dataclasses import replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import torch
from numpy.typing import NDArray

import lsce_jax
import lsce_torch
from parity_tests.adapters import JaxAdapter, TorchAdapter, operands_of, to_torch
from parity_tests.cases import Case
from parity_tests.linear_bounds import LayerArithmetic, LinearResult
from parity_tests.linear_cases import LinearCase
from parity_tests.mutants import evaluate
from parity_tests.precision import FloatArray, as_dtype, compute_dtype, round_to


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


# Name -> what is wrong. Those that the loss alone can have are faults of `parity_tests.mutants`.
LINEAR_FAULTS = {
    "other_off": "e/(K-1) for e/K, or e/K for e/(K-1)",
    "unsmoothed_gradient": "the smoothing is missing in the gradient",
    "all_rows_counted": "the mean divides by all rows, not by those that count",
    "upstream_ignored": "the gradient is not multiplied with what comes from upstream",
    "z_loss_gradient": "the z-loss is missing in the gradient",
    "softcap_derivative": "the derivative of the softcap is missing",
    "max_sup_at_label": "the smoothing is taken from the label, not from the largest logit",
    "last_chunk_dropped": "a last chunk that is not full is left out",
    "last_chunk_repeated": "a last chunk that is not full is filled with the rows before it, which count twice",
    "weight_of_last_chunk": "the weight's gradient is that of the last chunk alone",
    "bias_of_last_chunk": "the bias's gradient is that of the last chunk alone",
    "bias_without_gradient": "the gradient of the bias is 0",
    "bias_not_added": "the logits are without the bias",
    "bias_in_each_feature": "the bias is added once more",
    "ignored_rows_in_weight": "rows that do not count enter the weight's gradient",
    "zero_times_nan": "the weight's gradient has 0 times what rows hold that do not count",
    "strided_rows": "hidden's gradient has the rows of the chunks one after the other, which lie apart",
    "weight_scaled_twice": "the weight's gradient is multiplied twice with what comes from upstream",
    "weight_not_scaled": "the weight's gradient is not multiplied with what comes from upstream",
    "weight_transposed": "hidden's gradient is the product with the transposed weight",
    "hidden_for_weight": "hidden's gradient is the product with hidden",
    "bfloat16_chunks": "the weight's gradient is added up in bfloat16",
}


def evaluate_linear(case: LinearCase, fault: str | None = None) -> LinearResult:
    """Return loss and gradients of a case in NumPy, wrong in the way that `fault` names, sound without one.

    The loss is that of `parity_tests.mutants` in the compute dtype; the products are exact beside that.
    """
    assert fault is None or fault in LINEAR_FAULTS, fault
    with np.errstate(all="ignore"):
        return _evaluate_linear(case, fault)


def _evaluate_linear(case: LinearCase, fault: str | None) -> LinearResult:
    compute, counted = compute_dtype(case.dtype), case.loss.rows().counted
    weight = case.multiplied_weight
    hidden = np.where(counted[:, None], case.rows(), 0.0)
    times_bias = {"bias_not_added": 0, "bias_in_each_feature": 2}.get(str(fault), 1)
    logits = hidden @ weight + (0 if case.bias is None else times_bias * case.bias)
    case_of_loss = replace(case.loss, dtype=compute, logits=round_to(logits, compute).reshape(case.loss.logits.shape))
    result = evaluate(case_of_loss, fault if fault in _OF_LOSS else None)
    loss, gradient = result.loss, result.gradient
    chunks = [slice(start, start + case.chunk_size) for start in range(0, len(hidden), case.chunk_size)]
    last = chunks[-1] if chunks else slice(0)
    is_partial = len(hidden[last]) < case.chunk_size and len(chunks) > 1
    if fault in {"last_chunk_dropped", "last_chunk_repeated"} and is_partial:
        loss, gradient = _wrong_last_chunk(case_of_loss, loss, gradient, last, fault)
    of_hidden = gradient @ weight.T
    if fault == "weight_transposed" and weight.shape[0] == weight.shape[1]:
        of_hidden = gradient @ weight
    if fault == "hidden_for_weight" and hidden.shape[0] == weight.shape[1]:
        of_hidden = gradient @ hidden
    if fault == "strided_rows" and len(chunks) > 1:
        whole = len(hidden) - len(hidden) % len(chunks)
        apart = of_hidden[:whole].reshape(-1, len(chunks), of_hidden.shape[1]).swapaxes(0, 1)
        of_hidden[:whole] = apart.reshape(whole, -1)
    terms, of_terms = hidden, gradient
    if fault == "zero_times_nan":
        terms = case.rows()
    if fault == "ignored_rows_in_weight":
        finite = np.nan_to_num(case.rows(), nan=1.0, posinf=1.0, neginf=1.0)
        largest = np.max(np.abs(gradient[counted]), initial=0.0)
        terms, of_terms = finite, np.where(counted[:, None], gradient, largest)
    of_weight = _added_up(terms, of_terms, chunks, fault)
    upstream = case.loss.upstream
    if upstream is not None and upstream.ndim == 0:
        of_weight = of_weight * {"weight_scaled_twice": upstream, "weight_not_scaled": 1 / upstream}.get(str(fault), 1)
    parts = {"loss": loss, "hidden": of_hidden, "weight": of_weight}
    if case.bias is not None:
        summed = gradient[last] if fault == "bias_of_last_chunk" else gradient
        parts["bias"] = summed.sum(axis=0) * (fault != "bias_without_gradient")
    dtypes = {"loss": compute, "hidden": case.dtype, "weight": case.weight_dtype, "bias": case.weight_dtype}
    dtypes = {name: dtypes[name] for name in parts}
    return LinearResult({name: round_to(part, dtypes[name]) for name, part in parts.items()}, dtypes)


_OF_LOSS = (
    "other_off",
    "unsmoothed_gradient",
    "all_rows_counted",
    "upstream_ignored",
    "z_loss_gradient",
    "softcap_derivative",
    "max_sup_at_label",
)


def _added_up(hidden: FloatArray, gradient: FloatArray, chunks: list[slice], fault: str | None) -> FloatArray:
    """Return the weight's gradient."""
    total = np.zeros((hidden.shape[1], gradient.shape[1]))
    for chunk in chunks:
        product = hidden[chunk].T @ gradient[chunk]
        if fault == "weight_of_last_chunk":
            total = product
        elif fault == "bfloat16_chunks":
            total = round_to(total + product, "bfloat16")
        else:
            total = total + product
    return total


def _wrong_last_chunk(
    case: Case, loss: FloatArray, gradient: FloatArray, last: slice, fault: str
) -> tuple[FloatArray, FloatArray]:
    """Return loss and gradient without the last rows, or with as many before them counted twice."""
    row_losses = evaluate(replace(case, options={**case.options, "reduction": "none"})).loss
    loss, gradient = loss.copy(), gradient.copy()
    num_rows = len(gradient)
    wrong, times = (last, 0) if fault == "last_chunk_dropped" else (slice(last.start - 1, last.start), 2)
    if loss.ndim:
        loss[wrong] *= times
    elif num_rows and np.sum(row_losses):
        loss = loss * (1 + (times - 1) * np.sum(row_losses[wrong]) / np.sum(row_losses))
    gradient[wrong] *= times
    return loss, gradient
