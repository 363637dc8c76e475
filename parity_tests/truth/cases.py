"""Named, seeded cases with the traps that random normals hide.

A case holds its inputs as float64 arrays whose values are numbers of its dtype, so every framework and the oracle get
the same bits.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity_tests.truth.precision import FloatArray, compute_dtype, round_to


class Rows(NamedTuple):
    """A case with its classes last and its rows flattened.

    Logits and the allowed classes are [N, K], labels [N] or [N, K], the others [N].
    """

    logits: FloatArray
    allowed: NDArray[np.bool_]
    labels: NDArray[Any]
    smoothing: FloatArray
    counted: NDArray[np.bool_]
    upstream: FloatArray


@dataclass(frozen=True)
class Case:
    """Inputs and options of one call.

    Args:
        name: what the reports call it.
        dtype: of the logits and soft labels.
        logits: float64 array of numbers of that dtype, classes at `axis`.
        labels: integers, or float64 probabilities.
        options: keyword arguments of `label_smoothed_cross_entropy` that are no arrays.
        smoothing: number, or an array that broadcasts to the losses.
        axis: where the classes are.
        where, class_weight, prior: arrays, or None.
        class_mask: [K], or an array with the dimensions of the logits that broadcasts to them; or None.
        upstream: what the losses are multiplied with before the gradient is taken; None for 1.
        keywords: further arrays that a user's loss takes by these names; no true values are known with any.
    """

    name: str
    dtype: str
    logits: FloatArray
    labels: NDArray[Any]
    options: dict[str, Any] = field(default_factory=dict)
    smoothing: float | FloatArray = 0.1
    axis: int = -1
    where: NDArray[np.bool_] | None = None
    class_weight: FloatArray | None = None
    class_mask: NDArray[np.bool_] | None = None
    prior: FloatArray | None = None
    upstream: FloatArray | None = None
    keywords: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.logits.shape[self.axis])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the losses."""
        return np.moveaxis(self.logits, self.axis, -1).shape[:-1]

    def rows(self) -> Rows:
        """Return the case with its classes last and its rows flattened."""
        return self._rows

    @property
    def result_dtypes(self) -> dict[str, str]:
        """The dtype of each part of the result: the loss, and the gradient with respect to the logits."""
        return {"loss": compute_dtype(self.dtype), "gradient": self.dtype}

    @cached_property
    def _rows(self) -> Rows:
        batch_shape, num_classes = self.batch_shape, self.num_classes
        num_rows = int(np.prod(batch_shape))

        def flat(values: Any) -> NDArray[Any]:
            return np.broadcast_to(np.asarray(values), batch_shape).reshape(num_rows)

        counted = flat(True if self.where is None else self.where)
        soft = self.labels.dtype.kind == "f"
        labels = np.moveaxis(self.labels, self.axis, -1).reshape(num_rows, -1) if soft else flat(self.labels)
        if self.options.get("ignore_index") is not None:
            counted = counted & (labels != self.options["ignore_index"])
        return Rows(
            logits=np.moveaxis(self.logits, self.axis, -1).reshape(num_rows, num_classes),
            allowed=self._allowed().reshape(num_rows, num_classes),
            labels=labels,
            smoothing=flat(self.smoothing).astype(np.float64),
            counted=counted,
            upstream=flat(1.0 if self.upstream is None else self.upstream).astype(np.float64),
        )

    @property
    def has_row_masks(self) -> bool:
        """Whether rows have class masks of their own."""
        return self.class_mask is not None and self.class_mask.shape != (self.num_classes,)

    def _allowed(self) -> NDArray[np.bool_]:
        mask = np.ones(self.num_classes, bool) if self.class_mask is None else self.class_mask
        if self.has_row_masks:
            mask = np.moveaxis(mask, self.axis, -1)
        return np.broadcast_to(mask, (*self.batch_shape, self.num_classes))


