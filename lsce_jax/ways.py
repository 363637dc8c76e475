"""The ways to compute the dense loss, in the order in which they are tried.

`compute` takes the first way that nothing speaks against, and notes what spoke against those before it, for
`functional.explain`. What speaks against a way stands in its own file, which knows what it can compute. What the
platform decides, JAX finds out when it lowers a program: `explanation` knows it from the array.
"""

import jax
from jaxtyping import Array, ArrayLike, Float

from lsce_jax import fused, kernels, reference
from lsce_jax.inputs import Batch
from lsce_jax.reductions import reduce_losses
from lsce_jax.stats import LossStats
from lsce_spec import Explanation, LossOptions, explanation_of

WAYS = {
    "pallas": "one Pallas kernel computes loss and gradient on a TPU",
    "reference": "the target is written out, and JAX differentiates plain operations",
    "checkpoint": "the reference, of which the gradient keeps nothing as large as the logits",
    "cpu sums": "sums over the classes in groups that LLVM makes vectors of",
    "cuda sums": "sums over the classes in the few fusions that XLA makes for GPUs",
    "sums": "sums over the classes, which XLA fuses",
}
# Why each way was passed over, by name; None for the way that was taken.
Reasons = dict[str, str | None]
_NOT_NEEDED = "nothing in this call needs it, and others are faster"


def compute(
    batch: Batch,
    options: LossOptions,
    divisor: float | Float[Array, ""],
    *,
    class_axis: int,
    with_stats: bool,
    differentiable: bool,
    reasons: Reasons | None = None,
) -> tuple[Float[Array, "..."], LossStats | None]:
    """Return the loss, and the statistics if asked for.

    Args:
        batch: the rows.
        options: of the call.
        divisor: what a mean divides by.
        class_axis: where the caller's logits have their classes.
        with_stats: whether to return statistics.
        differentiable: whether gradients flow through them.
        reasons: gets the ways that were tried, if they are to be explained.
    """
    reasons = {} if reasons is None else reasons
    reasons["pallas"] = reason = kernels.why_passed_over(
        batch, options, differentiable=differentiable, class_axis=class_axis
    )
    if reason is None:
        return kernels.loss_and_stats(batch, options, with_stats, divisor)
    takes_reference = options.implementation == "reference"
    reasons["reference"] = None if takes_reference else _NOT_NEEDED
    losses, stats = (reference if takes_reference else fused).row_losses(batch, options, with_stats)
    return reduce_losses(losses, options, divisor), stats if differentiable else jax.lax.stop_gradient(stats)


def explanation(reasons: Reasons, logits: ArrayLike, is_soft: bool) -> Explanation:
    """Return the explanation of a call, from the reasons that `compute` has found."""
    platform = jax.default_backend()
    if isinstance(logits, jax.Array) and not isinstance(logits, jax.core.Tracer):
        platform = next(iter(logits.devices())).platform
    if reasons["pallas"] is None and platform != "tpu":
        reasons = {"pallas": kernels.NOT_A_TPU, "reference": _NOT_NEEDED}
    if reasons.get("reference"):
        reasons = reasons | {"checkpoint": None if is_soft else "it is for labels that are probabilities"}
    if reasons.get("checkpoint"):
        own = {"cpu": "cpu sums", "gpu": "cuda sums", "cuda": "cuda sums"}.get(platform, "sums")
        reasons = reasons | {own: None}
    return explanation_of(reasons, WAYS)
