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

from benchmarks.timing import Row, Shape

if TYPE_CHECKING:
    from benchmarks.tpu import Cost

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
    console.print("read + write: of the logits and the gradient once each. Compiled, not run.", highlight=False)


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


def _mb(size: float) -> str:
    return f"{size / 1e6:.{0 if size >= 1e8 else 1 if size >= 1e6 else 2}f}"


def _three_digits(value: float) -> str:
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}"
