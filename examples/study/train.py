"""Does label smoothing help? Five tasks, several strengths, conventions and seeds, and what their differences show.

    make fonts && .venv/bin/python -m examples.study.train

trains every network with every seed, and writes what was measured of each as one line to the output folder. Stopped at
any time, it goes on with the next network when the same command is given again. Then it compares each setting with no
smoothing, seed by seed, prints the tables, and draws the plots of docs/does-it-help.md.

A seed fixes the starting weights, the batches and the split of the data. So two settings differ in the loss alone, and
the differences are paired. The tasks are in tasks.py, what is measured in measures.py, tables and plots in
report.py. All of it is in JAX: the losses of both packages agree, which `lsce-parity` shows.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples import jax_distillation
from examples.characters.common import CACHE, Cache, Fonts, Sources
from examples.characters.fonts import FOLDER
from examples.common import Page, made_folder, new_app, print_written
from examples.distillation_common import Framework, Options, train_all
from examples.study import report
from examples.study.measures import project
from examples.study.report import DRAWN, NONE, Line, Setting
from examples.study.tasks import Task, Trained, characters_task, digits_task, language_task, look_at, measure, train

STRENGTHS = (0.05, 0.1, 0.2, 0.4)
SETTINGS = (NONE, *(Setting("uniform", strength) for strength in STRENGTHS))
CONVENTIONS = (Setting("non_target", 0.1), Setting("max_sup", 0.1))
DISTILLATION = Options(epochs=16, smoothing=0.1, rows=120, repeats=1, seed=0)


def make_tasks(quick: bool, sources: Sources, console: Console) -> dict[str, Task]:
    """Return the tasks by name, in a setting of seconds if asked."""
    return {
        "few-digits": digits_task("200 digits to train on", train_rows=200, epochs=4 if quick else 96),
        "digits": digits_task("1000 digits to train on", train_rows=1000, epochs=1 if quick else 32),
        "mislabelled": digits_task(
            "400 digits, a fifth of them mislabelled", train_rows=400, epochs=1 if quick else 256, mislabelled=80
        ),
        "characters": characters_task(sources, console, characters=20 if quick else 200, steps=2 if quick else 320),
        "language": language_task(steps=2 if quick else 384),
    }


# --- Lines ----------------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a file, without a last one that a kill has torn."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole, _, torn = text.rpartition("\n")
    if torn:
        path.write_text(whole + "\n" if whole else "", encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def key_of(line: Line) -> tuple[Any, ...]:
    """Return what makes one line another than the next: what fixes the training."""
    return tuple(line[name] for name in ("task", "steps", "convention", "smoothing", "seed"))


class Results:
    """The lines of a study, each written when its network is measured."""

    def __init__(self, path: Path) -> None:
        """Read what is there."""
        self.path = path
        self.lines = {key_of(line): line for line in read_lines(path)}

    def has(self, line: Line) -> bool:
        """Return whether the network of a line was measured."""
        return key_of(line) in self.lines

    def add(self, line: Line) -> None:
        """Write a line."""
        self.lines[key_of(line)] = line
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


# --- Trainings ------------------------------------------------------------------------------------------------------


def planned(tasks: dict[str, Task], seeds: int) -> list[Line]:
    """Return the lines that the study needs, without what is measured."""
    lines = [
        {"task": name, "steps": task.steps, **setting._asdict(), "seed": seed}
        for seed in range(seeds)
        for name, task in tasks.items()
        for setting in (*SETTINGS, *CONVENTIONS)
    ]
    taught = {"task": "distillation", "steps": DISTILLATION.epochs, **NONE._asdict()}
    return lines + [taught | {"seed": seed} for seed in range(seeds)]


def measured(line: Line, tasks: dict[str, Task], folder: Path) -> Line:
    """Train a network and return its line with what was measured."""
    if line["task"] == "distillation":
        return line | {"networks": list(distilled(line["steps"], line["seed"]))}
    task, setting, seed = tasks[line["task"]], Setting(line["convention"], line["smoothing"]), line["seed"]
    data = task.data(seed)
    trained = look_at(train(task, data, seed, *setting), data)
    if task.clustered and seed == 0 and setting in DRAWN:
        path = report.planes_file(folder, line["task"], task.steps, setting)
        np.savez(path, **planes(task, trained))
    return line | measure(task, trained)


def planes(task: Task, trained: Trained) -> dict[str, np.ndarray]:
    """Return the features of the classes that are drawn, in the plane through their weights."""
    templates = np.asarray(trained.layer[0])[:, list(task.drawn)]
    found = {}
    for name in ("train", "test"):
        features, labels = getattr(trained, name)
        rows = np.isin(labels, task.drawn)
        found |= {f"{name}_points": project(features[rows], templates), f"{name}_labels": labels[rows]}
    return found


def distilled(epochs: int, seed: int) -> Iterator[Line]:
    """Train teachers and students as jax_distillation does, and yield what was measured of each."""
    framework = Framework("JAX", jax_distillation.train, jax_distillation.probabilities, jax_distillation.evaluate)
    results, _ = train_all(framework, DISTILLATION._replace(epochs=epochs), seed, lambda: None)
    for network, metrics in results.items():
        yield {**network._asdict(), **metrics}


# --- The command line -----------------------------------------------------------------------------------------------

app = new_app()

Seeds = Annotated[int, typer.Option(min=2, help="Trainings of each setting.")]
Quick = Annotated[bool, typer.Option("--quick", help="Train for seconds, to see that it works.")]
StudyFolder = Annotated[Path, typer.Option(callback=made_folder, help="Folder for lines, tables and plots.")]


@app.command()
def main(
    seeds: Seeds = 5,
    quick: Quick = False,
    fonts: Fonts = FOLDER,
    cache: Cache = CACHE,
    output: StudyFolder = Path("out/study"),
    page: Page = None,
) -> None:
    """Train with and without smoothing, and show what it changes, with confidence intervals.

    Killed at any time, it goes on when the same command is given again.
    """
    console = Console()
    tasks = make_tasks(quick, Sources(fonts, gnt=None, keep_damaged=False, cache=cache), console)
    results = Results(output / "results.jsonl")
    lines = planned(tasks, seeds)
    if kept := sum(map(results.has, lines)):
        console.print(f"{kept} of {len(lines)} trainings are in {results.path}; remove it to train these again")
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=len(lines))
        for line in lines:
            progress.update(bar, description=f"{line['task']}, seed {line['seed']}")
            if not results.has(line):
                results.add(measured(line, tasks, output))
            progress.advance(bar)

    found = [results.lines[key_of(line)] for line in lines]
    tables = report.make_report(found, {name: task.title for name, task in tasks.items()})
    for table in tables.tables:
        console.print(table)
    pictures = report.draw(found, tasks, output)
    print_written(console, results.path, *(picture.path for picture in pictures))
    if page is not None:
        report.write_page(page, seeds, tables, pictures)
        print_written(console, page)


if __name__ == "__main__":
    app()
