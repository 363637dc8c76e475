"""The linear loss of torch: derivatives, transforms, chunks, memory, autocast and torch.compile.

Its values are held against the truth in the parity tests; here against the reference, or in exact equality.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import lsce_torch.layer
from lsce_torch import (
    LinearLabelSmoothedCrossEntropyLoss,
    linear_label_smoothed_cross_entropy,
    linear_label_smoothed_cross_entropy_with_stats,
)
from tests import small_batches
from tests.small_batches import assert_close, to_torch

N, D, K = small_batches.ROWS, small_batches.FEATURES, small_batches.CLASSES
GENERATOR = np.random.default_rng(0)
HIDDEN, WEIGHT, BIAS = map(to_torch, (small_batches.HIDDEN, small_batches.KERNEL.T, small_batches.BIAS))
LABELS, COUNTED = map(to_torch, (small_batches.LAYER_LABELS, small_batches.COUNTED))
CLASS_WEIGHT, OPTIONS = to_torch(small_batches.WEIGHT), to_torch(small_batches.LAYER_OPTIONS)

chunked_loss = partial(linear_label_smoothed_cross_entropy, chunk_size=3)
reference_loss = partial(linear_label_smoothed_cross_entropy, implementation="reference")


def outcome(loss: Callable[..., Tensor], *layer: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Return losses and all gradients of a sum in which each loss has another factor."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in layer]
    losses = loss(leaves[0], leaves[1], LABELS, bias=leaves[2], **options)
    factors = torch.linspace(1, 2, losses.numel(), dtype=losses.dtype).view(losses.shape)
    return losses.detach(), *torch.autograd.grad((losses * factors).sum(), leaves)


@pytest.mark.parametrize("name", ["mean", "none", "everything"])
def test_gradcheck(name: str) -> None:
    """Reverse and forward mode, batched, to second order, against finite differences."""
    options = OPTIONS[name]
    layer = [tensor.clone().requires_grad_() for tensor in (HIDDEN, WEIGHT, BIAS)]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return chunked_loss(hidden, weight, LABELS, bias=bias, **options)

    assert torch.autograd.gradcheck(loss, layer, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, layer)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_function_transforms(reduction: str) -> None:
    """Gradients, also of every row and of several layers, Jacobians and Hessians of torch.func."""

    def total(loss: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda weight: loss(HIDDEN, weight, LABELS, reduction=reduction).sum()

    weights = torch.stack([WEIGHT, 2 * WEIGHT])
    jacfwd, jacrev = torch.func.jacfwd, torch.func.jacrev
    nested = [lambda f, one=one, other=other: one(other(f)) for one in (jacfwd, jacrev) for other in (jacfwd, jacrev)]
    for derivative in (torch.func.grad, jacfwd, jacrev, *nested):
        ours, theirs = (derivative(total(loss))(WEIGHT) for loss in (chunked_loss, reference_loss))
        assert_close((ours,), (theirs,))
    by_layer = torch.func.vmap(torch.func.grad(total(chunked_loss)))(weights)
    assert_close((by_layer,), (torch.stack([torch.func.grad(total(chunked_loss))(w) for w in weights]),))
    by_row = torch.func.vmap(lambda h, y: linear_label_smoothed_cross_entropy(h, WEIGHT, y))(HIDDEN, LABELS)
    assert_close((by_row,), (chunked_loss(HIDDEN, WEIGHT, LABELS, reduction="none"),))


def test_backward_twice() -> None:
    """The first takes the gradients that were computed with the loss, the second computes them again."""
    layer = [tensor.clone().requires_grad_() for tensor in (HIDDEN, WEIGHT, BIAS)]
    loss = chunked_loss(layer[0], layer[1], LABELS, bias=layer[2])
    first = torch.autograd.grad(loss, layer, retain_graph=True)
    second = torch.autograd.grad(2 * loss, layer)
    assert all(torch.equal(two, 2 * one) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_some_gradients(needed: tuple[int, ...], reduction: str) -> None:
    _, *whole = outcome(chunked_loss, HIDDEN, WEIGHT, BIAS, reduction=reduction)
    layer = [tensor.clone().requires_grad_(i in needed) for i, tensor in enumerate((HIDDEN, WEIGHT, BIAS))]
    losses = chunked_loss(layer[0], layer[1], LABELS, bias=layer[2], reduction=reduction)
    factors = torch.linspace(1, 2, losses.numel(), dtype=losses.dtype).view(losses.shape)
    (losses * factors).sum().backward()
    for i, tensor in enumerate(layer):
        if i in needed:
            assert tensor.grad is not None
            assert torch.equal(tensor.grad, whole[i])
        else:
            assert tensor.grad is None


def test_nothing_is_computed_that_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither gradients without need, nor logits of rows that do not count."""
    chunks: list[int] = []
    added: list[tuple[str, ...]] = []
    yield_chunks, add = lsce_torch.layer.chunks, lsce_torch.layer.Gradients.add

    def spy(*arguments: Any) -> Any:
        for part, logits, rows in yield_chunks(*arguments):
            chunks.append(len(logits))
            yield part, logits, rows

    def spy_add(self: Any, *arguments: Any) -> None:
        added.append(tuple(self.sums))
        add(self, *arguments)

    monkeypatch.setattr(lsce_torch.layer, "chunks", spy)
    monkeypatch.setattr(lsce_torch.layer.Gradients, "add", spy_add)
    weight = WEIGHT.clone().requires_grad_()
    with torch.no_grad():
        chunked_loss(HIDDEN, weight, LABELS)
    assert chunks == [3, 3, 1]
    assert added == []
    chunks.clear()
    chunked_loss(HIDDEN, weight, LABELS, where=COUNTED)
    assert sum(chunks) == int(COUNTED.sum())
    assert added == [("weight",)] * len(chunks)


