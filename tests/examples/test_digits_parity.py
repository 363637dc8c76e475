"""The demo: that it runs, that it refuses bad options, and that it notices wrong trainings."""

import functools
import re
from typing import NamedTuple

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from matplotlib.image import imread

from examples import digits_parity, jax_digits, jax_mixup
from examples.common import BETA1, BETA2, EPSILON
from examples.digits_report import confidence_bins, expected_calibration_error
from lsce_torch import label_smoothed_cross_entropy
from parity_tests.trainings.trajectory import compare_trajectories, rounding_floor

EPOCHS, SMOOTHING, SEED = 3, 0.1, 0


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optax_promotion")]


@pytest.fixture(scope="module")
def run_demo(run_example):
    return functools.partial(run_example, digits_parity)


@pytest.fixture
def _without_page(monkeypatch):
    monkeypatch.setattr(digits_parity.digits_report, "write", lambda *_: [])


# --- The run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(run_demo, tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return run_demo("--epochs", 2, "--output", output), output


def test_faithful_trainings_agree(demo):
    result, output = demo
    assert result.exit_code == 0, result.output
    assert re.match(r"AGREE: at most 0\.\d\d of the allowed difference, over 2 x 74 steps$", last_line(result))
    assert f"wrote {output / 'digits_parity.html'}" in result.stdout
    assert max(map(len, result.stdout.partition("wrote")[0].splitlines())) <= 80


