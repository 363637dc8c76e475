"""A warning, once in a process: labels that are -100, or the like, while nothing is to be ignored.

To look at labels takes time, so only the first calls of a process do. A training whose labels are padded pads them from
its first batches on.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Sequence

from lsce_spec.errors import error

# What torch and most trainers ignore. Any other negative label may be a mistake, unless it is frequent.
_USUAL = -100
_FREQUENT = 0.1
_LIBRARIES = ("lsce_spec", "lsce_jax", "lsce_torch", "jax", "flax", "torch")

_calls_left = 32


def is_looking() -> bool:
    """Return whether calls still look at their labels."""
    return _calls_left > 0


def count_call() -> None:
    """Count a call that looks at its labels."""
    global _calls_left  # noqa: PLW0603  # a process has one count
    _calls_left -= 1


def warn_of(bad_labels: Sequence[int], total: int) -> None:
    """Warn, and never look again, if the labels that are no class seem to be meant to be ignored.

    Args:
        bad_labels: the labels that are not classes, without those of rows that do not count.
        total: number of labels.
    """
    global _calls_left  # noqa: PLW0603  # as above
    negative = Counter(label for label in bad_labels if label < 0)
    for value, number in negative.most_common(1):
        if value == _USUAL or number >= max(2, _FREQUENT * total):
            _calls_left = 0
            problem = error("labels_to_ignore", number=number, total=total, value=value)
            warnings.warn(str(problem), UserWarning, stacklevel=_frames_to_the_caller())


def _frames_to_the_caller() -> int:
    """Return the `stacklevel` with which `warn_of` points to the code that called the loss."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level
