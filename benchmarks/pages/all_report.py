"""The tables of `benchmarks all`: in a terminal one for each part, in the page one for each session and measure."""

from collections.abc import Iterator, Sequence
from statistics import median
from textwrap import fill
from typing import Any

from benchmarks.engines.machine import READ, READ_WRITE
from benchmarks.engines.sessions import MEMORY_SHAPES, NEEDS_GPU
from benchmarks.engines.timing import BYTES
from benchmarks.pages import device_report, records
from benchmarks.pages.device_report import MARKS, SHORT
from benchmarks.pages.records import ALONE, MEASURES, WITH_GRADIENT, Record, Timed
from benchmarks.pages.tables import Table, mb, shape_text, three_digits

Figures = dict[str, Any]
MARKS_LEGEND = device_report.LEGEND
FLOOR_LEGEND = "of floor: its share of the time. It reads the logits once, and for the gradient writes as much."
MISSING_CELL = "–"
WIDE_CLASSES = 2**18  # of the harness's case "wide"
# Drawn by `plots`.
PICTURES = {
    "time": "Times of loss and gradient, relative to the first loss of each session",
    "scaling": "Time for a logit, where rows grow and where classes grow",
    "memory": "Memory of loss and gradient, and errors of the gradient",
}


def picture_file(name: str, kind: str) -> str:
    """Return the name of the file of a picture."""
    return f"bench-{name}-{kind}.png"


# --- Tables of a terminal -------------------------------------------------------------------------------------------


def tables(figures: Figures) -> Iterator[Table]:
    """Yield all tables of a record, as the terminal shows them."""
    record: Record = figures["all"]
    for session in record["sessions"]:
        for part in session["parts"]:
            if "grows" not in part:
                yield from part_tables(session, part)
        yield from scaling_tables(session)
    if record["imports"]:
        yield import_table(record)


def part_tables(session: dict[str, Any], part: dict[str, Any]) -> Iterator[Table]:
    """Yield the tables of one part."""
    if part["stage"] == "check":
        yield _accuracy_table(session, part)
    elif part["stage"] == "memory":
        yield _memory_table(session, part)
    else:
        for measure in reversed(MEASURES):
            group = list(records.losses_of(session, part, measure))
            if group or measure == WITH_GRADIENT:
                yield _time_table(session, part, measure, group)


def _title(session: dict[str, Any], part: dict[str, Any], what: str) -> str:
    size = f"{shape_text(part['shape'])}, " if part["shape"] else ""
    return f"{session['name']}: {part['kind']}, {size}{part['dtype']}: {what}"


def _accuracy_table(session: dict[str, Any], part: dict[str, Any]) -> Table:
    cells = []
    for row in part["rows"]:
        if "failed" in row:
            cells.append((row["name"], "", *[MISSING_CELL] * 3))
            continue
        ulps = (f"{row[key]:.2f}" if key in row else MISSING_CELL for key in ("worst_ulps", "median_ulps"))
        cells.append((row["name"], MARKS[row["status"]], *ulps, f"{row['loss_error']:.1e}"))
    headings = ("loss", "", "worst ULP", "median ULP", "loss, relative")
    legend = (
        "Errors against the truth of the harness. ULP: of the gradient with respect to the logits, in units of the "
        f"spacing of numbers at the larger of its two terms. {device_report.ERRORS}"
    )
    return Table(_title(session, part, "accuracy"), headings, cells, "\n".join([legend, *notes([part])]))


def _memory_table(session: dict[str, Any], part: dict[str, Any]) -> Table:
    rows, *_, classes = part["shape"]
    logits = rows * classes * BYTES[part["dtype"]]
    cells = [
        (row["name"], mb(row["memory"]), f"{row['memory'] / logits:.2f}")
        if "memory" in row
        else (row["name"], MISSING_CELL, MISSING_CELL)
        for row in part["rows"]
    ]
    legend = "The most memory of a process of its own during loss and gradient, beyond what it had before."
    headings = ("loss", "MB", "÷ logits")
    return Table(_title(session, part, "memory"), headings, cells, "\n".join([legend, *notes([part])]))


