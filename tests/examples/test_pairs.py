"""All pairs of examples: their command lines, that they mirror each other, and that the two trainings are the same.

Both examples of a pair start from the same weights and see the same batches, so that their losses and metrics may
differ by rounding only. `parity_tests.trainings.trajectory` has the rule: the JAX example runs again with its initial
weights moved by one unit in the last place, and the torch example may differ by twice what these replicas do.
"""

import ast
import functools
import inspect
import re
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from examples import (
    common,
    common_jax,
    common_torch,
    digits_common,
    distillation_common,
    jax_digits,
    jax_distillation,
    jax_lm,
    jax_mixup,
    jax_schedule,
    jax_sequence,
    lm_common,
    mixup_common,
    schedule_common,
    sequence_common,
    torch_digits,
    torch_distillation,
    torch_lm,
    torch_mixup,
    torch_schedule,
    torch_sequence,
)
from lsce_torch import label_smoothed_cross_entropy
from parity_tests.trainings.stepwise import one_ulp_away
from parity_tests.trainings.trajectory import compare_trajectories, rounding_floor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optax_promotion", "one_thread")]


class Pair(NamedTuple):
    """A pair of examples, and the small setting in which it is tested.

    Args:
        jax: the example in JAX.
        torch: the example in torch.
        common: what they share.
        small: options for a run of seconds.
        bad: options that are refused, and the message.
        loss: the name of the loss function in both examples.
        rows: losses that a step averages.
        trainings: how many a run does, one after the other.
    """

    jax: Any
    torch: Any
    common: Any
    small: list[str]
    bad: tuple[list[str], str]
    loss: str
    rows: int
    trainings: int = 1


LM_SMALL = ["--steps", "32", "--vocabulary", "512", "--width", "32", "--batch-size", "4", "--chunk-size", "200"]
DENSE = "label_smoothed_cross_entropy"
PAIRS = {
    "digits": Pair(
        jax_digits,
        torch_digits,
        digits_common,
        ["--epochs", "2"],
        (["--checkpoint-every", "0"], "'--checkpoint-every': "),
        f"{DENSE}_with_stats",
        32,
    ),
    "mixup": Pair(
        jax_mixup,
        torch_mixup,
        mixup_common,
        ["--epochs", "2"],
        (["--epochs", "0"], "'--epochs': "),
        DENSE,
        30,
        trainings=6,
    ),
    "sequence": Pair(
        jax_sequence,
        torch_sequence,
        sequence_common,
        ["--epochs", "1"],
        (["--microbatches", "3"], "'--microbatches': 64 sentences do not divide into 3: take a power of 2 up to 64."),
        DENSE,
        64 * 40,
        trainings=3,
    ),
    "schedule": Pair(
        jax_schedule,
        torch_schedule,
        schedule_common,
        ["--epochs", "1", "--repeats", "1"],
        (["--repeats", "0"], "'--repeats': "),
        DENSE,
        32,
        trainings=3,
    ),
    "distillation": Pair(
        jax_distillation,
        torch_distillation,
        distillation_common,
        ["--epochs", "1", "--repeats", "1"],
        (["--rows", "63"], "'--rows': "),
        DENSE,
        64,
        trainings=11,
    ),
    "lm": Pair(
        jax_lm,
        torch_lm,
        lm_common,
        LM_SMALL,
        (["--width", "33"], "'--width': 33 features do not divide into 4 heads."),
        f"linear_{DENSE}",
        4 * lm_common.CONTEXT,
    ),
}
EXAMPLES = {example.__name__.partition(".")[2]: pair for pair in PAIRS.values() for example in (pair.jax, pair.torch)}
COMPILATIONS = {
    "jax_schedule": "111 steps, 3 schedule(s), 3 compilation(s): one for each",
    "torch_schedule": "111 steps, 3 schedule(s), 1 compilation(s): one for all",
}

each_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
each_example = pytest.mark.parametrize("name", EXAMPLES)


def example_of(name):
    pair = EXAMPLES[name]
    return pair.jax if name.startswith("jax") else pair.torch


