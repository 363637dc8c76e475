"""What `benchmarks all` measures: in which processes, with which environments, and at which sizes.

A session is one process at a time, so that whatever is compared takes its turns beside the rest. Ours, and the loss
that all others are compared with, are in every session: a ratio never has figures of two processes.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

from benchmarks.engines.device import Part
from benchmarks.engines.timing import LinearShape, Shape

TORCH, JAX = "torch", "JAX"
KERAS_TORCH, KERAS_JAX = "Keras on torch", "Keras on JAX"
CUT, TOKAMAX = "cut-cross-entropy", "Tokamax"
# Why a loss has no figures; tables have its name all the same.
NEEDS_GPU = "needs a GPU"


class Session(NamedTuple):
    """Processes of one framework in one environment.

    Args:
        name: in tables; `losses.TABLE` has its losses.
        framework: "torch" or "jax".
        kinds: "dense" for losses of logits, "linear" for those of the last linear layer.
        libraries: distributions whose versions belong to the record.
        requirements: what pip installs into an environment of its own; none for that of this process.
        variables: of the environment of the process.
        scales: whether it is measured in many sizes.
    """

    name: str
    framework: str
    kinds: tuple[str, ...]
    libraries: tuple[str, ...]
    requirements: tuple[str, ...] = ()
    variables: Mapping[str, str] = MappingProxyType({})
    scales: bool = False


# Compiled programs that are kept on disk would make compiling look fast.
COLD = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"}
SESSIONS = (
    Session(TORCH, "torch", ("dense", "linear"), ("torch", "timm"), scales=True),
    Session(JAX, "jax", ("dense", "linear"), ("jax", "jaxlib", "optax"), scales=True),
    Session(
        KERAS_TORCH,
        "torch",
        ("dense",),
        ("keras", "torch"),
        variables={"KERAS_BACKEND": "torch", "KERAS_TORCH_DEVICE": "cpu"},
    ),
    Session(KERAS_JAX, "jax", ("dense",), ("keras", "jax"), variables={"KERAS_BACKEND": "jax"}),
    Session(CUT, "torch", ("linear",), ("cut-cross-entropy", "torch"), requirements=("cut-cross-entropy>=25.1.1,<26",)),
    Session(TOKAMAX, "jax", ("linear",), ("tokamax", "jax"), requirements=("tokamax>=0.0.12,<0.1",)),
)

DENSE_SHAPES = (Shape(32, 10), Shape(256, 1000), Shape(8192, 1000), Shape(1024, 32768))
LARGEST = Shape(8192, 128256)
LINEAR_SHAPE = LinearShape(1024, 512, 32768)
# Memory is measured at one size each, and the same.
MEMORY_SHAPES = {"dense": DENSE_SHAPES[-1].sizes, "linear": LINEAR_SHAPE}
QUICK_DENSE, QUICK_LINEAR = Shape(16, 100), LinearShape(16, 8, 64)
# One size grows, and the other stays.
SCALES = (16, 256, 4096, 65536)
FIXED = 1024
# How often each has its turn, and calls in a turn. The largest take seconds for a call.
ROUNDS, FEW_ROUNDS = 5, 3


def check_parts(session: Session, quick: bool) -> list[Part]:
    """Return what is held against the truth."""
    dtypes = ("float32",) if quick else ("float32", "bfloat16")
    return _numbered(
        session,
        ({"stage": "check", "kind": kind, "dtype": dtype, "shape": []} for kind in session.kinds for dtype in dtypes),
    )


def memory_parts(session: Session, quick: bool) -> list[Part]:
    """Return what is measured in processes of their own: how much memory each loss takes."""
    shapes = {"dense": QUICK_DENSE.sizes, "linear": QUICK_LINEAR} if quick else MEMORY_SHAPES
    dtypes = ("float32",) if quick else ("float32", "bfloat16")
    return _numbered(
        session,
        (
            {"stage": "memory", "kind": kind, "dtype": dtype, "shape": list(shapes[kind])}
            for kind in session.kinds
            for dtype in (dtypes if kind == "dense" else dtypes[:1])
        ),
    )


def time_parts(session: Session, quick: bool, rounds: int) -> list[Part]:
    """Return what is timed, each with its schedule: rounds, and calls in a round."""
    return _numbered(session, _quick_parts(session, rounds) if quick else _time_parts(session, rounds))


def _quick_parts(session: Session, rounds: int) -> Iterator[Part]:
    for kind in session.kinds:
        shape = QUICK_DENSE.sizes if kind == "dense" else QUICK_LINEAR
        yield _timed(kind, "float32", shape, rounds, 2)


def _time_parts(session: Session, rounds: int) -> Iterator[Part]:
    few = min(rounds, FEW_ROUNDS)
    for kind in session.kinds:
        if kind == "linear":
            yield _timed(kind, "float32", LINEAR_SHAPE, rounds, 1)
            continue
        for shape in DENSE_SHAPES:
            yield _timed(kind, "float32", shape.sizes, rounds, _calls(shape))
        yield _timed(kind, "bfloat16", DENSE_SHAPES[-1].sizes, rounds, _calls(DENSE_SHAPES[-1]))
        for dtype in ("float32", "bfloat16") if session.scales else ():
            yield _timed(kind, dtype, LARGEST.sizes, few, 1) | {"alone": False}
    if session.scales:
        for grows, size in product(("rows", "classes"), SCALES):
            shape = Shape(size, FIXED) if grows == "rows" else Shape(FIXED, size)
            part = _timed("dense", "float32", shape.sizes, few, _calls(shape))
            yield part | {"grows": grows, "alone": False, "with_floors": True}


def _calls(shape: Shape) -> int:
    return 100 if shape.logits_bytes <= 2**20 else 10 if shape.logits_bytes <= 2**25 else 2


def _timed(kind: str, dtype: str, shape: Sequence[int], rounds: int, calls: int) -> Part:
    dense = kind == "dense"
    schedule = [rounds, calls]
    return {
        "stage": "time",
        "kind": kind,
        "dtype": dtype,
        "shape": list(shape),
        "alone": dense,
        "with_floors": dense,
        "schedule": schedule,
    }


def _numbered(session: Session, parts: Iterator[dict[str, Any]]) -> list[Part]:
    return [{"framework": session.framework, "number": i, **part} for i, part in enumerate(parts)]
