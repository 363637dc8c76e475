"""Suggestions for misspelt names, control characters made visible, and numbers with their nouns.

Standard library only, for every part of the harness.
"""

import math
import re
from collections.abc import Iterable
from difflib import get_close_matches

# Control characters but tab and newline, marks that reverse the direction of text, and halves of surrogate pairs, which
# no output can encode.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
SUGGESTED = 3
SHORTEST_PART = 3


def visible(text: str) -> str:
    r"""Return a text whose control characters are spelt out, as in a Python string. Newlines and tabs stay.

    Names and messages come from users and from files. Printed as they are, escape codes could recolour a terminal,
    rename its window or overwrite a verdict.

    Example:
        >>> print(visible("a\x1b[31mred\x1b[0m"))
        a\x1b[31mred\x1b[0m
    """
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


def count_of(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, in the plural unless the number is 1."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def share_text(share: float) -> str:
    """Return a share in few characters: one of a thousand and more as a power of ten, none but 1 rounded to 1.

    Example:
        >>> [share_text(share) for share in (0.0, 0.997, 1.003, 25.2, 31415.0, float("inf"))]
        ['0', '0.99', '1.01', '25', '10^4', '∞']
    """
    if share == 0:
        return "0"
    if not math.isfinite(share):
        return "∞"
    if share < 1:
        return f"{min(share, 0.99):.2f}"
    if share < 9.995:
        return f"{max(share, 1.01) if share > 1 else 1:.2f}"
    return f"{share:.0f}" if share < 999.5 else f"10^{math.log10(share):.0f}"


def used_share(share: float) -> str:
    """Return the share of a bound, as the start of a phrase: "0.5 of", "2 times", "10^6 times"."""
    return f"{share_text(share)} {'of' if share <= 1 else 'times'}"


def one_line(text: str) -> str:
    r"""Return a text as `visible` does, with newlines and tabs spelt out too.

    Example:
        >>> print(one_line("ties\nAGREE"))
        ties\nAGREE
    """
    return visible(text.replace("\n", "\\n").replace("\t", "\\t"))


def nearest(given: str, known: Iterable[str]) -> list[str]:
    """Return the known names closest to a given name or pattern: similar spellings, or names that contain it.

    Example:
        >>> nearest("Jax-fusd", ["jax-fused", "torch-fused", "oracle"])
        ['jax-fused']
        >>> nearest("h100", ["cpu", "gpu-a100", "gpu-h100"])
        ['gpu-h100']
    """
    by_lower = {name.lower(): name for name in known}
    wanted = given.lower().translate(str.maketrans("", "", "*?[]"))
    containing = [name for name in by_lower if len(wanted) >= SHORTEST_PART and wanted in name]
    close = get_close_matches(wanted, by_lower, n=SUGGESTED, cutoff=0.7) or containing[:SUGGESTED]
    return [by_lower[name] for name in close]


def with_nearest(problem: str, given: str, known: Iterable[str], plural: str) -> str:
    """Return a message with the names that may have been meant, or else with all names.

    Args:
        problem: what is wrong, as in "there is no dtype 'float23'".
        given: the name or pattern that is not known.
        known: the names that are.
        plural: what they are, as in "dtypes".

    Example:
        >>> with_nearest("no case is called tie", "tie", ["ties", "one_row"], "cases")
        'no case is called tie; did you mean ties?'
        >>> with_nearest("no case is called x", "x", ["ties", "one_row"], "cases")
        'no case is called x; the cases are ties, one_row'
    """
    names = list(dict.fromkeys(known))
    return problem + (did_you_mean(given, names) or f"; the {plural} are {', '.join(names)}")


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return the end of a message, with the names that may have been meant; empty if none is near.

    Example:
        >>> did_you_mean("tie", ["ties", "one_row"])
        '; did you mean ties?'
    """
    close = nearest(given, known)
    return f"; did you mean {' or '.join(close)}?" if close else ""
