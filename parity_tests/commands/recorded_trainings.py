"""`lsce-parity record` and `replay` of a user's training: `--training torch:package.module:name` or `jax:...`."""

from functools import partial
from pathlib import Path

from rich.text import Text

from parity_tests.commands.common import announce, cannot_run, check_free, write_json, writing
from parity_tests.commands.terminal import PlainConsole
from parity_tests.commands.trajectory import (
    BATCH_SIZE,
    REPLICAS,
    STEPS,
    make_training,
    show_verdicts,
    track_steps,
)
from parity_tests.studies.recorded_trainings import MANIFEST, read_training, record_training
from parity_tests.studies.sealed_folders import RecordingError
from parity_tests.texts import count_of
from parity_tests.trainings.stepwise import TrainingError, compare_with_steps


def record_steps(
    folder: Path,
    specification: str | None,
    options: list[str] | None,
    sizes: tuple[int | None, int | None, int | None],
    force: bool,
    json_file: Path | None,
) -> None:
    """Record a user's training; the sizes are the numbers of steps, replicas and rows, None for the default."""
    if specification is None:
        cannot_run("--steps, --replicas and --batch-size are for --training torch:package.module:name or jax:...")
    steps, replicas, batch_size = (
        given or default for given, default in zip(sizes, (STEPS, REPLICAS, BATCH_SIZE), strict=True)
    )
    check_free(folder, "recorded training", MANIFEST, force)
    training = make_training(specification, options)
    announce(f"recording {specification} over {count_of(steps, 'step')}")
    try:
        with writing(folder):
            shown = partial(track_steps, steps)
            record_training(
                folder, specification, training, steps, replicas=replicas, batch_size=batch_size, track=shown
            )
        recorded = read_training(folder)
    except (TrainingError, RecordingError) as error:
        cannot_run(str(error))
    except (Exception, SystemExit) as error:  # a method of the user's may raise anything
        cannot_run(f"the training raised {type(error).__name__}: {error}")
    console = PlainConsole()
    content = {
        "command": "record",
        "training": specification,
        "losses": [step.loss for step in recorded.free],
        "tensors": {name: {"shape": each.shape, "dtype": each.dtype.name} for name, each in recorded.start.items()},
        "environment": recorded.environment,
    }
    write_json(json_file, content, console)
    console.print(Text(f"wrote {folder}: {specification} over {count_of(steps, 'step')}"), soft_wrap=True)


def replay_steps(
    folder: Path, specification: str | None, options: list[str] | None, json_file: Path | None, report: Path | None
) -> None:
    """Compare a recorded training with one of this machine."""
    if specification is None:
        cannot_run(f"{folder} holds a training: name one to compare with it, as in --training jax:package.module:name")
    try:
        recorded = read_training(folder)
    except RecordingError as error:
        cannot_run(str(error))
    training, steps = make_training(specification, options), len(recorded.free)
    try:
        verdicts = compare_with_steps(
            (recorded.free, recorded.forced),
            recorded.start,
            training,
            batch_size=recorded.batch_size,
            track=partial(track_steps, steps),
        )
    except TrainingError as error:
        cannot_run(str(error))
    except (Exception, SystemExit) as error:  # a method of the user's may raise anything
        cannot_run(f"a training raised {type(error).__name__}: {error}")
    versions = ", ".join(f"{name} {version}" for name, version in recorded.environment["versions"].items())
    PlainConsole().print(Text(f"recorded with Python {recorded.environment['python']}, {versions}"), soft_wrap=True)
    show_verdicts("replay", (f"{recorded.name} (recorded)", specification), verdicts, steps, json_file, report)
