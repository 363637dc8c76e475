"""A gradient that is not the derivative of its values is named with the line that cuts it; a faithful one never is."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

import lsce_jax
import lsce_torch
from parity_tests.commands.layers import _conclusion
from parity_tests.losses.models_jax import JaxModel
from parity_tests.losses.models_torch import TorchModel
from parity_tests.losses.user_losses import adapt, find_reduction
from parity_tests.meta import losses_brought_to_jax as brought_to_jax
from parity_tests.meta import losses_brought_to_torch as brought_to_torch
from parity_tests.meta.running import invoke
from parity_tests.studies.derivatives import Cause, Stencil, cause_of_loss
from parity_tests.studies.layers import compare_layers
from parity_tests.studies.probes import Question, plain_cases
from parity_tests.studies.sameness import Runs


@pytest.fixture(autouse=True)
def _standard(one_thread: None) -> Iterator[None]:
    """Flax does not take the strictness of our tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def cutting(factor: str, cut: Callable[[Any], Any]) -> dict[str, Callable[[Any], Any]]:
    """Return what is done to each factor: one is cut off."""
    return {each: cut if each == factor else lambda values: values for each in FACTORS}


FACTORS = ("lse", "target", "weight", "at_max", "normaliser", "teacher")


def in_jax(logits: Any, labels: Any, cut: str = "") -> Any:
    """Focal loss whose target follows the softmax, with the mean of the weights and a term of each other kind."""
    cuts = cutting(cut, jax.lax.stop_gradient)
    p = jax.nn.softmax(logits)
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    lse = cuts["lse"](jax.nn.logsumexp(logits, -1, keepdims=True))
    target = cuts["target"](0.5 * one_hot + 0.5 * p)
    weight = cuts["weight"]((1 - (p * one_hot).sum(-1)) ** 2)
    at_max = cuts["at_max"](logits.max(-1))
    teacher = cuts["teacher"](jax.nn.softmax(logits / 2))
    rows = weight * (target * (lse - logits)).sum(-1) + 0.5 * at_max + ((p - teacher) ** 2).sum(-1)
    return rows.sum() / cuts["normaliser"](weight.sum())


def in_torch(logits: Any, labels: Any, cut: str = "") -> Any:
    """The same."""
    cuts = cutting(cut, torch.detach)
    p = logits.softmax(-1)
    one_hot = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
    lse = cuts["lse"](logits.logsumexp(-1, keepdim=True))
    target = cuts["target"](0.5 * one_hot + 0.5 * p)
    weight = cuts["weight"]((1 - (p * one_hot).sum(-1)) ** 2)
    at_max = cuts["at_max"](logits.amax(-1))
    teacher = cuts["teacher"](F.softmax(logits / 2, -1))
    rows = weight * (target * (lse - logits)).sum(-1) + 0.5 * at_max + ((p - teacher) ** 2).sum(-1)
    return rows.sum() / cuts["normaliser"](weight.sum())


def without_grad(logits: Any, labels: Any) -> Any:
    nll = F.cross_entropy(logits, labels, reduction="none")
    with torch.no_grad():  # the weight
        weight = (1 - torch.exp(-nll)) ** 2
    return (weight * nll).mean()


def twice_cut(logits: Any, labels: Any) -> Any:
    nll = F.cross_entropy(logits - logits.amax(-1, keepdim=True).detach(), labels, reduction="none")
    weight = (1 - torch.exp(-nll)).data
    return (weight * nll).sum() / weight.sum().detach()


@jax.custom_vjp
def focal_of(own: Any) -> Any:
    """Return the focal loss; the weight has no gradient."""
    return -((1 - jnp.exp(own)) ** 2) * own


focal_of.defvjp(lambda own: (focal_of(own), own), lambda own, flowing: (-flowing * (1 - jnp.exp(own)) ** 2,))


def custom_in_jax(logits: Any, labels: Any) -> Any:
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], -1)
    return focal_of(own).mean()


class Focal(torch.autograd.Function):
    """The same, with the same mistake."""

    @staticmethod
    def forward(ctx: Any, own: Any) -> Any:  # type: ignore[override]
        ctx.save_for_backward(own)
        return -((1 - own.exp()) ** 2) * own

    @staticmethod
    def backward(ctx: Any, flowing: Any) -> Any:  # type: ignore[override]
        return -flowing * (1 - ctx.saved_tensors[0].exp()) ** 2


def custom_in_torch(logits: Any, labels: Any) -> Any:
    return Focal.apply(F.log_softmax(logits, -1).gather(1, labels[:, None])).mean()


def untraceable(logits: Any, labels: Any) -> Any:
    nll = F.cross_entropy(logits, labels, reduction="none")
    return (torch.tensor((1 - torch.exp(-nll)).tolist(), dtype=nll.dtype) * nll).mean()


