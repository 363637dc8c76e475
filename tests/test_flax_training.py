"""What docs/flax.md says about training with Flax and Optax: that it is exact, or how near, and that faults show."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec
from numpy.typing import NDArray

from lsce_jax import (
    LabelSmoothedCrossEntropyLoss,
    label_smoothed_cross_entropy,
    label_smoothed_cross_entropy_with_stats,
    linear_label_smoothed_cross_entropy,
    smoothing_weights,
)
from parity_tests.truth.arithmetic import Arithmetic, tree_depth
from parity_tests.truth.bounds import error_bound
from parity_tests.truth.cases import Case
from parity_tests.truth.oracle import solve

Parameters = dict[str, Any]

ROUNDOFF = 2.0**-24
NUM_ROWS, NUM_FEATURES, NUM_CLASSES = 16, 4, 3
GENERATOR = np.random.default_rng(0)
# Halves here and sixteenths there: float32 holds the logits of the linear model exactly, in any order of sums.
IMAGES = (np.round(2 * GENERATOR.normal(size=(NUM_ROWS, NUM_FEATURES))) / 2).astype(np.float32)
LABELS = np.array([0, 1, 2, 0, 0, 1, 0, 0, 2, 0, 0, 1, 0, 0, 0, 2])
# Microbatches of 5, 9 and 2 rows, of which 2, 8 and 1 count.
MICROBATCHES = [slice(0, 5), slice(5, 14), slice(14, 16)]
COUNTED = ~np.isin(np.arange(NUM_ROWS), [0, 2, 3, 9, 15])
LINEAR = {
    "weight": (np.round(16 * GENERATOR.normal(size=(NUM_FEATURES, NUM_CLASSES))) / 16).astype(np.float32),
    "bias": (np.round(16 * GENERATOR.normal(size=NUM_CLASSES)) / 16).astype(np.float32),
}


pytestmark = pytest.mark.usefixtures("optax_promotion")


class Network(nnx.Module):
    """One hidden layer."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any = None) -> None:
        """Make the layers."""
        self.activation: Callable[[jax.Array], jax.Array] = nnx.silu
        self.hidden = nnx.Linear(NUM_FEATURES, 5, dtype=dtype, rngs=rngs)
        self.output = nnx.Linear(5, NUM_CLASSES, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits."""
        return self.output(self.activation(self.hidden(images)))


def linear(parameters: Parameters, images: Any = IMAGES) -> jax.Array:
    return jnp.dot(images, parameters["weight"]) + parameters["bias"][None, :]


def leaves_of(module: Any) -> list[NDArray[Any]]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))]


def assert_same(left: Any, right: Any) -> None:
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one, other)


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def smoothed_targets(smoothing: float, convention: str = "uniform") -> NDArray[np.float64]:
    on, off = smoothing_weights(convention, smoothing, NUM_CLASSES)
    return np.where(np.eye(NUM_CLASSES)[LABELS] > 0, on, off)


# --- Gradient accumulation ------------------------------------------------------------------------------------------


def gradient_bound(where: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Bound the difference of two float32 gradients of the linear model by its weight [D, K], in any order of sums.

    The logits are exact, and each row's gradient by them is within `error_bound`. Then there is one product, a sum of
    N rows, and in MultiSteps' mean for each of M microbatches a difference, a division and a sum of numbers up to M
    times as large, as every microbatch divides by a share.
    """
    logits = np.asarray(linear(LINEAR), np.float64)
    case = Case("linear", "float32", logits, LABELS, {"reduction": "mean"}, where=where)
    truth = solve(case)
    terms = NUM_ROWS + 1 + 3 * len(MICROBATCHES) ** 2
    rows = error_bound(case, truth, Arithmetic()).gradient + ROUNDOFF * terms * np.abs(truth.gradient.high)
    return 2 * np.abs(IMAGES).T @ rows


@functools.cache
def accumulating_step(*, average: bool) -> tuple[optax.MultiSteps, Callable[..., Any]]:
    optimizer = optax.MultiSteps(optax.sgd(1.0), len(MICROBATCHES), use_grad_mean=average)

    @jax.jit
    def step(state: Any, images: Any, labels: Any, where: Any, denominator: Any) -> Any:
        def loss(parameters: Parameters) -> jax.Array:
            options = {"where": where, "reduction": "mean", "denominator": denominator}
            return label_smoothed_cross_entropy(linear(parameters, images), labels, **options)

        return optimizer.update(jax.grad(loss)(LINEAR), state, LINEAR)

    return optimizer, step


def accumulated(denominators: list[float | None], *, average: bool) -> NDArray[np.float32]:
    """Return the gradient by the weight that MultiSteps hands to the optimizer after the last microbatch."""
    optimizer, step = accumulating_step(average=average)
    state = optimizer.init(LINEAR)
    for number, (rows, denominator) in enumerate(zip(MICROBATCHES, denominators, strict=True)):
        updates, state = step(state, IMAGES[rows], LABELS[rows], COUNTED[rows], denominator)
        if number < len(MICROBATCHES) - 1:
            assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(updates))
    return -np.asarray(updates["weight"])


