"""Streaming metrics for Flax from the statistics of the loss, without a second sweep over the logits.

Every metric is a ratio of sums, and keeps the sums. So metrics of shards of the data, from devices, hosts or days,
merge into the metric of the whole; means of means do not. float32 alone cannot hold the sums: a count stops at 2^24,
and a sum of a million losses loses half of its digits. So each sum is a pair, the rounded sum and its rounding error
(Knuth, The Art of Computer Programming 2, section 4.2.2, theorem B). Whole numbers are exact up to 2^48, and the order
of summation does not show in the result.

Before each class stands the function that computes its sums of one batch; the class only adds them up.
"""

from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from lsce_jax.errors import error
from lsce_jax.inputs import as_array, as_last_axis, on_automatic_axes, prepare, warn_of_bad_labels
from lsce_jax.stats import LossStats
from lsce_spec import (
    LossOptions,
    check_batch_operand,
    check_class_num,
    check_denominator,
    check_denominator_array,
    is_integer,
)
from lsce_spec.keywords import hinting

# A number in two parts: the rounded sum and its rounding error.
_Pair = tuple[Float[Array, "..."], Float[Array, "..."]]


class _Sums(nnx.Metric):
    """Sums by name. Each is an array [2, ...]: the rounded sum and its rounding error."""

    def __init__(self, *names: str, shape: tuple[int, ...] = ()) -> None:
        self._names, self._shape = names, shape
        for name in names:
            setattr(self, name, nnx.metrics.MetricState(jnp.zeros((2, *shape))))

    def reset(self) -> None:
        """Start again with nothing seen."""
        for name in self._names:
            getattr(self, name)[...] = jnp.zeros((2, *self._shape))

    def merge_state(self, other: Self) -> None:
        """Add the sums of another metric of this kind, such as that of another shard or host.

        Raises:
            TypeError: the other metric is of another kind or has other options.
        """
        if type(other) is not type(self) or other._describe() != self._describe():
            raise error("merge_state", expected=self._describe(), given=getattr(other, "_describe", other.__repr__)())
        self._add(**{name: (getattr(other, name)[0], getattr(other, name)[1]) for name in self._names})

    def _describe(self) -> str:
        return f"{type(self).__name__} with the sums {', '.join(self._names)} of shape {list(self._shape)}"

    def _add(self, **terms: _Pair) -> None:
        for name, term in terms.items():
            state = getattr(self, name)
            state[...] = jnp.stack(_add((state[0], state[1]), term))

    def _ratio(self, total: str, count: str) -> Float[Array, "..."]:
        """Return a quotient of two sums; NaN before the first row."""
        ratio: Array = getattr(self, total)[0] / getattr(self, count)[0]
        return ratio


def _mean_loss_sums(
    stats: LossStats, denominator: float | Float[ArrayLike, ""] | None, mask: Bool[ArrayLike, "..."] | None
) -> dict[str, _Pair]:
    rows = _rows(stats, mask)
    return {
        "loss": _sum(jnp.where(rows, stats.smoothed, 0), jnp.where(rows, stats.z, 0)),
        "denominator": _count(rows) if denominator is None else _denominator(denominator),
    }


class MeanLoss(_Sums):
    """Mean of the training loss over all rows seen, as `reduction="mean"` gives it for one batch.

    Example:
        >>> import jax.numpy as jnp
        >>> from lsce_jax import label_smoothed_cross_entropy_with_stats
        >>> metric = MeanLoss()
        >>> for logits, label in (([2.0, 0.0, 0.0], 0), ([0.0, 0.0, 3.0], 2)):
        ...     _, stats = label_smoothed_cross_entropy_with_stats(jnp.array(logits), jnp.array(label))
        ...     metric.update(stats=stats)
        >>> f"{metric.compute():.4f}"
        '0.3339'
    """

    def __init__(self) -> None:
        """Start with nothing seen."""
        super().__init__("loss", "denominator")

    @hinting
    def update(
        self,
        *,
        stats: LossStats,
        denominator: float | Float[ArrayLike, ""] | None = None,
        mask: Bool[ArrayLike, "..."] | None = None,
        **_: Any,
    ) -> None:
        """Add a batch.

        Args:
            stats: second result of `label_smoothed_cross_entropy_with_stats`.
            denominator: what the batch adds to the divisor of the mean; None adds the number of rows that count. With
                class weights pass the sum of the weights of the labels that count.
            mask: which of the rows that the loss counted to include.

        Raises:
            TypeError, ValueError: an argument that is not as described.
        """
        self._add(**_mean_loss_sums(stats, denominator, mask))

    def compute(self) -> Float[Array, ""]:
        """Return the mean; NaN if no row was seen."""
        return self._ratio("loss", "denominator")