def test_strides() -> None:
    """Transposed, sliced and expanded inputs."""
    hidden = torch.from_numpy(GENERATOR.normal(size=(2 * D, N))).T[:, ::2]
    weight = torch.from_numpy(GENERATOR.normal(size=(D, 2 * K))).T[::2]
    bias = torch.ones(1, dtype=torch.float64).expand(K)
    ours = outcome(chunked_loss, hidden, weight, bias)
    assert_close(ours, outcome(chunked_loss, hidden.contiguous(), weight.contiguous(), bias.contiguous()))


def test_microbatches_and_checkpoint() -> None:
    """Microbatches of different numbers of rows that count add up to the gradient of the whole batch."""
    weight = WEIGHT.clone().requires_grad_()
    for part in (slice(0, 2), slice(2, 7)):
        loss = checkpoint(
            chunked_loss, HIDDEN[part], weight, LABELS[part], where=COUNTED[part], denominator=int(COUNTED.sum()),
            use_reentrant=False,
        )  # fmt: skip
        loss.backward()
    assert weight.grad is not None
    (whole,) = torch.autograd.grad(reference_loss(HIDDEN, weight, LABELS, where=COUNTED), weight)
    assert_close((weight.grad,), (whole,))


class TiedModel(nn.Module):
    """An embedding whose weight makes the logits as well."""

    def __init__(self) -> None:  # noqa: D107
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(K, D), nn.Linear(D, D)
        self.loss: Any = partial(linear_label_smoothed_cross_entropy, chunk_size=3)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        loss: Tensor = self.loss(torch.tanh(self.layer(self.embedding(tokens))), self.embedding.weight, labels)
        return loss