def _time_table(session: dict[str, Any], part: dict[str, Any], measure: str, group: Sequence[Timed]) -> Table:
    """Return times of a measure, their ratios to the first, and the share of the floor."""
    by_name = {timed.name: timed for timed in group}
    baseline = records.baseline_of(group)
    cells = []
    for row in part["rows"]:
        timed = by_name.get(row["name"])
        compiled = _compile_cell(row) if measure == WITH_GRADIENT else ""
        if timed is None:
            cells.append((row["name"], "", *[MISSING_CELL] * 3, compiled))
            continue
        ratio = MISSING_CELL
        if baseline is not None and timed.status != "wrong":
            ratio = f"{records.ratio_of(timed.seconds, baseline.seconds).value:.2f}"
        mark = MARKS[timed.status] if timed.status else "?"
        cells.append((row["name"], mark, three_digits(1e3 * median(timed.seconds)), ratio, _share(timed), compiled))
    cells += [(name, "GPU", *[MISSING_CELL] * 3, "") for name in needing_gpu([part])]
    floor = records.floor_seconds(part, measure)
    if floor is not None:
        name = READ if measure == ALONE else READ_WRITE
        cells.append((f"floor: {name}", "", three_digits(1e3 * floor), "", "", ""))
    headings = (measure, "", "ms", "÷ first", "of floor", "compile s")
    first = device_report.BASELINES[part["framework"]]
    legend = [f"÷ first: by the time of {first}. {FLOOR_LEGEND}", MARKS_LEGEND]
    legend += notes([part]) if measure == WITH_GRADIENT else []
    return Table(_title(session, part, "time"), headings, cells, "\n".join(legend), int(floor is not None))


def _share(timed: Timed) -> str:
    floor = records.floor_seconds(timed.part, timed.measure)
    return MISSING_CELL if floor is None else f"{100 * floor / median(timed.seconds):.0f} %"


def _compile_cell(row: dict[str, Any]) -> str:
    return f"{row['compile_s']:.1f}" if "compile_s" in row else ""


def scaling_tables(session: dict[str, Any]) -> Iterator[Table]:
    """Yield the time for a logit where rows grow, and where classes grow."""
    for grows in ("rows", "classes"):
        parts = records.timed_parts(session, grows)
        if parts:
            yield _scaling_table(session, parts, grows)


def _scaling_table(session: dict[str, Any], parts: Sequence[dict[str, Any]], grows: str) -> Table:
    names = list(dict.fromkeys(row["name"] for part in parts for row in part["rows"]))
    cells = []
    for name in names:
        times = [nanoseconds(part, name) for part in parts]
        cells.append((name, *(MISSING_CELL if time is None else three_digits(time) for time in times)))
    sizes = [str(part["shape"][0 if grows == "rows" else 1]) for part in parts]
    other = parts[0]["shape"][1 if grows == "rows" else 0]
    title = f"{session['name']}: loss and gradient where {grows} grow, float32: ns for a logit"
    fixed = "classes" if grows == "rows" else "rows"
    return Table(title, ("loss", *sizes), cells, f"{other} {fixed}. {MARKS_LEGEND}")


def nanoseconds(part: dict[str, Any], name: str) -> float | None:
    """Return the time of a loss with its gradient, for each logit; None if it has none."""
    rows, classes = part["shape"]
    row = next((row for row in part["rows"] if row["name"] == name and "seconds" in row), None)
    return None if row is None else 1e9 * median(row["seconds"]) / (rows * classes)


def import_table(record: Record) -> Table:
    """Return how long imports take."""
    cells = [
        (row["module"], row["after"] or MISSING_CELL, f"{row['seconds']:.2f}" if "seconds" in row else MISSING_CELL)
        for row in record["imports"]
    ]
    failed = [f"{row['module']}: {row['failed']}" for row in record["imports"] if "failed" in row]
    return Table("Imports, in fresh processes", ("module", "after", "seconds"), cells, "\n".join(failed))


