"""Truths on disk: what takes long to compute is computed once for all processes.

A file is named by the SHA-256 of everything that its truth depends on: the bits of the inputs, the options, the code of
the definition and of the oracle, and the versions that compute it. So a changed input or changed code finds no file.
A file starts with the SHA-256 of the rest; where it does not fit, the truth is computed again.

They are in `truths` of the folder that `LSCE_PARITY_CACHE` names, by default `lsce` of the user's folder for caches.
"""

import hashlib
import inspect
import io
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
from numpy.typing import NDArray

import lsce_spec
from parity_tests.truth import oracle
from parity_tests.truth.cases import Case
from parity_tests.truth.files import write_whole
from parity_tests.truth.oracle import Exact, LinearTruth, Truth

VARIABLE = "LSCE_PARITY_CACHE"
# A truth that is computed in less time than this is not worth a file.
SECONDS = 0.05
# Most bytes of all files together. Beyond that, the least recently used files are removed.
LARGEST = 2**28
SUFFIX = ".truth"

Arrays = dict[str, NDArray[Any]]


class TruthFolder:
    """Truths in the files of a folder.

    Args:
        folder: the folder; it is created with the first truth. Where it cannot be written to, nothing is stored.
        seconds: truths that are computed in less time are not stored.
    """

    def __init__(self, folder: Path, seconds: float = SECONDS) -> None:
        """Keep the folder's path."""
        self.folder, self.seconds = folder, seconds

    def find_or_compute(self, case: Case, maths: Any, compute: Callable[[], Truth]) -> Truth:
        """Return the truth about a case from its file, or else from `compute`."""
        name = _name(case, maths)
        if name is None:
            return compute()
        path = self.folder / name
        truth = _read(path)
        if truth is None:
            begin = time.monotonic()
            truth = compute()
            if time.monotonic() - begin >= self.seconds:
                with suppress(OSError):
                    write_whole(path, _as_bytes(truth))
                    self._remove_oldest()
        return truth

    def _remove_oldest(self) -> None:
        sizes = {file: file.stat() for file in self.folder.glob(f"*{SUFFIX}")}
        total = 0
        for file in sorted(sizes, key=lambda file: sizes[file].st_mtime, reverse=True):
            total += sizes[file].st_size
            if total > LARGEST:
                file.unlink(missing_ok=True)


@contextmanager
def truths_on_disk() -> Iterator[None]:
    """Have `solve` store truths in the user's folder in the body of the `with` statement."""
    folder, before = cache_folder(), oracle.disk
    oracle.disk = None if folder is None else TruthFolder(folder / "truths")
    try:
        yield
    finally:
        oracle.disk = before


def cache_folder() -> Path | None:
    """Return the folder for what another process need not compute again; None if `LSCE_PARITY_CACHE` is "off"."""
    given = os.environ.get(VARIABLE)
    if given:
        return None if given == "off" else Path(given)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches) / "lsce"


def _name(case: Case, maths: Any) -> str | None:
    """Return the name of a case's file; None where an option, such as a user's convention, or `maths` has no name."""
    options, digits = sorted(case.options.items()), {id(math): 16, id(mpmath.mp): oracle.DIGITS}.get(id(maths))
    if digits is None or not all(value is None or isinstance(value, str | int | float) for _, value in options):
        return None
    key = (case.dtype, case.axis, oracle.digest_of_arrays(case), options, digits, _version())
    return hashlib.sha256(repr(key).encode()).hexdigest() + SUFFIX


@cache
def _version() -> str:
    """Return a hash of the code and of the versions that a truth depends on."""
    here, spec = Path(__file__), Path(inspect.getfile(lsce_spec)).parent
    files = [here, *(here.with_name(f"{name}.py") for name in ("oracle", "cases", "precision")), *spec.glob("*.py")]
    digest = hashlib.sha256()
    # By their names: the order must not depend on the folders that the two packages are in.
    for file in sorted(files, key=lambda file: file.parts[-2:]):
        digest.update(file.read_bytes())
    # In float64 a truth depends on the machine's libm.
    versions = (mpmath.__version__, np.__version__, platform.python_version(), platform.platform())
    digest.update(repr(versions).encode())
    return digest.hexdigest()


def truth_to_arrays(truth: Truth) -> Arrays:
    """Return a truth as arrays; a pair of float64 numbers becomes two arrays."""
    arrays: Arrays = {}
    for name, value in vars(truth).items():
        if value is None:  # a layer without a bias
            continue
        parts = {f"{name}.high": value.high, f"{name}.low": value.low} if isinstance(value, Exact) else {name: value}
        arrays |= {part: np.asarray(array) for part, array in parts.items()}
    return arrays


def truth_from_arrays(arrays: Arrays) -> Truth:
    """Return the truth that `truth_to_arrays` took apart.

    Raises:
        KeyError: an array is missing.
        ValueError: an array is left over.
    """
    kind = LinearTruth if "hidden.high" in arrays else Truth
    values: dict[str, Any] = {"bias": None} if kind is LinearTruth else {}
    for name in (each.name for each in fields(kind) if each.name not in values or f"{each.name}.high" in arrays):
        pair = f"{name}.high" in arrays
        values[name] = Exact(arrays[f"{name}.high"], arrays[f"{name}.low"]) if pair else arrays[name]
    truth = kind(**values)
    if arrays.keys() != truth_to_arrays(truth).keys():
        raise ValueError(f"a truth has the arrays {', '.join(arrays)}")
    return truth


def _as_bytes(truth: Truth) -> bytes:
    file = io.BytesIO()
    np.savez(file, **truth_to_arrays(truth))  # type: ignore[arg-type]
    return hashlib.sha256(file.getvalue()).digest() + file.getvalue()


def _read(path: Path) -> Truth | None:
    """Return the truth in a file; None where there is none, or it is damaged."""
    try:
        data = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    size = hashlib.sha256().digest_size
    if hashlib.sha256(data[size:]).digest() != data[:size]:
        return None
    with np.load(io.BytesIO(data[size:])) as arrays:
        return truth_from_arrays(dict(arrays))
