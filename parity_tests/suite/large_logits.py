"""Logits near the largest number, and what every loss makes of them: the truth, or infinity where it must be."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from parity_tests.losses.adapters import Adapter
from parity_tests.truth.cases import Case, random_case
from parity_tests.truth.comparison import against_oracle
from parity_tests.truth.oracle import Truth, solve
from parity_tests.truth.precision import round_to

LARGEST = float(np.finfo("float32").max)
# Most losses are below the largest number, and differences of logits, or the sums of these, are not.
ROWS = 3e38 * np.array([
    [1, 0, 0, 0, 0, 0],
    [1, -1, 0, 0, 0, 0],
    [1, 1, 1, -1, 1, 1],
    [1, -1, -1, -1, -1, -1],
    [0.25, -0.25, 0, 0, 0, 0],
    [0.25, 0.125, 0, 0, -0.25, -0.25],
])  # fmt: skip
LABELS = np.array([1, 2, 0, 0, 0, 1])
WEIGHTS, PRIOR = np.array([1, 2, 0.5, 0, 1, 1]), np.array([1, 2, 2, 0, 1, 2]) / 8
FIELDS: dict[str, dict[str, Any]] = {
    "smoothing 0.1": {},
    "smoothing 0": {"smoothing": 0.0},
    "smoothing 1": {"smoothing": 1.0},
    "smoothing of rows": {"smoothing": np.arange(6) / 8},
    "soft labels": {"labels": np.eye(6)[LABELS] / 2 + 1 / 16},
    "weights": {"class_weight": WEIGHTS},
    "prior": {"prior": PRIOR},
    "mask": {"class_mask": WEIGHTS > 0},
    "clamp": {"options": {"convention": "clamp"}},
    "max_sup": {"options": {"convention": "max_sup"}},
    "entropy": {"options": {"subtract_entropy": True}},
}
PLAIN = ("smoothing 0.1", "smoothing 0", "smoothing 1", "clamp")


@cache
def _case_and_truth(name: str, dtype: str, copies: int) -> tuple[Case, Truth]:
    """Return a case of `FIELDS`, whose classes are there `copies` times; a power of two."""
    fields = {"logits": ROWS, **FIELDS[name]}
    for field in {"logits", "class_weight", "class_mask", "prior", "labels"} & fields.keys():
        fields[field] = np.tile(fields[field], copies)
    for field in {"prior", "labels"} & fields.keys():
        fields[field] = fields[field] / copies
    fields = {"labels": LABELS, **fields, "logits": round_to(fields["logits"], dtype)}
    case = random_case(dtype, np.random.default_rng(0), **fields)
    return case, solve(case)


def assert_right_near_the_largest_number(
    loss: Adapter, dtype: str = "float32", *, copies: int = 1, names: Iterable[str] = FIELDS
) -> None:
    """A loss is infinite only if a difference of logits or the true loss is beyond the largest number, else right."""
    for name in names:
        case, true = _case_and_truth(name, dtype, copies)
        if loss.unsupported(case):
            continue
        outcome = loss(case)
        is_infinite, is_too_large = np.isposinf(outcome.loss), true.loss.high > LARGEST
        may_be_infinite = is_too_large | (np.ptp(case.logits.astype(np.float64), axis=-1) > LARGEST)
        assert np.all(is_infinite >= is_too_large), name
        assert np.all(is_infinite <= may_be_infinite), name
        outcome = replace(outcome, loss=np.where(is_infinite, true.loss.high, outcome.loss))
        comparison = against_oracle(case, true, outcome, loss.arithmetic)
        assert comparison.agrees, (name, comparison)
