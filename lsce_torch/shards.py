"""Sums, losses and gradients of rows whose classes are divided over ranks.

`vocab_parallel.py` says what the ranks send. The derivatives are those of one loss: what is the same on every rank, as
are the sums over all classes and the upstream gradient, counts once.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from lsce_spec import LossOptions, check_prior_sum, is_number
from lsce_torch import fused, reference, saved
from lsce_torch.device import is_on_cpu
from lsce_torch.errors import error
from lsce_torch.inputs import (
    Batch,
    Given,
    at_labels,
    canonical,
    compute_dtype,
    name_of,
    raise_bad_label,
    warn_of_bad_labels,
)
from lsce_torch.layer import Gradients, Layer, Settings, chunks, multiplied
from lsce_torch.overwrite import has_memory
from lsce_torch.plain import (
    Parts,
    Peaks,
    parts_of_shard,
    peaks_and_parts_of_shard,
    peaks_of_shard,
    plain_gradients,
    relative_to,
    sums_of_parts,
)
from lsce_torch.ranks import Ranks, Told, checks_everything, largest, least, place_of, tell, total
from lsce_torch.reductions import mean_divisor
from lsce_torch.stats import LossStats
from lsce_torch.sums import (
    ROWS,
    Operands,
    Sums,
    Upstreams,
    losses_of,
    stacked_of,
    statistics_of,
    target_gradients,
    target_slopes,
    unstacked,
)

# Logits of a block of rows: 4 MiB in float32. Accelerators start each operation slowly; there it is 256 MiB.
_BLOCK_SIZE, _BLOCK_SIZE_ELSEWHERE = 2**20, 2**26


class Shard(NamedTuple):
    """Which of all classes this rank has.

    Args:
        ranks: of the group.
        num_classes: of all ranks.
        start: which class is this rank's first.
        num_allowed: how many classes of all ranks take part, where rows have no masks of their own.
    """

    ranks: Ranks
    num_classes: Int[Tensor, ""]
    start: Int[Tensor, ""]
    num_allowed: Float[Tensor, ""]


def shard_of(
    given: Given,
    options: LossOptions,
    keywords: Mapping[str, Any],
    statistics: int,
    ranks: Ranks,
    hidden: Float[Tensor, "*batch D"] | None = None,
) -> tuple[Shard, Batch]:
    """Return this rank's classes, and its rows in one dimension. The labels count over all classes.

    Args:
        given: the checked tensors of the call.
        options: of the call.
        keywords: `prior` and `denominator` of the call.
        statistics: see `row_losses`.
        ranks: of the group.
        hidden: the features of the layer that makes the logits, or None.

    Raises:
        ValueError: the ranks disagree, no rank has a class, or the prior of all classes is no distribution.
        RuntimeError: another rank has failed.
    """
    logits, class_mask = given.logits, given.class_mask
    by_row = class_mask is not None and class_mask.ndim > 1
    sums: dict[str, Tensor | float] = {
        "allowed": float(logits.shape[-1]) if class_mask is None or by_row else class_mask.sum(),
        "prior": 0.0 if given.prior is None else given.prior.double().sum(),
    }
    told = Told(
        num_classes=logits.shape[-1],
        num_rows=math.prod(logits.shape[:-1]),
        shared=_shared(given, options, keywords, statistics, 0 if hidden is None else hidden.shape[-1]),
        tensors=_tensors_that_agree(given, options, keywords, hidden),
        sums=sums,
    )
    classes, heard = tell(told, ranks, logits.device)
    if given.prior is not None and is_on_cpu(logits) and not torch.compiler.is_compiling():
        as_given = keywords["prior"]
        dtype = as_given.dtype if isinstance(as_given, Tensor) else given.prior.dtype
        check_prior_sum(heard["prior"].item(), torch.finfo(dtype).eps / 2)
    classes = classes.to(torch.int64)
    shard = Shard(ranks, classes.sum(), classes[: ranks.rank].sum(), heard["allowed"])
    batch = canonical(replace(given, class_mask=None), options, shard.num_classes)
    warn_of_bad_labels(given.labels, batch, options, shard.num_classes)
    return shard, _flat(batch, class_mask)


def _shared(
    given: Given, options: LossOptions, keywords: Mapping[str, Any], statistics: int, num_features: int
) -> dict[str, float]:
    """Return what must be the same on every rank, as numbers. torch.compile has no values of numbers at hand."""

    def number(value: object) -> float:
        return float(value) if is_number(value) and not torch.compiler.is_compiling() else math.nan  # type: ignore[arg-type]

    def kind(value: object) -> int:
        return 2 if isinstance(value, Tensor) else int(value is not None)

    def kind_of_rows(value: object) -> int:
        return 3 if isinstance(value, Tensor) and value.ndim else kind(value)

    mask = given.class_mask
    return {
        "the dtype of the logits": place_of("the dtype of the logits", name_of(given.logits.dtype)),
        "the number of features": number(num_features),
        "the kind of labels": given.labels.is_floating_point(),
        "the kind of class_mask": 0 if mask is None else min(mask.ndim, 2),
        "the kind of statistics": statistics,
        "convention": place_of("convention", options.convention.name),
        "reduction": place_of("reduction", options.reduction),
        "bad_labels": place_of("bad_labels", options.bad_labels),
        "subtract_entropy": options.subtract_entropy,
        "the kind of prior": kind(given.prior),
        "the kind of class_weight": kind(given.class_weight),
        "the kind of where": kind(given.where),
        "the kind of ignore_index": kind(options.ignore_index),
        "the kind of softcap": kind(options.softcap),
        "the kind of smoothing": kind_of_rows(options.smoothing),
        "the kind of denominator": kind(keywords["denominator"]),
        "ignore_index": number(options.ignore_index),
        "z_loss": number(options.z_loss),
        "softcap": number(options.softcap),
        "smoothing": number(options.smoothing),
        "denominator": number(keywords["denominator"]),
    }


def _tensors_that_agree(
    given: Given, options: LossOptions, keywords: Mapping[str, Any], hidden: Float[Tensor, "*batch D"] | None
) -> dict[str, Tensor]:
    """Return the tensors that must be the same on every rank, by name. For a smoothing of all rows it is a scalar."""
    smoothing, denominator = options.smoothing, keywords["denominator"]
    is_scalar = isinstance(smoothing, Tensor) and not smoothing.ndim
    by_row = {"smoothing": None if is_scalar else given.smoothing, "hidden": hidden}
    tensors = rows_that_agree(given.labels, given.where, options.ignore_index, by_row)
    if is_scalar:
        tensors["smoothing"] = smoothing
    if isinstance(denominator, Tensor):
        # Ranks may have added it up in different orders.
        tensors["denominator"] = denominator.to(torch.float32)
    return tensors


def rows_that_agree(
    labels: Int[Tensor, "*batch"] | Float[Tensor, "*batch K"],
    where: Bool[Tensor, "*#batch"] | None,
    ignore_index: int | None,
    others: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Return the rows that must be the same on every rank, by name; of rows that do not count, a constant.

    Args:
        labels: class indices, or this rank's slice of probabilities, which ranks do not share.
        where: of the call.
        ignore_index: of the call.
        others: tensors with one more dimension than the losses, by name. `hidden`, which may be large, is compared only
            with TORCH_DISTRIBUTED_DEBUG=DETAIL.
    """
    rows: dict[str, Tensor] = {}
    counted = where
    if where is not None:
        rows["where"] = where
    if not labels.is_floating_point():
        if where is not None:
            counted = where = rows["where"] = where.expand(labels.shape)
            labels = torch.where(where, labels, 0)
        rows["labels"] = labels
    for name, value in others.items():
        if not isinstance(value, Tensor) or (name == "hidden" and not checks_everything()):
            continue
        if ignore_index is not None and not labels.is_floating_point():
            is_counted = labels != ignore_index
            counted = is_counted if where is None else where & is_counted
        rows[name] = value if counted is None else torch.where(counted[..., None], value, 0)
    return rows


