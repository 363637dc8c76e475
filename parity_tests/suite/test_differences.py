"""Where ours differs from the frameworks' own losses by choice: each time what the peer gives, and what ours does."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from numpy.typing import NDArray

import lsce_jax
import lsce_torch
from parity_tests.suite.drop_in import (
    JAX,
    SMOOTHINGS,
    TORCH,
    PeerSetting,
    apart,
    as_result,
    make_setting,
    share,
    verdict,
)
from parity_tests.suite.optax_peer import gradient_step, loose_types, our_loss, run_jax, run_optax
from parity_tests.suite.peer_bounds import leaf_bounds, peer_bound
from parity_tests.suite.torch_peer import MODULES, SHAPES, arguments, run_torch, torch_settings
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.bounds import error_bound
from parity_tests.truth.cases import Case
from parity_tests.truth.oracle import solve
from parity_tests.truth.precision import round_to

# What differs by choice.

OPTAX_LOSSES = {"integer": optax.softmax_cross_entropy_with_integer_labels, "soft": optax.softmax_cross_entropy}
LOGITS = np.random.default_rng(11).normal(size=(3, 4))
LABELS = np.array([0, 2, 3])


def torch_pair(logits: NDArray[Any], labels: NDArray[Any], **options: Any) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Return loss and gradient, torch's first."""
    outcomes = []
    for loss_class in MODULES:
        leaf = torch.from_numpy(logits.copy()).requires_grad_()
        loss = loss_class(**options)(leaf, torch.from_numpy(labels.copy()))
        loss.sum().backward()
        outcomes.append((loss.detach().numpy(), leaf.grad.numpy()))
    return outcomes


