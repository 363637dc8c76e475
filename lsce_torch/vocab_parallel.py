r"""The loss where the classes are divided over the ranks of a process group: no rank has all logits of a row.

A loss is made of a few sums over the classes, relative to the largest logit (see `sums.py`). So each rank sums over its
own classes, and what it sends is a few numbers for each row:

1. what the call is, and how many classes the rank has: some thirty numbers, gathered. Ranks that disagree raise.
2. the largest logit of its classes, of which all ranks take the maximum,
3. its sums relative to that maximum, which all ranks add up. They are one tensor, and so one collective.

The number of classes, and what a convention makes of it, is that of all ranks. A rank leaves out its terms exp(z - m)
that are 1, and counts them; one of all that the ranks count is never added. So small losses keep their accuracy, as
they do in one process.

The loss is the same on every rank, and so is what its gradient is multiplied by. With the sums over all classes at
hand, the gradient of the logits takes no collective. Nothing as large as the logits is kept for it. Second derivatives
do: a logit changes the log-sum-exp, and with it the gradient on every rank.

Eager calls take some rows at a time, in plain operations. torch.compile fuses these over all rows.
"""

from typing import TYPE_CHECKING, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lsce_spec import LossOptions, check_flag
from lsce_spec.keywords import takes
from lsce_torch.errors import error
from lsce_torch.functional import reduce_losses
from lsce_torch.inputs import Given, check
from lsce_torch.keywords import VocabParallelKeywords, VocabParallelStatsKeywords
from lsce_torch.ranks import ranks_of, tell_failure
from lsce_torch.shards import row_losses, shard_of
from lsce_torch.stats import LossStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@takes(VocabParallelKeywords)
def vocab_parallel_label_smoothed_cross_entropy(
    local_logits: Float[Tensor, "..."],
    labels: Int[Tensor, "..."] | Float[Tensor, "..."],
    *,
    group: "ProcessGroup | None" = None,
    **keywords: Unpack[VocabParallelKeywords],
) -> Float[Tensor, "..."]:
    """Return `label_smoothed_cross_entropy` of logits whose classes are divided over the ranks of a process group.

    Rank i of the group has the i-th run of consecutive classes. The runs may differ in length, and may be empty. Every
    rank of the group calls it with the same rows.

    The loss is the same on every rank. Forward it takes one maximum of a number for each row, one sum of a few numbers
    for each row, and before them some thirty numbers from each rank: by these the ranks notice that they were given
    different shapes, dtypes or options, and raise. On a GPU that check waits for the device. `backward` takes no
    collective.

    Args:
        local_logits: the logits of this rank's classes, of shape [..., K of this rank, ...].
        labels: indices from 0 to K - 1, the same on every rank; or this rank's slice of the class probabilities.
        group: the ranks that the classes are divided over. None: all processes.
        prior, class_weight, class_mask: this rank's slices. They take no gradient.
        smoothing, where, denominator: the same on every rank of the group.
        convention, axis, ignore_index, z_loss, softcap, subtract_entropy, bad_labels, reduction: see
            `label_smoothed_cross_entropy`. The number of classes, and every mean over them, is that of all ranks.
            Masks of rows take one more sum, and so does "max_sup" with soft labels.

    Returns:
        Losses, with `reduction="none"` of the shape of the logits without `axis`, else a scalar. float64 for
        float64 logits, otherwise float32. The gradient has the dtype of the logits, and is that of one loss: no factor
        of the group's size.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, value out of range, options that exclude each other, or ranks that disagree.
        IndexError: a label outside the classes, with `bad_labels="raise"`.
        RuntimeError: there is no process group, or another rank has raised. Also vmap, and third derivatives.

    Example: one process, which has all classes. Under `torchrun`, `init_process_group` needs only the backend.
        >>> import torch
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> local_logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]], requires_grad=True)
        >>> loss = vocab_parallel_label_smoothed_cross_entropy(local_logits, torch.tensor([0, 2]))
        >>> loss.backward()
        >>> f"{loss:.4f}", local_logits.grad.shape
        ('0.3339', torch.Size([2, 3]))
        >>> dist.destroy_process_group()

    References:
        Classes divided over devices: Shoeybi et al., "Megatron-LM", 2019, arXiv:1909.08053, section 3. There each
        device smooths over its own classes; here over all of them.
    """
    return _evaluate(local_logits, labels, group, keywords, with_stats=False)[0]


