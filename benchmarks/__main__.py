"""The command line of the benchmarks.

    python -m benchmarks dense
    python -m benchmarks dense --framework jax --shape 1024x32768
    python -m benchmarks dense --sizes small
    python -m benchmarks dense --device cuda
    python -m benchmarks linear
    python -m benchmarks linear --scaling
    python -m benchmarks smoothing
    python -m benchmarks tpu
    python -m benchmarks tpu-exp
    python -m benchmarks tpu-kernel
    python -m benchmarks gpu
    python -m benchmarks launches
    python -m benchmarks cost --write
    python -m benchmarks scaling --quick
    python -m benchmarks scaling --target tpu-v5e --rows 8192 --classes 131072 --mesh 4x4
    python -m benchmarks dense --write
    python -m benchmarks device cuda --install --write
    python -m benchmarks all --write
    python -m benchmarks all --quick --session torch
    python -m benchmarks compare OLD.json NEW.json

`--write` keeps the figures in docs/figures and writes the tables into the pages. A framework is imported where it is
measured, so that each can be measured without the other.

torch is measured twice, with the default allocator of the C library and with one that keeps its pages. The first gives
large pieces of memory back to the system, whose page faults may take most of the time of a loss. Many programs run with
an allocator that does not, such as jemalloc, and there the ratios are others. On other devices torch has an allocator
of its own, and is measured once.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from benchmarks.engines import device as on_device
from benchmarks.engines import everything, in_turns
from benchmarks.engines.sessions import Session
from benchmarks.engines.timing import LinearShape, Schedule, Shape
from benchmarks.pages import all_report, device_report, keep, records, report
from benchmarks.pages.tables import print_table
from lsce_cost.devices import ENVIRONMENTS, has_cuda_plugin
from parity_tests.evidence.cards import AbsentError, find_device
from parity_tests.evidence.pages import write_block

SHAPES = {
    "large": (Shape(1024, 32768), Shape(2048, 50257), Shape(8192, 1000), Shape(128, 1000)),
    "small": (Shape(32, 10), Shape(128, 1000), Shape(256, 1000), Shape(2**20, 4), Shape(4, 21, 2**16)),
}
QUICK_SHAPE = Shape(32, 1000)
LINEAR_SHAPES = (LinearShape(2048, 512, 50257),)
QUICK_LINEAR_SHAPE = LinearShape(32, 16, 1000)
SMOOTHING_SHAPE, ERROR_SHAPE = LinearShape(2048, 256, 8192), LinearShape(512, 256, 8192)
# Many times the rows of a chunk, so that what grows with their number would show.
SCALING_SHAPES = tuple(LinearShape(rows, 64, 32768) for rows in (1024, 4096, 16384, 65536))
QUICK_SCALING_SHAPES = tuple(LinearShape(rows, 16, 1000) for rows in (32, 64))

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)


def _parse_shape(text: str) -> Shape:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise typer.BadParameter(f"must be like 1024x32768, or 4x21x65536 for images, got {text!r}.")
    return Shape(int(match[1]), int(match[2]), int(match[3] or 1))


def _parse_linear_shape(text: str) -> LinearShape:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise typer.BadParameter(f"must be like 2048x512x50257, got {text!r}.")
    return LinearShape(int(match[1]), int(match[2]), int(match[3]))


FrameworkOption = Annotated[Literal["jax", "torch", "both"], typer.Option(help="What to measure.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="How often each loss has its turn.")]
CallsOption = Annotated[int, typer.Option(min=1, help="Calls that count in a turn.")]
DenseCallsOption = Annotated[
    int, typer.Option(min=1, help="Calls that count in a turn; 40 times as many of few logits.")
]
OnlyOption = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="Losses, with * and ?; may be repeated. [default: all]")
]
QuickOption = Annotated[bool, typer.Option("--quick", help="Small shapes and one round, to see that it runs.")]
JsonOption = Annotated[Path | None, typer.Option("--json", dir_okay=False, help="File for all figures.")]
WriteOption = Annotated[
    bool, typer.Option("--write", help="Keep the figures in docs/figures, and write the tables into the pages.")
]

AllocatorOption = Annotated[
    Literal["default", "kept", "both", "here"],
    typer.Option(help="Of torch's memory: the default, one that keeps its pages, or that of this process as it is."),
]

DeviceOption = Annotated[Literal["cpu", "cuda", "tpu"], typer.Option(help="Where to measure; not torch on a TPU.")]


@app.command()
def dense(  # noqa: PLR0913, PLR0917 - a command line has its options as arguments
    framework: FrameworkOption = "both",
    sizes: Annotated[Literal["large", "small"], typer.Option(help="Which shapes.")] = "large",
    shape: Annotated[
        list[Shape] | None,
        typer.Option(parser=_parse_shape, metavar="ROWSxCLASSES[xPIXELS]", help="Of the logits; may be repeated."),
    ] = None,
    rounds: RoundsOption = 5,
    calls: DenseCallsOption = 3,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Add torch.compile, which needs a C++ compiler.")
    ] = False,
    device: DeviceOption = "cpu",
    allocator: AllocatorOption = "both",
    quick: QuickOption = False,
    json_file: JsonOption = None,
    write: WriteOption = False,
) -> None:
    """Time and memory of loss and gradient, and of the peers."""
    console = Console()
    frameworks, machine = _find_frameworks(framework, device, console)
    report.print_machine(machine, console)
    console.print("÷: whose median is 1. A floor only writes a fresh array, as large as a gradient.\n")
    shapes = shape or ([QUICK_SHAPE] if quick else SHAPES[sizes])
    rounds = 1 if quick else rounds
    results = in_turns.dense_results(frameworks, shapes, rounds, calls, device, allocator, compiled, quick)
    figures = {"machine": machine, "small" if sizes == "small" else "dense": results}
    _show(figures, json_file, write, console)


def _find_frameworks(asked: str, device: str, console: Console) -> tuple[list[str], dict[str, Any]]:
    """Return the frameworks to measure, and the machine with its card; exit with 1 if no framework finds the device."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else JAX takes most of a card from torch
    found, machine = [], report.describe_machine()
    for name in ("jax", "torch") if asked == "both" else (asked,):
        try:
            card = find_device(name, device)
        except AbsentError as error:
            console.print(f"not measured: {error}", markup=False, highlight=False)
            continue
        found.append(name)
        if card:
            machine["device"] = f"{device}: {card}"
    if not found:
        raise typer.Exit(code=1)
    return found, machine


