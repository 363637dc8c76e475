"""What train_jax and train_torch have found, on one page, and whether the two trainings agree.

    python -m examples.characters.train_jax
    python -m examples.characters.train_torch
    python -m examples.characters.report

The page shows the hands and their distortions, the curves of both frameworks, accuracy and calibration on the fonts
that are held out, and what was taken for what.

What is claimed: both frameworks compute the same training. The rule of `parity_tests.trainings.trajectory` is applied
to the first steps of each loss: JAX trains as far again, several times, with each initial weight moved by one rounding
step, and the two may differ by twice what these replicas do. The same yardstick is held against the linear loss and the
dense one. To train the replicas to the end would take hours. So how far all losses and the last predictions are apart
is shown beside the metrics, and is no part of the verdict.

Exit code 0: the trainings agree. 1: they do not. 2: bad option.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from jaxtyping import Float64, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from examples.characters import train_jax
from examples.characters.common import (
    CACHE,
    LOSSES,
    METRICS,
    Cache,
    Data,
    Fonts,
    Gnt,
    KeepDamaged,
    Options,
    Predictions,
    Result,
    RunFiles,
    Sources,
    count_variants,
    progress_bar,
    read_data,
    smoothed,
)
from examples.characters.fonts import FOLDER, level_one
from examples.characters.images import Hand, Samples, undistorted
from examples.common import Page, WeightOf, initial_weights, made_folder, new_app, print_written
from examples.digits_report import (
    GREY,
    JAX_COLOUR,
    LIGHT,
    TORCH_COLOUR,
    base64_png,
    sort_confidences,
    template,
    tidy,
    versions,
)
from examples.record_pages import Grid, Picture, write_record
from parity_tests.trainings.stepwise import one_ulp_away
from parity_tests.trainings.trajectory import TrajectoryVerdict, compare_trajectories, rounding_floor

LIBRARIES = ("lsce", "jax", "flax", "optax", "torch", "numpy", "scipy", "pillow")
SHOWN = "永国语警藏龙书爱鼠繁的酬我是中文"  # characters in the picture of the hands, where there are enough
ERRORS = 24


# --- The runs -------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One loss, trained in both frameworks.

    Args:
        loss: its name.
        jax, torch: the files of both runs.
        jax_result, torch_result: what the networks achieve.
    """

    loss: str
    jax: RunFiles
    torch: RunFiles
    jax_result: Result
    torch_result: Result


def read_runs(jax: Path, torch: Path) -> tuple[list[Run], dict[str, Any]]:
    """Return the losses that both folders have, and the options that all runs share.

    Raises:
        typer.BadParameter: there is none, a run is not done, or their options differ.
    """
    runs, shared = [], None
    for loss in LOSSES:
        files = RunFiles(jax / loss), RunFiles(torch / loss)
        if not all(each.options.exists() for each in files):
            continue
        for each in files:
            if each.read_result() is None:
                raise typer.BadParameter(f"the run in {each.folder} is not done. Give its command again.")
            options = json.loads(each.options.read_text())
            own = {name: value for name, value in options.items() if name not in ("program", "loss")}
            shared = shared or own
            if own != shared:
                raise typer.BadParameter(f"{each.folder} has other options than the other runs: {own} and {shared}.")
        runs.append(Run(loss, *files, *(each.read_result() for each in files)))  # type: ignore[arg-type]
    if shared is None:
        raise typer.BadParameter(f"no loss has runs in both {jax} and {torch}. Run train_jax and train_torch first.")
    return runs, shared


