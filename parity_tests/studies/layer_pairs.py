"""Which layer and which weight of one model is which of another, and how their arrays are laid out.

JAX has channels last and kernels [in, out]; torch has channels second and weights [out, in]. A layout is known from the
kinds of the layers, or else from the shapes, or declared by the user.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatch
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity_tests.losses.models import MODEL, Layer, Model, ModelError

SAME, MOVED = "same", "moved"
# Names of tensors that mean the same.
_ALIASES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "running_mean": "mean",
    "running_var": "var",
}
# torch counts batches; Flax does not.
_IGNORED = ("num_batches_tracked",)
STATISTICS = ("mean", "var")
_CHANNELS_FIRST = ("Conv", "BatchNorm", "GroupNorm", "InstanceNorm", "MaxPool", "AvgPool", "AdaptiveAvgPool")
# A linear layer of Hugging Face's transformers, with weights [in, out].
_TRANSPOSED_LINEAR = "Conv1D"
_CHANNELS_LAST = ("Linear", "LayerNorm", "RMSNorm", "Embed", "Embedding")


@dataclass(frozen=True)
class Layout:
    """How an array of the first model becomes the array of the second.

    Args:
        grouped: shape to give the first's array.
        axes: order of these axes in the second.
        first, second: shapes on both sides.
    """

    grouped: tuple[int, ...]
    axes: tuple[int, ...]
    first: tuple[int, ...]
    second: tuple[int, ...]

    def to_second(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the second model's array."""
        return np.ascontiguousarray(array.reshape(self.grouped).transpose(self.axes)).reshape(self.second)

    def to_first(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the first model's array."""
        moved = array.reshape([self.grouped[axis] for axis in self.axes])
        return np.ascontiguousarray(moved.transpose(np.argsort(self.axes))).reshape(self.first)

    def inverse(self) -> "Layout":
        """Return the layout in the other direction."""
        moved = tuple(self.grouped[axis] for axis in self.axes)
        return Layout(moved, tuple(int(axis) for axis in np.argsort(self.axes)), self.second, self.first)


def _unchanged(first: Sequence[int], second: Sequence[int]) -> Layout:
    return Layout(tuple(first), tuple(range(len(first))), tuple(first), tuple(second))


def _permuted(first: Sequence[int], axes: Sequence[int]) -> Layout:
    return Layout(tuple(first), tuple(axes), tuple(first), tuple(first[axis] for axis in axes))


@dataclass
class Matches:
    """What belongs together.

    Args:
        layers: path in the second model of each path in the first.
        tensors: name in the second model of each tensor's name in the first.
        only: for each model, the paths of layers that the other does not have.
        only_tensors: for each model, the names of tensors that the other does not have.
    """

    layers: dict[str, str]
    tensors: dict[str, str]
    only: tuple[list[str], list[str]]
    only_tensors: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))


def tokens(name: str) -> tuple[str, ...]:
    """Return the words and numbers of a name.

    Example:
        >>> tokens("layers_0.norm1") == tokens("layers[0].norm_1") == ("layers", "0", "norm", "1")
        True
    """
    return tuple(re.findall(r"[^\W\d_]+|\d+", name.lower()))


def match(first: Model, second: Model, mapping: Mapping[str, str]) -> Matches:
    """Return the layers and tensors that belong together, by their names.

    Args:
        first: a model.
        second: another.
        mapping: names in the second for names in the first, of layers or tensors. A layer's name stands for all within.

    Raises:
        ModelError: a name in the mapping is none.
    """
    _check_mapping(first, second, mapping)
    theirs = {tokens(".".join(layer.parts)): path for path, layer in second.layers.items()}
    theirs.update({tokens(path): path for path in second.layers})
    layers = {MODEL: MODEL}
    taken = {MODEL}
    for path, layer in first.layers.items():
        if path == MODEL:
            continue
        target = _mapped(path, mapping)
        names = [".".join(layer.parts), path] if target is None else [target]
        found = next((theirs[tokens(name)] for name in names if tokens(name) in theirs), None)
        if found is not None and found not in taken:
            layers[path] = found
            taken.add(found)
    matches = Matches(
        layers,
        {},
        ([path for path in first.layers if path not in layers], [path for path in second.layers if path not in taken]),
    )
    _match_tensors(first, second, mapping, matches)
    return matches


def _match_tensors(first: Model, second: Model, mapping: Mapping[str, str], matches: Matches) -> None:
    for name, target in mapping.items():
        if name in first.tensors and target in second.tensors:
            matches.tensors[name] = target
    taken = set(matches.tensors.values())
    for path, other in matches.layers.items():
        theirs = {_meaning(name): name for name in second.layers[other].tensors if name not in taken}
        for name in first.layers[path].tensors:
            if name not in matches.tensors and (found := theirs.get(_meaning(name))) is not None:
                matches.tensors[name] = found
    taken = set(matches.tensors.values())
    matches.only_tensors[0].extend(name for name in first.tensors if name not in matches.tensors and _counts(name))
    matches.only_tensors[1].extend(name for name in second.tensors if name not in taken and _counts(name))


