"""All losses that are timed or checked: one table, which imports no framework.

Each row says which framework and form a loss has, which lists show it, and how it is called: a function of
`calls_torch` or `calls_jax` and its options. A list is a command ("dense", "linear", "smoothing", "device") or a
session of `benchmarks all`.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from benchmarks.engines.sessions import CUT, JAX, KERAS_JAX, KERAS_TORCH, NEEDS_GPU, TOKAMAX, TORCH
from benchmarks.engines.timing import Case
from parity_tests.losses.adapters import UnavailableError

SMOOTHING = 0.1
DENSE, LINEAR = "dense", "linear"
ON_DEVICE, ADDED = "device", "smoothing"
# What is compared with others in every list of `benchmarks device` and `benchmarks all`.
EVERYWHERE = (ON_DEVICE, TORCH, JAX, KERAS_TORCH, KERAS_JAX, CUT, TOKAMAX)
BOTH = (ON_DEVICE, TORCH, JAX)
# What a dense loss of ours is by default on a device that has kernels of its own; elsewhere "fused".
KERNELS = {"cuda": "triton"}
CLAMP = {"convention": "clamp"}
Z_LOSS = {"convention": "non_target", "z_loss": 1e-4}


class Loss(NamedTuple):
    """A loss of a mean.

    Args:
        name: in tables.
        make: loads the library and returns the function, of (logits, labels) or (hidden, weight, labels) in torch; JAX
            has the smoothing as one more argument.
        smoothing: what the function has; 0.0 for libraries that have none.
        ours: whether it is of this project: its results must be within its bounds.
        overwrites: whether it writes over the logits, so that each call needs new ones.
        compiled: whether each shape is compiled anew, for seconds.
        options: what it computes beyond the smoothed mean, by the names of our options, such as the convention.
        with_statistics: whether it returns statistics beside the loss.
        trained: whether it is given logits as at the end of training.
        of_rows: whether it is a loss of each row, to which smoothing is added.
        floor: whether it does less than a loss must, and has no gradient.
        lists: which show the loss.
        devices: where it is shown.
        narrow: whether it is for narrow dtypes alone.
        needs_gpu: whether it cannot run elsewhere: then `benchmarks all` says so.
    """

    name: str
    make: Callable[[], Callable[..., Any]]
    smoothing: float = SMOOTHING
    ours: bool = False
    overwrites: bool = False
    compiled: bool = False
    options: Mapping[str, Any] = MappingProxyType({})
    with_statistics: bool = False
    trained: bool = False
    of_rows: bool = False
    floor: bool = False
    lists: Sequence[str] = ()
    devices: Sequence[str] = ("cpu", "cuda", "tpu")
    narrow: bool = False
    needs_gpu: bool = False


class Program(NamedTuple):
    """A loss, ready to be timed.

    Args:
        case: to be timed.
        facts: returns what else is known of it once it has run: "memory", the bytes that it takes; in JAX also
            "compile_s", the seconds that compiling took, and "moved", the bytes that XLA says it reads and writes.
    """

    case: Case
    facts: Callable[[], dict[str, Any]]


def _row(
    name: str,
    call: str,
    arguments: Mapping[str, Any] = MappingProxyType({}),
    lists: Sequence[str] = BOTH,
    **columns: Any,
) -> Callable[[str, str], Loss]:
    """Return a row of the table, which makes a loss for a framework and a device.

    Args:
        name: of the loss; "{best}" stands for the implementation that is chosen on the device.
        call: the name of a function of `calls_torch` or `calls_jax`.
        arguments: what that function is given.
        lists: which show the loss.
        columns: the other fields of `Loss`.
    """

    def loss_on(framework: str, device: str) -> Loss:
        def make() -> Callable[..., Any]:
            calls = importlib.import_module(f"benchmarks.engines.calls_{framework}")
            function: Callable[..., Any] = getattr(calls, call)(device, **arguments)
            return function

        return Loss(name.format(best=KERNELS.get(device, "fused")), make, lists=lists, **columns)

    return loss_on


def _ours(
    name: str, call: str, arguments: Mapping[str, Any] = MappingProxyType({}), **columns: Any
) -> Callable[[str, str], Loss]:
    return _row(name, call, arguments, ours=True, **columns)


_SMOOTHED = {"label_smoothing": SMOOTHING}
_IN_CHUNKS = {"in_chunks": True}
_UNSMOOTHED = {"smoothing": 0.0}

# The first of each list is what the others are compared with.
TABLE: dict[tuple[str, str], tuple[Callable[[str, str], Loss], ...]] = {
    ("torch", DENSE): (
        _row("F.cross_entropy, smoothed", "cross_entropy", _SMOOTHED, (DENSE,)),
        _row("F.cross_entropy, unsmoothed", "cross_entropy", lists=(DENSE,)),
        _ours("lsce {best}", "best", lists=(DENSE,)),
        # Its gradient takes the memory of the logits.
        _ours("lsce {best}, in place", "best", {"inplace_backward": True}, lists=(DENSE,), overwrites=True),
        _ours("lsce {best}, trained logits", "best", lists=(DENSE,), trained=True),
        _ours("lsce {best}, with statistics", "best_with_statistics", lists=(DENSE,), with_statistics=True),
        _ours("lsce fused", "dense", {"implementation": "fused"}, lists=(DENSE,), devices=("cuda",)),
        _ours("lsce reference", "dense", {"implementation": "reference"}, lists=(DENSE,)),
        _row("F.cross_entropy, compiled", "compiled", {"call": "cross_entropy", **_SMOOTHED}, (DENSE,), compiled=True),
        _ours(
            "lsce fused, compiled",
            "compiled",
            {"call": "dense", "fullgraph": True, "implementation": "fused"},
            lists=(DENSE,),
            compiled=True,
        ),
        _row("floor: write a tensor", "write", lists=(DENSE,), floor=True),
        _row("F.cross_entropy", "cross_entropy", _SMOOTHED, EVERYWHERE),
        _row("F.cross_entropy, compiled", "compiled", {"call": "cross_entropy", **_SMOOTHED}, compiled=True),
        _row("F.cross_entropy*", "cross_entropy", smoothing=0.0),
        _ours("lsce", "dense", lists=EVERYWHERE),
        _ours("lsce, in place", "dense", {"inplace_backward": True}, overwrites=True),
        _ours("lsce triton", "forced", {"call": "dense"}, lists=(ON_DEVICE,)),
        _ours("lsce fused", "dense", {"implementation": "fused"}, lists=(ON_DEVICE,)),
        _ours("lsce, compiled", "compiled", {"call": "dense", "fullgraph": True}, compiled=True),
        _row("Liger", "liger", {"name": "LigerCrossEntropyLoss"}, overwrites=True, needs_gpu=True),
        _row("flash-attention", "flash_attention", needs_gpu=True),
        _row("QuACK*", "quack", smoothing=0.0, needs_gpu=True),
        _row("timm", "timm", lists=(TORCH,)),
        _row("clamped one-hot module", "clamped_one_hot", lists=(TORCH,), options=CLAMP),
        _ours("lsce, clamp", "dense", CLAMP, lists=(TORCH,), options=CLAMP),
        _row("Keras", "keras", lists=(KERAS_TORCH,)),
    ),
    ("torch", LINEAR): (
        _row("F.cross_entropy, smoothed", "on_logits", {"call": "cross_entropy", **_SMOOTHED}, (LINEAR,)),
        _row("F.linear_cross_entropy, smoothed", "linear_cross_entropy", _SMOOTHED, (LINEAR,)),
        # With smoothing it would warn, and take all rows at once.
        _row("F.linear_cross_entropy, chunked", "linear_cross_entropy", _IN_CHUNKS, (LINEAR,), smoothing=0.0),
        _ours("lsce fused", "on_logits", {"call": "dense", "implementation": "fused"}, lists=(LINEAR,)),
        _ours("lsce linear", "linear", lists=(LINEAR,)),
        _ours("lsce linear, recompute", "linear", {"recompute": True}, lists=(LINEAR,)),
        _ours("lsce linear, none then mean", "none_then_mean", lists=(LINEAR,)),
        _ours("lsce linear, with statistics", "linear_with_statistics", lists=(LINEAR,), with_statistics=True),
        _row("floor: three matrix products", "products", lists=(LINEAR,), floor=True),
        _row("F.cross_entropy", "on_logits", {"call": "cross_entropy", **_SMOOTHED}, EVERYWHERE),
        _row(
            "F.cross_entropy, compiled",
            "compiled",
            {"call": "on_logits", "of": "cross_entropy", **_SMOOTHED},
            compiled=True,
        ),
        _row("F.linear_cross_entropy", "linear_cross_entropy", _SMOOTHED),
        _row("F.linear_cross_entropy, chunked*", "linear_cross_entropy", _IN_CHUNKS, smoothing=0.0),
        _ours("lsce, on all logits", "on_logits", {"call": "dense"}),
        _ours("lsce linear", "linear", lists=EVERYWHERE),
        _ours("lsce linear triton", "forced", {"call": "linear"}, lists=(ON_DEVICE,)),
        _ours("lsce linear chunked", "linear", {"implementation": "chunked"}, lists=(ON_DEVICE,)),
        _ours("lsce linear, recompute", "linear", {"recompute": True}),
        _ours("lsce linear, compiled", "compiled", {"call": "linear"}, compiled=True),
        _row("Liger", "liger", {"name": "LigerFusedLinearCrossEntropyLoss"}, needs_gpu=True),
        # As it comes, it leaves small gradients out.
        _row("cut-cross-entropy, filtered*", "cut_cross_entropy", smoothing=0.0, needs_gpu=True),
        _row("cut-cross-entropy*", "cut_cross_entropy", {"filter_eps": None}, smoothing=0.0, needs_gpu=True),
        _row("QuACK*", "quack_linear", smoothing=0.0, needs_gpu=True),
        _row(
            "cut-cross-entropy, compiled*",
            "cut_cross_entropy",
            {"impl": "torch_compile"},
            (CUT,),
            smoothing=0.0,
            compiled=True,
        ),
        _row("F.linear_cross_entropy", "linear_cross_entropy", lists=(ADDED,)),
        _row("F.linear_cross_entropy, chunked", "linear_cross_entropy", _IN_CHUNKS, (ADDED,)),
        _row("F.cross_entropy, each row", "cross_entropy_of_rows", lists=(ADDED,), of_rows=True),
        _ours("lsce linear", "linear", _UNSMOOTHED, lists=(ADDED,)),
        _ours("lsce linear, each row", "linear", {**_UNSMOOTHED, "reduction": "none"}, lists=(ADDED,), of_rows=True),
    ),
    ("jax", DENSE): (
        _row("Optax one-hot, smoothed", "one_hot", lists=(DENSE,)),
        _row("Optax integer, unsmoothed", "integer_labels", lists=(DENSE,)),
        _ours("lsce fused", "dense", {"implementation": "fused"}, lists=(DENSE,)),
        _ours("lsce fused, trained logits", "dense", {"implementation": "fused"}, lists=(DENSE,), trained=True),
        _ours("lsce fused, with statistics", "dense_with_statistics", lists=(DENSE,), with_statistics=True),
        _ours("lsce reference", "dense", {"implementation": "reference"}, lists=(DENSE,)),
        _row("floor: write an array", "write", lists=(DENSE,), floor=True),
        _row("floor: exp, affine, write", "exp_and_write", lists=(DENSE,), floor=True),
        _row("Optax one-hot", "one_hot", lists=EVERYWHERE),
        _row("Optax integer*", "integer_labels", smoothing=0.0),
        _row("Optax integer, cast*", "integer_labels_float32", smoothing=0.0, narrow=True),
        _ours("lsce", "dense", lists=EVERYWHERE),
        _ours("lsce fused", "dense", {"implementation": "fused"}, lists=(ON_DEVICE,)),
        _ours("lsce pallas", "dense", {"implementation": "pallas"}, lists=(ON_DEVICE,), devices=("cpu", "tpu")),
        _row("T5X, MaxText formula, z-loss", "t5x", {"z_loss": Z_LOSS["z_loss"]}, (JAX,), options=Z_LOSS),
        _ours("lsce, z-loss", "dense", Z_LOSS, lists=(JAX,), options=Z_LOSS),
        _row("Keras", "keras", lists=(KERAS_JAX,)),
    ),
    ("jax", LINEAR): (
        _row("Optax one-hot, smoothed", "on_logits", {"call": "one_hot"}, (LINEAR,)),
        _row("Optax one-hot", "on_logits", {"call": "one_hot"}, EVERYWHERE),
        _row("Optax integer*", "on_logits", {"call": "integer_labels"}, smoothing=0.0),
        _row("lse form", "on_logits", {"call": "lse_form"}, (LINEAR, *BOTH)),
        _ours("lsce fused", "on_logits", {"call": "dense", "implementation": "fused"}, lists=(LINEAR,)),
        _ours("lsce, on all logits", "on_logits", {"call": "dense"}),
        _ours("lsce linear", "linear", lists=(LINEAR, *EVERYWHERE)),
        _ours("lsce linear, recompute", "linear", {"recompute": True}, lists=(LINEAR, *BOTH)),
        _ours("lsce linear, none then mean", "none_then_mean", lists=(LINEAR,)),
        _row("floor: three matrix products", "products", lists=(LINEAR,), floor=True),
        _row("Tokamax XLA*", "tokamax", {"implementation": "xla"}, (ON_DEVICE, TOKAMAX), smoothing=0.0),
        # Without an implementation, Tokamax takes "xla" everywhere.
        _row(
            "Tokamax*",
            "tokamax",
            {"implementation": "mosaic_tpu"},
            (ON_DEVICE, TOKAMAX),
            devices=("cpu", "tpu"),
            smoothing=0.0,
        ),
        _row("Optax integer", "on_logits", {"call": "integer_labels_float32"}, (ADDED,)),
        _ours("lsce linear", "linear", _UNSMOOTHED, lists=(ADDED,)),
        _ours("lsce linear, each row", "linear", {**_UNSMOOTHED, "reduction": "none"}, lists=(ADDED,), of_rows=True),
        _row("Tokamax, XLA", "tokamax", {"implementation": "xla", "widened": True}, (ADDED,)),
    ),
}


def losses(framework: str, form: str, shown: str, device: str = "cpu", dtype: str = "float32") -> list[Loss]:
    """Return the losses of a list, the one first that the others are compared with.

    Args:
        framework: "torch" or "jax".
        form: "dense" or "linear".
        shown: the name of the list.
        device: "cpu", "cuda" or "tpu".
        dtype: of the logits, or of hidden and weight.
    """
    found = (row(framework, device) for row in TABLE[framework, form])
    return [
        loss._replace(make=partial(_unavailable, NEEDS_GPU))
        if loss.needs_gpu and device == "cpu" and shown != ON_DEVICE
        else loss
        for loss in found
        if shown in loss.lists and device in loss.devices and not (loss.narrow and dtype == "float32")
    ]


def _unavailable(reason: str) -> Callable[..., Any]:
    raise UnavailableError(reason)


def load(module: str, distribution: str) -> Any:
    """Return a module of a library that may not be here.

    Raises:
        UnavailableError: it is not installed, or cannot be imported here.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise UnavailableError(f"{distribution} is not installed")
    try:
        return importlib.import_module(module)
    except Exception as error:  # the import of a library that looks for a device may raise anything
        raise UnavailableError(f"{distribution} cannot be imported: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Return the kind of an exception and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
