"""What is kept on disk is what is computed, bit for bit; changed inputs, code or files find nothing."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lsce_spec import NON_TARGET
from parity_tests.truth import oracle, stored
from parity_tests.truth.cases import Case, make_case
from parity_tests.truth.linear_cases import make_any_case
from parity_tests.truth.oracle import Truth, solve
from parity_tests.truth.stored import TruthFolder, truth_to_arrays, truths_on_disk

# With and without a layer, its bias, rows, a reduction, NaN, infinities and a mask.
NAMES = ("no_rows", "bad_labels", "minus_infinity", "class_mask", "linear_mean", "linear_everything")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have every truth stored in a folder of the test, and none known to this process."""
    monkeypatch.setattr(oracle, "disk", TruthFolder(tmp_path / "truths", seconds=0.0))
    return tmp_path / "truths"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the cases whose truths have been computed."""
    names: list[str] = []
    compute = oracle._compute

    def counted(case: Case, maths: object) -> Truth:
        names.append(case.name)
        return compute(case, maths)

    monkeypatch.setattr(oracle, "_compute", counted)
    return names


def in_a_new_process(case: Case) -> Truth:
    """Return the truth as a process does that has solved no case."""
    oracle._memory.truths.clear()
    oracle._memory.bytes = 0
    return solve(case)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_stored_truth_is_the_computed_one(name: str, dtype: str, folder: Path, computed: list[str]) -> None:
    case = make_any_case(name, dtype)
    first, second = in_a_new_process(case), in_a_new_process(case)
    assert computed == [name]
    assert type(first) is type(second)
    arrays, again = truth_to_arrays(first), truth_to_arrays(second)
    assert arrays.keys() == again.keys()
    for part, array in arrays.items():
        assert array.dtype == again[part].dtype, part
        assert array.shape == again[part].shape, part
        assert array.tobytes() == again[part].tobytes(), part


def test_another_input_option_or_convention_has_no_file(folder: Path, computed: list[str]) -> None:
    case = make_case("uniform_mean", "float32")
    logits = case.logits.copy()
    logits[0, 0] = np.nextafter(np.float32(logits[0, 0]), np.float32(9))
    others = [
        replace(case, logits=logits),
        replace(case, smoothing=0.25),
        replace(case, options={**case.options, "z_loss": 1e-9}),
        replace(case, options={**case.options, "convention": "non_target"}),
        replace(case, where=np.arange(7) != 3),
    ]
    for each in [case, *others]:
        in_a_new_process(each)
    assert len(computed) == len(list(folder.iterdir())) == 1 + len(others)
    # What a convention object computes has no name.
    own = replace(case, options={**case.options, "convention": NON_TARGET})
    for _ in range(2):
        in_a_new_process(own)
    assert len(computed) == 3 + len(others)


@pytest.mark.parametrize(("spec", "truth"), [("a", "b"), ("b", "a")])
def test_other_code_has_no_file(
    spec: str, truth: str, folder: Path, computed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case("uniform_mean", "float32")
    in_a_new_process(case)
    copies = {
        spec: Path(stored.inspect.getfile(stored.lsce_spec)).parent,
        truth: Path(stored.__file__).parent,
    }
    for name, original in copies.items():
        shutil.copytree(original, tmp_path / name / original.name)
    changed = tmp_path / spec / "lsce_spec"
    monkeypatch.setattr(stored.inspect, "getfile", lambda module: str(changed / "__init__.py"))
    monkeypatch.setattr(stored, "__file__", str(tmp_path / truth / "truth" / "stored.py"))
    stored._version.cache_clear()
    try:
        in_a_new_process(case)
        assert len(computed) == 1, "the same code elsewhere, in another order of folders"
        (changed / "checks.py").write_bytes((changed / "checks.py").read_bytes() + b"\n")
        stored._version.cache_clear()
        in_a_new_process(case)
        assert len(computed) == 2
    finally:
        stored._version.cache_clear()


@pytest.mark.parametrize("damage", ["flipped", "short", "empty"])
def test_a_damaged_file_is_replaced(damage: str, folder: Path, computed: list[str]) -> None:
    case = make_case("uniform_mean", "float32")
    truth = in_a_new_process(case)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    flipped = bytes([*whole[:-100], whole[-100] ^ 1, *whole[-99:]])
    file.write_bytes({"flipped": flipped, "short": whole[:-1], "empty": b""}[damage])
    again = in_a_new_process(case)
    assert len(computed) == 2
    assert np.array_equal(truth.gradient.high, again.gradient.high)
    assert file.read_bytes() == whole


def test_quick_truths_have_no_file_and_old_files_go(
    folder: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle, "disk", TruthFolder(folder, seconds=60.0))
    in_a_new_process(make_case("ties", "float32"))
    assert not folder.exists()
    monkeypatch.setattr(oracle, "disk", TruthFolder(folder, seconds=0.0))
    folder.mkdir()
    (folder / "of the user").write_text("not ours")
    for name in ("ties", "uniform_mean"):
        in_a_new_process(make_case(name, "float32"))
    size = max(file.stat().st_size for file in folder.iterdir())
    monkeypatch.setattr(stored, "LARGEST", 2 * size + 1)
    in_a_new_process(make_case("dominant", "float32"))
    assert len(list(folder.glob("*.truth"))) == 2
    in_a_new_process(make_case("dominant", "float32"))
    assert computed[-1] == "dominant"
    assert len(computed) == 4
    assert (folder / "of the user").exists()


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path: Path, computed: list[str]) -> None:
    (tmp_path / "file").write_text("")
    truths = TruthFolder(tmp_path / "file" / "truths", seconds=0.0)
    case = make_case("ties", "float32")
    assert truths.find_or_compute(case, oracle.math, lambda: solve(case)) is solve(case)


def test_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for given, wanted in (
        (None, tmp_path / "lsce" / "truths"),
        (f"{tmp_path}/x", tmp_path / "x" / "truths"),
        ("off", None),
    ):
        if given is None:
            monkeypatch.delenv("LSCE_PARITY_CACHE", raising=False)
        else:
            monkeypatch.setenv("LSCE_PARITY_CACHE", given)
        with truths_on_disk():
            assert (oracle.disk and oracle.disk.folder) == wanted  # type: ignore[attr-defined]
        assert oracle.disk is None


PROGRAM = """
import collections, sys, warnings
from pathlib import Path
import jax, jax.monitoring
from parity_tests.losses.adapters import JaxAdapter, keep_programs
from parity_tests.truth.cases import make_case
chosen = jax.config.jax_compilation_cache_dir
keep_programs(Path(sys.argv[1]))
assert chosen is None or jax.config.jax_compilation_cache_dir == chosen
found = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: found.update([event.rpartition("/")[2]]))
result = JaxAdapter()(make_case("ties", "float32"))
print(found["cache_hits"], found["cache_misses"], result.gradient.tobytes().hex())
"""


@pytest.mark.slow
def test_compiled_programs_are_kept_and_damaged_ones_compiled_again(tmp_path: Path) -> None:
    def hits_misses_result(**environment: str) -> list[str]:
        given = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "cache")]
        done = subprocess.run(
            command, env={**given, **environment}, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    first, second = hits_misses_result(), hits_misses_result()
    assert first[0] == "0"
    assert second == [first[1], "0", first[2]]
    (programs,) = (tmp_path / "cache").iterdir()
    for file in programs.iterdir():
        file.write_bytes(file.read_bytes()[:-20])
    damaged = hits_misses_result()
    assert damaged == ["0", damaged[1], first[2]]
    # What the user has chosen stays.
    assert hits_misses_result(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))[2] == first[2]
