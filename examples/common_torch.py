"""What the torch examples share: the network for the digits, optimizers and metrics. In JAX: common_jax.py."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torchmetrics import MetricCollection

from examples.common import BETA1, BETA2, CLASSES, EPSILON, PIXELS, Metrics, WeightOf, initial_weights
from lsce_torch import label_smoothed_cross_entropy_with_stats
from lsce_torch.metrics import Accuracy, CalibrationError, MeanNLL

adam = partial(torch.optim.Adam, betas=(BETA1, BETA2), eps=EPSILON)
adamw = partial(torch.optim.AdamW, betas=(BETA1, BETA2), eps=EPSILON)

# Where the dimensions [..., in, out] of a weight from NumPy, as in Flax, are in torch.
DIMENSIONS = {nn.Linear: (1, 0), nn.Conv1d: (2, 1, 0), nn.Conv2d: (2, 3, 1, 0), nn.Embedding: (0, 1), nn.RMSNorm: (0,)}


@torch.no_grad()
def set_weights(network: nn.Module, weight_of: WeightOf) -> None:
    """Set the weight of each layer by its name and shape, and its bias to 0."""
    for name, layer in network.named_modules():
        if type(layer) in DIMENSIONS:
            weight = layer.weight.permute(DIMENSIONS[type(layer)])
            weight.copy_(torch.from_numpy(weight_of(name, tuple(weight.shape))))
            if getattr(layer, "bias", None) is not None:
                layer.bias.zero_()


class Network(nn.Module):
    """Pixels to logits, with hidden layers of given widths. Weights are float32, the arithmetic is in `dtype`.

    SiLU is smooth. At the kink of a ReLU one rounding can choose another slope, and then the trainings in the two
    frameworks part by far more than their roundings.
    """

    def __init__(self, hidden: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> None:
        """Make the layers, with weights from NumPy."""
        super().__init__()
        self.dtype = dtype
        self.layers = nn.ModuleList(nn.Linear(*width) for width in pairwise([PIXELS, *hidden, CLASSES]))
        set_weights(self, initial_weights(seed))

    def forward(self, images: Float32[Tensor, "N 64"]) -> Float[Tensor, "N 10"]:
        """Return the logits."""
        *hidden, output = self.layers
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            for layer in hidden:
                images = nn.functional.silu(layer(images))
            return output(images)


@torch.no_grad()
def compute_metrics(
    network: nn.Module, inputs: Tensor, labels: Tensor, where: Tensor | None
) -> dict[str, Float32[Tensor, ""]]:
    """Return the metrics of a network. One sweep over the logits serves all of them."""
    metrics = MetricCollection({"accuracy": Accuracy(), "nll": MeanNLL(), "calibration_error": CalibrationError()})
    _, stats = label_smoothed_cross_entropy_with_stats(network(inputs), labels, where=where)
    metrics.update(stats=stats)
    return metrics.compute()


def evaluate(network: nn.Module, inputs: np.ndarray, labels: np.ndarray, where: np.ndarray | None = None) -> Metrics:
    """Return accuracy, nll and calibration error of a network, as numbers."""
    where = None if where is None else torch.from_numpy(where)
    metrics = compute_metrics(network, torch.from_numpy(inputs), torch.from_numpy(labels), where)
    return {name: float(value) for name, value in metrics.items()}
