"""The comparison of two losses in words: for a terminal, the message of a failed assertion, and a page."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from parity_tests.losses.user_losses import is_user_loss
from parity_tests.report.verdict import Banner
from parity_tests.report.words import LETTERS, values_text
from parity_tests.studies.diagnosis import AS_STATED, Mistake, mistakes, of_convention
from parity_tests.studies.pairs import LESS_ACCURATE, SHOWN, Pair
from parity_tests.studies.probes import is_edge_name
from parity_tests.studies.survey import Survey
from parity_tests.studies.verdicts import Difference
from parity_tests.texts import count_of, used_share


def lines_of(pair: Pair) -> list[str]:
    """Return the findings, without the verdict."""
    return [*_readings(pair), "", *_findings(pair), *_differences(pair)]


def verdict_lines(pair: Pair) -> list[str]:
    """Return the verdict in at most three lines: whether they agree, where the mistake is, what to change."""
    return [f"{pair.verdict} {_headline(pair)}", *_explanation(pair)]


def parts_of_page(pair: Pair) -> dict[str, Any]:
    """Return the parameters of `write_report`. The page says what a terminal does, and calls the losses A and B."""
    style = {True: "agree", False: "disagree", None: "nothing"}[pair.agrees]
    headline, *explanation = verdict_lines(pair)
    sides = zip(LETTERS, pair.readings, strict=True)
    return {
        "survey": _with_letters(pair),
        "title": " and ".join(reading.name for reading in pair.readings),
        "banner": Banner(
            pair.verdict, style, [headline.removeprefix(pair.verdict).strip(), *explanation, *_findings(pair)]
        ),
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


def _explained(pair: Pair) -> str:
    return f"what {pair.tolerance} allows" if pair.tolerance else "what rounding explains"


# --- The verdict ------------------------------------------------------------------------------------------------------


def _headline(pair: Pair) -> str:
    cases = count_of(len(pair.cases), "case")
    if pair.agrees:
        how = f"within {pair.tolerance}, which you chose" if pair.tolerance else "up to rounding"
        return f"in {cases}: values and gradients are the same {how}."
    if pair.agrees is None:
        silent = " and ".join(
            letter for letter, each in zip(LETTERS, pair.readings, strict=True) if not each.gave_results
        )
        return f"in {cases}: {f'{silent} gave no result' if silent else pair.sameness and pair.sameness.why}."
    right = _taken_as_right(pair)
    return f"in {pair.apart} of {cases}: {_what_differs(pair)}{f' ({right})' if right else ''}."


def _taken_as_right(pair: Pair) -> str:
    if pair.tolerance:
        return f"by more than {pair.tolerance}"
    return "what you chose is taken as right" if pair.chosen else f"{pair.reference} is taken as right"


def _what_differs(pair: Pair) -> str:
    same = [pair.part_agrees(part) for part in ("loss", "gradient")]
    if (
        pair.sameness
        and pair.sameness.same
        and pair.sameness.precisions
        and any(not each.alike for each in pair.accuracy)
    ):
        return "the same function, not as accurate"
    if same == [False, False]:
        return "values and gradients differ"
    if False in same:
        return f"only the {'values' if same[1] else 'gradients'} differ"
    if any(pair.failures):
        return "no result there"
    return "NaN there" if pair.with_nan else "the same, and not what you chose"


def _explanation(pair: Pair) -> list[str]:
    """Return what both compute if they agree, else where the mistake is and what to change."""
    if pair.agrees is None:
        return pair.troubles()[:1]
    if pair.agrees:
        return _of_agreement(pair)
    found = {letter: mistakes for letter, mistakes in _mistakes(pair).items() if mistakes}
    if not found:
        return _of_unknown(pair)
    names = {
        letter: f"{letter} ({_short(reading.name)})" for letter, reading in zip(LETTERS, pair.readings, strict=True)
    }
    what = "; ".join(
        f"{names[letter]}: {', '.join(each.what for each in of_side)}" for letter, of_side in found.items()
    )
    cures = (f"Change in {letter}: {'; '.join(each.cure for each in of_side)}." for letter, of_side in found.items())
    return [f"The mistake is in {what}.", *cures]


def _short(name: str) -> str:
    """Return the last part of the name of a user's loss, any other name as it is."""
    return name.removesuffix(" (A)").removesuffix(" (B)").rpartition(":")[2] if is_user_loss(name) else name