TOTAL, M = float(COUNTED.sum()), len(MICROBATCHES)


@pytest.mark.parametrize(
    ("denominators", "average", "right"),
    [
        ([TOTAL / M] * M, True, True),
        ([TOTAL] * M, False, True),
        ([None] * M, True, False),  # mean of means
        ([5 / M, 9 / M, 2 / M], False, False),  # a mean over rows that do not count
        ([NUM_ROWS / M] * M, True, False),  # padding counted in the whole batch
        ([TOTAL] * M, True, False),  # a mean where a sum is meant
        ([TOTAL / M] * M, False, False),
    ],
)
def test_accumulated_gradient(denominators: list[float | None], average: bool, right: bool) -> None:
    whole = jax.grad(
        lambda parameters: label_smoothed_cross_entropy(linear(parameters), LABELS, where=COUNTED, reduction="mean")
    )(LINEAR)["weight"]
    share = np.abs(accumulated(denominators, average=average) - whole) / gradient_bound(COUNTED)
    assert (share.max() <= 1) if right else (share.max() > 100)


def scanned(denominator: float | None = TOTAL, **changes: Any) -> NDArray[np.float64]:
    """Return the gradient of the weight, added up by a scan over microbatches of four rows as in docs/trainers.md."""
    options = {**SCANNED_OPTIONS, "reduction": "mean", **changes}

    def loss(weight: jax.Array, images: Any, labels: Any, where: Any) -> jax.Array:
        given = {"where": where, "denominator": denominator, **options}
        return linear_label_smoothed_cross_entropy(images, weight, labels, **given)

    def accumulate(total: jax.Array, part: Any) -> tuple[jax.Array, None]:
        return total + jax.grad(loss)(PADDED_WEIGHT, *part), None

    parts = jax.tree.map(lambda leaf: leaf.reshape(4, 4, *leaf.shape[1:]), (IMAGES, LABELS, COUNTED))
    gradient, _ = jax.jit(lambda: jax.lax.scan(accumulate, jnp.zeros_like(PADDED_WEIGHT), parts))()
    return np.asarray(gradient, np.float64)


# Three classes, and two that pad the vocabulary.
PADDED_WEIGHT = jnp.concatenate([LINEAR["weight"], LINEAR["weight"][:, :2] + 1], axis=1)
SCANNED_OPTIONS = {"smoothing": 0.125, "z_loss": 0.0625, "class_mask": np.arange(5) < NUM_CLASSES}


