"""The loss in torch training loops as docs/pytorch.md shows them: what the page says holds, and could fail to.

Most tests train one linear layer whose logits are exact, however a device orders their sums: inputs are -1, 0 and 1,
and weights are multiples of 1/8. So the logits' gradient has the bound of parity_tests/truth/bounds.py, and the layer's
gradient that bound carried through one sum over the rows.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, hessian, jvp, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from lsce_torch import LabelSmoothedCrossEntropyLoss, label_smoothed_cross_entropy_with_stats
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.bounds import error_bound
from parity_tests.truth.cases import Case
from parity_tests.truth.oracle import solve

_GENERATOR = np.random.default_rng(0)
INPUTS = _GENERATOR.integers(-1, 2, (12, 4)).astype(np.float64)
WEIGHT = _GENERATOR.integers(-16, 17, (5, 4)) / 8
LABELS = np.array([-100, 4, 2, -100, 1, 3, 0, 0, -100, -100, -100, 2])
NUM_COUNTED = 7
PARTS = [slice(0, 4), slice(4, 8), slice(8, 12)]  # with 2, 4 and 1 labels
INPUT, LABEL = torch.from_numpy(INPUTS).float(), torch.from_numpy(LABELS)

loss_fn = LabelSmoothedCrossEntropyLoss(label_smoothing=0.1)


def linear(weight: NDArray[np.float64] = WEIGHT) -> nn.Linear:
    layer = nn.Linear(4, 5, bias=False)
    layer.weight.data = torch.from_numpy(weight).float()
    return layer


LAYER = linear()


@cache
def exact(smoothing: float = 0.1, scale: float = 1.0) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Return true value and bound, float32, of the mean loss with `scale` times the weights, and of their gradient."""
    options = {"reduction": "mean", "ignore_index": -100}
    case = Case("linear layer", "float32", scale * (INPUTS @ WEIGHT.T), LABELS, options, smoothing)
    truth = solve(case)
    bound = error_bound(case, truth, Arithmetic())
    gradient = truth.gradient.high.T @ INPUTS
    # The products with the inputs are exact. A sum over twelve rows and three parts rounds at most 14 times, and a
    # denominator that is divided by the number of parts or processes, and the division that undoes it, twice.
    of_gradient = bound.gradient.T @ np.abs(INPUTS) + 16 * 2.0**-24 * np.abs(truth.gradient.high).T @ np.abs(INPUTS)
    return {"loss": (truth.loss.high, bound.loss), "gradient": (gradient, of_gradient)}


def within(values: Tensor, name: str, **at: float) -> bool:
    """Whether the values are those of the mean over all labels at once, to within the bound."""
    expected, bound = exact(**at)[name]
    return bool(np.all(np.abs(values.detach().double().numpy() - expected) <= bound))


# Gradient accumulation


def accumulated(denominator: Callable[[Tensor], float | None], factor: float = 1.0) -> Tensor:
    layer = linear()
    for part in PARTS:
        (factor * loss_fn(layer(INPUT[part]), LABEL[part], denominator=denominator(LABEL[part]))).backward()
    assert layer.weight.grad is not None
    return layer.weight.grad


def test_accumulated_gradient_is_that_of_the_whole_batch() -> None:
    layer = linear()
    loss_fn(layer(INPUT), LABEL).backward()
    assert within(layer.weight.grad, "gradient")
    assert within(accumulated(lambda labels: NUM_COUNTED), "gradient")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: accumulated(lambda labels: None, factor=1 / len(PARTS)),  # the mean of means
        lambda: accumulated(lambda labels: None),  # their sum
        lambda: accumulated(lambda labels: len(LABELS)),
        lambda: accumulated(lambda labels: NUM_COUNTED, factor=1 / len(PARTS)),
        lambda: accumulated(lambda labels: NUM_COUNTED * (1 + 1e-5)),
    ],
)
def test_wrong_accumulation_is_rejected(wrong: Callable[[], Tensor]) -> None:
    assert not within(wrong(), "gradient")


