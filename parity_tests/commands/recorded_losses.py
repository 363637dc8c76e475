"""`lsce-parity record` and `replay` of a user's loss: `--adapter torch:package.module:name` or `jax:...`."""

from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from parity_tests.commands.common import (
    announce,
    cannot_run,
    check_device,
    check_dtypes,
    check_free,
    write_json,
    writing,
)
from parity_tests.commands.compare import announce_batches, end_with_verdict, load_loss, print_pair, write_pair
from parity_tests.commands.terminal import PlainConsole
from parity_tests.studies.pairs import Tolerance, compare_sides
from parity_tests.studies.probes import Question, plain_cases
from parity_tests.studies.questions import check_pair, take_batches
from parity_tests.studies.recorded_losses import MANIFEST, read_recording, record_loss, sides_of
from parity_tests.studies.sealed_folders import RecordingError
from parity_tests.texts import count_of


def record_own(
    folder: Path,
    specification: str,
    options: list[str] | None,
    question: Question,
    inputs: Sequence[Path],
    dtype: list[str] | None,
    device: str,
    force: bool,
    json_file: Path | None,
) -> None:
    """Record a user's loss."""
    check_free(folder, "recorded loss", MANIFEST, force)
    check_device(device)
    dtypes = check_dtypes(dtype, ("float32",))
    own = None
    if inputs:
        if dtype:
            cannot_run("--inputs says it all: leave out --dtype")
        try:
            question, own = take_batches(question, inputs)
        except ValueError as error:
            cannot_run(str(error))
        announce_batches(question, own)
    cases = own.cases if own else tuple(case for each in dtypes for case in plain_cases(question, each))
    adapter = load_loss(specification, options, device, question.linear, own.arrays if own else ())
    try:
        with writing(folder):
            record_loss(folder, adapter, cases, question, own, announce)
        read_recording(folder)
    except RecordingError as error:
        cannot_run(str(error))
    console = PlainConsole()
    write_json(json_file, {"command": "record", "loss": specification, "cases": [case.name for case in cases]}, console)
    console.print(Text(f"wrote {folder}: {specification} in {count_of(len(cases), 'case')}"), soft_wrap=True)


def replay_own(
    folder: Path,
    adapter: list[str] | None,
    options: list[str] | None,
    tolerance: Tolerance | None,
    device: str,
    json_file: Path | None,
    report: Path | None,
) -> None:
    """Compare a recorded loss with one of this machine."""
    console = PlainConsole()
    check_device(device)
    if not adapter or len(adapter) > 1:
        cannot_run(f"{folder} holds a loss: name one to compare with it, as in --adapter jax:package.module:name")
    try:
        recording = read_recording(folder)
    except RecordingError as error:
        cannot_run(str(error))
    own, question = recording.own, recording.question
    loss = load_loss(adapter[0], options, device, question.linear, own.arrays if own else ())
    try:
        recorded = recording.sides[recording.reduction].adapter.name
        check_pair(question, (recorded, loss.name), drawn=False)
    except ValueError as error:
        cannot_run(str(error))
    first, second = sides_of(recording, loss, lambda text: console.print(Text(text)))
    dtypes = list(dict.fromkeys(case.dtype for case in recording.cases))
    pair = compare_sides(first, second, question, dtypes, tolerance, announce, recording.cases)
    versions = ", ".join(f"{name} {version}" for name, version in recording.environment["versions"].items())
    console.print(Text(f"recorded with Python {recording.environment['python']}, {versions}"), soft_wrap=True)
    print_pair(pair, console)
    write_pair("replay", pair, question, None, json_file, report, console)
    end_with_verdict(pair, console)
