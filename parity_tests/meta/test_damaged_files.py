"""Damaged and forged files: each ends with one clear line and exit code 2, never with AGREE and never in a traceback.

Thousands of mutations run in the tests that are marked slow, a few hundred in every session.
"""

import copy as copying
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save
from typer.testing import Result as CommandResult

from parity_tests.evidence import ledger
from parity_tests.evidence.ledger import Evidence, Session
from parity_tests.losses.registry import FaultyAdapter, make_adapter
from parity_tests.meta.running import invoke
from parity_tests.studies import kit as kits
from parity_tests.studies.bundle import ARRAYS, MANIFEST, read_bundle, record, write_bundle
from parity_tests.studies.kit import REPORT, bundle_folder, write_kit
from parity_tests.studies.survey import make_cases

CASES = ("ties", "class_mask_near_one", "linear_sum")
FEW = 120
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**63, 10**40, 0.5, -0.0, 1e308, "", "x", "float32", "\x1b[31m\nAGREE", "../..",
    "\ud800", [], {}, [[]], {"": {}}, [1, "a"],
)  # fmt: skip
Node = tuple[Any, Any]


def deep(levels: int = 100_000) -> str:
    """Return JSON that is nested more deeply than any reader follows."""
    return "[" * levels + "]" * levels


# Mutations.


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Return other bytes: flipped, left out, repeated, swapped or added."""
    while True:
        start, length = draw.randrange(len(data)), draw.choice((1, 1, 2, 8, 100))
        piece = data[start : start + length]
        changed = draw.choice(
            (
                data[:start] + bytes([data[start] ^ 1 << draw.randrange(8)]) + data[start + 1 :],
                data[:start] + data[start + length :],
                data[:start] + piece + data[start:],
                data[:start] + draw.randbytes(length) + data[start + length :],
                data[:start],
                data + piece,
            )
        )
        if changed != data:
            return changed


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Node, tuple[Any, ...]]]:
    """Yield every entry of a JSON value as its container and key, with its path."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield (value, key), (*path, key)
        if isinstance(value[key], dict | list):
            yield from nodes(value[key], (*path, key))


def mutate_json(content: Any, draw: random.Random) -> tuple[Any, tuple[Any, ...]]:
    """Return a copy with one entry replaced, removed, renamed or repeated, and its path."""
    while True:
        changed = copying.deepcopy(content)
        (container, key), path = draw.choice(list(nodes(changed)))
        how = draw.choice(("replace", "replace", "replace", "remove", "again"))
        if how == "replace":
            container[key] = draw.choice(VALUES)
        elif how == "remove":
            del container[key]
        elif isinstance(container, list):
            container.insert(key, copying.deepcopy(container[key]))
        else:
            container[f"{key}{draw.choice(('2', ' ', chr(27)))}"] = copying.deepcopy(container[key])
        if changed != content:
            return changed, path


def refusal(done: CommandResult, what: object) -> bool:
    """Return whether a command refused its input; if so, in one line that a terminal shows as it is."""
    assert done.exception is None or isinstance(done.exception, SystemExit), (what, done.exception)
    assert done.exit_code in (0, 1, 2), (what, done.output)
    if done.exit_code < 2:
        return False
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("cannot run: ")]
    assert done.stderr.endswith(f"{line}\n"), (what, done.stderr)
    assert len(line) > 40
    assert line.isprintable()
    assert "AGREE:" not in done.stdout
    return True


# Bundles.


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged") / "bundle"
    write_bundle(folder, record([FaultyAdapter(), make_adapter("oracle")], make_cases(CASES, ["float16"])))
    assert replayed(folder).exit_code == 0
    return folder


