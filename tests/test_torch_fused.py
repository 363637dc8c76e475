"""The fused implementation of torch: derivatives, transforms, blocks, memory, and the gradient in the logits' place.

Its values are held against the truth in the parity tests; here against the reference, or in exact equality.
"""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from lsce_torch import (
    device,
    label_smoothed_cross_entropy,
    label_smoothed_cross_entropy_with_stats,
    lean,
    memory,
    sweeps,
)
from tests import small_batches
from tests.small_batches import assert_close, to_torch

LOGITS, LABELS, SOFT, WEIGHT, MASK, PRIOR = (
    to_torch(getattr(small_batches, name)) for name in ("LOGITS", "LABELS", "SOFT", "WEIGHT", "MASK", "PRIOR")
)
OPTIONS = to_torch(small_batches.OPTIONS)
OPTIONS["prior_weighted"]["smoothing"] = torch.linspace(0, 1, 6)
CALLS = {name: (LABELS, options) for name, options in OPTIONS.items()}
CALLS |= {name: (SOFT, options) for name, options in to_torch(small_batches.SOFT_OPTIONS).items()}


fused_loss = partial(label_smoothed_cross_entropy, implementation="fused")
reference_loss = partial(label_smoothed_cross_entropy, implementation="reference")

each_call = pytest.mark.parametrize(("labels", "options"), CALLS.values(), ids=CALLS.keys())


@pytest.fixture(autouse=True)
def only_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute plain smoothing in this way too; test_torch_lean.py has the other one."""
    monkeypatch.setattr(lean, "_ENABLED", False)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of five classes in each block."""
    monkeypatch.setattr(sweeps, "_BLOCK_SIZE", 10)


