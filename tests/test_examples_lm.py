"""The language models: that they run, that the two trainings are one and the same, and that wrong ones are noticed."""

import ast
import functools
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from matplotlib.image import imread
from typer.testing import CliRunner

from examples import jax_lm, lm_text, torch_lm
from lsce_torch import label_smoothed_cross_entropy, linear_label_smoothed_cross_entropy
from parity_tests.trainings.trajectory import compare_trajectories, rounding_floor

MODULES = [jax_lm, torch_lm]
REPLICAS = 8
TINY = lm_text.Options(steps=32, smoothing=0.1, vocabulary=512, width=32, batch_size=4, chunk_size=200, seed=0)
ARGUMENTS = ["--steps", 32, "--vocabulary", 512, "--width", 32, "--batch-size", 4, "--chunk-size", 200]


def short(module):
    return module.__name__.partition(".")[2]


def run_example(module, *arguments):
    return CliRunner().invoke(module.app, [*map(str, [*ARGUMENTS, *arguments])], env={"COLUMNS": "80"})


@pytest.fixture(autouse=True, scope="module")
def _promotion_as_optax_needs_it():
    # Optax raises a Python float to the power of an int32 count.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Matrices this small gain nothing from more, and where other programs want the cores they lose a lot."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


read_text = functools.cache(lm_text.read_text)


@functools.cache
def read_less(vocabulary):
    """Return the text with little of what is held out, so that looking at it takes no longer than training."""
    text = read_text(vocabulary)
    return text._replace(held_out=text.held_out[:5000])


@pytest.fixture(autouse=True, scope="module")
def _less_is_held_out():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_text, "read_text", read_less)
        yield


@pytest.fixture(scope="module")
def text():
    return read_less(TINY.vocabulary)


def make_weights(seed=TINY.seed):
    return lm_text.initial_weights(TINY.vocabulary, TINY.width, seed)


@pytest.fixture(scope="module", params=MODULES, ids=short)
def example(request, tmp_path_factory):
    output = tmp_path_factory.mktemp("example") / "new" / "folder"
    return request.param, run_example(request.param, "--output", output), output


# --- The command lines ----------------------------------------------------------------------------------------------


def report(result):
    """Return what a run printed after its progress bar."""
    return result.stdout.partition("0:00:")[2].partition("\n")[2].partition("wrote")[0]


def read_losses(folder):
    return json.loads((folder / "losses.json").read_text(encoding="utf-8"))


def test_run(example):
    _, result, output = example
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"wrote {output / 'losses.json'}\nwrote {output / 'lm.png'}\n")
    assert "transformer, 32 steps" in report(result)
    assert "nan" not in report(result)
    assert max(map(len, report(result).splitlines())) <= 80
    pixels = imread(output / "lm.png")[..., :3]
    assert 0.7 < pixels.mean() < 0.99
    assert pixels.shape[1] >= 1100


def test_losses_are_written(example):
    losses = read_losses(example[2])
    assert len(losses["losses"]) == 32
    assert losses["losses"][-1] < losses["losses"][0]
    assert [step for step, _ in losses["perplexities"]] == [*range(0, 33, 4)]


def test_same_numbers_again(example, tmp_path):
    module, _, output = example
    for seed, same in ((0, True), (1, False)):
        run_example(module, "--seed", seed, "--output", tmp_path)
        assert (read_losses(output) == read_losses(tmp_path)) == same


