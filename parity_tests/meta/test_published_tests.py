"""The models of other libraries' tests are right, the page is what they give, the bounds catch what they catch."""

from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from parity_tests.commands.peer_tests import COMMAND, bounds_symbol, generated_markdown, shown_faults
from parity_tests.evidence.pages import replace_block
from parity_tests.faults.dense import FAULTS, evaluate
from parity_tests.meta.running import invoke, run_code
from parity_tests.studies.published_comparisons import PeerTest, Setting, Tolerance, with_reference
from parity_tests.studies.published_tests import PEER_TESTS, _median_of_maximum
from parity_tests.studies.published_verdicts import (
    bounds_reject,
    judge,
    settings_of,
    share_of,
    share_of_tolerance,
    verdicts_on,
)
from parity_tests.truth.cases import Case
from parity_tests.truth.precision import FORMATS

PAGE = Path(__file__).parents[2] / "docs" / "peer-tests.md"
GRADIENT_FAULTS = ("zero_gradient", "zero_non_target_gradient", "unsmoothed_gradient", "gradient_sign")


def peer(name: str) -> PeerTest:
    return next(each for each in PEER_TESTS if each.name == name)


def marks(fault: str, mark: str) -> set[str]:
    return {name for name, verdict in verdicts_on(fault).items() if verdict.mark == mark}


@pytest.mark.slow
def test_page_is_what_the_code_gives() -> None:
    """If it is not: lsce-parity peer-tests --markdown docs/peer-tests.md."""
    page = PAGE.read_text(encoding="utf-8")
    assert replace_block(page, COMMAND, generated_markdown()) == page


@pytest.mark.parametrize("name", [each.name for each in PEER_TESTS])
def test_sound_loss_passes(name: str) -> None:
    """Otherwise the model of the test is wrong. And the bounds, on the same inputs, accept it too."""
    for setting in settings_of(peer(name)):
        assert share_of(setting, None) <= 1, setting.test
        assert not bounds_reject(setting, evaluate(setting.case)), setting.test


@pytest.mark.parametrize("name", [each.name for each in PEER_TESTS if each.name != "T5X"])
def test_every_test_rejects_something(name: str) -> None:
    assert any(verdicts_on(fault)[name].mark == "caught" for fault in FAULTS)


def test_findings_of_the_page() -> None:
    assert marks("other_off", "survives") == {"flash-attn", "apex", "fairseq", "T5X"}
    reduced, with_z_loss = settings_of(peer("TE"))
    for fault in ("other_off", "zero_non_target_gradient"):
        assert share_of(reduced, fault) < 1 < share_of(with_z_loss, fault)
    assert verdicts_on("other_off")["TE"].close
    assert {verdict.share for verdict in (verdicts_on(fault)["T5X"] for fault in FAULTS)} == {0.0}
    caught = {fault for fault in FAULTS if verdicts_on(fault)["torch"].mark == "caught"}
    survives = {fault for fault in FAULTS if verdicts_on(fault)["torch"].mark == "survives"}
    assert (survives, caught & {"other_off", *GRADIENT_FAULTS}) == ({"maximum_kept"}, {"other_off", *GRADIENT_FAULTS})


def test_cosine_similarity_of_the_page() -> None:
    """The gradients of e/K and of e/(K-1) point the same way: 6e-11 short of 1."""
    case = replace(settings_of(peer("flash-attn"))[0].case, dtype="float64")
    first, second = (evaluate(case, fault).gradient.ravel() for fault in (None, "other_off"))
    cosine = first @ second / np.sqrt((first @ first) * (second @ second))
    assert f"{1 - cosine:.0e}" == "6e-11"


@pytest.mark.parametrize("fault", GRADIENT_FAULTS)
def test_what_looks_at_the_loss_alone_sees_no_gradient(fault: str) -> None:
    blind = {each.name for each in PEER_TESTS if not any(setting.gradient for setting in settings_of(each))}
    assert len(blind) == 7
    assert marks(fault, "survives") == blind


def test_bounds_catch_what_any_of_these_tests_catches() -> None:
    """On the inputs of that very test, but for one."""
    assert len(shown_faults()) > 30
    assert {fault for fault in shown_faults() if bounds_symbol(fault) != "✓"} == set()
    every = {(fault, name): verdict for fault in FAULTS for name, verdict in verdicts_on(fault).items()}
    missed = {pair for pair, verdict in every.items() if verdict.mark == "caught" and not verdict.ours}
    # A loss that is 3e-6 of itself too small: 32320 terms may round to more than that, and apex allows 1.3e-6.
    assert missed == {("label_without_share", "apex")}


@pytest.mark.parametrize("fault", ["other_off", "zero_gradient"])
def test_a_loose_tolerance_lets_a_fault_through(fault: str) -> None:
    sharp = peer("torch")
    loose = Tolerance(0, 1e9)
    settings = tuple(
        replace(setting, loss=setting.loss and loose, gradient=setting.gradient and loose)
        for setting in settings_of(sharp)
    )
    assert judge(sharp, fault).mark == "caught"
    assert judge(replace(sharp, make_settings=lambda: settings), fault).mark == "survives"


