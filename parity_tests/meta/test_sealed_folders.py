"""Recorded folders of every kind: any changed bit is found, and what is forged ends with one clear line or a verdict.

Thousands of mutations run in the tests that are marked slow, some in every session.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from torch.nn.functional import binary_cross_entropy_with_logits
from typer.testing import Result

from parity_tests.losses.registry import FaultyAdapter, make_adapter
from parity_tests.meta.brought_training import Momentum
from parity_tests.meta.bundles import flip
from parity_tests.meta.damage import deep, forge, mutate_bytes, mutate_json, refusal
from parity_tests.meta.running import invoke
from parity_tests.studies import bundle, recorded_losses, recorded_trainings
from parity_tests.studies.sealed_folders import ARRAYS, RecordingError
from parity_tests.studies.survey import make_cases
from parity_tests.truth.batches import save_batch

LOSS = f"torch:{__name__}:sigmoid_loss"
MOMENTUM = "parity_tests.meta.brought_training:Momentum"
# What makes one kind differ from another: claims that no file can prove, as versions, devices, and what rounding
# explains on a device.
BUNDLE_CLAIMS = ("environment", "adapters")
LOSS_CLAIMS = ("name", "framework", "device", "arithmetic", "environment", "question", "own", "sides")
TRAINING_CLAIMS = ("name", "environment", "batch_size")
SEALS = ("format", "sha256", "arrays_sha256")


def sigmoid_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return a loss that is recorded and replayed, of several right classes: its runs in float64 are the truth."""
    return binary_cross_entropy_with_logits(logits, labels)


@dataclass(frozen=True)
class Kind:
    """A kind of recording.

    Args:
        name: what messages call it.
        manifest: the name of its manifest.
        write: makes one in a folder.
        read: reads it.
        options: of `lsce-parity replay`, for a verdict that agrees.
        times: how many mutations each session tries, and how many the slow tests.
        claims: whether the entry of the manifest at a path can be another one without a result, an input or an option
            being another one.
        array_claims: the same for an array of this name, when a bit of it is flipped.
    """

    name: str
    manifest: str
    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    options: tuple[str, ...]
    times: tuple[int, int]
    claims: Callable[[tuple[Any, ...]], bool]
    array_claims: Callable[[str], bool]


def write_bundle(folder: Path) -> None:
    cases = make_cases(("ties", "class_mask_near_one", "linear_sum"), ["float16"])
    bundle.write_bundle(folder, bundle.record([FaultyAdapter(), make_adapter("oracle")], cases))


def write_loss(folder: Path) -> None:
    generator = np.random.default_rng(0)
    batch = folder.with_suffix(".safetensors")
    save_batch(batch, logits=generator.normal(size=(4, 3)).astype(np.float32), labels=np.eye(4, 3, dtype=np.float32))
    done = invoke("record", str(folder), "--adapter", LOSS, "--inputs", str(batch))
    assert done.exit_code == 0, done.output


def write_training(folder: Path) -> None:
    recorded_trainings.record_training(folder, f"torch:{MOMENTUM}", Momentum(), 4, replicas=2)


def claims_of_a_bundle(path: tuple[Any, ...]) -> bool:
    """A case of another name has the same inputs. A result that is left out is not compared."""
    if path[0] in BUNDLE_CLAIMS or len(path) == 1:
        return True
    return path[0] == "cases" and len(path) > 2 and path[2] in ("name", "results", "failures")


def claims_of_a_loss(path: tuple[Any, ...]) -> bool:
    """A user's loss is called with the arrays of a case alone."""
    return path[0] in LOSS_CLAIMS or (
        path[0] == "cases" and path[2:3] in (("name",), ("axis",), ("options",), ("smoothing",))
    )


