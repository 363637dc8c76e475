"""The linear loss of JAX: derivatives, transforms, chunks, memory.

The parity tests hold its values against the truth. These tests hold them against the reference, or in exact equality.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsce_jax import (
    chunked,
    layer,
    linear_label_smoothed_cross_entropy,
    linear_label_smoothed_cross_entropy_with_stats,
)
from tests.small_batches import BIAS, EPSILON, FRAMEWORKS, HIDDEN, assert_close, without_chunks
from tests.small_batches import CLASSES as K
from tests.small_batches import FEATURES as D
from tests.small_batches import KERNEL as WEIGHT
from tests.small_batches import LAYER_LABELS as LABELS
from tests.small_batches import LAYER_OPTIONS as OPTIONS
from tests.small_batches import ROWS as N
from tests.small_batches import WEIGHT as CLASS_WEIGHT

chunked_loss = partial(linear_label_smoothed_cross_entropy, chunk_size=3)
reference_loss = partial(linear_label_smoothed_cross_entropy, implementation="reference")


def outcome(loss: Callable[..., Any], *layer: Any, **options: Any) -> tuple[Any, ...]:
    """Return the losses, and all gradients of their weighted sum."""

    def of_layer(hidden: Any, weight: Any, bias: Any, labels: Any, **given: Any) -> Any:
        return loss(hidden, weight, labels, bias=bias, **given)

    return FRAMEWORKS["jax"].outcome(of_layer, *layer, LABELS, **options)


@pytest.fixture(autouse=True)
def double_precision() -> Any:
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", ["mean", "none", "everything", "prior"])
@pytest.mark.slow
def test_derivatives_against_finite_differences(name: str, assert_derivatives: Callable[..., None]) -> None:
    def loss(hidden: Any, weight: Any, bias: Any) -> Any:
        return chunked_loss(hidden, weight, LABELS, bias=bias, **OPTIONS[name])

    assert_derivatives(loss, HIDDEN, WEIGHT, BIAS)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.slow
def test_hessian_and_third_derivative(reduction: str) -> None:
    def total(loss: Callable[..., Any], hidden: Any) -> Any:
        return loss(hidden, WEIGHT, LABELS[:4], reduction=reduction).sum()

    def derivatives(hidden: Any, loss: Callable[..., Any]) -> Any:
        function = partial(total, loss)
        each = jax.hessian, lambda f: jax.jacrev(jax.grad(f)), lambda f: jax.jacfwd(jax.hessian(f))
        return [derivative(function)(hidden) for derivative in each]

    ours, theirs = (jax.jit(partial(derivatives, loss=loss))(HIDDEN[:4]) for loss in (chunked_loss, reference_loss))
    assert_close(tuple(map(np.asarray, ours)), tuple(map(np.asarray, theirs)))


@pytest.mark.parametrize("name", ["smoothing", "class_weight", "prior", "denominator"])
@pytest.mark.parametrize("recompute", [True, False])
def test_other_operands_are_differentiated(name: str, recompute: bool) -> None:
    values = {"smoothing": np.full(N, 0.3), "class_weight": CLASS_WEIGHT, "prior": np.full(K, 0.2), "denominator": 2.5}

    def total(operand: Any, loss: Callable[..., Any]) -> Any:
        return loss(HIDDEN, WEIGHT, LABELS, subtract_entropy=True, reduction="mean", **{**values, name: operand})

    ours = partial(chunked_loss, recompute=recompute)
    results = [
        np.asarray(jax.jit(jax.grad(partial(total, loss=loss)))(values[name])) for loss in (ours, reference_loss)
    ]
    assert_close((results[0],), (results[1],), 8 * EPSILON)


def test_only_what_is_asked_for_is_computed() -> None:
    """A gradient requested alone equals that among all, and no other gradient is computed with it."""

    def loss(hidden: Any, weight: Any, bias: Any) -> Any:
        return chunked_loss(hidden, weight, LABELS, bias=bias, reduction="mean")

    whole = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(HIDDEN, WEIGHT, BIAS)
    for i in range(3):
        alone = jax.jit(jax.grad(loss, argnums=i))(HIDDEN, WEIGHT, BIAS)
        assert_close((np.asarray(alone),), (np.asarray(whole[i]),))
    # Two matrix products: that of the weight's gradient is missing.
    compiled = jax.jit(jax.grad(loss)).lower(HIDDEN, WEIGHT, BIAS).compile()
    assert compiled.as_text().count(" dot(") == 2


def test_gradient_with_the_loss_computes_no_logits_twice() -> None:
    """Three products for a chunk: logits and the gradients of hidden and weight. A fourth computes the logits again."""

    def count(**options: Any) -> int:
        def loss(hidden: Any, weight: Any) -> Any:
            return chunked_loss(hidden, weight, LABELS, **options).sum()

        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(HIDDEN, WEIGHT).compile()
        return compiled.as_text().count(" dot(")

    assert count(reduction="mean") == 3
    assert count(reduction="mean", recompute=True) == 4
    assert count(reduction="none") == 4


def test_memory_is_that_of_a_chunk() -> None:
    """Compiled for 4 and for 16 chunks, the temporary memory is the same, and less than all logits."""
    rows, features, classes = 512, 8, 4096

    def temporary(num_chunks: int, **options: Any) -> int:
        hidden = jnp.zeros((rows * num_chunks, features), jnp.float32)
        weight, labels = jnp.zeros((features, classes), jnp.float32), jnp.zeros(rows * num_chunks, jnp.int32)

        def loss(hidden: Any, weight: Any) -> Any:
            return linear_label_smoothed_cross_entropy(hidden, weight, labels, chunk_size=rows, **options).sum()

        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, weight).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    chunk = 4 * rows * classes
    for options in ({"reduction": "mean"}, {"reduction": "none"}):
        few, many = temporary(4, **options), temporary(16, **options)
        # What grows is hidden and its gradient, in chunks, and a few numbers for each row.
        assert many - few <= 12 * rows * 4 * (2 * features + 8)
        assert few < 3 * chunk


def test_more_classes_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight's gradient is added up in tiles of classes, of which the last overlaps the one before."""
    monkeypatch.setattr(layer, "_TILE", 2)
    jax.clear_caches()
    theirs = outcome(reference_loss, HIDDEN, WEIGHT, BIAS, reduction="mean")
    for options in ({}, {"gradient_filter": 1e-300}):
        assert_close(outcome(chunked_loss, HIDDEN, WEIGHT, BIAS, reduction="mean", **options), theirs)
    jax.clear_caches()


