"""The fused implementation of JAX: derivatives, transforms, blocks of rows, saved arrays, compiled programs.

The parity tests hold its values against the truth. These tests hold them against the reference, or in exact equality.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsce_jax import (
    cpu,
    label_smoothed_cross_entropy,
    label_smoothed_cross_entropy_with_stats,
    linear_label_smoothed_cross_entropy,
)
from lsce_jax.row_sums import row_sums
from tests.small_batches import CALLS, EPSILON, FRAMEWORKS, LABELS, LOGITS, MASK, OPTIONS, PRIOR, WEIGHT, assert_close

fused_loss = partial(label_smoothed_cross_entropy, implementation="fused")
reference_loss = partial(label_smoothed_cross_entropy, implementation="reference")

each_call = pytest.mark.parametrize(("labels", "options"), CALLS.values(), ids=CALLS.keys())


@contextmanager
def changed(constant: str, value: int) -> Iterator[None]:
    """Change a constant of cpu.py, and compile the sums again before and after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, constant, value)
        row_sums.clear_cache()
        yield
    row_sums.clear_cache()


@pytest.fixture(scope="module", autouse=True)
def few_as_many() -> Iterator[None]:
    """Take few logits as many."""
    with changed("_FEW_LOGITS", 0):
        yield


@pytest.fixture
def small_blocks() -> Iterator[None]:
    """Blocks of four rows of five classes, so that the last block overlaps the one before it."""
    with changed("_BLOCK_SIZE", 20):
        yield


@pytest.fixture(autouse=True)
def double_precision() -> Any:
    with jax.enable_x64(True):
        yield


@each_call
@pytest.mark.slow
def test_derivatives_against_finite_differences(
    labels: Any, options: dict[str, Any], small_blocks: None, assert_derivatives: Callable[..., None]
) -> None:
    assert_derivatives(lambda logits: fused_loss(logits, labels, **options), LOGITS)


@pytest.mark.parametrize("name", ["smoothing", "class_weight", "prior"])
def test_other_operands_are_differentiated(name: str) -> None:
    values = {"smoothing": np.linspace(0.1, 0.9, 6), "class_weight": WEIGHT, "prior": PRIOR}
    # Of a bad label the reference makes NaN of every class weight.
    labels = np.array([0, 4, 2, 2, 1, 3 if name == "class_weight" else 9])

    def total(operand: Any, logits: Any, loss: Callable[..., Any]) -> Any:
        options = {**values, name: operand}
        return loss(logits, labels, subtract_entropy=True, **options)[:5].sum()

    for derivative in (jax.jacfwd, lambda f: jax.grad(lambda x, *rest: jax.grad(f)(x, *rest).sum())):
        results = [
            np.asarray(jax.jit(derivative(partial(total, loss=loss)))(values[name], LOGITS))
            for loss in (fused_loss, reference_loss)
        ]
        assert_close((results[0],), (results[1],), 8 * EPSILON)


@pytest.mark.parametrize("name", ["logits", "class_weight", "prior"])
def test_transposed_by_one_tangent_of_several(name: str) -> None:
    """The other tangents are arrays of zeros; what is transposed must not be taken for one of them."""
    values = {"logits": jnp.asarray(LOGITS), "class_weight": jnp.asarray(WEIGHT), "prior": jnp.asarray(PRIOR)}

    def slope(tangent: Any, loss: Callable[..., Any]) -> Any:
        tangents = jax.tree.map(jnp.zeros_like, values) | {name: tangent}
        return jax.jvp(lambda by_name: loss(labels=LABELS, **by_name).sum(), (values,), (tangents,))[1]

    ours, theirs = (
        jax.linear_transpose(partial(slope, loss=loss), values[name])(1.0)[0] for loss in (fused_loss, reference_loss)
    )
    assert_close((np.asarray(ours),), (np.asarray(theirs),), 8 * EPSILON)


