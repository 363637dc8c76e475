"""The command line of the harness: `lsce-parity`, or `python -m parity_tests`."""

import sys
import traceback

from lsce_spec.extras import require_for_command

# What every command needs.
require_for_command("lsce-parity", "parity", "numpy", "ml_dtypes", "mpmath", "safetensors", "scipy", "typer", "rich")

import typer

from parity_tests.commands.common import CANNOT_RUN
from parity_tests.commands.compare import compare
from parity_tests.commands.devices import devices
from parity_tests.commands.fingerprint import fingerprint
from parity_tests.commands.hunt import hunt
from parity_tests.commands.kit import kit
from parity_tests.commands.matrix import matrix
from parity_tests.commands.peer_tests import peer_tests
from parity_tests.commands.power import power
from parity_tests.commands.record import record
from parity_tests.commands.replay import replay
from parity_tests.commands.run import adapters, run
from parity_tests.commands.self_check import self_check
from parity_tests.commands.trajectory import trajectory

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Compare losses of PyTorch and JAX with each other and with the truth. Exit code 0: they agree, 1: they do "
    "not, 2: there is no verdict.",
)
app.command()(adapters)
app.command()(compare)
app.command()(devices)
app.command()(fingerprint)
app.command()(hunt)
app.command()(kit)
app.command()(matrix)
app.command()(peer_tests)
app.command()(power)
app.command()(record)
app.command()(replay)
app.command()(run)
app.command()(self_check)
app.command()(trajectory)


def main() -> None:
    """Run the command line. An internal error exits with 2 too, since 1 means that losses disagree."""
    try:
        app()
    except Exception:
        traceback.print_exc()
        sys.exit(CANNOT_RUN)


if __name__ == "__main__":
    main()
