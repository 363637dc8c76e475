"""Streaming metrics for Flax, fed by the statistics of the loss: no second sweep over the logits, no second softmax.

Every metric is a ratio of sums, and the sums are what it keeps. So shards of the data, on devices, hosts or days, merge
into exactly what the whole would have given, which means of means do not. float32 alone would not hold them: a count
stops at 2^24, and a sum of a million losses loses half of its digits. Each sum is therefore two numbers, the second of
them what the first has rounded away (Knuth, The Art of Computer Programming 2, section 4.2.2, theorem B): whole
numbers are exact up to 2^48, and the order of summation does not show in the result.
"""

from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from lsce_jax.inputs import prepare
from lsce_jax.stats import LossStats
from lsce_spec import (
    LossOptions,
    check_batch_operand,
    check_class_num,
    check_denominator,
    check_denominator_array,
    error,
    is_integer,
)

# A number in two parts: the rounded sum, and what rounding has left out of it.
_Pair = tuple[Float[Array, "..."], Float[Array, "..."]]


class _Sums(nnx.Metric):
    """Sums by name. Each is an array [2, ...]: the sum, and what rounding has left out of it."""

    def __init__(self, *names: str, shape: tuple[int, ...] = ()) -> None:
        self._names, self._shape = names, shape
        for name in names:
            setattr(self, name, nnx.metrics.MetricState(jnp.zeros((2, *shape))))

    def reset(self) -> None:
        """Forget what was seen."""
        for name in self._names:
            getattr(self, name)[...] = jnp.zeros((2, *self._shape))

    def merge_state(self, other: Self) -> None:
        """Add what another metric of this kind has seen, such as that of another shard or host.

        Raises:
            TypeError: the other is of another kind or has other options.
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
        """Return a quotient of two sums; NaN where nothing was seen."""
        ratio: Array = getattr(self, total)[0] / getattr(self, count)[0]
        return ratio


class MeanLoss(_Sums):
    """Mean of the loss that is trained on: over all rows seen, the one of `reduction="mean"`.

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
            denominator: what the batch adds to the number that the sum is divided by; the number of rows that count,
                if not given. With class weights pass the sum of the weights of the labels that count.
            mask: rows to take, of those that the loss counted.

        Raises:
            TypeError, ValueError: an argument that is not as described.
        """
        rows = _rows(stats, mask)
        loss = _sum(jnp.where(rows, stats.smoothed, 0), jnp.where(rows, stats.z, 0))
        self._add(loss=loss, denominator=_count(rows) if denominator is None else _denominator(denominator))

    def compute(self) -> Float[Array, ""]:
        """Return the mean; NaN if no row was seen."""
        return self._ratio("loss", "denominator")


class MeanNLL(_Sums):
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

    def __init__(self) -> None:
        """Start with nothing seen."""
        super().__init__("nll", "count")

    def update(self, *, stats: LossStats, mask: Bool[ArrayLike, "..."] | None = None, **_: Any) -> None:
        """Add a batch: `stats` as for `MeanLoss.update`, `mask` the rows to take of those that the loss counted."""
        rows = _rows(stats, mask)
        self._add(nll=_sum(jnp.where(rows, stats.nll, 0)), count=_count(rows))

    def compute(self) -> Float[Array, ""]:
        """Return the mean; NaN if no row was seen."""
        return self._ratio("nll", "count")


class Perplexity(MeanNLL):
    """Exponential of the mean cross-entropy with the labels as they are: over all rows, not a mean over batches.

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


class Accuracy(_Sums):
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

    def __init__(self) -> None:
        """Start with nothing seen."""
        super().__init__("correct", "count")

    def update(self, *, stats: LossStats, mask: Bool[ArrayLike, "..."] | None = None, **_: Any) -> None:
        """Add a batch: `stats` as for `MeanLoss.update`, `mask` the rows to take of those that the loss counted."""
        rows = _rows(stats, mask)
        self._add(correct=_count(rows & stats.correct), count=_count(rows))

    def compute(self) -> Float[Array, ""]:
        """Return the share; NaN if no row was seen."""
        return self._ratio("correct", "count")


