"""The options of the losses, stated once: name, type and default, for every function and module that takes them.

A new option is one line here. The small classes exist for the order of the arguments: signatures list the options of
the base classes first, from left to right. Modules take all options but `smoothing`, `where` and `denominator`.
"""

from typing import Annotated, Literal, TypedDict

from jaxtyping import ArrayLike, Bool, Float

from lsce_spec import BadLabels, Convention, ConventionName, Implementation, LinearImplementation, Reduction
from lsce_spec.keywords import Default

# The name of the kernels, which `kernels/` reads here.
Kernel = Literal["pallas"]


class _Bias(TypedDict, total=False):
    bias: Annotated[Float[ArrayLike, " K"] | None, Default(None)]


class _Smoothing(TypedDict, total=False):
    smoothing: Annotated[float | Float[ArrayLike, "..."], Default(0.1)]


class _Convention(TypedDict, total=False):
    convention: Annotated[ConventionName | Convention, Default("uniform")]


class _Target(_Convention, total=False):
    prior: Annotated[Float[ArrayLike, " K"] | None, Default(None)]


class _Axis(TypedDict, total=False):
    axis: Annotated[int, Default(-1)]


class _Where(TypedDict, total=False):
    where: Annotated[Bool[ArrayLike, "..."] | None, Default(None)]


class _Counted(TypedDict, total=False):
    ignore_index: Annotated[int | None, Default(None)]
    class_weight: Annotated[Float[ArrayLike, " K"] | None, Default(None)]


class _ClassMask(TypedDict, total=False):
    class_mask: Annotated[Bool[ArrayLike, "..."] | None, Default(None)]


class _ZLoss(TypedDict, total=False):
    z_loss: Annotated[float, Default(0.0)]


class _Rows(_Counted, _ClassMask, _ZLoss, total=False):
    softcap: Annotated[float | None, Default(None)]
    subtract_entropy: Annotated[bool, Default(False)]
    bad_labels: Annotated[BadLabels, Default("nan")]
    reduction: Annotated[Reduction, Default("none")]


class _Denominator(TypedDict, total=False):
    denominator: Annotated[float | Float[ArrayLike, ""] | None, Default(None)]


class _Implementation(TypedDict, total=False):
    implementation: Annotated[Implementation | Kernel | None, Default(None)]


class _LinearImplementation(TypedDict, total=False):
    implementation: Annotated[LinearImplementation | None, Default(None)]


class _ChunkSize(TypedDict, total=False):
    chunk_size: Annotated[int | None, Default(None)]


class _Chunks(_ChunkSize, total=False):
    recompute: Annotated[bool | None, Default(None)]
    gradient_filter: Annotated[float, Default(0.0)]


class LossKeywords(_Smoothing, _Target, _Where, _Rows, _Denominator, total=False):
    """The options that every loss takes."""


class DenseLossKeywords(_Smoothing, _Target, _Axis, _Where, _Rows, _Denominator, _Implementation, total=False):
    """The options of `label_smoothed_cross_entropy`."""


class LinearLossKeywords(_Bias, LossKeywords, _LinearImplementation, _Chunks, total=False):
    """The options of `linear_label_smoothed_cross_entropy`."""


class _Differentiable(TypedDict, total=False):
    differentiable: Annotated[bool, Default(False)]


class DenseStatsKeywords(DenseLossKeywords, _Differentiable, total=False):
    """The options of `label_smoothed_cross_entropy_with_stats`."""


class LinearStatsKeywords(LinearLossKeywords, _Differentiable, total=False):
    """The options of `linear_label_smoothed_cross_entropy_with_stats`."""


class VocabParallelKeywords(_Smoothing, _Target, _Axis, _Where, _Rows, _Denominator, total=False):
    """The options of `vocab_parallel_label_smoothed_cross_entropy` besides `axis_name`."""


class VocabParallelStatsKeywords(VocabParallelKeywords, _Differentiable, total=False):
    """The options of `vocab_parallel_label_smoothed_cross_entropy_with_stats` besides `axis_name`."""


class VocabParallelLinearKeywords(_Bias, LossKeywords, _ChunkSize, total=False):
    """The options of `vocab_parallel_linear_label_smoothed_cross_entropy` besides `axis_name`."""


class VocabParallelLinearStatsKeywords(VocabParallelLinearKeywords, _Differentiable, total=False):
    """The options of `vocab_parallel_linear_label_smoothed_cross_entropy_with_stats` besides `axis_name`."""


class DenominatorKeywords(_Where, _Counted, _ClassMask, total=False):
    """The options of `mean_denominator` besides `axis_name`."""


class DenseModuleKeywords(_Target, _Axis, _Rows, _Implementation, total=False):
    """The options of `LabelSmoothedCrossEntropyLoss` besides `smoothing`."""


class LinearModuleKeywords(_Target, _Rows, _LinearImplementation, _Chunks, total=False):
    """The options of `LinearLabelSmoothedCrossEntropyLoss` besides `smoothing`."""


class _OfLogits(TypedDict, total=False):
    num_classes: Annotated[int | None, Default(None)]
    where: Annotated[Bool[ArrayLike, "..."] | None, Default(None)]
    label_weight: Annotated[Float[ArrayLike, "..."] | None, Default(None)]
    mean_weight: Annotated[float | Float[ArrayLike, "..."] | None, Default(None)]


class AddSmoothingKeywords(_Smoothing, _Convention, _OfLogits, _ZLoss, total=False):
    """The options of `add_smoothing`."""


class LinearAddSmoothingKeywords(_Bias, _Smoothing, _Target, _Where, _Counted, _ClassMask, _ZLoss, total=False):
    """The options of `linear_add_smoothing`."""
