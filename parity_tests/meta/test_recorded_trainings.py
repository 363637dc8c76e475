"""A training recorded with one framework gets the verdict, against one of the other, that both get on one machine."""

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from parity_tests.meta.brought_training import Momentum
from parity_tests.meta.running import invoke, run_code
from parity_tests.studies.recorded_trainings import read_training, record_training
from parity_tests.trainings.stepwise import TrainingError, compare_step_by_step, compare_with_steps

JAX = "jax:parity_tests.meta.brought_training:Momentum"
TORCH = "torch:parity_tests.meta.brought_training:Momentum"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def of_momentum(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recording of four steps."""
    folder = tmp_path_factory.mktemp("once") / "recorded"
    record_training(folder, TORCH, Momentum(), 4, replicas=2)
    return folder


@pytest.fixture
def recorded(of_momentum: Path) -> Path:
    """Return a copy of the recording, in the current folder."""
    return Path(shutil.copytree(of_momentum, "recorded"))


def replay(*options: str) -> Any:
    return invoke("replay", "recorded", "--training", JAX, *options)


@pytest.mark.parametrize(("options", "exit_code"), [((), 0), (("--b", "wrong_from=2"), 1), (("--b", "nan_at=1"), 1)])
def test_the_verdict_and_its_numbers_are_those_of_trajectory(options: tuple[str, ...], exit_code: int) -> None:
    sizes = ("--steps", "5", "--replicas", "3", "--batch-size", "32")
    made = invoke("record", "recorded", "--training", TORCH, *sizes, "--json", "recorded.json")
    assert made.exit_code == 0, made.output
    assert f"wrote recorded: {TORCH} over 5 steps" in made.output
    outcome = replay(*options, "--json", "replayed.json", "--report", "page")
    compared = invoke("trajectory", TORCH, JAX, *options, *sizes, "--json", "compared.json")
    assert (outcome.exit_code, compared.exit_code) == (exit_code, exit_code), outcome.output + compared.output
    found, expected = (json.loads(Path(name).read_text()) for name in ("replayed.json", "compared.json"))
    assert found["modes"] == expected["modes"]
    assert (found["command"], found["agrees"]) == ("replay", exit_code == 0)
    assert found["trainings"] == [f"{TORCH} (recorded)", JAX]
    assert "recorded with Python 3" in outcome.output
    assert "free-running: " in Path("page", "index.html").read_text()
    content = json.loads(Path("recorded.json").read_text())
    assert content["tensors"]["weight"] == {"shape": [4, 3], "dtype": "float32"}
    assert len(content["losses"]) == 5


def test_bits_and_dtypes_are_kept(tmp_path: Path) -> None:
    class Narrow(Momentum):
        def state(self) -> dict[str, Any]:
            return {
                "a/b": self.weight.astype(ml_dtypes.bfloat16),
                "velocity": self.velocity.astype(np.float64),
                "": np.array(self.count, np.uint8),
                "flag": np.array([True, False]),
            }

        def load(self, state: Any) -> None:
            self.weight, self.velocity = state["a/b"].astype(np.float32), state["velocity"].astype(np.float32)
            self.count = int(state[""])

    record_training(tmp_path / "narrow", "narrow", Narrow(), 3)
    found = read_training(tmp_path / "narrow")
    training = Narrow()
    for name, values in training.state().items():
        np.testing.assert_array_equal(found.start[name], values)
        assert found.start[name].dtype == values.dtype
    for number, step in enumerate(found.free):
        training.load(training.state())
        assert step.loss == training.step(number)
        assert all(np.array_equal(step.after[name], values) for name, values in training.state().items())
    for mode in compare_with_steps((found.free, found.forced), found.start, Narrow()):
        assert mode.agrees
        assert mode.largest.share == 0
    wrong = compare_with_steps((found.free, found.forced), found.start, Narrow(rate=4.0))
    assert [mode.agrees for mode in wrong] == [False, False]


@pytest.mark.usefixtures("recorded")
def test_a_machine_without_the_other_framework_is_enough() -> None:
    code = f"""
from parity_tests.__main__ import app
app(["replay", "recorded", "--training", {JAX!r}])
"""
    outcome = run_code(code, blocked=["torch"])
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "AGREE over 4 steps" in outcome.stdout


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(("arguments", "message"), [
    (("replay", "recorded"), "recorded holds a training: name one to compare with it"),
    (("replay", "recorded", "--training", f"{JAX}less"), "has no Momentumless"),
    (("replay", "recorded", "--training", JAX, "--rtol", "1"), "leave out --adapter"),
    (("replay", "recorded", "--adapter", "oracle"), "leave out --adapter, --device, --rtol and --atol"),
    (("replay", "recorded", "--training", JAX, "--b", "transpose=true"), "shapes [4, 3] a"),
    (("replay", "other", "--training", JAX), "other holds no recorded training"),
    (("record", "new", "--training", JAX, "--dtype", "float32"), "is recorded alone"),
    (("record", "new", "--training", JAX, "--ignore-index", "0"), "is recorded alone"),
    (("record", "new", "--steps", "3"), "--steps, --replicas and --batch-size are for --training"),
    (("record", "recorded", "--training", JAX), "recorded holds a recorded training"),
    (("record", "new", "--training", JAX, "--a", "hidden=true"), "does not repeat its"),
])  # fmt: skip
def test_what_does_not_go_together(arguments: tuple[str, ...], message: str) -> None:
    outcome = invoke(*arguments)
    assert outcome.exit_code == 2, outcome.output
    assert message in outcome.stderr
    assert not Path("new").exists()


def test_a_training_that_does_not_repeat_a_later_step_is_not_recorded() -> None:
    class Later(Momentum):
        def step(self, number: int) -> float:
            loss = super().step(number)
            if number == 2:
                self.weight = self.weight + np.float32(1e-3) * np.float32(self.calls)
            return float(loss)

    with pytest.raises(TrainingError, match="does not repeat its step 2 from the same state: weight came out"):
        record_training(Path("new"), "later", Later(), 4)
    assert not Path("new").exists()


@pytest.mark.parametrize(("state", "message"), [
    ({"loss": np.zeros(2)}, "a tensor of the state is called 'loss', as the loss is"),
    ({"weight": np.zeros(2, np.complex64)}, "weight is of dtype complex64; give numbers that are real"),
    ({"weight": np.zeros(2, np.longdouble)}, f"weight is of dtype {np.dtype(np.longdouble)}; give numbers"),
])  # fmt: skip
def test_states_that_are_no_tensors(state: dict[str, Any], message: str) -> None:
    class Strange(Momentum):
        def state(self) -> dict[str, Any]:
            return state

        def load(self, state: Any) -> None:
            pass

    with pytest.raises(TrainingError, match=message):
        record_training(Path("new"), "strange", Strange(), 1)
    with pytest.raises(TrainingError, match=message):
        compare_step_by_step(Strange(), Strange(), 1)
