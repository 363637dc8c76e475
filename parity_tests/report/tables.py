"""The tables of the page: adapters, pairs of twins, worst elements, evidence, environment."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from parity_tests.evidence.ledger import KINDS, Evidence
from parity_tests.report.words import known_share, values_text
from parity_tests.studies.survey import Survey
from parity_tests.studies.verdicts import Difference, Outcome
from parity_tests.texts import share_text, used_share
from parity_tests.truth.comparison import Comparison
from parity_tests.truth.precision import DTYPES

LONGEST_WORST = 15


class Summary(NamedTuple):
    """One row of the table of adapters. `counts`: results that agree, disagree, failed, are unsupported."""

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

    def cells(self, with_closer: bool) -> list[str]:
        """Return the cells of the row. The verdict on a peer is in brackets: it is a finding, not a failure."""
        name, verdict = (self.name, self.verdict) if self.ours else (f"{self.name} (peer)", f"({self.verdict})")
        closer = [self.closer or "–"] if with_closer else []
        counts = [str(count) for count in (self.called, *self.counts)]
        return [name, verdict, self.loss, self.gradient, *counts, self.where, *closer, self.device]


def summarize(survey: Survey, name: str) -> Summary:
    """Return an adapter's row of the table."""
    called = survey.of(name)
    everything = [outcome.status for outcome in survey.outcomes if outcome.adapter == name]
    agree, disagree, failed, unsupported = (
        everything.count(status) for status in ("agree", "disagree", "failed", "unsupported")
    )
    word = "disagrees" if disagree else "fails" if failed else "agrees" if called else "not called"
    compared = [(outcome, outcome.comparison) for outcome in called if outcome.comparison]
    loss = gradient = where = "–"
    if compared:
        loss = share_text(max(known_share(comparison.loss) for _, comparison in compared))
        gradients = {part for _, comparison in compared for part in comparison.shares} - {"loss"}
        largest = {part: max(known_share(c.shares.get(part, 0.0)) for _, c in compared) for part in sorted(gradients)}
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
            f"{len(found)}; at most {used_share(worst.comparison.share)} the sum of the bounds ({worst.case}, "
            f"{worst.dtype})."
        )
    return sentences


class CaseRow(NamedTuple):
    """One row of the list of cases: the worst that any loss, or pair of losses, did there."""

    case: str
    dtype: str
    verdict: str
    share: str
    who: str
    element: str


_RANKS = ("not called", "agrees", "disagrees", "fails")


def case_rows(survey: Survey) -> list[CaseRow]:
    """Return a row for each case and dtype, in the order of the survey. What peers do is left out."""
    found: dict[tuple[str, str], list[tuple[tuple[int, float], CaseRow]]] = {}
    ours = [outcome for outcome in survey.outcomes if survey.members[outcome.adapter].ours]
    words = {"agree": "agrees", "disagree": "disagrees", "failed": "fails", "unsupported": "not called"}
    items: list[tuple[Outcome | Difference, str, str, str]] = []
    items += [(each, each.adapter, words[each.status], each.reason or "") for each in ours]
    items += [
        (each, " against ".join(each.adapters), "agrees" if each.agrees else "disagrees", "")
        for each in survey.differences
    ]
    for each, who, word, reason in items:
        share, element, rank = "–", reason, -1.0
        if each.comparison:
            rank = known_share(each.comparison.share)
            share, element = share_text(rank), " ".join(element_texts(each.comparison, each.dtype)[:2])
        row = CaseRow(each.case, each.dtype, word, share, who, element)
        found.setdefault((each.case, each.dtype), []).append(((_RANKS.index(word), rank), row))
    return [max(rows, key=lambda ranked: ranked[0])[1] for rows in found.values()]


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
            outcome.case,
            outcome.dtype,
            outcome.adapter,
            share_text(share),
            *element_texts(comparison, outcome.dtype),
        )
        for share, outcome, comparison in found[:LONGEST_WORST]
    ]


def element_texts(comparison: Comparison, dtype: str) -> tuple[str, str, str]:
    """Return the worst element: where, values and bound."""
    worst = comparison.worst
    if worst is None:
        return (comparison.problem or "no elements", "–", "–")
    return (worst.place, values_text(worst, dtype), f"{worst.bound:.2g}")


# --- Ledger and environment -------------------------------------------------------------------------------------------


KIND_MEANINGS = {
    "executed": "ran on that device, and every result was within its bounds",
    "replayed": "held against values that were recorded on another machine",
    "interpreted": "a kernel ran in its framework's interpreter, not on that device",
    "simulated": "ran operation by operation with the errors that the device's arithmetic may have, within the bounds",
    "compiled": "the device's compiler accepted it; nothing ran",
    "not run": "none of these",
}


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
