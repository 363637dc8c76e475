"""Faults of losses whose classes are divided over devices, as others have or had them.

Two more are in dense.py, since a single device can have them too: `local_classes` and `local_mean`.

A fault depends on the number of devices: that is `NUM_DEVICES`, or follows the name, as in "sharded_cotangents:4".
"""

from dataclasses import replace

import numpy as np

from parity_tests.faults.dense import evaluate, reduced
from parity_tests.truth.cases import Case, is_class
from parity_tests.truth.comparison import Result
from parity_tests.truth.precision import FloatArray, compute_dtype, round_to
from parity_tests.truth.simulation import EXACT, Simulation

NUM_DEVICES = 2
# More numbers of devices that a comparison of two losses looks for.
MORE_DEVICES = (4, 8)
# Name -> what is wrong.
SHARDED_FAULTS = {
    "sharded_log_devices": "each loss is too large by the log of the number of devices, each of which adds all classes",
    "sharded_constant": "e log K is added to each loss, a constant; the gradient is right",
    "sharded_cotangents": "the gradient is multiplied by the number of devices, each of which adds the same",
    "sharded_own_smoothing": "each device smooths over its own classes alone, as in Megatron-LM: the loss is that of "
    "the first device, and the gradient has the smoothing once for each device",
}
_OF_NO_NUMBER = {"sharded_constant"}


def sharded_faults() -> list[str]:
    """Return the names of the faults, for each number of devices."""
    more = [f"{name}:{number}" for name in SHARDED_FAULTS if name not in _OF_NO_NUMBER for number in MORE_DEVICES]
    return [*SHARDED_FAULTS, *more]


def gradient_factor(fault: str | None) -> int:
    """Return what a fault multiplies the right gradient by, and so its rounding errors."""
    name, _, number = (fault or "").partition(":")
    return int(number or NUM_DEVICES) if name == "sharded_cotangents" else 1


def evaluate_sharded(case: Case, fault: str, arithmetic: Simulation = EXACT) -> Result:
    """Return loss and gradient of a case, wrong in the way that `fault` names, on a device of that arithmetic."""
    name, _, number = fault.partition(":")
    devices = int(number or NUM_DEVICES)
    sound = evaluate(case, None, arithmetic)
    if name == "sharded_own_smoothing":
        return _own_smoothing(case, sound, devices, arithmetic)
    with np.errstate(all="ignore"):
        if name == "sharded_cotangents":
            return replace(sound, gradient=round_to(devices * sound.gradient, case.dtype))
        loss = sound.loss + reduced(case, _added(case, name, devices))[0]
        return replace(sound, loss=round_to(loss, compute_dtype(case.dtype)))


def _added(case: Case, name: str, devices: int) -> FloatArray:
    """Return what is added to the loss of each row that counts."""
    rows = case.rows()
    added = np.full(len(rows.counted), np.log(devices))
    if name == "sharded_constant":
        added = rows.smoothing * np.log(np.maximum(rows.allowed.sum(axis=-1), 1))
    is_good = rows.counted if rows.labels.ndim > 1 else rows.counted & is_class(rows)
    return np.where(is_good, added, 0.0)


# What Megatron-LM's loss has. In other cases nothing is wrong.
_OPTIONS_OF_MEGATRON = {"reduction", "convention", "ignore_index", "bad_labels", "denominator"}


def _own_smoothing(case: Case, sound: Result, devices: int, arithmetic: Simulation) -> Result:
    """Return loss and gradient with the smoothing of `vocab_parallel_cross_entropy` of Megatron-LM.

    There each device takes the number of its own classes K' for K, and the mean over them. With s = e K' / (K' - 1) the
    loss is (1 - s) nll + s mean(lse - z), the gradient p - (1 - s) at the label and p - s/K' elsewhere.
    """
    rows, own = case.rows(), -(-case.num_classes // devices)
    vectors = (case.class_weight, case.class_mask, case.prior)
    options = {name for name, value in case.options.items() if value} - _OPTIONS_OF_MEGATRON
    has_more = options or any(vector is not None for vector in vectors)
    if has_more or own < 2 or rows.labels.ndim > 1 or not len(rows.labels):
        return sound
    plain = {"reduction": "none", **{name: case.options[name] for name in ("ignore_index",) if name in case.options}}
    unsmoothed = evaluate(replace(case, options=plain, smoothing=0.0, upstream=None), None, arithmetic)
    is_good = rows.counted & is_class(rows)
    is_label = np.arange(case.num_classes) == np.where(is_good, rows.labels, 0)[:, None]
    smoothing = rows.smoothing * own / (own - 1)
    with np.errstate(all="ignore"):
        gap = np.sum(np.where(is_label, rows.logits, 0), axis=-1) - np.mean(rows.logits[:, :own], axis=-1)
        losses = np.where(is_good, unsmoothed.loss + smoothing * gap, unsmoothed.loss)
        added = np.where(is_good[:, None], smoothing[:, None] * (is_label - 1 / own), 0)
        loss, gradient = reduced(case, losses, unsmoothed.gradient + added)
    compute = compute_dtype(case.dtype)
    return replace(sound, loss=round_to(loss, compute), gradient=round_to(gradient, case.dtype))
