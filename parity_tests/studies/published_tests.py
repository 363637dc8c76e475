"""Whose tests would have caught what: the mutant bank under the published label-smoothing tests of other libraries.

Each test is kept as data: the inputs it draws, what it compares, and its tolerances, as read in the named file at the
named commit. A fault of `faults/dense.py` takes the place of the loss under test, and the sound loss in float64 that
of the reference. Beside each test stand the computed bounds, on the same inputs.

A test of 4096 rows and 50257 classes is too large to run for every fault. So a setting of random logits has all of its
classes but only `ROWS` of its rows, and what the number of rows decides is put in:

- A mean over N rows makes gradients 1/N as large, which an absolute tolerance feels: they are scaled to N rows.
- A reduced loss averages what differs from row to row: that part of its error is scaled to N rows.
- The largest of N * K normal logits makes the largest gradient entry, and the largest and the smallest label logit of N
  rows make the extreme losses of rows: they are planted, at the median of what N rows would hold.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np

from parity_tests.faults.dense import evaluate, smoothed_target
from parity_tests.truth.bounds import Arithmetic, Bound, error_bound
from parity_tests.truth.cases import Case, soft_labels
from parity_tests.truth.comparison import Result
from parity_tests.truth.oracle import Truth, solve
from parity_tests.truth.precision import FloatArray, compute_dtype, round_to

ROWS = 5
# Another draw of the inputs may decide otherwise where the largest error is within this factor of the tolerance.
CLOSE = 2.0
# Student's t of four rows is larger once in a hundred where the mean error is 0.
SIGNIFICANT = 6.0

Mark = Literal["caught", "survives", "nothing"]
# Part -> what the loss under test gave, and what the test holds it against.
Compared = Mapping[str, tuple[FloatArray, FloatArray]]
Compare = Callable[["Setting", str | None], Compared]


class Tolerance(NamedTuple):
    """|actual - expected| <= atol + rtol * |expected|, as in torch.allclose and numpy.testing.assert_allclose."""

    rtol: float
    atol: float


@dataclass(frozen=True, eq=False)
class Setting:
    """One choice of a published test's parameters.

    Args:
        test: name of the test function.
        logits: where its logits come from, for people.
        case: its inputs.
        compare: what it compares.
        loss, gradient: the tolerances of each; None where the test does not look. `loss` is that of targets too.
        rows: how many rows the test has, if the case holds fewer of them.
        counted: how many of those are not ignored.
    """

    test: str
    logits: str
    case: Case
    compare: Compare
    loss: Tolerance | None = None
    gradient: Tolerance | None = None
    rows: int | None = None
    counted: int | None = None


@dataclass(frozen=True)
class PeerTest:
    """The label-smoothing tests in one file of a library.

    Args:
        name: what the tables call them.
        repository, path, commit: the file that was read.
        make_settings: makes the choices of parameters that are judged.
    """

    name: str
    repository: str
    path: str
    commit: str
    make_settings: Callable[[], tuple[Setting, ...]]


@dataclass(frozen=True)
class Verdict:
    """What a library's tests, and the bounds on the inputs of these tests, make of a fault.

    Args:
        mark: a test rejects the fault ("caught"); all accept it, although the bounds reject it on the same inputs
            ("survives"); or the bounds accept it too, because there it changes no more than rounding may ("nothing").
        share: largest error as a share of a test's tolerance, up to the first that is clear; 0 where none looks.
        ours: whether the bounds reject it on the inputs of any of the settings.
    """

    mark: Mark
    share: float
    ours: bool

    @property
    def close(self) -> bool:
        """Whether another draw of the inputs may decide otherwise."""
        return self.mark != "nothing" and 1 / CLOSE < self.share <= CLOSE


# What a test compares. Each function takes a setting and a fault, None for the sound loss.


def with_reference(setting: Setting, fault: str | None) -> Compared:
    """Loss and gradient, with those of a reference implementation or with values worked out by hand."""
    return _of_all_rows(setting, fault, _result(setting, fault), _expected(setting))


def squared_with_reference(setting: Setting, fault: str | None) -> Compared:
    """The square of the loss, so that what comes from upstream is twice the loss, with that of a reference."""
    upstream = 2 * _result(setting, fault).loss
    wrong = evaluate(replace(setting.case, upstream=upstream), fault)
    compared = _of_all_rows(setting, fault, wrong, _expected(setting))
    actual, expected = compared["loss"]
    return {**compared, "loss": (actual**2, expected**2)}


def with_own_differences(setting: Setting, fault: str | None) -> Compared:
    """The gradient, with central differences of the loss itself: torch.autograd.gradcheck."""
    case, step = setting.case, 1e-6
    differences = np.zeros_like(case.logits)
    for index in np.ndindex(case.logits.shape):
        sides = []
        for sign in (1, -1):
            logits = case.logits.copy()
            logits[index] += sign * step
            result = evaluate(replace(case, logits=logits), fault)
            sides.append(np.sum(result.loss * (1.0 if case.upstream is None else case.upstream)))
        differences[index] = (sides[0] - sides[1]) / (2 * step)
    return {"gradient": (evaluate(case, fault).gradient, differences)}


def whole_with_parts(setting: Setting, fault: str | None) -> Compared:
    """The sum over a batch of two sentences, one of them padded, with the sums over each without padding."""
    case = setting.case
    counted, first = case.rows().counted, np.arange(len(case.labels)) < len(case.labels) // 2
    parts = [replace(case, logits=case.logits[rows], labels=case.labels[rows]) for rows in (counted & first, ~first)]
    total = np.sum([evaluate(part, fault).loss for part in parts])
    return {"loss": (evaluate(case, fault).loss, total)}


def sum_with_rows(setting: Setting, fault: str | None) -> Compared:
    """The sum, with the sum of the losses of the rows."""
    return {"loss": (evaluate(setting.case, fault).loss, evaluate(_unreduced(setting.case), fault).loss.sum())}


def unsmoothed_with_plain(setting: Setting, fault: str | None) -> Compared:
    """The loss at smoothing 0, with plain cross-entropy."""
    case = replace(setting.case, smoothing=0.0)
    return {"loss": (evaluate(case, fault).loss, _reference(case).loss)}


def targets(setting: Setting, fault: str | None) -> Compared:
    """The smoothed targets alone, with values worked out by hand. No loss is taken."""
    case = setting.case
    everywhere, dtype = np.ones(case.num_classes, bool), np.dtype(np.float32)
    actual, expected = (smoothed_target(case, case.labels, everywhere, dtype, each) for each in (fault, None))
    return {"target": (actual, expected)}


def _reference(case: Case) -> Result:
    """Return the sound result, computed in float64 and rounded to what the dtype of the case gives."""
    result, compute = evaluate(replace(case, dtype="float64")), compute_dtype(case.dtype)
    return Result(round_to(result.loss, compute), round_to(result.gradient, case.dtype), compute, case.dtype)


def _unreduced(case: Case) -> Case:
    return replace(case, options={**case.options, "reduction": "none"})


def _of_all_rows(setting: Setting, fault: str | None, actual: Result, expected: Result) -> Compared:
    """Return what the results would be if the case held all rows of the test."""
    case, reduction = setting.case, setting.case.options.get("reduction", "none")
    losses, gradients = (actual.loss, expected.loss), (actual.gradient, expected.gradient)
    if setting.counted is None or reduction == "none":
        return {"loss": losses, "gradient": gradients}
    more = setting.counted / int(case.rows().counted.sum())
    if reduction == "mean":
        gradients = (round_to(gradients[0] / more, case.dtype), round_to(gradients[1] / more, case.dtype))
    return {"loss": _loss_of_all_rows(setting, fault, losses, more), "gradient": gradients}


def _loss_of_all_rows(
    setting: Setting, fault: str | None, losses: tuple[FloatArray, FloatArray], more: float
) -> tuple[FloatArray, FloatArray]:
    """Return a mean or sum with the error it would typically have over `more` times as many rows.

    Rows are drawn independently: the square of a mean's error is the square of its bias plus variance / rows. A bias
    that these few rows do not show is taken for 0.
    """
    case, (actual, expected) = setting.case, losses
    counted = case.rows().counted
    rows = _expected_rows(setting)[counted]
    errors = evaluate(_unreduced(case), fault).loss[counted] - rows
    error = actual - expected
    if np.isfinite(error) and np.isfinite(errors).all():
        variance = errors.var(ddof=1) * len(rows) / (rows.sum() / expected) ** 2
        bias = error if error**2 > SIGNIFICANT**2 * variance else 0.0
        error = np.sqrt(bias**2 + variance / more)
    scale = more if case.options["reduction"] == "sum" else 1.0
    return scale * (expected + error), scale * expected


# The verdict.


def share_of_tolerance(actual: FloatArray, expected: FloatArray, tolerance: Tolerance) -> float:
    """Return the largest error as a share of what is allowed; inf for a NaN, infinity or finite number out of place."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.where(actual == expected, 0.0, np.abs(actual - expected))
        share = np.where(error == 0, 0.0, error / (tolerance.atol + tolerance.rtol * np.abs(expected)))
    return float(np.max(np.where(np.isnan(share) | np.isinf(error), np.inf, share), initial=0.0))


