"""The losses of DTensors: classes, rows, or both, divided over a mesh of devices.

Each rank computes the rows that it has: by `vocab_parallel.py` where their classes are divided, otherwise as it would
alone. The denominator of a mean is that of all rows. Tensors that are no DTensors are taken to be whole, and the same
on every rank.

The weight of the linear loss may be divided over ranks that have different rows, as FSDP2 divides it. The ranks then
gather it, and in `backward` each gets its part of the sum of their gradients: K D numbers, and never a logit.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lsce_spec import check_axis, check_batch_operand, check_class_mask, check_class_vector, check_labels
from lsce_torch.denominators import mean_denominator
from lsce_torch.errors import error
from lsce_torch.functional import (
    LOSSES_OF_SUBCLASSES,
    label_smoothed_cross_entropy,
    label_smoothed_cross_entropy_with_stats,
)
from lsce_torch.inputs import check_tensor, compute_dtype, dtype_name, is_dtensor
from lsce_torch.linear import (
    LAYER_LOSSES_OF_SUBCLASSES,
    check_layer_tensors,
    linear_label_smoothed_cross_entropy,
    linear_label_smoothed_cross_entropy_with_stats,
)
from lsce_torch.ranks import Ranks, Told, in_order, joined_rows, ranks_of, tell, total
from lsce_torch.shards import rows_that_agree
from lsce_torch.stats import LossStats
from lsce_torch.vocab_parallel import (
    vocab_parallel_label_smoothed_cross_entropy,
    vocab_parallel_label_smoothed_cross_entropy_with_stats,
    vocab_parallel_linear_label_smoothed_cross_entropy,
    vocab_parallel_linear_label_smoothed_cross_entropy_with_stats,
)


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
    shape = tuple(logits.shape)
    axis = check_axis(keywords["axis"], shape)
    check_labels(tuple(labels.shape), dtype_name(labels), shape, axis)
    _check_placements("logits", logits)
    mesh = _Mesh(logits.device_mesh, logits.placements, shape, axis)
    if keywords["inplace_backward"]:
        raise error("dtensor_option", name="inplace_backward=True")
    of_shards = {"implementation": (None,), "inplace_backward": (False,)}
    functions, given = mesh.functions(_FUNCTIONS, keywords, of_shards)
    given, own_labels = _parts_here(mesh, labels, given, compute_dtype(logits))
    if torch.compiler.is_compiling():
        own_labels = in_order(own_labels, mesh.told)
    results = _called(
        functions, (mesh.here("logits", logits, mesh.logits), own_labels), given, with_stats, differentiable
    )
    return mesh.whole(*results, keywords["reduction"])


def loss_of_layer(
    hidden: Tensor, weight: Tensor, labels: Tensor, keywords: Mapping[str, Any], with_stats: bool, differentiable: bool
) -> tuple[Tensor, LossStats | None]:
    """Return the linear loss, and the statistics if asked for: DTensors if `hidden` is one, else plain tensors.

    A dimension of the mesh divides the rows of the loss if it divides those of `hidden`. Of the others the last one
    that divides the classes of the weight divides those of the loss. Along all but this one the weight is gathered.

    Args:
        hidden: whole, or a DTensor. At least one tensor is a DTensor, and all DTensors are on the same mesh.
        weight: likewise.
        labels: likewise.
        keywords: of `linear_label_smoothed_cross_entropy`. Tensors are likewise.
        with_stats: whether to return statistics.
        differentiable: whether gradients flow through them.

    Raises:
        ValueError: a tensor is divided in a way that the loss does not take, or the options are.
        TypeError, ValueError: see `linear_label_smoothed_cross_entropy`.
    """
    bias = keywords["bias"]
    _, num_classes = check_layer_tensors(hidden, weight, labels, bias)
    if labels.is_floating_point():
        raise error("linear_soft_labels", given=dtype_name(labels))
    shape = (*hidden.shape[:-1], num_classes)
    check_labels(tuple(labels.shape), dtype_name(labels), shape, len(shape) - 1, takes_axis=False)
    mesh = _mesh_of_layer(hidden, weight, labels, bias, shape)
    of_shards = {"implementation": (None,), "recompute": (None, True), "gradient_filter": (0,)}
    functions, given = mesh.functions(_LINEAR_FUNCTIONS, keywords, of_shards)
    given, own_labels = _parts_here(mesh, labels, given, compute_dtype(hidden))
    if not is_dtensor(hidden) and not torch.compiler.is_compiling():
        _check_rows(mesh, weight, own_labels, given, hidden)
    own_hidden = mesh.here("hidden", hidden, mesh.rows)
    own_weight = mesh.here("weight", weight, mesh.classes, has_sum=True)
    own_bias = None if bias is None else mesh.here("bias", bias, mesh.classes, has_sum=True)
    if torch.compiler.is_compiling():
        own_hidden, own_weight, own_bias = mesh.with_sums(own_hidden, own_weight, own_bias)
        own_labels = in_order(own_labels, mesh.told)
    given["bias"] = own_bias
    results = _called(functions, (own_hidden, own_weight, own_labels), given, with_stats, differentiable)
    return mesh.whole(*results, keywords["reduction"]) if is_dtensor(hidden) else results


def _mesh_of_layer(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, shape: tuple[int, ...]
) -> "_Mesh":
    """Return the mesh of a layer, and how it divides rows and classes. `shape` is that of the logits."""
    tensors: dict[str, Any] = {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias}
    dtensors = {name: tensor for name, tensor in tensors.items() if is_dtensor(tensor)}
    for name, tensor in dtensors.items():
        _check_placements(name, tensor, is_gathered=name != "hidden")
    mesh = next(iter(dtensors.values())).device_mesh
    axis = len(shape) - 1
    placements: list[Any] = [_loaded().Replicate()] * mesh.ndim
    if "hidden" in dtensors:
        for place, placement in enumerate(dtensors["hidden"].placements):
            if placement.is_shard() and placement.dim < axis:
                placements[place] = placement
    if "weight" in dtensors:
        by_class = [
            type(placement).__name__ == "Shard" and placement.dim == 0 for placement in dtensors["weight"].placements
        ]
        for place in reversed(range(mesh.ndim)):
            if by_class[place] and not placements[place].is_shard():
                placements[place] = _loaded().Shard(axis)
                break
    return _Mesh(mesh, placements, shape, axis)


def _check_rows(mesh: "_Mesh", weight: Any, labels: Tensor, given: Mapping[str, Any], hidden: Tensor) -> None:
    """Raise if ranks that are about to gather the weight have different rows.

    A plain `hidden` is taken to be the same on every rank. With FSDP2 each rank often has its own, which would give
    a wrong gradient.
    """
    where = given["where"] if isinstance(given["where"], Tensor) else None
    for place, placement in enumerate(weight.placements if is_dtensor(weight) else ()):
        if placement.is_shard() and place != mesh.dim_of_classes:
            rows = rows_that_agree(labels, where, given["ignore_index"], {"hidden": hidden})
            told = Told(1, labels.numel(), {}, rows, {"nothing": 0.0})
            tell(told, ranks_of(mesh.mesh.get_group(place)), labels.device)


def _loaded() -> Any:
    """Return torch's module of DTensors. Not before there is one: it takes a second."""
    from torch.distributed import tensor  # noqa: PLC0415

    return tensor


