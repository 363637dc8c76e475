"""TPUs and GPUs that programs are compiled for without a device: compiler settings and limits of each.

One table for all users: this package and the harness compile for these devices, and the harness has torch.compile's
kernels made for the GPUs. The limits are what a device can do at most; no program reaches them.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

# What lets the TPU compiler do without a TPU, and beside another program that uses it.
TPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
# Of the process of a compiler, for each family of devices.
ENVIRONMENTS = {"tpu": TPU_ENVIRONMENT, "gpu": {"JAX_PLATFORMS": "cpu"}}
# The smallest topology of each TPU in `parity_tests.truth.devices`.
TOPOLOGIES = {
    "tpu-v4": "v4:2x2x1",
    "tpu-v5e": "v5e:2x2",
    "tpu-v5p": "v5p:2x2x1",
    "tpu-v6e": "v6e:2x2",
    "tpu-v7x": "tpu7x:2x2x1",
}

# Parts of what JAX and torch call each TPU, in small letters, of which the first that fits counts.
TPU_KINDS = {
    "tpu-v4": ("tpu v4",),
    "tpu-v5e": ("tpu v5 lite", "tpu v5e"),
    "tpu-v5p": ("tpu v5",),
    "tpu-v6e": ("tpu v6",),
    "tpu-v7x": ("tpu7", "tpu v7"),
}


class Card(NamedTuple):
    """What XLA, Inductor and Triton ask of a GPU.

    The minor number of each capability is 0. All have 64 KiB registers, 2048 threads and 1024 threads in a block for
    each core.
    """

    name: str
    capability: int
    extension: str
    cores: int
    units_of_core: int
    shared_of_core: int
    shared_of_block: int
    cache: int
    memory: int
    bandwidth: int  # bytes a second
    gigahertz: float

    def as_text(self) -> str:
        """Return the text of XLA's `GpuTargetConfigProto`."""
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 7 }}
            gpu_device_info {{
              cuda_compute_capability {{ major: {self.capability} feature_extension: {self.extension} }}
              core_count: {self.cores}
              fpus_per_core: {self.units_of_core}
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared_of_block}
              shared_memory_per_core: {self.shared_of_core}
              registers_per_block_limit: 65536
              registers_per_core_limit: 65536
              threads_per_warp: 32
              threads_per_block_limit: 1024
              threads_per_core_limit: 2048
              thread_dim_limit_x: 1024
              thread_dim_limit_y: 1024
              thread_dim_limit_z: 64
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              l2_cache_size: {self.cache}
              device_memory_size: {self.memory}
              memory_bandwidth: {self.bandwidth}
              clock_rate_ghz: {self.gigahertz}
              runtime_version: "12.8.0"
            }}
        """


# The numbers of the cards, as XLA's descriptions have them (xla/backends/gpu/target_config/specs, 2026-11-26).
CARDS = {
    "gpu-a100": Card(
        "NVIDIA A100-SXM4-80GB", 8, "NONE", 108, 64, 167936, 166912, 41943040, 85100068864, 2039040000000, 1.41
    ),
    "gpu-h100": Card(
        "NVIDIA H100 80GB HBM3",
        9,
        "ACCELERATED_FEATURES",
        132,
        128,
        233472,
        232448,
        52428800,
        84942979072,
        3352320000000,
        1.98,
    ),
    "gpu-b200": Card(
        "NVIDIA B200",
        10,
        "ACCELERATED_FEATURES",
        148,
        128,
        233472,
        232448,
        132644864,
        191514411008,
        7672320000000,
        1.965,
    ),
}


# --- Limits ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What one device, as JAX counts them, can do at most.

    Args:
        part: what such a device is.
        memory: bytes.
        bandwidth: of the memory, bytes a second.
        matrix: operations a second in matrix products, by the dtype of the operands. float32 is multiplied as JAX does
            by default: in one bfloat16 pass on TPUs, in TF32 on GPUs.
        links: bytes a second that the device can send to others of its slice or host, over all links together.
        clock: cycles a second of the units that execute bundles; None for GPUs.
        source: where the numbers are from.
        date: when they were read there.
    """

    part: str
    memory: int
    bandwidth: float
    matrix: Mapping[str, float]
    links: float
    clock: float | None
    source: str
    date: str


