"""Bundles: results of adapters on one machine, recorded for comparison with results on another.

A bundle is a folder of two files. `arrays.safetensors` has the exact bits of the inputs, of the truth and of every
result; a dtype that NumPy lacks is stored as integers of its bits. `manifest.json` has everything else: names, options,
dtypes, versions, devices and hashes. Nothing in it is code, so reading a bundle runs none.

What is an error, and how it is found:

- Edited or damaged: SHA-256 of every array over its name, dtype, shape and bits, of the file of arrays, and of the
  manifest, which must be byte for byte what `write_bundle` writes for its content. The hashes are no signature:
  a changed bundle with all its hashes changed is another valid bundle.
- Mismatched: another format, or other arrays than the manifest lists.
- Stale, or with an unknown adapter: see `parity_tests.studies.replays`.

The numbers of an adapter's `Arithmetic` are recorded; its `depth` is a function, and must be `tree_depth`.

Format 1 has cases of the dense loss only. Format 2 adds linear cases, with hidden, weight and bias in place of the
logits, and for each adapter the intermediate results that it stores in a narrow dtype. A bundle without linear cases is
still written in format 1. Format 3 is compact: it has no truths, which are computed again as it is read, and results in
their own dtypes in place of float64. All are read.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from parity_tests.evidence.environment import describe_environment
from parity_tests.evidence.ledger import DEVICES
from parity_tests.json_files import NUMBER, Optional, check_form, parse_json
from parity_tests.losses.adapters import Adapter, LossError
from parity_tests.studies.concurrent_calls import Calls, call_each
from parity_tests.studies.verdicts import examine
from parity_tests.texts import one_line
from parity_tests.truth.arithmetic import DEPTHS, ERRORS, FULL, NARROW, Arithmetic, name_of_depth
from parity_tests.truth.cases import Case, LinearCase
from parity_tests.truth.comparison import AnyResult, make_result
from parity_tests.truth.files import write_folder
from parity_tests.truth.linear_cases import with_logits
from parity_tests.truth.oracle import Truth, solve
from parity_tests.truth.precision import DTYPES, as_dtype, compute_dtype
from parity_tests.truth.stored import truth_from_arrays, truth_to_arrays

FORMATS = (1, 2, 3)
COMPACT = 3
MANIFEST, ARRAYS = "manifest.json", "arrays.safetensors"
AGAIN = "Record the bundle again."

_LAYER = ("hidden", "weight", "bias")
_CASE_ARRAYS = ("logits", "labels", "smoothing", "where", "class_weight", "class_mask", "prior", "upstream")

Arrays = dict[str, NDArray[Any]]
Key = tuple[str, str]


class BundleError(ValueError):
    """A bundle cannot be written, read or trusted; the message says why, and what to do, in one line."""

    def __init__(self, message: str) -> None:
        """Take the message; what it quotes of a file may have any characters."""
        super().__init__(one_line(message))


# What Python, NumPy and mpmath raise about content that makes no sense.
_NONSENSE = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn whatever the content of a file makes the body of the `with` statement raise into a BundleError."""
    try:
        yield
    except BundleError:
        raise
    except _NONSENSE as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise BundleError(f"{what}: {kind}{error}. {AGAIN}") from error


