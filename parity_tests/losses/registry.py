"""The adapters of the command line, by name. Making one loads its framework; listing them loads none."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any, Literal

from lsce_spec import IMPLEMENTATIONS, LINEAR_IMPLEMENTATIONS
from parity_tests.faults.linear import BANK, LINEAR_FAULTS, is_known, wrong_result
from parity_tests.losses import peers
from parity_tests.losses.adapters import Adapter, JaxAdapter, TorchAdapter
from parity_tests.losses.divided import DividedAdapter
from parity_tests.losses.interpreted import InterpretedAdapter
from parity_tests.losses.iree import TARGETS, IreeAdapter
from parity_tests.losses.pallas import PallasAdapter
from parity_tests.losses.torchax import TorchaxAdapter
from parity_tests.losses.torchtpu import TorchTpuAdapter
from parity_tests.losses.triton_kernels import TritonAdapter
from parity_tests.texts import with_nearest
from parity_tests.truth.arithmetic import NARROW, Arithmetic
from parity_tests.truth.cases import Case, LinearCase
from parity_tests.truth.comparison import AnyResult, make_result
from parity_tests.truth.oracle import solve
from parity_tests.truth.precision import round_to

# Intermediate results that a layer stores in a narrow dtype. In JAX a differentiated product has the dtype of its
# factors, and `jnp.matmul` that of `preferred_element_type`. In torch each product has the dtype of its factors.
JAX_NARROW = {
    "chunked": frozenset({"products of rows"}),
    "reference": frozenset({"products", "products of rows", "hidden"}),
}
INTERPRETED = "interpreted"
KERNEL = "jax-pallas"
SHARDED = "sharded"
# Endings of the names of adapters that run a program for another platform, or in processes of their own: seconds for
# each case.
ELSEWHERE = (f"-{SHARDED}", f"-{INTERPRETED}", *(f"-{ending}" for ending in TARGETS))
PLATFORMS = ("tpu", "cuda")  # for which programs are made that an interpreter runs
TORCH_NARROW = {"chunked": frozenset({"logits", "hidden"}), "reference": NARROW}


@dataclass(frozen=True)
class Entry:
    """An adapter that can be made.

    Args:
        name: name on the command line.
        framework: "jax" or "torch".
        kind: "ours" must be within its bounds; "peer" is shown for comparison.
        make: makes the adapter for a device.
        twin: the adapter of the same implementation in the other framework, for the three-way verdict.
    """

    name: str
    framework: str
    kind: Literal["ours", "peer"]
    make: Callable[..., Adapter]
    twin: str | None = None


class FaultyAdapter:
    """The NumPy implementation with a fault of the mutant bank, or sound."""

    framework, device = "numpy", "cpu"

    def __init__(self, fault: str | None = None) -> None:
        """Choose the fault."""
        self.fault = fault
        self.name = f"mutant:{fault}" if fault else "numpy"
        self.arithmetic = Arithmetic()

    def unsupported(self, case: Case) -> str | None:
        """Return why the loss cannot handle a case, or None."""
        is_linear = isinstance(case, LinearCase)
        return "is a fault of linear layers" if self.fault in LINEAR_FAULTS and not is_linear else None

    def __call__(self, case: Case) -> AnyResult:
        """Return loss and gradients of a case."""
        return wrong_result(case, self.fault)


class OracleAdapter:
    """The true loss and gradients, rounded to the dtypes of a result."""

    name, framework, device = "oracle", "numpy", "cpu"

    def __init__(self) -> None:
        """State its accuracy."""
        self.arithmetic = Arithmetic()

    def unsupported(self, case: Case) -> str | None:
        """Return None: it has every option."""
        return None

    def __call__(self, case: Case) -> AnyResult:
        """Return loss and gradients of a case."""
        truth, dtypes = solve(case), case.result_dtypes
        return make_result({part: round_to(exact.high, dtypes[part]) for part, exact in truth.parts.items()}, dtypes)


def _ours() -> list[Entry]:
    entries = []
    for implementation in IMPLEMENTATIONS:
        options: dict[str, Any] = {"implementation": implementation}
        jax, torch = f"jax-{implementation}", f"torch-{implementation}"
        entries += [
            Entry(jax, "jax", "ours", partial(JaxAdapter, name=jax, **options), twin=torch),
            Entry(torch, "torch", "ours", partial(TorchAdapter, name=torch, **options), twin=jax),
            Entry(f"{jax}-eager", "jax", "ours", partial(JaxAdapter, name=f"{jax}-eager", jit=False, **options)),
            Entry(
                f"{torch}-compiled",
                "torch",
                "ours",
                partial(TorchAdapter, name=f"{torch}-compiled", compiled=True, **options),
            ),
        ]
    for linear in LINEAR_IMPLEMENTATIONS:
        options = {"implementation": linear, "linear": True}
        jax, torch = f"jax-linear-{linear}", f"torch-linear-{linear}"
        of_jax = partial(JaxAdapter, name=jax, narrow=JAX_NARROW[linear], **options)
        of_torch = partial(TorchAdapter, name=torch, narrow=TORCH_NARROW[linear], **options)
        entries += [
            Entry(jax, "jax", "ours", of_jax, twin=torch),
            Entry(torch, "torch", "ours", of_torch, twin=jax),
        ]
    programs = [entry for entry in entries if _has_program(entry)]
    interpreted = [made for entry in programs for platform in PLATFORMS for made in _interpreted(entry, platform)]
    eager = [entry for entry in entries if entry.framework == "torch" and not entry.name.endswith("-compiled")]
    on_tpu = [_on_tpu(entry, *by) for entry in eager for by in ((INTERPRETED, None), ("iree-cpu", TARGETS["iree-cpu"]))]
    return entries + interpreted + on_tpu + [_on_torchax(entry) for entry in eager] + _kernels() + _sharded()


def _sharded() -> list[Entry]:
    """Return the adapters of the vocab-parallel losses. `make_adapter` takes the number of shards after a colon."""
    entries = []
    for kind, linear in ((SHARDED, False), (f"linear-{SHARDED}", True)):
        jax, torch = f"jax-{kind}", f"torch-{kind}"
        for name, framework, twin in ((jax, "jax", torch), (torch, "torch", jax)):
            make = partial(DividedAdapter, framework=framework, name=name, linear=linear)
            entries.append(Entry(name, framework, "ours", make, twin=twin))
    return entries


def _kernels() -> list[Entry]:
    """Return the adapters of the kernels: for TPUs, also interpreted; for GPUs, which on a CPU need an interpreter."""
    interpreted = f"{KERNEL}-tpu-{INTERPRETED}"
    dense, linear = "torch-triton", "torch-linear-triton"
    of_linear = partial(TritonAdapter, name=linear, linear=True, narrow=TORCH_NARROW["chunked"])
    return [
        Entry(KERNEL, "jax", "ours", partial(PallasAdapter, name=KERNEL)),
        Entry(interpreted, "jax", "ours", partial(PallasAdapter, name=interpreted, interpreted=True)),
        Entry(dense, "torch", "ours", partial(TritonAdapter, name=dense), twin="jax-fused"),
        Entry(linear, "torch", "ours", of_linear, twin="jax-linear-chunked"),
    ]


def _has_program(entry: Entry) -> bool:
    return entry.framework == "jax" and not entry.name.endswith("-eager")


def _interpreted(entry: Entry, platform: str) -> list[Entry]:
    """Return adapters of the same loss as JAX makes it for another platform, run by an interpreter and by IREE."""
    assert isinstance(entry.make, partial)
    executors: dict[str, Callable[..., Adapter]] = {INTERPRETED: partial(InterpretedAdapter, platform)}
    executors |= {ending: partial(IreeAdapter, platform, target) for ending, target in TARGETS.items()}
    entries = []
    for ending, make in executors.items():
        name = f"{entry.name}-{platform}-{ending}"
        entries.append(Entry(name, "jax", "ours", partial(make, **{**entry.make.keywords, "name": name})))
    return entries


def _on_tpu(entry: Entry, ending: str, target: str | None) -> Entry:
    """Return an adapter of the same loss as TorchTPU makes it for a TPU, run by an interpreter or by IREE."""
    assert isinstance(entry.make, partial)
    name = f"{entry.name}-tpu-{ending}"
    options = {**entry.make.keywords, "name": name, "target": target}
    return Entry(name, "torch", "ours", partial(TorchTpuAdapter, **options))


def _on_torchax(entry: Entry) -> Entry:
    """Return an adapter of the same loss of tensors that JAX computes, through torchax."""
    assert isinstance(entry.make, partial)
    name = f"{entry.name}-torchax"
    return Entry(name, "torch", "ours", partial(TorchaxAdapter, **{**entry.make.keywords, "name": name}))


def _peers() -> list[Entry]:
    makers: dict[str, Callable[..., Adapter]] = {
        "torch-cross-entropy": peers.torch_cross_entropy,
        "torch-cross-entropy-compiled": peers.torch_cross_entropy_compiled,
        "torch-timm": peers.timm_label_smoothing,
        "torch-keras": partial(peers.keras_categorical, "torch"),
        "jax-optax": peers.optax_dense,
        "jax-optax-integer": peers.optax_integer,
        "jax-t5x": peers.t5x,
        "jax-keras": partial(peers.keras_categorical, "jax"),
        "jax-torchax": peers.torchax_module,
    }
    return [Entry(name, name.partition("-")[0], "peer", make) for name, make in makers.items()]


ENTRIES: dict[str, Entry] = {entry.name: entry for entry in _ours() + _peers()}


def match_names(patterns: Iterable[str]) -> list[str]:
    """Return the names of `ENTRIES` that match the patterns, each once. A pattern without a match stays as it is."""
    matching = ([name for name in ENTRIES if fnmatch(name, pattern)] or [pattern] for pattern in patterns)
    return list(dict.fromkeys(name for names in matching for name in names))


def make_adapter(name: str, device: str = "cpu") -> Adapter:
    """Return the adapter of a name: one of `ENTRIES`, "oracle", "numpy", or "mutant:FAULT".

    Those that end in "-sharded" may be followed by ":" and the number of shards, as in "jax-sharded:8".

    Raises:
        ValueError: there is no such adapter.
        UnavailableError: its framework, library or device is not on this machine.
    """
    if name == "oracle":
        return OracleAdapter()
    if name == "numpy":
        return FaultyAdapter()
    kind, colon, detail = name.partition(":")
    if colon and kind in ENTRIES and kind.endswith(SHARDED):
        return ENTRIES[kind].make(device=device, name=name, shards=detail)
    if kind == "mutant":
        if not is_known(detail):
            raise ValueError(with_nearest(f"there is no mutant {detail!r}", detail, BANK, "mutants"))
        return FaultyAdapter(detail)
    if name not in ENTRIES:
        known = [*ENTRIES, "oracle", "numpy", "mutant:FAULT"]
        raise ValueError(with_nearest(f"there is no adapter {name!r}", name, known, "adapters"))
    return ENTRIES[name].make(device=device)
