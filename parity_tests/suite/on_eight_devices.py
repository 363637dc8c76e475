"""The vocab-parallel losses on eight devices of a CPU. `test_vocab_parallel.py` runs this file in a process of its own.

The number of devices is fixed when JAX starts. In the process of the other tests it is two.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsce_jax
from lsce_cost import hlo
from lsce_jax import LossStats, metrics
from lsce_jax.layer import LayerOperands
from lsce_jax.layer_sums import layer_sums
from parity_tests.losses.adapters import JaxAdapter, operands_of
from parity_tests.losses.noisy_jax import NoisyDevice
from parity_tests.losses.rows_divided import as_mean, over_devices
from parity_tests.losses.sharded import AXIS, ShardedAdapter, divided, on_shards
from parity_tests.losses.wrapped import jax_added, ours_of_jax
from parity_tests.studies.sameness import FARTHER, NOISE, RERUNS
from parity_tests.suite.added_smoothing import bounds_of_added
from parity_tests.suite.chosen import CHOSEN, EDGES
from parity_tests.suite.jax_results import STATISTICS_DTYPES
from parity_tests.suite.stats_truth import assert_statistics
from parity_tests.truth.bounds import error_bound
from parity_tests.truth.cases import Case, LinearCase, case_names, make_case, random_case
from parity_tests.truth.comparison import Comparison, Parts, against_oracle, bounds_of, error_over_bound
from parity_tests.truth.linear_cases import linear_case_names, make_linear_case
from parity_tests.truth.oracle import solve, true_logits
from parity_tests.truth.precision import DTYPES, round_to

DEVICES = 8
EVERY_OPTION = ("everything", "class_mask_max_sup", "bad_labels", "soft_clamp", "axis_in_the_middle")
OF_LAYER = ("hidden", "weight")
OF_LAYERS = ("linear_everything", "linear_class_mask_of_rows", "linear_many_chunks", "linear_max_sup", "linear_no_rows")
NARROW_PRODUCTS = frozenset({"products", "products of rows"})
OF_STATISTICS = ("everything", "class_mask_of_rows_soft", "ties", "soft_max_sup")

dense = lsce_jax.label_smoothed_cross_entropy
sharded = lsce_jax.vocab_parallel_label_smoothed_cross_entropy
sharded_layer = lsce_jax.vocab_parallel_linear_label_smoothed_cross_entropy
sharded_layer_with_stats = lsce_jax.vocab_parallel_linear_label_smoothed_cross_entropy_with_stats
sharded_with_stats = lsce_jax.vocab_parallel_label_smoothed_cross_entropy_with_stats


def test_the_number_of_devices() -> None:
    assert jax.device_count() == DEVICES


# --- Against the truth ----------------------------------------------------------------------------------------------


@cache
def adapter(num_devices: int, check_vma: bool = True, linear: bool = False) -> ShardedAdapter:
    # Of a narrow dtype, the weight's gradient of each chunk is stored in it, as where the losses are not reduced.
    return ShardedAdapter(num_devices, check_vma, linear, narrow=NARROW_PRODUCTS)


# A dtype changes nothing in how classes are divided, but by its precision. So every case is there with every number of
# devices, and with two dtypes; those with every option are there with the other two.
IN_EVERY_CASE = {(DEVICES, "float32"), (3, "bfloat16")}
IN_SOME_CASES = {(DEVICES, "float64"), (3, "float16")}


def cases(names: Iterable[str], is_quick: Callable[[str, int, str], bool], dtypes: Sequence[str]) -> Any:
    """Return a decorator for tests of cases, numbers of devices and dtypes. Those that are not quick are marked."""
    marked = []
    for name, number, dtype in product(names, (DEVICES, 3), dtypes):
        is_one_of_some = (number, dtype) in IN_SOME_CASES and name in {*CHOSEN, *EVERY_OPTION, *OF_LAYERS}
        quick = is_quick(name, number, dtype)
        if quick or is_one_of_some or (number, dtype) in IN_EVERY_CASE:
            marked.append(pytest.param(name, number, dtype, marks=[] if quick else [pytest.mark.distributed]))
    return pytest.mark.parametrize(("name", "num_devices", "dtype"), marked)


def is_quick(name: str, num_devices: int, dtype: str) -> bool:
    if num_devices != DEVICES:
        return name in EVERY_OPTION[:2] and dtype == "float32"
    return name in {"float32": {*EVERY_OPTION, *EDGES}, "bfloat16": EVERY_OPTION[:2]}.get(dtype, ())


@cases(case_names(), is_quick, DTYPES)
def test_against_oracle(name: str, num_devices: int, dtype: str) -> None:
    """Loss and gradient. Three devices divide few of these numbers of classes, so there classes are added."""
    case, loss = make_case(name, dtype), adapter(num_devices)
    comparison = against_oracle(case, solve(case), loss(case), loss.arithmetic)
    assert comparison.agrees, comparison


def has_quick_statistics(name: str, num_devices: int, dtype: str) -> bool:
    return name in OF_STATISTICS and (num_devices, dtype) == (DEVICES, "float32")


@cases((name for name in case_names() if name != "wide"), has_quick_statistics, STATISTICS_DTYPES)
def test_statistics(name: str, num_devices: int, dtype: str) -> None:
    case = make_case(name, dtype)
    arrays, options = operands_of(case)
    arrays.pop("upstream")
    loss, stats = jax.jit(partial(divided(sharded_with_stats, num_devices), **options))(**arrays)
    flat = {field: np.asarray(value).reshape(-1) for field, value in stats._asdict().items()}
    assert_statistics(case, np.asarray(loss), flat, adapter(num_devices).arithmetic)


def is_quick_layer(name: str, num_devices: int, dtype: str) -> bool:
    return name in OF_LAYERS and (num_devices, dtype) == (3, "float32")


@cases(linear_case_names(), is_quick_layer, DTYPES)
def test_layer_against_oracle(name: str, num_devices: int, dtype: str) -> None:
    """Loss, and the gradients of hidden, weight and bias."""
    case, loss = make_linear_case(name, dtype), adapter(num_devices, linear=True)
    comparison = against_oracle(case, solve(case), loss(case), loss.arithmetic)
    assert comparison.agrees, comparison


@pytest.mark.parametrize(
    "name", [*EVERY_OPTION[:2], *(pytest.param(name, marks=pytest.mark.distributed) for name in EVERY_OPTION[2:])]
)
def test_without_types_of_what_varies(name: str) -> None:
    """With check_vma=False the numbers are the same."""
    case, truth = make_case(name, "float32"), solve(make_case(name, "float32"))
    unchecked = adapter(DEVICES, check_vma=False)
    comparison = against_oracle(case, truth, unchecked(case), unchecked.arithmetic)
    assert comparison.agrees, comparison


def compared(case: Case) -> Comparison:
    loss = adapter(DEVICES)
    return against_oracle(case, solve(case), loss(case), loss.arithmetic)


def test_bounds_are_used() -> None:
    """A bound that is never used past a few per cent protects nothing."""
    shares = [compared(make_case(name, "float32")) for name in ("dominant", "classes_129")]
    print("largest shares:", max(each.loss for each in shares), max(each.gradient for each in shares))
    assert max(each.loss for each in shares) > 0.1
    assert max(each.gradient for each in shares) > 0.1


def assert_within_bounds(case: Case, found: dict[str, Any], bounds: Parts | None = None) -> None:
    """Hold parts of the result of a case against the truth. Their rows may have dimensions."""
    truth = solve(case, math if case.dtype == "float32" else None)
    bounds = bounds or bounds_of(case, truth, adapter(DEVICES, linear=isinstance(case, LinearCase)).arithmetic)
    for part, values in found.items():
        error = truth.parts[part].error_of(np.asarray(values, np.float64).reshape(truth.parts[part].high.shape))
        share = np.max(error_over_bound(error, bounds[part]), initial=0)
        print(f"{part}: {share:.2f} of the bound")
        assert share <= 1, part


def assert_same_but_for_rounding(found: Any, program: Callable[..., Any], *operands: Any) -> None:
    """Hold results in float64 against those of another program, within what rounding may move these.

    That is measured, as `lsce-parity compare` does: `studies/sameness.py`.
    """
    traced, given = jax.make_jaxpr(program)(*operands), jax.tree.leaves(operands)
    steps = [0.0] + [NOISE * 2.0**-53] * RERUNS
    exact, *moved = (NoisyDevice(step, seed).run(traced, given) for seed, step in enumerate(steps))
    for ours, theirs, *others in zip(jax.tree.leaves(found), exact, *moved, strict=True):
        bound = FARTHER * np.max(np.abs(np.stack(others) - theirs), axis=0)
        print(f"{np.max(np.abs(ours - theirs) / bound):.2f} of what rounding may do")
        assert np.all(np.abs(ours - theirs) <= bound)


def layer_case(dtype: str, hidden: np.ndarray, weight: np.ndarray, labels: np.ndarray, **options: Any) -> LinearCase:
    hidden, weight = hidden.astype(np.float64), weight.astype(np.float64)
    logits = hidden @ weight if dtype == "float32" else true_logits(hidden, weight, None)  # of eighths, which are exact
    return LinearCase("", dtype, logits, labels, options, hidden=hidden, weight=weight, weight_dtype=dtype)


def eighths(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return numbers whose products and their sums are exact in float32."""
    return np.round(np.random.default_rng(seed).normal(size=shape) * 8) / 8


