"""The tiles of the linear loss on TPUs: their sizes, when they are chosen, and what no number can show."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

import lsce_jax
from lsce_cost.devices import LIMITS, TPU_KINDS
from lsce_jax import layer_sums, tiles
from lsce_jax.layer import LayerOperands
from lsce_spec import GAP_UNIT

LARGE = (8192, 2048, 131072)  # N, D, K
NAMES = ("hidden", "weight", "bias")


def operands_of(logits: Any, labels: Any, **given: Any) -> LayerOperands:
    """Return a layer whose bias is the logits, and rows of hidden 0, one for each label."""
    labels, bias = jnp.asarray(labels)[:, None], jnp.asarray(logits, jnp.float32)
    arrays: dict[str, Any] = dict.fromkeys(("counted", "class_mask", "prior", "class_weight"))
    options: dict[str, Any] = {
        "softcap": None,
        "prior_entropy": False,
        "largest": False,
        "stats": True,
        "skip": False,
    }
    hidden, weight = jnp.zeros((labels.size, 1, 2)), jnp.zeros((2, bias.size))
    return LayerOperands(hidden, weight, bias, labels, **arrays | options | given)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 rows and 4 classes."""
    for name, value in (("TILE_SIZE", 8), ("_LANES", 4), ("_SUBLANES", 1)):
        monkeypatch.setattr(tiles, name, value)


@pytest.mark.parametrize(
    "logits",
    [
        [-np.inf] * 4 + [1.0, 2.0, 0.0, 1.0, -np.inf],
        [1.0, 2.0, 0.0, 1.0] + [-np.inf] * 5,
        [-np.inf] * 9,
        [1.0, np.inf, 0.0, 0.0, 2.0, 3.0, np.inf, 1.0, 0.0],
        [1.0, 0.0, 0.0, 0.0, 2.0, np.nan, 2.0, 1.0, 0.0],
        [3e38, -3e38, 0.0, 0.0, 2.0, 1.0, 2.0, -3e38, 3e38],
        [2.0] * 9,
    ],
)
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}, {"largest": True}])
@pytest.mark.usefixtures("small_tiles")
def test_what_is_no_number_is_the_same(logits: list[float], options: dict[str, Any]) -> None:
    """NaN, infinities and the first of the largest logits are as in the plain formulas, in sums and cotangents."""
    operands = operands_of(logits, [0, 1, 5, 8], **options)
    by_tiles, plain = jax.jit(tiles.sums)(operands), jax.jit(layer_sums._sums)(operands)
    given = dict(enumerate(map(jnp.ones_like, jax.tree.leaves(plain[1]))))
    of_tiles = jax.jit(tiles.cotangents, static_argnames="names")(operands, by_tiles[0], given, names=NAMES)
    of_plain = jax.jit(layer_sums._plain_cotangents, static_argnames="names")(operands, plain[0], given, names=NAMES)
    has_largest = ~jnp.isnan(plain[1].rest)
    np.testing.assert_array_equal(by_tiles[0].first[has_largest], plain[0].first[has_largest])
    pairs = zip(jax.tree.leaves((by_tiles, of_tiles)), jax.tree.leaves((plain, of_plain)), strict=True)
    for ours, theirs in pairs:
        for kind in (jnp.isnan, jnp.isposinf, jnp.isneginf):
            np.testing.assert_array_equal(kind(ours), kind(theirs))


@pytest.mark.usefixtures("small_tiles")
def test_a_tile_of_minus_infinity_adds_nothing() -> None:
    after = [1.0, 2.0, 0.5, 1.0, 3.0]
    (peaks, sums), (expected_peaks, expected) = (
        jax.jit(tiles.sums)(operands_of(logits, [len(logits) - 1])) for logits in ([-np.inf] * 4 + after, after)
    )
    assert (peaks.peak, sums.rest, sums.label_gap) == (expected_peaks.peak, expected.rest, expected.label_gap)
    assert sums.other_gaps == np.inf


@pytest.mark.parametrize("logits", [[0.0] * 8 + [2.0**127], [2.0**127] + [0.0] * 8])
@pytest.mark.usefixtures("small_tiles")
def test_a_sum_of_differences_beyond_the_largest_number(logits: list[float]) -> None:
    """Also where they become so large with a later tile."""
    _, sums = jax.jit(tiles.sums)(operands_of(logits, [4]))
    assert sums.other_gaps * (GAP_UNIT / 2**127) == 7


@pytest.mark.usefixtures("small_tiles")
def test_rows_that_are_left_out_have_numbers() -> None:
    """Blocks without a row that counts are not computed; what they have must be finite."""
    counted = jnp.array([True, False, False, False, False, False, False])[:, None]
    operands = operands_of(np.arange(9), [0] * 7, counted=counted, skip=True, largest=True)
    peaks, sums = jax.jit(tiles.sums)(operands)
    assert all(jnp.isfinite(each).all() for each in jax.tree.leaves((peaks, sums)))
    given = {i: jnp.where(counted, 1.0, 0.0) for i in range(len(jax.tree.leaves(sums)))}
    results = jax.jit(tiles.cotangents, static_argnames="names")(operands, peaks, given, names=NAMES)
    assert all(jnp.isfinite(each).all() for each in jax.tree.leaves(results))


