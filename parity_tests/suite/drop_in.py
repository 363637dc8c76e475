"""The frameworks' own losses as peers: their argument space as cases, how to run them, how large their errors can be.

Ours is held against the bound of `bounds` and the peer against that of `peer_bound`, both computed from the data; the
two may differ by the sum. Each is held against the truth as well, which tells who is wrong.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from numpy.typing import NDArray

import lsce_jax
import lsce_torch
from parity_tests.faults.dense import evaluate
from parity_tests.losses.adapters import JaxAdapter, TorchAdapter
from parity_tests.truth.bounds import Arithmetic, Bound, error_bound
from parity_tests.truth.cases import Case, soft_labels
from parity_tests.truth.comparison import Result, error_over_bound, exactly
from parity_tests.truth.oracle import Exact, Truth, solve
from parity_tests.truth.precision import FORMATS, FloatArray, round_to

TORCH, JAX = TorchAdapter().arithmetic, JaxAdapter().arithmetic
SMOOTHINGS = (0.0, 0.1, 1.0)
REDUCTIONS = ("none", "sum", "mean")
MODULES = (torch.nn.CrossEntropyLoss, lsce_torch.LabelSmoothedCrossEntropyLoss)


# How large the rounding errors of the peers can be.


class LogSoftmax(NamedTuple):
    """[N, K], classes last: the size of log p, and the error of a peer's in two forms. 0 where no class counts.

    Args:
        size: -log p = d + L, with the gap d = max z - z and L = log sum exp(-d).
        error: of (z - m) - log(s), as torch's and JAX's log_softmax compute it.
        unshifted_error: of (log(s) + m) - z, as Optax computes it for integer labels.
    """

    size: FloatArray
    error: FloatArray
    unshifted_error: FloatArray


def log_softmax(case: Case, truth: Truth, arithmetic: Arithmetic) -> LogSoftmax:
    """Return log p and the error of a peer's.

    A gap is one rounded difference: u d. So exp(-d) has the relative error u (c_e + d), and s, their sum of depth h
    with the 1 of the largest logit inside, u (h + c_e + D) with D = sum p d. L = log(s) has that as its absolute error,
    and c_l u L. The subtraction of L adds u |log p|. The unshifted form has no gap to round; it adds u |m + L| instead.
    """
    rows, u = case.rows(), FORMATS["float64"].roundoff
    counts = counted_classes(case, truth)
    logits = np.where(counts, rows.logits, -np.inf)
    peak = np.max(logits, axis=-1, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    # A class of logit -inf has p = 0 exactly; as a target it makes the loss infinite, which needs no bound.
    gap = np.where(np.isfinite(logits), peak - logits, 0.0)
    log_sum = np.log(np.maximum(np.sum(np.exp(logits - peak), axis=-1, keepdims=True), 1.0))
    mean_gap = np.sum(truth.probabilities * gap, axis=-1, keepdims=True)
    size = gap + log_sum
    depth = arithmetic.depth(case.num_classes)
    log_sum_error = u * (depth + arithmetic.exp + mean_gap + arithmetic.log1p * log_sum)
    forms = (size, log_sum_error + u * (gap + size), log_sum_error + u * (np.abs(peak + log_sum) + size))
    return LogSoftmax(*(np.where(counts, form, 0.0) for form in forms))


def counted_classes(case: Case, truth: Truth) -> NDArray[np.bool_]:
    """Return [N, K]: the classes of the mask in the rows that count."""
    allowed = np.ones(case.num_classes, bool) if case.class_mask is None else case.class_mask
    return truth.counted[:, None] & allowed


def peer_bound(case: Case, truth: Truth, arithmetic: Arithmetic, unshifted: bool = False) -> Bound:
    """Return the first-order bound of a peer, which sums w q log p.

    Each of the products w_k q_k log p_k has the error of log p_k and up to 5 roundings: (1 - e) t + e/K has 3, and w
    and log p come in with one product each. (For indices torch rounds 1 - e, its product, w's, and the sum of the two
    parts.) Their sum over the classes has depth h. All terms have one sign, so nothing cancels. A sum over rows adds
    its own depth; the division by a denominator that was summed likewise adds that once more, and 1.

    A gradient entry is G p_k - g_k, where g_k = w_k q_k upstream / denominator is rounded up to 6 times besides the
    denominator, G is the sum of them, and p_k is either exp(log p_k) or exp(-d_k) / s, whose error is no larger. With
    the division or the product by p_k, and the difference, that makes
    G p_k (error of log p_k + u (c_e + h + 8 + denominator)) + g_k u (6 + denominator) + u |G p_k - g_k|.
    """
    u, tiny = FORMATS["float64"].roundoff, FORMATS["float64"].smallest_normal
    log_p = log_softmax(case, truth, arithmetic)
    depth, num_rows = arithmetic.depth(case.num_classes), truth.counted.size
    wq = truth.target_size * (1.0 if case.class_weight is None else case.class_weight)
    of_log_p = log_p.unshifted_error if unshifted else log_p.error
    row = np.sum(wq * (of_log_p + u * (depth + 5) * log_p.size), axis=-1)

    reduction = case.options["reduction"]
    of_denominator = arithmetic.depth(num_rows) + 1 if reduction == "mean" else 0
    factor = np.abs(truth.factor)
    loss = row
    if reduction != "none":
        # Torch adds up the terms of all rows and classes of soft labels at once.
        terms = num_rows * (case.num_classes if case.labels.dtype.kind == "f" else 1)
        roundings = arithmetic.depth(terms) + of_denominator
        scale = np.max(factor) / np.max(np.abs(case.rows().upstream))
        finite = np.where(np.isfinite(truth.row_loss), np.abs(truth.row_loss), 0.0)
        loss = np.asarray(scale * np.sum(row + u * roundings * finite))

    mass = np.sum(wq, axis=-1, keepdims=True)
    p = truth.probabilities
    gradient = mass * p * (log_p.error + u * (arithmetic.exp + depth + 8 + of_denominator))
    gradient += u * (6 + of_denominator) * wq + u * np.abs(mass * p - wq)
    smallest = np.where(counted_classes(case, truth), 2 * tiny, 0.0)
    return Bound(loss=loss, gradient=factor[:, None] * gradient + smallest)


def leaf_bounds(case: Case, truth: Truth, arithmetic: Arithmetic) -> dict[str, FloatArray]:
    """Return the bound of either side's gradient by soft labels, [N, K], and by the class weights, [K].

    They are (1 - e) w_k log p_k and the sum over rows of q_k log p_k, each times upstream / denominator: the error of
    log p_k, the peer's being the larger, up to 8 roundings, and the sum's depth.
    """
    u, num_rows = FORMATS["float64"].roundoff, truth.counted.size
    log_p = log_softmax(case, truth, arithmetic)
    factor = np.abs(truth.factor)[:, None]
    weight = 1.0 if case.class_weight is None else case.class_weight
    kept = (1 - case.rows().smoothing)[:, None]
    of_labels = factor * kept * weight * (log_p.error + 8 * u * log_p.size)
    of_weight = factor * truth.target_size * (log_p.error + u * (8 + arithmetic.depth(num_rows)) * log_p.size)
    return {"labels": of_labels, "weight": np.sum(of_weight, axis=0)}


# Comparisons.


@dataclass(frozen=True)
class PeerSetting:
    """A case, what is true of it, the bounds of both sides, and torch's `ignore_index`, also where it has no effect."""

    case: Case
    truth: Truth
    ours: Bound
    peer: Bound
    ignore_index: int = -100

    @property
    def divides_by_zero(self) -> bool:
        """Whether the mean is over nothing."""
        return not self.truth.factor.any()


