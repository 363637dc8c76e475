"""Losses of other libraries as adapters, each called as its library documents.

An adapter translates the names of arguments, the place of the class dimension, a one-hot or smoothed target if the
library wants one, and the reduction if the library leaves it to its user. It returns the results unchanged. So
"disagree" and "failed" are findings about the library, and "unsupported" means that it was not called.

T5X cannot be installed beside the others, so its formula is written here again.
"""

import importlib
import importlib.util
import itertools
import multiprocessing
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from lsce_spec.extras import install
from parity_tests.losses.adapters import (
    Adapter,
    JaxAdapter,
    LossError,
    TorchAdapter,
    UnavailableError,
    forget_programs,
)
from parity_tests.losses.torchax import default_promotion, load_interop
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import AnyResult

# Options with these values have no effect, so a library need not have the argument.
NEUTRAL = (
    ("convention", "uniform"),
    ("z_loss", 0.0),
    ("softcap", None),
    ("subtract_entropy", False),
    ("ignore_index", None),
    ("denominator", None),
    ("bad_labels", "nan"),
)
# After so many calls a process of its own drops its compiled programs.
CALLS = 32


class PeerAdapter:
    """An adapter around a library's loss, which is not called if `refuse` gives a reason.

    It drops options without effect and broadcasts arrays. JAX promotes dtypes and ranks during the call even if the
    user has forbidden that, since the libraries rely on promotion.

    Args:
        adapter: the adapter to call.
        refuse: returns why the library cannot handle a case, beyond the features of
            `parity_tests.truth.cases.features`; or None.
    """

    def __init__(self, adapter: Adapter, refuse: Callable[[Case], str | None] = lambda case: None) -> None:
        """Keep both."""
        self.adapter, self.refuse = adapter, refuse
        self.name, self.framework, self.device = adapter.name, adapter.framework, adapter.device
        self.arithmetic = adapter.arithmetic
        self.concurrent = getattr(adapter, "concurrent", False)

    def unsupported(self, case: Case) -> str | None:
        """Return why the library cannot handle a case, or None."""
        return self.adapter.unsupported(case) or self.refuse(case)

    def __call__(self, case: Case) -> AnyResult:
        """Return loss and gradient of a case."""
        options = {name: value for name, value in case.options.items() if (name, value) not in NEUTRAL}
        where = None if case.where is None else np.broadcast_to(case.where, case.batch_shape)
        smoothing = case.smoothing
        if not isinstance(smoothing, float):
            smoothing = np.broadcast_to(smoothing, case.batch_shape)
        case = replace(case, options=options, where=where, smoothing=smoothing)
        if self.framework != "jax":
            return self.adapter(case)
        with default_promotion():
            return self.adapter(case)


class WorkerAdapter:
    """An adapter that runs in a process of its own, for a library that reads its environment when it is imported.

    The process starts with the first case and ends with this object, or with the program. As with all of Python's
    multiprocessing, a script that uses it needs `if __name__ == "__main__":`.

    Args:
        make: makes the adapter. It is called in both processes; here only for the name and the cases it takes.
        environment: environment variables of the process.
    """

    concurrent = True

    def __init__(self, make: Callable[[], Adapter], environment: Mapping[str, str]) -> None:
        """Make the adapter in this process."""
        self.make, self.environment = make, dict(environment)
        self.adapter = make()
        self.name, self.framework, self.device = self.adapter.name, self.adapter.framework, self.adapter.device
        self.arithmetic = self.adapter.arithmetic
        self._pool: ProcessPoolExecutor | None = None

    def unsupported(self, case: Case) -> str | None:
        """Return why the library cannot handle a case, or None."""
        return self.adapter.unsupported(case)

    def __call__(self, case: Case) -> AnyResult:
        """Return loss and gradient of a case."""
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, spawn, initializer=_begin_worker, initargs=(self.environment,))
            weakref.finalize(self, self._pool.shutdown)
        try:
            outcome = self._pool.submit(_evaluate, self.make, case).result()
        except BrokenProcessPool as error:
            self._pool = None
            raise LossError(f"the process of {self.name} ended while it computed the loss") from error
        if isinstance(outcome, str):
            raise LossError(outcome)
        return outcome


