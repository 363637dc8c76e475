"""Losses in torch: their arguments, what is timed of them, their memory, and what a failure leaves."""

import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.engines.losses import Loss, Program
from benchmarks.engines.timing import Case as TimedCase
from benchmarks.engines.timing import LinearShape, Shape
from lsce_torch import kernels
from parity_tests.losses.adapters import Adapter, TorchAdapter, to_torch
from parity_tests.losses.triton_kernels import rounding_to_nearest
from parity_tests.truth.cases import Case
from parity_tests.truth.precision import as_dtype

# What a trained model's logits have more at the label: their losses are close to 0, which takes a path of its own.
CONFIDENCE = 30.0


def settings() -> AbstractContextManager[None]:
    """Return what the losses run within: Triton's interpreter, where it is chosen, rounds as GPUs do."""
    return rounding_to_nearest() if kernels.is_interpreted() else nullcontext()


def set_threads(number: int) -> None:
    """Set how many threads torch uses."""
    torch.set_num_threads(number)


def begin(device: str) -> None:
    """Forget what was compiled: many shapes would reach the limit of recompilations. Give memory back."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    release(device)


def release(device: str) -> None:
    """Give memory back to the device."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def check_alive(device: str) -> None:
    """Raise if the device takes no more work, as after an access to memory that is not there."""
    if device == "cuda":
        torch.cuda.synchronize()


def adapter(loss: Loss, function: Callable[..., Any], device: str, linear: bool) -> Adapter:
    """Return the function as an adapter of the harness, which calls it in cases of the loss's smoothing."""

    def call(*operands: Any, labels: Any, **options: Any) -> Any:
        del options  # the function has them
        return function(*operands, labels)

    made = TorchAdapter(call, device=device, name=loss.name, supports=frozenset(), linear=linear)
    if loss.ours:
        made.is_ours = True
        made.arithmetic = made.arithmetic_on(made.device_model)
    return made


def dense_arguments(case: Case, rows: int, device: str) -> tuple[Tensor, Tensor]:
    """Return the rows of a case, repeated up to so many."""
    times = rows // len(case.labels)
    logits = to_torch(as_dtype(case.logits, case.dtype)).to(device).repeat(times, 1)
    return logits.requires_grad_(), torch.from_numpy(case.labels).to(device).repeat(times)


def random_logits(shape: Shape, device: str, trained: bool = False) -> tuple[Tensor, Tensor]:
    """Return normally distributed logits and labels; trained: each label is by far the largest logit of its row."""
    generator = torch.Generator().manual_seed(0)
    of_rows = (shape.rows, *shape.sizes[2:])
    labels = torch.randint(shape.classes, of_rows, generator=generator).to(device)
    logits = torch.randn(shape.sizes, generator=generator).to(device)
    if trained:
        place = labels.unsqueeze(1)
        logits.scatter_add_(1, place, torch.full(place.shape, CONFIDENCE, device=device))
    return logits.requires_grad_(), labels


def linear_arguments(shape: LinearShape, dtype: str, device: str) -> tuple[Tensor, ...]:
    """Return hidden, weight and labels; logits of variance 1."""
    generator, kind = torch.Generator().manual_seed(0), getattr(torch, dtype)
    hidden = torch.randn(shape.rows, shape.features, generator=generator)
    weight = torch.randn(shape.classes, shape.features, generator=generator) / shape.features**0.5
    labels = torch.randint(shape.classes, (shape.rows,), generator=generator)
    return hidden.to(device, kind).requires_grad_(), weight.to(device, kind).requires_grad_(), labels.to(device)


def program(
    loss: Loss, function: Callable[..., Any], arguments: Sequence[Any], device: str, linear: bool, alone: bool = False
) -> Program:
    """Return the loss with its gradients, or alone; its memory is the most bytes that a call allocates at a time."""
    compute = partial(loss_and_gradients, function, num_floats=2 if linear else 1)

    def fresh() -> tuple[Any, ...]:
        if not loss.overwrites:
            return tuple(arguments)
        return (arguments[0].detach().clone().requires_grad_(), *arguments[1:])

    run = torch.no_grad()(function) if alone else compute
    case = TimedCase(loss.name, run, fresh, loss.floor, clock_of(device))
    return Program(case, lambda: {"memory": peak_bytes(case, device)})


def loss_and_gradients(function: Callable[..., Any], *arguments: Any, num_floats: int) -> tuple[Any, ...]:
    """Return what the function does, the loss first, and the gradients of the loss.

    By `torch.autograd.grad`, as the layer below would get them: `backward` may copy what it puts into a leaf.
    """
    output = function(*arguments)
    loss = output[0] if isinstance(output, tuple) else output
    return output, *torch.autograd.grad(loss, arguments[:num_floats])


def results_of(function: Callable[..., Any], arguments: Sequence[Any], wide: bool) -> list[NDArray[np.float64]]:
    """Return the loss of a layer and its gradients; wide: computed in float64."""
    if wide:
        arguments = [of.detach().double().requires_grad_() if of.is_floating_point() else of for of in arguments]
    found = loss_and_gradients(function, *arguments, num_floats=2)
    return [each.detach().double().numpy() for each in found]


# --- Time and memory ------------------------------------------------------------------------------------------------


def clock_of(device: str) -> Callable[[Callable[[], Any]], tuple[Any, float]] | None:
    """Return a clock that waits for the device and takes the time there, by CUDA events; None for the CPU."""
    return None if device == "cpu" else _time_by_events


def _time_by_events(call: Callable[[], Any]) -> tuple[Any, float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()  # else starting kernels would take no time while the arguments are made
    start.record()
    result = call()
    end.record()
    end.synchronize()
    return result, start.elapsed_time(end) / 1e3


def peak_bytes(case: TimedCase, device: str = "cpu") -> int:
    """Return how much a call has allocated at most at a time, beyond its arguments."""
    return _peak_on_cpu(case) if device == "cpu" else _peak_on_cuda(case)


def _peak_on_cuda(case: TimedCase) -> int:
    arguments = case.arguments()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.run(*arguments)
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(case: TimedCase) -> int:
    """Return the same on the CPU.

    The profiler reports every allocation and release of torch's CPU allocator in order, those within an operation and
    within compiled code included, which a TorchDispatchMode does not see. The greatest running total is the peak.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it writes a line to stderr at each start and stop
    arguments = case.arguments()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = case.run(*arguments)
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    return max(accumulate(change for _, change in sorted(changes)), default=0)


# --- What came out ----------------------------------------------------------------------------------------------------


def spread(result: Any, repeated: int) -> tuple[float, list[NDArray[np.float64]]]:
    """Return the loss, and the least and the largest gradient of each of the rows that are repeated."""
    loss, gradient = result
    rows = gradient.detach().reshape(-1, repeated, gradient.shape[-1])
    return loss.item(), [of.double().cpu().numpy() for of in (rows.amin(0), rows.amax(0))]


def is_finite(result: Any) -> bool:
    """Return whether loss and gradients are finite numbers."""
    return all(bool(torch.isfinite(part).all()) for part in result)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether that is what an exception says."""
    return isinstance(error, torch.OutOfMemoryError)
