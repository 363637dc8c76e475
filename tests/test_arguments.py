"""The table of arguments in docs/migrating.md: what an argument does in its library, our line for it does here.

The lines are read from the page. torch's losses run; for the others the formula is written out under the library's own
names, in float64, and parity_tests/suite/test_liger.py runs those of Liger. Ours are float32, and within the bound of
`error_bound` of the formula, whose own error is a millionth of it.
"""

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lsce_torch import label_smoothed_cross_entropy_with_stats as dense_loss
from lsce_torch import linear_label_smoothed_cross_entropy as linear_loss
from parity_tests.losses.adapters import TorchAdapter
from parity_tests.truth.bounds import Bound, error_bound
from parity_tests.truth.cases import Case
from parity_tests.truth.oracle import solve

PAGE = Path(__file__).parents[1] / "docs" / "migrating.md"
ARITHMETIC = TorchAdapter().arithmetic
U = 2.0**-24

_GENERATOR = np.random.default_rng(0)
# -1, 0 and 1 times eighths: the logits are exact, whatever the order of the sums.
HIDDEN = _GENERATOR.integers(-1, 2, (9, 6)).astype(np.float64)
WEIGHT = _GENERATOR.integers(-16, 17, (7, 6)) / 8
BIAS = _GENERATOR.integers(-8, 9, 7) / 4
LOGITS = HIDDEN @ WEIGHT.T
LABELS = np.array([3, 0, 6, 1, -100, 2, 5, 0, -100])
LABELS[1:3] = LOGITS[1:3].argmax(-1)  # two that are right
# What the names of the table stand for.
NAMES = {
    "e": 0.125,
    "z": 0.0625,
    "c": 3.0,
    "s": 0.5,
    "n": 4,
    "w": torch.from_numpy(_GENERATOR.integers(1, 16, 7) / 4),
    "b": torch.from_numpy(BIAS),
    "labels": torch.from_numpy(LABELS),
    "torch": torch,
}
COUNT = int((LABELS != -100).sum())


# --- The libraries' losses --------------------------------------------------------------------------------------------


def rows(logits: Tensor, labels: Tensor, e: float, weight: Tensor | None = None, z: float = 0.0) -> Tensor:
    """Return (1 - e) w_y (lse - z_y) + e/K sum w_k (lse - z_k) + z lse^2 for each row; labels are classes."""
    lse = logits.logsumexp(-1)
    weight = torch.ones_like(logits[0]) if weight is None else weight
    nll = lse[:, None] - logits
    of_label = weight[labels] * nll.gather(-1, labels[:, None])[:, 0]
    return (1 - e) * of_label + e * (weight * nll).mean(-1) + z * lse**2


def reduced(losses: Tensor, reduction: str, count: Any) -> Tensor:
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / count}[reduction]


