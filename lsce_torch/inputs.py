"""Check the tensors of a call and bring them into one form, which every implementation takes.

In a `Batch` the class dimension comes last, every label indexes safely, and two boolean tensors mark the rows that do
not count and those whose label is bad. So no implementation handles axes, ignored labels or bad labels itself. Only the
kernels for GPUs take labels as they are given, checked by `check`, since each operation on them is one to start.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.fx import Proxy

from lsce_spec import (
    FLOATING,
    INTEGER,
    OF_SHARD,
    LossOptions,
    bad_labels,
    check_axis,
    check_batch_operand,
    check_class_mask,
    check_class_vector,
    check_labels,
    check_logits,
    check_prior_entries,
    check_prior_values,
    check_smoothing_dtype,
    check_smoothing_values,
    is_number,
)
from lsce_spec.hints import for_type
from lsce_torch.device import is_on_cpu
from lsce_torch.errors import error

# Making a name of a dtype takes as long as an operation.
_DTYPE_NAMES = {getattr(torch, name): name for name in (*FLOATING, *INTEGER)}


@dataclass  # to freeze it would take longer than an operation
class Batch:
    """The tensors of one call, classes last.

    Args:
        logits: as the caller passed them, with the class dimension moved to the end.
        labels: class indices within range, or the probabilities of soft labels.
        smoothing: a number, or one number per row in the compute dtype.
        counted: False for rows that `where` or `ignore_index` leaves out; None if every row counts.
        bad: True for rows that count and whose label is not a class; None for soft labels, or if no label can be bad.
        prior: probabilities that replace the uniform distribution, in the compute dtype, or None.
        class_weight: in the compute dtype, or None.
        class_mask: True for the classes that take part, for all rows or for each, or None.
        overwritten: the tensors that the gradient of the logits will overwrite; None if it gets memory of its own.
        num_allowed: how many classes take part, if the logits are a shard of them; None if that can be counted here.
    """

    logits: Float[Tensor, "*batch K"]
    labels: Int[Tensor, "*batch"] | Float[Tensor, "*batch K"]
    smoothing: float | Float[Tensor, "*batch 1"]
    counted: Bool[Tensor, "*batch"] | None
    bad: Bool[Tensor, "*batch"] | None
    prior: Float[Tensor, " K"] | None
    class_weight: Float[Tensor, " K"] | None
    class_mask: Bool[Tensor, " K"] | Bool[Tensor, "*batch K"] | None
    overwritten: tuple[weakref.ref[Tensor], ...] | None = None
    num_allowed: Float[Tensor, ""] | Float[Tensor, "*batch 1"] | None = None

    @property
    def soft(self) -> bool:
        """Whether the labels are class probabilities."""
        return self.labels.is_floating_point()

    @property
    def has_row_masks(self) -> bool:
        """Whether rows have class masks of their own."""
        return self.class_mask is not None and self.class_mask.ndim > 1

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the losses."""
        return tuple(self.logits.shape[:-1])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the computation and of the loss: that of the logits, float32 for narrower ones."""
        return compute_dtype(self.logits)

    def counting_only(self, rows: Bool[Tensor, "*#batch"]) -> "Batch":
        """Return the batch in which a row counts only if it is also True in `rows`."""
        counted = torch.broadcast_to(rows, self.batch_shape)
        if self.counted is not None:
            counted = counted & self.counted
        smoothing = self.smoothing
        if not is_number(smoothing):
            # Rows that do not count must give the smoothing a derivative of 0. The entropy's is infinite at 0.
            smoothing = torch.where(counted[..., None], smoothing, 0.5)
        bad = None if self.bad is None else self.bad & counted
        class_mask = self.class_mask
        if class_mask is not None and self.has_row_masks:
            # Without any class the sums of a row would be NaN.
            class_mask = class_mask | ~counted[..., None]
        return replace(self, counted=counted, smoothing=smoothing, bad=bad, class_mask=class_mask)


def compute_dtype(logits: Tensor) -> torch.dtype:
    """Return float64 for float64 logits and float32 for all others."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def prepare(logits: Tensor, labels: Tensor, options: LossOptions, keywords: Mapping[str, Any]) -> Batch:
    """Return the tensors of a call in canonical form. See `check` and `canonical` for arguments and errors."""
    return canonical(check(logits, labels, options, keywords), options)


