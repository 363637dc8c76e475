"""Shared parts of the subcommands: exit codes, options and their checks, progress, JSON and pages."""

import json
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import numpy as np
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from lsce_spec.extras import require_for_command
from parity_tests.evidence.environment import describe_environment
from parity_tests.evidence.ledger import DEVICES
from parity_tests.evidence.pages import replace_block, write_block
from parity_tests.losses.adapters import Adapter, UnavailableError, keep_programs
from parity_tests.losses.registry import ENTRIES, make_adapter, match_names
from parity_tests.losses.simulated import CannotSimulateError, simulate
from parity_tests.studies.replays import adapters_here
from parity_tests.studies.survey import Survey
from parity_tests.texts import visible, with_nearest
from parity_tests.truth.comparison import Comparison, Worst
from parity_tests.truth.devices import arithmetic_of
from parity_tests.truth.files import write_whole
from parity_tests.truth.linear_cases import all_case_names, default_case_names
from parity_tests.truth.precision import DTYPES
from parity_tests.truth.stored import cache_folder

AGREE, DISAGREE, CANNOT_RUN = 0, 1, 2
# Between two lines of progress where there is no terminal.
SECONDS_OF_LINE = 5.0


def why_unwritable(path: Path) -> str | None:
    """Return why a path cannot be written, or None: to be asked before hours of work, not after."""
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if there != path and not there.is_dir():
        return f"{there} is a file, so {path} cannot be in it"
    return None if os.access(there, os.W_OK) else f"{there} cannot be written to"


def _check_output(path: Path | None) -> Path | None:
    if path is not None and (reason := why_unwritable(path)):
        raise typer.BadParameter(reason)
    return path


JsonOption = Annotated[
    Path | None,
    typer.Option("--json", dir_okay=False, callback=_check_output, help="Write all results to this file, as JSON."),
]
ReportOption = Annotated[
    Path | None,
    typer.Option(
        "--report", file_okay=False, callback=_check_output, help="Write the results to this folder, as a web page."
    ),
]
DtypeOption = Annotated[
    list[str] | None, typer.Option("--dtype", help="float64, float32, bfloat16 or float16; may be repeated.")
]
# How the value of a KEY=VALUE is read.
VALUES = "True, False, None, 3, 1e-5 and [1, 2] are Python values, any other text is a string. May be repeated."
FirstOption = Annotated[
    list[str] | None, typer.Option("--a", metavar="KEY=VALUE", help=f"Argument for the first. {VALUES}")
]
SecondOption = Annotated[
    list[str] | None, typer.Option("--b", metavar="KEY=VALUE", help=f"Argument for the second. {VALUES}")
]
RtolOption = Annotated[
    float | None,
    typer.Option("--rtol", min=0, help="Allow this relative difference, in place of what rounding explains."),
]
AtolOption = Annotated[
    float | None, typer.Option("--atol", min=0, help="Allow this difference, in place of what rounding explains.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda or tpu.")]

DeviceModelOption = Annotated[
    str | None,
    typer.Option(
        "--device-model",
        metavar="NAME",
        help="Simulate the arithmetic of this device on the CPU: a name that `lsce-parity devices` shows.",
    ),
]

Item = TypeVar("Item")


def cannot_run(message: str) -> NoReturn:
    """Print why the command cannot run, and exit with 2."""
    typer.echo(f"cannot run: {visible(message)}", err=True)
    raise typer.Exit(code=CANNOT_RUN)


def check_dtypes(given: Sequence[str] | None, default: Sequence[str]) -> tuple[str, ...]:
    """Return the given dtypes, or the default; exit with 2 if one is unknown."""
    for dtype in given or ():
        if dtype not in DTYPES:
            cannot_run(with_nearest(f"there is no dtype {dtype!r} here", dtype, DTYPES, "dtypes"))
    return tuple(given or default)


def check_device(given: str) -> None:
    """Exit with 2 if no device has that name. Making an adapter tells whether this machine has the device."""
    if given in DEVICES:
        return
    problem = f"there is no device {given!r} here"
    if given.lower() == "gpu":
        cannot_run(f"{problem}; did you mean cuda?")
    cannot_run(with_nearest(problem, given, DEVICES, "devices"))


