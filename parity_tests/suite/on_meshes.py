"""What `test_dtensor_layers.py` runs in each of four processes. It loads no JAX."""

from typing import Any

import numpy as np
import torch
from torch.distributed import tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import lsce_torch
from parity_tests.losses.adapters import LEAVES, LossError, to_torch
from parity_tests.losses.sharded_torch import mesh_of

# For each dimension of a mesh its size, and how hidden and weight are divided over it.
Layout = tuple[tuple[int, str, str], ...]
_PLACEMENTS = {
    "whole": tensor.Replicate(),
    "rows": tensor.Shard(0),
    "sequence": tensor.Shard(1),
    "features": tensor.Shard(1),
    "classes": tensor.Shard(0),
}
NAMES = ("data", "model")
loss_of = lsce_torch.linear_label_smoothed_cross_entropy
loss_and_stats = lsce_torch.linear_label_smoothed_cross_entropy_with_stats


def layer_on_mesh(arrays: dict[str, Any], layout: Layout, is_plain: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return hidden, weight and bias, which require gradients, divided over a mesh, and their placements."""
    mesh, ndim = mesh_of(tuple(size for size, *_ in layout)), arrays["hidden"].ndim
    placements: dict[str, list[Any]] = {
        "hidden": [
            tensor.Shard(ndim - 1) if of_hidden == "features" else _PLACEMENTS[of_hidden] for _, of_hidden, _ in layout
        ],
        "weight": [_PLACEMENTS[of_weight] for *_, of_weight in layout],
        "bias": [_PLACEMENTS["whole" if of_weight == "features" else of_weight] for *_, of_weight in layout],
    }
    leaves = {}
    for name in LEAVES:
        if name in arrays:
            leaf = to_torch(arrays[name])
            leaf = leaf.T.contiguous() if name == "weight" else leaf
            if name != "hidden" or not is_plain:
                leaf = tensor.distribute_tensor(leaf, mesh, placements[name])
            leaves[name] = leaf.requires_grad_()
    return leaves, placements


def loss_and_gradients(
    _: Any, options: dict[str, Any], arrays: dict[str, Any], layout: Layout, is_plain: bool, compiled: bool
) -> dict[str, Any]:
    """Return the loss and the gradients as whole tensors."""
    leaves, placements = layer_on_mesh(arrays, layout, is_plain)
    tensors = {name: to_torch(value) for name, value in arrays.items() if name not in leaves}
    upstream = tensors.pop("upstream")
    function = loss_of
    if compiled:
        torch.compiler.reset()
        function = torch.compile(loss_of, fullgraph=True)
    bias = {"bias": leaves["bias"]} if "bias" in leaves else {}
    loss: Any = function(leaves["hidden"], leaves["weight"], tensors.pop("labels"), **bias, **tensors, **options)
    if isinstance(loss, tensor.DTensor) == is_plain:
        raise LossError(f"hidden is plain: {is_plain}, and the loss is a {type(loss).__name__}")
    if not is_plain:
        whole = [tensor.Replicate()] * len(layout)
        upstream = tensor.DTensor.from_local(upstream.expand(loss.shape), loss.device_mesh, whole)
    (loss * upstream).sum().backward()
    results = {"loss": loss.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
    for name, gradient in results.items():
        if isinstance(gradient, tensor.DTensor):
            if name != "loss" and list(gradient.placements) != placements[name]:
                raise LossError(f"{name} is {placements[name]}, and its gradient {gradient.placements}")
            results[name] = gradient.full_tensor()
    return results


class Head(torch.nn.Module):
    """A last layer with the loss, or without it."""

    def __init__(self, weight: Any, bias: Any) -> None:
        super().__init__()
        self.head = torch.nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        self.head.weight, self.head.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

    def forward(self, hidden: Any, labels: Any, options: dict[str, Any]) -> Any:
        if labels is None:
            return hidden.clone()
        return loss_of(hidden, self.head.weight, labels, bias=self.head.bias, **options)


def with_fsdp(
    _: Any, options: dict[str, Any], arrays: dict[str, Any], sizes: tuple[int, int], is_inside: bool
) -> dict[str, Any]:
    """Return the sum of the losses, and this rank's parts of the gradients, of a layer of FSDP2 and tensor parallelism.

    Args:
        options: of the loss, which is a sum.
        arrays: of the case.
        sizes: how many ranks divide the rows, and how many the classes.
        is_inside: whether the loss is computed in the forward of the module.
    """
    mesh = mesh_of(sizes, NAMES)
    tensors = {name: to_torch(value) for name, value in arrays.items()}
    data, factor = mesh.get_local_rank("data"), tensors.pop("upstream")
    model = Head(tensors.pop("weight").T.contiguous(), tensors.pop("bias"))
    if sizes[1] > 1:
        parallelize_module(model, mesh["model"], {"head": ColwiseParallel()})
    fully_shard(model, mesh=mesh["data"], reshard_after_forward=True)
    # gloo has no other sums.
    model.set_gradient_divide_factor(1.0)
    model.set_force_sum_reduction_for_comms(True)
    hidden, labels = (torch.tensor_split(tensors.pop(name), sizes[0])[data] for name in ("hidden", "labels"))
    hidden.requires_grad_()
    if is_inside:
        loss = model(hidden, labels, options)
        (loss * factor).backward()
        torch.distributed.all_reduce(loss := loss.detach(), group=mesh.get_group("data"))
    else:
        of_rows = [tensor.Shard(0), tensor.Replicate()]
        where = mesh if sizes[1] > 1 else mesh["data"]
        rows, labels = (
            tensor.DTensor.from_local(each, where, of_rows[: where.ndim])
            for each in (model(hidden, None, options), labels)
        )
        loss = loss_of(rows, model.head.weight, labels, bias=model.head.bias, **options)
        (loss * factor.item()).backward()
        loss = loss.full_tensor().detach()
    gradients: list[Any] = [model.head.weight.grad, model.head.bias.grad]
    assert [type(placement).__name__ for placement in gradients[0].placements] == (
        ["_StridedShard", "Shard"] if sizes[1] > 1 else ["Shard"]
    )
    weight, bias = (gradient.to_local() for gradient in gradients)
    return {"loss": loss, "hidden": hidden.grad, "weight": weight, "bias": bias}


def statistics(_: Any, options: dict[str, Any], arrays: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Return loss and statistics of the linear loss, whose weight has one 1 for each class: hidden is the logits."""
    given = {"hidden": arrays["logits"], "weight": np.eye(arrays["logits"].shape[-1], dtype=arrays["logits"].dtype)}
    leaves, placements = layer_on_mesh(given, layout, is_plain=False)
    tensors = {name: to_torch(value) for name, value in arrays.items() if name not in ("logits", "upstream")}
    loss, stats = loss_and_stats(leaves["hidden"], leaves["weight"], **tensors, **options)
    assert stats.nll.placements == tuple(placements["hidden"])
    results = {"loss": loss, **stats._asdict()}
    return {name: value.full_tensor().detach() for name, value in results.items()}


def module(_: Any) -> tuple[Any, Any]:
    """Return the loss of the module, and of the function."""
    weight = tensor.distribute_tensor(torch.arange(12.0).reshape(6, 2), mesh_of((4,)), [tensor.Shard(0)])
    given = torch.ones(3, 2), weight, torch.tensor([0, 5, 2])
    return lsce_torch.LinearLabelSmoothedCrossEntropyLoss(smoothing=0.2)(*given), loss_of(*given, smoothing=0.2)


def compiled_as_refused(_: Any) -> Any:
    weight = tensor.distribute_tensor(torch.ones(8, 2), mesh_of((2, 2)), [tensor.Shard(0), tensor.Shard(0)])
    return torch.compile(loss_of, backend="eager", fullgraph=True)(torch.ones(3, 2), weight, torch.tensor([0, 1, 2]))


def compiled_with_other_labels(_: Any) -> Any:
    weight = tensor.distribute_tensor(torch.ones(8, 2), mesh_of((4,)), [tensor.Shard(0)])
    labels = torch.tensor([0, 1, torch.distributed.get_rank()])
    return torch.compile(loss_of, fullgraph=True)(torch.ones(3, 2), weight, labels)


def refused(_: Any, how: str) -> Any:
    """Return the loss of a layer that it does not take."""
    mesh, rank = mesh_of((2, 2)), torch.distributed.get_rank()
    hidden, weight, labels = torch.ones(4, 2), torch.ones(8, 2), torch.zeros(4, dtype=torch.int64)
    whole, by_class = [tensor.Replicate()] * 2, [tensor.Replicate(), tensor.Shard(0)]
    options: dict[str, Any] = {}
    divided: Any = tensor.distribute_tensor(weight, mesh, by_class)
    if how == "partial weight":
        divided = tensor.DTensor.from_local(weight, mesh, [tensor.Partial(), tensor.Replicate()])
    elif how == "partial hidden":
        hidden = tensor.DTensor.from_local(hidden, mesh, [tensor.Partial(), tensor.Replicate()])
    elif how == "strided hidden":
        weight = torch.ones(8, 4)
        divided = weight
        hidden = fully_shard(
            parallelize_module(torch.nn.Linear(4, 8), mesh_of((2, 2), NAMES)["model"], ColwiseParallel()),
            mesh=mesh_of((2, 2), NAMES)["data"],
        ).weight
        labels = torch.zeros(8, dtype=torch.int64)
    elif how == "mesh":
        hidden = tensor.distribute_tensor(hidden, mesh_of((4,)), whole[:1])
    elif how == "gradient of class_weight":
        hidden = tensor.distribute_tensor(hidden, mesh, [tensor.Shard(0), tensor.Replicate()])
        options = {"class_weight": torch.ones(8, requires_grad=True)}
    elif how == "labels of a tensor-parallel group":
        labels += rank % 2
    elif how == "labels where the weight is gathered":
        divided = tensor.distribute_tensor(weight, mesh, [tensor.Shard(0), tensor.Shard(0)])
        labels += rank // 2
    elif how == "soft labels":
        labels = torch.ones(4, 8)
    elif how == "shape":
        weight = torch.ones(8, 3)
        divided = tensor.distribute_tensor(weight, mesh, by_class)
    else:
        name, value = how.split("=")
        options = {name: {"chunked": "chunked", "False": False, "0.1": 0.1}[value]}
    return loss_of(hidden, divided, labels, **options)
