"""The Pallas kernel for TPUs: on a TPU, or run here by Pallas's interpreter.

The interpreter runs the very kernel, one step after another, with the memories of a TPU simulated: what nobody wrote is
NaN, and reads and writes that may collide are found. Everything around the kernel is compiled for the CPU, so that the
arithmetic is that of the CPU. Steps are small, so that a few rows and classes make several of them.
"""

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

from parity_tests.losses.adapters import JaxAdapter, LossError, UnavailableError
from parity_tests.truth.arithmetic import any_order
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import AnyResult

DTYPES = ("float32", "bfloat16")
# Rows of a step, and vectors of a round: loops, and what is left after them, in most cases.
SMALL: dict[str, Any] = {"STEPS": ((8, True), (8, False)), "VECTORS_OF_ROUND": 2}


class PallasAdapter(JaxAdapter):
    """A `JaxAdapter` of the kernel.

    Args:
        interpreted: whether Pallas interprets it here, which says nothing of a TPU's arithmetic and compiler.
        small: whether an interpreted step has few rows and classes.
        options: as in `JaxAdapter`.

    Raises:
        UnavailableError: JAX, or a TPU for what is not interpreted, is not there.
    """

    def __init__(self, *, interpreted: bool = False, small: bool = True, **options: Any) -> None:
        """Choose how the kernel is run."""
        super().__init__(**{"implementation": "pallas", **options})
        if not interpreted and self.device != "tpu":
            raise UnavailableError(
                "it runs on TPUs, as with --device tpu; jax-pallas-tpu-interpreted is the same kernel, interpreted here"
            )
        if interpreted and self.device != "cpu":
            raise UnavailableError("its kernel is interpreted on a CPU")
        self.interpreted, self.small = interpreted, small
        if interpreted:
            self.arithmetic = replace(self.arithmetic, depth=any_order)

    def unsupported(self, case: Case) -> str | None:
        """Return why the kernel cannot compute a case, or None."""
        if reason := super().unsupported(case):
            return reason
        if case.dtype not in DTYPES:
            return f"has no {case.dtype}"
        if case.labels.dtype.kind == "f":
            return "has no soft labels"
        if case.has_row_masks:
            return "has one class mask for all rows"
        return "has no rows" if 0 in case.logits.shape else None

    def __call__(self, case: Case) -> AnyResult:
        """Return loss and gradients of a case."""
        if not self.interpreted:
            return super().__call__(case)
        with self.interpreter() as kernels:
            result = super().__call__(case)
        if not kernels:
            raise LossError("no kernel was run")
        if any(kernel.races_found for kernel in kernels):
            raise LossError("the kernel's reads and writes race")
        return result

    @contextmanager
    def interpreter(self) -> Iterator[list[Any]]:
        """Have Pallas interpret kernels, in small steps. Yields what it knows of races, for each kernel that is run."""
        from jax.experimental.pallas import tpu as pltpu

        from lsce_jax.kernels import tpu

        # Where Pallas keeps the races that it has found in the kernel that it runs. It has no public name.
        interpreter = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
        new, kernels = interpreter.RaceDetectionState, []

        def kept(**options: Any) -> Any:
            kernels.append(new(**options))
            return kernels[-1]

        params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
        # What a kernel that failed has left.
        pltpu.reset_tpu_interpret_mode_state()  # type: ignore[no-untyped-call]
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(interpreter, "RaceDetectionState", kept))
            stack.enter_context(pltpu.force_tpu_interpret_mode(params))
            if self.small:
                stack.enter_context(mock.patch.multiple(tpu, **SMALL))
            yield kernels