def gradients_of(model: nn.Module, function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    loss = function(LABELS, LABELS.roll(1))
    return loss.detach(), *torch.autograd.grad(loss, tuple(model.parameters()))


def test_tied_embedding_and_compiled() -> None:
    """One graph without a break, in eager mode's arithmetic but for the layers around it."""
    model = TiedModel()
    eager = gradients_of(model, model)
    assert_close(gradients_of(model, torch.compile(model, fullgraph=True)), eager, 2.0**-23)
    model.loss = reference_loss
    assert_close(gradients_of(model, model), eager, 2.0**-23)


@pytest.mark.parametrize("name", ["none", "where_none", "everything", "max_sup"])
def test_compiled(name: str) -> None:
    compiled = torch.compile(chunked_loss, fullgraph=True)
    ours = outcome(compiled, HIDDEN, WEIGHT, BIAS, **OPTIONS[name])
    assert_close(ours, outcome(reference_loss, HIDDEN, WEIGHT, BIAS, **OPTIONS[name]))


def test_compiled_for_any_number_of_rows() -> None:
    compiled = torch.compile(linear_label_smoothed_cross_entropy_with_stats, fullgraph=True, dynamic=True)
    for rows in (7, 5, 6):
        loss, stats = compiled(HIDDEN[:rows], WEIGHT, LABELS[:rows])
        theirs, eager = linear_label_smoothed_cross_entropy_with_stats(HIDDEN[:rows], WEIGHT, LABELS[:rows])
        assert_close((loss, stats.nll, stats.lse), (theirs, eager.nll, eager.lse))


# torch's own check looks at the `.grad` of results.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_operators() -> None:
    """Checks of torch's own: the schema is true, shapes without data are right, and the backward can be traced."""
    hidden, weight, bias = (tensor.clone().requires_grad_() for tensor in (HIDDEN, WEIGHT, BIAS))
    on, off, mass = (torch.tensor(value, dtype=torch.float64) for value in (0.9, 0.02, 4.0))
    bad = torch.zeros(N, dtype=torch.bool)
    rows = (LABELS, None, bad, None, None, on, off, mass, None, 0.0, None, True)
    for total in (True, False):
        # Gradients flow through the statistics of rows, and the kernels for GPUs are not to compute anything.
        arguments = (hidden, weight, bias, *rows, not total, False, 3, total, 0.0, [total] * 3)
        torch.library.opcheck(torch.ops.lsce.chunked_losses, arguments)


def test_autocast() -> None:
    """Multiplied in bfloat16; the gradient of the float32 weight is not rounded to bfloat16."""
    layer = [tensor.float().requires_grad_() for tensor in (HIDDEN, WEIGHT, BIAS)]
    for options in ({}, {"recompute": True}):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = chunked_loss(layer[0], layer[1], LABELS, bias=layer[2], **options)
        narrow = chunked_loss(layer[0].bfloat16(), layer[1], LABELS, bias=layer[2], **options)
        gradients, others = (torch.autograd.grad(total, layer) for total in (loss, narrow))
        assert loss.dtype == torch.float32
        assert all(torch.equal(one, other) for one, other in zip((loss, *gradients), (narrow, *others), strict=True))
        assert torch.any(gradients[1] != gradients[1].bfloat16().float())


def test_reference_where_it_must_be() -> None:
    """Class weights and a prior that are trained take all logits at once."""
    for name, value in (("class_weight", CLASS_WEIGHT), ("prior", torch.full((K,), 0.2, dtype=torch.float64))):
        leaf = value.clone().requires_grad_()
        losses = [loss(HIDDEN, WEIGHT, LABELS, **{name: leaf}) for loss in (chunked_loss, reference_loss)]
        assert_close(*(torch.autograd.grad(loss, leaf) for loss in losses))


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"subtract_entropy": True, "where": COUNTED}])
def test_smoothing_is_differentiated(options: dict[str, Any]) -> None:
    smoothing = torch.full((N,), 0.3, dtype=torch.float64, requires_grad=True)
    losses = [
        loss(HIDDEN, WEIGHT, LABELS, smoothing=smoothing, **options).sum() for loss in (chunked_loss, reference_loss)
    ]
    assert_close(*(torch.autograd.grad(loss, smoothing) for loss in losses))