@dataclass
class Given:
    """The tensors of one call, checked, classes last. `canonical` makes a `Batch` of them.

    Args:
        logits: as the caller passed them, with the class dimension moved to the end.
        labels: class indices as the caller passed them, or the probabilities of soft labels.
        smoothing: a number, or one number per row in the compute dtype.
        where: booleans that broadcast to the losses, or None.
        prior: see `Batch`.
        class_weight: see `Batch`.
        class_mask: see `Batch`.
    """

    logits: Float[Tensor, "*batch K"]
    labels: Int[Tensor, "*batch"] | Float[Tensor, "*batch K"]
    smoothing: float | Float[Tensor, "*batch 1"]
    where: Bool[Tensor, "*#batch"] | None
    prior: Float[Tensor, " K"] | None
    class_weight: Float[Tensor, " K"] | None
    class_mask: Bool[Tensor, " K"] | Bool[Tensor, "*batch K"] | None


def check(
    logits: Tensor,
    labels: Tensor,
    options: LossOptions,
    keywords: Mapping[str, Any],
    *,
    of_shard: bool = False,
) -> Given:
    """Check the tensors of a call. Values are left to `canonical`, but for those of the prior.

    Args:
        logits: as the caller passed them.
        labels: as the caller passed them.
        options: the checked options of the call.
        keywords: `axis`, `where`, `prior`, `class_weight` and `class_mask` of the call, where given.
        of_shard: whether the logits are a shard of the classes, which may be empty; and vectors over the classes too.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, or a prior that is not a distribution.
    """
    check_tensor("logits", logits)
    check_tensor("labels", labels)
    if labels.device != logits.device:
        raise error("labels_device", logits=logits.device, labels=labels.device)
    axis = _checked_axis(logits, labels, keywords.get("axis", -1), of_shard, "axis" in keywords)
    dtype = compute_dtype(logits)
    hint = OF_SHARD if of_shard else ""
    class_mask = _class_mask(keywords.get("class_mask"), logits, axis, hint)

    if axis != logits.ndim - 1:
        logits = logits.movedim(axis, -1)
    batch_shape = tuple(logits.shape[:-1])
    class_weight = _class_vector("class_weight", keywords, logits, dtype, hint)
    prior = _class_vector("prior", keywords, logits, dtype, hint)
    if prior is not None:
        # The caller's values, not those rounded to dtype; and after the shape, since values are checked by class.
        check_prior(keywords["prior"], class_mask, of_shard=of_shard)

    smoothing = _row_smoothing(options.smoothing, batch_shape, dtype, logits.device)
    where = keywords.get("where")
    if where is not None:
        where = _as_tensor("where", where, logits.device)
        check_batch_operand("where", tuple(where.shape), dtype_name(where), batch_shape)
    if labels.is_floating_point():
        if options.ignore_index is not None:
            raise error("ignore_index_soft", given=options.ignore_index)
        labels = labels.movedim(axis, -1)
    return Given(logits, labels, smoothing, where, prior, class_weight, class_mask)


def canonical(given: Given, options: LossOptions, num_classes: Int[Tensor, ""] | None = None) -> Batch:
    """Return the checked tensors of a call in canonical form.

    Args:
        given: the tensors.
        options: of the call.
        num_classes: of all shards, if the logits are one.

    Raises:
        ValueError: a smoothing outside of [0, 1].
        IndexError: a label that is not a class, with bad_labels="raise".
    """
    labels, bad = given.labels, None
    number = given.logits.shape[-1] if num_classes is None else num_classes
    class_labels, vectors = labels, (given.prior, given.class_weight, given.class_mask)
    if not labels.is_floating_point():
        labels, bad = _class_indices(labels, number, given.class_mask)
        class_labels = labels if bad is None else labels.masked_fill(bad, 0)
    batch = Batch(given.logits, class_labels, given.smoothing, None, bad, *vectors)
    if given.where is not None:
        batch = batch.counting_only(given.where)
    if options.ignore_index is not None:
        batch = batch.counting_only(labels != options.ignore_index)
    if isinstance(batch.smoothing, Tensor):
        batch.smoothing = _smoothing_in_range(batch.smoothing)
    if batch.bad is not None and _is_nowhere(batch.bad):
        batch.bad = None
    if options.bad_labels == "raise" and batch.bad is not None:
        batch.bad = raise_bad_label(labels, batch.bad, given.class_mask is not None, number)
    return batch