@dataclass(frozen=True, kw_only=True)
class LinearCase(Case):
    """A call of the linear loss. Its `logits` are the exact ones, rounded to float64; an adapter never sees them.

    Args:
        hidden: float64 array [..., D] of numbers of `dtype`, which is the dtype to multiply in.
        weight: float64 array [D, K] of numbers of `weight_dtype`.
        weight_dtype: of the weight and the bias.
        bias: K numbers, or None.
        chunk_size: one that leaves the last chunk partly empty, where there are rows enough; None to choose none.
    """

    hidden: FloatArray
    weight: FloatArray
    weight_dtype: str
    bias: FloatArray | None = None
    chunk_size: int | None = None

    @property
    def multiplied_weight(self) -> FloatArray:
        """The weight in the dtype that it is multiplied in."""
        return round_to(self.weight, self.dtype)

    @property
    def hidden_rows(self) -> FloatArray:
        """`hidden` as [N, D]."""
        return self.hidden.reshape(-1, self.hidden.shape[-1])

    @property
    def result_dtypes(self) -> dict[str, str]:
        """The dtype of each part of the result: the loss, and the gradient with respect to each operand."""
        bias = {} if self.bias is None else {"bias": self.weight_dtype}
        return {"loss": compute_dtype(self.dtype), "hidden": self.dtype, "weight": self.weight_dtype, **bias}


def features(case: Case) -> frozenset[str]:
    """Return what a case asks of a loss beyond integer labels, one smoothing for all, "uniform" and classes last.

    The names are those of the options of `label_smoothed_cross_entropy` where there is one, and "CONVENTION
    convention", "soft labels", "class_mask per row", "smoothing per row", "bad labels" (a row that counts has a label
    that is no class), "axis", "no batch" (logits [K]) and "narrow labels" (an integer dtype other than int64).
    """
    options, rows = case.options, case.rows()
    arrays = ("where", "class_weight", "class_mask", "prior")
    found = {name for name in arrays if getattr(case, name) is not None}
    found |= {name for name in ("ignore_index", "softcap", "denominator") if options.get(name) is not None}
    found |= {name for name in ("z_loss", "subtract_entropy") if options.get(name)}
    soft = case.labels.dtype.kind == "f"
    outside = np.zeros(len(rows.labels), bool) if soft else ~is_class(rows)
    special = {
        f"{options.get('convention')} convention": options.get("convention", "uniform") != "uniform",
        "soft labels": soft,
        "class_mask per row": case.has_row_masks,
        "smoothing per row": not isinstance(case.smoothing, float),
        "bad labels": bool(np.any(rows.counted & outside)),
        "axis": case.axis not in (-1, case.logits.ndim - 1),
        "no batch": case.logits.ndim == 1,
        "narrow labels": not soft and case.labels.dtype != np.int64,
    }
    return frozenset(found | {name for name, present in special.items() if present})


def is_class(rows: Rows) -> NDArray[np.bool_]:
    """Return [N]: whether the label of a row is one of its classes."""
    inside = (rows.labels >= 0) & (rows.labels < rows.logits.shape[1])
    return np.asarray(inside & rows.allowed[np.arange(len(rows.labels)), np.where(inside, rows.labels, 0)])


