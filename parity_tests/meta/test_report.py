"""The web page of a survey: its words, its escapes, what it leaves out, and that nothing in it comes from elsewhere."""

import base64
import hashlib
import math
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from parity_tests.evidence.ledger import Evidence
from parity_tests.losses.adapters import Adapter
from parity_tests.losses.registry import FaultyAdapter, OracleAdapter
from parity_tests.meta.running import run_code
from parity_tests.report import plots as report_plots
from parity_tests.report.disagreements import find_disagreements, find_failures
from parity_tests.report.heat_map import heat_map
from parity_tests.report.page import FILTER, write_report
from parity_tests.report.tables import case_rows, closer_than_peers, ledger, summarize, worst_rows
from parity_tests.report.verdict import Banner
from parity_tests.report.words import PageTable
from parity_tests.studies.survey import Member, Survey, make_cases, survey
from parity_tests.studies.verdicts import Difference, Outcome
from parity_tests.texts import share_text, used_share
from parity_tests.trainings.trajectory import TrajectoryVerdict, compare_trajectories
from parity_tests.truth.cases import Case, case_names, describe_inputs, make_case
from parity_tests.truth.comparison import Comparison, Result, Worst

NAMES = ("uniform_none", "uniform_mean", "classes_7")
DTYPES = ("float32", "bfloat16")
EVIL = "<script>alert('$x_')</script> & \"quotes\""
SECTIONS = {
    "Adapters", "Failures", "Disagreements", "Bound used, case by case", "Errors of the gradient, in scaled ULPs",
    "Cases", "Worst cases", "Worst cases of peers", "Failures of peers", "Trajectory", "Ledger", "Environment",
}  # fmt: skip


class Raising(OracleAdapter):
    """A loss that always raises."""

    name = "raising"

    def __call__(self, case: Case) -> Result:
        """Raise."""
        raise ValueError(EVIL)


class Misshapen(OracleAdapter):
    """A loss that forgets the last class."""

    name = "misshapen"

    def __call__(self, case: Case) -> Result:
        """Return a gradient that is too narrow."""
        result = super().__call__(case)
        return replace(result, gradient=result.gradient[:, :-1])


def survey_of(ours: tuple[Adapter, ...], peers: tuple[Adapter, ...] = (), twins: tuple[str, ...] = ()) -> Survey:
    members = {each.name: Member(each, each in ours) for each in (*ours, *peers)}
    for name, twin in (twins, twins[::-1]) if twins else ():
        members[name] = replace(members[name], twin=twin)
    return survey(members, make_cases(NAMES, DTYPES))


def compared(share: float, **fields: object) -> Comparison:
    """Return a comparison of a given share."""
    worst = Worst("gradient", (0, 1), share, None, 0.0, 1.0, share, {"what": "label is 3"})
    comparison = Comparison({"loss": share / 2, "gradient": share}, worst, ulps=np.array([share]))
    return replace(comparison, **fields)


def outcome(adapter: str, share: float, case: str = "mine", dtype: str = "float32", **fields: object) -> Outcome:
    """Return an outcome of a given share; the status follows from it."""
    comparison = compared(share, **fields)
    return Outcome(adapter, case, dtype, "agree" if comparison.agrees else "disagree", None, comparison)


def made_up(outcomes: list[Outcome], peers: tuple[str, ...] = (), differences: tuple[Difference, ...] = ()) -> Survey:
    """Return a survey of given outcomes."""
    adapters = {}
    for each in outcomes:
        adapters[each.adapter] = FaultyAdapter()
        adapters[each.adapter].name = each.adapter
    return Survey({name: Member(each, name not in peers) for name, each in adapters.items()}, outcomes, [*differences])


def page_of(
    folder: Path,
    found: Survey,
    *,
    evidence: tuple[Evidence, ...] = (),
    environment: dict[str, object] | None = None,
    trajectory: TrajectoryVerdict | None = None,
    notes: tuple[str, ...] = (),
) -> str:
    path = write_report(
        folder / "deep" / "er",
        found,
        title="A title",
        evidence=evidence,
        environment=environment or {},
        trajectory=trajectory,
        notes=notes,
    )
    assert path == folder / "deep" / "er" / "index.html"
    return path.read_text(encoding="utf-8")


