"""Output on terminals: no escape codes from outside, tables that fit any width, and readers that leave early."""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from parity_tests.texts import one_line, visible

# A column of long text may be this narrow before a table gives way to a list.
NARROWEST_TEXT = 24


class PlainConsole(Console):
    """A console that prints texts as they are but for control characters: names and messages come from users."""

    def __init__(self) -> None:
        """Switch markup off."""
        super().__init__(markup=False)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print objects as `rich.console.Console.print` does; control characters in texts are spelt out."""
        super().print(*map(_visible, objects), **options)


def print_verdict(lines: Iterable[str], console: Console) -> None:
    """Print the lines of a verdict, each on a line of its own where there is no terminal: `... | tail -3` has them."""
    for line in lines:
        console.print(Text(line), soft_wrap=not console.is_terminal)


def _visible(item: Any) -> Any:
    if isinstance(item, str):
        return visible(item)
    if isinstance(item, Text) and visible(item.plain) != item.plain:
        return Text(visible(item.plain), style=item.style, overflow=item.overflow)
    return item


class FittingTable(Table):
    """A table whose rows become paragraphs where a terminal is too narrow for its columns.

    Columns of text are folded first, and columns without a single entry left out. In a paragraph the first `titles`
    cells of a row are the heading; the others follow with the headings of their columns, if they are not empty.
    """

    def __init__(self, *headings: str, titles: int = 1) -> None:
        """Take the headings of the columns, and the number of cells that name a row.

        A heading that starts with > is that of numbers, aligned to the right; one that starts with ~ is that of text
        that may be folded.
        """
        super().__init__(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        self.titles = titles
        for heading in headings:
            self.add_column(
                heading.lstrip(">~"),
                justify="right" if heading.startswith(">") else "left",
                overflow="fold",
                min_width=NARROWEST_TEXT if heading.startswith("~") else None,
                no_wrap=not heading.startswith("~"),
            )

    @classmethod
    def of(cls, headings: Sequence[str], rows: Iterable[Sequence[str]], titles: int = 1) -> "FittingTable":
        """Return a table with these headings and rows."""
        table = cls(*headings, titles=titles)
        for row in rows:
            table.add_row(*row)
        return table

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row; strings and texts are shown on one line."""
        super().add_row(*map(_cell, cells), **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table, or paragraphs."""
        if self._needed(console) > options.max_width:
            self.columns = [each for each in self.columns if any(map(_plain, each.cells)) or not self.rows]
        if self._needed(console) > options.max_width:
            yield from self._paragraphs(options.max_width)
            return
        for column in self.columns:
            natural = self._natural_width(column, console)
            column.min_width = min(natural, column.min_width or natural)
        yield from super().__rich_console__(console, options)

    def _needed(self, console: Console) -> int:
        """Return the smallest width at which nothing is cut: columns of text may be folded, others may not."""
        naturals = [self._natural_width(column, console) for column in self.columns]
        widths = [min(each, column.min_width or each) for each, column in zip(naturals, self.columns, strict=True)]
        return sum(widths) + 2 * len(widths)  # the padding, and the line between columns

    @staticmethod
    def _natural_width(column: Column, console: Console) -> int:
        return max(console.measure(cell).maximum for cell in (column.header, *column.cells))

    def _paragraphs(self, width: int) -> Iterator[Text | Padding]:
        for row in zip(*(column.cells for column in self.columns), strict=True):
            cells = [_plain(cell) for cell in row]
            yield Text("  ".join(filter(None, cells[: self.titles])), style="bold", overflow="fold")
            pairs = zip(self.columns[self.titles :], cells[self.titles :], strict=True)
            parts = [f"{_plain(column.header)}: {cell}" for column, cell in pairs if cell]
            yield Padding(Text(_packed(parts, width - 2), overflow="fold"), (0, 0, 0, 2))


def _packed(parts: list[str], width: int) -> str:
    """Return parts with semicolons between them, in lines that break between parts."""
    lines: list[str] = []
    for part in parts:
        if lines and cell_len(lines[-1]) + cell_len(part) + 3 <= width:
            lines[-1] += f"; {part}"
        else:
            lines.append(part)
    return ";\n".join(lines)


def _cell(cell: Any) -> Any:
    if isinstance(cell, str):
        return Text(one_line(cell))
    if isinstance(cell, Text) and one_line(cell.plain) != cell.plain:
        return Text(one_line(cell.plain), style=cell.style, overflow=cell.overflow)
    return cell


def _plain(cell: Any) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)


class Unread(io.TextIOWrapper):
    """A standard stream whose reader may leave, as in `lsce-parity ... | head`: what follows is discarded.

    The command goes on, for its files and its exit code.
    """

    def write(self, text: str) -> int:
        """Write a text, or nothing if nobody reads it."""
        try:
            return super().write(text)
        except BrokenPipeError:
            _discard(self.fileno())
            return len(text)

    def flush(self) -> None:
        """Flush, or discard what nobody reads."""
        try:
            super().flush()
        except BrokenPipeError:
            _discard(self.fileno())


def _discard(stream: int) -> None:
    """Let a file descriptor lead nowhere, so that what is still buffered is no error later."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream)
    os.close(nowhere)


def may_lose_its_reader(stream: io.TextIOWrapper) -> Unread:
    """Return a standard stream that is not troubled by a reader that leaves, in place of the given one.

    Characters that the encoding of the stream lacks are spelt out.
    """
    encoding, buffered = stream.encoding, stream.line_buffering
    stream.flush()
    return Unread(stream.detach(), encoding=encoding, errors="backslashreplace", line_buffering=buffered)
