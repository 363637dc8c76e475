"""Reads a record of `benchmarks all`: who is compared with whom, and how much of a ratio is noise.

A ratio is that of two losses that took turns in one process, round by round: a machine that gets slower changes both.
"""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

from benchmarks.engines.machine import READ, READ_WRITE
from benchmarks.engines.sessions import SESSIONS
from benchmarks.pages import device_report
from benchmarks.pages.tables import shape_text

Record = dict[str, Any]  # figures["all"]
Row = dict[str, Any]
WITH_GRADIENT, ALONE = "loss and gradient", "loss alone"
MEASURES = (WITH_GRADIENT, ALONE)
# With three rounds each, all of the new are above all of the old by chance once in 20 times, and with five once in 252.
LEAST_ROUNDS = 3


class Ratio(NamedTuple):
    """How much longer one loss takes than another.

    Args:
        value: the median over the rounds.
        least, largest: of the rounds.
        rounds: how many there are.
    """

    value: float
    least: float
    largest: float
    rounds: int

    def __str__(self) -> str:
        """Return it with its spread.

        Example:
            >>> print(Ratio(0.5, 0.45, 0.6, 5))
            0.50 (0.45-0.60)
        """
        return f"{self.value:.2f} ({self.least:.2f}-{self.largest:.2f})"


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Return the ratio of two losses, from the seconds of their rounds."""
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios), len(ratios))


def renewed(figures: dict[str, Any], newer: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of all sessions, those of some in newer figures, which then say when they were measured."""
    machine = newer["machine"]
    measured = f"measured on {machine['date']}, commit {machine.get('commit', 'unknown')}"
    found = {each["name"]: each for each in figures["all"]["sessions"]}
    found |= {each["name"]: {**each, "measured": measured} for each in newer["all"]["sessions"]}
    absent = {name: reason for name, reason in figures["all"]["absent"].items() if name not in found}
    in_order = [found[session.name] for session in SESSIONS if session.name in found]
    return {**figures, "all": {**figures["all"], "sessions": in_order, "absent": absent}}


class Timed(NamedTuple):
    """One loss at one size, one measure.

    Args:
        session: the name of the session.
        part: of the record.
        measure: one of `MEASURES`.
        row: of the part.
        seconds: of the rounds.
        status: one of `checks.STATUSES`; None if it was not checked.
    """

    session: str
    part: dict[str, Any]
    measure: str
    row: Row
    seconds: list[float]
    status: str | None

    @property
    def name(self) -> str:
        """The name of the loss."""
        name: str = self.row["name"]
        return name

    @property
    def place(self) -> str:
        """Where it was measured, in words."""
        return f"{self.session}, {place_of(self.part)}, {self.measure}"


def place_of(part: dict[str, Any]) -> str:
    """Return the size and dtype of a part, in words."""
    layer = "" if part["kind"] == "dense" else "layer "
    return f"{layer}{shape_text(part['shape'])} {device_report.SHORT[part['dtype']]}"


def timed_parts(session: dict[str, Any], grows: str | None = None) -> list[dict[str, Any]]:
    """Return the parts of a session that were timed: those of the tables, or those of one growing size."""
    return [part for part in session["parts"] if part["stage"] == "time" and part.get("grows") == grows]


def groups(record: Record) -> Iterator[list[Timed]]:
    """Yield what took turns: the losses of each session, size and measure, the first first."""
    for session in record["sessions"]:
        for part in (part for grows in (None, "rows", "classes") for part in timed_parts(session, grows)):
            for measure in MEASURES:
                group = list(losses_of(session, part, measure))
                if group:
                    yield group


def losses_of(session: dict[str, Any], part: dict[str, Any], measure: str) -> Iterator[Timed]:
    """Yield the losses of a part that have times of a measure."""
    for row in part["rows"]:
        times = row if measure == WITH_GRADIENT else row.get("alone", {})
        if "seconds" in times:
            status = device_report.status_of(row, part, session["parts"])
            yield Timed(session["name"], part, measure, row, times["seconds"], status)


def baseline_of(group: Sequence[Timed]) -> Timed | None:
    """Return the loss that the others are compared with; None if it has no times."""
    return next((each for each in group if each.name == device_report.BASELINES[each.part["framework"]]), None)


def floor_seconds(part: dict[str, Any], measure: str) -> float | None:
    """Return the seconds that the memory needs alone, or None if they were not taken."""
    floor = part.get("floors", {}).get(READ if measure == ALONE else READ_WRITE)
    return None if floor is None else median(floor["seconds"])


def figures_of(session: dict[str, Any], stage: str, kind: str, dtype: str) -> dict[str, Row]:
    """Return the rows of the part of a stage, by the names of the losses."""
    return {
        row["name"]: row
        for part in session["parts"]
        if (part["stage"], part["kind"], part["dtype"]) == (stage, kind, dtype) and "grows" not in part
        for row in part["rows"]
    }


# --- Where others are better ----------------------------------------------------------------------------------------