def cause_of(loss: Callable[..., Any], framework: str, cut: str = "", **kinds: Any) -> Cause | None:
    adapter = adapt(loss, framework, "loss", {"cut": cut} if cut else {})
    cases = [
        case
        for case in plain_cases(Question(num_classes=(10,), **kinds), "float64")
        if case.name.startswith(("plain", "ties", "near the optimum"))
    ]
    reduction = find_reduction(adapter, cases)
    runs = Runs(adapter, [replace(case, options={"reduction": reduction}) for case in cases], lambda case: True)
    assert runs.gave_results
    return cause_of_loss(runs, runs)


@pytest.mark.parametrize("cut", FACTORS)
@pytest.mark.parametrize(
    ("loss", "framework", "what"), [(in_jax, "jax", "stop_gradient"), (in_torch, "torch", "detach")]
)
def test_the_line_that_holds_a_factor_constant_is_named(loss: Any, framework: str, what: str, cut: str) -> None:
    found = cause_of(loss, framework, cut)
    assert found is not None
    (place,) = found.cuts
    assert (place.what, place.is_custom) == (what, False)
    assert f'cuts["{cut}"]' in str(place)


@pytest.mark.parametrize(("loss", "framework", "names", "line"), [
    (without_grad, "torch", ["no_grad"], "with torch.no_grad():  # the weight"),
    (twice_cut, "torch", ["detach", "detach"], "weight = (1 - torch.exp(-nll)).data"),
    (custom_in_jax, "jax", ["custom_vjp of focal_of"], "return focal_of(own).mean()"),
    (custom_in_torch, "torch", ["autograd.Function Focal"], "return Focal.apply("),
    (untraceable, "torch", [], "a detached factor or a custom gradient, in a place that cannot be traced"),
])  # fmt: skip
def test_other_causes_are_named(loss: Any, framework: str, names: list[str], line: str) -> None:
    """Cuts that change no gradient are not named, such as that of the maximum in `twice_cut`."""
    found = cause_of(loss, framework)
    assert found is not None
    assert [each.what for each in found.cuts] == names
    assert found.is_custom == (names != ["no_grad"] and "detach" not in names)
    assert line in found.what


KINDS: dict[str, dict[str, Any]] = {
    "cosine_margin": {"logit_kind": "cosines"},
    "multi_label": {"label_kind": "multi_hot"},
    "asymmetric": {"label_kind": "multi_hot"},
    "distillation": {"label_kind": "logits"},
}
BROUGHT = ("smoothed", "non_target", "focal", "poly", "hinge", *KINDS)


@pytest.mark.parametrize(("loss", "framework", "kinds"), [
    (in_jax, "jax", {}),
    (in_torch, "torch", {}),
    *((getattr(brought_to_jax, name), "jax", KINDS.get(name, {})) for name in BROUGHT),
    *((getattr(brought_to_torch, name), "torch", KINDS.get(name, {})) for name in BROUGHT),
    (lsce_jax.label_smoothed_cross_entropy, "jax", {}),
    (lsce_torch.label_smoothed_cross_entropy, "torch", {}),
    # At a corner any slope between both sides is right: 0 and 1/2 for ties here.
    (lambda z, y: jnp.maximum(z - jnp.roll(z, 1, -1), 0).mean(), "jax", {}),
    (lambda z, y: F.relu(z - z.roll(1, -1)).mean(), "torch", {}),
    # What is computed in float32 is held against its rounding.
    (lambda z, y: F.cross_entropy(z.float(), y), "torch", {}),
])  # fmt: skip
def test_a_faithful_gradient_is_not_accused(loss: Any, framework: str, kinds: dict[str, Any]) -> None:
    assert cause_of(loss, framework, **kinds) is None


def test_a_slope_is_held_against_the_derivative() -> None:
    for slope, right in ((2.0, True), (2.0 + 1e-7, False), (np.nan, True)):
        assert Stencil(lambda t: np.sin(2 * t), "float64", 1e-16).may_be(slope, 0) is right
    for slope, right in ((-1.0, True), (0.0, True), (1.0, True), (1.01, False)):
        assert Stencil(abs, "float64", 1e-16).may_be(slope, 0) is right


HERE = "test_derivatives.py, line "


