"""Flax modules: thin shells over the functions. They hold options, and no parameters."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from lsce_jax.functional import label_smoothed_cross_entropy
from lsce_jax.inputs import check_prior
from lsce_jax.linear import linear_label_smoothed_cross_entropy
from lsce_spec import (
    LINEAR_IMPLEMENTATIONS,
    ChunkOptions,
    Convention,
    LossOptions,
    check_class_count,
    check_class_num,
    check_smoothing,
    find_convention,
)


class LossConstant(nnx.Variable[Array]):
    """An array that belongs to a loss and is not trained: class weights, mask or prior."""


class LabelSmoothedCrossEntropyLoss(nnx.Module):
    """`label_smoothed_cross_entropy` with its options kept: a Flax NNX module without parameters.

    It is a plain callable too, so Linen and pure JAX training loops use it the same way.

    Args:
        smoothing, convention, prior, axis, ignore_index, class_weight, class_mask, z_loss, softcap,
            subtract_entropy, bad_labels, reduction, implementation: see `label_smoothed_cross_entropy`.

    Raises:
        TypeError, ValueError: an option out of its range. Shapes are checked at the call.

    Example:
        >>> import jax.numpy as jnp
        >>> loss_fn = LabelSmoothedCrossEntropyLoss(smoothing=0.1, reduction="mean")
        >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
        >>> f"{loss_fn(logits, jnp.array([0, 2])):.4f}"
        '0.3339'
    """

    def __init__(
        self,
        smoothing: float = 0.1,
        *,
        convention: str | Convention = "uniform",
        prior: Float[ArrayLike, " K"] | None = None,
        axis: int = -1,
        ignore_index: int | None = None,
        class_weight: Float[ArrayLike, " K"] | None = None,
        class_mask: Bool[ArrayLike, " K"] | None = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        subtract_entropy: bool = False,
        bad_labels: str = "nan",
        reduction: str = "none",
        implementation: str | None = None,
    ) -> None:
        """Check the options and keep them; see the class."""
        LossOptions.checked(
            smoothing=smoothing,
            convention=convention,
            has_prior=prior is not None,
            ignore_index=ignore_index,
            z_loss=z_loss,
            softcap=softcap,
            subtract_entropy=subtract_entropy,
            bad_labels=bad_labels,
            reduction=reduction,
            denominator=None,
            implementation=implementation,
        )
        if prior is not None:
            check_prior(prior, class_mask)
        self.smoothing = smoothing
        self.convention = convention
        self.prior = _constant(prior)
        self.axis = axis
        self.ignore_index = ignore_index
        self.class_weight = _constant(class_weight)
        self.class_mask = _constant(class_mask)
        self.z_loss = z_loss
        self.softcap = softcap
        self.subtract_entropy = subtract_entropy
        self.bad_labels = bad_labels
        self.reduction = reduction
        self.implementation = implementation

    def __call__(
        self,
        logits: Float[ArrayLike, "..."],
        labels: Int[ArrayLike, "..."] | Float[ArrayLike, "..."],
        *,
        where: Bool[ArrayLike, "..."] | None = None,
        smoothing: float | Float[ArrayLike, "..."] | None = None,
        denominator: float | Float[ArrayLike, ""] | None = None,
    ) -> Float[Array, "..."]:
        """Return the loss.

        Args:
            logits: [..., K, ...], classes at `axis`.
            labels: class indices without that dimension, or probabilities with it.
            where: booleans that broadcast to the losses; False takes a row out.
            smoothing: replaces the module's own for this call, as a schedule does.
            denominator: what reduction="mean" divides by.
        """
        return label_smoothed_cross_entropy(
            logits,
            labels,
            smoothing=self.smoothing if smoothing is None else smoothing,
            convention=self.convention,
            prior=_value(self.prior),
            axis=self.axis,
            where=where,
            ignore_index=self.ignore_index,
            class_weight=_value(self.class_weight),
            class_mask=_value(self.class_mask),
            z_loss=self.z_loss,
            softcap=self.softcap,
            subtract_entropy=self.subtract_entropy,
            bad_labels=self.bad_labels,
            reduction=self.reduction,
            denominator=denominator,
            implementation=self.implementation,
        )


class LinearLabelSmoothedCrossEntropyLoss(nnx.Module):
    """`linear_label_smoothed_cross_entropy` with its options kept: a module without parameters.

    The weight comes with each call, so that it may be that of the model's last layer or of its embedding.

    Args:
        smoothing, convention, prior, ignore_index, class_weight, class_mask, z_loss, softcap, subtract_entropy,
            bad_labels, reduction, implementation, chunk_size, recompute, gradient_filter: see
            `linear_label_smoothed_cross_entropy`.

    Raises:
        TypeError, ValueError: an option out of its range. Shapes are checked at the call.

    Example:
        >>> import jax.numpy as jnp
        >>> loss_fn = LinearLabelSmoothedCrossEntropyLoss(smoothing=0.1, reduction="mean")
        >>> hidden, weight = jnp.array([[2.0, 0.0], [0.0, 3.0]]), jnp.eye(2, 3)
        >>> f"{loss_fn(hidden, weight, jnp.array([0, 1])):.4f}"
        '0.3339'
    """

    def __init__(
        self,
        smoothing: float = 0.1,
        *,
        convention: str | Convention = "uniform",
        prior: Float[ArrayLike, " K"] | None = None,
        ignore_index: int | None = None,
        class_weight: Float[ArrayLike, " K"] | None = None,
        class_mask: Bool[ArrayLike, " K"] | None = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        subtract_entropy: bool = False,
        bad_labels: str = "nan",
        reduction: str = "none",
        implementation: str | None = None,
        chunk_size: int | None = None,
        recompute: bool | None = None,
        gradient_filter: float = 0.0,
    ) -> None:
        """Check the options and keep them; see the class."""
        options = LossOptions.checked(
            smoothing=smoothing,
            convention=convention,
            has_prior=prior is not None,
            ignore_index=ignore_index,
            z_loss=z_loss,
            softcap=softcap,
            subtract_entropy=subtract_entropy,
            bad_labels=bad_labels,
            reduction=reduction,
            denominator=None,
            implementation=implementation,
            implementations=LINEAR_IMPLEMENTATIONS,
        )
        ChunkOptions.checked(
            chunk_size=chunk_size, recompute=recompute, gradient_filter=gradient_filter, options=options
        )
        if prior is not None:
            check_prior(prior, class_mask)
        self.smoothing = smoothing
        self.convention = convention
        self.prior = _constant(prior)
        self.ignore_index = ignore_index
        self.class_weight = _constant(class_weight)
        self.class_mask = _constant(class_mask)
        self.z_loss = z_loss
        self.softcap = softcap
        self.subtract_entropy = subtract_entropy
        self.bad_labels = bad_labels
        self.reduction = reduction
        self.implementation = implementation
        self.chunk_size = chunk_size
        self.recompute = recompute
        self.gradient_filter = gradient_filter

    def __call__(
        self,
        hidden: Float[ArrayLike, "... D"],
        weight: Float[ArrayLike, "D K"],
        labels: Int[ArrayLike, "..."],
        *,
        bias: Float[ArrayLike, " K"] | None = None,
        where: Bool[ArrayLike, "..."] | None = None,
        smoothing: float | Float[ArrayLike, "..."] | None = None,
        denominator: float | Float[ArrayLike, ""] | None = None,
    ) -> Float[Array, "..."]:
        """Return the loss.

        Args:
            hidden: [..., D] features.
            weight: [D, K].
            labels: [...] class indices.
            bias: K numbers, or None.
            where: booleans that broadcast to the losses; False takes a row out.
            smoothing: replaces the module's own for this call, as a schedule does.
            denominator: what reduction="mean" divides by.
        """
        return linear_label_smoothed_cross_entropy(
            hidden,
            weight,
            labels,
            bias=bias,
            smoothing=self.smoothing if smoothing is None else smoothing,
            convention=self.convention,
            prior=_value(self.prior),
            where=where,
            ignore_index=self.ignore_index,
            class_weight=_value(self.class_weight),
            class_mask=_value(self.class_mask),
            z_loss=self.z_loss,
            softcap=self.softcap,
            subtract_entropy=self.subtract_entropy,
            bad_labels=self.bad_labels,
            reduction=self.reduction,
            denominator=denominator,
            implementation=self.implementation,
            chunk_size=self.chunk_size,
            recompute=self.recompute,
            gradient_filter=self.gradient_filter,
        )


class CELossWithLabelSmoothing(nnx.Module):
    """Mean label-smoothed cross-entropy for a number of classes that is known beforehand.

    Args:
        label_smooth: the smoothing e in [0, 1]; None gives plain cross-entropy.
        class_num: number of classes; 3755 is the number of level-1 Chinese characters of GB 2312.
        convention: "clamp", which limits the one-hot target to [e/(class_num-1), 1-e], or any other, such as
            "uniform".

    Raises:
        ValueError: label_smooth outside [0, 1], class_num below 1, or an unknown convention.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.array([[0.1, 8.0, 0.1], [0.1, 0.1, 8.0]])
        >>> labels = jnp.array([1, 2])
        >>> f"{CELossWithLabelSmoothing(0.2, class_num=3)(logits, labels):.6f}"
        '1.580741'
        >>> f"{CELossWithLabelSmoothing(0.2, class_num=3, convention='uniform')(logits, labels):.6f}"
        '1.054075'
    """

    def __init__(
        self,
        label_smooth: float | None = 0.1,
        class_num: int = 3755,
        *,
        convention: str | Convention = "clamp",
    ) -> None:
        """Check the options and keep them; see the class."""
        if label_smooth is not None:
            check_smoothing(label_smooth, key="label_smooth")
        check_class_num(class_num)
        find_convention(convention)
        self.label_smooth = label_smooth
        self.class_num = class_num
        self.convention = convention

    def __call__(self, logits: Float[ArrayLike, "N K"], labels: Int[ArrayLike, " N"]) -> Float[Array, ""]:
        """Return the mean loss of logits [N, K] and labels [N]; further dimensions may follow both.

        Raises:
            ValueError: the logits have no dimension 1, or not class_num classes there.
        """
        check_class_count(self.class_num, jnp.shape(logits))
        return label_smoothed_cross_entropy(
            logits,
            labels,
            smoothing=0.0 if self.label_smooth is None else self.label_smooth,
            convention=self.convention,
            axis=1,
            reduction="mean",
        )


def _constant(array: ArrayLike | None) -> LossConstant | None:
    return None if array is None else LossConstant(jnp.asarray(array))


def _value(constant: LossConstant | None) -> Array | None:
    return None if constant is None else constant.get_value()
