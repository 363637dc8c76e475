"""Tables of losses on one device: in a terminal one for each shape, in a page one for each framework."""

from collections.abc import Iterator, Sequence
from textwrap import fill
from typing import Any

from benchmarks.engines.timing import BYTES
from benchmarks.pages.tables import Table, mb, shape_text, three_digits

Part = dict[str, Any]
# The blocks of pages that may have no record, and the commands that write them.
BLOCKS = {"device cuda": "make bench-cuda", "device tpu": "make bench-tpu", "all": "make bench"}
BASELINES = {"torch": "F.cross_entropy", "jax": "Optax one-hot"}
TITLES = {"torch": "torch", "jax": "JAX under jit"}
KINDS = {"dense": "loss and gradient", "linear": "layer, loss, gradients"}
SHORT = {"bfloat16": "bf16", "float32": "f32"}
MARKS = {"agrees": "", "rounded": "~", "in sequence": "^", "wrong": "wrong"}
MEMORY = {"torch": "the most allocated at a time beyond the arguments", "jax": "temporary memory of the program"}
ERRORS = (
    "~: right, but rounded to the dtype of the logits on the way. ^: right, but for sums whose errors grow with the "
    "number of their terms, added one after another."
)
LEGEND = f"*: without smoothing; the others have 0.1. {ERRORS} ?: unchecked."


def block_of(figures: dict[str, Any]) -> str | None:
    """Return the name under which a record has what was found on a device; None if it has none."""
    return next((name for name in figures if name.startswith("device ")), None)


def without_record(block: str) -> str:
    """Return what a page says while there is no record."""
    return f"No such record yet: `{BLOCKS[block]}` writes it."


def tables(figures: dict[str, Any]) -> Iterator[Table]:
    """Yield a table for each part."""
    block = block_of(figures)
    parts: list[Part] = figures[block] if block else []
    for part in parts:
        yield check_table(part) if part["stage"] == "check" else time_table(part, parts, figures["limits"])


def check_table(part: Part) -> Table:
    """Return how the losses compare with the truth in a few cases."""
    names = list(dict.fromkeys(name for row in part["rows"] for name in row.get("cases", ())))
    cells = []
    for row in part["rows"]:
        cases = row.get("cases", {})
        verdicts = [_verdict(cases[name]) if name in cases else "–" for name in names]
        cells.append((row["name"], *verdicts))
    notes = _wrong([part])
    notes += [
        f"{row['name']}, {name}: {reason}"
        for row in part["rows"]
        for name, reason in row.get("no_result", {}).items()
        if "failed" not in row
    ]
    title = f"{TITLES[part['framework']]}, {part['kind']}, {part['dtype']}: against the truth"
    legend = f"The largest error as a share of its bound. {ERRORS}"
    return Table(title, ("loss", *names), cells, "\n".join([legend, *_notes([part]), *notes]))


def time_table(part: Part, parts: Sequence[Part], limits: dict[str, Any] | None) -> Table:
    """Return times and memory at one shape: the fastest that is right first."""
    baseline = _median(part, BASELINES[part["framework"]])
    rows = sorted(part["rows"], key=lambda row: _rank(row, part, parts))
    cells = []
    for row in rows:
        if "median_ms" not in row:
            cells.append((row["name"], "", "–", "–", "–", "–"))
            continue
        status = status_of(row, part, parts)
        ratio = "–" if baseline is None or status == "wrong" else f"{row['median_ms'] / baseline:.2f}"
        share = _percent(row["median_ms"], part, limits)
        times = (three_digits(row["median_ms"]), ratio, share, mb(row["memory"]))
        cells.append((row["name"], MARKS[status] if status else "?", *times))
    title = f"{TITLES[part['framework']]}, {part['kind']}, {part['dtype']}, {shape_text(part['shape'])}"
    headings = (KINDS[part["kind"]], "", "median, ms", "÷ first", f"of {_limit_name(part)}", "MB")
    first = f"÷ first: by the time of {BASELINES[part['framework']]}. {_explain(part, limits)}"
    memory = f"MB: {MEMORY[part['framework']]}."
    return Table(title, headings, cells, "\n".join([first, memory, LEGEND, *_failures([part]), *_wrong([part])]))


