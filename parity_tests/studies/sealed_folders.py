"""Folders of arrays and a manifest with SHA-256 of both, in which a loss or a training of the user's is recorded.

`arrays.safetensors` has the bits of all arrays. The manifest is a JSON file with the rest, in which nothing is code.
The hashes find damage; they are no signature.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity_tests.json_files import parse_json
from parity_tests.truth.batches import from_safetensors, to_safetensors
from parity_tests.truth.files import write_folder

ARRAYS = "arrays.safetensors"
Arrays = dict[str, NDArray[Any]]


class RecordingError(ValueError):
    """A recording cannot be made, read or trusted; the message says why."""


def write_sealed(folder: Path, manifest: str, content: dict[str, Any], arrays: Arrays) -> None:
    """Write a folder, or nothing.

    Args:
        folder: the folder, which is created.
        manifest: the name of the manifest.
        content: what it holds, for JSON, with the number of its format.
        arrays: the arrays by name.

    Raises:
        OSError: the folder cannot be written.
    """
    data = to_safetensors(arrays)
    content = content | {"arrays_sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps({"content": content, "sha256": digest(content)}, indent=1, allow_nan=False)
    write_folder(folder, {ARRAYS: data, manifest: f"{text}\n".encode()})


def digest(content: Any) -> str:
    """Return the SHA-256 of the content of a manifest."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_sealed(folder: Path, manifest: str, kind: str, version: int) -> tuple[dict[str, Any], Arrays]:
    """Return the content of the manifest, and the arrays, after checking the hashes.

    Args:
        folder: the folder.
        manifest: the name of the manifest.
        kind: what is recorded there, such as "loss".
        version: the format that is read.

    Raises:
        RecordingError: there is none, it was changed after it was written, or it has another format.
    """
    path = folder / manifest
    try:
        text, data = path.read_text(encoding="utf-8"), (folder / ARRAYS).read_bytes()
    except OSError as error:
        raise RecordingError(f"there is no recorded {kind} in {folder}: {error.filename}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecordingError(f"{path} is damaged: {error}") from error
    try:
        read = parse_json(text)
        content = read["content"]
        whole = read["sha256"] == digest(content) and content["arrays_sha256"] == hashlib.sha256(data).hexdigest()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordingError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if not whole:
        raise RecordingError(
            f"{folder} was edited or damaged: it does not fit its SHA-256. Copy it or record it again."
        )
    if content.get("format") != version:
        raise RecordingError(
            f"{folder} has format {content.get('format')!r}, this lsce reads {version}. Record it again."
        )
    try:
        return content, {name: np.array(array) for name, array in from_safetensors(data).items()}
    except Exception as error:  # what has another's hashes may be anything
        raise RecordingError(f"{folder} describes no {kind}: {type(error).__name__}: {error}") from error
