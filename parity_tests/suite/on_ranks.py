"""What `test_vocab_parallel_torch.py` runs in each process of a group. It loads no JAX."""

import os
import time
from collections import Counter
from typing import Any

import torch
from torch.distributed import tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lsce_torch
from lsce_torch import shards
from parity_tests.losses.adapters import to_torch
from parity_tests.losses.sharded_torch import mesh_of

loss_of = lsce_torch.vocab_parallel_label_smoothed_cross_entropy
loss_and_stats = lsce_torch.vocab_parallel_label_smoothed_cross_entropy_with_stats
STATISTICS = ("nll", "lse", "entropy")


def tensors_of(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: to_torch(value) for name, value in arrays.items()}


def statistics(group: Any, options: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
    """Return the loss and the statistics."""
    tensors = tensors_of(arrays)
    loss, stats = loss_and_stats(tensors.pop("logits"), **tensors, group=group, **options)
    return {"loss": loss, **stats._asdict()}


def gradients_of_statistics(
    group: Any, options: dict[str, Any], arrays: dict[str, Any], upstream: Any, compiled: bool
) -> dict[str, Any]:
    """Return the gradient of each statistic with respect to this rank's logits."""
    tensors, function = tensors_of(arrays), loss_and_stats
    if compiled:
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True)
    logits = tensors.pop("logits").requires_grad_()
    _, stats = function(logits, **tensors, group=group, differentiable=True, **options)
    factor = torch.from_numpy(upstream).to(stats.nll.dtype)
    return {
        name: torch.autograd.grad(getattr(stats, name), logits, factor, retain_graph=True)[0] for name in STATISTICS
    }


def gradient_of_smoothing(group: Any, options: dict[str, Any], arrays: dict[str, Any]) -> Any:
    tensors = tensors_of(arrays)
    smoothing = tensors["smoothing"].requires_grad_()
    loss_of(tensors.pop("logits"), **tensors, group=group, **options).sum().backward()
    return smoothing.grad


