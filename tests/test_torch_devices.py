"""What lsce_torch does on a device, seen on a CPU: `lsce_torch.device` says that the tensors are elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lsce_torch import (
    device,
    label_smoothed_cross_entropy,
    label_smoothed_cross_entropy_with_stats,
    linear_label_smoothed_cross_entropy,
    linear_label_smoothed_cross_entropy_with_stats,
)
from lsce_torch.metrics import MeanLoss

N, D, K = 7, 4, 6
LABELS = torch.tensor([0, 1, 2, 3, 4, 5, -100])
CLASS_WEIGHT, CLASS_MASK = torch.arange(1.0, K + 1), torch.tensor([True] * (K - 1) + [False])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "class_weight": {"class_weight": CLASS_WEIGHT},
    "class_mask": {"class_mask": CLASS_MASK},
    "prior": {"prior": CLASS_WEIGHT / CLASS_WEIGHT.sum(), "subtract_entropy": True},
    "max_sup": {"convention": "max_sup"},
    "softcap": {"softcap": 3.0, "z_loss": 0.1},
    "subtract_entropy": {"subtract_entropy": True},
    "denominator": {"denominator": 3.0},
    "none": {"reduction": "none"},
    "where": {"where": True},
}
CHUNKED = {
    **{name: {"chunk_size": 3, **options} for name, options in OPTIONS.items()},
    "recompute": {"recompute": True},
    "gradient_filter": {"gradient_filter": 0.1},
}
SHARED = {"smoothing": 0.1, "ignore_index": -100, "bad_labels": "nan"}


class Recorded(TorchDispatchMode):
    """The names of torch's operations."""

    def __init__(self) -> None:
        """Start with none."""
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(operation._schema.name.removeprefix("aten::"))
        return operation(*args, **(kwargs or {}))

    @property
    def copies(self) -> int:
        """How many tensors were made of Python's numbers, which a device gets by a copy from the host."""
        return self.names.count("lift_fresh")


@contextmanager
def recorded_on(device_type: str) -> Iterator[Recorded]:
    with mock.patch.object(device, "device_type", return_value=device_type), Recorded() as operations:
        yield operations


def dense(options: dict[str, Any], with_stats: bool) -> None:
    logits = torch.linspace(-3, 3, N * K).reshape(N, K).requires_grad_()
    call = label_smoothed_cross_entropy_with_stats if with_stats else label_smoothed_cross_entropy
    backward(call(logits, LABELS, **options))


def linear(options: dict[str, Any], with_stats: bool) -> None:
    hidden = torch.linspace(-1, 1, N * D).reshape(N, D).requires_grad_()
    weight = torch.linspace(-2, 2, K * D).reshape(K, D).requires_grad_()
    call = linear_label_smoothed_cross_entropy_with_stats if with_stats else linear_label_smoothed_cross_entropy
    backward(call(hidden, weight, LABELS, **options))


def backward(result: Any) -> None:
    loss = result[0] if isinstance(result, tuple) else result
    loss.sum().backward()


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("implementation", ["fused", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
def test_no_number_is_copied_to_the_device(device_type: str, implementation: str, name: str) -> None:
    """A CUDA device is waited for at each copy, which a CUDA graph cannot record either, nor can TorchTPU's tracer."""
    for with_stats in (False, True):
        with recorded_on(device_type) as operations:
            dense({**SHARED, **OPTIONS[name], "implementation": implementation}, with_stats)
        assert operations.names
        assert not operations.copies


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize(
    ("implementation", "name"), [*(("chunked", name) for name in CHUNKED), *(("reference", name) for name in OPTIONS)]
)
def test_no_number_is_copied_for_the_linear_loss(device_type: str, implementation: str, name: str) -> None:
    options = CHUNKED if implementation == "chunked" else OPTIONS
    for with_stats in (False, True):
        with recorded_on(device_type) as operations:
            linear({**SHARED, **options[name], "implementation": implementation}, with_stats)
        assert operations.names
        assert not operations.copies


def test_no_number_is_copied_for_a_metric() -> None:
    _, stats = label_smoothed_cross_entropy_with_stats(torch.zeros(N, K), LABELS, ignore_index=-100)
    metric = MeanLoss()
    with recorded_on("cuda") as operations:
        metric.update(stats=stats, denominator=4.0)
    assert not operations.copies


def test_a_copied_number_is_seen() -> None:
    with recorded_on("cuda") as operations:
        torch.as_tensor(0.1)
        torch.full((), 0.1)
    assert operations.copies == 1


@pytest.mark.parametrize("name", CHUNKED)
def test_a_tpu_takes_plain_operations(name: str) -> None:
    """No class is looked up or written by its index there, and no shape depends on a value."""
    options = {**SHARED, **CHUNKED[name]}
    with recorded_on("tpu") as operations:
        linear(options, with_stats=True)
    assert not {"nonzero", "index_add_", "scatter_", "scatter", "gather"} & set(operations.names)
    with recorded_on("cpu") as operations:
        linear(options, with_stats=True)
    assert {"nonzero", "scatter_"} & set(operations.names)


def test_the_gradient_of_every_class_reaches_the_weight() -> None:
    """Of a narrow layer with more classes than a CPU takes at a time. Equal logits of 2^14 classes: all is exact."""
    classes = 2**14
    hidden = torch.ones(1, 2, dtype=torch.bfloat16)
    weight = torch.zeros(classes, 2, dtype=torch.bfloat16, requires_grad=True)
    with recorded_on("tpu"):
        loss = linear_label_smoothed_cross_entropy(hidden, weight, torch.tensor([classes - 1]), smoothing=0.0)
        loss.backward()
    assert weight.grad is not None
    expected = torch.full((classes, 2), 2.0**-14, dtype=torch.bfloat16)
    expected[-1] = -1  # 2^-14 - 1, rounded
    assert torch.equal(weight.grad, expected)
