"""Losses that no oracle knows: two faithful ports agree, two unfaithful ones do not. Some allow no verdict."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parity_tests.losses.adapters import TorchAdapter
from parity_tests.losses.noisy import noisy
from parity_tests.losses.user_losses import adapt, load_adapter
from parity_tests.meta import losses_brought_to_torch as brought
from parity_tests.meta import losses_that_cancel_in_torch
from parity_tests.meta.running import invoke
from parity_tests.studies.probes import Question, is_edge, plain_cases
from parity_tests.studies.sameness import CONSTANTS, FINE, RecordedRuns, Runs, are_the_same, compare_accuracy
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import AnyResult, make_result
from parity_tests.truth.precision import FORMATS, FloatArray

TORCH = "torch:parity_tests.meta.losses_brought_to_torch:"
JAX = "jax:parity_tests.meta.losses_brought_to_jax:"

# Both sides' losses and arguments, and the options of the command. Half of them have no oracle.
RIGHT = {
    "smoothed": ("smoothed", "smoothed", []),
    "z-loss": ("non_target", "non_target", ["--a", "z=0.001", "--b", "z=0.001"]),
    "focal": ("focal", "focal", []),
    "margin": ("cosine_margin", "cosine_margin", ["--logits-are", "cosines"]),
    "multi-label": ("multi_label", "multi_label", ["--labels-are", "multi_hot"]),
    "distillation": ("distillation", "distillation", ["--labels-are", "logits"]),
}
WRONG = {
    "smoothing": ("smoothed", "smoothed", ["--a", "e=0.2", "--b", "e=0.05"]),
    "convention": ("smoothed", "non_target", []),
    "gamma": ("focal", "focal", ["--b", "gamma=2.1"]),
    "margin": ("cosine_margin", "cosine_margin", ["--logits-are", "cosines", "--b", "margin=0.34"]),
    "multi-label": ("asymmetric", "asymmetric", ["--labels-are", "multi_hot", "--b", "clip=0.04"]),
    "gradient": ("poly", "poly_value_only", []),
}
# Pairs that are quick in float32. The other pairs and dtypes are slow tests.
QUICK = ("focal", "gamma")


def each_pair(pairs: dict[str, tuple[str, str, list[str]]]) -> pytest.MarkDecorator:
    """Parametrize a test with the names of some pairs, and with dtypes."""
    return pytest.mark.parametrize(("name", "dtype"), [
        pytest.param(name, dtype, marks=[pytest.mark.slow] * (dtype != "float32" or name not in QUICK))
        for name in pairs
        for dtype in ("float32", "bfloat16")
    ])  # fmt: skip


@pytest.fixture
def _as_users_set_jax() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@each_pair(RIGHT)
@pytest.mark.usefixtures("_as_users_set_jax")
def test_faithful_ports_agree(name: str, dtype: str) -> None:
    first, second, options = RIGHT[name]
    outcome = invoke("compare", TORCH + first, JAX + second, "--classes", "10", "--dtype", dtype, *options)
    assert outcome.exit_code == 0, outcome.output
    assert "AGREE in " in outcome.output


@each_pair(WRONG)
@pytest.mark.usefixtures("_as_users_set_jax")
def test_unfaithful_ports_do_not(name: str, dtype: str) -> None:
    first, second, options = WRONG[name]
    outcome = invoke("compare", TORCH + first, JAX + second, "--classes", "10", "--dtype", dtype, *options)
    assert outcome.exit_code == 1, outcome.output
    assert "function: DIFFERENT" in outcome.output
    said = {"margin": "", "multi-label": "", "gradient": "held constant by stop_gradient in "}
    assert said.get(name, "they differ in the ") in outcome.output


# --- The rule itself, in torch alone ----------------------------------------------------------------------------------

Loss = Callable[[Tensor, Tensor], Tensor]
KINDS: dict[str, dict[str, Any]] = {
    "cosine_margin": {"logit_kind": "cosines"},
    "multi_label": {"label_kind": "multi_hot"},
    "asymmetric": {"label_kind": "multi_hot"},
    "distillation": {"label_kind": "logits"},
}
REDUCTIONS = {"focal": "none", "multi_label": "elements"}
NAMES = ("smoothed", "non_target", "focal", "poly", "hinge", *KINDS)


def adapter_of(loss: Loss) -> TorchAdapter:
    adapter = TorchAdapter()
    adapter.take(lambda logits, labels, **_: loss(logits, labels))
    return adapter


@cache
def cases_of(name: str, num_classes: tuple[int, ...] = (10,)) -> tuple[Case, ...]:
    question = Question(num_classes=num_classes, **KINDS.get(name, {}))
    reduction = REDUCTIONS.get(name, "mean")
    return tuple(replace(case, options={"reduction": reduction}) for case in plain_cases(question, "float32"))


def run(adapter: Any, name: str = "smoothed") -> Runs:
    return Runs(adapter, cases_of(name), lambda case: not is_edge(case))


class Changed:
    """A loss whose results are changed."""

    def __init__(self, adapter: TorchAdapter, change: Callable[[dict[str, FloatArray]], None]) -> None:
        self.adapter, self.change = adapter, change
        self.name, self.framework, self.device, self.arithmetic = (
            "changed",
            adapter.framework,
            "cpu",
            adapter.arithmetic,
        )

    def unsupported(self, case: Case) -> str | None:
        return self.adapter.unsupported(case)

    def __call__(self, case: Case) -> AnyResult:
        result = self.adapter(case)
        parts = {part: values.copy() for part, values in result.parts.items()}
        self.change(parts)
        return make_result(parts, result.dtypes)


def entry(parts: dict[str, FloatArray]) -> None:
    """Change the gradient's entry of median size; tiny entries are not considered."""
    gradient = parts["gradient"]
    sizes = np.where(np.isfinite(gradient), np.abs(gradient), 0)
    large = np.flatnonzero(sizes > 1e-3 * sizes.max())
    gradient.flat[large[np.argsort(sizes.flat[large])[len(large) // 2]]] *= 1.01


def one_class(parts: dict[str, FloatArray]) -> None:
    parts["gradient"][:, 1] *= 1.01


def one_row(parts: dict[str, FloatArray]) -> None:
    parts["gradient"][-1] *= 1.01


def whole_gradient(parts: dict[str, FloatArray]) -> None:
    parts["gradient"] *= 1.01


def value(parts: dict[str, FloatArray]) -> None:
    parts["loss"] *= 1.01


def a_millionth(parts: dict[str, FloatArray]) -> None:
    parts["loss"] *= 1 + 1e-6


def a_thousandth(parts: dict[str, FloatArray]) -> None:
    parts["gradient"] *= 1 + 1e-3


CHANGES = (entry, one_class, one_row, whole_gradient, value, a_millionth)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name != "hinge")) for name in NAMES
])  # fmt: skip
def test_the_power_of_the_rule(name: str) -> None:
    """1 % in one entry, one class, one row, the gradient alone, the value alone.

    A millionth of the value might be a constant in float32, and is said to be.
    """
    loss = adapter_of(getattr(brought, name))
    runs = run(loss, name)
    unchanged = are_the_same(runs, run(Changed(loss, lambda parts: None), name))
    assert unchanged.same
    largest = max(each.comparison.share for each in unchanged.differences)
    shares = {}
    for change in CHANGES:
        found = are_the_same(runs, run(Changed(loss, change), name))
        assert found.same is (change is a_millionth), change.__name__
        assert found.constants is (change is a_millionth), change.__name__
        shares[change.__name__] = max(each.comparison.share for each in found.differences if each.comparison.worst)
    print(name, f"unchanged {largest:.1g}, sees {unchanged.sees:.1g};", {key: f"{x:.0e}" for key, x in shares.items()})


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


