"""Checks of a label-smoothed cross-entropy that need no oracle and no second framework.

Copy this one file to any machine: it needs NumPy, JAX or PyTorch, and the loss.

    python -m parity_tests.self_checks torch --device cuda --dtype float32
    python self_checks.py jax --loss my_package.losses:smoothed_cross_entropy

A loss is a function of (logits [N, K], labels [N]) with the keyword `smoothing`, and, for the checks that need them,
`convention`, `where` and `reduction`; without `reduction` it returns one loss per row. A check of an option that a loss
lacks is "not applicable". Exit code 0: every check that applies agrees, 1: one does not, 2: there is no verdict.

Each check compares two runs that must give the same result, or a run and a known sum: exactly if both do the same
arithmetic, otherwise within the rounding errors of both, which `bounds` and `row_sum` derive. Logits are numbers of the
dtype under test, stored in float64.
"""

import argparse
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

# Errors of exp and log on CPUs, in units of the roundoff. `lsce-parity fingerprint` measures those of a device.
EXP, LOG = 3.0, 4.0
# Significant bits, and the exponent of the smallest normal number; below it numbers may be flushed to zero.
FORMATS = {"float64": (53, -1022), "float32": (24, -126), "bfloat16": (8, -126), "float16": (11, -14)}
# A power of two, so that losses are combined without rounding.
SMOOTHING = 0.25
DEFAULTS: dict[str, Any] = {"convention": "uniform", "where": None, "reduction": "none"}
ROWS = 6
WHERE = np.array([True, False, True, True, False, True])


class UnsupportedError(Exception):
    """The loss lacks something that a check needs."""


class Evaluation(NamedTuple):
    """Loss, [N] or reduced to [], and gradient [N, K]; or a bound on the error of each."""

    loss: FloatArray
    gradient: FloatArray


class Rows(NamedTuple):
    """A batch: its name, logits [N, K] and labels [N]."""

    name: str
    logits: FloatArray
    labels: NDArray[np.int64]


class Evaluate(Protocol):
    """A loss as a function of NumPy arrays."""

    def __call__(
        self, logits: FloatArray, labels: NDArray[np.int64], *, smoothing: float, dtype: str, **options: Any
    ) -> Evaluation:
        """Return loss and gradient for logits of `dtype`.

        The gradient is that of the losses times `upstream`, divided by `upstream`. Options
        that are not given have the values in `DEFAULTS`.

        Raises:
            UnsupportedError: the loss has no such option.
        """
        ...


@dataclass(frozen=True)
class Subject:
    """The loss under test, and losses to compare it with.

    Args:
        evaluate: the loss.
        plain: the framework's cross-entropy without smoothing, in float32 or float64; None if there is none.
        other: the same loss, compiled if `evaluate` is not, and vice versa; None if there is none.
    """

    evaluate: Evaluate
    plain: Evaluate | None = None
    other: Evaluate | None = None


@dataclass(frozen=True)
class CheckOutcome:
    """The outcome of a check.

    Args:
        check: name of the check.
        dtype: dtype of the logits.
        verdict: whether the loss passes; "failed" if it raised an error.
        share: largest error as a share of the allowed one; inf if none is allowed, and for a NaN.
        detail: the batch with the largest share, or why there is none.
    """

    check: str
    dtype: str
    verdict: Literal["agree", "disagree", "failed", "not applicable"]
    share: float
    detail: str


