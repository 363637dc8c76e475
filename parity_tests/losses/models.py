"""Models whose layers run one at a time, with NumPy arrays in and out: what those of JAX and torch have in common.

Within a model, every call of a chosen ("tapped") layer goes through a handler. `Recorder` lets the call happen and
keeps its inputs and outputs. `Stubs` gives the call a recorded output instead, so that a layer runs alone, without the
tapped layers within it: only the code that the layer has of its own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

Arrays = list[NDArray[Any]]
# Gradients of arrays; None for those of integers.
Gradients = list[NDArray[Any] | None]
MODEL, LOSS = "(model)", "(loss)"


class ModelError(ValueError):
    """The models cannot be compared; the message says why, and what to do."""


@dataclass(frozen=True)
class Layer:
    """A module within a model.

    Args:
        path: its name in its framework, such as "blocks.0.norm"; "(model)" for the whole.
        parts: the parts of the path, except parts that exist in one framework only.
        kind: name of its class.
        tensors: names of the weights and statistics that are its own, not those of layers within.
        settings: its attributes that are numbers, booleans, strings, or tuples of numbers.
    """

    path: str
    parts: tuple[str, ...]
    kind: str
    tensors: tuple[str, ...]
    settings: Mapping[str, Any]


@dataclass
class Call:
    """One call of a layer in a run of the model.

    Args:
        key: the layer's path; from its second call on with the number of the call, as in "embed#2".
        path: the layer's path.
        parent: key of the call that made it; None for the model.
        children: keys of the calls of tapped layers that it made, in order.
        inputs, outputs: arrays, in the order of the arguments; those by name in the order of the names.
        input_gradients, output_gradients: gradients of the objective with respect to them, if they were asked for.
        finished: number of calls that ended before it did.
    """

    key: str
    path: str
    parent: str | None
    inputs: Arrays = field(default_factory=list)
    outputs: Arrays = field(default_factory=list)
    children: list[str] = field(default_factory=list)
    input_gradients: Gradients = field(default_factory=list)
    output_gradients: Gradients = field(default_factory=list)
    finished: int = 0


@dataclass(frozen=True)
class Given:
    """What a layer alone is given: its inputs, the outputs of the calls within, and the gradients that flow in.

    `weights` replace those of the model, by name.
    """

    inputs: Arrays
    child_outputs: Mapping[str, Arrays]
    output_gradients: Gradients
    child_input_gradients: Mapping[str, Gradients]
    weights: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What a layer alone makes of it: outputs, the inputs of the calls within, and the gradients that flow out."""

    outputs: Arrays
    child_inputs: Mapping[str, Arrays]
    input_gradients: Gradients
    child_output_gradients: Mapping[str, Gradients]
    weight_gradients: Mapping[str, NDArray[Any]]


class Model(Protocol):
    """A model of JAX or torch.

    Args:
        framework: "jax" or "torch".
        layers: its modules by path, in their order.
        tensors: weights and statistics by name.
        trainable: names of the weights.
        inputs: the arrays of the example batch.
        has_loss: whether a loss function came with it.
    """

    framework: str
    layers: dict[str, Layer]
    tensors: dict[str, NDArray[Any]]
    trainable: frozenset[str]
    inputs: Arrays
    has_loss: bool

    def record(self, tapped: Iterable[str], make_gradients: Callable[[Arrays], Gradients] | None) -> dict[str, Call]:
        """Run the model on its batch, and return the calls of the tapped layers in the order in which they began.

        Args:
            tapped: paths of layers. The model itself is always one.
            make_gradients: returns the gradients of the outputs that the model gave; None for no gradients.
        """
        ...

    def run(
        self, key: str, given: Given, dtype: str | None = None, *, bits: int | None = None, stream: int = 0
    ) -> Result:
        """Run a recorded call again, alone; `LOSS` for the loss function.

        Args:
            key: of the call.
            given: its arrays.
            dtype: to run in; None for that of the arrays.
            bits: significant bits of float32 operands that matrix products and convolutions keep, in a simulation on
                the CPU; 24 are all. None for what the device does.
            stream: number of the stream of random numbers.
        """
        ...

    def narrowest(self, key: str, given: Given, dtype: str | None = None) -> str:
        """Return the floating-point dtype with the fewest bits that a call computes anything in."""
        ...

    def forget_programs(self) -> None:
        """Drop what was traced: the next run runs the code of the layer again."""
        ...


Flatten = Callable[[Any], tuple[list[Any], Any]]


@dataclass
class Structure:
    """Arguments or results of a call with places for its arrays."""

    leaves: list[Any]
    tree: Any
    is_array: list[bool]

    def filled(self, arrays: Sequence[Any]) -> list[Any]:
        """Return the leaves, with these arrays in their places."""
        if len(arrays) != sum(self.is_array):
            raise ModelError(f"expected {sum(self.is_array)} arrays, got {len(arrays)}")
        rest = iter(arrays)
        return [next(rest) if there else leaf for leaf, there in zip(self.leaves, self.is_array, strict=True)]


