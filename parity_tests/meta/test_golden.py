"""The golden bundles are replayed with both frameworks and with each one alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.losses.registry import make_adapter
from parity_tests.meta.bundles import GOLDEN
from parity_tests.studies.bundle import MANIFEST, read_bundle, write_bundle
from parity_tests.studies.replays import replay
from parity_tests.studies.sealed_folders import ARRAYS

FOLDERS = ("cpu", "cpu_float64")
RECORDED = {"jax-fused", "jax-reference", "torch-fused", "torch-reference"}


@pytest.mark.parametrize("name", FOLDERS)
def test_golden_bundles_replay_with_both_frameworks(name: str) -> None:
    bundle = read_bundle(GOLDEN / name)
    assert set(bundle.adapters) == RECORDED
    found = replay(bundle, [make_adapter("jax-fused"), make_adapter("torch-fused")])
    assert found.agrees, [str(line) for line in found.lines() if not line.agrees]
    # Two adapters against the truth and four recorded ones, and these against the truth; nobody was left out anywhere.
    assert [line.cases for line in found.lines()] == [len(bundle.cases)] * 14


@pytest.mark.parametrize("name", FOLDERS)
def test_writing_what_was_read_gives_the_same_files(name: str, tmp_path: Path) -> None:
    write_bundle(tmp_path, read_bundle(GOLDEN / name))
    for file in (MANIFEST, ARRAYS):
        assert (tmp_path / file).read_bytes() == (GOLDEN / name / file).read_bytes()


def test_golden_bundles_are_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*")) < 2**19


# Run `lsce-parity replay` as if modules were not installed, and check that they stayed out.
ALONE = """
import sys
blocked, sys.argv = {blocked!r}, ["lsce-parity", "replay", *{arguments!r}]
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
from parity_tests.__main__ import main
try:
    main()
finally:
    assert not set(blocked) & set(sys.modules)
"""
FRAMEWORKS = {"jax": ("jax", "jaxlib", "flax", "optax", "lsce_jax"), "torch": ("torch", "lsce_torch")}


def replay_without(blocked: tuple[str, ...], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    code = ALONE.format(blocked=blocked, arguments=[str(argument) for argument in arguments])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("here", "elsewhere"), [("jax", "torch"), ("torch", "jax")])
@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.slow
def test_golden_bundles_replay_with_one_framework(name: str, here: str, elsewhere: str, tmp_path: Path) -> None:
    json_file = tmp_path / "replay.json"
    # All that is here for the small one; that takes JAX too long for the other.
    chosen = ("--adapter", f"{here}-fused") if name == "cpu" else ()
    done = replay_without(FRAMEWORKS[elsewhere], GOLDEN / name, "--json", json_file, *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(json_file.read_text())
    assert chosen or f"{elsewhere}-fused" in content["missing"]
    dtypes = {case.dtype for case in read_bundle(GOLDEN / name).cases}
    known = {(each["adapter"], each["dtype"], each["kind"]) for each in content["evidence"]}
    for dtype in dtypes:
        assert (f"{here}-fused", dtype, "executed") in known
        assert (f"{elsewhere}-fused", dtype, "replayed") in known
        assert (f"{elsewhere}-reference", dtype, "replayed") in known


def test_no_framework_at_all_cannot_replay() -> None:
    done = replay_without((*FRAMEWORKS["jax"], *FRAMEWORKS["torch"]), GOLDEN / "cpu_float64")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "jax is not installed" in done.stderr
    assert "torch is not installed" in done.stderr
