"""How each loss is called in torch. Each function loads what it needs, and returns the loss for a device.

Other libraries' losses are called as their sources say: liger-kernel 0.8.5, cut-cross-entropy 25.1.1, quack-kernels
0.6.5, flash-attn 2.8.3, timm 1.0, Keras 3.15.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lsce_torch
from benchmarks.engines.losses import KERNELS, SMOOTHING, load
from lsce_spec import ChunkOptions
from lsce_torch import kernels
from lsce_torch.chunked import preferred_rows
from parity_tests.losses.adapters import UnavailableError

Function = Callable[..., Any]


def _call(call: str, device: str, **options: Any) -> Function:
    function: Function = getattr(sys.modules[__name__], call)(device, **options)
    return function


# --- torch and ours -------------------------------------------------------------------------------------------------


def cross_entropy(_: str, **options: Any) -> Function:
    """Return torch's loss of logits."""
    return partial(F.cross_entropy, **options)


def linear_cross_entropy(_: str, in_chunks: bool = False, **options: Any) -> Function:
    """Return torch's loss of a layer."""
    if not hasattr(F, "linear_cross_entropy"):
        raise UnavailableError(f"torch {torch.__version__} has none; torch 2.13 brought it")
    return partial(
        F.linear_cross_entropy, **options, **({"options": nn.LinearCrossEntropyOptions()} if in_chunks else {})
    )


def cross_entropy_of_rows(_: str) -> Function:
    """Return torch's loss of each row, from all logits, in float32."""
    return lambda hidden, weight, labels: F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")


def dense(_: str, **options: Any) -> Function:
    """Return our loss of logits, whose classes are in dimension 1."""
    return partial(lsce_torch.label_smoothed_cross_entropy, smoothing=SMOOTHING, axis=1, **options)


def best(device: str, **options: Any) -> Function:
    """Return our loss of logits by the implementation that is chosen on the device."""
    return dense(device, implementation=KERNELS.get(device, "fused"), **options)


def best_with_statistics(device: str) -> Function:
    """Return the same with statistics."""
    implementation: Any = KERNELS.get(device, "fused")
    return partial(
        lsce_torch.label_smoothed_cross_entropy_with_stats, smoothing=SMOOTHING, axis=1, implementation=implementation
    )


def linear(_: str, smoothing: float = SMOOTHING, **options: Any) -> Function:
    """Return our loss of a layer."""
    return partial(lsce_torch.linear_label_smoothed_cross_entropy, smoothing=smoothing, **options)


def linear_with_statistics(_: str) -> Function:
    """Return the same with statistics."""
    return partial(lsce_torch.linear_label_smoothed_cross_entropy_with_stats, smoothing=SMOOTHING)


def none_then_mean(device: str) -> Function:
    """Return the mean of our losses of rows."""
    of_rows = linear(device, reduction="none")
    return lambda *given: of_rows(*given).mean()


def on_logits(device: str, call: str = "", of: str = "", **options: Any) -> Function:
    """Return a loss of a layer that is given all logits."""
    loss = _call(call or of, device, **options)
    return lambda hidden, weight, labels: loss(hidden @ weight.T, labels)


def compiled(device: str, call: str, fullgraph: bool = False, **options: Any) -> Function:
    """Return a loss through torch.compile."""
    function: Function = torch.compile(_call(call, device, **options), dynamic=False, fullgraph=fullgraph)
    return function


def forced(device: str, call: str) -> Function:
    """Return a loss of ours by its Triton kernels, or nothing."""
    reason = kernels.reason_against(torch.zeros(1, 1, device=device))
    if reason is not None:
        raise UnavailableError(reason)
    return _call(call, device, implementation="triton")


def add_smoothing(loss: Function, of_rows: bool) -> Function:
    """Return a linear loss with smoothing added: to the loss of each row, or to the mean."""
    add = partial(lsce_torch.linear_add_smoothing, smoothing=SMOOTHING)
    if of_rows:
        return lambda hidden, weight, labels: add(loss(hidden, weight, labels), hidden, weight, labels).mean()
    return lambda hidden, weight, labels: (
        loss(hidden, weight, labels) + add(hidden.new_zeros(labels.shape), hidden, weight, labels).mean()
    )


# --- Floors ---------------------------------------------------------------------------------------------------------


