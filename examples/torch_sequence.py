"""Tag the words of sentences of unequal length, in torch: padding, and batches that do not fit in memory.

    .venv/bin/python -m examples.torch_sequence --epochs 10 --microbatches 4

`where` takes padding out of the loss, its gradient and the metrics, so that the mean is over real words. The script
works through a batch in microbatches. These hold unequal numbers of words, so that the mean of their means is not the
mean of the batch: a word in a microbatch of short sentences counts for more. `denominator` corrects that: all
microbatches share one. The table shows the distance of both gradients from that of the whole batch: rounding with a
shared denominator, about half of the gradient's length with denominators of their own. (The taggers hardly differ
here, because short and long sentences come from the same grammar.)

The script prints a table and draws a plot. Sentences, table and plot are in sequence_common.py. The same in JAX:
jax_sequence.py, from the same weights on the same batches. The two tables differ by rounding only; with a shared
denominator the column "gradient off by" is itself the rounding, which each framework does in its own order.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float32, Int32
from torch import Tensor, nn

from examples.common import Metrics, PlotFolder, Smoothing, initial_weights, new_app
from examples.common_torch import adam, evaluate, set_weights
from examples.sequence_common import (
    PADDING,
    TAGS,
    WORDS,
    Epochs,
    Microbatches,
    Options,
    Run,
    Seed,
    Sentences,
    batches,
    compare,
    denominators,
    relative_error,
    split,
)
from lsce_torch import label_smoothed_cross_entropy

WIDTH, KERNEL = 32, 5
LEARNING_RATE = 2.0**-8


class Tagger(nn.Module):
    """Words to logits of tags; two convolutions see four words to either side."""

    def __init__(self, seed: int) -> None:
        """Make the layers, with weights from NumPy."""
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.hidden1 = nn.Conv1d(WIDTH, WIDTH, KERNEL, padding="same")
        self.hidden2 = nn.Conv1d(WIDTH, WIDTH, KERNEL, padding="same")
        self.output = nn.Linear(WIDTH, TAGS)
        set_weights(self, initial_weights(seed))

    def forward(self, words: Int32[Tensor, "N 40"]) -> Float32[Tensor, "N 40 6"]:
        """Return the logits."""
        # Padding is 0 in every layer, so that a sentence ends in the same way however much padding follows.
        real = (words != PADDING)[:, None]
        features = torch.where(real, self.embed(words).mT, 0)
        features = torch.where(real, nn.functional.silu(self.hidden1(features)), 0)
        return self.output(nn.functional.silu(self.hidden2(features)).mT)


Optimizer = torch.optim.Optimizer


def make_optimizer(tagger: Tagger) -> Optimizer:
    """Return Adam."""
    return adam(tagger.parameters(), LEARNING_RATE)


def tensors(data: Sentences) -> tuple[Int32[Tensor, "N 40"], Int32[Tensor, "N 40"]]:
    """Return words and tags as tensors."""
    return torch.from_numpy(data.words), torch.from_numpy(data.tags)


def mean_loss(
    tagger: Tagger, words: Tensor, tags: Tensor, smoothing: float, denominator: float | None = None
) -> Float32[Tensor, ""]:
    """Return the sum of the losses of real words over a denominator, by default their number."""
    return label_smoothed_cross_entropy(
        tagger(words), tags, smoothing=smoothing, where=words != PADDING, denominator=denominator
    )


def train_step(
    tagger: Tagger, words: Tensor, tags: Tensor, smoothing: float, denominator: float
) -> Float32[Tensor, ""]:
    """Add the gradient of a microbatch, and return the loss."""
    loss = mean_loss(tagger, words, tags, smoothing, denominator)
    loss.backward()
    return loss.detach()


def flat_gradient(
    tagger: Tagger, words: Tensor, tags: Tensor, smoothing: float, denominator: float | None = None
) -> Float32[Tensor, " weights"]:
    """Return the gradient as one vector."""
    loss = mean_loss(tagger, words, tags, smoothing, denominator)
    return nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(tagger.parameters())))


def gradient_error(tagger: Tagger, batch: Sentences, run: Run, microbatches: int) -> float:
    """Return how far the accumulated gradient is from that of the whole batch, relative to its length."""
    pieces = split(batch, microbatches)
    gradients = [
        flat_gradient(tagger, *tensors(piece), run.smoothing, denominator)
        for piece, denominator in zip(pieces, denominators(pieces, run.shared), strict=True)
    ]
    return relative_error(sum(gradients), flat_gradient(tagger, *tensors(batch), run.smoothing))


def train(sentences: Sentences, test: Sentences, run: Run, options: Options) -> Iterator[Metrics]:
    """Train a tagger. Add the gradient's error in the first batch of each epoch to the run, and yield test metrics."""
    tagger = Tagger(options.seed)
    optimizer = make_optimizer(tagger)
    for epoch in range(options.epochs):
        for step, batch in enumerate(batches(sentences, options.seed, epoch)):
            if step == 0:
                run.gradient_errors.append(gradient_error(tagger, batch, run, options.microbatches))
            pieces = split(batch, options.microbatches)
            optimizer.zero_grad()
            for piece, denominator in zip(pieces, denominators(pieces, run.shared), strict=True):
                train_step(tagger, *tensors(piece), run.smoothing, denominator)
            optimizer.step()
        yield evaluate(tagger, test.words, test.tags, test.real)


app = new_app()


@app.command()
def main(
    epochs: Epochs = 10,
    smoothing: Smoothing = 0.1,
    microbatches: Microbatches = 4,
    seed: Seed = 0,
    output: PlotFolder = Path("out/torch_sequence"),
) -> None:
    """Train taggers on made-up sentences in torch, accumulating gradients over microbatches.

    Three trainings: without smoothing, with smoothing, and with smoothing but each microbatch divided by its own number
    of words. The table and the plot show how far each one's accumulated gradient is from that of the whole batch, and
    the metrics of test sentences.
    """
    compare(train, Options(epochs, smoothing, microbatches, seed), "torch", output)


if __name__ == "__main__":
    app()
