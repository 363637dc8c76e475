"""The examples of sequences, schedules and distillation: that they run, and that what they say is so."""

import ast
import inspect
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from jax.flatten_util import ravel_pytree
from matplotlib.image import imread
from torch._dynamo.utils import counters
from torch.nn.utils import parameters_to_vector
from typer.testing import CliRunner

import lsce_jax
import lsce_torch
from examples import jax_distillation, jax_schedule, jax_sequence, torch_distillation, torch_schedule, torch_sequence

PAIRS = {
    "sequence": (jax_sequence, torch_sequence),
    "schedule": (jax_schedule, torch_schedule),
    "distillation": (jax_distillation, torch_distillation),
}
MODULES = [module for pair in PAIRS.values() for module in pair]
QUICK = [torch_sequence, torch_schedule, torch_distillation, jax_distillation]  # the others compile for seconds
COMPILATIONS = {"jax_schedule": "3 compilation(s): one for each", "torch_schedule": "1 compilation(s): one for all"}
FEW = {"sequence": [], "schedule": ["--repeats", "1"], "distillation": ["--repeats", "1"]}


def short(module):
    return module.__name__.partition(".")[2]


def run_example(module, *arguments):
    torch.compiler.reset()  # or there is nothing left to compile, and to count, in a second run
    few = FEW[short(module).partition("_")[2]]
    arguments = ["--epochs", "1", *few, *map(str, arguments)]
    return CliRunner().invoke(module.app, arguments, env={"COLUMNS": "80"})


@pytest.fixture(autouse=True, scope="module")
def _promotion_as_optax_needs_it():
    # Optax raises a Python float to the power of an int32 count.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module", params=MODULES, ids=short)
def example(request, tmp_path_factory):
    output = tmp_path_factory.mktemp("example") / "new" / "folder"
    return request.param, run_example(request.param, "--output", output), output


# --- The command lines ----------------------------------------------------------------------------------------------


def report(result):
    """Return what a run printed after its progress bar."""
    return result.stdout.partition("0:00:0")[2].partition("\n")[2].partition("wrote")[0]


def test_run(example):
    module, result, output = example
    assert result.exit_code == 0, result.output
    (picture,) = output.glob("*.png")
    assert result.stdout.rstrip().endswith(f"wrote {picture}")
    assert "accuracy" in report(result)
    assert "nan" not in report(result)
    assert max(map(len, report(result).splitlines())) <= 80
    pixels = imread(picture)[..., :3]
    assert 0.7 < pixels.mean() < 0.99
    assert pixels.shape[1] >= 1100
    if short(module) in COMPILATIONS:
        assert f"111 steps, 3 schedule(s), {COMPILATIONS[short(module)]}" in report(result)


@pytest.mark.parametrize("example", QUICK, ids=short, indirect=True)
def test_same_numbers_again(example, tmp_path):
    module, one, _ = example
    assert report(one) == report(run_example(module, "--output", tmp_path))
    assert report(one) != report(run_example(module, "--seed", 1, "--output", tmp_path))


