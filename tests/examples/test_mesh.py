"""The language models on meshes of devices: same losses on each, also where a run is killed and goes on on another."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from examples import jax_lm, lm_common, torch_lm
from parity_tests.trainings.stepwise import one_ulp_away
from parity_tests.trainings.trajectory import compare_trajectories, rounding_floor

ROOT = Path(lm_common.__file__).parents[1]
MODULES = {"jax": jax_lm, "torch": torch_lm}
SIZES = {"vocabulary": 512, "width": 32, "batch_size": 4}
OPTIONS = lm_common.Options(steps=12, smoothing=0.1, chunk_size=None, seed=0, **SIZES)
EVERY, REPLICAS = 2, 4
SECONDS = 300
read_text = lm_common.read_text
each_framework = pytest.mark.parametrize("framework", MODULES)
pytestmark = pytest.mark.usefixtures("optax_promotion", "one_thread")


@functools.cache
def text():
    read = read_text(OPTIONS.vocabulary)
    return read._replace(held_out=read.held_out[:5000])


# --- The command line -----------------------------------------------------------------------------------------------


@each_framework
@pytest.mark.parametrize("mesh", ["2", "2x", "0x2", "2x2x2", "axb", "-1x2"])
def test_texts_that_are_no_mesh(framework, mesh, run_example, tmp_path):
    result = run_example(MODULES[framework], f"--mesh={mesh}", "--output", tmp_path)
    assert result.exit_code == 2
    assert "is not of the form 2x4" in result.stderr


def test_meshes_for_which_there_are_too_few_devices(run_example, tmp_path):
    jax.devices()  # before JAX runs, a CPU would become 4096 devices
    result = run_example(jax_lm, "--mesh", "64x64", "--output", tmp_path)
    assert "'--mesh': 64x64 needs 4096 devices, and JAX finds" in result.stderr
    result = run_example(torch_lm, "--mesh", "2x2", "--output", tmp_path)
    assert "'--mesh': 2x2 needs 4 processes, and there are 1: start it with torchrun" in " ".join(result.stderr.split())


@pytest.mark.parametrize(("mesh", "sizes", "what"), [
    ((3, 1), {}, "4 windows of a batch"),
    ((32, 1), {"batch_size": 32}, "16 windows of a held-out batch"),
    ((1, 3), {}, "512 tokens of the vocabulary"),
    ((1, 7), {"vocabulary": 511}, "128 features of a layer"),
])  # fmt: skip
def test_meshes_that_do_not_divide(mesh, sizes, what):
    options = OPTIONS._replace(mesh=lm_common.Mesh(*mesh), **sizes)
    with pytest.raises(lm_common.typer.BadParameter, match=what):
        lm_common.check_mesh(options)
    lm_common.check_mesh(OPTIONS._replace(mesh=lm_common.Mesh(4, 4)))


@pytest.mark.slow
@each_framework
def test_checkpoints_that_do_not_fit(framework, run_example, tmp_path, monkeypatch):
    """Each is an error, and no checkpoint is lost."""
    module = MODULES[framework]
    monkeypatch.setattr(module, "loss_memory", lambda *_: {})
    monkeypatch.setattr(lm_common, "plot", lambda *_: None)
    monkeypatch.setattr(lm_common, "read_text", lambda _: text())
    sizes = [f"--{name.replace('_', '-')}={size}" for name, size in SIZES.items()]
    run = functools.partial(run_example, module, *sizes, "--output", tmp_path)
    assert "there is no checkpoint in" in run("--resume").stderr
    assert run("--steps=2", "--checkpoint-every=1").exit_code == 0
    for arguments, message in (
        (["--checkpoint-every=1"], "has checkpoints. Pass --resume, or another folder."),
        (["--resume", "--seed=3", "--smoothing=0.2"], "the checkpoint was made with --smoothing 0.1, --seed 0."),
        (["--resume", "--steps=1"], "the checkpoint is of step 2 already."),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())
    assert run("--resume", "--steps=3").exit_code == 0
    assert len(losses_in(tmp_path)) == 3


# --- Several devices ------------------------------------------------------------------------------------------------


def losses_in(folder):
    return np.array(json.loads((folder / "losses.json").read_text(encoding="utf-8"))["losses"])


@functools.cache
def whole():
    """Return the losses of a run on one device in JAX, and of replicas."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax_lm, "perplexity", lambda *_: 0.0)
        right, runs = lm_common.initial_weights, [jax_lm.train(text(), OPTIONS).losses]
        for seed in range(REPLICAS):
            random = np.random.default_rng(seed)
            patch.setattr(lm_common, "initial_weights", lambda *of, r=random: one_ulp_away(right(*of), r))
            runs.append(jax_lm.train(text(), OPTIONS).losses)
    return np.array(runs[0]), np.array(runs[1:])


def share(losses):
    """Return the largest share of what rounding explains of the difference to the run on one device."""
    ours, replicas = whole()
    rows = OPTIONS.batch_size * lm_common.CONTEXT
    verdict = compare_trajectories(ours, losses, replicas, floor=rounding_floor(ours, rows))
    assert np.all(verdict.allowed < 1e-5 * ours.max())
    return verdict.largest_share


def command(framework, mesh, folder, *arguments):
    """Return the command that a user would give."""
    start = ["-m", f"examples.{framework}_lm"]
    number = int(np.prod([*map(int, mesh.split("x"))]))
    if framework == "torch" and number > 1:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}", *start]
    sizes = [f"--{name.replace('_', '-')}={size}" for name, size in {**SIZES, "steps": OPTIONS.steps}.items()]
    return [sys.executable, *start, f"--mesh={mesh}", *sizes, f"--output={folder}", *arguments]


def started(*given):
    # In a group of its own, so that a signal reaches torchrun's processes too.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command(*given), cwd=ROOT, env=environment, start_new_session=True, text=True, **pipes)


def killed_after(process, checkpoints):
    """Kill a run as soon as it has a checkpoint."""
    end = time.monotonic() + SECONDS
    while not [path for path in checkpoints.glob("*") if path.name.isdecimal()]:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, f"no checkpoint within {SECONDS} s"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()


@pytest.mark.slow
def test_two_devices_of_this_process():
    """JAX has two here. Both divide the table, and the losses are those of one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax_lm, "perplexity", lambda *_: 0.0)
        run = jax_lm.train(text(), OPTIONS._replace(mesh=lm_common.Mesh(1, 2)))
        assert share(np.array(run.losses)) <= 1
        wrong = jax_lm.train(text(), OPTIONS._replace(mesh=lm_common.Mesh(1, 2), smoothing=0.11))
        assert share(np.array(wrong.losses)) > 1


@pytest.mark.distributed
@pytest.mark.parametrize(("framework", "first", "then"), [
    ("jax", "2x2", "4x1"),
    ("jax", "1x4", "1x1"),
    ("torch", "2x2", "1x2"),
    ("torch", "1x1", "2x2"),
])  # fmt: skip
def test_a_run_that_is_killed_goes_on_on_another_mesh(framework, first, then, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    killed_after(started(framework, first, tmp_path, f"--checkpoint-every={EVERY}"), checkpoints)
    assert not (tmp_path / "losses.json").exists()
    process = started(framework, then, tmp_path, "--resume")
    problem = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 0, problem
    losses = losses_in(tmp_path)
    assert len(losses) == OPTIONS.steps
    assert share(losses) <= 1
