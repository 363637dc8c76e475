"""Named, seeded cases of a linear layer and the loss, and what they should give.

The logits are made from the exact bits of the layer at 50 digits. Rounded to float64 they are those of a `Case` of the
loss, so its oracle gives the loss and the gradient of the logits; the gradients of the layer are exact sums of those.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mpmath
import numpy as np

from parity_tests.truth.cases import Case
from parity_tests.truth.oracle import DIGITS, Exact, Truth, solve
from parity_tests.truth.precision import FloatArray, compute_dtype, round_to

PARTS = ("loss", "hidden", "weight", "bias")


@dataclass(frozen=True)
class LinearCase:
    """Inputs and options of one call.

    Args:
        name: what reports call it.
        hidden: float64 array [..., D] of numbers of the dtype of the loss's case.
        weight: float64 array [D, K] of numbers of `weight_dtype`.
        weight_dtype: of the weight and the bias.
        bias: K numbers, or None.
        loss: the case of the loss. Its logits are the true ones, rounded to float64, and no numbers of its dtype.
        chunk_size: one that leaves the last chunk partly empty, where there are rows enough.
    """

    name: str
    hidden: FloatArray
    weight: FloatArray
    weight_dtype: str
    bias: FloatArray | None
    loss: Case
    chunk_size: int

    @property
    def dtype(self) -> str:
        """Name of the dtype that is multiplied in."""
        return self.loss.dtype

    @property
    def multiplied_weight(self) -> FloatArray:
        """The weight in the dtype that it is multiplied in."""
        return round_to(self.weight, self.dtype)

    def rows(self) -> FloatArray:
        """Return hidden as [N, D]."""
        return self.hidden.reshape(-1, self.hidden.shape[-1])


@dataclass(frozen=True)
class LinearTruth:
    """What a case should give: the parts by name, hidden's rows flattened, and the truth about the loss."""

    parts: dict[str, Exact]
    loss: Truth


def solve_linear(case: LinearCase) -> LinearTruth:
    """Return the truth about a case."""
    truth = solve(case.loss)
    # What a row holds that does not count reaches no gradient.
    hidden = np.where(truth.counted[:, None], case.rows(), 0.0)
    num_classes = case.weight.shape[1]
    with mpmath.workdps(DIGITS):
        halves = zip(truth.gradient.high.tolist(), truth.gradient.low.tolist(), strict=True)
        gradient = [[mpmath.mpf(high) + mpmath.mpf(low) for high, low in zip(*rows, strict=True)] for rows in halves]
        of_classes = [[row[k] for row in gradient] for k in range(num_classes)]
        parts = {
            "loss": truth.loss,
            "hidden": _products(gradient, case.multiplied_weight.tolist(), case.hidden.shape[-1]),
            "weight": _products(hidden.T.tolist(), of_classes, num_classes),
        }
        if case.bias is not None:
            sums = _products([[1.0] * len(hidden)], of_classes, num_classes)
            parts["bias"] = Exact(sums.high[0], sums.low[0])
    return LinearTruth(parts, truth)


def true_logits(hidden: FloatArray, weight: FloatArray, bias: FloatArray | None) -> FloatArray:
    """Return hidden @ weight + bias, each rounded once, to float64."""
    extended = hidden if bias is None else np.concatenate([hidden, np.ones((len(hidden), 1))], axis=-1)
    columns = weight if bias is None else np.concatenate([weight, bias[None]], axis=0)
    with mpmath.workdps(DIGITS):
        return _products(extended.tolist(), columns.T.tolist(), columns.shape[1]).high


def _products(rows: list[list[Any]], columns: list[list[Any]], num_columns: int) -> Exact:
    """Return the inner product of each row with each column."""
    products = [[mpmath.fdot(row, column) for column in columns] for row in rows]
    high = np.array([[float(v) for v in row] for row in products], np.float64).reshape(len(rows), num_columns)
    low = [
        [float(v - h) if np.isfinite(h) else 0.0 for v, h in zip(*pair, strict=True)]
        for pair in zip(products, high.tolist(), strict=True)
    ]
    return Exact(high, np.array(low, np.float64).reshape(len(rows), num_columns))