def describe_inputs(case: Case, index: tuple[int, ...], part: str = "gradient") -> dict[str, str]:
    """Return the inputs of one element of a part of the result, as text for a report.

    Args:
        case: the case.
        index: where in that part; () where all rows enter it. Of the classes those near the element, or else near the
            label, are shown.
        part: "loss" or "gradient", or of a linear case "hidden", "weight" or "bias".
    """
    rows = case.rows()
    inputs = {"shape of the logits": str(list(case.logits.shape))}
    if isinstance(case, LinearCase):
        inputs["number of features"] = str(case.hidden.shape[-1])
        index = index[:1] if part in ("loss", "hidden") else ()
    inputs |= {key: str(value) for key, value in case.options.items()}
    if not index or not 0 <= index[0] < len(rows.logits):
        smoothing = case.smoothing if isinstance(case.smoothing, float) else "per row"
        return inputs | {"smoothing": str(smoothing), "rows": "all of them enter this value"}
    row, num_classes = index[0], rows.logits.shape[-1]
    soft = rows.labels.ndim == 2
    label = 0 if soft else int(rows.labels[row])
    centre = min(max(index[1] if len(index) > 1 else label, 0), num_classes - 1)
    near = slice(max(centre - 3, 0), min(centre + 4, num_classes))

    def values(array: NDArray[Any]) -> str:
        shown = ", ".join(f"{value:.7g}" for value in array[near])
        return f"[{shown}]" + ("" if len(array[near]) == len(array) else f", classes {near.start} to {near.stop - 1}")

    inputs[f"logits of row {row}"] = values(rows.logits[row])
    inputs["label"] = values(rows.labels[row]) if soft else str(label)
    inputs["smoothing"] = f"{rows.smoothing[row]:.9g}"
    if not rows.counted[row]:
        inputs["the row"] = "does not count"
    if case.upstream is not None:
        inputs["upstream gradient"] = f"{rows.upstream[row]:.9g}"
    mask = None if case.class_mask is None else rows.allowed[row]
    arrays = {"class_weight": case.class_weight, "class_mask": mask, "prior": case.prior}
    return inputs | {key: values(array) for key, array in arrays.items() if array is not None}


Builder = Callable[[str, np.random.Generator], Case]
_BUILDERS: dict[str, Builder] = {}


def case_names() -> list[str]:
    """Return the names of all cases."""
    return list(_BUILDERS)


def make_case(name: str, dtype: str) -> Case:
    """Return the case of that name for logits of `dtype`, the same each time."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return replace(_BUILDERS[name](dtype, generator), name=name)


def _case(builder: Builder) -> Builder:
    _BUILDERS[builder.__name__.strip("_")] = builder
    return builder


def random_case(
    dtype: str,
    generator: np.random.Generator,
    num_rows: int = 6,
    num_classes: int = 10,
    scale: float = 3.0,
    offset: float = 0.0,
    **fields: Any,
) -> Case:
    """Return a case of normal logits and uniform labels."""
    logits = generator.normal(size=(num_rows, num_classes)) * scale + offset
    labels = generator.integers(num_classes, size=num_rows)
    return Case("random", dtype, **{"logits": round_to(logits, dtype), "labels": labels, **fields})


def soft_labels(dtype: str, generator: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    """Return random probabilities over the last dimension, a third of them exactly 0."""
    raw = generator.exponential(size=shape) * (generator.random(shape) > 1 / 3)
    raw[..., 0] += 1e-3
    return round_to(raw / raw.sum(-1, keepdims=True), dtype)


def _weights(dtype: str, generator: np.random.Generator, num_classes: int) -> FloatArray:
    return round_to(generator.uniform(0.25, 4, num_classes), compute_dtype(dtype))


def _prior(dtype: str, generator: np.random.Generator, num_classes: int) -> FloatArray:
    counts = generator.integers(1, 50, num_classes)
    return round_to(counts / counts.sum(), compute_dtype(dtype))


# Sizes: one class, two, primes, and one less and one more than the block sizes of vector units and kernels. Five rows,
# but for a loss that drops dimensions of size 1, or is right for one number of rows only.
_ROWS_OF_SIZE = {8: 64, 31: 1, 129: 2}
for _size in (1, 2, 3, 7, 8, 9, 31, 33, 127, 128, 129, 1009):

    def _of_size(dtype: str, generator: np.random.Generator, size: int = _size) -> Case:
        num_rows = _ROWS_OF_SIZE.get(size, 5)
        upstream = round_to(generator.uniform(-2, 2, num_rows), compute_dtype(dtype))
        return random_case(dtype, generator, num_rows, size, upstream=upstream)

    _BUILDERS[f"classes_{_size}"] = _of_size

# Every convention with every reduction; near-uniform logits, since a large lse hides a wrong target.
CONVENTIONS = ("uniform", "non_target", "clamp", "max_sup")
for _convention in CONVENTIONS:
    for _reduction in ("none", "sum", "mean"):

        def _combination(
            dtype: str,
            generator: np.random.Generator,
            convention: str = _convention,
            reduction: str = _reduction,
        ) -> Case:
            options = {"convention": convention, "reduction": reduction}
            return random_case(dtype, generator, 7, 11, scale=0.5, options=options, smoothing=0.2)

        _BUILDERS[f"{_convention}_{_reduction}"] = _combination

    def _soft_combination(dtype: str, generator: np.random.Generator, convention: str = _convention) -> Case:
        labels = soft_labels(dtype, generator, (6, 9))
        options = {"convention": convention, "reduction": "mean"}
        return random_case(dtype, generator, 6, 9, labels=labels, options=options, smoothing=0.15)

    _BUILDERS[f"soft_{_convention}"] = _soft_combination

# Smoothing at its ends, tiny, and where the target is uniform or beyond.
for _smoothing in (0.0, 1e-8, 0.9, 0.95, 1.0):
    for _convention in CONVENTIONS:

        def _extreme(
            dtype: str,
            generator: np.random.Generator,
            smoothing: float = _smoothing,
            convention: str = _convention,
        ) -> Case:
            return random_case(dtype, generator, 4, 10, smoothing=smoothing, options={"convention": convention})

        _BUILDERS[f"smoothing_{_smoothing:g}_{_convention}"] = _extreme


@_case
def _large_logits(dtype: str, generator: np.random.Generator) -> Case:
    """Logits of 1e4, beyond what exp takes without the maximum subtracted."""
    return random_case(dtype, generator, 6, 13, scale=1e4)


@_case
def _large_offset(dtype: str, generator: np.random.Generator) -> Case:
    """Close logits far from 0: the maximum must be subtracted before anything is rounded."""
    offset = 1e6 if dtype == "float64" else 1e4
    return random_case(dtype, generator, 6, 17, scale=1.0, offset=offset)


@_case
def _dominant(dtype: str, generator: np.random.Generator) -> Case:
    """One logit far above the rest, the label's: a small loss, which must keep its relative accuracy."""
    case = random_case(dtype, generator, 5, 12, scale=0.1, smoothing=0.0)
    logits = case.logits.copy()
    logits[np.arange(5), case.labels] = [5, 10, 15, 20, 30]
    return replace(case, logits=round_to(logits, dtype))


