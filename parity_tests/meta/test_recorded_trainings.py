"""A training recorded with one framework gets the verdict, against one of the other, that both get on one machine."""

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from parity_tests.meta.running import invoke, run_code
from parity_tests.meta.test_damaged_files import deep, mutate_bytes, mutate_json, refusal
from parity_tests.meta.test_stepwise import TRAINING, Momentum
from parity_tests.studies.recorded_trainings import MANIFEST, read_training, record_training
from parity_tests.studies.sealed_folders import ARRAYS, digest, write_sealed
from parity_tests.trainings.stepwise import TrainingError, compare_step_by_step, compare_with_steps
from parity_tests.truth.batches import from_safetensors

FEW = 60
# Claims that no file can prove, and the number of rows, which sets the rounding of the loss.
CLAIMS = ("name", "environment", "batch_size")


@pytest.fixture(autouse=True)
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with the user's module."""
    (tmp_path / "brought_training.py").write_text("import numpy as np\n" + TRAINING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture(scope="module")
def of_momentum(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recording of four steps."""
    folder = tmp_path_factory.mktemp("once") / "recorded"
    record_training(folder, "torch:brought_training:Momentum", Momentum(), 4, replicas=2)
    return folder


@pytest.fixture
def recorded(of_momentum: Path) -> Path:
    """Return a copy of the recording, in the current folder."""
    return Path(shutil.copytree(of_momentum, "recorded"))


def replay(*options: str) -> Any:
    return invoke("replay", "recorded", "--training", "jax:brought_training:Momentum", *options)


@pytest.mark.parametrize(("options", "exit_code"), [((), 0), (("--b", "wrong_from=2"), 1), (("--b", "nan_at=1"), 1)])
def test_the_verdict_and_its_numbers_are_those_of_trajectory(options: tuple[str, ...], exit_code: int) -> None:
    pair = ("torch:brought_training:Momentum", "jax:brought_training:Momentum")
    sizes = ("--steps", "5", "--replicas", "3", "--batch-size", "32")
    made = invoke("record", "recorded", "--training", pair[0], *sizes, "--json", "recorded.json")
    assert made.exit_code == 0, made.output
    assert "wrote recorded: torch:brought_training:Momentum over 5 steps" in made.output
    outcome = replay(*options, "--json", "replayed.json", "--report", "page")
    compared = invoke("trajectory", *pair, *options, *sizes, "--json", "compared.json")
    assert (outcome.exit_code, compared.exit_code) == (exit_code, exit_code), outcome.output + compared.output
    found, expected = (json.loads(Path(name).read_text()) for name in ("replayed.json", "compared.json"))
    assert found["modes"] == expected["modes"]
    assert (found["command"], found["agrees"]) == ("replay", exit_code == 0)
    assert found["trainings"] == [f"{pair[0]} (recorded)", pair[1]]
    assert "recorded with Python 3" in outcome.output
    assert "free-running: " in Path("page", "index.html").read_text()
    content = json.loads(Path("recorded.json").read_text())
    assert content["tensors"]["weight"] == {"shape": [4, 3], "dtype": "float32"}
    assert len(content["losses"]) == 5


def test_bits_and_dtypes_are_kept(tmp_path: Path) -> None:
    class Narrow(Momentum):  # type: ignore[misc, valid-type]
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
    code = """
from parity_tests.__main__ import app
app(["replay", "recorded", "--training", "jax:brought_training:Momentum"])
"""
    outcome = run_code(code, blocked=["torch"])
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "AGREE over 4 steps" in outcome.stdout


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(("arguments", "message"), [
    (("replay", "recorded"), "recorded holds a training: name one to compare with it"),
    (("replay", "recorded", "--training", "jax:brought_training:nothing"), "brought_training has no nothing"),
    (("replay", "recorded", "--training", "jax:brought_training:Momentum", "--rtol", "1"), "leave out --adapter"),
    (("replay", "recorded", "--adapter", "oracle"), "leave out --adapter, --device, --rtol and --atol"),
    (("replay", "recorded", "--training", "jax:brought_training:Momentum", "--b", "transpose=true"), "shapes [4, 3] a"),
    (("replay", "other", "--training", "jax:brought_training:Momentum"), "other holds no recorded training"),
    (("record", "new", "--training", "jax:brought_training:Momentum", "--dtype", "float32"), "is recorded alone"),
    (("record", "new", "--training", "jax:brought_training:Momentum", "--ignore-index", "0"), "is recorded alone"),
    (("record", "new", "--steps", "3"), "--steps, --replicas and --batch-size are for --training"),
    (("record", "recorded", "--training", "jax:brought_training:Momentum"), "recorded holds a recorded training"),
    (("record", "new", "--training", "jax:brought_training:Momentum", "--a", "hidden=true"), "does not repeat its"),
])  # fmt: skip
def test_what_does_not_go_together(arguments: tuple[str, ...], message: str) -> None:
    outcome = invoke(*arguments)
    assert outcome.exit_code == 2, outcome.output
    assert message in outcome.stderr
    assert not Path("new").exists()


def test_a_training_that_does_not_repeat_a_later_step_is_not_recorded() -> None:
    class Later(Momentum):  # type: ignore[misc, valid-type]
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
    class Strange(Momentum):  # type: ignore[misc, valid-type]
        def state(self) -> dict[str, Any]:
            return state

        def load(self, state: Any) -> None:
            pass

    with pytest.raises(TrainingError, match=message):
        record_training(Path("new"), "strange", Strange(), 1)
    with pytest.raises(TrainingError, match=message):
        compare_step_by_step(Strange(), Strange(), 1)


# Damaged and forged recordings.


def damage(folder: Path, times: int, seed: int) -> None:
    draw = random.Random(seed)
    for number in range(times):
        name = draw.choice((MANIFEST, ARRAYS))
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(changed := mutate_bytes(data, draw))
        # White space in JSON has no meaning, and so is not part of the hash.
        same = name == MANIFEST and _json(changed) == json.loads(data)
        assert refusal(replay(), (name, number)) != same, (name, number)
        (folder / name).write_bytes(data)
    assert replay().exit_code == 0


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def forge_manifests(folder: Path, times: int, seed: int) -> None:
    """With hashes that fit, as someone would who forges one."""
    draw = random.Random(seed)
    content = json.loads((folder / MANIFEST).read_text())["content"]
    for number in range(times):
        forged, path = mutate_json(content, draw)
        (folder / MANIFEST).write_text(json.dumps({"content": forged, "sha256": digest(forged)}))
        done = replay()
        assert refusal(done, (number, path)) or done.exit_code == 1 or path[0] in CLAIMS, (number, path)


def forge_arrays(folder: Path, times: int, seed: int) -> None:
    draw = random.Random(seed)
    content = json.loads((folder / MANIFEST).read_text())["content"]
    arrays = {name: np.array(values) for name, values in from_safetensors((folder / ARRAYS).read_bytes()).items()}
    for number in range(times):
        name, forged = draw.choice(list(arrays)), copy.deepcopy(arrays)
        how = draw.choice(("bits", "lost", "shape", "dtype", "again"))
        if how == "bits":
            bits = bytearray(forged[name].tobytes())
            bits[draw.randrange(len(bits) // 8) * 8 + 7 if len(bits) > 7 else -1] ^= 0x40
            forged[name] = np.frombuffer(bits, forged[name].dtype).reshape(forged[name].shape)
        elif how == "lost":
            del forged[name]
        elif how == "again":
            forged[f"{name}0"] = forged[name]
        else:
            other = {"shape": forged[name].ravel()[:-1], "dtype": forged[name].astype(np.float16)}
            forged[name] = other[how]
        write_sealed(folder, MANIFEST, content, forged)
        done = replay()
        # A spread is the recorder's claim; one that is larger allows more.
        assert refusal(done, (number, name, how)) or done.exit_code == 1 or "running/" in name or "forced/" in name


@pytest.mark.parametrize(("entry", "value"), [
    ("spread_of", ["loss", "weight", "speed"]),
    ("tensors", ["weight", "weight", "count"]),
    ("steps", 3),
    ("batch_size", 0),
    ("environment", {}),
])  # fmt: skip
def test_a_recording_with_hashes_of_its_own_must_fit(entry: str, value: Any, recorded: Path) -> None:
    content = json.loads((recorded / MANIFEST).read_text())["content"] | {entry: value}
    (recorded / MANIFEST).write_text(json.dumps({"content": content, "sha256": digest(content)}))
    done = replay()
    assert refusal(done, entry)
    assert "recorded describes no training: " in done.stderr


STUDIES = (damage, forge_manifests, forge_arrays)


@pytest.mark.parametrize("study", STUDIES)
def test_damaged_recordings(study: Any, recorded: Path) -> None:
    study(recorded, FEW, 0)


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_thousands_of_damaged_recordings(study: Any, recorded: Path) -> None:
    study(recorded, 1500, 1)


@pytest.mark.parametrize("name", [MANIFEST, ARRAYS])
@pytest.mark.parametrize("content", [deep().encode(), b"", b"\xff" * 64, b"{}", b'{"content": [], "sha256": 1}'])
def test_recordings_of_something_else(name: str, content: bytes, recorded: Path) -> None:
    (recorded / name).write_bytes(content)
    assert refusal(replay(), content[:9])
