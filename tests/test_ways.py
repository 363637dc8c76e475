"""`explain` names the way that a call takes, and a reason for each way that it does not take."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lsce_jax
import lsce_torch
from lsce_torch import lean, reference, sweeps

LOGITS, LABELS = np.eye(4, 3, dtype=np.float32), np.array([0, 1, 2, 0])
SOFT = np.full((4, 3), 1 / 3, np.float32)
WEIGHT = torch.ones(3, requires_grad=True)

TORCH: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("log-probabilities", {}),
    "z-loss": ("sweeps", {"z_loss": 1e-4}),
    "class mask": ("sweeps", {"class_mask": torch.tensor([True, True, True])}),
    "bad label": ("sweeps", {"labels": torch.tensor([0, 1, 3, 0])}),
    "small losses": ("sweeps", {"logits": torch.tensor(90 * LOGITS), "smoothing": 0.0}),
    "weights with a gradient": ("reference", {"class_weight": WEIGHT}),
    "reference": ("reference", {"implementation": "reference"}),
}
JAX: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("cpu sums", {}),
    "soft labels": ("checkpoint", {"labels": jnp.asarray(SOFT)}),
    "many classes": ("cpu sums", {"logits": jnp.zeros((512, 8192)), "labels": jnp.zeros(512, int)}),
    "reference": ("reference", {"implementation": "reference"}),
}


@pytest.mark.filterwarnings("ignore:.*label")
@pytest.mark.parametrize("name", TORCH)
def test_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    way, options = TORCH[name]
    taken = []
    for module, function, ways in (
        (lean, "loss", {"log-probabilities"}),
        (reference, "row_losses", {"reference"}),
        (sweeps, "_block_of_sums", {"sweeps"}),
    ):
        original = getattr(module, function)

        def noted(*arguments: Any, ways: Any = ways, original: Any = original) -> Any:
            result = original(*arguments)
            taken.extend(ways if result is not None else ())
            return result

        monkeypatch.setattr(module, function, noted)
    found = lsce_torch.explain(**{"logits": torch.tensor(LOGITS), "labels": torch.tensor(LABELS)} | options)
    assert ([found.way], [*found.passed_over]) == (taken, ways_before(lsce_torch.ways.WAYS, way, "shards"))
    assert "triton" in found.passed_over


@pytest.mark.parametrize("name", JAX)
def test_jax(name: str) -> None:
    way, options = JAX[name]
    found = lsce_jax.explain(**{"logits": jnp.asarray(LOGITS), "labels": jnp.asarray(LABELS)} | options)
    assert (found.way, [*found.passed_over]) == (way, ways_before(lsce_jax.ways.WAYS, way))
    traced = {}

    def loss(logits: jax.Array) -> jax.Array:
        traced["jit"] = lsce_jax.explain(**{"labels": jnp.asarray(LABELS)} | options | {"logits": logits})
        return logits

    jax.jit(loss)(options.get("logits", jnp.asarray(LOGITS)))
    assert traced["jit"] == found


def ways_before(ways: dict[str, str], way: str, *left_out: str) -> list[str]:
    names = [name for name in ways if name not in left_out]
    return names[: names.index(way)]


def test_as_text() -> None:
    found = lsce_torch.explain(torch.tensor(LOGITS), torch.tensor(LABELS), softcap=30.0)
    first, *others = str(found).splitlines()
    assert first == f"sweeps: {lsce_torch.ways.WAYS['sweeps']}"
    assert others == [f"not {way}: {reason}" for way, reason in found.passed_over.items()]


def test_kernels_that_were_asked_for() -> None:
    with pytest.raises(ValueError, match="triton"):
        lsce_torch.explain(torch.tensor(LOGITS), torch.tensor(LABELS), implementation="triton")
    with pytest.raises(ValueError, match="pallas"):
        lsce_jax.explain(jnp.asarray(LOGITS), jnp.asarray(SOFT), implementation="pallas")
