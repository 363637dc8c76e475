"""Models of torch whose layers run one at a time; see `parity_tests.losses.models`.

Calls are taken over by replacing `forward` of the modules while a model runs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from parity_tests.losses.adapters import to_torch
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
from parity_tests.truth.arithmetic import FULL
from parity_tests.truth.precision import FORMATS
from parity_tests.truth.simulation import rounded_to_bits


class TorchModel:
    """A model of torch.

    Args:
        model: the module.
        inputs: its arguments: a tensor, a tuple of them, or a dictionary of arguments by name.
        loss: returns a scalar of the model's output; None for no loss.
    """

    framework = "torch"

    def __init__(self, model: Any, inputs: Any, loss: Callable[[Any], Any] | None = None) -> None:
        """Find the layers and weights."""
        if not isinstance(model, torch.nn.Module):
            raise ModelError(f"expected a torch.nn.Module, got a {type(model).__name__}")
        self._model = model
        self._modules = {name or MODEL: module for name, module in model.named_modules()}
        self._names = {id(module): name for name, module in self._modules.items()}
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._tensor_names = {id(tensor): name for name, tensor in tensors.items()}
        self.tensors = {name: _to_numpy(tensor) for name, tensor in tensors.items()}
        self.trainable = frozenset(name for name, _ in model.named_parameters())
        self.layers = {name: self._layer(name, module) for name, module in self._modules.items()}
        arguments = (
            ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
        )
        arrays, self._arguments = take_apart(self, (arguments[0], dict(sorted(arguments[1].items()))))
        self.inputs = [_to_numpy(array) for array in arrays]
        self._device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
        self._loss, self.has_loss = loss, loss is not None
        self._calls: dict[str, Call] = {}
        self._structures: dict[str, tuple[Structure, Structure]] = {}

    def _layer(self, name: str, module: torch.nn.Module) -> Layer:
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        names = tuple(
            _joined(name, each) for each, tensor in own if self._tensor_names[id(tensor)] == _joined(name, each)
        )
        parts = tuple(name.split(".")) if name != MODEL else ()
        return Layer(name, parts, type(module).__name__, names, settings_of(module))

    # --- What handlers need -------------------------------------------------------------------------------------------

    def flatten(self, tree: Any) -> tuple[list[Any], Any]:
        """Return leaves and structure."""
        return _pytree.tree_flatten(tree)

    def unflatten(self, leaves: list[Any], tree: Any) -> Any:
        """Put them together."""
        return _pytree.tree_unflatten(leaves, tree)

    def is_array(self, leaf: Any) -> bool:
        """Return whether a leaf is an array of numbers."""
        return isinstance(leaf, Tensor | np.ndarray)

    # --- Runs ---------------------------------------------------------------------------------------------------------

    def record(self, tapped: Iterable[str], make_gradients: Callable[[Arrays], Gradients] | None) -> dict[str, Call]:
        """Run the model on its batch; see `parity_tests.losses.models.Model`."""
        zeros: dict[tuple[str, str], list[Any]] = {}
        values: dict[tuple[str, str], list[Any]] = {}

        def perturb(key: str, which: str, arrays: list[Any]) -> list[Any]:
            added = [_zeros_like(array) for array in arrays]
            zeros[key, which] = added
            arrays = [array if zero is None else array + zero for array, zero in zip(arrays, added, strict=True)]
            values[key, which] = [_to_numpy(array) for array in arrays]
            return arrays

        recorder = Recorder(self, perturb)
        inputs = [_to_tensor(array, None, self._device) for array in self.inputs]
        args, kwargs = put_together(self, self._arguments, inputs)
        wanted = {*tapped} - {MODEL}
        # Weights with a gradient, since some modules have another way without.
        weights = {name: _leaf(self.tensors[name], None, self._device) for name in self.trainable}
        with torch.enable_grad(), _stream(0), _intercepted(self._modules, wanted, recorder):
            recorder(MODEL, self._caller(MODEL, {**self.tensors, **weights}, None, self._device), args, kwargs)
        self._calls, self._structures = recorder.calls, recorder.structures
        if make_gradients is not None:
            outputs = recorder.calls[MODEL].outputs
            pairs = [
                (output, _to_tensor(gradient, None, self._device))
                for output, gradient in zip(outputs, make_gradients(values[MODEL, "outputs"]), strict=True)
                if gradient is not None
            ]
            found = iter(_gradients(pairs, [zero for each in zeros.values() for zero in each if zero is not None]))
            gradients = {
                place: [None if zero is None else next(found) for zero in each] for place, each in zeros.items()
            }
            for key, call in self._calls.items():
                call.input_gradients, call.output_gradients = gradients[key, "inputs"], gradients[key, "outputs"]
        for key, call in self._calls.items():
            call.inputs, call.outputs = values[key, "inputs"], values[key, "outputs"]
        return self._calls

    def run(
        self, key: str, given: Given, dtype: str | None = None, *, bits: int | None = None, stream: int = 0
    ) -> Result:
        """Run a recorded call again, alone; see `parity_tests.losses.models.Model`."""
        if bits is None:
            return self._run(key, given, dtype, stream)
        with sdpa_kernel(SDPBackend.MATH):  # as one kernel, attention has no matrix products of its own
            mode = None if bits == FULL else _RoundedProducts(bits)
            return self._run(key, given, dtype, stream, mode, on_cpu=True)

    def forget_programs(self) -> None:
        """Drop what was traced: torch traces nothing."""

    def narrowest(self, key: str, given: Given, dtype: str | None = None) -> str:
        """Return the floating-point dtype with the fewest bits that a call computes anything in."""
        seen = _DtypesSeen()
        self._run(key, given, dtype, 0, seen)
        return max(seen.found, key=lambda name: FORMATS[name].roundoff)

    def _run(
        self, key: str, given: Given, dtype: str | None, stream: int, mode: Any = None, on_cpu: bool = False
    ) -> Result:
        device = torch.device("cpu") if dtype == "float64" or on_cpu else self._device
        call = Call(LOSS, LOSS, None) if key == LOSS else self._calls[key]
        inputs, child_outputs = (
            [_leaf(array, dtype, device) for array in given.inputs],
            {child: [_leaf(array, dtype, device) for array in arrays] for child, arrays in given.child_outputs.items()},
        )
        module = None if key == LOSS else self._modules[call.path]
        names = [] if module is None else sorted(self._tensor_names[id(each)] for each in module.parameters())
        held = {**self.tensors, **given.weights}
        weights = {name: _leaf(held[name], dtype, device) for name in names}
        layer = self._loss if key == LOSS else self._caller(call.path, {**held, **weights}, dtype, device)
        assert layer is not None
        operands = [*weights.values(), *inputs, *(each for arrays in child_outputs.values() for each in arrays)]
        differentiated = [each for each in operands if each.requires_grad]
        with torch.enable_grad(), _stream(stream), mode or nullcontext():
            outputs, child_inputs = self._forward(call, layer, inputs, child_outputs)
            flowing = [(outputs, given.output_gradients)] + [
                (child_inputs[child], given.child_input_gradients[child]) for child in call.children
            ]
            pairs = [
                (value, _to_tensor(gradient, str(value.dtype).removeprefix("torch."), value.device))
                for values, gradients in flowing
                for value, gradient in zip(values, gradients, strict=True)
                if gradient is not None
            ]
            found = iter(_gradients(pairs, differentiated))
        of_weights = {name: next(found) for name in weights}
        of_inputs = [next(found) if each.requires_grad else None for each in inputs]
        of_children = {
            child: [next(found) if each.requires_grad else None for each in arrays]
            for child, arrays in child_outputs.items()
        }
        return Result(
            [_to_numpy(each) for each in outputs],
            {child: [_to_numpy(each) for each in arrays] for child, arrays in child_inputs.items()},
            of_inputs,
            of_children,
            of_weights,
        )

    def _forward(
        self, call: Call, layer: Callable[..., Any], inputs: list[Tensor], child_outputs: Mapping[str, list[Tensor]]
    ) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        inputs = [each.clone() for each in inputs]  # may be changed in place
        if call.key == LOSS:
            return [layer(put_together(self, self._structures[MODEL][1], inputs))], {}
        given = {child: [each.clone() for each in arrays] for child, arrays in child_outputs.items()}
        children = {child: self._calls[child].path for child in call.children}
        stubs = Stubs(self, call, given, self._structures, children, keep=torch.clone)
        args, kwargs = put_together(self, self._structures[call.key][0], inputs)
        with _intercepted(self._modules, set(children.values()), stubs):
            arrays, _ = take_apart(self, layer(*args, **kwargs))
        return arrays, stubs.inputs_of_children(call)

    def _caller(
        self, name: str, tensors: Mapping[str, Any], dtype: str | None, device: torch.device
    ) -> Callable[..., Any]:
        """Return what calls a layer with copies of these tensors."""
        module = self._modules[name]
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        found = {each: tensors[self._tensor_names[id(tensor)]] for each, tensor in own.items()}
        held = {
            each: value if isinstance(value, Tensor) else _to_tensor(value, dtype, device)
            for each, value in found.items()
        }
        return lambda *args, **kwargs: functional_call(module, held, args, kwargs)


# --- Helpers ----------------------------------------------------------------------------------------------------------


@contextmanager
def _intercepted(modules: Mapping[str, torch.nn.Module], wanted: set[str], handler: Any) -> Iterator[None]:
    """Give the calls of wanted modules to a handler."""
    before: dict[str, Any] = {name: vars(modules[name]).get("forward") for name in wanted}

    def replacement(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: handler(name, original, args, kwargs)

    for name in wanted:
        vars(modules[name])["forward"] = replacement(name, modules[name].forward)
    try:
        yield
    finally:
        for name, forward in before.items():
            if forward is None:
                del vars(modules[name])["forward"]
            else:
                vars(modules[name])["forward"] = forward


@contextmanager
def _stream(number: int) -> Iterator[None]:
    """Seed torch's random numbers, and put them back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(number)
        yield


