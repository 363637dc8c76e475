"""The Triton kernels of `lsce_torch`, run by Triton's interpreter on the CPU: every case, against the truth.

`make test-triton` sets TRITON_INTERPRET=1, which Triton reads when it is loaded. The interpreter computes with NumPy,
in float32 where the kernels do; of a GPU's own arithmetic it shows nothing.
"""

import importlib.util
import os
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lsce_torch import (
    label_smoothed_cross_entropy,
    label_smoothed_cross_entropy_with_stats,
    linear_label_smoothed_cross_entropy,
    linear_label_smoothed_cross_entropy_with_stats,
)
from lsce_torch.kernels import launch
from parity_tests.losses.launches import VIEWS
from parity_tests.losses.registry import make_adapter
from parity_tests.losses.triton_kernels import INTERPRET, Launch, interpret, on_pretended_gpu
from parity_tests.plugin import Recorder
from parity_tests.suite.large_logits import assert_right_near_the_largest_number
from parity_tests.suite.stats_truth import (
    agrees,
    assert_entropy,
    assert_statistics,
    in_rows,
    torch_gradients,
    torch_statistics,
    truth_and_bounds_of,
)
from parity_tests.truth.cases import Case, case_names, features, make_case
from parity_tests.truth.comparison import Comparison, against_oracle
from parity_tests.truth.linear_cases import linear_case_names, make_linear_case
from parity_tests.truth.oracle import solve
from parity_tests.truth.precision import DTYPES, round_to

pytestmark = [
    pytest.mark.devices,
    pytest.mark.skipif(os.environ.get(INTERPRET) != "1", reason="make test-triton runs it"),
]
REFERENCE_ONLY = {"soft_max_sup", "class_mask_of_rows_soft"}


def compared(case: Case, adapter: str = "torch-triton") -> Comparison:
    interpreted = make_adapter(adapter)
    return against_oracle(case, solve(case), interpreted(case), interpreted.arithmetic)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in case_names() if name not in REFERENCE_ONLY])
def test_dense(name: str, dtype: str, parity_ledger: Recorder) -> None:
    parity_ledger.record("torch-triton", "cuda", dtype, "interpreted")
    comparison = compared(make_case(name, dtype))
    assert comparison.agrees, comparison


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", linear_case_names())
def test_linear(name: str, dtype: str, parity_ledger: Recorder) -> None:
    parity_ledger.record("torch-linear-triton", "cuda", dtype, "interpreted")
    comparison = compared(make_linear_case(name, dtype), "torch-linear-triton")
    assert comparison.agrees, comparison


@pytest.mark.parametrize("name", linear_case_names())
def test_linear_as_on_a_gpu(name: str) -> None:
    """With the operations of torch that a GPU gets, as the products that are added to sums in float32."""
    with on_pretended_gpu(interpret):
        comparison = compared(make_linear_case(name, "bfloat16"), "torch-linear-triton")
    assert comparison.agrees, comparison


# --- Sizes, layouts and values that the named cases do not have -------------------------------------------------------


def case_of(num_rows: int, num_classes: int, dtype: str) -> Case:
    """Return a mean over rows of normal logits."""
    random = np.random.default_rng(num_classes)
    logits = round_to(3 * random.normal(size=(num_rows, num_classes)), dtype)
    return Case("normal", dtype, logits, random.integers(num_classes, size=num_rows), {"reduction": "mean"})


# Resident and streamed, with rows that begin at multiples of 16 and others, and one more or less than a block.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_classes", [1, 2, 3, 1024, 1025, 2047, 2048, 4096, 4099, 8192, 8208, 12288, 20011])
def test_sizes(num_classes: int, dtype: str) -> None:
    comparison = compared(case_of(3, num_classes, dtype))
    assert comparison.agrees, comparison


@pytest.mark.parametrize("copies", [1, 1024])
def test_logits_near_the_largest_number(copies: int) -> None:
    """In one block, and streamed."""
    assert_right_near_the_largest_number(make_adapter("torch-triton"), copies=copies)


# Labels, ties and masks in the first, a middle and the last block of a streamed row.
STREAMED: dict[str, dict[str, Any]] = {
    "mask and weights": {"class_mask": True, "class_weight": True},
    "max_sup": {"options": {"convention": "max_sup"}, "class_weight": True},
    "softcap": {"options": {"softcap": 5.0, "z_loss": 0.1}},
    "everything": {"options": {"softcap": 5.0, "z_loss": 0.1}, "class_mask": True, "class_weight": True},
    "on below off": {"options": {"convention": "non_target"}, "smoothing": 1.0},
    "per row": {"smoothing": np.array([0.0, 0.5, 1.0, 0.125])},
}


