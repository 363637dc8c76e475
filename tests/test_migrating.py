"""docs/migrating.md: what each origin computes is what the options in the page's table compute, in both packages.

The options are read from the page. The originals run where they install (torch, timm, Optax, Keras); of the others the
published formula is written out in torch, whose autograd gives the gradient. All in float64: ours and the original are
each within their bound of the true value, and within both of each other.
"""

import inspect
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import pytest
import timm.data
import timm.loss
import torch
import torch.nn.functional as F

import lsce_jax
import lsce_torch
from lsce_spec import Convention
from parity_tests.losses.adapters import Adapter, JaxAdapter, TorchAdapter
from parity_tests.losses.peers import PeerAdapter, keras_categorical
from parity_tests.suite.drop_in import TORCH, PeerSetting, apart, verdict
from parity_tests.suite.peer_bounds import log_softmax, peer_bound
from parity_tests.truth.bounds import Bound, error_bound
from parity_tests.truth.cases import Case, soft_labels
from parity_tests.truth.comparison import Result
from parity_tests.truth.oracle import Truth, solve
from parity_tests.truth.precision import FORMATS

PAGE = Path(__file__).parents[1] / "docs" / "migrating.md"
OURS = {"jax": JaxAdapter(), "torch": TorchAdapter()}
FIELDS = ("smoothing", "axis", "where", "class_weight", "class_mask", "prior")

pytestmark = pytest.mark.usefixtures("one_thread")

# What the table's names stand for, beside those that depend on the data.
LEAKY = Convention("leaky", on=lambda e, k: 1 - e, off=lambda e, k: e / k)
NAMES = {"e": 0.1, "z": 1e-3, "leaky": LEAKY, "factor": 7.5}


# --- The originals ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Original:
    """A loss as its library has it, and the data to try it on.

    Args:
        name: the page's table has it.
        loss: called with logits, labels and the names of the table.
        shape: of the logits.
        axis: of the classes.
        ignored: label of every fifth row or so.
        labels: "indices", "soft" or "mixed" (by mixup).
        framework: what `loss` is written in; "keras-jax" and "keras-torch" have an adapter instead.
        reduction: in place of the table's.
    """

    name: str
    loss: Callable[[Any, Any, SimpleNamespace], Any]
    shape: tuple[int, ...]
    axis: int = -1
    ignored: int | None = None
    labels: str = "indices"
    framework: str = "torch"
    reduction: str | None = None

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {self.framework}"


ORIGINALS: list[Original] = []


def original(name: str, *shapes: tuple[int, ...], **data: Any) -> Callable[[Any], Any]:
    """Register a function as what the library computes."""

    def register(loss: Any) -> Any:
        ORIGINALS.extend(Original(name, loss, shape, **data) for shape in shapes)
        return loss

    return register


def log_p(logits: Any, dim: int = -1) -> Any:
    return logits.log_softmax(dim)


def one_hot(labels: Any, num_classes: int, on: float = 1.0, off: float = 0.0) -> Any:
    values = torch.tensor([off, on], dtype=torch.float64)
    return values[(labels[..., None] == torch.arange(num_classes)).long()]


@original("torch CrossEntropyLoss", (7, 5), (2, 6, 3, 2), axis=1, ignored=-100)
@original("torch CrossEntropyLoss, soft labels", (7, 5), (3, 4, 5), axis=1, labels="soft")
def cross_entropy(logits, labels, it):
    return F.cross_entropy(logits, labels, torch.from_numpy(it.w), label_smoothing=it.e)


@original("torch KLDivLoss", (7, 5))
def kl_div(logits, labels, it):
    target = one_hot(labels, it.K, 1 - it.e + it.e / it.K, it.e / it.K)
    return F.kl_div(log_p(logits), target, reduction="batchmean")


@original("timm LabelSmoothingCrossEntropy", (7, 5), (6, 2))
def timm_smoothing(logits, labels, it):
    return timm.loss.LabelSmoothingCrossEntropy(it.e)(logits, labels)


@original("timm SoftTargetCrossEntropy", (7, 5), labels="soft")
def timm_soft(logits, labels, it):
    return timm.loss.SoftTargetCrossEntropy()(logits, labels)


