"""Suggestions for misspelt names, control characters made visible, and numbers with their nouns.

Standard library only, for every part of the harness.
"""

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


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless the number is 1."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


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
