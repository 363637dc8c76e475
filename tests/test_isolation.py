"""Neither package loads the other's framework, and each works where the other framework is not installed.

Each check runs in a fresh interpreter. The last test shows that the checks can fail.
"""

import subprocess
import sys

import pytest

# Forbids the import of a module as if it were not installed.
BLOCK = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""

# Loads the package, uses it, and lists what is loaded.
USE_JAX = """
import numpy, lsce_jax
logits, labels = numpy.zeros((2, 4), numpy.float32), numpy.array([1, 3])
losses = lsce_jax.label_smoothed_cross_entropy(logits, labels, where=numpy.array([True, False]))
assert abs(float(losses[0]) - numpy.log(4)) < 1e-6, losses
assert lsce_jax.LabelSmoothedCrossEntropyLoss(reduction="mean")(logits, labels) > 1
assert lsce_jax.linear_label_smoothed_cross_entropy(logits, numpy.eye(4, dtype="f4"), labels, reduction="mean") > 1
"""
USE_TORCH = """
import math, torch, lsce_torch
logits, labels = torch.zeros(2, 4, requires_grad=True), torch.tensor([1, 3])
loss = lsce_torch.label_smoothed_cross_entropy(logits, labels)
loss.backward()
assert abs(float(loss) - math.log(4)) < 1e-6, loss
assert lsce_torch.LabelSmoothedCrossEntropyLoss(label_smoothing=0.1)(logits, labels) > 1
assert lsce_torch.linear_label_smoothed_cross_entropy(logits, torch.eye(4), labels) > 1
compiled = torch.compile(lsce_torch.linear_label_smoothed_cross_entropy, backend="eager", fullgraph=True)
assert compiled(logits, torch.eye(4), labels) > 1
"""
LOADED = """
import sys
for name in {forbidden!r}:
    assert name not in sys.modules, f"{{name}} was loaded"
"""

# torchmetrics is no requirement of the loss.
METRICS_WITHOUT_TORCHMETRICS = """
import lsce_torch
try:
    import lsce_torch.metrics
except ModuleNotFoundError as problem:
    assert "pip install 'lsce[metrics]'" in str(problem), problem
else:
    raise AssertionError("imported")
"""

JAX_NAMES = ("jax", "jaxlib", "flax", "optax")


def run(*parts: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", "".join(parts)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("use", "forbidden"), [
    ("import lsce_jax", ("torch", "lsce_torch")),
    ("import lsce_torch", (*JAX_NAMES, "lsce_jax")),
    ("import lsce_spec", ("torch", *JAX_NAMES, "numpy", "lsce_jax", "lsce_torch")),
    ("import parity_tests.__main__", ("torch", *JAX_NAMES)),
    ("import parity_tests.plugin", ("torch", *JAX_NAMES, "numpy", "lsce_jax", "lsce_torch")),
    (USE_JAX, ("torch", "lsce_torch")),
    (USE_TORCH, (*JAX_NAMES, "lsce_jax", "torchmetrics")),
    ("import lsce_jax.metrics", ("torch", "torchmetrics", "lsce_torch")),
    ("import lsce_torch.metrics", (*JAX_NAMES, "lsce_jax")),
])  # fmt: skip
def test_other_framework_stays_unloaded(use: str, forbidden: tuple[str, ...]) -> None:
    outcome = run(use, LOADED.format(forbidden=forbidden))
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize(("use", "blocked"), [
    (USE_JAX, ("torch",)),
    (USE_TORCH, JAX_NAMES),
    (METRICS_WITHOUT_TORCHMETRICS, ("torchmetrics",)),
])  # fmt: skip
def test_works_without_what_is_not_required(use: str, blocked: tuple[str, ...]) -> None:
    outcome = run(BLOCK.format(blocked=blocked), use)
    assert outcome.returncode == 0, outcome.stderr


def test_the_checks_fire() -> None:
    assert "torch was loaded" in run("import lsce_torch", LOADED.format(forbidden=("torch",))).stderr
    assert "jax was loaded" in run("import lsce_jax", LOADED.format(forbidden=("jax",))).stderr
    assert "No module named 'torch'" in run(BLOCK.format(blocked=("torch",)), USE_TORCH).stderr
    assert "lsce_jax needs jax, which is not installed" in run(BLOCK.format(blocked=("jax",)), USE_JAX).stderr
