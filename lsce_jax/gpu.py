"""The sums and the gradient in the form that XLA fuses for NVIDIA's GPUs.

XLA writes an array out where it takes that to be faster than to compute it in every kernel that reads it, and it does
not see that one kernel may compute it for several sums. So it wrote out the tanh of a softcap in float32, and for a
B200 the exponentials as well: 7 to 14 accesses to bfloat16 logits, where 4 are enough. Here the gradient, and with a
softcap each sum, has logits of its own, behind a barrier that hides that they are the same. Then each sweep over the
logits is one kernel that writes nothing as large.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lsce_jax.inputs import at_labels
from lsce_jax.sums import Operands, Peaks, Sums, counted_logits, is_label, sums, sums_at

# XLA makes equal barriers one. So they differ in their number.
_GRADIENT, _OTHERS, _LARGEST = 1, 2, 3


def apart(logits: Float[Array, "*batch K"], number: int = _GRADIENT) -> Float[Array, "*batch K"]:
    """Return the logits, so that XLA does not see what they are."""
    for _ in range(number):
        logits = jax.lax.optimization_barrier(logits)  # type: ignore[no-untyped-call]
    return logits


def row_sums(operands: Operands) -> tuple[Peaks, Sums]:
    """Return what `sums.sums` returns."""
    peaks, found = sums(operands)
    if operands.softcap is None:
        return peaks, found

    def from_logits_apart(number: int) -> Sums:
        return sums_at(replace(operands, logits=apart(operands.logits, number)), peaks, is_label(operands))

    label_gap, other_gaps = _label_gap(operands, peaks), from_logits_apart(_OTHERS).other_gaps
    largest_gap = from_logits_apart(_LARGEST).largest_gap
    return peaks, found._replace(label_gap=label_gap, other_gaps=other_gaps, largest_gap=largest_gap)


def _label_gap(operands: Operands, peaks: Peaks) -> Float[Array, "*batch"]:
    """Return the gap at the label, for which only one logit of each row takes the softcap."""
    raw, _ = counted_logits(operands)
    at_label = jnp.sum(jnp.where(is_label(operands), raw, 0), axis=-1, keepdims=True)
    mask = operands.class_mask
    alone = replace(
        operands,
        logits=at_label,
        class_mask=None if mask is None else at_labels(mask, operands.labels)[..., None],
        prior=None,
        class_weight=None,
        stats=False,
    )
    return sums_at(alone, peaks, jnp.ones_like(at_label, bool)).label_gap
