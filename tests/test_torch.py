"""What torch users do with a loss: backward, torch.compile, torch.func, autocast, gradcheck, the drop-in module."""

import ast
import itertools
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

import lsce_spec
import lsce_torch
from lsce_torch import LabelSmoothedCrossEntropyLoss, label_smoothed_cross_entropy

LOGITS = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 5)))
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])
EPSILON = 2.0**-24

OPTIONS = [
    {},
    {"convention": "non_target", "z_loss": 0.01, "softcap": 3.0},
    {"convention": "clamp", "where": torch.arange(6) != 3, "reduction": "none"},
    {
        "class_weight": torch.linspace(0.5, 2, 5),
        "class_mask": torch.arange(5) != 1,
        "ignore_index": 1,
        "reduction": "sum",
    },
    {"prior": torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2]), "subtract_entropy": True},
]
each_option = pytest.mark.parametrize("options", OPTIONS)


@each_option
def test_gradcheck(options: dict[str, object]) -> None:
    """Reverse and forward mode, batched, to second order."""
    logits = LOGITS.clone().requires_grad_()

    def loss(z: torch.Tensor) -> torch.Tensor:
        return label_smoothed_cross_entropy(z, LABELS, smoothing=0.2, **options)

    assert torch.autograd.gradcheck(loss, logits, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, logits, check_fwd_over_rev=True)


def test_smoothing_is_differentiated_also_at_its_ends() -> None:
    """The loss is linear in e: the derivative is the difference of the losses at 1 and at 0."""
    exact = label_smoothed_cross_entropy(LOGITS, LABELS, smoothing=1.0)
    exact = exact - label_smoothed_cross_entropy(LOGITS, LABELS, smoothing=0.0)
    for value in (0.0, 0.3, 1.0):
        smoothing = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        label_smoothed_cross_entropy(LOGITS, LABELS, smoothing=smoothing).backward()
        assert abs(smoothing.grad - exact) < 1e-14


@each_option
def test_compiled_as_one_graph(options: dict[str, object]) -> None:
    compiled = torch.compile(label_smoothed_cross_entropy, fullgraph=True)
    outcomes = []
    for function in (compiled, label_smoothed_cross_entropy):
        logits = LOGITS.float().requires_grad_()
        loss = function(logits, LABELS, smoothing=0.2, **options)
        loss.sum().backward()
        outcomes.append((loss.detach(), logits.grad))
    for ours, eager in zip(*outcomes, strict=True):
        assert torch.all((ours - eager).abs() <= 64 * EPSILON * (1 + eager.abs()))


@pytest.mark.parametrize("convention", ["uniform", "non_target", "clamp", "max_sup"])
def test_compiled_for_any_number_of_classes(convention: str) -> None:
    torch.compiler.reset()
    loss = partial(label_smoothed_cross_entropy, convention=convention)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="eager")
    for num_classes in (3, 5):
        logits = LOGITS[:, :num_classes]
        eager = loss(logits, LABELS % num_classes)
        assert torch.all((compiled(logits, LABELS % num_classes) - eager).abs() <= 1e-14 * (1 + eager.abs()))


@pytest.mark.parametrize("legacy", [{}, {"size_average": False}, {"reduce": False}])
def test_drop_in_function_compiled_as_one_graph(legacy: dict[str, bool]) -> None:
    logits = LOGITS.reshape(2, 5, 3)  # classes in dimension 1
    labels = torch.tensor([[0, 4, -100], [2, 1, 3]])
    torch.compiler.reset()
    compiled = torch.compile(lsce_torch.cross_entropy, backend="eager", fullgraph=True)
    loss = compiled(logits, labels, label_smoothing=0.1, **legacy)
    reduction = {(): "mean", ("size_average",): "sum", ("reduce",): "none"}[tuple(legacy)]
    assert loss.shape == (labels.shape if legacy == {"reduce": False} else ())
    expected = label_smoothed_cross_entropy(logits, labels, axis=1, ignore_index=-100, reduction=reduction)
    assert torch.allclose(loss, expected, rtol=1e-12)
    torch.compiler.reset()


