"""`lsce-parity replay DIR`."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from parity_tests.commands.common import (
    AtolOption,
    DeviceOption,
    JsonOption,
    ReportOption,
    RtolOption,
    SecondOption,
    cannot_run,
    exit_with,
    find_adapters,
    keep_compiled,
    print_missing,
    track,
    write_json,
    write_page,
)
from parity_tests.commands.recorded_losses import replay_own
from parity_tests.commands.recorded_trainings import replay_steps
from parity_tests.commands.terminal import FittingTable, PlainConsole
from parity_tests.evidence.environment import describe_environment
from parity_tests.losses.user_losses import is_user_loss
from parity_tests.report.words import PageTable
from parity_tests.studies.bundle import read_bundle
from parity_tests.studies.pairs import make_tolerance
from parity_tests.studies.recorded_losses import MANIFEST
from parity_tests.studies.recorded_trainings import MANIFEST as TRAINING
from parity_tests.studies.replays import Replay
from parity_tests.studies.replays import replay as replay_bundle
from parity_tests.studies.sealed_folders import RecordingError
from parity_tests.studies.survey import Member, Survey

HEADINGS = ("~here", "~recorded", ">cases", ">share", "verdict")
SHARE = "Share: the largest error as a share of what rounding explains; at most 1 is right."

AdapterOption = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="May be repeated. [default: all of ours that run here and need no compiler]"),
]


def replay(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a bundle.", show_default=False)],
    *,
    adapter: AdapterOption = None,
    training: Annotated[
        str | None, typer.Option(help="Your training, to hold against a recorded one: torch:package.module:name.")
    ] = None,
    device: DeviceOption = "cpu",
    json_file: JsonOption = None,
    option: SecondOption = None,
    rtol: RtolOption = None,
    atol: AtolOption = None,
    report: ReportOption = None,
) -> None:
    """Compare adapters on this machine with values recorded elsewhere, on the same input bits.

    Each adapter must be within its bounds of the truth, and within the sum of both bounds of each recorded adapter.
    Each recorded adapter must be within its bounds of the truth. Exit code 0: all are, 1: one is not, 2: the bundle is
    stale, damaged or of another version, or no adapter runs here.

    Examples:
        lsce-parity replay from-the-gpu-machine
        lsce-parity replay from-the-gpu-machine --adapter jax-fused --json replayed.json
        lsce-parity replay from-the-gpu-machine --report page
        lsce-parity replay from-torch --adapter jax:my.losses:focal --b gamma=2
        lsce-parity replay from-torch --training jax:my.trainings:Jax
    """
    if (folder / TRAINING).is_file():
        if adapter or (rtol, atol) != (None, None) or device != "cpu":
            cannot_run(f"{folder} holds a training: leave out --adapter, --device, --rtol and --atol")
        replay_steps(folder, training, option, json_file, report)
    if training is not None:
        cannot_run(f"{folder} holds no recorded training: record one with --training torch:package.module:name")
    if (folder / MANIFEST).is_file():
        replay_own(folder, adapter, option, make_tolerance(rtol, atol), device, json_file, report)
    if rtol is not None or atol is not None:
        cannot_run("--rtol and --atol are for a recorded loss of yours: in a bundle the true values decide")
    if option or any(map(is_user_loss, adapter or ())):
        cannot_run(f"{folder} holds no recorded loss of a user: record one with --adapter torch:package.module:name")
    console = PlainConsole()
    try:
        bundle = read_bundle(folder)
        adapters, missing = find_adapters(adapter, device)
        keep_compiled()
        found = replay_bundle(bundle, adapters, partial(track, total=len(bundle.records), title="cases"))
    except RecordingError as error:
        cannot_run(str(error))
    if not any(outcome.status != "unsupported" for outcome in found.outcomes):
        cannot_run(f"no recorded case can be asked of {', '.join(each.name for each in adapters)}")
    print_replay(found, console)
    print_missing(missing, console)
    environment = describe_environment()
    for title, where in (("recorded with", bundle.environment), ("replayed with", environment)):
        console.print(f"{title} {_in_words(where)}", highlight=False)
    content = {
        "command": "replay",
        "agrees": found.agrees,
        "devices": {
            "here": {each.name: each.device for each in adapters},
            "recorded": {name: each.device for name, each in bundle.adapters.items()},
        },
        "lines": found.lines(),
        "evidence": found.evidence(),
        "missing": missing,
        "recorded": bundle.environment,
        "environment": environment,
    }
    write_json(json_file, content, console)
    notes = [
        f"{title} {_in_words(where)}"
        for title, where in (("Recorded with", bundle.environment), ("Replayed with", environment))
    ]
    title = f"Replay of {folder}"
    wrong = [not line.agrees for line in found.lines() if line.cases]
    write_page(
        report,
        _as_survey(found),
        console,
        title=title,
        notes=notes,
        evidence=found.evidence(),
        agrees=found.agrees,
        tables=[PageTable("Comparisons", HEADINGS, _rows(found), note=SHARE, wrong=wrong)],
    )
    verdict = "AGREE" if found.agrees else "DISAGREE"
    console.print(f"\n{verdict}: {len(bundle.records)} recorded cases", highlight=False)
    exit_with(found.agrees)


def _as_survey(found: Replay) -> Survey:
    """Return the comparisons for a page; the name of a recorded adapter says so, since one here may have the same."""
    members = {each.name: Member(each, ours=True) for each in found.adapters}
    members |= {_recorded(name): Member(each, ours=True) for name, each in found.bundle.adapters.items()}
    recorded = [replace(each, adapter=_recorded(each.adapter)) for each in found.recorded]
    differences = [
        replace(each, adapters=(each.adapters[0], _recorded(each.adapters[1]))) for each in found.differences
    ]
    return Survey(members, [*found.outcomes, *recorded], differences)


def _recorded(name: str) -> str:
    return f"{name}, recorded"


def print_replay(found: Replay, console: Console) -> None:
    """Print each comparison, then the worst case of each that disagrees."""
    console.print(f"{SHARE}\n")
    console.print(FittingTable.of(HEADINGS, _rows(found)))
    console.print()
    for line in found.lines():
        if line.cases and not line.agrees:
            console.print(Text(str(line)), soft_wrap=True)


def _rows(found: Replay) -> list[list[str]]:
    """Return a row for each comparison of one or more cases."""
    here = {each.name: f"{each.name} on {each.device}" for each in found.adapters}
    recorded = {name: f"{name} on {each.device}" for name, each in found.bundle.adapters.items()}
    return [
        [
            here.get(line.here, line.here),
            recorded.get(line.recorded, line.recorded),
            str(line.cases),
            f"{line.share:.2g}",
            "agree" if line.agrees else "DISAGREE",
        ]
        for line in found.lines()
        if line.cases
    ]


def _in_words(environment: Mapping[str, Any]) -> str:
    versions = [f"{name} {version}" for name, version in environment["versions"].items()]
    devices = [device for each in environment["devices"].values() for device in each]
    flags = [f"{name}={value}" for name, value in environment["flags"].items()]
    parts = [f"Python {environment['python']}", *versions, environment["platform"], *devices, *flags]
    return ", ".join(dict.fromkeys(parts))
