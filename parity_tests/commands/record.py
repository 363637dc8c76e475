"""`lsce-parity record DIR`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from parity_tests.commands.common import (
    DeviceOption,
    DtypeOption,
    FirstOption,
    JsonOption,
    announce,
    cannot_run,
    check_dtypes,
    check_free,
    exit_with,
    find_adapters,
    keep_compiled,
    print_missing,
    select_cases,
    track,
    write_json,
    writing,
)
from parity_tests.commands.hunt import DEFAULT as ADAPTERS
from parity_tests.commands.recorded_losses import record_own
from parity_tests.commands.recorded_trainings import record_steps
from parity_tests.commands.replay import print_replay
from parity_tests.commands.terminal import PlainConsole
from parity_tests.commands.trajectory import BATCH_SIZE, REPLICAS, STEPS
from parity_tests.losses.user_losses import is_user_loss
from parity_tests.studies.bundle import MANIFEST, read_bundle, write_bundle
from parity_tests.studies.bundle import record as record_cases
from parity_tests.studies.kit import FEW_CASES
from parity_tests.studies.probes import LABEL_KINDS, LOGIT_KINDS
from parity_tests.studies.questions import make_question
from parity_tests.studies.replays import replay as replay_bundle
from parity_tests.studies.sealed_folders import RecordingError
from parity_tests.studies.survey import make_cases
from parity_tests.texts import count_of
from parity_tests.truth.precision import DTYPES

PLAIN = ("logits", "classes")


def record(  # noqa: PLR0913 - each option of the command line is a parameter
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the bundle.", show_default=False)],
    *,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help=f"Name with * and ?; may be repeated. [default: {', '.join(ADAPTERS)}]"),
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(
            "--case", help=f"Name with * and ?; may be repeated; '*' is all. [default: {', '.join(FEW_CASES)}]"
        ),
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    json_file: JsonOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing bundle.")] = False,
    option: FirstOption = None,
    classes: Annotated[
        list[int] | None, typer.Option(min=1, help="Of a loss of yours: number of classes; may be repeated.")
    ] = None,
    ignore_index: Annotated[int | None, typer.Option(help="Of a loss of yours: label that it ignores.")] = None,
    linear: Annotated[bool, typer.Option("--linear", help="Your loss is a linear one.")] = False,
    logits_are: Annotated[str, typer.Option(help=f"Of a loss of yours: {', '.join(LOGIT_KINDS)}.")] = "logits",
    labels_are: Annotated[str, typer.Option(help=f"Of a loss of yours: {', '.join(LABEL_KINDS)}.")] = "classes",
    inputs: Annotated[
        list[Path] | None, typer.Option(dir_okay=False, help="Of a loss of yours: your own batch, as in `compare`.")
    ] = None,
    training: Annotated[
        str | None,
        typer.Option(help="Record a training of yours, as `trajectory` takes it: torch:package.module:name or jax:..."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help=f"Of a training: steps. [default: {STEPS}]")] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help=f"Of a training: one-ulp replicas. [default: {REPLICAS}]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help=f"Of a training: rows that a loss averages. [default: {BATCH_SIZE}]")
    ] = None,
) -> None:
    """Record adapters, a loss or a training of yours, for `replay` with another framework or on another machine.

    Exit code 0: all results are within their bounds, 1: one is not (the bundle is still written), 2: nothing written.

    Examples:
        lsce-parity record from-the-gpu-machine --device cuda
        lsce-parity record ties --adapter torch-fused --case "ties*" --dtype float32
        lsce-parity record layers --case "linear_*"
        lsce-parity record from-torch --adapter torch:my.losses:focal --a gamma=2 --inputs batch.safetensors
        lsce-parity record from-torch --training torch:my.trainings:Torch --steps 20
    """
    of_loss = any((classes, ignore_index is not None, linear, inputs, (logits_are, labels_are) != PLAIN))
    sizes = (steps, replicas, batch_size)
    if training is not None or sizes != (None, None, None):
        if of_loss or adapter or case or dtype or device != "cpu":
            cannot_run("--training is recorded alone: beside it go --steps, --replicas, --batch-size, --a and --json")
        record_steps(folder, training, option, sizes, force, json_file)
        return
    if adapter and any(map(is_user_loss, adapter)):
        if len(adapter) > 1 or case:
            cannot_run("a loss of your own is recorded alone: one --adapter, and no --case")
        try:
            question = make_question(
                classes=classes, ignore_index=ignore_index, linear=linear, logits_are=logits_are, labels_are=labels_are
            )
        except ValueError as error:
            cannot_run(str(error))
        record_own(folder, adapter[0], option, question, inputs or (), dtype, device, force, json_file)
        return
    if option or of_loss:
        cannot_run(
            "--a, --classes, --ignore-index, --linear, --logits-are, --labels-are and --inputs are for a loss of "
            "your own: --adapter torch:package.module:name or jax:..."
        )
    console = PlainConsole()
    check_free(folder, "bundle", MANIFEST, force)
    dtypes = check_dtypes(dtype, DTYPES)
    names = select_cases(case or FEW_CASES)
    adapters, missing = find_adapters(adapter or ADAPTERS, device, asked=bool(adapter))
    keep_compiled()
    cases = make_cases(names, dtypes)
    if not adapter:  # default adapters that can handle none of the cases are left out
        adapters = [each for each in adapters if any(each.unsupported(case) is None for case in cases)]
    if not any(each.unsupported(case) is None for each in adapters for case in cases):
        cannot_run("no adapter can handle these cases")
    announce(f"recording {', '.join(each.name for each in adapters)} in {count_of(len(cases), 'case')}")
    try:
        with writing(folder):
            shown = partial(track, total=len(cases), title="cases")
            write_bundle(folder, record_cases(adapters, cases, track=shown))
            # The verdict is on the files as read back.
            found = replay_bundle(read_bundle(folder), [])
    except RecordingError as error:
        cannot_run(str(error))
    print_replay(found, console)
    print_missing(missing, console)
    content = {"command": "record", "agrees": found.agrees, "lines": found.lines(), "missing": missing}
    write_json(json_file, {**content, "environment": found.bundle.environment}, console)
    console.print(f"wrote {folder}: {count_of(len(cases), 'case')}", soft_wrap=True, highlight=False)
    exit_with(found.agrees)