def words(page: str) -> str:
    """Return what a person reads, white space made single."""
    body = re.sub(r"<(style|script)>.*?</\1>", " ", page, flags=re.DOTALL).replace("<wbr>", "")
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())


def headings(page: str) -> set[str]:
    return set(re.findall(r"<h2>(.*?)</h2>", page))


def loaded_from_elsewhere(page: str) -> list[str]:
    """Return what a browser would fetch or run, but for the script that filters tables."""
    page = page.replace(f"<script>{FILTER}</script>", "")
    references = re.findall(r"""(?:src|href|action|data|poster|srcset)\s*=\s*["']?(?!data:)[^"'>\s]+""", page)
    return references + re.findall(r"https?:|url\(|@import|<script|<iframe|<object|<embed|<link|<base", page)


GOOD = survey_of((OracleAdapter(), FaultyAdapter()), twins=("numpy", "oracle"))
MUTANT = FaultyAdapter("other_off")
BAD = survey_of((MUTANT, FaultyAdapter(), Raising(), Misshapen()), twins=(MUTANT.name, "numpy"))
DIVERGED = compare_trajectories([2.0, 1.5, 1.2], [2.0, 1.5, 1.3], [[2.0, 1.5001, 1.2]])


# The verdict.


@pytest.mark.parametrize(("found", "says", "not_said"), [
    (GOOD, [
        "AGREE 2 adapters in 3 cases and 2 dtypes (float32, bfloat16): none of 12 results outside of the bounds, none "
        "failed. Largest share of a bound: ",
        "numpy against oracle: within both bounds of each other in 6 of 6",
    ], ["DISAGREE", "At fault"]),
    (BAD, [
        "DISAGREE 4 adapters in 3 cases and 2 dtypes (float32, bfloat16): 12 of 24 results outside of the bounds, 6 "
        "failed. Largest share of a bound: ∞ (misshapen in uniform_none, float32). 6 of 6 pairs differ by more than "
        "both bounds. At fault: mutant:other_off in 6 of 6, raising in 6 of 6, misshapen in 6 of 6.",
        "mutant:other_off is outside of the bounds of the truth, the other is not.",
    ], ["numpy is outside"]),
])  # fmt: skip
def test_the_verdict(tmp_path: Path, found: Survey, says: list[str], not_said: list[str]) -> None:
    page = page_of(tmp_path, found)
    assert f'<div class="verdict {"agree" if found is GOOD else "disagree"}">' in page
    assert [text for text in says if text not in words(page)] == []
    assert [text for text in not_said if text in words(page)] == []
    of_wrong = {"Disagreements", "Failures"} & headings(page)
    assert of_wrong == (set() if found is GOOD else {"Disagreements", "Failures"})
    assert "Worst cases of peers" not in headings(page)


def test_peers_decide_nothing(tmp_path: Path) -> None:
    page = page_of(tmp_path, survey_of((FaultyAdapter(),), (MUTANT, Raising())))
    assert '<div class="verdict agree">' in page
    findings = "What peers get wrong is a finding, not a failure: mutant:other_off in 6 of 6, raising in 6 of 6."
    assert findings in words(page)
    assert "At fault" not in words(page)
    assert {"Worst cases of peers", "Failures of peers"} <= headings(page)
    assert {"Failures", "Disagreements"}.isdisjoint(headings(page))


def test_a_trajectory_decides_too(tmp_path: Path) -> None:
    page = page_of(tmp_path, GOOD, trajectory=DIVERGED)
    assert '<div class="verdict disagree">' in page
    assert "Trainings part at step 2, counted from 0, of 3 steps: difference 0.1, allowed 0.0002." in words(page)


def test_nothing_is_no_agreement(tmp_path: Path) -> None:
    lacking = Outcome("mine", "uniform_none", "float32", "unsupported", "has no softcap")
    for found in (Survey({}, [], []), made_up([lacking]), survey_of((), (MUTANT,))):
        page = page_of(tmp_path, found)
        assert '<div class="verdict nothing">' in page
        assert "AGREE" not in words(page)
    assert "1 call left out" in words(page_of(tmp_path, made_up([lacking])))


# Sections.


EXECUTED = Evidence("a", "cpu", "float32", "executed")
NOTHING = Survey({}, [], [])


