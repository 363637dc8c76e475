"""A loss recorded with one framework gets the verdict, against one of the other, that both get on one machine."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity_tests.meta.running import invoke, run_code
from parity_tests.studies.recorded_losses import read_recording
from parity_tests.truth.batches import save_batch

TORCH = """
import torch
import torch.nn.functional as F

def bce(logits, labels):
    return F.binary_cross_entropy_with_logits(logits, labels)

def bce_rows(logits, labels):
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)

def random(logits, labels):
    return F.binary_cross_entropy_with_logits(logits + torch.rand_like(logits), labels)

def broken(logits, labels):
    raise RuntimeError("out of order")

def focal(logits, labels):
    nll = F.cross_entropy(logits, labels, reduction="none")
    return ((1 - torch.exp(-nll)) ** 2 * nll).mean()
"""
JAX = """
import jax
import jax.numpy as jnp

def bce(logits, labels, scale=1.0):
    return scale * (jax.nn.softplus(logits) - labels * logits).mean()

def bce_rows(logits, labels):
    return (jax.nn.softplus(logits) - labels * logits).mean(-1)

def focal(logits, labels, gamma=2.0):
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
    return (-((1 - jnp.exp(own)) ** gamma) * own).mean()
"""
MULTI_HOT = ("--labels-are", "multi_hot", "--classes", "3")


@pytest.fixture(autouse=True)
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with the user's modules, one for each framework."""
    (tmp_path / "recorded_in_torch.py").write_text(TORCH)
    (tmp_path / "replayed_in_jax.py").write_text(JAX)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def record(name: str, *options: str) -> Any:
    return invoke("record", "recorded", "--adapter", f"torch:recorded_in_torch:{name}", "--force", *options)


@pytest.fixture(scope="module")
def of_bce(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recording of `bce`."""
    folder = tmp_path_factory.mktemp("once")
    (folder / "recorded_in_torch.py").write_text(TORCH)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        assert record("bce", *MULTI_HOT).exit_code == 0
    return folder / "recorded"


@pytest.fixture
def recorded(of_bce: Path) -> Path:
    """Return a copy of the recording, in the current folder."""
    return shutil.copytree(of_bce, "recorded")


def replay(name: str, *options: str) -> Any:
    return invoke("replay", "recorded", "--adapter", f"jax:replayed_in_jax:{name}", *options)


@pytest.mark.usefixtures("recorded")
def test_the_same_and_another_loss() -> None:
    right = replay("bce", "--json", "found.json")
    assert right.exit_code == 0, right.output
    assert "AGREE in 8 cases" in right.output
    assert "recorded with Python 3" in right.output
    assert json.loads(Path("found.json").read_text())["command"] == "replay"
    wrong = replay("bce", "--b", "scale=1.001")
    assert wrong.exit_code == 1, wrong.output


@pytest.mark.usefixtures("recorded")
def test_a_tolerance_of_ones_own() -> None:
    loose = replay("bce", "--b", "scale=1.001", "--rtol", "1e-2", "--atol", "1e-4", "--json", "found.json")
    assert loose.exit_code == 0, loose.output
    assert "within --rtol 0.01 --atol 0.0001, which you chose" in loose.output
    assert json.loads(Path("found.json").read_text())["tolerance"] == {"rtol": 0.01, "atol": 0.0001}
    tight = replay("bce", "--b", "scale=1.001", "--rtol", "1e-4")
    assert tight.exit_code == 1, tight.output
    assert "what --rtol 0.0001 --atol 0 allows" in tight.output


@pytest.mark.parametrize(("first", "second"), [("bce_rows", "bce"), ("bce", "bce_rows")])
def test_a_loss_per_row_and_a_scalar(first: str, second: str) -> None:
    assert record(first, *MULTI_HOT).exit_code == 0
    outcome = replay(second)
    assert outcome.exit_code == 0, outcome.output
    assert ("mean" in outcome.output) == (first != second)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "exit_code"), [((), 0), (("--b", "gamma=2.1"), 1)])
def test_the_verdict_and_its_numbers_are_those_of_compare(options: tuple[str, ...], exit_code: int) -> None:
    assert record("focal", "--classes", "3").exit_code == 0
    outcome = replay("focal", *options, "--json", "replayed.json")
    compared = invoke(
        *("compare", "torch:recorded_in_torch:focal", "jax:replayed_in_jax:focal", "--classes", "3", *options),
        *("--json", "compared.json"),
    )
    assert (outcome.exit_code, compared.exit_code) == (exit_code, exit_code), outcome.output + compared.output
    found, expected = (json.loads(Path(name).read_text()) for name in ("replayed.json", "compared.json"))
    for key in ("function", "accuracy", "formula_differences", "verdict"):
        assert found[key] == expected[key], key


def test_a_batch_of_ones_own() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(2, 4, 3)).astype(np.float32)
    save_batch("batch.safetensors", logits=logits, labels=(logits > 1).astype(np.int32))
    assert record("bce", "--inputs", "batch.safetensors").exit_code == 0
    outcome = replay("bce")
    assert outcome.exit_code == 0, outcome.output
    assert "AGREE in 1 case" in outcome.output
    case = read_recording(Path("recorded")).cases[0]
    np.testing.assert_array_equal(case.logits, logits.reshape(8, 3))


@pytest.mark.usefixtures("recorded")
def test_a_machine_with_one_framework_is_enough() -> None:
    code = """
import sys
from parity_tests.__main__ import app
app(["replay", "recorded", "--adapter", "jax:replayed_in_jax:bce"])
"""
    outcome = run_code(code, blocked=["torch"])
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "AGREE in 8 cases" in outcome.stdout


def test_no_verdict() -> None:
    assert record("random", *MULTI_HOT).exit_code == 0
    outcome = replay("bce")
    assert outcome.exit_code == 2, outcome.output
    assert "A is random" in outcome.output
    broken = record("broken", *MULTI_HOT)
    assert broken.exit_code == 2, broken.output
    assert "gives no loss that can be recorded: RuntimeError: out of order" in broken.output


def test_options_that_do_not_go_together(of_bce: Path) -> None:
    assert "recorded alone" in record("bce", "--case", "ties").output
    assert "are for a loss of your own" in invoke("record", "bundle", "--classes", "3").output
    assert "labels_are" not in record("bce", "--labels-are", "words").output
    assert "no bundle" in replay("bce").output or "holds no recorded loss" in replay("bce").output
    shutil.copytree(of_bce, "recorded")
    assert "holds a loss: name one to compare with it" in invoke("replay", "recorded").output
    both = invoke("replay", "recorded", "--adapter", "oracle")
    assert both.exit_code == 2
    assert "are for two losses of your own" in both.output