def share_of(setting: Setting, fault: str | None) -> float:
    """Return the largest error of a fault, or of the sound loss, as a share of a test's tolerances."""
    tolerances = {"loss": setting.loss, "gradient": setting.gradient, "target": setting.loss}
    shares = [0.0]
    for part, (actual, expected) in setting.compare(setting, fault).items():
        tolerance = tolerances[part]
        if tolerance is not None:
            shares.append(share_of_tolerance(actual, expected, tolerance))
    return max(shares)


def judge(peer: PeerTest, fault: str) -> Verdict:
    """Return what a library's tests make of a fault."""
    share, ours = 0.0, False
    for setting in settings_of(peer):
        wrong, sound = _result(setting, fault), _sound(setting)
        pairs = [(wrong.loss, sound.loss), (wrong.gradient, sound.gradient)]
        if all(np.array_equal(*pair, equal_nan=True) for pair in pairs):
            continue
        if share <= CLOSE:
            share = max(share, share_of(setting, fault))
        ours = ours or _bounds_reject(setting, wrong)
    mark: Mark = "caught" if share > 1 else "survives" if ours else "nothing"
    return Verdict(mark, share, ours)


@cache
def verdicts_on(fault: str) -> dict[str, Verdict]:
    """Return what each library's tests make of a fault, by their name."""
    return {peer.name: judge(peer, fault) for peer in PEER_TESTS}