@pytest.mark.parametrize(("found", "parts", "shown"), [
    (survey_of((MUTANT, Raising()), (FaultyAdapter("base_two"), Misshapen())),
     {"evidence": (EXECUTED,), "environment": {"python": "3"}, "trajectory": DIVERGED}, SECTIONS),
    (NOTHING, {}, set()),
    (NOTHING, {"trajectory": DIVERGED}, {"Trajectory"}),
    (NOTHING, {"evidence": (EXECUTED,)}, {"Ledger"}),
    (NOTHING, {"environment": {"versions": {"numpy": "2"}}}, {"Environment"}),
])  # fmt: skip
def test_a_section_is_there_if_it_has_something_to_say(
    tmp_path: Path, found: Survey, parts: dict[str, object], shown: set[str]
) -> None:
    page = page_of(tmp_path, found, notes=("A note.",), **parts)
    assert headings(page) == shown
    assert "A note." in words(page)


def test_failures_that_differ_in_numbers_are_one(tmp_path: Path) -> None:
    page = page_of(tmp_path, BAD)
    assert len(re.findall(re.escape("misshapen</span></th><td"), page)) >= 1
    found = find_failures(BAD, ours=True)
    assert [(failure.adapter, failure.times) for failure in found] == [
        ("raising", 6),
        ("misshapen", 4),
        ("misshapen", 2),
    ]
    assert found[1].message == "loss of shape [7], gradient [7, 10]; expected [7], [7, 11]"


def test_the_worst_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    outcomes = [outcome("mine", 2.0 + number, f"case{number}") for number in range(23)]
    page = page_of(tmp_path, made_up(outcomes))
    shown = re.findall(r"<summary><b>(\w+), float32</b>", page)
    assert shown == [f"case{number}" for number in range(22, 2, -1)]
    assert "And 3 more; the list of cases has all." in words(page)
    assert [row[0] for row in worst_rows(made_up(outcomes), ours=True)] == shown[:15]


def test_closer_than_peers_counts_cases_of_both() -> None:
    peers = [outcome("peer", 0.5, case) for case in "abcd"] + [outcome("other peer", 0.9, "c")]
    own = [outcome("mine", share, case) for case, share in zip("abcde", (0.2, 0.5, 0.7, 0.1, 0.1), strict=True)]
    found = made_up([*own, *peers], peers=("peer", "other peer"))
    assert closer_than_peers(found, "mine") == "2 of 4 (1 equal)"
    assert closer_than_peers(made_up(own), "mine") == ""


def test_ledger_puts_the_strongest_first() -> None:
    found = [
        Evidence("b", "tpu", "bfloat16", "compiled", "v5e"),
        Evidence("a", "cpu", "float32", "replayed"),
        Evidence("a", "cpu", "float32", "executed"),
    ]
    table = ledger(found)
    assert table is not None
    assert table.dtypes == ["float32", "bfloat16"]
    assert table.rows == [("a", "cpu", "executed, replayed", "–"), ("b", "tpu", "–", "compiled (v5e)")]
    assert list(table.meanings) == ["executed", "replayed", "compiled"]


# Who is to blame.


DIFFER, OUTSIDE = "a and b differ by {} times the sum of their bounds: ", "outside of the bounds of the truth"


@pytest.mark.parametrize(("shares", "apart", "sentence"), [
    ((3.0, 0.5), 2.0, f"{DIFFER.format('2.00')}a is {OUTSIDE}, the other is not."),
    ((3.0, 4.0), 2.0, f"{DIFFER.format('2.00')}both are {OUTSIDE}."),
    ((3.0, 4.0), 0.2, f"a and b are within both bounds of each other, but both are {OUTSIDE}."),
    ((0.9, 0.9), 1.5, f"{DIFFER.format('1.50')}each is within its own bounds of the truth."),
])  # fmt: skip
def test_blame(tmp_path: Path, shares: tuple[float, float], apart: float, sentence: str) -> None:
    outcomes = [outcome(name, share) for name, share in zip("ab", shares, strict=True)]
    comparison = compared(apart)
    blame = () if comparison.agrees else tuple(each.adapter for each in outcomes if each.status != "agree")
    difference = Difference("mine", "float32", ("a", "b"), comparison, blame)
    text = words(page_of(tmp_path, made_up(outcomes, differences=(difference,))))
    assert sentence in text
    assert ("label is 3" in text) == (max(*shares, apart) > 1)  # the inputs


