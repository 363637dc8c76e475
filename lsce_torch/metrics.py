"""Streaming metrics for torch from the statistics of the loss, without a second sweep over the logits.

Every metric is a ratio of sums, and keeps the sums. So metrics of shards of the data, from devices, hosts or days,
merge into the metric of the whole; means of means do not. The sums are float64, in which whole numbers are exact up to
2^53 and the order of summation does not show in the float32 result. All are metrics of torchmetrics: Lightning logs
them, `MetricCollection` holds them together, and processes add up their sums.

Before each class stands the function that computes its sums of one batch; the class only adds them up.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lsce_spec import (
    LossOptions,
    check_batch_operand,
    check_class_num,
    check_denominator,
    check_denominator_array,
    is_number,
)
from lsce_spec.extras import require
from lsce_spec.keywords import hinting
from lsce_torch.errors import error
from lsce_torch.inputs import at_labels, dtype_name, prepare, tensor_of, warn_of_bad_labels
from lsce_torch.stats import LossStats

require("lsce_torch.metrics", "metrics", "torchmetrics")

from torchmetrics import Metric


class _Sums(Metric):
    """Sums by name.

    Different metrics need different names: `MetricCollection` lets metrics share one state if their sums have the same
    names and, after the first batch, the same values.
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
        """Return a quotient of two sums; NaN before the first row."""
        ratio: Tensor = getattr(self, total) / getattr(self, count)
        return ratio.float()


def _mean_loss_sums(
    stats: LossStats, denominator: float | Float[Tensor, ""] | None, mask: Bool[Tensor, "..."] | None
) -> dict[str, Tensor]:
    rows = _rows(stats, mask)
    return {
        "loss": _sum(torch.where(rows, stats.smoothed, 0)) + _sum(torch.where(rows, stats.z, 0)),
        "denominator": _sum(rows) if denominator is None else _denominator(denominator, rows.device),
    }


class MeanLoss(_Sums):
    """Mean of the training loss over all rows seen, as `reduction="mean"` gives it for one batch.

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

    @hinting
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
            denominator: what the batch adds to the divisor of the mean; None adds the number of rows that count. With
                class weights pass the sum of the weights of the labels that count.
            mask: which of the rows that the loss counted to include.

        Raises:
            TypeError, ValueError: an argument that is not as described.
        """
        self._add(**_mean_loss_sums(stats, denominator, mask))

    def compute(self) -> Float[Tensor, ""]:
        """Return the mean; NaN if no row was seen."""
        return self._ratio("loss", "denominator")


class _Mean(_Sums):
    """Mean of one of the statistics over all rows seen. The sums have its name, so that no two metrics share them."""

    _statistic: ClassVar[str]

    def __init__(self, **options: Any) -> None:
        """Start with nothing seen."""
        super().__init__(self._statistic, "count", **options)

    @hinting
    def update(self, *, stats: LossStats, mask: Bool[Tensor, "..."] | None = None) -> None:
        """Add a batch; see `MeanLoss.update` for `stats` and `mask`."""
        rows = _rows(stats, mask)
        values = torch.where(rows, getattr(stats, self._statistic), 0)
        self._add(**{self._statistic: _sum(values), "count": _sum(rows)})

    def compute(self) -> Float[Tensor, ""]:
        """Return the mean; NaN if no row was seen."""
        return self._ratio(self._statistic, "count")


class MeanNLL(_Mean):
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
    _statistic = "nll"


