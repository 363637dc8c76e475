r"""Smoothing added to a loss that has none: `S nll + b (R z_y - M)`, as `lsce_spec.smoothing` derives it.

After a linear layer the two numbers of a row are products with two vectors: z_y with the label's row of the weight, M
with the mean of its rows, which is the same for the whole batch. So the gradient of the weight is the gradient of N of
its rows, and an outer product of two vectors.

An autograd Function keeps nothing but its arguments and the mean, and computes the labels' rows again for the gradient,
some rows of the batch at a time. Where the weight is narrow, the gradients of equal labels are added up in float32
first, in a tensor of N rows and not of K, and rounded once. Second derivatives, forward mode, torch.func and
torch.compile take the same formula in plain operations.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lsce_spec import (
    LINEAR_REFUSED,
    REFUSED,
    UNIFORM,
    LossOptions,
    check_addable,
    check_batch_operand,
    check_class_num,
    check_layer_operands,
    check_num_classes,
    check_row_numbers,
    check_weights,
    is_number,
)
from lsce_spec.keywords import defaults_of, refuses, takes
from lsce_torch import reference
from lsce_torch.errors import error
from lsce_torch.inputs import (
    Batch,
    at_labels,
    check_tensor,
    compute_dtype,
    dtype_name,
    prepare,
    tensor_of,
    warn_of_bad_labels,
)
from lsce_torch.keywords import AddSmoothingKeywords, LinearAddSmoothingKeywords, LinearLossKeywords
from lsce_torch.linear import prepare_layer
from lsce_torch.memory import in_large_pages
from lsce_torch.overwrite import has_memory

_DEFAULTS = defaults_of(LinearLossKeywords) | {"reduction": "none"}
# Numbers of a tensor that is computed at a time.
_PART = 2**22


@refuses(REFUSED)
@takes(AddSmoothingKeywords)
def add_smoothing(
    nll: Float[Tensor, "..."],
    label_logit: Float[Tensor, "..."],
    mean_logit: Float[Tensor, "..."],
    **keywords: Unpack[AddSmoothingKeywords],
) -> Float[Tensor, "..."]:
    r"""Return the label-smoothed loss of each row, given its unsmoothed loss and two numbers of its logits.

    For "uniform" this is nll + smoothing * (label_logit - mean_logit). In general, with the target `on` at the label
    and `off` elsewhere, K classes, a = on - off and b = K off,

    .. math:: (a w_y + b R)\,\text{nll} + b\,(R z_y - M) + \text{z\_loss}\,(\text{nll} + z_y)^2

    where without class weights w_y = R = 1 and M is the mean of the logits.

    Args:
        nll: -log p_y of each row, not smoothed and not weighted, of any shape. float64, float32, bfloat16 or float16,
            as the next two.
        label_logit: z_y, the logit at the label of each row.
        mean_logit: M, the mean of the logits of each row over the classes. For a prior r pass sum_k r_k z_k and keep
            "uniform"; with class weights w pass sum_k r_k w_k z_k, where r_k is 1/K without a prior.
        smoothing: see `label_smoothed_cross_entropy`.
        convention: see there; not "max_sup", nor another with `at_max`.
        num_classes: K, which every convention but "uniform" needs.
        where: booleans that broadcast to nll; False leaves a row out: loss 0, gradient 0, whatever its numbers are.
        label_weight: w_y, the class weight of each row's label, or None.
        mean_weight: R, the sum_k r_k w_k: a number, or a tensor that broadcasts to nll. With `label_weight` only.
        z_loss: factor of the squared log-partition function lse = nll + z_y.

    Returns:
        Losses of the shape of nll. float64 if one of the three is, otherwise float32.

    Raises:
        TypeError: wrong type or dtype, or an option that cannot be added, such as softcap; the message says why.
        ValueError: wrong shape, value out of range, or a convention that cannot be added.

    Example: a loss that has no smoothing.
        >>> import torch
        >>> logits, labels = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]]), torch.tensor([0, 2])
        >>> nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        >>> label_logit = logits.gather(-1, labels[:, None])[:, 0]
        >>> losses = add_smoothing(nll, label_logit, logits.mean(-1), smoothing=0.1)
        >>> [f"{loss:.4f}" for loss in losses]
        ['0.3729', '0.2949']

    References:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, section 7. The derivation is
        in `lsce_spec.smoothing`.
    """
    label_weight, mean_weight = keywords["label_weight"], keywords["mean_weight"]
    check_weights(label_weight, mean_weight)
    rows = {"nll": nll, "label_logit": label_logit, "mean_logit": mean_logit}
    if label_weight is not None:
        rows["label_weight"] = label_weight
    for name, tensor in rows.items():
        check_tensor(name, tensor)
        check_row_numbers(name, tuple(tensor.shape), dtype_name(tensor), tuple(nll.shape))
    options = LossOptions.of({**_DEFAULTS, **keywords})
    check_addable(options.convention)
    check_num_classes(options.convention, keywords["num_classes"])
    num_classes = 1 if keywords["num_classes"] is None else keywords["num_classes"]
    check_class_num(num_classes, name="num_classes")
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in rows.values()) else torch.float32
    # No label is read: of a batch the options need shapes, dtype and the rows that count.
    logits = nll.new_zeros(1, dtype=dtype).expand(*nll.shape, num_classes)
    labels = nll.new_zeros(nll.shape, dtype=torch.int64)
    batch = prepare(logits, labels, options, {"where": keywords["where"]})
    wide = {name: tensor.to(batch.dtype) for name, tensor in rows.items()}
    if mean_weight is not None:
        weights = tensor_of(mean_weight, batch.dtype, nll.device).to(batch.dtype)
        check_batch_operand("mean_weight", tuple(weights.shape), None, tuple(nll.shape))
        wide["mean_weight"] = weights.expand(nll.shape)
    return _smoothed(batch, options, **wide)


@refuses(LINEAR_REFUSED)
@takes(LinearAddSmoothingKeywords)
def linear_add_smoothing(
    nll: Float[Tensor, "..."],
    hidden: Float[Tensor, "... D"],
    weight: Float[Tensor, "K D"],
    labels: Int[Tensor, "..."],
    **keywords: Unpack[LinearAddSmoothingKeywords],
) -> Float[Tensor, "..."]:
    r"""Return the label-smoothed loss of each row, given the unsmoothed loss of a linear layer, without its logits.

    The result, and its gradients, are those of `linear_label_smoothed_cross_entropy`, with nll from any loss that has
    no smoothing. Each row takes products with two vectors, and none with the whole weight.

    Args:
        nll: [...] the unsmoothed loss of each row, -log p_y, as `reduction="none"` of most libraries gives it; not
            weighted. For a loss that returns only its mean, pass zeros, and add the mean of the result to that mean.
        hidden: [..., D] features, which the loss was given. float64, float32, bfloat16 or float16.
        weight: [K, D], that of nn.Linear, of any of these dtypes. It is rounded to the dtype of hidden.
        labels: [...] class indices, of any integer dtype. A label that is not a class makes loss and gradients NaN.
        bias: K numbers, or None; the same that the loss was given.
        smoothing, convention, prior, where, ignore_index, class_weight, z_loss: see `label_smoothed_cross_entropy`.
            Not "max_sup", nor another convention with `at_max`. Rows that are left out are 0, whatever nll holds.
        class_mask: K booleans; smoothing goes to the classes marked True. nll must be of these classes alone.

    Returns:
        Losses [...], to be reduced by the caller. float64 for float64 hidden, otherwise float32.

    Raises:
        TypeError: wrong type or dtype, or an option that cannot be added, such as softcap; the message says why.
        ValueError: wrong shape, value out of range, or a convention that cannot be added.

    Example:
        >>> import torch
        >>> hidden, weight = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.eye(3, 2)
        >>> labels = torch.tensor([0, 1])
        >>> nll = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
        >>> losses = linear_add_smoothing(nll, hidden, weight, labels, smoothing=0.1)
        >>> f"{losses.mean():.4f}"
        '0.3339'

    References:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, section 7. The derivation is
        in `lsce_spec.smoothing`.
    """
    options = LossOptions.of({**_DEFAULTS, **keywords})
    check_addable(options.convention)
    check_layer_operands(*(getattr(operand, "shape", None) for operand in (nll, hidden, weight)))
    layer, num_classes = prepare_layer(hidden, weight, labels, keywords["bias"])
    if labels.is_floating_point():
        raise error("smoothing_soft_labels", given=dtype_name(labels))
    logits = layer.hidden.new_zeros(1).expand(*layer.hidden.shape[:-1], num_classes)
    batch = prepare(logits, labels, options, keywords)
    warn_of_bad_labels(labels, batch, options)
    if batch.has_row_masks:
        raise error("smoothing_row_mask")
    check_tensor("nll", nll)
    check_row_numbers("nll", tuple(nll.shape), dtype_name(nll), batch.batch_shape)
    factor, allowed = _mean_factor(batch, num_classes), batch.class_mask
    of_hidden = layer.hidden
    if batch.counted is not None:
        of_hidden = torch.where(batch.counted[..., None], of_hidden, 0)
    label_logit, mean_logit = _products(of_hidden, layer.weight, batch.labels, factor, allowed)
    if layer.bias is not None:
        bias = layer.bias.to(batch.dtype)
        label_logit = label_logit + at_labels(bias, batch.labels)
        mean_logit = mean_logit + (factor * (bias if allowed is None else torch.where(allowed, bias, 0))).sum()
    weights = {}
    if batch.class_weight is not None:
        weights["label_weight"] = at_labels(batch.class_weight, batch.labels)
        weights["mean_weight"] = factor.sum().expand(batch.batch_shape)
    return _smoothed(batch, options, nll=nll.to(batch.dtype), label_logit=label_logit, mean_logit=mean_logit, **weights)


def _smoothed(
    batch: Batch,
    options: LossOptions,
    *,
    nll: Float[Tensor, "*batch"],
    label_logit: Float[Tensor, "*batch"],
    mean_logit: Float[Tensor, "*batch"],
    label_weight: Float[Tensor, "*batch"] | None = None,
    mean_weight: Float[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Return S nll + b (R z_y - M) + z_loss (nll + z_y)^2: 0 for rows that do not count, NaN for bad labels."""
    if batch.counted is not None:
        nll, label_logit, mean_logit = (torch.where(batch.counted, rows, 0) for rows in (nll, label_logit, mean_logit))
    at_label, spread = _label_and_spread(batch, options)
    if label_weight is not None and mean_weight is not None:
        mass = at_label * label_weight + spread * mean_weight
        gap = mean_weight * label_logit - mean_logit
    else:
        mass, gap = at_label + spread, label_logit - mean_logit
    # A logit of -inf makes the gap infinite. 0 * inf counts as 0, and finite gaps are the derivative of `spread`.
    gap = torch.where(reference.is_nothing(spread) & torch.isinf(gap), 0, gap)
    losses = mass * nll + spread * gap
    if options.z_loss:
        losses = losses + options.z_loss * (nll + label_logit) ** 2
    return losses if batch.counted is None else torch.where(batch.counted, losses, 0)


