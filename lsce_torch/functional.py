"""The public functions of the dense loss: they check options and tensors, and `ways.py` computes.

One function takes every option: options are plain Python values, so an unused one costs nothing.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import lru_cache
from operator import itemgetter
from typing import Any, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lsce_spec import Explanation, LossOptions, check_denominator, check_flag, is_number
from lsce_spec.keywords import takes
from lsce_torch import ways
from lsce_torch.inputs import check
from lsce_torch.kernels import IMPLEMENTATIONS
from lsce_torch.keywords import DenseLossKeywords, DenseStatsKeywords
from lsce_torch.overwrite import check_inplace
from lsce_torch.stats import LossStats

# Other ways to compute the loss. Keyed by class name, so that slow imports are avoided.
LOSSES_OF_SUBCLASSES: dict[str, Callable[..., tuple[Tensor, LossStats | None]]] = {}


@takes(DenseLossKeywords)
def label_smoothed_cross_entropy(
    logits: Float[Tensor, "..."],
    labels: Int[Tensor, "..."] | Float[Tensor, "..."],
    **keywords: Unpack[DenseLossKeywords],
) -> Float[Tensor, "..."]:
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
        smoothing: the probability e to move away from the label, in [0, 1]: a number, or a tensor that broadcasts
            to the losses. Tensors may be traced, differentiated and different for each row. Values that are at hand are
            checked: those of rows that count, on the CPU, outside of torch.compile and vmap.
        convention: where e goes. "uniform": e/K to each of the K classes (torch, Keras). "non_target": e/(K-1) to
            each other class (fairseq, tensor2tensor). "clamp": the one-hot target clamped to [e/(K-1), 1-e].
            "max_sup" (Max Suppression): lse - z_y + e (max z - mean z), which takes e from the largest logit, not from
            the label's. Or a `Convention`.
        prior: K probabilities that replace the uniform distribution in "uniform". Values are checked on the
            CPU, in eager mode. Not with a mask for each row.
        axis: dimension of the classes in logits and soft labels.
        where: booleans that broadcast to the losses; False leaves a row out: loss 0, gradient 0, not counted.
        ignore_index: rows with this label are left out likewise.
        class_weight: K factors w.
        class_mask: K booleans, or a mask for each row: booleans with the dimensions of the logits, which broadcast to
            them, with K at `axis`. Classes marked False take no part, whatever their logits hold. The smoothing goes to
            the other classes of the row, and a label outside the mask is a bad label. Rows that do not count may have
            an empty mask.
        z_loss: factor of the squared log-partition function, which keeps it near 0.
        softcap: c of z <- c tanh(z / c), applied first.
        subtract_entropy: subtract the entropy of the target: Kullback-Leibler divergence, 0 at the optimum.
        bad_labels: what a label outside the classes does. "nan": that row's loss and gradient are NaN. "raise":
            IndexError (waits for the device; not under vmap).
        reduction: "none", "sum", or "mean": the sum over `denominator`.
        denominator: the number that "mean" divides by. None: the sum of the labels' class weights over the rows that
            count; without class weights, and for soft labels, the number of those rows. With 0 the loss is 0.
        implementation: "fused", which never writes the target out; "triton", the same by kernels for GPUs; "reference",
            the readable one. None chooses "triton" for tensors on a CUDA device, otherwise "fused".
        inplace_backward: write the gradient over the logits, which saves as much memory as they take. Any use of the
            logits after `backward` raises RuntimeError. Not available with implementation="reference", in torch.compile
            and for second derivatives.

    Returns:
        Losses, with `reduction="none"` of the shape of the logits without `axis`, else a scalar. float64 for
        float64 logits, otherwise float32. The gradient has the dtype of the logits.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, value out of range, or options that exclude each other.
        IndexError: a label outside the classes, with `bad_labels="raise"`.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]], requires_grad=True)
        >>> labels = torch.tensor([0, 2])
        >>> losses = label_smoothed_cross_entropy(logits, labels, smoothing=0.1, reduction="none")
        >>> [f"{loss:.4f}" for loss in losses]
        ['0.3729', '0.2949']
        >>> loss = label_smoothed_cross_entropy(logits, labels, smoothing=0.1)
        >>> loss.backward()
        >>> f"{loss:.4f}", logits.grad.shape
        ('0.3339', torch.Size([2, 3]))

    References:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, section 7 (uniform, and
        the prior, which the paper calls u(k)); Vaswani et al., "Attention Is All You Need", 2017 (non_target);
        Zhou et al., "MaxSup: Overcoming Representation Collapse in Label Smoothing", 2025, arXiv:2502.15798 (max_sup).
        z-loss: Chowdhery et al., "PaLM", 2022, section 5. Softcap: Gemma Team, "Gemma 2", 2024, section 2.
    """
    return _evaluate(logits, labels, keywords, with_stats=False)[0]