@app.command()
def linear(  # noqa: PLR0913, PLR0917 - as above
    framework: FrameworkOption = "both",
    shape: Annotated[
        list[LinearShape] | None,
        typer.Option(parser=_parse_linear_shape, metavar="ROWSxFEATURESxCLASSES", help="May be repeated."),
    ] = None,
    rounds: RoundsOption = 5,
    calls: CallsOption = 1,
    allocator: AllocatorOption = "both",
    device: DeviceOption = "cpu",
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Of ours alone: time and memory for more and more rows.")
    ] = False,
    quick: QuickOption = False,
    json_file: JsonOption = None,
    write: WriteOption = False,
) -> None:
    """Time and memory of the last linear layer with loss and gradients, and of the peers."""
    if scaling and shape:
        raise typer.BadParameter("has shapes of its own: leave '--shape' out.", param_hint="'--scaling'")
    console = Console()
    frameworks, machine = _find_frameworks(framework, device, console)
    report.print_machine(machine, console)
    console.print()
    schedule = Schedule(1 if quick else rounds, calls)
    if scaling:
        results = in_turns.scaling_results(
            frameworks, QUICK_SCALING_SHAPES if quick else SCALING_SHAPES, schedule, device, allocator
        )
    else:
        sizes = shape or ([QUICK_LINEAR_SHAPE] if quick else LINEAR_SHAPES)
        results = in_turns.linear_results(frameworks, sizes, schedule, device, allocator)
    figures = {"machine": machine, "scaling" if scaling else "linear": results}
    _show(figures, json_file, write, console)


