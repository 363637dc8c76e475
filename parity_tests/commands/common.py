"""What the subcommands share: exit codes, JSON, progress."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, is_dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from parity_tests.evidence.environment import describe_environment
from parity_tests.studies.survey import Survey
from parity_tests.truth.cases import case_names
from parity_tests.truth.comparison import Comparison, Worst
from parity_tests.truth.precision import DTYPES

AGREE, DISAGREE, CANNOT_RUN = 0, 1, 2

JsonOption = Annotated[Path | None, typer.Option("--json", dir_okay=False, help="File for everything, as JSON.")]
ReportOption = Annotated[Path | None, typer.Option("--report", file_okay=False, help="Folder for a web page.")]
DtypeOption = Annotated[
    list[str] | None, typer.Option("--dtype", help="float64, float32, bfloat16 or float16; may be repeated.")
]
FirstOption = Annotated[
    list[str] | None, typer.Option("--a", metavar="KEY=VALUE", help="Argument for the first; may be repeated.")
]
SecondOption = Annotated[
    list[str] | None, typer.Option("--b", metavar="KEY=VALUE", help="Argument for the second; may be repeated.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda or tpu.")]

Item = TypeVar("Item")


class PlainConsole(Console):
    """A console that takes no text for markup: names and messages are a user's."""

    def __init__(self) -> None:
        """Switch markup off."""
        super().__init__(markup=False)

    def on_broken_pipe(self) -> None:
        """End with exit code 2 where nobody reads on: 1, which is Rich's, says that losses disagree."""
        try:
            super().on_broken_pipe()
        except SystemExit:
            raise SystemExit(CANNOT_RUN) from None


def cannot_run(message: str) -> NoReturn:
    """Say what stands in the way, and end with exit code 2."""
    typer.echo(f"cannot run: {message}", err=True)
    raise typer.Exit(code=CANNOT_RUN)


def check_dtypes(given: Sequence[str] | None, default: Sequence[str]) -> tuple[str, ...]:
    """Return the dtypes that are asked for."""
    for dtype in given or ():
        if dtype not in DTYPES:
            cannot_run(f"there is no dtype {dtype!r} here; the dtypes are {', '.join(DTYPES)}")
    return tuple(given or default)


def select_cases(patterns: Sequence[str] | None) -> list[str]:
    """Return the names of the cases that are asked for, with * and ?; all of them without a pattern."""
    names = [name for name in case_names() if any(fnmatch(name, pattern) for pattern in patterns or ["*"])]
    if not names:
        cannot_run(f"no case is called {' or '.join(patterns or [])}; the cases are {', '.join(case_names())}")
    return names


def exit_with(agrees: bool) -> NoReturn:
    """End with exit code 0 or 1."""
    raise typer.Exit(code=AGREE if agrees else DISAGREE)


def track(items: Iterable[Item], total: int, title: str, console: Console) -> Iterator[Item]:
    """Yield items behind a progress bar, which leaves nothing on the screen."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield from progress.track(items, total=total)


def describe(worst: Worst) -> str:
    """Return the inputs of an element in one line."""
    return "; ".join(f"{name}: {value}" for name, value in worst.inputs.items())


def jsonable(value: Any) -> Any:
    """Return a value as JSON has it; infinities and NaN, which it has not, become the strings "inf", "-inf", "nan"."""
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
    """Write a web page, if one is wanted, and say so; the parts are those of `write_report`."""
    if folder is None:
        return
    from parity_tests.report.page import write_report  # noqa: PLC0415 - matplotlib takes a second

    try:
        page = write_report(folder, survey, **{"evidence": [], "environment": describe_environment(), **parts})
    except OSError as error:
        cannot_run(f"{folder} cannot be written: {error.strerror}")
    console.print(f"wrote {page}", soft_wrap=True, highlight=False)


def survey_as_json(survey: Survey) -> dict[str, Any]:
    """Return a survey for JSON: everything but the arrays."""
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
        "largest_scaled_ulps": float(np.max(comparison.ulps, initial=0.0)),
        "worst": comparison.worst,
    }


def write_json(path: Path | None, content: Any, console: Console) -> None:
    """Write a file, if one is wanted, and say so."""
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(jsonable(content), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            cannot_run(f"{path} cannot be written: {error.strerror}")
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