def _of_agreement(pair: Pair) -> list[str]:
    if pair.formula_differences:
        return [f"Their formulas differ in the {_listed(pair.formula_differences)}."]
    if pair.known:
        what = "what the options of each case say" if pair.definition == AS_STATED else str(pair.definition)
        held = bool(pair.survey.outcomes) and all(each.status == "agree" for each in pair.survey.outcomes)
        return [
            f"Both compute: {what}.",
            *(["Both are right to rounding, held against true values too."] if held else []),
        ]
    formula = next((each.formula for each in pair.readings if each.formula), None)
    return [
        f"Both compute: {formula or 'a loss whose formula is not known here'}.",
        "They were held against each other only: such a loss has no true values here.",
    ]


def _listed(differences: Sequence[tuple[str, str, str]]) -> str:
    return "; ".join(f"{name}: A {first} | B {second}" for name, first, second in differences)


def _of_unknown(pair: Pair) -> list[str]:
    """Return the verdict on losses whose difference has no name."""
    lines = []
    if troubles := pair.troubles():
        lines.append(f"{troubles[0]}.")
    less_accurate = {each.less_accurate: each.dtype for each in pair.accuracy if each.less_accurate}
    for letter, dtype in less_accurate.items():
        lines += [
            f"The mistake is in the rounding of {letter} in {dtype}.",
            f"Change in {letter}: use log_softmax or log1p in place of log, exp and quotients; add up in {dtype}.",
        ]
    if not lines and (differing := _sorted_differences(pair)):
        worst = differing[0]
        lines.append("The mistake has no name here: no formula that is known fits both.")
        if worst.comparison.worst:
            element = worst.comparison.worst
            lines.append(f"Start at {element.place} in {worst.case}: {values_text(element, worst.dtype)}.")
    return lines[:2]


def _mistakes(pair: Pair) -> dict[str, list[Mistake]]:
    """Return what is wrong on each side, by its letter."""
    asked = {"smoothing": pair.cases[0].smoothing, **pair.cases[0].options} if pair.cases else {}
    found: dict[str, list[Mistake]] = {letter: [] for letter in LETTERS}
    if pair.not_derivatives:
        text = "its gradient is not the derivative of its values: "
        return {letter: [Mistake(f"{text}{each.what}", each.cure)] for letter, each in pair.not_derivatives.items()}
    for letter, reading in zip(LETTERS, pair.readings, strict=True):
        # Where the formulas differ, roundings are not what to mend first.
        small = bool(pair.formula_differences) and reading.mutants == [LESS_ACCURATE]
        if pair.known and reading.mutants and not reading.only_ordinary and not small:
            found[letter] = mistakes(reading.explanations[0].candidate, pair.definition, asked)
    if not any(found.values()) and pair.formula_differences:
        wrong = "B" if pair.reference == "A" else "A"
        found[wrong] = [
            _of_formula(*(each if wrong == "B" else (each[0], each[2], each[1]))) for each in pair.formula_differences
        ]
    return found


def _of_formula(name: str, right: str, wrong: str) -> Mistake:
    """Return the mistake that a difference of two formulas is."""
    if name == "convention":
        return of_convention(wrong, right)
    if name == "reduction":
        return Mistake(f"{wrong}, not {right}", f"return the {right.removeprefix('the ')}")
    if right == "-":
        return Mistake(f"{name} {wrong}", f"remove the {name}")
    return Mistake(f"no {name}" if wrong == "-" else f"{name} {wrong}, not {right}", f"set the {name} to {right}")


# --- The findings -----------------------------------------------------------------------------------------------------


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
            yield f"{name}: {word} (up to {used_share(largest)} {_explained(pair)})"
    yield from pair.troubles()


def _differences(pair: Pair) -> Iterator[str]:
    differing = _sorted_differences(pair)
    if not differing:
        return
    yield from ("", f"The largest, in units of {_explained(pair)} (at most 1 is the same):", "")
    for each in differing[:SHOWN]:
        comparison = each.comparison
        found = [f"{used_share(comparison.share)} in {each.case}, {each.dtype}", comparison.problem, pair.off(each)]
        yield "; ".join(filter(None, found))
        if comparison.worst:
            yield f"    {comparison.worst.place}: {values_text(comparison.worst, each.dtype)}"
    if worst := differing[0].comparison.worst:
        inputs = "; ".join(f"{name}: {value}" for name, value in worst.inputs.items())
        yield from ("", f"Inputs in {differing[0].case}: {inputs}")


def _sorted_differences(pair: Pair) -> list[Difference]:
    """Return the differences beyond rounding, the largest first, those at the edges after all others."""
    differing = [each for each in pair.survey.differences if not each.agrees]
    return sorted(differing, key=lambda each: (is_edge_name(each.case), -each.comparison.share))
