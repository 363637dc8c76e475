"""The tasks of the study of smoothing: data, a network in Flax, and how it is trained and measured.

Every network gives the input of its last linear layer, and that layer's weight. So one loss serves all tasks, the last
layer and the loss in one, and a temperature divides what goes into it: the logits are never whole in memory.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple, Protocol

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Float32, Int
from rich.console import Console

from examples import common_jax, jax_lm, lm_common
from examples.characters import common as characters_common
from examples.characters import train_jax
from examples.common import batch_rows, initial_weights, read_digits
from examples.study.measures import fit_temperature, spread
from lsce_jax import LossStats, linear_label_smoothed_cross_entropy, linear_label_smoothed_cross_entropy_with_stats
from lsce_jax.metrics import Accuracy, CalibrationError, MeanNLL

EVALUATION_BATCH_SIZE = 256
DIGITS_BATCH_SIZE, CHARACTERS_BATCH_SIZE = 32, 64

Layer = tuple[Float[Array, "D K"], Float[Array, " K"] | None]


class Classifier(Protocol):
    """A Flax module that ends in a linear layer."""

    def eval(self) -> None:
        """Make it ready for rows that are not trained on."""

    def features(self, inputs: Array) -> Float[Array, "... D"]:
        """Return the input of the last layer."""

    def last_layer(self) -> Layer:
        """Return the weight of the last layer, and its bias if it has one."""


class Part(NamedTuple):
    """Some rows of the data: what goes into a network, and a class for each row of features that comes out."""

    inputs: np.ndarray
    labels: Int[np.ndarray, "..."]


class Data(NamedTuple):
    """The data of one seed.

    Args:
        train: what networks are trained on.
        calibration: what the temperature is fitted on.
        test: what is measured.
        batches: yields the batch of each step.
    """

    train: Part
    calibration: Part
    test: Part
    batches: Callable[[int], Iterator[Part]]


class Task(NamedTuple):
    """What to learn.

    Args:
        title: in tables and plots.
        data: takes a seed.
        network: takes a seed.
        steps: of a training.
        optimizer: the transformation, which is made once: `nnx.jit` would compile again for another one.
        clustered: whether the spread of the features within the classes is measured, and a plane of them drawn.
        drawn: three classes to draw, the first two of which are alike.
        names: what people call the classes that are drawn.
    """

    title: str
    data: Callable[[int], Data]
    network: Callable[[int], Classifier]
    steps: int
    optimizer: optax.GradientTransformation
    clustered: bool = True
    drawn: tuple[int, int, int] = (0, 1, 2)
    names: tuple[str, str, str] = ("0", "1", "2")


class Trained(NamedTuple):
    """What a trained network does: its features, the classes, and its last layer."""

    train: Part
    calibration: Part
    test: Part
    layer: Layer


# --- Training and measuring -----------------------------------------------------------------------------------------


@nnx.jit(static_argnames="convention")
def train_step(
    network: Classifier, optimizer: nnx.Optimizer, inputs: Array, labels: Array, smoothing: float, convention: str
) -> None:
    """Train on one batch. Another smoothing is no other program."""

    def loss_fn(network: Classifier) -> Float32[Array, ""]:
        weight, bias = network.last_layer()
        return linear_label_smoothed_cross_entropy(
            network.features(inputs),
            weight,
            labels,
            bias=bias,
            smoothing=smoothing,
            convention=convention,
            reduction="mean",
        )

    optimizer.update(network, nnx.grad(loss_fn)(network))


def train(task: Task, data: Data, seed: int, convention: str, smoothing: float) -> Classifier:
    """Return a trained network."""
    network = task.network(seed)
    optimizer = nnx.Optimizer(network, task.optimizer, wrt=nnx.Param)
    for inputs, labels in data.batches(task.steps):
        train_step(network, optimizer, inputs, labels, smoothing, convention)
    return network


@nnx.jit
def features_of(network: Classifier, inputs: Array) -> Float[Array, "... D"]:
    """Return the input of the last layer."""
    return network.features(inputs)


def look_at(network: Classifier, data: Data) -> Trained:
    """Return the features of all rows, in one dimension, and the last layer."""
    network.eval()  # batch norms take what they have seen in training

    def features(part: Part) -> Part:
        found = [np.asarray(features_of(network, inputs)) for inputs in in_batches(part.inputs)]
        whole = np.concatenate(found)
        return Part(whole.reshape(-1, whole.shape[-1]), part.labels.reshape(-1))

    return Trained(features(data.train), features(data.calibration), features(data.test), network.last_layer())


def in_batches(inputs: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the inputs in batches, the last of which may be smaller."""
    for start in range(0, len(inputs), EVALUATION_BATCH_SIZE):
        yield inputs[start : start + EVALUATION_BATCH_SIZE]


