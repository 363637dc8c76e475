"""The image examples: that they run, refuse what they cannot do, and come in pairs."""

import ast
import inspect
import math
import re
import shutil
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.image import imread
from typer.testing import CliRunner

from examples import jax_digits, jax_mixup, torch_digits, torch_mixup

DIGITS, MIXUP = [jax_digits, torch_digits], [jax_mixup, torch_mixup]
EXAMPLES = DIGITS + MIXUP
PAIRS = [DIGITS, MIXUP]


def name(example):
    return example.__name__.rpartition(".")[2]


def run(example, *arguments):
    return CliRunner().invoke(example.app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})


@pytest.fixture(autouse=True, scope="module")
def _promotion_as_optax_needs_it():
    # Optax raises a Python float to the power of an int32 count.
    with jax.numpy_dtype_promotion("standard"):
        yield


# --- The runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=EXAMPLES, ids=name)
def smoke(request, tmp_path_factory):
    """An example, its output folder and what it printed."""
    output = tmp_path_factory.mktemp("smoke") / "new" / "folder"
    result = run(request.param, "--epochs", 2, "--output", output)
    assert result.exit_code == 0, result.output
    return request.param, output, result.stdout


def test_table_fits(smoke):
    _, _, printed = smoke
    report = printed.partition("wrote")[0].splitlines()
    assert max(map(len, report)) <= 80
    assert any("calibration error" in line for line in report)


def test_plot_shows_something(smoke):
    _, output, printed = smoke
    (picture,) = output.glob("*.png")
    assert f"wrote {picture}" in printed
    pixels = imread(picture)[..., :3]
    assert pixels.shape[0] >= 400
    assert 0.6 < pixels.mean() < 0.99
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_runs_repeat_exactly(smoke, tmp_path):
    example, _, printed = smoke
    again = run(example, "--epochs", 2, "--output", tmp_path).stdout
    assert table(again) == table(printed)


def table(printed):
    return [line for line in printed.splitlines() if line.startswith("│")]


def test_learns(smoke):
    _, _, printed = smoke
    (accuracy,) = re.findall(r"│ (?:accuracy|none   │ 0        ) +│ (\d\.\d{4}) ", printed)
    assert float(accuracy) > 0.15  # after two epochs; 0.10 is chance


@pytest.mark.parametrize("example", EXAMPLES, ids=name)
def test_help(example):
    result = run(example, "--help")
    assert result.exit_code == 0
    assert all(option in result.output for option in ("--epochs", "--smoothing", "--seed", "--output"))


@pytest.mark.parametrize("example", EXAMPLES, ids=name)
@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--smoothing", 1.5, "smoothing must be in [0, 1], got 1.5"),
        ("--epochs", 0, "1"),
        ("--seed", -1, "0"),
        ("--output", __file__, f"cannot make the folder {__file__}: File exists."),
        ("--output", f"{__file__}/sub", f"cannot make the folder {__file__}/sub: Not a directory."),
    ],
)
def test_bad_options(example, option, value, said):
    result = run(example, option, value)
    assert result.exit_code == 2
    _, _, problem = "".join(result.output.split()).partition(f"Invalidvaluefor'{option}':")
    assert "".join(said.split()) in problem  # wherever the lines are broken


# --- The digits' output folder --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=DIGITS, ids=name)
def digits_run(request, tmp_path_factory):
    """A digits example and a folder in which it has trained for two epochs."""
    output = tmp_path_factory.mktemp("digits")
    assert run(request.param, "--epochs", 2, "--output", output).exit_code == 0
    return request.param, output


@pytest.fixture
def copied(digits_run, tmp_path):
    example, output = digits_run
    return example, shutil.copytree(output, tmp_path / "run")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(example, folder, *arguments):
    """What an example says that must not touch a folder."""
    before = contents(folder)
    result = run(example, "--epochs", 1, "--output", folder, *arguments)
    assert result.exit_code == 2
    assert contents(folder) == before
    return " ".join(result.output.split())


