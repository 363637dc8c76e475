"""The frameworks' own losses, swapped for ours: nothing changes over their whole argument space, in float64.

Nothing means: each element of loss and gradient differs by no more than two correct implementations may; see
`peer_bounds.py`. Faults in our place must be rejected. What differs by choice is in test_differences.py.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lsce_torch
from parity_tests.suite.drop_in import JAX, TORCH, WRONG, Tally, make_setting, reject, rows_of, share, verdict
from parity_tests.suite.optax_peer import (
    each_kind,
    gradient_step,
    optax_case,
    optax_loss,
    optax_peers,
    optax_settings,
    optax_two_axes,
    our_loss,
    run_jax,
    run_optax,
)
from parity_tests.suite.peer_bounds import leaf_bounds
from parity_tests.suite.torch_peer import (
    MODULES,
    SHAPES,
    arguments,
    each_shape,
    in_memory,
    layouts,
    run_torch,
    torch_leaf_gradients,
    torch_peers,
    torch_settings,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# None is what a user gets, which is the fused one.
each_implementation = pytest.mark.parametrize("implementation", [None, "reference"])


@each_implementation
@each_shape
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_torch_function(soft: bool, form: str, implementation: str | None) -> None:
    """`F.cross_entropy` becomes `lsce_torch.cross_entropy`, called as it was: by position, and by name."""
    tally = Tally()
    for setting in torch_settings(form, soft):
        if setting.divides_by_zero:
            continue  # chosen difference, tested below
        given = arguments(setting)
        weight, ignore_index, reduction, smoothing = given.values()
        by_position = weight, None, ignore_index, None, reduction, smoothing

        def ours(logits: torch.Tensor, labels: torch.Tensor, by_position: Any = by_position) -> torch.Tensor:
            return lsce_torch.cross_entropy(logits, labels, *by_position, implementation=implementation)

        peer = run_torch(partial(torch.nn.functional.cross_entropy, **given), setting)
        shares = verdict(setting, run_torch(ours, setting), peer)
        assert max(map(max, shares.values())) <= 1, (setting.case.name, shares)
        by_name = run_torch(partial(lsce_torch.cross_entropy, implementation=implementation, **given), setting)
        module = run_torch(lsce_torch.LabelSmoothedCrossEntropyLoss(**given, implementation=implementation), setting)
        for same in (by_name, module):
            assert np.array_equal(same.loss, run_torch(ours, setting).loss)
        tally.add(shares)
    print(tally)


@each_implementation
@each_shape
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_torch_module(soft: bool, form: str, implementation: str | None) -> None:
    """The class name alone is swapped: same losses and gradients of the logits, in every layout of memory."""
    tally = Tally()
    for setting, layout in product(torch_settings(form, soft), layouts(form)):
        if setting.divides_by_zero:
            continue  # chosen difference, tested below
        peer = torch.nn.CrossEntropyLoss(**arguments(setting))
        ours = lsce_torch.LabelSmoothedCrossEntropyLoss(**arguments(setting), implementation=implementation)
        shares = verdict(setting, run_torch(ours, setting, layout), run_torch(peer, setting, layout))
        assert max(map(max, shares.values())) <= 1, (setting.case.name, layout, shares)
        tally.add(shares)
    print(tally)


def test_layouts_are_what_their_names_say() -> None:
    """What the test above calls strided, transposed and channels last isn't contiguous."""
    images = np.zeros(SHAPES["[N, C, d1, d2]"])
    assert in_memory(images, "channels last").is_contiguous(memory_format=torch.channels_last)
    for layout in layouts("[N, C, d1, d2]")[1:]:
        assert not in_memory(images, layout).is_contiguous()
    assert in_memory(np.zeros((6, 5)), "transposed").t().is_contiguous()
    assert not in_memory(np.zeros(7), "strided").is_contiguous()