def test_scanned_microbatches_are_the_whole_batch() -> None:
    """With z-loss, a padded vocabulary and one denominator; the logits are exact."""
    logits = np.asarray(IMAGES @ PADDED_WEIGHT, np.float64)
    options = {"reduction": "mean", "z_loss": SCANNED_OPTIONS["z_loss"]}
    arrays = {"where": COUNTED, "class_mask": SCANNED_OPTIONS["class_mask"]}
    case = Case("scanned", "float32", logits, LABELS, options, SCANNED_OPTIONS["smoothing"], **arrays)
    truth = solve(case)
    # A product and a sum over all rows for each entry.
    rows = error_bound(case, truth, Arithmetic()).gradient + ROUNDOFF * (NUM_ROWS + 2) * np.abs(truth.gradient.high)
    expected, bound = IMAGES.T @ truth.gradient.high, np.abs(IMAGES).T @ rows
    assert np.all(np.abs(scanned() - expected) <= bound)
    changes = ({"denominator": None}, {"z_loss": 0.0}, {"class_mask": None}, {"smoothing": 0.1251}, {"where": None})
    for changed in changes:
        assert not np.all(np.abs(scanned(**changed) - expected) <= bound)
    assert not np.all(np.abs(scanned(denominator=None) / 4 - expected) <= bound)  # the mean of means


# --- Smoothing from a schedule --------------------------------------------------------------------------------------

SCHEDULE = optax.linear_schedule(0.0, 0.5, transition_steps=4)


def make_step(smoothing_of: Callable[[nnx.Optimizer, Any], Any]) -> tuple[Callable[..., Any], list[int]]:
    """Return a training step that also returns the smoothing it took, and the list of its traces."""
    traces: list[int] = []

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer, given: Any = None) -> Any:
        traces.append(1)
        smoothing = smoothing_of(optimizer, given)
        loss, gradient = nnx.value_and_grad(
            lambda model: label_smoothed_cross_entropy(model(IMAGES), LABELS, smoothing=smoothing, reduction="mean")
        )(model)
        optimizer.update(model, gradient)
        return loss, smoothing

    return step, traces


def new_training(transform: optax.GradientTransformation) -> tuple[Network, nnx.Optimizer]:
    model = Network(nnx.Rngs(0))
    return model, nnx.Optimizer(model, transform, wrt=nnx.Param)


def test_schedule_is_the_number_at_every_step_and_traces_once() -> None:
    scheduled, traces = make_step(lambda optimizer, _: SCHEDULE(optimizer.step[...]))
    numbered, _ = make_step(lambda _, given: given)
    training, other, constant = (new_training(optax.sgd(0.5)) for _ in range(3))
    differs = []
    for count in range(6):
        loss, smoothing = scheduled(*training)
        assert smoothing == min(count, 4) / 8  # exact in float32
        same, _ = numbered(*other, jnp.float32(min(count, 4) / 8))
        assert loss == same
        assert_same(leaves_of(training[0]), leaves_of(other[0]))
        differs.append(bool(loss != numbered(*constant, jnp.float32(0))[0]))
    assert len(traces) == 1
    assert differs == [False, True, True, True, True, True]


def injected(learning_rate: Any, smoothing: Any) -> optax.GradientTransformation:
    del smoothing  # the loss reads it from the state
    return optax.sgd(learning_rate)


def test_smoothing_as_a_hyperparameter_is_set_without_a_trace() -> None:
    adjustable, traces = make_step(lambda optimizer, _: optimizer.opt_state.hyperparams["smoothing"][...])
    numbered, _ = make_step(lambda _, given: given)
    training = new_training(optax.inject_hyperparams(injected)(learning_rate=0.5, smoothing=0.25))
    other = new_training(optax.sgd(0.5))
    for smoothing in (0.25, 0.0, 0.5):
        training[1].opt_state.hyperparams["smoothing"][...] = jnp.float32(smoothing)
        loss, taken = adjustable(*training)
        assert taken == smoothing
        assert loss == numbered(*other, jnp.float32(smoothing))[0]
        assert_same(leaves_of(training[0]), leaves_of(other[0]))
    assert len(traces) == 1


def test_scheduled_hyperparameter_lags_by_a_step() -> None:
    """Why the page asks for numbers there."""
    step, _ = make_step(lambda optimizer, _: optimizer.opt_state.hyperparams["smoothing"][...])
    training = new_training(optax.inject_hyperparams(injected)(learning_rate=0.5, smoothing=SCHEDULE))
    assert [float(step(*training)[1]) for _ in range(4)] == [0.0, 0.0, 0.125, 0.25]


# --- L-BFGS ---------------------------------------------------------------------------------------------------------


