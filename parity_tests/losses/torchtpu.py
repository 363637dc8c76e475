"""Programs that TorchTPU makes of lsce_torch for a TPU, interpreted, and compiled by libtpu, without a TPU.

TorchTPU (`torch-tpu`) is what follows torch_xla. It needs a newer Python than this project, and pins its own torch, so
it has an environment of its own: `make install-torchtpu`. A process there makes the programs, see `torchtpu_worker.py`.
"""

import atexit
import importlib
import os
import pickle
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lsce_cost.devices import TPU_ENVIRONMENT
from parity_tests.losses import iree
from parity_tests.losses.adapters import LossError, TorchAdapter, UnavailableError, missing_features
from parity_tests.truth.arithmetic import NARROW, any_order
from parity_tests.truth.cases import Case, LinearCase
from parity_tests.truth.comparison import AnyResult
from parity_tests.truth.devices import device_of_kind

_ROOT = Path(__file__).parents[2]
# The environment's Python; by default that of `make install-torchtpu`.
PYTHON = "LSCE_TORCHTPU_PYTHON"
_ENVIRONMENT = {
    **TPU_ENVIRONMENT,
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    "TPU_LOG_DIR": "disabled",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "PYTHONWARNINGS": "ignore",
    "PYTHONDONTWRITEBYTECODE": "1",
}


class TorchTpuAdapter:
    """A loss of torch whose program TorchTPU makes for a TPU, and StableHLO's interpreter or IREE runs.

    Args:
        target: "llvm-cpu" or "vmvx", for which IREE compiles it; None for the interpreter.
        loss: a function of the signature of `lsce_torch.label_smoothed_cross_entropy`, as "module:function"; None for
            the package's own.
        implementation: as in `FrameworkAdapter`.
        name: name in reports.
        linear: whether the loss takes a linear layer.
        narrow: as in `FrameworkAdapter`.
        device: "cpu", where the interpreter runs.

    Raises:
        UnavailableError: the environment of TorchTPU, or IREE, is not there.
    """

    framework = "torch"

    def __init__(
        self,
        loss: str | None = None,
        *,
        target: str | None = None,
        implementation: str | None = None,
        name: str = "torch-tpu",
        linear: bool = False,
        narrow: frozenset[str] = NARROW,
        device: str = "cpu",
    ) -> None:
        """Find the environment; its process starts with the first case."""
        if device != "cpu":
            raise UnavailableError(f"{name} is interpreted on the CPU only, not on {device}")
        self.python, self.target = find_python(), target
        if target is not None:
            iree.require()
        self.loss, self.linear, self.name, self.device = loss, linear, name, device
        self.options: dict[str, Any] = {"implementation": implementation, "linear": linear}
        # The interpreter rounds the host's exp, log1p and tanh, and adds one term after another.
        arithmetic = device_of_kind("jax", "cpu", "cpu").arithmetic
        self.arithmetic = replace(arithmetic, depth=any_order, narrow=narrow)

    def unsupported(self, case: Case) -> str | None:
        """Return why TorchTPU or the interpreter cannot handle a case, or None."""
        by_iree = None if self.target is None else iree.why_not(case, self.target)
        return missing_features(case, None, self.linear) or _why_not(case) or by_iree

    def __call__(self, case: Case) -> AnyResult:
        """Return loss and gradients of a case."""
        if self.target is not None:
            return self._by_iree(case, self.target)
        result: AnyResult = self._ask(case)
        return result

    def _by_iree(self, case: Case, target: str) -> AnyResult:
        """Return what IREE gives. It drops a rounding that a widening follows, so results are rounded here."""
        torch: Any = importlib.import_module("torch")
        module, operands, dtypes = self._ask(case, program=True)
        results = zip(iree.evaluate(module, operands, target), dtypes.items(), strict=True)
        parts = {name: torch.from_numpy(part.copy()).to(getattr(torch, dtype)) for part, (name, dtype) in results}
        return TorchAdapter(**self.options).result(case, parts)

    def compile(self, case: Case, generation: str) -> dict[str, float]:
        """Return what libtpu says of the program of a case, compiled for "v4", "v5e", "v5p", "v6e" or "v7x".

        Returns:
            "bytes accessed" and "temporary", the bytes that the program holds beside its operands and results.
        """
        figures: dict[str, float] = self._ask(case, generation=generation)
        return figures

    @property
    def versions(self) -> dict[str, str]:
        """The versions of torch, torch-tpu, libtpu and jax in the environment."""
        return _process(self.python).versions

    def _ask(self, case: Case, **more: str | bool) -> Any:
        return _process(self.python).ask({"loss": self.loss, "options": self.options, "case": case, **more})


