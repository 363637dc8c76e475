"""The web page of a survey: verdict, tables, heat map and plots in one file that loads nothing from elsewhere.

Tables and the heat map are HTML, so that they can be searched, copied and read aloud; plots are PNG images within the
page. Names and messages come from a user's loss and stay out of the plots: matplotlib reads `$` as mathematics.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from parity_tests.evidence.ledger import KINDS, Evidence
from parity_tests.report.plots import draw_trajectory, png, ulp_panels
from parity_tests.studies.survey import Survey
from parity_tests.studies.verdicts import Difference, Outcome
from parity_tests.trainings.trajectory import TrajectoryVerdict
from parity_tests.truth.comparison import Comparison, Worst
from parity_tests.truth.precision import DTYPES

LONGEST_DISAGREEMENTS, LONGEST_FAILURES, LONGEST_WORST = 20, 20, 15
LONGEST_BLOCK = 30

KIND_MEANINGS = {
    "executed": "ran on that device, and every result was within its bounds",
    "replayed": "held against values that were recorded on another machine",
    "interpreted": "a kernel ran in its framework's interpreter, not on that device",
    "compiled": "the device's compiler accepted it; nothing ran",
    "not run": "none of these",
}


def write_report(
    folder: Path,
    survey: Survey,
    *,
    title: str,
    evidence: Sequence[Evidence],
    environment: Mapping[str, Any],
    trajectory: TrajectoryVerdict | None = None,
    notes: Sequence[str] = (),
    agrees: bool | None = None,
) -> Path:
    """Write the page of a survey. A part that there is nothing about is left out.

    Args:
        folder: where to write; it is made if it is not there.
        survey: the outcomes; it may be empty.
        title: the heading.
        evidence: what the ledger shows.
        environment: what `describe_environment` returns.
        trajectory: the verdict about two trainings.
        notes: sentences to show beneath the verdict.
        agrees: the verdict, where it is not that of the survey and of the trajectory.

    Returns:
        The page's path, `folder/index.html`.
    """
    page = folder / "index.html"
    text = render(
        survey,
        title=title,
        evidence=evidence,
        environment=environment,
        trajectory=trajectory,
        notes=notes,
        agrees=agrees,
    )
    folder.mkdir(parents=True, exist_ok=True)
    # A user's message may hold half a surrogate pair, which UTF-8 does not have.
    page.write_text(text, encoding="utf-8", errors="backslashreplace")
    return page


def render(
    survey: Survey,
    *,
    title: str,
    evidence: Sequence[Evidence],
    environment: Mapping[str, Any],
    trajectory: TrajectoryVerdict | None,
    notes: Sequence[str],
    agrees: bool | None = None,
) -> str:
    """Return the page, images and all; see `write_report`."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    disagreements = find_disagreements(survey)
    return templates.get_template("page.html.jinja").render(
        title=title,
        banner=verdict(survey, trajectory, agrees),
        notes=notes,
        summaries=[summarize(survey, name) for name in survey.members if survey.outcomes],
        pairs=pair_sentences(survey.differences),
        failures={who: find_failures(survey, ours) for who, ours in _WHO},
        longest_failures=LONGEST_FAILURES,
        disagreements=[describe(survey, *key) for key in disagreements[:LONGEST_DISAGREEMENTS]],
        more_disagreements=len(disagreements) - LONGEST_DISAGREEMENTS,
        adapters=[(name, member.ours) for name, member in survey.members.items()],
        heat_maps=heat_maps(survey),
        ulps=ulp_panels(survey),
        worst={who: worst_rows(survey, ours) for who, ours in _WHO},
        trajectory=png(draw_trajectory(trajectory)) if trajectory else None,
        ledger=ledger(evidence),
        environment=environment_tables(environment),
    )


_WHO = (("ours", True), ("peers", False))


# --- Words ----------------------------------------------------------------------------------------------------------


def share_text(share: float) -> str:
    """Return a share in few characters; what is not 1 is never rounded to it.

    Example:
        >>> [share_text(share) for share in (0.0, 0.997, 1.003, 25.2, 31415.0, float("inf"))]
        ['0', '0.99', '1.01', '25', '3e4', '∞']
    """
    if share == 0:
        return "0"
    if not math.isfinite(share):
        return "∞"
    if share < 1:
        return f"{min(share, 0.99):.2f}"
    if share < 9.995:
        return f"{max(share, 1.01) if share > 1 else 1:.2f}"
    if share < 999.5:
        return f"{share:.0f}"
    digit, exponent = f"{share:.0e}".split("e")
    return f"{digit}e{int(exponent)}"


