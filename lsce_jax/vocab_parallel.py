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

from dataclasses import replace
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from lsce_jax import fused, reference
from lsce_jax.accurate import log1p
from lsce_jax.errors import error
from lsce_jax.functional import mean_divisor, reduce_losses
from lsce_jax.inputs import Batch, Whole, as_array, as_last_axis, at_labels, prepare, raise_bad_label, within_int32
from lsce_jax.keywords import VocabParallelKeywords, VocabParallelStatsKeywords
from lsce_jax.stats import LossStats
from lsce_jax.sums import NO_CLASS, Operands, Peaks, Sums, capped, is_label, largest_logits, peaks_at, sums_at
from lsce_spec import LossOptions, check_axis, check_flag, check_logits
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

    Example:
        >>> from functools import partial
        >>> import jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((jax.device_count(),), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> @partial(jax.shard_map, mesh=mesh, in_specs=(jax.P(None, "model"), jax.P()), out_specs=jax.P())
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
        >>> _, stats = jax.vmap(with_stats, axis_name="model")(jnp.array([[[0.0, 1.0]], [[2.0, 5.0]]]))
        >>> stats.prediction.tolist(), f"{stats.nll[0, 0]:.4f}"
        ([[3], [3]], '0.0719')
    """
    differentiable = keywords.pop("differentiable")
    loss, stats = _evaluate(local_logits, labels, axis_name, keywords, with_stats=True, differentiable=differentiable)
    assert stats is not None
    return loss, stats


class _Shard(NamedTuple):
    """The classes of this device, of those that an axis divides."""

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
        found = jax.lax.pmax(jnp.stack(list(by_name.values())), self.axis_name)  # type: ignore[no-untyped-call]
        return dict(zip(by_name, found, strict=True))

    def total(self, tree: Any) -> Any:
        """Return the sums over the devices, in one collective."""
        leaves, structure = jax.tree.flatten(tree)
        total = jax.lax.psum(jnp.stack(leaves), self.axis_name)  # type: ignore[no-untyped-call]
        return jax.tree.unflatten(structure, list(total))


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
    if "allowed" in most:
        bad = jnp.asarray(batch.bad) | (most["allowed"] != 1)
        batch = replace(batch, bad=bad if batch.counted is None else bad & batch.counted)
    if options.bad_labels == "raise" and batch.bad is not None:
        given = as_array("labels", within_int32(labels))
        raise_bad_label(given, batch.bad, batch.class_mask is not None, shard.num_classes)
    known = Whole(shard.num_classes, most.get("weight"), None, None)
    batch, _ = mean_divisor(replace(batch, whole=known), options, keywords["denominator"])
    largest = most["logit"] if batch.counted is None else jnp.where(batch.counted, most["logit"], 0)

    peaks = peaks_at(_operands(batch, options, shard, with_stats), largest, capped(largest, options.softcap))
    label = None
    if with_stats:
        peaks, label = _first_largest(batch, peaks, most, shard)
    row_losses = _soft_losses if batch.soft else _losses
    batch = replace(batch, whole=known._replace(label=label))
    batch, (losses, stats) = row_losses(batch, options, shard, peaks, is_owner, with_stats)
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
    batch: Batch, options: LossOptions, shard: _Shard, keywords: VocabParallelKeywords, with_stats: bool
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


def _first_largest(
    batch: Batch, peaks: Peaks, most: dict[str, Array], shard: _Shard
) -> tuple[Peaks, Int[Array, "*batch"]]:
    """Return the peaks with the first of all classes that is as large, and the class of each label."""
    first = [jnp.asarray(peaks.first)]
    if batch.soft:
        is_largest = _constant_labels(batch) == most["label"][..., None]
        index = jnp.argmax(is_largest, axis=-1).astype(jnp.int32)
        first.append(jnp.where(jnp.any(is_largest, axis=-1), index, NO_CLASS))
    here = jnp.stack(first)
    of_all = jnp.where(here < shard.num_here, here + shard.first, NO_CLASS)
    found = jax.lax.pmin(of_all, shard.axis_name)  # type: ignore[no-untyped-call]
    return peaks._replace(first=found[0]), found[1] if batch.soft else batch.labels


def _losses(
    batch: Batch,
    options: LossOptions,
    shard: _Shard,
    peaks: Peaks,
    is_owner: Float[Array, "*batch"],
    with_stats: bool,
) -> tuple[Batch, tuple[Float[Array, "*batch"], LossStats | None]]:
    """Return the losses of integer labels, and the batch with what is known of all classes.

    Args:
        batch: the rows.
        options: the options of the loss.
        shard: the classes of this device.
        peaks: the peaks of all classes, and of this device's how many are as large.
        is_owner: 1 where this device has a logit that is the largest of all, else 0.
        with_stats: whether to return statistics.
    """
    operands = _operands(batch, options, shard, with_stats)
    sums = _sums_here(operands, peaks, is_label(operands), is_owner)
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
    """Return the losses of soft labels. The arguments are those of `_losses`.

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
    smoothed, mass = sums.other_gaps, jnp.asarray(sums.other_mass)
    if options.convention.at_max is not None:
        at_max = jnp.asarray(reference.at_max(batch, options), batch.dtype)
        at_max = jnp.squeeze(at_max, axis=-1) if at_max.ndim else at_max
        smoothed += at_max * jnp.asarray(sums.largest_gap)
        mass += at_max * jnp.asarray(sums.largest_mass)
    smoothed += mass * log_sum
    if options.subtract_entropy:
        smoothed -= of_rows["entropy"]
    nll = of_rows["nll_gaps"] + of_rows["nll_mass"] * log_sum if with_stats else smoothed
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


def _sums_here(
    operands: Operands, peaks: Peaks, at_label: Bool[Array, "*batch K"] | None, is_owner: Float[Array, "*batch"]
) -> Sums:
    """Return the sums over this device's classes, of which the backward pass keeps nothing but the operands."""
    sums: Sums = jax.checkpoint(lambda: _sums_at(operands, peaks, at_label, is_owner))()
    return sums


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
