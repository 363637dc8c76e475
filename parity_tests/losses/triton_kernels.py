"""The Triton kernels of `lsce_torch` without a GPU: run by Triton's interpreter, or compiled for GPUs and not run.

Both take what `lsce_torch` would start on a GPU. Tensors stay on the CPU, and `lsce_torch` is told that they are on a
CUDA device. Triton's interpreter has to be chosen by TRITON_INTERPRET=1 before Triton is loaded; to compile, it must
not be. So one process does the one or the other.
"""

import importlib
import importlib.util
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from lsce_cost.devices import CARDS
from lsce_spec.extras import install
from parity_tests.losses.adapters import TorchAdapter, UnavailableError
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import AnyResult

# The names of the targets, and what Triton knows them by: backend, architecture, threads that run together.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    **{name: ("cuda", 10 * card.capability, 32) for name, card in CARDS.items()},
    "gpu-mi250": ("hip", "gfx90a", 64),
    "gpu-mi300": ("hip", "gfx942", 64),
}
INTERPRET = "TRITON_INTERPRET"


class TritonAdapter(TorchAdapter):
    """A `TorchAdapter` of implementation="triton": on a CUDA device, or on the CPU by Triton's interpreter.

    Args:
        options: as in `TorchAdapter`.

    Raises:
        UnavailableError: the device is not there, or the CPU was chosen without the interpreter.
    """

    def __init__(self, **options: Any) -> None:
        """Check that the kernels can run."""
        super().__init__(implementation="triton", **options)
        if self.device == "cpu":
            _check_interpreter()

    def __call__(self, case: Case) -> AnyResult:
        """Return loss and gradients of a case."""
        if self.device != "cpu":
            return super().__call__(case)
        with rounding_to_nearest():
            return super().__call__(case)


def _check_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        raise UnavailableError(f"Triton is not installed. Run: {install('torch,devices')}")
    if os.environ.get(INTERPRET) != "1":
        raise UnavailableError(
            f"on a CPU the kernels run in Triton's interpreter. Set {INTERPRET}=1 in the environment"
        )


@contextmanager
def rounding_to_nearest() -> Iterator[None]:
    """Let Triton's interpreter round float32 to the nearest bfloat16, as GPUs do. It cuts the last bits off."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    builder: Any = interpreter.InterpreterBuilder
    truncate = builder.create_fp_trunc

    def rounded(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (language.float32, language.bfloat16):
            return truncate(self, source, target)
        bits = np.ascontiguousarray(source.data, np.float32).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = np.where(np.isnan(source.data), 0x7FC0, nearest).astype(np.uint16)
        return interpreter.TensorHandle(nearest, target.scalar)

    with mock.patch.object(builder, "create_fp_trunc", rounded):
        yield


# --- What is started --------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """The start of a kernel.

    Args:
        kernel: Triton's function.
        num_programs: how many programs.
        arguments: by name, with Triton's options.
    """

    kernel: Any
    num_programs: int
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the kernel."""
        name: str = self.kernel.__name__
        return name


@contextmanager
def on_pretended_gpu(start: Callable[..., Any] | None = None) -> Iterator[list[Launch]]:
    """Let `lsce_torch` take tensors of the CPU for those of a GPU, and give a list of the kernels that it starts.

    Args:
        start: what to call with a `Launch` to start it; the list then lacks its arguments. None starts none, so that
            the results are not right.
    """
    launches: list[Launch] = []

    def run(kernel: Any, num_programs: int, _: Any, /, **arguments: Any) -> None:
        if start is None:
            launches.append(Launch(kernel, num_programs, arguments))
            return
        start(Launch(kernel, num_programs, arguments))
        launches.append(Launch(kernel, num_programs, {}))  # a gradient that is held would be copied

    device, kernels, launch = (
        importlib.import_module(f"lsce_torch.{name}") for name in ("device", "kernels", "kernels.launch")
    )
    with (
        float32_products(),
        mock.patch.object(device, "device_type", return_value="cuda"),
        mock.patch.object(kernels, "is_interpreted", return_value=True),
        mock.patch.object(launch, "_run", run),
    ):
        yield launches


@contextmanager
def float32_products() -> Iterator[None]:
    """Let torch add products of narrow tensors of the CPU to float32 ones, which it does for GPUs only."""
    torch: Any = importlib.import_module("torch")
    layer = importlib.import_module("lsce_torch.layer")

    def baddbmm(given: Any, one: Any, other: Any, out_dtype: Any, *, beta: Any = 1, alpha: Any = 1, out: Any) -> Any:
        # torch 2.9 adds to what is in `out`, whatever is given; later versions copy that there before.
        assert given is out or given.data_ptr() == out.data_ptr()
        assert one.dtype == other.dtype != out.dtype == out_dtype == torch.float32
        return out.copy_(torch.baddbmm(given, one.float(), other.float(), beta=beta, alpha=alpha))

    with (
        torch.library._scoped_library("aten", "IMPL") as library,
        mock.patch.object(layer, "_adds_to_float32", return_value=True),
    ):
        library.impl("baddbmm.dtype_out", baddbmm, "CPU")
        yield