def make_setting(case: Case, arithmetic: Arithmetic, ignore_index: int = -100, unshifted: bool = False) -> PeerSetting:
    truth = solve(case)
    peer = peer_bound(case, truth, arithmetic, unshifted)
    return PeerSetting(case, truth, error_bound(case, truth, arithmetic), peer, ignore_index)


class Share(NamedTuple):
    """The largest errors of loss and gradient as shares of their bounds: above 1 is wrong."""

    loss: float
    gradient: float


def share(values: FloatArray, expected: FloatArray | Exact, bound: FloatArray) -> float:
    """Return the largest error as a share of its bound; inf where a NaN or an infinity is out of place."""
    exact = expected if isinstance(expected, Exact) else exactly(expected)
    assert values.shape == exact.high.shape == bound.shape
    return float(np.max(error_over_bound(exact.error_of(values), bound), initial=0.0))


def apart(setting: PeerSetting, ours: Result, peer: Result) -> Share:
    """Compare two results: they may differ by the sum of their bounds."""
    of_loss = share(ours.loss, peer.loss, setting.ours.loss + setting.peer.loss)
    return Share(of_loss, share(ours.gradient, peer.gradient, setting.ours.gradient + setting.peer.gradient))


def verdict(setting: PeerSetting, ours: Result, peer: Result) -> dict[str, Share]:
    """Compare three ways: which dtypes they are, each with the truth, and the one with the other."""
    assert (ours.loss_dtype, ours.gradient_dtype) == (peer.loss_dtype, peer.gradient_dtype) == ("float64", "float64")
    shares = {"each other": apart(setting, ours, peer)}
    for name, result, bound in (("ours", ours, setting.ours), ("peer", peer, setting.peer)):
        of_loss = share(result.loss, setting.truth.loss, bound.loss)
        shares[name] = Share(of_loss, share(result.gradient, setting.truth.gradient, bound.gradient))
    return shares


