"""`lsce-parity fingerprint`."""

from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from parity_tests.commands.common import (
    DeviceOption,
    JsonOption,
    PlainConsole,
    announce,
    cannot_run,
    check_device,
    exit_with,
    write_json,
)
from parity_tests.evidence.environment import describe_environment
from parity_tests.losses.adapters import UnavailableError
from parity_tests.studies.fingerprint import BACKENDS, Fingerprint, measured_row, rows_that_fit, take_fingerprint


def fingerprint(
    *,
    framework: Annotated[str | None, typer.Option(help="jax or torch. [default: each that is installed]")] = None,
    device: DeviceOption = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Measure the arithmetic of a device, and compare it with the assumptions of the bounds.

    Also says which rows of the table of devices (docs/devices.md) the measurements fit, and prints a row of their own.

    Exit code 0: all measurements are within the assumptions, 1: one is not, 2: no such framework or device here.
    """
    if framework is not None and framework not in BACKENDS:
        cannot_run(f"there is no framework {framework!r} here; the frameworks are {', '.join(BACKENDS)}")
    check_device(device)
    console = PlainConsole()
    taken: list[Fingerprint] = []
    missing: dict[str, str] = {}
    for name in [framework] if framework else BACKENDS:
        try:
            backend = BACKENDS[name](device)
        except UnavailableError as error:
            missing[name] = str(error)
            continue
        announce(f"measuring {name} on {device}")
        taken.append(take_fingerprint(backend))
        console.print(_table(taken[-1]))
        for line in _rows(taken[-1]):
            console.print(line, markup=False, highlight=False)
    if not taken:
        cannot_run("; ".join(missing.values()))
    for name, reason in missing.items():
        console.print(f"{name} not measured: {reason}", markup=False, highlight=False)
    environment = describe_environment()
    flags = ", ".join(f"{flag}={value}" for flag, value in environment["flags"].items())
    console.print(f"what the flags claim: {flags}", markup=False, highlight=False)
    content = {"command": "fingerprint", "environment": environment, "fingerprints": taken, "missing": missing}
    write_json(json_file, content, console)
    exit_with(all(each.within for each in taken))


def _rows(taken: Fingerprint) -> list[str]:
    """Return lines that say which rows of the table of devices the measurements fit, and what their own row is."""
    row = measured_row(taken)
    if row is None:
        return ["no row: a probe that it needs has failed", ""]
    fitting = rows_that_fit(row)
    return [
        f"rows that fit, the tightest first: {', '.join(fitting)}" if fitting else "no row of the table fits",
        "a row for parity_tests/truth/devices.py, each error rounded up:",
        row.as_code(),
        "",
    ]


def _table(taken: Fingerprint) -> Table:
    name = taken.device if taken.model == taken.device else f"{taken.device}, as {taken.model}"
    table = Table(title=f"{taken.framework} on {name}", box=box.SIMPLE, title_justify="left")
    for column in ("dtype", "probe", "measured", "what the\nbounds\nassume", "verdict"):
        table.add_column(column, no_wrap=column == "probe")
    before = None
    for each in taken.findings:
        verdict = Text("within") if each.within else Text("exceeds", style="bold red")
        dtype = each.dtype if each.dtype != before else ""
        table.add_row(dtype, Text(each.probe), Text(each.measured), Text(each.assumed), verdict)
        before = each.dtype
    return table
