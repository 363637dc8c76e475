"""What a step of the loss sends between devices, predicted from its sizes, and an estimate of how long that takes.

The prediction has the bytes of every array that is sent, scalars left out. parity_tests/suite/test_scaling.py holds it
against compiled programs. XLA decides what is sent for the losses under jit, so the numbers of these hold for the
versions that the tests run with: jaxlib 0.10.0 to 0.12.0 for CPUs, and with jaxlib 0.10.2 libtpu and JAX's plugin for
CUDA.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lsce_cost.devices import LIMITS
from lsce_cost.hlo import least_sent
from lsce_jax.chunked import preferred_rows
from lsce_spec import ChunkOptions

OURS, OURS_LOCAL = "lsce, jit", "lsce, vocab-parallel"
ONE_HOT, INTEGER, NAIVE = "Optax one-hot", "Optax integer, unsmoothed", "log_softmax, indexed"
GATHERED, MEGATRON = "logits gathered", "Megatron's"
WAYS = (OURS, OURS_LOCAL, ONE_HOT, INTEGER, NAIVE, GATHERED, MEGATRON)
BYTES_OF = {"float32": 4, "bfloat16": 2}
# Numbers for each row that are reduced over the classes: some in the dtype of the logits, others in float32.
_ON_TPU = {OURS: (1, 4), OURS_LOCAL: (0, 5), ONE_HOT: (3, 0), INTEGER: (3, 0), NAIVE: (1, 4), MEGATRON: (0, 4)}
_NUMBERS = {
    "tpu": _ON_TPU,
    "gpu": _ON_TPU | {OURS: (0, 5), ONE_HOT: (4, 0), INTEGER: (4, 0), NAIVE: (0, 5)},
    "cpu": _ON_TPU | {OURS: (1, 5), ONE_HOT: (4, 0)},
}
# Of the collectives that reduce them, over the classes.
_STAGES = {OURS: 2, OURS_LOCAL: 2, ONE_HOT: 2, INTEGER: 2, NAIVE: 3, GATHERED: 1, MEGATRON: 3}
# Seconds for each link that a message passes: jax-ml.github.io/scaling-book/sharding has "typically around 1us".
HOP = 1e-6
# Torus dimensions, over which the links of a TPU are shared out.
TORUS = {"tpu-v4": 3, "tpu-v5e": 2, "tpu-v5p": 3, "tpu-v6e": 2, "tpu-v7x": 3}
RING = 16  # chips in one dimension of a whole torus of a v5e or v6e
# Bytes a second that a device sends along one axis of the mesh, both ways together. Of the hosts of H100 in NVIDIA's
# reference architecture each GPU has a link of 400 Gbit/s to others (jax-ml.github.io/scaling-book/gpus).
BETWEEN_HOSTS = "gpu-h100, between hosts"
AXIS = {target: LIMITS[target].links / dimensions for target, dimensions in TORUS.items()}
AXIS |= {"gpu-h100": LIMITS["gpu-h100"].links, BETWEEN_HOSTS: 400e9 / 8}


@dataclass(frozen=True)
class Step:
    """Sizes of a step: loss and gradients of a mean over the rows.

    Args:
        rows: of all devices together.
        classes: of all devices together.
        mesh: over how many devices the rows are divided, and the classes.
        features: of a linear layer; None: the loss takes logits.
        dtype: of logits, or of hidden and weight: "float32" or "bfloat16".

    Raises:
        ValueError: rows or classes that cannot be divided over the mesh, or another dtype.

    Example:
        >>> Step(rows=1000, classes=32768, mesh=(16, 4))
        Traceback (most recent call last):
        ...
        ValueError: 1000 rows cannot be divided over 16 devices
    """

    rows: int
    classes: int
    mesh: tuple[int, int]
    features: int | None = None
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Check it."""
        for name, size, devices in (("rows", self.rows, self.mesh[0]), ("classes", self.classes, self.mesh[1])):
            if size % devices:
                raise ValueError(f"{size} {name} cannot be divided over {devices} devices")
        if self.dtype not in BYTES_OF:
            raise ValueError(f"the dtype must be {' or '.join(BYTES_OF)}, but is {self.dtype}")

    @property
    def local_rows(self) -> int:
        """Rows on each device."""
        return self.rows // self.mesh[0]

    @property
    def local_classes(self) -> int:
        """Classes on each device."""
        return self.classes // self.mesh[1]


def predict(way: str, step: Step, platform: str = "tpu") -> dict[tuple[str, str], int]:
    """Return the bytes of the arrays that one step sends, on each device, by kind and axis.

    Of an all-gather they are those of the result. The axis is "rows" for a collective between devices with
    different rows, and "classes" for one between devices with different classes.

    Args:
        way: one of `WAYS`.
        step: the sizes.
        platform: "tpu", "gpu" or "cpu", for which XLA decides differently.

    Example: a million classes on 16 devices, each of which has 65536 of them in 1024 rows.
        >>> step = Step(rows=1024, classes=2**20, mesh=(1, 16))
        >>> predict(OURS, step)
        {('all-reduce', 'classes'): 18432}
        >>> predict(GATHERED, step)
        {('all-gather', 'classes'): 2147483648}
    """
    found: dict[tuple[str, str], int] = {}
    for kind, axis, size in _arrays(way, step, platform):
        if size and step.mesh[axis == "classes"] > 1:
            found[kind, axis] = found.get((kind, axis), 0) + size
    return found


