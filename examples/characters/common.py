"""What train_jax and train_torch share, without a framework: options, data, learning rates, files, tables and plot."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
import typer
from jaxtyping import Float32, Int32
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from examples.characters.fonts import FontsError, level_one, read_manifest
from examples.characters.gnt import read_folder
from examples.characters.images import SIZE, Hand, Labels, Samples, checksum, font_hand
from examples.common import Metrics, batch_rows, made_folder, print_written, write_array, write_whole
from examples.digits_common import open_run

LOSSES = {
    "none": "without smoothing",
    "uniform": "smoothed over all characters",
    "non_target": "smoothed over the others",
    "clamp": "CELossWithLabelSmoothing",
    "max_sup": "max suppression",
    "linear": "uniform, with the last layer in the loss",
}
METRICS = {"accuracy": "accuracy", "top_5": "in top 5", "nll": "nll", "calibration_error": "calibration error"}
CACHE = Path("out/characters/pictures")

WIDTHS, STRIDES = (24, 48, 96, 192), (2, 2, 1, 2)  # of the convolutions, which end with maps of SIDE x SIDE
SIDE = SIZE // math.prod(STRIDES)
FEATURES = 256
# Of the batch norms. Without them thousands of characters look so much alike to the last layer that it learns nothing
# for hundreds of steps.
NORM_EPSILON = 2.0**-16
NORM_SHARE = 2.0**-4  # of the last batch, in what is used for testing
PEAK_LEARNING_RATE = 2.0**-9
# Adam's first step is g / (|g| + epsilon). With an epsilon below the rounding of the gradients, rounding alone would
# decide which way the weights go whose gradient is almost 0.
EPSILON = 2.0**-16
EVALUATION_BATCH_SIZE = 751  # 3755 = 5 x 751: one shape to compile

Network = TypeVar("Network")


class Options(NamedTuple):
    """What the command line asks for.

    Args:
        losses: names of LOSSES.
        steps: batches that each network is trained on.
        batch_size: pictures.
        smoothing: of all losses but "none".
        characters: how many, from the first of GB 2312 on.
        seed: of weights, distortions and batches.
        checkpoint_every: steps.
    """

    losses: Sequence[str]
    steps: int
    batch_size: int
    smoothing: float
    characters: int
    seed: int
    checkpoint_every: int = 256


class Sources(NamedTuple):
    """Where the pictures are from.

    Args:
        fonts: the folder that `make fonts` has written.
        gnt: a folder of CASIA-HWDB's files, or None.
        keep_damaged: whether to use what comes before the damage in a damaged .gnt file.
        cache: the folder that keeps pictures.
    """

    fonts: Path
    gnt: Path | None
    keep_damaged: bool
    cache: Path


def checked_losses(losses: list[str]) -> list[str]:
    """Return the names of losses, each once, if all are known."""
    unknown = [name for name in losses if name not in LOSSES]
    if unknown:
        raise typer.BadParameter(f"unknown loss {unknown[0]!r}. Known: {', '.join(LOSSES)}.")
    return list(dict.fromkeys(losses))


LossNames = Annotated[
    list[str],
    typer.Option(callback=checked_losses, help=f"{', '.join(LOSSES)}; may be given several times.", show_default="all"),
]
Steps = Annotated[int, typer.Option(min=1, help="Batches to train each network on.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures of a batch.")]
Characters = Annotated[int, typer.Option(min=2, max=len(level_one()), help="Characters, from the first of GB 2312 on.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of weights, distortions and batches.")]
Fonts = Annotated[Path, typer.Option(help="Folder that `make fonts` has written.")]
Gnt = Annotated[Path | None, typer.Option(help="Folder with .gnt files of CASIA-HWDB.", show_default="none")]
KeepDamaged = Annotated[bool, typer.Option("--keep-damaged", help="Use damaged .gnt files up to the damage.")]
Cache = Annotated[Path, typer.Option(callback=made_folder, help="Folder that keeps pictures.")]
CheckpointEvery = Annotated[int, typer.Option(min=1, help="Steps from one checkpoint to the next.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Remove the runs that the output folder holds.")]
RunFolder = Annotated[Path, typer.Option(callback=made_folder, help="Folder of the runs.")]


# --- Data -----------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Pictures to train on and to test on.

    Args:
        train: of the hands that are not held out.
        tests: of the others, by what they are.
    """

    train: Samples
    tests: dict[str, Samples]

    @property
    def fingerprint(self) -> str:
        """A checksum of everything that the pictures are made from."""
        return checksum(*(hand.key for samples in (self.train, *self.tests.values()) for hand in samples.hands))


