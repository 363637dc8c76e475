"""Train a small language model in Flax and Optax, with the last linear layer and the loss in one.

    .venv/bin/python -m examples.jax_lm --steps 256 --vocabulary 8192

A language model has more logits than anything else: a row of the size of the vocabulary for each token of a batch, and
its gradient. `linear_label_smoothed_cross_entropy` takes the input of the last layer, and never has more than a few
rows of logits in memory. The layer's weight is the embedding table, whose gradient comes from both ends.

The text is documentation that comes with Python, in tokens of a BPE that is trained on it. The measure is the
perplexity of documents that the model has not seen, beside that of a model that knows the frequency of each token only.

The script prints two tables, draws a plot and writes the losses of all steps. Text, tables and plot are in
lm_common.py. The same in torch: torch_lm.py, from the same weights on the same batches. The losses of the two differ by
rounding, which this training amplifies: by 1e-6 up to step 32, by 1e-4 at step 128 and by 0.02 at step 256, where the
perplexities are 490 and 497. JAX runs whose starting weights are moved by one rounding step differ from the first one
by up to 0.02, too, with perplexities of 491 to 495.
"""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint
import typer
from flax import nnx
from jax.sharding import AxisType
from jaxtyping import Array, Float32, Int32

from examples import lm_common
from examples.common import Smoothing, new_app
from examples.common_jax import adamw, set_weights
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
)
from lsce_jax import (
    label_smoothed_cross_entropy,
    linear_label_smoothed_cross_entropy,
    linear_label_smoothed_cross_entropy_with_stats,
)
from lsce_jax.metrics import Perplexity

EVALUATIONS = 8  # in training, besides the one before

# --- Network --------------------------------------------------------------------------------------------------------


class Layer(nnx.Module):
    """Attention to the tokens so far, then a layer for each token; both add to the residual stream."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        """Make the modules."""
        self.norm1 = nnx.RMSNorm(width, epsilon=NORM_EPSILON, rngs=rngs)
        self.attend = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.gather = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.norm2 = nnx.RMSNorm(width, epsilon=NORM_EPSILON, rngs=rngs)
        self.expand = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.contract = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, stream: Float32[Array, "N T D"]) -> Float32[Array, "N T D"]:
        """Return the stream plus the output of the layer."""
        split = self.attend(self.norm1(stream)).reshape(*stream.shape[:2], 3, HEADS, -1)
        query, key, value = (split[:, :, part] for part in range(3))
        seen = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.gather(seen.reshape(stream.shape))
        return stream + self.contract(nnx.silu(self.expand(self.norm2(stream))))


class LanguageModel(nnx.Module):
    """Tokens to the input of the last linear layer, whose weight is the embedding table."""

    def __init__(self, weights: Weights) -> None:
        """Make the modules, with these weights."""
        vocabulary, width = weights["embed"].shape
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.position = nnx.Embed(CONTEXT, width, rngs=rngs)
        self.layers = nnx.List([Layer(width, rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(width, epsilon=NORM_EPSILON, rngs=rngs)
        set_weights(self, lambda name, shape: weights[name])

    def __call__(self, tokens: Int32[Array, "N T"]) -> Float32[Array, "N T D"]:
        """Return the hidden states."""
        stream = self.embed(tokens) + self.position.embedding[None, : tokens.shape[1]]
        for layer in self.layers:
            stream = layer(stream)
        return self.norm(stream)


# --- Training -------------------------------------------------------------------------------------------------------

Optimizer = nnx.Optimizer[LanguageModel]
# The axes of the mesh that divide the weights, and what the optimizer has for each, by the names of their modules.
DIVIDED = {"embed": ("model", None), "expand": (None, "model"), "contract": ("model", None)}


def learning_rate(step: Int32[Array, ""]) -> Float32[Array, ""]:
    """Return the learning rate of a step, counted from 0. It rises while Adam has seen few gradients."""
    part = jnp.minimum(step + 1, lm_common.WARM_UP).astype(jnp.float32) / lm_common.WARM_UP
    return lm_common.LEARNING_RATE * part


# Made once: `nnx.jit` would compile again for another one, even if it is equal.
ADAMW = adamw(learning_rate, weight_decay=lm_common.WEIGHT_DECAY)


def make_optimizer(model: LanguageModel) -> Optimizer:
    """Return AdamW."""
    return nnx.Optimizer(model, ADAMW, wrt=nnx.Param)


def on_mesh(module: nnx.Module, mesh: jax.sharding.Mesh) -> None:
    """Place a module's arrays: table and layers of each token divided over "model", the others on every device."""

    def place(path: tuple[Any, ...], array: Array) -> Array:
        names = {str(getattr(key, "key", key)) for key in path}
        axes = next((axes for name, axes in DIVIDED.items() if name in names and array.ndim == len(axes)), ())
        return jax.device_put(array, jax.NamedSharding(mesh, jax.P(*axes)))

    nnx.update(module, jax.tree_util.tree_map_with_path(place, nnx.state(module)))