@jax.jit
def scaled_stats(layer: Layer, part: Part, temperature: float) -> LossStats:
    """Return the statistics of rows whose logits are divided by a temperature."""
    weight, bias = layer
    _, stats = linear_label_smoothed_cross_entropy_with_stats(
        part.inputs / temperature, weight, part.labels, bias=None if bias is None else bias / temperature
    )
    return stats


def metrics_of(stats: LossStats) -> dict[str, float]:
    """Return accuracy, nll and calibration error."""
    metrics = nnx.MultiMetric(accuracy=Accuracy(), nll=MeanNLL(), calibration_error=CalibrationError())
    metrics.update(stats=stats)
    return {name: float(value) for name, value in metrics.compute().items()}


def measure(task: Task, trained: Trained) -> dict[str, float]:
    """Return what the study measures of a network, by name."""

    def mean_nll(temperature: float) -> float:
        return float(scaled_stats(trained.layer, trained.calibration, temperature).nll.mean())

    temperature = fit_temperature(mean_nll)
    measures = metrics_of(scaled_stats(trained.layer, trained.test, 1.0)) | {"temperature": temperature}
    scaled = metrics_of(scaled_stats(trained.layer, trained.test, temperature))
    measures |= {f"scaled_{name}": scaled[name] for name in ("nll", "calibration_error")}
    if task.clustered:
        measures |= {f"{name}_spread": spread(*getattr(trained, name)) for name in ("train", "test")}
    return measures


# --- Digits ---------------------------------------------------------------------------------------------------------


class DigitsNetwork(common_jax.Network):
    """The network of the other examples, in two parts."""

    def features(self, images: Float[Array, "N 64"]) -> Float[Array, "N D"]:
        """Return the input of the last layer."""
        for layer in list(self.layers)[:-1]:
            images = nnx.silu(layer(images))
        return images

    def last_layer(self) -> Layer:
        """Return weight and bias of the last layer."""
        output = list(self.layers)[-1]
        return output.kernel[...], output.bias[...]


def digits_data(train_rows: int, mislabelled: int, seed: int) -> Data:
    """Return some digits to train on; half of the others are for the temperature and half for the test.

    Args:
        train_rows: how many are trained on.
        mislabelled: how many of these have the label of another digit, each with the same probability.
        seed: of what is random.
    """
    digits = read_digits(seed, test_size=1797 - train_rows)
    half = len(digits.test_labels) // 2
    random = np.random.default_rng([seed, 5])
    wrong = random.choice(train_rows, size=mislabelled, replace=False)
    labels = digits.train_labels.copy()
    labels[wrong] = (labels[wrong] + random.integers(1, 10, size=mislabelled)) % 10
    train = Part(digits.train_images, labels)

    def batches(steps: int) -> Iterator[Part]:
        for step in range(steps):
            rows = batch_rows(train_rows, DIGITS_BATCH_SIZE, seed, step)
            yield Part(train.inputs[rows], train.labels[rows])

    calibration = Part(digits.test_images[:half], digits.test_labels[:half])
    test = Part(digits.test_images[half:], digits.test_labels[half:])
    return Data(train, calibration, test, batches)


