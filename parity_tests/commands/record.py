"""`lsce-parity record DIR`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from parity_tests.commands.common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    announce,
    cannot_run,
    check_dtypes,
    check_free,
    exit_with,
    find_adapters,
    keep_compiled,
    print_missing,
    select_cases,
    track,
    write_json,
    writing,
)
from parity_tests.commands.hunt import DEFAULT as ADAPTERS
from parity_tests.commands.replay import print_replay
from parity_tests.commands.terminal import PlainConsole
from parity_tests.studies.bundle import MANIFEST, BundleError, read_bundle, write_bundle
from parity_tests.studies.bundle import record as record_cases
from parity_tests.studies.kit import FEW_CASES
from parity_tests.studies.replays import replay as replay_bundle
from parity_tests.studies.survey import make_cases
from parity_tests.truth.precision import DTYPES


def record(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the bundle.", show_default=False)],
    *,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help=f"Name with * and ?; may be repeated. [default: {', '.join(ADAPTERS)}]"),
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(
            "--case", help=f"Name with * and ?; may be repeated; '*' is all. [default: {', '.join(FEW_CASES)}]"
        ),
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    json_file: JsonOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing bundle.")] = False,
) -> None:
    """Record inputs, truth and results of adapters, for `replay` with another framework or on another machine.

    Exit code 0: all results are within their bounds, 1: one is not (the bundle is still written), 2: nothing written.

    Examples:
        lsce-parity record from-the-gpu-machine --device cuda
        lsce-parity record ties --adapter torch-fused --case "ties*" --dtype float32
        lsce-parity record layers --case "linear_*"
    """
    console = PlainConsole()
    check_free(folder, "bundle", MANIFEST, force)
    dtypes = check_dtypes(dtype, DTYPES)
    names = select_cases(case or FEW_CASES)
    adapters, missing = find_adapters(adapter or ADAPTERS, device, asked=bool(adapter))
    keep_compiled()
    cases = make_cases(names, dtypes)
    if not adapter:  # default adapters that can handle none of the cases are left out
        adapters = [each for each in adapters if any(each.unsupported(case) is None for case in cases)]
    if not any(each.unsupported(case) is None for each in adapters for case in cases):
        cannot_run("no adapter can handle these cases")
    announce(f"recording {', '.join(each.name for each in adapters)} in {len(cases)} cases")
    try:
        with writing(folder):
            shown = partial(track, total=len(cases), title="cases")
            write_bundle(folder, record_cases(adapters, cases, track=shown))
            # The verdict is on the files as read back.
            found = replay_bundle(read_bundle(folder), [])
    except BundleError as error:
        cannot_run(str(error))
    print_replay(found, console)
    print_missing(missing, console)
    content = {"command": "record", "agrees": found.agrees, "lines": found.lines(), "missing": missing}
    write_json(json_file, {**content, "environment": found.bundle.environment}, console)
    console.print(f"wrote {folder}: {len(cases)} cases", soft_wrap=True, highlight=False)
    exit_with(found.agrees)
