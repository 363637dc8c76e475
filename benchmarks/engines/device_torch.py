"""The losses that `benchmarks device` checks and times in torch: ours, torch's, and those of other libraries.

Other libraries' losses are called as their sources say: liger-kernel 0.8.5, cut-cross-entropy 25.1.1, quack-kernels
0.6.5, flash-attn 2.8.3.
"""

import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import lsce_torch
from benchmarks.engines import dense_torch, linear_torch
from benchmarks.engines.device_losses import SMOOTHING, Loss, Program, load
from benchmarks.engines.timing import Case as TimedCase
from benchmarks.engines.timing import LinearShape
from lsce_torch import kernels
from parity_tests.losses.adapters import Adapter, TorchAdapter, UnavailableError, to_torch
from parity_tests.losses.triton_kernels import rounding_to_nearest
from parity_tests.truth.cases import Case
from parity_tests.truth.precision import as_dtype

DENSE_BASELINE = "F.cross_entropy"
LINEAR_BASELINE = "F.cross_entropy"

DENSE = partial(lsce_torch.label_smoothed_cross_entropy, smoothing=SMOOTHING)
SMOOTHED = partial(F.cross_entropy, label_smoothing=SMOOTHING)


def losses(linear: bool, dtype: str, device: str) -> list[Loss]:
    """Return the losses, the one first that the others are compared with."""
    del dtype
    return _linear(device) if linear else _dense(device)


def _dense(device: str) -> list[Loss]:
    in_place = partial(DENSE, inplace_backward=True)
    return [
        Loss(DENSE_BASELINE, lambda: SMOOTHED),
        Loss("F.cross_entropy, compiled", lambda: torch.compile(SMOOTHED, dynamic=False), compiled=True),
        Loss("F.cross_entropy*", lambda: F.cross_entropy, 0.0),
        Loss("lsce", lambda: DENSE, ours=True),
        Loss("lsce, in place", lambda: in_place, ours=True, overwrites=True),
        Loss("lsce triton", lambda: _forced(DENSE, device), ours=True),
        Loss("lsce fused", lambda: partial(DENSE, implementation="fused"), ours=True),
        Loss("lsce, compiled", lambda: torch.compile(DENSE, dynamic=False, fullgraph=True), ours=True, compiled=True),
        Loss("Liger", lambda: _liger("LigerCrossEntropyLoss", device), overwrites=True),
        Loss("flash-attention", lambda: _flash_attention(device)),
        Loss("QuACK*", lambda: _quack(device), 0.0),
    ]


def _linear(device: str) -> list[Loss]:
    ours = linear_torch.LINEAR
    found = [
        Loss(LINEAR_BASELINE, lambda: linear_torch.on_logits(SMOOTHED)),
        Loss(
            "F.cross_entropy, compiled",
            lambda: torch.compile(linear_torch.on_logits(SMOOTHED), dynamic=False),
            compiled=True,
        ),
    ]
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        options = nn.LinearCrossEntropyOptions()
        found += [
            Loss("F.linear_cross_entropy", lambda: partial(F.linear_cross_entropy, label_smoothing=SMOOTHING)),
            # With smoothing it would warn, and take all rows at once.
            Loss(
                "F.linear_cross_entropy, chunked*",
                lambda: partial(F.linear_cross_entropy, options=options),
                0.0,
            ),
        ]
    return [
        *found,
        Loss("lsce, on all logits", lambda: linear_torch.on_logits(DENSE), ours=True),
        Loss("lsce linear", lambda: ours, ours=True),
        Loss("lsce linear triton", lambda: _forced(ours, device), ours=True),
        Loss("lsce linear chunked", lambda: partial(ours, implementation="chunked"), ours=True),
        Loss("lsce linear, recompute", lambda: partial(ours, recompute=True), ours=True),
        Loss("lsce linear, compiled", lambda: torch.compile(ours, dynamic=False), ours=True, compiled=True),
        Loss("Liger", lambda: _liger("LigerFusedLinearCrossEntropyLoss", device)),
        # As it comes, it leaves small gradients out.
        Loss("cut-cross-entropy, filtered*", lambda: _cut_cross_entropy(device), 0.0),
        Loss("cut-cross-entropy*", lambda: _cut_cross_entropy(device, filter_eps=None), 0.0),
        Loss("QuACK*", lambda: _quack_linear(device), 0.0),
    ]


# --- What needs a GPU -----------------------------------------------------------------------------------------------