KINDS = [
    Kind("bundle", bundle.MANIFEST, write_bundle, bundle.read_bundle, ("--adapter", "numpy"), (120, 1000),
         claims_of_a_bundle, lambda name: name.startswith("results/")),
    Kind("loss", recorded_losses.MANIFEST, write_loss, recorded_losses.read_recording, ("--adapter", LOSS), (40, 1000),
         claims_of_a_loss, lambda name: name.startswith("float32/") or "/moved in " in name or "/noise/" in name),
    Kind("training", recorded_trainings.MANIFEST, write_training, recorded_trainings.read_training,
         ("--training", f"jax:{MOMENTUM}"), (60, 1500),
         # The spread is the recorder's claim; one that is larger allows more. The number of rows sets the rounding.
         lambda path: path[0] in TRAINING_CLAIMS, lambda name: "running/" in name or "forced/" in name),
]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def made(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sealed") / kind.name
    kind.write(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "recorded"))


def replayed(kind: Kind, folder: Path) -> Result:
    return invoke("replay", str(folder), *kind.options)


def agrees(done: Result, what: object) -> bool:
    """Return whether a command said AGREE; if it gave no verdict, after checking that it said why in one line."""
    if done.exit_code == 2 and "NO VERDICT" not in done.stdout:
        assert refusal(done, what)
    return done.exit_code == 0


