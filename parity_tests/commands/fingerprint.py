"""`lsce-parity fingerprint`."""

from typing import Annotated

import typer
from rich.text import Text

from parity_tests.commands.common import (
    DeviceOption,
    JsonOption,
    announce,
    cannot_run,
    check_device,
    exit_with,
    write_json,
)
from parity_tests.commands.terminal import FittingTable, PlainConsole
from parity_tests.evidence.environment import describe_environment
from parity_tests.losses.adapters import UnavailableError
from parity_tests.studies.fingerprint import BACKENDS, Fingerprint, measured_row, rows_that_fit, take_fingerprint
from parity_tests.texts import with_nearest


def fingerprint(
    *,
    framework: Annotated[str | None, typer.Option(help="jax or torch. [default: each that is installed]")] = None,
    device: DeviceOption = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Measure the arithmetic of a device, and compare it with the assumptions of the bounds.

    Also says which rows of the table of devices (docs/devices.md) the measurements fit, and prints a row of their own.

    Exit code 0: all measurements are within the assumptions, 1: one is not, 2: no such framework or device here.

    Examples:
        lsce-parity fingerprint --framework jax
        lsce-parity fingerprint --device cuda --json fingerprint.json
    """
    if framework is not None and framework not in BACKENDS:
        cannot_run(with_nearest(f"there is no framework {framework!r} here", framework, BACKENDS, "frameworks"))
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
        console.print(Text(_title(taken[-1]), style="bold"))
        console.print(_table(taken[-1]))
        for line in _rows(taken[-1]):
            console.print(line, highlight=False)
    if not taken:
        cannot_run("; ".join(missing.values()))
    for name, reason in missing.items():
        console.print(f"{name} not measured: {reason}", highlight=False)
    environment = describe_environment()
    flags = ", ".join(f"{flag}={value}" for flag, value in environment["flags"].items())
    console.print(f"what the flags claim: {flags or 'nothing'}", highlight=False)
    content = {"command": "fingerprint", "environment": environment, "fingerprints": taken, "missing": missing}
    write_json(json_file, content, console)
    exit_with(all(each.within for each in taken))


def _title(taken: Fingerprint) -> str:
    name = taken.device if taken.model == taken.device else f"{taken.device}, as {taken.model}"
    return f"{taken.framework} on {name}"


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


def _table(taken: Fingerprint) -> FittingTable:
    table = FittingTable("dtype", "probe", "~measured", "~the bounds assume", "verdict", titles=2)
    for each in taken.findings:
        verdict = Text("within") if each.within else Text("exceeds", style="bold red")
        table.add_row(each.dtype, each.probe, each.measured, each.assumed, verdict)
    return table
