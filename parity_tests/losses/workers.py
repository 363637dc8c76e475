"""Processes that run functions for adapters, one call after another, and end with the program that started them."""

import atexit
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic
from typing import Any

from parity_tests.losses.adapters import LossError

# A process waits at most half as long for the others, so that it can say so.
SECONDS = 120.0

# Called first in each process, with its number, how many there are, and a folder that they share. What it returns is
# the first argument of every function.
Prepare = Callable[[int, int, Path], Any]


class WorkerError(LossError):
    """A process has ended, or does not answer; the message says which."""


class Workers:
    """Processes that run functions of modules that they can import.

    They start with the first call, and anew with the next call after one has ended or has not answered.

    Args:
        number: how many.
        prepare: see `Prepare`.
        seconds: how long a call may take.
    """

    def __init__(self, number: int, prepare: Prepare, seconds: float = SECONDS) -> None:
        """Start none yet."""
        self.number, self.prepare, self.seconds = number, prepare, seconds
        self.ends: list[Connection] = []
        self.processes: list[BaseProcess] = []
        atexit.register(self.stop)

    def run(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], members: Sequence[int] | None = None
    ) -> list[Any]:
        """Return what a function returns or raises in each of some processes.

        Where a process ends or does not answer, that is a `WorkerError`, and all processes are stopped.

        Args:
            function: takes what `prepare` has returned, and the arguments of its process.
            arguments: those of each process.
            members: numbers of the processes; None for all.
        """
        if not self.processes:
            self._start()
        members = range(self.number) if members is None else members
        pending: dict[Connection, int] = {}
        for rank, (member, of_rank) in enumerate(zip(members, arguments, strict=True)):
            pending[self.ends[member]] = rank
            with suppress(OSError):  # it has ended, which shows when its answer is read
                self.ends[member].send((function, of_rank))
        answers: list[Any] = [None] * len(pending)
        until, failed = monotonic() + self.seconds, False
        while pending:
            ready = wait(list(pending), max(0.0, until - monotonic()))
            for end in [each for each in pending if not ready or each in ready]:
                rank = pending.pop(end)
                try:
                    answers[rank] = end.recv() if ready else self._silent(rank, len(answers))
                except (EOFError, OSError):
                    answers[rank] = self._ended(rank, members[rank], len(answers))
                failed |= isinstance(answers[rank], WorkerError)
        if failed:
            self.stop()
        return answers

    def _silent(self, rank: int, number: int) -> WorkerError:
        return WorkerError(f"process {rank} of {number} has not answered for {self.seconds:g} s")

    def _ended(self, rank: int, member: int, number: int) -> WorkerError:
        self.processes[member].join(self.seconds)
        return WorkerError(f"process {rank} of {number} has ended, with exit code {self.processes[member].exitcode}")

    def _start(self) -> None:
        context = get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        for number in range(self.number):
            here, there = context.Pipe()
            arguments = (self.prepare, number, self.number, Path(self.folder.name), there)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self.ends.append(here)
            self.processes.append(process)

    def stop(self) -> None:
        """Stop them."""
        for process in self.processes:  # all before any is waited for: JAX says a lot of one that is missing
            process.kill()
        for process in self.processes:
            process.join()
        for end in self.ends:
            end.close()
        if self.processes:
            self.folder.cleanup()
        self.ends, self.processes = [], []


def _serve(prepare: Prepare, number: int, of: int, folder: Path, caller: Connection) -> None:
    # Ctrl-C is for the program that started this one. What gloo prints is for nobody.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    prepared = prepare(number, of, folder)
    while True:
        try:
            function, arguments = caller.recv()
        except EOFError:  # the caller has ended
            return
        try:
            answer = function(prepared, *arguments)
        except Exception as problem:
            answer = problem
        caller.send(answer)
