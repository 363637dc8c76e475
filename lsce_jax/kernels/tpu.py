"""The sums of the dense loss and its gradient in one Pallas kernel for TPUs.

A step of the kernel holds a few rows of logits in the memory of the core (VMEM), with all of their classes. It reads
them there three times: for the largest logit, for the sums, and for the gradient, which it writes. So the logits leave
the device's memory once, and the gradient enters it once. XLA reads the logits three times.

- Vectors are 128 classes wide. A row's sums are kept for each of the 128 places, and added up at the end.
- The label's logit is read by its index, and its gradient is written over that of the others. To compare each class
  with the label, as XLA's program does, takes a fifth more instructions.
- Labels are read as scalars. All other numbers of a row come in one array, and leave in one, since an array [N, 1] takes
  as much memory as [N, 128].
- What is beyond the last class is padding: it may hold anything, and is left out by comparison. So is what a row that
  does not count holds.

Nothing in it depends on the generation: the rows of a step are as many as fit the smallest VMEM, 16 MiB on a v4.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from lsce_jax.accurate import log1p_of_basic_operations, quotient_of_products

NAME = "lsce_tpu_kernel"
LANES = 128
# Of a step's blocks, which must leave room for what the compiler needs. The limit is what is asked for: a v4 has less,
# and takes what it has.
VMEM_BYTES = 15 * 2**20
VMEM_LIMIT = 60 * 2**20
# Rows of a step; and vectors of 8 rows between two tests of a loop's end. More of either take longer to compile.
ROWS = (32, 16, 8)
VECTORS_OF_ROUND = 128


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
        correct: whether to find out if the label is the first of the largest logits.
        counted: whether rows may not count.
        gradient: whether to compute the gradient.
    """

    softcap: float | None = None
    z_loss: float = 0.0
    masked: bool = False
    weighted: bool = False
    without_label: bool = False
    largest: bool = False
    correct: bool = False
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
    counted: Float[Array, " N"]  # 0 for a row that does not count


class RowSums(NamedTuple):
    """Numbers of each row that the kernel returns, in this order. Those that it was not asked for hold anything."""

    largest: Float[Array, " N"]  # the largest logit before the softcap
    rest: Float[Array, " N"]  # sum of exp(z - m), less 1
    gaps: Float[Array, " N"]  # sum of w (m - z)
    at_label: Float[Array, " N"]  # the label's logit before the softcap
    num_largest: Float[Array, " N"]  # how many logits are the largest
    largest_mass: Float[Array, " N"]  # sum of w over the largest logits
    correct: Float[Array, " N"]  # above 0 where the label is the first of them


def rows_of_step(num_classes: int, dtype: Any, program: Program) -> int | None:
    """Return how many rows the kernel takes at a time, or None if not even the fewest fit."""
    return next((rows for rows in ROWS if _step_bytes(rows, num_classes, dtype, program) <= VMEM_BYTES), None)


def _step_bytes(rows: int, num_classes: int, dtype: Any, program: Program) -> int:
    """Return what the blocks of a step take: each twice, since the next one is read while this one is computed."""
    width = _round_up(num_classes, LANES)
    blocks = 2 * (2 if program.gradient else 1)
    vectors = 8 * width * 4 * (program.masked or program.weighted)
    return blocks * rows * width * jnp.dtype(dtype).itemsize + vectors * 2 + 4 * rows * LANES * 4


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
    step = rows_of_step(num_classes, logits.dtype, program)
    assert step is not None
    num_steps, width = pl.cdiv(num_rows, step), _round_up(num_classes, LANES)
    labels = jnp.pad(labels, (0, num_steps * step - num_rows)).reshape(num_steps, 1, step)
    operands = [labels, jnp.stack(rows, axis=-1), logits]
    wide = pl.BlockSpec((step, width), lambda i: (i, 0))
    in_specs = [
        pl.BlockSpec((1, 1, step), lambda i: (i, 0, 0), memory_space=pltpu.SMEM),
        pl.BlockSpec((step, len(Rows._fields)), lambda i: (i, 0)),
        wide,
    ]
    if factor is not None:
        operands.append(factor[None])
        in_specs.append(pl.BlockSpec((1, width), lambda i: (0, 0)))
    vary = _varying(operands)
    out_specs = [pl.BlockSpec((step, len(RowSums._fields)), lambda i: (i, 0))]
    out_shape = [jax.ShapeDtypeStruct((num_rows, len(RowSums._fields)), jnp.float32, **vary)]
    if program.gradient:
        out_specs.append(wide)
        out_shape.append(jax.ShapeDtypeStruct(logits.shape, logits.dtype, **vary))
    sweeps = 2 if program.gradient else 1
    traffic = sum(math.prod(each.shape) * each.dtype.itemsize for each in (*operands, *out_shape))
    sums, *gradient = pl.pallas_call(
        functools.partial(_step, program, num_classes),
        grid=(num_steps,),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=pl.CostEstimate(
            flops=6 * sweeps * logits.size, transcendentals=sweeps * logits.size, bytes_accessed=traffic
        ),
        name=NAME,
    )(*operands)
    return RowSums(*jnp.unstack(sums, axis=-1)), gradient[0] if gradient else None