# --- Where things are -----------------------------------------------------------------------------------------------


def spread_out(**fields: Any) -> Case:
    """Return a case of 16 classes, two on each device, with a label on each of them."""
    generator = np.random.default_rng(0)
    labels = np.arange(0, 16)
    return random_case("float32", generator, 16, 16, labels=labels, **fields)


def test_labels_on_every_device() -> None:
    assert compared(spread_out()).agrees


def test_devices_whose_classes_are_masked_out() -> None:
    """Of seven devices, and of all in rows that do not count, whose logits are NaN."""
    case = spread_out(class_mask=np.arange(16) // 2 == 5, where=np.arange(16) // 2 == 5)
    logits = np.where(case.class_mask & case.where[:, None], case.logits, np.nan)
    assert compared(replace(case, logits=logits)).agrees


def test_masks_of_rows_that_leave_one_device() -> None:
    mask = np.arange(16) // 2 == np.arange(16)[:, None] // 2
    assert compared(spread_out(class_mask=mask)).agrees


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_devices_whose_logits_are_minus_infinity(smoothing: float) -> None:
    case = spread_out(smoothing=smoothing)
    logits = case.logits.copy()
    logits[:4, 8:10] = -np.inf  # of one device
    logits[4:8, :14] = -np.inf  # of all but the last
    assert compared(replace(case, logits=logits)).agrees


@pytest.mark.parametrize("smoothing", [0.0, 0.125])
def test_layers_whose_logits_are_at_both_ends_of_the_dtype(smoothing: float) -> None:
    """A largest logit minus another is infinite: the loss is infinite only if that takes part, and never NaN."""
    hidden = np.zeros((1, 16), np.float32)
    hidden[0, 0], hidden[0, 8:] = 3e38, -3e38
    loss = partial(divided(sharded_layer, DEVICES, linear=True), labels=jnp.array([0]), reduction="sum")
    value, gradient = jax.value_and_grad(partial(loss, smoothing=smoothing))(hidden, jnp.eye(16))
    assert value == (np.inf if smoothing else 0)
    target = (np.arange(16) == 0) * (1 - smoothing) + smoothing / 16
    assert np.array_equal(gradient[0], (np.arange(16) == 0) - target)  # exact for these numbers


def test_ties_over_devices() -> None:
    """Largest logits on several devices share what max_sup takes, and each counts in the sum of exponentials."""
    options = {"convention": "max_sup"}
    case = spread_out(smoothing=0.3, options=options, class_weight=np.linspace(0.5, 2, 16).astype("float32"))
    logits = case.logits.copy()
    logits[:, 3] = logits[:, 4] = logits[:, 15] = 20
    logits[:5] = 0.5
    case = replace(case, logits=logits, class_weight=case.class_weight.astype("float64"))
    assert compared(case).agrees
    with_stats = jax.jit(divided(sharded_with_stats, DEVICES))
    loss, stats = with_stats(*map(jnp.asarray, (logits.astype("float32"), case.labels)))
    assert stats.prediction.tolist() == [0] * 5 + [3] * 11
    assert loss.shape == (16,)


def test_small_losses_keep_their_accuracy() -> None:
    """A loss of 1e-9 beside a term of 1: each term but one is far below the rounding of their sum."""
    case = spread_out(smoothing=0.0)
    logits = np.where(np.eye(16, dtype=bool), 24.0, 0.0)
    assert compared(replace(case, logits=logits)).agrees
    assert 0 < solve(replace(case, logits=logits)).loss.high[0] < 1e-9


def test_a_mean_of_weights_that_are_all_0() -> None:
    """The loss is 0 and so is the gradient, whatever the logits hold."""
    weight = jnp.where(jnp.arange(16) == 3, 0.0, 1.0)
    logits = jnp.full((2, 16), jnp.nan).at[1].set(1.0)
    loss = partial(divided(sharded, DEVICES), labels=jnp.array([3, 3]), class_weight=weight, reduction="mean")
    value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    assert value == 0
    assert not np.any(gradient)


# --- Derivatives ----------------------------------------------------------------------------------------------------

LOGITS = np.random.default_rng(1).normal(size=(5, 16)).astype(np.float32)
LABELS = np.array([0, 3, 15, 9, 7])
HIDDEN = np.random.default_rng(3).normal(size=(12, 6)).astype(np.float32)
WEIGHT = np.random.default_rng(4).normal(size=(6, 16)).astype(np.float32)


def one_axis() -> Any:
    return jax.make_mesh((DEVICES,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def in_slices(function: Callable[..., Any], out_specs: Any, check_vma: bool) -> Callable[..., Any]:
    specs = jax.P(None, AXIS)
    mesh = one_axis()
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=check_vma)


def total(local_logits: jax.Array, **options: Any) -> jax.Array:
    return sharded(local_logits, LABELS, axis_name=AXIS, reduction="sum", **options)


def test_no_cotangent_has_a_factor_of_the_number_of_devices() -> None:
    """From outside, and with JAX's default from inside too, the gradient is that of one loss."""
    of_slices = jax.P(None, AXIS)
    gradients = {
        "outside": jax.grad(in_slices(total, jax.P(), True)),
        "inside": in_slices(jax.grad(total), of_slices, True),
        "outside, unchecked": jax.grad(in_slices(total, jax.P(), False)),
        "inside, unchecked": in_slices(jax.grad(total), of_slices, False),
        "inside, unchecked, divided": in_slices(
            jax.grad(lambda logits: total(logits) / jax.lax.axis_size(AXIS)), of_slices, False
        ),
    }
    case = Case("", "float32", LOGITS.astype(np.float64), LABELS, {"reduction": "sum"})
    truth = solve(case)
    # Where JAX adds up the cotangents of the devices, that is one more sum.
    bound = error_bound(case, truth, on_shards(adapter(DEVICES).arithmetic, DEVICES)).gradient
    for name, gradient in gradients.items():
        # There JAX takes each device's result for one of its own, for this function as for any other with a psum.
        factor = DEVICES if name == "inside, unchecked" else 1
        found = np.asarray(jax.jit(gradient)(LOGITS), np.float64) / factor
        assert np.all(truth.gradient.error_of(found) <= bound), name


@pytest.mark.parametrize("check_vma", [True, False])
def test_derivatives_of_every_operand(check_vma: bool) -> None:
    """With respect to logits, class weights, prior and smoothing, in forward and reverse mode and of second order."""
    with jax.enable_x64(True):
        random = np.random.default_rng(2)
        prior = random.dirichlet(np.ones(16))
        primals = {
            "logits": jnp.asarray(LOGITS, jnp.float64),
            "class_weight": jnp.asarray(random.uniform(0.5, 2, 16)),
            "prior": jnp.asarray(prior),
            "smoothing": jnp.asarray(0.2),
        }

        def of(loss: Callable[..., Any]) -> Callable[..., Any]:
            options = {"z_loss": 0.1, "softcap": 4.0, "reduction": "mean"}

            def value(operands: dict[str, Any]) -> Any:
                given = dict(operands)
                return loss(given.pop("logits"), jnp.asarray(LABELS), **given, **options)

            return value

        def derivatives(loss: Callable[..., Any], primals: dict[str, Any]) -> Any:
            value = of(loss)
            _, tangent = jax.jvp(value, (primals,), (jax.tree.map(jnp.cos, primals),))
            gradient = jax.grad(value)(primals)
            inner = lambda operands: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(jax.grad(value)(operands)))  # noqa: E731
            return tangent, gradient, jax.grad(inner)(primals)

        found = jax.jit(partial(derivatives, divided(sharded, DEVICES, check_vma=check_vma)))(primals)
        assert_same_but_for_rounding(found, partial(derivatives, dense), primals)


# --- What is sent ---------------------------------------------------------------------------------------------------


def collectives(function: Callable[..., Any], *operands: Any) -> dict[str, list[int]]:
    """Return the sizes of the arrays that a compiled program sends, in elements, by the kind of collective.

    An array that is sent in each round of a loop is there as often.
    """
    found: dict[str, list[int]] = {}
    for each in hlo.parse(jax.jit(function).lower(*operands).compile().as_text()).transfers:
        found.setdefault(each.kind, []).extend(each.times * [math.prod(array.sizes) for array in each.arrays])
    return {kind: sorted(sizes) for kind, sizes in found.items()}


ROWS = len(LABELS)
VECTORS = {"class_weight": np.linspace(0.5, 2, 16, dtype=np.float32), "class_mask": np.arange(16) != 1}
# Options, and what loss and gradient send: the maximum, and the sum of few numbers for each row.
SENT: dict[str, tuple[dict[str, Any], list[int]]] = {
    "plain": ({}, [ROWS, 4 * ROWS]),
    "mean": ({"reduction": "mean", "z_loss": 0.1, "softcap": 5.0}, [ROWS, 4 * ROWS]),
    "max_sup": ({"convention": "max_sup"}, [ROWS, 7 * ROWS]),
    "mask and weights": ({**VECTORS, "reduction": "mean"}, [3 * ROWS, 7 * ROWS]),
}


@pytest.mark.parametrize("name", SENT)
def test_two_collectives_forward_and_none_backward(name: str) -> None:
    options, sizes = SENT[name]
    loss = partial(divided(sharded, DEVICES), labels=jnp.asarray(LABELS), **jax.tree.map(_as_array, options))
    backward = jax.grad(lambda logits: loss(logits).sum())
    assert collectives(loss, LOGITS) == collectives(backward, LOGITS) == {"all-reduce": sizes}


def _as_array(option: Any) -> Any:
    return jnp.asarray(option) if isinstance(option, np.ndarray) else option


def test_what_statistics_and_soft_labels_send() -> None:
    labels = jnp.asarray(LABELS)
    stats = partial(divided(sharded_with_stats, DEVICES), labels=labels)
    assert collectives(stats, LOGITS) == {"all-reduce": [ROWS, ROWS, 5 * ROWS]}
    soft = jax.nn.softmax(LOGITS)
    assert collectives(partial(divided(sharded, DEVICES), labels=soft), LOGITS) == {"all-reduce": [ROWS, 5 * ROWS]}
    masked = partial(divided(sharded, DEVICES), labels=soft, class_mask=jnp.asarray(VECTORS["class_mask"]))
    assert collectives(masked, LOGITS) == {"all-reduce": [ROWS, ROWS, 5 * ROWS]}


def test_the_gradient_of_smoothing_sends_nothing_but_of_soft_labels() -> None:
    smoothing = jnp.asarray(0.1)

    def of(labels: Any) -> Callable[[jax.Array], jax.Array]:
        return lambda smoothing: divided(sharded, DEVICES)(LOGITS, labels, smoothing=smoothing, reduction="sum")

    assert collectives(jax.grad(of(jnp.asarray(LABELS))), smoothing) == {"all-reduce": [ROWS, 4 * ROWS]}
    of_soft = collectives(jax.grad(of(jax.nn.softmax(LOGITS))), smoothing)
    assert of_soft == {"all-reduce": [ROWS, ROWS, ROWS, 5 * ROWS]}


def test_what_vectors_of_a_layer_send() -> None:
    options = jax.tree.map(_as_array, VECTORS)
    loss = partial(divided(sharded_layer, DEVICES, linear=True), labels=jnp.arange(12) + 3, reduction="mean")
    sent = collectives(lambda hidden: loss(hidden, jnp.asarray(WEIGHT), **options), HIDDEN)
    assert sent == {"all-reduce": [12, 2 * 12, 7 * 12]}


def test_what_is_sent_where_jax_has_no_types_of_what_varies() -> None:
    """One more sum backward: of the cotangents, which JAX cannot know to be the same on all devices."""
    loss = divided(sharded, DEVICES, check_vma=False)
    backward = jax.grad(lambda logits: loss(logits, jnp.asarray(LABELS)).sum())
    assert len(collectives(backward, LOGITS)["all-reduce"]) == 3


def test_the_count_can_fail() -> None:
    def gathered(local_logits: jax.Array) -> jax.Array:
        whole = jax.lax.all_gather(local_logits, AXIS, axis=1, tiled=True)
        return dense(whole, LABELS)

    found = collectives(in_slices(gathered, jax.P(), False), LOGITS)
    assert found == {"all-gather": [ROWS * 16]}


def layer_loss(hidden: jax.Array, local_weight: jax.Array, **options: Any) -> jax.Array:
    labels = np.arange(12) + 3
    return sharded_layer(hidden, local_weight, labels, axis_name=AXIS, reduction="sum", chunk_size=3, **options)


def layer_on(check_vma: bool, function: Callable[..., Any] = layer_loss, out_specs: Any = None) -> Callable[..., Any]:
    specs = jax.P(), jax.P(None, AXIS)
    out_specs = jax.P() if out_specs is None else out_specs
    mesh = one_axis()
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=check_vma)