def _begin_worker(environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    # A terminal sends Ctrl-C to all processes; this one ends with its parent, without a traceback of its own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, however that ended; the queue of a pool does not."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


_calls = itertools.count(1)


def _evaluate(make: Callable[[], Adapter], case: Case) -> AnyResult | str:
    """Return the result, or the exception as text: not every exception of a library can be pickled."""
    if not next(_calls) % CALLS:
        forget_programs()
    try:
        return make()(case)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def torch_cross_entropy(device: str = "cpu") -> Adapter:
    """Return `torch.nn.functional.cross_entropy`."""
    torch = _library("torch", "torch")
    return _torch_cross_entropy("torch-cross-entropy", torch.nn.functional.cross_entropy, device)


def torch_cross_entropy_compiled(device: str = "cpu") -> Adapter:
    """Return `torch.nn.CrossEntropyLoss` under `torch.compile`, as one graph, compiled anew for each case."""
    torch = _library("torch", "torch")

    def loss(logits: Any, labels: Any, weight: Any = None, **options: Any) -> Any:
        # All modules of a class share their compiled code, and the many cases would reach the limit of recompilations.
        torch.compiler.reset()
        return torch.compile(torch.nn.CrossEntropyLoss(weight, **options), fullgraph=True)(logits, labels)

    return _torch_cross_entropy("torch-cross-entropy-compiled", loss, device)


def _torch_cross_entropy(name: str, cross_entropy: Callable[..., Any], device: str) -> Adapter:
    def loss(
        logits: Any,
        labels: Any,
        *,
        smoothing: float,
        reduction: str,
        axis: int = -1,
        class_weight: Any = None,
        ignore_index: int = -100,
    ) -> Any:
        # Classes are in dimension 1, or the only one. They are moved only if needed: torch.compile warns of views.
        if logits.ndim > 1 and axis % logits.ndim != 1:
            labels = labels.movedim(axis, 1) if labels.is_floating_point() else labels
            logits = logits.movedim(axis, 1)
        return cross_entropy(
            logits,
            labels,
            weight=None if class_weight is None else class_weight.to(logits.dtype),  # must have the dtype of the logits
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=smoothing,
        )

    supports = frozenset({"ignore_index", "class_weight", "soft labels", "axis", "no batch"})
    return PeerAdapter(TorchAdapter(loss, device=device, name=name, supports=supports))


def timm_label_smoothing(device: str = "cpu") -> Adapter:
    """Return `timm.loss.LabelSmoothingCrossEntropy`, which only has the mean."""
    timm_loss = _library("timm.loss", "torch,peers")

    def loss(logits: Any, labels: Any, *, smoothing: float, reduction: str) -> Any:
        return timm_loss.LabelSmoothingCrossEntropy(smoothing)(logits, labels)

    def refuse(case: Case) -> str | None:
        reduction = case.options.get("reduction", "none")
        if reduction != "mean":
            return f"has no reduction={reduction!r}"
        return "takes a smoothing below 1 only" if case.smoothing == 1 else None

    return PeerAdapter(TorchAdapter(loss, device=device, name="torch-timm", supports=frozenset()), refuse)


def optax_dense(device: str = "cpu") -> Adapter:
    """Return `optax.softmax_cross_entropy` of `optax.smooth_labels`."""
    optax = _library("optax", "jax")

    def loss(
        logits: Any,
        labels: Any,
        *,
        smoothing: Any,
        reduction: str,
        axis: int = -1,
        where: Any = None,
        class_mask: Any = None,
    ) -> Any:
        jax = importlib.import_module("jax")
        num_classes = logits.shape[axis]
        if not jax.numpy.issubdtype(labels.dtype, jax.numpy.floating):
            labels = jax.nn.one_hot(labels, num_classes, axis=axis, dtype=logits.dtype)
        if not isinstance(smoothing, float):
            smoothing = jax.numpy.expand_dims(smoothing, axis)
        classes, elements = None, where
        if class_mask is not None:
            if class_mask.ndim == 1:
                rows = tuple(np.delete(logits.shape, axis))
                class_mask = jax.numpy.moveaxis(jax.numpy.broadcast_to(class_mask, (*rows, num_classes)), -1, axis)
            classes = jax.numpy.broadcast_to(class_mask, logits.shape)
            elements = classes if where is None else classes & jax.numpy.expand_dims(where, axis)
        targets = optax.smooth_labels(labels, smoothing, axis=axis, where=classes)
        return _reduced(optax.softmax_cross_entropy(logits, targets, axis=axis, where=elements), reduction, where)

    supports = {
        *("soft labels", "smoothing per row", "class_mask", "class_mask per row", "where", "axis", "no batch"),
        "narrow labels",
    }
    return PeerAdapter(JaxAdapter(loss, device=device, name="jax-optax", supports=frozenset(supports)))


def optax_integer(device: str = "cpu") -> Adapter:
    """Return `optax.softmax_cross_entropy_with_integer_labels`, which has no smoothing."""
    optax = _library("optax", "jax")

    def loss(logits: Any, labels: Any, *, smoothing: float, reduction: str, axis: int = -1, where: Any = None) -> Any:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels, axis=axis, where=where)
        return _reduced(losses, reduction, where)

    def refuse(case: Case) -> str | None:
        return "has no smoothing" if np.any(case.smoothing) else None

    supports = frozenset({"where", "axis", "no batch", "narrow labels"})
    return PeerAdapter(JaxAdapter(loss, device=device, name="jax-optax-integer", supports=supports), refuse)


