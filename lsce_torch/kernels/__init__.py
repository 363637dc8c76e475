"""The kernels for GPUs, and the choice between them and `fused.py`.

They are written in Triton (`gpu.py`) and started by `launch.py`: behind the sweeps of the fused loss, where every
transform of torch finds them, and by `whole.py`, which computes a whole loss in as few launches as possible.

Without an `implementation` they compute what is on a CUDA device, NVIDIA's or AMD's. In torch.compile they compute the
linear loss only: the compiler's own kernels of the dense loss read and write the logits as often. With
TRITON_INTERPRET=1 in the environment, implementation="triton" runs them on a CPU, in Triton's interpreter.
"""

import importlib.util
import logging
import os
from functools import cache
from typing import get_args

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

import lsce_spec
from lsce_torch import device
from lsce_torch.errors import error
from lsce_torch.keywords import Kernel

NAME: Kernel = get_args(Kernel)[0]
# What a caller may choose.
IMPLEMENTATIONS = (*lsce_spec.IMPLEMENTATIONS, NAME)
LINEAR_IMPLEMENTATIONS = (*lsce_spec.LINEAR_IMPLEMENTATIONS, NAME)
NOT_CUDA = "the logits are not on a CUDA device"
# The kernels are compiled in the tests for this compute capability and newer ones.
_LEAST_CAPABILITY = (8, 0)

_logger = logging.getLogger("lsce_torch")


def may_compute(implementation: str | None, tensor: Tensor) -> bool:
    """Return whether the kernels are asked for, or left to choose for a tensor of a GPU."""
    return why_not_asked(implementation, tensor) is None


def why_not_asked(implementation: str | None, tensor: Tensor) -> str | None:
    """Return why the kernels are neither asked for, nor left to choose for a tensor of a GPU, or None."""
    if implementation == NAME or (implementation is None and device.device_type(tensor) == "cuda"):
        return None
    return NOT_CUDA if implementation is None else "another implementation was asked for"


def reason_against(logits: Tensor) -> str | None:
    """Return why the kernels cannot compute anything of these logits, or None."""
    if isinstance(logits, FakeTensor) or logits.is_meta:
        return "the logits hold no values"
    if not _is_installed():
        return "Triton is not installed"
    if is_interpreted():
        return None
    if not logits.is_cuda:
        return (
            f"the logits are on the device {str(logits.device)!r}. Move them to a CUDA device, or, to run the kernels "
            "on a CPU, set TRITON_INTERPRET=1 in the environment before Triton is loaded"
        )
    if torch.version.hip is None and torch.cuda.get_device_capability(logits.device) < _LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(logits.device)} is older than the GPUs that they are compiled for"
    return _failure_on(logits.device.index)


def check_choice(implementation: str | None, logits: Tensor, reason_for_reference: str | None, instead: str) -> None:
    """Raise if the kernels are asked for and cannot compute a call; log what is chosen.

    Args:
        implementation: as the caller gave it.
        logits: of the call.
        reason_for_reference: why only the reference can compute it, or None.
        instead: name of the implementation without kernels.

    Raises:
        ValueError: the kernels are asked for and cannot compute it.
    """
    if torch.compiler.is_compiling():
        if implementation == NAME:
            raise error("kernel", name=repr(NAME), reason="torch.compile chooses itself", instead=repr(instead))
        return
    if not may_compute(implementation, logits):
        return
    reason = reason_for_reference or reason_against(logits)
    if reason is not None and implementation == NAME:
        raise error("kernel", name=repr(NAME), reason=reason, instead=repr(instead))
    if _logger.isEnabledFor(logging.DEBUG):
        chosen = NAME if reason is None else f"not {NAME}: {reason}"
        _logger.debug("implementation of logits of shape %s: %s", tuple(logits.shape), chosen)


@cache
def _failure_on(index: int) -> str | None:
    """Return why no kernel can be started on a GPU, as where there is no C compiler, or None."""
    from lsce_torch.kernels import launch  # noqa: PLC0415 - it needs this module

    try:
        launch.total(torch.zeros(1, device=f"cuda:{index}"), None)
    except Exception as problem:
        # Whatever it is, the loss has another way.
        reason = f"Triton starts no kernel on the device cuda:{index}: {problem}"
        _logger.warning("label_smoothed_cross_entropy does without its kernels. %s", reason)
        return reason
    return None


@cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def is_interpreted() -> bool:
    """Return whether Triton runs its kernels on the CPU, as it has found the environment when it was loaded."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
