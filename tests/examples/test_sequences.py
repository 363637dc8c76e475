"""The examples of sequences, schedules and distillation: that their claims hold."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from jax.flatten_util import ravel_pytree
from torch._dynamo.utils import counters
from torch.nn.utils import parameters_to_vector

import lsce_jax
import lsce_torch
from examples import (
    common_jax,
    common_torch,
    jax_distillation,
    jax_schedule,
    jax_sequence,
    sequence_common,
    torch_distillation,
    torch_schedule,
    torch_sequence,
)
from examples.common import METRICS
from examples.sequence_common import PADDING, Sentences, denominators, make_sentences, split

pytestmark = pytest.mark.usefixtures("optax_promotion", "one_thread")


def test_nothing_is_trained_twice(tmp_path):
    runs = []

    def train(sentences, test, run, options):
        runs.append(run.names)
        run.gradient_errors.append(1.0)
        yield dict.fromkeys(METRICS, 0.0)

    sequence_common.compare(train, sequence_common.Options(1, 0.0, 4, 0), "JAX", tmp_path)
    assert runs == [("0", "shared"), ("0", "own")]


@pytest.mark.parametrize("module", [jax_schedule, torch_schedule], ids=["jax", "torch"])
def test_no_schedule_is_trained_twice(module):
    assert list(module.make_schedules(0.0, 4)) == ["none"]
    assert list(module.make_schedules(0.1, 4)) == ["none", "constant", "annealed"]


# --- Sequences: the gradient of the microbatches is that of the batch -----------------------------------------------

MICROBATCHES, SMOOTHING = 4, 0.1


class JaxAccumulation:
    """A tagger of the JAX example, and its gradients in float64."""

    def __init__(self):
        """Draw weights."""
        self.tagger = jax_sequence.Tagger(0)
        # The example's optimizer but for Adam, which would hide the scale: its step is the gradient.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax_sequence, "adam", lambda _: optax.sgd(1.0))
            self.optimizer = jax_sequence.make_optimizer.__wrapped__(MICROBATCHES)

    def accumulated(self, pieces, denominators):
        """Return the gradient of the example's training step."""
        tagger = nnx.clone(self.tagger)
        optimizer = nnx.Optimizer(tagger, self.optimizer, wrt=nnx.Param)
        for piece, denominator in zip(pieces, denominators, strict=True):
            jax_sequence.train_step(tagger, optimizer, *piece, SMOOTHING, denominator)
        return self.weights() - np.asarray(ravel_pytree(nnx.state(tagger, nnx.Param))[0], np.float64)

    def gradient(self, batch):
        """Return the example's gradient of a whole batch."""
        return np.asarray(jax_sequence.flat_gradient(self.tagger, *batch, SMOOTHING))

    def weights(self):
        """Return the weights as one vector."""
        return np.asarray(ravel_pytree(nnx.state(self.tagger, nnx.Param))[0], np.float64)

    def update_rounding(self):
        """Return what is rounded on the way from gradient to weights, in units of roundoff."""
        return np.abs(self.weights())

    def of_words(self, batch):
        """Return the gradient of each place's loss."""
        graph, params = nnx.split(self.tagger)
        flat, unravel = ravel_pytree(params)

        def losses(flat, words, tags):
            logits = nnx.merge(graph, unravel(flat))(words[None])
            return lsce_jax.label_smoothed_cross_entropy(logits, tags[None], smoothing=SMOOTHING, where=words != 0)[0]

        jacobians = jax.jit(jax.vmap(jax.jacrev(losses), (None, 0, 0)))(flat, *batch)
        return np.asarray(jacobians, np.float64)


class TorchAccumulation:
    """A tagger of the torch example, and its gradients in float64."""

    def __init__(self):
        """Draw weights."""
        self.tagger = torch_sequence.Tagger(0)

    def accumulated(self, pieces, denominators):
        """Return the gradient of the example's training step."""
        self.tagger.zero_grad()
        for piece, denominator in zip(pieces, denominators, strict=True):
            torch_sequence.train_step(self.tagger, *torch_sequence.tensors(piece), SMOOTHING, denominator)
        return parameters_to_vector([weight.grad for weight in self.tagger.parameters()]).double().numpy()

    def gradient(self, batch):
        """Return the example's gradient of a whole batch."""
        return torch_sequence.flat_gradient(self.tagger, *torch_sequence.tensors(batch), SMOOTHING).numpy()

    def update_rounding(self):
        """Return what is rounded on the way from gradient to weights, in units of roundoff."""
        return 0.0

    def of_words(self, batch):
        """Return the gradient of each place's loss."""
        params = dict(self.tagger.named_parameters())

        def losses(params, words, tags):
            logits = torch.func.functional_call(self.tagger, params, (words[None],))
            loss = lsce_torch.label_smoothed_cross_entropy
            return loss(logits, tags[None], smoothing=SMOOTHING, where=words != 0, reduction="none")[0]

        jacobians = torch.func.vmap(torch.func.jacrev(losses), (None, 0, 0))(params, *torch_sequence.tensors(batch))
        parts = [part.detach().flatten(start_dim=2) for part in jacobians.values()]
        return torch.cat(parts, dim=2).double().numpy()