# --- The verdict ----------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """Two trainings that should be the same.

    Args:
        name: which they are.
        verdict: on their first steps.
    """

    name: str
    verdict: TrajectoryVerdict


def moved_weights(seed: int, replica: int) -> WeightOf:
    """Return what draws the initial weights, each moved to a neighbour in float32."""
    weight_of, random = initial_weights(seed), np.random.default_rng([seed, replica])
    return lambda *layer: one_ulp_away({"": weight_of(*layer)}, random)[""]


def replica_losses(
    loss: str, data: Data, options: Options, steps: int, replicas: int, on_step: Callable[[], object]
) -> Float64[np.ndarray, "replicas steps"]:
    """Return the first losses of trainings in JAX whose initial weights are moved by one rounding step."""
    losses = np.empty((replicas, steps))
    for replica in range(replicas):
        network = train_jax.Network(options.characters, moved_weights(options.seed, replica))
        optimizer = train_jax.make_optimizer(network, options.steps)
        for step, value in train_jax.train_steps(network, optimizer, loss, data, options, range(steps)):
            losses[replica, step] = value
            on_step()
    return losses


def compare_runs(
    runs: list[Run], data: Data, options: Options, steps: int, replicas: int, console: Console
) -> list[Comparison]:
    """Compare the frameworks for each loss, and the dense with the linear loss in each; show a progress bar.

    How far the replicas stray from their training in JAX is the yardstick in torch, too, and that of the dense loss is
    the yardstick of the linear one.
    """
    losses = {
        (framework, run.loss): np.array(files.read_losses()[:steps])
        for run in runs
        for framework, files in (("JAX", run.jax), ("torch", run.torch))
    }
    steps = len(losses["JAX", runs[0].loss])
    names = [run.loss for run in runs]
    spreads: dict[str, Float64[np.ndarray, "replicas steps"]] = {}
    with progress_bar(console) as progress:
        dense = [name for name in names if name != "linear" or "uniform" not in names]
        task = progress.add_task("replicas", total=len(dense) * replicas * steps)
        for name in dense:
            moved = replica_losses(name, data, options, steps, replicas, lambda: progress.update(task, advance=1))
            spreads[name] = moved - losses["JAX", name]
    if "uniform" in spreads:
        spreads["linear"] = spreads["uniform"]
    pairs = [(f"{name}, JAX and torch", ("JAX", name), ("torch", name), name) for name in names]
    if {"uniform", "linear"} <= {*names}:
        pairs += [
            (f"uniform and linear, {framework}", (framework, "uniform"), (framework, "linear"), "uniform")
            for framework in ("JAX", "torch")
        ]
    return [
        Comparison(
            title,
            compare_trajectories(
                losses[one],
                losses[other],
                losses[one] + spreads[name],
                floor=rounding_floor(losses[one], options.batch_size),
            ),
        )
        for title, one, other, name in pairs
    ]


def verdict_line(comparisons: list[Comparison]) -> str:
    """Return whether all trainings agree, in one line."""
    failed = [each for each in comparisons if not each.verdict.agrees]
    steps = len(comparisons[0].verdict.difference)
    if not failed:
        share = max(each.verdict.largest_share for each in comparisons)
        return f"AGREE: at most {share:.2f} of the allowed difference, in {len(comparisons)} pairs, first {steps} steps"
    name, verdict = failed[0]
    step = verdict.first_divergence
    difference, allowed = verdict.difference[step], verdict.allowed[step]
    return f"DISAGREE from step {step} ({name}): difference {difference:.1e}, allowed {allowed:.1e}"


# --- Tables ---------------------------------------------------------------------------------------------------------

COMPARISON_HEADINGS = ("pair", "largest difference", "envelope", "share", "verdict")


def comparison_rows(comparisons: list[Comparison]) -> list[tuple[str, ...]]:
    """Return the cells of the table of the verdicts."""
    return [
        (
            name,
            f"{verdict.difference.max():.1e}",
            f"{verdict.envelope.max():.1e}",
            f"{verdict.largest_share:.2f}",
            ("agree" if verdict.agrees else "disagree")
            + ("" if verdict.blind_from is None else f", chaotic from step {verdict.blind_from}"),
        )
        for name, verdict in comparisons
    ]


def metric_headings() -> tuple[str, ...]:
    """Return the headings of the table of metrics."""
    return ("loss", *(f"{title}, {framework}" for title in METRICS.values() for framework in ("JAX", "torch")))


def metric_rows(runs: list[Run], test: str) -> list[tuple[str, ...]]:
    """Return the cells of the table of metrics of one kind of test."""
    return [
        (
            run.loss,
            *(
                f"{result.metrics[test][metric]:.4f}"
                for metric in METRICS
                for result in (run.jax_result, run.torch_result)
            ),
        )
        for run in runs
    ]


WHOLE_HEADINGS = (
    "loss",
    "losses of all steps differ by at most",
    "predictions that differ",
    "their confidences by at most",
)


def whole_rows(runs: list[Run], test: str) -> list[tuple[str, ...]]:
    """Return the cells of the table of how far the whole trainings are apart."""
    rows = []
    for run in runs:
        losses = np.abs(np.subtract(run.jax.read_losses(), run.torch.read_losses()))
        one, other = run.jax.read_predictions(test), run.torch.read_predictions(test)
        differ = np.count_nonzero(one.prediction != other.prediction)
        confidences = np.abs(one.confidence.astype(np.float64) - other.confidence)
        rows.append((run.loss, f"{losses.max():.1e}", f"{differ} of {len(one.prediction)}", f"{confidences.max():.1e}"))
    return rows


def hand_rows(runs: list[Run], test: str) -> list[tuple[str, ...]]:
    """Return the cells of the table of accuracies by hand, those of both frameworks in each."""
    return [
        (
            hand,
            *(f"{run.jax_result.by_hand[test][hand]:.3f} {run.torch_result.by_hand[test][hand]:.3f}" for run in runs),
        )
        for hand in runs[0].jax_result.by_hand[test]
    ]


def print_tables(runs: list[Run], comparisons: list[Comparison], console: Console) -> None:
    """Print metrics and verdicts."""
    for test in runs[0].jax_result.metrics:
        table = Table("loss", *METRICS.values(), title=f"{test}: JAX, torch")
        for run in runs:
            pairs = ((run.jax_result.metrics[test][name], run.torch_result.metrics[test][name]) for name in METRICS)
            table.add_row(run.loss, *(f"{one:.4f} {other:.4f}" for one, other in pairs))
        console.print(table)
        console.print(Grid(f"{test}: the whole trainings", WHOLE_HEADINGS, whole_rows(runs, test)).for_terminal())
    title = f"The first {len(comparisons[0].verdict.difference)} steps"
    console.print(Grid(title, COMPARISON_HEADINGS, comparison_rows(comparisons)).for_terminal())


# --- Pictures of characters -----------------------------------------------------------------------------------------


def mosaic(rows: Sequence[Sequence[np.ndarray]], gap: int = 4) -> UInt8[np.ndarray, "height width"]:
    """Return pictures of one size in rows and columns, dark on light, 0 for ink."""
    size = len(rows[0][0]) + gap
    canvas = np.full((size * len(rows), size * max(map(len, rows))), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            canvas[y * size : y * size + size - gap, x * size : x * size + size - gap] = 255 - picture
    return canvas


def draw_mosaic(rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str], inch: float) -> Figure:
    """Return a figure of pictures in rows, each with a label.

    Args:
        rows: the pictures.
        labels: of the rows.
        inch: the side of a picture.
    """
    width, height = max(map(len, rows)) * inch, len(rows) * inch
    margin = 0.2 + 0.08 * max(map(len, labels))
    figure = Figure(figsize=(width + margin, height))
    axes = figure.add_axes((margin / (width + margin), 0, width / (width + margin), 1))
    image = mosaic(rows)
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_yticks((np.arange(len(rows)) + 0.5) * len(image) / len(rows), labels, fontsize=10)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def draw_hands(data: Data) -> Figure:
    """Return a picture with a row of characters for each font or writer. The last rows are the ones held out."""
    held_out = [hand for samples in data.tests.values() for hand in samples.hands]
    hands = [*data.train.hands[:16], *held_out[:8]]
    rows = [[*undistorted(hand.fields[places_of(SHOWN, hand)])] for hand in hands]
    labels = [f"{hand.name}: {hand.style}{', held out' if hand.held_out else ''}" for hand in hands]
    return draw_mosaic(rows, labels, 0.58)


def places_of(characters: str, hand: Hand) -> np.ndarray:
    """Return where a hand has some characters, or as many of its first ones if it lacks one."""
    place = {label: number for number, label in enumerate(hand.labels)}
    wanted = [level_one().index(character) for character in characters]
    if all(label in place for label in wanted):
        return np.array([place[label] for label in wanted])
    return np.arange(min(len(characters), len(hand.labels)))


def draw_distortions(data: Data, options: Options) -> Figure:
    """Return a picture of one character in each row: as drawn, and as the passes over the hands see it."""
    hands = data.train.hands[::2][:8]
    variants = range(min(8, count_variants(data, options)))
    rows = []
    for number, hand in enumerate(hands):
        place = (97 * number) % len(hand.labels)
        seen = [enlarged(data.train.pictures(hand, variant)[place]) for variant in variants]
        rows.append([enlarged(undistorted(hand.fields[place : place + 1])[0]), *seen])
    return draw_mosaic(rows, [f"{hand.name}: {hand.style}" for hand in hands], 0.8)


def enlarged(picture: np.ndarray, side: int = 96) -> np.ndarray:
    """Return a picture with each pixel repeated, so that pictures of both sizes have the same."""
    return picture.repeat(side // len(picture), 0).repeat(side // len(picture), 1)


class Confusion(NamedTuple):
    """A character that was misread.

    Args:
        row: among the samples.
        label: what it is.
        prediction: what it was taken for.
        confidence: of that.
    """

    row: int
    label: int
    prediction: int
    confidence: float


def surest_errors(predictions: Predictions, number: int) -> list[Confusion]:
    """Return the errors that the network was surest of."""
    wrong = np.flatnonzero(~predictions.correct)
    order = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:number]
    return [
        Confusion(
            int(row),
            int(predictions.labels[row]),
            int(predictions.prediction[row]),
            float(predictions.confidence[row]),
        )
        for row in order
    ]


def draw_errors(samples: Samples, reference: Hand, errors: list[Confusion]) -> Figure:
    """Return pictures of errors in threes: as seen, what it is, and what it was taken for, in another hand."""
    number = 4
    figure = Figure(figsize=(3 * number, 1.25 * -(-len(errors) // number) + 0.2), layout="constrained")
    grid = figure.subplots(-(-len(errors) // number), number, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    place = {label: index for index, label in enumerate(reference.labels)}
    for axes, error in zip(grid.flat, errors, strict=False):
        pictures, _ = samples.batch(np.array([error.row]), 0)
        drawn = undistorted(reference.fields[[place[error.label], place[error.prediction]]])
        seen = np.rint(255 * pictures[0]).astype(np.uint8)
        axes.imshow(mosaic([[enlarged(seen), *map(enlarged, drawn)]], 12), cmap="gray", vmin=0, vmax=255)
        hand = samples.hands[int(samples.hand_of(np.array([error.row]))[0])].name
        axes.set_title(f"{error.confidence:.2f}, {hand}", fontsize=9)
    return figure


def frequent_confusions(predictions: Predictions, number: int) -> list[tuple[str, str, str]]:
    """Return the most frequent errors: what it is, what it was taken for, how often."""
    wrong = ~predictions.correct
    pairs = Counter(zip(predictions.labels[wrong].tolist(), predictions.prediction[wrong].tolist(), strict=True))
    order = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:number]
    return [(level_one()[label], level_one()[taken], str(count)) for (label, taken), count in order]


# --- Plots ----------------------------------------------------------------------------------------------------------


def panels(number: int) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels, three in a row."""
    rows = -(-number // 3)
    figure = Figure(figsize=(15, 4 * rows), layout="constrained")
    grid = [*figure.subplots(rows, 3, squeeze=False).flat]
    for axes in grid[number:]:
        axes.set_axis_off()
    return figure, grid[:number]


def draw_curves(runs: list[Run]) -> Figure:
    """Return the training losses of both frameworks, torch on top of JAX, with a mean over a few steps."""
    figure, grid = panels(len(runs))
    for axes, run in zip(grid, runs, strict=True):
        losses = run.jax.read_losses(), run.torch.read_losses()
        width = len(losses[0]) // 100
        axes.plot(*smoothed(losses[0], width), color=JAX_COLOUR, linewidth=5, label="JAX")
        axes.plot(*smoothed(losses[1], width), color=TORCH_COLOUR, linewidth=1.2, linestyle=(0, (4, 3)), label="torch")
        axes.set(title=f"{run.loss}: {LOSSES[run.loss]}", xlabel="step", ylabel="loss", ylim=(0, None))
        axes.legend(frameon=False)
        tidy(axes)
    return figure


def draw_differences(comparisons: list[Comparison]) -> Figure:
    """Return the difference of each pair at each of the first steps, and what is allowed."""
    figure, grid = panels(len(comparisons))
    for axes, (name, verdict) in zip(grid, comparisons, strict=True):
        steps = np.arange(len(verdict.difference))
        shown = verdict.difference > 0  # 0 has no place on a logarithmic axis
        axes.semilogy(steps, verdict.allowed, color="black", linewidth=1.5, label="allowed")
        axes.semilogy(steps, verdict.envelope, color=JAX_COLOUR, linewidth=3, label="envelope of replicas")
        axes.semilogy(steps[shown], verdict.difference[shown], ".", color=TORCH_COLOUR, label="difference")
        axes.set(title=name, xlabel="step", ylabel="loss")
        axes.legend(frameon=False, loc="lower right")
        tidy(axes)
    return figure


def draw_reliability(runs: list[Run], test: str) -> Figure:
    """Return the accuracy of predictions by their confidence, of both frameworks."""
    figure, grid = panels(len(runs))
    for axes, run in zip(grid, runs, strict=True):
        for files, line in (
            (run.jax, {"color": JAX_COLOUR, "linewidth": 5, "label": "JAX"}),
            (run.torch, {"color": TORCH_COLOUR, "linewidth": 1.2, "marker": ".", "label": "torch"}),
        ):
            said = files.read_predictions(test)
            bins = sort_confidences(said.confidence, said.correct)
            filled = bins.count > 0
            if files is run.jax:
                edges = np.arange(len(filled)) / len(filled)
                share = bins.count / bins.count.sum()
                axes.bar(edges, share, 1 / len(filled), align="edge", color=LIGHT, label="share of predictions")
            axes.plot(bins.confidence[filled], bins.accuracy[filled], **line)
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=":")
        error = run.jax_result.metrics[test]["calibration_error"]
        axes.set(title=f"{run.loss} (ECE {error:.3f})", xlabel="confidence", ylabel="accuracy", ylim=(0, 1.02))
        axes.legend(frameon=False, loc="upper left")
        tidy(axes)
    return figure