class Collectives(TorchDispatchMode):
    """Counts the collectives that are started."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket._qualified_op_name
        if name.startswith(("_c10d_functional::", "c10d::", "lsce::")):
            self.counts[name.split("::")[1]] += 1
        return function(*args, **(kwargs or {}))


def collectives(
    group: Any, options: dict[str, Any], arrays: dict[str, Any], with_stats: bool
) -> tuple[dict[str, int], dict[str, int], int]:
    """Return how many collectives forward and backward take, and how many numbers autograd keeps besides the logits."""
    tensors = tensors_of(arrays)
    logits, kept = tensors.pop("logits").requires_grad_(), {}

    def keep(tensor: Any) -> Any:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    forward, backward = Collectives(), Collectives()
    with forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = (loss_and_stats if with_stats else loss_of)(logits, **tensors, group=group, **options)
    with backward:
        (result[0] if with_stats else result).sum().backward()
    kept.pop(logits.untyped_storage().data_ptr())
    return dict(forward.counts), dict(backward.counts), sum(kept.values())


def in_blocks(group: Any, options: dict[str, Any], arrays: dict[str, Any], size: int) -> tuple[Any, Any]:
    """Return loss and gradient from blocks of at most so many logits."""
    tensors, whole = tensors_of(arrays), shards._BLOCK_SIZE
    logits = tensors.pop("logits").requires_grad_()
    shards._BLOCK_SIZE = size
    try:
        loss = loss_of(logits, **tensors, group=group, **options)
        loss.sum().backward()
    finally:
        shards._BLOCK_SIZE = whole
    return loss.detach(), logits.grad


def _on(smoothing: Any, num_classes: Any) -> Any:
    return 1 - smoothing


def _off(smoothing: Any, num_classes: Any) -> Any:
    return smoothing / num_classes


# Of functions that can be sent to other processes.
LEAKY = lsce_torch.Convention("leaky", _on, _off)


def called(group: Any, keywords: dict[str, Any]) -> Any:
    """Return the loss of a call as a user makes it."""
    arguments = {name: to_torch(value) if hasattr(value, "dtype") else value for name, value in keywords.items()}
    return loss_of(**{"group": group, **arguments})


def mapped(group: Any) -> Any:
    logits, labels = torch.zeros(2, 4, 3), torch.zeros(2, 4, dtype=torch.int64)
    return torch.func.vmap(lambda z, y: loss_of(z, y, group=group))(logits, labels)


def twice(group: Any) -> Any:
    logits = torch.zeros(4, 3, requires_grad=True)
    loss = loss_of(logits, torch.zeros(4, dtype=torch.int64), group=group)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), logits)


def forward_mode(group: Any) -> Any:
    logits, labels = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    return torch.func.jvp(lambda z: loss_of(z, labels, group=group), (logits,), (logits,))


def functional_gradient(group: Any, options: dict[str, Any], arrays: dict[str, Any]) -> tuple[Any, Any]:
    """Return two gradients: that of torch.func.grad, and that of backward."""
    tensors = tensors_of(arrays)
    logits = tensors.pop("logits")

    def total(z: Any) -> Any:
        return loss_of(z, **tensors, group=group, **options).sum()

    leaf = logits.clone().requires_grad_()
    total(leaf).backward()
    return torch.func.grad(total)(logits), leaf.grad


def default_group(_: Any) -> Any:
    """Return the loss of all processes, of which each has two classes."""
    logits = torch.arange(2.0).repeat(3, 1) + torch.distributed.get_rank()
    return loss_of(logits, torch.tensor([0, 3, 7]))


def outside(_: Any) -> Any:
    """Return the loss in a group that this process is not in, as torch.distributed.new_group returns it then."""
    group: Any = torch.distributed.GroupMember.NON_GROUP_MEMBER
    return loss_of(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), group=group)


def with_gradient(group: Any, name: str) -> Any:
    """Return the loss of a call in which something requires a gradient that has none."""
    keywords: dict[str, Any] = {"labels": torch.tensor([0, 1]), "smoothing": 0.1}
    if name == "class_weight":
        keywords["class_weight"] = torch.ones(3, requires_grad=True)
    elif name == "prior":
        keywords["prior"] = torch.full((3,), 1 / 6, requires_grad=True)
    else:
        keywords["labels"] = torch.zeros(2, 3, requires_grad=name == "labels")
        keywords["smoothing"] = torch.tensor(0.1, requires_grad=name != "labels")
    return loss_of(torch.zeros(2, 3), group=group, **keywords)


def dtensor_of(logits: Any, sizes: tuple[int, ...], placements: list[Any]) -> Any:
    return tensor.distribute_tensor(to_torch(logits), mesh_of(sizes), placements)


def statistics_of_dtensor(_: Any, options: dict[str, Any], arrays: dict[str, Any], axis: int) -> dict[str, Any]:
    """Return the loss and the statistics of logits whose rows and classes are divided, and where the statistics are."""
    tensors, logits = tensors_of(arrays), arrays["logits"]
    del tensors["logits"]
    rows = 0 if axis % logits.ndim else 1
    divided = dtensor_of(logits, (2, 2), [tensor.Shard(rows), tensor.Shard(axis % logits.ndim)])
    loss, stats = lsce_torch.label_smoothed_cross_entropy_with_stats(divided, **tensors, **options)
    assert stats.nll.placements == (tensor.Shard(0), tensor.Replicate())
    return {"loss": loss.full_tensor(), **{name: value.full_tensor() for name, value in stats._asdict().items()}}


def module_of_dtensors(_: Any, logits: Any, labels: Any, weight: Any) -> Any:
    """Return the module's loss of logits, labels and class weights that are DTensors, and by its plain tensors."""
    by_rows, by_class = [tensor.Shard(0), tensor.Replicate()], [tensor.Replicate(), tensor.Shard(0)]
    divided = dtensor_of(logits, (2, 2), [tensor.Shard(0), tensor.Shard(1)])
    label_smoothing = {"label_smoothing": 0.1}
    of_dtensors = lsce_torch.label_smoothed_cross_entropy(
        divided,
        tensor.distribute_tensor(to_torch(labels), divided.device_mesh, by_rows),
        class_weight=tensor.distribute_tensor(to_torch(weight), divided.device_mesh, by_class),
        ignore_index=-100,
    )
    module = lsce_torch.LabelSmoothedCrossEntropyLoss(to_torch(weight), **label_smoothing)
    return of_dtensors.full_tensor(), module(divided, to_torch(labels)).full_tensor()


def refused_dtensor(_: Any, how: str) -> Any:
    """Return the loss of a DTensor that it does not take."""
    logits, labels, options = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64), {}
    mesh = mesh_of((2, 2))
    placements: list[Any] = [tensor.Replicate(), tensor.Shard(1)]
    if how == "dtensor_partial":
        placements = [tensor.Partial(), tensor.Replicate()]
    elif how == "dtensor_placement":
        placements = [tensor.Shard(1), tensor.Shard(1)]
    elif how == "inplace_backward=True":
        options = {"inplace_backward": True}
    elif how == "labels_shape":
        labels = labels[:2]
    else:
        options = {"implementation": "fused"}
    divided = tensor.DTensor.from_local(logits, mesh, placements)
    return lsce_torch.label_smoothed_cross_entropy(divided, labels, **options)


linear_loss = lsce_torch.vocab_parallel_linear_label_smoothed_cross_entropy


