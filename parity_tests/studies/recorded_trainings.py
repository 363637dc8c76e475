"""A training recorded on one machine with one framework, to be held against another on a machine with the other.

A recording is a folder of `sealed_folders`, with the state before the first step and after each, the losses, and the
losses and the spread of the replicas: all that the rule of `trainings/stepwise.py` asks of the first training. So the
verdict is the one that both trainings would get on one machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from parity_tests.evidence.environment import describe_environment
from parity_tests.json_files import check_form
from parity_tests.studies.sealed_folders import Arrays, read_sealed, write_sealed
from parity_tests.trainings.stepwise import MODES, State, Step, Track, Training, TrainingError, follow

MANIFEST = "training.json"
_FORM = {
    "name": str,
    "tensors": [str],
    "steps": int,
    "replicas": int,
    "batch_size": int,
    "spread_of": [str],
    "environment": {"python": str, "versions": {str: str}, ...: None},
}


@dataclass(frozen=True)
class RecordedTraining:
    """A recorded training.

    Args:
        name: the text after `--training`, such as "torch:my.trainings:Torch".
        start: the state before the first step.
        free, forced: the steps, free-running and teacher-forced.
        batch_size: number of losses that a step averages.
        environment: the result of `describe_environment` where it was recorded.
    """

    name: str
    start: State
    free: tuple[Step, ...]
    forced: tuple[Step, ...]
    batch_size: int
    environment: Mapping[str, Any]


def record_training(
    folder: Path,
    name: str,
    training: Training,
    steps: int,
    *,
    replicas: int = 4,
    batch_size: int = 64,
    track: Track = lambda items, title: items,
) -> None:
    """Run a training with its replicas, and write the recording.

    Args:
        folder: the folder, which is created.
        name: what the training is called.
        training: the training, which starts from its current state.
        steps: number of steps.
        replicas: number of one-ulp replicas to run.
        batch_size: number of losses that a step averages.
        track: called with the steps of each mode.

    Raises:
        TrainingError: a step depends on more than the state, or the state cannot be recorded.
        OSError: the folder cannot be written.
    """
    free, forced = (
        list(track(taken, mode)) for taken, mode in zip(follow(training, steps, replicas=replicas), MODES, strict=True)
    )
    _check_repeats(free, forced)
    states = [free[0].before, *(step.after for step in free)]
    arrays: Arrays = {"losses": np.array([step.loss for step in free])}
    for i, state in enumerate(states):
        arrays |= {f"states/{i}/{j}": values for j, values in enumerate(state.values())}
    spread_of = list(free[0].spread)
    for mode, taken in zip(MODES, (free, forced), strict=True):
        arrays[f"{mode}/losses"] = np.array([step.replica_losses for step in taken])
        arrays[f"{mode}/spread"] = np.array([[step.spread[each] for each in spread_of] for step in taken])
    content = {
        "name": name,
        "tensors": list(states[0]),
        "steps": steps,
        "replicas": replicas,
        "batch_size": batch_size,
        "spread_of": spread_of,
        "environment": describe_environment(),
    }
    write_sealed(folder, MANIFEST, content, arrays)


def _check_repeats(free: list[Step], forced: list[Step]) -> None:
    for number, (one, other) in enumerate(zip(free, forced, strict=True)):
        differing = [name for name in one.after if not np.array_equal(one.after[name], other.after[name], True)]
        if differing:
            raise TrainingError(
                f"the training does not repeat its step {number} from the same state: {', '.join(differing)} came out "
                "differently. What a step depends on must be in the state, and random numbers must come from the "
                "step's number."
            )


def read_training(folder: Path) -> RecordedTraining:
    """Return the recording in a folder, after checking its hashes.

    Raises:
        RecordingError: there is none, it was changed after it was written, or it describes no training.
    """
    return read_sealed(folder, MANIFEST, "training", _put_together)


def _put_together(content: dict[str, Any], arrays: Arrays) -> RecordedTraining:
    check_form(content, _FORM)
    names, steps, replicas = content["tensors"], content["steps"], content["replicas"]
    if steps < 1 or replicas < 1 or content["batch_size"] < 1:
        raise ValueError("steps, replicas and batch_size must be at least 1")
    losses = _numbers(arrays["losses"], (steps,))
    if len(arrays) != (steps + 1) * len(names) + 2 * len(MODES) + 1 or len(set(names)) != len(names):
        raise ValueError("it has other arrays than those of its steps")
    states = [{name: arrays[f"states/{i}/{j}"] for j, name in enumerate(names)} for i in range(steps + 1)]
    start = states[0]
    for state in states:
        for name, values in state.items():
            if (values.shape, values.dtype) != (start[name].shape, start[name].dtype):
                raise ValueError(f"{name} has another shape or dtype in some step")
    moving = [name for name, values in start.items() if values.dtype.kind == "f" or values.dtype == ml_dtypes.bfloat16]
    if sorted(content["spread_of"]) != sorted(["loss", *moving]):
        raise ValueError("the spread is that of other tensors")
    free, forced = (
        _steps(
            states,
            losses,
            _numbers(arrays[f"{mode}/losses"], (steps, replicas)),
            _numbers(arrays[f"{mode}/spread"], (steps, len(moving) + 1)),
            content["spread_of"],
        )
        for mode in MODES
    )
    return RecordedTraining(content["name"], start, free, forced, content["batch_size"], content["environment"])


def _numbers(values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if values.dtype != np.float64 or values.shape != shape:
        raise ValueError(f"expected are numbers in float64 {list(shape)}, got {values.dtype} {list(values.shape)}")
    return values


def _steps(
    states: list[dict[str, NDArray[Any]]],
    losses: NDArray[Any],
    replica_losses: NDArray[Any],
    spread: NDArray[Any],
    spread_of: list[str],
) -> tuple[Step, ...]:
    return tuple(
        Step(
            states[i],
            float(losses[i]),
            states[i + 1],
            tuple(replica_losses[i].tolist()),
            dict(zip(spread_of, spread[i].tolist(), strict=True)),
        )
        for i in range(len(losses))
    )