def test_memory_is_that_of_a_chunk() -> None:
    """With four times the rows the largest allocation is the same, and never that of all logits."""
    rows, classes = 64, 4096

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, Tensor):
                    self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
            return result

    for options in ({}, {"reduction": "none"}):
        largest = []
        for num_chunks in (2, 8):
            hidden = torch.randn(rows * num_chunks, D, requires_grad=True)
            weight = torch.randn(classes, D, requires_grad=True)
            labels = torch.zeros(rows * num_chunks, dtype=torch.int64)
            with Largest() as mode:
                loss = linear_label_smoothed_cross_entropy(hidden, weight, labels, chunk_size=rows, **options)
                loss.sum().backward()
            largest.append(mode.bytes)
        assert largest == [4 * rows * classes, 4 * rows * classes]


def test_module() -> None:
    loss_fn = LinearLabelSmoothedCrossEntropyLoss(0.2, chunk_size=2, class_weight=CLASS_WEIGHT)
    assert not loss_fn.state_dict()
    assert "smoothing=0.2" in repr(loss_fn)
    assert loss_fn.float().class_weight.dtype == torch.float32


def test_ignored_rows_in_the_reference() -> None:
    """Also where the reference is not asked for: class weights that are trained."""
    hidden = torch.where(COUNTED[:, None], HIDDEN, torch.nan)
    for options in ({"implementation": "reference"}, {"class_weight": CLASS_WEIGHT.clone().requires_grad_()}):
        weight = WEIGHT.clone().requires_grad_()
        linear_label_smoothed_cross_entropy(hidden, weight, LABELS, where=COUNTED, **options).backward()
        assert weight.grad is not None
        assert weight.grad.isfinite().all()


def test_tensors_without_data() -> None:
    """Of the meta device, and of FakeTensorMode; and no features, which leaves the bias."""
    loss = linear_label_smoothed_cross_entropy(HIDDEN.to("meta"), WEIGHT.to("meta"), LABELS.to("meta"))
    assert loss.is_meta
    with FakeTensorMode() as mode, torch.no_grad():
        hidden, weight, labels, counted = (mode.from_tensor(t) for t in (HIDDEN, WEIGHT, LABELS, COUNTED))
        assert linear_label_smoothed_cross_entropy(hidden, weight, labels, where=counted).shape == ()
    nothing = HIDDEN[:, :0], WEIGHT[:, :0], LABELS
    assert_close((chunked_loss(*nothing, bias=BIAS),), (reference_loss(*nothing, bias=BIAS),))


def test_small_losses_stay_accurate_where_gradients_come_with_them() -> None:
    """Logits are whole numbers: only the sum of 4 exponentials (3 u each), log1p (2 u) and the total round."""
    logits = torch.tensor([[30.0, 1, 0, -2, 3], [0, 1, 28, 2, -1]])
    labels = torch.tensor([0, 2])
    weight = torch.eye(5, requires_grad=True)
    loss = linear_label_smoothed_cross_entropy(logits, weight, labels, smoothing=0.0, reduction="sum")
    others = torch.exp(logits.double() - logits.double().amax(-1, keepdim=True)).scatter(1, labels[:, None], 0)
    expected = torch.log1p(others.sum(-1)).sum()
    assert (loss.double() - expected).abs() <= 2.0**-24 * (3 + 4 + 2 + 1) * expected


def test_gradient_filter_of_rows_that_do_not_count() -> None:
    """Where they stay in the batch: if there are no others, and in torch.compile."""
    filtered = partial(chunked_loss, gradient_filter=0.9, reduction="sum")
    none = outcome(filtered, HIDDEN, WEIGHT, BIAS, where=torch.zeros(N, dtype=torch.bool))
    assert all(torch.all(values == 0) for values in none)
    compiled = torch.compile(filtered, fullgraph=True, backend="aot_eager")
    _, of_hidden, of_weight, _ = outcome(compiled, HIDDEN, WEIGHT, BIAS, where=COUNTED)
    assert torch.all(of_hidden[~COUNTED] == 0)
    nan = torch.where(COUNTED[:, None], HIDDEN, torch.nan)
    assert torch.equal(outcome(compiled, nan, WEIGHT, BIAS, where=COUNTED)[2], of_weight)