class Tally:
    """The largest shares so far, for the report."""

    def __init__(self) -> None:
        """Start with none."""
        self.count = 0
        self.largest: dict[str, Share] = {}

    def add(self, shares: dict[str, Share]) -> None:
        """Take in the shares of one comparison."""
        self.count += 1
        for name, new in shares.items():
            old = self.largest.get(name, Share(0.0, 0.0))
            self.largest[name] = Share(max(old.loss, new.loss), max(old.gradient, new.gradient))

    def __str__(self) -> str:
        parts = [f"{name} {of.loss:.2f} loss {of.gradient:.2f} gradient" for name, of in self.largest.items()]
        return f"{self.count} comparisons, largest share of the bounds: {', '.join(parts)}"


def as_result(case: Case, loss: NDArray[Any], gradient: NDArray[Any]) -> Result:
    num_rows = num_rows_of(case)
    flat = loss.reshape(num_rows) if case.options["reduction"] == "none" else loss
    return Result(flat, rows_of(case, gradient), loss.dtype.name, gradient.dtype.name)


def rows_of(case: Case, array: NDArray[Any]) -> NDArray[Any]:
    return np.moveaxis(array, case.axis, -1).reshape(num_rows_of(case), case.num_classes)


def num_rows_of(case: Case) -> int:
    return int(np.prod(case.batch_shape))


def hard_logits(generator: np.random.Generator, num_rows: int, num_classes: int, labels: NDArray[Any]) -> FloatArray:
    """Return normal logits, far from 0 in the first row; in the last one a class is almost certain."""
    logits = generator.normal(size=(num_rows, num_classes)) * 2
    logits[0] += 1000
    if num_rows > 1:
        label = labels.ravel()[-1] if labels.dtype.kind == "i" else 0
        logits[-1, label] += 20
    return logits


# torch.nn.CrossEntropyLoss.

SHAPES = {"[C]": (7,), "[N, C]": (6, 5), "[N, C, d1]": (3, 4, 5), "[N, C, d1, d2]": (2, 6, 3, 2)}
WEIGHTS = ("none", "random", "with zeros")
IGNORED = ("-100", "a class", "-1")
each_shape = pytest.mark.parametrize("form", SHAPES)


@cache
def torch_settings(form: str, soft: bool) -> tuple[PeerSetting, ...]:
    return tuple(_torch_settings(form, soft))