# The form of a manifest; what else it must be is checked as it is read.
_PLAIN = (None, bool, int, float, str)
_ENVIRONMENT = {
    "python": str,
    "platform": str,
    "versions": {str: str},
    "devices": {str: [str]},
    "flags": {str: _PLAIN},
}
_ADAPTER = {"framework": str, "device": str, "arithmetic": dict}
_CASE = {
    "name": str,
    "dtype": str,
    "axis": int,
    "options": {str: _PLAIN},
    "smoothing": (None, *NUMBER),
    "weight_dtype": Optional(str),
    "chunk_size": Optional((None, int)),
    "results": {str: {str: str}},
    "failures": {str: str},
}
_ARRAY = {"dtype": str, "shape": [int], "sha256": str}
_FORM = {
    "format": int,
    "sha256": str,
    "environment": _ENVIRONMENT,
    "adapters": {str: _ADAPTER},
    "cases": [_CASE],
    "arrays": {str: _ARRAY},
    "arrays_sha256": str,
}
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
        BundleError: the bounds of an adapter cannot be recorded.
    """
    recorded = {}
    for adapter in adapters:
        if name_of_depth(adapter.arithmetic) is None:
            raise BundleError(f"{adapter.name} has a depth of its own; only those of DEPTHS can be recorded.")
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
        BundleError: an option is not a number, string, boolean or None.
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
        raise BundleError(f"an option of case {case.name!r} cannot be written as JSON: {error}.") from error
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
    """Return the case that `case_to_arrays` took apart."""
    plain = ("name", "dtype", "axis", "options", "smoothing", "weight_dtype", "chunk_size")
    values: dict[str, Any] = {name: entry[name] for name in plain if name in entry}
    for name, array in arrays.items():
        values[name] = array.astype(np.float64) if _is_floating(array) else array
    return with_logits(LinearCase(**values, logits=np.zeros(()))) if "hidden" in arrays else Case(**values)


def differing(first: Arrays, second: Arrays) -> list[str]:
    """Return the names of arrays that are in one only, or differ in dtype, shape or bits."""
    digests = [{name: _digest(name, array) for name, array in arrays.items()} for arrays in (first, second)]
    return sorted({name for name, _ in digests[0].items() ^ digests[1].items()})


def _key(case: Case) -> Key:
    return case.name, case.dtype


def _is_floating(array: NDArray[Any]) -> bool:
    return array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16


# Writing.


def write_bundle(folder: Path, bundle: Bundle, *, compact: bool = False) -> None:
    """Write a bundle to a folder, replacing one that is there.

    Args:
        folder: the folder.
        bundle: the bundle.
        compact: whether to leave out the truths: a third of the size, and more to compute for the reader.

    Raises:
        BundleError: there is no case, two are of the same name and dtype, or one has an option that is not plain.
    """
    if len({_key(case) for case in bundle.cases}) != len(bundle.cases):
        raise BundleError("two cases have the same name and dtype; give each a name of its own.")
    if not bundle.records:
        raise BundleError("there is no case to record.")
    manifest, arrays = _take_apart(bundle)
    if compact:
        manifest["format"] = COMPACT
        arrays = _without_truths(manifest["cases"], arrays)
    stored = {name: _stored(array) for name, array in arrays.items()}
    data = save(stored)
    manifest["arrays"] = {
        name: {"dtype": array.dtype.name, "shape": list(array.shape), "sha256": _digest(name, array)}
        for name, array in arrays.items()
    }
    manifest["arrays_sha256"] = hashlib.sha256(data).hexdigest()
    manifest["sha256"] = _digest_of_manifest(manifest)
    write_folder(folder, {ARRAYS: data, MANIFEST: _as_text(manifest).encode()})


def _take_apart(bundle: Bundle) -> tuple[dict[str, Any], Arrays]:
    cases: list[dict[str, Any]] = []
    arrays: Arrays = {}
    for i, each in enumerate(bundle.records):
        entry, inputs = case_to_arrays(each.case)
        arrays |= {f"cases/{i}/{name}": array for name, array in inputs.items()}
        arrays |= {f"truths/{i}/{name}": array for name, array in truth_to_arrays(each.truth).items()}
        entry |= {"results": {}, "failures": {}}
        for name, adapter in bundle.adapters.items():
            result = adapter.results.get(_key(each.case))
            if result is not None:
                entry["results"][name] = {f"{part}_dtype": dtype for part, dtype in result.dtypes.items()}
                arrays |= {f"results/{i}/{name}/{part}": np.asarray(array) for part, array in result.parts.items()}
            elif _key(each.case) in adapter.failures:
                entry["failures"][name] = adapter.failures[_key(each.case)]
        cases.append(entry)
    linear = any(isinstance(case, LinearCase) for case in bundle.cases)
    adapters = {
        name: {
            "framework": adapter.framework,
            "device": adapter.device,
            "arithmetic": _arithmetic_to_json(adapter.arithmetic, linear),
        }
        for name, adapter in bundle.adapters.items()
    }
    return {"format": FORMATS[linear], "environment": bundle.environment, "adapters": adapters, "cases": cases}, arrays


def _without_truths(cases: Sequence[dict[str, Any]], arrays: Arrays) -> Arrays:
    """Return the arrays without truths, and those of results in the dtypes that they came in."""
    kept = {name: array for name, array in arrays.items() if not name.startswith("truths/")}
    for i, entry in enumerate(cases):
        for name, dtypes in entry["results"].items():
            for part, dtype in dtypes.items():
                path = f"results/{i}/{name}/{part.removesuffix('_dtype')}"
                if dtype in DTYPES:
                    kept[path] = as_dtype(kept[path], dtype)
    return kept


# What a bundle does not say of an arithmetic, nor that log is as accurate as log1p: no bundle did before 2026-11-26.
_USUAL = {"division": 1.0, "matmul_bits": FULL, "depth": "blocks"}


def _arithmetic_to_json(arithmetic: Arithmetic, linear: bool) -> dict[str, Any]:
    narrow = {"narrow": sorted(arithmetic.narrow)} if linear else {}
    given = {name: getattr(arithmetic, name) for name in (*ERRORS, "matmul_bits")} | {
        "depth": name_of_depth(arithmetic)
    }
    usual = {**_USUAL, "log": arithmetic.log1p}
    return {name: value for name, value in given.items() if name not in usual or value != usual[name]} | narrow


def _arithmetic_from_json(entry: dict[str, Any]) -> Arithmetic:
    given = {**_USUAL, "log": entry["log1p"], "narrow": sorted(NARROW), **entry}
    check_form(
        given, {**dict.fromkeys(ERRORS, NUMBER), "matmul_bits": int, "depth": str, "narrow": [str]}, "arithmetic"
    )
    for name in ERRORS:
        if not 0 <= given[name] <= _ROUGHEST:
            raise ValueError(f"arithmetic.{name} must be from 0 to {_ROUGHEST:g}, got {given[name]}")
    if not 1 <= given["matmul_bits"] <= 53 or given["depth"] not in DEPTHS or not set(given["narrow"]) <= NARROW:
        raise ValueError(f"arithmetic has a matmul_bits, depth or narrow that this lsce does not know: {given}")
    return Arithmetic(**{**given, "depth": DEPTHS[given["depth"]], "narrow": frozenset(given["narrow"])})


def _stored(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array that safetensors can write from NumPy; bfloat16, which NumPy lacks, as its bits."""
    dense = np.ascontiguousarray(array).reshape(array.shape)
    return dense.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else dense