def test_hessian() -> None:
    p = np.asarray(jax.nn.softmax(LOGITS[0]))
    exact = np.diag(p) - np.outer(p, p)
    for hessian in (jax.hessian, lambda f: jax.jacrev(jax.jacrev(f)), lambda f: jax.jacfwd(jax.jacfwd(f))):
        assert np.all(np.abs(jax.jit(hessian(lambda z: fused_loss(z, 2)))(LOGITS[0]) - exact) < 1e-15)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in ("plain", "capped", "max_sup") else [pytest.mark.slow])
    for name in OPTIONS if not {"smoothing", "where"} & OPTIONS[name].keys()
])  # fmt: skip
def test_vmap_is_the_batch(name: str, small_blocks: None) -> None:
    """Bit for bit, since the rule of vmap turns the new dimension into rows."""
    options = {**OPTIONS[name], "reduction": "none"}

    def loss(logits: Any, labels: Any) -> Any:
        return fused_loss(logits, labels, **options)

    batched = jax.jit(loss)(LOGITS, LABELS)
    assert np.array_equal(jax.jit(jax.vmap(loss))(LOGITS, LABELS), batched)
    assert np.array_equal(jax.jit(jax.vmap(loss, in_axes=(1, 0)))(LOGITS.T, LABELS), batched)

    @jax.jit
    def pairs(logits: Any, labels: Any) -> Any:
        """Not bit for bit: with one label for all rows XLA fuses the rest of the formula differently."""
        same_row, same_label = jnp.broadcast_to(logits[0], (6, 5)), jnp.broadcast_to(labels[0], (6,))
        return (
            (jax.vmap(jax.grad(loss))(logits, labels), jax.grad(lambda *a: loss(*a).sum())(logits, labels)),
            (jax.vmap(loss, in_axes=(0, None))(logits, labels[0]), loss(logits, same_label)),
            (jax.vmap(loss, in_axes=(None, 0))(logits[0], labels), loss(same_row, labels)),
        )

    for ours, theirs in pairs(LOGITS, LABELS):
        assert_close((np.asarray(ours),), (np.asarray(theirs),))


def test_vmap_of_statistics() -> None:
    batched = label_smoothed_cross_entropy_with_stats(LOGITS, LABELS, z_loss=0.1)
    losses, stats = jax.vmap(partial(label_smoothed_cross_entropy_with_stats, z_loss=0.1))(LOGITS, LABELS)
    assert np.array_equal(losses, batched[0])
    assert all(np.array_equal(one, other) for one, other in zip(stats, batched[1], strict=True))


def test_vmap_over_class_vectors() -> None:
    masks = np.stack([MASK, np.arange(5) != 2])
    losses = jax.vmap(lambda mask: fused_loss(LOGITS, LABELS, class_mask=mask))(masks)
    expected = jnp.stack([fused_loss(LOGITS, LABELS, class_mask=mask) for mask in masks])
    assert_close((np.asarray(losses),), (np.asarray(expected),))


@pytest.mark.parametrize(("num_rows", "dtype"), [
    pytest.param(*each, marks=[] if each in {(1, "float32"), (8, "float64"), (9, "bfloat16")} else [pytest.mark.slow])
    for each in product([1, 3, 4, 5, 8, 9], ["float64", "float32", "bfloat16"])
])  # fmt: skip
def test_blocks_do_not_matter(num_rows: int, dtype: str) -> None:
    """Numbers of rows that are not a multiple of the block, rows larger than a block, two dimensions of rows."""
    generator = np.random.default_rng(num_rows)
    logits = jnp.asarray(generator.normal(size=(2, num_rows, 5))).astype(dtype)
    labels = generator.integers(5, size=(2, num_rows))
    where = generator.random((2, num_rows)) < 0.7
    whole = FRAMEWORKS["jax"].outcome(fused_loss, logits, labels, where=where, class_mask=MASK)
    for block_size in (1, 20, 35):
        with changed("_BLOCK_SIZE", block_size):
            divided = FRAMEWORKS["jax"].outcome(fused_loss, logits, labels, where=where, class_mask=MASK)
        assert_close(divided, whole, 2.0**-52 if dtype == "float64" else 2.0**-23)