class Accumulation(NamedTuple):
    """A batch of eight sentences in four pieces, the gradient that it should have, and by how much it may be missed."""

    side: JaxAccumulation | TorchAccumulation
    pieces: list
    number_of_words: int
    whole: np.ndarray
    allowed: np.ndarray

    def share(self, denominators):
        """Return how much of what is allowed the gradient over some denominators uses."""
        difference = np.abs(self.side.accumulated(self.pieces, denominators) - self.whole)
        return np.max(difference[self.allowed > 0] / self.allowed[self.allowed > 0])


@pytest.fixture(scope="module", params=[JaxAccumulation, TorchAccumulation], ids=["jax", "torch"])
def accumulation(request):
    side = request.param()
    sentences, _ = make_sentences(seed=1)
    batch = Sentences(sentences.words[:8], sentences.tags[:8])
    number_of_words = np.count_nonzero(batch.words)
    whole = np.asarray(side.gradient(batch), np.float64)
    # Two sums of the same terms, one for each word, in two orders: at most n - 1 roundings in each. That is the worst
    # case, some ten times what is seen, so there is room for the few roundings within a term, too.
    # The weights that are moved by the gradient are rounded once more.
    magnitude = np.abs(side.of_words(batch)).sum(axis=(0, 1)) / number_of_words
    allowed = 2.0**-24 * (2 * (number_of_words - 1) * magnitude + side.update_rounding())
    return Accumulation(side, split(batch, MICROBATCHES), number_of_words, whole, allowed)


def test_shared_denominator_is_the_whole_batch(accumulation):
    share = accumulation.share(denominators(accumulation.pieces, shared=True))
    print(f"{share:.3f} of the allowed difference")
    assert share <= 1


def test_wrong_denominators_are_rejected(accumulation):
    right = denominators(accumulation.pieces, shared=True)
    wrong = {
        "means of microbatches": denominators(accumulation.pieces, shared=False),
        "one word too few": [number * (1 - 1 / accumulation.number_of_words) for number in right],
        "padding counted": [sum(piece.words.size for piece in accumulation.pieces)] * MICROBATCHES,
        "summed instead of averaged, or averaged instead of summed": [number * MICROBATCHES for number in right],
    }
    for name, numbers in wrong.items():
        share = accumulation.share(numbers)
        print(f"{name}: {share:.3g} times the allowed difference")
        assert share > 10, name


def test_tags_of_padding_change_nothing(accumulation):
    words, tags = accumulation.pieces[0]
    assert np.any(words == PADDING)
    other = np.where(words == PADDING, 99, tags).astype(np.int32)
    one, two = (accumulation.side.gradient(Sentences(words, tags)) for tags in (tags, other))
    np.testing.assert_array_equal(one, two)
    assert np.any(one != 0)


# --- Schedules: each step has the smoothing of its own place in the schedule ----------------------------------------


def jax_steps(schedule, steps):
    """Return smoothings and weights after some steps of the JAX example, and the state that a checkpoint keeps."""
    network = common_jax.Network((128,), 0)
    optimizer = jax_schedule.make_optimizer(network)
    images, labels = jax.random.uniform(jax.random.key(1), (4, 64)), jnp.arange(4)
    used = [
        float(jax_schedule.train_step(network, optimizer, images, labels, schedule=schedule)[1]) for _ in range(steps)
    ]
    kept = float(optimizer.opt_state.hyperparams["smoothing"])
    return used, np.asarray(ravel_pytree(nnx.state(network))[0]), kept


def torch_steps(schedule, steps):
    """Return the same of the torch example."""
    network = common_torch.Network((128,), 0)
    optimizer = torch_schedule.make_optimizer(network)
    images, labels = torch.rand(4, 64, generator=torch.Generator().manual_seed(1)), torch.arange(4)
    used = [
        torch_schedule.train_step(network, optimizer, images, labels, schedule=schedule, step=step)[1]
        for step in range(steps)
    ]
    kept = optimizer.state_dict()["param_groups"][0]["smoothing"]
    return used, parameters_to_vector(network.parameters()).detach().numpy(), kept


