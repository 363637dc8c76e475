"""Who knows one package knows the other: same files, names, order, arguments and defaults, listed differences aside."""

import ast
import inspect
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

import lsce_jax
import lsce_jax.metrics
import lsce_torch
import lsce_torch.metrics

ROOT = pathlib.Path(lsce_jax.__file__).parent.parent

Parameters = list[tuple[str, Any, Any]]


def parameters(function: Callable[..., Any]) -> Parameters:
    # Flax hides the arguments of a class behind its metaclass.
    target = function.__init__ if inspect.isclass(function) else function
    return [(p.name, p.kind, p.default) for p in inspect.signature(target).parameters.values()]


def difference(first: Any, second: Any, only_in_second: tuple[str, ...] = ()) -> list[str]:
    """Return what differs between the parameters of two functions, as text."""
    found = []
    ours, theirs = parameters(first), [p for p in parameters(second) if p[0] not in only_in_second]
    if [name for name, _, _ in ours] != [name for name, _, _ in theirs]:
        found.append(f"names: {[n for n, _, _ in ours]} and {[n for n, _, _ in theirs]}")
    defaults = {name: (kind, default) for name, kind, default in theirs}
    for name, kind, default in ours:
        if name in defaults and (kind, default) != defaults[name]:
            found.append(f"{name}: {default!r} and {defaults[name][1]!r}")
    return found


def public_names(package: Any) -> list[str]:
    source = pathlib.Path(package.__file__).read_text()
    return [alias.asname for node in ast.parse(source).body if isinstance(node, ast.ImportFrom) for alias in node.names]


def test_public_names() -> None:
    # The order is that of the modules; the linter sorts the shared ones by their package's name.
    assert sorted(public_names(lsce_jax)) == sorted(public_names(lsce_torch))
    own = [
        [n for n in public_names(p) if getattr(p, n).__module__.startswith(p.__name__)] for p in (lsce_jax, lsce_torch)
    ]
    assert own[0] == own[1]


def test_files() -> None:
    ours, theirs = (
        {path.name for path in (ROOT / name).iterdir() if path.suffix} for name in ("lsce_jax", "lsce_torch")
    )
    # XLA manages the memory that torch's fused implementation has two files for.
    # And its compiler has to be told what to leave alone.
    assert theirs - ours == {"sweeps.py", "overwrite.py", "compiled.py"}
    assert not ours - theirs


@pytest.mark.parametrize(
    "file", ["functional.py", "linear.py", "reference.py", "inputs.py", "modules.py", "metrics.py"]
)
def test_definitions_in_the_same_order(file: str) -> None:
    def names(package: str) -> list[str]:
        tree = ast.parse((ROOT / package / file).read_text())
        return [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]

    listed = {
        # JAX: arrays in NNX, ranks, array-likes, 32-bit labels, sharding, tracing.
        "LossConstant", "_constant", "_value", "_as_last_axis", "as_array", "within_int32", "_is_traced",
        "is_sharded", "_sum_of_fractions", "_count", "_pair", "_add", "_two_sum",
        # torch: scalars, types, values that are not at hand.
        "as_tensor", "_as_tensor", "check_tensor", "dtype_name",
    }  # fmt: skip
    first, second = ([name for name in names(package) if name not in listed] for package in ("lsce_jax", "lsce_torch"))
    assert first == second


def test_arguments() -> None:
    for name in ("label_smoothed_cross_entropy", "label_smoothed_cross_entropy_with_stats"):
        # In JAX the caller donates the logits to jit.
        found = difference(getattr(lsce_jax, name), getattr(lsce_torch, name), only_in_second=("inplace_backward",))
        assert found == ["reduction: 'none' and 'mean'"]
        assert parameters(getattr(lsce_torch, name))[-1][0] == "inplace_backward"
    for name in ("linear_label_smoothed_cross_entropy", "linear_label_smoothed_cross_entropy_with_stats"):
        assert difference(getattr(lsce_jax, name), getattr(lsce_torch, name)) == ["reduction: 'none' and 'mean'"]
    ours, theirs = (package.LinearLabelSmoothedCrossEntropyLoss for package in (lsce_jax, lsce_torch))
    assert difference(ours, theirs) == ["reduction: 'none' and 'mean'"]
    assert difference(ours.__call__, theirs.forward) == []
    for name in ("CELossWithLabelSmoothing",):
        assert difference(getattr(lsce_jax, name), getattr(lsce_torch, name)) == []
    for name in ("smoothing_weights", "convert_smoothing", "identify_targets", "identify_loss", "Convention"):
        assert getattr(lsce_jax, name) is getattr(lsce_torch, name)


def test_metrics_arguments() -> None:
    """Flax hands every metric what any of its neighbours takes; torchmetrics has options for all metrics."""
    names = [name for name, of in vars(lsce_jax.metrics).items() if getattr(of, "__module__", "") == "lsce_jax.metrics"]
    classes = [name for name in names if name[0].isupper()]
    assert len(classes) == 6
    for name in classes:
        ours, theirs = (getattr(package.metrics, name) for package in (lsce_jax, lsce_torch))
        assert difference(ours, theirs, only_in_second=("options",)) == []
        assert difference(theirs.update, ours.update, only_in_second=("_",)) == []


def test_module_arguments() -> None:
    """The torch module has nn.CrossEntropyLoss's names; every other option has the name and default of the JAX one."""
    renamed = {"smoothing": "label_smoothing", "class_weight": "weight"}
    only_in_torch = {"size_average", "reduce", "inplace_backward"}
    only_in_jax = {"axis"}
    ours = {renamed.get(n, n): d for n, _, d in parameters(lsce_jax.LabelSmoothedCrossEntropyLoss)}
    theirs = {n: d for n, _, d in parameters(lsce_torch.LabelSmoothedCrossEntropyLoss)}
    assert set(ours) - only_in_jax == set(theirs) - only_in_torch
    differing = {n for n in ours.keys() & theirs.keys() if ours[n] != theirs[n]}
    # nn.CrossEntropyLoss's own defaults.
    assert differing == {"label_smoothing", "reduction", "ignore_index"}


def test_the_mirror_fires() -> None:
    def one(logits: object, *, axis: int = -1) -> None: ...

    def other(logits: object, *, axis: int = 1, where: object = None) -> None: ...

    assert len(difference(one, other)) == 2
