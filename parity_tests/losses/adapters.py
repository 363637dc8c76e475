"""Adapters call a framework's loss and return loss and gradients as NumPy arrays. Making one loads its framework."""

import hashlib
import importlib
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lsce_spec.extras import install
from parity_tests.truth.arithmetic import NARROW, Arithmetic
from parity_tests.truth.cases import Case, LinearCase, features
from parity_tests.truth.comparison import AnyResult, make_result
from parity_tests.truth.devices import Device, device_of_kind, of_own_losses
from parity_tests.truth.precision import as_dtype, compute_dtype


class UnavailableError(Exception):
    """A framework, library or device is not on this machine; the message says what to do."""


class LossError(Exception):
    """A loss returned nothing that can be compared; the message says what it returned."""


class ShapeError(LossError):
    """The shape of the loss does not fit the reduction."""


class Adapter(Protocol):
    """A loss of some framework on some device.

    Args:
        name: name in reports.
        framework: "jax", "torch" or "numpy".
        device: "cpu", "cuda" or "tpu".
        arithmetic: accuracy of its elementary functions.

    An adapter that may be called while others are, each in a thread of its own, has an attribute `concurrent` = True.
    """

    name: str
    framework: str
    device: str
    arithmetic: Arithmetic

    def unsupported(self, case: Case) -> str | None:
        """Return why the loss cannot handle a case, or None."""
        ...

    def __call__(self, case: Case) -> AnyResult:
        """Return loss and gradients of a case. An exception is reported as a failure of this case."""
        ...


def missing_features(case: Case, supports: frozenset[str] | None, linear: bool = False) -> str | None:
    """Return why a loss cannot handle a case, or None: the case's kind, or features that are not in `supports`.

    Args:
        case: the case.
        supports: features of the loss; None for all.
        linear: whether the loss takes a linear layer, and not logits.
    """
    if linear != isinstance(case, LinearCase):
        return "takes a linear layer, not logits" if linear else "takes logits, not a linear layer"
    missing = sorted(features(case) - supports) if supports is not None else []
    return f"has no {', '.join(missing)}" if missing else None


class FrameworkAdapter:
    """The loss of `lsce_jax` or `lsce_torch`, or a function of the same signature.

    Args:
        loss: the function; by default `label_smoothed_cross_entropy` of the package, or the linear one. It gets
            `smoothing`, `reduction`, and the other options that the case sets.
        implementation: the implementation; None leaves the choice to the function.
        device: the device.
        name: name in reports.
        supports: its features (see `parity_tests.truth.cases.features`); None for all.
        linear: whether it takes (hidden, weight, labels), and not (logits, labels).
        narrow: intermediate results that the layer stores in a narrow dtype; see `Arithmetic`.
    """

    framework: str

    def __init__(
        self,
        loss: Callable[..., Any] | None = None,
        *,
        implementation: str | None = None,
        device: str = "cpu",
        name: str | None = None,
        supports: frozenset[str] | None = None,
        linear: bool = False,
        narrow: frozenset[str] = NARROW,
    ) -> None:
        """Choose the function."""
        self.is_ours = loss is None
        if loss is None:
            package = self._load_package()
            loss = package.linear_label_smoothed_cross_entropy if linear else package.label_smoothed_cross_entropy
        self.loss: Callable[..., Any] = loss if implementation is None else partial(loss, implementation=implementation)
        self.device, self.supports, self.linear, self.implementation = device, supports, linear, implementation
        self.name = name or f"{self.framework} {implementation or ''}".rstrip()
        self.arithmetic = self.arithmetic_on(self.device_model, narrow)

    def take(self, loss: Callable[..., Any]) -> None:
        """Call another function than that of the package."""
        self.loss, self.is_ours = loss, False
        self.arithmetic = self.arithmetic_on(self.device_model)

    def arithmetic_on(self, device: Device, narrow: frozenset[str] | None = None) -> Arithmetic:
        """Return what the bounds may assume of the loss on a device.

        Losses of others may take the logarithm for their gradient too, which shows where it is as rough as on a TPU.
        """
        arithmetic = replace(device.arithmetic, narrow=self.arithmetic.narrow if narrow is None else narrow)
        if self.is_ours:
            return of_own_losses(arithmetic, device.family)
        return replace(arithmetic, exp_of_log=device.family == "tpu")

    @property
    def device_model(self) -> Device:
        """What is known of the arithmetic of the device."""
        return device_of_kind(self.framework, self.device, self._device_kind())

    def _device_kind(self) -> str:
        """Return the device's name, as the framework says it.

        Raises:
            UnavailableError: the device is not there.
        """
        raise NotImplementedError

    def _load_package(self) -> Any:
        """Return the package; not loaded for another function, which may not need all that the package does."""
        raise NotImplementedError

    def unsupported(self, case: Case) -> str | None:
        """Return why the loss cannot handle a case, or None."""
        return missing_features(case, self.supports, self.linear)


