"""A warning of labels that are no class, which make a loss NaN, with the likely cause and its cure.

Python's warnings say equal texts once for each line of code, and the line is that which calls the loss.
"""

import sys
import warnings

from lsce_spec.errors import error

# Frames of these stand between the code that calls a loss and the loss.
_LIBRARIES = ("lsce_spec", "lsce_jax", "lsce_torch", "jax", "flax", "torch", "torchmetrics")
# Beside negative labels: the label of pixels that belong to no class, in many data sets for segmentation.
_UNLABELLED = 255


class _SaidOnce(str):
    """A text that equals any other, so that a line which gets other numbers each time is warned of once."""

    __slots__ = ()

    def __str__(self) -> str:
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SaidOnce)

    def __hash__(self) -> int:
        return 0


def warn(
    *,
    number: int,
    total: int,
    bad: tuple[int, int],
    counted: tuple[int, int],
    num_classes: int,
    ignore_index: int | None,
    masked: bool,
) -> None:
    """Warn that labels are no class.

    Args:
        number: of labels that are no class and belong to rows that count.
        total: number of labels.
        bad: the least and the largest of the labels that are no class.
        counted: the least and the largest label of the rows that count.
        num_classes: K.
        ignore_index: of the call.
        masked: whether the call has a class mask.
    """
    found = str(bad[0]) if bad[0] == bad[1] else f"from {bad[0]} to {bad[1]}"
    expected = expected_labels(num_classes, masked)
    cure = _cure(bad, counted, num_classes, ignore_index)
    text = str(error("labels_no_class", number=number, total=total, found=found, expected=expected, cure=cure))
    warnings.warn(UserWarning(_SaidOnce(text)), stacklevel=_frames_to_the_caller())


def expected_labels(num_classes: int, masked: bool) -> str:
    """Return which labels are classes, in words.

    Example:
        >>> expected_labels(10, masked=True)
        '0 to 9, inside class_mask'
    """
    return f"0 to {num_classes - 1}" + (", inside class_mask" if masked else "")


def _cure(bad: tuple[int, int], counted: tuple[int, int], num_classes: int, ignore_index: int | None) -> str:
    """Return the likely cause and what to do about it."""
    least, largest = bad
    if counted[0] >= 1 and least == largest == num_classes:
        return f"Labels run from 1 to {num_classes}: subtract 1."
    if least == largest and (least < 0 or least == _UNLABELLED):
        already = "" if ignore_index is None else f", in place of {ignore_index},"
        return f"To leave such rows out pass ignore_index={least}{already} or where."
    if largest < 0:
        return "To leave such rows out pass where=labels >= 0."
    if least >= 0 and largest < num_classes:
        return "Allow these classes in class_mask, or leave such rows out with where."
    return (
        f"Labels run from {counted[0]} to {counted[1]} for {num_classes} classes: does the last layer have enough "
        "classes?"
    )


def _frames_to_the_caller() -> int:
    """Return the `stacklevel` with which `warn` points to the code that called the loss."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level
