"""The vocab-parallel losses of both packages as adapters of the command line, with processes of their own.

JAX fixes the number of its devices when it starts, so a process is started whose CPU counts as several. torch has one
process for each shard of the classes, and gloo between them.
"""

import importlib
from functools import cache, partial
from pathlib import Path
from typing import Any

from parity_tests.losses.adapters import Adapter, JaxAdapter, UnavailableError
from parity_tests.losses.sharded import ShardedAdapter, arithmetic_on
from parity_tests.losses.sharded_torch import PROCESSES, ShardedTorchAdapter
from parity_tests.losses.workers import Workers
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import AnyResult

# By framework: the number of shards unless another is asked for, the largest one, and what they are on.
SHARDS = {"jax": (4, 8, "virtual devices on the CPU"), "torch": (3, PROCESSES, "processes by gloo on the CPU")}
# Of torch's classes: shards of one class, and one of all others.
DIVISION = "one class, and the rest"


class DividedAdapter:
    """A loss with its classes divided over devices of JAX, or over processes of torch.

    Args:
        framework: "jax" or "torch".
        name: name in reports.
        shards: how many, as a number or its digits; None for the default of `SHARDS`.
        linear: whether it is the linear loss.
        device: "cpu".

    Raises:
        UnavailableError: the framework is not there, or the device is another.
        ValueError: there cannot be so many shards.
    """

    def __init__(
        self,
        framework: str,
        name: str,
        shards: int | str | None = None,
        linear: bool = False,
        device: str = "cpu",
    ) -> None:
        """Load the framework. The processes start with the first case."""
        usual, most, places = SHARDS[framework]
        number = usual if shards is None else int(shards) if str(shards).isdecimal() else 0
        if not 1 <= number <= most:
            raise ValueError(f"{name.partition(':')[0]}:N takes an N from 1 to {most}, got {shards!r}")
        if device != "cpu":
            raise UnavailableError(f"{name} divides the classes over {places}: leave out --device {device}")
        self.framework, self.name, self.device, self.linear = framework, name, device, linear
        self.where = f"{number} {places}"
        self.loss: Adapter
        if framework == "jax":
            self.loss = _OnDevices(number, linear, name)
        else:
            self.loss = ShardedTorchAdapter(number, DIVISION, linear=linear, name=name)
        self.arithmetic = self.loss.arithmetic

    def unsupported(self, case: Case) -> str | None:
        """Return why the loss cannot handle a case, or None."""
        return self.loss.unsupported(case)

    def __call__(self, case: Case) -> AnyResult:
        """Return loss and gradients of a case."""
        return self.loss(case)


class _OnDevices(JaxAdapter):
    """`ShardedAdapter` in the process with several devices."""

    def __init__(self, num_devices: int, linear: bool, name: str) -> None:
        super().__init__(linear=linear, name=name)
        self.num_devices = num_devices
        self.arithmetic = arithmetic_on(num_devices, self)

    def __call__(self, case: Case) -> AnyResult:
        (answer,) = _process().run(_result, [(self.num_devices, self.linear, case)])
        if isinstance(answer, Exception):
            raise answer
        result: AnyResult = answer
        return result


@cache
def _process() -> Workers:
    jax: Any = importlib.import_module("jax")
    return Workers(1, partial(_with_devices, jax.config.jax_compilation_cache_dir))


def _with_devices(programs: str | None, number: int, of: int, folder: Path) -> None:
    """Start JAX with as many devices as there may be shards, and keep its programs where the caller does."""
    del number, of, folder
    jax: Any = importlib.import_module("jax")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", SHARDS["jax"][1])
    jax.config.update("jax_compilation_cache_dir", programs)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@cache
def _adapter(num_devices: int, linear: bool) -> ShardedAdapter:
    return ShardedAdapter(num_devices, linear=linear)


def _result(prepared: None, num_devices: int, linear: bool, case: Case) -> AnyResult:
    del prepared
    return _adapter(num_devices, linear)(case)
