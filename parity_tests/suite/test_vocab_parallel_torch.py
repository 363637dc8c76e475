"""The vocab-parallel losses of lsce_torch in processes by gloo: truth, errors, collectives."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import lsce_torch
from lsce_torch.errors import MESSAGES
from parity_tests.losses.adapters import operands_of
from parity_tests.losses.sharded_torch import (
    DIVISIONS,
    DTensorAdapter,
    Layout,
    Processes,
    ShardedTorchAdapter,
    joined,
    processes,
    run_on_ranks,
    same,
    slices_of,
)
from parity_tests.losses.workers import WorkerError
from parity_tests.suite import on_ranks
from parity_tests.suite.stats_truth import NAMES, agrees, assert_statistics, factors, in_rows, truth_and_bounds_of
from parity_tests.truth.cases import Case, case_names, make_case, random_case
from parity_tests.truth.comparison import Comparison, against_oracle
from parity_tests.truth.linear_cases import linear_case_names, make_linear_case, with_logits
from parity_tests.truth.oracle import solve
from parity_tests.truth.precision import DTYPES

F32 = np.float32
# Number of ranks, division of the classes, dtype: of every case in `make test`.
QUICK = {
    (2, "even", "float32"),
    (3, "one class, and the rest", "bfloat16"),
    (4, "the first without a class", "float32"),
}
EVERY = [(number, division, dtype) for number in (1, 2, 3, 4) for division in DIVISIONS for dtype in DTYPES]
WAYS = [
    pytest.param(*way, marks=[] if way in QUICK else pytest.mark.distributed, id="-".join(map(str, way)))
    for way in EVERY
]


@cache
def adapter(number: int, division: str = "even", compiled: bool = False) -> ShardedTorchAdapter:
    return ShardedTorchAdapter(number, division, compiled)


def compared(case: Case, loss: ShardedTorchAdapter) -> Comparison:
    return against_oracle(case, solve(case), loss(case), loss.arithmetic)


@pytest.mark.parametrize(("number", "division", "dtype"), WAYS)
def test_against_oracle(number: int, division: str, dtype: str) -> None:
    """Loss and gradient of every case. One test for all: each is a few milliseconds."""
    shares = {}
    for name in case_names():
        if name == "wide" and (number, division) != (4, "even"):
            continue
        comparison = compared(make_case(name, dtype), adapter(number, division))
        assert comparison.agrees, (name, comparison)
        shares[name] = comparison.share
    print("largest share of a bound:", max(shares.values()), "in", max(shares, key=lambda name: shares[name]))
    # A bound that is never used past a few per cent protects nothing.
    assert max(shares.values()) > 0.1


def shape_of_loss(case: Case) -> tuple[int, ...]:
    return () if case.options.get("reduction", "none") != "none" else case.batch_shape


def answers_of(case: Case, loss: ShardedTorchAdapter, function: Callable[..., Any], *more: Any) -> list[Any]:
    """Return what a function of `on_ranks` returns for the slices of a case on each rank."""
    arrays, options = operands_of(case)
    arrays.pop("upstream")
    given = [(options, slices, *more) for slices in slices_of(arrays, case.axis, loss.bounds(case))]
    return run_on_ranks(function, given)


@pytest.mark.parametrize(("number", "division"), [(3, "one class, and the rest"), (4, "the first without a class")])
def test_statistics(number: int, division: str) -> None:
    loss = adapter(number, division)
    for name in case_names():
        if name != "wide":
            case = make_case(name, "float32")
            answers = answers_of(case, loss, on_ranks.statistics)
            stats = {field: same([answer[field] for answer in answers]).numpy().reshape(-1) for field in answers[0]}
            assert_statistics(case, stats.pop("loss").reshape(shape_of_loss(case)), stats, loss.arithmetic)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.distributed)])
def test_gradients_of_statistics(compiled: bool) -> None:
    loss = adapter(2, "one class, and the rest")
    for name in ("softcap", "class_mask_of_groups", "where_soft", "everything") if compiled else NAMES:
        case = make_case(name, "float32")
        answers = answers_of(case, loss, on_ranks.gradients_of_statistics, factors(case), compiled)
        for statistic, (exact, bound) in truth_and_bounds_of(case, loss.arithmetic).items():
            gradient = joined([answer[statistic] for answer in answers], case.axis)
            assert agrees(exact, bound, in_rows(case, gradient.double().numpy())), (name, statistic)


# Each with something that the compiler sees in another way.
COMPILED = ("everything", "class_mask_of_rows", "soft_max_sup", "minus_infinity", "ties_max_sup", "bad_labels")


@pytest.mark.parametrize("division", [
    pytest.param("even", marks=pytest.mark.slow),
    pytest.param("the first without a class", marks=pytest.mark.distributed),
])  # fmt: skip
def test_compiled(division: str) -> None:
    """One graph, with the collectives in it."""
    loss = adapter(2, division, compiled=True)
    for name in COMPILED:
        comparison = compared(make_case(name, "float32"), loss)
        assert comparison.agrees, (name, comparison)


# --- Where things are ----------------------------------------------------------------------------------------------


def spread_out(**fields: Any) -> Case:
    """Return a case of 8 classes, two on each of 4 ranks, and a row for each label."""
    return random_case("float32", np.random.default_rng(0), 8, 8, labels=np.arange(8), **fields)


def test_a_label_on_every_rank() -> None:
    assert compared(spread_out(), adapter(4)).agrees


@pytest.mark.parametrize("kept", [0, 2, 3])
def test_ranks_whose_classes_are_masked_out(kept: int) -> None:
    """Their logits are NaN, as are those of the rows that have their labels there and do not count."""
    mask = np.arange(8) // 2 == kept
    case = spread_out(class_mask=mask, where=mask)
    assert compared(replace(case, logits=np.where(mask & mask[:, None], case.logits, np.nan)), adapter(4)).agrees


def test_masks_of_rows_that_leave_one_rank() -> None:
    mask = np.arange(8) // 2 == np.arange(8)[:, None] // 2
    assert compared(spread_out(class_mask=mask, options={"convention": "non_target"}), adapter(4)).agrees


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ranks_whose_logits_are_minus_infinity(smoothing: float) -> None:
    case = spread_out(smoothing=smoothing)
    logits = np.where(np.arange(8) // 2 == 1, -np.inf, case.logits)
    assert compared(replace(case, logits=logits), adapter(4)).agrees


def test_labels_that_are_bad_on_every_rank() -> None:
    mask = np.arange(8) != 5
    case = spread_out(class_mask=mask, options={"ignore_index": 2})
    labels = np.array([0, -1, 2, 8, 4, 5, 6, 2**40])
    assert compared(replace(case, labels=labels), adapter(4)).agrees


def test_small_losses_of_one_rank_and_of_several() -> None:
    """The largest of all logits, and others as large on other ranks, of which none may be lost in a sum."""
    case = spread_out(smoothing=0.0)
    logits = np.full((8, 8), -30.0)
    logits[np.arange(8), case.labels] = 0.0
    logits[3, 7], logits[4, [0, 7]] = 0.0, -1.0
    assert compared(replace(case, logits=logits), adapter(4)).agrees


def test_rows_in_blocks() -> None:
    """Blocks of rows give what all rows at once give, bit for bit."""
    loss = adapter(2)
    for name in ("everything", "class_mask_of_rows", "ties_max_sup", "soft_clamp", "axis_in_the_middle"):
        case = make_case(name, "float32")
        whole, parts = (answers_of(case, loss, on_ranks.in_blocks, size) for size in (2**20, 15))
        for of_whole, of_parts in zip(whole, parts, strict=True):
            torch.testing.assert_close(of_parts, of_whole, rtol=0, atol=0, equal_nan=True)


def test_gradient_of_the_smoothing() -> None:
    """It is the same on every rank, and that of one process."""
    case = make_case("everything", "float64")
    arrays, options = operands_of(case)
    arrays.pop("upstream")
    found = same(answers_of(case, adapter(3), on_ranks.gradient_of_smoothing))
    tensors = on_ranks.tensors_of(arrays)
    smoothing = tensors["smoothing"].requires_grad_()
    lsce_torch.label_smoothed_cross_entropy(**tensors, **options).backward()
    assert smoothing.grad is not None
    # Ten roundings of numbers of that size.
    assert torch.all(torch.abs(found - smoothing.grad) <= 10 * 2.0**-53 * smoothing.grad.abs().max() * case.num_classes)


def test_func_grad() -> None:
    """torch.func.grad asks for a gradient that could be differentiated again."""
    for name in ("everything", "class_weight"):
        for of_transform, of_backward in answers_of(
            make_case(name, "float32"), adapter(2), on_ranks.functional_gradient
        ):
            assert torch.equal(of_transform, of_backward)


def test_the_default_group() -> None:
    """Without a group the classes are divided over all processes."""
    losses = processes().on_ranks(on_ranks.default_group, [()] * 4)
    logits = torch.tensor([0.0, 1, 1, 2, 2, 3, 3, 4]).repeat(3, 1)
    expected = lsce_torch.label_smoothed_cross_entropy(logits, torch.tensor([0, 3, 7]))
    assert abs(float(same(losses)) - float(expected)) <= 1e-6


# --- Collectives and memory ------------------------------------------------------------------------------------------

FORWARD = {"tell": 1, "reduced": 2}


@pytest.mark.parametrize(("name", "with_stats", "more"), [
    ("everything", False, 0),
    ("everything", True, 1),
    ("ties_max_sup", False, 0),
    ("soft_uniform", False, 0),
    ("soft_clamp", True, 1),
    ("soft_max_sup", False, 1),
    ("class_mask_of_rows", False, 1),
])  # fmt: skip
def test_collectives(name: str, with_stats: bool, more: int) -> None:
    """Two reductions forward, and one for each of a few options; none backward."""
    for forward, backward, _ in answers_of(make_case(name, "float32"), adapter(2), on_ranks.collectives, with_stats):
        assert forward == {**FORWARD, "reduced": FORWARD["reduced"] + more}
        assert backward == {}


def test_what_is_kept_for_backward() -> None:
    """A few numbers for each row, however many classes there are."""
    case = random_case("float32", np.random.default_rng(0), 16, 4000, options={"reduction": "mean"})
    for *_, kept in answers_of(case, adapter(2), on_ranks.collectives, False):
        assert kept <= 16 * 16


# --- The linear layer ------------------------------------------------------------------------------------------------

LINEAR_WAYS = [
    pytest.param(*way, marks=[] if way[:2] == (2, "even") and way[2] != "float64" else pytest.mark.distributed)
    for way in EVERY
    if way[0] > 1
]


@pytest.mark.parametrize(("number", "division", "dtype"), LINEAR_WAYS)
def test_linear(number: int, division: str, dtype: str) -> None:
    """Loss, and the gradients of hidden, weight and bias, of every linear case."""
    loss = ShardedTorchAdapter(number, division, linear=True)
    for name in linear_case_names():
        case = make_linear_case(name, dtype)
        comparison = against_oracle(case, solve(case), loss(case), loss.arithmetic)
        assert comparison.agrees, (name, comparison)


def without_the_middle(smoothing: float, **fields: Any) -> Case:
    """Return a linear case of 11 classes, with labels that are not of the middle four."""
    case = make_linear_case("linear_class_mask", "float32")
    labels = np.where(case.labels // 4 == 1, 0, case.labels)
    return with_logits(replace(case, labels=labels, smoothing=smoothing, **{"class_mask": None, **fields}))


MIDDLE = np.arange(11) // 4 == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("fields", [{"class_mask": ~MIDDLE}, {"bias": np.where(MIDDLE, -1024.0, 0.0)}], ids=str)
def test_linear_ranks_that_have_no_large_logit(fields: dict[str, Any], smoothing: float) -> None:
    """The second of three ranks has all classes masked out, or far below the others."""
    case, loss = without_the_middle(smoothing, **fields), ShardedTorchAdapter(3, linear=True)
    comparison = against_oracle(case, solve(case), loss(case), loss.arithmetic)
    assert comparison.agrees, comparison


def test_linear_ranks_whose_logits_are_minus_infinity() -> None:
    """Without smoothing these classes take no part, as if they were masked out."""
    loss, zero = ShardedTorchAdapter(3, linear=True), np.zeros(11)
    infinite, masked = (
        loss(without_the_middle(0.0, **fields))
        for fields in ({"bias": np.where(MIDDLE, -np.inf, zero)}, {"bias": zero, "class_mask": ~MIDDLE})
    )
    assert infinite.parts.keys() == {"loss", "hidden", "weight", "bias"}
    for part, values in infinite.parts.items():
        assert np.array_equal(values, masked.parts[part]), part


@pytest.mark.parametrize("smoothing", [0.0, 0.125])
def test_linear_ranks_whose_logits_are_at_both_ends_of_the_dtype(smoothing: float) -> None:
    """A largest logit minus another is infinite: the loss is infinite only if that takes part, and never NaN."""
    hidden, weight = np.array([[3e38, 0, 0, 0, *[-3e38] * 4]], F32), np.eye(8, dtype=F32)
    call = {"hidden": hidden, "labels": np.array([0]), "smoothing": np.array(smoothing, F32)}
    arguments = [({**call, "local_weight": part},) for part in np.split(weight, 2)]
    loss, gradient = zip(*processes().on_ranks(on_ranks.linear_with_gradient, arguments), strict=True)
    assert same(loss) == (np.inf if smoothing else 0)
    target = (np.arange(8) == 0) * (1 - smoothing) + smoothing / 8
    assert np.array_equal(same(gradient)[0], (np.arange(8) == 0) - target)  # exact for these numbers


def test_linear_matrix_products() -> None:
    """Four: the logits, these again for the gradient, and the gradients of hidden and weight."""
    for flops in run_on_ranks(on_ranks.linear_flops, [()] * 2):
        assert flops == [2 * 16 * 8 * 32] * 4


@pytest.mark.distributed
def test_compiled_linear() -> None:
    loss = ShardedTorchAdapter(2, "one class, and the rest", compiled=True, linear=True)
    for name in ("linear_everything", "linear_sum", "linear_master_weight_none"):
        case = make_linear_case(name, "float32")
        comparison = against_oracle(case, solve(case), loss(case), loss.arithmetic)
        assert comparison.agrees, (name, comparison)


@pytest.mark.parametrize("name", ["classes_33", "softcap", "ties", "dominant", "where"])
def test_statistics_of_the_linear_loss(name: str) -> None:
    """Those of the logits that it makes, and the gradients through them."""
    case, loss = make_case(name, "float32"), ShardedTorchAdapter(3, linear=True)
    arrays, options = operands_of(case)
    arrays.pop("upstream")
    given = [(number, options, arrays, factors(case)) for number in range(3)]
    answers = run_on_ranks(on_ranks.linear_statistics, given)
    stats = {field: same([answer[0][field] for answer in answers]).numpy().reshape(-1) for field in answers[0][0]}
    assert_statistics(case, stats.pop("loss").reshape(shape_of_loss(case)), stats, loss.arithmetic)
    for statistic, (exact, bound) in truth_and_bounds_of(case, loss.arithmetic).items():
        gradient = same([answer[1][statistic] for answer in answers])
        assert agrees(exact, bound, in_rows(case, gradient.double().numpy())), statistic


def test_messages_of_the_linear_loss() -> None:
    problems = processes().on_ranks(on_ranks.linear_called, [({"labels": np.zeros((4, 3), F32)},), ({},)])
    assert isinstance(problems[0], TypeError)
    assert str(problems[1]) == MESSAGES["rank_failed"][1].format(ranks=[0])
    wider = {"hidden": np.zeros((4, 5), F32), "local_weight": np.zeros((3, 5), F32)}
    for problem in processes().on_ranks(on_ranks.linear_called, [({},), (wider,)]):
        assert "disagree about the number of features: rank 0 has 2, rank 1 has 5." in str(problem)
    for problem in processes().on_ranks(on_ranks.linear_called, [({"bias": np.zeros(4, F32)},)] * 2):
        assert "each device passes the slice of its own classes" in str(problem)
    for problem in processes().on_ranks(on_ranks.linear_transformed, [()] * 2):
        assert "has no transforms of torch.func: use backward()." in str(problem)


# --- DTensors --------------------------------------------------------------------------------------------------------

LAYOUTS: list[Layout] = [
    ((4, "classes"),),
    ((4, "rows"),),
    ((2, "rows"), (2, "classes")),
    ((2, "nothing"), (2, "classes")),
    ((4, "nothing"),),
]
OF_LAYOUTS = [
    pytest.param(layout, dtype, marks=[] if (layout, dtype) == (LAYOUTS[2], "float32") else pytest.mark.distributed)
    for layout in LAYOUTS
    for dtype in ("float32", "bfloat16", "float64")
]


@pytest.mark.parametrize(("layout", "dtype"), OF_LAYOUTS)
def test_dtensors(layout: Layout, dtype: str) -> None:
    """Loss and gradient of every case, whatever a mesh divides. The gradient is placed as the logits are."""
    loss, tried = DTensorAdapter(layout), 0
    for name in case_names():
        case = make_case(name, dtype)
        if name != "wide" and loss.unsupported(case) is None:
            comparison = against_oracle(case, solve(case), loss(case), loss.arithmetic)
            assert comparison.agrees, (name, comparison)
            tried += 1
    assert tried >= len(case_names()) - 2


@pytest.mark.parametrize("soft", [True, False])
def test_dtensors_of_one_class(soft: bool) -> None:
    """All ranks but one of each row have no class."""
    labels = np.ones((6, 1)) if soft else np.zeros(6, int)
    case = Case("one class", "float32", np.arange(6.0)[:, None], labels, options={"reduction": "mean"})
    case = replace(case, where=np.arange(6) != 2)
    assert compared(case, DTensorAdapter(((2, "rows"), (2, "classes")))).agrees


@pytest.mark.parametrize("layout", [
    pytest.param(LAYOUTS[1], marks=pytest.mark.slow),
    pytest.param(LAYOUTS[2], marks=[
        pytest.mark.distributed,
        pytest.mark.skipif(torch.__version__ < "2.10", reason="torch 2.9 places this gradient on every rank"),
    ]),
])  # fmt: skip
def test_compiled_dtensors(layout: Layout) -> None:
    loss = DTensorAdapter(layout, compiled=True)
    for name in ("everything", "class_weight", "bad_labels"):
        case = make_case(name, "float32")
        comparison = against_oracle(case, solve(case), loss(case), loss.arithmetic)
        assert comparison.agrees, (name, comparison)


@pytest.mark.parametrize("name", ["everything", "soft_clamp", "ties", "axis_in_the_middle", "class_mask_of_groups"])
def test_statistics_of_dtensors(name: str) -> None:
    case = make_case(name, "float32")
    arrays, options = operands_of(case)
    arrays.pop("upstream")
    answers = run_on_ranks(on_ranks.statistics_of_dtensor, [(options, arrays, case.axis)] * 4)
    stats = {field: same([answer[field] for answer in answers]).numpy().reshape(-1) for field in answers[0]}
    assert_statistics(case, stats.pop("loss").reshape(shape_of_loss(case)), stats, adapter(4).arithmetic)


def test_labels_and_weights_that_are_dtensors() -> None:
    """They are divided like the logits, and what is whole is divided by the loss."""
    case = make_case("class_weight", "float32")
    arrays, _ = operands_of(replace(case, smoothing=0.1))
    given = tuple(arrays[name] for name in ("logits", "labels", "class_weight"))
    for losses in run_on_ranks(on_ranks.module_of_dtensors, [given] * 4):
        assert torch.equal(*losses)


@pytest.mark.parametrize("how", [
    "dtensor_partial",
    "dtensor_placement",
    "inplace_backward=True",
    "implementation where the classes are divided",
    "labels_shape",
])  # fmt: skip
def test_dtensors_that_are_refused(how: str) -> None:
    for problem in processes().on_ranks(on_ranks.refused_dtensor, [(how,)] * 4):
        assert isinstance(problem, ValueError), problem
        if how in MESSAGES:
            assert str(problem).startswith(MESSAGES[how][1].split("{")[0])
        elif how != "labels_shape":
            assert str(problem) == MESSAGES["dtensor_option"][1].format(name=how)


# --- Errors ----------------------------------------------------------------------------------------------------------

LOGITS, LABELS = np.zeros((4, 3), F32), np.array([0, 1, 2, 0])


def raised(arguments: Sequence[dict[str, Any]], function: Callable[..., Any] = on_ranks.called) -> list[Exception]:
    """Return what a call raises on each rank."""
    answers = processes().on_ranks(function, [(keywords,) for keywords in arguments])
    assert all(isinstance(answer, Exception) for answer in answers), answers
    return answers


def call(**changes: Any) -> dict[str, Any]:
    return {"local_logits": LOGITS, "labels": LABELS, **changes}


MASKS = np.ones(3, bool), np.ones((4, 3), bool)
DIFFERENCES = {
    "the number of rows": call(local_logits=LOGITS[:3], labels=LABELS[:3]),
    "the dtype of the logits": call(local_logits=LOGITS.astype(np.float64)),
    "labels": call(labels=LOGITS),
    "class_mask": call(class_mask=MASKS[0]),
    "convention": call(convention="clamp"),
    "reduction": call(reduction="sum"),
    "bad_labels": call(bad_labels="raise"),
    "subtract_entropy": call(subtract_entropy=True),
    "prior": call(prior=np.full(3, 1 / 6, F32)),
    "class_weight": call(class_weight=np.ones(3, F32)),
    "where": call(where=np.ones(4, bool)),
    "ignore_index": call(ignore_index=-100),
    "softcap": call(softcap=30.0),
    "denominator": call(denominator=np.array(2.0, F32)),
    "z_loss": call(z_loss=1e-4),
    "smoothing": call(smoothing=0.2),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_ranks_that_disagree(name: str) -> None:
    """Each rank raises, and names what differs; the next call is as if nothing had happened."""
    for problem in raised([call(), call(), DIFFERENCES[name]]):
        assert isinstance(problem, ValueError)
        assert str(problem).startswith(f"the ranks of the group disagree about {name}: rank 0 has ")
        assert "rank 2 has" in str(problem)
    assert processes().on_ranks(on_ranks.called, [(call(),)] * 3)[0].isfinite()


WHERE = np.array([True, True, False, True])
SMOOTHINGS = np.array([0.1, 0.2, 0.3, 0.4], F32)
SOFT = {"labels": LOGITS, "reduction": "sum"}


@pytest.mark.parametrize(("ours", "theirs", "words"), [
    ({}, {"local_logits": LOGITS[:3], "labels": LABELS[:3]}, "the number of rows: rank 0 has 4, rank 1 has 3."),
    ({}, {"labels": LOGITS}, "about labels: rank 0 has class indices, rank 1 has class probabilities."),
    ({"class_mask": MASKS[0]}, {"class_mask": MASKS[1]},
     "about class_mask: rank 0 has one for all rows, rank 1 has one for each row."),
    ({}, {"local_logits": LOGITS.astype(np.float64)}, "logits: rank 0 has float32, rank 1 has float64."),
    ({}, {"convention": "clamp"}, "convention: rank 0 has convention='uniform', rank 1 has convention='clamp'."),
    ({"convention": "clamp"}, {"convention": on_ranks.LEAKY},
     f"rank 1 has convention=<one of your own, whose name has the CRC-32 {zlib.crc32(b'leaky')}>."),
    ({}, {"subtract_entropy": True}, "rank 0 has subtract_entropy=False, rank 1 has subtract_entropy=True."),
    ({"ignore_index": 1}, {"ignore_index": 2}, "rank 0 has ignore_index=1, rank 1 has ignore_index=2."),
    ({}, {"ignore_index": -100}, "ignore_index: rank 0 has ignore_index=None, rank 1 has ignore_index=-100."),
    ({"softcap": 10.0}, {"softcap": 30.0}, "softcap: rank 0 has softcap=10, rank 1 has softcap=30."),
    ({}, {"where": np.ones(4, bool)}, "where: rank 0 has where=None, rank 1 has a tensor as where."),
    ({"denominator": 1.0}, {"denominator": 2.0}, "rank 0 has denominator=1, rank 1 has denominator=2."),
    ({}, {"smoothing": 0.25}, "smoothing: rank 0 has smoothing=0.1, rank 1 has smoothing=0.25."),
    ({}, {"smoothing": np.array(0.1, F32)}, "rank 0 has smoothing=0.1, rank 1 has a tensor as smoothing."),
    ({"smoothing": np.array(0.1, F32)}, {"smoothing": SMOOTHINGS},
     "rank 0 has a tensor as smoothing, rank 1 has a tensor of one number for each row as smoothing."),
    # Of tensors of one number, the numbers.
    ({"smoothing": np.array(0.125, F32)}, {"smoothing": np.array(0.25, F32)},
     "smoothing: rank 0 has smoothing=0.125, rank 1 has smoothing=0.25."),
    ({"smoothing": np.array(0.125, F32)}, {"smoothing": np.array(np.nan, F32)}, "rank 1 has smoothing=nan."),
    ({"smoothing": np.array(0.125, F32), **SOFT}, {"smoothing": np.array(0.25, F32), **SOFT},
     "smoothing: rank 0 has smoothing=0.125, rank 1 has smoothing=0.25."),
    ({"denominator": np.array(2)}, {"denominator": np.array(3.0, F32)},
     "denominator: rank 0 has denominator=2, rank 1 has denominator=3."),
    ({"smoothing": SMOOTHINGS}, {"smoothing": SMOOTHINGS[::-1].copy()}, "smoothing: the tensor of rank 1 is not that"),
    ({"smoothing": SMOOTHINGS}, {"smoothing": SMOOTHINGS + F32(1e-7)}, "smoothing: the tensor of rank 1 is not"),
])  # fmt: skip
def test_ranks_with_other_values(ours: dict[str, Any], theirs: dict[str, Any], words: str) -> None:
    """Each rank raises, and says what each has."""
    for problem in raised([call(**ours), call(**theirs)]):
        assert isinstance(problem, ValueError)
        assert words in str(problem)


@pytest.mark.parametrize("changes", [
    {"smoothing": SMOOTHINGS, "denominator": np.array(2.0, F32)},
    {"smoothing": SMOOTHINGS[:1], "ignore_index": 2},
    {"smoothing": SMOOTHINGS[:3, None], "local_logits": np.zeros((3, 3, 4), F32), "axis": 1,
     "labels": np.zeros((3, 4), int), "where": np.ones(4, bool)},
    {"smoothing": np.array(0.2, F32), **SOFT},
])  # fmt: skip
def test_tensors_that_are_the_same(changes: dict[str, Any]) -> None:
    assert same(processes().on_ranks(on_ranks.called, [(call(**changes),)] * 2)).isfinite()


def test_smoothings_of_rows_that_do_not_count_may_differ() -> None:
    other = np.array([0.1, np.nan, 7.0, 0.4], F32)
    counted = {"where": WHERE, "ignore_index": 1}
    arguments = [(call(smoothing=smoothing, **counted),) for smoothing in (SMOOTHINGS, other)]
    assert same(processes().on_ranks(on_ranks.called, arguments)).isfinite()


@pytest.mark.parametrize(("ours", "theirs", "name"), [
    (call(), call(labels=np.array([0, 2, 1, 0])), "labels"),  # the same in another order
    (call(), call(labels=np.array([1, 0, 2, 0])), "labels"),
    (call(), call(labels=np.array([0, 1, 2, 1], np.uint8)), "labels"),
    (call(where=WHERE), call(where=~WHERE), "where"),
    (call(where=WHERE), call(where=WHERE, labels=np.array([0, 1, 2, 1])), "labels"),
])  # fmt: skip
def test_ranks_with_other_rows(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> None:
    for problem in raised([ours, ours, theirs]):
        assert isinstance(problem, ValueError)
        assert str(problem) == MESSAGES["ranks_rows"][1].format(name=name, rank=2)


def test_labels_of_rows_that_do_not_count_may_differ() -> None:
    """So may the dtypes of labels."""
    ours, theirs = call(where=WHERE), call(where=WHERE, labels=np.array([0, 1, 9, 0], np.uint8))
    assert same(run_on_ranks(on_ranks.called, [(ours,), (theirs,)])).isfinite()


@pytest.mark.parametrize(("first", "second"), [
    ({"smoothing": np.array(0.1, F32)}, {"smoothing": np.array(0.2, F32)}),
    ({"smoothing": SMOOTHINGS}, {"smoothing": SMOOTHINGS + F32(0.1)}),
    ({"denominator": np.array(2.0, F32)}, {"denominator": np.array(3.0, F32)}),
])  # fmt: skip
def test_tensors_of_dtensors(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Ranks that divide the classes of the same rows compare them; in this mesh they are 0 and 1, and 2 and 3."""
    (name,) = first
    assert same(processes().on_ranks(on_ranks.dtensor_with, [(first,)] * 4)).isfinite()
    for problem in processes().on_ranks(on_ranks.dtensor_with, [(first,), (second,)] * 2):
        assert f"the ranks of the group disagree about {name}: " in str(problem)


