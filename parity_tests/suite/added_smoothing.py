"""Losses without smoothing, with smoothing added by `linear_add_smoothing`, as adapters of the linear loss.

A user adds smoothing to the loss of each row and reduces the result. So these functions do the same, and take the
arguments of `linear_label_smoothed_cross_entropy`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch.nn import functional as F

import lsce_jax
import lsce_torch
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.bounds import error_bound
from parity_tests.truth.cases import Case, LinearCase
from parity_tests.truth.comparison import Parts
from parity_tests.truth.linear_bounds import linear_bound
from parity_tests.truth.oracle import LinearTruth, solve
from parity_tests.truth.precision import FORMATS, compute_dtype

Loss = Callable[..., Any]
IGNORED = -100
# Options that the loss without smoothing has too. The others are those of the smoothing.
OF_NLL = ("bias", "where", "ignore_index", "class_mask", "chunk_size")
OF_CALLER = ("chunk_size", "reduction", "denominator")

# Which cases smoothing cannot be added to, and why.
NOT_ADDED = {
    "linear_softcap": "not linear in the logits",
    "linear_max_sup": "needs the largest logit",
    "linear_everything": "softcap",
}


def jax_added(nll: Loss, add: Loss = lsce_jax.linear_add_smoothing) -> Loss:
    """Return the loss that is made of an unsmoothed one of JAX."""

    def loss(hidden: Any, weight: Any, labels: Any, **options: Any) -> Any:
        rows = nll(hidden, weight, labels, **{name: options[name] for name in OF_NLL if name in options})
        added = {name: value for name, value in options.items() if name not in OF_CALLER}
        losses, weights = add(rows, hidden, weight, labels, **added), jnp.ones(labels.shape, rows.dtype)
        if options["reduction"] != "mean":
            return losses if options["reduction"] == "none" else losses.sum()
        if "class_weight" in options:
            weights = options["class_weight"].at[labels].get(mode="clip")
        total = jnp.sum(jnp.where(_counted(labels, options), weights, 0))
        return losses.sum() / jnp.where(total == 0, 1, total)

    return loss


def torch_added(nll: Loss, add: Loss = lsce_torch.linear_add_smoothing) -> Loss:
    """Return the loss that is made of an unsmoothed one of torch."""

    def loss(hidden: Any, weight: Any, labels: Any, **options: Any) -> Any:
        rows = nll(hidden, weight, labels, **{name: options[name] for name in OF_NLL if name in options})
        added = {name: value for name, value in options.items() if name not in OF_CALLER}
        losses, weights = add(rows, hidden, weight, labels, **added), torch.ones(labels.shape, dtype=rows.dtype)
        if options["reduction"] != "mean":
            return losses if options["reduction"] == "none" else losses.sum()
        if "class_weight" in options:
            weights = options["class_weight"][labels.clamp(0, weight.shape[0] - 1)]
        total = torch.where(torch.as_tensor(_counted(labels, options)), weights, 0).sum()
        return losses.sum() / torch.where(total == 0, 1, total)

    return loss


def _counted(labels: Any, options: dict[str, Any]) -> Any:
    counted = options.get("where", labels == labels)
    return counted & (labels != options["ignore_index"]) if options.get("ignore_index") is not None else counted


def ours_of_jax(hidden: Any, weight: Any, labels: Any, **options: Any) -> Any:
    """Our linear loss without smoothing, of each row."""
    return lsce_jax.linear_label_smoothed_cross_entropy(hidden, weight, labels, smoothing=0.0, **options)


def optax_of_logits(
    hidden: Any, weight: Any, labels: Any, bias: Any = None, class_mask: Any = None, **others: Any
) -> Any:
    """Optax's loss of all logits, in the compute dtype."""
    del others  # a row that does not count may have any loss
    dtype = compute_dtype(hidden.dtype.name)
    logits = jnp.matmul(hidden, weight.astype(hidden.dtype), preferred_element_type=dtype)
    ones = (1,) * (logits.ndim - 1)
    if bias is not None:
        logits = logits + bias.astype(dtype).reshape(*ones, -1)
    if class_mask is not None:
        logits = jnp.where(class_mask.reshape(*ones, -1), logits, -jnp.inf)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def ours_of_torch(hidden: Any, weight: Any, labels: Any, **options: Any) -> Any:
    """Our linear loss without smoothing, of each row."""
    unsmoothed = {"smoothing": 0.0, "reduction": "none"}
    return lsce_torch.linear_label_smoothed_cross_entropy(hidden, weight, labels, **unsmoothed, **options)