def _reduced(losses: Any, reduction: str, where: Any) -> Any:
    """Reduce the losses as a user of Optax does."""
    if reduction == "mean":
        return losses.mean(where=where)
    return losses.sum() if reduction == "sum" else losses


def t5x(device: str = "cpu") -> Adapter:
    """Return the loss of T5X, after the formulas of its file `t5x/losses.py`.

    `cross_entropy_with_logits` is -sum q log p + z_loss lse^2 with the gradient (1 + 2 z_loss lse) p - q.
    `compute_weighted_cross_entropy` has q = 1-e at the label and e/(K-1) elsewhere, in float32, subtracts the entropy
    of q, and divides the weighted sum by a factor. Here the entropy is subtracted if the case has that option, and a
    uniform smoothing e is passed as e (K-1)/K, which gives the same target.
    """
    jax, jnp = (_library(name, "jax") for name in ("jax", "jax.numpy"))

    def forward(logits: Any, targets: Any, z_loss: float) -> tuple[Any, Any]:
        peak = logits.max(axis=-1, keepdims=True)
        exponentials = jnp.exp(logits - peak)
        total = exponentials.sum(axis=-1, keepdims=True)
        log_p = logits - peak - jnp.log(total)
        lse = jnp.log(total) + peak
        losses = -(targets * log_p).sum(axis=-1) + z_loss * lse[..., 0] ** 2
        return losses, ((1 + 2 * z_loss * lse) * exponentials / total - targets, log_p)

    def backward(z_loss: float, residuals: Any, upstream: Any) -> tuple[Any, Any]:
        slope, log_p = residuals
        upstream = upstream[..., None]
        return (upstream * slope).astype(log_p.dtype), (-upstream * log_p).astype(jnp.float32)

    cross_entropy_with_logits = jax.custom_vjp(lambda *operands: forward(*operands)[0], nondiff_argnums=(2,))
    cross_entropy_with_logits.defvjp(forward, backward)

    def loss(
        logits: Any,
        labels: Any,
        *,
        smoothing: float,
        reduction: str,
        convention: str = "uniform",
        z_loss: float = 0.0,
        subtract_entropy: bool = False,
        where: Any = None,
        denominator: float | None = None,
    ) -> Any:
        num_classes = logits.shape[-1]
        if convention == "uniform":
            smoothing *= (num_classes - 1) / num_classes
        on, off = 1 - smoothing, smoothing / (num_classes - 1)
        targets = jnp.where(labels[..., None] == jnp.arange(num_classes), on, off).astype(jnp.float32)
        losses = cross_entropy_with_logits(logits, targets, z_loss)
        if subtract_entropy:
            losses += on * jnp.log(on) + (num_classes - 1) * off * jnp.log(off + 1e-20)
        if where is not None:
            losses *= where
        if reduction == "none":
            return losses
        if reduction == "mean" and denominator is None:
            denominator = labels.size if where is None else where.sum()
        return losses.sum() if denominator is None else losses.sum() / denominator

    supports = frozenset(
        {"non_target convention", "z_loss", "subtract_entropy", "where", "denominator", "no batch", "narrow labels"}
    )
    return PeerAdapter(JaxAdapter(loss, device=device, name="jax-t5x", supports=supports))


