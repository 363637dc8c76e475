"""What users of torch would take in place of our losses, for `benchmarks all`: by session, which is one process.

Other libraries' losses are called as their sources say: those of `device_torch`, timm 1.0, Keras 3.15 and the
torch.compile path of cut-cross-entropy 25.1.1.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.engines import device_torch
from benchmarks.engines.device_losses import SMOOTHING, Loss, load
from benchmarks.engines.sessions import CUT, KERAS_TORCH, NEEDS_GPU
from parity_tests.losses.adapters import UnavailableError

CLAMP = {"convention": "clamp"}
# Their kernels are Triton's or CUDA's.
ON_GPUS = frozenset({"Liger", "flash-attention", "QuACK*", "cut-cross-entropy*", "cut-cross-entropy, filtered*"})
# On every device one of these is what `lsce` takes; the pages of the devices have them one by one.
IMPLEMENTATIONS = frozenset({"lsce triton", "lsce fused", "lsce linear triton", "lsce linear chunked"})


def losses(session: str, linear: bool, dtype: str, device: str) -> list[Loss]:
    """Return the losses of a session, the one first that the others are compared with."""
    usual = [
        loss._replace(make=_needs_gpu) if device == "cpu" and loss.name in ON_GPUS else loss
        for loss in device_torch.losses(linear, dtype, device)
        if loss.name not in IMPLEMENTATIONS
    ]
    few = [loss for loss in usual if loss.name in {device_torch.DENSE_BASELINE, "lsce", "lsce linear"}]
    if session == KERAS_TORCH:
        return [*few, Loss("Keras", _keras)]
    if session == CUT:
        return [*few, Loss("cut-cross-entropy, compiled*", _cut_cross_entropy, 0.0, compiled=True)]
    if linear:
        return usual if hasattr(F, "linear_cross_entropy") else [*usual, Loss("F.linear_cross_entropy", _too_old)]
    ours = partial(device_torch.DENSE, convention="clamp")
    return [
        *usual,
        Loss("timm", lambda: load("timm.loss", "timm").LabelSmoothingCrossEntropy(SMOOTHING)),
        Loss("clamped one-hot module", ClampedOneHotLoss, options=CLAMP),
        Loss("lsce, clamp", lambda: ours, ours=True, options=CLAMP),
    ]


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


def _keras() -> Callable[..., Tensor]:
    keras = load("keras", "keras")
    if keras.backend.backend() != "torch":
        raise UnavailableError("Keras has another backend: KERAS_BACKEND must be torch when it is imported")
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=SMOOTHING)
    return lambda logits, labels: loss(keras.ops.one_hot(labels, logits.shape[-1]), logits)


def _cut_cross_entropy() -> Callable[..., Tensor]:
    return partial(load("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy, impl="torch_compile")


def _needs_gpu() -> Callable[..., Tensor]:
    raise UnavailableError(NEEDS_GPU)


def _too_old() -> Callable[..., Tensor]:
    raise UnavailableError(f"torch {torch.__version__} has none; torch 2.13 brought it")