@_case
def _dominant_wrong(dtype: str, generator: np.random.Generator) -> Case:
    case = random_case(dtype, generator, 5, 12, scale=0.1)
    logits = case.logits.copy()
    logits[np.arange(5), (case.labels + 1) % 12] = [5, 10, 15, 20, 30]
    return replace(case, logits=round_to(logits, dtype))


@_case
def _ties(dtype: str, generator: np.random.Generator) -> Case:
    """Equal logits: all of them, and two at the top."""
    case = random_case(dtype, generator, 6, 16)
    logits = case.logits.copy()
    logits[:3] = 0.75
    logits[3:, 2] = logits[3:, 9] = 20
    return replace(case, logits=round_to(logits, dtype))


@_case
def _ties_max_sup(dtype: str, generator: np.random.Generator) -> Case:
    """Several largest logits, of classes of different weight, share what is taken from the largest."""
    weight = _weights(dtype, generator, 16)
    options = {"convention": "max_sup"}
    return replace(_ties(dtype, generator), class_weight=weight, smoothing=0.3, options=options)


@_case
def _near_uniform(dtype: str, generator: np.random.Generator) -> Case:
    """Small logits around 0, where a padded class would weigh as much as a real one."""
    options = {"reduction": "mean"}
    return random_case(dtype, generator, 8, 130, scale=0.01, options=options)


@_case
def _at_optimum(dtype: str, generator: np.random.Generator) -> Case:
    """Softmax equal to the target up to rounding: the gradient is a difference of equal numbers."""
    case = random_case(dtype, generator, 6, 10)
    logits = np.full((6, 10), np.log(0.01))
    logits[np.arange(6), case.labels] = np.log(0.91)
    return replace(case, logits=round_to(logits, dtype))


