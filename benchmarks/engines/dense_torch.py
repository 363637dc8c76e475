"""Loss and gradient in torch, eager, and if asked through torch.compile."""

import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import lsce_torch
from benchmarks.engines.timing import Case, Row, Schedule, Shape, make_rows, time_in_turns

Logits, Labels = Float[Tensor, "N K"], Int[Tensor, " N"]
LossFunction = Callable[[Logits, Labels], Any]

SMOOTHED = partial(F.cross_entropy, label_smoothing=0.1)
OPTIONS = {"smoothing": 0.1, "axis": 1}
FUSED = partial(lsce_torch.label_smoothed_cross_entropy, **OPTIONS, implementation="fused")
# What is chosen on a device that has kernels of its own.
KERNELS = {"cuda": "triton"}
# What a trained model's logits have more at the label: their losses are close to 0, which takes a path of its own.
CONFIDENCE = 30.0


def measure(shape: Shape, schedule: Schedule, with_compiled: bool, device: str = "cpu") -> list[Row]:
    """Return time and peak memory of each loss with its gradient, and of the floor."""
    cases = make_cases(shape, with_compiled, device)
    memory = []
    for case in cases:
        case.run(*case.arguments())  # compiles, and starts threads
        memory.append(peak_bytes(case, device))
    timed = time_in_turns(cases, schedule)
    return make_rows(cases, timed, memory)


def make_cases(shape: Shape, with_compiled: bool, device: str = "cpu") -> list[Case]:
    """Return what to time; the first two are what the others are compared with."""
    generator = torch.Generator().manual_seed(0)
    of_rows = (shape.rows, *shape.sizes[2:])
    labels = torch.randint(shape.classes, of_rows, generator=generator).to(device)
    logits = torch.randn(shape.sizes, generator=generator).to(device).requires_grad_()
    place = labels.unsqueeze(1)
    more = torch.full(place.shape, CONFIDENCE, device=device)
    trained = logits.detach().scatter_add(1, place, more).requires_grad_()

    def loss(name: str, function: LossFunction, arguments: Callable[[], tuple[Any, ...]]) -> Case:
        return Case(name, partial(loss_and_gradient, function), arguments, clock=clock_of(device))

    def plain() -> tuple[Logits, Labels]:
        return logits, labels

    best = KERNELS.get(device, "fused")
    ours = partial(FUSED, implementation=best)
    with_stats = partial(lsce_torch.label_smoothed_cross_entropy_with_stats, **OPTIONS, implementation=best)
    cases = [
        loss("F.cross_entropy, smoothed", SMOOTHED, plain),
        loss("F.cross_entropy, unsmoothed", F.cross_entropy, plain),
        loss(f"lsce {best}", ours, plain),
        # Its gradient takes the memory of the logits: each call needs new ones.
        loss(
            f"lsce {best}, in place",
            partial(ours, inplace_backward=True),
            lambda: (logits.detach().clone().requires_grad_(), labels),
        ),
        loss(f"lsce {best}, trained logits", ours, lambda: (trained, labels)),
        loss(f"lsce {best}, with statistics", with_stats, plain),
        *([] if best == "fused" else [loss("lsce fused", FUSED, plain)]),
        loss("lsce reference", partial(FUSED, implementation="reference"), plain),
    ]
    if with_compiled:
        torch._dynamo.reset()  # else the second shape would be compiled for all shapes
        cases += [
            loss("F.cross_entropy, compiled", torch.compile(SMOOTHED, dynamic=False), plain),
            loss("lsce fused, compiled", torch.compile(FUSED, dynamic=False, fullgraph=True), plain),
        ]
    # In pages as the system gives them; lsce fused asks for large ones, which cost less, for its gradient.
    write = Case("floor: write a tensor", lambda z, _: torch.empty_like(z).fill_(1), plain, True, clock_of(device))
    return [*cases, write]


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


def loss_and_gradient(function: LossFunction, logits: Logits, labels: Labels) -> tuple[Any, Logits]:
    """Return what the function does, the loss first, and the gradient of the loss.

    By `torch.autograd.grad`, as the layer below would get it: `backward` may copy what it puts into a leaf.
    """
    output = function(logits, labels)
    loss = output[0] if isinstance(output, tuple) else output
    return output, torch.autograd.grad(loss, logits)[0]


def peak_bytes(case: Case, device: str = "cpu") -> int:
    """Return how much a call has allocated at most at a time, beyond its arguments."""
    return _peak_on_cpu(case) if device == "cpu" else _peak_on_cuda(case)


def _peak_on_cuda(case: Case) -> int:
    arguments = case.arguments()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.run(*arguments)
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(case: Case) -> int:
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