def check_free(folder: Path, what: str, marker: str, force: bool) -> None:
    """Exit with 2 if a folder cannot be written to: it must be new or empty, or hold what may be written over.

    Args:
        folder: the folder.
        what: what is to be written, as in "bundle".
        marker: the file by which one is known.
        force: whether one that is there may be written over.
    """
    if folder.exists() and not folder.is_dir():
        cannot_run(f"{folder} is a file; name a folder")
    if reason := why_unwritable(folder):
        cannot_run(reason)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / marker).is_file():
        cannot_run(f"{folder} is not empty and holds no {what}; name another folder")
    if not force:
        cannot_run(f"{folder} holds a {what}; name another folder, or pass --force to write over it")


def check_adapters(names: Sequence[str]) -> None:
    """Exit with 2 if no adapter has one of these names, which may have * and ?. No framework is loaded."""
    for name in match_names(names):
        if name.partition(":")[0] not in ENTRIES:
            try:
                make_adapter(name)
            except ValueError as error:
                cannot_run(str(error))


def find_adapters(
    names: Sequence[str] | None, device: str, asked: bool = True, device_model: str | None = None
) -> tuple[list[Adapter], dict[str, str]]:
    """Return the adapters that run on this machine, and for each other the reason why it does not.

    Args:
        names: names, with * and ?; None for all of ours that need no compiler.
        device: the device.
        asked: whether the user named the adapters. If so, each must run here; if not, one is enough.
        device_model: the device to simulate, or None.
    """
    check_device(device)
    check_device_model(device_model, device)
    try:
        found, missing = adapters_here(names, device)
    except ValueError as error:
        cannot_run(str(error))
    adapters = []
    for each in found:
        try:
            adapters.append(on_model(each, device_model))
        except UnavailableError as error:
            missing[each.name] = str(error)
    if missing and ((names and asked) or not adapters):
        cannot_run("; ".join(dict.fromkeys(missing.values())))
    return adapters, missing


def on_model(adapter: Adapter, device_model: str | None) -> Adapter:
    """Return the adapter on the simulated arithmetic of a device; as it is if none is named.

    Raises:
        UnavailableError: the adapter has no program that can be simulated.
    """
    if device_model is None:
        return adapter
    try:
        return simulate(adapter, device_model)
    except CannotSimulateError as error:
        raise UnavailableError(str(error)) from error


def check_device_model(device_model: str | None, device: str) -> None:
    """Exit with 2 if there is no such device to simulate, or if another is to run on."""
    if device_model is None:
        return
    try:
        arithmetic_of(device_model)
    except ValueError as error:
        cannot_run(str(error))
    if device != "cpu":
        cannot_run(f"--device-model simulates on the CPU: leave out --device {device}")


def dtypes_on(device_model: str | None) -> tuple[str, ...]:
    """Return the dtypes to try on a simulated device, or on the CPU: TPUs have no float64."""
    return DTYPES[1:] if device_model is not None and device_model.startswith("tpu") else DTYPES


def print_missing(missing: Mapping[str, str], console: Console) -> None:
    """Print the adapters that do not run here, and why."""
    for name, reason in missing.items():
        console.print(Text(f"not here: {name} ({reason})", style="dim"))


def select_cases(patterns: Sequence[str] | None) -> list[str]:
    """Return the names of the cases that match a pattern with * and ?; without patterns the default cases."""
    if not patterns:
        return default_case_names()
    return matching(patterns, all_case_names(), "case")


def matching(patterns: Sequence[str], known: Sequence[str], kind: str) -> list[str]:
    """Return the known names that match a pattern with * and ?; exit with 2 if a pattern matches none of them."""
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in known):
            problem = f"no {kind} is called {pattern or repr(pattern)}"
            cannot_run(with_nearest(problem, pattern, known, f"{kind}s"))
    return [name for name in known if any(fnmatch(name, pattern) for pattern in patterns)]


def exit_with(agrees: bool) -> NoReturn:
    """Exit with 0 if the losses agree, else with 1."""
    raise typer.Exit(code=AGREE if agrees else DISAGREE)


def keep_compiled() -> None:
    """Keep what JAX compiles for the next run, in the user's folder for caches, unless that is switched off."""
    folder = cache_folder()
    if folder is not None:
        keep_programs(folder)


def announce(text: str) -> None:
    """Print on stderr what the command is doing."""
    typer.echo(visible(text), err=True)