def _label_and_spread(batch: Batch, options: LossOptions) -> tuple[Float[Tensor, "*#batch"], Float[Tensor, "*#batch"]]:
    """Return a and b: the target at the label beyond what each class gets, and what is spread over all classes."""
    if options.convention is UNIFORM:
        pair = 1 - batch.smoothing, batch.smoothing
    else:
        on, off = reference.on_off(batch, options)
        pair = on - off, off * reference.count_allowed(batch)
    at_label, spread = (_per_row(value, batch) for value in pair)
    if batch.bad is None:
        return at_label, spread
    # NaN in both reaches every gradient of the row but that of the smoothing.
    return torch.where(batch.bad, torch.nan, at_label), torch.where(batch.bad, torch.nan, spread)


def _per_row(value: float | Tensor, batch: Batch) -> Float[Tensor, "*#batch"]:
    value = tensor_of(value, batch.dtype, batch.labels.device)
    return value if is_number(batch.smoothing) or not value.ndim else value.squeeze(-1)


def _mean_factor(batch: Batch, num_classes: int) -> Float[Tensor, " K"]:
    """Return r_k w_k: the factor of each class in the mean."""
    if batch.prior is not None:
        factor = batch.prior
    elif batch.class_mask is not None:
        factor = batch.class_mask.to(batch.dtype) / reference.count_allowed(batch)
    else:
        factor = torch.full((num_classes,), 1 / num_classes, dtype=batch.dtype, device=batch.labels.device)
    return factor if batch.class_weight is None else factor * batch.class_weight


