"""Means of rows that are divided over microbatches and processes: those of all rows, by `mean_denominator`."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lsce_jax
import lsce_torch
from lsce_spec import mean_denominator
from parity_tests.losses.adapters import Adapter, JaxAdapter, TorchAdapter, operands_of
from parity_tests.losses.rows_divided import RowsOnRanks, as_mean, denominator_of, in_microbatches
from parity_tests.losses.sharded import on_shards
from parity_tests.losses.sharded_torch import DIVISIONS, run_on_ranks
from parity_tests.suite import on_ranks
from parity_tests.truth.cases import Case, case_names, make_case
from parity_tests.truth.comparison import Comparison, against_oracle
from parity_tests.truth.linear_cases import linear_case_names, make_linear_case
from parity_tests.truth.oracle import solve

PACKAGES: dict[str, Any] = {"jax": lsce_jax, "torch": lsce_torch}
ADAPTERS: dict[str, Callable[..., Any]] = {"jax": JaxAdapter, "torch": TorchAdapter}
LABELS = np.array([[0, 2, -100, 1], [-100, -100, -100, 4]])
WEIGHTS = np.array([0.5, 1.0, 2.0, 4.0], np.float32)
MICROBATCHES = 3


def as_array(framework: str, value: Any) -> Any:
    return torch.as_tensor(value) if framework == "torch" else jnp.asarray(value)


def mean_cases(dtype: str, names: list[str], make: Callable[[str, str], Case]) -> list[Case]:
    cases = [as_mean(make(name, dtype)) for name in names if name != "wide"]
    return [case for case in cases if case is not None]


def compared(case: Case, loss: Adapter) -> Comparison:
    return against_oracle(case, solve(case), loss(case), loss.arithmetic)


def assert_agrees(cases: list[Case], loss: Adapter) -> None:
    """Loss and gradient of every case are within the bounds of one device."""
    shares = {}
    for case in cases:
        comparison = compared(case, loss)
        assert comparison.agrees, (case.name, comparison)
        shares[case.name] = comparison.share
    # A bound that is never used past a few per cent protects nothing.
    assert max(shares.values()) > 0.1


# --- What it returns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", PACKAGES)
@pytest.mark.parametrize("dtype", ["int64", "int8", "uint16"])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("where", [None, np.array([[True], [False]]), np.array(False)])
def test_against_the_specification(framework: str, dtype: str, weights: Any, where: Any) -> None:
    """A label that is no class counts, and has the weight 1."""
    labels = np.abs(LABELS) % 5
    given = {"where": where, "class_weight": weights, "ignore_index": 1}
    arrays = {n: as_array(framework, v) if isinstance(v, np.ndarray) else v for n, v in given.items()}
    denominator = PACKAGES[framework].mean_denominator(as_array(framework, labels.astype(dtype)), **arrays)
    counted = np.broadcast_to(True if where is None else where, labels.shape) & (labels != 1)
    table = None if weights is None else [*weights.tolist(), 1.0]
    assert float(denominator) == mean_denominator(labels.ravel().tolist(), counted.ravel().tolist(), table)
    assert denominator.shape == ()
    assert ("int" in str(denominator.dtype)) == (weights is None)


@pytest.mark.parametrize("framework", PACKAGES)
def test_labels_outside_the_mask(framework: str) -> None:
    """They weigh 1, so that the mean is NaN and not 0 where all weights are 0."""
    package, labels = PACKAGES[framework], as_array(framework, LABELS)
    by_row = np.ones((2, 4, 4), bool)
    by_row[0, 1, 2] = by_row[1, 0, :] = False
    for mask, expected in ((np.array([True, False, True, True]), 0.5 + 2 + 1 + 1), (by_row, 0.5 + 1 + 1 + 1)):
        given = {"ignore_index": -100, "class_mask": as_array(framework, mask)}
        weights = as_array(framework, WEIGHTS)
        assert float(package.mean_denominator(labels, class_weight=weights, **given)) == expected
        assert int(package.mean_denominator(labels, **given)) == 4
        assert float(package.mean_denominator(labels, class_weight=0 * weights, **given)) == 2


class _KnownError(Exception):
    """Ends a loss once its divisor is known."""


def divisor_of_the_loss(framework: str, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]) -> float:
    """Return what the loss of a package divides by."""
    module = lsce_torch.ways if framework == "torch" else lsce_jax.functional
    compute = module.mean_divisor

    def stop(*arguments: Any) -> Any:
        raise _KnownError(compute(*arguments)[1])

    monkeypatch.setattr(module, "mean_divisor", stop)
    with pytest.raises(_KnownError) as known:
        PACKAGES[framework].label_smoothed_cross_entropy(**given, implementation="reference")
    monkeypatch.undo()
    return float(known.value.args[0])


def with_bad_labels(case: Case) -> Case:
    """Return a case with random weights and labels, of which some are no classes or outside a mask."""
    generator = np.random.default_rng(len(case.name))
    num_classes = case.logits.shape[case.axis]
    mask = generator.random(num_classes) < 0.7 if case.class_mask is None and case.prior is None else case.class_mask
    weights = generator.integers(0, 3, num_classes) / 2
    labels = generator.integers(-1, num_classes + 1, case.labels.shape)
    return replace(case, labels=labels, class_mask=mask, class_weight=weights)


@pytest.mark.parametrize("framework", PACKAGES)
def test_what_the_loss_divides_by(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what `mean_denominator` returns, for every option, and for labels that are no classes."""
    cases = mean_cases("float32", case_names(), make_case)
    cases += [with_bad_labels(case) for case in cases if case.labels.dtype.kind != "f"]
    for case in cases:
        arrays, options = operands_of(case)
        given = {name: as_array(framework, value) for name, value in arrays.items() if name != "upstream"}
        given |= {**options, "denominator": None}
        ours = float(denominator_of(PACKAGES[framework], given, case.axis))
        # Without any row the loss divides by 1.
        possible = [ours] if ours else [0, 1]
        assert divisor_of_the_loss(framework, monkeypatch, given) in possible, case.name


