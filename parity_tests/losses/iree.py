"""Programs that JAX makes for a TPU or a GPU, compiled by IREE and run on the CPU.

IREE is a compiler of StableHLO that shares no code with XLA: its fusion and its order of operations are its own, and so
are exp, log1p and tanh. Its target "llvm-cpu" makes machine code, "vmvx" code for IREE's own interpreter, and
"vulkan-spirv" code for GPUs: workgroups, memory that they share, and sums within subgroups. Lavapipe, the Vulkan driver
of Mesa for CPUs, runs that code.
"""

import re
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsce_spec.extras import install
from parity_tests.losses.adapters import UnavailableError
from parity_tests.losses.interpreted import InterpretedAdapter
from parity_tests.truth.cases import Case, LinearCase

# By the ending of the adapter's name.
TARGETS = {"iree-cpu": "llvm-cpu", "iree-vm": "vmvx", "iree-vulkan": "vulkan-spirv"}
# Without these IREE computes float64 in float32.
_FLAGS = ("--iree-input-demote-f64-to-f32=false", "--iree-input-demote-i64-to-i32=false")
# To say that IREE compiles for this CPU, and not for any.
_TARGET_FLAGS = {"llvm-cpu": ("--iree-llvmcpu-target-cpu=host",)}
# The cards for which IREE 3.13 makes code, with its target, which is also JAX's name of the platform, and the flag.
CARDS = {
    "gfx90a": ("rocm", "--iree-rocm-target=gfx90a"),
    "gfx942": ("rocm", "--iree-rocm-target=gfx942"),
    "sm_80": ("cuda", "--iree-cuda-target=sm_80"),
    "sm_89": ("cuda", "--iree-cuda-target=sm_89"),
}
LAVAPIPE = "llvmpipe"
NO_LAVAPIPE = (
    "lavapipe, Mesa's Vulkan driver for CPUs, is not installed. Run: apt-get install libvulkan1 mesa-vulkan-drivers"
)
# What lavapipe says of itself (vulkaninfo, Mesa 25.0, 256 bits wide). IREE knows no such target. Its default one stores
# 32 bits only, and loses the last of six booleans; other targets have subgroups and memory that lavapipe has not.
_LAVAPIPE_TARGET = """\
#hal.device.target<"vulkan", [#hal.executable.target<"vulkan-spirv", "vulkan-spirv-fb", {iree_codegen.target_info =
#iree_gpu.target<arch = "lavapipe", features = "spirv:v1.6,cap:Shader", wgp = <
compute = fp64|fp32|fp16|int64|int32|int16|int8, storage = b64|b32|b16|b8, subgroup = shuffle|arithmetic,
subgroup_size_choices = [8], max_workgroup_sizes = [1024, 1024, 1024], max_thread_count_per_workgroup = 1024,
max_workgroup_memory_bytes = 32768, max_workgroup_counts = [65535, 65535, 65535]>>}>]> : !hal.device"""