def _used(share: float) -> str:
    """Return how much of a bound was used, to be followed by what it is the bound of."""
    return f"{share_text(share)} {'times' if share > 1 else 'of'}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _number(value: float, dtype: str) -> str:
    return f"{value:.{17 if dtype == 'float64' else 9}g}"


def _known(share: float) -> float:
    """Return a share; NaN, which is larger than nothing, counts as infinite."""
    return math.inf if math.isnan(share) else share


def _place(worst: Worst) -> str:
    return f"{worst.part}{list(worst.index) if worst.index else ''}"


# --- The verdict ----------------------------------------------------------------------------------------------------


class Banner(NamedTuple):
    """The verdict: a word, its style, and the sentences that it rests on."""

    word: str
    style: str
    sentences: list[str]


def verdict(survey: Survey, trajectory: TrajectoryVerdict | None, agrees: bool | None = None) -> Banner:
    """Return the verdict about all that was compared; ours decide, peers are described beside."""
    ours = [outcome for name, member in survey.members.items() if member.ours for outcome in survey.of(name)]
    verdicts, sentences = [], []
    if ours or survey.differences:
        verdicts.append(survey.agrees)
        sentences.append(" ".join((*outcome_sentences(ours), *difference_sentences(survey.differences))))
    if guilty := _outside_in(survey, ours=True):
        sentences.append(f"At fault: {', '.join(guilty)}.")
    if trajectory is not None:
        verdicts.append(trajectory.agrees)
        sentences.append(trajectory_sentence(trajectory))
    unsupported = sum(
        outcome.status == "unsupported" and survey.members[outcome.adapter].ours for outcome in survey.outcomes
    )
    if unsupported:
        sentences.append(
            f"{_count(unsupported, 'call')} left out, since the adapter lacks an option that the case needs."
        )
    if outside := _outside_in(survey, ours=False):
        sentences.append(f"What peers get wrong is a finding, not a failure: {', '.join(outside)}.")
    if not verdicts:
        return Banner("NOTHING COMPARED", "nothing", ["No loss of ours gave anything to compare.", *sentences])
    agrees = all(verdicts) if agrees is None else agrees
    return Banner("AGREE", "agree", sentences) if agrees else Banner("DISAGREE", "disagree", sentences)


def _outside_in(survey: Survey, ours: bool) -> list[str]:
    """Return which of our adapters, or of the peers, did not agree, and how often."""
    counts = []
    for name, member in survey.members.items():
        outcomes = survey.of(name)
        outside = sum(outcome.status != "agree" for outcome in outcomes)
        if outside and member.ours == ours:
            counts.append(f"{name} in {outside} of {len(outcomes)}")
    return counts


def outcome_sentences(outcomes: list[Outcome]) -> list[str]:
    """Return what came of adapters that were called, with the counts."""
    if not outcomes:
        return []
    adapters, cases = {outcome.adapter for outcome in outcomes}, {outcome.case for outcome in outcomes}
    dtypes = list(dict.fromkeys(outcome.dtype for outcome in outcomes))
    disagree = sum(outcome.status == "disagree" for outcome in outcomes)
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    sentences = [
        f"{_count(len(adapters), 'adapter')} in {_count(len(cases), 'case')} and {_count(len(dtypes), 'dtype')} "
        f"({', '.join(dtypes)}): {disagree or 'none'} of {_count(len(outcomes), 'result')} outside of the bounds, "
        f"{failed or 'none'} failed."
    ]
    compared = [(outcome.comparison.share, outcome) for outcome in outcomes if outcome.comparison]
    if compared:
        share, worst = max(compared, key=lambda pair: pair[0])
        place = f"{worst.adapter} in {worst.case}, {worst.dtype}"
        sentences.append(f"Largest share of a bound: {share_text(share)} ({place}).")
    return sentences


def difference_sentences(differences: list[Difference]) -> list[str]:
    """Return how many pairs are apart, if any is."""
    apart = sum(not difference.agrees for difference in differences)
    return [f"{apart} of {_count(len(differences), 'pair')} differ by more than both bounds."] if apart else []


def trajectory_sentence(trajectory: TrajectoryVerdict) -> str:
    """Return what came of two trainings."""
    steps, step = len(trajectory.difference), trajectory.first_divergence
    if step is None:
        sentence = (
            f"Trainings agree over {_count(steps, 'step')}: at most {share_text(trajectory.largest_share)} of the "
            f"difference that rounding explains (step {trajectory.worst_step})."
        )
    else:
        sentence = (
            f"Trainings part at step {step} of {steps}: difference {trajectory.difference[step]:.2g}, allowed "
            f"{trajectory.allowed[step]:.2g}."
        )
    if trajectory.blind_from is not None:
        sentence += f" From step {trajectory.blind_from} on agreement says little: one rounding decides."
    return sentence


