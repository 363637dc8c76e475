"""The denominator of a mean whose rows are divided over ranks or over microbatches."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lsce_spec import LossOptions
from lsce_spec.keywords import defaults_of, takes
from lsce_torch.errors import error
from lsce_torch.inputs import check_tensor, compute_dtype, dtype_name, is_dtensor, prepare
from lsce_torch.keywords import DenominatorKeywords, DenseLossKeywords
from lsce_torch.ranks import has_group, ranks_of, total
from lsce_torch.reductions import denominator_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DEFAULTS = defaults_of(DenseLossKeywords)


@takes(DenominatorKeywords)
def mean_denominator(
    labels: Int[Tensor, "..."],
    *,
    group: "ProcessGroup | Sequence[ProcessGroup] | None" = None,
    **keywords: Unpack[DenominatorKeywords],
) -> Int[Tensor, ""] | Float[Tensor, ""]:
    """Return what `reduction="mean"` divides by, of the rows of all ranks.

    Where each rank, or each microbatch, has some of the rows, pass this to all of them as `denominator`. Then their
    losses add up to the mean of all rows, and so do the gradients. The mean of their own means would be another number
    wherever they hold different numbers of rows that count.

    `DistributedDataParallel` and FSDP do not add up the gradients of their ranks but average them: there pass the
    result divided by the number of these ranks.

    Args:
        labels: the class indices of this rank's rows, of any shape: of all microbatches, if there are several.
        group: the process group that divides the rows, or several, as of two dimensions of a `DeviceMesh`; not one
            whose ranks have the same rows: such rows would count more than once. None: all processes; this one alone if
            `torch.distributed` is not in use. (): this one alone.
        where: as passed to the loss, but with the shape of these labels, or one that broadcasts to it.
        ignore_index: as passed to the loss.
        class_weight: the weights of all classes, also where the loss gets a slice of them.
        class_mask: the mask of all classes, likewise; with the dimensions of the labels and then K, if rows have masks
            of their own. It matters only beside `class_weight`: a label outside of it weighs 1, as does any bad label.

    Returns:
        The number of rows that count; with class weights the sum of the weights of their labels, which is a constant to
        autograd. A scalar, the same on every rank; 0 if no row counts, and the loss is 0 then.

    Raises:
        TypeError: wrong type or dtype. Class probabilities are refused: each of their rows counts as one. So are
            DTensors: the mean of their rows is that of all ranks already.
        ValueError: wrong shape.
        RuntimeError: this process is not in the group.

    Example: two microbatches of two rows, one of which is padding.
        >>> import torch
        >>> from lsce_torch import label_smoothed_cross_entropy, mean_denominator
        >>> logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]], [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]])
        >>> labels = torch.tensor([[0, 2], [1, -100]])
        >>> denominator = mean_denominator(labels, ignore_index=-100)
        >>> parts = [
        ...     label_smoothed_cross_entropy(*part, ignore_index=-100, denominator=denominator)
        ...     for part in zip(logits, labels, strict=True)
        ... ]
        >>> f"{denominator} {sum(parts):.4f} {label_smoothed_cross_entropy(logits, labels, ignore_index=-100):.4f}"
        '3 0.8210 0.8210'

    References:
        The divisor: `lsce_spec.mean_denominator`.
    """
    check_tensor("labels", labels)
    if is_dtensor(labels):
        raise error("denominator_dtensor")
    if labels.is_floating_point():
        raise error("denominator_labels", given=dtype_name(labels))
    options = LossOptions.of({**_DEFAULTS, "ignore_index": keywords["ignore_index"]})
    weights, mask = keywords["class_weight"], keywords["class_mask"]
    # Without either no label needs to be looked up, and the number of classes does not matter.
    num_classes, dtype = torch.iinfo(torch.int32).max, torch.float32
    if weights is not None:
        check_tensor("class_weight", weights)
        num_classes, dtype = max(weights.numel(), 1), compute_dtype(weights)
    elif mask is not None:
        check_tensor("class_mask", mask)
        num_classes = mask.shape[-1] if mask.ndim else 1
    logits = torch.zeros(1, dtype=dtype, device=labels.device).expand(*labels.shape, num_classes)
    here = torch.as_tensor(
        denominator_of(prepare(logits, labels, options, keywords), None), device=labels.device
    ).detach()
    return _total(here, group)


def _total(here: Tensor, group: "ProcessGroup | Sequence[ProcessGroup] | None") -> Tensor:
    """Return the sum over the ranks of one group after the other."""
    groups = tuple(group) if isinstance(group, (list, tuple)) else (group,)
    if group is None and not has_group():
        groups = ()
    # Whatever its dtype, so that a rank which passes weights and one which does not still understand each other.
    of_all = here.to(torch.float64)
    for each in groups:
        of_all = total(of_all, ranks_of(each), after=())
    return of_all.to(here.dtype)
