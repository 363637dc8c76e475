"""Plain smoothing in torch on the CPU: layouts, sizes, dtypes, what is kept, and when another way is taken.

The parity tests hold its values against the truth, and test_torch_transforms.py its transforms.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lsce_torch import label_smoothed_cross_entropy, lean

WAYS: dict[str, dict[str, int]] = {
    "operations": {"_FEW": 2**30, "_FEWEST": 2**30},
    "few, gradient with the loss": {"_FEW": 2**30, "_FEWEST": 0},
    "gradient with the loss": {"_FEW": 0, "_BLOCK_SIZE": 64},
    "gradient after the loss": {"_FEW": 0, "_BLOCK_SIZE": 64, "_LARGEST_KEPT": 0},
    "rows side by side": {"_FEW": 0, "_BLOCK_SIZE": 64, "_FEW_CLASSES": 1000},
    "many classes": {"_FEW": 0, "_BLOCK_SIZE": 64, "_SEQUENTIAL": 0},
    "many classes, after the loss": {"_FEW": 0, "_BLOCK_SIZE": 64, "_SEQUENTIAL": 0, "_LARGEST_KEPT": 0},
    "classes side by side": {"_FEW": 0, "_BLOCK_SIZE": 64, "_FEW_CLASSES": 0, "_LARGEST_KEPT": 0},
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for setting, value in WAYS[request.param].items():
        monkeypatch.setattr(lean, setting, value)
    name: str = request.param
    return name


def outcome(logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss, and the gradient of it, or of a sum of losses in which each has another factor."""
    leaf = logits.detach().requires_grad_()
    loss = label_smoothed_cross_entropy(leaf, labels, **options)
    factors = torch.linspace(1, 2, loss.numel()).view(loss.shape)
    (gradient,) = torch.autograd.grad((loss * factors).sum(), leaf)
    return loss.detach(), gradient


def is_lean(loss: torch.Tensor) -> bool:
    """Whether the loss was not computed by the sweeps."""
    nodes, names = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None:
            names.add(type(node).__name__)
            nodes += [following for following, _ in node.next_functions]
    return "_RowLossesBackward" not in names


def assert_as_reference(logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> None:
    """Allow 16 roundings, of gradients those of probabilities, which are at most 1, in the narrower dtype."""
    ours = outcome(logits, labels, **options)
    theirs = outcome(logits.double(), labels, **options, implementation="reference")
    epsilons = [2.0**-52 if logits.dtype == torch.float64 else 2.0**-23, torch.finfo(logits.dtype).eps]
    for one, other, epsilon in zip(ours, theirs, epsilons, strict=True):
        assert one.dtype == (
            logits.dtype if one.shape == logits.shape else torch.promote_types(logits.dtype, torch.float32)
        )
        assert torch.all((one - other).abs() <= 16 * epsilon * (1 + other.abs()))


LAYOUTS: dict[str, tuple[tuple[int, ...], int]] = {
    "rows": ((13, 7), -1),
    "one row": ((7,), 0),
    "one class": ((5, 1), -1),
    "two classes": ((9, 2), -1),
    "more classes": ((5, 67), -1),
    "three dimensions": ((3, 5, 4), -1),
    "images": ((2, 5, 9, 4), 1),
    "classes first": ((5, 11), 0),
    "sequences": ((3, 4, 17), 1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, reduction: str, dtype: torch.dtype, way: str) -> None:
    shape, axis = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(shape, generator=generator)).to(dtype)
    of_rows = [size for i, size in enumerate(shape) if i != axis % len(shape)]
    labels = torch.randint(shape[axis], of_rows, generator=generator)
    assert_as_reference(logits, labels, smoothing=0.2, axis=axis, reduction=reduction)
    if layout != "one row":
        ignore = int(labels.flatten()[0])
        assert_as_reference(logits, labels, smoothing=0.2, axis=axis, reduction=reduction, ignore_index=ignore)


LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])


@pytest.mark.parametrize("convention", ["uniform", "non_target", "clamp"])
@pytest.mark.parametrize("smoothing", [0.0, 1e-6, 0.3, 0.7, 1.0])
def test_conventions(convention: str, smoothing: float, way: str) -> None:
    for reduction in ("mean", "none"):
        assert_as_reference(LOGITS, LABELS, smoothing=smoothing, convention=convention, reduction=reduction)


@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_large_logits(offset: float, way: str) -> None:
    """The difference of the means of large numbers would be rounded to multiples of 6e-5 and of 0.06."""
    logits = LOGITS + offset
    assert_as_reference(logits, LABELS, smoothing=0.3, reduction="none")
    assert_as_reference(logits, LABELS, smoothing=0.3)


