"""Linear losses of torch that have no smoothing, and what it costs to add it: time, memory, and errors in bfloat16."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lsce_torch
from benchmarks.engines import linear_torch
from benchmarks.engines.timing import LinearShape, Row, Schedule, processor_clock

UNSMOOTHED = partial(lsce_torch.linear_label_smoothed_cross_entropy, smoothing=0.0)
ROWS = partial(UNSMOOTHED, reduction="none")
add = partial(lsce_torch.linear_add_smoothing, smoothing=0.1)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def of_rows(loss: Loss) -> Loss:
    """Return the mean of a loss of each row, smoothed."""
    return lambda hidden, weight, labels: add(loss(hidden, weight, labels), hidden, weight, labels).mean()


def of_mean(loss: Loss) -> Loss:
    """Return a loss that is a mean, smoothed."""

    def smoothed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        zeros = hidden.new_zeros(labels.shape)
        return loss(hidden, weight, labels) + add(zeros, hidden, weight, labels).mean()

    return smoothed


def cross_entropy_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return torch's loss of each row, from all logits, in float32."""
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")


# Name -> the loss without smoothing, and with it.
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "F.cross_entropy, each row": (lambda *given: cross_entropy_rows(*given).mean(), of_rows(cross_entropy_rows)),
    "lsce linear": (UNSMOOTHED, of_mean(UNSMOOTHED)),
    "lsce linear, each row": (lambda *given: ROWS(*given).mean(), of_rows(ROWS)),
}
if hasattr(F, "linear_cross_entropy"):  # torch 2.13
    in_chunks: Loss = partial(F.linear_cross_entropy, options=nn.LinearCrossEntropyOptions())
    LOSSES = {
        "F.linear_cross_entropy": (F.linear_cross_entropy, of_mean(F.linear_cross_entropy)),
        "F.linear_cross_entropy, chunked": (in_chunks, of_mean(in_chunks)),
        **LOSSES,
    }


def set_threads(number: int) -> None:
    """Set how many threads torch uses."""
    torch.set_num_threads(number)


def measure(shape: LinearShape, schedule: Schedule) -> list[Row]:
    """Return time and peak memory of each loss with its gradients, without smoothing and with it, in turns."""
    arguments = linear_torch.make_arguments(shape)
    cases = [linear_torch.loss_case(name, loss, arguments, "cpu") for name, pair in LOSSES.items() for loss in pair]
    return linear_torch.measure_cases([case._replace(clock=processor_clock) for case in cases], schedule, "cpu")


def errors(shape: LinearShape) -> dict[str, list[float]]:
    """Return the errors of loss and gradients in bfloat16, relative to the largest, against float64."""
    narrow = linear_torch.make_arguments(shape, dtype=torch.bfloat16)
    wide = tuple(of.detach().double().requires_grad_() if of.is_floating_point() else of for of in narrow)
    truth = linear_torch.loss_and_gradients(linear_torch.on_logits(_dense), *wide)
    losses = {name: smoothed for name, (_, smoothed) in LOSSES.items()}
    losses |= {
        "lsce linear, smoothed itself": linear_torch.LINEAR,
        "lsce, of all logits": linear_torch.on_logits(_dense),
    }
    found: dict[str, list[float]] = {}
    for name, loss in losses.items():
        result = linear_torch.loss_and_gradients(loss, *narrow)
        found[name] = [_error(one, other) for one, other in zip(result, truth, strict=True)]
    return found


def _dense(logits: Tensor, labels: Tensor) -> Tensor:
    return lsce_torch.label_smoothed_cross_entropy(logits, labels, smoothing=0.1)


def _error(value: Any, true: Any) -> float:
    value, true = value.detach().double(), true.detach()
    return float((value - true).abs().max() / true.abs().max())
