"""Tests every assertion of the harness with every fault of the mutant bank.

An assertion that accepts an applicable fault is a failure. The assertions: a loss is within its bounds of the truth
(`oracle`), two losses are within the sum of their bounds (`each other`), and a training stays within the envelope of
its replicas (`trajectory`). A fault applies to a case if it changes the result there. The faults of linear
layers are tried in the linear cases, and in no training.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity_tests.faults.dense import FAULTS
from parity_tests.faults.linear import LINEAR_FAULTS, wrong_result
from parity_tests.trainings.trajectory import compare_trajectories, rounding_floor
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.cases import CONVENTIONS, Case, case_names, make_case, random_case
from parity_tests.truth.comparison import AnyResult, Parts, Result, bounds_of, within
from parity_tests.truth.linear_cases import linear_case_names, make_linear_case
from parity_tests.truth.oracle import Truth, solve
from parity_tests.truth.precision import FloatArray, compute_dtype, round_to

# The loosest arithmetic that any adapter claims: if its bounds reject a fault, so do all others.
LOOSEST = Arithmetic()
ASSERTIONS = ("oracle", "each other")

# A smoothing of 1e-8 over ten classes is below the precision.
TINY_SMOOTHING = frozenset(f"smoothing_1e-08_{convention}" for convention in CONVENTIONS)
# Cases in which a fault may be accepted, and why; it must be rejected in every other case that it changes.
EXCUSED: dict[str, frozenset[str]] = {
    # The gradient is 0 up to rounding.
    "zero_gradient": frozenset({"at_optimum"}),
    "zero_non_target_gradient": frozenset({"at_optimum"}),
    "gradient_sign": frozenset({"at_optimum"}),
    "sharded_cotangents": frozenset({"at_optimum"}),
    # e/(K-1) and e/K of 130 classes are nearly the same, and logits within 0.01 of each other hide the rest.
    "other_off": TINY_SMOOTHING | {"near_uniform"},
    "unsmoothed_loss": TINY_SMOOTHING,
    # With almost all mass in the smoothing term, at its optimum, only the label's gradient is left.
    "smoothing_detached": TINY_SMOOTHING | {"class_mask_near_one"},
    "local_classes": TINY_SMOOTHING,
    "label_without_share": TINY_SMOOTHING,
    "label_kept_whole": TINY_SMOOTHING,
    "pad_class_left_out": TINY_SMOOTHING,
    "local_mean": TINY_SMOOTHING,
    "sharded_constant": TINY_SMOOTHING,
    "sharded_own_smoothing": TINY_SMOOTHING,
    "entropy_subtracted": TINY_SMOOTHING,
    # The rounding of logits within 0.01 of each other does not show in the mean of the losses.
    "bfloat16_logits": frozenset({"near_uniform"}),
    # At 0.9 the target is the same for each of ten classes.
    "label_off_by_one": frozenset({"smoothing_0.9_non_target"}),
    # 128 classes are not padded; only the order of the sum changes.
    "padding_joins": frozenset({"classes_128"}),
    # Sums of small integers are exact in bfloat16.
    "bfloat16_sum": frozenset({"ties", "ties_max_sup"}),
    # A thousandth of a z-loss of a thousandth.
    "z_loss_slightly_off": frozenset({"everything"}),
}
# These faults only reorder roundings, except in the cases named here.
HARMFUL_ONLY_IN = {
    "maximum_kept": frozenset({"large_logits", "large_offset"}),
    "log_for_log1p": frozenset({"dominant"}),
}
# Rounding a bfloat16 number to bfloat16 has no effect.
HARMLESS = frozenset({("bfloat16_logits", "bfloat16"), ("bfloat16_gradient", "bfloat16")})
# The fault is less than half a unit in the last place of a narrow gradient.
HIDDEN_BY_ROUNDING = frozenset(
    (fault, dtype) for fault in FAULTS if fault.endswith("slightly_off") for dtype in ("bfloat16", "float16")
)


@dataclass(frozen=True)
class Trial:
    """One fault under one assertion.

    Args:
        fault: its name.
        dtype: of the logits.
        assertion: "oracle", "each other" or "trajectory".
        changed: cases, or trainings, whose result the fault changes.
        rejected: the rejected ones of these, and the error of each as a share of its bound.
        largest: the largest share by part of the result.
        survives: why this is a failure of the harness, or None.
    """

    fault: str
    dtype: str
    assertion: str
    changed: frozenset[str]
    rejected: dict[str, float]
    largest: dict[str, float]
    survives: str | None

    @property
    def nearest(self) -> float:
        """The smallest rejected error, as a share of its bound."""
        return min(self.rejected.values(), default=np.nan)


# --- Assertions about one loss --------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """A case with its truth, the result of the sound NumPy implementation, and the bounds of that result."""

    case: Case
    truth: Truth
    sound: AnyResult
    bounds: Parts


@cache
def _bank(dtype: str, arithmetic: Arithmetic = LOOSEST, linear: bool = False) -> list[_Entry]:
    """Return an entry for every dense case but the widest, or for every linear case."""
    cases: list[Case] = [make_linear_case(name, dtype) for name in linear_case_names()]
    if not linear:
        cases = [make_case(name, dtype) for name in case_names() if name != "wide"]
    truths = [solve(case) for case in cases]
    return [
        _Entry(case, truth, wrong_result(case), bounds_of(case, truth, arithmetic))
        for case, truth in zip(cases, truths, strict=True)
    ]


def sound_failures(dtype: str, arithmetic: Arithmetic = LOOSEST) -> list[str]:
    """Return the cases in which the sound implementation is rejected; there must be none."""
    entries = [*_bank(dtype, arithmetic), *_bank(dtype, arithmetic, linear=True)]
    return [case.name for case, truth, sound, bounds in entries if not within(case, truth, sound, bounds).agrees]


def trials(fault: str, dtype: str, arithmetic: Arithmetic = LOOSEST) -> list[Trial]:
    """Return the trials of a fault under `oracle` and under `each other`, at a dtype."""
    changed: set[str] = set()
    rejected: dict[str, dict[str, float]] = {assertion: {} for assertion in ASSERTIONS}
    largest: dict[str, dict[str, float]] = {assertion: {} for assertion in ASSERTIONS}
    for case, truth, sound, bounds in _bank(dtype, arithmetic, fault in LINEAR_FAULTS):
        wrong = wrong_result(case, fault)
        parts = [part for part, values in sound.parts.items() if not _equal(wrong.parts[part], values)]
        if not parts:
            continue
        changed.add(case.name)
        comparisons = {
            "oracle": within(case, truth, wrong, bounds),
            "each other": within(case, truth, wrong, {part: 2 * bound for part, bound in bounds.items()}, sound),
        }
        for assertion, comparison in comparisons.items():
            for part in parts:
                largest[assertion][part] = max(largest[assertion].get(part, 0.0), comparison.shares[part])
            if not comparison.agrees:
                rejected[assertion][case.name] = comparison.share
    return [
        Trial(
            fault,
            dtype,
            each,
            frozenset(changed),
            rejected[each],
            largest[each],
            _why_survives(fault, dtype, each, frozenset(changed), rejected[each], largest[each]),
        )
        for each in ASSERTIONS
    ]


def _on_device(fault: str, dtype: str, device: Arithmetic) -> Trial:
    trial, _ = trials(fault, dtype, device)
    is_seen = bool(trial.rejected) or (fault, dtype) in HARMLESS
    largest = max(trial.largest.values(), default=0.0)
    return replace(trial, survives=None if is_seen else f"no case shows it: at most {largest:.2g} of a bound")


def _equal(first: FloatArray, second: FloatArray) -> bool:
    return np.array_equal(first, second, equal_nan=True)


def _why_survives(
    fault: str,
    dtype: str,
    assertion: str,
    changed: frozenset[str],
    rejected: dict[str, float],
    largest: dict[str, float],
) -> str | None:
    """Return why a fault counts as accepted, by the strictest rule that a sound harness can satisfy; or None."""
    if (fault, dtype) in HARMLESS:
        return "it should change nothing, and does" if changed else None
    if not changed:
        return "no case shows it"
    if fault in LINEAR_FAULTS:
        # Rounding to a narrow dtype may hide the fault in some of the cases.
        missed = changed - rejected.keys() if dtype == compute_dtype(dtype) or not rejected else frozenset()
        return f"accepted in {', '.join(sorted(missed))}" if missed else None
    for part, share in largest.items():
        if share <= 1 and not (part == "gradient" and (fault, dtype) in HIDDEN_BY_ROUNDING):
            return f"no {part} shows it: at most {share:.2g} of a bound"
    if fault in HARMFUL_ONLY_IN:
        missed = HARMFUL_ONLY_IN[fault] - rejected.keys()
    elif assertion == "oracle":
        missed = changed - rejected.keys() - EXCUSED.get(fault, frozenset())
    else:
        # Two losses may differ by the sum of their bounds, so faults near a bound are rejected in fewer cases.
        missed = frozenset() if rejected else changed
    return f"accepted in {', '.join(sorted(missed))}" if missed else None


# --- Assertions about a training ------------------------------------------------------------------------------------

STEPS, REPLICAS, BATCH, FEATURES = 12, 8, 16, 5
LEARNING_RATE = 0.5
# Faults without an effect on trainings with moderate logits, or with no more effect than rounding.
NOT_IN_TRAININGS = frozenset({*HARMFUL_ONLY_IN, "infinity_to_nan", "max_sup_first"})


def _trainings() -> dict[str, Case]:
    """Return the losses of small trainings as cases; each step replaces the logits."""
    generator = np.random.default_rng(0)
    labels = generator.integers(7, size=BATCH)
    ignored = np.where(np.arange(BATCH) % 5 == 0, -1, np.where(labels == 6, 0, labels))
    weight = round_to(generator.uniform(0.5, 2, 7), "float32")
    prior = round_to(generator.dirichlet(np.ones(7)), "float32")
    settings = {"convention": "non_target", "z_loss": 0.01, "softcap": 4.0, "subtract_entropy": True}

    def make(options: dict[str, Any] | None = None, **fields: Any) -> Case:
        options = {"reduction": "mean", **(options or {})}
        return random_case("float32", generator, BATCH, 7, options=options, smoothing=0.2, **fields)

    return {
        "plain": make(labels=labels),
        "options": make(
            labels=ignored,
            class_weight=weight,
            class_mask=np.arange(7) != 6,
            upstream=np.asarray(0.5),
            options={**settings, "ignore_index": -1},
        ),
        "max_sup": make(labels=labels, options={"convention": "max_sup"}),
        "prior": make(labels=labels, prior=prior),
        "masks of rows": make(labels=labels, class_mask=_masks_of_rows(labels)),
    }


def _masks_of_rows(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    mask = np.random.default_rng(2).random((BATCH, 7)) < 0.6
    mask[np.arange(BATCH), labels] = True
    return mask


def _train(
    case: Case,
    weights: NDArray[np.float32],
    inputs: NDArray[np.float32],
    learning_rate: float,
    fault: str | None = None,
) -> FloatArray:
    """Train a linear layer in float32 and return the loss of each step."""
    losses = []
    for _ in range(STEPS):
        logits = inputs @ weights
        result = wrong_result(replace(case, logits=logits.astype(np.float64)), fault)
        assert isinstance(result, Result)
        losses.append(float(result.loss))
        gradient = inputs.T @ result.gradient.astype(np.float32)
        weights = weights - np.float32(learning_rate) * gradient
    return np.array(losses)


class _Tame(NamedTuple):
    """A sound training: the case of its loss, its start, its inputs, its losses, and the losses of its replicas."""

    case: Case
    start: NDArray[np.float32]
    inputs: NDArray[np.float32]
    losses: FloatArray
    replicas: FloatArray


@cache
def _tame_trainings(learning_rate: float) -> dict[str, _Tame]:
    """Return the trainings by name."""
    generator = np.random.default_rng(1)
    inputs = generator.normal(size=(BATCH, FEATURES)).astype(np.float32)
    start = generator.normal(size=(FEATURES, 7)).astype(np.float32)
    directions = generator.choice([-np.inf, np.inf], size=(REPLICAS, *start.shape)).astype(np.float32)
    found = {}
    for name, case in _trainings().items():
        losses = _train(case, start, inputs, learning_rate)
        moved = [_train(case, np.nextafter(start, each), inputs, learning_rate) for each in directions]
        found[name] = _Tame(case, start, inputs, losses, np.stack(moved))
    return found


def trajectory_trial(fault: str) -> Trial:
    """Return the trial of a fault in trainings, within the envelope of their replicas."""
    changed: set[str] = set()
    rejected: dict[str, float] = {}
    largest = 0.0
    for name, (case, start, inputs, sound, replicas) in _tame_trainings(LEARNING_RATE).items():
        wrong = _train(case, start, inputs, LEARNING_RATE, fault)
        if _equal(sound, wrong):
            continue
        changed.add(name)
        verdict = compare_trajectories(sound, wrong, replicas, floor=rounding_floor(sound, BATCH))
        largest = max(largest, verdict.largest_share)
        if not verdict.agrees:
            rejected[name] = verdict.largest_share
    survives = None
    if not rejected and fault not in NOT_IN_TRAININGS:
        survives = f"accepted in {', '.join(sorted(changed))}" if changed else "no training shows it"
    return Trial(fault, "float32", "trajectory", frozenset(changed), rejected, {"loss": largest}, survives)


def all_trials(faults: Sequence[str], dtypes: Sequence[str], device: Arithmetic | None = None) -> Iterator[list[Trial]]:
    """Yield the trials of each fault in turn.

    Args:
        faults: their names.
        dtypes: of the logits.
        device: the arithmetic of another device. Then no training is tried, and a fault survives only if no case shows
            it: some cases are beyond the resolution of such a device.
    """
    for fault in faults:
        if device is not None:
            yield [_on_device(fault, dtype, device) for dtype in dtypes]
            continue
        found = [trial for dtype in dtypes for trial in trials(fault, dtype)]
        yield found if fault in LINEAR_FAULTS else [*found, trajectory_trial(fault)]
