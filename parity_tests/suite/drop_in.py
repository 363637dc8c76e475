"""Compares the frameworks' own losses with ours, and puts faults in our place.

Ours is held against the bound of `error_bound` and the peer against that of `peer_bound`, both computed from the data;
the two may differ by the sum. Each is also held against the truth, which tells which one is wrong.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity_tests.faults.dense import evaluate
from parity_tests.losses.adapters import JaxAdapter, TorchAdapter
from parity_tests.suite.peer_bounds import peer_bound
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.bounds import Bound, error_bound
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import Result, error_over_bound, exactly
from parity_tests.truth.oracle import Exact, Truth, solve
from parity_tests.truth.precision import FloatArray

TORCH, JAX = TorchAdapter().arithmetic, JaxAdapter().arithmetic
SMOOTHINGS = (0.0, 0.1, 1.0)
REDUCTIONS = ("none", "sum", "mean")


@dataclass(frozen=True)
class PeerSetting:
    """A case, its truth, the bounds of both sides, and torch's `ignore_index`, also where it has no effect."""

    case: Case
    truth: Truth
    ours: Bound
    peer: Bound
    ignore_index: int = -100

    @property
    def divides_by_zero(self) -> bool:
        """Whether the mean is over no rows."""
        return not self.truth.factor.any()


def make_setting(case: Case, arithmetic: Arithmetic, ignore_index: int = -100, unshifted: bool = False) -> PeerSetting:
    truth = solve(case)
    peer = peer_bound(case, truth, arithmetic, unshifted)
    return PeerSetting(case, truth, error_bound(case, truth, arithmetic), peer, ignore_index)


class Share(NamedTuple):
    """The largest errors of loss and gradient as shares of their bounds: above 1 is wrong."""

    loss: float
    gradient: float


def share(values: FloatArray, expected: FloatArray | Exact, bound: FloatArray) -> float:
    """Return the largest error as a share of its bound; inf where a NaN or an infinity is out of place."""
    exact = expected if isinstance(expected, Exact) else exactly(expected)
    assert values.shape == exact.high.shape == bound.shape
    return float(np.max(error_over_bound(exact.error_of(values), bound), initial=0.0))


def apart(setting: PeerSetting, ours: Result, peer: Result) -> Share:
    """Compare two results: they may differ by the sum of their bounds."""
    of_loss = share(ours.loss, peer.loss, setting.ours.loss + setting.peer.loss)
    return Share(of_loss, share(ours.gradient, peer.gradient, setting.ours.gradient + setting.peer.gradient))


def verdict(setting: PeerSetting, ours: Result, peer: Result) -> dict[str, Share]:
    """Compare the results with each other and each with the truth; their dtypes must be float64."""
    assert (ours.loss_dtype, ours.gradient_dtype) == (peer.loss_dtype, peer.gradient_dtype) == ("float64", "float64")
    shares = {"each other": apart(setting, ours, peer)}
    for name, result, bound in (("ours", ours, setting.ours), ("peer", peer, setting.peer)):
        of_loss = share(result.loss, setting.truth.loss, bound.loss)
        shares[name] = Share(of_loss, share(result.gradient, setting.truth.gradient, bound.gradient))
    return shares


class Tally:
    """The largest shares of all comparisons so far."""

    def __init__(self) -> None:
        """Start with none."""
        self.count = 0
        self.largest: dict[str, Share] = {}

    def add(self, shares: dict[str, Share]) -> None:
        """Take in the shares of one comparison."""
        self.count += 1
        for name, new in shares.items():
            old = self.largest.get(name, Share(0.0, 0.0))
            self.largest[name] = Share(max(old.loss, new.loss), max(old.gradient, new.gradient))

    def __str__(self) -> str:
        parts = [f"{name} {of.loss:.2f} loss {of.gradient:.2f} gradient" for name, of in self.largest.items()]
        return f"{self.count} comparisons, largest share of the bounds: {', '.join(parts)}"


def as_result(case: Case, loss: NDArray[Any], gradient: NDArray[Any]) -> Result:
    num_rows = num_rows_of(case)
    flat = loss.reshape(num_rows) if case.options["reduction"] == "none" else loss
    return Result(flat, rows_of(case, gradient), loss.dtype.name, gradient.dtype.name)


def rows_of(case: Case, array: NDArray[Any]) -> NDArray[Any]:
    return np.moveaxis(array, case.axis, -1).reshape(num_rows_of(case), case.num_classes)


def num_rows_of(case: Case) -> int:
    return int(np.prod(case.batch_shape))


def hard_logits(generator: np.random.Generator, num_rows: int, num_classes: int, labels: NDArray[Any]) -> FloatArray:
    """Return normal logits, far from 0 in the first row; in the last one a class is almost certain."""
    logits = generator.normal(size=(num_rows, num_classes)) * 2
    logits[0] += 1000
    if num_rows > 1:
        label = labels.ravel()[-1] if labels.dtype.kind == "i" else 0
        logits[-1, label] += 20
    return logits


# Faults in our place.

WRONG = (
    "other_off",
    "weight_not_in_smoothing",
    "weight_not_in_denominator",
    "all_rows_counted",
    "ignored_rows_leak",
    "ignored_rows_count",
    "label_off_by_one",
    "sum_for_mean",
    "mean_for_sum",
    "unsmoothed_loss",
    "unsmoothed_gradient",
    "zero_gradient",
    "zero_non_target_gradient",
    "gradient_sign",
    "upstream_ignored",
    "local_classes",
    "stale_lse",
    "last_digits",
)


def counted_of(case: Case) -> NDArray[np.bool_]:
    return case.rows().counted.reshape(case.batch_shape)


def wrong_result(case: Case, fault: str) -> Result:
    """Return the result of an implementation with that fault; most faults are those of `parity_tests.faults`."""
    if fault == "mean_for_sum":
        options = {**case.options, "reduction": "mean"}
        return evaluate(replace(case, options=options) if case.options["reduction"] == "sum" else case)
    if fault == "ignored_rows_count":
        options = {name: value for name, value in case.options.items() if name != "ignore_index"}
        labels = case.labels if case.labels.dtype.kind == "f" else np.where(counted_of(case), case.labels, 0)
        return evaluate(replace(case, options=options, where=None, labels=labels))
    if fault == "last_digits":
        sound = evaluate(case)
        return replace(sound, loss=sound.loss * (1 + 2**-40), gradient=sound.gradient * (1 + 2**-40))
    return evaluate(case, fault)


def reject(fault: str, settings: list[PeerSetting], peers: list[Result]) -> None:
    """Fail unless the fault is rejected in every case, and in each part of the result, that it changes."""
    margins: dict[tuple[str, Any], float] = {}
    parts: dict[str, float] = {}
    for setting, peer in zip(settings, peers, strict=True):
        sound, wrong = evaluate(setting.case), wrong_result(setting.case, fault)
        shares = apart(setting, wrong, peer)
        for part in ("loss", "gradient"):
            if not np.array_equal(getattr(sound, part), getattr(wrong, part)):
                parts[part] = max(parts.get(part, 0.0), getattr(shares, part))
                margins[setting.case.name, setting.case.smoothing] = max(shares)
    nearest = min(margins, key=margins.__getitem__)
    print(f"{fault}: rejected in {len(margins)} of {len(settings)} cases, nearest {margins[nearest]:.3g} in {nearest}")
    assert margins[nearest] > 1, nearest
    assert min(parts.values()) > 1, parts