def _train_on_two_ranks(rank: int, directory: str) -> None:
    """Save what DistributedDataParallel makes of the gradient, with the count of all ranks and with each rank's own."""
    dist.init_process_group("gloo", store=dist.FileStore(f"{directory}/store", 2), rank=rank, world_size=2)
    rows = [slice(0, 3), slice(3, 12)][rank]  # with 2 and 5 labels
    count = (LABEL[rows] != -100).sum()
    dist.all_reduce(count)
    for name, denominator in {"global": count / dist.get_world_size(), "own": None}.items():
        layer = DistributedDataParallel(linear())
        loss_fn(layer(INPUT[rows]), LABEL[rows], denominator=denominator).backward()
        torch.save(layer.module.weight.grad, f"{directory}/{name}_{rank}.pt")
        del layer  # it would hold on to the group, whose threads may then outlive it and end the process
    dist.barrier()  # neither leaves while the other still reads
    dist.destroy_process_group()


def test_distributed_gradient_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train_on_two_ranks, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        assert within(torch.load(tmp_path / f"global_{rank}.pt"), "gradient")
        assert not within(torch.load(tmp_path / f"own_{rank}.pt"), "gradient")


# torch.compile


def sgd_step(weight: Tensor, smoothing: float | Tensor) -> tuple[Tensor, Tensor]:
    def loss_of(weight: Tensor) -> Tensor:
        return loss_fn(functional_call(LAYER, {"weight": weight}, INPUT), LABEL, smoothing=smoothing)

    gradient, loss = grad_and_value(loss_of)(weight)
    return weight - 0.5 * gradient, loss


def is_sgd_step(stepped: Tensor, loss: Tensor, smoothing: float) -> bool:
    gradient, bound = exact(smoothing)["gradient"]
    error = np.abs(stepped.double().numpy() - (WEIGHT - 0.5 * gradient))
    # The halving is exact, the difference rounds.
    is_stepped = np.all(error <= 0.5 * bound + 2.0**-24 * np.abs(stepped.numpy()))
    return bool(is_stepped) and within(loss, "loss", smoothing=smoothing)


def test_compiled_step_is_the_eager_step_at_every_smoothing() -> None:
    """Forward, backward and update are one graph, which a tensor does not compile again; a Python number would."""
    torch.compiler.reset()
    compiled = torch.compile(sgd_step, fullgraph=True)
    weight = LAYER.weight.detach()
    compiled(weight, torch.tensor(0.1))
    with torch.compiler.set_stance("fail_on_recompile"):
        for smoothing in (0.0, 0.25, 0.5, 1.0):  # float32 holds them exactly
            for step in (sgd_step, compiled):
                stepped, loss = step(weight, torch.tensor(smoothing))
                assert is_sgd_step(stepped, loss, smoothing)
                assert not is_sgd_step(stepped, loss + 1e-4, smoothing)
                assert not is_sgd_step(stepped + 1e-4, loss, smoothing)
        with pytest.raises(RuntimeError, match="recompile"):
            compiled(weight, 0.25)


@pytest.mark.parametrize("per_call", [True, False])
def test_a_schedule_of_python_numbers_compiles_three_graphs(per_call: bool) -> None:
    """One for the first, one for all others, and one for 0; tensors need one."""
    logits, schedule = LAYER(INPUT).detach(), [0.1, 0.2, 0.3, 0.25, 0.0, 0.05, 0.0]
    module = LabelSmoothedCrossEntropyLoss()
    for values, expected in ((schedule[:1], 1), (schedule, 3), (torch.tensor(schedule), 1)):
        torch.compiler.reset()
        graphs: list[Any] = []
        compiled = torch.compile(module, backend=lambda graph, _, to=graphs: to.append(graph) or graph, fullgraph=True)
        for smoothing in values:
            if per_call:
                compiled(logits, LABEL, smoothing=smoothing)
            else:
                module.label_smoothing = smoothing
                compiled(logits, LABEL)
        assert len(graphs) == expected


# Mixed precision


