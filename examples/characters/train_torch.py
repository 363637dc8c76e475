"""Train on the 3755 Chinese characters of level 1 of GB 2312 in torch, and test on fonts never seen.

    make fonts
    .venv/bin/python -m examples.characters.train_torch

One small convolutional network for each of six losses: without smoothing, with each of the four conventions, `clamp` of
which is `CELossWithLabelSmoothing`, the module that this library started from; and `linear`, which is `uniform` with
the last layer in the loss, so that the logits of 3755 characters are never whole in memory. The characters are drawn
from open fonts and distorted; four fonts are held out. `--gnt FOLDER` adds handwriting from CASIA-HWDB.

The tables show accuracy, nll and calibration on the fonts that are held out. Each run survives `kill -9`: the same
command goes on from the last checkpoint, and ends with the same weights to the last bit, as in torch_digits.py, on the
same machine with as many cores. Fonts are in fonts.py, pictures in images.py, tables in common.py.

The same in JAX: train_jax.py, from the same weights on the same batches. report.py shows both on one page and
says whether they agree.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int32
from torch import Tensor, nn
from torchmetrics import MetricCollection

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
from examples.common_torch import adam, set_weights
from examples.digits_common import keep_losses
from examples.torch_digits import Checkpoints
from lsce_torch import (
    CELossWithLabelSmoothing,
    LossStats,
    label_smoothed_cross_entropy,
    label_smoothed_cross_entropy_with_stats,
    linear_label_smoothed_cross_entropy,
)
from lsce_torch.metrics import Accuracy, CalibrationError, MeanNLL, TopKAccuracy

Pictures = Float32[Tensor, "N 32 32"]
Labels = Int32[Tensor, " N"]


class BatchNorm(nn.BatchNorm2d):
    """A batch norm whose running variance is that of the batches, as in Flax. torch's own is larger by n / (n - 1)."""

    def __init__(self, width: int) -> None:
        """Start with the mean 0 and the variance 1."""
        super().__init__(width, eps=NORM_EPSILON, momentum=NORM_SHARE)

    def forward(self, values: Float32[Tensor, "N C *sides"]) -> Float32[Tensor, "N C *sides"]:
        """Return normalized values."""
        if not self.training:
            return nn.functional.batch_norm(
                values, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        with torch.no_grad():
            variance, mean = torch.var_mean(values, [0, *range(2, values.ndim)], correction=0)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
        return nn.functional.batch_norm(values, None, None, self.weight, self.bias, training=True, eps=self.eps)


class Network(nn.Module):
    """Pictures to logits: convolutions, a layer of features, and the last layer, which the linear loss takes over."""

    def __init__(self, characters: int, weight_of: WeightOf) -> None:
        """Make the layers, with weights by their names."""
        super().__init__()
        shapes = zip((1, *WIDTHS[:-1]), WIDTHS, STRIDES, strict=True)
        conv = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
        self.convs = nn.ModuleList(conv(i, o, stride=stride) for i, o, stride in shapes)
        self.norms = nn.ModuleList(BatchNorm(width) for width in WIDTHS)
        self.hidden = nn.Linear(SIDE * SIDE * WIDTHS[-1], FEATURES, bias=False)
        self.norm = BatchNorm(FEATURES)
        self.output = nn.Linear(FEATURES, characters)
        set_weights(self, weight_of)

    def features(self, pictures: Pictures) -> Float32[Tensor, "N D"]:
        """Return the input of the last layer."""
        # Channels are last in memory, which is faster here.
        maps = pictures[:, None].contiguous(memory_format=torch.channels_last)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            maps = nn.functional.silu(norm(conv(maps)))
        # Flax's order: rows, columns, channels.
        return self.norm(self.hidden(maps.permute(0, 2, 3, 1).reshape(len(maps), -1)))

    def forward(self, pictures: Pictures) -> Float32[Tensor, "N K"]:
        """Return the logits."""
        return self.output(self.features(pictures))


# --- Losses ---------------------------------------------------------------------------------------------------------

Optimizer = torch.optim.Optimizer
LossFn = Callable[[Network, Pictures, Labels], Float32[Tensor, ""]]


def dense_loss(network: Network, pictures: Pictures, labels: Labels, smoothing: float, convention: str) -> Tensor:
    """Return the mean loss of the logits."""
    return label_smoothed_cross_entropy(network(pictures), labels, smoothing=smoothing, convention=convention)


def module_loss(network: Network, pictures: Pictures, labels: Labels, module: CELossWithLabelSmoothing) -> Tensor:
    """Return the mean loss of the logits, by a module."""
    return module(network(pictures), labels)


def linear_loss(network: Network, pictures: Pictures, labels: Labels, smoothing: float) -> Tensor:
    """Return the mean loss of the features, computed with the last layer."""
    layer = network.output
    return linear_label_smoothed_cross_entropy(
        network.features(pictures), layer.weight, labels, bias=layer.bias, smoothing=smoothing
    )


def make_loss(loss: str, smoothing: float, characters: int) -> LossFn:
    """Return a loss by its name."""
    if loss == "clamp":
        return partial(module_loss, module=CELossWithLabelSmoothing(smoothing, characters))
    if loss == "linear":
        return partial(linear_loss, smoothing=smoothing)
    smoothing, convention = (0.0, "uniform") if loss == "none" else (smoothing, loss)
    return partial(dense_loss, smoothing=smoothing, convention=convention)


# --- Training -------------------------------------------------------------------------------------------------------


def make_optimizer(network: Network, steps: int) -> Optimizer:
    """Return Adam, which `train_step` gives the learning rate of each step."""
    return adam(network.parameters(), lr=float(learning_rates(steps)[0]), eps=EPSILON)


def train_step(
    network: Network, optimizer: Optimizer, pictures: Tensor, labels: Tensor, loss_fn: LossFn, rate: float
) -> Float32[Tensor, ""]:
    """Train on one batch, and return its loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = loss_fn(network, pictures, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def train_steps(
    network: Network, optimizer: Optimizer, loss: str, data: Data, options: Options, steps: range
) -> Iterator[tuple[int, float]]:
    """Train on the batches of some steps; yield each step with its loss."""
    loss_fn, rates = make_loss(loss, options.smoothing, options.characters), learning_rates(options.steps)
    for step in steps:
        pictures, labels = map(torch.from_numpy, training_batch(data, options, step))
        yield step, train_step(network, optimizer, pictures, labels, loss_fn, float(rates[step])).item()


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


@torch.no_grad()
def evaluation_step(network: Network, metrics: MetricCollection, pictures: Tensor, labels: Tensor) -> LossStats:
    """Feed the metrics with a batch, and return the statistics of its rows: one sweep over the logits serves both."""
    logits = network(pictures)
    _, stats = label_smoothed_cross_entropy_with_stats(logits, labels)
    metrics.update(stats=stats, logits=logits, labels=labels)
    return stats


def evaluate(network: Network, samples: Samples) -> tuple[Metrics, Predictions]:
    """Return the metrics of hands that are held out, and what the network says of each character."""
    metrics = MetricCollection(
        {
            "accuracy": Accuracy(),
            "top_5": TopKAccuracy(5),
            "nll": MeanNLL(),
            "calibration_error": CalibrationError(),
        }
    )
    network.eval()  # the batch norms take what they have seen in training
    rows = [evaluation_step(network, metrics, *map(torch.from_numpy, batch)) for batch in test_batches(samples)]
    predictions = Predictions(
        samples.labels,
        torch.cat([stats.prediction for stats in rows]).numpy().astype(np.int32),
        torch.cat([stats.confidence for stats in rows]).numpy(),
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
    output: RunFolder = Path("out/characters/torch"),
) -> None:
    """Train on Chinese characters in torch, with six losses, going on where the runs in the output folder stopped.

    Tables show accuracy, nll and calibration error on fonts that are held out. Run `make fonts` first.
    """
    options = Options(tuple(loss), steps, batch_size, smoothing, characters, seed, checkpoint_every)
    sources = Sources(fonts, gnt, keep_damaged, cache)
    train_and_report(train, evaluate, options, sources, "torch", output, fresh)


if __name__ == "__main__":
    app()
