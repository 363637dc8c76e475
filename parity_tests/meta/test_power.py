"""Every fault of the mutant bank is rejected, at every dtype, by every kind of assertion that it concerns."""

import numpy as np
import pytest

from parity_tests.faults.dense import FAULTS, evaluate
from parity_tests.faults.linear import BANK
from parity_tests.faults.sharded import SHARDED_FAULTS
from parity_tests.studies import power
from parity_tests.studies.power import LOOSEST, sound_failures, trajectory_trial, trials
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.cases import make_case
from parity_tests.truth.comparison import Result, against_each_other, against_oracle
from parity_tests.truth.devices import arithmetic_of
from parity_tests.truth.oracle import solve
from parity_tests.truth.precision import DTYPES

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@each_dtype
def test_sound_implementation_passes(dtype: str) -> None:
    assert sound_failures(dtype) == []


@each_dtype
@pytest.mark.parametrize("fault", BANK)
def test_fault_is_rejected(fault: str, dtype: str) -> None:
    """By both kinds of assertion, in each part of the result that it changes, and wherever it does harm."""
    for trial in trials(fault, dtype):
        count = f"rejected in {len(trial.rejected)} of {len(trial.changed)}"
        print(f"{dtype} {fault}, {trial.assertion}: {count}, nearest {trial.nearest:.3g}, largest {trial.largest}")
        assert trial.survives is None, f"{BANK[fault]}: {trial.survives}"


@pytest.mark.parametrize("fault", [*FAULTS, *SHARDED_FAULTS])
def test_fault_is_rejected_in_trainings(fault: str) -> None:
    trial = trajectory_trial(fault)
    assert trial.survives is None, f"{BANK[fault]}: {trial.survives}"


def test_too_loose_a_bound_is_noticed() -> None:
    """`power` is a test of tests, and must be able to fail."""
    loose = Arithmetic(depth=lambda _: 10**6)
    survivors = {each.assertion: each.survives for each in trials("bfloat16_sum", "float32", loose)}
    assert all(survivors.values()), survivors
    oracle, _ = trials("other_off", "float32", Arithmetic(depth=lambda _: 10**7))
    assert "accepted in at_optimum" in str(oracle.survives)
    layer = Arithmetic(depth=lambda _: 10**8)
    assert any(each.survives for each in trials("linear_other_off", "float32", layer))
    # One case is enough, and one part of the result.
    assert power._why_survives("stale_lse", "float32", "oracle", frozenset({"one", "other"}), {"one": 3.0}, {}) == (
        "accepted in other"
    )
    assert "no gradient shows it" in str(
        power._why_survives(
            "stale_lse", "float32", "oracle", frozenset({"one"}), {"one": 3.0}, {"loss": 3, "gradient": 1}
        )
    )
    assert power._why_survives("stale_lse", "float32", "oracle", frozenset(), {}, {}) == "no case shows it"


# Faults that the arithmetic of a device hides in every case: a ten-thousandth of the softcap's slope or of the entropy.
# docs/devices.md has all devices.
HIDDEN_ON: dict[str, set[str]] = {
    "tpu-v4": {"softcap_slightly_off", "entropy_slightly_off"},
    "tpu-v5p": set(),
    "tpu-v6e": set(),
    "gpu-h100": set(),
}


@pytest.mark.parametrize("device", HIDDEN_ON)
@pytest.mark.devices
def test_what_the_arithmetic_of_a_device_lets_us_see(device: str) -> None:
    arithmetic = arithmetic_of(device, own=True)
    for dtype in DTYPES[1:]:
        hidden = {trial.fault for (trial,) in power.all_trials(list(BANK), [dtype], arithmetic) if trial.survives}
        assert hidden == HIDDEN_ON[device]
        assert sound_failures(dtype, arithmetic) == []


def test_an_unsound_reference_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("uniform_none", "float32")
    (entry,) = [each for each in power._bank("float32") if each.case.name == case.name]
    wrong = entry._replace(sound=evaluate(case, "stale_lse"))
    monkeypatch.setattr(power, "_bank", lambda *arguments, **keywords: [wrong])
    assert set(sound_failures("float32")) == {"uniform_none"}


def test_a_blind_training_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(power, "LEARNING_RATE", 0.0)
        assert trajectory_trial("zero_gradient").survives == "no training shows it"
    monkeypatch.setattr(power, "rounding_floor", lambda losses, batch: np.full(losses.shape, 1e3))
    assert trajectory_trial("stale_lse").survives == "accepted in masks of rows, max_sup, options, plain, prior"


def test_wrong_class_of_number_is_rejected() -> None:
    """NaN, inf and finite are three classes; so are the dtypes and the shapes."""
    case = make_case("uniform_none", "float32")
    truth, sound = solve(case), evaluate(case)
    for filler in (np.nan, np.inf, -np.inf, np.finfo(np.float32).max):
        loss = sound.loss.copy()
        loss[2] = filler
        wrong = Result(loss, sound.gradient, "float32", "float32")
        assert against_oracle(case, truth, wrong, LOOSEST).loss > 1e30
        assert against_each_other(case, truth, (wrong, sound), (LOOSEST, LOOSEST)).loss > 1e30
    for wrong in (
        Result(sound.loss, sound.gradient, "bfloat16", "float32"),
        Result(sound.loss, sound.gradient, "float32", "float64"),
        Result(sound.loss[:, None], sound.gradient, "float32", "float32"),
        Result(sound.loss, sound.gradient[:-1], "float32", "float32"),
    ):
        assert not against_oracle(case, truth, wrong, LOOSEST).agrees


def test_a_few_ulps_beyond_the_bound_are_rejected() -> None:
    """The bounds are tight: 40 ulps of loss and 60 scaled ulps of gradient are too much for ten classes."""
    case = make_case("classes_9", "float32")
    truth, sound = solve(case), evaluate(case)
    ulp = 2.0**-23
    loss = Result(sound.loss * (1 + 40 * ulp), sound.gradient, "float32", "float32")
    gradient = Result(sound.loss, sound.gradient * (1 + 60 * ulp), "float32", "float32")
    assert against_oracle(case, truth, loss, LOOSEST).loss > 1
    assert against_oracle(case, truth, gradient, LOOSEST).gradient > 1