def write(_: str) -> Function:
    """Only write a tensor, in pages as the system gives them; lsce fused asks for large ones, which cost less."""
    return lambda logits, labels: torch.empty_like(logits).fill_(1)


def products(_: str) -> Function:
    """Return what makes only the products, some rows at a time: with the logits in the place of their gradient."""

    @torch.no_grad()
    def products_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        del labels
        of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        size = ChunkOptions().rows_at_most(preferred_rows(hidden.shape[1]), weight.shape[0])
        buffer = hidden.new_empty(min(size, hidden.shape[0]), weight.shape[0])
        for rows, of_rows in zip(hidden.split(size), of_hidden.split(size), strict=True):
            logits = torch.mm(rows, weight.T, out=buffer[: rows.shape[0]])
            torch.mm(logits, weight, out=of_rows)
            of_weight.addmm_(logits.T, rows)
        return of_hidden, of_weight

    return products_of


# --- Other libraries ------------------------------------------------------------------------------------------------


def timm(_: str) -> Function:
    """Return timm's loss."""
    loss: Function = load("timm.loss", "timm").LabelSmoothingCrossEntropy(SMOOTHING)
    return loss


def clamped_one_hot(_: str) -> Function:
    """Return the module that people copy."""
    return ClampedOneHotLoss()


class ClampedOneHotLoss(nn.Module):
    """The module that people copy: the one-hot target, clamped, times the log-probabilities.

    Our `CELossWithLabelSmoothing` returns the same, without the one-hot target.
    """

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss; logits [N, K], labels [N]."""
        log_p = F.log_softmax(logits, dim=1)
        one_hot = torch.zeros_like(log_p).scatter_(1, labels.unsqueeze(1), 1)
        target = one_hot.clamp(min=SMOOTHING / (logits.shape[1] - 1), max=1 - SMOOTHING)
        return -(target * log_p).sum(dim=1).mean()


def keras(_: str) -> Function:
    """Return Keras's loss of one-hot targets."""
    library = load("keras", "keras")
    if library.backend.backend() != "torch":
        raise UnavailableError("Keras has another backend: KERAS_BACKEND must be torch when it is imported")
    loss = library.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=SMOOTHING)
    return lambda logits, labels: loss(library.ops.one_hot(labels, logits.shape[-1]), logits)


def _check_triton(device: str) -> None:
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UnavailableError("its kernels are Triton's: on a CPU set TRITON_INTERPRET=1 in the environment")


def _check_cuda(device: str) -> None:
    if device != "cuda":
        raise UnavailableError("it takes tensors of a CUDA device only")


def liger(device: str, name: str) -> Function:
    """Return a loss of Liger."""
    loss: Function = getattr(load("liger_kernel.transformers", "liger-kernel"), name)(label_smoothing=SMOOTHING)
    _check_triton(device)
    if name == "LigerCrossEntropyLoss":
        return loss
    return lambda hidden, weight, labels: loss(weight, hidden, labels)


def cut_cross_entropy(device: str, **options: Any) -> Function:
    """Return the loss of cut-cross-entropy."""
    loss = load("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    if options.get("impl") != "torch_compile":
        _check_cuda(device)  # Triton's interpreter does not take its kernels
    return partial(loss, **options)


def quack(device: str) -> Function:
    """Return QuACK's loss of logits."""
    loss: Function = load("quack", "quack-kernels").cross_entropy
    _check_cuda(device)
    return loss


def quack_linear(device: str) -> Function:
    """Return QuACK's loss of a layer."""
    loss: Function = load("quack.linear_cross_entropy", "quack-kernels").chunked_linear_cross_entropy
    _check_cuda(device)
    return loss


def flash_attention(device: str) -> Function:
    """Return the loss from its file: the package imports the compiled part of the library, which it does not need."""
    package = importlib.util.find_spec("flash_attn")
    if package is None or not package.submodule_search_locations:
        raise UnavailableError("flash-attn is not installed")
    file = Path(package.submodule_search_locations[0]) / "ops/triton/cross_entropy.py"
    spec = importlib.util.spec_from_file_location("flash_attn_triton_cross_entropy", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UnavailableError(f"flash-attn has no file {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _check_cuda(device)  # it looks for the index of a CUDA device
    return lambda logits, labels: module.cross_entropy_loss(logits, labels, label_smoothing=SMOOTHING)[0].mean()
