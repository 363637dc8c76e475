"""The Pallas kernel, compiled for every TPU by its compiler: options, sizes, memory, bytes and instruction bundles.

Cases that show every option are compiled in both dtypes; one case of each other combination of options, and more sizes,
are marked as slow. What the kernel costs is held against docs/figures/tpu-kernel.json, which `python -m benchmarks
tpu-kernel --write` renews.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lsce_jax import label_smoothed_cross_entropy
from lsce_jax.kernels import tpu
from parity_tests.losses.adapters import JaxAdapter
from parity_tests.losses.compiled import REMEDY, TOPOLOGIES, Compiler, Figures, StatisticsAdapter, has_libtpu
from parity_tests.losses.pallas import DTYPES, PallasAdapter
from parity_tests.plugin import Recorder
from parity_tests.suite.programs import combination, result_bytes
from parity_tests.truth.cases import Case, case_names, make_case

pytestmark = [
    pytest.mark.devices,
    pytest.mark.skipif(not has_libtpu(), reason=f"libtpu is not installed; {REMEDY}"),
]
ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs" / "figures" / "tpu-kernel.json"
# These show every option of the kernel.
FEW = ("everything", "class_mask_max_sup", "prior_distribution")
KERNEL = partial(JaxAdapter, implementation="pallas", name="jax-pallas")


def is_computed(case: Case) -> bool:
    return PallasAdapter(interpreted=True).unsupported(case) is None


def programs() -> list[Any]:
    first = {combination(name): name for name in reversed(case_names()) if is_computed(make_case(name, "float32"))}
    return [
        pytest.param(device, name, dtype, marks=() if name in FEW else pytest.mark.slow)
        for device in TOPOLOGIES
        for name in (*FEW, *(name for name in first.values() if name not in FEW))
        for dtype in DTYPES
    ]


@pytest.mark.parametrize(("device", "name", "dtype"), programs())
def test_every_option_compiles(device: str, name: str, dtype: str, parity_ledger: Recorder) -> None:
    parity_ledger.record("jax-pallas", "tpu", dtype, "compiled", device)
    case = make_case(name, dtype)
    figures = Compiler(device).compile(KERNEL, case)
    assert figures.output_bytes >= result_bytes(case)


@pytest.mark.parametrize("device", TOPOLOGIES)
def test_statistics_compile(device: str, parity_ledger: Recorder) -> None:
    parity_ledger.record("jax-pallas", "tpu", "bfloat16", "compiled", device)
    make = partial(StatisticsAdapter, implementation="pallas", name="jax-pallas")
    case = make_case("everything", "bfloat16")
    assert Compiler(device).compile(make, case).output_bytes > result_bytes(case)


# --- Sizes ----------------------------------------------------------------------------------------------------------


def loss_and_gradient(logits: Any, labels: Any, **options: Any) -> Any:
    options = {"reduction": "mean", "implementation": "pallas", **options}
    return jax.value_and_grad(label_smoothed_cross_entropy)(logits, labels, **options)


def with_mask(logits: Any, labels: Any) -> Any:
    return loss_and_gradient(logits, labels, class_mask=np.arange(logits.shape[1]) % 8 > 0)


def most_classes(step: tpu.Step, dtype: str, program: tpu.Program) -> int | None:
    """Return the most classes of which the kernel takes so many rows at a time, or None if it never does."""
    sizes = range(tpu.LANES, 2**19, tpu.LANES)
    return max((size for size in sizes if tpu.step_of(size, dtype, program) == step), default=None)


def largest() -> Iterator[Any]:
    """Yield the sizes that leave the least memory: for each kind of step the most classes."""
    for masked in (False, True):
        for dtype in DTYPES:
            program = tpu.Program(gradient=True, masked=masked)
            steps = [tpu.Step(rows, kept, behind) for rows, kept in tpu.STEPS for behind in (True, False)]
            for size in sorted({most_classes(step, dtype, program) or 0 for step in steps} - {0}):
                for device in TOPOLOGIES:
                    quick = device == "tpu-v4" and not masked
                    yield pytest.param(device, masked, size, dtype, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("device", "masked", "num_classes", "dtype"), list(largest()))
def test_the_rows_of_a_step_fit(device: str, masked: bool, num_classes: int, dtype: str) -> None:
    """On a v4, which has the least memory, and on all others."""
    function = with_mask if masked else loss_and_gradient
    figures = Compiler(device).compile_function(function, ((40, num_classes), dtype), ((40,), "int32"))
    assert figures.output_bytes >= 40 * num_classes * np.dtype(dtype).itemsize


SIZES = [(1, 1), (3, 7), (9, 129), (1000, 128), (129, 4097), (100, 50257)]


@pytest.mark.parametrize(
    "device", [d if d == "tpu-v5e" else pytest.param(d, marks=pytest.mark.slow) for d in TOPOLOGIES]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_that_fill_no_step(size: tuple[int, int], dtype: str, device: str) -> None:
    figures = Compiler(device).compile_function(loss_and_gradient, (size, dtype), (size[:1], "int32"))
    assert figures.output_bytes >= size[0] * size[1] * np.dtype(dtype).itemsize


# --- Cost -----------------------------------------------------------------------------------------------------------

ROWS, CLASSES = 8192, 32768
LOGITS, LABELS = ((ROWS, CLASSES), "bfloat16"), ((ROWS,), "int32")


def chosen(logits: Any, labels: Any) -> Any:
    return loss_and_gradient(logits, labels, implementation=None)


def fused(logits: Any, labels: Any) -> Any:
    return loss_and_gradient(logits, labels, implementation="fused")


def with_another_upstream(logits: Any, labels: Any) -> Any:
    return jax.value_and_grad(lambda logits: 3 * chosen_loss(logits, labels))(logits)


def chosen_loss(logits: Any, labels: Any) -> Any:
    return label_smoothed_cross_entropy(logits, labels, reduction="mean")


def moved(figures: Figures) -> float:
    """Return the bytes moved in multiples of the logits."""
    assert figures.accessed_bytes is not None
    return figures.accessed_bytes / (2 * ROWS * CLASSES)


@pytest.mark.parametrize("device", TOPOLOGIES)
def test_the_logits_are_read_once_and_their_gradient_is_written_once(device: str) -> None:
    """At most 1.09 GB at 8192 x 32768 in bfloat16, of which logits and gradient are 1.07; XLA moves 2.15 GB."""
    figures = Compiler(device).compile_function(chosen, LOGITS, LABELS)
    assert moved(figures) <= 1.09e9 / (2 * ROWS * CLASSES)
    # Numbers of rows, in vectors of 128 lanes.
    assert figures.temp_bytes <= 2 * ROWS * 128 * 4


@pytest.mark.parametrize("function", [fused, with_another_upstream])
def test_others_move_more(function: Callable[..., Any]) -> None:
    """As the fused loss does, and the kernel where it has to run twice."""
    figures = Compiler("tpu-v5e").compile_function(function, LOGITS, LABELS)
    assert 4 <= moved(figures) <= 4.1


def costs_of(figures: Any) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (cost["topology"], cost["name"]): cost for cost in figures["tpu kernel"] if cost["implementation"] == "pallas"
    }


@pytest.fixture(scope="module")
def recorded() -> Any:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def measured(tmp_path_factory: pytest.TempPathFactory, *programs: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what the kernel costs now, measured in a process of its own, as the compiler's flags ask for."""
    path = tmp_path_factory.mktemp("figures") / "figures.json"
    options = [part for name in programs for part in ("--program", name)]
    command = [sys.executable, "-m", "benchmarks", "tpu-kernel", "--alone", *options, "--json", str(path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return costs_of(json.loads(path.read_text(encoding="utf-8")))


QUICK = ("mean", "losses of rows", "everything")


def assert_not_grown(now: dict[str, Any], then: dict[str, Any]) -> None:
    """Fail if the kernel moves a hundredth more bytes than recorded, or takes a tenth more bundles."""
    assert now["accessed_bytes"] <= 1.01 * then["accessed_bytes"]
    assert now["bundles"] <= 1.1 * then["bundles"]


def test_the_kernel_has_not_grown(recorded: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    now, then = measured(tmp_path_factory, *QUICK), costs_of(recorded)
    assert {topology for topology, _ in now} == set(TOPOLOGIES.values())
    for key, cost in now.items():
        assert_not_grown(cost, then[key])


@pytest.mark.slow
def test_nor_with_other_options(recorded: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    then = costs_of(recorded)
    others = sorted({name for _, name in then} - set(QUICK))
    for key, cost in measured(tmp_path_factory, *others).items():
        assert_not_grown(cost, then[key])


def test_a_kernel_that_has_grown_is_found(recorded: Any) -> None:
    cost = next(iter(costs_of(recorded).values()))
    assert_not_grown(cost, cost)
    for worse in ({"accessed_bytes": 1.02 * cost["accessed_bytes"]}, {"bundles": 1.11 * cost["bundles"]}):
        with pytest.raises(AssertionError):
            assert_not_grown({**cost, **worse}, cost)


def test_the_kernel_is_the_cheaper_one(recorded: Any) -> None:
    """Everywhere fewer bytes and fewer bundles than XLA's program: that is why it is chosen."""
    kernel, count = costs_of(recorded), 0
    for cost in recorded["tpu kernel"]:
        if cost["implementation"] == "fused":
            ours = kernel[cost["topology"], cost["name"]]
            assert ours["accessed_bytes"] < cost["accessed_bytes"]
            assert ours["bundles"] < cost["bundles"]
            count += 1
    assert count == len(kernel) >= 30


# Bytes that come from the device's memory in a cycle: 819 GB/s at 1.5 GHz, 1640 GB/s at 1.75 GHz.
BYTES_OF_CYCLE = {"tpu-v5e": 546, "tpu-v6e": 937}


@pytest.mark.parametrize(("device", "most"), [("tpu-v5e", 1.0), ("tpu-v6e", 1.6)])
def test_bundles_of_the_cycles_that_memory_takes(device: str, most: float, recorded: Any) -> None:
    cost = costs_of(recorded)[TOPOLOGIES[device], "mean"]
    cycles = 2 * cost["logits_bytes"] / BYTES_OF_CYCLE[device]
    assert cost["bundles"] <= most * cycles