def make_rows(dtype: str) -> list[Rows]:
    """Return the batches: close logits, which show a wrong target or padding best, and logits whose exp overflows."""
    offset = 2.0 ** (FORMATS[dtype][0] // 2)
    batches: list[Rows] = []
    # There are few different sizes, since JAX compiles for each.
    for name, num_classes, scale, shift_by in (
        ("near_uniform_2", 2, 0.01, 0.0),
        ("normal_7", 7, 3.0, 0.0),
        ("minus_infinity_7", 7, 3.0, 0.0),
        ("offset_128", 128, 1.0, offset),
        ("near_uniform_1009", 1009, 0.01, 0.0),
        ("large_1009", 1009, 1000.0, 0.0),
    ):
        generator = np.random.default_rng(len(batches))
        logits = round_to(generator.normal(size=(ROWS, num_classes)) * scale + shift_by, dtype)
        labels = generator.integers(num_classes, size=ROWS)
        if name == "minus_infinity_7":
            logits[np.arange(4), (labels[:4] + 3) % num_classes] = -np.inf
        batches.append(Rows(name, logits, labels))
    return batches


def compute_dtype(dtype: str) -> str:
    """Return the dtype that losses of logits of `dtype` are computed and returned in."""
    return "float64" if dtype == "float64" else "float32"


def round_to(values: FloatArray, dtype: str) -> FloatArray:
    """Round finite values to the nearest number of `dtype`."""
    bits, smallest = FORMATS[dtype]
    quantum = np.ldexp(1.0, np.maximum(np.frexp(values)[1], smallest + 1) - bits)
    return np.asarray(np.round(values / quantum) * quantum)


def upstream(shape: tuple[int, ...]) -> FloatArray:
    """Return powers of two to multiply losses of that shape with; they expose a gradient without its incoming gradient.

    Dividing by them is exact. They are above 1, so that no gradient becomes smaller.
    """
    return np.asarray(4.0 * 2.0 ** (np.arange(math.prod(shape)) % 3)).reshape(shape)


# ---- Bounds


def depth(length: int) -> int:
    """Return the longest chain of additions in a sum: 32 terms in sequence, then 32 such sums, and so on."""
    return min(length - 1, 32 * math.ceil(math.log2(length) / 5))


class Sizes(NamedTuple):
    """The quantities in the bounds: h, and u and the smallest normal number of the compute dtype.

    gap = max z - z and p are [N, K]; D = sum p gap and L = log sum exp(-gap) are [N, 1].
    """

    h: int
    u: float
    tiny: float
    gap: FloatArray
    p: FloatArray
    D: FloatArray
    L: FloatArray


def sizes(logits: FloatArray, dtype: str) -> Sizes:
    """Measure logits for the bounds."""
    bits, smallest = FORMATS[compute_dtype(dtype)]
    gap = logits.max(-1, keepdims=True) - logits
    total = np.exp(-gap).sum(-1, keepdims=True)
    p = np.exp(-gap) / total
    D = np.sum(p * np.where(p > 0, gap, 0.0), axis=-1, keepdims=True)
    return Sizes(depth(logits.shape[-1]), 2.0**-bits, 2.0**smallest, gap, p, D, np.log(total))


def target(rows: Rows, smoothing: float, convention: str) -> FloatArray:
    """Return the smoothed target [N, K]."""
    num_classes = rows.logits.shape[-1]
    others = smoothing / (num_classes if convention == "uniform" else num_classes - 1)
    at_label = 1 - smoothing + (others if convention == "uniform" else 0.0)
    return np.where(np.arange(num_classes) == rows.labels[:, None], at_label, others)


def stored(gradient: FloatArray, dtype: str) -> FloatArray:
    """Return the error of storing a gradient in a narrow dtype: half a unit in the last place, or the smallest step."""
    if dtype == compute_dtype(dtype):
        return np.zeros_like(gradient)
    bits, smallest = FORMATS[dtype]
    return np.maximum(2.0**-bits * np.abs(gradient), 2.0 ** (smallest - bits))


def bounds(rows: Rows, smoothing: float, dtype: str, convention: str = "uniform") -> Evaluation:
    """Return the largest errors of a correct implementation, to first order in the roundoff u.

    A gap is one rounded difference, error u gap; exp(-gap) has the relative error u (gap + EXP), so the sum over K of
    depth h has u (D + EXP + h), and L, the log of it, u (D + EXP + h + LOG L). The loss is sum_k q_k (gap_k + L). With
    P = sum_k q_k gap_k, each term has the errors of its gap and of L, up to 3 roundings of q_k and one of the product,
    h of the sum and up to 5 of putting terms together: u ((h + 10) P + (h + 8) L) and the error of L.

    A gradient entry is p - q. p is a quotient, error u (gap + EXP + D + EXP + h + 2), or exp(-gap - L), which has the
    error of L, that of the gap and the difference, gap + (gap + L), and EXP: both are within
    u (2 gap + D + (1 + LOG) L + h + 2 EXP + 2). It may be multiplied with a sum of q, error u (h + 3), and with up to
    9 u of factors. q may have 7 u, the difference 4 u of its own. Up to two products may be flushed to zero.
    """
    h, u, tiny, gap, p, D, L = sizes(rows.logits, dtype)
    q, num_classes = target(rows, smoothing, convention), rows.logits.shape[-1]
    P = np.sum(q * np.where(q > 0, gap, 0.0), axis=-1)
    loss = u * ((h + 10) * P + ((h + 8 + LOG) * L + D + EXP + h)[:, 0]) + 2 * num_classes * tiny
    of_p = 2 * np.where(p > 0, gap, 0.0) + D + (1 + LOG) * L + 2 * h + 2 * EXP + 14
    gradient = u * (p * of_p + 7 * q + 4 * np.abs(p - q)) + 2 * tiny
    return Evaluation(loss, gradient + stored(p - q, dtype))


def combine(weights: tuple[float, ...], results: tuple[Evaluation, ...]) -> Evaluation:
    """Return a weighted sum of results, or of bounds."""
    loss, gradient = (
        sum(w * part for w, part in zip(weights, each, strict=True)) for each in zip(*results, strict=True)
    )
    return Evaluation(np.asarray(loss), np.asarray(gradient))


def twice(allowed: Evaluation) -> Evaluation:
    """Return the bound on the difference of two runs with the same bound."""
    return combine((2.0,), (allowed,))


def exactly(result: Evaluation) -> Evaluation:
    """Return the bound for two runs that do the same arithmetic."""
    return Evaluation(np.where(np.isfinite(result.loss), 0.0, np.inf), np.zeros_like(result.gradient))


def share(first: Evaluation, second: Evaluation, allowed: Evaluation) -> float:
    """Return the largest difference as a share of the allowed one; inf for a NaN or an infinity out of place.

    A bound is infinite if and only if the true value is.
    """
    largest = 0.0
    for one, other, limit in zip(first, second, allowed, strict=True):
        finite = np.isfinite(one) & np.isfinite(other) & np.isfinite(limit)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.where(finite, np.abs(one - other) / limit, np.inf)
        same = (one == other) & (np.isfinite(one) == np.isfinite(limit))
        largest = max(largest, float(np.max(np.where(same, 0.0, ratio), initial=0.0)))
    return largest


# ---- Checks: each returns the largest error as a share of the allowed one


def run(evaluate: Evaluate, rows: Rows, smoothing: float, dtype: str, **options: Any) -> Evaluation:
    """Evaluate a batch.

    Raises:
        ValueError: the loss has a wrong shape.
    """
    result = evaluate(rows.logits, rows.labels, smoothing=smoothing, dtype=dtype, **options)
    expected = () if options.get("reduction") == "mean" else rows.labels.shape
    if result.loss.shape != expected:
        raise ValueError(f"the loss has shape {list(result.loss.shape)}, expected {list(expected)}")
    return result


def row_sum(subject: Subject, rows: Rows, dtype: str) -> float:
    """Each row of the gradient sums to 0.

    The sum of p has the errors of `bounds`, u (h + 2 EXP + 3 D + (1 + LOG) L + 2). q sums to 1 up to 3 u, or p is
    multiplied with the sum of the subtracted target: u (h + 4) for both. |p - q| sums to at most 2 and has 3 u.
    """
    gradient = run(subject.evaluate, rows, SMOOTHING, dtype).gradient
    h, u, tiny, _, p, D, L = sizes(rows.logits, dtype)
    limit = u * (2 * h + 2 * EXP + 3 * D + (1 + LOG) * L + 12)[:, 0] + 2 * rows.logits.shape[-1] * tiny
    limit += np.sum(stored(p - target(rows, SMOOTHING, "uniform"), dtype), axis=-1)
    # NumPy's sum would round as much as a float64 gradient does.
    sums = np.array([math.fsum(row) if np.all(np.isfinite(row)) else np.nan for row in gradient])
    nothing = np.zeros(0)
    return share(Evaluation(sums, nothing), Evaluation(np.zeros_like(sums), nothing), Evaluation(limit, nothing))


def shift(subject: Subject, rows: Rows, dtype: str) -> float:
    """Integers have exactly the same gaps after adding a power of two, so every bit of the result is the same."""
    logits = np.random.default_rng(0).integers(-16, 17, rows.logits.shape).astype(np.float64)
    start = run(subject.evaluate, rows._replace(logits=logits), SMOOTHING, dtype)
    distance = 2.0 ** (FORMATS[dtype][0] - 1)
    moved = [rows._replace(logits=logits + step) for step in (distance, -distance / 2)]
    return max(share(start, run(subject.evaluate, each, SMOOTHING, dtype), exactly(start)) for each in moved)


def permutation(subject: Subject, rows: Rows, dtype: str) -> float:
    """Classes in another order give the same result within two bounds; the order of sums and vector lanes changes."""
    order = np.random.default_rng(1).permutation(rows.logits.shape[-1])
    permuted = Rows(rows.name, rows.logits[:, order], np.argsort(order)[rows.labels])
    loss, gradient = run(subject.evaluate, rows, SMOOTHING, dtype)
    allowed = twice(bounds(permuted, SMOOTHING, dtype))
    return share(Evaluation(loss, gradient[:, order]), run(subject.evaluate, permuted, SMOOTHING, dtype), allowed)


def linear_uniform(subject: Subject, rows: Rows, dtype: str) -> float:
    """The target is linear in e: loss(e) = (1-e) loss(0) + e loss(1), within the same combination of the bounds."""
    return _linear(subject, rows, dtype, "uniform")


def linear_non_target(subject: Subject, rows: Rows, dtype: str) -> float:
    """As `linear_uniform`, for the convention that smooths over the other classes."""
    return _linear(subject, rows, dtype, "non_target")


def _linear(subject: Subject, rows: Rows, dtype: str, convention: str) -> float:
    weights, smoothings = (1 - SMOOTHING, SMOOTHING), (0.0, 1.0, SMOOTHING)
    none, all_of_it, some = (run(subject.evaluate, rows, e, dtype, convention=convention) for e in smoothings)
    errors = tuple(bounds(rows, e, dtype, convention) for e in smoothings)
    return share(some, combine(weights, (none, all_of_it)), combine((*weights, 1.0), errors))


def label_forgotten(subject: Subject, rows: Rows, dtype: str) -> float:
    """At e = 1 the uniform target is 1/K for each class, whatever the label: within two bounds."""
    other = rows._replace(labels=(rows.labels + 1) % rows.logits.shape[-1])
    allowed = twice(bounds(rows, 1.0, dtype))
    return share(run(subject.evaluate, rows, 1.0, dtype), run(subject.evaluate, other, 1.0, dtype), allowed)


def conventions(subject: Subject, rows: Rows, dtype: str) -> float:
    """non_target at e has the target of uniform at e K/(K-1): within two bounds."""
    num_classes = rows.logits.shape[-1]
    uniform = SMOOTHING * num_classes / (num_classes - 1)
    first = run(subject.evaluate, rows, SMOOTHING, dtype, convention="non_target")
    second = run(subject.evaluate, rows, uniform, dtype, convention="uniform")
    return share(first, second, twice(bounds(rows, SMOOTHING, dtype, "non_target")))


def upcast(subject: Subject, rows: Rows, dtype: str) -> float:
    """Narrow logits give the result of the same numbers in float32, within both bounds.

    Not exactly: the number of values in a vector register, and so the order of a sum, may depend on the dtype.
    """
    if dtype == compute_dtype(dtype):
        raise UnsupportedError(f"{dtype} is not a narrow dtype")
    narrow, wide = (run(subject.evaluate, rows, SMOOTHING, each) for each in (dtype, "float32"))
    allowed = tuple(bounds(rows, SMOOTHING, each) for each in (dtype, "float32"))
    return share(narrow, wide, combine((1.0, 1.0), allowed))


def plain_cross_entropy(subject: Subject, rows: Rows, dtype: str) -> float:
    """At e = 0 the loss is the framework's cross-entropy, within both bounds."""
    if subject.plain is None:
        raise UnsupportedError("there is no other cross-entropy")
    compute = compute_dtype(dtype)
    allowed = combine((1.0, 1.0), (bounds(rows, 0.0, dtype), bounds(rows, 0.0, compute)))
    return share(run(subject.evaluate, rows, 0.0, dtype), run(subject.plain, rows, 0.0, compute), allowed)


def parts(subject: Subject, rows: Rows, dtype: str) -> float:
    """A batch gives the results of its rows alone, within two bounds: sums may depend on the batch size."""
    whole = run(subject.evaluate, rows, SMOOTHING, dtype)
    alone = [Rows(rows.name, rows.logits[[i]], rows.labels[[i]]) for i in range(ROWS)]
    each = [run(subject.evaluate, row, SMOOTHING, dtype) for row in alone]
    joined = Evaluation(*(np.concatenate(part) for part in zip(*each, strict=True)))
    return share(whole, joined, twice(bounds(rows, SMOOTHING, dtype)))


def mean(subject: Subject, rows: Rows, dtype: str) -> float:
    """The mean is the sum of the losses of the counted rows, divided by their number.

    It may differ by the mean of their bounds, and u |mean| for each addition, the division and the result. The gradient
    is divided by the number of rows, so it may also differ by the smallest step of a narrow dtype.
    """
    shares = []
    each, error = run(subject.evaluate, rows, SMOOTHING, dtype), twice(bounds(rows, SMOOTHING, dtype))
    u = 2.0 ** -FORMATS[compute_dtype(dtype)][0]
    step = 2.0 ** (FORMATS[dtype][1] - FORMATS[dtype][0])
    for counted in (None, WHERE):
        kept = np.ones(ROWS, bool) if counted is None else counted
        count = kept.sum()
        mean_loss, mean_error = each.loss[kept].sum() / count, error.loss[kept].sum() / count
        rounding = u * (ROWS + 2) * abs(mean_loss) if np.isfinite(mean_loss) else 0.0
        expected = Evaluation(mean_loss, np.where(kept[:, None], each.gradient, 0.0) / count)
        allowed = Evaluation(mean_error + rounding, np.where(kept[:, None], error.gradient / count + step, 0.0))
        result = run(subject.evaluate, rows, SMOOTHING, dtype, where=counted, reduction="mean")
        shares.append(share(result, expected, allowed))
    return max(shares)


def rows_left_out(subject: Subject, rows: Rows, dtype: str) -> float:
    """Rows that `where` leaves out are 0 and change no bit of the others, whatever their logits and labels are."""
    logits, labels = rows.logits.copy(), rows.labels.copy()
    logits[1], logits[4] = np.nan, np.inf
    labels[1], labels[4] = rows.logits.shape[-1] + 5, -100
    calm = run(subject.evaluate, rows, SMOOTHING, dtype, where=WHERE)
    wild = run(subject.evaluate, Rows(rows.name, logits, labels), SMOOTHING, dtype, where=WHERE)
    expected = Evaluation(np.where(WHERE, calm.loss, 0.0), np.where(WHERE[:, None], calm.gradient, 0.0))
    return share(wild, expected, exactly(expected))


def compiled(subject: Subject, rows: Rows, dtype: str) -> float:
    """Compiled and uncompiled results agree within two bounds: compilers fuse operations and reorder sums."""
    if subject.other is None:
        raise UnsupportedError("needs a second way to run the loss; for torch, --compile")
    allowed = twice(bounds(rows, SMOOTHING, dtype))
    return share(run(subject.evaluate, rows, SMOOTHING, dtype), run(subject.other, rows, SMOOTHING, dtype), allowed)


CHECKS: dict[str, Callable[[Subject, Rows, str], float]] = {
    "row_sum": row_sum,
    "shift": shift,
    "permutation": permutation,
    "linear_uniform": linear_uniform,
    "linear_non_target": linear_non_target,
    "label_forgotten": label_forgotten,
    "conventions": conventions,
    "upcast": upcast,
    "plain_cross_entropy": plain_cross_entropy,
    "parts": parts,
    "mean": mean,
    "rows_left_out": rows_left_out,
    "compiled": compiled,
}


def run_checks(subject: Subject, dtype: str) -> list[CheckOutcome]:
    """Return the outcome of each check."""
    return [_outcome(check, subject, dtype) for check in CHECKS]


def _outcome(check: str, subject: Subject, dtype: str) -> CheckOutcome:
    shares = {}
    for rows in make_rows(dtype):
        try:
            shares[rows.name] = CHECKS[check](subject, rows, dtype)
        except UnsupportedError as reason:
            return CheckOutcome(check, dtype, "not applicable", 0.0, str(reason))
        except Exception as error:  # a loss may raise anything, and the other checks must still run
            message = (str(error).strip() or "no message").splitlines()[0]
            return CheckOutcome(check, dtype, "failed", math.inf, f"{rows.name}: {type(error).__name__}: {message}")
    worst = max(shares, key=lambda name: shares[name])
    return CheckOutcome(check, dtype, "agree" if shares[worst] <= 1 else "disagree", shares[worst], worst)


# ---- Losses of the frameworks as functions of NumPy arrays


def options_of(loss: Callable[..., Any], **wanted: Any) -> dict[str, Any]:
    """Return the options to call a loss with. An option that it lacks must have its default.

    Raises:
        UnsupportedError: an option that it lacks has another value.
    """
    parameters = inspect.signature(loss).parameters.values()
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    options = {}
    for name, value in {**DEFAULTS, **wanted}.items():
        if takes_all or name in names:
            options[name] = value
        elif name not in DEFAULTS or value is not DEFAULTS[name]:
            raise UnsupportedError(f"the loss has no argument {name!r}")
    return {name: value for name, value in options.items() if value is not None}


def torch_evaluate(loss: Callable[..., Any], device: str, compile_it: bool = False) -> Evaluate:
    """Return a loss of torch as a function of NumPy arrays."""
    torch = importlib.import_module("torch")
    call = torch.compile(loss) if compile_it else loss

    def evaluate(
        logits: FloatArray, labels: NDArray[np.int64], *, smoothing: float, dtype: str, **options: Any
    ) -> Evaluation:
        given = options_of(loss, smoothing=smoothing, **options)
        if "where" in given:
            given["where"] = torch.from_numpy(given["where"]).to(device)
        leaf = torch.from_numpy(logits).to(device, getattr(torch, dtype)).requires_grad_()
        losses = call(leaf, torch.from_numpy(labels).to(device), **given)
        factors = upstream(losses.shape)
        (gradient,) = torch.autograd.grad((losses * torch.from_numpy(factors).to(losses)).sum(), leaf)
        return _result(losses.detach().double().cpu().numpy(), gradient.double().cpu().numpy(), factors)

    return evaluate


def jax_evaluate(loss: Callable[..., Any], device: str | None, compile_it: bool = True) -> Evaluate:
    """Return a loss of JAX as a function of NumPy arrays."""
    jax = importlib.import_module("jax")

    @cache
    def step(**options: Any) -> Callable[..., Any]:
        def total(logits: Any, labels: Any, arrays: dict[str, Any]) -> tuple[Any, Any]:
            losses = loss(logits, labels, **options, **arrays)
            return (losses * jax.numpy.asarray(upstream(losses.shape), losses.dtype)).sum(), losses

        gradient: Callable[..., Any] = jax.grad(total, has_aux=True)
        return jax.jit(gradient) if compile_it else gradient

    def evaluate(
        logits: FloatArray, labels: NDArray[np.int64], *, smoothing: float, dtype: str, **options: Any
    ) -> Evaluation:
        given = options_of(loss, smoothing=smoothing, **options)
        with jax.enable_x64(dtype == "float64"), jax.default_device(jax.devices(device)[0]):
            arrays = {"where": jax.numpy.asarray(given.pop("where"))} if "where" in given else {}
            operands = (jax.numpy.asarray(logits, dtype), jax.numpy.asarray(labels, "int32"))
            gradient, losses = step(**given)(*operands, arrays)
            return _result(np.asarray(losses), np.asarray(gradient), upstream(losses.shape))

    return evaluate


def _result(losses: NDArray[Any], gradient: NDArray[Any], factors: FloatArray) -> Evaluation:
    return Evaluation(losses.astype(np.float64), gradient.astype(np.float64) / factors.reshape(-1, 1))


def torch_plain(logits: Any, labels: Any, *, smoothing: float) -> Any:
    """Return torch's cross-entropy, for a smoothing of 0."""
    assert smoothing == 0
    return importlib.import_module("torch").nn.functional.cross_entropy(logits, labels, reduction="none")


def jax_plain(logits: Any, labels: Any, *, smoothing: float) -> Any:
    """Return the cross-entropy from JAX's log-softmax, for a smoothing of 0."""
    assert smoothing == 0
    jax = importlib.import_module("jax")
    return -jax.numpy.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]