Builder = Callable[[str, np.random.Generator], LinearCase]
_BUILDERS: dict[str, Builder] = {}


def linear_case_names() -> list[str]:
    """Return the names of all cases."""
    return list(_BUILDERS)


def make_linear_case(name: str, dtype: str) -> LinearCase:
    """Return the case of that name for `hidden` of `dtype`, the same each time."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return replace(_BUILDERS[name](dtype, generator), name=name)


def _case(builder: Builder) -> Builder:
    _BUILDERS[builder.__name__.strip("_")] = builder
    return builder


def _layer(
    dtype: str,
    generator: np.random.Generator,
    *,
    batch_shape: tuple[int, ...] = (7,),
    num_features: int = 5,
    num_classes: int = 11,
    with_bias: bool = True,
    offset: float = 0.0,
    master: bool = False,
    chunk_size: int = 3,
    trained: bool = False,
    **fields: Any,
) -> LinearCase:
    """Return a case of normal features, weight and bias.

    Args:
        dtype: of hidden.
        generator: of the numbers.
        batch_shape: shape of the losses.
        num_features: D.
        num_classes: K.
        with_bias: whether there is one.
        offset: what is added to it.
        master: whether the weight is in float32 where hidden is narrower.
        chunk_size: see `LinearCase`.
        trained: whether each row points to the column of one class, most often the label's.
        fields: of the case of the loss; `hidden` and `weight` replace what is drawn here.
    """
    weight_dtype = compute_dtype(dtype) if master else dtype
    labels = fields.pop("labels", generator.integers(num_classes, size=batch_shape))
    weight = generator.normal(size=(num_features, num_classes)) * 1.5 / np.sqrt(num_features)
    bias = generator.normal(size=num_classes) + offset
    hidden = generator.normal(size=(*batch_shape, num_features))
    if trained:
        at = np.where(generator.random(batch_shape) < 0.3, (labels + 1) % num_classes, labels)
        hidden = 0.3 * hidden + 5 * np.moveaxis(weight[:, at], 0, -1)
    hidden, weight = fields.pop("hidden", hidden), fields.pop("weight", weight)
    hidden, weight, bias = (
        round_to(array, of) for array, of in ((hidden, dtype), (weight, weight_dtype), (bias, weight_dtype))
    )
    given_bias = bias if with_bias else None
    logits = true_logits(hidden.reshape(-1, num_features), round_to(weight, dtype), given_bias)
    loss = Case("", dtype, logits.reshape(*batch_shape, num_classes), labels, **fields)
    return LinearCase("", hidden, weight, weight_dtype, given_bias, loss, chunk_size)


def _upstream(dtype: str, generator: np.random.Generator, shape: tuple[int, ...] = (7,)) -> FloatArray:
    return round_to(generator.uniform(-2, 2, shape), compute_dtype(dtype))


def _weights(dtype: str, generator: np.random.Generator) -> FloatArray:
    return round_to(generator.uniform(0.25, 4, 11), compute_dtype(dtype))


@_case
def _none(dtype: str, generator: np.random.Generator) -> LinearCase:
    return _layer(dtype, generator, upstream=_upstream(dtype, generator))


@_case
def _mean(dtype: str, generator: np.random.Generator) -> LinearCase:
    return _layer(dtype, generator, with_bias=False, options={"reduction": "mean"})


@_case
def _sum(dtype: str, generator: np.random.Generator) -> LinearCase:
    """With an upstream gradient of its own, like the scale of a loss in float16."""
    return _layer(dtype, generator, options={"reduction": "sum"}, upstream=np.asarray(12.0))


@_case
def _unsmoothed(dtype: str, generator: np.random.Generator) -> LinearCase:
    return _layer(dtype, generator, smoothing=0.0, options={"reduction": "mean"})


@_case
def _master_weight_none(dtype: str, generator: np.random.Generator) -> LinearCase:
    """A float32 weight, multiplied in the dtype of hidden, whose gradient is to be added up in float32."""
    return _layer(dtype, generator, master=True, upstream=_upstream(dtype, generator))


@_case
def _master_weight_mean(dtype: str, generator: np.random.Generator) -> LinearCase:
    return _layer(dtype, generator, master=True, options={"reduction": "mean"})


@_case
def _many_chunks(dtype: str, generator: np.random.Generator) -> LinearCase:
    """A large term, and so many small ones that a sum in bfloat16 does not see, one chunk each."""
    hidden = generator.uniform(0.5, 1.0, (48, 2))
    hidden[0] *= 512
    return _layer(
        dtype,
        generator,
        batch_shape=(48,),
        num_features=2,
        num_classes=3,
        master=True,
        chunk_size=1,
        hidden=hidden,
        weight=generator.normal(size=(2, 3)) / 512,
        labels=np.zeros(48, np.int64),
        options={"reduction": "sum"},
    )


@_case
def _many_chunks_none(dtype: str, generator: np.random.Generator) -> LinearCase:
    """The same, of losses of single rows."""
    case = _many_chunks(dtype, generator)
    weight, bias = round_to(case.weight, dtype), round_to(np.asarray(case.bias), dtype)
    loss = replace(case.loss, logits=true_logits(case.hidden, weight, bias), options={})
    return replace(case, weight=weight, bias=bias, weight_dtype=dtype, loss=loss)


@_case
def _trained(dtype: str, generator: np.random.Generator) -> LinearCase:
    """Most labels' logits far above the rest: small losses, and gradients that nearly cancel."""
    return _layer(dtype, generator, num_features=16, trained=True, options={"reduction": "mean"})


