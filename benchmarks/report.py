"""Tables for people, and what they need to be read: the machine, and what the columns mean."""

import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.timing import LinearShape, Row, Shape

if TYPE_CHECKING:
    from benchmarks.tpu import Cost, LinearCost

LIBRARIES = ("lsce", "jax", "optax", "torch", "libtpu")
TITLES = {"jax": "JAX under jit", "torch": "torch eager"}
HEADINGS = {
    "jax": ("median", "least", "÷ one-hot", "÷ integer", "temp MB", "ratio"),
    "torch": ("median", "least", "÷ smoothed", "÷ plain", "peak, grads"),
}
LEGENDS = {
    "jax": "temp: allocated beyond arguments and results; its ratio is to one-hot's.",
    "torch": "peak: the most allocated at a time beyond the logits, in gradients' sizes.",
}
# Whose time and memory those of the others are divided by.
LINEAR_BASELINES = {"jax": "lse form", "torch": "F.cross_entropy, smoothed"}
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


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    versions = {}
    for library in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return {
        "date": datetime.now().astimezone().date().isoformat(),
        "cpu": _first_match("/proc/cpuinfo", r"model name\s*: (.*)") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load before": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else 0.0,
        "huge pages": _first_match("/sys/kernel/mm/transparent_hugepage/enabled", r"\[(.*)\]") or "unknown",
        "python": platform.python_version(),
        **versions,
    }


def _first_match(path: str, pattern: str) -> str | None:
    with suppress(OSError):
        found = re.search(pattern, Path(path).read_text(encoding="utf-8"))
        return found and found[1]
    return None


def print_machine(machine: dict[str, Any], console: Console) -> None:
    """Print it in running text, and whether times can be believed."""
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), highlight=False)
    if machine["load before"] > 1:
        # Each operation waits for the slower of its threads: a slice of the other program's time, many times a loss.
        console.print("The machine was busy just before: losses of many short operations suffer most.", style="yellow")


def print_dense(framework: str, shape: Shape, rows: Sequence[Row], console: Console) -> None:
    """Print times and memory, and their ratios to the first two rows."""
    logits_bytes = 4 * shape.rows * shape.classes
    title = f"{TITLES[framework]} on the CPU, float32, {shape.rows} x {shape.classes} ({_mb(logits_bytes)} MB)"
    table = _table(title, ("loss and gradient, ms", *HEADINGS[framework]))
    smoothed, plain = rows[:2]
    losses = [row for row in rows if not row.is_floor]
    for row in rows:
        table.add_row(
            row.name,
            _three_digits(row.milliseconds),
            _three_digits(row.least_milliseconds),
            f"{row.milliseconds / smoothed.milliseconds:.2f}",
            f"{row.milliseconds / plain.milliseconds:.2f}",
            *([_mb(row.memory)] if framework == "jax" else []),
            f"{row.memory / (smoothed.memory or 1 if framework == 'jax' else logits_bytes):.2f}",
            end_section=row is losses[-1],
        )
    console.print(table, f"{LEGENDS[framework]}\n", sep="\n", highlight=False)


def print_linear(framework: str, shape: LinearShape, rows: Sequence[Row], console: Console) -> None:
    """Print times and memory, and their ratios to one that has all logits in memory."""
    title = f"{TITLES[framework]} on the CPU, float32, {_times(shape)} (logits: {_mb(shape.logits_bytes)} MB)"
    divided_by = {"jax": "÷ lse", "torch": "÷ ce"}[framework]
    headings = (
        "layer, loss, gradients, ms",
        "median",
        "least",
        divided_by,
        "÷ floor",
        LINEAR_MEMORY[framework],
        "ratio",
    )
    table = _table(title, headings)
    baseline = next(row for row in rows if row.name == LINEAR_BASELINES[framework])
    floor = next(row for row in rows if row.is_floor)
    losses = [row for row in rows if not row.is_floor]
    for row in rows:
        table.add_row(
            row.name,
            _three_digits(row.milliseconds),
            _three_digits(row.least_milliseconds),
            f"{row.milliseconds / baseline.milliseconds:.2f}",
            f"{row.milliseconds / floor.milliseconds:.2f}",
            _mb(row.memory),
            f"{row.memory / baseline.memory:.2f}",
            end_section=row is losses[-1],
        )
    console.print(table, f"{LINEAR_LEGENDS[framework]}\n", sep="\n", highlight=False)


def print_scaling(framework: str, shapes: Sequence[LinearShape], rows: Sequence[Row], console: Console) -> None:
    """Print time and memory for each number of rows."""
    _, features, classes = shapes[0]
    title = f"lsce linear, {TITLES[framework]} on the CPU, float32, N x {features} x {classes}"
    headings = ("N", "median, ms", "least, ms", "µs for a row", LINEAR_MEMORY[framework], "logits MB")
    table = _table(title, headings)
    for shape, row in zip(shapes, rows, strict=True):
        table.add_row(
            row.name,
            _three_digits(row.milliseconds),
            _three_digits(row.least_milliseconds),
            _three_digits(1e3 * row.milliseconds / shape.rows),
            _mb(row.memory),
            _mb(shape.logits_bytes),
        )
    console.print(table, f"{SCALING_LEGENDS[framework]}\n", sep="\n", highlight=False)


def print_tpu(costs: Sequence["Cost"], shape: Shape, console: Console) -> None:
    """Print memory and traffic."""
    for topology in dict.fromkeys(cost.topology for cost in costs):
        title = f"JAX compiled for one core of {topology}, bfloat16, {shape.rows} x {shape.classes}"
        table = _table(title, ("loss and gradient", "loss in", "temp MB", "accessed MB", "÷ read + write"))
        for cost in costs:
            if cost.topology == topology:
                ratio = cost.accessed_bytes / cost.minimal_bytes
                row = (cost.name, cost.loss_dtype, _mb(cost.temp_bytes), _mb(cost.accessed_bytes), f"{ratio:.2f}")
                table.add_row(*row)
        console.print(table)
        console.print()
    console.print("read + write: of the logits and the gradient once each. Compiled, not run.\n", highlight=False)


def print_linear_tpu(costs: Sequence["LinearCost"], shape: LinearShape, chunk_bytes: int, console: Console) -> None:
    """Print memory, traffic and operations, and how large the arrays are that temporary memory is made of."""
    topology = costs[0].topology
    table = _table(
        f"JAX compiled for one core of {topology}, bfloat16, {_times(shape)}",
        ("layer, loss and gradients", "temp MB", "accessed MB", "operations / NDK"),
    )
    for cost in costs:
        operations = cost.operations / (shape.rows * shape.features * shape.classes)
        table.add_row(cost.name, _mb(cost.temp_bytes), _mb(cost.accessed_bytes), f"{operations:.1f}")
    weight_bytes = 4 * shape.features * shape.classes
    console.print(
        table,
        f"In float32 the weight's gradient takes {_mb(weight_bytes)} MB, the logits of a chunk {_mb(chunk_bytes)} MB,",
        f"all logits {_mb(shape.logits_bytes)} MB. Accessed: with loops unrolled. Compiled, not run.",
        sep="\n",
        highlight=False,
    )


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    return table


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _mb(size: float) -> str:
    return f"{size / 1e6:.{0 if size >= 1e8 else 1 if size >= 1e6 else 2}f}"


def _three_digits(value: float) -> str:
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}"