@pytest.mark.parametrize("by_row", [False, True])
def test_labels_of_dtensors_outside_the_mask(by_row: bool) -> None:
    """They weigh 1, so that the mean is NaN and not 0 where all weights are 0."""
    mask = np.ones((4, 6) if by_row else 6, bool)
    mask[..., 0] = False
    options = {"class_weight": np.zeros(6, F32), "class_mask": mask}
    assert all(loss.isnan() for loss in processes().on_ranks(on_ranks.dtensor_with, [(options,)] * 4))


HIDDEN = np.arange(8, dtype=F32).reshape(4, 2)


@pytest.mark.parametrize(("function", "hidden", "number"), [
    (on_ranks.linear_called, lambda hidden: {"hidden": hidden}, 2),
    (on_ranks.gathered_weight, lambda hidden: hidden[:2], 4),
])  # fmt: skip
def test_hidden_is_compared_in_debug_mode(function: Any, hidden: Any, number: int) -> None:
    """Only there, since it may be as large as the logits."""
    ours, theirs = ((hidden(array),) for array in (HIDDEN, HIDDEN + 1))
    different = [ours] * (number - 1) + [theirs]
    assert all(isinstance(loss, torch.Tensor) for loss in processes().on_ranks(function, different))
    debugged = [(function, *arguments) for arguments in [ours] * number]
    assert same(processes().on_ranks(on_ranks.in_debug_mode, debugged)).isfinite()
    debugged = [(function, *arguments) for arguments in different]
    for problem in processes().on_ranks(on_ranks.in_debug_mode, debugged):
        assert str(problem) == MESSAGES["ranks_rows"][1].format(name="hidden", rank=number - 1)


