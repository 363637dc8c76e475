"""How every time is taken. Functions are timed in turns, since two things distort what is simpler.

All calls of one, then all of the next: a machine that gets slower meanwhile, from heat or another program, changes the
ratios. One call of each, round after round: a call starts with the memory as that of another function left it, and pays
for what that one freed. So in each round each takes several calls in a row, of which the first does not count.
"""

import resource
import time
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

# Of an element of the dtypes that are measured.
BYTES = {"bfloat16": 2, "float32": 4}


class Shape(NamedTuple):
    """Of the logits: [rows, classes], or [rows, classes, pixels] if there is more than one pixel."""

    rows: int
    classes: int
    pixels: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """The dimensions."""
        return self[: 2 + (self.pixels > 1)]

    @property
    def logits_bytes(self) -> int:
        """What the logits take in float32."""
        return 4 * self.rows * self.classes * self.pixels


class LinearShape(NamedTuple):
    """Of a linear layer and its batch: hidden is [rows, features], the logits would be [rows, classes]."""

    rows: int
    features: int
    classes: int

    @property
    def logits_bytes(self) -> int:
        """What all logits take in float32."""
        return 4 * self.rows * self.classes

    @property
    def gradient_bytes(self) -> int:
        """What the gradients of hidden and weight take in float32."""
        return 4 * (self.rows + self.classes) * self.features


class Schedule(NamedTuple):
    """How often each function is called: `rounds` times one call that does not count and `calls` that do."""

    rounds: int
    calls: int


# Calls a function, waits, and returns its result and the seconds it took.
Clock = Callable[[Callable[[], object]], tuple[object, float]]


class Case(NamedTuple):
    """Something to time."""

    name: str
    run: Callable[..., object]  # returns when everything is computed, if no clock waits for that
    arguments: Callable[[], tuple[Any, ...]]  # called before each run; takes no part in the time
    is_floor: bool = False  # whether it does less than a loss must
    clock: Clock | None = None  # None for the clock of this machine


class Timed(NamedTuple):
    """What was measured of the calls of a case that count."""

    seconds: list[float]  # the median of each round
    least_seconds: float
    system_ms: float  # of a call, on average, in the system, as for page faults
    faults: float  # page faults of a call, on average


class Row(NamedTuple):
    """What was measured of a case."""

    name: str
    seconds: list[float]  # the median of each round
    least_seconds: float
    memory: int  # bytes beyond arguments; in JAX beyond results too
    is_floor: bool
    # As in `Timed`; 0 in records that are older.
    system_ms: float = 0.0
    faults: float = 0.0

    @property
    def milliseconds(self) -> float:
        """The median of the rounds."""
        return 1e3 * median(self.seconds)

    @property
    def least_milliseconds(self) -> float:
        """The least of all calls: far below the median where another program was in the way."""
        return 1e3 * self.least_seconds


def time_in_turns(cases: Sequence[Case], schedule: Schedule) -> list[Timed]:
    """Return what was measured of each case."""
    rounds: list[list[list[_Call]]] = [[] for _ in cases]
    for _ in range(schedule.rounds):
        for case, of_case in zip(cases, rounds, strict=True):
            of_case.append([_call(case) for _ in range(1 + schedule.calls)][1:])
    return [_timed(of_case) for of_case in rounds]


class _Call(NamedTuple):
    seconds: float
    system_seconds: float
    faults: int


def _timed(rounds: Sequence[Sequence[_Call]]) -> Timed:
    calls = [call for one in rounds for call in one]
    return Timed(
        seconds=[median(call.seconds for call in one) for one in rounds],
        least_seconds=min(call.seconds for call in calls),
        system_ms=1e3 * fmean(call.system_seconds for call in calls),
        faults=fmean(call.faults for call in calls),
    )


def make_rows(cases: Sequence[Case], timed: Sequence[Timed], memory: Sequence[int]) -> list[Row]:
    """Return the rows of a table."""
    measured = zip(cases, timed, memory, strict=True)
    return [
        Row(case.name, of.seconds, of.least_seconds, size, case.is_floor, of.system_ms, of.faults)
        for case, of, size in measured
    ]


def host_clock(call: Callable[[], object]) -> tuple[object, float]:
    """Return the result of a function and the seconds that it took on this machine."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def processor_clock(call: Callable[[], object]) -> tuple[object, float]:
    """Return the result of a function and the processor time of all threads, which other programs hardly change."""
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def _call(case: Case) -> _Call:
    # The result lives until the time is taken, and goes with this call.
    arguments = case.arguments()
    before = resource.getrusage(resource.RUSAGE_SELF)
    result, seconds = (case.clock or host_clock)(lambda: case.run(*arguments))
    after = resource.getrusage(resource.RUSAGE_SELF)
    del result
    return _Call(seconds, after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt)