@pytest.fixture(scope="module", autouse=True)
def _less_is_held_out():
    """A short held-out text, so that computing its perplexity takes no longer than training."""
    read_text = functools.cache(lm_common.read_text)

    @functools.cache
    def read_less(vocabulary):
        text = read_text(vocabulary)
        return text._replace(held_out=text.held_out[:5000])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_common, "read_text", read_less)
        yield


make_schedules = functools.cache(jax_schedule.make_schedules)


def run_quickly(pair, patch):
    """Skip what takes longer than the trainings: plots, measuring memory, and compiling again for equal schedules."""
    for module in (pair.common, pair.jax, pair.torch):
        for name in ("plot", "plot_losses"):
            patch.setattr(module, name, lambda *_: None, raising=False)
    for example in (jax_lm, torch_lm):
        patch.setattr(example, "loss_memory", lambda *_: {})
    patch.setattr(jax_schedule, "make_schedules", make_schedules)


# --- The command lines ----------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A run of an example with its small setting."""

    name: str
    result: Any
    output: Path

    @property
    def report(self):
        """Return what was printed between the progress bar and the paths."""
        return re.split(r"0:\d\d:\d\d\n", self.result.stdout)[-1].partition("wrote")[0]

    @property
    def rows(self):
        """Return the rows of the tables, but for the memory that each framework takes."""
        rows = [line for line in self.report.splitlines() if line.startswith("│")]
        return [row for row in rows if "at once" not in row and "in chunks" not in row]


@pytest.fixture(scope="module")
def small_run(run_example, tmp_path_factory):
    """Return a function that runs an example with its small setting, once only."""

    @functools.cache
    def run(name):
        torch.compiler.reset()  # or nothing is left to compile, and to count
        output = tmp_path_factory.mktemp(name) / "new" / "folder"
        return Run(name, run_example(example_of(name), *EXAMPLES[name].small, "--output", output), output)

    return run


@each_example
def test_run(name, small_run):
    run = small_run(name)
    assert run.result.exit_code == 0, run.result.output
    (picture,) = run.output.glob("*.png")
    assert run.result.stdout.endswith(f"wrote {picture}\n")
    assert max(map(len, run.report.splitlines())) <= 80
    assert "perplexity" in run.report if name.endswith("lm") else "accuracy" in run.report
    assert "nan" not in run.report
    assert COMPILATIONS.get(name, "") in run.report
    pixels = imread(picture)[..., :3]
    assert pixels.shape[0] >= 400
    assert pixels.shape[1] >= 800
    assert 0.6 < pixels.mean() < 0.99
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


@each_example
def test_same_numbers_again(name, small_run, run_example, tmp_path, monkeypatch):
    run, pair = small_run(name), EXAMPLES[name]
    run_quickly(pair, monkeypatch)
    for seed, same in ((0, True), (1, False)):
        output = tmp_path / str(seed)
        result = run_example(example_of(name), *pair.small, "--seed", seed, "--output", output)
        assert (Run(name, result, output).rows == run.rows) == same


@each_example
def test_help(name, run_example):
    result = run_example(example_of(name), "--help")
    assert result.exit_code == 0
    for option in inspect.signature(example_of(name).main).parameters:
        assert f"--{option.replace('_', '-')}" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


@each_example
def test_bad_options(name, run_example, tmp_path):
    bad = [
        (["--smoothing", "1.5"], "'--smoothing': smoothing must be in [0, 1], got 1.5."),
        (["--seed", "-1"], "'--seed': "),
        EXAMPLES[name].bad,
    ]
    for arguments, message in bad:
        result = run_example(example_of(name), *arguments, "--output", tmp_path / "never")
        assert result.exit_code == 2
        assert message in result.stderr
    assert not (tmp_path / "never").exists()


