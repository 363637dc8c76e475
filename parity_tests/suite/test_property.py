"""Whatever hypothesis makes up, both frameworks are within their bounds of the oracle and of each other."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from lsce_spec import IMPLEMENTATIONS
from parity_tests.losses.adapters import JaxAdapter, TorchAdapter
from parity_tests.truth.cases import Case, soft_labels
from parity_tests.truth.comparison import against_each_other, against_oracle
from parity_tests.truth.oracle import solve
from parity_tests.truth.precision import DTYPES, FloatArray, compute_dtype, round_to

# Eager, and few shapes: each new shape costs JAX a compilation of every operation.
ADAPTERS = [
    adapter(implementation=implementation, **eager)
    for adapter, eager in ((JaxAdapter, {"jit": False}), (TorchAdapter, {}))
    for implementation in IMPLEMENTATIONS
]
SHAPES = [(1, 1), (3, 2), (4, 7), (2, 3, 5)]


@st.composite
def logits_of(draw: st.DrawFn, dtype: str, shape: tuple[int, ...]) -> FloatArray:
    """Draw logits of one of several characters: spread, offset, tied, with infinities."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 10.0, 1e3, 1e4]))
    offset = draw(st.sampled_from([0.0, -5.0, 1e4]))
    logits = generator.normal(size=shape) * scale + offset
    kind = draw(st.sampled_from(["plain", "ties", "minus infinity"]))
    event(f"{kind}, scale {scale:g}")
    if kind == "ties":
        logits = np.round(logits / (scale + 1)) * (scale + 1)
    if kind == "minus infinity" and shape[-1] > 1:
        logits[..., 1:][generator.random((*shape[:-1], shape[-1] - 1)) < 0.3] = -np.inf
    return round_to(np.clip(logits, None, 6e4), dtype)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a case with any combination of options that is allowed."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SHAPES))
    batch_shape, num_classes = shape[:-1], shape[-1]
    compute = compute_dtype(dtype)
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    options: dict[str, object] = {
        "convention": draw(st.sampled_from(["uniform", "non_target", "clamp", "max_sup"])),
        "reduction": draw(st.sampled_from(["none", "sum", "mean"])),
        "z_loss": draw(st.sampled_from([0.0, 1e-4, 0.1])),
        "softcap": draw(st.sampled_from([None, None, 0.5, 30.0])),
    }
    options["subtract_entropy"] = options["convention"] != "max_sup" and draw(st.booleans())
    fields: dict[str, object] = {"where": None, "class_weight": None, "class_mask": None, "prior": None}
    if draw(st.booleans()):
        fields["class_weight"] = round_to(generator.uniform(0, 3, num_classes), compute)
    if draw(st.booleans()):
        fields["where"] = generator.random(batch_shape) < 0.7
    mask = np.ones(num_classes, bool)
    if draw(st.booleans()):
        mask[1:] = generator.random(num_classes - 1) < 0.6
        fields["class_mask"] = mask
    elif draw(st.booleans()):
        mask_of_rows = generator.random(shape) < 0.6
        mask_of_rows[..., 0] = True
        fields["class_mask"] = mask_of_rows
    of_rows = np.ndim(fields["class_mask"]) > 1  # a prior needs one mask for all rows
    if options["convention"] == "uniform" and not of_rows and draw(st.booleans()):
        prior = np.where(mask, generator.exponential(size=num_classes), 0)
        fields["prior"] = round_to(prior / prior.sum(), compute)
    if draw(st.booleans()):
        labels = generator.integers(-1, num_classes + 1, size=batch_shape)
        options["ignore_index"] = draw(st.sampled_from([None, -1, 0, num_classes]))
    else:
        labels = soft_labels(dtype, generator, shape)
    smoothing: float | FloatArray = draw(st.sampled_from([0.0, 1e-8, 0.1, 0.5, 0.99999, 1.0]))
    if draw(st.booleans()):
        smoothing = round_to(generator.random(batch_shape), compute)
    if options["reduction"] == "none":
        fields["upstream"] = round_to(generator.normal(size=batch_shape), compute)
    elif options["reduction"] == "mean" and draw(st.booleans()):
        options["denominator"] = draw(st.sampled_from([0.0, 3.0, 1000.0]))
    logits = draw(logits_of(dtype, shape))
    return Case("drawn", dtype, logits, labels, options=options, smoothing=smoothing, **fields)


@pytest.mark.slow
@given(cases())
@settings(
    max_examples=300, deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
def test_any_case(case: Case) -> None:
    truth = solve(case)
    results = [adapter(case) for adapter in ADAPTERS]
    for adapter, result in zip(ADAPTERS, results, strict=True):
        comparison = against_oracle(case, truth, result, adapter.arithmetic)
        assert comparison.agrees, (adapter.name, comparison)
    for (one, first), (other, second) in combinations(zip(ADAPTERS, results, strict=True), 2):
        comparison = against_each_other(case, truth, (first, second), (one.arithmetic, other.arithmetic))
        assert comparison.agrees, (one.name, other.name, comparison)
