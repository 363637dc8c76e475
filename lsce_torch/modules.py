"""Torch modules: thin shells over the functions. They hold options, and no parameters."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lsce_spec import (
    ChunkOptions,
    Convention,
    ConventionName,
    LossOptions,
    Reduction,
    check_class_count,
    check_class_num,
    check_label_smooth,
    find_convention,
    names_for,
    renamed,
)
from lsce_spec.keywords import hinting, parameters_of, takes
from lsce_torch import kernels
from lsce_torch.drop_in import NAMES, NAMES_OF_CALL, check_weight, with_names_of_torch
from lsce_torch.errors import error
from lsce_torch.functional import label_smoothed_cross_entropy
from lsce_torch.inputs import check_prior, check_tensor
from lsce_torch.keywords import DenseModuleKeywords, LinearModuleKeywords
from lsce_torch.linear import linear_label_smoothed_cross_entropy
from lsce_torch.overwrite import check_inplace

_CONSTANTS = ("prior", "class_weight", "class_mask")
# What the arguments of a function are called in `CELossWithLabelSmoothing`.
_NAMES_OF_CLASS_NUM = names_for({"smoothing": "label_smooth", r"pass axis=(\d+)": r"pass logits.movedim(\1, 1)"})


class _LossModule(nn.Module):
    """A loss that keeps its options as attributes, tensors as buffers outside the state dict."""

    _options: ClassVar[tuple[str, ...]]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return an option."""

    def _keep(self, options: Mapping[str, Any]) -> None:
        """Make checked options attributes."""
        for name, value in options.items():
            if name in _CONSTANTS:
                self.register_buffer(name, None if value is None else torch.as_tensor(value), persistent=False)
            else:
                setattr(self, name, value)
        if self.prior is not None:
            check_prior(self.prior, self.class_mask)

    def _kept(self, class_mask: Bool[Tensor, "..."] | None) -> dict[str, Any]:
        """Return the options for one call, with a class mask in place of the module's own unless it is None."""
        kept = {name: getattr(self, name) for name in self._options}
        return kept if class_mask is None else {**kept, "class_mask": class_mask}


class LabelSmoothedCrossEntropyLoss(_LossModule, nn.CrossEntropyLoss):
    """`nn.CrossEntropyLoss` with every option of `label_smoothed_cross_entropy`: swap the class name, nothing else.

    It is a subclass, so `isinstance` tests and state dicts keep working. It differs on purpose in a few cases: the mean
    over nothing (no rows, or weights of 0) is 0 and not NaN; the content of an ignored row never reaches the gradient,
    and 0 times an infinite logit counts as 0; the loss is float32 unless the logits are float64; a label that is not a
    class gives NaN, and an error only with `bad_labels="raise"`; a smoothing below 0 is an error.

    Args:
        weight: K class weights.
        size_average, reduce: deprecated by torch; translated to `reduction` as torch does.
        ignore_index: rows with this integer label are left out; soft labels ignore a negative value.
        reduction: "mean", "sum" or "none".
        label_smoothing: the smoothing e in [0, 1].
        convention, prior, class_mask, z_loss, softcap, subtract_entropy, bad_labels, implementation, inplace_backward:
            see `label_smoothed_cross_entropy`.

    Raises:
        TypeError, ValueError: an option out of its range. Shapes are checked at the call.

    Example:
        >>> import torch
        >>> loss_fn = LabelSmoothedCrossEntropyLoss(label_smoothing=0.1)
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
        >>> f"{loss_fn(logits, torch.tensor([0, 2])):.4f}"
        '0.3339'
    """

    _options = tuple(parameters_of(DenseModuleKeywords))
    reduction: Reduction

    @takes(DenseModuleKeywords)
    def __init__(  # positions as in nn.CrossEntropyLoss
        self,
        weight: Float[Tensor, " K"] | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        **options: Unpack[DenseModuleKeywords],
    ) -> None:
        """Check the options and keep them; see the class."""
        if isinstance(size_average, Tensor):
            raise error("module_operands")
        check_weight(weight)
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        own = {"smoothing": label_smoothing, "ignore_index": ignore_index, "reduction": self.reduction}
        try:
            LossOptions.of({**own, **options}, kernels.IMPLEMENTATIONS)
            check_inplace(options)
            self._keep(options)
        except (TypeError, ValueError) as problem:
            raise renamed(problem, NAMES) from problem.__cause__

    def extra_repr(self) -> str:
        """Return the main options for `print(module)`."""
        convention = find_convention(self.convention).name
        return f"label_smoothing={self.label_smoothing}, convention={convention!r}, reduction={self.reduction!r}"

    @hinting
    def forward(
        self,
        input: Float[Tensor, "..."],  # noqa: A002  # nn.CrossEntropyLoss calls it so
        target: Int[Tensor, "..."] | Float[Tensor, "..."],
        *,
        where: Bool[Tensor, "..."] | None = None,
        class_mask: Bool[Tensor, "..."] | None = None,
        smoothing: float | Float[Tensor, "..."] | None = None,
        denominator: float | Float[Tensor, ""] | None = None,
    ) -> Float[Tensor, "..."]:
        """Return the loss.

        Args:
            input: logits [K], [N, K] or [N, K, d1, ...].
            target: class indices without the class dimension, or probabilities with it.
            where: booleans that broadcast to the losses; False leaves a row out.
            class_mask: replaces the module's own for this call, as masks of rows do.
            smoothing: replaces `label_smoothing` for this call, as a schedule does.
            denominator: the number that reduction="mean" divides by.
        """
        return with_names_of_torch(
            NAMES if smoothing is None else NAMES_OF_CALL,
            input,
            target,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing if smoothing is None else smoothing,
            where=where,
            denominator=denominator,
            **self._kept(class_mask),
        )