@original("timm Mixup", (6, 5), labels="mixed")
def timm_mixup(logits, labels, it):
    torch.set_default_dtype(torch.float64)  # of the targets that timm makes
    try:
        targets = timm.data.mixup.mixup_target(torch.from_numpy(it.indices), it.K, it.lam, it.e)
    finally:
        torch.set_default_dtype(torch.float32)
    return timm.loss.SoftTargetCrossEntropy()(logits, targets)


@original("Hugging Face LabelSmoother", (3, 4, 11), ignored=-100)
def label_smoother(logits, labels, it):
    """huggingface/transformers, src/transformers/trainer_pt_utils.py."""
    ignored = labels == -100
    nll = -log_p(logits).gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(ignored, 0)
    smoothed = -log_p(logits).sum(-1).masked_fill(ignored, 0)
    active = (~ignored).sum()
    return (1 - it.e) * nll.sum() / active + it.e * smoothed.sum() / (active * it.K)


@original("Keras CategoricalCrossentropy", (7, 5), framework="keras-jax")
@original("Keras CategoricalCrossentropy", (7, 5), framework="keras-torch", reduction="sum")  # its mean is float32
def keras(logits, labels, it):
    raise AssertionError("has an adapter")


@original("Optax smooth_labels", (7, 5), (2, 3, 4), framework="jax")
def optax_smooth_labels(logits, labels, it):
    targets = optax.smooth_labels(jax.nn.one_hot(labels, it.K, dtype=logits.dtype), it.e)
    return optax.softmax_cross_entropy(logits, targets)


@original("Paddle label_smooth", (7, 5))
def paddle(logits, labels, it):
    """PaddlePaddle/Paddle, paddle/phi/kernels/cpu/label_smooth_kernel.cc, and cross_entropy(soft_label=True)."""
    target = (1 - it.e) * one_hot(labels, it.K) + it.e * torch.from_numpy(it.prior)
    return -(target * log_p(logits)).sum(-1).mean()


@original("fairseq", (3, 4, 11), (6, 3), ignored=1)
def fairseq(logits, labels, it):
    """facebookresearch/fairseq, fairseq/criterions/label_smoothed_cross_entropy.py."""
    nll, smooth = fairseq_sums(logits, labels, it)
    eps_i = it.e / (it.K - 1)
    return (1 - it.e - eps_i) * nll + eps_i * smooth


@original("fairseq, older", (3, 4, 11), ignored=1)
def older_fairseq(logits, labels, it):
    nll, smooth = fairseq_sums(logits, labels, it)
    return (1 - it.e) * nll + it.e / it.K * smooth


def fairseq_sums(logits, labels, it):
    padding = labels == it.pad
    nll = -log_p(logits).gather(-1, labels[..., None])[..., 0]
    return nll.masked_fill(padding, 0).sum(), -log_p(logits).sum(-1).masked_fill(padding, 0).sum()


@original("Megatron-LM", (4, 2, 11))
def megatron(logits, labels, it):
    """NVIDIA/Megatron-LM, megatron/core/tensor_parallel/cross_entropy.py, on one rank."""
    p = logits.softmax(-1)
    nll = -log_p(logits).gather(-1, labels[..., None])[..., 0]
    smoothing = it.e * it.K / (it.K - 1)
    return (1 - smoothing) * nll - smoothing * p.log().mean(-1)


@original("tensor2tensor", (3, 4, 11), ignored=0)
def tensor2tensor(logits, labels, it):
    """tensorflow/tensor2tensor, tensor2tensor/layers/common_layers.py: numerator / denominator."""
    weights = (labels != 0).double()
    return (kl_rows(logits, labels, it) * weights).sum() / weights.sum()


@original("Flax wmt and lm1b", (3, 4, 11), ignored=0)
def flax_wmt(logits, labels, it):
    """google/flax, examples/wmt/train.py: loss / weight_sum."""
    weights = torch.from_numpy(it.weights)
    return (kl_rows(logits, labels, it) * weights).sum() / weights.sum()


def kl_rows(logits, labels, it):
    confidence, low = 1 - it.e, it.e / (it.K - 1)
    normalizing = -(confidence * np.log(confidence) + (it.K - 1) * low * np.log(low + 1e-20))
    return -(one_hot(labels, it.K, confidence, low) * log_p(logits)).sum(-1) - normalizing