def lost_lists(record: Record) -> Iterator[tuple[str, list[str]]]:
    """Yield lists of what others do better than ours, with titles. Losses that smooth, as ours do, come first."""
    found = list(records.lost(record))
    yield "Losses with smoothing, in every round", [str(each) for each in found if each.smoothed]
    yield "Losses without smoothing, which do less, in every round", [str(each) for each in found if not each.smoothed]


def needing_gpu(parts: Sequence[dict[str, Any]]) -> list[str]:
    """Return the losses that cannot run here, but would on a GPU."""
    named = [name for part in parts for name, reason in part["missing"].items() if reason == NEEDS_GPU]
    return list(dict.fromkeys(named))


def notes(parts: Sequence[dict[str, Any]]) -> list[str]:
    """Return what failed, what is not here, and why; each once."""
    found = [f"Not measured: {part['problem']}" for part in parts if "problem" in part]
    for part in parts:
        at = f" at {records.place_of(part)}" if part["shape"] else ""
        found += [f"{row['name']}{at}: {row['failed']}" for row in part["rows"] if "failed" in row]
    missing = {name: reason for part in parts for name, reason in part["missing"].items() if reason != NEEDS_GPU}
    found += [f"{name} is not here: {reason}" for name, reason in missing.items()]
    if gpu := needing_gpu(parts):
        found.append(f"GPU: needs one, and make bench-cuda: {', '.join(gpu)}.")
    return list(dict.fromkeys(found))


# --- The page -------------------------------------------------------------------------------------------------------


def page_parts(figures: Figures, name: str) -> Iterator[str | Table]:
    """Yield the tables, pictures and lists of the page.

    Args:
        figures: the record.
        name: of the machine, in the names of the pictures.
    """
    record: Record = figures["all"]
    for kind, text in PICTURES.items():
        yield f"![{text}](images/{picture_file(name, kind)})"
    for session in record["sessions"]:
        for kind in ("dense", "linear"):
            for measure in MEASURES:
                table = _page_times(session, kind, measure)
                if table is not None:
                    yield table
            figures_table = _page_figures(session, kind)
            if figures_table is not None:
                yield figures_table
    yield import_table(record)
    yield "#### Where it loses"
    yield from _page_lost(record)
    yield "#### What was not measured"
    yield _page_notes(record)


def _versions(session: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in session["versions"].items())
    return f"{versions}; {session['measured']}" if "measured" in session else versions


def _page_times(session: dict[str, Any], kind: str, measure: str) -> Table | None:
    """Return times relative to the first, with the shapes side by side."""
    parts = [part for part in records.timed_parts(session) if part["kind"] == kind]
    groups = [list(records.losses_of(session, part, measure)) for part in parts]
    if not any(groups):
        return None
    names = list(dict.fromkeys(timed.name for group in groups for timed in group))
    cells = [(name, *(_page_cell(name, group) for group in groups)) for name in names]
    cells += [(name, NEEDS_GPU, *[""] * (len(parts) - 1)) for name in needing_gpu(parts)]
    shapes = [f"{shape_text(part['shape'])} {SHORT[part['dtype']]}" for part in parts]
    what = f"layer, {measure}" if kind == "linear" else measure
    title = f"{session['name']}: {what} ({_versions(session)})"
    legend = f"In brackets: the share of the floor. {MARKS_LEGEND}"
    return Table(title, ("time, relative to the first", *shapes), cells, fill(legend, 120))


def _page_cell(name: str, group: Sequence[Timed]) -> str:
    timed = next((timed for timed in group if timed.name == name), None)
    if timed is None:
        return MISSING_CELL
    baseline = records.baseline_of(group)
    is_first = baseline is None or timed is baseline
    ratio = None if is_first else records.ratio_of(timed.seconds, baseline.seconds).value
    return device_report.time_cell(1e3 * median(timed.seconds), ratio, _share(timed), timed.status)