def read_data(sources: Sources, options: Options, console: Console) -> Data:
    """Return the pictures of all fonts and writers; draw what is not drawn yet, with a progress bar.

    Raises:
        typer.BadParameter: fonts or .gnt files are missing or damaged, or there are too few.
    """
    fonts = read_fonts(sources, options, console)
    writers = read_writers(sources, options, console)
    train = [hand for hand in (*fonts, *writers) if not hand.held_out]
    tests = {
        name: [hand for hand in hands if hand.held_out]
        for name, hands in (("unseen fonts", fonts), ("unseen writers", writers))
    }
    if not train or not tests["unseen fonts"]:
        problem = f"{sources.fonts} needs a face to train on and one that is held out. Run `make fonts`."
        raise typer.BadParameter(problem, param_hint="'--fonts'")
    samples = {name: Samples(hands, options.seed, sources.cache) for name, hands in tests.items() if hands}
    data = Data(Samples(train, options.seed, sources.cache), samples)
    if len(data.train) < options.batch_size:
        problem = f"a batch has {options.batch_size} pictures, and there are {len(data.train)} to train on."
        raise typer.BadParameter(problem, param_hint="'--batch-size'")
    distort_all(data, options, console)
    return data


def read_fonts(sources: Sources, options: Options, console: Console) -> list[Hand]:
    """Return the fonts of the manifest."""
    try:
        faces = read_manifest(sources.fonts)
        with progress_bar(console) as progress:
            return [
                font_hand(face, sources.fonts, options.characters, sources.cache)
                for face in progress.track(faces, description="fonts")
            ]
    except FontsError as problem:
        raise typer.BadParameter(str(problem), param_hint="'--fonts'") from None


def read_writers(sources: Sources, options: Options, console: Console) -> list[Hand]:
    """Return the writers of the folder of .gnt files, if there is one, and print what was left out."""
    if sources.gnt is None:
        return []
    try:
        with progress_bar(console) as progress:
            found = read_folder(
                sources.gnt,
                options.characters,
                sources.cache,
                keep_damaged=sources.keep_damaged,
                track=lambda paths: progress.track(paths, description="writers"),
            )
    except FileNotFoundError as problem:
        raise typer.BadParameter(f"{problem}.", param_hint="'--gnt'") from None
    except ExceptionGroup as group:
        errors = "; ".join(map(str, group.exceptions))
        advice = "Fetch the files again, or use what is whole with --keep-damaged."
        raise typer.BadParameter(f"{group.message}: {errors}. {advice}", param_hint="'--gnt'") from None
    console.print(found.summary(), highlight=False)
    for error in found.damaged:
        console.print(f"damaged: {error}, and are used", soft_wrap=True, highlight=False, markup=False)
    return found.hands