def test_a_layer_sends_one_gradient_more() -> None:
    """And none in the loop over its four chunks."""
    rows, both = len(HIDDEN), (HIDDEN, WEIGHT)
    loss, forward = layer_on(check_vma=True), {"all-reduce": [rows, 4 * rows]}
    assert collectives(loss, *both) == forward
    assert collectives(jax.grad(loss, argnums=1), *both) == forward
    of_hidden = {"all-reduce": sorted([rows, 4 * rows, HIDDEN.size])}
    assert collectives(jax.grad(loss, argnums=(0, 1)), *both) == of_hidden
    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*both).compile().as_text()
    assert "while" in program
    assert not re.search(rf"\w+\[(\d+,)*{rows},(2|16)\]", program)  # no array has the logits of all rows


@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_of_a_layer(check_vma: bool) -> None:
    """From outside and from inside; there, without types, the caller divides the loss and adds up hidden's."""
    case = layer_case("float64", HIDDEN, WEIGHT, np.arange(12) + 3, reduction="sum")
    bounds = bounds_of(case, solve(case), adapter(DEVICES, linear=True).arithmetic)
    with jax.enable_x64(True):
        both = jnp.asarray(HIDDEN, jnp.float64), jnp.asarray(WEIGHT, jnp.float64)
        from_outside = jax.grad(layer_on(check_vma), argnums=(0, 1))

        def inside(hidden: jax.Array, local_weight: jax.Array) -> Any:
            if check_vma:
                return jax.grad(layer_loss, argnums=(0, 1))(hidden, local_weight)
            divided_loss = lambda *both: layer_loss(*both) / jax.lax.axis_size(AXIS)  # noqa: E731
            of_hidden, of_weight = jax.grad(divided_loss, argnums=(0, 1))(hidden, local_weight)
            return jax.lax.psum(of_hidden, AXIS), of_weight

        from_inside = layer_on(check_vma, inside, (jax.P(), jax.P(None, AXIS)))
        for gradient in (from_outside, from_inside):
            assert_within_bounds(case, dict(zip(OF_LAYER, jax.jit(gradient)(*both), strict=True)), bounds)
        tangents = np.cos(case.hidden), np.sin(case.weight)
        given = tuple(map(jnp.asarray, tangents))
        forward = float(jax.jit(lambda *both: jax.jvp(layer_on(check_vma), both, given)[1])(*both))
    # It adds up the terms of both gradients in another order.
    terms = [solve(case).parts[name].high * tangent for name, tangent in zip(OF_LAYER, tangents, strict=True)]
    of_gradients = sum(np.sum(bounds[name] * np.abs(tangent)) for name, tangent in zip(OF_LAYER, tangents, strict=True))
    of_sum = 2.0**-53 * sum(each.size for each in terms) * sum(np.sum(np.abs(each)) for each in terms)
    error = abs(forward - math.fsum(np.concatenate([each.ravel() for each in terms])))
    print(f"forward: {error / (of_gradients + of_sum):.2f} of the bound")
    assert error <= of_gradients + of_sum


