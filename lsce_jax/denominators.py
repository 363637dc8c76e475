"""The denominator of a mean whose rows are divided over devices or over microbatches."""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from lsce_jax.errors import error
from lsce_jax.inputs import as_array, compute_dtype, on_automatic_axes, prepare, within_int32
from lsce_jax.keywords import DenominatorKeywords, DenseLossKeywords
from lsce_jax.reductions import denominator_of
from lsce_spec import LossOptions, is_floating
from lsce_spec.keywords import defaults_of, takes

_DEFAULTS = defaults_of(DenseLossKeywords)


@takes(DenominatorKeywords)
def mean_denominator(
    labels: Int[ArrayLike, "..."],
    *,
    axis_name: str | tuple[str, ...] = (),
    **keywords: Unpack[DenominatorKeywords],
) -> Int[Array, ""] | Float[Array, ""]:
    """Return what `reduction="mean"` divides by, of the rows of all devices.

    Where each device, or each microbatch, has some of the rows, pass this to all of them as `denominator`. Then their
    losses add up to the mean of all rows, and so do the gradients. The mean of their own means would be another number
    wherever they hold different numbers of rows that count.

    Args:
        labels: the class indices of this device's rows, of any shape: of all microbatches, if there are several.
        axis_name: the axes that divide the rows, inside `jax.shard_map`, `jax.vmap` or `jax.pmap`; none by default. Not
            those whose devices have the same rows: such rows would count more than once.
        where: as passed to the loss, but with the shape of these labels, or one that broadcasts to it.
        ignore_index: as passed to the loss.
        class_weight: the weights of all classes, also where the loss gets a slice of them.
        class_mask: the mask of all classes, likewise; with the dimensions of the labels and then K, if rows have masks
            of their own. It matters only beside `class_weight`: a label outside of it weighs 1, as does any bad label.

    Returns:
        The number of rows that count; with class weights the sum of the weights of their labels. A scalar, the same on
        every device of the axes; 0 if no row counts, and the loss is 0 then.

    Raises:
        TypeError: wrong type or dtype. Class probabilities are refused: each of their rows counts as one.
        ValueError: wrong shape, or `axis_name` names no axis.

    Example: two microbatches of two rows, one of which is padding.
        >>> import jax.numpy as jnp
        >>> from lsce_jax import label_smoothed_cross_entropy, mean_denominator
        >>> logits = jnp.array([[[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]], [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]])
        >>> labels = jnp.array([[0, 2], [1, -100]])
        >>> options = {"ignore_index": -100, "reduction": "mean"}
        >>> denominator = mean_denominator(labels, ignore_index=-100)
        >>> parts = [
        ...     label_smoothed_cross_entropy(*part, denominator=denominator, **options)
        ...     for part in zip(logits, labels, strict=True)
        ... ]
        >>> f"{denominator} {sum(parts):.4f} {label_smoothed_cross_entropy(logits, labels, **options):.4f}"
        '3 0.8210 0.8210'

    References:
        The divisor: `lsce_spec.mean_denominator`.
    """
    return _denominator(labels, axis_name, keywords)[0]


@on_automatic_axes
def _denominator(
    labels: Int[ArrayLike, "..."], axis_name: str | tuple[str, ...], keywords: DenominatorKeywords
) -> tuple[Int[Array, ""] | Float[Array, ""], None]:
    """Return the denominator, and nothing for each row."""
    labels = as_array("labels", within_int32(labels))
    if is_floating(labels.dtype.name):
        raise error("denominator_labels", given=labels.dtype.name)
    options = LossOptions.of({**_DEFAULTS, "ignore_index": keywords["ignore_index"]})
    weights, mask = keywords["class_weight"], keywords["class_mask"]
    # Without either no label needs to be looked up, and the number of classes does not matter.
    num_classes, dtype = np.iinfo(np.int32).max, np.dtype(np.float32)
    if weights is not None:
        weights = as_array("class_weight", weights)
        num_classes, dtype = max(weights.size, 1), compute_dtype(weights)
    elif mask is not None:
        num_classes = max(as_array("class_mask", mask).shape[-1:], default=1)
    describe: Any = jax.ShapeDtypeStruct
    logits = describe((*labels.shape, num_classes), dtype)
    return _total(jnp.asarray(denominator_of(prepare(logits, labels, options, keywords))), axis_name), None


def _total(here: Array, axis_name: str | tuple[str, ...]) -> Array:
    """Return the sum over the devices of these axes."""
    try:
        of_all: Array = jax.lax.psum(here, axis_name)  # type: ignore[no-untyped-call]
    except (NameError, ValueError) as problem:
        raise error("denominator_axis", given=repr(axis_name)) from problem
    return of_all
