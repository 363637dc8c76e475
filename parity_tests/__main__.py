"""The command line of the harness: `lsce-parity`, or `python -m parity_tests`."""

import gc
import io
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

from lsce_spec.extras import require_for_command

# What every command needs.
require_for_command("lsce-parity", "parity", "numpy", "ml_dtypes", "mpmath", "safetensors", "scipy", "typer", "rich")

import typer

from parity_tests.commands.common import CANNOT_RUN
from parity_tests.commands.compare import compare
from parity_tests.commands.devices import devices
from parity_tests.commands.fingerprint import fingerprint
from parity_tests.commands.help_texts import CommandWithExamples, GroupWithPanels
from parity_tests.commands.hunt import hunt
from parity_tests.commands.kit import kit
from parity_tests.commands.layers import layers
from parity_tests.commands.matrix import matrix
from parity_tests.commands.peer_tests import peer_tests
from parity_tests.commands.power import power
from parity_tests.commands.record import record
from parity_tests.commands.replay import replay
from parity_tests.commands.run import adapters, run
from parity_tests.commands.self_check import self_check
from parity_tests.commands.signals import ended_by_signals
from parity_tests.commands.terminal import may_lose_its_reader
from parity_tests.commands.trajectory import trajectory
from parity_tests.evidence.environment import installed_versions
from parity_tests.texts import one_line
from parity_tests.truth.stored import truths_on_disk

TRACEBACK = "--traceback"
PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "For your losses": (compare, trajectory, layers, record, replay, self_check, devices, fingerprint),
    "About this library": (run, adapters, power, hunt, kit, matrix, peer_tests),
}

app = typer.Typer(
    cls=GroupWithPanels,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
for panel, commands in PANELS.items():
    for command in commands:
        app.command(cls=CommandWithExamples, rich_help_panel=panel)(command)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lsce {installed_versions(['lsce']).get('lsce', 'unknown')}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option(TRACEBACK, help="Show where an internal error arose. It may stand anywhere.")
    ] = False,
) -> None:
    """Compare losses of PyTorch and JAX with each other and with the truth.

    Exit code 0: they agree, 1: they do not, 2: there is no verdict.

    Examples:
        lsce-parity compare torch:torch.nn:CrossEntropyLoss jax:my.losses:smooth_ce --a label_smoothing=0.1
        lsce-parity compare --help
    """


def main() -> None:
    """Run the command line. An internal error exits with 2 too, since 1 means that losses disagree."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, may_lose_its_reader(stream))
    arguments = [each for each in sys.argv[1:] if each != TRACEBACK]
    # The collector would walk through the many small objects of JAX so often that it takes a fifth of the time.
    gc.set_threshold(100_000, 20, 100)
    try:
        with ended_by_signals(), truths_on_disk():
            app(arguments)
    except Exception as error:
        if TRACEBACK in sys.argv[1:]:
            traceback.print_exc()
        else:
            text = one_line(f"{type(error).__name__}: {error}")
            typer.echo(f"internal error: {text}; run again with {TRACEBACK}, and report it", err=True)
        sys.exit(CANNOT_RUN)


if __name__ == "__main__":
    main()
