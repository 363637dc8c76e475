"""Helpers of the tests of bundles: record and replay as commands, and a file with one bit flipped."""

from pathlib import Path

import typer
from typer.testing import CliRunner
from typer.testing import Result as CommandResult

from parity_tests.commands.record import record as record_command
from parity_tests.commands.replay import replay as replay_command

GOLDEN = Path(__file__).parents[1] / "golden"
app = typer.Typer()
app.command()(record_command)
app.command()(replay_command)


def run(*arguments: str | Path) -> CommandResult:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def flip(path: Path, byte: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)