def _digest(name: str, array: NDArray[Any]) -> str:
    return hashlib.sha256(f"{name} {array.dtype.name} {array.shape}\n".encode() + array.tobytes()).hexdigest()


def _digest_of_manifest(manifest: dict[str, Any]) -> str:
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(_as_text(content).encode()).hexdigest()


def _as_text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n"


# Reading.


def read_bundle(folder: Path) -> Bundle:
    """Return the bundle in a folder, after checking every hash. `replay` finds out whether it is stale.

    Raises:
        BundleError: there is no bundle, or it was changed after it was written.
    """
    manifest = _read_manifest(folder)
    with refusing(f"{folder / MANIFEST} does not describe a bundle"):
        check_form(manifest, _FORM)
        return _put_together(manifest, _read_arrays(folder, manifest))


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        manifest = parse_json(text)
        unchanged = isinstance(manifest, dict) and _as_text(manifest) == text
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = "Record one with `lsce-parity record DIR`."
        raise BundleError(f"there is no bundle in {folder}: {path.name}: {error.strerror}. {hint}") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}.") from error
    except (RecursionError, ValueError) as error:
        raise BundleError(f"{path} is damaged: {error}. Copy it again, or record the bundle again.") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    known = f"this lsce reads formats {', '.join(map(str, FORMATS))}"
    if isinstance(found, int) and not isinstance(found, bool) and found > max(FORMATS):
        raise BundleError(f"{folder} has format {found}, {known}. Install a newer lsce.")
    if not isinstance(manifest, dict) or type(found) is not int or found not in FORMATS:
        raise BundleError(f"{folder} has format {found!r}, {known}. {AGAIN}")
    if not unchanged or manifest.get("sha256") != _digest_of_manifest(manifest):
        raise BundleError(f"{path} was edited or damaged: it does not fit its SHA-256. Copy it or record it again.")
    return manifest