def _flat(batch: Batch, class_mask: Bool[Tensor, " K"] | Bool[Tensor, "*batch K"] | None) -> Batch:
    """Return the batch with its rows in one dimension, and with a class mask."""
    num_rows = math.prod(batch.batch_shape)
    counted = None if batch.counted is None else batch.counted.reshape(-1)
    if class_mask is not None and class_mask.ndim > 1:
        class_mask = class_mask.reshape(num_rows, class_mask.shape[-1])
        if counted is not None:
            class_mask = class_mask | ~counted[:, None]  # as in `Batch.counting_only`
    return replace(
        batch,
        logits=batch.logits.reshape(num_rows, batch.logits.shape[-1]),
        labels=batch.labels.reshape(num_rows, batch.labels.shape[-1]) if batch.soft else batch.labels.reshape(-1),
        smoothing=batch.smoothing.reshape(-1, 1) if isinstance(batch.smoothing, Tensor) else batch.smoothing,
        counted=counted,
        bad=None if batch.bad is None else batch.bad.reshape(-1),
        class_mask=class_mask,
    )


class _Places:
    """Where the labels are among the classes of this rank."""

    def __init__(self, batch: Batch, shard: Shard) -> None:
        """Compare the labels with this rank's classes."""
        self.num_classes = batch.logits.shape[-1]
        place = batch.labels - shard.start
        self.are_here = (place >= 0) & (place < self.num_classes)
        self.places = torch.where(self.are_here, place, 0)

    def value(self, vector: Tensor) -> Tensor:
        """Return the entry of a vector over the classes, or of one for each row, at each label; 0 if it is not here."""
        if not self.num_classes:
            return torch.zeros_like(self.are_here, dtype=vector.dtype)
        found = at_labels(vector, self.places)
        return torch.where(self.are_here, found, torch.zeros_like(found))