@pytest.mark.parametrize("num_rows", [1, 7, 1000, 8192, 8193, 100_000])
@pytest.mark.parametrize("num_classes", [1, 127, 128, 50257, 131072])
@pytest.mark.parametrize("chunk_rows", [1, 300, 1024])
def test_tiles_cover_everything_and_hold_no_more_logits_than_a_chunk(
    num_rows: int, num_classes: int, chunk_rows: int
) -> None:
    chunk_rows = min(chunk_rows, num_rows)
    num_chunks = -(-num_rows // chunk_rows)
    describe: Any = jax.ShapeDtypeStruct
    operands = LayerOperands(
        describe((chunk_rows, num_chunks, 64), jnp.bfloat16),
        describe((64, num_classes), jnp.bfloat16),
        *[None] * 6,
        *[None, False, False, False, False],
    )
    tiling = tiles._tiling(operands)
    assert tiling.num_blocks * tiling.block_rows >= tiling.num_rows == chunk_rows * num_chunks
    assert (tiling.num_blocks - 1) * tiling.block_rows < tiling.num_rows
    assert tiling.tile_classes % 128 == 0
    held = tiling.block_rows * min(tiling.tile_classes, num_classes)
    assert held <= max(min(tiles.TILE_SIZE, chunk_rows * num_classes), 8 * 128)


def on_a(kind: str, count: int = 1) -> Any:
    """Let programs be made for devices that are not there."""
    platform = {"platform": "tpu" if "TPU" in kind else "cuda"}  # JAX 0.10.0 has none
    has_platform = "platform" in inspect.signature(AbstractDevice).parameters
    device: Any = AbstractDevice(device_kind=kind, num_cores=1, **platform if has_platform else {})
    mesh = AbstractMesh((count,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize(
    ("kind", "recomputes"),
    [
        ("TPU v4", False),
        ("TPU v5 lite", False),
        ("TPU v5", False),
        ("TPU v6 lite", True),
        ("TPU7x", False),
        ("NVIDIA H100 80GB HBM3", False),
    ],
)
def test_what_is_chosen_on_a_device(kind: str, recomputes: bool) -> None:
    """A v6e has so many operations for each byte that it is faster to compute the logits again."""
    num_rows, num_features, num_classes = LARGE
    describe: Any = jax.ShapeDtypeStruct
    arrays = [describe((num_rows, num_features), jnp.bfloat16), describe((num_features, num_classes), jnp.bfloat16)]

    def program(**options: Any) -> str:
        def loss(hidden: Any, weight: Any, labels: Any) -> Any:
            return lsce_jax.linear_label_smoothed_cross_entropy(hidden, weight, labels, reduction="mean", **options)

        with on_a(kind):
            return str(jax.make_jaxpr(jax.grad(loss))(*arrays, describe((num_rows,), jnp.int32)))

    assert ("lsce_layer_cotangents" in program()) == recomputes
    assert "lsce_layer_cotangents" in program(recompute=True)
    assert "lsce_layer_cotangents" not in program(recompute=False)
    assert "lsce_layer_cotangents" not in program(gradient_filter=0.001)


def test_what_is_chosen_without_a_tpu() -> None:
    assert not tiles.saves_time(*LARGE, jnp.dtype(jnp.bfloat16), 1024)


def test_what_is_chosen_for_several_devices() -> None:
    """The compiler would have to divide the tiles, unless each device has a program of its own."""

    def chosen() -> bool:
        return tiles.saves_time(*LARGE, jnp.dtype(jnp.bfloat16), 1024)

    found = []

    def of_device(x: Any) -> Any:
        found.append(chosen())
        return x

    with on_a("TPU v6 lite", 4):
        found.append(chosen())
        mapped = jax.shard_map(of_device, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))
        describe: Any = jax.ShapeDtypeStruct
        jax.eval_shape(mapped, describe((4,), jnp.float32))
    assert found == [False, True]


def test_symbolic_sizes_have_no_tiles() -> None:
    """As jax.export makes them; for a TPU, too."""
    rows, classes = jax.export.symbolic_shape("n, k")
    describe: Any = jax.ShapeDtypeStruct
    arrays = [describe((rows, 8), jnp.float32), describe((8, classes), jnp.float32), describe((rows,), jnp.int32)]

    @jax.jit
    def step(hidden: Any, weight: Any, labels: Any) -> Any:
        def loss(*layer: Any) -> Any:
            return lsce_jax.linear_label_smoothed_cross_entropy(*layer, labels, recompute=True, reduction="mean")

        return jax.value_and_grad(loss, argnums=(0, 1))(hidden, weight)

    # To divide symbols into tiles raises an error.
    assert jax.export.export(step, platforms=["tpu"])(*arrays).platforms == ("tpu",)


def test_few_features_are_computed_again() -> None:
    """The fewer features, the less an operation costs beside the logits that it saves."""
    with on_a("TPU v5 lite"):
        chosen = [tiles.saves_time(8192, features, 131072, jnp.dtype(jnp.bfloat16), 1024) for features in (512, 4096)]
    assert chosen == [True, False]


@pytest.mark.parametrize("name", TPU_KINDS)
def test_the_speeds_are_those_of_the_table_of_devices(name: str) -> None:
    limits = LIMITS[name]
    products = {limits.matrix[dtype] for dtype in ("float32", "bfloat16", "float16")}
    assert {name: tiles.TPUS[name].kinds for name in tiles.TPUS} == TPU_KINDS
    assert (tiles.TPUS[name].bandwidth, {tiles.TPUS[name].products}) == (limits.bandwidth, products)