def digits_task(title: str, train_rows: int, epochs: int, mislabelled: int = 0) -> Task:
    """Return the task of learning some digits, some of which may have wrong labels."""
    return Task(
        title=title,
        data=lambda seed: digits_data(train_rows, mislabelled, seed),
        network=lambda seed: DigitsNetwork((128, 128), seed),
        steps=epochs * (train_rows // DIGITS_BATCH_SIZE),
        optimizer=common_jax.adamw(2.0**-9, weight_decay=2.0**-7),
        drawn=(4, 9, 0),
        names=("4", "9", "0"),
    )


# --- Characters -----------------------------------------------------------------------------------------------------


class CharacterNetwork(train_jax.Network):
    """The network of the 3755 characters, in two parts."""

    def last_layer(self) -> Layer:
        """Return weight and bias of the last layer."""
        return self.output.kernel[...], self.output.bias[...]


def characters_task(sources: characters_common.Sources, console: Console, characters: int, steps: int) -> Task:
    """Return the task of reading characters in fonts that the network has not seen.

    Fonts are drawn and distorted once. Half of the pictures in unseen fonts, taken at random, are for the temperature.

    Raises:
        typer.BadParameter: there are no fonts.
    """
    options = characters_common.Options(("none",), steps, CHARACTERS_BATCH_SIZE, 0.0, characters, seed=0)

    @cache
    def pictures() -> characters_common.Data:
        return characters_common.read_data(sources, options, console)

    def data(seed: int) -> Data:
        def batches(steps: int) -> Iterator[Part]:
            return (
                Part(*characters_common.training_batch(pictures(), options._replace(seed=seed), step))
                for step in range(steps)
            )

        unseen = pictures().tests["unseen fonts"]
        order = np.random.default_rng([seed, 3]).permutation(len(unseen))
        half = len(order) // 2
        seen = np.arange(len(pictures().train))
        return Data(
            Part(*pictures().train.batch(seen, 0)),
            Part(*unseen.batch(order[:half], 0)),
            Part(*unseen.batch(order[half:], 0)),
            batches,
        )

    return Task(
        title=f"{characters} characters in unseen fonts",
        data=data,
        network=lambda seed: CharacterNetwork(characters, initial_weights(seed)),
        steps=steps,
        optimizer=train_jax.make_transformation(steps),
        drawn=(2, 3, 13),  # 埃 and 挨 share their right half; 爱 is another character
        names=("U+57C3", "U+6328", "U+7231"),
    )


# --- Language -------------------------------------------------------------------------------------------------------


class LanguageModel(jax_lm.LanguageModel):
    """The model of the other examples, in two parts."""

    def features(self, tokens: Int[Array, "N T"]) -> Float[Array, "N T D"]:
        """Return the input of the last layer."""
        return self(tokens)

    def last_layer(self) -> Layer:
        """Return the embedding table, which is the weight of the last layer."""
        return self.embed.embedding[...].T, None


LM_VOCABULARY, LM_WIDTH, LM_BATCH_SIZE = 2048, 96, 16
LM_MEASURED = 64  # windows of each part


@cache
def _text() -> lm_common.Text:
    return lm_common.read_text(LM_VOCABULARY)


def language_data(seed: int) -> Data:
    """Return windows of text; those held out are for the temperature and for the test in turn."""
    text = _text()
    held_out = np.concatenate(list(lm_common.held_out_batches(text)))[: 2 * LM_MEASURED]
    starts = np.random.default_rng([seed, 2]).integers(len(text.train) - lm_common.CONTEXT, size=LM_MEASURED)
    seen = text.train[starts[:, None] + np.arange(lm_common.CONTEXT + 1)]

    def part(windows: lm_common.Windows) -> Part:
        return Part(windows[:, :-1], windows[:, 1:])

    def batches(steps: int) -> Iterator[Part]:
        options = lm_common.Options(steps, 0.0, text.vocabulary, LM_WIDTH, LM_BATCH_SIZE, None, seed)
        return map(part, lm_common.batches(text, options))

    return Data(part(seen), part(held_out[::2]), part(held_out[1::2]), batches)


def language_task(steps: int) -> Task:
    """Return the task of predicting the next token."""
    return Task(
        title=f"a language model, {LM_VOCABULARY} tokens",
        data=language_data,
        network=lambda seed: LanguageModel(lm_common.initial_weights(_text().vocabulary, LM_WIDTH, seed)),
        steps=steps,
        optimizer=jax_lm.ADAMW,
        clustered=False,
    )
