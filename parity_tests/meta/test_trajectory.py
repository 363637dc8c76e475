"""The rule that tells whether two trainings agree."""

import numpy as np
import pytest

from parity_tests.trainings.trajectory import compare_trajectories, rounding_floor

LOSSES = np.array([2.0, 1.5, 1.25, 1.0])
REPLICAS = LOSSES + np.array([[0.0, 0.01, -0.002, 0.0], [0.0, -0.004, 0.0, 0.03]])


def test_envelope_is_the_running_maximum_over_replicas():
    verdict = compare_trajectories(LOSSES, LOSSES, REPLICAS)
    np.testing.assert_allclose(verdict.envelope, [0, 0.01, 0.01, 0.03], rtol=1e-12)


def test_allowed_is_twice_envelope_and_floor():
    floor = np.array([0.1, 0.2, 0.3, 0.4])
    verdict = compare_trajectories(LOSSES, LOSSES, REPLICAS, floor=floor)
    np.testing.assert_allclose(verdict.allowed, 2 * (verdict.envelope + floor), rtol=1e-12)


@pytest.mark.parametrize("sign", [-1, 1])
def test_difference_just_inside_agrees_and_just_outside_does_not(sign):
    allowed = compare_trajectories(LOSSES, LOSSES, REPLICAS, floor=1e-3).allowed
    inside = compare_trajectories(LOSSES, LOSSES + sign * allowed * (1 - 1e-9), REPLICAS, floor=1e-3)
    assert inside.agrees
    assert inside.first_divergence is None
    assert inside.largest_share == pytest.approx(1, abs=1e-8)

    factor = np.array([1 - 1e-9, 1 - 1e-9, 1 + 1e-9, 1 + 1e-9])
    outside = compare_trajectories(LOSSES, LOSSES + sign * allowed * factor, REPLICAS, floor=1e-3)
    assert not outside.agrees
    assert outside.first_divergence == 2


def test_worst_step_is_that_of_the_largest_share_not_of_the_largest_difference():
    verdict = compare_trajectories(LOSSES, LOSSES + np.array([0.0, 0.015, 0.0, 0.02]), REPLICAS)
    assert verdict.worst_step == 1
    assert verdict.largest_share == pytest.approx(0.75)


def test_blind_from_the_step_where_one_ulp_moves_a_thousandth():
    replicas = LOSSES + np.array([[0.0, 0.0019, 0.0021, 0.0]])
    assert compare_trajectories(LOSSES, LOSSES, replicas).blind_from == 2
    assert compare_trajectories(LOSSES, LOSSES, LOSSES[None] + 1e-4).blind_from is None
    assert compare_trajectories(LOSSES * 0, LOSSES * 0, LOSSES[None] * 0).blind_from is None


def test_difference_at_the_start_counts_where_no_replica_has_strayed_yet():
    verdict = compare_trajectories(LOSSES, LOSSES + np.array([1e-12, 0.0, 0.0, 0.0]), REPLICAS)
    assert verdict.first_divergence == 0
    assert verdict.largest_share == np.inf


def test_zero_envelope_allows_equal_losses_and_the_floor_only():
    replicas = LOSSES[None]
    assert compare_trajectories(LOSSES, LOSSES, replicas).agrees
    assert compare_trajectories(LOSSES, LOSSES, replicas).largest_share == 0
    assert not compare_trajectories(LOSSES, LOSSES + 1e-15, replicas).agrees
    assert compare_trajectories(LOSSES, LOSSES + 1e-7, replicas, floor=1e-7).agrees
    assert not compare_trajectories(LOSSES, LOSSES + 3e-7, replicas, floor=1e-7).agrees


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["losses", "other", "both", "replicas", "floor"])
def test_what_is_not_finite_agrees_with_nothing_from_its_step_on(side, value):
    losses, other, replicas, floor = LOSSES.copy(), LOSSES.copy(), REPLICAS.copy(), np.full(4, 1e-3)
    if side in ("losses", "both"):
        losses[2] = value
    if side in ("other", "both"):
        other[2] = value
    if side == "replicas":
        replicas[1, 2] = value
    if side == "floor":
        floor[2] = abs(value)
    verdict = compare_trajectories(losses, other, replicas, floor=floor)
    assert verdict.first_divergence == 2
    assert not verdict.agrees
    assert verdict.largest_share == np.inf


def test_float32_losses_are_compared_in_float64():
    losses = LOSSES.astype(np.float32)
    verdict = compare_trajectories(losses, np.nextafter(losses, np.float32(9)), losses[None], floor=2.0**-24)
    np.testing.assert_array_equal(verdict.difference, np.spacing(losses).astype(np.float64))
    assert verdict.first_divergence == 0


@pytest.mark.parametrize(
    ("losses", "other", "replicas", "message"),
    [
        ([], [], np.zeros((1, 0)), r"at least one step, got \[0\]"),
        ([[1.0]], [[1.0]], [[1.0]], r"shape \[steps\].*got \[1, 1\]"),
        ([1.0, 2.0], [1.0], [[1.0, 2.0]], r"expected \[2\] for the other's losses, got \[1\]"),
        ([1.0, 2.0], [1.0, 2.0], [1.0, 2.0], r"expected \[R, 2\], got \[2\]"),
        ([1.0, 2.0], [1.0, 2.0], np.zeros((0, 2)), r"at least one replica.*got \[0, 2\]"),
        ([1.0, 2.0], [1.0, 2.0], [[1.0]], r"expected \[R, 2\], got \[1, 1\]"),
    ],
)
def test_shapes_that_do_not_fit(losses, other, replicas, message):
    with pytest.raises(ValueError, match=message):
        compare_trajectories(losses, other, replicas)


def test_negative_floor():
    with pytest.raises(ValueError, match=r"floor must be >= 0, got -1e-06"):
        compare_trajectories(LOSSES, LOSSES, REPLICAS, floor=-1e-6)


def test_rounding_floor_counts_the_additions_of_a_pairwise_sum():
    unit = 2.0**-24
    np.testing.assert_allclose(rounding_floor([3.0, -3.0], 1), 3 * unit * 2)
    np.testing.assert_allclose(rounding_floor([3.0], 33), 3 * unit * 8)
    np.testing.assert_allclose(rounding_floor([3.0], 32, unit_roundoff=2.0**-53), 3 * 2.0**-53 * 7)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        rounding_floor([1.0], 0)
