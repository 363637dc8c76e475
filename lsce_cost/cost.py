"""Cost of a loss on a device that is not there: its compiler's figures, counts of the program, the least time."""

import atexit
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from lsce_cost import bundles as of_bundles
from lsce_cost import hlo, ways
from lsce_cost.compilers import CompilerEndedError, CompilerProcess, describe_devices, largest_mesh
from lsce_cost.devices import CARDS, ENVIRONMENTS, LIMITS, has_cuda_plugin, has_libtpu
from lsce_cost.roofline import Roofline, roofline
from lsce_spec.extras import install

DTYPES = ("bfloat16", "float32", "float16", "float64")
# Labels and positions of classes are int32.
MOST = 2**31 - 1
_SETTINGS = {"TF_CPP_MIN_LOG_LEVEL": "3", "TPU_LOG_DIR": "disabled"}
_VARIABLE = "LSCE_AOT_DUMP"
# What is needed, what is there, and where.
_OUT_OF_MEMORY = (
    re.compile(r"Used (?P<needed>[\d.]+\w?) of (?P<there>[\d.]+\w?) (?P<where>\w+)"),
    re.compile(r"\((?P<needed>[\d.]+\w?)\) exceeds available (?P<where>HBM) \((?P<there>[\d.]+\w?)\)"),
)


class CompilerMissingError(Exception):
    """The compiler of a target is not installed; the message says what to install."""


