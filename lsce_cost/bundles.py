"""Instruction bundles of a TPU's program, as its compiler schedules them.

A core starts about one bundle in a cycle. The compiler writes the bundles of each kernel into a file, with the loops
that they are in.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Each pass of the compiler has its own files; without the expression a hundred times as many are written.
FLAGS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=^final_bundles$"
_FILE = re.compile(r"\d+-(.+)-\d+-final_bundles\.txt")
# A line with a bundle: its address, a mark of a loop's begin or of a branch, one > for each loop that it is in.
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*((?:>\s*)*)\{")
_ROUNDS = re.compile(r"scmp\.\w+\.s32\.totalorder %\w+, (\d+) /\* loop exit test")
_LOOP_BEGINS = "LB"


@dataclass
class _Loop:
    """A loop, or what is in none: bundles of one round."""

    bundles: int = 0
    rounds: int | None = None


class _Schedule:
    """The loops that are open at a line, from the outermost; the first stands for what is in none."""

    def __init__(self) -> None:
        """Begin outside of all loops."""
        self.open = [_Loop(rounds=1)]

    def add(self, depth: int, begins: bool, tests: list[str]) -> None:
        """Add a bundle.

        Args:
            depth: in how many loops it is.
            begins: whether the innermost of them begins with it.
            tests: the numbers of rounds that it tests.
        """
        # Bundles that are in no loop also stand between those of one, and do not end it.
        if depth:
            self.close(depth - begins)
        if begins:
            self.open.append(_Loop())
        if depth >= len(self.open) == 1:
            raise ValueError("a loop without a beginning")
        # Single bundles of a loop may be marked as if they were in another one within it.
        loop = self.open[min(depth, len(self.open) - 1)]
        loop.bundles += 1
        for rounds in tests:
            if loop.rounds is not None:
                raise ValueError("a loop with two exit tests")
            loop.rounds = int(rounds)

    def close(self, depth: int) -> None:
        """Add loops to the ones around them, until so many are open."""
        while len(self.open) - 1 > depth:
            loop = self.open.pop()
            if loop.rounds is None:
                raise ValueError("a loop whose number of rounds is not known")
            self.open[-1].bundles += loop.bundles * loop.rounds


def schedules(files: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """Yield name and file of each kernel; what sets the core up, and tables of the schedule, are others."""
    for path in files:
        found = _FILE.fullmatch(path.name)
        if found and not found[1].startswith(("<late-", "TLP")) and not found[1].endswith("schedule-analysis"):
            yield found[1], path


def count_bundles(path: Path) -> int:
    """Return how many bundles a kernel executes: those in a loop count once for each round.

    Raises:
        ValueError: the file has another form than this knows.
    """
    schedule = _Schedule()
    try:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            found = _BUNDLE.match(line)
            if found is not None:
                schedule.add(found[2].count(">"), found[1] == _LOOP_BEGINS, _ROUNDS.findall(line))
        schedule.close(0)
    except ValueError as error:
        raise ValueError(f"{path} has {error}") from None
    if not schedule.open[0].bundles:
        raise ValueError(f"{path} has no bundles")
    return schedule.open[0].bundles
