"""The notebooks run from top to bottom on a CPU, print what NumPy computes in float64, and are stored so."""

import json
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from sklearn.datasets import load_digits

from lsce_spec import smoothing_weights
from tools.notebooks import NOTEBOOKS, ROOT, SOURCE, TIMES, execute, kinds

# The first lines of the second cell differ, which say what a notebook needs.
NEEDS = re.compile(r"^EXTRAS, OTHERS = .*$", re.MULTILINE)


def read(name):
    return nbformat.read(NOTEBOOKS[name], as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run(name, folder):
    """Execute a notebook in a folder; return its cells of code, which show what the stored ones do."""
    stored = read(name)
    cells = code_of(execute(stored, Path(folder)))
    shown = [[kinds(cell) for cell in some] for some in (cells, code_of(stored))]
    assert shown[0] == shown[1], f"run: .venv/bin/python -m tools.notebooks {name}"
    return cells


def printed(cell):
    """Return what a cell prints."""
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def has_picture(cell):
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_stored(name):
    """Outputs of one run from top to bottom, with no word of the machine and no colours, and small pictures."""
    notebook = read(name)
    nbformat.validate(notebook)
    cells = code_of(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert sum(len(cell.outputs) for cell in cells) >= len(cells) // 2
    for cell in cells:
        assert cell.metadata in ({}, {"tags": [TIMES]})
        assert not [output for output in cell.outputs if output.get("name") == "stderr" or "ename" in output]
        assert all(len(output.get("data", {}).get("image/png", "")) < 60_000 for output in cell.outputs)
    shown = json.dumps([cell.outputs for cell in cells])
    for of_machine in (
        str(ROOT),
        str(Path.home()),
        *[r"/tmp/", r"/usr/", r"/bin/python", r"site-packages", r"Warning", r"\u001b", r"\r"],
    ):
        assert of_machine not in shown


def test_an_execution_says_nothing_of_this_machine(tmp_path):
    code = 'import os\nprint(SOURCE, os.getcwd())\nprint("\\x1b[31mred\\x1b[0m")\nprint("1 of 2\\r2 of 2")'
    _, cell = execute(new_notebook(cells=[new_code_cell(SOURCE), new_code_cell(code)]), tmp_path).cells
    assert [output.text for output in cell.outputs] == ["lsce .\nred\n2 of 2\n"]
    texts = ("loss   1.25e-3\n", "loss 12.5\n", "lost 12.5\n")
    of = [kinds(new_code_cell(outputs=[new_output("stream", name="stdout", text=text)])) for text in texts]
    assert of[0] == of[1] != of[2]


# --- The project ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_first_cells_are_the_same(name):
    source, setup = code_of(read(name))[:2]
    _, expected = code_of(read("your_device"))[:2]
    assert source.source == SOURCE
    assert NEEDS.sub("", setup.source) == NEEDS.sub("", expected.source)
    for extra in NEEDS.search(setup.source)[0].split('"')[1].split(","):
        assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)


def set_up(source, monkeypatch):
    """Run the cell that finds or clones the project, in this process; return the folder of the clone."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    names = {"SOURCE": str(source)}
    exec(code_of(read("ten_minutes_jax"))[1].source, names)
    assert sys.path[0] == str(names["clone"])
    return names["clone"]


def test_a_folder_with_a_clone_is_taken_and_an_address_cloned_once(monkeypatch, tmp_path):
    origin, work = tmp_path / "origin", tmp_path / "work"
    (origin / "lsce_spec").mkdir(parents=True)
    work.mkdir()
    monkeypatch.chdir(work)
    assert set_up(ROOT, monkeypatch) == ROOT
    assert not any(work.iterdir())
    (origin / "lsce_spec/options.py").write_text("ours", encoding="utf-8")
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        subprocess.run([*git, *arguments], check=True)
    assert set_up(origin.as_uri(), monkeypatch) == work / "lsce"
    assert (work / "lsce/lsce_spec/options.py").read_text(encoding="utf-8") == "ours"
    (work / "lsce/kept").touch()
    assert set_up(origin.as_uri(), monkeypatch) == work / "lsce"  # as where the cell is run again
    assert (work / "lsce/kept").exists()


@pytest.mark.parametrize("source", ["..", "no/such/address"])
def test_a_folder_without_a_clone_is_an_error(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"lsce is not at '{source}': in the cell above, set SOURCE to the"):
        set_up(source, monkeypatch)


# --- Ten minutes ----------------------------------------------------------------------------------------------------


@cache
def cells_of(framework):
    """Return the cells of a notebook that has run, by name."""
    with tempfile.TemporaryDirectory() as folder:
        cells = run(f"ten_minutes_{framework}", folder)
    return dict(zip(CELLS, cells, strict=True))


@pytest.fixture(params=[pytest.param("jax", marks=pytest.mark.slow), "torch"])
def ten_minutes(request):
    return request.param, cells_of(request.param)


CELLS = (
    *("source", "setup", "first", "migration", "conventions", "left out", "schedule", "statistics", "training"),
    "linear",
)


def show(value, places):
    """Return a number as the notebook prints it. No rounding of float32 may change a digit."""
    units = abs(float(value)) * 10**places
    assert abs(units % 1 - 0.5) > 1e-2
    return f"{value:.{places}f}"


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def row_losses(logits, labels, smoothing=0.1):
    """Return the losses of rows by the formula, in float64."""
    classes = logits.shape[-1]
    target = (1 - smoothing) * np.eye(classes)[labels] + smoothing / classes
    return -(target * log_softmax(logits)).sum(axis=-1)


def drawn():
    """Return the logits and labels of the notebooks, and what draws the next numbers."""
    generator = np.random.default_rng(0)
    return generator.normal(size=(4, 5)).astype(np.float32).astype(np.float64), np.arange(4), generator


def test_the_two_mirror_each_other():
    jax, torch = (read(f"ten_minutes_{name}") for name in ("jax", "torch"))
    for one, other in zip(jax.cells, torch.cells, strict=True):
        assert one.cell_type == other.cell_type
        headings = [re.findall(r"^#+ .*$", cell.source, re.MULTILINE) for cell in (one, other)]
        if one.cell_type == "markdown":
            assert headings[0] == [line.replace("lsce_torch", "lsce_jax") for line in headings[1]]
        else:
            assert ("import torch" in one.source, "import jax" in other.source) == (False, False)


def test_first_loss(ten_minutes):
    logits, labels, _ = drawn()
    losses = row_losses(logits, labels)
    gradient = (np.exp(log_softmax(logits)) - 0.9 * np.eye(5)[labels] - 0.02) / 4
    assert printed(ten_minutes[1]["first"]).splitlines() == [
        " ".join(["losses:", *(show(loss, 4) for loss in losses)]),
        f"mean: {show(losses.mean(), 4)}",
        " ".join(["gradient of the first row:", *(show(value, 3) for value in gradient[0])]),
    ]


def test_migration(ten_minutes):
    logits, labels, _ = drawn()
    mean, small = show(row_losses(logits, labels).mean(), 4), np.log1p(3 * np.exp(-20))
    assert printed(ten_minutes[1]["migration"]).splitlines() == [
        f"before: {mean}, after: {mean}",
        f"before: 0.000e+00, after: {small:.3e}",
    ]


def test_conventions(ten_minutes):
    targets = {
        "uniform": [0.76, 0.06, 0.06, 0.06, 0.06],
        "non_target": [0.7, 0.075, 0.075, 0.075, 0.075],
        "clamp": [0.7, 0.075, 0.075, 0.075, 0.075],
        "max_sup": [1.06, 0.06, 0.06 - 0.3, 0.06, 0.06],
    }
    assert drawn()[0][0].argmax() == 2
    lines = [" ".join([f"{name:10}", *(f"{value:6.3f}" for value in of)]) for name, of in targets.items()]
    cell = ten_minutes[1]["conventions"]
    # fairseq's 0.1 of five classes puts 0.025 on each other class, as does 0.125 / 5.
    assert printed(cell).splitlines() == [*lines, "0.1 of non_target is 0.125 of uniform"]
    assert has_picture(cell)


def test_what_is_left_out(ten_minutes):
    *_, generator = drawn()
    logits = generator.normal(size=(2, 4, 8)).astype(np.float32)[..., :5].astype(np.float64)
    losses = row_losses(np.array([*logits[0, :3], logits[1, 0]]), np.array([2, 3, 1, 4]))
    mean = show(losses.mean(), 4)
    *lines, error = printed(ten_minutes[1]["left out"]).splitlines()
    assert lines == [f"mean of 4 tokens: {mean}", f"by where: {mean}", "gradient of padding: 0.0, 0.0"]
    assert error.startswith("label -100 at index [0, 3] is not one of the classes: ")


def test_schedule(ten_minutes):
    logits, labels, _ = drawn()
    losses = {count: row_losses(logits, labels, count / 500).mean() for count in (0, 50, 100)}
    assert printed(ten_minutes[1]["schedule"]).splitlines() == [
        *(f"step {count}: smoothing {count / 500:.2f}, loss {show(loss, 4)}" for count, loss in losses.items()),
        "compiled: 1 time",
    ]


def test_statistics(ten_minutes):
    logits, labels, _ = drawn()
    nll = row_losses(logits, labels, 0.0).mean()
    values = {
        "accuracy": (logits.argmax(axis=-1) == labels).mean(),
        "loss": row_losses(logits, labels).mean(),
        "nll": nll,
        "perplexity": np.exp(nll),
    }
    line = ", ".join(f"{name}: {show(value, 4)}" for name, value in values.items())
    assert printed(ten_minutes[1]["statistics"]) == f"{line}\n"


def trained(cell):
    """Return what the cell of the training says, by smoothing."""
    pattern = (
        r"smoothing (\S+): loss of the last batch (\S+); "
        r"on the test images accuracy (\S+), calibration_error (\S+), nll (\S+)\n"
    )
    lines = re.findall(pattern, printed(cell))
    assert [line[0] for line in lines] == ["0.0", "0.1"]
    return {
        float(smoothing): dict(zip(("loss", "accuracy", "calibration", "nll"), map(float, rest), strict=True))
        for smoothing, *rest in lines
    }


def accuracy_of_means():
    """Return how often the nearest of the mean training images has the right class, for the notebooks' split."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, targets = digits.data[order], digits.target[order]
    means = np.array([images[:1280][targets[:1280] == k].mean(axis=0) for k in range(10)])
    nearest = ((images[1280:, None] - means) ** 2).sum(axis=-1).argmin(axis=1)
    return (nearest == targets[1280:]).mean()


def test_training(ten_minutes):
    cell = ten_minutes[1]["training"]
    found, baseline = trained(cell), accuracy_of_means()
    on, off = smoothing_weights("uniform", 0.1, 10)
    least = -(on * np.log(on) + 9 * off * np.log(off))
    for smoothing, least_loss in ((0.0, 0.0), (0.1, least)):
        assert found[smoothing]["accuracy"] > baseline > 0.8
        assert found[smoothing]["loss"] >= least_loss - 5e-4  # the last digit that is printed
        assert 0 < found[smoothing]["nll"] < np.log(10)
    # As the text says: the smoothed network is less sure than it is right.
    assert found[0.1]["nll"] > found[0.0]["nll"]
    assert found[0.1]["calibration"] > found[0.0]["calibration"]
    assert has_picture(cell)


@pytest.mark.slow
def test_both_trainings_are_the_same():
    """They differ by rounding, which 200 steps do not let grow to the last digit that is printed."""
    jax, torch = (trained(cells_of(framework)["training"]) for framework in ("jax", "torch"))
    for smoothing, of_jax in jax.items():
        of_torch = torch[smoothing]
        for name in ("loss", "accuracy", "nll"):
            assert abs(of_jax[name] - of_torch[name]) <= 1e-3 + 1e-9, (smoothing, name)


def test_linear_loss(ten_minutes):
    framework, cells = ten_minutes
    *_, generator = drawn()
    generator.normal(size=(2, 4, 8))
    hidden = generator.normal(size=(2048, 16)).astype(np.float32).astype(np.float64)
    weight = (generator.normal(size=(16, 8192)) / 4).astype(np.float32).astype(np.float64)
    logits, words = hidden @ weight, generator.integers(8192, size=2048)
    log_p = log_softmax(logits)
    loss = show(-(0.9 * log_p[np.arange(2048), words] + 0.1 * log_p.mean(axis=-1)).mean(), 4)
    all_logits, *lines = printed(cells["linear"]).splitlines()
    assert all_logits == "all logits: 67 MB"
    assert round(4 * logits.size / 1e6) == 67
    memory = {}
    for line in lines:
        found = re.fullmatch(r"(.*): loss (\S+), (?:temporary memory|kept for the gradients) (\d+) MB", line)
        assert found[2] == loss
        memory[found[1]] = int(found[3])
    assert memory["of logits"] >= 67
    if framework == "torch":  # the gradients of hidden and weight, and nothing else
        assert memory["in one"] == round(4 * 16 * (2048 + 8192) / 1e6)
    else:  # a chunk of logits
        assert memory["in one"] <= 67 / 2


# --- Is my port the same loss? --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_same_loss(tmp_path):
    cells = run("same_loss", tmp_path)
    texts = [printed(cell) for cell in cells]
    _, _, _, _, by_hand, report, convention, _, compared, on_batch = texts
    losses, *agree = by_hand.splitlines()
    of_torch, of_jax = map(float, re.fullmatch(r"torch (\S+), JAX (\S+)", losses).groups())
    # The two targets differ by 0.1 / 999 - 0.1 / 1000 in each class but the label's, which has the rest.
    logits = np.random.default_rng(0).normal(size=(64, 1000)).astype(np.float32)
    largest = 1e-4 * np.abs(log_softmax(logits.astype(np.float64))).max()
    assert abs(of_torch - of_jax) <= largest + 1e-4
    assert agree == ["losses agree: True", "gradients agree: True"]
    assert report.startswith("DISAGREE in 9 of 9 cases: ")
    assert "they differ in the convention: A non_target | B uniform" in report
    assert convention == "label_smoothed_cross_entropy(logits, labels, smoothing=0.1, convention='non_target')\n"
    assert "\nAGREE in 9 cases: values and gradients are the same up to rounding.\n" in compared
    assert "\nBoth compute: non_target convention, mean.\n" in compared
    assert compared.endswith("\nexit code 0\n")
    assert on_batch == "the same on this batch\n"


# --- The kit --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_your_device(tmp_path):
    _, _, device, kit, said, archive = map(printed, run("your_device", tmp_path))
    assert device == "JAX finds: cpu\n"
    assert "\nAGREE on cpu: " in kit
    assert said.startswith("AGREE on cpu: ")
    assert "jax: the arithmetic fits cpu, " in said
    assert "\n  lsce linear, recompute " in said
    assert archive.startswith("kit.zip: ")
    assert (tmp_path / "kit.zip").is_file()
