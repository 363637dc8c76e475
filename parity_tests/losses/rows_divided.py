"""Losses whose rows are divided over microbatches or devices, each part with the denominator of all rows."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from parity_tests.losses.adapters import LEAVES, TorchAdapter, operands_of, to_torch
from parity_tests.losses.sharded import on_shards
from parity_tests.losses.sharded_torch import DIVISIONS, joined, run_on_ranks, same
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import AnyResult

AXIS = "data"
# The arguments that have a value for each row, beside the logits or hidden.
_OF_ROWS = ("labels", "where", "smoothing")


def as_mean(case: Case) -> Case | None:
    """Return a case whose rows can be divided, with the mean as its reduction; or None, for one row and no dimension.

    Its arrays have the dimensions of the logits or of the losses, where they would broadcast to them.
    """
    if not case.batch_shape:
        return None
    mask = case.class_mask
    if mask is not None and case.has_row_masks:
        mask = np.broadcast_to(mask, case.logits.shape).copy()
    return replace(
        case,
        options={**case.options, "reduction": "mean"},
        upstream=None,
        class_mask=mask,
        where=None if case.where is None else np.broadcast_to(case.where, case.batch_shape).copy(),
        smoothing=(
            case.smoothing
            if isinstance(case.smoothing, float)
            else np.broadcast_to(case.smoothing, case.batch_shape).copy()
        ),
    )


def row_axes(arrays: dict[str, Any], axis: int) -> dict[str, int]:
    """Return where each array of a call has the first dimension of rows, if it has any.

    Args:
        arrays: by the names of the arguments, as of a case that `as_mean` returned.
        axis: of the classes.
    """
    first = "hidden" if "hidden" in arrays else "logits"
    num_dims = arrays[first].ndim
    of_logits = 1 if first == "logits" and axis % num_dims == 0 else 0
    axes = {first: of_logits} | {name: 0 for name in _OF_ROWS if getattr(arrays.get(name), "ndim", 0)}
    if is_soft(arrays["labels"]):
        axes["labels"] = of_logits
    if getattr(arrays.get("class_mask"), "ndim", 0) == num_dims > 1:
        axes["class_mask"] = of_logits
    return axes


def parts_of(arrays: dict[str, Any], axes: dict[str, int], bounds: Sequence[int]) -> list[dict[str, Any]]:
    """Return the arguments for each part of the rows.

    Args:
        arrays: and options, by the names of the arguments.
        axes: see `row_axes`.
        bounds: where the parts begin, and the number of rows.
    """

    def part(name: str, start: int, end: int) -> Any:
        if name not in axes:
            return arrays[name]
        return arrays[name][(slice(None),) * axes[name] + (slice(start, end),)]

    return [{name: part(name, *each) for name in arrays} for each in pairwise(bounds)]


def is_soft(labels: Any) -> bool:
    """Whether labels of either framework are class probabilities."""
    return "float" in str(labels.dtype)


def denominator_of(package: Any, arrays: dict[str, Any], axis: int, **over: Any) -> Any:
    """Return what a package says that the mean of these rows divides by.

    Args:
        package: `lsce_jax` or `lsce_torch`.
        arrays: and options, by the names of the arguments.
        axis: of the classes.
        over: the axis or the group that divides the rows, as an argument of `mean_denominator`.
    """
    names = ("where", "ignore_index", "class_weight", "class_mask")
    given = {name: arrays[name] for name in names if arrays.get(name) is not None}
    labels, mask = arrays["labels"], given.get("class_mask")
    if mask is not None and mask.ndim > 1:  # of rows
        order = sorted(range(mask.ndim), key=lambda dim: dim == axis % mask.ndim)
        given["class_mask"] = mask.permute(order) if hasattr(mask, "permute") else mask.transpose(order)
    if is_soft(labels):
        labels = labels.argmax(axis)
        given.pop("class_weight", None)
        given.pop("class_mask", None)
    return package.mean_denominator(labels, **given, **over)


def in_microbatches(
    package: Any, bounds: Callable[[int], Sequence[int]], *, linear: bool = False
) -> Callable[..., Any]:
    """Return the mean loss of a package as a function of all rows, which adds up the losses of microbatches.

    Args:
        package: `lsce_jax` or `lsce_torch`.
        bounds: where the microbatches begin, and the number of rows, given that.
        linear: whether to take hidden and weight, and not logits.
    """
    loss = package.linear_label_smoothed_cross_entropy if linear else package.label_smoothed_cross_entropy
    operands = ("hidden", "weight", "labels") if linear else ("logits", "labels")

    def of_all_rows(*given: Any, **keywords: Any) -> Any:
        keywords |= dict(zip(operands, given, strict=False))
        axis = keywords.get("axis", -1)
        axes = row_axes(keywords, axis)
        if keywords.get("denominator") is None:
            keywords["denominator"] = denominator_of(package, keywords, axis)
        first = "hidden" if linear else "logits"

        ends = bounds(keywords[first].shape[axes[first]])
        losses = [loss(**part) for part in parts_of(keywords, axes, ends)]
        return sum(losses[1:], start=losses[0])

    return of_all_rows


def over_devices(num_devices: int, *, linear: bool = False, **options: Any) -> Callable[..., Any]:
    """Return the mean loss of `lsce_jax` as a function of all rows, in `jax.shard_map` over so many devices.

    Where their number does not divide the rows, rows that do not count are added at the end, whose logits are NaN.

    Args:
        num_devices: how many.
        linear: whether to take hidden and weight, and not logits.
        options: of the loss, in every call.
    """
    import jax
    import jax.numpy as jnp

    import lsce_jax

    loss = lsce_jax.linear_label_smoothed_cross_entropy if linear else lsce_jax.label_smoothed_cross_entropy
    operands = ("hidden", "weight", "labels") if linear else ("logits", "labels")
    mesh = jax.make_mesh((num_devices,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    spec: Any = jax.P
    fill = {"where": False, "labels": 0, "smoothing": 0.5, "class_mask": True}

    def of_all_rows(*given: Any, **keywords: Any) -> Any:
        keywords |= dict(zip(operands, given, strict=False))
        arrays = {name: keywords.pop(name) for name in list(keywords) if hasattr(keywords[name], "dtype")}
        axis = keywords.get("axis", -1)
        first = "hidden" if linear else "logits"
        num_rows = arrays[first].shape[row_axes(arrays, axis)[first]]
        added = -num_rows % num_devices
        if added and "where" not in arrays:
            shape = list(arrays[first].shape)
            del shape[axis % len(shape) if first == "logits" else -1]
            arrays["where"] = jnp.ones(shape, bool)
        axes = row_axes(arrays, axis)

        def filled(name: str) -> Any:
            if not added or name not in axes:
                return arrays[name]
            widths = [(0, added if dim == axes[name] else 0) for dim in range(arrays[name].ndim)]
            return jnp.pad(arrays[name], widths, constant_values=fill.get(name, float("nan")))

        def of_rows(here: dict[str, Any]) -> Any:
            denominator = keywords.get("denominator")
            if denominator is None:
                denominator = denominator_of(lsce_jax, {**here, **keywords}, axis, axis_name=AXIS)
            losses = loss(**{**here, **keywords, **options, "denominator": denominator})
            return jax.lax.psum(losses, AXIS)  # type: ignore[no-untyped-call]

        specs = {name: spec(*[None] * axes[name], AXIS) if name in axes else spec() for name in arrays}
        mapped = jax.shard_map(of_rows, mesh=mesh, in_specs=(specs,), out_specs=spec())
        return mapped({name: filled(name) for name in arrays})

    return of_all_rows


def mean_on_rank(group: Any, options: dict[str, Any], arrays: dict[str, Any], axis: int) -> dict[str, Any]:
    """Return the mean loss of the rows of all ranks, and the gradients of this rank's loss, as tensors."""
    import torch
    from torch import distributed

    import lsce_torch

    tensors = {name: to_torch(value) for name, value in arrays.items()}
    is_linear = "hidden" in tensors
    if is_linear:  # JAX has the features first
        tensors["weight"] = tensors["weight"].T.contiguous()
    leaves = {name: tensors[name].requires_grad_() for name in LEAVES if name in tensors}
    given = {**tensors, **options}
    if given.get("denominator") is None:
        given["denominator"] = denominator_of(lsce_torch, given, axis, group=group)
    loss_of: Any = lsce_torch.label_smoothed_cross_entropy
    if is_linear:
        loss_of = lsce_torch.linear_label_smoothed_cross_entropy
    loss = loss_of(**given)
    loss.backward()
    total: torch.Tensor = loss.detach()
    distributed.all_reduce(total, group=group)
    return {"loss": total, **{name: leaf.grad for name, leaf in leaves.items()}}


