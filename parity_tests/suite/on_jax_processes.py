"""What `test_jax_processes.py` runs in each process of `jax.distributed`. It loads no torch."""

import os
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import lsce_jax
from parity_tests.losses.adapters import JaxAdapter, operands_of
from parity_tests.losses.sharded import AXIS, ShardedAdapter, class_axes_of, divided
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import AnyResult

loss_and_stats = lsce_jax.vocab_parallel_label_smoothed_cross_entropy_with_stats


def start(seconds: int, devices: int, number: int, of: int, folder: Path) -> None:
    """Join the other processes, which talk by gloo, with so many devices of the CPU each."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        _address(number, folder), of, number, initialization_timeout=seconds, heartbeat_timeout_seconds=seconds
    )


def _address(number: int, folder: Path) -> str:
    """Return the address of process 0, which the others wait for."""
    file, written = folder / "address", folder / "written"
    if number == 0:
        with socket.create_server(("localhost", 0)) as free:
            file.write_text(f"localhost:{free.getsockname()[1]}")
        written.touch()
    while not written.exists():
        time.sleep(0.02)
    return file.read_text()


def whole(array: Any) -> Any:
    """Return an array of which each process has a part."""
    return multihost_utils.process_allgather(array, tiled=True)


class OnProcesses(ShardedAdapter):
    """The vocab-parallel loss in shard_map, with its classes divided over the devices of all processes."""

    def result(self, case: Case, parts: dict[str, Any]) -> AnyResult:
        return super().result(case, {name: whole(part) for name, part in parts.items()})


class Placed(JaxAdapter):
    """The ordinary loss under jit, of arrays whose rows or classes are divided over the devices of all processes."""

    def __init__(self, what: str, linear: bool) -> None:
        super().__init__(linear=linear)
        self.mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
        self.what = what

    def step(self, case: Case) -> tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]:
        function, operands = super().step(case)
        leaves, others, upstream = operands
        axes = class_axes_of({**leaves, **others}, case.axis)
        if self.what == "rows":
            axes = dict.fromkeys(("logits", "hidden", "labels", "where"), 0)

        def placed(name: str, array: Any) -> Any:
            spec = jax.P(*[None] * axes[name], AXIS) if name in axes else jax.P()
            sharding, values = jax.NamedSharding(self.mesh, spec), np.asarray(array)
            # jax.device_put compares the arrays of all processes first, and takes NaN for a difference.
            return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

        named = [{name: placed(name, array) for name, array in each.items()} for each in (leaves, others)]
        return function, (*named, placed("upstream", upstream))

    def result(self, case: Case, parts: dict[str, Any]) -> AnyResult:
        return super().result(case, {name: whole(part) for name, part in parts.items()})


def in_shard_map(_: Any, case: Case, linear: bool) -> AnyResult:
    return OnProcesses(jax.device_count(), linear=linear)(case)


def under_jit(_: Any, case: Case, linear: bool, what: str) -> AnyResult:
    return Placed(what, linear)(case)


def statistics(_: Any, case: Case) -> dict[str, Any]:
    """Return the loss and the statistics."""
    arrays, options = operands_of(case)
    arrays.pop("upstream")
    loss, stats = jax.jit(partial(divided(loss_and_stats, jax.device_count()), **options))(**arrays)
    return {name: np.asarray(value) for name, value in {"loss": loss, **stats._asdict()}.items()}


def in_shard_map_or_exit(_: Any, case: Case, exits: bool) -> AnyResult:
    if exits:
        os._exit(3)
    return in_shard_map(None, case, False)


def checked_number_of_rows(_: Any, num_rows: int) -> None:
    """Compare the number of rows of all processes, as docs/scaling.md says."""
    multihost_utils.assert_equal(np.array(num_rows), "the number of rows differs")