def _page_figures(session: dict[str, Any], kind: str) -> Table | None:
    """Return memory, accuracy, compile time and bytes moved of each loss."""
    checks = {dtype: records.figures_of(session, "check", kind, dtype) for dtype in ("float32", "bfloat16")}
    memory = records.figures_of(session, "memory", kind, "float32")
    names = list(dict.fromkeys(name for rows in (*checks.values(), memory) for name in rows))
    if not names:
        return None
    shape = list(MEMORY_SHAPES[kind])
    timed = {
        row["name"]: (row, part)
        for part in records.timed_parts(session)
        if part["kind"] == kind and part["shape"] == shape and part["dtype"] == "float32"
        for row in part["rows"]
    }
    cells = []
    for name in names:
        row, part = timed.get(name, ({}, None))
        errors = [_ulps(checks[dtype].get(name, {})) for dtype in checks] if kind == "dense" else []
        if kind == "dense":
            errors.append(_wide_ulps(checks["float32"].get(name, {})))
        losses = [_loss_error(checks[dtype].get(name, {})) for dtype in checks]
        used = memory.get(name, {})
        used_text = f"{mb(used['memory'])} MB" if "memory" in used else MISSING_CELL
        cells.append((name, used_text, *errors, *losses, _compile_cell(row) or MISSING_CELL, _moved(row, part)))
    headings = (
        "loss and gradient",
        f"memory, {shape_text(shape)}",
        *(("gradient, ULP, f32", "bf16", f"f32, {WIDE_CLASSES} classes") if kind == "dense" else ()),
        "loss, relative error, f32",
        "bf16",
        "compile, s",
        "moved ÷ read + write" if kind == "dense" else "moved, GB",
    )
    legend = (
        "ULP: worst and median error; of many classes the worst. Memory: the most of a process of its own, beyond what "
        "it had before. Moved: by XLA's cost analysis; not known elsewhere. Compile and moved: of "
        f"{shape_text(shape)}, float32."
    )
    return Table(f"{session['name']}, {kind}: memory, accuracy, compilation", headings, cells, fill(legend, 120))


def _ulps(row: dict[str, Any]) -> str:
    return f"{row['worst_ulps']:.1f}, {row['median_ulps']:.2f}" if "worst_ulps" in row else MISSING_CELL


def _wide_ulps(row: dict[str, Any]) -> str:
    ulps = row.get("cases", {}).get("wide", {}).get("worst_ulps")
    return MISSING_CELL if ulps is None else three_digits(ulps)


def _loss_error(row: dict[str, Any]) -> str:
    return f"{row['loss_error']:.0e}" if "loss_error" in row else MISSING_CELL


def _moved(row: dict[str, Any], part: dict[str, Any] | None) -> str:
    moved = row.get("moved")
    if not moved or part is None:
        return MISSING_CELL
    if part["kind"] == "linear":
        return f"{moved / 1e9:.2f}"
    rows, classes = part["shape"]
    return f"{moved / (2 * rows * classes * BYTES[part['dtype']]):.2f}"


def _page_lost(record: Record) -> Iterator[str]:
    for title, lines in lost_lists(record):
        wrapped = [_item(line) for line in lines]
        yield "\n".join([f"{title}:", "", *wrapped] if lines else [f"{title}: none."])


def _page_notes(record: Record) -> str:
    lines = [f"{name}: {reason}" for name, reason in record["absent"].items()]
    for session in record["sessions"]:
        lines += [f"{session['name']}: {note}" for note in notes(session["parts"])]
    return "\n".join(map(_item, lines)) or "Nothing."


def _item(line: str) -> str:
    """Return an item of a list, in lines of the page's width."""
    return fill(f"- {line}", 120, subsequent_indent="  ", break_on_hyphens=False)
