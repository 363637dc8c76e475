"""Who knows one package knows the other: same files, names, order, arguments and defaults, listed differences aside."""

import ast
import inspect
import pathlib
from collections.abc import Callable
from importlib import metadata
from itertools import product
from typing import Any

import pytest

import lsce_jax
import lsce_jax.metrics
import lsce_torch
import lsce_torch.metrics
import lsce_torch.trainers

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


def without(function: Callable[..., Any], place: int) -> Callable[..., Any]:
    """Return a function that takes what another takes, but for one parameter."""
    signature = inspect.signature(function)
    kept = [parameter for i, parameter in enumerate(signature.parameters.values()) if i != place]

    def stand_in() -> None: ...

    stand_in.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return stand_in


def public_names(package: Any) -> list[str]:
    """Return the names that a package imports for others, in order."""
    source = pathlib.Path(package.__file__).read_text()
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.ImportFrom)]
    return [alias.asname for node in imports for alias in node.names if alias.asname]


# The drop-in for torch's function of that name. Optax's have no classes in dimension 1 and no integer labels to smooth.
TORCH_NAMES = {"cross_entropy"}


def test_public_names() -> None:
    names = [[n for n in public_names(p) if n not in TORCH_NAMES] for p in (lsce_jax, lsce_torch)]
    # The order is that of the modules; the linter sorts the shared ones by their package's name.
    assert sorted(names[0]) == sorted(names[1])
    own = [
        [n for n in of if getattr(p, n).__module__.startswith(p.__name__)]
        for p, of in zip((lsce_jax, lsce_torch), names, strict=True)
    ]
    assert own[0] == own[1]
    shared = [[n for n in p.__all__ if n not in TORCH_NAMES] for p in (lsce_jax, lsce_torch)]
    assert shared[0] == shared[1]


@pytest.mark.parametrize("package", [lsce_jax, lsce_torch])
def test_what_a_package_shows(package: Any) -> None:
    """dir(), `from package import *` and the imports say the same; the modules behind them do not show."""
    assert sorted(package.__all__) == sorted(public_names(package))
    shown = [name for name in dir(package) if not name.startswith("__")]
    modules = ["metrics", "trainers"] if package is lsce_torch else ["metrics"]
    assert sorted([*package.__all__, *modules]) == shown
    namespace: dict[str, Any] = {}
    exec(f"from {package.__name__} import *", namespace)
    assert set(package.__all__) == namespace.keys() - {"__builtins__"}
    assert package.functional  # hidden, and yet there
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'label_smooth'"):
        _ = package.label_smooth


@pytest.mark.parametrize("package", [lsce_jax, lsce_torch])
def test_version(package: Any) -> None:
    assert package.__version__ == metadata.version("lsce")
    assert "__version__" in dir(package)


def files(package: str) -> set[str]:
    return {path.name for path in (ROOT / package).iterdir() if path.suffix}


# XLA manages memory, threads, saved arrays and fusion for JAX, and knows its platform. In torch each has a file, and so
# have the operators that torch.compile leaves alone, and torch's own function with our options.
TORCH_FILES = {
    "trainers.py",  # for Hugging Face's Trainer, which JAX does not have
    "plain.py",
    "lean.py",
    "sweeps.py",
    "memory.py",
    "threads.py",
    "overwrite.py",
    "saved.py",
    "compiled.py",
    "device.py",
    "drop_in.py",
    "dtensors.py",  # JAX's arrays know themselves how they are divided
    "ranks.py",  # collectives over a process group, and whether its ranks agree
    "shards.py",  # the sums of vocab_parallel.py, and an autograd Function
}
# What JAX is told of the sums, and what XLA for CPUs, GPUs and TPUs takes in place of them.
JAX_FILES = {"row_sums.py", "layer_sums.py", "sum_rules.py", "cpu.py", "gpu.py", "tiles.py", "primitives.py"}


# Kernels are each framework's own.
OWN_FOLDERS = {"kernels"}


def folders(package: str) -> set[str]:
    return {path.name for path in (ROOT / package).iterdir() if (path / "__init__.py").is_file()}


def test_folders() -> None:
    assert folders("lsce_torch") == folders("lsce_jax") == OWN_FOLDERS


