"""Simulated arithmetic: as large errors as the table allows and no larger, in the operations of JAX and torch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lsce_jax import accurate as of_jax
from lsce_torch import accurate as of_torch
from parity_tests.losses.adapters import JaxAdapter, TorchAdapter
from parity_tests.losses.registry import FaultyAdapter, make_adapter
from parity_tests.losses.simulated import (
    CannotSimulateError,
    SimulatedAdapter,
    farthest,
    results_on,
    simulate,
    simulated_device,
)
from parity_tests.losses.simulated_jax import SimulatedDevice
from parity_tests.losses.simulated_torch import on_device
from parity_tests.losses.user_losses import load_adapter
from parity_tests.meta.running import invoke
from parity_tests.truth.arithmetic import Arithmetic, any_order, tree_depth
from parity_tests.truth.cases import make_case
from parity_tests.truth.comparison import Result, against_oracle
from parity_tests.truth.devices import DEVICES, OWN_LOG1P, Device, device_of_name
from parity_tests.truth.oracle import solve
from parity_tests.truth.simulation import EXACT, PATTERNS, Simulation

Array = np.ndarray[Any, Any]

ROUGH = Arithmetic(exp=100, log=200, log1p=300, tanh=400, division=500, matmul_bits=8, depth=any_order)
U = 2.0**-24
TPUS = [device.name for device in DEVICES if device.family == "tpu"]


def simulation(pattern: str | None = "up", arithmetic: Arithmetic = ROUGH, flushes: bool = True) -> Simulation:
    return Simulation(arithmetic, flushes, pattern)


def numbers(count: int = 2000) -> Array:
    generator = np.random.default_rng(0)
    return np.exp(generator.uniform(-20, 3, count)).astype(np.float32)


def error(values: Array, exact: Array) -> Array:
    """Return relative errors, in units of the roundoff of float32; above 0 where a value is too large in size."""
    return np.asarray((values.astype(np.float64) - exact) / exact / U)


# --- Elementary functions ---------------------------------------------------------------------------------------------

APPLIED: dict[str, Callable[[Simulation, Array], tuple[Array, Array]]] = {
    "exp": lambda on, x: (on.apply("exp", -x), np.exp(-x.astype(np.float64))),
    "log": lambda on, x: (on.apply("log", x), np.log(x.astype(np.float64))),
    "log1p": lambda on, x: (on.apply("log1p", x), np.log1p(x.astype(np.float64))),
    "tanh": lambda on, x: (on.apply("tanh", x), np.tanh(x.astype(np.float64))),
    "division": lambda on, x: (on.divide(np.ones_like(x), x), 1 / x.astype(np.float64)),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", APPLIED)
def test_errors_reach_the_limit_and_do_not_pass_it(name: str, pattern: str) -> None:
    errors = error(*APPLIED[name](simulation(pattern), numbers()))
    limit = getattr(ROUGH, name)
    assert limit - 2 < np.max(np.abs(errors)) <= limit
    if pattern in ("up", "down"):
        assert np.all((errors > 0) == (pattern == "up"))
    elif pattern == "random":
        assert 0.4 < np.mean(errors > 0) < 0.6
    else:  # neighbours err alike
        in_order = errors[np.argsort(numbers())]
        assert np.median(np.abs(np.diff(in_order))) < limit / 10


@pytest.mark.parametrize("name", APPLIED)
def test_without_a_pattern_every_function_is_rounded_correctly(name: str) -> None:
    assert np.max(np.abs(error(*APPLIED[name](simulation(None), numbers())))) <= 1


def test_equal_operands_have_equal_errors() -> None:
    for pattern in PATTERNS:
        twice = simulation(pattern).apply("exp", np.float32([-0.7, -0.3, -0.7]))
        assert twice[0] == twice[2]


def test_functions_at_their_fixed_points_are_exact() -> None:
    for pattern in PATTERNS:
        on, zero, one = simulation(pattern), np.zeros(1, np.float32), np.ones(1, np.float32)
        assert (on.apply("exp", zero), on.apply("log1p", zero), on.apply("tanh", zero), on.apply("log", one)) == (
            1,
            0,
            0,
            0,
        )


def test_infinities_and_nan_are_what_they_are() -> None:
    values = np.float32([np.inf, -np.inf, np.nan])
    for pattern in PATTERNS:
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(simulation(pattern).apply("exp", values), np.float32([np.inf, 0, np.nan]))
            np.testing.assert_array_equal(
                simulation(pattern).divide(np.float32([1] * 3), values), np.float32([0, 0, np.nan])
            )


def test_the_most_accurate_version_is_within_its_own_limit() -> None:
    x = -numbers()
    errors = error(simulation().apply("exp", x, highest=True), np.exp(x.astype(np.float64)))
    assert 2 < np.max(np.abs(errors)) <= 3


def test_narrow_numbers_are_computed_in_float32() -> None:
    x = np.asarray([-0.5, -1.25], ml_dtypes.bfloat16)
    found = simulation().apply("exp", x)
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found, simulation().apply("exp", x.astype(np.float32)).astype(ml_dtypes.bfloat16))


def test_subnormal_numbers_are_flushed_where_the_device_does() -> None:
    tiny = np.float32([1e-39, -1e-39, 1e-37])
    np.testing.assert_array_equal(simulation().flush(tiny), np.float32([0, 0, 1e-37]))
    np.testing.assert_array_equal(simulation(flushes=False).flush(tiny), tiny)
    assert simulation().apply("exp", np.float32([-90.0])) == 0
    assert simulation().sum(np.float32([2e-38, -1.5e-38]), [0]) == 0
    half = np.asarray([1e-7], np.float16)
    assert simulation().flush(half) == half


# --- Sums and products ------------------------------------------------------------------------------------------------


def test_sums_are_as_deep_as_the_device_may_make_them() -> None:
    """1 and many terms of half its spacing: one after another none of them counts."""
    terms = np.float32([1] + [U] * 4096)
    deep, in_blocks = (
        simulation(arithmetic=Arithmetic(depth=depth)).sum(terms, [0]) for depth in (any_order, tree_depth)
    )
    assert deep == 1
    assert deep < in_blocks < 1 + 4096 * U
    assert simulation("down", Arithmetic(depth=any_order)).sum(terms, [0]) == np.float32(1 + 4096 * U)


@pytest.mark.parametrize("pattern", [None, *PATTERNS])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (5, 37), (2, 3, 70)])
def test_a_sum_has_every_term_once(pattern: str | None, shape: tuple[int, ...]) -> None:
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    for axes in ([0], [len(shape) - 1], list(range(len(shape)))):
        np.testing.assert_array_equal(simulation(pattern).sum(values, axes), values.sum(tuple(axes)))


@pytest.mark.parametrize(
    ("bits", "kept"), [(8, 1 + 2**-7), (11, 1 + 2**-7 + 2**-10), (24, 1 + 2**-7 + 2**-10 + 2**-13)]
)
def test_products_keep_as_many_bits_of_their_operands_as_the_device(bits: int, kept: float) -> None:
    value = np.float32([[1 + 2**-7 + 2**-10 + 2**-13]])
    assert simulation(arithmetic=Arithmetic(matmul_bits=bits)).matmul(value, np.float32([[1]])) == kept


def test_products_of_narrow_operands_are_exact_products() -> None:
    first, second = np.asarray([[1.5, 2]], ml_dtypes.bfloat16), np.asarray([[3], [0.0078125]], ml_dtypes.bfloat16)
    assert simulation().matmul(first, second, np.dtype(np.float32)) == 4.515625


# --- Programs of JAX --------------------------------------------------------------------------------------------------


def scanned(x: Any) -> Any:
    total, steps = jax.lax.scan(lambda carry, row: (carry + row, carry * row), jnp.zeros(3), x)
    return total, steps, jax.lax.scan(lambda carry, row: (carry + row, carry), jnp.zeros(3), x, reverse=True)[1]


def scanned_with_constants(x: Any) -> Any:
    scale = jnp.asarray(x)[0] * 2

    def body(carry: Any, row: Any) -> Any:
        return carry * scale + row, (carry, row.sum())

    return jax.lax.scan(body, jnp.ones(3), x), jax.lax.scan(body, jnp.ones(3), x[:0]), jax.lax.scan(body, scale, x[:1])


def looped(x: Any) -> Any:
    return jax.lax.while_loop(lambda carry: carry[0] < 3, lambda carry: (carry[0] + 1, carry[1] * x), (0, x))


def chosen(x: Any) -> Any:
    return jax.lax.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, x), jax.lax.switch(
        2, [jnp.cos, jnp.sin, jnp.abs], x
    )


def products(x: Any) -> Any:
    batched = jnp.einsum("bij,bjk->bik", jnp.stack([x, 2 * x]), jnp.stack([x.T, x.T]))
    return x @ x.T, batched, jnp.tensordot(x, x, axes=2), jax.vmap(jnp.dot)(x, x)


def moved(x: Any) -> Any:
    labels = jnp.array([2, 0, 1, 1])
    taken = jnp.take_along_axis(x, labels[:, None], axis=1)
    return (
        taken,
        jnp.argmax(x, axis=1),
        jnp.where(x > 0, x, -x),
        x.astype(jnp.int32),
        jnp.sort(x),
        jnp.asarray(x).at[0].add(1.0),
        -x[::2],
    )


def softmaxes(x: Any) -> Any:
    return jax.nn.log_softmax(x), jax.nn.sigmoid(x), jnp.logaddexp(x, -x), jax.grad(jax.nn.logsumexp)(x)


@pytest.mark.parametrize("function", [scanned, scanned_with_constants, looped, chosen, products, moved, softmaxes])
def test_a_program_without_errors_computes_what_jax_does(function: Callable[..., Any]) -> None:
    x = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    found = SimulatedDevice("tpu", EXACT).run(jax.make_jaxpr(function)(x), [x])
    for ours, theirs in zip(found, jax.tree.leaves(function(x)), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_program_takes_the_branch_of_its_platform() -> None:
    def function(x: Any) -> Any:
        return jax.lax.platform_dependent(x, tpu=lambda x: x + 1, cuda=lambda x: x + 2, default=lambda x: x)

    program = jax.make_jaxpr(function)(1.0)
    assert [SimulatedDevice(each, EXACT).run(program, [1.0])[0] for each in ("tpu", "cuda", "cpu")] == [2, 3, 1]


def test_products_of_jax_keep_more_bits_if_asked() -> None:
    value = np.float32([[1 + 2**-7 + 2**-10 + 2**-22]])
    kept = {}
    for precision in ("default", "high", "highest"):
        program = jax.make_jaxpr(lambda x, precision=precision: jnp.matmul(x, jnp.ones((1, 1)), precision=precision))(
            value
        )
        kept[precision] = SimulatedDevice("tpu", simulation()).run(program, [value])[0].item() - 1
    assert kept == {"default": 2**-7, "high": 2**-7 + 2**-10, "highest": 2**-7 + 2**-10 + 2**-22}


def test_jax_may_ask_for_the_most_accurate_version() -> None:
    x = -numbers()
    program = jax.make_jaxpr(lambda x: jax.lax.exp(x, accuracy=jax.lax.AccuracyMode.HIGHEST))(x)
    (found,) = SimulatedDevice("tpu", simulation()).run(program, [x])
    assert np.max(np.abs(error(found, np.exp(x.astype(np.float64))))) <= 3


# --- Operations of torch ----------------------------------------------------------------------------------------------


def in_place(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    work = x.clone()
    out = torch.empty_like(x)
    torch.softmax(work, -1, out=out)
    returned = work.mul_(0.5).exp_()
    assert returned is work
    return work, out, torch.sum(x, dim=0, out=torch.empty(3)), work[1:].log_()


def kernels(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    labels = torch.tensor([2, 0, 1, 1])
    losses = F.cross_entropy(x, labels, reduction="none"), F.cross_entropy(x, labels, label_smoothing=0.1)
    others = F.binary_cross_entropy_with_logits(x, x.sigmoid()), F.softplus(x), F.logsigmoid(x), torch.logaddexp(x, -x)
    return (*losses, *others, x.logsumexp(0), torch.special.entr(x.exp()), x.mean(), x.mean(1, keepdim=True), 1 / x)


def matrices(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    batch = torch.stack([x, 2 * x])
    return (
        F.linear(x, x),
        F.linear(x, x, x[:, 0]),
        batch @ batch.mT,
        x @ x[0],
        x[0] @ x[1],
        torch.baddbmm(batch @ batch.mT, batch, batch.mT),
    )


@pytest.mark.parametrize("function", [in_place, kernels, matrices])
def test_operations_without_errors_compute_what_torch_does(function: Callable[..., Any]) -> None:
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32))
    with on_device("cuda", EXACT):
        found = function(x)
    for ours, theirs in zip(found, function(x), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "exact", "limit"),
    [
        (lambda x: x.exp(), np.exp, 100),
        (lambda x: x.clone().exp_(), np.exp, 100),
        (lambda x: torch.exp(x, out=torch.empty_like(x)), np.exp, 100),
        (lambda x: x.softmax(-1), lambda x: np.exp(x) / np.exp(x).sum(), 100 + 100 + 64 + 500),
        (lambda x: 3 / x, lambda x: 3 / x, 501),  # the product with the reciprocal
        (lambda x: x.reciprocal(), lambda x: 1 / x, 500),
        (lambda x: x.clone().div_(3.0), lambda x: x / 3, 500),
    ],
)
def test_operations_of_torch_have_the_errors(function: Any, exact: Any, limit: float) -> None:
    x = torch.from_numpy(numbers(64))
    with on_device("tpu", simulation()):
        found = function(x).numpy()
    largest = np.max(np.abs(error(found, exact(x.double().numpy()))))
    assert limit / 30 < largest <= limit


@pytest.mark.parametrize(("flushes", "kept"), [(True, 0), (False, 2)])
def test_operations_of_torch_flush_subnormal_numbers_where_the_device_does(flushes: bool, kept: int) -> None:
    with on_device("tpu", simulation(None, flushes=flushes)):
        product = torch.tensor([1e-20]) * 1e-19
        in_place = torch.tensor([1e-20]).mul_(1e-19)
        view = torch.tensor([1.0])[:]
    assert ((product != 0) + (in_place != 0).int()).item() == kept
    assert view == 1


def test_backward_has_the_errors_too() -> None:
    x = torch.from_numpy(numbers(64)).requires_grad_()
    with on_device("tpu", simulation()):
        x.exp().sum().backward()
    assert np.max(error(x.grad.numpy(), np.exp(x.detach().double().numpy()))) > 90  # type: ignore[union-attr]


def test_torch_takes_the_way_of_the_device() -> None:
    """On a CPU plain smoothing is log-softmax; on a GPU the sweeps, in place; on a TPU plain operations."""
    seen = {}
    for device_type in ("cpu", "cuda", "tpu"):
        with on_device(device_type, EXACT), torch.profiler.profile() as profile:
            make_adapter("torch-fused")(make_case("uniform_mean", "float32"))
        seen[device_type] = {event.key for event in profile.key_averages()}
    assert "aten::_log_softmax" in seen["cpu"]
    assert "aten::frac_" in seen["cuda"]
    assert not {"aten::frac_", "aten::_log_softmax"} & seen["tpu"]
    assert "aten::bitwise_and" in seen["tpu"]  # log1p from basic operations


# --- log1p and quotients of the packages ------------------------------------------------------------------------------


def own_results(name: str, device: Device, on: Simulation, x: Array, numerator: Array) -> tuple[Array, Array]:
    """Return log1p(x) and numerator / x as a package computes them on a device."""
    if name == "torch":
        with on_device(device.family, on):
            return of_torch.log1p(torch.from_numpy(x)).numpy(), of_torch.divide(
                torch.from_numpy(numerator), torch.from_numpy(x)
            ).numpy()
    simulated = SimulatedDevice(device.family, on)
    (log1p,) = simulated.run(jax.make_jaxpr(of_jax.log1p)(x), [x])
    (quotient,) = simulated.run(jax.make_jaxpr(of_jax.divide)(numerator, x), [numerator, x])
    return log1p, quotient


@pytest.mark.parametrize("name", ["jax", "torch"])
@pytest.mark.parametrize("tpu", TPUS)
def test_log1p_and_quotients_are_accurate_on_every_tpu(tpu: str, name: str) -> None:
    generator = np.random.default_rng(2)
    special = [1, 1 + 2**-23, 1 - 2**-24, 2, 3, 7, 2.0**20, 2.0**-60]
    x = np.concatenate([np.exp(generator.uniform(-60, 15, 20_000)), special]).astype(np.float32)
    numerator = generator.normal(size=x.size).astype(np.float32)
    device = device_of_name(tpu, name)
    for pattern in PATTERNS:
        on = Simulation(device.arithmetic, flushes=True, pattern=pattern)
        log1p, quotient = own_results(name, device, on, x, numerator)
        assert np.max(np.abs(error(log1p, np.log1p(x.astype(np.float64))))) <= 2.2 < OWN_LOG1P
        assert np.max(np.abs(error(quotient, numerator.astype(np.float64) / x))) <= 4
    rough = Simulation(device.arithmetic, flushes=True, pattern="up").apply("log1p", x)
    assert np.max(np.abs(error(rough, np.log1p(x.astype(np.float64))))) > 1000


@pytest.mark.parametrize("name", ["jax", "torch"])
def test_log1p_of_special_values(name: str) -> None:
    device = device_of_name("tpu-v5e", name)
    x = np.float32([0, np.inf, np.nan])
    with np.errstate(all="ignore"):
        log1p, quotient = own_results(name, device, simulation(), x, np.float32([0, 1, 1]))
    np.testing.assert_array_equal(log1p, x)
    np.testing.assert_array_equal(quotient, np.float32([np.nan, 0, np.nan]))


def test_derivatives_of_the_primitives_are_those_of_the_functions() -> None:
    x, b = jnp.array([0.25, 3.0]), jnp.array([2.0, -0.5])

    def ours(x: Any, b: Any) -> Any:
        return (of_jax.log1p(x) * of_jax.divide(x, b)).sum()

    def theirs(x: Any, b: Any) -> Any:
        return (jnp.log1p(x) * (x / b)).sum()

    for transform in (jax.grad, jax.hessian, jax.jacfwd):
        for ours_of, theirs_of in zip(
            *(jax.tree.leaves(transform(each, argnums=(0, 1))(x, b)) for each in (ours, theirs)), strict=True
        ):
            np.testing.assert_allclose(ours_of, theirs_of, rtol=1e-6)
    mapped = jax.vmap(of_jax.divide, in_axes=(0, None))(x, jnp.float32(2))
    np.testing.assert_array_equal(mapped, x / 2)


# --- Adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["tpu-v5e", "gpu-h100"])
@pytest.mark.parametrize(
    "name", ["jax-fused", "torch-fused", "jax-optax-integer", "torch-cross-entropy", "numpy", "oracle"]
)
def test_losses_are_within_the_bounds_of_the_device(name: str, device: str) -> None:
    case = make_case("smoothing_0_uniform", "float32")
    adapter = simulate(make_adapter(name), device)
    comparison = against_oracle(case, solve(case), adapter(case), adapter.arithmetic)
    assert comparison.agrees, comparison


def test_errors_of_a_device_are_beyond_the_bounds_of_a_cpu() -> None:
    case = make_case("uniform_mean", "float32")
    result = simulate(make_adapter("jax-fused"), "tpu-v5e")(case)
    assert not against_oracle(case, solve(case), result, JaxAdapter().arithmetic).agrees


@pytest.mark.parametrize("device", sorted({device.name for device in DEVICES}))
def test_a_wrong_loss_is_rejected_on_every_device(device: str) -> None:
    case = make_case("uniform_mean", "float32")
    adapter = simulate(FaultyAdapter("other_off"), device)
    assert not against_oracle(case, solve(case), adapter(case), adapter.arithmetic).agrees


def test_the_farthest_result_is_taken_for_each_element() -> None:
    def result(*values: float) -> Result:
        return Result(np.array(values), np.zeros((3, 1)), "float32", "float32")

    found = farthest([result(1, 2, np.inf), result(1.5, 1, np.inf), result(1.25, np.nan, 3)])
    np.testing.assert_array_equal(found.parts["loss"], [1.5, np.nan, 3])


def test_results_are_those_of_each_pattern() -> None:
    seen = []

    def program(platform: str, on: Simulation) -> Any:
        seen.append((platform, on.pattern, on.flushes))
        return None

    results_on(device_of_name("tpu-v5e", "jax"), program)
    assert seen == [("tpu", pattern, True) for pattern in (None, *PATTERNS)]


def test_what_cannot_be_simulated_says_why() -> None:
    with pytest.raises(CannotSimulateError, match="runs what JAX has lowered already"):
        simulate(make_adapter("jax-fused-tpu-interpreted"), "tpu-v5e")
    with pytest.raises(CannotSimulateError, match="it is compiled"):
        simulate(make_adapter("torch-fused-compiled"), "gpu-h100")
    with pytest.raises(ValueError, match="no device 'tpu-v9'"):
        simulate(make_adapter("jax-fused"), "tpu-v9")
    adapter = simulate(make_adapter("jax-fused"), "tpu-v5e")
    assert "has no float64" in str(adapter.unsupported(make_case("uniform_mean", "float64")))


def test_only_our_losses_may_use_the_accuracy_of_our_log1p() -> None:
    """A loss of the user's takes the device's own log1p."""
    ours, peer = make_adapter("jax-fused"), make_adapter("jax-optax-integer")
    users = load_adapter("torch:torch.nn.functional:cross_entropy", {})
    limits = [simulate(each, "tpu-v5e").arithmetic.log1p for each in (ours, peer, users)]
    assert limits == [OWN_LOG1P, 8068, 8068]
    assert simulate(ours, "gpu-h100").arithmetic.log1p == 3
    assert simulate(TorchAdapter(), "tpu-v6e").arithmetic.log1p == OWN_LOG1P


def test_the_device_of_a_simulated_adapter_is_known() -> None:
    names = ("jax-fused", "torch-cross-entropy", "numpy")
    assert [simulated_device(simulate(make_adapter(name), "tpu-v5e")) for name in names] == ["tpu-v5e"] * 3
    assert simulated_device(make_adapter("jax-fused")) is None
    assert isinstance(simulate(make_adapter("numpy"), "cpu"), SimulatedAdapter)


# --- Commands ---------------------------------------------------------------------------------------------------------

ONE_CASE = ("--case", "uniform_mean", "--dtype", "float32")


def test_run_simulates_a_device(tmp_path: Any) -> None:
    model = ("--device-model", "tpu-v5e")
    right = invoke("run", *model, "--adapter", "jax-fused", "--adapter", "torch-fused", *ONE_CASE)
    assert right.exit_code == 0
    assert "2 adapters, 2 results, 1 of them in pairs" in " ".join(right.output.split())
    wrong = invoke("run", *model, "--adapter", "mutant:other_off", *ONE_CASE)
    assert wrong.exit_code == 1


@pytest.mark.parametrize("command", ["run", "hunt", "compare"])
def test_commands_say_what_cannot_be_simulated(command: str) -> None:
    sides = ("jax-fused", "oracle") if command == "compare" else ("--adapter", "jax-fused")
    unknown = invoke(command, *sides, "--device-model", "tpu-v9")
    assert (unknown.exit_code, "there is no device 'tpu-v9'" in unknown.output) == (2, True)
    both = invoke(command, *sides, "--device-model", "tpu-v5e", "--device", "cuda")
    assert (both.exit_code, "leave out --device cuda" in both.output) == (2, True)


@pytest.mark.slow
def test_hunt_simulates_a_device() -> None:
    found = invoke(
        "hunt", "--adapter", "jax-fused", "--dtype", "bfloat16", "--examples", "5", "--device-model", "tpu-v6e"
    )
    assert (found.exit_code, "AGREE" in found.output) == (0, True)


@pytest.mark.slow
def test_compare_simulates_losses_of_the_user() -> None:
    """Two conventions, which differ by far more than a TPU's errors."""
    right = ("torch:torch.nn:CrossEntropyLoss", "oracle", "--a", "label_smoothing=0.1", "--device-model", "tpu-v5e")
    assert invoke("compare", *right).exit_code == 0
    assert invoke("compare", *right, "--convention", "non_target").exit_code == 1
