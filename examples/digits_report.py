"""The report of `digits_parity`: calibration, tables, plots and the web page."""

import base64
import io
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from parity_tests.trainings.trajectory import TrajectoryVerdict

BINS = 15
JAX_COLOUR, TORCH_COLOUR, GREY, LIGHT = "#8fbce6", "#b3410f", "#555555", "#d8d8d8"
LIBRARIES = ("lsce", "jax", "flax", "optax", "torch", "numpy", "scikit-learn")

Probabilities = Float32[np.ndarray, "N K"]
Labels = Int32[np.ndarray, " N"]


class EpochSummary(NamedTuple):
    """One row of the table of a training."""

    jax_loss: float
    torch_loss: float
    largest_difference: float
    jax_accuracy: float
    torch_accuracy: float
    jax_calibration_error: float
    torch_calibration_error: float


@dataclass(frozen=True)
class Run:
    """A finished training in both frameworks.

    Args:
        smoothing: the smoothing of its loss.
        jax_losses, torch_losses: the loss of each step.
        verdict: whether they agree.
        epochs: the summary of each epoch.
        jax_probabilities, torch_probabilities: of the test images, at the end.
        test_labels: of the test images.
    """

    smoothing: float
    jax_losses: Float64[np.ndarray, " steps"]
    torch_losses: Float64[np.ndarray, " steps"]
    verdict: TrajectoryVerdict
    epochs: list[EpochSummary]
    jax_probabilities: Probabilities
    torch_probabilities: Probabilities
    test_labels: Labels

    @property
    def confidence(self) -> float:
        """Mean probability of the predicted class (JAX)."""
        return float(self.jax_probabilities.max(axis=-1).mean())

    @property
    def calibration(self) -> str:
        """Whether the network (JAX) is over- or underconfident."""
        gap = self.confidence - self.epochs[-1].jax_accuracy
        if np.isnan(gap):
            return "no longer a number"
        return f"{'over' if gap > 0 else 'under'}confident by {abs(gap):.3f}"


# --- Calibration ----------------------------------------------------------------------------------------------------


class Bins(NamedTuple):
    """Predictions sorted by their confidence into equally wide bins; mean 0 where a bin is empty."""

    count: Int64[np.ndarray, " bins"]
    confidence: Float64[np.ndarray, " bins"]
    accuracy: Float64[np.ndarray, " bins"]


def confidence_bins(probabilities: Probabilities, labels: Labels, bins: int = BINS) -> Bins:
    """Sort predictions into bins ((b-1)/bins, b/bins] of the probability of the predicted class; NaN fits in none."""
    known = ~np.isnan(probabilities).any(axis=-1)
    probabilities, labels = probabilities[known], labels[known]
    return sort_confidences(probabilities.max(axis=-1), probabilities.argmax(axis=-1) == labels, bins)


def sort_confidences(confidence: Float32[np.ndarray, " N"], correct: Bool[np.ndarray, " N"], bins: int = BINS) -> Bins:
    """Sort predictions into bins as `confidence_bins` does, by their confidences."""
    confidence = confidence.astype(np.float64)
    # Softmax in float32 may sum to a little more than 1.
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    members = np.maximum(count, 1)
    return Bins(
        count,
        np.bincount(place, weights=confidence, minlength=bins) / members,
        np.bincount(place, weights=correct, minlength=bins) / members,
    )


def expected_calibration_error(probabilities: Probabilities, labels: Labels, bins: int = BINS) -> float:
    """Return the expected calibration error (ECE): sum over bins of (share of predictions) |accuracy - confidence|.

    Predictions are sorted by the probability of the predicted class into 15 bins of equal width; 0 means that a
    fraction c of the predictions with confidence c is right. With the roughly 600 test images here most bins hold a
    handful of predictions, so the ECE of a perfectly calibrated network would still be around 0.01. NaN if a
    probability is NaN.

    References:
        Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 3.

    Example: four predictions with confidence 0.9, of which three are right.
        >>> probabilities = np.array([[0.9, 0.1]] * 4, np.float32)
        >>> round(expected_calibration_error(probabilities, np.array([0, 0, 0, 1], np.int32)), 4)
        0.15
    """
    if np.isnan(probabilities).any():
        return np.nan
    count, confidence, right = confidence_bins(probabilities, labels, bins)
    return float(np.sum(count * np.abs(right - confidence)) / count.sum())


def accuracy(probabilities: Probabilities, labels: Labels) -> float:
    """Return the fraction of predictions that are right."""
    return float(np.mean(probabilities.argmax(axis=-1) == labels))


# --- Words and tables -----------------------------------------------------------------------------------------------


