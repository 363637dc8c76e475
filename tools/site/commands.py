"""The page of the commands: what `lsce-parity`, each of its subcommands and `lsce-cost` answer to `--help`."""

import textwrap

import typer
from typer.testing import CliRunner

from lsce_cost.__main__ import app as cost
from parity_tests.__main__ import app as parity
from tools.site.api import heading

PROGRAMS = {"lsce-parity": parity, "lsce-cost": cost}
INTRODUCTION = """\
What each command answers to ``--help``. :doc:`/parity` and :doc:`/cost` show them at work.
"""


def page() -> str:
    """Return the page as reStructuredText."""
    parts = [heading("Commands"), INTRODUCTION]
    for program, app in PROGRAMS.items():
        parts += [heading(program, "-"), _help(program, app)]
        for name in subcommands(app):
            parts += [heading(f"{program} {name}", "^"), _help(program, app, name)]
    return "\n\n".join(parts) + "\n"


def subcommands(app: typer.Typer) -> list[str]:
    """Return the names of the subcommands of a program, in order; none if it is one command."""
    return [*getattr(typer.main.get_command(app), "commands", {})]


def _help(program: str, app: typer.Typer, *names: str) -> str:
    outcome = CliRunner().invoke(app, [*names, "--help"], prog_name=program, env={"COLUMNS": "80"})
    if outcome.exit_code:
        raise ValueError(
            f"{program} {' '.join(names)} --help ends with exit code {outcome.exit_code}: {outcome.output}"
        )
    return ".. code-block:: text\n\n" + textwrap.indent(outcome.output.strip(), "   ")
