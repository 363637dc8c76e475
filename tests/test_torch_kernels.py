"""Which calls take the kernels for GPUs, and what is said where they cannot. No kernel runs here.

parity_tests/suite/test_triton.py runs them in Triton's interpreter, and test_triton_compiled.py compiles them.
"""

import logging
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lsce_torch import (
    device,
    kernels,
    label_smoothed_cross_entropy,
    label_smoothed_cross_entropy_with_stats,
    linear_label_smoothed_cross_entropy,
)
from lsce_torch.kernels import launch

LOGITS, LABELS = torch.linspace(-3, 3, 20).reshape(4, 5), torch.tensor([0, 1, 2, 4])
LAYER = (torch.ones(4, 2), torch.ones(5, 2), LABELS)


@pytest.fixture(autouse=True)
def no_kernel_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("a kernel was started")

    monkeypatch.setattr(launch, "_run", start)


@pytest.mark.skipif(kernels.is_interpreted(), reason="Triton's interpreter takes tensors of the CPU")
def test_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_is_installed", lambda: True)
    reason = (
        r"implementation='triton' cannot compute this call: the logits are on the device 'cpu'. .*TRITON_INTERPRET=1"
    )
    with pytest.raises(ValueError, match=f"{reason}.*Leave out the implementation, or choose 'fused'"):
        label_smoothed_cross_entropy(LOGITS, LABELS, implementation="triton")
    with pytest.raises(ValueError, match=reason):
        label_smoothed_cross_entropy_with_stats(LOGITS, LABELS, implementation="triton")
    with pytest.raises(ValueError, match=f"{reason}.*choose 'chunked'"):
        linear_label_smoothed_cross_entropy(*LAYER, implementation="triton")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_is_installed", lambda: False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        label_smoothed_cross_entropy(LOGITS, LABELS, implementation="triton")
    # On a GPU the choice falls on the other implementation.
    monkeypatch.setattr(device, "device_type", lambda _: "cuda")
    expected = label_smoothed_cross_entropy(LOGITS, LABELS, implementation="fused")
    assert torch.equal(label_smoothed_cross_entropy(LOGITS, LABELS), expected)


def test_tensors_without_values() -> None:
    with pytest.raises(ValueError, match="the logits hold no values"):
        label_smoothed_cross_entropy(LOGITS.to("meta"), LABELS.to("meta"), implementation="triton")
    with FakeTensorMode() as mode:
        logits, labels = mode.from_tensor(LOGITS), mode.from_tensor(LABELS)
        with pytest.raises(ValueError, match="the logits hold no values"):
            label_smoothed_cross_entropy(logits, labels, implementation="triton")


def test_what_only_the_reference_computes() -> None:
    with pytest.raises(ValueError, match="convention 'max_sup' compares soft labels"):
        label_smoothed_cross_entropy(LOGITS, LOGITS.softmax(-1), convention="max_sup", implementation="triton")
    prior = torch.full((5,), 0.2, requires_grad=True)
    with pytest.raises(ValueError, match="prior requires a gradient"):
        linear_label_smoothed_cross_entropy(*LAYER, prior=prior, implementation="triton")


def test_compiled_calls() -> None:
    def loss(logits: torch.Tensor) -> torch.Tensor:
        return label_smoothed_cross_entropy(logits, LABELS, implementation="triton")

    torch.compiler.reset()
    with pytest.raises(Exception, match=r"torch\.compile chooses itself"):
        torch.compile(loss, fullgraph=True, backend="eager")(LOGITS)


def test_a_gpu_on_which_nothing_starts() -> None:
    """As where Triton finds no C compiler: the reason is said, and the loss has another way. Here there is no GPU."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert str(kernels._failure_on.__wrapped__(0)).startswith("Triton starts no kernel on the device cuda:0: ")


def test_on_the_cpu_nothing_is_chosen() -> None:
    leaf = LOGITS.clone().requires_grad_()
    label_smoothed_cross_entropy(leaf, LABELS).backward()
    label_smoothed_cross_entropy_with_stats(leaf, LABELS)
    linear_label_smoothed_cross_entropy(*LAYER)


def test_the_choice_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lsce_torch")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    monkeypatch.setattr(device, "device_type", lambda _: "cuda")
    monkeypatch.setattr(kernels, "_is_installed", lambda: False)
    try:
        label_smoothed_cross_entropy(LOGITS, LABELS)
        assert said == ["implementation of logits of shape (4, 5): not triton: Triton is not installed"]
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize(
    ("logits", "layout"),
    [
        (torch.zeros(6, 5), (6, 5, None, 5)),
        (torch.zeros(2, 3, 5), (6, 5, None, 5)),
        (torch.zeros(5), (1, 5, None, 5)),
        (torch.zeros(2, 5, 3, 4).movedim(1, -1), (24, 5, 12, 5)),
        (torch.zeros(5, 6).T, (6, 5, 6, 5)),
        (torch.zeros(6, 8)[:, :5], (6, 5, None, 8)),
        (torch.zeros(2, 3, 8)[..., :5], (6, 5, None, 8)),
        (torch.zeros(0, 5), (0, 5, None, 5)),
        # Rows in no order, rows that share memory, classes that are apart.
        (torch.zeros(3, 8, 2)[:, :5, :].movedim(1, -1), None),
        (torch.zeros(5).expand(6, 5), None),
        (torch.zeros(6, 10)[:, ::2], None),
    ],
)
def test_layouts(logits: torch.Tensor, layout: tuple[Any, ...] | None) -> None:
    found = launch.layout_of(logits)
    assert found == layout
    if found is None or not found.num_rows:
        return
    # The last logit lies where the layout says.
    numbered = torch.as_strided(torch.arange(1000.0), logits.shape, logits.stride())
    row, k = found.num_rows - 1, found.num_classes - 1
    inner = found.inner or 1
    place = row * found.row_stride + k
    if found.inner is not None:
        place = row // inner * inner * found.num_classes + row % inner + k * inner
    assert numbered.reshape(-1, found.num_classes)[row, k] == place


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("num_classes", [1, 2, 17, 64, 65, 1000, 1003, 1024, 4096, 8192, 8193, 50257, 131072])
@pytest.mark.parametrize("inner", [None, 100])
def test_plans(num_classes: int, itemsize: int, inner: int | None) -> None:
    """Sizes are powers of two, as Triton wants them, a program has no more threads than a GPU, and all rows fit it."""
    plan = launch._make_plan(launch.Layout(300, num_classes, inner, num_classes), itemsize)
    for number in (plan.rows, plan.block, plan.num_warps):
        assert number & (number - 1) == 0 < number
    assert plan.num_warps * 64 <= 1024  # threads, of AMD's GPUs
    assert plan.rows * plan.block <= 2**13
    if plan.align == 0:
        assert plan.block >= num_classes
    if inner is not None:
        assert plan.align <= 1  # only rows one after the other can begin before a multiple of 16
    assert launch._num_programs(launch.Layout(300, num_classes, inner, num_classes), plan) * plan.rows >= 300