def test_inputs_are_those_of_the_row() -> None:
    case = make_case("classes_33", "float32")
    inputs = describe_inputs(case, (2, 31))
    shown = ", ".join(f"{value:.7g}" for value in case.logits[2, 28:33])
    assert inputs["logits of row 2"] == f"[{shown}], classes 28 to 32"
    assert inputs["label"] == str(case.labels[2])
    assert case.upstream is not None
    assert inputs["upstream gradient"] == f"{case.upstream[2]:.9g}"
    # The loss of a row is shown with the logits near its label.
    near_label = describe_inputs(case, (2,))["logits of row 2"]
    assert f"{case.logits[2, case.labels[2]]:.7g}" in near_label


@pytest.mark.parametrize("name", [name for name in case_names() if name != "wide"])
def test_inputs_of_every_case(name: str) -> None:
    case = make_case(name, "bfloat16")
    rows = case.rows()
    last = (len(rows.logits) - 1, rows.logits.shape[-1] - 1)
    for index in ((), last[:1], last, (len(rows.logits),)):
        inputs = describe_inputs(case, index)
        assert "smoothing" in inputs


def test_edge_cases_come_last() -> None:
    shares = {"large logits, N = 7, K = 2": 9.0, "plain, N = 7, K = 2": 2.0, "spread, N = 7, K = 2": 3.0}
    found = made_up([outcome("mine", share, case) for case, share in shares.items()])
    assert [case.partition(",")[0] for case, _ in find_disagreements(found)] == ["spread", "plain", "large logits"]


def test_of_two_losses_that_differ_only_the_difference_is_shown(tmp_path: Path) -> None:
    outcomes = [outcome("A", 0.5), outcome("B", 38000.0), outcome("A", 0.5, "other"), outcome("B", 1.5, "other")]
    differences = (
        Difference("mine", "float32", ("A", "B"), compared(19000.0), ("B",)),
        Difference("other", "float32", ("A", "B"), compared(0.9), ()),
    )
    page = write_report(
        tmp_path, made_up(outcomes, differences=differences), title="A title", evidence=[], environment={},
        banner=Banner("DISAGREE", "disagree", []), allowed="what rounding explains",
        findings={"A: torch:one.two": ["    computes: a thing"], "B": []},
    ).read_text(encoding="utf-8")  # fmt: skip
    text = words(page)
    assert "Findings A: torch:one.two computes: a thing B" in text
    assert "mine, float32 : 10^4 times what rounding explains; B is off A and B differ by 10^4 times what" in text
    assert len(re.findall("<summary><b>", page)) == 1
    assert "adapter" not in text.lower()


# Numbers.


@pytest.mark.parametrize(
    "share", [0.0, 1e-9, 0.29, 0.9999999, 1.0, np.nextafter(1, 2), 1.5, 9.991, 99.5, 999.5, 9.5e15, 1e308]
)
def test_share_text_stays_on_its_side_of_one(share: float) -> None:
    text = share_text(share)
    assert len(text) <= 6
    power = text.removeprefix("10^")
    if power != text:
        assert abs(int(power) - math.log10(share)) <= 0.5
        return
    # At worst half of the last digit that is shown; a hundredth next to 1.
    assert (float(text) < 1, float(text) > 1) == (share < 1, share > 1)
    assert abs(float(text) - share) <= max(0.01, share / 20)


def test_a_large_share_is_a_power_of_ten() -> None:
    texts = [used_share(share) for share in (999.0, 3.8e5, 1e12, math.nan)]
    assert texts == ["999 times", "10^6 times", "10^12 times", "∞ times"]
    assert used_share(0.5) == "0.50 of"


def test_nan_shares_count_as_infinite() -> None:
    assert share_text(math.nan) == "∞"
    for part in ("loss", "gradient"):
        found = made_up([outcome("mine", 0.1, shares={"loss": 0.1, "gradient": 0.1, part: math.nan})])
        cell = heat_map(found, ["float32"])[0][0][1][0]
        assert (cell.text, cell.style) == ("∞", "out2")
        assert find_disagreements(found) == [("mine", "float32")]
    without_loss = outcome("mine", 0.1, shares={"loss": math.nan, "gradient": 0.1})
    summary = summarize(made_up([without_loss, outcome("mine", 0.2, "other")]), "mine")
    assert (summary.loss, summary.gradient, summary.where) == ("∞", "0.20", "mine, float32")