def stationary_bound(parameters: Parameters) -> tuple[float, float]:
    """Bound the error of the float64 loss, and the norm of the gradient where the loss can't be told from its minimum.

    A loss with an L-Lipschitz gradient has |gradient|^2 <= 2 L (loss - minimum), and L is half the largest eigenvalue
    of X'X / N: the softmax's Hessian is at most 1/2. Two losses are told apart when they differ by twice their error,
    which is twice that of the logits and that of the mean of the row losses.
    """
    rows = np.concatenate([IMAGES, np.ones((NUM_ROWS, 1))], axis=1).astype(np.float64)
    weights = np.concatenate([parameters["weight"], parameters["bias"][None, :]])
    lipschitz = 0.5 * np.linalg.eigvalsh(rows.T @ rows / NUM_ROWS)[-1]
    logit_error = 2.0**-53 * (NUM_FEATURES + 2) * np.max(np.abs(rows) @ np.abs(weights))
    case = Case("convex", "float64", rows @ weights, LABELS, {"reduction": "mean"})
    loss_error = float(error_bound(case, solve(case), Arithmetic()).loss + 2 * logit_error)
    return loss_error, float(np.sqrt(2 * lipschitz * 2 * loss_error))


def gradient_norm(parameters: Parameters, targets: NDArray[np.float64]) -> float:
    logits = IMAGES.astype(np.float64) @ parameters["weight"] + parameters["bias"]
    excess = (softmax(logits) - targets) / NUM_ROWS
    return float(np.hypot(np.linalg.norm(IMAGES.T @ excess), np.linalg.norm(excess.sum(axis=0))))


def mean_excess(parameters: Parameters, targets: NDArray[np.float64]) -> float:
    """Return how far the mean predicted probabilities are from the mean target."""
    logits = IMAGES.astype(np.float64) @ parameters["weight"] + parameters["bias"]
    return float(np.linalg.norm(softmax(logits).mean(axis=0) - targets.mean(axis=0)))