def track(items: Iterable[Item], total: int, title: str) -> Iterator[Item]:
    """Yield items and show on stderr how many are done: on a terminal a bar, elsewhere a line every few seconds."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from _track_in_lines(items, total, title)
        return
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as progress:
        yield from progress.track(items, total=total)


def _track_in_lines(items: Iterable[Item], total: int, title: str) -> Iterator[Item]:
    """Yield items. A thread prints the lines: a single item may take longer than the time between them."""
    begin, over, done = time.monotonic(), threading.Event(), 0

    def report() -> None:
        while not over.wait(SECONDS_OF_LINE):
            minutes, seconds = divmod(int(time.monotonic() - begin), 60)
            announce(f"{title} {done} of {total}, {minutes:02}:{seconds:02} elapsed")

    threading.Thread(target=report, name="progress", daemon=True).start()
    try:
        for item in items:
            yield item
            done += 1
    finally:
        over.set()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Exit with 2 if the body of the `with` statement cannot write its file."""
    try:
        yield
    except OSError as error:
        cannot_run(f"{path} cannot be written: {reason_of(error)}")


def check_page(page: Path | None, command: str) -> None:
    """Exit with 2 if a table cannot be written into a page later, if a page is given."""
    if page is None:
        return
    try:
        replace_block(page.read_text(encoding="utf-8"), command, "")
    except (OSError, ValueError) as error:
        cannot_run(f"{page} cannot be updated: {reason_of(error)}")


def reason_of(error: OSError | ValueError) -> str:
    """Return what an error says, without its number."""
    return str((isinstance(error, OSError) and error.strerror) or error)


def write_table(page: Path | None, command: str, text: str, console: Console) -> None:
    """Write a table into a page between the comments of a command, if a page is given; exit with 2 if it cannot be."""
    if page is None:
        return
    try:
        write_block(page, command, text)
    except (OSError, ValueError) as error:
        cannot_run(f"{page} cannot be updated: {reason_of(error)}")
    console.print(f"wrote {page}", soft_wrap=True, highlight=False)


def describe(worst: Worst) -> str:
    """Return the inputs of the worst element in one line."""
    return "; ".join(f"{name}: {value}" for name, value in worst.inputs.items())


def jsonable(value: Any) -> Any:
    """Return a value that JSON can hold; infinities and NaN become the strings "inf", "-inf", "nan"."""
    if is_dataclass(value) and not isinstance(value, type):
        return jsonable(asdict(value))
    if isinstance(value, dict):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(entry) for entry in value]
    if isinstance(value, np.ndarray | np.generic):
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write_page(folder: Path | None, survey: Survey, console: Console, **parts: Any) -> None:
    """Write a web page if a folder is given, and print its path; `parts` are arguments of `write_report`."""
    if folder is None:
        return
    require_for_command("--report", "parity", "matplotlib", "jinja2")
    from parity_tests.report.page import write_report  # noqa: PLC0415 - matplotlib takes a second

    with writing(folder):
        page = write_report(folder, survey, **{"evidence": [], "environment": describe_environment(), **parts})
    console.print(f"wrote {page}", soft_wrap=True, highlight=False)


def survey_as_json(survey: Survey) -> dict[str, Any]:
    """Return a survey for JSON, without its arrays."""
    outcomes = [
        {
            "adapter": each.adapter,
            "case": each.case,
            "dtype": each.dtype,
            "status": each.status,
            "reason": each.reason,
            **_comparison_as_json(each.comparison),
        }
        for each in survey.outcomes
    ]
    differences = [
        {
            "case": each.case,
            "dtype": each.dtype,
            "adapters": each.adapters,
            "agrees": each.agrees,
            "blame": each.blame,
            **_comparison_as_json(each.comparison),
        }
        for each in survey.differences
    ]
    return {"agrees": survey.agrees, "outcomes": outcomes, "differences": differences}


def _comparison_as_json(comparison: Comparison | None) -> dict[str, Any]:
    if comparison is None:
        return {}
    return {
        "loss_share": comparison.loss,
        "gradient_share": comparison.gradient,
        "shares": comparison.shares,
        "largest_scaled_ulps": float(np.max(comparison.ulps, initial=0.0)),
        "worst": comparison.worst,
    }


def write_json(path: Path | None, content: Any, console: Console) -> None:
    """Write a JSON file if a path is given, and print the path."""
    if path is not None:
        with writing(path):
            write_whole(path, json.dumps(jsonable(content), indent=1) + "\n")
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
