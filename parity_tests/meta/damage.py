"""Damage for files, forged manifests, and what a command must say of both: one clear line, never AGREE."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import Result

from parity_tests.studies.sealed_folders import ARRAYS, Arrays, write_sealed
from parity_tests.truth.batches import from_safetensors

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**63, 10**40, 0.5, -0.0, 1e308, "", "x", "float32", "\x1b[31m\nAGREE", "../..",
    "\ud800", [], {}, [[]], {"": {}}, [1, "a"],
)  # fmt: skip
Node = tuple[Any, Any]


def deep(levels: int = 100_000) -> str:
    """Return JSON that is nested more deeply than any reader follows."""
    return "[" * levels + "]" * levels


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
        changed = copy.deepcopy(content)
        (container, key), path = draw.choice(list(nodes(changed)))
        how = draw.choice(("replace", "replace", "replace", "remove", "again"))
        if how == "replace":
            container[key] = draw.choice(VALUES)
        elif how == "remove":
            del container[key]
        elif isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        else:
            container[f"{key}{draw.choice(('2', ' ', chr(27)))}"] = copy.deepcopy(container[key])
        if changed != content:
            return changed, path


def refusal(done: Result, what: object) -> bool:
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


def forge(folder: Path, manifest: str, change: Callable[[dict[str, Any], Arrays], Any]) -> Any:
    """Change what a folder holds, and seal it again, as someone would who forges one; return what `change` does."""
    content = json.loads((folder / manifest).read_text(encoding="utf-8"))
    arrays = {name: np.array(values) for name, values in from_safetensors((folder / ARRAYS).read_bytes()).items()}
    changed = change(content, arrays)
    write_sealed(folder, manifest, content, arrays)
    return changed
