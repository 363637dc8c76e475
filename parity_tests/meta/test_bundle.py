"""Bundles keep every bit, refuse to be read once one is changed, and are replayed with one framework alone."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from safetensors.numpy import load, save
from typer.testing import CliRunner
from typer.testing import Result as CommandResult

from lsce_spec import NON_TARGET
from parity_tests.commands.record import record as record_command
from parity_tests.commands.replay import replay as replay_command
from parity_tests.evidence.ledger import Evidence
from parity_tests.losses import registry
from parity_tests.losses.adapters import operands_of
from parity_tests.losses.registry import FaultyAdapter, make_adapter
from parity_tests.studies import replays
from parity_tests.studies.bundle import (
    ARRAYS,
    MANIFEST,
    Bundle,
    BundleError,
    RecordedAdapter,
    case_to_arrays,
    differing,
    read_bundle,
    record,
    truth_to_arrays,
    write_bundle,
)
from parity_tests.studies.replays import replay
from parity_tests.studies.survey import make_cases
from parity_tests.truth import oracle
from parity_tests.truth.bounds import Arithmetic
from parity_tests.truth.cases import Case, make_case
from parity_tests.truth.linear_cases import SOME, all_case_names, make_linear_case
from parity_tests.truth.oracle import Exact
from parity_tests.truth.precision import DTYPES, as_dtype

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = ("cpu", "cpu_float64")
RECORDED = {"jax-fused", "jax-reference", "torch-fused", "torch-reference"}

app = typer.Typer()
app.command()(record_command)
app.command()(replay_command)


def run(*arguments: str | Path) -> CommandResult:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two adapters and three cases, made without a framework."""
    folder = tmp_path_factory.mktemp("bundles") / "original"
    cases = make_cases(["ties", "minus_infinity", "axis_in_the_middle"], ["bfloat16"])
    write_bundle(folder, record([FaultyAdapter(), make_adapter("oracle")], cases))
    return folder


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


# The golden bundles.


@pytest.mark.parametrize("name", FOLDERS)
def test_golden_bundles_replay_with_both_frameworks(name: str) -> None:
    bundle = read_bundle(GOLDEN / name)
    assert set(bundle.adapters) == RECORDED
    found = replay(bundle, [make_adapter("jax-fused"), make_adapter("torch-fused")])
    assert found.agrees, [str(line) for line in found.lines() if not line.agrees]
    # Two adapters against the truth and four recorded ones, and these against the truth; nobody was left out anywhere.
    assert [line.cases for line in found.lines()] == [len(bundle.cases)] * 14


@pytest.mark.parametrize("name", FOLDERS)
def test_a_dense_bundle_is_written_as_it_always_was(name: str, tmp_path: Path) -> None:
    write_bundle(tmp_path, read_bundle(GOLDEN / name))
    for file in (MANIFEST, ARRAYS):
        assert (tmp_path / file).read_bytes() == (GOLDEN / name / file).read_bytes()


def test_golden_bundles_are_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*")) < 2**19


# As if a module was not installed; and that it did stay out.
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


# Every bit is kept.


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_keeps_every_bit(dtype: str, tmp_path: Path) -> None:
    before = record([FaultyAdapter()], make_cases([name for name in all_case_names() if name != "wide"], [dtype]))
    write_bundle(tmp_path, before)
    after = read_bundle(tmp_path)
    assert after.environment == before.environment
    for old, new in zip(before.records, after.records, strict=True):
        (entry, arrays), (new_entry, new_arrays) = case_to_arrays(old.case), case_to_arrays(new.case)
        assert entry == new_entry
        assert not differing(arrays, new_arrays)
        assert not differing(truth_to_arrays(old.truth), truth_to_arrays(new.truth))
        # What the adapters hand to a framework.
        (operands, options), (new_operands, new_options) = operands_of(old.case), operands_of(new.case)
        assert options == new_options
        assert not differing(operands, new_operands)
        key = (old.case.name, dtype)
        result, new_result = (bundle.adapters["numpy"].results[key] for bundle in (before, after))
        assert not differing(result.parts, new_result.parts)
        assert result.dtypes == new_result.dtypes
    assert before.adapters["numpy"].arithmetic == after.adapters["numpy"].arithmetic