@original("T5X", (3, 4, 11), ignored=0)
def t5x(logits, labels, it):
    """google-research/t5x, t5x/losses.py."""
    total = kl_rows(logits, labels, it) + it.z * logits.logsumexp(-1) ** 2
    return (total * torch.from_numpy(it.weights) / it.factor).sum()


@original("MaxText", (3, 4, 11), ignored=0)
def maxtext(logits, labels, it):
    """AI-Hypercomputer/maxtext, src/maxtext/utils/max_utils.py and the loss_fn of its trainer."""
    xent = -(one_hot(labels, it.K) * log_p(logits)).sum(-1) + it.z * logits.logsumexp(-1) ** 2
    real = torch.from_numpy(it.segmentation) != 0
    return (xent * real).sum() / real.sum()


@original("Annotated Transformer", (9, 6), (12, 11), ignored=2)
def annotated_transformer(logits, labels, it):
    """harvardnlp/annotated-transformer, the_annotated_transformer.py."""
    target = one_hot(labels, it.K, 1 - it.e, it.e / (it.K - 2))
    target[:, it.pad] = 0
    target[labels == it.pad] = 0
    return torch.nn.KLDivLoss(reduction="sum")(log_p(logits), target)


@original("CoinCheung/pytorch-loss", (7, 5), (2, 6, 3, 2), axis=1, ignored=-100)
def coin_cheung(logits, labels, it):
    """CoinCheung/pytorch-loss, pytorch_loss/label_smooth.py."""
    ignored = labels == -100
    target = one_hot(labels.masked_fill(ignored, 0), it.K, 1 - it.e, it.e / it.K).movedim(-1, 1)
    return -(target * log_p(logits, 1)).sum(1).masked_fill(ignored, 0).sum() / (~ignored).sum()


@original("CELossWithLabelSmoothing", (7, 5))
def clamped(logits, labels, it):
    target = one_hot(labels, it.K).clamp(it.e / (it.K - 1), 1 - it.e)
    return -(target * log_p(logits)).sum(-1).mean()


@original("MaxSup", (7, 5))
def max_sup(logits, labels, it):
    """ZhouYuxuanYX/Maximum-Suppression-Regularization, Conv/ffcv/losses.py."""
    penalty = it.e * (logits.max(1, keepdim=True)[0] - logits.mean(1, keepdim=True))
    return F.cross_entropy(logits, labels) + penalty.mean()


# --- The page's table, data, and how large errors can be -------------------------------------------------------------


def page_table() -> dict[str, str]:
    """Return the options of each origin as the page writes them."""
    rows = re.findall(r"^\| \[([^\]]+)\]\(#[\w-]+\) \|.*\| `([^`]+)` \|$", PAGE.read_text(encoding="utf-8"), re.M)
    assert len(dict(rows)) == len(rows)
    return dict(rows)


@cache
def data(which: Original) -> tuple[SimpleNamespace, np.ndarray, np.ndarray]:
    """Return the table's names, logits and labels."""
    generator = np.random.default_rng(zlib.crc32(str(which).encode()))
    num_classes = which.shape[which.axis]
    batch_shape = np.moveaxis(np.empty(which.shape), which.axis, -1).shape[:-1]
    logits = generator.normal(size=which.shape) * 2
    logits[0] += 100
    indices = np.asarray(generator.integers(num_classes, size=batch_shape))
    if which.ignored is not None:
        indices.ravel()[1::5] = which.ignored
    lam, hard = 0.7, np.eye(num_classes)[np.where(indices < 0, 0, indices)]
    soft = soft_labels("float64", generator, (*batch_shape, num_classes))
    labels = {
        "indices": indices,
        "soft": np.moveaxis(soft, -1, which.axis),
        "mixed": lam * hard + (1 - lam) * np.flip(hard, 0),
    }[which.labels]
    # A prior for Paddle, and for the Annotated Transformer 0 at the padding and alike elsewhere.
    counts = generator.integers(1, 50, num_classes).astype(float)
    not_pad = (np.arange(num_classes) != which.ignored) / (num_classes - 1)
    it = SimpleNamespace(
        **NAMES,
        K=num_classes,
        pad=which.ignored,
        w=generator.uniform(0.25, 4, num_classes),
        prior=counts / counts.sum(),
        not_pad=not_pad,
        weights=(indices != which.ignored).astype(float),
        segmentation=(indices != which.ignored).astype(int),
        indices=indices,
        lam=lam,
    )
    return it, logits, labels


