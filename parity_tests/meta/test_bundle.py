"""Bundles keep every bit, cannot be read once a bit has changed, and are refused where they cannot be recorded."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from lsce_spec import NON_TARGET
from parity_tests.losses.adapters import operands_of
from parity_tests.losses.registry import FaultyAdapter, make_adapter
from parity_tests.meta.bundles import flip, run
from parity_tests.studies.bundle import (
    ARRAYS,
    MANIFEST,
    BundleError,
    case_to_arrays,
    differing,
    read_bundle,
    record,
    write_bundle,
)
from parity_tests.studies.replays import replay
from parity_tests.studies.survey import make_cases
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.cases import Case, make_case
from parity_tests.truth.linear_cases import all_case_names
from parity_tests.truth.precision import DTYPES, as_dtype
from parity_tests.truth.stored import truth_to_arrays

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


def test_a_linear_adapter_changes_nothing_of_a_dense_bundle(tmp_path: Path) -> None:
    write_bundle(tmp_path, record([make_adapter("torch-linear-chunked")], make_cases(["ties"], ["float16"])))
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["format"] == 1
    assert set(manifest["adapters"]["torch-linear-chunked"]["arithmetic"]) == {"exp", "log1p", "tanh"}


@pytest.mark.parametrize(
    "names", [["ties", "everything", "no_rows", "wide"], ["linear_sum", "linear_master_weight_mean"]]
)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_a_compact_bundle_reads_as_any_other(names: list[str], dtype: str, tmp_path: Path) -> None:
    names = [name for name in names if name != "wide" or dtype == "bfloat16"]
    adapters = [make_adapter(name) for name in ("torch-fused", "torch-linear-chunked", "mutant:other_off")]
    written = record(adapters, make_cases(names, [dtype]))
    sizes, bundles = [], []
    for compact in (False, True):
        folder = tmp_path / str(compact)
        write_bundle(folder, written, compact=compact)
        sizes.append((folder / ARRAYS).stat().st_size)
        bundles.append(read_bundle(folder))
    assert sizes[1] < (0.75 if dtype == "float64" else 0.5) * sizes[0]
    for whole, compact in zip(bundles[0].records, bundles[1].records, strict=True):
        assert not differing(case_to_arrays(whole.case)[1], case_to_arrays(compact.case)[1])
        assert not differing(truth_to_arrays(whole.truth), truth_to_arrays(compact.truth))
        for name, adapter in bundles[0].adapters.items():
            key, other = (whole.case.name, dtype), bundles[1].adapters[name]
            assert (key in adapter.results) == (key in other.results)
            if key in adapter.results:
                assert adapter.results[key].dtypes == other.results[key].dtypes
                assert not differing(adapter.results[key].parts, other.results[key].parts)


# Any changed bit is found.


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
    (lambda manifest, arrays: manifest.update(format=4), "format 4, this lsce reads formats 1, 2, 3. Install a newer"),
    (lambda manifest, arrays: manifest.update(format=0), "format 0, this lsce reads formats 1, 2, 3. Record"),
    (lambda manifest, arrays: manifest.pop("format"), "format None, this lsce reads"),
    (lambda manifest, arrays: arrays.pop("cases/0/labels"), "cases/0/labels in one of them only"),
    (lambda manifest, arrays: arrays.update(more=np.zeros(1)), "more in one of them only"),
    (lambda manifest, arrays: arrays.update({"cases/0/labels": np.zeros((6, 1), np.int64)}),
     r"cases/0/labels of .* is int64 \[6, 1\], manifest.json says int64 \[6\]"),
    (lambda manifest, arrays: arrays.update({"cases/0/labels": np.zeros(6, np.int32)}), r"is int32 \[6\]"),
    (lambda manifest, arrays: arrays.update({"cases/0/logits": np.zeros((6, 16), np.float16)}), "says bfloat16"),
    (lambda manifest, arrays: manifest.pop("environment"), "does not describe a bundle: environment is missing"),
    (lambda manifest, arrays: manifest.update(environment={}), "bundle: environment.python is missing"),
    (lambda manifest, arrays: manifest.update(adapters=[]), r"adapters must be an object, got a list"),
    (lambda manifest, arrays: manifest["adapters"]["numpy"]["arithmetic"].update(exp="3"),
     "arithmetic.exp must be an integer or a number, got '3'"),
    (lambda manifest, arrays: manifest["adapters"]["numpy"]["arithmetic"].update(exp=1e300),
     "arithmetic.exp must be from 0 to 65536, got 1e"),
    (lambda manifest, arrays: manifest["adapters"]["numpy"].update(device="abacus"), "numpy ran on 'abacus'"),
    (lambda manifest, arrays: manifest["adapters"]["numpy"]["arithmetic"].update(depth="deep"), "does not know"),
    (lambda manifest, arrays: manifest["cases"][0].update(dtype="float8"), "has the dtype 'float8'"),
    (lambda manifest, arrays: manifest["cases"][0].update(axis=True), r"cases\[0\].axis must be an integer"),
    (lambda manifest, arrays: manifest["cases"][0].update(axis=9), "does not describe a bundle: AxisError"),
    (lambda manifest, arrays: manifest["cases"].append(manifest["cases"][0]), "two cases have the same name"),
    (lambda manifest, arrays: manifest.update(cases=[]), "it has no case"),
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
    with pytest.raises(BundleError, match="numpy has a depth of its own"):
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
