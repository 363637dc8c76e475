"""The losses of `lsce_torch` with their classes divided over processes, as losses of whole arrays."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from parity_tests.losses.adapters import LEAVES, LossError, TorchAdapter, operands_of, to_torch
from parity_tests.losses.sharded import on_shards
from parity_tests.losses.workers import SECONDS, Workers
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import AnyResult

# How many processes there are, and which of them divide the classes among 1, 2, 3 and 4: not always the first ones.
PROCESSES = 4
MEMBERS = {1: (2,), 2: (1, 3), 3: (0, 2, 3), 4: (0, 1, 2, 3)}
# Where the classes are divided, as a function of their number and that of the ranks.
DIVISIONS: dict[str, Callable[[int, int], list[int]]] = {
    "even": lambda k, n: [k * i // n for i in range(n + 1)],
    "one class, and the rest": lambda k, n: [0, *(min(i, k) for i in range(1, n)), k],
    "the first without a class": lambda k, n: [0, *(k * i // max(n - 1, 1) for i in range(n - 1)), k],
    "all on one rank": lambda k, n: [0] * n + [k] if n < 3 else [0, *[k] * n],
}
# For each dimension of a mesh its size, and what it divides: "classes", "rows" or "nothing".
Layout = tuple[tuple[int, str], ...]
_CLASS_VECTORS = ("class_weight", "prior", "bias")


class Processes(Workers):
    """Processes of gloo, of which some form a group. A function is called with the group."""

    def __init__(self, seconds: float = SECONDS) -> None:
        """Start none yet."""
        super().__init__(PROCESSES, partial(_groups, seconds / 2), seconds)

    def on_ranks(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Return what a function returns or raises in each member of a group of so many ranks, by rank.

        Args:
            function: takes the group, and the arguments of its rank.
            arguments: those of each rank.
        """
        size = len(arguments)
        return self.run(_in_group, [(size, function, of_rank) for of_rank in arguments], MEMBERS[size])


def _groups(seconds: float, rank: int, number: int, folder: Path) -> dict[int, Any]:
    """Return the groups by size. A process waits so many seconds for the others."""
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    timeout = timedelta(seconds=seconds)
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=number, timeout=timeout)
    return {size: distributed.new_group(list(members), timeout=timeout) for size, members in MEMBERS.items()}


