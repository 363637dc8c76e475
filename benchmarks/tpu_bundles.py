"""What an accurate exp would cost on TPUs that are not there: instruction bundles, as their compiler schedules them.

A TPU starts about one bundle in a cycle. The compiler writes the bundles of each fusion into a file, with the loops
that they are in. Needs libtpu, and its flags and environment set before the import: see `benchmarks.__main__.tpu_exp`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
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
# A line with a bundle: its address, a mark (LB where a loop begins), one > for each loop that it is in, instructions.
BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*((?:>\s*)*)\{")
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
            files = list(schedules(set(dump.iterdir()) - before))
            if not files:
                raise ValueError(f"the compiler has written no schedule to {dump} for {topology}")
            costs.append(BundleCost(topology, name, sum(map(count_bundles, files))))
    jax.clear_caches()
    return costs


def schedules(files: set[Path]) -> Iterator[Path]:
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
    program = _Loop(0, rounds=1)
    open_loops = [program]
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        found = BUNDLE.match(line)
        if found is None:
            continue
        depth = found[2].count(">")
        # A loop ends behind its test. Single bundles may be marked as if they were in another loop.
        while (
            open_loops[-1].rounds
            and open_loops[-1].depth > depth - (found[1] == "LB")
            and open_loops[-1] is not program
        ):
            _close(open_loops)
        if found[1] == "LB":
            open_loops.append(_Loop(depth))
        open_loops[-1].bundles += 1
        for test in ROUNDS.finditer(line):
            if open_loops[-1].rounds:
                raise ValueError(f"{path} tests twice whether one loop ends, which this does not know")
            open_loops[-1].rounds = int(test[1])
    while len(open_loops) > 1:
        if not open_loops[-1].rounds:
            raise ValueError(f"{path} has a loop whose number of rounds is not known")
        _close(open_loops)
    if not program.bundles:
        raise ValueError(f"{path} has no bundles")
    return program.bundles


@dataclass
class _Loop:
    """A loop, or all of a program."""

    depth: int
    bundles: int = 0  # of one round
    rounds: int = 0  # 0 until it is known


def _close(open_loops: list[_Loop]) -> None:
    """Add what the innermost loop executes to the loop that it is in."""
    loop = open_loops.pop()
    open_loops[-1].bundles += loop.bundles * loop.rounds