@pytest.mark.parametrize("largest_kept", [0, 2**24])
def test_probabilities_of_many_classes_sum_to_one(largest_kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of `torch.softmax` do not: of 2^17 classes its sequential sum may be off by more than 100 roundings."""
    monkeypatch.setattr(lean, "_LARGEST_KEPT", largest_kept)
    logits = 3 * torch.randn(8, 2**17, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8)
    loss, gradient = outcome(logits, labels, smoothing=0.3, reduction="sum")
    assert torch.all(gradient.double().sum(dim=-1).abs() <= 16 * 2.0**-24)
    exact, _ = outcome(logits.double(), labels, smoothing=0.3, reduction="sum", implementation="reference")
    assert abs(loss - exact) <= 4 * 2.0**-24 * exact


@pytest.mark.parametrize("smoothing", [0.0, 1e-6, 1e-3])
def test_small_losses_take_another_way(smoothing: float, way: str) -> None:
    """Near 0 the loss of `log_softmax` has no digits left."""
    logits = LOGITS + 30 * torch.nn.functional.one_hot(LABELS, 5)
    ours = label_smoothed_cross_entropy(logits.requires_grad_(), LABELS, smoothing=smoothing)
    exact = label_smoothed_cross_entropy(logits.double(), LABELS, smoothing=smoothing, implementation="reference")
    assert not is_lean(ours)
    assert abs(ours - exact) <= 16 * 2.0**-23 * exact
    assert is_lean(label_smoothed_cross_entropy(logits, LABELS, smoothing=0.3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_logits_that_are_not_finite(smoothing: float, value: float, way: str) -> None:
    logits = LOGITS.clone()
    logits[2, 1] = logits[4, 1] = value  # the latter at the label
    for options in ({}, {"reduction": "none"}, {"reduction": "none", "ignore_index": 2}):
        ours = outcome(logits, LABELS, smoothing=smoothing, **options)
        theirs = outcome(logits, LABELS, smoothing=smoothing, implementation="reference", **options)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=16 * 2.0**-23, atol=16 * 2.0**-23, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_may_overwrite_the_logits(layout: str, dtype: torch.dtype, way: str) -> None:
    """With the same result, and any use of them raises then."""
    shape, axis = LAYOUTS[layout]
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.zeros([size for i, size in enumerate(shape) if i != axis % len(shape)], dtype=torch.int64)
    for reduction in ("mean", "none"):
        options: dict[str, Any] = {"smoothing": 0.3, "axis": axis, "reduction": reduction}
        _, expected = outcome(logits, labels, **options)
        leaf = logits.clone().requires_grad_()
        memory = leaf.data_ptr()
        loss = label_smoothed_cross_entropy(leaf, labels, inplace_backward=True, **options)
        factors = torch.linspace(1, 2, loss.numel()).view(loss.shape)
        (gradient,) = torch.autograd.grad((loss * factors).sum(), leaf)
        assert gradient.data_ptr() == memory
        # One rounding more where the gradient is scaled after it was computed.
        assert torch.all((gradient - expected).abs() <= 2 * torch.finfo(dtype).eps)
        with pytest.raises(RuntimeError, match="overwritten by their gradient"):
            leaf.sum()


def test_ignored_rows_may_hold_anything(way: str) -> None:
    """To the last bit, also labels that are no classes."""
    logits, labels = LOGITS.clone(), LABELS.clone()
    logits[3], labels[3] = float("nan"), -1
    where = torch.arange(6) != 3
    for reduction in ("mean", "none"):
        options: dict[str, Any] = {"smoothing": 0.3, "reduction": reduction, "where": where}
        loss, gradient = outcome(logits, labels, **options)
        assert torch.all(gradient[3] == 0)
        for one, other in zip(outcome(LOGITS, LABELS, **options), (loss, gradient), strict=True):
            assert torch.equal(one, other)


def test_ignored_rows_of_a_mean(way: str) -> None:
    """Their number, a tensor, is read; one that needs a gradient takes another way."""
    leaf = LOGITS.clone().requires_grad_()
    assert is_lean(label_smoothed_cross_entropy(leaf, LABELS, ignore_index=2))
    assert is_lean(label_smoothed_cross_entropy(leaf, LABELS, ignore_index=-100))
    assert is_lean(label_smoothed_cross_entropy(leaf, LABELS, denominator=torch.tensor(4.0)))
    denominator = torch.tensor(4.0, requires_grad=True)
    loss = label_smoothed_cross_entropy(leaf, LABELS, denominator=denominator)
    assert not is_lean(loss)
    (slope,) = torch.autograd.grad(loss, denominator)
    assert abs(slope + loss / 4) < 1e-6
    nothing = label_smoothed_cross_entropy(leaf, LABELS, where=torch.zeros(6, dtype=torch.bool))
    assert nothing == 0
    assert torch.all(torch.autograd.grad(nothing, leaf)[0] == 0)


def test_bad_labels_take_another_way(way: str) -> None:
    labels = LABELS.clone()
    labels[1] = 5
    losses, gradient = outcome(LOGITS, labels, smoothing=0.3, reduction="none")
    assert losses.isnan().tolist() == [i == 1 for i in range(6)]
    assert torch.equal(gradient.isnan().any(dim=1), losses.isnan())


@pytest.mark.parametrize("factor", [0.0, 1.0, -3.0])
def test_every_backward_gives_the_gradient(factor: float, way: str) -> None:
    """Also the second one of the same graph, after the gradient that was kept has been given away."""
    leaf = LOGITS.double().requires_grad_()
    loss = factor * label_smoothed_cross_entropy(leaf, LABELS, smoothing=0.3)
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    _, expected = outcome(LOGITS.double(), LABELS, smoothing=0.3, implementation="reference")
    assert torch.equal(first, second)
    assert torch.all((first - factor * expected).abs() <= 16 * 2.0**-52)
    loss.backward(retain_graph=True)
    loss.backward()
    assert leaf.grad is not None
    assert torch.all((leaf.grad - 2 * factor * expected).abs() <= 32 * 2.0**-52)


def test_derivatives(way: str) -> None:
    for reduction in ("mean", "none"):

        def loss(logits: torch.Tensor, reduction: str = reduction) -> torch.Tensor:
            return label_smoothed_cross_entropy(logits, LABELS, smoothing=0.3, reduction=reduction)

        leaf = LOGITS.double().requires_grad_()
        assert torch.autograd.gradcheck(loss, leaf)
        assert torch.autograd.gradgradcheck(loss, leaf)


@pytest.fixture
def kept() -> Iterator[list[torch.Tensor]]:
    """The tensors that autograd keeps."""
    tensors: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield tensors


def test_what_is_kept(kept: list[torch.Tensor], way: str) -> None:
    """Only the fewest logits keep more than logits, labels and, for a sum, the gradient."""
    leaf = LOGITS.clone().requires_grad_()
    loss = label_smoothed_cross_entropy(leaf, LABELS, smoothing=0.3)
    assert is_lean(loss)
    large = [tensor for tensor in kept if tensor.shape == leaf.shape]
    assert all(tensor is leaf for tensor in large) == (way != "operations")
    gradient = getattr(loss.grad_fn, "gradient", None)
    assert (gradient is not None) == (
        way in {"few, gradient with the loss", "gradient with the loss", "rows side by side", "many classes"}
    )
    with torch.no_grad():
        assert getattr(label_smoothed_cross_entropy(leaf, LABELS).grad_fn, "gradient", None) is None


@pytest.mark.parametrize(
    "options",
    [
        {"z_loss": 0.1},
        {"softcap": 3.0},
        {"convention": "max_sup"},
        {"subtract_entropy": True},
        {"class_weight": torch.ones(5)},
        {"class_mask": torch.arange(5) != 1},
        {"prior": torch.full((5,), 0.2)},
        {"smoothing": torch.tensor(0.3)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_with_a_part_of_their_own_take_another_way(options: dict[str, Any]) -> None:
    leaf = LOGITS.clone().requires_grad_()
    assert not is_lean(label_smoothed_cross_entropy(leaf, LABELS, **options))
    assert is_lean(label_smoothed_cross_entropy(leaf, LABELS))


def test_many_small_groups_of_rows_take_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block for each would take longer; so would logits in no order of the dimensions."""
    monkeypatch.setattr(lean, "_FEW", 0)
    logits = torch.randn(2000, 5, 4, requires_grad=True)
    labels = torch.zeros(2000, 4, dtype=torch.int64)
    assert not is_lean(label_smoothed_cross_entropy(logits, labels, axis=1))
    strided = torch.randn(12, 10, requires_grad=True)[::2, ::2]
    assert not is_lean(label_smoothed_cross_entropy(strided, LABELS))
    assert_as_reference(strided.detach(), LABELS, smoothing=0.1)
