"""torch.compile's kernels of a loss for NVIDIA cards that are not here: made by Inductor, compiled by Triton, not run.

Inductor writes its kernels from the shapes of tensors and the properties of the card alone, and Triton makes machine
code of them without a card. Only torch refuses: it has no CUDA here. So `pretend` puts a made-up card into torch,
through names that are private in places. That changes the process for good, and `measure` starts one of its own:

    python -m parity_tests.losses.inductor <<< '{"card": "gpu-h100", "requests": [...]}'

The graph of loss and gradient is traced on fake CPU tensors, since autograd's engine knows no other device here, while
`lsce_torch` is told that they are on a GPU; then it is moved to fake CUDA tensors.
"""

import copy
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from lsce_cost.devices import CARDS, Card
from lsce_spec.extras import install
from parity_tests.losses.adapters import UnavailableError


@dataclass(frozen=True)
class Request:
    """A loss to compile with its gradient.

    Args:
        loss: "lsce", or "one-hot", a loss that is written as the formula has it.
        dtype: of the logits.
        rows: number of rows.
        classes: number of classes.
        options: keyword arguments that are no tensors.
        operands: names of tensors to pass: "class_mask", "where", "class_weight", "prior" or "soft labels".
    """

    loss: str
    dtype: str
    rows: int
    classes: int
    options: dict[str, Any] = field(default_factory=dict)
    operands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kernel:
    """A kernel as machine code.

    Args:
        name: Inductor's name of it, with the graph that it is from, and its configuration.
        registers: of a thread.
        spilled: bytes of local memory of a thread.
        instructions: of the machine code, filled up as it lies in memory.
    """

    name: str
    registers: int
    spilled: int
    instructions: int


@dataclass(frozen=True)
class Compiled:
    """A loss and its gradient, compiled for a card.

    Args:
        kernels: each configuration of each kernel.
        launches: how many kernels are started.
        moved: bytes that the kernels read and write, as a multiple of the logits' bytes.
        kept: bytes of buffers, the gradient apart, as a multiple of the logits' bytes.
    """

    kernels: tuple[Kernel, ...]
    launches: int
    moved: float
    kept: float

    def as_text(self) -> str:
        """Return the figures in words."""
        registers = max(kernel.registers for kernel in self.kernels)
        spilled = max(kernel.spilled for kernel in self.kernels)
        return (
            f"{self.launches} kernels, moved {self.moved:.2f} and kept {self.kept:.2f} times the logits, "
            f"up to {registers} registers, {spilled} bytes spilled"
        )


def measure(card: str, requests: list[Request]) -> list[Compiled]:
    """Return each loss compiled for a card, in a process of its own.

    Raises:
        UnavailableError: torch or Triton is not there.
        RuntimeError: a loss could not be compiled; the message has the end of what the process said.
    """
    if any(importlib.util.find_spec(name) is None for name in ("torch", "triton")):
        raise UnavailableError(f"torch or triton is not installed. Run: {install('torch,devices')}")
    given = json.dumps({"card": card, "requests": [asdict(request) for request in requests]})
    command = [sys.executable, "-m", "parity_tests.losses.inductor"]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return [
        Compiled(**{**each, "kernels": tuple(Kernel(**kernel) for kernel in each["kernels"])})
        for each in json.loads(done.stdout.splitlines()[-1])
    ]


# --- In the process of its own --------------------------------------------------------------------------------------


@dataclass
class _Generated:
    """The text that Inductor made of one graph, and the size in bytes of each buffer."""

    code: str
    sizes: dict[str, int]


class _WrittenError(Exception):
    """Inductor has written its code; nothing is to be loaded or run."""


GRAPHS = ("loss", "gradient")


def kernels_of(request: Request, card: str) -> Compiled:
    """Return a loss compiled for a card. Call it with `pretend` before it."""
    graphs = _generate(request)
    kernels: list[Kernel] = []
    launches, moved, kept = 0, 0, 0
    logits_bytes = request.rows * request.classes * _torch_dtype(request.dtype).itemsize
    for name, graph in zip(GRAPHS, graphs, strict=True):
        sources = dict(
            re.findall(r"^(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)''', ", graph.code, re.M | re.S)
        )
        calls = re.findall(r"^\s+(triton_\w+)\.run\((.*), stream=", graph.code, re.M)
        launches += len(calls)
        moved += sum(_moved(sources[kernel], arguments.split(", "), graph.sizes) for kernel, arguments in calls)
        kept += sum(graph.sizes[buffer] for buffer in re.findall(r"(\w+) = empty_strided_cuda\(", graph.code))
        for source in sources.values():
            kernels += _compiled(name, source, CARDS[card])
    kept -= logits_bytes  # the gradient
    return Compiled(tuple(kernels), launches, moved / logits_bytes, kept / logits_bytes)


