"""The arithmetic of devices, as far as it is published or measured: one row for each framework and generation.

`lsce-parity fingerprint` measures the same numbers on a device that is there, and says which rows they fit.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lsce_cost.devices import TPU_KINDS
from parity_tests.texts import with_nearest
from parity_tests.truth.arithmetic import ERRORS, FULL, Arithmetic, any_order, tree_depth

BFLOAT16, TF32 = 8, 11  # significant bits
# Error of the packages' own log1p: 2.2 at most, which parity_tests/meta/test_simulation.py measures.
OWN_LOG1P = 4.0


@dataclass(frozen=True)
class Device:
    """A row of the table.

    Args:
        name: of the device; "gpu-h100" or "tpu-v5e".
        family: what the framework calls such devices: "cpu", "cuda" or "tpu".
        frameworks: to which the row applies.
        kinds: parts of the name of the device, as the framework says it; in lower case. None for every name.
        arithmetic: the errors, the larger of those in float32 and in float64.
        flushes: whether float32 numbers below the smallest normal one become 0; None if it is not known.
        source: where the numbers are from.
        date: when that was last changed or measured.
    """

    name: str
    family: str
    frameworks: tuple[str, ...]
    kinds: tuple[str, ...] | None
    arithmetic: Arithmetic
    flushes: bool | None
    source: str
    date: str

    def as_code(self) -> str:
        """Return the row as it stands in this file."""
        numbers = ", ".join(f"{name}={getattr(self.arithmetic, name):g}" for name in (*ERRORS, "matmul_bits"))
        arithmetic = f"Arithmetic({numbers}, depth={self.arithmetic.depth.__name__})"
        others = ", ".join(map(repr, (self.name, self.family, self.frameworks, self.kinds)))
        return f"Device({others}, {arithmetic}, {self.flushes}, {self.source!r}, {self.date!r}),"


def _published(exp: float, log: float, log1p: float, tanh: float, reciprocal: float, matmul_bits: int) -> Arithmetic:
    """Return errors that are published in units in the last place, which are up to two units of the roundoff.

    A quotient is taken as a product with the reciprocal, which rounds once more. The order of sums is not published.
    """
    return Arithmetic(
        exp=2 * exp,
        log=2 * log,
        log1p=2 * log1p,
        tanh=2 * tanh,
        division=2 * reciprocal + (reciprocal > 0.5),
        matmul_bits=matmul_bits,
        depth=any_order,
    )


_MEASURED = "lsce-parity fingerprint and parity_tests/meta/test_bounds.py, AMD and Intel"
# Worst errors over all float32 numbers, and over samples of float64. Matrix products: jax docs/201/precision.
_JAX = "jax docs/accuracy.md"
# Worst differences from the correctly rounded result, to which its own half of a unit is added here. Matrix products:
# torch.set_float32_matmul_precision, whose default is "highest".
_CUDA = "CUDA C++ Programming Guide, standard functions, tables 17 and 18"
_XLA_GPU = _published(exp=2.0, log=1.5, log1p=1.5, tanh=5.5, reciprocal=1.0, matmul_bits=TF32)
# Quotients are rounded correctly, but those by a Python number are products with its reciprocal
# (aten/src/ATen/native/cuda/BinaryDivTrueKernel.cu).
_TORCH_GPU = replace(_published(2.5, 1.5, 1.5, 2.5, reciprocal=0.5, matmul_bits=FULL), division=2.0)


def _gpu(name: str, *kinds: str, of_jax: str) -> tuple[Device, Device]:
    return (
        Device(name, "cuda", ("jax",), kinds, _XLA_GPU, None, of_jax, "2026-09-18"),
        Device(name, "cuda", ("torch",), kinds, _TORCH_GPU, False, _CUDA, "2026-11-26"),
    )


def _tpu(name: str, *kinds: str, arithmetic: Arithmetic) -> Device:
    # torch reaches a TPU through XLA as well.
    return Device(name, "tpu", ("jax", "torch"), kinds, arithmetic, True, _JAX, "2026-09-18")


_TPU_V2_TO_V5E = _published(exp=116, log=4030.5, log1p=4034, tanh=1365.5, reciprocal=198, matmul_bits=BFLOAT16)
# log1p: the page now has 63, 3 and 3. What libtpu 0.0.42 (of jax 0.10.2) compiles is in an earlier version of it, with
# the same date of review: 2082.5, 2049 and 2049. The bounds hold for both.
_TPU_V5P = _published(exp=109.5, log=62, log1p=2082.5, tanh=92, reciprocal=40, matmul_bits=BFLOAT16)
_TPU_V6E = _published(exp=64.5, log=2.5, log1p=2049, tanh=1.5, reciprocal=1.5, matmul_bits=BFLOAT16)
_TPU_V7X = _published(exp=65, log=2.5, log1p=2049, tanh=1.5, reciprocal=1.5, matmul_bits=BFLOAT16)

DEVICES: tuple[Device, ...] = (
    # XLA's expansions of exp, log1p and tanh for CPUs, measured up to 1.9, 3.2 and 3.6 where a loss uses them. Over all
    # numbers, jax docs/accuracy.md has 3, 6 and 10.
    Device("cpu", "cpu", ("jax",), None, Arithmetic(), True, _MEASURED, "2026-11-26"),
    # SLEEF and libm, measured up to 1.2; exp within softmax up to 2.6.
    Device("cpu", "cpu", ("torch",), None, Arithmetic(log=2.0, log1p=2.0, tanh=2.0), False, _MEASURED, "2026-11-26"),
    *_gpu("gpu-a100", "a100", of_jax=f"{_JAX}, for H100 and B200"),
    *_gpu("gpu-h100", "h100", "h200", of_jax=_JAX),
    *_gpu("gpu-b200", "b200", of_jax=_JAX),
    _tpu("tpu-v4", *TPU_KINDS["tpu-v4"], arithmetic=_TPU_V2_TO_V5E),
    _tpu("tpu-v5e", *TPU_KINDS["tpu-v5e"], arithmetic=_TPU_V2_TO_V5E),
    _tpu("tpu-v5p", *TPU_KINDS["tpu-v5p"], arithmetic=_TPU_V5P),
    _tpu("tpu-v6e", *TPU_KINDS["tpu-v6e"], arithmetic=_TPU_V6E),
    _tpu("tpu-v7x", *TPU_KINDS["tpu-v7x"], arithmetic=_TPU_V7X),
)


def device_of_kind(framework: str, family: str, kind: str) -> Device:
    """Return the row of a device that is there.

    Args:
        framework: "jax" or "torch".
        family: "cpu", "cuda" or "tpu".
        kind: the device's name as the framework says it, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3".

    Returns:
        Its row. For a device that the table does not have, a row of the family's largest errors, named after the kind.
    """
    rows = [device for device in _of(framework) if device.family == family]
    for device in rows:
        if device.kinds is None or any(part in kind.lower() for part in device.kinds):
            return device
    loosest = loosest_of(device.arithmetic for device in rows)
    return Device(kind, family, (framework,), (kind.lower(),), loosest, None, f"the largest errors of {family}", "")


def arithmetic_of(name: str, *, own: bool = False) -> Arithmetic:
    """Return the arithmetic of a device through any framework: the largest of each error.

    Args:
        name: of the device.
        own: whether for the losses of the packages; see `of_own_losses`.

    Raises:
        ValueError: the table has no such device.
    """
    rows = _called(name)
    return loosest_of(of_own_losses(row.arithmetic, row.family) if own else row.arithmetic for row in rows)


def of_own_losses(arithmetic: Arithmetic, family: str) -> Arithmetic:
    """Return what the losses of `lsce_jax` and `lsce_torch` make of the arithmetic of a device.

    On a TPU, whose logarithm is rough, they compute log1p themselves.
    """
    return replace(arithmetic, log1p=min(arithmetic.log1p, OWN_LOG1P)) if family == "tpu" else arithmetic


def device_of_name(name: str, framework: str) -> Device:
    """Return the row of a device through a framework; for "numpy", which no device has, that of JAX.

    Raises:
        ValueError: the table has no such device.
    """
    rows = {each: device for device in _called(name) for each in device.frameworks}
    return rows.get(framework, rows["jax"])


def _called(name: str) -> list[Device]:
    rows = [device for device in DEVICES if device.name == name]
    if not rows:
        known = [device.name for device in DEVICES]
        raise ValueError(with_nearest(f"there is no device {name!r}", name, known, "devices"))
    return rows


def loosest_of(rows: Iterable[Arithmetic]) -> Arithmetic:
    """Return the largest of each error, the fewest bits, and the deepest sums."""
    them = list(rows)
    errors = {name: max(getattr(each, name) for each in them) for name in ERRORS}
    bits = min(each.matmul_bits for each in them)
    depth = any_order if any(each.depth is any_order for each in them) else tree_depth
    return Arithmetic(**errors, matmul_bits=bits, depth=depth)


def _of(framework: str) -> list[Device]:
    return [device for device in DEVICES if framework in device.frameworks]
