"""The public functions of the dense loss: they check options and arrays, and `ways.py` computes.

One function takes every option: options are fixed when JAX traces the call, so an unused one costs nothing.
"""

from typing import Unpack

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from lsce_jax import kernels, ways
from lsce_jax.inputs import on_automatic_axes, prepare, warn_of_bad_labels
from lsce_jax.keywords import DenseLossKeywords, DenseStatsKeywords
from lsce_jax.reductions import mean_divisor
from lsce_jax.stats import LossStats
from lsce_spec import Explanation, LossOptions, check_flag
from lsce_spec.keywords import takes


@takes(DenseLossKeywords)
def label_smoothed_cross_entropy(
    logits: Float[ArrayLike, "..."],
    labels: Int[ArrayLike, "..."] | Float[ArrayLike, "..."],
    **keywords: Unpack[DenseLossKeywords],
) -> Float[Array, "..."]:
    r"""Cross-entropy between smoothed labels and the softmax of logits.

    With the target :math:`q` that holds `on` at the label and `off` elsewhere, and class weights :math:`w`,

    .. math:: -\sum_k w_k q_k \log p_k + \text{z\_loss} \cdot \text{lse}^2, \qquad p = \mathrm{softmax}(z)

    computed in float32 (float64 for float64 logits) from :math:`\max z - z_k`, so that large logits, large offsets
    and small losses keep their accuracy.

    Args:
        logits: unnormalised scores of shape [..., K, ...], the K classes at `axis`. float64, float32, bfloat16 or
            float16.
        labels: class indices, of any integer dtype and the shape of the logits without `axis`; or class
            probabilities, floating point and of the shape of the logits.
        smoothing: the probability e to move away from the label, in [0, 1]: a number, or an array that broadcasts
            to the losses. Arrays may be traced, differentiated and different for each row. Values that are at hand are
            checked: those of rows that count, on the CPU, outside of jit and vmap.
        convention: where e goes. "uniform": e/K to each of the K classes (torch, Keras). "non_target": e/(K-1) to
            each other class (fairseq, tensor2tensor). "clamp": the one-hot target clamped to [e/(K-1), 1-e].
            "max_sup" (Max Suppression): lse - z_y + e (max z - mean z), which takes e from the largest logit, not from
            the label's. Or a `Convention`.
        prior: K probabilities that replace the uniform distribution in "uniform". Values are checked unless traced.
        axis: dimension of the classes in logits and soft labels.
        where: booleans that broadcast to the losses; False leaves a row out: loss 0, gradient 0, not counted.
        ignore_index: rows with this label are left out likewise.
        class_weight: K factors w.
        class_mask: K booleans; classes marked False take no part, whatever their logits hold. Or booleans with the
            dimensions of the logits, which broadcast to them: a mask for each row, whose classes get its smoothing.
        z_loss: factor of the squared log-partition function, which keeps it near 0.
        softcap: c of z <- c tanh(z / c), applied first.
        subtract_entropy: subtract the entropy of the target: Kullback-Leibler divergence, 0 at the optimum.
        bad_labels: what a label outside the classes does. "nan": that row's loss and gradient are NaN. "raise":
            IndexError (under `jit`: needs `jax.experimental.checkify`).
        reduction: "none", "sum", or "mean": the sum over `denominator`.
        denominator: the number that "mean" divides by. None: the sum of the labels' class weights over the rows that
            count; without class weights, and for soft labels, the number of those rows. With 0 the loss is 0.
        implementation: "fused", which never writes the target out; "reference", the readable one; "pallas", a kernel
            for TPUs, which on a CPU is interpreted in `jax.experimental.pallas.tpu.force_tpu_interpret_mode()`. None
            chooses: on TPUs "pallas" where it computes the call and moves fewer bytes, otherwise "fused".

    Returns:
        Losses, with `reduction="none"` of the shape of the logits without `axis`, else a scalar. float64 for
        float64 logits, otherwise float32. The gradient has the dtype of the logits.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, value out of range, options that exclude each other, or a call that "pallas" cannot
            compute, if it was asked for.
        IndexError: a label outside the classes, with `bad_labels="raise"`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
        >>> labels = jnp.array([0, 2])
        >>> losses = label_smoothed_cross_entropy(logits, labels, smoothing=0.1)
        >>> [f"{loss:.4f}" for loss in losses]
        ['0.3729', '0.2949']
        >>> step = jax.value_and_grad(label_smoothed_cross_entropy)
        >>> loss, gradient = step(logits, labels, smoothing=0.1, reduction="mean")
        >>> f"{loss:.4f}", gradient.shape
        ('0.3339', (2, 3))

    References:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, section 7 (uniform, and
        the prior, which the paper calls u(k)); Vaswani et al., "Attention Is All You Need", 2017 (non_target);
        Zhou et al., "MaxSup: Overcoming Representation Collapse in Label Smoothing", 2025, arXiv:2502.15798 (max_sup).
        z-loss: Chowdhery et al., "PaLM", 2022, section 5. Softcap: Gemma Team, "Gemma 2", 2024, section 2.
    """
    return _evaluate(logits, labels, keywords, with_stats=False)[0]


