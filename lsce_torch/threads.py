"""Threads that take whole blocks of rows, in place of torch's own."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

Block = TypeVar("Block")

# Up to this many blocks for each thread, torch's own take every operation.
_FEW_BLOCKS = 2


def in_threads(work: Callable[[Iterator[Block]], None], blocks: Iterable[Block]) -> None:
    """Call `work` in as many threads as torch uses; each call takes the next free block until none is left.

    torch's own threads wait for each other at every operation, for milliseconds if other programs use the same cores.
    These threads meet once, at the end. torch's operations release the interpreter. But torch's own keep the cores busy
    for milliseconds after their last operation, so that a few blocks are done sooner by them.
    """
    parts = list(blocks)
    num_threads = torch.get_num_threads()
    if num_threads == 1 or len(parts) <= _FEW_BLOCKS * num_threads:
        work(iter(parts))
        return
    queue = iter(parts)

    def work_on_queue() -> None:
        # Each thread has its own modes. No derivative, reverse or forward, may record these operations.
        with torch.inference_mode():
            work(queue)

    futures: list[Future[None]] = []
    try:
        pool = _thread_pool(torch.get_num_threads())
        futures.extend(pool.submit(work_on_queue) for _ in range(num_threads))
    except RuntimeError:
        # After the main thread has ended, as in functions of `atexit`, Python refuses new threads and new work.
        work(queue)
    for future in futures:
        future.result()


@cache
def _thread_pool(num_threads: int) -> ThreadPoolExecutor:
    """Return threads in which torch's operations start no threads of their own."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="lsce")
    all_started = Barrier(num_threads)

    def start() -> None:
        # Read the number first: a thread's first use of it would set it for all threads.
        torch.get_num_threads()
        torch.set_num_threads(1)
        all_started.wait()

    try:
        for future in [pool.submit(start) for _ in range(num_threads)]:
            future.result()
    finally:
        torch.set_num_threads(num_threads)
    return pool


# A forked process has none of its parent's threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_thread_pool.cache_clear)
