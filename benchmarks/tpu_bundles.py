"""What an accurate exp would cost on TPUs that are not there: instruction bundles, as their compiler schedules them.

A TPU starts about one bundle in a cycle. The compiler writes the bundles of each fusion into a file, with the loops
that they are in. Needs libtpu, and `benchmarks.__main__.TPU_ENVIRONMENT` and `dump_arguments` in the environment before
the import.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.tpu import LOSSES, TOPOLOGIES, compile_loss

NAME = "lsce fused"
ACCURACIES = {
    "exp as it is": None,
    "accuracy=HIGHEST": partial(jax.lax.exp, accuracy=jax.lax.AccuracyMode.HIGHEST),
}
# A line with a bundle: its address, a mark of a loop's begin or end, one > for each loop that it is in, instructions.
BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*((?:>\s*)*)\{")
TRIPS = re.compile(r"scmp\.\w+\.s32\.totalorder %\w+, (\d+) /\* loop exit test")


class BundleCost(NamedTuple):
    """How many bundles loss and gradient take on one core."""

    topology: str
    name: str
    bundles: int


def measure(dump: Path) -> list[BundleCost]:
    """Compile the loss with either exp for each topology, and count the bundles that the compiler writes to a folder."""
    costs = []
    for topology in TOPOLOGIES:
        for name, exp in ACCURACIES.items():
            before = set(dump.iterdir())
            with mock.patch.object(jnp, "exp", exp or jnp.exp):
                jax.clear_caches()
                compile_loss(topology, LOSSES[NAME])
            written = set(dump.iterdir()) - before
            costs.append(BundleCost(topology, name, sum(map(bundles_of, _schedules(written)))))
    jax.clear_caches()
    return costs


def _schedules(files: set[Path]) -> Iterator[Path]:
    """Yield the files of the fusions; what sets the core up, and tables of the schedule, are others."""
    for path in files:
        others = ("schedule-analysis", "<late-", "-TLP-")
        if path.name.endswith("final_bundles.txt") and not any(each in path.name for each in others):
            yield path


def bundles_of(path: Path) -> int:
    """Return how many bundles a fusion executes: those in a loop count once for each round.

    Raises:
        ValueError: the file has another form than this knows.
    """
    trips: dict[int, int] = {}
    by_depth: dict[int, int] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        found = BUNDLE.match(line)
        if found is None:
            continue
        depth = found[1].count(">")
        by_depth[depth] = by_depth.get(depth, 0) + 1
        for test in TRIPS.finditer(line):
            if depth in trips:
                raise ValueError(f"{path} has two loops side by side, which this does not tell apart")
            trips[depth] = int(test[1])
    total, rounds = 0, 1
    for depth in range(max(by_depth, default=0) + 1):
        if depth:
            if depth not in trips:
                raise ValueError(f"{path} has a loop without a number of rounds")
            rounds *= trips[depth]
        total += rounds * by_depth.get(depth, 0)
    return total
