"""`lsce-parity trajectory`."""

import importlib
from typing import Annotated, Any

import typer
from rich.text import Text

from lsce_spec.extras import install
from parity_tests.commands.common import (
    FirstOption,
    JsonOption,
    ReportOption,
    SecondOption,
    cannot_run,
    exit_with,
    write_json,
    write_page,
)
from parity_tests.commands.terminal import FittingTable, PlainConsole
from parity_tests.evidence.environment import describe_environment
from parity_tests.losses.user_losses import SpecificationError, find, parse_options
from parity_tests.report.verdict import Banner
from parity_tests.report.words import PageTable
from parity_tests.studies.survey import Survey
from parity_tests.trainings.stepwise import (
    Divergence,
    StepwiseVerdict,
    Training,
    TrainingError,
    compare_step_by_step,
)

HEADINGS = ("~tensor", ">largest share", ">at step", ">first", ">second")

TrainingArgument = Annotated[
    str,
    typer.Argument(
        help="torch:package.module:name or jax:package.module:name of a class with the methods state, load and step.",
        show_default=False,
    ),
]


def trajectory(
    first: TrainingArgument,
    second: TrainingArgument,
    *,
    first_option: FirstOption = None,
    second_option: SecondOption = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to take.")] = 20,
    replicas: Annotated[int, typer.Option(min=1, help="One-ulp replicas of the first training to run.")] = 4,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of rows that each loss averages.")] = 64,
    json_file: JsonOption = None,
    report: ReportOption = None,
) -> None:
    """Compare two trainings step by step: free-running and teacher-forced.

    Exit code 0: they agree, 1: they differ, 2: they cannot be compared.

    Examples, the first with the trainings of the demo:
        lsce-parity trajectory jax:examples.digits_steps:JaxSteps torch:examples.digits_steps:TorchSteps
        lsce-parity trajectory jax:my.trainings:Jax torch:my.trainings:Torch --a seed=1 --b seed=1 --report page
    """
    console = PlainConsole()
    one, other = _make(first, first_option), _make(second, second_option)
    try:
        verdicts = compare_step_by_step(one, other, steps, replicas=replicas, batch_size=batch_size)
    except TrainingError as error:
        cannot_run(str(error))
    except (Exception, SystemExit) as error:  # a method of the user's may raise anything
        cannot_run(f"a training raised {type(error).__name__}: {error}")
    agrees = all(verdict.agrees for verdict in verdicts)
    for verdict in verdicts:
        console.print(Text(f"{verdict.mode}: {_sentence(verdict)}", style="bold"))
        console.print(FittingTable.of(HEADINGS, _rows(verdict)))
        console.print()
    content = {
        "command": "trajectory",
        "agrees": agrees,
        "trainings": [first, second],
        "modes": [_as_json(verdict) for verdict in verdicts],
        "environment": describe_environment(),
    }
    write_json(json_file, content, console)
    word = "AGREE" if agrees else "DISAGREE"
    sentences = [f"{verdict.mode}: {_sentence(verdict)}" for verdict in verdicts]
    tables = [
        PageTable(
            f"Tensors, {verdict.mode}", HEADINGS, _rows(verdict), wrong=[each.share > 1 for each in _worst(verdict)]
        )
        for verdict in verdicts
    ]
    parted = verdicts[0].first_divergence
    write_page(
        report,
        Survey({}, [], []),
        console,
        title=f"{first} and {second}",
        banner=Banner(word, word.lower(), [f"Over {steps} steps, counted from 0.", *sentences]),
        trajectory=verdicts[0].losses,
        parted=parted and parted.step,
        tables=tables,
    )
    console.print(f"{word} over {steps} steps, counted from 0", highlight=False)
    exit_with(agrees)


def _make(specification: str, options: list[str] | None) -> Training:
    framework = specification.partition(":")[0]
    if framework in ("jax", "torch"):
        try:
            importlib.import_module(framework)
        except ModuleNotFoundError:
            cannot_run(f"{framework} is not installed. Run: {install(framework)}")
    try:
        made: Any = find(specification)(**parse_options(options or []))
    except SpecificationError as error:
        cannot_run(str(error))
    except (Exception, SystemExit) as error:  # a class of the user's may raise anything
        cannot_run(f"making {specification} raised {type(error).__name__}: {error}")
    missing = [name for name in ("state", "load", "step") if not callable(getattr(made, name, None))]
    if missing:
        cannot_run(f"{specification} gives a {type(made).__name__} without {', '.join(missing)}")
    training: Training = made
    return training


def _worst(verdict: StepwiseVerdict) -> list[Divergence]:
    """Return the element with the largest share of each tensor."""
    tensors = dict.fromkeys(each.tensor for each in verdict.worst)
    return [
        max((each for each in verdict.worst if each.tensor == name), key=lambda each: each.share) for name in tensors
    ]


def _rows(verdict: StepwiseVerdict) -> list[list[str]]:
    """Return a row for each tensor."""
    return [
        [each.tensor, f"{each.share:.2g}", str(each.step), f"{each.first:.9g}", f"{each.second:.9g}"]
        for each in _worst(verdict)
    ]


def _sentence(verdict: StepwiseVerdict) -> str:
    found = verdict.first_divergence
    if found is not None:
        return f"part at {found}"
    blind = verdict.losses.blind_from
    chaotic = f"; chaotic, so no evidence, from step {blind}" if blind is not None else ""
    return f"agree, at most {verdict.largest.share:.2f} of what rounding explains{chaotic}"


def _as_json(verdict: StepwiseVerdict) -> dict[str, Any]:
    return {
        "mode": verdict.mode,
        "agrees": verdict.agrees,
        "first_divergence": verdict.first_divergence,
        "worst": verdict.worst,
    }
