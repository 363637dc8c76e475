"""Differentiable statistics and class masks of rows in torch: derivatives, transforms, chunks, memory, refusals.

Their values and gradients are held against the truth in the parity tests; here against the reference, against finite
differences, or in exact equality.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from lsce_torch import (
    LabelSmoothedCrossEntropyLoss,
    LinearLabelSmoothedCrossEntropyLoss,
    LossStats,
    chunked,
    device,
    label_smoothed_cross_entropy,
    label_smoothed_cross_entropy_with_stats,
    linear_label_smoothed_cross_entropy,
    linear_label_smoothed_cross_entropy_with_stats,
    sweeps,
)
from lsce_torch.metrics import MeanEntropy, TopKAccuracy

LOGITS = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 5)))
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])
SOFT = torch.softmax(torch.from_numpy(np.random.default_rng(1).normal(size=(6, 5))), -1)
WEIGHT = torch.linspace(0.5, 2, 5, dtype=torch.float64)
# A mask for each row, which has the row's label; that of row 4, which some calls ignore, is empty there.
ROW_MASK = torch.tensor(
    [[1, 1, 0, 0, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [1, 1, 0, 1, 0], [0, 1, 0, 1, 1]],
    dtype=torch.bool,
)
EMPTY = ROW_MASK & (torch.arange(6) != 4)[:, None]
HIDDEN = torch.from_numpy(np.random.default_rng(2).normal(size=(6, 3)))
LAYER = torch.from_numpy(np.random.default_rng(3).normal(size=(5, 3)))
BIAS = torch.from_numpy(np.random.default_rng(4).normal(size=5))
FIELDS = ("nll", "lse", "entropy")
EPSILON = 2.0**-52

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capped": {"convention": "non_target", "z_loss": 0.01, "softcap": 3.0, "reduction": "none"},
    "where": {"where": torch.arange(6) != 3, "convention": "clamp"},
    "weighted": {"class_weight": WEIGHT, "class_mask": torch.arange(5) != 1, "ignore_index": 1, "reduction": "sum"},
    "max_sup": {"convention": "max_sup", "class_weight": WEIGHT, "softcap": 3.0, "z_loss": 0.1},
    "row_mask": {"class_mask": ROW_MASK, "softcap": 2.0},
    "row_mask_ignored": {"class_mask": EMPTY, "ignore_index": 1, "class_weight": WEIGHT, "subtract_entropy": True},
    "row_mask_max_sup": {"class_mask": EMPTY, "ignore_index": 1, "convention": "max_sup", "z_loss": 0.1},
}
each_call = pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)

dense = partial(label_smoothed_cross_entropy_with_stats, differentiable=True)
linear = partial(linear_label_smoothed_cross_entropy_with_stats, differentiable=True)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of five classes in each block."""
    monkeypatch.setattr(sweeps, "_BLOCK_SIZE", 10)


def combined(loss: torch.Tensor, stats: LossStats) -> torch.Tensor:
    """Return the loss and the statistics in one number, with another factor for each of them and for each row."""
    factors = torch.linspace(0.5, 2, stats.nll.numel(), dtype=stats.nll.dtype).reshape(stats.nll.shape)
    parts = ((number + 1.5) * factors**number * getattr(stats, field) for number, field in enumerate(FIELDS))
    return loss.sum() + sum(part.sum() for part in parts)