class TopKAccuracy(_Sums):
    """Share of rows whose label is among the k largest logits; of equal logits the first is taken for the larger.

    Args:
        k: how many logits, at least 1; with 1 it is `Accuracy`.

    Raises:
        ValueError: k is no integer or below 1.

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

    def update(
        self,
        *,
        stats: LossStats,
        logits: Float[ArrayLike, "..."],
        labels: Int[ArrayLike, "..."] | Float[ArrayLike, "..."],
        axis: int = -1,
        class_mask: Bool[ArrayLike, " K"] | None = None,
        mask: Bool[ArrayLike, "..."] | None = None,
        **_: Any,
    ) -> None:
        """Add a batch.

        Args:
            stats: second result of `label_smoothed_cross_entropy_with_stats`, for which rows count.
            logits: as given to the loss.
            labels: as given to the loss.
            axis: as given to the loss.
            class_mask: as given to the loss.
            mask: rows to take, of those that the loss counted.

        Raises:
            TypeError, ValueError: as the loss; or the arrays are not those of the statistics, or hold fewer than k
                classes.
        """
        rows = _rows(stats, mask)
        batch = prepare(logits, labels, LossOptions(), {"axis": axis, "class_mask": class_mask})
        if batch.batch_shape != stats.valid.shape:
            raise error("stats_shape", expected=list(stats.valid.shape), given=list(batch.batch_shape))
        num_classes = batch.logits.shape[-1]
        if self.k > num_classes:
            raise error("top_k", k=self.k, given=num_classes)
        labels = (jnp.argmax(batch.labels, axis=-1) if batch.soft else batch.labels)[..., None]
        # Comparisons and sums alone, which work on logits that are divided over devices in any way.
        classes = jax.lax.broadcasted_iota(labels.dtype, (1,) * (labels.ndim - 1) + (num_classes,), labels.ndim - 1)
        is_label = classes == labels
        at_label = jnp.sum(jnp.where(is_label, batch.logits, 0), axis=-1, keepdims=True)
        larger = (batch.logits > at_label) | ((batch.logits == at_label) & (classes < labels))
        # A label that is no class has no rank, nor has any in a row that holds a NaN.
        found = ~jnp.isnan(stats.nll)
        if batch.class_mask is not None:
            allowed = batch.class_mask.reshape((1,) * (labels.ndim - 1) + (-1,))
            larger &= allowed
            found &= jnp.any(is_label & allowed, axis=-1)
        found &= jnp.sum(larger, axis=-1) < self.k
        self._add(**{self._names[0]: _count(rows & found)}, count=_count(rows))

    def compute(self) -> Float[Array, ""]:
        """Return the share; NaN if no row was seen."""
        return self._ratio(*self._names)


class CalibrationError(_Sums):
    """Expected calibration error: by how much the probability of the predicted class differs from being right.

    Rows are sorted by the probability of their largest logit into bins ((b-1)/num_bins, b/num_bins]:

        ECE = sum over bins of (share of rows) |accuracy - mean probability|

    Args:
        num_bins: number of bins of equal width, at least 1.

    Raises:
        ValueError: num_bins is no integer or below 1.

    Example: always sure to 1/2, and right in three of four.
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

    def update(self, *, stats: LossStats, mask: Bool[ArrayLike, "..."] | None = None, **_: Any) -> None:
        """Add a batch: `stats` as for `MeanLoss.update`, `mask` the rows to take of those that the loss counted."""
        rows, correct, confidence = (
            values.reshape(-1) for values in (_rows(stats, mask), stats.correct, stats.confidence)
        )
        edges = jnp.arange(1, self.num_bins, dtype=confidence.dtype)[:, None] / self.num_bins
        bins = jnp.arange(self.num_bins)[:, None]
        for start in range(0, rows.size, _MAX_ROWS):
            part = slice(start, start + _MAX_ROWS)
            place = jnp.sum(confidence[None, part] > edges, axis=0, dtype=int)
            in_bin = (place[None] == bins) & rows[None, part]
            self._add(
                confidence=_sum_of_fractions(confidence[part], in_bin),
                correct=_count(in_bin & correct[None, part], axis=-1),
                count=_count(in_bin, axis=-1),
            )

    def compute(self) -> Float[Array, ""]:
        """Return the error, from 0 to 1; NaN if no row was seen."""
        confidence, correct, count = (getattr(self, name)[...] for name in self._names)
        surplus, _ = _add((confidence[0], confidence[1]), (-correct[0], -correct[1]))
        return jnp.sum(jnp.abs(surplus)) / jnp.sum(count[0])


def _rows(stats: LossStats, mask: Bool[ArrayLike, "..."] | None) -> Bool[Array, "*batch"]:
    """Return which rows to take."""
    if not isinstance(stats, LossStats):
        raise error("stats_type", given=type(stats).__name__)
    if mask is None:
        return stats.valid
    mask = jnp.asarray(mask)
    check_batch_operand("mask", mask.shape, mask.dtype.name, stats.valid.shape)
    return stats.valid & jnp.broadcast_to(mask, stats.valid.shape)


def _denominator(denominator: float | Float[ArrayLike, ""]) -> _Pair:
    """Return what the caller passes as denominator, a number or a scalar array, in two parts."""
    check_denominator(denominator)
    if isinstance(denominator, int | float):
        high = np.asarray(denominator, jnp.zeros((), float).dtype)
        return jnp.asarray(high), jnp.asarray(denominator - float(high), float)
    array = jnp.asarray(denominator)
    check_denominator_array(array.shape, array.dtype.name)
    return _pair(array.astype(int)) if is_integer(array.dtype.name) else _sum(array)


# The sums of parts of 10 bits over so many rows are whole numbers of 30 bits.
_MAX_ROWS = 2**20


def _sum_of_fractions(values: Float[Array, " N"], in_bin: Bool[Array, "bins N"]) -> _Pair:
    """Return the sum in each bin of numbers from 0 to 1, rounded to multiples of 2^-30.

    As whole numbers, in parts of 10 bits: a compiler adds these up many at a time, unlike numbers in two parts.
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
    """Return the sum over all dimensions of numbers, or of the sums of two."""
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
    # inf - inf: an infinite sum has no rest.
    return total, jnp.where(jnp.isfinite(total), rest, 0)
