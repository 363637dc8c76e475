r"""Smoothing added to a loss that has none: `S nll + b (R z_y - M)`, as `lsce_spec.smoothing` derives it.

After a linear layer the two numbers of a row are products with two vectors: z_y with the label's column of the weight,
M with the mean of its columns, which is the same for all rows. So the gradient of the weight is the gradient of N of
its columns, and an outer product of two vectors.

The labels' columns are computed again for the gradient: an array of N x D would be kept for little time. Where the
weight is narrow, the gradients of equal labels are added up in float32 first, in an array of N rows and not of K, and
rounded once.
"""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from lsce_jax import reference
from lsce_jax.errors import error
from lsce_jax.inputs import (
    Batch,
    as_array,
    at_labels,
    compute_dtype,
    on_automatic_axes,
    prepare,
    warn_of_bad_labels,
    within_int32,
)
from lsce_jax.keywords import AddSmoothingKeywords, LinearAddSmoothingKeywords, LinearLossKeywords
from lsce_jax.layer import Layer
from lsce_jax.linear import prepare_layer
from lsce_spec import (
    LINEAR_REFUSED,
    REFUSED,
    UNIFORM,
    LossOptions,
    check_addable,
    check_batch_operand,
    check_class_num,
    check_layer_operands,
    check_num_classes,
    check_row_numbers,
    check_weights,
    is_floating,
    is_number,
)
from lsce_spec.keywords import defaults_of, refuses, takes

_DEFAULTS = defaults_of(LinearLossKeywords) | {"reduction": "none"}


@refuses(REFUSED)
@takes(AddSmoothingKeywords)
def add_smoothing(
    nll: Float[ArrayLike, "..."],
    label_logit: Float[ArrayLike, "..."],
    mean_logit: Float[ArrayLike, "..."],
    **keywords: Unpack[AddSmoothingKeywords],
) -> Float[Array, "..."]:
    r"""Return the label-smoothed loss of each row, given its unsmoothed loss and two numbers of its logits.

    For "uniform" this is nll + smoothing * (label_logit - mean_logit). In general, with the target `on` at the label
    and `off` elsewhere, K classes, a = on - off and b = K off,

    .. math:: (a w_y + b R)\,\text{nll} + b\,(R z_y - M) + \text{z\_loss}\,(\text{nll} + z_y)^2

    where without class weights w_y = R = 1 and M is the mean of the logits.

    Args:
        nll: -log p_y of each row, not smoothed and not weighted, of any shape. float64, float32, bfloat16 or float16,
            as the next two.
        label_logit: z_y, the logit at the label of each row.
        mean_logit: M, the mean of the logits of each row over the classes. For a prior r pass sum_k r_k z_k and keep
            "uniform"; with class weights w pass sum_k r_k w_k z_k, where r_k is 1/K without a prior.
        smoothing: see `label_smoothed_cross_entropy`.
        convention: see there; not "max_sup", nor another with `at_max`.
        num_classes: K, which every convention but "uniform" needs.
        where: booleans that broadcast to nll; False leaves a row out: loss 0, gradient 0, whatever its numbers are.
        label_weight: w_y, the class weight of each row's label, or None.
        mean_weight: R, the sum_k r_k w_k: a number, or an array that broadcasts to nll. With `label_weight` only.
        z_loss: factor of the squared log-partition function lse = nll + z_y.

    Returns:
        Losses of the shape of nll. float64 if one of the three is, otherwise float32.

    Raises:
        TypeError: wrong type or dtype, or an option that cannot be added, such as softcap; the message says why.
        ValueError: wrong shape, value out of range, or a convention that cannot be added.

    Example: Optax's loss of integer labels, which has no smoothing.
        >>> import jax.numpy as jnp, optax
        >>> logits, labels = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]]), jnp.array([0, 2])
        >>> nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        >>> label_logit = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        >>> losses = add_smoothing(nll, label_logit, logits.mean(-1), smoothing=0.1)
        >>> [f"{loss:.4f}" for loss in losses]
        ['0.3729', '0.2949']

    References:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, section 7. The derivation is
        in `lsce_spec.smoothing`.
    """
    given = {"nll": nll, "label_logit": label_logit, "mean_logit": mean_logit}
    label_weight, mean_weight = keywords["label_weight"], keywords["mean_weight"]
    check_weights(label_weight, mean_weight)
    rows = {name: as_array(name, value) for name, value in given.items()}
    if label_weight is not None:
        rows["label_weight"] = as_array("label_weight", label_weight)
    shape = rows["nll"].shape
    for name, array in rows.items():
        check_row_numbers(name, array.shape, array.dtype.name, shape)
    options = LossOptions.of({**_DEFAULTS, **keywords})
    check_addable(options.convention)
    check_num_classes(options.convention, keywords["num_classes"])
    num_classes = 1 if keywords["num_classes"] is None else keywords["num_classes"]
    check_class_num(num_classes, name="num_classes")
    dtype = jnp.float64 if any(array.dtype == jnp.float64 for array in rows.values()) else jnp.float32
    # No label is read: of a batch the options need shapes, dtype and the rows that count.
    logits = jax.ShapeDtypeStruct((*shape, num_classes), dtype)  # type: ignore[no-untyped-call]
    batch = prepare(logits, jnp.zeros(shape, jnp.int32), options, {"where": keywords["where"]})
    wide = {name: array.astype(batch.dtype) for name, array in rows.items()}
    if mean_weight is not None:
        weights = as_array("mean_weight", mean_weight)
        check_batch_operand("mean_weight", weights.shape, None, shape)
        wide["mean_weight"] = jnp.broadcast_to(weights.astype(batch.dtype), shape)
    return _smoothed(batch, options, **wide)