class LinearLabelSmoothedCrossEntropyLoss(_LossModule):
    """`linear_label_smoothed_cross_entropy` with its options kept: a module without parameters.

    Each call takes the weight, which may be that of the model's last layer or of its embedding.

    Args:
        smoothing, convention, prior, ignore_index, class_weight, class_mask, z_loss, softcap, subtract_entropy,
            bad_labels, reduction, implementation, chunk_size, recompute, gradient_filter: see
            `linear_label_smoothed_cross_entropy`.

    Raises:
        TypeError, ValueError: an option out of its range. Shapes are checked at the call.

    Example:
        >>> import torch
        >>> loss_fn = LinearLabelSmoothedCrossEntropyLoss(smoothing=0.1)
        >>> hidden, weight = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.eye(3, 2)
        >>> f"{loss_fn(hidden, weight, torch.tensor([0, 1])):.4f}"
        '0.3339'
    """

    _options = tuple(parameters_of(LinearModuleKeywords))

    @takes(LinearModuleKeywords)
    def __init__(self, smoothing: float = 0.1, **options: Unpack[LinearModuleKeywords]) -> None:
        """Check the options and keep them; see the class."""
        super().__init__()
        ChunkOptions.of(options, LossOptions.of({"smoothing": smoothing, **options}, kernels.LINEAR_IMPLEMENTATIONS))
        self.smoothing = smoothing
        self._keep(options)

    def extra_repr(self) -> str:
        """Return the main options for `print(module)`."""
        convention = find_convention(self.convention).name
        return f"smoothing={self.smoothing}, convention={convention!r}, reduction={self.reduction!r}"

    @hinting
    def forward(
        self,
        hidden: Float[Tensor, "... D"],
        weight: Float[Tensor, "K D"],
        labels: Int[Tensor, "..."],
        *,
        bias: Float[Tensor, " K"] | None = None,
        where: Bool[Tensor, "..."] | None = None,
        class_mask: Bool[Tensor, "..."] | None = None,
        smoothing: float | Float[Tensor, "..."] | None = None,
        denominator: float | Float[Tensor, ""] | None = None,
    ) -> Float[Tensor, "..."]:
        """Return the loss.

        Args:
            hidden: [..., D] features.
            weight: [K, D].
            labels: [...] class indices.
            bias: K numbers, or None.
            where: booleans that broadcast to the losses; False leaves a row out.
            class_mask: replaces the module's own for this call, as masks of rows do.
            smoothing: replaces the module's own for this call, as a schedule does.
            denominator: the number that reduction="mean" divides by.
        """
        return linear_label_smoothed_cross_entropy(
            hidden,
            weight,
            labels,
            bias=bias,
            smoothing=self.smoothing if smoothing is None else smoothing,
            where=where,
            denominator=denominator,
            **self._kept(class_mask),
        )


class CELossWithLabelSmoothing(nn.Module):
    """Mean label-smoothed cross-entropy for a number of classes that is known beforehand.

    Args:
        label_smooth: the smoothing e in [0, 1]; None gives plain cross-entropy.
        class_num: number of classes; 3755 is the number of level-1 Chinese characters of GB 2312.
        convention: "clamp", which limits the one-hot target to [e/(class_num-1), 1-e], or any other, such as
            "uniform".

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: label_smooth outside [0, 1], class_num below 1, or an unknown convention.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.1, 8.0, 0.1], [0.1, 0.1, 8.0]])
        >>> labels = torch.tensor([1, 2])
        >>> f"{CELossWithLabelSmoothing(0.2, class_num=3)(logits, labels):.6f}"
        '1.580741'
        >>> f"{CELossWithLabelSmoothing(0.2, class_num=3, convention='uniform')(logits, labels):.6f}"
        '1.054075'
    """

    @hinting
    def __init__(
        self,
        label_smooth: float | None = 0.1,
        class_num: int = 3755,
        *,
        convention: ConventionName | Convention = "clamp",
    ) -> None:
        """Check the options and keep them; see the class."""
        super().__init__()
        check_label_smooth(label_smooth)
        check_class_num(class_num)
        find_convention(convention)
        self.label_smooth = label_smooth
        self.class_num = class_num
        self.convention = convention

    @hinting
    def forward(self, logits: Float[Tensor, "N K"], labels: Int[Tensor, " N"]) -> Float[Tensor, ""]:
        """Return the mean loss of logits [N, K] and labels [N]; further dimensions may follow both.

        Raises:
            ValueError: the logits have no dimension 1, or not class_num classes there.
        """
        check_tensor("logits", logits)
        check_class_count(self.class_num, tuple(logits.shape))
        try:
            return label_smoothed_cross_entropy(
                logits,
                labels,
                smoothing=0.0 if self.label_smooth is None else self.label_smooth,
                convention=self.convention,
                axis=1,
                reduction="mean",
            )
        except (TypeError, ValueError) as problem:
            raise renamed(problem, _NAMES_OF_CLASS_NUM) from problem.__cause__

    def extra_repr(self) -> str:
        """Return the options for `print(module)`."""
        return f"label_smooth={self.label_smooth}, class_num={self.class_num}, convention={self.convention!r}"
