"""Where a loss or a layer cuts the gradient: detached tensors and custom gradients, in the lines of its own code.

A cut that is undone lets the gradient through, so a rerun tells which cuts make a gradient other than the derivative.
"""

import inspect
import linecache
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from parity_tests.losses.adapters import forget_programs

# Packages whose lines are not the user's.
_FRAMEWORKS = ("jax", "flax", "torch")


class Cut(NamedTuple):
    """A place where a program cuts the gradient.

    Args:
        what: such as "stop_gradient", or the name of a custom gradient.
        is_custom: whether it is a custom gradient, which cannot be undone.
        file, line: of the user's code.
    """

    what: str
    is_custom: bool
    file: str
    line: int

    def __str__(self) -> str:
        """Return the place, with the text of the line."""
        text = linecache.getline(self.file, self.line).strip()
        return f"{self.what} in {Path(self.file).name}, line {self.line}" + (f": `{text}`" if text else "")


@contextmanager
def watched(framework: str, undone: Collection[Cut] = ()) -> Iterator[dict[Cut, None]]:
    """Collect the cuts of what runs in the context, and undo some.

    Args:
        framework: "jax", where nothing may be compiled before the context, or "torch"; others have no cuts.
        undone: the cuts to undo.
    """
    seen: dict[Cut, None] = {}
    if framework == "jax":
        with _watched_jax(seen, undone):
            yield seen
    elif framework == "torch":
        with _watched_torch(seen, undone):
            yield seen
    else:
        yield seen


def _is_undone(what: str, seen: dict[Cut, None], undone: Collection[Cut], is_custom: bool = False) -> bool:
    """Note a cut in the innermost line that is the user's; return whether it is to be undone."""
    here = str(Path(__file__).parent)
    frameworks = tuple(
        str(Path(sys.modules[name].__file__ or "").parent) for name in _FRAMEWORKS if name in sys.modules
    )
    frame, called = inspect.currentframe(), ""
    while frame and frame.f_code.co_filename.startswith((__file__, *frameworks)):
        called, frame = frame.f_code.co_name, frame.f_back
    # Cuts of the harness, and of JAX's own functions, such as that of the maximum in log_softmax.
    if frame is None or frame.f_code.co_filename.startswith(here) or (what == "stop_gradient" != called):
        return False
    cut = Cut(what, is_custom, frame.f_code.co_filename, frame.f_lineno)
    seen[cut] = None
    return cut in undone


@contextmanager
def _watched_jax(seen: dict[Cut, None], undone: Collection[Cut]) -> Iterator[None]:
    import jax

    primitive = jax.make_jaxpr(jax.lax.stop_gradient)(1.0).eqns[0].primitive
    bind, call = primitive.bind, jax.custom_vjp.__call__

    def stop(operand: Any, **options: Any) -> Any:
        return operand if _is_undone("stop_gradient", seen, undone) else bind(operand, **options)

    def custom(function: Any, *operands: Any, **options: Any) -> Any:
        _is_undone(f"custom_vjp of {getattr(function, '__name__', 'a function')}", seen, undone, is_custom=True)
        return call(function, *operands, **options)

    forget_programs()  # what is compiled already binds no primitives
    try:
        with patch.object(primitive, "bind", stop), patch.object(jax.custom_vjp, "__call__", custom):
            yield
    finally:
        forget_programs()


@contextmanager
def _watched_torch(seen: dict[Cut, None], undone: Collection[Cut]) -> Iterator[None]:
    import torch
    from torch import Tensor
    from torch.overrides import TorchFunctionMode

    detaching = (Tensor.detach, Tensor.detach_, torch.detach, torch.detach_, Tensor.data.__get__)  # type: ignore[attr-defined]
    apply = inspect.getattr_static(torch.autograd.Function, "apply")

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in detaching and _is_undone("detach", seen, undone):
                return args[0].clone()
            no_grad = function is torch._C._set_grad_enabled and args == (False,)
            if no_grad and _is_undone("no_grad", seen, undone):
                return None
            return function(*args, **(kwargs or {}))

    def custom(cls: Any, *args: Any, **kwargs: Any) -> Any:
        _is_undone(f"autograd.Function {cls.__name__}", seen, undone, is_custom=True)
        return apply.__get__(None, cls)(*args, **kwargs)

    with Mode(), patch.object(torch.autograd.Function, "apply", classmethod(custom)):
        yield