@each_example
def test_no_folder(name, run_example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    for output, reason in (("file", "File exists"), ("file/new", "Not a directory")):
        result = run_example(example_of(name), "--output", output)
        assert result.exit_code == 2
        assert f"'--output': cannot write to the folder {output}: {reason}." in result.stderr


# --- The two of a pair are one example ------------------------------------------------------------------------------


def definitions(module):
    tree = ast.parse(inspect.getsource(module))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def options(module):
    described = {}
    for name, parameter in inspect.signature(module.main).parameters.items():
        described[name] = parameter.annotation, parameter.default if name != "output" else None
    return described


# A NumPy array is an array of JAX, and not of torch. FSDP has whole weights in the `forward` of a module only, so the
# loss is in one, and torch's devices are processes.
ONLY_IN_TORCH = {"tensors", "WithLoss", "make_mesh", "without_warning", "is_first", "wait_for_all"}
ONLY_IN_JAX = {jax_lm: {"mean_loss", "count"}}


@each_pair
def test_pair_mirrors(pair):
    in_jax = [name for name in definitions(pair.jax) if name not in ONLY_IN_JAX.get(pair.jax, set())]
    assert in_jax == [name for name in definitions(pair.torch) if name not in ONLY_IN_TORCH]
    assert {"train_step", "make_optimizer", "main"} <= {*definitions(pair.jax)}
    assert options(pair.jax) == options(pair.torch)


def test_what_pairs_share_mirrors():
    assert definitions(common_jax) == definitions(common_torch)


@each_pair
def test_pair_prints_the_same_figures(pair, small_run):
    jax, torch = (small_run(example.__name__.partition(".")[2]).rows for example in (pair.jax, pair.torch))
    assert len(jax) == len(torch) > 2
    for one, other in zip(jax, torch, strict=True):
        assert same_row(one, other), (one, other)


def test_other_figures_are_noticed():
    row = "│ 0.1 │ shared │ 1.2e-07 │ 0.7250 │"
    assert same_row(row, row.replace("0.7250", "0.7251"))
    assert same_row(row, row.replace("1.2e-07", "3.4e-07"))
    assert not same_row(row, row.replace("0.7250", "0.7252"))
    assert not same_row(row, row.replace("shared", "own"))


def same_row(one, other):
    """Whether words are equal, and numbers but for one in the last digit. A number below 1e-6 is itself a rounding."""
    for left, right in zip(one.split(), other.split(), strict=True):
        if not re.fullmatch(r"\d+\.\d+(e-\d+)?", left):
            same = left == right
        else:
            unit = 10.0 ** Decimal(left).as_tuple().exponent
            same = abs(float(left) - float(right)) <= max(1.01 * unit, 1e-6)
        if not same:
            return False
    return True


# --- The two trainings are the same ---------------------------------------------------------------------------------

REPLICAS = 4


class Curves(NamedTuple):
    """What a run computed: losses [trainings, steps], and the metrics by name."""

    losses: np.ndarray
    metrics: dict[str, np.ndarray]


class Trainings:
    """The trainings of a pair: those in JAX with replicas, and those in torch, right ones and wrong ones."""

    def __init__(self, pair, run_example, folder):
        """Train in JAX, and train the replicas."""
        self.pair, self.run_example, self.folder = pair, run_example, folder
        self.jax = self.run(pair.jax)
        self.replicas = [self.run(pair.jax, moved=seed) for seed in range(REPLICAS)]

    def run(self, example, moved=None, changed=()):
        """Run an example, with its weights moved by one ulp or some attributes changed, and return its curves."""
        losses, metrics = [], []
        with pytest.MonkeyPatch.context() as patch:
            run_quickly(self.pair, patch)
            for module, name, value in changed:
                patch.setattr(module, name, value)
            if moved is not None:
                self.move_weights(patch, moved)
            torch.compiler.reset()
            record(patch, example, "train_step", losses)
            record(patch, example, "perplexity" if example in PAIRS["lm"][:2] else "evaluate", metrics)
            fresh = ["--fresh"] if self.pair is PAIRS["digits"] else []
            result = self.run_example(example, *self.pair.small, *fresh, "--output", self.folder / example.__name__)
        assert result.exit_code == 0, result.output
        losses = [float(loss[0] if isinstance(loss, tuple) else loss) for loss in losses]
        metrics = [each if isinstance(each, dict) else {"perplexity": each} for each in metrics]
        by_name = {name: np.array([each[name] for each in metrics]) for name in metrics[0]}
        return Curves(np.reshape(losses, (self.pair.trainings, -1)), by_name)

    def move_weights(self, patch, seed):
        """Move the initial weights to a neighbour in float32, at random."""
        random = np.random.default_rng(seed)
        if self.pair is PAIRS["lm"]:
            right = lm_common.initial_weights
            patch.setattr(lm_common, "initial_weights", lambda *options: one_ulp_away(right(*options), random))
            return

        def initial_weights(seed):
            weight_of = common.initial_weights(seed)
            return lambda *layer: one_ulp_away({"": weight_of(*layer)}, random)[""]

        patch.setattr(
            jax_sequence if self.pair is PAIRS["sequence"] else common_jax, "initial_weights", initial_weights
        )

    def sizes(self):
        """Return the sizes of the losses before the last subtraction, whose rounding the losses have."""
        if self.pair is not PAIRS["distillation"]:
            return self.jax.losses
        # The loss is T^2 times the difference of a cross-entropy and an entropy, which is at most log K.
        temperatures = np.array([1, *2 * [1, *distillation_common.TEMPERATURES]])
        return self.jax.losses + temperatures[:, None] ** 2 * np.log(common.CLASSES)

    def judge(self, other):
        """Return the largest share of the allowed difference: in the losses, and in the metrics."""
        replicas = np.stack([replica.losses for replica in self.replicas], axis=1)
        verdicts = [
            compare_trajectories(losses, others, moved, floor=rounding_floor(sizes, self.pair.rows))
            for losses, others, moved, sizes in zip(self.jax.losses, other.losses, replicas, self.sizes(), strict=True)
        ]
        # The rule is of use only while it is tight: rounding may excuse a small part of the losses' digits only.
        assert all(np.all(verdict.allowed < 1e-5 * self.sizes().max()) for verdict in verdicts)
        return max(verdict.largest_share for verdict in verdicts), self.judge_metrics(other)

    def assert_rejected(self, wrong, change):
        """Train in torch with a change, and assert that it shows in the losses."""
        of_losses, of_metrics = self.judge(self.run(self.pair.torch, changed=[change]))
        print(f"{wrong}: {of_losses:.3g} times the allowed difference in the losses, {of_metrics:.3g} in the metrics")
        assert of_losses > 1

    def judge_metrics(self, other):
        """Return the largest share of twice the largest difference of a replica, of all metrics of one name."""
        shares = []
        for name, values in self.jax.metrics.items():
            envelope = max(np.abs(replica.metrics[name] - values).max() for replica in self.replicas)
            # A mean over at least 512 rows, rounded.
            allowed = 2 * (envelope + rounding_floor(values, 512))
            shares.append(np.max(np.abs(other.metrics[name] - values) / allowed))
        return max(shares)


def record(patch, module, name, results):
    """Append the results of a function of an example to a list."""
    function = getattr(module, name)

    def recording(*arguments, **options):
        results.append(function(*arguments, **options))
        return results[-1]

    patch.setattr(module, name, recording)


@pytest.fixture(scope="module")
def make_trainings(run_example, tmp_path_factory):
    """Return a function that returns the trainings of a pair, and trains in JAX once only."""
    return functools.cache(lambda name: Trainings(PAIRS[name], run_example, tmp_path_factory.mktemp(name)))


@pytest.fixture
def trainings(request, make_trainings):
    return make_trainings(request.param)


each_training = pytest.mark.parametrize("trainings", PAIRS, indirect=True)


@each_training
def test_right_torch_training_agrees(trainings):
    of_losses, of_metrics = trainings.judge(trainings.run(trainings.pair.torch))
    print(f"{of_losses:.3f} of the allowed difference in the losses, {of_metrics:.3f} in the metrics")
    assert of_losses <= 1
    assert of_metrics <= 1


def changed_loss(**changes):
    """Return a change of the torch example: another option of the loss, given by the right one."""

    def change(pair):
        right = getattr(pair.torch, pair.loss)

        def wrong(*arguments, smoothing, **options):
            options["smoothing"] = smoothing
            return right(*arguments, **options | {name: new(smoothing) for name, new in changes.items()})

        return pair.torch, pair.loss, wrong

    return change


def changed_optimizer(**changes):
    """Return a change of the torch example: other options of the optimizer."""

    def change(pair):
        module, name = pair.torch, "adamw" if hasattr(pair.torch, "adamw") else "adam"
        if pair is PAIRS["schedule"]:
            module = common_torch
        right = getattr(module, name)

        def wrong(parameters, *rate, **options):
            optimizer = right(parameters, *rate, **options)
            for group in optimizer.param_groups:
                group.update({name: new(group[name]) for name, new in changes.items()})
            return optimizer

        return module, name, wrong

    return change


def changed_rate(pair):
    """Return a change of the torch example: a learning rate that is off by 1e-3, relative."""
    if pair is PAIRS["lm"]:  # whose steps set the rate
        return lm_common, "LEARNING_RATE", lm_common.LEARNING_RATE * (1 + 1e-3)
    return changed_optimizer(lr=lambda rate: rate * (1 + 1e-3))(pair)


WRONG = {
    "smoothing off by 1e-3, relative": changed_loss(smoothing=lambda smoothing: smoothing * (1 + 1e-3)),
    "e/(K-1) for e/K": changed_loss(convention=lambda smoothing: "non_target"),
    "z-loss of 1e-5": changed_loss(z_loss=lambda smoothing: 1e-5),
    "learning rate off by 1e-3, relative": changed_rate,
    "beta2 off by 1e-3": changed_optimizer(betas=lambda betas: (betas[0], betas[1] + 1e-3)),
}


@each_training
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_torch_training_is_rejected(trainings, wrong):
    trainings.assert_rejected(wrong, WRONG[wrong](trainings.pair))


linear_loss = torch_lm.linear_label_smoothed_cross_entropy


def dense_loss(hidden, weight, labels, smoothing, chunk_size, denominator):
    return label_smoothed_cross_entropy(hidden @ weight.T, labels, smoothing=smoothing, denominator=denominator)


def last_row_without_gradient(hidden, weight, labels, **options):
    losses = linear_loss(hidden, weight, labels, reduction="none", **options).flatten()
    return torch.cat([losses[:-1], losses[-1:].detach()]).mean()


WRONG_LM_LOSSES = {
    "sum for mean": changed_loss(reduction=lambda smoothing: "sum")(PAIRS["lm"])[2],
    "gradient filter of 1e-2": changed_loss(gradient_filter=lambda smoothing: 1e-2)(PAIRS["lm"])[2],
    "labels that do not follow": lambda hidden, weight, labels, **options: linear_loss(
        hidden, weight, labels.roll(1, dims=1), **options
    ),
    "no gradient of the table from the loss": lambda hidden, weight, labels, **options: linear_loss(
        hidden, weight.detach(), labels, **options
    ),
    "hidden states in bfloat16": lambda hidden, weight, labels, **options: linear_loss(
        hidden.bfloat16(), weight, labels, **options
    ),
    "gradient of the last row lost": last_row_without_gradient,
}
WRONG_LM_CONSTANTS = {"a warm-up that is a step longer": ("WARM_UP", 65), "no weight decay": ("WEIGHT_DECAY", 0.0)}
the_lm_training = pytest.mark.parametrize("trainings", ["lm"], indirect=True)


@the_lm_training
def test_all_logits_at_once_are_the_same_training(trainings):
    change = torch_lm, "linear_label_smoothed_cross_entropy", dense_loss
    of_losses, of_metrics = trainings.judge(trainings.run(torch_lm, changed=[change]))
    assert of_losses <= 1
    assert of_metrics <= 1


@the_lm_training
@pytest.mark.parametrize("wrong", WRONG_LM_LOSSES)
def test_wrong_linear_loss_is_rejected(trainings, wrong):
    trainings.assert_rejected(wrong, (torch_lm, "linear_label_smoothed_cross_entropy", WRONG_LM_LOSSES[wrong]))


@the_lm_training
@pytest.mark.parametrize("wrong", WRONG_LM_CONSTANTS)
def test_wrong_constant_is_rejected(trainings, wrong):
    trainings.assert_rejected(wrong, (lm_common, *WRONG_LM_CONSTANTS[wrong]))