def test_run_with_other_options(copied, monkeypatch):
    example, folder = copied
    first = (folder / "losses.jsonl").read_text()
    said = refusal(example, folder, "--seed", 1)
    assert f"holds another run (program={name(example)}, smoothing=0.1, seed=0, bfloat16=False)" in said
    assert "Choose another folder, or add --fresh." in said

    monkeypatch.setattr(example, "plot_losses", lambda *_: None)
    fresh = run(example, "--epochs", 1, "--output", folder, "--seed", 1, "--fresh")
    assert "0 of 37 steps are done" in fresh.output
    assert "37 of 37 steps are done" in run(example, "--epochs", 1, "--output", folder, "--seed", 1).output
    second = (folder / "losses.jsonl").read_text()
    assert len(second.splitlines()) == 37
    assert first.splitlines()[0] != second.splitlines()[0]


@pytest.mark.parametrize("fresh", [[], ["--fresh"]], ids=["", "fresh"])
def test_run_of_the_other_program(copied, fresh):
    example, folder = copied
    (other,) = {*DIGITS} - {example}
    said = refusal(other, folder, *fresh)
    assert f"holds another run (program={name(example)}, smoothing=0.1" in said
    assert "Choose another folder." in said


@pytest.mark.parametrize("example", DIGITS, ids=name)
@pytest.mark.parametrize("fresh", [[], ["--fresh"]], ids=["", "fresh"])
@pytest.mark.parametrize(
    ("foreign", "content"),
    [
        ("losses.jsonl", "theirs"),
        ("checkpoints/theirs", "theirs"),
        ("options.json", "{"),
        ("options.json", "[]"),
        ("options.json", '{"seed": 0}'),
    ],
)
def test_files_of_somebody_else(example, fresh, foreign, content, tmp_path):
    path = tmp_path / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    said = refusal(example, tmp_path, *fresh)
    assert "holds another run" in said
    assert "Choose another folder." in said


def test_more_epochs_than_asked_for_are_done(copied, monkeypatch):
    example, folder = copied
    before = (folder / "losses.jsonl").read_bytes()
    monkeypatch.setattr(example, "plot_losses", lambda *_: None)
    again = run(example, "--epochs", 1, "--output", folder).stdout
    assert "74 steps are done already, which is more than 37: nothing to train" in again
    assert (folder / "losses.jsonl").read_bytes() == before


@pytest.mark.parametrize("example", DIGITS, ids=name)
@pytest.mark.parametrize(("smoothing", "lines"), [(0.0, 1), (0.1, 3)])
def test_plot_draws_no_line_twice(example, smoothing, lines, tmp_path, monkeypatch):
    (tmp_path / "losses.jsonl").write_text('{"step": 0, "loss": 2.3, "nll": 2.3}\n')
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.extend(figure.axes[0].lines))
    example.plot_losses(tmp_path / "losses.jsonl", smoothing, tmp_path / "losses.png")
    assert len(drawn) == lines


@pytest.mark.parametrize("bfloat16", [False, True])
def test_dtypes(bfloat16):
    # Not as a training, for which XLA would compile everything once more.
    flax, torch_network = jax_digits.Network(bfloat16, nnx.Rngs(0)), torch_digits.Network(bfloat16)
    assert flax(jnp.zeros((1, 64))).dtype == (jnp.bfloat16 if bfloat16 else jnp.float32)
    assert torch_network(torch.zeros(1, 64)).dtype == (torch.bfloat16 if bfloat16 else torch.float32)
    assert flax.output.kernel.dtype == jnp.float32
    assert torch_network.output.weight.dtype == torch.float32


@pytest.mark.parametrize("example", DIGITS, ids=name)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_least_possible_loss(example, smoothing):
    entropy, bound = entropy_and_bound(1 - smoothing + smoothing / 10, smoothing / 10)
    assert abs(example.target_entropy(smoothing) - entropy) <= bound


def test_least_possible_loss_of_another_convention_is_another():
    entropy, bound = entropy_and_bound(0.9, 0.1 / 9)
    assert abs(jax_digits.target_entropy(0.1) - entropy) > bound