def test_infinities_and_nan_break_nothing(tmp_path: Path) -> None:
    worst = Worst("loss", (), math.nan, None, -math.inf, math.nan, math.nan, {})
    ulps = np.array([0.0, math.inf, math.nan, 1e308, 5e-324])
    outcomes = [
        outcome("mine", math.inf, "a", ulps=ulps),
        outcome("mine", math.nan, "b", worst=worst, ulps=np.array([math.nan])),
        outcome("mine", 0.5, "c", worst=None, ulps=np.zeros(0)),
        outcome("mine", 0.5, "d", problem="loss in float16"),
    ]
    page = page_of(tmp_path, made_up(outcomes))
    assert "DISAGREE" in words(page)
    assert "largest error ∞" in words(page)


@pytest.mark.parametrize(("losses", "other", "replica"), [
    ([0.0], [0.0], [0.0]),
    ([1.0, 1.0], [1.0, 1.0], [1.0, 1.0]),
    ([1.0], [2.0], [1.0]),
    ([1.0, 1.0], [1.0, 2.0], [1.0, math.inf]),
    ([math.inf], [1.0], [1.0]),
    ([math.nan, 1.0, math.inf], [1.0, math.nan, 1.0], [math.nan, 1.0, 1.0]),
])  # fmt: skip
def test_trajectories_of_little(tmp_path: Path, losses: list[float], other: list[float], replica: list[float]) -> None:
    page = page_of(tmp_path, Survey({}, [], []), trajectory=compare_trajectories(losses, other, [replica]))
    assert (">AGREE<" in page, ">DISAGREE<" in page) == (losses == other, losses != other)


def test_ulp_bins() -> None:
    ulps = np.array([0.0, 2.0**-9, 2.0**-8, 0.5, 1.0, 1.99, 2.0, 255.9, 256.0, math.inf])
    line = report_plots.ulp_line("float32", [ulps, np.zeros(7)])
    counts = np.zeros(report_plots.ULP_BINS)
    # 0; below 2^-8; then a bin for each doubling from 2^-8 on; 2^8 and more.
    for place in (0, 1, 2, 9, 10, 10, 11, 17, 18, 18):
        counts[place] += 1 / 10
    counts[0] += 1  # the second case, of the same weight
    np.testing.assert_allclose(line.shares, counts / 2, rtol=1e-15)
    assert line.within_half == (0.4 + 1) / 2
    assert line.largest == math.inf
    assert report_plots.ulp_line("float32", [np.array([math.nan, 1.0])]).shares[-1] == 1 / 2
    assert str(line) == "float32: 55% exactly right, 70% within half a ULP, largest error ∞"


# The list of cases.


def test_cases_show_the_worst_of_ours() -> None:
    outcomes = [
        outcome("a", 0.2, "one"),
        outcome("b", 0.4, "one"),
        outcome("peer", 9.0, "one"),
        outcome("a", 3.0, "two"),
        Outcome("b", "two", "float32", "failed", "ValueError: no"),
        Outcome("a", "three", "float32", "unsupported", "has no softcap"),
    ]
    difference = Difference("one", "bfloat16", ("a", "b"), compared(2.0), None)
    rows = case_rows(made_up(outcomes, ("peer",), (difference,)))
    assert [tuple(row) for row in rows] == [
        ("one", "float32", "agrees", "0.40", "b", "gradient[0, 1] 0.4 | true 0"),
        ("two", "float32", "fails", "–", "b", "ValueError: no"),
        ("three", "float32", "not called", "–", "a", "has no softcap"),
        ("one", "bfloat16", "disagrees", "2.00", "a against b", "gradient[0, 1] 2 | true 0"),
    ]


def test_wrong_cases_can_be_told_from_others(tmp_path: Path) -> None:
    page = page_of(tmp_path, BAD)
    rows = re.findall(r"<tr( data-wrong)?>", page.split("<h2>Cases</h2>")[1].split("</table>")[0].split("<tbody>")[1])
    assert rows == [" data-wrong"] * len(NAMES) * len(DTYPES)
    assert "data-wrong" not in page_of(tmp_path, GOOD).replace(FILTER, "")