def _checked_axis(logits: Tensor, labels: Tensor, axis: object, of_shard: bool, takes_axis: bool) -> int:
    """Check shapes and dtypes, and return the axis counted from the front.

    To check them takes longer than an operation, so what was good is kept.
    """
    described = logits.shape, logits.dtype, labels.shape, labels.dtype, axis, of_shard, takes_axis
    if torch.jit.is_tracing():  # type: ignore[no-untyped-call,attr-defined]
        raise error("not_traceable", tool="torch.jit.trace")
    if torch.compiler.is_compiling():
        return _check_shapes(*described)
    try:
        return _check_shapes_once(*described)
    except TypeError:  # of a check, which raises it again, or since an axis or a symbolic size has no hash
        return _check_shapes(*described)


def _check_shapes(
    logits: torch.Size,
    logits_dtype: torch.dtype,
    labels: torch.Size,
    labels_dtype: torch.dtype,
    axis: object,
    of_shard: bool,
    takes_axis: bool,
) -> int:
    """Raise unless shapes and dtypes fit, and return the axis counted from the front."""
    logits_shape = tuple(logits)
    check_logits(logits_shape, name_of(logits_dtype))
    from_front = check_axis(axis, logits_shape, of_shard=of_shard)
    hint = OF_SHARD if of_shard else ""
    check_labels(tuple(labels), name_of(labels_dtype), logits_shape, from_front, hint, takes_axis=takes_axis)
    return from_front


_check_shapes_once = lru_cache(maxsize=1024, typed=True)(_check_shapes)