def replayed(folder: Path) -> CommandResult:
    return invoke("replay", str(folder), "--adapter", "numpy")


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with hashes that fit, as someone would who forges one."""
    manifest = {name: value for name, value in manifest.items() if name != "sha256"}
    content = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    manifest["sha256"] = hashlib.sha256(content.encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def damage_bundles(bundle: Path, folder: Path, times: int, seed: int) -> None:
    draw = random.Random(seed)
    shutil.copytree(bundle, folder)
    for number in range(times):
        name = draw.choice((MANIFEST, ARRAYS))
        data = (bundle / name).read_bytes()
        (folder / name).write_bytes(mutate_bytes(data, draw))
        assert refusal(replayed(folder), (name, number))
        (folder / name).write_bytes(data)
    assert replayed(folder).exit_code == 0


def forge_manifests(bundle: Path, folder: Path, times: int, seed: int) -> None:
    draw = random.Random(seed)
    shutil.copytree(bundle, folder)
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    for number in range(times):
        forged, path = mutate_json(manifest, draw)
        write_manifest(folder, forged)
        done = replayed(folder)
        if not refusal(done, (number, path)) and done.exit_code == 0:
            assert says_nothing_of_numbers(path), (number, path)


def says_nothing_of_numbers(path: tuple[Any, ...]) -> bool:
    """Return whether an entry can change without a result, an input or an option being another one.

    Versions, devices and bounds that a device may have are claims that no file can prove. A case of another name has
    the same inputs. A result that is left out is not compared.
    """
    if path[0] in ("environment", "adapters") or len(path) == 1:
        return True
    return path[0] == "cases" and len(path) > 2 and path[2] in ("name", "results", "failures")


def forge_arrays(bundle: Path, folder: Path, times: int, seed: int) -> None:
    draw = random.Random(seed)
    shutil.copytree(bundle, folder)
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    arrays = load((bundle / ARRAYS).read_bytes())
    for number in range(times):
        name = draw.choice([name for name in arrays if arrays[name].size])
        bits = bytearray(arrays[name].tobytes())
        bits[draw.randrange(len(bits))] ^= 0x40
        values = np.frombuffer(bits, arrays[name].dtype).reshape(arrays[name].shape)
        data = save({**arrays, name: values})
        (folder / ARRAYS).write_bytes(data)
        entry = manifest["arrays"][name]
        head = f"{name} {entry['dtype']} {values.shape}\n".encode()
        digest = {"sha256": hashlib.sha256(head + values.tobytes()).hexdigest()}
        forged = manifest | {"arrays_sha256": hashlib.sha256(data).hexdigest()}
        forged["arrays"] = manifest["arrays"] | {name: entry | digest}
        write_manifest(folder, forged)
        refused = refusal(replayed(folder), (number, name))
        assert refused or name.startswith("results/"), name


STUDIES: tuple[Callable[[Path, Path, int, int], None], ...] = (damage_bundles, forge_manifests, forge_arrays)


@pytest.mark.parametrize("study", STUDIES)
def test_bundles(study: Callable[[Path, Path, int, int], None], bundle: Path, tmp_path: Path) -> None:
    study(bundle, tmp_path / "bundle", FEW, 0)


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("seed", [1, 2])
def test_thousands_of_bundles(
    study: Callable[[Path, Path, int, int], None], seed: int, bundle: Path, tmp_path: Path
) -> None:
    study(bundle, tmp_path / "bundle", 1000, seed)


@pytest.mark.parametrize("name", [MANIFEST, ARRAYS])
@pytest.mark.parametrize(
    "content", [deep().encode(), b'{"a":' * 100_000, b"", b"\x00" * 64, b"\xff" * 64, b"1" * 10_000]
)
def test_bundles_of_something_else(name: str, content: bytes, bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (folder / name).write_bytes(content)
    assert refusal(replayed(folder), content[:9])


def test_an_unreadable_manifest_is_not_a_missing_one(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).mkdir()
    done = replayed(tmp_path)
    assert refusal(done, "folder")
    assert f"{tmp_path / MANIFEST} cannot be read: Is a directory" in done.stderr


# Kits and ledgers.


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


def added(path: Path) -> CommandResult:
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