def status_of(row: dict[str, Any], part: Part, parts: Sequence[Part]) -> str | None:
    """Return the worse of the verdicts on what was timed and on the cases before; None if there is neither."""
    of_cases = (
        each.get("status")
        for other in parts
        if (other["stage"], other["framework"], other["kind"], other["dtype"])
        == ("check", part["framework"], part["kind"], part["dtype"])
        for each in other["rows"]
        if each["name"] == row["name"]
    )
    found = [status for status in (*of_cases, row.get("timed", {}).get("status")) if status is not None]
    return max(found, key=list(MARKS).index, default=None)


def wrong_of_ours(parts: Sequence[Part]) -> list[str]:
    """Return which of our losses are not within their bounds."""
    found = [
        f"{row['name']} ({part['framework']}, {part['kind']}, {part['dtype']})"
        for part in parts
        for row in part["rows"]
        if row["ours"] and any(status != "agrees" for status in _statuses(row))
    ]
    return list(dict.fromkeys(found))


def _statuses(row: dict[str, Any]) -> Iterator[str]:
    """Yield every verdict on a loss."""
    yield from (case["status"] for case in row.get("cases", {}).values())
    if "timed" in row:
        yield row["timed"]["status"]


def page_tables(figures: dict[str, Any]) -> list[Table]:
    """Return a table for each framework and kind, with the shapes side by side."""
    parts: list[Part] = figures[block_of(figures) or ""]
    timed = [part for part in parts if part["stage"] == "time"]
    groups = dict.fromkeys((part["framework"], part["kind"]) for part in timed)
    return [
        _page_table([part for part in timed if (part["framework"], part["kind"]) == group], parts, figures["limits"])
        for group in groups
    ]


def _page_table(columns: Sequence[Part], parts: Sequence[Part], limits: dict[str, Any] | None) -> Table:
    framework, kind = columns[0]["framework"], columns[0]["kind"]
    names = list(dict.fromkeys(row["name"] for part in columns for row in part["rows"]))
    rows = []
    for name in names:
        memory = next((row["memory"] for row in columns[0]["rows"] if row["name"] == name and "memory" in row), None)
        cells = [_page_cell(name, part, parts, limits) for part in columns]
        rows.append((name, *cells, "–" if memory is None else f"{mb(memory)} MB"))
    shapes = [f"{shape_text(part['shape'])} {SHORT[part['dtype']]}" for part in columns]
    headings = (f"{KINDS[kind]}, relative to the first", *shapes, f"memory, {shapes[0]}")
    first = f"In brackets: {_explain(columns[0], limits)} Memory: {MEMORY[framework]}."
    both = _with_checks(columns, parts)
    legend = [first, LEGEND, *_wrong(both), *_notes(both)]
    return Table(TITLES[framework], headings, rows, "\n\n".join(fill(line, 120) for line in legend))


def _with_checks(columns: Sequence[Part], parts: Sequence[Part]) -> list[Part]:
    kinds = {(part["framework"], part["kind"]) for part in columns}
    return [part for part in parts if (part["framework"], part["kind"]) in kinds]


def _page_cell(name: str, part: Part, parts: Sequence[Part], limits: dict[str, Any] | None) -> str:
    row = next((row for row in part["rows"] if row["name"] == name), None)
    if row is None or "median_ms" not in row:
        return "–"
    baseline = _median(part, BASELINES[part["framework"]])
    is_first = baseline is None or name == BASELINES[part["framework"]]
    ratio = None if is_first else row["median_ms"] / baseline
    share = _percent(row["median_ms"], part, limits)
    return time_cell(row["median_ms"], ratio, share, status_of(row, part, parts))


