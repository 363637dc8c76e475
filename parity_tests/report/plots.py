"""The plots of the report: errors in scaled ULPs, and two trainings step by step."""

import base64
import io
import math
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from parity_tests.studies.survey import Survey
from parity_tests.trainings.trajectory import TrajectoryVerdict
from parity_tests.truth.precision import FloatArray

BLUE, RUST, GREY = "#8fbce6", "#b3410f", "#555555"
# The palette of Okabe and Ito, which colour-blind people can tell apart.
DTYPE_COLOURS = {"float64": "#000000", "float32": "#0072b2", "bfloat16": "#d55e00", "float16": "#009e73"}

# Scaled ULPs: a bin for exactly 0, one for less than 2^LOWEST, one for each doubling, one for 2^HIGHEST and more.
LOWEST, HIGHEST = -8, 8
ULP_BINS = HIGHEST - LOWEST + 3


class UlpLine(NamedTuple):
    """Errors of an adapter's gradient in a dtype: shares of the entries in each bin, and the largest error.

    Every case has the same weight; otherwise the widest would hide the others.
    """

    dtype: str
    shares: FloatArray
    within_half: float
    largest: float

    def __str__(self) -> str:
        """Return one line of text."""
        largest = f"{self.largest:.3g}" if math.isfinite(self.largest) else "∞"
        return (
            f"{self.dtype}: {self.shares[0]:.0%} exactly right, {self.within_half:.0%} within half a ULP, largest "
            f"error {largest}"
        )


def ulp_panels(survey: Survey) -> list[tuple[str, list[UlpLine], str]]:
    """Return name, lines and plot of each adapter with measured errors."""
    panels = []
    for name in survey.members:
        ulps: dict[str, list[FloatArray]] = {}
        for outcome in survey.of(name):
            if outcome.comparison and outcome.comparison.ulps.size:
                ulps.setdefault(outcome.dtype, []).append(outcome.comparison.ulps.ravel())
        if ulps:
            lines = [ulp_line(dtype, arrays) for dtype, arrays in ulps.items()]
            panels.append((name, lines, png(draw_ulps(lines))))
    return panels


def ulp_line(dtype: str, arrays: list[FloatArray]) -> UlpLine:
    """Return the distribution of the errors of several cases, none of them empty."""
    arrays = [np.where(np.isnan(array), np.inf, array) for array in arrays]
    return UlpLine(
        dtype,
        np.mean([_bin_shares(array) for array in arrays], axis=0),
        float(np.mean([np.mean(array <= 0.5) for array in arrays])),
        float(max(array.max() for array in arrays)),
    )


def _bin_shares(ulps: FloatArray) -> FloatArray:
    return np.bincount(_bin_of(ulps), minlength=ULP_BINS) / ulps.size


def _bin_of(ulps: FloatArray) -> NDArray[np.int64]:
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(ulps))
    place: NDArray[np.int64] = np.where(ulps > 0, np.clip(exponent, LOWEST - 1, HIGHEST) - LOWEST + 2, 0).astype(int)
    return place


def draw_ulps(lines: list[UlpLine]) -> Figure:
    """Draw the distributions, one on top of the other, and a mark at the bin of the largest error."""
    figure = Figure(figsize=(4.6, 2.8), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        colour = DTYPE_COLOURS.get(line.dtype, GREY)
        axes.stairs(line.shares, color=colour, fill=True, alpha=0.15)
        axes.stairs(line.shares, color=colour, linewidth=1.8, label=line.dtype)
        largest = int(_bin_of(np.array([line.largest]))[0]) + 0.5
        axes.plot(largest, 0, marker="v", markersize=9, color=colour, markeredgecolor="white", clip_on=False, zorder=3)
    ticks = {0.5: "0"} | {power - LOWEST + 2: _power(power) for power in (-4, 0, 4, 8)}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set(xlabel="scaled ULPs", ylabel="share of entries", xlim=(0, ULP_BINS), ylim=(0, None))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _tidy(axes)
    return figure


def _power(exponent: int) -> str:
    return str(2**exponent) if exponent >= 0 else f"1/{2**-exponent}"


def draw_trajectory(trajectory: TrajectoryVerdict, parted: int | None = None) -> Figure:
    """Draw the difference of each step, the difference that rounding explains, and the step of the first divergence.

    Args:
        trajectory: the losses of the trainings.
        parted: the step, if it is not to follow from the losses.
    """
    parted = trajectory.first_divergence if parted is None else parted
    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(len(trajectory.difference))
    # A logarithmic axis has neither 0 nor infinity, so such steps are left out.
    shown = (trajectory.difference > 0) & np.isfinite(trajectory.difference)
    axes.plot(steps, trajectory.allowed, color="black", linewidth=1.5, label="allowed")
    axes.plot(steps, trajectory.envelope, color=BLUE, linewidth=3, label="envelope of replicas")
    axes.plot(steps[shown], trajectory.difference[shown], ".", color=RUST, markersize=4, label="difference")
    if trajectory.blind_from is not None:
        axes.axvspan(trajectory.blind_from, len(steps), color="#eeeeee", zorder=0, label="says little")
    if parted is not None:
        axes.axvline(parted, label=f"trainings part (step {parted})", color=RUST, linestyle="--", linewidth=1.5)
    axes.set(xlabel="step", ylabel="difference of the losses", xlim=(-0.5, len(steps) - 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if np.any(shown) or np.any(trajectory.allowed > 0):
        axes.set_yscale("log")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    _tidy(axes)
    return figure


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=11)
    legend = axes.get_legend() or axes.legend(frameon=False)
    for label in (axes.xaxis.label, axes.yaxis.label, *legend.get_texts()):
        label.set_fontsize(11)


def png(figure: Figure) -> str:
    """Return a figure as a PNG image in base64."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return base64.b64encode(buffer.getvalue()).decode()
