"""Folders of arrays and a manifest with SHA-256 of both: the one form in which bundles, losses and trainings are kept.

`arrays.safetensors` has the bits of all arrays. The manifest is a JSON file with the rest, in which nothing is code, so
that reading a folder runs none. It must be byte for byte what `write_sealed` writes for its content. The hashes find
damage and edits; they are no signature: a changed folder with its hashes changed is another valid folder.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from parity_tests.json_files import parse_json
from parity_tests.texts import one_line
from parity_tests.truth.batches import from_safetensors, to_safetensors
from parity_tests.truth.files import write_folder

FORMAT = 4
ARRAYS = "arrays.safetensors"
Arrays = dict[str, NDArray[Any]]
Read = TypeVar("Read")

# What Python, NumPy, mpmath and safetensors raise about content that makes no sense.
_NONSENSE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    SafetensorError,
    TypeError,
    ValueError,
)


class RecordingError(ValueError):
    """A recording cannot be made, read or trusted; the message says why, and what to do, in one line."""

    def __init__(self, message: str) -> None:
        """Take the message; what it quotes of a file may have any characters."""
        super().__init__(one_line(message))


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn whatever the content of a file makes the body of the `with` statement raise into a RecordingError."""
    try:
        yield
    except RecordingError:
        raise
    except _NONSENSE as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise RecordingError(f"{what}: {kind}{error}. Record it again.") from error


def write_sealed(folder: Path, manifest: str, content: dict[str, Any], arrays: Arrays) -> None:
    """Write a folder, or nothing; the files of one that is there are replaced.

    Args:
        folder: the folder, which is created.
        manifest: the name of the manifest.
        content: what it holds, for JSON.
        arrays: the arrays by name.

    Raises:
        OSError: the folder cannot be written.
    """
    data = to_safetensors(arrays)
    sealed = {"format": FORMAT, **content, "arrays_sha256": hashlib.sha256(data).hexdigest()}
    write_folder(folder, {ARRAYS: data, manifest: sealed_text(sealed).encode()})


def sealed_text(sealed: dict[str, Any]) -> str:
    """Return the text of a manifest, with the SHA-256 of the rest of it."""
    content = {name: value for name, value in sealed.items() if name != "sha256"}
    return _as_text({**content, "sha256": hashlib.sha256(_as_text(content).encode()).hexdigest()})


def _as_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def read_sealed(folder: Path, manifest: str, kind: str, put_together: Callable[[dict[str, Any], Arrays], Read]) -> Read:
    """Return what a folder holds, after checking the hashes.

    Args:
        folder: the folder.
        manifest: the name of the manifest.
        kind: what is recorded there, such as "loss".
        put_together: makes it from the content and the arrays; what is wrong with them may raise anything.

    Raises:
        RecordingError: there is none, it was changed after it was written, it has another format, or it makes no sense.
    """
    path = folder / manifest
    try:
        text, data = path.read_text(encoding="utf-8"), (folder / ARRAYS).read_bytes()
        sealed = parse_json(text)
        whole = isinstance(sealed, dict) and sealed_text(sealed) == text
    except OSError as error:
        name = Path(error.filename or path).name
        hint = "`lsce-parity record` makes one."
        raise RecordingError(f"no {kind} can be read in {folder}: {name}: {error.strerror}. {hint}") from error
    except (RecursionError, ValueError) as error:
        raise RecordingError(f"{path} is damaged: {error}. Copy it again, or record it again.") from error
    _check_format(folder, sealed)
    if not whole or sealed.pop("arrays_sha256", None) != hashlib.sha256(data).hexdigest():
        raise RecordingError(
            f"{folder} was edited or damaged: it does not fit its SHA-256. Copy it again, or record it again."
        )
    content = {name: value for name, value in sealed.items() if name not in ("format", "sha256")}
    with refusing(f"{path} describes no {kind}"):
        return put_together(content, {name: np.array(array) for name, array in from_safetensors(data).items()})


def _check_format(folder: Path, sealed: Any) -> None:
    found = sealed.get("format") if isinstance(sealed, dict) else None
    if type(found) is not int or found != FORMAT:
        newer = type(found) is int and found > FORMAT
        what_to_do = "Install a newer lsce." if newer else "Record it again."
        raise RecordingError(f"{folder} has format {found!r}, this lsce reads format {FORMAT}. {what_to_do}")


def by_folder(arrays: Arrays) -> dict[str, Arrays]:
    """Return arrays whose names are paths by folder, and there by name."""
    folders: dict[str, Arrays] = {}
    for path, array in arrays.items():
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, {})[name] = array
    return folders
