"""Losses of `lsce_jax`, compiled for TPUs and GPUs by their own compilers: every implementation, option and dtype.

A program depends on the options of a case, and on the shapes and dtypes of its arrays, but not on values. So one case
of each combination of options is compiled for every device, in bfloat16, by the fast implementations. A few cases,
which have every option between them, are compiled in the other dtypes as well, by the reference, and with statistics.
All other programs are marked as slow. That a program compiles shows that the compiler accepts it; what it costs is held
below.
"""

import os
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lsce_cost.devices import CARDS, TOPOLOGIES, has_cuda_plugin, has_libtpu
from lsce_jax import (
    label_smoothed_cross_entropy,
    label_smoothed_cross_entropy_with_stats,
    linear_label_smoothed_cross_entropy,
)
from lsce_spec import IMPLEMENTATIONS, LINEAR_IMPLEMENTATIONS
from parity_tests.losses.adapters import JaxAdapter, UnavailableError
from parity_tests.losses.compiled import (
    REMEDY,
    Compiler,
    Figures,
    NotCompiledError,
    StatisticsAdapter,
)
from parity_tests.losses.registry import make_adapter
from parity_tests.plugin import Recorder
from parity_tests.suite.programs import combination, result_bytes
from parity_tests.truth.cases import case_names, features
from parity_tests.truth.devices import DEVICES
from parity_tests.truth.linear_cases import linear_case_names, make_any_case

pytestmark = pytest.mark.devices
NEEDED = {
    "tpu": pytest.mark.skipif(not has_libtpu(), reason=f"libtpu is not installed; {REMEDY}"),
    "gpu": pytest.mark.skipif(not has_cuda_plugin(), reason=f"JAX's plugin for CUDA is not installed; {REMEDY}"),
}
FAMILIES = {"tpu": "tpu", "gpu": "cuda"}  # as evidence has them
DTYPES = {"tpu": ("bfloat16", "float32", "float16"), "gpu": ("bfloat16", "float32", "float16", "float64")}
DENSE = [f"jax-{implementation}" for implementation in IMPLEMENTATIONS]
LINEAR = [f"jax-linear-{implementation}" for implementation in LINEAR_IMPLEMENTATIONS]
EVERY_DEVICE = (*TOPOLOGIES, *CARDS)
# These have every option between them.
FEW = {
    "everything",
    "class_mask_max_sup",
    "class_mask_of_rows",
    "soft_clamp",
    "linear_everything",
    "linear_max_sup",
    "linear_class_mask_of_rows",
}


def on(device: str, *program: Any, slow: bool = False) -> Any:
    """Return the parameters of a test that needs the compiler of a device."""
    return pytest.param(device, *program, marks=[NEEDED[device[:3]], *([pytest.mark.slow] if slow else [])])


def programs(names: list[str], adapters: list[str]) -> list[Any]:
    """Return the parameters of every program. Marked as slow are those whose options and dtype others have too."""
    first = {combination(name): name for name in reversed(names)}
    quick = {(adapters[0], name, "bfloat16") for name in first.values()}
    return [
        on(device, adapter, name, dtype, slow=name not in FEW and (adapter, name, dtype) not in quick)
        for device in EVERY_DEVICE
        for adapter in adapters
        for name in names
        for dtype in DTYPES[device[:3]]
    ]


@lru_cache
def compiled(device: str, adapter: str, name: str, dtype: str) -> Figures:
    return Compiler(device).compile(partial(make_adapter, adapter), make_any_case(name, dtype))


@pytest.mark.parametrize(
    ("device", "adapter", "name", "dtype"), programs(case_names(), DENSE) + programs(linear_case_names(), LINEAR)
)
def test_loss_and_gradients_compile(device: str, adapter: str, name: str, dtype: str, parity_ledger: Recorder) -> None:
    parity_ledger.record(adapter, FAMILIES[device[:3]], dtype, "compiled", device)
    assert compiled(device, adapter, name, dtype).output_bytes >= result_bytes(make_any_case(name, dtype))


@pytest.mark.parametrize("adapter", DENSE + LINEAR)
@pytest.mark.parametrize(
    ("device", "dtype"), [on(device, dtype) for device in EVERY_DEVICE for dtype in DTYPES[device[:3]]]
)
def test_statistics_compile(device: str, adapter: str, dtype: str, parity_ledger: Recorder) -> None:
    parity_ledger.record(adapter, FAMILIES[device[:3]], dtype, "compiled", device)
    name = "linear_everything" if adapter in LINEAR else "everything"
    implementation = adapter.rpartition("-")[2]
    make = partial(StatisticsAdapter, linear=adapter in LINEAR, implementation=implementation, name=adapter)
    figures = Compiler(device).compile(make, make_any_case(name, dtype))
    assert figures.output_bytes > compiled(device, adapter, name, dtype).output_bytes