class Framework(Protocol):
    """What handlers need of a framework."""

    def flatten(self, tree: Any) -> tuple[list[Any], Any]:
        """Return leaves and structure."""
        ...

    def unflatten(self, leaves: list[Any], tree: Any) -> Any:
        """Put them together."""
        ...

    def is_array(self, leaf: Any) -> bool:
        """Return whether a leaf is an array of numbers."""
        ...


def take_apart(framework: Framework, tree: Any) -> tuple[list[Any], Structure]:
    """Return the arrays within arguments or results, and their structure, which keeps no array alive."""
    leaves, structure = framework.flatten(tree)
    there = [framework.is_array(leaf) for leaf in leaves]
    arrays = [leaf for leaf, is_array in zip(leaves, there, strict=True) if is_array]
    kept = [None if is_array else leaf for leaf, is_array in zip(leaves, there, strict=True)]
    return arrays, Structure(kept, structure, there)


def put_together(framework: Framework, structure: Structure, arrays: Sequence[Any]) -> Any:
    """Return arguments or results with these arrays."""
    return framework.unflatten(structure.filled(arrays), structure.tree)


class Recorder:
    """Lets calls happen, and keeps their arrays.

    Args:
        framework: of the model.
        perturb: returns arrays to use in place of those of a call, given its key and "inputs" or "outputs".
    """

    def __init__(self, framework: Framework, perturb: Callable[[str, str, list[Any]], list[Any]]) -> None:
        """Begin without calls."""
        self.framework, self.perturb = framework, perturb
        self.calls: dict[str, Call] = {}
        self.structures: dict[str, tuple[Structure, Structure]] = {}
        self._running: list[Call] = []
        self._counts: dict[str, int] = {}
        self._finished = 0

    def __call__(self, path: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of a call of a tapped layer."""
        if self._running and self._running[-1].path == path:  # super().__call__
            return original(*args, **kwargs)
        self._counts[path] = self._counts.get(path, 0) + 1
        key = path if self._counts[path] == 1 else f"{path}#{self._counts[path]}"
        parent = self._running[-1] if self._running else None
        call = self.calls[key] = Call(key, path, parent.key if parent else None)
        if parent:
            parent.children.append(key)
        arrays, of_inputs = take_apart(self.framework, (args, dict(sorted(kwargs.items()))))
        call.inputs = self.perturb(key, "inputs", arrays)
        args, kwargs = put_together(self.framework, of_inputs, call.inputs)
        self._running.append(call)
        result = original(*args, **kwargs)
        self._running.pop()
        arrays, of_outputs = take_apart(self.framework, result)
        call.outputs = self.perturb(key, "outputs", arrays)
        call.finished, self._finished = self._finished, self._finished + 1
        self.structures[key] = of_inputs, of_outputs
        return put_together(self.framework, of_outputs, call.outputs)


class Stubs:
    """Gives the calls within one call recorded outputs.

    Args:
        framework: of the model.
        call: the call that runs.
        outputs: those of its children by key.
        structures: of the arguments and results of each call.
        paths: of the layer of each child.
        keep: returns a copy of an array that later changes in place do not reach.
    """

    def __init__(
        self,
        framework: Framework,
        call: Call,
        outputs: Mapping[str, list[Any]],
        structures: Mapping[str, tuple[Structure, Structure]],
        paths: Mapping[str, str],
        keep: Callable[[Any], Any] = lambda array: array,
    ) -> None:
        """Begin with the first call."""
        self.framework, self.outputs, self.structures, self.keep = framework, outputs, structures, keep
        self.own = call.path
        self.child_inputs: dict[str, list[Any]] = {}
        self._waiting = list(call.children)
        self._paths = paths

    def __call__(self, path: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of a call: the recorded output of a child."""
        if path == self.own:
            return original(*args, **kwargs)
        key = next((key for key in self._waiting if self._paths[key] == path), None)
        if key is None:
            raise ModelError(f"{path} was called where it had not been called before; does the call depend on values?")
        self._waiting.remove(key)
        arrays, _ = take_apart(self.framework, (args, dict(sorted(kwargs.items()))))
        self.child_inputs[key] = [self.keep(array) for array in arrays]
        return put_together(self.framework, self.structures[key][1], self.outputs[key])

    def inputs_of_children(self, call: Call) -> dict[str, list[Any]]:
        """Return the inputs of all children.

        Raises:
            ModelError: one was not called.
        """
        if self._waiting:
            raise ModelError(f"{', '.join(self._waiting)} was not called again; does the call depend on values?")
        return {key: self.child_inputs[key] for key in call.children}


def settings_of(module: Any) -> dict[str, Any]:
    """Return the attributes of a module that are numbers, booleans, strings, or tuples of numbers."""
    plain = (bool, int, float, str)
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(name, str)  # lists of Flax 0.12.2 have numbers
        and not name.startswith("_")
        and (isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(each, plain) for each in value)))
    }
