"""Check the arrays of a call and bring them into one form, which every implementation takes.

In a `Batch` the class dimension comes last, every label indexes safely, and two boolean arrays mark the rows that do
not count and those whose label is bad. So no implementation handles axes, ignored labels or bad labels itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Shaped

from lsce_jax.errors import error
from lsce_jax.primitives import define_checked
from lsce_spec import (
    OF_SHARD,
    LossOptions,
    bad_labels,
    check_axis,
    check_batch_operand,
    check_class_mask,
    check_class_vector,
    check_labels,
    check_logits,
    check_prior_values,
    check_smoothing_dtype,
    check_smoothing_values,
    is_floating,
    is_number,
)
from lsce_spec.hints import for_type

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_NO_ARRAYS = frozenset({type(None), bool, int, float, str, np.ndarray})  # asking JAX whether they are takes longer


class Whole(NamedTuple):
    """What a loss has to know of all classes, where the arrays of a batch have some of them.

    Args:
        num_allowed: the number of classes to spread over.
        label_weight: the class weight at each label; None without class weights, and for soft labels.
        label_prior: the prior at each label; None without a prior, and for soft labels.
        label: the class of each label; for soft labels that of the first largest; None if it is not asked for.
    """

    num_allowed: int | Float[Array, "*batch 1"]
    label_weight: Float[Array, "*batch"] | None
    label_prior: Float[Array, "*batch"] | None
    label: Int[Array, "*batch"] | None


@dataclass(frozen=True)
class Batch:
    """The arrays of one call, classes last.

    Args:
        logits: as the caller passed them, with the class dimension moved to the end; or only their shape and dtype, if
            they have not been computed yet.
        labels: class indices within range, or the probabilities of soft labels.
        smoothing: a number, or one number per row in the compute dtype.
        counted: False for rows that `where` or `ignore_index` leaves out; None if every row counts.
        bad: True for rows that count and whose label is not a class; None for soft labels.
        prior: probabilities that replace the uniform distribution, in the compute dtype, or None.
        class_weight: in the compute dtype, or None.
        class_mask: True for the classes that take part: one mask for all rows, or one for each; or None.
        whole: None if the arrays have all classes.
    """

    logits: Float[Array, "*batch K"]
    labels: Int[Array, "*batch"] | Float[Array, "*batch K"]
    smoothing: float | Float[Array, "*batch 1"]
    counted: Bool[Array, "*batch"] | None
    bad: Bool[Array, "*batch"] | None
    prior: Float[Array, " K"] | None
    class_weight: Float[Array, " K"] | None
    class_mask: Bool[Array, " K"] | Bool[Array, "*batch K"] | None
    whole: Whole | None = None

    @property
    def soft(self) -> bool:
        """Whether the labels are class probabilities."""
        return is_floating(self.labels.dtype.name)

    @property
    def has_row_masks(self) -> bool:
        """Whether rows have class masks of their own."""
        return self.class_mask is not None and self.class_mask.ndim > 1

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the losses."""
        return tuple(self.logits.shape[:-1])

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the computation and of the loss: that of the logits, float32 for narrower ones."""
        return compute_dtype(self.logits)

    @property
    def label_weight(self) -> Float[Array, "*batch"] | None:
        """The class weight at each label, which is a class index."""
        if self.whole is not None:
            return self.whole.label_weight
        return None if self.class_weight is None else at_labels(self.class_weight, self.labels)

    @property
    def label_prior(self) -> Float[Array, "*batch"] | None:
        """The prior at each label, which is a class index."""
        if self.whole is not None:
            return self.whole.label_prior
        return None if self.prior is None else at_labels(self.prior, self.labels)

    @property
    def label(self) -> Int[Array, "*batch"]:
        """The class of each label: of soft labels the first largest."""
        if self.whole is not None:
            return jnp.asarray(self.whole.label)
        return jnp.argmax(self.labels, axis=-1) if self.soft else self.labels

    def counting_only(self, rows: Bool[Array, "*#batch"]) -> "Batch":
        """Return the batch in which a row counts only if it is also True in `rows`."""
        counted = jnp.broadcast_to(rows, self.batch_shape)
        if self.counted is not None:
            counted = counted & self.counted
        smoothing = self.smoothing
        if not is_number(smoothing):
            # Rows that do not count must give the smoothing a derivative of 0. The entropy's is infinite at 0.
            smoothing = jnp.where(counted[..., None], smoothing, 0.5)
        bad = None if self.bad is None else self.bad & counted
        class_mask = self.class_mask
        if class_mask is not None and self.has_row_masks:
            # Without a class a row has no softmax, and its derivatives would be NaN.
            class_mask = class_mask | ~counted[..., None]
        return replace(self, counted=counted, smoothing=smoothing, bad=bad, class_mask=class_mask)


def compute_dtype(logits: Array) -> jnp.dtype:
    """Return float64 for float64 logits and float32 for all others."""
    return np.dtype("float64" if logits.dtype == np.float64 else "float32")


def prepare(
    logits: ArrayLike | jax.ShapeDtypeStruct,
    labels: ArrayLike,
    options: LossOptions,
    keywords: Mapping[str, Any],
    num_classes: int | None = None,
) -> Batch:
    """Check the arrays of a call and return them in canonical form.

    Args:
        logits: as the caller passed them, or only their shape and dtype.
        labels: as the caller passed them.
        options: the checked options of the call.
        keywords: `axis`, `where`, `prior`, `class_weight` and `class_mask` of the call, where given.
        num_classes: of all devices, if the class dimension of the arrays is divided over several. Then whether a label
            is in the class mask, and the values of the prior, are not known here, and not checked.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, or a prior that is not a distribution.
        IndexError: a label that is not a class, with bad_labels="raise".
    """
    only_shape = isinstance(logits, jax.ShapeDtypeStruct)
    logits = cast("Array", logits) if isinstance(logits, jax.ShapeDtypeStruct) else as_array("logits", logits)
    labels = as_array("labels", within_int32(labels))
    check_logits(logits.shape, logits.dtype.name)
    axis = check_axis(keywords.get("axis", -1), logits.shape)
    divided, hint = num_classes is not None, "" if num_classes is None else OF_SHARD
    check_labels(labels.shape, labels.dtype.name, logits.shape, axis, hint, takes_axis="axis" in keywords)
    dtype = compute_dtype(logits)
    class_mask = _class_mask(keywords, logits.shape, axis, hint)

    if not only_shape:
        logits = jnp.moveaxis(logits, axis, -1)
    batch_shape, num_here = logits.shape[:-1], logits.shape[-1]
    num_classes = num_here if num_classes is None else num_classes
    class_weight = _class_vector("class_weight", keywords, num_here, dtype, hint)
    prior = _class_vector("prior", keywords, num_here, dtype, hint)
    if prior is not None and not divided:
        # The caller's values, not those rounded to dtype; and after the shape, since values are checked by class.
        check_prior(keywords["prior"], class_mask)

    smoothing = _row_smoothing(options.smoothing, batch_shape, dtype)
    where = keywords.get("where")
    if where is not None:
        where = as_array("where", where)
        check_batch_operand("where", where.shape, where.dtype.name, batch_shape)

    if is_floating(labels.dtype.name):
        if options.ignore_index is not None:
            raise error("ignore_index_soft", given=options.ignore_index)
        soft = jnp.moveaxis(labels, axis, -1)
        batch = Batch(logits, soft, smoothing, None, None, prior, class_weight, class_mask)
    else:
        labels, bad = _class_indices(labels, num_classes, None if divided else class_mask)
        batch = Batch(logits, jnp.where(bad, 0, labels), smoothing, None, bad, prior, class_weight, class_mask)
    if where is not None:
        batch = batch.counting_only(where)
    if options.ignore_index is not None:
        batch = batch.counting_only(labels != options.ignore_index)
    if not is_number(batch.smoothing):
        batch = replace(batch, smoothing=_smoothing_in_range(cast("Array", batch.smoothing)))
    if options.bad_labels == "raise" and batch.bad is not None and not divided:
        raise_bad_label(labels, batch.bad, class_mask is not None, num_classes)
    return batch


def _row_smoothing(
    smoothing: float | ArrayLike, batch_shape: tuple[int, ...], dtype: jnp.dtype
) -> float | Float[Array, "*batch 1"]:
    """Return a number as it is, and an array with one number per row, in that dtype."""
    if is_number(smoothing):
        return cast("float", smoothing)
    array = as_array("smoothing", smoothing)
    check_smoothing_dtype(array.dtype.name)
    check_batch_operand("smoothing", array.shape, None, batch_shape)
    return jnp.broadcast_to(array.astype(dtype), batch_shape)[..., None]


def _smoothing_in_range(smoothing: Float[Array, "*batch 1"]) -> Float[Array, "*batch 1"]:
    """Return the smoothings of rows, or raise if any is outside [0, 1]. Those not at hand become NaN there.

    `jax_debug_nans` and checkify notice those.
    """
    if values := extremes(smoothing):
        check_smoothing_values(values)
        return smoothing
    within = (smoothing >= 0) & (smoothing <= 1)
    if smoothing.size:
        first = jnp.argmin(within.ravel())
        message = str(error("smoothing_range", given="{given}"))
        checkify.debug_check(jnp.all(within), message, given=smoothing.ravel()[first])
    # A factor, so that the gradient of the smoothing is NaN, too.
    return smoothing * jnp.where(within, 1.0, jnp.nan).astype(smoothing.dtype)


def extremes(array: Array) -> tuple[float, ...]:
    """Return the least and the largest value, NaN if there is one, or nothing if they are not at hand.

    Traced values are not, and to read those on an accelerator would wait for it.
    """
    if not array.size or not _is_at_hand(array):
        return ()
    values = np.asarray(array, np.float64)
    return float(np.min(values)), float(np.max(values))


def _class_indices(
    labels: Int[Array, "*batch"], num_classes: int, class_mask: Bool[Array, "*#batch K"] | None
) -> tuple[Int[Array, "*batch"], Bool[Array, "*batch"]]:
    """Return labels in a signed dtype that is wide enough for any class index, and which of them are not a class."""
    if labels.dtype.name in {"uint32", "uint64"}:
        # Labels beyond int32 become its largest number, which is never a class.
        labels = jnp.minimum(labels, np.iinfo(np.int32).max)
    if labels.dtype != jnp.int64:
        labels = labels.astype(jnp.int32)
    bad = (labels < 0) | (labels >= num_classes)
    return labels, bad if class_mask is None else bad | ~at_labels(class_mask, labels)


def as_array(name: str, value: ArrayLike) -> Array:
    """Return the argument of that name as an array, or raise if it cannot be one."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as problem:
        if isinstance(value, jax.Array):  # it is one, and JAX says what is wrong with it
            raise
        given, hint = type(value).__name__, for_type(name, value)
        raise error("array_type", name=name, expected="an array", given=given, hint=hint) from problem