def test_every_device_of_the_table_has_its_compiler() -> None:
    assert set(EVERY_DEVICE) == {device.name for device in DEVICES} - {"cpu"}


def test_the_few_cases_have_every_option() -> None:
    for names in (case_names(), linear_case_names()):
        some = frozenset[str]().union(*(features(make_any_case(name, "float32")) for name in FEW & set(names)))
        every = frozenset[str]().union(*(features(make_any_case(name, "float32")) for name in names))
        # Shapes of operands and kinds of labels, which the first case of each combination has.
        assert every - some <= {"axis", "no batch", "narrow labels", "bad labels", "prior", "clamp convention"}


# --- Memory and traffic ---------------------------------------------------------------------------------------------

# Below some 67 MB the compiler copies logits into the memory of the core, and counts that as traffic.
ROWS, CLASSES = 8192, 32768
LOGITS, LABELS = ((ROWS, CLASSES), "bfloat16"), ((ROWS,), "int32")
LOGITS_BYTES = 2 * ROWS * CLASSES
# What a loss may keep or move beside whole logits. On TPUs: 64 numbers in float32 for each row, which has 32768 logits.
# On GPUs the row is summed in parts of 256 logits: 8 sums in float32 for each part.
ROWS_BYTES = {"tpu": 64 * 4 * ROWS, "gpu": 8 * 4 * (CLASSES // 256) * ROWS}
MASK = np.arange(CLASSES) % 8 > 0


# What XLA makes of the fused loss. The kernel, which is chosen on TPUs, is held in test_compiled_kernels.py.
FUSED: dict[str, Any] = {"reduction": "mean", "implementation": "fused"}


def ours(logits: Any, labels: Any, **options: Any) -> Any:
    return jax.value_and_grad(label_smoothed_cross_entropy)(logits, labels, **FUSED, **options)


def with_statistics(logits: Any, labels: Any) -> Any:
    loss = jax.value_and_grad(label_smoothed_cross_entropy_with_stats, has_aux=True)
    return loss(logits, labels, **FUSED)


def of_one_hot_targets(logits: Any, labels: Any) -> Any:
    """Return Optax's smoothed loss, which reads the logits once more."""

    def loss(logits: Any) -> Any:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, CLASSES), 0.1)
        return optax.softmax_cross_entropy(logits, targets).mean()

    return jax.value_and_grad(loss)(logits)


def of_gathered_logits(logits: Any, labels: Any) -> Any:
    """Return a loss that takes the labels' logits from float32 logits, which the compiler therefore writes out."""

    def loss(logits: Any) -> Any:
        logits = logits.astype(jnp.float32)
        at_label = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        return (jax.nn.logsumexp(logits, axis=-1) - 0.9 * at_label - 0.1 * logits.mean(axis=-1)).mean()

    return jax.value_and_grad(loss)(logits)


def assert_lean(device: str, figures: Figures, sweeps: int = 4) -> None:
    """Hold memory and traffic: nothing as large as the logits is kept, which are read and written `sweeps` times."""
    beside = ROWS_BYTES[device[:3]]
    assert figures.output_bytes >= LOGITS_BYTES
    assert figures.temp_bytes <= beside
    assert figures.accessed_bytes is not None
    # Sums of parts are written and read.
    assert 2 * LOGITS_BYTES <= figures.accessed_bytes <= sweeps * LOGITS_BYTES + 2 * beside


@pytest.mark.parametrize("loss", [ours, with_statistics])
@pytest.mark.parametrize("device", [on(device) for device in EVERY_DEVICE])
def test_nothing_as_large_as_the_logits_is_kept(device: str, loss: Callable[..., Any]) -> None:
    """Three reads and one write: the largest logit, the sums, and the gradient."""
    assert_lean(device, Compiler(device).compile_function(loss, LOGITS, LABELS))


# How often whole logits are read and written. Soft labels are as large, and read twice. Gathers of the classes' weights
# and mask count a little more.
OTHERS: dict[str, tuple[dict[str, Any], int]] = {
    "softcap": ({"softcap": 30.0}, 4),
    "max_sup": ({"convention": "max_sup"}, 4),
    "soft labels": ({}, 6),
    "class mask": ({"class_mask": MASK, "softcap": 30.0}, 5),
    "class mask, ignored rows": ({"class_mask": MASK, "ignore_index": 0}, 5),
    "class mask, ignored rows, softcap": ({"class_mask": MASK, "ignore_index": 0, "softcap": 30.0}, 5),
}


