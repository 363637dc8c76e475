"""Train a small language model in torch, with the last linear layer and the loss in one.

    .venv/bin/python -m examples.torch_lm --steps 256 --vocabulary 8192

A language model has more logits than anything else: a row of the size of the vocabulary for each token of a batch, and
its gradient. `linear_label_smoothed_cross_entropy` takes the input of the last layer, and never has more than a few
rows of logits in memory. The layer's weight is the embedding table, whose gradient comes from both ends.

The text is documentation that comes with Python, in tokens of a BPE that is trained on it. The measure is the
perplexity of documents that the model has not seen, beside that of a model that knows the frequency of each token only.

The script prints two tables, draws a plot and writes the losses of all steps. Text, tables and plot are in
lm_common.py. The same in JAX: jax_lm.py, from the same weights on the same batches. The losses of the two differ by
rounding, which this training amplifies: by 1e-6 up to step 32, by 1e-4 at step 128 and by 0.02 at step 256, where the
perplexities are 490 and 497. JAX runs whose starting weights are moved by one rounding step differ from the first one
by up to 0.02, too, with perplexities of 491 to 495.

Where other programs want the cores too, one thread is many times faster than several: OMP_NUM_THREADS=1.
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from jaxtyping import Float32, Int32
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from examples import lm_common
from examples.common import Smoothing, new_app
from examples.common_torch import adamw, set_weights
from examples.lm_common import (
    CONTEXT,
    HEADS,
    LAYERS,
    NO_CHECKPOINTS,
    NORM_EPSILON,
    BatchSize,
    CheckpointEvery,
    Checkpoints,
    ChunkSize,
    MeshOption,
    Options,
    Resume,
    Run,
    RunFolder,
    Seed,
    Steps,
    Text,
    Vocabulary,
    Weights,
    Width,
    Windows,
)
from lsce_torch import (
    LossStats,
    label_smoothed_cross_entropy,
    linear_label_smoothed_cross_entropy,
    linear_label_smoothed_cross_entropy_with_stats,
    mean_denominator,
)
from lsce_torch.metrics import Perplexity

EVALUATIONS = 8  # in training, besides the one before

# --- Network --------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Attention to the tokens so far, then a layer for each token; both add to the residual stream."""

    def __init__(self, width: int) -> None:
        """Make the modules."""
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=NORM_EPSILON)
        self.attend = nn.Linear(width, 3 * width, bias=False)
        self.gather = nn.Linear(width, width, bias=False)
        self.norm2 = nn.RMSNorm(width, eps=NORM_EPSILON)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.contract = nn.Linear(4 * width, width, bias=False)

    def forward(self, stream: Float32[Tensor, "N T D"]) -> Float32[Tensor, "N T D"]:
        """Return the stream plus the output of the layer."""
        split = self.attend(self.norm1(stream)).reshape(*stream.shape[:2], 3, HEADS, -1)
        query, key, value = (split[:, :, part].transpose(1, 2) for part in range(3))
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.gather(seen.transpose(1, 2).reshape(stream.shape))
        return stream + self.contract(F.silu(self.expand(self.norm2(stream))))


class LanguageModel(nn.Module):
    """Tokens to the input of the last linear layer, whose weight is the embedding table."""

    def __init__(self, weights: Weights) -> None:
        """Make the modules, with these weights."""
        super().__init__()
        vocabulary, width = weights["embed"].shape
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(width, eps=NORM_EPSILON)
        set_weights(self, lambda name, shape: weights[name])

    def forward(self, tokens: Int32[Tensor, "N T"]) -> Float32[Tensor, "N T D"]:
        """Return the hidden states."""
        stream = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for layer in self.layers:
            stream = layer(stream)
        return self.norm(stream)


# --- Training -------------------------------------------------------------------------------------------------------

Optimizer = torch.optim.Optimizer


def learning_rate(step: int) -> float:
    """Return the learning rate of a step, counted from 0. It rises while Adam has seen few gradients."""
    return lm_common.LEARNING_RATE * min(step + 1, lm_common.WARM_UP) / lm_common.WARM_UP


def make_optimizer(model: LanguageModel) -> Optimizer:
    """Return AdamW."""
    return adamw(model.parameters(), weight_decay=lm_common.WEIGHT_DECAY)


