"""The benchmarks: that each row is there, that memory is measured right, and that turns are taken. No speed is held."""

import json
import re
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from benchmarks import dense_jax, dense_torch
from benchmarks.__main__ import QUICK_SHAPE, app
from benchmarks.timing import Case, Schedule, Shape, time_in_turns


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmarks") / "figures.json"
    result = run("dense", "--quick", "--calls", 2, "--json", path)
    assert result.exit_code == 0, result.output
    return result.stdout.replace(f"wrote {path}", ""), json.loads(path.read_text(encoding="utf-8"))


def test_every_row_is_printed(quick):
    output, figures = quick
    assert max(map(len, output.splitlines())) <= 80
    for table in figures["dense"]:
        for row in table["rows"]:
            assert re.search(rf"^{re.escape(row['name'])}( +[\d.]+){{5,6}} *$", output, re.MULTILINE)


def test_every_row_has_figures(quick):
    _, figures = quick
    names = {table["framework"]: [row["name"] for row in table["rows"]] for table in figures["dense"]}
    assert names["jax"] == [*dense_jax.LOSSES, *dense_jax.FLOORS]
    assert names["torch"] == [case.name for case in dense_torch.make_cases(QUICK_SHAPE, with_compiled=False)]
    for table in figures["dense"]:
        assert table["shape"] == list(QUICK_SHAPE)
        for row in table["rows"]:
            assert len(row["seconds"]) == 2
            assert all(seconds > 0 for seconds in row["seconds"])
            assert row["memory"] >= 0
    assert {"date", "cpu", "cores", "jax", "torch", "optax"} <= figures["machine"].keys()


# --- Memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "gradients"),
    [
        (lambda z, _: z.exp().sum(), 2),  # exp, which is kept, and the gradient
        (lambda z, _: (z.exp() * z).sum(), 4),  # exp kept; gradients of the sum: of one factor, the other, together
        (F.cross_entropy, 3),  # log-softmax, its gradient, the gradient
        (dense_torch.SMOOTHED, 3),
    ],
)
def test_peak_memory(function, gradients):
    logits, labels = torch.zeros(64, 1000, requires_grad=True), torch.zeros(64, dtype=torch.int64)
    case = Case("", lambda *given: dense_torch.loss_and_gradient(function, *given), lambda: (logits, labels))
    assert dense_torch.peak_bytes(case) / (4 * 64 * 1000) == pytest.approx(gradients, abs=0.01)


def test_peak_memory_within_an_operation():
    # A sum of bytes makes integers of eight bytes of them first; the second sum has the memory of the first.
    case = Case("", lambda bytes_: (bytes_.sum(), bytes_.sum()), lambda: (torch.zeros(10**6, dtype=torch.uint8),))
    assert dense_torch.peak_bytes(case) == pytest.approx(8 * 10**6, abs=1000)


# --- Time -----------------------------------------------------------------------------------------------------------


def test_turns():
    log = []

    def case(name):
        return Case(name, log.append, lambda: (log.append("prepare") or name,))

    seconds = time_in_turns([case("a"), case("b")], Schedule(rounds=2, calls=3))
    assert log == 2 * (4 * ["prepare", "a"] + 4 * ["prepare", "b"])
    assert [len(kept) for kept in seconds] == [6, 6]


# --- The command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1024", "0x10", "10x", "axb", "10x10x10"])
def test_bad_shape(text):
    result = run("dense", "--shape", text)
    assert result.exit_code == 2
    assert f"'--shape': must be like 1024x32768, got '{text}'." in result.stderr


def test_tpu_without_its_compiler(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    result = run("tpu")
    assert result.exit_code == 1
    assert "pip install 'libtpu==" in result.stderr


@pytest.mark.parametrize(("framework", "other"), [("jax", "torch"), ("torch", "jax")])
def test_a_framework_is_measured_without_the_other(framework, other):
    code = f"import sys, benchmarks.__main__, benchmarks.dense_{framework}; assert {other!r} not in sys.modules"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


def test_trained_logits_have_small_losses():
    case = next(c for c in dense_torch.make_cases(Shape(8, 10), with_compiled=False) if "trained" in c.name)
    logits, labels = case.arguments()
    assert F.cross_entropy(logits, labels) < 1e-9
