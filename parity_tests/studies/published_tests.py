"""The published label-smoothing tests of other libraries, as data: inputs, compared values, tolerances.

Each test was read in the named file at the named commit.

A test of 4096 rows and 50257 classes is too large to run for every fault. So a setting with random logits has all of
the test's classes but only `ROWS` of its N rows, and `published_comparisons` scales the results to N rows. The largest
of N * K normal logits gives the largest gradient entry; the largest and smallest label logits of N rows give the
extreme losses. These logits are planted, at the medians of the extremes over N rows.
"""

import zlib
from dataclasses import dataclass, replace
from functools import partial
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from parity_tests.studies.published_comparisons import (
    Compare,
    PeerTest,
    Setting,
    Tolerance,
    reference,
    squared_with_reference,
    sum_with_rows,
    targets,
    unsmoothed_with_plain,
    whole_with_parts,
    with_own_differences,
    with_reference,
)
from parity_tests.truth.cases import Case, soft_labels
from parity_tests.truth.precision import FloatArray, round_to

ROWS = 5


@dataclass(frozen=True)
class RandomInputs:
    """The inputs that a test draws.

    Args:
        shape: rows and classes of the test; a setting has `ROWS` of the rows.
        dtype: of the logits.
        smoothing: the smoothing.
        scale: of normal logits; None for uniform ones in [0, 1).
        ignored: how many rows are ignored.
        upstream: the incoming gradient of the loss, "normal" if it is random.
        weighted: whether the classes have random weights.
    """

    shape: tuple[int, int]
    dtype: str
    smoothing: float
    scale: float | None = 1.0
    ignored: int = 0
    upstream: float | Literal["normal"] | None = None
    weighted: bool = False

    def setting(
        self, test: str, loss: Tolerance, gradient: Tolerance, compare: Compare = with_reference, **options: Any
    ) -> Setting:
        """Return the setting of a test with these inputs, these tolerances and the options of the loss."""
        rows, reduction = self.shape[0], options["reduction"]
        generator = np.random.default_rng(zlib.crc32(f"{test} {self.dtype} {reduction}".encode()))
        logits, labels = self._logits_and_labels(generator, reduction)
        if self.ignored:
            labels[-1] = options["ignore_index"]
        given = generator.normal(size=ROWS) if self.upstream == "normal" else self.upstream
        weight = round_to(generator.random(self.shape[1]), "float32") if self.weighted else None
        case = Case(
            test,
            self.dtype,
            round_to(logits, self.dtype),
            labels,
            options=options,
            smoothing=self.smoothing,
            upstream=None if given is None else round_to(np.asarray(given), "float32"),
            class_weight=weight,
        )
        return Setting(test, self._distribution, case, compare, loss, gradient, rows, rows - self.ignored)

    def _logits_and_labels(
        self, generator: np.random.Generator, reduction: str
    ) -> tuple[FloatArray, NDArray[np.int64]]:
        rows, num_classes = self.shape
        labels = generator.integers(1, num_classes, size=ROWS)
        if self.scale is None:
            return generator.random((ROWS, num_classes)), labels
        logits = generator.normal(size=(ROWS, num_classes))
        logits[0, labels[0] - 1] = _median_of_maximum(rows * num_classes)
        if reduction == "none":
            logits[[1, 2], labels[[1, 2]]] = _median_of_maximum(rows) * np.array([1, -1])
        return logits * self.scale, labels

    @property
    def _distribution(self) -> str:
        if self.scale is None:
            return "uniform in [0, 1)"
        return "normal" if self.scale == 1 else f"{self.scale:g} x normal"


def _median_of_maximum(count: int) -> float:
    """Return the median of the largest of that many standard normal numbers."""
    return NormalDist().inv_cdf(0.5 ** (1 / count))