@app.command()
def smoothing(
    framework: FrameworkOption = "both",
    shape: Annotated[
        LinearShape | None, typer.Option(parser=_parse_linear_shape, metavar="ROWSxFEATURESxCLASSES")
    ] = None,
    rounds: RoundsOption = 5,
    calls: CallsOption = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of torch; with 1 none waits for another. [default: all cores]")
    ] = None,
    quick: QuickOption = False,
    json_file: JsonOption = None,
    write: WriteOption = False,
) -> None:
    """What smoothing costs that is added to linear losses without it, and its errors in bfloat16, on the CPU."""
    console = Console()
    frameworks, machine = _find_frameworks(framework, "cpu", console)
    if threads is not None:
        machine["threads"] = threads
    report.print_machine(machine, console)
    console.print()
    size, of_errors = (QUICK_LINEAR_SHAPE,) * 2 if quick else (shape or SMOOTHING_SHAPE, ERROR_SHAPE)
    schedule = Schedule(1 if quick else rounds, calls)
    results = in_turns.smoothing_results(frameworks, size, of_errors, schedule, threads)
    figures = {"machine": machine, "smoothing": results}
    _show(figures, json_file, write, console)


@app.command()
def device(
    name: Annotated[Literal["cpu", "cuda", "tpu"], typer.Argument(metavar="cuda|tpu|cpu", show_default=False)],
    framework: FrameworkOption = "both",
    only: OnlyOption = None,
    rounds: RoundsOption = 5,
    calls: DenseCallsOption = 3,
    quick: QuickOption = False,
    install: Annotated[bool, typer.Option("--install", help="Install the other libraries first.")] = False,
    json_file: JsonOption = None,
    write: WriteOption = False,
) -> None:
    """Ours and other libraries' losses on one device: held against the truth, then timed.

    Exit code 0: all of ours are within their bounds, 1: one is not (the record is written all the same), 2: no
    framework finds the device.
    """
    if write and name == "cpu":
        raise typer.BadParameter("the pages have GPUs and TPUs: leave '--write' out.", param_hint="'--write'")
    if framework != "both" and framework not in on_device.FRAMEWORKS[name]:
        raise typer.BadParameter(f"{framework} is not measured on a {name}.", param_hint="'--framework'")
    if install and name == "cpu":
        raise typer.BadParameter("is for cuda and tpu.", param_hint="'--install'")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else JAX takes most of a card from torch
    console = Console()
    refused = on_device.install(name) if install else {}
    for library, reason in refused.items():
        console.print(f"{library}: {reason}", markup=False, highlight=False, soft_wrap=True)
    machine = report.describe_machine(on_device.LIBRARIES) | on_device.driver()
    block = f"device {name}"
    figures: report.Figures = {"machine": machine, "refused": refused, "limits": None, block: []}
    options = {
        "patterns": only or ["*"],
        "rounds": 1 if quick else rounds,
        "calls": calls,
        "few_calls": calls * (1 if quick else on_device.FEW_CALLS),
        "quick": quick,
    }
    frameworks = [each for each in on_device.FRAMEWORKS[name] if framework in {each, "both"}]
    for part in _found_on(name, frameworks, options, figures, console):
        figures[block].append(part)
        print_table(list(device_report.tables(figures))[-1], console)
        # After each part: so little is lost with the machine.
        _keep(figures, json_file, write, Console(quiet=True))
    if not figures[block]:
        raise typer.Exit(code=2)
    _keep(figures, json_file, write, console)
    _exit_if_wrong(figures[block], console)


