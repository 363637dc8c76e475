"""`lsce_cost` with the compilers of TPUs and GPUs: counts that are known, XLA's own, and published times.

tests/test_aot.py has what needs no compiler.
"""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from typer.testing import CliRunner

from lsce_cost import hlo
from lsce_cost.__main__ import app
from lsce_cost.compilers import CompilerProcess, describe_devices
from lsce_cost.cost import Cost, Request, measure, program
from lsce_cost.devices import CARDS, ENVIRONMENTS, LIMITS, TOPOLOGIES, has_cuda_plugin, has_libtpu
from lsce_cost.published import LEAST, MOST, PUBLISHED, WAY, Published
from parity_tests.losses.compiled import REMEDY

pytestmark = pytest.mark.devices
NEEDED = {
    "tpu": pytest.mark.skipif(not has_libtpu(), reason=f"libtpu is not installed; {REMEDY}"),
    "gpu": pytest.mark.skipif(not has_cuda_plugin(), reason=f"JAX's plugin for CUDA is not installed; {REMEDY}"),
}
PROCESSES = {family: CompilerProcess(ENVIRONMENTS[family]) for family in NEEDED}


def on(target: str, *others: Any) -> Any:
    return pytest.param(target, *others, marks=NEEDED[target[:3]])


# Above what XLA copies into the memory of a core.
ROWS, CLASSES, ROUNDS = 8192, 32768, 5
SIZE = 2 * ROWS * CLASSES


def compiled_text(target: str, function: Callable[..., Any], *arguments: tuple[tuple[int, ...], str]) -> str:
    """Return XLA's text of a function, in the process of the compiler."""
    describe: Any = jax.ShapeDtypeStruct
    sharding = jax.sharding.SingleDeviceSharding(describe_devices(target)[0])
    described = [describe(shape, dtype, sharding=sharding) for shape, dtype in arguments]
    text: str = jax.jit(function).lower(*described).compile().as_text()
    return text


def count(target: str, function: Callable[..., Any], *arguments: tuple[tuple[int, ...], str]) -> hlo.Program:
    return hlo.parse(PROCESSES[target[:3]].call(compiled_text, target, function, *arguments))


# --- Bytes that are known -------------------------------------------------------------------------------------------


def add_one(array: Any) -> Any:
    return array + 1


def add_ones(array: Any) -> Any:
    """Return the array after rounds that XLA cannot put together. The argument is copied, since it must be kept."""
    return jax.lax.fori_loop(0, ROUNDS, lambda _, each: jnp.sin(each), array)


def sums_of_parts(array: Any) -> Any:
    """Return the sum of each eighth, each taken out in a loop."""
    return jax.lax.map(lambda part: part.sum(dtype=jnp.float32), array.reshape(8, -1, CLASSES))


def two_reads(array: Any) -> Any:
    """Return what needs the array once more after the sums of all rows."""
    return array - array.max(axis=1, keepdims=True)


# Of the array, what each reads and writes.
KNOWN = {add_one: 2, add_ones: 2 + 2 * ROUNDS, sums_of_parts: 1, two_reads: 3}


@pytest.mark.parametrize(
    ("target", "function"),
    [on(target, function) for target in ("tpu-v5e", "tpu-v6e", "gpu-h100") for function in KNOWN],
)
def test_bytes_of_programs_that_are_known(target: str, function: Callable[..., Any]) -> None:
    counted = count(target, function, ((ROWS, CLASSES), "bfloat16")).hbm_bytes
    # Beside the array: numbers of rows, and partial sums, on GPUs one for each 256 elements.
    beside = 8 * ROWS * CLASSES // 256
    assert KNOWN[function] * SIZE <= counted <= KNOWN[function] * SIZE + beside
    # A count that is one sweep off is seen.
    assert beside < SIZE


