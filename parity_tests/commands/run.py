"""`lsce-parity run` and `lsce-parity adapters`."""

from collections import Counter
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from parity_tests.commands.common import (
    DeviceModelOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ReportOption,
    announce,
    cannot_run,
    check_device,
    check_device_model,
    check_dtypes,
    describe,
    dtypes_on,
    exit_with,
    keep_compiled,
    on_model,
    print_missing,
    select_cases,
    survey_as_json,
    track,
    write_json,
    write_page,
)
from parity_tests.commands.terminal import FittingTable, PlainConsole
from parity_tests.evidence.environment import describe_environment
from parity_tests.losses.adapters import UnavailableError
from parity_tests.losses.registry import ELSEWHERE, ENTRIES, make_adapter, match_names
from parity_tests.studies.survey import Member, Survey, examine_each, make_cases
from parity_tests.studies.verdicts import Difference, Outcome
from parity_tests.texts import count_of

# torch.compile takes seconds for each combination of options, and so does JAX for each linear case. Outside of `jit`
# JAX compiles every operation for each shape.
_SLOW = ("-compiled", "-eager", "-linear-reference", "-triton", *ELSEWHERE)
SLOW = frozenset(name for name in ENTRIES if name.endswith(_SLOW))
# Those of the losses of other libraries, which in narrow dtypes are computed or returned in these: unless asked for.
PEER_DTYPES = ("float32",)
# What most train in: by default no others, since JAX compiles for each.
DEFAULT_DTYPES = ("float32", "bfloat16")
SHOWN = 20


def run(
    *,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="Name with * and ?; may be repeated. [default: all that run here and are fast]"),
    ] = None,
    case: Annotated[list[str] | None, typer.Option("--case", help="Name with * and ?; may be repeated.")] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    device_model: DeviceModelOption = None,
    json_file: JsonOption = None,
    report: ReportOption = None,
) -> None:
    """Compare adapters with the truth and with each other, in every case and dtype.

    With --adapter, --case, or a device that is simulated, the default is every dtype, and else float32 and bfloat16.

    Adapters that take long run only if --adapter names them, such as jax-sharded and torch-sharded, whose classes are
    divided over virtual devices and over processes; jax-sharded:8 and torch-sharded:4 say over how many.

    With --device-model each is computed operation by operation with errors as large as the device's may be, and held
    against the bounds of that device; see docs/devices.md.

    Exit code 0: all of ours are within their bounds, 1: one is not, 2: a named adapter does not run here. The
    frameworks' own losses and those of other libraries are shown for comparison, by default in float32; their errors
    are no failure.

    The first run takes minutes, most of them in JAX's compiler. What it compiles is kept for the next, in ~/.cache/lsce
    or the folder that LSCE_PARITY_CACHE names ("off" for none). docs/parity.md has the times.

    Examples:
        lsce-parity run --report page
        lsce-parity run --adapter "*-fused" --case "ties*" --dtype bfloat16
        lsce-parity run --device-model tpu-v5e --json simulated.json
    """
    console = PlainConsole()
    check_device_model(device_model, device)
    chosen = bool(adapter or case or device_model)
    dtypes = check_dtypes(dtype, dtypes_on(device_model) if chosen else DEFAULT_DTYPES)
    names = select_cases(case)
    announce("loading the adapters")
    members, missing = find_members(adapter, device, device_model)
    keep_compiled()
    if not adapter and not dtype:
        members = {name: each if each.ours else replace(each, dtypes=PEER_DTYPES) for name, each in members.items()}
    cases = make_cases(names, dtypes)
    where = f" on the simulated arithmetic of {device_model}" if device_model else ""
    announce(f"running {', '.join(members)} in {count_of(len(names), 'case')} in {', '.join(dtypes)}{where}")
    found = Survey(members, [], [])
    for outcomes, differences in track(examine_each(members, cases), len(cases), "cases"):
        found.outcomes.extend(outcomes)
        found.differences.extend(differences)
    print_survey(found, console)
    print_missing(missing, console)
    environment = describe_environment()
    content = {
        "command": "run",
        "device_model": device_model,
        "survey": survey_as_json(found),
        "missing": missing,
        "environment": environment,
    }
    write_json(json_file, content, console)
    write_page(report, found, console, title="lsce parity", evidence=found.evidence(), environment=environment)
    if not found.called:
        cannot_run("no adapter can handle these cases")
    console.print(verdict_line(found), highlight=False)
    exit_with(found.agrees)


def find_members(
    patterns: list[str] | None, device: str, device_model: str | None = None
) -> tuple[dict[str, Member], dict[str, str]]:
    """Return the chosen adapters, and for each that does not run here the reason.

    An adapter named in full must run here. By default at least one of ours must.
    """
    check_device(device)
    members, missing = {}, {}
    for name in match_names(patterns) if patterns else [name for name in ENTRIES if name not in SLOW]:
        entry = ENTRIES.get(name)
        try:
            made = on_model(make_adapter(name, device), device_model)
        except ValueError as error:
            cannot_run(str(error))
        except UnavailableError as error:
            if name in (patterns or []):
                cannot_run(f"{name}: {error}")
            missing[name] = str(error)
            continue
        members[name] = Member(made, entry is None or entry.kind == "ours", entry.twin if entry else None)
    if not any(member.ours for member in members.values()) and not patterns:
        reasons = {reason for name, reason in missing.items() if ENTRIES[name].kind == "ours"}
        cannot_run(f"none of our adapters is here for {device}: " + "; ".join(sorted(reasons)))
    if not members:
        cannot_run("; ".join(sorted(set(missing.values()))))
    return members, missing


