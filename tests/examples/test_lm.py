"""The language models: their text, their networks, their memory, and that they learn."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from examples import jax_lm, lm_common, torch_lm

MODULES = [jax_lm, torch_lm]
TINY = lm_common.Options(steps=32, smoothing=0.1, vocabulary=512, width=32, batch_size=4, chunk_size=200, seed=0)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optax_promotion", "one_thread")]

read_text = functools.cache(lm_common.read_text)


def short(module):
    return module.__name__.partition(".")[2]


@pytest.fixture(scope="module")
def text():
    """The text with a short held-out part, so that computing its perplexity takes no longer than training."""
    text = read_text(TINY.vocabulary)
    return text._replace(held_out=text.held_out[:5000])


def make_weights(seed=TINY.seed):
    return lm_common.initial_weights(TINY.vocabulary, TINY.width, seed)


# --- The text -------------------------------------------------------------------------------------------------------


def test_no_framework_is_loaded():
    code = "import sys, examples.lm_common; assert not {'jax', 'torch'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(lm_common.__file__).parents[1])


def test_another_process_makes_the_same_tokens(text):
    code = f"from examples.lm_common import read_text; t = read_text({TINY.vocabulary}); print(t.train.tobytes().hex())"
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(lm_common.__file__).parents[1])
    assert other.stdout.strip() == text.train.tobytes().hex()


def test_no_paragraph_comes_twice():
    paragraphs = [paragraph for document in lm_common.read_documents() for paragraph in document.split("\n\n")]
    assert len([*filter(None, paragraphs)]) == len({*filter(None, paragraphs)})


def test_docstrings_in_the_order_of_the_source():
    source = '"""One."""\nclass A:\n    """Two."""\n    def f(self):\n        """Three."""\ndef g():\n    """Four."""\n'
    assert lm_common.docstrings(source) == "One.\n\nTwo.\n\nThree.\n\nFour."


def test_tokens_are_within_the_vocabulary():
    text = read_text(TINY.vocabulary)
    assert text.vocabulary == TINY.vocabulary
    assert 0 <= text.train.min() <= text.train.max() < TINY.vocabulary
    documents = len(lm_common.read_documents())
    assert np.count_nonzero(text.train == 0) + np.count_nonzero(text.held_out == 0) == documents


def test_held_out_windows_follow_one_another(text):
    windows = np.concatenate([*lm_common.held_out_batches(text)])
    np.testing.assert_array_equal(windows[1:, 0], windows[:-1, -1])
    np.testing.assert_array_equal(windows[:, 1:].ravel(), text.held_out[1:][: windows[:, 1:].size])


def test_unigram_perplexity_of_equally_frequent_tokens():
    ids = np.tile(np.arange(10, dtype=np.int32), 7)
    assert lm_common.unigram_perplexity(lm_common.Text(ids, ids[:13], 10)) == pytest.approx(10, rel=1e-12)


# --- The two models -------------------------------------------------------------------------------------------------


def test_learning_rates_are_exact_in_float32():
    rates = [lm_common.LEARNING_RATE * step / lm_common.WARM_UP for step in range(1, lm_common.WARM_UP + 1)]
    for constant in (*rates, *(1 - rate * lm_common.WEIGHT_DECAY for rate in rates)):
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
    tokens = text.train[None, : lm_common.CONTEXT]
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


# --- The trainings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES, ids=short)
def test_losses_are_written(module, text, run_example, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "loss_memory", lambda *_: {})
    monkeypatch.setattr(lm_common, "plot", lambda *_: None)
    monkeypatch.setattr(lm_common, "read_text", lambda vocabulary: text)
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in TINY._asdict().items()]
    assert run_example(module, *arguments, "--output", tmp_path).exit_code == 0
    written = json.loads((tmp_path / "losses.json").read_text(encoding="utf-8"))
    run = module.train(text, TINY)
    assert len(run.losses) == TINY.steps
    assert written == {"losses": run.losses, "perplexities": [[*each] for each in run.perplexities.items()]}
    assert [*run.perplexities] == [*range(0, 33, 4)]


@pytest.mark.parametrize("module", MODULES, ids=short)
def test_perplexity_falls_below_that_of_the_frequencies(module, text):
    run = module.train(text, TINY._replace(steps=256))
    unigram = lm_common.unigram_perplexity(text)
    print(run.perplexities, unigram)
    assert run.perplexities[0] == pytest.approx(TINY.vocabulary, rel=0.05)
    assert run.perplexities[256] < 0.8 * unigram < run.perplexities[0]