def _moved(source: str, arguments: list[str], sizes: dict[str, int]) -> int:
    """Return the bytes that a kernel moves: each load and store of a buffer that its text has moves the whole buffer.

    But one at an index from memory, which touches an element of each row.
    """
    parameters = re.findall(r"(\w+)(?: : tl\.constexpr)?", re.search(r"^def \w+\((.*)\):$", source, re.M)[1])  # type: ignore[index]
    total = 0
    for parameter, argument in zip(parameters, arguments, strict=False):
        accesses = re.findall(rf"tl\.(?:load|store)\({parameter} \+ \((.*?)\), ", source)
        total += sum(sizes.get(argument, 0) for index in accesses if "tmp" not in index)
    return total


def _compiled(graph: str, source: str, card: Card) -> Iterator[Kernel]:
    """Yield the figures of a kernel of a graph, in each configuration that Inductor would try."""
    triton = _load("triton")
    target = _target(card)
    name = re.search(r"^def (\w+)\(", source, re.M)[1]  # type: ignore[index]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.py"  # Triton reads the text of a function from its file
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tuner = getattr(module, name)
        for configuration in tuner.configs:
            meta = tuner.triton_meta
            constants = {**meta["constants"], **configuration.kwargs}
            made = triton.compiler.ASTSource(tuner.fn, meta["signature"], constants, meta["configs"][0])
            options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
            options["enable_fp_fusion"] = meta.get("enable_fp_fusion", True)
            code = triton.compile(made, target=target, options=options).asm
            assert f".target sm_{target.arch}" in code["ptx"]
            sizes = " ".join(f"{size}={number}" for size, number in sorted(configuration.kwargs.items()))
            full_name = f"{graph} {name} {sizes} warps={configuration.num_warps}"
            yield Kernel(full_name, *_resources(code["cubin"]), _instructions(code["cubin"]))


def _resources(code: bytes) -> tuple[int, int]:
    """Return the registers and the bytes of local memory of a thread."""
    tool = Path(_load("triton").__file__ or "").parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    return registers, stack + local