def mean_loss(model: LanguageModel, windows: Array, options: Options) -> Float32[Array, ""]:
    """Return the mean loss of the next tokens."""
    return linear_label_smoothed_cross_entropy(
        model(windows[:, :-1]),
        model.embed.embedding.T,
        windows[:, 1:],
        smoothing=options.smoothing,
        reduction="mean",
        chunk_size=options.chunk_size,
    )


@nnx.jit(static_argnames="options")
def train_step(model: LanguageModel, optimizer: Optimizer, windows: Array, options: Options) -> Float32[Array, ""]:
    """Train on one batch, and return its loss."""
    loss, gradient = nnx.value_and_grad(mean_loss)(model, windows, options)
    optimizer.update(model, gradient)
    return loss


@nnx.jit
def count(model: LanguageModel, windows: Array, metric: Perplexity) -> None:
    """Add the tokens of some windows to the metric."""
    _, stats = linear_label_smoothed_cross_entropy_with_stats(
        model(windows[:, :-1]), model.embed.embedding.T, windows[:, 1:]
    )
    metric.update(stats=stats)


def perplexity(model: LanguageModel, text: Text, rows: jax.NamedSharding) -> float:
    """Return the perplexity of the held-out text, with windows placed as the batch is."""
    metric = Perplexity()
    on_mesh(metric, rows.mesh)
    for windows in lm_common.held_out_batches(text):
        count(model, jax.device_put(windows, rows), metric)
    return float(metric.compute())