def test_statistics_of_a_layer() -> None:
    """As of the logits, with devices whose logits are -inf or masked out."""
    labels = jnp.arange(12) + 3
    mask = jnp.arange(16) // 2 != 4
    bias = jnp.where(jnp.arange(16) // 2 == 1, -jnp.inf, 0.0)
    options = {"class_mask": mask, "smoothing": 0.0, "softcap": 20.0}
    logits = jnp.asarray(HIDDEN @ WEIGHT) + bias[None]
    for softcap in (None, 20.0):
        options["softcap"] = softcap
        of_layer = jax.jit(partial(divided(sharded_layer_with_stats, DEVICES, linear=True), **options, chunk_size=5))
        of_logits = jax.jit(partial(lsce_jax.label_smoothed_cross_entropy_with_stats, **options))
        ours = of_layer(jnp.asarray(HIDDEN), jnp.asarray(WEIGHT), labels, bias=bias)
        theirs = of_logits(logits, labels)
        for found, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert np.isinf(ours[0]).any() == (softcap is None)


# --- Programs that the compiler divides -----------------------------------------------------------------------------

MANY_ROWS, MANY_CLASSES, FEATURES_OF_LAYER = 64, 4096, 12
ALL_LOGITS = MANY_ROWS * MANY_CLASSES
# Of rows and classes; of the rows of hidden, and of the two dimensions of the weight.
DENSE_SPECS = [("data", None), (None, "model"), ("data", "model"), (None, ("data", "model"))]
LAYER_SPECS = [("data", (None, None)), (None, (None, "model")), ("data", (None, "model")), ("data", ("data", "model"))]
OF_HIDDEN = [("data", None), (None, "model"), ("data", "model")]
each_mesh = pytest.mark.parametrize("axis_type", ["Auto", pytest.param("Explicit", marks=pytest.mark.distributed)])


def placed(mesh: Any, array: np.ndarray, *axes: Any) -> jax.Array:
    return jax.device_put(array, jax.NamedSharding(mesh, jax.P(*axes)))


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
@pytest.mark.parametrize("axes", DENSE_SPECS)
def test_plain_jit_sends_no_logits(axes: tuple[Any, Any], axis_type: str) -> None:
    """Of logits divided over rows, classes or both, loss and gradient send at most two numbers for each row."""
    types = (getattr(jax.sharding.AxisType, axis_type),) * 2
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "model"), axis_types=types)):
        mesh = jax.sharding.get_mesh()
        logits = placed(mesh, np.zeros((MANY_ROWS, MANY_CLASSES), np.float32), *axes)
        labels = placed(mesh, np.arange(MANY_ROWS), axes[0])
        for options in ({}, {"softcap": 5.0, "z_loss": 0.1}):
            step = jax.value_and_grad(partial(dense, reduction="mean", **options))
            assert all(size <= 2 * MANY_ROWS for sizes in collectives(step, logits, labels).values() for size in sizes)