def _counts(name: str) -> bool:
    return name.rpartition(".")[2] not in _IGNORED


def _meaning(name: str) -> str:
    """Return what a tensor is to its layer."""
    last = name.rpartition(".")[2]
    return _ALIASES.get(last, last)


def is_statistic(name: str) -> bool:
    """Return whether a tensor is a mean or variance that training keeps."""
    return _meaning(name) in STATISTICS


def _mapped(name: str, mapping: Mapping[str, str]) -> str | None:
    """Return the second model's name for a name of the first, by the longest entry that it begins with."""
    for entry in sorted(mapping, key=len, reverse=True):
        if name == entry or name.startswith(f"{entry}."):
            return mapping[entry] + name[len(entry) :]
    return None


def _check_mapping(first: Model, second: Model, mapping: Mapping[str, str]) -> None:
    for side, model, given in (("first", first, mapping.keys()), ("second", second, mapping.values())):
        names = [*model.layers, *model.tensors]
        for name in given:
            if name not in names:
                raise ModelError(f"the {side} model has no {name}{nearest(name, names)}")


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a question that names what may have been meant, or nothing."""
    close = get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def unmatched_weights(first: Model, second: Model, matches: Matches) -> str | None:
    """Return what to say of weights on both sides that have no counterpart; None if at most one side has such."""
    sides = [
        [name for name in only if name in model.trainable]
        for model, only in zip((first, second), matches.only_tensors, strict=True)
    ]
    if not all(sides):
        return None
    return (
        f"these weights of the first model have no counterpart: {', '.join(sides[0])}; nor have these of the second: "
        f"{', '.join(sides[1])}. Say which is which with --map FIRST=SECOND, of layers or of weights"
    )


# --- Layouts of weights -----------------------------------------------------------------------------------------------


def weight_layout(first: Model, second: Model, name: str, other: str, declared: Mapping[str, str]) -> Layout:
    """Return how a weight of the first model is laid out in the second.

    Raises:
        ModelError: it is not known, or the shapes do not fit.
    """
    shape, target = first.tensors[name].shape, second.tensors[other].shape
    if first.framework == second.framework:
        options = {SAME: _unchanged(shape, shape)}
    elif first.framework == "jax":
        options = _in_torch(_owner(first, name), _owner(second, other), name, shape)
    else:
        options = _in_torch(_owner(second, other), _owner(first, name), other, target)
        options = {key: layout.inverse() for key, layout in options.items()}
    fitting = {key: layout for key, layout in options.items() if (layout.first, layout.second) == (shape, target)}
    choice = declaration(name, declared)
    if choice is not None:
        fitting = {key: layout for key, layout in fitting.items() if key == choice}
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    if fitting:
        raise ModelError(
            f"{name} and {other}, {list(shape)}, may have the same layout or transposed ones: say "
            f"--layout '{name}={SAME}' or --layout '{name}={MOVED}'"
        )
    raise ModelError(
        f"{name} has shape {list(shape)} and {other} {list(target)}, and no rule makes one of the other. Are the "
        "layers of the same kind and size? Where they are, copy the weights yourself and say --weights own"
    )


def _in_torch(layer: Layer, other: Layer, name: str, shape: tuple[int, ...]) -> dict[str, Layout]:
    """Return the layouts that a weight of a layer in JAX may have in torch, by their names."""
    last = name.rpartition(".")[2]
    if layer.kind == "LinearGeneral":
        features = layer.settings.get("in_features")
        inside = len(features) if isinstance(features, tuple) else 1
        whole = (math.prod(shape),)
        kernel = (math.prod(shape[:inside]), math.prod(shape[inside:]))
        return {
            MOVED: Layout(kernel, (1, 0), shape, kernel[::-1])
            if last == "kernel"
            else Layout(whole, (0,), shape, whole)
        }
    if len(shape) < 2 or last not in ("kernel", "weight") or other.kind == _TRANSPOSED_LINEAR:
        return {SAME: _unchanged(shape, shape)}
    if layer.kind == "ConvTranspose":
        return {}  # whether it is flipped depends on an option
    # [..., in, out] becomes [out, in, ...].
    moved = _permuted(shape, [len(shape) - 1, len(shape) - 2, *range(len(shape) - 2)])
    return {MOVED: moved} if layer.kind in ("Linear", "Conv") else {SAME: _unchanged(shape, shape), MOVED: moved}


def _owner(model: Model, name: str) -> Layer:
    return next((layer for layer in model.layers.values() if name in layer.tensors), model.layers[MODEL])


def declaration(name: str, declared: Mapping[str, str]) -> str | None:
    """Return the layout that the user has declared for a name."""
    return next((layout for pattern, layout in declared.items() if fnmatch(name, pattern)), None)


def equal_layout(first: NDArray[Any], second: NDArray[Any]) -> Layout | None:
    """Return a layout in which two arrays hold the same numbers, or None; the same one is tried first."""
    for axes in permutations(range(first.ndim)) if first.ndim == second.ndim and first.ndim <= 5 else ():
        layout = _permuted(first.shape, axes)
        if layout.second == second.shape and np.array_equal(first.transpose(axes), second):
            return layout
    return None


# --- Layouts of activations -------------------------------------------------------------------------------------------


def activation_layout(
    where: str,
    kinds: tuple[str, str],
    frameworks: tuple[str, str],
    arrays: tuple[NDArray[Any], NDArray[Any]],
    declared: Mapping[str, str],
) -> Layout | None:
    """Return how an input or output of a layer is laid out in the second model; None if the shapes do not fit.

    Args:
        where: name of the layer in the first model.
        kinds: of the layer in both models.
        frameworks: of the models.
        arrays: the array in both.
        declared: layouts that the user has declared.

    Raises:
        ModelError: the shapes fit in more than one way, and the numbers do not tell which.
    """
    shape, target = arrays[0].shape, arrays[1].shape
    options = {SAME: _unchanged(shape, shape)}
    if frameworks[0] != frameworks[1] and len(shape) >= 3:
        last = len(shape) - 1
        axes = [0, last, *range(1, last)] if frameworks[0] == "jax" else [0, *range(2, last + 1), 1]
        options[MOVED] = _permuted(shape, axes)
    fitting = {name: layout for name, layout in options.items() if layout.second == target}
    if not fitting and math.prod(shape) == math.prod(target) and shape[:1] == target[:1]:
        return _unchanged(shape, target)  # heads apart or together
    choice = declaration(where, declared) or _by_kind(kinds)
    if len(fitting) > 1 and choice in fitting:
        return fitting[choice]
    if len(fitting) > 1:
        fitting = _by_numbers(fitting, arrays) or fitting
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    if fitting:
        raise ModelError(
            f"{where}, {list(shape)}, may have the same layout on both sides, or channels last on one only: say "
            f"--layout '{where}={SAME}' or --layout '{where}={MOVED}'"
        )
    return None


def _by_kind(kinds: tuple[str, str]) -> str | None:
    if any(kind.startswith(_CHANNELS_FIRST) and kind != _TRANSPOSED_LINEAR for kind in kinds):
        return MOVED
    return SAME if any(kind in _CHANNELS_LAST for kind in kinds) else None


def _by_numbers(fitting: Mapping[str, Layout], arrays: tuple[NDArray[Any], NDArray[Any]]) -> dict[str, Layout]:
    """Return the layouts in which the numbers are nearly the same, unless they are so in all or in none."""
    second = arrays[1].astype(np.float64)
    scale = np.max(np.abs(second), initial=0.0)
    near = {
        name: layout
        for name, layout in fitting.items()
        if np.max(np.abs(layout.to_second(arrays[0]).astype(np.float64) - second), initial=0.0) <= 1e-3 * scale
    }
    return near if len(near) == 1 else {}


# --- Settings ---------------------------------------------------------------------------------------------------------

# Attributes that mean the same, in Flax and in torch.
_SETTINGS = {"eps": "epsilon", "p": "rate", "negative_slope": "alpha"}
_COMPARED = ("epsilon", "rate", "alpha", "use_bias", "num_groups")


def differing_settings(first: Layer, second: Layer) -> dict[str, str]:
    """Return in words which settings of two layers differ that have the same meaning, and how B would have A's."""
    ours, theirs = (
        {_SETTINGS.get(name, name): (name, value) for name, value in layer.settings.items()}
        for layer in (first, second)
    )
    found = {
        f"{ours[name][0]} is {ours[name][1]!r} in A, {theirs[name][0]} {theirs[name][1]!r} in B": (
            f"set {theirs[name][0]} to {ours[name][1]!r}"
        )
        for name in _COMPARED
        if name in ours and name in theirs and ours[name][1] != theirs[name][1]
    }
    modes = [_is_training(layer) for layer in (first, second)]
    if None not in modes and modes[0] != modes[1]:
        text = f"{'A' if modes[0] else 'B'} is in training mode, {'B' if modes[0] else 'A'} is not"
        found[text] = f"set the mode to {'training' if modes[0] else 'evaluation'}"
    return found


def _is_training(layer: Layer) -> bool | None:
    """Return whether a layer is in training mode; None where it makes no difference that is known."""
    for name in ("use_running_average", "deterministic"):
        if name in layer.settings:
            return not layer.settings[name]
    known = layer.kind.startswith(("Dropout", "BatchNorm"))
    return bool(layer.settings["training"]) if known and "training" in layer.settings else None
