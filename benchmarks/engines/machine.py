"""What this machine can do at most, and how much memory a call takes of it: on Linux, for `benchmarks all`.

A floor is the time that the memory needs alone. No loss can be faster than one read of the logits, and no gradient can
be faster than one read and one write, unless the logits are in a cache. Floors are taken by NumPy, with a thread for
each core, so that they are the same in every process whatever framework it measures.
"""

import ctypes
import gc
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engines.timing import BYTES, Case, host_clock

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Fewer bytes are not worth a second thread; of more, the time is that of so many, times the number.
ONE_THREAD, LARGEST = 2**17, 2**29
READ, READ_WRITE = "read", "read and write"
# What must stay free: for the system, and for what estimates leave out.
SPARE = 2**30


class DoesNotFitError(Exception):
    """A loss would need more memory than there is."""


def floors(size: int) -> dict[str, Case]:
    """Return what takes the time that memory needs for logits of `size` bytes: to read them, to read and write them.

    Example:
        >>> sorted(floors(4096))
        ['read', 'read and write']
    """
    taken = min(size, LARGEST)
    source, target = (np.ones(max(1, taken // 4), np.float32) for _ in range(2))
    threads = 1 if taken <= ONE_THREAD else CORES
    edges = np.linspace(0, len(source), threads + 1).astype(int)
    parts = [(source[start:end], target[start:end]) for start, end in pairwise(edges)]
    pool = ThreadPoolExecutor(threads)

    def in_threads(work: Callable[[Any], Any]) -> Callable[[], Any]:
        return (lambda: work(parts[0])) if threads == 1 else (lambda: list(pool.map(work, parts)))

    def clock(call: Callable[[], Any]) -> tuple[Any, float]:
        result, seconds = host_clock(call)
        return result, seconds * size / taken

    works = {READ: lambda part: part[0].max(), READ_WRITE: lambda part: np.copyto(part[1], part[0])}
    return {name: Case(name, in_threads(work), tuple, True, clock) for name, work in works.items()}


# --- Memory ---------------------------------------------------------------------------------------------------------


def peak_of(call: Callable[[], object]) -> int:
    """Return the most memory that this process has during a call, beyond what it had before, in bytes.

    Memory is what the system counts, whichever library allocates it. The call runs twice, and the second counts: the
    first starts threads and compiles. Use a fresh process, whose allocator holds nothing back that the call could take.

    Raises:
        NotImplementedError: this system does not say it; Linux does.
    """
    call()
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library than glibc has no such function
        ctypes.CDLL(None).malloc_trim(0)
    before = _reset_peak()
    call()
    return max(0, _status("VmHWM") - before)


def _reset_peak() -> int:
    """Forget the peak of this process; return what it has now."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status("VmRSS")
    except OSError as error:
        raise NotImplementedError(f"this system does not say how much memory a process has had: {error}") from error


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise NotImplementedError(f"this system does not say how much memory a process has had: no {name}")
    return 1024 * int(found[1])


def free_memory() -> int | None:
    """Return how many bytes programs can still get; None where the system does not say."""
    with suppress(OSError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        found = re.search(r"^MemAvailable:\s*(\d+) kB$", text, re.MULTILINE)
        return found and 1024 * int(found[1])
    return None


def check_fits(need: float | None, part: dict[str, Any]) -> None:
    """Raise if a loss would need more memory than is free.

    Args:
        need: memory beyond the logits, as a multiple of them; None if it is not known.
        part: of the losses, with "shape" and "dtype"; see `benchmarks.engines.device_worker.Task`.

    Raises:
        DoesNotFitError: with both sizes.
    """
    free = free_memory()
    if need is None or free is None:
        return
    rows, *_, classes = part["shape"]
    needed = need * rows * classes * BYTES[part["dtype"]]
    if needed > free - SPARE:
        raise DoesNotFitError(f"needs about {needed / 1e9:.1f} GB beyond the logits, and {free / 1e9:.1f} GB are free")
