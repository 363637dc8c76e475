"""Outcomes of adapters in cases, and differences between two adapters with the one to blame."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from parity_tests.losses.adapters import Adapter
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import AnyResult, Comparison, against_each_other, against_oracle
from parity_tests.truth.oracle import Truth

Status = Literal["agree", "disagree", "failed", "unsupported"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of an adapter in a case.

    Args:
        adapter: name of the adapter.
        case, dtype: the case.
        status: "agree" or "disagree" with the truth; "failed" to give a loss and its gradients; "unsupported": not
            called, since it cannot handle the case.
        reason: why it failed or was not called.
        comparison: errors as shares of the bounds, if it gave a result.
        result: the result itself.
    """

    adapter: str
    case: str
    dtype: str
    status: Status
    reason: str | None = None
    comparison: Comparison | None = None
    result: AnyResult | None = field(default=None, repr=False, compare=False)


def examine(adapter: Adapter, case: Case, truth: Truth, call: Callable[[], AnyResult] | None = None) -> Outcome:
    """Run an adapter on a case and compare it with the truth. An exception is an outcome too.

    Args:
        adapter: the adapter.
        case: the case.
        truth: the truth about it.
        call: returns the result of the adapter in this case; by default the adapter is called.
    """
    unsupported = adapter.unsupported(case)
    if unsupported:
        return Outcome(adapter.name, case.name, case.dtype, "unsupported", unsupported)
    return judge(adapter, case, truth, attempt(adapter, case, call))


def attempt(adapter: Adapter, case: Case, call: Callable[[], AnyResult] | None = None) -> AnyResult | str:
    """Return the result of an adapter in a case, or the exception as text. For `call` see `examine`."""
    try:
        return adapter(case) if call is None else call()
    except (Exception, SystemExit) as error:  # a user's loss may raise anything, and the other cases must still run
        return _describe(error)


def judge(adapter: Adapter, case: Case, truth: Truth, attempted: AnyResult | str) -> Outcome:
    """Compare the return value of `attempt` with the truth, within the bounds of the adapter."""
    if isinstance(attempted, str):
        return Outcome(adapter.name, case.name, case.dtype, "failed", attempted)
    comparison = against_oracle(case, truth, attempted, adapter.arithmetic)
    status: Status = "agree" if comparison.agrees else "disagree"
    return Outcome(adapter.name, case.name, case.dtype, status, comparison.problem, comparison, attempted)


def _describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


@dataclass(frozen=True)
class Difference:
    """Two adapters compared in a case: the third side of the verdict.

    Args:
        case, dtype: the case.
        adapters: names of the two.
        comparison: their difference as a share of the sum of their bounds.
        blame: those outside the bounds of the truth; empty if the two agree, None if the truth is not known.
    """

    case: str
    dtype: str
    adapters: tuple[str, str]
    comparison: Comparison
    blame: tuple[str, ...] | None

    @property
    def agrees(self) -> bool:
        """Whether they differ by no more than the sum of their bounds."""
        return self.comparison.agrees


def compare_outcomes(
    case: Case, truth: Truth, outcomes: tuple[Outcome, Outcome], adapters: tuple[Adapter, Adapter]
) -> Difference | None:
    """Return the difference of two outcomes; None unless both have a result."""
    first, second = outcomes
    if first.result is None or second.result is None:
        return None
    arithmetic = (adapters[0].arithmetic, adapters[1].arithmetic)
    comparison = against_each_other(case, truth, (first.result, second.result), arithmetic)
    blame = () if comparison.agrees else tuple(each.adapter for each in outcomes if each.status != "agree")
    return Difference(case.name, case.dtype, (first.adapter, second.adapter), comparison, blame)
