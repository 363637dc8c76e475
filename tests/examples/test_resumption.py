"""The digits examples go on after `kill -9` as if nothing had happened: same losses, bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from examples import jax_digits, torch_digits

STEPS_PER_EPOCH = 1198 // 32
CHECKPOINT_EVERY = 10  # so no epoch ends at a checkpoint: the first ends at 37
ENDLESS = 10**6  # epochs


# The killed process has one thread, too.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optax_promotion", "one_thread")]


@pytest.fixture(scope="module", params=[jax_digits, torch_digits], ids=["jax", "torch"])
def example(request):
    return request.param


def options(output, epochs):
    return ["--epochs", str(epochs), "--checkpoint-every", str(CHECKPOINT_EVERY), "--output", str(output)]


def losses(output):
    return [json.loads(line) for line in (output / "losses.jsonl").read_text().splitlines()]


# --- Killed processes -----------------------------------------------------------------------------------------------


def test_losses_after_kill_9_are_those_of_an_uninterrupted_run(example, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    train_and_kill(example, killed)
    done = steps_done(killed)
    epochs = done // STEPS_PER_EPOCH + 2
    steps = epochs * STEPS_PER_EPOCH
    assert f"{done - CHECKPOINT_EVERY} of {steps} steps are done" in train(example, killed, epochs).output
    assert [line["step"] for line in losses(killed)] == list(range(steps))
    assert f"0 of {steps} steps are done" in train(example, whole, epochs).output
    assert losses(killed) == losses(whole)


def train_and_kill(example, output):
    """Start a training without end and kill it in mid-epoch, while it writes a checkpoint.

    That checkpoint is lost, so the steps since the last one, whose losses are in the file already, are trained again.
    """
    arguments = [example.__name__, str(output / "losses.jsonl"), *options(output, ENDLESS)]
    command = [sys.executable, "-c", STOP_AT_RENAME, *arguments]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), process.stderr.read()
        assert steps_done(output) % STEPS_PER_EPOCH
        assert writes_checkpoint(output)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


# Stops the process after the first epoch, when it is about to give a checkpoint that it has written its final name.
STOP_AT_RENAME = f"""
import os, pathlib, runpy, signal, sys

example, losses, *arguments = sys.argv[1:]

def stopping(rename):
    def rename_or_stop(source, target, **options):
        if "checkpoints" in str(target) and pathlib.Path(losses).read_bytes().count(b"\\n") > {STEPS_PER_EPOCH}:
            os.kill(os.getpid(), signal.SIGSTOP)
        return rename(source, target, **options)
    return rename_or_stop

os.rename, os.replace = stopping(os.rename), stopping(os.replace)
sys.argv = [example, *arguments]
runpy.run_module(example, run_name="__main__")
"""


def steps_done(output):
    path = output / "losses.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def writes_checkpoint(output):
    return any("tmp" in path.name or path.suffix == ".partial" for path in (output / "checkpoints").iterdir())


def environment():
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}


# --- The same within this process: torn files, and that a wrong resumption shows -------------------------------------

STOP, EPOCHS = 45, 2


class StopError(Exception):
    """What stops a training at a step."""


@pytest.fixture(scope="module")
def runs(example, tmp_path_factory):
    """A folder with a whole run, and one with a run that stopped past the checkpoint of step 40."""
    folder = tmp_path_factory.mktemp("runs")

    def batch_rows(rows, batch_size, seed, step):
        if step == STOP:
            raise StopError
        return original(rows, batch_size, seed, step)

    original = example.batch_rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "batch_rows", batch_rows)
        assert isinstance(train(example, folder / "stopped").exception, StopError)
    assert len(losses(folder / "stopped")) == STOP
    train(example, folder / "whole")
    return folder


@pytest.fixture
def stopped(runs, tmp_path):
    return shutil.copytree(runs / "stopped", tmp_path / "run")


def train(example, output, epochs=EPOCHS):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "plot_losses", lambda *_: None)  # which takes longer than the training
        result = CliRunner().invoke(example.app, options(output, epochs), env={"COLUMNS": "80"})
    assert result.exit_code == 0 or isinstance(result.exception, StopError), result.output
    return result


def test_faithful_resumption(example, runs, stopped):
    assert "40 of 74 steps are done" in train(example, stopped).output
    assert losses(stopped) == losses(runs / "whole")


def test_losses_are_written_in_full(runs):
    assert all(
        float(np.float32(line[name])) == line[name] for line in losses(runs / "whole") for name in ("loss", "nll")
    )


def test_torn_last_line(example, runs, stopped):
    with (stopped / "losses.jsonl").open("a") as lines:
        lines.write('{"step": 45, "lo')
    train(example, stopped)
    assert losses(stopped) == losses(runs / "whole")


def test_losses_that_went_missing_are_an_error(example, stopped):
    path = stopped / "losses.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:30]))
    result = CliRunner().invoke(example.app, options(stopped, EPOCHS))
    assert result.exit_code == 2
    assert "--fresh" in result.output


def without_weights(example, patch):
    def restore(self, network, optimizer):
        return original(self, example.Network(example.HIDDEN, seed=1), optimizer)

    original = example.Checkpoints.restore
    patch.setattr(example.Checkpoints, "restore", restore)


def without_optimizer(example, patch):
    def restore(self, network, optimizer):
        return original(self, network, example.make_optimizer(network))

    original = example.Checkpoints.restore
    patch.setattr(example.Checkpoints, "restore", restore)


def without_place_in_the_data(example, patch):
    original = example.batch_rows
    patch.setattr(example, "batch_rows", lambda *place: original(*place[:-1], place[-1] - 40))


def without_cutting_the_losses(example, patch):
    patch.setattr(example, "keep_losses", lambda path, steps: None)


@pytest.mark.parametrize(
    "mutate",
    [
        without_weights,
        without_optimizer,
        without_place_in_the_data,
        without_cutting_the_losses,
    ],
)
def test_wrong_resumption_shows(example, runs, stopped, monkeypatch, mutate):
    mutate(example, monkeypatch)
    train(example, stopped)
    assert losses(stopped)[:40] == losses(runs / "whole")[:40]
    assert losses(stopped) != losses(runs / "whole")