@_case
def _smoothing_per_row(dtype: str, generator: np.random.Generator) -> LinearCase:
    smoothing = round_to(np.array([0.0, 0.05, 0.1, 0.5, 0.9, 1.0, 0.3]), compute_dtype(dtype))
    upstream = _upstream(dtype, generator)
    return _layer(dtype, generator, smoothing=smoothing, upstream=upstream, options={"convention": "clamp"})


def _with_ignored(dtype: str, generator: np.random.Generator) -> dict[str, Any]:
    """Return features that are NaN or infinite in the rows that a mask takes out, and labels that are no classes."""
    hidden = round_to(generator.normal(size=(7, 5)), dtype)
    hidden[1], hidden[4, 2] = np.nan, np.inf
    labels = np.array([3, 9999, 0, 10, -5, 7, 2])
    return {"hidden": hidden, "labels": labels, "where": ~np.isin(np.arange(7), [1, 4])}


@_case
def _where_none(dtype: str, generator: np.random.Generator) -> LinearCase:
    ignored = _with_ignored(dtype, generator)
    return _layer(dtype, generator, **ignored, upstream=_upstream(dtype, generator))


@_case
def _where_mean(dtype: str, generator: np.random.Generator) -> LinearCase:
    return _layer(dtype, generator, **_with_ignored(dtype, generator), options={"reduction": "mean"})


@_case
def _class_weight(dtype: str, generator: np.random.Generator) -> LinearCase:
    options = {"reduction": "mean", "ignore_index": -100}
    labels = np.array([3, -100, 0, 10, 5, -100, 2])
    return _layer(dtype, generator, labels=labels, class_weight=_weights(dtype, generator), options=options)


@_case
def _all_ignored(dtype: str, generator: np.random.Generator) -> LinearCase:
    options = {"reduction": "mean", "ignore_index": 3}
    return _layer(dtype, generator, labels=np.full(7, 3), options=options)


@_case
def _class_mask(dtype: str, generator: np.random.Generator) -> LinearCase:
    """A padded vocabulary whose padding has the largest logits."""
    mask = np.arange(11) < 8
    weight = generator.normal(size=(5, 11))
    weight[:, 8:] *= 100
    options = {"reduction": "mean", "convention": "non_target"}
    return _layer(
        dtype, generator, labels=generator.integers(8, size=7), weight=weight, class_mask=mask, options=options
    )


