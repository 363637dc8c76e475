"""Where two trainings first part: step, tensor and element."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from parity_tests.faults.dense import evaluate
from parity_tests.meta.brought_training import Momentum
from parity_tests.meta.running import invoke
from parity_tests.trainings.stepwise import TrainingError, compare_step_by_step, one_ulp_away
from parity_tests.truth.cases import random_case


def test_a_training_agrees_with_itself() -> None:
    for verdict in compare_step_by_step(Momentum(), Momentum(), 6):
        assert verdict.agrees
        assert verdict.largest.share == 0
        assert len(verdict.worst) == 6 * 4


def test_a_reordered_sum_agrees() -> None:
    """Rounding is allowed, and is seen: the share is not 0."""

    class Reordered(Momentum):
        def step(self, number: int) -> float:
            self.weight = self.weight.astype(np.float64)
            loss = super().step(number)
            self.weight, self.velocity = self.weight.astype(np.float32), self.velocity.astype(np.float32)
            return float(loss)

    free, forced = compare_step_by_step(Momentum(), Reordered(), 12)
    assert 0 < free.largest.share <= 1
    assert 0 < forced.largest.share <= 1


@pytest.mark.parametrize("wrong_from", [0, 3])
def test_first_divergence_is_at_the_step_that_is_wrong(wrong_from: int) -> None:
    for verdict in compare_step_by_step(Momentum(), Momentum(wrong_from=wrong_from), 6):
        found = verdict.first_divergence
        assert found is not None
        assert (found.step, found.tensor) == (wrong_from, "weight"), verdict.mode


def test_the_element_that_is_wrong_is_found() -> None:
    for verdict in compare_step_by_step(Momentum(), Momentum(wrong_from=2, element=(3, 1)), 4):
        found = verdict.first_divergence
        assert found is not None
        assert (found.step, found.tensor, found.index) == (2, "velocity", (3, 1))
        assert found.first != found.second
        assert re.fullmatch(r"step 2, velocity\[3, 1\]: .* and .*, allowed .*: .* of it", str(found))


def test_teacher_forced_sees_one_step_only() -> None:
    """A single wrong step goes on in the free run, and is alone in the forced one."""

    class Once(Momentum):
        def step(self, number: int) -> float:
            self.wrong_from = 2 if number == 2 else None
            return float(super().step(number))

    free, forced = compare_step_by_step(Momentum(), Once(), 6)
    assert {each.step for each in forced.worst if each.share > 1} == {2}
    assert {each.step for each in free.worst if each.share > 1} == {2, 3, 4, 5}


def test_nan_agrees_with_nothing() -> None:
    for verdict in compare_step_by_step(Momentum(), Momentum(nan_at=1), 3):
        found = verdict.first_divergence
        assert found is not None
        assert (found.step, found.tensor, found.index, found.share) == (1, "weight", (2, 1), np.inf)
    both = compare_step_by_step(Momentum(nan_at=1), Momentum(nan_at=1), 3)
    assert not any(verdict.agrees for verdict in both)


def test_counts_must_be_equal() -> None:
    class Miscounting(Momentum):
        def state(self) -> Mapping[str, NDArray[Any]]:
            return {**super().state(), "count": np.array(self.count + (self.count == 2))}

        def load(self, state: Mapping[str, NDArray[Any]]) -> None:
            super().load({**state, "count": np.array(min(int(state["count"]), 2))})

    free, _ = compare_step_by_step(Momentum(), Miscounting(), 3)
    assert free.first_divergence is not None
    assert free.first_divergence.tensor == "count"


@pytest.mark.parametrize("fault", ["unsmoothed_gradient", "bfloat16_logits", "other_off", "gradient_of_sum"])
def test_faulty_losses_are_seen_at_the_first_step(fault: str) -> None:
    class Classifier:
        def __init__(self, fault: str | None = None) -> None:
            self.fault, self.weight = fault, np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)

        def state(self) -> Mapping[str, NDArray[Any]]:
            return {"weight": self.weight}

        def load(self, state: Mapping[str, NDArray[Any]]) -> None:
            self.weight = state["weight"]

        def step(self, number: int) -> float:
            generator = np.random.default_rng(number)
            inputs = generator.normal(size=(16, 5)).astype(np.float32)
            logits = (inputs @ self.weight).astype(np.float64)
            case = random_case("float32", generator, 16, 7, logits=logits, options={"reduction": "mean"})
            result = evaluate(case, self.fault)
            self.weight = self.weight - np.float32(0.5) * (inputs.T @ result.gradient.astype(np.float32))
            return float(result.loss)

    for verdict in compare_step_by_step(Classifier(), Classifier(fault), 4, batch_size=16):
        assert verdict.first_divergence is not None
        assert verdict.first_divergence.step == 0


@pytest.mark.parametrize(("second", "message"), [
    ({"rename": True}, r"only the first has \['weight'\], only the second \['weights'\]"),
    ({"transpose": True}, r"weight has shapes \[4, 3\] and \[3, 4\]; transpose one of them"),
    ({"dtype": "float64"}, "weight has dtypes float32 and float64"),
    ({"hidden": True}, "the second training does not repeat its first step from the same state: weight came out"),
])  # fmt: skip
def test_trainings_that_cannot_be_compared(second: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        compare_step_by_step(Momentum(), Momentum(**second), 2)


def test_one_ulp_away() -> None:
    state = {
        "wide": np.ones(50, np.float64),
        "narrow": np.ones(50, ml_dtypes.bfloat16),
        "count": np.arange(3),
        "zero": np.zeros(2, np.float32),
    }
    moved = one_ulp_away(state, np.random.default_rng(0))
    assert set(moved["wide"]) == {1 - 2.0**-53, 1 + 2.0**-52}
    assert set(moved["narrow"].astype(float)) == {1 - 2.0**-8, 1 + 2.0**-7}
    assert moved["narrow"].dtype == ml_dtypes.bfloat16
    assert moved["count"] is state["count"]
    assert np.all(moved["zero"] != 0)


# --- The command ----------------------------------------------------------------------------------------------------


MOMENTUM = "parity_tests.meta.brought_training:Momentum"
PAIR = (f"jax:{MOMENTUM}", f"torch:{MOMENTUM}")


def test_command(tmp_path: Path) -> None:
    outcome = invoke("trajectory", *PAIR, "--steps", "5")
    assert outcome.exit_code == 0, outcome.output
    assert "AGREE over 5 steps" in outcome.output
    file = tmp_path / "verdict.json"
    arguments = ("--b", "wrong_from=2", "--steps", "4", "--json", str(file), "--report", str(tmp_path / "page"))
    outcome = invoke("trajectory", *PAIR, *arguments)
    assert outcome.exit_code == 1
    assert "free-running: part at step 2, weight[" in outcome.output
    assert "teacher-forced: part at step 2, weight[" in outcome.output
    content = json.loads(file.read_text())
    assert [mode["first_divergence"]["step"] for mode in content["modes"]] == [2, 2]
    assert "part at step 2, weight[" in (tmp_path / "page" / "index.html").read_text()


@pytest.mark.parametrize(("arguments", "message"), [
    (["jax:parity_tests.meta.brought_training:nothing", PAIR[1]], "brought_training has no nothing"),
    ([PAIR[0], "torch:numpy:ones"], "torch:numpy:ones"),
    ([PAIR[0], "torch:builtins:dict"], "gives a dict without state, load, step"),
    ([*PAIR, "--b", "hidden=true"], "the second training does not repeat its first step"),
    ([*PAIR, "--b", "unheard_of=1"], "unexpected keyword argument 'unheard_of'"),
])  # fmt: skip
def test_command_that_cannot_run(arguments: list[str], message: str) -> None:
    outcome = invoke("trajectory", *arguments)
    assert outcome.exit_code == 2, outcome.output
    assert message in outcome.output


@pytest.mark.slow
def test_the_demos_network() -> None:
    """Flax with Optax against torch, by the classes that the pages show; and a smoothing that is a little off."""
    pair = ("jax:examples.digits_steps:JaxSteps", "torch:examples.digits_steps:TorchSteps")
    # Optax does not take the strictness of our tests.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        outcome = invoke("trajectory", *pair, "--steps", "3", "--replicas", "2")
        assert outcome.exit_code == 0, outcome.output
        outcome = invoke("trajectory", *pair, "--steps", "1", "--replicas", "2", "--b", "smoothing=0.1001")
    assert outcome.exit_code == 1, outcome.output
    assert "part at step 0" in outcome.output
