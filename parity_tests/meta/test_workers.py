"""The processes of adapters: answers, errors, time-outs, and that none is left."""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from parity_tests.losses.workers import WorkerError, Workers
from parity_tests.meta import in_workers


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    started = Workers(2, in_workers.prepare)
    yield started
    started.stop()


def test_answers(workers: Workers, capfd: pytest.CaptureFixture[str]) -> None:
    assert workers.run(in_workers.told, [("a",), ("b",)]) == [(0, 2, True, "a"), (1, 2, True, "b")]
    assert workers.run(in_workers.told, [("c",)], members=[1]) == [(1, 2, True, "c")]
    problem, answer = workers.run(in_workers.fail, [("wrong",), ("too",)])
    assert isinstance(problem, ValueError)
    assert str(problem) == "wrong"
    assert str(answer) == "too"
    assert capfd.readouterr().out == ""


def test_one_that_ends(workers: Workers) -> None:
    """The others answer, and the next call starts all anew."""
    before = workers.run(in_workers.pid, [(), ()])
    answer, problem = workers.run(in_workers.end, [(0,), (5,)])
    assert answer is None
    assert isinstance(problem, WorkerError)
    assert str(problem) == "process 1 of 2 has ended, with exit code 5"
    assert not set(before) & set(workers.run(in_workers.pid, [(), ()]))


def test_one_that_does_not_answer(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    workers.run(in_workers.pid, [(), ()])
    monkeypatch.setattr(workers, "seconds", 1.0)
    begin = time.monotonic()
    answer, problem = workers.run(in_workers.sleep, [(0.0,), (1000.0,)])
    assert time.monotonic() - begin < 60
    assert answer == 0
    assert isinstance(problem, WorkerError)
    assert str(problem) == "process 1 of 2 has not answered for 1 s"
    assert not workers.processes


CODE = """
import os, signal
from parity_tests.losses.workers import Workers
from parity_tests.meta import in_workers

Workers(1, in_workers.prepare).run(in_workers.pid, [()])
{end}
"""


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_none_is_left(end: str) -> None:
    """Neither by a program that ends, nor by one that is killed: each process holds the end of a pipe."""
    subprocess.run([sys.executable, "-c", CODE.format(end=end)], stderr=subprocess.PIPE, check=False, timeout=60)
