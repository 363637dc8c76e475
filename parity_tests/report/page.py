"""The web page of a survey: verdict, tables, heat map and plots in one file that loads nothing from elsewhere.

The only script in it hides rows of tables; its hash is in the page's security policy, so no other script can run.

Tables and the heat map are HTML, so that they can be searched, copied and read aloud; plots are PNG images within the
page. Names and messages come from a user's loss and stay out of the plots: matplotlib reads `$` as mathematics.
"""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2

from parity_tests.evidence.ledger import Evidence
from parity_tests.report.disagreements import SUM, describe, find_disagreements, find_failures
from parity_tests.report.heat_map import heat_maps
from parity_tests.report.plots import draw_trajectory, png, ulp_panels
from parity_tests.report.tables import case_rows, environment_tables, ledger, pair_sentences, summarize, worst_rows
from parity_tests.report.verdict import Banner, verdict
from parity_tests.report.words import PageTable
from parity_tests.studies.survey import Survey
from parity_tests.texts import count_of, visible
from parity_tests.trainings.trajectory import TrajectoryVerdict
from parity_tests.truth.files import write_whole

LONGEST_DISAGREEMENTS, LONGEST_FAILURES = 20, 20
# A table of fewer rows is shown without a filter.
SHORTEST_FILTERED = 10
HERE = Path(__file__).parent
FILTER = (HERE / "filter.js").read_text(encoding="utf-8").rstrip("\n")  # as a template includes it


def write_report(  # noqa: PLR0913 - each part of a page is a parameter
    folder: Path,
    survey: Survey,
    *,
    title: str,
    evidence: Sequence[Evidence],
    environment: Mapping[str, Any],
    trajectory: TrajectoryVerdict | None = None,
    notes: Sequence[str] = (),
    agrees: bool | None = None,
    banner: Banner | None = None,
    tables: Sequence[PageTable] = (),
    parted: int | None = None,
    findings: Mapping[str, Sequence[str]] | None = None,
    allowed: str | None = None,
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
        banner: the whole verdict, if it is not to follow from them.
        tables: more tables to show.
        parted: the step at which the trainings part, if it is not to follow from their losses.
        findings: sentences by heading, to show beneath the notes.
        allowed: of a comparison of two losses, A and B, how far they may be apart, in words. Where they are further
            apart, no other disagreement is shown.

    Returns:
        The page's path, `folder/index.html`.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        finalize=_without_control_characters,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    in_pairs = allowed is not None and not all(each.agrees for each in survey.differences)
    summaries = [summarize(survey, name) for name in survey.members if survey.outcomes]
    closer = any(each.closer for each in summaries)
    disputed = replace(survey, outcomes=[]) if in_pairs else survey
    templates.filters["pieces"] = _pieces
    disagreements = find_disagreements(disputed)
    text = templates.get_template("page.html.jinja").render(
        title=title,
        script_hash=base64.b64encode(hashlib.sha256(FILTER.encode()).digest()).decode(),
        shortest_filtered=SHORTEST_FILTERED,
        banner=banner or verdict(survey, trajectory, agrees),
        tables=tables,
        cases=case_rows(survey),
        count_of=count_of,
        notes=notes,
        findings={heading: [line.strip() for line in lines] for heading, lines in (findings or {}).items()},
        of_pair=allowed is not None,
        noun="adapter" if allowed is None else "loss",
        wrong=("disagrees", "fails"),
        allowed=allowed if allowed and in_pairs else "the bound",
        summaries=[each.cells(closer) for each in summaries],
        closer=closer,
        pairs=pair_sentences(survey.differences),
        failures={who: find_failures(survey, ours) for who, ours in _WHO},
        longest_failures=LONGEST_FAILURES,
        disagreements=[describe(disputed, *key, allowed or SUM) for key in disagreements[:LONGEST_DISAGREEMENTS]],
        more_disagreements=len(disagreements) - LONGEST_DISAGREEMENTS,
        adapters=[(name, member.ours) for name, member in survey.members.items()],
        heat_maps=heat_maps(survey),
        ulps=ulp_panels(survey),
        worst={who: worst_rows(survey, ours) for who, ours in _WHO},
        trajectory=png(draw_trajectory(trajectory, parted)) if trajectory else None,
        ledger=ledger(evidence),
        environment=environment_tables(environment),
    )
    page = folder / "index.html"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(page, text)
    return page


_WHO = (("ours", True), ("peers", False))


def _pieces(text: str) -> list[str]:
    """Return the pieces of a name, each with the separator after it, such as "torch:my.", "losses:" and "focal"."""
    return re.split(r"(?<=\w[:._/])(?<!torch:)(?<!jax:)(?=[A-Za-z_])", text)


def _without_control_characters(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