@pytest.mark.parametrize("module", MODULES, ids=short)
def test_help(module):
    result = CliRunner().invoke(module.app, ["--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    for option in ("--epochs", "--smoothing", "--seed", "--output"):
        assert option in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


BAD_OPTIONS = {
    "sequence": (
        ["--microbatches", "3"],
        "'--microbatches': 64 sentences do not divide into 3: take a power of 2 up to 64.",
    ),
    "schedule": (["--repeats", "0"], "'--repeats': "),
    "distillation": (["--rows", "63"], "'--rows': "),
}


@pytest.mark.parametrize("module", MODULES, ids=short)
def test_bad_option(module, tmp_path):
    bad = (["--smoothing", "1.5"], "'--smoothing': smoothing must be in [0, 1], got 1.5.")
    for arguments, message in (bad, BAD_OPTIONS[short(module).partition("_")[2]]):
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


@pytest.mark.parametrize("module", PAIRS["sequence"], ids=short)
def test_nothing_is_trained_twice(module, tmp_path):
    result = run_example(module, "--smoothing", 0, "--output", tmp_path)
    rows = [line.split()[1:4:2] for line in report(result).splitlines() if line.startswith("│")]
    assert rows == [["0", "shared"], ["0", "own"]]


@pytest.mark.parametrize("module", PAIRS["schedule"], ids=short)
def test_no_schedule_is_trained_twice(module):
    assert list(module.make_schedules(0.0, 4)) == ["none"]
    assert list(module.make_schedules(0.1, 4)) == ["none", "constant", "annealed"]


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


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_pair_mirrors(pair):
    assert definitions(pair[0]) == definitions(pair[1])
    assert options(pair[0]) == options(pair[1])
    assert pair[0].METRICS == pair[1].METRICS


# --- Sequences: the gradient of the microbatches is that of the batch -----------------------------------------------

MICROBATCHES, SMOOTHING = 4, 0.1


class JaxAccumulation:
    """A tagger of the JAX example, and its gradients in float64."""

    module = jax_sequence

    def __init__(self):
        """Draw weights."""
        self.tagger = jax_sequence.Tagger(nnx.Rngs(0))
        # The example's optimizer but for Adam, which would hide the scale: its step is the gradient.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optax, "adam", optax.sgd)
            patch.setattr(jax_sequence, "LEARNING_RATE", 1.0)
            self.optimizer = jax_sequence.make_optimizer(MICROBATCHES)

    def accumulated(self, pieces, denominators):
        """Return the gradient of the example's training step."""
        tagger = nnx.clone(self.tagger)
        optimizer = nnx.Optimizer(tagger, self.optimizer, wrt=nnx.Param)
        for piece, denominator in zip(pieces, denominators, strict=True):
            jax_sequence.train_step(tagger, optimizer, *jax_sequence.arrays(piece), SMOOTHING, denominator)
        return self.weights() - np.asarray(ravel_pytree(nnx.state(tagger, nnx.Param))[0], np.float64)

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

        jacobians = jax.jit(jax.vmap(jax.jacrev(losses), (None, 0, 0)))(flat, *jax_sequence.arrays(batch))
        return np.asarray(jacobians, np.float64)


class TorchAccumulation:
    """A tagger of the torch example, and its gradients in float64."""

    module = torch_sequence

    def __init__(self):
        """Draw weights."""
        torch.manual_seed(0)
        self.tagger = torch_sequence.Tagger()

    def accumulated(self, pieces, denominators):
        """Return the gradient of the example's training step."""
        self.tagger.zero_grad()
        for piece, denominator in zip(pieces, denominators, strict=True):
            torch_sequence.train_step(self.tagger, *torch_sequence.arrays(piece), SMOOTHING, denominator)
        return parameters_to_vector([weight.grad for weight in self.tagger.parameters()]).double().numpy()

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

        jacobians = torch.func.vmap(torch.func.jacrev(losses), (None, 0, 0))(params, *torch_sequence.arrays(batch))
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
    sentences, _ = side.module.make_sentences(seed=1)
    batch = side.module.Sentences(sentences.words[:8], sentences.tags[:8])
    number_of_words = np.count_nonzero(batch.words)
    whole = np.asarray(side.module.flat_gradient(side.tagger, *side.module.arrays(batch), SMOOTHING), np.float64)
    # Two sums of the same terms, one for each word, in two orders: at most n - 1 roundings in each. That is the worst
    # case, some ten times what is seen, so there is room for the few roundings within a term, too.
    # The weights that are moved by the gradient are rounded once more.
    magnitude = np.abs(side.of_words(batch)).sum(axis=(0, 1)) / number_of_words
    allowed = 2.0**-24 * (2 * (number_of_words - 1) * magnitude + side.update_rounding())
    return Accumulation(side, side.module.split(batch, MICROBATCHES), number_of_words, whole, allowed)


def test_shared_denominator_is_the_whole_batch(accumulation):
    share = accumulation.share(accumulation.side.module.denominators(accumulation.pieces, shared=True))
    print(f"{share:.3f} of the allowed difference")
    assert share <= 1


def test_wrong_denominators_are_rejected(accumulation):
    denominators = accumulation.side.module.denominators
    right = denominators(accumulation.pieces, shared=True)
    wrong = {
        "means of microbatches": denominators(accumulation.pieces, shared=False),
        "one word too few": [number * (1 - 1 / accumulation.number_of_words) for number in right],
        "padding counted": [number * accumulation.pieces[0].words.size / np.mean(right) for number in right],
        "summed instead of averaged, or averaged instead of summed": [number * MICROBATCHES for number in right],
    }
    for name, numbers in wrong.items():
        share = accumulation.share(numbers)
        print(f"{name}: {share:.3g} times the allowed difference")
        assert share > 10, name


def test_tags_of_padding_change_nothing(accumulation):
    module, tagger = accumulation.side.module, accumulation.side.tagger
    words, tags = accumulation.pieces[0]
    assert np.any(words == module.PADDING)
    other = np.where(words == module.PADDING, 99, tags).astype(np.int32)
    one, two = (
        np.asarray(module.flat_gradient(tagger, *module.arrays(module.Sentences(words, tags)), SMOOTHING))
        for tags in (tags, other)
    )
    np.testing.assert_array_equal(one, two)
    assert np.any(one != 0)


# --- Schedules: each step has the smoothing of its own place in the schedule ----------------------------------------


def jax_steps(schedule, steps):
    """Return smoothings and weights after some steps of the JAX example, and the state that a checkpoint keeps."""
    network = jax_schedule.Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(network, jax_schedule.ADAM, wrt=nnx.Param)
    images, labels = jax.random.uniform(jax.random.key(1), (4, 64)), jnp.arange(4)
    used = [float(jax_schedule.train_step(network, optimizer, images, labels, schedule=schedule)) for _ in range(steps)]
    kept = float(optimizer.opt_state.hyperparams["smoothing"])
    return used, np.asarray(ravel_pytree(nnx.state(network))[0]), kept


def torch_steps(schedule, steps):
    """Return the same of the torch example."""
    torch.manual_seed(0)
    network = torch_schedule.Network()
    optimizer = torch_schedule.adam(network, 4e-3, smoothing=0.0)
    images, labels = torch.rand(4, 64), torch.arange(4)
    used = [
        torch_schedule.train_step(network, optimizer, images, labels, schedule=schedule, step=step)
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
    network = torch_schedule.Network()
    for smoothing in smoothings:
        torch_schedule.loss_fn(network, torch.rand(4, 64), torch.arange(4), smoothing)
    # How often depends on the version: 2 and 3 times with torch 2.13, once more with 2.9.
    assert counters["stats"]["unique_graphs"] > 1


# --- Distillation: the loss is the square of the temperature times the Kullback-Leibler divergence -------------------

ROWS, TEMPERATURE = 8, 4.0
BIAS = np.linspace(-3, 3, 10).astype(np.float32)


def jax_bias_gradient(soft_labels):
    """Return the gradient of the output bias in the JAX example, of a network whose logits are that bias."""
    network = jax_distillation.Network(4, nnx.Rngs(0))
    network.output.kernel[...] = jnp.zeros((4, 10))
    network.output.bias[...] = jnp.asarray(BIAS)
    optimizer = nnx.Optimizer(network, optax.sgd(1.0), wrt=nnx.Param)
    jax_distillation.train_step(network, optimizer, np.ones((ROWS, 64), np.float32), soft_labels, 0.0, TEMPERATURE)
    return BIAS.astype(np.float64) - np.asarray(network.output.bias[...], np.float64)


def torch_bias_gradient(soft_labels):
    """Return the same in the torch example."""
    network = torch_distillation.Network(4)
    with torch.no_grad():
        network.output.weight.zero_()
        network.output.bias.copy_(torch.from_numpy(BIAS))
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    torch_distillation.train_step(
        network, optimizer, torch.ones(ROWS, 64), torch.from_numpy(soft_labels), 0.0, TEMPERATURE
    )
    return network.output.bias.grad.double().numpy()


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