@cache
def settings_of(peer: PeerTest) -> tuple[Setting, ...]:
    """Return the settings of a library's tests, the same each time."""
    return peer.make_settings()


@lru_cache(maxsize=1)
def _result(setting: Setting, fault: str | None) -> Result:
    return evaluate(setting.case, fault)


@cache
def _sound(setting: Setting) -> Result:
    return evaluate(setting.case)


@cache
def _expected(setting: Setting) -> Result:
    return _reference(setting.case)


@cache
def _expected_rows(setting: Setting) -> FloatArray:
    return _reference(_unreduced(setting.case)).loss


@cache
def _truth_and_bound(setting: Setting) -> tuple[Truth, Bound]:
    truth = solve(setting.case)
    return truth, error_bound(setting.case, truth, Arithmetic())


def _bounds_reject(setting: Setting, result: Result) -> bool:
    truth, bound = _truth_and_bound(setting)
    loss, gradient = truth.loss.error_of(result.loss), truth.gradient.error_of(result.gradient)
    return bool(np.any(loss > bound.loss) or np.any(gradient > bound.gradient))


# The tests.


def _random(  # noqa: PLR0913 - each is a choice of a published test
    test: str,
    shape: tuple[int, int],
    dtype: str,
    smoothing: float,
    *,
    compare: Compare = with_reference,
    loss: Tolerance,
    gradient: Tolerance,
    scale: float | None = 1.0,
    ignored: int = 0,
    upstream: float | Literal["normal"] | None = None,
    weighted: bool = False,
    **options: Any,
) -> Setting:
    """Return a setting of normal logits of that scale, or of uniform ones in [0, 1) for None."""
    rows, num_classes = shape
    reduction = options["reduction"]
    generator = np.random.default_rng(zlib.crc32(f"{test} {dtype} {reduction}".encode()))
    labels = generator.integers(1, num_classes, size=ROWS)
    logits = generator.random((ROWS, num_classes)) if scale is None else generator.normal(size=(ROWS, num_classes))
    if scale is not None:
        logits[0, labels[0] - 1] = _median_of_maximum(rows * num_classes)
        if reduction == "none":
            logits[[1, 2], labels[[1, 2]]] = _median_of_maximum(rows) * np.array([1, -1])
        logits *= scale
    if ignored:
        labels[-1] = options["ignore_index"]
    given = generator.normal(size=ROWS) if upstream == "normal" else upstream
    case = Case(
        test,
        dtype,
        round_to(logits, dtype),
        labels,
        options=options,
        smoothing=smoothing,
        upstream=None if given is None else round_to(np.asarray(given), "float32"),
        class_weight=round_to(generator.random(num_classes), "float32") if weighted else None,
    )
    drawn = "uniform in [0, 1)" if scale is None else "normal" if scale == 1 else f"{scale:g} x normal"
    return Setting(test, drawn, case, compare, loss, gradient, rows, rows - ignored)


