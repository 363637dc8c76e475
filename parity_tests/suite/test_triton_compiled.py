"""The Triton kernels of `lsce_torch`, compiled for NVIDIA's and AMD's GPUs as they would be started there.

Registers, spills and instructions are held against a record, triton_kernels.json, which this writes:

    python -m parity_tests.suite.test_triton_compiled
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lsce_cost.devices import CARDS
from lsce_torch import (
    kernels,
    label_smoothed_cross_entropy,
    label_smoothed_cross_entropy_with_stats,
    linear_label_smoothed_cross_entropy,
)
from parity_tests.losses.launches import measure, measure_linear
from parity_tests.losses.triton_kernels import TARGETS, Launch, Machine, compile_launch, on_pretended_gpu
from parity_tests.plugin import Recorder

pytestmark = [
    pytest.mark.devices,
    pytest.mark.skipif(kernels.is_interpreted(), reason="Triton's interpreter compiles nothing"),
    pytest.mark.skipif(not kernels._is_installed(), reason="Triton is not installed; make install-devices installs it"),
]
RECORD = Path(__file__).with_name("triton_kernels.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# A row kept, a row streamed, and one that begins anywhere.
CLASSES = {"resident": 1000, "streamed": 32768, "unaligned": 50257}
# How much a figure may grow; a tenth is a fault.
GROWTH = 1.1
# The forward loop over a streamed row: instructions for each logit, plain and with every option. An H100 has time for
# 18 while it reads two bytes. The loop of `backward` has its body twice, with a mask and without.
MOST_OF_LOOP, MOST_OF_EVERYTHING = 18, 90
# Two registers, outside the loops.
SPILLED_OF_MANY_OPTIONS = 8


def options_of(name: str, num_classes: int) -> dict[str, Any]:
    everything = {
        "ignore_index": -100,
        "class_mask": torch.ones(num_classes, dtype=torch.bool),
        "class_weight": torch.ones(num_classes),
        "z_loss": 0.1,
        "softcap": 30.0,
    }
    options: dict[str, dict[str, Any]] = {
        "plain": {"ignore_index": -100},
        "none": {"reduction": "none"},
        "statistics": {"ignore_index": -100, "z_loss": 0.1},
        "weighted": {"ignore_index": -100, "class_weight": torch.ones(num_classes)},
        "everything": everything,
        "max_sup": {**everything, "convention": "max_sup"},
    }
    return options[name]


# Of these one kind is enough.
MORE = ("none", "max_sup", "weighted", "statistics")


@cache
def launches(options: str, dtype: str, num_classes: int) -> tuple[Launch, ...]:
    """Return the kernels that a loss and its gradient start: which, does not depend on the number of rows."""
    logits = torch.zeros(4, num_classes, dtype=DTYPES[dtype], requires_grad=True)
    labels = torch.zeros(4, dtype=torch.int64)
    with on_pretended_gpu() as started:
        if options == "statistics":
            loss, _ = label_smoothed_cross_entropy_with_stats(logits, labels, **options_of(options, num_classes))
        else:
            loss = label_smoothed_cross_entropy(logits, labels, **options_of(options, num_classes))
        loss.sum().backward()
    return tuple(started)


@cache
def of_linear(dtype: str) -> tuple[Launch, ...]:
    hidden = torch.zeros(4, 8, dtype=DTYPES[dtype], requires_grad=True)
    weight = torch.zeros(32768, 8, dtype=DTYPES[dtype], requires_grad=True)
    with on_pretended_gpu() as started:
        linear_label_smoothed_cross_entropy(hidden, weight, torch.zeros(4, dtype=torch.int64))
    return tuple(started)


def programs() -> Iterator[tuple[str, str, tuple[Launch, ...]]]:
    """Yield each call: its name, its dtype, and what it starts."""
    for dtype in DTYPES:
        for kind, num_classes in CLASSES.items():
            for options in ("plain", "everything"):
                yield f"{options} {kind}", dtype, launches(options, dtype, num_classes)
        yield "linear", dtype, of_linear(dtype)
    for options in MORE:
        yield f"{options} streamed", "bfloat16", launches(options, "bfloat16", CLASSES["streamed"])


NAMES = [
    *(f"{options} {kind} {dtype}" for dtype in DTYPES for kind in CLASSES for options in ("plain", "everything")),
    *(f"linear {dtype}" for dtype in DTYPES),
    *(f"{options} streamed bfloat16" for options in MORE),
]


@cache
def found() -> dict[str, tuple[Launch, ...]]:
    return {f"{name} {dtype}": started for name, dtype, started in programs()}


@cache
def machine_code(name: str, target: str) -> dict[str, Machine]:
    """Return the figures of each kernel of a call."""
    return {launch.name: compile_launch(launch, target) for launch in found()[name]}


# These show every target and every dtype, the others are slow together.
QUICK_TARGET, QUICK = "gpu-h100", {"plain unaligned bfloat16", "everything streamed bfloat16"}
FLOAT64_QUICK = "everything streamed float64"


def programs_and_targets() -> list[Any]:
    return [
        pytest.param(name, target, marks=() if is_quick(name, target) else pytest.mark.slow)
        for target in TARGETS
        for name in NAMES
    ]


def is_quick(name: str, target: str) -> bool:
    if target != QUICK_TARGET:
        return name in QUICK
    return not name.endswith("float64") or name == FLOAT64_QUICK


@pytest.mark.parametrize(("name", "target"), programs_and_targets())
def test_figures(name: str, target: str, parity_ledger: Recorder) -> None:
    adapter = "torch-linear-triton" if name.startswith("linear") else "torch-triton"
    dtype = name.rpartition(" ")[2]
    parity_ledger.record(adapter, "cuda" if target in CARDS else "rocm", dtype, "compiled", target)
    is_plain = dtype != "float64" and name.startswith(("plain", "none", "linear"))
    figures = machine_code(name, target)
    for each, machine in figures.items():
        assert machine.spilled <= (0 if is_plain else SPILLED_OF_MANY_OPTIONS), each
    recorded = json.loads(RECORD.read_text())
    if recorded["triton"] == triton_version():  # other versions schedule in other ways
        assert figures["forward"].of_loop <= (MOST_OF_LOOP if is_plain else MOST_OF_EVERYTHING)
        assert not grown(figures, recorded["kernels"][target][name])


def grown(figures: dict[str, Machine], recorded: dict[str, list[float]]) -> list[str]:
    """Return what has grown by more than a tenth, or was not there."""
    return [
        f"{kernel}: {field} {now:g}, recorded {then:g}"
        for kernel, machine in figures.items()
        for field, now, then in zip(Machine._fields, machine, recorded.get(kernel, [0.0] * 4), strict=True)
        if now > GROWTH * then
    ]


def test_growth_is_seen() -> None:
    machine = Machine(registers=32, spilled=0, instructions=500, of_loop=15.0)
    assert not grown({"forward": machine}, {"forward": [30, 0, 460, 14.5]})
    assert grown({"forward": machine}, {"forward": [32, 0, 500, 13.0]}) == ["forward: of_loop 15, recorded 13"]
    assert len(grown({"forward": machine._replace(spilled=8)}, {"forward": list(machine)})) == 1
    assert grown({"other": machine}, {"forward": list(machine)})


def test_the_main_loop_is_found() -> None:
    for kind in ("streamed", "unaligned"):
        assert machine_code(f"plain {kind} bfloat16", "gpu-h100")["forward"].of_loop > 10


def test_counted_launches() -> None:
    """The figures of docs/gpu.md."""
    counts = {(count.name, count.classes, count.dtype): count[3:] for count in measure()}
    for dtype in ("bfloat16", "float32"):
        assert counts["F.cross_entropy, smoothed", 32768, dtype] == (23, 10)
        assert counts["lsce triton", 32768, dtype] == (4, 3)
        assert counts["lsce triton", 1000, dtype] == (4, 2)
        assert counts["lsce triton, ignored rows", 1000, dtype] == (5, 2)
        assert counts["lsce triton, denominator", 1000, dtype] == (4, 2)
        assert counts["lsce triton, class weights", 1000, dtype] == (6, 2)
        assert counts["lsce triton, statistics", 1000, dtype] == (5, 2)
    assert counts["lsce fused", 32768, "bfloat16"] == (56, 49)


def test_counted_launches_of_the_linear_loss() -> None:
    """The figures of docs/gpu.md: kernels, those of a chunk, and GB that move within the products and beside them."""
    counts = {
        count.name: (count.launches, count.of_chunk, round(count.of_products / 1e9, 1), round(count.moved / 1e9, 1))
        for count in measure_linear()
    }
    assert counts == {
        "F.linear, F.cross_entropy": (26, 0, 8.2, 21.5),
        "lsce linear": (36, 4, 24.8, 8.2),
        "lsce linear, ignored rows": (61, 6, 24.8, 8.2),
        "lsce linear, recompute": (47, 6, 30.2, 8.1),
        "lsce linear, filtered": (120, 17, 25.4, 21.5),
        "lsce linear, narrow sums": (222, 35, 16.7, 23.2),
        "lsce linear, 4096 rows": (20, 4, 11.9, 8.2),
    }


def triton_version() -> str:
    from importlib.metadata import version  # noqa: PLC0415

    return ".".join(version("triton").split(".")[:2])


def write_record() -> None:
    code = {target: {name: machine_code(name, target) for name in NAMES} for target in TARGETS}
    lines = [
        f'  "{target}": {{\n'
        + ",\n".join(f"    {json.dumps(name)}: {json.dumps(kernels_of)}" for name, kernels_of in of_target.items())
        + "\n  }"
        for target, of_target in code.items()
    ]
    body = ",\n".join(lines)
    RECORD.write_text(f'{{"triton": "{triton_version()}", "kernels": {{\n{body}\n}}}}\n')


if __name__ == "__main__":
    write_record()
