"""`lsce-parity layers`."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lsce_spec.extras import require_for_command
from parity_tests.commands.common import (
    CANNOT_RUN,
    FirstOption,
    JsonOption,
    ReportOption,
    SecondOption,
    cannot_run,
    exit_with,
    track,
    write_json,
    write_page,
)
from parity_tests.commands.terminal import FittingTable, PlainConsole, print_verdict
from parity_tests.evidence.environment import describe_environment
from parity_tests.losses.models import Model, ModelError
from parity_tests.losses.user_losses import SpecificationError, find, parse_options
from parity_tests.report.verdict import Banner
from parity_tests.report.words import PageTable
from parity_tests.studies.layer_arithmetic import Direction, Part
from parity_tests.studies.layer_pairs import MOVED, SAME
from parity_tests.studies.layers import LayerVerdict, ModelsVerdict, compare_layers
from parity_tests.studies.survey import Survey
from parity_tests.texts import count_of, share_text
from parity_tests.truth.devices import device_of_name

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="torch:package.module:name or jax:package.module:name of a function that returns the model and an example "
        "batch, and if you like a loss of the model's output.",
        show_default=False,
    ),
]
# Layers to show in full.
SHOWN = 5
# Layers to name in the verdict.
NAMED = 3
SHARES = "in units of what rounding explains; at most 1 is the same"


def layers(  # noqa: PLR0913 - options of a command
    first: ModelArgument,
    second: ModelArgument,
    *,
    first_option: FirstOption = None,
    second_option: SecondOption = None,
    mapping: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="A=B|FILE",
            help="Name of a layer or weight in A, and in B; or a file of such lines. May be repeated.",
        ),
    ] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=same|moved",
            help="Whether arrays of this layer or weight of A (* and ? match) have the same axes in B, or channels, "
            "inputs and outputs where the other framework has them. For shapes that do not tell. May be repeated.",
        ),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            metavar="copy|own", help="copy: give B the weights of A. own: keep the weights of each, and compare them."
        ),
    ] = "copy",
    device_model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[a=|b=]NAME",
            help="Simulate the matrix products of this device, as `lsce-parity devices` shows it, in both or in one.",
        ),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Runs of each layer with everything moved by one ulp.")] = 4,
    json_file: JsonOption = None,
    report: ReportOption = None,
) -> None:
    """Find the layers in which two models part, forward and backward, on the same weights and batch.

    Exit code 0: they agree, 1: they differ, 2: they cannot be compared.

    Example, a transformer block in Flax and in torch:
        lsce-parity layers jax:examples.ported_block:in_flax torch:examples.ported_block:in_torch
    """
    console = PlainConsole()
    if weights not in ("copy", "own"):
        cannot_run(f"--weights is copy or own, got {weights!r}")
    one, other = _make(first, first_option), _make(second, second_option)
    try:
        verdict = compare_layers(
            one,
            other,
            mapping=_pairs("--map", mapping),
            layouts=_layouts(layout),
            copy_weights=weights == "copy",
            bits=_bits(device_model, (one.framework, other.framework)),
            replicas=replicas,
            track=lambda names: track(names, len(names), "layers"),
        )
    except ModelError as error:
        cannot_run(str(error))
    except (Exception, SystemExit) as error:  # a model of the user's may raise anything
        cannot_run(f"a model raised {type(error).__name__}: {error}")
    _print(verdict, (first, second), console)
    headline, *explanation = _conclusion(verdict)
    content = {
        "command": "layers",
        "agrees": verdict.agrees,
        "models": [first, second],
        "first": verdict.first.name if verdict.first else None,
        "explained_by": verdict.common_cause,
        "notes": verdict.notes,
        "left_out": verdict.left_out,
        "layers": [_as_json(each) for each in verdict.layers],
        "environment": describe_environment(),
    }
    write_json(json_file, content, console)
    findings = {first: rest for first, *rest in map(_lines, _wrong(verdict))}
    word, style = {True: ("AGREE", "agree"), False: ("DISAGREE", "disagree"), None: ("NO VERDICT", "nothing")}[
        verdict.agrees
    ]
    banner = Banner(word, style, [headline.removeprefix(word).removeprefix(":").strip(), *explanation])
    wrong = [each.is_open or not each.agrees for each in verdict.layers]
    table = PageTable("Layers", *_rows(verdict), note=SHARES, wrong=wrong)
    notes = [*verdict.notes, *(f"not compared by itself: {each}, {why}" for each, why in verdict.left_out.items())]
    write_page(
        report,
        Survey({}, [], []),
        console,
        title=f"{first} and {second}",
        banner=banner,
        tables=[table],
        notes=notes,
        findings=findings,
    )
    print_verdict((headline, *explanation), console)
    if verdict.agrees is None:
        raise typer.Exit(code=CANNOT_RUN)
    exit_with(verdict.agrees)


# --- What is given ----------------------------------------------------------------------------------------------------


def _make(specification: str, options: list[str] | None) -> Model:
    framework = specification.partition(":")[0]
    if framework == "jax":
        require_for_command("lsce-parity layers", "jax", "jax", "flax")
    elif framework == "torch":
        require_for_command("lsce-parity layers", "torch", "torch")
    try:
        made: Any = find(specification)(**parse_options(options or []))
    except SpecificationError as error:
        cannot_run(str(error))
    except (Exception, SystemExit) as error:  # a function of the user's may raise anything
        cannot_run(f"calling {specification} raised {type(error).__name__}: {error}")
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        what = f"a tuple of {len(made)}" if isinstance(made, tuple) else f"a {type(made).__name__}"
        cannot_run(f"{specification} must return (model, inputs) or (model, inputs, loss), and returned {what}")
    # A framework is loaded where a model of it is compared.
    adapter = importlib.import_module(f"parity_tests.losses.models_{framework}")
    try:
        model: Model = (adapter.JaxModel if framework == "jax" else adapter.TorchModel)(*made)
    except ModelError as error:
        cannot_run(f"{specification}: {error}")
    return model


def _pairs(option: str, given: Sequence[str] | None) -> dict[str, str]:
    """Return names for names. A value without = is a file with one pair in each line."""
    pairs = {}
    for value in given or ():
        lines = [value]
        if "=" not in value:
            try:
                lines = [line.partition("#")[0] for line in Path(value).read_text(encoding="utf-8").splitlines()]
            except (OSError, UnicodeDecodeError) as error:
                cannot_run(f"{option} needs NAME=NAME or a file of such lines, and {value} cannot be read: {error}")
        for line in filter(str.strip, lines):
            name, equals, other = (part.strip() for part in line.partition("="))
            if not (name and equals and other):
                cannot_run(f"{option} needs NAME=NAME, got {line.strip()!r}")
            pairs[name] = other
    return pairs


def _layouts(given: Sequence[str] | None) -> dict[str, str]:
    layouts = _pairs("--layout", given)
    for name, choice in layouts.items():
        if choice not in (SAME, MOVED):
            cannot_run(f"--layout {name} must be {SAME} or {MOVED}, got {choice!r}")
    return layouts


def _bits(given: Sequence[str] | None, frameworks: tuple[str, str]) -> tuple[int | None, int | None]:
    """Return the bits that matrix products keep on the devices to simulate, for each side."""
    bits: list[int | None] = [None, None]
    for value in given or ():
        side, equals, name = value.rpartition("=")
        if equals and side not in ("a", "b"):
            cannot_run(f"--device-model needs a name, a=NAME or b=NAME, got {value!r}")
        for index in (0, 1) if not equals else ("ab".index(side),):
            try:
                bits[index] = device_of_name(name, frameworks[index]).arithmetic.matmul_bits
            except ValueError as error:
                cannot_run(str(error))
    return bits[0], bits[1]


# --- What is shown ----------------------------------------------------------------------------------------------------


def _rows(verdict: ModelsVerdict) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows of the table of layers."""
    # Only where names differ does B need a column.
    renamed = any(each.name != each.other for each in verdict.layers)
    rows = []
    for each in verdict.layers:
        shares = [share_text(each.share("forward")), share_text(each.share("backward"))] if each.parts else ["", ""]
        rows.append([each.name, *([each.other] if renamed else []), *shares, _word(each)])
    return ["layer of A", *(["of B"] if renamed else []), ">forward", ">backward", "finding"], rows