class JaxAdapter(FrameworkAdapter):
    """A `FrameworkAdapter` for JAX.

    Args:
        loss: as in `FrameworkAdapter`.
        jit: whether to compile it.
        compiler_options: of XLA, by the names of its flags, such as {"xla_disable_hlo_passes": "fusion"}.
        options: as in `FrameworkAdapter`.

    Raises:
        UnavailableError: JAX, or the device, is not there.
    """

    framework = "jax"

    def __init__(
        self,
        loss: Callable[..., Any] | None = None,
        jit: bool = True,
        compiler_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Load JAX."""
        _load("jax")
        super().__init__(loss, **options)
        self.jit, self.compiler_options = jit, compiler_options
        # Subclasses change settings of JAX, or modules, for all threads.
        self.concurrent = type(self) is JaxAdapter

    def _device_kind(self) -> str:
        kind: str = self._jax_device.device_kind
        return kind

    @property
    def _jax_device(self) -> Any:
        import jax

        try:
            return jax.local_devices(backend=self.device)[0]  # of other processes none
        except RuntimeError as error:
            raise UnavailableError(f"JAX finds no {self.device} device on this machine: {error}") from error

    def _load_package(self) -> Any:
        import lsce_jax

        return lsce_jax

    def __call__(self, case: Case) -> AnyResult:
        """Return loss and gradients of a case."""
        import jax

        with self.settings(case.dtype):
            step, operands = self.step(case)
            compiled = jax.jit(step, compiler_options=self.compiler_options) if self.jit else step
            return self.result(case, compiled(*operands))

    @contextmanager
    def settings(self, dtype: str) -> Iterator[None]:
        """Hold what JAX needs for a dtype: 64 bits for float64 only, and the device."""
        import jax

        with jax.enable_x64(dtype == "float64"), jax.default_device(self._jax_device):
            yield

    def step(self, case: Case) -> tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]:
        """Return a function that computes the loss and the gradients, by name, and the operands to call it with."""
        import jax

        arrays, options = operands_of(case, self.implementation)
        operands = {name: jax.numpy.asarray(value) for name, value in arrays.items()}
        upstream = operands.pop("upstream")
        leaves = {name: operands.pop(name) for name in LEAVES if name in operands}

        def total(leaves: dict[str, Any], operands: dict[str, Any], upstream: Any) -> tuple[Any, dict[str, Any]]:
            returned = self.parts_of(_call(self.loss, leaves, {**operands, **options}))
            _check_shape(case, returned["loss"])
            # A loss of a user's may come in a narrow dtype, and JAX may be set to promote none.
            dtype = jax.numpy.promote_types(returned["loss"].dtype, upstream.dtype)
            return (returned["loss"].astype(dtype) * upstream.astype(dtype)).sum(), returned

        def parts(*operands: Any) -> dict[str, Any]:
            gradients, returned = jax.grad(total, has_aux=True)(*operands)
            return {**returned, **gradients}

        return parts, (leaves, operands, upstream)

    def parts_of(self, returned: Any) -> dict[str, Any]:
        """Return what the function of the loss returned by name, with the loss as "loss"."""
        return {"loss": returned}

    def result(self, case: Case, parts: dict[str, Any]) -> AnyResult:
        """Return as NumPy arrays what the function of `step` returned."""
        dtypes = {name: part.dtype.name for name, part in parts.items()}
        return _result(case, {name: np.asarray(part) for name, part in parts.items()}, dtypes)


class TorchAdapter(FrameworkAdapter):
    """A `FrameworkAdapter` for torch.

    Args:
        loss: as in `FrameworkAdapter`.
        compiled: whether to compile it, as one graph, anew for each case.
        options: as in `FrameworkAdapter`.

    Raises:
        UnavailableError: torch, or the device, is not there.
    """

    framework = "torch"

    def __init__(self, loss: Callable[..., Any] | None = None, compiled: bool = False, **options: Any) -> None:
        """Load torch."""
        _load("torch")
        super().__init__(loss, **options)
        self.compiled = compiled
        if compiled:
            self.loss = _compiled_anew(self.loss)

    def _device_kind(self) -> str:
        import torch

        if self.device == "tpu":
            return _tpu_kind()
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UnavailableError(f"torch finds no {self.device} device on this machine")
        return torch.cuda.get_device_name() if self.device == "cuda" else self.device

    def _load_package(self) -> Any:
        import lsce_torch

        return lsce_torch

    def __call__(self, case: Case) -> AnyResult:
        """Return loss and gradients of a case."""
        arrays, options = operands_of(case, self.implementation)
        operands = {name: to_torch(value).to(self.device) for name, value in arrays.items()}
        return self.result(case, self.parts(case, operands, options))

    def parts(self, case: Case, operands: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        """Return the loss and the gradients, by name, as tensors: the weight's with the features last."""
        import torch

        upstream = operands.pop("upstream")
        leaves = {name: operands.pop(name) for name in LEAVES if name in operands}
        if "weight" in leaves:  # JAX has the features first
            leaves["weight"] = leaves["weight"].T.contiguous()
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        with torch.enable_grad():  # whatever another loss has set, or this one sets
            loss = _call(self.loss, leaves, {**operands, **options})
        _check_shape(case, loss)
        if not loss.requires_grad:
            raise LossError("the loss has no gradient: it was detached, or computed outside of autograd")
        (loss * upstream).sum().backward()
        for name, leaf in leaves.items():
            if leaf.grad is None:
                raise LossError(f"no gradient reaches {'the logits' if name == 'logits' else name}")
        return {"loss": loss.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}

    def result(self, case: Case, parts: dict[str, Any]) -> AnyResult:
        """Return what `parts` returned as NumPy arrays."""
        dtypes = {name: str(part.dtype).removeprefix("torch.") for name, part in parts.items()}
        widened = {name: part.cpu().double().numpy() for name, part in parts.items()}
        if "weight" in widened:
            widened["weight"] = widened["weight"].T
        return _result(case, widened, dtypes)


def _tpu_kind() -> str:
    """Return the name of the TPU that torch reaches through TorchTPU, such as "TPU v6e"."""
    try:
        importlib.import_module("torch_tpu")
    except ModuleNotFoundError as error:
        raise UnavailableError(
            "torch finds no tpu device on this machine: it reaches one through torch_tpu, which is not installed. "
            "There, with Python 3.13 or newer, run: pip install torch-tpu"
        ) from error
    tpu: Any = getattr(importlib.import_module("torch"), "tpu", None)
    with warnings.catch_warnings():
        # What torch_tpu says of its devices is experimental, and it warns of that.
        warnings.simplefilter("ignore")
        if tpu is None or not tpu.is_available():
            raise UnavailableError("torch finds no tpu device on this machine; torch_tpu is installed")
        return str(tpu.get_device_name())


def _compiled_anew(loss: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    def call(*operands: Any, **options: Any) -> Any:
        # The many combinations of options would reach the limit of recompilations.
        torch.compiler.reset()
        return torch.compile(loss, fullgraph=True)(*operands, **options)

    return call


def keep_programs(folder: Path) -> None:
    """Have JAX, if it is loaded, keep compiled programs in a folder, unless its user has chosen one.

    Programs are for the instructions of one CPU, which JAX does not check. A damaged file is compiled again.
    """
    jax = sys.modules.get("jax")
    if jax is None or jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
        kind = hashlib.sha256("".join(re.findall("(?m)^(?:model name|flags|Features).*", cpu)).encode()).hexdigest()[
            :16
        ]
        programs = folder / f"programs-{platform.machine()}-{kind}"
        programs.mkdir(parents=True, exist_ok=True)
    except OSError:  # another system, or a folder that cannot be written to
        return
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def forget_programs() -> None:
    """Have JAX drop its compiled programs. It keeps thousands, and those of one case are seldom those of another."""
    if jax := sys.modules.get("jax"):
        jax.clear_caches()


def _load(framework: str) -> Any:
    try:
        return importlib.import_module(framework)
    except ModuleNotFoundError as error:
        raise UnavailableError(f"{framework} is not installed. Run: {install(framework)}") from error


def _check_shape(case: Case, loss: Any) -> None:
    if not hasattr(loss, "shape"):
        raise ShapeError(f"the loss is a {type(loss).__name__}; a scalar or a loss per row is expected, as an array")
    shape = tuple(loss.shape)
    # A user's loss may have one value for each logit, as those of multi-label problems do: "elements".
    of_reduction = {"none": case.batch_shape, "elements": case.logits.shape}
    wanted = of_reduction.get(case.options.get("reduction", "none"), ())
    if shape != wanted:
        raise ShapeError(f"the loss has shape {list(shape)}, expected {list(wanted)}")


# The differentiable operands: of the dense loss the logits, of the linear loss the others.
LEAVES = ("logits", "hidden", "weight", "bias")


def _call(loss: Callable[..., Any], leaves: dict[str, Any], others: dict[str, Any]) -> Any:
    """Call a loss with logits, or hidden and weight, by position, and all other arguments by name."""
    first = [leaf for name, leaf in leaves.items() if name != "bias"]
    bias = {"bias": leaves["bias"]} if "bias" in leaves else {}
    return loss(*first, **bias, **others)


def operands_of(case: Case, implementation: str | None = None) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Return the arrays and the plain options of a case. Class vectors and `upstream` are in the compute dtype.

    "reference" has no chunks, so it does not get the chunk size of a linear case.
    """
    compute = compute_dtype(case.dtype)
    soft = case.labels.dtype.kind == "f"
    arrays: dict[str, Any] = {
        "labels": as_dtype(case.labels, case.dtype) if soft else case.labels,
        "where": case.where,
        "class_mask": case.class_mask,
        "upstream": as_dtype(np.asarray(1.0 if case.upstream is None else case.upstream), compute),
        **case.keywords,
    }
    options = {"reduction": "none", **case.options}
    if isinstance(case, LinearCase):
        arrays["hidden"] = as_dtype(case.hidden, case.dtype)
        arrays["weight"] = as_dtype(case.weight, case.weight_dtype)
        arrays["bias"] = None if case.bias is None else as_dtype(case.bias, case.weight_dtype)
        if case.chunk_size is not None and implementation != "reference":
            options["chunk_size"] = case.chunk_size
    else:
        arrays["logits"] = as_dtype(case.logits, case.dtype)
    for name in ("class_weight", "prior"):
        values = getattr(case, name)
        arrays[name] = None if values is None else as_dtype(values, compute)
    if "axis" in features(case):
        options["axis"] = case.axis
    if isinstance(case.smoothing, float):
        options["smoothing"] = case.smoothing
    else:
        arrays["smoothing"] = as_dtype(case.smoothing, compute)
    return {name: value for name, value in arrays.items() if value is not None}, options


def to_torch(array: NDArray[Any]) -> Any:
    """Return a tensor with the bits of an array."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape).copy())


def _result(case: Case, parts: dict[str, NDArray[Any]], dtypes: dict[str, str]) -> AnyResult:
    """Return the result, with the gradient with respect to the logits as "gradient"."""
    rows = case.rows().logits.shape
    widened = {name: part.astype(np.float64) for name, part in parts.items()}
    if case.options.get("reduction", "none") == "none":
        widened["loss"] = widened["loss"].reshape(rows[0])
    if "logits" in widened:
        widened["gradient"] = np.moveaxis(widened.pop("logits"), case.axis, -1).reshape(rows)
    else:
        widened["hidden"] = widened["hidden"].reshape(rows[0], widened["hidden"].shape[-1])
    return make_result(widened, {"gradient" if name == "logits" else name: dtype for name, dtype in dtypes.items()})
