"""Choices that depend on the device of a tensor: accelerators start each operation slowly, and CPUs do not."""

import torch
from torch import Tensor


def is_on_cpu(tensor: Tensor) -> bool:
    """Return whether a tensor is in the memory of a CPU."""
    return device_type(tensor) == "cpu"


def takes_plain_operations(tensor: Tensor) -> bool:
    """Return whether a compiler makes one program of all operations on a tensor, and fuses them: on a TPU.

    There operations in place and outputs in given memory move the logits more often than plain ones.
    """
    return device_type(tensor) in {"tpu", "xla"}


def device_type(tensor: Tensor) -> str:
    """Return the type of a tensor's device, such as "cpu". `lsce-parity --device-model` puts another in its place."""
    return tensor.device.type


def may_wait(tensor: Tensor) -> bool:
    """Return whether to wait for a GPU is possible, and neither forbidden nor watched by the caller."""
    if not tensor.is_cuda:
        return True
    return not torch.cuda.is_current_stream_capturing() and not torch.cuda.get_sync_debug_mode()
