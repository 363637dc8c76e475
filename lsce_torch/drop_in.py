"""`torch.nn.functional.cross_entropy` with the options of this package: swap the import, nothing else."""

import re
import warnings
from collections.abc import Sequence
from typing import Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lsce_spec import Reduction, is_integral, names_for, renamed
from lsce_spec.keywords import takes
from lsce_torch.errors import error
from lsce_torch.functional import label_smoothed_cross_entropy
from lsce_torch.keywords import CrossEntropyKeywords

# torch's names of the arguments, for our messages. The classes cannot be elsewhere than in dimension 1.
_OF_CALL = {
    "logits": "input",
    "labels": "target",
    "class_weight": "weight",
    r"pass axis=(\d+)": r"pass input.movedim(\1, 1)",
}
NAMES = names_for({**_OF_CALL, "smoothing": "label_smoothing"})
# The same where a call of the module has a smoothing of its own.
NAMES_OF_CALL = names_for(_OF_CALL)


@takes(CrossEntropyKeywords)
def cross_entropy(
    input: Float[Tensor, "..."],  # noqa: A002  # torch calls it so
    target: Int[Tensor, "..."] | Float[Tensor, "..."],
    weight: Float[Tensor, " K"] | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float | Float[Tensor, "..."] = 0.0,
    **options: Unpack[CrossEntropyKeywords],
) -> Float[Tensor, "..."]:
    """Return `torch.nn.functional.cross_entropy`, with every option of `label_smoothed_cross_entropy`.

    The arguments of torch have its names, order and defaults, and the classes are in dimension 1. So calls need no
    change. The result differs on purpose in the few cases that `LabelSmoothedCrossEntropyLoss` lists.

    Args:
        input: logits [K], [N, K] or [N, K, d1, ...]. float64, float32, bfloat16 or float16.
        target: class indices without the class dimension, or probabilities with it.
        weight: K class weights.
        size_average: deprecated by torch; translated to `reduction` as torch does.
        reduce: likewise.
        ignore_index: rows with this integer label are left out; soft labels ignore a negative value.
        reduction: "mean", "sum" or "none".
        label_smoothing: the smoothing e in [0, 1]: a number, or a tensor that broadcasts to the losses.
        convention, prior, where, class_mask, z_loss, softcap, subtract_entropy, bad_labels, denominator,
            implementation, inplace_backward: see `label_smoothed_cross_entropy`.

    Returns:
        Losses, with `reduction="none"` of the shape of the input without its classes, else a scalar. float64 for
        float64 logits, otherwise float32.

    Raises:
        TypeError, ValueError, IndexError: see `label_smoothed_cross_entropy`.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> images = torch.linspace(-1, 1, 30).reshape(2, 5, 3)  # [N, K, d1]
        >>> labels = torch.tensor([[0, 4, -100], [1, 2, 3]])
        >>> ours, theirs = (f(images, labels, label_smoothing=0.1) for f in (cross_entropy, F.cross_entropy))
        >>> f"{ours:.4f} {theirs:.4f}"
        '1.6519 1.6519'

    References:
        https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.cross_entropy.html
    """
    check_weight(weight)
    if size_average is not None or reduce is not None:
        reduction = _translated(size_average, reduce)
    return with_names_of_torch(NAMES, input, target, weight, ignore_index, reduction, label_smoothing, **options)


def with_names_of_torch(
    names: Sequence[tuple[re.Pattern[str], str]],
    input: Tensor,  # noqa: A002  # as above
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
    label_smoothing: float | Tensor,
    **options: Unpack[CrossEntropyKeywords],
) -> Tensor:
    """Return the loss of `cross_entropy`, for the module as well, which has every option already.

    Messages call arguments by `names`.
    """
    try:
        soft = isinstance(target, Tensor) and target.is_floating_point()
        if soft and is_integral(ignore_index) and ignore_index >= 0:
            raise error("ignore_index_soft", given=ignore_index)
        return label_smoothed_cross_entropy(
            input,
            target,
            smoothing=label_smoothing,
            axis=0 if isinstance(input, Tensor) and input.ndim == 1 else 1,
            ignore_index=None if soft else ignore_index,
            class_weight=weight,
            reduction=reduction,
            **options,
        )
    except (TypeError, ValueError, IndexError, RuntimeError) as problem:
        raise renamed(problem, names) from problem.__cause__


def _translated(size_average: bool | None, reduce: bool | None) -> Reduction:
    """Return the reduction that torch's deprecated arguments mean, and warn as torch does.

    torch's own function for that cannot be traced by torch.compile, nor can a warning.
    """
    reduction: Reduction = "mean" if size_average is None or size_average else "sum"
    if reduce is not None and not reduce:
        reduction = "none"
    if not torch.compiler.is_compiling():
        text = f"size_average and reduce are deprecated, pass reduction={reduction!r} instead."
        warnings.warn(text, UserWarning, stacklevel=4)
    return reduction


def check_weight(weight: object) -> None:
    """Raise unless class weights are None or a tensor: a number was meant as the smoothing."""
    if weight is not None and not isinstance(weight, Tensor):
        raise error("weight_type", given=repr(weight))