def entropy_and_bound(on, off):
    entropy = -sum(share * math.log(share) for share in [on] + [off] * 9 if share)
    # Shares are off by at most 2u, which moves x log x by 2u (x + |x log x|); logarithm, product and sum of ten terms
    # round by 12u of the terms. Twice, for the two who compute it.
    return entropy, 2 * 14 * 2**-53 * (1 + entropy)


@pytest.mark.parametrize("example", DIGITS, ids=name)
def test_an_epoch_shows_each_image_once(example):
    order = np.concatenate([example.batch_rows(96, 0, step) for step in range(3, 6)])
    assert sorted(order) == list(range(96))
    assert list(order) != list(np.concatenate([example.batch_rows(96, 0, step) for step in range(3)]))
    assert list(order) != list(np.concatenate([example.batch_rows(96, 1, step) for step in range(3, 6)]))


# --- Mixing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", MIXUP, ids=name)
@pytest.mark.parametrize("mix", ["none", "MixUp", "CutMix"])
def test_labels_are_mixed_as_the_pixels_are(example, mix):
    assert all(labels_match_pixels(example.MIXES[mix], seed) for seed in range(20))


@pytest.mark.parametrize("mix", ["MixUp", "CutMix"])
@pytest.mark.parametrize("wrong", ["unmixed", "swapped", "a pixel less"])
def test_labels_that_are_mixed_otherwise_show(mix, wrong):
    def mutant(images, targets, random):
        mixed, labels = jax_mixup.MIXES[mix](images, targets, random)
        return mixed, {"unmixed": targets, "swapped": labels[::-1], "a pixel less": labels * 63 / 64 + targets / 64}[
            wrong
        ]

    assert not all(labels_match_pixels(mutant, seed) for seed in range(20))


def labels_match_pixels(mix, seed):
    # All pixels of image n are 2^n, so the mean of a mixed image tells what is in it, and so do its labels.
    values = 2.0 ** np.arange(10)
    images = np.float32(values)[:, None, None] * np.ones((8, 8), np.float32)
    mixed, labels = mix(images, np.eye(10, dtype=np.float32), np.random.default_rng(seed))
    assert mixed.dtype == labels.dtype == np.float32
    expected = labels.astype(np.float64) @ values
    # Times a power of two is exact; what rounds is the sum of the two images, once, and 1 - share.
    same = np.abs(mixed.astype(np.float64).mean((1, 2)) - expected) <= 2**-24 * expected
    return same.all() and (np.abs(labels.astype(np.float64).sum(1) - 1) <= 2**-24).all()


@pytest.mark.parametrize("example", MIXUP, ids=name)
def test_mixup_blends_and_cutmix_cuts(example):
    assert not any(has_edges(example.mixup, seed) for seed in range(20))
    assert sum(has_edges(example.cutmix, seed) for seed in range(20)) > 10  # the others: no box, or all of the image


def has_edges(mix, seed):
    images = np.arange(10, dtype=np.float32)[:, None, None] * np.ones((8, 8), np.float32)
    mixed, _ = mix(images, np.eye(10, dtype=np.float32), np.random.default_rng(seed))
    return bool(np.ptp(mixed, axis=(1, 2)).any())


# --- The pairs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("left", "right"), PAIRS, ids=["digits", "mixup"])
def test_pair_has_the_same_definitions_in_the_same_order(left, right):
    assert definitions(left) == definitions(right)
    assert {"Network", "train_step", "evaluate", "main"} <= set(definitions(left))


def definitions(example):
    body = ast.parse(inspect.getsource(example)).body
    return [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


@pytest.mark.parametrize(("left", "right"), PAIRS, ids=["digits", "mixup"])
def test_pair_has_the_same_options(left, right):
    assert command_line(left) == command_line(right)


def command_line(example):
    options = {}
    for option in inspect.signature(example.main).parameters.values():
        value, details = get_args(option.annotation)
        default = None if option.name == "output" else option.default
        options[option.name] = (value, default, details.help, details.min, details.max, details.param_decls)
    return options