def in_float32(logits: Tensor, labels: Tensor) -> Tensor:
    return brought.smoothed(logits.float(), labels)


def in_bfloat16(logits: Tensor, labels: Tensor) -> Tensor:
    return brought.smoothed(logits.bfloat16(), labels)


def with_a_constant_in_float32(logits: Tensor, labels: Tensor) -> Tensor:
    e = torch.tensor(0.1, dtype=torch.float32).double()
    log_p = F.log_softmax(logits, -1)
    return -((1 - e) * log_p.gather(1, labels[:, None])[:, 0] + e * log_p.mean(-1)).mean()


def with_another_smoothing(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=0.1001)


def with_dropout(logits: Tensor, labels: Tensor) -> Tensor:
    return smoothed(F.dropout(logits, 0.1), labels)


def with_nan(logits: Tensor, labels: Tensor) -> Tensor:
    return smoothed(logits, labels) * float("nan")


def test_a_loss_that_computes_in_float32_shows_itself() -> None:
    plain = run(adapter_of(smoothed))
    found = are_the_same(plain, run(adapter_of(in_float32)))
    assert found.same
    assert found.precisions == ("float64", "float32")
    assert found.why == "to the rounding of float32"
    assert are_the_same(run(adapter_of(with_another_smoothing)), run(adapter_of(in_float32))).same is False


