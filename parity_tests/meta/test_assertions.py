"""`lsce_parity`: two losses of one's own are held against each other in a test, with no command line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

import lsce_jax
import lsce_parity
import lsce_torch
from lsce_parity import FrameworkError, NoVerdictError, SpecificationError, assert_same_loss, compare_losses
from parity_tests.losses.callables import framework_of, name_of
from parity_tests.meta.running import run_code

pytest_plugins = ["pytester"]


# One small case: the cases that are drawn take seconds.
BATCH = {"logits": np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32), "labels": np.arange(6) % 4}


def torch_focal(logits: Any, labels: Any, gamma: float = 2.0) -> Any:
    nll = F.cross_entropy(logits, labels, reduction="none")
    return ((1 - torch.exp(-nll)) ** gamma * nll).mean()


def jax_focal(logits: Any, labels: Any, gamma: float = 2.0) -> Any:
    log_p = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    return (-((1 - jnp.exp(own)) ** gamma) * own).mean()


def jax_rows(logits: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_the_same_loss_in_both_frameworks(dtype: str) -> None:
    with jax.numpy_dtype_promotion("standard"):  # as users have it
        assert_same_loss(torch_focal, jax_focal, classes=3, dtype=dtype)


def test_the_message_is_the_report() -> None:
    with pytest.raises(AssertionError) as failure:
        assert_same_loss(torch_focal, functools.partial(jax_focal, gamma=2.5), inputs=BATCH)
    lines = str(failure.value).splitlines()
    assert lines[0].startswith("DISAGREE in 1 of 1 case: ")
    assert "they differ in the focal gamma: A 2 | B 2.5" in lines
    assert any(" | B " in line and line.strip().startswith(("gradient", "loss")) for line in lines)


def test_the_true_value_is_shown_where_it_is_known() -> None:
    found = compare_losses(torch.nn.CrossEntropyLoss, jax_rows, options=({"label_smoothing": 0.2}, {}), inputs=BATCH)
    assert found.agrees is False
    assert found.verdict == "DISAGREE"
    assert any(" | B " in line and " | true " in line for line in found.lines())
    assert "they differ in the smoothing: A 0.2 | B -" in found.lines()


def test_class_weights_beside_smoothing_are_named() -> None:
    weight = torch.tensor([1.0, 3.0, 0.5, 2.0])
    options = {"weight": weight, "label_smoothing": 0.2}  # float32, so the loss takes no float64
    found = compare_losses(torch.nn.CrossEntropyLoss, jax_rows, options=(options, {}), inputs=BATCH)
    assert found.agrees is False
    text = "1 for label 0, 3 for label 1, 0.5 for label 2, 2 for label 3 of 4 classes"
    assert f"they differ in the class weights: A {text} | B -" in found.lines()
    assert "they differ in the smoothing: A 0.2 | B -" in found.lines()


def test_texts_and_callables_mix() -> None:
    assert_same_loss(lsce_torch.label_smoothed_cross_entropy, "oracle", smoothing=0.1, inputs=BATCH)
    assert_same_loss("torch:torch.nn.functional:cross_entropy", jax_rows, inputs=BATCH)


def test_no_verdict_is_another_exception() -> None:
    def random(logits: Any, labels: Any) -> Any:
        return F.cross_entropy(logits + torch.rand_like(logits), labels)

    with pytest.raises(NoVerdictError, match="A is random"):
        assert_same_loss(random, jax_focal, inputs=BATCH)


def test_two_losses_of_one_name_are_told_apart() -> None:
    found = compare_losses(torch_focal, functools.partial(torch_focal, gamma=3.0), inputs=BATCH)
    assert [line[:2] for line in found.lines() if line.endswith(("torch_focal (A)", "torch_focal (B)"))] == ["A ", "B "]


# --- Which framework? -------------------------------------------------------------------------------------------------


def by_helper(logits: Any, labels: Any) -> Any:
    return jax_rows(logits, labels).sum()


def imports_within(logits: Any, labels: Any) -> Any:
    import torch.nn.functional as functions  # noqa: PLC0415

    return functions.cross_entropy(logits, labels)


def annotated(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -logits.log_softmax(-1).gather(1, labels[:, None]).mean()


def by_methods(logits: Any, labels: Any) -> Any:
    return -logits.log_softmax(-1).gather(1, labels[:, None]).mean()


def of_both(logits: Any, labels: Any) -> Any:
    return F.cross_entropy(logits, labels) + jnp.zeros(())


class TorchModule(torch.nn.Module):
    """A loss as an object."""

    def forward(self, logits: Any, labels: Any) -> Any:
        return by_methods(logits, labels)


class FlaxModule(nnx.Module):
    """A loss as an object."""

    def __call__(self, logits: Any, labels: Any) -> Any:
        return -logits[0, 0]


class PlainClass:
    """A loss as an object."""

    def __call__(self, logits: Any, labels: Any) -> Any:
        return jnp.mean(logits)


@pytest.mark.parametrize(("loss", "framework"), [
    (torch_focal, "torch"),
    (jax_focal, "jax"),
    (lambda logits, labels: jax_focal(logits, labels), "jax"),  # noqa: PLW0108
    (functools.partial(torch_focal, gamma=1.0), "torch"),
    (by_helper, "jax"),
    (imports_within, "torch"),
    (annotated, "torch"),
    (TorchModule, "torch"),
    (TorchModule(), "torch"),
    (TorchModule().forward, "torch"),
    (FlaxModule, "jax"),
    (FlaxModule(), "jax"),
    (PlainClass(), "jax"),
    (PlainClass, "jax"),
    (F.cross_entropy, "torch"),
    (optax.softmax_cross_entropy, "jax"),
    (jax.jit(by_methods), "jax"),
    (lsce_torch.label_smoothed_cross_entropy, "torch"),
    (lsce_jax.LabelSmoothedCrossEntropyLoss, "jax"),
], ids=lambda value: value if isinstance(value, str) else name_of(value))  # fmt: skip
def test_the_framework_is_found(loss: Callable[..., Any], framework: str) -> None:
    assert framework_of(loss) == framework


@pytest.mark.parametrize(("loss", "message"), [(by_methods, "nothing in"), (of_both, "names both torch and JAX")])
def test_what_does_not_say_its_framework_is_an_error(loss: Callable[..., Any], message: str) -> None:
    with pytest.raises(FrameworkError, match=rf"{message}.*Pass frameworks=\(.torch., .jax.\), one for each loss"):
        compare_losses(loss, jax_focal)


def test_the_framework_can_be_said() -> None:
    assert_same_loss(by_methods, jax_rows, frameworks=("torch", None), inputs=BATCH)


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"class": 3}, TypeError, "there is no option class; the options are frameworks,"),
    ({"dtype": "int8"}, ValueError, "there is no dtype 'int8' here"),
    ({"labels_are": "words"}, ValueError, "labels_are must be one of"),
    ({"labels_are": "multi_hot", "ignore_index": 0}, ValueError, "ignore_index is for class labels"),
    ({"convention": "rows"}, ValueError, "rows"),
    ({"frameworks": ("torch", "tensorflow")}, ValueError, "frameworks are torch and jax, got 'tensorflow'"),
    ({"options": ({"gama": 1.0}, {})}, SpecificationError, "does not take these options"),
    ({"inputs": "batch.npz", "classes": 3}, ValueError, "inputs says it all: leave out classes"),
])  # fmt: skip
def test_a_wrong_option_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compare_losses(torch_focal, jax_focal, **options)


def test_a_loss_must_be_callable() -> None:
    with pytest.raises(TypeError, match="got 3"):
        compare_losses(3, jax_focal)  # type: ignore[arg-type]


def test_arrays_at_hand_are_a_batch() -> None:
    logits = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([[0, 1, 2, 3, 0], [1, 1, 2, 0, -100]])
    found = compare_losses(F.cross_entropy, jax_focal, inputs={"logits": logits, "labels": labels}, ignore_index=-100)
    assert found.agrees is False
    assert len(found.pair.cases) == 1
    np.testing.assert_array_equal(found.pair.cases[0].logits, logits.detach().numpy().reshape(10, 4))


# --- The package and the fixture --------------------------------------------------------------------------------------

ALONE = """
import sys
import lsce_parity
assert not {"jax", "torch", "typer", "pytest"} & {*sys.modules}
assert lsce_parity.compare_losses("oracle", "oracle").agrees
assert not {"jax", "torch"} & {*sys.modules}
"""


def test_neither_framework_is_loaded_unless_needed() -> None:
    outcome = run_code(ALONE)
    assert outcome.returncode == 0, outcome.stderr
    assert "AssertionError" in run_code("import torch\n" + ALONE).stderr  # it can fail


def test_what_is_not_installed_is_named() -> None:
    outcome = run_code("import lsce_parity", blocked=["scipy"])
    assert "lsce_parity needs scipy" in outcome.stderr
    assert "pip install -e '.[parity]'" in outcome.stderr
    missing = "import lsce_parity\nlsce_parity.compare_losses('torch:a:b', 'oracle')"
    assert "UnavailableError: torch is not installed" in run_code(missing, blocked=["torch"]).stderr


def test_all_names_are_there() -> None:
    assert all(hasattr(lsce_parity, name) for name in lsce_parity.__all__)


SUITE = """
import functools, pytest, torch

