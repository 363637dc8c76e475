"""Tables of figures: in a terminal, one for each shape; in a page, the shapes side by side.

Both are made from the same figures, those that `--json` writes, so that a page can be held against its record.
"""

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from textwrap import fill
from typing import Any

from rich.console import Console

from benchmarks.engines.timing import LinearShape, Row, Shape
from benchmarks.pages import all_report, device_report
from benchmarks.pages.tables import Table, markdown, mb, shape_text, three_digits
from parity_tests.evidence.environment import cpu_name

Figures = dict[str, Any]  # what a command writes as JSON

LIBRARIES = ("lsce", "jax", "optax", "torch", "libtpu")
TITLES = {"jax": "JAX under jit", "torch": "torch eager"}
ALLOCATORS = {None: "", "kept": ", pages kept"}
DENSE_HEADINGS = {
    "jax": ("median", "least", "÷ one-hot", "÷ integer", "temp MB", "ratio"),
    "torch": ("median", "÷ smoothed", "÷ plain", "peak", "sys ms", "faults"),
}
DENSE_MEMORY = {
    "jax": "allocated beyond arguments and results",
    "torch": "the most allocated at a time beyond the logits",
}
DENSE_LEGENDS = {
    "jax": f"temp: {DENSE_MEMORY['jax']}; its ratio is to one-hot's.",
    "torch": f"peak: {DENSE_MEMORY['torch']}, in gradients' sizes.\nsys, faults: time in the system and page faults.",
}
LINEAR_BASELINES = {"jax": "lse form", "torch": "F.cross_entropy, smoothed"}
LINEAR_RATIOS = {"jax": "÷ lse", "torch": "÷ ce"}
LINEAR_MEMORY = {"jax": "temp MB", "torch": "peak MB"}
LINEAR_LEGENDS = {
    "jax": "temp: allocated beyond arguments and results.\n÷ lse: by the time of the lse form; ratio: of temp to its.",
    "torch": (
        "peak: the most allocated at a time beyond the arguments, gradients included.\n"
        "÷ ce: by the time of F.cross_entropy, smoothed; ratio: of the peak to its.\n"
        "chunked: unsmoothed, since smoothed it has all logits in memory."
    ),
}
SCALING_LEGENDS = {
    "jax": "temp: allocated beyond arguments and results.",
    "torch": "peak: the most allocated at a time beyond arguments and gradients.",
}


