"""The image examples: what the digits' output folder may hold, and that labels are mixed as the pixels are."""

import math
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from examples import common, common_jax, common_torch, digits_common, jax_digits, mixup_common, torch_digits

DIGITS = [jax_digits, torch_digits]
pytestmark = pytest.mark.usefixtures("optax_promotion", "one_thread")


def name(example):
    return example.__name__.rpartition(".")[2]


# --- The digits' output folder --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=DIGITS, ids=name)
def digits_run(request, run_example, tmp_path_factory):
    """A digits example and a folder in which it has trained for two epochs."""
    output = tmp_path_factory.mktemp("digits")
    assert run_example(request.param, "--epochs", 2, "--output", output).exit_code == 0
    return request.param, output


@pytest.fixture
def copied(digits_run, tmp_path):
    example, output = digits_run
    return example, shutil.copytree(output, tmp_path / "run")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refusal(run_example):
    """Return a function that runs an example that must not touch a folder, and returns its message."""

    def refuse(example, folder, *arguments):
        before = contents(folder)
        result = run_example(example, "--epochs", 1, "--output", folder, *arguments)
        assert result.exit_code == 2
        assert contents(folder) == before
        return " ".join(result.output.split())

    return refuse


@pytest.mark.slow
def test_run_with_other_options(copied, refusal, run_example, monkeypatch):
    example, folder = copied
    first = (folder / "losses.jsonl").read_text()
    said = refusal(example, folder, "--seed", 1)
    assert f"holds another run (program={name(example)}, smoothing=0.1, seed=0, bfloat16=False)" in said
    assert "Choose another folder, or add --fresh." in said

    monkeypatch.setattr(example, "plot_losses", lambda *_: None)
    fresh = run_example(example, "--epochs", 1, "--output", folder, "--seed", 1, "--fresh")
    assert "0 of 37 steps are done" in fresh.output
    assert "37 of 37 steps are done" in run_example(example, "--epochs", 1, "--output", folder, "--seed", 1).output
    second = (folder / "losses.jsonl").read_text()
    assert len(second.splitlines()) == 37
    assert first.splitlines()[0] != second.splitlines()[0]


@pytest.mark.parametrize("fresh", [[], ["--fresh"]], ids=["", "fresh"])
def test_run_of_the_other_program(copied, refusal, fresh):
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
def test_files_of_somebody_else(example, fresh, foreign, content, refusal, tmp_path):
    path = tmp_path / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    said = refusal(example, tmp_path, *fresh)
    assert "holds another run" in said
    assert "Choose another folder." in said


def test_more_epochs_than_asked_for_are_done(copied, run_example, monkeypatch):
    example, folder = copied
    before = (folder / "losses.jsonl").read_bytes()
    monkeypatch.setattr(example, "plot_losses", lambda *_: None)
    again = run_example(example, "--epochs", 1, "--output", folder).stdout
    assert "74 steps are done already, which is more than 37: nothing to train" in again
    assert (folder / "losses.jsonl").read_bytes() == before


@pytest.mark.parametrize(("smoothing", "lines"), [(0.0, 1), (0.1, 3)])
def test_plot_draws_no_line_twice(smoothing, lines, tmp_path, monkeypatch):
    (tmp_path / "losses.jsonl").write_text('{"step": 0, "loss": 2.3, "nll": 2.3}\n')
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.extend(figure.axes[0].lines))
    digits_common.plot_losses(tmp_path / "losses.jsonl", smoothing, "JAX", tmp_path / "losses.png")
    assert len(drawn) == lines


@pytest.mark.parametrize("bfloat16", [False, True])
def test_dtypes(bfloat16):
    # Not as a training, for which XLA would compile everything once more.
    flax = common_jax.Network((8,), 0, jnp.bfloat16 if bfloat16 else jnp.float32)
    torch_network = common_torch.Network((8,), 0, torch.bfloat16 if bfloat16 else torch.float32)
    assert flax(jnp.zeros((1, 64))).dtype == (jnp.bfloat16 if bfloat16 else jnp.float32)
    assert torch_network(torch.zeros(1, 64)).dtype == (torch.bfloat16 if bfloat16 else torch.float32)
    assert flax.layers[-1].kernel.dtype == jnp.float32
    assert torch_network.layers[-1].weight.dtype == torch.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_least_possible_loss(smoothing):
    entropy, bound = entropy_and_bound(1 - smoothing + smoothing / 10, smoothing / 10)
    assert abs(digits_common.target_entropy(smoothing) - entropy) <= bound


def test_least_possible_loss_of_another_convention_is_another():
    entropy, bound = entropy_and_bound(0.9, 0.1 / 9)
    assert abs(digits_common.target_entropy(0.1) - entropy) > bound


def entropy_and_bound(on, off):
    entropy = -sum(share * math.log(share) for share in [on] + [off] * 9 if share)
    # Shares are off by at most 2u, which moves x log x by 2u (x + |x log x|); logarithm, product and sum of ten terms
    # round by 12u of the terms. Twice, for the two who compute it.
    return entropy, 2 * 14 * 2**-53 * (1 + entropy)


def test_an_epoch_shows_each_image_once():
    order = np.concatenate([common.batch_rows(96, 32, 0, step) for step in range(3, 6)])
    assert sorted(order) == list(range(96))
    assert list(order) != list(np.concatenate([common.batch_rows(96, 32, 0, step) for step in range(3)]))
    assert list(order) != list(np.concatenate([common.batch_rows(96, 32, 1, step) for step in range(3, 6)]))


# --- Mixing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", ["none", "MixUp", "CutMix"])
def test_labels_are_mixed_as_the_pixels_are(mix):
    assert all(labels_match_pixels(mixup_common.MIXES[mix], seed) for seed in range(20))


@pytest.mark.parametrize("mix", ["MixUp", "CutMix"])
@pytest.mark.parametrize("wrong", ["unmixed", "swapped", "a pixel less"])
def test_labels_that_are_mixed_otherwise_show(mix, wrong):
    def mutant(images, targets, random):
        mixed, labels = mixup_common.MIXES[mix](images, targets, random)
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


def test_mixup_blends_and_cutmix_cuts():
    assert not any(has_edges(mixup_common.mixup, seed) for seed in range(20))
    assert (
        sum(has_edges(mixup_common.cutmix, seed) for seed in range(20)) > 10
    )  # the others: no box, or all of the image


def has_edges(mix, seed):
    images = np.arange(10, dtype=np.float32)[:, None, None] * np.ones((8, 8), np.float32)
    mixed, _ = mix(images, np.eye(10, dtype=np.float32), np.random.default_rng(seed))
    return bool(np.ptp(mixed, axis=(1, 2)).any())
