"""Neither package loads the other's framework, and each works where the other framework is not installed.

Each check runs in a fresh interpreter. The last test shows that the checks can fail.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lsce_spec.extras import install

ROOT = Path(__file__).parents[1]

JAX_NAMES = ("jax", "jaxlib", "flax", "optax")

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
NOT_TORCH, NOT_JAX = ("torch", "torchmetrics", "lsce_torch"), (*JAX_NAMES, "lsce_jax")

# transformers is no requirement; its Trainer calls the functions of lsce_torch.trainers.
USE_TRAINERS = """
import torch
from lsce_torch.trainers import causal_lm_loss
assert causal_lm_loss()({"logits": torch.zeros(1, 3, 4)}, torch.tensor([[0, 1, 2]])) > 1
"""


def run(*parts: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", "".join(parts)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("steps", [
    # What a later step of a process may load, an earlier one may not.
    [("import lsce_jax", NOT_TORCH), (USE_JAX, NOT_TORCH), ("import lsce_jax.metrics", NOT_TORCH)],
    [
        ("import lsce_torch", (*NOT_JAX, "torchmetrics")),
        (USE_TORCH, (*NOT_JAX, "torchmetrics")),
        ("import lsce_torch.metrics", NOT_JAX),
    ],
    [
        ("import lsce_spec", (*NOT_JAX, *NOT_TORCH, "numpy")),
        ("import parity_tests.plugin", (*NOT_JAX, *NOT_TORCH, "numpy")),
        ("import parity_tests.__main__", ("torch", *JAX_NAMES)),
    ],
], ids=["jax", "torch", "neither"])  # fmt: skip
def test_other_framework_stays_unloaded(steps: list[tuple[str, tuple[str, ...]]]) -> None:
    outcome = run(*(f"{use}\n{LOADED.format(forbidden=forbidden)}" for use, forbidden in steps))
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize(("use", "blocked"), [
    (USE_JAX, ("torch",)),
    (USE_TORCH, (*JAX_NAMES, "torchmetrics")),
    (USE_TRAINERS, ("transformers", "accelerate", *JAX_NAMES)),
])  # fmt: skip
def test_works_without_what_is_not_required(use: str, blocked: tuple[str, ...]) -> None:
    outcome = run(BLOCK.format(blocked=blocked), use)
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize(("use", "missing", "user", "extra"), [
    ("import lsce_torch, lsce_torch.metrics", "torchmetrics", "lsce_torch.metrics", "metrics"),
    ("import lsce_torch", "torch", "lsce_torch", "torch"),
    ("import lsce_jax", "jax", "lsce_jax", "jax"),
    ("import lsce_jax.metrics", "flax", "lsce_jax", "jax"),
])  # fmt: skip
def test_what_is_missing_is_named_with_the_command(use: str, missing: str, user: str, extra: str) -> None:
    """The exception has the module's name."""
    code = f"try: {use}\nexcept ModuleNotFoundError as problem: print(problem.name); raise"
    outcome = run(BLOCK.format(blocked=(missing,)), code)
    assert outcome.stdout == f"{missing}\n"
    assert outcome.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: {user} needs {missing}, which is not installed. Run: {install(extra)}."
    )


@pytest.mark.parametrize(("module", "command", "missing", "extra"), [
    ("parity_tests", "lsce-parity", "typer", "parity"),
    ("parity_tests", "lsce-parity", "numpy", "parity"),
    ("lsce_cost", "lsce-cost", "matplotlib", "cost"),
])  # fmt: skip
def test_a_command_without_its_extra(module: str, command: str, missing: str, extra: str) -> None:
    """It exits with 2, since 1 of lsce-parity means that losses differ."""
    outcome = run(f"import sys; sys.modules[{missing!r}] = None; import {module}.__main__")
    assert outcome.returncode == 2, outcome.stderr
    assert outcome.stderr == (
        f"cannot run: {command} needs {missing}, which is not installed. Run: {install(extra)}.\n"
    )


def test_the_extras_that_are_named_bring_what_is_missing() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        name: " ".join(project["optional-dependencies"][name]) for name in ("jax", "torch", "metrics", "parity", "cost")
    }
    named = {
        "jax": ["jax", "flax"],
        "torch": ["torch"],
        "metrics": ["torchmetrics"],
        "cost": ["typer", "rich", "matplotlib"],
    }
    named["parity"] = ["numpy", "ml_dtypes", "mpmath", "safetensors", "typer", "rich", "matplotlib", "jinja2"]
    for extra, modules in named.items():
        for module in modules:
            assert f"{module}>=" in extras[extra]


def test_the_checks_fire() -> None:
    assert "torch was loaded" in run("import lsce_torch", LOADED.format(forbidden=("torch",))).stderr
    assert "jax was loaded" in run("import lsce_jax", LOADED.format(forbidden=("jax",))).stderr
    assert "No module named 'torch'" in run(BLOCK.format(blocked=("torch",)), USE_TORCH).stderr
    assert "lsce_jax needs jax, which is not installed" in run(BLOCK.format(blocked=("jax",)), USE_JAX).stderr
