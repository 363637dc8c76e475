"""Checks a call's tensors and brings them into the one form that every implementation takes.

Classes last, labels that index safely, rows that do not count marked. An implementation then knows nothing of
axes, ignored labels or bad ones beyond two boolean tensors.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lsce_spec import (
    LossOptions,
    check_axis,
    check_batch_operand,
    check_class_vector,
    check_labels,
    check_logits,
    check_prior_values,
    error,
    is_floating,
    is_number,
)


@dataclass(frozen=True)
class Batch:
    """The tensors of one call, classes last.

    Args:
        logits: as the caller passed them, but for the place of the class dimension.
        labels: class indices within range, or the probabilities of soft labels.
        smoothing: number, or one per row in the compute dtype.
        counted: False for rows that `where` or `ignore_index` takes out; None where every row counts.
        bad: True for rows that count and whose label is no class; None for soft labels.
        prior: probabilities that replace the uniform distribution, in the compute dtype, or None.
        class_weight: in the compute dtype, or None.
        class_mask: True for the classes that take part, or None.
    """

    logits: Float[Tensor, "*batch K"]
    labels: Int[Tensor, "*batch"] | Float[Tensor, "*batch K"]
    smoothing: float | Float[Tensor, "*batch 1"]
    counted: Bool[Tensor, "*batch"] | None
    bad: Bool[Tensor, "*batch"] | None
    prior: Float[Tensor, " K"] | None
    class_weight: Float[Tensor, " K"] | None
    class_mask: Bool[Tensor, " K"] | None

    @property
    def soft(self) -> bool:
        """Whether the labels are class probabilities."""
        return self.labels.is_floating_point()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype to compute in and to return the loss in: that of the logits, float32 for narrower ones."""
        return compute_dtype(self.logits)


def compute_dtype(logits: Tensor) -> torch.dtype:
    """Return float64 for float64 logits and float32 for all others."""
    return torch.promote_types(logits.dtype, torch.float32)


def prepare(
    logits: Tensor,
    labels: Tensor,
    options: LossOptions,
    *,
    axis: int,
    where: Tensor | None,
    prior: Tensor | None,
    class_weight: Tensor | None,
    class_mask: Tensor | None,
) -> Batch:
    """Check the tensors of a call and return them in canonical form.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, or a prior that is no distribution.
        IndexError: a label that is no class, with bad_labels="raise".
    """
    _check_tensor("logits", logits)
    _check_tensor("labels", labels)
    check_logits(tuple(logits.shape), dtype_name(logits))
    axis = check_axis(axis, tuple(logits.shape))
    check_labels(tuple(labels.shape), dtype_name(labels), tuple(logits.shape), axis)
    dtype = compute_dtype(logits)

    logits = logits.movedim(axis, -1)
    batch_shape, num_classes = tuple(logits.shape[:-1]), logits.shape[-1]
    class_weight = _class_vector("class_weight", class_weight, num_classes, logits.device, dtype)
    class_mask = _class_vector("class_mask", class_mask, num_classes, logits.device, None)
    if prior is not None:
        # Shape first: the values are checked class by class. And the caller's own values, not those rounded to dtype.
        rounded = _class_vector("prior", prior, num_classes, logits.device, dtype)
        check_prior(prior, class_mask)
        prior = rounded

    smoothing = options.smoothing
    if not is_number(smoothing):
        smoothing = torch.as_tensor(smoothing, dtype=dtype, device=logits.device)
        check_batch_operand("smoothing", tuple(smoothing.shape), None, batch_shape)
        smoothing = smoothing.broadcast_to(batch_shape)[..., None]

    counted = None
    if where is not None:
        where = torch.as_tensor(where, device=logits.device)
        check_batch_operand("where", tuple(where.shape), dtype_name(where), batch_shape)
        counted = where.broadcast_to(batch_shape)

    if is_floating(dtype_name(labels)):
        if options.ignore_index is not None:
            raise error("ignore_index_soft", given=options.ignore_index)
        labels = labels.movedim(axis, -1)
        return Batch(logits, labels, smoothing, counted, None, prior, class_weight, class_mask)

    # Signed and wide enough to compare with any class index; a uint64 beyond int64 turns negative, no class either.
    labels = labels.to(torch.int64)
    if options.ignore_index is not None:
        kept = labels != options.ignore_index
        counted = kept if counted is None else counted & kept
    bad = (labels < 0) | (labels >= num_classes)
    if class_mask is not None:
        bad = bad | ~class_mask[torch.where(bad, 0, labels)]
    if counted is not None:
        bad = bad & counted
    if options.bad_labels == "raise":
        _raise_bad_label(labels, bad, num_classes, class_mask)
    safe = bad if counted is None else bad | ~counted
    labels = torch.where(safe, 0, labels)
    return Batch(logits, labels, smoothing, counted, bad, prior, class_weight, class_mask)


def dtype_name(tensor: Tensor) -> str:
    """Return the name that both frameworks share, such as "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise error(f"{name}_type", expected="a tensor", given=type(value).__name__)


def _class_vector(
    name: str,
    vector: Tensor | None,
    num_classes: int,
    device: torch.device,
    dtype: torch.dtype | None,
) -> Tensor | None:
    if vector is None:
        return None
    vector = torch.as_tensor(vector, device=device)
    check_class_vector(name, tuple(vector.shape), dtype_name(vector), num_classes)
    return vector if dtype is None else vector.to(dtype)


def check_prior(prior: Tensor, class_mask: Tensor | None) -> None:
    """Raise unless the prior is a distribution over the classes of the mask.

    Only where reading the values costs nothing: on the CPU, outside torch.compile and the transforms of torch.func.
    """
    prior = torch.as_tensor(prior)
    if not _is_readable(prior) or not (class_mask is None or _is_readable(class_mask)):
        return
    mask = _class_vector("class_mask", class_mask, prior.numel(), prior.device, None)
    check_prior_values(
        prior.double().tolist(), None if mask is None else mask.tolist(), torch.finfo(prior.dtype).eps / 2
    )


def _is_readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not _is_traced(tensor)


def _is_traced(tensor: Tensor) -> bool:
    """Whether the tensor stands for others, within torch.compile or a torch.func transform."""
    return torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _raise_bad_label(labels: Tensor, bad: Tensor, num_classes: int, class_mask: Tensor | None) -> None:
    if _is_traced(bad):
        raise error("bad_labels_compiled")
    if bad.any():
        expected = f"0 to {num_classes - 1}" + ("" if class_mask is None else ", inside class_mask")
        index = bad.nonzero()[0].tolist()
        raise error("bad_label", value=labels[tuple(index)].item(), index=index, expected=expected)
