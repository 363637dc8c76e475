"""Kits: what one machine writes another can check, and believes nothing that it cannot compute again."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner
from typer.testing import Result as CommandResult

from lsce_spec import NON_TARGET
from parity_tests.__main__ import app
from parity_tests.commands import kit as command
from parity_tests.evidence import ledger
from parity_tests.evidence.ledger import Evidence
from parity_tests.losses.adapters import LossError
from parity_tests.meta.bundles import flip
from parity_tests.studies import kit as study
from parity_tests.studies import replays
from parity_tests.studies.bundle import MANIFEST, Bundle, read_bundle, write_bundle
from parity_tests.studies.kit import FEW_CASES, REPORT, KitError, evidence_of, read_kit, write_kit
from parity_tests.studies.sealed_folders import ARRAYS
from parity_tests.truth import oracle
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.cases import Case
from parity_tests.truth.linear_cases import all_case_names, make_any_case

FEW = ("uniform_mean", "dominant", "no_rows")
# The mutant belongs to no framework: its part of a kit is quick.
MUTANT = "mutant:other_off"


def run(*arguments: str | Path) -> CommandResult:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def make(folder: Path, *options: str) -> CommandResult:
    cases = [part for name in FEW for part in ("--case", name)]
    return run("kit", folder, "--no-benchmarks", *cases, *options)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kits") / "original"
    names = ["--adapter", "torch-fused", "--adapter", "torch-cross-entropy"]
    done = make(folder, *names, "--dtype", "float32", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    assert "AGREE on cpu: 1 adapter in float32, bfloat16, 6 results, at most 0." in done.stdout
    return folder


@pytest.fixture
def kit(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy, for which the cases that it has are all that there are."""
    monkeypatch.setattr(study, "all_case_names", lambda: list(FEW))
    return Path(shutil.copytree(original, tmp_path / "kit"))


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text("<!-- lsce-parity matrix: begin -->\n<!-- lsce-parity matrix: end -->\n", encoding="utf-8")
    ledger.write(tmp_path / "ledger.json", [])
    return path


def add(kit: Path, page: Path) -> CommandResult:
    return run("matrix", "--ledger", page.with_name("ledger.json"), "--page", page, "--add", kit)


def executed(page: Path) -> set[Evidence]:
    return {entry for session in ledger.read(page.with_name("ledger.json")) for entry in session.evidence}


# --- What a kit says ------------------------------------------------------------------------------------------------


def test_what_is_written(original: Path) -> None:
    said = json.loads((original / REPORT).read_text(encoding="utf-8"))
    assert (said["device"], said["cards"], said["benchmarks"]) == ("cpu", {"torch": ""}, {"missing": "left out"})
    assert [taken["framework"] for taken in said["fingerprints"]] == ["torch"]
    assert "cpu" in said["fingerprints"][0]["fits"]
    assert said["verdict"].startswith("AGREE on cpu: ")
    assert [(line["adapter"], line["dtype"], line["ours"]) for line in said["lines"]] == [
        (adapter, dtype, adapter == "torch-fused")
        for dtype in ("float32", "bfloat16")
        for adapter in ("torch-fused", "torch-cross-entropy")
    ]
    assert said["environment"]["versions"]["torch"]


def test_a_wrong_loss_disagrees(tmp_path: Path) -> None:
    done = make(tmp_path / "kit", "--adapter", MUTANT, "--dtype", "float32")
    assert done.exit_code == 1
    assert f"DISAGREE on cpu: {MUTANT} in float32 (of 1 adapter in float32, 3 results)" in done.stdout
    assert re.search(rf"^{MUTANT} in \w+ float32: .* of the bound: ", done.stdout, re.MULTILINE)
    assert (tmp_path / "kit" / REPORT).is_file()


def test_arithmetic_beyond_the_bounds_disagrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = command.take_fingerprint

    def beyond(*arguments: Any) -> Any:
        taken = take(*arguments)
        return replace(taken, findings=tuple(replace(each, within=False) for each in taken.findings))

    monkeypatch.setattr(command, "take_fingerprint", beyond)
    done = make(tmp_path / "kit", "--adapter", "torch-fused", "--dtype", "float16")
    assert done.exit_code == 1
    assert "DISAGREE on cpu: torch's arithmetic (of 1 adapter" in done.stdout