@cache
def setting(which: Original) -> PeerSetting:
    """Return the case that the page's options make of the data, what is true of it, and both bounds."""
    it, logits, labels = data(which)
    options: dict[str, Any] = eval(f"dict({page_table()[which.name]})", vars(it) | {"torch": torch})
    assert options.pop("axis", -1) == which.axis
    options = {"reduction": "none"} | options | ({} if which.reduction is None else {"reduction": which.reduction})
    fields = {name: options.pop(name) for name in FIELDS if name in options}
    case = Case(str(which), "float64", logits, labels, options, axis=which.axis, **fields)
    return bounded(case)


def bounded(case: Case) -> PeerSetting:
    truth = solve(case)
    return PeerSetting(case, truth, error_bound(case, truth, TORCH), bound_of_original(case, truth))


def bound_of_original(case: Case, truth: Truth) -> Bound:
    """Return `peer_bound` and what it does not know of, to first order.

    Megatron-LM takes the log of a probability, which is off by c_e + h + 2 roundings more, and so c_l u |log p|.
    The entropy has q off by 3 u, the error of log q, its products and sums; with KLDivLoss all its terms and those of
    the cross-entropy are in one sum over rows and classes. z lse^2 has the error of lse twice and 4 roundings, its
    gradient that of lse, of p and 10 roundings. MaxSup adds up logits, which are not small.
    """
    u, rows = FORMATS["float64"].roundoff, case.rows()
    plain, log_of_p = peer_bound(case, truth, TORCH), log_softmax(case, truth, TORCH)
    depth, total_depth = TORCH.depth(case.num_classes), TORCH.depth(rows.logits.size)
    wq = truth.target_size * (1.0 if case.class_weight is None else case.class_weight)
    row = u * np.sum(wq * (TORCH.log1p * log_of_p.size + TORCH.exp + depth + 2), axis=-1)
    gradient = np.zeros_like(plain.gradient)
    if case.options.get("subtract_entropy"):
        q = truth.target
        log_q = np.log(np.where(q > 0, q, 1.0))
        entropy, products = np.sum(np.abs(q * log_q), axis=-1), np.sum(wq * log_of_p.size, axis=-1)
        row += u * ((TORCH.log1p + 2) * entropy + 3 * np.sum(q * np.abs(log_q + 1), axis=-1))
        row += u * (total_depth + 2) * (entropy + products)
    if z_loss := case.options.get("z_loss"):
        lse = np.where(truth.counted, np.logaddexp.reduce(rows.logits, axis=-1), 0.0)
        of_lse = np.min(log_of_p.error, axis=-1) + u * np.abs(lse)
        row += z_loss * (2 * np.abs(lse) * of_lse + 4 * u * lse**2)
        of_p = log_of_p.error + u * (TORCH.exp + depth + 10)
        gradient = 2 * z_loss * truth.probabilities * (of_lse[:, None] + np.abs(lse)[:, None] * of_p)
    if case.options.get("convention") == "max_sup":
        row += u * case.smoothing * (depth + 4) * (np.max(np.abs(rows.logits), -1) + np.mean(np.abs(rows.logits), -1))
    factor = np.abs(truth.factor)
    extra = row if case.options["reduction"] == "none" else np.asarray(np.max(factor) * np.sum(row))
    return Bound(plain.loss + extra, plain.gradient + factor[:, None] * gradient)


@cache
def adapter(framework: str) -> Adapter:
    return keras_categorical(framework.removeprefix("keras-"))


@cache
def run_original(which: Original) -> Result:
    it, case = data(which)[0], setting(which).case

    def loss(logits: Any, labels: Any, **options: Any) -> Any:
        return which.loss(logits, labels, it)

    if which.framework.startswith("keras"):
        return adapter(which.framework)(case)
    return (TorchAdapter(loss) if which.framework == "torch" else PeerAdapter(JaxAdapter(loss)))(case)