def scaled_gradient(dtype: torch.dtype, scale: float | None) -> Tensor:
    """Return the gradient of a training step under autocast, unscaled; it has gone through two layers."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(4, 4, generator=generator).requires_grad_()
    optimizer = torch.optim.SGD([first], lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    with torch.autocast("cpu", dtype=dtype):
        logits = LAYER(torch.tanh(INPUT @ first))
        loss = loss_fn(logits, LABEL)
    assert logits.dtype == dtype
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert first.grad is not None
    return first.grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scaling_by_powers_of_two_changes_no_bit(dtype: torch.dtype) -> None:
    plain = scaled_gradient(dtype, None)
    assert plain.any()
    assert torch.equal(scaled_gradient(dtype, 2.0**10), plain)
    assert torch.equal(scaled_gradient(dtype, 2.0**16), plain)
    assert not torch.equal(scaled_gradient(dtype, 1000.0), plain)
    # What the scaler watches for: float16 overflows, and the step is left out.
    assert torch.isfinite(scaled_gradient(dtype, 2.0**30)).all() == (dtype == torch.bfloat16)


def test_small_gradients_need_the_scaler_in_float16() -> None:
    """Many classes and a mean over many rows leave less than float16 holds, unless the loss is scaled."""
    gradients = []
    for scale in (1.0, 2.0**16):
        logits = torch.zeros(1, 2**16, dtype=torch.float16, requires_grad=True)
        (scale * loss_fn(logits, torch.tensor([0]), denominator=2**12)).backward()
        assert logits.grad is not None
        gradients.append(logits.grad[0, 1].double() / scale)
    expected = 0.9 * 2.0**-28
    assert gradients[0] == 0
    # Rounded to float16 once, and before that to float32: p and q have an exact sum and five roundings.
    assert abs(gradients[1] - expected) <= (2.0**-11 + 6 * 2.0**-24) * expected


# torch.func


def test_members_of_an_ensemble_have_their_own_smoothing() -> None:
    scales, smoothings = (1.0, 0.5, 2.0), (0.0, 0.25, 1.0)
    members = [linear(scale * WEIGHT) for scale in scales]
    parameters, buffers = stack_module_state(members)

    def loss_of(parameters: dict[str, Tensor], buffers: dict[str, Tensor], smoothing: Tensor) -> Tensor:
        return loss_fn(functional_call(members[0], (parameters, buffers), INPUT), LABEL, smoothing=smoothing)

    gradients, losses = vmap(grad_and_value(loss_of))(parameters, buffers, torch.tensor(smoothings))
    for loss, gradient, member, scale, smoothing in zip(
        losses, gradients["weight"], members, scales, smoothings, strict=True
    ):
        at = {"smoothing": smoothing, "scale": scale}
        alone = loss_fn(member(INPUT), LABEL, smoothing=smoothing)
        alone.backward()
        for one_loss, one_gradient in ((loss, gradient), (alone, member.weight.grad)):
            assert within(one_loss, "loss", **at)
            assert within(one_gradient, "gradient", **at)
            assert not within(one_gradient, "gradient", smoothing=0.125, scale=scale)


def test_hessian_vector_product_is_the_hessian_times_the_vector() -> None:
    inputs, weight = torch.from_numpy(INPUTS), torch.from_numpy(WEIGHT)
    vector = torch.from_numpy(np.random.default_rng(1).normal(size=WEIGHT.shape))

    def loss_of(weight: Tensor) -> Tensor:
        return loss_fn(inputs @ weight.T, LABEL)

    _, product = jvp(grad(loss_of), (weight,), (vector,))
    expected = torch.einsum("kdle,le->kd", hessian(loss_of)(weight), vector)

    # Both sum p_k (dz_k - sum_l p_l dz_l) x_d over the rows. A term has the errors of two p, of dz, of the sum over
    # the classes, of the sum over the rows and of six products and differences, in units of the roundoff u.
    counted = LABEL != -100
    rows, p = inputs[counted], torch.softmax(inputs[counted] @ weight.T, -1)
    gap = -torch.log(p) + torch.log(p.amax(-1, keepdim=True))
    arithmetic, num_classes = Arithmetic(), len(WEIGHT)
    of_p = arithmetic.depth(num_classes) + 2 * arithmetic.exp + 1 + gap.max() + (p * gap).sum(-1).max()
    count = 2 * of_p + WEIGHT.shape[1] + num_classes + len(rows) + 6
    size = rows.abs() @ vector.abs().T
    terms = (p * (size + (p * size).sum(-1, keepdim=True))).T @ rows.abs() / len(rows)
    bound = 2 * count * 2.0**-53 * terms
    assert torch.all((product - expected).abs() <= bound)

    tangent = rows @ vector.T
    without_outer_product = (p * tangent).T @ rows / len(rows)
    of_the_sum = product * len(rows)
    for wrong in (without_outer_product, of_the_sum, product * (1 + 1e-13)):
        assert not torch.all((wrong - expected).abs() <= bound)


# Lightning


def make_classifier(smoothing: float, denominator: float | None) -> Any:
    """Return the module of docs/pytorch.md around the linear layer."""
    lightning, metrics = pytest.importorskip("lightning"), pytest.importorskip("lsce_torch.metrics")
    collection = pytest.importorskip("torchmetrics").MetricCollection

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear()
            self.gradients: list[Tensor] = []
            self.metrics = collection({"loss": metrics.MeanLoss(), "accuracy": metrics.Accuracy()})

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return loss_fn(self.layer(batch[0]), batch[1], smoothing=smoothing, denominator=denominator)

        def on_before_optimizer_step(self, _: torch.optim.Optimizer) -> None:
            self.gradients.append(self.layer.weight.grad.clone())

        def validation_step(self, batch: list[Tensor], _: int) -> None:
            options = {"smoothing": smoothing, "ignore_index": -100}
            loss, stats = label_smoothed_cross_entropy_with_stats(self.layer(batch[0]), batch[1], **options)
            self.metrics.update(stats=stats)
            self.log_dict(self.metrics)
            self.log("mean_of_means", loss)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.layer.parameters(), lr=0.01)

    return Classifier()


def fit(
    smoothing: float = 0.1, denominator: float | None = None, **options: Any
) -> tuple[nn.Linear, list[Tensor], dict[str, Tensor]]:
    """Train for two epochs; return the layer, the gradient of each of its updates, and what was logged."""
    classifier = make_classifier(smoothing, denominator)
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options |= {"max_epochs": 2, "accelerator": "cpu", "devices": 1, **dict.fromkeys(silent, False)}
    trainer = pytest.importorskip("lightning").Trainer(**options)
    # The items of this data set are the batches; a DataLoader would make Lightning ask for more workers.
    batches = TensorDataset(INPUT.view(3, 4, 4), LABEL.view(3, 4))
    trainer.fit(classifier, batches, batches)
    return classifier.layer, classifier.gradients, trainer.callback_metrics


# It would rather use a GPU.
with_lightning = pytest.mark.filterwarnings("ignore:GPU available")


@with_lightning
def test_lightning_trains_as_the_plain_loop_does() -> None:
    """Bit for bit; and its metrics are those of all labels at once, unlike the mean of the batches' means."""
    layer = linear()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    for part in 2 * PARTS:
        optimizer.zero_grad()
        loss_fn(layer(INPUT[part]), LABEL[part]).backward()
        optimizer.step()
    trained, _, logged = fit()
    assert torch.equal(trained.weight, layer.weight)
    assert not torch.equal(fit(smoothing=0.1 + 1e-4)[0].weight, layer.weight)

    row_losses = LabelSmoothedCrossEntropyLoss(label_smoothing=0.1, reduction="none")
    with torch.no_grad():
        losses = torch.cat([row_losses(layer(INPUT[part]), LABEL[part]) for part in PARTS])
        means = torch.stack([loss_fn(layer(INPUT[part]), LABEL[part]) for part in PARTS])
        correct = torch.cat([layer(INPUT[part]).argmax(-1) for part in PARTS]) == LABEL
    mean = losses.double().sum() / NUM_COUNTED
    # Each loss is off by a few roundings, as is the sum over twelve rows.
    assert abs(logged["loss"] - mean) <= 16 * 2.0**-24 * mean
    assert logged["accuracy"] == correct.sum() / NUM_COUNTED
    # Three products with the number of rows, three sums and a division, on each side.
    rounding = 2 * 7 * 2.0**-24 * means.mean()
    assert abs(logged["mean_of_means"] - means.mean()) <= rounding
    assert abs(logged["mean_of_means"] - logged["loss"]) > rounding


@with_lightning
def test_lightning_divides_accumulated_losses_by_their_number() -> None:
    _, gradients, _ = fit(denominator=NUM_COUNTED / 3, accumulate_grad_batches=3)
    assert within(gradients[0], "gradient")
    for wrong in (None, NUM_COUNTED):
        _, gradients, _ = fit(denominator=wrong, accumulate_grad_batches=3)
        assert not within(gradients[0], "gradient")