@pytest.mark.slow
def test_by_default_everything_that_runs_here_is_in_it(tmp_path: Path) -> None:
    """But few cases; the benchmarks too."""
    done = run(
        "kit", tmp_path / "kit", "--quick", "--dtype", "bfloat16", "--case", "*uniform_mean", "--case", "linear_sum"
    )
    assert done.exit_code == 0, done.output
    said, (bundle,) = read_kit(tmp_path / "kit")
    assert set(bundle.adapters) == set(study.ADAPTERS) - set(said["missing"])
    assert {"jax-fused-eager", "torch-fused-compiled", "torch-linear-chunked", "jax-optax"} <= set(bundle.adapters)
    assert set(said["benchmarks"]) == {"dense", "linear"}
    assert said["cards"] == {"jax": "", "torch": ""}
    assert [taken["framework"] for taken in said["fingerprints"]] == ["jax", "torch"]


def test_compiled_losses_take_few_cases() -> None:
    taken: list[str] = []

    class Compiled:
        name = "torch-fused-compiled"

    compiled: Any = Compiled()
    for name in all_case_names():
        case: Any = type("Named", (), {"name": name})
        if study.takes(compiled, case):
            taken.append(name)
    assert set(taken) == set(FEW_CASES)


def test_benchmarks_that_fail_are_said_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "BENCHMARKS", ("nothing",))
    assert command.run_benchmarks("cpu", quick=True) == {
        "missing": "`python -m benchmarks nothing` ended with exit code 2"
    }
    monkeypatch.setattr(command, "ROOT", tmp_path)
    assert "in a clone" in command.run_benchmarks("cpu", quick=True)["missing"]


def test_an_interrupted_kit_has_what_was_finished(tmp_path: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = command.record

    def interrupted(adapters: Any, cases: Any, *options: Any) -> Bundle:
        cases = list(cases)
        if cases[0].dtype == "bfloat16":
            raise KeyboardInterrupt
        return record(adapters, cases, *options)

    monkeypatch.setattr(command, "record", interrupted)
    monkeypatch.setattr(study, "all_case_names", lambda: list(FEW))
    done = make(tmp_path / "kit", "--adapter", "torch-fused", "--dtype", "float32", "--dtype", "bfloat16")
    assert done.exit_code == 130
    assert add(tmp_path / "kit", page).exit_code == 0
    assert {entry.dtype for entry in executed(page)} == {"float32"}


# --- What cannot be written -----------------------------------------------------------------------------------------


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    done = make(tmp_path / "kit", "--device", "cuda", "--adapter", "torch-fused")
    assert done.exit_code == 2
    assert "torch finds no cuda device" in done.stderr


def test_a_folder_that_is_not_free(kit: Path, tmp_path: Path) -> None:
    done = make(kit)
    assert done.exit_code == 2
    assert "holds a kit; name another folder, or pass --force" in done.stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("", encoding="utf-8")
    for force in ([], ["--force"]):
        done = make(tmp_path / "full", *force)
        assert done.exit_code == 2
        assert "holds no kit" in done.stderr
    assert make(tmp_path / "full" / "thesis.tex").exit_code == 2


def test_a_kit_can_be_written_over(tmp_path: Path) -> None:
    for force in ([], ["--force"]):
        assert make(tmp_path / "kit", "--adapter", "numpy", "--dtype", "float32", *force).exit_code == 0


# --- What another checkout believes ---------------------------------------------------------------------------------


def test_a_kit_is_added(kit: Path, page: Path) -> None:
    done = add(kit, page)
    assert done.exit_code == 0, done.output
    assert "float32: 3 cases; within their bounds: torch-fused" in done.stdout
    assert executed(page) == {Evidence("torch-fused", "cpu", dtype, "executed") for dtype in ("float32", "bfloat16")}
    assert "| `torch-fused` | float32, bfloat16 | executed | not run | not run |" in page.read_text(encoding="utf-8")
    (session,) = ledger.read(page.with_name("ledger.json"))
    assert session.versions == ledger.session_versions()
    assert session.date == json.loads((kit / REPORT).read_text(encoding="utf-8"))["date"]
    assert add(kit / REPORT, page).exit_code == 0  # the file stands for its folder


@pytest.mark.parametrize(
    ("device", "framework", "card"),
    [("cuda", "torch", "NVIDIA H100 80GB HBM3"), ("tpu", "jax", "TPU v5 lite")],  # torchax reaches a TPU through JAX
)
def test_the_card_is_named(device: str, framework: str, card: str, kit: Path) -> None:
    said, bundles = read_kit(kit)
    on_card = said | {"device": device, "cards": {framework: card}}
    for bundle in bundles:
        for adapter in bundle.adapters.values():
            adapter.device, adapter.framework = device, framework
    for _, session, _ in evidence_of(on_card, bundles):
        assert {(entry.device, entry.detail) for entry in session.evidence} == {(device, card)}


def test_a_case_that_is_missing(original: Path, page: Path) -> None:
    done = add(original, page)
    assert done.exit_code == 2
    assert "the kit has 3 cases in float32; " in done.stderr
    assert executed(page) == set()


def change_report(kit: Path, **changes: Any) -> None:
    said = json.loads((kit / REPORT).read_text(encoding="utf-8"))
    (kit / REPORT).write_text(json.dumps(said | changes), encoding="utf-8")


def of_another_kit(kit: Path) -> None:
    part = kit / "bundle-float32"
    bundle = read_bundle(part)
    write_bundle(part, replace(bundle, environment=bundle.environment | {"python": "3.12.0"}), truths=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kit: change_report(kit, verdict="AGREE on everything"), "was edited or damaged"),
        (lambda kit: change_report(kit, device="cuda"), "was edited or damaged"),
        (lambda kit: change_report(kit, format=2), "has format 2, this lsce reads format 1"),
        (lambda kit: (kit / REPORT).write_text("{", encoding="utf-8"), "is not what `lsce-parity kit` writes"),
        (lambda kit: (kit / REPORT).write_text("[]", encoding="utf-8"), "is not what `lsce-parity kit` writes"),
        (lambda kit: (kit / REPORT).unlink(), "there is no kit"),
        (lambda kit: flip(kit / "bundle-float32" / ARRAYS, -1, 0), "does not fit its SHA-256"),
        (lambda kit: (kit / "bundle-bfloat16" / MANIFEST).unlink(), "no bundle can be read in"),
        (of_another_kit, "is of another kit"),
    ],
)
def test_a_kit_that_was_changed(kit: Path, page: Path, change: Callable[[Path], Any], message: str) -> None:
    change(kit)
    done = add(kit, page)
    assert done.exit_code == 2
    assert message in done.stderr
    assert executed(page) == set()


