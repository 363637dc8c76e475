"""`inplace_backward`: check that the gradient may overwrite the logits, and forbid any use of them afterwards."""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from lsce_torch.errors import error


def check_inplace(keywords: Mapping[str, Any]) -> None:
    """Raise unless `inplace_backward` is a boolean and the implementation can overwrite the logits."""
    inplace_backward = keywords["inplace_backward"]
    if not isinstance(inplace_backward, bool):
        raise error("flag", name="inplace_backward", given=repr(inplace_backward))
    if inplace_backward and keywords["implementation"] == "reference":
        raise error("inplace_reference")


def tensors_to_overwrite(given: Tensor) -> tuple[weakref.ref[Tensor], ...]:
    """Return the tensors that share the logits' memory: the caller's, and its base if it is a view.

    Raises:
        RuntimeError: the call is compiled or transformed.
        ValueError: elements of the logits share their memory, or the logits are of a subclass of Tensor.
    """
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
    """Whether all are plain tensors with data: none belongs to a transform or a batch of gradients or has a tangent."""
    try:
        for tensor in tensors:
            if is_wrapper(tensor) or forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
                return False
            tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def is_wrapper(value: object) -> bool:
    """Whether `value` is a tensor that stands for others. Results for it cannot be written into plain tensors."""
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return False
    return type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements may share memory: a dimension's stride is within the reach of the finer dimensions."""
    reached = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reached:
                return True
            reached += stride * (size - 1)
    return False


def forbid_use(tensors: tuple[weakref.ref[Tensor], ...]) -> None:
    """Make overwritten tensors raise at any use."""
    for reference_to in tensors:
        tensor = reference_to()
        if tensor is not None:
            tensor.__class__ = _Overwritten


class _Overwritten(Tensor):
    """Overwritten logits: everything but `grad` raises."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Raise, except for access to the gradient."""
        if function in {Tensor.grad.__get__, Tensor.grad.__set__}:  # type: ignore[union-attr]
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args)
        raise error("overwritten")

    def __repr__(self) -> str:  # type: ignore[override]
        """Say what happened: a debugger must be able to show it."""
        return "<logits overwritten by their gradient>"
