"""What the frameworks' own losses get wrong. Where they are right, `test_drop_in` shows that ours give the same."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import lsce_jax
import lsce_torch
from parity_tests.losses.adapters import JaxAdapter, TorchAdapter
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.bounds import error_bound
from parity_tests.truth.cases import make_case
from parity_tests.truth.comparison import against_oracle
from parity_tests.truth.oracle import solve


def narrow_losses(dtype: str, num_classes: int) -> dict[str, float]:
    """Return the true smoothed loss of random narrow logits, what the frameworks make of it, and what we do."""
    generator = np.random.default_rng(0)
    logits = torch.from_numpy(generator.normal(size=(8, num_classes))).to(getattr(torch, dtype))
    labels = torch.from_numpy(generator.integers(num_classes, size=8))
    in_jax, jax_labels = jnp.asarray(logits.float().numpy()).astype(dtype), jnp.asarray(labels.numpy())
    one_hot = jax.nn.one_hot(jax_labels, num_classes, dtype=in_jax.dtype)
    cross_entropy = torch.nn.functional.cross_entropy
    return {
        "exact": float(cross_entropy(logits.double(), labels, label_smoothing=0.1)),
        "torch": float(cross_entropy(logits, labels, label_smoothing=0.1)),
        "optax": float(optax.softmax_cross_entropy(in_jax, optax.smooth_labels(one_hot, 0.1)).mean()),
        "lsce_torch": float(lsce_torch.label_smoothed_cross_entropy(logits, labels)),
        "lsce_jax": float(lsce_jax.label_smoothed_cross_entropy(in_jax, jax_labels, reduction="mean")),
    }


def test_readme_narrow_logits() -> None:
    """The README's first two rows, to the digits that they show."""
    losses = {name: round(value, 4) for name, value in narrow_losses("bfloat16", 128256).items()}
    assert losses == {"exact": 12.8070, "torch": 12.8125, "optax": 12.8125, "lsce_torch": 12.8070, "lsce_jax": 12.8070}
    losses = {name: round(value, 4) for name, value in narrow_losses("float16", 32000).items()}
    assert losses == {"exact": 10.8700, "torch": np.inf, "optax": 10.8594, "lsce_torch": 10.8700, "lsce_jax": 10.8700}


def test_readme_small_loss() -> None:
    logits, label = np.array([[20.0, 0, 0, 0]], np.float32), np.array([0])
    assert f"{np.log1p(3 * np.exp(-20.0)):.3e}" == "6.183e-09"
    tensors = torch.from_numpy(logits), torch.from_numpy(label)
    assert float(torch.nn.functional.cross_entropy(*tensors)) == 0
    assert float(optax.softmax_cross_entropy_with_integer_labels(logits, label)[0]) == 0
    assert f"{lsce_torch.label_smoothed_cross_entropy(*tensors, smoothing=0.0):.3e}" == "6.183e-09"
    assert f"{lsce_jax.label_smoothed_cross_entropy(logits, label, smoothing=0.0)[0]:.3e}" == "6.183e-09"


def test_readme_many_classes() -> None:
    """How torch adds up the gradient of the smoothed term loses 1e-4 of each probability, and the others do not."""
    num_classes, smoothing, assumed = 2**18, 0.1, Arithmetic()
    logits, labels = np.zeros((1, num_classes), np.float32), np.array([0])
    # Of other classes than the label's: p less its target. An error of the logarithm of K is a relative one of p.
    exact = (1 - smoothing) / num_classes
    bound = (assumed.log * math.log(num_classes) + assumed.exp + 2) * 2.0**-24 / num_classes
    tensor = torch.from_numpy(logits).requires_grad_()
    targets = optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)
    losses = {
        "torch": torch.nn.functional.cross_entropy(tensor, torch.from_numpy(labels), label_smoothing=smoothing),
        "lsce_torch": lsce_torch.label_smoothed_cross_entropy(tensor, torch.from_numpy(labels), smoothing=smoothing),
    }
    gradients = {name: torch.autograd.grad(loss, tensor)[0].numpy() for name, loss in losses.items()}
    of_optax = jax.grad(lambda logits: optax.softmax_cross_entropy(logits, targets).sum())
    ours = jax.grad(lambda logits: lsce_jax.label_smoothed_cross_entropy(logits, labels, smoothing=smoothing).sum())
    gradients |= {"optax": np.asarray(of_optax(logits)), "lsce_jax": np.asarray(ours(logits))}
    errors = {name: np.abs(gradient[0, 1:].astype(float) - exact).max() for name, gradient in gradients.items()}
    assert errors.pop("torch") > 1e-4 / num_classes
    assert max(errors.values()) <= bound < 4e-6 / num_classes


def test_readme_bad_label() -> None:
    logits, label = np.arange(4, dtype=np.float32)[None], np.array([-1])
    of_last = optax.softmax_cross_entropy_with_integer_labels(logits, np.array([3]))
    assert optax.softmax_cross_entropy_with_integer_labels(logits, label) == of_last
    assert np.isnan(lsce_jax.label_smoothed_cross_entropy(logits, label)).all()
    tensors = torch.from_numpy(logits), torch.from_numpy(label)
    with pytest.raises(IndexError):
        torch.nn.functional.cross_entropy(*tensors)
    assert torch.isnan(lsce_torch.label_smoothed_cross_entropy(*tensors))


def test_module_without_rows() -> None:
    """Chosen difference: the mean over no rows is 0 where torch's is NaN."""
    labels = torch.full((3,), -100)
    logits = torch.zeros(3, 5, requires_grad=True)
    assert torch.isnan(torch.nn.CrossEntropyLoss()(logits, labels))
    loss = lsce_torch.LabelSmoothedCrossEntropyLoss()(logits, labels)
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_logits_beat_the_frameworks(dtype: str) -> None:
    """A finding, not a hope: at 256k classes the frameworks' own narrow losses miss the bound, ours do not."""
    case = make_case("wide", dtype)
    truth = solve(case)
    for adapter in (JaxAdapter(), TorchAdapter()):
        assert against_oracle(case, truth, adapter(case), adapter.arithmetic).agrees
    logits, labels = torch.from_numpy(case.logits).to(getattr(torch, dtype)), torch.from_numpy(case.labels)
    theirs = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1).double().numpy()
    assert truth.loss.error_of(theirs) > error_bound(case, truth, Arithmetic()).loss


@pytest.mark.parametrize(("label_smooth", "convention", "value"), [
    (0.2, "clamp", 1.5807412),
    (0.2, "uniform", 1.0540745),
    (None, "clamp", 0.00074121),
])  # fmt: skip
def test_reference_values(label_smooth: float | None, convention: str, value: float) -> None:
    """The values that the module this project started from is known by; half a unit of their last digit."""
    logits, labels = np.array([[0.1, 8, 0.1], [0.1, 0.1, 8]], np.float32), np.array([1, 2])
    from_jax = lsce_jax.CELossWithLabelSmoothing(label_smooth, 3, convention=convention)(logits, labels)
    module = lsce_torch.CELossWithLabelSmoothing(label_smooth, 3, convention=convention)
    from_torch = module(torch.from_numpy(logits), torch.from_numpy(labels))
    digits = 1e-7 if label_smooth else 1e-8
    for loss in (float(from_jax), float(from_torch)):
        assert abs(loss - value) <= digits / 2 + abs(value) * 2.0**-23
