"""What the JAX losses give for the named cases, computed once for all tests.

XLA takes most of the time of these tests. It compiles a large program faster than several small ones, and what two
functions have in common once. So both implementations, with and without statistics, are compiled together, in both
dtypes where `make test` has both.
"""

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import jax
import numpy as np

import lsce_jax
from lsce_spec import IMPLEMENTATIONS
from parity_tests.losses.adapters import JaxAdapter, operands_of
from parity_tests.suite.chosen import CHOSEN
from parity_tests.truth.cases import Case, make_case
from parity_tests.truth.comparison import AnyResult

# Of the statistics, float64 and float16 differ from these by their precision only, which the losses' tests cover.
STATISTICS_DTYPES = ("float32", "bfloat16")
# The loss as an array, and the statistics as flat ones.
Statistics = tuple[Any, dict[str, Any]]


def result(implementation: str, name: str, dtype: str, device: str = "cpu") -> AnyResult:
    """Return loss and gradient of a case."""
    found: AnyResult = _compute(name, _together_with(name, dtype), device)[implementation, dtype, "loss"]
    return found


def statistics(implementation: str, name: str, dtype: str) -> Statistics:
    """Return the loss and the statistics of a case, for a dtype of `STATISTICS_DTYPES`."""
    found: Statistics = _compute(name, _together_with(name, dtype), "cpu")[implementation, dtype, "statistics"]
    return found


def statistics_of(implementation: str, case: Case) -> Statistics:
    """Return the loss and the statistics of any case."""
    step, operands = _step(implementation, case)
    return _as_arrays(*jax.jit(step)(*operands))


def _together_with(name: str, dtype: str) -> tuple[str, ...]:
    """Return the dtypes of a case that are compiled together with one."""
    return STATISTICS_DTYPES if name in CHOSEN and dtype in STATISTICS_DTYPES else (dtype,)


@cache
def _compute(name: str, dtypes: tuple[str, ...], device: str) -> dict[tuple[str, str, str], Any]:
    """Return results and statistics by implementation and dtype."""
    cases = {dtype: make_case(name, dtype) for dtype in dtypes}
    adapters = {each: JaxAdapter(implementation=each, device=device) for each in IMPLEMENTATIONS}
    steps: dict[tuple[str, str, str], tuple[Callable[..., Any], tuple[Any, ...]]] = {}
    with adapters["fused"].settings(next(iter(cases))):
        for each, dtype in product(adapters, cases):
            steps[each, dtype, "loss"] = adapters[each].step(cases[dtype])
            if dtype in STATISTICS_DTYPES:
                steps[each, dtype, "statistics"] = _step(each, cases[dtype])
        functions, operands = zip(*steps.values(), strict=True)
        together = jax.jit(lambda operands: [f(*given) for f, given in zip(functions, operands, strict=True)])
        found = dict(zip(steps, together(operands), strict=True))
    return {
        (each, dtype, kind): adapters[each].result(cases[dtype], parts) if kind == "loss" else _as_arrays(*parts)
        for (each, dtype, kind), parts in found.items()
    }


def _step(implementation: str, case: Case) -> tuple[Callable[..., Any], tuple[dict[str, Any]]]:
    """Return a function of the arrays of a case that returns the loss and the statistics, and those arrays."""
    arrays, options = operands_of(case)
    arrays.pop("upstream")

    def with_stats(arrays: dict[str, Any]) -> Any:
        return lsce_jax.label_smoothed_cross_entropy_with_stats(**arrays, **options, implementation=implementation)

    return with_stats, (arrays,)


def _as_arrays(loss: Any, stats: lsce_jax.LossStats) -> Statistics:
    return np.asarray(loss), {name: np.asarray(value).reshape(-1) for name, value in stats._asdict().items()}