def test_files() -> None:
    assert files("lsce_torch") - files("lsce_jax") == TORCH_FILES
    assert files("lsce_jax") - files("lsce_torch") == JAX_FILES


def definitions(package: str, file: str) -> list[str]:
    tree = ast.parse((ROOT / package / file).read_text())
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


# What one package alone defines in a file, and why. All other names are in both, in the same order.
# JAX: arrays in NNX, ranks, array-likes, 32-bit labels, sharding, tracing; sums of two float32 numbers for float64.
ONLY_IN_JAX = {
    "inputs.py": {"as_array", "within_int32", "as_last_axis", "is_sharded", "_is_at_hand", "_is_traced"}
    | {"Whole"}  # for vocab_parallel.py
    | {"varying_like", "_axes_of", "with_whole_features"}  # for shard_map, and for jit
    | {"on_automatic_axes", "_explicit_mesh", "_with_types"},  # for explicit meshes
    "denominators.py": {"_denominator"},  # for explicit meshes
    "modules.py": {"LossConstant"},
    "metrics.py": {"_sum_of_fractions", "_count", "_pair", "_add", "_two_sum"},
}
# torch: scalars, types, values that are not at hand; labels as they are given, for the kernels; checks that are kept,
# since calls are eager; options in the places that nn.CrossEntropyLoss and inplace_backward need.
ONLY_IN_TORCH = {
    "errors.py": {"refuse_script"},
    "inputs.py": {
        "_as_tensor",
        "_check_shapes",
        "_checked_axis",
        "_is_nowhere",
        "_raise_bad_label",  # for torch.compile
        "_signed",
        "Given",
        "canonical",
        "check",
        "check_tensor",
        "dtype_name",
        "is_dtensor",
        "name_of",
        "tensor_of",
    },
    "functional.py": {"_checked_options", "_options_of"},
    "linear.py": {"_is_transformed", "check_layer_tensors", "_why_reference"},
    "reference.py": {"as_tensor"},
    "keywords.py": {"_Ignored", "_ClassWeight", "_Terms", "_Reduction", "_Memory", "TrainerLossKeywords"}
    | {"CrossEntropyKeywords"},
}
# One package transforms functions, the other has autograd Functions and sweeps of its own. In these files what both
# define is in the same order, and the names that other files use are the same.
OWN_WAYS = {
    "fused.py": {"row_losses"},
    "sums.py": {"Operands", "Sums"},
    "chunked.py": {"losses", "preferred_rows"},
    "layer.py": {"Layer"},
    "accurate.py": {"log1p", "divide"},
    # The sums of torch are in shards.py.
    "vocab_parallel.py": {
        "vocab_parallel_label_smoothed_cross_entropy",
        "vocab_parallel_label_smoothed_cross_entropy_with_stats",
        "vocab_parallel_linear_label_smoothed_cross_entropy",
        "vocab_parallel_linear_label_smoothed_cross_entropy_with_stats",
    },
    # torch has an autograd Function, and goes through the rows in parts.
    "smoothing.py": {"add_smoothing", "linear_add_smoothing", "_smoothed", "_label_and_spread", "_mean_factor"},
}


@pytest.mark.parametrize("file", sorted(files("lsce_torch") - TORCH_FILES - {"__init__.py", "py.typed"}))
def test_definitions_in_the_same_order(file: str) -> None:
    ours, theirs = definitions("lsce_jax", file), definitions("lsce_torch", file)
    assert [name for name in ours if name in theirs] == [name for name in theirs if name in ours]
    if file in OWN_WAYS:
        assert set(ours) & set(theirs) >= OWN_WAYS[file]
    else:
        assert set(ours) - set(theirs) == ONLY_IN_JAX.get(file, set())
        assert set(theirs) - set(ours) == ONLY_IN_TORCH.get(file, set())


