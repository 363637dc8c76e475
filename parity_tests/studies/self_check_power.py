"""Finds the faults of the mutant bank that the checks without an oracle reject."""

from collections.abc import Collection, Hashable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity_tests.faults.dense import FAULTS
from parity_tests.faults.linear import wrong_result
from parity_tests.faults.sharded import SHARDED_FAULTS
from parity_tests.self_checks import CHECKS, DEFAULTS, CheckOutcome, Evaluate, Evaluation, Subject, run_checks, upstream
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import Result
from parity_tests.truth.precision import FloatArray


def evaluate_fault(fault: str | None) -> Evaluate:
    """Return the NumPy loss with a fault of the bank, or sound, in the form that `run_checks` takes."""
    known: dict[Hashable, Evaluation] = {}

    def evaluate(
        logits: FloatArray, labels: NDArray[np.int64], *, smoothing: float, dtype: str, **options: Any
    ) -> Evaluation:
        # The checks ask for the same results many times.
        given = [
            None if each is None else np.asarray(each).tobytes() for each in (logits, labels, options.get("where"))
        ]
        key = (*given, logits.shape, smoothing, dtype, *(options.get(name) for name in ("convention", "reduction")))
        if key not in known:
            known[key] = compute(logits, labels, smoothing=smoothing, dtype=dtype, **options)
        return known[key]

    def compute(
        logits: FloatArray, labels: NDArray[np.int64], *, smoothing: float, dtype: str, **options: Any
    ) -> Evaluation:
        chosen = {**DEFAULTS, **options}
        where = chosen.pop("where")
        factors = upstream(() if chosen["reduction"] == "mean" else labels.shape)
        case = Case("self_check", dtype, logits, labels, chosen, smoothing, where=where, upstream=factors)
        result = wrong_result(case, fault)
        assert isinstance(result, Result)
        return Evaluation(result.loss, result.gradient / factors.reshape(-1, 1))

    return evaluate


@cache
def _sound() -> Evaluate:
    return evaluate_fault(None)


def check_fault(fault: str | None, dtype: str) -> list[CheckOutcome]:
    """Return the outcomes of the checks; the plain cross-entropy and the compiled loss to compare with are sound."""
    sound = _sound()
    return run_checks(Subject(evaluate_fault(fault), plain=sound, other=sound), dtype)


def faults_caught(dtype: str, faults: Collection[str] = (*FAULTS, *SHARDED_FAULTS)) -> dict[str, list[str]]:
    """Return which of some faults each check rejects, for logits of `dtype`; none of those of linear layers."""
    caught: dict[str, list[str]] = {check: [] for check in CHECKS}
    for fault in (name for name in (*FAULTS, *SHARDED_FAULTS) if name in faults):
        for outcome in check_fault(fault, dtype):
            if outcome.verdict == "disagree":
                caught[outcome.check].append(fault)
    return caught