def _check_placements(name: str, value: Any, *, is_gathered: bool = False) -> None:
    """Raise unless the loss takes a tensor divided like this, or can gather it."""
    for placement in value.placements:
        if placement.is_partial():
            raise error("dtensor_partial", name=name, given=list(value.placements))
        # By name: torch.compile cannot compare the classes, and _StridedShard may be a Shard too.
        if not is_gathered and type(placement).__name__ not in ("Replicate", "Shard"):
            raise error("dtensor_placement", name=name, given=list(value.placements))


class _Mesh:
    """How rows and classes are divided over the ranks of a mesh."""

    def __init__(self, mesh: Any, placements: Sequence[Any], shape: tuple[int, ...], axis: int) -> None:
        """Work out how tensors of rows, and of classes, are divided.

        Args:
            mesh: of devices.
            placements: of the logits, whether a tensor holds these or not.
            shape: of the logits of all ranks.
            axis: which dimension of them has the classes.

        Raises:
            ValueError: several dimensions of the mesh divide the classes.
        """
        self.mesh, self.logits, self.shape, self.axis, self.tensor = mesh, list(placements), shape, axis, _loaded()
        self.at_all = [self.tensor.Replicate()] * mesh.ndim
        self.batch_dims = [dim for dim in range(len(shape)) if dim != axis]
        self.batch_shape = [shape[dim] for dim in self.batch_dims]
        dims_of_classes = [place for place, placement in enumerate(placements) if placement.is_shard(axis)]
        if len(dims_of_classes) > 1:
            raise error("dtensor_placement", name="logits", given=self.logits)
        self.dim_of_classes = dims_of_classes[0] if dims_of_classes else None
        self.rows = self._placed({dim: place for place, dim in enumerate(self.batch_dims)})
        self.classes = self._placed({axis: 0})
        self.divides_rows = any(placement.is_shard() for placement in self.rows)
        # For torch.compile: results of the collectives so far. The next one waits for them; see `in_order`.
        self.told: list[Tensor] = []

    def _placed(self, dims: Mapping[int, int]) -> list[Any]:
        """Return the placements of a tensor, from which dimension of it each dimension of the logits is."""
        return [
            self.tensor.Shard(dims[placement.dim]) if placement.is_shard() and placement.dim in dims else at_all
            for placement, at_all in zip(self.logits, self.at_all, strict=True)
        ]

    def functions(
        self, functions: tuple[Any, Any], keywords: Mapping[str, Any], of_shards: Mapping[str, Sequence[Any]]
    ) -> tuple[tuple[Any, Any], dict[str, Any]]:
        """Return the two functions that each rank calls, and the keywords that they take.

        Args:
            functions: where the classes are not divided.
            keywords: of the call.
            of_shards: keywords that there are not where the classes are divided, and the values that ask for nothing.
        """
        if self.dim_of_classes is None:
            return functions, dict(keywords)
        for name, possible in of_shards.items():
            if keywords[name] not in possible:
                raise error("dtensor_option", name=f"{name} where the classes are divided")
        given = {name: value for name, value in keywords.items() if name not in of_shards}
        return _OF_SHARDS[functions], {**given, "group": self.mesh.get_group(self.dim_of_classes)}

    def mask_of_rows(self, mask: Any) -> Any:
        """Return a class mask for this rank's rows and all classes, which come last."""
        if not isinstance(mask, Tensor):
            return mask
        if check_class_mask(tuple(mask.shape), dtype_name(mask), self.shape, self.axis):
            at_rows = [self.at_all[0] if place.is_shard(self.axis) else place for place in self.logits]
            return self.here("class_mask", mask.expand(self.shape), at_rows).movedim(self.axis, -1)
        return self.here("class_mask", mask.reshape(-1), self.at_all)

    def here(self, name: str, value: Tensor, placements: Sequence[Any], *, has_sum: bool = False) -> Tensor:
        """Return this rank's part of a tensor. The gradient is placed as the tensor is, or is whole as the tensor is.

        Args:
            name: of the tensor.
            value: a DTensor, or whole.
            placements: of the parts.
            has_sum: whether the gradient is a sum over all rows. It is in float32 or wider, and so the part is as well
                if other ranks have other rows.
        """
        if not is_dtensor(value):
            value = self.tensor.DTensor.from_local(value, self.mesh, self.at_all, run_check=False)
        elif not torch.compiler.is_compiling() and value.device_mesh != self.mesh:  # type: ignore[attr-defined]
            given, expected = value.device_mesh.mesh.tolist(), self.mesh.mesh.tolist()  # type: ignore[attr-defined]
            raise error("dtensor_mesh", name=name, given=given, expected=expected)
        for place, placement in enumerate(value.placements):  # type: ignore[attr-defined]
            if type(placement).__name__ == "_StridedShard":
                value = _gathered(name, value, place)
        dtype = compute_dtype(value) if has_sum and self.divides_rows else value.dtype
        part: Tensor
        if torch.compiler.is_compiling():
            return self._here_compiled(name, value, placements, dtype)
        of_gradient = self._with_parts(placements) if has_sum else list(placements)
        part = _Here.apply(value, placements, of_gradient, dtype)  # type: ignore[no-untyped-call]
        return part

    def _here_compiled(self, name: str, value: Any, placements: Sequence[Any], dtype: torch.dtype) -> Tensor:
        """Return this rank's part of a DTensor. A gradient that is a sum is one already; see `with_sums`."""
        pairs = zip(value.placements, placements, strict=True)
        is_gathered = any(old.is_shard() and old != new for old, new in pairs)
        if is_gathered and sum(placement.is_shard(0) for placement in value.placements) > 1:
            # Backward this would take collectives whose order the compiler chooses.
            raise error("dtensor_placement", name=name, given=list(value.placements))
        if is_gathered and self.told:
            here = in_order(value.to_local(), self.told)
            value = self.tensor.DTensor.from_local(
                here, self.mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
            )
        part: Tensor = value.to(dtype).redistribute(self.mesh, placements).to_local()
        if is_gathered:
            self.told.append(part.detach())
        return part

    def _with_parts(self, placements: Sequence[Any]) -> list[Any]:
        """Return the placements of a gradient that is a sum over rows, before ranks with different rows add it up."""
        pairs = zip(self.rows, placements, strict=True)
        return [self.tensor.Partial() if rows.is_shard() else placement for rows, placement in pairs]

    def with_sums(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the parts of a layer, with gradients of weight and bias that are sums over the rows of all ranks."""
        groups = [ranks_of(self.mesh.get_group(place)) for place, rows in enumerate(self.rows) if rows.is_shard()]
        if not groups:
            return hidden, weight, bias
        layer: tuple[Tensor, Tensor, Tensor | None] = _Summed.apply(hidden, weight, bias, groups)  # type: ignore[no-untyped-call]
        return layer

    def whole(self, loss: Tensor, stats: LossStats | None, reduction: str) -> tuple[Tensor, LossStats | None]:
        """Return the loss of all rows, and their statistics, from those of this rank's rows."""
        loss = self.of_rows(loss) if reduction == "none" else self.added_up(loss)
        return loss, None if stats is None else LossStats(*map(self.of_rows, stats))

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
        return whole.redistribute(self.mesh, self.at_all) if self.divides_rows else whole  # type: ignore[attr-defined]

    def whole_number(self, here: Tensor) -> Tensor:
        """Return the same as a plain tensor."""
        whole: Tensor = self.added_up(here).to_local()  # type: ignore[attr-defined]
        return whole


class _Summed(torch.autograd.Function):
    """The parts of a layer as they are. Their gradients are added up in one order, for torch.compile."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, groups: Sequence[Ranks]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return them."""
        ctx.groups = groups
        return hidden.view_as(hidden), weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    def backward(ctx: Any, of_hidden: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients, those of weight and bias added up over the groups."""
        told, found = [of_hidden], []
        for gradient in others:
            summed = gradient
            if summed is not None:
                for ranks in ctx.groups:
                    summed = total(summed, ranks, told)
                    told = [summed]
            found.append(summed)
        return of_hidden, *found, None


class _Here(torch.autograd.Function):
    """`DTensor.redistribute` and `to_local`, in another dtype, with the strides of the DTensor for its gradient.

    The strides that torch makes up are wrong for shards of different sizes; its older versions gather the gradient
    then. And it would add up narrow gradients in their own dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, value: Any, placements: Sequence[Any], of_gradient: Sequence[Any], dtype: torch.dtype
    ) -> Tensor:
        """Return this rank's part."""
        ctx.kind, ctx.mesh, ctx.dtype, ctx.of_gradient = type(value), value.device_mesh, value.dtype, of_gradient
        ctx.placements = value.placements
        ctx.sizes = {"shape": value.shape, "stride": value.stride()}
        part: Tensor = value.redistribute(value.device_mesh, placements).to_local()
        return part.view_as(part) if part.dtype == dtype else part.to(dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient as a DTensor."""
        whole = ctx.kind.from_local(upstream, ctx.mesh, ctx.of_gradient, run_check=False, **ctx.sizes)
        gradient: Tensor = whole.redistribute(ctx.mesh, ctx.placements).to(ctx.dtype)
        return gradient, None, None, None


def _gathered(name: str, value: Any, place: int) -> Tensor:
    """Return a DTensor gathered along a dimension of its mesh, where it is _StridedShard(0).

    FSDP2 makes such a weight if tensor parallelism has divided it by Shard(0) already. Older versions of
    torch gather them wrongly.

    Raises:
        ValueError: it is none of these, or within torch.compile.
    """
    strided, later = value.placements[place], range(place + 1, value.device_mesh.ndim)
    by_row = [dim for dim in later if value.placements[dim].is_shard(0)]
    is_known = strided.dim == 0 and strided.split_factor == math.prod(value.device_mesh.size(dim) for dim in by_row)
    if torch.compiler.is_compiling() or len(by_row) != 1 or not is_known:
        raise error("dtensor_placement", name=name, given=list(value.placements))
    start, end = _part(value.shape[0], value.device_mesh, by_row[0])
    result: Tensor = _Gathered.apply(value, place, end - start)  # type: ignore[no-untyped-call]
    return result


def _part(length: int, mesh: Any, place: int) -> tuple[int, int]:
    """Return where this rank's part of a dimension begins and ends that a dimension of the mesh divides."""
    step = -(-length // mesh.size(place))
    start = min(mesh.get_local_rank(place) * step, length)
    return start, min(start + step, length)


class _Gathered(torch.autograd.Function):
    """The parts along a dimension of the mesh, joined."""

    @staticmethod
    def forward(ctx: Any, value: Any, place: int, length: int) -> Tensor:
        """Return the DTensor, which is Replicate there. `length` is that of the parts together."""
        ctx.kind, ctx.mesh, ctx.placements, ctx.place = type(value), value.device_mesh, value.placements, place
        ctx.sizes = {"shape": value.shape, "stride": value.stride()}
        ranks = ranks_of(ctx.mesh.get_group(place))
        placements = [_loaded().Replicate() if dim == place else each for dim, each in enumerate(ctx.placements)]
        joined = joined_rows(value.to_local(), length, ranks)
        whole: Tensor = ctx.kind.from_local(joined, ctx.mesh, placements, run_check=False, **ctx.sizes)
        return whole

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> tuple[Tensor, None, None]:
        """Return this rank's part of the gradient."""
        here = upstream.to_local()
        start, end = _part(here.shape[0], ctx.mesh, ctx.place)
        part: Tensor = ctx.kind.from_local(here[start:end], ctx.mesh, ctx.placements, run_check=False, **ctx.sizes)
        return part, None, None


def _parts_here(
    mesh: _Mesh, labels: Tensor, keywords: Mapping[str, Any], dtype: torch.dtype
) -> tuple[dict[str, Any], Tensor]:
    """Return the keywords with this rank's parts of the tensors and the denominator of all rows, and the labels."""
    given = dict(keywords)
    for name in ("class_weight", "prior", "denominator"):
        if mesh.divides_rows and isinstance(keywords[name], Tensor) and keywords[name].requires_grad:
            raise error("shard_gradient", name=name)
    for name in ("smoothing", "where"):
        value = keywords[name]
        if isinstance(value, Tensor):
            check_batch_operand(name, tuple(value.shape), None, tuple(mesh.batch_shape))
            given[name] = mesh.here(name, value.expand(mesh.batch_shape), mesh.rows)
    for name in ("prior", "class_weight"):
        value = keywords[name]
        if isinstance(value, Tensor):
            check_class_vector(name, tuple(value.shape), dtype_name(value), mesh.shape[mesh.axis])
            given[name] = mesh.here(name, value, mesh.classes)
    mask = keywords["class_mask"]
    if isinstance(mask, Tensor):
        by_row = check_class_mask(tuple(mask.shape), dtype_name(mask), mesh.shape, mesh.axis)
        expanded = mask.expand(mesh.shape) if by_row else mask.reshape(-1)
        given["class_mask"] = mesh.here("class_mask", expanded, mesh.logits if by_row else mesh.classes)
    own_labels = mesh.here("labels", labels, mesh.logits if labels.is_floating_point() else mesh.rows)
    given["denominator"] = _denominator(mesh, own_labels, given, keywords, dtype)
    return given, own_labels


def _denominator(
    mesh: _Mesh, labels: Tensor, given: Mapping[str, Any], keywords: Mapping[str, Any], dtype: torch.dtype
) -> Any:
    """Return the denominator of the call, or of the mean of all rows where other ranks have some of these."""
    denominator = keywords["denominator"]
    if denominator is None and keywords["reduction"] == "mean" and mesh.divides_rows:
        # In float64, so that ranks which add up in other orders do not get another float32 number.
        whole = mesh.whole_number(_mass(mesh, labels, given, keywords, dtype).to(torch.float64)).to(dtype)
        mesh.told.append(whole)
        return whole
    return denominator.full_tensor() if is_dtensor(denominator) else denominator


def _mass(
    mesh: _Mesh, labels: Tensor, given: Mapping[str, Any], keywords: Mapping[str, Any], dtype: torch.dtype
) -> Tensor:
    """Return the sum of the labels' class weights over this rank's rows that count, or their number."""
    rows, weights = labels, keywords["class_weight"]
    if labels.is_floating_point():
        # Each row counts as one, also on a rank that has no class.
        sizes = [size for dim, size in enumerate(labels.shape) if dim != mesh.axis]
        rows, weights = labels.new_zeros(sizes, dtype=torch.int64), None
    mask = None
    if weights is not None:
        weights = (weights.full_tensor() if is_dtensor(weights) else weights).to(dtype)
        mask = mesh.mask_of_rows(keywords["class_mask"])
    options = {name: given[name] for name in ("where", "ignore_index")}
    return mean_denominator(rows, group=(), **options, class_weight=weights, class_mask=mask).to(dtype)


def _called(
    functions: tuple[Any, Any],
    tensors: Sequence[Tensor],
    given: Mapping[str, Any],
    with_stats: bool,
    differentiable: bool,
) -> tuple[Tensor, LossStats | None]:
    """Return the loss of this rank's rows, from all of their classes, and the statistics if asked for."""
    plain, and_stats = functions
    if not with_stats:
        return plain(*tensors, **given), None
    result: tuple[Tensor, LossStats] = and_stats(*tensors, **given, differentiable=differentiable)
    return result


_FUNCTIONS: tuple[Any, Any] = (label_smoothed_cross_entropy, label_smoothed_cross_entropy_with_stats)
_LINEAR_FUNCTIONS: tuple[Any, Any] = (
    linear_label_smoothed_cross_entropy,
    linear_label_smoothed_cross_entropy_with_stats,
)
# What is called instead where the classes are divided.
_OF_SHARDS: dict[tuple[Any, Any], tuple[Any, Any]] = {
    _FUNCTIONS: (
        vocab_parallel_label_smoothed_cross_entropy,
        vocab_parallel_label_smoothed_cross_entropy_with_stats,
    ),
    _LINEAR_FUNCTIONS: (
        vocab_parallel_linear_label_smoothed_cross_entropy,
        vocab_parallel_linear_label_smoothed_cross_entropy_with_stats,
    ),
}
LOSSES_OF_SUBCLASSES["DTensor"] = loss
LAYER_LOSSES_OF_SUBCLASSES["DTensor"] = loss_of_layer