def traffic(shape: Sequence[int], generation: str) -> dict[str, float]:
    """Return what libtpu says of loss and gradients in bfloat16, as TorchTPU makes them for a generation of TPUs.

    Args:
        shape: N and K of the logits, or N, D and K of a linear layer.
        generation: "v4", "v5e", "v5p", "v6e" or "v7x".

    Returns:
        See `TorchTpuAdapter.compile`.

    Raises:
        UnavailableError: the environment of TorchTPU is not there.
    """
    figures: dict[str, float] = _process(find_python()).ask({"shape": list(shape), "generation": generation})
    return figures


def find_python() -> str:
    """Return the Python of TorchTPU's environment.

    Raises:
        UnavailableError: there is none.
    """
    python = os.environ.get(PYTHON) or str(_ROOT / ".venv-torchtpu" / "bin" / "python")
    if not Path(python).exists():
        raise UnavailableError(
            "TorchTPU's environment is not there. Run: make install-torchtpu, which needs Python 3.13 or 3.14 "
            f"({PYTHON} names the Python of another environment)"
        )
    return python


def _why_not(case: Case) -> str | None:
    """Return why TorchTPU 0.2 cannot handle a case, or None."""
    if case.dtype == "float64":
        return "is in float64, which TPUs do not have"
    if isinstance(case, LinearCase) and not case.hidden.size:
        return "has no rows, and StableHLO's interpreter ends the process at a slice of none"
    return None


class _Process:
    """A process of `torchtpu_worker`, which starts with the first request, and again if it has ended."""

    def __init__(self, python: str) -> None:
        """Choose the Python that runs it."""
        self.python = python
        self._running: subprocess.Popen[bytes] | None = None
        self._versions: dict[str, str] = {}
        atexit.register(self._stop)

    @property
    def versions(self) -> dict[str, str]:
        """What the process says of itself when it starts."""
        self.ask(None)
        return self._versions

    def ask(self, request: dict[str, Any] | None) -> Any:
        """Return the answer to a request; None asks for nothing, but starts the process.

        Raises:
            LossError: there is none, with the exception of the process as the message.
        """
        started = self._running or self._start()
        assert started.stdin is not None
        assert started.stdout is not None
        try:
            if started is not self._running:
                self._running = started
                _, self._versions = pickle.load(started.stdout)
            if request is None:
                return None
            pickle.dump(request, started.stdin)
            started.stdin.flush()
            succeeded, outcome = pickle.load(started.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            code = started.wait()
            self._stop()
            raise LossError(f"the process of TorchTPU ended with exit code {code}") from error
        if not succeeded:
            raise LossError(outcome)
        return outcome

    def _start(self) -> subprocess.Popen[bytes]:
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        return subprocess.Popen(
            [self.python, "-m", "parity_tests.losses.torchtpu_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def _stop(self) -> None:
        """End the process, and close its pipes."""
        stopped, self._running = self._running, None
        if stopped is None:
            return
        stopped.kill()
        stopped.wait()
        for pipe in (stopped.stdin, stopped.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # of a request that was never read
                pipe.close()


@lru_cache(maxsize=1)
def _process(python: str) -> _Process:
    return _Process(python)