def train(
    text: Text,
    options: Options,
    on_step: Callable[[float], object] = lambda loss: None,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> Run:
    """Train a model, and compute the perplexity of the held-out text from time to time."""
    # The compiler divides the rest of the program, and the loss, as the arrays are divided.
    mesh = jax.make_mesh(
        options.mesh,
        ("data", "model"),
        axis_types=2 * (AxisType.Auto,),
        devices=jax.devices()[: math.prod(options.mesh)],
    )
    rows = jax.NamedSharding(mesh, jax.P("data"))
    model = LanguageModel(lm_common.initial_weights(options.vocabulary, options.width, options.seed))
    optimizer = make_optimizer(model)
    for module in (model, optimizer):
        on_mesh(module, mesh)
    saved = Saved(checkpoints, model, optimizer)
    run = saved.restored(options) if checkpoints.resume else Run([], {0: perplexity(model, text, rows)})
    for loss in run.losses:
        on_step(loss)
    looks = {options.steps * part // EVALUATIONS for part in range(1, EVALUATIONS + 1)} - {0}
    for step, windows in enumerate(lm_common.batches(text, options, len(run.losses)), start=len(run.losses) + 1):
        run.losses.append(float(train_step(model, optimizer, jax.device_put(windows, rows), options=options)))
        if step in looks:
            run.perplexities[step] = perplexity(model, text, rows)
        if checkpoints.due(step, options.steps):
            saved.save(run, options)
        on_step(run.losses[-1])
    saved.close()
    return run


class Saved:
    """The checkpoints of a training, by Orbax. A checkpoint is there as a whole or not at all."""

    def __init__(self, checkpoints: Checkpoints, model: LanguageModel, optimizer: Optimizer) -> None:
        """Find the checkpoints in the folder.

        Raises:
            typer.BadParameter: there is none to go on from, or there are some of another run.
        """
        self.modules = {"model": model, "optimizer": optimizer}
        self.manager = None
        if checkpoints.every or checkpoints.resume:
            options = orbax.checkpoint.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
            self.manager = orbax.checkpoint.CheckpointManager(checkpoints.folder.absolute(), options=options)
            lm_common.check_checkpoints(checkpoints, self.manager.latest_step())

    def save(self, run: Run, options: Options) -> None:
        """Write model, optimizer and run."""
        content = {**lm_common.as_json(run), "options": lm_common.fixed_options(options)}
        arrays = {name: nnx.to_pure_dict(nnx.state(module)) for name, module in self.modules.items()}
        of_run, of_arrays = orbax.checkpoint.args.JsonSave(content), orbax.checkpoint.args.StandardSave(arrays)
        self.manager.save(len(run.losses), args=orbax.checkpoint.args.Composite(run=of_run, arrays=of_arrays))

    def restored(self, options: Options) -> Run:
        """Restore model and optimizer, each array placed as it is now, and return the run so far."""
        states = {name: nnx.state(module) for name, module in self.modules.items()}
        wanted = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding),
            {name: nnx.to_pure_dict(state) for name, state in states.items()},
        )
        read, args = self.manager.restore, orbax.checkpoint.args
        # The run first: with other options the arrays may have other shapes.
        run = lm_common.resumed(
            read(self.manager.latest_step(), args=args.Composite(run=args.JsonRestore())).run, options
        )
        of_arrays = args.Composite(arrays=args.StandardRestore(wanted))
        arrays = read(self.manager.latest_step(), args=of_arrays).arrays
        for name, module in self.modules.items():
            nnx.replace_by_pure_dict(states[name], arrays[name])
            nnx.update(module, states[name])
        return run

    def close(self) -> None:
        """Wait until everything is written."""
        if self.manager is not None:
            self.manager.close()


# --- Memory ---------------------------------------------------------------------------------------------------------


def loss_memory(rows: int, vocabulary: int, width: int, chunk_size: int | None = None) -> dict[str, int]:
    """Return the bytes that the loss and both of its gradients take, without hidden states and table.

    The compiled programs report them.
    """
    hidden = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    table = jax.ShapeDtypeStruct((vocabulary, width), jnp.float32)
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def in_chunks(hidden: Array, table: Array, labels: Array) -> Array:
        return linear_label_smoothed_cross_entropy(hidden, table.T, labels, reduction="mean", chunk_size=chunk_size)

    def all_at_once(hidden: Array, table: Array, labels: Array) -> Array:
        return label_smoothed_cross_entropy(hidden @ table.T, labels, reduction="mean")

    def needed(loss: Callable[..., Array]) -> int:
        gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        memory = gradients.lower(hidden, table, labels).compile().memory_analysis()
        return int(memory.temp_size_in_bytes + memory.output_size_in_bytes)

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
    output: RunFolder = Path("out/jax_lm"),
) -> None:
    """Train a small language model on the documentation of Python in JAX.

    The tables show the perplexity of documents that it has not seen, and how much memory the loss takes: with all
    logits at once, and in chunks, which is how the model is trained.

    A CPU counts as as many devices as the mesh has.
    """
    number = math.prod(mesh)
    if number > 1:
        with contextlib.suppress(RuntimeError):  # JAX is running, and has what devices it has
            jax.config.update("jax_num_cpu_devices", number)
    if jax.device_count() < number:
        problem = f"{mesh} needs {number} devices, and JAX finds {jax.device_count()}."
        raise typer.BadParameter(problem, param_hint="'--mesh'")
    options = Options(steps, smoothing, vocabulary, width, batch_size, chunk_size, seed, mesh)
    checkpoints = Checkpoints(output / "checkpoints", checkpoint_every, resume)
    lm_common.train_and_report(train, loss_memory, options, checkpoints, "JAX", output)


if __name__ == "__main__":
    app()