class _Mean(_Sums):
    """Mean of one of the statistics over all rows seen. The sums have its name, so that no two metrics share them."""

    _statistic: ClassVar[str]

    def __init__(self) -> None:
        """Start with nothing seen."""
        super().__init__(self._statistic, "count")

    @hinting
    def update(self, *, stats: LossStats, mask: Bool[ArrayLike, "..."] | None = None, **_: Any) -> None:
        """Add a batch; see `MeanLoss.update` for `stats` and `mask`."""
        rows, values = _rows(stats, mask), getattr(stats, self._statistic)
        total = _count(rows & values) if values.dtype == bool else _sum(jnp.where(rows, values, 0))
        self._add(**{self._statistic: total, "count": _count(rows)})

    def compute(self) -> Float[Array, ""]:
        """Return the mean; NaN if no row was seen."""
        return self._ratio(self._statistic, "count")


class MeanNLL(_Mean):
    """Mean cross-entropy with the labels as they are, neither smoothed nor weighted, in nats.

    Example:
        >>> import jax.numpy as jnp
        >>> from lsce_jax import label_smoothed_cross_entropy_with_stats
        >>> metric = MeanNLL()
        >>> _, stats = label_smoothed_cross_entropy_with_stats(jnp.zeros((3, 8)), jnp.array([0, 1, 2]))
        >>> metric.update(stats=stats)
        >>> f"{metric.compute():.4f}"  # log 8
        '2.0794'
    """

    _statistic = "nll"


class Perplexity(MeanNLL):
    """Exponential of the mean cross-entropy with the labels as they are, over all rows seen.

    Example:
        >>> import jax.numpy as jnp
        >>> from lsce_jax import label_smoothed_cross_entropy_with_stats
        >>> metric = Perplexity()
        >>> _, stats = label_smoothed_cross_entropy_with_stats(jnp.zeros((3, 8)), jnp.array([0, 1, 2]))
        >>> metric.update(stats=stats)
        >>> f"{metric.compute():.4f}"
        '8.0000'
    """

    def compute(self) -> Float[Array, ""]:
        """Return the perplexity; NaN if no row was seen."""
        return jnp.exp(super().compute())


class MeanEntropy(_Mean):
    """Mean entropy of the model's distribution, whatever the labels, in nats: from 0 to log K.

    Example:
        >>> import jax.numpy as jnp
        >>> from lsce_jax import label_smoothed_cross_entropy_with_stats
        >>> metric = MeanEntropy()
        >>> _, stats = label_smoothed_cross_entropy_with_stats(jnp.zeros((3, 8)), jnp.array([0, 1, 2]))
        >>> metric.update(stats=stats)
        >>> f"{metric.compute():.4f}"  # log 8
        '2.0794'
    """

    _statistic = "entropy"


class Accuracy(_Mean):
    """Share of rows whose label is the (first) largest logit; for soft labels, their own (first) largest.

    Example:
        >>> import jax.numpy as jnp
        >>> from lsce_jax import label_smoothed_cross_entropy_with_stats
        >>> logits, labels = jnp.eye(3), jnp.array([0, 1, 0])
        >>> metric = Accuracy()
        >>> metric.update(stats=label_smoothed_cross_entropy_with_stats(logits, labels)[1])
        >>> f"{metric.compute():.4f}"
        '0.6667'
    """

    _statistic = "correct"


def _top_k_accuracy_sums(
    k: int,
    stats: LossStats,
    mask: Bool[ArrayLike, "..."] | None,
    logits: Float[ArrayLike, "..."],
    labels: Int[ArrayLike, "..."] | Float[ArrayLike, "..."],
    **keywords: Any,
) -> dict[str, _Pair]:
    rows = _rows(stats, mask)
    options = LossOptions()
    batch = prepare(logits, labels, options, keywords)
    if batch.batch_shape != stats.valid.shape:
        raise error("stats_shape", expected=list(stats.valid.shape), given=list(batch.batch_shape))
    num_classes = batch.logits.shape[-1]
    if k > num_classes:
        raise error("top_k", k=k, given=num_classes)
    batch = batch.counting_only(rows)
    warn_of_bad_labels(labels, batch, options)
    labels = (jnp.argmax(batch.labels, axis=-1) if batch.soft else batch.labels)[..., None]
    # Comparisons and sums only, which work on logits that are divided over devices in any way.
    classes = jax.lax.broadcasted_iota(labels.dtype, (1,) * (labels.ndim - 1) + (num_classes,), labels.ndim - 1)
    is_label = classes == labels
    label_logit = jnp.sum(jnp.where(is_label, batch.logits, 0), axis=-1, keepdims=True)
    larger = (batch.logits > label_logit) | ((batch.logits == label_logit) & (classes < labels))
    # A label that is not a class has no rank, and neither has any label of a row that holds a NaN.
    found = ~jnp.isnan(stats.nll)
    if batch.class_mask is not None:
        allowed = as_last_axis(batch.class_mask, labels)
        larger &= allowed
        found &= jnp.any(is_label & allowed, axis=-1)
    found &= jnp.sum(larger, axis=-1) < k
    return {f"correct_in_top_{k}": _count(rows & found), "count": _count(rows)}


