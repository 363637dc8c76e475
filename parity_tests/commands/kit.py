"""`lsce-parity kit DIR`."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from parity_tests.commands.common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    announce,
    cannot_run,
    check_adapters,
    check_device,
    check_dtypes,
    check_free,
    exit_with,
    find_adapters,
    jsonable,
    print_missing,
    select_cases,
    track,
    write_json,
    writing,
)
from parity_tests.commands.terminal import FittingTable, PlainConsole
from parity_tests.evidence.cards import find_device
from parity_tests.evidence.environment import describe_environment
from parity_tests.losses.adapters import Adapter
from parity_tests.studies.bundle import read_bundle, record, write_bundle
from parity_tests.studies.fingerprint import BACKENDS, Fingerprint, measured_row, rows_that_fit, take_fingerprint
from parity_tests.studies.kit import (
    ADAPTERS,
    FEW_CASES,
    REPORT,
    Line,
    as_json,
    bundle_folder,
    lines_of,
    takes,
    write_kit,
)
from parity_tests.studies.sealed_folders import RecordingError
from parity_tests.studies.survey import make_cases
from parity_tests.texts import count_of
from parity_tests.truth.linear_cases import all_case_names
from parity_tests.truth.precision import DTYPES

ROOT = Path(__file__).parents[2]
# Of a clone, and no part of the installed package.
BENCHMARKS = ("dense", "linear")


def kit(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the kit.", show_default=False)],
    *,
    device: DeviceOption = "cpu",
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="Name with * and ?; may be repeated. [default: all that run here]"),
    ] = None,
    case: Annotated[
        list[str] | None, typer.Option("--case", help="Name with * and ?; may be repeated. [default: all]")
    ] = None,
    dtype: DtypeOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few cases and small benchmarks, to see that it works: no evidence.")
    ] = False,
    benchmarks: Annotated[bool, typer.Option(help="Time the losses and their peers; needs a clone.")] = True,
    json_file: JsonOption = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a kit that is there.")] = False,
) -> None:
    """Find out what holds on a device of this machine, and write it down for others to check.

    It times the losses beside their peers, takes fingerprints of the arithmetic, and runs every adapter in every case
    and dtype. DIR gets kit.json, and the results as bundles. `lsce-parity matrix --add DIR` checks them, and adds the
    device to the support matrix.

    Exit code 0: all of ours are within their bounds, and the arithmetic is as the bounds assume, 1: something is not
    (the kit is written all the same), 2: no framework finds the device, or DIR cannot be written.

    Examples:
        lsce-parity kit my-gpu --device cuda
        lsce-parity kit try-it --device cuda --quick
    """
    console = PlainConsole()
    check_device(device)
    dtypes = check_dtypes(dtype, DTYPES[1:] if device == "tpu" else DTYPES)
    names = select_cases(case or (FEW_CASES if quick else all_case_names()))
    check_free(folder, "kit", REPORT, force)
    check_adapters(adapter or ADAPTERS)
    # JAX would take most of a card from torch. The benchmarks come first: a TPU serves one process at a time.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    figures = run_benchmarks(device, quick) if benchmarks else {"missing": "left out"}
    adapters, missing = find_adapters(adapter or ADAPTERS, device, asked=bool(adapter))
    cards = {each: find_device(each, device) for each in BACKENDS if each in {found.framework for found in adapters}}
    fingerprints = _take_fingerprints(device, tuple(cards), dtypes)
    lines: list[Line] = []
    content: dict[str, Any] = {
        "date": datetime.now().astimezone().date().isoformat(),
        "commit": _commit(),
        "device": device,
        "cards": cards,
        "fingerprints": [_fingerprint_as_json(each) for each in fingerprints],
        "benchmarks": figures,
        "missing": missing,
    }
    for i, each in enumerate(dtypes):
        lines += _record(folder, adapters, names, each)
        # After each dtype, so that what an interruption leaves behind is a kit.
        content |= {"environment": describe_environment(), "lines": as_json(lines)}
        content["verdict"] = verdict_line(lines, fingerprints, device, cards)
        with writing(folder / REPORT):
            write_kit(folder, jsonable(content), dtypes[: i + 1])
    print_lines(lines, console)
    print_missing(missing, console)
    for taken in fingerprints:
        console.print(_fingerprint_line(taken), highlight=False)
    if "missing" in figures:
        console.print(f"no benchmarks: {figures['missing']}", highlight=False)
    write_json(json_file, {"command": "kit", **content}, console)
    console.print(f"wrote {folder}: {REPORT} and a bundle for each dtype", soft_wrap=True, highlight=False)
    console.print(f"\n{content['verdict']}", soft_wrap=True, highlight=False)
    exit_with(_agrees(lines, fingerprints))


def run_benchmarks(device: str, quick: bool) -> dict[str, Any]:
    """Return the figures of the benchmarks, or under "missing" why there are none. Their tables are printed."""
    if not (ROOT / "benchmarks" / "__main__.py").is_file():
        return {"missing": "they are in a clone of the project, not in the installed package"}
    found: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        for name in BENCHMARKS:
            announce(f"timing the {name} losses on {device}")
            file = Path(folder) / f"{name}.json"
            options = ["--device", device, "--json", str(file), *(["--quick"] if quick else [])]
            command = [sys.executable, "-m", "benchmarks", name, *options]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
            typer.echo(done.stdout.rpartition("wrote ")[0])  # of a file that is about to go
            if done.returncode or not file.is_file():
                return {**found, "missing": f"`python -m benchmarks {name}` ended with exit code {done.returncode}"}
            found[name] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _take_fingerprints(device: str, frameworks: Sequence[str], dtypes: Sequence[str]) -> list[Fingerprint]:
    taken = []
    for framework in frameworks:
        announce(f"measuring the arithmetic of {framework} on {device}")
        taken.append(take_fingerprint(BACKENDS[framework](device), dtypes))
    return taken


def _fingerprint_as_json(taken: Fingerprint) -> dict[str, Any]:
    row = measured_row(taken)
    return {**jsonable(taken), "row": row and row.as_code(), "fits": row and rows_that_fit(row)}


def _fingerprint_line(taken: Fingerprint) -> str:
    """Return in one line what the arithmetic is like; kit.json has all numbers."""
    verb, row = "is within" if taken.within else "exceeds", measured_row(taken)
    fits = f", and fits {', '.join(rows_that_fit(row)) or 'no row of the table'}" if row else ""
    return f"the arithmetic of {taken.framework} {verb} what the bounds assume of {taken.model}{fits}"


def _record(folder: Path, adapters: Sequence[Adapter], names: Sequence[str], dtype: str) -> list[Line]:
    """Write the bundle of a dtype, and return what the adapters did, from the bundle as read back."""
    cases, part = make_cases(names, [dtype]), bundle_folder(folder, dtype)
    announce(f"running {count_of(len(adapters), 'adapter')} in {count_of(len(cases), 'case')} in {dtype}")
    try:
        with writing(part):
            shown = partial(track, total=len(cases), title="cases")
            write_bundle(part, record(adapters, cases, takes, shown), truths=False)
            return lines_of(read_bundle(part))
    except RecordingError as error:
        cannot_run(str(error))


def _commit() -> str:
    """Return the commit of the clone, with a + if files differ from it; empty outside of a clone."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def print_lines(lines: Sequence[Line], console: Console) -> None:
    """Print a row for each adapter and dtype, then what is wrong with ours."""
    table = FittingTable("adapter", "dtype", ">cases", ">agree", ">share", "~in case", titles=2)
    for line in sorted(lines, key=lambda line: not line.ours):
        share = f"{line.share:.2f}" if line.share < 1000 else f"{line.share:.0e}"
        cells = (line.adapter, line.dtype, str(line.cases), str(line.agree), share, line.worst)
        table.add_row(*(Text(cell, style="" if line.ours else "dim") for cell in cells))
    console.print("Share: the largest error, as a share of its bound. Dim: other libraries, for comparison.\n")
    console.print(table)
    console.print()
    for line in lines:
        if line.ours and not line.is_right:
            console.print(Text(f"{line.adapter} in {line.worst} {line.dtype}: {line.reason}"), soft_wrap=True)


