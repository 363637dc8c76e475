"""`lsce-parity power`."""

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.text import Text

from parity_tests.commands.common import (
    DtypeOption,
    JsonOption,
    ReportOption,
    cannot_run,
    check_dtypes,
    dtypes_on,
    exit_with,
    matching,
    track,
    write_json,
    write_page,
)
from parity_tests.commands.terminal import FittingTable, PlainConsole
from parity_tests.faults.linear import BANK
from parity_tests.report.verdict import Banner
from parity_tests.report.words import PageTable
from parity_tests.self_checks import CHECKS
from parity_tests.studies.power import HARMLESS, LOOSEST, Trial, all_trials, sound_failures
from parity_tests.studies.self_check_power import faults_caught
from parity_tests.studies.survey import Survey
from parity_tests.texts import count_of
from parity_tests.truth.devices import arithmetic_of

# Number of faults printed for each self-check; --json has all.
SHOWN = 4
NOTE = (
    "Cases that reject the fault, out of the cases that it changes, and the smallest rejected error as a share of its "
    "bound (1 would be accepted)."
)


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
    report: ReportOption = None,
) -> None:
    """Test every assertion of the harness with every fault of the mutant bank.

    With --fault only those faults are tried, and shown, in every assertion, training and self-check.

    With --device-model: whether the faults would still be seen on that device, by the comparison with the truth. There
    a fault survives if no case rejects it. TPUs have no float64.

    Exit code 0: all faults are rejected, 1: an assertion accepts a fault that it should reject, 2: no such fault.

    Examples:
        lsce-parity power --report power
        lsce-parity power --fault "bfloat16_*" --dtype float32
        lsce-parity power --device-model tpu-v5e --dtype float32
    """
    console = PlainConsole()
    try:
        device = None if device_model is None else arithmetic_of(device_model, own=True)
    except ValueError as error:
        cannot_run(str(error))
    dtypes = check_dtypes(dtype, dtypes_on(device_model))
    faults = matching(fault or ["*"], list(BANK), "fault")
    tried = [each for trials in track(all_trials(faults, dtypes, device), len(faults), "faults") for each in trials]
    table = _table(tried, dtypes)
    console.print(f"{NOTE}\n")
    console.print(FittingTable.of(*table))
    console.print()
    survivors = [
        f"{each.fault} survives {each.assertion} at {each.dtype}: {each.survives}" for each in tried if each.survives
    ]
    sound = {kind: sound_failures(kind, device or LOOSEST) for kind in dtypes}
    survivors += [f"{case} {kind}: the sound loss is rejected" for kind in dtypes for case in sound[kind]]
    caught = {} if device else _caught_by_self_checks(faults)
    if len(faults) == len(BANK):
        survivors += [f"the self-check {name} rejects no fault at all" for name, found in caught.items() if not found]
    if caught:
        console.print(FittingTable.of(*_self_checks(caught, SHOWN)))
        console.print()
    for line in survivors:
        console.print(Text(line, style="bold"))
    content = {"command": "power", "device_model": device_model, "trials": tried}
    write_json(json_file, {**content, "self_checks": caught, "survivors": survivors}, console)
    verdict = f"{len(survivors)} SURVIVE" if survivors else "ALL REJECTED"
    in_trainings = any(each.assertion == "trajectory" for each in tried)
    where = f", within the errors of {device_model}" if device else ", and in trainings" if in_trainings else ""
    scope = f"{count_of(len(faults), 'fault')} at {', '.join(dtypes)}{where}"
    page = [PageTable("Faults", *table, note=NOTE)]
    if caught:
        page.append(PageTable("Self-checks", *_self_checks(caught)))
    banner = Banner(verdict, "disagree" if survivors else "agree", [scope, *survivors])
    write_page(report, Survey({}, [], []), console, title="Power of the assertions", banner=banner, tables=page)
    console.print(f"{verdict}: {scope}", highlight=False)
    exit_with(not survivors)


def _caught_by_self_checks(faults: Sequence[str]) -> dict[str, list[str]]:
    """Return which faults each self-check rejects. One of the checks compares a narrow dtype with float32."""
    by_dtype = [faults_caught(kind, faults) for kind in ("float32", "bfloat16")]
    return {name: list(dict.fromkeys(each for found in by_dtype for each in found[name])) for name in CHECKS}


def _table(found: list[Trial], dtypes: tuple[str, ...]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows of the table of faults."""
    trials = {(each.fault, each.dtype, each.assertion): each for each in found}
    columns = {dtype: (dtype, "oracle") for dtype in dtypes}
    if any(assertion == "trajectory" for _, _, assertion in trials):
        columns["trainings"] = ("float32", "trajectory")
    rows = [
        [fault, *(_cell(trials.get((fault, *column))) for column in columns.values())]
        for fault in dict.fromkeys(each.fault for each in found)
    ]
    return ["fault", *(f">{heading}" for heading in columns)], rows


def _cell(trial: Trial | None) -> str:
    if trial is None:
        return ""  # faults of linear layers are not tried in trainings
    if not trial.changed:
        return "harmless" if (trial.fault, trial.dtype) in HARMLESS else "-"
    nearest = f" {trial.nearest:.1e}" if trial.rejected else ""
    return f"{len(trial.rejected)}/{len(trial.changed)}{nearest}"


def _self_checks(caught: dict[str, list[str]], shown: int | None = None) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows of the table of self-checks, each with so many faults, or with all."""
    rows = []
    for name, faults in caught.items():
        more = f" and {len(faults) - shown} more" if shown and len(faults) > shown else ""
        rows.append([name, (", ".join(faults[:shown]) or "none of these") + more])
    return ["self-check, without an oracle", "~faults that it rejects"], rows
