"""`lsce-parity power`."""

from fnmatch import fnmatch
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from parity_tests.commands.common import (
    DtypeOption,
    JsonOption,
    PlainConsole,
    cannot_run,
    check_dtypes,
    exit_with,
    make_table,
    track,
    write_json,
)
from parity_tests.faults.linear import BANK
from parity_tests.self_checks import CHECKS
from parity_tests.studies.power import HARMLESS, LOOSEST, Trial, all_trials, sound_failures
from parity_tests.studies.self_check_power import faults_caught
from parity_tests.truth.devices import arithmetic_of
from parity_tests.truth.precision import DTYPES

# Number of faults printed for each self-check; --json has all.
SHOWN = 4


def power(
    *,
    fault: Annotated[
        list[str] | None, typer.Option("--fault", help="Name with * and ?; may be repeated. [default: all]")
    ] = None,
    dtype: DtypeOption = None,
    device_model: Annotated[
        str | None,
        typer.Option(help="Allow the errors of this device: a name that `lsce-parity devices` shows. [default: cpu]"),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Test every assertion of the harness with every fault of the mutant bank.

    With --device-model: whether the faults would still be seen on that device, by the comparison with the truth. There
    a fault survives if no case rejects it. TPUs have no float64.

    Exit code 0: all faults are rejected, 1: an assertion accepts a fault that it should reject, 2: no such fault.
    """
    console = PlainConsole()
    try:
        device = None if device_model is None else arithmetic_of(device_model, own=True)
    except ValueError as error:
        cannot_run(str(error))
    dtypes = check_dtypes(dtype, DTYPES)
    faults = [name for name in BANK if any(fnmatch(name, pattern) for pattern in fault or ["*"])]
    if not faults:
        cannot_run(f"no fault is called {' or '.join(fault or [])}; the faults are {', '.join(BANK)}")
    tried = [each for trials in track(all_trials(faults, dtypes, device), len(faults), "faults") for each in trials]
    _print_table(tried, dtypes, console)
    survivors = [
        f"{each.fault} survives {each.assertion} at {each.dtype}: {each.survives}" for each in tried if each.survives
    ]
    sound = {kind: sound_failures(kind, device or LOOSEST) for kind in dtypes}
    survivors += [f"{case} {kind}: the sound loss is rejected" for kind in dtypes for case in sound[kind]]
    caught = {} if device else _caught_by_self_checks()
    survivors += [f"the self-check {name} rejects no fault at all" for name, found in caught.items() if not found]
    if caught:
        _print_self_checks(caught, console)
    for line in survivors:
        console.print(Text(line, style="bold"))
    content = {"command": "power", "device_model": device_model, "trials": tried}
    write_json(json_file, {**content, "self_checks": caught, "survivors": survivors}, console)
    verdict = f"{len(survivors)} SURVIVE" if survivors else "ALL REJECTED"
    where = f"within the errors of {device_model}" if device else "and in trainings"
    console.print(f"{verdict}: {len(faults)} faults at {', '.join(dtypes)}, {where}", highlight=False)
    exit_with(not survivors)


def _caught_by_self_checks() -> dict[str, list[str]]:
    """Return the faults that each self-check rejects. One of the checks compares a narrow dtype with float32."""
    by_dtype = [faults_caught(kind) for kind in ("float32", "bfloat16")]
    return {name: list(dict.fromkeys(each for found in by_dtype for each in found[name])) for name in CHECKS}


def _print_table(found: list[Trial], dtypes: tuple[str, ...], console: Console) -> None:
    trials = {(each.fault, each.dtype, each.assertion): each for each in found}
    columns = {dtype: (dtype, "oracle") for dtype in dtypes}
    if any(assertion == "trajectory" for _, _, assertion in trials):
        columns["trainings"] = ("float32", "trajectory")
    table = make_table("fault", *(f">{heading}" for heading in columns), padding=(0, 1, 0, 0))
    for fault in dict.fromkeys(each.fault for each in found):
        table.add_row(fault, *(_cell(trials.get((fault, *column))) for column in columns.values()))
    console.print(
        "Cases that reject the fault, out of the cases that it changes, and the smallest rejected error as a share of "
        "its bound (1 would be accepted).\n"
    )
    console.print(table)
    console.print()


def _cell(trial: Trial | None) -> str:
    if trial is None:
        return ""  # faults of linear layers are not tried in trainings
    if not trial.changed:
        return "harmless" if (trial.fault, trial.dtype) in HARMLESS else "-"
    nearest = f" {trial.nearest:.1e}" if trial.rejected else ""
    return f"{len(trial.rejected)}/{len(trial.changed)}{nearest}"


def _print_self_checks(caught: dict[str, list[str]], console: Console) -> None:
    table = make_table("self-check, without an oracle", "faults that it rejects", padding=(0, 1, 0, 0))
    for name, faults in caught.items():
        more = f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        table.add_row(name, ", ".join(faults[:SHOWN]) + more)
    console.print(table)
    console.print()