def _arrays(way: str, step: Step, platform: str) -> Iterator[tuple[str, str, int]]:
    """Yield kind, axis and bytes of what is sent."""
    rows, width, features = step.local_rows, BYTES_OF[step.dtype], step.features
    if way == GATHERED:
        # Of a layer XLA gathers the weight in place of the logits.
        yield "all-gather", "classes", (features or rows) * step.classes * width
    else:
        narrow, wide = _NUMBERS[platform][way]
        if way == OURS and features is not None:
            narrow, wide = 0, 5  # the logits are made in float32
        yield "all-reduce", "classes", rows * (narrow * width + wide * 4)
    if features is None:
        if way == OURS and platform == "cpu":
            # CPUs take the logits of the labels by indexing, for which XLA gathers indices and values of all rows.
            yield "all-gather", "rows", step.rows * (8 + 4)
        return
    # Under jit the gradients are added up over chunks in float32.
    summed = 4 if way == OURS else width
    yield "all-reduce", "classes", rows * features * summed
    # XLA for CPUs adds up over the devices in each chunk, XLA for others after the last.
    times = num_chunks(step) if way == OURS and platform == "cpu" else 1
    yield "all-reduce", "rows", times * features * step.local_classes * summed


def num_chunks(step: Step) -> int:
    """Return how many chunks of rows the linear loss takes under jit, 1 for the loss of logits."""
    if step.features is None:
        return 1
    return -(-step.rows // ChunkOptions().rows_at_most(preferred_rows(step.features), step.classes))


# --- Estimates ------------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """The least time of a step on each device in seconds: an estimate, and no measurement.

    Args:
        compute: of products and memory.
        classes: of the collectives over the classes.
        rows: of those over the rows.
    """

    compute: float
    classes: float
    rows: float

    @property
    def links(self) -> float:
        """Of all collectives."""
        return self.classes + self.rows


def estimate(way: str, step: Step, target: str) -> Estimate:
    """Return the least time of a step.

    A loss of logits moves four times their size in memory (docs/cost.md). A layer takes 6 N D K operations, and 8 N D K
    where the logits are computed again for the gradient. A collective takes the time of its bytes on the links of its
    axis, as if that were a ring, or if it is longer the time of the hops to the farthest device and back.

    Args:
        way: one of `WAYS`.
        step: the sizes.
        target: a TPU of `lsce_cost.devices.LIMITS`.

    Raises:
        ValueError: it is no TPU.

    Example:
        >>> step = Step(8192, 131072, (1, 16))
        >>> found = estimate(OURS, step, "tpu-v5e")
        >>> found.compute > found.links
        True
    """
    if target not in TORUS:
        raise ValueError(f"there are estimates for {', '.join(TORUS)}, but not for {target!r}")
    limits, width = LIMITS[target], BYTES_OF[step.dtype]
    here = step.local_rows * (step.classes if way == GATHERED else step.local_classes)
    if step.features is None:
        compute = 4 * here * width / limits.bandwidth
    else:
        compute = (8 if way == OURS_LOCAL else 6) * here * step.features / limits.matrix[step.dtype]
    seconds = {"classes": 0.0, "rows": 0.0}
    for (kind, axis), size in predict(way, step).items():
        group = step.mesh[axis == "classes"]
        stages = (_STAGES[way] if axis == "classes" else 0) + (step.features is not None)
        if way == OURS and axis == "classes":
            stages *= num_chunks(step)
        passes = 2 if kind == "all-reduce" else 1
        hops = passes * stages * HOP * _radius(group)
        seconds[axis] += max(hops, least_sent(kind, size, group) / AXIS[target])
    return Estimate(compute, **seconds)


def _radius(group: int) -> float:
    """Return how many links lie between a chip and the one that is farthest from it, on rings of at most `RING`."""
    radius = 0.0
    while group > 1:
        radius += min(group, RING) / 2
        group = -(-group // RING)
    return radius


def fewest(target: str, operations: int, width: int) -> float:
    """Return how many classes, or rows, each device needs for a layer to take no less time than a sum of its gradients.

    With n rows and k classes on each device, a layer computes `operations` n D k. The gradient of hidden, to be added
    up over the classes, has n D numbers, and that of the weight, over the rows, D k. So the number is the same for
    classes and rows, whatever the other sizes are.

    Args:
        target: one of `AXIS`.
        operations: 6, or 8 where the logits are computed again.
        width: bytes of each number that is sent.
    """
    peak = LIMITS[target.partition(",")[0]].matrix["bfloat16"]
    return 2 * width / AXIS[target] * peak / operations