@refuses(LINEAR_REFUSED)
@takes(LinearAddSmoothingKeywords)
def linear_add_smoothing(
    nll: Float[ArrayLike, "..."],
    hidden: Float[ArrayLike, "... D"],
    weight: Float[ArrayLike, "D K"],
    labels: Int[ArrayLike, "..."],
    **keywords: Unpack[LinearAddSmoothingKeywords],
) -> Float[Array, "..."]:
    r"""Return the label-smoothed loss of each row, given the unsmoothed loss of a linear layer, without its logits.

    The result, and its gradients, are those of `linear_label_smoothed_cross_entropy`, with nll from any loss that has
    no smoothing. Each row takes products with two vectors, and none with the whole weight.

    Args:
        nll: [...] the unsmoothed loss of each row, -log p_y, as `reduction="none"` of most libraries gives it; not
            weighted. For a loss that returns only its mean, pass zeros, and add the mean of the result to that mean.
        hidden: [..., D] features, which the loss was given. float64, float32, bfloat16 or float16.
        weight: [D, K], the kernel of a Flax layer, of any of these dtypes. It is rounded to the dtype of hidden.
        labels: [...] class indices, of any integer dtype. A label that is not a class makes loss and gradients NaN.
        bias: K numbers, or None; the same that the loss was given.
        smoothing, convention, prior, where, ignore_index, class_weight, z_loss: see `label_smoothed_cross_entropy`.
            Not "max_sup", nor another convention with `at_max`. Rows that are left out are 0, whatever nll holds.
        class_mask: K booleans; smoothing goes to the classes marked True. nll must be of these classes alone.

    Returns:
        Losses [...], to be reduced by the caller. float64 for float64 hidden, otherwise float32.

    Raises:
        TypeError: wrong type or dtype, or an option that cannot be added, such as softcap; the message says why.
        ValueError: wrong shape, value out of range, or a convention that cannot be added.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> hidden, weight = jnp.array([[2.0, 0.0], [0.0, 3.0]]), jnp.eye(2, 3)
        >>> labels = jnp.array([0, 1])
        >>> nll = optax.softmax_cross_entropy_with_integer_labels(hidden @ weight, labels)
        >>> losses = linear_add_smoothing(nll, hidden, weight, labels, smoothing=0.1)
        >>> f"{losses.mean():.4f}"
        '0.3339'

    References:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, section 7. The derivation is
        in `lsce_spec.smoothing`.
    """
    return _of_layer(hidden, weight, labels, nll, {**_DEFAULTS, **keywords})[0]


