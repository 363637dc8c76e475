"""`lsce_torch.trainers` in Hugging Face's Trainer and in Accelerate's loops, with tiny models that are not downloaded.

What a trainer makes of the weights is held against a plain loop over whole batches, which needs neither Trainer nor
Accelerate nor lsce. The rule is that of parity_tests/trainings: the two may differ by no more than what one ulp in the
starting weights makes of the plain loop, twice.
"""

import os
import pickle
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"

import accelerate
import transformers

from lsce_torch import label_smoothed_cross_entropy, linear_label_smoothed_cross_entropy
from lsce_torch.trainers import causal_lm_loss, unshifted_loss
from parity_tests.trainings.stepwise import State, StepwiseVerdict, compare_step_by_step

VOCABULARY, LENGTH, BATCH, STEPS, RATE, SMOOTHING = 11, 6, 8, 3, 0.5, 0.1

_GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randint(VOCABULARY, (STEPS * BATCH, LENGTH), generator=_GENERATOR)
# How many tokens of each sequence are labels: microbatches of 2 have from 0 to 10.
_COUNTS = torch.tensor([5, 5, 1, 0, 0, 0, 3, 4, 1, 1, 5, 2, 4, 4, 0, 1, 2, 5, 5, 4, 0, 0, 1, 3])[:, None]
LABELS = torch.where(torch.arange(LENGTH) >= LENGTH - _COUNTS, TOKENS, -100)  # never the first

pytestmark = pytest.mark.usefixtures("one_thread")


