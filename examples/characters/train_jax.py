"""Train on the 3755 Chinese characters of level 1 of GB 2312 in Flax and Optax, and test on fonts never seen.

    make fonts
    .venv/bin/python -m examples.characters.train_jax

One small convolutional network for each of six losses: without smoothing, with each of the four conventions, `clamp` of
which is `CELossWithLabelSmoothing`, the module that this library started from; and `linear`, which is `uniform` with
the last layer in the loss, so that the logits of 3755 characters are never whole in memory. The characters are drawn
from open fonts and distorted; four fonts are held out. `--gnt FOLDER` adds handwriting from CASIA-HWDB.

The tables show accuracy, nll and calibration on the fonts that are held out. Each run survives `kill -9`: the same
command goes on from the last checkpoint, and ends with the same weights to the last bit, as in jax_digits.py, on the
same machine with as many cores. Fonts are in fonts.py, pictures in images.py, tables in common.py.

The same in torch: train_torch.py, from the same weights on the same batches. report.py shows both on one page and
says whether they agree.
"""

import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float32, Int32

from examples.characters.common import (
    CACHE,
    EPSILON,
    FEATURES,
    LOSSES,
    NORM_EPSILON,
    NORM_SHARE,
    SIDE,
    STRIDES,
    WIDTHS,
    BatchSize,
    Cache,
    Characters,
    CheckpointEvery,
    Data,
    Fonts,
    Fresh,
    Gnt,
    KeepDamaged,
    LossNames,
    Options,
    Predictions,
    RunFiles,
    RunFolder,
    Seed,
    Sources,
    Steps,
    learning_rates,
    test_batches,
    train_and_report,
    training_batch,
)
from examples.characters.fonts import FOLDER
from examples.characters.images import Samples
from examples.common import Metrics, Smoothing, WeightOf, initial_weights, new_app
from examples.common_jax import adam, set_weights
from examples.digits_common import keep_losses
from examples.jax_digits import Checkpoints
from lsce_jax import (
    CELossWithLabelSmoothing,
    LossStats,
    label_smoothed_cross_entropy,
    label_smoothed_cross_entropy_with_stats,
    linear_label_smoothed_cross_entropy,
)
from lsce_jax.metrics import Accuracy, CalibrationError, MeanNLL, TopKAccuracy

Pictures = Float32[Array, "N 32 32"]
Labels = Int32[Array, " N"]


class Network(nnx.Module):
    """Pictures to logits: convolutions, a layer of features, and the last layer, which the linear loss takes over."""

    def __init__(self, characters: int, weight_of: WeightOf) -> None:
        """Make the layers, with weights by their names."""
        rngs = nnx.Rngs(0)
        norm = partial(nnx.BatchNorm, momentum=1 - NORM_SHARE, epsilon=NORM_EPSILON, use_fast_variance=False, rngs=rngs)
        shapes = zip((1, *WIDTHS[:-1]), WIDTHS, STRIDES, strict=True)
        conv = partial(nnx.Conv, kernel_size=(3, 3), padding=1, use_bias=False, rngs=rngs)
        self.convs = nnx.List([conv(i, o, strides=stride) for i, o, stride in shapes])
        self.norms = nnx.List([norm(width) for width in WIDTHS])
        self.hidden = nnx.Linear(SIDE * SIDE * WIDTHS[-1], FEATURES, use_bias=False, rngs=rngs)
        self.norm = norm(FEATURES)
        self.output = nnx.Linear(FEATURES, characters, rngs=rngs)
        set_weights(self, weight_of)

    def features(self, pictures: Pictures) -> Float32[Array, "N D"]:
        """Return the input of the last layer."""
        maps = pictures[..., None]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            maps = nnx.silu(norm(conv(maps)))
        return self.norm(self.hidden(maps.reshape(len(maps), -1)))

    def __call__(self, pictures: Pictures) -> Float32[Array, "N K"]:
        """Return the logits."""
        return self.output(self.features(pictures))


# --- Losses ---------------------------------------------------------------------------------------------------------

Optimizer = nnx.Optimizer[Network]
LossFn = Callable[[Network, Pictures, Labels], Float32[Array, ""]]


def dense_loss(network: Network, pictures: Pictures, labels: Labels, smoothing: float, convention: str) -> Array:
    """Return the mean loss of the logits."""
    return label_smoothed_cross_entropy(
        network(pictures), labels, smoothing=smoothing, convention=convention, reduction="mean"
    )


def module_loss(network: Network, pictures: Pictures, labels: Labels, module: CELossWithLabelSmoothing) -> Array:
    """Return the mean loss of the logits, by a module."""
    return module(network(pictures), labels)


def linear_loss(network: Network, pictures: Pictures, labels: Labels, smoothing: float) -> Array:
    """Return the mean loss of the features, computed with the last layer."""
    layer = network.output
    return linear_label_smoothed_cross_entropy(
        network.features(pictures),
        layer.kernel[...],
        labels,
        bias=layer.bias[...],
        smoothing=smoothing,
        reduction="mean",
    )