def test_lbfgs_finds_the_minimum() -> None:
    def loss(parameters: Parameters) -> jax.Array:
        logits = linear(parameters, IMAGES.astype(np.float64))
        return label_smoothed_cross_entropy(logits, LABELS, smoothing=0.3, reduction="mean")

    solver = optax.lbfgs()

    @jax.jit
    def step(parameters: Parameters, state: Any) -> Any:
        value, gradient = optax.value_and_grad_from_state(loss)(parameters, state=state)
        updates, state = solver.update(gradient, state, parameters, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(parameters, updates), state, value

    with jax.enable_x64(True):
        parameters = {name: jnp.asarray(array, jnp.float64) for name, array in LINEAR.items()}
        state, values = solver.init(parameters), []
        for _ in range(40):
            parameters, state, value = step(parameters, state)
            values.append(float(value))
        found = {name: np.asarray(array) for name, array in parameters.items()}

    loss_error, bound = stationary_bound(found)
    assert np.all(np.diff(values) <= 2 * loss_error)
    assert values[0] - values[-1] > 0.1
    assert gradient_norm(found, smoothed_targets(0.3)) <= bound
    assert mean_excess(found, smoothed_targets(0.3)) <= bound
    for wrong in (smoothed_targets(0.0), smoothed_targets(0.3001), smoothed_targets(0.3, "non_target")):
        assert gradient_norm(found, wrong) > 10 * bound
        assert mean_excess(found, wrong) > 10 * bound
    assert gradient_norm(LINEAR, smoothed_targets(0.3)) > 10 * bound


# --- Curvature ------------------------------------------------------------------------------------------------------


def curved(parameters: NDArray[Any], images: NDArray[Any], *, layers: int) -> jax.Array:
    """Return the logits of a linear model, or of one with a hidden layer of tanh, from a vector of parameters."""
    for width_in, width_out in [(2, 3)] if layers == 1 else [(2, 4), (4, 3)]:
        weight, parameters = parameters[: width_in * width_out], parameters[width_in * width_out :]
        bias, parameters = parameters[:width_out], parameters[width_out:]
        images = jnp.dot(images, weight.reshape(width_in, width_out)) + bias[None, :]
        if parameters.size:
            images = jnp.tanh(images)
    return images


@pytest.mark.parametrize("layers", [1, 2])
def test_curvature_products(layers: int) -> None:
    """Both products against explicit matrices, in float64.

    The entries of a derivative of the logits are single products, so each term of J'HJ, and of the gradient times the
    second derivatives, has as many roundings as its factors have: the sums over N rows, K classes and the widths, and
    some ten of the softmax and tanh. All are counted for every term.
    """
    with jax.enable_x64(True):
        num_rows, size = 7, 9 if layers == 1 else 27
        generator = np.random.default_rng(layers)
        images = generator.normal(size=(num_rows, 2))
        parameters, direction = generator.normal(size=(2, size))
        labels = np.arange(num_rows) % 3

        def forward(parameters: jax.Array) -> jax.Array:
            return curved(parameters, images, layers=layers)

        def loss_of_logits(logits: jax.Array) -> jax.Array:
            return label_smoothed_cross_entropy(logits, labels, smoothing=0.2, reduction="mean")

        def loss(parameters: jax.Array) -> jax.Array:
            return loss_of_logits(forward(parameters))

        def gauss_newton(parameters: jax.Array, direction: jax.Array) -> jax.Array:
            logits, logits_direction = jax.jvp(forward, (parameters,), (direction,))
            product = jax.jvp(jax.grad(loss_of_logits), (logits,), (logits_direction,))[1]
            return jax.vjp(forward, parameters)[1](product)[0]

        @jax.jit
        def evaluate(parameters: jax.Array, direction: jax.Array) -> Any:
            return (
                jax.vmap(gauss_newton, in_axes=(None, 0))(parameters, jnp.eye(size)),
                jax.jvp(jax.grad(loss), (parameters,), (direction,))[1],
                jax.hessian(loss)(parameters),
                forward(parameters),
                jax.jacobian(forward)(parameters),
                jax.hessian(forward)(parameters),
            )

        results = (np.asarray(result) for result in evaluate(parameters, direction))
        gauss_newton_matrix, hessian_product, hessian, logits, jacobian, second = results

    p = softmax(logits)
    gradient = (p - np.where(np.eye(3)[labels] > 0, 0.8 + 0.2 / 3, 0.2 / 3)) / num_rows
    diagonal, outer = np.eye(3) * p[:, None, :] / num_rows, p[:, :, None] * p[:, None, :] / num_rows
    product = "nki,nkl,nlj->ij"
    exact = np.einsum(product, jacobian, diagonal - outer, jacobian)
    bend = np.einsum("nk,nkij->ij", gradient, second)

    unit = 2.0**-53 * 2 * (num_rows + 3 * 3 + 2 + 4 + 10)
    allowed = unit * np.einsum(product, np.abs(jacobian), diagonal + outer, np.abs(jacobian))
    allowed_bend = allowed + unit * np.einsum("nk,nkij->ij", (p + 1) / num_rows, np.abs(second))
    along = allowed_bend @ np.abs(direction)
    assert np.all(np.abs(gauss_newton_matrix - exact) <= allowed)
    assert np.all(np.abs(gauss_newton_matrix - gauss_newton_matrix.T) <= allowed)
    assert np.linalg.eigvalsh(gauss_newton_matrix)[0] >= -np.linalg.norm(allowed)
    assert np.all(np.abs(hessian_product - hessian @ direction) <= along)
    assert np.all(np.abs(hessian_product - (exact + bend) @ direction) <= along)

    # Gauss-Newton is the Hessian of the linear model, and of no other.
    assert np.all(np.abs(hessian_product - gauss_newton_matrix @ direction) <= along) == (layers == 1)
    assert (np.linalg.eigvalsh(hessian)[0] < -1e6 * np.linalg.norm(allowed_bend)) == (layers == 2)
    for wrong in (np.einsum(product, jacobian, diagonal, jacobian), num_rows * exact):  # no outer product; no mean
        assert np.any(np.abs(gauss_newton_matrix - wrong) > 1e6 * allowed)
        assert np.any(np.abs(hessian_product - (wrong + bend) @ direction) > 1e6 * along)


# --- bfloat16 -------------------------------------------------------------------------------------------------------


def test_bfloat16_logits_have_a_float32_loss() -> None:
    """Within the bounds of float32; only the gradient by the logits is rounded to their dtype."""
    model = Network(nnx.Rngs(0), dtype=jnp.bfloat16)
    logits = model(IMAGES)
    evaluate = jax.jit(jax.value_and_grad(lambda z: label_smoothed_cross_entropy(z, LABELS, reduction="mean")))
    loss, gradient = evaluate(logits)
    assert (logits.dtype, loss.dtype, gradient.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)

    case = Case("network", "bfloat16", np.asarray(logits, np.float64), LABELS, {"reduction": "mean"})
    truth = solve(case)
    bound = error_bound(case, truth, Arithmetic())
    upcast, _ = evaluate(logits.astype(jnp.float32))
    assert abs(float(loss) - float(upcast)) <= 2 * bound.loss
    assert truth.loss.error_of(np.float64(loss)) <= bound.loss
    assert truth.loss.error_of(np.float64(loss.astype(jnp.bfloat16))) > 10 * bound.loss
    assert np.all(truth.gradient.error_of(np.asarray(gradient, np.float64)) <= bound.gradient)

    @nnx.jit
    def by_parameters(model: Network) -> Any:
        return nnx.value_and_grad(lambda model: label_smoothed_cross_entropy(model(IMAGES), LABELS, reduction="mean"))(
            model
        )

    loss, gradients = by_parameters(model)
    assert loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}


