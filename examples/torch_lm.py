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

import json
import os
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from jaxtyping import Float32, Int32
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from examples import lm_common
from examples.common import Smoothing, new_app
from examples.common_torch import adamw, set_weights
from examples.lm_common import (
    CONTEXT,
    HEADS,
    LAYERS,
    NORM_EPSILON,
    BatchSize,
    ChunkSize,
    Options,
    Run,
    RunFolder,
    Seed,
    Steps,
    Text,
    Vocabulary,
    Weights,
    Width,
)
from lsce_torch import (
    label_smoothed_cross_entropy,
    linear_label_smoothed_cross_entropy,
    linear_label_smoothed_cross_entropy_with_stats,
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


def mean_loss(model: LanguageModel, windows: Tensor, options: Options) -> Float32[Tensor, ""]:
    """Return the mean loss of the next tokens."""
    return linear_label_smoothed_cross_entropy(
        model(windows[:, :-1]),
        model.embed.weight,
        windows[:, 1:],
        smoothing=options.smoothing,
        chunk_size=options.chunk_size,
    )


def train_step(
    model: LanguageModel, optimizer: Optimizer, windows: Tensor, options: Options, step: int
) -> Float32[Tensor, ""]:
    """Train on one batch, and return its loss."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step)
    optimizer.zero_grad()
    loss = mean_loss(model, windows, options)
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def count(model: LanguageModel, windows: Tensor, metric: Perplexity) -> None:
    """Add the tokens of some windows to the metric."""
    _, stats = linear_label_smoothed_cross_entropy_with_stats(
        model(windows[:, :-1]), model.embed.weight, windows[:, 1:]
    )
    metric.update(stats=stats)


def perplexity(model: LanguageModel, text: Text) -> float:
    """Return the perplexity of the held-out text."""
    metric = Perplexity()
    for windows in lm_common.held_out_batches(text):
        count(model, torch.from_numpy(windows), metric)
    return float(metric.compute())


def train(text: Text, options: Options, on_step: Callable[[float], object] = lambda loss: None) -> Run:
    """Train a model, and compute the perplexity of the held-out text from time to time."""
    model = LanguageModel(lm_common.initial_weights(options.vocabulary, options.width, options.seed))
    optimizer = make_optimizer(model)
    run = Run([], {0: perplexity(model, text)})
    looks = {options.steps * part // EVALUATIONS for part in range(1, EVALUATIONS + 1)} - {0}
    for step, windows in enumerate(lm_common.batches(text, options), start=1):
        loss = train_step(model, optimizer, torch.from_numpy(windows), options, step - 1)
        run.losses.append(float(loss))
        if step in looks:
            run.perplexities[step] = perplexity(model, text)
        on_step(run.losses[-1])
    return run


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
def main(
    steps: Steps = 256,
    smoothing: Smoothing = 0.1,
    vocabulary: Vocabulary = 8192,
    width: Width = 128,
    batch_size: BatchSize = 16,
    chunk_size: ChunkSize = None,
    seed: Seed = 0,
    output: RunFolder = Path("out/torch_lm"),
) -> None:
    """Train a small language model on the documentation of Python in torch.

    The tables show the perplexity of documents that it has not seen, and how much memory the loss takes: with all
    logits at once, and in chunks, which is how the model is trained.
    """
    options = Options(steps, smoothing, vocabulary, width, batch_size, chunk_size, seed)
    lm_common.train_and_report(train, loss_memory, options, "torch", output)


if __name__ == "__main__":
    app()
