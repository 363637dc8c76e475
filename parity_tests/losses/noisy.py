"""Losses whose operations are off by a rounding step each, at random: how far rounding may move their results.

This is Monte Carlo arithmetic (Parker 1997). It sees what moving the inputs cannot: in log(1 - p) the rounding of a p
near 1 counts, and a rounding step of the logits leaves that p as it is.
"""

from collections.abc import Callable

from parity_tests.losses.adapters import Adapter, JaxAdapter, TorchAdapter
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import AnyResult

# The result for a step, the largest share that an operation's result is moved by, and a seed.
Noisy = Callable[[float, int], AnyResult]


def noisy(adapter: Adapter, case: Case) -> Noisy | None:
    """Return the loss of a case with noise in its operations; None for a loss whose operations cannot be replaced.

    The noise is a function of the result of the operation, so that equal numbers stay equal.
    """
    if isinstance(adapter, TorchAdapter) and not adapter.compiled:
        return _of_torch(adapter, case)
    return _of_jax(adapter, case) if isinstance(adapter, JaxAdapter) else None


def _of_torch(adapter: TorchAdapter, case: Case) -> Noisy:
    from parity_tests.losses.noisy_torch import NoiseMode

    def call(step: float, seed: int) -> AnyResult:
        with NoiseMode(step, seed):
            return adapter(case)

    return call


def _of_jax(adapter: JaxAdapter, case: Case) -> Noisy:
    from parity_tests.losses.noisy_jax import NoisyDevice
    from parity_tests.losses.simulated_jax import traced

    run_on = traced(adapter, case)
    return lambda step, seed: run_on(NoisyDevice(step, seed))