@pytest.mark.parametrize("target", [on(target) for target in LIMITS])
def test_bytes_of_the_loss(target: str) -> None:
    """Three reads and a write, as docs/performance.md has them; Optax's one-hot loss moves more on TPUs."""
    cost = measured(target, "lsce fused")
    assert cost.hbm_bytes is not None
    sweeps = 4
    # On GPUs 8 sums of 256 logits each, written and read.
    beside = 2 * 8 * 4 * (CLASSES // 256) * ROWS
    assert sweeps * SIZE <= cost.hbm_bytes <= sweeps * SIZE + beside
    if target in TOPOLOGIES:
        one_hot = measured(target, "Optax one-hot, smoothed")
        assert one_hot.hbm_bytes is not None
        assert one_hot.hbm_bytes >= 5 * SIZE


@pytest.mark.parametrize("target", [on("tpu-v5e"), on("tpu-v6e")])
def test_bytes_of_the_linear_loss(target: str) -> None:
    """Logits computed twice, by tiles that stay in the core's memory, beside all logits computed once."""
    whole, by_tiles = (
        measure(Request(target, 8192, 131072, 2048), name, with_bundles=False)
        for name in ("lsce fused", "lsce linear, recompute")
    )
    assert whole.hbm_bytes is not None
    assert whole.temp_bytes is not None
    assert by_tiles.hbm_bytes is not None
    assert by_tiles.temp_bytes is not None
    assert by_tiles.hbm_bytes <= 1.3 * whole.hbm_bytes
    assert by_tiles.temp_bytes <= 0.1 * whole.temp_bytes


@lru_cache
def measured(target: str, name: str) -> Cost:
    return measure(Request(target, ROWS, CLASSES), name)


# --- XLA's own count ------------------------------------------------------------------------------------------------

# How far the counts may be apart: XLA takes a gather of a number of each row for more. Other programs: 0.0001.
APART, APART_OTHERS = 0.012, 0.0001


def both_counts(request: Request, name: str) -> tuple[hlo.Program, float]:
    step, operands = program(request, request.ways[name])
    compiled = step.lower(*operands).compile()
    return hlo.parse(compiled.as_text()), compiled.cost_analysis()["bytes accessed"]


@pytest.mark.parametrize("name", Request("tpu-v6e", ROWS, CLASSES).ways)
@pytest.mark.parametrize("target", [on(target) for target in TOPOLOGIES])
def test_the_count_is_that_of_xla(target: str, name: str) -> None:
    ours, theirs = PROCESSES["tpu"].call(both_counts, Request(target, ROWS, CLASSES), name)
    assert abs(ours.bytes_as_xla_counts() / theirs - 1) <= (APART if "integer" in name else APART_OTHERS)


def sums_by_chunks(hidden: Any, weight: Any) -> Any:
    """Return the log-sum-exp of each row's logits, from an eighth of the rows at a time."""

    def of_chunk(rows: Any) -> Any:
        return jax.nn.logsumexp(jnp.matmul(rows, weight, preferred_element_type=jnp.float32), axis=1)

    return jax.lax.map(of_chunk, hidden.reshape(8, -1, hidden.shape[1]))


def both_counts_by_chunks(target: str, features: int) -> tuple[hlo.Program, float]:
    describe: Any = jax.ShapeDtypeStruct
    sharding = jax.sharding.SingleDeviceSharding(describe_devices(target)[0])
    shapes = (ROWS, features), (features, CLASSES)
    compiled = (
        jax.jit(sums_by_chunks).lower(*(describe(each, "bfloat16", sharding=sharding) for each in shapes)).compile()
    )
    return hlo.parse(compiled.as_text()), compiled.cost_analysis()["bytes accessed"]


@NEEDED["tpu"]
def test_the_count_is_that_of_xla_but_for_loops() -> None:
    ours, theirs = PROCESSES["tpu"].call(both_counts_by_chunks, "tpu-v6e", 2048)
    # XLA takes the write of a chunk's results for one of all rows' numbers.
    assert abs(ours.bytes_as_xla_counts() - theirs) <= 3 * 4 * ROWS
    # XLA takes the eight rounds for one. Each reads the weight, and writes and reads the logits of its rows.
    of_round = 2 * 2048 * CLASSES + 2 * 4 * 1024 * CLASSES
    assert 8 * of_round <= ours.hbm_bytes <= 8 * of_round + 3 * 2 * ROWS * 2048
    assert ours.hbm_bytes > 6 * theirs
    assert ours.matrix_operations == {"bfloat16": 2 * ROWS * 2048 * CLASSES}


# --- Kernels --------------------------------------------------------------------------------------------------------


def doubled(estimate: bool, array: Any) -> Any:
    def kernel(source: Any, target: Any) -> None:
        target[...] = 2 * source[...]

    block = pl.BlockSpec((256, 1024), lambda i, j: (i, j))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(array.shape, array.dtype),
        grid=(array.shape[0] // 256, array.shape[1] // 1024),
        in_specs=[block],
        out_specs=block,
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=12345678) if estimate else None,
    )(array)


def doubled_with_estimate(array: Any) -> Any:
    return doubled(True, array)


def doubled_without(array: Any) -> Any:
    return doubled(False, array)


@NEEDED["tpu"]
def test_a_kernel_says_itself_what_it_moves() -> None:
    logits = ((ROWS, CLASSES), "bfloat16")
    assert count("tpu-v6e", doubled_with_estimate, logits).hbm_bytes == 12345678
    assert count("tpu-v6e", doubled_without, logits).hbm_bytes == 2 * SIZE


# --- Bundles --------------------------------------------------------------------------------------------------------