class _OfAll(NamedTuple):
    """What the ranks have told each other of rows.

    Args:
        sums: over the classes of all ranks.
        columns: other sums over these, by name; see `_columns`.
        prediction: the first largest logit, with statistics.
        labels: the first largest entry of soft labels, with statistics.
    """

    sums: Sums
    columns: dict[str, Float[Tensor, " N"]]
    prediction: Int[Tensor, " N"] | None
    labels: Int[Tensor, " N"] | None


class ShardedLayer(NamedTuple):
    """The linear layer that makes the logits of this rank's classes.

    Args:
        layer: hidden in one dimension of rows, and this rank's weight and bias.
        chunk_size: how many rows to take at a time.
    """

    layer: Layer
    chunk_size: int

    def settings(self, needs: Sequence[bool] = (False, False, False)) -> Settings:
        """Return how to go through the rows."""
        return Settings(self.chunk_size, total=False, gradient_filter=0.0, needs=needs)


def row_losses(
    shard: Shard,
    batch: Batch,
    options: LossOptions,
    denominator: float | Tensor | None,
    statistics: int,
    layer: ShardedLayer | None = None,
) -> tuple[Float[Tensor, " N"], LossStats | None, float | Tensor]:
    """Return the loss of each row, the statistics if asked for, and what the mean divides by.

    Args:
        shard: the classes of this rank.
        batch: the rows, in one dimension.
        options: of the call.
        denominator: of the call.
        statistics: 0 for none, 1 for constants, 2 if gradients flow through them.
        layer: makes the logits, of which only shape and dtype are used then; or None.
    """
    batch = replace(batch, num_allowed=_num_allowed(shard, batch))
    operands, of_all = _told_of_rows(shard, batch, options, statistics, layer)
    columns = of_all.columns
    if "label in class_mask" in columns:
        bad = columns["label in class_mask"] == 0
        bad = bad if batch.counted is None else bad & batch.counted
        bad = bad if batch.bad is None else bad | batch.bad
        if options.bad_labels == "raise":
            bad = raise_bad_label(batch.labels, bad, True, shard.num_classes)
        batch = replace(batch, bad=bad)
        warn_of_bad_labels(batch.labels, batch, options, shard.num_classes)
    batch, divisor = mean_divisor(batch, options, denominator, columns.get("class_weight at the label"))
    entropy: float | Tensor | None
    if batch.soft:
        mass, entropy = columns["mass of the target"], columns.get("entropy of the target")
        operands = operands._replace(on=0.0, off=1.0, other_mass=mass)
    else:
        target = fused.index_target(
            batch,
            options,
            lambda name, _: columns[f"{name} at the label"],
            lambda name, _: columns[f"{name} of the others"],
        )
        entropy = target.entropy
        operands = operands._replace(**{name: getattr(target, name) for name in ("on", "off", "other_mass", "at_max")})
    operands = operands._replace(bad=batch.bad, counted=batch.counted)
    if layer is None:
        losses, found = _losses(_Logits(batch.logits), operands, of_all.sums)
    else:
        source = _Layer(*layer.layer, layer.chunk_size, shard.ranks)
        losses, found = _losses(source, operands, of_all.sums)
    if entropy is not None:
        losses = losses - entropy
        if batch.counted is not None:
            losses = torch.where(batch.counted, losses, 0)
    if found is None or of_all.prediction is None:
        return losses, None, divisor
    if batch.soft and of_all.labels is not None:
        found = (_nll_of_soft_labels(batch, operands, of_all), *found[1:])
        batch = replace(batch, labels=of_all.labels)
    stats = fused.stats_of(batch, options, operands, entropy, of_all.sums, of_all.prediction, found)
    return losses, stats, divisor


