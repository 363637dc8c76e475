"""Where two models part: right ports agree, and each mistake is found in its layer and direction."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

from examples import layers_models
from parity_tests.losses.models import LOSS, MODEL, ModelError
from parity_tests.losses.models_jax import JaxModel
from parity_tests.losses.models_torch import TorchModel
from parity_tests.meta.running import invoke, run_code
from parity_tests.studies.layer_pairs import tokens
from parity_tests.studies.layers import LayerVerdict, ModelsVerdict, compare_layers


@pytest.fixture(autouse=True)
def _standard(one_thread: None) -> Iterator[None]:
    """Flax does not take the strictness of our tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def shares(verdict: ModelsVerdict) -> dict[str, tuple[float, float]]:
    return {each.name: (each.share("forward"), each.share("backward")) for each in verdict.layers}


def parting(verdict: ModelsVerdict) -> list[str]:
    return [each.name for each in verdict.layers if not each.agrees]


def layer(verdict: ModelsVerdict, name: str) -> LayerVerdict:
    return next(each for each in verdict.layers if each.name == name)


# --- A transformer block ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def block() -> JaxModel:
    """The block in Flax. It is compiled once."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return JaxModel(*layers_models.JaxBlock())


class Attention(layers_models.TorchAttention):
    def __init__(self, scale: float = 1.0, dropout: float = 0.0, detached: bool = False, narrow: bool = False) -> None:
        super().__init__()
        self.scale, self.rate, self.detached, self.narrow = scale, dropout, detached, narrow

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            each(x).view(*x.shape[:2], layers_models.HEADS, -1).transpose(1, 2)
            for each in (self.query, self.key, self.value)
        )
        if self.detached:
            key = key.detach()
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale / query.shape[-1] ** 0.5, dropout_p=self.rate
        )
        mixed = mixed.bfloat16().float() if self.narrow else mixed
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


def port(change: Callable[[Any], None] | None = None, **options: Any) -> TorchModel:
    """Return the block in torch, after a change."""
    model, inputs, loss = layers_models.TorchBlock(**options)
    if change is not None:
        change(model)
    return TorchModel(model, inputs, loss)


def with_attention(**options: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model, "attention", Attention(**options))


def without_bias(model: Any) -> None:
    model.narrow = torch.nn.Linear(2 * layers_models.WIDTH, layers_models.WIDTH, bias=False)


def test_right_ports_agree(block: JaxModel) -> None:
    verdict = compare_layers(block, port())
    assert verdict.agrees is True
    assert not verdict.left_out
    assert [each.name for each in verdict.layers][:4] == [MODEL, "embed", "norm_1", "attention"]
    assert verdict.layers[-1].name == LOSS
    assert verdict.layers[2].other == "norm1"
    assert max(max(pair) for pair in shares(verdict).values()) < 0.5
    assert all(each.dtype == "float32" for each in verdict.layers)
    # jax.nn computes the softmax of attention in float32, whatever it is given.
    assert [each.name for each in verdict.layers if each.no_exact] == ["attention"]


FAULTS = {
    "eps": (port, {"eps": 1e-6}, ["norm_1", "norm_2"], "forward", "output"),
    "gelu": (port, {"approximate": "tanh"}, [MODEL], "forward", "input of narrow"),
    "scale": (port, {"change": with_attention(scale=1.01)}, ["attention"], "forward", "input of attention.out"),
    "stopped gradient": (
        port,
        {"change": with_attention(detached=True)},
        ["attention"],
        "backward",
        "gradient of the output of key",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_mistakes_are_found_in_their_layers(block: JaxModel, fault: str) -> None:
    make, options, names, direction, what = FAULTS[fault]
    verdict = compare_layers(block, make(**options))
    assert parting(verdict) == names
    assert verdict.agrees is False
    found = verdict.first
    assert found is not None
    assert found.name == names[0]
    assert (found.beyond("forward") is None) == (direction == "backward")
    part = found.beyond(direction)
    assert part is not None
    assert part.what == what.replace("attention.", "")
    assert part.first != part.second
    assert part.is_function == (names != ["attention"])
