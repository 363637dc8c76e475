"""Fresh memory in large pages."""

import ctypes
import mmap
from functools import cache

from torch import Tensor

# Allocations at least this large, in bytes, get fresh pages from the system.
_FRESH_BYTES = 2**23


def in_large_pages(fresh: Tensor) -> Tensor:
    """Return a tensor that has not been written yet, and ask the system for large pages.

    The system clears a fresh page at the first write to it. With pages of 4 KiB that takes, for 128 MiB, as long as the
    whole forward pass. Linux clears 2 MiB at a time if asked.
    """
    if fresh.device.type == "cpu" and fresh.nbytes >= _FRESH_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        start = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        # Only a hint: if the system refuses, the pages are small.
        _libc().madvise(start, fresh.data_ptr() + fresh.nbytes - start, mmap.MADV_HUGEPAGE)
    return fresh


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc
