"""`lsce-parity peer-tests`, and the tables of docs/peer-tests.md."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from parity_tests.commands.common import JsonOption, check_page, exit_with, track, write_json, write_table
from parity_tests.commands.terminal import FittingTable, PlainConsole
from parity_tests.faults.dense import FAULTS
from parity_tests.studies.published_comparisons import (
    Compare,
    Setting,
    squared_with_reference,
    sum_with_rows,
    targets,
    unsmoothed_with_plain,
    whole_with_parts,
    with_own_differences,
    with_reference,
)
from parity_tests.studies.published_tests import PEER_TESTS
from parity_tests.studies.published_verdicts import Mark, Verdict, settings_of, verdicts_on

SYMBOLS: dict[Mark, str] = {"caught": "✓", "survives": "✗", "nothing": "—"}
COMMAND = "lsce-parity peer-tests"
AGAINST: dict[Compare, str] = {
    with_reference: "a reference",
    squared_with_reference: "a reference, both squared",
    with_own_differences: "finite differences of its loss",
    whole_with_parts: "its own sum over parts",
    sum_with_rows: "its own rows",
    unsmoothed_with_plain: "the plain loss, with smoothing 0",
    targets: "targets by hand",
}


def peer_tests(
    *,
    json_file: JsonOption = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", dir_okay=False, help="Page whose table is replaced.")
    ] = None,
) -> None:
    """Show which wrong losses the published label-smoothing tests of other libraries catch.

    Exit code 0: the bounds reject every fault that one of these tests rejects, 1: they do not.

    Examples:
        lsce-parity peer-tests
        lsce-parity peer-tests --json peer-tests.json
    """
    check_page(markdown, COMMAND)
    console = PlainConsole()
    for fault in track(FAULTS, len(FAULTS), "wrong losses"):
        verdicts_on(fault)
    console.print(_table())
    names = [f"{number} {peer.name}" for number, peer in enumerate(PEER_TESTS, 1)]
    console.print(f"{', '.join(names)}, B computed bounds", highlight=False)
    console.print("✓ caught, ✗ survives, — no visible effect, ~ close", highlight=False)
    write_json(json_file, {"command": "peer-tests", "faults": _as_json()}, console)
    write_table(markdown, COMMAND, generated_markdown(), console)
    accepted = [fault for fault in shown_faults() if bounds_symbol(fault) != SYMBOLS["caught"]]
    for fault in accepted:
        console.print(f"the bounds accept {fault}, which one of these tests rejects", highlight=False)
    exit_with(not accepted)


def _table() -> FittingTable:
    table = FittingTable("wrong in this way", *map(str, range(1, len(PEER_TESTS) + 1)), "B")
    for fault in shown_faults():
        table.add_row(fault, *map(symbol, verdicts_on(fault).values()), bounds_symbol(fault))
    return table


def _as_json() -> dict[str, dict[str, Any]]:
    """Return for each fault what every test finds, and whether the bounds reject it on the inputs of these tests."""
    found = {}
    for fault in FAULTS:
        verdicts = verdicts_on(fault)
        tests = {peer.name: asdict(verdict) for peer, verdict in zip(PEER_TESTS, verdicts.values(), strict=True)}
        found[fault] = {"tests": tests, "bounds": any(verdict.ours for verdict in verdicts.values())}
    return found


def symbol(verdict: Verdict) -> str:
    """Return the symbol of a verdict; ~ means that other random inputs may change it."""
    return SYMBOLS[verdict.mark] + ("~" if verdict.close else "")


def bounds_symbol(fault: str) -> str:
    """Return the symbol of the bounds' verdict on a fault, on the inputs of all these tests."""
    return SYMBOLS["caught" if any(verdict.ours for verdict in verdicts_on(fault).values()) else "nothing"]


def shown_faults() -> list[str]:
    """Return the faults that have a visible effect on the inputs of at least one test."""
    return [fault for fault in FAULTS if any(verdict.mark != "nothing" for verdict in verdicts_on(fault).values())]


def generated_markdown() -> str:
    """Return the generated part of docs/peer-tests.md."""
    shown = shown_faults()
    lines = _head("wrong in this way", *[peer.name for peer in PEER_TESTS], "bounds")
    for fault in shown:
        lines.append(_row(FAULTS[fault], *map(symbol, verdicts_on(fault).values()), bounds_symbol(fault)))
    lines += ["", "No test has inputs that show these faults:", ""]
    lines += [f"- {FAULTS[fault]}" for fault in FAULTS if fault not in shown]
    lines += ["", "## The tests", ""]
    lines += _head("", "test", "dtype", "rows x classes", "logits", "e", "options", "compared with", "loss", "gradient")
    for peer in PEER_TESTS:
        lines += [_row(peer.name, *_described(setting)) for setting in settings_of(peer)]
    lines += ["", "## The files that were read", "", *_head("", "repository", "file", "commit")]
    lines += [_row(peer.name, peer.repository, f"`{peer.path}`", f"`{peer.commit}`") for peer in PEER_TESTS]
    return "\n".join(lines)


def _head(*cells: str) -> list[str]:
    return [_row(*cells), _row(*["---"] * len(cells))]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _described(setting: Setting) -> list[str]:
    case, tolerances = setting.case, (setting.loss, setting.gradient)
    rows = setting.rows or int(np.prod(case.batch_shape))
    options = [f"{name}={value}" for name, value in {"reduction": "none", **case.options}.items()]
    options += ["class weights"] * (case.class_weight is not None) + ["soft labels"] * (case.labels.dtype.kind == "f")
    return [
        f"`{setting.test}`",
        case.dtype,
        f"{rows} x {case.num_classes}",
        setting.logits,
        f"{case.smoothing:g}",
        ", ".join(options),
        AGAINST[setting.compare] if any(tolerances) else "nothing",
        *[f"{each.rtol:g}, {each.atol:g}" if each else "—" for each in tolerances],
    ]
