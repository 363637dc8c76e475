r"""The sums over the classes of a linear layer and their cotangents on TPUs: some classes of some rows at a time.

A core of a TPU has memory of its own, 16 to 128 MiB, and XLA keeps an array there that is small enough. So the logits
of a tile, some rows and some classes, need never be written to the device's memory. A sweep over the tiles reads the
weight once. The classes are the outer loop: after all rows, the weight's gradient of these classes is complete, and is
written once, in the weight's dtype.

The gradient needs the sums of whole rows, and so a sweep of its own, with the logits computed again: 8 N D K operations
in all, where `chunked.py` has 6 if it computes the gradient with the loss. `saves_time` says where that pays.

The sums of a row are those of its tiles, relative to the largest logit so far. Let m be the largest logit and a the
sums of the tiles before, m' and b the same with this tile, then

    rest(m') = (1 + rest_a(m)) exp(m - m') + (sum_k exp(z_k - m') - 1)
    gaps(m') = gaps_a(m) + mass_a (m' - m) + gaps_b(m')

where the second sum is over the tile. Where m' = m, rest is rest_a plus that sum, without the 1. So one largest term is
left out exactly, and small losses keep their digits.
"""

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lsce_jax.inputs import compute_dtype
from lsce_jax.layer import Layer, LayerOperands, chunk_logits
from lsce_jax.row_sums import cotangents_of_sums
from lsce_jax.sums import (
    CLASS_VECTORS,
    NO_CLASS,
    Operands,
    Peaks,
    Sums,
    capped,
    counted_logits,
    in_gap_units,
    is_label,
    largest_logits,
    peaks_at,
    sums_at,
)

ByName = dict[str, Any]

# Logits of a tile: 64 MiB in float32. Compiled for v5e and v6e, larger ones are written to the device's memory, and
# smaller ones read `hidden` and write its gradient more often.
TILE_SIZE = 2**24
# Rows of a tile at most; where the rows that count come first, so that others can be left out, fewer.
MOST_ROWS, MOST_ROWS_TO_SKIP = 8192, 2048
_LANES = 128  # classes in a vector of a TPU
_SUBLANES = 8  # rows


class Tpu(NamedTuple):
    """The most that a TPU can do, as JAX counts them: of a v4 and a v7x that is half of a chip.

    Args:
        kinds: parts of what JAX calls it, in small letters.
        bandwidth: of its memory, bytes a second.
        products: operations a second in matrix products of up to float32, which is multiplied in one bfloat16 pass.
    """

    kinds: tuple[str, ...]
    bandwidth: float
    products: float


# The first that fits counts. Sources: `lsce_cost.devices`, which has the same numbers.
TPUS = {
    "tpu-v4": Tpu(("tpu v4",), 600e9, 137.5e12),
    "tpu-v5e": Tpu(("tpu v5 lite", "tpu v5e"), 819e9, 197e12),
    "tpu-v5p": Tpu(("tpu v5",), 2765e9, 459e12),
    "tpu-v6e": Tpu(("tpu v6",), 1638e9, 918e12),
    "tpu-v7x": Tpu(("tpu7", "tpu v7"), 3690e9, 1153.5e12),
}


class _Tiling(NamedTuple):
    """How rows and classes are divided."""

    num_rows: int
    num_blocks: int
    block_rows: int
    num_classes: int
    tile_classes: int

    def over_tiles(self, visit: Callable[[Any, int, Any], Any], carry: Any) -> Any:
        """Return what is carried from tile to tile: `visit` gets the first class, their number, and what is carried."""
        whole, rest = divmod(self.num_classes, self.tile_classes)
        if whole:
            carry = jax.lax.fori_loop(
                0, whole, lambda j, carry: visit(j * self.tile_classes, self.tile_classes, carry), carry
            )
        return visit(whole * self.tile_classes, rest, carry) if rest else carry

    def over_blocks(self, num_needed: int | Array, visit: Callable[[Any, Any], Any], carry: Any) -> Any:
        """Return what is carried from block to block: `visit` gets the first row, and what is carried."""
        return jax.lax.fori_loop(0, num_needed, lambda i, carry: visit(i * self.block_rows, carry), carry)

    def flat(self, array: Array, *, transposed: bool, fill: int = 0) -> Array:
        """Return [n, C, ...] as [rows, ...], filled up to whole blocks."""
        array = jnp.moveaxis(array, 1, 0) if transposed else array
        array = array.reshape(self.num_rows, *array.shape[2:])
        added = self.num_blocks * self.block_rows - self.num_rows
        return jnp.pad(array, ((0, added), *((0, 0) for _ in array.shape[1:])), constant_values=fill)

    def block(self, arrays: Any, first: Any) -> Any:
        """Return the rows of a block."""
        return jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, first, self.block_rows), arrays)


