"""The heat map: how much of its bounds each adapter used in each case."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from parity_tests.studies.survey import Survey
from parity_tests.studies.verdicts import Outcome
from parity_tests.texts import share_text, used_share

LONGEST_BLOCK = 35


class Cell(NamedTuple):
    """A field of the heat map.

    Args:
        severity: larger is worse.
        text: what it says.
        style: how it looks.
        words: the full description.
    """

    severity: tuple[int, float]
    text: str
    style: str
    words: str


# Upper ends of the shares of one color. Blues end at 1; above 1, colors go from orange to brown.
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
    """Return the worst of an adapter's outcomes in a case; the cell's words describe all of them."""
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
    return Cell((1, share), share_text(share), style, f"{outcome.dtype}: {used_share(share)} the bound")