# --- scan, remat, vmap ----------------------------------------------------------------------------------------------


def loss_of(model: Callable[..., jax.Array], smoothing: Any = 0.1) -> jax.Array:
    return label_smoothed_cross_entropy(model(IMAGES), LABELS, smoothing=smoothing, reduction="mean")


def whole_numbers(model: Any) -> Any:
    """Make all weights integers, those of the last layer sixteenths, and silu relu: the logits are exact."""
    graph, state = nnx.split(model)
    model = nnx.merge(graph, jax.tree.map(lambda leaf: jnp.round(2 * leaf), state))
    model.output.kernel[...] /= 16
    model.activation = nnx.relu
    return model


def gradient_bounds(model: Any, smoothing: float) -> list[NDArray[np.float64]]:
    """Bound the difference of two float32 gradients by each parameter of a model of `whole_numbers`.

    Its logits z are exact. p - q has the error 33 + max z - min z roundings of p + q: `error_bound` with its K - 1
    additions and exp. Then each layer sums products with weights, or with inputs over the rows. The sizes of all these
    products add up to the gradient of the same network without relu, of the sizes of inputs and weights, with
    (p + q) / N for its gradient by the logits.
    """
    logits = np.asarray(model(IMAGES), np.float64)
    upstream = ((softmax(logits) + smoothed_targets(smoothing)) / NUM_ROWS).astype(np.float32)
    graph, state = nnx.split(model)
    positive = nnx.merge(graph, jax.tree.map(jnp.abs, state))
    positive.activation = lambda hidden: hidden
    sizes = nnx.jit(nnx.grad(lambda model: jnp.sum(upstream * model(np.abs(IMAGES)))))(positive)
    num_layers, widest = 4, 5
    roundings = 33 + np.ptp(logits, axis=-1).max() + num_layers * (widest + 2) + NUM_ROWS + 1
    return [2 * ROUNDOFF * roundings * np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(sizes)]


def loss_bound(model: Any, smoothing: float) -> float:
    """Bound the difference of two float32 losses of a model of `whole_numbers`, whose logits are exact."""
    logits = np.asarray(model(IMAGES), np.float64)
    case = Case("whole", "float32", logits, LABELS, {"reduction": "mean"}, smoothing=smoothing)
    return 2 * float(error_bound(case, solve(case), Arithmetic()).loss)


def worst_share(left: Any, right: Any, bounds: list[NDArray[np.float64]]) -> float:
    """Return the largest difference over its bound; where the bound is 0, no difference is allowed."""
    shares = []
    for one, other, bound in zip(jax.tree.leaves(left), jax.tree.leaves(right), bounds, strict=True):
        difference = np.abs(np.float64(one) - np.float64(other))
        unbounded = np.where(difference > 0, np.inf, 0.0)
        shares.append(np.max(np.divide(difference, bound, out=unbounded, where=bound > 0)))
    return float(max(shares))


