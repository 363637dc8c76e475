"""Calls adapters on the next cases while earlier ones are examined: JAX compiles one loss while it compiles another.

XLA compiles outside of Python's lock, so two adapters of JAX take little longer than one on two cores. An adapter gets
a thread of its own if it says that it may be called beside others (`concurrent`). All others are called one after
another in the caller's thread: several change settings of a framework for everyone while they run.

Between blocks of cases JAX drops its compiled programs, each of which holds one to four megabytes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import NamedTuple

from parity_tests.losses.adapters import Adapter, forget_programs
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import AnyResult

# Cases whose results are held at once. In more of them JAX compiles less again, and holds more.
BLOCK = 16

Call = Callable[[], AnyResult]


class Calls(NamedTuple):
    """A case, and for each adapter that takes it a function that returns its result, or raises its exception."""

    case: Case
    of: dict[str, Call]


def call_each(
    adapters: Sequence[Adapter],
    cases: Iterable[Case],
    takes: Callable[[Adapter, Case], bool] = lambda adapter, case: True,
) -> Iterator[Calls]:
    """Yield the calls of all adapters on each case in turn. Those of later cases may run already.

    Args:
        adapters: the adapters. No two have the same name.
        cases: the cases.
        takes: returns whether an adapter is called in a case that it can handle.
    """
    threads = {each.name: ThreadPoolExecutor(1) for each in adapters if getattr(each, "concurrent", False)}
    remaining = iter(cases)
    try:
        while block := list(islice(remaining, BLOCK)):
            begun = [Calls(case, _begin(adapters, case, takes, threads)) for case in block]
            while begun:
                yield begun.pop(0)
            forget_programs()
    finally:
        # What is being compiled cannot be interrupted, and nobody waits for it.
        for thread in threads.values():
            thread.shutdown(wait=False, cancel_futures=True)


def _begin(
    adapters: Sequence[Adapter],
    case: Case,
    takes: Callable[[Adapter, Case], bool],
    threads: dict[str, ThreadPoolExecutor],
) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    for adapter in adapters:
        if adapter.unsupported(case) is None and takes(adapter, case):
            thread = threads.get(adapter.name)
            calls[adapter.name] = thread.submit(adapter, case).result if thread else partial(adapter, case)
    return calls