def test_more_tables_and_a_verdict_of_their_own(tmp_path: Path) -> None:
    """A table of ten rows can be filtered, and rows that do not agree are marked."""
    for number, wrong in ((9, []), (10, []), (10, [False] * 10), (10, [True, *[False] * 8, True])):
        table = PageTable("T", ("name", ">share", "~text"), [["<a>", "1", "b"]] * number, "A note.")
        page = write_report(
            tmp_path, NOTHING, title="A title", evidence=[], environment={}, tables=[table._replace(wrong=wrong)],
            banner=Banner("2 SURVIVE", "disagree", ["A sentence."]),
        ).read_text(encoding="utf-8").replace(FILTER, "")  # fmt: skip
        assert "2 SURVIVE A sentence. T A note." in words(page)
        assert "name share text" in words(page)
        assert page.count("&lt;a&gt;") == number
        assert ('<div class="filter"' in page) == (number == 10)
        assert page.count("<tr data-wrong") == page.count('class="bad-row"') == sum(wrong)
        assert ("only what does not agree" in page) == any(wrong)


# The heat map.


def test_heat_map_shows_the_worst_dtype() -> None:
    outcomes = [
        outcome("a", 9.0, "one"),
        outcome("a", 20.0, "one", "bfloat16"),
        outcome("b", 20.0, "one"),
        Outcome("b", "one", "bfloat16", "failed", "ValueError: no"),
        Outcome("a", "two", "float32", "unsupported", "has no softcap"),
        outcome("b", 0.01, "two", problem="loss in float16"),
    ]
    found = made_up(outcomes)
    everything, narrow = (heat_map(found, dtypes) for dtypes in (DTYPES, ["float32"]))
    styles = {case: [cell.style for cell in cells] for case, cells in everything[0]}
    assert styles == {"one": ["out1", "failed"], "two": ["unsupported", "out2"]}
    assert [cell.text for cell in everything[0][1][1]] == ["–", "form"]
    assert everything[0][0][1][0].words == "float32: 9.00 times the bound; bfloat16: 20 times the bound"
    assert [cell.style for cell in narrow[0][0][1]] == ["out0", "out1"]


def test_one_is_where_the_colour_breaks() -> None:
    for share, style in ((1.0, "in4"), (np.nextafter(1, 2), "out0"), (0.0, "in0"), (math.inf, "out2")):
        cell = heat_map(made_up([outcome("mine", float(share))]), ["float32"])[0][0][1][0]
        assert cell.style == style


def test_heat_map_blocks_hold_every_case_once() -> None:
    for count in (1, 35, 36, 93):
        blocks = heat_map(made_up([outcome("mine", 0.5, str(number)) for number in range(count)]), ["float32"])
        assert [case for rows in blocks for case, _ in rows] == [str(number) for number in range(count)]
        assert max(map(len, blocks)) <= 35


# The plot of two trainings.


def test_steps_are_whole_numbers() -> None:
    axes = report_plots.draw_trajectory(DIVERGED).axes[0]
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


# The file.


