"""The verdict at the top of the page, and the sentences that explain it."""

from typing import NamedTuple

from parity_tests.studies.survey import Survey
from parity_tests.studies.verdicts import Difference, Outcome
from parity_tests.texts import count_of, share_text
from parity_tests.trainings.trajectory import TrajectoryVerdict


class Banner(NamedTuple):
    """The verdict: a word, its style, and the sentences that support it."""

    word: str
    style: str
    sentences: list[str]


def verdict(survey: Survey, trajectory: TrajectoryVerdict | None, agrees: bool | None = None) -> Banner:
    """Return the verdict of the whole survey: our adapters decide it, peers are only described."""
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
            f"{count_of(unsupported, 'call')} left out, since the adapter lacks an option that the case needs."
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
    """Return sentences with the counts of results by outcome, and the largest share of a bound."""
    if not outcomes:
        return []
    adapters, cases = {outcome.adapter for outcome in outcomes}, {outcome.case for outcome in outcomes}
    dtypes = list(dict.fromkeys(outcome.dtype for outcome in outcomes))
    disagree = sum(outcome.status == "disagree" for outcome in outcomes)
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    sentences = [
        f"{count_of(len(adapters), 'adapter')} in {count_of(len(cases), 'case')} and {count_of(len(dtypes), 'dtype')} "
        f"({', '.join(dtypes)}): {disagree or 'none'} of {count_of(len(outcomes), 'result')} outside of the bounds, "
        f"{failed or 'none'} failed."
    ]
    compared = [(outcome.comparison.share, outcome) for outcome in outcomes if outcome.comparison]
    if compared:
        share, worst = max(compared, key=lambda pair: pair[0])
        place = f"{worst.adapter} in {worst.case}, {worst.dtype}"
        sentences.append(f"Largest share of a bound: {share_text(share)} ({place}).")
    return sentences


def difference_sentences(differences: list[Difference]) -> list[str]:
    """Return a sentence with the number of pairs that differ by more than both bounds, if there are any."""
    apart = sum(not difference.agrees for difference in differences)
    return [f"{apart} of {count_of(len(differences), 'pair')} differ by more than both bounds."] if apart else []


def trajectory_sentence(trajectory: TrajectoryVerdict) -> str:
    """Return a sentence on the comparison of two trainings."""
    steps, step = len(trajectory.difference), trajectory.first_divergence
    if step is None:
        sentence = (
            f"Trainings agree over {count_of(steps, 'step')}: at most {share_text(trajectory.largest_share)} of the "
            f"difference that rounding explains (step {trajectory.worst_step})."
        )
    else:
        sentence = (
            f"Trainings part at step {step}, counted from 0, of {count_of(steps, 'step')}: difference "
            f"{trajectory.difference[step]:.2g}, allowed "
            f"{trajectory.allowed[step]:.2g}."
        )
    if trajectory.blind_from is not None:
        sentence += f" From step {trajectory.blind_from} on agreement says little: one rounding decides."
    return sentence