@pytest.mark.parametrize("framework", PACKAGES)
@pytest.mark.parametrize("weights", ["float64", "bfloat16"])
def test_dtypes_of_weights(framework: str, weights: str) -> None:
    """The sum has the dtype of the loss: float32 at least."""
    with jax.enable_x64(True):
        given = jnp.ones(5, weights) if framework == "jax" else torch.ones(5, dtype=getattr(torch, weights))
        labels = as_array(framework, LABELS)
        denominator = PACKAGES[framework].mean_denominator(labels, ignore_index=-100, class_weight=given)
    assert str(denominator.dtype).endswith("float64" if weights == "float64" else "float32")
    assert float(denominator) == 4


@pytest.mark.parametrize("framework", PACKAGES)
def test_no_row_counts(framework: str) -> None:
    package = PACKAGES[framework]
    labels = as_array(framework, np.full((2, 3), -100))
    denominator = package.mean_denominator(labels, ignore_index=-100)
    assert int(denominator) == 0
    logits = as_array(framework, np.full((2, 3, 4), np.nan, np.float32))
    options = {"ignore_index": -100, "reduction": "mean", "denominator": denominator}
    assert float(package.label_smoothed_cross_entropy(logits, labels, **options)) == 0
    assert int(package.mean_denominator(labels[:0])) == 0


@pytest.mark.parametrize(("given", "kind", "words"), [
    ({"labels": np.zeros((2, 4), np.float32)}, TypeError, "labels must be class indices, got float32. Each row"),
    ({"labels": LABELS > 0}, TypeError, "labels must "),
    ({"where": np.ones(3, bool)}, ValueError, "where must broadcast to the shape of the losses, [2, 4], got [3]"),
    ({"where": np.ones(4)}, TypeError, "where must be boolean"),
    ({"class_weight": np.ones((2, 2), np.float32)}, ValueError, "class_weight must hold one value per class"),
    ({"class_weight": np.ones(4, int)}, TypeError, "class_weight must"),
    ({"class_mask": np.ones(4)}, TypeError, "class_mask must be boolean"),
    ({"class_mask": np.ones((4, 4), bool)}, ValueError, "class_mask must have shape [4], one mask for all rows"),
    ({"class_mask": np.ones(3, bool), "class_weight": WEIGHTS}, ValueError, "class_mask must have shape [4]"),
    ({"ignore_index": 2**31}, ValueError, "ignore_index"),
    ({"axis": 1}, TypeError, "axis"),
])  # fmt: skip
@pytest.mark.parametrize("framework", PACKAGES)
def test_mistakes(framework: str, given: dict[str, Any], kind: type[Exception], words: str) -> None:
    arrays = {
        n: as_array(framework, v) if isinstance(v, np.ndarray) else v for n, v in ({"labels": LABELS} | given).items()
    }
    with pytest.raises(kind, match=re.escape(words)):
        PACKAGES[framework].mean_denominator(**arrays)


