"""What `test_workers.py` runs in the processes of adapters."""

import os
import time
from pathlib import Path


def prepare(number: int, of: int, folder: Path) -> tuple[int, int, bool]:
    return number, of, folder.is_dir()


def told(prepared: tuple[int, int, bool], value: str) -> tuple[int, int, bool, str]:
    return *prepared, value


def pid(_: tuple[int, int, bool]) -> int:
    return os.getpid()


def sleep(_: tuple[int, int, bool], seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def end(_: tuple[int, int, bool], code: int) -> None:
    if code:
        os._exit(code)


def fail(_: tuple[int, int, bool], text: str) -> None:
    print("this is seen by nobody")
    raise ValueError(text)
