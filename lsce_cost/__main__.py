"""The command line: `lsce-cost`, or `python -m lsce_cost`."""

import json
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, NoReturn

from lsce_spec.extras import require_for_command

require_for_command("lsce-cost", "cost", "typer", "rich", "matplotlib")

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lsce_cost import show
from lsce_cost.cost import CompilerMissingError, Cost, Request, check_compiler, measure_all
from lsce_cost.devices import LIMITS
from lsce_cost.published import LEAST, MOST

CANNOT_RUN = 2

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def cost(  # noqa: PLR0913, PLR0917 - each is an option of the command line
    target: Annotated[str, typer.Option(help=f"The device: {', '.join(LIMITS)}.")],
    rows: Annotated[int, typer.Option(help="Rows, as in a batch of tokens.")],
    classes: Annotated[int, typer.Option(help="Classes, as in a vocabulary.")],
    features: Annotated[
        int | None, typer.Option(help="Features of the last linear layer, to compute it with the loss.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, float16; float64 on GPUs.")] = "bfloat16",
    mesh: Annotated[
        str | None, typer.Option(metavar="AxB", help="Divide rows over A and classes over B devices.")
    ] = None,
    way: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Only ways like this, with * and ?; may be repeated.")
    ] = None,
    chunks: Annotated[
        str | None, typer.Option(metavar="N,N", help="Rows that the linear loss takes at a time, a way for each.")
    ] = None,
    forward: Annotated[bool, typer.Option("--forward", help="The loss without gradients.")] = False,
    bundles: Annotated[
        bool, typer.Option(help="Count the instruction bundles of TPUs, which takes half as long again.")
    ] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, metavar="FILE", help="Write all figures to this file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, metavar="FILE", help="Draw them into this file: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """What will the loss cost on a device, and does it fit? Compiled for the device without one, and not run.

    Exit code 0: a way fits; 1: none does; 2: it cannot be said.
    """
    try:
        request = Request(
            target=target,
            rows=rows,
            classes=classes,
            features=features,
            dtype=dtype,
            mesh=_parse_mesh(mesh),
            gradient=not forward,
            chunks=_parse_chunks(chunks),
        )
        names = _select(request, way)
        check_compiler(target)
    except (ValueError, CompilerMissingError) as error:
        _cannot_run(str(error))
    console = Console()
    costs = list(_tracked(measure_all(request, names, with_bundles=bundles), len(names)))
    console.print(show.title(request), highlight=False)
    console.print()
    console.print(show.cost_table(request, costs, console.width))
    for note in show.notes(request, costs, (LEAST, MOST)):
        console.print(f"\n{note}", highlight=False, markup=False)
    if json_file is not None:
        text = json.dumps(show.as_json(request, costs), indent=1) + "\n"
        _write(json_file, text.encode(), console)
    if plot is not None:
        _draw(plot, request, costs, console)
    raise typer.Exit(code=0 if any(cost.fits for cost in costs) else 1)


def _parse_mesh(given: str | None) -> tuple[int, int] | None:
    if given is None:
        return None
    found = re.fullmatch(r"(\d+)x(\d+)", given)
    if found is None:
        raise ValueError(f"--mesh must be two numbers like 4x4, rows first, but is {given!r}")
    return int(found[1]), int(found[2])


def _parse_chunks(given: str | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", given):
        raise ValueError(f"--chunks must be numbers like 512,1024, but is {given!r}")
    return tuple(map(int, given.split(",")))


def _select(request: Request, patterns: Sequence[str] | None) -> list[str]:
    names = [name for name in request.ways if any(fnmatch(name, pattern) for pattern in patterns or ("*",))]
    if not names:
        given = " or ".join(map(repr, patterns or ()))
        layer = "" if request.features else "; the linear ones need --features"
        raise ValueError(f"no way is called {given}; the ways are: {'; '.join(request.ways)}{layer}")
    return names


def _tracked(costs: Iterator[Cost], total: int) -> Iterator[Cost]:
    """Yield costs with a progress bar on stderr, which vanishes at the end, and appears on terminals only."""
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
        yield from progress.track(costs, total=total)


def _draw(path: Path, request: Request, costs: Sequence[Cost], console: Console) -> None:
    figure = show.draw(request, costs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:  # a format that matplotlib does not know
        _cannot_run(f"{path} cannot be written: {error}")
    console.print(f"wrote {path}", soft_wrap=True, highlight=False)


def _write(path: Path, content: bytes, console: Console) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        _cannot_run(f"{path} cannot be written: {error.strerror}")
    console.print(f"\nwrote {path}", soft_wrap=True, highlight=False)


def _cannot_run(message: str) -> NoReturn:
    typer.echo(f"cannot run: {message}", err=True)
    raise typer.Exit(code=CANNOT_RUN)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