def test_page_is_self_contained(demo):
    page = (demo[1] / "digits_parity.html").read_text(encoding="utf-8")
    sources = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]{1,30})""", page)
    assert len(sources) == 6
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in page
    assert "//" not in re.sub(r"base64,[^\"]+", "", page)
    assert page.index("AGREE") < page.index("<h2>")


def test_picture_shows_something(demo):
    pixels = imread(demo[1] / "digits_parity.png")
    height, width, _ = pixels.shape
    assert abs(height - 920) <= 2  # matplotlib 3.10 rounds inches to one pixel less
    assert abs(width - 1600) <= 2
    assert 0.7 < pixels[..., :3].mean() < 0.99


@pytest.mark.usefixtures("_without_page")
def test_smoothing_zero_is_a_single_run(run_demo, tmp_path):
    result = run_demo("--epochs", 1, "--smoothing", 0, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert last_line(result).endswith("over 1 x 37 steps")


def use_convention(monkeypatch, name, convention):
    """Use a convention where there is smoothing. Without it all are the same, and JAX has compiled the default one."""
    right = getattr(digits_parity, name)
    monkeypatch.setattr(
        digits_parity, name, lambda smoothing, _: right(smoothing, convention if smoothing else "uniform")
    )


def test_a_loss_that_is_zero_throughout(run_demo, tmp_path, monkeypatch):
    # "clamp" limits every target to at most 1 - 1 = 0.
    use_convention(monkeypatch, "jax_loss", "clamp")
    result = run_demo("--epochs", 1, "--smoothing", 1, "--convention", "clamp", "--output", tmp_path)
    assert result.exit_code == 0, result.output


def last_line(result):
    return result.stdout.rstrip().splitlines()[-1]


# --- Bad options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "'--epochs': "),
        (["--epochs", "few"], "'--epochs': "),
        (["--smoothing", "1.5"], "'--smoothing': smoothing must be in [0, 1], got 1.5."),
        (["--smoothing", "-0.1"], "'--smoothing': smoothing must be in [0, 1], got -0.1."),
        (["--smoothing", "nan"], "'--smoothing': smoothing must be in [0, 1], got nan."),
        (["--convention", "Uniform"], "'--convention': unknown convention 'Uniform'. Known names: 'uniform'"),
        (["--seed", "-1"], "'--seed': "),
        (["--speed", "1"], "No such option"),
        (["extra"], "unexpected extra argument"),
    ],
)
def test_bad_option(arguments, message, run_demo, tmp_path, monkeypatch):
    monkeypatch.setattr(digits_parity, "run", None)
    result = run_demo(*arguments, "--output", tmp_path / "never")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("Error")]) == 1
    assert "Traceback" not in result.output
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(("place", "message"), [("file", "File exists"), ("file/below", "Not a directory")])
def test_output_that_cannot_be_written(place, message, run_demo, tmp_path, monkeypatch):
    monkeypatch.setattr(digits_parity, "run", None)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    result = run_demo("--output", place)
    assert result.exit_code == 2
    assert f"Error: Invalid value for '--output': cannot write to the folder {place}: {message}." in result.stderr


# --- The two trainings are the same ---------------------------------------------------------------------------------


def test_weights_are_carried_bit_for_bit():
    source, target = digits_parity.FlaxNetwork(nnx.Rngs(3)), digits_parity.TorchNetwork()
    digits_parity.carry_weights(source, target)
    for name in ("hidden", "output"):
        kernel = np.asarray(getattr(source, name).kernel[...])
        np.testing.assert_array_equal(kernel.T, getattr(target, name).weight.detach().numpy())
        np.testing.assert_array_equal(getattr(source, name).bias[...], getattr(target, name).bias.detach().numpy())


def test_every_weight_of_a_replica_is_one_ulp_away():
    weight = jax.random.normal(jax.random.key(0), (50, 50))
    moved = digits_parity.one_ulp_away(weight, np.random.default_rng(0))
    up, down = np.nextafter(weight, np.float32(np.inf)), np.nextafter(weight, np.float32(-np.inf))
    assert np.all((moved == up) | (moved == down))
    assert 0.4 < np.mean(moved == up) < 0.6


def test_hyperparameters_are_exact_in_float32():
    decays = [1 - each.LEARNING_RATE * each.WEIGHT_DECAY for each in (digits_parity, jax_digits, jax_mixup)]
    for constant in (BETA1, BETA2, 1 - BETA1, 1 - BETA2, EPSILON, *decays):
        assert float(np.float32(constant)) == constant


def test_batches_hold_every_image_at_most_once_per_epoch():
    order = digits_parity.batch_order(100, 4, seed=0)
    assert order.shape == (4, 3, digits_parity.BATCH_SIZE)
    for epoch in order:
        assert len(set(epoch.ravel())) == epoch.size
    assert not np.array_equal(order[0], order[1])


# --- Calibration ----------------------------------------------------------------------------------------------------


def test_bins_of_confidence():
    probabilities = np.array([[0.2, 0.8], [0.75, 0.25], [0.5, 0.5], [1.0, 0.0]], np.float32)
    bins = confidence_bins(probabilities, np.array([1, 1, 0, 0], np.int32), bins=4)
    np.testing.assert_array_equal(bins.count, [0, 1, 1, 2])
    np.testing.assert_allclose(bins.confidence, [0, 0.5, 0.75, 0.9])
    np.testing.assert_allclose(bins.accuracy, [0, 1, 0, 1])


def test_calibration_error_is_zero_for_the_sure_and_right_and_one_for_the_sure_and_wrong():
    sure = np.eye(10, dtype=np.float32)
    assert expected_calibration_error(sure, np.arange(10, dtype=np.int32)) == 0
    assert expected_calibration_error(sure, (np.arange(10, dtype=np.int32) + 1) % 10) == 1
    assert np.isnan(expected_calibration_error(sure * np.nan, np.arange(10, dtype=np.int32)))


# --- Wrong trainings are noticed ------------------------------------------------------------------------------------


class Yardstick(NamedTuple):
    """A JAX training and its replicas, to hold torch trainings against."""

    batches: list[tuple[np.ndarray, np.ndarray]]
    network: digits_parity.FlaxNetwork
    losses: np.ndarray
    replicas: np.ndarray

    def judge(self):
        """Train in torch and compare."""
        torch_network = digits_parity.TorchNetwork()
        digits_parity.carry_weights(self.network, torch_network)
        training = digits_parity.TorchTraining(torch_network, SMOOTHING, "uniform")
        other = [training.step(images, labels) for images, labels in self.batches]
        floor = rounding_floor(self.losses, digits_parity.BATCH_SIZE)
        return compare_trajectories(self.losses, other, self.replicas, floor=floor)


@pytest.fixture(scope="module")
def yardstick():
    with digits_parity.on_the_cpu():
        digits = digits_parity.read_digits(SEED)
        order = digits_parity.batch_order(len(digits.train_labels), EPOCHS, SEED)
        images, labels = digits.train_images[order], digits.train_labels[order]
        batches = [batch for epoch in zip(images, labels, strict=True) for batch in zip(*epoch, strict=True)]
        replicas = digits_parity.OneUlpReplicas(digits_parity.FlaxNetwork(nnx.Rngs(SEED)), SMOOTHING, "uniform", SEED)
        replica_losses = [replicas.epoch(*epoch) for epoch in zip(images, labels, strict=True)]
        training = digits_parity.JaxTraining(digits_parity.FlaxNetwork(nnx.Rngs(SEED)), SMOOTHING, "uniform")
        losses = np.array([training.step(*batch) for batch in batches])
        network = digits_parity.FlaxNetwork(nnx.Rngs(SEED))
        yield Yardstick(batches, network, losses, np.concatenate(replica_losses, axis=1))


def wrong_loss(**options):
    return lambda logits, labels: label_smoothed_cross_entropy(logits, labels, **{"smoothing": SMOOTHING} | options)


def plain_gradient(logits, labels):
    plain = label_smoothed_cross_entropy(logits, labels, smoothing=0.0)
    return plain + (label_smoothed_cross_entropy(logits, labels, smoothing=SMOOTHING) - plain).detach()


def first_row_only_gradient(logits, labels):
    losses = label_smoothed_cross_entropy(logits, labels, smoothing=SMOOTHING, reduction="none")
    return torch.cat([losses[:1], losses[1:].detach()]).mean()


def last_row_lost(logits, labels):
    losses = label_smoothed_cross_entropy(logits, labels, smoothing=SMOOTHING, reduction="none")
    return losses[:-1].sum() / len(losses)


WRONG_LOSSES = {
    "e/(K-1) for e/K": wrong_loss(convention="non_target"),
    "no smoothing": wrong_loss(smoothing=0.0),
    "no smoothing in the gradient": plain_gradient,
    "smoothing off by 1e-4, relative": wrong_loss(smoothing=SMOOTHING * (1 + 1e-4)),
    "sum for mean": wrong_loss(reduction="sum"),
    "mean over one row less": lambda logits, labels: wrong_loss(reduction="sum")(logits, labels) / (len(labels) - 1),
    "labels off by one": lambda logits, labels: wrong_loss()(logits, (labels + 1) % 10),
    "gradient of one row": first_row_only_gradient,
    "last row lost": last_row_lost,
    "z-loss of 1e-5": wrong_loss(z_loss=1e-5),
    "logits in bfloat16": lambda logits, labels: wrong_loss()(logits.bfloat16(), labels),
    "loss in bfloat16": lambda logits, labels: wrong_loss()(logits, labels).bfloat16(),
}


class AdamWWithEpsilonInside(torch.optim.Optimizer):
    """AdamW that divides by sqrt(v + epsilon)."""

    def __init__(self, parameters, **defaults):
        """Keep the hyperparameters."""
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self):
        """Move the weights."""
        for group in self.param_groups:
            (beta1, beta2), rate = group["betas"], group["lr"]
            for weight in group["params"]:
                state = self.state[weight]
                state["t"] = state.get("t", 0) + 1
                state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * weight.grad
                state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * weight.grad**2
                mean, square = state["m"] / (1 - beta1 ** state["t"]), state["v"] / (1 - beta2 ** state["t"])
                weight.mul_(1 - rate * group["weight_decay"])
                weight.sub_(rate * mean / (square + group["eps"]).sqrt())


def wrong_adamw(optimizer=torch.optim.AdamW, **options):
    right = {
        "lr": digits_parity.LEARNING_RATE,
        "betas": (BETA1, BETA2),
        "eps": EPSILON,
        "weight_decay": digits_parity.WEIGHT_DECAY,
    }
    return lambda network: optimizer(network.parameters(), **right | options)


WRONG_OPTIMIZERS = {
    "learning rate off by 1e-3, relative": wrong_adamw(lr=digits_parity.LEARNING_RATE * (1 + 1e-3)),
    "epsilon inside the square root": wrong_adamw(AdamWWithEpsilonInside),
    "epsilon of 1e-6": wrong_adamw(eps=1e-6),
    "no weight decay": wrong_adamw(weight_decay=0.0),
    "weight decay within the gradient": wrong_adamw(torch.optim.Adam),
    "weight decay off by 1 %": wrong_adamw(weight_decay=digits_parity.WEIGHT_DECAY * 1.01),
    "beta1 of 0.9": wrong_adamw(betas=(0.9, BETA2)),
    "beta2 off by 1e-4": wrong_adamw(betas=(BETA1, BETA2 + 1e-4)),
    "amsgrad": wrong_adamw(amsgrad=True),
}


def report(name, verdict):
    step = verdict.first_divergence
    if step is None:
        return f"{name}: not rejected, at most {verdict.largest_share:.3f} of the allowed difference"
    return (
        f"{name}: rejected at step {step} by a factor of {verdict.share[step]:.3g}, "
        f"at worst {verdict.largest_share:.3g} (step {verdict.worst_step})"
    )


def test_right_torch_training_agrees(yardstick):
    verdict = yardstick.judge()
    assert verdict.agrees, report("the right one", verdict)
    # The rule is of use only while it is tight: far from all of the losses' digits may be excused by rounding.
    assert np.all(verdict.allowed < 5e-6)


def test_nothing_else_is_wrong_with_the_optimizer_with_epsilon_inside():
    """Where the gradients are 1, and epsilon does nothing on either side of the root, it is AdamW."""
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64)) for _ in range(2))
    options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-20, "weight_decay": 0.1}
    optimizers = [AdamWWithEpsilonInside([ours], **options), torch.optim.AdamW([theirs], **options)]
    for step in range(5):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = torch.full_like(parameter, 1.0 + step)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", WRONG_LOSSES)
def test_wrong_loss_is_rejected(name, yardstick, monkeypatch):
    monkeypatch.setattr(digits_parity, "torch_loss", lambda smoothing, convention: WRONG_LOSSES[name])
    verdict = yardstick.judge()
    print(report(name, verdict))
    assert not verdict.agrees, report(name, verdict)


@pytest.mark.parametrize("name", WRONG_OPTIMIZERS)
def test_wrong_optimizer_is_rejected(name, yardstick, monkeypatch):
    monkeypatch.setattr(digits_parity, "torch_optimizer", WRONG_OPTIMIZERS[name])
    verdict = yardstick.judge()
    print(report(name, verdict))
    assert not verdict.agrees, report(name, verdict)


def gradient_of_the_sum(logits, labels):
    loss = wrong_loss(reduction="sum")(logits, labels)
    return loss - (loss - wrong_loss()(logits, labels)).detach()


def test_adam_all_but_hides_the_scale_of_the_gradient(yardstick, monkeypatch):
    """A gradient 32 times too large shows through epsilon only: the parity tests have to compare gradients as well."""
    monkeypatch.setattr(digits_parity, "torch_loss", lambda smoothing, convention: gradient_of_the_sum)
    verdict = yardstick.judge()
    print(report("gradient of the sum, value of the mean", verdict))
    assert verdict.largest_share < 10


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_command_line_says_so(framework, run_demo, tmp_path, monkeypatch):
    use_convention(monkeypatch, f"{framework}_loss", "non_target")
    result = run_demo("--epochs", 1, "--output", tmp_path)
    assert result.exit_code == 1, result.output
    print(last_line(result))
    # Without smoothing the conventions are the same: that training is fine, and the line names the other one.
    assert last_line(result).startswith("DISAGREE from step 0 (smoothing 0.1): difference ")
    assert 'class="verdict disagree"' in (tmp_path / "digits_parity.html").read_text(encoding="utf-8")


def test_command_line_survives_a_training_that_ends_in_nan(run_demo, tmp_path, monkeypatch):
    monkeypatch.setattr(digits_parity, "torch_optimizer", wrong_adamw(lr=float("inf")))
    result = run_demo("--epochs", 1, "--smoothing", 0, "--output", tmp_path)
    assert result.exit_code == 1, result.output
    assert last_line(result).startswith("DISAGREE from step 1 (smoothing 0): difference nan")
