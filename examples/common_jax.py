"""What the JAX examples share: the network for the digits, optimizers and metrics. In torch: common_torch.py."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Float32

from examples.common import BETA1, BETA2, CLASSES, EPSILON, PIXELS, Metrics, WeightOf, initial_weights
from lsce_jax import label_smoothed_cross_entropy_with_stats
from lsce_jax.metrics import Accuracy, CalibrationError, MeanNLL

adam = partial(optax.adam, b1=BETA1, b2=BETA2, eps=EPSILON)
adamw = partial(optax.adamw, b1=BETA1, b2=BETA2, eps=EPSILON)

WEIGHTS = {nnx.Conv: "kernel", nnx.Embed: "embedding", nnx.Linear: "kernel", nnx.RMSNorm: "scale"}


def set_weights(network: nnx.Module, weight_of: WeightOf) -> None:
    """Set the weight of each layer by its name and shape. Biases are 0 in Flax already."""
    for path, layer in nnx.iter_modules(network):
        if type(layer) in WEIGHTS:
            weight = getattr(layer, WEIGHTS[type(layer)])
            weight[...] = jnp.asarray(weight_of(".".join(map(str, path)), weight.shape))


class Network(nnx.Module):
    """Pixels to logits, with hidden layers of given widths. Weights are float32, the arithmetic is in `dtype`.

    SiLU is smooth. At the kink of a ReLU one rounding can choose another slope, and then the trainings in the two
    frameworks part by far more than their roundings.
    """

    def __init__(self, hidden: Sequence[int], seed: int, dtype: DTypeLike = jnp.float32) -> None:
        """Make the layers, with weights from NumPy."""
        widths = pairwise([PIXELS, *hidden, CLASSES])
        self.layers = nnx.List([nnx.Linear(*width, dtype=dtype, rngs=nnx.Rngs(0)) for width in widths])
        set_weights(self, initial_weights(seed))

    def __call__(self, images: Float[Array, "N 64"]) -> Float[Array, "N 10"]:
        """Return the logits."""
        *hidden, output = self.layers
        for layer in hidden:
            images = nnx.silu(layer(images))
        return output(images)


@nnx.jit
def compute_metrics(
    network: nnx.Module, inputs: Array, labels: Array, where: Array | None
) -> dict[str, Float32[Array, ""]]:
    """Return the metrics of a network. One sweep over the logits serves all of them."""
    metrics = nnx.MultiMetric(accuracy=Accuracy(), nll=MeanNLL(), calibration_error=CalibrationError())
    _, stats = label_smoothed_cross_entropy_with_stats(network(inputs), labels, where=where)
    metrics.update(stats=stats)
    return metrics.compute()


def evaluate(network: nnx.Module, inputs: np.ndarray, labels: np.ndarray, where: np.ndarray | None = None) -> Metrics:
    """Return accuracy, nll and calibration error of a network, as numbers."""
    return {name: float(value) for name, value in compute_metrics(network, inputs, labels, where).items()}