def _exit_if_wrong(parts: Sequence[dict[str, Any]], console: Console) -> None:
    """Exit with 1 and one line if one of ours is not within its bounds."""
    wrong = device_report.wrong_of_ours(parts)
    if wrong:
        console.print(f"outside of their bounds: {', '.join(wrong)}", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(code=1)


def _found_on(
    name: str, frameworks: Sequence[str], options: dict[str, Any], figures: report.Figures, console: Console
) -> Iterator[dict[str, Any]]:
    """Yield what is found in each part; note the card in the figures."""
    machine: dict[str, Any] = figures["machine"]
    for framework in frameworks:
        parts = on_device.make_parts(framework, options["quick"])
        for found in on_device.measure(framework, name, parts, **options):
            if "absent" in found:
                console.print(f"not measured: {found['absent']}", markup=False, highlight=False, soft_wrap=True)
            elif "card" in found:
                if found["card"]:
                    machine.setdefault("device", f"{name}: {found['card']}")
                limits = on_device.limits_of(name, found["card"])
                figures["limits"] = limits and dict(vars(limits), matrix=dict(limits.matrix))
                report.print_machine(machine, console)
                console.print()
            else:
                yield found


@app.command("all")
def measure_all(
    session: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Sessions, with * and ?; may be repeated. [default: all]"),
    ] = None,
    only: OnlyOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each loss has its turn; the largest at most 3.")] = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small shapes; nothing is installed, or compiled by torch.")
    ] = False,
    again: Annotated[
        Path | None,
        typer.Option(
            "--from",
            exists=True,
            dir_okay=False,
            help="Take the figures of this file, and measure only the sessions that --session names.",
        ),
    ] = None,
    json_file: JsonOption = None,
    write: WriteOption = False,
) -> None:
    """All that a user would take in place of our losses, beside ours, on the CPU: time, memory, accuracy, and more.

    Exit code 0: all of ours are within their bounds, 1: one is not (the record is written all the same).
    """
    if again is not None and not session and (quick or only):
        raise typer.BadParameter("measures nothing without --session.", param_hint="'--from'")
    if write and (quick or only or (session and again is None)):
        raise typer.BadParameter("keeps the figures of all losses.", param_hint="'--write'")
    chosen = _sessions(session or ())
    console = Console()
    measured = partial(_measured, chosen, only or ["*"], rounds, quick, console)
    if again is None:
        figures = measured(json_file)
    elif session:
        # Nothing is kept on the way, as the file may be the one whose other sessions are needed.
        figures = records.renewed(_record_of_this_machine(again), measured(None))
    else:
        figures = _read_record(again)
        for table in report.tables(figures):
            print_table(table, console)
    for title, lines in all_report.lost_lists(figures["all"]):
        _print_list(f"{title}:" if lines else f"{title}: none", lines, console)
    _keep(figures, json_file, write, console)
    if write:
        from benchmarks.pages import plots  # noqa: PLC0415 - it takes a second

        for path in plots.draw(figures, keep.DOCS / "images", report.file_name(figures)):
            console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    _exit_if_wrong([part for each in figures["all"]["sessions"] for part in each["parts"]], console)


def _sessions(names: Sequence[str]) -> list[Session]:
    try:
        return everything.selected(names)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--session'") from None


