"""`lsce-parity matrix`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from parity_tests.commands.common import (
    JsonOption,
    announce,
    cannot_run,
    check_page,
    exit_with,
    reason_of,
    track,
    write_json,
)
from parity_tests.commands.terminal import PlainConsole
from parity_tests.evidence import ledger
from parity_tests.evidence.pages import replace_block
from parity_tests.studies.kit import evidence_of, is_kit, read_kit
from parity_tests.texts import count_of

COMMAND, DETAILS_COMMAND = "lsce-parity matrix", "lsce-parity matrix devices"


def matrix(
    *,
    ledger_file: Annotated[Path, typer.Option("--ledger", metavar="FILE", help="Ledger with the evidence, as JSON.")],
    add: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Ledger of a session, or folder of a kit, to merge into it; may be repeated."
        ),
    ] = None,
    page: Annotated[
        Path, typer.Option(metavar="FILE", help="Page with the two comments that the matrix stands between.")
    ] = Path("README.md"),
    json_file: JsonOption = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit code 1 if the page is out of date.")
    ] = False,
) -> None:
    """Write the support matrix into a page, from the ledger that `pytest --parity-ledger=FILE` writes.

    If the page also has the comments of `lsce-parity matrix devices`, the evidence for each generation of devices is
    written there. Of a kit, which `lsce-parity kit` makes, every result is compared with the truth as it is here, and
    what agrees is added.

    Exit code 0: written, or up to date; 1: a page is out of date; 2: a file is missing or malformed.

    Examples:
        lsce-parity matrix --ledger docs/ledger.json --page docs/devices.md --check
        lsce-parity matrix --ledger docs/ledger.json --page docs/devices.md --add my-gpu
    """
    if check and add:
        cannot_run("--check writes nothing, and --add does; give one of them")
    check_page(page, COMMAND)
    try:
        known = ledger.read(ledger_file)
        added = [session for path in add or () for session in (_read_kit(path) if is_kit(path) else ledger.read(path))]
        sessions = ledger.merge([*known, *added])
        old = page.read_text(encoding="utf-8")
        new = replace_block(old, COMMAND, ledger.matrix(sessions))
        if f"<!-- {DETAILS_COMMAND}:" in new:
            new = replace_block(new, DETAILS_COMMAND, ledger.details(sessions))
        if add:
            ledger.write(ledger_file, sessions)
        if not check:
            page.write_text(new, encoding="utf-8")
    except OSError as error:
        cannot_run(f"{error.filename}: {reason_of(error)}")
    except ValueError as error:
        cannot_run(str(error))
    changed = [str(page)] if new != old else []
    write_json(
        json_file,
        {"command": "matrix", "changed": changed, "sessions": [_as_json(each) for each in sessions]},
        PlainConsole(),
    )
    if check:
        if changed:
            announce(f"{page} is not what {ledger_file} gives; run this without --check")
        exit_with(not changed)
    typer.echo(f"wrote {page}")


def _as_json(session: ledger.Session) -> dict[str, Any]:
    return {"versions": session.versions, "date": session.date, "evidence": sorted(session.evidence)}


def _read_kit(path: Path) -> Iterator[ledger.Session]:
    """Yield what a kit proves, and print what it does not."""
    kit, bundles = read_kit(path)
    announce(f"checking the kit {path} of {kit['date']}, made with commit {kit['commit'] or 'unknown'}")
    for bundle, session, lines in track(evidence_of(kit, bundles), len(bundles), "dtypes"):
        dtype = bundle.cases[0].dtype
        proven = ", ".join(sorted(entry.adapter for entry in session.evidence))
        typer.echo(f"{dtype}: {count_of(len(bundle.cases), 'case')}; within their bounds: {proven or 'none'}")
        for line in (each for each in lines if not each.is_right):
            failed = f"{line.cases - line.agree} of {line.cases} cases, as {line.worst}: {line.reason}"
            typer.echo(f"{dtype}: not added: {line.adapter}, wrong in {failed}")
        yield session
