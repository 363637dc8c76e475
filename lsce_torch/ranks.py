"""Messages between the ranks of a process group, by collectives that torch.compile puts into its graph.

A collective whose ranks disagree about its shape ends the process, or waits for ever. So the first thing that ranks
tell each other is what they were given, and each raises if that differs.
"""

import math
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from lsce_spec import CONVENTIONS, FLOATING
from lsce_spec.options import BAD_LABELS, REDUCTIONS
from lsce_torch.device import may_wait
from lsce_torch.errors import error

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Ranks(NamedTuple):
    """The ranks of a process group.

    Args:
        name: of the group; torch finds it by that.
        size: number of its ranks.
        rank: of this process among them.
    """

    name: str
    size: int
    rank: int


def has_group() -> bool:
    """Return whether this process is one of several that talk to each other."""
    distributed: Any = torch.distributed
    return bool(distributed.is_available() and distributed.is_initialized())


def ranks_of(group: "ProcessGroup | None") -> Ranks:
    """Return the ranks of a group, or of all processes for None.

    Raises:
        RuntimeError: there is no group, or this process is not in it.
        TypeError: it is no process group.
    """
    distributed: Any = torch.distributed
    if not has_group():
        raise error("no_group")
    # Loaded here: it takes a while, and most programs have one process.
    from torch.distributed import _functional_collectives  # noqa: F401, PLC0415

    if group is None:
        group = distributed.group.WORLD
    if not isinstance(group, distributed.ProcessGroup):
        if group == distributed.GroupMember.NON_GROUP_MEMBER:
            raise error("group_member")
        raise error("group_type", given=type(group).__name__)
    return Ranks(group.group_name, distributed.get_world_size(group), distributed.get_rank(group))


def checks_everything() -> bool:
    """Return whether the ranks also compare what is large: with TORCH_DISTRIBUTED_DEBUG=DETAIL, but not compiled."""
    if torch.compiler.is_compiling():
        return False
    distributed: Any = torch.distributed
    return bool(distributed.get_debug_level() == distributed.DebugLevel.DETAIL)


def total(rows: Shaped[Tensor, "..."], ranks: Ranks, after: Sequence[Tensor]) -> Shaped[Tensor, "..."]:
    """Return the sum over the ranks.

    Args:
        rows: of this rank.
        ranks: all ranks.
        after: results of the collectives before this one. A compiler may move a collective unless it depends on them,
            and not in the same way on every rank.
    """
    return _reduced(rows, ranks, after, "sum")


def largest(rows: Shaped[Tensor, "..."], ranks: Ranks, after: Sequence[Tensor]) -> Shaped[Tensor, "..."]:
    """Return the maximum over the ranks. See `total`."""
    return _reduced(rows, ranks, after, "max")


def least(rows: Shaped[Tensor, "..."], ranks: Ranks, after: Sequence[Tensor]) -> Shaped[Tensor, "..."]:
    """Return the minimum over the ranks. See `total`."""
    return _reduced(rows, ranks, after, "min")


def _reduced(rows: Tensor, ranks: Ranks, after: Sequence[Tensor], operation: str) -> Tensor:
    reduced: Tensor = torch.ops.lsce.reduced(rows, after, operation, ranks.name)
    return reduced


@torch.library.custom_op(
    "lsce::reduced", mutates_args=(), schema="(Tensor rows, Tensor[] after, str operation, str group) -> Tensor"
)
def _all_reduced(rows: Tensor, after: Sequence[Tensor], operation: str, group: str) -> Tensor:
    del after
    functional = torch.ops._c10d_functional
    reduced: Tensor = functional.wait_tensor(functional.all_reduce(rows.contiguous(), operation, group))
    return reduced


@_all_reduced.register_fake
def _(rows: Tensor, after: Sequence[Tensor], operation: str, group: str) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


def in_order(value: Shaped[Tensor, "..."], after: Sequence[Tensor]) -> Shaped[Tensor, "..."]:
    """Return the value for a collective, which torch.compile then does not move before the others. See `total`."""
    if not after:
        return value
    result: Tensor = torch.ops.lsce.in_order(value, after)
    return result


@torch.library.custom_op("lsce::in_order", mutates_args=(), schema="(Tensor rows, Tensor[] after) -> Tensor")
def _in_order(rows: Tensor, after: Sequence[Tensor]) -> Tensor:
    del after
    return rows.clone()


@_in_order.register_fake
def _(rows: Tensor, after: Sequence[Tensor]) -> Tensor:
    return torch.empty_like(rows)


