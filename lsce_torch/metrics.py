"""Streaming metrics for torch, fed by the statistics of the loss: no second sweep over the logits, no second softmax.

Every metric is a ratio of sums, and the sums are what it keeps. So shards of the data, on devices, hosts or days, merge
into exactly what the whole would have given, which means of means do not. The sums are float64, where whole numbers are
exact up to 2^53 and the order of summation does not show in the result, which is float32. They are metrics of
torchmetrics: Lightning logs them, `MetricCollection` holds them together, and processes add up their sums.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lsce_spec import (
    LossOptions,
    check_batch_operand,
    check_class_num,
    check_denominator,
    check_denominator_array,
    error,
)
from lsce_torch.inputs import at_labels, dtype_name, prepare
from lsce_torch.stats import LossStats

try:
    from torchmetrics import Metric
except ModuleNotFoundError as problem:
    raise error("no_torchmetrics") from problem


class _Sums(Metric):
    """Sums by name.

    No two metrics that differ have the same names: in a `MetricCollection` those whose sums have the same names and,
    after the first batch, the same values would share one state from then on.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, *names: str, shape: tuple[int, ...] = (), **options: Any) -> None:
        super().__init__(**options)
        self._names, self._shape = names, shape
        for name in names:
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, **terms: Float[Tensor, "..."]) -> None:
        for name, term in terms.items():
            setattr(self, name, getattr(self, name) + term)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Move the sums, as `.to(device)` asks, but leave them float64: `.to(torch.bfloat16)` is meant for weights."""

        def move(value: Tensor) -> Tensor:
            moved = fn(value)
            return moved if moved.dtype == value.dtype else value.to(moved.device)

        return super()._apply(move, exclude_state)

    def _ratio(self, total: str, count: str) -> Float[Tensor, "..."]:
        """Return a quotient of two sums; NaN where nothing was seen."""
        ratio: Tensor = getattr(self, total) / getattr(self, count)
        return ratio.float()


class MeanLoss(_Sums):
    """Mean of the loss that is trained on: over all rows seen, the one of `reduction="mean"`.

    Example:
        >>> import torch
        >>> from lsce_torch import label_smoothed_cross_entropy_with_stats
        >>> metric = MeanLoss()
        >>> for logits, label in (([2.0, 0.0, 0.0], 0), ([0.0, 0.0, 3.0], 2)):
        ...     _, stats = label_smoothed_cross_entropy_with_stats(torch.tensor(logits), torch.tensor(label))
        ...     metric.update(stats=stats)
        >>> f"{metric.compute():.4f}"
        '0.3339'
    """

    higher_is_better = False

    def __init__(self, **options: Any) -> None:
        """Start with nothing seen."""
        super().__init__("loss", "denominator", **options)

    def update(
        self,
        *,
        stats: LossStats,
        denominator: float | Float[Tensor, ""] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
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
        loss = _sum(torch.where(rows, stats.smoothed, 0)) + _sum(torch.where(rows, stats.z, 0))
        counted = _sum(rows) if denominator is None else _denominator(denominator, rows.device)
        self._add(loss=loss, denominator=counted)

    def compute(self) -> Float[Tensor, ""]:
        """Return the mean; NaN if no row was seen."""
        return self._ratio("loss", "denominator")


class MeanNLL(_Sums):
    """Mean cross-entropy with the labels as they are, neither smoothed nor weighted, in nats.

    Example:
        >>> import torch
        >>> from lsce_torch import label_smoothed_cross_entropy_with_stats
        >>> metric = MeanNLL()
        >>> _, stats = label_smoothed_cross_entropy_with_stats(torch.zeros((3, 8)), torch.tensor([0, 1, 2]))
        >>> metric.update(stats=stats)
        >>> f"{metric.compute():.4f}"  # log 8
        '2.0794'
    """

    higher_is_better = False

    def __init__(self, **options: Any) -> None:
        """Start with nothing seen."""
        super().__init__("nll", "count", **options)

    def update(self, *, stats: LossStats, mask: Bool[Tensor, "..."] | None = None) -> None:
        """Add a batch: `stats` as for `MeanLoss.update`, `mask` the rows to take of those that the loss counted."""
        rows = _rows(stats, mask)
        self._add(nll=_sum(torch.where(rows, stats.nll, 0)), count=_sum(rows))

    def compute(self) -> Float[Tensor, ""]:
        """Return the mean; NaN if no row was seen."""
        return self._ratio("nll", "count")


class Perplexity(MeanNLL):
    """Exponential of the mean cross-entropy with the labels as they are: over all rows, not a mean over batches.

    Example:
        >>> import torch
        >>> from lsce_torch import label_smoothed_cross_entropy_with_stats
        >>> metric = Perplexity()
        >>> _, stats = label_smoothed_cross_entropy_with_stats(torch.zeros((3, 8)), torch.tensor([0, 1, 2]))
        >>> metric.update(stats=stats)
        >>> f"{metric.compute():.4f}"
        '8.0000'
    """

    def compute(self) -> Float[Tensor, ""]:
        """Return the perplexity; NaN if no row was seen."""
        return torch.exp(super().compute())


class Accuracy(_Sums):
    """Share of rows whose label is the (first) largest logit; for soft labels, their own (first) largest.

    Example:
        >>> import torch
        >>> from lsce_torch import label_smoothed_cross_entropy_with_stats
        >>> logits, labels = torch.eye(3), torch.tensor([0, 1, 0])
        >>> metric = Accuracy()
        >>> metric.update(stats=label_smoothed_cross_entropy_with_stats(logits, labels)[1])
        >>> f"{metric.compute():.4f}"
        '0.6667'
    """

    higher_is_better = True

    def __init__(self, **options: Any) -> None:
        """Start with nothing seen."""
        super().__init__("correct", "count", **options)

    def update(self, *, stats: LossStats, mask: Bool[Tensor, "..."] | None = None) -> None:
        """Add a batch: `stats` as for `MeanLoss.update`, `mask` the rows to take of those that the loss counted."""
        rows = _rows(stats, mask)
        self._add(correct=_sum(rows & stats.correct), count=_sum(rows))

    def compute(self) -> Float[Tensor, ""]:
        """Return the share; NaN if no row was seen."""
        return self._ratio("correct", "count")


class TopKAccuracy(_Sums):
    """Share of rows whose label is among the k largest logits; of equal logits the first is taken for the larger.

    Args:
        k: how many logits, at least 1; with 1 it is `Accuracy`.

    Raises:
        ValueError: k is no integer or below 1.

    Example:
        >>> import torch
        >>> from lsce_torch import label_smoothed_cross_entropy_with_stats
        >>> logits, labels = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), torch.tensor([1, 2])
        >>> metric = TopKAccuracy(2)
        >>> _, stats = label_smoothed_cross_entropy_with_stats(logits, labels)
        >>> metric.update(stats=stats, logits=logits, labels=labels)
        >>> f"{metric.compute():.4f}"
        '0.5000'
    """

    higher_is_better = True

    def __init__(self, k: int, **options: Any) -> None:
        """Start with nothing seen."""
        check_class_num(k, name="k")
        super().__init__(f"correct_in_top_{k}", "count", **options)
        self.k = k

    def update(
        self,
        *,
        stats: LossStats,
        logits: Float[Tensor, "..."],
        labels: Int[Tensor, "..."] | Float[Tensor, "..."],
        axis: int = -1,
        class_mask: Bool[Tensor, " K"] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
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
        batch = prepare(
            logits,
            labels,
            LossOptions(),
            axis=axis,
            where=None,
            prior=None,
            class_weight=None,
            class_mask=class_mask,
        )
        if batch.batch_shape != tuple(stats.valid.shape):
            raise error("stats_shape", expected=list(stats.valid.shape), given=list(batch.batch_shape))
        num_classes = batch.logits.shape[-1]
        if self.k > num_classes:
            raise error("top_k", k=self.k, given=num_classes)
        labels = (torch.argmax(batch.labels, dim=-1) if batch.soft else batch.labels)[..., None]
        classes = torch.arange(num_classes, device=labels.device)
        at_label = torch.gather(batch.logits, -1, labels)
        larger = (batch.logits > at_label) | ((batch.logits == at_label) & (classes < labels))
        # A label that is no class has no rank, nor has any in a row that holds a NaN.
        found = ~torch.isnan(stats.nll)
        if batch.class_mask is not None:
            larger &= batch.class_mask
            found &= at_labels(batch.class_mask, labels[..., 0])
        found &= torch.sum(larger, dim=-1) < self.k
        self._add(**{self._names[0]: _sum(rows & found)}, count=_sum(rows))

    def compute(self) -> Float[Tensor, ""]:
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
        >>> import torch
        >>> from lsce_torch import label_smoothed_cross_entropy_with_stats
        >>> metric = CalibrationError()
        >>> _, stats = label_smoothed_cross_entropy_with_stats(torch.zeros((4, 2)), torch.tensor([0, 0, 0, 1]))
        >>> metric.update(stats=stats)
        >>> f"{metric.compute():.4f}"
        '0.2500'

    References:
        Guo et al., "On Calibration of Modern Neural Networks", 2017, section 2.
    """

    higher_is_better = False

    def __init__(self, num_bins: int = 15, **options: Any) -> None:
        """Start with nothing seen."""
        check_class_num(num_bins, name="num_bins")
        super().__init__("confidence", "correct", "count", shape=(num_bins,), **options)
        self.num_bins = num_bins

    def update(self, *, stats: LossStats, mask: Bool[Tensor, "..."] | None = None) -> None:
        """Add a batch: `stats` as for `MeanLoss.update`, `mask` the rows to take of those that the loss counted."""
        rows, confidence = _rows(stats, mask).reshape(-1), stats.confidence.reshape(-1)
        edges = torch.arange(1, self.num_bins, dtype=confidence.dtype, device=confidence.device) / self.num_bins
        # The number of edges below; NaN, above all of them, makes the last bin NaN and with it the result.
        place = torch.searchsorted(edges, confidence)
        empty = torch.zeros(self.num_bins, dtype=torch.float64, device=confidence.device)
        self._add(
            confidence=empty.index_add(0, place, torch.where(rows, confidence, 0).double()),
            correct=empty.index_add(0, place, (rows & stats.correct.reshape(-1)).double()),
            count=empty.index_add(0, place, rows.double()),
        )

    def compute(self) -> Float[Tensor, ""]:
        """Return the error, from 0 to 1; NaN if no row was seen."""
        confidence, correct, count = (getattr(self, name) for name in self._names)
        surplus: Tensor = torch.sum(torch.abs(confidence - correct))
        return (surplus / torch.sum(count)).float()


def _rows(stats: LossStats, mask: Bool[Tensor, "..."] | None) -> Bool[Tensor, "*batch"]:
    """Return which rows to take."""
    if not isinstance(stats, LossStats):
        raise error("stats_type", given=type(stats).__name__)
    if mask is None:
        return stats.valid
    mask = torch.as_tensor(mask, device=stats.valid.device)
    check_batch_operand("mask", tuple(mask.shape), dtype_name(mask), tuple(stats.valid.shape))
    return stats.valid & torch.broadcast_to(mask, stats.valid.shape)


def _denominator(denominator: float | Float[Tensor, ""], device: torch.device) -> Float[Tensor, ""]:
    """Return what the caller passes as denominator, a number or a tensor of one."""
    check_denominator(denominator)
    tensor = torch.as_tensor(
        denominator, device=device, dtype=None if isinstance(denominator, Tensor) else torch.float64
    )
    check_denominator_array(tuple(tensor.shape), dtype_name(tensor))
    return tensor.detach().double()


def _sum(values: Tensor) -> Float[Tensor, ""]:
    return torch.sum(values, dtype=torch.float64)