def _measured(
    chosen: Sequence[Session],
    patterns: Sequence[str],
    rounds: int,
    quick: bool,
    console: Console,
    json_file: Path | None,
) -> report.Figures:
    """Return what the sessions find; print each table when it is there."""
    machine = report.describe_machine(("lsce",))
    report.print_machine(machine, console)
    console.print()
    record: records.Record = {"rounds": rounds, "quick": quick, "sessions": [], "absent": {}, "imports": []}
    figures = {"machine": machine, "all": record}
    for each in chosen:
        found: dict[str, Any] = {"name": each.name, "framework": each.framework, "versions": {}, "parts": []}
        for part in everything.measure(each, patterns, rounds, quick):
            if "absent" in part:
                record["absent"][each.name] = part["absent"]
                console.print(f"{each.name}: {part['absent']}", markup=False, highlight=False, soft_wrap=True)
            elif "versions" in part:
                found["versions"] = part["versions"]
                record["sessions"].append(found)
            else:
                found["parts"].append(part)
                for table in all_report.part_tables(found, part) if "grows" not in part else ():
                    print_table(table, console)
                # After each part: so little is lost with the machine.
                _keep(figures, json_file, False, Console(quiet=True))
        for table in all_report.scaling_tables(found):
            print_table(table, console)
    record["imports"] = everything.import_times(quick)
    print_table(all_report.import_table(record), console)
    return figures


def _print_list(title: str, lines: Iterable[object], console: Console) -> None:
    for line in (title, *(f"- {line}" for line in lines), ""):
        console.print(line, markup=False, highlight=False)


def _read_record(path: Path) -> report.Figures:
    """Return a record of `all`; exit with 2 and one line if the file holds none."""
    try:
        return keep.read_record(path)
    except (OSError, ValueError) as error:
        typer.echo(f"{path} holds no record of python -m benchmarks all: {error}", err=True)
        raise typer.Exit(code=2) from None


def _record_of_this_machine(path: Path) -> report.Figures:
    """Return a record of `all`; exit with 2 and one line also if it is that of another processor."""
    figures = _read_record(path)
    cpu, other = report.describe_machine()["cpu"], figures["machine"]["cpu"]
    if cpu != other:
        raise typer.BadParameter(f"is a record of {other}, and this is {cpu}.", param_hint="'--from'")
    return figures


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A record of `all`, such as that of main.")],
    new: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A later one, of the same machine.")],
    tolerance: Annotated[
        float, typer.Option(min=0, help="By how much a ratio may grow whatever the rounds say.")
    ] = 0.05,
) -> None:
    """Which of our losses have become slower, relative to the first loss of the same run.

    Times are those of a machine on a day; ratios of losses that took turns can be compared. A ratio has grown if every
    round of the new record is above every round of the old, and the median by more than the tolerance.

    Exit code 0: none has grown, 1: one has, 2: the records cannot be compared.
    """
    console, both = Console(), [_read_record(path) for path in (old, new)]
    try:
        changes = records.changes(*(figures["all"] for figures in both))
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=2) from None
    processors = [figures["machine"]["cpu"] for figures in both]
    if len({*processors}) > 1:
        console.print(f"Two machines: {' and '.join(processors)}. Their ratios differ for other reasons too.")
    worse = [change for change in changes if change.is_worse(tolerance)]
    better = [change for change in changes if change.is_better(tolerance)]
    for title, found in (("Slower than before", worse), ("Faster than before", better)):
        if found:
            _print_list(f"{title}, relative to the first loss of the session:", found, console)
    console.print(f"{len(changes)} ratios: {len(worse)} have grown, {len(better)} have shrunk")
    raise typer.Exit(code=1 if worse else 0)


@app.command()
def tpu(json_file: JsonOption = None, write: WriteOption = False) -> None:
    """What loss and gradient would cost on TPUs that are not there, by their compiler."""
    _check_libtpu()
    os.environ.update(ENVIRONMENTS["tpu"])
    from benchmarks.engines import tpu as compiled  # noqa: PLC0415 - JAX must find the environment set

    machine = report.describe_machine()
    console = _console_with(machine)
    figures = {
        "machine": machine,
        "tpu shape": compiled.SHAPE.sizes,
        "tpu": [cost._asdict() for cost in compiled.measure()],
        "tpu linear shape": compiled.LINEAR_SHAPE,
        "tpu linear chunk bytes": compiled.linear_chunk_bytes(),
        "tpu linear": [cost._asdict() for cost in compiled.measure_linear()],
    }
    _show(figures, json_file, write, console)