def language_model() -> nn.Module:
    """Return GPT-2 with 1024 parameters, the same each time."""
    torch.manual_seed(0)
    size = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 8, "n_layer": 1, "n_head": 2}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(**size, **no_dropout, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


class Tagger(nn.Module):
    """A model that is no model of transformers, and whose labels are where its logits are."""

    def __init__(self) -> None:
        """Make two layers, the same each time."""
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY))

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Return logits for each token."""
        return {"logits": self.layers(input_ids)}


# --- The plain loop, and what it is compared with ---------------------------------------------------------------------


def torch_loss(logits: Tensor, labels: Tensor, *, shift: bool) -> Tensor:
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=SMOOTHING)


class PlainLoop:
    """SGD on whole batches with torch's own loss."""

    def __init__(self, model: nn.Module, *, shift: bool) -> None:
        """Start with the weights of a model."""
        self.model, self.shift = model, shift

    def state(self) -> State:
        """Return the weights."""
        return state_of(self.model)

    def load(self, state: State) -> None:
        """Continue from these weights."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(torch.from_numpy(np.array(state[name])))

    def step(self, number: int) -> float:
        """Train on a batch, and return its loss."""
        rows = slice(number * BATCH, (number + 1) * BATCH)
        loss = torch_loss(self.model(TOKENS[rows])["logits"], LABELS[rows], shift=self.shift)
        self.model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.sub_(RATE * parameter.grad)
        return loss.item()


class Recorded:
    """A training that is over: the weights before the first step and after each, and the losses."""

    def __init__(self, states: list[State], losses: list[float]) -> None:
        """Start with the first state."""
        self.states, self.losses, self.now = states, losses, 0

    def state(self) -> State:
        """Return the weights."""
        return self.states[self.now]

    def load(self, state: State) -> None:
        """Do nothing: what is over cannot start from another state, and so runs free only."""

    def step(self, number: int) -> float:
        """Go on to the next state, and return the loss."""
        self.now = number + 1
        return self.losses[number]


def state_of(model: nn.Module) -> dict[str, NDArray[Any]]:
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def against_plain_loop(trained: Recorded, model: Callable[[], nn.Module] = language_model) -> StepwiseVerdict:
    """Compare losses and weights of all steps with those of the plain loop."""
    plain = PlainLoop(model().train(), shift=model is language_model)
    return compare_step_by_step(plain, trained, STEPS, batch_size=BATCH * LENGTH)[0]


# --- The Trainer ------------------------------------------------------------------------------------------------------


class InOrder(transformers.Trainer):
    """The Trainer, with the data in their order."""

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Recorder(transformers.TrainerCallback):
    """Keeps the weights after each step."""

    def __init__(self) -> None:
        """Start with none."""
        self.states: list[State] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Keep the weights."""
        self.states.append(state_of(model))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Keep the weights."""
        self.states.append(state_of(model))


def examples(labels: Tensor = LABELS) -> list[dict[str, Tensor]]:
    return [{"input_ids": tokens, "labels": of} for tokens, of in zip(TOKENS, labels, strict=True)]


def make_trainer(
    folder: Path, compute_loss: Any, model: nn.Module, labels: Tensor = LABELS, num_gpus: int = 0, **arguments: Any
) -> Any:
    silent = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    training = {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    given = {"max_steps": STEPS, "use_cpu": True, "remove_unused_columns": False, **silent, **training, **arguments}
    settings = transformers.TrainingArguments(str(folder), **given)
    settings._n_gpu = max(num_gpus, settings.n_gpu)  # after it has looked for some
    return InOrder(
        model=model,
        args=settings,
        train_dataset=examples(labels),
        eval_dataset=examples(labels),
        compute_loss_func=compute_loss,
        callbacks=[Recorder()],
    )


def record(trainer: Any) -> Recorded:
    """Train; return the weights and the losses, as the Trainer reports them unless its report rounds them."""
    losses: list[float] = []
    compute_loss, parts = trainer.compute_loss_func, trainer.args.gradient_accumulation_steps

    def kept(*given: Any, **named: Any) -> Tensor:
        loss = compute_loss(*given, **named)
        losses.append(loss.item() if loss.ndim == 0 else loss.mean().item())
        return loss

    trainer.compute_loss_func = kept
    recorder = next(each for each in trainer.callback_handler.callbacks if isinstance(each, Recorder))
    trainer.train()
    return Recorded(recorder.states, [sum(losses[i : i + parts]) for i in range(0, len(losses), parts)])


@pytest.mark.parametrize("microbatch", [8, 2, 1])
def test_trainer_is_the_plain_loop(tmp_path: Path, microbatch: int) -> None:
    """However the batch of 8 is divided: losses and weights, and what the Trainer reports."""
    sizes = {"per_device_train_batch_size": microbatch, "gradient_accumulation_steps": BATCH // microbatch}
    trainer = make_trainer(tmp_path, causal_lm_loss(smoothing=SMOOTHING), language_model(), **sizes)
    trained = record(trainer)
    verdict = against_plain_loop(trained)
    assert verdict.agrees, verdict.first_divergence
    reported = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # Older versions round it to four digits after the point.
    np.testing.assert_allclose(reported, trained.losses, rtol=2.0**-20, atol=0.51e-4)


def mean_of_means(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return causal_lm_loss(smoothing=SMOOTHING)(outputs, labels) / 4


def sum_of_means(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return causal_lm_loss(smoothing=SMOOTHING)(outputs, labels)


def all_tokens_counted(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return causal_lm_loss(smoothing=SMOOTHING)(outputs, labels, BATCH * LENGTH)


@pytest.mark.parametrize(
    "wrong",
    [
        mean_of_means,
        causal_lm_loss(smoothing=SMOOTHING + 1e-4),
        pytest.param(sum_of_means, marks=pytest.mark.slow),
        pytest.param(all_tokens_counted, marks=pytest.mark.slow),
        pytest.param(unshifted_loss(smoothing=SMOOTHING), marks=pytest.mark.slow),
        pytest.param(causal_lm_loss(smoothing=SMOOTHING, convention="non_target"), marks=pytest.mark.slow),
    ],
)
def test_wrong_losses_are_rejected(tmp_path: Path, wrong: Any) -> None:
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    verdict = against_plain_loop(record(make_trainer(tmp_path, wrong, language_model(), **sizes)))
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.step == 0
    tensors = {each.tensor for each in verdict.worst if each.share > 1}
    assert {"loss", "transformer.wte.weight"} <= tensors


def test_labels_where_the_logits_are(tmp_path: Path) -> None:
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    for compute_loss, right in ((unshifted_loss, True), (causal_lm_loss, False)):
        trained = record(make_trainer(tmp_path, compute_loss(smoothing=SMOOTHING), Tagger(), **sizes))
        assert against_plain_loop(trained, Tagger).agrees == right


class LinearLossModel(transformers.GPT2LMHeadModel):
    """That of docs/trainers.md."""

    def forward(self, input_ids: Tensor, labels: Any = None, num_items_in_batch: Any = None, **keywords: Any) -> Any:
        """Return the loss, or without labels the logits."""
        if labels is None:
            return super().forward(input_ids, **keywords)
        hidden = self.transformer(input_ids, **keywords).last_hidden_state
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        options = {"smoothing": SMOOTHING, "ignore_index": -100, "denominator": num_items_in_batch}
        return {"loss": linear_label_smoothed_cross_entropy(hidden, self.lm_head.weight, labels, **options)}


@pytest.mark.parametrize("counts", [True, False])
def test_linear_loss_in_the_model(tmp_path: Path, counts: bool) -> None:
    """Without the count the Trainer divides by the number of microbatches: a mean of means."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    model = LinearLossModel(language_model().config)
    model.load_state_dict(language_model().state_dict())
    model.accepts_loss_kwargs = counts
    trainer = make_trainer(tmp_path, None, model, **sizes)
    trainer.train()
    states = next(each.states for each in trainer.callback_handler.callbacks if isinstance(each, Recorder))
    verdict = against_plain_loop(Recorded(states, [0.0] * STEPS))
    assert all(each.share <= 1 for each in verdict.worst if each.tensor != "loss") == counts