def _print(verdict: ModelsVerdict, names: tuple[str, str], console: Console) -> None:
    for side, name in zip("AB", names, strict=True):
        console.print(f"{side}  {name}", soft_wrap=True, highlight=False)
    for note in verdict.notes:
        console.print(note, soft_wrap=True, highlight=False)
    console.print()
    headings, rows = _rows(verdict)
    table = FittingTable(*headings)
    for each, row in zip(verdict.layers, rows, strict=True):
        table.add_row("  " * each.depth + row[0], *row[1:], style="" if each.agrees and not each.is_open else "bold")
    console.print(table)
    console.print(SHARES, highlight=False)
    for name, reason in verdict.left_out.items():
        console.print(f"not compared by itself: {name}, {reason}", soft_wrap=True, highlight=False)
    console.print()
    wrong = _wrong(verdict)
    for each in wrong[:SHOWN]:
        for line in _lines(each):
            console.print(line, soft_wrap=True, highlight=False)
        console.print()
    if len(wrong) > SHOWN:
        console.print(f"{len(wrong) - SHOWN} more; --json FILE has all", highlight=False)


def _wrong(verdict: ModelsVerdict) -> list[LayerVerdict]:
    """Return the layers that part or cannot be compared, the first to part first."""
    first = verdict.first
    wrong = (each for each in verdict.layers if each is not first and (each.is_open or not each.agrees))
    others = sorted(wrong, key=lambda each: each.order)
    return ([first] if first else []) + others