each_original = pytest.mark.parametrize("which", ORIGINALS, ids=str)
each_package = pytest.mark.parametrize("package", OURS)


# --- Tests -----------------------------------------------------------------------------------------------------------


def test_every_row_of_the_table_is_tested() -> None:
    assert set(page_table()) == {which.name for which in ORIGINALS}


def test_links_of_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    sections = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.+)$", page, re.M)
    }
    links = set(re.findall(r"\]\(#([\w-]+)\)", page))
    assert links <= sections


@each_package
@each_original
def test_migration(which: Original, package: str) -> None:
    """Ours with the options of the page, the original, and the truth."""
    given = setting(which)
    shares = verdict(given, OURS[package](given.case), run_original(which))
    assert max(share for pair in shares.values() for share in pair) <= 1, shares


@each_original
def test_wrong_migrations_are_rejected(which: Original) -> None:
    """By the bounds, which do not depend on the package: so one package is enough here."""
    given, theirs = setting(which), run_original(which)
    for name, case, parts in wrong(given.case):
        shares = apart(given, OURS["torch"](case), theirs)
        assert all(getattr(shares, part) > 1 for part in parts), (name, shares)


def wrong(case: Case) -> Iterator[tuple[str, Case, tuple[str, ...]]]:
    """Return wrong migrations, and which parts of the result show it."""
    options, both = case.options, ("loss", "gradient")
    yield "smoothing", replace(case, smoothing=case.smoothing + 1e-10), both
    if case.smoothing:
        other = "non_target" if options.get("convention", "uniform") == "uniform" else "uniform"
        swapped = options | {"convention": other, "subtract_entropy": False}
        yield other, replace(case, prior=None, options=swapped), both
    if options["reduction"] != "none":
        other = {"mean": "sum", "sum": "mean"}[options["reduction"]]
        yield other, replace(case, options=options | {"reduction": other, "denominator": None}), both
    for option, parts in (("subtract_entropy", ("loss",)), ("z_loss", both), ("ignore_index", both)):
        if options.get(option) is not None:
            without = {name: value for name, value in options.items() if name != option}
            yield option, replace(case, options=without), parts
    for array in ("where", "class_weight"):
        if getattr(case, array) is not None:
            yield array, replace(case, **{array: None}), both


# --- What the page says besides --------------------------------------------------------------------------------------


def test_padding_of_the_annotated_transformer_is_in_its_softmax() -> None:
    """`class_mask` takes it out: another loss, and the same once the model gives padding no probability."""
    which = next(each for each in ORIGINALS if each.name == "Annotated Transformer")
    it, logits, labels = data(which)
    theirs = annotated_transformer(torch.from_numpy(logits), torch.from_numpy(labels), it)
    masked = {"convention": "non_target", "subtract_entropy": True, "ignore_index": it.pad, "reduction": "sum"}
    mask = torch.arange(it.K) != it.pad

    def ours(logits: np.ndarray) -> torch.Tensor:
        return lsce_torch.label_smoothed_cross_entropy(
            torch.from_numpy(logits), torch.from_numpy(labels), smoothing=it.e, class_mask=mask, **masked
        )

    assert ours(logits) < theirs - 0.1
    unlikely = logits.copy()
    unlikely[:, it.pad] -= 1000
    theirs = annotated_transformer(torch.from_numpy(unlikely), torch.from_numpy(labels), it)
    case = Case("masked", "float64", unlikely, labels, masked, it.e, class_mask=mask.numpy())
    given = bounded(case)
    assert abs(ours(unlikely) - theirs) <= given.ours.loss + given.peer.loss


