r"""The loss where the classes are divided over the ranks of a process group: no rank has all logits of a row.

A loss is made of a few sums over the classes, relative to the largest logit (see `sums.py`). So each rank sums over its
own classes, and what it sends is a few numbers for each row:

1. what the call is, how many classes the rank has, and checksums of the labels, of which rows count, and of other
   tensors that the ranks share: some thirty numbers, gathered. Ranks that disagree raise.
2. the largest logit of its classes, of which all ranks take the maximum,
3. its sums relative to that maximum, which all ranks add up. They are one tensor, and so one collective.

Conventions use the number of classes of all ranks. A rank counts its terms exp(z - m) that are 1 in place of adding
them, and one of those that all ranks count is left out. So small losses are as accurate as in one process.

The loss and its upstream gradient are the same on every rank. Once the sums over all classes are known, the gradient
of the logits needs no collective, and nothing as large as the logits is kept for it. Second derivatives need one: a
logit changes the log-sum-exp, and with it the gradient on every rank.

The linear loss makes the sums with the logits at hand for the maximum, relative to the rank's own, and changes them
when it knows the maximum of all. Eager calls take some rows at a time, in plain operations. torch.compile fuses these
over all rows.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lsce_spec import OF_SHARD, ChunkOptions, LossOptions, check_flag
from lsce_spec.keywords import takes
from lsce_torch.chunked import preferred_rows
from lsce_torch.device import takes_plain_operations
from lsce_torch.errors import error
from lsce_torch.inputs import Given, check, dtype_name
from lsce_torch.keywords import (
    VocabParallelKeywords,
    VocabParallelLinearKeywords,
    VocabParallelLinearStatsKeywords,
    VocabParallelStatsKeywords,
)
from lsce_torch.linear import prepare_layer
from lsce_torch.overwrite import has_memory
from lsce_torch.ranks import ranks_of, tell_failure
from lsce_torch.reductions import reduce_losses
from lsce_torch.shards import ShardedLayer, all_logits, row_losses, shard_of
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
    different shapes, dtypes, options, labels or other tensors of rows, and raise. On a GPU that check waits for the
    device. `backward` takes no collective.

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


@takes(VocabParallelLinearKeywords)
def vocab_parallel_linear_label_smoothed_cross_entropy(
    hidden: Float[Tensor, "... D"],
    local_weight: Float[Tensor, "K D"],
    labels: Int[Tensor, "..."],
    *,
    group: "ProcessGroup | None" = None,
    **keywords: Unpack[VocabParallelLinearKeywords],
) -> Float[Tensor, "..."]:
    """Return `linear_label_smoothed_cross_entropy` of a weight whose classes are divided over the ranks of a group.

    As `vocab_parallel_label_smoothed_cross_entropy` of the logits hidden @ local_weight.T + bias, of which each rank
    holds no more than one chunk of rows. They are computed twice: for the loss, and for the gradient. The
    collectives are those of the dense loss, and in `backward` the sum of hidden's gradients over the ranks.
    torch.compile computes all logits at once.

    Args:
        hidden: [..., D] features, the same on every rank, which is checked with TORCH_DISTRIBUTED_DEBUG=DETAIL; see
            `linear_label_smoothed_cross_entropy`. It requires a gradient on every rank or on none, since `backward`
            adds up what the ranks have.
        local_weight: [K of this rank, D], the rows of nn.Linear's weight of this rank's classes.
        labels: [...] class indices from 0 to K - 1, the same on every rank.
        group: see `vocab_parallel_label_smoothed_cross_entropy`.
        bias: a number for each of this rank's classes, or None.
        prior, class_weight, class_mask: this rank's slices. They take no gradient.
        smoothing, where, denominator: the same on every rank of the group.
        convention, ignore_index, z_loss, softcap, subtract_entropy, bad_labels, reduction: see
            `vocab_parallel_label_smoothed_cross_entropy`.
        chunk_size: see `linear_label_smoothed_cross_entropy`.

    Returns:
        Losses, with `reduction="none"` of shape [...], else a scalar. float64 for float64 hidden, otherwise float32.
        The gradient of hidden is whole, and the same on every rank; those of weight and bias are of this rank's
        classes.

    Raises:
        TypeError: wrong type or dtype, or labels that are probabilities.
        ValueError, IndexError, RuntimeError: see `vocab_parallel_label_smoothed_cross_entropy`. Also torch.func.

    Example: one process, which has all classes.
        >>> import torch
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> hidden, local_weight = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.eye(3, 2, requires_grad=True)
        >>> loss = vocab_parallel_linear_label_smoothed_cross_entropy(hidden, local_weight, torch.tensor([0, 1]))
        >>> loss.backward()
        >>> f"{loss:.4f}", local_weight.grad.shape
        ('0.3339', torch.Size([3, 2]))
        >>> dist.destroy_process_group()

    References:
        See `vocab_parallel_label_smoothed_cross_entropy` and `linear_label_smoothed_cross_entropy`.
    """
    return _evaluate_linear(hidden, local_weight, labels, group, keywords, with_stats=False)[0]


@takes(VocabParallelLinearStatsKeywords)
def vocab_parallel_linear_label_smoothed_cross_entropy_with_stats(
    hidden: Float[Tensor, "... D"],
    local_weight: Float[Tensor, "K D"],
    labels: Int[Tensor, "..."],
    *,
    group: "ProcessGroup | None" = None,
    **keywords: Unpack[VocabParallelLinearStatsKeywords],
) -> tuple[Float[Tensor, "..."], LossStats]:
    """Return the loss of `vocab_parallel_linear_label_smoothed_cross_entropy` and statistics of each row.

    They take one more collective, a minimum: which class is the first largest.

    Args:
        hidden: see `vocab_parallel_linear_label_smoothed_cross_entropy`.
        local_weight: see `vocab_parallel_linear_label_smoothed_cross_entropy`.
        labels: see `vocab_parallel_linear_label_smoothed_cross_entropy`.
        group: see `vocab_parallel_label_smoothed_cross_entropy`.
        differentiable: whether gradients flow through nll, lse and entropy.
        keywords: the options of `vocab_parallel_linear_label_smoothed_cross_entropy`, with the same defaults.

    Returns:
        The loss, reduced as asked, and `LossStats` with one value per row; see
        `vocab_parallel_label_smoothed_cross_entropy_with_stats`.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: see `vocab_parallel_linear_label_smoothed_cross_entropy`.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> hidden, local_weight = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.eye(3, 2)
        >>> _, stats = vocab_parallel_linear_label_smoothed_cross_entropy_with_stats(
        ...     hidden, local_weight, torch.tensor([0, 1])
        ... )
        >>> f"{torch.exp(stats.nll.mean()):.4f}"
        '1.1820'
        >>> dist.destroy_process_group()
    """
    differentiable = keywords.pop("differentiable")
    loss, stats = _evaluate_linear(
        hidden, local_weight, labels, group, keywords, with_stats=True, differentiable=differentiable
    )
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
    except Exception:  # whatever it is, the other ranks wait for this one
        if isinstance(local_logits, Tensor):
            tell_failure(ranks, local_logits.device)
        raise
    statistics = with_stats + differentiable
    shard, batch = shard_of(given, options, keywords, statistics, ranks)
    results = row_losses(shard, batch, options, keywords["denominator"], statistics)
    return _reduced(given, options, *results)


def _evaluate_linear(
    hidden: Tensor,
    local_weight: Tensor,
    labels: Tensor,
    group: "ProcessGroup | None",
    keywords: VocabParallelLinearKeywords,
    *,
    with_stats: bool,
    differentiable: bool = False,
) -> tuple[Float[Tensor, "..."], LossStats | None]:
    """Return the loss, and the statistics if asked for: `vocab_parallel_linear_label_smoothed_cross_entropy`."""
    ranks = ranks_of(group)
    try:
        options = LossOptions.of({**keywords, "implementation": None})
        check_flag("differentiable", differentiable)
        chunks = ChunkOptions.of({**keywords, "recompute": True, "gradient_filter": 0.0}, options)
        layer, num_here = prepare_layer(hidden, local_weight, labels, keywords["bias"], OF_SHARD)
        if labels.is_floating_point():
            raise error("linear_soft_labels", given=dtype_name(labels))
        logits = layer.hidden.new_zeros(1).expand(*layer.hidden.shape[:-1], num_here)
        given = check(logits, labels, options, keywords, of_shard=True)
        _check_gradients(given)
        if not torch.compiler.is_compiling() and not has_memory(*(tensor for tensor in layer if tensor is not None)):
            raise error("shard_transform", transform="transforms of torch.func", instead="use backward()")
    except Exception:  # whatever it is, the other ranks wait for this one
        if isinstance(hidden, Tensor):
            tell_failure(ranks, hidden.device)
        raise
    statistics, num_rows, num_features = with_stats + differentiable, labels.numel(), layer.hidden.shape[-1]
    shard, batch = shard_of(given, options, keywords, statistics, ranks, layer.hidden)
    layer = layer._replace(hidden=layer.hidden.reshape(num_rows, num_features))
    sharded = None
    if torch.compiler.is_compiling() or not num_rows:
        batch = replace(batch, logits=all_logits(layer, batch, ranks))
    else:
        preferred = preferred_rows(num_features, on_tpu=takes_plain_operations(layer.hidden))
        sharded = ShardedLayer(layer, chunks.rows_at_most(preferred, max(num_here, 1)))
    results = row_losses(shard, batch, options, keywords["denominator"], statistics, sharded)
    return _reduced(given, options, *results)


def _reduced(
    given: Given, options: LossOptions, losses: Tensor, stats: LossStats | None, divisor: float | Tensor
) -> tuple[Float[Tensor, "..."], LossStats | None]:
    """Return the loss, and statistics with the shape of the rows."""
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
