"""`lsce-parity devices`."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from parity_tests.commands.common import PlainConsole, cannot_run
from parity_tests.evidence.pages import write_block
from parity_tests.truth.arithmetic import ERRORS, name_of_depth
from parity_tests.truth.devices import DEVICES

COMMAND = "lsce-parity devices"
SOURCES = list(dict.fromkeys(device.source for device in DEVICES))
COLUMNS = ("device", "by", *ERRORS, "matmul", "tiny", "sums", "from")


def devices(
    *,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", dir_okay=False, help="Page whose table is replaced.")
    ] = None,
) -> None:
    """Show what is known of the arithmetic of devices, and where it is from.

    Errors are in units of the roundoff, half a unit in the last place of numbers just above a power of two. The row
    of a device makes the bounds for the losses that run on it.
    """
    console = PlainConsole()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, no_wrap=column == "device")
    for row in _rows():
        table.add_row(*row)
    console.print(table)
    for line in _sources():
        console.print(line, highlight=False)
    if markdown is not None:
        try:
            write_block(markdown, COMMAND, device_table())
        except (OSError, ValueError) as error:
            cannot_run(f"{markdown} cannot be updated: {error}")
        console.print(f"wrote {markdown}", soft_wrap=True, highlight=False)


def device_table() -> str:
    """Return the table in Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *_rows()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\nSources:\n\n" + "\n".join(_sources())


def _rows() -> list[list[str]]:
    flushes = {None: "?", True: "flushed", False: "kept"}
    return [
        [
            device.name,
            ", ".join(device.frameworks),
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
