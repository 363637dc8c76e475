"""`lsce-parity trajectory`."""

import importlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

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
    track,
    write_json,
    write_page,
)
from parity_tests.commands.terminal import FittingTable, PlainConsole
from parity_tests.evidence.environment import describe_environment
from parity_tests.losses.user_losses import SpecificationError, find, parse_options
from parity_tests.report.verdict import Banner
from parity_tests.report.words import PageTable
from parity_tests.studies.survey import Survey
from parity_tests.texts import count_of
from parity_tests.trainings.stepwise import (
    Divergence,
    Step,
    StepwiseVerdict,
    Training,
    TrainingError,
    compare_step_by_step,
)

STEPS, REPLICAS, BATCH_SIZE = 20, 4, 64
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
    steps: Annotated[int, typer.Option(min=1, help="Steps to take.")] = STEPS,
    replicas: Annotated[int, typer.Option(min=1, help="One-ulp replicas of the first training to run.")] = REPLICAS,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of rows that each loss averages.")] = BATCH_SIZE,
    json_file: JsonOption = None,
    report: ReportOption = None,
) -> None:
    """Compare two trainings step by step: free-running and teacher-forced.

    Exit code 0: they agree, 1: they differ, 2: they cannot be compared.

    Examples, the first with the trainings of the demo:
        lsce-parity trajectory jax:examples.digits_steps:JaxSteps torch:examples.digits_steps:TorchSteps
        lsce-parity trajectory jax:my.trainings:Jax torch:my.trainings:Torch --a seed=1 --b seed=1 --report page
    """
    one, other = make_training(first, first_option), make_training(second, second_option)
    try:
        verdicts = compare_step_by_step(
            one, other, steps, replicas=replicas, batch_size=batch_size, track=partial(track_steps, steps)
        )
    except TrainingError as error:
        cannot_run(str(error))
    except (Exception, SystemExit) as error:  # a method of the user's may raise anything
        cannot_run(f"a training raised {type(error).__name__}: {error}")
    show_verdicts("trajectory", (first, second), verdicts, steps, json_file, report)


def track_steps(total: int, steps: Iterator[Step], mode: str) -> Iterator[Step]:
    """Yield the steps of a mode, and show on stderr how many are done."""
    return track(steps, total, f"{mode} steps")


def show_verdicts(
    command: str,
    names: tuple[str, str],
    verdicts: tuple[StepwiseVerdict, StepwiseVerdict],
    steps: int,
    json_file: Path | None,
    report: Path | None,
) -> NoReturn:
    """Print and write the verdicts of both modes, and exit with 0 or 1.

    Args:
        command: the name of the command.
        names: the trainings.
        verdicts: free-running and teacher-forced.
        steps: how many were taken.
        json_file: where to write them as JSON, if anywhere.
        report: the folder for a web page, or None.
    """
    console = PlainConsole()
    agrees = all(verdict.agrees for verdict in verdicts)
    for verdict in verdicts:
        console.print(Text(f"{verdict.mode}: {_sentence(verdict)}", style="bold"))
        console.print(FittingTable.of(HEADINGS, _rows(verdict)))
        console.print()
    content = {
        "command": command,
        "agrees": agrees,
        "trainings": names,
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
        title=" and ".join(names),
        banner=Banner(word, word.lower(), [f"Over {count_of(steps, 'step')}, counted from 0.", *sentences]),
        trajectory=verdicts[0].losses,
        parted=parted and parted.step,
        tables=tables,
    )
    console.print(f"{word} over {count_of(steps, 'step')}, counted from 0", highlight=False)
    exit_with(agrees)


def make_training(specification: str, options: list[str] | None) -> Training:
    """Return a user's training, or exit with 2."""
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