def within_int32(labels: ArrayLike) -> ArrayLike:
    """Clip wide NumPy labels to 32 bits: JAX would keep their lower 32 bits, which might be a class."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu" and labels.dtype.itemsize >= 4:
        limits = np.iinfo(np.int32)
        return np.clip(labels, max(limits.min, np.iinfo(labels.dtype).min), limits.max)
    return labels


def at_labels(vector: Shaped[Array, "*#batch K"], labels: Int[Array, "*batch"]) -> Shaped[Array, "*batch"]:
    """Return the entry at each label of a vector over the classes, or of one for each row.

    Any entry if the label is not a class.
    """
    of_rows = vector.ndim > 1
    if not is_sharded(labels):
        if of_rows:
            return jnp.take_along_axis(vector, labels[..., None], axis=-1, mode="clip")[..., 0]
        return vector.at[labels].get(mode="clip")
    # By comparison: indexing with labels whose type is sharded needs an explicit sharding of its result.
    classes = jnp.arange(vector.shape[-1], dtype=labels.dtype).reshape((1,) * labels.ndim + (-1,))
    is_label = classes == labels[..., None]
    values = vector if of_rows else vector.reshape(classes.shape)
    if vector.dtype == jnp.bool_:
        return jnp.any(is_label & values, axis=-1)
    return jnp.sum(jnp.where(is_label, values, 0), axis=-1)


def as_last_axis(vector: Shaped[Array, "*#batch K"], like: Array) -> Shaped[Array, "*#batch K"]:
    """Return a vector over the classes with the rank of `like`: strict settings of JAX promote no ranks.

    One for each row has that rank already.
    """
    return vector if vector.ndim == like.ndim else vector.reshape((1,) * (like.ndim - 1) + (-1,))


def is_sharded(array: Array) -> bool:
    """Whether the type of an array divides it over devices, as with an explicit mesh."""
    return any(axes is not None for axes in jax.typeof(array).sharding.spec)


def on_automatic_axes(evaluate: Callable[P, tuple[T, R]]) -> Callable[P, tuple[T, R]]:
    """Return a function of operands and, last, keywords, in which the compiler divides what an explicit mesh divides.

    On an explicit mesh the type of an array says how it is divided. JAX then refuses to index, to reshape or to sum
    over divided dimensions, unless each such operation says how its result is divided. Here only the results of the
    call do: values of rows are divided as the rows of the first operand, a loss of all rows is not. The gradient of
    each operand is divided as the operand is.
    """

    @wraps(evaluate)
    def with_any_axes(*arguments: P.args, **params: P.kwargs) -> tuple[T, R]:
        mesh = _explicit_mesh(arguments)
        if mesh is None:
            return evaluate(*arguments, **params)
        if mesh.manual_axes:
            return _with_types(mesh, partial(evaluate, *arguments, **params))
        leaves, structure = jax.tree.flatten(arguments)
        arrays = {place: leaf for place, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}

        def of_arrays(arrays: dict[int, Array]) -> tuple[T, R]:
            given = [arrays.get(place, leaf) for place, leaf in enumerate(leaves)]
            return evaluate(*jax.tree.unflatten(structure, given), **params)

        first, keywords, spec_of = cast("Any", arguments[0]), cast("dict[str, Any]", arguments[-1]), cast("Any", jax.P)
        spec = jax.typeof(first).sharding.spec if isinstance(first, jax.Array) else ()
        axis = check_axis(keywords.get("axis", -1), np.shape(first)) if spec else 0
        by_row = jax.NamedSharding(mesh, spec_of(*spec[:axis], *spec[axis + 1 :]))
        of_loss = by_row if keywords.get("reduction") == "none" else jax.NamedSharding(mesh, spec_of())
        divided = jax.sharding.auto_axes(of_arrays, axes=mesh.explicit_axes, out_sharding=(of_loss, by_row))
        # Unused operands are kept: they name the devices of a result that depends on none, such as a number of rows.
        return cast("tuple[T, R]", jax.jit(divided, keep_unused=True)(arrays))

    return with_any_axes


def _explicit_mesh(arguments: tuple[Any, ...]) -> Any:
    """Return the mesh of the first array whose type may divide it over devices, or None. Keywords come last."""
    for value in (*arguments[:-1], *arguments[-1].values()):
        # To ask JAX for the type of an array takes twenty times as long as to see that it is on one device.
        if type(value) in _NO_ARRAYS or type(getattr(value, "sharding", None)) is jax.sharding.SingleDeviceSharding:
            continue
        if isinstance(value, jax.Array):
            mesh = jax.typeof(value).sharding.mesh
            if mesh.explicit_axes:
                return mesh
    return None


def _with_types(mesh: Any, evaluate: Callable[[], R]) -> R:
    """Return what a function computes in a `jax.shard_map` that leaves out explicit axes, or say what to do instead.

    There JAX cannot transpose what makes them automatic.
    """
    try:
        return evaluate()
    except Exception as problem:
        if type(problem).__name__ != "ShardingTypeError":  # JAX exports it nowhere
            raise
        raise error("explicit_axes", given=mesh.explicit_axes, number=len(mesh.axis_names)) from problem


def with_whole_features(weight: Float[Array, "D K"]) -> Float[Array, "D K"]:
    """Return the weight of a layer, or its gradient, with all features on each device.

    In a loop over chunks of rows, XLA gathers a weight whose features are divided, as in FSDP, in each chunk, and adds
    up its gradient over the devices in each. So both are gathered or divided outside of the loop.

    Where axes are explicit the type says how the weight is divided. Otherwise this needs the mesh of `jax.set_mesh`.
    """
    spec: Any = jax.P  # neither it nor what takes it has types
    divided, *others = jax.typeof(weight).sharding.spec
    if divided is not None:
        return jax.sharding.reshard(weight, spec(None, *others))  # type: ignore[no-any-return, no-untyped-call]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types):
        return weight
    whole: Array = jax.lax.with_sharding_constraint(  # type: ignore[no-untyped-call]
        weight, spec(None, jax.P.UNCONSTRAINED)
    )
    return whole


def varying_like(tree: Any, like: Any) -> Any:
    """Return arrays of which JAX knows that they may differ between devices, if one of `like` does.

    Only in `jax.shard_map`, where what a loop begins with must have the type of what it ends with.
    """
    axes = _axes_of(like)

    def varying(array: Array) -> Array:
        missing = tuple(sorted(axes - _axes_of(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(varying, tree) if axes else tree


def _axes_of(tree: Any) -> frozenset[str]:
    """Return the axes of a mesh over which any array of a tree may differ."""
    types = map(jax.typeof, jax.tree.leaves(tree))
    # The attribute was called vma before.
    return frozenset().union(*(of.mat.varying if hasattr(of, "mat") else of.vma for of in types))


def _class_mask(
    keywords: Mapping[str, Any], shape: tuple[int, ...], axis: int, hint: str
) -> Bool[Array, "*#batch K"] | None:
    """Return the mask of the classes of logits of that shape, [K] or one for each row, classes last."""
    if keywords.get("class_mask") is None:
        return None
    mask = as_array("class_mask", keywords["class_mask"])
    if check_class_mask(mask.shape, mask.dtype.name, shape, axis, hint):
        if keywords.get("prior") is not None:
            raise error("prior_row_mask", given=list(mask.shape))
        return jnp.broadcast_to(jnp.moveaxis(mask, axis, -1), (*shape[:axis], *shape[axis + 1 :], shape[axis]))
    return mask if mask.ndim == 1 else mask.reshape(-1)


def _class_vector(
    name: str, keywords: Mapping[str, Any], num_classes: int, dtype: jnp.dtype, hint: str
) -> Float[Array, " K"] | None:
    """Return an array with one value per class, in that dtype, or None if the call has none of that name."""
    if keywords.get(name) is None:
        return None
    vector = as_array(name, keywords[name])
    check_class_vector(name, vector.shape, vector.dtype.name, num_classes, hint)
    return vector.astype(dtype)


def check_prior(prior: ArrayLike, class_mask: ArrayLike | None) -> None:
    """Raise unless the prior is a distribution over the classes of the mask. Traced values cannot be checked."""
    rounded = as_array("prior", prior)
    check_class_vector("prior", rounded.shape, rounded.dtype.name, rounded.size)
    if _is_traced(prior) or _is_traced(class_mask):
        return
    mask = None if class_mask is None else as_array("class_mask", class_mask)
    # Masks of rows are refused beside a prior, once their shape is known to fit.
    of_classes = None if mask is None or mask.ndim != 1 else mask.tolist()
    unit_roundoff = float(jnp.finfo(rounded.dtype).eps) / 2  # type: ignore[no-untyped-call]
    check_prior_values(np.asarray(prior, dtype=np.float64).tolist(), of_classes, unit_roundoff)


def _is_at_hand(array: Array) -> bool:
    """Whether the values can be read without waiting for a device."""
    if _is_traced(array) or not array.is_fully_addressable:
        return False
    return all(device.platform == "cpu" for device in array.devices())


def _is_traced(array: object) -> bool:
    return isinstance(array, jax.core.Tracer)


def warn_of_bad_labels(labels: ArrayLike, batch: Batch, options: LossOptions) -> None:
    """Warn of labels that are no class, once for each line that calls a loss, where labels are at hand.

    Args:
        labels: as the caller passed them.
        batch: of the call, with the rows that count.
        options: of the call.
    """
    if batch.bad is None or options.bad_labels == "raise" or not _is_at_hand(batch.bad) or _is_traced(labels):
        return
    is_bad = np.asarray(batch.bad)
    if not is_bad.any():
        return
    given = np.asarray(labels)
    bad, counted = given[is_bad], given if batch.counted is None else given[np.asarray(batch.counted)]
    bad_labels.warn(
        number=bad.size,
        total=given.size,
        bad=(int(bad.min()), int(bad.max())),
        counted=(int(counted.min()), int(counted.max())),
        num_classes=batch.logits.shape[-1],
        ignore_index=options.ignore_index,
        masked=batch.class_mask is not None,
    )


_checked = define_checked("lsce_checked", partial(error, "bad_labels_staged"))


def raise_bad_label(labels: Array, bad: Array, masked: bool, num_classes: int) -> None:
    """Raise for the first bad label, if there is one."""
    expected = bad_labels.expected_labels(num_classes, masked)
    if _is_traced(bad):
        first, bad = jnp.argmax(bad.ravel()), _checked.bind(bad)  # type: ignore[no-untyped-call]
        given = {"value": "{value}", "index": "{index} (flattened)", "expected": expected}
        message = str(error("bad_label", **given, ignore_index="ignore_index"))
        checkify.check(~jnp.any(bad), message, value=labels.ravel()[first], index=first)
        return
    if np.any(bad):
        index = tuple(int(i) for i in np.argwhere(np.asarray(bad))[0])
        value = int(labels[index])
        ignore_index = f"ignore_index={value}" if value < 0 else "ignore_index"
        raise error("bad_label", value=value, index=list(index), expected=expected, ignore_index=ignore_index)
