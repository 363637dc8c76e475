"""What an accurate exp would cost on TPUs that are not there: instruction bundles, as their compiler schedules them.

A TPU starts about one bundle in a cycle. The compiler writes the bundles of each fusion into a file, with the loops
that they are in. Needs libtpu, and its flags and environment set before the import: see `benchmarks.__main__.tpu_exp`.
"""

import re
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.tpu import compile_loss
from parity_tests.losses.compiled import TOPOLOGIES

NAME = "lsce fused"
EXPONENTIALS = {
    "exp as it is": jnp.exp,
    "accuracy=HIGHEST": partial(jax.lax.exp, accuracy=jax.lax.AccuracyMode.HIGHEST),
}
# A line with a bundle: its address, a mark of a loop's begin or end, one > for each loop that it is in, instructions.
BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*((?:>\s*)*)\{")
ROUNDS = re.compile(r"scmp\.\w+\.s32\.totalorder %\w+, (\d+) /\* loop exit test")


class BundleCost(NamedTuple):
    """How many bundles loss and gradient take on one core."""

    topology: str
    name: str
    bundles: int


def measure(dump: Path) -> list[BundleCost]:
    """Compile the loss with either exp for each topology, and count the bundles that the compiler writes to `dump`."""
    costs = []
    for device, topology in TOPOLOGIES.items():
        for name, exp in EXPONENTIALS.items():
            before = set(dump.iterdir())
            jax.clear_caches()  # of traces with the other exp
            with mock.patch.object(jnp, "exp", exp):
                compile_loss(device, NAME)
            schedules = list(_schedules(set(dump.iterdir()) - before))
            if not schedules:
                raise ValueError(f"the compiler has written no schedule to {dump} for {topology}")
            costs.append(BundleCost(topology, name, sum(map(count_bundles, schedules))))
    jax.clear_caches()
    return costs


def _schedules(files: set[Path]) -> Iterator[Path]:
    """Yield the files of the fusions; what sets the core up, and tables of the schedule, are others."""
    for path in files:
        others = ("schedule-analysis", "<late-", "-TLP-")
        if path.name.endswith("final_bundles.txt") and not any(each in path.name for each in others):
            yield path


def count_bundles(path: Path) -> int:
    """Return how many bundles a fusion executes: those in a loop count once for each round.

    Raises:
        ValueError: the file has another form than this knows.
    """
    bundles: dict[int, int] = {}  # by the number of loops that they are in
    rounds: dict[int, int] = {0: 1}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        found = BUNDLE.match(line)
        if found is None:
            continue
        depth = found[1].count(">")
        bundles[depth] = bundles.get(depth, 0) + 1
        for test in ROUNDS.finditer(line):
            if depth in rounds:
                raise ValueError(f"{path} has two loops side by side, which this does not tell apart")
            rounds[depth] = int(test[1])
    if not bundles or not bundles.keys() <= rounds.keys():
        raise ValueError(f"{path} has no bundles, or a loop whose number of rounds is not known")
    return sum(count * prod(rounds[outer] for outer in range(depth + 1)) for depth, count in bundles.items())
