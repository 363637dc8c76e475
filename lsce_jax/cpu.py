"""The sums and their gradient for CPUs, where XLA writes out what it fuses for accelerators.

Three things make the difference there:

- Sums of plain differences and exponentials, over at most 32768 classes, are fused and fast. A comparison in the sum is
  written out, as large as the logits. So groups of consecutive classes are summed without any, and of each row only the
  groups of the label and of the largest logit are summed again with them, where that changes the result.
- Everything else goes through blocks of rows, whose intermediate arrays stay in the cache.
- The gradient at the label is computed for itself and written over that of the others. To correct what is there would
  not be accurate where the target of the others is larger.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lsce_jax.inputs import at_labels, compute_dtype, is_sharded
from lsce_jax.sums import CLASS_VECTORS, NO_CLASS, Operands, Peaks, Sums, in_gap_units, sums, sums_at, weighted_gap

# Logits in a block of rows: 1 MiB in float32, so that the few arrays of a block fit into the cache.
_BLOCK_SIZE = 2**18
# Up to this many logits, of up to this many rows, starting operations takes most of the time: the plain formulas have
# the fewest.
_FEW_LOGITS, _FEW_ROWS = 2**15, 2**9
# Up to how many classes are taken one by one, up to how many as one group, and from how many on in several.
_FEW_CLASSES, _FEW_IN_A_GROUP, _MANY_CLASSES = 16, 64, 128
# About how many groups a row is divided into, of about how many classes at least, and how many logits of groups are
# summed again at a time.
_NUM_GROUPS, _SMALLEST_GROUP, _WINDOW_SIZE = 16, 32, 2**14
# Whether XLA fuses sums of exponentials, which JAX 0.10.0 wrote out.
_FUSES_SUMS = jax.__version_info__ >= (0, 10, 2)

Rows = dict[str, Any]  # arrays over the rows, by name


def row_sums(operands: Operands) -> tuple[Peaks, Sums]:
    """Return what `sums.sums` returns."""
    if not has_index(operands) or not operands.labels.size:
        return sums(operands)
    *batch_shape, num_classes = operands.logits.shape
    num_rows = math.prod(batch_shape)
    rows = {name: getattr(operands, name) for name in ("logits", "labels", "counted")}
    if operands.class_mask is not None and operands.class_mask.ndim > 1:
        rows["class_mask"] = operands.class_mask
    rows = {
        name: array.reshape(num_rows, *array.shape[len(batch_shape) :])
        for name, array in rows.items()
        if array is not None
    }
    block_rows, of_block = max(1, _BLOCK_SIZE // num_classes), _directly
    are_few = num_rows <= _FEW_ROWS and num_rows * num_classes <= _FEW_LOGITS
    in_parts = _is_plain(operands) and not are_few
    if in_parts and num_classes <= _FEW_CLASSES:
        block_rows, of_block = num_rows, _in_columns
    elif in_parts and not _FEW_IN_A_GROUP < num_classes < _MANY_CLASSES:
        group_size = num_classes if num_classes <= _FEW_IN_A_GROUP else _group_size(num_classes)
        of_block = partial(_in_groups, group_size)
        # XLA would write out a part of the classes, and the logits in another dtype.
        if _FUSES_SUMS and num_classes % group_size == 0 and operands.logits.dtype == jnp.float32:
            block_rows = num_rows
    results = _in_blocks(lambda block: of_block(replace(operands, **block)), block_rows, rows)
    peaks, of_rows = jax.tree.map(lambda values: values.reshape(batch_shape), results)
    return peaks, of_rows


def has_index(operands: Operands) -> bool:
    """Whether rows and classes can be addressed by index: their number is known, and one device has all of them."""
    return not is_sharded(operands.logits) and all(isinstance(size, int) for size in operands.logits.shape)


def logit_cotangents(
    operands: Operands, peaks: Peaks, given: dict[int, Float[Array, "*batch"]]
) -> Float[Array, "*batch K"]:
    """Return the cotangents of the logits, for those of some sums, which are given by their place."""

    def pulled_back(operands: Operands, is_label: Bool[Array, "*batch 1"] | None) -> Array:
        def given_sums(logits: Array) -> dict[int, Array]:
            of_logits = sums_at(replace(operands, logits=logits), peaks, is_label, differentiable=True)
            results = jax.tree.leaves(of_logits)
            # In shard_map a sum that no logit changes may be the same on all devices, and its cotangent may not be.
            return {i: jnp.where(False, cotangent, results[i]) for i, cotangent in given.items()}

        cotangents: tuple[Array] = jax.vjp(given_sums, operands.logits)[1](given)
        return cotangents[0]

    labels = operands.labels[..., None]
    own: dict[str, Any] = {
        name: at_labels(vector, operands.labels)[..., None]
        for name in CLASS_VECTORS
        if (vector := getattr(operands, name)) is not None
    }
    own["logits"] = jnp.take_along_axis(operands.logits, labels, axis=-1, mode="promise_in_bounds")
    return jnp.put_along_axis(
        pulled_back(operands, None),
        labels,
        pulled_back(replace(operands, **own), jnp.ones_like(labels, bool)),
        axis=-1,
        inplace=False,
        mode="promise_in_bounds",
    )


def _is_plain(operands: Operands) -> bool:
    """Whether the sums are those of differences and exponentials alone."""
    has_vectors = any(getattr(operands, name) is not None for name in CLASS_VECTORS)
    return not has_vectors and operands.softcap is None and not operands.largest


def _group_size(num_classes: int) -> int:
    """Return how many classes a group has: a divisor of all, if there is one of a suitable size."""
    wanted = max(num_classes // _NUM_GROUPS, _SMALLEST_GROUP)
    divisors = [size for size in range(max(1, wanted // 2), 4 * wanted + 1) if num_classes % size == 0]
    return min(divisors, key=lambda size: abs(math.log(size / wanted)), default=wanted)


def _in_blocks(function: Callable[[Rows], Any], block_rows: int, rows: Rows) -> Any:
    """Return what a function gives for each row, computed a block of rows at a time."""
    num_rows = len(rows["labels"])
    if num_rows <= block_rows:
        return function(rows)
    shapes = jax.eval_shape(function, {name: array[:block_rows] for name, array in rows.items()})
    nothing = jax.tree.map(lambda part: jnp.zeros(num_rows, part.dtype), shapes)
    return _updated(nothing, function, block_rows, rows, -(-num_rows // block_rows))


def _updated(
    results: Any, function: Callable[[Rows], Any], block_rows: int, rows: Rows, num_blocks: int | Int[Array, ""]
) -> Any:
    """Return results in which the first blocks of rows are what a function gives for them."""

    def block(array: Array, start: Array) -> Array:
        if array.dtype != jnp.bfloat16:
            return jax.lax.dynamic_slice_in_dim(array, start, block_rows)
        # As integers, or XLA would widen all of them to float32 before the loop.
        bits = jax.lax.bitcast_convert_type(array, jnp.uint16)
        part = jax.lax.dynamic_slice_in_dim(bits, start, block_rows)
        return jax.lax.bitcast_convert_type(part, jnp.bfloat16)

    def step(i: Array, results: Any) -> Any:
        # A dynamic slice moves back a start that leaves too few rows: the last block may overlap the one before it.
        start = i * block_rows
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=0),
            results,
            function({name: block(array, start) for name, array in rows.items()}),
        )

    return jax.lax.fori_loop(0, num_blocks, step, results)


def _directly(operands: Operands) -> tuple[Peaks, Sums]:
    """Return the sums of rows of logits."""
    # If the logits are a product, XLA may fuse it into some of their uses only, which then round it differently: the
    # largest logit would not equal itself. XLA fuses nothing through a select.
    logits = jnp.where(jnp.isnan(operands.logits), jnp.nan, operands.logits)
    return sums(replace(operands, logits=logits), by_index=True)


def _in_columns(operands: Operands) -> tuple[Peaks, Sums]:
    """Return the plain sums of rows of few logits, of all rows class by class."""
    logits = operands.logits.astype(compute_dtype(operands.logits))
    labels = operands.labels
    columns = [logits[:, i] for i in range(logits.shape[1])]
    # A reduction, which XLA does not fuse, or it would look for the largest logit again for every exponential.
    peak = jnp.max(logits, axis=1)
    label_gap = _in_pairs(jnp.add, [jnp.where(labels == i, peak - column, 0) for i, column in enumerate(columns)])
    weighted_gaps = _in_pairs(jnp.add, [weighted_gap(column - peak) for column in columns])
    rest, other_gaps, first = _class_by_class(logits, labels, peak)
    return _plain_sums(operands, first, peak, rest, label_gap, other_gaps, weighted_gaps)


def _class_by_class(
    logits: Float[Array, "rows K"], labels: Int[Array, " rows"], peak: Float[Array, " rows"]
) -> tuple[Array, Array, Array]:
    """Return rest, other_gaps and `Peaks.first` of rows of few logits."""
    gaps = [peak - logits[:, i] for i in range(logits.shape[1])]

    def total(terms: Iterable[Array]) -> Array:
        return _in_pairs(jnp.add, list(terms))

    # Not where the logit equals the peak: of infinite ones the gap is NaN, and so must be the sum.
    is_peak = [gap <= 0 for gap in gaps]
    num_peaks = total(one.astype(peak.dtype) for one in is_peak)
    masses = total(jnp.where(one, 0, jnp.exp(-gap)) for one, gap in zip(is_peak, gaps, strict=True))
    other_gaps = total(jnp.where(labels == i, 0, in_gap_units(gap)) for i, gap in enumerate(gaps))
    first = _in_pairs(jnp.minimum, [jnp.where(one, i, NO_CLASS) for i, one in enumerate(is_peak)])
    return masses + (num_peaks - 1), other_gaps, first


def _in_groups(group_size: int, operands: Operands) -> tuple[Peaks, Sums]:
    """Return the plain sums of rows of logits."""
    num_rows, num_classes = operands.logits.shape
    num_groups = num_classes // group_size
    whole = num_groups * group_size
    logits = operands.logits.astype(compute_dtype(operands.logits))
    labels = operands.labels

    def by_group(reduce: Callable[..., Array], of_logits: Callable[[Array, Array], Array], peak: Array) -> Array:
        groups = logits[:, :whole].reshape(num_rows, num_groups, group_size)
        results: Array = reduce(of_logits(groups, peak[:, None, None]), axis=-1)
        # The barrier keeps XLA from summing all groups a second time, in place of adding up their sums.
        results = jax.lax.optimization_barrier(results)  # type: ignore[no-untyped-call]
        if whole == num_classes:
            return results
        last = reduce(of_logits(logits[:, whole:], peak[:, None]), axis=-1)
        return jnp.append(results, last[:, None], axis=-1)

    largest = by_group(jnp.max, lambda logits, _: logits, logits[:, 0])
    peak = jnp.max(largest, axis=-1)
    masses = by_group(jnp.sum, lambda logits, peak: jnp.exp(logits - peak), peak)
    # Two sums that share the peak would have XLA write it out for every class. XLA does not see through a select.
    gaps = by_group(
        jnp.sum, lambda logits, peak: in_gap_units(peak - logits), jnp.where(jnp.isnan(peak), jnp.nan, peak)
    )
    weighted_gaps = jnp.zeros_like(peak)
    if operands.stats:
        hidden = jnp.where(jnp.isposinf(peak), jnp.inf, peak)  # as above
        of_groups = by_group(jnp.sum, lambda logits, peak: weighted_gap(logits - peak), hidden)
        # And both sums in one kernel would take ten times as long.
        weighted_gaps = jnp.sum(jnp.where(jnp.isnan(of_groups), jnp.nan, of_groups), axis=-1)
    label_gap = peak - jnp.take_along_axis(logits, labels[:, None], axis=-1, mode="promise_in_bounds")[:, 0]
    mass, all_gaps = jnp.sum(masses, axis=-1), jnp.sum(gaps, axis=-1)
    # A mass below 2 says little of what the other classes add to the largest, and the difference little of the others
    # if the label has most of the sum.
    own_gap = in_gap_units(label_gap)
    needs_exact = (mass < 2) | ~(2 * own_gap < all_gaps)
    if operands.counted is not None:
        needs_exact &= operands.counted

    rows = {
        "row": jnp.arange(num_rows, dtype=jnp.int32),
        "labels": labels,
        "peak": peak,
        "first": jnp.argmax(largest, axis=-1).astype(jnp.int32),
        "masses": masses,
        "gaps": gaps,
    }
    first = rows["first"]
    if operands.stats:
        block_rows = min(max(1, _BLOCK_SIZE // group_size), num_rows)
        of_block = partial(_first_largest, logits, group_size)
        first = _updated(first, of_block, block_rows, rows, -(-num_rows // block_rows))
    results = mass - 1, all_gaps - own_gap
    if num_groups == 1:
        results = jax.lax.cond(jnp.any(needs_exact), lambda: _class_by_class(logits, labels, peak)[:2], lambda: results)
        return _plain_sums(operands, first, peak, results[0], label_gap, results[1], weighted_gaps)
    block_rows = min(max(1, _WINDOW_SIZE // group_size), num_rows)
    num_blocks = jnp.where(jnp.any(needs_exact), -(-num_rows // block_rows), 0)
    without_own = partial(_without_own, logits, group_size)
    rest, other_gaps = _updated(results, without_own, block_rows, rows, num_blocks)
    return _plain_sums(operands, first, peak, rest, label_gap, other_gaps, weighted_gaps)


def _plain_sums(operands: Operands, first: Int[Array, " rows"], *values: Float[Array, " rows"]) -> tuple[Peaks, Sums]:
    """Return first, and peak, rest, label_gap, other_gaps and weighted_gaps by name, of the rows that count."""
    if operands.counted is not None:
        # As of logits that are 0. What is there may be NaN, which must not reach a derivative.
        zero = jnp.zeros_like(values[0])
        of_zeros = zero, zero + (operands.logits.shape[-1] - 1), zero, zero, zero
        pairs = zip(values, of_zeros, strict=True)
        values = tuple(jnp.where(operands.counted, value, of_zero) for value, of_zero in pairs)
    peak, rest, label_gap, other_gaps, weighted_gaps = values
    peaks = Peaks(peak, peak, num_largest=None, first=first if operands.stats else None)
    return peaks, Sums(
        rest=rest,
        label_gap=label_gap,
        other_gaps=other_gaps,
        other_mass=None,
        other_prior=None,
        other_entropy=None,
        weighted_gaps=weighted_gaps if operands.stats else None,
        largest_gap=None,
        largest_mass=None,
    )


def _in_pairs(combine: Callable[[Array, Array], Array], parts: list[Array]) -> Array:
    """Return the parts combined in pairs, and the results in pairs again: sums round off less."""
    while len(parts) > 1:
        rest = parts[len(parts) // 2 * 2 :]
        parts = [combine(one, other) for one, other in zip(parts[::2], parts[1::2], strict=False)] + rest
    return parts[0]


def _window(logits: Float[Array, "rows K"], size: int, row: Array, start: Array) -> Float[Array, " size"]:
    return jax.lax.dynamic_slice(logits, (row, start), (1, size))[0]


def _first_largest(logits: Float[Array, "rows K"], group_size: int, rows: Rows) -> Int[Array, " rows"]:
    """Return `Peaks.first` of some rows, given the first group that has a largest logit."""
    start = jnp.minimum(rows["first"] * group_size, logits.shape[1] - group_size)
    values = jax.vmap(partial(_window, logits, group_size))(rows["row"], start)
    classes = start[:, None] + jnp.arange(group_size, dtype=jnp.int32)[None]
    return jnp.min(jnp.where(values >= rows["peak"][:, None], classes, NO_CLASS), axis=-1)


def _without_own(logits: Float[Array, "rows K"], group_size: int, rows: Rows) -> tuple[Array, Array]:
    """Return rest and other_gaps, without the largest logit and the label, of some rows."""
    labels, peak = rows["labels"][:, None], rows["peak"][:, None]

    def of_group(group: Int[Array, " rows"]) -> tuple[Array, Array]:
        """Return the gaps of a group of each row, and its classes: -1 where the window of the last begins before it."""
        start = jnp.minimum(group * group_size, logits.shape[1] - group_size)
        window = jax.vmap(partial(_window, logits, group_size))
        classes = start[:, None] + jnp.arange(group_size, dtype=jnp.int32)[None]
        return peak - window(rows["row"], start), jnp.where(classes // group_size == group[:, None], classes, -1)

    def other_groups(sums: Float[Array, "rows groups"], group: Int[Array, " rows"]) -> Float[Array, " rows"]:
        groups = jnp.arange(sums.shape[1], dtype=jnp.int32)[None]
        return jnp.sum(jnp.where(groups == group[:, None], 0, sums), axis=-1)

    gaps, classes = of_group(rows["first"])
    # Not where the logit equals the peak: of infinite ones the gap is NaN, and so must be the sum.
    is_largest = gaps <= 0
    num_largest = jnp.sum(is_largest & (classes >= 0), axis=-1, dtype=peak.dtype)
    others = jnp.sum(jnp.where(is_largest | (classes < 0), 0, jnp.exp(-gaps)), axis=-1)
    rest = others + other_groups(rows["masses"], rows["first"]) + (num_largest - 1)
    own = rows["labels"] // group_size
    gaps, classes = of_group(own)
    other_gaps = jnp.sum(jnp.where((classes == labels) | (classes < 0), 0, in_gap_units(gaps)), axis=-1)
    return rest, other_gaps + other_groups(rows["gaps"], own)