def describe_machine(libraries: Sequence[str] = LIBRARIES) -> dict[str, Any]:
    """Return what the figures depend on: the machine, the commit, and the versions of the installed libraries."""
    versions = {}
    with suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=9", "HEAD"]
        versions["commit"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    for library in libraries:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return {
        "date": datetime.now().astimezone().date().isoformat(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load before": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else 0.0,
        "huge pages": _huge_pages(),
        "python": platform.python_version(),
        **versions,
    }


def _huge_pages() -> str:
    with suppress(OSError):
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="utf-8")
        if found := re.search(r"\[(.*)\]", setting):
            return found[1]
    return "unknown"


def print_machine(machine: dict[str, Any], console: Console) -> None:
    """Print it in running text, and whether times can be believed."""
    console.print(_as_text(machine), highlight=False)
    if machine["load before"] > 1:
        # Each operation waits for the slower of its threads: a slice of the other program's time, many times a loss.
        console.print("The machine was busy just before: losses of many short operations suffer most.", style="yellow")


def _as_text(machine: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items())


# --- Tables of a terminal -------------------------------------------------------------------------------------------


def tables(figures: Figures) -> Iterator[Table]:
    """Yield the tables of what one command measured."""
    for result in (*figures.get("dense", ()), *figures.get("small", ())):
        yield dense_table(result["framework"], Shape(*result["shape"]), _rows(result), result.get("allocator"))
    for result in figures.get("linear", ()):
        yield linear_table(result["framework"], LinearShape(*result["shape"]), _rows(result), result.get("allocator"))
    for result in figures.get("scaling", ()):
        yield scaling_table(result["framework"], [LinearShape(*shape) for shape in result["shapes"]], _rows(result))
    for result in figures.get("smoothing", ()):
        yield smoothing_table(result["framework"], LinearShape(*result["shape"]), _rows(result))
        yield smoothing_errors_table(result["framework"], LinearShape(*result["error shape"]), result["errors"])
    if "tpu" in figures:
        yield from tpu_tables(figures["tpu"], Shape(*figures["tpu shape"]))
        shape, chunk_bytes = LinearShape(*figures["tpu linear shape"]), figures["tpu linear chunk bytes"]
        yield linear_tpu_table(figures["tpu linear"], shape, chunk_bytes)
    if "tpu kernel" in figures:
        yield from kernel_tables(figures["tpu kernel"], Shape(*figures["tpu kernel shape"]))
    if "all" in figures:
        yield from all_report.tables(figures)
    yield from device_report.tables(figures)


def _rows(result: dict[str, Any]) -> list[Row]:
    return [Row(**{name: row[name] for name in Row._fields if name in row}) for row in result["rows"]]


def dense_table(framework: str, shape: Shape, rows: Sequence[Row], allocator: str | None = None) -> Table:
    """Return times and memory, and their ratios to the first two rows."""
    logits_bytes = shape.logits_bytes
    smoothed, plain = rows[:2]
    of_memory = (smoothed.memory or 1) if framework == "jax" else logits_bytes
    cells = [
        (
            *(_times_of(row) if framework == "jax" else _times_of(row)[:2]),
            f"{row.milliseconds / smoothed.milliseconds:.2f}",
            f"{row.milliseconds / plain.milliseconds:.2f}",
            *([mb(row.memory)] if framework == "jax" else []),
            f"{row.memory / of_memory:.2f}",
            *([] if framework == "jax" else [three_digits(row.system_ms), f"{row.faults:.0f}"]),
        )
        for row in rows
    ]
    title = f"{TITLES[framework]}{ALLOCATORS[allocator]}, float32, {shape_text(shape.sizes)} ({mb(logits_bytes)} MB)"
    headings = ("loss and gradient, ms", *DENSE_HEADINGS[framework])
    return Table(title, headings, cells, DENSE_LEGENDS[framework], _num_floors(rows))


def linear_table(framework: str, shape: LinearShape, rows: Sequence[Row], allocator: str | None = None) -> Table:
    """Return times and memory, and their ratios to a loss that has all logits in memory."""
    baseline = next(row for row in rows if row.name == LINEAR_BASELINES[framework])
    floor = next(row for row in rows if row.is_floor)
    cells = [
        (
            *_times_of(row),
            f"{row.milliseconds / baseline.milliseconds:.2f}",
            f"{row.milliseconds / floor.milliseconds:.2f}",
            mb(row.memory),
            f"{row.memory / baseline.memory:.2f}",
        )
        for row in rows
    ]
    logits = f"logits: {mb(shape.logits_bytes)} MB"
    title = f"{TITLES[framework]}{ALLOCATORS[allocator]}, float32, {shape_text(shape)} ({logits})"
    ratios = (LINEAR_RATIOS[framework], "÷ floor", LINEAR_MEMORY[framework], "ratio")
    headings = ("layer, loss, gradients, ms", "median", "least", *ratios)
    return Table(title, headings, cells, LINEAR_LEGENDS[framework], _num_floors(rows))


def scaling_table(framework: str, shapes: Sequence[LinearShape], rows: Sequence[Row]) -> Table:
    """Return time and memory for each number of rows."""
    _, features, classes = shapes[0]
    cells = [
        (
            *_times_of(row),
            three_digits(1e3 * row.milliseconds / shape.rows),
            mb(row.memory),
            mb(shape.logits_bytes),
        )
        for shape, row in zip(shapes, rows, strict=True)
    ]
    title = f"lsce linear, {TITLES[framework]}, float32, N x {features} x {classes}"
    headings = ("N", "median, ms", "least, ms", "µs for a row", LINEAR_MEMORY[framework], "logits MB")
    return Table(title, headings, cells, SCALING_LEGENDS[framework])


def smoothing_table(framework: str, shape: LinearShape, rows: Sequence[Row]) -> Table:
    """Return time and memory of each loss without smoothing, and with it. Rows come in pairs."""
    cells = []
    for without, smoothed in zip(rows[::2], rows[1::2], strict=True):
        ratios = (
            smoothed.milliseconds / without.milliseconds,
            smoothed.least_milliseconds / without.least_milliseconds,
        )
        memory = (mb(without.memory), mb(smoothed.memory))
        times = (three_digits(row.milliseconds) for row in (without, smoothed))
        cells.append((without.name, *times, *(f"{ratio:.2f}" for ratio in ratios), *memory))
    title = f"Smoothing added, {TITLES[framework]}, float32, {shape_text(shape)}"
    short = LINEAR_MEMORY[framework]
    headings = ("layer, loss, gradients, ms", "without", "with", "ratio", "of least", short, "with")
    legend = "Processor time of all threads, which other programs hardly change. Ratios: of medians, and of the least."
    return Table(title, headings, cells, f"{legend}\n{LINEAR_LEGENDS[framework].splitlines()[0]}")


def smoothing_errors_table(framework: str, shape: LinearShape, errors: dict[str, list[float]]) -> Table:
    """Return the errors of the smoothed losses in bfloat16."""
    cells = [(name, *(f"{error:.1e}" for error in of_parts)) for name, of_parts in errors.items()]
    title = f"Errors in bfloat16, {TITLES[framework]}, {shape_text(shape)}"
    legend = "Of a mean and its gradients: largest error over largest value, against float64 of the same inputs."
    return Table(title, ("with smoothing", "loss", "hidden", "weight"), cells, legend)


def tpu_tables(costs: Sequence[dict[str, Any]], shape: Shape) -> Iterator[Table]:
    """Yield memory and traffic, a table for each topology; topologies with the same figures share one."""
    topologies: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for topology in dict.fromkeys(cost["topology"] for cost in costs):
        cells = tuple(
            (
                cost["name"],
                cost["loss_dtype"],
                mb(cost["temp_bytes"]),
                mb(cost["accessed_bytes"]),
                f"{cost['accessed_bytes'] / cost['minimal_bytes']:.2f}",
            )
            for cost in costs
            if cost["topology"] == topology
        )
        topologies.setdefault(cells, []).append(topology)
    for cells, names in topologies.items():
        title = f"JAX compiled for one core of {', '.join(names)}, bfloat16, {shape_text(shape.sizes)}"
        headings = ("loss and gradient", "loss in", "temp MB", "accessed MB", "÷ read + write")
        yield Table(
            title, headings, cells, "read + write: of the logits and the gradient once each. Compiled, not run."
        )


def bundle_table(costs: Sequence[dict[str, Any]]) -> Table:
    """Return the bundles with each exp, a row for each topology."""
    names = list(dict.fromkeys(cost["name"] for cost in costs))
    by_topology: dict[str, list[int]] = {}
    for cost in costs:
        by_topology.setdefault(cost["topology"], []).append(cost["bundles"])
    cells = [
        (topology, *(f"{count / 1e6:.2f}" for count in counts), f"{counts[-1] / counts[0]:.2f}")
        for topology, counts in by_topology.items()
    ]
    legend = "A core starts about one bundle in a cycle. Compiled, not run."
    title = "Loss and gradient, lsce fused, bfloat16, 8192 x 32768: millions of bundles of one core"
    return Table(title, ("topology", *names, "ratio"), cells, legend)


def kernel_tables(costs: Sequence[dict[str, Any]], shape: Shape) -> Iterator[Table]:
    """Yield bytes and bundles of the fused loss and of the kernel, a row for each program, a column for each TPU."""
    names, topologies = (list(dict.fromkeys(cost[key] for cost in costs)) for key in ("name", "topology"))

    def cells(number: Callable[[dict[str, Any]], str]) -> list[tuple[str, ...]]:
        by_place: dict[tuple[str, str], list[str]] = {}
        for cost in costs:
            by_place.setdefault((cost["name"], cost["topology"]), []).append(number(cost))
        return [(name, *(" / ".join(by_place[name, each]) for each in topologies)) for name in names]

    implementations = " / ".join(dict.fromkeys(cost["implementation"] for cost in costs))
    title = f"Dense loss, {shape_text(shape.sizes)}, {implementations}"
    moved = cells(lambda cost: f"{cost['accessed_bytes'] / cost['logits_bytes']:.2f}")
    yield Table(f"{title}: bytes moved, in multiples of the logits", ("program", *topologies), moved)
    bundles = cells(lambda cost: f"{cost['bundles'] / shape.rows:.0f}")
    legend = "A core starts about one bundle in a cycle. Compiled, not run."
    yield Table(f"{title}: bundles for each row", ("program", *topologies), bundles, legend)


def gpu_table(memory: dict[str, dict[str, int]], shape: Shape) -> Table:
    """Return the temporary memory of each loss, a column for each card."""
    cells = [(name, *map(mb, of_cards.values())) for name, of_cards in memory.items()]
    title = f"JAX compiled for GPUs, bfloat16, {shape_text(shape.sizes)}"
    headings = ("loss and gradient, temp MB", *next(iter(memory.values())))
    legend = f"In float32 the logits take {mb(shape.logits_bytes)} MB. Compiled, not run."
    return Table(title, headings, cells, legend)


def gpu_moves_table(counts: Sequence[dict[str, Any]]) -> Table:
    """Return how many kernels each loss is, and how often they move the logits: on the GPUs where that differs."""
    kinds = list(dict.fromkeys((count["shape"].classes, count["dtype"]) for count in counts))
    found: dict[tuple[str, tuple[int, str]], list[dict[str, Any]]] = {}
    for count in counts:
        found.setdefault((count["name"], (count["shape"].classes, count["dtype"])), []).append(count)

    def cell(of_cards: list[dict[str, Any]]) -> str:
        moved = dict.fromkeys(f"{count['moved']:.1f}" for count in of_cards)
        kernels = dict.fromkeys(str(count["launches"]) for count in of_cards)
        return f"{'/'.join(moved)} in {'/'.join(kernels)}"

    names = list(dict.fromkeys(count["name"] for count in counts))
    cells = [(name, *(cell(found[name, kind]) for kind in kinds)) for name in names]
    short = {"bfloat16": "bf16", "float32": "f32"}
    headings = ("loss and gradient", *(f"{classes} {short[dtype]}" for classes, dtype in kinds))
    legend = (
        "By classes and dtype: how often logits are read or written, in multiples of their size, and in how many "
        f"kernels.\nTwo figures where {', '.join(dict.fromkeys(count['card'] for count in counts))} differ. "
        "Compiled, not run."
    )
    return Table(f"JAX compiled for GPUs, {counts[0]['shape'].rows} rows", headings, cells, legend)


def launches_table(counts: Sequence[dict[str, Any]]) -> Table:
    """Return how many kernels each loss starts, and how often they move the logits, by dtype and number of classes."""
    kinds = list(dict.fromkeys((count["classes"], count["dtype"]) for count in counts))
    names = list(dict.fromkeys(count["name"] for count in counts))
    of = {(count["name"], count["classes"], count["dtype"]): count for count in counts}
    cells = [
        (name, str(of[name, *kinds[0]]["launches"]), *(f"{of[name, *kind]['moved']:.0f}" for kind in kinds))
        for name in names
    ]
    short = {"bfloat16": "bf16", "float32": "f32"}
    headings = ("loss and gradient", "kernels", *(f"{classes} {short[dtype]}" for classes, dtype in kinds))
    legend = (
        "By classes and dtype: how often logits are read or written, in multiples of their size.\n"
        "Counted on a CPU, not run."
    )
    return Table("torch, eager, on a GPU", headings, cells, legend)


def linear_launches_table(counts: Sequence[dict[str, Any]], shape: Sequence[int]) -> Table:
    """Return how many kernels each linear loss starts, and the bytes that they move."""
    cells = [
        (
            count["name"],
            str(count["launches"]),
            str(count["of_chunk"]) if count["of_chunk"] else "-",
            *(f"{count[name] / 1e9:.1f}" for name in ("of_products", "moved")),
        )
        for count in counts
    ]
    headings = ("loss and gradients", "kernels", "a chunk", "products GB", "others GB")
    legend = (
        "Products: bytes of the operands and results of the matrix products, each once. Others: those of all others.\n"
        "Narrow sums: where torch cannot add a product of narrow tensors to a float32 sum. 4096 rows: of a chunk.\n"
        "Counted on a CPU, not run."
    )
    return Table(f"torch, eager, on a GPU, bfloat16, {shape_text(shape)}", headings, cells, legend)


def linear_tpu_table(costs: Sequence[dict[str, Any]], shape: LinearShape, chunk_bytes: int) -> Table:
    """Return operations, memory and traffic, and how large the arrays are that temporary memory is made of."""
    products = shape.rows * shape.features * shape.classes
    names = list(dict.fromkeys(cost["name"] for cost in costs))
    by_topology: dict[str, list[dict[str, Any]]] = {}
    for cost in costs:
        by_topology.setdefault(cost["topology"], []).append(cost)
    first = next(iter(by_topology.values()))
    cells = [("flops / NDK", *(f"{cost['operations'] / products:.1f}" for cost in first))]
    cells += [
        (topology, *(f"{cost['temp_bytes'] / 1e9:.2f} / {cost['accessed_bytes'] / 1e9:.1f}" for cost in of_topology))
        for topology, of_topology in by_topology.items()
    ]
    legend = (
        f"In float32 the weight's gradient takes {mb(4 * shape.features * shape.classes)} MB, the logits of a chunk "
        f"{mb(chunk_bytes)} MB,\nall logits {mb(shape.logits_bytes)} MB. Traffic: read and written in all rounds. "
        "Compiled, not run."
    )
    title = f"JAX compiled for one core, bfloat16, {shape_text(shape)}: temporary memory / traffic, GB"
    return Table(title, ("topology", *names), cells, legend)


# --- Tables of a page -----------------------------------------------------------------------------------------------


def page_blocks(records: Sequence[Figures]) -> dict[str, str]:
    """Return the Markdown of what one command measured, for each of its blocks: "dense", "linear" and so on.

    Args:
        records: the figures of each machine.
    """
    blocks: dict[str, list[str]] = {}
    for figures in records:
        machine = figures["machine"]
        for name, of_page in _page_tables(figures).items():
            # Times are those of a machine; what a compiler says is not.
            is_of_compiler = name.startswith("tpu")
            heading = [] if is_of_compiler else [f"### {_place(machine)}"]
            source = fill(f"`{_command(name, machine)}`: {_as_text(machine)}.", 120)
            parts = (part if isinstance(part, str) else markdown(part) for part in of_page)
            blocks[name] = [*blocks.get(name, []), *heading, source, *parts]
    return {name: "\n\n".join(parts) for name, parts in blocks.items()}


def _page_tables(figures: Figures) -> dict[str, list[Table | str]]:
    """Return the tables of each block that the figures are for, and text between them."""
    block = device_report.block_of(figures)
    if block is not None:
        return {block: [*device_report.page_tables(figures)]}
    if "all" in figures:
        return {"all": [*all_report.page_parts(figures, file_name(figures))]}
    if "tpu" in figures:
        *dense, linear = tables(figures)
        return {"tpu": dense, "tpu linear": [linear]}
    if "tpu kernel" in figures:
        return {"tpu kernel": list(tables(figures))}
    (name,) = {"dense", "small", "linear", "scaling", "smoothing"} & figures.keys()
    if name in {"dense", "small"}:
        return {name: [_dense_page(group) for group in _grouped(figures[name])]}
    return {name: list(tables(figures))}


def record_path(folder: Path, figures: Figures) -> Path:
    """Return the file that keeps the figures of a command. Times have one file for each CPU or card."""
    (block, *_) = _page_tables(figures)
    return (
        folder / f"{block.replace(' ', '-')}.json"
        if block in {"tpu", "tpu kernel"}
        else folder / block.replace(" ", "-") / f"{file_name(figures)}.json"
    )


def file_name(figures: Figures) -> str:
    """Return the name of the card, or of the CPU, as that of a file."""
    return "-".join(re.findall(r"[a-z0-9]+", _place(figures["machine"]).lower().replace("(r)", "")))


def _place(machine: dict[str, Any]) -> str:
    """Return the name of the card, or of the CPU, that was measured."""
    card: str = machine["device"].partition(": ")[2] if "device" in machine else machine["cpu"]
    return card


def _command(block: str, machine: dict[str, Any]) -> str:
    options = {
        "small": "dense --sizes small",
        "scaling": "linear --scaling",
        "tpu linear": "tpu",
        "tpu kernel": "tpu-kernel",
    }
    if block in device_report.BLOCKS:
        return device_report.BLOCKS[block]
    device = f" --device {machine['device'].partition(':')[0]}" if "device" in machine else ""
    threads = f" --threads {machine['threads']}" if "threads" in machine else ""
    return f".venv/bin/python -m benchmarks {options.get(block, block)}{device}{threads} --write"


def _grouped(results: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the results of each framework and allocator."""

    def kind(result: dict[str, Any]) -> tuple[str, str | None]:
        return result["framework"], result.get("allocator")

    return [[result for result in results if kind(result) == each] for each in dict.fromkeys(map(kind, results))]


def _dense_page(results: Sequence[dict[str, Any]]) -> Table:
    """Return the times at each shape relative to the first loss, with their spread, and the memory at the first."""
    framework, allocator = results[0]["framework"], results[0].get("allocator")
    by_shape = [_rows(result) for result in results]
    cells = []
    for i, row in enumerate(by_shape[0]):
        times = []
        for rows in by_shape:
            ratio = f"{rows[i].milliseconds / rows[0].milliseconds:.2f}"
            least, largest = _spread(rows[i], rows[0])
            times.append(
                f"{ratio} ({least:.2f}-{largest:.2f})" if i else f"1 ({three_digits(rows[0].milliseconds)} ms)"
            )
        cells.append((row.name, *times, f"{mb(row.memory)} MB"))
    shapes = [shape_text(result["shape"]) for result in results]
    headings = ("time, relative to the first", *shapes, f"memory, {shapes[0]}")
    legend = (
        f"In brackets: least and largest of {len(by_shape[0][0].seconds)} rounds. Memory: {DENSE_MEMORY[framework]}."
    )
    return Table(f"{TITLES[framework]}{ALLOCATORS[allocator]}, float32", headings, cells, legend)


def _spread(row: Row, first: Row) -> tuple[float, float]:
    """Return the least and the largest ratio of a round."""
    ratios = [one / other for one, other in zip(row.seconds, first.seconds, strict=True)]
    return min(ratios), max(ratios)


def _times_of(row: Row) -> tuple[str, str, str]:
    return row.name, three_digits(row.milliseconds), three_digits(row.least_milliseconds)


def _num_floors(rows: Sequence[Row]) -> int:
    return sum(row.is_floor for row in rows)
