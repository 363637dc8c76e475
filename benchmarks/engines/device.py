"""Losses on one device, ours and other libraries': checked, then timed. `make bench-cuda` and `make bench-tpu` run it.

The work is done in other processes (`device_worker`), one for each framework. If one ends before its time, another one
goes on without the loss that ended it. After each part there is a record, so that a lost machine loses little.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile
from types import MappingProxyType
from typing import Any

from benchmarks.engines.timing import LinearShape, Shape
from lsce_cost.devices import CARDS, LIMITS, Limits
from parity_tests.truth.devices import device_of_kind

# Which are measured on a device. A TPU serves one process at a time, and torch reaches it through JAX's compiler.
FRAMEWORKS = {"cpu": ("torch", "jax"), "cuda": ("torch", "jax"), "tpu": ("jax",)}
LIBRARIES = (
    *("lsce", "torch", "triton", "jax", "optax", "libtpu"),
    *("liger-kernel", "cut-cross-entropy", "quack-kernels", "flash-attn", "tokamax"),
)
DENSE_SHAPES = (Shape(8192, 32768), Shape(4096, 128256), Shape(65536, 1000), Shape(256, 1000), Shape(32, 16))
LINEAR_SHAPES = (LinearShape(8192, 2048, 131072), LinearShape(8192, 4096, 128256))
QUICK_DENSE_SHAPES, QUICK_LINEAR_SHAPES = (Shape(16, 1000),), (LinearShape(32, 16, 512),)
DENSE_DTYPES, LINEAR_DTYPES = ("bfloat16", "float32"), ("bfloat16",)
FEW_CALLS = 40  # how many calls there are for one where there are few logits
# Seconds in which a process must say something; compilers and their searches take minutes.
PATIENCE = 900.0
# Installing a library must not change these.
KEPT = ("torch", "triton", "jax", "jaxlib", "numpy")

Part = dict[str, Any]


def make_parts(framework: str, quick: bool) -> list[Part]:
    """Return what is to be checked and then timed, in a framework."""
    dense, linear = (QUICK_DENSE_SHAPES, QUICK_LINEAR_SHAPES) if quick else (DENSE_SHAPES, LINEAR_SHAPES)
    kinds = (("dense", DENSE_DTYPES, dense), ("linear", LINEAR_DTYPES, linear))
    checked = [
        {"stage": "check", "kind": kind, "dtype": dtype, "shape": []} for kind, dtypes, _ in kinds for dtype in dtypes
    ]
    timed = [
        {"stage": "time", "kind": kind, "dtype": dtype, "shape": list(shape[:2] if kind == "dense" else shape)}
        for kind, dtypes, shapes in kinds
        for shape in shapes
        for dtype in dtypes
    ]
    return [{"framework": framework, "number": i, **part} for i, part in enumerate(checked + timed)]


def measure(
    framework: str,
    device: str,
    parts: Sequence[Part],
    command: Sequence[str] = (sys.executable, "-m", "benchmarks.engines.device_worker"),
    variables: Mapping[str, str] = MappingProxyType({}),
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Yield the name of the card, or that it is absent, and then what was found for each part.

    Args:
        framework: "jax" or "torch".
        device: "cpu", "cuda" or "tpu".
        parts: what to do.
        command: of the process.
        variables: of its environment, beside those of this process.
        options: the other fields of `device_worker.Task`.
    """
    failed: dict[str, dict[str, str]] = {}
    left = list(parts)
    is_first = True
    while left:
        task = {"framework": framework, "device": device, "parts": left, "failed": failed, **options}
        now: dict[str, Any] = {}
        with _process([*command, json.dumps(task)], variables) as (messages, outcome):
            for message in messages:
                if "card" in message or "absent" in message:
                    if is_first:
                        yield message
                    if "absent" in message:
                        return
                    is_first = False
                elif "rows" in message:
                    yield left.pop(0) | message
                else:
                    now |= message
        if not left:
            return
        if is_first:  # not even the device was found
            yield {"absent": f"{framework} on {device}: the process ended, {outcome()}"}
            return
        reason = now.get("unusable") or f"it ended the process: {outcome()}"
        number, name = str(now.get("part", left[0]["number"])), now.get("now")
        if name is None or name in failed.setdefault(number, {}):
            # Not a loss, but the part itself, as where there is no memory for the logits.
            yield {**left.pop(0), "rows": [], "missing": {}, "problem": reason}
        else:
            failed[number][name] = reason