@dataclass(frozen=True)
class Request:
    """A loss of a size on a target.

    Args:
        target: one of `lsce_cost.devices.LIMITS`.
        rows: number of rows.
        classes: number of classes.
        features: number of features of the linear layer; None: the loss takes logits.
        dtype: of the logits, or of hidden and weight.
        mesh: how many devices the rows are divided over, and the classes; None: one device.
        gradient: whether the gradients are computed with the loss.
        chunks: rows that the linear loss takes at a time, a way for each; None: three sizes.

    Raises:
        ValueError: something that no target can do, or not this one; the message says what.

    Example:
        >>> Request("tpu-v6e", rows=8190, classes=32768, mesh=(4, 4))
        Traceback (most recent call last):
        ...
        ValueError: 8190 rows cannot be divided over 4 devices: --rows must be a multiple of the mesh's first number
    """

    target: str
    rows: int
    classes: int
    features: int | None = None
    dtype: str = "bfloat16"
    mesh: tuple[int, int] | None = None
    gradient: bool = True
    chunks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check it."""
        if self.target not in LIMITS:
            raise ValueError(f"there is no target {self.target!r}; the targets are {', '.join(LIMITS)}")
        if self.dtype not in LIMITS[self.target].matrix or self.dtype not in DTYPES:
            known = ", ".join(dtype for dtype in DTYPES if dtype in LIMITS[self.target].matrix)
            raise ValueError(f"{self.target} has no dtype {self.dtype!r}; its dtypes are {known}")
        for name in ("rows", "classes", "features"):
            size = getattr(self, name)
            if size is not None and not 1 <= size <= MOST:
                raise ValueError(f"--{name} must be from 1 to {MOST}, the largest int32, but is {size}")
        if self.chunks is not None and self.features is None:
            raise ValueError("--chunks needs --features: only the loss of a layer goes through rows in chunks")
        if self.chunks is not None and min(self.chunks) < 1:
            raise ValueError(f"--chunks must be at least 1, but is {min(self.chunks)}")
        if self.mesh is not None:
            self._check_mesh(self.mesh)

    def _check_mesh(self, mesh: tuple[int, int]) -> None:
        most, (first, second) = largest_mesh(self.target), mesh
        if first < 1 or second < 1 or first * second > most:
            given = f"--mesh {first}x{second}"
            raise ValueError(f"{given} must have from 1 to {most} devices on {self.target}")
        for name, place, size, devices in (
            ("rows", "first", self.rows, first),
            ("classes", "second", self.classes, second),
        ):
            if size % devices:
                raise ValueError(
                    f"{size} {name} cannot be divided over {devices} devices: "
                    f"--{name} must be a multiple of the mesh's {place} number"
                )

    @property
    def devices(self) -> int:
        """The number of devices."""
        return 1 if self.mesh is None else self.mesh[0] * self.mesh[1]

    @property
    def ways(self) -> dict[str, ways.Loss]:
        """The losses by name."""
        if self.features is None:
            return ways.of_logits(self.dtype)
        return ways.of_layer(self.dtype, self.rows, self.features, self.classes, self.chunks)


@dataclass(frozen=True)
class Cost:
    """What one way costs, on each device.

    Args:
        name: of the way.
        compiles: whether the compiler accepts it. If not, `reason` says why in short, and there are no figures.
        reason: the compiler's reason.
        fits: whether arguments, results and temporary memory fit into the device's memory.
        argument_bytes: of the arguments.
        output_bytes: of the loss and the gradients.
        temp_bytes: of memory beyond these, by the compiler.
        hbm_bytes: read from and written to the device's memory, counted in the program; see hlo.py. None if it has
            loops whose number of rounds is not known.
        xla_bytes: the compiler's own count, with one round of each loop; None where it has none.
        matrix_operations: of matrix products, by the dtype of the operands.
        bundles: instruction bundles of one core of a TPU; None where they are not known.
        kernels_without_bundles: how many kernels these bundles leave out, since the compiler does not say how often
            their loops go round.
        collectives: operations between devices.
        roofline_seconds: the least time, an estimate.
        roofline: its parts.
        compile_seconds: how long the compiler took here.
    """

    name: str
    compiles: bool
    reason: str | None = None
    fits: bool | None = None
    argument_bytes: int | None = None
    output_bytes: int | None = None
    temp_bytes: int | None = None
    hbm_bytes: int | None = None
    xla_bytes: float | None = None
    matrix_operations: Mapping[str, int] = field(default_factory=dict)
    bundles: int | None = None
    kernels_without_bundles: int = 0
    collectives: tuple[hlo.Collective, ...] = ()
    roofline_seconds: float | None = None
    roofline: Roofline | None = None
    compile_seconds: float | None = None


def measure(request: Request, name: str, *, with_bundles: bool = True) -> Cost:
    """Compile one way for a target and return what it costs.

    Args:
        request: the loss.
        name: the way, one of `request.ways`.
        with_bundles: count the bundles of TPUs, which takes half as long again.

    Raises:
        CompilerMissingError: the compiler is not installed.
        ValueError: there is no such way.

    Example:
        >>> measure(Request("tpu-v6e", rows=8192, classes=32768), "lsce magic")
        Traceback (most recent call last):
        ...
        ValueError: there is no way 'lsce magic' here; the ways are Optax one-hot, smoothed; ...
    """
    if name not in request.ways:
        raise ValueError(f"there is no way {name!r} here; the ways are {'; '.join(request.ways)}")
    check_compiler(request.target)
    with_bundles = with_bundles and request.target not in CARDS
    try:
        return _process(request.target.partition("-")[0], with_bundles).call(_measure_here, request, name)
    except CompilerEndedError as error:
        return Cost(name, compiles=False, reason=str(error))


def measure_all(request: Request, names: Sequence[str], *, with_bundles: bool = True) -> Iterator[Cost]:
    """Yield what each way costs. See `measure`."""
    for name in names:
        yield measure(request, name, with_bundles=with_bundles)


def check_compiler(target: str) -> None:
    """Raise CompilerMissingError if the compiler of a target is not installed."""
    jax_version = jax.__version__
    if target in CARDS and not has_cuda_plugin():
        plugin = f"pip install --no-deps jax-cuda12-plugin=={jax_version} jax-cuda12-pjrt=={jax_version}"
        raise CompilerMissingError(
            f"{target}: JAX's plugin for CUDA, which has the compiler, is missing. Run: {plugin}"
        )
    if target not in CARDS and not has_libtpu():
        raise CompilerMissingError(
            f"{target}: libtpu, which has the compiler, is missing. Run on Linux: {install('cost')}, "
            f"or pip install 'jax[tpu]=={jax_version}'"
        )


@cache
def _process(family: str, with_bundles: bool) -> CompilerProcess:
    environment = ENVIRONMENTS[family] | _SETTINGS
    if with_bundles:
        folder = _temporary_folder()
        environment |= {_VARIABLE: folder.name, "LIBTPU_INIT_ARGS": of_bundles.FLAGS.format(folder=folder.name)}
    return CompilerProcess(environment)


@cache
def _temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    folder = tempfile.TemporaryDirectory(prefix="lsce-aot-")
    atexit.register(folder.cleanup)
    return folder


# --- In the process of the compiler ---------------------------------------------------------------------------------


def _measure_here(request: Request, name: str) -> Cost:
    dump = Path(os.environ[_VARIABLE]) if _VARIABLE in os.environ else None
    try:
        with jax.enable_x64(request.dtype == "float64"):
            step, operands = program(request, request.ways[name])
            started = time.perf_counter()
            compiled = step.lower(*operands).compile()
            seconds = time.perf_counter() - started
    except Exception as error:  # of the many that JAX and the compilers raise, not each can be sent
        reason = in_short(error)
        return Cost(name, compiles=False, reason=reason, fits=False if reason.endswith("HBM") else None)
    return replace(cost_of(request.target, name, compiled, dump), compile_seconds=seconds)


def program(request: Request, loss: ways.Loss) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """Return the jitted loss, with its gradients if asked for, and descriptions of its operands.

    Rows are divided over the first axis of the mesh, classes over the second; gradients are as their operands are.
    """
    rows, classes, features, dtype = request.rows, request.classes, request.features, request.dtype
    on, whole = _placing(request)
    of_floats: list[tuple[tuple[int, ...], Sharding]] = [((rows, classes), on("rows", "classes"))]
    if features is not None:
        of_floats = [((rows, features), on("rows", None)), ((features, classes), on(None, "classes"))]
    describe: Any = jax.ShapeDtypeStruct
    operands = [
        *(describe(shape, jnp.dtype(dtype), sharding=sharding) for shape, sharding in of_floats),
        describe((rows,), jnp.int32, sharding=on("rows")),
        # An argument, so that no compiler can compute anything beforehand.
        describe((), jnp.float64 if dtype == "float64" else jnp.float32, sharding=whole),
    ]
    if not request.gradient:
        return jax.jit(loss, out_shardings=whole), operands
    gradients = tuple(sharding for _, sharding in of_floats)
    step: Callable[..., Any] = jax.value_and_grad(loss, argnums=tuple(range(len(gradients))))
    return jax.jit(step, out_shardings=(whole, gradients)), operands


def _placing(request: Request) -> tuple[Callable[..., Sharding], Sharding]:
    """Return what gives the sharding of an array by its axes, and the sharding of one that every device has."""
    devices = describe_devices(request.target, request.devices)
    if request.mesh is None:
        single = jax.sharding.SingleDeviceSharding(devices[0])
        return lambda *axes: single, single
    spec: Any = PartitionSpec
    mesh = Mesh(np.array(devices).reshape(request.mesh), ("rows", "classes"))
    return lambda *axes: NamedSharding(mesh, spec(*axes)), NamedSharding(mesh, spec())


def cost_of(target: str, name: str, compiled: Any, dump: Path | None = None) -> Cost:
    """Return what a compiled program costs.

    Args:
        target: what it was compiled for.
        name: a name for it.
        compiled: the `jax.stages.Compiled`.
        dump: the folder that the compiler has written bundles to; it is emptied.
    """
    limits, memory = LIMITS[target], compiled.memory_analysis()
    cost = Cost(
        name,
        compiles=True,
        fits=_held(memory) <= limits.memory,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        xla_bytes=(compiled.cost_analysis() or {}).get("bytes accessed"),
    )
    counted = hlo.parse(compiled.as_text())
    files = {} if dump is None else _read_and_empty(dump)
    try:
        cost = replace(
            cost,
            hbm_bytes=counted.hbm_bytes,
            matrix_operations=counted.matrix_operations,
            collectives=counted.collectives,
        )
    except hlo.HloError as error:
        return replace(cost, reason=f"no estimate: {error}")
    counted_bundles, left_out = _bundles(counted, files)
    sent = sum(each.sent for each in counted.collectives)
    least = roofline(limits, counted.hbm_bytes, counted.matrix_operations, counted_bundles, sent)
    return replace(
        cost,
        bundles=counted_bundles,
        kernels_without_bundles=left_out,
        roofline_seconds=least.seconds,
        roofline=least,
    )


def _held(memory: Any) -> int:
    held: int = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return held - int(memory.alias_size_in_bytes)


def _read_and_empty(dump: Path) -> dict[str, int | None]:
    """Return the bundles of each kernel, None for one whose file has another form, and empty the folder."""
    found: dict[str, int | None] = {}
    for name, path in of_bundles.schedules(dump.iterdir()):
        try:
            found[name] = of_bundles.count_bundles(path)
        except ValueError:
            found[name] = None
    shutil.rmtree(dump)
    dump.mkdir()
    return found


def _bundles(counted: hlo.Program, files: Mapping[str, int | None]) -> tuple[int | None, int]:
    """Return the bundles of a program, each kernel's as often as it is started, and how many kernels are left out."""
    times = {kernel.instruction.name: kernel.times for kernel in counted.kernels}
    # Kernels that the text does not name run once, before and after the others.
    known = {name: bundles * times.get(name, 1) for name, bundles in files.items() if bundles is not None}
    # Collective operations wait for others in loops.
    waiting = {kernel.instruction.name for kernel in counted.kernels if counted.is_collective(kernel)}
    return (sum(known.values()) if known else None), len(files.keys() - known.keys() - waiting)


def in_short(error: Exception) -> str:
    """Return the reason of a compiler in a line.

    Example:
        >>> in_short(RuntimeError("RESOURCE_EXHAUSTED: XLA:TPU compile. Used 20.5G of 15.75G hbm. Exceeded"))
        'out of memory: needs 20.5G of 15.75G HBM'
    """
    text = str(error)
    for pattern in _OUT_OF_MEMORY:
        found = pattern.search(text)
        if found:
            return f"out of memory: needs {found['needed']} of {found['there']} {found['where'].upper()}"
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line[:160]}"
