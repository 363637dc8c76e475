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


def share_text(share: float, digits: int = 2) -> str:
    """Return a share in few characters; a share other than 1 is never rounded to 1.

    Args:
        share: the share.
        digits: of a share of a thousand and more.

    Example:
        >>> [share_text(share) for share in (0.0, 0.997, 1.003, 25.2, 31415.0, float("inf"))]
        ['0', '0.99', '1.01', '25', '3.1e4', '∞']
    """
    if share == 0:
        return "0"
    if not math.isfinite(share):
        return "∞"
    if share < 1:
        return f"{min(share, 0.99):.2f}"
    if share < 9.995:
        return f"{max(share, 1.01) if share > 1 else 1:.2f}"
    if share < 999.5:
        return f"{share:.0f}"
    mantissa, exponent = f"{share:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def used_share(share: float) -> str:
    """Return the share of a bound, as the start of a phrase: "0.5 of", "2 times"."""
    return f"{share_text(share)} {'times' if share > 1 else 'of'}"


def number_text(value: float, dtype: str) -> str:
    """Return a number with all its digits: 17 in float64, 9 otherwise."""
    return f"{value:.{17 if dtype == 'float64' else 9}g}"


def known_share(share: float) -> float:
    """Return a share; NaN, which compares as smaller than everything, counts as infinite."""
    return math.inf if math.isnan(share) else share


def values_text(worst: Worst, dtype: str) -> str:
    """Return the values of an element with all their digits."""
    return worst.values(lambda value: number_text(value, dtype))
