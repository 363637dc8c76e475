"""Tables of text: printed in a terminal, or as Markdown."""

from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as RichTable


class Table(NamedTuple):
    """A table of text. Floors, which do less than any loss must, come last, after a line."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    legend: str = ""
    num_floors: int = 0


def print_table(table: Table, console: Console) -> None:
    """Print a table and its legend."""
    console.print(table.title, style="bold", markup=False, highlight=False)
    rich_table = RichTable(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for i, heading in enumerate(table.headings):
        rich_table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for i, row in enumerate(table.rows):
        rich_table.add_row(*row, end_section=i == len(table.rows) - table.num_floors - 1)
    console.print(rich_table, f"{table.legend}\n", sep="\n", highlight=False)


def markdown(table: Table) -> str:
    """Return a table and its legend as Markdown."""
    lines = [f"**{table.title}**", "", f"| {' | '.join(table.headings)} |", "|---" * len(table.headings) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in table.rows]
    return "\n".join([*lines, "", *table.legend.splitlines()]).rstrip()


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as text, such as "8192 x 32768"."""
    return " x ".join(map(str, shape))


def mb(size: float) -> str:
    """Return bytes in MB."""
    return f"{size / 1e6:.{0 if size >= 1e8 else 1 if size >= 1e6 else 2}f}"


def three_digits(value: float) -> str:
    """Return a positive number with three digits or more."""
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}"