@each_implementation
@each_shape
def test_torch_gradients_of_probabilities_and_weight(form: str, implementation: str | None) -> None:
    """With soft labels torch differentiates by them and by the class weights. So do we."""
    largest = {"labels": 0.0, "weight": 0.0}
    make_ours = partial(lsce_torch.LabelSmoothedCrossEntropyLoss, implementation=implementation)
    for setting in torch_settings(form, True):
        ours = torch_leaf_gradients(setting, make_ours)
        peer = torch_leaf_gradients(setting, torch.nn.CrossEntropyLoss)
        bounds = leaf_bounds(setting.case, setting.truth, TORCH)
        assert ours.keys() == peer.keys()
        for name in peer:
            used = share(ours[name], peer[name], 2 * bounds[name])
            assert used <= 1, (setting.case.name, name, used)
            largest[name] = max(largest[name], used)
    print(f"largest share of the bounds: {largest}")


def test_torch_gradient_comparison_rejects() -> None:
    """Smoothing or weight missing in the labels' gradient, rows missing in the weight's, and both off by 2^-40."""
    nearest = {}
    for setting in torch_settings("[N, C]", True):
        case, bounds = setting.case, leaf_bounds(setting.case, setting.truth, TORCH)
        if case.smoothing == 1 or case.class_weight is None:
            continue
        gradients = torch_leaf_gradients(setting, torch.nn.CrossEntropyLoss)
        weight = np.where(case.class_weight == 0, 2, case.class_weight)
        wrong = {
            "no weight": ("labels", gradients["labels"] / weight),
            "labels off": ("labels", gradients["labels"] * (1 + 2**-40)),
            "weight off": ("weight", gradients["weight"] * (1 + 2**-40)),
            "a row less": ("weight", gradients["weight"] * 5 / 6),
        }
        if case.smoothing:
            wrong["no smoothing"] = ("labels", gradients["labels"] / (1 - case.smoothing))
        for fault, (name, values) in wrong.items():
            margin = share(values, gradients[name], 2 * bounds[name])
            assert margin > 1, (fault, case.name)
            nearest[fault] = min(nearest.get(fault, np.inf), margin)
    print(nearest)


def test_torch_signatures() -> None:
    """Ours take torch's arguments by position and by name, with its defaults, and further ones by name only."""
    for name in ("__init__", "forward"):
        theirs = inspect.signature(getattr(torch.nn.CrossEntropyLoss, name)).parameters.values()
        ours = inspect.signature(getattr(lsce_torch.LabelSmoothedCrossEntropyLoss, name)).parameters.values()
        shared = [(of.name, of.kind, of.default) for of in theirs]
        assert [(of.name, of.kind, of.default) for of in ours][: len(shared)] == shared
        assert all(of.kind == inspect.Parameter.KEYWORD_ONLY for of in list(ours)[len(shared) :])
    theirs = inspect.signature(torch.nn.functional.cross_entropy).parameters.values()
    ours = inspect.signature(lsce_torch.cross_entropy).parameters.values()
    shared = [(of.name, of.kind, of.default) for of in theirs]
    assert [(of.name, of.kind, of.default) for of in ours][: len(shared)] == shared
    assert all(of.kind == inspect.Parameter.KEYWORD_ONLY for of in list(ours)[len(shared) :])


@pytest.mark.parametrize("reduce", [None, True, False])
@pytest.mark.parametrize("size_average", [None, True, False])
def test_torch_deprecated_arguments(size_average: bool | None, reduce: bool | None) -> None:
    """By position, with the warning that torch gives."""
    setting = next(each for each in torch_settings("[N, C]", False) if each.case.options["reduction"] == "none")
    deprecated = size_average is not None or reduce is not None
    results = []
    for loss_class in MODULES:
        with pytest.warns(UserWarning, match="size_average") if deprecated else nullcontext():
            results.append(loss_class(None, size_average, -100, reduce, "mean", 0.1))
    peer, ours = results
    assert ours.reduction == peer.reduction
    options = {"reduction": peer.reduction, "ignore_index": -100}
    upstream = setting.case.upstream if peer.reduction == "none" else np.asarray(-0.75)
    setting = make_setting(replace(setting.case, options=options, smoothing=0.1, upstream=upstream), TORCH)
    shares = verdict(setting, run_torch(ours, setting), run_torch(peer, setting))
    assert max(map(max, shares.values())) <= 1, shares
    logits, labels = torch.from_numpy(setting.case.logits), torch.from_numpy(setting.case.labels)
    with pytest.warns(UserWarning, match="size_average") if deprecated else nullcontext():
        losses = lsce_torch.cross_entropy(logits, labels, None, size_average, -100, reduce, "mean", 0.1)
    assert torch.equal(losses, ours(logits, labels))


