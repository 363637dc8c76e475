"""What an accurate exp would cost on TPUs that are not there: instruction bundles, as their compiler schedules them.

Needs libtpu, and its flags and environment set before the import: see `benchmarks.__main__.tpu_exp`.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.engines.tpu import compile_loss
from lsce_cost.bundles import count_bundles, schedules
from lsce_cost.devices import TOPOLOGIES

NAME = "lsce fused"
EXPONENTIALS = {
    "exp as it is": jnp.exp,
    "accuracy=HIGHEST": partial(jax.lax.exp, accuracy=jax.lax.AccuracyMode.HIGHEST),
}


class BundleCost(NamedTuple):
    """How many bundles loss and gradient take on one core."""

    topology: str
    name: str
    bundles: int


def measure(dump: Path) -> list[BundleCost]:
    """Compile the loss with either exp for each topology, and count the bundles that the compiler writes to `dump`."""
    costs = []
    for device, topology in TOPOLOGIES.items():
        for name, exp in EXPONENTIALS.items():
            before = set(dump.iterdir())
            jax.clear_caches()  # of traces with the other exp
            with mock.patch.object(jnp, "exp", exp):
                compile_loss(device, NAME)
            kernels = dict(schedules(set(dump.iterdir()) - before))
            if not kernels:
                raise ValueError(f"the compiler has written no schedule to {dump} for {topology}")
            costs.append(BundleCost(topology, name, sum(map(count_bundles, kernels.values()))))
    jax.clear_caches()
    return costs