def _in_group(groups: dict[int, Any], size: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(groups[size], *arguments)


@cache
def processes() -> Processes:
    """Return the processes that all adapters share."""
    return Processes()


def loss_and_gradient(
    group: Any, options: dict[str, Any], arrays: dict[str, NDArray[Any]], compiled: bool = False
) -> dict[str, Any]:
    """Return the loss, and the gradients of a rank's slices of the logits, or of the layer, as tensors."""
    import torch

    import lsce_torch

    tensors = {name: to_torch(value) for name, value in arrays.items()}
    upstream, is_linear = tensors.pop("upstream"), "hidden" in tensors
    if is_linear:  # JAX has the features first
        tensors["weight"] = tensors["weight"].T.contiguous()
    leaves = {name: tensors.pop(name).requires_grad_() for name in LEAVES if name in tensors}
    loss_of: Any = lsce_torch.vocab_parallel_label_smoothed_cross_entropy
    if is_linear:
        loss_of = lsce_torch.vocab_parallel_linear_label_smoothed_cross_entropy
    if compiled:
        torch.compiler.reset()
        loss_of = torch.compile(loss_of, fullgraph=True)
    first = [leaf for name, leaf in leaves.items() if name != "bias"]
    bias = {"bias": leaves["bias"]} if "bias" in leaves else {}
    loss = loss_of(*first, **bias, **tensors, group=group, **options)
    (loss * upstream).sum().backward()
    return {"loss": loss.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


@cache
def mesh_of(sizes: tuple[int, ...], names: tuple[str, ...] | None = None) -> Any:
    """Return a mesh of all processes. It has groups of its own, each with threads, so there is one of these sizes."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def loss_and_gradient_of_dtensor(
    group: Any,
    options: dict[str, Any],
    arrays: dict[str, NDArray[Any]],
    axis: int,
    layout: Layout,
    compiled: bool = False,
) -> dict[str, Any]:
    """Return the loss and the gradient of logits that are a DTensor, as whole tensors."""
    del group
    import torch
    from torch.distributed import tensor

    import lsce_torch

    tensors = {name: to_torch(value) for name, value in arrays.items()}
    upstream, logits = tensors.pop("upstream"), tensors.pop("logits")
    sizes = [size for size, _ in layout]
    dims = {"classes": axis % logits.ndim, "rows": 1 if axis % logits.ndim == 0 else 0}
    placements = [tensor.Shard(dims[what]) if what in dims else tensor.Replicate() for _, what in layout]
    mesh = mesh_of(tuple(sizes))
    divided = tensor.distribute_tensor(logits, mesh, placements).requires_grad_()
    loss_of: Any = lsce_torch.label_smoothed_cross_entropy
    if compiled:
        torch.compiler.reset()
        loss_of = torch.compile(loss_of, fullgraph=True)
    loss = loss_of(divided, **tensors, **options)
    upstreams = tensor.DTensor.from_local(upstream.expand(loss.shape), mesh, [tensor.Replicate()] * len(sizes))
    (loss * upstreams).sum().backward()
    gradient: Any = divided.grad
    if list(gradient.placements) != placements:
        raise LossError(f"the logits are {placements}, and their gradient {gradient.placements}")
    return {"loss": loss.detach().full_tensor(), "logits": gradient.full_tensor()}


def slices_of(arrays: dict[str, NDArray[Any]], axis: int, bounds: Sequence[int]) -> list[dict[str, NDArray[Any]]]:
    """Return each rank's slices of the arrays of a call.

    Args:
        arrays: by the names of the arguments.
        axis: of the classes.
        bounds: where each rank's classes begin, and the number of classes.
    """
    num_dims = arrays["labels"].ndim + 1 if "hidden" in arrays else arrays["logits"].ndim
    axes = {"logits": axis % num_dims, "weight": 1} | {name: 0 for name in _CLASS_VECTORS if name in arrays}
    if arrays["labels"].dtype.kind not in "iu":
        axes["labels"] = axis % num_dims
    if "class_mask" in arrays:
        axes["class_mask"] = 0 if arrays["class_mask"].shape == (bounds[-1],) else axis % num_dims

    def part(name: str, start: int, end: int) -> NDArray[Any]:
        if name not in axes:
            return arrays[name]
        return arrays[name][(slice(None),) * axes[name] + (slice(start, end),)]

    return [{name: part(name, start, end) for name in arrays} for start, end in pairwise(bounds)]


class ShardedTorchAdapter(TorchAdapter):
    """The dense or the linear loss of `lsce_torch` with its classes divided over processes.

    Args:
        num_ranks: how many processes.
        division: which of `DIVISIONS`.
        compiled: whether each process compiles it.
        options: as in `TorchAdapter`.
    """

    def __init__(self, num_ranks: int, division: str = "even", compiled: bool = False, **options: Any) -> None:
        """Choose the division."""
        super().__init__(**{"name": f"torch vocab-parallel, {num_ranks} ranks, {division}", **options})
        self.num_ranks, self.division, self.is_compiled = num_ranks, division, compiled
        self.arithmetic = on_shards(self.arithmetic, num_ranks)
        if self.linear:
            # The exponentials of each rank are multiplied by another one.
            self.arithmetic = replace(self.arithmetic, exp=2 * self.arithmetic.exp + 1)

    def __call__(self, case: Case) -> AnyResult:
        """Return loss and gradient of a case.

        Raises:
            LossError: the ranks have different losses.
        """
        arrays, options = operands_of(case)
        given = [(options, each, self.is_compiled) for each in slices_of(arrays, case.axis, self.bounds(case))]
        answers = run_on_ranks(loss_and_gradient, given)
        # The gradient of hidden is whole on every rank.
        axes = {"logits": case.axis, "weight": 0, "bias": 0}
        parts = {name: [answer[name] for answer in answers] for name in answers[0]}
        return self.result(
            case, {name: joined(each, axes[name]) if name in axes else same(each) for name, each in parts.items()}
        )

    def bounds(self, case: Case) -> list[int]:
        """Return where each rank's classes begin, and the number of classes."""
        return DIVISIONS[self.division](case.num_classes, self.num_ranks)


class DTensorAdapter(TorchAdapter):
    """The dense loss of `lsce_torch` for logits that are a DTensor on a mesh of processes.

    Args:
        layout: of the mesh, over all processes.
        compiled: whether each process compiles it.
    """

    def __init__(self, layout: Layout, compiled: bool = False) -> None:
        """Choose the mesh."""
        super().__init__(name=f"torch DTensor, {' x '.join(f'{size} {what}' for size, what in layout)}")
        self.layout, self.is_compiled = layout, compiled
        self.arithmetic = on_shards(self.arithmetic, PROCESSES)

    def unsupported(self, case: Case) -> str | None:
        """Return why the loss cannot handle a case, or None."""
        if case.logits.ndim == 1 and any(what == "rows" for _, what in self.layout):
            return "there are no rows to divide"
        return super().unsupported(case)

    def __call__(self, case: Case) -> AnyResult:
        """Return loss and gradient of a case."""
        arrays, options = operands_of(case)
        given = (options, arrays, case.axis, self.layout, self.is_compiled)
        answers = run_on_ranks(loss_and_gradient_of_dtensor, [given] * PROCESSES)
        return self.result(case, {part: same([answer[part] for answer in answers]) for part in ("loss", "logits")})


def run_on_ranks(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Return what a function returns on each rank; raise if it raises on any. See `Processes.on_ranks`."""
    answers = processes().on_ranks(function, arguments)
    # All of them: where one rank fails, others may only say that they have waited for it.
    problems = [answer for answer in answers if isinstance(answer, Exception)]
    if problems:
        first = next((each for each in problems if not isinstance(each, RuntimeError)), problems[0])
        raise ExceptionGroup(f"on {len(problems)} of {len(answers)} ranks: {first}", problems)
    return answers


def same(tensors: Sequence[Any]) -> Any:
    """Return the tensor that all ranks have, bit for bit.

    Raises:
        LossError: they have different ones.
    """
    if len({tensor.double().numpy().tobytes() for tensor in tensors}) != 1:
        raise LossError(f"the ranks have different results: {tensors}")
    return tensors[0]


def joined(slices: Sequence[Any], axis: int) -> Any:
    """Return the slices of all ranks in one tensor."""
    import torch

    return torch.cat(list(slices), dim=axis)