def test_torch_attributes_set_later() -> None:
    """A module that was made already is read as torch's is: its options may still be changed."""
    setting = torch_settings("[N, C]", False)[-1]
    results = []
    for loss_class in MODULES:
        loss_fn = loss_class()
        for name, value in arguments(setting).items():
            setattr(loss_fn, name, value)
        results.append(run_torch(loss_fn, setting))
    peer, ours = results
    shares = verdict(setting, ours, peer)
    assert max(map(max, shares.values())) <= 1, shares


@pytest.mark.parametrize("implementation", [None, pytest.param("reference", marks=pytest.mark.slow)])
@each_kind
def test_optax(kind: str, implementation: str | None) -> None:
    """Same losses and gradients, with the classes at every axis, with rows or classes left out, and reduced."""
    tally = Tally()
    for setting in optax_settings(kind):
        case = setting.case
        options = {"axis": case.axis, "reduction": case.options["reduction"], "implementation": implementation}
        ours = run_jax(gradient_step(our_loss, **options), case)
        shares = verdict(setting, ours, run_optax(kind, case))
        assert max(map(max, shares.values())) <= 1, (case.name, case.smoothing, shares)
        tally.add(shares)
    print(tally)


def test_optax_two_axes_of_classes() -> None:
    """What Optax takes as a tuple of axes is one reshape away."""
    case = replace(optax_case("integer", (4, 6), -1, "all", "none"), smoothing=0.0)
    setting = make_setting(case, JAX, unshifted=True)
    ours = run_jax(gradient_step(our_loss, axis=-1, reduction="none", implementation=None), case)
    shares = verdict(setting, ours, run_jax(gradient_step(optax_two_axes), case))
    assert max(map(max, shares.values())) <= 1, shares


@each_implementation
def test_optax_gradients_of_probabilities(implementation: str | None) -> None:
    """Optax differentiates by soft labels. So do we."""
    case = replace(optax_case("soft", (4, 6), 0, "all", "none"), smoothing=0.1)
    setting = make_setting(case, JAX)
    bound, gradients = 2 * leaf_bounds(case, setting.truth, JAX)["labels"], []
    with jax.enable_x64(True):
        operands = {"labels": jnp.asarray(case.labels), "smoothing": jnp.asarray(case.smoothing)}
        kept = {"axis": case.axis, "reduction": "none"}
        for loss_fn in (partial(our_loss, implementation=implementation), partial(optax_loss, kind="soft")):

            def total(labels: jax.Array, loss_fn: Callable[..., Any] = loss_fn) -> jax.Array:
                losses = loss_fn(jnp.asarray(case.logits), {**operands, "labels": labels}, **kept)
                return (losses * case.upstream).sum()

            gradients.append(rows_of(case, np.asarray(jax.jit(jax.grad(total))(operands["labels"]))))
    used = share(*gradients, bound)
    assert used <= 1
    assert share(gradients[0] * (1 + 2**-40), gradients[1], bound) > 1
    print(f"largest share of the bounds: {used:.2f}")


@pytest.mark.parametrize("fault", WRONG)
def test_torch_comparison_rejects(fault: str) -> None:
    reject(fault, *torch_peers())


@pytest.mark.parametrize("fault", [fault for fault in WRONG if not fault.startswith("weight")])
def test_optax_comparison_rejects(fault: str) -> None:
    reject(fault, *optax_peers())