@each_mesh
@pytest.mark.parametrize(("rows", "of_weight"), LAYER_SPECS)
@pytest.mark.parametrize("reduction", ["mean", pytest.param("none", marks=pytest.mark.distributed)])
def test_plain_jit_sends_no_logits_of_a_layer(
    reduction: str, rows: str | None, of_weight: tuple[Any, Any], axis_type: str
) -> None:
    """It sends numbers of rows, hidden's gradient, and the weight and its gradient where the rows are divided."""
    types = (getattr(jax.sharding.AxisType, axis_type),) * 2
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "model"), axis_types=types)):
        mesh = jax.sharding.get_mesh()
        hidden = placed(mesh, np.zeros((MANY_ROWS, FEATURES_OF_LAYER), np.float32), rows, None)
        weight = placed(mesh, np.zeros((FEATURES_OF_LAYER, MANY_CLASSES), np.float32), *of_weight)
        labels = placed(mesh, np.arange(MANY_ROWS), rows)

        def loss(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
            return lsce_jax.linear_label_smoothed_cross_entropy(hidden, weight, labels, reduction=reduction).sum()

        sent = collectives(jax.value_and_grad(loss, argnums=(0, 1)), hidden, weight, labels)
    of_layer = {weight.size // parts for parts in (1, 2, 4, 8)} | {hidden.size // parts for parts in (1, 2)}
    of_logits = {ALL_LOGITS // parts for parts in (1, 2, 4, 8)}
    assert not of_layer & of_logits
    assert all(size <= 2 * MANY_ROWS or size in of_layer for sizes in sent.values() for size in sizes)


@each_mesh
@pytest.mark.parametrize("axes", OF_HIDDEN)
def test_hidden_whose_features_are_divided(axis_type: str, axes: tuple[str | None, str | None]) -> None:
    """As the weight's are."""
    types = (getattr(jax.sharding.AxisType, axis_type),) * 2
    case = layer_case("float64", HIDDEN[:, :4], WEIGHT[:4], np.arange(len(HIDDEN)) + 3, reduction="sum")
    step = jax.value_and_grad(partial(lsce_jax.linear_label_smoothed_cross_entropy, reduction="sum"), argnums=(0, 1))
    with jax.enable_x64(True), jax.set_mesh(jax.make_mesh((2, 4), ("data", "model"), axis_types=types)):
        mesh = jax.sharding.get_mesh()
        operands = placed(mesh, case.hidden, *axes), placed(mesh, case.weight, "model", None)
        loss, gradients = jax.jit(step)(*operands, placed(mesh, case.labels, axes[0]))
    assert_within_bounds(case, {"loss": loss, **dict(zip(OF_LAYER, gradients, strict=True))})


@each_mesh
@pytest.mark.parametrize("recompute", [False, True])
def test_a_weight_whose_features_are_divided_is_gathered_once(axis_type: str, recompute: bool) -> None:
    """As in FSDP. No chunk of rows gathers the weight again, and the gradients are those of one device."""
    types = (getattr(jax.sharding.AxisType, axis_type),) * 2
    hidden, weight = eighths(5, (MANY_ROWS, FEATURES_OF_LAYER)), eighths(6, (FEATURES_OF_LAYER, MANY_CLASSES))
    case = layer_case("float32", hidden, weight, np.arange(MANY_ROWS), **MEAN)
    options = {**MEAN, "chunk_size": 8, "recompute": recompute}
    step = jax.value_and_grad(partial(lsce_jax.linear_label_smoothed_cross_entropy, **options), argnums=(0, 1))
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "model"), axis_types=types)):
        mesh = jax.sharding.get_mesh()
        operands = [placed(mesh, np.float32(hidden), "data", None), placed(mesh, np.float32(weight), "data", "model")]
        operands.append(placed(mesh, case.labels, "data"))
        (loss, gradients), sent = jax.jit(step)(*operands), collectives(step, *operands)
    of_device = weight.size // 4
    assert [size for size in sent["all-gather"] if size >= of_device] == [of_device]
    assert_within_bounds(case, {"loss": loss, **dict(zip(OF_LAYER, gradients, strict=True))})


# --- Types of the axes ----------------------------------------------------------------------------------------------

# The axes of both dimensions of rows, of the classes, and of the features of hidden and of the weight.
DIVIDED: dict[str, tuple[tuple[Any, Any], Any, Any, Any]] = {
    "rows": (("data", None), None, None, None),
    "sequence": ((None, "data"), None, None, None),
    "both dimensions": (("data", "model"), None, None, None),
    "classes": ((None, None), "model", None, None),
    "rows and classes": (("data", None), "model", None, None),
    "features": (("data", None), None, "model", "model"),
    "features of the weight": (("data", None), "model", None, "data"),
}
PLACES = np.arange(32).reshape(8, 4)
ROWS_OF = {
    "labels": np.where(PLACES % 6 == 0, 3, PLACES % 10 + 6),
    "hidden": eighths(8, (8, 4, 8)),
    "weight": eighths(9, (8, 16)),
}
ROWS_OF["logits"] = ROWS_OF["hidden"] @ ROWS_OF["weight"]
BY_CLASS = {"class_weight": np.linspace(0.5, 2.375, 16), "class_mask": np.arange(16) != 5}
BY_ROW = {"where": PLACES % 7 != 2, "smoothing": np.linspace(0, 31 / 128, 32).reshape(8, 4)}
MASKS = {"class_mask": (np.arange(512).reshape(8, 4, 16) % 11 != 5) | (ROWS_OF["labels"][..., None] == np.arange(16))}
SOFT = round_to(np.random.default_rng(6).dirichlet(np.ones(16), (8, 4)), "float32")
MEAN: dict[str, Any] = {"reduction": "mean"}
OPTIONS: dict[str, Any] = {**MEAN, "ignore_index": 3, "z_loss": 0.1}
dense_with_stats = lsce_jax.label_smoothed_cross_entropy_with_stats
layer_with_stats = lsce_jax.linear_label_smoothed_cross_entropy_with_stats
# A loss, and the fields of a case.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "dense": (dense_with_stats, {}),
    "options": (dense, {**BY_CLASS, **BY_ROW, "options": {**OPTIONS, "softcap": 5.0}}),
    "masks of rows": (dense, {**MASKS, "options": {**MEAN, "convention": "max_sup"}}),
    "reference": (partial(dense, implementation="reference"), BY_CLASS),
    "soft": (dense, {"labels": SOFT, "options": MEAN}),
    "layer": (partial(layer_with_stats, chunk_size=8), {"options": MEAN}),
    "layer, options": (partial(layer_with_stats, chunk_size=5), {**BY_CLASS, **BY_ROW, "options": OPTIONS}),
    "layer, none": (partial(layer_with_stats, chunk_size=8), {}),
    "layer, filter": (partial(layer_with_stats, gradient_filter=1e-30), {"options": {"reduction": "sum"}}),
    "layer, reference": (partial(layer_with_stats, implementation="reference"), {}),
    "layer, added": (
        partial(jax_added(ours_of_jax), reduction="none"),
        {**BY_CLASS, **BY_ROW, "options": {"ignore_index": 3, "z_loss": 0.1}},
    ),
}
QUICK = {
    *{("layer", "sequence"), ("options", "classes"), ("layer, options", "features of the weight")},
    ("layer, added", "rows and classes"),
}
TYPES = (("Explicit", "Explicit"), ("Auto", "Explicit"), ("Explicit", "Auto"))