def _varying(operands: list[Array]) -> dict[str, Any]:
    """Return over which axes of a mesh the results vary, where JAX's types say that."""
    axes = frozenset[str]().union(*(getattr(jax.typeof(operand), "vma", frozenset()) for operand in operands))
    return {"vma": axes} if axes else {}


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
        refs: labels [1, 1, R] int32, read; rows [R, 7] float32, read; logits [R, K], read; factor [1, K] float32, read,
            where there are class vectors; sums [R, 7] float32, written; gradient [R, K], written, where it is asked for.
    """
    labels, rows_ref, logits, *others = refs
    factor = others.pop(0) if program.masked or program.weighted else None
    sums_ref, gradient = others if program.gradient else (others[0], None)
    rows = Rows(*(rows_ref[:, i : i + 1] for i in range(len(Rows._fields))))
    vectors = _Vectors(program, num_classes, logits, factor)
    largest = _largest(vectors)
    sums = _sums(program, vectors, largest, rows, _at_labels(labels, logits))
    for i, values in enumerate(sums):
        sums_ref[:, i : i + 1] = values
    if gradient is not None:
        _write_gradient(program, vectors, rows, sums, labels, gradient)


class _Vectors:
    """The logits of a step, 128 classes at a time."""

    def __init__(self, program: Program, num_classes: int, logits: Any, factor: Any) -> None:
        self.program, self.num_classes, self.logits, self.factor = program, num_classes, logits, factor
        self.shape = logits.shape[0], LANES
        self.lanes = jax.lax.broadcasted_iota(jnp.int32, self.shape, 1)

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
        carries = [carry, carry]

        def visit_at(start: Any, i: int, carries: list[Any], *, last: bool = False) -> list[Any]:
            carries = list(carries)
            carries[i % 2] = visit(start, self(start, last=last), carries[i % 2])
            return carries

        def round_of(j: Any, carries: list[Any]) -> list[Any]:
            first = j * (of_round * LANES)
            for i in range(of_round):
                carries = visit_at(pl.multiple_of(first + i * LANES, LANES), i, carries)
            return carries

        carries = jax.lax.fori_loop(0, num_rounds, round_of, carries)
        for i in range(num_rounds * of_round, whole):
            carries = visit_at(i * LANES, i, carries)
        if self.num_classes % LANES:
            carries = visit_at(whole * LANES, whole, carries, last=True)
        return carries


def capped(program: Program, raw: Array) -> Array:
    """Return logits after the softcap."""
    return raw if program.softcap is None else program.softcap * jnp.tanh(raw / program.softcap)


def _gap(program: Program, vector: _Vector, largest: Array, peak: Array) -> tuple[Array, Array]:
    """Return m - z, and where the logit is the largest; of what takes no part, anything."""
    gap = peak - capped(program, vector.raw)
    if program.softcap is None:
        # Not where the logit equals the peak: of infinite ones the gap is NaN, and so must be the sum.
        return gap, gap <= 0
    is_largest = vector.raw >= largest
    return jnp.where(is_largest, 0.0, gap), is_largest


def _largest(vectors: _Vectors) -> Array:
    """Return the largest logit of each row before the softcap, [R, 1]."""

    def visit(_: Any, vector: _Vector, largest: Array) -> Array:
        raw = vector.raw if vector.allowed is None else jnp.where(vector.allowed, vector.raw, -jnp.inf)
        return jnp.maximum(largest, raw)

    first, second = vectors.sweep(visit, jnp.full(vectors.shape, -jnp.inf, jnp.float32))
    return jnp.max(jnp.maximum(first, second), axis=1, keepdims=True)


def _at_labels(labels: Any, logits: Any) -> Array:
    """Return the label's logit of each row, [R, 1]."""
    total = jnp.zeros((logits.shape[0], LANES), jnp.float32)
    for row in range(logits.shape[0]):
        start, here = _place(labels, logits.shape[0], row)
        total += jnp.where(here, logits[:, pl.ds(start, LANES)].astype(jnp.float32), 0.0)
    return jnp.sum(total, axis=1, keepdims=True)


