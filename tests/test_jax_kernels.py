"""When the Pallas kernel is used: what chooses it, what it refuses, and what programs for each platform hold."""

import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from lsce_jax import LabelSmoothedCrossEntropyLoss, label_smoothed_cross_entropy, linear_label_smoothed_cross_entropy
from lsce_jax.kernels import losses, tpu

MANY = (512, 8192)
LABELS = jnp.zeros(512, jnp.int32)
KERNEL = "tpu_custom_call"


def program(
    platform: str, shape: tuple[int, ...] = MANY, dtype: Any = jnp.bfloat16, labels: Any = None, **options: Any
) -> str:
    """Return the program of loss and gradient for a platform."""
    options = {"reduction": "mean", **options}

    def loss(logits: jax.Array) -> jax.Array:
        return label_smoothed_cross_entropy(logits, LABELS if labels is None else labels, **options).sum()

    logits = jax.ShapeDtypeStruct(shape, dtype)
    return jax.export.export(jax.jit(jax.value_and_grad(loss)), platforms=[platform])(logits).mlir_module()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_programs_for_tpus_have_the_kernel(reduction: str, dtype: Any) -> None:
    text = program("tpu", dtype=dtype, reduction=reduction)
    assert text.count(f"@{KERNEL}(") == 2  # forward and backward


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm"])
def test_programs_for_others_do_not(platform: str) -> None:
    text = program(platform)
    assert KERNEL not in text


# What keeps a call from the kernel where nobody asked for it.
NOT_CHOSEN: dict[str, dict[str, Any]] = {
    "few classes": {"shape": (4096, 4096), "labels": jnp.zeros(4096, jnp.int32)},
    "few logits": {"shape": (64, 8192), "labels": jnp.zeros(64, jnp.int32)},
    "rows that TPUs do not keep together": {"shape": (128, 5, 8192), "labels": jnp.zeros((128, 5), jnp.int32)},
    "the classes elsewhere": {"shape": (8192, 512), "axis": 0},
    "float16": {"dtype": jnp.float16},
    "soft labels": {"labels": jnp.ones(MANY) / MANY[1]},
    "too many classes": {"shape": (16, 2**19), "labels": jnp.zeros(16, jnp.int32)},
    "another implementation": {"implementation": "fused"},
}


@pytest.mark.parametrize("name", NOT_CHOSEN)
def test_not_chosen(name: str) -> None:
    assert KERNEL not in program("tpu", **NOT_CHOSEN[name])


# The same, where the kernel cannot compute the call at all.
REFUSED = {
    "float16": "logits are float16, and the kernel takes float32 and bfloat16",
    "soft labels": "labels are class probabilities, and the kernel takes class indices",
    "too many classes": r"8 rows of 524288 classes in bfloat16 do not fit the 16 MiB of a core's VMEM",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"implementation='pallas' cannot compute this call: {REFUSED[name]}. Leave out"
    ):
        program("tpu", **NOT_CHOSEN[name], implementation="pallas")


@pytest.mark.parametrize("name", ["few classes", "few logits", "rows that TPUs do not keep together"])
def test_forced(name: str) -> None:
    assert KERNEL in program("tpu", **NOT_CHOSEN[name], implementation="pallas")


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits have the shape \[0, 8192\], and no rows"):
        program("tpu", (0, 8192), labels=jnp.zeros(0, jnp.int32), implementation="pallas")


def test_forced_on_another_platform() -> None:
    with pytest.raises(ValueError, match=r"it runs on TPUs, and on others inside .*force_tpu_interpret_mode"):
        label_smoothed_cross_entropy(jnp.zeros((4, 10)), jnp.zeros(4, jnp.int32), implementation="pallas")


def test_the_module_takes_it() -> None:
    loss = LabelSmoothedCrossEntropyLoss(implementation="pallas")
    with pltpu.force_tpu_interpret_mode():
        assert loss(jnp.zeros((4, 10)), jnp.zeros(4, jnp.int32)).shape == (4,)


def test_the_linear_loss_does_not_know_it() -> None:
    with pytest.raises(ValueError, match="unknown implementation 'pallas'"):
        linear_label_smoothed_cross_entropy(
            jnp.zeros((4, 3)), jnp.zeros((3, 10)), jnp.zeros(4, jnp.int32), implementation="pallas"
        )


def test_a_divided_program_has_no_kernel_but_in_shard_map() -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    by_row = jax.sharding.PartitionSpec("data")
    sharding = jax.sharding.NamedSharding(mesh, by_row)
    arguments = [
        jax.ShapeDtypeStruct((1024, 8192), jnp.bfloat16, sharding=sharding),
        jax.ShapeDtypeStruct((1024,), jnp.int32, sharding=sharding),
    ]

    def losses_of(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return label_smoothed_cross_entropy(logits, labels)

    manual = jax.shard_map(losses_of, mesh=mesh, in_specs=by_row, out_specs=by_row)
    for function, has_kernel in ((losses_of, False), (manual, True)):
        text = jax.export.export(jax.jit(function), platforms=["tpu"])(*arguments).mlir_module()
        assert (KERNEL in text) == has_kernel


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Return what the package logs for debugging."""
    messages: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger("lsce_jax"), Kept()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_the_log_says_what_was_chosen(log: list[str]) -> None:
    program("tpu")
    assert set(log) == {"dense loss on a TPU: the kernel"}
    log.clear()
    program("tpu", **NOT_CHOSEN["few logits"])
    assert log == ["dense loss: fused, since 64 rows of 8192 classes are few"]


def test_the_rows_of_a_step() -> None:
    """More classes leave memory for fewer rows, then for no exponentials, then for one gradient."""
    steps = [
        tpu.step_of(num_classes, jnp.bfloat16, tpu.Program(gradient=True))
        for num_classes in (32768, 65536, 114688, 131072, 200064, 262144, 400000)
    ]
    assert steps == [
        tpu.Step(32, True, True),
        tpu.Step(16, True, True),
        tpu.Step(16, False, True),
        tpu.Step(8, True, True),
        tpu.Step(8, False, True),
        tpu.Step(8, False, False),
        None,
    ]


def test_results_of_programs_that_are_not_for_tpus() -> None:
    """The primitives that become the kernel on TPUs compute what the fused implementation does, to the last bit."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=MANY), jnp.float32)

    def results(implementation: str | None) -> Any:
        def loss(logits: jax.Array) -> jax.Array:
            return label_smoothed_cross_entropy(logits, LABELS, reduction="mean", implementation=implementation)

        assert ("lsce_loss" in str(jax.make_jaxpr(loss)(logits))) == (implementation is None)
        return jax.jit(jax.value_and_grad(loss))(logits)

    for ours, fused in zip(results(None), results("fused"), strict=True):
        assert np.array_equal(ours, fused)


def test_names() -> None:
    assert losses.NAME == "pallas"