def test_a_loss_that_computes_in_bfloat16_gets_no_verdict() -> None:
    runs = run(adapter_of(in_bfloat16))
    found = are_the_same(run(adapter_of(smoothed)), runs)
    assert found.same is None
    assert found.precisions == ("float64", "bfloat16")
    assert found.sees > FINE
    assert found.why.startswith("the rounding of bfloat16 explains differences of up to ")
    # What rounding to bfloat16 does not explain is seen all the same.
    assert are_the_same(run(adapter_of(lambda z, y: 2 * smoothed(z, y))), runs).same is False


def test_a_constant_in_float32_is_no_other_function() -> None:
    found = are_the_same(run(adapter_of(smoothed)), run(adapter_of(with_a_constant_in_float32)))
    assert found.same
    assert found.constants
    assert found.why == CONSTANTS
    assert are_the_same(run(adapter_of(smoothed)), run(adapter_of(with_another_smoothing))).same is False


# --- Operations in the middle ----------------------------------------------------------------------------------------

CANCEL = {
    "unlikelihood": {},
    "hellinger": {},
    "flat_focal": {},
    "asymmetric": {"label_kind": "multi_hot"},
    "arc_margin": {"logit_kind": "cosines"},
    "entropy_bonus": {},
    "poisson": {},
    "gap_of_sums": {},
}
# Ports of these differ by more than moved logits explain, also in ordinary cases.
BEYOND_LOGITS = {"hellinger", "flat_focal", "asymmetric", "gap_of_sums"}


def runs_of_ports(name: str) -> tuple[Runs, Runs]:
    question = Question(num_classes=(2, 10) if name == "asymmetric" else (10,), **CANCEL[name])
    cases = [replace(case, options={"reduction": "mean"}) for case in plain_cases(question, "float32")]
    first, second = (
        Runs(
            load_adapter(f"{framework}:parity_tests.meta.losses_that_cancel_in_{framework}:{name}", {}), cases, is_plain
        )
        for framework in ("torch", "jax")
    )
    return first, second


def jax_hellinger(logits: jax.Array, labels: jax.Array) -> jax.Array:
    own = jax.numpy.take_along_axis(jax.nn.softmax(logits), labels[:, None], axis=-1)
    return jax.numpy.sqrt(jax.numpy.maximum(1 - own, 1e-12)).mean()


def test_noise_is_that_of_the_formula_in_both_frameworks() -> None:
    """Where a loss is small, that of a probability near 1: many times the rounding of the value."""
    (case,) = [case for case in cases_of("smoothed") if case.name.startswith("small loss")]
    case = replace(case, dtype="float64")
    largest = {}
    for framework, loss in (("torch", losses_that_cancel_in_torch.hellinger), ("jax", jax_hellinger)):
        call = noisy(adapt(loss, framework, framework, {}), case)
        assert call is not None
        still, moved = call(0.0, 0), [call(2.0**-51, seed) for seed in range(4)]
        largest[framework] = max(float(np.abs(each.parts["loss"] - still.parts["loss"])) for each in moved)
        assert largest[framework] > 1e3 * 2.0**-52 * float(still.parts["loss"])
    assert 0.1 < largest["torch"] / largest["jax"] < 10


