"""Times the losses of a list in this process, in turns: for `benchmarks dense`, `linear` and `smoothing`."""

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

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
