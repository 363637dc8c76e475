"""Logits whose memory their gradient takes: which can be, and that nothing uses them afterwards."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lsce_spec import error


def what_is_overwritten(given: Tensor) -> tuple[weakref.ref[Tensor], ...]:
    """Return the tensors to guard, the caller's and the one that it is a view of; raise where that is impossible."""
    if not given.requires_grad:
        return ()
    if torch.compiler.is_compiling() or not has_memory(given):
        raise error("inplace_transformed")
    if _overlaps(given):
        raise error("inplace_logits", problem="some of these share their memory")
    guarded = [given] if given._base is None else [given, given._base]
    if any(type(tensor) not in {Tensor, torch.nn.Parameter} for tensor in guarded):
        raise error("inplace_logits", problem=f"these are a {type(given).__name__}")
    return tuple(weakref.ref(tensor) for tensor in guarded)


def has_memory(*tensors: Tensor) -> bool:
    """Whether these are plain tensors: not of a transform, of a batch of gradients, or with a tangent."""
    try:
        for tensor in tensors:
            tensor.data_ptr()
    except RuntimeError:
        return False
    return all(forward_ad.unpack_dual(tensor).tangent is None for tensor in tensors)  # type: ignore[no-untyped-call]


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements may share memory: unless each dimension steps over all that the finer ones reach."""
    reached = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reached:
                return True
            reached += stride * (size - 1)
    return False


def forbid_use(tensors: tuple[weakref.ref[Tensor], ...]) -> None:
    """Make tensors that have been overwritten raise at any use."""
    for reference_to in tensors:
        tensor = reference_to()
        if tensor is not None:
            tensor.__class__ = _Overwritten


class _Overwritten(Tensor):
    """What logits become whose memory the gradient has taken: everything but `grad` raises."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Raise, but for the gradient."""
        if function in {Tensor.grad.__get__, Tensor.grad.__set__}:  # type: ignore[union-attr]
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args)
        raise error("overwritten")

    def __repr__(self) -> str:  # type: ignore[override]
        """Say what happened: a debugger must be able to show it."""
        return "<logits overwritten by their gradient>"