def interpret(launch: Launch) -> None:
    """Run a kernel in Triton's interpreter."""
    # The interpreter uses torch too. A GPU would not get these operations, so a mode that counts must not see them.
    modes = importlib.import_module("torch.utils._python_dispatch")._disable_current_modes
    with warnings.catch_warnings(), modes():
        warnings.simplefilter("ignore")  # NumPy's, as in `launch._run`
        launch.kernel[(launch.num_programs,)](**launch.arguments)


# --- Compiled ---------------------------------------------------------------------------------------------------------


class Machine(NamedTuple):
    """Figures of a kernel's machine code.

    Args:
        registers: of a thread.
        spilled: bytes of local memory of a thread; for AMD the registers that are kept there.
        instructions: of the kernel; 0 for AMD.
        of_loop: instructions of the longest loop that reads vectors of 128 bits and has exponentials, for each logit of
            it; 0 without one.
    """

    registers: int
    spilled: int
    instructions: int
    of_loop: float


def compile_launch(launch: Launch, target: str) -> Machine:
    """Return the figures of a kernel, compiled for one of `TARGETS` as Triton compiles it when it is started.

    Raises:
        UnavailableError: Triton is not there, or its interpreter is chosen.
    """
    if os.environ.get(INTERPRET) == "1":
        raise UnavailableError(f"{INTERPRET}=1 chooses Triton's interpreter, which compiles nothing")
    if importlib.util.find_spec("triton") is None:
        raise UnavailableError(f"Triton is not installed. Run: {install('torch,devices')}")
    triton: Any = importlib.import_module("triton")
    source, options = _source_of(launch, is_nvidia=TARGETS[target][0] == "cuda")
    made = triton.compile(
        source, importlib.import_module("triton.backends.compiler").GPUTarget(*TARGETS[target]), options
    )
    if "amdgcn" in made.asm:
        return _of_amd(made.asm["amdgcn"])
    return _of_nvidia(made.asm["cubin"], launch)


def _source_of(launch: Launch, *, is_nvidia: bool) -> tuple[Any, dict[str, Any]]:
    """Return what Triton is given when a kernel is started: types, constants, and what is a multiple of 16."""
    compiler: Any = importlib.import_module("triton.compiler")
    kernel, given = launch.kernel, dict(launch.arguments)
    options = {name: given.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    if "PTX" in given:
        given["PTX"] = is_nvidia
    signature, constants, multiples = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        kind = _type_of(value)
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or kind is None or is_one:
            signature[parameter.name], constants[(index,)] = "constexpr", value
            continue
        signature[parameter.name] = kind
        number = value.data_ptr() if kind.startswith("*") else value
        if not isinstance(number, float) and number % 16 == 0 and not parameter.do_not_specialize:
            multiples[(index,)] = [["tt.divisibility", 16]]
    return compiler.ASTSource(kernel, signature, constants, multiples), options


_DTYPES = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16", "bool": "i1", "uint8": "u8"}


def _type_of(value: Any) -> str | None:
    """Return Triton's name of the type of an argument, or None for a constant."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    if not hasattr(value, "data_ptr"):
        return None
    name = str(value.dtype).removeprefix("torch.")
    return "*" + _DTYPES.get(name, name.replace("uint", "u").replace("int", "i"))


def _of_amd(text: str) -> Machine:
    registers, spilled = (
        sum(int(number) for number in re.findall(rf"\.{kind}gpr_{what}:\s*(\d+)", text))
        for kind, what in (("v", "count"), ("v", "spill_count"))
    )
    return Machine(registers, spilled, 0, 0.0)


def _of_nvidia(code: bytes, launch: Launch) -> Machine:
    tool = Path(importlib.import_module("triton").__file__ or "").parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        usage, text = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    instructions = {int(at, 16): what for at, what in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.M)}
    arguments = launch.arguments
    of_thread = arguments.get("NUM_ROWS", 1) * arguments["BLOCK"] / (32 * arguments["num_warps"])
    return Machine(registers, stack + local, len(instructions), _of_longest_loop(instructions) / of_thread)


def _of_longest_loop(instructions: dict[int, str]) -> int:
    """Return the number of instructions of the longest loop that reads vectors of 128 bits and has exponentials."""
    loops = []
    for end, what in instructions.items():
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", what)
        if jump and int(jump[1], 16) < end:
            loops.append((int(jump[1], 16), end))
    inner = [
        one for one in loops if not any(other != one and one[0] <= other[0] <= other[1] <= one[1] for other in loops)
    ]
    bodies = ([what for at, what in instructions.items() if begin <= at <= end] for begin, end in inner)
    marks = (r"MUFU\.EX2", r"LDG\.E\.128")
    full = (body for body in bodies if all(any(re.search(mark, what) for what in body) for mark in marks))
    return max(map(len, full), default=0)
