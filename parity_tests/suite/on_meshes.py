"""What `test_dtensor_layers.py` runs in each of four processes. It loads no JAX."""

from typing import Any

import torch
from torch.distributed import tensor

import lsce_torch
from parity_tests.losses.adapters import LEAVES, LossError, to_torch
from parity_tests.losses.sharded_torch import mesh_of

# For each dimension of a mesh its size, and how hidden and weight are divided over it.
Layout = tuple[tuple[int, str, str], ...]
_PLACEMENTS = {
    "whole": tensor.Replicate(),
    "rows": tensor.Shard(0),
    "features": tensor.Shard(1),
    "classes": tensor.Shard(0),
}
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