class Perplexity(MeanNLL):
    """Exponential of the mean cross-entropy with the labels as they are, over all rows seen.

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


class MeanEntropy(_Mean):
    """Mean entropy of the model's distribution, in nats: how uncertain its predictions are, whatever the labels.

    Example:
        >>> import torch
        >>> from lsce_torch import label_smoothed_cross_entropy_with_stats
        >>> metric = MeanEntropy()
        >>> _, stats = label_smoothed_cross_entropy_with_stats(torch.zeros((3, 8)), torch.tensor([0, 1, 2]))
        >>> metric.update(stats=stats)
        >>> f"{metric.compute():.4f}"  # log 8
        '2.0794'
    """

    higher_is_better = None
    _statistic = "entropy"


class Accuracy(_Mean):
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
    _statistic = "correct"


def _top_k_accuracy_sums(
    k: int,
    stats: LossStats,
    mask: Bool[Tensor, "..."] | None,
    logits: Float[Tensor, "..."],
    labels: Int[Tensor, "..."] | Float[Tensor, "..."],
    **keywords: Any,
) -> dict[str, Tensor]:
    rows = _rows(stats, mask)
    options = LossOptions()
    batch = prepare(logits, labels, options, keywords)
    if batch.batch_shape != tuple(stats.valid.shape):
        raise error("stats_shape", expected=list(stats.valid.shape), given=list(batch.batch_shape))
    num_classes = batch.logits.shape[-1]
    if k > num_classes:
        raise error("top_k", k=k, given=num_classes)
    batch = batch.counting_only(rows)
    warn_of_bad_labels(labels, batch, options)
    labels = (torch.argmax(batch.labels, dim=-1) if batch.soft else batch.labels)[..., None]
    classes = torch.arange(num_classes, device=labels.device)
    label_logit = torch.gather(batch.logits, -1, labels)
    larger = (batch.logits > label_logit) | ((batch.logits == label_logit) & (classes < labels))
    # A label that is not a class has no rank, and neither has any label of a row that holds a NaN.
    found = ~torch.isnan(stats.nll)
    if batch.class_mask is not None:
        larger &= batch.class_mask
        found &= at_labels(batch.class_mask, labels[..., 0])
    found &= torch.sum(larger, dim=-1) < k
    return {f"correct_in_top_{k}": _sum(rows & found), "count": _sum(rows)}


class TopKAccuracy(_Sums):
    """Share of rows whose label is among the k largest logits; of equal logits the first counts as larger.

    Args:
        k: how many logits, at least 1; with 1 it is `Accuracy`.

    Raises:
        TypeError: k is not an integer.
        ValueError: k is below 1.

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

    @hinting
    def update(
        self,
        *,
        stats: LossStats,
        logits: Float[Tensor, "..."],
        labels: Int[Tensor, "..."] | Float[Tensor, "..."],
        axis: int = -1,
        class_mask: Bool[Tensor, "..."] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
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

    def compute(self) -> Float[Tensor, ""]:
        """Return the share; NaN if no row was seen."""
        return self._ratio(*self._names)


def _calibration_error_sums(num_bins: int, stats: LossStats, mask: Bool[Tensor, "..."] | None) -> dict[str, Tensor]:
    rows, confidence = _rows(stats, mask).reshape(-1), stats.confidence.reshape(-1)
    edges = torch.arange(1, num_bins, dtype=confidence.dtype, device=confidence.device) / num_bins
    # The number of edges below. NaN is above all of them and makes the last bin NaN, and so the result.
    place = torch.searchsorted(edges, confidence)
    empty = torch.zeros(num_bins, dtype=torch.float64, device=confidence.device)
    return {
        "confidence": empty.index_add(0, place, torch.where(rows, confidence, 0).double()),
        "correct": empty.index_add(0, place, (rows & stats.correct.reshape(-1)).double()),
        "count": empty.index_add(0, place, rows.double()),
    }


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

    @hinting
    def update(self, *, stats: LossStats, mask: Bool[Tensor, "..."] | None = None) -> None:
        """Add a batch; see `MeanLoss.update` for `stats` and `mask`."""
        self._add(**_calibration_error_sums(self.num_bins, stats, mask))

    def compute(self) -> Float[Tensor, ""]:
        """Return the error, from 0 to 1; NaN if no row was seen."""
        confidence, correct, count = (getattr(self, name) for name in self._names)
        surplus: Tensor = torch.sum(torch.abs(confidence - correct))
        return (surplus / torch.sum(count)).float()


def _rows(stats: LossStats, mask: Bool[Tensor, "..."] | None) -> Bool[Tensor, "*batch"]:
    """Return which rows to include."""
    if not isinstance(stats, LossStats):
        raise error("stats_type", given=type(stats).__name__)
    if mask is None:
        return stats.valid
    mask = torch.as_tensor(mask, device=stats.valid.device)
    check_batch_operand("mask", tuple(mask.shape), dtype_name(mask), tuple(stats.valid.shape))
    return stats.valid & torch.broadcast_to(mask, stats.valid.shape)


def _denominator(denominator: float | Float[Tensor, ""], device: torch.device) -> Float[Tensor, ""]:
    """Return the caller's denominator, a number or a scalar tensor, as a tensor."""
    check_denominator(denominator)
    if is_number(denominator):
        return tensor_of(float(denominator), torch.float64, device)
    tensor = torch.as_tensor(
        denominator, device=device, dtype=None if isinstance(denominator, Tensor) else torch.float64
    )
    check_denominator_array(tuple(tensor.shape), dtype_name(tensor))
    return tensor.detach().double()


def _sum(values: Tensor) -> Float[Tensor, ""]:
    return torch.sum(values, dtype=torch.float64)
