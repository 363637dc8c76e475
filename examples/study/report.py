"""The tables and plots of the study of smoothing: paired differences, and the planes of Müller et al. 2019."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from examples.distillation_common import TEMPERATURES
from examples.record_pages import Grid, Picture, write_record
from examples.study.measures import Difference, holm, paired

LEVEL = 0.05
MODULE = "examples.study.train"
LIBRARIES = ("lsce", "jax", "flax", "optax", "numpy", "scipy")
Line = dict[str, Any]  # what fixes a training, and what was measured of its network


class Setting(NamedTuple):
    """How the labels are smoothed."""

    convention: str
    smoothing: float

    def __str__(self) -> str:
        """Return what the tables call it."""
        return f"{self.convention} {self.smoothing:g}" if self.smoothing else "none"


NONE, USUAL = Setting("uniform", 0.0), Setting("uniform", 0.1)
DRAWN = (NONE, USUAL)


class Measure(NamedTuple):
    """How a measure is shown. `more_is_better` is None for measures that are neither good nor bad."""

    title: str
    decimals: int
    more_is_better: bool | None


MEASURES = {
    "accuracy": Measure("accuracy", 4, True),
    "nll": Measure("nll", 4, False),
    "calibration_error": Measure("calibration error", 4, False),
    "temperature": Measure("fitted temperature", 2, None),
    "scaled_nll": Measure("nll at that temperature", 4, False),
    "scaled_calibration_error": Measure("calibration error at it", 4, False),
    "train_spread": Measure("spread, training", 3, None),
    "test_spread": Measure("spread, test", 3, None),
}
JUDGED = [name for name, measure in MEASURES.items() if measure.more_is_better is not None]


# --- Tables ---------------------------------------------------------------------------------------------------------


class Compared(NamedTuple):
    """The measures of a task: those without smoothing, and how those of each setting differ from them."""

    baseline: dict[str, list[float]]  # of each measure, one value for each seed
    differences: dict[str, dict[Setting, Difference]]
    shown: dict[str, dict[Setting, bool]]  # whether a difference is shown, corrected for the number of settings


def compare(lines: Sequence[Line]) -> Compared:
    """Compare the settings of one task with no smoothing, seed by seed."""
    by_setting: dict[Setting, list[Line]] = {}
    for line in sorted(lines, key=lambda line: line["seed"]):
        by_setting.setdefault(Setting(line["convention"], line["smoothing"]), []).append(line)
    baseline = by_setting.pop(NONE)
    found = Compared({}, {}, {})
    for name in filter(baseline[0].__contains__, MEASURES):
        found.baseline[name] = [line[name] for line in baseline]
        differences = {
            setting: paired([line[name] for line in own], found.baseline[name]) for setting, own in by_setting.items()
        }
        corrected = holm({setting: difference.p for setting, difference in differences.items()})
        found.differences[name] = differences
        found.shown[name] = {setting: corrected[setting] < LEVEL for setting in differences}
    return found


def table_of(title: str, compared: Compared, names: Sequence[str]) -> Grid:
    """Return some measures of a task: means without smoothing, then differences with the half of their interval."""
    names = [name for name in names if name in compared.baseline]
    rows = [[str(NONE), *(f"{np.mean(compared.baseline[name]):.{MEASURES[name].decimals}f}" for name in names)]]
    rows += [
        [str(setting), *(cell(compared, name, setting) for name in names)] for setting in compared.differences[names[0]]
    ]
    return Grid(title, ["smoothing", *(MEASURES[name].title for name in names)], rows)


def cell(compared: Compared, name: str, setting: Setting) -> str:
    """Return a difference, with a star if it is shown."""
    difference, decimals = compared.differences[name][setting], MEASURES[name].decimals
    half = (difference.high - difference.low) / 2
    star = " *" if compared.shown[name][setting] else ""
    return f"{difference.mean:+.{decimals}f} ± {half:.{decimals}f}{star}"


def judge(compared: Compared, name: str, setting: Setting = USUAL) -> str:
    """Return whether a setting is better or worse than no smoothing, or that no difference is shown."""
    if not compared.shown[name][setting]:
        return "not shown"
    return "better" if (compared.differences[name][setting].mean > 0) == MEASURES[name].more_is_better else "worse"


def distillation_table(lines: Sequence[Line]) -> Grid:
    """Return how the students of the two teachers do, by temperature."""

    def accuracies(smoothing: float, temperature: int, role: str = "student") -> list[float]:
        wanted = (role, smoothing, temperature)
        return [
            network["accuracy"]
            for line in sorted(lines, key=lambda line: line["seed"])
            for network in line["networks"]
            if (network["role"], network["smoothing"], network["temperature"]) == wanted
        ]

    pairs = [("the teacher itself", 0, "teacher"), *((f"student, T = {t}", t, "student") for t in TEMPERATURES)]
    compared = {
        name: (accuracies(0.0, temperature, role), accuracies(0.1, temperature, role))
        for name, temperature, role in pairs
    }
    differences = {name: paired(smoothed, plain) for name, (plain, smoothed) in compared.items()}
    corrected = holm({name: difference.p for name, difference in differences.items()})
    rows = []
    for name, difference in differences.items():
        half, star = (difference.high - difference.low) / 2, " *" if corrected[name] < LEVEL else ""
        plain = f"{np.mean(compared[name][0]):.4f}"
        rows.append([name, plain, f"{difference.mean:+.4f} ± {half:.4f}{star}"])
    alone = accuracies(0.0, 0)
    rows.append(["student of labels", f"{np.mean(alone):.4f}", ""])
    title = "Accuracy of teachers on test digits, and of students that see 120 digits"
    return Grid(title, ["network", "teacher without smoothing", "teacher with smoothing 0.1"], rows)


class Report(NamedTuple):
    """All tables."""

    grids: list[Grid]

    @property
    def tables(self) -> list[Table]:
        """Return them for a terminal."""
        return [grid.for_terminal() for grid in self.grids]


PARTS = (
    ("", ("accuracy", "nll", "calibration_error")),
    (", with the temperature fitted", ("temperature", "scaled_nll", "scaled_calibration_error")),
    (", spread of the features within the classes", ("train_spread", "test_spread")),
)


def make_report(lines: Sequence[Line], titles: Mapping[str, str]) -> Report:
    """Return the tables of all tasks.

    Args:
        lines: of all trainings.
        titles: of the tasks, by name.
    """
    compared = {name: compare([line for line in lines if line["task"] == name]) for name in titles}
    seeds = len({line["seed"] for line in lines})
    verdicts = [[titles[name], *(judge(compared[name], measure) for measure in JUDGED)] for name in titles]
    header = ["task", *(MEASURES[name].title for name in JUDGED)]
    grids = [Grid(f"Uniform smoothing of 0.1 against none, {seeds} seeds", header, verdicts)]
    for name, title in titles.items():
        for part, names in PARTS:
            if names[0] in compared[name].baseline:
                grids.append(table_of(title + part, compared[name], names))
    grids.append(distillation_table([line for line in lines if line["task"] == "distillation"]))
    return Report(grids)


def write_page(page: Path, seeds: int, report: Report, pictures: Sequence[Picture]) -> None:
    """Write tables and plots into a page, between the comments that name the study."""
    write_record(page, MODULE, f"--seeds {seeds} --page {page}", LIBRARIES, [*report.grids, *pictures])


# --- Plots ----------------------------------------------------------------------------------------------------------


class DrawnTask(Protocol):
    """What the plots need of a task."""

    @property
    def title(self) -> str:
        """The title in tables and plots."""

    @property
    def steps(self) -> int:
        """How many steps its networks are trained for."""

    @property
    def clustered(self) -> bool:
        """Whether a plane of its features was written."""

    @property
    def names(self) -> tuple[str, str, str]:
        """The classes in the plane."""

    @property
    def drawn(self) -> tuple[int, int, int]:
        """Their numbers."""


def planes_file(folder: Path, name: str, steps: int, setting: Setting) -> Path:
    """Return the file with the features of a task's classes in a plane. The quick study has other steps, and files."""
    return folder / f"{name}-{steps}-{setting.smoothing:g}.npz"


