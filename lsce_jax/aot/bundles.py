"""Instruction bundles of a TPU's program, as its compiler schedules them.

A core starts about one bundle in a cycle. The compiler writes the bundles of each kernel into a file, with the loops
that they are in.
"""

import re
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path

# Each pass of the compiler has its own files; without the expression a hundred times as many are written.
FLAGS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=^final_bundles$"
_FILE = re.compile(r"\d+-(.+)-\d+-final_bundles\.txt")
# A line with a bundle: its address, a mark of a loop's begin or end, one > for each loop that it is in, instructions.
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*((?:>\s*)*)\{")
_ROUNDS = re.compile(r"scmp\.\w+\.s32\.totalorder %\w+, (\d+) /\* loop exit test")


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
    bundles: dict[int, int] = {}  # by the number of loops that they are in
    rounds: dict[int, int] = {0: 1}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        found = _BUNDLE.match(line)
        if found is None:
            continue
        depth = found[1].count(">")
        bundles[depth] = bundles.get(depth, 0) + 1
        for test in _ROUNDS.finditer(line):
            if depth in rounds:
                raise ValueError(f"{path} has two loops side by side, which this does not tell apart")
            rounds[depth] = int(test[1])
    if not bundles or not bundles.keys() <= rounds.keys():
        raise ValueError(f"{path} has no bundles, or a loop whose number of rounds is not known")
    return sum(count * prod(rounds[outer] for outer in range(depth + 1)) for depth, count in bundles.items())
