"""The process that makes TorchTPU's programs: run by the Python of an environment of its own, see `torchtpu.py`.

TorchTPU brings a tracer: it runs torch eagerly on placeholders, gradients included, and returns what a TPU would get,
as StableHLO. No TPU is needed for that, only a torch that believes in one. All of it is private to TorchTPU and JAX, so
the environment pins their versions (constraints-torchtpu.txt).

Each request and each answer is a pickled pair on the standard input and output.
"""

import ctypes
import importlib
import importlib.metadata
import os
import pathlib
import pickle
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

import lsce_torch
from lsce_cost.devices import TOPOLOGIES
from parity_tests.losses.adapters import TorchAdapter, operands_of, to_torch
from parity_tests.losses.interpreted import evaluate
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import AnyResult

# c10::impl::device_guard_impl_registry: for each type of device, the object that says which device is current.
_GUARDS, _NUM_GUARDS, _OF_TPU = "_ZN3c104impl26device_guard_impl_registryE", 22, 20
# What crosses the boundary of StableHLO's interpreter.
_CARRIERS = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
# A matrix product in the text of a module: its indentation, name, operation with the shape, that shape, and the dtype.
_NARROW_PRODUCT = re.compile(r"^( *)%(\w+) = (stablehlo\.dot_general .* -> (tensor<[\dx]*))(bf16|f16)>", re.MULTILINE)

_ROUNDED_ONCE = r"\1%wide\2 = \3f32>\n\1%\2 = stablehlo.convert %wide\2 : (\4f32>) -> \4\5>"


def _one_device() -> Any:
    """Return torch's own guard for devices that are made in Python: it says that there is one."""
    guard: Any = torch._C._acc.DeviceGuard  # type: ignore[attr-defined, unused-ignore]

    class OneDevice(guard):  # type: ignore[misc]
        def type_(self) -> Any:
            """Return the type of device that TorchTPU takes."""
            return torch._C._autograd.DeviceType.PrivateUse1  # type: ignore[attr-defined, unused-ignore]

    return OneDevice()


class Tracer:
    """TorchTPU's tracer, for a TPU that is not there."""

    def __init__(self) -> None:
        """Load TorchTPU, and let autograd believe in one device."""
        self.guard = _one_device()  # torch keeps a pointer to it
        torch._C._acc.register_python_privateuseone_device_guard(self.guard)  # type: ignore[attr-defined, unused-ignore]
        library = ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib" / "libc10.so"))
        guards = (ctypes.c_void_p * _NUM_GUARDS).in_dll(library, _GUARDS)
        one_device = guards[_OF_TPU]
        # What `load` does where it finds a TPU. It puts a guard into the place that counts the TPUs of this machine:
        # autograd ends the process where it finds none.
        importlib.import_module("torch_tpu._loader")._init_device("tpu")
        guards[_OF_TPU] = one_device
        self.compiler = importlib.import_module("torch_tpu._internal.compile.tpu_torch_compile")
        self.mode = importlib.import_module("torch_tpu._internal.execution_mode")

    def trace(self, function: Callable[..., list[torch.Tensor]], *placeholders: tuple[Any, torch.dtype, bool]) -> str:
        """Return a function of tensors as StableHLO, from their shapes, dtypes and whether they need a gradient."""
        with (
            self.mode.set_eager_mode(self.mode.EagerMode._INTERNAL_COMPILE_FX_GRAPH),
            torch.autograd.set_multithreading_enabled(False),
        ):
            operands = [self.compiler.placeholder(list(shape), *others) for shape, *others in placeholders]
            text: str = self.compiler.serialize_mlir_text(self.compiler.build_mlir(function(*operands), operands))
            return text

    def program(self, adapter: TorchAdapter, case: Case) -> tuple[str, list[NDArray[Any]], dict[str, torch.dtype]]:
        """Return the loss and the gradients of a case as StableHLO, its operands, and the dtypes of its results."""
        arrays, options = operands_of(case, adapter.implementation)
        given = {name: to_torch(array) for name, array in arrays.items()}
        carried = {name: _carried(tensor) for name, tensor in given.items()}
        dtypes = {}

        def step(*placeholders: torch.Tensor) -> list[torch.Tensor]:
            named = zip(given.items(), placeholders, strict=True)
            operands = {name: _restored(each, tensor.dtype) for (name, tensor), each in named}
            parts = adapter.parts(case, operands, options)
            dtypes.update({name: parts[name].dtype for name in sorted(parts)})
            return [parts[name].to(torch.float32) for name in dtypes]

        text = self.trace(step, *((each.shape, each.dtype, False) for each in carried.values()))
        return text, [each.numpy() for each in carried.values()], dtypes


