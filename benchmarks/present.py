"""Is there a GPU or TPU on this machine? Needs nothing installed, so that `make bench-cuda` says no before installing.

python -m benchmarks.present cuda     # exit code 0, or 2 and one line that says what is missing
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Google's number on a PCI bus, and those of its TPUs: v2 and v3, v4, v5p, v5e, v6e, v7x. Network cards have others.
GOOGLE = "0x1ae0"
TPUS = frozenset({"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"})


def missing_gpu(root: Path = Path("/")) -> str | None:
    """Return what is missing for a GPU of NVIDIA or AMD, or None."""
    if any((root / place).exists() for place in ("dev/nvidia0", "dev/kfd", "dev/dxg")):
        return None
    if shutil.which("nvidia-smi") is None:
        return "no GPU: neither /dev/nvidia0 (NVIDIA), /dev/kfd (AMD) nor nvidia-smi is on this machine"
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    if listed.returncode == 0 and "GPU" in listed.stdout:
        return None
    return f"no GPU: nvidia-smi lists none ({(listed.stdout + listed.stderr).strip() or 'no output'})"


def missing_tpu(root: Path = Path("/")) -> str | None:
    """Return what is missing for a TPU, or None."""
    if any(root.glob("dev/accel[0-9]*")):
        return None
    for vendor in root.glob("sys/bus/pci/devices/*/vendor"):
        if vendor.read_text().strip() == GOOGLE and vendor.with_name("device").read_text().strip() in TPUS:
            return None
    return "no TPU: neither /dev/accel0 nor a TPU on the PCI bus is on this machine"


MISSING: dict[str, Callable[[], str | None]] = {"cuda": missing_gpu, "tpu": missing_tpu}


def main() -> int:
    """Print what is missing for the device that is named, if anything; return the exit code."""
    reason = MISSING[sys.argv[1]]()
    if reason is not None:
        print(reason, file=sys.stderr)
    return 2 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
