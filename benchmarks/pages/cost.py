"""The tables of docs/cost.md: what every way to compute the loss costs on devices that are not there.

Figures are kept as JSON, and the page is made of them, so that it can be held against its record.
"""

from collections.abc import Iterator
from datetime import datetime
from itertools import product
from pathlib import Path
from textwrap import fill
from typing import Any

from lsce_cost import hlo, show
from lsce_cost.cost import Cost, Request, measure_all
from lsce_cost.devices import LIMITS
from lsce_cost.published import HEADINGS, PUBLISHED, compare
from lsce_cost.roofline import Roofline

TARGETS = ("tpu-v5e", "tpu-v6e", "gpu-h100")
ROWS, CLASSES = 8192, 32768
FEATURES = (None, 2048)
MESH = Request("tpu-v6e", ROWS, 4 * CLASSES, mesh=(4, 4))
NAME = "cost"
DOCS = Path(__file__).parents[2] / "docs"


def figures() -> dict[str, Any]:
    """Compile every way for each target, and return all figures, for JSON."""
    requests = [Request(target, ROWS, CLASSES, features) for target, features in product(TARGETS, FEATURES)] + [MESH]
    return {
        "date": datetime.now().astimezone().date().isoformat(),
        "costs": [show.as_json(each, list(measure_all(each, list(each.ways)))) for each in requests],
        "published": compare(),
        "published with": show.versions(each.target for each in PUBLISHED),
    }


def page_blocks(record: dict[str, Any]) -> dict[str, str]:
    """Return the Markdown of the figures, by the name of the block."""
    parts = [part for content in record["costs"] for part in _part(content, record["date"])]
    headings = [heading.removeprefix(">") for heading in HEADINGS]
    source = f"`PYTHONPATH=.venv/compilers .venv/bin/python -m lsce_cost.published`: {record['published with']}, "
    published = [fill(f"{source}{record['date']}.", 120), _markdown(headings, record["published"])]
    return {NAME: "\n\n".join(parts), f"{NAME} published": "\n\n".join(published), f"{NAME} limits": _limits()}


def _limits() -> str:
    """Return the constants of the estimates."""
    headings = ["target", "one device", "GiB", "GB/s", "TFLOP/s, bfloat16", "float32", "links, GB/s", "GHz", "source"]
    rows = [
        [
            target,
            limits.part,
            f"{limits.memory / 2**30:.0f}",
            f"{limits.bandwidth / 1e9:.0f}",
            f"{limits.matrix['bfloat16'] / 1e12:.1f}",
            f"{limits.matrix['float32'] / 1e12:.1f}",
            f"{limits.links / 1e9:.0f}",
            "–" if limits.clock is None else f"{limits.clock / 1e9:.2f}",
            f"{limits.source}, {limits.date}",
        ]
        for target, limits in LIMITS.items()
    ]
    return _markdown(headings, rows)


def _part(content: dict[str, Any], date: str) -> Iterator[str]:
    """Yield a heading, the command with its versions, and the table."""
    request = Request(**content["request"])
    costs = [_cost(way) for way in content["ways"]]
    features = "" if request.features is None else f" --features {request.features}"
    mesh = "" if request.mesh is None else f" --mesh {'x'.join(map(str, request.mesh))}"
    size = f"--rows {request.rows} --classes {request.classes}{features} --dtype {request.dtype}{mesh}"
    if request.features is None:
        yield f"### {request.target}" if request.mesh is None else f"### {request.devices} of {request.target}"
    yield fill(f"`lsce-cost --target {request.target} {size}`: {content['compiled_with']}, {date}.", 120)
    headings, rows = show.cost_rows(request, costs)
    yield _markdown([heading.replace("\n", " ") for heading in headings], rows)


def _cost(way: dict[str, Any]) -> Cost:
    least = way["roofline"] and Roofline(**way["roofline"])
    collectives = tuple(hlo.Collective(**each) for each in way["collectives"])
    return Cost(**{**way, "roofline": least, "collectives": collectives})


def _markdown(headings: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