def assert_lean_with(device: str, name: str) -> None:
    options, sweeps = OTHERS[name]
    labels = LOGITS if name == "soft labels" else LABELS
    assert_lean(device, Compiler(device).compile_function(partial(ours, **options), LOGITS, labels), sweeps)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        on(device, name, slow=device in TOPOLOGIES)
        for device in EVERY_DEVICE
        for name in OTHERS
        if not (device == "tpu-v7x" and "ignored" in name)
    ],
)
def test_nor_with_other_options(device: str, name: str) -> None:
    assert_lean_with(device, name)


@pytest.mark.xfail(strict=True, reason="for a v7x logits are read twice more, or a byte is kept for each")
@pytest.mark.parametrize(("device", "name"), [on("tpu-v7x", name, slow=True) for name in OTHERS if "ignored" in name])
def test_masked_logits_of_ignored_rows(device: str, name: str) -> None:
    assert_lean_with(device, name)


@pytest.mark.parametrize(
    ("device", "loss"),
    [on(device, of_one_hot_targets) for device in TOPOLOGIES]
    + [on(device, of_gathered_logits) for device in EVERY_DEVICE],
)
def test_wasteful_losses_are_rejected(device: str, loss: Callable[..., Any]) -> None:
    figures = Compiler(device).compile_function(loss, LOGITS, LABELS)
    with pytest.raises(AssertionError):
        assert_lean(device, figures)


# Of one chunk, of all rows, and of the gradient with respect to the weight, in float32.
FEATURES, CHUNK = 256, 2048
CHUNK_BYTES, ALL_BYTES, WEIGHT_BYTES = 4 * CHUNK * CLASSES, 4 * ROWS * CLASSES, 4 * FEATURES * CLASSES
LAYER = (((ROWS, FEATURES), "bfloat16"), ((FEATURES, CLASSES), "bfloat16"), LABELS)


def of_layer(hidden: Any, weight: Any, labels: Any, **options: Any) -> Any:
    loss = jax.value_and_grad(linear_label_smoothed_cross_entropy, argnums=(0, 1))
    return loss(hidden, weight, labels, reduction="mean", **options)


def assert_in_chunks(figures: Figures) -> None:
    """Hold memory: the gradients in float32, and of the logits those of a chunk, at most thrice."""
    assert figures.temp_bytes <= WEIGHT_BYTES + 4 * ROWS * FEATURES + 3 * CHUNK_BYTES < ALL_BYTES


@pytest.mark.parametrize("device", [on(device, slow=device != "tpu-v5e") for device in TOPOLOGIES])
def test_the_linear_loss_keeps_the_logits_of_a_chunk(device: str) -> None:
    compiler = Compiler(device)
    assert_in_chunks(compiler.compile_function(partial(of_layer, chunk_size=CHUNK), *LAYER))
    with pytest.raises(AssertionError):
        assert_in_chunks(compiler.compile_function(partial(of_layer, implementation="reference"), *LAYER))


# --- What a compiler refuses ----------------------------------------------------------------------------------------


def broken(logits: Any, labels: Any, **options: Any) -> Any:
    raise ValueError("no such option")


def ends_the_process(logits: Any, labels: Any) -> Any:
    os._exit(1)


@NEEDED["tpu"]
def test_a_program_that_does_not_fit_the_device_is_refused() -> None:
    shape = (2**18, 2**18)
    with pytest.raises(
        NotCompiledError, match=r"not compiled for tpu-v5e: ours: .*RESOURCE_EXHAUSTED.*Ran out of memory"
    ):
        Compiler("tpu-v5e").compile_function(ours, (shape, "bfloat16"), (shape[:1], "int32"))


@NEEDED["tpu"]
def test_an_adapter_that_does_not_compile_is_named() -> None:
    make = partial(JaxAdapter, broken, name="jax-broken")
    reason = "not compiled for tpu-v6e: jax-broken, everything in float32: ValueError: no such option"
    with pytest.raises(NotCompiledError, match=reason):
        Compiler("tpu-v6e").compile(make, make_any_case("everything", "float32"))


@NEEDED["tpu"]
def test_a_compiler_that_ends_its_process_is_started_again() -> None:
    compiler = Compiler("tpu-v5e")
    small = ((8, 128), "float32"), ((8,), "int32")
    with pytest.raises(NotCompiledError, match="not compiled for tpu-v5e: the process of the compiler ended"):
        compiler.compile_function(ends_the_process, *small)
    assert compiler.compile_function(ours, *small).output_bytes >= 4 * 8 * 128


@pytest.mark.parametrize(
    ("device", "module", "missing"),
    [("tpu-v5e", "libtpu", "libtpu"), ("gpu-h100", "jax_plugins", "JAX's plugin for CUDA")],
)
def test_without_the_compiler(device: str, module: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = [name for name in sys.modules if name.startswith(f"{module}.")]  # JAX loads the plugin if it finds one
    for name in [module, *loaded]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnavailableError, match=f"{missing} is not installed; make test-compiled"):
        Compiler(device)
