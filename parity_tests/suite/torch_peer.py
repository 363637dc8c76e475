"""torch.nn.CrossEntropyLoss as a peer: its argument space as cases, and how to run it."""

import zlib
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import lsce_torch
from parity_tests.suite.drop_in import (
    REDUCTIONS,
    SMOOTHINGS,
    TORCH,
    PeerSetting,
    as_result,
    hard_logits,
    make_setting,
    rows_of,
)
from parity_tests.truth.cases import Case, soft_labels
from parity_tests.truth.comparison import Result
from parity_tests.truth.precision import FloatArray, round_to

MODULES = (torch.nn.CrossEntropyLoss, lsce_torch.LabelSmoothedCrossEntropyLoss)
SHAPES = {"[C]": (7,), "[N, C]": (6, 5), "[N, C, d1]": (3, 4, 5), "[N, C, d1, d2]": (2, 6, 3, 2)}
WEIGHTS = ("none", "random", "with zeros")
IGNORED = ("-100", "a class", "-1")
each_shape = pytest.mark.parametrize("form", SHAPES)


@cache
def torch_settings(form: str, soft: bool) -> tuple[PeerSetting, ...]:
    return tuple(_torch_settings(form, soft))


def _torch_settings(form: str, soft: bool) -> Iterator[PeerSetting]:
    generator = np.random.default_rng(zlib.crc32(f"{form} {soft}".encode()))
    axis, shape = min(1, len(SHAPES[form]) - 1), SHAPES[form]
    batch_shape, num_classes = shape[:axis] + shape[axis + 1 :], shape[axis]
    num_rows = int(np.prod(batch_shape))
    indices = np.asarray(generator.integers(num_classes, size=batch_shape))
    first = int(indices.ravel()[0])
    probabilities = soft_labels("float64", generator, (num_rows, num_classes))
    probabilities[-1] *= 1.75  # torch asks for no sum of 1
    random = generator.uniform(0.25, 4, num_classes)
    # A class that occurs, which makes the denominator smaller, and 0 where it is the only one.
    weights = {"none": None, "random": random, "with zeros": np.where(np.arange(num_classes) == first, 0.0, random)}
    logits = hard_logits(generator, num_rows, num_classes, indices if not soft else probabilities)

    def placed(rows: FloatArray) -> FloatArray:
        return np.moveaxis(rows.reshape(*batch_shape, num_classes), -1, axis)

    of_row = round_to(generator.uniform(-2, 2, batch_shape), "float64")
    for weight, ignored, reduction, smoothing in product(WEIGHTS, IGNORED, REDUCTIONS, SMOOTHINGS):
        if soft and ignored == "a class":
            continue  # neither takes it
        labels, ignore_index = indices.copy(), first if ignored == "a class" else int(ignored)
        if num_rows > 1:
            labels.ravel()[1] = ignore_index
        case = Case(
            f"{form}, weight {weight}, ignore_index {ignored}, {reduction}, smoothing {smoothing}",
            "float64",
            placed(logits),
            placed(probabilities) if soft else labels,
            {"reduction": reduction} if soft else {"reduction": reduction, "ignore_index": ignore_index},
            smoothing,
            axis,
            class_weight=weights[weight],
            upstream=of_row if reduction == "none" else np.asarray(-0.75),
        )
        yield make_setting(case, TORCH, ignore_index)


def arguments(setting: PeerSetting) -> dict[str, Any]:
    """Return the arguments of torch.nn.CrossEntropyLoss."""
    case = setting.case
    return {
        "weight": None if case.class_weight is None else torch.from_numpy(case.class_weight.copy()),
        "ignore_index": setting.ignore_index,
        "reduction": case.options["reduction"],
        "label_smoothing": case.smoothing,
    }


def in_memory(array: NDArray[Any], layout: str) -> torch.Tensor:
    """Return a tensor of these values with its dimensions in another order, or with gaps, in memory."""
    tensor = torch.from_numpy(array.copy())
    if layout == "contiguous" or tensor.ndim == 0:
        return tensor
    if layout == "strided":
        return torch.stack([tensor, torch.full_like(tensor, 7)], dim=-1)[..., 0]
    if layout == "channels last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if tensor.ndim > 2 else tensor
    order = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(order).contiguous().permute(order)


def layouts(form: str) -> tuple[str, ...]:
    return ("contiguous", "strided", "transposed", "channels last")[: 1 + len(SHAPES[form])]


def run_torch(loss_fn: Callable[..., Any], setting: PeerSetting, layout: str = "contiguous") -> Result:
    case = setting.case
    logits = in_memory(case.logits, layout).requires_grad_()
    loss = loss_fn(logits, in_memory(case.labels, layout))
    (loss * torch.from_numpy(np.asarray(case.upstream))).sum().backward()
    return as_result(case, loss.detach().numpy(), logits.grad.numpy())


def torch_leaf_gradients(setting: PeerSetting, loss_class: Callable[..., Any]) -> dict[str, FloatArray]:
    """Return the gradients with respect to soft labels, and to the class weights if there are any."""
    case, loss_fn = setting.case, loss_class(**arguments(setting))
    labels = torch.from_numpy(case.labels.copy()).requires_grad_()
    if loss_fn.weight is not None:
        loss_fn.weight.requires_grad_()
    loss = loss_fn(torch.from_numpy(case.logits), labels)
    (loss * torch.from_numpy(np.asarray(case.upstream))).sum().backward()
    gradients = {"labels": rows_of(case, labels.grad.numpy())}
    return gradients if loss_fn.weight is None else {**gradients, "weight": loss_fn.weight.grad.numpy()}


@cache
def torch_peers() -> tuple[list[PeerSetting], list[Result]]:
    settings = [each for form in SHAPES for soft in (False, True) for each in torch_settings(form, soft)]
    settings = [each for each in settings if not each.divides_by_zero]
    return settings, [run_torch(torch.nn.CrossEntropyLoss(**arguments(each)), each) for each in settings]