def liger(  # noqa: PLR0913, PLR0917  # the library's own arguments
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Any:
    """liger-kernel 0.8.5, LigerCrossEntropyLoss; one of the results that are asked for in place of the loss."""
    counted = labels != ignore_index
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if return_predicted_tokens:
        return logits.argmax(-1).where(counted, -1)
    if return_token_accuracy:
        return (logits.argmax(-1) == labels)[counted].double().mean()
    if return_z_loss:
        return lse_square_scale * (logits.logsumexp(-1) ** 2)[counted].mean()
    classes = labels.where(counted, 0)
    losses = rows(logits, classes, label_smoothing, weight, lse_square_scale).where(counted, 0)
    return reduced(losses, reduction, counted.sum() if weight is None else weight[classes][counted].sum())


def liger_linear(
    weight: Tensor,
    hidden: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    use_token_scaling: bool = False,
    **others: Any,
) -> Tensor:
    """liger-kernel 0.8.5, LigerFusedLinearCrossEntropyLoss."""
    logits = F.linear(hidden, weight, bias)
    if not use_token_scaling:
        return liger(logits, labels, ce_weight, **others)
    losses, counted = liger(logits, labels, reduction="none", **others), labels != -100
    p = logits.softmax(-1).gather(-1, labels.where(counted, 0)[:, None])[:, 0].detach()
    return (losses * p).sum() / counted.sum()


def flash_attention(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    inplace_backward: bool = False,
) -> Tensor:
    """Dao-AILab/flash-attention 2.8.3, flash_attn/losses/cross_entropy.py, without a process group."""
    counted = labels != ignore_index
    losses = rows(logits * logit_scale, labels.where(counted, 0), label_smoothing, z=lse_square_scale)
    return reduced(losses.where(counted, 0), reduction, counted.sum())


def transformer_engine(
    logits: Tensor, target: Tensor, label_smoothing: float = 0.0, reduce_loss: bool = False, ignore_idx: int = -100
) -> Tensor:
    """NVIDIA/TransformerEngine, commit 02965d2, pytorch/cross_entropy.py and triton/cross_entropy.py."""
    counted = target != ignore_idx
    losses = rows(logits, target.where(counted, 0), label_smoothing).where(counted, 0)
    return losses.mean() if reduce_loss else losses


def apex(logits: Tensor, labels: Tensor, smoothing: float = 0.0, padding_idx: int = 0) -> Tensor:
    """NVIDIA/apex, apex/contrib/xentropy/softmax_xentropy.py; without a bad label, which it does not look for."""
    counted = labels != padding_idx
    return rows(logits, labels.where(counted, 0), smoothing).where(counted, 0)


def cut_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool = False,
) -> Tensor:
    """apple/ml-cross-entropy, commit 3a79837, cut_cross_entropy/linear_cross_entropy.py."""
    if shift:
        hidden, labels = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return liger(F.linear(hidden, weight, bias), labels, None, ignore_index, reduction=reduction, softcap=softcap)