def time_cell(milliseconds: float, ratio: float | None, share: str, status: str | None) -> str:
    """Return a time on a page: relative to that of the first, or without a ratio in ms.

    Args:
        milliseconds: the time.
        ratio: to the first.
        share: of a limit; "unknown" or "–" if there is none.
        status: one of `checks.STATUSES`; None if the loss was not checked. What is wrong has no time.
    """
    if status == "wrong":
        return "wrong"
    bracket = "" if share in {"unknown", "–"} else f" ({share})"
    mark = MARKS[status] if status else "?"
    time = f"{three_digits(milliseconds)} ms" if ratio is None else f"{ratio:.2f}"
    return f"{time}{bracket}{mark}"


def _median(part: Part, name: str) -> float | None:
    return next((row["median_ms"] for row in part["rows"] if row["name"] == name and "median_ms" in row), None)


def _rank(row: dict[str, Any], part: Part, parts: Sequence[Part]) -> tuple[int, float]:
    """Return a key to sort by: first the right losses, fastest first, then the wrong ones, then those that failed."""
    if "median_ms" not in row:
        return 2, 0.0
    return int(status_of(row, part, parts) == "wrong"), row["median_ms"]


def _percent(milliseconds: float, part: Part, limits: dict[str, Any] | None) -> str:
    """Return the least time by the limits of the device as a share of the time."""
    if limits is None:
        return "unknown"
    return f"{100 * _least_seconds(part, limits) / (milliseconds / 1e3):.0f} %"


def _least_seconds(part: Part, limits: dict[str, Any]) -> float:
    if part["kind"] == "dense":
        rows, classes = part["shape"]
        return 2 * rows * classes * BYTES[part["dtype"]] / limits["bandwidth"]
    rows, features, classes = part["shape"]
    return 6 * rows * features * classes / limits["matrix"][part["dtype"]]


def _limit_name(part: Part) -> str:
    return "bandwidth" if part["kind"] == "dense" else "peak"


def _explain(part: Part, limits: dict[str, Any] | None) -> str:
    """Return what the share of the limit is."""
    if part["kind"] == "dense":
        what = "of bandwidth: logits read once and gradient written once"
        limit = None if limits is None else f"{limits['bandwidth'] / 1e9:.0f} GB/s"
    else:
        what = "of peak: the 6 N D K operations of three products"
        limit = None if limits is None else f"{limits['matrix'][part['dtype']] / 1e12:.0f} TFLOP/s"
    return f"{what}, by {limit} ({limits['source']})." if limits else f"{what}; the limit of this device is unknown."


def _notes(parts: Sequence[Part]) -> list[str]:
    """Return what failed, what is not here, and why; each once."""
    notes = _failures(parts)
    notes += [f"{name} is not here: {reason}" for part in parts for name, reason in part["missing"].items()]
    return list(dict.fromkeys(notes))


def _failures(parts: Sequence[Part]) -> list[str]:
    notes = [f"Not measured: {part['problem']}" for part in parts if "problem" in part]
    return notes + [f"{row['name']}: {row['failed']}" for part in parts for row in part["rows"] if "failed" in row]


def _verdict(case: dict[str, Any]) -> str:
    return f"{MARKS[case['status']]} {_share(case['share'])}".lstrip()


def _wrong(parts: Sequence[Part]) -> list[str]:
    """Return which losses are wrong where."""
    found = []
    for part in parts:
        for row in part["rows"]:
            results = dict(row.get("cases", {}))
            if "timed" in row:
                results[shape_text(part["shape"])] = row["timed"]
            found += [
                f"{row['name']} is wrong in {name}, {part['dtype']}: {result['reason']}"
                for name, result in results.items()
                if result["status"] == "wrong"
            ]
    return found


def _share(share: float | str) -> str:
    return share if isinstance(share, str) else f"{share:.2f}" if share < 1000 else f"{share:.0e}"
