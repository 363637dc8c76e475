"""Faults of losses whose classes are divided over devices, as others have or had them.

Two more are in dense.py, since a single device can have them too: `local_classes` and `local_mean`.
"""

from dataclasses import replace

import numpy as np

from parity_tests.faults.dense import evaluate, reduced_rows
from parity_tests.truth.cases import Case, is_class
from parity_tests.truth.comparison import Result
from parity_tests.truth.precision import FloatArray, compute_dtype, round_to
from parity_tests.truth.simulation import EXACT, Simulation

NUM_DEVICES = 2
# Name -> what is wrong.
SHARDED_FAULTS = {
    "sharded_log_devices": "each loss is too large by the log of the number of devices, each of which adds all classes",
    "sharded_constant": "e log K is added to each loss, a constant; the gradient is right",
    "sharded_cotangents": "the gradient is multiplied by the number of devices, each of which adds the same",
}


def evaluate_sharded(case: Case, fault: str, arithmetic: Simulation = EXACT) -> Result:
    """Return loss and gradient of a case, wrong in the way that `fault` names, on a device of that arithmetic."""
    sound = evaluate(case, None, arithmetic)
    with np.errstate(all="ignore"):
        if fault == "sharded_cotangents":
            return replace(sound, gradient=round_to(NUM_DEVICES * sound.gradient, case.dtype))
        loss = sound.loss + reduced_rows(case, _added(case, fault))
        return replace(sound, loss=round_to(loss, compute_dtype(case.dtype)))


def _added(case: Case, fault: str) -> FloatArray:
    """Return what is added to the loss of each row that counts."""
    rows = case.rows()
    added = np.full(len(rows.counted), np.log(NUM_DEVICES))
    if fault == "sharded_constant":
        added = rows.smoothing * np.log(np.maximum(rows.allowed.sum(axis=-1), 1))
    is_good = rows.counted if rows.labels.ndim > 1 else rows.counted & is_class(rows)
    return np.where(is_good, added, 0.0)
