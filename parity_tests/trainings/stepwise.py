"""Compares two trainings step by step and tensor by tensor, and finds the first divergence.

Two modes tell two kinds of error apart:

- *Free-running*: both start from the same state and run on their own, as for a user. Differences add up.
- *Teacher-forced*: at every step the second starts from the state of the first. A wrong step shows at that step, and
  rounding does not add up.

The yardstick is the training itself, as in `trajectory.py`: replicas of the first training, with each floating-point
number of the state moved up or down by one unit in the last place (ulp), at random; at the start when free-running, at
every step when teacher-forced. For each tensor

    envelope = largest |replica - first| over replicas and elements (free-running: over the steps so far, too)
    floor    = u (ceil(log2 batch) + 2) times its largest element: a mean over the batch, as in `rounding_floor`
    allowed  = 2 (envelope + floor)

An element that differs by more than `allowed` is a divergence. Integers must be equal. There is one `allowed` for a
tensor: an error in an element much smaller than the largest of its tensor may pass. Split such tensors in `state`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from parity_tests.trainings.trajectory import TrajectoryVerdict, compare_trajectories, rounding_floor
from parity_tests.truth.precision import FORMATS, FloatArray

State = Mapping[str, NDArray[Any]]
Mode = Literal["free-running", "teacher-forced"]
MODES: tuple[Mode, Mode] = ("free-running", "teacher-forced")
LOSS = "loss"


class Training(Protocol):
    """A training that can be stopped and started at any state. A user writes one for each framework.

    The state must hold everything that a step depends on: weights, moments of the optimizer, counts of steps. Both
    trainings must give their tensors the same names and layouts: transpose a kernel on one side.
    """

    def state(self) -> State:
        """Return copies of all tensors by name."""
        ...

    def load(self, state: State) -> None:
        """Continue from a state."""
        ...

    def step(self, number: int) -> float:
        """Train on batch `number`, counted from 0, and return the loss before the update."""
        ...


class TrainingError(ValueError):
    """The trainings cannot be compared; the message says why."""


@dataclass(frozen=True)
class Divergence:
    """An element that differs.

    Args:
        step: counted from 0.
        tensor: name of the tensor; "loss" for the loss.
        index: index in the tensor.
        first, second: the values.
        allowed: the difference that rounding explains.
        share: difference / allowed.
    """

    step: int
    tensor: str
    index: tuple[int, ...]
    first: float
    second: float
    allowed: float
    share: float

    def __str__(self) -> str:
        """Return one line for a message."""
        place = f"{self.tensor}{list(self.index) if self.index else ''}"
        values = f"{self.first!r} and {self.second!r}"
        return f"step {self.step}, {place}: {values}, allowed {self.allowed:.2g}: {self.share:.2g} of it"


@dataclass(frozen=True)
class StepwiseVerdict:
    """The verdict in one mode.

    Args:
        mode: the mode.
        worst: the element with the largest share for each step and tensor, in the order of the steps, the loss first.
        losses: the verdict on the losses alone, for plots.
    """

    mode: Mode
    worst: list[Divergence]
    losses: TrajectoryVerdict

    @property
    def first_divergence(self) -> Divergence | None:
        """The divergence at the first step that has one: the loss, or else the worst tensor; None if there is none."""
        beyond = [each for each in self.worst if each.share > 1]
        if not beyond:
            return None
        same_step = [each for each in beyond if each.step == beyond[0].step]
        return same_step[0] if same_step[0].tensor == LOSS else max(same_step, key=lambda each: each.share)

    @property
    def agrees(self) -> bool:
        """Whether no element differs by more than `allowed`."""
        return self.first_divergence is None

    @property
    def largest(self) -> Divergence:
        """The element with the largest share of all steps and tensors."""
        return max(self.worst, key=lambda each: each.share)


# Yields items unchanged, and shows how far they are; called with the items and a title.
Track = Callable[[Iterator["Step"], str], Iterable["Step"]]


class Step(NamedTuple):
    """One step of the first training, and of its replicas.

    Args:
        before, after: the state before and after it.
        loss: its loss.
        replica_losses: the losses of the replicas.
        spread: the largest distance of the replicas from the training, of the loss and of each floating-point tensor.
    """

    before: State
    loss: float
    after: State
    replica_losses: tuple[float, ...]
    spread: Mapping[str, float]


def compare_step_by_step(
    first: Training,
    second: Training,
    steps: int,
    *,
    replicas: int = 4,
    batch_size: int = 64,
    seed: int = 0,
    track: Track = lambda items, title: items,
) -> tuple[StepwiseVerdict, StepwiseVerdict]:
    """Compare two trainings, free-running and teacher-forced, from the current state of the first.

    Args:
        first: the training whose state both start from, and whose replicas are the yardstick.
        second: the other training. Both end in some later state.
        steps: number of steps.
        replicas: number of one-ulp replicas to run; each costs as much as the first training.
        batch_size: number of losses that a step averages, for the rounding of the loss.
        seed: seed of the replicas' directions.
        track: called with the steps of each mode; see `Track`.

    Raises:
        TrainingError: names or shapes of the states differ, or a step depends on more than its state.
    """
    start = _copied(first.state())
    modes = follow(first, steps, replicas=replicas, seed=seed)
    return compare_with_steps(modes, start, second, batch_size=batch_size, track=track)


def follow(
    training: Training, steps: int, *, replicas: int = 4, seed: int = 0
) -> tuple[Iterator[Step], Iterator[Step]]:
    """Return the steps of a training from its current state, free-running and teacher-forced, in this order.

    They are taken as they are asked for.

    Args:
        training: the training.
        steps: number of steps.
        replicas: number of one-ulp replicas to run; each costs as much as the training.
        seed: seed of the replicas' directions.

    Raises:
        TrainingError: there is no step or no replica, a step depends on more than the state, or the state has what are
            no numbers.
    """
    if steps < 1 or replicas < 1:
        raise TrainingError(f"at least one step and one replica are needed, got {steps} and {replicas}")
    start, random = _copied(training.state()), np.random.default_rng(seed)
    _check_numbers(start)
    _check_determined("first", training, start)
    free = _follow("free-running", training, start, steps, replicas, random)
    return free, _follow("teacher-forced", training, start, steps, replicas, random)


def _follow(
    mode: Mode, training: Training, start: State, steps: int, replicas: int, random: np.random.Generator
) -> Iterator[Step]:
    state = start
    moved = [one_ulp_away(start, random) for _ in range(replicas)]
    for number in range(steps):
        if mode == "teacher-forced":
            moved = [one_ulp_away(state, random) for _ in range(replicas)]
        loss, after = _advance(training, state, number)
        advanced = [_advance(training, replica, number) for replica in moved]
        losses, moved = tuple(each for each, _ in advanced), [each for _, each in advanced]
        yield Step(state, loss, after, losses, _spread(after, loss, moved, losses))
        state = after


def compare_with_steps(
    modes: tuple[Iterable[Step], Iterable[Step]],
    start: State,
    second: Training,
    *,
    batch_size: int = 64,
    track: Track = lambda items, title: items,
) -> tuple[StepwiseVerdict, StepwiseVerdict]:
    """Compare a training with the steps of another.

    Args:
        modes: the steps of the other, as `follow` returns them.
        start: the state before the first step.
        second: the training.
        batch_size: number of losses that a step averages, for the rounding of the loss.
        track: called with the steps of each mode; see `Track`.

    Raises:
        TrainingError: as `compare_step_by_step`.
    """
    _check_states(start, second.state())
    _check_determined("second", second, start)
    free, forced = (
        _compare_mode(mode, track(iter(steps), mode), second, batch_size)
        for mode, steps in zip(MODES, modes, strict=True)
    )
    return free, forced


def _compare_mode(mode: Mode, steps: Iterable[Step], second: Training, batch_size: int) -> StepwiseVerdict:
    other: State = {}
    envelope: dict[str, float] = {}
    worst: list[Divergence] = []
    losses = []
    for number, step in enumerate(steps):
        if number == 0 or mode == "teacher-forced":
            other, envelope = step.before, {}
        other_loss, other = _advance(second, other, number)
        losses.append((step.loss, other_loss, *step.replica_losses))
        for name, value in step.spread.items():
            envelope[name] = max(envelope.get(name, 0.0), value)
        worst += _compare(number, (step.loss, step.after), (other_loss, other), envelope, batch_size)
    return StepwiseVerdict(mode, worst, _of_losses(losses, batch_size))


def _of_losses(losses: list[tuple[float, ...]], batch_size: int) -> TrajectoryVerdict:
    first, second, *replicas = np.array(losses, np.float64).T
    return compare_trajectories(first, second, np.stack(replicas), floor=rounding_floor(first, batch_size))


def _advance(training: Training, state: State, step: int) -> tuple[float, State]:
    training.load(state)
    loss = float(training.step(step))
    return loss, _copied(training.state())


def _copied(state: State) -> State:
    return {name: np.array(values) for name, values in state.items()}


def _is_floating(values: NDArray[Any]) -> bool:
    return values.dtype.kind == "f" or values.dtype == ml_dtypes.bfloat16


def one_ulp_away(state: State, random: np.random.Generator) -> State:
    """Return a state with every floating-point number replaced by its upper or lower neighbour, at random."""
    moved = {}
    for name, values in state.items():
        if _is_floating(values):
            direction = random.choice([-np.inf, np.inf], size=values.shape).astype(values.dtype)
            moved[name] = np.asarray(np.nextafter(values, direction), values.dtype)
        else:
            moved[name] = values
    return moved


def _spread(state: State, loss: float, moved: list[State], losses: Sequence[float]) -> dict[str, float]:
    """Return the largest distance of the replicas from the first training, for each tensor."""
    spread = {LOSS: max(abs(each - loss) for each in losses)}
    for name, values in state.items():
        if _is_floating(values):
            exact = values.astype(np.float64)
            spread[name] = max(
                float(np.max(np.abs(replica[name].astype(np.float64) - exact), initial=0.0)) for replica in moved
            )
    return spread


def _compare(
    step: int,
    first: tuple[float, State],
    second: tuple[float, State],
    envelope: Mapping[str, float],
    batch_size: int,
) -> Iterator[Divergence]:
    (loss, state), (other_loss, other) = first, second
    floor = float(rounding_floor([loss], batch_size)[0])
    yield _worst(step, LOSS, np.asarray(loss), np.asarray(other_loss), 2 * (envelope[LOSS] + floor))
    for name, values in state.items():
        allowed = 0.0
        if _is_floating(values):
            largest = np.max(np.abs(values.astype(np.float64)), initial=0.0)
            roundoff = FORMATS[values.dtype.name].roundoff
            allowed = 2 * (envelope[name] + float(rounding_floor([largest], batch_size, roundoff)[0]))
        if values.size:
            yield _worst(step, name, values, other[name], allowed)


def _worst(step: int, name: str, first: NDArray[Any], second: NDArray[Any], allowed: float) -> Divergence:
    one, other = first.astype(np.float64), second.astype(np.float64)
    # Integers are compared as they are: float64 does not hold all of them.
    share = _shares(one, other, allowed) if _is_floating(first) else np.where(first == second, 0.0, np.inf)
    index = tuple(int(i) for i in np.unravel_index(np.argmax(share), share.shape))
    return Divergence(step, name, index, float(one[index]), float(other[index]), allowed, float(share[index]))


def _shares(one: FloatArray, other: FloatArray, allowed: float) -> FloatArray:
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = np.abs(one - other)
        share = np.where(difference == 0, 0.0, difference / allowed)
    # A NaN agrees with nothing, and nothing agrees if the envelope is not finite.
    return np.where(np.isfinite(difference) & np.isfinite(allowed), share, np.inf)


def _check_states(state: State, other: State) -> None:
    if state.keys() != other.keys():
        only, others = sorted(state.keys() - other.keys()), sorted(other.keys() - state.keys())
        raise TrainingError(
            f"both trainings must name the tensors of their state alike; only the first has {only}, only the second "
            f"{others}"
        )
    _check_numbers(state)
    for name, values in state.items():
        if values.shape != other[name].shape:
            shapes = f"{list(values.shape)} and {list(other[name].shape)}"
            hint = "; transpose one of them" if values.shape == other[name].shape[::-1] else ""
            raise TrainingError(f"{name} has shapes {shapes}{hint}")
        if values.dtype != other[name].dtype:
            raise TrainingError(f"{name} has dtypes {values.dtype} and {other[name].dtype}")


def _check_numbers(state: State) -> None:
    if LOSS in state:
        raise TrainingError(f"a tensor of the state is called {LOSS!r}, as the loss is; give it another name")
    for name, values in state.items():
        if values.dtype.kind not in "biu" and values.dtype.name not in FORMATS:
            raise TrainingError(f"{name} is of dtype {values.dtype}; give numbers that are real, in parts if need be")


def _check_determined(which: str, training: Training, start: State) -> None:
    """Take the first step twice: if the results differ, the state is not complete."""
    (loss, state), (again, repeated) = _advance(training, start, 0), _advance(training, start, 0)
    differing = [name for name in state if not np.array_equal(state[name], repeated[name], equal_nan=True)]
    if differing or not (loss == again or (np.isnan(loss) and np.isnan(again))):
        raise TrainingError(
            f"the {which} training does not repeat its first step from the same state: "
            f"{', '.join(differing) or 'the loss'} came out differently. What a step depends on must be in the state "
            "(moments, counts), and random numbers must come from the step's number."
        )
