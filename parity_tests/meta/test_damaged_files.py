"""Damaged and forged kits and ledgers: each ends with one clear line and exit code 2, never in a traceback.

Thousands of mutations run in the tests that are marked slow, a few hundred in every session.
"""

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
from typer.testing import Result

from parity_tests.evidence import ledger
from parity_tests.evidence.ledger import Evidence, Session
from parity_tests.losses.registry import FaultyAdapter, make_adapter
from parity_tests.meta.damage import deep, mutate_bytes, mutate_json, refusal
from parity_tests.meta.running import invoke
from parity_tests.studies import kit as kits
from parity_tests.studies.bundle import read_bundle, record, write_bundle
from parity_tests.studies.kit import REPORT, bundle_folder, write_kit
from parity_tests.studies.survey import make_cases

CASES = ("ties", "class_mask_near_one", "linear_sum")
FEW = 120


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged") / "bundle"
    write_bundle(folder, record([FaultyAdapter(), make_adapter("oracle")], make_cases(CASES, ["float16"])))
    return folder


@pytest.fixture
def kit(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kit whose only cases are all that there are."""
    monkeypatch.setattr(kits, "all_case_names", lambda: list(CASES))
    folder = tmp_path / "kit"
    shutil.copytree(bundle, bundle_folder(folder, "float16"))
    environment = read_bundle(bundle).environment
    content = {"date": "2026-11-27", "commit": "", "device": "cpu", "cards": {"jax": "", "numpy": ""}}
    write_kit(folder, {**content, "environment": environment}, ["float16"])
    (tmp_path / "README.md").write_text("<!-- lsce-parity matrix: begin -->\n<!-- lsce-parity matrix: end -->\n")
    ledger.write(tmp_path / "ledger.json", [])
    assert added(folder).exit_code == 0
    return folder


def added(path: Path) -> Result:
    folder = path.parent
    files = ("--ledger", str(folder / "ledger.json"), "--page", str(folder / "README.md"))
    return invoke("matrix", *files, "--add", str(path))


def forge_kits(kit: Path, times: int, seed: int) -> None:
    draw = random.Random(seed)
    text = (kit / REPORT).read_text(encoding="utf-8")
    for number in range(times):
        damaged = mutate_bytes(text.encode(), draw)
        (kit / REPORT).write_bytes(damaged)
        # White space in JSON has no meaning, and so is not part of the hash.
        assert refusal(added(kit), number) or json.loads(damaged) == json.loads(text)
        forged, path = mutate_json(json.loads(text), draw)
        forged.pop("sha256", None)
        forged["sha256"] = hashlib.sha256(json.dumps(forged, sort_keys=True).encode()).hexdigest()
        (kit / REPORT).write_text(json.dumps(forged), encoding="utf-8")
        refusal(added(kit), (number, path))
    (kit / REPORT).write_text(deep(), encoding="utf-8")
    assert refusal(added(kit), "deep")


def test_kits(kit: Path) -> None:
    forge_kits(kit, FEW, 0)


@pytest.mark.slow
def test_thousands_of_kits(kit: Path) -> None:
    forge_kits(kit, 1500, 1)


def forge_ledgers(page: Path, times: int, seed: int) -> None:
    draw = random.Random(seed)
    file = page.with_name("more.json")
    evidence = frozenset(Evidence("jax-fused", "cpu", dtype, "executed") for dtype in ("float32", "bfloat16"))
    ledger.write(file, [Session({"python": "3.11", "jax": "0.10"}, evidence, "2026-11-27")])
    content = json.loads(file.read_text(encoding="utf-8"))
    for number in range(times):
        forged, path = mutate_json(content, draw)
        for text in (json.dumps(forged), mutate_bytes(json.dumps(content).encode(), draw).decode("latin-1")):
            file.write_text(text, encoding="utf-8")
            ledger.write(page.with_name("ledger.json"), [])
            refusal(added(file), (number, path))
    for text in (deep(), "", "{}", '{"sessions": ' + deep(500) + "}"):
        file.write_text(text, encoding="utf-8")
        assert refusal(added(file), text[:9])


def test_ledgers(kit: Path) -> None:
    forge_ledgers(kit.with_name("README.md"), FEW, 0)


@pytest.mark.slow
def test_thousands_of_ledgers(kit: Path) -> None:
    forge_ledgers(kit.with_name("README.md"), 2000, 1)