@pytest.mark.parametrize("num_classes", [2100, 5008])
@pytest.mark.parametrize("name", STREAMED)
def test_options_of_streamed_rows(name: str, num_classes: int) -> None:
    given = dict(STREAMED[name])
    case = case_of(4, num_classes, "float32")
    logits, labels = case.logits.copy(), np.array([0, num_classes - 1, num_classes // 2, 7])
    # Ties of the largest logit in different blocks, and a label that is one of them.
    logits[1, [5, 1500, num_classes - 1]] = logits[2, [3, 2000]] = 12.0
    if given.pop("class_mask", False):
        mask = np.arange(num_classes) % 5 != 1
        mask[labels] = True
        given["class_mask"] = mask
    if given.pop("class_weight", False):
        given["class_weight"] = round_to(np.linspace(0.5, 2, num_classes), "float32")
    options = {**case.options, **given.pop("options", {})}
    comparison = compared(replace(case, logits=round_to(logits, "float32"), labels=labels, options=options, **given))
    assert comparison.agrees, comparison


@pytest.mark.parametrize("num_classes", [40, 2100, 5008])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_first_largest_logit(num_classes: int, softcap: float | None) -> None:
    """Of equal largest logits the first counts, in whichever block, and before the softcap."""
    logits = torch.linspace(-1, 1, 6 * num_classes).reshape(6, num_classes)
    first, last = num_classes // 3, num_classes - 2
    logits[0:2, [first, last]] = 200.0
    logits[2:4, [first, last]] = torch.tensor([200.0, 201.0])  # the same after the softcap
    logits[4:, [0, last]] = 200.0
    labels = torch.tensor([first, last, first, last, 0, last])
    _, stats = label_smoothed_cross_entropy_with_stats(logits, labels, softcap=softcap, implementation="triton")
    assert stats.correct.tolist() == [True, False, False, True, True, False]


@pytest.mark.parametrize("num_classes", [21, 64, 65, 200])
def test_rows_side_by_side(num_classes: int) -> None:
    case = case_of(2 * 5 * 7, num_classes, "float32")
    logits, labels = case.logits.reshape(2, 5, 7, num_classes), case.labels.reshape(2, 5, 7)
    comparison = compared(replace(case, logits=np.moveaxis(logits, -1, 1), labels=labels, axis=1))
    assert comparison.agrees, comparison


LOWEST = float(np.finfo(np.float32).min)


@pytest.mark.parametrize("num_classes", [40, 8200, 9001])
@pytest.mark.parametrize(
    "values",
    [
        {0: -np.inf, 1: -np.inf},
        dict.fromkeys(range(40), LOWEST),
        {0: 1e38, 1: -1e38},
        {0: 3e38, 1: -3e38},
        {0: -3e38, 39: 3e38},
        dict.fromkeys(range(20), -1e35) | dict.fromkeys(range(20, 40), -1e36),
    ],
    ids=["minus infinity", "lowest", "huge", "both ends", "both ends, rising", "very low"],
)
def test_values(num_classes: int, values: dict[int, float]) -> None:
    case = case_of(3, num_classes, "float32")
    logits = case.logits.copy()
    if len(values) == 40:
        logits[1] = LOWEST
    for k, value in values.items():
        logits[1, k] = value
    labels = np.array([5, 3, 7])
    case = replace(case, logits=round_to(logits, "float32"), labels=labels)
    weight = round_to(np.linspace(0.5, 2, num_classes), "float32")
    for options in ({"smoothing": 0.0}, {"class_weight": weight, "smoothing": 0.0}):
        comparison = compared(replace(case, **options))
        assert comparison.agrees, comparison
    case = replace(case, smoothing=0.1, class_weight=weight)
    loss = make_adapter("torch-triton")
    true, outcome = solve(case), loss(case)
    if np.abs(logits[np.isfinite(logits)]).max() > 1e37 and np.isposinf(outcome.loss):
        outcome = replace(outcome, loss=true.loss.high)  # the sum of the gaps overflows, which is no mistake
    comparison = against_oracle(case, true, outcome, loss.arithmetic)
    assert comparison.agrees, comparison


@pytest.mark.parametrize("num_classes", [40, 8200])
def test_rows_without_a_loss(num_classes: int) -> None:
    """All -inf, one NaN, one inf: NaN in loss and gradient of the row, and only there."""
    logits = torch.zeros(5, num_classes)
    logits[0], logits[1, 3], logits[2, 4] = -torch.inf, torch.nan, torch.inf
    leaf = logits.requires_grad_()
    losses = label_smoothed_cross_entropy(
        leaf, torch.zeros(5, dtype=torch.int64), reduction="none", implementation="triton"
    )
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    assert losses.isnan().tolist() == [True, True, True, False, False]
    assert gradient.isnan().all(-1).tolist() == [True, True, True, False, False]
    assert not gradient[3:].isnan().any()


# --- What torch does to a loss ----------------------------------------------------------------------------------------

LOGITS = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 6)))
LABELS = torch.tensor([0, 4, 2, -100, 1, 3])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"ignore_index": -100},
    "capped": {"ignore_index": -100, "z_loss": 0.1, "softcap": 2.0, "reduction": "sum"},
    "weighted": {"where": LABELS >= 0, "class_weight": torch.linspace(0.5, 2, 6), "class_mask": torch.arange(6) != 5},
    "max_sup": {"ignore_index": -100, "convention": "max_sup", "reduction": "none"},
    "per row": {"ignore_index": -100, "smoothing": torch.linspace(0, 1, 6)},
    "a tensor as denominator": {"ignore_index": -100, "denominator": torch.tensor(3.5, dtype=torch.float64)},
    "class weights": {"ignore_index": -100, "class_weight": torch.linspace(0.5, 2, 6), "z_loss": 0.1},
}