def _gradient_in_order(ctx: Any, upstream: Tensor) -> tuple[Tensor, list[None]]:
    return upstream, [None] * ctx.num_told


def _count(ctx: Any, inputs: tuple[Tensor, Sequence[Tensor]], output: Tensor) -> None:
    ctx.num_told = len(inputs[1])


_in_order.register_autograd(_gradient_in_order, setup_context=_count)


def joined_rows(rows: Shaped[Tensor, "n ..."], length: int, ranks: Ranks) -> Shaped[Tensor, "length ..."]:
    """Return the rows of all ranks. All ranks but the last ones have equally many, and `length` is that of all."""
    step = -(-length // ranks.size)
    padded = rows.new_zeros((step, *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    functional = torch.ops._c10d_functional
    joined: Tensor = functional.wait_tensor(functional.all_gather_into_tensor(padded, ranks.size, ranks.name))
    return joined[:length]


class Told(NamedTuple):
    """What a rank tells the others first.

    Args:
        num_classes: that it has.
        num_rows: of the call.
        shared: what else must be the same on every rank, as numbers by name; NaN for what is not at hand.
        tensors: that must be the same on every rank, by name. Of scalars the ranks compare the values, of others
            checksums.
        sums: numbers that the ranks want to add up, by name.
    """

    num_classes: int
    num_rows: int
    shared: dict[str, float]
    tensors: dict[str, Shaped[Tensor, "..."]]
    sums: dict[str, Float[Tensor, ""] | float]


def tell(
    told: Told, ranks: Ranks, device: torch.device
) -> tuple[Float[Tensor, " ranks"], dict[str, Float[Tensor, ""]]]:
    """Return the number of classes of each rank, and the sums over the ranks, after a check that the ranks agree.

    Args:
        told: by this rank.
        ranks: all ranks.
        device: where the group takes tensors from.

    Raises:
        ValueError: the ranks disagree, or no rank has a class.
        RuntimeError: another rank has failed.
    """
    sums = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in told.sums.values()]
    sizes, shared = [told.num_classes, told.num_rows], list(told.shared.values())
    tensors, names = [tensor.detach() for tensor in told.tensors.values()], [*told.shared, *told.tensors]
    heard = torch.ops.lsce.tell(torch.stack(sums), tensors, sizes, shared, names, ranks.name)
    # The sums come before the tensors, of which ranks that disagree may have different numbers.
    start = 1 + len(sizes)
    return heard[:, 1], {name: heard[:, start + place].sum() for place, name in enumerate(told.sums)}


def tell_failure(ranks: Ranks, device: torch.device) -> None:
    """Tell the other ranks, which wait in `tell`, that this one cannot go on."""
    _gathered(torch.ones(1, dtype=torch.float64, device=device), ranks.name)


@torch.library.custom_op(
    "lsce::tell",
    mutates_args=(),
    schema="(Tensor sums, Tensor[] tensors, SymInt[] sizes, float[] shared, str[] names, str group) -> Tensor",
)
def _tell(
    sums: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    shared: Sequence[float],
    names: Sequence[str],
    group: str,
) -> Tensor:
    has_failed = 0.0
    numbers = sums.new_tensor([has_failed, *map(float, sizes), *shared])
    first, others = numbers.tensor_split([1 + len(sizes)])
    digests = [_digest(tensor).to(sums.device) for tensor in tensors]
    heard = _gathered(torch.cat([first, sums, others, *digests]), group)
    if may_wait(sums):
        _check_agreement(heard.tolist(), sums.numel(), names, [not tensor.ndim for tensor in tensors])
    return heard


@_tell.register_fake
def _(
    sums: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    shared: Sequence[float],
    names: Sequence[str],
    group: str,
) -> Tensor:
    return sums.new_empty(_find(group).size(), _TOLD)


def _digest(values: Shaped[Tensor, "..."]) -> Float[Tensor, " 1"]:
    """Return the number that stands for a tensor: the value of a scalar, of others a checksum of their bytes.

    It is never NaN, which says that there is no tensor.
    """
    values = values.reshape(-1) if values.ndim else values.to(torch.float64)
    if not values.ndim:
        return torch.where(torch.isnan(values), _NAN, values)[None]
    if values.is_floating_point():
        values = values.contiguous().view(_INTEGERS[values.itemsize])
    return _checksum(values)


def _checksum(values: Int[Tensor, " n"] | Bool[Tensor, " n"]) -> Float[Tensor, " 1"]:
    """Return a number of 52 bits, which other integers, or these in another order, do not have as far as we can tell.

    Integers wrap around, so the order of the sum does not matter. The mixing is that of splitmix64.
    """
    mixed = values.to(torch.int64)
    mixed = mixed + torch.arange(1, mixed.numel() + 1, device=mixed.device) * _GOLDEN
    for shift, factor in _MIXING:
        mixed = (mixed ^ (mixed >> shift)) * factor
    return (mixed.sum(dim=0, keepdim=True) >> 12).to(torch.float64)


def _gathered(vector: Float[Tensor, " n"], group: str) -> Float[Tensor, "ranks told"]:
    """Return the vectors of all ranks, which may differ in length, filled up with NaN."""
    found = _find(group)
    vector = torch.nn.functional.pad(vector, (0, _TOLD - vector.numel()), value=math.nan)
    vectors = [torch.empty_like(vector) for _ in range(found.size())]
    torch.distributed.all_gather(vectors, vector, group=found)
    return torch.stack(vectors)


def _find(group: str) -> Any:
    from torch.distributed import distributed_c10d  # noqa: PLC0415 - see `ranks_of`

    return distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined,arg-type]


def _check_agreement(
    heard: Sequence[Sequence[float]], num_sums: int, names: Sequence[str], are_scalars: Sequence[bool]
) -> None:
    """Raise unless no rank has failed, all have the same numbers of these names, and some rank has classes.

    The last names are those of tensors. `are_scalars` says of each whether its number is its value, not a checksum.
    """
    failed = [rank for rank, told in enumerate(heard) if told[0]]
    if failed:
        raise error("rank_failed", ranks=failed)
    names = ["the number of rows", *names]
    are_values = [*[True] * (len(names) - len(are_scalars)), *are_scalars]
    first, *others = ([told[2], *told[3 + num_sums :]] for told in heard)
    for place, name in enumerate(names):
        for rank, other in enumerate(others, 1):
            # NaN stands for what is not at hand.
            if other[place] == first[place] or math.isnan(other[place]) or math.isnan(first[place]):
                continue
            if not are_values[place]:
                raise error("ranks_rows" if name in _OF_ROWS else "ranks_tensor", name=name, rank=rank)
            texts = [_text(place, names, numbers) for numbers in (first, other)]
            name = name.removeprefix(_KIND_OF)  # noqa: PLW2901
            raise error("ranks_differ", name=name, first=texts[0], rank=rank, other=texts[1])
    if not any(told[1] for told in heard):
        raise error("no_classes_anywhere")


def _text(place: int, names: Sequence[str], numbers: Sequence[float]) -> str:
    """Return what a rank has at a place, as its caller wrote it."""
    name, number = names[place], numbers[place]
    if name in _CHOICES:
        known = _CHOICES[name]
        if number >= len(known):
            return f"{name}=<one of your own, whose name has the CRC-32 {number:.0f}>"
        return str(known[int(number)]) if name.startswith("the ") else f"{name}={known[int(number)]!r}"
    option = name.removeprefix(_KIND_OF)
    if option != name:
        kind, number = _KINDS[int(number)], math.nan
        if kind == "a number" and option in names:
            number = numbers[names.index(option)]
        if math.isnan(number):
            return f"{option}=None" if kind == "None" else f"{kind} as {option}"
    number = math.nan if number == _NAN else number
    return f"{number:.9g}" if option.startswith("the ") else f"{option}={number:.9g}"


# Of splitmix64 (Steele, Lea and Flood, 2014), as signed integers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIXING = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# What a NaN is told as: no option may be this.
_NAN = -math.inf
# How many numbers a rank tells, at most.
_TOLD = 32
# Tensors that hold the rows of the call.
_OF_ROWS = ("labels", "where", "hidden")
# Options that may be given in several ways are told as the place in this list, and as a number of their own name.
_KIND_OF = "the kind of "
_KINDS = ("None", "a number", "a tensor", "a tensor of one number for each row")
# Others are told as their place in a list.
_CHOICES: dict[str, Sequence[str | bool]] = {
    "the dtype of the logits": FLOATING,
    "the kind of labels": ("class indices", "class probabilities"),
    "the kind of class_mask": ("None", "one for all rows", "one for each row"),
    "the kind of statistics": ("none", "constant", "differentiable"),
    "convention": tuple(CONVENTIONS),
    "reduction": REDUCTIONS,
    "bad_labels": BAD_LABELS,
    "subtract_entropy": (False, True),
}


def place_of(name: str, value: str) -> int:
    """Return the number that stands for the value of an option."""
    known = _CHOICES[name]
    return known.index(value) if value in known else zlib.crc32(value.encode())