def draw(lines: Sequence[Line], tasks: Mapping[str, DrawnTask], folder: Path) -> list[Picture]:
    """Draw all plots into a folder, and return them."""
    pictures = []
    for name, task in tasks.items():
        path = folder / f"{name}-strength.png"
        draw_strengths([line for line in lines if line["task"] == name], task.title, path)
        text = f"{task.title}: accuracy, nll and calibration error by the strength of smoothing"
        pictures.append(Picture(path, f"study_{path.name}", text))
        if task.clustered:
            path = folder / f"{name}-planes.png"
            draw_planes(task, folder, name, path)
            text = f"{task.title}: features of three classes, without and with smoothing"
            pictures.append(Picture(path, f"study_{path.name}", text))
    return pictures


def draw_strengths(lines: Sequence[Line], title: str, picture: Path) -> None:
    """Draw what was measured by the strength of uniform smoothing: a dot for each seed, a line for their means."""
    uniform = [line for line in lines if line["convention"] == "uniform"]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    draw_measure(panels[0], uniform, {"accuracy": "accuracy"})
    for axes, name in ((panels[1], "nll"), (panels[2], "calibration_error")):
        draw_measure(axes, uniform, {name: "as trained", f"scaled_{name}": "temperature fitted"})
        axes.legend()
    for axes, name in zip(panels, ("accuracy", "nll", "calibration_error"), strict=True):
        axes.set(title=MEASURES[name].title, xlabel="smoothing")
    figure.suptitle(title)
    figure.savefig(picture, dpi=100)


def draw_measure(axes: Axes, lines: Sequence[Line], names: Mapping[str, str]) -> None:
    """Draw measures, which have labels, by strength."""
    strengths = sorted({line["smoothing"] for line in lines})
    for name, label in names.items():
        values = [[line[name] for line in lines if line["smoothing"] == strength] for strength in strengths]
        (curve,) = axes.plot(strengths, [np.mean(of_seeds) for of_seeds in values], label=label)
        for strength, of_seeds in zip(strengths, values, strict=True):
            axes.plot([strength] * len(of_seeds), of_seeds, ".", color=curve.get_color(), alpha=0.5)


def draw_planes(task: DrawnTask, folder: Path, name: str, picture: Path) -> None:
    """Draw the features of three classes in the plane through their weights, without and with smoothing."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    for row, setting in zip(figure.subplots(2, 2), DRAWN, strict=True):
        with np.load(planes_file(folder, name, task.steps, setting)) as found:
            for axes, part in zip(row, ("train", "test"), strict=True):
                points, labels = found[f"{part}_points"], found[f"{part}_labels"]
                for number, label in zip(task.drawn, task.names, strict=True):
                    axes.plot(*points[labels == number].T, ".", markersize=4, label=label)
                axes.set(title=f"{'training' if part == 'train' else part}, smoothing: {setting}", xticks=[], yticks=[])
                axes.set_aspect("equal", adjustable="datalim")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"{task.title}: features in the plane through the weights of three classes")
    figure.savefig(picture, dpi=100)
