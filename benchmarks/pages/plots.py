"""The pictures of `benchmarks all`, drawn from its record: times, scaling, memory and accuracy."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from benchmarks.pages import all_report, records
from benchmarks.pages.records import WITH_GRADIENT, Record, Timed

OURS, OTHERS, FLOOR = "#c23b22", "#4a6fa5", "#999999"
STYLES = (":", "-.", "--", "-")
LEAST_ULPS = 0.01  # errors of less are drawn here


def draw(figures: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Draw all pictures of a record that it has figures for; return their files.

    Args:
        figures: the record.
        folder: for the pictures.
        name: of the machine, in the names of the files.
    """
    record: Record = figures["all"]
    pictures = {"time": _times, "scaling": _scaling, "memory": _memory_and_accuracy}
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for kind, make in pictures.items():
        figure = make(record)
        if figure is not None:
            path = folder / all_report.picture_file(name, kind)
            figure.savefig(path, dpi=100, metadata={"Software": None})
            drawn.append(path)
    return drawn


def _colour(row: dict[str, Any]) -> str:
    return OURS if row["ours"] else OTHERS


# --- Times ----------------------------------------------------------------------------------------------------------


def _times(record: Record) -> Figure | None:
    """Draw a panel for each session: a dot for each loss and size, with the least and the largest ratio.

    All have the scale of the widest: one that spans a factor of less than two would have no number but 1.
    """
    panels = [(session, _ratios(session)) for session in record["sessions"]]
    panels = [(session, ratios) for session, ratios in panels if ratios]
    if not panels:
        return None
    heights = [len({timed.name for _, group in ratios for timed in group}) + 2 for _, ratios in panels]
    figure = Figure(figsize=(9, 0.27 * sum(heights) + 1), layout="constrained")
    for axes, (session, ratios) in zip(
        figure.subplots(len(panels), 1, height_ratios=heights, sharex=True, squeeze=False)[:, 0], panels, strict=True
    ):
        _draw_times(axes, ratios)
        axes.set_title(session["name"], loc="left", fontsize=10)
    axes.set_xlabel("time of loss and gradient, relative to the grey line; dots: median of the rounds")
    return figure


def _ratios(session: dict[str, Any]) -> list[tuple[str, list[Timed]]]:
    """Return the groups of a session whose first loss has times, by size."""
    found = []
    for part in records.timed_parts(session):
        group = [each for each in records.losses_of(session, part, WITH_GRADIENT) if each.status != "wrong"]
        if group and records.baseline_of(group) is not None:
            found.append((records.place_of(part), group))
    return found