def _torch_settings(form: str, soft: bool) -> Iterator[PeerSetting]:
    generator = np.random.default_rng(zlib.crc32(f"{form} {soft}".encode()))
    axis, shape = min(1, len(SHAPES[form]) - 1), SHAPES[form]
    batch_shape, num_classes = shape[:axis] + shape[axis + 1 :], shape[axis]
    num_rows = int(np.prod(batch_shape))
    indices = np.asarray(generator.integers(num_classes, size=batch_shape))
    first = int(indices.ravel()[0])
    probabilities = soft_labels("float64", generator, (num_rows, num_classes))
    probabilities[-1] *= 1.75  # torch asks for no sum of 1
    random = generator.uniform(0.25, 4, num_classes)
    # A class that occurs, which makes the denominator smaller, and 0 where it is the only one.
    weights = {"none": None, "random": random, "with zeros": np.where(np.arange(num_classes) == first, 0.0, random)}
    logits = hard_logits(generator, num_rows, num_classes, indices if not soft else probabilities)

    def placed(rows: FloatArray) -> FloatArray:
        return np.moveaxis(rows.reshape(*batch_shape, num_classes), -1, axis)

    of_row = round_to(generator.uniform(-2, 2, batch_shape), "float64")
    for weight, ignored, reduction, smoothing in product(WEIGHTS, IGNORED, REDUCTIONS, SMOOTHINGS):
        if soft and ignored == "a class":
            continue  # neither takes it
        labels, ignore_index = indices.copy(), first if ignored == "a class" else int(ignored)
        if num_rows > 1:
            labels.ravel()[1] = ignore_index
        case = Case(
            f"{form}, weight {weight}, ignore_index {ignored}, {reduction}, smoothing {smoothing}",
            "float64",
            placed(logits),
            placed(probabilities) if soft else labels,
            {"reduction": reduction} if soft else {"reduction": reduction, "ignore_index": ignore_index},
            smoothing,
            axis,
            class_weight=weights[weight],
            upstream=of_row if reduction == "none" else np.asarray(-0.75),
        )
        yield make_setting(case, TORCH, ignore_index)


def arguments(setting: PeerSetting) -> dict[str, Any]:
    """Return the arguments of torch.nn.CrossEntropyLoss."""
    case = setting.case
    return {
        "weight": None if case.class_weight is None else torch.from_numpy(case.class_weight.copy()),
        "ignore_index": setting.ignore_index,
        "reduction": case.options["reduction"],
        "label_smoothing": case.smoothing,
    }


def in_memory(array: NDArray[Any], layout: str) -> torch.Tensor:
    """Return a tensor of these values with its dimensions in another order, or with gaps, in memory."""
    tensor = torch.from_numpy(array.copy())
    if layout == "contiguous" or tensor.ndim == 0:
        return tensor
    if layout == "strided":
        return torch.stack([tensor, torch.full_like(tensor, 7)], dim=-1)[..., 0]
    if layout == "channels last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if tensor.ndim > 2 else tensor
    order = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(order).contiguous().permute(order)


def layouts(form: str) -> tuple[str, ...]:
    return ("contiguous", "strided", "transposed", "channels last")[: 1 + len(SHAPES[form])]


def run_torch(loss_fn: Callable[..., Any], setting: PeerSetting, layout: str = "contiguous") -> Result:
    case = setting.case
    logits = in_memory(case.logits, layout).requires_grad_()
    loss = loss_fn(logits, in_memory(case.labels, layout))
    (loss * torch.from_numpy(np.asarray(case.upstream))).sum().backward()
    return as_result(case, loss.detach().numpy(), logits.grad.numpy())


def torch_leaf_gradients(setting: PeerSetting, loss_class: Callable[..., Any]) -> dict[str, FloatArray]:
    """Return the gradients by soft labels, and by the weight if there is one."""
    case, loss_fn = setting.case, loss_class(**arguments(setting))
    labels = torch.from_numpy(case.labels.copy()).requires_grad_()
    if loss_fn.weight is not None:
        loss_fn.weight.requires_grad_()
    loss = loss_fn(torch.from_numpy(case.logits), labels)
    (loss * torch.from_numpy(np.asarray(case.upstream))).sum().backward()
    gradients = {"labels": rows_of(case, labels.grad.numpy())}
    return gradients if loss_fn.weight is None else {**gradients, "weight": loss_fn.weight.grad.numpy()}


# Optax. Each position of the classes in up to three dimensions, and one in four. Optax reduces nothing itself, but its
# users take the sum or the mean, for which one shape is enough: what takes time is to compile.

PLACES = [
    ((5,), 0, ("all",), ("none",)),
    ((4, 6), 0, ("rows",), ("none",)),
    ((6, 5), -1, ("all",), REDUCTIONS),
    ((6, 5), -1, ("rows",), ("none", "mean")),
    ((4, 3, 5), 0, ("classes",), ("none",)),
    ((3, 4, 5), 1, ("all", "rows", "classes"), ("none",)),
    ((2, 3, 5), -1, ("rows",), ("none",)),
    ((2, 3, 4, 2), -2, ("all",), ("none",)),
]
KINDS = ("integer", "one-hot", "soft")
each_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def optax_settings(kind: str) -> tuple[PeerSetting, ...]:
    return tuple(_optax_settings(kind))


