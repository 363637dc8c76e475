"""The command line of the harness: `lsce-parity`, or `python -m parity_tests`."""

import sys
import traceback

import typer

from parity_tests.commands.common import CANNOT_RUN

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Hold losses of PyTorch and JAX against each other and against the truth. Exit code 0: they agree, 1: they "
    "do not, 2: it could not be found out.",
)


def main() -> None:
    """Run the command line. An error of ours ends with exit code 2 too, since 1 says that losses disagree."""
    try:
        app()
    except Exception:
        traceback.print_exc()
        sys.exit(CANNOT_RUN)


if __name__ == "__main__":
    main()
