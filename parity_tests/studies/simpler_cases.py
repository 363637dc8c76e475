"""Makes a case simpler: fewer rows, classes and options."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from parity_tests.studies.drawn_cases import mended, take_rows, with_finite_logits
from parity_tests.truth.cases import Case, LinearCase
from parity_tests.truth.linear_cases import with_logits
from parity_tests.truth.precision import compute_dtype, round_to


def shrink(case: Case, keeps: Callable[[Case], bool], tries: int = 300, deadline: float = math.inf) -> Case:
    """Return the simplest case found of which `keeps` is true.

    Args:
        case: the case.
        keeps: returns whether a simpler case will do.
        tries: the largest number of calls of `keeps`.
        deadline: the value of `time.monotonic` after which `keeps` is called no more.
    """
    candidates = _simpler(case)
    for _ in range(tries):
        candidate = next(candidates, None)
        if candidate is None or time.monotonic() >= deadline:
            break
        if keeps(candidate):
            case, candidates = candidate, _simpler(candidate)
    return case


def _simpler(case: Case) -> Iterator[Case]:
    """Yield simpler cases, the smallest first."""
    num_rows, num_classes = case.logits.shape
    for rows in _parts(num_rows):
        yield take_rows(case, rows)
    if case.options["reduction"] != "none":
        yield replace(case, options={**case.options, "reduction": "none"})
    for classes in _parts(num_classes):
        if case.labels.ndim == 2 or np.isin(case.labels, classes).all():
            yield from _take_classes(case, classes)
    yield from _with_fewer_options(case)
    if not isinstance(case, LinearCase):
        yield from _with_simpler_logits(case)
    elif case.bias is not None:
        yield with_logits(replace(case, bias=None))


def _with_simpler_logits(case: Case) -> Iterator[Case]:
    """Yield the case with the largest logit of each row at 0, then with whole numbers."""
    for simpler in (case.logits - np.max(case.logits, axis=-1, keepdims=True), np.round(case.logits)):
        logits = round_to(simpler, case.dtype)
        if not np.array_equal(logits, case.logits):
            yield replace(case, logits=logits)


def _with_fewer_options(case: Case) -> Iterator[Case]:
    """Yield cases with fewer options."""
    plain: dict[str, Any] = {"z_loss": 0.0, "softcap": None, "subtract_entropy": False, "convention": "uniform"}
    for name, value in plain.items():
        if case.options[name] != value:
            yield replace(case, options={**case.options, name: value})
    for name in ("class_weight", "class_mask", "prior", "upstream"):
        if getattr(case, name) is not None:
            yield replace(case, **dict[str, Any]({name: None}))
    if case.labels.ndim == 2:
        yield mended(replace(case, labels=np.argmax(case.labels, axis=-1)))
    if not isinstance(case.smoothing, float):
        yield replace(case, smoothing=float(case.smoothing[0]))
    for smoothing in (0.0, 0.1):
        if np.any(~np.isin(case.smoothing, (0.0, smoothing))):
            yield replace(case, smoothing=smoothing)


def _parts(length: int) -> Iterator[Any]:
    """Yield the indices of a range without one part: without each half, then without each quarter, and so on."""
    size = length
    while size > 1:
        size = (size + 1) // 2
        for start in range(0, length, size):
            left = np.delete(np.arange(length), slice(start, start + size))
            if left.size:
                yield left


def _take_classes(case: Case, classes: Any) -> Iterator[Case]:
    """Yield the case with these classes alone, unless the mask or the prior leaves none of them."""
    layer = ("weight", "bias") if isinstance(case, LinearCase) else ()
    vectors: dict[str, Any] = {name: getattr(case, name) for name in ("class_weight", "class_mask", "prior", *layer)}
    vectors = {name: None if vector is None else vector[..., classes] for name, vector in vectors.items()}
    if vectors["class_mask"] is not None and not vectors["class_mask"].any():
        return
    if vectors["prior"] is not None:
        if not vectors["prior"].any():
            return
        vectors["prior"] = round_to(vectors["prior"] / vectors["prior"].sum(), compute_dtype(case.dtype))
    labels = case.labels[:, classes] if case.labels.ndim == 2 else np.searchsorted(classes, case.labels)
    yield with_finite_logits(replace(case, logits=case.logits[:, classes], labels=labels, **vectors))