def _carried(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as the interpreter takes it: floating point in float32, others in int64."""
    if tensor.is_floating_point():
        return tensor.to(_CARRIERS.get(tensor.dtype, tensor.dtype))
    return tensor.view(torch.int64) if tensor.dtype == torch.uint64 else tensor.to(torch.int64)


def _restored(placeholder: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a carried tensor in its own dtype, within the program."""
    if dtype == torch.uint64:
        return placeholder.view(torch.uint64)
    return placeholder.to(dtype)


def interpreted(tracer: Tracer, adapter: TorchAdapter, case: Case) -> AnyResult:
    """Return loss and gradients of a case, from StableHLO's reference interpreter."""
    text, operands, dtypes = tracer.program(adapter, case)
    results = evaluate(for_the_interpreter(text), operands)
    parts = {
        name: torch.from_numpy(part).to(dtype) for part, (name, dtype) in zip(results, dtypes.items(), strict=True)
    }
    return adapter.result(case, parts)


def for_the_interpreter(text: str) -> str:
    """Return a module that StableHLO's interpreter takes, and whose matrix products are added in float32.

    It lacks what StableHLO has replaced, such as `dot`. It would add products of narrow numbers in their own dtype, and
    round each sum; a TPU adds them in float32, and rounds the result.
    """
    from jax._src.interpreters import mlir
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo
    from jaxlib.mlir.passmanager import PassManager

    with mlir.make_ir_context():
        stablehlo.register_stablehlo_passes()
        module = ir.Module.parse(text)
        passes = "stablehlo-legalize-deprecated-ops{fail-on-unused=false}"
        PassManager.parse(f"builtin.module(func.func({passes}))").run(module.operation)
    return _NARROW_PRODUCT.sub(_ROUNDED_ONCE, str(module))


def compiled(tracer: Tracer, adapter: TorchAdapter, case: Case, generation: str) -> dict[str, float]:
    """Return what libtpu says of the program that it compiled for a generation of TPUs."""
    text, _, _ = tracer.program(adapter, case)
    return compile_for(generation, text)


def traffic(tracer: Tracer, generation: str, shape: Sequence[int]) -> dict[str, float]:
    """Return what libtpu says of loss and gradients in bfloat16 of N x K logits, or of a linear layer, N x D x K."""
    rows, *features, classes = shape
    loss: Callable[..., torch.Tensor] = lsce_torch.label_smoothed_cross_entropy
    shapes: list[tuple[int, ...]] = [(rows, classes)]
    if features:
        loss, shapes = lsce_torch.linear_label_smoothed_cross_entropy, [(rows, *features), (classes, *features)]

    def step(*operands: torch.Tensor) -> list[torch.Tensor]:
        value = loss(*operands, smoothing=0.1)
        return [value, *torch.autograd.grad(value, operands[:-1])]

    labels = (rows,), torch.int64, False
    return compile_for(generation, tracer.trace(step, *((each, torch.bfloat16, True) for each in shapes), labels))


def compile_for(generation: str, text: str) -> dict[str, float]:
    """Return the bytes that a compiled StableHLO module accesses, and what it holds beside operands and results."""
    from jax._src import compiler
    from jax._src.interpreters import mlir
    from jax.experimental import topologies
    from jaxlib.mlir import ir

    # What only some versions of JAX have, private as it is.
    _jax: Any = importlib.import_module("jax._src.lib")._jax
    device: Any = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[f"tpu-{generation}"]).devices[0]
    assignment = np.array([[device.id]])
    options = compiler.get_compile_options(1, 1, device_assignment=assignment, backend=device.client)
    with mlir.make_ir_context():
        executable = device.client.compile(ir.Module.parse(text), _jax.DeviceList((device,)), options)
    costs = executable.cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs
    return {
        "bytes accessed": costs["bytes accessed"],
        "temporary": executable.get_compiled_memory_stats().temp_size_in_bytes,
    }


def adapter_of(loss: str | None, options: dict[str, Any]) -> TorchAdapter:
    """Return an adapter of a loss: of lsce_torch, or of a function in a module, "module:function"."""
    if loss is None:
        return TorchAdapter(**options)
    module, _, function = loss.partition(":")
    return TorchAdapter(getattr(importlib.import_module(module), function), **options)


def answer(tracer: Tracer, request: dict[str, Any]) -> Any:
    """Return what a request asks for."""
    if "shape" in request:
        return traffic(tracer, request["generation"], request["shape"])
    adapter = adapter_of(request["loss"], request["options"])
    if "program" in request:
        text, operands, dtypes = tracer.program(adapter, request["case"])
        names = {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}
        return for_the_interpreter(text), operands, names
    if "generation" in request:
        return compiled(tracer, adapter, request["case"], request["generation"])
    return interpreted(tracer, adapter, request["case"])


def main() -> None:
    """Answer requests until there are no more."""
    # Libraries print to the standard output. From here on that is the standard error.
    answers: BinaryIO = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    tracer = Tracer()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torch-tpu", "libtpu", "jax")}
    pickle.dump((True, versions), answers)
    answers.flush()
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            outcome: tuple[bool, Any] = True, answer(tracer, request)
        except Exception as error:
            outcome = False, f"{type(error).__name__}: {error}"
        pickle.dump(outcome, answers)
        answers.flush()


if __name__ == "__main__":
    main()
