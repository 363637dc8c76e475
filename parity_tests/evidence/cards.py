"""The devices of this machine, as the frameworks find them. A framework is loaded when it is asked, not before."""

import importlib
from typing import Any


class AbsentError(Exception):
    """A framework or a device is not on this machine."""


def find_device(framework: str, device: str) -> str:
    """Return the name of the card that a framework finds; empty for the CPU.

    Raises:
        AbsentError: the framework is not installed, or finds no such device.
    """
    module = load_framework(framework)
    card = ""
    if framework == "jax":
        try:
            card = module.devices(device)[0].device_kind
        except RuntimeError as error:
            cause = str(error).partition("\n")[0]
            raise AbsentError(f"jax finds no {device} device: {cause}") from error
    elif device == "cuda" and module.cuda.is_available():
        card = module.cuda.get_device_name()
    elif device == "tpu" and hasattr(module, "tpu") and module.tpu.is_available():  # which torch_tpu brings
        card = module.tpu.get_device_name()
    elif device != "cpu":
        raise AbsentError(f"torch finds no {device} device")
    return "" if device == "cpu" else card


def load_framework(framework: str) -> Any:
    """Return the module of a framework.

    Raises:
        AbsentError: it is not installed.
    """
    try:
        return importlib.import_module(framework)
    except ModuleNotFoundError as error:
        # A broken installation is no reason to skip.
        if error.name != framework:
            raise
        raise AbsentError(f"{framework} is not installed") from error