def test_arguments() -> None:
    for name in ("label_smoothed_cross_entropy", "label_smoothed_cross_entropy_with_stats"):
        # In JAX the caller donates the logits to jit.
        found = difference(getattr(lsce_jax, name), getattr(lsce_torch, name), only_in_second=("inplace_backward",))
        assert found == ["reduction: 'none' and 'mean'"]
    for name in ("linear_label_smoothed_cross_entropy", "linear_label_smoothed_cross_entropy_with_stats"):
        assert difference(getattr(lsce_jax, name), getattr(lsce_torch, name)) == ["reduction: 'none' and 'mean'"]
    for kind, suffix in product(("", "linear_"), ("", "_with_stats")):
        name, place = f"vocab_parallel_{kind}label_smoothed_cross_entropy{suffix}", 3 if kind else 2
        assert parameters(getattr(lsce_jax, name))[place] == (
            "axis_name",
            inspect.Parameter.KEYWORD_ONLY,
            inspect.Parameter.empty,
        )
        assert parameters(getattr(lsce_torch, name))[place] == ("group", inspect.Parameter.KEYWORD_ONLY, None)
        found = difference(*(without(getattr(package, name), place) for package in (lsce_jax, lsce_torch)))
        assert found == ["reduction: 'none' and 'mean'"]
    assert parameters(lsce_jax.mean_denominator)[1] == ("axis_name", inspect.Parameter.KEYWORD_ONLY, ())
    assert parameters(lsce_torch.mean_denominator)[1] == ("group", inspect.Parameter.KEYWORD_ONLY, None)
    assert difference(*(without(package.mean_denominator, 1) for package in (lsce_jax, lsce_torch))) == []
    ours, theirs = (package.LinearLabelSmoothedCrossEntropyLoss for package in (lsce_jax, lsce_torch))
    assert difference(ours, theirs) == ["reduction: 'none' and 'mean'"]
    assert difference(ours.__call__, theirs.forward) == []
    for name in ("CELossWithLabelSmoothing", "add_smoothing", "linear_add_smoothing"):
        assert difference(getattr(lsce_jax, name), getattr(lsce_torch, name)) == []
    for name in ("smoothing_weights", "convert_smoothing", "identify_targets", "identify_loss", "Convention"):
        assert getattr(lsce_jax, name) is getattr(lsce_torch, name)


def test_order_of_the_arguments() -> None:
    """As a user sees it, in help() and editors, whatever the order of the TypedDicts behind it."""
    target, rows = ["smoothing", "convention", "prior"], ["where", "ignore_index", "class_weight", "class_mask"]
    terms = ["z_loss", "softcap", "subtract_entropy", "bad_labels", "reduction", "denominator", "implementation"]
    dense = ["logits", "labels", *target, "axis", *rows, *terms]
    linear = ["hidden", "weight", "labels", "bias", *target, *rows, *terms, "chunk_size", "recompute"]
    for suffix, last in (("", []), ("_with_stats", ["differentiable"])):
        for package, own in ((lsce_jax, []), (lsce_torch, ["inplace_backward"])):
            function = getattr(package, f"label_smoothed_cross_entropy{suffix}")
            assert [name for name, _, _ in parameters(function)] == [*dense, *own, *last]
            function = getattr(package, f"linear_label_smoothed_cross_entropy{suffix}")
            assert [name for name, _, _ in parameters(function)] == [*linear, "gradient_filter", *last]


def test_order_of_the_arguments_of_added_smoothing() -> None:
    smoothing, of_logits = (
        ["smoothing", "convention"],
        ["num_classes", "where", "label_weight", "mean_weight", "z_loss"],
    )
    rows = ["where", "ignore_index", "class_weight", "class_mask", "z_loss"]
    names = [name for name, _, _ in parameters(lsce_jax.add_smoothing)]
    assert names == ["nll", "label_logit", "mean_logit", *smoothing, *of_logits]
    names = [name for name, _, _ in parameters(lsce_jax.linear_add_smoothing)]
    assert names == ["nll", "hidden", "weight", "labels", "bias", *smoothing, "prior", *rows]


def test_metrics_arguments() -> None:
    """Flax hands every metric what any of its neighbours takes; torchmetrics has options for all metrics."""
    names = [name for name, of in vars(lsce_jax.metrics).items() if getattr(of, "__module__", "") == "lsce_jax.metrics"]
    classes = [name for name in names if name[0].isupper()]
    assert len(classes) == 7
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
