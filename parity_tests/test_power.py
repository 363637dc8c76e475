"""Every fault of the mutant bank is rejected, at every dtype, by every kind of assertion that it concerns."""

from functools import cache

import numpy as np
import pytest

from parity_tests.bounds import Arithmetic
from parity_tests.cases import CONVENTIONS, Case, case_names, make_case
from parity_tests.comparison import Comparison, Result, against_each_other, against_oracle
from parity_tests.mutants import FAULTS, evaluate
from parity_tests.oracle import Truth, solve
from parity_tests.precision import DTYPES

# The loosest arithmetic that any adapter claims: if its bounds reject a fault, so do all others.
ARITHMETIC = Arithmetic()
NAMES = [name for name in case_names() if name != "wide"]

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@cache
def bank(dtype: str) -> list[tuple[Case, Truth, Result]]:
    cases = [make_case(name, dtype) for name in NAMES]
    return [(case, solve(case), evaluate(case)) for case in cases]


@each_dtype
def test_sound_implementation_passes(dtype: str) -> None:
    for case, truth, sound in bank(dtype):
        comparison = against_oracle(case, truth, sound, ARITHMETIC)
        assert comparison.agrees, (case.name, comparison)


# A smoothing of 1e-8 over ten classes is nothing to the precision.
TINY_SMOOTHING = {f"smoothing_1e-08_{convention}" for convention in CONVENTIONS}
# Where a fault may survive, and why that is right; in every other case that it changes it must be rejected.
PERMITTED = {
    # The gradient is 0 up to rounding.
    "zero_gradient": {"at_optimum"},
    "zero_non_target_gradient": {"at_optimum"},
    "gradient_sign": {"at_optimum"},
    # At 0.9 the target is the same for each of ten classes.
    "other_off": {*TINY_SMOOTHING, "near_uniform"},
    "unsmoothed_loss": TINY_SMOOTHING,
    "local_classes": TINY_SMOOTHING,
    "label_without_share": TINY_SMOOTHING,
    "label_kept_whole": TINY_SMOOTHING,
    "pad_class_left_out": TINY_SMOOTHING,
    "local_mean": TINY_SMOOTHING,
    "entropy_subtracted": TINY_SMOOTHING,
    # Logits within 0.01 of each other lose nothing that the mean of the losses shows.
    "bfloat16_logits": {"near_uniform"},
    "label_off_by_one": {"smoothing_0.9_non_target"},
    # 128 classes are not padded; only the order of the sum changes.
    "padding_joins": {"classes_128"},
    # Sums of small integers are exact in bfloat16.
    "bfloat16_sum": {"ties", "ties_max_sup"},
    # A thousandth of a z-loss of a thousandth.
    "z_loss_slightly_off": {"everything"},
}
# Rounding to bfloat16 does nothing to what is in bfloat16 already.
HARMLESS = {("bfloat16_logits", "bfloat16"), ("bfloat16_gradient", "bfloat16")}
# These faults only reorder roundings except where they do harm.
HARMFUL_IN = {
    "maximum_kept": {"large_logits", "large_offset"},
    "log_for_log1p": {"dominant"},
}


@each_dtype
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_rejected(fault: str, dtype: str) -> None:
    """By both kinds of assertion, in each part of the result that it changes, and wherever it does harm."""
    shares: dict[str, dict[str, float]] = {"oracle": {}, "each other": {}}
    survivors, changed = set(), set()
    for case, truth, sound in bank(dtype):
        wrong = evaluate(case, fault)
        comparisons: dict[str, Comparison] = {
            "oracle": against_oracle(case, truth, wrong, ARITHMETIC),
            "each other": against_each_other(case, truth, (wrong, sound), (ARITHMETIC, ARITHMETIC)),
        }
        for part in ("loss", "gradient"):
            if not np.array_equal(getattr(wrong, part), getattr(sound, part), equal_nan=True):
                changed.add(case.name)
                for kind, comparison in comparisons.items():
                    shares[kind][part] = max(shares[kind].get(part, 0.0), getattr(comparison, part))
        if case.name in changed and comparisons["oracle"].agrees:
            survivors.add(case.name)
    print(f"{dtype} {fault}: rejected in {len(changed - survivors)} of {len(changed)} cases, largest {shares}")
    for kind, parts in shares.items():
        for part, share in parts.items():
            if part == "gradient" and fault.endswith("slightly_off") and dtype in {"bfloat16", "float16"}:
                continue  # less than half a unit of the gradient's last place
            assert share > 1, f"{kind}: no {part} shows that {FAULTS[fault]}, nearest {share:.3g} of a bound"
    if (fault, dtype) in HARMLESS:
        assert not changed
    elif fault in HARMFUL_IN:
        assert HARMFUL_IN[fault] <= changed - survivors
    else:
        assert changed - survivors, f"no case shows that {FAULTS[fault]}"
        assert survivors <= PERMITTED.get(fault, set())


def test_wrong_class_of_number_is_rejected() -> None:
    """NaN, inf and finite are three classes; so are the dtypes and the shapes."""
    case = make_case("uniform_none", "float32")
    truth, sound = solve(case), evaluate(case)
    for filler in (np.nan, np.inf, -np.inf, np.finfo(np.float32).max):
        loss = sound.loss.copy()
        loss[2] = filler
        wrong = Result(loss, sound.gradient, "float32", "float32")
        assert against_oracle(case, truth, wrong, ARITHMETIC).loss > 1e30
        assert against_each_other(case, truth, (wrong, sound), (ARITHMETIC, ARITHMETIC)).loss > 1e30
    for wrong in (
        Result(sound.loss, sound.gradient, "bfloat16", "float32"),
        Result(sound.loss, sound.gradient, "float32", "float64"),
        Result(sound.loss[:, None], sound.gradient, "float32", "float32"),
        Result(sound.loss, sound.gradient[:-1], "float32", "float32"),
    ):
        assert not against_oracle(case, truth, wrong, ARITHMETIC).agrees


def test_a_few_ulps_beyond_the_bound_are_rejected() -> None:
    """The bounds are tight: 40 ulps of loss and 60 scaled ulps of gradient are too much for ten classes."""
    case = make_case("classes_9", "float32")
    truth, sound = solve(case), evaluate(case)
    ulp = 2.0**-23
    loss = Result(sound.loss * (1 + 40 * ulp), sound.gradient, "float32", "float32")
    gradient = Result(sound.loss, sound.gradient * (1 + 60 * ulp), "float32", "float32")
    assert against_oracle(case, truth, loss, ARITHMETIC).loss > 1
    assert against_oracle(case, truth, gradient, ARITHMETIC).gradient > 1