@app.command()
def tpu_exp() -> None:
    """What an accurate exp would cost on TPUs that are not there: instruction bundles, by their compiler."""
    _check_libtpu()
    console = _console_with(report.describe_machine())
    with _dump_of_schedules() as dump:
        from benchmarks.engines import tpu_bundles  # noqa: PLC0415 - JAX must find the environment set

        costs = [cost._asdict() for cost in tpu_bundles.measure(dump)]
    print_table(report.bundle_table(costs), console)


@app.command()
def tpu_kernel(
    program: Annotated[list[str] | None, typer.Option(help="What to compile; may be repeated. [default: all]")] = None,
    alone: Annotated[bool, typer.Option("--alone", help="The kernel, and not the fused loss beside it.")] = False,
    json_file: JsonOption = None,
    write: WriteOption = False,
) -> None:
    """What the Pallas kernel costs on TPUs that are not there, by their compiler: bytes and instruction bundles."""
    _check_libtpu()
    if write and (program or alone):
        raise typer.BadParameter("keeps the figures of all programs.", param_hint="'--write'")
    machine = report.describe_machine()
    console = _console_with(machine)
    with _dump_of_schedules() as dump:
        from benchmarks.engines import tpu_kernel as compiled  # noqa: PLC0415 - JAX must find the environment set

        implementations = compiled.IMPLEMENTATIONS[alone:]
        costs = compiled.measure(dump, program or tuple(compiled.PROGRAMS), implementations)
        figures = {
            "machine": machine,
            "tpu kernel shape": compiled.SHAPE.sizes,
            "tpu kernel": [cost._asdict() for cost in costs],
        }
    for table in report.tables(figures):
        print_table(table, console)
    _keep(figures, json_file, write, console)


@contextmanager
def _dump_of_schedules() -> Iterator[Path]:
    """Have the TPU compiler, which must not have been loaded, write its schedules to a folder."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(ENVIRONMENTS["tpu"])
        from lsce_cost.bundles import FLAGS  # noqa: PLC0415 - JAX must find the environment set

        os.environ["LIBTPU_INIT_ARGS"] = FLAGS.format(folder=folder)
        yield Path(folder)


def _check_libtpu() -> None:
    if importlib.util.find_spec("libtpu") is None:
        install = f"pip install {_libtpu_requirement()!r}"
        typer.echo(f"The TPU compiler is not installed. Run: make test-compiled, or {install}", err=True)
        raise typer.Exit(code=1)


@app.command()
def gpu() -> None:
    """What loss and gradient would need on GPUs that are not there, by XLA's compiler: memory, and accesses to it."""
    if not has_cuda_plugin():
        typer.echo("JAX's plugin for CUDA is not installed; see make test-compiled.", err=True)
        raise typer.Exit(code=1)
    os.environ.update(ENVIRONMENTS["gpu"])
    from benchmarks.engines import gpu as counted  # noqa: PLC0415 - JAX must find the environment set
    from benchmarks.engines import tpu as compiled  # noqa: PLC0415

    console = _console_with(report.describe_machine())
    print_table(report.gpu_table(compiled.measure_memory(), compiled.SHAPE), console)
    print_table(report.gpu_moves_table([count._asdict() for count in counted.measure()]), console)


@app.command()
def launches() -> None:
    """What eager torch would start on a GPU that is not there: kernels, and how often they move the logits."""
    if importlib.util.find_spec("triton") is None:
        typer.echo("Triton is not installed. Run: make install-devices, or pip install triton", err=True)
        raise typer.Exit(code=1)
    from parity_tests.losses import launches as counted  # noqa: PLC0415 - it needs torch alone

    console = _console_with(report.describe_machine())
    print_table(report.launches_table([count._asdict() for count in counted.measure()]), console)
    console.print()
    of_linear = [count._asdict() for count in counted.measure_linear()]
    print_table(report.linear_launches_table(of_linear, counted.LAYER), console)


