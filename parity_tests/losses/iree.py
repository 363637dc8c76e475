"""Programs that JAX makes for a TPU or a GPU, compiled by IREE and run on the CPU.

IREE is a compiler of StableHLO that shares no code with XLA: its fusion and its order of operations are its own, and so
are exp, log1p and tanh. Its target "llvm-cpu" makes machine code, "vmvx" code for IREE's own interpreter.
"""

from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity_tests.losses.adapters import UnavailableError
from parity_tests.losses.interpreted import InterpretedAdapter
from parity_tests.truth.cases import Case

# By the ending of the adapter's name.
TARGETS = {"iree-cpu": "llvm-cpu", "iree-vm": "vmvx"}
# Without these IREE computes float64 in float32.
_FLAGS = ("--iree-input-demote-f64-to-f32=false", "--iree-input-demote-i64-to-i32=false")
# To say that IREE compiles for this CPU, and not for any.
_TARGET_FLAGS = {"llvm-cpu": ("--iree-llvmcpu-target-cpu=host",)}


class IreeAdapter(InterpretedAdapter):
    """An `InterpretedAdapter` whose program IREE compiles.

    Args:
        platform: the platform that JAX makes the program for.
        target: "llvm-cpu" or "vmvx".
        options: as in `JaxAdapter`.

    Raises:
        UnavailableError: JAX or IREE is not there.
    """

    def __init__(self, platform: str, target: str, **options: Any) -> None:
        """Load IREE."""
        super().__init__(platform, **options)
        _load("iree.compiler")
        _load("iree.runtime")
        self.target = target

    def unsupported(self, case: Case) -> str | None:
        """Return why IREE cannot handle a case, or None."""
        return super().unsupported(case) or _why_not(case, self.target)

    def evaluate(self, module: str, operands: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """Return the results of a StableHLO module."""
        runtime = _load("iree.runtime")
        context = runtime.SystemContext(config=_config())
        loaded = runtime.VmModule.copy_buffer(context.instance, _compiled(module, self.target))
        context.add_vm_module(loaded)
        results = context.modules[loaded.name]["main"](*operands)
        return [np.asarray(result) for result in (results if isinstance(results, list | tuple) else [results])]


def _why_not(case: Case, target: str) -> str | None:
    """Return why IREE 3.13 cannot handle a case, or None."""
    if target == "vmvx" and case.dtype in ("float64", "float16"):
        return f"is in {case.dtype}, which IREE's interpreter does not have"
    if case.dtype == "float64" and "softcap" in case.options:
        return "has a softcap in float64, and IREE links no tanh for it"
    if case.axis not in (0, -1) and case.dtype in ("bfloat16", "float16"):
        return "has narrow logits whose classes are in the middle, which IREE cannot lower"
    is_outside = case.labels.dtype.kind != "f" and np.any((case.labels < 0) | (case.labels >= case.num_classes))
    vectors = (case.class_mask, case.class_weight, case.prior)
    if is_outside and any(vector is not None for vector in vectors):
        # StableHLO clamps indices of a gather.
        return "has labels that are no class, at which IREE reads outside of a vector over the classes"
    return None


def _compiled(module: str, target: str) -> bytes:
    flags = [*_FLAGS, *_TARGET_FLAGS.get(target, ())]
    binary: bytes = _load("iree.compiler").compile_str(
        module, target_backends=[target], input_type="stablehlo", extra_args=flags
    )
    return binary


@lru_cache(maxsize=1)
def _config() -> Any:
    return _load("iree.runtime").Config("local-sync")


def _load(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        message = "IREE is not installed. Run: pip install 'lsce[devices]', or make install-devices"
        raise UnavailableError(message) from error