def _tpu(page: str, share: float, gibibytes: int, bandwidth: float, peak: float, links: float, cycle: int) -> Limits:
    """Return the limits of a TPU: a share of a chip, whose numbers follow as a page of Google's has them.

    The clock is not published. It is the peak divided by the operations in a cycle.
    """
    return Limits(
        part="chip" if share == 1 else "core, half of a chip",
        memory=int(share * gibibytes * 2**30),
        bandwidth=share * bandwidth,
        matrix=dict.fromkeys(("bfloat16", "float16", "float32"), share * peak),
        links=share * links / 2,
        clock=peak / cycle,
        source=f"docs.cloud.google.com/tpu/docs/{page}",
        date="2026-11-26",
    )


def _gpu(name: str, narrow: float, tf32: float, float64: float, nvlink: float, source: str) -> Limits:
    card = CARDS[name]
    return Limits(
        part="GPU",
        memory=card.memory,
        bandwidth=float(card.bandwidth),
        matrix={"bfloat16": narrow, "float16": narrow, "float32": tf32, "float64": float64},
        links=nvlink / 2,
        clock=None,
        source=source,
        date="2026-11-27",
    )


_QUOTED = "quoted by glennklockwood.com/garden/processors"
# Operations in a cycle of a chip: a core has 4 units of 128 x 128 multipliers, or of 256 x 256 from v6e on.
_SMALL, _LARGE = 4 * 2 * 128**2, 4 * 2 * 256**2
LIMITS = {
    # Links are published in both directions together, per chip; of a v4 only the bandwidth of the bisection of 4096
    # chips, 24 TB/s through 512 links, of which each chip has 6.
    "tpu-v4": _tpu("v4", 0.5, 32, 1200e9, 275e12, 6 * 2 * 24e12 / 512, 2 * _SMALL),
    "tpu-v5e": _tpu("v5e", 1, 16, 819e9, 197e12, 400e9, _SMALL),
    "tpu-v5p": _tpu("tpu7x", 1, 95, 2765e9, 459e12, 1200e9, 2 * _SMALL),
    "tpu-v6e": _tpu("tpu7x", 1, 32, 1638e9, 918e12, 800e9, _LARGE),
    "tpu-v7x": _tpu("tpu7x", 0.5, 192, 7380e9, 2307e12, 1200e9, 2 * _LARGE),
    # Matrix products of dense operands, tensor cores; memory and bandwidth as XLA has them.
    # NVIDIA's datasheets were not at hand when these were checked, only what others quote of them.
    "gpu-a100": _gpu("gpu-a100", 312e12, 156e12, 19.5e12, 600e9, f"NVIDIA A100 datasheet, {_QUOTED}/A100"),
    "gpu-h100": _gpu("gpu-h100", 989.4e12, 494.7e12, 66.9e12, 900e9, f"NVIDIA H100 architecture, {_QUOTED}/h100"),
    # Of the B200 that page rounds float32 to 1100 TFLOP/s; here it is half of bfloat16. It has 40 for float64, others
    # have 35: for 37 no source was found.
    "gpu-b200": _gpu(
        "gpu-b200", 2250e12, 1125e12, 37e12, 1800e9, f"NVIDIA Blackwell brief, {_QUOTED}/B200; float64 has no source"
    ),
}


# --- Compilers ------------------------------------------------------------------------------------------------------


def has_libtpu() -> bool:
    """Return whether libtpu is installed, which has the compiler for TPUs."""
    return _is_installed("libtpu")


def has_cuda_plugin() -> bool:
    """Return whether JAX's plugin for CUDA is installed, which has XLA's compiler for GPUs."""
    return any(_is_installed(f"jax_plugins.xla_cuda{version}") for version in (12, 13))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # its package is not there, or sys.modules says that it is not
        return False