# Rows of every kind: random, equal logits, ties, a loss far below 1, a label that has most of the gaps, -inf beside the
# label and at it.
def rows_of_every_kind(num_classes: int, dtype: str) -> tuple[Any, Any]:
    generator = np.random.default_rng(num_classes)
    logits = generator.normal(size=(8, num_classes))
    labels = generator.integers(num_classes, size=8)
    logits[1] = 3.0
    logits[2, num_classes // 2 :] = logits[2, -1] = 5.0
    logits[3, labels[3]] = 40.0
    logits[4] = 0.0
    logits[4, labels[4]] = -1e4
    logits[5, (labels[5] + 1) % num_classes] = -np.inf
    logits[6, labels[6]] = -np.inf
    labels[7] = num_classes - 1
    logits[7, -1] = 9.0
    return logits.astype(dtype), labels


# Each way of cpu.py, its edges, and numbers of classes that no group divides. JAX compiles each for a second.
OF_EVERY_WAY = {(2, "float32"), (17, "float32"), (65, "float32"), (131, "float64"), (1009, "float32")}


@pytest.mark.parametrize(("num_classes", "dtype"), [
    pytest.param(*each, marks=[] if each in OF_EVERY_WAY else [pytest.mark.slow])
    for each in product([2, 16, 17, 64, 65, 127, 128, 131, 200, 1009, 1024], ["float32", "float64"])
])  # fmt: skip
@pytest.mark.parametrize("kinds", ["every kind", "random alone"])
@pytest.mark.parametrize("few", [False, True], ids=["many", "few"])
def test_ways_of_the_cpu(few: bool, kinds: str, dtype: str, num_classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and entropies relative to themselves, gradients, predictions; and a row of NaN that is left out."""
    monkeypatch.setattr(cpu, "_WINDOW_SIZE", 70)  # more than one block of windows, the last of which overlaps
    logits, labels = rows_of_every_kind(num_classes, dtype)
    if kinds == "random alone":
        # One label in the middle of the others' sizes, so that no row needs its groups again.
        logits, labels = np.tile(np.linspace(-1, 1, num_classes, dtype=dtype), (8, 1)), np.full(8, num_classes // 2)
    logits = np.concatenate([logits, np.full((1, num_classes), np.nan, dtype)])
    labels = np.append(labels, 0)

    def evaluate(loss: Callable[..., Any], logits: Any) -> Any:
        def total(logits: Any) -> Any:
            losses, stats = loss(logits, labels, where=np.arange(9) < 8, smoothing=0.1)
            return losses.sum(), (losses, stats)

        (_, (losses, stats)), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(logits)
        return (np.asarray(losses), stats, np.asarray(gradient))

    with changed("_FEW_LOGITS", 2**15 if few else 0):
        ours, theirs = (
            evaluate(partial(label_smoothed_cross_entropy_with_stats, implementation=implementation), given)
            for implementation, given in (
                ("fused", jnp.asarray(logits)),
                ("reference", jnp.asarray(logits, np.float64)),
            )
        )
    roundoff = 2.0**-24 if dtype == "float32" else 2.0**-53
    entropies = ours[1].entropy, theirs[1].entropy
    for one, other in ((ours[0], theirs[0]), (ours[1].nll, theirs[1].nll), entropies):
        assert_relatively_close(one, other, 32 * roundoff)
    assert np.array_equal(ours[1].correct, theirs[1].correct)
    assert np.array_equal(ours[1].prediction, theirs[1].prediction)
    scale = 1 + np.abs(np.nan_to_num(theirs[2]))
    assert np.all((np.abs(ours[2] - theirs[2]) <= 32 * roundoff * scale) | (np.isnan(ours[2]) & np.isnan(theirs[2])))


def test_a_label_far_below_all_others() -> None:
    """The loss has none of the label's gap here, which is far larger than the other gaps and must not round them away.

    All rows are of this kind. Another kind may have the sums computed with more care, for every row.
    """
    logits = np.random.default_rng(0).normal(size=(4, 200)).astype(np.float32)
    labels = np.array([0, 57, 198, 199])
    logits[np.arange(4), labels] = -1e6
    losses, expected = (
        loss(given, labels, smoothing=1.0, convention="non_target")
        for loss, given in ((fused_loss, logits), (reference_loss, logits.astype(np.float64)))
    )
    assert_relatively_close(losses, expected, 32 * 2.0**-24)


def assert_relatively_close(ours: Any, theirs: Any, bound: float) -> None:
    ours, theirs = (np.asarray(values, np.float64) for values in (ours, theirs))
    with np.errstate(invalid="ignore"):
        assert np.all((np.abs(ours - theirs) <= bound * np.abs(theirs)) | (ours == theirs))


@each_call
def test_only_logits_and_labels_are_kept(labels: Any, options: dict[str, Any]) -> None:
    """The backward pass keeps no other array as large as the logits."""
    logits = jnp.asarray(LOGITS)
    _, pullback = jax.vjp(lambda z: fused_loss(z, labels, **options), logits)
    kept = [np.asarray(leaf) for leaf in jax.tree.leaves(pullback) if np.size(leaf) >= logits.size]
    known = [LOGITS, np.asarray(labels)]
    assert kept
    for array in kept:
        assert any(array.shape == one.shape and np.array_equal(array, one) for one in known)


def test_the_reference_keeps_more() -> None:
    """The test above can fail: the reference fails it."""
    _, pullback = jax.vjp(lambda z: reference_loss(z, LABELS), jnp.asarray(LOGITS))
    assert sum(np.size(leaf) >= LOGITS.size for leaf in jax.tree.leaves(pullback)) > 2


def test_temporary_memory_is_that_of_a_block() -> None:
    """On the CPU, where XLA writes out unfused arrays: a few arrays of one block, for any number of rows."""
    labels = jax.ShapeDtypeStruct((4096,), jnp.int32)
    logits = jax.ShapeDtypeStruct((4096, 1024), jnp.float32)

    def temporary(loss: Callable[..., Any]) -> int:
        step = jax.jit(jax.value_and_grad(partial(loss, reduction="mean")))
        return step.lower(logits, labels).compile().memory_analysis().temp_size_in_bytes

    assert temporary(fused_loss) < 4.5 * 4 * cpu._BLOCK_SIZE
    assert temporary(reference_loss) > 4 * 4096 * 1024


@pytest.mark.parametrize("num_classes", [10, 50, 1000, 1009])
def test_temporary_memory_of_many_rows(num_classes: int) -> None:
    """A few numbers for each row, beside the arrays of a block."""
    num_rows = 2**16
    logits = jax.ShapeDtypeStruct((num_rows, num_classes), jnp.float32)
    labels = jax.ShapeDtypeStruct((num_rows,), jnp.int32)
    for step in (jax.value_and_grad(partial(fused_loss, reduction="mean")), fused_loss):
        temporary = jax.jit(step).lower(logits, labels).compile().memory_analysis().temp_size_in_bytes
        assert temporary < 2**20 + 220 * num_rows


def test_what_accelerators_are_given() -> None:
    """No gather, for which the TPU compiler would write out the logits in float32, and no loop over blocks."""
    logits, labels = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((4096,), jnp.int32)
    step = jax.jit(jax.value_and_grad(partial(fused_loss, reduction="mean"))).trace(logits, labels)
    for platform in ("tpu", "cuda"):
        text = step.lower(lowering_platforms=(platform,)).as_text()
        assert "gather" not in text
        assert "while" not in text
    text = step.lower(lowering_platforms=("cpu",)).as_text()
    assert "gather" in text
    assert "while" in text


def test_smoothing_is_no_reason_to_trace_again() -> None:
    traces = []

    @jax.jit
    def step(logits: Any, smoothing: Any) -> Any:
        traces.append(None)
        return fused_loss(logits, LABELS, smoothing=smoothing, reduction="mean")

    for smoothing in (0.0, 0.1, jnp.asarray(0.2), 1.0):
        step(LOGITS, smoothing)
    assert len(traces) <= 2  # a Python number and an array are two types of argument

    # Nor outside jit.
    fused_loss(LOGITS, LABELS, smoothing=0.1)
    before = row_sums._cache_size()
    for smoothing in (0.2, 0.3):
        jax.grad(lambda z, e=smoothing: fused_loss(z, LABELS, smoothing=e).sum())(jnp.asarray(LOGITS))
        fused_loss(LOGITS, LABELS, smoothing=smoothing)
    assert row_sums._cache_size() <= before + 1  # the gradient's own


def test_within_other_transforms() -> None:
    """Scan and remat give what a plain call gives."""
    logits, labels = LOGITS.reshape(3, 2, 5), LABELS.reshape(3, 2)

    def scanned(loss: Callable[..., Any], logits: Any) -> Any:
        return jax.lax.scan(lambda _, batch: (None, loss(*batch)), None, (logits, labels))[1]

    for transformed in (partial(scanned, fused_loss), lambda logits: jax.checkpoint(fused_loss)(logits, labels)):
        ours, theirs = (
            jax.jit(lambda logits, f=f: (f(logits), jax.grad(lambda z: f(z).sum())(logits)))(logits)
            for f in (transformed, lambda logits: fused_loss(logits, labels))
        )
        assert_close(tuple(map(np.asarray, ours)), tuple(map(np.asarray, theirs)))


def test_temporary_memory_of_other_dtypes_and_options() -> None:
    """No float32 array as large as the logits, which XLA for CPUs would make from bfloat16 logits."""
    labels, vector = jax.ShapeDtypeStruct((4096,), jnp.int32), np.ones(1024, np.float32)
    for dtype, options in (
        (jnp.bfloat16, {}),
        (jnp.float16, {}),
        (jnp.float32, {"class_weight": vector}),
        (jnp.float32, {"class_mask": vector > 0}),
        (jnp.float32, {"prior": vector / 1024}),
    ):
        logits = jax.ShapeDtypeStruct((4096, 1024), dtype)
        step = jax.jit(jax.value_and_grad(partial(fused_loss, reduction="mean", **options)))
        temporary = step.lower(logits, labels).compile().memory_analysis().temp_size_in_bytes
        assert temporary < 5.5 * 4 * cpu._BLOCK_SIZE, (dtype, options)


def test_exported_with_any_number_of_rows() -> None:
    (size,) = jax.export.symbolic_shape("size")
    arguments = jax.ShapeDtypeStruct((size, 5), jnp.float32), jax.ShapeDtypeStruct((size,), jnp.int32)
    for platform in ("cpu", "tpu"):
        exported = jax.export.export(jax.jit(fused_loss), platforms=[platform])(*arguments)
    exported = jax.export.export(jax.jit(fused_loss))(*arguments)
    losses = exported.call(LOGITS.astype(np.float32), LABELS.astype(np.int32))
    assert_close((np.asarray(losses),), (np.asarray(fused_loss(LOGITS.astype(np.float32), LABELS)),), 2.0**-23)


@pytest.mark.parametrize(("implementation", "name"), [
    pytest.param(*each, marks=[] if each in {("fused", "plain"), ("reference", "capped")} else [pytest.mark.slow])
    for each in product(["fused", "reference"], ["plain", "capped", "where", "entropy", "max_sup"])
])  # fmt: skip
def test_exported_with_any_number_of_classes(implementation: str, name: str) -> None:
    """One class too, from which no convention takes anything."""
    options = {"smoothing": 0.1} | OPTIONS[name] | {"reduction": "mean", "class_weight": None, "class_mask": None}
    loss = partial(label_smoothed_cross_entropy, implementation=implementation, **options)
    rows, classes = jax.export.symbolic_shape("rows, classes")
    if "where" in options:
        rows = 6
    arguments = jax.ShapeDtypeStruct((rows, classes), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    evaluate = jax.value_and_grad(loss)
    exported = jax.export.export(jax.jit(evaluate))(*arguments)
    for num_classes in (5, 1):
        given = LOGITS[:, :num_classes].astype(np.float32), np.minimum(LABELS, num_classes - 1).astype(np.int32)
        (value, gradient), (of_export, gradient_of_export) = evaluate(*given), exported.call(*given)
        assert_close(
            (np.asarray(of_export), np.asarray(gradient_of_export)), (np.asarray(value), np.asarray(gradient)), 2.0**-23
        )


def test_linear_exported_with_any_number_of_classes() -> None:
    rows, classes = jax.export.symbolic_shape("rows, classes")
    shapes = ((rows, 3), jnp.float32), ((3, classes), jnp.float32), ((rows,), jnp.int32)
    loss = partial(linear_label_smoothed_cross_entropy, smoothing=0.1, reduction="sum")
    exported = jax.export.export(jax.jit(jax.grad(loss, argnums=1)))(
        *(jax.ShapeDtypeStruct(*shape) for shape in shapes)
    )
    given = LOGITS[:, :3].astype(np.float32), LOGITS[:3].astype(np.float32), LABELS.astype(np.int32)
    expected = jax.grad(loss, argnums=1)(*map(jnp.asarray, given))
    assert_close((np.asarray(exported.call(*given)),), (np.asarray(expected),), 2.0**-22)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("convention", ["uniform", "non_target"])
@pytest.mark.parametrize("loss", [fused_loss, reference_loss])
def test_no_nan_on_the_way(loss: Callable[..., Any], convention: str, smoothing: float) -> None:
    """What `jax_debug_nans` stops: the entropy is 0 * -inf at 0 before it is set to 0."""
    options = {"smoothing": smoothing, "convention": convention, "subtract_entropy": True, "reduction": "sum"}
    with jax.debug_nans(True):
        loss(LOGITS, LABELS, **options)
        jax.grad(loss)(jnp.asarray(LOGITS), LABELS, **options)


@pytest.mark.parametrize("num_classes", [2, 40, 100, 256, 257])
def test_logits_that_are_a_product(num_classes: int) -> None:
    """If XLA fused the product into the loss, it would round it in some uses of the logits only."""
    values = jnp.array([1.7769346512604225, -0.6945933575499162, -1.180283911849588, -1.7838454781954174])
    factors = jnp.array([1.2887231687245124, -0.13599423088681162, *np.linspace(-2, 1, num_classes - 2)])
    labels = jnp.array([0, 0, 1, 0])

    def losses(loss: Callable[..., Any]) -> Any:
        return jax.lax.scan(lambda _, row: (None, loss(row[0] * factors, row[1])), None, (values, labels))[1]

    ours, theirs = (np.asarray(losses(loss)) for loss in (fused_loss, reference_loss))
    assert_close((ours,), (theirs,))
    batched = jax.jit(lambda values: fused_loss(values[:, None] * factors[None], labels))(values)
    assert_close((np.asarray(batched),), (theirs,))


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"convention": "max_sup"}], ids=str)
def test_logits_are_read_once_for_the_largest(options: dict[str, Any]) -> None:
    """Accelerators take one sweep for the largest logit and one for all sums."""
    logits, labels = jax.ShapeDtypeStruct((64, 1024), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32)
    traced = jax.jit(jax.grad(lambda z, y: fused_loss(z, y, **options).sum())).trace(logits, labels)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    maxima = [line for line in text.splitlines() if "stablehlo.reduce" in line and "stablehlo.maximum" in line]
    assert len(maxima) == 1
