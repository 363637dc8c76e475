"""The metrics of both packages, against sums without rounding.

What float32 itself rounds is allowed and no more: the sum, the count and their quotient, 2^-24 each. A metric that
adds up float32, or averages the averages of batches, fails that, which the tests show.
"""

import itertools
import math
import pathlib
import re
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchmetrics
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import lsce_jax
import lsce_jax.metrics
import lsce_torch
import lsce_torch.metrics

ULP = 2.0**-24
NAMES = ("MeanLoss", "MeanNLL", "Perplexity", "MeanEntropy", "Accuracy", "TopKAccuracy", "CalibrationError")
OPTIONS: dict[str, Any] = {"smoothing": 0.1, "z_loss": 1e-3, "ignore_index": -1}
NOTHING = slice(0, 0)
BATCHES = (slice(0, 1), slice(1, 500), NOTHING, slice(500, 997))


class Framework(NamedTuple):
    """What the tests need of one package."""

    loss: Any
    stats: Any
    metrics: Any
    array: Any


FRAMEWORKS = {
    "jax": Framework(
        lsce_jax.label_smoothed_cross_entropy_with_stats, lsce_jax.LossStats, lsce_jax.metrics, jnp.asarray
    ),
    "torch": Framework(
        lsce_torch.label_smoothed_cross_entropy_with_stats, lsce_torch.LossStats, lsce_torch.metrics, torch.as_tensor
    ),
}


