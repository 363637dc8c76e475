"""Named tuples as the flat arguments of autograd Functions and operators, and what these keep for their derivatives.

Both take tensors and plain values in one flat list. Outside they are named tuples, such as `Operands`, the kinds below.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.autograd import forward_ad


@cache
def names_of(*kinds: Any) -> tuple[str, ...]:
    """Return the names of all fields of the kinds, in the order of the flat arguments."""
    return tuple(name for kind in kinds for name in kind._fields)


def grouped(arguments: Sequence[Any], *kinds: Any) -> list[Any]:
    """Return flat arguments as named tuples of these kinds."""
    groups, start = [], 0
    for kind in kinds:
        end = start + len(kind._fields)
        groups.append(kind._make(arguments[start:end]))
        start = end
    return groups


def needed_by(ctx: Any, *kinds: Any) -> list[str]:
    """Return the names of the arguments whose gradient autograd asks for."""
    return [name for name, needed in zip(names_of(*kinds), ctx.needs_input_grad, strict=True) if needed]


def in_order(gradients: Mapping[str, Tensor | None], *kinds: Any) -> tuple[Tensor | None, ...]:
    """Return the gradient of each flat argument, or None."""
    return tuple(gradients.get(name) for name in names_of(*kinds))


def given(tangents: Sequence[Any], *kinds: Any) -> dict[str, Tensor]:
    """Return the tangents that are there, by the name of their argument."""
    by_name = zip(names_of(*kinds), tangents, strict=True)
    return {name: tangent for name, tangent in by_name if isinstance(tangent, Tensor)}


def save(ctx: Any, results: Sequence[Tensor], arguments: Sequence[Any], *, forward_mode: bool = True) -> None:
    """Keep results and flat arguments: tensors in such a way that autograd notices any change to them."""
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    ctx.save_for_backward(*results, *tensors)
    if forward_mode:
        ctx.save_for_forward(*results, *tensors)
    ctx.num_results = len(results)
    ctx.others = [_TENSOR if isinstance(value, Tensor) else value for value in arguments]
    ctx.set_materialize_grads(False)


def saved(ctx: Any, *kinds: Any) -> tuple[Any, ...]:
    """Return the results, and the arguments as named tuples of these kinds."""
    kept = ctx.saved_tensors
    tensors = iter(kept[ctx.num_results :])
    arguments = [next(tensors) if value is _TENSOR else value for value in ctx.others]
    return kept[: ctx.num_results], *grouped(arguments, *kinds)


def nestable(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """Let outer levels of forward mode, as in `jacfwd(jacfwd(f))`, differentiate the tangents that a rule computes.

    torch calls the rule with forward mode off, so that the outer levels would take all for constants. With forward mode
    on, what was kept must be without the tangents of the rule's own level.
    """

    @wraps(jvp)
    def nested(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            primals = tuple(forward_ad.unpack_dual(tensor).primal for tensor in ctx.saved_tensors)  # type: ignore[no-untyped-call]
            kept = SimpleNamespace(saved_tensors=primals, num_results=ctx.num_results, others=ctx.others)
            return jvp(kept, *tangents)

    return nested


_TENSOR = object()  # stands for a tensor among the arguments that are kept as they are