def jax_outcome(loss_fn: Callable[..., jax.Array], logits: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return loss and gradient in float64."""

    def total(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss = loss_fn(logits)
        return loss.sum(), loss

    with jax.enable_x64(True), loose_types():
        (_, loss), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(logits)
    return np.asarray(loss), np.asarray(gradient)


def ours_in_jax(labels: NDArray[Any], **options: Any) -> Callable[..., jax.Array]:
    return partial(lsce_jax.label_smoothed_cross_entropy, labels=labels, **{"smoothing": 0.0, **options})


def test_torch_mean_over_nothing() -> None:
    """Where all rows are ignored, or all their weights are 0, torch's mean is NaN; ours and its gradient are 0."""
    settings = [each for form in SHAPES for each in torch_settings(form, False) if each.divides_by_zero]
    assert len(settings) == 15
    for setting in settings:
        peer = run_torch(torch.nn.CrossEntropyLoss(**arguments(setting)), setting)
        ours = run_torch(lsce_torch.LabelSmoothedCrossEntropyLoss(**arguments(setting)), setting)
        assert np.isnan(peer.loss)
        # Divided by a weight of 0 torch's gradient is NaN; that of an ignored row is 0.
        assert np.isnan(peer.gradient).all() or setting.case.labels == setting.ignore_index
        assert ours.loss == 0
        assert not ours.gradient.any()


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("labels", [LABELS[:0], np.zeros((0, 4))], ids=["indices", "probabilities"])
def test_torch_mean_of_no_rows(labels: NDArray[Any], smoothing: float) -> None:
    (peer, _), (ours, _) = torch_pair(LOGITS[:0], labels, label_smoothing=smoothing)
    assert np.isnan(peer)
    assert ours == 0


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_torch_all_weights_zero(smoothing: float) -> None:
    """The mean of labels divides by their weights, which are 0; that of probabilities by the number of rows."""
    weight = torch.zeros(4, dtype=torch.float64)
    peer, ours = torch_pair(LOGITS, LABELS, weight=weight, label_smoothing=smoothing)
    assert np.isnan(peer[0])
    assert np.isnan(peer[1]).all()
    assert ours[0] == 0
    assert not ours[1].any()
    for loss, gradient in torch_pair(LOGITS, np.eye(4)[LABELS], weight=weight, label_smoothing=smoothing):
        assert loss == 0
        assert not gradient.any()


def test_optax_mean_over_nothing() -> None:
    nothing = np.zeros(3, bool)
    peer, _ = jax_outcome(lambda logits: OPTAX_LOSSES["integer"](logits, LABELS).mean(where=nothing), LOGITS)
    ours = jax_outcome(ours_in_jax(LABELS, where=nothing, reduction="mean"), LOGITS)
    assert np.isnan(peer)
    assert ours[0] == 0
    assert not ours[1].any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_logits(dtype: str) -> None:
    """Ours computes and returns float32, torch and Optax what they were given. The gradients are narrow in each."""
    case = Case("", dtype, round_to(LOGITS, dtype), LABELS, {"reduction": "none"}, 0.1, 1)
    truth = solve(case)
    limit = error_bound(case, truth, JAX).loss
    narrow = torch.from_numpy(case.logits).to(getattr(torch, dtype))
    for loss_class, expected in zip(MODULES, (narrow.dtype, torch.float32), strict=True):
        leaf = narrow.clone().requires_grad_()
        losses = loss_class(reduction="none", label_smoothing=0.1)(leaf, torch.from_numpy(LABELS))
        losses.sum().backward()
        assert losses.dtype == expected
        assert leaf.grad.dtype == narrow.dtype
        error = truth.loss.error_of(losses.detach().double().numpy())
        assert np.all(error <= limit) if expected == torch.float32 else np.all(error > limit)

    logits, labels = jnp.asarray(case.logits, dtype), jax.nn.one_hot(LABELS, 4, dtype=dtype)
    for losses, expected in (
        (optax.softmax_cross_entropy(logits, optax.smooth_labels(labels, 0.1)), dtype),
        (lsce_jax.label_smoothed_cross_entropy(logits, LABELS, smoothing=0.1), "float32"),
    ):
        assert losses.dtype == expected
        error = truth.loss.error_of(np.asarray(losses, np.float64))
        assert np.all(error <= limit) if expected == "float32" else np.all(error > limit)


def test_torch_wider_probabilities() -> None:
    """The dtype of torch's loss is the wider of logits and soft labels, ours that of the logits."""
    (peer, peer_gradient), (ours, gradient) = torch_pair(LOGITS.astype(np.float32), np.eye(4)[LABELS])
    assert peer.dtype == np.float64
    assert ours.dtype == np.float32
    assert peer_gradient.dtype == gradient.dtype == np.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("label", [-1, 4])
def test_torch_label_out_of_range(label: int, smoothing: float) -> None:
    """IndexError in torch; in ours NaN in that row only, or IndexError if asked."""
    labels = np.array([0, label, 3])
    tensors = torch.from_numpy(LOGITS), torch.from_numpy(labels)
    options = {"reduction": "none", "label_smoothing": smoothing}
    with pytest.raises(IndexError):
        torch.nn.CrossEntropyLoss(**options)(*tensors)
    losses = lsce_torch.LabelSmoothedCrossEntropyLoss(**options)(*tensors)
    assert torch.isnan(losses).tolist() == [False, True, False]
    with pytest.raises(IndexError, match=str(label)):
        lsce_torch.LabelSmoothedCrossEntropyLoss(**options, bad_labels="raise")(*tensors)


@pytest.mark.parametrize("label", [-1, -5, 4, -100])
def test_optax_label_out_of_range(label: int) -> None:
    """Optax counts -1 to -K from the end. Others make its loss NaN, and vanish in one-hot form; its gradient never is.

    Ours makes loss and gradient of the row NaN, and raises IndexError if asked.
    """
    labels = np.array([0, label, 3])
    losses, gradient = jax_outcome(lambda logits: OPTAX_LOSSES["integer"](logits, labels), LOGITS)
    if label == -1:
        last = jax_outcome(lambda logits: OPTAX_LOSSES["integer"](logits, np.array([0, 3, 3])), LOGITS)
        np.testing.assert_array_equal(losses, last[0])
        np.testing.assert_array_equal(gradient, last[1])
    else:
        assert np.isnan(losses).tolist() == [False, True, False]
        assert np.all(gradient[1] > 0)  # softmax, with no label subtracted
    one_hot = (np.arange(4) == labels[:, None]).astype(float)
    assert np.isfinite(jax_outcome(lambda logits: OPTAX_LOSSES["soft"](logits, one_hot), LOGITS)[0]).all()

    losses, gradient = jax_outcome(ours_in_jax(labels), LOGITS)
    assert np.isnan(losses).tolist() == [False, True, False]
    assert np.isnan(gradient).all(-1).tolist() == [False, True, False]
    with pytest.raises(IndexError, match=str(label)):
        lsce_jax.label_smoothed_cross_entropy(LOGITS.astype(np.float32), labels, bad_labels="raise")


def test_optax_label_outside_the_class_mask() -> None:
    """Optax takes the label's logit all the same, or drops it in one-hot form; for ours it is no class."""
    mask = np.array([True, True, True, False])
    where = np.broadcast_to(mask, LOGITS.shape)
    one_hot = np.eye(4)[LABELS]
    for losses, _ in (
        jax_outcome(lambda logits: OPTAX_LOSSES["integer"](logits, LABELS, where=where), LOGITS),
        jax_outcome(lambda logits: OPTAX_LOSSES["soft"](logits, one_hot, where=where), LOGITS),
    ):
        assert np.isfinite(losses).all()
    losses, _ = jax_outcome(ours_in_jax(LABELS, class_mask=mask), LOGITS)
    assert np.isnan(losses).tolist() == [False, False, True]


def test_optax_gradients_of_labels_left_out() -> None:
    """Optax's gradient by the soft labels that `where` leaves out is NaN, ours 0."""
    mask, rows = np.array([True, False, True, True]), np.array([True, False, True])
    outside = {"rows": np.broadcast_to(~rows[:, None], (3, 4)), "classes": np.broadcast_to(~mask, (3, 4))}
    ours = {"rows": {"where": rows}, "classes": {"class_mask": mask}}
    for name, left_out in outside.items():
        peer = jax_outcome(lambda q, of=left_out: OPTAX_LOSSES["soft"](LOGITS, q, where=~of), np.eye(4)[LABELS])
        loss_fn = partial(lsce_jax.label_smoothed_cross_entropy, LOGITS, smoothing=0.0, **ours[name])
        np.testing.assert_array_equal(np.isnan(peer[1]), left_out)
        _, gradient = jax_outcome(loss_fn, np.eye(4)[LABELS])
        assert np.isfinite(gradient).all()
        assert not gradient[left_out].any()


def setting_of(logits: NDArray[Any], labels: NDArray[Any], arithmetic: Arithmetic, **fields: Any) -> PeerSetting:
    options = {"reduction": "none"} if labels.dtype.kind == "f" else {"reduction": "none", "ignore_index": -100}
    case = Case("", "float64", logits, labels, options, axis=1, upstream=np.ones(3), **fields)
    return make_setting(case, arithmetic)


def with_minus_infinity() -> NDArray[Any]:
    """Return logits whose first row has a class 1 of probability 0; its label is class 0."""
    logits = LOGITS.copy()
    logits[0, 1] = -np.inf
    return logits


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("kind", ["no label", "label", "weight 0", "probability 0"])
def test_torch_minus_infinity(kind: str, smoothing: float) -> None:
    """A target where a logit is -inf makes the loss infinite in both. 0 * inf is NaN in torch's loss, and 0 in ours.

    The gradients are finite, and equal.
    """
    weight = np.array([1.0, 0.0, 2.0, 1.0]) if kind == "weight 0" else None
    labels = {"label": np.array([1, 2, 3]), "probability 0": np.eye(4)[LABELS]}.get(kind, LABELS)
    setting = setting_of(with_minus_infinity(), labels, TORCH, smoothing=smoothing, class_weight=weight)
    peer, ours = (run_torch(loss_class(**arguments(setting)), setting) for loss_class in MODULES)
    shares = verdict(setting, ours, peer)
    assert shares["ours"].loss <= 1
    assert max(of.gradient for of in shares.values()) <= 1
    # The factors of 0: the label's part, in torch (1 - e); the weight; the smoothed probability.
    zero_times_infinity = {"label": smoothing == 1, "weight 0": smoothing > 0, "probability 0": smoothing == 0}
    if zero_times_infinity.get(kind, False):
        assert np.isnan(peer.loss).tolist() == [True, False, False]
        assert not np.isnan(ours.loss).any()
    else:
        assert shares["each other"].loss <= 1


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_optax_minus_infinity(smoothing: float) -> None:
    """The same, in soft labels. Integer labels and `safe_softmax_cross_entropy` agree with ours."""
    for labels in (LABELS, np.eye(4)[LABELS]):
        setting = setting_of(with_minus_infinity(), labels, JAX, smoothing=smoothing)
        case = replace(setting.case, options={"reduction": "none"})
        ours = run_jax(gradient_step(our_loss, axis=1, reduction="none", implementation=None), case)
        peer = run_optax("soft" if labels.ndim == 2 else "one-hot", case)
        shares = verdict(setting, ours, peer)
        assert shares["ours"].loss <= 1
        assert max(of.gradient for of in shares.values()) <= 1
        if smoothing == 0:
            assert np.isnan(peer.loss).tolist() == [True, False, False]
            unshifted = replace(setting, peer=peer_bound(case, setting.truth, JAX, unshifted=True))
            assert max(apart(unshifted, ours, run_optax("integer", replace(case, labels=LABELS)))) <= 1
        else:
            assert shares["each other"].loss <= 1
        smoothed = (1 - smoothing) * np.eye(4)[LABELS] + smoothing / 4
        safe = jax_outcome(lambda logits, q=smoothed: optax.safe_softmax_cross_entropy(logits, q), case.logits)
        assert max(apart(setting, ours, as_result(case, *safe))) <= 1


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_torch_ignored_rows_of_nan(smoothing: float) -> None:
    """What an ignored row holds gets into torch's gradient, though not into its loss; in ours it stays out of both."""
    logits, labels = LOGITS.copy(), np.array([0, -100, 3])
    logits[1] = np.nan
    setting = setting_of(logits, labels, TORCH, smoothing=smoothing)
    peer, ours = (run_torch(loss_class(**arguments(setting)), setting) for loss_class in MODULES)
    assert np.isnan(peer.gradient).all(-1).tolist() == [False, True, False]
    peer.gradient[1] = 0
    assert max(map(max, verdict(setting, ours, peer).values())) <= 1


def test_smoothing_below_zero() -> None:
    """No smoothing in torch, a target of less than 0 in Optax, an error in ours. Above 1 torch raises as well."""
    tensors = torch.from_numpy(LOGITS), torch.from_numpy(LABELS)
    assert torch.nn.CrossEntropyLoss(label_smoothing=-0.1)(*tensors) == torch.nn.CrossEntropyLoss()(*tensors)
    assert optax.smooth_labels(np.eye(4, dtype=np.float32), -0.1).min() < 0
    for smoothing in (-0.1, 1.1):
        with pytest.raises(ValueError, match=str(smoothing)):
            lsce_torch.LabelSmoothedCrossEntropyLoss(label_smoothing=smoothing)
        with pytest.raises(ValueError, match=str(smoothing)):
            lsce_jax.label_smoothed_cross_entropy(LOGITS.astype(np.float32), LABELS, smoothing=smoothing)
    with pytest.raises(RuntimeError, match=r"1\.1"):
        torch.nn.CrossEntropyLoss(label_smoothing=1.1)(*tensors)


@pytest.mark.parametrize("name", ["int8", "int16", "int32"])
def test_torch_dtypes_of_labels(name: str) -> None:
    """Torch takes int64 and uint8 only, and a weight of the logits' dtype; ours takes any."""
    logits, labels = torch.from_numpy(LOGITS), torch.from_numpy(LABELS)
    narrow, weight = labels.to(getattr(torch, name)), torch.ones(4, dtype=torch.float32)
    peer, ours = (loss_class(label_smoothing=0.1) for loss_class in MODULES)
    with pytest.raises(RuntimeError, match="Long"):
        peer(logits, narrow)
    assert ours(logits, narrow) == ours(logits, labels) == ours(logits, labels.to(torch.uint8))
    assert torch.isfinite(peer(logits, labels.to(torch.uint8)))
    with pytest.raises(RuntimeError, match="Float"):
        torch.nn.CrossEntropyLoss(weight)(logits, labels)
    assert lsce_torch.LabelSmoothedCrossEntropyLoss(weight)(logits, labels).dtype == torch.float64


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_torch_gradient_of_the_weight_of_indices(smoothing: float) -> None:
    """With indices torch gives none. Ours is that of the probabilities which say the same."""
    weight = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    options = {"reduction": "sum", "label_smoothing": smoothing}
    gradients = []
    for loss_class, labels in zip(MODULES, (np.eye(4)[LABELS], LABELS), strict=True):
        leaf = weight.clone().requires_grad_()
        loss_class(leaf, **options)(torch.from_numpy(LOGITS), torch.from_numpy(labels)).backward()
        gradients.append(leaf.grad.numpy())
    with pytest.raises(RuntimeError, match="weight"):
        torch.nn.CrossEntropyLoss(leaf, **options)(torch.from_numpy(LOGITS), torch.from_numpy(LABELS))
    setting = setting_of(LOGITS, np.eye(4)[LABELS], TORCH, smoothing=smoothing, class_weight=weight.numpy())
    assert share(*gradients, 2 * leaf_bounds(setting.case, setting.truth, TORCH)["weight"]) <= 1


def test_torch_index_to_ignore_among_probabilities() -> None:
    """Both raise; torch a RuntimeError, ours a ValueError that says what to do."""
    tensors = torch.from_numpy(LOGITS), torch.from_numpy(np.eye(4)[LABELS])
    for loss_class, exception in zip(MODULES, (RuntimeError, ValueError), strict=True):
        with pytest.raises(exception, match="ignore_index"):
            loss_class(ignore_index=1)(*tensors)