def test_a_rank_whose_call_is_wrong() -> None:
    """It raises its own error, and the others say which rank has failed."""
    problems = raised([call(), call(labels=LABELS[:2]), call()])
    assert "integer labels must have the shape" in str(problems[1])
    assert isinstance(problems[1], ValueError)
    for rank in (0, 2):
        assert isinstance(problems[rank], RuntimeError)
        assert str(problems[rank]) == MESSAGES["rank_failed"][1].format(ranks=[1])


def test_a_rank_that_ends() -> None:
    """The others raise at once, and the next call starts new processes."""
    arguments = [(call(), False), (call(), True), (call(), False)]
    first, second, third = processes().on_ranks(on_ranks.called_or_exit, arguments)
    assert isinstance(second, WorkerError)
    assert str(second) == "process 1 of 3 has ended, with exit code 3"
    for problem in (first, third):
        assert isinstance(problem, RuntimeError)
        assert "Connection" in str(problem)
    assert processes().on_ranks(on_ranks.called, [(call(),)] * 3)[0].isfinite()


@pytest.mark.distributed
def test_a_rank_that_does_not_come() -> None:
    """The others raise after the time-out of the group."""
    few = Processes(seconds=40.0)
    few.on_ranks(on_ranks.called, [(call(),)] * 2)
    first, _ = few.on_ranks(on_ranks.called_late, [(call(), 0.0), (call(), 24.0)])
    few.stop()
    assert isinstance(first, RuntimeError)
    assert "Timed out waiting 20000ms" in str(first)