class RowsOnRanks(TorchAdapter):
    """The mean loss of `lsce_torch` with its rows divided over processes.

    Args:
        num_ranks: how many processes.
        division: which of `DIVISIONS`, of the rows.
        options: as in `TorchAdapter`.
    """

    def __init__(self, num_ranks: int, division: str, **options: Any) -> None:
        """Choose the division."""
        super().__init__(**{"name": f"torch, rows on {num_ranks} ranks, {division}", **options})
        self.num_ranks, self.division = num_ranks, division
        self.arithmetic = on_shards(self.arithmetic, num_ranks)

    def __call__(self, case: Case) -> AnyResult:
        """Return loss and gradient of a case that `as_mean` returned."""
        arrays, options = operands_of(case)
        del arrays["upstream"]
        axes = row_axes(arrays, case.axis)
        first = "hidden" if self.linear else "logits"
        bounds = DIVISIONS[self.division](arrays[first].shape[axes[first]], self.num_ranks)
        given = [(options, part, case.axis) for part in parts_of(arrays, axes, bounds)]
        answers = run_on_ranks(mean_on_rank, given)
        parts = {name: [answer[name] for answer in answers] for name in answers[0]}
        loss, of_rows = same(parts.pop("loss")), joined(parts.pop(first), axes[first])
        return self.result(case, {"loss": loss, first: of_rows, **{name: sum(each) for name, each in parts.items()}})