def test_another_version(kit: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "installed_versions", lambda names: {"lsce": "9.9"})
    done = add(kit, page)
    assert done.exit_code == 2
    assert "this is lsce 9.9" in done.stderr


def test_a_truth_that_is_not_ours(kit: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another definition the same results are wrong."""
    monkeypatch.setattr(oracle, "find_convention", lambda name: NON_TARGET)
    done = add(kit, page)
    assert "float32: not added: torch-fused, wrong in " in done.stdout
    assert executed(page) == set()


def test_a_case_that_is_not_ours(kit: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(name: str, dtype: str) -> Case:
        return replace(make_any_case(name, dtype), smoothing=0.25)

    monkeypatch.setattr(replays, "make_any_case", other)
    done = add(kit, page)
    assert done.exit_code == 2
    assert "stale: this checkout makes case 'uniform_mean' in float32 with other smoothing" in done.stderr
    assert executed(page) == set()


def rewrite(kit: Path, dtype: str, change: Callable[[Bundle], None]) -> None:
    """Change a bundle, with hashes that fit."""
    said, _ = read_kit(kit)
    part = study.bundle_folder(kit, dtype)
    bundle = read_bundle(part)
    change(bundle)
    write_bundle(part, bundle, truths=False)
    own = ("command", "format", "bundles", "sha256")
    write_kit(kit, {name: value for name, value in said.items() if name not in own}, said["bundles"])


def off_by_little(bundle: Bundle) -> None:
    results = bundle.adapters["torch-fused"].results
    key = ("uniform_mean", "float32")
    parts = {name: np.float64(np.float32(part * (1 + 2.0**-18))) for name, part in results[key].parts.items()}
    results[key] = type(results[key])(parts["loss"], parts["gradient"], *results[key].dtypes.values())


def with_wide_bounds(bundle: Bundle) -> None:
    off_by_little(bundle)
    adapter = bundle.adapters["torch-fused"]
    adapter.arithmetic = Arithmetic(*(6e4 for _ in range(2)))


def failed(bundle: Bundle) -> None:
    adapter = bundle.adapters["torch-fused"]
    del adapter.results["dominant", "float32"]
    adapter.failures["dominant", "float32"] = str(LossError("out of memory"))


@pytest.mark.parametrize("change", [off_by_little, with_wide_bounds, failed])
def test_results_that_are_wrong_are_not_added(kit: Path, page: Path, change: Callable[[Bundle], None]) -> None:
    """Whatever bounds the kit has: those of today count."""
    rewrite(kit, "float32", change)
    done = add(kit, page)
    assert done.exit_code == 0, done.output
    assert "float32: not added: torch-fused, wrong in 1 of 3 cases, as " in done.stdout
    assert {entry.dtype for entry in executed(page)} == {"bfloat16"}


def test_a_kit_of_nothing(kit: Path) -> None:
    said, _ = read_kit(kit)
    write_kit(kit, {name: said[name] for name in ("environment", "date", "commit", "device", "cards")}, [])
    with pytest.raises(KitError, match="has no results"):
        read_kit(kit)