# --- Tables ---------------------------------------------------------------------------------------------------------


class Summary(NamedTuple):
    """One row of the table of adapters. `counts` are those of agree, disagree, failed and unsupported."""

    name: str
    ours: bool
    device: str
    verdict: str
    called: int
    counts: tuple[int, int, int, int]
    loss: str
    gradient: str
    where: str
    closer: str


def summarize(survey: Survey, name: str) -> Summary:
    """Return what came of an adapter."""
    called = survey.of(name)
    everything = [outcome.status for outcome in survey.outcomes if outcome.adapter == name]
    agree, disagree, failed, unsupported = (
        everything.count(status) for status in ("agree", "disagree", "failed", "unsupported")
    )
    word = "disagrees" if disagree else "fails" if failed else "agrees" if called else "not called"
    compared = [(outcome, outcome.comparison) for outcome in called if outcome.comparison]
    loss = gradient = where = "–"
    if compared:
        loss = share_text(max(_known(comparison.loss) for _, comparison in compared))
        gradients = {part for _, comparison in compared for part in comparison.shares} - {"loss"}
        largest = {part: max(_known(c.shares.get(part, 0.0)) for _, c in compared) for part in sorted(gradients)}
        gradient = ", ".join(
            share_text(share) if part == "gradient" else f"{part} {share_text(share)}"
            for part, share in largest.items()
        )
        worst, _ = max(compared, key=lambda pair: pair[1].share)
        where = f"{worst.case}, {worst.dtype}"
    member = survey.members[name]
    return Summary(
        name=name,
        ours=member.ours,
        device=member.adapter.device,
        verdict=word,
        called=len(called),
        counts=(agree, disagree, failed, unsupported),
        loss=loss,
        gradient=gradient,
        where=where,
        closer=closer_than_peers(survey, name) if member.ours else "",
    )


def closer_than_peers(survey: Survey, name: str) -> str:
    """Return how often an adapter is closer to the truth than the best peer of its framework; empty without peers."""
    found = survey.closeness(name, survey.peers_of(name))
    if not found.cases:
        return ""
    return f"{found.closer} of {found.cases}" + (f" ({found.equal} equal)" if found.equal else "")


def pair_sentences(differences: Iterable[Difference]) -> list[str]:
    """Return, for each pair of twins, how far apart they are."""
    pairs: dict[tuple[str, str], list[Difference]] = {}
    for difference in differences:
        pairs.setdefault(difference.adapters, []).append(difference)
    sentences = []
    for (first, second), found in pairs.items():
        worst = max(found, key=lambda difference: difference.comparison.share)
        sentences.append(
            f"{first} against {second}: within both bounds of each other in {sum(each.agrees for each in found)} of "
            f"{len(found)}; at most {_used(worst.comparison.share)} the sum of the bounds ({worst.case}, "
            f"{worst.dtype})."
        )
    return sentences


def worst_rows(survey: Survey, ours: bool) -> list[tuple[str, ...]]:
    """Return the results that use the largest shares of their bounds, of our adapters or of peers."""
    found = [
        (outcome.comparison.share, outcome, outcome.comparison)
        for outcome in survey.outcomes
        if outcome.comparison and survey.members[outcome.adapter].ours == ours
    ]
    found.sort(key=lambda entry: -entry[0])
    return [
        (
            share_text(share),
            outcome.adapter,
            outcome.case,
            outcome.dtype,
            *_element(comparison, outcome.dtype),
        )
        for share, outcome, comparison in found[:LONGEST_WORST]
    ]


def _element(comparison: Comparison, dtype: str) -> tuple[str, str, str, str]:
    """Return the worst element: where, value, expected and bound."""
    worst = comparison.worst
    if worst is None:
        return (comparison.problem or "no elements", "–", "–", "–")
    return (_place(worst), _number(worst.value, dtype), _number(worst.expected, dtype), f"{worst.bound:.2g}")


# --- What went wrong ------------------------------------------------------------------------------------------------


class Failure(NamedTuple):
    """What a loss raised, or the wrong shape or dtype that it returned: the first of several messages alike."""

    adapter: str
    message: str
    times: int
    where: str


