"""The sums of the dense loss and its gradient in one Pallas kernel for TPUs.

A step of the kernel holds a few rows of logits in the memory of the core (VMEM), with all of their classes. It reads
them there three times: for the largest logit, for the sums, and for the gradient, which it writes. So the logits leave
the device's memory once, and the gradient enters it once. XLA reads the logits three times.

- Vectors are 128 classes wide. A row's sums are kept for each of the 128 places, and added up at the end.
- The label's logit is read by its index, and its gradient is written over that of the others. To compare each class
  with the label, as XLA's program does, takes a fifth more instructions.
- Labels are read as scalars. All other numbers of the rows of a step come in one array with the rows last, and leave in
  one: an array [N, 1] would take as much memory as [N, 128].
- What is beyond the last class is padding: it may hold anything, and is left out by comparison. So is what a row that
  does not count holds.

Nothing in it depends on the generation: the rows of a step are as many as fit the smallest VMEM, 16 MiB on a v4.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from lsce_jax.accurate import log1p_of_basic_operations, quotient_of_products
from lsce_jax.sums import MASSLESS, in_gap_units

NAME = "lsce_tpu_kernel"
LANES = 128
# Memory of the core for the blocks of a step, which leaves room for the compiler, and the limit that the compiler is
# told. A v4 has less than the limit, and uses what it has.
VMEM_BYTES = 15 * 2**20
VMEM_LIMIT = 60 * 2**20
# Rows of a step, and whether it keeps exponentials, the fastest first; and vectors of 8 rows between two tests of a
# loop's end. More of either take longer to compile.
STEPS = ((32, True), (16, True), (32, False), (16, False), (8, True), (8, False))
VECTORS_OF_ROUND = 128
NO_CLASS = 2.0**25  # more than any class, as a float32 number


@dataclass(frozen=True)
class Program:
    """What the kernel computes; every option that is not used costs nothing.

    Args:
        softcap: c of z <- c tanh(z / c), or None.
        z_loss: the factor of lse^2.
        masked: whether some classes take no part.
        weighted: whether classes have a factor of `off`.
        without_label: whether `gaps` leaves the label out.
        largest: whether the target has a share at the largest logits.
        stats: whether to compute `first` and `weighted_gaps`.
        counted: whether rows may not count.
        gradient: whether to compute the gradient.
    """

    softcap: float | None = None
    z_loss: float = 0.0
    masked: bool = False
    weighted: bool = False
    without_label: bool = False
    largest: bool = False
    stats: bool = False
    counted: bool = False
    gradient: bool = False


class Rows(NamedTuple):
    """Numbers of each row that the kernel takes, in this order."""

    label: Float[Array, " N"]  # as a number
    on: Float[Array, " N"]  # the target at the label, with its class weight
    off: Float[Array, " N"]  # at the others, without theirs
    mass: Float[Array, " N"]  # the sum of the target, but for at_max
    at_max: Float[Array, " N"]  # what is added at the largest logits
    upstream: Float[Array, " N"]  # the gradient with respect to the row's loss
    weight: Float[Array, " N"]  # w at the label
    counted: Float[Array, " N"]  # 0 for a row that does not count


class RowSums(NamedTuple):
    """Numbers of each row that the kernel returns, in this order. Those that it was not asked for hold anything."""

    largest: Float[Array, " N"]  # the largest logit before the softcap
    rest: Float[Array, " N"]  # sum of exp(z - m), less 1
    gaps: Float[Array, " N"]  # sum of w (m - z), in units of GAP_UNIT
    at_label: Float[Array, " N"]  # the label's logit before the softcap
    num_largest: Float[Array, " N"]  # how many logits are the largest
    largest_mass: Float[Array, " N"]  # sum of w over the largest logits
    first: Float[Array, " N"]  # the first class whose logit is the largest; `NO_CLASS` if there is none
    weighted_gaps: Float[Array, " N"]  # sum of exp(z - m) (m - z)


NUMBERS = 8  # of a row, either way


class Step(NamedTuple):
    """What a step of the kernel holds."""

    rows: int
    keeps_terms: bool  # whether exp(z - m) is kept for the gradient, or computed again
    writes_behind: bool  # whether a gradient is written while the next one is computed


def step_of(num_classes: int, dtype: Any, program: Program) -> Step | None:
    """Return what a step holds, or None if not even the fewest rows fit."""
    # Where the gradient has a share at the largest logits, it finds them by their gaps, and has the gaps again.
    keeps = (True, False) if program.gradient and not program.largest else (False,)
    steps = [Step(rows, kept, True) for rows, kept in STEPS if kept in keeps] + [Step(STEPS[-1][0], False, False)]
    return next((step for step in steps if _bytes_of(step, num_classes, dtype, program) <= VMEM_BYTES), None)


def _bytes_of(step: Step, num_classes: int, dtype: Any, program: Program) -> int:
    """Return what a step takes. The next logits are read while these are computed, so that there are two of them."""
    width = _round_up(num_classes, LANES)
    blocks = 2 + (1 + step.writes_behind) * program.gradient
    of_logits = blocks * step.rows * width * jnp.dtype(dtype).itemsize
    of_terms = 4 * step.rows * width * step.keeps_terms
    of_classes = 4 * 8 * width * (program.masked or program.weighted)
    return int(of_logits + of_terms + of_classes)


def sums_and_gradient(
    program: Program,
    logits: Float[Array, "N K"],
    labels: Int[Array, " N"],
    rows: Rows,
    factor: Float[Array, " K"] | None,
) -> tuple[RowSums, Float[Array, "N K"] | None]:
    """Return the sums of each row, and the gradient with respect to the logits if asked for.

    Args:
        program: what to compute.
        logits: float32 or bfloat16.
        labels: class indices within range.
        rows: the numbers of each row.
        factor: w, the factor of `off` at each class; NaN for classes that take no part. None if it is 1 for all.
    """
    num_rows, num_classes = logits.shape
    step = step_of(num_classes, logits.dtype, program)
    assert step is not None
    num_steps, width = pl.cdiv(num_rows, step.rows), _round_up(num_classes, LANES)

    def by_step(values: Array, lanes: int) -> Array:
        """Return [steps, lanes]: a number for each row of a step, filled up."""
        values = jnp.pad(values, (0, num_steps * step.rows - num_rows)).reshape(num_steps, step.rows)
        return jnp.pad(values, ((0, 0), (0, lanes - step.rows)))

    numbers = jnp.stack([by_step(values, LANES) for values in rows], axis=1)
    operands = [by_step(labels, step.rows)[:, None], numbers, logits]
    wide = pl.BlockSpec((step.rows, width), lambda i: (i, 0))
    of_rows = pl.BlockSpec((1, NUMBERS, LANES), lambda i: (i, 0, 0))
    in_specs = [pl.BlockSpec((1, 1, step.rows), lambda i: (i, 0, 0), memory_space=pltpu.SMEM), of_rows, wide]
    if factor is not None:
        operands.append(factor[None])
        in_specs.append(pl.BlockSpec((1, width), lambda i: (0, 0), pipeline_mode=pl.Buffered(1)))
    out_specs, out_shape = [of_rows], [_result(operands, (num_steps, NUMBERS, LANES), jnp.float32)]
    if program.gradient:
        once = {} if step.writes_behind else {"pipeline_mode": pl.Buffered(1)}
        out_specs.append(pl.BlockSpec(wide.block_shape, wide.index_map, **once))
        out_shape.append(_result(operands, logits.shape, logits.dtype))
    sweeps = 2 if program.gradient else 1
    traffic = sum(math.prod(each.shape) * each.dtype.itemsize for each in (*operands, *out_shape))
    sums, *gradient = pl.pallas_call(
        functools.partial(_step, program, num_classes),
        grid=(num_steps,),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((step.rows, width), jnp.float32)] if step.keeps_terms else [],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=pl.CostEstimate(
            flops=6 * sweeps * logits.size, transcendentals=sweeps * logits.size, bytes_accessed=traffic
        ),
        name=NAME,
    )(*operands)
    of_each_row = (values[:, : step.rows].ravel()[:num_rows] for values in jnp.unstack(sums, axis=1))
    return RowSums(*itertools.islice(of_each_row, len(RowSums._fields))), gradient[0] if gradient else None


def _result(operands: list[Array], shape: tuple[int, ...], dtype: Any) -> Any:
    """Return the type of a result: in jax.shard_map it varies over the axes of the mesh that an operand varies over."""

    def of_all(*operands: Array) -> Array:
        return sum((operand.ravel()[0].astype(dtype) for operand in operands), jnp.zeros(shape, dtype))

    return jax.eval_shape(of_all, *operands)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


# --- The kernel -----------------------------------------------------------------------------------------------------


class _Vector(NamedTuple):
    """128 classes of all rows of a step."""

    raw: Array  # the logits as they are
    allowed: Array | None  # the classes that take part; None if all do
    weight: Array | None
    classes: Array  # their indices, as float32


def _step(program: Program, num_classes: int, *refs: Any) -> None:
    """Compute the rows of one step.

    Args:
        program: what to compute.
        num_classes: K.
        refs: labels [1, 1, R] int32, read; numbers of rows [1, 7, 128] float32, read; logits [R, K], read; factor
            [1, K] float32, read, where there are class vectors; sums [1, 7, 128] float32, written; gradient [R, K],
            written, where it is asked for; exp(z - m) [R, K] float32, scratch, where it is kept.
    """
    labels, numbers, logits, *others = refs
    factor = others.pop(0) if program.masked or program.weighted else None
    sums_ref, *of_gradient = others
    terms = of_gradient[1] if len(of_gradient) > 1 else None
    vectors = _Vectors(program, num_classes, logits, factor)
    rows = Rows(*(_column(vectors, numbers[0, i : i + 1, :]) for i in range(NUMBERS)))
    largest = _largest(vectors)
    sums = _sums(program, vectors, rows, largest, _at_labels(vectors, labels), terms)
    for i, values in enumerate(sums):
        sums_ref[0, i : i + 1, :] = _line(vectors, values)
    if of_gradient:
        _write_gradient(program, vectors, rows, sums, labels, of_gradient[0], terms)


class _Vectors:
    """The logits of a step, 128 classes at a time."""

    def __init__(self, program: Program, num_classes: int, logits: Any, factor: Any) -> None:
        self.program, self.num_classes, self.logits, self.factor = program, num_classes, logits, factor
        self.shape = logits.shape[0], LANES
        self.rows, self.lanes = (jax.lax.broadcasted_iota(jnp.int32, self.shape, i) for i in (0, 1))

    def __call__(self, start: Any, *, last: bool = False) -> _Vector:
        """Return the classes from a start on, a multiple of 128; the last ones may be fewer than 128."""
        raw = self.logits[:, pl.ds(start, LANES)].astype(jnp.float32)
        classes = (self.lanes + start).astype(jnp.float32)
        allowed = self.lanes < self.num_classes - start if last else None
        weight = None
        if self.factor is not None:
            weight = jnp.broadcast_to(self.factor[:, pl.ds(start, LANES)], self.shape)
            if self.program.masked:
                inside = weight == weight  # noqa: PLR0124 - NaN differs from itself
                allowed = inside if allowed is None else inside & allowed
        return _Vector(raw, allowed, weight if self.program.weighted else None, classes)

    def sweep(self, visit: Callable[[Any, _Vector, Any], Any], carry: Any) -> Any:
        """Return what is carried from vector to vector: two of it, for every other vector."""
        of_round = max(1, VECTORS_OF_ROUND * 8 // self.shape[0])
        whole = self.num_classes // LANES
        num_rounds = whole // of_round

        def visit_at(start: Any, i: int, carries: list[Any], *, last: bool = False) -> list[Any]:
            carries = list(carries)
            carries[i % 2] = visit(start, self(start, last=last), carries[i % 2])
            return carries

        def round_of(j: Any, carries: list[Any]) -> list[Any]:
            first = j * (of_round * LANES)
            for i in range(of_round):
                carries = visit_at(pl.multiple_of(first + i * LANES, LANES), i, carries)
            return carries

        carries = jax.lax.fori_loop(0, num_rounds, round_of, [carry, carry])
        for i in range(num_rounds * of_round, whole):
            carries = visit_at(i * LANES, i, carries)
        if self.num_classes % LANES:
            carries = visit_at(whole * LANES, whole, carries, last=True)
        return carries

    def at_labels(self, labels: Any) -> Iterator[tuple[slice, Array, Array]]:
        """Yield for each row: rows that it is among, the start of its label's 128 classes, and the label's place."""
        # Rows that share a vector, or two for the narrow logits that come in pairs.
        together = min(8 * 4 // self.logits.dtype.itemsize, self.shape[0])
        for row in range(self.shape[0]):
            label = labels[0, 0, row]
            start = pl.multiple_of((label >> 7) << 7, LANES)
            among = slice(row // together * together, (row // together + 1) * together)
            yield among, start, (self.rows[among] == row) & (self.lanes[among] == label - start)


def _column(vectors: _Vectors, line: Array) -> Array:
    """Return [R, 1]: the first numbers of [1, 128], one for each row."""
    diagonal = vectors.rows == vectors.lanes
    return jnp.sum(jnp.where(diagonal, jnp.broadcast_to(line, vectors.shape), 0.0), axis=1, keepdims=True)


def _line(vectors: _Vectors, column: Array) -> Array:
    """Return [1, 128], of which the first numbers are those of [R, 1]."""
    diagonal = vectors.rows == vectors.lanes
    return jnp.sum(jnp.where(diagonal, _wide(column), 0.0), axis=0, keepdims=True)


def _wide(column: Array) -> Array:
    """Return one number for each row as vectors."""
    return jnp.broadcast_to(column, (column.shape[0], LANES))


def capped(program: Program, raw: Array) -> Array:
    """Return logits after the softcap."""
    return raw if program.softcap is None else program.softcap * jnp.tanh(raw / program.softcap)


def _below(program: Program, raw: Array, largest: Array, peak: Array) -> tuple[Array, Array]:
    """Return z - m, and where the logit is the largest; of what takes no part, anything."""
    below = capped(program, raw) - peak
    if program.softcap is None:
        # Not where the logit equals the peak: of infinite ones the difference is NaN, and so must be the sum.
        return below, below >= 0
    is_largest = raw >= largest
    return jnp.where(is_largest, 0.0, below), is_largest


def _largest(vectors: _Vectors) -> Array:
    """Return the largest logit of each row before the softcap, [R, 1]."""

    def visit(_: Any, vector: _Vector, largest: Array) -> Array:
        raw = vector.raw if vector.allowed is None else jnp.where(vector.allowed, vector.raw, -jnp.inf)
        return jnp.maximum(largest, raw)

    first, second = vectors.sweep(visit, jnp.full(vectors.shape, -jnp.inf, jnp.float32))
    return jnp.max(jnp.maximum(first, second), axis=1, keepdims=True)


def _at_labels(vectors: _Vectors, labels: Any) -> Array:
    """Return the label's logit of each row, [R, 1]."""
    totals: dict[int, Array] = {}
    for among, start, here in vectors.at_labels(labels):
        logits = vectors.logits[among, pl.ds(start, LANES)].astype(jnp.float32)
        totals[among.start] = jnp.where(here, logits, totals.get(among.start, 0.0))
    total = jnp.concatenate(list(totals.values()), axis=0)
    return jnp.sum(total, axis=1, keepdims=True)