@_case
def _minus_infinity(dtype: str, generator: np.random.Generator) -> Case:
    """Logits of -inf: with smoothing the loss is inf and the gradient finite."""
    case = random_case(dtype, generator, 6, 10)
    logits = case.logits.copy()
    logits[np.arange(4), (case.labels[:4] + 3) % 10] = -np.inf
    return replace(case, logits=logits)


@_case
def _minus_infinity_unsmoothed(dtype: str, generator: np.random.Generator) -> Case:
    """Without smoothing a class of logit -inf is no target: 0 * inf counts as 0."""
    return replace(_minus_infinity(dtype, generator), smoothing=0.0)


@_case
def _class_mask(dtype: str, generator: np.random.Generator) -> Case:
    """A padded vocabulary whose padding holds NaN, infinities and large numbers."""
    case = random_case(dtype, generator, 7, 13, options={"reduction": "mean"})
    mask = np.ones(13, bool)
    mask[[2, 10, 11, 12]] = False
    logits = case.logits.copy()
    logits[:, 2], logits[:, 10], logits[:, 11], logits[:, 12] = np.nan, np.inf, -np.inf, 6e4
    labels = np.array([0, 1, 3, 4, 9, 5, 0])
    return replace(case, logits=round_to(logits, dtype), labels=labels, class_mask=mask)


@_case
def _class_mask_non_target(dtype: str, generator: np.random.Generator) -> Case:
    return replace(_class_mask(dtype, generator), options={"convention": "non_target", "reduction": "sum"})


@_case
def _class_mask_max_sup(dtype: str, generator: np.random.Generator) -> Case:
    """The largest logit is the largest of those in the mask."""
    options = {"convention": "max_sup", "softcap": 4.0, "z_loss": 0.01}
    return replace(_class_mask(dtype, generator), options=options)


@_case
def _class_mask_near_one(dtype: str, generator: np.random.Generator) -> Case:
    """Almost all probability moved: 1 - e must not be rounded in float32 before it is small."""
    case = _class_mask(dtype, generator)
    logits = np.where(np.arange(13) == case.labels[:, None], -1000.0, 0.0)
    options = {"convention": "non_target", "reduction": "mean"}
    return replace(case, logits=round_to(logits, dtype), smoothing=0.99999, options=options)


@_case
def _class_mask_of_rows(dtype: str, generator: np.random.Generator) -> Case:
    """A mask for each row: all classes, some, one, the label outside, none in rows that do not count."""
    mask = generator.random((8, 11)) < 0.6
    mask[0], mask[1], mask[2], mask[6], mask[7] = True, np.arange(11) == 4, np.arange(11) < 2, False, False
    labels = np.array([3, 4, 1, 5, 0, 10, -100, -100])
    mask[np.arange(6), labels[:6]] = True
    mask[4, 0] = False
    case = random_case(dtype, generator, 8, 11, labels=labels, smoothing=0.2)
    # What a mask takes out may hold anything.
    logits = np.where(mask, case.logits, np.resize([np.nan, np.inf, -np.inf, 6e4, 0.0], mask.shape))
    return replace(case, logits=round_to(logits, dtype), class_mask=mask, options={"ignore_index": -100})


@_case
def _class_mask_of_groups(dtype: str, generator: np.random.Generator) -> Case:
    """Classes in the middle, and a mask that some rows share; class weights, softcap, z-loss and an entropy."""
    mask = np.ones((2, 9, 1), bool)
    mask[0, 5:], mask[1, :3] = False, False
    options = {
        "convention": "non_target",
        "reduction": "mean",
        "softcap": 4.0,
        "z_loss": 0.01,
        "subtract_entropy": True,
    }
    return Case(
        "",
        dtype,
        logits=round_to(generator.normal(size=(2, 9, 3)) * 2, dtype),
        labels=np.array([[0, 4, 2], [3, 8, 5]]),
        axis=1,
        class_mask=mask,
        class_weight=_weights(dtype, generator, 9),
        options=options,
    )


