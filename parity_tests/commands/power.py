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
from parity_tests.studies.power import HARMLESS, Trial, all_trials, sound_failures
from parity_tests.studies.self_check_power import faults_caught
from parity_tests.truth.precision import DTYPES

# Number of faults printed for each self-check; --json has all.
SHOWN = 4


def power(
    *,
    fault: Annotated[
        list[str] | None, typer.Option("--fault", help="Name with * and ?; may be repeated. [default: all]")
    ] = None,
    dtype: DtypeOption = None,
    json_file: JsonOption = None,
) -> None:
    """Test every assertion of the harness with every fault of the mutant bank.

    Exit code 0: all faults are rejected, 1: an assertion accepts a fault that it should reject, 2: no such fault.
    """
    console = PlainConsole()
    dtypes = check_dtypes(dtype, DTYPES)
    faults = [name for name in BANK if any(fnmatch(name, pattern) for pattern in fault or ["*"])]
    if not faults:
        cannot_run(f"no fault is called {' or '.join(fault or [])}; the faults are {', '.join(BANK)}")
    tried = [each for trials in track(all_trials(faults, dtypes), len(faults), "faults") for each in trials]
    _print_table(tried, dtypes, console)
    survivors = [
        f"{each.fault} survives {each.assertion} at {each.dtype}: {each.survives}" for each in tried if each.survives
    ]
    survivors += [f"{case} {kind}: the sound loss is rejected" for kind in dtypes for case in sound_failures(kind)]
    # One of the checks compares a narrow dtype with float32.
    by_dtype = [faults_caught(kind) for kind in ("float32", "bfloat16")]
    caught = {name: list(dict.fromkeys(each for found in by_dtype for each in found[name])) for name in CHECKS}
    survivors += [f"the self-check {name} rejects no fault at all" for name in CHECKS if not caught[name]]
    _print_self_checks(caught, console)
    for line in survivors:
        console.print(Text(line, style="bold"))
    write_json(json_file, {"command": "power", "trials": tried, "self_checks": caught, "survivors": survivors}, console)
    verdict = f"{len(survivors)} SURVIVE" if survivors else "ALL REJECTED"
    console.print(f"{verdict}: {len(faults)} faults at {', '.join(dtypes)}, and in trainings", highlight=False)
    exit_with(not survivors)


def _print_table(found: list[Trial], dtypes: tuple[str, ...], console: Console) -> None:
    table = make_table("fault", *(f">{heading}" for heading in (*dtypes, "trainings")), padding=(0, 1, 0, 0))
    trials = {(each.fault, each.dtype, each.assertion): each for each in found}
    for fault in dict.fromkeys(each.fault for each in found):
        cells = [_cell(trials[fault, dtype, "oracle"]) for dtype in dtypes]
        table.add_row(fault, *cells, _cell(trials.get((fault, "float32", "trajectory"))))
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