def _sums(program: Program, vectors: _Vectors, rows: Rows, largest: Array, at_label: Array, terms: Any) -> RowSums:
    wide_largest, peak, label = _wide(largest), _wide(capped(program, largest)), _wide(rows.label)
    zero = jnp.zeros(vectors.shape, jnp.float32)
    no_class = jnp.full(vectors.shape, NO_CLASS, jnp.float32)

    def visit(start: Any, vector: _Vector, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        total, rest, below_sum, num_largest, largest_mass, first, weighted_gaps = carry
        below, is_largest = _below(program, vector.raw, wide_largest, peak)
        term = jnp.exp(below)
        if terms is not None:
            terms[:, pl.ds(start, LANES)] = term
        if vector.allowed is not None:
            below, term = jnp.where(vector.allowed, below, 0.0), jnp.where(vector.allowed, term, 0.0)
            is_largest &= vector.allowed
        if program.largest:
            num_largest += jnp.where(is_largest, 1.0, 0.0)
            if vector.weight is not None:
                largest_mass += jnp.where(is_largest, vector.weight, 0.0)
        if program.stats:
            first = jnp.minimum(first, jnp.where(is_largest, vector.classes, NO_CLASS))
            weighted_gaps -= term * jnp.maximum(below, MASSLESS)
        below = in_gap_units(below)
        if program.without_label:
            below = jnp.where(vector.classes == label, 0.0, below)
        if vector.weight is not None:
            weight = vector.weight if vector.allowed is None else jnp.where(vector.allowed, vector.weight, 0.0)
            below = jnp.where(weight == 0.0, 0.0, weight * below)
        rest += jnp.where(is_largest, 0.0, term)
        return total + term, rest, below_sum + below, num_largest, largest_mass, first, weighted_gaps

    one, other = vectors.sweep(visit, (*(zero,) * 5, no_class, zero))
    total, rest, below_sum, num_largest, largest_mass, _, weighted_gaps = (
        jnp.sum(a + b, axis=1, keepdims=True) for a, b in zip(one, other, strict=True)
    )
    first = jnp.min(jnp.minimum(one[5], other[5]), axis=1, keepdims=True)
    return RowSums(
        largest=largest,
        # The largest terms are 1. If the sum is below 2 there is one of them, and the sum without it is accurate where
        # the sum less 1 is not. NaN where the sum is.
        rest=jnp.where(total < 2.0, rest, total - 1.0),
        gaps=-below_sum,
        at_label=at_label,
        num_largest=num_largest,
        largest_mass=largest_mass if program.weighted else num_largest,
        first=first,
        weighted_gaps=weighted_gaps,
    )


def _write_gradient(
    program: Program, vectors: _Vectors, rows: Rows, sums: RowSums, labels: Any, gradient: Any, terms: Any
) -> None:
    column_peak = capped(program, sums.largest)
    largest, peak = _wide(sums.largest), _wide(column_peak)
    mass, at_max = rows.mass, None
    if program.largest:
        share = quotient_of_products(rows.at_max, sums.num_largest)
        mass += share * sums.largest_mass
        at_max = _wide(rows.upstream * share)
    if program.z_loss:
        mass += 2 * program.z_loss * (column_peak + log1p_of_basic_operations(sums.rest))
    of_softmax = _wide(quotient_of_products(mass, 1.0 + sums.rest) * rows.upstream)
    on, off = _wide(rows.on * rows.upstream), _wide(rows.off * rows.upstream)
    counted = _wide(rows.counted) > 0 if program.counted else None

    def of_logits(raw: Array, target: Array, weight: Array | None, term: Array | None = None) -> Array:
        if term is None:
            below, is_largest = _below(program, raw, largest, peak)
            term = jnp.exp(below)
            if at_max is not None:
                target += jnp.where(is_largest, at_max if weight is None else at_max * weight, 0.0)
        result = of_softmax * term - target
        if program.softcap is not None:
            ratio = jnp.tanh(raw / program.softcap)
            result *= 1.0 - ratio * ratio
        return result if counted is None else jnp.where(counted, result, 0.0)

    def visit(start: Any, vector: _Vector, carry: Any) -> Any:
        place = pl.ds(start, LANES)
        target = off if vector.weight is None else off * vector.weight
        result = of_logits(vector.raw, target, vector.weight, None if terms is None else terms[:, place])
        if vector.allowed is not None:
            result = jnp.where(vector.allowed, result, 0.0)
        gradient[:, place] = result.astype(gradient.dtype)
        return carry

    vectors.sweep(visit, ())
    of_label = of_logits(_wide(sums.at_label), on, _wide(rows.weight))
    # The gradient of a row whose label is bad is NaN already, but for classes that take no part: its label may be one.
    is_good = on == on  # noqa: PLR0124 - NaN differs from itself
    for among, start, here in vectors.at_labels(labels):
        place = pl.ds(start, LANES)
        kept = gradient[among, place].astype(jnp.float32)
        gradient[among, place] = jnp.where(here & is_good[among], of_label[among], kept).astype(gradient.dtype)
