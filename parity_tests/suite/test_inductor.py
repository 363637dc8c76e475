"""torch.compile's kernels for NVIDIA cards, compiled without a card: machine code, and bytes that it moves.

Kernels, moves, registers, spills and instructions are held against a record, inductor_kernels.json, which this writes:

    python -m parity_tests.suite.test_inductor
"""

import importlib.util
import json
import re
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from lsce_cost.devices import CARDS
from parity_tests.losses.adapters import UnavailableError
from parity_tests.losses.inductor import Compiled, Kernel, Request, measure
from parity_tests.plugin import Recorder
from parity_tests.truth.devices import DEVICES
from parity_tests.truth.precision import DTYPES

# Triton is installed by `make install-devices`.
pytestmark = pytest.mark.devices
RECORD = Path(__file__).with_name("inductor_kernels.json")
# How much a figure may grow; a tenth is a fault.
GROWTH = 1.1
ROWS, CLASSES = 8192, 32768
PLAIN = {"smoothing": 0.1}
# Each option for itself, in bfloat16: keyword arguments, tensors, and the most that a GPU may be asked for: kernels,
# and moves of the logits. Without options one for the maximum, one for the sums, and two for the gradient.
# max_sup keeps a byte for each logit. Soft labels are as large as the logits, and are read three times.
OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...], int, float]] = {
    "plain": ({}, (), 3, 4),
    "sum": ({"reduction": "sum"}, (), 3, 4),
    "non_target": ({"convention": "non_target"}, (), 3, 4),
    "z_loss": ({"z_loss": 1e-4}, (), 3, 4),
    "softcap": ({"softcap": 30.0}, (), 3, 4),
    "max_sup": ({"convention": "max_sup"}, (), 3, 6.5),
    "ignore_index": ({"ignore_index": 5}, (), 3, 4),
    "where": ({}, ("where",), 3, 4),
    "class_mask": ({}, ("class_mask",), 5, 4),
    "class_weight": ({}, ("class_weight",), 7, 4),
    "prior": ({}, ("prior",), 5, 4),
    "soft labels": ({}, ("soft labels",), 3, 7),
}
# Torch 2.9 with Triton 3.5 starts a kernel more for some options, and registers spill in some configurations that it
# would try: of such versions only the moves are held.
IS_CURRENT = tuple(map(int, version("torch").split(".")[:2])) >= (2, 13)
# What rows, classes and single numbers add, in multiples of the logits.
SMALL = 0.01
IN_EACH_DTYPE = [f"plain, {dtype}" for dtype in DTYPES]
# Every option on one card; on the others the text of the kernels is hardly another.
RUNS = {
    "gpu-a100": [*IN_EACH_DTYPE, "max_sup", "class_mask", "one-hot"],
    "gpu-h100": [*IN_EACH_DTYPE, *OPTIONS, "one-hot"],
    "gpu-b200": [*IN_EACH_DTYPE, "max_sup", "class_mask", "one-hot"],
}
RUN = ("card", "name")


def request_of(name: str) -> Request:
    if name == "one-hot":
        return Request("one-hot", "bfloat16", ROWS, CLASSES, PLAIN)
    option, _, dtype = name.partition(", ")
    options, operands, _, _ = OPTIONS[option]
    return Request("lsce", dtype or "bfloat16", ROWS, CLASSES, {**PLAIN, **options}, operands)


@cache
def compiled(card: str) -> dict[str, Compiled]:
    """Return everything that is compiled for a card, in one process."""
    return dict(zip(RUNS[card], measure(card, [request_of(name) for name in RUNS[card]]), strict=True))


def exceeds(found: Compiled, option: str) -> bool:
    _, _, launches, moved = OPTIONS[option]
    return (IS_CURRENT and found.launches > launches) or found.moved > moved + SMALL


@pytest.mark.parametrize(RUN, [(card, name) for card, names in RUNS.items() for name in names if name != "one-hot"])
def test_kernels(card: str, name: str, parity_ledger: Recorder) -> None:
    """Each kernel is machine code and spills no registers. Kernels and moves are within the limits of the option."""
    found, (option, _, dtype) = compiled(card)[name], name.partition(", ")
    print(f"{card}, {name}: {found.as_text()}")
    assert found.kernels
    if IS_CURRENT:
        assert not any(kernel.spilled for kernel in found.kernels)
    assert not exceeds(found, option), found
    parity_ledger.record("torch-fused-compiled", "cuda", dtype or "bfloat16", "compiled", card)


