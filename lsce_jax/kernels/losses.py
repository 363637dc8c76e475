"""The dense loss as primitives, which a Pallas kernel computes on TPUs, and the fused implementation elsewhere.

- `lsce_loss`: the loss of each row, and the sums over the classes that make it up.
- `lsce_loss_slope`: its derivative for a tangent of the logits, in forward mode: always that of the fused
  implementation, from the sums.
- `lsce_loss_gradient`: the transpose of that, which reverse mode needs: the gradient with respect to the logits.

For a sum or a mean, the kernel computes loss and gradient together, from one read of the logits. But JAX asks for them
one after the other: the loss on the way forward, the gradient on the way back, when the incoming gradient is known. So
both primitives become the same call of the kernel, on the way forward for an incoming gradient of 1. In the program of
`jax.value_and_grad` it is 1, and XLA computes equal calls once. Nothing as large as the logits is kept between them.
For any other incoming gradient, the kernel runs twice.

Losses without a reduction have an incoming gradient for each row. The kernel computes the sums on the way forward, and
the gradient, with the sums again, on the way back.

Whether a program is for a TPU is known when it is lowered. Derivatives with respect to anything but the logits, those
of higher order and vmap are those of the fused implementation.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from lsce_jax import fused, reference
from lsce_jax.accurate import divide
from lsce_jax.errors import error
from lsce_jax.inputs import Batch, at_labels, is_sharded, varying_like
from lsce_jax.kernels import tpu
from lsce_jax.keywords import Kernel
from lsce_jax.primitives import define, is_divided
from lsce_jax.reductions import reduce_losses
from lsce_jax.row_sums import cotangents_of_sums, row_slopes, row_sums
from lsce_jax.stats import LossStats
from lsce_jax.sum_rules import is_tangent, no_tangents
from lsce_jax.sums import Peaks, Sums, class_factor, in_gap_units
from lsce_spec import LossOptions, is_number, smoothing_weights

NAME: Kernel = get_args(Kernel)[0]
NOT_A_TPU = "it runs on TPUs, and on others inside jax.experimental.pallas.tpu.force_tpu_interpret_mode() alone"
_logger = logging.getLogger("lsce_jax")

Divisor = float | Float[Array, ""]
Arrays = dict[str, Array]  # of a batch, and the divisor, by name

# Fewer classes than this, or fewer logits: XLA's program has fewer instructions, or holds them in the core's memory.
FEWEST_CLASSES, FEWEST_LOGITS = 8192, 2**22
# Labels are compared with classes as float32 numbers.
_MOST_CLASSES = 2**24
# Rows of logits in memory come in groups of this many, and groups are filled up where the last batch dimension ends.
_SUBLANES = 8


@dataclass(frozen=True)
class _Call:
    """What is fixed when JAX traces a call.

    Args:
        options: its options, without the smoothing.
        smoothing: a number; None if it is an array.
        divisor: likewise.
        with_stats: whether the sums are to have what statistics need.
        kernel: where the kernel is used: on TPUs where it can be; on TPUs, or it is an error; or everywhere, since
            Pallas interprets it.
    """

    options: LossOptions
    smoothing: float | None
    divisor: float | None
    with_stats: bool
    kernel: Literal["chosen", "forced", "interpreted"]

    def batch(self, arrays: Arrays) -> Batch:
        """Return the batch that the arrays are from."""
        names = ("logits", "labels", "counted", "bad", "prior", "class_weight", "class_mask")
        of_batch: dict[str, Any] = {name: arrays.get(name) for name in names}
        return Batch(smoothing=arrays["smoothing"] if self.smoothing is None else self.smoothing, **of_batch)

    def reduced(self, arrays: Arrays, losses: Array) -> Array:
        """Return the reduced losses."""
        return reduce_losses(losses, self.options, arrays["divisor"] if self.divisor is None else self.divisor)

    def of_sums(self, arrays: Arrays, peaks: Peaks, sums: Sums) -> Array:
        """Return the reduced loss, from the sums."""
        batch = self.batch(arrays)
        targets = fused.make_targets(batch, self.options)
        return self.reduced(arrays, fused.losses_of_sums(batch, self.options, targets, peaks, sums)[0])


class _Results(NamedTuple):
    """The loss, and what it is made of, which counts as constant."""

    loss: Array
    peaks: Peaks
    sums: Sums


def loss_and_stats(
    batch: Batch, options: LossOptions, with_stats: bool, divisor: Divisor
) -> tuple[Array, LossStats | None]:
    """Return the reduced loss, and statistics if asked for.

    Args:
        batch: the rows.
        options: the options of the loss; with `implementation="pallas"` the kernel is used, or it is an error.
        with_stats: whether to return statistics.
        divisor: what a mean divides by.

    Raises:
        ValueError: the kernel cannot compute this call, and no other was allowed.
    """
    given = {"smoothing": batch.smoothing, "divisor": divisor}
    numbers = {name: float(value) if is_number(value) else None for name, value in given.items()}
    forced = options.implementation is not None
    call = _Call(
        options=replace(options, smoothing=0.0),
        smoothing=numbers["smoothing"],
        divisor=numbers["divisor"],
        with_stats=with_stats,
        kernel="interpreted" if forced and _is_interpreted() else "forced" if forced else "chosen",
    )
    arrays = {name: getattr(batch, name) for name in Batch.__dataclass_fields__} | given
    results = _loss(
        call, {name: array for name, array in arrays.items() if numbers.get(name) is None and array is not None}
    )
    if not with_stats:
        return results.loss, None
    peaks, sums = jax.lax.stop_gradient((results.peaks, results.sums))
    return results.loss, fused.losses_of_sums(batch, options, fused.make_targets(batch, options), peaks, sums)[1]


def why_not(batch: Batch, options: LossOptions) -> str | None:
    """Return why the kernel cannot compute a call, or None."""
    logits = batch.logits
    if batch.has_row_masks:
        return "rows have class masks of their own, and the kernel takes one for all rows"
    if batch.soft:
        return "labels are class probabilities, and the kernel takes class indices"
    if logits.dtype.name not in {"float32", "bfloat16"}:
        return f"logits are {logits.dtype}, and the kernel takes float32 and bfloat16"
    if is_sharded(logits):
        return "the type of the logits divides them over devices; inside jax.shard_map it does not"
    return _why_not_so_many(batch, options)


def _why_not_so_many(batch: Batch, options: LossOptions) -> str | None:
    """Return why the kernel cannot compute logits of this shape, or None."""
    shape, dtype = batch.logits.shape, batch.logits.dtype
    if not all(isinstance(size, int) for size in shape):
        return f"logits have the symbolic shape {list(shape)}"
    if 0 in shape:
        return f"logits have the shape {list(shape)}, and no rows"
    program = _program(batch, options, with_stats=True, gradient=True)
    if shape[-1] > _MOST_CLASSES or tpu.step_of(shape[-1], dtype, program) is None:
        return f"8 rows of {shape[-1]} classes in {dtype} do not fit the 16 MiB of a core's VMEM"
    return None


def why_passed_over(batch: Batch, options: LossOptions, *, differentiable: bool, class_axis: int) -> str | None:
    """Return why a call does not become a `lsce_loss`, which on a TPU is the kernel; or None.

    Args:
        batch: the rows.
        options: the options of the loss.
        differentiable: whether gradients flow through the statistics.
        class_axis: where the caller's logits have their classes.

    Raises:
        ValueError: the kernel was asked for, and cannot compute the call.
    """
    if options.implementation not in {None, NAME}:
        return "another implementation was asked for"
    reason = why_not(batch, options)
    if differentiable:
        reason = "the statistics are to be differentiable, and the kernel computes the gradient of the loss alone"
    if options.implementation == NAME and reason is not None:
        raise _refusal(reason)
    if options.implementation is None:
        reason = reason or _why_fused_wins(batch, class_axis)
    if reason is not None:
        _logger.debug("dense loss: fused, since %s", reason)
    return reason


def _refusal(reason: str) -> Exception:
    return error("kernel", name=repr(NAME), reason=reason, instead="'fused'")


def _why_fused_wins(batch: Batch, class_axis: int) -> str | None:
    """Return why the fused implementation is faster than the kernel, or None."""
    *batch_shape, num_classes = batch.logits.shape
    if class_axis not in {-1, len(batch_shape)}:
        return f"the classes are at axis {class_axis}, and the kernel would need a copy with the classes last"
    if num_classes < FEWEST_CLASSES or batch.logits.size < FEWEST_LOGITS:
        return f"{math.prod(batch_shape)} rows of {num_classes} classes are few"
    if len(batch_shape) > 1 and batch_shape[-1] % _SUBLANES:
        return f"rows come in groups of {batch_shape[-1]}, and TPUs keep 8 together: to join the groups is to copy them"
    return None


def _is_interpreted() -> bool:
    """Whether Pallas is told to interpret kernels for TPUs."""
    describe: Any = jax.ShapeDtypeStruct
    shape = describe((8, tpu.LANES), jnp.float32)
    (call,) = jax.make_jaxpr(pl.pallas_call(lambda _: None, out_shape=shape))().eqns
    return bool(call.params["interpret"])


# --- Formulas of the primitives -------------------------------------------------------------------------------------


def _plain(call: _Call, arrays: Arrays, *, differentiated: bool = False) -> _Results:
    """Return what the fused implementation computes."""
    del differentiated  # the same either way
    peaks, sums = row_sums(fused.make_operands(call.batch(arrays), call.options, call.with_stats))
    return _Results(call.of_sums(arrays, peaks, sums), peaks, sums)


def _plain_loss(call: _Call, arrays: Arrays, logits: Array) -> Array:
    return _plain(call, {**arrays, "logits": logits}).loss


def _plain_slope(call: _Call, arrays: Arrays, peaks: Peaks, sums: Sums, tangent: Array) -> Array:
    """Return the tangent of the loss, from sums that are known."""
    operands = fused.make_operands(call.batch(arrays), call.options, call.with_stats)
    slopes = row_slopes(operands, peaks, {"logits": tangent})
    result: Array = jax.jvp(partial(call.of_sums, arrays, peaks), (sums,), (slopes,))[1]
    return result


def _plain_gradient(call: _Call, arrays: Arrays, peaks: Peaks, sums: Sums, upstream: Array) -> Array:
    """Return the gradient with respect to the logits, from sums that are known."""
    operands = fused.make_operands(call.batch(arrays), call.options, call.with_stats)
    (of_sums,) = jax.vjp(partial(call.of_sums, arrays, peaks), sums)[1](upstream)
    gradient: Array = cotangents_of_sums(operands, peaks, dict(enumerate(jax.tree.leaves(of_sums))), ["logits"])[
        "logits"
    ]
    return gradient


def _whole_slope(call: _Call, arrays: Arrays, _peaks: Peaks, _sums: Sums, tangent: Array) -> Array:
    """Return the tangent of the loss, as a function of everything that it depends on."""
    slope: Array = jax.jvp(partial(_plain_loss, call, arrays), (arrays["logits"],), (tangent,))[1]
    return slope


def _whole_gradient(call: _Call, arrays: Arrays, _peaks: Peaks, _sums: Sums, upstream: Array) -> Array:
    """Return the gradient with respect to the logits, as a function of everything that it depends on."""
    gradient: tuple[Array] = jax.vjp(partial(_plain_loss, call, arrays), arrays["logits"])[1](upstream)
    return gradient[0]


# --- The same by the kernel -----------------------------------------------------------------------------------------


def _by_kernel(call: _Call, arrays: Arrays, *, differentiated: bool) -> _Results:
    has_gradient = differentiated and call.options.reduction != "none"
    peaks, sums, _ = _run_kernel(call, arrays, jnp.ones_like if has_gradient else None)
    return _Results(call.of_sums(arrays, peaks, sums), peaks, sums)


def _gradient_by_kernel(call: _Call, arrays: Arrays, _peaks: Peaks, _sums: Sums, upstream: Array) -> Array:
    gradient = _run_kernel(call, arrays, lambda _: upstream)[2]
    assert gradient is not None
    return gradient


def _run_kernel(
    call: _Call, arrays: Arrays, upstream: Callable[[Array], Array] | None
) -> tuple[Peaks, Sums, Array | None]:
    """Return the sums, and the gradient with respect to the logits.

    Args:
        call: the call.
        arrays: its arrays.
        upstream: returns the incoming gradient, given an array of the loss's type; None for no gradient.
    """
    batch, options = call.batch(arrays), call.options
    program = _program(batch, options, call.with_stats, gradient=upstream is not None)
    others = _over_others(batch, options)
    targets = fused.make_targets(batch, options)
    at_label, off, mass = fused.weighted_target(batch, targets, others)
    of_rows: Any = 0
    if upstream is not None:
        # Losses of the right type; a sum and a mean are linear in them.
        losses = batch.logits[..., 0].astype(batch.dtype)
        reduced, pull_back = jax.vjp(partial(call.reduced, arrays), losses)
        (of_rows,) = pull_back(upstream(reduced))
    at_max: Any = 0 if targets.at_max is None else jnp.where(jnp.asarray(batch.bad), 0, targets.at_max)
    counted: Any = 1 if batch.counted is None else batch.counted
    weight = _label_weight(batch)
    given = tpu.Rows(batch.labels, at_label, off, mass, at_max, of_rows, weight, counted)
    num_classes = batch.logits.shape[-1]
    kept, gradient = tpu.sums_and_gradient(
        program,
        batch.logits.reshape(-1, num_classes),
        batch.labels.astype(jnp.int32).ravel(),
        tpu.Rows(*(jnp.broadcast_to(jnp.asarray(each, batch.dtype), batch.batch_shape).ravel() for each in given)),
        _factor(batch),
    )
    row_values = tpu.RowSums(*(values.reshape(batch.batch_shape) for values in kept))
    peaks, sums = _named(batch, program, row_values, others)
    return peaks, sums, None if gradient is None else gradient.reshape(batch.logits.shape)


def _program(batch: Batch, options: LossOptions, with_stats: bool, *, gradient: bool) -> tpu.Program:
    return tpu.Program(
        softcap=options.softcap,
        z_loss=options.z_loss,
        masked=batch.class_mask is not None,
        weighted=batch.prior is not None or batch.class_weight is not None,
        without_label=_label_may_have_less(batch, options),
        largest=options.convention.at_max is not None,
        stats=with_stats,
        counted=batch.counted is not None,
        gradient=gradient,
    )


def _label_may_have_less(batch: Batch, options: LossOptions) -> bool:
    """Whether the target may be less at the label than elsewhere.

    If not, the sum of all gaps is accurate enough, less that of the label.
    """
    if batch.prior is not None:
        return False
    if not is_number(batch.smoothing) or batch.class_mask is not None:
        return True
    on, off = smoothing_weights(options.convention, batch.smoothing, batch.logits.shape[-1])
    return bool(on < off)


def _factor(batch: Batch) -> Array | None:
    """Return the factor of `off` at each class, NaN for classes outside the mask."""
    factor = class_factor(batch.prior, batch.class_weight)
    if batch.class_mask is None:
        return factor
    return jnp.where(batch.class_mask, 1 if factor is None else factor, jnp.nan).astype(batch.dtype)


def _label_weight(batch: Batch) -> Array:
    """Return the factor of `off` at each label."""
    factor = class_factor(batch.prior, batch.class_weight)
    return jnp.ones(batch.batch_shape, batch.dtype) if factor is None else at_labels(factor, batch.labels)


def _over_others(batch: Batch, options: LossOptions) -> Sums:
    """Return the sums over the other classes that do not depend on the logits."""

    def total(vector: Array | None) -> Array | None:
        if vector is None:
            return None
        values = vector if batch.class_mask is None else jnp.where(batch.class_mask, vector, 0)
        none = jnp.zeros_like(values[:1])
        # From both ends: the sum of all, less the label's, would lose what is small beside it.
        before = jnp.concatenate([none, jnp.cumsum(values)[:-1]])
        after = jnp.concatenate([jnp.cumsum(values[::-1])[::-1][1:], none])
        return at_labels(before, batch.labels) + at_labels(after, batch.labels)

    prior, zero = batch.prior, jnp.zeros(batch.batch_shape, batch.dtype)
    entropy = None
    if prior is not None and options.subtract_entropy:
        entropy = reference.entropy_of(jnp.where(prior == 0, 1, prior))
    return Sums(
        rest=zero,
        label_gap=zero,
        other_gaps=zero,
        other_mass=total(class_factor(prior, batch.class_weight)),
        other_prior=total(None if batch.class_weight is None else prior),
        other_entropy=total(entropy),
        weighted_gaps=None,
        largest_gap=None,
        largest_mass=None,
    )


def _named(batch: Batch, program: tpu.Program, kept: tpu.RowSums, others: Sums) -> tuple[Peaks, Sums]:
    """Return what the kernel returns as the fused implementation has it."""
    peak, at_label = tpu.capped(program, kept.largest), tpu.capped(program, kept.at_label)
    label_gap = peak - at_label
    if program.softcap is not None:
        label_gap = jnp.where(kept.at_label >= kept.largest, 0, label_gap)
    other_gaps = kept.gaps
    if not program.without_label:
        weight = _label_weight(batch)
        # Where the label's gap is infinite, so is the loss, whatever the others are.
        less_label = jnp.where(jnp.isinf(label_gap), 0, other_gaps - weight * in_gap_units(label_gap))
        other_gaps = jnp.where(weight == 0, other_gaps, less_label)
    largest = program.largest
    num_largest, first = kept.num_largest if largest else None, kept.first.astype(jnp.int32) if program.stats else None
    peaks = Peaks(peak, kept.largest, num_largest, first)
    sums = others._replace(
        rest=kept.rest,
        label_gap=label_gap,
        other_gaps=other_gaps,
        weighted_gaps=kept.weighted_gaps if program.stats else None,
        largest_gap=jnp.zeros_like(peak) if largest else None,
        largest_mass=divide(kept.largest_mass, kept.num_largest) if largest else None,
    )
    if batch.counted is None:
        return peaks, sums
    counted = batch.counted
    # What is in a row that does not count may be NaN, which must not reach a derivative.
    of_rows: tuple[Peaks, Sums] = jax.tree.map(lambda each: jnp.where(counted, each, 0), (peaks, sums))
    return of_rows


# --- The primitives -------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def _loss(call: _Call, arrays: Arrays) -> _Results:
    leaves, structure = jax.tree.flatten((arrays,))
    params = {"structure": structure, "call": call}
    results = _bind(_loss_p, varying_like(leaves, leaves), differentiated=False, **params)  # see `sum_rules.bind`
    named: _Results = _unflatten_results(call, arrays, results)
    return named


def _unflatten_results(call: _Call, arrays: Arrays, leaves: Sequence[Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(partial(_plain, call), arrays)), leaves)


Axes = tuple[tuple[int | None, ...], ...]  # of the leaves, for each vmap


def _on_leaves(function: Callable[..., Any]) -> Callable[..., list[Array]]:
    """Return a function of the leaves of its arguments, which returns the leaves of its results.

    With `axes` it is mapped over these, for one vmap after the other.
    """

    def of_leaves(*leaves: Array, structure: Any, call: _Call, axes: Axes = ()) -> list[Array]:
        def once(*leaves: Array) -> list[Array]:
            results: list[Array] = jax.tree.leaves(function(call, *jax.tree.unflatten(structure, leaves)))
            return results

        mapped: Callable[..., list[Array]] = once
        for in_axes in axes:
            mapped = jax.vmap(mapped, in_axes=in_axes)
        return mapped(*leaves)

    return of_leaves


def _of_loss(function: Callable[..., _Results]) -> Callable[..., list[Array]]:
    def of_leaves(*leaves: Array, structure: Any, call: _Call, differentiated: bool) -> list[Array]:
        return _on_leaves(partial(function, differentiated=differentiated))(*leaves, structure=structure, call=call)

    return of_leaves


_loss_p = define("lsce_loss", _of_loss(_plain), multiple_results=True)
_slope_p = define("lsce_loss_slope", _on_leaves(_plain_slope), multiple_results=True)
_gradient_p = define("lsce_loss_gradient", _on_leaves(_plain_gradient), multiple_results=True)


def _derivative(
    primals: Sequence[Array], tangents: Sequence[Any], *, structure: Any, call: _Call, differentiated: bool
) -> tuple[list[Array], list[Any]]:
    del differentiated
    (arrays,) = jax.tree.unflatten(structure, primals)
    given = {name: tangents[i] for name, i in _indices(structure)[0].items() if is_tangent(tangents[i])}
    if set(given) == {"logits"}:
        leaves = _bind(_loss_p, primals, structure=structure, call=call, differentiated=True)
        results = _unflatten_results(call, arrays, leaves)
        operands, of_slope = jax.tree.flatten((arrays, results.peaks, results.sums, given["logits"]))
        (slope,) = _bind(_slope_p, operands, structure=of_slope, call=call, axes=())
    else:
        by = {name: arrays[name] for name in given}
        results, slopes = jax.jvp(lambda by: _plain(call, {**arrays, **by}), (by,), (given,))
        leaves, slope = jax.tree.leaves(results), slopes.loss
    return leaves, [slope, *no_tangents((results.peaks, results.sums))]


def _bind(primitive: Primitive, leaves: Sequence[Any], **params: Any) -> list[Array]:
    results: list[Array] = primitive.bind(*leaves, **params)  # type: ignore[no-untyped-call]
    return results


def _indices(structure: Any) -> list[Any]:
    """Return the arguments of a primitive as the indices of their leaves."""
    indices: list[Any] = jax.tree.unflatten(structure, list(range(structure.num_leaves)))
    return indices


def _derivative_of(primitive: Primitive, whole: Callable[..., Array]) -> Callable[..., Any]:
    """Return the derivative of a primitive that takes arrays, peaks, sums and an operand that it is linear in.

    The sums are functions of the arrays. So the derivative is that of the whole function, which computes them anew.
    """

    def rule(
        primals: Sequence[Array], tangents: Sequence[Any], *, structure: Any, call: _Call, axes: Axes
    ) -> tuple[list[Array], list[Array]]:
        results = _bind(primitive, primals, structure=structure, call=call, axes=axes)
        arrays, _, _, operand = _indices(structure)
        given = {i: tangents[i] for i in (*arrays.values(), operand) if is_tangent(tangents[i])}

        @jax.checkpoint
        def of_given(by: dict[int, Array]) -> list[Array]:
            leaves = [by.get(i, primal) for i, primal in enumerate(primals)]
            return _on_leaves(whole)(*leaves, structure=structure, call=call, axes=axes)

        return results, jax.jvp(of_given, ({i: primals[i] for i in given},), (given,))[1]

    return rule


def _transpose_of_slope(
    cotangents: Sequence[Any], *operands: Any, structure: Any, call: _Call, axes: Axes
) -> list[Any]:
    (upstream,) = cotangents
    nothing = [None] * (len(operands) - 1)
    if isinstance(upstream, ad.Zero):
        return [*nothing, None]
    # The tangent is the last leaf. Where it was mapped over its first axis, so is what comes for the result.
    given, of_gradient = jax.tree.flatten((*jax.tree.unflatten(structure, operands)[:-1], upstream))
    return [*nothing, *_bind(_gradient_p, given, structure=of_gradient, call=call, axes=axes)]


def _loss_under_vmap(leaves: Sequence[Array], dims: Sequence[int | None], **params: Any) -> tuple[Any, Any]:
    results = jax.vmap(partial(_of_loss(_plain), **params), in_axes=tuple(dims))(*leaves)
    return results, [0] * len(results)


def _under_vmap(
    primitive: Primitive, leaves: Sequence[Array], dims: Sequence[int | None], *, axes: Axes, **params: Any
) -> tuple[list[Array], list[int]]:
    """Map over the first axis of the last operand, too, in which the primitive is linear, so that the transpose can."""
    size = next(leaf.shape[dim] for leaf, dim in zip(leaves, dims, strict=True) if dim is not None)
    *others, operand = leaves
    dim = dims[-1]
    operand = jnp.broadcast_to(operand, (size, *operand.shape)) if dim is None else jnp.moveaxis(operand, dim, 0)
    results = _bind(primitive, (*others, operand), axes=(*axes, (*dims[:-1], 0)), **params)
    return results, [0] * len(results)


ad.primitive_jvps[_loss_p] = _derivative
ad.primitive_jvps[_slope_p] = _derivative_of(_slope_p, _whole_slope)
ad.primitive_jvps[_gradient_p] = _derivative_of(_gradient_p, _whole_gradient)
ad.primitive_transposes[_slope_p] = _transpose_of_slope
batching.primitive_batchers[_loss_p] = _loss_under_vmap
batching.primitive_batchers[_slope_p] = partial(_under_vmap, _slope_p)
batching.primitive_batchers[_gradient_p] = partial(_under_vmap, _gradient_p)


def _lower(
    platform: str | None,
    plain: Callable[..., Any],
    by_kernel: Callable[..., Any],
    ctx: Any,
    *operands: Any,
    **params: Any,
) -> Any:
    """Lower a primitive for a platform, None for any that is not a TPU, by the kernel where it is to be used."""
    call: _Call = params["call"]
    reason = _why_not_here(platform, ctx)
    if params.get("axes"):
        reason = "it is mapped over by jax.vmap"
    elif call.kernel == "interpreted":
        reason = None
    elif reason is not None and call.kernel == "forced":
        raise _refusal(reason)
    if platform == "tpu":
        _logger.debug("dense loss on a TPU: %s", "the kernel" if reason is None else f"fused, since {reason}")
    return mlir.lower_fun(by_kernel if reason is None else plain, multiple_results=True)(ctx, *operands, **params)


def _types_and_effects(
    plain: Callable[..., Any], by_kernel: Callable[..., Any], *operands: Any, **params: Any
) -> tuple[list[Any], Any]:
    """Return the types of a primitive's results, and its effects: Pallas's interpreter has some."""
    is_interpreted = params["call"].kernel == "interpreted" and not params.get("axes")
    program = jax.make_jaxpr(partial(by_kernel if is_interpreted else plain, **params))(*operands)
    return program.out_avals, program.effects


def _why_not_here(platform: str | None, ctx: Any) -> str | None:
    """Return why a program cannot have the kernel on a platform, or None."""
    if platform != "tpu":
        return NOT_A_TPU
    if is_divided(ctx):
        return "the compiler divides the program over devices, and no kernel; inside jax.shard_map it need not"
    return None


for _primitive, _formula, _kernel in (
    (_loss_p, _of_loss(_plain), _of_loss(_by_kernel)),
    (_gradient_p, _on_leaves(_plain_gradient), _on_leaves(_gradient_by_kernel)),
):
    _primitive.def_effectful_abstract_eval(partial(_types_and_effects, _formula, _kernel))  # type: ignore[no-untyped-call]
    for _platform in (None, "tpu"):
        mlir.register_lowering(_primitive, partial(_lower, _platform, _formula, _kernel), platform=_platform)