def _draw_times(axes: Axes, ratios: Sequence[tuple[str, list[Timed]]]) -> None:
    rows = {timed.name: timed.row for _, group in ratios for timed in group}
    places = {name: i for i, name in enumerate(reversed(rows))}
    for i, (place, group) in enumerate(ratios):
        baseline = records.baseline_of(group)
        if baseline is None:
            continue
        offset = 0.6 * ((i + 0.5) / len(ratios) - 0.5)
        grey = 0.2 + 0.6 * i / max(1, len(ratios) - 1)
        for timed in group:
            ratio = records.ratio_of(timed.seconds, baseline.seconds)
            height = places[timed.name] - offset
            axes.plot([ratio.least, ratio.largest], [height] * 2, color=_colour(timed.row), linewidth=1)
            label = place if timed is group[0] else None
            axes.plot(
                ratio.value, height, "o", markersize=4, markeredgewidth=0.6, color=str(grey),
                markeredgecolor=_colour(timed.row), label=label,
            )  # fmt: skip
    axes.axvline(1, color=FLOOR, linewidth=1)
    axes.set(xscale="log", yticks=list(places.values()), yticklabels=list(places))
    for tick, name in zip(axes.get_yticklabels(), places, strict=True):
        tick.set(color=_colour(rows[name]), fontsize=8)
    _plain_numbers(axes.xaxis, "25")
    axes.tick_params(which="both", labelbottom=True)
    axes.grid(axis="x", which="both", linewidth=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _plain_numbers(axis: Axis, minor: str) -> None:
    """Write plain numbers at the ticks of a logarithmic axis. A minor tick has one if its first digit is in `minor`."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in minor else "")
    axis.set_tick_params(which="both", labelsize=8)


# --- Scaling --------------------------------------------------------------------------------------------------------


def _scaling(record: Record) -> Figure | None:
    """Draw the time for a logit, a row of panels for each session, a column for each size that grows."""
    panels = [session for session in record["sessions"] if records.timed_parts(session, "rows")]
    if not panels:
        return None
    figure = Figure(figsize=(10, 3.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 2, sharey="row", squeeze=False)
    for row, session in zip(axes, panels, strict=True):
        for place, grows in zip(row, ("rows", "classes"), strict=True):
            _draw_scaling(place, session, grows)
        row[0].set_ylabel("loss and gradient, ns for a logit")
        row[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def _draw_scaling(axes: Axes, session: dict[str, Any], grows: str) -> None:
    parts = records.timed_parts(session, grows)
    sizes = [part["shape"][0 if grows == "rows" else 1] for part in parts]
    rows = {row["name"]: row for part in parts for row in part["rows"]}
    counts = {True: 0, False: 0}
    for name, row in rows.items():
        times = [all_report.nanoseconds(part, name) for part in parts]
        counts[row["ours"]] += 1
        number = counts[row["ours"]] - 1
        colour = OURS if row["ours"] else f"C{number + (number >= 3)}"  # C3 is that of ours
        known = [(size, time) for size, time in zip(sizes, times, strict=True) if time is not None]
        style = STYLES[-1 - number % len(STYLES)]
        width = 2 if row["ours"] else 1
        axes.plot(*zip(*known, strict=True), marker=".", color=colour, linestyle=style, linewidth=width, label=name)
    floors = {part["shape"][0] * part["shape"][1]: records.floor_seconds(part, WITH_GRADIENT) for part in parts}
    of_logit = [1e9 * floor / logits for logits, floor in floors.items() if floor is not None]
    if len(of_logit) == len(sizes):
        axes.plot(sizes, of_logit, color=FLOOR, label="floor: read and write")
    other = parts[0]["shape"][1 if grows == "rows" else 0]
    fixed = "classes" if grows == "rows" else "rows"
    axes.set(xscale="log", yscale="log", xlabel=f"{grows}, with {other} {fixed}")
    axes.set_xticks(sizes, map(str, sizes))
    axes.set_xticks([], minor=True)
    _plain_numbers(axes.yaxis, "25")
    axes.set_title(session["name"], loc="left", fontsize=10)
    axes.grid(which="major", linewidth=0.3)


# --- Memory and accuracy --------------------------------------------------------------------------------------------


def _memory_and_accuracy(record: Record) -> Figure | None:
    """Draw bars for each loss of logits: memory in float32, and the worst error in float32 and bfloat16."""
    rows = [
        (session, name, row)
        for session in record["sessions"]
        for name, row in records.figures_of(session, "memory", "dense", "float32").items()
        if "memory" in row
    ]
    if not rows:
        return None
    figure = Figure(figsize=(10, 0.26 * len(rows) + 1.2), layout="constrained")
    memory, *errors = figure.subplots(1, 3, sharey=True)
    heights = range(len(rows), 0, -1)
    memory.barh(heights, [row["memory"] / 1e6 for *_, row in rows], color=[_colour(row) for *_, row in rows])
    memory.set(yticks=list(heights), ylim=(0.3, len(rows) + 0.7), xlabel="MB beyond the logits, float32")
    memory.set_yticklabels([f"{name}  ({session['name']})" for session, name, _ in rows], fontsize=8)
    for axes, dtype in zip(errors, ("float32", "bfloat16"), strict=True):
        checked = [records.figures_of(session, "check", "dense", dtype).get(name, {}) for session, name, _ in rows]
        _draw_errors(axes, [*zip(heights, (row for *_, row in rows), checked, strict=True)])
        axes.set_xlabel(f"error of the gradient, ULP, {dtype}\ndot: worst, line: median")
    return figure


def _draw_errors(axes: Axes, rows: Sequence[tuple[int, dict[str, Any], dict[str, Any]]]) -> None:
    """Draw worst and median errors of losses, each with its height and its colour's row."""
    drawn = [LEAST_ULPS, 1.0]
    for height, row, checked in rows:
        for key, marker, size in (("worst_ulps", "o", 5), ("median_ulps", "|", 8)):
            if key in checked and math.isfinite(checked[key]):
                drawn.append(max(checked[key], LEAST_ULPS))
                axes.plot(drawn[-1], height, marker, color=_colour(row), markersize=size)
    axes.set(xscale="log", xlim=(LEAST_ULPS, 10 ** math.ceil(math.log10(1.1 * max(drawn)))))
    _plain_numbers(axes.xaxis, "")
    axes.grid(axis="x", linewidth=0.3)