def verdict_line(runs: list[Run]) -> str:
    """Return whether the trainings agree, in one line."""
    failed = [run for run in runs if not run.verdict.agrees]
    steps = f"{len(runs)} x {len(runs[0].jax_losses)} steps"
    if not failed:
        share = max(run.verdict.largest_share for run in runs)
        return f"AGREE: at most {share:.2f} of the allowed difference, over {steps}{_blind(runs)}"
    run = failed[0]
    step = run.verdict.first_divergence
    return (
        f"DISAGREE from step {step} (smoothing {run.smoothing:g}): difference {run.verdict.difference[step]:.1e}, "
        f"allowed {run.verdict.allowed[step]:.1e}"
    )


def _blind(runs: list[Run]) -> str:
    """Return a clause on the step after which one ulp changes the training visibly, so that agreement means little."""
    parts = [
        f"{run.verdict.blind_from} (smoothing {run.smoothing:g})" for run in runs if run.verdict.blind_from is not None
    ]
    return f"; chaotic, so no evidence, from step {', '.join(parts)}" if parts else ""


EPOCH_HEADINGS = ("epoch", "loss JAX", "loss torch", "max diff", "acc JAX", "acc torch", "ECE JAX", "ECE torch")
RUN_HEADINGS = ("smoothing", "accuracy", "confidence", "ECE", "max diff", "envelope", "share", "verdict")


def epoch_rows(run: Run) -> list[tuple[str, ...]]:
    """Return the cells of the table of a training."""
    formats = ("{:.4f}", "{:.4f}", "{:.1e}", "{:.3f}", "{:.3f}", "{:.3f}", "{:.3f}")
    return [
        (str(number), *(form.format(value) for form, value in zip(formats, epoch, strict=True)))
        for number, epoch in enumerate(run.epochs, start=1)
    ]


def run_rows(runs: list[Run]) -> list[tuple[str, ...]]:
    """Return the cells of the table that compares the trainings; figures that both frameworks have are those of JAX."""
    return [
        (
            f"{run.smoothing:g}",
            f"{run.epochs[-1].jax_accuracy:.3f}",
            f"{run.confidence:.3f}",
            f"{run.epochs[-1].jax_calibration_error:.3f}",
            f"{run.verdict.difference.max():.1e}",
            f"{run.verdict.envelope.max():.1e}",
            f"{run.verdict.largest_share:.2f}",
            "agree" if run.verdict.agrees else "disagree",
        )
        for run in runs
    ]


def calibration_sentences(runs: list[Run]) -> list[str]:
    """Return sentences on calibration, made from the numbers."""
    sentences = [
        f"Smoothing {run.smoothing:g}: mean confidence {run.confidence:.3f}, accuracy "
        f"{run.epochs[-1].jax_accuracy:.3f}: {run.calibration}, ECE {run.epochs[-1].jax_calibration_error:.3f}."
        for run in runs
    ]
    if len(runs) == 2:
        plain, smoothed = (run.epochs[-1].jax_calibration_error for run in runs)
        change = "raises" if smoothed > plain else "lowers"
        sentence = f"Here label smoothing {change} the calibration error, from {plain:.3f} to {smoothed:.3f}."
        if smoothed > plain and runs[1].confidence < runs[1].epochs[-1].jax_accuracy:
            sentence += (
                " The smoothed target asks the network never to be sure, and on digits this easy it is right more "
                "often than it may claim. Where a network is overconfident, the same pull lowers the error."
            )
        sentences.append(sentence)
    return sentences


def print_tables(runs: list[Run], console: Console) -> None:
    """Print a table for each training and one that compares them."""
    for run in runs:
        console.print()
        console.print(_table(f"Smoothing {run.smoothing:g}", EPOCH_HEADINGS, epoch_rows(run)))
    console.print()
    console.print(_table("Comparison", RUN_HEADINGS, run_rows(runs)))
    console.print()
    for sentence in calibration_sentences(runs):
        console.print(sentence, highlight=False)
    console.print()


def _table(title: str, headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


# --- Plots ----------------------------------------------------------------------------------------------------------


def draw_losses(axes: Axes, run: Run) -> None:
    """Draw the loss of each step, torch on top of JAX."""
    axes.plot(run.jax_losses, color=JAX_COLOUR, linewidth=5, label="JAX")
    axes.plot(run.torch_losses, color=TORCH_COLOUR, linewidth=1.2, linestyle=(0, (4, 3)), label="torch")
    axes.set(title=f"Training loss, smoothing {run.smoothing:g}", xlabel="step", ylabel="loss", ylim=(0, None))
    axes.legend(frameon=False)


def draw_difference(axes: Axes, run: Run) -> None:
    """Draw the difference of each step, and the difference that rounding explains."""
    verdict = run.verdict
    steps = np.arange(len(verdict.difference))
    # A difference of exactly 0 has no place on a logarithmic axis: such steps are left out.
    shown = verdict.difference > 0
    axes.plot(steps, verdict.allowed, color="black", linewidth=1.5, label="allowed")
    axes.plot(steps, verdict.envelope, color=JAX_COLOUR, linewidth=3, label="envelope of replicas")
    axes.plot(steps[shown], verdict.difference[shown], ".", color=TORCH_COLOUR, markersize=3, label="|JAX - torch|")
    axes.set(title=f"Difference, smoothing {run.smoothing:g}", xlabel="step", ylabel="loss")
    # If the loss is 0 throughout, a logarithmic axis has nothing to show.
    if np.any(verdict.allowed > 0):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.35)
    axes.legend(frameon=False, loc="upper right", markerscale=3)


