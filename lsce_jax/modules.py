"""Flax modules: thin shells over the functions. They hold options, and no parameters."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from lsce_jax import kernels
from lsce_jax.functional import label_smoothed_cross_entropy
from lsce_jax.inputs import as_array, check_prior
from lsce_jax.keywords import DenseModuleKeywords, LinearModuleKeywords
from lsce_jax.linear import linear_label_smoothed_cross_entropy
from lsce_spec import (
    LINEAR_IMPLEMENTATIONS,
    ChunkOptions,
    Convention,
    ConventionName,
    LossOptions,
    check_class_count,
    check_class_num,
    check_label_smooth,
    find_convention,
    names_for,
    renamed,
)
from lsce_spec.keywords import hinting, parameters_of, takes

_CONSTANTS = ("prior", "class_weight", "class_mask")
# What the arguments of a function are called in `CELossWithLabelSmoothing`.
_NAMES_OF_CLASS_NUM = names_for({"smoothing": "label_smooth", r"pass axis=(\d+)": r"pass jnp.moveaxis(logits, \1, 1)"})


class LossConstant(nnx.Variable[Array]):
    """An array that belongs to a loss and is not trained: class weights, mask or prior."""


class _LossModule(nnx.Module):
    """A loss that keeps its options as attributes, arrays as `LossConstant`."""

    _options: ClassVar[tuple[str, ...]]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return an option."""

    def _keep(self, options: Mapping[str, Any]) -> None:
        """Make checked options attributes."""
        if options["prior"] is not None:
            check_prior(options["prior"], options["class_mask"])
        for name, value in options.items():
            is_constant = name in _CONSTANTS and value is not None
            setattr(self, name, LossConstant(as_array(name, value)) if is_constant else value)

    def _kept(self, **of_call: Any) -> dict[str, Any]:
        """Return the options for one call, and those of the call that are not None in place of the module's own."""
        options = {"smoothing": self.smoothing} | {name: getattr(self, name) for name in self._options}
        options |= {name: options[name].get_value() for name in _CONSTANTS if options[name] is not None}
        return options | {name: value for name, value in of_call.items() if value is not None}


class LabelSmoothedCrossEntropyLoss(_LossModule):
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

    _options = tuple(parameters_of(DenseModuleKeywords))

    @takes(DenseModuleKeywords)
    def __init__(self, smoothing: float = 0.1, **options: Unpack[DenseModuleKeywords]) -> None:
        """Check the options and keep them; see the class."""
        LossOptions.of({"smoothing": smoothing, **options}, kernels.IMPLEMENTATIONS)
        self._keep({"smoothing": smoothing, **options})

    @hinting
    def __call__(
        self,
        logits: Float[ArrayLike, "..."],
        labels: Int[ArrayLike, "..."] | Float[ArrayLike, "..."],
        *,
        where: Bool[ArrayLike, "..."] | None = None,
        class_mask: Bool[ArrayLike, "..."] | None = None,
        smoothing: float | Float[ArrayLike, "..."] | None = None,
        denominator: float | Float[ArrayLike, ""] | None = None,
    ) -> Float[Array, "..."]:
        """Return the loss.

        Args:
            logits: [..., K, ...], classes at `axis`.
            labels: class indices without that dimension, or probabilities with it.
            where: booleans that broadcast to the losses; False leaves a row out.
            class_mask: replaces the module's own for this call, as masks of rows do.
            smoothing: replaces the module's own for this call, as a schedule does.
            denominator: the number that reduction="mean" divides by.
        """
        options = self._kept(smoothing=smoothing, class_mask=class_mask)
        return label_smoothed_cross_entropy(logits, labels, where=where, denominator=denominator, **options)


class LinearLabelSmoothedCrossEntropyLoss(_LossModule):
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

    _options = tuple(parameters_of(LinearModuleKeywords))

    @takes(LinearModuleKeywords)
    def __init__(self, smoothing: float = 0.1, **options: Unpack[LinearModuleKeywords]) -> None:
        """Check the options and keep them; see the class."""
        ChunkOptions.of(options, LossOptions.of({"smoothing": smoothing, **options}, LINEAR_IMPLEMENTATIONS))
        self._keep({"smoothing": smoothing, **options})

    @hinting
    def __call__(
        self,
        hidden: Float[ArrayLike, "... D"],
        weight: Float[ArrayLike, "D K"],
        labels: Int[ArrayLike, "..."],
        *,
        bias: Float[ArrayLike, " K"] | None = None,
        where: Bool[ArrayLike, "..."] | None = None,
        class_mask: Bool[ArrayLike, "..."] | None = None,
        smoothing: float | Float[ArrayLike, "..."] | None = None,
        denominator: float | Float[ArrayLike, ""] | None = None,
    ) -> Float[Array, "..."]:
        """Return the loss.

        Args:
            hidden: [..., D] features.
            weight: [D, K].
            labels: [...] class indices.
            bias: K numbers, or None.
            where: booleans that broadcast to the losses; False leaves a row out.
            class_mask: replaces the module's own for this call, as masks of rows do.
            smoothing: replaces the module's own for this call, as a schedule does.
            denominator: the number that reduction="mean" divides by.
        """
        options = self._kept(smoothing=smoothing, class_mask=class_mask)
        return linear_label_smoothed_cross_entropy(
            hidden, weight, labels, bias=bias, where=where, denominator=denominator, **options
        )


class CELossWithLabelSmoothing(nnx.Module):
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
        >>> import jax.numpy as jnp
        >>> logits = jnp.array([[0.1, 8.0, 0.1], [0.1, 0.1, 8.0]])
        >>> labels = jnp.array([1, 2])
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
        check_label_smooth(label_smooth)
        check_class_num(class_num)
        find_convention(convention)
        self.label_smooth = label_smooth
        self.class_num = class_num
        self.convention = convention

    @hinting
    def __call__(self, logits: Float[ArrayLike, "N K"], labels: Int[ArrayLike, " N"]) -> Float[Array, ""]:
        """Return the mean loss of logits [N, K] and labels [N]; further dimensions may follow both.

        Raises:
            ValueError: the logits have no dimension 1, or not class_num classes there.
        """
        logits = as_array("logits", logits)
        check_class_count(self.class_num, logits.shape)
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