def _num_allowed(shard: Shard, batch: Batch) -> Float[Tensor, ""] | Float[Tensor, "N 1"]:
    """Return how many classes of all ranks take part; with masks of rows, those of each row."""
    if batch.class_mask is None or not batch.has_row_masks:
        return shard.num_allowed.to(batch.dtype)
    allowed = torch.sum(batch.class_mask, dim=-1, keepdim=True).to(batch.dtype)
    return total(allowed, shard.ranks, [shard.num_allowed])


def _told_of_rows(
    shard: Shard, batch: Batch, options: LossOptions, statistics: int, layer: ShardedLayer | None
) -> tuple[Operands, _OfAll]:
    """Return the operands, without the target's numbers of each row, and what the ranks tell each other of the rows."""
    places, target = (None, fused.soft_target(batch, options)) if batch.soft else (_Places(batch, shard), None)
    operands = Operands(
        labels=None if places is None else torch.where(places.are_here, places.places, -1),
        counted=batch.counted,
        bad=None,
        class_mask=batch.class_mask,
        factor=fused.class_vectors(batch, options).get("factor") if target is None else target.factor,
        on=0.0,
        off=0.0,
        other_mass=0.0,
        at_max=None if target is not None or options.convention.at_max is None else 0.0,
        z_loss=options.z_loss,
        softcap=options.softcap,
        with_stats=statistics > 0,
        differentiable=statistics > 1,
        kernels=False,
    )
    own, first, parts_of_own = _own_peaks(batch.logits.detach() if layer is None else layer, operands)
    of_all, prediction, labels = _peaks(shard, batch, operands, own, first)
    told = [of_all.largest] if prediction is None else [of_all.largest, prediction]
    if target is not None and options.convention.at_max is not None:
        factor, num_largest = _with_at_max(shard, batch, options, operands.factor, told)
        operands = operands._replace(factor=factor)
        told.append(num_largest)
    columns = _columns(batch, options, places, target, operands.factor)
    if batch.soft and statistics:
        columns["mass of the labels"] = torch.sum(_soft_labels(batch), dim=-1)
    here = None
    if parts_of_own is not None and places is not None:
        here = relative_to(of_all, own, parts_of_own, *_masses(batch, places, columns))
    parts, columns = _parts(shard, batch, operands, of_all, columns, told, here)
    return operands, _OfAll(sums_of_parts(parts, of_all, operands), columns, prediction, labels)


def _own_peaks(
    source: Tensor | ShardedLayer, operands: Operands
) -> tuple[Peaks, Int[Tensor, " N"] | None, Parts | None]:
    """Return the largest logits of this rank's classes, and for statistics which is the first.

    Of a layer also the sums over its classes, so that its logits need not be computed again for them.
    """
    if isinstance(source, ShardedLayer):
        found = [
            (*own[:2], first, *parts) for own, first, parts in _by_blocks(peaks_and_parts_of_shard, source, operands)
        ]
    else:
        found = [(*own[:2], first) for own, first in _by_blocks(peaks_of_shard, source, operands)]
    largest_here, peak_here, first, *parts = _joined(found)
    assert largest_here is not None
    assert peak_here is not None
    return Peaks(largest_here, peak_here), first, Parts._make(parts) if parts else None