def _forced(loss: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    reason = kernels.reason_against(torch.zeros(1, 1, device=device))
    if reason is not None:
        raise UnavailableError(reason)
    return partial(loss, implementation="triton")


def _check_triton(device: str) -> None:
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UnavailableError("its kernels are Triton's: on a CPU set TRITON_INTERPRET=1 in the environment")


def _check_cuda(device: str) -> None:
    if device != "cuda":
        raise UnavailableError("it takes tensors of a CUDA device only")


def _liger(name: str, device: str) -> Callable[..., Tensor]:
    loss: Callable[..., Tensor] = getattr(load("liger_kernel.transformers", "liger-kernel"), name)(
        label_smoothing=SMOOTHING
    )
    _check_triton(device)
    if name == "LigerCrossEntropyLoss":
        return loss
    return lambda hidden, weight, labels: loss(weight, hidden, labels)


def _cut_cross_entropy(device: str, **options: Any) -> Callable[..., Tensor]:
    loss = load("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    _check_cuda(device)  # Triton's interpreter does not take its kernels
    return partial(loss, **options)


def _quack(device: str) -> Callable[..., Tensor]:
    loss: Callable[..., Tensor] = load("quack", "quack-kernels").cross_entropy
    _check_cuda(device)
    return loss


def _quack_linear(device: str) -> Callable[..., Tensor]:
    loss: Callable[..., Tensor] = load("quack.linear_cross_entropy", "quack-kernels").chunked_linear_cross_entropy
    _check_cuda(device)
    return loss


def _flash_attention(device: str) -> Callable[..., Tensor]:
    """Return the loss from its file: the package imports the compiled part of the library, which it does not need."""
    package = importlib.util.find_spec("flash_attn")
    if package is None or not package.submodule_search_locations:
        raise UnavailableError("flash-attn is not installed")
    file = Path(package.submodule_search_locations[0]) / "ops/triton/cross_entropy.py"
    spec = importlib.util.spec_from_file_location("flash_attn_triton_cross_entropy", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UnavailableError(f"flash-attn has no file {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _check_cuda(device)  # it looks for the index of a CUDA device
    return lambda logits, labels: module.cross_entropy_loss(logits, labels, label_smoothing=SMOOTHING)[0].mean()


# --- How they are called --------------------------------------------------------------------------------------------


def settings() -> AbstractContextManager[None]:
    """Return what the losses run within: Triton's interpreter, where it is chosen, rounds as GPUs do."""
    return rounding_to_nearest() if kernels.is_interpreted() else nullcontext()


def begin(device: str) -> None:
    """Forget what was compiled: many shapes would reach the limit of recompilations. Give memory back."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    release(device)


def release(device: str) -> None:
    """Give memory back to the device."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def check_alive(device: str) -> None:
    """Raise if the device takes no more work, as after an access to memory that is not there."""
    if device == "cuda":
        torch.cuda.synchronize()


def adapter(loss: Loss, function: Callable[..., Any], device: str, linear: bool) -> Adapter:
    """Return the function as an adapter of the harness, which calls it in cases of the loss's smoothing."""

    def call(*operands: Any, labels: Any, **options: Any) -> Any:
        del options  # the function has them
        return function(*operands, labels)

    made = TorchAdapter(call, device=device, name=loss.name, supports=frozenset(), linear=linear)
    if loss.ours:
        made.is_ours = True
        made.arithmetic = made.arithmetic_on(made.device_model)
    return made


def dense_arguments(case: Case, rows: int, device: str) -> tuple[Tensor, Tensor]:
    """Return the rows of a case, repeated up to so many."""
    times = rows // len(case.labels)
    logits = to_torch(as_dtype(case.logits, case.dtype)).to(device).repeat(times, 1)
    return logits.requires_grad_(), torch.from_numpy(case.labels).to(device).repeat(times)


def linear_arguments(shape: LinearShape, dtype: str, device: str) -> tuple[Tensor, ...]:
    """Return hidden, weight and labels."""
    return linear_torch.make_arguments(shape, device, getattr(torch, dtype))


def program(
    loss: Loss, function: Callable[..., Any], arguments: Sequence[Any], device: str, linear: bool, alone: bool = False
) -> Program:
    """Return the loss with its gradients, or alone; its memory is the most bytes that a call allocates at a time."""
    compute = linear_torch.loss_and_gradients if linear else dense_torch.loss_and_gradient

    def fresh() -> tuple[Any, ...]:
        if not loss.overwrites:
            return tuple(arguments)
        return (arguments[0].detach().clone().requires_grad_(), *arguments[1:])

    run = torch.no_grad()(function) if alone else partial(compute, function)
    case = TimedCase(loss.name, run, fresh, clock=dense_torch.clock_of(device))
    return Program(case, lambda: {"memory": dense_torch.peak_bytes(case, device)})


def spread(result: Any, repeated: int) -> tuple[float, list[NDArray[np.float64]]]:
    """Return the loss, and the least and the largest gradient of each of the rows that are repeated."""
    loss, gradient = result
    rows = gradient.detach().reshape(-1, repeated, gradient.shape[-1])
    return loss.item(), [of.double().cpu().numpy() for of in (rows.amin(0), rows.amax(0))]


def is_finite(result: Any) -> bool:
    """Return whether loss and gradients are finite numbers."""
    return all(bool(torch.isfinite(part).all()) for part in result)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether that is what an exception says."""
    return isinstance(error, torch.OutOfMemoryError)