def torch_linear(hidden: Tensor, linear_weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """F.linear_cross_entropy itself, which torch has from 2.13 on; before, what its documentation says it is."""
    if hasattr(F, "linear_cross_entropy"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it computes all logits at once
            return F.linear_cross_entropy(hidden, linear_weight, labels, **options)
    options.pop("options", None)
    return F.cross_entropy(F.linear(hidden, linear_weight, options.pop("linear_bias", None)), labels, **options)


class _Options:
    """nn.LinearCrossEntropyOptions, where torch does not have it."""

    def __init__(self, batch_chunk_size: int) -> None:
        """Do nothing."""


DENSE = {"Liger": liger, "flash-attention": flash_attention, "TransformerEngine": transformer_engine, "apex": apex}
LINEAR = {"Liger, linear": liger_linear, "torch": torch_linear, "cut-cross-entropy": cut_cross_entropy}


def signature_of(library: str) -> dict[str, Any]:
    """Return the defaults of a library's arguments."""
    parameters = inspect.signature((DENSE | LINEAR)[library]).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


# --- The table --------------------------------------------------------------------------------------------------------


def table() -> list[tuple[str, str, str]]:
    """Return its rows: argument, library, our code."""
    section = PAGE.read_text(encoding="utf-8").partition("## Arguments of fused losses")[2].partition("\n\n###")[0]
    found = re.findall(r"^\| (`.+`) \| (.+) \| (.+) \|$", section, re.M)
    assert len(found) == section.count("\n| `")
    each = []
    for argument, of, ours in found:
        libraries = of.removesuffix(", where it is the default")
        names = [libraries] if libraries in LINEAR else libraries.split(", ")
        each += [(argument, name, ours) for name in names]
    return each


# Rows of the table whose line for this library is an option, and rows where it reads the statistics. Of the others, the
# first three of APART have tests below, and the rest is text.
OPTIONS = [row for row in table() if re.fullmatch(r"`\w+=\S+(, \w+=\S+)*`", row[2])]
RESULTS = [row for row in table() if "stats." in row[2]]
APART = {"logit_scale", "shift", "out_features", "filter_eps", "accum_dtype", "half_to_float", "process_group"}


def evaluated(code: str) -> dict[str, Any]:
    options = {"LinearCrossEntropyOptions": getattr(torch.nn, "LinearCrossEntropyOptions", _Options)}
    return dict(eval(f"dict({code.strip('`')})", NAMES | options))


def test_every_row_is_tested() -> None:
    named = {re.match(r"`(\w+)", argument).group(1) for argument, *_ in table()}
    tested = {re.match(r"`(\w+)", argument).group(1) for argument, *_ in OPTIONS + RESULTS}
    assert named == tested | APART
    assert not tested & APART


def setting(ours: dict[str, Any], labels: np.ndarray, logits: np.ndarray = LOGITS) -> tuple[Case, Bound]:
    """Return the case that our options make of the data, and the bound of a correct float32 implementation."""
    options = {name: value for name, value in ours.items() if name not in ELSEWHERE}
    arrays = {name: None if ours.get(name) is None else ours[name].numpy() for name in ("class_weight",)}
    case = Case("argument", "float32", logits, labels, {"reduction": "mean", **options}, ours["smoothing"], **arrays)
    return case, error_bound(case, solve(case), ARITHMETIC)


# Options that a `Case` holds in fields of its own, and options that change no result.
ELSEWHERE = {"smoothing", "class_weight", "bias", "chunk_size", "inplace_backward"}


def dense(loss: Callable[..., Any], logits: np.ndarray, labels: np.ndarray, dtype: torch.dtype, **options: Any) -> Any:
    """Return loss, statistics if there are any, and the gradient with an upstream of 1 for each loss."""
    leaf = torch.from_numpy(logits).to(dtype).requires_grad_()
    if isinstance(options.get("class_weight"), Tensor):
        options["class_weight"] = options["class_weight"].to(dtype)
    result = loss(leaf, torch.from_numpy(labels), **options)
    value, stats = result if isinstance(result, tuple) else (result, None)
    value.sum().backward()
    return value.detach().double().numpy(), stats, leaf.grad.double().numpy()


def linear(loss: Callable[..., Tensor], dtype: torch.dtype, first: str = "hidden", **options: Any) -> dict[str, Any]:
    """Return loss and gradients of a linear loss, whose first operand is the hidden layer or the weight."""
    operands = {"hidden": torch.from_numpy(HIDDEN), "weight": torch.from_numpy(WEIGHT)}
    leaves = {name: value.to(dtype).requires_grad_() for name, value in operands.items()}
    options = {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in options.items()}
    second = "weight" if first == "hidden" else "hidden"
    value = loss(leaves[first], leaves[second], torch.from_numpy(LABELS), **options)
    value.sum().backward()
    gradients = {name: leaf.grad.double().numpy() for name, leaf in leaves.items()}
    return {"loss": value.detach().double().numpy(), **gradients}


def of_layer(gradient: np.ndarray, bound: np.ndarray) -> dict[str, np.ndarray]:
    """Return the bounds of the gradients of hidden and weight: that of the logits, and two sums of products."""
    steps = (len(LABELS) + WEIGHT.shape[0] + 2) * U
    size = bound + steps * np.abs(gradient)
    return {"hidden": size @ np.abs(WEIGHT), "weight": size.T @ np.abs(HIDDEN)}


def shares(found: Any, expected: Any, bound: Any) -> float:
    """Return the largest difference as a share of the bound, above 1 for a wrong result."""
    error = np.abs(np.asarray(found) - np.asarray(expected))
    # What is 0 in both, such as the gradient of an ignored row, has a bound of 0.
    return float(np.max(np.where(error == 0, 0.0, error / np.maximum(bound, 1e-300))))


def compare(library: str, theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    """Return the difference of loss and gradients as shares of their bounds."""
    defaults = signature_of(library)
    # What the library does unless told otherwise.
    reduction = "none" if library in {"TransformerEngine", "apex"} else "mean"
    ignored = defaults.get("padding_idx", -100)
    options = {"smoothing": 0.0, "reduction": reduction, "ignore_index": ignored, **ours}
    labels = np.where(LABELS == -100, 0, LABELS) if library == "apex" else LABELS
    logits = LOGITS + BIAS if "bias" in ours else LOGITS
    case, bound = setting(options, labels, logits)
    if library in DENSE:
        found, _, gradient = dense(dense_loss, logits, labels, torch.float32, **options)
        expected, _, of_formula = dense(DENSE[library], logits, labels, torch.float64, **theirs)
        return {"loss": shares(found, expected, bound.loss), "gradient": shares(gradient, of_formula, bound.gradient)}
    first = "weight" if library == "Liger, linear" else "hidden"
    found = linear(linear_loss, torch.float32, **options)
    expected = linear(LINEAR[library], torch.float64, first, **theirs)
    bounds = {"loss": bound.loss, **of_layer(solve(case).gradient.high, bound.gradient)}
    return {name: shares(found[name], expected[name], bounds[name]) for name in bounds}


each_option = pytest.mark.parametrize(("argument", "library", "ours"), OPTIONS)


def aliases(argument: str, library: str) -> tuple[str, dict[str, Any]]:
    """Return the library to run, and its arguments: those of Liger's linear loss are those of the dense one."""
    theirs = evaluated(argument)
    return ("Liger, linear" if library == "Liger" and "bias" in theirs else library), theirs


@each_option
def test_options(argument: str, library: str, ours: str) -> None:
    name, theirs = aliases(argument, library)
    found = compare(name, theirs, evaluated(ours))
    assert max(found.values()) <= 1 + 2**-16, found


def wrong(ours: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Return our options, each forgotten once, or smoothed a little where it changes no number."""
    for name, given in ours.items():
        others = {each: value for each, value in ours.items() if each != name}
        if name == "reduction":
            yield {"reduction": "none" if given == "sum" else "sum"}
        elif name == "ignore_index":
            yield {**others, name: 5}
        else:
            yield {**others, "smoothing": 1e-4} if name in {"inplace_backward", "chunk_size"} else others


@each_option
def test_wrong_options_are_rejected(argument: str, library: str, ours: str) -> None:
    name, theirs = aliases(argument, library)
    for options in wrong(evaluated(ours)):
        found = compare(name, theirs, options)
        assert not max(found.values()) <= 1 + 2**-16, options


@pytest.mark.parametrize(("argument", "library", "ours"), RESULTS)
def test_results(argument: str, library: str, ours: str) -> None:
    theirs, per_row = evaluated(argument), {"smoothing": 0.0, "ignore_index": -100, "reduction": "none"}
    logits, labels = torch.from_numpy(LOGITS), torch.from_numpy(LABELS)
    if "z_loss" in argument:
        theirs["lse_square_scale"] = per_row["z_loss"] = NAMES["z"]
    losses, stats, _ = dense(dense_loss, LOGITS, LABELS, torch.float32, **per_row)
    names = {"losses": torch.from_numpy(losses), "stats": stats, "count": COUNT, "torch": torch}
    found = np.asarray(eval(ours.strip("`"), names))
    if library == "Liger":
        expected = liger(logits, labels, **theirs).numpy()
    else:
        expected = liger_linear(torch.from_numpy(WEIGHT), torch.from_numpy(HIDDEN), labels, **theirs).numpy()
    case, bound = setting(per_row | {"z_loss": 0.0}, LABELS)
    nll = np.abs(solve(case).row_loss)
    if "prediction" in ours or "correct" in ours:
        # Ties may be cut either way only if the logits were rounded, and these are exact.
        bound_of_result = 2 * U * np.abs(expected) if "correct" in ours else 0.0
    elif "stats.z" in ours:
        lse, counted = np.logaddexp.reduce(LOGITS, axis=-1), LABELS != -100
        # The error of lse is that of the loss, and one rounding. The square, product, sum and quotient round as well.
        of_lse = np.where(counted, 2 * np.abs(lse) * (bound.loss + U * np.abs(lse)) + 8 * U * lse**2, 0.0)
        bound_of_result = NAMES["z"] * of_lse.sum() / COUNT
    else:
        p = np.exp(-nll)
        bound_of_result = np.sum(p * (bound.loss * (1 + nll) + (8 * U) * nll)) / COUNT
    assert shares(found, expected, bound_of_result) <= 1 + 2**-16
    assert not shares(found + 1e-3, expected, bound_of_result) <= 1


# --- The rows that are more than an option ----------------------------------------------------------------------------


def test_logit_scale() -> None:
    """Half of exact logits is exact, and so is half of a gradient."""
    options = {"smoothing": NAMES["e"], "ignore_index": -100, "reduction": "mean"}
    _, bound = setting(options, LABELS, NAMES["s"] * LOGITS)
    expected, _, of_formula = dense(
        flash_attention, LOGITS, LABELS, torch.float64, logit_scale=NAMES["s"], label_smoothing=NAMES["e"]
    )

    def scaled(logits: Tensor, labels: Tensor, **options: Any) -> Any:
        return dense_loss(NAMES["s"] * logits, labels, **options)

    found, _, gradient = dense(scaled, LOGITS, LABELS, torch.float32, **options)
    assert shares(found, expected, bound.loss) <= 1 + 2**-16
    assert shares(gradient, of_formula, NAMES["s"] * bound.gradient) <= 1 + 2**-16
    unscaled, _, _ = dense(dense_loss, LOGITS, LABELS, torch.float32, **options)
    assert not shares(unscaled, expected, bound.loss) <= 1

    def scaled_hidden(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return linear_loss(NAMES["s"] * hidden, weight, labels, **options)

    assert shares(linear(scaled_hidden, torch.float32, **options)["loss"], expected, bound.loss) <= 1 + 2**-16


def test_a_learned_scale_has_a_gradient() -> None:
    """That of the dense loss with respect to s is the sum of z times the gradient: in float64, to a few roundings."""
    logits, labels = torch.from_numpy(LOGITS), torch.from_numpy(LABELS)
    hidden, weight, scale = torch.from_numpy(HIDDEN), torch.from_numpy(WEIGHT), torch.tensor(0.5, dtype=torch.float64)
    options = {"smoothing": NAMES["e"], "ignore_index": -100}
    for_scale = scale.clone().requires_grad_()
    linear_loss(for_scale * hidden, weight, labels, **options).backward()
    leaf = (scale * logits).requires_grad_()
    dense_loss(leaf, labels, **options)[0].backward()
    terms = leaf.grad * logits
    # Each of the 63 products, and the sums that make the gradient of hidden, are off by some ten roundings.
    bound = 64 * 2.0**-53 * (leaf.grad.abs() @ weight.abs() * hidden.abs()).sum()
    assert abs(for_scale.grad - terms.sum()) <= bound
    assert not abs(for_scale.grad - 0.5 * terms.sum()) <= bound


def test_shift() -> None:
    hidden, labels = torch.from_numpy(HIDDEN.reshape(3, 3, 6)), torch.from_numpy(LABELS.reshape(3, 3))
    weight = torch.from_numpy(WEIGHT)
    (line,) = [ours for argument, _, ours in table() if argument == "`shift=True`"]
    names = {"labels": labels, "F": F}
    exec(re.match("`(.+?)`", line).group(1), names)
    options = {"smoothing": 0.0, "ignore_index": -100}
    found = linear_loss(hidden.float(), weight.float(), names["labels"], **options).double()
    unshifted = linear_loss(hidden.float(), weight.float(), labels, **options).double()
    expected = cut_cross_entropy(hidden, weight, labels, shift=True)
    _, bound = setting({**options, "reduction": "mean"}, names["labels"].flatten().numpy())
    assert shares(found, expected, bound.loss) <= 1 + 2**-16
    assert not shares(unshifted, expected, bound.loss) <= 1


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch has it from 2.13 on")
def test_signatures_of_torch() -> None:
    """The names of the page are those of torch."""
    function = inspect.signature(F.linear_cross_entropy).parameters
    assert {"linear_bias", "weight", "reduction", "ignore_index", "label_smoothing", "options"} <= set(function)
    module = torch.nn.LinearCrossEntropyLoss(6, 7, out_features=(3,), label_smoothing=NAMES["e"], dtype=torch.float64)
    hidden = torch.from_numpy(HIDDEN)
    labels = torch.from_numpy(_GENERATOR.integers(7, size=(9, 3)))
    weight = module.linear.weight.detach().view(7, 3, 6)
    logits = torch.einsum("nf,kdf->nkd", hidden, weight)
    found = dense_loss(logits, labels, smoothing=NAMES["e"], axis=1)[0]
    case = Case("d", "float64", logits.numpy(), labels.numpy(), {"reduction": "mean"}, NAMES["e"], axis=1)
    # Both round the logits, 6 products each, and a loss moves by twice what its logits do.
    of_logits = 2 * 12 * 2.0**-53 * float(torch.einsum("nf,kdf->nkd", hidden.abs(), weight.abs()).max())
    bound = 3 * error_bound(case, solve(case), ARITHMETIC).loss + 2 * of_logits
    assert abs(found - module(hidden, labels).detach()) <= bound
    assert not abs(found + 1e-9 - module(hidden, labels).detach()) <= bound