@pytest.mark.parametrize(("take", "module"), [(jax_steps, jax_schedule), (torch_steps, torch_schedule)])
def test_step_has_the_smoothing_of_its_time(take, module):
    def late(step):
        return 0.25 * (step >= 1)

    schedules = module.make_schedules(0.5, 4)
    used, _, kept = take(schedules["annealed"], 3)
    assert used == [0.5, 0.375, 0.25]
    assert kept == 0.25
    # What is returned is what the loss had: at step 0 nothing, at step 1 something; neither earlier nor later.
    (_, none, _), (_, same, _) = take(schedules["none"], 1), take(late, 1)
    np.testing.assert_array_equal(none, same)
    (_, none, _), (_, other, _) = take(schedules["none"], 2), take(late, 2)
    assert np.any(none != other)


@pytest.mark.parametrize("smoothings", [[0.0, 0.1, 0.2, 0.0], [0.1, 0.2, 0.3, 0.0]])
def test_float_smoothing_would_be_compiled_again(smoothings):
    torch.compiler.reset()
    counters.clear()
    network = common_torch.Network((128,), 0)
    for smoothing in smoothings:
        torch_schedule.loss_fn(network, torch.rand(4, 64), torch.arange(4), smoothing)
    # How often depends on the version: 2 and 3 times with torch 2.13, once more with 2.9.
    assert counters["stats"]["unique_graphs"] > 1


# --- Distillation: the loss is the square of the temperature times the Kullback-Leibler divergence -------------------

ROWS, TEMPERATURE = 8, 4.0
BIAS = np.linspace(-3, 3, 10).astype(np.float32)


def jax_bias_gradient(soft_labels):
    """Return the gradient of the output bias in the JAX example, of a network whose logits are that bias."""
    network = common_jax.Network((4,), 0)
    output = network.layers[-1]
    output.kernel[...], output.bias[...] = jnp.zeros((4, 10)), jnp.asarray(BIAS)
    optimizer = nnx.Optimizer(network, optax.sgd(1.0), wrt=nnx.Param)
    jax_distillation.train_step(network, optimizer, np.ones((ROWS, 64), np.float32), soft_labels, 0.0, TEMPERATURE)
    return BIAS.astype(np.float64) - np.asarray(output.bias[...], np.float64)


def torch_bias_gradient(soft_labels):
    """Return the same in the torch example."""
    network = common_torch.Network((4,), 0)
    output = network.layers[-1]
    with torch.no_grad():
        output.weight.zero_()
        output.bias.copy_(torch.from_numpy(BIAS))
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    torch_distillation.train_step(
        network, optimizer, torch.ones(ROWS, 64), torch.from_numpy(soft_labels), 0.0, TEMPERATURE
    )
    return output.bias.grad.double().numpy()


@pytest.mark.parametrize("bias_gradient", [jax_bias_gradient, torch_bias_gradient])
def test_loss_of_a_student(bias_gradient):
    soft_labels = np.random.default_rng(0).dirichlet(np.ones(10), ROWS).astype(np.float32)
    gradient, q = bias_gradient(soft_labels), soft_labels.astype(np.float64)

    def expected(temperature, factor):
        distance = (BIAS.max() - BIAS.astype(np.float64)) / temperature
        p = np.exp(-distance) / np.exp(-distance).sum()
        # Soft labels in float32 do not sum to exactly 1; d T^2 KL / d z = T (p sum q - q).
        exact = factor / temperature * (p * q.sum(axis=1, keepdims=True) - q)
        # docs/numerics.md with a sum over classes one by one, exp of 1 ulp, and S not exactly 1 (10 more roundings);
        # then a sum over rows, the two factors, and the step that moves the JAX weights.
        per_row = p * (9 + 2 * 2 + 1 + distance + p @ distance + 10) + 3 * q + 4 * np.abs(p - q)
        rounding = factor / temperature * (per_row + (ROWS + 4) * np.abs(p - q)).mean(axis=0) + np.abs(BIAS)
        return exact.mean(axis=0), 2.0**-24 * rounding

    def share(temperature, factor):
        exact, allowed = expected(temperature, factor)
        return np.max(np.abs(gradient - exact) / allowed)

    print(f"{share(TEMPERATURE, TEMPERATURE**2):.3f} of the allowed difference")
    assert share(TEMPERATURE, TEMPERATURE**2) <= 1
    # Without the factor, with the temperature itself as the factor, without temperature.
    for wrong in ((TEMPERATURE, 1), (TEMPERATURE, TEMPERATURE), (1, 1)):
        assert share(*wrong) > 1000, wrong