# --- The record -----------------------------------------------------------------------------------------------------

Figures = dict[str, list[float]]


def versions() -> dict[str, str]:
    """Return what decides over the kernels; "" for what is not installed."""
    return {name: _short_version(name) for name in ("torch", "triton")}


def _short_version(name: str) -> str:
    try:
        return ".".join(version(name).split(".")[:2])
    except PackageNotFoundError:
        return ""


def figures_of(found: Compiled) -> Figures:
    """Return the figures of a program: how many kernels, moves of the logits, and of each kernel its own."""
    of_kernels = {each.name: [each.registers, each.spilled, each.instructions] for each in found.kernels}
    return {"program": [found.launches, round(found.moved, 2), round(found.kept, 2)], **of_kernels}


def grown(now: Figures, then: Figures) -> list[str]:
    """Return what has grown by more than a tenth, or was not there."""
    fields = {"program": ("launches", "moved", "kept")}
    return [
        f"{name}: {field} {value:g}, recorded {recorded:g}"
        for name, values in now.items()
        for field, value, recorded in zip(
            fields.get(name, ("registers", "spilled", "instructions")), values, then.get(name, [0.0] * 3), strict=True
        )
        if value > GROWTH * recorded
    ]


@pytest.mark.parametrize(RUN, [(card, name) for card, names in RUNS.items() for name in names if name != "one-hot"])
def test_no_figure_grows(card: str, name: str) -> None:
    recorded = json.loads(RECORD.read_text())
    if versions() != {each: recorded[each] for each in versions()}:
        recorded_with = f"torch {recorded['torch']} and Triton {recorded['triton']}"
        pytest.skip(f"recorded with {recorded_with}, and other versions write other kernels")
    assert not grown(figures_of(compiled(card)[name]), recorded["programs"][card][name])


def test_growth_is_seen() -> None:
    kernel = Kernel("loss triton_red_fused_0 XBLOCK=1", registers=40, spilled=0, instructions=272)
    found = Compiled((kernel,), launches=3, moved=4.0, kept=0.0)
    then = figures_of(found)
    assert not grown(then, then)
    assert not grown(figures_of(replace(found, launches=2, moved=3.0)), then)
    assert grown(figures_of(replace(found, launches=4)), then) == ["program: launches 4, recorded 3"]
    assert grown(figures_of(replace(found, moved=4.5)), then) == ["program: moved 4.5, recorded 4"]
    for worse in ({"registers": 45}, {"spilled": 8}, {"instructions": 304}):
        assert len(grown(figures_of(replace(found, kernels=(replace(kernel, **worse),))), then)) == 1
    assert grown(figures_of(replace(found, kernels=(kernel, replace(kernel, name="another")))), then)


def test_the_record_has_every_program() -> None:
    programs = json.loads(RECORD.read_text())["programs"]
    assert {card: set(of_card) for card, of_card in programs.items()} == {card: set(RUNS[card]) for card in RUNS}


def write_record() -> None:
    """Write the record."""
    of_cards = ",\n".join(
        f'  "{card}": {{\n'
        + ",\n".join(
            f"    {json.dumps(name)}: {json.dumps(figures_of(found))}" for name, found in compiled(card).items()
        )
        + "\n  }"
        for card in RUNS
    )
    head = ", ".join(f'"{name}": "{number}"' for name, number in versions().items())
    RECORD.write_text(f'{{{head}, "programs": {{\n{of_cards}\n}}}}\n')


@pytest.mark.parametrize("card", RUNS)
def test_a_wasteful_loss_exceeds_the_limits(card: str) -> None:
    found = compiled(card)["one-hot"]
    print(f"{card}, one-hot: {found.as_text()}")
    assert exceeds(found, "plain")


def test_each_card_is_one_of_the_table_of_devices() -> None:
    assert set(RUNS) == set(CARDS)
    assert set(CARDS) == {device.name for device in DEVICES if device.family == "cuda"}


@pytest.mark.parametrize("missing", ["torch", "triton"])
def test_without_triton_the_error_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    with pytest.raises(UnavailableError, match=re.escape("pip install -e '.[torch,devices]'")):
        measure("gpu-h100", [])


if __name__ == "__main__":
    write_record()
