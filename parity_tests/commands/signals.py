"""How a command ends on Ctrl-C or SIGTERM: at once, without a process or a part of a file left behind."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import typer


class Stopped(BaseException):
    """The process was asked to end. No `except` clause of a library, nor of click, is meant to catch this."""

    def __init__(self, number: int) -> None:
        """Keep the number of the signal."""
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have SIGINT and SIGTERM leave the body of the `with` statement, clean up, and end this process.

    It ends by the signal itself, so a shell sees 130 or 143. Threads in which a compiler is at work are not waited for.
    A second signal ends the process before it has cleaned up.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        yield
    except Stopped as stopped:
        typer.echo(f"stopped by {stopped}", err=True)
        sys.stdout.flush()
        os.kill(os.getpid(), stopped.number)
