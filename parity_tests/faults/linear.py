"""Linear layers with wrong losses, to prove that the bounds reject them; and the bank of all faults."""

from dataclasses import replace

import numpy as np

from parity_tests.faults.dense import FAULTS, evaluate
from parity_tests.faults.sharded import SHARDED_FAULTS, evaluate_sharded, sharded_faults
from parity_tests.truth.cases import Case, LinearCase
from parity_tests.truth.comparison import AnyResult, LinearResult, Result
from parity_tests.truth.precision import FloatArray, compute_dtype, round_to
from parity_tests.truth.simulation import EXACT, Simulation

PREFIX = "linear_"
# Faults that the loss alone can have, which are tried in a linear layer too.
OF_LOSS = (
    "other_off",
    "unsmoothed_gradient",
    "all_rows_counted",
    "upstream_ignored",
    "z_loss_gradient",
    "softcap_derivative",
    "max_sup_at_label",
)
OF_LAYER = {
    "last_chunk_dropped": "a last chunk that is not full is left out",
    "last_chunk_repeated": "a last chunk that is not full is filled with the previous rows, which count twice",
    "weight_of_last_chunk": "the weight's gradient is that of the last chunk alone",
    "bias_of_last_chunk": "the bias's gradient is that of the last chunk alone",
    "bias_without_gradient": "the gradient of the bias is 0",
    "bias_not_added": "the bias is missing in the logits",
    "bias_in_each_feature": "the bias is added twice",
    "ignored_rows_in_weight": "rows that do not count enter the weight's gradient",
    "zero_times_nan": "the weight's gradient contains 0 times the values of rows that do not count",
    "strided_rows": "the chunks are strided over the rows, but hidden's gradient has them one after the other",
    "weight_scaled_twice": "the weight's gradient is multiplied twice by the incoming gradient",
    "weight_not_scaled": "the weight's gradient is not multiplied by the incoming gradient",
    "weight_transposed": "hidden's gradient is the product with the transposed weight",
    "hidden_for_weight": "hidden's gradient is the product with hidden",
    "bfloat16_chunks": "the weight's gradient is added up in bfloat16",
}
# Name -> what is wrong.
LINEAR_FAULTS = {PREFIX + name: text for name, text in ({name: FAULTS[name] for name in OF_LOSS} | OF_LAYER).items()}
BANK = FAULTS | LINEAR_FAULTS | SHARDED_FAULTS


def wrong_result(case: Case, fault: str | None = None, arithmetic: Simulation = EXACT) -> AnyResult:
    """Return what a loss with that fault of the bank gives for a case; the sound result without one.

    Args:
        case: the case.
        fault: the fault.
        arithmetic: of the device; in a linear layer that of the loss alone.
    """
    if isinstance(case, LinearCase):
        return evaluate_linear(case, fault, arithmetic)
    return _evaluate_loss(case, fault, arithmetic)


def is_known(fault: str) -> bool:
    """Return whether the bank has a fault of that name."""
    return fault in BANK or fault in sharded_faults()


def describe(fault: str) -> str:
    """Return what is wrong in a fault of the bank."""
    name, _, devices = fault.partition(":")
    return f"{BANK[name]} ({devices} devices)" if devices else BANK[name]


def _evaluate_loss(case: Case, fault: str | None, arithmetic: Simulation) -> Result:
    if fault is not None and fault in sharded_faults():
        return evaluate_sharded(case, fault, arithmetic)
    return evaluate(case, fault if fault in FAULTS else None, arithmetic)


def evaluate_linear(case: LinearCase, fault: str | None = None, arithmetic: Simulation = EXACT) -> LinearResult:
    """Return loss and gradients of a case in NumPy, wrong in the way that `fault` names, sound without one.

    The loss is that of `parity_tests.faults.dense` in the compute dtype, with any of its faults; the products
    are in float64.
    """
    assert fault is None or is_known(fault), fault
    with np.errstate(all="ignore"):
        return _evaluate_linear(case, None if fault is None else fault.removeprefix(PREFIX), arithmetic)


def _evaluate_linear(case: LinearCase, fault: str | None, arithmetic: Simulation) -> LinearResult:
    compute, counted = compute_dtype(case.dtype), case.rows().counted
    weight = case.multiplied_weight
    hidden = np.where(counted[:, None], case.hidden_rows, 0.0)
    times_bias = {"bias_not_added": 0, "bias_in_each_feature": 2}.get(str(fault), 1)
    logits = hidden @ weight + (0 if case.bias is None else times_bias * case.bias)
    case_of_loss = replace(case, dtype=compute, logits=round_to(logits, compute).reshape(case.logits.shape))
    result = _evaluate_loss(case_of_loss, fault, arithmetic)
    loss, gradient = result.loss, result.gradient
    chunk_size = case.chunk_size or max(1, len(hidden))
    chunks = [slice(start, start + chunk_size) for start in range(0, len(hidden), chunk_size)]
    last = chunks[-1] if chunks else slice(0)
    is_partial = len(hidden[last]) < chunk_size and len(chunks) > 1
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
        terms = case.hidden_rows
    if fault == "ignored_rows_in_weight":
        finite = np.nan_to_num(case.hidden_rows, nan=1.0, posinf=1.0, neginf=1.0)
        largest = np.max(np.abs(gradient[counted]), initial=0.0)
        terms, of_terms = finite, np.where(counted[:, None], gradient, largest)
    of_weight = _added_up(terms, of_terms, chunks, fault)
    upstream = case.upstream
    if upstream is not None and upstream.ndim == 0:
        of_weight = of_weight * {"weight_scaled_twice": upstream, "weight_not_scaled": 1 / upstream}.get(str(fault), 1)
    parts = {"loss": loss, "hidden": of_hidden, "weight": of_weight}
    if case.bias is not None:
        summed = gradient[last] if fault == "bias_of_last_chunk" else gradient
        parts["bias"] = summed.sum(axis=0) * (fault != "bias_without_gradient")
    dtypes = case.result_dtypes
    return LinearResult({name: round_to(part, dtypes[name]) for name, part in parts.items()}, dtypes)


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