def cross_entropy_of_logits(
    hidden: Any, weight: Any, labels: Any, bias: Any = None, class_mask: Any = None, **others: Any
) -> Any:
    """torch's loss of all logits, which the layer stores in the dtype of hidden."""
    bias = None if bias is None else bias.to(hidden.dtype)
    logits = F.linear(hidden, weight.to(hidden.dtype), bias)
    if class_mask is not None:
        logits = torch.where(class_mask, logits, -torch.inf)
    labels = torch.where(torch.as_tensor(_counted(labels, others)), labels, IGNORED)
    wide = getattr(torch, compute_dtype(str(hidden.dtype).removeprefix("torch.")))
    if logits.ndim > 2:
        logits = logits.movedim(-1, 1)
    return F.cross_entropy(logits.to(wide), labels, reduction="none", ignore_index=IGNORED)


def torch_dense_added(logits: Any, labels: Any, *, axis: int = -1, **options: Any) -> Any:
    """Our dense loss without smoothing, of each row, with `add_smoothing` of all logits.

    As `add_smoothing` says: the logits are capped, the mean is over the mask, by the prior, and weighted.
    """
    logits = logits.movedim(axis, -1).to(torch.promote_types(logits.dtype, torch.float32))
    counted = torch.as_tensor(_counted(labels, options)).expand(labels.shape)
    logits, labels = torch.where(counted[..., None], logits, 0), torch.where(counted, labels, 0).long()
    if options.get("softcap") is not None:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    num_classes, mask = logits.shape[-1], options.get("class_mask")
    allowed = torch.ones(num_classes, dtype=torch.bool) if mask is None else mask
    share = options.get("prior", allowed.to(logits.dtype) / allowed.sum())
    class_weight = options.get("class_weight")
    factor = share if class_weight is None else share * class_weight
    nll = lsce_torch.label_smoothed_cross_entropy(
        logits, labels, smoothing=0.0, reduction="none", class_mask=mask, where=counted
    )
    is_class = (labels >= 0) & (labels < num_classes)
    at_label = torch.where(is_class, labels, 0)
    weights = {}
    if class_weight is not None:
        weights = {"label_weight": class_weight[at_label], "mean_weight": factor.sum()}
    return lsce_torch.add_smoothing(
        nll,
        torch.where(is_class, logits.gather(-1, at_label[..., None])[..., 0], torch.nan),
        (torch.where(allowed, logits, 0) * factor).sum(-1),
        smoothing=options["smoothing"],
        convention=options.get("convention", "uniform"),
        num_classes=int(allowed.sum()),
        where=counted,
        z_loss=options.get("z_loss", 0.0),
        **weights,
    )