@on_automatic_axes
def _of_layer(
    hidden: Float[ArrayLike, "... D"],
    weight: Float[ArrayLike, "D K"],
    labels: Int[ArrayLike, "..."],
    nll: Float[ArrayLike, "..."],
    keywords: dict[str, Any],
) -> tuple[Float[Array, "..."], None]:
    """Return the losses, and nothing beside them. See `linear_add_smoothing`."""
    options = LossOptions.of(keywords)
    check_addable(options.convention)
    check_layer_operands(*(getattr(operand, "shape", None) for operand in (nll, hidden, weight)))
    layer, num_classes = prepare_layer(hidden, weight, keywords["bias"])
    labels = as_array("labels", within_int32(labels))
    if is_floating(labels.dtype.name):
        raise error("smoothing_soft_labels", given=labels.dtype.name)
    logits = jax.ShapeDtypeStruct((*layer.hidden.shape[:-1], num_classes), layer.hidden.dtype)  # type: ignore[no-untyped-call]
    batch = prepare(logits, labels, options, keywords)
    warn_of_bad_labels(labels, batch, options)
    if batch.has_row_masks:
        raise error("smoothing_row_mask")
    nll = as_array("nll", nll)
    check_row_numbers("nll", nll.shape, nll.dtype.name, batch.batch_shape)
    factor = _mean_factor(batch, num_classes)
    of_hidden, averaged = layer.hidden, _rounded(layer.weight.astype(batch.dtype), layer)
    if batch.counted is not None:
        of_hidden = jnp.where(batch.counted[..., None], of_hidden, 0)
    if batch.class_mask is not None:
        averaged = jnp.where(batch.class_mask[None, :], averaged, 0)
    mean_column = jnp.sum(averaged * factor[None, :], axis=1)
    label_logit, mean_logit = _products(of_hidden, layer.weight, batch.labels, mean_column)
    if layer.bias is not None:
        bias = layer.bias.astype(batch.dtype)
        label_logit += at_labels(bias, batch.labels)
        mean_logit += jnp.sum(factor * (bias if batch.class_mask is None else jnp.where(batch.class_mask, bias, 0)))
    weights = {}
    if batch.class_weight is not None:
        weights["label_weight"] = at_labels(batch.class_weight, batch.labels)
        weights["mean_weight"] = jnp.broadcast_to(jnp.sum(factor), batch.batch_shape)
    rows = {"nll": nll.astype(batch.dtype), "label_logit": label_logit, "mean_logit": mean_logit}
    return _smoothed(batch, options, **rows, **weights), None