@pytest.mark.parametrize("module", MODULES, ids=short)
def test_help(module):
    result = CliRunner().invoke(module.app, ["--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    for option in (
        "--steps",
        "--smoothing",
        "--vocabulary",
        "--width",
        "--batch-size",
        "--chunk-size",
        "--seed",
        "--output",
    ):
        assert option in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize("module", MODULES, ids=short)
def test_bad_option(module, tmp_path):
    for *arguments, message in (
        ("--smoothing", "1.5", "'--smoothing': smoothing must be in [0, 1], got 1.5."),
        ("--width", "33", "'--width': 33 features do not divide into 4 heads."),
        ("--vocabulary", "256", "'--vocabulary': "),
        ("--steps", "0", "'--steps': "),
    ):
        result = run_example(module, *arguments, "--output", tmp_path / "never")
        assert result.exit_code == 2
        assert message in result.stderr
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("module", MODULES, ids=short)
def test_no_folder(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    for output, reason in (("file", "File exists"), ("file/new", "Not a directory")):
        result = run_example(module, "--output", output)
        assert result.exit_code == 2
        assert f"'--output': cannot make the folder {output}: {reason}." in result.stderr


def definitions(module):
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def options(module):
    described = {}
    for name, parameter in inspect.signature(module.main).parameters.items():
        (option,) = parameter.annotation.__metadata__
        settings = {key: value for key, value in vars(option).items() if not callable(value)}
        described[name] = parameter.annotation.__origin__, parameter.default if name != "output" else None, settings
    return described


def test_pair_mirrors():
    assert definitions(jax_lm) == definitions(torch_lm)
    assert options(jax_lm) == options(torch_lm)


# --- The text -------------------------------------------------------------------------------------------------------


def test_no_framework_is_loaded():
    code = "import sys, examples.lm_text; assert not {'jax', 'torch'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(lm_text.__file__).parents[1])


def test_another_process_makes_the_same_tokens(text):
    code = f"from examples.lm_text import read_text; t = read_text({TINY.vocabulary}); print(t.train.tobytes().hex())"
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(lm_text.__file__).parents[1])
    assert other.stdout.strip() == text.train.tobytes().hex()


def test_no_paragraph_comes_twice():
    paragraphs = [paragraph for document in lm_text.read_documents() for paragraph in document.split("\n\n")]
    assert len([*filter(None, paragraphs)]) == len({*filter(None, paragraphs)})


def test_docstrings_in_the_order_of_the_source():
    source = '"""One."""\nclass A:\n    """Two."""\n    def f(self):\n        """Three."""\ndef g():\n    """Four."""\n'
    assert lm_text.docstrings(source) == "One.\n\nTwo.\n\nThree.\n\nFour."


def test_tokens_are_within_the_vocabulary():
    text = read_text(TINY.vocabulary)
    assert text.vocabulary == TINY.vocabulary
    assert 0 <= text.train.min() <= text.train.max() < TINY.vocabulary
    documents = len(lm_text.read_documents())
    assert np.count_nonzero(text.train == 0) + np.count_nonzero(text.held_out == 0) == documents


def test_held_out_windows_follow_one_another(text):
    windows = np.concatenate([*lm_text.held_out_batches(text)])
    np.testing.assert_array_equal(windows[1:, 0], windows[:-1, -1])
    np.testing.assert_array_equal(windows[:, 1:].ravel(), text.held_out[1:][: windows[:, 1:].size])


def test_unigram_perplexity_of_equally_frequent_tokens():
    ids = np.tile(np.arange(10, dtype=np.int32), 7)
    assert lm_text.unigram_perplexity(lm_text.Text(ids, ids[:13], 10)) == pytest.approx(10, rel=1e-12)


# --- The two models -------------------------------------------------------------------------------------------------


def test_hyperparameters_are_exact_in_float32():
    rates = [lm_text.LEARNING_RATE * step / lm_text.WARM_UP for step in range(1, lm_text.WARM_UP + 1)]
    constants = [lm_text.BETA1, lm_text.BETA2, 1 - lm_text.BETA1, 1 - lm_text.BETA2, lm_text.EPSILON, *rates]
    constants += [1 - rate * lm_text.WEIGHT_DECAY for rate in rates]
    for constant in constants:
        assert float(np.float32(constant)) == constant
    for step, rate in enumerate([*rates, rates[-1]]):
        assert torch_lm.learning_rate(step) == float(jax_lm.learning_rate(jax.numpy.int32(step))) == rate


def test_all_weights_are_those_given():
    weights = {name: np.full_like(array, number) for number, (name, array) in enumerate(make_weights().items(), 1)}
    in_jax = jax.tree.leaves(nnx.state(jax_lm.LanguageModel(weights)))
    in_torch = [parameter.detach().numpy() for parameter in torch_lm.LanguageModel(weights).parameters()]
    for arrays in (in_jax, in_torch):
        assert sorted(float(np.ravel(array)[0]) for array in arrays) == [*range(1, len(weights) + 1)]
        assert all(np.ptp(array) == 0 for array in arrays)


def hidden_states(module, tokens):
    model = module.LanguageModel(make_weights())
    if module is jax_lm:
        return np.asarray(model(jax.numpy.asarray(tokens)))
    return model(torch.from_numpy(tokens)).detach().numpy()


@pytest.mark.parametrize("module", MODULES, ids=short)
def test_no_token_sees_those_that_follow(module, text):
    tokens = text.train[None, : lm_text.CONTEXT]
    other = tokens.copy()
    other[0, 100] += 1
    one, two = hidden_states(module, tokens)[0], hidden_states(module, other)[0]
    np.testing.assert_array_equal(one[:100], two[:100])
    assert np.all(np.any(one[100:] != two[100:], axis=-1))


@pytest.mark.parametrize("module", MODULES, ids=short)
def test_the_loss_in_chunks_takes_less_memory(module):
    rows, vocabulary, width = 1024, 4096, 64
    memory = module.loss_memory(rows, vocabulary, width, chunk_size=256)
    logits, gradients = 4 * rows * vocabulary, 4 * width * (rows + vocabulary)
    assert memory["all logits at once"] >= logits + gradients
    # A quarter of the logits, and what is computed from them: as large once more, or twice.
    assert gradients < memory["in chunks"] < gradients + 3 * logits / 4


# --- The two trainings are the same ---------------------------------------------------------------------------------


class Yardstick(NamedTuple):
    """A JAX training and replicas of it, to hold torch trainings against; see parity_tests/trainings/trajectory.py."""

    text: lm_text.Text
    losses: list[float]
    replicas: list[list[float]]

    def judge(self, losses):
        """Compare the losses of another training."""
        floor = rounding_floor(self.losses, TINY.batch_size * lm_text.CONTEXT)
        return compare_trajectories(self.losses, losses, self.replicas, floor=floor)

    def judge_torch(self):
        """Train in torch, and compare."""
        return self.judge(torch_lm.train(torch_lm.LanguageModel(make_weights()), self.text, TINY).losses)


def one_ulp_away(weights, seed):
    """Return weights, each moved to its upper or lower neighbour in float32, at random."""
    random = np.random.default_rng(seed)
    ends = np.array([-np.inf, np.inf], np.float32)
    return {name: np.nextafter(array, random.choice(ends, size=array.shape)) for name, array in weights.items()}


@pytest.fixture(scope="module")
def yardstick(text):
    def losses(weights):
        return jax_lm.train(jax_lm.LanguageModel(weights), text, TINY).losses

    weights = make_weights()
    return Yardstick(text, losses(weights), [losses(one_ulp_away(weights, seed)) for seed in range(REPLICAS)])


def describe(name, verdict):
    step = verdict.first_divergence
    if step is None:
        return f"{name}: not rejected, at most {verdict.largest_share:.3f} of the allowed difference"
    return (
        f"{name}: rejected at step {step} by a factor of {verdict.share[step]:.3g}, "
        f"at worst {verdict.largest_share:.3g} (step {verdict.worst_step})"
    )


def test_right_torch_training_agrees(yardstick):
    verdict = yardstick.judge_torch()
    print(describe("the right one", verdict), verdict.allowed.max())
    assert verdict.agrees, describe("the right one", verdict)
    # The rule is of use only while it is tight: far from all of the losses' digits may be excused by rounding.
    assert np.all(verdict.allowed < 1e-4)


def test_what_the_command_lines_write_agrees(yardstick, tmp_path):
    run_example(torch_lm, "--output", tmp_path)
    assert yardstick.judge(read_losses(tmp_path)["losses"]).agrees


def test_all_logits_at_once_are_the_same_training(yardstick, monkeypatch):
    def dense(hidden, weight, labels, smoothing, chunk_size):
        return label_smoothed_cross_entropy(hidden @ weight.T, labels, smoothing=smoothing)

    monkeypatch.setattr(torch_lm, "linear_label_smoothed_cross_entropy", dense)
    verdict = yardstick.judge_torch()
    assert verdict.agrees, describe("all logits at once", verdict)


RIGHT = linear_label_smoothed_cross_entropy


def with_options(**changed):
    return lambda *layer_and_labels, **options: RIGHT(*layer_and_labels, **options | changed)


def last_row_without_gradient(hidden, weight, labels, **options):
    losses = RIGHT(hidden, weight, labels, reduction="none", **options).flatten()
    return torch.cat([losses[:-1], losses[-1:].detach()]).mean()


WRONG_LOSSES = {
    "smoothing of 0.11": with_options(smoothing=0.11),
    "smoothing off by 1e-3, relative": with_options(smoothing=TINY.smoothing * (1 + 1e-3)),
    "e/(K-1) for e/K": with_options(convention="non_target"),
    "no smoothing": with_options(smoothing=0.0),
    "sum for mean": with_options(reduction="sum"),
    "z-loss of 1e-5": with_options(z_loss=1e-5),
    "gradient filter of 1e-2": with_options(gradient_filter=1e-2),
    "labels that do not follow": lambda hidden, weight, labels, **options: RIGHT(
        hidden, weight, labels.roll(1, dims=1), **options
    ),
    "no gradient of the table from the loss": lambda hidden, weight, labels, **options: RIGHT(
        hidden, weight.detach(), labels, **options
    ),
    "hidden states in bfloat16": lambda hidden, weight, labels, **options: RIGHT(
        hidden.bfloat16(), weight, labels, **options
    ),
    "gradient of the last row lost": last_row_without_gradient,
}


@pytest.mark.parametrize("name", WRONG_LOSSES)
def test_wrong_loss_is_rejected(name, yardstick, monkeypatch):
    monkeypatch.setattr(torch_lm, "linear_label_smoothed_cross_entropy", WRONG_LOSSES[name])
    verdict = yardstick.judge_torch()
    print(describe(name, verdict))
    assert not verdict.agrees, describe(name, verdict)


WRONG_CONSTANTS = {
    "learning rate off by 1e-3, relative": ("LEARNING_RATE", lm_text.LEARNING_RATE * (1 + 1e-3)),
    "a warm-up that is a step longer": ("WARM_UP", lm_text.WARM_UP + 1),
    "no weight decay": ("WEIGHT_DECAY", 0.0),
    "beta2 of 0.98": ("BETA2", 0.98),
}


@pytest.mark.parametrize("name", WRONG_CONSTANTS)
def test_wrong_optimizer_is_rejected(name, yardstick, monkeypatch):
    monkeypatch.setattr(lm_text, *WRONG_CONSTANTS[name])
    verdict = yardstick.judge_torch()
    print(describe(name, verdict))
    assert not verdict.agrees, describe(name, verdict)


# --- The model learns more than how frequent tokens are -------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES, ids=short)
def test_perplexity_falls_below_that_of_the_frequencies(module, text):
    run = module.train(module.LanguageModel(make_weights()), text, TINY._replace(steps=256))
    unigram = lm_text.unigram_perplexity(text)
    print(run.perplexities, unigram)
    assert run.perplexities[0] == pytest.approx(TINY.vocabulary, rel=0.05)
    assert run.perplexities[256] < 0.8 * unigram < run.perplexities[0]
