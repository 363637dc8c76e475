"""The linear loss on TPUs, by tiles of rows and classes: its program, interpreted, with tiles of a few logits."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

import lsce_jax
from lsce_jax import tiles
from lsce_jax.sums import sums_at
from parity_tests.losses.interpreted import InterpretedAdapter
from parity_tests.losses.registry import JAX_NARROW
from parity_tests.plugin import Recorder
from parity_tests.truth.cases import LinearCase
from parity_tests.truth.comparison import against_oracle
from parity_tests.truth.linear_cases import linear_case_names, make_linear_case, with_logits
from parity_tests.truth.oracle import solve

LOSS = partial(lsce_jax.linear_label_smoothed_cross_entropy, recompute=True)
SETTINGS: dict[str, Any] = {
    "loss": LOSS,
    "linear": True,
    "name": "jax-linear-chunked",
    "narrow": JAX_NARROW["reference"],
}
# Every option; the others take minutes together.
FAST = ("linear_everything", "linear_max_sup", "linear_prior")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 rows and 4 classes: of 7 rows and 11 classes the last block and the last tile have fewer."""
    for name, value in (("TILE_SIZE", 12), ("_LANES", 4), ("_SUBLANES", 1), ("MOST_ROWS_TO_SKIP", 2)):
        monkeypatch.setattr(tiles, name, value)


def assert_agrees(case: LinearCase, **settings: Any) -> None:
    interpreted = InterpretedAdapter("tpu", **SETTINGS | settings)
    comparison = against_oracle(case, solve(case), interpreted(case), interpreted.arithmetic)
    assert comparison.agrees, comparison


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.devices)
        for name in linear_case_names()
        if name != "linear_no_rows"  # see `InterpretedAdapter.unsupported`
    ],
)
def test_every_case(name: str, dtype: str, parity_ledger: Recorder) -> None:
    parity_ledger.record("jax-linear-chunked", "tpu", dtype, "interpreted")
    assert_agrees(make_linear_case(name, dtype))


@pytest.mark.parametrize("smoothing", [0.1, 0.0])
def test_a_tile_of_probability_0(smoothing: float) -> None:
    """The largest logit rises by 10000 after the first tile, in which some rows have their label."""
    case = make_linear_case("linear_none", "float32")
    bias = np.array(case.bias)
    bias[:4] = -1e4
    assert 0 < np.sum(case.labels < 4) < case.labels.size
    assert_agrees(with_logits(replace(case, bias=bias, smoothing=smoothing)))


@pytest.mark.parametrize("wrong", ["without", "over_tiles", "over_blocks"])
def test_wrong_sweeps_are_rejected(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One largest term left out in each tile; no last tile; no last block."""
    right = tiles._Tiling.over_tiles
    if wrong == "without":
        monkeypatch.setattr(tiles, "sums_at", lambda *arguments, without: sums_at(*arguments, without=without * 0 + 1))
    elif wrong == "over_tiles":
        monkeypatch.setattr(
            tiles._Tiling,
            "over_tiles",
            lambda tiling, *others: right(tiling._replace(num_classes=tiling.num_classes // 4 * 4), *others),
        )
    else:
        of_blocks = tiles._Tiling.over_blocks
        monkeypatch.setattr(tiles._Tiling, "over_blocks", lambda self, num, *others: of_blocks(self, num - 1, *others))
    with pytest.raises(AssertionError):
        assert_agrees(make_linear_case("linear_none", "float32"))


def test_the_tiles_are_what_is_interpreted() -> None:
    """The program for a TPU has the loops over tiles, that for others the plain formulas, and vmap has them too."""
    case = make_linear_case("linear_none", "float32")
    for_tpu, for_gpu = (InterpretedAdapter(platform, **SETTINGS).module(case)[0] for platform in ("tpu", "cuda"))
    assert "tensor<3x4xf32>" in for_tpu
    assert "tensor<3x4xf32>" not in for_gpu