# --- The page -------------------------------------------------------------------------------------------------------


def draw_all(runs: list[Run], comparisons: list[Comparison], data: Data, options: Options) -> dict[str, Figure]:
    """Return the pictures of the page, by name."""
    figures = {
        "hands": draw_hands(data),
        "distortions": draw_distortions(data, options),
        "curves": draw_curves(runs),
        "differences": draw_differences(comparisons),
    }
    run = runs[-1]
    for test, samples in data.tests.items():
        name = test.replace(" ", "_")
        figures[f"reliability_{name}"] = draw_reliability(runs, test)
        errors = surest_errors(run.jax.read_predictions(test), ERRORS)
        if errors:
            figures[f"errors_{name}"] = draw_errors(samples, data.train.hands[0], errors)
    return figures


def write(
    runs: list[Run], comparisons: list[Comparison], data: Data, options: Options, shared: dict[str, Any], folder: Path
) -> list[Path]:
    """Write the pictures and the page that holds them, and return their paths."""
    figures = draw_all(runs, comparisons, data, options)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=90)
    page = folder / "characters.html"
    tests = list(data.tests)
    page.write_text(
        template("characters/report.html.jinja").render(
            agrees=all(each.verdict.agrees for each in comparisons),
            verdict=verdict_line(comparisons),
            options=shared,
            train=data.train,
            tests=data.tests,
            losses={run.loss: LOSSES[run.loss] for run in runs},
            metric_headings=metric_headings(),
            metric_rows={test: metric_rows(runs, test) for test in tests},
            whole_headings=WHOLE_HEADINGS,
            whole_rows={test: whole_rows(runs, test) for test in tests},
            hand_headings=("accuracy, JAX and torch", *(run.loss for run in runs)),
            hand_rows={test: hand_rows(runs, test) for test in tests},
            comparison_headings=COMPARISON_HEADINGS,
            comparison_rows=comparison_rows(comparisons),
            steps=len(comparisons[0].verdict.difference),
            misread=runs[-1].loss,
            confusions={test: frequent_confusions(runs[-1].jax.read_predictions(test), 12) for test in tests},
            images={name: base64_png(figure, dots_per_inch=90) for name, figure in figures.items()},
            versions=versions(*LIBRARIES),
        ),
        encoding="utf-8",
    )
    return [page, *paths]


