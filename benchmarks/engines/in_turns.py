"""Times the losses of a list in this process, in turns: for `benchmarks dense`, `linear` and `smoothing`."""

import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.engines.device import FEW_CALLS
from benchmarks.engines.losses import ADDED, DENSE, LINEAR, Loss, Program, losses
from benchmarks.engines.timing import (
    LinearShape,
    Row,
    Schedule,
    Shape,
    make_rows,
    processor_clock,
    time_in_turns,
)
from parity_tests.losses.adapters import UnavailableError

Function = Callable[..., Any]
ROOT = Path(__file__).parents[2]
# Calls of few logits take so little time that more of them count.
FEW_LOGITS, MORE_CALLS = 2**18, FEW_CALLS

# What makes the allocator of glibc keep its pages: it takes memory from the system in large pieces and returns none.
KEPT_PAGES = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(5 * 2**29),
}


def engine(framework: str) -> ModuleType:
    """Return the module of a framework, which is imported here and not before."""
    return importlib.import_module(f"benchmarks.engines.on_{framework}")


def available(framework: str, form: str, shown: str, device: str = "cpu") -> dict[str, tuple[Loss, Function]]:
    """Return the losses of a list that are here, by name, each with its function."""
    found = {}
    for loss in losses(framework, form, shown, device):
        try:
            found[loss.name] = loss, loss.make()
        except UnavailableError:
            continue
    return found


def measure_dense(
    framework: str, shape: Shape, schedule: Schedule, device: str = "cpu", with_compiled: bool = False
) -> list[Row]:
    """Return time and memory of each loss of logits with its gradient, and of each floor."""
    on = engine(framework)
    on.begin(device)
    given = {trained: on.random_logits(shape, device, trained) for trained in (False, True)}
    return _rows(
        [
            on.program(loss, function, given[loss.trained], device, False, alone=loss.floor)
            for loss, function in available(framework, DENSE, DENSE, device).values()
            if with_compiled or not loss.compiled
        ],
        schedule,
    )


def measure_linear(framework: str, shape: LinearShape, schedule: Schedule, device: str = "cpu") -> list[Row]:
    """Return time and memory of each loss of a layer with its gradients, and of the floor."""
    on = engine(framework)
    arguments = on.linear_arguments(shape, "float32", device)
    return _rows(
        [
            on.program(loss, function, arguments, device, True, alone=loss.floor)
            for loss, function in available(framework, LINEAR, LINEAR, device).values()
        ],
        schedule,
    )


def measure_scaling(
    framework: str, shapes: Sequence[LinearShape], schedule: Schedule, device: str = "cpu"
) -> list[Row]:
    """Return time of our linear loss with its gradients for each shape, and memory beyond the gradients."""
    on = engine(framework)
    loss, function = available(framework, LINEAR, LINEAR, device)["lsce linear"]
    programs = [
        on.program(
            loss._replace(name=str(shape.rows)), function, on.linear_arguments(shape, "float32", device), device, True
        )
        for shape in shapes
    ]
    rows = _rows(programs, schedule)
    if framework == "jax":  # whose temporary memory has no gradients
        return rows
    return [row._replace(memory=row.memory - shape.gradient_bytes) for row, shape in zip(rows, shapes, strict=True)]


def measure_smoothing(framework: str, shape: LinearShape, schedule: Schedule) -> list[Row]:
    """Return processor time and memory of each linear loss, without smoothing and with it, in turns."""
    on = engine(framework)
    arguments = on.linear_arguments(shape, "float32", "cpu")
    with on.settings():
        programs = [
            on.program(loss, function, arguments, "cpu", True)
            for loss, *pair in _with_smoothing(framework)
            for function in pair
        ]
        on_processor = [each._replace(case=each.case._replace(clock=processor_clock)) for each in programs]
        return _rows(on_processor, schedule)


def errors_of_smoothing(framework: str, shape: LinearShape) -> dict[str, list[float]]:
    """Return the errors of loss and gradients in bfloat16, relative to the largest, against float64."""
    on = engine(framework)
    narrow = on.linear_arguments(shape, "bfloat16", "cpu")
    usual = available(framework, LINEAR, "device")
    _, of_all_logits = usual["lsce, on all logits"]
    smoothed = {loss.name: function for loss, _, function in _with_smoothing(framework)}
    smoothed |= {"lsce linear, smoothed itself": usual["lsce linear"][1], "lsce, of all logits": of_all_logits}
    with on.settings():
        truth = on.results_of(of_all_logits, narrow, wide=True)
        found = {name: on.results_of(function, narrow, wide=False) for name, function in smoothed.items()}
    return {name: [_error(*pair) for pair in zip(of, truth, strict=True)] for name, of in found.items()}


