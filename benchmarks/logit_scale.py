"""What a scale costs that is multiplied with the logits, or with the features before the last layer.

    python -m benchmarks.logit_scale

flash-attention's loss has an argument `logit_scale`; here a user writes the product. The figures are the time of the
processor, of all threads together, which other programs change less.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from rich.console import Console

import lsce_jax
import lsce_torch
from benchmarks.engines.timing import Case, LinearShape, Schedule, time_in_turns
from benchmarks.pages.tables import Table, print_table

SHAPES = (LinearShape(1024, 512, 32000), LinearShape(4096, 512, 1000))
PLAIN, FIXED, LEARNED = "no scale", "fixed scale", "learned scale"
DENSE, LINEAR = "dense loss, of logits", "linear loss, of features"
TIMED = {DENSE: (PLAIN, FIXED, LEARNED), LINEAR: (PLAIN, LEARNED)}


def _scaled(loss: Callable[..., Any], labels: Any, variant: str) -> Callable[..., Any]:
    """Return the loss as a function of the scale, of what is scaled, and of the weight if there is one."""

    def function(scale: Any, first: Any, *weight: Any) -> Any:
        factor = {PLAIN: 1, FIXED: 0.07, LEARNED: scale}[variant]
        return loss(first if variant == PLAIN else factor * first, *weight, labels, smoothing=0.1, reduction="mean")

    return function


def _processor_clock(call: Callable[[], object]) -> tuple[object, float]:
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def _torch_case(name: str, function: Callable[..., Any], arguments: list[Any], with_scale: bool) -> Case:
    leaves = [torch.from_numpy(value).requires_grad_() for value in arguments]

    def run(*given: Any) -> Any:
        return torch.autograd.grad(function(*given), given if with_scale else given[1:])

    return Case(name, run, lambda: tuple(leaves), clock=_processor_clock)


def _jax_case(name: str, function: Callable[..., Any], arguments: list[Any], with_scale: bool) -> Case:
    given = tuple(map(jax.numpy.asarray, arguments))
    step = jax.jit(jax.value_and_grad(function, argnums=tuple(range(0 if with_scale else 1, len(given)))))
    return Case(name, lambda *operands: jax.block_until_ready(step(*operands)), lambda: given, clock=_processor_clock)


def measure(framework: str, shape: LinearShape, schedule: Schedule) -> dict[str, dict[str, float]]:
    """Return the least milliseconds of loss and gradients, by loss and variant."""
    random = np.random.default_rng(0)
    scale, labels = np.full((), 0.07, np.float32), random.integers(shape.classes, size=shape.rows)
    hidden = random.normal(size=(shape.rows, shape.features)).astype(np.float32)
    weight = (random.normal(size=(shape.features, shape.classes)) / shape.features**0.5).astype(np.float32)
    package, make = (lsce_torch, _torch_case) if framework == "torch" else (lsce_jax, _jax_case)
    labels = torch.from_numpy(labels) if framework == "torch" else jax.numpy.asarray(labels)
    weight_as_given = np.ascontiguousarray(weight.T) if framework == "torch" else weight
    found = {}
    for name, loss, operands in (
        (DENSE, package.label_smoothed_cross_entropy, [scale, hidden @ weight]),
        (LINEAR, package.linear_label_smoothed_cross_entropy, [scale, hidden, weight_as_given]),
    ):
        variants = TIMED[name]
        cases = [make(v, _scaled(loss, labels, v), operands, v == LEARNED) for v in variants]
        timed = time_in_turns(cases, schedule)
        found[name] = {v: 1e3 * of.least_seconds for v, of in zip(variants, timed, strict=True)}
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print a table for each framework."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.logit_scale", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, to see whether it works")
    quick = parser.parse_args(arguments).quick
    shapes = (LinearShape(32, 8, 50),) if quick else SHAPES
    schedule = Schedule(rounds=1, calls=1) if quick else Schedule(rounds=5, calls=4)
    for framework in ("jax", "torch"):
        rows = []
        for shape in shapes:
            for loss, times in measure(framework, shape, schedule).items():
                size = f"{shape.rows} x {shape.classes}"
                rows.append([f"{loss}, {size}", *(f"{times[v]:.1f}" if v in times else "" for v in TIMED[DENSE])])
        title = f"{framework}: loss and gradients, least ms of the processor"
        print_table(Table(title, ("", *TIMED[DENSE]), rows), Console())


if __name__ == "__main__":
    main()