@pytest.fixture(params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> Framework:
    return FRAMEWORKS[request.param]


class Rows(NamedTuple):
    """Logits and labels, a quarter of them ignored, and their statistics, as NumPy arrays."""

    logits: Any
    labels: Any
    stats: dict[str, Any]

    def __getitem__(self, rows: Any) -> "Rows":
        """Return some of the rows."""
        return Rows(self.logits[rows], self.labels[rows], {name: of[rows] for name, of in self.stats.items()})


@cache
def make_rows(framework: Framework, count: int = 997, seed: int = 0) -> Rows:
    """Return rows whose logits grow, so that no batch is like another and means of means show."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(count, 7)) * np.linspace(0.1, 12, count)[:, None]
    labels = np.where(random.random(count) < 0.25, -1, random.integers(7, size=count))
    return with_stats(framework, logits.astype(np.float32), labels.astype(np.int32))


def with_stats(framework: Framework, logits: Any, labels: Any) -> Rows:
    _, stats = framework.loss(framework.array(logits), framework.array(labels), **OPTIONS)
    return Rows(logits, labels, {name: np.asarray(values) for name, values in stats._asdict().items()})


def make(framework: Framework, name: str) -> Any:
    return getattr(framework.metrics, name)(*((3,) if name == "TopKAccuracy" else ()))


def feed(framework: Framework, metric: Any, rows: Rows, **options: Any) -> None:
    """Update a metric with a batch."""
    array = framework.array
    stats = framework.stats(**{name: array(values) for name, values in rows.stats.items()})
    extra = {"logits": array(rows.logits), "labels": array(rows.labels)} if hasattr(metric, "k") else {}
    metric.update(stats=stats, **extra, **options)


def exact(name: str, rows: Rows) -> float:
    """Return the metric of all rows, from the statistics of each, without rounding."""
    columns, valid = rows.stats, rows.stats["valid"]
    count = int(valid.sum())

    def total(values: Any) -> Fraction:
        return sum((Fraction(float(value)) for value in values[valid]), Fraction(0))

    if name == "MeanLoss":
        return float((total(columns["smoothed"]) + total(columns["z"])) / count)
    if name in {"MeanNLL", "Perplexity"}:
        mean = float(total(columns["nll"]) / count)
        return math.exp(mean) if name == "Perplexity" else mean
    if name == "MeanEntropy":
        return float(total(columns["entropy"]) / count)
    if name == "Accuracy":
        return int(columns["correct"].sum()) / count
    if name == "TopKAccuracy":
        # A stable sort: of equal logits the first is taken for the larger.
        order = np.argsort(-rows.logits, axis=-1, kind="stable")[:, :3]
        return int((order == rows.labels[:, None]).any(axis=-1)[valid].sum()) / count
    confidence, correct = columns["confidence"][valid], columns["correct"][valid]
    edges = np.arange(1, 15, dtype=np.float32) / np.float32(15)
    bins = np.searchsorted(edges, confidence)
    gaps = [
        abs(sum((Fraction(float(c)) for c in confidence[bins == b]), Fraction(0)) - int(correct[bins == b].sum()))
        for b in range(15)
    ]
    return float(sum(gaps) / count)


def bound(name: str, value: float) -> float:
    """Return what float32 may round: sum, count and quotient; and 15 differences, which are added up."""
    if name == "Perplexity":
        # exp turns what its argument is off by into a factor; its own error is an ulp or two.
        return value * (math.expm1(3 * ULP * math.log(value)) + 4 * ULP)
    return (18 if name == "CalibrationError" else 3) * ULP * value


@pytest.mark.parametrize("name", NAMES)
def test_ragged_batches_add_up(framework: Framework, name: str) -> None:
    rows, metric, means = make_rows(framework), make(framework, name), []
    for part in BATCHES:
        feed(framework, metric, rows[part])
        single = make(framework, name)
        feed(framework, single, rows[part])
        means.append(float(single.compute()))
    expected, found = exact(name, rows), float(metric.compute())
    assert abs(found - expected) <= bound(name, expected)
    assert not abs(np.nanmean(means) - expected) <= bound(name, expected), "means of means pass"
    metric.reset()
    feed(framework, metric, rows[NOTHING])
    assert math.isnan(metric.compute())


@pytest.mark.parametrize("name", NAMES)
def test_shards_merge_into_the_whole(framework: Framework, name: str) -> None:
    rows, whole = make_rows(framework, seed=1), make(framework, name)
    feed(framework, whole, rows)
    for order in itertools.permutations(BATCHES, 4):
        first, *others = (make(framework, name) for _ in order)
        for shard, part in zip((first, *others), order, strict=True):
            feed(framework, shard, rows[part])
        for other in others:
            first.merge_state(other)
        assert float(first.compute()) == float(whole.compute())


def test_float32_alone_would_not_do(framework: Framework) -> None:
    """A million losses of a little more than 1, and counts beyond what float32 can count."""
    metric = framework.metrics.MeanNLL()
    size, batches = 4096, 256
    values = np.full(size, 1.1, np.float32)
    for _ in range(batches):
        metric.update(stats=stats_of(framework, nll=values))
    assert float(metric.compute()) == float(values[0])
    naive = np.float32(0)
    for _ in range(batches):
        for value in values[:16]:
            naive += value
    assert naive / np.float32(16 * batches) != values[0]

    metric = framework.metrics.Accuracy()
    metric.correct, metric.count = (counted(framework, 2**24) for _ in range(2))
    metric.update(stats=stats_of(framework, correct=np.array([True, True, True]), nll=np.zeros(3, np.float32)))
    metric.update(stats=stats_of(framework, correct=np.array([False]), nll=np.zeros(1, np.float32)))
    total = np.asarray(metric.count[...], np.float64).sum(), np.asarray(metric.correct[...], np.float64).sum()
    assert total == (2**24 + 4, 2**24 + 3)


def counted(framework: Framework, count: int) -> Any:
    if framework.metrics is lsce_torch.metrics:
        return torch.tensor(count, dtype=torch.float64)
    return nnx.metrics.MetricState(jnp.array([count, 0], jnp.float32))


def stats_of(framework: Framework, **columns: Any) -> Any:
    size = len(next(iter(columns.values())))
    blank = {name: np.zeros(size, np.float32) for name in ("nll", "smoothed", "z", "lse", "confidence", "entropy")}
    blank |= {"prediction": np.zeros(size, np.int32), "correct": np.zeros(size, bool), "valid": np.ones(size, bool)}
    return framework.stats(**{name: framework.array(of) for name, of in {**blank, **columns}.items()})


@pytest.mark.parametrize("name", NAMES)
def test_both_packages_agree(name: str) -> None:
    values = []
    for framework in FRAMEWORKS.values():
        metric = make(framework, name)
        feed(framework, metric, make_rows(framework, seed=2))
        values.append(float(metric.compute()))
    # The statistics themselves differ: by what the parity tests allow, which for values around 1 is some ulps.
    assert values[0] == pytest.approx(values[1], rel=64 * ULP)


@pytest.mark.parametrize("name", NAMES)
def test_masks(framework: Framework, name: str) -> None:
    """Rows that are out, by the loss or by `mask`, do not show, whatever they hold."""
    rows = make_rows(framework)
    kept = rows.labels >= 0
    spoilt = np.where(kept[:, None], rows.logits, np.nan)
    clean, ignoring, masked, unmasked = (make(framework, name) for _ in range(4))
    feed(framework, clean, rows[kept])
    feed(framework, ignoring, with_stats(framework, spoilt, rows.labels))
    none_out = with_stats(framework, spoilt, np.where(kept, rows.labels, 0))
    feed(framework, masked, none_out, mask=framework.array(kept))
    feed(framework, unmasked, none_out)
    assert float(clean.compute()) == float(ignoring.compute()) == float(masked.compute())
    assert float(unmasked.compute()) != float(clean.compute())


def test_nan_and_bad_labels_show(framework: Framework) -> None:
    holds_nan = with_stats(framework, np.array([[0.0, np.nan], [0.0, 1.0]], np.float32), np.array([0, 1]))
    bad_label = with_stats(framework, np.array([[0.0, 1.0], [0.0, 1.0]], np.float32), np.array([5, 1]))
    for rows, is_known in ((holds_nan, False), (bad_label, True)):
        entropy = framework.metrics.MeanEntropy()
        feed(framework, entropy, rows)
        assert math.isfinite(entropy.compute()) == is_known
    for rows in (holds_nan, bad_label):
        for name in ("MeanLoss", "MeanNLL", "Perplexity"):
            metric = make(framework, name)
            feed(framework, metric, rows)
            assert math.isnan(metric.compute()), name
        for metric in (framework.metrics.Accuracy(), framework.metrics.TopKAccuracy(2)):
            feed(framework, metric, rows)
            assert float(metric.compute()) == 0.5
    calibration = framework.metrics.CalibrationError()
    feed(framework, calibration, holds_nan)
    assert math.isnan(calibration.compute())


def test_infinite_losses_stay_infinite(framework: Framework) -> None:
    metric = framework.metrics.MeanNLL()
    for _ in range(2):
        metric.update(stats=stats_of(framework, nll=np.array([1.0, np.inf, 2.0], np.float32)))
    assert float(metric.compute()) == math.inf


def test_top_k(framework: Framework) -> None:
    logits = np.array([[3, 2, 2, 1], [0, 0, 0, 0], [1, 2, 3, 4]], np.float32)
    for k, labels, expected in (
        (1, [0, 0, 3], 1.0),
        (1, [0, 1, 3], 2 / 3),  # of equal logits the first counts
        (2, [2, 1, 2], 2 / 3),
        (3, [2, 2, 0], 2 / 3),
        (4, [3, 3, 0], 1.0),
    ):
        metric = framework.metrics.TopKAccuracy(k)
        feed(framework, metric, with_stats(framework, logits, np.array(labels)))
        assert float(metric.compute()) == pytest.approx(expected, rel=2 * ULP)
    top_1, accuracy = framework.metrics.TopKAccuracy(1), framework.metrics.Accuracy()
    for metric in (top_1, accuracy):
        feed(framework, metric, make_rows(framework))
    assert float(top_1.compute()) == float(accuracy.compute())


def test_top_k_with_mask_axis_and_soft_labels(framework: Framework) -> None:
    logits = np.array([[9.0, 2.0, 1.0], [9.0, 1.0, 2.0]], np.float32)
    mask, labels = np.array([False, True, True]), np.array([1, 1])
    array = framework.array
    _, stats = framework.loss(array(logits), array(labels), class_mask=array(mask))
    metric = framework.metrics.TopKAccuracy(1)
    metric.update(stats=stats, logits=array(logits), labels=array(labels), class_mask=array(mask))
    assert float(metric.compute()) == 0.5
    metric = framework.metrics.TopKAccuracy(1)
    soft = np.array([[0.2, 0.7, 0.1], [0.3, 0.3, 0.4]], np.float32)
    _, stats = framework.loss(array(logits.T.copy()), array(soft.T.copy()), axis=0)
    metric.update(stats=stats, logits=array(logits.T.copy()), labels=array(soft.T.copy()), axis=0)
    assert float(metric.compute()) == 0.0
    metric = framework.metrics.TopKAccuracy(2)
    metric.update(stats=stats, logits=array(logits.T.copy()), labels=array(soft.T.copy()), axis=0)
    assert float(metric.compute()) == 1.0


def test_top_k_of_masked_and_infinite_logits(framework: Framework) -> None:
    """Neither is a masked class ahead of one whose logit is -inf, nor is it ever found."""
    array, mask = framework.array, np.array([False, True, True])
    for labels, expected in (
        (np.array([2]), 1.0),
        (np.array([[0.8, 0.1, 0.1]], np.float32), 0.0),
    ):
        logits = array(np.array([[0.0, 1.0, -np.inf]], np.float32))
        _, stats = framework.loss(logits, array(labels), class_mask=array(mask), smoothing=0.0)
        metric = framework.metrics.TopKAccuracy(2)
        metric.update(stats=stats, logits=logits, labels=array(labels), class_mask=array(mask))
        assert float(metric.compute()) == expected


def test_bins_include_their_upper_edge(framework: Framework) -> None:
    """1/2 of two bins is in the lower one: with the surely wrong row in the upper, nothing evens out."""
    metric = framework.metrics.CalibrationError(2)
    metric.update(
        stats=stats_of(framework, confidence=np.array([0.5, 1.0], np.float32), correct=np.array([True, False]))
    )
    assert float(metric.compute()) == 0.75


def test_class_weights_with_their_denominator(framework: Framework) -> None:
    rows, weight = make_rows(framework), np.linspace(0.5, 2, 7).astype(np.float32)
    array, options = framework.array, {**OPTIONS, "class_weight": framework.array(weight), "reduction": "mean"}
    loss, stats = framework.loss(array(rows.logits), array(rows.labels), **options)
    right, wrong = framework.metrics.MeanLoss(), framework.metrics.MeanLoss()
    for part in BATCHES:
        labels, of_part = rows.labels[part], framework.stats(*(values[part] for values in stats))
        right.update(stats=of_part, denominator=float(weight[labels[labels >= 0]].sum(dtype=np.float64)))
        wrong.update(stats=of_part)
    # The loss itself is a quotient of two float32 sums, which some 30 additions one after the other can be off by.
    assert float(right.compute()) == pytest.approx(float(loss), rel=64 * ULP)
    assert float(wrong.compute()) != pytest.approx(float(loss), rel=64 * ULP)


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("stats must be the LossStats", lambda f, stats: f.metrics.Accuracy().update(stats=stats.nll)),
        ("mask must be boolean", lambda f, stats: f.metrics.Accuracy().update(stats=stats, mask=stats.nll)),
        (
            "mask must broadcast",
            lambda f, stats: f.metrics.Accuracy().update(stats=stats, mask=f.array(np.ones(3, bool))),
        ),
        ("k must be an integer", lambda f, stats: f.metrics.TopKAccuracy(0)),
        ("num_bins must be an integer", lambda f, stats: f.metrics.CalibrationError(0.5)),
        (
            "denominator must be a single number, got shape",
            lambda f, stats: f.metrics.MeanLoss().update(stats=stats, denominator=f.array(np.ones(1, np.float32))),
        ),
        ("denominator must be a finite number >= 0", lambda f, s: f.metrics.MeanLoss().update(stats=s, denominator=-1)),
        (
            "denominator must be a finite number >= 0",
            lambda f, s: f.metrics.MeanLoss().update(stats=s, denominator="x"),
        ),
        (
            "k=4 needs logits of at least 4",
            lambda f, stats: f.metrics.TopKAccuracy(4).update(
                stats=stats, logits=f.array(np.zeros((2, 3), np.float32)), labels=f.array(np.zeros(2, int))
            ),
        ),
        (
            "of the same batch: expected",
            lambda f, stats: f.metrics.TopKAccuracy(1).update(
                stats=stats, logits=f.array(np.zeros(3, np.float32)), labels=f.array(np.array(0))
            ),
        ),
    ],
)
def test_errors(framework: Framework, words: str, call: Any) -> None:
    _, stats = framework.loss(framework.array(np.zeros((2, 3), np.float32)), framework.array(np.zeros(2, int)))
    with pytest.raises((TypeError, ValueError), match=words):
        call(framework, stats)


@pytest.mark.parametrize("heading", ["In Flax", "In PyTorch"])
def test_the_last_sections_of_the_page_run_after_either_setup(heading: str) -> None:
    page = (pathlib.Path(__file__).parents[1] / "docs/metrics.md").read_text(encoding="utf-8")
    setup = re.findall(r"```python\n(.*?)```", page.partition(f"\n## {heading}\n")[2], re.DOTALL)[0]
    blocks = re.findall(r"```python\n(.*?)```", page.partition("\n## Which rows count\n")[2], re.DOTALL)
    assert len(blocks) == 4
    namespace: dict[str, Any] = {}
    for block in (setup, *blocks):
        exec(block, namespace)


# --- JAX -----------------------------------------------------------------------------------------------------------


def test_calibration_of_more_rows_than_are_added_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(FRAMEWORKS["jax"])
    values = []
    for at_once in (2**20, 400):
        monkeypatch.setattr(lsce_jax.metrics, "_MAX_ROWS", at_once)
        metric = lsce_jax.metrics.CalibrationError()
        feed(FRAMEWORKS["jax"], metric, rows)
        values.append(float(metric.compute()))
    assert values[0] == values[1]


def test_merging_another_kind_is_an_error() -> None:
    metrics = lsce_jax.metrics
    for one, other in (
        (metrics.Accuracy(), metrics.MeanNLL()),
        (metrics.TopKAccuracy(1), metrics.TopKAccuracy(2)),
        (metrics.CalibrationError(10), metrics.CalibrationError(15)),
    ):
        with pytest.raises(TypeError, match="same kind and options"):
            one.merge_state(other)


def all_metrics() -> nnx.MultiMetric:
    return nnx.MultiMetric(**{name: make(FRAMEWORKS["jax"], name) for name in NAMES})


@nnx.jit
def update_all(metrics: nnx.MultiMetric, logits: Any, labels: Any) -> None:
    _, stats = lsce_jax.label_smoothed_cross_entropy_with_stats(logits, labels, **OPTIONS)
    metrics.update(stats=stats, logits=logits, labels=labels)


@pytest.mark.parametrize(("axis_type", "spec"), [
    (jax.sharding.AxisType.Auto, PartitionSpec("data")),
    (jax.sharding.AxisType.Explicit, PartitionSpec(None, "data")),
    pytest.param(jax.sharding.AxisType.Auto, PartitionSpec(None, "data"), marks=pytest.mark.slow),
    pytest.param(jax.sharding.AxisType.Explicit, PartitionSpec("data"), marks=pytest.mark.slow),
])  # fmt: skip
def test_compiled_and_sharded(axis_type: Any, spec: PartitionSpec) -> None:
    """Within `nnx.jit` in one `MultiMetric`, the rows or the classes divided over two devices."""
    rows, metrics = make_rows(FRAMEWORKS["jax"], 512), all_metrics()
    logits, labels = np.pad(rows.logits, ((0, 0), (0, 1)), constant_values=-50), rows.labels
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
    logits = jax.device_put(logits, NamedSharding(mesh, spec))
    labels = jax.device_put(labels, NamedSharding(mesh, PartitionSpec(*spec[:1])))
    for _ in range(2):
        update_all(metrics, logits, labels)
    padded = with_stats(FRAMEWORKS["jax"], np.asarray(logits), np.asarray(labels))
    for name, value in metrics.compute().items():
        # Compiled otherwise, the statistics differ by roundings of their own.
        assert float(value) == pytest.approx(exact(name, padded), rel=64 * ULP), name


def test_statistics_out_of_shard_map() -> None:
    rows, metric = make_rows(FRAMEWORKS["jax"], 512), lsce_jax.metrics.MeanLoss()
    mesh, spec = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), PartitionSpec("data")

    def on_device(logits: Any, labels: Any) -> Any:
        return lsce_jax.label_smoothed_cross_entropy_with_stats(logits, labels, **OPTIONS)[1]

    step = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=(spec, spec), out_specs=spec))
    metric.update(stats=step(rows.logits, rows.labels))
    assert float(metric.compute()) == pytest.approx(exact("MeanLoss", rows), rel=64 * ULP)


def test_denominators_of_any_kind() -> None:
    """A number is exact in two parts, as is an integer; and what depends on the parameters carries no derivative."""
    stats = stats_of(FRAMEWORKS["jax"], smoothed=np.ones(1, np.float32))
    for denominator in (2**24 + 1, jnp.int32(2**24 + 1), 16777217.0):
        metric = lsce_jax.metrics.MeanLoss()
        metric.update(stats=stats, denominator=denominator)
        assert np.asarray(metric.denominator[...], np.float64).sum() == 2**24 + 1

    def loss(scale: Any) -> Any:
        metric = lsce_jax.metrics.MeanLoss()
        metric.update(stats=stats, denominator=scale)
        return metric.compute() + scale

    assert jax.grad(loss)(2.0) == 1.0


# --- torch ---------------------------------------------------------------------------------------------------------


def test_collection_keeps_apart_what_started_alike() -> None:
    """A collection shares the state of metrics whose names and first values agree; smoothing may well start at 0."""
    metrics = lsce_torch.metrics
    collection = torchmetrics.MetricCollection(
        {
            "loss": metrics.MeanLoss(),
            "nll": metrics.MeanNLL(),
            "perplexity": metrics.Perplexity(),
            "accuracy": metrics.Accuracy(),
            "top2": metrics.TopKAccuracy(2),
            "top3": metrics.TopKAccuracy(3),
            "top3_again": metrics.TopKAccuracy(3),
        }
    )
    logits, labels = torch.eye(5), torch.arange(5)
    for smoothing, shift in ((0.0, 0), (0.5, 1)):
        given = {"logits": logits, "labels": (labels + shift) % 5}
        _, stats = lsce_torch.label_smoothed_cross_entropy_with_stats(*given.values(), smoothing=smoothing)
        collection.update(stats=stats, **given)
    values = {name: float(value) for name, value in collection.compute().items()}
    assert values["loss"] != values["nll"]
    assert (values["accuracy"], values["top2"], values["top3"]) == pytest.approx((0.5, 0.7, 0.8), rel=ULP)
    assert values["perplexity"] == pytest.approx(math.exp(values["nll"]), rel=4 * ULP)


def test_against_torchmetrics() -> None:
    """The metrics that torchmetrics has too, from softmax and float32 sums of its own."""
    rows = make_rows(FRAMEWORKS["torch"])
    kept = rows.labels >= 0
    logits, labels = torch.from_numpy(rows.logits[kept]), torch.from_numpy(rows.labels[kept]).long()
    classification = torchmetrics.classification
    for name, other in (
        ("Accuracy", classification.MulticlassAccuracy(7, average="micro")),
        ("TopKAccuracy", classification.MulticlassAccuracy(7, average="micro", top_k=3)),
        ("CalibrationError", classification.MulticlassCalibrationError(7, n_bins=15, norm="l1")),
    ):
        metric = make(FRAMEWORKS["torch"], name)
        feed(FRAMEWORKS["torch"], metric, rows)
        given = logits if "Calibration" not in name else torch.softmax(logits, dim=-1)
        # Some 700 numbers are added up in float32 there.
        assert float(metric.compute()) == pytest.approx(float(other(given, labels)), rel=700 * ULP)


def test_forward_returns_the_batch_and_keeps_the_sum() -> None:
    metric = lsce_torch.metrics.Accuracy()
    _, stats = lsce_torch.label_smoothed_cross_entropy_with_stats(torch.eye(2), torch.tensor([0, 1]))
    assert float(metric(stats=stats)) == 1.0
    _, stats = lsce_torch.label_smoothed_cross_entropy_with_stats(torch.eye(2), torch.tensor([1, 0]))
    assert float(metric(stats=stats)) == 0.0
    assert float(metric.compute()) == 0.5


def test_sums_stay_float64() -> None:
    """A model that is cast to bfloat16 takes its metrics along."""
    model = torch.nn.Module()
    model.metric = lsce_torch.metrics.Accuracy()
    _, stats = lsce_torch.label_smoothed_cross_entropy_with_stats(torch.eye(2), torch.tensor([0, 1]))
    model.metric.count += 2**20 + 1
    for move in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu")):
        move(model)
        assert (model.metric.count.dtype, model.metric.count.item()) == (torch.float64, 2**20 + 1)
    model.metric.update(stats=stats)
    model.metric.reset()
    model.metric.update(stats=stats)
    assert (model.metric.count.dtype, model.metric.count.item()) == (torch.float64, 2)
    model.to("meta")
    assert model.metric.count.device.type == "meta"


def test_no_graph_is_kept() -> None:
    logits = torch.eye(3, requires_grad=True)
    _, stats = lsce_torch.label_smoothed_cross_entropy_with_stats(logits, torch.tensor([0, 1, 2]))
    metric = lsce_torch.metrics.MeanLoss()
    metric.update(stats=stats, denominator=logits.sum())
    assert not metric.loss.requires_grad
    assert not metric.denominator.requires_grad