def test_vmap() -> None:
    """Of rows, of layers, and of a gradient."""
    weights = np.stack([WEIGHT, 2 * WEIGHT])
    counted = np.arange(2 * N).reshape(2, N) % 3 != 0

    def gradient(weight: Any, counted: Any, reduction: str) -> Any:
        loss = partial(chunked_loss, HIDDEN, labels=LABELS, where=counted, reduction=reduction)
        return jax.grad(lambda weight: loss(weight).sum())(weight)

    def pairs(hidden: Any, weights: Any) -> Any:
        by_row = jax.vmap(lambda h, y: linear_label_smoothed_cross_entropy(h, WEIGHT, y))(hidden, LABELS)
        yield by_row, chunked_loss(hidden, WEIGHT, LABELS)
        for reduction, masks in (("mean", None), ("none", None), ("mean", counted)):
            step = partial(gradient, reduction=reduction)
            ours = jax.vmap(step, (0, None if masks is None else 0))(weights, masks)
            yield ours, jnp.stack([step(weights[i], None if masks is None else masks[i]) for i in range(2)])

    for ours, theirs in jax.jit(lambda *layer: tuple(pairs(*layer)))(HIDDEN, weights):
        assert_close((np.asarray(ours),), (np.asarray(theirs),))


def test_scan_over_microbatches_with_denominator() -> None:
    """Microbatches of different numbers of rows that count add up to the gradient of the whole batch."""
    hidden, labels = jnp.asarray(HIDDEN[:6]), jnp.asarray(LABELS[:6])
    counted = jnp.array([True, False, True, True, False, False])

    @jax.remat
    def loss(weight: Any, hidden: Any, labels: Any, counted: Any) -> Any:
        return linear_label_smoothed_cross_entropy(
            hidden, weight, labels, where=counted, reduction="mean", denominator=3, chunk_size=2
        )

    def step(total: Any, batch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(jnp.asarray(WEIGHT), *batch)), None

    batches = [array.reshape(2, 3, *array.shape[1:]) for array in (hidden, labels, counted)]
    (total, gradient), _ = jax.jit(lambda: jax.lax.scan(step, (0.0, jnp.zeros((D, K))), tuple(batches)))()
    whole = jax.jit(jax.value_and_grad(lambda w: reference_loss(hidden, w, labels, where=counted, reduction="mean")))(
        WEIGHT
    )
    assert_close((np.asarray(total), np.asarray(gradient)), tuple(map(np.asarray, whole)))


def test_tied_embedding() -> None:
    """The weight is also the embedding, and gets the gradients of both uses."""
    table, tokens = jnp.asarray(WEIGHT.T), jnp.asarray(LABELS)

    def loss(table: Any, loss: Callable[..., Any]) -> Any:
        return loss(jnp.tanh(table[tokens]), table.T, jnp.roll(tokens, 1), reduction="mean")

    ours, theirs = (
        np.asarray(jax.jit(jax.grad(partial(loss, loss=of)))(table)) for of in (chunked_loss, reference_loss)
    )
    assert_close((ours,), (theirs,))