def test_compiled_with_a_schedule_compiles_once() -> None:
    counter = CompileCounter()
    compiled = torch.compile(label_smoothed_cross_entropy, backend=counter, fullgraph=True)
    for smoothing in torch.linspace(0, 0.2, 5):
        compiled(LOGITS, LABELS, smoothing=smoothing)
    assert counter.frame_count == 1


def test_compiled_for_any_batch_and_denominator_compiles_twice() -> None:
    """Once for the first sizes and once for all others, like F.cross_entropy."""
    for options in ({}, {"where": True}, {"denominator": True}, {"class_weight": torch.ones(5)}):
        torch.compiler.reset()
        counter = CompileCounter()
        compiled = torch.compile(label_smoothed_cross_entropy, backend=counter, fullgraph=True)
        for size in range(2, 14):
            changes = {"where": torch.ones(size, dtype=torch.bool)} if "where" in options else {}
            changes |= {"denominator": 10.5 + size} if "denominator" in options else {}
            compiled(torch.randn(size, 5), torch.zeros(size, dtype=torch.long), **{**options, **changes})
        assert counter.frame_count <= 3, options


def test_values_that_are_not_at_hand() -> None:
    """Within make_fx and on tensors without data nothing is read; bad_labels="raise" says that it would have to be."""
    prior = torch.full((5,), 0.2)
    loss = lambda z, y, prior: label_smoothed_cross_entropy(z, y, prior=prior)  # noqa: E731
    graph = make_fx(loss, tracing_mode="fake")(LOGITS.float(), LABELS, prior)
    assert torch.equal(graph(LOGITS.float(), LABELS, prior), loss(LOGITS.float(), LABELS, prior))
    shape_only = LOGITS.to("meta"), LABELS.to("meta")
    assert label_smoothed_cross_entropy(*shape_only, prior=prior.to("meta")).shape == ()
    with pytest.raises(RuntimeError, match="call the loss outside of vmap"):
        label_smoothed_cross_entropy(*shape_only, bad_labels="raise")


