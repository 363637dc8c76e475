"""The shapes and dtypes in the annotations hold at run time, in every case of the parity tests.

In an interpreter of its own: torch.compile does not trace through the checks.
"""

import subprocess
import sys

import pytest

CHECKED = """
from jaxtyping import install_import_hook
install_import_hook("lsce_{framework}.reference", "beartype.beartype")
from lsce_{framework} import reference
"""

ALL_CASES = """
from parity_tests.losses.adapters import {adapter}
from parity_tests.truth.cases import case_names, make_case
adapter = {adapter}()
for name in case_names():
    {check}
print("checked", len(case_names()))
"""
CHECKS = {
    # JAX calls the functions when it traces them; compiling them would check nothing more.
    "JaxAdapter": """
    import jax
    with adapter.settings("bfloat16"):
        step, operands = adapter.step(make_case(name, "bfloat16"))
        jax.eval_shape(step, *operands)
    """,
    "TorchAdapter": 'adapter(make_case(name, "bfloat16"))',
}

WRONG = {
    "jax": "import jax.numpy as np\nreference._log_sum_exp(np.zeros((2, 3), int), None)",
    "torch": "import torch\nreference._log_sum_exp(torch.zeros((2, 3), dtype=int), None)",
}


def run(framework: str, *parts: str) -> subprocess.CompletedProcess[str]:
    source = "".join((CHECKED.format(framework=framework), *parts))
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("framework", "adapter"), [("jax", "JaxAdapter"), ("torch", "TorchAdapter")])
@pytest.mark.slow
def test_annotations(framework: str, adapter: str) -> None:
    outcome = run(framework, ALL_CASES.format(adapter=adapter, check=CHECKS[adapter]))
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert outcome.stdout.startswith("checked")


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.slow
def test_the_check_fires(framework: str) -> None:
    assert "Type-check error" in run(framework, WRONG[framework]).stderr
