"""Which faults each library's published tests catch, and which the computed bounds catch on the same inputs."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from parity_tests.faults.dense import evaluate
from parity_tests.studies.published_comparisons import PeerTest, Setting, Tolerance, result_of
from parity_tests.studies.published_tests import PEER_TESTS
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.bounds import Bound, error_bound
from parity_tests.truth.comparison import Result
from parity_tests.truth.oracle import Truth, solve
from parity_tests.truth.precision import FloatArray

# Another draw of the inputs may decide otherwise where the largest error is within this factor of the tolerance.
CLOSE = 2.0

Mark = Literal["caught", "survives", "nothing"]


@dataclass(frozen=True)
class Verdict:
    """Whether a library's tests reject a fault, and whether the bounds do on the inputs of these tests.

    Args:
        mark: a test rejects the fault ("caught"); all accept it, although the bounds reject it on the same inputs
            ("survives"); or the bounds accept it too, because there its effect is no larger than rounding ("nothing").
        share: largest error as a share of a test's tolerance; 0 if no test compares the affected part. Settings after
            the first clear rejection are not evaluated.
        ours: whether the bounds reject it on the inputs of any of the settings.
    """

    mark: Mark
    share: float
    ours: bool

    @property
    def close(self) -> bool:
        """Whether another draw of the inputs may decide otherwise."""
        return self.mark != "nothing" and 1 / CLOSE < self.share <= CLOSE


def share_of_tolerance(actual: FloatArray, expected: FloatArray, tolerance: Tolerance) -> float:
    """Return the largest error as a share of the allowed one; inf if one is NaN, or infinite and they differ."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.where(actual == expected, 0.0, np.abs(actual - expected))
        share = np.where(error == 0, 0.0, error / (tolerance.atol + tolerance.rtol * np.abs(expected)))
    return float(np.max(np.where(np.isnan(share) | np.isinf(error), np.inf, share), initial=0.0))


def share_of(setting: Setting, fault: str | None) -> float:
    """Return the largest error of a fault, or of the sound loss, as a share of a test's tolerances."""
    tolerances = {"loss": setting.loss, "gradient": setting.gradient, "target": setting.loss}
    shares = [0.0]
    for part, (actual, expected) in setting.compare(setting, fault).items():
        tolerance = tolerances[part]
        if tolerance is not None:
            shares.append(share_of_tolerance(actual, expected, tolerance))
    return max(shares)


def judge(peer: PeerTest, fault: str) -> Verdict:
    """Return the verdict of a library's tests on a fault."""
    share, ours = 0.0, False
    for setting in settings_of(peer):
        wrong, sound = result_of(setting, fault), _sound(setting)
        pairs = [(wrong.loss, sound.loss), (wrong.gradient, sound.gradient)]
        if all(np.array_equal(*pair, equal_nan=True) for pair in pairs):
            continue
        if share <= CLOSE:
            share = max(share, share_of(setting, fault))
        ours = ours or bounds_reject(setting, wrong)
    mark: Mark = "caught" if share > 1 else "survives" if ours else "nothing"
    return Verdict(mark, share, ours)


@cache
def verdicts_on(fault: str) -> dict[str, Verdict]:
    """Return each library's verdict on a fault, by the library's name."""
    return {peer.name: judge(peer, fault) for peer in PEER_TESTS}


@cache
def settings_of(peer: PeerTest) -> tuple[Setting, ...]:
    """Return the settings of a library's tests, the same each time."""
    return peer.make_settings()


@cache
def _sound(setting: Setting) -> Result:
    return evaluate(setting.case)


@cache
def _truth_and_bound(setting: Setting) -> tuple[Truth, Bound]:
    truth = solve(setting.case)
    return truth, error_bound(setting.case, truth, Arithmetic())


def bounds_reject(setting: Setting, result: Result) -> bool:
    """Return whether an error exceeds the computed bounds."""
    truth, bound = _truth_and_bound(setting)
    loss, gradient = truth.loss.error_of(result.loss), truth.gradient.error_of(result.gradient)
    return bool(np.any(loss > bound.loss) or np.any(gradient > bound.gradient))
