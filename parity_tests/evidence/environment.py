"""Versions, devices and flags that change arithmetic. Only frameworks that are already loaded are asked."""

import platform
import re
import sys
import warnings
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("lsce", "numpy", "jax", "jaxlib", "flax", "optax", "torch", "keras", "timm", "torchax", "libtpu")


def describe_environment() -> dict[str, Any]:
    """Return Python, platform, versions of `LIBRARIES`, and devices and flags of the loaded frameworks."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": installed_versions(LIBRARIES),
        "devices": _devices(),
        "flags": _flags(),
    }


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """Return what the system calls the processor: its model on Linux, elsewhere perhaps its architecture only."""
    with suppress(OSError):
        if found := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8")):
            return found[1]
    return platform.processor() or platform.machine()


def _devices() -> dict[str, list[str]]:
    devices: dict[str, list[str]] = {}
    if "jax" in sys.modules:
        devices["jax"] = [f"{device.platform}: {device.device_kind}" for device in sys.modules["jax"].devices()]
    if "torch" in sys.modules:
        cuda = sys.modules["torch"].cuda
        names = [cuda.get_device_name(i) for i in range(cuda.device_count())] if cuda.is_available() else []
        devices["torch"] = ["cpu", *(f"cuda: {name}" for name in names)]
    return devices


def _flags() -> dict[str, Any]:
    """Return the flags that claim a precision; `fingerprint` measures it."""
    flags: dict[str, Any] = {}
    if "jax" in sys.modules:
        config = sys.modules["jax"].config
        flags["jax_default_matmul_precision"] = config.jax_default_matmul_precision
        flags["jax_enable_x64"] = bool(config.jax_enable_x64)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch 2.9 warns about its own call
            flags["torch_float32_matmul_precision"] = torch.get_float32_matmul_precision()
        flags["torch_deterministic"] = torch.are_deterministic_algorithms_enabled()
        flags["torch_threads"] = torch.get_num_threads()
    return flags