def mesh_of(types: Sequence[str]) -> Any:
    kinds = tuple(getattr(jax.sharding.AxisType, name) for name in types)
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=kinds)


def on_mesh_of(types: Sequence[str], operands: dict[str, Any], divided_by: str) -> dict[str, Any]:
    """Return the operands, divided as that entry of `DIVIDED` says."""
    rows, classes, of_hidden, of_weight = DIVIDED[divided_by]
    axes = {(8, 4): rows, (16,): (classes,), (8, 4, 16): (*rows, classes), (8, 4, 8): (*rows, of_hidden)}
    axes |= {(8, 16): (of_weight, classes), (): ()}
    mesh = mesh_of(types)
    return {name: placed(mesh, value, *axes[value.shape]) for name, value in operands.items()}


@pytest.mark.parametrize(
    ("types", "call", "divided_by"),
    [
        pytest.param(*each, marks=[] if each[0] is TYPES[0] and each[1:] in QUICK else [pytest.mark.distributed])
        for each in product(TYPES, CALLS, DIVIDED)
        if "features" not in each[2] or each[1].startswith("layer")
    ],
)
def test_types_of_axes(types: tuple[str, str], call: str, divided_by: str) -> None:
    """Explicit and mixed axes, without `jax.set_mesh`: the loss of one device, with gradients divided as operands."""
    (loss, fields), is_layer = CALLS[call], call.startswith("layer")
    layer: dict[str, Any] = {name: ROWS_OF[name] for name in ("hidden", "weight")} if is_layer else {}
    given = {"logits": ROWS_OF["logits"], "labels": ROWS_OF["labels"], **layer, **fields}
    case = LinearCase(call, "float32", weight_dtype="float32", **given) if is_layer else Case(call, "float32", **given)
    arrays, options = operands_of(case)
    arrays.pop("upstream")
    arrays = on_mesh_of(types, arrays, divided_by)
    floats = tuple(layer) or ("logits",)

    @jax.jit
    def step(arrays: dict[str, Any]) -> Any:
        def value(by: dict[str, Any]) -> Any:
            results = loss(*by.values(), **arrays, **options)
            return jnp.sum(jax.tree.leaves(results)[0]), results

        return jax.grad(value, has_aux=True)({name: arrays.pop(name) for name in floats})

    gradients, results = step(arrays)
    for name, gradient in gradients.items():
        assert jax.typeof(gradient).sharding == jax.typeof(arrays[name]).sharding
    value, stats = results if isinstance(results, tuple) else (results, None)
    arithmetic = adapter(DEVICES, linear=is_layer).arithmetic
    found = {"loss": value, **(gradients if is_layer else {"gradient": gradients["logits"]})}
    assert_within_bounds(case, found, bounds_of_added(case, arithmetic) if call.endswith("added") else None)
    if stats is not None:
        flat = {field: np.asarray(values).reshape(-1) for field, values in stats._asdict().items()}
        assert_statistics(case, np.asarray(value), flat, arithmetic)


def test_types_of_results() -> None:
    """Values of rows are divided as the rows of the logits are, a mean and the denominator of a mean not at all."""
    operands = on_mesh_of(TYPES[0], {name: ROWS_OF[name] for name in ("logits", "labels")}, "rows and classes")
    logits, labels = operands["logits"].transpose(0, 2, 1), operands["labels"]
    losses = dense(logits, labels, axis=1)
    mean, stats = lsce_jax.label_smoothed_cross_entropy_with_stats(logits, labels, axis=1, reduction="mean")
    denominator = lsce_jax.mean_denominator(labels, class_weight=np.ones(16, np.float32), ignore_index=3)
    assert lsce_jax.mean_denominator(labels) == 32 * lsce_jax.mean_denominator(labels.max()) == 32
    assert jax.typeof(losses).sharding.spec == jax.typeof(stats.nll).sharding.spec == jax.P("data", None)
    assert jax.typeof(mean).sharding.spec == jax.typeof(denominator).sharding.spec == jax.P()
    assert float(denominator) == np.sum(ROWS_OF["labels"] != 3)


METRICS: tuple[Callable[[], Any], ...] = (
    *(metrics.MeanLoss, metrics.MeanNLL, metrics.Perplexity, metrics.MeanEntropy, metrics.Accuracy),
    *(partial(metrics.TopKAccuracy, 3), metrics.CalibrationError),
)


@pytest.mark.parametrize(
    "types", [TYPES[0], *(pytest.param(each, marks=pytest.mark.distributed) for each in TYPES[1:])]
)
def test_metrics_of_divided_rows(types: tuple[str, str]) -> None:
    """The metrics of one device, to the bit: the order of summation does not show."""
    arrays = {"logits": ROWS_OF["logits"].astype(np.float32), "labels": ROWS_OF["labels"]}
    arrays |= dense_with_stats(*arrays.values(), ignore_index=3)[1]._asdict()

    @jax.jit
    def values(arrays: dict[str, Any]) -> list[Any]:
        stats = LossStats(*(arrays[name] for name in LossStats._fields))
        seen = [make() for make in METRICS]
        for metric, mask in product(seen, (None, stats.nll > 2)):
            metric.update(stats=stats, logits=arrays["logits"], labels=arrays["labels"], mask=mask)
        return [metric.compute() for metric in seen]

    expected = values(arrays)
    for divided_by in ("sequence", "both dimensions", "rows and classes"):
        assert values(on_mesh_of(types, arrays, divided_by)) == expected, divided_by


def test_smoothing_added_to_rows_and_modules_of_divided_operands() -> None:
    """`add_smoothing` takes each row for itself, and modules call the losses: the same numbers."""
    nll = {"nll": ROWS_OF["logits"][..., 0].astype(np.float32) ** 2, **BY_ROW}
    nll["smoothing"] = nll["smoothing"].astype(np.float32)
    add = partial(lsce_jax.add_smoothing, label_logit=nll["nll"], mean_logit=-nll["nll"])
    on_mesh = on_mesh_of(TYPES[0], nll, "both dimensions")
    losses = lsce_jax.add_smoothing(**on_mesh, label_logit=on_mesh["nll"], mean_logit=-on_mesh["nll"])
    assert jax.typeof(losses).sharding.spec == jax.P("data", "model")
    assert np.array_equal(losses, add(**nll))
    arrays = {name: array.astype(np.float32) for name, array in ROWS_OF.items() if name != "labels"}
    given = on_mesh_of(TYPES[0], arrays | {"labels": ROWS_OF["labels"]}, "rows and classes")
    logits, labels, layer = given["logits"], given["labels"], (given["hidden"], given["weight"])
    options: dict[str, Any] = {"class_weight": np.float32(BY_CLASS["class_weight"]), "reduction": "mean"}
    of_logits, of_layer = lsce_jax.LabelSmoothedCrossEntropyLoss, lsce_jax.LinearLabelSmoothedCrossEntropyLoss
    assert of_logits(0.1, **options)(logits, labels) == dense(logits, labels, **options)
    loss = lsce_jax.linear_label_smoothed_cross_entropy
    assert of_layer(0.1, **options)(*layer, labels) == loss(*layer, labels, **options)
    of_classes = lsce_jax.CELossWithLabelSmoothing(0.1, 16)(logits.transpose(0, 2, 1), labels)
    assert of_classes == dense(logits, labels, convention="clamp", reduction="mean")


