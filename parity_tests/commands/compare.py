"""`lsce-parity compare A B`."""

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from parity_tests.commands.common import (
    CANNOT_RUN,
    AtolOption,
    DeviceModelOption,
    DeviceOption,
    DtypeOption,
    FirstOption,
    JsonOption,
    ReportOption,
    RtolOption,
    SecondOption,
    announce,
    cannot_run,
    check_device,
    check_device_model,
    check_dtypes,
    exit_with,
    on_model,
    survey_as_json,
    write_json,
    write_page,
)
from parity_tests.commands.terminal import FittingTable, PlainConsole, print_verdict
from parity_tests.evidence.environment import describe_environment
from parity_tests.losses.adapters import Adapter, UnavailableError
from parity_tests.losses.user_losses import (
    SpecificationError,
    load_adapter,
    parse_options,
)
from parity_tests.report.pairs import lines_of, parts_of_page, verdict_lines
from parity_tests.report.words import PageTable
from parity_tests.studies.pairs import Pair, compare_sides, make_tolerance
from parity_tests.studies.precision_effects import OBSERVED, Effects, find_effects
from parity_tests.studies.probes import (
    LABEL_KINDS,
    LOGIT_KINDS,
    NUM_CLASSES,
    Question,
    is_edge,
    plain_cases,
)
from parity_tests.studies.questions import Own, check_pair, make_question, make_sides, take_batches
from parity_tests.studies.sameness import Accuracy, Sameness

SideArgument = Annotated[
    str,
    typer.Argument(
        help="torch:package.module:name or jax:package.module:name, called as loss(logits, labels); or an adapter's "
        "name (see `lsce-parity adapters`), oracle, mutant:FAULT.",
        show_default=False,
    ),
]