def _with_smoothing(framework: str) -> list[tuple[Loss, Function, Function]]:
    """Return each linear loss with its mean without smoothing and with it."""
    add: Any = importlib.import_module(f"benchmarks.engines.calls_{framework}").add_smoothing
    return [
        (loss, _mean_of(function) if loss.of_rows else function, add(function, loss.of_rows))
        for loss, function in available(framework, LINEAR, ADDED).values()
    ]


def _mean_of(function: Function) -> Function:
    return lambda *given: function(*given).mean()


def _error(value: Any, true: Any) -> float:
    return float(np.max(np.abs(value - true)) / np.max(np.abs(true)))


def _rows(programs: Sequence[Program], schedule: Schedule) -> list[Row]:
    """Return time and memory of programs, in turns."""
    memory = []
    for case, facts in programs:
        case.run(*case.arguments())  # compiles, and starts threads
        memory.append(facts()["memory"])
    cases = [program.case for program in programs]
    return make_rows(cases, time_in_turns(cases, schedule), memory)


# --- Results of the commands ----------------------------------------------------------------------------------------


def dense_results(
    frameworks: Sequence[str],
    shapes: Sequence[Shape],
    rounds: int,
    calls: int,
    device: str,
    allocator: str,
    with_compiled: bool,
    quick: bool,
) -> list[dict[str, Any]]:
    """Return what `measure_dense` finds, for JSON: for each framework, allocator and shape."""
    results = []
    for framework in _in_this_process(frameworks, device, allocator):
        for shape in shapes:
            if framework == "torch" or shape.pixels == 1:  # Optax has the classes last
                few = shape.logits_bytes <= 4 * FEW_LOGITS and not quick
                schedule = Schedule(rounds, calls * MORE_CALLS if few else calls)
                rows = measure_dense(framework, shape, schedule, device, with_compiled)
                results.append({"framework": framework, "shape": shape.sizes, "rows": _figures(rows)})
    if _also_kept(frameworks, device, allocator):
        given = [part for shape in shapes for part in ("--shape", "x".join(map(str, shape.sizes)))]
        given += ["--rounds", str(rounds), "--calls", str(calls), *(["--compiled"] if with_compiled else [])]
        results += with_kept_pages("dense", [*given, *(["--quick"] if quick else [])])
    return results


def linear_results(
    frameworks: Sequence[str], shapes: Sequence[LinearShape], schedule: Schedule, device: str, allocator: str
) -> list[dict[str, Any]]:
    """Return what `measure_linear` finds, likewise."""
    results = [
        {"framework": name, "shape": shape, "rows": _figures(measure_linear(name, shape, schedule, device))}
        for name, shape in product(_in_this_process(frameworks, device, allocator), shapes)
    ]
    if _also_kept(frameworks, device, allocator):
        given = [part for shape in shapes for part in ("--shape", "x".join(map(str, shape)))]
        given += ["--rounds", str(schedule.rounds), "--calls", str(schedule.calls)]
        results += with_kept_pages("linear", given)
    return results


def scaling_results(
    frameworks: Sequence[str], shapes: Sequence[LinearShape], schedule: Schedule, device: str, allocator: str
) -> list[dict[str, Any]]:
    """Return what `measure_scaling` finds, for each framework."""
    return [
        {"framework": name, "shapes": shapes, "rows": _figures(measure_scaling(name, shapes, schedule, device))}
        for name in _in_this_process(frameworks, device, allocator)
    ]


def smoothing_results(
    frameworks: Sequence[str], shape: LinearShape, of_errors: LinearShape, schedule: Schedule, threads: int | None
) -> list[dict[str, Any]]:
    """Return what `measure_smoothing` and `errors_of_smoothing` find, for each framework."""
    results = []
    for name in frameworks:
        if name == "torch" and threads is not None:
            engine(name).set_threads(threads)
        found = {"rows": _figures(measure_smoothing(name, shape, schedule)), "error shape": of_errors}
        results.append({"framework": name, "shape": shape, **found, "errors": errors_of_smoothing(name, of_errors)})
    return results


def _figures(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [row._asdict() | {"median_ms": row.milliseconds, "least_ms": row.least_milliseconds} for row in rows]


def _in_this_process(frameworks: Sequence[str], device: str, allocator: str) -> list[str]:
    """Return the frameworks that this process measures, with the allocator that it has."""
    return [name for name in frameworks if name != "torch" or device != "cpu" or allocator != "kept"]


def _also_kept(frameworks: Sequence[str], device: str, allocator: str) -> bool:
    return "torch" in frameworks and device == "cpu" and allocator in {"kept", "both"}


def with_kept_pages(command: str, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Return what a command measures of torch in a process whose allocator keeps its pages; nothing without glibc."""
    if platform.libc_ver()[0] != "glibc":
        return []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        fixed = ["--framework", "torch", "--allocator", "here", "--json", str(file)]
        subprocess.run(
            [sys.executable, "-m", "benchmarks", command, *arguments, *fixed],
            cwd=ROOT,
            env=os.environ | KEPT_PAGES,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        results: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))[command]
    return [result | {"allocator": "kept"} for result in results]