def _optax_settings(kind: str) -> Iterator[PeerSetting]:
    for shape, axis, wheres, reductions in PLACES:
        for where, reduction in product(wheres, reductions):
            case = optax_case(kind, shape, axis, where, reduction)
            for smoothing in (0.0,) if kind == "integer" else SMOOTHINGS:
                yield make_setting(replace(case, smoothing=smoothing), JAX, unshifted=kind == "integer")


def optax_case(kind: str, shape: tuple[int, ...], axis: int, where: str, reduction: str) -> Case:
    """Return a case whose rows or classes that are left out hold NaN, the rows labels that are no class as well."""
    generator = np.random.default_rng(zlib.crc32(f"{shape} {axis} {where} {kind}".encode()))
    num_classes, batch_shape = shape[axis], tuple(np.delete(shape, axis).tolist())
    num_rows = int(np.prod(batch_shape))
    counted, mask = np.arange(num_rows) % 3 != 1, np.arange(num_classes) % 3 != 1
    labels: NDArray[Any] = generator.choice(np.flatnonzero(mask) if where == "classes" else num_classes, num_rows)
    if kind == "soft":
        labels = soft_labels("float64", generator, (num_rows, num_classes))
    logits = hard_logits(generator, num_rows, num_classes, labels)
    if where == "rows":
        logits[~counted] = np.nan
        labels[~counted] = 99
    if where == "classes":
        logits[:, ~mask] = np.nan

    def placed(rows: NDArray[Any]) -> NDArray[Any]:
        return np.moveaxis(rows.reshape(*batch_shape, num_classes), -1, axis)

    return Case(
        f"{kind}, {shape} axis {axis}, where {where}, {reduction}",
        "float64",
        placed(logits),
        placed(labels) if kind == "soft" else labels.reshape(batch_shape),
        {"reduction": reduction},
        axis=axis,
        where=counted.reshape(batch_shape) if where == "rows" else None,
        class_mask=mask if where == "classes" else None,
        upstream=generator.uniform(-2, 2, batch_shape) if reduction == "none" else np.asarray(-0.75),
    )


def optax_loss(logits: jax.Array, operands: dict[str, jax.Array], *, kind: str, axis: int, reduction: str) -> jax.Array:
    """Return what a user of Optax writes."""
    labels, rows, classes = operands["labels"], operands.get("where"), None
    if "class_mask" in operands:
        mask = jnp.expand_dims(operands["class_mask"], tuple(range(1, logits.ndim)))
        classes = jnp.broadcast_to(jnp.moveaxis(mask, 0, axis), logits.shape)
    where = rows if classes is None else classes
    if kind == "integer":
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels, axis=axis, where=where)
    else:
        if kind == "one-hot":
            labels = jax.nn.one_hot(labels, logits.shape[axis], dtype=logits.dtype, axis=axis)
        labels = optax.smooth_labels(labels, operands["smoothing"], axis=axis, where=classes)
        losses = optax.softmax_cross_entropy(logits, labels, axis=axis, where=where)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.mean(where=rows)


def our_loss(
    logits: jax.Array, operands: dict[str, jax.Array], *, axis: int, reduction: str, implementation: str | None
) -> jax.Array:
    return lsce_jax.label_smoothed_cross_entropy(
        logits, **operands, axis=axis, reduction=reduction, implementation=implementation
    )