def compare(  # noqa: PLR0913 - each option of the command line is a parameter
    first: SideArgument,
    second: SideArgument,
    *,
    first_option: FirstOption = None,
    second_option: SecondOption = None,
    smoothing: Annotated[float | None, typer.Option(help="The smoothing that both use. [default: 0.1]")] = None,
    convention: Annotated[
        str | None,
        typer.Option(help="Expected convention: uniform, non_target, clamp, max_sup. [default: the first loss's]"),
    ] = None,
    reduction: Annotated[
        str | None, typer.Option(help="Expected reduction of a loss that returns a scalar: mean, sum. [default: mean]")
    ] = None,
    classes: Annotated[
        list[int] | None, typer.Option(min=1, help=f"Number of classes; may be repeated. [default: {NUM_CLASSES}]")
    ] = None,
    ignore_index: Annotated[int | None, typer.Option(help="Label that both ignore.")] = None,
    z_loss: Annotated[float | None, typer.Option(help="Z-loss that both add.")] = None,
    softcap: Annotated[float | None, typer.Option(help="Softcap that both use.")] = None,
    subtract_entropy: Annotated[
        bool, typer.Option("--subtract-entropy", help="Both subtract the entropy of the target.")
    ] = False,
    linear: Annotated[
        bool, typer.Option("--linear", help="Both are linear losses, called as loss(hidden, weight, labels).")
    ] = False,
    logits_are: Annotated[str, typer.Option(help=f"What both take for logits: {', '.join(LOGIT_KINDS)}.")] = "logits",
    labels_are: Annotated[
        str,
        typer.Option(help=f"What both take for labels: {', '.join(LABEL_KINDS)}; all but classes are [N, K] arrays."),
    ] = "classes",
    inputs: Annotated[
        list[Path] | None,
        typer.Option(
            dir_okay=False,
            help="File .safetensors or .npz with logits (or hidden and weight) and labels of your own, in place of the "
            "cases that are drawn; may be repeated.",
        ),
    ] = None,
    rtol: RtolOption = None,
    atol: AtolOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    device_model: DeviceModelOption = None,
    explain_precision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Say whether the arithmetic of this device explains how the two differ."),
    ] = None,
    json_file: JsonOption = None,
    report: ReportOption = None,
) -> None:
    """Compare two losses, values and gradients; if they differ, name the difference.

    The losses may be any functions of logits and labels. The first loss is the reference if the harness knows it, else
    the second. Or define the reference by --convention, --reduction, --smoothing, --z-loss, --softcap,
    --subtract-entropy. If neither is known, both run in float64, which tells a mistake from rounding.

    Exit code 0: they agree, 1: they differ, 2: it cannot be said, for example because one gives no result at all.

    Examples:
        lsce-parity compare torch:torch.nn:CrossEntropyLoss jax:my.losses:smooth_ce --a label_smoothing=0.1
        lsce-parity compare jax:my.losses:smooth_ce oracle --convention non_target
        lsce-parity compare torch:my.losses:focal jax:my.losses:focal --a gamma=2 --b gamma=2
        lsce-parity compare torch:my.losses:asymmetric jax:my.losses:asymmetric --labels-are multi_hot
        lsce-parity compare torch:my.losses:fused_linear oracle --linear
        lsce-parity compare torch:my.losses:smooth_ce jax:my.losses:smooth_ce --inputs batch.safetensors
        lsce-parity compare torch:my.losses:smooth_ce jax:my.losses:smooth_ce --device-model tpu-v5e
        lsce-parity compare jax:my.losses:head torch:my.losses:head --linear --explain-precision tpu-v5e
    """
    console = PlainConsole()
    dtypes = check_dtypes(dtype, ("float32",))
    own = None
    try:
        question = make_question(
            smoothing=smoothing,
            convention=convention,
            reduction=reduction,
            classes=classes,
            ignore_index=ignore_index,
            z_loss=z_loss,
            softcap=softcap,
            subtract_entropy=subtract_entropy,
            linear=linear,
            logits_are=logits_are,
            labels_are=labels_are,
        )
        if inputs:
            if classes or dtype or logits_are != "logits" or labels_are != "classes":
                raise ValueError("--inputs says it all: leave out --classes, --dtype, --logits-are and --labels-are")
            question, own = take_batches(question, inputs)
    except (TypeError, ValueError) as error:
        cannot_run(str(error))
    check_device(device)
    check_device_model(device_model, device)
    check_device_model(explain_precision, "cpu")
    adapters = [
        load_loss(specification, option, device, question.linear, own.arrays if own else ())
        for specification, option in ((first, first_option), (second, second_option))
    ]
    try:
        check_pair(question, (first, second), drawn=bool(classes) or (ignore_index is not None and not own))
    except ValueError as error:
        cannot_run(str(error))
    if own is not None:
        announce_batches(question, own)
    probes = [case for case in plain_cases(question, dtypes[0]) if case.name.startswith("plain")]
    sides = make_sides(adapters, own.cases if own else probes, question, own, lambda text: console.print(Text(text)))
    try:
        for side in sides:
            on_model(side.adapter, explain_precision)
        first_side, second_side = (
            replace(side, adapter=on_model(side.adapter, device_model), exact=side.adapter) for side in sides
        )
    except UnavailableError as error:
        cannot_run(str(error))
    tolerance = make_tolerance(rtol, atol)
    pair = compare_sides(first_side, second_side, question, dtypes, tolerance, announce, own.cases if own else ())
    print_pair(pair, console)
    effects = None
    if explain_precision is not None:
        ordinary = [case for case in pair.cases if not is_edge(case)]
        effects = find_effects(adapters, ordinary, explain_precision)
        _print_effects(effects, console)
    write_pair("compare", pair, question, effects, json_file, report, console)
    end_with_verdict(pair, console)


def load_loss(
    specification: str, options: list[str] | None, device: str, linear: bool, arrays: Sequence[str]
) -> Adapter:
    """Return the adapter of a loss, or exit with 2."""
    try:
        return load_adapter(specification, parse_options(options or []), device, linear=linear, arrays=arrays)
    except (SpecificationError, UnavailableError) as error:
        cannot_run(str(error))


