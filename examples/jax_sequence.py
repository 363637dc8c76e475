"""Tag the words of sentences of unequal length, in Flax and Optax: padding, and batches that do not fit in memory.

    .venv/bin/python -m examples.jax_sequence --epochs 10 --microbatches 4

`where` takes padding out of the loss, its gradient and the metrics, so that the mean is over real words. The script
works through a batch in microbatches. These hold unequal numbers of words, so that the mean of their means is not the
mean of the batch: a word in a microbatch of short sentences counts for more. `denominator` corrects that: all
microbatches share one. The table shows the distance of both gradients from that of the whole batch: rounding with a
shared denominator, about half of the gradient's length with denominators of their own. (The taggers hardly differ
here, because short and long sentences come from the same grammar.)

The script prints a table and draws a plot. Sentences, table and plot are in sequence_common.py. The same in torch:
torch_sequence.py, from the same weights on the same batches. The two tables differ by rounding only; with a shared
denominator the column "gradient off by" is itself the rounding, which each framework does in its own order.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float32, Int32

from examples.common import Metrics, PlotFolder, Smoothing, initial_weights, new_app
from examples.common_jax import adam, evaluate, set_weights
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
from lsce_jax import label_smoothed_cross_entropy

WIDTH, KERNEL = 32, 5
LEARNING_RATE = 2.0**-8


class Tagger(nnx.Module):
    """Words to logits of tags; two convolutions see four words to either side."""

    def __init__(self, seed: int) -> None:
        """Make the layers, with weights from NumPy."""
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.hidden1 = nnx.Conv(WIDTH, WIDTH, KERNEL, rngs=rngs)
        self.hidden2 = nnx.Conv(WIDTH, WIDTH, KERNEL, rngs=rngs)
        self.output = nnx.Linear(WIDTH, TAGS, rngs=rngs)
        set_weights(self, initial_weights(seed))

    def __call__(self, words: Int32[Array, "N 40"]) -> Float32[Array, "N 40 6"]:
        """Return the logits."""
        # Padding is 0 in every layer, so that a sentence ends in the same way however much padding follows.
        real = (words != PADDING)[..., None]
        features = jnp.where(real, self.embed(words), 0)
        features = jnp.where(real, nnx.silu(self.hidden1(features)), 0)
        return self.output(nnx.silu(self.hidden2(features)))


Optimizer = nnx.Optimizer[Tagger]


@cache  # `nnx.jit` would compile again for another one, even if it is equal
def make_optimizer(microbatches: int) -> optax.GradientTransformation:
    """Return Adam on the sum of the microbatches' gradients: it moves the weights after the last microbatch."""
    return optax.MultiSteps(adam(LEARNING_RATE), microbatches, use_grad_mean=False).gradient_transformation()


def mean_loss(
    tagger: Tagger, words: Array, tags: Array, smoothing: float, denominator: float | None = None
) -> Float32[Array, ""]:
    """Return the sum of the losses of real words over a denominator, by default their number."""
    return label_smoothed_cross_entropy(
        tagger(words), tags, smoothing=smoothing, where=words != PADDING, reduction="mean", denominator=denominator
    )


@nnx.jit
def train_step(
    tagger: Tagger, optimizer: Optimizer, words: Array, tags: Array, smoothing: float, denominator: float
) -> Float32[Array, ""]:
    """Add the gradient of a microbatch, move the weights after the last one, and return the loss."""
    loss, gradients = nnx.value_and_grad(mean_loss)(tagger, words, tags, smoothing, denominator)
    optimizer.update(tagger, gradients)
    return loss


@nnx.jit
def flat_gradient(
    tagger: Tagger, words: Array, tags: Array, smoothing: float, denominator: float | None = None
) -> Float32[Array, " weights"]:
    """Return the gradient as one vector."""
    return ravel_pytree(nnx.grad(mean_loss)(tagger, words, tags, smoothing, denominator))[0]


def gradient_error(tagger: Tagger, batch: Sentences, run: Run, microbatches: int) -> float:
    """Return how far the accumulated gradient is from that of the whole batch, relative to its length."""
    pieces = split(batch, microbatches)
    gradients = [
        flat_gradient(tagger, *piece, run.smoothing, denominator)
        for piece, denominator in zip(pieces, denominators(pieces, run.shared), strict=True)
    ]
    return relative_error(sum(gradients), flat_gradient(tagger, *batch, run.smoothing))


def train(sentences: Sentences, test: Sentences, run: Run, options: Options) -> Iterator[Metrics]:
    """Train a tagger. Add the gradient's error in the first batch of each epoch to the run, and yield test metrics."""
    tagger = Tagger(options.seed)
    optimizer = nnx.Optimizer(tagger, make_optimizer(options.microbatches), wrt=nnx.Param)
    for epoch in range(options.epochs):
        for step, batch in enumerate(batches(sentences, options.seed, epoch)):
            if step == 0:
                run.gradient_errors.append(gradient_error(tagger, batch, run, options.microbatches))
            pieces = split(batch, options.microbatches)
            for piece, denominator in zip(pieces, denominators(pieces, run.shared), strict=True):
                train_step(tagger, optimizer, *piece, run.smoothing, denominator)
        yield evaluate(tagger, test.words, test.tags, test.real)


app = new_app()


@app.command()
def main(
    epochs: Epochs = 10,
    smoothing: Smoothing = 0.1,
    microbatches: Microbatches = 4,
    seed: Seed = 0,
    output: PlotFolder = Path("out/jax_sequence"),
) -> None:
    """Train taggers on made-up sentences in JAX, accumulating gradients over microbatches.

    Three trainings: without smoothing, with smoothing, and with smoothing but each microbatch divided by its own number
    of words. The table and the plot show how far each one's accumulated gradient is from that of the whole batch, and
    the metrics of test sentences.
    """
    compare(train, Options(epochs, smoothing, microbatches, seed), "JAX", output)


if __name__ == "__main__":
    app()