@_case
def _class_mask_of_rows_soft(dtype: str, generator: np.random.Generator) -> Case:
    """Soft labels over the classes of each row, and the largest logit of each row's own."""
    mask = generator.random((5, 7)) < 0.7
    mask[:, 0] = True
    labels = np.where(mask, soft_labels(dtype, generator, (5, 7)), 0.0)
    options = {"convention": "max_sup", "reduction": "sum"}
    return random_case(dtype, generator, 5, 7, labels=labels, class_mask=mask, options=options)


@_case
def _class_mask_of_one(dtype: str, generator: np.random.Generator) -> Case:
    """One class left: nothing to spread over."""
    mask = np.arange(5) == 3
    labels = np.full(4, 3)
    return random_case(dtype, generator, 4, 5, labels=labels, class_mask=mask, options={"convention": "non_target"})


@_case
def _ignored(dtype: str, generator: np.random.Generator) -> Case:
    """Rows taken out by label, their logits full of NaN and inf; the mean is over the rest."""
    case = random_case(dtype, generator, 8, 9, options={"reduction": "mean", "ignore_index": -100})
    labels, logits = case.labels.copy(), case.logits.copy()
    labels[[1, 4, 5]] = -100
    logits[1], logits[4] = np.nan, np.inf
    return replace(case, labels=labels, logits=logits)


@_case
def _where(dtype: str, generator: np.random.Generator) -> Case:
    """Rows taken out by position, their labels out of range."""
    case = random_case(dtype, generator, 8, 9, options={"reduction": "mean"})
    where, labels = np.ones(8, bool), case.labels.copy()
    where[[0, 6]] = False
    labels[[0, 6]] = [9999, -3]
    return replace(case, where=where, labels=labels)


@_case
def _where_soft(dtype: str, generator: np.random.Generator) -> Case:
    """Rows taken out whose soft labels are NaN and infinite."""
    labels = soft_labels(dtype, generator, (6, 5))
    labels[1], labels[4] = np.nan, np.inf
    where = np.array([True, False, True, True, False, True])
    options = {"reduction": "mean", "subtract_entropy": True}
    return random_case(dtype, generator, 6, 5, labels=labels, where=where, options=options)


@_case
def _denominator_of_zero(dtype: str, generator: np.random.Generator) -> Case:
    """Divided by 0 nothing counts, not even a bad label."""
    options = {"reduction": "mean", "denominator": 0.0}
    return random_case(dtype, generator, 4, 6, labels=np.array([0, 7, 2, -1]), options=options)


@_case
def _all_ignored(dtype: str, generator: np.random.Generator) -> Case:
    options = {"reduction": "mean", "ignore_index": 3}
    return random_case(dtype, generator, 4, 6, labels=np.full(4, 3), options=options)


@_case
def _no_rows(dtype: str, generator: np.random.Generator) -> Case:
    return random_case(dtype, generator, 0, 6, options={"reduction": "mean"})


@_case
def _one_row(dtype: str, generator: np.random.Generator) -> Case:
    return random_case(dtype, generator, 1, 6, options={"reduction": "mean"})


@_case
def _bad_labels(dtype: str, generator: np.random.Generator) -> Case:
    """Labels that are no class: NaN in their rows, and only there."""
    return random_case(dtype, generator, 5, 6, labels=np.array([0, -1, 5, 6, 2]))


@_case
def _class_weight(dtype: str, generator: np.random.Generator) -> Case:
    options = {"reduction": "mean", "ignore_index": -100}
    case = random_case(dtype, generator, 9, 7, scale=1.0, smoothing=0.3, options=options)
    labels = case.labels.copy()
    labels[2] = -100
    return replace(case, labels=labels, class_weight=_weights(dtype, generator, 7))


@_case
def _class_weight_soft(dtype: str, generator: np.random.Generator) -> Case:
    labels, weight = soft_labels(dtype, generator, (6, 7)), _weights(dtype, generator, 7)
    options = {"reduction": "mean"}
    return random_case(dtype, generator, 6, 7, labels=labels, class_weight=weight, options=options)


@_case
def _prior_distribution(dtype: str, generator: np.random.Generator) -> Case:
    prior = _prior(dtype, generator, 11)
    return random_case(dtype, generator, 6, 11, scale=1.0, prior=prior, smoothing=0.4)


