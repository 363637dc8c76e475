"""Bytes that loss and gradient send between devices, read from compiled programs: ours and other ways.

Each program is compiled for a mesh of devices that are not there: virtual ones of a CPU, or those of a slice of TPUs or
a host of GPUs.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from lsce_cost import hlo, ways
from lsce_cost.compilers import CompilerProcess, describe_devices
from lsce_cost.cost import Request, check_compiler, in_short
from lsce_cost.devices import ENVIRONMENTS
from lsce_jax import (
    label_smoothed_cross_entropy,
    linear_label_smoothed_cross_entropy,
    vocab_parallel_label_smoothed_cross_entropy,
    vocab_parallel_linear_label_smoothed_cross_entropy,
)
from parity_tests.losses.collectives_model import (
    GATHERED,
    INTEGER,
    MEGATRON,
    NAIVE,
    ONE_HOT,
    OURS,
    OURS_LOCAL,
    Step,
)

CPU, CPU_DEVICES = "cpu", 8
AXES = ("rows", "classes")
_lax: Any = jax.lax  # parts of it have no types
_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TPU_LOG_DIR": "disabled"}
_VIRTUAL = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={CPU_DEVICES}"}


# --- The ways -------------------------------------------------------------------------------------------------------


def indexed(logits: Float[Array, "N K"], labels: Int[Array, " N"], smoothing: Float[Array, ""]) -> Float[Array, ""]:
    """Return the loss as it is mostly written: log_softmax in float32, and its values at the labels by indexing."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    at_labels = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    return -jnp.mean((1 - smoothing) * at_labels + smoothing * log_p.mean(axis=-1))


def gathered(
    mesh: Mesh, logits: Float[Array, "N K"], labels: Int[Array, " N"], smoothing: Float[Array, ""]
) -> Float[Array, ""]:
    """Return the loss of logits that each device has all classes of."""
    spec: Any = jax.P
    whole = jax.lax.with_sharding_constraint(logits, jax.NamedSharding(mesh, spec("rows", None)))  # type: ignore[no-untyped-call]
    return indexed(whole, labels, smoothing)


@jax.custom_vjp
def megatron(
    local_logits: Float[Array, "N k"], labels: Int[Array, " N"], smoothing: Float[Array, ""]
) -> Float[Array, " N"]:
    """Return the loss of each row by the steps of Megatron's `vocab_parallel_cross_entropy`, for shard_map.

    The largest logit, the logit of the label, the sum of exponentials, and for the smoothing the mean of log p: each is
    reduced over the devices for itself. Only the last differs from Megatron's, which takes the mean over the device's
    own classes, and so another loss on each device.

    References:
        Shoeybi et al., "Megatron-LM", 2019, arXiv:1909.08053, section 3, and
        NVIDIA/Megatron-LM, megatron/core/tensor_parallel/cross_entropy.py.
    """
    return _megatron_forward(local_logits, labels, smoothing)[0]


_Kept = tuple[Float[Array, "N k"], Bool[Array, "N k"], Float[Array, ""]]


def _megatron_forward(local_logits: Array, labels: Array, smoothing: Array) -> tuple[Float[Array, " N"], _Kept]:
    num_here = local_logits.shape[-1]
    logits = local_logits.astype(jnp.float32)
    logits -= _lax.pmax(logits.max(axis=-1), "classes")[:, None]
    is_label = (labels - jax.lax.axis_index("classes") * num_here)[:, None] == jnp.arange(num_here)[None]
    at_labels = _lax.psum(jnp.sum(jnp.where(is_label, logits, 0), axis=-1), "classes")
    exponentials = jnp.exp(logits)
    total = _lax.psum(exponentials.sum(axis=-1), "classes")
    mean_log_p = _lax.pmean(jnp.mean(logits - jnp.log(total)[:, None], axis=-1), "classes")
    losses = (1 - smoothing) * (jnp.log(total) - at_labels) - smoothing * mean_log_p
    return losses, (exponentials / total[:, None], is_label, smoothing)