@pytest.mark.parametrize(("arguments", "letter", "cause", "cure"), [
    (
        ["torch:{}:in_torch", "jax:{}:in_jax", "--b", "cut=normaliser"],
        "B",
        ("a factor or term is held constant by stop_gradient in ", '`return rows.sum() / cuts["normaliser"](weight'),
        "remove the stop_gradient there, or hold the same constant on the other side",
    ),
    (
        ["torch:{}:custom_in_torch", "jax:{}:focal"],
        "A",
        ("a custom gradient, autograd.Function Focal in ", "`return Focal.apply(F.log_softmax"),
        "make the backward pass of the autograd.Function Focal the derivative of its values",
    ),
])  # fmt: skip
def test_the_verdict_names_side_and_line(
    arguments: list[str], letter: str, cause: tuple[str, str], cure: str, tmp_path: Path
) -> None:
    files = "--json", str(tmp_path / "found.json"), "--report", str(tmp_path)
    names = [each.format(__name__) for each in arguments]
    outcome = invoke("compare", *names, "--classes", "10", *files)
    assert outcome.exit_code == 1, outcome.output
    headline, mistake, change = outcome.output.splitlines()[-3:]
    assert headline.endswith(f"only the gradients differ ({'B' if letter == 'A' else 'A'} is taken as right).")
    assert mistake.startswith(f"The mistake is in {letter} (")
    assert f"): its gradient is not the derivative of its values: {cause[0]}{HERE}" in mistake
    assert cause[1] in mistake
    assert change == f"Change in {letter}: {cure}."
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["not_derivatives"]) == [letter]
    assert unescape((tmp_path / "index.html").read_text()).count(found["not_derivatives"][letter]) >= 2
    assert found["readings"]["AB".index(letter)]["computes"] == "no formula that is known here"


def focal(logits: Any, labels: Any) -> Any:
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], -1)
    return (-((1 - jnp.exp(own)) ** 2) * own).mean()


def test_a_known_mistake_keeps_its_name() -> None:
    """What the bank of faults knows is said in its words."""
    outcome = invoke("compare", f"torch:{__name__}:smoothing_detached", "oracle", "--classes", "10")
    assert "The mistake is in A (smoothing_detached): the smoothing term of the loss has no gradient." in outcome.output
    assert "not the derivative" not in outcome.stdout


def smoothing_detached(logits: Any, labels: Any) -> Any:
    log_p = F.log_softmax(logits, -1)
    return -(0.9 * log_p.gather(1, labels[:, None])[:, 0] + 0.1 * log_p.mean(-1).detach()).mean()


# --- Layers -----------------------------------------------------------------------------------------------------------


class JaxNorm(nnx.Module):
    """A normalisation whose mean may be cut off."""

    def __init__(self, cut: bool) -> None:
        self.scale, self.cut = nnx.Param(jnp.ones(8)), cut

    def __call__(self, x: Any) -> Any:
        mean = x.mean(-1, keepdims=True)
        if self.cut:
            mean = jax.lax.stop_gradient(mean)
        return (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-5) * self.scale[...]


class TorchNorm(torch.nn.Module):
    """The same."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.scale, self.cut = torch.nn.Parameter(torch.ones(8)), cut

    def forward(self, x: Any) -> Any:
        mean = x.mean(-1, keepdim=True)
        if self.cut:
            mean = mean.detach()
        return (x - mean) / (((x - mean) ** 2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.scale


def networks(cut_first: bool = False, cut_second: bool = False) -> tuple[JaxModel, TorchModel]:
    batch = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    layers = [nnx.Linear(8, 8, rngs=nnx.Rngs(0)), JaxNorm(cut_first), nnx.relu]
    first = JaxModel(nnx.Sequential(*layers), batch)
    second = torch.nn.Sequential(torch.nn.Linear(8, 8), TorchNorm(cut_second), torch.nn.ReLU())
    return first, TorchModel(second, torch.tensor(batch))


IN_JAX = f"a factor or term is held constant by stop_gradient in {HERE}"
IN_TORCH = f"a factor or term is held constant by detach in {HERE}"


@pytest.mark.parametrize(("options", "cause", "letters", "cure"), [
    ({"cut_first": True}, IN_JAX, "AB", "remove the stop_gradient there, or hold the same constant on the other side"),
    ({"cut_second": True}, IN_TORCH, "BA", "remove the detach there, or hold the same constant on the other side"),
])  # fmt: skip
def test_a_cut_in_a_layer_is_named(options: dict[str, bool], cause: str, letters: str, cure: str) -> None:
    wrong, right = letters
    headline, mistake, change = _conclusion(compare_layers(*networks(**options)))
    assert headline == f"DISAGREE in 1 of 3 layers ({right} is taken as right): layers.1."
    of_layer = f"its gradient in {wrong} is not the derivative of what it computes: {cause}"
    assert mistake.startswith(f"The first mistake is in layers.1, backward: {of_layer}")
    assert change == f"Change in {wrong}: {cure}."


def test_faithful_layers_agree() -> None:
    verdict = compare_layers(*networks())
    assert verdict.agrees
    assert not any(each.not_derivatives for each in verdict.layers)
