"""Checks of a caller's arguments, from shapes and dtype names alone.

Both frameworks describe an array by its shape and the name of its dtype, such as "float32", and call the same checks.
So their messages are the same.
"""

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

from lsce_spec.errors import error, refused

Shape = tuple[int, ...]

# The names of the dtypes that logits may have.
FLOATING = ("float64", "float32", "bfloat16", "float16")
# The names of the dtypes that class indices may have.
INTEGER = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
# What is added to the messages about shapes where each device has some of the classes.
OF_SHARD = "In a vocab-parallel loss each device passes the slice of its own classes."


def is_floating(dtype: str) -> bool:
    """Whether `dtype` is a dtype that logits and class probabilities may have."""
    return dtype in FLOATING


def is_integer(dtype: str) -> bool:
    """Whether `dtype` is a dtype that class indices may have."""
    return dtype in INTEGER


def is_number(value: object) -> bool:
    """Whether `value` is a plain real number; True and False are not."""
    # The two common types first: the check for Real is slow.
    return type(value) in {float, int} or (isinstance(value, Real) and not isinstance(value, bool))


def is_integral(value: object) -> bool:
    """Whether `value` is a plain integer; True and False are not."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def check_label_smooth(value: object) -> None:
    """Raise unless the smoothing of `CELossWithLabelSmoothing` is None or a number in [0, 1]."""
    if is_number(value):
        if not 0 <= value <= 1:  # type: ignore[operator]  # as below
            raise error("label_smooth", given=value)
    elif value is not None and not hasattr(value, "dtype"):
        raise error("label_smooth", wrong_type=True, given=repr(value))


def check_smoothing(smoothing: object) -> None:
    """Raise unless a number lies in [0, 1]. Arrays of numbers pass: their values may be traced."""
    if is_number(smoothing):
        if not 0 <= smoothing <= 1:  # type: ignore[operator]  # numbers.Real has no __le__(int)
            raise error("smoothing_range", given=smoothing)
    elif not hasattr(smoothing, "dtype"):
        raise error("smoothing_type", given=repr(smoothing))


def check_smoothing_dtype(dtype: str) -> None:
    """Raise unless an array of smoothings holds real numbers."""
    if not (is_floating(dtype) or is_integer(dtype)):
        raise error("smoothing_type", given=dtype)


def check_smoothing_values(values: Iterable[float]) -> None:
    """Raise unless all values of an array of smoothings lie in [0, 1]."""
    for value in values:
        if not 0 <= value <= 1:
            raise error("smoothing_range", given=f"an array with {value:.6g}")


def check_denominator(denominator: object) -> None:
    """Raise unless a denominator is None, a finite number >= 0 or an array: its value may be traced."""
    if is_number(denominator):
        if not 0 <= denominator < math.inf:  # type: ignore[operator]  # as above
            raise error("denominator_value", given=repr(denominator))
    elif denominator is not None and not hasattr(denominator, "dtype"):
        raise error("denominator_value", wrong_type=True, given=repr(denominator))


def check_denominator_array(shape: Shape, dtype: str) -> None:
    """Raise unless an array as denominator is one real number."""
    if not (is_floating(dtype) or is_integer(dtype)):
        raise error("denominator_value", wrong_type=True, given=dtype)
    if shape != ():
        raise error("denominator_shape", given=list(shape))


def check_denominator_values(values: Iterable[float]) -> None:
    """Raise unless the value of an array as denominator is a finite number >= 0."""
    for value in values:
        if not 0 <= value < math.inf:
            raise error("denominator_value", given=f"an array of {value:.6g}")


def check_class_num(class_num: object, name: str = "class_num") -> None:
    """Raise unless `class_num` is an integer of at least 1."""
    if not is_integral(class_num) or class_num < 1:  # type: ignore[operator]  # numbers.Integral has no __lt__(int)
        raise refused("count", name, class_num, wrong_type=not is_integral(class_num))


def check_class_count(class_num: int, shape: Shape) -> None:
    """Raise unless logits of `shape`, classes at axis 1, have `class_num` classes."""
    if len(shape) < 2:
        raise error("class_num_shape", shape=list(shape))
    if shape[1] != class_num:
        fitting = [index for index, size in enumerate(shape) if size == class_num]
        hint = f"Pass class_num={shape[1]}, or check the width of the last layer."
        if len(fitting) == 1 and len(shape) > 2:
            hint = f"Move dimension {fitting[0]} of the logits to 1."
        raise error("class_num", expected=class_num, shape=list(shape), given=shape[1], hint=hint)


def check_logits(shape: Shape, dtype: str) -> None:
    """Raise unless the logits have a floating-point dtype and a dimension."""
    if not is_floating(dtype):
        raise error("logits_dtype", given=dtype)
    if not shape:
        raise error("logits_scalar")


def check_layer(
    hidden: tuple[Shape, str],
    weight: tuple[Shape, str],
    bias: tuple[Shape, str] | None = None,
    *,
    features_axis: int,
    hint: str = "",
) -> int:
    """Return the number of classes of a linear layer; raise unless shapes and dtypes fit each other.

    Args:
        hidden: shape and dtype of what goes into the layer.
        weight: the same of the weight.
        bias: the same of the bias, or None.
        features_axis: which dimension of the weight has the features: 0 in [D, K], 1 in [K, D].
        hint: what the message about the bias ends with.
    """
    for name, operand in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if operand is not None and not is_floating(operand[1]):
            raise error("hidden_dtype", name=name, given=operand[1])
    if not hidden[0]:
        raise error("hidden_scalar")
    features, shape = hidden[0][-1], weight[0]
    if len(shape) != 2 or shape[features_axis] != features:
        fits_transposed = len(shape) == 2 and shape[1 - features_axis] == features
        raise error(
            "weight_shape",
            layout="[D, K]" if features_axis == 0 else "[K, D]",
            features=features,
            hidden=list(hidden[0]),
            given=list(shape),
            hint="Transpose it." if fits_transposed else "Check the order of the arguments: hidden, weight, labels.",
        )
    num_classes = shape[1 - features_axis]
    if bias is not None and bias[0] != (num_classes,):
        raise error("bias_shape", classes=num_classes, expected=[num_classes], given=list(bias[0]), hint=hint)
    return num_classes


def check_axis(axis: object, shape: Shape, *, of_shard: bool = False) -> int:
    """Return `axis` of logits of `shape` counted from the front. A shard of the classes may have none."""
    rank = len(shape)
    if not is_integral(axis) or not -rank <= int(axis) < rank:  # type: ignore[call-overload]  # numbers.Integral
        wrong_type = not is_integral(axis)
        raise refused("axis", "axis", axis, wrong_type=wrong_type, low=-rank, high=rank - 1, shape=list(shape))
    index: int = int(axis)  # type: ignore[call-overload]  # as above
    if shape[index] == 0 and not of_shard:
        raise error("no_classes", shape=list(shape), axis=axis)
    return index % rank


def check_labels(
    shape: Shape, dtype: str, logits_shape: Shape, axis: int, hint: str = "", *, takes_axis: bool = True
) -> None:
    """Raise unless the labels fit logits of `logits_shape` with classes at `axis` (from the front).

    The message about soft labels ends with `hint`. `takes_axis` tells whether the caller can choose the axis.
    """
    if is_floating(dtype):
        if shape != logits_shape:
            instead = _moved_hint(shape, logits_shape) or "For class indices pass an integer dtype."
            hint = f"{instead} {hint}"
            raise error("soft_labels_shape", expected=list(logits_shape), given=list(shape), hint=hint)
        return
    if not is_integer(dtype):
        raise error("labels_dtype", given=dtype)
    expected = _without(logits_shape, axis)
    if shape != expected:
        raise error(
            "labels_shape",
            expected=list(expected),
            logits=list(logits_shape),
            axis=axis,
            given=list(shape),
            hint=_labels_hint(shape, expected, logits_shape, takes_axis),
        )


def _labels_hint(shape: Shape, expected: Shape, logits_shape: Shape, takes_axis: bool) -> str:
    if shape == logits_shape:
        return "One-hot or soft labels must be floating point; class indices have no class dimension."
    for index, size in enumerate(shape):
        if size == 1 and _without(shape, index) == expected:
            return "Squeeze the dimension of size 1."
    if not takes_axis:
        return _moved_hint(shape, expected) or "Check the order of the arguments."
    fitting = [index for index in range(len(logits_shape)) if _without(logits_shape, index) == shape]
    moved = _moved_hint(shape, expected)
    if len(fitting) == 1 and not moved:
        return f"The shapes fit with the classes at axis {fitting[0]}: pass axis={fitting[0]}."
    # If both would do, neither is known to be right.
    return (
        not fitting and moved
    ) or "Check the order of the arguments (logits first) and which dimension holds the classes."


def _moved_hint(shape: Shape, expected: Shape) -> str:
    """Return which one dimension to move, or nothing if none or several would do."""
    moves = {}
    for source in range(len(shape) if len(shape) == len(expected) else 0):
        for target in range(len(shape)):
            order = list(range(len(shape)))
            order.insert(target, order.pop(source))
            if tuple([shape[index] for index in order]) == expected:
                # The order tells whether two moves are the same, as of neighbours.
                moves[tuple(order)] = f"Move dimension {source} of the labels to {target}."
    return next(iter(moves.values())) if len(moves) == 1 else ""


def _without(shape: Shape, index: int) -> Shape:
    return shape[:index] + shape[index + 1 :]


def check_batch_operand(name: str, shape: Shape, dtype: str | None, batch_shape: Shape) -> None:
    """Raise unless an operand with a value per row broadcasts to `batch_shape` and is boolean, if `dtype` is given."""
    if dtype is not None and dtype != "bool":
        raise error("boolean", name=name, given=dtype)
    fits = len(shape) <= len(batch_shape)
    if fits:
        # A loop of plain comparisons: torch.compile sees its symbolic sizes as equal neither with `in` nor, in torch
        # 2.9, within `all`, and has there no zip of different lengths.
        trailing = batch_shape[len(batch_shape) - len(shape) :]
        for size, batch_size in zip(shape, trailing, strict=True):
            fits = fits and (size == 1 or size == batch_size)  # noqa: PLR1714
    if not fits:
        raise error("batch_operand_shape", name=name, expected=list(batch_shape), given=list(shape))


def check_flag(name: str, value: object) -> None:
    """Raise unless a value is True or False."""
    if not isinstance(value, bool):
        raise refused("flag", name, value, wrong_type=True)


def check_class_mask(shape: Shape, dtype: str, logits_shape: Shape, axis: int, hint: str = "") -> bool:
    """Return whether a class mask differs between rows; raise unless it is boolean and fits the logits.

    Args:
        shape: of the mask: [K], or the dimensions of the logits, where those other than `axis` may be 1.
        dtype: of the mask.
        logits_shape: of the logits.
        axis: of the classes, from the front.
        hint: what the message about the shape ends with.
    """
    if dtype != "bool":
        raise error("boolean", name="class_mask", given=dtype)
    num_classes = logits_shape[axis]
    if shape == (num_classes,):
        return False
    fits = len(shape) == len(logits_shape) and shape[axis] == num_classes
    by_row = False
    if fits:
        # Plain comparisons, as in `check_batch_operand`.
        for index, (size, logits_size) in enumerate(zip(shape, logits_shape, strict=True)):
            fits = fits and (size == 1 or size == logits_size)  # noqa: PLR1714
            by_row = by_row or (index != axis and size != 1)
    if not fits:
        raise error(
            "class_mask_shape",
            classes=num_classes,
            logits=list(logits_shape),
            axis=axis,
            given=list(shape),
            hint=hint,
        )
    return by_row


def check_class_vector(name: str, shape: Shape, dtype: str, num_classes: int, hint: str = "") -> None:
    """Raise unless a vector over the classes is floating point and of the right length.

    The message about the length ends with `hint`.
    """
    if not is_floating(dtype):
        raise error("class_vector_dtype", name=name, given=dtype)
    if shape != (num_classes,):
        raise error("class_vector_shape", name=name, expected=[num_classes], given=list(shape), hint=hint)


def check_prior_values(prior: Sequence[float], class_mask: Sequence[bool] | None, unit_roundoff: float) -> None:
    """Raise unless `prior` is a probability distribution over the classes of `class_mask`."""
    check_prior_entries(prior, class_mask)
    check_prior_sum(math.fsum(prior), unit_roundoff)


def check_prior_entries(prior: Sequence[float], class_mask: Sequence[bool] | None) -> None:
    """Raise unless the probabilities of some classes are >= 0, and 0 outside of `class_mask`."""
    if class_mask is not None and len(class_mask) != len(prior):
        class_mask = None  # one of the two does not fit the logits: the call will raise for it
    for index, value in enumerate(prior):
        if not value >= 0:
            raise error("prior_negative", given=value, index=index)
        if class_mask is not None and not class_mask[index] and value != 0:
            raise error("prior_outside_mask", given=value, index=index)


def check_prior_sum(total: float, unit_roundoff: float) -> None:
    """Raise unless the probabilities of all classes sum to 1.

    Each probability was rounded once, so the sum may be off by the unit roundoff; normalising in the same precision
    adds a few more. A sum that is off by 1e-6 passes in any precision, since some priors are typed in by hand.
    """
    if not abs(total - 1) <= max(1e-6, 4 * unit_roundoff):
        raise error("prior_sum", given=total)
