"""The last linear layer, loss and gradients in torch, eager."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

import lsce_torch
from benchmarks.engines import dense_torch
from benchmarks.engines.timing import Case, LinearShape, Row, Schedule, make_rows, time_in_turns
from lsce_spec import ChunkOptions
from lsce_torch.chunked import preferred_rows

Hidden, Weight, Labels = Float[Tensor, "N D"], Float[Tensor, "K D"], Int[Tensor, " N"]
LossFunction = Callable[[Hidden, Weight, Labels], Any]

LINEAR = partial(lsce_torch.linear_label_smoothed_cross_entropy, smoothing=0.1)


def on_logits(loss: dense_torch.LossFunction) -> LossFunction:
    """Return a loss that is given all logits."""
    return lambda hidden, weight, labels: loss(hidden @ weight.T, labels)


# The first is what the others are compared with.
LOSSES: dict[str, LossFunction] = {"F.cross_entropy, smoothed": on_logits(dense_torch.SMOOTHED)}
if hasattr(F, "linear_cross_entropy"):  # torch 2.13
    LOSSES |= {
        "F.linear_cross_entropy, smoothed": partial(F.linear_cross_entropy, label_smoothing=0.1),
        # Unsmoothed: with smoothing it would warn, and take all rows at once.
        "F.linear_cross_entropy, chunked": lambda hidden, weight, labels: F.linear_cross_entropy(
            hidden, weight, labels, options=nn.LinearCrossEntropyOptions()
        ),
    }
LOSSES |= {
    "lsce fused": on_logits(dense_torch.FUSED),
    "lsce linear": LINEAR,
    "lsce linear, recompute": partial(LINEAR, recompute=True),
    "lsce linear, none then mean": lambda *given: LINEAR(*given, reduction="none").mean(),
    "lsce linear, with statistics": partial(lsce_torch.linear_label_smoothed_cross_entropy_with_stats, smoothing=0.1),
}


def measure(shape: LinearShape, schedule: Schedule, device: str = "cpu") -> list[Row]:
    """Return time and peak memory of each loss with its gradients, and of the floor."""
    return measure_cases(make_cases(shape, device), schedule, device)


def measure_scaling(shapes: Sequence[LinearShape], schedule: Schedule, device: str = "cpu") -> list[Row]:
    """Return time of the linear loss with its gradients for each shape, and peak memory beyond the gradients."""
    linear = LOSSES["lsce linear"]
    cases = [loss_case(str(shape.rows), linear, make_arguments(shape, device), device) for shape in shapes]
    rows = measure_cases(cases, schedule, device)
    return [row._replace(memory=row.memory - shape.gradient_bytes) for row, shape in zip(rows, shapes, strict=True)]


def make_cases(shape: LinearShape, device: str = "cpu") -> list[Case]:
    """Return what to time."""
    arguments = make_arguments(shape, device)
    losses = [loss_case(name, function, arguments, device) for name, function in LOSSES.items()]
    clock = dense_torch.clock_of(device)
    return [*losses, Case("floor: three matrix products", products, lambda: arguments, True, clock)]


def make_arguments(
    shape: LinearShape, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Hidden, Weight, Labels]:
    """Return what a loss is given; logits of variance 1."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape.rows, shape.features, generator=generator)
    weight = torch.randn(shape.classes, shape.features, generator=generator) / shape.features**0.5
    labels = torch.randint(shape.classes, (shape.rows,), generator=generator)
    return hidden.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_(), labels.to(device)


def loss_and_gradients(
    function: LossFunction, hidden: Hidden, weight: Weight, labels: Labels
) -> tuple[Any, Hidden, Weight]:
    """Return what the function does, the loss first, and the gradients of the loss."""
    output = function(hidden, weight, labels)
    loss = output[0] if isinstance(output, tuple) else output
    return output, *torch.autograd.grad(loss, (hidden, weight))


@torch.no_grad()
def products(hidden: Hidden, weight: Weight, labels: Labels) -> tuple[Hidden, Weight]:
    """Only the products, some rows at a time: with the logits in the place of their gradient."""
    del labels
    of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    size = ChunkOptions().rows_at_most(preferred_rows(hidden.shape[1]), weight.shape[0])
    buffer = hidden.new_empty(min(size, hidden.shape[0]), weight.shape[0])
    for rows, of_rows in zip(hidden.split(size), of_hidden.split(size), strict=True):
        logits = torch.mm(rows, weight.T, out=buffer[: rows.shape[0]])
        torch.mm(logits, weight, out=of_rows)
        of_weight.addmm_(logits.T, rows)
    return of_hidden, of_weight


def loss_case(name: str, function: LossFunction, arguments: tuple[Hidden, Weight, Labels], device: str) -> Case:
    """Return what to time of a loss: itself and its gradients."""
    run = partial(loss_and_gradients, function)
    return Case(name, run, lambda: arguments, clock=dense_torch.clock_of(device))


def measure_cases(cases: Sequence[Case], schedule: Schedule, device: str) -> list[Row]:
    """Return time and peak memory of cases, in turns."""
    memory = []
    for case in cases:
        case.run(*case.arguments())  # starts threads
        memory.append(dense_torch.peak_bytes(case, device))
    timed = time_in_turns(cases, schedule)
    return make_rows(cases, timed, memory)
