"""`lsce-parity hunt`."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.text import Text

from parity_tests.commands.common import (
    DeviceModelOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ReportOption,
    announce,
    cannot_run,
    check_device_model,
    check_dtypes,
    check_free,
    dtypes_on,
    exit_with,
    find_adapters,
    track,
    write_json,
    write_page,
    writing,
)
from parity_tests.commands.terminal import FittingTable, PlainConsole
from parity_tests.evidence.environment import describe_environment
from parity_tests.losses.adapters import Adapter
from parity_tests.losses.registry import ENTRIES, SHARDED
from parity_tests.report.verdict import Banner
from parity_tests.report.words import PageTable
from parity_tests.studies.bundle import MANIFEST, read_bundle, record, write_bundle
from parity_tests.studies.hunt import Find, describe, parts_of, share_of
from parity_tests.studies.hunt import hunt as search
from parity_tests.studies.sealed_folders import RecordingError
from parity_tests.studies.survey import Survey
from parity_tests.texts import count_of
from parity_tests.truth.cases import Case

SECONDS = 20.0
HEADINGS = ("adapter", "dtype", "part", ">share", ">calls", "~in")
NOTE = "Largest error that was found, as a share of its bound beyond the rounding of the result."
# Under `jit` only: without it JAX compiles every operation for each shape, and torch.compile takes seconds a case.
DEFAULT = [
    entry.name
    for entry in ENTRIES.values()
    if entry.kind == "ours" and entry.twin and not entry.name.endswith(("linear-reference", SHARDED))
]


def hunt(  # noqa: PLR0913 - each option of the command line is a parameter
    *,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help=f"May be repeated. [default: {', '.join(DEFAULT)}]")
    ] = None,
    dtype: DtypeOption = None,
    seconds: Annotated[
        float | None,
        typer.Option(help=f"Time for each adapter, dtype and part, compilation included. [default: {SECONDS:g}]"),
    ] = None,
    examples: Annotated[
        int | None, typer.Option(help="Number of calls of the adapter, in place of the time: reproducible.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the search.")] = 0,
    save: Annotated[
        Path | None,
        typer.Option("--save", metavar="DIR", file_okay=False, help="Bundle to add the cases found to; see replay."),
    ] = None,
    device: DeviceOption = "cpu",
    device_model: DeviceModelOption = None,
    json_file: JsonOption = None,
    report: ReportOption = None,
) -> None:
    """Search for inputs with the largest errors relative to the bounds, of the loss and of each gradient.

    Exit code 0: no error beyond its bound was found, 1: one was, and the smallest such case is shown, 2: cannot run.

    Examples:
        lsce-parity hunt --adapter jax-fused --dtype float32 --seconds 60
        lsce-parity hunt --examples 500 --save worst-cases
        lsce-parity hunt --adapter jax-fused --dtype bfloat16 --device-model tpu-v5e
    """
    console = PlainConsole()
    check_device_model(device_model, device)
    dtypes = check_dtypes(dtype, dtypes_on(device_model))
    if seconds is None and examples is None:
        seconds = SECONDS
    adapters, missing = find_adapters(adapter or DEFAULT, device, bool(adapter), device_model)
    for name, reason in missing.items():
        announce(f"not here: {name} ({reason})")
    known = _known(save)
    searches = [(each, dtype, part) for each in adapters for dtype in dtypes for part in parts_of(each)]
    try:
        finds = [
            search(each, dtype, part, examples=examples, seconds=seconds, seed=seed)
            for each, dtype, part in track(searches, len(searches), "searches")
        ]
    except ValueError as error:
        cannot_run(str(error))
    verdict = _verdict(finds)
    _print(finds, console)
    content = {
        "command": "hunt",
        "agrees": all(find.agrees for find in finds),
        "device_model": device_model,
        "budget": {"seconds": seconds, "examples": examples, "seed": seed},
        "finds": [asdict(find) for find in finds],
        "environment": describe_environment(),
    }
    write_json(json_file, content, console)
    if save is not None:
        _save(save, known, finds, adapters, console)
    word, _, sentence = verdict.partition(": ")
    banner = Banner(word, word.lower(), [sentence, *(_problem(find) for find in finds if not find.agrees)])
    rows = [_row(find) for find in finds]
    tables = [PageTable("Searches", HEADINGS, rows, note=NOTE, wrong=[not find.agrees for find in finds])]
    write_page(report, Survey({}, [], []), console, title="Search for the largest errors", banner=banner, tables=tables)
    console.print(f"\n{verdict}", highlight=False)
    exit_with(all(find.agrees for find in finds))


def _known(folder: Path | None) -> list[Case]:
    """Return the cases of the bundle in a folder; none if there is no bundle."""
    if folder is None or not folder.is_dir() or not any(folder.iterdir()):
        return []
    check_free(folder, "bundle", MANIFEST, force=True)
    try:
        return read_bundle(folder).cases
    except RecordingError as error:
        cannot_run(str(error))


def _save(
    folder: Path, known: Sequence[Case], finds: Sequence[Find], adapters: Sequence[Adapter], console: Console
) -> None:
    """Write a bundle of the known and the found cases; of two with the same name, the one with the larger error."""
    cases = {case.name: case for case in known}
    by_name = {adapter.name: adapter for adapter in adapters}
    for find in finds:
        old = cases.get(find.case.name)
        if old is None or share_of(by_name[find.adapter], old, find.part) < find.share:
            cases[find.case.name] = find.case
    with writing(folder):  # without adapters: a replay compares these cases with the truth alone
        write_bundle(folder, record([], [cases[name] for name in sorted(cases)]))
    console.print(f"wrote {folder}: {count_of(len(cases), 'case')}", soft_wrap=True, highlight=False)


def _print(finds: Sequence[Find], console: Console) -> None:
    table = FittingTable(*HEADINGS, titles=3)
    for find in finds:
        table.add_row(*_row(find), style="" if find.agrees else "bold")
    console.print(f"{NOTE}\n")
    console.print(table)
    for find in (each for each in finds if not each.agrees):
        console.print(Text(f"\n{_problem(find)}"), soft_wrap=True)
        console.print(Text(_as_code(find.case)), soft_wrap=True)


def _row(find: Find) -> list[str]:
    return [find.adapter, find.dtype, find.part, f"{find.share:.2g}", str(find.evaluations), describe(find.case)]


def _problem(find: Find) -> str:
    return f"{find.adapter} in {find.dtype}, {describe(find.case)}: {find.problem}"


def _verdict(finds: Sequence[Find]) -> str:
    """Return the verdict in one line."""
    broken = sum(not find.agrees for find in finds)
    if broken:
        return f"DISAGREE: {broken} of {count_of(len(finds), 'search', 'searches')} found a result beyond its bound"
    return f"AGREE: no result beyond its bound in {count_of(sum(find.evaluations for find in finds), 'call')}"


def _as_code(case: Case) -> str:
    """Return the fields of a case that are set, one a line."""
    values = {each.name: getattr(case, each.name) for each in fields(case)}
    given = {
        name: value for name, value in values.items() if value is not None and name not in ("name", "axis", "keywords")
    }
    lists = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in given.items()}
    return "\n".join(f"    {name}: {value}" for name, value in lists.items())