mean = torch.nn.functional.binary_cross_entropy_with_logits
multi_hot = {"labels_are": "multi_hot", "classes": 3}

def rows(logits, labels):
    return mean(logits, labels, reduction="none")

def silent(logits, labels):
    return torch.no_such_function(logits)

def test_wrong(assert_same_loss):
    assert_same_loss(mean, lambda logits, labels: 2 * rows(logits, labels), **multi_hot)

def test_silent(assert_same_loss):
    assert_same_loss(mean, silent, **multi_hot)

def test_device(parity_device, assert_same_loss):
    assert_same_loss(mean, rows, **multi_hot)

class TestOther:
    @pytest.fixture
    def parity_device(self):
        return "tpu"

    def test_absent(self, parity_device, assert_same_loss):
        assert_same_loss(mean, rows, **multi_hot)
"""


def test_the_fixture(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile(SUITE)
    # Of its own process: the plugin here keeps the evidence of this session.
    result = pytester.runpytest_subprocess("-p", "parity_tests.plugin")
    text = result.stdout.str()
    result.assert_outcomes(passed=1, failed=3, skipped=2)
    assert "AssertionError: DISAGREE in 8 of 8 cases: " in text
    assert "no verdict: NO VERDICT in 8 cases: " in text
    assert "no verdict: torch finds no tpu device" in text
    assert "assertions.py" not in text  # the traceback ends in the test