def test_first_labels_may_be_counted(tmp_path: Path) -> None:
    """They are never predicted. docs/trainers.md says to set them to -100, which is right with every version.

    Newer versions leave them out of the count for models that they know as causal ones, by the name of the class.
    """
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    labels = torch.where(torch.arange(LENGTH) == 0, TOKENS, LABELS)
    trainer = make_trainer(tmp_path, causal_lm_loss(smoothing=SMOOTHING), language_model(), labels, **sizes)
    assert not getattr(trainer, "_loss_shifts_labels", False)
    assert not against_plain_loop(record(trainer)).agrees


def test_several_gpus_in_one_process(tmp_path: Path) -> None:
    """The Trainer hands over one count for each, and multiplies the loss. On a CPU nn.DataParallel is the model."""
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "num_gpus": 2}
    for compute_loss, right in ((causal_lm_loss(smoothing=SMOOTHING), True), (with_the_first_count, False)):
        verdict = against_plain_loop(record(make_trainer(tmp_path, compute_loss, language_model(), **sizes)))
        weights = [each for each in verdict.worst if each.tensor != "loss"]
        assert all(each.share <= 1 for each in weights) == right


def with_the_first_count(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    return causal_lm_loss(smoothing=SMOOTHING)(outputs, labels, num_items_in_batch.flatten()[0] / 2)


def test_evaluation(tmp_path: Path) -> None:
    """One batch: the loss of the function itself, to the last bit."""
    model = language_model()
    trainer = make_trainer(tmp_path, causal_lm_loss(smoothing=SMOOTHING), model, per_device_eval_batch_size=len(TOKENS))
    with torch.no_grad():
        expected = causal_lm_loss(smoothing=SMOOTHING)(model.eval()(TOKENS), LABELS)
    assert trainer.evaluate()["eval_loss"] == expected.item()


# --- Accelerate -------------------------------------------------------------------------------------------------------


def with_accelerate(*, scale: bool = True) -> Recorded:
    """Train as docs/trainers.md does: 2 sequences at a time, on as many processes as there are."""
    parts = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    plugin = accelerate.utils.GradientAccumulationPlugin(num_steps=parts, sync_with_dataloader=False)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    model = language_model().train()
    compute_loss = causal_lm_loss(smoothing=SMOOTHING)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(TOKENS, LABELS), batch_size=2)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    recorded = Recorded([state_of(accelerator.unwrap_model(model))], [])
    batches = iter(data)
    for _ in range(STEPS):
        microbatches = [next(batches) for _ in range(parts)]
        count = accelerator.gather(sum((labels[:, 1:] != -100).sum() for _, labels in microbatches)).sum()
        # Accelerate divides by the number of microbatches, DistributedDataParallel by that of processes.
        denominator = count / (parts * accelerator.num_processes) if scale else count
        losses = []
        for tokens, labels in microbatches:
            with accelerator.accumulate(model):
                loss = compute_loss(model(tokens), labels, denominator)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(accelerator.reduce(loss.detach(), "mean"))
        recorded.losses.append(torch.stack(losses).mean().item())
        recorded.states.append(state_of(accelerator.unwrap_model(model)))
    return recorded


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate and the Trainer share a state of the process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_accelerate_is_the_plain_loop() -> None:
    verdict = against_plain_loop(with_accelerate())
    assert verdict.agrees, verdict.first_divergence
    assert not against_plain_loop(with_accelerate(scale=False)).agrees


