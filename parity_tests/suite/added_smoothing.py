"""The dense loss as `add_smoothing` makes it, and bounds of losses that smoothing is added to."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

import lsce_torch
from parity_tests.losses.wrapped import counted
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.bounds import error_bound
from parity_tests.truth.cases import Case, LinearCase
from parity_tests.truth.comparison import Parts
from parity_tests.truth.linear_bounds import linear_bound
from parity_tests.truth.oracle import LinearTruth, solve
from parity_tests.truth.precision import FORMATS, compute_dtype

# Which linear cases smoothing cannot be added to, and why.
NOT_ADDED = {
    "linear_softcap": "not linear in the logits",
    "linear_max_sup": "needs the largest logit",
    "linear_everything": "softcap",
    "linear_class_mask_of_rows": "needs every logit for the mean of each row",
}


def torch_dense_added(logits: Any, labels: Any, *, axis: int = -1, **options: Any) -> Any:
    """Our dense loss without smoothing, of each row, with `add_smoothing` of all logits.

    As `add_smoothing` says: the logits are capped, the mean is over the mask, by the prior, and weighted.
    """
    logits = logits.movedim(axis, -1).to(torch.promote_types(logits.dtype, torch.float32))
    rows = counted(labels, options)
    logits, labels = torch.where(rows[..., None], logits, 0), torch.where(rows, labels, 0).long()
    if options.get("softcap") is not None:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    num_classes, mask = logits.shape[-1], options.get("class_mask")
    allowed = torch.ones(num_classes, dtype=torch.bool) if mask is None else mask
    share = options.get("prior", allowed.to(logits.dtype) / allowed.sum())
    class_weight = options.get("class_weight")
    factor = share if class_weight is None else share * class_weight
    nll = lsce_torch.label_smoothed_cross_entropy(
        logits, labels, smoothing=0.0, reduction="none", class_mask=mask, where=rows
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
        where=rows,
        z_loss=options.get("z_loss", 0.0),
        **weights,
    )


def dense_bounds_of_added(case: Case, arithmetic: Arithmetic) -> Parts:
    """Return the bounds of the dense loss, of single rows, and what they grow by where smoothing is added to them.

    The unsmoothed loss and the gap R z_y - M are computed apart. So errors are of the size of each, also where the two
    cancel, as with a smoothing near 1, and of the size of the logits, where these have an offset. With f_k = r_k w_k
    and h the depth of a sum over the classes:

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
    if "products of rows" in arithmetic.narrow:  # the unsmoothed loss is of rows, whatever the caller reduces
        arithmetic = replace(arithmetic, narrow=arithmetic.narrow | {"products"})
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