def draw_reliability(axes: Axes, run: Run) -> None:
    """Draw the accuracy of predictions by their confidence (JAX), and the share of predictions of each confidence."""
    count, confidence, right = confidence_bins(run.jax_probabilities, run.test_labels)
    filled = count > 0
    edges = np.arange(BINS) / BINS
    share = count / max(count.sum(), 1)
    axes.bar(edges, share, 1 / BINS, align="edge", color=LIGHT, label="share of predictions")
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="calibrated")
    # The area of a dot is its share of predictions, so that the noise of a few does not catch the eye.
    area = 20 + 150 * share[filled]
    axes.plot(confidence[filled], right[filled], color=TORCH_COLOUR, linewidth=0.8, alpha=0.6)
    axes.scatter(confidence[filled], right[filled], area, color=TORCH_COLOUR, label="accuracy", clip_on=False)
    error = run.epochs[-1].jax_calibration_error
    axes.set(
        title=f"Reliability, smoothing {run.smoothing:g} (ECE {error:.3f})",
        xlabel="confidence",
        ylabel="fraction",
        xlim=(0, 1.02),
        ylim=(0, 1.05),
    )
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, columnspacing=1)


PANELS: tuple[Callable[[Axes, Run], None], ...] = (draw_losses, draw_difference, draw_reliability)


def combined_figure(runs: list[Run]) -> Figure:
    """Return all plots in one figure, a row for each training."""
    figure = Figure(figsize=(16, 4.6 * len(runs)), layout="constrained")
    for row, run in zip(figure.subplots(len(runs), len(PANELS), squeeze=False), runs, strict=True):
        for axes, draw in zip(row, PANELS, strict=True):
            draw(axes, run)
            tidy(axes)
    return figure


def single_figure(draw: Callable[[Axes, Run], None], run: Run) -> Figure:
    """Return one plot, with text that is legible on a phone."""
    figure = Figure(figsize=(5.4, 4), layout="constrained")
    axes = figure.subplots()
    draw(axes, run)
    tidy(axes)
    return figure


def tidy(axes: Axes) -> None:
    """Remove what a plot does not need, and make its text legible on a phone."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=11)
    axes.title.set_fontsize(13)
    for label in (axes.xaxis.label, axes.yaxis.label, *axes.get_legend().get_texts()):
        label.set_fontsize(11)


def base64_png(figure: Figure, dots_per_inch: int) -> str:
    """Return a figure as a page holds it."""
    return base64.b64encode(png(figure, dots_per_inch)).decode()


def png(figure: Figure, dots_per_inch: int) -> bytes:
    """Return a figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots_per_inch)
    return buffer.getvalue()


# --- The page -------------------------------------------------------------------------------------------------------


def write(runs: list[Run], options: Mapping[str, object], folder: Path) -> list[Path]:
    """Write the web page and the picture, and return their paths."""
    picture = folder / "digits_parity.png"
    picture.write_bytes(png(combined_figure(runs), dots_per_inch=100))
    page = folder / "digits_parity.html"
    page.write_text(render(runs, options), encoding="utf-8")
    return [page, picture]


def render(runs: list[Run], options: Mapping[str, object]) -> str:
    """Return the web page with its images."""
    images = [[base64_png(single_figure(draw, run), dots_per_inch=130) for run in runs] for draw in PANELS]
    return template("digits_report.html.jinja").render(
        runs=runs,
        agrees=all(run.verdict.agrees for run in runs),
        verdict=verdict_line(runs),
        calibration=calibration_sentences(runs),
        epoch_headings=EPOCH_HEADINGS,
        epoch_rows=epoch_rows,
        run_headings=RUN_HEADINGS,
        run_rows=run_rows(runs),
        images=dict(zip(("losses", "difference", "reliability"), images, strict=True)),
        options=options,
        versions=versions(*LIBRARIES),
    )


def template(name: str) -> jinja2.Template:
    """Return a template of this folder. A name that it uses and is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def versions(*libraries: str) -> dict[str, str]:
    """Return the versions of Python and of libraries."""
    return {"Python": platform.python_version()} | {name: version(name) for name in libraries}