def make_subject(framework: str, loss: Callable[..., Any], device: str | None, compile_it: bool) -> Subject:
    """Return the subject of the checks. JAX's loss is compiled and compared with eager; torch's the other way round.

    Raises:
        RuntimeError, AssertionError: the framework does not have the device.
    """
    if framework == "jax":
        importlib.import_module("jax").devices(device)
        uncompiled = jax_evaluate(loss, device, compile_it=False)
        return Subject(jax_evaluate(loss, device), jax_evaluate(jax_plain, device), uncompiled)
    device = device or "cpu"
    importlib.import_module("torch").zeros(1, device=device)
    other = torch_evaluate(loss, device, compile_it=True) if compile_it else None
    return Subject(torch_evaluate(loss, device), torch_evaluate(torch_plain, device), other)


# ---- Command line


def find_loss(name: str) -> Callable[..., Any]:
    """Return the function named "package.module:name".

    Raises:
        ValueError: there is no such function, or it has no smoothing.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"--loss {name}: write package.module:name")
    try:
        loss: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        options_of(loss, smoothing=SMOOTHING)
    except Exception as error:  # a module may raise anything
        raise ValueError(f"--loss {name}: {type(error).__name__}: {error}") from error
    return loss


def table(outcomes: list[CheckOutcome]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield f"{'dtype':9} {'check':20} {'error/bound':>11}  {'verdict':14} detail"
    for each in outcomes:
        shown = "" if each.verdict == "not applicable" else f"{each.share:.3f}"
        yield f"{each.dtype:9} {each.check:20} {shown:>11}  {each.verdict:14} {each.detail}"


def main(arguments: list[str] | None = None) -> int:
    """Run the checks, print a table, return the exit code."""
    parser = argparse.ArgumentParser(description="Check a label-smoothed cross-entropy without an oracle.")
    parser.add_argument("framework", choices=("jax", "torch"))
    parser.add_argument("--device", help="cpu, cuda or tpu; default: cpu for torch, JAX's own choice for jax")
    parser.add_argument("--dtype", action="append", choices=FORMATS, help="may be repeated; default: float32, bfloat16")
    parser.add_argument("--loss", metavar="MODULE:NAME", help="default: label_smoothed_cross_entropy of lsce")
    parser.add_argument("--compile", action="store_true", help="for torch: also compare torch.compile with eager")
    chosen = parser.parse_args(arguments)
    name = chosen.loss or f"lsce_{chosen.framework}:label_smoothed_cross_entropy"
    try:
        importlib.import_module(chosen.framework)
        subject = make_subject(chosen.framework, find_loss(name), chosen.device, chosen.compile)
    except (ImportError, ValueError, RuntimeError, AssertionError) as error:
        return _cannot_run(error)
    outcomes = [outcome for dtype in chosen.dtype or ("float32", "bfloat16") for outcome in run_checks(subject, dtype)]
    print(f"{chosen.framework} {name}", *table(outcomes), sep="\n")
    agrees = agreement(outcomes)
    return _cannot_run("no check got a result") if agrees is None else int(not agrees)


def agreement(outcomes: list[CheckOutcome]) -> bool | None:
    """Return whether every check that applies agrees; None if none got a result."""
    if all(outcome.verdict in ("failed", "not applicable") for outcome in outcomes):
        return None
    return not any(outcome.verdict in ("disagree", "failed") for outcome in outcomes)


def _cannot_run(reason: object) -> int:
    print(f"cannot run: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
