"""What lsce_torch does on a device, seen on a CPU: `lsce_torch.device` says that the tensors are elsewhere."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lsce_torch import (
    chunked,
    device,
    label_smoothed_cross_entropy,
    label_smoothed_cross_entropy_with_stats,
    layer,
    linear_label_smoothed_cross_entropy,
    linear_label_smoothed_cross_entropy_with_stats,
)
from lsce_torch.metrics import MeanLoss
from parity_tests.losses.triton_kernels import float32_products

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


# What waits for the device.
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}


@pytest.mark.parametrize("name", CHUNKED)
def test_a_gpu_is_waited_for_once_at_most(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the rows that count; not at all where that is not possible or not wanted."""
    options = {**SHARED, **CHUNKED[name]}
    with recorded_on("cuda") as operations:
        linear(options, with_stats=True)
    assert [name for name in operations.names if name in WAITS] == ["nonzero"]
    monkeypatch.setattr(chunked, "may_wait", lambda tensor: False)
    with recorded_on("cuda") as operations:
        linear(options, with_stats=True)
    assert not WAITS & set(operations.names)


@pytest.mark.parametrize(
    ("is_capturing", "debug_mode", "expected"), [(False, 0, True), (True, 0, False), (False, 1, False)]
)
def test_when_to_wait(is_capturing: bool, debug_mode: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither while a graph is captured, nor where torch.cuda.set_sync_debug_mode warns of it or forbids it."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: debug_mode)
    assert device.may_wait(SimpleNamespace(is_cuda=True)) is expected
    assert device.may_wait(LABELS)


@contextmanager
def on_kind_of_device(kind: str) -> Iterator[Recorded]:
    """A device whose products of narrow tensors are narrow, or an NVIDIA GPU, which adds them to float32 sums."""
    device_type, _, with_products = kind.partition(", ")
    with ExitStack() as stack:
        if with_products:
            stack.enter_context(float32_products())
        yield stack.enter_context(recorded_on(device_type))


KINDS = ["tpu", "cuda", "cuda, float32 products"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_every_class_reaches_the_weight(kind: str) -> None:
    """Of a narrow layer with more classes than are added at a time. Equal logits of 2^14 classes: all is exact."""
    classes = 2**14
    hidden = torch.ones(3, 2, dtype=torch.bfloat16)
    weight = torch.zeros(classes, 2, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.full((3,), classes - 1)
    with on_kind_of_device(kind):
        loss = linear_label_smoothed_cross_entropy(hidden, weight, labels, smoothing=0.0, reduction="sum", chunk_size=1)
        loss.backward()
    assert weight.grad is not None
    expected = torch.full((classes, 2), 3 * 2.0**-14, dtype=torch.bfloat16)
    expected[-1] = -3  # 3 (2^-14 - 1), rounded
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradient_filter", [0.0, 2.0**-60])
def test_products_are_not_rounded_where_they_are_added_in_float32(kind: str, gradient_filter: float) -> None:
    """With a gradient of 1/2 - 5/16 and its negative: products with 1 + 2^-7 that bfloat16 does not have.

    With a filter, which here leaves out nothing, 1/2 is multiplied, and -5/16 in float32.
    """
    hidden = torch.full((2, 1), 1 + 2.0**-7, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, requires_grad=True)
    options: dict[str, Any] = {
        "smoothing": 0.625,
        "reduction": "sum",
        "chunk_size": 1,
        "gradient_filter": gradient_filter,
    }
    with on_kind_of_device(kind):
        linear_label_smoothed_cross_entropy(hidden, weight, torch.tensor([1, 1]), **options).backward()
    one = torch.tensor([[0.1875], [-0.1875]]) * (1 + 2.0**-7)
    assert torch.all(one != one.bfloat16())
    assert weight.grad is not None
    assert torch.equal(weight.grad, 2 * (one if kind == KINDS[-1] or gradient_filter else one.bfloat16()))


@pytest.mark.parametrize("kind", KINDS[:2])
def test_classes_that_become_0_change_the_gradient_within_the_bound(kind: str) -> None:
    """Of `gradient_filter`, in float32; and by more than the roundings."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (2 * torch.randn(shape, generator=generator) for shape in ((N, D), (K, D)))
    threshold, roundings = 0.05, 8 * N * K * 2.0**-23

    def gradients(**options: float) -> tuple[torch.Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        with on_kind_of_device(kind):
            linear_label_smoothed_cross_entropy(
                leaves[0], leaves[1], LABELS.abs() % K, smoothing=0.1, reduction="sum", chunk_size=3, **options
            ).backward()
        return tuple(leaf.grad for leaf in leaves if leaf.grad is not None)

    bounds = (threshold * weight.abs().sum(0), threshold * hidden.abs().sum(0))
    for exact, filtered, bound in zip(gradients(), gradients(gradient_filter=threshold), bounds, strict=True):
        assert torch.all((exact - filtered).abs() <= bound + roundings)
        assert torch.any((exact - filtered).abs() > roundings)


def test_products_in_float32_are_tried() -> None:
    """Where torch lacks them, and where it does something else."""
    cpu = torch.device("cpu")
    tried = layer._has_float32_products.__wrapped__
    assert not tried(cpu, torch.bfloat16, False)
    with float32_products():
        assert tried(cpu, torch.bfloat16, False)
        with mock.patch.object(torch, "baddbmm"):  # adds nothing
            assert not tried(cpu, torch.bfloat16, False)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_gradient_is_scaled_in_one_operation(narrow: torch.dtype) -> None:
    """Which rounds its result, and nothing else; a GPU would round a scalar to the narrow dtype before."""
    upstream = torch.tensor(2.0**17 / 3)  # more than float16 has
    for dtype in (narrow, torch.float32):
        gradient = torch.linspace(-(2.0**-10), 2.0**-10, 6).reshape(3, 2).to(dtype)
        expected = (gradient.float() * upstream).to(narrow)
        with recorded_on("cuda") as operations:
            result = layer.scaled(gradient, upstream, narrow)
        assert torch.equal(result, expected)
        assert result.isfinite().all()
        assert (result.data_ptr() == gradient.data_ptr()) == (dtype == narrow)
        assert operations.names[-1] == "mul"
        assert "_to_copy" not in operations.names