def test_messages() -> None:
    none = call(local_logits=LOGITS[:, :0])
    for problem in raised([none, none]):
        assert str(problem) == MESSAGES["no_classes_anywhere"][1]
    for problem in raised([call(class_weight=np.ones(4, F32))] * 2):
        assert "each device passes the slice of its own classes" in str(problem)
    for problem in raised([call(prior=np.full(3, 1 / 3, F32))] * 2):
        assert "prior must sum to 1, got a sum of 2" in str(problem)
    for problem in raised([call(labels=np.array([0, 6, 0, 0]), bad_labels="raise")] * 2):
        assert isinstance(problem, IndexError)
        assert "label 6 at index [1] is not one of the classes: expected 0 to 5." in str(problem)
    mask = np.array([True, True, False])
    for problem in raised([call(labels=np.array([0, 1, 3, 5]), class_mask=mask, bad_labels="raise")] * 2):
        assert "label 5 at index [3]" in str(problem)
        assert "inside class_mask" in str(problem)
    for problem in raised([call(group="model")] * 2):
        assert isinstance(problem, TypeError)
        assert str(problem) == MESSAGES["group_type"][1].format(given="str")
    for problem in processes().on_ranks(on_ranks.outside, [()] * 2):
        assert str(problem) == MESSAGES["group_member"][1]


def test_without_a_group() -> None:
    with pytest.raises(RuntimeError) as caught:
        lsce_torch.vocab_parallel_label_smoothed_cross_entropy(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    assert str(caught.value) == MESSAGES["no_group"][1]


@pytest.mark.parametrize("name", ["class_weight", "prior", "labels", "smoothing of soft labels"])
def test_what_takes_no_gradient(name: str) -> None:
    for problem in processes().on_ranks(on_ranks.with_gradient, [(name,)] * 2):
        assert isinstance(problem, ValueError)
        assert str(problem) == MESSAGES["shard_gradient"][1].format(name=name)


@pytest.mark.parametrize(("function", "words"), [
    (on_ranks.mapped, "rule for vmap"),
    (on_ranks.twice, "second derivatives"),
    (on_ranks.forward_mode, "forward mode"),
])  # fmt: skip
def test_transforms_that_are_refused(function: Callable[..., Any], words: str) -> None:
    for problem in processes().on_ranks(function, [()] * 2):
        assert isinstance(problem, RuntimeError), problem
        assert f"the loss of divided classes has no {words}: " in str(problem)