def test_differing_sees_bits_dtypes_and_shapes() -> None:
    zero = np.zeros(2)
    assert differing({"a": zero}, {"a": zero}) == []
    assert differing({"a": zero}, {"a": -zero}) == ["a"]
    assert differing({"a": zero}, {"a": zero.astype(np.int64)}) == ["a"]
    assert differing({"a": zero}, {"a": zero[None]}) == ["a"]
    assert differing({"a": zero}, {"b": zero}) == ["a", "b"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_all_numbers_of_a_dtype_survive(dtype: str, tmp_path: Path) -> None:
    """Every NaN that a float64 can turn into, infinities, subnormals and both zeros."""
    every = np.arange(2**16, dtype=np.uint16).view(as_dtype(np.zeros(1), dtype).dtype)
    with np.errstate(invalid="ignore"):  # signalling NaNs become quiet, as in every conversion
        logits = every.astype(np.float64)[None]
    case = Case("every number", dtype, logits, np.array([0]), where=np.array([False]))
    given = operands_of(case)[0]["logits"]
    write_bundle(tmp_path, record([], [case]))
    kept = operands_of(read_bundle(tmp_path).cases[0])[0]["logits"]
    assert np.array_equal(given.view(np.uint16), kept.view(np.uint16))
    finite = np.isfinite(logits)
    assert np.array_equal(every[None].view(np.uint16)[finite], kept.view(np.uint16)[finite])


def test_a_case_may_be_of_any_name(tmp_path: Path) -> None:
    found = replace(make_case("everything", "float32"), name="hunted: a/b\n#1")
    write_bundle(tmp_path, record([FaultyAdapter()], [found]))
    bundle = read_bundle(tmp_path)
    assert bundle.cases[0].name == found.name
    assert replay(bundle, [FaultyAdapter()]).agrees


# Linear cases.


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a linear adapter, with and without a bias."""
    folder = tmp_path_factory.mktemp("bundles") / "linear"
    write_bundle(
        folder, record([make_adapter("torch-linear-chunked")], make_cases([*SOME, "linear_mean"], ["float16"]))
    )
    return folder


def test_a_linear_bundle_is_replayed(linear: Path) -> None:
    assert json.loads((linear / MANIFEST).read_text())["format"] == 2
    bundle = read_bundle(linear)
    ours = make_adapter("torch-linear-chunked")
    assert bundle.adapters[ours.name].arithmetic == ours.arithmetic
    found = replay(bundle, [ours, FaultyAdapter()])
    assert found.agrees, [str(line) for line in found.lines() if not line.agrees]
    assert [line.cases for line in found.lines()] == [len(bundle.cases)] * 5
    wrong = replay(bundle, [FaultyAdapter("linear_weight_of_last_chunk")])
    assert [line.here for line in wrong.lines() if not line.agrees] == ["mutant:linear_weight_of_last_chunk"] * 2


def test_a_linear_adapter_changes_nothing_of_a_dense_bundle(tmp_path: Path) -> None:
    write_bundle(tmp_path, record([make_adapter("torch-linear-chunked")], make_cases(["ties"], ["float16"])))
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["format"] == 1
    assert set(manifest["adapters"]["torch-linear-chunked"]["arithmetic"]) == {"exp", "log1p", "tanh"}


def test_a_flipped_bit_of_a_linear_bundle_is_found(linear: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(linear, tmp_path / "copy"))
    for file in (ARRAYS, MANIFEST):
        size = (copy / file).stat().st_size
        for byte in range(0, size, size // 50):
            flip(copy / file, byte, byte % 8)
            with pytest.raises(BundleError):
                read_bundle(copy)
            flip(copy / file, byte, byte % 8)
    read_bundle(copy)


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_a_linear_case_that_is_made_otherwise_is_stale(
    name: str, linear: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(case: str, dtype: str) -> Case:
        made = make_linear_case(case, dtype)
        values = getattr(made, name)
        return made if values is None else replace(made, **{name: np.zeros_like(values)})

    monkeypatch.setattr(replays, "make_any_case", other)
    with pytest.raises(BundleError, match=f"makes case 'linear_sum' in float16 with other {name}"):
        replay(read_bundle(linear), [])


def test_a_linear_truth_that_is_off_by_one_bit_is_stale(linear: Path) -> None:
    bundle = read_bundle(linear)
    first = bundle.records[0]
    assert isinstance(first.truth, oracle.LinearTruth)
    weight = replace(first.truth.weight, low=np.nextafter(first.truth.weight.low, 1))
    with pytest.raises(BundleError, match="stale: the definition"):
        replay(replace(bundle, records=[replace(first, truth=replace(first.truth, weight=weight))]), [])


# Any changed bit is found.


def flip(path: Path, byte: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("name", [ARRAYS, MANIFEST])
def test_any_flipped_bit_is_an_error(name: str, copy: Path) -> None:
    data = (copy / name).read_bytes()
    # The whole beginning, where safetensors keeps lengths and offsets, the end, and a sample of the rest.
    for byte in {*range(400), *range(400, len(data), 61), len(data) - 1}:
        flip(copy / name, byte, byte % 8)
        with pytest.raises(BundleError):
            read_bundle(copy)
        flip(copy / name, byte, byte % 8)
    read_bundle(copy)


@pytest.mark.parametrize("name", [ARRAYS, MANIFEST])
def test_a_flipped_bit_ends_with_exit_code_2(name: str, copy: Path) -> None:
    flip(copy / name, (copy / name).stat().st_size // 2, 3)
    done = run("replay", copy, "--adapter", "numpy")
    assert done.exit_code == 2
    assert str(copy / name) in done.stderr


def test_the_changed_array_is_named(copy: Path) -> None:
    arrays = {name: array.copy() for name, array in load((copy / ARRAYS).read_bytes()).items()}
    arrays["results/0/numpy/loss"][2] += 1
    (copy / ARRAYS).write_bytes(save(arrays))
    with pytest.raises(BundleError, match=r"array results/0/numpy/loss of .* was changed"):
        read_bundle(copy)


def test_anything_else_in_the_file_of_arrays_is_found(copy: Path) -> None:
    (copy / ARRAYS).write_bytes(save(load((copy / ARRAYS).read_bytes()), metadata={"note": "harmless"}))
    with pytest.raises(BundleError, match="does not fit its SHA-256"):
        read_bundle(copy)


@pytest.mark.parametrize("edit", [
    lambda text: text + "\n",
    lambda text: text.replace('": ', '":  ', 1),
    lambda text: text.replace('"bfloat16"', '"float16"', 1),
    lambda text: text.replace('"sha256": "', '"sha256": "0', 1),
    lambda text: text.replace(" 0.1\n", " 1e-1\n", 1),
    lambda text: text[:-20],
    lambda text: "",
    lambda text: "[]\n",
    lambda text: "NaN\n",
])  # fmt: skip
def test_an_edited_manifest_is_an_error(edit: Callable[[str], str], copy: Path) -> None:
    path = copy / MANIFEST
    text = path.read_text()
    assert edit(text) != text
    path.write_text(edit(text))
    with pytest.raises(BundleError):
        read_bundle(copy)


# Files that do not belong together, with hashes that fit.


def rewrite(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Change manifest and arrays, and make the hashes of both files fit."""
    manifest = json.loads((folder / MANIFEST).read_text())
    arrays = dict(load((folder / ARRAYS).read_bytes()))
    change(manifest, arrays)
    data = save(arrays)
    (folder / ARRAYS).write_bytes(data)
    del manifest["sha256"]
    manifest["arrays_sha256"] = hashlib.sha256(data).hexdigest()

    def text() -> str:
        return json.dumps(manifest, indent=1, sort_keys=True) + "\n"

    manifest["sha256"] = hashlib.sha256(text().encode()).hexdigest()
    (folder / MANIFEST).write_text(text())


@pytest.mark.parametrize(("change", "message"), [
    (lambda manifest, arrays: manifest.update(format=3), "format 3, this lsce reads formats 1 and 2. Install a newer"),
    (lambda manifest, arrays: manifest.update(format=0), "format 0, this lsce reads formats 1 and 2. Record"),
    (lambda manifest, arrays: manifest.pop("format"), "format None, this lsce reads"),
    (lambda manifest, arrays: arrays.pop("cases/0/labels"), "cases/0/labels in one of them only"),
    (lambda manifest, arrays: arrays.update(more=np.zeros(1)), "more in one of them only"),
    (lambda manifest, arrays: arrays.update({"cases/0/labels": np.zeros((6, 1), np.int64)}),
     r"cases/0/labels of .* is int64 \[6, 1\], manifest.json says int64 \[6\]"),
    (lambda manifest, arrays: arrays.update({"cases/0/labels": np.zeros(6, np.int32)}), r"is int32 \[6\]"),
    (lambda manifest, arrays: arrays.update({"cases/0/logits": np.zeros((6, 16), np.float16)}), "says bfloat16"),
    (lambda manifest, arrays: manifest.pop("environment"), "does not describe a bundle: KeyError"),
    (lambda manifest, arrays: manifest.update(adapters=[]), "does not describe a bundle: AttributeError"),
    (lambda manifest, arrays: (manifest["arrays"].pop("truths/0/bad"), arrays.pop("truths/0/bad")),
     "does not describe a bundle: KeyError"),
    (lambda manifest, arrays: (manifest["arrays"].pop("cases/0/logits"), arrays.pop("cases/0/logits")),
     "does not describe a bundle: TypeError"),
])  # fmt: skip
def test_a_mismatch_is_an_error(change: Callable[..., None], message: str, copy: Path) -> None:
    rewrite(copy, lambda manifest, arrays: None)
    read_bundle(copy)
    rewrite(copy, change)
    with pytest.raises(BundleError, match=message):
        read_bundle(copy)


def test_missing_files_are_errors(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no bundle in"):
        read_bundle(tmp_path)
    (copy / ARRAYS).unlink()
    with pytest.raises(BundleError, match="is not whole"):
        read_bundle(copy)


@pytest.mark.parametrize("name", ["somebody", "mutant:nothing"])
def test_an_adapter_that_is_not_known_here_is_an_error(name: str, original: Path) -> None:
    bundle = read_bundle(original)
    bundle.adapters[name] = RecordedAdapter(name, "numpy", "cpu", Arithmetic())
    with pytest.raises(BundleError, match="adapter that is not known here"):
        replay(bundle, [FaultyAdapter()])


# Stale bundles.


def test_a_case_that_is_made_otherwise_is_stale(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = read_bundle(original)
    for changes in (
        {"logits": lambda case: np.nextafter(case.logits, 0)},
        {"labels": lambda case: case.labels.astype(np.int32)},
        {"options": lambda case: {**case.options, "z_loss": 0.1}},
        {"smoothing": lambda case: 0.25},
    ):
        name = next(iter(changes))

        def other(case: str, dtype: str, changes: Any = changes, name: str = name) -> Case:
            made = make_case(case, dtype)
            values = changes[name](made)
            return replace(made, **{name: np.zeros_like(values) if name == "logits" else values})

        monkeypatch.setattr(replays, "make_any_case", other)
        with pytest.raises(BundleError, match=f"stale: this checkout makes case 'ties' in bfloat16 with other {name}"):
            replay(bundle, [])
    monkeypatch.setattr(replays, "all_case_names", list)
    assert replay(bundle, []).agrees  # a case of no name that is made here stands for itself


def test_another_definition_is_stale(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "find_convention", lambda name: NON_TARGET)
    done = run("replay", original, "--adapter", "numpy")
    assert done.exit_code == 2
    assert "stale: the definition now gives another truth for case 'ties' in bfloat16" in done.stderr


def with_loss(bundle: Bundle, change: Callable[[Exact], Exact]) -> Bundle:
    first = bundle.records[0]
    return replace(bundle, records=[replace(first, truth=replace(first.truth, loss=change(first.truth.loss)))])


def test_a_truth_that_is_off_by_one_bit_is_stale(original: Path) -> None:
    """Also with hashes that fit, in the lower of the two numbers that it is kept as, and in what bounds are made of."""
    bundle = read_bundle(original)
    replay(with_loss(bundle, lambda loss: loss), [])
    for change in (
        lambda loss: replace(loss, high=np.nextafter(loss.high, 0)),
        lambda loss: replace(loss, low=np.nextafter(loss.low, 0)),
    ):
        with pytest.raises(BundleError, match="stale: the definition"):
            replay(with_loss(bundle, change), [])
    first = bundle.records[0]
    truth = replace(first.truth, probabilities=np.nextafter(first.truth.probabilities, 1))
    with pytest.raises(BundleError, match="stale: the definition"):
        replay(replace(bundle, records=[replace(first, truth=truth)]), [])


def test_a_wide_truth_may_differ_by_what_float64_explains() -> None:
    logits = np.random.default_rng(0).integers(-8, 8, (1, oracle.WIDE + 1)) / 4
    bundle = record([], [Case("wide one", "float32", logits, np.array([7]))])
    replay(with_loss(bundle, lambda loss: replace(loss, high=np.nextafter(loss.high, 0))), [])
    with pytest.raises(BundleError, match="stale: the definition"):
        replay(with_loss(bundle, lambda loss: replace(loss, high=loss.high * (1 + 2**-30))), [])


# Verdicts.


def test_a_wrong_result_that_was_recorded_is_rejected(tmp_path: Path) -> None:
    folder, json_file = tmp_path / "bundle", tmp_path / "replay.json"
    options = ("--adapter", "mutant:other_off", "--adapter", "oracle", "--case", "uniform_*", "--dtype", "float32")
    recorded = run("record", folder, *options)
    assert recorded.exit_code == 1, recorded.output
    assert "recorded mutant:other_off against the truth, uniform_" in recorded.stdout
    assert "oracle against" not in recorded.stdout
    replayed = run("replay", folder, "--adapter", "numpy", "--json", json_file)
    assert replayed.exit_code == 1, replayed.output
    assert "recorded mutant:other_off against the truth, uniform_" in replayed.stdout
    assert "numpy against recorded mutant:other_off" in replayed.stdout
    assert "DISAGREE: 3 recorded cases" in replayed.stdout
    content = json.loads(json_file.read_text())
    assert not content["agrees"]
    evidence = {each["adapter"]: each["kind"] for each in content["evidence"]}
    assert evidence == {"numpy": "executed", "oracle": "replayed"}


def test_a_wrong_adapter_here_is_rejected(original: Path) -> None:
    done = run("replay", original, "--adapter", "mutant:gradient_sign")
    assert done.exit_code == 1
    assert "mutant:gradient_sign against the truth" in done.stdout
    assert "mutant:gradient_sign against recorded oracle" in done.stdout
    found = replay(read_bundle(original), [FaultyAdapter("gradient_sign")])
    # What was recorded agrees with the truth, but not with what ran here.
    assert [line.here for line in found.lines() if not line.agrees] == ["mutant:gradient_sign"] * 3
    assert found.evidence() == []


def test_evidence_is_by_dtype_and_device() -> None:
    bundle = record([FaultyAdapter()], make_cases(["ties"], ["float32", "float16"]))
    recorded = bundle.adapters["numpy"]
    recorded.device = "cuda"
    key = ("ties", "float16")
    recorded.results[key] = replace(recorded.results[key], gradient=-recorded.results[key].gradient)
    detail = f"numpy {np.__version__}"
    assert replay(bundle, [FaultyAdapter()]).evidence() == [
        Evidence("numpy", "cpu", "float32", "executed"),
        Evidence("numpy", "cuda", "float32", "replayed", detail),
        Evidence("numpy", "cpu", "float16", "executed"),
    ]
    # Nothing ran here, so nothing was replayed.
    assert replay(bundle, []).evidence() == []


class Failing(FaultyAdapter):
    """Raises."""

    def __call__(self, case: Case) -> Any:
        """Raise."""
        raise RuntimeError("out of memory")


class Lacking(FaultyAdapter):
    """Lacks what every case needs."""

    def unsupported(self, case: Case) -> str | None:
        """Return what it lacks."""
        return "has no ties"


def test_failures_are_recorded_and_count(tmp_path: Path) -> None:
    write_bundle(tmp_path, record([Failing()], make_cases(["ties"], ["float32"])))
    found = replay(read_bundle(tmp_path), [make_adapter("oracle")])
    wrong = [line for line in found.lines() if not line.agrees]
    expected = "recorded numpy against the truth, ties in float32: LossError: when it was recorded: "
    assert [str(line) for line in wrong] == [expected + "RuntimeError: out of memory"]
    assert wrong[0].share == np.inf


def test_what_was_not_called_is_no_failure_and_no_evidence(
    tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(tmp_path, record([Lacking()], make_cases(["ties"], ["float32"])))
    found = replay(read_bundle(tmp_path), [make_adapter("oracle")])
    assert found.agrees
    assert [line.cases for line in found.lines()] == [1, 0, 0]
    assert [each.adapter for each in found.evidence()] == ["oracle"]
    monkeypatch.setattr(registry, "FaultyAdapter", Lacking)
    done = run("replay", original, "--adapter", "numpy")
    assert done.exit_code == 2
    assert "no recorded case can be asked of numpy" in done.stderr


# What cannot be recorded.


def test_what_cannot_be_recorded_is_an_error(tmp_path: Path) -> None:
    case = make_case("ties", "float32")
    with pytest.raises(BundleError, match="no case to record"):
        write_bundle(tmp_path / "bundle", record([], []))
    with pytest.raises(BundleError, match="two cases have the same name and dtype"):
        write_bundle(tmp_path / "bundle", record([], [case, case]))
    for options in ({"convention": NON_TARGET}, {"z_loss": np.inf}):
        with pytest.raises(BundleError, match="option of case 'ties' cannot be written as JSON"):
            case_to_arrays(replace(case, options=options))
    sequential = FaultyAdapter()
    sequential.arithmetic = Arithmetic(depth=lambda length: length)
    with pytest.raises(BundleError, match="numpy sums in an order of its own"):
        record([sequential], [case])
    assert not (tmp_path / "bundle").exists()


def test_record_writes_over_a_bundle_only_when_forced(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    options = ("--adapter", "numpy", "--case", "ties", "--dtype", "float32")
    assert run("record", folder, *options).exit_code == 0
    again = run("record", folder, *options)
    assert (again.exit_code, "pass --force" in again.stderr) == (2, True)
    assert run("record", folder, *options[:-1], "float16", "--force").exit_code == 0
    assert [case.dtype for case in read_bundle(folder).cases] == ["float16"]
    assert run("replay", folder, "--adapter", "oracle").exit_code == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("all of it")
    for path, message in ((other, "is not empty and holds no bundle"), (other / "thesis.txt", "is a file")):
        done = run("record", path, *options, "--force")
        assert (done.exit_code, message in done.stderr) == (2, True), done.stderr
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(("arguments", "message"), [
    (("replay", "nowhere"), "there is no bundle in nowhere"),
    (("replay", GOLDEN / "cpu_float64", "--adapter", "nobody"), "there is no adapter 'nobody'"),
    (("replay", GOLDEN / "cpu_float64", "--device", "abacus"), "there is no device 'abacus'"),
    (("replay", GOLDEN / "cpu_float64", "--device", "tpu"), "finds no tpu device on this machine"),
    (("replay", GOLDEN / "cpu_float64", "--adapter", "torch-fused", "--device", "tpu"), "torch finds no tpu device"),
    (("record", "new", "--case", "no such case"), "no case is called no such case"),
    (("record", "new", "--dtype", "float8"), "there is no dtype 'float8'"),
    (("record", "new", "--adapter", "nobody"), "there is no adapter 'nobody'"),
    (("record", "new", "--device", "tpu", "--adapter", "torch-fused"), "torch finds no tpu device"),
])  # fmt: skip
def test_what_cannot_run(
    arguments: tuple[str | Path, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