def _smoothed(
    batch: Batch,
    options: LossOptions,
    *,
    nll: Float[Array, "*batch"],
    label_logit: Float[Array, "*batch"],
    mean_logit: Float[Array, "*batch"],
    label_weight: Float[Array, "*batch"] | None = None,
    mean_weight: Float[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """Return S nll + b (R z_y - M) + z_loss (nll + z_y)^2: 0 for rows that do not count, NaN for bad labels."""
    if batch.counted is not None:
        nll, label_logit, mean_logit = (jnp.where(batch.counted, rows, 0) for rows in (nll, label_logit, mean_logit))
    at_label, spread = _label_and_spread(batch, options)
    if label_weight is not None and mean_weight is not None:
        mass = at_label * label_weight + spread * mean_weight
        gap = mean_weight * label_logit - mean_logit
    else:
        mass, gap = at_label + spread, label_logit - mean_logit
    # A logit of -inf makes the gap infinite. 0 * inf counts as 0, and finite gaps are the derivative of `spread`.
    gap = jnp.where(reference.is_nothing(spread) & jnp.isinf(gap), 0, gap)
    losses = mass * nll + spread * gap
    if options.z_loss:
        losses += options.z_loss * (nll + label_logit) ** 2
    return losses if batch.counted is None else jnp.where(batch.counted, losses, 0)


def _label_and_spread(batch: Batch, options: LossOptions) -> tuple[Float[Array, "*#batch"], Float[Array, "*#batch"]]:
    """Return a and b: the target at the label beyond what each class gets, and what is spread over all classes."""
    if options.convention is UNIFORM:
        pair = 1 - batch.smoothing, batch.smoothing
    else:
        on, off = reference.on_off(batch, options)
        pair = on - off, off * reference.count_allowed(batch)
    at_label, spread = (_per_row(value, batch) for value in pair)
    bad = jnp.asarray(batch.bad)
    # NaN in both reaches every gradient of the row but that of the smoothing.
    return jnp.where(bad, jnp.nan, at_label), jnp.where(bad, jnp.nan, spread)


def _per_row(value: float | Array, batch: Batch) -> Float[Array, "*#batch"]:
    value = jnp.asarray(value, batch.dtype)
    return value if is_number(batch.smoothing) else jnp.squeeze(value, axis=-1)


def _mean_factor(batch: Batch, num_classes: int) -> Float[Array, " K"]:
    """Return r_k w_k: the factor of each class in the mean."""
    if batch.prior is not None:
        factor = batch.prior
    elif batch.class_mask is not None:
        factor = batch.class_mask.astype(batch.dtype) / reference.count_allowed(batch)
    else:
        factor = jnp.full(num_classes, 1 / num_classes, batch.dtype)
    return factor if batch.class_weight is None else factor * batch.class_weight


@jax.checkpoint
def _products(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "D K"],
    labels: Int[Array, "*batch"],
    mean_column: Float[Array, " D"],
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Return the product of each row with the column at its label, and with the mean of the columns."""
    dtype, flat = compute_dtype(hidden), labels.reshape(-1)
    # By elements, since a matrix product of a TPU keeps few bits of float32.
    rows = hidden.reshape(-1, hidden.shape[-1]).T.astype(dtype)
    columns = _rounded(_columns(weight, flat, dtype), Layer(hidden, weight, None))
    label_logit = jnp.sum(rows * columns, axis=0)
    mean_logit = jnp.sum(rows * mean_column[:, None], axis=0)
    return label_logit.reshape(labels.shape), mean_logit.reshape(labels.shape)


def _columns(weight: Float[Array, "D K"], labels: Int[Array, " n"], dtype: jnp.dtype) -> Float[Array, "D n"]:
    """Return the label's column for each row, in that dtype."""
    if weight.dtype == dtype:
        return weight.at[:, labels].get(mode="clip")
    # One column for each label that occurs, and from these one for each row: so the gradients of equal labels are
    # added up in the wide dtype, and each column of the weight gets one number, which is rounded once.
    order = jnp.argsort(labels)
    ordered = labels[order]
    is_new = jnp.concatenate([jnp.zeros(1, bool), ordered[1:] != ordered[:-1]])[: labels.size]
    place = jnp.zeros_like(labels).at[order].set(jnp.cumsum(is_new, dtype=labels.dtype), unique_indices=True)
    found = jnp.full_like(labels, weight.shape[1]).at[place].set(labels)  # places beyond the last label have no class
    some = weight.at[:, found].get(mode="fill", fill_value=0)
    return some.astype(dtype)[:, place]


def _rounded(columns: Float[Array, "D n"], layer: Layer) -> Float[Array, "D n"]:
    """Return columns of the weight, in the compute dtype, rounded to the dtype of hidden, with unrounded gradients."""
    narrow = layer.hidden.dtype
    if narrow in {columns.dtype, layer.weight.dtype}:
        return columns
    constant = jax.lax.stop_gradient(columns)
    # The barrier keeps XLA from leaving out both conversions.
    rounded: Array = jax.lax.optimization_barrier(constant.astype(narrow)).astype(columns.dtype)  # type: ignore[no-untyped-call]
    return columns + (rounded - constant)