class WithLoss(nn.Module):
    """A language model and its loss: FSDP gathers the weights only for what is computed in `forward`."""

    def __init__(self, model: LanguageModel, mesh: DeviceMesh | None) -> None:
        """Keep the model, and find out which processes have other windows."""
        super().__init__()
        self.model = model
        self.data = None if mesh is None else mesh["data"].get_group()
        self.parts, self.part = (1, 0) if mesh is None else (mesh["data"].size(), mesh.get_local_rank("data"))

    def own(self, windows: Windows) -> Tensor:
        """Return the windows of this process."""
        return torch.from_numpy(np.array_split(windows, self.parts)[self.part])

    def forward(
        self, windows: Int32[Tensor, "N 129"], options: Options | None = None
    ) -> Float32[Tensor, ""] | LossStats:
        """Return the loss of the next tokens, or their statistics if there are no options.

        The mean of the processes' losses is the mean over all windows.
        """
        hidden, table, labels = self.model(windows[:, :-1]), self.model.embed.weight, windows[:, 1:]
        if options is None:
            return linear_label_smoothed_cross_entropy_with_stats(hidden, table, labels)[1]
        denominator = None
        if self.parts > 1:
            denominator = mean_denominator(labels, group=self.data) / self.parts
        return linear_label_smoothed_cross_entropy(
            hidden,
            table,
            labels,
            smoothing=options.smoothing,
            denominator=denominator,
            chunk_size=options.chunk_size,
        )


def make_mesh(mesh: lm_common.Mesh) -> DeviceMesh | None:
    """Return a mesh of processes, or None for one device."""
    if math.prod(mesh) == 1:
        return None
    return init_device_mesh("cpu", mesh, mesh_dim_names=("data", "model"))


def on_mesh(model: LanguageModel, mesh: DeviceMesh | None) -> WithLoss:
    """Divide table and layers of each token over "model" by tensor parallelism, and what each rank has over "data"."""
    with_loss = WithLoss(model, mesh)
    if mesh is not None and mesh["model"].size() > 1:
        plan = {"embed": RowwiseParallel(input_layouts=Replicate())}
        for layer in range(LAYERS):
            plan |= {f"layers.{layer}.expand": ColwiseParallel(), f"layers.{layer}.contract": RowwiseParallel()}
        parallelize_module(model, mesh["model"], plan)
    if mesh is not None and mesh["data"].size() > 1:
        fully_shard(with_loss, mesh=mesh["data"])
    return with_loss