def _word(each: LayerVerdict) -> str:
    beyond = [part for part in each.parts if part.share > 1]
    if each.error is not None:
        return "cannot be compared"
    if each.random:
        return f"random in {each.random}"
    if each.weights:
        return "weights differ"
    if each.not_derivatives or any(part.is_function for part in beyond):
        return "another gradient" if each.not_derivatives else "another function"
    if beyond:
        known = each.causes and (not each.no_exact or all(each.causes.values()))
        return f"less accurate: {' and '.join(each.causes)}" if known else "differs"
    return "same"


def _lines(each: LayerVerdict) -> list[str]:
    """Return what is wrong with a layer, in sentences."""
    kinds = "" if each.kinds == ("", "") else f" ({' | '.join(each.kinds)})"
    lines = [f"{each.name}{kinds}: {_word(each)}{_place(each)}"]
    if each.error is not None:
        return [*lines, f"    {each.error}"]
    if each.random:
        lines.append(
            "    two runs with other random numbers differ; is dropout on? torch has model.eval(), Flax model.eval()"
        )
    lines += [f"    {what}" for what in each.weights]
    for direction in ("forward", "backward"):
        part = each.beyond(direction)
        if part is not None:
            lines.append(f"    {direction}: {_element(part)}")
            if part.reordered:
                lines.append("    these are the same numbers in another order; are channels last on one side only?")
    if len(lines) > 1:
        lines += [f"    {what}" for what in each.settings]
    for side, cause in each.causes.items():
        explained = ": ".join(filter(None, cause)) if cause else "no matrix products of fewer bits explain it"
        lines.append(f"    {side} is less accurate than rounding in {each.dtype} explains: {explained}")
    lines += [f"    {what}" for what in _not_derivatives(each)]
    for side, reason in each.no_exact.items():
        lines.append(f"    {side} has no float64 run: {reason}")
    return lines


def _not_derivatives(each: LayerVerdict) -> list[str]:
    return [
        f"its gradient in {side} is not the derivative of what it computes: {cause.what}"
        for side, cause in each.not_derivatives.items()
    ]


