"""Writes the output of a command into a page, between two comments that name the command."""

from pathlib import Path


def replace_block(page: str, command: str, text: str) -> str:
    """Return a page with a text between the comments of a command.

    Raises:
        ValueError: the page does not have each of the two comments once, in this order.
    """
    begin, end = f"<!-- {command}: begin -->", f"<!-- {command}: end -->"
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end) or begin in rest or end in before + after:
        raise ValueError(f"the page needs each of these lines once, in this order: {begin} and {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def write_block(page: Path, command: str, text: str) -> None:
    """Write a text into a page, between the comments of a command.

    Raises:
        OSError: the page cannot be read or written.
        ValueError: as `replace_block`.
    """
    page.write_text(replace_block(page.read_text(encoding="utf-8"), command, text), encoding="utf-8")