@_case
def _prior_soft(dtype: str, generator: np.random.Generator) -> Case:
    prior, labels = _prior(dtype, generator, 11), soft_labels(dtype, generator, (6, 11))
    return random_case(dtype, generator, 6, 11, scale=1.0, labels=labels, prior=prior)


@_case
def _z_loss(dtype: str, generator: np.random.Generator) -> Case:
    options = {"z_loss": 0.01, "reduction": "mean"}
    return random_case(dtype, generator, 6, 11, offset=4.0, options=options)


@_case
def _softcap(dtype: str, generator: np.random.Generator) -> Case:
    options = {"softcap": 5.0, "reduction": "mean"}
    return random_case(dtype, generator, 6, 11, options=options)


@_case
def _subtract_entropy(dtype: str, generator: np.random.Generator) -> Case:
    return random_case(dtype, generator, 6, 11, scale=1.0, options={"subtract_entropy": True})


@_case
def _everything(dtype: str, generator: np.random.Generator) -> Case:
    options = {
        "convention": "non_target",
        "z_loss": 0.001,
        "softcap": 8.0,
        "subtract_entropy": True,
        "ignore_index": 0,
        "reduction": "mean",
        "denominator": 5.0,
    }
    mask = np.arange(12) != 7
    labels = np.array([1, 0, 3, 11, 2, 5, 6, 4])
    return random_case(
        dtype,
        generator,
        8,
        12,
        labels=labels,
        class_mask=mask,
        class_weight=_weights(dtype, generator, 12),
        where=np.arange(8) != 2,
        smoothing=round_to(generator.uniform(0, 1, 8), compute_dtype(dtype)),
        options=options,
    )


@_case
def _smoothing_per_row(dtype: str, generator: np.random.Generator) -> Case:
    smoothing = round_to(np.array([0.0, 0.05, 0.1, 0.5, 0.9, 1.0]), compute_dtype(dtype))
    return random_case(dtype, generator, 6, 10, smoothing=smoothing, options={"convention": "clamp"})


@_case
def _axis_in_the_middle(dtype: str, generator: np.random.Generator) -> Case:
    logits = round_to(generator.normal(size=(2, 7, 3)) * 2, dtype)
    labels = generator.integers(7, size=(2, 3))
    upstream = round_to(generator.uniform(-2, 2, (2, 3)), compute_dtype(dtype))
    smoothing = round_to(generator.uniform(0, 0.5, (2, 1)), compute_dtype(dtype))
    return Case("", dtype, logits, labels, axis=1, upstream=upstream, smoothing=smoothing)


@_case
def _axis_first(dtype: str, generator: np.random.Generator) -> Case:
    logits = round_to(generator.normal(size=(5, 2, 2, 3)) * 2, dtype)
    labels = soft_labels(dtype, generator, (2, 2, 3, 5)).transpose(3, 0, 1, 2)
    return Case("", dtype, logits, labels, axis=0, options={"reduction": "mean"})


@_case
def _no_batch(dtype: str, generator: np.random.Generator) -> Case:
    logits = round_to(generator.normal(size=9), dtype)
    return Case("", dtype, logits, np.array(4), options={"reduction": "mean"})


@_case
def _wide(dtype: str, generator: np.random.Generator) -> Case:
    """256k classes, where sums in float16 overflow and sums in bfloat16 stop growing. In float64: 5003."""
    num_classes = 5003 if dtype == "float64" else 262144
    return random_case(dtype, generator, 2, num_classes, scale=1.0, options={"reduction": "mean"})


for _name in ("int8", "int16", "int32", "uint8"):

    def _label_dtype(dtype: str, generator: np.random.Generator, name: str = _name) -> Case:
        # More classes than int8 holds: the comparison must not happen in the labels' own type.
        case = random_case(dtype, generator, 4, 300)
        return replace(case, labels=generator.integers(127, size=4).astype(name))

    _BUILDERS[f"labels_{_name}"] = _label_dtype
