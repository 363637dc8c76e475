"""The least time that a device needs for a program, by its limits: an estimate, and no measurement."""

from collections.abc import Mapping
from typing import NamedTuple

from lsce_cost.devices import Limits


class Roofline(NamedTuple):
    """The least time, in seconds.

    Args:
        seconds: the longest of the parts of one device, and the time of the links after it.
        bound: the part that takes longest: "memory", "matrix" or "bundles".
        memory: bytes of the device's memory by its bandwidth.
        matrix: operations of matrix products by the peak for their dtype.
        bundles: instruction bundles by the clock; None where either is not known.
        links: bytes that a device sends to others by the bandwidth of its links.
    """

    seconds: float
    bound: str
    memory: float
    matrix: float
    bundles: float | None
    links: float


def roofline(
    limits: Limits, hbm_bytes: float, matrix: Mapping[str, float], bundles: int | None = None, sent_bytes: float = 0.0
) -> Roofline:
    """Return the least time of a program.

    Args:
        limits: of the device.
        hbm_bytes: bytes read from and written to the device's memory.
        matrix: operations of matrix products, by the dtype of the operands.
        bundles: instruction bundles of one core.
        sent_bytes: bytes that the device sends to others.

    Raises:
        KeyError: a dtype whose peak is not known.

    Example: a gigabyte and no product on a device that reads a gigabyte in a second.
        >>> limits = Limits("chip", 2**34, 1e9, {"bfloat16": 1e12}, 1e8, None, "", "")
        >>> roofline(limits, 1e9, {}).seconds
        1.0
        >>> roofline(limits, 1e9, {"bfloat16": 3e12}, sent_bytes=1e8)[:2]
        (4.0, 'matrix')
    """
    parts = {
        "memory": hbm_bytes / limits.bandwidth,
        "matrix": sum(operations / limits.matrix[dtype] for dtype, operations in matrix.items()),
    }
    if bundles is not None and limits.clock is not None:
        parts["bundles"] = bundles / limits.clock
    links = sent_bytes / limits.links
    bound = max(parts, key=lambda name: parts[name])
    return Roofline(parts[bound] + links, bound, parts["memory"], parts["matrix"], parts.get("bundles"), links)
