"""Files and folders that are whole or not there: each is written beside its place, and renamed when it is done."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path


def write_whole(path: Path, content: str | bytes, errors: str = "strict") -> None:
    """Write a file that takes the place of an older one when it is whole; an interruption leaves the older one.

    What is no ordinary file, such as /dev/stdout, is written to as it is, and so is what a symbolic link points to.

    Args:
        path: the file; its folder is created.
        content: what it holds afterwards; text in UTF-8.
        errors: what becomes of characters that UTF-8 does not have, as in `str.encode`.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_whole(Path(folder) / "numbers.txt", "1 2 3")
        ...     [each.name for each in Path(folder).iterdir()]
        ['numbers.txt']
    """
    data = content if isinstance(content, bytes) else content.encode(errors=errors)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_bytes(data)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path.parent, {path.name: data})


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder with these files, all or none. In a folder that is there they take the place of others.

    Raises:
        OSError: it cannot be written.
    """
    if folder.is_dir():
        _replace(folder, files)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        made = beside / folder.name
        made.mkdir()  # for the permissions of a new folder: `beside` is for its owner alone
        _replace(made, files)
        made.replace(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _replace(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files within the folder, which may be a device of its own, then rename them all."""
    beside = Path(tempfile.mkdtemp(prefix=".writing.", dir=folder))
    try:
        for name, data in files.items():
            (beside / name).write_bytes(data)
        for name in files:
            os.replace(beside / name, folder / name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