def _train_on_two_processes(rank: int, folder: str, port: int) -> None:
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), **rendezvous})
    torch.set_num_threads(1)
    results = {"accelerate": with_accelerate()}
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    for name, averaged in {"trainer": True, "own count": False}.items():
        arguments = {"average_tokens_across_devices": averaged, "ddp_find_unused_parameters": False, **sizes}
        compute_loss = causal_lm_loss(smoothing=SMOOTHING)
        results[name] = record(make_trainer(Path(folder), compute_loss, language_model(), **arguments))
    plain = {name: (each.states, each.losses) for name, each in results.items()}
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(plain))
    torch.distributed.barrier()  # neither leaves while the other still reads
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Each has half of the microbatches. With counts of their own the Trainer's gradient is a mean of means."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_train_on_two_processes, (str(tmp_path), port), nprocs=2)
    first, second = (pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(2))
    for name, right in {"accelerate": True, "trainer": True, "own count": False}.items():
        (states, losses), (_, others) = first[name], second[name]
        if name == "trainer":
            losses = [one + other for one, other in zip(losses, others, strict=True)]  # both divide by the whole count
        verdict = against_plain_loop(Recorded(states, losses))
        assert verdict.agrees == right, (name, verdict.first_divergence)
        weights = {each.share > 1 for each in verdict.worst if each.tensor == "transformer.wte.weight"}
        assert weights == {not right}


# --- The functions alone ----------------------------------------------------------------------------------------------

LOGITS = torch.randn(2, LENGTH, VOCABULARY, generator=_GENERATOR)
FEW = LABELS[:2]
SHIFTED = torch.cat([FEW[:, 1:], torch.full((2, 1), -100)], dim=1)


@pytest.mark.parametrize(
    "outputs",
    [
        {"logits": LOGITS},
        transformers.modeling_outputs.CausalLMOutput(logits=LOGITS),
        types.SimpleNamespace(logits=LOGITS),
        (LOGITS, "cache"),
        LOGITS,
    ],
    ids=["dict", "ModelOutput", "attribute", "tuple", "tensor"],
)
def test_outputs(outputs: Any) -> None:
    assert torch.equal(causal_lm_loss()(outputs, FEW), causal_lm_loss()({"logits": LOGITS}, FEW))


