"""Writes what an example has found into a page of the documentation: tables, pictures, and how to get them again."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

from rich.table import Table

from examples.digits_report import versions
from parity_tests.evidence.environment import cpu_name
from parity_tests.evidence.pages import write_block


class Grid(NamedTuple):
    """A table, for terminals and for pages."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def for_terminal(self) -> Table:
        """Return it for rich."""
        table = Table(*self.header, title=self.title, title_justify="left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def for_page(self) -> str:
        """Return it in Markdown.

        Example:
            >>> print(Grid("Two of them", ["one", "other"], [["1", "2"]]).for_page())
            Two of them:
            <BLANKLINE>
            | one | other |
            | --- | --- |
            | 1 | 2 |
        """
        rows = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join([f"{self.title}:", "", *("| " + " | ".join(row) + " |" for row in rows)])


class Picture(NamedTuple):
    """A picture for a page.

    Args:
        path: of the file that was drawn.
        name: of its copy beside the page.
        text: what it shows, for those who do not see it.
    """

    path: Path
    name: str
    text: str


def write_record(
    page: Path, module: str, options: str, libraries: Sequence[str], parts: Sequence[Grid | Picture | str]
) -> None:
    """Write tables, pictures and paragraphs between the comments that name a module, and copy the pictures.

    Args:
        page: with the comments `<!-- MODULE: begin -->` and `<!-- MODULE: end -->`, each in a line of its own.
        module: that is run by `python -m`.
        options: of its command line.
        libraries: whose versions matter.
        parts: in this order.

    Raises:
        OSError: the page cannot be read or written.
        ValueError: the comments are not there.
    """
    command = f"python -m {module} {options}".strip()
    installed = ", ".join(f"{name} {version}" for name, version in versions(*libraries).items())
    source = f"`{command}`, {cpu_name()}, {datetime.now().astimezone().date()}, {installed}."
    text = [fill(source, width=120, break_long_words=False, break_on_hyphens=False)]
    for part in parts:
        if isinstance(part, Grid):
            text.append(part.for_page())
        elif isinstance(part, Picture):
            text.append(f"![{part.text}](images/{part.name})")
        else:
            text.append(part)
    write_block(page, module, "\n\n".join(text))
    images = page.parent / "images"
    images.mkdir(exist_ok=True)
    for picture in (part for part in parts if isinstance(part, Picture)):
        (images / picture.name).write_bytes(picture.path.read_bytes())