def test_torch_func() -> None:
    one = label_smoothed_cross_entropy
    batched = label_smoothed_cross_entropy(LOGITS, LABELS, reduction="none")
    # Another order of the same sums.
    assert torch.all((torch.func.vmap(one)(LOGITS, LABELS) - batched).abs() <= 8 * 2.0**-52 * batched)
    per_row = torch.func.vmap(torch.func.grad(one))(LOGITS, LABELS)
    p = torch.softmax(LOGITS, -1)
    target = 0.9 * torch.nn.functional.one_hot(LABELS, 5).double() + 0.02
    assert torch.all((per_row - (p - target)).abs() < 1e-15)
    hessian = torch.func.hessian(one)(LOGITS[0], LABELS[0])
    assert torch.all((hessian - (torch.diag(p[0]) - torch.outer(p[0], p[0]))).abs() < 1e-15)
    _, tangent = torch.func.jvp(lambda z: one(z, LABELS), (LOGITS,), (LOGITS,))
    assert abs(tangent - ((p - target) * LOGITS).sum() / 6) < 1e-15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Under autocast the loss of narrow logits is the one without it, in float32."""
    logits = LOGITS.to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        loss = label_smoothed_cross_entropy(logits, LABELS)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, label_smoothed_cross_entropy(logits, LABELS))


def test_strided_and_expanded_logits() -> None:
    wide = torch.from_numpy(np.random.default_rng(1).normal(size=(12, 10)))
    views = [wide[::2, ::2], wide.t()[:6, :5], wide[0, :5].expand(6, 5), wide[:6].flip(1)[:, 3:8]]
    for view in views:
        assert not view.is_contiguous() or view.storage_offset()
        outcomes = []
        for logits in (view.detach().clone(memory_format=torch.contiguous_format), view):
            leaf = logits.detach().requires_grad_()
            loss = label_smoothed_cross_entropy(leaf, LABELS, reduction="none")
            loss.sum().backward()
            outcomes.append((loss, leaf.grad))
        for contiguous, strided in zip(*outcomes, strict=True):
            assert torch.all((contiguous - strided).abs() < 1e-15)


def test_unsigned_and_wide_labels() -> None:
    expected = label_smoothed_cross_entropy(LOGITS, LABELS)
    for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32):
        assert torch.equal(label_smoothed_cross_entropy(LOGITS, LABELS.to(dtype)), expected)
    far = torch.from_numpy(np.array([2**63 + 1, 2**32, 2**64 - 100], np.uint64))
    assert torch.isnan(label_smoothed_cross_entropy(LOGITS[:3], far, reduction="none", ignore_index=-100)).all()


def test_bad_label_is_loud_in_loss_and_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    losses = label_smoothed_cross_entropy(logits, torch.tensor([0, 5, 2, 2, 1, 3]), reduction="none")
    losses.sum().backward()
    assert torch.isnan(losses).tolist() == [False, True, False, False, False, False]
    assert torch.isnan(logits.grad).all(-1).tolist() == [False, True, False, False, False, False]
    assert torch.isnan(logits.grad).any(-1).sum() == 1


def test_no_rows_at_all() -> None:
    for reduction in ("none", "sum", "mean"):
        logits = torch.zeros(0, 3, requires_grad=True)
        loss = label_smoothed_cross_entropy(logits, torch.zeros(0, dtype=torch.long), reduction=reduction)
        loss.sum().backward()
        assert loss.sum() == 0
        assert logits.grad.shape == (0, 3)


def test_drop_in_module_is_the_same_module() -> None:
    """isinstance, state dict, positional and deprecated arguments are those of nn.CrossEntropyLoss."""
    weight = torch.linspace(0.5, 2, 5)
    ours, theirs = LabelSmoothedCrossEntropyLoss(weight), torch.nn.CrossEntropyLoss(weight)
    assert isinstance(ours, torch.nn.CrossEntropyLoss)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert ours.to(torch.float64).weight.dtype == torch.float64
    for size_average, reduce in itertools.product([None, True, False], repeat=2):
        if size_average is reduce is None:
            continue
        with pytest.warns(UserWarning, match="deprecated"):
            assert (
                LabelSmoothedCrossEntropyLoss(None, size_average, -100, reduce).reduction
                == torch.nn.CrossEntropyLoss(None, size_average, -100, reduce).reduction
            )
    again = pickle.loads(pickle.dumps(ours))
    assert torch.equal(again(LOGITS, LABELS), ours(LOGITS, LABELS))


def test_drop_in_module_options() -> None:
    mask = torch.arange(5) != 1
    labels = torch.tensor([0, 4, 2, 2, -100, 3])
    options = {"convention": "non_target", "class_mask": mask, "z_loss": 0.01, "softcap": 5.0}
    module = LabelSmoothedCrossEntropyLoss(label_smoothing=0.1, **options)
    where = torch.arange(6) < 4
    called = module(LOGITS, labels, where=where, smoothing=0.3, denominator=3.0)
    expected = label_smoothed_cross_entropy(
        LOGITS, labels, smoothing=0.3, ignore_index=-100, where=where, denominator=3.0, **options
    )
    assert torch.equal(called, expected)
    assert torch.equal(torch.compile(module, fullgraph=True)(LOGITS, labels).isnan(), torch.tensor(False))


def test_soft_labels_and_ignore_index_in_the_module() -> None:
    soft = torch.softmax(LOGITS, -1)
    with pytest.raises(ValueError, match="needs class indices as target"):
        LabelSmoothedCrossEntropyLoss(ignore_index=3)(LOGITS, soft)
    assert torch.isfinite(LabelSmoothedCrossEntropyLoss()(LOGITS, soft))


def test_plain_module_is_cross_entropy_and_never_overflows() -> None:
    """Two faults of the module this started from: None broadcast [N, 1] against [N], and exp overflowed above 88."""
    plain = lsce_torch.CELossWithLabelSmoothing(None, class_num=5)
    loss = plain(1000 * LOGITS, LABELS)
    expected = torch.nn.functional.cross_entropy(1000 * LOGITS, LABELS)
    assert loss.shape == ()
    assert abs(loss - expected) <= 16 * 2.0**-53 * expected


@pytest.mark.parametrize("package", [lsce_spec, lsce_torch], ids=lambda package: package.__name__)
def test_no_instance_of_a_union_is_asked_for(package) -> None:
    """torch.compile of torch 2.9 cannot trace `isinstance(x, A | B)`. A tuple of types is right in all versions."""
    for path in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                assert not isinstance(node.args[1], ast.BinOp), f"{path}:{node.lineno}"