def _megatron_backward(kept: _Kept, cotangent: Float[Array, " N"]) -> tuple[Array, None, None]:
    p, is_label, smoothing = kept
    num_devices = jax.lax.axis_size("classes")
    target = jnp.where(is_label, 1 - smoothing, 0) + smoothing / (p.shape[-1] * num_devices)
    # shard_map gives each device its share of the cotangent of a loss that all have.
    return (p - target) * (num_devices * cotangent)[:, None], None, None


megatron.defvjp(_megatron_forward, _megatron_backward)


def loss_of(way: str, step: Step, mesh: Mesh) -> Callable[..., Any]:
    """Return a way as a function of logits, labels and smoothing; of a layer, of hidden, weight, labels, smoothing."""
    if way in {OURS_LOCAL, MEGATRON}:
        return _in_shard_map(way, step, mesh)
    if way == OURS:
        ours: Any = label_smoothed_cross_entropy if step.features is None else linear_label_smoothed_cross_entropy
        return lambda *operands: ours(*operands[:-1], smoothing=operands[-1], reduction="mean")
    of_logits: dict[str, Callable[..., Any]] = {
        ONE_HOT: ways.one_hot,
        INTEGER: ways.integer_labels,
        NAIVE: indexed,
        GATHERED: partial(gathered, mesh),
    }
    if step.features is None:
        return of_logits[way]
    return lambda hidden, weight, *others: of_logits[way](hidden @ weight, *others)


def _in_shard_map(way: str, step: Step, mesh: Mesh) -> Callable[..., Any]:
    def local(*operands: Array) -> Array:
        *arrays, labels, smoothing = operands
        if way == OURS_LOCAL:
            ours: Any = vocab_parallel_label_smoothed_cross_entropy
            if step.features is not None:
                ours = vocab_parallel_linear_label_smoothed_cross_entropy
            total = ours(*arrays, labels, axis_name="classes", smoothing=smoothing, reduction="sum")
        else:
            # A custom_vjp's gradient must have the dtype of its operand.
            logits = arrays[0] if step.features is None else arrays[0] @ arrays[1]
            total = megatron(logits.astype(jnp.float32), labels, smoothing).sum()
        mean: Array = _lax.psum(total, "rows") / step.rows
        return mean

    spec: Any = jax.P
    of_floats = [spec("rows", "classes")] if step.features is None else [spec("rows", None), spec(None, "classes")]
    # The backward pass of Megatron's way has no types of what varies.
    mapped: Callable[..., Any] = jax.shard_map(
        local, mesh=mesh, in_specs=(*of_floats, spec("rows"), spec()), out_specs=spec(), check_vma=way == OURS_LOCAL
    )
    return mapped


# --- Compiled programs ----------------------------------------------------------------------------------------------


class Sent(NamedTuple):
    """A collective of a compiled program, without what it sends of scalars.

    Args:
        kind: "all-reduce" and so on.
        axes: the axes of the mesh over which it goes, such as "classes".
        times: how often it is started.
        bytes: of its arrays on each device, each time.
    """

    kind: str
    axes: str
    times: int
    bytes: int


class Compiled(NamedTuple):
    """What was found in a compiled program.

    Args:
        sent: its collectives.
        hosts: on how many hosts the devices are.
        reason: why there is no program; None if there is one.
    """

    sent: tuple[Sent, ...]
    hosts: int
    reason: str | None = None

    def total(self) -> dict[tuple[str, str], int]:
        """Return the bytes of the arrays, by kind and axis."""
        found: dict[tuple[str, str], int] = {}
        for each in self.sent:
            found[each.kind, each.axes] = found.get((each.kind, each.axes), 0) + each.times * each.bytes
        return found