def train_step(
    model: WithLoss, optimizer: Optimizer, windows: Windows, options: Options, step: int
) -> Float32[Tensor, ""]:
    """Train on one batch, and return its loss."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step)
    optimizer.zero_grad()
    loss = model(model.own(windows), options)
    loss.backward()
    optimizer.step()
    mean = loss.detach() / model.parts
    if model.parts > 1:
        distributed.all_reduce(mean, group=model.data)
    return mean


@torch.no_grad()
def perplexity(model: WithLoss, text: Text) -> float:
    """Return the perplexity of the held-out text. The metric adds up what all processes have counted."""
    metric = Perplexity()
    for windows in lm_common.held_out_batches(text):
        metric.update(stats=model(model.own(windows)))
    return float(metric.compute())


def train(
    text: Text,
    options: Options,
    on_step: Callable[[float], object] = lambda loss: None,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> Run:
    """Train a model, and compute the perplexity of the held-out text from time to time."""
    network = LanguageModel(lm_common.initial_weights(options.vocabulary, options.width, options.seed))
    model = on_mesh(network, make_mesh(options.mesh))
    optimizer = make_optimizer(network)
    saved = Saved(checkpoints, model, optimizer)
    run = saved.restored(options) if checkpoints.resume else Run([], {0: perplexity(model, text)})
    for loss in run.losses:
        on_step(loss)
    looks = {options.steps * part // EVALUATIONS for part in range(1, EVALUATIONS + 1)} - {0}
    for step, windows in enumerate(lm_common.batches(text, options, len(run.losses)), start=len(run.losses) + 1):
        loss = train_step(model, optimizer, windows, options, step - 1)
        run.losses.append(float(loss))
        if step in looks:
            run.perplexities[step] = perplexity(model, text)
        if checkpoints.due(step, options.steps):
            saved.save(run, options)
        on_step(run.losses[-1])
    return run


class Saved:
    """The checkpoints of a training, by torch.distributed.checkpoint, each in a folder with the number of its step."""

    def __init__(self, checkpoints: Checkpoints, model: WithLoss, optimizer: Optimizer) -> None:
        """Find the checkpoints in the folder.

        Raises:
            typer.BadParameter: there is none to go on from, or there are some of another run.
        """
        self.folder, self.model, self.optimizer = checkpoints.folder, model, optimizer
        if checkpoints.every or checkpoints.resume:
            lm_common.check_checkpoints(checkpoints, max(self.steps(), default=None))

    def steps(self) -> list[int]:
        """Return the steps that there are checkpoints of."""
        return sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdecimal())

    def save(self, run: Run, options: Options) -> None:
        """Write model, optimizer and run, and remove all but the last two checkpoints."""
        content = {**lm_common.as_json(run), "options": lm_common.fixed_options(options)}
        partial, folder = self.folder / "partial", self.folder / str(len(run.losses))
        if is_first():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / "run.json").write_text(json.dumps(content), encoding="utf-8")
        wait_for_all()
        with without_warning():
            checkpoint.save(self.arrays(), checkpoint_id=partial)
        # Only now has it the name of a checkpoint: whoever is killed before leaves none that is not whole.
        if is_first():
            partial.rename(folder)
            for step in self.steps()[:-2]:
                shutil.rmtree(self.folder / str(step))
        wait_for_all()

    def restored(self, options: Options) -> Run:
        """Restore model and optimizer, each tensor divided as it is now, and return the run so far."""
        folder = self.folder / str(self.steps()[-1])
        run = lm_common.resumed(json.loads((folder / "run.json").read_text(encoding="utf-8")), options)
        arrays = self.arrays()
        with without_warning():
            checkpoint.load(arrays, checkpoint_id=folder)
        set_state_dict(
            self.model, self.optimizer, model_state_dict=arrays["model"], optim_state_dict=arrays["optimizer"]
        )
        return run

    def arrays(self) -> dict[str, Any]:
        """Return the tensors of model and optimizer, by the names of the parameters."""
        of_model, of_optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": of_model, "optimizer": of_optimizer}


@contextlib.contextmanager
def without_warning() -> Iterator[None]:
    """Do not warn of checkpoints of one process alone, which are meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def is_first() -> bool:
    """Return whether this process is the one that prints and writes."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def wait_for_all() -> None:
    """Wait until all processes are here."""
    if distributed.is_initialized():
        distributed.barrier()


# --- Memory ---------------------------------------------------------------------------------------------------------


def loss_memory(rows: int, vocabulary: int, width: int, chunk_size: int | None = None) -> dict[str, int]:
    """Return the bytes that the loss and both of its gradients take, without hidden states and table.

    The profiler reports every allocation and release of torch's CPU allocator in order; the greatest running total is
    the peak.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).requires_grad_()
    table = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    labels = torch.randint(vocabulary, (rows,), generator=generator)

    def in_chunks() -> Tensor:
        return linear_label_smoothed_cross_entropy(hidden, table, labels, chunk_size=chunk_size)

    def all_at_once() -> Tensor:
        return label_smoothed_cross_entropy(hidden @ table.T, labels)

    def needed(loss: Callable[[], Tensor]) -> int:
        os.environ.setdefault(
            "KINETO_LOG_LEVEL", "6"
        )  # else the profiler writes a line to stderr at each start and stop
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            gradients = torch.autograd.grad(loss(), (hidden, table))
        del gradients
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
        return max(accumulate(change for _, change in sorted(changes)), default=0)

    return {"all logits at once": needed(all_at_once), "in chunks": needed(in_chunks)}


# --- The command line -----------------------------------------------------------------------------------------------

app = new_app()


@app.command()
def main(  # noqa: PLR0913, PLR0917 - the options of the command line
    steps: Steps = 256,
    smoothing: Smoothing = 0.1,
    vocabulary: Vocabulary = 8192,
    width: Width = 128,
    batch_size: BatchSize = 16,
    chunk_size: ChunkSize = None,
    seed: Seed = 0,
    mesh: MeshOption = "1x1",
    checkpoint_every: CheckpointEvery = None,
    resume: Resume = False,
    output: RunFolder = Path("out/torch_lm"),
) -> None:
    """Train a small language model on the documentation of Python in torch.

    The tables show the perplexity of documents that it has not seen, and how much memory the loss takes: with all
    logits at once, and in chunks, which is how the model is trained.

    On a mesh each device is a process, which torchrun starts.
    """
    number, processes = math.prod(mesh), int(os.environ.get("WORLD_SIZE", "1"))
    if processes != number:
        command = f"torchrun --standalone --nproc-per-node {number} -m examples.torch_lm"
        problem = f"{mesh} needs {number} processes, and there are {processes}: start it with {command}."
        raise typer.BadParameter(problem, param_hint="'--mesh'")
    options = Options(steps, smoothing, vocabulary, width, batch_size, chunk_size, seed, mesh)
    checkpoints = Checkpoints(output / "checkpoints", checkpoint_every, resume)
    if number > 1:
        distributed.init_process_group("gloo")
    try:
        lm_common.train_and_report(train, loss_memory, options, checkpoints, "torch", output, is_first())
    finally:
        if number > 1:
            distributed.destroy_process_group()


if __name__ == "__main__":
    app()
