"""`lsce-parity devices`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from parity_tests.commands.common import JsonOption, check_page, write_json, write_table
from parity_tests.commands.terminal import FittingTable, PlainConsole
from parity_tests.truth.arithmetic import ERRORS, name_of_depth
from parity_tests.truth.devices import DEVICES, Device

COMMAND = "lsce-parity devices"
SOURCES = list(dict.fromkeys(device.source for device in DEVICES))
COLUMNS = ("device", "by", *ERRORS, "matmul", "tiny", "sums", "from")


def devices(
    *,
    json_file: JsonOption = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", dir_okay=False, help="Page whose table is replaced.")
    ] = None,
) -> None:
    """Show what is known of the arithmetic of devices, and where it is from.

    Errors are in units of the roundoff, half a unit in the last place of numbers just above a power of two. The row
    of a device makes the bounds for the losses that run on it.

    Examples:
        lsce-parity devices
        lsce-parity devices --json devices.json
    """
    check_page(markdown, COMMAND)
    console = PlainConsole()
    table = FittingTable(*COLUMNS, titles=2)
    for row in _rows():
        table.add_row(*row)
    console.print(table)
    for line in _sources():
        console.print(line, highlight=False)
    write_json(json_file, {"command": "devices", "devices": [_as_json(device) for device in DEVICES]}, console)
    write_table(markdown, COMMAND, device_table(), console)


def _as_json(device: Device) -> dict[str, Any]:
    numbers = {name: getattr(device.arithmetic, name) for name in (*ERRORS, "matmul_bits")}
    names = {name: getattr(device, name) for name in ("name", "family", "frameworks", "flushes", "source", "date")}
    return {**names, "arithmetic": {**numbers, "sums": name_of_depth(device.arithmetic)}}


def device_table() -> str:
    """Return the table in Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *_rows()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\nSources:\n\n" + "\n".join(_sources())


def _rows() -> list[list[str]]:
    flushes = {None: "?", True: "to 0", False: "kept"}
    return [
        [
            device.name,
            device.frameworks[0] if len(device.frameworks) == 1 else "both",
            *(f"{getattr(device.arithmetic, name):g}" for name in ERRORS),
            f"{device.arithmetic.matmul_bits}",
            flushes[device.flushes],
            name_of_depth(device.arithmetic) or "",
            f"{SOURCES.index(device.source) + 1}",
        ]
        for device in DEVICES
    ]


def _sources() -> list[str]:
    dates = {device.source: device.date for device in DEVICES}
    return [f"{number}. {source} ({dates[source]})" for number, source in enumerate(SOURCES, 1)]