def outcome(call: Callable[..., Any], *operands: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    """Return the loss, the statistics, and the gradients of `combined` with respect to the operands."""
    leaves = [operand.detach().clone().requires_grad_() for operand in operands]
    loss, stats = call(*leaves, **options)
    return loss.detach(), *(of.detach() for of in stats), *torch.autograd.grad(combined(loss, stats), leaves)


def assert_close(ours: Any, theirs: Any, epsilon: float = EPSILON) -> None:
    """Equal but for a few roundings of sums of at most some dozen terms of the size of the largest."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        if one.dtype == torch.bool or not one.is_floating_point():
            assert torch.equal(one, other)
            continue
        scale = 1 + other[other.isfinite()].abs().max() if other.isfinite().any() else 1
        close = (one - other).abs() <= 64 * epsilon * scale
        assert torch.all(close | (one == other) | (one.isnan() & other.isnan()))


# --- Dense ----------------------------------------------------------------------------------------------------------


@each_call
@pytest.mark.parametrize("value", [None, torch.nan, torch.inf, -torch.inf])
def test_equals_the_reference(options: dict[str, Any], value: float | None, small_blocks: None) -> None:
    logits, labels = LOGITS.clone(), torch.where(torch.arange(6) == 5, 7, LABELS)  # a bad label
    if value is not None:
        logits[3, 4] = logits[1, 1] = logits[0, 0] = value
    given = partial(dense, labels=labels, **options)
    ours, theirs = (outcome(partial(given, implementation=name), logits) for name in ("fused", "reference"))
    assert_close(ours, theirs)


@each_call
@pytest.mark.parametrize("place", ["tpu", "cuda"])
def test_on_other_devices(options: dict[str, Any], place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the operations of torch that they get, dense and linear; on a GPU without Triton."""
    logits = LOGITS.clone()
    logits[3, 4] = logits[1, 1] = -torch.inf
    expected = outcome(partial(dense, labels=LABELS, implementation="reference", **options), logits)
    of_layer = outcome(partial(linear, labels=LABELS, implementation="reference", **options), HIDDEN, LAYER)
    monkeypatch.setattr(device, "device_type", lambda tensor: place)
    assert_close(outcome(partial(dense, labels=LABELS, **options), logits), expected)
    assert_close(outcome(partial(linear, labels=LABELS, chunk_size=4, **options), HIDDEN, LAYER), of_layer)


def test_soft_labels_take_the_reference() -> None:
    ours = outcome(partial(dense, labels=SOFT), LOGITS)
    assert_close(ours, outcome(partial(dense, labels=SOFT, implementation="reference"), LOGITS))
    leaf = LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(dense(leaf, SOFT)[1].nll.sum(), leaf)
    assert_close((gradient,), (torch.softmax(LOGITS, -1) - SOFT,))


@each_call
def test_gradcheck(options: dict[str, Any], small_blocks: None) -> None:
    """Reverse and forward mode, batched, to second order, against finite differences."""
    logits = LOGITS.clone().requires_grad_()

    def statistics(z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss, stats = dense(z, LABELS, implementation="fused", **options)
        return loss, stats.nll, stats.lse, stats.entropy

    both = {"check_batched_grad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(statistics, logits, check_forward_ad=True, **both)
    assert torch.autograd.gradgradcheck(statistics, logits, check_fwd_over_rev=True, **both)


def test_by_default_they_are_constants() -> None:
    leaf = LOGITS.clone().requires_grad_()
    for implementation in ("fused", "reference"):
        loss, stats = label_smoothed_cross_entropy_with_stats(leaf, LABELS, implementation=implementation)
        assert loss.requires_grad
        assert not any(value.requires_grad for value in stats)
        _, stats = dense(leaf, LABELS, implementation=implementation)
        assert tuple(name for name, value in stats._asdict().items() if value.requires_grad) == FIELDS


@pytest.mark.parametrize("field", FIELDS)
def test_a_gradient_that_nothing_asks_for_is_no_part(field: str) -> None:
    """Rows with a bad label: the gradients of loss and nll are NaN, those of log-sum-exp and entropy are not."""
    labels = torch.tensor([0, -1, 2, 2, 5, 3])
    is_bad = torch.tensor([False, True, False, False, True, False])
    good = torch.zeros(6, dtype=torch.int64)
    for implementation, twice in itertools.product(("fused", "reference"), (False, True)):
        gradients = []
        for given in (labels, good):
            leaf = LOGITS.clone().requires_grad_()
            statistic = getattr(dense(leaf, given, implementation=implementation)[1], field)
            gradients += torch.autograd.grad(statistic.sum(), leaf, create_graph=twice)
        gradient, of_good = (gradient.detach() for gradient in gradients)
        assert torch.equal(gradient.isnan().any(-1), is_bad & (field == "nll"))
        if field != "nll":
            assert_close((gradient,), (of_good,))


def test_rows_that_do_not_count_have_a_gradient_of_0() -> None:
    logits = LOGITS.clone()
    logits[3] = torch.nan
    results = outcome(partial(dense, labels=LABELS, where=torch.arange(6) != 3, implementation="fused"), logits)
    assert torch.equal(results[-1] == 0, (torch.arange(6) == 3)[:, None].expand(6, 5))


@each_call
@pytest.mark.slow
def test_compiled_as_one_graph(options: dict[str, Any]) -> None:
    torch.compiler.reset()
    given = partial(dense, labels=LABELS, implementation="fused", **options)
    assert_close(outcome(torch.compile(given, fullgraph=True), LOGITS), outcome(given, LOGITS))


@pytest.mark.parametrize("options", [CALLS["plain"], CALLS["capped"], {"z_loss": 0.1, "class_weight": WEIGHT}])
def test_vmap_is_the_batch(options: dict[str, Any]) -> None:
    options = {**options, "reduction": "none", "implementation": "fused"}
    loss, stats = dense(LOGITS, LABELS, **options)
    by_row = torch.func.vmap(partial(dense, **options))(LOGITS, LABELS)
    assert_close((by_row[0], *by_row[1]), (loss, *stats))

    def of_row(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        _, stats = dense(logits, label, **options)
        return stats.entropy + 2 * stats.lse - stats.nll

    leaf = LOGITS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(of_row(leaf, LABELS).sum(), leaf)
    assert_close((torch.func.vmap(torch.func.grad(of_row))(LOGITS, LABELS),), (expected,))


def test_vmap_over_masks_and_rows() -> None:
    expected = outcome(partial(dense, labels=LABELS, class_mask=ROW_MASK, reduction="none"), LOGITS)
    by_row = partial(dense, reduction="none", implementation="fused")
    loss, stats = torch.func.vmap(lambda z, y, mask: by_row(z, y, class_mask=mask))(LOGITS, LABELS, ROW_MASK)
    assert_close((loss, *stats), expected[:-1])
    # A mask for each row, under vmap over the logits, and over the masks.
    several = torch.stack([LOGITS, LOGITS.flip(0)])
    loss, stats = torch.func.vmap(lambda z: by_row(z, LABELS, class_mask=ROW_MASK))(several)
    assert_close((loss[0], *(of[0] for of in stats)), expected[:-1])
    masks = torch.stack([ROW_MASK, torch.ones_like(ROW_MASK)])
    loss, stats = torch.func.vmap(lambda mask: by_row(LOGITS, LABELS, class_mask=mask))(masks)
    assert_close((loss[0], *(of[0] for of in stats)), expected[:-1])


def test_second_derivatives_of_the_entropy() -> None:
    """Against a formula in three plain lines."""

    def plain(z: torch.Tensor) -> torch.Tensor:
        log_p = torch.log_softmax(z, -1)
        return -(log_p.exp() * log_p).sum()

    def ours(z: torch.Tensor) -> torch.Tensor:
        return dense(z, LABELS[0], implementation="fused")[1].entropy

    for transform in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacfwd(f))):
        assert_close((transform(ours)(LOGITS[0]),), (transform(plain)(LOGITS[0]),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [5, 700, 1031])
def test_blocks_do_not_matter(num_classes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many classes the largest is found part by part."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, num_classes, generator=generator).to(dtype)
    labels = torch.randint(num_classes, (9,), generator=generator)
    logits[1, [2, num_classes - 1]] = logits[2, num_classes - 2 :] = logits[3, [num_classes // 2, 4]] = 9.0
    monkeypatch.setattr(sweeps, "_FEW_LOGITS", 0)
    begin = num_classes // 128 * 64  # of a part
    logits[4, begin] = 9.0
    for view in (logits, logits.T.contiguous().T):
        given = partial(dense, labels=labels, implementation="fused")
        whole = outcome(given, view)
        with monkeypatch.context() as patch:
            patch.setattr(sweeps, "_BLOCK_SIZE", 2 * num_classes)
            divided = outcome(given, view)
        assert_close(divided, whole, torch.finfo(torch.float32).eps)
        prediction = LossStats(*whole[1:-1]).prediction
        assert torch.equal(prediction, torch.argmax(view, -1))
        assert prediction[1:5].tolist() == [2, num_classes - 2, min(4, num_classes // 2), begin]


def test_nothing_of_the_size_of_the_logits_is_kept() -> None:
    kept = []
    logits = torch.randn(6, 50, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        dense(logits, LABELS, softcap=3.0, z_loss=0.1)
    assert {tensor.data_ptr() for tensor in kept if tensor.numel() >= logits.numel()} == {logits.data_ptr()}


def test_gradient_in_the_place_of_the_logits(small_blocks: None) -> None:
    for options in CALLS.values():
        expected = outcome(partial(dense, labels=LABELS, implementation="fused", **options), LOGITS)[-1]
        logits = LOGITS.clone().requires_grad_() * 1
        seen = []
        address = logits.data_ptr()
        logits.register_hook(lambda gradient, seen=seen: seen.append((gradient.data_ptr(), gradient.clone())))
        combined(*dense(logits, LABELS, implementation="fused", inplace_backward=True, **options)).backward()
        assert seen[0][0] == address
        assert torch.equal(seen[0][1], expected)


def test_small_entropies_are_relatively_accurate() -> None:
    """Of two classes, one of probability exp(-d): d exp(-d) and exp(-d), but for its square, far below 1."""
    d = torch.tensor([20.0, 40.0, 80.0])
    logits = torch.stack([d, torch.zeros(3)], -1).requires_grad_()
    exact = (d.double() + 1) * torch.exp(-d.double())
    for implementation in ("reference", "fused"):
        _, stats = dense(logits, torch.tensor([0, 1, 0]), implementation=implementation)
        assert torch.all((stats.entropy.double() - exact).abs() <= 8 * 2.0**-24 * exact)
    (gradient,) = torch.autograd.grad(stats.entropy.sum(), logits)  # of "fused"
    slope = d.double() * torch.exp(-d.double())
    expected = torch.stack([-slope, slope], -1)
    assert torch.all((gradient - expected).abs() <= 8 * 2.0**-24 * expected.abs())


# --- Class masks of rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["fused", "reference"])
@pytest.mark.parametrize("convention", ["uniform", "non_target", "clamp", "max_sup"])
def test_row_masks_are_masks_row_by_row(convention: str, implementation: str, small_blocks: None) -> None:
    options: dict[str, Any] = {"convention": convention, "implementation": implementation, "reduction": "none"}
    options |= {"smoothing": 0.3, "class_weight": WEIGHT, "z_loss": 0.1}
    logits = torch.where(ROW_MASK, LOGITS, torch.nan)  # what is outside may be anything
    together = outcome(partial(dense, labels=LABELS, class_mask=ROW_MASK, **options), logits)
    for row in range(6):
        part = slice(row, row + 1)
        alone = outcome(partial(dense, labels=LABELS[part], class_mask=ROW_MASK[row], **options), logits[part])
        factors = torch.linspace(0.5, 2, 6, dtype=torch.float64)[row]
        assert_close([of[part] for of in together[:-1]], alone[:-1])
        if factors == 0.5:  # `combined` has the factor of the first row
            assert_close((together[-1][part],), alone[-1:])


@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_an_empty_mask(implementation: str) -> None:
    """Nothing where the row does not count, NaN where it does, and no other row notices."""
    options: dict[str, Any] = {"labels": LABELS, "class_mask": EMPTY, "implementation": implementation}
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        whole = outcome(partial(dense, **options, ignore_index=1, z_loss=0.1, reduction="none"), LOGITS)
    assert all(of.isfinite().all() for of in whole)
    assert not whole[-1][4].any()
    assert whole[0][4] == 0
    stats = LossStats(*outcome(partial(dense, **options, reduction="none"), LOGITS)[1:-1])
    lost = torch.arange(6) == 4
    for field in ("nll", "smoothed", "lse", "entropy", "confidence"):
        assert torch.equal(getattr(stats, field).isnan(), lost), field
    assert torch.equal(stats.prediction == -1, lost)
    layer = torch.eye(5, dtype=torch.float64).requires_grad_()
    loss, of_layer = linear_label_smoothed_cross_entropy_with_stats(LOGITS, layer, LABELS, class_mask=EMPTY)
    assert torch.equal(of_layer.lse.isnan(), lost)
    assert loss.isnan()
    soft = partial(label_smoothed_cross_entropy, labels=SOFT, class_mask=EMPTY, implementation=implementation)
    assert torch.equal(soft(LOGITS, reduction="none").isnan(), lost)
    assert soft(LOGITS, where=~lost).isfinite()


def test_masks_that_broadcast() -> None:
    logits, labels = LOGITS.reshape(2, 3, 5).movedim(-1, 1), LABELS.reshape(2, 3)
    for mask in (torch.arange(5).reshape(1, 5, 1) != 1, (torch.arange(10).reshape(2, 5, 1) % 10) != 1):
        loss = partial(label_smoothed_cross_entropy, logits, labels, axis=1, reduction="none")
        expected = loss(class_mask=mask.expand(2, 5, 3).contiguous())
        found = loss(class_mask=mask)
        assert expected.isfinite().any()
        assert torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1))  # of labels outside the mask
    vector = torch.arange(5) != 1
    loss = partial(label_smoothed_cross_entropy, LOGITS, LABELS, class_weight=WEIGHT, reduction="none")
    assert torch.equal(loss(class_mask=vector[None]).nan_to_num(-1), loss(class_mask=vector).nan_to_num(-1))
    assert_close((loss(class_mask=vector.expand(6, 5)),), (loss(class_mask=vector),))


def test_weights_of_many_rows_and_classes() -> None:
    """Their sums over the masks are taken some rows at a time."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1200, 1000, generator=generator, dtype=torch.float64)
    mask = torch.rand(1200, 1000, generator=generator) < 0.5
    labels = torch.argmax(mask.to(torch.int8), -1)
    loss = partial(label_smoothed_cross_entropy, logits, labels, class_mask=mask, reduction="none")
    weight = torch.rand(1000, generator=generator, dtype=torch.float64) + 0.5
    ours, theirs = (loss(class_weight=weight, implementation=name) for name in ("fused", "reference"))
    assert torch.all((ours - theirs).abs() <= 2000 * EPSILON * theirs)


def test_the_derivative_by_the_smoothing_with_row_masks() -> None:
    smoothing = torch.linspace(0.1, 0.9, 6, dtype=torch.float64, requires_grad=True)
    loss = partial(label_smoothed_cross_entropy, LOGITS, LABELS, class_mask=EMPTY, ignore_index=1, reduction="sum")
    gradients = [
        torch.autograd.grad(loss(smoothing=smoothing, implementation=i), smoothing) for i in ("fused", "reference")
    ]
    assert_close(*gradients)
    assert gradients[0][0][4] == 0


def test_modules_take_a_mask_for_a_call() -> None:
    own = torch.arange(5) != 1
    module = LabelSmoothedCrossEntropyLoss(label_smoothing=0.1, class_mask=own, ignore_index=1)
    layered = LinearLabelSmoothedCrossEntropyLoss(class_mask=own, ignore_index=1)
    for call, function, operands in (
        (module, label_smoothed_cross_entropy, (LOGITS,)),
        (layered, linear_label_smoothed_cross_entropy, (HIDDEN, LAYER)),
    ):
        losses = [function(*operands, LABELS, class_mask=mask, ignore_index=1) for mask in (own, ROW_MASK)]
        assert [call(*operands, LABELS), call(*operands, LABELS, class_mask=ROW_MASK)] == losses
        assert losses[0] != losses[1]


def test_metrics_with_row_masks() -> None:
    metric, entropy = TopKAccuracy(1), MeanEntropy()
    _, stats = dense(LOGITS, LABELS, class_mask=EMPTY, ignore_index=1)
    metric.update(stats=stats, logits=LOGITS, labels=LABELS, class_mask=ROW_MASK)
    counted = LABELS != 1
    first = torch.argmax(torch.where(ROW_MASK, LOGITS, -torch.inf), -1)
    assert torch.equal(stats.prediction, torch.where(counted, first, -1))
    assert metric.compute() == (first == LABELS)[counted].double().mean().float()
    entropy.update(stats=stats)
    assert entropy.compute() == (math.fsum(stats.entropy.tolist()) / 5)
    assert not entropy.entropy.requires_grad


# --- Linear ---------------------------------------------------------------------------------------------------------


@each_call
@pytest.mark.parametrize("chunk_size", [2, 4])
def test_linear_equals_dense(options: dict[str, Any], chunk_size: int) -> None:
    labels = torch.where(torch.arange(6) == 5, 7, LABELS)

    def through_logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        return dense(hidden @ weight.T + bias, labels, implementation="reference", **options)

    def in_chunks(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        return linear(hidden, weight, labels, bias=bias, chunk_size=chunk_size, **options)

    assert_close(outcome(in_chunks, HIDDEN, LAYER, BIAS), outcome(through_logits, HIDDEN, LAYER, BIAS))


@pytest.mark.parametrize("name", ["plain", "row_mask_ignored"])
def test_gradcheck_of_linear(name: str) -> None:
    operands = [operand.clone().requires_grad_() for operand in (HIDDEN, LAYER, BIAS)]

    def statistics(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss, stats = linear(hidden, weight, LABELS, bias=bias, chunk_size=2, **CALLS[name])
        return loss, stats.nll, stats.lse, stats.entropy

    assert torch.autograd.gradcheck(statistics, operands, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(statistics, operands, check_fwd_over_rev=True, fast_mode=True)


def test_linear_under_vmap() -> None:
    several = torch.stack([HIDDEN, HIDDEN.flip(0)])
    loss, stats = torch.func.vmap(lambda hidden: linear(hidden, LAYER, LABELS, class_mask=ROW_MASK))(several)
    expected = [linear(hidden, LAYER, LABELS, class_mask=ROW_MASK) for hidden in several]
    for i, (one_loss, one_stats) in enumerate(expected):
        assert_close((loss[i], *(of[i] for of in stats)), (one_loss, *one_stats))


@pytest.mark.parametrize("name", ["plain", "capped", "row_mask_ignored"])
@pytest.mark.slow
def test_linear_compiled_as_one_graph(name: str) -> None:
    torch.compiler.reset()

    def given(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        return linear(hidden, weight, LABELS, bias=bias, chunk_size=4, **CALLS[name])

    compiled = torch.compile(given, fullgraph=True)
    assert_close(outcome(compiled, HIDDEN, LAYER, BIAS), outcome(given, HIDDEN, LAYER, BIAS))


def test_linear_keeps_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither whole for the gradient nor a gradient that is computed with the loss."""
    kept = []
    hidden, weight = torch.randn(64, 2, requires_grad=True), torch.randn(40, 2, requires_grad=True)
    labels = torch.arange(64) % 40
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        _, stats = linear(hidden, weight, labels, chunk_size=8)
    assert max(tensor.numel() for tensor in kept) < 64 * 40 / 4
    numbers = []
    whole = chunked.layer_gradients
    monkeypatch.setattr(chunked, "layer_gradients", lambda *given: numbers.append(given[2].chunk_size) or whole(*given))
    stats.entropy.sum().backward()
    assert numbers == [8]


def test_what_differentiable_statistics_exclude() -> None:
    for value in (1, None, "yes"):
        with pytest.raises(TypeError, match="differentiable must be True or False"):
            label_smoothed_cross_entropy_with_stats(LOGITS, LABELS, differentiable=value)
        with pytest.raises(TypeError, match="differentiable must be True or False"):
            linear_label_smoothed_cross_entropy_with_stats(HIDDEN, LAYER, LABELS, differentiable=value)
    with pytest.raises(ValueError, match="differentiable=True needs the gradient to be computed after the loss"):
        linear(HIDDEN, LAYER, LABELS, recompute=False)
    with pytest.raises(ValueError, match="nor differentiable=True"):
        linear(HIDDEN, LAYER, LABELS, gradient_filter=0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'differentiable'"):
        label_smoothed_cross_entropy(LOGITS, LABELS, differentiable=True)


def test_what_row_masks_exclude() -> None:
    prior = torch.full((5,), 0.2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"prior needs one class_mask for all rows.*\[6, 5\]"):
        label_smoothed_cross_entropy(LOGITS, LABELS, class_mask=ROW_MASK, prior=prior)
    with pytest.raises(ValueError, match="gradient_filter needs one class_mask for all rows"):
        linear_label_smoothed_cross_entropy(HIDDEN, LAYER, LABELS, class_mask=ROW_MASK, gradient_filter=0.1)
    for shape in ((3, 5), (6, 1), (6,), (1, 6, 5)):
        with pytest.raises(ValueError, match="class_mask must have shape"):
            label_smoothed_cross_entropy(LOGITS, LABELS, class_mask=torch.ones(shape, dtype=torch.bool))
