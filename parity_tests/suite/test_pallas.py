"""The Pallas kernel for TPUs in Pallas's interpreter: named cases against the truth, and broken kernels, rejected.

One case of each combination of options is run in one of the two dtypes that the kernel takes. The others, and the other
dtype, are marked as slow.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lsce_jax import label_smoothed_cross_entropy
from lsce_jax.kernels import losses, tpu
from parity_tests.faults.dense import FAULTS
from parity_tests.losses.adapters import LossError, UnavailableError
from parity_tests.losses.pallas import DTYPES, PallasAdapter
from parity_tests.losses.registry import make_adapter
from parity_tests.plugin import Recorder
from parity_tests.studies.power import HARMLESS, HIDDEN_BY_ROUNDING, trials
from parity_tests.suite.jax_results import statistics_of
from parity_tests.suite.large_logits import assert_right_near_the_largest_number
from parity_tests.suite.stats_truth import assert_statistics
from parity_tests.suite.wrong_losses import WRONG_LOSSES
from parity_tests.truth.arithmetic import any_order
from parity_tests.truth.cases import Case, case_names, features, make_case, random_case
from parity_tests.truth.comparison import Comparison, against_oracle
from parity_tests.truth.oracle import solve

pytestmark = pytest.mark.devices
INTERPRETED = "jax-pallas-tpu-interpreted"
# These show every option that the kernel has.
FEW = ("everything", "bad_labels", "class_mask_max_sup", "minus_infinity", "ignored", "prior_distribution")
# What the kernel cannot compute; the fused implementation does.
REFUSED = {"has no soft labels", "has one class mask for all rows", "has no rows", "has no float16", "has no float64"}


def kind(name: str) -> tuple[Any, ...]:
    """Return what makes a case differ from others for the kernel: its options, and smoothing at either end."""
    case = make_case(name, "float32")
    end = case.smoothing if isinstance(case.smoothing, float) and case.smoothing in (0.0, 1.0) else None
    return features(case), end


def runs() -> list[Any]:
    """Return the cases and their dtypes."""
    first = {kind(name): name for name in reversed(case_names())}
    found = []
    for i, name in enumerate(case_names()):
        for j, dtype in enumerate(DTYPES):
            quick = name in FEW or (name in first.values() and i % 2 == j)
            found.append(pytest.param(name, dtype, marks=() if quick else pytest.mark.slow))
    return found


def compared(case: Case, adapter: Any = None) -> Comparison:
    adapter = adapter or make_adapter(INTERPRETED)
    return against_oracle(case, solve(case), adapter(case), adapter.arithmetic)


@pytest.mark.parametrize(("name", "dtype"), runs())
def test_dense(name: str, dtype: str, parity_ledger: Recorder) -> None:
    case = make_case(name, dtype)
    if reason := make_adapter(INTERPRETED).unsupported(case):
        assert reason in REFUSED
        return
    parity_ledger.record("jax-pallas", "tpu", dtype, "interpreted", "tpu by Pallas")
    comparison = compared(case)
    assert comparison.agrees, comparison


def test_logits_near_the_largest_number() -> None:
    assert_right_near_the_largest_number(make_adapter(INTERPRETED), copies=64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_as_on_a_tpu(dtype: str) -> None:
    """Several steps of 32 rows, of which the last is not full, and rounds of 32 vectors with some left over."""
    case = random_case(dtype, np.random.default_rng(0), 37, 8192 + 333, options={"reduction": "mean"})
    assert tpu.step_of(case.num_classes, dtype, tpu.Program(gradient=True)) == tpu.Step(32, True, True)
    comparison = compared(case, PallasAdapter(interpreted=True, small=False, name=INTERPRETED))
    assert comparison.agrees, comparison


@pytest.mark.parametrize("step", [tpu.Step(16, False, True), tpu.Step(8, False, False)])
def test_other_steps(step: tpu.Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without kept exponentials, and with one gradient at a time, as for many classes."""
    monkeypatch.setattr(tpu, "step_of", lambda *_: step)
    for name in ("everything", "classes_1009"):
        comparison = compared(make_case(name, "bfloat16"))
        assert comparison.agrees, comparison