def _read_arrays(folder: Path, manifest: dict[str, Any]) -> Arrays:
    path = folder / ARRAYS
    try:
        data = path.read_bytes()
        stored = load(data)
    except OSError as error:
        raise BundleError(f"the bundle in {folder} is not whole: {path.name}: {error.strerror}.") from error
    except (SafetensorError, *_NONSENSE) as error:
        raise BundleError(f"{path} is damaged: {error}. Copy it again, or record the bundle again.") from error
    described = manifest["arrays"]
    if stored.keys() != described.keys():
        names = ", ".join(sorted(stored.keys() ^ described.keys()))
        raise BundleError(f"{path} and {MANIFEST} do not fit: {names} in one of them only. {AGAIN}")
    arrays = {}
    for name, entry in described.items():
        array = stored[name]
        if entry["dtype"] == "bfloat16" and array.dtype == np.uint16:
            array = array.view(ml_dtypes.bfloat16)
        if (array.dtype.name, list(array.shape)) != (entry["dtype"], entry["shape"]):
            given, wanted = f"{array.dtype.name} {list(array.shape)}", f"{entry['dtype']} {entry['shape']}"
            raise BundleError(f"array {name} of {path} is {given}, {MANIFEST} says {wanted}. {AGAIN}")
        if _digest(name, array) != entry["sha256"]:
            raise BundleError(f"array {name} of {path} was changed: it does not fit its SHA-256. {AGAIN}")
        arrays[name] = array.copy()
    if hashlib.sha256(data).hexdigest() != manifest["arrays_sha256"]:
        raise BundleError(f"{path} was changed: it does not fit its SHA-256. {AGAIN}")
    return arrays


def _put_together(manifest: dict[str, Any], arrays: Arrays) -> Bundle:
    folders: dict[str, Arrays] = {}
    for path, array in arrays.items():
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, {})[name] = array
    adapters = _adapters_from_json(manifest["adapters"])
    if len({(entry["name"], entry["dtype"]) for entry in manifest["cases"]}) != len(manifest["cases"]):
        raise ValueError("two cases have the same name and dtype")
    if not manifest["cases"]:
        raise ValueError("it has no case")
    records = []
    for i, entry in enumerate(manifest["cases"]):
        case = _checked(case_from_arrays(entry, folders.pop(f"cases/{i}", {})))
        truth = solve(case) if manifest["format"] == COMPACT else truth_from_arrays(folders.pop(f"truths/{i}", {}))
        records.append(Record(case, truth))
        for name, dtypes in entry["results"].items():
            adapters[name].results[_key(case)] = _result_from_arrays(folders.pop(f"results/{i}/{name}", {}), dtypes)
        for name, reason in entry["failures"].items():
            adapters[name].failures[_key(case)] = reason
    if folders:
        raise ValueError(f"arrays of {next(iter(folders))} are those of no case")
    return Bundle(records, adapters, manifest["environment"])


def _adapters_from_json(entries: dict[str, Any]) -> dict[str, RecordedAdapter]:
    adapters = {}
    for name, entry in entries.items():
        if entry["device"] not in DEVICES:
            raise ValueError(f"{name} ran on {entry['device']!r}; the devices are {', '.join(DEVICES)}")
        arithmetic = _arithmetic_from_json(entry["arithmetic"])
        adapters[name] = RecordedAdapter(name, entry["framework"], entry["device"], arithmetic)
    return adapters


def _result_from_arrays(arrays: Arrays, dtypes: dict[str, str]) -> AnyResult:
    given = {part.removesuffix("_dtype"): dtype for part, dtype in dtypes.items()}
    if arrays.keys() != given.keys():
        raise ValueError(f"a result has the parts {', '.join(arrays)}, and dtypes of {', '.join(given)}")
    wrong = [array.dtype.name for array in arrays.values() if not _is_floating(array)]
    if wrong:
        raise ValueError(f"a result has the dtype {wrong[0]}")
    return make_result({part: array.astype(np.float64) for part, array in arrays.items()}, given)


def _checked(case: Case) -> Case:
    """Return a case whose arrays fit each other; its truth tells whether its options make sense.

    Raises:
        ValueError: they do not, or a dtype is not known.
    """
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
    return case
