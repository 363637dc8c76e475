"""The web page of a survey: verdict, tables, heat map and plots in one file that loads nothing from elsewhere.

Tables and the heat map are HTML, so that they can be searched, copied and read aloud; plots are PNG images within the
page. Names and messages come from a user's loss and stay out of the plots: matplotlib reads `$` as mathematics.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from parity_tests.evidence.ledger import Evidence
from parity_tests.report.disagreements import describe, find_disagreements, find_failures
from parity_tests.report.heat_map import heat_maps
from parity_tests.report.plots import draw_trajectory, png, ulp_panels
from parity_tests.report.tables import environment_tables, ledger, pair_sentences, summarize, worst_rows
from parity_tests.report.verdict import verdict
from parity_tests.studies.survey import Survey
from parity_tests.trainings.trajectory import TrajectoryVerdict
from parity_tests.truth.files import write_whole

LONGEST_DISAGREEMENTS, LONGEST_FAILURES = 20, 20


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
    """Write the page of a survey. Parts without content are left out.

    Args:
        folder: where to write; created if missing.
        survey: the outcomes; it may be empty.
        title: the heading.
        evidence: what the ledger shows.
        environment: what `describe_environment` returns.
        trajectory: the comparison of two trainings.
        notes: sentences to show beneath the verdict.
        agrees: the verdict, if it is not to follow from survey and trajectory.

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
    # A user's message may hold half a surrogate pair, which UTF-8 does not have.
    write_whole(page, text, errors="backslashreplace")
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