class TopKAccuracy(_Sums):
    """Share of rows whose label is among the k largest logits; of equal logits the first counts as larger.

    Args:
        k: how many logits, at least 1; with 1 it is `Accuracy`.

    Raises:
        TypeError: k is not an integer.
        ValueError: k is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from lsce_jax import label_smoothed_cross_entropy_with_stats
        >>> logits, labels = jnp.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), jnp.array([1, 2])
        >>> metric = TopKAccuracy(2)
        >>> _, stats = label_smoothed_cross_entropy_with_stats(logits, labels)
        >>> metric.update(stats=stats, logits=logits, labels=labels)
        >>> f"{metric.compute():.4f}"
        '0.5000'
    """

    def __init__(self, k: int) -> None:
        """Start with nothing seen."""
        check_class_num(k, name="k")
        super().__init__(f"correct_in_top_{k}", "count")
        self.k = k

    @hinting
    def update(
        self,
        *,
        stats: LossStats,
        logits: Float[ArrayLike, "..."],
        labels: Int[ArrayLike, "..."] | Float[ArrayLike, "..."],
        axis: int = -1,
        class_mask: Bool[ArrayLike, "..."] | None = None,
        mask: Bool[ArrayLike, "..."] | None = None,
        **_: Any,
    ) -> None:
        """Add a batch.

        Args:
            stats: second result of `label_smoothed_cross_entropy_with_stats`, which says which rows count.
            logits: as given to the loss.
            labels: as given to the loss.
            axis: as given to the loss.
            class_mask: as given to the loss.
            mask: which of the rows that the loss counted to include.

        Raises:
            TypeError, ValueError: as the loss; or the arrays are not those of the statistics, or hold fewer than k
                classes.
        """
        self._add(**_top_k_accuracy_sums(self.k, stats, mask, logits, labels, axis=axis, class_mask=class_mask))

    def compute(self) -> Float[Array, ""]:
        """Return the share; NaN if no row was seen."""
        return self._ratio(*self._names)


@on_automatic_axes
def _calibration_error_sums(
    rows: Bool[Array, "*batch"], correct: Bool[Array, "*batch"], confidence: Float[Array, "*batch"], options: Any
) -> tuple[list[dict[str, _Pair]], None]:
    """Return the sums of some rows at a time, and nothing for each row."""
    num_bins, sums = options["num_bins"], []
    rows, correct, confidence = (values.reshape(-1) for values in (rows, correct, confidence))
    edges = jnp.arange(1, num_bins, dtype=confidence.dtype)[:, None] / num_bins
    bins = jnp.arange(num_bins)[:, None]
    for start in range(0, rows.size, _MAX_ROWS):
        part = slice(start, start + _MAX_ROWS)
        place = jnp.sum(confidence[None, part] > edges, axis=0, dtype=int)
        in_bin = (place[None] == bins) & rows[None, part]
        of_part = {
            "confidence": _sum_of_fractions(confidence[part], in_bin),
            "correct": _count(in_bin & correct[None, part], axis=-1),
            "count": _count(in_bin, axis=-1),
        }
        sums.append(of_part)
    return sums, None