@app.command()
def cost(write: WriteOption = False) -> None:
    """The tables of docs/cost.md, which `lsce-cost` prints one by one, and published times beside estimates."""
    from benchmarks.pages import cost as costs  # noqa: PLC0415 - JAX takes a second
    from lsce_cost.cost import CompilerMissingError  # noqa: PLC0415

    console = Console()
    try:
        record = costs.figures()
    except CompilerMissingError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=1) from None
    for block, text in costs.page_blocks(record).items():
        if write:
            write_block(keep.DOCS / "cost.md", f"benchmarks {block}", text)
        else:
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    if write:
        path = keep.DOCS / "cost.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        console.print(f"wrote {keep.DOCS / 'cost.md'} and {path}", soft_wrap=True, highlight=False)


def _parse_mesh(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise typer.BadParameter(f"must be like 4x4, got {text!r}.")
    return int(match[1]), int(match[2])


@app.command()
def scaling(
    target: Annotated[str, typer.Option(help="Device, as in lsce-cost, or cpu for 8 virtual ones.")] = "cpu",
    rows: Annotated[int | None, typer.Option(min=1, help="Of all devices. [default: the sizes of the page]")] = None,
    classes: Annotated[int, typer.Option(min=1, help="Of all devices.")] = 131072,
    features: Annotated[int | None, typer.Option(min=1, help="Of a linear layer.")] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="Of logits, or hidden and weight.")
    ] = "bfloat16",
    mesh: Annotated[
        Any, typer.Option(parser=_parse_mesh, metavar="ROWSxCLASSES", help="How many devices each is divided over.")
    ] = "2x4",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes on virtual devices of this CPU.")] = False,
    json_file: JsonOption = None,
    write: Annotated[
        bool, typer.Option("--write", help="Keep the figures in docs, and write the tables there.")
    ] = False,
) -> None:
    """What loss and gradient send between devices, ours and other ways, from compiled programs and from a model."""
    from benchmarks.pages import scaling as sent  # noqa: PLC0415 - JAX takes a second
    from lsce_cost.cost import CompilerMissingError  # noqa: PLC0415

    if write and (quick or rows is not None):
        raise typer.BadParameter("keeps the figures of the page's sizes.", param_hint="'--write'")
    console = Console()
    try:
        steps = sent.QUICK if quick else sent.STEPS
        if rows is not None:
            steps = ((target, sent.Step(rows, classes, mesh, features, dtype)),)
        record = sent.figures(steps)
    except (CompilerMissingError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=1) from None
    for table in sent.tables(record):
        print_table(table, console)
    text = json.dumps(record, indent=1) + "\n"
    _say_written(keep.write_text(text, keep.DOCS / "scaling.json" if write else None, json_file), console)
    if write:
        for block, page in sent.page_blocks(json.loads(text)).items():
            write_block(keep.DOCS / "scaling.md", f"benchmarks {block}", page)


def _libtpu_requirement() -> str:
    """Return what the installed JAX asks for."""
    requirements = importlib.metadata.requires("jax") or []
    return next(line.partition(";")[0].strip() for line in requirements if line.startswith("libtpu"))


def _keep(figures: report.Figures, json_file: Path | None, write: bool, console: Console) -> None:
    """Write the figures to a file, and to the docs; say so."""
    _say_written(keep.keep(figures, json_file, write), console)


def _say_written(paths: Iterable[Path], console: Console) -> None:
    for path in paths:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)


def _show(figures: report.Figures, json_file: Path | None, write: bool, console: Console) -> None:
    """Print the tables of the figures, and keep them."""
    for table in report.tables(figures):
        print_table(table, console)
    _keep(figures, json_file, write, console)


def _console_with(machine: dict[str, Any]) -> Console:
    """Return a console on which the machine stands."""
    console = Console()
    report.print_machine(machine, console)
    console.print()
    return console


if __name__ == "__main__":
    app()