@takes(DenseStatsKeywords)
def label_smoothed_cross_entropy_with_stats(
    logits: Float[ArrayLike, "..."],
    labels: Int[ArrayLike, "..."] | Float[ArrayLike, "..."],
    **keywords: Unpack[DenseStatsKeywords],
) -> tuple[Float[Array, "..."], LossStats]:
    """Return the loss of `label_smoothed_cross_entropy` and statistics of each row from the same sweep over the logits.

    Args:
        logits: see `label_smoothed_cross_entropy`.
        labels: see `label_smoothed_cross_entropy`.
        differentiable: whether gradients flow through nll, lse and entropy, for losses made of them.
        keywords: the options of `label_smoothed_cross_entropy`, with the same defaults.

    Returns:
        The loss, reduced as asked, and `LossStats` with one value per row: nll (neither smoothed nor weighted),
        smoothed, z, lse, confidence, prediction, entropy, correct and valid. Without `differentiable` no gradient flows
        through them: pass `has_aux=True` to `grad`.

    Raises:
        TypeError, ValueError, IndexError: see `label_smoothed_cross_entropy`.

    Example: loss, perplexity and accuracy of a batch with one row left out.
        >>> import jax, jax.numpy as jnp
        >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0], [1.0, 1.0, 1.0]])
        >>> labels = jnp.array([0, 1, -100])
        >>> step = jax.value_and_grad(label_smoothed_cross_entropy_with_stats, has_aux=True)
        >>> (loss, stats), gradient = step(logits, labels, ignore_index=-100, reduction="mean")
        >>> nll, accuracy = (values.mean(where=stats.valid) for values in (stats.nll, stats.correct))
        >>> f"{loss:.4f} {jnp.exp(nll):.4f} {accuracy:.2f}"
        '1.6839 5.2975 0.50'

    Example: policy gradient with an entropy bonus, of the log-probabilities of the actions taken.
        >>> def objective(logits, actions, advantages):
        ...     _, stats = label_smoothed_cross_entropy_with_stats(logits, actions, smoothing=0.0, differentiable=True)
        ...     return (stats.nll * advantages - 0.01 * stats.entropy).mean()
        >>> gradient = jax.grad(objective)(logits, jnp.array([0, 1, 2]), jnp.array([1.0, -0.5, 0.2]))
        >>> [f"{value:.3f}" for value in gradient[0]]
        ['-0.070', '0.035', '0.035']

    References:
        The entropy and its gradient: `lsce_spec.model_row`.
    """
    differentiable = keywords.pop("differentiable")
    loss, stats = _evaluate(logits, labels, keywords, with_stats=True, differentiable=differentiable)
    assert stats is not None
    return loss, stats


@takes(DenseLossKeywords)
def explain(
    logits: Float[ArrayLike, "..."],
    labels: Int[ArrayLike, "..."] | Float[ArrayLike, "..."],
    **keywords: Unpack[DenseLossKeywords],
) -> Explanation:
    """Return which way `label_smoothed_cross_entropy` takes in a call, and why not another.

    It computes the loss once, or traces it, inside of jit. Whether a compiler divides the program over devices, which
    keeps the kernel for TPUs out of it, is known later only.

    Args:
        logits: see `label_smoothed_cross_entropy`.
        labels: see `label_smoothed_cross_entropy`.
        keywords: the options of `label_smoothed_cross_entropy`, with the same defaults.

    Returns:
        The way that is taken, and the reason for each that was tried before it.

    Raises:
        TypeError, ValueError, IndexError: see `label_smoothed_cross_entropy`.

    Example: why is the kernel not used?
        >>> print(explain(jnp.zeros((2, 3)), jnp.array([0, 2])))
        cpu sums: sums over the classes in groups that LLVM makes vectors of
        not pallas: 2 rows of 3 classes are few
        not reference: nothing in this call needs it, and others are faster
        not checkpoint: it is for labels that are probabilities
    """
    reasons: ways.Reasons = {}
    _evaluate(logits, labels, keywords, with_stats=False, reasons=reasons)
    return ways.explanation(reasons, logits, jnp.issubdtype(jnp.asarray(labels).dtype, jnp.floating))


@on_automatic_axes
def _evaluate(
    logits: ArrayLike,
    labels: ArrayLike,
    keywords: DenseLossKeywords,
    *,
    with_stats: bool,
    differentiable: bool = False,
    reasons: ways.Reasons | None = None,
) -> tuple[Float[Array, "..."], LossStats | None]:
    """Return the loss, and the statistics if asked for. `reasons` is that of `ways.compute`."""
    options = LossOptions.of(keywords, kernels.IMPLEMENTATIONS)
    check_flag("differentiable", differentiable)
    batch, divisor = mean_divisor(prepare(logits, labels, options, keywords), options, keywords["denominator"])
    warn_of_bad_labels(labels, batch, options)
    return ways.compute(
        batch,
        options,
        divisor,
        class_axis=keywords["axis"],
        with_stats=with_stats,
        differentiable=differentiable,
        reasons=reasons,
    )