def test_shares_are_those_of_numpy() -> None:
    generator, tolerance = np.random.default_rng(0), Tolerance(rtol=1e-2, atol=1e-3)
    decisions = set()
    for _ in range(200):
        expected = generator.normal(size=3)
        actual = expected + generator.normal(size=3) * 5e-3
        within = np.allclose(actual, expected, rtol=tolerance.rtol, atol=tolerance.atol)
        assert (share_of_tolerance(actual, expected, tolerance) <= 1) == within
        decisions.add(within)
    assert decisions == {True, False}


@pytest.mark.parametrize(("actual", "expected", "share"), [
    (np.inf, np.inf, 0.0),
    (-np.inf, np.inf, np.inf),
    (np.inf, 1.0, np.inf),
    (1.0, np.inf, np.inf),
    (np.nan, 1.0, np.inf),
    (0.0, 0.0, 0.0),
    (1e-30, 0.0, np.inf),
])  # fmt: skip
def test_shares_of_special_numbers(actual: float, expected: float, share: float) -> None:
    assert share_of_tolerance(np.array([actual]), np.array([expected]), Tolerance(1e-5, 0)) == share


def test_share_of_nothing_is_nothing() -> None:
    assert share_of_tolerance(np.zeros(0), np.zeros(0), Tolerance(0, 0)) == 0


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_few_rows_stand_for_many(reduction: str) -> None:
    """Of equal rows: the gradient is that of 1024 rows to the last bit, the loss up to the rounding of their sum."""
    rows, many = 4, 1024
    logits, labels = np.array([[0.5, -1.25, 2, 0.125]]), np.array([2])

    def case(count: int) -> Case:
        tiled = np.repeat(logits, count, axis=0)
        return Case("equal", "float32", tiled, np.repeat(labels, count), options={"reduction": reduction})

    few = Setting("equal", "by hand", case(rows), with_reference, rows=many, counted=many)
    whole = Setting("equal", "by hand", case(many), with_reference)
    for fault in (None, "other_off", "base_two"):
        estimate, true = with_reference(few, fault), with_reference(whole, fault)
        for shown, wanted in zip(estimate["gradient"], true["gradient"], strict=True):
            np.testing.assert_array_equal(shown, wanted[:rows])
        for shown, wanted in zip(estimate["loss"], true["loss"], strict=True):
            assert abs(shown - wanted) <= 2 * many * FORMATS["float32"].roundoff * wanted


def test_errors_of_rows_average_out() -> None:
    """A row-wise error of mean 0 shrinks with the root of the number of rows, and a bias stays."""
    generator = np.random.default_rng(0)
    case = Case("rows", "float32", np.zeros((4, 3)), generator.integers(3, size=4), options={"reduction": "mean"})
    few = Setting("rows", "by hand", case, with_reference, rows=4, counted=4)
    logits = replace(case, logits=np.array([[1.0, 0, -1], [-1, 1, 0], [0, -1, 1], [1, 1, -2]]), labels=np.zeros(4, int))

    def error(setting: Setting, fault: str) -> float:
        actual, expected = with_reference(setting, fault)["loss"]
        return float(actual - expected)

    mixed = replace(few, case=logits)
    errors = [error(replace(mixed, counted=count), "unsmoothed_loss") for count in (4, 400)]
    # Both are differences of float64 numbers that are at most 2^10 times as large.
    assert errors[0] == pytest.approx(10 * errors[1], rel=2.0**-40)
    biased = [error(replace(few, counted=count), "base_two") for count in (4, 400)]
    assert biased[0] == biased[1] > 0.4


@pytest.mark.parametrize("count", [1, 1000, 200_000_000])
def test_planted_extremes_are_the_median(count: int) -> None:
    assert NormalDist().cdf(_median_of_maximum(count)) ** count == pytest.approx(0.5, rel=count * 2.0**-50)


def test_command(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text(encoding="utf-8").replace("caught", "seen"), encoding="utf-8")
    before = page.read_text(encoding="utf-8")
    outcome = invoke("peer-tests", "--markdown", str(page))
    assert outcome.exit_code == 0, outcome.output
    assert "zero_non_target_gradient" in outcome.output
    assert page.read_text(encoding="utf-8") == before


@pytest.mark.parametrize("content", [None, "", "no marks", f"<!-- {COMMAND}: begin -->"])
def test_command_needs_a_marked_page(content: str | None, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    if content is not None:
        page.write_text(content)
    outcome = invoke("peer-tests", "--markdown", str(page))
    assert outcome.exit_code == 2
    assert "cannot run" in outcome.output
    assert (page.read_text() if page.exists() else None) == content


def test_no_framework_is_loaded() -> None:
    code = "import sys, parity_tests.commands.peer_tests; assert not {'jax', 'torch'} & set(sys.modules)"
    outcome = run_code(code)
    assert outcome.returncode == 0, outcome.stderr
