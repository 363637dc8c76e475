"""The dense loss of a DTensor: classes, rows, or both, divided over a mesh of devices.

Each rank computes the rows that it has: by `vocab_parallel.py` where their classes are divided, otherwise as it would
alone. The denominator of a mean is that of all rows. Tensors that are no DTensors are taken to be whole, and the same
on every rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lsce_spec import check_axis, check_batch_operand, check_class_mask, check_class_vector, check_labels
from lsce_torch.errors import error
from lsce_torch.functional import (
    LOSSES_OF_SUBCLASSES,
    label_smoothed_cross_entropy,
    label_smoothed_cross_entropy_with_stats,
)
from lsce_torch.inputs import check_tensor, compute_dtype, dtype_name
from lsce_torch.stats import LossStats
from lsce_torch.vocab_parallel import (
    vocab_parallel_label_smoothed_cross_entropy,
    vocab_parallel_label_smoothed_cross_entropy_with_stats,
)


def is_dtensor(value: object) -> bool:
    """Return whether a value is a DTensor. By its name: to load the class takes a second."""
    return type(value).__name__ == "DTensor"


def loss(
    logits: Any, labels: Tensor, keywords: Mapping[str, Any], with_stats: bool, differentiable: bool
) -> tuple[Tensor, LossStats | None]:
    """Return the loss, and the statistics if asked for, as DTensors: numbers of rows where the rows are.

    Args:
        logits: a DTensor. Each dimension of its mesh divides the classes, a dimension of rows, or nothing.
        labels: whole, or a DTensor on the same mesh.
        keywords: of `label_smoothed_cross_entropy`. Tensors are as the labels.
        with_stats: whether to return statistics.
        differentiable: whether gradients flow through them.

    Raises:
        ValueError: the logits are divided in a way that the loss does not take, or the options are.
        TypeError, ValueError: see `label_smoothed_cross_entropy`.
    """
    check_tensor("labels", labels)
    axis = check_axis(keywords["axis"], tuple(logits.shape))
    check_labels(tuple(labels.shape), dtype_name(labels), tuple(logits.shape), axis)
    mesh = _Mesh(logits, axis)
    if keywords["inplace_backward"]:
        raise error("dtensor_option", name="inplace_backward=True")
    if mesh.dim_of_classes is not None and keywords["implementation"] is not None:
        raise error("dtensor_option", name="implementation where the classes are divided")
    given, own_labels = _parts_here(mesh, labels, keywords)
    if keywords["reduction"] == "mean" and keywords["denominator"] is None and mesh.divides_rows:
        given["denominator"] = mesh.whole_number(_denominator(mesh, own_labels, given, keywords))
    result, stats = _loss_here(mesh, own_labels, given, {"differentiable": differentiable} if with_stats else {})
    whole = mesh.of_rows(result) if keywords["reduction"] == "none" else mesh.added_up(result)
    return whole, None if stats is None else LossStats(*map(mesh.of_rows, stats))


class _Mesh:
    """How the logits are divided over the ranks of a mesh."""

    def __init__(self, logits: Any, axis: int) -> None:
        """Check the placements of the logits.

        Raises:
            ValueError: the loss does not take them.
        """
        # Not before there is a DTensor: it takes a second.
        from torch.distributed import tensor  # noqa: PLC0415

        self.logits, self.axis, self.mesh, self.tensor = logits, axis, logits.device_mesh, tensor
        self.whole = [tensor.Replicate()] * self.mesh.ndim
        self.batch_dims = [dim for dim in range(logits.ndim) if dim != axis]
        self.batch_shape = [logits.shape[dim] for dim in self.batch_dims]
        self.dim_of_classes: int | None = None
        for place, placement in enumerate(logits.placements):
            if placement.is_partial():
                raise error("dtensor_partial", given=list(logits.placements))
            # By name: torch.compile cannot compare the classes, and _StridedShard may be a Shard too.
            if type(placement).__name__ not in ("Replicate", "Shard"):
                raise error("dtensor_placement", given=list(logits.placements))
            if placement.is_shard(axis):
                if self.dim_of_classes is not None:
                    raise error("dtensor_placement", given=list(logits.placements))
                self.dim_of_classes = place
        self.rows = self._placed({dim: place for place, dim in enumerate(self.batch_dims)})
        self.classes = self._placed({axis: 0})
        self.divides_rows = any(placement.is_shard() for placement in self.rows)

    def _placed(self, dims: Mapping[int, int]) -> list[Any]:
        """Return the placements of a tensor, from which dimension of it each dimension of the logits is."""
        return [
            self.tensor.Shard(dims[placement.dim]) if placement.is_shard() and placement.dim in dims else whole
            for placement, whole in zip(self.logits.placements, self.whole, strict=True)
        ]

    def logits_here(self) -> Tensor:
        """Return this rank's part of the logits. Its gradient is that of the logits, placed as they are."""
        is_compiling = torch.compiler.is_compiling()
        part: Tensor = self.logits.to_local() if is_compiling else _Here.apply(self.logits, self.tensor.DTensor)  # type: ignore[no-untyped-call]
        return part

    def here(self, value: Tensor, placements: Sequence[Any]) -> Tensor:
        """Return this rank's part of a tensor."""
        if not is_dtensor(value):
            value = self.tensor.DTensor.from_local(value, self.mesh, self.whole, run_check=False)
        part: Tensor = value.redistribute(self.mesh, placements).to_local()  # type: ignore[attr-defined]
        return part

    def of_rows(self, here: Tensor) -> Tensor:
        """Return numbers of all rows from those of this rank's."""
        shape = torch.Size(self.batch_shape)
        stride = torch.empty(shape, device="meta").stride()
        whole: Tensor = self.tensor.DTensor.from_local(
            here.contiguous(), self.mesh, self.rows, run_check=False, shape=shape, stride=stride
        )
        return whole

    def added_up(self, here: Tensor) -> Tensor:
        """Return the sum of a number over the ranks that have different rows."""
        parts = [self.tensor.Partial() if placement.is_shard() else placement for placement in self.rows]
        whole: Tensor = self.tensor.DTensor.from_local(here, self.mesh, parts, run_check=False)
        return whole.redistribute(self.mesh, self.whole) if self.divides_rows else whole  # type: ignore[attr-defined]

    def whole_number(self, here: Tensor) -> Tensor:
        """Return the same as a plain tensor."""
        whole: Tensor = self.added_up(here).to_local()  # type: ignore[attr-defined]
        return whole