# --- What was changed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_manifest", [True, False])
def test_any_flipped_bit_is_found(of_manifest: bool, kind: Kind, folder: Path) -> None:
    path = folder / (kind.manifest if of_manifest else ARRAYS)
    size = path.stat().st_size
    # The beginning, where safetensors keeps lengths and offsets, the end, and a sample of the rest.
    for byte in {*range(400), *range(400, size, max(1, size // 300)), size - 1}:
        flip(path, byte, byte % 8)
        with pytest.raises(RecordingError):
            kind.read(folder)
        flip(path, byte, byte % 8)
    kind.read(folder)
    assert replayed(kind, folder).exit_code == 0


@pytest.mark.parametrize("edit", [
    lambda text: text + "\n",
    lambda text: text.replace('": ', '":  ', 1),
    lambda text: text.replace('"python": "3', '"python": "4', 1),
    lambda text: text.replace('"sha256": "', '"sha256": "0', 1),
    lambda text: text.replace('"python": ', '"python": "2.7",\n  "python": ', 1),
    lambda text: text[:-20],
])  # fmt: skip
def test_an_edited_manifest_is_found(edit: Callable[[str], str], kind: Kind, folder: Path) -> None:
    path = folder / kind.manifest
    text = path.read_text()
    assert edit(text) != text
    path.write_text(edit(text))
    with pytest.raises(RecordingError):
        kind.read(folder)


def test_another_file_of_the_same_arrays_is_found(folder: Path, kind: Kind) -> None:
    (folder / ARRAYS).write_bytes(save(load((folder / ARRAYS).read_bytes()), metadata={"note": "harmless"}))
    done = replayed(kind, folder)
    assert refusal(done, kind)
    assert f"{folder} was edited or damaged: it does not fit its SHA-256. Copy it again" in done.stderr


@pytest.mark.parametrize("content", ids=range(10), argvalues=[
    b"", b"\x00" * 64, b"\xff" * 64, b"1" * 10_000, b"[]\n", b"NaN\n", b"{}", b'{"format": 4}', deep().encode(),
    b'{"a":' * 100_000,
])  # fmt: skip
def test_something_else_is_refused(content: bytes, kind: Kind, folder: Path) -> None:
    for name in (kind.manifest, ARRAYS):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        assert refusal(replayed(kind, folder), (name, content[:9]))
        (folder / name).write_bytes(data)


def test_what_is_missing_is_named(kind: Kind, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=rf"no {kind.name} can be read in .*: {kind.manifest}: No such file or"):
        kind.read(tmp_path / "nowhere")
    (folder / ARRAYS).unlink()
    with pytest.raises(RecordingError, match=rf"{ARRAYS}: No such file or directory. `lsce-parity record` makes one."):
        kind.read(folder)
    (folder / ARRAYS).mkdir()
    with pytest.raises(RecordingError, match=f"{ARRAYS}: Is a directory"):
        kind.read(folder)


# --- What was forged, with hashes that fit ----------------------------------------------------------------------------


def set_entry(path: str, value: Any, content: Any, arrays: Any) -> None:
    *folders, name = [int(each) if each.isdigit() else each for each in path.split("/")]
    for each in folders:
        content = content[each]
    content[name] = value


def set_array(name: str, value: Any, content: Any, arrays: Any) -> None:
    arrays[name] = value


def lose_array(name: str, content: Any, arrays: Any) -> None:
    del arrays[name]


FORMATS = [
    ({"format": 5}, "has format 5, this lsce reads format 4. Install a newer lsce."),
    ({"format": 0}, "has format 0, this lsce reads format 4. Record it again."),
    ({"format": None}, "has format None, this lsce reads format 4. Record it again."),
    ({"format": True}, "has format True, this lsce reads format 4. Record it again."),
]
ARITHMETIC = "adapters/numpy/arithmetic"
FORGED = {
    "bundle": [
        (partial(lose_array, "cases/0/labels"), "describes no bundle: TypeError"),
        (partial(lose_array, "cases/0/logits"), "describes no bundle: TypeError"),
        (partial(lose_array, "truths/0/bad"), "describes no bundle: KeyError"),
        (partial(lose_array, "results/0/numpy/loss"), "a result has the parts gradient, and dtypes of loss, gradient"),
        (partial(set_array, "more", np.zeros(1)), "it has arrays of no case, in ''"),
        (partial(set_array, "cases/9/labels", np.zeros(1)), "it has arrays of no case, in 'cases/9'"),
        (partial(set_array, "cases/0/labels", np.zeros((6, 1), np.int64)), "describes no bundle: "),
        (partial(set_array, "results/0/numpy/loss", np.zeros(6, np.int64)), "a result has the dtype int64"),
        (partial(set_entry, "environment", {}), "environment.python is missing"),
        (partial(set_entry, "adapters", []), "adapters must be an object, got a list"),
        (partial(set_entry, "adapters/numpy/device", "abacus"), "numpy ran on 'abacus'"),
        (partial(set_entry, f"{ARITHMETIC}/exp", "3"), "arithmetic.exp must be an integer or a number, got '3'"),
        (partial(set_entry, f"{ARITHMETIC}/exp", 1e300), "arithmetic.exp must be from 0 to 65536, got 1e"),
        (partial(set_entry, f"{ARITHMETIC}/depth", "deep"), "does not know"),
        (partial(set_entry, "cases/0/dtype", "float8"), "has the dtype 'float8'"),
        (partial(set_entry, "cases/0/axis", True), "cases[0].axis must be an integer"),
        (partial(set_entry, "cases/0/axis", 9), "describes no bundle: AxisError"),
        (lambda content, arrays: content["cases"].append(content["cases"][0]), "two cases have the same name"),
        (partial(set_entry, "cases", []), "it has no case"),
    ],
    "loss": [
        (partial(lose_array, "cases/0/labels"), "describes no loss: "),
        (partial(lose_array, "results/mean/0/loss"), "describes no loss: "),
        (partial(lose_array, "float64/mean/0/moved in float32/gradient"), "what moves in case 0 does not fit its"),
        (partial(lose_array, "float64/mean/0/noise/loss"), "what moves in case 0 does not fit its result"),
        (partial(set_entry, "arithmetic/exp", 1e300), "arithmetic.exp must be from 0 to 65536, got 1e"),
    ],
    "training": [
        (partial(lose_array, "states/0/0"), "describes no training: "),
        (partial(set_entry, "spread_of", ["loss", "weight", "speed"]), "the spread is that of other tensors"),
        (partial(set_entry, "tensors", ["weight", "weight", "count"]), "other arrays than those of its steps"),
        (partial(set_entry, "steps", 3), "expected are numbers in float64 [3]"),
        (partial(set_entry, "batch_size", 0), "must be at least 1"),
        (partial(set_entry, "environment", {}), "environment.python is missing"),
    ],
}  # fmt: skip


def test_a_forged_folder_is_refused_in_words(kind: Kind, made: Path, tmp_path: Path) -> None:
    forged = [(lambda content, arrays, entry=entry: content.update(entry), message) for entry, message in FORMATS]
    for number, (change, message) in enumerate([*forged, *FORGED[kind.name]]):
        folder = Path(shutil.copytree(made, tmp_path / str(number)))
        forge(folder, kind.manifest, lambda content, arrays: None)
        kind.read(folder)
        forge(folder, kind.manifest, change)
        done = replayed(kind, folder)
        assert refusal(done, message)
        assert message in done.stderr, done.stderr


def damage(kind: Kind, folder: Path, times: int, seed: int) -> None:
    draw = random.Random(seed)
    for number in range(times):
        name = draw.choice((kind.manifest, ARRAYS))
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(mutate_bytes(data, draw))
        assert refusal(replayed(kind, folder), (name, number))
        (folder / name).write_bytes(data)


def change_manifest(draw: random.Random, content: dict[str, Any], arrays: Any) -> tuple[Any, ...]:
    """Change one entry, and return its path."""
    changed, path = mutate_json({name: content[name] for name in content if name not in SEALS}, draw)
    content.clear()
    content.update(changed)
    return path


def change_array(draw: random.Random, content: Any, arrays: dict[str, Any]) -> tuple[str, str]:
    """Change one array; return its name and how."""
    name = draw.choice([name for name in arrays if arrays[name].size])
    array, how = arrays[name], draw.choice(("bits", "bits", "lost", "shape", "dtype", "again"))
    if how == "bits":
        bits = bytearray(array.tobytes())
        # A high bit of a number: what is off by rounding alone may agree.
        bits[draw.randrange(array.size) * array.itemsize + array.itemsize - 1] ^= 0x40
        arrays[name] = np.frombuffer(bits, array.dtype).reshape(array.shape)
    elif how == "shape":
        arrays[name] = array.ravel()[:-1]
    elif how == "dtype":
        arrays[name] = array.astype(np.int32 if array.dtype.kind == "f" else np.float32)
    elif how == "lost":
        del arrays[name]
    else:
        arrays[f"{name}0"] = array
    return name, how


def forge_each(change: Callable[..., Any], kind: Kind, folder: Path, times: int, seed: int) -> Iterator[Any]:
    """Forge a folder, and yield what was changed each time that the forgery agrees."""
    draw = random.Random(seed)
    made = Path(shutil.copytree(folder, folder.with_name("made")))
    for number in range(times):
        shutil.copytree(made, folder, dirs_exist_ok=True)
        changed = forge(folder, kind.manifest, partial(change, draw))
        if agrees(replayed(kind, folder), (number, changed)):
            yield changed


def forge_manifests(kind: Kind, folder: Path, times: int, seed: int) -> None:
    for path in forge_each(change_manifest, kind, folder, times, seed):
        assert kind.claims(path), path


def forge_arrays(kind: Kind, folder: Path, times: int, seed: int) -> None:
    for name, how in forge_each(change_array, kind, folder, times, seed):
        assert kind.array_claims(name), (name, how)


STUDIES = (damage, forge_manifests, forge_arrays)


@pytest.mark.parametrize("study", STUDIES)
def test_mutations(study: Callable[..., None], kind: Kind, folder: Path) -> None:
    study(kind, folder, kind.times[0], 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("study", STUDIES)
def test_thousands_of_mutations(study: Callable[..., None], seed: int, kind: Kind, folder: Path) -> None:
    study(kind, folder, kind.times[1], seed)
