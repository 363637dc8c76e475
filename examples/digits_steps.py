"""The trainings of `digits_parity` for `lsce-parity trajectory`, which compares them step by step.

    lsce-parity trajectory jax:examples.digits_steps:JaxSteps torch:examples.digits_steps:TorchSteps

Each class has the three methods that the harness asks for: `state` returns every tensor that a step depends on, as
NumPy arrays whose names and layout are the same on both sides; `load` puts such a state back; `step` trains on a batch
that the step's number determines. Write the same for a training of your own: docs/parity.md.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from numpy.typing import NDArray

from examples.digits_parity import FlaxNetwork, JaxTraining, TorchNetwork, TorchTraining, batch_order, read_digits

State = Mapping[str, NDArray[Any]]
LAYERS = ("hidden", "output")
EPOCHS = 30


class JaxSteps:
    """The training in Flax and Optax."""

    def __init__(self, smoothing: float = 0.1, convention: str = "uniform", seed: int = 0) -> None:
        """Set up network, optimizer and batches."""
        self.training = JaxTraining(FlaxNetwork(nnx.Rngs(seed)), smoothing, convention)
        self.batches = Batches(seed)

    def state(self) -> dict[str, NDArray[Any]]:
        """Return weights, both moments of AdamW, and its count of steps."""
        adam = nnx.to_pure_dict(nnx.state(self.training.optimizer))["opt_state"][0]
        weights = nnx.to_pure_dict(nnx.state(self.training.network))
        found = {"count": np.asarray(adam["count"], np.int64)}
        for tree, suffix in ((weights, ""), (adam["mu"], ".mean"), (adam["nu"], ".square")):
            for layer in LAYERS:
                found[f"{layer}.weight{suffix}"] = np.asarray(tree[layer]["kernel"])
                found[f"{layer}.bias{suffix}"] = np.asarray(tree[layer]["bias"])
        return found

    def load(self, state: State) -> None:
        """Put a state back."""

        def tree(suffix: str) -> dict[str, Any]:
            return {
                layer: {
                    "kernel": jnp.asarray(state[f"{layer}.weight{suffix}"]),
                    "bias": jnp.asarray(state[f"{layer}.bias{suffix}"]),
                }
                for layer in LAYERS
            }

        count = jnp.asarray(state["count"], jnp.int32)
        weights, optimizer = nnx.state(self.training.network), nnx.state(self.training.optimizer)
        values = {"opt_state": {0: {"count": count, "mu": tree(".mean"), "nu": tree(".square")}}}
        nnx.replace_by_pure_dict(weights, tree(""))
        nnx.replace_by_pure_dict(optimizer, {**nnx.to_pure_dict(optimizer), **values})
        nnx.update(self.training.network, weights)
        nnx.update(self.training.optimizer, optimizer)

    def step(self, number: int) -> float:
        """Train on one batch and return its loss."""
        return self.training.step(*self.batches[number])


class TorchSteps:
    """The training in torch. Compared with the one in Flax, it starts from that one's weights."""

    def __init__(self, smoothing: float = 0.1, convention: str = "uniform", seed: int = 0) -> None:
        """Set up network, optimizer and batches."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = TorchNetwork()
        self.training = TorchTraining(network, smoothing, convention)
        self.batches = Batches(seed)

    def _tensors(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for layer in LAYERS:
            for name in ("weight", "bias"):
                yield f"{layer}.{name}", getattr(getattr(self.training.network, layer), name)

    def state(self) -> dict[str, NDArray[Any]]:
        """Return weights, both moments of AdamW, and its count of steps; weights [in, out], as in Flax."""
        found = {"count": np.asarray(0, np.int64)}
        for name, weight in self._tensors():
            adam = self.training.optimizer.state[weight]
            found[name] = weight.detach().numpy().T
            # torch makes the moments at the first step.
            found[f"{name}.mean"] = adam["exp_avg"].numpy().T if adam else np.zeros_like(found[name])
            found[f"{name}.square"] = adam["exp_avg_sq"].numpy().T if adam else np.zeros_like(found[name])
            found["count"] = np.asarray(int(adam["step"]) if adam else 0, np.int64)
        return found

    def load(self, state: State) -> None:
        """Put a state back."""
        for name, weight in self._tensors():
            with torch.no_grad():
                weight.copy_(torch.tensor(state[name].T))
            self.training.optimizer.state[weight] = {
                "step": torch.tensor(float(state["count"])),
                "exp_avg": torch.tensor(state[f"{name}.mean"].T),
                "exp_avg_sq": torch.tensor(state[f"{name}.square"].T),
            }

    def step(self, number: int) -> float:
        """Train on one batch and return its loss."""
        return self.training.step(*self.batches[number])


class Batches:
    """The batches of the digits by number, in the order of `digits_parity`."""

    def __init__(self, seed: int) -> None:
        """Read the digits."""
        self.digits = read_digits(seed)
        self.order = np.concatenate(batch_order(len(self.digits.train_labels), EPOCHS, seed))

    def __getitem__(self, number: int) -> tuple[Any, Any]:
        """Return images and labels; after the last batch comes the first again."""
        rows = self.order[number % len(self.order)]
        return self.digits.train_images[rows], self.digits.train_labels[rows]
