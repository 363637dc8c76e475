"""Every transform of torch around every loss, and transforms around transforms, against a loss in three plain lines.

A composition works if it gives what the plain loss gives under the same composition. Where torch itself refuses a
composition, such as `torch.autograd.grad` within `torch.func.vmap`, it must refuse ours as well.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing._internal import composite_compliance
from torch.utils.checkpoint import checkpoint

from lsce_torch import label_smoothed_cross_entropy, lean, linear_label_smoothed_cross_entropy

ROWS, CLASSES = 3, 3
LABELS = torch.tensor([1, 0, 2])
COUNTED = torch.tensor([True, True, False])
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(CLASSES, CLASSES, dtype=torch.float64, generator=GENERATOR)
POINT = torch.randn(ROWS, CLASSES, dtype=torch.float64, generator=GENERATOR)
SMOOTHING = 0.1
# Float64 rounds at 1e-16; third derivatives of sums over three classes lose a few digits of that.
TOLERANCE = 1e-12

Function = Callable[[torch.Tensor], torch.Tensor]


def plain_losses(logits: torch.Tensor) -> torch.Tensor:
    target = (1 - SMOOTHING) * torch.nn.functional.one_hot(LABELS, CLASSES).double() + SMOOTHING / CLASSES
    return torch.sum(target * (_log_sum_exp(logits)[..., None] - logits), dim=-1)


def _log_sum_exp(logits: torch.Tensor) -> torch.Tensor:
    """Not by `torch.logsumexp` or `torch.log_softmax`, whose tangents torch cannot differentiate backwards."""
    return torch.log(torch.sum(torch.exp(logits), dim=-1))


def plain_capped(logits: torch.Tensor) -> torch.Tensor:
    capped = 3 * torch.tanh(logits / 3)
    return torch.where(COUNTED, plain_losses(capped) + 0.1 * _log_sum_exp(capped) ** 2, 0)


def plain_total(hidden: torch.Tensor) -> torch.Tensor:
    return plain_losses(hidden @ WEIGHT.T).sum()


dense = partial(label_smoothed_cross_entropy, labels=LABELS, smoothing=SMOOTHING, reduction="none")
linear = partial(linear_label_smoothed_cross_entropy, weight=WEIGHT, labels=LABELS, smoothing=SMOOTHING, chunk_size=1)


def as_of_more(limit: str, reduction: str) -> Function:
    """Return the loss as it is computed for more logits, beyond the limit of that name."""

    def loss(logits: torch.Tensor) -> torch.Tensor:
        with mock.patch.object(lean, limit, 0):
            return dense(logits, reduction=reduction)

    return loss


LOSSES: dict[str, tuple[Function, Function]] = {
    "fused": (partial(dense, implementation="fused"), plain_losses),
    "fused, mean": (partial(dense, implementation="fused", reduction="mean"), lambda z: plain_losses(z).mean()),
    "fused, few, mean": (as_of_more("_FEWEST", "mean"), lambda z: plain_losses(z).mean()),
    "fused, in blocks": (as_of_more("_FEW", "none"), plain_losses),
    "fused, in blocks, mean": (as_of_more("_FEW", "mean"), lambda z: plain_losses(z).mean()),
    "fused, capped": (partial(dense, implementation="fused", where=COUNTED, z_loss=0.1, softcap=3.0), plain_capped),
    "reference": (partial(dense, implementation="reference"), plain_losses),
    "linear, sum": (partial(linear, reduction="sum"), plain_total),
    "linear, mean of some rows": (
        partial(linear, reduction="mean", where=COUNTED),
        lambda hidden: torch.where(COUNTED, plain_losses(hidden @ WEIGHT.T), 0).sum() / 2,
    ),
    "linear, by the weight": (
        lambda weight: linear_label_smoothed_cross_entropy(
            POINT, weight, LABELS, smoothing=SMOOTHING, chunk_size=1, reduction="sum"
        ),
        lambda weight: plain_losses(POINT @ weight.T).sum(),
    ),
    "linear, none": (
        partial(linear, recompute=True, reduction="none"),
        lambda hidden: plain_losses(hidden @ WEIGHT.T),
    ),
}
SLOW_LOSSES = [pytest.param(loss, marks=pytest.mark.slow) for loss in LOSSES if loss != "fused"]


# --- The transforms: each makes a function of a tensor from a function of a tensor ---------------------------------


def _waves(shape: torch.Size) -> torch.Tensor:
    return torch.cos(torch.arange(1, 1 + shape.numel(), dtype=torch.float64)).reshape(shape)


def _twice(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x / 2])


def _vjp(function: Function) -> Function:
    def transformed(x: torch.Tensor) -> torch.Tensor:
        value, pullback = torch.func.vjp(function, x)
        return pullback(_waves(value.shape))[0]

    return transformed


def _autograd(function: Function, *, batched: bool = False) -> Function:
    def transformed(x: torch.Tensor) -> torch.Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        value = function(x)
        upstream = _waves(value.shape)
        if batched:
            upstream = _twice(upstream)
        return torch.autograd.grad(value, x, upstream, create_graph=True, is_grads_batched=batched)[0]

    return transformed


def _dual(function: Function) -> Function:
    def transformed(x: torch.Tensor) -> torch.Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, _waves(x.shape)))).tangent

    return transformed


def _users_function(function: Function) -> Function:
    class Users(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: torch.Tensor) -> torch.Tensor:
            return function(x)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
            return torch.func.vjp(function, *ctx.saved_tensors)[1](upstream)[0]

        @staticmethod
        def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
            return torch.func.jvp(function, ctx.saved_tensors, (tangent,))[1]

    return Users.apply


def _jacobian(function: Function) -> Function:
    return lambda x: torch.autograd.functional.jacobian(function, x, create_graph=True, vectorize=True)


TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "vjp": _vjp,
    "jvp": lambda function: lambda x: torch.func.jvp(function, (x,), (_waves(x.shape),))[1],
    "vmap": lambda function: lambda x: torch.func.vmap(function)(_twice(x)),
    "checkpoint": lambda function: lambda x: checkpoint(function, x, use_reentrant=False),
    "autograd": _autograd,
    "batched": partial(_autograd, batched=True),
    "dual": _dual,
    "users_function": _users_function,
    "jacobian": _jacobian,
    "jacfwd": torch.func.jacfwd,
    "jacrev": torch.func.jacrev,
    "hessian": torch.func.hessian,
}
# The others are made of these.
BASIC = ("vjp", "jvp", "vmap", "checkpoint", "autograd", "dual", "users_function")


@pytest.fixture(autouse=True)
def saved_tensor_hooks() -> Iterator[None]:
    """Remove hooks after a test: if `checkpoint` raises within a transform, torch 2.9 does not remove its own."""
    yield
    while torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()


@cache
def _evaluated(function: Function, names: tuple[str, ...]) -> torch.Tensor | Exception:
    """Return the value at POINT of a function that is transformed by the first name first, or what it raised."""
    for name in names:
        function = TRANSFORMS[name](function)
    try:
        return function(POINT).detach()
    except Exception as problem:
        return problem


def assert_as_plain(loss: str, *names: str) -> None:
    actual, expected = outcomes = [_evaluated(function, names) for function in LOSSES[loss]]
    if any("please report a bug to PyTorch" in str(outcome) for outcome in outcomes):
        pytest.skip("torch asserts something about itself, with the plain loss or with ours")
    if isinstance(expected, Exception):
        assert isinstance(actual, Exception), f"plain: {expected!r}"
        return
    if isinstance(actual, Exception):
        raise actual
    assert actual.shape == expected.shape
    assert torch.max(torch.abs(actual - expected)) <= TOLERANCE * torch.max(torch.abs(expected))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_transform(loss: str, name: str) -> None:
    assert not isinstance(_evaluated(LOSSES[loss][1], (name,)), Exception)
    assert_as_plain(loss, name)


@pytest.mark.parametrize("outer", TRANSFORMS)
@pytest.mark.parametrize("inner", TRANSFORMS)
@pytest.mark.parametrize("loss", ["fused", *SLOW_LOSSES])
def test_transform_of_a_transform(loss: str, inner: str, outer: str) -> None:
    assert_as_plain(loss, inner, outer)


@pytest.mark.slow
@pytest.mark.parametrize("outer", BASIC)
@pytest.mark.parametrize("middle", BASIC)
@pytest.mark.parametrize("inner", BASIC)
@pytest.mark.parametrize("loss", ["fused", "fused, mean", "fused, in blocks, mean", "linear, sum", "linear, none"])
def test_three_transforms(loss: str, inner: str, middle: str, outer: str) -> None:
    assert_as_plain(loss, inner, middle, outer)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vjp", "jvp", "vmap", "dual", "jacfwd", "jacrev", "hessian"])
@pytest.mark.parametrize("loss", ["fused", "linear, sum", "linear, none"])
def test_compiled_transform(loss: str, name: str) -> None:
    """The operator of the linear loss has no rules for transforms: within one, its plain operations are compiled."""
    function, plain = LOSSES[loss]
    torch._dynamo.reset()
    actual, expected = torch.compile(TRANSFORMS[name](function), backend="aot_eager")(POINT), _evaluated(plain, (name,))
    assert isinstance(expected, torch.Tensor)
    assert actual.shape == expected.shape
    assert torch.max(torch.abs(actual - expected)) <= TOLERANCE * torch.max(torch.abs(expected))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_wrong_loss_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "wrong", (lambda logits: (1 + 1e-11) * plain_losses(logits), plain_losses))
    with pytest.raises(AssertionError):
        assert_as_plain("wrong", name)


COMPLIANCE: dict[str, Callable[..., None]] = {
    "mode": lambda function, arguments, equal: composite_compliance.check_with_mode(function, arguments, {}, equal),
    "any wrapped": lambda function, arguments, equal: composite_compliance.check_all_permutations(
        function, arguments, {}, equal
    ),
    "gradient wrapped": lambda function, arguments, equal: composite_compliance.check_backward_formula(
        function, arguments, {}, None, None, equal
    ),
    "tangent wrapped": lambda function, arguments, equal: composite_compliance.check_forward_ad_formula(
        function, arguments, {}, None, equal
    ),
}


@pytest.mark.parametrize("check", COMPLIANCE)
@pytest.mark.parametrize("options", [{}, {"ignore_index": 0, "z_loss": 0.1}, {"convention": "max_sup", "softcap": 3.0}])
@pytest.mark.parametrize("loss", ["dense", "linear"])
def test_tensors_that_stand_for_others(loss: str, options: dict[str, Any], check: str) -> None:
    """Each argument, gradient or tangent alone may be of a subclass, whose results go into no plain tensor."""
    arguments: tuple[torch.Tensor, ...] = (POINT, LABELS)
    function: Callable[..., torch.Tensor] = label_smoothed_cross_entropy
    if loss == "linear":
        arguments, function = (POINT, WEIGHT, LABELS), linear_label_smoothed_cross_entropy
    requires_grad = check.endswith("wrapped") and check != "any wrapped"
    arguments = tuple(a.clone().requires_grad_(requires_grad and a.is_floating_point()) for a in arguments)
    COMPLIANCE[check](partial(function, smoothing=SMOOTHING, **options), arguments, torch.testing.assert_close)