class IreeAdapter(InterpretedAdapter):
    """An `InterpretedAdapter` whose program IREE compiles.

    Args:
        platform: the platform that JAX makes the program for.
        target: "llvm-cpu", "vmvx" or "vulkan-spirv".
        options: as in `JaxAdapter`.

    Raises:
        UnavailableError: JAX or IREE is not there, or for "vulkan-spirv" lavapipe.
    """

    def __init__(self, platform: str, target: str, **options: Any) -> None:
        """Load IREE."""
        super().__init__(platform, **options)
        require()
        if target == "vulkan-spirv":
            _lavapipe()
        self.target = target

    def unsupported(self, case: Case) -> str | None:
        """Return why IREE cannot handle a case, or None."""
        return super().unsupported(case) or why_not(case, self.target)

    def evaluate(self, module: str, operands: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """Return the results of a StableHLO module."""
        if self.target == "vulkan-spirv":
            return _on_lavapipe(_for_lavapipe(module), operands)
        return evaluate(module, operands, self.target)

    def compile_for(self, card: str, case: Case) -> bytes:
        """Return the program of a case as code of one of the `CARDS`, in IREE's container: ELF for AMD's, else PTX."""
        target, flag = CARDS[card]
        return _compile(self.module(case)[0], flag, target_backends=[target])


def require() -> None:
    """Load IREE.

    Raises:
        UnavailableError: it is not there.
    """
    _load("iree.compiler")
    _load("iree.runtime")


def evaluate(module: str, operands: list[NDArray[Any]], target: str) -> list[NDArray[Any]]:
    """Return the results of a StableHLO module, compiled for "llvm-cpu" or "vmvx"."""
    context, name = _loaded(_compiled(module, target), _config())
    results = context.modules[name]["main"](*operands)
    return [np.asarray(result) for result in (results if isinstance(results, list | tuple) else [results])]


def why_not(case: Case, target: str) -> str | None:
    """Return why IREE 3.13 cannot handle a case, or None."""
    if target == "vmvx" and case.dtype in ("float64", "float16"):
        return f"is in {case.dtype}, which IREE's interpreter does not have"
    if target == "vulkan-spirv" and (reason := _why_not_on_vulkan(case)):
        return reason
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


def _why_not_on_vulkan(case: Case) -> str | None:
    if case.dtype == "float64":
        return "is in float64, for which SPIR-V has no exp"
    if isinstance(case, LinearCase) and case.where is not None and case.options.get("reduction", "none") == "none":
        return "leaves rows out of a linear layer without a reduction, for which IREE returns a buffer with no memory"
    return None


def _compiled(module: str, target: str) -> bytes:
    return _compile(module, *_TARGET_FLAGS.get(target, ()), target_backends=[target])


def _for_lavapipe(module: str) -> bytes:
    """Return the program for the target that the module itself names."""
    named, count = re.subn(
        " attributes {", f" attributes {{hal.device.targets = [{_LAVAPIPE_TARGET}], ", module, count=1
    )
    assert count, "jax.export gives each module attributes"
    return _compile(named)


def _compile(module: str, *flags: str, **options: Any) -> bytes:
    """Return what the command `iree-compile` makes of a module; it runs in a process of its own."""
    compiler = _load("iree.compiler")
    binary: bytes = compiler.compile_str(module, input_type="stablehlo", extra_args=[*_FLAGS, *flags], **options)
    return binary


def _loaded(binary: bytes, config: Any) -> tuple[Any, str]:
    """Return a context with a program, and the program's name in it."""
    runtime = _load("iree.runtime")
    context = runtime.SystemContext(config=config)
    loaded = runtime.VmModule.copy_buffer(context.instance, binary)
    context.add_vm_module(loaded)
    return context, loaded.name


def _on_lavapipe(binary: bytes, operands: list[NDArray[Any]]) -> list[NDArray[Any]]:
    runtime, config = _load("iree.runtime"), _lavapipe()
    context, name = _loaded(binary, config)
    function = context.modules[name].vm_module.lookup_function("main")
    given, results = runtime.VmVariantList(len(operands)), runtime.VmVariantList(1)
    for operand in operands:
        given.push_ref(runtime.asdevicearray(config.device, operand)._buffer_view)
    context.vm_context.invoke(function, given, results)
    views = [results.get_as_object(i, runtime.HalBufferView) for i in range(len(results))]
    return [_copied(runtime, config.device, view) for view in views]


def _copied(runtime: Any, device: Any, view: Any) -> NDArray[Any]:
    """Return what a buffer of the device holds.

    `DeviceArray.to_host` lets the driver write into NumPy's memory, which has to be aligned to 4096 bytes for it.
    """
    dtype = runtime.HalElementType.map_to_dtype(view.element_type)
    if 0 in view.shape:
        return np.empty(view.shape, dtype)
    source = view.get_buffer()
    staging = device.allocator.allocate_buffer(
        memory_type=int(runtime.MemoryType.HOST_LOCAL | runtime.MemoryType.DEVICE_VISIBLE),
        allowed_usage=int(runtime.BufferUsage.TRANSFER_TARGET | runtime.BufferUsage.MAPPING_SCOPED),
        allocation_size=source.byte_length(),
    )
    done = device.create_semaphore(0)
    before, after = runtime.HalFence.create_at(done, 0), runtime.HalFence.create_at(done, 1)
    device.queue_copy(source, staging, wait_semaphores=before, signal_semaphores=after)
    after.wait()
    return np.array(staging.map().asarray(view.shape, dtype))


@lru_cache(maxsize=1)
def _config() -> Any:
    return _load("iree.runtime").Config("local-sync")


@lru_cache(maxsize=1)
def _lavapipe() -> Any:
    """Return IREE's configuration for lavapipe, whatever other Vulkan devices there are.

    Raises:
        UnavailableError: it is not there.
    """
    runtime = _load("iree.runtime")
    try:
        driver = runtime.get_driver("vulkan")
        devices = driver.query_available_devices()
    except (RuntimeError, ValueError) as error:  # no libvulkan, or no driver
        raise UnavailableError(NO_LAVAPIPE) from error
    for device in devices:
        if LAVAPIPE in device["name"]:
            return runtime.Config(device=driver.create_device(device["device_id"]))
    raise UnavailableError(NO_LAVAPIPE)


def _load(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        message = f"IREE is not installed. Run: {install('devices')}"
        raise UnavailableError(message) from error