def _tiling(operands: LayerOperands) -> _Tiling:
    num_rows, num_classes = prod(operands.hidden.shape[:2]), operands.weight.shape[1]
    size = min(TILE_SIZE, max(operands.hidden.shape[0] * num_classes, _SUBLANES * _LANES))  # not more than a chunk has
    most = min(MOST_ROWS_TO_SKIP if operands.skip else MOST_ROWS, size // _LANES // _SUBLANES * _SUBLANES)
    num_blocks = -(-num_rows // most)
    block_rows = num_rows if num_blocks == 1 else _round_up(-(-num_rows // num_blocks), _SUBLANES)
    num_tiles = -(-num_classes // max(size // block_rows // _LANES * _LANES, _LANES))
    return _Tiling(num_rows, num_blocks, block_rows, num_classes, _round_up(-(-num_classes // num_tiles), _LANES))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class _Layer(NamedTuple):
    """Operands whose rows are in one dimension, in whole blocks."""

    operands: LayerOperands
    tiling: _Tiling
    num_needed: int | Array  # blocks

    def tile(self, first: Any, num_classes: int) -> LayerOperands:
        """Return the operands of some classes, whose labels count from the first of them."""
        operands = self.operands

        def of_classes(vector: Array | None) -> Array | None:
            if vector is None:
                return None
            return jax.lax.dynamic_slice_in_dim(vector, first, num_classes, axis=vector.ndim - 1)

        weight = jax.lax.dynamic_slice_in_dim(operands.weight, first, num_classes, axis=1)
        vectors: ByName = {name: of_classes(getattr(operands, name)) for name in ("bias", *CLASS_VECTORS)}
        dtype = operands.hidden.dtype
        return replace(operands, weight=weight.astype(dtype), labels=operands.labels - first, **vectors)

    def block(self, tile: LayerOperands, first: Any) -> tuple[LayerOperands, Operands]:
        """Return a block of rows of a tile, and what to sum over."""
        block = replace(tile, **self.tiling.block(tile.rows, first))
        return block, block.of_logits(chunk_logits(Layer(block.hidden, block.weight, block.bias)))


def _flatten(operands: LayerOperands) -> _Layer:
    tiling = _tiling(operands)
    counted = operands.counted
    if counted is None and tiling.num_blocks * tiling.block_rows > tiling.num_rows:
        counted = jnp.ones(operands.labels.shape, bool)
    rows = {name: array for name, array in (operands.rows | {"counted": counted}).items() if array is not None}
    rows = {
        name: tiling.flat(array, transposed=operands.skip, fill=name == "class_mask") for name, array in rows.items()
    }
    num_needed: int | Array = tiling.num_blocks
    if operands.skip:
        num_needed = -(-jnp.sum(rows["counted"], dtype=jnp.int32) // tiling.block_rows)
    return _Layer(replace(operands, **rows), tiling, num_needed)


def _in_chunks(array: Array, tiling: _Tiling, like: LayerOperands) -> Array:
    """Return rows in one dimension as they were, [n, C, ...]."""
    rows, chunks = like.labels.shape
    array = array[: tiling.num_rows]
    if like.skip:
        return jnp.moveaxis(array.reshape(chunks, rows, *array.shape[1:]), 0, 1)
    return array.reshape(rows, chunks, *array.shape[1:])


def saves_time(num_rows: int, num_features: int, num_classes: int, dtype: Any, chunk_rows: int) -> bool:
    """Return whether two sweeps over tiles take less time than the gradient computed with the loss, in chunks of rows.

    False where JAX has no TPU, and no mesh of one is set; and for programs that may be divided over devices, which have
    no tiles. The arguments are those of `least_seconds`.
    """
    tpu = _tpu_here()
    if tpu is None or dtype.name not in ("float32", "bfloat16", "float16") or _may_be_divided():
        return False
    by_chunks, by_tiles = least_seconds(tpu, num_rows, num_features, num_classes, dtype, chunk_rows)
    return by_tiles < by_chunks


def least_seconds(
    tpu: Tpu, num_rows: int, num_features: int, num_classes: int, dtype: Any, chunk_rows: int
) -> tuple[float, float]:
    """Return the least time of loss and gradient, with the gradient computed with the loss, and by tiles.

    Args:
        tpu: the device.
        num_rows: N.
        num_features: D.
        num_classes: K.
        dtype: of hidden and weight, up to float32.
        chunk_rows: rows of a chunk.

    Returns:
        Seconds of chunks and of tiles: the longer of operations by their peak and bytes by the bandwidth.

    Example:
        >>> times = least_seconds(TPUS["tpu-v6e"], 8192, 2048, 131072, jnp.dtype("bfloat16"), 1024)
        >>> [f"{1e3 * seconds:.1f} ms" for seconds in times]
        ['27.5 ms', '19.2 ms']
    """
    of_layer, of_logits, bytes_of = num_features * num_classes, num_rows * num_classes, dtype.itemsize

    def seconds(of_product: int, traffic: float) -> float:
        operations = of_product * of_logits * num_features
        return max(operations / tpu.products, traffic / tpu.bandwidth)

    # Each chunk reads the weight twice, and reads and writes the sum of its gradients. Its logits are written in
    # float32 and read twice; their gradient is written and read twice.
    num_chunks = -(-num_rows // chunk_rows)
    by_chunks = num_chunks * of_layer * (2 * bytes_of + 8) + of_logits * (12 + 3 * bytes_of)
    # The weight is read three times, its gradient is written. Each tile reads hidden three times, and reads and writes
    # the sum of its gradients.
    num_tiles = -(-of_logits // TILE_SIZE)
    block = min(num_rows, MOST_ROWS) * num_features
    by_tiles = 4 * of_layer * bytes_of + num_tiles * block * (3 * bytes_of + 8)
    return seconds(6, by_chunks), seconds(8, by_tiles)


def _tpu_here() -> Tpu | None:
    """Return the TPU that programs are made for, or None."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if described is None else described.device_kind
    return next((tpu for tpu in TPUS.values() if any(part in kind.lower() for part in tpu.kinds)), None)


def _may_be_divided() -> bool:
    """Return whether a compiler may divide the program over devices: not within a jax.shard_map over all axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() > 1
    return mesh.size > 1 and set(mesh.manual_axes) != set(mesh.axis_names)


# --- The sums ---------------------------------------------------------------------------------------------------------


class _Running(NamedTuple):
    """What is known of each row after some tiles."""

    peak: Array  # see `_peak`, of the largest logit so far
    largest: Array
    num_largest: Array | None
    first: Array | None
    label: Array  # the label's logit before the softcap, once it was there
    mass: Array  # sum of w over the classes other than the label
    sums: Sums  # relative to `peak`; of largest_gap and largest_mass the sums over the largest logits, not the means


def sums(operands: LayerOperands) -> tuple[Peaks, Sums]:
    """Return what `layer_sums.layer_sums` returns."""
    layer = _flatten(operands)
    tiling = layer.tiling

    def visit_tile(first: Any, num_classes: int, running: _Running) -> _Running:
        tile = layer.tile(first, num_classes)

        def visit_block(first_row: Any, running: _Running) -> _Running:
            old = tiling.block(running, first_row)
            new = _with_tile(old, layer.block(tile, first_row)[1], first)
            updated: _Running = jax.tree.map(
                lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, first_row, 0), running, new
            )
            return updated

        after: _Running = tiling.over_blocks(layer.num_needed, visit_block, running)
        return after

    finished = _finished(tiling.over_tiles(visit_tile, _nothing(layer.operands)), operands.softcap)
    results: tuple[Peaks, Sums] = jax.tree.map(lambda array: _in_chunks(array, tiling, operands), finished)
    if operands.skip:
        # Rows that were left out have no sums. With 1 no quotient of theirs is NaN.
        results = jax.tree.map(lambda array: jnp.where(jnp.asarray(operands.counted), array, 1), results)
    return results


def _nothing(operands: LayerOperands) -> _Running:
    zero = jnp.zeros(operands.labels.shape, compute_dtype(operands.hidden))
    return _Running(
        peak=zero,
        largest=jnp.full_like(zero, -jnp.inf),
        num_largest=zero if operands.largest else None,
        first=jnp.full_like(operands.labels, NO_CLASS) if operands.stats else None,
        label=zero,
        mass=zero,
        sums=Sums(
            rest=zero - 1,
            label_gap=zero,
            other_gaps=zero,
            other_mass=None if operands.prior is None and operands.class_weight is None else zero,
            other_prior=None if operands.prior is None or operands.class_weight is None else zero,
            other_entropy=zero if operands.prior_entropy else None,
            weighted_gaps=zero if operands.stats else None,
            largest_gap=zero if operands.largest else None,
            largest_mass=zero if operands.largest else None,
        ),
    )


def _with_tile(old: _Running, operands: Operands, first_class: Any) -> _Running:
    """Return what is known of a block's rows after one more tile, whose classes count from the first of them."""
    largest = jnp.maximum(old.largest, largest_logits(operands))
    rises, stays = largest > old.largest, largest == old.largest
    peak = _peak(largest, operands.softcap)
    at_label, (raw, allowed) = is_label(operands), counted_logits(operands)
    peaks = peaks_at(operands, largest, peak)
    # Not divided by their number yet.
    undivided = peaks._replace(num_largest=None if peaks.num_largest is None else jnp.ones_like(peak))
    added = sums_at(operands, undivided, at_label, without=rises.astype(peak.dtype))
    is_other = ~at_label if allowed is None else ~at_label & allowed
    mass = jnp.sum(is_other, axis=-1, dtype=peak.dtype) if added.other_mass is None else added.other_mass
    before = jnp.exp(jnp.where(capped(old.largest, operands.softcap) == -jnp.inf, -jnp.inf, old.peak - peak))

    def both(old: Array | None, added: Array | None) -> Array | None:
        return None if old is None or added is None else old + added

    def of_largest(old: Array | None, added: Array | None) -> Array | None:
        return both(None if old is None else jnp.where(stays, old, 0), added)

    sums, weighted_gaps, first = old.sums, None, None
    if sums.weighted_gaps is not None and added.weighted_gaps is not None:
        moved = before * (sums.weighted_gaps + (1 + sums.rest) * (peak - old.peak))
        weighted_gaps = jnp.where(stays, sums.weighted_gaps, moved) + added.weighted_gaps
    if old.first is not None and peaks.first is not None:
        found = jnp.where(peaks.first == NO_CLASS, NO_CLASS, peaks.first + first_class)
        first = jnp.where(rises, found, jnp.minimum(old.first, jnp.where(stays, found, NO_CLASS)))
    return _Running(
        peak=peak,
        largest=largest,
        num_largest=of_largest(old.num_largest, peaks.num_largest),
        first=first,
        label=old.label + jnp.sum(jnp.where(at_label, raw, 0), axis=-1),
        mass=old.mass + mass,
        sums=Sums(
            rest=jnp.where(stays, sums.rest, (1 + sums.rest) * before) + added.rest,
            label_gap=sums.label_gap,
            other_gaps=sums.other_gaps
            + jnp.where(stays, 0, old.mass * in_gap_units(peak - old.peak))
            + added.other_gaps,
            other_mass=both(sums.other_mass, added.other_mass),
            other_prior=both(sums.other_prior, added.other_prior),
            other_entropy=both(sums.other_entropy, added.other_entropy),
            weighted_gaps=weighted_gaps,
            largest_gap=of_largest(sums.largest_gap, added.largest_gap),
            largest_mass=of_largest(sums.largest_mass, added.largest_mass),
        ),
    )


def _peak(largest: Array, softcap: float | None) -> Array:
    """Return the largest logit after the softcap; 0 for -inf, so that differences are numbers."""
    peak = capped(largest, softcap)
    return jnp.where(peak == -jnp.inf, 0, peak)


def _finished(running: _Running, softcap: float | None) -> tuple[Peaks, Sums]:
    """Return peaks and sums, as the plain formulas have them."""
    sums, num_largest = running.sums, running.num_largest
    peak, label = capped(running.largest, softcap), capped(running.label, softcap)

    def mean(total: Array | None) -> Array | None:
        return None if total is None or num_largest is None else total / num_largest

    def relative(total: Any) -> Any:
        """Return a sum of differences: those of -inf are NaN."""
        return None if total is None else jnp.where(peak == -jnp.inf, jnp.nan, total)

    label_gap = peak - label
    if softcap is not None:
        # A compiler may compute the tanh of the largest logit differently among others: there the gap must be 0.
        label_gap = jnp.where(running.label >= running.largest, 0, label_gap)
    return Peaks(peak, running.largest, num_largest, running.first), sums._replace(
        rest=relative(sums.rest),
        label_gap=relative(label_gap),
        other_gaps=relative(sums.other_gaps),
        weighted_gaps=relative(sums.weighted_gaps),
        largest_gap=relative(mean(sums.largest_gap)),
        largest_mass=mean(sums.largest_mass),
    )


# --- Cotangents -------------------------------------------------------------------------------------------------------


def cotangents(
    operands: LayerOperands, peaks: Peaks, given: dict[int, Float[Array, "n C"]], *, names: tuple[str, ...]
) -> ByName:
    """Return the cotangents of the operands with these names, for those of the sums that are given by their place."""
    layer = _flatten(operands)
    tiling, flat = layer.tiling, layer.operands
    dtype, transposed = compute_dtype(flat.hidden), operands.skip
    peaks = jax.tree.map(lambda array: tiling.flat(array, transposed=transposed, fill=1), peaks)
    given = jax.tree.map(lambda array: tiling.flat(array, transposed=transposed), given)
    vectors = [name for name in names if name in CLASS_VECTORS]

    def visit_tile(first: Any, num_classes: int, whole: ByName) -> ByName:
        tile = layer.tile(first, num_classes)
        of_classes = {name: jnp.zeros(getattr(tile, name).shape, dtype) for name in names if name != "hidden"}

        def visit_block(first_row: Any, results: ByName) -> ByName:
            block, to_sum = layer.block(tile, first_row)
            of_block = tiling.block((peaks, given), first_row)
            parts = cotangents_of_sums(to_sum, of_block[0], of_block[1], ["logits", *vectors])
            products = _products(names, block, parts.pop("logits"))
            if "hidden" in names:
                old = tiling.block(results["hidden"], first_row)
                of_hidden = old + products.pop("hidden")
                results = results | {
                    "hidden": jax.lax.dynamic_update_slice_in_dim(results["hidden"], of_hidden, first_row, 0)
                }
            return results | {name: results[name] + part for name, part in (products | parts).items()}

        of_rows_so_far = {name: whole[name] for name in names if name == "hidden"}
        results: ByName = tiling.over_blocks(layer.num_needed, visit_block, of_rows_so_far | of_classes)
        for name in of_classes:
            part = results[name].astype(whole[name].dtype)
            results[name] = jax.lax.dynamic_update_slice_in_dim(whole[name], part, first, axis=part.ndim - 1)
        return results

    zeros = {name: jnp.zeros_like(getattr(operands, name)) for name in names if name != "hidden"}
    if "hidden" in names:
        zeros["hidden"] = jnp.zeros(flat.hidden.shape, dtype)
    results = dict(tiling.over_tiles(visit_tile, zeros))
    if "hidden" in names:
        results["hidden"] = _in_chunks(results["hidden"], tiling, operands).astype(operands.hidden.dtype)
    return results


def _products(names: tuple[str, ...], block: LayerOperands, of_logits: Float[Array, "rows k"]) -> ByName:
    """Return the parts of the cotangents of the layer that come from those of some logits."""
    dtype, hidden, weight = of_logits.dtype, block.hidden, block.weight
    products: ByName = {}
    if "bias" in names:
        products["bias"] = jnp.sum(of_logits, axis=0)
    # In float16 many would be 0, and TPUs have no products of it.
    narrow = dtype if hidden.dtype == jnp.float16 else hidden.dtype
    of_logits, hidden, weight = (array.astype(narrow) for array in (of_logits, hidden, weight))
    if "hidden" in names:
        products["hidden"] = jnp.matmul(of_logits, weight.T, preferred_element_type=dtype)
    if "weight" in names:
        products["weight"] = jnp.matmul(hidden.T, of_logits, preferred_element_type=dtype)
    return products