def _place(labels: Any, num_rows: int, row: int) -> tuple[Array, Array]:
    """Return the start of the 128 classes of a row's label, and where in them it is."""
    rows, lanes = (jax.lax.broadcasted_iota(jnp.int32, (num_rows, LANES), i) for i in (0, 1))
    label = labels[0, 0, row]
    start = pl.multiple_of((label >> 7) << 7, LANES)
    return start, (rows == row) & (lanes == label - start)


def _sums(program: Program, vectors: _Vectors, largest: Array, rows: Rows, at_label: Array) -> RowSums:
    peak, label = _wide(capped(program, largest)), _wide(rows.label)
    wide_largest = _wide(largest)
    zero = jnp.zeros(vectors.shape, jnp.float32)

    def visit(_: Any, vector: _Vector, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        rest, num_largest, gaps, largest_mass, correct = carry
        gap, is_largest = _gap(program, vector, wide_largest, peak)
        term = jnp.exp(-gap)
        if vector.allowed is not None:
            gap, term = jnp.where(vector.allowed, gap, 0.0), jnp.where(vector.allowed, term, 0.0)
            is_largest &= vector.allowed
        if program.largest and program.weighted:
            largest_mass += jnp.where(is_largest, vector.weight, 0.0)
        if program.correct:
            score = jnp.where(vector.classes == label, 1.0, jnp.where(vector.classes < label, -1.0, 0.0))
            correct += jnp.where(is_largest, score, 0.0)
        if program.without_label:
            gap = jnp.where(vector.classes == label, 0.0, gap)
        if vector.weight is not None:
            weight = vector.weight
            if vector.allowed is not None:
                weight = jnp.where(vector.allowed, weight, 0.0)
            gap = jnp.where(weight == 0.0, 0.0, weight * gap)
        # The largest terms are all 1. To leave them out keeps the accuracy of small losses.
        rest += jnp.where(is_largest, 0.0, term)
        return rest, num_largest + jnp.where(is_largest, 1.0, 0.0), gaps + gap, largest_mass, correct

    one, other = vectors.sweep(visit, (zero,) * 5)
    rest, num_largest, gaps, largest_mass, correct = (
        jnp.sum(a + b, axis=1, keepdims=True) for a, b in zip(one, other, strict=True)
    )
    return RowSums(
        largest=largest,
        rest=rest + (num_largest - 1.0),
        gaps=gaps,
        at_label=at_label,
        num_largest=num_largest,
        largest_mass=largest_mass if program.weighted else num_largest,
        correct=correct,
    )


def _write_gradient(
    program: Program, vectors: _Vectors, rows: Rows, sums: RowSums, labels: Any, gradient: Any
) -> None:
    peak = capped(program, sums.largest)
    largest, wide_peak = _wide(sums.largest), _wide(peak)
    mass = rows.mass
    if program.largest:
        share = quotient_of_products(rows.at_max, sums.num_largest)
        mass += share * sums.largest_mass
        at_max = _wide(rows.upstream * share)
    if program.z_loss:
        mass += 2 * program.z_loss * (peak + log1p_of_basic_operations(sums.rest))
    of_softmax = _wide(quotient_of_products(mass, 1.0 + sums.rest) * rows.upstream)
    on, off = _wide(rows.on * rows.upstream), _wide(rows.off * rows.upstream)
    counted = _wide(rows.counted) > 0 if program.counted else None

    def of_vector(vector: _Vector, target: Array) -> Array:
        gap, is_largest = _gap(program, vector, largest, wide_peak)
        if program.largest:
            added = at_max if vector.weight is None else at_max * vector.weight
            target += jnp.where(is_largest, added, 0.0)
        result = of_softmax * jnp.exp(-gap) - target
        if program.softcap is not None:
            ratio = jnp.tanh(vector.raw / program.softcap)
            result *= 1.0 - ratio * ratio
        if vector.allowed is not None:
            result = jnp.where(vector.allowed, result, 0.0)
        return result if counted is None else jnp.where(counted, result, 0.0)

    def visit(start: Any, vector: _Vector, carry: Any) -> Any:
        result = of_vector(vector, off if vector.weight is None else off * vector.weight)
        gradient[:, pl.ds(start, LANES)] = result.astype(gradient.dtype)
        return carry

    vectors.sweep(visit, ())
    for row in range(vectors.shape[0]):
        start, here = _place(labels, vectors.shape[0], row)
        place = pl.ds(start, LANES)
        # Labels are within the mask, or their row is NaN.
        result = of_vector(vectors(start), on)
        kept = gradient[:, place].astype(jnp.float32)
        gradient[:, place] = jnp.where(here, result, kept).astype(gradient.dtype)


def _wide(values: Array) -> Array:
    """Return one number for each row as vectors."""
    return jnp.broadcast_to(values, (values.shape[0], LANES))
