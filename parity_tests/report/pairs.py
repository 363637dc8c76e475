"""The comparison of two losses in words: for a terminal, the message of a failed assertion, and a page."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from parity_tests.report.verdict import Banner
from parity_tests.report.words import LETTERS, values_text
from parity_tests.studies.pairs import SHOWN, Pair
from parity_tests.studies.probes import is_edge_name
from parity_tests.studies.survey import Survey
from parity_tests.texts import count_of


def lines_of(pair: Pair) -> list[str]:
    """Return the findings, without the verdict."""
    return [*_readings(pair), "", *_findings(pair), *_differences(pair)]


def verdict_line(pair: Pair) -> str:
    """Return the verdict, in how many cases, and what is right."""
    return f"{pair.verdict} {_scope(pair)}"


def parts_of_page(pair: Pair) -> dict[str, Any]:
    """Return the parameters of `write_report`. The page says what a terminal does, and calls the losses A and B."""
    style = {True: "agree", False: "disagree", None: "nothing"}[pair.agrees]
    scope = _scope(pair)
    sides = zip(LETTERS, pair.readings, strict=True)
    return {
        "survey": _with_letters(pair),
        "title": " and ".join(reading.name for reading in pair.readings),
        "banner": Banner(pair.verdict, style, [f"{scope[0].upper()}{scope[1:]}.", *_findings(pair)]),
        "findings": {f"{letter}: {reading.name}": reading.lines() for letter, reading in sides},
        "allowed": _explained(pair),
    }


def _with_letters(pair: Pair) -> Survey:
    """Return the survey with A and B for the names of the losses, which may be long, or the same."""
    members = [pair.survey.members[reading.name] for reading in pair.readings]
    outcomes = [replace(each, adapter=LETTERS[place % 2]) for place, each in enumerate(pair.survey.outcomes)]
    wrong = {(each.case, each.dtype, each.adapter) for each in outcomes if each.status != "agree"}
    differences = [
        replace(
            each,
            adapters=LETTERS,
            blame=each.blame and tuple(letter for letter in LETTERS if (each.case, each.dtype, letter) in wrong),
        )
        for each in pair.survey.differences
    ]
    return Survey(dict(zip(LETTERS, members, strict=True)), outcomes, differences)


def _scope(pair: Pair) -> str:
    return f"in {count_of(len(pair.cases), 'case')}. {_right_is(pair)}"


def _explained(pair: Pair) -> str:
    return f"what {pair.tolerance} allows" if pair.tolerance else "what rounding explains"


def _right_is(pair: Pair) -> str:
    if pair.tolerance:
        return f"You chose what is allowed: {pair.tolerance}"
    if pair.known:
        return f"Right is: {pair.definition}"
    return "Neither is a loss that is known here: whether they are right was not asked, only whether they are the same"


def _readings(pair: Pair) -> Iterator[str]:
    for letter, reading in zip("AB", pair.readings, strict=True):
        yield f"{letter}  {reading.name}"
        yield from (f"   {line}" for line in reading.lines())


def _findings(pair: Pair) -> Iterator[str]:
    yield from pair.functions()
    for name, of_first, of_second in pair.formula_differences:
        yield f"they differ in the {name}: A {of_first} | B {of_second}"
    differences = pair.survey.differences
    for part, name in (("loss", "values"), ("gradient", "gradients")):
        if differences:
            word = "the same" if pair.part_agrees(part) else "DIFFERENT"
            largest = max(getattr(each.comparison, part) for each in differences)
            yield f"{name}: {word} (up to {largest:.2g} of {_explained(pair)})"
    yield from pair.troubles()


def _differences(pair: Pair) -> Iterator[str]:
    differing = [each for each in pair.survey.differences if not each.agrees]
    if not differing:
        return
    # A loss that is wrong in ordinary cases is not judged by the edges.
    differing.sort(key=lambda each: (is_edge_name(each.case), -each.comparison.share))
    count = f"{len(differing)} of {len(pair.survey.differences)} cases differ"
    allowed = "the tolerance" if pair.tolerance else "what rounding explains"
    yield from ("", f"{count}; the largest, as shares of {allowed} (at most 1 is the same):", "")
    for each in differing[:SHOWN]:
        comparison = each.comparison
        found = [f"{comparison.share:.2g} in {each.case}, {each.dtype}", comparison.problem, pair.off(each)]
        yield "; ".join(filter(None, found))
        if comparison.worst:
            yield f"    {comparison.worst.place}: {values_text(comparison.worst, each.dtype)}"
    if worst := differing[0].comparison.worst:
        inputs = "; ".join(f"{name}: {value}" for name, value in worst.inputs.items())
        yield from ("", f"Inputs in {differing[0].case}: {inputs}")