def _instructions(code: bytes) -> int:
    """Return the number of instructions, 16 bytes each, from the sizes of the sections of an ELF file.

    A disassembler takes a second.
    """
    (start,) = struct.unpack_from("<Q", code, 0x28)
    size, number, of_names = struct.unpack_from("<3H", code, 0x3A)
    sections = [struct.unpack_from("<2I4Q", code, start + size * i) for i in range(number)]
    names = sections[of_names][4]
    return sum(each[5] // 16 for each in sections if code.startswith(b".text.", names + each[0]))


def _load(name: str) -> Any:
    return import_module(name)


def _torch_dtype(name: str) -> Any:
    return getattr(_load("torch"), name)


def _generate(request: Request) -> list[_Generated]:
    """Return what Inductor writes for the loss and for its gradient."""
    torch = _load("torch")
    compilers = _load("functorch.compile")
    fake = _load("torch._subclasses.fake_tensor").FakeTensorMode
    decompositions = _load("torch._inductor.decomposition").select_decomp_table()
    simplify = _load("torch._inductor.fx_passes.joint_graph").joint_graph_passes
    graphs: list[_Generated] = []

    def compile_graph(graph: Any, inputs: list[Any]) -> Any:
        graphs.append(_lowered(graph, inputs))
        return compilers.make_boxed_func(graph.forward)

    def partition(graph: Any, inputs: Any, **options: Any) -> Any:
        simplify(graph)
        return compilers.min_cut_rematerialization_partition(graph, inputs, **options)

    with fake(allow_non_fake_inputs=True):
        names, tensors = _operands(request)
        lsce = _load("lsce_torch")
        losses = {"lsce": lsce.label_smoothed_cross_entropy, "one-hot": _one_hot}
        loss = losses[request.loss]

        def call(*tensors: Any) -> Any:
            return loss(**dict(zip(names, tensors, strict=True)), **request.options)

        traced = compilers.aot_function(
            call,
            fw_compiler=compile_graph,
            bw_compiler=compile_graph,
            partition_fn=partition,
            decompositions=decompositions,
        )
        torch.autograd.grad(traced(*tensors), tensors[0])
    return graphs


def _operands(request: Request) -> tuple[list[str], list[Any]]:
    torch = _load("torch")
    rows, classes, dtype = request.rows, request.classes, _torch_dtype(request.dtype)
    compute = torch.promote_types(dtype, torch.float32)
    made = {
        "logits": lambda: torch.empty(rows, classes, dtype=dtype, requires_grad=True),
        "labels": lambda: torch.zeros(rows, dtype=torch.int64),
        "soft labels": lambda: torch.zeros(rows, classes, dtype=dtype),
        "class_mask": lambda: torch.zeros(classes, dtype=torch.bool),
        "where": lambda: torch.zeros(rows, dtype=torch.bool),
        "class_weight": lambda: torch.zeros(classes, dtype=compute),
        "prior": lambda: torch.zeros(classes, dtype=compute),
    }
    names = ["logits", *(["labels"] if "soft labels" not in request.operands else []), *request.operands]
    return [name.removeprefix("soft ") for name in names], [made[name]() for name in names]


def _one_hot(logits: Any, labels: Any, smoothing: float) -> Any:
    """Return the loss as the formula has it, in plain operations."""
    functional = _load("torch").nn.functional
    target = functional.one_hot(labels, logits.shape[-1]) * (1 - smoothing) + smoothing / logits.shape[-1]
    return -(target * functional.log_softmax(logits.float(), -1)).sum(-1).mean()


def _lowered(graph: Any, inputs: list[Any]) -> _Generated:
    """Return what Inductor writes for a graph on the made-up card."""
    moved, operands = _on_cuda(graph, inputs)
    lowering = _load("torch._inductor.graph").GraphLowering
    found: list[_Generated] = []

    def keep(self: Any, *_: Any, **__: Any) -> Any:
        code, _ = self.codegen()
        text = code.value if hasattr(code, "value") else str(code)
        names = set(re.findall(r"\b((?:primals|tangents|arg)\w+|buf\d+|[a-z]\w*)\b", text)) & _known(self)
        sizes = {name: _bytes(self, name) for name in names}
        found.append(_Generated(text, sizes))
        raise _WrittenError

    # Before this, at the joint graph, torch would trace patterns of its own on real CUDA tensors.
    there = mock.patch.object(_load("torch").cuda, "is_available", return_value=True)
    with there, mock.patch.multiple(lowering, compile_to_module=keep, _compile_to_module=keep):
        try:
            _load("torch._inductor.compile_fx").compile_fx_inner(moved, operands)
        except Exception as error:
            if not _is_written(error):
                raise
    (generated,) = found
    return generated


def _known(lowering: Any) -> set[str]:
    return {*lowering.graph_inputs, *lowering.name_to_buffer}


def _bytes(lowering: Any, name: str) -> int:
    return int(lowering.get_numel(name)) * int(lowering.get_dtype(name).itemsize)


def _is_written(error: BaseException | None) -> bool:
    """Return whether an error is `_WrittenError`, or Inductor's wrapping of it."""
    while error is not None and not isinstance(error, _WrittenError):
        error = error.__cause__ or error.__context__
    return error is not None


def _on_cuda(graph: Any, inputs: list[Any]) -> tuple[Any, list[Any]]:
    """Return a graph and its inputs on fake CUDA tensors."""
    torch = _load("torch")
    moved = copy.deepcopy(graph)
    for node in moved.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
        node.meta = {}
    mode = _load("torch._subclasses.fake_tensor").FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        operands = [
            torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="cuda")
            if isinstance(each, torch.Tensor)
            else each
            for each in inputs
        ]
    propagated = _load("torch.fx.passes.fake_tensor_prop").FakeTensorProp(moved, mode=mode)
    propagated.propagate_dont_convert_inputs(*operands)
    return moved, operands


def pretend(name: str) -> None:
    """Make torch and Triton find a card, until the process ends. Call it before Inductor is imported."""
    torch, triton = _load("torch"), _load("triton")
    card = CARDS[name]
    properties = SimpleNamespace(
        name=name,
        major=card.capability,
        minor=0,
        multi_processor_count=card.cores,
        total_memory=card.memory,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=card.shared_of_block,
        shared_memory_per_multiprocessor=card.shared_of_core,
    )
    found: dict[str, Any] = {
        "get_device_properties": lambda *_, **__: properties,
        "get_device_capability": lambda *_, **__: (card.capability, 0),
        "get_device_name": lambda *_: name,
        # Only while a graph is lowered, see `_lowered`. Elsewhere torch would use CUDA tensors that are not fake.
        "is_available": lambda: False,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_, **__: None,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
    }
    for attribute, function in found.items():
        setattr(torch.cuda, attribute, function)
    torch.version.cuda = "12.8"
    torch.compiler.is_compiling = lambda: True
    _load("lsce_torch.device").device_type = lambda _: "cuda"
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: _target(card),
            get_active_torch_device=lambda: torch.device("cuda:0"),
            get_current_device=lambda: 0,
            get_current_stream=lambda *_: 0,
            get_device_interface=lambda: torch.cuda,
        )
    )
    _load("torch._inductor.runtime.triton_helpers").set_driver_to_gpu = lambda: None
    config = _load("torch._inductor.config")
    config.compile_threads, config.force_disable_caches = 1, True


def _target(card: Card) -> Any:
    return _load("triton.backends.compiler").GPUTarget("cuda", 10 * card.capability, 32)


def _main() -> None:
    given = json.load(sys.stdin)
    pretend(given["card"])
    found = [kernels_of(Request(**each), given["card"]) for each in given["requests"]]
    print(json.dumps([asdict(each) for each in found]))


if __name__ == "__main__":
    _main()