def test_an_axis_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"axis_name='data' names no axis here. Call mean_denominator inside"):
        lsce_jax.mean_denominator(LABELS, axis_name="data")


def test_compiled() -> None:
    options = {"ignore_index": -100, "class_weight": torch.arange(1.0, 6.0)}
    compiled = torch.compile(partial(lsce_torch.mean_denominator, **options), fullgraph=True)
    assert float(compiled(torch.from_numpy(LABELS))) == 1 + 3 + 2 + 5
    traced = jax.jit(
        partial(lsce_jax.mean_denominator, ignore_index=-100, class_weight=np.arange(1.0, 6.0, dtype=np.float32))
    )
    assert float(traced(LABELS)) == 1 + 3 + 2 + 5


# --- Microbatches ---------------------------------------------------------------------------------------------------


def microbatches(framework: str, *, linear: bool = False) -> Any:
    loss = in_microbatches(
        PACKAGES[framework], partial(DIVISIONS["one class, and the rest"], n=MICROBATCHES), linear=linear
    )
    adapter = ADAPTERS[framework](loss, linear=linear, name=f"{framework} in microbatches")
    adapter.arithmetic = on_shards(ADAPTERS[framework](linear=linear).arithmetic, MICROBATCHES)
    return adapter


@pytest.mark.parametrize("framework", [pytest.param("jax", marks=pytest.mark.slow), "torch"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_microbatches(framework: str, dtype: str) -> None:
    assert_agrees(mean_cases(dtype, case_names(), make_case), microbatches(framework))


@pytest.mark.parametrize("framework", [pytest.param("jax", marks=pytest.mark.slow), "torch"])
def test_microbatches_of_the_linear_loss(framework: str) -> None:
    assert_agrees(mean_cases("float32", linear_case_names(), make_linear_case), microbatches(framework, linear=True))


@pytest.mark.parametrize("framework", PACKAGES)
def test_the_mean_of_means_is_noticed(framework: str) -> None:
    case = as_mean(make_case("everything", "float32"))
    assert case is not None
    adapter = microbatches(framework)
    assert compared(case, adapter).agrees
    own = replace(case, options={**case.options, "denominator": float(len(case.labels)) + 0.001})
    assert not against_oracle(case, solve(case), adapter(own), adapter.arithmetic).agrees


# --- Processes ------------------------------------------------------------------------------------------------------

WAYS = [(4, "the first without a class", "float32")]
MORE = [(n, d, t) for n in (2, 3, 4) for d in DIVISIONS for t in ("float64", "float32", "bfloat16")]


@pytest.mark.parametrize(
    ("number", "division", "dtype"),
    [pytest.param(*way, marks=[] if way in WAYS else [pytest.mark.distributed]) for way in MORE],
)
def test_ranks(number: int, division: str, dtype: str) -> None:
    """Even, uneven and empty parts of the rows."""
    assert_agrees(mean_cases(dtype, case_names(), make_case), RowsOnRanks(number, division))


def test_ranks_of_the_linear_loss() -> None:
    cases = mean_cases("float32", linear_case_names(), make_linear_case)
    assert_agrees(cases, RowsOnRanks(3, "one class, and the rest", linear=True))


def test_groups() -> None:
    """None are all processes, () is this one, and of two groups, one is added up after the other."""
    answers = run_on_ranks(on_ranks.denominators, [(LABELS,)] * 4)
    assert answers == [[16, 4, 16, 16]] * 4  # 4 of each rank count


def test_without_a_group() -> None:
    """One process that talks to no other has all rows."""
    assert int(lsce_torch.mean_denominator(torch.from_numpy(LABELS), ignore_index=-100)) == 4


def test_mistakes_of_ranks() -> None:
    for function, arguments, words in (
        (on_ranks.denominator_of_group, (LABELS, "model"), "group must be a torch.distributed.ProcessGroup"),
        (on_ranks.denominator_of_dtensor, (LABELS,), "labels must be the rows of this rank, got a DTensor"),
    ):
        with pytest.raises(ExceptionGroup) as caught:
            run_on_ranks(function, [arguments] * 4)
        assert all(isinstance(problem, TypeError) and words in str(problem) for problem in caught.value.exceptions)
        assert len(caught.value.exceptions) == 4
