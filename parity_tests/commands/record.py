"""`lsce-parity record DIR`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from parity_tests.commands.common import (
    DeviceOption,
    DtypeOption,
    PlainConsole,
    cannot_run,
    check_dtypes,
    exit_with,
    select_cases,
    track,
)
from parity_tests.commands.replay import AdapterOption, find_adapters, print_replay
from parity_tests.studies.bundle import MANIFEST, BundleError, read_bundle, write_bundle
from parity_tests.studies.bundle import record as record_cases
from parity_tests.studies.replays import replay as replay_bundle
from parity_tests.studies.survey import make_cases
from parity_tests.truth.precision import DTYPES


def record(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the bundle.", show_default=False)],
    adapter: AdapterOption = None,
    case: Annotated[list[str] | None, typer.Option("--case", help="Name with * and ?; may be repeated.")] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Write over a bundle that is there.")] = False,
) -> None:
    """Keep inputs, truth and what adapters give here, to hold them against another framework or machine: `replay`.

    Exit code 0: all are within their bounds of the truth, 1: one is not, and the bundle is written all the same,
    2: nothing is written.

    Examples:
        lsce-parity record from-the-gpu-machine --device cuda

        lsce-parity record ties --adapter torch-fused --case "ties*" --dtype float32
    """
    console = PlainConsole()
    _check_free(folder, force)
    dtypes = check_dtypes(dtype, DTYPES)
    names = select_cases(case)
    adapters, missing = find_adapters(adapter, device)
    cases = make_cases(names, dtypes)
    try:
        write_bundle(folder, record_cases(adapters, track(cases, len(cases), "cases", console)))
        # What was written is read, not what was meant.
        found = replay_bundle(read_bundle(folder), [])
    except BundleError as error:
        cannot_run(str(error))
    except OSError as error:
        cannot_run(f"{folder} cannot be written: {error.strerror}")
    print_replay(found, console)
    for name, reason in missing.items():
        console.print(Text(f"not here: {name} ({reason})", style="dim"))
    console.print(f"wrote {folder}: {len(cases)} cases", soft_wrap=True, highlight=False)
    exit_with(found.agrees)


def _check_free(folder: Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        cannot_run(f"{folder} is a file; name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / MANIFEST).is_file():
        cannot_run(f"{folder} is not empty and holds no bundle; name another folder")
    if not force:
        cannot_run(f"{folder} holds a bundle; name another folder, or pass --force to write over it")