def _agrees(lines: Sequence[Line], fingerprints: Sequence[Fingerprint]) -> bool:
    ours = [line for line in lines if line.ours]
    return bool(ours) and all(line.is_right for line in ours) and all(taken.within for taken in fingerprints)


def verdict_line(lines: Sequence[Line], fingerprints: Sequence[Fingerprint], device: str, cards: dict[str, str]) -> str:
    """Return in one line what agreed."""
    ours = [line for line in lines if line.ours]
    wrong = [line for line in ours if not line.is_right]
    where = ", ".join(dict.fromkeys(card for card in cards.values() if card)) or device
    names = len({line.adapter for line in ours})
    dtypes = ", ".join(dict.fromkeys(line.dtype for line in ours))
    scope = f"{count_of(names, 'adapter')} in {dtypes}, {count_of(sum(line.cases for line in ours), 'result')}"
    exceeding = [f"{taken.framework}'s arithmetic" for taken in fingerprints if not taken.within]
    beyond = ", ".join([*(f"{line.adapter} in {line.dtype}" for line in wrong), *exceeding])
    if _agrees(lines, fingerprints):
        return f"AGREE on {where}: {scope}, at most {max(line.share for line in ours):.2f} of a bound"
    return f"DISAGREE on {where}: {beyond or 'nothing ran'} (of {scope})"
