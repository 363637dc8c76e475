"""The ways to compute the dense loss, in the order in which they are tried.

`compute` takes the first way that nothing speaks against, and notes what spoke against those before it, for
`functional.explain`. What speaks against a way stands in its own file, which knows what it can compute.
"""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from lsce_spec import Explanation, LossOptions, explanation_of
from lsce_torch import fused, kernels, lean, reference
from lsce_torch.errors import error
from lsce_torch.inputs import Given, canonical, warn_of_bad_labels
from lsce_torch.kernels import whole
from lsce_torch.keywords import DenseLossKeywords
from lsce_torch.overwrite import tensors_to_overwrite
from lsce_torch.reductions import mean_divisor, reduce_losses
from lsce_torch.stats import LossStats
from lsce_torch.sweeps import tried

WAYS = {
    "shards": "each rank computes its own rows or classes of a DTensor",
    "triton": "Triton kernels compute the whole loss: labels, sums, reduction and gradient",
    "log-probabilities": "torch's log_softmax and softmax on the CPU, many rows in blocks",
    "reference": "the target is written out, and autograd differentiates plain operations",
    "plain operations": "sums over the classes in plain operations, which a compiler fuses",
    "triton sweeps": "one Triton kernel for the sums over the classes, one for the gradient",
    "sweeps": "sums over the classes in blocks of rows that stay in the processor's cache",
}
# Why each way was passed over, by name; None for the way that was taken.
Reasons = dict[str, str | None]


def compute(
    given: Given,
    options: LossOptions,
    keywords: DenseLossKeywords,
    logits: Tensor,
    labels: Tensor,
    *,
    with_stats: bool,
    differentiable: bool,
    reasons: Reasons | None = None,
) -> tuple[Float[Tensor, "..."], LossStats | None]:
    """Return the loss, and the statistics if asked for.

    Args:
        given: the checked tensors of the call.
        options: of the call.
        keywords: of the call.
        logits: as the caller passed them.
        labels: likewise.
        with_stats: whether to return statistics.
        differentiable: whether gradients flow through them.
        reasons: gets the ways that were tried, if they are to be explained.
    """
    reasons = {} if reasons is None else reasons
    denominator, inplace = keywords["denominator"], keywords["inplace_backward"]
    reasons["triton"] = reason = (
        "its statistics have no gradient" if differentiable else whole.why_not(given, options, denominator)
    )
    if reason is None:
        return whole.loss(given, options, denominator, logits, inplace_backward=inplace, with_stats=with_stats)
    batch = canonical(given, options)
    if inplace:
        batch = replace(batch, overwritten=tensors_to_overwrite(logits))
    batch, divisor = mean_divisor(batch, options, denominator)
    warn_of_bad_labels(labels, batch, options)
    reasons["log-probabilities"] = reason = "it has no statistics" if with_stats else lean.why_not(batch, options)
    if reason is None:
        loss = lean.loss(batch, options, divisor)
        if loss is not None:
            return loss, None
        reasons["log-probabilities"] = lean.UNFIT
    reason = None if options.implementation == "reference" else fused.why_reference(batch, options, with_stats)
    kernels.check_choice(options.implementation, batch.logits, reason, "fused")
    if reason is not None and batch.overwritten is not None:
        raise error("inplace_needs_reference", reason=reason)
    takes_reference = reason is not None or options.implementation == "reference"
    reasons["reference"] = None if takes_reference else "nothing in this call needs it, and others are faster"
    row_losses = reference.row_losses if takes_reference else fused.row_losses
    losses, stats = row_losses(batch, options, with_stats, differentiable)
    return reduce_losses(losses, options, divisor), stats


def explanation(reasons: Reasons, logits: Tensor, implementation: str | None) -> Explanation:
    """Return the explanation of a call, from the reasons that `compute` has found."""
    if reasons.get("reference"):
        reasons = reasons | tried(logits, kernels.why_not_asked(implementation, logits))
    return explanation_of(reasons, WAYS)