@cache
def gradient_step(loss_fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return a compiled function of loss and gradient. Kept, so that each combination of options compiles once."""

    def total(logits: jax.Array, operands: dict[str, jax.Array], upstream: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss = loss_fn(logits, operands, **options)
        return (loss * upstream).sum(), loss

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def loose_types() -> AbstractContextManager[Any]:
    """Optax divides numbers by integer arrays, which the strict settings of the tests don't allow."""
    return jax.numpy_dtype_promotion("standard")


def run_jax(step: Callable[..., Any], case: Case, types: AbstractContextManager[Any] | None = None) -> Result:
    arrays = {"where": case.where, "class_mask": case.class_mask, "smoothing": np.asarray(case.smoothing)}
    with jax.enable_x64(True), types or nullcontext():
        operands = {name: jnp.asarray(array) for name, array in arrays.items() if array is not None}
        operands["labels"] = jnp.asarray(case.labels)
        (_, loss), gradient = step(jnp.asarray(case.logits), operands, jnp.asarray(case.upstream))
    return as_result(case, np.asarray(loss), np.asarray(gradient))


def run_optax(kind: str, case: Case) -> Result:
    options = {"kind": kind, "axis": case.axis, "reduction": case.options["reduction"]}
    return run_jax(gradient_step(optax_loss, **options), case, loose_types())


def optax_two_axes(logits: jax.Array, operands: dict[str, jax.Array]) -> jax.Array:
    """Return Optax's loss of classes that are spread over two axes."""
    logits = logits.reshape(-1, 2, 3)
    return optax.softmax_cross_entropy_with_integer_labels(logits, operands["labels"], axis=(1, 2))


# Faults in our place.

WRONG = (
    "other_off",
    "weight_not_in_smoothing",
    "weight_not_in_denominator",
    "all_rows_counted",
    "ignored_rows_leak",
    "ignored_rows_count",
    "label_off_by_one",
    "sum_for_mean",
    "mean_for_sum",
    "unsmoothed_loss",
    "unsmoothed_gradient",
    "zero_gradient",
    "zero_non_target_gradient",
    "gradient_sign",
    "upstream_ignored",
    "local_classes",
    "stale_lse",
    "last_digits",
)


def counted_of(case: Case) -> NDArray[np.bool_]:
    return case.rows().counted.reshape(case.batch_shape)


def wrong_result(case: Case, fault: str) -> Result:
    """Return what an implementation with that fault gives; most are the mutants'."""
    if fault == "mean_for_sum":
        options = {**case.options, "reduction": "mean"}
        return evaluate(replace(case, options=options) if case.options["reduction"] == "sum" else case)
    if fault == "ignored_rows_count":
        options = {name: value for name, value in case.options.items() if name != "ignore_index"}
        labels = case.labels if case.labels.dtype.kind == "f" else np.where(counted_of(case), case.labels, 0)
        return evaluate(replace(case, options=options, where=None, labels=labels))
    if fault == "last_digits":
        sound = evaluate(case)
        return replace(sound, loss=sound.loss * (1 + 2**-40), gradient=sound.gradient * (1 + 2**-40))
    return evaluate(case, fault)


def reject(fault: str, settings: list[PeerSetting], peers: list[Result]) -> None:
    """Fail unless the fault is rejected in every case, and in each part of the result, that it changes."""
    margins: dict[tuple[str, Any], float] = {}
    parts: dict[str, float] = {}
    for setting, peer in zip(settings, peers, strict=True):
        sound, wrong = evaluate(setting.case), wrong_result(setting.case, fault)
        shares = apart(setting, wrong, peer)
        for part in ("loss", "gradient"):
            if not np.array_equal(getattr(sound, part), getattr(wrong, part)):
                parts[part] = max(parts.get(part, 0.0), getattr(shares, part))
                margins[setting.case.name, setting.case.smoothing] = max(shares)
    nearest = min(margins, key=margins.__getitem__)
    print(f"{fault}: rejected in {len(margins)} of {len(settings)} cases, nearest {margins[nearest]:.3g} in {nearest}")
    assert margins[nearest] > 1, nearest
    assert min(parts.values()) > 1, parts


@cache
def torch_peers() -> tuple[list[PeerSetting], list[Result]]:
    settings = [each for form in SHAPES for soft in (False, True) for each in torch_settings(form, soft)]
    settings = [each for each in settings if not each.divides_by_zero]
    return settings, [run_torch(torch.nn.CrossEntropyLoss(**arguments(each)), each) for each in settings]


@cache
def optax_peers() -> tuple[list[PeerSetting], list[Result]]:
    pairs = [(kind, setting) for kind in KINDS for setting in optax_settings(kind)]
    return [setting for _, setting in pairs], [run_optax(kind, setting.case) for kind, setting in pairs]
