"""`lsce-parity matrix`."""

from pathlib import Path
from typing import Annotated

import typer

from parity_tests.commands.common import cannot_run, exit_with
from parity_tests.evidence import ledger
from parity_tests.evidence.pages import replace_block

COMMAND, DETAILS_COMMAND = "lsce-parity matrix", "lsce-parity matrix --devices"


def matrix(
    *,
    ledger_file: Annotated[Path, typer.Option("--ledger", metavar="FILE", help="Ledger with the evidence, as JSON.")],
    add: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Ledger of a session to merge into it; may be repeated."),
    ] = None,
    readme: Annotated[
        Path, typer.Option(metavar="FILE", help="Page with the two comments that the matrix stands between.")
    ] = Path("README.md"),
    devices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Page with the comments for the evidence of every device.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit code 1 if the page is out of date.")
    ] = False,
) -> None:
    """Write the support matrix into a page, from the ledger that `pytest --parity-ledger=FILE` writes.

    With --devices the evidence for each generation of devices is written into another page.

    Exit code 0: written, or up to date; 1: a page is out of date; 2: a file is missing or malformed.
    """
    if check and add:
        cannot_run("--check writes nothing, and --add does; give one of them")
    try:
        sessions = ledger.merge(session for file in (ledger_file, *(add or ())) for session in ledger.read(file))
        pages = {readme: (COMMAND, ledger.matrix(sessions))}
        if devices is not None:
            pages[devices] = (DETAILS_COMMAND, ledger.details(sessions))
        old = {path: path.read_text(encoding="utf-8") for path in pages}
        new = {path: replace_block(old[path], command, text) for path, (command, text) in pages.items()}
        if check:
            for path in (path for path in pages if new[path] != old[path]):
                typer.echo(f"{path} is not what {ledger_file} gives; run this without --check", err=True)
            exit_with(new == old)
        if add:
            ledger.write(ledger_file, sessions)
        for path, text in new.items():
            path.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        cannot_run(str(error))
    typer.echo(f"wrote {', '.join(map(str, new))}")
