"""What tells programs of the compiled losses apart, and the size of their results."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from parity_tests.truth.cases import Case, features
from parity_tests.truth.linear_cases import LinearCase, make_any_case


def combination(name: str) -> tuple[Any, ...]:
    """Return the options of a case as far as they change more than the last step of a loss, its reduction."""
    case = make_any_case(name, "bfloat16")
    # Terms of the loss vanish without smoothing, and with all of it.
    end = case.smoothing if isinstance(case.smoothing, float) and case.smoothing in (0.0, 1.0) else None
    return features(case), end, getattr(case, "weight_dtype", None)


def result_bytes(case: Case) -> int:
    """Return what loss and gradients take."""
    parts = {"loss": case.batch_shape if case.options.get("reduction", "none") == "none" else ()}
    if isinstance(case, LinearCase):
        operands = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
        parts |= {name: operand.shape for name, operand in operands.items() if operand is not None}
    else:
        parts["gradient"] = case.logits.shape
    return sum(int(np.prod(shape)) * jnp.dtype(case.result_dtypes[name]).itemsize for name, shape in parts.items())