class CalibrationError(_Sums):
    """Expected calibration error: the gap between the probability of the predicted class and how often it is right.

    Rows go by the probability of their largest logit into bins ((b-1)/num_bins, b/num_bins]:

        ECE = sum over bins of (share of rows) |accuracy - mean probability|

    Args:
        num_bins: number of bins of equal width, at least 1.

    Raises:
        TypeError: num_bins is not an integer.
        ValueError: num_bins is below 1.

    Example: a confidence of 1/2 in every row, and three of four rows right.
        >>> import jax.numpy as jnp
        >>> from lsce_jax import label_smoothed_cross_entropy_with_stats
        >>> metric = CalibrationError()
        >>> _, stats = label_smoothed_cross_entropy_with_stats(jnp.zeros((4, 2)), jnp.array([0, 0, 0, 1]))
        >>> metric.update(stats=stats)
        >>> f"{metric.compute():.4f}"
        '0.2500'

    References:
        Guo et al., "On Calibration of Modern Neural Networks", 2017, section 2.
    """

    def __init__(self, num_bins: int = 15) -> None:
        """Start with nothing seen."""
        check_class_num(num_bins, name="num_bins")
        super().__init__("confidence", "correct", "count", shape=(num_bins,))
        self.num_bins = num_bins

    @hinting
    def update(self, *, stats: LossStats, mask: Bool[ArrayLike, "..."] | None = None, **_: Any) -> None:
        """Add a batch; see `MeanLoss.update` for `stats` and `mask`."""
        rows, options = _rows(stats, mask), {"num_bins": self.num_bins}
        for sums in _calibration_error_sums(rows, stats.correct, stats.confidence, options)[0]:
            self._add(**sums)

    def compute(self) -> Float[Array, ""]:
        """Return the error, from 0 to 1; NaN if no row was seen."""
        confidence, correct, count = (getattr(self, name)[...] for name in self._names)
        surplus, _ = _add((confidence[0], confidence[1]), (-correct[0], -correct[1]))
        return jnp.sum(jnp.abs(surplus)) / jnp.sum(count[0])


def _rows(stats: LossStats, mask: Bool[ArrayLike, "..."] | None) -> Bool[Array, "*batch"]:
    """Return which rows to include."""
    if not isinstance(stats, LossStats):
        raise error("stats_type", given=type(stats).__name__)
    if mask is None:
        return stats.valid
    mask = as_array("mask", mask)
    check_batch_operand("mask", mask.shape, mask.dtype.name, stats.valid.shape)
    return stats.valid & jnp.broadcast_to(mask, stats.valid.shape)


def _denominator(denominator: float | Float[ArrayLike, ""]) -> _Pair:
    """Return the caller's denominator, a number or a scalar array, in two parts."""
    check_denominator(denominator)
    if isinstance(denominator, int | float):
        high = np.asarray(denominator, jnp.zeros((), float).dtype)
        return jnp.asarray(high), jnp.asarray(denominator - float(high), float)
    array = as_array("denominator", denominator)
    check_denominator_array(array.shape, array.dtype.name)
    return _pair(array.astype(int)) if is_integer(array.dtype.name) else _sum(array)


# Sums of 10-bit numbers over this many rows are whole numbers of 30 bits.
_MAX_ROWS = 2**20


def _sum_of_fractions(values: Float[Array, " N"], in_bin: Bool[Array, "bins N"]) -> _Pair:
    """Return the sum in each bin of numbers from 0 to 1, rounded to multiples of 2^-30.

    They are added as whole numbers in parts of 10 bits, which a compiler vectorises, unlike numbers in two parts.
    """
    is_nan = jnp.isnan(values)
    units = jnp.round(jnp.where(is_nan, 0, values) * 2.0**30).astype(jnp.int32)
    total = _pair(jnp.zeros(in_bin.shape[0], int))
    for shift in (20, 10, 0):
        part = (units >> shift) & 1023 if shift < 20 else units >> shift
        high, low = _pair(jnp.sum(jnp.where(in_bin, part[None], 0), axis=-1))
        scale = 2.0 ** (shift - 30)
        total = _add(total, (high * scale, low * scale))
    return jnp.where(jnp.any(in_bin & is_nan[None], axis=-1), jnp.nan, total[0]), total[1]


def _count(rows: Bool[Array, "..."], axis: int | None = None) -> _Pair:
    return _pair(jnp.sum(rows, axis=axis, dtype=int))


def _pair(whole: Int[Array, "..."]) -> _Pair:
    """Return whole numbers of up to 31 bits in two parts."""
    high = (whole >> 16 << 16).astype(float)
    return _two_sum(high, (whole & 65535).astype(float))


def _sum(values: Float[Array, "..."], rest: Float[Array, "..."] | None = None) -> _Pair:
    """Return the sum of all numbers of one or two arrays."""
    values = jax.lax.stop_gradient(values).astype(float)
    rest = jnp.zeros_like(values) if rest is None else jax.lax.stop_gradient(rest).astype(float)
    zero = jnp.zeros((), values.dtype)
    total, left_out = jax.lax.reduce(_two_sum(values, rest), (zero, zero), _add, range(values.ndim))
    return total, left_out


def _add(one: _Pair, other: _Pair) -> _Pair:
    total, rest = _two_sum(one[0], other[0])
    return _two_sum(total, rest + (one[1] + other[1]))


def _two_sum(one: Array, other: Array) -> _Pair:
    """Return the rounded sum and its rounding error, exactly."""
    total = one + other
    second = total - one
    rest = (one - (total - second)) + (other - second)
    # The rest of an infinite sum would be inf - inf.
    return total, jnp.where(jnp.isfinite(total), rest, 0)