def linear_statistics(
    group: Any, number: int, options: dict[str, Any], arrays: dict[str, Any], upstream: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return loss and statistics of the linear loss, and the gradients through these with respect to hidden.

    The weight has one 1 for each class, so hidden is the logits.
    """
    tensors, size = tensors_of(arrays), torch.distributed.get_world_size(group)
    hidden = tensors.pop("logits").requires_grad_()
    weight = torch.tensor_split(torch.eye(hidden.shape[-1], dtype=hidden.dtype), size)[number]
    function = lsce_torch.vocab_parallel_linear_label_smoothed_cross_entropy_with_stats
    loss, stats = function(hidden, weight, **tensors, group=group, differentiable=True, chunk_size=4, **options)
    factor = torch.from_numpy(upstream).to(stats.nll.dtype)
    gradients = {
        name: torch.autograd.grad(getattr(stats, name), hidden, factor, retain_graph=True)[0] for name in STATISTICS
    }
    return {"loss": loss.detach(), **{name: value.detach() for name, value in stats._asdict().items()}}, gradients


class _Products(TorchDispatchMode):
    """Counts the operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket._qualified_op_name in ("aten::mm", "aten::addmm"):
            first, second = args[-2:]
            self.flops.append(2 * first.shape[0] * first.shape[1] * second.shape[1])
        return function(*args, **(kwargs or {}))


def linear_flops(group: Any) -> list[int]:
    """Return how many operations each matrix product of loss and gradients takes: 16 rows, 8 features, 32 classes."""
    hidden, weight = (torch.ones(size, 8, requires_grad=True) for size in (16, 32))
    with _Products() as products:
        linear_loss(hidden, weight, torch.arange(16), group=group).backward()
    return products.flops


def linear_called(group: Any, changes: dict[str, Any]) -> Any:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(4, 2),
        "local_weight": torch.zeros(3, 2),
        "labels": torch.zeros(4, dtype=torch.int64),
    }
    arguments |= {name: to_torch(value) for name, value in changes.items()}
    return linear_loss(**arguments, group=group)


def linear_with_gradient(group: Any, arrays: dict[str, Any]) -> tuple[Any, Any]:
    """Return the loss and its gradient with respect to hidden."""
    tensors = tensors_of(arrays)
    hidden = tensors["hidden"].requires_grad_()
    loss = linear_loss(**tensors, group=group)
    loss.backward()
    return loss.detach(), hidden.grad


def in_debug_mode(group: Any, function: Any, *arguments: Any) -> Any:
    """Return what a function returns with TORCH_DISTRIBUTED_DEBUG=DETAIL."""
    distributed: Any = torch.distributed
    before = distributed.get_debug_level()
    distributed.set_debug_level(distributed.DebugLevel.DETAIL)
    try:
        return function(group, *arguments)
    finally:
        distributed.set_debug_level(before)


def gathered_weight(_: Any, hidden: Any) -> Any:
    """Return the linear loss of a weight that FSDP2 divides, of rows that are said to be the same on every rank."""
    weight = tensor.distribute_tensor(torch.ones(6, 2), mesh_of((4,)), [tensor.Shard(0)])
    loss = lsce_torch.linear_label_smoothed_cross_entropy(torch.from_numpy(hidden), weight, torch.tensor([0, 1]))
    return loss.detach()


def dtensor_with(_: Any, options: dict[str, Any]) -> Any:
    """Return the loss of logits that a mesh divides by rows and by classes."""
    divided = tensor.distribute_tensor(torch.zeros(4, 6), mesh_of((2, 2)), [tensor.Shard(0), tensor.Shard(1)])
    given = {name: to_torch(value) for name, value in options.items()}
    loss: Any = lsce_torch.label_smoothed_cross_entropy(divided, torch.arange(4), **given)
    return loss.full_tensor()


def linear_transformed(group: Any) -> Any:
    weight, labels = torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64)
    return torch.func.grad(lambda h: linear_loss(h, weight, labels, group=group))(torch.zeros(4, 2))


def called_late(group: Any, keywords: dict[str, Any], seconds: float) -> Any:
    time.sleep(seconds)
    return called(group, keywords)


def called_or_exit(group: Any, keywords: dict[str, Any], exits: bool) -> Any:
    if exits:
        os._exit(3)
    return called(group, keywords)


def denominators(group: Any, labels: Any) -> list[int]:
    """Return the denominators for all processes, this one, and rows and columns of a mesh of 2 x 2."""
    mesh = mesh_of((2, 2))
    groups = [None, (), [mesh.get_group(0), mesh.get_group(1)], group]
    return [
        int(lsce_torch.mean_denominator(torch.from_numpy(labels), ignore_index=-100, group=each)) for each in groups
    ]


def denominator_of_dtensor(_: Any, labels: Any) -> Any:
    by_row = tensor.distribute_tensor(torch.from_numpy(labels), mesh_of((4,)), [tensor.Shard(1)])
    return lsce_torch.mean_denominator(by_row)


def denominator_of_group(_: Any, labels: Any, group: Any) -> Any:
    return lsce_torch.mean_denominator(torch.from_numpy(labels), group=group)