def outcome(loss: Callable[..., torch.Tensor], logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> tuple:
    """Return losses and the gradient of a sum in which each has another factor."""
    leaf = logits.detach().requires_grad_()
    losses = loss(leaf, labels, **options)
    (gradient,) = torch.autograd.grad((losses * torch.linspace(1, 2, losses.numel()).view(losses.shape)).sum(), leaf)
    return losses.detach(), gradient


@each_call
def test_gradcheck(labels: torch.Tensor, options: dict[str, Any], small_blocks: None) -> None:
    """Reverse and forward mode, batched, to second order, against finite differences."""
    logits = LOGITS.clone().requires_grad_()

    def loss(z: torch.Tensor) -> torch.Tensor:
        return fused_loss(z, labels, **options)

    # In fast mode the Jacobian is checked in random directions, not entry by entry.
    both = {"check_batched_grad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(loss, logits, check_forward_ad=True, **both)
    assert torch.autograd.gradgradcheck(loss, logits, check_fwd_over_rev=True, **both)


@pytest.mark.parametrize("options", [{}, {"convention": "max_sup", "class_weight": WEIGHT}, {"subtract_entropy": True}])
def test_gradcheck_of_the_smoothing(options: dict[str, Any]) -> None:
    smoothing = torch.linspace(0.1, 0.9, 6, dtype=torch.float64, requires_grad=True)
    logits = LOGITS.clone().requires_grad_()

    def loss(z: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        return fused_loss(z, LABELS, smoothing=e, reduction="none", **options)

    assert torch.autograd.gradcheck(loss, (logits, smoothing), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (logits, smoothing), check_fwd_over_rev=True, fast_mode=True)


@each_call
@pytest.mark.slow
def test_compiled_as_one_graph(labels: torch.Tensor, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(fused_loss, fullgraph=True)
    assert_close(outcome(compiled, LOGITS, labels, **options), outcome(fused_loss, LOGITS, labels, **options))


def test_bad_labels_are_loud_in_every_derivative() -> None:
    """Also where plain operations take the place of the sweeps: NaN in their rows, and only there."""
    labels = torch.tensor([0, 5, 2, 2, -1, 3])
    is_bad = torch.tensor([False, True, False, False, True, False])

    torch.compiler.reset()
    leaf = LOGITS.clone().requires_grad_()
    (once,) = torch.autograd.grad(fused_loss(leaf, labels, reduction="sum"), leaf)
    (twice,) = torch.autograd.grad(fused_loss(leaf, labels, reduction="sum"), leaf, create_graph=True)
    compiled = torch.compile(partial(fused_loss, reduction="sum"), fullgraph=True)
    (from_compiled,) = torch.autograd.grad(compiled(leaf, labels), leaf)
    transformed = torch.func.grad(partial(fused_loss, labels=labels, reduction="sum"))(LOGITS)
    for gradient in (once, twice.detach(), from_compiled, transformed):
        assert torch.equal(gradient.isnan(), is_bad[:, None].expand(6, 5))
    assert_close((once[~is_bad],), (from_compiled[~is_bad],))


def test_compiled_with_a_schedule_compiles_once() -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(fused_loss, backend=counter, fullgraph=True)
    for smoothing in torch.linspace(0, 0.2, 5):
        compiled(LOGITS, LABELS, smoothing=smoothing)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["plain", "weighted", "max_sup", "soft_clamp"])
@pytest.mark.slow
def test_every_order_of_modes(name: str) -> None:
    """Forward and reverse mode over each other, to third order: forward mode sees the tangents of its other levels."""
    labels, options = CALLS[name]
    functions = [partial(loss, labels=labels, **options) for loss in (fused_loss, reference_loss)]
    for order in (2, 3):
        exact = functions[1]
        for _ in range(order):
            exact = torch.func.jacrev(exact)
        for modes in product((torch.func.jacfwd, torch.func.jacrev), repeat=order):
            ours = functions[0]
            for mode in modes:
                ours = mode(ours)
            assert_close((ours(LOGITS),), (exact(LOGITS),))


@pytest.mark.parametrize("warm", [True, False])
def test_after_the_main_thread_has_ended(warm: bool) -> None:
    """Python then refuses new threads, and new work for existing ones. The loss is computed in the caller's thread."""
    lines = [
        "import atexit, threading, torch, lsce_torch",
        "logits = torch.linspace(-1, 1, 2**21).reshape(1024, 2048).requires_grad_()",
        "def show(): print(lsce_torch.label_smoothed_cross_entropy(logits, torch.arange(1024)).item())",
        "show()" if warm else "",
        "atexit.register(show)",
        "def wait_and_show(): threading.main_thread().join(); show()",
        "threading.Thread(target=wait_and_show).start()",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    logits = torch.linspace(-1, 1, 2**21).reshape(1024, 2048)
    assert done.stdout.split() == (2 + warm) * [str(fused_loss(logits, torch.arange(1024)).item())]
    assert not done.stderr


@pytest.mark.parametrize("name", [name for name in OPTIONS if not {"smoothing", "where"} & OPTIONS[name].keys()])
def test_vmap_is_the_batch(name: str) -> None:
    """Bit for bit: the rule makes the new dimension one of rows."""
    options = {**OPTIONS[name], "reduction": "none"}
    batched = fused_loss(LOGITS, LABELS, **options)
    assert torch.equal(torch.func.vmap(partial(fused_loss, **options))(LOGITS, LABELS), batched)
    by_columns = torch.func.vmap(partial(fused_loss, **options), in_dims=(1, 0))(LOGITS.T, LABELS)
    assert torch.equal(by_columns, batched)
    for unbatched in ((LOGITS[0], LABELS), (LOGITS, LABELS[0])):
        in_dims = tuple(None if value.ndim == example else 0 for value, example in zip(unbatched, (1, 0), strict=True))
        result = torch.func.vmap(partial(fused_loss, **options), in_dims=in_dims)(*unbatched)
        expanded = (unbatched[0].expand(6, 5), unbatched[1].expand(6))
        assert torch.equal(result, fused_loss(*expanded, **options))


def test_vmap_over_class_vectors() -> None:
    masks = torch.stack([MASK, torch.arange(5) != 2])
    losses = torch.func.vmap(lambda mask: fused_loss(LOGITS, LABELS, class_mask=mask, reduction="none"))(masks)
    expected = torch.stack([fused_loss(LOGITS, LABELS, class_mask=mask, reduction="none") for mask in masks])
    assert torch.equal(losses.isnan(), expected.isnan())
    assert_close((losses,), (expected,))
    weights = torch.stack([WEIGHT, WEIGHT**2])
    losses = torch.func.vmap(lambda w, z: fused_loss(z, LABELS, class_weight=w))(weights, torch.stack([LOGITS] * 2))
    assert_close((losses,), (torch.stack([fused_loss(LOGITS, LABELS, class_weight=w) for w in weights]),))


def test_vmap_of_statistics() -> None:
    batched = label_smoothed_cross_entropy_with_stats(LOGITS, LABELS, z_loss=0.1, reduction="none")
    with_stats = partial(label_smoothed_cross_entropy_with_stats, z_loss=0.1)
    losses, stats = torch.func.vmap(with_stats)(LOGITS, LABELS)
    assert torch.equal(losses, batched[0])
    assert all(torch.equal(one, other) for one, other in zip(stats, batched[1], strict=True))
    gradient, _ = torch.func.vmap(torch.func.grad(with_stats, has_aux=True))(LOGITS, LABELS)
    assert_close((gradient,), outcome(fused_loss, LOGITS, LABELS, z_loss=0.1, reduction="sum")[1:])


@pytest.mark.parametrize("name", ["class_weight", "prior", "smoothing"])
def test_torch_func_of_other_operands(name: str) -> None:
    """Whether an operand is differentiated is not always seen from `requires_grad`."""
    value = {"class_weight": WEIGHT, "prior": PRIOR, "smoothing": torch.full((6,), 0.3, dtype=torch.float64)}[name]
    results = []
    for loss in (fused_loss, reference_loss):

        def total(operand: torch.Tensor, loss: Callable[..., torch.Tensor] = loss) -> torch.Tensor:
            return loss(LOGITS, LABELS, reduction="sum", **{name: operand})

        forward = torch.func.jvp(total, (value,), (torch.linspace(1, 2, value.numel(), dtype=torch.float64),))[1]
        results.append((torch.func.grad(total)(value), torch.func.jacfwd(total)(value), forward))
    assert_close(*results)


def test_torch_func() -> None:
    batched, gradient = outcome(fused_loss, LOGITS, LABELS, reduction="sum")
    vmapped = torch.func.vmap(fused_loss)(LOGITS, LABELS)
    per_row = torch.func.vmap(torch.func.grad(fused_loss))(LOGITS, LABELS)
    assert_close((vmapped.sum(), per_row), (batched, gradient))
    p = torch.softmax(LOGITS[0], -1)
    exact = torch.diag(p) - torch.outer(p, p)
    assert torch.all((torch.func.hessian(fused_loss)(LOGITS[0], LABELS[0]) - exact).abs() < 1e-15)
    _, tangent = torch.func.jvp(lambda z: fused_loss(z, LABELS, reduction="sum"), (LOGITS,), (LOGITS,))
    assert abs(tangent - (gradient * LOGITS).sum()) < 1e-14


# Rows that are no multiple of the block, rows larger than a block, dimensions that do not merge, none at all.
@pytest.mark.parametrize("block_size", [1, 15, 16, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_blocks_do_not_matter(name: str, dtype: torch.dtype, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**OPTIONS[name]}
    for per_row in ("smoothing", "where"):
        if isinstance(options.get(per_row), torch.Tensor):
            options[per_row] = options[per_row].expand(7, 6)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 6, 5, dtype=torch.float64, generator=generator).to(dtype)
    labels = torch.randint(5, (7, 6), generator=generator)
    for view in (logits, logits[:, ::2].repeat_interleave(2, 1)[:, :6], logits.mT.contiguous().mT, logits.flip(0)[::1]):
        whole = outcome(fused_loss, view, labels, **options)
        with monkeypatch.context() as patch:
            patch.setattr(sweeps, "_BLOCK_SIZE", block_size)
            divided = outcome(fused_loss, view, labels, **options)
        # The order of a sum within a row depends on the strides of the block that it is in.
        assert_close(divided, whole, torch.finfo(torch.promote_types(dtype, torch.float32)).eps)
        if view.is_contiguous():
            assert all(torch.equal(one, other) for one, other in zip(divided, whole, strict=True))


@pytest.mark.usefixtures("small_blocks")
def test_strided_and_expanded_logits() -> None:
    wide = torch.from_numpy(np.random.default_rng(1).normal(size=(12, 10)))
    views = [wide[::2, ::2], wide.t()[:6, :5], wide[0, :5].expand(6, 5), wide[:6].flip(1)[:, 3:8]]
    for view in views:
        contiguous = view.clone(memory_format=torch.contiguous_format)
        assert_close(outcome(fused_loss, view, LABELS), outcome(fused_loss, contiguous, LABELS))
    assert_close(outcome(fused_loss, wide[0, ::2], LABELS[0]), outcome(reference_loss, wide[0, ::2], LABELS[0]))


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3), (0, 4, 3)])
def test_no_rows_at_all(shape: tuple[int, ...]) -> None:
    losses, gradient = outcome(fused_loss, torch.zeros(shape), torch.zeros(shape[:-1], dtype=torch.long))
    assert losses == 0
    assert gradient.shape == shape


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients(mode: Callable[[], Any]) -> None:
    expected = fused_loss(LOGITS, LABELS)
    with mode():
        assert torch.equal(fused_loss(LOGITS.clone(), LABELS), expected)


def test_nothing_of_the_size_of_the_logits_is_kept() -> None:
    kept = []
    logits = LOGITS.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fused_loss(logits, LABELS, softcap=3.0, z_loss=0.1, class_weight=WEIGHT)
    large = {tensor.data_ptr() for tensor in kept if tensor.numel() >= logits.numel()}
    # And the stacked sums, five per row here, which are small only where there are many classes.
    assert logits.data_ptr() in large
    assert len(large) == 2


def test_a_large_gradient_has_memory_of_its_own() -> None:
    """Large enough for large pages to be asked for."""
    logits = torch.randn(64, memory._FRESH_BYTES // 128, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(64)
    losses, gradient = outcome(fused_loss, logits, labels, reduction="none")
    expected, expected_gradient = outcome(reference_loss, logits, labels, reduction="none")
    assert_close((losses, gradient), (expected, expected_gradient), 2.0**-23)


# The gradient in the logits' place.

inplace_loss = partial(fused_loss, inplace_backward=True)


# Soft labels with max_sup take the reference; see test_inplace_is_refused.
@pytest.mark.parametrize("name", [name for name in CALLS if name != "soft_max_sup"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inplace_gradient_is_the_same(name: str, dtype: torch.dtype, small_blocks: None) -> None:
    labels, options = CALLS[name]
    layer = torch.linspace(0.5, 1.5, 5, dtype=torch.float64).to(dtype).requires_grad_()
    inputs = LOGITS.to(dtype)
    logits = inputs * layer
    address = logits.data_ptr()
    seen = []
    logits.register_hook(lambda gradient: seen.append((gradient.data_ptr(), gradient.clone())))
    inplace_loss(logits, labels, **options).sum().backward()
    _, expected = outcome(lambda z, y, **kw: fused_loss(z, y, **kw).sum(), inputs * layer.detach(), labels, **options)
    assert seen[0][0] == address
    assert torch.equal(seen[0][1], expected)
    assert torch.equal(layer.grad, (inputs * expected).sum(0))


@pytest.mark.parametrize(
    "use",
    [
        lambda logits: logits + 1,
        lambda logits: logits.argmax(-1),
        lambda logits: torch.softmax(logits, -1),
        lambda logits: logits[0],
        lambda logits: logits.view(-1),
        lambda logits: fused_loss(logits, LABELS),
        lambda logits: logits.shape,
        lambda logits: logits.mul_(2),
        lambda logits: torch.zeros(6, 5).copy_(logits),
        lambda logits: logits.numpy(),
        lambda logits: torch.stack([logits]),
    ],
)
@pytest.mark.parametrize("through_a_view", [False, True])
def test_overwritten_logits_cannot_be_used(use: Callable[[torch.Tensor], Any], through_a_view: bool) -> None:
    parameter = LOGITS.clone().requires_grad_()
    logits = parameter * 1
    if through_a_view:
        inplace_loss(logits.view(2, 3, 5).flatten(0, 1), LABELS).backward()
    else:
        inplace_loss(logits, LABELS).backward()
    with pytest.raises(RuntimeError, match="overwritten by their gradient"):
        use(logits)
    assert torch.all(parameter.grad.isfinite())
    assert "overwritten" in repr(logits)


def test_overwritten_leaf_gives_its_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    inplace_loss(logits, LABELS).backward()
    (expected,) = outcome(fused_loss, LOGITS, LABELS)[1:]
    assert torch.equal(logits.grad, expected)
    logits.grad = None
    with pytest.raises(RuntimeError, match="overwritten"):
        logits.detach()


def test_what_others_saved_of_overwritten_logits_is_noticed() -> None:
    """By autograd itself: their version has changed."""
    parameter = LOGITS.clone().requires_grad_()
    logits = torch.tanh(parameter)  # whose derivative needs its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inplace_loss(logits, LABELS).backward()

    logits = parameter * 1
    loss = inplace_loss(logits, LABELS)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

    logits = parameter * 1
    first, second = inplace_loss(logits, LABELS), inplace_loss(logits, LABELS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (first + second).backward()


def test_logits_changed_before_backward_are_noticed() -> None:
    for loss_of in (fused_loss, inplace_loss):
        logits = LOGITS.clone().requires_grad_() * 1
        loss = loss_of(logits, LABELS)
        logits.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("convention", ["uniform", "non_target", "max_sup"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_plain_operations_keep_infinite_logits_apart(
    monkeypatch: pytest.MonkeyPatch, convention: str, smoothing: float
) -> None:
    """As a TPU and torch.compile take them."""
    monkeypatch.setattr(device, "device_type", lambda tensor: "tpu")
    options = {"convention": convention, "smoothing": smoothing, "reduction": "none"}
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [2.0, -1.0, -torch.inf]], dtype=torch.float64)
    results = []
    for loss in (fused_loss, reference_loss):
        leaf = logits.clone().requires_grad_()
        losses = loss(leaf, torch.tensor([0, 1]), **options)
        torch.where(losses.isfinite(), losses, 0).sum().backward()
        results.append((losses.detach(), leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-14, atol=1e-14)
    assert bool(results[0][0].isfinite().all()) == (smoothing == 0)


def test_inplace_is_refused_on_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "device_type", lambda tensor: "tpu")
    with pytest.raises(ValueError, match=r"a TPU's compiler decides.*Pass inplace_backward=False"):
        inplace_loss(LOGITS.clone().requires_grad_(), LABELS)


def test_inplace_is_refused() -> None:
    logits = LOGITS.clone().requires_grad_()
    windows = (torch.zeros(10, requires_grad=True) * 1).unfold(0, 5, 1)
    for overlapping in ((logits[:1] * 1).expand(6, 5), windows):
        with pytest.raises(ValueError, match="share their memory"):
            inplace_loss(overlapping, LABELS)
    with pytest.raises(ValueError, match="implementation='fused'"):
        label_smoothed_cross_entropy(logits, LABELS, implementation="reference", inplace_backward=True)
    with pytest.raises(ValueError, match="class_weight requires a gradient"):
        inplace_loss(logits, LABELS, class_weight=WEIGHT.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"max_sup.*which only the reference supports"):
        inplace_loss(logits, SOFT, convention="max_sup")
    with pytest.raises(TypeError, match="inplace_backward must be True or False"):
        fused_loss(logits, LABELS, inplace_backward=1)
    for transform in (torch.func.grad, lambda f: torch.func.vmap(f, in_dims=0)):
        with pytest.raises(RuntimeError, match="works in plain eager backward passes"):
            transform(lambda z: inplace_loss(z, LABELS))(
                torch.stack([logits] * 6) if transform is not torch.func.grad else logits
            )
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(inplace_loss(logits * 1, LABELS), logits, create_graph=True)


def test_inplace_without_a_gradient_does_nothing() -> None:
    logits = LOGITS.clone()
    assert inplace_loss(logits, LABELS) == fused_loss(LOGITS, LABELS)
    assert torch.equal(logits, LOGITS)


def test_threads_of_our_own_leave_no_trace(small_blocks: None) -> None:
    """Neither in torch's number of threads nor in its modes; and several callers at once do not mix."""
    before = torch.get_num_threads()
    expected = [fused_loss(LOGITS * scale, LABELS) for scale in range(8)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda scale: fused_loss(LOGITS * scale, LABELS), range(8)))
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))
    with torch.inference_mode():
        assert torch.equal(fused_loss(LOGITS.clone(), LABELS), expected[1])
    assert torch.get_num_threads() == before
    assert torch.is_grad_enabled()