class Outline(HTMLParser):
    """What is wrong with a page for a browser, a screen reader or a phone."""

    EMPTY = frozenset({"meta", "wbr", "br", "img", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.problems: list[str] = []
        self.levels, self.headings, self.cells = [0], [], 0
        self.feed(page)
        self.problems += [f"{tag} is left open" for tag in self.open]
        if self.levels.count(1) != 1:
            self.problems.append("not one h1")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the tag."""
        given = dict(attrs)
        if tag not in self.EMPTY:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            if int(tag[1]) > self.levels[-1] + 1:
                self.problems.append(f"{tag} after h{self.levels[-1]}")
            self.levels.append(int(tag[1]))
        if (tag, "lang" in given) == ("html", False) or (tag == "img" and not given.get("alt")):
            self.problems.append(f"{tag} without lang or alt")
        if tag == "input" and "label" not in self.open:
            self.problems.append("an input without a label")
        if tag == "thead":
            self.headings = []
        if tag == "tr":
            self.cells = 0
        if tag in ("td", "th") and "tbody" in self.open:
            self.cells += 1
            if "data-label" in given and given["data-label"] != self.headings[self.cells - 1]:
                self.problems.append(f"a cell of {self.headings[self.cells - 1]} is called {given['data-label']}")

    def handle_endtag(self, tag: str) -> None:
        """Check that it ends the tag opened last."""
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"{tag} ends too early")

    def handle_data(self, data: str) -> None:
        """Note a heading of a column."""
        if self.open and self.open[-1] == "th" and "thead" in self.open:
            self.headings.append(data)


def test_the_page_is_well_formed(tmp_path: Path) -> None:
    tables = [PageTable(EVIL, ("name", ">share", "~text"), [[EVIL, "1", EVIL]] * 10)]
    page = write_report(
        tmp_path, survey_of((MUTANT, Raising()), (FaultyAdapter("base_two"), Misshapen())), title=EVIL,
        evidence=[Evidence("a", "cpu", "float32", "executed")], environment={EVIL: {EVIL: EVIL}}, trajectory=DIVERGED,
        notes=[EVIL], findings={EVIL: [EVIL]}, tables=tables,
    ).read_text(encoding="utf-8")  # fmt: skip
    assert Outline(page).problems == []
    assert len(re.findall("data-label=", page)) > 100
    # Where rows are blocks, `hidden` alone does not hide them.
    assert re.search(r"\.stacks tr\[hidden\][^{}]*\{ display: none; \}", page)


def test_names_break_after_their_separators(tmp_path: Path) -> None:
    page = page_of(tmp_path, made_up([outcome("torch:my.own_losses:focal", 0.5, "a/b 0.25")]))
    assert "torch:my.<wbr>own_<wbr>losses:<wbr>focal</span>" in page
    assert "a/<wbr>b 0.25</span>" in page


def test_everything_is_escaped(tmp_path: Path) -> None:
    wrong = outcome(EVIL, 2.0, EVIL)
    failed = Outcome(EVIL, "other", "float32", "failed", EVIL)
    page = page_of(
        tmp_path, made_up([wrong, failed]), evidence=(Evidence(EVIL, "cpu", EVIL, "executed", EVIL),),
        environment={EVIL: EVIL, "versions": {EVIL: EVIL}}, notes=(EVIL,),
    )  # fmt: skip
    assert "<script" not in page.replace(f"<script>{FILTER}</script>", "")
    assert words(page).count(EVIL) > 15
    assert f"ValueError: {EVIL}" in words(page_of(tmp_path, BAD))
    # No attribute ends early: what is left between quotes has no quote.
    assert not re.search(r'="[^"]*"quotes', page)


def test_only_the_script_of_the_filters_may_run(tmp_path: Path) -> None:
    page = page_of(tmp_path, BAD)
    (allowed,) = re.findall(r"script-src 'sha256-(.*?)'", page)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() == allowed
    assert "unsafe-inline" not in page.split("script-src")[1].split(">")[0]


def test_control_characters_are_spelt_out(tmp_path: Path) -> None:
    code = "\x1b[31m\x07\u202e\ud800"
    failed = Outcome(code, code, "float32", "failed", code)
    page = page_of(tmp_path, made_up([failed]), notes=(code,), environment={code: code})
    assert words(page).count(r"\x1b[31m\x07\u202e\ud800") > 5
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", page)
    failed = Outcome("mine", "one", "float32", "failed", "OSError: \udcff")  # half a surrogate pair
    assert "OSError: \\udcff" in words(page_of(tmp_path, made_up([failed])))


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    page = page_of(tmp_path, BAD, trajectory=DIVERGED, environment={"python": "3"})
    assert loaded_from_elsewhere(page) == []
    assert "default-src 'none'" in page
    assert page.count('src="data:image/png;base64,') == 3  # two adapters have errors to draw, and the trajectory


def test_same_survey_same_page(tmp_path: Path) -> None:
    pages = [page_of(tmp_path / name, BAD, trajectory=DIVERGED) for name in "ab"]
    assert pages[0] == pages[1]


def test_no_framework_is_loaded() -> None:
    code = "import sys, parity_tests.report.page; assert not {'jax', 'torch'} & sys.modules.keys()"
    outcome = run_code(code)
    assert outcome.returncode == 0, outcome.stderr