def keras_categorical(backend: str, device: str = "cpu") -> Adapter:
    """Return `keras.losses.CategoricalCrossentropy` on a backend, "jax" or "torch", in a process of its own."""
    if device != "cpu":
        raise UnavailableError(f"{backend}-keras runs on the CPU only here, not on {device}")
    return WorkerAdapter(partial(_keras_here, backend), {"KERAS_BACKEND": backend, "KERAS_TORCH_DEVICE": "cpu"})


def _keras_here(backend: str) -> Adapter:
    # Found but not imported: an import would fix the backend of this process.
    _find_library("keras", f"{backend},peers")

    def refuse(case: Case) -> str | None:
        return "takes two classes or more" if case.num_classes == 1 else None

    adapter: Callable[..., Adapter] = JaxAdapter if backend == "jax" else TorchAdapter
    supports = frozenset({"soft labels", "where", "axis", "narrow labels"})
    return PeerAdapter(adapter(_keras_loss, name=f"{backend}-keras", supports=supports), refuse)


def _keras_loss(
    logits: Any, labels: Any, *, smoothing: float, reduction: str, axis: int = -1, where: Any = None
) -> Any:
    keras = importlib.import_module("keras")
    if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(labels.dtype)):
        labels = keras.ops.one_hot(labels, logits.shape[axis], axis=axis)
    # By default Keras computes in float32, whatever the dtype of the inputs.
    dtype = "float64" if keras.backend.standardize_dtype(logits.dtype) == "float64" else "float32"
    if reduction == "mean":
        reduction = "sum_over_batch_size" if where is None else "mean_with_sample_weight"
    loss = keras.losses.CategoricalCrossentropy(
        from_logits=True, label_smoothing=smoothing, axis=axis, reduction=reduction, dtype=dtype
    )
    return loss(labels, logits, sample_weight=where)


def torchax_module(device: str = "cpu") -> Adapter:
    """Return our torch module, run on JAX by torchax, as on a TPU."""
    interop = load_interop()
    make_module = importlib.import_module("lsce_torch").LabelSmoothedCrossEntropyLoss
    moveaxis = importlib.import_module("jax.numpy").moveaxis

    def torch_loss(logits: Any, labels: Any, call: dict[str, Any], *, class_weight: Any = None, **options: Any) -> Any:
        return make_module(class_weight, **options)(logits, labels, **call)

    def loss(logits: Any, labels: Any, *, axis: int = -1, **options: Any) -> Any:
        # The module has the class dimension of nn.CrossEntropyLoss.
        place = min(1, logits.ndim - 1)
        if labels.ndim == logits.ndim:
            labels = moveaxis(labels, axis, place)
        call = {name: options.pop(name) for name in ("smoothing", "where", "denominator") if name in options}
        with warnings.catch_warnings():
            # torch's int64 is JAX's int32, which holds every label.
            warnings.filterwarnings("ignore", "Explicitly requested dtype", UserWarning)
            return interop.call_torch(torch_loss, moveaxis(logits, axis, place), labels, call, **options)

    return PeerAdapter(JaxAdapter(loss, device=device, name="jax-torchax"))


def _library(name: str, extras: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise _missing(error.name, extras) from error


def _find_library(name: str, extras: str) -> None:
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise _missing(name, extras)


def _missing(name: str | None, extras: str) -> UnavailableError:
    return UnavailableError(f"{name} is not installed. Run: {install(extras)}")