def find_failures(survey: Survey, ours: bool) -> list[Failure]:
    """Return failures of ours, or of peers; those that differ in numbers alone, such as shapes, count as one."""
    groups: dict[tuple[str, str], list[tuple[Outcome, str]]] = {}
    for outcome in survey.outcomes:
        message = outcome.comparison.problem if outcome.comparison else outcome.reason
        if message and outcome.status != "unsupported" and survey.members[outcome.adapter].ours == ours:
            groups.setdefault((outcome.adapter, re.sub(r"\d+", "0", message)), []).append((outcome, message))
    failures = []
    for (adapter, _), group in groups.items():
        first, message = group[0]
        failures.append(Failure(adapter, message, len(group), f"{first.case}, {first.dtype}"))
    return failures


@dataclass(frozen=True)
class Disagreement:
    """A case in which a value is outside of its bounds.

    Args:
        case, dtype: which case.
        share: how much of a bound the worst element uses.
        who: the adapters outside of their bounds.
        blame: sentences on whose error it is.
        elements: who, where, value, expected, bound and share of each worst element.
        inputs: what went into the row of the worst of them, by name.
    """

    case: str
    dtype: str
    share: str
    who: str
    blame: list[str]
    elements: list[tuple[str, ...]]
    inputs: dict[str, str]


def _outside(comparison: Comparison) -> bool:
    """Return whether an element is out of bounds. Wrong shapes have no worst element: they are among the failures."""
    return comparison.worst is not None and comparison.share > 1


def find_disagreements(survey: Survey) -> list[tuple[str, str]]:
    """Return case and dtype wherever a value of ours, or a pair of twins, is out of bounds; the worst first."""
    shares: dict[tuple[str, str], float] = {}
    found: list[Outcome | Difference] = [each for each in survey.outcomes if survey.members[each.adapter].ours]
    for item in found + list(survey.differences):
        if item.comparison and _outside(item.comparison):
            key = (item.case, item.dtype)
            shares[key] = max(shares.get(key, 0.0), item.comparison.share)
    return sorted(shares, key=lambda key: -shares[key])


def describe(survey: Survey, case: str, dtype: str) -> Disagreement:
    """Return who is to blame for a disagreement, with the numbers."""
    differences = [each for each in survey.differences if (each.case, each.dtype) == (case, dtype)]
    apart = [each for each in differences if _outside(each.comparison)]
    paired = {name for each in apart for name in each.adapters}
    wrong = {
        outcome.adapter: outcome.comparison
        for outcome in survey.outcomes
        if (outcome.case, outcome.dtype) == (case, dtype)
        and outcome.comparison
        and _outside(outcome.comparison)
        and (survey.members[outcome.adapter].ours or outcome.adapter in paired)
    }
    involved = [each for each in differences if each in apart or wrong.keys() & set(each.adapters)]
    compared = list(wrong.items()) + [(" against ".join(each.adapters), each.comparison) for each in apart]
    compared.sort(key=lambda pair: -pair[1].share)
    worst = compared[0][1]
    return Disagreement(
        case=case,
        dtype=dtype,
        share=_used(worst.share),
        who=", ".join(wrong) or " against ".join(involved[0].adapters),
        blame=blame_sentences(list(wrong), involved),
        elements=[(who, *_element(comparison, dtype), share_text(comparison.share)) for who, comparison in compared],
        inputs=worst.worst.inputs if worst.worst else {},
    )


def blame_sentences(wrong: list[str], differences: list[Difference]) -> list[str]:
    """Return whose error a disagreement is, in words.

    Args:
        wrong: the adapters that are outside of the bounds of the truth.
        differences: pairs that differ, or of which one is wrong.
    """
    sentences = []
    for difference in differences:
        first, second = difference.adapters
        guilty = difference.blame or tuple(name for name in difference.adapters if name in wrong)
        if difference.agrees:
            start = f"{first} and {second} are within both bounds of each other, but "
        else:
            start = f"{first} and {second} differ by {_used(difference.comparison.share)} the sum of their bounds: "
        if not guilty:
            end = "each is within its own bounds of the truth."
        elif len(guilty) == 2:
            end = "both are outside of the bounds of the truth."
        else:
            end = f"{guilty[0]} is outside of the bounds of the truth, the other is not."
        sentences.append(start + end)
    alone = [name for name in wrong if not any(name in difference.adapters for difference in differences)]
    sentences += [f"{name} is outside of the bounds of the truth." for name in alone]
    return sentences