def changed_runs(runs: Runs, change: Callable[[dict[str, FloatArray]], None]) -> RecordedRuns:
    """Return runs with changed results that move as the others do."""
    results: list[AnyResult | str] = []
    for result in runs.results:
        assert not isinstance(result, str)
        parts = {part: values.copy() for part, values in result.parts.items()}
        change(parts)
        results.append(make_result(parts, result.dtypes))
    roundoffs = [FORMATS[name].roundoff for name in ("float64", "float32")]
    return RecordedRuns(
        runs.adapter,
        runs.cases,
        is_plain,
        runs.dtype,
        results=results,
        moved={(i, each): runs.moved(i, each) for i in range(len(results)) for each in roundoffs},
        noise=runs._noise,
        precision=runs.precision,
        random=False,
    )


def is_plain(case: Case) -> bool:
    return not is_edge(case)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name != "asymmetric")) for name in CANCEL
])  # fmt: skip
@pytest.mark.usefixtures("_as_users_set_jax")
def test_ports_that_round_otherwise_in_the_middle_agree(name: str) -> None:
    first, second = runs_of_ports(name)
    found = are_the_same(first, second)
    print(name, f"sees {found.sees:.1g}", max(each.comparison.share for each in found.differences))
    assert found.same
    assert found.why == "to the rounding of float64"
    # One per cent, and less, is seen all the same; moved logits alone tell right ports apart.
    for change in (whole_gradient, value, one_row, a_thousandth):
        assert are_the_same(first, changed_runs(second, change)).same is False, change.__name__
    for each in (first, second):
        each._noise = {i: {part: 0 * values for part, values in parts.items()} for i, parts in each._noise.items()}
    by_logits = are_the_same(first, second)
    assert (by_logits.why != found.why) == (name in BEYOND_LOGITS)


@pytest.mark.parametrize(("loss", "why"), [
    (with_dropout, "B is random: two calls with the same inputs differ"),
    (with_nan, "B has no finite loss in any ordinary case"),
])  # fmt: skip
def test_what_cannot_be_said(loss: Loss, why: str) -> None:
    found = are_the_same(run(adapter_of(smoothed)), run(adapter_of(loss)))
    assert found.same is None
    assert found.why == why


def test_elements_at_a_corner_are_left_out() -> None:
    """Ports may take either slope at the corner of a hinge, and nowhere else."""

    def other_slope(logits: Tensor, labels: Tensor) -> Tensor:
        gaps = 1 - logits.gather(1, labels[:, None]) + logits
        others = ~F.one_hot(labels, logits.shape[-1]).bool()
        return (torch.where(gaps >= 0, gaps, 0) * others).sum(-1).mean() / logits.shape[-1]

    found = are_the_same(run(adapter_of(brought.hinge), "hinge"), run(adapter_of(other_slope), "hinge"))
    assert found.same
    assert found.left_out > 0
    slopes = [run(adapter_of(loss), "hinge").results for loss in (brought.hinge, other_slope)]
    assert any(not np.array_equal(a.parts["gradient"], b.parts["gradient"]) for a, b in zip(*slopes, strict=True))  # type: ignore[union-attr]


def test_a_loss_that_is_less_accurate_is_named() -> None:
    def rough(logits: Tensor, labels: Tensor) -> Tensor:
        log_p = torch.log(torch.softmax(logits + 1000, -1))
        return -(0.9 * log_p.gather(1, labels[:, None])[:, 0] + 0.1 * log_p.mean(-1)).mean()

    ordinary = [case for case in cases_of("smoothed") if not is_edge(case)]
    adapters = [adapter_of(loss) for loss in (smoothed, rough, rough)]
    runs = [Runs(adapter, ordinary, lambda case: True) for adapter in adapters]
    narrow = [[adapter(case) for case in ordinary] for adapter in adapters]
    arithmetic = (Arithmetic(), Arithmetic())
    for pair, less_accurate in (((0, 1), "B"), ((1, 0), "A"), ((1, 2), ""), ((0, 0), "")):
        both, results = (runs[pair[0]], runs[pair[1]]), (narrow[pair[0]], narrow[pair[1]])
        assert are_the_same(*both).same
        found = compare_accuracy(both, results, "float32", arithmetic)
        assert found.less_accurate == less_accurate
        assert all(each.agrees for each in found.differences) is not bool(less_accurate)