def dense_bounds_of_added(case: Case, arithmetic: Arithmetic) -> Parts:
    """Return the bounds of the dense loss, of single rows, and what they grow by where smoothing is added to them.

    The unsmoothed loss and the gap R z_y - M are computed apart. So errors are of the size of each, also where the two
    cancel, as with a smoothing near 1, and of the size of the logits, where these have an offset. With f_k = r_k w_k and
    h the depth of a sum over the classes:

    - loss: 4 u (S nll + b R |z_y|) + (h + 4) u b sum f_k |z_k|, and for z_loss 4 u z_loss |lse| (|nll| + |z_y|);
    - gradient: 4 u (S + b R) at the label, 4 u b f_k elsewhere.
    """
    truth = solve(case)
    bound = error_bound(case, truth, arithmetic)
    rows, classes, live = case.rows(), np.arange(case.num_classes), truth.counted & ~truth.bad
    u = FORMATS[compute_dtype(case.dtype)].roundoff
    allowed = np.ones(case.num_classes, bool) if case.class_mask is None else case.class_mask
    logits = np.where(allowed & live[:, None], rows.logits, 0.0)
    if case.options.get("softcap") is not None:
        logits = case.options["softcap"] * np.tanh(logits / case.options["softcap"])
    weight = np.ones(case.num_classes) if case.class_weight is None else case.class_weight
    is_label = (classes == rows.labels[:, None]) & live[:, None]
    # b f_k: the weighted target, but at the label only what every class gets.
    share = allowed / allowed.sum() if case.prior is None else case.prior
    others = truth.target * weight * ~is_label
    spread = np.sum(others, axis=-1) / np.maximum(np.sum(share * weight * ~is_label, axis=-1), 1e-300)
    at_classes = np.abs(spread[:, None] * share * weight)
    mass, mean_mass = (np.sum(of, axis=-1) for of in (np.abs(truth.target * weight), at_classes))
    peak = np.max(np.where(allowed, logits, -np.inf), axis=-1, keepdims=True)
    lse = np.log(np.sum(np.where(allowed, np.exp(logits - peak), 0.0), axis=-1)) + peak[:, 0]
    at_label = np.sum(np.where(is_label, logits, 0.0), axis=-1)
    nll, depth = lse - at_label, arithmetic.depth(case.num_classes)
    sizes = np.where(np.isfinite(logits), np.abs(logits), 0.0)
    loss = 4 * u * (mass * nll + mean_mass * np.abs(at_label)) + (depth + 4) * u * np.sum(at_classes * sizes, axis=-1)
    loss = loss + 4 * u * case.options.get("z_loss", 0.0) * np.abs(lse) * (nll + np.abs(at_label))
    gradient = 4 * u * np.where(is_label, (mass + mean_mass)[:, None], at_classes) * np.abs(truth.factor)[:, None]
    return {
        "loss": bound.loss + np.where(live, loss, 0.0),
        "gradient": bound.gradient + np.where(live[:, None], gradient, 0.0),
    }


def bounds_of_added(case: LinearCase, arithmetic: Arithmetic) -> Parts:
    """Return the bounds of the linear loss. Where gradients are narrow, each is a sum of two that are rounded."""
    truth = solve(case)
    assert isinstance(truth, LinearTruth)
    bounds = dict(linear_bound(case, truth, arithmetic))
    live = truth.counted & ~truth.bad
    weight = 1.0 if case.class_weight is None else case.class_weight
    slope = np.sum(truth.target * weight, axis=-1) * truth.factor
    if case.options.get("z_loss"):
        lse = np.log(np.sum(np.exp(case.rows().logits), axis=-1))
        slope = slope + 2 * case.options["z_loss"] * lse * truth.factor
    unsmoothed = replace(
        case,
        smoothing=0.0,
        prior=None,
        class_weight=None,
        upstream=np.where(live, slope, 0.0).reshape(case.batch_shape),
        options={name: value for name, value in case.options.items() if name == "ignore_index"},
    )
    first = solve(unsmoothed).parts
    for part, dtype in case.result_dtypes.items():
        fmt = FORMATS[dtype]
        if part != "loss" and dtype != compute_dtype(dtype):
            sizes = np.abs(first[part].high) + np.abs(truth.parts[part].high - first[part].high)
            bounds[part] = bounds[part] + 2 * fmt.roundoff * sizes + 2 * fmt.smallest
    return bounds
