"""Named, seeded cases of the linear loss: a linear layer and the loss in one."""

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from parity_tests.truth.cases import Case, LinearCase, case_names, make_case
from parity_tests.truth.oracle import true_logits
from parity_tests.truth.precision import FloatArray, compute_dtype, round_to

Builder = Callable[[str, np.random.Generator], LinearCase]
_BUILDERS: dict[str, Builder] = {}
PREFIX = "linear_"
# Together they have every option and each dtype of the weight. JAX compiles each for most of a second.
SOME = tuple(
    PREFIX + name
    for name in (
        "sum",
        "master_weight_none",
        "master_weight_mean",
        "where_mean",
        "max_sup",
        "everything",
        "bias_offset",
    )
)


def linear_case_names() -> list[str]:
    """Return the names of all linear cases."""
    return list(_BUILDERS)


def all_case_names() -> list[str]:
    """Return the names of all cases, of the dense loss and of the linear one."""
    return [*case_names(), *linear_case_names()]


def default_case_names() -> list[str]:
    """Return the names of the cases to take by default: all dense ones, and some linear ones, which compile slowly."""
    return [*case_names(), *(PREFIX + name for name in ("master_weight_none", "everything"))]


def make_linear_case(name: str, dtype: str) -> LinearCase:
    """Return the linear case of that name for `hidden` of `dtype`, the same each time."""
    generator = np.random.default_rng(zlib.crc32(name.removeprefix(PREFIX).encode()))
    return replace(_BUILDERS[name](dtype, generator), name=name)


def make_any_case(name: str, dtype: str) -> Case:
    """Return the case of that name, of the dense loss or of the linear one."""
    return make_linear_case(name, dtype) if name in _BUILDERS else make_case(name, dtype)


def _case(builder: Builder) -> Builder:
    _BUILDERS[PREFIX + builder.__name__.strip("_")] = builder
    return builder


def _layer(  # noqa: PLR0913 - each has a default
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
        fields: of the case; `hidden` and `weight` replace what is drawn here.
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
    layer: dict[str, Any] = {
        "hidden": hidden,
        "weight": weight,
        "bias": bias if with_bias else None,
        "weight_dtype": weight_dtype,
    }
    case = LinearCase("", dtype, np.zeros(()), labels, chunk_size=chunk_size, **layer, **fields)
    return with_logits(case)


def with_logits(case: LinearCase) -> LinearCase:
    """Return a case with the logits of its hidden, weight and bias."""
    return replace(case, logits=true_logits(case.hidden, case.multiplied_weight, case.bias))


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
    return with_logits(replace(case, weight=weight, bias=bias, weight_dtype=dtype, options={}))


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
def _class_mask_of_rows(dtype: str, generator: np.random.Generator) -> LinearCase:
    """A mask for each row: none where a row does not count, one class, all classes."""
    mask, labels = generator.random((7, 11)) < 0.6, generator.integers(11, size=7)
    mask[np.arange(7), labels] = True
    mask[1], mask[4], mask[6] = False, np.arange(11) == labels[4], True
    labels[1] = -100
    options = {"reduction": "mean", "ignore_index": -100, "z_loss": 0.01}
    return _layer(
        dtype, generator, labels=labels, class_mask=mask, class_weight=_weights(dtype, generator), options=options
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
