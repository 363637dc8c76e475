"""Ctrl-C, SIGTERM and SIGKILL end `run` and all its processes, and leave no part of a file."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from parity_tests.commands.signals import Stopped
from parity_tests.truth import files
from parity_tests.truth.files import write_folder, write_whole

# `run` of an adapter in a process of its own, and of one in a thread; a call of one of them takes long.
RUN = """
import sys, time
from pathlib import Path
from parity_tests.__main__ import main
from parity_tests.losses.peers import WorkerAdapter
from parity_tests.losses.registry import ENTRIES, Entry, FaultyAdapter

class Slow(FaultyAdapter):
    concurrent = True
    def __init__(self, name="worker"):
        super().__init__()
        self.name = name
    def __call__(self, case):
        Path(__file__).with_name(f"{{self.name}} was called").touch()
        time.sleep(120 if self.name == {slow!r} else 0)
        return super().__call__(case)

if __name__ == "__main__":
    makers = {{"worker": lambda device: WorkerAdapter(Slow, {{}}), "thread": lambda device: Slow("thread")}}
    for name in sys.argv.pop(1).split(","):
        ENTRIES[name] = Entry(name, "numpy", "ours", makers[name])
        sys.argv += ["--adapter", name]
    main()
"""


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Return `_start`. What it has started is gone after the test, even if that fails."""
    started: list[subprocess.Popen[str]] = []

    def begin(folder: Path, adapters: str, slow: str = "") -> subprocess.Popen[str]:
        started.append(_start(folder, adapters, slow))
        return started[-1]

    yield begin
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _start(folder: Path, adapters: str, slow: str) -> subprocess.Popen[str]:
    """Return a `run` that writes to `folder/out`, once its adapters have been called."""
    script, out = folder / "script.py", folder / "out"
    script.write_text(RUN.format(slow=slow))
    out.mkdir()
    arguments = ["run", "--case", "ties", "--dtype", "float32", "--json", str(out / "run.json")]
    process = subprocess.Popen(
        [sys.executable, str(script), adapters, *arguments, "--report", str(out / "page")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while not all((folder / f"{name} was called").exists() for name in adapters.split(",")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_all_processes(number: signal.Signals, tmp_path: Path, start: Start) -> None:
    process = start(tmp_path, "worker", slow="worker")
    process.send_signal(number)
    # The pipe ends when nobody is left who could write to it: neither the worker nor a tracker of resources.
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -number, output
    assert "Traceback" not in output
    assert (f"stopped by {number.name}" in output) == (number != signal.SIGKILL)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("slow", ["worker", "thread"])
def test_ctrl_c_reaches_all_processes_and_none_prints_a_traceback(slow: str, tmp_path: Path, start: Start) -> None:
    """A terminal sends it to the whole group: to a worker that computes, and to one that waits."""
    process = start(tmp_path, "worker,thread", slow)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in output


def test_a_call_in_a_thread_is_not_waited_for(tmp_path: Path, start: Start) -> None:
    process = start(tmp_path, "thread", slow="thread")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM


def test_without_a_signal_the_same_run_writes_its_files(tmp_path: Path, start: Start) -> None:
    process = start(tmp_path, "worker,thread")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["page", "run.json"]


@pytest.mark.parametrize("place", ["write_bytes", "replace"])
def test_an_interrupted_file_stays_as_it_was(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path / "old", tmp_path / "new"):
        folder.mkdir()
    (tmp_path / "old" / "file").write_text("as it was")

    def stopped(*arguments: object) -> None:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(*((Path, place) if place == "write_bytes" else (files.os, place)), stopped)
    for folder in (tmp_path / "old", tmp_path / "new"):
        with pytest.raises(Stopped, match="SIGTERM"):
            write_whole(folder / "file", "something else")
        with pytest.raises(Stopped):
            write_folder(folder / "folder", {"one": b"1", "two": b"2"})
    monkeypatch.undo()
    assert [each.name for each in (tmp_path / "old").iterdir()] == ["file"]
    assert (tmp_path / "old" / "file").read_text() == "as it was"
    assert list((tmp_path / "new").iterdir()) == []


def test_whole_files_and_folders(tmp_path: Path) -> None:
    write_whole(tmp_path / "deep" / "file", "Ä")
    assert (tmp_path / "deep" / "file").read_bytes() == "Ä".encode()
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "deep" / "file").stat().st_mode == plain.stat().st_mode
    write_folder(tmp_path / "a" / "b", {"one": b"1", "two": b"2"})
    (tmp_path / "a" / "b" / "three").touch()
    write_folder(tmp_path / "a" / "b", {"one": b"new", "two": b"2"})
    assert {each.name: each.read_bytes() for each in (tmp_path / "a" / "b").iterdir()} == {
        "one": b"new",
        "two": b"2",
        "three": b"",
    }
    assert (tmp_path / "a" / "b").stat().st_mode == (tmp_path / "a").stat().st_mode
    # What a link points to is written to, and the link stays.
    (tmp_path / "link").symlink_to(plain)
    write_whole(tmp_path / "link", b"through")
    assert (tmp_path / "link").is_symlink()
    assert plain.read_bytes() == b"through"


def test_devices_are_written_to_as_they_are() -> None:
    write_whole(Path(os.devnull), "nothing")
    assert not Path(os.devnull).is_file()