# --- Heat map -------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A field of the heat map.

    Args:
        severity: the larger, the worse.
        text: what it says.
        style: how it looks.
        words: all about it.
    """

    severity: tuple[int, float]
    text: str
    style: str
    words: str


# Upper ends of the shares that look alike. The scale of blues ends at 1; beyond, it is orange to brown.
LEVELS = ((1 / 16, "in0"), (1 / 8, "in1"), (1 / 4, "in2"), (1 / 2, "in3"), (1.0, "in4"), (10.0, "out0"), (1e3, "out1"))


def heat_maps(survey: Survey) -> dict[str, list[list[tuple[str, list[Cell]]]]]:
    """Return the heat map of the worst dtype, then one for each dtype if there are several; none without outcomes."""
    dtypes = list(dict.fromkeys(outcome.dtype for outcome in survey.outcomes))
    maps = {"all": heat_map(survey, dtypes)} if dtypes else {}
    return maps | ({dtype: heat_map(survey, [dtype]) for dtype in dtypes} if len(dtypes) > 1 else {})


def heat_map(survey: Survey, dtypes: Sequence[str]) -> list[list[tuple[str, list[Cell]]]]:
    """Return blocks of rows, a case and its cell for each adapter: the worst of these dtypes."""
    outcomes: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in survey.outcomes:
        if outcome.dtype in dtypes:
            outcomes.setdefault((outcome.case, outcome.adapter), []).append(outcome)
    cases = dict.fromkeys(case for case, _ in outcomes)
    rows = [(case, [_cell(outcomes.get((case, name), [])) for name in survey.members]) for case in cases]
    size = math.ceil(len(rows) / math.ceil(len(rows) / LONGEST_BLOCK))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _cell(outcomes: list[Outcome]) -> Cell:
    """Return the worst of an adapter's outcomes in a case; all of them are in its words."""
    cells = [_cell_of(outcome) for outcome in outcomes]
    worst = max(cells, key=lambda cell: cell.severity, default=Cell((0, 0.0), "", "none", ""))
    return worst._replace(words="; ".join(cell.words for cell in cells) or "not in this survey")


def _cell_of(outcome: Outcome) -> Cell:
    if outcome.comparison is None:
        words = f"{outcome.dtype}: {outcome.status}, {outcome.reason}"
        failed = outcome.status == "failed"
        return Cell((3, 0.0), "fail", "failed", words) if failed else Cell((0, 0.0), "–", "unsupported", words)
    if outcome.comparison.problem:
        return Cell((2, math.inf), "form", "out2", f"{outcome.dtype}: {outcome.comparison.problem}")
    share = outcome.comparison.share
    style = next((style for end, style in LEVELS if share <= end), "out2")
    return Cell((1, share), share_text(share), style, f"{outcome.dtype}: {_used(share)} the bound")


# --- Ledger and environment -----------------------------------------------------------------------------------------


class Ledger(NamedTuple):
    """The table of evidence: dtypes, rows of adapter, device and a cell for each dtype, and what the kinds mean."""

    dtypes: list[str]
    rows: list[tuple[str, ...]]
    meanings: dict[str, str]


def ledger(evidence: Sequence[Evidence]) -> Ledger | None:
    """Return the table of evidence, the strongest kind first in each cell; None without evidence."""
    if not evidence:
        return None
    found = {each.dtype for each in evidence}
    dtypes = [dtype for dtype in DTYPES if dtype in found] + sorted(found - set(DTYPES))
    cells: dict[tuple[str, str], dict[str, list[str]]] = {}
    for each in sorted(evidence, key=lambda each: KINDS.index(each.kind)):
        text = f"{each.kind} ({each.detail})" if each.detail else each.kind
        row = cells.setdefault((each.adapter, each.device), {dtype: [] for dtype in dtypes})
        if text not in row[each.dtype]:
            row[each.dtype].append(text)
    rows = [(*key, *(", ".join(row[dtype]) or "–" for dtype in dtypes)) for key, row in sorted(cells.items())]
    kinds = {each.kind for each in evidence}
    return Ledger(dtypes, rows, {kind: KIND_MEANINGS[kind] for kind in KINDS if kind in kinds})


def environment_tables(environment: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the environment as tables by heading: what is no table itself comes first, under "machine"."""
    tables = {"machine": {key: _plain(value) for key, value in environment.items() if not isinstance(value, Mapping)}}
    for heading, entries in environment.items():
        if isinstance(entries, Mapping):
            tables[heading] = {str(key): _plain(value) for key, value in entries.items()}
    return {heading: table for heading, table in tables.items() if table}


def _plain(value: Any) -> str:
    return ", ".join(str(entry) for entry in value) if isinstance(value, list | tuple) else str(value)