PICTURES = {
    "curves": "Training loss of both frameworks, for each loss",
    "differences": "Differences between trainings, and what is allowed",
    "reliability": "Accuracy of predictions by their confidence, in both frameworks",
    "errors": "Misread characters: the picture, what it is, and what it was taken for",
}


def write_page(
    page: Path, runs: list[Run], comparisons: list[Comparison], shared: dict[str, Any], folder: Path
) -> None:
    """Write the tables, and the pictures that a folder has, into a page of the documentation."""
    parts: list[Grid | Picture | str] = []
    for test in runs[0].jax_result.metrics:
        title = f"Characters of {test}, after {shared['steps']} steps of {shared['batch_size']} pictures"
        parts.append(Grid(title, metric_headings(), metric_rows(runs, test)))
        hands = Grid("Accuracy in JAX and in torch", ("", *(run.loss for run in runs)), hand_rows(runs, test))
        parts.append(hands)
        parts.append(Grid("The whole trainings, in JAX and in torch", WHOLE_HEADINGS, whole_rows(runs, test)))
    steps = len(comparisons[0].verdict.difference)
    parts.append(Grid(f"The first {steps} steps", COMPARISON_HEADINGS, comparison_rows(comparisons)))
    parts.append(f"The verdict: `{verdict_line(comparisons)}`.")
    for path in sorted(folder.glob("*.png")):
        kind = path.stem.partition("_")[0]
        if kind in PICTURES:
            parts.append(Picture(path, f"hanzi_{path.name}", PICTURES[kind]))
    write_record(page, "examples.characters.report", f"--page {page}", LIBRARIES, parts)