@NEEDED["tpu"]
def test_bundles() -> None:
    whole, half = measured("tpu-v5e", "lsce fused"), measured("tpu-v5p", "lsce fused")
    assert whole.bundles is not None
    assert half.bundles is not None
    assert whole.kernels_without_bundles == half.kernels_without_bundles == 0
    # Of a v5p two cores are one device, and each has half of the rows.
    assert 0.4 * whole.bundles < half.bundles < 0.6 * whole.bundles
    # A gather waits in a loop that ends when it has all it asked for.
    assert measured("tpu-v5e", "Optax integer, unsmoothed").kernels_without_bundles == 1
    without = measure(Request("tpu-v5e", ROWS, CLASSES), "lsce fused", with_bundles=False)
    assert without.bundles is None
    assert without.hbm_bytes == whole.hbm_bytes


# --- Several devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [on("tpu-v6e"), on("tpu-v4"), on("gpu-h100")])
def test_over_several_devices(target: str) -> None:
    by_rows = measure(Request(target, ROWS, CLASSES, mesh=(4, 1)), "lsce fused", with_bundles=False)
    by_classes = measure(Request(target, ROWS, CLASSES, mesh=(1, 4)), "lsce fused", with_bundles=False)
    for cost in (by_rows, by_classes):
        assert cost.compiles
        assert cost.output_bytes is not None
        assert SIZE // 4 <= cost.output_bytes < SIZE // 2
    # Rows are independent but for their mean. Of classes, each device has four sums and the largest logit of each row.
    (of_rows,) = by_rows.collectives
    assert (of_rows.kind, of_rows.bytes, of_rows.sent) == ("all-reduce", 4, 6.0)
    (of_classes,) = by_classes.collectives
    assert of_classes.kind == "all-reduce"
    assert 4 * ROWS * 2 <= of_classes.bytes <= 4 * ROWS * 6
    assert of_classes.sent == 1.5 * of_classes.bytes
    assert by_classes.roofline is not None
    assert by_classes.roofline.links == of_classes.sent / LIMITS[target].links


@NEEDED["tpu"]
def test_a_layer_over_several_devices() -> None:
    request = Request("tpu-v6e", 2048, 16384, 256, mesh=(2, 2), chunks=(512,))
    cost = measure(request, "lsce linear, 512 rows at a time", with_bundles=False)
    assert cost.matrix_operations == {"bfloat16": 3 * 2 * 2048 * 256 * 16384 // 4}
    # The gradient of the weight is a sum over the rows, and that of hidden one over the classes.
    assert sum(each.bytes for each in cost.collectives) >= 2 * (256 * 16384 // 2 + 256 * 2048 // 2)


# --- What does not fit ----------------------------------------------------------------------------------------------


@NEEDED["tpu"]
def test_what_does_not_fit_a_tpu_is_refused_by_its_compiler() -> None:
    cost = measure(Request("tpu-v5e", 2**18, 2**18), "lsce fused")
    assert (cost.compiles, cost.fits, cost.roofline_seconds) == (False, False, None)
    assert cost.reason is not None
    assert cost.reason.startswith("out of memory: needs ")
    assert cost.reason.endswith("G of 15.75G HBM")


@NEEDED["gpu"]
def test_what_does_not_fit_a_gpu_compiles() -> None:
    cost = measure(Request("gpu-h100", 2**18, 2**18), "lsce fused")
    assert (cost.compiles, cost.fits) == (True, False)


# --- Published times ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "published",
    [
        pytest.param(each, marks=[NEEDED[each.target[:3]], *([] if each.target in CARDS else [pytest.mark.slow])])
        for each in PUBLISHED
        if each.of_xla
    ],
    ids=str,
)
def test_published_times_are_as_far_from_estimates_as_is_said(published: Published) -> None:
    estimate = measure(published.request, WAY).roofline_seconds
    assert estimate is not None
    assert LEAST <= round(published.milliseconds / (1e3 * estimate), 1) <= MOST


# --- The command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [on("tpu-v5e"), on("gpu-h100")])
def test_the_command(target: str, tmp_path: Path) -> None:
    files = {"--json": tmp_path / "costs.json", "--plot": tmp_path / "costs.png"}
    arguments = ["--target", target, "--rows", "8192", "--classes", "32768", "--way", "lsce*"]
    result = CliRunner().invoke(app, [*arguments, *(str(part) for pair in files.items() for part in pair)])
    assert result.exit_code == 0, result.output
    assert f"loss and gradient of bfloat16 logits, 8192 x 32768, on {target}" in result.stdout
    content = json.loads(files["--json"].read_text(encoding="utf-8"))
    ways = {way["name"]: way for way in content["ways"]}
    assert {"lsce fused", "lsce reference"} <= ways.keys()
    fused = ways["lsce fused"]
    assert fused["compiles"]
    assert fused["fits"]
    assert fused["output_bytes"] >= SIZE
    assert fused["roofline_seconds"] >= fused["hbm_bytes"] / LIMITS[target].bandwidth
    assert files["--plot"].read_bytes().startswith(b"\x89PNG")