def some_classes(logits: jax.Array, labels: jax.Array, class_weight: jax.Array, class_mask: jax.Array) -> jax.Array:
    vectors = {"class_weight": class_weight, "class_mask": class_mask}
    return sharded(logits, labels, axis_name="model", reduction="mean", **vectors)


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.distributed)])
def test_shard_map_that_leaves_out_an_explicit_axis(check_vma: bool) -> None:
    """It divides the classes, and types divide the rows."""
    specs = jax.P(None, None, "model"), jax.P(), jax.P("model"), jax.P("model")
    names: dict[str, Any] = {"axis_names": {"model"}, "check_vma": check_vma}
    on_mesh = jax.shard_map(some_classes, mesh=mesh_of(TYPES[0]), in_specs=specs, out_specs=jax.P(), **names)
    arrays = {name: ROWS_OF[name] for name in ("logits", "labels")} | BY_CLASS
    with jax.enable_x64(True):
        found = jax.jit(jax.value_and_grad(on_mesh))(*on_mesh_of(TYPES[0], arrays, "rows and classes").values())
    case = Case("", "float64", options=MEAN, **arrays)
    assert_within_bounds(case, dict(zip(("loss", "gradient"), found, strict=True)))


@pytest.mark.parametrize("type_of_rest", ["Explicit", "Auto"])
def test_an_array_for_which_jax_finds_no_type(type_of_rest: str) -> None:
    """The error says which types to write, and with these the loss is computed."""
    mesh = mesh_of(("Auto", type_of_rest))

    def losses_of(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
        options: dict[str, Any] = {"implementation": "reference"}
        return lsce_jax.linear_label_smoothed_cross_entropy(hidden, weight, labels, **options)

    specs = jax.P("data"), jax.P(), jax.P("data")
    loss = jax.shard_map(losses_of, mesh=mesh, in_specs=specs, out_specs=jax.P("data"), axis_names={"data"})
    hidden, weight = placed(mesh, HIDDEN[:8, :4], "data", "model"), placed(mesh, WEIGHT[:4], "model", None)
    operands = hidden, weight, placed(mesh, np.arange(8), "data")
    if type_of_rest == "Auto":
        np.testing.assert_allclose(
            jax.jit(loss)(*operands), losses_of(HIDDEN[:8, :4], WEIGHT[:4], np.arange(8)), rtol=1e-5
        )
        return
    with pytest.raises(TypeError, match=r"the axes \('model',\).* axis_types=\(jax.sharding.AxisType.Auto,\) \* 2\)"):
        jax.jit(loss)(*operands)


# --- Rows -----------------------------------------------------------------------------------------------------------


def of_rows(case: Case | None, num_devices: int, **options: Any) -> Comparison:
    """Return how the mean compares whose rows are divided, by `mean_denominator`."""
    assert case is not None
    linear = isinstance(case, LinearCase)
    loss = JaxAdapter(over_devices(num_devices, linear=linear, **options), name="rows", linear=linear)
    loss.arithmetic = on_shards(JaxAdapter(linear=linear).arithmetic, num_devices)
    return against_oracle(case, solve(case), loss(case), loss.arithmetic)


@cases(
    (name for name in case_names() if as_mean(make_case(name, "float32"))),
    lambda *case: case[0] in (*EVERY_OPTION, "prior_distribution") and case[1:] == (DEVICES, "float32"),
    ("float32", "bfloat16"),
)
def test_rows_against_oracle(name: str, num_devices: int, dtype: str) -> None:
    """Fewer rows than devices, devices without a row that counts, padded tails."""
    comparison = of_rows(as_mean(make_case(name, dtype)), num_devices)
    assert comparison.agrees, comparison


@cases(
    (name for name in linear_case_names() if as_mean(make_linear_case(name, "float32"))), is_quick_layer, ("float32",)
)
def test_rows_of_a_layer_against_oracle(name: str, num_devices: int, dtype: str) -> None:
    comparison = of_rows(as_mean(make_linear_case(name, dtype)), num_devices)
    assert comparison.agrees, comparison


@pytest.mark.parametrize("options", [{"recompute": True}, {"gradient_filter": 1e-30}, {"implementation": "reference"}])
def test_ways_to_compute_rows_of_a_layer(options: dict[str, Any]) -> None:
    """Each has loops of its own, and in shard_map JAX asks of each what is the same on all devices."""
    names = ("linear_everything", "linear_class_mask_of_rows", "linear_many_chunks")
    for name in names[:1] if "implementation" in options else names:
        case = as_mean(make_linear_case(name, "float32"))
        assert case is not None
        given = replace(case, chunk_size=None) if "implementation" in options else case
        comparison = of_rows(given, DEVICES, **options)
        assert comparison.agrees, (name, comparison)


@pytest.mark.parametrize(("num_classes", "dtype"), [
    (1000, "bfloat16"),
    pytest.param(1000, "float32", marks=pytest.mark.distributed),
    *(pytest.param(*each, marks=pytest.mark.distributed) for each in product([10, 20_000], ["float32", "bfloat16"])),
])  # fmt: skip
def test_many_rows(num_classes: int, dtype: str) -> None:
    """On CPUs these are computed in blocks, columns and groups: the same number for each row as without devices."""
    logits = jax.random.normal(jax.random.key(num_classes), (2**19 // num_classes * 2, num_classes), dtype)
    labels = jnp.arange(len(logits)) % num_classes
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    loss = partial(dense, softcap=5.0)
    on_mesh = jax.shard_map(loss, mesh=mesh, in_specs=(jax.P("data"), jax.P("data")), out_specs=jax.P("data"))
    for ours, theirs in zip(*(jax.jit(value_and_gradient(f))(logits, labels) for f in (on_mesh, loss)), strict=True):
        assert np.array_equal(ours, theirs)


def value_and_gradient(loss: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    def both(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses, pullback = jax.vjp(lambda z: loss(z, labels), logits)
        return losses, pullback(jnp.ones_like(losses))[0]

    return both


def test_a_denominator_of_one_device_is_noticed() -> None:
    case = as_mean(make_case("everything", "float32"))
    assert case is not None
    loss = JaxAdapter(over_devices(DEVICES), name="rows")
    for denominator, agrees in ((1.0, True), (1.001, False)):
        right, given = (replace(case, options={**case.options, "denominator": d}) for d in (1.0, denominator))
        comparison = against_oracle(right, solve(right), loss(given), on_shards(JaxAdapter().arithmetic, DEVICES))
        assert comparison.agrees == agrees


@pytest.mark.parametrize("layer", [None, "sum", "none"])
def test_derivatives_of_what_all_rows_share(layer: str | None) -> None:
    """Of weight, bias, class weights, prior and smoothing, which every device has: JAX adds up those of all devices."""
    with jax.enable_x64(True):
        random = np.random.default_rng(3)
        labels, hidden = jnp.arange(16) % 5, jnp.asarray(random.normal(size=(16, 5)))
        primals = {
            "class_weight": jnp.asarray(random.uniform(0.5, 2, 5)),
            "prior": jnp.asarray(random.dirichlet(np.ones(5))),
            "smoothing": jnp.asarray(0.2),
        }
        if layer:
            primals |= {"weight": jnp.asarray(random.normal(size=(5, 5))), "bias": jnp.asarray(random.normal(size=5))}
        options: dict[str, Any] = {"z_loss": 0.1, "softcap": 4.0, "reduction": layer or "sum"}

        def total(hidden: jax.Array, labels: jax.Array, primals: dict[str, Any]) -> jax.Array:
            if layer is None:
                return dense(hidden, labels, **primals, **options)
            given = dict(primals)
            loss = lsce_jax.linear_label_smoothed_cross_entropy_with_stats
            return loss(hidden, given.pop("weight"), labels, **given, **options)[0].sum()

        def on_mesh(hidden: jax.Array, labels: jax.Array, primals: dict[str, Any]) -> jax.Array:
            here: jax.Array = jax.lax.psum(total(hidden, labels, primals), "data")
            return here

        mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        specs = (jax.P("data"), jax.P("data"), jax.P())
        divided_rows = jax.shard_map(on_mesh, mesh=mesh, in_specs=specs, out_specs=jax.P())

        def derivatives(loss: Callable[..., Any], primals: dict[str, Any]) -> Any:
            value = partial(loss, hidden, labels)
            gradient = jax.grad(value)(primals)
            inner = lambda primals: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(jax.grad(value)(primals)))  # noqa: E731
            return jax.jvp(value, (primals,), (jax.tree.map(jnp.cos, primals),)), gradient, jax.grad(inner)(primals)

        found = jax.jit(partial(derivatives, divided_rows))(primals)
        assert_same_but_for_rounding(found, partial(derivatives, total), primals)


def test_sums_of_a_layer_have_the_gradient_of_all_devices() -> None:
    """Of the weight, which all devices share, where the sums themselves are called: no caller has made it differ."""
    random = np.random.default_rng(4)
    hidden, weight = (random.normal(size=size) for size in ((16, 2, 3), (3, 5)))
    labels = np.arange(32, dtype=np.int32).reshape(16, 2) % 5

    def total(weight: jax.Array, hidden: jax.Array, labels: jax.Array) -> jax.Array:
        operands = LayerOperands(hidden, weight, None, labels, *[None] * 5, False, False, False, False)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(layer_sums(operands)[1]))

    def on_mesh(*operands: jax.Array) -> jax.Array:
        here: jax.Array = jax.lax.psum(total(*operands), "data")
        return here

    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (jax.P(), jax.P("data"), jax.P("data"))
    divided_rows = jax.shard_map(on_mesh, mesh=mesh, in_specs=specs, out_specs=jax.P())
    with jax.enable_x64(True):
        found = jax.jit(jax.grad(divided_rows))(weight, hidden, labels)
        assert_same_but_for_rounding(found, jax.grad(total), weight, hidden, labels)


def test_axes_of_rows() -> None:
    """Batch and sequence over two axes of a mesh, which also has one whose devices have the same rows."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "sequence", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    labels = np.array([[0, -100, 2, 1], [-100, -100, 3, 3]])
    both = partial(lsce_jax.mean_denominator, ignore_index=-100, axis_name=("data", "sequence"))
    of_mesh = jax.shard_map(both, mesh=mesh, in_specs=jax.P("data", "sequence"), out_specs=jax.P())
    assert int(of_mesh(labels)) == int((labels >= 0).sum())


# --- Other meshes ---------------------------------------------------------------------------------------------------


def test_rows_and_classes_divided() -> None:
    """Classes over four devices, rows over two: each loss is that of one device, with a common denominator."""
    mesh = jax.make_mesh((2, 4), ("data", AXIS), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    logits, labels = np.tile(LOGITS, (2, 1)), np.tile(LABELS, 2)
    where = np.arange(10) != 3

    def mean(local_logits: jax.Array, labels: jax.Array, where: jax.Array) -> jax.Array:
        denominator = lsce_jax.mean_denominator(labels, where=where, axis_name="data")
        loss = sharded(local_logits, labels, axis_name=AXIS, where=where, reduction="mean", denominator=denominator)
        return jax.lax.psum(loss, "data")

    rows = jax.P("data")
    specs = (jax.P("data", AXIS), rows, rows)
    both = jax.jit(jax.value_and_grad(jax.shard_map(mean, mesh=mesh, in_specs=specs, out_specs=jax.P())))
    of_one = jax.value_and_grad(partial(dense, labels=labels, where=where, reduction="mean"))
    for ours, theirs in zip(both(logits, labels, where), of_one(logits), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_classes_over_two_axes_and_rows_left_to_the_compiler() -> None:
    """An axis may be a tuple of axes, and shard_map may leave others of the mesh to the compiler."""
    mesh = jax.make_mesh((2, 2, 2), ("rows", "a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    loss = jax.shard_map(
        lambda z: sharded(z, LABELS, axis_name=("a", "b")),
        mesh=mesh,
        in_specs=jax.P(None, ("a", "b")),
        out_specs=jax.P(),
        axis_names={"a", "b"},
    )
    np.testing.assert_allclose(jax.jit(loss)(LOGITS), dense(LOGITS, LABELS), rtol=1e-6)


def test_statistics_come_from_all_devices() -> None:
    _, stats = jax.jit(divided(sharded_with_stats, DEVICES))(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    _, expected = lsce_jax.label_smoothed_cross_entropy_with_stats(LOGITS, LABELS)
    assert isinstance(stats, LossStats)
    assert stats.prediction.tolist() == expected.prediction.tolist()


def test_a_bad_label_is_named_under_checkify() -> None:
    loss = divided(partial(sharded, bad_labels="raise"), DEVICES)
    checked = jax.jit(jax.experimental.checkify.checkify(loss))
    outcome, losses = checked(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    outcome.throw()
    assert losses.shape == (ROWS,)
    outcome, _ = checked(jnp.asarray(LOGITS), jnp.asarray([0, 1, 16, 0, 2]))
    assert "label 16 at index 2" in outcome.get()
    assert "expected 0 to 15" in outcome.get()