def _products(
    hidden: Float[Tensor, "*batch D"],
    weight: Float[Tensor, "K D"],
    labels: Int[Tensor, "*batch"],
    factor: Float[Tensor, " K"],
    allowed: Bool[Tensor, " K"] | None,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Return the product of each row with the row of the weight at its label, and with the mean of the allowed rows."""
    operands = hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), factor, allowed
    if torch.compiler.is_compiling() or factor.requires_grad or not has_memory(*operands[:4]):
        found = _plain_products(*operands)
    else:
        found = _Products.apply(*operands)[:2]  # type: ignore[no-untyped-call]
    label_logit, mean_logit = found
    return label_logit.reshape(labels.shape), mean_logit.reshape(labels.shape)


# All products are by elements: autocast would compute matrix products in a narrow dtype.


def _plain_products(
    hidden: Float[Tensor, "n D"],
    weight: Float[Tensor, "K D"],
    labels: Int[Tensor, " n"],
    factor: Float[Tensor, " K"],
    allowed: Bool[Tensor, " K"] | None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return what `_products` does, in operations that torch differentiates, compiles and vectorises."""
    dtype, narrow = compute_dtype(hidden), hidden.dtype
    wide = hidden.to(dtype)
    averaged = weight.to(narrow).to(dtype)
    if allowed is not None:
        averaged = torch.where(allowed[:, None], averaged, 0)
    mean_row = (averaged * factor[:, None]).sum(0)
    if weight.dtype == dtype:
        at_label = weight[labels].to(narrow).to(dtype)
    else:
        found, place = _distinct(labels)
        at_label = weight[found].to(narrow).to(dtype)[place]
    return (wide * at_label).sum(-1), (wide * mean_row).sum(-1)


def _distinct(labels: Int[Tensor, " n"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Return the labels that occur, each once, and the place of each row's label among them.

    Places beyond the last hold a label that no row is placed at. How many they are would be a value to wait for.
    """
    ordered, order = labels.sort()
    is_new = torch.zeros_like(labels)
    is_new[1:] = (ordered[1:] != ordered[:-1]).to(labels.dtype)
    place = torch.zeros_like(labels).scatter(0, order, is_new.cumsum(0))
    return torch.zeros_like(labels).scatter(0, place, labels), place


class _Products(torch.autograd.Function):
    """The products, computed again for the gradient some rows at a time."""

    @staticmethod
    def forward(
        hidden: Float[Tensor, "n D"],
        weight: Float[Tensor, "K D"],
        labels: Int[Tensor, " n"],
        factor: Float[Tensor, " K"],
        allowed: Bool[Tensor, " K"] | None,
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " D"]]:
        """Return both products, and the mean of the rows."""
        dtype, narrow = compute_dtype(hidden), hidden.dtype
        mean_row = torch.zeros(weight.shape[1], dtype=dtype, device=weight.device)
        with torch.autocast(weight.device.type, enabled=False):
            for part in _parts(*weight.shape):
                averaged = weight[part].to(narrow).to(dtype)
                if allowed is not None:
                    averaged = torch.where(allowed[part, None], averaged, 0)
                mean_row.addmv_(averaged.T, factor[part])
        label_logit, mean_logit = (torch.empty(labels.shape, dtype=dtype, device=labels.device) for _ in range(2))
        for part in _parts(*hidden.shape):
            wide = hidden[part].to(dtype)
            label_logit[part] = (wide * weight[labels[part]].to(narrow)).sum(-1)
            mean_logit[part] = (wide * mean_row).sum(-1)
        return label_logit, mean_logit, mean_row

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the arguments, which the caller has anyway, and the mean of the rows."""
        mean_row = output[-1]
        ctx.mark_non_differentiable(mean_row)
        ctx.save_for_backward(*inputs, mean_row)

    @staticmethod
    def backward(ctx: Any, of_label: Tensor, of_mean: Tensor, _of_row: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to hidden and weight."""
        *operands, mean_row = ctx.saved_tensors
        hidden, weight, labels, factor, _ = operands
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() or not has_memory(of_label, of_mean):
            return *_plain_gradients(operands, needed, (of_label, of_mean)), None, None, None
        of_hidden = torch.empty_like(hidden) if needed[0] else None
        if of_hidden is not None:
            for part in _parts(*hidden.shape):
                at_label = weight[labels[part]].to(hidden.dtype).to(mean_row.dtype)
                of_hidden[part] = at_label.mul_(of_label[part, None]).addcmul_(of_mean[part, None], mean_row)
        of_weight = _weight_gradient(hidden, weight, labels, factor, (of_label, of_mean)) if needed[1] else None
        return of_hidden, of_weight, None, None, None


def _parts(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Yield slices of rows, of which each has about `_PART` numbers."""
    size = max(1, _PART // max(num_columns, 1))
    for start in range(0, num_rows, size):
        yield slice(start, start + size)


def _weight_gradient(
    hidden: Float[Tensor, "n D"],
    weight: Float[Tensor, "K D"],
    labels: Int[Tensor, " n"],
    factor: Float[Tensor, " K"],
    upstream: tuple[Float[Tensor, " n"], Float[Tensor, " n"]],
) -> Float[Tensor, "K D"]:
    """Return the outer product of the factors with the sum over the rows, and at each label what its rows add."""
    of_label, of_mean = upstream
    dtype = factor.dtype
    of_row = torch.zeros(weight.shape[1], dtype=dtype, device=weight.device)
    gradient = in_large_pages(torch.empty_like(weight))
    if weight.dtype == dtype:
        sums, places = gradient, labels
    else:
        sums, places = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device), _distinct(labels)[1]
    for part in _parts(*hidden.shape):
        of_row += (hidden[part].to(dtype) * of_mean[part, None]).sum(0)
    for part in _parts(*weight.shape):
        gradient[part] = factor[part, None] * of_row
    for part in _parts(*hidden.shape):
        sums.index_put_((places[part],), hidden[part].to(dtype) * of_label[part, None], accumulate=True)
    if sums is not gradient:
        for part in _parts(*hidden.shape):
            of_class = sums[places[part]] + factor[labels[part], None] * of_row
            gradient[labels[part]] = of_class.to(weight.dtype)  # rows of equal labels write the same
    return gradient


def _plain_gradients(
    operands: Sequence[Tensor], needed: tuple[bool, bool], upstream: tuple[Tensor, Tensor]
) -> list[Tensor | None]:
    """Return the gradients with respect to hidden and weight, to be differentiated again."""
    with torch.enable_grad():
        products = _plain_products(*operands)
    wanted = [operand for operand, is_needed in zip(operands[:2], needed, strict=True) if is_needed]
    found = iter(torch.autograd.grad(products, wanted, upstream, create_graph=torch.is_grad_enabled()))
    return [next(found) if is_needed else None for is_needed in needed]