def _row_smoothing(
    smoothing: float | Tensor, batch_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> float | Float[Tensor, "*batch 1"]:
    """Return a number as it is, and a tensor with one number per row, in that dtype."""
    if is_number(smoothing):
        return smoothing
    smoothing = _as_tensor("smoothing", smoothing, device)
    check_smoothing_dtype(dtype_name(smoothing))
    check_batch_operand("smoothing", tuple(smoothing.shape), None, batch_shape)
    return smoothing.to(dtype).broadcast_to(batch_shape)[..., None]


def _smoothing_in_range(smoothing: Float[Tensor, "*batch 1"]) -> Float[Tensor, "*batch 1"]:
    """Return the smoothings of rows, or raise if any is outside [0, 1]. Those not at hand become NaN there."""
    if values := extremes(smoothing):
        check_smoothing_values(values)
        return smoothing
    # A product, so that the gradient of the smoothing is NaN, too.
    return smoothing * torch.ones_like(smoothing).masked_fill(smoothing.clamp(0, 1) != smoothing, torch.nan)


def extremes(tensor: Tensor) -> list[float]:
    """Return the least and the largest value, NaN if there is one, or nothing if they are not at hand.

    To read values on an accelerator would wait for it; compiled and vmapped functions have none.
    """
    if not is_on_cpu(tensor) or not tensor.numel() or torch.compiler.is_compiling():
        return []
    try:
        least, largest = torch.aminmax(tensor.detach() if tensor.requires_grad else tensor)
        values = [least.item(), largest.item()]
        return values if all(map(is_number, values)) else []  # the others are symbols
    except RuntimeError:  # within vmap, or a tensor without data
        return []


def _class_indices(
    labels: Int[Tensor, "*batch"], num_classes: int | Int[Tensor, ""], class_mask: Bool[Tensor, "*#batch K"] | None
) -> tuple[Int[Tensor, "*batch"], Bool[Tensor, "*batch"] | None]:
    """Return labels in a signed dtype that is wide enough for any class index, and which of them are not a class.

    None stands for none, where the labels are at hand.
    """
    labels = _signed(labels)
    at_hand = extremes(labels) if class_mask is None else []
    if at_hand and at_hand[0] >= 0 and at_hand[1] < num_classes:
        return labels, None
    if isinstance(num_classes, Tensor):
        bad = (labels < 0) | (labels >= num_classes)
    else:
        bad = labels.clamp(0, num_classes - 1) != labels
    return labels, bad if class_mask is None else bad | ~at_labels(class_mask, labels.masked_fill(bad, 0))


def _signed(labels: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """Return labels in int64."""
    if labels.dtype == torch.int64:
        return labels
    signed = labels.to(torch.int64)
    if labels.dtype == torch.uint64:
        # Labels beyond int64 turned negative and become its largest number, which is never a class.
        signed = torch.where(signed < 0, torch.iinfo(torch.int64).max, signed)
    return signed


def _is_nowhere(bad: Bool[Tensor, "*batch"]) -> bool:
    """Whether no row is bad, as far as that is at hand."""
    if not is_on_cpu(bad) or torch.compiler.is_compiling():
        return False
    try:
        return not bad.any()
    except RuntimeError:  # within vmap, or a tensor without data
        return False


def at_labels(vector: Shaped[Tensor, "*#batch K"], labels: Int[Tensor, "*batch"]) -> Shaped[Tensor, "*batch"]:
    """Return the entry of a vector over the classes, or of one for each row, at each label."""
    if vector.ndim > 1:
        return torch.gather(vector, -1, labels[..., None]).squeeze(-1)
    # One dimension, since torch 2.9 cannot index with a tensor that has none under vmap.
    return vector[labels.reshape(-1)].reshape(labels.shape)


def is_dtensor(value: object) -> bool:
    """Return whether a value is a DTensor. By its name: to load the class takes a second."""
    return type(value).__name__ == "DTensor"


def dtype_name(tensor: Tensor) -> str:
    """Return the dtype's name as both frameworks spell it, such as "float32"."""
    return name_of(tensor.dtype)


def name_of(dtype: torch.dtype) -> str:
    """Return the name as both frameworks spell it, such as "float32"."""
    return _DTYPE_NAMES.get(dtype) or str(dtype).removeprefix("torch.")


def tensor_of(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor as it is, and a number as a scalar tensor that is filled where it is needed.

    `torch.as_tensor` would copy the number from the host. An accelerator is waited for at a copy, and neither CUDA
    graphs nor tracers can record one.
    """
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)


def check_tensor(name: str, value: object) -> None:
    """Raise unless the argument of that name is a tensor."""
    if not isinstance(value, Tensor):
        if isinstance(value, Proxy):
            raise error("not_traceable", tool="torch.fx.symbolic_trace")
        hint = for_type(name, value, "torch.as_tensor")
        raise error("array_type", name=name, expected="a tensor", given=type(value).__name__, hint=hint)
    if value.layout is not torch.strided:
        raise error("layout", name=name, given=value.layout)


def _as_tensor(name: str, value: object, device: torch.device) -> Tensor:
    try:
        if isinstance(value, (bool, int, float)):  # torch.compile of torch 2.9 does not know the union of them
            return torch.full((), value, device=device)  # see `tensor_of`
        return torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as problem:
        given, hint = type(value).__name__, for_type(name, value)
        raise error("array_type", name=name, expected="a tensor", given=given, hint=hint) from problem


def _class_mask(
    value: object, logits: Tensor, axis: int, hint: str
) -> Bool[Tensor, " K"] | Bool[Tensor, "*batch K"] | None:
    """Return one mask for all rows, or one for each, classes last; None if the call has none."""
    if value is None:
        return None
    mask = _as_tensor("class_mask", value, logits.device)
    by_row = check_class_mask(tuple(mask.shape), dtype_name(mask), tuple(logits.shape), axis, hint)
    return mask.expand(logits.shape).movedim(axis, -1) if by_row else mask.reshape(-1)


def _class_vector(
    name: str, keywords: Mapping[str, Any], logits: Tensor, dtype: torch.dtype, hint: str
) -> Float[Tensor, " K"] | None:
    """Return a tensor with one value per class, in that dtype, or None if the call has none of that name."""
    if keywords.get(name) is None:
        return None
    vector = _as_tensor(name, keywords[name], logits.device)
    check_class_vector(name, tuple(vector.shape), dtype_name(vector), logits.shape[-1], hint)
    return vector.to(dtype)


def check_prior(prior: Tensor, class_mask: Tensor | None, *, of_shard: bool = False) -> None:
    """Raise unless the prior is a distribution over the classes of the mask, which is the same for all rows.

    That of a shard need not sum to 1. Values are read only where that costs no synchronisation: on the CPU, outside
    torch.compile and vmap.
    """
    if class_mask is not None and class_mask.ndim > 1:
        raise error("prior_row_mask", given=list(class_mask.shape))
    prior = _as_tensor("prior", prior, torch.device("cpu") if not isinstance(prior, Tensor) else prior.device)
    check_class_vector("prior", tuple(prior.shape), dtype_name(prior), prior.numel())
    if torch.compiler.is_compiling() or not is_on_cpu(prior):
        return
    try:
        mask = None if class_mask is None else class_mask.tolist()
        values = prior.double().tolist()
        if of_shard:
            check_prior_entries(values, mask)
        else:
            check_prior_values(values, mask, torch.finfo(prior.dtype).eps / 2)
    except RuntimeError:  # within vmap, or a tensor without data
        return


def warn_of_bad_labels(
    labels: Tensor, batch: Batch, options: LossOptions, num_classes: int | Int[Tensor, ""] | None = None
) -> None:
    """Warn of labels that are no class, once for each line that calls a loss, where labels are at hand.

    Args:
        labels: as the caller passed them.
        batch: of the call, with the rows that count.
        options: of the call.
        num_classes: of all shards, if the logits are one.
    """
    # Labels on accelerators would be waited for, and `canonical` leaves nothing to say of those that are all classes.
    if batch.bad is None or not is_on_cpu(labels) or torch.compiler.is_compiling():
        return
    try:
        signed = _signed(labels)
        bad = extremes(signed[batch.bad])
        counted = extremes(signed if batch.counted is None else signed[batch.counted])
        number = int(batch.bad.sum())
    except RuntimeError:  # within vmap, or a tensor without data
        return
    if bad and counted:
        bad_labels.warn(
            number=number,
            total=labels.numel(),
            bad=(int(bad[0]), int(bad[1])),
            counted=(int(counted[0]), int(counted[1])),
            num_classes=int(batch.logits.shape[-1] if num_classes is None else num_classes),
            ignore_index=options.ignore_index,
            masked=batch.class_mask is not None,
        )


def raise_bad_label(
    labels: Int[Tensor, "*batch"], bad: Bool[Tensor, "*batch"], masked: bool, num_classes: int | Int[Tensor, ""]
) -> Bool[Tensor, "*batch"]:
    """Return `bad`, or raise if any label is bad; name the first."""
    if torch.compiler.is_compiling():
        # The program has the check as an operator, whose result the loss uses, so that it is not left out.
        return _raise_bad_label(labels, bad, masked, tensor_of(num_classes, torch.int64, labels.device))  # type: ignore[no-any-return]
    try:
        found = bool(bad.any())
    except RuntimeError as problem:  # within vmap, or a tensor without data
        raise error("bad_labels_unknown") from problem
    if found:
        expected = bad_labels.expected_labels(int(num_classes), masked)
        index = bad.nonzero()[0].tolist()
        value = labels[tuple(index)].item()
        ignore_index = f"ignore_index={value}" if value < 0 else "ignore_index"
        raise error("bad_label", value=value, index=index, expected=expected, ignore_index=ignore_index)
    return bad


@torch.library.custom_op("lsce::raise_bad_label", mutates_args=())
def _raise_bad_label(labels: Tensor, bad: Tensor, masked: bool, num_classes: Tensor) -> Tensor:
    return raise_bad_label(labels, bad, masked, num_classes).clone()


_raise_bad_label.register_fake(lambda _labels, bad, *_: torch.empty_like(bad))