@takes(VocabParallelStatsKeywords)
def vocab_parallel_label_smoothed_cross_entropy_with_stats(
    local_logits: Float[Tensor, "..."],
    labels: Int[Tensor, "..."] | Float[Tensor, "..."],
    *,
    group: "ProcessGroup | None" = None,
    **keywords: Unpack[VocabParallelStatsKeywords],
) -> tuple[Float[Tensor, "..."], LossStats]:
    """Return the loss of `vocab_parallel_label_smoothed_cross_entropy` and statistics of each row.

    They take one more collective, a minimum: which class is the first largest.

    Args:
        local_logits: see `vocab_parallel_label_smoothed_cross_entropy`.
        labels: see `vocab_parallel_label_smoothed_cross_entropy`.
        group: see `vocab_parallel_label_smoothed_cross_entropy`.
        differentiable: whether gradients flow through nll, lse and entropy, for losses made of them.
        keywords: the options of `vocab_parallel_label_smoothed_cross_entropy`, with the same defaults.

    Returns:
        The loss, reduced as asked, and `LossStats` with one value per row, over all classes and the same on every rank;
        see `label_smoothed_cross_entropy_with_stats`.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: see `vocab_parallel_label_smoothed_cross_entropy`.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> local_logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
        >>> _, stats = vocab_parallel_label_smoothed_cross_entropy_with_stats(local_logits, torch.tensor([0, 1]))
        >>> stats.prediction.tolist(), f"{torch.exp(stats.nll.mean()):.4f}"
        ([0, 2], '5.2975')
        >>> dist.destroy_process_group()
    """
    differentiable = keywords.pop("differentiable")
    loss, stats = _evaluate(local_logits, labels, group, keywords, with_stats=True, differentiable=differentiable)
    assert stats is not None
    return loss, stats


def _evaluate(
    local_logits: Tensor,
    labels: Tensor,
    group: "ProcessGroup | None",
    keywords: VocabParallelKeywords,
    *,
    with_stats: bool,
    differentiable: bool = False,
) -> tuple[Float[Tensor, "..."], LossStats | None]:
    """Return the loss, and the statistics if asked for. See `vocab_parallel_label_smoothed_cross_entropy`."""
    ranks = ranks_of(group)
    try:
        options = LossOptions.of({**keywords, "implementation": None})
        check_flag("differentiable", differentiable)
        given = check(local_logits, labels, options, keywords, of_shard=True)
        _check_gradients(given)
    except Exception:
        if isinstance(local_logits, Tensor):
            tell_failure(ranks, local_logits.device)
        raise
    statistics = with_stats + differentiable
    shard, batch = shard_of(given, options, keywords, statistics, ranks)
    losses, stats, divisor = row_losses(shard, batch, options, keywords["denominator"], statistics)
    shape = given.logits.shape[:-1]
    loss = reduce_losses(losses.reshape(shape), options, divisor)
    return loss, None if stats is None else LossStats(*(of_rows.reshape(shape) for of_rows in stats))


def _check_gradients(given: Given) -> None:
    for name in ("class_weight", "prior"):
        vector = getattr(given, name)
        if vector is not None and vector.requires_grad:
            raise error("shard_gradient", name=name)
    if given.labels.is_floating_point():
        if given.labels.requires_grad:
            raise error("shard_gradient", name="labels")
        if isinstance(given.smoothing, Tensor) and given.smoothing.requires_grad:
            raise error("shard_gradient", name="smoothing of soft labels")
    if not torch.compiler.is_compiling():
        tensors = [value for value in vars(given).values() if isinstance(value, Tensor)]
        if any(torch._C._functorch.is_batchedtensor(tensor) for tensor in tensors):
            raise error("shard_transform", transform="rule for vmap", instead="make the new dimension one of rows")