class _RoundedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Rounds the operands of matrix products and convolutions to some bits."""

    def __init__(self, bits: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bits = bits

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return the result of an operation."""
        operands = _FACTORS.get(operation._schema.name.partition("::")[2], ())
        rounded = [self._rounded(each) if index in operands else each for index, each in enumerate(args)]
        return operation(*rounded, **(kwargs or {}))

    def _rounded(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        return _to_tensor(rounded_to_bits(_to_numpy(tensor), self.bits), None, tensor.device)


# Which arguments of an operation are multiplied with each other.
_FACTORS = {
    "addmm": (1, 2),
    "addmv": (1, 2),
    "baddbmm": (1, 2),
    "bmm": (0, 1),
    "convolution": (0, 1),
    "convolution_backward": (0, 1, 2),
    "dot": (0, 1),
    "mm": (0, 1),
    "mv": (0, 1),
}


class _DtypesSeen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the names of the floating-point dtypes of all results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[str] = set()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return the result of an operation."""
        result = operation(*args, **(kwargs or {}))
        for each in _pytree.tree_leaves(result):
            if isinstance(each, Tensor) and (name := str(each.dtype).removeprefix("torch.")) in FORMATS:
                self.found.add(name)
        return result


def _gradients(pairs: list[tuple[Any, Any]], operands: list[Any]) -> list[NDArray[Any]]:
    """Return the gradients of the sum of value * gradient over all pairs with respect to the operands."""
    pairs = [(value, gradient) for value, gradient in pairs if value.requires_grad]
    if not pairs or not operands:
        return [_to_numpy(torch.zeros_like(each)) for each in operands]
    values, flowing = zip(*pairs, strict=True)
    found = torch.autograd.grad(values, operands, flowing, allow_unused=True)
    return [
        _to_numpy(torch.zeros_like(each) if gradient is None else gradient)
        for each, gradient in zip(operands, found, strict=True)
    ]


def _joined(module: str, tensor: str) -> str:
    return tensor if module == MODEL else f"{module}.{tensor}"


def _to_numpy(value: Any) -> NDArray[Any]:
    if not isinstance(value, Tensor):
        return np.asarray(value)
    value = value.detach().cpu().contiguous()
    if value.dtype == torch.bfloat16:
        return np.array(value.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.array(value.numpy())


def _to_tensor(array: NDArray[Any], dtype: str | None, device: torch.device) -> Tensor:
    if dtype is not None and array.dtype.name in FORMATS:
        array = array.astype(dtype)
    return cast(Tensor, to_torch(np.array(array)).to(device))


def _leaf(array: NDArray[Any], dtype: str | None, device: torch.device) -> Tensor:
    """Return a tensor of its own, with a gradient if it holds floating-point numbers."""
    tensor = _to_tensor(array, dtype, device)
    return tensor.requires_grad_(tensor.is_floating_point())


def _zeros_like(value: Any) -> Tensor | None:
    is_floating = isinstance(value, Tensor) and value.is_floating_point()
    return torch.zeros_like(value, requires_grad=True) if is_floating else None
