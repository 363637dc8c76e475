"""How every time is taken. Functions are timed in turns, since two things distort what is simpler.

All calls of one, then all of the next: a machine that gets slower meanwhile, from heat or another program, changes the
ratios. One call of each, round after round: a call starts with the memory as that of another function left it, and pays
for what that one freed. So in each round each takes several calls in a row, of which the first does not count.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """Of the logits."""

    rows: int
    classes: int


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


class Case(NamedTuple):
    """Something to time."""

    name: str
    run: Callable[..., object]  # returns when everything is computed
    arguments: Callable[[], tuple[Any, ...]]  # called before each run; takes no part in the time
    is_floor: bool = False  # whether it does less than a loss must


class Row(NamedTuple):
    """What was measured of a case."""

    name: str
    seconds: list[float]
    memory: int  # bytes beyond arguments; in JAX beyond results too
    is_floor: bool

    @property
    def milliseconds(self) -> float:
        """The median."""
        return 1e3 * median(self.seconds)

    @property
    def least_milliseconds(self) -> float:
        """The least: far below the median where another program was in the way."""
        return 1e3 * min(self.seconds)


def time_in_turns(cases: Sequence[Case], schedule: Schedule) -> list[list[float]]:
    """Return the seconds of each call that counts, of each case."""
    seconds: list[list[float]] = [[] for _ in cases]
    for _ in range(schedule.rounds):
        for case, kept in zip(cases, seconds, strict=True):
            times = [_time_once(case) for _ in range(1 + schedule.calls)]
            kept.extend(times[1:])
    return seconds


def _time_once(case: Case) -> float:
    # The result lives until the time is taken, and goes with this call.
    arguments = case.arguments()
    start = time.perf_counter()
    result = case.run(*arguments)
    seconds = time.perf_counter() - start
    del result
    return seconds