@cache  # `nnx.jit` would compile again for another one, even if it is equal
def make_loss(loss: str, smoothing: float, characters: int) -> LossFn:
    """Return a loss by its name."""
    if loss == "clamp":
        return partial(module_loss, module=CELossWithLabelSmoothing(smoothing, characters))
    if loss == "linear":
        return partial(linear_loss, smoothing=smoothing)
    smoothing, convention = (0.0, "uniform") if loss == "none" else (smoothing, loss)
    return partial(dense_loss, smoothing=smoothing, convention=convention)


# --- Training -------------------------------------------------------------------------------------------------------


@cache  # as above
def make_transformation(steps: int) -> optax.GradientTransformation:
    """Return Adam with the learning rate of each step."""
    rates = jnp.asarray(learning_rates(steps))
    return adam(lambda step: rates[step], eps=EPSILON)


def make_optimizer(network: Network, steps: int) -> Optimizer:
    """Return Adam."""
    return nnx.Optimizer(network, make_transformation(steps), wrt=nnx.Param)


@nnx.jit(static_argnames="loss_fn")
def train_step(
    network: Network, optimizer: Optimizer, pictures: Pictures, labels: Labels, loss_fn: LossFn
) -> Float32[Array, ""]:
    """Train on one batch, and return its loss."""
    loss, gradients = nnx.value_and_grad(loss_fn)(network, pictures, labels)
    optimizer.update(network, gradients)
    return loss


def train_steps(
    network: Network, optimizer: Optimizer, loss: str, data: Data, options: Options, steps: range
) -> Iterator[tuple[int, float]]:
    """Train on the batches of some steps; yield each step with its loss."""
    loss_fn = make_loss(loss, options.smoothing, options.characters)
    for step in steps:
        pictures, labels = training_batch(data, options, step)
        yield step, float(train_step(network, optimizer, pictures, labels, loss_fn))


def train(loss: str, data: Data, options: Options, files: RunFiles, on_step: Callable[[int, float], None]) -> Network:
    """Train a network with one loss, going on from the last checkpoint."""
    network = Network(options.characters, initial_weights(options.seed))
    optimizer = make_optimizer(network, options.steps)
    checkpoints = Checkpoints(files.checkpoints)
    first = checkpoints.restore(network, optimizer)
    keep_losses(files.losses, first)
    on_step(first, np.nan)
    with files.losses.open("a", buffering=1) as lines:
        for step, value in train_steps(network, optimizer, loss, data, options, range(first, options.steps)):
            lines.write(json.dumps({"step": step, "loss": value}) + "\n")
            if (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps:
                checkpoints.save(step + 1, network, optimizer)
            on_step(step + 1, value)
    return network


@nnx.jit
def evaluation_step(network: Network, metrics: nnx.MultiMetric, pictures: Pictures, labels: Labels) -> LossStats:
    """Feed the metrics with a batch, and return the statistics of its rows: one sweep over the logits serves both."""
    logits = network(pictures)
    _, stats = label_smoothed_cross_entropy_with_stats(logits, labels)
    metrics.update(stats=stats, logits=logits, labels=labels)
    return stats


def evaluate(network: Network, samples: Samples) -> tuple[Metrics, Predictions]:
    """Return the metrics of hands that are held out, and what the network says of each character."""
    metrics = nnx.MultiMetric(
        accuracy=Accuracy(), top_5=TopKAccuracy(5), nll=MeanNLL(), calibration_error=CalibrationError()
    )
    network.eval()  # the batch norms take what they have seen in training
    rows = [evaluation_step(network, metrics, *batch) for batch in test_batches(samples)]
    predictions = Predictions(
        samples.labels,
        np.concatenate([np.asarray(stats.prediction) for stats in rows]),
        np.concatenate([np.asarray(stats.confidence) for stats in rows]),
    )
    return {name: float(value) for name, value in metrics.compute().items()}, predictions


# --- The command line -----------------------------------------------------------------------------------------------

app = new_app()


@app.command()
def main(  # noqa: PLR0913, PLR0917 - the options of the command line
    loss: LossNames = tuple(LOSSES),
    steps: Steps = 3072,
    batch_size: BatchSize = 128,
    smoothing: Smoothing = 0.1,
    characters: Characters = 3755,
    seed: Seed = 0,
    fonts: Fonts = FOLDER,
    gnt: Gnt = None,
    keep_damaged: KeepDamaged = False,
    cache: Cache = CACHE,
    checkpoint_every: CheckpointEvery = 256,
    fresh: Fresh = False,
    output: RunFolder = Path("out/characters/jax"),
) -> None:
    """Train on Chinese characters in JAX, with six losses, going on where the runs in the output folder stopped.

    Tables show accuracy, nll and calibration error on fonts that are held out. Run `make fonts` first.
    """
    options = Options(tuple(loss), steps, batch_size, smoothing, characters, seed, checkpoint_every)
    sources = Sources(fonts, gnt, keep_damaged, cache)
    train_and_report(train, evaluate, options, sources, "JAX", output, fresh)


if __name__ == "__main__":
    app()
