"""`lsce-parity matrix`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from parity_tests.commands.common import announce, cannot_run, exit_with, track
from parity_tests.evidence import ledger
from parity_tests.evidence.pages import replace_block
from parity_tests.studies.kit import evidence_of, is_kit, read_kit

COMMAND, DETAILS_COMMAND = "lsce-parity matrix", "lsce-parity matrix --devices"


def matrix(
    *,
    ledger_file: Annotated[Path, typer.Option("--ledger", metavar="FILE", help="Ledger with the evidence, as JSON.")],
    add: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Ledger of a session, or folder of a kit, to merge into it; may be repeated."
        ),
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

    With --devices the evidence for each generation of devices is written into another page. Of a kit, which
    `lsce-parity kit` makes, every result is compared with the truth as it is here, and what agrees is added.

    Exit code 0: written, or up to date; 1: a page is out of date; 2: a file is missing or malformed.

    Examples:
        lsce-parity matrix --ledger docs/ledger.json --devices docs/devices.md --check
        lsce-parity matrix --ledger docs/ledger.json --devices docs/devices.md --add my-gpu
    """
    if check and add:
        cannot_run("--check writes nothing, and --add does; give one of them")
    try:
        added = [session for path in add or () for session in (_read_kit(path) if is_kit(path) else ledger.read(path))]
        sessions = ledger.merge([*ledger.read(ledger_file), *added])
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


def _read_kit(path: Path) -> Iterator[ledger.Session]:
    """Yield what a kit proves, and print what it does not."""
    kit, bundles = read_kit(path)
    announce(f"checking the kit {path} of {kit['date']}, made with commit {kit['commit'] or 'unknown'}")
    for bundle, session, lines in track(evidence_of(kit, bundles), len(bundles), "dtypes"):
        dtype = bundle.cases[0].dtype
        proven = ", ".join(sorted(entry.adapter for entry in session.evidence))
        typer.echo(f"{dtype}: {len(bundle.cases)} cases; within their bounds: {proven or 'none'}")
        for line in (each for each in lines if not each.is_right):
            failed = f"{line.cases - line.agree} of {line.cases} cases, as {line.worst}: {line.reason}"
            typer.echo(f"{dtype}: not added: {line.adapter}, wrong in {failed}")
        yield session