@pytest.mark.parametrize("count", [7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor([[3.0], [4.0]])])
def test_counts(count: Any) -> None:
    options = {"ignore_index": -100, "smoothing": 0.2}
    expected = label_smoothed_cross_entropy(LOGITS, SHIFTED, denominator=7, **options)
    assert torch.equal(causal_lm_loss(smoothing=0.2)(LOGITS, FEW, num_items_in_batch=count), expected)
    none = torch.full_like(FEW, -100)
    assert causal_lm_loss()(LOGITS, none) == 0
    assert causal_lm_loss()(LOGITS, none, num_items_in_batch=torch.tensor(0)) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"smoothing": 0.0},
        {"smoothing": torch.tensor(0.3)},
        {"convention": "non_target"},
        {"prior": torch.full((VOCABULARY,), 1 / VOCABULARY)},
        {"class_weight": torch.linspace(0.5, 2, VOCABULARY)},
        {"class_mask": torch.arange(VOCABULARY) < VOCABULARY},
        {"class_mask": torch.arange(VOCABULARY) > 0, "bad_labels": "nan"},
        {"z_loss": 0.01},
        {"softcap": 3.0},
        {"subtract_entropy": True},
        {"implementation": "reference"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(options: dict[str, Any]) -> None:
    """Each is that of the dense loss. With class weights the sum is divided by the number of labels."""
    count = int((SHIFTED != -100).sum())
    for compute_loss, labels in ((causal_lm_loss, SHIFTED), (unshifted_loss, FEW)):
        expected = label_smoothed_cross_entropy(LOGITS, labels, ignore_index=-100, denominator=count, **options)
        found = pickle.loads(pickle.dumps(compute_loss(**options)))({"logits": LOGITS}, FEW)
        assert torch.equal(found, expected) or (found.isnan() and expected.isnan())


def test_smoothing_that_a_callback_changes() -> None:
    smoothing = torch.tensor(0.1)
    compute_loss = causal_lm_loss(smoothing=smoothing)
    before = compute_loss(LOGITS, FEW)
    smoothing.fill_(0.3)
    assert compute_loss(LOGITS, FEW) == causal_lm_loss(smoothing=torch.tensor(0.3))(LOGITS, FEW) != before


def test_gradient_may_overwrite_the_logits() -> None:
    for inplace in (False, True):
        leaf = LOGITS.clone().requires_grad_()
        place = leaf.data_ptr()
        causal_lm_loss(inplace_backward=inplace)({"logits": leaf}, FEW).backward()
        gradient = leaf.grad
        assert (gradient.untyped_storage().data_ptr() == place) == inplace


def test_messages() -> None:
    compute_loss = causal_lm_loss()
    for outputs, given in (({"loss": LOGITS}, "dict"), ((), "tuple"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"outputs must hold the logits.*got {given}"):
            compute_loss(outputs, FEW)
    for labels, given in ((None, "None"), (LOGITS, "float32")):
        with pytest.raises(TypeError, match=rf"labels must be class indices.*got {given}"):
            compute_loss({"logits": LOGITS}, labels)
    with pytest.raises(ValueError, match="smoothing must be in"):
        unshifted_loss(smoothing=1.5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'ignore_index'"):
        causal_lm_loss(ignore_index=0)


# As a user types it.
SCRIPT = """
import torch
from lsce_torch.trainers import causal_lm_loss
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

torch.manual_seed(0)
start = torch.randint(20, (64, 1))
tokens = (start + torch.arange(12)) % 20  # a language in which every word has one successor
labels = tokens.clone()
labels[:, :4] = -100  # the prompt
data = [{"input_ids": row, "labels": of} for row, of in zip(tokens, labels)]

trainer = Trainer(
    model=GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=12, n_embd=32, n_layer=1, n_head=2)),
    args=TrainingArguments(
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        num_train_epochs=10,
        learning_rate=3e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    ),
    train_dataset=data,
    eval_dataset=data,
    compute_loss_func=causal_lm_loss(smoothing=0.1, z_loss=1e-4),
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
assert 0.59 < after < 1.2 < 2.5 < before, (before, after)  # at its best it is the entropy of the target, 0.594
"""


@pytest.mark.slow
def test_script(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
