"""Help texts of the command line: commands in groups, and examples that can be copied.

Typer's own help without Rich cuts what a command does to one line, and wraps examples as if they were prose.
"""

import inspect
import re
from typing import Any

from typer.core import TyperCommand, TyperGroup


def split_examples(text: str) -> tuple[str, str, list[str]]:
    r"""Return the prose of a docstring, the heading of its examples, and the examples, one command a line.

    Example:
        >>> split_examples("Do it.\n\nExamples, of the demo:\n    lsce-parity run\n\n    lsce-parity power")
        ('Do it.', 'Examples, of the demo:', ['lsce-parity run', 'lsce-parity power'])
    """
    found = re.search(r"^Examples?\b.*:$", text, re.MULTILINE)
    if found is None:
        return text.strip(), "", []
    examples = text[found.end() :].splitlines()
    return text[: found.start()].strip(), found[0], [line.strip() for line in examples if line.strip()]


def _write_help(text: str | None, formatter: Any) -> None:
    prose, heading, examples = split_examples(inspect.cleandoc(text or ""))
    formatter.write_paragraph()
    with formatter.indentation():
        formatter.write_text(prose)
    if examples:
        formatter.write_paragraph()
        formatter.write(f"{heading}\n")
        for line in examples:
            formatter.write(f"  {line}\n")


class CommandWithExamples(TyperCommand):
    """A command whose help shows examples as they are: a line that is wrapped cannot be copied."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write what the command does, and its examples."""
        _write_help(self.help, formatter)


class GroupWithPanels(TyperGroup):
    """A group that lists its commands under the headings of their panels, with whole sentences."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write what the group does, and its examples."""
        _write_help(self.help, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a list for each panel."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            sentence = inspect.cleandoc(command.help or "").partition("\n\n")[0]
            panels.setdefault(getattr(command, "rich_help_panel", None) or "Commands", []).append((name, sentence))
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)