@_case
def _prior(dtype: str, generator: np.random.Generator) -> LinearCase:
    counts = generator.integers(1, 50, 11)
    prior = round_to(counts / counts.sum(), compute_dtype(dtype))
    return _layer(dtype, generator, prior=prior, smoothing=0.4, options={"reduction": "mean"})


@_case
def _z_loss(dtype: str, generator: np.random.Generator) -> LinearCase:
    return _layer(dtype, generator, offset=2.0, options={"reduction": "mean", "z_loss": 0.01})


@_case
def _softcap(dtype: str, generator: np.random.Generator) -> LinearCase:
    return _layer(dtype, generator, options={"softcap": 2.0}, upstream=_upstream(dtype, generator))


@_case
def _max_sup(dtype: str, generator: np.random.Generator) -> LinearCase:
    """The largest logits are far enough above the rest to stay the largest when they are rounded."""
    return _layer(
        dtype, generator, num_features=16, trained=True, options={"reduction": "mean", "convention": "max_sup"}
    )


@_case
def _everything(dtype: str, generator: np.random.Generator) -> LinearCase:
    options = {
        "convention": "non_target",
        "z_loss": 0.001,
        "softcap": 8.0,
        "subtract_entropy": True,
        "ignore_index": 0,
        "reduction": "mean",
        "denominator": 5.0,
    }
    ignored = _with_ignored(dtype, generator)
    ignored["labels"] = np.array([3, 9999, 0, 10, -5, 6, 2])
    return _layer(
        dtype,
        generator,
        **ignored,
        class_mask=np.arange(11) != 7,
        class_weight=_weights(dtype, generator),
        smoothing=round_to(generator.uniform(0, 1, 7), compute_dtype(dtype)),
        upstream=np.asarray(3.0),
        master=True,
        options=options,
    )


@_case
def _bad_labels(dtype: str, generator: np.random.Generator) -> LinearCase:
    """Labels that are no class: NaN in their rows, and in the gradient of the weight."""
    return _layer(dtype, generator, labels=np.array([0, -1, 5, 11, 2, 10, 3]))


@_case
def _bias_offset(dtype: str, generator: np.random.Generator) -> LinearCase:
    """Close logits far from 0, as far as the dtype of the logits still tells them apart."""
    offset = {"float64": 1e6, "float32": 1e3, "bfloat16": 16.0, "float16": 64.0}[dtype]
    return _layer(dtype, generator, offset=offset, options={"reduction": "mean"})


@_case
def _square(dtype: str, generator: np.random.Generator) -> LinearCase:
    """As many features and rows as classes: what is transposed or taken for another by mistake fits."""
    return _layer(dtype, generator, batch_shape=(11,), num_features=11, options={"reduction": "mean"})


@_case
def _one_class(dtype: str, generator: np.random.Generator) -> LinearCase:
    options = {"reduction": "mean", "z_loss": 0.1}
    return _layer(dtype, generator, num_classes=1, options=options)


@_case
def _two_classes(dtype: str, generator: np.random.Generator) -> LinearCase:
    return _layer(dtype, generator, num_classes=2, num_features=1, upstream=_upstream(dtype, generator))


@_case
def _one_row(dtype: str, generator: np.random.Generator) -> LinearCase:
    return _layer(dtype, generator, batch_shape=(1,), options={"reduction": "mean"})


@_case
def _no_rows(dtype: str, generator: np.random.Generator) -> LinearCase:
    return _layer(dtype, generator, batch_shape=(0,), options={"reduction": "mean"})


@_case
def _no_batch(dtype: str, generator: np.random.Generator) -> LinearCase:
    return _layer(dtype, generator, batch_shape=(), options={"reduction": "mean"})


@_case
def _batch_of_sequences(dtype: str, generator: np.random.Generator) -> LinearCase:
    where = np.array([[True, True, False], [True, False, True]])
    upstream = _upstream(dtype, generator, (2, 3))
    smoothing = round_to(generator.uniform(0, 0.5, (2, 1)), compute_dtype(dtype))
    return _layer(
        dtype, generator, batch_shape=(2, 3), where=where, upstream=upstream, smoothing=smoothing, chunk_size=4
    )
