"""Named tuples as the flat arguments of autograd Functions and operators, and what these keep for their derivatives.

Both take tensors and plain values in one flat list. Outside they are named tuples, such as `Operands`, the kinds below.
"""

from collections.abc import Iterable, Mapping
from itertools import chain, islice
from typing import Any

from torch import Tensor


def names_of(*kinds: Any) -> tuple[str, ...]:
    """Return the names of all fields of the kinds, in the order of the flat arguments."""
    return tuple(chain.from_iterable(kind._fields for kind in kinds))


def grouped(arguments: Iterable[Any], *kinds: Any) -> tuple[Any, ...]:
    """Return flat arguments as named tuples of these kinds."""
    remaining = iter(arguments)
    groups = tuple(kind._make(islice(remaining, len(kind._fields))) for kind in kinds)
    assert next(remaining, None) is None
    return groups


def needed_by(ctx: Any, *kinds: Any) -> list[str]:
    """Return the names of the arguments whose gradient autograd asks for."""
    return [name for name, needed in zip(names_of(*kinds), ctx.needs_input_grad, strict=True) if needed]


def in_order(gradients: Mapping[str, Tensor | None], *kinds: Any) -> tuple[Tensor | None, ...]:
    """Return the gradient of each flat argument, or None."""
    return tuple(gradients.get(name) for name in names_of(*kinds))


def save(ctx: Any, results: Iterable[Tensor], arguments: Iterable[Any], *, forward_mode: bool = True) -> None:
    """Keep results and flat arguments: tensors in such a way that autograd notices any change to them."""
    results, arguments = tuple(results), tuple(arguments)
    ctx.is_tensor = tuple(isinstance(value, Tensor) for value in arguments)
    ctx.others = tuple(None if isinstance(value, Tensor) else value for value in arguments)
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    ctx.save_for_backward(*results, *tensors)
    if forward_mode:
        ctx.save_for_forward(*results, *tensors)
    ctx.set_materialize_grads(False)


def saved(ctx: Any, *kinds: Any) -> tuple[Any, ...]:
    """Return the results, and the arguments as named tuples of these kinds."""
    kept = ctx.saved_tensors  # checks each time whether a tensor has changed
    num_results = len(kept) - sum(ctx.is_tensor)
    results, tensors = kept[:num_results], iter(kept[num_results:])
    pairs = zip(ctx.is_tensor, ctx.others, strict=True)
    return results, *grouped((next(tensors) if is_tensor else other for is_tensor, other in pairs), *kinds)