class Lost(NamedTuple):
    """Another library's loss that is better than ours in one respect.

    Args:
        place: where, in words.
        name: of the other loss.
        text: by how much, in words, and of ours which is best there.
        smoothed: whether the other has smoothing; one without does less.
    """

    place: str
    name: str
    text: str
    smoothed: bool

    def __str__(self) -> str:
        """Return it as a line of a list."""
        return f"{self.place}: `{self.name}` {self.text}"


def lost(record: Record) -> Iterator[Lost]:
    """Yield where others are faster than the fastest of ours in every round, or need less memory, or err less."""
    for group in groups(record):
        yield from _slower(group)
    for session in record["sessions"]:
        for kind in ("dense", "linear"):
            for dtype in ("float32", "bfloat16"):
                yield from _larger(session, kind, dtype)
                yield from _less_accurate(session, kind, dtype)


def _slower(group: Sequence[Timed]) -> Iterator[Lost]:
    right = [timed for timed in group if timed.status != "wrong"]
    ours = min((timed for timed in right if timed.row["ours"]), key=lambda timed: median(timed.seconds), default=None)
    if ours is None:
        return
    for other in right:
        ratio = ratio_of(other.seconds, ours.seconds)
        if not other.row["ours"] and ratio.largest < 1:
            text = f"takes {ratio} of the time of `{ours.name}`"
            yield Lost(ours.place, other.name, text, other.row["smoothing"] > 0)


def _larger(session: dict[str, Any], kind: str, dtype: str) -> Iterator[Lost]:
    rows = [row for row in figures_of(session, "memory", kind, dtype).values() if "memory" in row]
    ours = min((row for row in rows if row["ours"]), key=lambda row: row["memory"], default=None)
    if ours is None:
        return
    place = f"{session['name']}, {kind}, {device_report.SHORT[dtype]}, memory"
    # Pages, and what an allocator keeps, are a few MB.
    for row in rows:
        if not row["ours"] and row["memory"] + 2**22 < ours["memory"]:
            text = f"takes {row['memory'] / 1e6:.0f} MB, `{ours['name']}` {ours['memory'] / 1e6:.0f} MB"
            yield Lost(place, row["name"], text, row["smoothing"] > 0)


def _less_accurate(session: dict[str, Any], kind: str, dtype: str) -> Iterator[Lost]:
    rows = [row for row in figures_of(session, "check", kind, dtype).values() if "worst_ulps" in row]
    ours = min((row for row in rows if row["ours"]), key=lambda row: row["worst_ulps"], default=None)
    if ours is None:
        return
    place = f"{session['name']}, {kind}, {device_report.SHORT[dtype]}, worst error of the gradient"
    for row in rows:
        # To the digits that are shown.
        if not row["ours"] and round(row["worst_ulps"], 2) < round(ours["worst_ulps"], 2):
            text = f"is off by {row['worst_ulps']:.2f} ULP, `{ours['name']}` by {ours['worst_ulps']:.2f}"
            yield Lost(place, row["name"], text, row["smoothing"] > 0)


# --- Two records ----------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """How a ratio of ours to the first loss of its session has changed between two records.

    Args:
        place: where, in words.
        name: of our loss.
        old, new: the ratios.
    """

    place: str
    name: str
    old: Ratio
    new: Ratio

    def __str__(self) -> str:
        """Return it as a line of a list."""
        return f"{self.place}, {self.name}: {self.old}, now {self.new}: {self.growth:.2f} times as much"

    @property
    def growth(self) -> float:
        """By which factor the ratio has grown."""
        return self.new.value / self.old.value

    def is_worse(self, tolerance: float) -> bool:
        """Return whether it has grown by more than the tolerance, and every new round is above every old one."""
        return self.new.least > self.old.largest and self.growth > 1 + tolerance

    def is_better(self, tolerance: float) -> bool:
        """Return whether it has shrunk likewise."""
        return self.new.largest < self.old.least and self.growth < 1 / (1 + tolerance)


def changes(old: Record, new: Record) -> list[Change]:
    """Return the changes of all ratios that both records have.

    Raises:
        ValueError: they have none in common, or so few rounds that noise cannot be told from a change.
    """
    before, after = (_ratios(record) for record in (old, new))
    found = [Change(*key, before[key], after[key]) for key in before if key in after]
    if not found:
        raise ValueError("the two records have no loss at the same size in common")
    fewest = min(ratio.rounds for change in found for ratio in (change.old, change.new))
    if fewest < LEAST_ROUNDS:
        raise ValueError(
            f"{fewest} rounds do not tell noise from a change: measure with --rounds {LEAST_ROUNDS} or more"
        )
    return found


def _ratios(record: Record) -> dict[tuple[str, str], Ratio]:
    """Return the ratio of each of our losses to the first of its session, by place and name."""
    found: dict[tuple[str, str], Ratio] = {}
    for group in groups(record):
        baseline = baseline_of(group)
        if baseline is not None:
            found |= {
                (timed.place, timed.name): ratio_of(timed.seconds, baseline.seconds)
                for timed in group
                if timed.row["ours"]
            }
    return found
