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
import sys
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from parity_tests.losses.adapters import TorchAdapter, operands_of, to_torch
from parity_tests.losses.interpreted import evaluate
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import AnyResult

# What libtpu calls a small slice of each generation.
TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "v7x": "tpu7x:2x2x1",
}
# c10::impl::device_guard_impl_registry: for each type of device, the object that says which device is current.
_GUARDS, _NUM_GUARDS, _OF_TPU = "_ZN3c104impl26device_guard_impl_registryE", 22, 20
# What crosses the boundary of StableHLO's interpreter.
_CARRIERS = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


class _OneDevice(torch._C._acc.DeviceGuard):  # type: ignore[misc, name-defined, unused-ignore]
    """torch's own guard for devices that are made in Python: it says that there is one."""

    def type_(self) -> Any:
        """Return the type of device that TorchTPU takes."""
        return torch._C._autograd.DeviceType.PrivateUse1  # type: ignore[attr-defined, unused-ignore]


_ONE_DEVICE = _OneDevice()  # torch keeps a pointer to it


class Tracer:
    """TorchTPU's tracer, for a TPU that is not there."""

    def __init__(self) -> None:
        """Load TorchTPU, and let autograd believe in one device."""
        torch._C._acc.register_python_privateuseone_device_guard(_ONE_DEVICE)  # type: ignore[attr-defined, unused-ignore]
        library = ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib" / "libc10.so"))
        guards = (ctypes.c_void_p * _NUM_GUARDS).in_dll(library, _GUARDS)
        one_device = guards[_OF_TPU]
        # What `load` does where it finds a TPU. It puts a guard into the place that counts the TPUs of this machine:
        # autograd ends the process where it finds none.
        importlib.import_module("torch_tpu._loader")._init_device("tpu")
        guards[_OF_TPU] = one_device
        self.compiler = importlib.import_module("torch_tpu._internal.compile.tpu_torch_compile")
        self.mode = importlib.import_module("torch_tpu._internal.execution_mode")

    def program(self, adapter: TorchAdapter, case: Case) -> tuple[str, list[NDArray[Any]], dict[str, torch.dtype]]:
        """Return the loss and the gradients of a case as StableHLO, its operands, and the dtypes of its results."""
        arrays, options = operands_of(case, adapter.implementation)
        given = {name: to_torch(array) for name, array in arrays.items()}
        carried = {name: _carried(tensor) for name, tensor in given.items()}
        with (
            self.mode.set_eager_mode(self.mode.EagerMode._INTERNAL_COMPILE_FX_GRAPH),
            torch.autograd.set_multithreading_enabled(False),
        ):
            placeholders = {n: self.compiler.placeholder(list(t.shape), t.dtype, False) for n, t in carried.items()}
            operands = {name: _restored(each, given[name].dtype) for name, each in placeholders.items()}
            parts = adapter.parts(case, operands, options)
            results = [parts[name].to(torch.float32) for name in sorted(parts)]
            text = self.compiler.serialize_mlir_text(self.compiler.build_mlir(results, list(placeholders.values())))
        return text, [each.numpy() for each in carried.values()], {name: parts[name].dtype for name in sorted(parts)}


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
    results = evaluate(without_deprecated(text), operands)
    parts = {name: torch.from_numpy(part).to(dtype) for part, (name, dtype) in zip(results, dtypes.items(), strict=True)}
    return adapter.result(case, parts)


def without_deprecated(text: str) -> str:
    """Return a module without the operations that StableHLO has replaced, such as `dot`, which its interpreter lacks."""
    from jax._src.interpreters import mlir
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo
    from jaxlib.mlir.passmanager import PassManager

    with mlir.make_ir_context():
        stablehlo.register_stablehlo_passes()
        module = ir.Module.parse(text)
        passes = "stablehlo-legalize-deprecated-ops{fail-on-unused=false}"
        PassManager.parse(f"builtin.module(func.func({passes}))").run(module.operation)
        return str(module)


def compiled(tracer: Tracer, adapter: TorchAdapter, case: Case, generation: str) -> dict[str, float]:
    """Return what libtpu says of the program that it compiled for a generation of TPUs."""
    text, _, _ = tracer.program(adapter, case)
    return compile_for(generation, text)


def compile_for(generation: str, text: str) -> dict[str, float]:
    """Return the bytes that a compiled StableHLO module accesses, and those that it holds beside operands and results."""
    from jax._src import compiler
    from jax._src.interpreters import mlir
    from jax._src.lib import _jax
    from jax.experimental import topologies
    from jaxlib.mlir import ir

    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices[0]
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
    adapter = adapter_of(request["loss"], request["options"])
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