def _liger() -> tuple[Setting, ...]:
    # bfloat16 has the same inputs and a wider rtol, 5e-2; 8192 rows have smaller gradients and the same atol.
    # Of the rows, a random number below a half is ignored.
    shape, tolerance = (3 * 423, 32000), Tolerance(1e-6, 1e-8)
    inputs = RandomInputs(shape, "float32", 0.1, ignored=shape[0] // 4, weighted=True)
    smoothed = "test_correctness_with_label_smoothing_with_ignore_index_once"
    weighted = "test_correctness_with_weight_with_other_params_once"
    options: dict[str, Any] = {"softcap": 30.0, "z_loss": 1e-4, "ignore_index": -100}
    unweighted = replace(inputs, smoothing=0.2, weighted=False)
    return (
        inputs.setting(weighted, tolerance, tolerance, reduction="none", **options),
        inputs.setting(weighted, tolerance, tolerance, reduction="mean", **options),
        unweighted.setting(smoothed, tolerance, tolerance, reduction="mean", ignore_index=-300),
    )


def _flash_attention() -> tuple[Setting, ...]:
    # float16 and bfloat16 have wider tolerances for the gradient, 128256 classes smaller gradients. The incoming
    # gradient is a normal number; 2 is more than 95 of 100 of them, in favour of the test.
    test, tolerance = "test_cross_entropy_loss", Tolerance(1e-5, 1e-6)
    inputs = RandomInputs((4096, 50257), "float32", 0.9, ignored=10, upstream=2.0)
    fewer_rows = replace(inputs, shape=(1024, 50257))
    return (
        inputs.setting(test, tolerance, tolerance, ignore_index=-100, reduction="mean"),
        fewer_rows.setting(test, tolerance, tolerance, ignore_index=-100, reduction="mean", z_loss=1e-2),
    )


def _flash_attention_parallel() -> tuple[Setting, ...]:
    test, tolerance = "test_cross_entropy_loss_parallel", Tolerance(1e-5, 1e-6)
    inputs = RandomInputs((8 * 128, 50264), "float32", 0.9, scale=10.0, ignored=10, upstream="normal")
    return (inputs.setting(test, tolerance, tolerance, ignore_index=-100, reduction="none"),)


def _apex() -> tuple[Setting, ...]:
    # bfloat16 has the same tolerance for the loss and a wider one for the gradient.
    rows, loss, gradient = 128 * 74, Tolerance(1.3e-6, 1e-5), Tolerance(1e-3, 1e-5)
    inputs = RandomInputs((rows, 32320), "float16", 0.1, ignored=rows // 6)
    return (inputs.setting("test_label_smoothing_function_fp16", loss, gradient, ignore_index=0, reduction="sum"),)


def _transformer_engine() -> tuple[Setting, ...]:
    # The test draws 64 or 128 positions, 1 or 2 sequences and 64000 or 128000 classes. This is the strictest choice.
    tolerance = Tolerance(1.3e-6, 1e-5)
    inputs = RandomInputs((64, 64000), "float32", 0.1, scale=None)
    make = partial(inputs.setting, loss=tolerance, gradient=tolerance, compare=squared_with_reference)
    settings = (
        make("test_label_smoothing", reduction="mean"),
        make("test_z_loss_label_smoothing", reduction="none", z_loss=0.001),
    )
    return tuple(replace(each, case=replace(each.case, upstream=2 * reference(each.case).loss)) for each in settings)


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
        # gradcheck asks for each row of the Jacobian with its own incoming gradient.
        grad(case(10, "float64", options={"reduction": "none"}, upstream=np.eye(10)[0])),
        grad(case(10, "float64", options=ignoring)),
    )


def _keras() -> tuple[Setting, ...]:
    logits = np.array([[100.0, -100, -100]])
    case = Case("keras", "float32", logits, np.array([0]), options={"reduction": "mean"})
    # assert_almost_equal with three decimals allows 1.5 units of the last.
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
    # The test prints loss and gradient, and asserts nothing.
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