class _Here(torch.autograd.Function):
    """`DTensor.to_local` with the strides of the logits for its gradient.

    Those that torch makes up are wrong for shards of different sizes. Its older versions gather the gradient then.
    """

    @staticmethod
    def forward(ctx: Any, logits: Any, kind: Any) -> Tensor:
        """Return this rank's part."""
        ctx.kind, ctx.mesh, ctx.placements = kind, logits.device_mesh, logits.placements
        ctx.sizes = {"shape": logits.shape, "stride": logits.stride()}
        part: Tensor = logits.to_local()
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        """Return the gradient as a DTensor."""
        whole: Tensor = ctx.kind.from_local(upstream, ctx.mesh, ctx.placements, run_check=False, **ctx.sizes)
        return whole, None


def _parts_here(mesh: _Mesh, labels: Tensor, keywords: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Return the keywords and the labels with this rank's parts of the tensors."""
    given, shape = dict(keywords), tuple(mesh.logits.shape)
    for name in ("smoothing", "where"):
        value = keywords[name]
        if isinstance(value, Tensor):
            check_batch_operand(name, tuple(value.shape), None, tuple(mesh.batch_shape))
            given[name] = mesh.here(value.expand(mesh.batch_shape), mesh.rows)
    for name in ("prior", "class_weight"):
        value = keywords[name]
        if isinstance(value, Tensor):
            check_class_vector(name, tuple(value.shape), dtype_name(value), shape[mesh.axis])
            given[name] = mesh.here(value, mesh.classes)
    mask = keywords["class_mask"]
    if isinstance(mask, Tensor):
        by_row = check_class_mask(tuple(mask.shape), dtype_name(mask), shape, mesh.axis)
        placements = mesh.logits.placements if by_row else mesh.classes
        given["class_mask"] = mesh.here(mask.expand(shape) if by_row else mask.reshape(-1), placements)
    placements = mesh.logits.placements if labels.is_floating_point() else mesh.rows
    return given, mesh.here(labels, placements)


def _denominator(mesh: _Mesh, labels: Tensor, given: Mapping[str, Any], keywords: Mapping[str, Any]) -> Tensor:
    """Return the sum of the labels' class weights over this rank's rows that count, or their number."""
    soft = labels.is_floating_point()
    counted = torch.ones_like(labels.select(mesh.axis, 0) if soft else labels, dtype=torch.bool)
    if given["where"] is not None:
        counted = counted & given["where"]
    if given["ignore_index"] is not None:
        counted = counted & (labels != given["ignore_index"])
    weights: Any = keywords["class_weight"]
    dtype = compute_dtype(mesh.logits)
    if weights is None or soft:
        return counted.sum().to(dtype)
    weights = weights.full_tensor() if is_dtensor(weights) else weights
    # A bad label weighs 1; see `functional.mean_divisor`.
    is_class = (labels >= 0) & (labels < weights.shape[0])
    of_labels = torch.where(is_class, weights.to(dtype)[torch.where(is_class, labels, 0).long()], 1)
    return torch.where(counted, of_labels, 0).sum()


def _loss_here(
    mesh: _Mesh, labels: Tensor, given: dict[str, Any], of_stats: dict[str, bool]
) -> tuple[Tensor, LossStats | None]:
    """Return the loss of this rank's rows, from all of their classes, and statistics if these have options."""
    logits, functions = mesh.logits_here(), _FUNCTIONS
    if mesh.dim_of_classes is not None:
        functions = _FUNCTIONS_OF_SHARDS
        given = {name: value for name, value in given.items() if name not in ("implementation", "inplace_backward")}
        given["group"] = mesh.mesh.get_group(mesh.dim_of_classes)
    plain, with_stats = functions
    return with_stats(logits, labels, **given, **of_stats) if of_stats else (plain(logits, labels, **given), None)


_FUNCTIONS: tuple[Any, Any] = (label_smoothed_cross_entropy, label_smoothed_cross_entropy_with_stats)
_FUNCTIONS_OF_SHARDS: tuple[Any, Any] = (
    vocab_parallel_label_smoothed_cross_entropy,
    vocab_parallel_label_smoothed_cross_entropy_with_stats,
)
LOSSES_OF_SUBCLASSES["DTensor"] = loss