# --- The command line -----------------------------------------------------------------------------------------------

app = new_app()


@app.command()
def main(  # noqa: PLR0913, PLR0917 - the options of the command line
    jax: Annotated[Path, typer.Option(help="Folder of the runs in JAX.")] = Path("out/characters/jax"),
    torch: Annotated[Path, typer.Option(help="Folder of the runs in torch.")] = Path("out/characters/torch"),
    steps: Annotated[int, typer.Option(min=1, help="First steps that are compared.")] = 48,
    replicas: Annotated[int, typer.Option(min=1, help="Trainings with moved weights, for each loss.")] = 4,
    fonts: Fonts = FOLDER,
    gnt: Gnt = None,
    keep_damaged: KeepDamaged = False,
    cache: Cache = CACHE,
    output: Annotated[Path, typer.Option(callback=made_folder, help="Folder for page and pictures.")] = Path(
        "out/characters/report"
    ),
    page: Page = None,
) -> None:
    """Put what train_jax and train_torch have found on one page, and say whether the two trainings agree.

    Exit code 0: they agree. 1: they do not. 2: bad option.
    """
    console = Console()
    runs, shared = read_runs(jax, torch)
    losses = tuple(run.loss for run in runs)
    options = Options(losses, *(shared[name] for name in Options._fields[1:-1]))
    data = read_data(Sources(fonts, gnt, keep_damaged, cache), options, console)
    if data.fingerprint != shared["data"]:
        raise typer.BadParameter("the runs were made with other fonts or writers. Name the same --fonts and --gnt.")
    comparisons = compare_runs(runs, data, options, steps, replicas, console)
    print_tables(runs, comparisons, console)
    print_written(console, *write(runs, comparisons, data, options, shared, output))
    if page is not None:
        write_page(page, runs, comparisons, shared, output)
        print_written(console, page)
    console.print(verdict_line(comparisons), soft_wrap=True, highlight=False)
    if not all(each.verdict.agrees for each in comparisons):
        raise typer.Exit(code=1)


if __name__ == "__main__":
    app()
