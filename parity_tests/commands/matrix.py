"""`lsce-parity matrix`."""

from pathlib import Path
from typing import Annotated

import typer

from parity_tests.commands.common import cannot_run, exit_with
from parity_tests.evidence import ledger
from parity_tests.evidence.pages import replace_block

COMMAND = "lsce-parity matrix"


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
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit code 1 if the page is out of date.")
    ] = False,
) -> None:
    """Write the support matrix into a page, from the ledger that `pytest --parity-ledger=FILE` writes.

    Exit code 0: written, or up to date; 1: the page is out of date; 2: a file is missing or malformed.
    """
    if check and add:
        cannot_run("--check writes nothing, and --add does; give one of them")
    try:
        page = readme.read_text(encoding="utf-8")
        sessions = ledger.merge(session for file in (ledger_file, *(add or ())) for session in ledger.read(file))
        updated = replace_block(page, COMMAND, ledger.matrix(sessions))
        if check:
            if updated != page:
                typer.echo(f"{readme} is not what {ledger_file} gives; run this without --check", err=True)
            exit_with(updated == page)
        if add:
            ledger.write(ledger_file, sessions)
        readme.write_text(updated, encoding="utf-8")
    except (OSError, ValueError) as error:
        cannot_run(str(error))
    typer.echo(f"wrote {readme}")