@contextmanager
def _process(
    command: Sequence[str], variables: Mapping[str, str]
) -> Iterator[tuple[Iterator[dict[str, Any]], Callable[[], str]]]:
    """Start a process, and kill it if it says nothing for `PATIENCE`. Give its messages; then how it ended.

    What libraries write to stderr is not shown. Its last line belongs to how the process ended.
    """
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, **variables}
    timed_out, last_words = threading.Event(), ""
    with TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=root, env=environment)

        def give_up() -> None:
            timed_out.set()
            process.kill()

        def messages() -> Iterator[dict[str, Any]]:
            assert process.stdout is not None
            while True:
                timer = threading.Timer(PATIENCE, give_up)
                timer.start()
                line = process.stdout.readline()
                timer.cancel()
                if not line:
                    break
                with suppress(json.JSONDecodeError):
                    yield json.loads(line)
            process.wait()

        def outcome() -> str:
            if timed_out.is_set():
                return f"no answer in {PATIENCE:.0f} s"
            code = process.wait()
            ended = f"signal {-code}" if code < 0 else f"exit code {code}"
            return f"{ended}: {last_words}" if last_words else ended

        try:
            yield messages(), outcome
        finally:
            process.kill()
            process.wait()
            errors.seek(0)
            last_words = "".join(errors.read().strip().splitlines()[-1:])[:200]
            if process.stdout is not None:
                process.stdout.close()


# --- The device -----------------------------------------------------------------------------------------------------


def limits_of(device: str, card: str) -> Limits | None:
    """Return what a card can do at most, by its name; None if the table does not have it."""
    if device == "cuda":  # others of the same generation have another bandwidth
        return next((LIMITS[name] for name, each in CARDS.items() if each.name == card and name in LIMITS), None)
    return LIMITS.get(device_of_kind("jax", "tpu", card).name) if device == "tpu" else None


def driver() -> dict[str, str]:
    """Return the version of NVIDIA's driver; nothing without one."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.CalledProcessError):
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
        return {"driver": found[0]} if found else {}
    return {}


# --- Other libraries ------------------------------------------------------------------------------------------------


def requirements(device: str) -> list[str]:
    """Return the other libraries that are timed on a device, as pip takes them."""
    lines = Path(__file__).parents[1].joinpath(f"requirements-{device}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def install(device: str) -> dict[str, str]:
    """Install each of them by itself. Return why, for each that cannot be installed."""
    refused = {}
    with NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as constraints:
        constraints.write("".join(f"{name}=={found}\n" for name, found in _versions(KEPT)))
        constraints.flush()
        for requirement in requirements(device):
            name = requirement.partition(">")[0]
            # Its own dependencies are torch and what its setup reads.
            special = name == "flash-attn"
            if special:
                _pip("setuptools", "wheel", "packaging", "ninja", "psutil", "einops")
            options = ["--no-build-isolation", "--no-deps"] if special else ["--constraint", constraints.name]
            problem = _pip(requirement, *options)
            if problem:
                refused[name] = f"pip cannot install it: {problem}"
    return refused


def _versions(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        with suppress(PackageNotFoundError):
            yield name, version(name)


def _pip(*arguments: str) -> str:
    """Return why pip fails; empty if it does not."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    environment = os.environ | {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == 0:
        return ""
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
    return errors[0].strip() if errors else f"exit code {done.returncode}"