def test_narrow_hidden_and_a_float32_weight() -> None:
    """The weight is multiplied in bfloat16; its gradient is not rounded to bfloat16."""
    hidden, weight = jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(WEIGHT, jnp.float32)
    for recompute in (False, True):
        step = jax.value_and_grad(
            lambda h, w, r=recompute: chunked_loss(h, w, LABELS, reduction="mean", recompute=r), argnums=(0, 1)
        )
        loss, gradients = jax.jit(step)(hidden, weight)
        assert loss.dtype == jnp.float32
        assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.float32]
        assert jnp.any(gradients[1] != gradients[1].astype(jnp.bfloat16).astype(jnp.float32))


def test_a_number_as_smoothing_keeps_its_accuracy_and_compiles_once() -> None:
    """1 - 0.99999 in float32 is off by 0.1 %; a new smoothing does not compile a new program."""
    hidden, weight = HIDDEN.astype(np.float32), WEIGHT.astype(np.float32)
    chunked_loss(hidden, weight, LABELS, smoothing=0.5, convention="non_target", reduction="sum")
    compiled = chunked._with_gradients._cache_size()
    for smoothing in (0.25, 0.99999):
        ours = chunked_loss(hidden, weight, LABELS, smoothing=smoothing, convention="non_target", reduction="sum")
        theirs = reference_loss(
            hidden.astype(np.float64), weight.astype(np.float64), LABELS, smoothing=smoothing,
            convention="non_target", reduction="sum",
        )  # fmt: skip
        assert abs(float(ours) - float(theirs)) <= 64 * 2.0**-24 * float(theirs)
    assert chunked._with_gradients._cache_size() == compiled


def test_one_feature_in_float64() -> None:
    """The logits are products of two numbers, which XLA might round in some uses only."""
    hidden = jnp.array([1.7769346512604225, -0.6945933575499162, -1.180283911849588, -1.7838454781954174])[:, None]
    weight, labels = jnp.array([[1.2887231687245124, -0.13599423088681162]]), jnp.array([0, 0, 1, 0])
    expected = np.asarray(jax.jit(reference_loss)(hidden, weight, labels))
    for options in ({}, {"reduction": "sum"}):
        ours = linear_label_smoothed_cross_entropy(hidden, weight, labels, chunk_size=1, **options)
        assert_close((np.asarray(ours),), (expected if not options else expected.sum(),))


def test_rows_of_an_explicit_mesh() -> None:
    """Rows divided over two devices, also if their number is not a multiple of the chunk."""
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    hidden, weight, labels = np.linspace(-1, 1, 60).reshape(20, 3), np.eye(3, 5), np.arange(20) % 5
    for options in ({}, {"chunk_size": 4}, {"chunk_size": 6, "where": labels != 1}):

        def step(hidden: Any, weight: Any, labels: Any, options: Any = options) -> Any:
            def loss(hidden: Any, weight: Any) -> Any:
                return linear_label_smoothed_cross_entropy(hidden, weight, labels, reduction="mean", **options)

            return jax.value_and_grad(loss, (0, 1))(hidden, weight)

        theirs = jax.jit(step)(hidden, weight, labels)
        with jax.set_mesh(mesh):
            divided = [
                jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))
                for array, axes in ((hidden, ("rows", None)), (weight, ()), (labels, ("rows",)))
            ]
            ours = jax.jit(step)(*divided)
        pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
        for one, other in pairs:
            assert_close((np.asarray(one),), (np.asarray(other),))


@pytest.mark.parametrize(
    "name", ["everything", *(pytest.param(n, marks=pytest.mark.slow) for n in ("where", "where_none", "recompute"))]
)
def test_rows_that_count_come_first_on_one_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a single device chunks without a row that counts are skipped. The tests have several, so they patch that."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    options = {**OPTIONS[name], "where": np.arange(N) == 5}
    theirs = outcome(reference_loss, HIDDEN, WEIGHT, BIAS, **without_chunks(options))
    for chunk_size in (1, 3):
        loss = partial(linear_label_smoothed_cross_entropy, chunk_size=chunk_size)
        assert_close(outcome(loss, HIDDEN, WEIGHT, BIAS, **options), theirs)
    _, stats = linear_label_smoothed_cross_entropy_with_stats(HIDDEN, WEIGHT, LABELS, chunk_size=3, **options)
    assert np.array_equal(stats.valid, options["where"] & (options.get("ignore_index") != LABELS))


def test_the_gradient_takes_the_memory_of_a_chunk() -> None:
    """One array as large as the logits of a chunk, not one more for their gradient."""
    rows, classes = 2048, 16384
    shapes = ((rows, 16), jnp.float32), ((16, classes), jnp.float32), ((rows,), jnp.int32)
    loss = partial(linear_label_smoothed_cross_entropy, reduction="mean", chunk_size=512)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    compiled = step.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * 4 * 512 * classes