def test_megatron_on_two_ranks_and_at_a_gap_of_104() -> None:
    which = next(each for each in ORIGINALS if each.name == "Megatron-LM")
    it, logits, labels = data(which)
    p, local = torch.from_numpy(logits).softmax(-1), slice(0, 6)  # the first of two shards
    nll = -p.log().gather(-1, torch.from_numpy(labels)[..., None])[..., 0]
    smoothing = it.e * 6 / 5
    sharded = (1 - smoothing) * nll - smoothing * p[..., local].log().mean(-1)
    whole = lsce_torch.label_smoothed_cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(labels), convention="non_target", reduction="none"
    )
    assert (sharded - whole).abs().min() > 1e-4

    far = torch.tensor([[104.0, 0.0, 0.0]])
    assert megatron(far, torch.tensor([0]), SimpleNamespace(e=0.1, K=3)) == torch.inf
    ours = lsce_torch.label_smoothed_cross_entropy(far, torch.tensor([0]), convention="non_target", reduction="none")
    assert abs(ours - 10.4) <= 2.0**-24 * 10.4 * 8  # lse = 104, and a few roundings


@pytest.mark.parametrize("loss", [cross_entropy, label_smoother, coin_cheung])
def test_all_rows_ignored(loss: Any) -> None:
    """NaN there, 0 here."""
    logits, labels = torch.zeros(3, 5, dtype=torch.float64), torch.full((3,), -100)
    assert loss(logits, labels, SimpleNamespace(e=0.1, K=5, w=np.ones(5))).isnan()
    assert lsce_torch.label_smoothed_cross_entropy(logits, labels, ignore_index=-100) == 0
    arrays = np.zeros((3, 5), np.float32), np.full(3, -100)
    assert lsce_jax.label_smoothed_cross_entropy(*arrays, ignore_index=-100, reduction="mean") == 0


@pytest.mark.slow
def test_keras_block_of_the_page() -> None:
    """In a process of its own, since Keras fixes its backend for the process that imports it."""
    blocks = re.findall(r"^```py\n(.+?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 1
    run = subprocess.run([sys.executable, "-c", blocks[0]], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_mixup_smooths_by_default() -> None:
    assert inspect.signature(timm.data.Mixup).parameters["label_smoothing"].default == 0.1


def test_labels_that_are_no_class_in_optax() -> None:
    logits = np.arange(5, dtype=np.float32)[None]
    loss = optax.softmax_cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(np.array([7]), 5), 0.1))
    of_uniform = optax.softmax_cross_entropy(logits, np.full((1, 5), 0.1 / 5, np.float32))
    assert loss == of_uniform
    assert np.isnan(lsce_jax.label_smoothed_cross_entropy(logits, np.array([7]))).all()


def test_kl_div_mean_divides_by_classes_too() -> None:
    log_of_p, target = torch.zeros(4, 8).log_softmax(-1), torch.full((4, 8), 0.25)
    with pytest.warns(UserWarning, match="both the batch size and the support size"):
        mean = F.kl_div(log_of_p, target, reduction="mean")
    assert torch.equal(mean * 8, F.kl_div(log_of_p, target, reduction="batchmean"))  # both divide by powers of two


# Those that make their targets of labels, by a convention alone.
BY_CONVENTION = {
    which.name: which
    for which in ORIGINALS
    if which.labels == "indices" and which.framework == "torch" and which.name not in {"Paddle label_smooth", "MaxText"}
}
del BY_CONVENTION["Annotated Transformer"]  # a prior, in effect


@pytest.mark.parametrize("name", BY_CONVENTION)
def test_tools_find_the_row_of_the_table(name: str) -> None:
    """`identify_loss`, from the original's losses of one row at a time, says what the table says."""
    which = BY_CONVENTION[name]
    generator, num_classes = np.random.default_rng(0), 7
    logits, labels = generator.normal(size=(10, num_classes)), np.arange(10) % 5 + 2
    it = SimpleNamespace(e=0.1, K=num_classes, z=1e-3, factor=1.0, pad=0, w=np.ones(num_classes), weights=np.ones(1))
    losses = [
        float(which.loss(torch.from_numpy(logits[i : i + 1]), torch.from_numpy(labels[i : i + 1]), it))
        for i in range(10)
    ]
    case = setting(which).case
    for package in (lsce_jax, lsce_torch):
        found = package.identify_loss(np.array(losses), logits, labels)[0]
        wanted = case.options.get("convention", "uniform")
        assert found.convention.name == ("non_target" if wanted == "clamp" else getattr(wanted, "name", wanted))
        assert found.smoothing == case.smoothing
        assert found.options == {
            option: case.options[option] for option in ("subtract_entropy", "z_loss") if case.options.get(option)
        }
