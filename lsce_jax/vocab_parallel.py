r"""The loss where the class dimension is divided over the devices of an axis: no device has all logits of a row.

A loss is made of a few sums over the classes, relative to the largest logit (see fused.py). So each device sums over
its own classes, and what it sends is a few numbers for each row:

1. the largest logit of its classes, of which all devices take the maximum,
2. its sums relative to that maximum, which all devices add up. They are one array, and so one collective.

The number of classes, and what a convention makes of it, is that of all devices. A device leaves out one of its terms
exp(z - m) that are 1 if it has one; the sum over the devices is corrected by how many did. So small losses keep their
accuracy, as they do on one device.

The maximum counts as a constant. The transpose of a sum over devices sends nothing, if JAX knows that the result is the
same on all of them, as it does in `jax.shard_map` by default. So the gradient of the logits needs no collective.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from lsce_jax import chunked, fused, reference
from lsce_jax.accurate import log1p
from lsce_jax.errors import error
from lsce_jax.inputs import (
    Batch,
    Whole,
    as_array,
    as_last_axis,
    at_labels,
    is_sharded,
    on_automatic_axes,
    prepare,
    raise_bad_label,
    within_int32,
)
from lsce_jax.keywords import (
    VocabParallelKeywords,
    VocabParallelLinearKeywords,
    VocabParallelLinearStatsKeywords,
    VocabParallelStatsKeywords,
)
from lsce_jax.layer import Layer, LayerOperands
from lsce_jax.layer_sums import by_chunks
from lsce_jax.linear import prepare_layer
from lsce_jax.reductions import mean_divisor, reduce_losses
from lsce_jax.stats import LossStats
from lsce_jax.sums import (
    MASSLESS,
    NO_CLASS,
    Operands,
    Peaks,
    Sums,
    capped,
    in_gap_units,
    is_label,
    largest_logits,
    peaks_at,
    sums_at,
)
from lsce_spec import GAP_UNIT, OF_SHARD, ChunkOptions, LossOptions, check_axis, check_flag, check_logits, is_floating
from lsce_spec.keywords import takes

AxisName = str | tuple[str, ...]


@takes(VocabParallelKeywords)
def vocab_parallel_label_smoothed_cross_entropy(
    local_logits: Float[ArrayLike, "..."],
    labels: Int[ArrayLike, "..."] | Float[ArrayLike, "..."],
    *,
    axis_name: AxisName,
    **keywords: Unpack[VocabParallelKeywords],
) -> Float[Array, "..."]:
    """Return `label_smoothed_cross_entropy` of logits whose classes are divided over the devices of an axis.

    For use inside `jax.shard_map`, or inside `jax.vmap` or `jax.pmap` with an `axis_name`. Device i of the axis has the
    i-th run of consecutive classes, and all runs have the same length. For a vocabulary that does not divide, fill up
    the last one, and leave the classes that were added out with `class_mask`.

    The loss is the same on every device of the axis. Forward it takes one maximum of a number for each row, and one sum
    of a few numbers for each row; the gradient takes no collective.

    Args:
        local_logits: the logits of this device's classes, of shape [..., K / n, ...] on an axis of n devices.
        labels: indices from 0 to K - 1, the same on every device; or this device's slice of the class probabilities.
        axis_name: of the axis, or a tuple of several, over which the classes are divided.
        prior, class_weight, class_mask: this device's slices. The values of a prior are not checked.
        smoothing, where, denominator: the same on every device of the axis.
        convention, axis, ignore_index, z_loss, softcap, subtract_entropy, bad_labels, reduction: see
            `label_smoothed_cross_entropy`. The number of classes, and every mean over them, is that of all devices.

    Returns:
        Losses, with `reduction="none"` of the shape of the logits without `axis`, else a scalar. float64 for
        float64 logits, otherwise float32. The gradient has the dtype of the logits. It is that of one loss, except
        inside `shard_map(..., check_vma=False)`, vmap and pmap: there JAX takes the results of the n devices for
        results of their own, and `jax.grad` gives the gradient of their sum, n times that of the loss. Differentiate
        the mapped function instead, or divide the loss by `jax.lax.axis_size`.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, value out of range, options that exclude each other, or no axis of that name.
        IndexError: a label outside the classes, with `bad_labels="raise"` (needs `jax.experimental.checkify`).

    Example: on a laptop, XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight devices of the CPU.
        >>> from functools import partial
        >>> import jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((jax.device_count(),), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> @jax.jit
        ... @partial(jax.shard_map, mesh=mesh, in_specs=(jax.P(None, "model"), jax.P()), out_specs=jax.P())
        ... def mean_loss(local_logits, labels):
        ...     return vocab_parallel_label_smoothed_cross_entropy(
        ...         local_logits, labels, axis_name="model", reduction="mean"
        ...     )
        >>> logits, labels = jnp.zeros((2, 3 * jax.device_count())), jnp.array([0, 2])
        >>> loss, gradient = jax.value_and_grad(mean_loss)(logits, labels)
        >>> bool(jnp.isclose(loss, jnp.log(logits.shape[1]))), gradient.shape == logits.shape
        (True, True)

    References:
        Classes divided over devices: Shoeybi et al., "Megatron-LM", 2019, arXiv:1909.08053, section 3. There each
        device smooths over its own classes; here over all of them.
    """
    return _evaluate(local_logits, labels, axis_name, keywords, with_stats=False)[0]


@takes(VocabParallelStatsKeywords)
def vocab_parallel_label_smoothed_cross_entropy_with_stats(
    local_logits: Float[ArrayLike, "..."],
    labels: Int[ArrayLike, "..."] | Float[ArrayLike, "..."],
    *,
    axis_name: AxisName,
    **keywords: Unpack[VocabParallelStatsKeywords],
) -> tuple[Float[Array, "..."], LossStats]:
    """Return the loss of `vocab_parallel_label_smoothed_cross_entropy` and statistics of each row.

    It takes one more collective, a minimum: which class is the first largest.

    Args:
        local_logits: see `vocab_parallel_label_smoothed_cross_entropy`.
        labels: see `vocab_parallel_label_smoothed_cross_entropy`.
        axis_name: see `vocab_parallel_label_smoothed_cross_entropy`.
        differentiable: whether gradients flow through nll, lse and entropy, for losses made of them.
        keywords: the options of `vocab_parallel_label_smoothed_cross_entropy`, with the same defaults.

    Returns:
        The loss, reduced as asked, and `LossStats` with one value per row, over all classes and the same on every
        device of the axis; see `label_smoothed_cross_entropy_with_stats`.

    Raises:
        TypeError, ValueError, IndexError: see `vocab_parallel_label_smoothed_cross_entropy`.

    Example: four classes on an axis of two, in a program for one device.
        >>> import jax, jax.numpy as jnp
        >>> def with_stats(local_logits):
        ...     return vocab_parallel_label_smoothed_cross_entropy_with_stats(
        ...         local_logits, jnp.array([3]), axis_name="model"
        ...     )
        >>> _, stats = jax.jit(jax.vmap(with_stats, axis_name="model"))(jnp.array([[[0.0, 1.0]], [[2.0, 5.0]]]))
        >>> stats.prediction.tolist(), f"{stats.nll[0, 0]:.4f}"
        ([[3], [3]], '0.0722')
    """
    differentiable = keywords.pop("differentiable")
    loss, stats = _evaluate(local_logits, labels, axis_name, keywords, with_stats=True, differentiable=differentiable)
    assert stats is not None
    return loss, stats


@takes(VocabParallelLinearKeywords)
def vocab_parallel_linear_label_smoothed_cross_entropy(
    hidden: Float[ArrayLike, "... D"],
    local_weight: Float[ArrayLike, "D K"],
    labels: Int[ArrayLike, "..."],
    *,
    axis_name: AxisName,
    **keywords: Unpack[VocabParallelLinearKeywords],
) -> Float[Array, "..."]:
    """Return `linear_label_smoothed_cross_entropy` of a weight whose classes are divided over the devices of an axis.

    As `vocab_parallel_label_smoothed_cross_entropy` of the logits hidden @ local_weight + bias, of which each device
    holds no more than one chunk of rows. The sums over the classes are computed first, and the logits again for the
    gradient. No collective is in the loop over the chunks: there are those of the dense loss, one more for class
    weights in a mean, or a class mask, and in the gradient the sum of hidden's over the devices.

    Args:
        hidden: [..., D] features, the same on every device of the axis; see `linear_label_smoothed_cross_entropy`.
        local_weight: [D, K / n], the kernel's columns of this device's classes.
        labels: [...] class indices from 0 to K - 1, the same on every device.
        axis_name: see `vocab_parallel_label_smoothed_cross_entropy`.
        bias: K / n numbers, those of this device's classes, or None.
        prior, class_weight, class_mask: this device's slices. The values of a prior are not checked.
        smoothing, where, denominator: the same on every device of the axis.
        convention, ignore_index, z_loss, softcap, subtract_entropy, bad_labels, reduction: see
            `label_smoothed_cross_entropy`.
        chunk_size: see `linear_label_smoothed_cross_entropy`.

    Returns:
        Losses, with `reduction="none"` of shape [...], else a scalar. float64 for float64 hidden, otherwise float32.
        For gradients inside `shard_map(..., check_vma=False)`, vmap and pmap see
        `vocab_parallel_label_smoothed_cross_entropy`: there a gradient of hidden is also that of this device's classes
        alone, and their sum over the axis is left to the caller.

    Raises:
        TypeError: wrong type or dtype, or labels that are probabilities.
        ValueError: wrong shape, value out of range, options that exclude each other, or no axis of that name.
        IndexError: a label outside the classes, with `bad_labels="raise"` (needs `jax.experimental.checkify`).

    Example: on a laptop, XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight devices of the CPU.
        >>> from functools import partial
        >>> import jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((jax.device_count(),), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> specs = jax.P(), jax.P(None, "model"), jax.P()
        >>> @jax.jit
        ... @partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=jax.P())
        ... def mean_loss(hidden, local_weight, labels):
        ...     return vocab_parallel_linear_label_smoothed_cross_entropy(
        ...         hidden, local_weight, labels, axis_name="model", reduction="mean"
        ...     )
        >>> hidden, weight = jnp.ones((2, 5)), jnp.zeros((5, 3 * jax.device_count()))
        >>> step = jax.value_and_grad(mean_loss, argnums=(0, 1))
        >>> loss, (of_hidden, of_weight) = step(hidden, weight, jnp.array([0, 2]))
        >>> bool(jnp.isclose(loss, jnp.log(weight.shape[1]))), of_hidden.shape, of_weight.shape == weight.shape
        (True, (2, 5), True)

    References:
        See `vocab_parallel_label_smoothed_cross_entropy` and `linear_label_smoothed_cross_entropy`.
    """
    return _evaluate_linear(hidden, local_weight, labels, axis_name, keywords, with_stats=False)[0]


@takes(VocabParallelLinearStatsKeywords)
def vocab_parallel_linear_label_smoothed_cross_entropy_with_stats(
    hidden: Float[ArrayLike, "... D"],
    local_weight: Float[ArrayLike, "D K"],
    labels: Int[ArrayLike, "..."],
    *,
    axis_name: AxisName,
    **keywords: Unpack[VocabParallelLinearStatsKeywords],
) -> tuple[Float[Array, "..."], LossStats]:
    """Return the loss of `vocab_parallel_linear_label_smoothed_cross_entropy` and statistics of each row.

    It takes one more collective, a minimum: which class is the first largest.

    Args:
        hidden: see `vocab_parallel_linear_label_smoothed_cross_entropy`.
        local_weight: see `vocab_parallel_linear_label_smoothed_cross_entropy`.
        labels: see `vocab_parallel_linear_label_smoothed_cross_entropy`.
        axis_name: see `vocab_parallel_label_smoothed_cross_entropy`.
        differentiable: whether gradients flow through nll, lse and entropy.
        keywords: the options of `vocab_parallel_linear_label_smoothed_cross_entropy`, with the same defaults.

    Returns:
        The loss, reduced as asked, and `LossStats` with one value per row; see
        `vocab_parallel_label_smoothed_cross_entropy_with_stats`.

    Raises:
        TypeError, ValueError, IndexError: see `vocab_parallel_linear_label_smoothed_cross_entropy`.

    Example: four classes on an axis of two, in a program for one device.
        >>> import jax, jax.numpy as jnp
        >>> def with_stats(local_weight):
        ...     return vocab_parallel_linear_label_smoothed_cross_entropy_with_stats(
        ...         jnp.array([[1.0]]), local_weight, jnp.array([3]), axis_name="model"
        ...     )
        >>> _, stats = jax.jit(jax.vmap(with_stats, axis_name="model"))(jnp.array([[[0.0, 1.0]], [[2.0, 5.0]]]))
        >>> stats.prediction.tolist(), f"{stats.nll[0, 0]:.4f}"
        ([[3], [3]], '0.0722')
    """
    differentiable = keywords.pop("differentiable")
    loss, stats = _evaluate_linear(
        hidden, local_weight, labels, axis_name, keywords, with_stats=True, differentiable=differentiable
    )
    assert stats is not None
    return loss, stats


class _Shard(NamedTuple):
    """Which of all classes this device has."""

    axis_name: AxisName
    num_classes: int  # of all devices
    first: Int[Array, ""]  # class of this device
    num_here: int  # classes of this device

    def place(self, labels: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        """Return where among this device's classes the labels are; out of range where another device has them."""
        return labels.astype(jnp.int32) - self.first

    def at_labels(self, vector: Array, labels: Int[Array, "*batch"], elsewhere: float = 0) -> Array:
        """Return the entry at each label of a slice of a vector over the classes, or of one for each row."""
        place = self.place(labels)
        return jnp.where((place >= 0) & (place < self.num_here), at_labels(vector, place), elsewhere)

    def most(self, by_name: dict[str, Array]) -> dict[str, Array]:
        """Return the maxima over the devices, in one collective."""
        found = jax.lax.pmax(_stacked([*by_name.values()]), self.axis_name)  # type: ignore[no-untyped-call]
        return dict(zip(by_name, found, strict=True))

    def total(self, tree: Any) -> Any:
        """Return the sums over the devices, in one collective."""
        leaves, structure = jax.tree.flatten(tree)
        total = jax.lax.psum(_stacked(leaves), self.axis_name)  # type: ignore[no-untyped-call]
        return jax.tree.unflatten(structure, list(total))


def _stacked(of_rows: list[Array]) -> Array:
    """Return arrays of the same shape as one. Where explicit axes of the mesh divide some of them, they divide all."""
    divided = next((jax.typeof(array).sharding.spec for array in of_rows if is_sharded(array)), None)
    if divided is not None:
        of_rows = [jax.sharding.reshard(array, divided) for array in of_rows]  # type: ignore[no-untyped-call]
    return jnp.stack(of_rows)


@on_automatic_axes
def _evaluate(
    local_logits: ArrayLike,
    labels: ArrayLike,
    axis_name: AxisName,
    keywords: VocabParallelKeywords,
    *,
    with_stats: bool,
    differentiable: bool = False,
) -> tuple[Float[Array, "..."], LossStats | None]:
    """Return the loss, and the statistics if asked for. See `vocab_parallel_label_smoothed_cross_entropy`."""
    options = LossOptions.of({**keywords, "implementation": None})
    check_flag("differentiable", differentiable)
    logits = as_array("local_logits", local_logits)
    check_logits(logits.shape, logits.dtype.name)
    num_here = logits.shape[check_axis(keywords["axis"], logits.shape)]
    shard = _shard(axis_name, num_here)
    batch = prepare(logits, labels, options, keywords, shard.num_classes)
    operands = _operands(batch, options, shard, with_stats)

    largest_here = largest_logits(operands)
    most = shard.most({"logit": largest_here, **_at_own_labels(batch, options, shard, keywords, with_stats)})
    is_owner = (largest_here == most["logit"]).astype(batch.dtype)
    batch = _with_own_labels(batch, most, labels, options, shard, keywords)
    largest = most["logit"] if batch.counted is None else jnp.where(batch.counted, most["logit"], 0)
    operands = _operands(batch, options, shard, with_stats)
    peaks = peaks_at(operands, largest, capped(largest, options.softcap))
    if with_stats:
        batch, peaks = _with_first_largest(batch, peaks, most, shard)
    if batch.soft:
        batch, results = _soft_losses(batch, options, shard, peaks, is_owner, with_stats)
    else:
        sums = jax.checkpoint(lambda: _sums_at(operands, peaks, is_label(operands), is_owner))()
        batch, results = _losses(batch, options, shard, peaks, sums, is_owner)
    return _reduced(batch, results, options, keywords, differentiable)


@on_automatic_axes
def _evaluate_linear(
    hidden: ArrayLike,
    local_weight: ArrayLike,
    labels: ArrayLike,
    axis_name: AxisName,
    keywords: VocabParallelLinearKeywords,
    *,
    with_stats: bool,
    differentiable: bool = False,
) -> tuple[Float[Array, "..."], LossStats | None]:
    """Return the loss, and the statistics if asked for: `vocab_parallel_linear_label_smoothed_cross_entropy`."""
    options = LossOptions.of({**keywords, "implementation": None})
    check_flag("differentiable", differentiable)
    chunks = ChunkOptions.of({**keywords, "recompute": True, "gradient_filter": 0.0}, options)
    layer, num_here = prepare_layer(hidden, local_weight, keywords["bias"], OF_SHARD)
    dtype = as_array("labels", within_int32(labels)).dtype.name
    if is_floating(dtype):
        raise error("linear_soft_labels", given=dtype)
    shard = _shard(axis_name, num_here)
    describe: Any = jax.ShapeDtypeStruct
    logits = describe((*layer.hidden.shape[:-1], num_here), layer.hidden.dtype)
    batch = prepare(logits, labels, options, keywords, shard.num_classes)
    own = _at_own_labels(batch, options, shard, keywords, with_stats)
    batch = _with_own_labels(batch, shard.most(own) if own else {}, labels, options, shard, keywords)

    here = _sums_of_layer(batch, layer, options, shard, chunks, with_stats)
    largest = shard.most({"logit": here.peaks.largest})["logit"]
    is_owner = jnp.where(here.peaks.largest == largest, here.has_largest, 0)
    peaks, sums = _relative_to(largest, batch, here, is_owner, options, shard)
    if with_stats:
        batch, peaks = _with_first_largest(batch, peaks, {}, shard)
    batch, results = _losses(batch, options, shard, peaks, sums, is_owner)
    return _reduced(batch, results, options, keywords, differentiable)


def _reduced(
    batch: Batch,
    results: tuple[Float[Array, "*batch"], LossStats | None],
    options: LossOptions,
    keywords: VocabParallelKeywords | VocabParallelLinearKeywords,
    differentiable: bool,
) -> tuple[Float[Array, "..."], LossStats | None]:
    """Return the reduced losses, and the statistics."""
    losses, stats = results
    _, divisor = mean_divisor(batch, options, keywords["denominator"])
    return reduce_losses(losses, options, divisor), stats if differentiable else jax.lax.stop_gradient(stats)


def _shard(axis_name: AxisName, num_here: int) -> _Shard:
    try:
        num_devices = jax.lax.axis_size(axis_name)
        index = jax.lax.axis_index(axis_name)
    except (NameError, ValueError) as problem:
        raise error("axis_name", given=repr(axis_name)) from problem
    return _Shard(axis_name, num_here * num_devices, (index * num_here).astype(jnp.int32), num_here)


def _operands(batch: Batch, options: LossOptions, shard: _Shard, with_stats: bool) -> Operands:
    """Return what this device sums over; of soft labels, without the labels."""
    labels = jnp.zeros(batch.batch_shape, jnp.int32) if batch.soft else shard.place(batch.labels)
    return fused.make_operands(replace(batch, labels=labels), options, with_stats)


def _at_own_labels(
    batch: Batch,
    options: LossOptions,
    shard: _Shard,
    keywords: VocabParallelKeywords | VocabParallelLinearKeywords,
    with_stats: bool,
) -> dict[str, Array]:
    """Return what the device that has a row's label knows of it, and other devices less."""
    if batch.soft:
        return {"label": jnp.max(_constant_labels(batch), axis=-1)} if with_stats else {}
    found = {}
    if batch.class_mask is not None:
        found["allowed"] = shard.at_labels(batch.class_mask, batch.labels, elsewhere=False).astype(batch.dtype)
    if batch.class_weight is not None and options.reduction == "mean" and keywords["denominator"] is None:
        constant = jax.lax.stop_gradient(batch.class_weight)
        found["weight"] = shard.at_labels(constant, batch.labels, elsewhere=-jnp.inf)
    return found


def _with_own_labels(
    batch: Batch,
    most: dict[str, Array],
    labels: ArrayLike,
    options: LossOptions,
    shard: _Shard,
    keywords: VocabParallelKeywords | VocabParallelLinearKeywords,
) -> Batch:
    """Return the batch with what the device of each label knows: which labels are bad, and whether any row counts."""
    if "allowed" in most:
        bad = jnp.asarray(batch.bad) | (most["allowed"] != 1)
        batch = replace(batch, bad=bad if batch.counted is None else bad & batch.counted)
    if options.bad_labels == "raise" and batch.bad is not None:
        given = as_array("labels", within_int32(labels))
        raise_bad_label(given, batch.bad, batch.class_mask is not None, shard.num_classes)
    known = Whole(shard.num_classes, most.get("weight"), None, None)
    return mean_divisor(replace(batch, whole=known), options, keywords["denominator"])[0]


def _with_first_largest(batch: Batch, peaks: Peaks, most: dict[str, Array], shard: _Shard) -> tuple[Batch, Peaks]:
    """Return the batch with the class of each label, and the peaks with the first of all classes that is as large."""
    first = [jnp.asarray(peaks.first)]
    if batch.soft:
        is_largest = _constant_labels(batch) == most["label"][..., None]
        index = jnp.argmax(is_largest, axis=-1).astype(jnp.int32)
        first.append(jnp.where(jnp.any(is_largest, axis=-1), index, NO_CLASS))
    here = _stacked(first)
    of_all = jnp.where(here < shard.num_here, here + shard.first, NO_CLASS)
    found = jax.lax.pmin(of_all, shard.axis_name)  # type: ignore[no-untyped-call]
    assert batch.whole is not None
    whole = batch.whole._replace(label=found[1] if batch.soft else batch.labels)
    return replace(batch, whole=whole), peaks._replace(first=found[0])


def _losses(
    batch: Batch, options: LossOptions, shard: _Shard, peaks: Peaks, sums: Sums, is_owner: Float[Array, "*batch"]
) -> tuple[Batch, tuple[Float[Array, "*batch"], LossStats | None]]:
    """Return the losses of integer labels, and the batch with what is known of all classes.

    Args:
        batch: the rows.
        options: the options of the loss.
        shard: the classes of this device.
        peaks: the peaks of all classes, and of this device's how many are as large.
        sums: the sums over this device's classes, as of `_sums_at`.
        is_owner: 1 where this device has a logit that is the largest of all, else 0.
    """
    of_rows = {
        "owners": is_owner,
        "num_largest": peaks.num_largest,
        "num_allowed": _num_allowed(batch),
        "weight": None if batch.class_weight is None else shard.at_labels(batch.class_weight, batch.labels),
        "prior": None if batch.prior is None else shard.at_labels(batch.prior, batch.labels),
    }
    sums, of_rows = shard.total((sums, of_rows))
    sums = _of_all(sums, of_rows["owners"], of_rows["num_largest"])
    num_allowed = shard.num_classes if of_rows["num_allowed"] is None else of_rows["num_allowed"][..., None]
    label = None if batch.whole is None else batch.whole.label
    batch = replace(batch, whole=Whole(num_allowed, of_rows["weight"], of_rows["prior"], label))
    targets = fused.make_targets(batch, options)
    return batch, fused.losses_of_sums(batch, options, targets, peaks, sums)


def _soft_losses(
    batch: Batch,
    options: LossOptions,
    shard: _Shard,
    peaks: Peaks,
    is_owner: Float[Array, "*batch"],
    with_stats: bool,
) -> tuple[Batch, tuple[Float[Array, "*batch"], LossStats | None]]:
    """Return the losses of soft labels. The arguments are those of `_losses`, but for the sums.

    The target of each class depends on the number of classes, so with a class mask that takes a sum of its own.
    """
    num_allowed = _num_allowed(batch)
    if num_allowed is not None:
        assert batch.whole is not None
        batch = replace(batch, whole=batch.whole._replace(num_allowed=shard.total(num_allowed)[..., None]))
    operands = _operands(batch, options, shard, with_stats)

    @jax.checkpoint
    def sums_here() -> tuple[Sums, dict[str, Any]]:
        target = reference.target_distribution(batch, options)
        weighted = target
        if batch.class_weight is not None:
            weighted = target * as_last_axis(batch.class_weight, target)
        # What some devices flush to 0 is 0 beside an infinite gap, and keeps its derivative.
        weighted = jnp.where(reference.is_nothing(weighted), weighted - jax.lax.stop_gradient(weighted), weighted)
        # Once, so that the cotangents of several sums are added before they are rounded.
        wide = replace(operands, logits=operands.logits.astype(batch.dtype))
        labels = _allowed_labels(batch, 0)
        if batch.counted is not None:
            labels = jnp.where(batch.counted[..., None], labels, 0)
        plain = replace(wide, class_weight=None, prior=None, largest=False)
        sums = sums_at(replace(plain, prior=weighted), peaks, None, without=is_owner)
        of_labels = sums_at(replace(plain, prior=labels), peaks, None) if with_stats else None
        of_rows = {
            "nll_gaps": None if of_labels is None else of_labels.other_gaps,
            "nll_mass": None if of_labels is None else of_labels.other_mass,
        }
        if options.subtract_entropy:
            of_rows["entropy"] = jnp.sum(reference.entropy_terms(target, batch), axis=-1)
        if operands.largest:
            of_largest = _sums_at(replace(wide, prior=None), peaks, None, is_owner)
            sums = sums._replace(largest_gap=of_largest.largest_gap, largest_mass=of_largest.largest_mass)
        return sums, of_rows

    sums, of_rows = sums_here()
    of_rows |= {"owners": is_owner, "num_largest": peaks.num_largest}
    sums, of_rows = shard.total((sums, of_rows))
    sums = _of_all(sums, of_rows["owners"], of_rows["num_largest"])
    log_sum = log1p(sums.rest)
    smoothed, mass = sums.other_gaps * GAP_UNIT, jnp.asarray(sums.other_mass)
    if options.convention.at_max is not None:
        at_max = jnp.asarray(reference.at_max(batch, options), batch.dtype)
        at_max = jnp.squeeze(at_max, axis=-1) if at_max.ndim else at_max
        smoothed += at_max * jnp.asarray(sums.largest_gap)
        mass += at_max * jnp.asarray(sums.largest_mass)
    smoothed += mass * log_sum
    if options.subtract_entropy:
        smoothed -= of_rows["entropy"]
    nll = of_rows["nll_gaps"] * GAP_UNIT + of_rows["nll_mass"] * log_sum if with_stats else smoothed
    return batch, fused.with_other_terms(batch, options, peaks, sums, log_sum=log_sum, smoothed=smoothed, nll=nll)


def _allowed_labels(batch: Batch, elsewhere: float) -> Float[Array, "*batch K"]:
    """Return soft labels, with another value outside the class mask, where they may hold anything."""
    labels = batch.labels.astype(batch.dtype)
    if batch.class_mask is None:
        return labels
    return jnp.where(as_last_axis(batch.class_mask, labels), labels, elsewhere)


def _constant_labels(batch: Batch) -> Float[Array, "*batch K"]:
    """Return soft labels for comparisons."""
    return jax.lax.stop_gradient(_allowed_labels(batch, -jnp.inf))


def _num_allowed(batch: Batch) -> Float[Array, "*batch"] | None:
    """Return the number of classes of this device that the mask of each row has; None without a mask."""
    if batch.class_mask is None:
        return None
    return jnp.broadcast_to(jnp.sum(batch.class_mask, axis=-1).astype(batch.dtype), batch.batch_shape)


def _sums_at(
    operands: Operands, peaks: Peaks, at_label: Bool[Array, "*batch K"] | None, is_owner: Float[Array, "*batch"]
) -> Sums:
    """Return the sums over this device's classes: `rest` less one term if it is 1, over the largest logits no means."""
    if peaks.num_largest is not None:
        peaks = peaks._replace(num_largest=jnp.ones_like(peaks.num_largest))
    return sums_at(operands, peaks, at_label, without=is_owner)


def _of_all(sums: Sums, owners: Float[Array, "*batch"], num_largest: Float[Array, "*batch"] | None) -> Sums:
    """Return the sums of all devices as those of one."""
    sums = sums._replace(rest=sums.rest + (owners - 1))
    if num_largest is None:
        return sums
    gap, mass = jnp.asarray(sums.largest_gap), jnp.asarray(sums.largest_mass)
    return sums._replace(largest_gap=gap / num_largest, largest_mass=mass / num_largest)


# --- The linear layer -----------------------------------------------------------------------------------------------


class _Here(NamedTuple):
    """The sums over this device's classes, relative to the largest logit of its own."""

    peaks: Peaks
    has_largest: Float[Array, "*batch"]  # 1; 0 if all classes are masked out or -inf, and the peak is a finite number
    sums: Sums  # as of `_sums_at`


def _sums_of_layer(
    batch: Batch, layer: Layer, options: LossOptions, shard: _Shard, chunks: ChunkOptions, with_stats: bool
) -> _Here:
    """Return the sums over this device's classes, whose logits are computed some rows at a time."""
    layer, batch = _varying_alike(layer, batch)
    if layer.hidden.shape[-1] == 1:
        # As in chunked.py: XLA would round a product of single numbers in some of its uses only.
        hidden, weight = (
            jnp.concatenate([array, jnp.zeros_like(array)], axis=axis)
            for array, axis in ((layer.hidden, -1), (layer.weight, 0))
        )
        layer = layer._replace(hidden=hidden, weight=weight)
    if 0 in batch.batch_shape:
        logits = jnp.zeros(batch.logits.shape, batch.logits.dtype)
        return _sums_of_chunk(_operands(replace(batch, logits=logits), options, shard, with_stats), None)
    arrangement = chunked.arrange(replace(batch, counted=None), layer.hidden, chunks)
    if batch.counted is None and math.prod(batch.batch_shape) != arrangement.num_chunks * arrangement.chunk_rows:
        batch = replace(batch, counted=jnp.ones(batch.batch_shape, bool))
    hidden = layer.hidden
    if batch.counted is not None:
        # 0 times a NaN would reach the weight's gradient.
        hidden = jnp.where(batch.counted[..., None], hidden, 0)
    operands = LayerOperands.of(layer._replace(hidden=hidden), _operands(batch, options, shard, with_stats), skip=False)
    of_rows: dict[str, Any] = {
        name: None if rows is None else arrangement.in_chunks(rows) for name, rows in operands.rows.items()
    }
    here: _Here = jax.tree.map(arrangement.by_row, by_chunks(replace(operands, **of_rows), _sums_of_chunk))
    return here


def _sums_of_chunk(operands: Operands, _: None) -> _Here:
    # XLA fuses nothing through a select: the largest logit must equal itself. See cpu.py.
    logits = jnp.where(jnp.isnan(operands.logits), jnp.nan, operands.logits)
    operands = replace(operands, logits=logits)
    largest = largest_logits(operands)
    finite = jnp.maximum(largest, jnp.finfo(largest.dtype).min / 4)  # type: ignore[no-untyped-call]
    has_largest = (largest >= finite).astype(largest.dtype)
    peaks = peaks_at(operands, finite, capped(finite, operands.softcap))
    return _Here(peaks, has_largest, _sums_at(operands, peaks, is_label(operands), has_largest))


def _relative_to(
    largest: Float[Array, "*batch"],
    batch: Batch,
    here: _Here,
    is_owner: Float[Array, "*batch"],
    options: LossOptions,
    shard: _Shard,
) -> tuple[Peaks, Sums]:
    """Return peaks and sums relative to the largest logit of all devices.

    With m of this device and m' >= m of all, exp(z - m') = exp(z - m) exp(m - m'), and m' - z = (m - z) + (m' - m).
    """
    old, sums = here.peaks, here.sums
    peak = capped(largest, options.softcap)
    shift = peak - old.peak
    scale, mass = jnp.exp(-shift), sums.rest + here.has_largest
    place = shard.place(batch.labels)
    has_label = ((place >= 0) & (place < shard.num_here)).astype(batch.dtype)
    others = sums.other_mass
    if others is None:
        num_allowed = _num_allowed(batch)
        others = (shard.num_here if num_allowed is None else num_allowed) - has_label
    owner = is_owner == 1
    peaks = Peaks(
        peak,
        largest,
        num_largest=None if old.num_largest is None else jnp.where(owner, old.num_largest, 0),
        first=None if old.first is None else jnp.where(owner, old.first, NO_CLASS),
    )
    return peaks, sums._replace(
        rest=jnp.where(owner, sums.rest, mass * scale),
        label_gap=sums.label_gap + _product(has_label, shift),
        other_gaps=sums.other_gaps + _product(others, in_gap_units(shift)),
        weighted_gaps=None
        if sums.weighted_gaps is None
        # Where exp(m - m') is 0 in any dtype, the other factor does not matter, if it is finite.
        else scale * (sums.weighted_gaps + mass * jnp.minimum(shift, -MASSLESS)),
        largest_gap=None if sums.largest_gap is None else jnp.where(owner, sums.largest_gap, 0),
        largest_mass=None if sums.largest_mass is None else jnp.where(owner, sums.largest_mass, 0),
    )


def _product(mass: Float[Array, "*#batch"], shift: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Return mass * shift, where 0 * inf counts as 0: of logits near both ends of the dtype the shift is infinite."""
    return mass * jnp.where((mass == 0) & jnp.isinf(shift), 0, shift)


def _varying_alike(layer: Layer, batch: Batch) -> tuple[Layer, Batch]:
    """Return differentiable operands as arrays that may differ between devices in the same axes of the mesh.

    Otherwise JAX makes them so where they meet, in each chunk. The transpose is a sum over the devices, and should be
    one for all chunks.
    """
    operands = {**layer._asdict(), "prior": batch.prior, "class_weight": batch.class_weight}
    axes = {name: jax.typeof(array).manual_axis_type.varying for name, array in operands.items() if array is not None}
    of_any = frozenset().union(*axes.values())
    for name, given in axes.items():
        if of_any - given:
            operands[name] = jax.lax.pcast(operands[name], tuple(of_any - given), to="varying")
    layer = Layer(*(operands[name] for name in Layer._fields))
    return layer, replace(batch, prior=operands["prior"], class_weight=operands["class_weight"])
