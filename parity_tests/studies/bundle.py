"""Bundles: results of adapters on one machine, recorded for comparison with results on another.

A bundle is a folder of `sealed_folders`. The arrays are the exact bits of the inputs, of the truth and of every result,
in the dtype in which it came; a bundle without truths has a third of the size, and more for the reader to compute. The
manifest has everything else: names, options, dtypes, versions and devices.

What is stale, or of an unknown adapter, is found by `parity_tests.studies.replays`. The numbers of an adapter's
`Arithmetic` are recorded; its `depth` is a function, and must be one of `DEPTHS`.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from parity_tests.evidence.environment import describe_environment
from parity_tests.evidence.ledger import DEVICES
from parity_tests.json_files import NUMBER, Optional, check_form
from parity_tests.losses.adapters import Adapter, LossError
from parity_tests.studies.concurrent_calls import Calls, call_each
from parity_tests.studies.sealed_folders import Arrays, RecordingError, by_folder, read_sealed, write_sealed
from parity_tests.studies.verdicts import examine
from parity_tests.truth.arithmetic import DEPTHS, ERRORS, NARROW, Arithmetic, name_of_depth
from parity_tests.truth.cases import Case, LinearCase
from parity_tests.truth.comparison import AnyResult, make_result
from parity_tests.truth.linear_cases import with_logits
from parity_tests.truth.oracle import Truth, solve
from parity_tests.truth.precision import DTYPES, as_dtype, compute_dtype
from parity_tests.truth.stored import truth_from_arrays, truth_to_arrays

MANIFEST = "manifest.json"

_LAYER = ("hidden", "weight", "bias")
_CASE_ARRAYS = ("logits", "labels", "smoothing", "where", "class_weight", "class_mask", "prior", "upstream")

Key = tuple[str, str]

# The form of a manifest; what else it must be is checked as it is read.
_PLAIN = (None, bool, int, float, str)
ENVIRONMENT_FORM = {
    "python": str,
    "platform": str,
    "versions": {str: str},
    "devices": {str: [str]},
    "flags": {str: _PLAIN},
}
_ADAPTER = {"framework": str, "device": str, "arithmetic": dict}
CASE_FORM = {
    "name": str,
    "dtype": str,
    "axis": int,
    "options": {str: _PLAIN},
    "smoothing": (None, *NUMBER),
    "weight_dtype": Optional(str),
    "chunk_size": Optional((None, int)),
}
_FORM = {
    "environment": ENVIRONMENT_FORM,
    "adapters": {str: _ADAPTER},
    "cases": [{**CASE_FORM, "results": {str: {str: str}}, "failures": {str: str}}],
}
_ARITHMETIC = {**dict.fromkeys(ERRORS, NUMBER), "matmul_bits": int, "depth": str, "narrow": [str]}
# Errors beyond it, in units of the roundoff, are those of no device; they would let every result pass.
_ROUGHEST = 2.0**16


@dataclass(frozen=True)
class Record:
    """A case and the truth about it."""

    case: Case
    truth: Truth


@dataclass
class RecordedAdapter:
    """An adapter that returns recorded results.

    Args:
        name, framework, device, arithmetic: those of the adapter that was recorded.
        results: its results, by name and dtype of the case.
        failures: the reasons of its failures, in the same way. It could not handle a case that is in neither.
    """

    name: str
    framework: str
    device: str
    arithmetic: Arithmetic
    results: dict[Key, AnyResult] = field(default_factory=dict)
    failures: dict[Key, str] = field(default_factory=dict)

    def unsupported(self, case: Case) -> str | None:
        """Return why nothing is recorded for a case, or None."""
        known = _key(case) in self.results or _key(case) in self.failures
        return None if known else "was not called when the bundle was recorded"

    def __call__(self, case: Case) -> AnyResult:
        """Return the recorded result of a case."""
        if _key(case) in self.failures:
            raise LossError(f"when it was recorded: {self.failures[_key(case)]}")
        return self.results[_key(case)]


@dataclass(frozen=True)
class Bundle:
    """Cases, their truth, the results of adapters, and the environment.

    Args:
        records: cases and truths; no two have the same name and dtype.
        adapters: the recorded adapters by name; may be empty.
        environment: the result of `describe_environment` when the bundle was recorded.
    """

    records: list[Record]
    adapters: dict[str, RecordedAdapter]
    environment: dict[str, Any]

    @property
    def cases(self) -> list[Case]:
        """The cases of the records."""
        return [each.case for each in self.records]


def record(
    adapters: Sequence[Adapter],
    cases: Iterable[Case],
    takes: Callable[[Adapter, Case], bool] = lambda adapter, case: True,
    track: Callable[[Iterator[Calls]], Iterable[Calls]] = iter,
) -> Bundle:
    """Run every adapter on every case. An exception of an adapter is recorded as its failure.

    Args:
        adapters: the adapters.
        cases: the cases.
        takes: returns whether an adapter is called in a case.
        track: shows the progress of an iterator that yields once for each case.

    Raises:
        RecordingError: the bounds of an adapter cannot be recorded.
    """
    recorded = {}
    for adapter in adapters:
        if name_of_depth(adapter.arithmetic) is None:
            raise RecordingError(f"{adapter.name} has a depth of its own; only those of DEPTHS can be recorded.")
        recorded[adapter.name] = RecordedAdapter(adapter.name, adapter.framework, adapter.device, adapter.arithmetic)
    records = []
    for case, calls in track(call_each(adapters, cases, takes)):
        truth = solve(case)
        records.append(Record(case, truth))
        for adapter in (each for each in adapters if takes(each, case)):
            outcome = examine(adapter, case, truth, calls.get(adapter.name))
            if outcome.result is not None:
                recorded[adapter.name].results[_key(case)] = outcome.result
            elif outcome.status == "failed":
                recorded[adapter.name].failures[_key(case)] = str(outcome.reason)
    return Bundle(records, recorded, describe_environment())


# Case and truth <-> JSON and arrays.


def case_to_arrays(case: Case) -> tuple[dict[str, Any], Arrays]:
    """Return a case as JSON values, and as arrays of the bits that every framework gets.

    Raises:
        RecordingError: an option is not a number, string, boolean or None.
    """
    entry = {"name": case.name, "dtype": case.dtype, "axis": case.axis, "options": case.options, "smoothing": None}
    dtypes, names = {"logits": case.dtype, "labels": case.dtype}, list(_CASE_ARRAYS)
    if isinstance(case, LinearCase):
        entry |= {"weight_dtype": case.weight_dtype, "chunk_size": case.chunk_size}
        dtypes |= {"hidden": case.dtype, "weight": case.weight_dtype, "bias": case.weight_dtype}
        names = [*_LAYER, *_CASE_ARRAYS[1:]]  # the logits are made from these
    try:
        json.dumps(entry, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RecordingError(f"an option of case {case.name!r} cannot be written as JSON: {error}.") from error
    arrays = {}
    for name in names:
        values = getattr(case, name)
        if name == "smoothing" and isinstance(values, float):
            entry["smoothing"] = float(values)
        elif values is not None:
            values = np.asarray(values)
            dtype = dtypes.get(name, compute_dtype(case.dtype))
            arrays[name] = as_dtype(values, dtype) if values.dtype.kind == "f" else values
    return entry, arrays


def case_from_arrays(entry: dict[str, Any], arrays: Arrays) -> Case:
    """Return the case that `case_to_arrays` took apart; its truth tells whether its options make sense.

    Raises:
        ValueError: its arrays do not fit each other, or a dtype is not known.
    """
    plain = ("name", "dtype", "axis", "options", "smoothing", "weight_dtype", "chunk_size")
    values: dict[str, Any] = {name: entry[name] for name in plain if name in entry}
    for name, array in arrays.items():
        values[name] = array.astype(np.float64) if _is_floating(array) else array
    case = with_logits(LinearCase(**values, logits=np.zeros(()))) if "hidden" in arrays else Case(**values)
    _check_case(case)
    return case


def _check_case(case: Case) -> None:
    dtypes = [case.dtype, case.weight_dtype] if isinstance(case, LinearCase) else [case.dtype]
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"case {case.name!r} has the dtype {dtype!r}; the dtypes are {', '.join(DTYPES)}")
    kinds = {"labels": "iuf", "where": "b", "class_mask": "b"}
    for name in (*_LAYER, *_CASE_ARRAYS):
        values = getattr(case, name, None)
        if values is not None and np.asarray(values).dtype.kind not in kinds.get(name, "f"):
            raise ValueError(f"case {case.name!r} has {name} of dtype {values.dtype}")
    case.rows()


def differing(first: Arrays, second: Arrays) -> list[str]:
    """Return the names of arrays that are in one only, or differ in dtype, shape or bits."""

    def bits(array: NDArray[Any] | None) -> tuple[Any, ...]:
        return () if array is None else (array.dtype.name, array.shape, array.tobytes())

    return sorted(name for name in first.keys() | second.keys() if bits(first.get(name)) != bits(second.get(name)))


def _key(case: Case) -> Key:
    return case.name, case.dtype


def _is_floating(array: NDArray[Any]) -> bool:
    return array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16


def write_bundle(folder: Path, bundle: Bundle, *, truths: bool = True) -> None:
    """Write a bundle to a folder, replacing one that is there.

    Args:
        folder: the folder.
        bundle: the bundle.
        truths: whether to write the truths, which are computed as a bundle without them is read.

    Raises:
        RecordingError: there is no case, two are of the same name and dtype, or one has an option that is not plain.
    """
    if len({_key(case) for case in bundle.cases}) != len(bundle.cases):
        raise RecordingError("two cases have the same name and dtype; give each a name of its own.")
    if not bundle.records:
        raise RecordingError("there is no case to record.")
    write_sealed(folder, MANIFEST, *_take_apart(bundle, truths))


def _take_apart(bundle: Bundle, truths: bool) -> tuple[dict[str, Any], Arrays]:
    cases: list[dict[str, Any]] = []
    arrays: Arrays = {}
    for i, each in enumerate(bundle.records):
        entry, inputs = case_to_arrays(each.case)
        arrays |= {f"cases/{i}/{name}": array for name, array in inputs.items()}
        if truths:
            arrays |= {f"truths/{i}/{name}": array for name, array in truth_to_arrays(each.truth).items()}
        entry |= {"results": {}, "failures": {}}
        for name, adapter in bundle.adapters.items():
            result = adapter.results.get(_key(each.case))
            if result is not None:
                entry["results"][name] = result.dtypes
                arrays |= {f"results/{i}/{name}/{part}": array for part, array in result_to_arrays(result).items()}
            elif _key(each.case) in adapter.failures:
                entry["failures"][name] = adapter.failures[_key(each.case)]
        cases.append(entry)
    adapters = {
        name: {
            "framework": adapter.framework,
            "device": adapter.device,
            "arithmetic": arithmetic_to_json(adapter.arithmetic),
        }
        for name, adapter in bundle.adapters.items()
    }
    return {"environment": bundle.environment, "adapters": adapters, "cases": cases}, arrays


def result_to_arrays(result: AnyResult) -> Arrays:
    """Return the parts of a result in the dtypes in which they came; those of other dtypes than ours in float64."""
    return {
        part: as_dtype(np.asarray(array), dtype) if (dtype := result.dtypes[part]) in DTYPES else np.asarray(array)
        for part, array in result.parts.items()
    }


def arithmetic_to_json(arithmetic: Arithmetic) -> dict[str, Any]:
    """Return an arithmetic whose depth is one of `DEPTHS` as JSON values."""
    given = {name: getattr(arithmetic, name) for name in (*ERRORS, "matmul_bits")}
    return {**given, "depth": name_of_depth(arithmetic), "narrow": sorted(arithmetic.narrow)}


def arithmetic_from_json(entry: dict[str, Any]) -> Arithmetic:
    """Return the arithmetic that `arithmetic_to_json` took apart.

    Raises:
        ValueError: it is none, or one whose errors are those of no device.
    """
    check_form(entry, _ARITHMETIC, "arithmetic")
    for name in ERRORS:
        if not 0 <= entry[name] <= _ROUGHEST:
            raise ValueError(f"arithmetic.{name} must be from 0 to {_ROUGHEST:g}, got {entry[name]}")
    if not 1 <= entry["matmul_bits"] <= 53 or entry["depth"] not in DEPTHS or not set(entry["narrow"]) <= NARROW:
        raise ValueError(f"arithmetic has a matmul_bits, depth or narrow that this lsce does not know: {entry}")
    return Arithmetic(**{**entry, "depth": DEPTHS[entry["depth"]], "narrow": frozenset(entry["narrow"])})


def read_bundle(folder: Path) -> Bundle:
    """Return the bundle in a folder, after checking its hashes. `replay` finds out whether it is stale.

    Raises:
        RecordingError: there is no bundle, or it was changed after it was written.
    """
    return read_sealed(folder, MANIFEST, "bundle", _put_together)


def _put_together(content: dict[str, Any], arrays: Arrays) -> Bundle:
    check_form(content, _FORM)
    folders = by_folder(arrays)
    adapters = _adapters_from_json(content["adapters"])
    if len({(entry["name"], entry["dtype"]) for entry in content["cases"]}) != len(content["cases"]):
        raise ValueError("two cases have the same name and dtype")
    if not content["cases"]:
        raise ValueError("it has no case")
    records = []
    for i, entry in enumerate(content["cases"]):
        case = case_from_arrays(entry, folders.pop(f"cases/{i}", {}))
        truths = folders.pop(f"truths/{i}", None)
        truth = solve(case) if truths is None else truth_from_arrays(truths)
        records.append(Record(case, truth))
        for name, dtypes in entry["results"].items():
            adapters[name].results[_key(case)] = result_from_arrays(folders.pop(f"results/{i}/{name}", {}), dtypes)
        for name, reason in entry["failures"].items():
            adapters[name].failures[_key(case)] = reason
    if folders:
        raise ValueError(f"it has arrays of no case, in {next(iter(folders))!r}")
    return Bundle(records, adapters, content["environment"])


def _adapters_from_json(entries: dict[str, Any]) -> dict[str, RecordedAdapter]:
    adapters = {}
    for name, entry in entries.items():
        if entry["device"] not in DEVICES:
            raise ValueError(f"{name} ran on {entry['device']!r}; the devices are {', '.join(DEVICES)}")
        arithmetic = arithmetic_from_json(entry["arithmetic"])
        adapters[name] = RecordedAdapter(name, entry["framework"], entry["device"], arithmetic)
    return adapters


def result_from_arrays(arrays: Arrays, dtypes: dict[str, str]) -> AnyResult:
    """Return the result that `result_to_arrays` took apart.

    Raises:
        ValueError: its arrays and dtypes are not those of one result.
    """
    if arrays.keys() != dtypes.keys():
        raise ValueError(f"a result has the parts {', '.join(arrays)}, and dtypes of {', '.join(dtypes)}")
    wrong = [array.dtype.name for array in arrays.values() if not _is_floating(array)]
    if wrong:
        raise ValueError(f"a result has the dtype {wrong[0]}")
    return make_result({part: array.astype(np.float64) for part, array in arrays.items()}, dtypes)