def member_of(stacked: Any, index: int) -> Any:
    graph, state = nnx.split(stacked)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[index], state))


make_layers = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.Linear(NUM_FEATURES, NUM_FEATURES, rngs=rngs)))
make_members = nnx.jit(nnx.split_rngs(splits=3)(nnx.vmap(Network)))


class Deep(nnx.Module):
    """Three layers, which are applied in one of several ways."""

    def __init__(self, rngs: nnx.Rngs, way: str) -> None:
        """Make the layers, the same for each way."""
        self.activation: Callable[[jax.Array], jax.Array] = nnx.silu
        self.layers = make_layers(rngs)
        self.output = nnx.Linear(NUM_FEATURES, NUM_CLASSES, rngs=rngs)
        self.way = way

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits."""

        def apply(hidden: jax.Array, layer: nnx.Linear) -> jax.Array:
            return hidden + self.activation(layer(hidden))

        if self.way == "loop":
            for index in range(3):
                images = apply(images, member_of(self.layers, index))
        else:
            body = nnx.remat(apply) if self.way == "remat" else apply
            images = nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(images, self.layers)
        return self.output(images)


make_deep = nnx.jit(Deep, static_argnames="way")


def test_scanned_layers_are_the_loop() -> None:
    evaluate = nnx.jit(nnx.value_and_grad(loss_of))
    models = [whole_numbers(make_deep(nnx.Rngs(0), way=way)) for way in ("loop", "scan", "remat")]
    (loop, by_loop), (scan, by_scan), (remat, by_remat) = map(evaluate, models)
    bounds = gradient_bounds(models[0], 0.1)
    assert loop == scan == remat
    assert worst_share(by_scan, by_loop, bounds) <= 1
    assert worst_share(by_remat, by_loop, bounds) <= 1

    models[0].layers.kernel[...] = models[0].layers.kernel[...][::-1]  # layers in the wrong order
    _, wrong = evaluate(models[0])
    assert worst_share(wrong, by_loop, bounds) > 100


def test_scanned_steps_are_the_loop() -> None:
    smoothing = jnp.linspace(0.0, 0.5, 4)
    images, labels = IMAGES.reshape(4, 4, -1), LABELS.reshape(4, 4)

    def step(training: Any, batch: Any) -> Any:
        (model, optimizer), (images, labels, smoothing) = training, batch
        loss, gradient = nnx.value_and_grad(
            lambda model: label_smoothed_cross_entropy(model(images), labels, smoothing=smoothing, reduction="mean")
        )(model)
        optimizer.update(model, gradient)
        return training, loss

    scanned, looped = new_training(optax.sgd(0.5)), new_training(optax.sgd(0.5))
    epoch = nnx.jit(nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0)))
    scanned, losses = epoch(scanned, (images, labels, smoothing))
    one_step = nnx.jit(lambda training, batch: step(training, batch)[1])
    assert_same(losses, [one_step(looped, batch) for batch in zip(images, labels, smoothing, strict=True)])
    assert_same(leaves_of(scanned[0]), leaves_of(looped[0]))
    constant = new_training(optax.sgd(0.5))
    others = [one_step(constant, batch) for batch in zip(images, labels, jnp.zeros(4), strict=True)]
    assert [bool(loss == other) for loss, other in zip(losses, others, strict=True)] == [True, False, False, False]


def test_ensemble_is_its_members() -> None:
    """Each with its own smoothing; with that of another member it is rejected."""
    of_one = nnx.value_and_grad(loss_of)
    of_all, of_one = nnx.jit(nnx.vmap(of_one)), nnx.jit(of_one)
    members, smoothing = whole_numbers(make_members(nnx.Rngs(0))), jnp.array([0.0, 0.1, 0.5])
    losses, gradients = of_all(members, smoothing)
    for index in range(3):
        member = member_of(members, index)
        loss, gradient = of_one(member, smoothing[index])
        other, wrong = of_one(member, smoothing[index - 1])
        ours = [leaf[index] for leaf in jax.tree.leaves(gradients)]
        bounds = gradient_bounds(member, float(smoothing[index]))
        assert abs(loss - losses[index]) <= loss_bound(member, float(smoothing[index])) < abs(loss - other) / 100
        assert worst_share(ours, gradient, bounds) <= 1
        assert worst_share(ours, wrong, bounds) > 100


# --- Linen, devices -------------------------------------------------------------------------------------------------


def test_linen_and_nnx_train_alike() -> None:
    model, optimizer = new_training(optax.sgd(0.5, momentum=0.9))
    network = linen.Sequential([linen.Dense(5), linen.silu, linen.Dense(NUM_CLASSES)])
    parameters = {
        "layers_0": {"kernel": model.hidden.kernel[...], "bias": model.hidden.bias[...]},
        "layers_2": {"kernel": model.output.kernel[...], "bias": model.output.bias[...]},
    }
    state = TrainState.create(apply_fn=network.apply, params=parameters, tx=optax.sgd(0.5, momentum=0.9))
    loss_fn = LabelSmoothedCrossEntropyLoss(0.25, reduction="mean")

    @nnx.jit
    def nnx_step(model: Network, optimizer: nnx.Optimizer) -> jax.Array:
        loss, gradient = nnx.value_and_grad(lambda model: loss_fn(model(IMAGES), LABELS))(model)
        optimizer.update(model, gradient)
        return loss

    @jax.jit
    def linen_step(state: TrainState) -> tuple[TrainState, jax.Array]:
        def loss_and_stats(parameters: Parameters) -> Any:
            logits = state.apply_fn({"params": parameters}, IMAGES)
            return label_smoothed_cross_entropy_with_stats(logits, LABELS, smoothing=0.25, reduction="mean")

        (loss, _), gradient = jax.value_and_grad(loss_and_stats, has_aux=True)(state.params)
        return state.apply_gradients(grads=gradient), loss

    losses = []
    for _ in range(5):
        state, loss = linen_step(state)
        losses.append(float(loss))
        assert loss == nnx_step(model, optimizer)
    assert len(set(losses)) == 5
    assert losses[-1] < losses[0]


def test_mean_over_devices_that_hold_different_numbers_of_rows() -> None:
    """Denominator and losses summed over the devices; the mean of the devices' own means is another number."""
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    where = np.arange(NUM_ROWS) < 11
    logits = np.asarray(linear(LINEAR))

    def sharded(local_loss: Callable[..., jax.Array]) -> tuple[jax.Array, jax.Array]:
        specs = (PartitionSpec("batch"),) * 3
        loss = jax.shard_map(local_loss, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
        return jax.jit(jax.value_and_grad(loss))(logits, LABELS, where)

    def of_all_rows(logits: jax.Array, labels: jax.Array, where: jax.Array) -> jax.Array:
        denominator = jax.lax.psum(where.sum(), "batch")
        options = {"where": where, "reduction": "mean", "denominator": denominator}
        return jax.lax.psum(label_smoothed_cross_entropy(logits, labels, **options), "batch")

    def of_means(logits: jax.Array, labels: jax.Array, where: jax.Array) -> jax.Array:
        return jax.lax.pmean(label_smoothed_cross_entropy(logits, labels, where=where, reduction="mean"), "batch")

    case = Case("sharded", "float32", logits.astype(np.float64), LABELS, {"reduction": "mean"}, where=where)
    truth = solve(case)
    bound = error_bound(case, truth, Arithmetic(depth=lambda length: tree_depth(length) + 1))
    (loss, gradient), (wrong, wrong_gradient) = sharded(of_all_rows), sharded(of_means)
    assert truth.loss.error_of(np.float64(loss)) <= bound.loss
    assert np.all(truth.gradient.error_of(np.float64(gradient)) <= bound.gradient)
    assert truth.loss.error_of(np.float64(wrong)) > 100 * bound.loss
    assert np.any(truth.gradient.error_of(np.float64(wrong_gradient)) > 100 * bound.gradient)
