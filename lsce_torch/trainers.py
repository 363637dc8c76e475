"""Losses for Hugging Face's Trainer, as its `compute_loss_func`, and for loops with Accelerate.

A trainer that accumulates gradients counts the labels of all microbatches, and of all processes, before it starts. A
loss that divides by this count gives the gradient of the mean over all labels; a mean of the microbatches' means does
not. The functions here divide by the count. They read the logits of the outputs, and so do not need transformers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, Unpack

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lsce_spec import LossOptions, names_for, renamed
from lsce_spec.keywords import takes
from lsce_torch.errors import error
from lsce_torch.functional import label_smoothed_cross_entropy
from lsce_torch.inputs import dtype_name
from lsce_torch.kernels import IMPLEMENTATIONS
from lsce_torch.keywords import TrainerLossKeywords
from lsce_torch.overwrite import check_inplace

# What the Trainer leaves out when it counts labels.
_IGNORED = -100
# What the arguments of the loss are called here.
_NAMES = names_for({"denominator": "num_items_in_batch", r"pass axis=(\d+)": "move them last"})

ComputeLoss: TypeAlias = Callable[..., Float[Tensor, ""]]


@takes(TrainerLossKeywords)
def causal_lm_loss(**keywords: Unpack[TrainerLossKeywords]) -> ComputeLoss:
    """Return the loss of a causal language model, as a function for `Trainer(compute_loss_func=...)`.

    The logits at position t are compared with the label at t + 1, as in the models' own loss.

    Args:
        smoothing, convention, prior, class_mask, z_loss, softcap, subtract_entropy, bad_labels, implementation,
            inplace_backward: see `label_smoothed_cross_entropy`. Tensors are moved to the device of the logits. A model
            that caps its logits itself, such as Gemma 2, needs no softcap here.
        class_weight: K factors of the target, as there. They do not change what the sum is divided by.

    Returns:
        A function `compute_loss(outputs, labels, num_items_in_batch=None)`: the sum of the losses of all labels that
        are not -100, divided by `num_items_in_batch`, a number or tensor, or if that is None by their own number.
        `outputs` hold logits of shape [..., T, K], `labels` are integers of shape [..., T]. If nothing counts, the loss
        is 0.

    Raises:
        TypeError, ValueError: an option out of its range. The function itself raises as `label_smoothed_cross_entropy`
            does, and TypeError for labels that are None or probabilities and for outputs without logits.

    Example:
        >>> import torch
        >>> compute_loss = causal_lm_loss(smoothing=0.1)
        >>> outputs, labels = {"logits": torch.zeros(1, 4, 8)}, torch.tensor([[5, 2, 7, -100]])
        >>> f"{compute_loss(outputs, labels):.4f} {compute_loss(outputs, labels, num_items_in_batch=8):.4f}"
        '2.0794 0.5199'

    References:
        The count, and the bug that it mends: huggingface/transformers#34191. The shift: `ForCausalLMLoss` of
        transformers, `loss/loss_utils.py`.
    """
    return _checked(keywords, shift=True)


@takes(TrainerLossKeywords)
def unshifted_loss(**keywords: Unpack[TrainerLossKeywords]) -> ComputeLoss:
    """Return `causal_lm_loss` without the shift: for labels that are where their logits are.

    So it is in classifiers, taggers, masked language models and encoder-decoders.

    Args:
        keywords: the options of `causal_lm_loss`, with the same defaults.

    Returns:
        A function `compute_loss(outputs, labels, num_items_in_batch=None)`. `outputs` hold logits of shape [..., K],
        `labels` are integers of shape [...].

    Raises:
        TypeError, ValueError: see `causal_lm_loss`.

    Example:
        >>> import torch
        >>> compute_loss = unshifted_loss(smoothing=0.1)
        >>> f"{compute_loss({'logits': torch.zeros(3, 8)}, torch.tensor([5, 2, -100])):.4f}"
        '2.0794'
    """
    return _checked(keywords, shift=False)


def _checked(keywords: TrainerLossKeywords, *, shift: bool) -> ComputeLoss:
    own = {"ignore_index": _IGNORED, "reduction": "mean"}
    LossOptions.of({**keywords, **own}, IMPLEMENTATIONS)
    check_inplace(keywords)
    return partial(_compute_loss, shift=shift, options={**keywords, **own})  # unlike a closure, it can be pickled


def _compute_loss(
    outputs: Any,
    labels: Tensor | None,
    num_items_in_batch: float | Tensor | None = None,
    *,
    shift: bool,
    options: dict[str, Any],
) -> Float[Tensor, ""]:
    logits = _logits_of(outputs)
    if labels is None or labels.is_floating_point():
        raise error("trainer_labels", given=None if labels is None else dtype_name(labels))
    # The parts of a model may be on several devices.
    labels = labels.to(logits.device)
    options = {name: value.to(logits.device) if isinstance(value, Tensor) else value for name, value in options.items()}
    if shift:
        # To shift the logits instead would copy them.
        labels = F.pad(labels[..., 1:], (0, 1), value=_IGNORED)
    denominator = (labels != _IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    if isinstance(denominator, Tensor):
        # With several GPUs in one process (nn.DataParallel) the Trainer gives a count for each of them. It has divided
        # the counts by the number of GPUs, or will multiply the loss, although this is the loss of the outputs of all.
        denominator = denominator.sum().to(logits.device)
    try:
        return label_smoothed_cross_entropy(logits, labels, **options, denominator=denominator)
    except (TypeError, ValueError) as problem:
        raise renamed(problem, _NAMES) from problem.__cause__


def _logits_of(outputs: Any) -> Tensor:
    logits = outputs
    if isinstance(outputs, dict):
        logits = outputs.get("logits")
    elif hasattr(outputs, "logits"):
        logits = outputs.logits
    elif isinstance(outputs, tuple) and outputs:
        logits = outputs[0]
    if not isinstance(logits, Tensor):
        raise error("trainer_outputs", given=type(outputs).__name__)
    return logits
