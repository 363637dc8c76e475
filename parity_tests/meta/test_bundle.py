"""Bundles keep every bit, and are refused where they cannot be recorded."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lsce_spec import NON_TARGET
from parity_tests.losses.adapters import operands_of
from parity_tests.losses.registry import FaultyAdapter, make_adapter
from parity_tests.meta.bundles import run
from parity_tests.studies.bundle import (
    case_to_arrays,
    differing,
    read_bundle,
    record,
    write_bundle,
)
from parity_tests.studies.replays import replay
from parity_tests.studies.sealed_folders import ARRAYS, RecordingError
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


@pytest.mark.parametrize(
    "names", [["ties", "everything", "no_rows", "wide"], ["linear_sum", "linear_master_weight_mean"]]
)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_a_bundle_without_truths_reads_as_any_other(names: list[str], dtype: str, tmp_path: Path) -> None:
    names = [name for name in names if name != "wide" or dtype == "bfloat16"]
    adapters = [make_adapter(name) for name in ("torch-fused", "torch-linear-chunked", "mutant:other_off")]
    written = record(adapters, make_cases(names, [dtype]))
    sizes, bundles = [], []
    for truths in (True, False):
        folder = tmp_path / str(truths)
        write_bundle(folder, written, truths=truths)
        sizes.append((folder / ARRAYS).stat().st_size)
        bundles.append(read_bundle(folder))
    assert sizes[1] < (0.75 if dtype == "float64" else 0.5) * sizes[0]
    for whole, without in zip(bundles[0].records, bundles[1].records, strict=True):
        assert not differing(case_to_arrays(whole.case)[1], case_to_arrays(without.case)[1])
        assert not differing(truth_to_arrays(whole.truth), truth_to_arrays(without.truth))
        for name, adapter in bundles[0].adapters.items():
            key, other = (whole.case.name, dtype), bundles[1].adapters[name]
            assert (key in adapter.results) == (key in other.results)
            if key in adapter.results:
                assert adapter.results[key].dtypes == other.results[key].dtypes
                assert not differing(adapter.results[key].parts, other.results[key].parts)


# What cannot be recorded.


def test_what_cannot_be_recorded_is_an_error(tmp_path: Path) -> None:
    case = make_case("ties", "float32")
    with pytest.raises(RecordingError, match="no case to record"):
        write_bundle(tmp_path / "bundle", record([], []))
    with pytest.raises(RecordingError, match="two cases have the same name and dtype"):
        write_bundle(tmp_path / "bundle", record([], [case, case]))
    for options in ({"convention": NON_TARGET}, {"z_loss": np.inf}):
        with pytest.raises(RecordingError, match="option of case 'ties' cannot be written as JSON"):
            case_to_arrays(replace(case, options=options))
    sequential = FaultyAdapter()
    sequential.arithmetic = Arithmetic(depth=lambda length: length)
    with pytest.raises(RecordingError, match="numpy has a depth of its own"):
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
