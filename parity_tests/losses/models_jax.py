"""Models of Flax NNX whose layers run one at a time; see `parity_tests.losses.models`.

Calls are taken over by replacing `__call__` of the layers' classes while a model runs. Calls within `nnx.jit`,
`nnx.scan` and the like are not seen, since these make new modules: they are part of the layer that makes them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from parity_tests.losses.models import (
    LOSS,
    MODEL,
    Arrays,
    Call,
    Given,
    Gradients,
    Layer,
    ModelError,
    Recorder,
    Result,
    Structure,
    Stubs,
    put_together,
    settings_of,
    take_apart,
)
from parity_tests.losses.simulated_jax import SimulatedDevice, Values
from parity_tests.truth.arithmetic import FULL
from parity_tests.truth.precision import FORMATS
from parity_tests.truth.simulation import EXACT, rounded_to_bits

Path = tuple[Any, ...]


class JaxModel:
    """A model of Flax NNX.

    Args:
        model: the module.
        inputs: its arguments: an array, a tuple of them, or a dictionary of arguments by name.
        loss: returns a scalar of the model's output; None for no loss.
    """

    framework = "jax"

    def __init__(self, model: Any, inputs: Any, loss: Callable[[Any], Any] | None = None) -> None:
        """Find the layers and weights."""
        if not isinstance(model, nnx.Module):
            raise ModelError(f"expected a module of flax.nnx, got a {type(model).__name__}; of Linen, nnx.bridge.ToNNX")
        self._modules = {_name(path): module for path, module in nnx.iter_modules(model)}
        self._modules = {MODEL: self._modules.pop(MODEL), **dict(reversed(self._modules.items()))}
        self._names = {id(module): name for name, module in self._modules.items()}
        flat = [
            (path, variable)
            for path, variable in nnx.to_flat_state(nnx.state(model))
            if _is_number(variable[...]) and not isinstance(variable, nnx.RngState)
        ]
        self._tensor_names: dict[int, str] = {}
        for path, _ in flat:
            self._tensor_names.setdefault(id(_at(model, path)), _name(path))
        self.tensors = {_name(path): np.asarray(variable[...]) for path, variable in flat}
        self.trainable = frozenset(_name(path) for path, variable in flat if isinstance(variable, nnx.Param))
        self.layers = {name: self._layer(name, [path for path, _ in flat]) for name in self._modules}
        arguments = (
            ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
        )
        arrays, self._arguments = take_apart(self, (arguments[0], dict(sorted(arguments[1].items()))))
        self.inputs = [np.asarray(array) for array in arrays]
        self._loss, self.has_loss = loss, loss is not None
        self._calls: dict[str, Call] = {}
        self._structures: dict[str, tuple[Structure, Structure]] = {}
        self._split: dict[str, Any] = {}
        self._tapped = frozenset[str]()
        self._compiled: dict[Any, tuple[Any, Any]] = {}

    def _layer(self, name: str, tensors: list[Path]) -> Layer:
        own = [_name(path) for path in tensors if _name(path[:-1]) == name]
        parts = name.split(".") if name != MODEL else []
        sequential = [
            isinstance(self._modules.get(_name(tuple(parts[:end]))), nnx.Sequential) for end in range(len(parts))
        ]
        # The list of an nnx.Sequential, not the last part, has no counterpart in torch.
        kept = [
            part
            for part, within, rest in zip(parts, sequential, range(len(parts) - 1, -1, -1), strict=True)
            if not (within and rest and part == "layers")
        ]
        module = self._modules[name]
        return Layer(name, tuple(kept), type(module).__name__, tuple(own), settings_of(module))

    # --- What handlers need -------------------------------------------------------------------------------------------

    def flatten(self, tree: Any) -> tuple[list[Any], Any]:
        """Return leaves and structure; modules and None are leaves."""
        return jax.tree.flatten(tree, is_leaf=lambda leaf: leaf is None or isinstance(leaf, nnx.Module))

    def unflatten(self, leaves: list[Any], tree: Any) -> Any:
        """Put them together."""
        return jax.tree.unflatten(tree, leaves)

    def is_array(self, leaf: Any) -> bool:
        """Return whether a leaf is an array of numbers."""
        return isinstance(leaf, jax.Array | np.ndarray) and _is_number(leaf)

    # --- Runs ---------------------------------------------------------------------------------------------------------

    def record(self, tapped: Iterable[str], make_gradients: Callable[[Arrays], Gradients] | None) -> dict[str, Call]:
        """Run the model on its batch; see `parity_tests.losses.models.Model`."""
        wanted = {*tapped, MODEL}

        def run(perturbations: dict[str, dict[str, list[Any]]]) -> Any:
            def perturb(key: str, which: str, arrays: list[Any]) -> list[Any]:
                zeros = perturbations.get(key, {}).get(which)
                arrays = [jnp.asarray(array) for array in arrays]
                return arrays if zeros is None else [_added(*pair) for pair in zip(arrays, zeros, strict=True)]

            recorder = Recorder(self, perturb)
            model, paths = self._merged(MODEL, self.tensors, None, None)
            args, kwargs = put_together(self, self._arguments, [jnp.asarray(array) for array in self.inputs])
            with _intercepted(model, paths, wanted, recorder):
                recorder(MODEL, model, args, kwargs)
            self._calls, self._structures = recorder.calls, recorder.structures
            return [recorder.calls[MODEL].outputs, {key: (c.inputs, c.outputs) for key, c in recorder.calls.items()}]

        outputs, values = jax.jit(run)({})
        if make_gradients is not None:
            seeds = [each for each in make_gradients([np.asarray(output) for output in outputs]) if each is not None]

            def differentiable(zeros: Any) -> Any:
                outputs, values = run(zeros)
                return [output for output in outputs if _is_floating(output)], values

            def gradients_of(zeros: Any, seeds: list[Any]) -> Any:
                _, pull, values = jax.vjp(differentiable, zeros, has_aux=True)
                return pull(seeds)[0], values

            zeros = {key: {"inputs": _zeros(pair[0]), "outputs": _zeros(pair[1])} for key, pair in values.items()}
            gradients, values = jax.jit(gradients_of)(zeros, seeds)
            for key, call in self._calls.items():
                call.input_gradients = _as_gradients(gradients[key]["inputs"])
                call.output_gradients = _as_gradients(gradients[key]["outputs"])
        for key, call in self._calls.items():
            call.inputs, call.outputs = ([np.asarray(array) for array in arrays] for arrays in values[key])
        self._tapped = frozenset(wanted)
        return self._calls

    def run(
        self, key: str, given: Given, dtype: str | None = None, *, bits: int | None = None, stream: int = 0
    ) -> Result:
        """Run a recorded call again, alone; see `parity_tests.losses.models.Model`."""
        on_cpu = bits is not None and jax.default_backend() != "cpu"
        with _precision(dtype), nullcontext() if bits is None else _on_cpu():
            traced, run, operands, result = self._prepared(key, given, dtype, stream, on_cpu)
            if bits is None or bits == FULL:
                return result(run(*operands))
            values = _RoundedProducts(bits).run(traced.jaxpr, jax.tree.leaves(operands))
            return result(jax.tree.unflatten(jax.tree.structure(traced.out_info), values))

    def forget_programs(self) -> None:
        """Drop what was traced."""
        self._compiled.clear()

    def narrowest(self, key: str, given: Given, dtype: str | None = None) -> str:
        """Return the floating-point dtype with the fewest bits that a call computes anything in."""
        with _precision(dtype):
            traced, _, operands, _ = self._prepared(key, given, dtype, 0, False)
        found = {str(each.dtype) for each in jax.tree.leaves(operands) if _is_floating(each)}
        return max(found | set(_dtypes(traced.jaxpr.jaxpr)), key=lambda name: FORMATS[name].roundoff)

    def _prepared(
        self, key: str, given: Given, dtype: str | None, stream: int, on_cpu: bool
    ) -> tuple[Any, Any, tuple[Any, ...], Callable[[Any], Result]]:
        """Return the program of a call, traced and compiled, its operands, and what makes a result of its results."""
        program, operands, result = self._program(key, given, dtype, stream)
        place = self._tapped, key, dtype, on_cpu
        if place not in self._compiled:
            traced = jax.jit(program).trace(*operands)
            self._compiled[place] = traced, traced.lower().compile()
        return *self._compiled[place], operands, result

    def _program(
        self, key: str, given: Given, dtype: str | None, stream: int
    ) -> tuple[Callable[..., Any], tuple[Any, ...], Callable[[Any], Result]]:
        """Return a function of arrays, its operands, and what makes a result of its results.

        The function is the same for all that a call may be given.
        """
        call = Call(LOSS, LOSS, None) if key == LOSS else self._calls[key]
        tensors = {} if key == LOSS else _cast(self._tensors_of(call.path), dtype)
        weights = {name: given.weights.get(name, each) for name, each in tensors.items() if name in self.trainable}
        fixed = {name: each for name, each in tensors.items() if name not in self.trainable}
        held = _cast((given.inputs, dict(given.child_outputs)), dtype)
        differentiated, others, place = _partition((_cast(weights, dtype), held))
        seeds = _cast(
            [[each for each in given.output_gradients if each is not None]]
            + [[each for each in given.child_input_gradients[child] if each is not None] for child in call.children],
            dtype,
        )

        def program(floating: list[Any], others: list[Any], fixed: Any, seeds: list[Any], stream: Any) -> Any:
            def forward(floating: list[Any]) -> Any:
                weights, (inputs, child_outputs) = place(floating, others)
                outputs, child_inputs = self._forward(call, {**fixed, **weights}, inputs, child_outputs, dtype, stream)
                groups = [outputs, *(child_inputs[child] for child in call.children)]
                return [[each for each in group if _is_floating(each)] for group in groups], (outputs, child_inputs)

            primal, pull, (outputs, child_inputs) = jax.vjp(forward, floating, has_aux=True)
            flowing = jax.tree.map(lambda seed, value: seed.astype(value.dtype), seeds, primal)
            return outputs, child_inputs, pull(flowing)[0]

        def result(results: Any) -> Result:
            outputs, child_inputs, gradients = results
            of_weights, (of_inputs, of_children) = place(gradients, [None] * len(others))
            return Result(
                [np.asarray(each) for each in outputs],
                {child: [np.asarray(each) for each in arrays] for child, arrays in child_inputs.items()},
                _as_gradients(of_inputs),
                {child: _as_gradients(arrays) for child, arrays in of_children.items()},
                {name: np.asarray(each) for name, each in of_weights.items()},
            )

        return program, (differentiated, others, fixed, seeds, np.uint32(stream)), result

    def _tensors_of(self, path: str) -> dict[str, NDArray[Any]]:
        """Return all tensors that a layer may use."""
        module = self._modules[path]
        flat = nnx.to_flat_state(nnx.state(module))
        names = {self._tensor_names.get(id(_at(module, within))) for within, _ in flat}
        return {name: values for name, values in self.tensors.items() if name in names}

    def _forward(
        self,
        call: Call,
        tensors: Mapping[str, Any],
        inputs: list[Any],
        child_outputs: Mapping[str, list[Any]],
        dtype: str | None,
        stream: Any,
    ) -> tuple[list[Any], dict[str, list[Any]]]:
        if call.key == LOSS:
            assert self._loss is not None
            value = self._loss(put_together(self, self._structures[MODEL][1], inputs))
            return [jnp.asarray(value)], {}
        model, paths = self._merged(call.path, tensors, dtype, stream)
        children = {child: self._calls[child].path for child in call.children}
        stubs = Stubs(self, call, child_outputs, self._structures, children)
        args, kwargs = put_together(self, self._structures[call.key][0], inputs)
        with _intercepted(model, paths, set(children.values()), stubs):
            result = model(*args, **kwargs)
        arrays, _ = take_apart(self, result)
        return [jnp.asarray(array) for array in arrays], stubs.inputs_of_children(call)

    def _merged(
        self, name: str, tensors: Mapping[str, Any], dtype: str | None, stream: Any
    ) -> tuple[Any, dict[int, str]]:
        """Return a copy of a layer with these tensors, and the names of the modules within."""
        if name not in self._split:
            self._split[name] = nnx.split(self._modules[name])
        graph, state = self._split[name]
        original = self._modules[name]
        replaced = []
        for path, variable in nnx.to_flat_state(state):
            value = variable[...]
            if _is_number(value) and (found := self._tensor_names.get(id(_at(original, path)))) is not None:
                variable = variable.replace(jnp.asarray(tensors[found]))  # noqa: PLW2901
            elif stream is not None and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
                variable = variable.replace(jax.random.fold_in(value, stream))  # noqa: PLW2901
            replaced.append((path, variable))
        model = nnx.merge(graph, nnx.from_flat_state(replaced))
        paths = {}
        for path, module in nnx.iter_modules(model):
            paths[id(module)] = self._names[id(_at(original, path))]
            # Modules such as Embed cast to the dtype that they were made with.
            if dtype is not None and _is_dtype(getattr(module, "dtype", None)):
                vars(module)["dtype"] = jnp.dtype(dtype)
        return model, paths


# --- Helpers ----------------------------------------------------------------------------------------------------------


@contextmanager
def _intercepted(model: Any, paths: Mapping[int, str], wanted: set[str], handler: Any) -> Iterator[None]:
    """Give the calls of wanted modules to a handler, but for those of the model itself."""
    names = {
        id(module): paths[id(module)]
        for _, module in nnx.iter_modules(model)
        if module is not model and callable(module) and paths[id(module)] in wanted
    }
    kinds = {type(module) for _, module in nnx.iter_modules(model) if id(module) in names}
    originals: dict[Any, Any] = {kind: kind.__call__ for kind in kinds}
    own = {kind for kind in kinds if "__call__" in vars(kind)}

    def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            name = names.get(id(self))
            bound = partial(original, self)
            return bound(*args, **kwargs) if name is None else handler(name, bound, args, kwargs)

        return call

    for kind, original in originals.items():
        kind.__call__ = replacement(original)
    try:
        yield
    finally:
        for kind, original in originals.items():
            if kind in own:
                kind.__call__ = original
            else:
                del kind.__call__


@contextmanager
def _precision(dtype: str | None) -> Iterator[None]:
    """Run in float64, on a CPU since TPUs have none; or as the user has set JAX up."""
    if dtype != "float64":
        yield
        return
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), _on_cpu():
        yield


def _on_cpu() -> Any:
    return jax.default_device(jax.devices("cpu")[0])


class _RoundedProducts(SimulatedDevice):
    """Runs programs with the operands of matrix products and convolutions rounded to some bits."""

    def __init__(self, bits: int) -> None:
        super().__init__("cpu", EXACT)
        self.bits = bits

    def _computed(self, name: str, params: dict[str, Any], operands: Values) -> Any:
        return None  # by the primitive itself

    def _apply(self, equation: Any, operands: Values) -> Values:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            bits = _kept_bits(self.bits, equation.params["precision"])
            operands = [rounded_to_bits(each, bits) if each.dtype == np.float32 else each for each in operands]
        return super()._apply(equation, operands)


def _kept_bits(bits: int, precision: Any) -> int:
    """Return how many bits of its operands a product keeps: more passes keep more of them."""
    asked = precision[0] if isinstance(precision, tuple) else precision
    if asked == jax.lax.Precision.HIGH:
        return min(FULL, 2 * bits)
    return FULL if asked == jax.lax.Precision.HIGHEST else bits


def _dtypes(program: Any) -> Iterator[str]:
    """Yield the floating-point dtypes of all that a program computes, and programs within."""
    for equation in program.eqns:
        for variable in equation.outvars:
            dtype = getattr(variable.aval, "dtype", None)
            if dtype is not None and str(dtype) in FORMATS:
                yield str(dtype)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda each: hasattr(each, "eqns")):
            inner = getattr(inner, "jaxpr", inner)  # noqa: PLW2901
            if hasattr(inner, "eqns"):
                yield from _dtypes(inner)


def _name(path: Path) -> str:
    return ".".join(map(str, path)) or MODEL


def _at(module: Any, path: Path) -> Any:
    """Return what is at a path within a module."""
    for part in path:
        module = module[part] if isinstance(part, int) else getattr(module, part)
    return module


def _is_number(value: Any) -> bool:
    return not jnp.issubdtype(value.dtype, jax.dtypes.extended) and (value.dtype.kind in "biuf" or _is_floating(value))


def _is_floating(value: Any) -> bool:
    return bool(jnp.issubdtype(value.dtype, jnp.floating))


def _is_dtype(value: Any) -> bool:
    try:
        return value is not None and bool(jnp.issubdtype(value, jnp.floating))
    except TypeError:
        return False


def _cast(tree: Any, dtype: str | None) -> Any:
    """Return the arrays of a tree, those of floating-point numbers in a dtype."""

    def cast(value: Any) -> Any:
        return value.astype(dtype) if dtype is not None and _is_floating(value) else value

    return jax.tree.map(cast, tree)


def _partition(tree: Any) -> tuple[list[Any], list[Any], Callable[[list[Any], list[Any]], Any]]:
    """Return the floating-point leaves of a tree, the others, and what puts them together again."""
    leaves, structure = jax.tree.flatten(tree)
    marks = [_is_floating(leaf) for leaf in leaves]

    def place(floating: list[Any], others: list[Any]) -> Any:
        numbers, rest = iter(floating), iter(others)
        return jax.tree.unflatten(structure, [next(numbers if mark else rest) for mark in marks])

    pairs = list(zip(leaves, marks, strict=True))
    return [leaf for leaf, mark in pairs if mark], [leaf for leaf, mark in pairs if not mark], place


def _zeros(shapes: list[Any]) -> list[Any]:
    return [np.zeros(each.shape, each.dtype) if _is_floating(each) else None for each in shapes]


def _added(array: Any, zeros: Any) -> Any:
    return array if zeros is None else array + zeros


def _as_gradients(arrays: list[Any]) -> list[NDArray[Any] | None]:
    return [None if array is None else np.asarray(array) for array in arrays]
