"""Shows costs: as a table in a terminal, as a plot, and as JSON."""

import importlib.metadata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from lsce_cost.cost import Cost, Request
from lsce_cost.devices import CARDS, LIMITS

BLUE, RUST, GREY = "#8fbce6", "#b3410f", "#555555"
# Of the palette of Okabe and Ito, which colour-blind people can tell apart.
PART_COLOURS = {"memory": "#0072b2", "matrix": "#d55e00", "bundles": "#009e73", "links": "#cc79a7"}
PART_NAMES = {
    "memory": "reads and writes memory",
    "matrix": "multiplies matrices",
    "bundles": "issues instructions",
    "links": "sends to other devices",
}
# Characters of a line that holds every column and the name of every way.
WIDE = 112
COMPILERS = {"tpu": ("jax", "jaxlib", "libtpu"), "gpu": ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin")}


def make_table(*headings: str) -> Table:
    """Return a table without rows. A column whose heading starts with > is aligned to the right, and never broken."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        of_numbers = heading.startswith(">")
        table.add_column(heading.removeprefix(">"), justify="right" if of_numbers else "left", no_wrap=of_numbers)
    return table


def cost_table(request: Request, costs: Sequence[Cost], width: int = WIDE) -> Table:
    """Return a row for each way; where the line is short, what bounds an estimate stands below it."""
    headings, rows = cost_rows(request, costs)
    if width < WIDE:
        headings = [*headings[:-2], ",\n".join(headings[-2:])]
        rows = [[*row[:-2], "\n".join(dict.fromkeys(row[-2:]))] for row in rows]
    way, *others = headings
    table = make_table(way, *(f">{heading}" for heading in others))
    for row in rows:
        table.add_row(*row)
    return table


def cost_rows(request: Request, costs: Sequence[Cost]) -> tuple[list[str], list[list[str]]]:
    """Return the headings of a table and a row for each way. Columns that would be empty are left out."""
    columns: dict[str, list[str]] = {"way": [], "compiles,\nfits": [], "temp": [], "output": [], "HBM": []}
    with_bundles = any(cost.bundles is not None for cost in costs)
    columns |= {"bundles,\nmillions": []} if with_bundles else {}
    columns |= {"sent": []} if request.mesh is not None else {}
    columns |= {"estimate": [], "bound by": []}
    for cost in costs:
        cells = {
            "way": cost.name,
            "compiles,\nfits": f"yes, {'yes' if cost.fits else 'no'}" if cost.compiles else "no",
            "temp": in_bytes(cost.temp_bytes),
            "output": in_bytes(cost.output_bytes),
            "HBM": in_bytes(cost.hbm_bytes),
            "bundles,\nmillions": f"{'≥ ' if cost.kernels_without_bundles else ''}{_millions(cost.bundles)}",
            "sent": in_bytes(sum(each.sent for each in cost.collectives)) if cost.compiles else "–",
            "estimate": "–" if cost.roofline is None else in_seconds(cost.roofline.seconds),
            "bound by": "–" if cost.roofline is None else cost.roofline.bound,
        }
        for heading, column in columns.items():
            column.append(cells[heading])
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def title(request: Request) -> str:
    """Return what is computed where, in a line.

    Example:
        >>> title(Request("tpu-v6e", rows=8192, classes=32768, mesh=(4, 4)))
        'loss and gradient of bfloat16 logits, 8192 x 32768, on 16 of tpu-v6e: rows over 4, classes over 4'
    """
    what = "loss" if not request.gradient else "loss and gradient" if request.features is None else "loss and gradients"
    size = f"{request.rows} x {request.classes}"
    of = f"{request.dtype} logits, {size}"
    if request.features is not None:
        of = f"a {request.dtype} layer, {request.rows} x {request.features} x {request.classes}"
    if request.mesh is None:
        return f"{what} of {of}, on {request.target}"
    first, second = request.mesh
    return f"{what} of {of}, on {request.devices} of {request.target}: rows over {first}, classes over {second}"


def notes(request: Request, costs: Sequence[Cost], measured: tuple[float, float]) -> list[str]:
    """Return what the reader of a table has to know, a paragraph each.

    Args:
        request: the loss.
        costs: the rows.
        measured: the least and the most that published times were of estimates.
    """
    limits = LIMITS[request.target]
    clock = "" if limits.clock is None else f", {limits.clock / 1e9:.2f} GHz (derived)"
    links = "" if request.mesh is None else f", links {limits.links / 1e9:.0f} GB/s"
    parts = "memory and matrix products" if limits.clock is None else "memory, matrix products and bundles"
    found = [
        f"Compiled, not run: {versions([request.target])}. Figures are for one device.",
        f"The estimate is no measurement. It is the least time by the limits of the device, the longest of {parts}"
        f"{', and the links after it' if request.mesh else ''}. Published times of layers with their loss, compiled by "
        f"XLA, were {measured[0]:g} to {measured[1]:g} times as long (python -m lsce_cost.published).",
        f"Limits of {request.target}, one {limits.part}: {limits.memory / 2**30:.0f} GiB, "
        f"{limits.bandwidth / 1e9:.0f} GB/s, {limits.matrix[request.dtype] / 1e12:.0f} TFLOP/s in "
        f"{request.dtype}{links}{clock}; {limits.source}, {limits.date}.",
        *([_between_devices(costs)] if request.mesh else []),
    ]
    found += [f"{cost.name} does not compile: {cost.reason}" for cost in costs if not cost.compiles]
    found += [f"{cost.name}: {cost.reason}" for cost in costs if cost.compiles and cost.reason]
    if any(cost.kernels_without_bundles for cost in costs):
        found.append("≥: without kernels whose number of rounds the compiler does not say.")
    return found


def _between_devices(costs: Sequence[Cost]) -> str:
    """Return the collective operations of each way, ways with the same ones together."""
    names: dict[str, list[str]] = {}
    for cost in (cost for cost in costs if cost.compiles):
        operations = ", ".join(f"{each.count} {each.kind} of {in_bytes(each.bytes)}" for each in cost.collectives)
        names.setdefault(operations or "none", []).append(cost.name)
    return "Operations between devices: " + "; ".join(f"{each} ({'; '.join(of)})" for each, of in names.items()) + "."


def versions(targets: Iterable[str]) -> str:
    """Return the versions of the compilers of targets."""
    packages = [package for target in targets for package in COMPILERS["gpu" if target in CARDS else "tpu"]]
    found = []
    for package in dict.fromkeys(packages):
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def as_json(request: Request, costs: Sequence[Cost]) -> dict[str, Any]:
    """Return the request, the limits, and a list of ways, for JSON."""
    limits = asdict(LIMITS[request.target]) | {"matrix": dict(LIMITS[request.target].matrix)}
    return {
        "request": asdict(request),
        "compiled_with": versions([request.target]),
        "is_estimate": "roofline_seconds is the least time by the limits of the device, and no measurement",
        "limits": limits,
        "ways": [
            asdict(cost)
            | {
                "matrix_operations": dict(cost.matrix_operations),
                "roofline": cost.roofline and cost.roofline._asdict(),
            }
            for cost in costs
        ],
    }


def in_bytes(number: float | None) -> str:
    """Return a number of bytes with three digits.

    Example:
        >>> [in_bytes(number) for number in (0, 512, 115216, 536871456, 26374120104)]
        ['0 B', '512 B', '115 kB', '537 MB', '26.4 GB']
    """
    return "–" if number is None else _scaled(number, ("B", "kB", "MB", "GB", "TB"))


def in_seconds(number: float) -> str:
    """Return a time with three digits.

    Example:
        >>> [in_seconds(number) for number in (1.8e-7, 0.000118, 0.00549, 12.0)]
        ['0.18 µs', '118 µs', '5.49 ms', '12000 ms']
    """
    return f"{_digits(1e6 * number)} µs" if number < 1e-3 else f"{_digits(1e3 * number)} ms"


def _scaled(number: float, units: Sequence[str]) -> str:
    power = 0
    while number >= 999.5 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.0f} {units[0]}" if power == 0 else f"{_digits(number)} {units[power]}"


def _digits(number: float) -> str:
    return f"{number:.0f}" if number >= 99.95 else f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"


def _millions(number: int | None) -> str:
    return "–" if number is None else _digits(number / 1e6)


# --- Plot -----------------------------------------------------------------------------------------------------------


def draw(request: Request, costs: Sequence[Cost]) -> Figure:
    """Draw the parts of each way's least time, and the memory that it holds."""
    shown = [cost for cost in costs if cost.roofline is not None][::-1]
    figure = Figure(figsize=(10, 1.6 + 0.52 * max(len(shown), 1)), layout="constrained")
    times, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _draw_times(times, shown)
    _draw_memory(memory, request, shown)
    figure.suptitle(title(request), fontsize=11)
    return figure


def _draw_times(axes: Axes, costs: Sequence[Cost]) -> None:
    parts = [name for name in PART_COLOURS if any(getattr(cost.roofline, name) for cost in costs)]
    height = 0.8 / max(len(parts), 1)
    for i, name in enumerate(parts):
        seconds = [getattr(cost.roofline, name) or 0.0 for cost in costs]
        places = [place + 0.4 - height * (i + 0.5) for place in range(len(costs))]
        axes.barh(places, [1e3 * each for each in seconds], height, color=PART_COLOURS[name], label=PART_NAMES[name])
    axes.set_yticks(range(len(costs)), [cost.name for cost in costs])
    axes.set_xlabel("least time, ms (an estimate, not measured)")
    if parts:
        axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_memory(axes: Axes, request: Request, costs: Sequence[Cost]) -> None:
    left = [0.0] * len(costs)
    for name, colour in {"argument": GREY, "output": BLUE, "temp": RUST}.items():
        sizes = [(getattr(cost, f"{name}_bytes") or 0) / 1e9 for cost in costs]
        label = {"argument": "arguments", "output": "results", "temp": "temporary"}[name]
        axes.barh(range(len(costs)), sizes, 0.6, left, color=colour, label=label)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    limit = LIMITS[request.target].memory / 1e9
    if limit < 2 * max(left, default=0.0):
        axes.axvline(limit, color="black", linestyle="--", linewidth=1, label="memory of the device")
    axes.set_xlabel("memory of one device, GB")
    axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
