"""Which way a loss was computed, and why not in another."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Explanation:
    """The way that a call of the loss takes, as `explain` returns it; printed, it is the answer in a few lines.

    Args:
        way: the name of the way that is taken.
        about: what that way does, in a sentence.
        passed_over: for each way that was tried before, why it was not taken.
    """

    way: str
    about: str
    passed_over: Mapping[str, str]

    def __str__(self) -> str:
        """Return the way that is taken, and a line for each that is not."""
        return "\n".join(
            [f"{self.way}: {self.about}", *(f"not {way}: {reason}" for way, reason in self.passed_over.items())]
        )


def explanation_of(reasons: Mapping[str, str | None], about: Mapping[str, str]) -> Explanation:
    """Return the explanation of a call.

    Args:
        reasons: why each way that was tried is passed over, None for the one that is taken.
        about: what each way does.
    """
    taken = next(way for way, reason in reasons.items() if reason is None)
    return Explanation(taken, about[taken], {way: reason for way, reason in reasons.items() if reason is not None})