def announce_batches(question: Question, own: Own) -> None:
    """Print on stderr what the user's batches are."""
    also = f", also {', '.join(own.arrays)}" if own.arrays else ""
    for case in own.cases:
        announce(f"{case.name}: {case.dtype} {list(case.logits.shape)}, labels {list(case.labels.shape)}{also}")
    if question.beyond:
        announce(question.beyond)


def print_pair(pair: Pair, console: Console) -> None:
    """Print what the comparison of two losses found, without the verdict."""
    for line in lines_of(pair):
        console.print(Text(line, style="bold" if line.startswith(("A  ", "B  ")) else ""))
    console.print()


def end_with_verdict(pair: Pair, console: Console) -> NoReturn:
    """Print the verdict on two losses and exit with its code."""
    print_verdict(verdict_lines(pair), console)
    if pair.agrees is None:
        raise typer.Exit(code=CANNOT_RUN)
    exit_with(pair.agrees)


def _print_effects(effects: Effects, console: Console) -> None:
    table = _effects_table(effects)
    console.print(f"{table.note}:\n")
    console.print(FittingTable.of(table.headings, table.rows))
    console.print(f"\n{_explanation(effects)}.\n", highlight=False)


def _effects_table(effects: Effects) -> PageTable:
    parts = list(effects.changes[OBSERVED])
    note = f"What the arithmetic of {effects.device} changes in one loss, as a share of the largest element, in the "
    return PageTable(
        f"Arithmetic of {effects.device}",
        ["source", *(f">{part}" for part in parts)],
        [[source, *(f"{changes[part]:.1e}" for part in parts)] for source, changes in effects.changes.items()],
        f"{note}worst case",
    )


def _explanation(effects: Effects) -> str:
    share = f"{effects.ratio:.2g} of what it may change in two losses"
    if effects.case is None:
        return "Nothing to explain: no case has two results"
    if effects.explained:
        return f"EXPLAINED by the arithmetic of {effects.device}: at most {share}"
    return f"NOT EXPLAINED by the arithmetic of {effects.device}: {share} ({effects.case})"


def _plain(found: Sameness | Accuracy) -> dict[str, Any]:
    """Return the fields for JSON, without the differences, which the survey has."""
    return {each.name: getattr(found, each.name) for each in fields(found) if each.name != "differences"}


def write_pair(
    command: str,
    pair: Pair,
    question: Question,
    effects: Effects | None,
    json_file: Path | None,
    report: Path | None,
    console: Console,
) -> None:
    """Write the comparison of two losses to the files that were asked for."""
    content = {
        "command": command,
        "agrees": pair.agrees,
        "verdict": pair.verdict,
        "values_agree": pair.part_agrees("loss"),
        "gradients_agree": pair.part_agrees("gradient"),
        "question": asdict(question),
        "definition": str(pair.definition) if pair.known else None,
        "readings": [
            {
                "name": each.name,
                "computes": each.computes,
                "mutants": each.mutants,
                "not_told_from": each.others,
                "formula": each.formula,
            }
            for each in pair.readings
        ],
        "formula_differences": pair.formula_differences,
        "not_derivatives": {letter: each.what for letter, each in pair.not_derivatives.items()},
        "function": None if pair.sameness is None else {**_plain(pair.sameness), "text": pair.functions()},
        "accuracy": [{**_plain(each), "less_accurate": each.less_accurate} for each in pair.accuracy],
        "tolerance": pair.tolerance,
        "notes": pair.notes(),
        "precision": None if effects is None else {**asdict(effects), "explained": effects.explained},
        "survey": survey_as_json(pair.survey),
        "environment": describe_environment(),
    }
    write_json(json_file, content, console)
    parts = parts_of_page(pair)
    if effects is not None:
        parts |= {"notes": [_explanation(effects)], "tables": [_effects_table(effects)]}
    write_page(report, console=console, **parts)
