"""Smoothing added to a loss that has none: which values it needs, and what cannot be added.

A smoothed target is q_k = a [k = y] + b r_k, where r is a distribution over the classes: r_k = 1/K with a = on - off
and b = K off, or a prior with a = 1 - e and b = e. With class weights w the loss of a row is

    sum_k w_k q_k (lse - z_k) = S lse - a w_y z_y - b M
    S = a w_y + b R    R = sum_k r_k w_k    M = sum_k r_k w_k z_k

An unsmoothed loss has computed nll = lse - z_y. So lse = nll + z_y, and

    loss = S nll + b (R z_y - M) + z_loss (nll + z_y)^2

Besides nll it takes two numbers of a row: z_y and M. Without class weights S = R = 1 for "uniform" and "non_target":
"uniform" is nll + e (z_y - mean z), and "non_target" has e K/(K-1) in the place of e. Both numbers are linear in the
logits. So after a linear layer z = h W + b they are h . W_y + b_y and h . (sum_k r_k w_k W_k) + sum_k r_k w_k b_k, and
no other logit is needed.

What is not linear in the logits, or needs all of them, cannot be added: `softcap`, `max_sup`, soft labels.
"""

from lsce_spec.checks import Shape, is_floating
from lsce_spec.conventions import UNIFORM, Convention
from lsce_spec.errors import error

_REDUCE = "it returns one loss per row, which you reduce"
_ENTROPY = "the entropy of the target does not depend on the logits: subtract it from the result"
_BAD_LABELS = "a label that is not a class always makes loss and gradient NaN"

# Options of the losses that `add_smoothing` does not take, and what to do instead.
REFUSED = {
    "softcap": "pass label_logit and mean_logit of the capped logits",
    "prior": "pass the mean of the logits under the prior as mean_logit, (logits * prior).sum(-1)",
    "class_weight": "pass label_weight and mean_weight, and mean_logit of the weighted logits",
    "class_mask": "pass the mean over the classes of the mask as mean_logit, and their number as num_classes",
    "ignore_index": "it takes no labels: pass where=labels != ignore_index",
    "subtract_entropy": _ENTROPY,
    "bad_labels": "it takes no labels: a label_logit of NaN makes the loss NaN",
    "reduction": _REDUCE,
    "denominator": _REDUCE,
}
# Options of the losses that `linear_add_smoothing` does not take, and what to do instead.
LINEAR_REFUSED = {
    "softcap": "the mean of capped logits is not linear in hidden, and needs every logit. Use "
    "linear_label_smoothed_cross_entropy, which has softcap and smoothing",
    "subtract_entropy": _ENTROPY,
    "bad_labels": _BAD_LABELS,
    "reduction": _REDUCE,
    "denominator": _REDUCE,
}


def check_addable(convention: Convention) -> None:
    """Raise unless the target of a convention is the same for all logits."""
    if convention.at_max is not None:
        raise error("smoothing_at_max", given=repr(convention.name))


def check_num_classes(convention: Convention, num_classes: object) -> None:
    """Raise unless the number of classes is given where a convention depends on it."""
    if num_classes is None and convention is not UNIFORM:
        raise error("smoothing_num_classes", given=repr(convention.name))


def check_row_numbers(name: str, shape: Shape, dtype: str, batch_shape: Shape) -> None:
    """Raise unless an operand has one floating-point number for each row."""
    if not is_floating(dtype):
        raise error("row_numbers_dtype", name=name, given=dtype)
    if shape != batch_shape:
        raise error(
            "row_numbers_shape",
            name=name,
            expected=list(batch_shape),
            given=list(shape),
            hint=_row_hint(name, shape, batch_shape),
        )


def _row_hint(name: str, shape: Shape, batch_shape: Shape) -> str:
    if shape == () and name == "nll":
        return "For a loss that returns only a mean, pass zeros, and add the mean of the result to it."
    if name == "label_logit" and shape[:-1] == batch_shape:
        return "If these are hidden states or logits: linear_add_smoothing takes nll, hidden, weight and labels."
    return "Neither of them is reduced or broadcast."


def check_layer_operands(nll: Shape | None, hidden: Shape | None, weight: Shape | None) -> None:
    """Raise if the shapes are those of the operands of `add_smoothing`, which are all the same."""
    if nll is not None and nll == hidden == weight:
        raise error("smoothing_operands", given=list(nll))


def check_weights(label_weight: object, mean_weight: object) -> None:
    """Raise if only one of the two is given."""
    if (label_weight is None) != (mean_weight is None):
        missing = "label_weight" if label_weight is None else "mean_weight"
        raise error("smoothing_weights", missing=missing)