@cache
def compile_step(target: str, way: str, step: Step) -> Compiled:
    """Compile loss and gradients of a way, in a process for the compiler, and return what they send.

    Args:
        target: one of `LIMITS`, or "cpu" for virtual devices.
        way: one of `WAYS`.
        step: the sizes.

    Raises:
        CompilerMissingError: the compiler is not installed.
        ValueError: there is no such target, or it has no mesh of so many devices.
    """
    first, second = step.mesh
    if target == CPU:
        if first * second > CPU_DEVICES:
            raise ValueError(f"{first} x {second} are more than the {CPU_DEVICES} virtual devices of a CPU")
    else:
        Request(target, step.rows, step.classes, step.features, step.dtype, step.mesh)  # which checks them
        check_compiler(target)
    return _process(target.partition("-")[0]).call(_compile_here, target, way, step)


@cache
def _process(family: str) -> CompilerProcess:
    return CompilerProcess((_VIRTUAL if family == CPU else ENVIRONMENTS[family]) | _QUIET)


def _compile_here(target: str, way: str, step: Step) -> Compiled:
    count = prod(step.mesh)
    devices = jax.devices()[:count] if target == CPU else describe_devices(target, count)
    mesh = Mesh(np.array(devices).reshape(step.mesh), AXES)
    hosts = len({device.process_index for device in devices})
    loss, operands = loss_of(way, step, mesh), operands_of(step, mesh)
    floats = tuple(range(len(operands) - 2))
    spec: Any = jax.P
    out_shardings = jax.NamedSharding(mesh, spec()), tuple(operands[i].sharding for i in floats)
    gradients: Callable[..., Any] = jax.value_and_grad(loss, argnums=floats)
    try:
        text = jax.jit(gradients, out_shardings=out_shardings).lower(*operands).compile().as_text()
    except Exception as error:  # of the many that JAX and the compilers raise, not each can be sent
        return Compiled((), hosts, in_short(error))
    return Compiled(tuple(find_sent(text or "", step.mesh)), hosts)


def operands_of(step: Step, mesh: Mesh) -> list[jax.ShapeDtypeStruct]:
    """Describe the logits, or hidden and weight of a layer, the labels and the smoothing, as they lie on the mesh."""
    spec: Any = jax.P

    def describe(shape: tuple[int, ...], dtype: str, *axes: str | None) -> jax.ShapeDtypeStruct:
        sharding = jax.NamedSharding(mesh, spec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)  # type: ignore[no-untyped-call]

    floats = [describe((step.rows, step.classes), step.dtype, "rows", "classes")]
    if step.features is not None:
        floats = [
            describe((step.rows, step.features), step.dtype, "rows", None),
            describe((step.features, step.classes), step.dtype, None, "classes"),
        ]
    return [*floats, describe((step.rows,), "int32", "rows"), describe((), "float32")]


def find_sent(text: str, mesh: tuple[int, int]) -> Iterator[Sent]:
    """Yield the collectives of a compiled program, given its text."""
    for each in hlo.parse(text).transfers:
        size, axes = sum(array.data_bytes for array in each.arrays if prod(array.sizes) > 1), axes_of(each.groups, mesh)
        if size and axes:  # a device alone sends nothing
            yield Sent(each.kind, axes, each.times, size)


def axes_of(groups: Sequence[Sequence[int]], mesh: tuple[int, int]) -> str:
    """Return the names of the axes along which the devices of a group differ.

    Example: devices 0 to 7 are two rows of four.
        >>> axes_of([(0, 1, 2, 3), (4, 5, 6, 7)], (2, 4)), axes_of([(0, 4), (1, 5)], (2, 4)), axes_of([(0, 7)], (2, 4))
        ('classes', 'rows', 'rows and classes')
    """
    places = [np.unravel_index(group, mesh) for group in groups]
    return " and ".join(name for i, name in enumerate(AXES) if any(len(set(each[i])) > 1 for each in places))
