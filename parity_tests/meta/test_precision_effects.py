"""Whether the arithmetic of a device explains a difference: it does for bfloat16 passes, and not for a fault."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import Result

from parity_tests.losses.registry import make_adapter
from parity_tests.meta.running import invoke
from parity_tests.studies.precision_effects import ALL, OBSERVED, find_effects, sources
from parity_tests.truth.arithmetic import FULL, tree_depth
from parity_tests.truth.cases import make_case
from parity_tests.truth.devices import device_of_name
from parity_tests.truth.linear_cases import make_linear_case

# A layer as it is on a CPU, the same in one bfloat16 pass, and one with another smoothing.
LOSSES = """
import jax
import jax.numpy as jnp
from torch.nn import functional as F

def rounded(values):
    # Whose gradient is not rounded.
    return values + jax.lax.stop_gradient(values.astype(jnp.bfloat16).astype(jnp.float32) - values)

def bfloat16_pass(hidden, weight, labels):
    log_p = jax.nn.log_softmax(rounded(hidden) @ rounded(weight))
    own = jnp.take_along_axis(log_p, labels[:, None], 1)[:, 0]
    return -(0.9 * own + 0.1 * log_p.mean(-1)).mean()

def layer(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight), labels, label_smoothing=0.1)

def smoothed_more(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight), labels, label_smoothing=0.2)
"""


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    (tmp_path / "layers_of_a_user.py").write_text(LOSSES)
    monkeypatch.syspath_prepend(str(tmp_path))

    def compare(second: str, device: str, *options: str) -> Result:
        first = "jax:layers_of_a_user:bfloat16_pass"
        return invoke("compare", first, second, "--linear", "--explain-precision", device, "--classes", "10", *options)

    return compare


def test_a_bfloat16_pass_explains_what_it_changes(compare, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    files = ("--json", str(tmp_path / "out.json"), "--report", str(tmp_path / "page"))
    found = compare("torch:layers_of_a_user:layer", "tpu-v6e", *files)
    assert found.exit_code == 1  # the two do differ
    (sentence,) = re.findall(r"^EXPLAINED by the arithmetic of tpu-v6e: at most .*(?=\.$)", found.output, re.MULTILINE)
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert f"<li>{sentence}</li>" in page
    assert "<h2>Arithmetic of tpu-v6e</h2>" in page
    precision = json.loads((tmp_path / "out.json").read_text())["precision"]
    assert precision["explained"]
    changes = precision["changes"]
    for part in ("loss", "hidden", "weight"):
        assert changes[OBSERVED][part] <= 2 * changes["matrix products"][part]
        assert changes["matrix products"][part] > 3 * changes["exp, log, log1p, tanh, quotients"][part]


@pytest.mark.parametrize(("second", "device"), [
    pytest.param("layer", "cpu", marks=pytest.mark.slow),
    pytest.param("layer", "gpu-h100", marks=pytest.mark.slow),
    ("smoothed_more", "tpu-v5e"),
])  # fmt: skip
def test_a_fault_and_a_more_accurate_device_do_not(compare, second: str, device: str) -> None:  # type: ignore[no-untyped-def]
    found = compare(f"torch:layers_of_a_user:{second}", device)
    assert f"NOT EXPLAINED by the arithmetic of {device}" in found.output


def test_the_command_says_what_it_cannot_explain() -> None:
    unknown = invoke("compare", "jax-fused", "oracle", "--explain-precision", "tpu-v9")
    assert (unknown.exit_code, "there is no device 'tpu-v9'" in unknown.output) == (2, True)
    compiled = invoke("compare", "jax-fused", "torch-fused-compiled", "--explain-precision", "tpu-v5e")
    assert (compiled.exit_code, "it is compiled" in compiled.output) == (2, True)


def test_each_source_is_alone() -> None:
    found = sources(device_of_name("tpu-v5e", "jax"))
    products, elementary = found["matrix products"], found["exp, log, log1p, tanh, quotients"]
    assert (products.matmul_bits, products.exp, products.depth) == (8, 1, tree_depth)
    assert (elementary.matmul_bits, elementary.exp, elementary.division) == (FULL, 232, 397)
    assert found[ALL].matmul_bits == 8


def test_a_loss_of_logits_has_no_matrix_product() -> None:
    case = make_case("uniform_mean", "float32")
    effects = find_effects([make_adapter("jax-fused"), make_adapter("torch-fused")], [case], "tpu-v5e")
    assert effects.explained
    assert (
        effects.changes["matrix products"]["loss"] < 1e-6 < effects.changes["exp, log, log1p, tanh, quotients"]["loss"]
    )


def test_a_case_without_results_explains_nothing() -> None:
    adapters = [make_adapter("jax-fused"), make_adapter("jax-linear-chunked")]
    effects = find_effects(adapters, [make_linear_case("linear_none", "float32")], "tpu-v5e")
    assert (effects.explained, effects.case) == (False, None)


def test_a_nan_is_never_explained() -> None:
    effects = find_effects(
        [make_adapter("numpy"), make_adapter("mutant:infinity_to_nan")],
        [make_case("minus_infinity", "float32")],
        "tpu-v4",
    )
    assert not effects.explained
    assert effects.ratio == np.inf
