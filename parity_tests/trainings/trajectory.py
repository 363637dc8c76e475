"""Tests step by step whether two supposedly equal trainings agree.

Two frameworks round differently, and a training feeds every rounding back into its weights. So the losses of two
correct trainings drift apart, slowly or fast, and no fixed tolerance fits: one that accepts a sensitive training
accepts a wrong loss in a stable one. The yardstick has to come from the training itself.

We rerun the training in one of the frameworks with each initial weight moved up or down by one unit in the last place
(ulp), at random. That is the smallest change that the weights can hold. The distance of the losses of these *replicas*
is the effect that rounding may have here:

    envelope[t] = max over steps s <= t and replicas r of |loss_r[s] - loss[s]|
    floor[t]    = rounding of the reported loss itself, for given weights
    allowed[t]  = 2 (envelope[t] + floor[t])

The 2 is no safety factor but the triangle inequality: both trainings are rounded, so if each of them stays within
envelope + floor of the training in exact arithmetic, they stay within twice that of one another. The maximum runs over
all steps so far, since a training that strayed at one step starts the next from there, and since two losses may cross
while the weights differ. Nothing in the rule is fitted to a result. Tests measure its power: it detects a learning
rate that is off by a thousandth, for example.

Limits:
- An envelope as large as the losses allows anything. Only the steps before are evidence. `blind_from` is the first step
  whose envelope is too large.
- The replicas' changes point in random directions, and so mostly cancel in the loss. A *constant* that the two sides
  round differently always pulls in the same direction, and the rule reports it, rightly: a rounded constant is
  another hyperparameter. `examples/digits_parity.py` shows three in AdamW, and how to choose hyperparameters without.
- In a network with kinks (ReLU) a one-ulp change may select another slope. A few replicas may miss such an event:
  take more of them.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64
from numpy.typing import ArrayLike  # jaxtyping's loads JAX

Steps = Float64[np.ndarray, " steps"]

FLOAT32_UNIT_ROUNDOFF = 2.0**-24
BLIND = 1e-3


@dataclass(frozen=True)
class TrajectoryVerdict:
    """The comparison of two trainings at each step.

    Args:
        difference: |loss - other loss|; NaN if one of them is NaN.
        envelope: largest distance of the replicas so far.
        floor: rounding of the reported loss.
        allowed: largest difference that rounding explains; NaN where the replicas or the floor are not finite.
        share: difference / allowed; infinite if either is NaN, or if no difference is allowed.
        blind_from: first step, counted from 0, at which the envelope exceeds a thousandth of the largest loss so far;
            agreement from there on says little. None if it never does.
    """

    difference: Steps
    envelope: Steps
    floor: Steps
    allowed: Steps
    share: Steps
    blind_from: int | None

    @property
    def first_divergence(self) -> int | None:
        """First step whose difference is not allowed, counted from 0; None if there is none."""
        return _first(self.share > 1)

    @property
    def agrees(self) -> bool:
        """Whether the difference is allowed at every step."""
        return self.first_divergence is None

    @property
    def worst_step(self) -> int:
        """Step with the largest share, the first of several."""
        return int(np.argmax(self.share))

    @property
    def largest_share(self) -> float:
        """Largest share of the allowed difference that was used; above 1 the trainings disagree."""
        return float(self.share[self.worst_step])


def compare_trajectories(
    losses: ArrayLike,
    other: ArrayLike,
    replicas: ArrayLike,
    *,
    floor: float | ArrayLike = 0.0,
) -> TrajectoryVerdict:
    """Compare two trainings by the losses of their steps; see the module for the rule.

    A loss that is NaN or infinite agrees with nothing, not even itself. A step at which a replica is NaN or infinite
    disagrees too, since the effect of rounding is unknown there.

    Args:
        losses: [steps], loss of each step of one training.
        other: [steps], losses of the other training.
        replicas: [replicas, steps], losses of trainings that differ from the first by one ulp in each initial weight.
        floor: rounding of the reported loss, a number or [steps], such as the result of `rounding_floor`.

    Returns:
        The verdict, with an array entry for each step.

    Raises:
        ValueError: shapes that do not fit, no step, no replica, or a negative floor.

    Example: two trainings that differ by rounding, and one that goes wrong at step 2.
        >>> losses = [2.0, 1.5, 1.25, 1.0]
        >>> replicas = [[2.0, 1.5, 1.25, 1.001], [2.0, 1.499, 1.25, 1.0]]
        >>> verdict = compare_trajectories(losses, [2.0, 1.501, 1.25, 1.0], replicas)
        >>> verdict.agrees, round(verdict.largest_share, 3)
        (True, 0.5)
        >>> verdict = compare_trajectories(losses, [2.0, 1.501, 1.26, 1.1], replicas)
        >>> verdict.agrees, verdict.first_divergence
        (False, 2)
    """
    losses, other = np.asarray(losses, np.float64), np.asarray(other, np.float64)
    replicas = np.asarray(replicas, np.float64)
    _check_shapes(losses.shape, other.shape, replicas.shape)
    floor = np.broadcast_to(np.asarray(floor, np.float64), losses.shape)
    if np.any(floor < 0):
        raise ValueError(f"floor must be >= 0, got {floor.min()}. It is how far rounding may move a loss.")

    with np.errstate(invalid="ignore"):  # inf - inf is the NaN that it should be
        difference = np.abs(losses - other)
        envelope = np.maximum.accumulate(np.max(np.abs(replicas - losses), axis=0))
        allowed = 2 * (envelope + floor)
        blind = envelope > BLIND * np.maximum.accumulate(np.abs(losses))
    allowed = np.where(np.isfinite(allowed), allowed, np.nan)
    return TrajectoryVerdict(difference, envelope, floor, allowed, _share(difference, allowed), _first(blind))


def rounding_floor(
    losses: ArrayLike,
    batch_size: int,
    unit_roundoff: float = FLOAT32_UNIT_ROUNDOFF,
) -> Steps:
    """Return how far rounding may move the mean of `batch_size` given row losses: the floor of a step.

    u |mean| (ceil(log2 N) + 2): the additions of a pairwise sum, the division, and the rounding of the result. The
    roundings within the N row losses are left out, since they are independent and the mean averages them away; the
    replicas have the rest of them too. Even with an envelope of 0 the losses agree to this precision only.

    Args:
        losses: [steps], mean loss of each step.
        batch_size: number of rows N in each mean.
        unit_roundoff: half the spacing of floating-point numbers at 1; the default is that of float32.

    Raises:
        ValueError: batch_size below 1.

    Example:
        >>> print(rounding_floor([2.0, 0.5], 64) * 2**24)
        [16.  4.]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}. It is the number of losses in each mean.")
    return unit_roundoff * np.abs(np.asarray(losses, np.float64)) * (math.ceil(math.log2(batch_size)) + 2)


def _first(condition: Bool[np.ndarray, " steps"]) -> int | None:
    steps = np.flatnonzero(condition)
    return int(steps[0]) if steps.size else None


def _share(difference: Steps, allowed: Steps) -> Steps:
    # A comparison with NaN is false, so a NaN on either side ends as infinite.
    share = np.full(difference.shape, np.inf)
    np.divide(difference, allowed, out=share, where=allowed > 0)
    share[(difference == 0) & (allowed == 0)] = 0
    return np.where(np.isnan(share), np.inf, share)


def _check_shapes(losses: tuple[int, ...], other: tuple[int, ...], replicas: tuple[int, ...]) -> None:
    if len(losses) != 1 or losses[0] == 0:
        raise ValueError(f"losses must have shape [steps] with at least one step, got {list(losses)}.")
    if other != losses:
        raise ValueError(
            f"both trainings must have as many steps: expected {list(losses)} for the other's losses, got "
            f"{list(other)}. Compare the steps that both have."
        )
    if len(replicas) != 2 or replicas[0] == 0 or replicas[1:] != losses:
        raise ValueError(
            f"replicas must have shape [replicas, steps] with at least one replica: expected [R, {losses[0]}], got "
            f"{list(replicas)}."
        )
