"""The engine of `benchmarks all`: runs the sessions one after another, and yields what each part finds.

The parts of a session are done by the processes of `device_worker`: first the truth, then memory, with a process for
each loss, then time. What losses need of memory decides which of them are left out where the logits are largest.
"""

import os
import re
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.engines import device, sessions
from benchmarks.engines.device import Part
from benchmarks.engines.environments import InstallError, python_of, versions_in
from benchmarks.engines.sessions import COLD, Session
from benchmarks.engines.timing import BYTES

Found = dict[str, Any]
# Modules, with what is imported before them, in the order of the table.
IMPORTS = (
    ("torch", ""),
    ("lsce_torch", "torch"),
    ("timm.loss", "torch"),
    ("keras", "torch"),
    ("jax", ""),
    ("lsce_jax", "jax"),
    ("optax", "jax"),
    ("keras", "jax"),
)
IMPORT_RUNS = 3


def measure(session: Session, patterns: Sequence[str], rounds: int, quick: bool) -> Iterator[Found]:
    """Yield {"versions"} of a session, and each part with what was found; {"absent"}, with the reason, ends it."""
    try:
        python = python_of(_slug(session.name), session.requirements, not quick) if session.requirements else None
    except InstallError as error:
        yield {"absent": str(error)}
        return
    python = python or Path(sys.executable)
    yield {"versions": versions_in(python, session.libraries)}
    work = _Work(session, python, patterns, quick)
    checked = yield from _kept(work(sessions.check_parts(session, quick)))
    if any("absent" in each for each in checked):
        return
    names = {kind: _names(checked, kind, work) for kind in session.kinds}
    memory = yield from _kept(_memory(work, sessions.memory_parts(session, quick), names))
    needs = {(part["kind"], part["dtype"]): _needs(part) for part in memory}
    parts = sessions.time_parts(session, quick, rounds)
    yield from work([{**part, "needs": needs.get((part["kind"], part["dtype"]), {})} for part in parts])


def _slug(name: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


class _Work:
    """Does parts of a session in processes of its environment."""

    def __init__(self, session: Session, python: Path, patterns: Sequence[str], quick: bool) -> None:
        self.session, self.python, self.patterns, self.quick = session, python, patterns, quick

    def __call__(self, parts: Sequence[Part], patterns: Sequence[str] = ()) -> Iterator[Found]:
        options = {"rounds": 1, "calls": 1, "few_calls": 1, "quick": self.quick, "session": self.session.name}
        found = device.measure(
            self.session.framework,
            "cpu",
            parts,
            (str(self.python), "-m", "benchmarks.engines.device_worker"),
            {**COLD, **self.session.variables},
            patterns=list(patterns or self.patterns),
            **options,
        )
        yield from (each for each in found if "card" not in each)


def _kept(found: Iterator[Found]) -> Generator[Found, None, list[Found]]:
    """Yield what is found, and return all of it."""
    kept = []
    for each in found:
        kept.append(each)
        yield each
    return kept


def _names(checked: Sequence[Found], kind: str, work: _Work) -> list[str]:
    """Return the losses of a kind that gave a result; in a quick run the first and ours."""
    rows = [row for part in checked if part.get("kind") == kind for row in part["rows"] if "failed" not in row]
    names = list(dict.fromkeys(row["name"] for row in rows))
    ours = {row["name"] for row in rows if row["ours"]}
    return [name for i, name in enumerate(names) if not work.quick or i == 0 or name in ours][
        : 2 if work.quick else None
    ]


def _memory(work: _Work, parts: Sequence[Part], names: dict[str, list[str]]) -> Iterator[Found]:
    """Yield each part with a row for each loss, from a process for each."""
    for part in parts:
        rows: list[dict[str, Any]] = []
        for name in names[part["kind"]]:
            exactly = re.sub(r"([*?[])", r"[\1]", name)
            rows += [row for found in work([part], [exactly]) for row in found.get("rows", ())]
        yield {**part, "rows": rows, "missing": {}}


def _needs(part: Found) -> dict[str, float]:
    """Return the memory that losses need beyond the logits, as multiples of them."""
    rows, *_, classes = part["shape"]
    size = rows * classes * BYTES[part["dtype"]]
    return {row["name"]: row["memory"] / size for row in part["rows"] if "memory" in row}


# --- Imports --------------------------------------------------------------------------------------------------------


def import_times(quick: bool) -> list[dict[str, Any]]:
    """Return how long modules take to be imported, in fresh processes: alone, or after their framework.

    The files are in the system's cache, except perhaps the first time, which the median leaves out.
    """
    found = []
    for module, first in IMPORTS[:2] if quick else IMPORTS:
        runs = [_import_seconds(module, first) for _ in range(1 if quick else IMPORT_RUNS)]
        row: dict[str, Any] = {"module": module, "after": first}
        if any(isinstance(run, str) for run in runs):
            row["failed"] = next(run for run in runs if isinstance(run, str))
        else:
            row["seconds"] = median(run for run in runs if isinstance(run, float))
        found.append(row)
    return found


def _import_seconds(module: str, first: str) -> float | str:
    """Return the seconds, or why there are none."""
    before = f"import {first}\n" if first else ""
    code = f"import time\n{before}start = time.perf_counter()\nimport {module}\nprint(time.perf_counter() - start)"
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "KERAS_BACKEND": first or "torch"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        return done.stderr.strip().splitlines()[-1]
    return float(done.stdout.split()[-1])


def selected(names: Sequence[str]) -> list[Session]:
    """Return the sessions with these names, with * and ?; all without a name.

    Raises:
        ValueError: a name is that of no session.
    """
    known = [session.name for session in sessions.SESSIONS]
    if unknown := [name for name in names if not any(fnmatch(each, name) for each in known)]:
        raise ValueError(f"there is no session {unknown[0]!r}; the sessions are {', '.join(known)}")
    return [each for each in sessions.SESSIONS if not names or any(fnmatch(each.name, name) for name in names)]