def _masses(
    batch: Batch, places: _Places, columns: Mapping[str, Float[Tensor, " N"]]
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return how many labels of each row are here, and what the gaps of the other classes are multiplied by in sum."""
    are_here = places.are_here.to(batch.dtype)
    if "factor of the others" in columns:
        return are_here, columns["factor of the others"]
    if batch.class_mask is None:
        return are_here, batch.logits.shape[-1] - are_here
    return are_here, torch.sum(batch.class_mask, dim=-1) - places.value(batch.class_mask).to(batch.dtype)


def _peaks(
    shard: Shard, batch: Batch, operands: Operands, own: Peaks, first: Int[Tensor, " N"] | None
) -> tuple[Peaks, Int[Tensor, " N"] | None, Int[Tensor, " N"] | None]:
    """Return the largest logits of all classes, and for statistics which is the first, and that of soft labels."""
    candidates = [own.largest] if operands.softcap is None else [own.largest, own.peak]
    places = [] if first is None else [first]
    if first is not None and batch.soft:
        label_here, first_label = _first_of_labels(batch)
        candidates, places = [*candidates, label_here], [first, first_label]
    assert batch.num_allowed is not None
    of_all = largest(torch.stack(candidates), shard.ranks, [batch.num_allowed]).unbind()
    peaks = Peaks(of_all[0], of_all[0] if operands.softcap is None else of_all[1])
    if not places:
        return peaks, None, None
    # Ranks without the largest have none that could be the first. With soft labels the last of both lists is theirs.
    of_others = torch.iinfo(torch.int64).max
    pairs = [(candidates[0], of_all[0]), (candidates[-1], of_all[-1])][: len(places)]
    first_here = [
        torch.where(here == all_, place + shard.start, of_others)
        for (here, all_), place in zip(pairs, places, strict=True)
    ]
    prediction, *labels = least(torch.stack(first_here), shard.ranks, of_all[:1]).unbind()
    return peaks, prediction, labels[0] if labels else None


def _first_of_labels(batch: Batch) -> tuple[Float[Tensor, " N"], Int[Tensor, " N"]]:
    """Return the largest entry of the soft labels that are here, and which is the first of that size."""
    if not batch.labels.shape[-1]:
        least_here = torch.full(batch.batch_shape, -torch.inf, dtype=batch.dtype, device=batch.labels.device)
        return least_here, torch.zeros_like(least_here, dtype=torch.int64)
    found = torch.max(batch.labels.to(batch.dtype), dim=-1)
    return found.values, found.indices


def _with_at_max(
    shard: Shard, batch: Batch, options: LossOptions, factor: Tensor | None, told: Sequence[Tensor]
) -> tuple[Float[Tensor, "N K"], Float[Tensor, " N"]]:
    """Return the weighted target of soft labels with what the convention adds, and how many logits are the largest.

    What the ranks have told before begins with the largest logits.
    """
    logits = batch.logits.detach().to(batch.dtype)
    if batch.class_mask is not None:
        logits = torch.where(batch.class_mask, logits, -torch.inf)
    is_largest = (logits == told[0][:, None]).to(batch.dtype)
    num_largest = total(is_largest.sum(dim=-1), shard.ranks, told)
    added = reference.at_max(batch, options) * is_largest / num_largest[:, None]
    assert factor is not None
    return factor + (added if batch.class_weight is None else added * batch.class_weight), num_largest


def _columns(
    batch: Batch, options: LossOptions, places: _Places | None, target: fused.Target | None, factor: Tensor | None
) -> dict[str, Float[Tensor, " N"]]:
    """Return the other numbers of each row that are sums over the classes, those of this rank, by name."""
    if places is None:
        assert target is not None
        assert factor is not None
        columns = {"mass of the target": torch.sum(factor, dim=-1)}
        if isinstance(target.entropy, Tensor):
            columns["entropy of the target"] = target.entropy
        return columns
    columns = {}
    if batch.class_mask is not None:
        columns["label in class_mask"] = places.value(batch.class_mask).to(batch.dtype)
    for name, vector in fused.class_vectors(batch, options).items():
        others = fused.sum_of_others(vector, batch.class_mask, places.value)
        columns[f"{name} of the others"] = others.expand(batch.batch_shape).to(batch.dtype)
        columns[f"{name} at the label"] = places.value(vector)
    return columns


def _soft_labels(batch: Batch) -> Float[Tensor, "N K"]:
    """Return the soft labels, 0 where they do not count."""
    labels = batch.labels.to(batch.dtype)
    for counts in (None if batch.counted is None else batch.counted[:, None], batch.class_mask):
        labels = labels if counts is None else torch.where(counts, labels, 0)
    return labels


def _parts(
    shard: Shard,
    batch: Batch,
    operands: Operands,
    of_all: Peaks,
    columns: dict[str, Tensor],
    told: Sequence[Tensor],
    here: Parts | None,
) -> tuple[Parts, dict[str, Float[Tensor, " N"]]]:
    """Return the sums over the classes of all ranks, relative to the largest logits, and the columns likewise.

    `told` is what the ranks have told before, and `here` the sums of this rank if they are known.
    """
    is_compiled = torch.compiler.is_compiling()
    with torch.set_grad_enabled(is_compiled and torch.is_grad_enabled()):
        logits = batch.logits if is_compiled else batch.logits.detach()
        parts = _parts_here(logits, operands, of_all) if here is None else here
        if "mass of the labels" in columns:
            of_labels = operands._replace(factor=_soft_labels(batch), with_stats=False)
            columns["gap of the labels"] = _parts_here(logits, of_labels, of_all).other_gaps
        rows = torch.stack([value for value in (*parts, *columns.values()) if value is not None])
    heard = iter(_total(rows, shard.ranks, told).unbind())
    parts = Parts._make(None if value is None else next(heard) for value in parts)
    if parts.num_largest is not None and parts.largest_mass is not None and parts.largest_gap is not None:
        masses = {"largest_mass": parts.largest_mass, "largest_gap": parts.largest_gap}
        parts = parts._replace(**{name: mass / parts.num_largest for name, mass in masses.items()})
    return parts, {name: next(heard) for name in columns}


def _parts_here(logits: Float[Tensor, "N K"], operands: Operands, of_all: Peaks) -> Parts:
    return Parts._make(_joined(_by_blocks(parts_of_shard, logits, operands, of_all)))


def _total(here: Float[Tensor, "sums N"], ranks: Ranks, told: Sequence[Tensor]) -> Float[Tensor, "sums N"]:
    if not torch.compiler.is_compiling():
        return total(here, ranks, told)
    result: Tensor = _Total.apply(here, ranks, *told)  # type: ignore[no-untyped-call]
    return result


class _Total(torch.autograd.Function):
    """The sum over the ranks. What is made of it is the same on every rank, so its gradient is that of each part."""

    @staticmethod
    def forward(ctx: Any, here: Tensor, ranks: Ranks, *told: Tensor) -> Tensor:
        """Return the sum."""
        ctx.num_told = len(told)
        return total(here, ranks, told)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of this rank's part."""
        return upstream, None, *[None] * ctx.num_told


def _blocks(source: Tensor | ShardedLayer, operands: Operands, *rows: Any) -> Iterator[tuple[slice, tuple[Any, ...]]]:
    """Yield some rows at a time: which, and their logits, operands and other named tuples of one value per row.

    The logits are at hand, or a layer makes them. torch.compile takes all at once, as do transforms.
    """

    def part_of(value: Any, part: slice) -> Any:
        return value[part] if isinstance(value, Tensor) and value.ndim else value

    def others_of(part: slice) -> list[Any]:
        return [kind._make(part_of(value, part) for value in kind) for kind in rows]

    if isinstance(source, ShardedLayer):
        settings = source.settings()
        for part, logits, some in chunks(multiplied(source.layer, settings), operands, settings):
            yield part, (logits, some, *others_of(part))
        return
    logits = source
    size = _BLOCK_SIZE if is_on_cpu(logits) else _BLOCK_SIZE_ELSEWHERE
    if torch.compiler.is_compiling() or logits.numel() <= size or not has_memory(logits):
        yield slice(None), (logits, operands, *rows)
        return
    step = max(1, size // logits.shape[-1])
    for start in range(0, logits.shape[0], step):
        part = slice(start, start + step)
        names = [*ROWS, *(name for name in ("class_mask", "factor") if _ndim(getattr(operands, name)) > 1)]
        some = operands._replace(**{name: part_of(getattr(operands, name), part) for name in names})
        yield part, (logits[part], some, *others_of(part))


def _ndim(value: Any) -> int:
    return value.ndim if isinstance(value, Tensor) else 0


def _by_blocks(compute: Callable[..., Any], source: Tensor | ShardedLayer, operands: Operands, *rows: Any) -> list[Any]:
    """Return what a function makes of each block of rows."""
    return [compute(*arguments) for _, arguments in _blocks(source, operands, *rows)]


def _joined(blocks: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """Return the blocks of each tensor joined to one of all rows; None for a tensor that is None in every block."""
    if len(blocks) == 1:
        return list(blocks[0])
    return [None if of[0] is None else torch.cat(of) for of in zip(*blocks, strict=True)]


def _losses(
    source: "_Logits | _Layer", operands: Operands, sums: Sums
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """Return the losses of rows, and with statistics nll, lse and entropy, from the sums over all classes."""
    if torch.compiler.is_compiling():
        return losses_of(operands, sums)[0], statistics_of(operands, sums) if operands.with_stats else None
    arguments = type(source), *source, stacked_of(operands, sums), *operands
    losses, *found = _ShardLosses.apply(*arguments)  # type: ignore[no-untyped-call]
    if operands.differentiable:
        return losses, (found[0], found[1], found[2])
    return losses, statistics_of(operands, sums) if operands.with_stats else None


def _nll_of_soft_labels(batch: Batch, operands: Operands, of_all: _OfAll) -> Float[Tensor, " N"]:
    """Return the cross-entropy with soft labels as they are: the loss with these as its target."""
    operands = operands._replace(
        factor=_soft_labels(batch),
        other_mass=of_all.columns["mass of the labels"],
        z_loss=0.0,
        with_stats=False,
        differentiable=False,
    )
    sums = of_all.sums._replace(other_gaps=of_all.columns["gap of the labels"], mean_gap=None)
    return _losses(_Logits(batch.logits), operands, sums)[0]


class _Logits(NamedTuple):
    """The logits of this rank, as what gradients are computed of."""

    logits: Float[Tensor, "N K"]

    def gradients(
        self, needed: list[str], operands: Operands, stacked: Float[Tensor, "sums N"], upstreams: Upstreams
    ) -> dict[str, Tensor]:
        """Return the gradient, in blocks of rows, if it is needed."""
        sums, gradient = unstacked(stacked), None
        for part, (some, operands_of_some, sums_of_some) in _blocks(self.logits, operands, sums) if needed else ():
            upstreams_of_some = upstreams.of_rows(part)
            found = plain_gradients(some, operands_of_some, ["logits"], upstreams_of_some, sums_of_some)["logits"]
            assert found is not None
            if some.shape == self.logits.shape:
                return {"logits": found.to(self.logits.dtype)}
            gradient = torch.empty_like(self.logits) if gradient is None else gradient
            gradient[part] = found.to(self.logits.dtype)
        return {} if gradient is None else {"logits": gradient}


class _Layer(NamedTuple):
    """The linear layer of this rank, as what gradients are computed of: it makes the logits again."""

    hidden: Float[Tensor, "N D"]
    weight: Float[Tensor, "K D"]
    bias: Float[Tensor, " K"] | None
    chunk_size: int
    ranks: Ranks

    def gradients(
        self, needed: list[str], operands: Operands, stacked: Float[Tensor, "sums N"], upstreams: Upstreams
    ) -> dict[str, Tensor]:
        """Return the gradients that are needed. That of hidden is the sum over the ranks."""
        layer = Layer(self.hidden, self.weight, self.bias)
        settings = ShardedLayer(layer, self.chunk_size).settings([name in needed for name in Layer._fields])
        rounded = multiplied(layer, settings)
        of_layer = Gradients(rounded, operands, settings)
        for part, logits, rows in chunks(rounded, operands, settings):
            sums = unstacked(stacked[:, part])
            of_logits = plain_gradients(logits, rows, ["logits"], upstreams.of_rows(part), sums)["logits"]
            assert of_logits is not None
            of_layer.add(part, of_logits.to(logits.dtype), rows)
        found = of_layer.finish()
        if "hidden" in found:
            found["hidden"] = _summed(found["hidden"], self.ranks)
        return {name: gradient.to(getattr(layer, name).dtype) for name, gradient in found.items()}


class _Kind(NamedTuple):
    kind: type[_Logits | _Layer]


class _Stacked(NamedTuple):
    stacked: Float[Tensor, "sums N"]  # the sums over the classes of all ranks


def _kinds(kind: type[_Logits | _Layer]) -> tuple[Any, ...]:
    """Return what the flat arguments of the autograd Functions are."""
    return _Kind, kind, _Stacked, Operands


class _ShardLosses(torch.autograd.Function):
    """The losses of rows from the sums over all classes, and the gradient from this rank's logits or layer."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
        """Return the losses, and nll, lse and entropy if gradients flow through them."""
        _, _, (stacked,), operands = saved.grouped(arguments, *_kinds(arguments[0]))
        return losses_of(operands, unstacked(stacked))[0], *fused.statistics_or_none(operands, stacked)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        """Keep the arguments."""
        saved.save(ctx, (), inputs)
        ctx.kinds = _kinds(inputs[0])

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to the source and to `on`, `off`, `other_mass` and `at_max`."""
        _, *groups = saved.saved(ctx, *ctx.kinds)
        needed = saved.needed_by(ctx, *ctx.kinds)
        if not any(upstream is not None for upstream in upstreams):
            return saved.in_order({}, *ctx.kinds)
        flat = [value for group in groups for value in group]
        gradients = _ShardGradients.apply(needed, *upstreams, *flat)  # type: ignore[no-untyped-call]
        return saved.in_order(dict(zip(needed, gradients, strict=True)), *ctx.kinds)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Refuse."""
        raise error("shard_transform", transform="forward mode", instead=_INSTEAD)


class _ShardGradients(torch.autograd.Function):
    """The gradients of `_ShardLosses`, which have no derivatives."""

    @staticmethod
    def forward(needed: list[str], *arguments: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to what is needed."""
        kind = arguments[len(Upstreams._fields)]
        upstreams, _, source, (stacked,), operands = saved.grouped(arguments, Upstreams, *_kinds(kind))
        gradients: dict[str, Tensor | None] = {}
        if upstreams.loss is not None:
            slopes = target_slopes(operands, unstacked(stacked), needed)
            gradients |= target_gradients(operands, slopes, upstreams.loss)
        gradients |= source.gradients([name for name in needed if name in kind._fields], operands, stacked, upstreams)
        return tuple(gradients.get(name) for name in needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        """Refuse."""
        raise error("shard_transform", transform="second derivatives", instead=_INSTEAD)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Refuse."""
        raise error("shard_transform", transform="second derivatives", instead=_INSTEAD)


_INSTEAD = "gather the logits, and use label_smoothed_cross_entropy"


# --- The linear layer ------------------------------------------------------------------------------------------------


def all_logits(layer: Layer, batch: Batch, ranks: Ranks) -> Float[Tensor, "N K"]:
    """Return the logits of all rows, for torch.compile."""
    hidden = layer.hidden
    if batch.counted is not None:
        # Even multiplied by 0, a NaN would reach the weight's gradient.
        hidden = torch.where(batch.counted[:, None], hidden, 0)
    shared: Tensor = _Shared.apply(hidden, ranks)  # type: ignore[no-untyped-call]
    dtype = hidden.dtype
    return F.linear(shared, layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))


class _Shared(torch.autograd.Function):
    """What is the same on every rank, and used by each for its own classes. Its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, ranks: Ranks) -> Tensor:
        """Return it."""
        ctx.ranks = ranks
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        """Return the sum over the ranks."""
        return _summed(upstream, ctx.ranks), None


def _summed(of_hidden: Float[Tensor, "N D"], ranks: Ranks) -> Float[Tensor, "N D"]:
    """Return the sum of gradients over the ranks, in the same dtype, added up in float32 or wider."""
    wide = of_hidden.to(compute_dtype(of_hidden))
    return total(wide, ranks, []).to(of_hidden.dtype)
