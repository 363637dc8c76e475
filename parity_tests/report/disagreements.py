"""Failures and disagreements of a survey, each with the values, the inputs and the adapter at fault."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from parity_tests.report.tables import element_texts
from parity_tests.report.words import LETTERS
from parity_tests.studies.probes import is_edge_name
from parity_tests.studies.survey import Survey
from parity_tests.studies.verdicts import Difference, Outcome
from parity_tests.texts import share_text, used_share
from parity_tests.truth.comparison import Comparison

# How far two adapters may be apart.
SUM = "the sum of their bounds"


class Failure(NamedTuple):
    """What a loss raised, or the wrong shape or dtype that it returned: the first of several similar messages."""

    adapter: str
    message: str
    times: int
    where: str


def find_failures(survey: Survey, ours: bool) -> list[Failure]:
    """Return the failures of ours or of peers; failures that differ only in numbers, such as shapes, count as one."""
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
        who: the adapters whose results are out of bounds.
        blame: sentences that name the adapter at fault.
        elements: who, where, values, bound and share of each worst element.
        inputs: the inputs of the row of the worst element, by name.
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
    """Return case and dtype wherever a value of ours, or a pair of twins, is out of bounds.

    The worst come first, but edge cases, which many losses do not handle, after all others.
    """
    shares: dict[tuple[str, str], float] = {}
    found: list[Outcome | Difference] = [each for each in survey.outcomes if survey.members[each.adapter].ours]
    for item in found + list(survey.differences):
        if item.comparison and _outside(item.comparison):
            key = (item.case, item.dtype)
            shares[key] = max(shares.get(key, 0.0), item.comparison.share)
    return sorted(shares, key=lambda key: (is_edge_name(key[0]), -shares[key]))


def describe(survey: Survey, case: str, dtype: str, allowed: str = SUM) -> Disagreement:
    """Return the values and the inputs of a disagreement, and the adapter at fault.

    Args:
        survey: the outcomes.
        case: its name.
        dtype: its dtype.
        allowed: how far two adapters may be apart, in words.
    """
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
    pairs = [(against(each.adapters), each.comparison) for each in apart]
    compared = list(wrong.items()) + pairs
    compared.sort(key=lambda pair: -pair[1].share)
    worst = compared[0][1]
    return Disagreement(
        case=case,
        dtype=dtype,
        share=used_share(worst.share),
        who=", ".join(wrong) or _off(involved[0]),
        blame=blame_sentences(list(wrong), involved, allowed),
        elements=[
            (who, *element_texts(comparison, dtype), share_text(comparison.share)) for who, comparison in compared
        ],
        inputs=worst.worst.inputs if worst.worst else {},
    )


def against(adapters: tuple[str, str]) -> str:
    """Return the names of two adapters, and which is A and which is B in the values."""
    return " against ".join(adapters if adapters == LETTERS else (f"{adapters[0]} (A)", f"{adapters[1]} (B)"))


def _off(difference: Difference) -> str:
    """Return which of two adapters is wrong, if it is known, else both names."""
    if not difference.blame:
        return " against ".join(difference.adapters)
    return f"{difference.blame[0]} is off" if len(difference.blame) == 1 else "both are off"


def blame_sentences(wrong: list[str], differences: list[Difference], allowed: str) -> list[str]:
    """Return sentences that name the adapter at fault.

    Args:
        wrong: the adapters whose results are out of the bounds of the truth.
        differences: pairs that differ, or of which one is wrong.
        allowed: how far two adapters may be apart, in words.
    """
    sentences = []
    for difference in differences:
        first, second = difference.adapters
        guilty = difference.blame or tuple(name for name in difference.adapters if name in wrong)
        if difference.agrees:
            start = f"{first} and {second} are within both bounds of each other, but "
        else:
            start = f"{first} and {second} differ by {used_share(difference.comparison.share)} {allowed}: "
        if difference.blame is None:
            end = "which of them is right is not known."
        elif not guilty:
            end = "each is within its own bounds of the truth."
        elif len(guilty) == 2:
            end = "both are outside of the bounds of the truth."
        else:
            end = f"{guilty[0]} is outside of the bounds of the truth, the other is not."
        sentences.append(start + end)
    alone = [name for name in wrong if not any(name in difference.adapters for difference in differences)]
    sentences += [f"{name} is outside of the bounds of the truth." for name in alone]
    return sentences