def _median_of_maximum(count: int) -> float:
    """Return the median of the largest of that many standard normal numbers."""
    return NormalDist().inv_cdf(0.5 ** (1 / count))


def _liger() -> tuple[Setting, ...]:
    # bfloat16 has the same inputs and a wider rtol, 5e-2; 8192 rows have smaller gradients and the same atol.
    shape, tolerance = (3 * 423, 32000), Tolerance(1e-6, 1e-8)
    # A random number of rows below a half is ignored.
    both: dict[str, Any] = {"loss": tolerance, "gradient": tolerance, "ignored": shape[0] // 4}
    smoothed = "test_correctness_with_label_smoothing_with_ignore_index_once"
    weighted = "test_correctness_with_weight_with_other_params_once"
    options: dict[str, Any] = {"weighted": True, "softcap": 30.0, "z_loss": 1e-4, "ignore_index": -100}
    return (
        _random(weighted, shape, "float32", 0.1, reduction="none", **options, **both),
        _random(weighted, shape, "float32", 0.1, reduction="mean", **options, **both),
        _random(smoothed, shape, "float32", 0.2, reduction="mean", ignore_index=-300, **both),
    )


def _flash_attention() -> tuple[Setting, ...]:
    # float16 and bfloat16 have wider tolerances for the gradient, 128256 classes smaller gradients. What comes from
    # upstream is a normal number; 2 is more than 95 of 100 of them, in favour of the test.
    make = partial(
        _random,
        "test_cross_entropy_loss",
        dtype="float32",
        smoothing=0.9,
        loss=Tolerance(1e-5, 1e-6),
        gradient=Tolerance(1e-5, 1e-6),
        ignored=10,
        ignore_index=-100,
        reduction="mean",
        upstream=2.0,
    )
    return make(shape=(4096, 50257)), make(shape=(1024, 50257), z_loss=1e-2)


def _flash_attention_parallel() -> tuple[Setting, ...]:
    tolerance = Tolerance(1e-5, 1e-6)
    return (
        _random(
            "test_cross_entropy_loss_parallel",
            (8 * 128, 50264),
            "float32",
            0.9,
            loss=tolerance,
            gradient=tolerance,
            scale=10.0,
            ignored=10,
            ignore_index=-100,
            reduction="none",
            upstream="normal",
        ),
    )


def _apex() -> tuple[Setting, ...]:
    # bfloat16 has the same tolerance for the loss and a wider one for the gradient.
    rows = 128 * 74
    return (
        _random(
            "test_label_smoothing_function_fp16",
            (rows, 32320),
            "float16",
            0.1,
            loss=Tolerance(1.3e-6, 1e-5),
            gradient=Tolerance(1e-3, 1e-5),
            ignored=rows // 6,
            ignore_index=0,
            reduction="sum",
        ),
    )


def _transformer_engine() -> tuple[Setting, ...]:
    # Of 64 or 128 positions, 1 or 2 sequences and 64000 or 128000 classes, drawn anew each time, the strictest.
    make = partial(
        _random,
        shape=(64, 64000),
        dtype="float32",
        smoothing=0.1,
        compare=squared_with_reference,
        loss=Tolerance(1.3e-6, 1e-5),
        gradient=Tolerance(1.3e-6, 1e-5),
        scale=None,
    )
    settings = (
        make("test_label_smoothing", reduction="mean"),
        make("test_z_loss_label_smoothing", reduction="none", z_loss=0.001),
    )
    return tuple(replace(each, case=replace(each.case, upstream=2 * _reference(each.case).loss)) for each in settings)


def _torch() -> tuple[Setting, ...]:
    generator = np.random.default_rng(0)

    def case(rows: int, dtype: str, **fields: Any) -> Case:
        labels = np.arange(rows) % 3
        logits = round_to(generator.uniform(-9, 9, (rows, 3)), dtype)
        return Case("test_modules", dtype, **{"logits": logits, "labels": labels, "smoothing": 0.15, **fields})

    precision, gradcheck = Tolerance(1e-5, 1e-5), Tolerance(1e-3, 1e-5)
    forward = partial(Setting, "test_forward", "uniform in [-9, 9)", compare=with_reference, loss=precision)
    grad = partial(Setting, "test_grad", "uniform in [-9, 9)", compare=with_own_differences, gradient=gradcheck)
    ignoring, probabilities = {"reduction": "mean", "ignore_index": 1}, soft_labels("float32", generator, (20, 3))
    return (
        forward(case(50, "float32", options={"reduction": "none"})),
        forward(case(50, "float32", options=ignoring)),
        forward(case(20, "float32", options={"reduction": "sum"}, labels=probabilities)),
        # Each row of the Jacobian is asked for by its own upstream.
        grad(case(10, "float64", options={"reduction": "none"}, upstream=np.eye(10)[0])),
        grad(case(10, "float64", options=ignoring)),
    )


def _keras() -> tuple[Setting, ...]:
    logits = np.array([[100.0, -100, -100]])
    case = Case("keras", "float32", logits, np.array([0]), options={"reduction": "mean"})
    # Three decimals: assert_almost_equal allows 1.5 of the last.
    return (
        Setting(
            "CategoricalCrossentropyTest.test_label_smoothing",
            "by hand",
            case,
            with_reference,
            loss=Tolerance(0, 1.5e-3),
        ),
    )


def _mlx() -> tuple[Setting, ...]:
    logits = np.array([[2.0, -1], [-1, 2]])
    case = Case("test_cross_entropy", "float32", logits, np.array([0, 1]), smoothing=0.3)
    make = partial(Setting, "test_cross_entropy", "by hand", compare=with_reference, loss=Tolerance(1e-5, 1e-8))
    return make(case), make(replace(case, labels=np.eye(2)))


def _paddle() -> tuple[Setting, ...]:
    # The smoothing is drawn from [0.1, 1). Class weights are left out: they have another meaning there.
    generator = np.random.default_rng(0)
    make = partial(Setting, compare=with_reference, loss=Tolerance(1e-5, 0))
    settings = []
    for test, rows, num_classes in (("1d", 4, 3), ("2d", 12, 5)):
        name, labels = f"test_cross_entropy_loss_integer_label_smoothing_{test}", np.arange(rows) % num_classes
        logits = generator.uniform(0.1, 1, (rows, num_classes))
        settings.append(make(name, "uniform in [0.1, 1)", Case(name, "float64", logits, labels, smoothing=0.4)))
    return tuple(settings)


def _easydel() -> tuple[Setting, ...]:
    # Compared with another path of the same library. The test weighs rows, which this leaves out.
    test = "test_fixed_cross_entropy_default_blockwise_matches_dense_label_smoothing"
    logits = np.array([
        [0.1, 0.4, -0.7, 0.6, 0.3, -0.2, 0.5],
        [0.2, -0.1, 0.8, 0.7, -0.5, 0.6, 0.1],
        [0.9, 0.1, -0.4, 0.3, 0.5, -0.6, 0.7],
        [-0.3, 0.2, 0.4, -0.1, 0.8, 0.5, -0.2],
        [0.6, -0.2, 0.3, 0.9, -0.4, 0.1, 0.7],
        [0.5, 0.8, -0.3, 0.2, 0.4, -0.6, 0.1],
        [-0.2, 0.7, 0.6, -0.5, 0.3, 0.9, 0.4],
        [0.4, -0.7, 0.2, 0.5, 0.6, 0.3, -0.1],
    ])  # fmt: skip
    labels = np.array([1, 3, 4, -100, 0, 2, 5, 4])
    options = {
        "convention": "non_target",
        "subtract_entropy": True,
        "z_loss": 1e-4,
        "ignore_index": -100,
        "reduction": "mean",
    }
    case = Case(test, "float32", round_to(logits, "float32"), labels, options=options)
    return (Setting(test, "by hand", case, with_reference, loss=Tolerance(1e-5, 1e-5)),)


def _fairseq() -> tuple[Setting, ...]:
    probabilities = np.array([
        [0.05, 0.05, 0.1, 0.05, 0.3, 0.4, 0.05],
        [0.05, 0.10, 0.2, 0.05, 0.2, 0.3, 0.10],
        [0.05, 0.15, 0.3, 0.05, 0.1, 0.2, 0.15],
    ])  # fmt: skip
    logits = round_to(np.log(np.concatenate([probabilities, probabilities])), "float32")
    labels = np.array([4, 2, 1, 4, 4, 2])
    case = Case("fairseq", "float32", logits, labels, options={"ignore_index": 1, "reduction": "sum"})
    tolerance = Tolerance(0, 1e-6)
    return (
        Setting("test_padding", "by hand", case, whole_with_parts, loss=tolerance),
        Setting("test_reduction", "by hand", case, sum_with_rows, loss=tolerance),
        Setting("test_zero_eps", "by hand", case, unsmoothed_with_plain, loss=tolerance),
    )


def _optax() -> tuple[Setting, ...]:
    case = Case("test_batched", "float32", np.array([[0.5, 1, -1], [2, 0, 0.25]]), np.eye(3)[[1, 0]])
    return (Setting("test_batched", "none", case, targets, loss=Tolerance(1e-7, 1e-4)),)


def _t5x() -> tuple[Setting, ...]:
    generator = np.random.default_rng(0)
    options = {
        "convention": "non_target",
        "subtract_entropy": True,
        "z_loss": 0.1,
        "reduction": "mean",
        "denominator": 0.1,
    }
    logits = round_to(generator.normal(size=(8, 8)), "float32")
    case = Case("test_xent", "float32", logits, generator.integers(8, size=8), options=options)
    # It prints loss and gradient.
    return (Setting("test_xent", "normal", case, with_reference),)


PEER_TESTS = (
    PeerTest("Liger", "linkedin/Liger-Kernel", "test/transformers/test_cross_entropy.py", "af35a6cf3663", _liger),
    PeerTest(
        "flash-attn",
        "Dao-AILab/flash-attention",
        "tests/losses/test_cross_entropy.py",
        "900b3793459c",
        _flash_attention,
    ),
    PeerTest(
        "flash-attn parallel",
        "Dao-AILab/flash-attention",
        "tests/losses/test_cross_entropy_parallel.py",
        "2d07ad64a817",
        _flash_attention_parallel,
    ),
    PeerTest("apex", "NVIDIA/apex", "apex/contrib/test/xentropy/test_label_smoothing.py", "16fadfe71c0d", _apex),
    PeerTest(
        "TE",
        "NVIDIA/TransformerEngine",
        "tests/pytorch/test_parallel_cross_entropy.py",
        "0b638b929bb8",
        _transformer_engine,
    ),
    PeerTest("torch", "pytorch/pytorch", "test/test_modules.py", "33263640046f", _torch),
    PeerTest("Keras", "keras-team/keras", "keras/src/losses/losses_test.py", "3bf075bb648e", _keras),
    PeerTest("MLX", "ml-explore/mlx", "python/tests/test_losses.py", "03f8ed15e6b6", _mlx),
    PeerTest("Paddle", "PaddlePaddle/Paddle", "test/legacy_test/test_cross_entropy_loss.py", "02f59a0251b0", _paddle),
    PeerTest("EasyDeL", "erfanzar/EasyDeL", "tests/infra/test_loss_utils.py", "7d2f4584ab16", _easydel),
    PeerTest("fairseq", "facebookresearch/fairseq", "tests/test_label_smoothing.py", "1234818b8293", _fairseq),
    PeerTest("Optax", "google-deepmind/optax", "optax/losses/_smoothing_test.py", "f3c6e48206a4", _optax),
    PeerTest("T5X", "google-research/t5x", "t5x/losses_test.py", "08058ed51b04", _t5x),
)
