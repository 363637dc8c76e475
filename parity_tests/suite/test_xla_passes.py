"""XLA with passes of its compiler switched off, one by one: what they change must stay within the bounds."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import pytest

from parity_tests.losses.adapters import JaxAdapter
from parity_tests.suite.wrong_losses import WRONG_LOSSES
from parity_tests.truth.arithmetic import any_order
from parity_tests.truth.cases import make_case
from parity_tests.truth.comparison import against_oracle
from parity_tests.truth.linear_cases import make_any_case
from parity_tests.truth.oracle import solve

pytestmark = pytest.mark.devices
# Those that XLA for CPUs runs on these losses and that can be left out; without others it ends the process.
PASSES = [
    "algsimp",
    "constant_folding",
    "fusion",
    "reshape-mover",
    "tree_reduction_rewriter",
]
CASES = [
    "uniform_none",
    "everything",
    "minus_infinity",
    "bad_labels",
    "class_mask_max_sup",
    "dominant",
    "linear_everything",
]


def adapter(disabled: str, *, linear: bool = False) -> JaxAdapter:
    made = JaxAdapter(linear=linear, compiler_options={"xla_disable_hlo_passes": disabled})
    # Without the rewriter of sums, or where they are not fused, they may be in any order.
    made.arithmetic = replace(made.arithmetic, depth=any_order)
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("disabled", [*PASSES, ",".join(PASSES)])
def test_losses_are_within_their_bounds(disabled: str, name: str, dtype: str) -> None:
    case = make_any_case(name, dtype)
    made = adapter(disabled, linear=name.startswith("linear"))
    comparison = against_oracle(case, solve(case), made(case), made.arithmetic)
    assert comparison.agrees, comparison


@pytest.mark.parametrize("disabled", ["algsimp", "fusion"])
def test_a_pass_that_is_switched_off_changes_the_program(disabled: str) -> None:
    case = make_case("classes_1009", "float32")
    texts = []
    for options in (None, {"xla_disable_hlo_passes": disabled}):
        made = JaxAdapter(compiler_options=options)
        step, operands = made.step(case)
        texts.append(jax.jit(step, compiler_options=options).lower(*operands).compile().as_text())
    assert texts[0] != texts[1]


@pytest.mark.parametrize("wrong", WRONG_LOSSES)
def test_a_wrong_loss_is_rejected(wrong: Callable[..., Any]) -> None:
    case = make_case("uniform_mean", "float32")
    made = JaxAdapter(wrong, compiler_options={"xla_disable_hlo_passes": "fusion"})
    assert not against_oracle(case, solve(case), made(case), made.arithmetic).agrees