@takes(DenseStatsKeywords)
def label_smoothed_cross_entropy_with_stats(
    logits: Float[Tensor, "..."],
    labels: Int[Tensor, "..."] | Float[Tensor, "..."],
    **keywords: Unpack[DenseStatsKeywords],
) -> tuple[Float[Tensor, "..."], LossStats]:
    """Return the loss of `label_smoothed_cross_entropy` and statistics of each row from the same sweep over the logits.

    Args:
        logits: see `label_smoothed_cross_entropy`.
        labels: see `label_smoothed_cross_entropy`.
        differentiable: whether gradients flow through nll, lse and entropy, for losses made of them. Nothing as large
            as the logits is kept for that, except with implementation="reference" and for soft labels. In a row with a
            bad label those of nll are NaN; within torch.compile those of lse and entropy too.
        keywords: the options of `label_smoothed_cross_entropy`, with the same defaults.

    Returns:
        The loss, reduced as asked, and `LossStats` with one value per row: nll (neither smoothed nor weighted),
        smoothed, z, lse, confidence, prediction, entropy, correct and valid. Without `differentiable` no gradient flows
        through them. They come from the same sweep over the logits as the loss.

    Raises:
        TypeError, ValueError, IndexError: see `label_smoothed_cross_entropy`.

    Example: loss, perplexity and accuracy of a batch with one row left out.
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0], [1.0, 1.0, 1.0]])
        >>> labels = torch.tensor([0, 1, -100])
        >>> loss, stats = label_smoothed_cross_entropy_with_stats(logits, labels, ignore_index=-100)
        >>> valid = stats.valid.sum()
        >>> f"{loss:.4f} {torch.exp(stats.nll.sum() / valid):.4f} {stats.correct.sum() / valid:.2f}"
        '1.6839 5.2975 0.50'

    Example: policy gradient with an entropy bonus, of the log-probabilities of the actions taken.
        >>> actions, advantages = torch.tensor([0, 1, 2]), torch.tensor([1.0, -0.5, 0.2])
        >>> leaf = logits.clone().requires_grad_()
        >>> _, stats = label_smoothed_cross_entropy_with_stats(leaf, actions, smoothing=0.0, differentiable=True)
        >>> (stats.nll * advantages - 0.01 * stats.entropy).mean().backward()
        >>> [f"{value:.3f}" for value in leaf.grad[0]]
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
    logits: Float[Tensor, "..."],
    labels: Int[Tensor, "..."] | Float[Tensor, "..."],
    **keywords: Unpack[DenseLossKeywords],
) -> Explanation:
    """Return which way `label_smoothed_cross_entropy` takes in a call, and why not another.

    It computes the loss once, in eager mode: some ways depend on the values. Within torch.compile the loss is made of
    plain operations, which the compiler fuses.

    Args:
        logits: see `label_smoothed_cross_entropy`.
        labels: see `label_smoothed_cross_entropy`.
        keywords: the options of `label_smoothed_cross_entropy`, with the same defaults.

    Returns:
        The way that is taken, and the reason for each that was tried before it.

    Raises:
        TypeError, ValueError, IndexError: see `label_smoothed_cross_entropy`.

    Example: why is the kernel not used?
        >>> import torch
        >>> print(explain(torch.zeros(2, 3), torch.tensor([0, 2]), z_loss=1e-4))
        sweeps: sums over the classes in blocks of rows that stay in the processor's cache
        not triton: the logits are not on a CUDA device
        not log-probabilities: it has no z-loss, softcap, max_sup or subtracted entropy
        not reference: nothing in this call needs it, and others are faster
        not plain operations: they are for torch.compile and TPUs
        not triton sweeps: the logits are not on a CUDA device
    """
    reasons: ways.Reasons = {}
    _evaluate(logits, labels, keywords, with_stats=False, reasons=reasons)
    return ways.explanation(reasons, logits, keywords["implementation"])


def _evaluate(
    logits: Tensor,
    labels: Tensor,
    keywords: DenseLossKeywords,
    *,
    with_stats: bool,
    differentiable: bool = False,
    reasons: ways.Reasons | None = None,
) -> tuple[Float[Tensor, "..."], LossStats | None]:
    """Return the loss, and the statistics if asked for. `reasons` is that of `ways.compute`."""
    options = _checked_options(keywords)
    check_flag("differentiable", differentiable)
    check_inplace(keywords)
    of_subclass = LOSSES_OF_SUBCLASSES.get(type(logits).__name__)
    if of_subclass is not None:
        if reasons is not None:
            reasons["shards"] = None
        return of_subclass(logits, labels, keywords, with_stats, differentiable)
    given = check(logits, labels, options, keywords)
    return ways.compute(
        given, options, keywords, logits, labels, with_stats=with_stats, differentiable=differentiable, reasons=reasons
    )


def _checked_options(keywords: DenseLossKeywords) -> LossOptions:
    """Return the options of a call. To check them takes longer than an operation, so those of plain values are kept."""
    if torch.compiler.is_compiling() or not is_number(keywords["smoothing"]):
        return LossOptions.of(keywords, IMPLEMENTATIONS)
    check_denominator(keywords["denominator"])
    try:
        # Only whether these two are there matters to the options.
        return _options_of(keywords["prior"] is None, keywords["denominator"] is None, *_plain_of(keywords))
    except TypeError:  # of the check, which raises it again, or since a value has no hash
        return LossOptions.of(keywords, IMPLEMENTATIONS)


_PLAIN = tuple(field.name for field in fields(LossOptions))
_plain_of = itemgetter(*_PLAIN)


@lru_cache(maxsize=1024, typed=True)
def _options_of(without_prior: bool, without_denominator: bool, *plain: Any) -> LossOptions:
    given = {"prior": None if without_prior else 1.0, "denominator": None if without_denominator else 1.0}
    return LossOptions.of(given | dict(zip(_PLAIN, plain, strict=True)), IMPLEMENTATIONS)
