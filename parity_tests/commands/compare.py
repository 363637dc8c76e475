"""`lsce-parity compare A B`."""

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.text import Text

from lsce_spec import CONVENTIONS, ConventionName, check_smoothing, find_convention
from parity_tests.commands.common import (
    CANNOT_RUN,
    DeviceModelOption,
    DeviceOption,
    DtypeOption,
    FirstOption,
    JsonOption,
    ReportOption,
    SecondOption,
    announce,
    cannot_run,
    check_device,
    check_device_model,
    check_dtypes,
    describe,
    exit_with,
    on_model,
    survey_as_json,
    write_json,
    write_page,
)
from parity_tests.commands.terminal import FittingTable, PlainConsole
from parity_tests.evidence.environment import describe_environment
from parity_tests.losses.adapters import Adapter, UnavailableError
from parity_tests.losses.user_losses import (
    SpecificationError,
    find_reduction,
    is_user_loss,
    load_adapter,
    parse_options,
    take_mean,
)
from parity_tests.report.verdict import Banner
from parity_tests.report.words import values_text
from parity_tests.studies.pairs import SHOWN, Pair, Side, Tolerance, compare_sides
from parity_tests.studies.precision_effects import OBSERVED, Effects, find_effects
from parity_tests.studies.probes import (
    LABEL_KINDS,
    LOGIT_KINDS,
    NUM_CLASSES,
    LabelKind,
    LogitKind,
    Question,
    is_edge,
    is_edge_name,
    plain_cases,
)
from parity_tests.studies.sameness import Accuracy, Sameness
from parity_tests.texts import did_you_mean
from parity_tests.truth.cases import Case

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
    rtol: Annotated[
        float | None, typer.Option(min=0, help="Allow this relative difference, in place of what rounding explains.")
    ] = None,
    atol: Annotated[
        float | None, typer.Option(min=0, help="Allow this difference, in place of what rounding explains.")
    ] = None,
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
        lsce-parity compare torch:my.losses:smooth_ce jax:my.losses:smooth_ce --device-model tpu-v5e
        lsce-parity compare jax:my.losses:head torch:my.losses:head --linear --explain-precision tpu-v5e
    """
    console = PlainConsole()
    told = (smoothing, convention, reduction, z_loss, softcap, subtract_entropy or None)
    question = Question(
        smoothing=0.1 if smoothing is None else smoothing,
        convention=convention,
        reduction=reduction or "mean",
        num_classes=tuple(classes or NUM_CLASSES),
        ignore_index=ignore_index,
        z_loss=z_loss or 0.0,
        softcap=softcap,
        subtract_entropy=subtract_entropy,
        linear=linear,
        logit_kind=cast("LogitKind", logits_are),
        label_kind=cast("LabelKind", labels_are),
        chosen=any(value is not None for value in told),
    )
    _check(question)
    check_device(device)
    check_device_model(device_model, device)
    check_device_model(explain_precision, "cpu")
    dtypes = check_dtypes(dtype, ("float32",))
    probes = [case for case in plain_cases(question, dtypes[0]) if case.name.startswith("plain")]
    adapters = [
        _load(specification, option, device, linear)
        for specification, option in ((first, first_option), (second, second_option))
    ]
    if not question.has_oracle and not (is_user_loss(first) and is_user_loss(second)):
        cannot_run("--logits-are and --labels-are are for two losses of your own: torch:... or jax:...")
    if not (is_user_loss(first) or is_user_loss(second)) and (question.chosen or classes or ignore_index is not None):
        cannot_run(
            "these losses take all options and are compared in every named case: leave out --classes, --ignore-index "
            "and the options that define the reference"
        )
    sides = _with_reductions(adapters, probes, ignore_index, console)
    try:
        for side in sides:
            on_model(side.adapter, explain_precision)
        sides = [replace(side, adapter=on_model(side.adapter, device_model), exact=side.adapter) for side in sides]
    except UnavailableError as error:
        cannot_run(str(error))
    tolerance = None if rtol is None and atol is None else Tolerance(rtol or 0.0, atol or 0.0)
    pair = compare_sides(sides[0], sides[1], question, dtypes, tolerance, announce)
    _print(pair, console)
    effects = None
    if explain_precision is not None:
        ordinary = [case for case in pair.cases if not is_edge(case)]
        effects = find_effects(adapters, ordinary, explain_precision)
        _print_effects(effects, console)
    _write(pair, question, effects, json_file, report, console)
    if pair.agrees is None:
        raise typer.Exit(code=CANNOT_RUN)
    exit_with(pair.agrees)


def _check(question: Question) -> None:
    try:
        _check_kinds(question)
        check_smoothing(question.smoothing)
        find_convention(cast("ConventionName", question.convention or "uniform"))
        if question.softcap is not None and not 0 < question.softcap < float("inf"):
            raise ValueError(f"softcap must be above 0 and finite, got {question.softcap}")
        if not 0 <= question.z_loss < float("inf"):
            raise ValueError(f"z_loss must be at least 0 and finite, got {question.z_loss}")
        if question.ignore_index is not None and abs(question.ignore_index) >= 2**31:
            raise ValueError(f"ignore_index must fit in 32 bits, got {question.ignore_index}")
        if question.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be mean or sum, got {question.reduction!r}")
    except (TypeError, ValueError) as error:
        given = question.convention or "uniform"
        has_hint = given in CONVENTIONS or "Did you mean" in str(error)
        cannot_run(str(error) if has_hint else f"{error}{did_you_mean(given, CONVENTIONS)}")


def _check_kinds(question: Question) -> None:
    for option, given, kinds in (
        ("--logits-are", question.logit_kind, LOGIT_KINDS),
        ("--labels-are", question.label_kind, LABEL_KINDS),
    ):
        if given not in kinds:
            raise ValueError(f"{option} must be one of {', '.join(kinds)}, got {given!r}")
    if question.label_kind != "classes" and question.ignore_index is not None:
        raise ValueError(f"--ignore-index is for class labels, not for --labels-are {question.label_kind}")
    if not question.has_oracle and question.linear:
        raise ValueError("--linear is for logits and class labels: leave out --logits-are and --labels-are")
    if not question.has_oracle and question.chosen:
        raise ValueError(
            "no true values are known of such losses: leave out --smoothing, --convention, --reduction, --z-loss, "
            "--softcap and --subtract-entropy"
        )


def _load(specification: str, options: list[str] | None, device: str, linear: bool) -> Adapter:
    try:
        return load_adapter(specification, parse_options(options or []), device, linear=linear)
    except (SpecificationError, UnavailableError) as error:
        cannot_run(str(error))


def _with_reductions(
    adapters: list[Adapter], probes: list[Case], ignore_index: int | None, console: Console
) -> list[Side]:
    """Return both sides with their reductions. A loss per row is averaged if the other loss is a scalar."""
    found = [find_reduction(adapter, probes) if is_user_loss(adapter.name) else None for adapter in adapters]
    if "mean" in found:
        for adapter, reduction in zip(adapters, found, strict=True):
            if reduction in ("none", "elements"):
                unit = "row" if reduction == "none" else "logit"
                console.print(Text(f"{adapter.name} returns a loss per {unit}: its mean is compared."))
                take_mean(adapter, ignore_index)
    common = "mean" if "mean" in found else "elements" if found == ["elements", "elements"] else "none"
    return [Side(adapter, common if is_user_loss(adapter.name) else None) for adapter in adapters]


def _print(pair: Pair, console: Console) -> None:
    for letter, reading in zip("AB", pair.readings, strict=True):
        console.print(Text(f"{letter}  {reading.name}", style="bold"))
        for line in reading.lines():
            console.print(Text(f"   {line}"))
    console.print()
    for line in pair.functions():
        console.print(Text(line))
    for name, of_first, of_second in pair.formula_differences:
        console.print(Text(f"they differ in the {name}: A {of_first} | B {of_second}"))
    differences = pair.survey.differences
    explained = f"what {pair.tolerance} allows" if pair.tolerance else "what rounding explains"
    for part, name in (("loss", "values"), ("gradient", "gradients")):
        if differences:
            word = "the same" if pair.part_agrees(part) else "DIFFERENT"
            largest = max(getattr(each.comparison, part) for each in differences)
            console.print(f"{name}: {word} (up to {_share(largest)} of {explained})", highlight=False)
    for line in pair.troubles():
        console.print(Text(line))
    _print_differences(pair, console)
    console.print(f"\n{pair.verdict} in {len(pair.cases)} cases. {_right_is(pair)}", highlight=False)


def _right_is(pair: Pair) -> str:
    if pair.tolerance:
        return f"You chose what is allowed: {pair.tolerance}"
    if pair.known:
        return f"Right is: {pair.definition}"
    return "Neither is a loss that is known here: whether they are right was not asked, only whether they are the same"


def _print_effects(effects: Effects, console: Console) -> None:
    parts = list(effects.changes[OBSERVED])
    table = FittingTable("source", *(f">{part}" for part in parts))
    for source, changes in effects.changes.items():
        table.add_row(source, *(f"{changes[part]:.1e}" for part in parts))
    console.print(
        f"\nWhat the arithmetic of {effects.device} changes in one loss, as a share of the largest element, in the "
        "worst case:\n"
    )
    console.print(table)
    share = f"{_share(effects.ratio)} of what it may change in two losses"
    if effects.case is None:
        console.print("\nNothing to explain: no case has two results.")
    elif effects.explained:
        console.print(f"\nEXPLAINED by the arithmetic of {effects.device}: at most {share}.", highlight=False)
    else:
        console.print(
            f"\nNOT EXPLAINED by the arithmetic of {effects.device}: {share} ({effects.case}).", highlight=False
        )


def _print_differences(pair: Pair, console: Console) -> None:
    differing = [each for each in pair.survey.differences if not each.agrees]
    if not differing:
        return
    # A loss that is wrong in ordinary cases is not judged by the edges.
    differing.sort(key=lambda each: (is_edge_name(each.case), -each.comparison.share))
    count = f"{len(differing)} of {len(pair.survey.differences)} cases differ"
    allowed = "the tolerance" if pair.tolerance else "what rounding explains"
    console.print(f"\n{count}; the largest, as shares of {allowed} (at most 1 is the same):\n", highlight=False)
    for each in differing[:SHOWN]:
        comparison = each.comparison
        found = [f"{_share(comparison.share)} in {each.case}, {each.dtype}", comparison.problem, pair.off(each)]
        console.print(Text("; ".join(filter(None, found))))
        if comparison.worst:
            console.print(Text(f"    {comparison.worst.place}: {values_text(comparison.worst, each.dtype)}"))
    if differing[0].comparison.worst:
        console.print(Text(f"\nInputs in {differing[0].case}: {describe(differing[0].comparison.worst)}"))


def _share(value: float) -> str:
    return f"{value:.2g}"


def _plain(found: Sameness | Accuracy) -> dict[str, Any]:
    """Return the fields for JSON, without the differences, which the survey has."""
    return {each.name: getattr(found, each.name) for each in fields(found) if each.name != "differences"}


def _write(
    pair: Pair,
    question: Question,
    effects: Effects | None,
    json_file: Path | None,
    report: Path | None,
    console: Console,
) -> None:
    content = {
        "command": "compare",
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
        "function": None if pair.sameness is None else {**_plain(pair.sameness), "text": pair.functions()},
        "accuracy": [{**_plain(each), "less_accurate": each.less_accurate} for each in pair.accuracy],
        "tolerance": pair.tolerance,
        "notes": pair.notes(),
        "precision": None if effects is None else {**asdict(effects), "explained": effects.explained},
        "survey": survey_as_json(pair.survey),
        "environment": describe_environment(),
    }
    write_json(json_file, content, console)
    names = " and ".join(reading.name for reading in pair.readings)
    banner = None
    if pair.agrees is None:
        banner = Banner("NO VERDICT", "nothing", [*pair.functions(), *pair.troubles()])
    write_page(report, pair.survey, console, title=names, notes=pair.notes(), agrees=pair.agrees, banner=banner)