def print_survey(found: Survey, console: Console) -> None:
    """Print a row for each adapter, then the disagreements."""
    table = FittingTable("adapter", ">cases", ">agree", ">differ", ">failed", ">loss", ">gradient", "~in case")
    for name, member in found.members.items():
        outcomes = found.of(name)
        status = Counter(outcome.status for outcome in outcomes)
        with_result = [outcome for outcome in outcomes if outcome.comparison]
        worst = max(with_result, key=_share, default=None)
        shares = [max((getattr(o.comparison, part) for o in with_result), default=0.0) for part in ("loss", "gradient")]
        table.add_row(
            Text(name, style="" if member.ours else "dim"),
            str(len(outcomes)),
            *(str(status[key] or "") for key in ("agree", "disagree", "failed")),
            *(f"{share:.2f}" if share < 1000 else f"{share:.0e}" for share in shares),
            f"{worst.case} {worst.dtype}" if worst else "",
        )
    console.print("Largest error as a share of its bound; at most 1 is right. Dim: other libraries, for comparison.\n")
    console.print(table)
    console.print()
    _print_wrong(found, console)
    _print_closeness(found, console)


def _share(outcome: Outcome) -> float:
    return outcome.comparison.share if outcome.comparison else 0.0


def _print_wrong(found: Survey, console: Console) -> None:
    wrong = [
        outcome
        for outcome in found.outcomes
        if found.members[outcome.adapter].ours and outcome.status in ("disagree", "failed")
    ]
    lines = [_describe(outcome) for outcome in sorted(wrong, key=_share, reverse=True)]
    lines += [_describe_difference(each) for each in found.differences if not each.agrees]
    if wrong:
        worst = max(wrong, key=_share)
        if worst.comparison and worst.comparison.worst:
            lines.insert(1, f"    its inputs: {describe(worst.comparison.worst)}")
    for line in lines[:SHOWN]:
        console.print(Text(line))
    if len(lines) > SHOWN:
        console.print(f"... and {len(lines) - SHOWN} more (--json has all)")
    if lines:
        console.print()


def _describe(outcome: Outcome) -> str:
    return f"{outcome.adapter} in {outcome.case} {outcome.dtype}: {outcome.comparison or outcome.reason}"


def _describe_difference(difference: Difference) -> str:
    first, second = difference.adapters
    blame = f"outside of the bounds of the truth: {' and '.join(difference.blame or ()) or 'neither'}"
    return f"{first} (A) against {second} (B) in {difference.case} {difference.dtype}: {difference.comparison}; {blame}"


def _print_closeness(found: Survey, console: Console) -> None:
    """Print how often ours are no further from the truth than a peer of the same framework."""
    for name in (name for name, member in found.members.items() if member.ours):
        for peer in found.peers_of(name):
            closer, equal, cases = found.closeness(name, [peer])
            if cases:
                console.print(f"{name} is as close to the truth as {peer}, or closer, in {closer + equal} of {cases}")


def verdict_line(found: Survey) -> str:
    """Return the verdict in one line."""
    ours = [outcome for outcome in found.outcomes if found.members[outcome.adapter].ours]
    called = [outcome for outcome in ours if outcome.status != "unsupported"]
    adapters = len({outcome.adapter for outcome in called})
    scope = (
        f"{count_of(adapters, 'adapter')}, {count_of(len(called), 'result')}, {len(found.differences)} of them in pairs"
    )
    if found.agrees:
        return f"AGREE: {scope}, at most {max(map(_share, called), default=0):.2f} of a bound"
    wrong = sum(outcome.status != "agree" for outcome in called)
    differing = sum(not difference.agrees for difference in found.differences)
    return f"DISAGREE: {count_of(wrong, 'result')} and {count_of(differing, 'pair')} of them ({scope})"


def adapters(*, device: DeviceOption = "cpu", json_file: JsonOption = None) -> None:
    """List the adapters, and why some do not run here.

    Examples:
        lsce-parity adapters
        lsce-parity adapters --device cuda --json adapters.json
    """
    console = PlainConsole()
    check_device(device)
    reasons: dict[str, str] = {}
    for name in ENTRIES:
        try:
            make_adapter(name, device)
        except UnavailableError as error:
            reasons[name] = str(error)
    numbers = {reason: number for number, reason in enumerate(dict.fromkeys(reasons.values()), 1)}
    table = FittingTable("adapter", "framework", "whose", "here")
    for name, entry in ENTRIES.items():
        here = f"no, reason {numbers[reasons[name]]}" if name in reasons else "yes"
        table.add_row(name, entry.framework, entry.kind, here)
    console.print(table)
    for reason, number in numbers.items():
        console.print(f"reason {number}: {reason}", highlight=False)
    rows = [
        {"name": name, "framework": entry.framework, "whose": entry.kind, "reason_not_here": reasons.get(name)}
        for name, entry in ENTRIES.items()
    ]
    write_json(json_file, {"command": "adapters", "device": device, "adapters": rows}, console)
