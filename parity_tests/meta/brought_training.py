"""A training in NumPy that stands for one that a user brings, named on the command line."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Momentum:
    """Gradient descent with momentum on a quadratic, in float32, with what is wrong as options."""

    def __init__(
        self,
        rate: float = 0.125,
        wrong_from: int | None = None,
        element: tuple[int, int] | None = None,
        nan_at: int | None = None,
        hidden: bool = False,
        rename: bool = False,
        transpose: bool = False,
        dtype: str = "float32",
    ) -> None:
        self.rate, self.wrong_from, self.element, self.nan_at = rate, wrong_from, element, nan_at
        self.hidden, self.rename, self.transpose, self.calls = hidden, rename, transpose, 0
        random = np.random.default_rng(0)
        self.weight = random.normal(size=(4, 3)).astype(np.float32)
        self.velocity, self.count = np.zeros((4, 3), np.float32), 0
        self.dtype = dtype

    def state(self) -> dict[str, NDArray[Any]]:
        weight = self.weight.T if self.transpose else self.weight
        return {
            "weights" if self.rename else "weight": weight.astype(self.dtype),
            "velocity": self.velocity,
            "count": np.array(self.count),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.weight, self.velocity = state["weight"].astype(np.float32), state["velocity"].copy()
        self.count = int(state["count"])

    def step(self, number: int) -> float:
        inputs = np.random.default_rng(number).normal(size=(8, 4)).astype(np.float32)
        outputs = inputs @ self.weight
        loss = (outputs * outputs).mean() / 2
        gradient = inputs.T @ outputs / np.float32(outputs.size)
        rate = self.rate
        if self.wrong_from is not None and number >= self.wrong_from:
            if self.element:
                gradient[self.element] *= np.float32(1.001)
            else:
                rate *= 1.001
        self.velocity = np.float32(0.875) * self.velocity + gradient
        self.weight = self.weight - np.float32(rate) * self.velocity
        self.count += 1
        self.calls += 1
        if self.hidden:
            self.weight = self.weight + np.float32(1e-3) * np.float32(self.calls)
        if self.nan_at == number:
            self.weight[2, 1] = np.nan
        return float(loss)