def count_variants(data: Data, options: Options) -> int:
    """Return how many variants of each training picture the steps see: one in each pass over the hands."""
    return math.ceil(options.steps / (len(data.train) // options.batch_size))


def distort_all(data: Data, options: Options, console: Console) -> None:
    """Make all pictures that are not there yet, with a progress bar."""
    wanted = [
        (data.train, hand, variant) for variant in range(count_variants(data, options)) for hand in data.train.hands
    ]
    wanted += [(samples, hand, 0) for samples in data.tests.values() for hand in samples.hands]
    with progress_bar(console) as progress:
        for samples, hand, variant in progress.track(wanted, description="distortions"):
            samples.pictures(hand, variant)


def training_batch(
    data: Data, options: Options, step: int
) -> tuple[Float32[np.ndarray, "N 32 32"], Int32[np.ndarray, " N"]]:
    """Return pictures and labels of a step. Each pass over the hands has distortions of its own."""
    rows = batch_rows(len(data.train), options.batch_size, options.seed, step)
    return data.train.batch(rows, step // (len(data.train) // options.batch_size))


def test_batches(samples: Samples) -> Iterator[tuple[Float32[np.ndarray, "N 32 32"], Int32[np.ndarray, " N"]]]:
    """Yield pictures and labels of hands that are held out."""
    for start in range(0, len(samples), EVALUATION_BATCH_SIZE):
        yield samples.batch(np.arange(start, min(start + EVALUATION_BATCH_SIZE, len(samples))), 0)


# --- Training -------------------------------------------------------------------------------------------------------


def learning_rates(steps: int) -> Float32[np.ndarray, " steps"]:
    """Return the learning rate of each step: it rises over a sixteenth of them, then falls in a straight line.

    Both frameworks take it from here, so that they round it alike.

    Example:
        >>> print(learning_rates(32)[[0, 1, 16]] * 2**9)
        [0.5     0.96875 0.5    ]
    """
    step = np.arange(steps)
    rising = np.minimum(1.0, (step + 1) / max(1, steps // 16))
    return np.float32(PEAK_LEARNING_RATE * rising * (1 - step / steps))


class Predictions(NamedTuple):
    """What a network says of the characters of one kind of test.

    Args:
        labels: the right characters.
        prediction: the most probable characters.
        confidence: their probabilities.
    """

    labels: Labels
    prediction: Labels
    confidence: Float32[np.ndarray, " N"]

    @property
    def correct(self) -> np.ndarray:
        """Whether each prediction is right."""
        return self.prediction == self.labels


class Result(NamedTuple):
    """What a trained network achieves.

    Args:
        metrics: for each kind of test, by the names of METRICS.
        by_hand: the accuracy of each hand that is held out, for each kind of test.
    """

    metrics: dict[str, Metrics]
    by_hand: dict[str, dict[str, float]]


class RunFiles:
    """The files of one training."""

    def __init__(self, folder: Path) -> None:
        """Name them."""
        self.folder = folder
        self.options, self.checkpoints = folder / "options.json", folder / "checkpoints"
        self.losses, self.result = folder / "losses.jsonl", folder / "result.json"

    def open(self, options: dict[str, Any], fresh: bool) -> None:
        """Make the folder, unless it holds a run with other options."""
        open_run(made_folder(self.folder), options, fresh)
        if fresh:
            self.result.unlink(missing_ok=True)

    def read_losses(self) -> list[float]:
        """Return the loss of each step."""
        return [json.loads(line)["loss"] for line in self.losses.read_text().splitlines()]

    def write_result(self, result: Result, predictions: dict[str, Predictions]) -> None:
        """Write what the network says and achieves; the result last, since it marks the run as done."""
        for name, said in predictions.items():
            for part, array in said._asdict().items():
                write_array(self._array(name, part), array)
        write_whole(self.result, json.dumps(result._asdict(), indent=1).encode())

    def read_result(self) -> Result | None:
        """Return what the network achieves, None if the run is not done."""
        return Result(**json.loads(self.result.read_text())) if self.result.exists() else None

    def read_predictions(self, name: str) -> Predictions:
        """Return what the network says of a kind of test."""
        return Predictions(*(np.load(self._array(name, part)) for part in Predictions._fields))

    def _array(self, name: str, part: str) -> Path:
        return self.folder / f"{name.replace(' ', '_')}_{part}.npy"


def run_options(program: str, loss: str, options: Options, data: Data) -> dict[str, Any]:
    """Return what a run depends on, as JSON can hold it."""
    fixed = {name: value for name, value in options._asdict().items() if name not in ("losses", "checkpoint_every")}
    return {"program": program, "loss": loss, **fixed, "data": data.fingerprint}


Train = Callable[[str, Data, Options, RunFiles, Callable[[int, float], None]], Network]
Evaluate = Callable[[Network, Samples], tuple[Metrics, Predictions]]


def train_and_report(
    train: Train[Network],
    evaluate: Evaluate[Network],
    options: Options,
    sources: Sources,
    framework: str,
    output: Path,
    fresh: bool,
) -> None:
    """Train a network with each loss, test it, print the tables and draw the plot. What is done already is not redone.

    Args:
        train: takes the name of a loss, data, options, files, and a function to call with the number of steps that are
            done and the last loss, the first time before any step; returns the network.
        evaluate: takes a network and pictures; returns the metrics and what the network says.
        options: of the command line.
        sources: of the command line.
        framework: its name, for the plot.
        output: the folder.
        fresh: whether to remove the runs in the folder.
    """
    console = Console()
    data = read_data(sources, options, console)
    console.print(describe_data(data, options), highlight=False)
    program = f"characters_{framework.lower()}"
    files = {loss: RunFiles(output / loss) for loss in options.losses}
    for loss, own in files.items():
        own.open(run_options(program, loss, options, data), fresh)
    results: dict[str, Result] = {}
    for loss, own in files.items():
        done = own.read_result()
        results[loss] = done or train_one(train, evaluate, loss, data, options, own, console)
    console.print(*make_tables(results), sep="\n")
    for line in compare_dense_with_linear(files, results):
        console.print(line, highlight=False)
    picture = output / "characters.png"
    plot(files, framework, picture)
    print_written(console, picture)


def train_one(
    train: Train[Network],
    evaluate: Evaluate[Network],
    loss: str,
    data: Data,
    options: Options,
    files: RunFiles,
    console: Console,
) -> Result:
    """Train a network with one loss, with a progress bar, and test it."""
    start = time.perf_counter()
    first: int | None = None
    with progress_bar(console) as progress:
        task = progress.add_task(loss, total=options.steps)

        def on_step(done: int, value: float) -> None:
            nonlocal first
            first = done if first is None else first
            progress.update(task, completed=done, description=f"{loss}: {value:.3f}")

        network = train(loss, data, options, files, on_step)
        seconds = time.perf_counter() - start
        progress.update(task, description=f"{loss}: testing")
        tested = {name: evaluate(network, samples) for name, samples in data.tests.items()}
        progress.update(task, description=loss)
    steps = options.steps - (first or 0)
    if steps > 0:
        console.print(
            f"{loss}: {steps} steps in {seconds:.0f} s, {1000 * seconds / steps:.0f} ms each", highlight=False
        )
    predictions = {name: said for name, (_, said) in tested.items()}
    by_hand = {name: accuracy_by_hand(data.tests[name], said) for name, said in predictions.items()}
    result = Result({name: metrics for name, (metrics, _) in tested.items()}, by_hand)
    files.write_result(result, predictions)
    return result


def accuracy_by_hand(samples: Samples, predictions: Predictions) -> dict[str, float]:
    """Return the accuracy of each hand."""
    hands = samples.hand_of(np.arange(len(samples)))
    return {hand.name: float(predictions.correct[hands == number].mean()) for number, hand in enumerate(samples.hands)}


# --- Tables and plot ------------------------------------------------------------------------------------------------


def progress_bar(console: Console) -> Progress:
    """Return a progress bar with the time that is left."""
    return Progress(
        TextColumn("{task.description:17}"),
        BarColumn(bar_width=18),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def describe_data(data: Data, options: Options) -> str:
    """Return a sentence that says how many pictures there are to train on, and how many to test on."""
    tests = ", ".join(f"{len(samples)} of {len(samples.hands)} {name}" for name, samples in data.tests.items())
    return (
        f"{options.characters} characters: {len(data.train)} of {len(data.train.hands)} hands to train on, {tests} to "
        f"test on; {count_variants(data, options)} distorted pictures of each"
    )


def make_tables(results: dict[str, Result]) -> list[Table]:
    """Return the metrics of each loss, and the accuracy by hand, for each kind of test."""
    tables = []
    for name in next(iter(results.values())).metrics:
        table = Table("loss", *METRICS.values(), title=f"Characters of {name}")
        for loss, result in results.items():
            table.add_row(loss, *(f"{result.metrics[name][metric]:.4f}" for metric in METRICS))
        tables.append(table)
        hands = next(iter(results.values())).by_hand[name]
        by_hand = Table("accuracy", *results)
        for hand in hands:
            by_hand.add_row(hand, *(f"{result.by_hand[name][hand]:.3f}" for result in results.values()))
        tables += [by_hand] if len(hands) > 1 else []
    return tables


def compare_dense_with_linear(files: dict[str, RunFiles], results: dict[str, Result]) -> list[str]:
    """Return how far the same loss parts by the way it is computed, if both were trained."""
    if not {"uniform", "linear"} <= results.keys():
        return []
    dense, linear = (np.array(files[loss].read_losses()) for loss in ("uniform", "linear"))
    apart = np.abs(dense - linear)
    early = min(len(apart), 64)
    return [
        f"uniform, dense and linear: losses differ by at most {apart[:early].max():.1e} in the first {early} steps, "
        f"and by {apart.max():.1e} in all {len(apart)}"
    ]


def smoothed(losses: Sequence[float], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and the mean losses of as many steps around them."""
    width = max(1, min(width, len(losses)))
    means = np.convolve(losses, np.ones(width) / width, mode="valid")
    return np.arange(len(means)) + (width - 1) / 2, means


def plot(files: dict[str, RunFiles], framework: str, picture: Path) -> None:
    """Draw the training loss of each run, and nothing else: losses of different conventions have different floors."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for loss, own in files.items():
        losses = own.read_losses()
        axes.plot(*smoothed(losses, len(losses) // 64), linewidth=1.2, label=f"{loss}: {LOSSES[loss]}")
    axes.set(title=f"Chinese characters in {framework}: training", xlabel="step", ylabel="loss, nats per picture")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=100)