def loss(logits: torch.Tensor, labels: torch.Tensor = LABELS, implementation: str = "triton", **options: Any) -> Any:
    return label_smoothed_cross_entropy(logits, labels, implementation=implementation, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options: dict[str, Any]) -> None:
    """Reverse and forward mode, batched, to second order, against finite differences."""
    leaf = LOGITS.clone().requires_grad_()
    both = {"check_batched_grad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(lambda z: loss(z, **options), leaf, check_forward_ad=True, **both)
    assert torch.autograd.gradgradcheck(lambda z: loss(z, **options), leaf, check_fwd_over_rev=True, **both)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_transforms(options: dict[str, Any]) -> None:
    """torch.func, held against autograd: the same kernels, and the same arithmetic."""
    leaf = LOGITS.clone().requires_grad_()
    upstream = torch.linspace(1, 2, 6) if options.get("reduction") == "none" else torch.ones(())

    def total(z: torch.Tensor) -> Any:
        return (loss(z, **options) * upstream).sum()

    (expected,) = torch.autograd.grad(total(leaf), leaf)
    with on_pretended_gpu(interpret) as started:
        gradient = torch.func.grad(total)(LOGITS)
        assert [each.name for each in started] == ["forward"]  # the gradient may be differentiated again
    torch.testing.assert_close(gradient, expected, rtol=2**-48, atol=2**-50)
    stacked = torch.stack([LOGITS, 2 * LOGITS])
    each = torch.stack([torch.func.grad(total)(one) for one in stacked])
    torch.testing.assert_close(torch.vmap(torch.func.grad(total))(stacked), each, rtol=2**-48, atol=2**-50)


def test_the_gradient_with_the_loss() -> None:
    """Written in the forward pass, it is the one that `backward` computes, to the last bit; a second time as well."""
    for num_classes in (40, 9001):
        leaf = torch.randn(3, num_classes, requires_grad=True)
        labels = torch.tensor([0, 1, -100])
        result = loss(leaf, labels, ignore_index=-100)
        (at_once,) = torch.autograd.grad(result, leaf, retain_graph=True)
        (again,) = torch.autograd.grad(result, leaf, retain_graph=True)
        (twice,) = torch.autograd.grad(2 * result, leaf)
        assert torch.equal(at_once, again)
        assert torch.equal(2 * at_once, twice)


def test_a_gradient_that_is_written_is_left_alone() -> None:
    """With an upstream gradient of 1 the kernel of `backward` neither reads the logits nor writes."""

    def forward_and_spoil(launch: Launch) -> None:
        interpret(launch)
        if launch.name == "forward":
            launch.arguments["gradient"].fill_(5)

    leaf = torch.randn(3, 40, requires_grad=True)
    with on_pretended_gpu(forward_and_spoil):
        result = label_smoothed_cross_entropy(leaf, torch.tensor([0, 1, 2]))
        (untouched,) = torch.autograd.grad(result, leaf, retain_graph=True)
        (scaled,) = torch.autograd.grad(3 * label_smoothed_cross_entropy(leaf, torch.tensor([0, 1, 2])), leaf)
    assert (untouched == 5).all()
    assert (scaled.abs() < 3).all()


def test_a_gradient_that_nobody_asks_for() -> None:
    """None is computed with the loss; nor is one in float16, which would lose what a loss scale keeps."""
    leaf = torch.zeros(3, 40, requires_grad=True)
    labels = torch.tensor([0, 1, 2])
    with on_pretended_gpu() as started:
        with torch.no_grad():
            label_smoothed_cross_entropy(leaf, labels)
        label_smoothed_cross_entropy(leaf.detach(), labels)
        label_smoothed_cross_entropy(leaf.half(), labels)
        label_smoothed_cross_entropy(leaf, labels, reduction="none")
        label_smoothed_cross_entropy(leaf, labels)
    gradients = [each.arguments["gradient"] is not None for each in started if each.name == "forward"]
    assert gradients == [False, False, False, False, True]


@pytest.mark.parametrize("name", ["labels", "where", "logits", "class_weight", "denominator"])
def test_what_is_changed_before_backward(name: str) -> None:
    given = {
        "logits": torch.randn(3, 40, requires_grad=True) * 1,
        "labels": torch.tensor([0, 1, 2]),
        "where": torch.tensor([True, True, False]),
        "class_weight": torch.ones(40),
        "denominator": torch.tensor(2.0),
    }
    result = loss(**given)
    with torch.no_grad():
        given[name].fill_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def test_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one program adds up: torch does, with the same result."""
    leaf, labels = torch.randn(50, 8, requires_grad=True), torch.arange(50) % 8
    weighted = {"class_weight": torch.linspace(0.5, 2, 8), "ignore_index": 3}
    divided = [{"denominator": torch.tensor(value)} for value in (3.0, 0.0)]
    plain = [{}, {"ignore_index": 3}, {"where": labels > 1, "ignore_index": 3}, {"reduction": "sum"}]
    for options in (*plain, weighted, *divided):
        expected = loss(leaf, labels, **options)
        (gradient,) = torch.autograd.grad(expected, leaf)
        with monkeypatch.context() as patched:
            patched.setattr(launch, "_MOST_ROWS", 40)
            found = loss(leaf, labels, **options)
            torch.testing.assert_close(found, expected, rtol=2**-21, atol=0)
            assert torch.equal(torch.autograd.grad(found, leaf)[0], gradient)


VALUES = [3.0, np.float32(3), torch.tensor(3.0), torch.tensor(3), torch.tensor(3.0, dtype=torch.float64)]


@pytest.mark.parametrize("value", VALUES, ids=["number", "NumPy's", "float32", "int64", "float64"])
@pytest.mark.parametrize("num_classes", [40, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_denominator(value: Any, num_classes: int, dtype: torch.dtype) -> None:
    """Of any dtype: the loss is the quotient, rounded once, and so is the gradient of a power of 2."""
    leaf, labels = torch.randn(3, num_classes, dtype=dtype, requires_grad=True), torch.tensor([0, 1, -100])
    total = loss(leaf, labels, ignore_index=-100, reduction="sum")
    (of_total,) = torch.autograd.grad(total, leaf)
    assert torch.equal(loss(leaf, labels, ignore_index=-100, denominator=value), total / 3)
    found = loss(leaf, labels, ignore_index=-100, denominator=value + 1)
    assert torch.equal(found, total / 4)
    assert torch.equal(torch.autograd.grad(found, leaf)[0], of_total / 4)


@pytest.mark.parametrize("num_classes", [40, 9001])
@pytest.mark.parametrize("options", [{"denominator": torch.tensor(0.0)}, {"class_weight": torch.tensor(0.0)}])
def test_a_denominator_of_0(options: dict[str, Any], num_classes: int) -> None:
    """Loss and gradient are 0, whatever the logits and labels; but weights of 0 do not make a bad label count less."""
    if "class_weight" in options:
        options = {"class_weight": options["class_weight"].expand(num_classes).contiguous()}
    logits = torch.randn(4, num_classes)
    logits[0, 1], logits[1] = torch.nan, -torch.inf
    leaf = logits.requires_grad_()
    result = loss(leaf, torch.tensor([0, 1, 2, 3]), **options)
    (gradient,) = torch.autograd.grad(2 * result, leaf, retain_graph=True)
    (at_once,) = torch.autograd.grad(result, leaf, create_graph=True)
    assert result == 0
    assert not gradient.any()
    assert not at_once.any()
    of_bad = loss(leaf, torch.tensor([0, 1, 2, num_classes]), **options)
    assert of_bad.isnan() == ("class_weight" in options)


@pytest.mark.parametrize("name", ["denominator", "class_weight"])
def test_what_is_differentiated_takes_another_way(name: str) -> None:
    logits, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    leaf = torch.tensor(2.0) if name == "denominator" else torch.ones(4)
    gradients = []
    for implementation in (None, "reference"):
        given = leaf.clone().requires_grad_()
        with on_pretended_gpu(interpret):
            label_smoothed_cross_entropy(logits, labels, implementation=implementation, **{name: given}).backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients)


def test_memory_after_backward() -> None:
    """A loss that is kept for a log keeps neither the logits nor their gradient."""
    leaf = torch.randn(3, 40, requires_grad=True)
    logits = leaf * 1
    kept = weakref.ref(logits)
    result = loss(logits, torch.tensor([0, 1, 2]))
    result.backward()
    gradient = weakref.ref(leaf.grad)
    del logits
    leaf.grad = None
    assert kept() is None
    assert gradient() is None
    assert result.isfinite()


@pytest.mark.parametrize("num_classes", [40, 9001])
def test_in_place(num_classes: int) -> None:
    logits = torch.randn(3, num_classes)
    (expected,) = torch.autograd.grad(loss(leaf := logits.clone().requires_grad_(), torch.tensor([0, 1, 2])), leaf)
    inner = torch.nn.Parameter(logits.clone()) * 1.0
    memory = inner.data_ptr()
    (gradient,) = torch.autograd.grad(loss(inner, torch.tensor([0, 1, 2]), inplace_backward=True), inner)
    assert gradient.data_ptr() == memory
    assert torch.equal(gradient, expected)


def test_slices_of_wider_logits() -> None:
    """A vocabulary that is padded: the gradient lies where the logits do, and the padding gets none."""
    wide = torch.randn(4, 48, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(wide[:, :37], torch.arange(4)), wide)
    (expected,) = torch.autograd.grad(
        loss(alone := wide[:, :37].detach().clone().requires_grad_(), torch.arange(4)), alone
    )
    assert torch.equal(gradient[:, :37], expected)
    assert not gradient[:, 37:].any()


@pytest.mark.parametrize(
    "make", [lambda: torch.randn(3, 8, 2)[:, :5].movedim(1, -1), lambda: torch.randn(5).expand(6, 5)]
)
def test_other_layouts(make: Any) -> None:
    logits = make()
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    same, leaf = (each.detach().requires_grad_() for each in (logits.contiguous(), logits))
    assert torch.equal(*(torch.autograd.grad(loss(each, labels), each)[0] for each in (same, leaf)))


def test_no_rows() -> None:
    leaf = torch.zeros(0, 5, requires_grad=True)
    result = loss(leaf, torch.zeros(0, dtype=torch.int64))
    result.backward()
    assert result == 0
    assert leaf.grad.shape == (0, 5)


STATISTICS: dict[str, dict[str, Any]] = {
    "plain": {"ignore_index": -100},
    "none": {"reduction": "none", "smoothing": 0.0},
    "capped": {"ignore_index": -100, "z_loss": 0.1, "softcap": 2.0, "where": torch.arange(6) != 1},
    "weighted": {"ignore_index": -100, "class_weight": torch.linspace(0.5, 2, 6)},
    "denominator": {"ignore_index": -100, "denominator": torch.tensor(3)},
    "denominator of 0": {"denominator": torch.tensor(0.0)},
    "masked": {"ignore_index": -100, "class_mask": torch.arange(6) != 5},
}
# The last two rows have a label that is not a class, and a NaN.
SPOILED = torch.cat([LOGITS[:5], torch.where(torch.arange(6) == 1, torch.nan, LOGITS[5:])])
SPOILED_LABELS = torch.where(torch.arange(6) == 4, 6, LABELS)


def statistics_agree(options: dict[str, Any]) -> bool:
    """Whether losses, gradients and statistics are those of the reference, but for roundings."""
    outcomes = []
    for implementation in ("triton", "reference"):
        leaf = SPOILED.clone().requires_grad_()
        loss, stats = label_smoothed_cross_entropy_with_stats(
            leaf, SPOILED_LABELS, implementation=implementation, **options
        )
        outcomes.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf), *stats))
        assert not any(value.requires_grad for value in stats)
    return all(
        one.dtype == other.dtype and torch.allclose(one, other, rtol=2**-48, atol=2**-50, equal_nan=True)
        for one, other in zip(*outcomes, strict=True)
    )


@pytest.mark.parametrize("options", STATISTICS.values(), ids=STATISTICS)
def test_statistics(options: dict[str, Any]) -> None:
    assert statistics_agree(options)


FIELDS = ("nll", "lse", "entropy")


def gradients_agree(case: Case) -> bool:
    """Whether the gradients of the statistics are within their bounds."""
    found = torch_gradients("triton", case)
    truth = truth_and_bounds_of(case, make_adapter("torch-triton").arithmetic)
    return all(agrees(*truth[field], in_rows(case, found[field])) for field in FIELDS)


def assert_statistics_of(case: Case) -> None:
    """Hold the statistics and their gradients against the truth."""
    loss, stats = torch_statistics("triton", case)
    assert_statistics(case, loss, stats, make_adapter("torch-triton").arithmetic)
    assert gradients_agree(case)


@pytest.mark.parametrize("name", [name for name in case_names() if name != "wide"])
def test_differentiable_statistics(name: str) -> None:
    case = make_case(name, "float32")
    if "soft labels" in features(case):
        with pytest.raises(ValueError, match="cannot compute this call"):
            torch_gradients("triton", case)
    else:
        assert_statistics_of(case)


def streamed_statistics() -> list[Case]:
    """Return rows of many classes: plain, capped, with a mask for each, and with all logits very low."""
    case = replace(case_of(3, 2100, "float32"), options={})
    mask = np.random.default_rng(0).random((3, 2100)) < 0.5
    mask[np.arange(3), case.labels] = True
    low = case.logits.copy()
    low[1] = -np.inf
    low[1, [7, 2000]] = -1e34, -2e34
    capped = replace(case, options={"softcap": 5.0})
    labels = np.array([5, 7, 2000])
    return [case, capped, replace(case, class_mask=mask), replace(case, logits=round_to(low, "float32"), labels=labels)]


@pytest.mark.parametrize("number", range(4))
def test_differentiable_statistics_of_streamed_rows(number: int) -> None:
    case = streamed_statistics()[number]
    _, stats = torch_statistics("triton", case)
    assert_entropy(case, stats["entropy"], stats["valid"], make_adapter("torch-triton").arithmetic)
    assert gradients_agree(case)


@pytest.mark.parametrize("num_classes", [6, 2100])
def test_all_gradients_at_once(num_classes: int) -> None:
    """Loss and statistics together, dense and linear, and what is not asked for is not loaded."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in (6, num_classes))
    labels = torch.tensor([0, 4, num_classes, -100, 1, 3])
    mask = torch.rand(6, num_classes, generator=generator) < 0.7
    mask[torch.arange(6), labels.clamp(0, num_classes - 1)] = True
    options: dict[str, Any] = {"ignore_index": -100, "class_mask": mask, "softcap": 3.0, "z_loss": 0.1}
    for used in ({"entropy"}, {"nll", "lse"}, {"loss", *FIELDS}):
        outcomes = []
        for implementation in ("triton", "reference"):
            leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
            for function, given in (
                (label_smoothed_cross_entropy_with_stats, [leaves[0] @ leaves[1].T]),
                (linear_label_smoothed_cross_entropy_with_stats, leaves),
            ):
                loss, stats = function(
                    *given, labels, differentiable=True, reduction="none", implementation=implementation, **options
                )
                parts = {"loss": loss, **stats._asdict()}
                total = sum((parts[name] * torch.linspace(1, 2, 6)).sum() for name in used)
                outcomes.append((implementation, *torch.autograd.grad(total, leaves)))
        for ours, theirs in zip(outcomes[:2], outcomes[2:], strict=True):
            for one, other in zip(ours[1:], theirs[1:], strict=True):
                torch.testing.assert_close(one, other, rtol=2**-40, atol=2**-42, equal_nan=True)


@pytest.mark.parametrize("num_rows", [1, 127, 128, 300])
def test_statistics_of_more_rows_than_a_program_has(num_rows: int) -> None:
    logits = torch.arange(6 * num_rows).reshape(num_rows, 6) % 7 / 8
    labels = torch.arange(num_rows) % 6
    _, stats = label_smoothed_cross_entropy_with_stats(logits, labels, implementation="triton", z_loss=0.1)
    for row in (0, num_rows // 2, num_rows - 1):
        part = slice(row, row + 1)
        _, alone = label_smoothed_cross_entropy_with_stats(
            logits[part], labels[part], implementation="triton", z_loss=0.1
        )
        assert all(torch.equal(of_all[part], of_row) for of_all, of_row in zip(stats, alone, strict=True))


# --- How many operations a GPU gets -----------------------------------------------------------------------------------


class Started(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of torch's operations that start a kernel of a GPU, or wait for one."""

    def __init__(self) -> None:
        """Start with none."""
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation._schema.name.removeprefix("aten::")
        if name not in VIEWS:
            self.names.append(name)
        return operation(*args, **(kwargs or {}))


def started(call: Any) -> tuple[list[str], list[str]]:
    """Return the kernels and torch's operations that a call starts, its gradient included."""
    with on_pretended_gpu(interpret) as launches, Started() as operations:
        call().backward()
    return [each.name for each in launches], operations.names


@pytest.mark.parametrize(
    ("options", "kernels", "operations"),
    [
        ({}, ["forward", "total", "backward"], 1),  # the upstream gradient
        ({"ignore_index": -100}, ["denominator", "forward", "total", "backward"], 1),
        ({"where": torch.ones(64, dtype=torch.bool)}, ["denominator", "forward", "total", "backward"], 1),
        ({"z_loss": 0.1, "softcap": 3.0, "reduction": "sum"}, ["forward", "total", "backward"], 1),
        ({"smoothing": 0.0, "denominator": 3.0}, ["forward", "total", "backward"], 1),
        ({"ignore_index": -100, "denominator": torch.tensor(3.0)}, ["forward", "total", "backward"], 1),
        ({"denominator": torch.tensor(3)}, ["forward", "total", "backward"], 1),
        ({"class_weight": torch.ones(200)}, ["denominator", "forward", "total", "backward"], 2),  # and their sum
        ({"class_weight": torch.ones(200), "denominator": torch.tensor(3)}, ["forward", "total", "backward"], 2),
        ({"class_mask": torch.ones(200, dtype=torch.bool)}, ["forward", "backward"], 38),
        ({"class_weight": torch.ones(200), "convention": "max_sup"}, ["forward", "backward"], 32),
    ],
)
def test_launches(options: dict[str, Any], kernels: list[str], operations: int) -> None:
    leaf, labels = torch.randn(64, 200, requires_grad=True), torch.zeros(64, dtype=torch.int64)
    names, others = started(lambda: label_smoothed_cross_entropy(leaf, labels, **options))
    assert names == kernels
    assert len(others) <= operations, others
    # Nothing waits for the device, or copies a number to it.
    assert not {"_local_scalar_dense", "nonzero", "lift_fresh", "equal", "is_nonzero"} & set(others)


def test_launches_of_statistics() -> None:
    leaf, labels = torch.randn(64, 200, requires_grad=True), torch.zeros(64, dtype=torch.int64)
    names, others = started(lambda: label_smoothed_cross_entropy_with_stats(leaf, labels, ignore_index=-100)[0])
    assert names == ["denominator", "forward", "statistics", "total", "backward"]
    assert others == ["ones_like"]


def test_kernels_of_the_linear_loss() -> None:
    """One kernel for each chunk, from the logits to their gradient in place."""
    hidden, weight = torch.randn(12, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    labels = torch.arange(12)
    names, _ = started(lambda: linear_label_smoothed_cross_entropy(hidden, weight, labels, chunk_size=4))
    assert names == ["forward"] * 3


# --- Kernels that are wrong are rejected ------------------------------------------------------------------------------

MUTANTS = {
    "the largest logit is counted twice": (
        "rests * e + e, rests + e)\n    above = tl.maximum(peaks, z)\n    if GAPS:\n        gaps = gaps + count",
        "rests * e, rests + e)\n    above = tl.maximum(peaks, z)\n    if GAPS:\n        gaps = gaps + count",
    ),
    "gaps are not moved": ("gaps + count * (above - peaks) + (above - raw)", "gaps + (above - raw)"),
    "masked gaps are not moved": ("gaps + masses * (above - peaks) +", "gaps +"),
    "the log of a rounded sum": ("_log1p(rest))", "tl.log(1 + rest))"),
    "lanes are not put in relation": ("rests * scale + tl.where", "rests + tl.where"),
    "no lane is left out": ("tl.where(lane == tl.argmax(peaks, 1)[:, None], 0.0, scale)", "scale"),
    "resident: the largest logit is counted": (
        "+ (tl.sum(tl.where(is_peak, 1.0, 0.0), 1) - 1)",
        "+ tl.sum(tl.where(is_peak, 1.0, 0.0), 1)",
    ),
    "the edge of a row": ("(col >= 0) & (col < num_classes) & reads", "(col >= 0) & (col < num_classes - 1) & reads"),
    "the mask of another class": (
        "class_mask + (row * mask_stride)[:, None] + col",
        "class_mask + (row * mask_stride)[:, None] + (col + 1) % num_classes",
    ),
    "the label's gradient": ("upstream * on\n", "upstream * on * 1.001\n"),
    "the z-loss's slope": ("(2 * z_loss *", "(z_loss *"),
    "the softcap's slope": ("(1 - tanh * tanh)", "(1 - tanh)"),
    "ignored rows": ("counts & (given != ignore_index)\n        is_bad", "counts\n        is_bad"),
    "ignored rows are numbered": ("counts & (given != ignore_index)\n        if counted", "counts\n        if counted"),
    "bad labels": ('tl.where(is_bad, float("nan"), loss)', "loss"),
    "the share of the largest": ("upstream * at_max / number", "upstream * at_max"),
    "the first of the largest": (
        "firsts = tl.where(is_above, col, firsts)",
        "firsts = tl.where(is_above, col + 1, firsts)",
    ),
    "how many are the largest": (
        "tl.where(is_above, 1.0, numbers + equal)",
        "tl.where(is_above, 2.0, numbers + equal)",
    ),
    "their mass": ("tl.where(is_above, weight, top_masses", "tl.where(is_above, weight * 3, top_masses"),
    "no softcap of long rows": (
        "tl.where(valid, _capped(raw, softcap), -_INF)\n    z = ",
        "tl.where(valid, raw, -_INF)\n    z = ",
    ),
    "the divisor of the sum": ("0.0, _quotient(whole, tl.where(", "0.0, whole + 0 * _quotient(whole, tl.where("),
    "the divisor of the gradient": ("tl.where(value == 0, 0.0, share)", "tl.where(value == 0, 0.0, share * 1.001)"),
    "the number of rows": ("sums += tl.where(counts, weight, 0.0)", "sums += weight"),
    "the sum of the labels' weights": ("mask=counts & is_class, other=1)", "mask=counts & (given < 0), other=1)"),
    "the label's weight": ("of_label = of_label * weight.to(DTYPE)", "of_label = of_label + 0 * weight.to(DTYPE)"),
    "the others' weights": ("(tl.load(all_mass) - weight.to(tl.float64))", "(tl.load(all_mass))"),
    "statistics: bad labels": (
        'nll = tl.where(is_bad, float("nan"), log_sum + label_gap)',
        "nll = log_sum + label_gap",
    ),
    "statistics: the gaps": ("_product(target, label_gap) + _product(of_others, gaps)", "_product(target, label_gap)"),
    "statistics: z": ("else z * _of_all(z_loss, DTYPE)", "else lse * _of_all(z_loss, DTYPE)"),
    "statistics: ignored rows": ("tl.store(flags + step + row, counts", "tl.store(flags + step + row, there"),
    "statistics: rows of NaN": ("& (tl.abs(nll) >= 0)", ""),
    "statistics: confidence": ("tl.where(counts, tl.exp(-log_sum), 0.0)", "tl.where(counts, tl.exp(-lse), 0.0)"),
    "entropy: the sum is not moved": ("means * e + moved * (rests + 1)", "means * e + moved"),
    "entropy: the lanes are not moved": ("(means + (peak[:, None] - peaks) * (rests + 1))", "means"),
    "entropy: not divided": (
        "mean_gap = tl.sum(scale * (means + (peak[:, None] - peaks) * (rests + 1)), 1) / (1 + rest)",
        "mean_gap = tl.sum(scale * (means + (peak[:, None] - peaks) * (rests + 1)), 1) / rest",
    ),
    "entropy: low rows": ("tl.where(is_low, 0.0, mean_gap)", "tl.where(is_low, 1.0, mean_gap)"),
    "entropy: resident": ("tl.where(terms == 0, 0.0, terms * gap), 1) / (1 + rest)", "terms * gap, 1)"),
    "statistics: entropy": ("entropy = log_sum + tl.load(", "entropy = tl.load("),
    "statistics: prediction": ("largest, -1), mask=there)", "largest, 0), mask=there)"),
    "slope of nll": ("of_label += tl.load(of_nll", "of_p += tl.load(of_nll"),
    "slope of lse": ("of_p += tl.load(of_lse", "of_gap += tl.load(of_lse"),
    "slope of the mean gap": ("of_p -= of_gap *", "of_p += of_gap *"),
    "slope of the gaps": ("gap_slope[:, None] * tl.minimum(", "0.999 * gap_slope[:, None] * tl.minimum("),
    "slope at the label": ("(of_p + of_gap * tl.minimum(label_gap, _LARGEST_GAP))", "of_p"),
    "a bad label without nll": ("is_bad = is_bad & (row < 0)", "is_bad = is_bad"),
    "statistics: the divisor": ("(tl.zeros([BLOCK], DTYPE) + _share(divisor, DTYPE) != 0)", "there"),
    "what is written already": ("if tl.load(upstream) == 1:", "if tl.load(upstream) != 0:"),
}
NAMED = ("uniform_mean", "dominant", "everything", "bad_labels", "ties_max_sup", "z_loss", "softcap", "ignored")


def confident(case: Case) -> Case:
    """Return a case whose labels have the largest logits by far, without smoothing: its losses are small."""
    logits = case.logits.copy()
    logits[np.arange(len(logits)), case.labels] = round_to(np.array([15.0, 20.0, 30.0]), case.dtype)
    return replace(case, logits=logits, smoothing=0.0)


def some_cases() -> list[Case]:
    streamed = case_of(3, 9001, "float32")
    masked = replace(streamed, class_mask=np.arange(9001) % 7 != streamed.labels.min() % 7 - 1)
    scaled = replace(streamed, upstream=np.array(2.0))
    capped = replace(streamed, options={"reduction": "mean", "softcap": 5.0})
    ties = streamed.logits.copy()
    ties[:, [5, 2000, 9000]] = 12.0
    weight = round_to(np.linspace(0.5, 2, 9001), "float32")
    tied = replace(streamed, logits=ties, class_weight=weight, options={"reduction": "mean", "convention": "max_sup"})
    named = (make_case(name, "float32") for name in NAMED)
    weighted = replace(case_of(3, 40, "float32"), class_weight=round_to(np.linspace(0.5, 2, 40), "float32"))
    return [*named, streamed, masked, scaled, capped, tied, weighted, confident(streamed)]


def finds_the_first() -> bool:
    logits = torch.zeros(1, 9001)
    logits[0, [8000, 9000]] = 1
    _, stats = label_smoothed_cross_entropy_with_stats(logits, torch.tensor([8000]), implementation="triton")
    return bool(stats.correct)


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_kernels_are_rejected(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = MUTANTS[name]
    text = Path(launch.__file__).with_name("gpu.py").read_text()
    assert text.count(old) == 1
    path = tmp_path / "mutant.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec
    assert spec.loader
    mutant = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutant", mutant)
    spec.loader.exec_module(mutant)
    monkeypatch.setattr(launch, "_kernels", lambda: mutant)
    assert not everything_agrees()


def everything_agrees() -> bool:
    """Whether losses, statistics and gradients of some cases are within their bounds."""
    if not all(map(statistics_agree, STATISTICS.values())) or not finds_the_first():
        return False
    named = [make_case(name, "float32") for name in ("bad_labels", "class_mask_of_rows")]
    if not all(map(gradients_agree, (*named, *streamed_statistics()))):
        return False
    return all(compared(case).agrees for case in some_cases())


def test_right_kernels_are_not() -> None:
    assert everything_agrees()