@pytest.mark.parametrize("name", FEW)
def test_statistics(name: str) -> None:
    case = make_case(name, "float32")
    adapter = PallasAdapter(interpreted=True, name=INTERPRETED)
    with adapter.interpreter():
        loss, stats = statistics_of("pallas", case)
    assert_statistics(case, loss, stats, adapter.arithmetic)


def test_the_loss_alone() -> None:
    """The kernel without a gradient computes the same sums, to the last bit."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(9, 300)), jnp.float32)
    labels = jnp.arange(9) * 33

    def loss(logits: jax.Array) -> jax.Array:
        return label_smoothed_cross_entropy(logits, labels, reduction="sum", implementation="pallas")

    with PallasAdapter(interpreted=True).interpreter():
        assert jax.jit(loss)(logits) == jax.jit(jax.value_and_grad(loss))(logits)[0]


# --- Transforms -----------------------------------------------------------------------------------------------------


def scanned(logits: jax.Array, labels: jax.Array, **options: Any) -> jax.Array:
    of_step = partial(label_smoothed_cross_entropy, **options)
    result: jax.Array = jax.lax.scan(lambda _, x: (None, of_step(*x)), None, (logits[None], labels[None]))[1][0]
    return result


def test_in_a_scan() -> None:
    """More transforms, and around each other, are in tests/test_jax_transforms.py, where the kernel is not used."""
    adapter = PallasAdapter(interpreted=True, loss=scanned, name=INTERPRETED)
    comparison = compared(make_case("uniform_none", "float32"), adapter)
    assert comparison.agrees, comparison


# --- That it can fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_loss_is_rejected(dtype: str) -> None:
    case = make_case("uniform_mean", dtype)
    for loss in WRONG_LOSSES:
        adapter = PallasAdapter(interpreted=True, loss=loss, name="wrong")
        assert not compared(case, adapter).agrees


def _rows(**changed: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Return what changes numbers that the kernel gets for each row."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        whole = tpu.sums_and_gradient

        def changed_rows(program: Any, logits: Any, labels: Any, rows: tpu.Rows, factor: Any) -> Any:
            return whole(program, logits, labels, rows._replace(**{k: v(rows) for k, v in changed.items()}), factor)

        monkeypatch.setattr(tpu, "sums_and_gradient", changed_rows)

    return patch


def _program(**changed: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        whole = losses._program
        monkeypatch.setattr(losses, "_program", lambda *a, **k: replace(whole(*a, **k), **changed))

    return patch


def _label_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tpu.sums_and_gradient

    def wrong(program: Any, logits: Any, labels: Any, *others: Any) -> Any:
        return whole(program, logits, (labels + 1) % logits.shape[1], *others)

    monkeypatch.setattr(tpu, "sums_and_gradient", wrong)


def _padding_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tpu._Vectors.__call__
    monkeypatch.setattr(tpu._Vectors, "__call__", lambda self, start, last=False: whole(self, start))


def _last_vector_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tpu._sums

    def wrong(program: Any, vectors: Any, *others: Any) -> Any:
        vectors.num_classes -= vectors.num_classes % tpu.LANES
        return whole(program, vectors, *others)

    monkeypatch.setattr(tpu, "_sums", wrong)


def _maximum_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tpu._largest
    monkeypatch.setattr(tpu, "_largest", lambda vectors: 0 * whole(vectors))


def _one_added_and_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tpu._sums

    def wrong(*operands: Any) -> Any:
        sums = whole(*operands)
        # XLA does not see through it.
        return sums._replace(rest=jax.lax.reduce_precision(1.0 + sums.rest, 8, 23) - 1.0)

    monkeypatch.setattr(tpu, "_sums", wrong)


def _sums_of_the_row_before(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tpu._line
    monkeypatch.setattr(tpu, "_line", lambda vectors, column: whole(vectors, jnp.roll(column, 1, axis=0)))


def _no_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = losses._factor
    monkeypatch.setattr(losses, "_factor", lambda batch: jnp.ones_like(whole(batch)))


# What is wrong with a kernel, how to make it so, and a case that shows it.
BROKEN: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "the padding joins the softmax": (_padding_joins, "classes_1009"),
    "the last classes are left out of the sums": (_last_vector_dropped, "classes_1009"),
    "each label is the next class": (_label_off_by_one, "uniform_mean"),
    "the maximum is not subtracted": (_maximum_kept, "large_logits"),
    "small losses lose their digits": (_one_added_and_taken_away, "dominant"),
    "each row has the sums of the one before": (_sums_of_the_row_before, "uniform_none"),
    "the label has the gradient of other classes": (_rows(on=lambda rows: rows.off), "uniform_mean"),
    "the smoothing is missing in the gradient": (_rows(off=lambda rows: 0 * rows.off), "uniform_mean"),
    "the incoming gradient is ignored": (_rows(upstream=lambda rows: 0 * rows.upstream + 1), "classes_33"),
    "rows that do not count have a gradient": (_program(counted=False), "ignored"),
    "the z-loss is missing in the gradient": (_program(z_loss=0.0), "z_loss"),
    "the softcap is missing": (_program(softcap=None), "softcap"),
    "nothing is taken from the largest logits": (_rows(at_max=lambda rows: 0 * rows.at_max), "max_sup_sum"),
    "class weights are missing in the smoothing": (_no_factor, "class_weight"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_kernel_is_rejected(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, name = BROKEN[fault]
    case = make_case(name, "float32")
    assert compared(case).agrees
    break_it(monkeypatch)
    jax.clear_caches()
    agrees = compared(case).agrees
    jax.clear_caches()
    assert not agrees


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bounds_reject_every_wrong_loss(dtype: str) -> None:
    """The arithmetic that is assumed of the interpreted kernel, with sums in any order, hides no fault of the bank."""
    arithmetic = make_adapter(INTERPRETED).arithmetic
    assert arithmetic.depth is any_order
    for fault in FAULTS:
        if (fault, dtype) in HARMLESS | HIDDEN_BY_ROUNDING:
            continue
        (of_oracle,) = (trial for trial in trials(fault, dtype, arithmetic) if trial.assertion == "oracle")
        assert of_oracle.rejected, fault


@contextmanager
def racing() -> Iterator[None]:
    """Run a kernel that reads what a copy has not brought yet."""

    def kernel(source: Any, target: Any, scratch: Any, semaphore: Any) -> None:
        copy = pltpu.make_async_copy(source, scratch, semaphore)
        copy.start()
        target[...] = scratch[...]
        copy.wait()

    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    pl.pallas_call(
        kernel,
        out_shape=shape,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
    )(jnp.zeros((8, 128))).block_until_ready()
    yield


def test_races_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def races(logits: jax.Array, labels: jax.Array, **options: Any) -> jax.Array:
        loss = label_smoothed_cross_entropy(logits, labels, **options)
        with racing():
            return loss

    case = make_case("uniform_mean", "float32")
    adapter = PallasAdapter(interpreted=True, loss=races, jit=False, name="racing")
    with pytest.raises(LossError, match="the kernel's reads and writes race"):
        adapter(case)


def test_what_nobody_wrote_is_nan() -> None:
    def kernel(target: Any, scratch: Any) -> None:
        target[...] = scratch[...]

    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    with PallasAdapter(interpreted=True).interpreter():
        result = pl.pallas_call(kernel, out_shape=shape, scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32)])()
    assert np.all(np.isnan(result))


def test_on_a_cpu_the_kernel_itself_is_not_there() -> None:
    with pytest.raises(UnavailableError, match="it runs on TPUs, as with --device tpu; jax-pallas-tpu-interpreted is"):
        make_adapter("jax-pallas")
