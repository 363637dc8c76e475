"""The tables of what loss and gradient send between devices, ours and other ways, side by side.

Figures are kept as JSON, and the page is made of them, so that it can be held against its record.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime
from math import prod
from textwrap import fill
from typing import Any

from benchmarks.pages.tables import Table, markdown
from lsce_cost import hlo, show
from parity_tests.losses.collectives import AXES, CPU, Sent, compile_step
from parity_tests.losses.collectives_model import (
    BETWEEN_HOSTS,
    GATHERED,
    MEGATRON,
    OURS,
    OURS_LOCAL,
    TORUS,
    WAYS,
    Estimate,
    Step,
    estimate,
    fewest,
    predict,
)

# --- Figures --------------------------------------------------------------------------------------------------------

CLASSES, FEATURES = 131072, 2048
# Of 8192 rows to each device that has other rows.
STEPS = (
    ("tpu-v5e", Step(8192, CLASSES, (1, 16))),
    ("tpu-v5e", Step(32768, CLASSES, (4, 4))),
    ("tpu-v5e", Step(131072, CLASSES, (16, 16))),
    ("tpu-v5e", Step(32768, CLASSES, (4, 4), FEATURES)),
    ("tpu-v5e", Step(131072, CLASSES, (16, 16), FEATURES)),
    ("tpu-v5p", Step(32768, CLASSES, (4, 16), FEATURES)),
    ("tpu-v6e", Step(131072, CLASSES, (16, 16), FEATURES)),
    ("gpu-h100", Step(16384, CLASSES, (2, 4), FEATURES)),
    (CPU, Step(2048, 8192, (2, 4), 64, "float32")),
)
QUICK = ((CPU, Step(64, 4096, (2, 4), dtype="float32")), (CPU, Step(64, 4096, (2, 4), 24, "float32")))


def figures(steps: Sequence[tuple[str, Step]]) -> dict[str, Any]:
    """Compile every way at each size, and return all figures, for JSON."""
    targets = [target for target, _ in steps if target != CPU] or ["tpu-v5e"]
    return {
        "date": datetime.now().astimezone().date().isoformat(),
        "compiled_with": show.versions(targets),
        "parts": [_part(target, step) for target, step in steps],
    }


def _part(target: str, step: Step) -> dict[str, Any]:
    found = {way: compile_step(target, way, step) for way in WAYS}
    return {
        "target": target,
        "step": vars(step),
        "hosts": next(iter(found.values())).hosts,
        "ways": [
            {"way": way, "reason": compiled.reason, "sent": [each._asdict() for each in compiled.sent]}
            for way, compiled in found.items()
        ],
    }


def tables(record: dict[str, Any]) -> Iterator[Table]:
    """Yield a table for each size, with a row for each way."""
    for part in record["parts"]:
        step, target = Step(**{**part["step"], "mesh": tuple(part["step"]["mesh"])}), part["target"]
        with_time = target in TORUS
        headings = ["", "collectives", "over classes", "over rows", "sent, at least"]
        headings += ["compute, estimate", "links, estimate"] if with_time else []
        rows = []
        for way in part["ways"]:
            if way["reason"]:
                rows.append([way["way"], way["reason"], *[""] * (len(headings) - 2)])
                continue
            sent = [Sent(**each) for each in way["sent"]]
            time = estimate(way["way"], step, target) if with_time else None
            rows.append([way["way"], *_cells(sent, step), *([] if time is None else _times(time))])
        yield Table(_title(target, step, part["hosts"]), headings, rows)


def _cells(sent: Sequence[Sent], step: Step) -> list[str]:
    of_axis = {axis: sum(each.times * each.bytes for each in sent if each.axes == axis) for axis in AXES}
    groups = {"rows": step.mesh[0], "classes": step.mesh[1]}
    least = sum(
        each.times * hlo.least_sent(each.kind, each.bytes, groups.get(each.axes, prod(step.mesh))) for each in sent
    )
    return [
        str(sum(each.times for each in sent)),
        *(show.in_bytes(of_axis[axis]) for axis in reversed(AXES)),
        show.in_bytes(least),
    ]


def _times(time: Estimate) -> list[str]:
    return [show.in_seconds(time.compute), show.in_seconds(time.links)]


def _title(target: str, step: Step, hosts: int) -> str:
    size = f"{step.rows} x {step.classes} logits"
    if step.features is not None:
        size = f"a layer, {step.rows} x {step.features} x {step.classes}"
    first, second = step.mesh
    on = "virtual devices of a CPU" if target == CPU else f"of {target}"
    where = "" if target == CPU else f" on {hosts} host{'s' if hosts > 1 else ''}"
    return f"{prod(step.mesh)} {on}{where}: {step.dtype}, {size}, rows over {first}, classes over {second}"


# --- The page -------------------------------------------------------------------------------------------------------

NAME = "scaling"
COMMAND = "PYTHONPATH=.venv/compilers .venv/bin/python -m benchmarks scaling --write"
# One size is larger than in the first line, the others are the same.
GROWTH = {
    "": Step(32768, CLASSES, (4, 4), FEATURES),
    "N x 4": Step(131072, CLASSES, (4, 4), FEATURES),
    "K x 4": Step(32768, 4 * CLASSES, (4, 4), FEATURES),
    "D x 4": Step(32768, CLASSES, (4, 4), 4 * FEATURES),
    "devices x 4, over classes": Step(32768, CLASSES, (4, 16), FEATURES),
    "devices x 4, over rows": Step(32768, CLASSES, (16, 4), FEATURES),
    "devices x 16, a pod": Step(32768, CLASSES, (16, 16), FEATURES),
}
TARGET = "tpu-v5e"
DIVISIONS = (1, 4, 16, 64, 256)


def page_blocks(record: dict[str, Any]) -> dict[str, str]:
    """Return the Markdown of the figures, by the name of the block."""
    source = fill(f"`{COMMAND}`: {record['compiled_with']}, {record['date']}.", 120)
    return {
        f"{NAME} compiled": "\n\n".join([source, *(markdown(table) for table in tables(record))]),
        f"{NAME} growth": markdown(growth_table()),
        f"{NAME} devices": "\n\n".join(markdown(devices_table(features)) for features in (None, FEATURES)),
        f"{NAME} least": markdown(least_table()),
    }


def growth_table() -> Table:
    """Return what each device sends as the sizes grow, by the model."""
    shown = (OURS, OURS_LOCAL, MEGATRON, GATHERED)
    rows = []
    for name, step in GROWTH.items():
        size = f"{step.rows} x {step.features} x {step.classes}, {step.mesh[0]} x {step.mesh[1]}"
        rows.append([f"**{name}**" if name else "", size, *(show.in_bytes(sent_at_least(way, step)) for way in shown)])
    return Table(
        "Sent by each device at least, bfloat16, by the model", ["", "N x D x K, rows x classes", *shown], rows
    )


def devices_table(features: int | None) -> Table:
    """Return the estimates for more and more devices over the classes, and over the rows, of the same batch."""
    way = OURS if features is None else OURS_LOCAL
    rows = []
    for count in DIVISIONS:
        cells = [str(count)]
        for mesh in ((1, count), (count, 1)):
            time = estimate(way, Step(32768, CLASSES, mesh, features), TARGET)
            cells += _times(time)
        rows.append(cells)
    size = f"32768 x {CLASSES} logits" if features is None else f"a layer, 32768 x {features} x {CLASSES}"
    headings = ["devices", "over classes: compute", "links", "over rows: compute", "links"]
    return Table(f"{way}: {size}, bfloat16, {TARGET}; estimates", headings, rows)


def least_table() -> Table:
    """Return from how many rows and classes on each device on a layer computes longer than its gradients travel."""
    ways_ = {OURS_LOCAL: (8, 2), OURS: (6, 4), MEGATRON: (6, 2)}
    places = ("tpu-v5e", "tpu-v5p", "tpu-v6e", "gpu-h100", BETWEEN_HOSTS)
    rows = [[place, *(f"{fewest(place, *of_way):.0f}" for of_way in ways_.values())] for place in places]
    return Table("Fewest rows, and fewest classes, on each device; estimates", ["", *ways_], rows)


def sent_at_least(way: str, step: Step) -> float:
    """Return how many bytes each device sends at least, by the model."""
    return sum(
        hlo.least_sent(kind, size, step.mesh[axis == "classes"]) for (kind, axis), size in predict(way, step).items()
    )
