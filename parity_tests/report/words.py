"""Numbers and counts of the page in words."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from parity_tests.truth.comparison import Worst

# The two losses of a comparison, on pages and terminals.
LETTERS = ("A", "B")


class PageTable(NamedTuple):
    """A table of results.

    Args:
        title: its heading.
        headings: of the columns; a first > or ~, which `FittingTable` reads, is left out on a page.
        rows: the cells.
        note: a sentence to show above it.
        wrong: whether each row shows what does not agree; empty if that was not asked.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    wrong: Sequence[bool] = ()


def number_text(value: float, dtype: str) -> str:
    """Return a number with all its digits: 17 in float64, 9 otherwise."""
    return f"{value:.{17 if dtype == 'float64' else 9}g}"


def known_share(share: float) -> float:
    """Return a share; NaN, which compares as smaller than everything, counts as infinite."""
    return math.inf if math.isnan(share) else share


def values_text(worst: Worst, dtype: str) -> str:
    """Return the values of an element with all their digits."""
    return worst.values(lambda value: number_text(value, dtype))