def _place(each: LayerVerdict) -> str:
    """Return where in its own code a layer with others within parts."""
    part = each.beyond("forward") or each.beyond("backward")
    if part is None or not any(result.what.startswith("input of ") for result in each.parts):
        return ""
    for begin, relation in (("input of ", "before"), ("gradient of the output of ", "after")):
        if part.what.startswith(begin):
            return f", by its own code {relation} {part.what.removeprefix(begin)}"
    return ", by its own code after the layers within" if part.what.startswith("output") else ", by its own code"


def _element(part: Part) -> str:
    place = f"{part.what}{list(part.index) if part.index else ''}"
    exact = {
        side: value
        for side, value in zip("AB", (part.exact_first, part.exact_second), strict=True)
        if value is not None
    }
    if part.is_function:
        shown = " | in float64 " + " | ".join(f"{side} {value:.9g}" for side, value in exact.items())
    else:
        shown = f" | float64 {next(iter(exact.values())):.9g}" if exact else ""
    return f"{place}: A {part.first:.9g} | B {part.second:.9g}{shown}"


def _conclusion(verdict: ModelsVerdict) -> list[str]:
    """Return the verdict in at most three lines: whether the models agree, where the mistake is, what to change."""
    layers = count_of(len(verdict.layers), "layer")
    open_ones = sum(each.is_open for each in verdict.layers)
    if verdict.agrees:
        return [f"AGREE in {layers}, forward and backward."]
    first = verdict.first
    if first is None:
        return [f"NO VERDICT: {open_ones} of {layers} cannot be compared, the others agree."]
    also = f"; {open_ones} cannot be compared" if open_ones else ""
    direction: Direction = "forward" if first.beyond("forward") or not first.parts else "backward"
    names = [each.name for each in _wrong(verdict) if not each.is_open]
    named = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    taken = "B" if [*first.not_derivatives] == ["A"] else "A"
    right = "" if first.causes else f" ({taken} is taken as right)"
    return [
        f"DISAGREE in {len(names)} of {layers}{right}: {named}{also}.",
        f"The first mistake is in {first.name}, {direction}: {_mistake(verdict, first, direction)}.",
        f"{_cure(first)}.",
    ]


def _mistake(verdict: ModelsVerdict, first: LayerVerdict, direction: Direction) -> str:
    """Return what is wrong in the first layer that parts."""
    if verdict.common_cause:
        return f"{verdict.common_cause}, which explain all that differs"
    known = [*first.weights, *_not_derivatives(first), *first.settings]
    return known[0] if known else f"{_word(first)}{_place(first)}" + _start(first, direction)


def _start(first: LayerVerdict, direction: Direction) -> str:
    part = first.beyond(direction)
    return f", seen in {_element(part).partition(' | in float64')[0]}" if part else ""


def _cure(first: LayerVerdict) -> str:
    if first.random:
        return "Change: switch dropout off on both sides, by model.eval()"
    if first.weights:
        return f"Change in B: the weights of {first.other}; without --weights own they are copied from A"
    if first.not_derivatives:
        return "; ".join(f"Change in {side}: {cause.cure}" for side, cause in first.not_derivatives.items())
    if first.cures:
        return f"Change in B: {' and '.join(first.cures)} in {first.other}"
    if any(first.causes.values()):
        return f"Change in {' and '.join(first.causes)}: the precision of matrix products, to all bits of {first.dtype}"
    return f"Change in {' and '.join(first.causes) or 'B'}: the code of {first.other}{_place(first)}"


def _as_json(each: LayerVerdict) -> dict[str, Any]:
    return {
        "name": each.name,
        "other": each.other,
        "kinds": each.kinds,
        "verdict": _word(each),
        "forward": each.share("forward"),
        "backward": each.share("backward"),
        "dtype": each.dtype,
        "parts": each.parts,
        "random": each.random,
        "weights": each.weights,
        "settings": each.settings,
        "causes": each.causes,
        "no_float64": each.no_exact,
        "not_derivatives": {side: cause.what for side, cause in each.not_derivatives.items()},
        "error": each.error,
    }
