"""The dense loss under jit, vmap, grad of grad, forward mode, scan, remat, with schedules and sharded batches."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import lsce_jax
import lsce_jax.metrics
from lsce_jax import label_smoothed_cross_entropy

GENERATOR = np.random.default_rng(0)
LOGITS = GENERATOR.normal(size=(6, 5)).astype(np.float32)
LABELS = np.array([0, 4, 2, 2, 1, 3])
EPSILON = 2.0**-24

OPTIONS = [
    {},
    {"convention": "non_target", "z_loss": 0.01, "softcap": 3.0},
    {"convention": "clamp", "where": np.arange(6) != 3, "reduction": "mean"},
    {"class_weight": np.linspace(0.5, 2, 5), "class_mask": np.arange(5) != 1, "ignore_index": 1, "reduction": "sum"},
    {"prior": np.array([0.1, 0.2, 0.3, 0.2, 0.2]), "subtract_entropy": True},
]
each_option = pytest.mark.parametrize("options", OPTIONS)


@each_option
@pytest.mark.slow
def test_derivatives_against_finite_differences(options: dict[str, object], assert_derivatives: Callable) -> None:
    with jax.enable_x64(True):
        loss = partial(label_smoothed_cross_entropy, labels=LABELS, smoothing=0.2, **options)
        assert_derivatives(loss, LOGITS.astype(np.float64))


@pytest.mark.parametrize("slopes", [(1 + 1e-5, 1), (1, 1 + 1e-5)])
def test_wrong_derivatives_are_noticed(slopes: tuple[float, float], assert_derivatives: Callable) -> None:
    """Of first order, and of second order alone."""
    sin, cos = jax.custom_jvp(jnp.sin), jax.custom_jvp(jnp.cos)
    sin.defjvp(lambda primals, tangents: (sin(*primals), slopes[0] * cos(*primals) * tangents[0]))
    cos.defjvp(lambda primals, tangents: (cos(*primals), -slopes[1] * sin(*primals) * tangents[0]))
    with jax.enable_x64(True):
        assert_derivatives(jnp.sin, LOGITS.astype(np.float64))
        with pytest.raises(AssertionError):
            assert_derivatives(sin, LOGITS.astype(np.float64))


def test_hessian_is_that_of_log_sum_exp() -> None:
    """S (diag p - p p^T), whatever the smoothing."""
    with jax.enable_x64(True):
        logits = jnp.asarray(LOGITS[0], jnp.float64)
        hessian = jax.hessian(lambda z: label_smoothed_cross_entropy(z, jnp.array(2), smoothing=0.3))(logits)
        p = jax.nn.softmax(logits)
        np.testing.assert_array_less(np.abs(hessian - (jnp.diag(p) - jnp.outer(p, p))), 1e-15)


def test_smoothing_is_differentiated_also_at_its_ends() -> None:
    """The loss is linear in e: the derivative is the difference of the losses at 1 and at 0."""
    loss = lambda e: label_smoothed_cross_entropy(LOGITS, LABELS, smoothing=e, reduction="sum")  # noqa: E731
    exact = float(loss(1.0)) - float(loss(0.0))
    for smoothing in (0.0, 0.3, 1.0):
        slope = float(jax.grad(loss)(jnp.float32(smoothing)))
        assert abs(slope - exact) < 64 * EPSILON * float(loss(1.0))


def test_smoothing_per_row_is_one_call_per_row() -> None:
    smoothing = jnp.linspace(0, 1, 6)
    together = label_smoothed_cross_entropy(LOGITS, LABELS, smoothing=smoothing)
    single = [label_smoothed_cross_entropy(LOGITS[i], LABELS[i], smoothing=smoothing[i]) for i in range(6)]
    np.testing.assert_array_less(np.abs(together - jnp.stack(single)), 16 * EPSILON * together)


@each_option
def test_jit_of_a_schedule_traces_once(options: dict[str, object]) -> None:
    if "prior" in options:
        options = {**options, "subtract_entropy": False}
    traces = []

    @jax.jit
    def loss(logits: jax.Array, smoothing: jax.Array) -> jax.Array:
        traces.append(1)
        return label_smoothed_cross_entropy(logits, LABELS, smoothing=smoothing, **options)

    schedule = optax.linear_schedule(0.0, 0.2, 10)
    for step in range(4):
        compiled = loss(LOGITS, schedule(step))
        eager = label_smoothed_cross_entropy(LOGITS, LABELS, smoothing=schedule(step), **options)
        np.testing.assert_array_less(np.abs(compiled - eager), 64 * EPSILON * (1 + np.abs(eager)))
    loss(LOGITS, 0.1)
    loss(LOGITS, 0.3)
    assert len(traces) <= 2  # once for arrays, once for weakly typed Python numbers


def test_vmap_is_the_batched_call() -> None:
    batched = label_smoothed_cross_entropy(LOGITS, LABELS)
    np.testing.assert_array_equal(jax.vmap(label_smoothed_cross_entropy)(LOGITS, LABELS), batched)
    prior = np.full((6, 5), 0.2, np.float32)
    one = lambda z, y, p: label_smoothed_cross_entropy(z, y, prior=p)  # noqa: E731
    assert jax.vmap(one)(LOGITS, LABELS, prior).shape == (6,)


def test_scan_and_remat() -> None:
    def body(total: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + jax.checkpoint(label_smoothed_cross_entropy)(*row), None

    scanned = jax.grad(lambda z: jax.lax.scan(body, jnp.float32(0), (z, jnp.asarray(LABELS)))[0])(jnp.asarray(LOGITS))
    direct = jax.grad(lambda z: label_smoothed_cross_entropy(z, LABELS, reduction="sum"))(jnp.asarray(LOGITS))
    np.testing.assert_array_less(np.abs(scanned - direct), 16 * EPSILON)


def test_batch_over_two_devices() -> None:
    """The batch sharded under jit: the mean covers all rows, and gradients lie where their logits lie."""
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    logits, labels = jax.device_put((LOGITS, LABELS), sharding)
    step = jax.jit(jax.value_and_grad(lambda z, y: label_smoothed_cross_entropy(z, y, reduction="mean")))
    loss, gradient = step(logits, labels)
    assert len(gradient.sharding.device_set) == 2
    expected, expected_gradient = step(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    assert abs(float(loss - expected)) < 16 * EPSILON * float(expected)
    np.testing.assert_array_equal(gradient, expected_gradient)


@pytest.mark.parametrize("spec", [("batch", None), (None, "classes"), ("batch", "classes")])
def test_explicitly_sharded_logits(spec: tuple[str | None, ...]) -> None:
    """An explicit mesh, the default of jax.make_mesh, with every option that looks up a value at the label."""
    shape = (2, 1) if spec[0] else (1, 2)
    mesh = jax.make_mesh(shape, ("batch", "classes"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    logits = np.concatenate([LOGITS, LOGITS[:, :1]], axis=1)
    options = {"class_weight": np.linspace(0.5, 2, 6), "class_mask": np.arange(6) != 5, "reduction": "mean"}
    expected = label_smoothed_cross_entropy(logits, LABELS, **options)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(logits, jax.P(*spec))
        labels = jax.device_put(LABELS, jax.P(spec[0]))
        loss, gradient = jax.jit(jax.value_and_grad(lambda z, y: label_smoothed_cross_entropy(z, y, **options)))(
            sharded, labels
        )
    assert abs(float(loss) - float(expected)) < 16 * EPSILON * float(expected)
    assert gradient.sharding.spec == sharded.sharding.spec


def test_accumulated_microbatches_are_the_batch() -> None:
    where = np.array([True, True, False, True, False, True])
    total = float(where.sum())

    def loss(z: jax.Array, rows: slice) -> jax.Array:
        options = {"where": where[rows], "reduction": "mean", "denominator": total}
        return label_smoothed_cross_entropy(z[rows], LABELS[rows], **options)

    whole = label_smoothed_cross_entropy(LOGITS, LABELS, where=where, reduction="mean")
    parts = [loss(jnp.asarray(LOGITS), slice(0, 4)), loss(jnp.asarray(LOGITS), slice(4, 6))]
    assert abs(float(whole) - float(sum(parts))) < 8 * EPSILON * float(whole)


def test_unsigned_and_wide_labels() -> None:
    for dtype in (np.uint8, np.uint16, np.uint32, np.int8, np.int16, np.int64):
        losses = label_smoothed_cross_entropy(LOGITS, LABELS.astype(dtype))
        np.testing.assert_array_equal(losses, label_smoothed_cross_entropy(LOGITS, LABELS))
    wide = np.array([2**32, 2**32 + 1, -(2**32), 2**31 - 1])
    assert np.isnan(label_smoothed_cross_entropy(LOGITS[:4], wide)).all()
    assert np.isnan(label_smoothed_cross_entropy(LOGITS[:4], wide.astype(np.uint64))).all()
    with jax.enable_x64(True):
        far = label_smoothed_cross_entropy(LOGITS[:2], np.array([2**63 + 1, 2**32], np.uint64))
        assert np.isnan(far).all()
        assert np.isnan(label_smoothed_cross_entropy(LOGITS[:2], np.array([2**32, -(2**32)]))).all()


def test_no_rows_at_all() -> None:
    logits, labels = jnp.zeros((0, 3)), jnp.zeros((0,), int)
    assert label_smoothed_cross_entropy(logits, labels).shape == (0,)
    for reduction in ("sum", "mean"):
        value, gradient = jax.value_and_grad(
            lambda z, reduction=reduction: label_smoothed_cross_entropy(z, labels, reduction=reduction)
        )(logits)
        assert value == 0
        assert gradient.shape == (0, 3)


def test_bad_label_is_loud_in_loss_and_gradient() -> None:
    labels = np.array([0, 5, 2, 2, 1, 3])
    losses, vjp = jax.vjp(lambda z: label_smoothed_cross_entropy(z, labels), LOGITS)
    gradient = vjp(jnp.ones(6))[0]
    np.testing.assert_array_equal(np.isnan(losses), np.arange(6) == 1)
    np.testing.assert_array_equal(np.isnan(gradient).all(-1), np.arange(6) == 1)
    assert np.isnan(gradient).any(-1).sum() == 1


def test_module_in_nnx_and_linen_training() -> None:
    """One training step of each lowers the loss, and the module adds no trainable parameters."""
    weight = np.linspace(0.5, 2, 5).astype(np.float32)
    loss_fn = lsce_jax.LabelSmoothedCrossEntropyLoss(0.1, class_weight=weight, reduction="mean")
    assert jax.tree.leaves(nnx.state(loss_fn, nnx.Param)) == []

    model = nnx.Linear(5, 5, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Linear, optimizer: nnx.Optimizer, loss_fn: nnx.Module) -> jax.Array:
        loss, gradients = nnx.value_and_grad(lambda model: loss_fn(model(LOGITS), LABELS))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer, loss_fn)) for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]

    dense = linen.Dense(5)
    variables = dense.init(jax.random.key(0), LOGITS)
    step_loss = jax.jit(jax.value_and_grad(lambda v: loss_fn(dense.apply(v, LOGITS), LABELS)))
    before, gradients = step_loss(variables)
    after, _ = step_loss(jax.tree.map(lambda v, g: v - 0.1 * g, variables, gradients))
    assert after < before


def test_module_per_call_arguments() -> None:
    loss_fn = lsce_jax.LabelSmoothedCrossEntropyLoss(0.1, reduction="mean", axis=0, prior=jnp.full(5, 0.2))
    where = np.arange(6) < 3
    called = loss_fn(LOGITS.T, LABELS, where=where, smoothing=0.3, denominator=2.0)
    expected = label_smoothed_cross_entropy(LOGITS[:3], LABELS[:3], smoothing=0.3, reduction="sum") / 2
    assert abs(float(called - expected)) < 16 * EPSILON * float(expected)


def test_plain_module_is_cross_entropy_and_never_overflows() -> None:
    """The original module broadcast [N, 1] against [N] for None, and its exp overflowed above 88."""
    plain = lsce_jax.CELossWithLabelSmoothing(None, class_num=5)
    loss = plain(1000 * LOGITS, LABELS)
    expected = optax.softmax_cross_entropy_with_integer_labels(1000 * LOGITS, LABELS).mean()
    assert loss.shape == ()
    assert abs(float(loss - expected)) < 16 * EPSILON * float(expected)


def test_modules_show_their_options() -> None:
    loss_fn = lsce_jax.LabelSmoothedCrossEntropyLoss(0.2, convention="clamp", class_weight=np.ones(5, np.float32))
    assert (loss_fn.smoothing, loss_fn.convention, loss_fn.softcap, loss_fn.axis) == (0.2, "clamp", None, -1)
    np.testing.assert_array_equal(loss_fn.class_weight[...], np.ones(5))
    for belongs_to_a_call in ("where", "denominator"):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            lsce_jax.LabelSmoothedCrossEntropyLoss(**{belongs_to_a_call: None})


def test_lists_that_are_no_arrays_are_type_errors() -> None:
    """Where NumPy itself would raise a ValueError: in modules and metrics as in the functions."""
    ragged = [[1.0], [1.0, 2.0]]
    _, stats = lsce_jax.label_smoothed_cross_entropy_with_stats(LOGITS, LABELS)
    for call in (
        lambda: lsce_jax.LabelSmoothedCrossEntropyLoss(class_weight=ragged),
        lambda: lsce_jax.CELossWithLabelSmoothing(0.1, 5)(ragged, LABELS),
        lambda: lsce_jax.metrics.MeanLoss().update(stats=stats, mask=ragged),
        lambda: label_smoothed_cross_entropy(LOGITS, LABELS, where=ragged),
    ):
        with pytest.raises(TypeError, match="must be an array"):
            call()
