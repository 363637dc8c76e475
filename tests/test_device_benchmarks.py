"""`make bench-cuda` and `make bench-tpu`, tried on a CPU: checks, times, failures, records, pages. No speed is held."""

import copy
import importlib.util
import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from benchmarks import present
from benchmarks.__main__ import app
from benchmarks.engines import calls_torch, checks, device, device_worker, on_jax, on_torch
from benchmarks.engines.losses import Loss, load, losses
from benchmarks.pages import device_report, report
from lsce_cost.devices import CARDS, LIMITS
from parity_tests.losses.adapters import UnavailableError

ROOT = Path(__file__).parents[1]
# Enough to see everything but torch.compile, which the slow test takes.
PATTERNS = (
    *("F.cross_entropy", "lsce", "lsce triton", "lsce pallas", "lsce linear", "Optax one-hot", "Optax integer[*]"),
    *("Tokamax*", "Liger", "flash*", "QuACK*", "cut*"),
)
PACKAGES = {"Liger": "liger_kernel", "flash": "flash_attn", "QuACK": "quack", "cut": "cut_cross_entropy"}
SMOOTHED = calls_torch.cross_entropy("cpu", label_smoothing=0.1)
DENSE = calls_torch.dense("cpu")
SMALL = {"number": 0, "framework": "torch", "stage": "time", "kind": "dense", "dtype": "float32", "shape": [16, 32]}


def run(*arguments, **environment):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80", **environment})


def dry_run(folder, patterns, config):
    path = folder / "figures.json"
    only = [part for pattern in patterns for part in ("--only", pattern)]
    # Programs are kept for the next run of the tests.
    cache = {} if config.cache is None else {"JAX_COMPILATION_CACHE_DIR": str(config.cache.mkdir("jax"))}
    limits = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    result = run("device", "cpu", "--quick", "--calls", 1, *only, "--json", path, **cache, **limits)
    assert result.exit_code == 0, result.output
    return result.stdout.replace(f"wrote {path}", ""), json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def quick(tmp_path_factory, request):
    return dry_run(tmp_path_factory.mktemp("device"), PATTERNS, request.config)


def names_of(part):
    return [row["name"] for row in part["rows"]]


# --- The whole program ----------------------------------------------------------------------------------------------


def check_record(figures, patterns):
    parts = figures["device cpu"]
    expected = [part for framework in device.FRAMEWORKS["cpu"] for part in device.make_parts(framework, quick=True)]
    assert [part.items() >= one.items() for part, one in zip(parts, expected, strict=True)] == [True] * len(parts)
    for part in parts:
        of_part = losses(part["framework"], part["kind"], "device", dtype=part["dtype"])
        names = [loss.name for loss in of_part if any(fnmatch(loss.name, pattern) for pattern in patterns)]
        assert sorted([*names_of(part), *part["missing"]]) == sorted(names)
        assert names_of(part)[0] == device_report.BASELINES[part["framework"]]
        for row in part["rows"]:
            if part["stage"] == "check" and "failed" not in row:
                assert len(row["cases"]) == (1 if "compiled" in row["name"] else 2 if part["kind"] == "linear" else 3)
                assert not row["no_result"]
            elif "failed" not in row:
                assert row["seconds"][0] >= row["least_seconds"] > 0
                assert row["memory"] >= 0
                assert ("timed" in row) == (part["kind"] == "dense")
    assert device_report.wrong_of_ours(parts) == []
    assert {"date", "commit", "cpu", "python", "torch", "jax", "optax"} <= figures["machine"].keys()
    assert figures["limits"] is None


@pytest.mark.slow
def test_the_record(quick):
    check_record(quick[1], PATTERNS)


@pytest.mark.slow
def test_the_record_of_all_losses(tmp_path, request):
    check_record(dry_run(tmp_path, ["*"], request.config)[1], ["*"])


@pytest.mark.slow
def test_what_fails_on_a_cpu_is_named(quick):
    failed = {row["name"]: row["failed"] for part in quick[1]["device cpu"] for row in part["rows"] if "failed" in row}
    assert failed.pop("lsce pallas").startswith("ValueError: implementation='pallas' cannot compute this call: it runs")
    if importlib.util.find_spec("tokamax"):
        assert failed.pop("Tokamax*") == "NotImplementedError: Not supported on cpu."
    assert failed == {}


@pytest.mark.slow
def test_what_is_not_here_is_named(quick):
    missing = {name: reason for part in quick[1]["device cpu"] for name, reason in part["missing"].items()}
    for start, package in PACKAGES.items():
        reasons = [reason for name, reason in missing.items() if name.startswith(start)]
        here = importlib.util.find_spec(package) is not None
        assert reasons
        assert all(("not installed" in reason) != here for reason in reasons)
    assert ("'cpu'" if importlib.util.find_spec("triton") else "Triton is not installed") in missing["lsce triton"]
    assert "QuACK* is not here: " in quick[0]


@pytest.mark.slow
def test_others_are_right_or_rounded(quick):
    status = {}
    for part in quick[1]["device cpu"]:
        status |= {(row["name"], part["kind"], part["dtype"]): row.get("status") for row in part["rows"]} | status
    assert status["F.cross_entropy", "dense", "float32"] == "agrees"
    assert status["F.cross_entropy", "dense", "bfloat16"] == "rounded"
    assert status["Optax one-hot", "dense", "float32"] == "agrees"
    assert status["Optax one-hot", "dense", "bfloat16"] == "rounded"
    # Its gathered logit, less the largest, is rounded to bfloat16 with the offset in it.
    (hard,) = (
        row["cases"]["large_offset"]
        for part in quick[1]["device cpu"]
        if (part["framework"], part["stage"], part["dtype"], part["kind"]) == ("jax", "check", "bfloat16", "dense")
        for row in part["rows"]
        if row["name"] == "Optax integer*"
    )
    assert hard["status"] == "wrong"
    assert "Optax integer* is wrong in large_offset, bfloat16: loss" in quick[0].replace("\n", " ")


@pytest.mark.slow
def test_every_row_is_printed(quick):
    output, figures = quick
    assert max(map(len, output.splitlines())) <= 80
    for part in figures["device cpu"]:
        for name in names_of(part):
            assert re.search(rf"^{re.escape(name)}  ", output, re.MULTILINE), name
    assert re.search(r"^F\.cross_entropy +~ +[\d.]+ +1\.00 +unknown +[\d.]+ *$", output, re.MULTILINE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_no_device():
    result = run("device", "cuda", "--quick", "--framework", "torch")
    assert (result.exit_code, result.stdout) == (2, "not measured: torch finds no cuda device\n")


# --- Verdicts -------------------------------------------------------------------------------------------------------


def verdicts(function, dtype, smoothing=0.1, ours=False):
    adapter = on_torch.adapter(Loss("loss", lambda: function, ours=ours), function, "cpu", linear=False)
    return checks.check(adapter, list(checks.make_cases(False, dtype, smoothing, quick=True)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "wrong",
    [
        partial(F.cross_entropy, label_smoothing=0.12),
        F.cross_entropy,
        partial(F.cross_entropy, label_smoothing=0.1, reduction="sum"),
        lambda logits, labels: F.cross_entropy(logits.detach() + 0 * logits, labels, label_smoothing=0.1),
        lambda logits, labels: F.cross_entropy(1.05 * logits, labels, label_smoothing=0.1),
        lambda logits, labels: F.cross_entropy(logits, labels.roll(1), label_smoothing=0.1),
        lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=0.1) * float("nan"),
    ],
    ids=["smoothing", "unsmoothed", "sum", "no gradient", "scaled", "labels", "nan"],
)
def test_wrong_losses_are_wrong(wrong, dtype):
    found = verdicts(wrong, dtype)
    assert any(verdict.status == checks.WRONG and verdict.reason for verdict in found.values()), found


def test_right_losses_are_not():
    smoothed = partial(F.cross_entropy, label_smoothing=0.1)
    assert {verdict.status for verdict in verdicts(smoothed, "float32").values()} == {checks.AGREES}
    assert {verdict.status for verdict in verdicts(smoothed, "bfloat16").values()} == {checks.ROUNDED}
    wide = lambda logits, labels: smoothed(logits.float(), labels)  # noqa: E731
    assert {verdict.status for verdict in verdicts(wide, "bfloat16").values()} == {checks.AGREES}


def test_a_case_that_a_loss_does_not_take():
    def refuse(logits, labels):
        raise NotImplementedError("Only multiples of 64.\nMore.")

    assert {*verdicts(refuse, "float32").values()} == {"NotImplementedError: Only multiples of 64."}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", [None, "loss", "one element", "unequal copies"])
def test_all_that_is_timed_is_checked(fault, dtype):
    rows = checks.timed_rows(dtype, 0.1, 1000)
    logits, labels = on_torch.dense_arguments(rows, 32, "cpu")
    loss = DENSE(logits, labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(logits[8:16], logits[:8])
    if fault == "one element":
        gradient[31, labels[31]] *= 1.05
    elif fault == "unequal copies":
        gradient[8:16] = gradient[:8].roll(1, 0)
    value, spread = on_torch.spread((loss * (1.001 if fault == "loss" else 1), gradient), checks.REPEATED)
    adapter = on_torch.adapter(Loss("", lambda: None, ours=True), None, "cpu", linear=False)
    verdict = checks.check_timed(rows, 32, value, spread, adapter.arithmetic)
    assert verdict.status == (checks.AGREES if fault is None else checks.WRONG) or (
        fault == "loss" and dtype == "bfloat16" and verdict.status == checks.ROUNDED
    )
    assert (verdict.status == checks.AGREES) == (fault is None)


@pytest.mark.parametrize(("error", "expected"), [(0, checks.AGREES), (2e-5, checks.IN_SEQUENCE), (1e-2, checks.WRONG)])
def test_sums_in_sequence_are_not_wrong(error, expected):
    # The sum of 2^15 terms may be off by 2^-9 = 2e-3 of itself in sequence, and in blocks of 32 by 6e-6.
    rows = checks.timed_rows("float32", 0.1, 2**15)
    logits, labels = on_torch.dense_arguments(rows, 8, "cpu")
    loss = DENSE(logits.double(), labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    gradient += error * torch.softmax(logits.detach().double(), dim=-1) / 8
    value, spread = on_torch.spread((loss, gradient), checks.REPEATED)
    adapter = on_torch.adapter(Loss("", lambda: None), None, "cpu", linear=False)
    verdict = checks.check_timed(rows, 8, value, spread, adapter.arithmetic)
    assert verdict.status == expected, verdict
    assert (verdict.share > 1) == (expected != checks.AGREES)


# --- Failures -------------------------------------------------------------------------------------------------------


def work(monkeypatch, given, part=SMALL, said=None):
    """Return what the worker says of these losses, each a function of logits and labels."""
    made = [Loss(name, lambda function=function: function) for name, function in given.items()]
    monkeypatch.setattr(device_worker, "losses", lambda *_: made)
    said = [] if said is None else said
    task = device_worker.Task("torch", "cpu", [part], ["*"], {}, 2, 1, 1, True)
    device_worker._Worker(task, said.append).run()
    return said


def fails_later(error):
    """Return a loss that is right for its first calls."""
    calls = []

    def loss(logits, labels):
        calls.append(None)
        if len(calls) > 3:
            raise error
        return SMOOTHED(logits, labels)

    return loss


def out_of_memory(logits, labels):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_failure_is_that_of_one_loss(monkeypatch):
    *_, found = work(
        monkeypatch,
        {
            "F.cross_entropy": SMOOTHED,
            "large": out_of_memory,
            "later": fails_later(RuntimeError("in a turn")),
            "wrong": partial(F.cross_entropy, label_smoothing=0.2),
            "right": DENSE,
        },
    )
    rows = {row["name"]: row for row in found["rows"]}
    assert {name: row["failed"] for name, row in rows.items() if "failed" in row} == {
        "large": "out of memory",
        "later": "RuntimeError: in a turn",
    }
    assert {name for name, row in rows.items() if "median_ms" in row} == {"F.cross_entropy", "wrong", "right"}
    part = {**SMALL, **found}
    table = device_report.time_table(part, [part], None)
    cells = {row[0]: row[1:] for row in table.rows}
    assert [row[0] for row in table.rows][2:] == ["wrong", "large", "later"]
    assert cells["wrong"][0] == "wrong"
    assert cells["wrong"][2] == "–"  # not ranked
    assert cells["F.cross_entropy"][2] == "1.00"
    assert cells["large"] == ("", "–", "–", "–", "–")
    assert "large: out of memory\nlater: RuntimeError: in a turn\nwrong is wrong in 16 x 32, float32: " in table.legend
    (page,) = device_report.page_tables({"device cpu": [part], "limits": None})
    assert {row[0]: row[1] for row in page.rows}["wrong"] == "wrong"


def test_no_memory_for_the_logits(monkeypatch):
    monkeypatch.setattr(on_torch, "dense_arguments", lambda *_: out_of_memory(None, None))
    *_, found = work(monkeypatch, {"F.cross_entropy": SMOOTHED})
    assert found == {"rows": [], "missing": {}, "problem": "out of memory"}
    table = device_report.time_table({**SMALL, **found}, [], None)
    assert "Not measured: out of memory" in table.legend


@pytest.mark.parametrize("stage", ["check", "time"])
def test_a_device_that_takes_no_more_work(stage, monkeypatch):
    """The loss that was at work is to blame, and not those after it."""
    broken = []

    def breaks(logits, labels):
        # When timed, it works the first time, its memory is measured in a second call, and a turn begins with a third.
        broken.append(None)
        if stage == "check" or len(broken) > 2:
            raise RuntimeError("an illegal memory access")
        return SMOOTHED(logits, labels)

    def check_alive(_):
        if broken and (stage == "check" or len(broken) > 2):
            raise RuntimeError("the device is gone")

    said = []
    monkeypatch.setattr(on_torch, "check_alive", check_alive)
    given = {"before": SMOOTHED, "breaks": breaks, "after": SMOOTHED}
    with pytest.raises(device_worker._UnusableError):
        work(monkeypatch, given, {**SMALL, "stage": stage}, said)
    *_, now, last = said
    assert now == {"part": 0, "now": "breaks"}
    assert last == {"unusable": "RuntimeError: an illegal memory access"}


@pytest.mark.slow
def test_the_way_of_a_gpu_on_a_cpu(monkeypatch):
    """All that the process does on a GPU, but for kernels: tensors that are sent there stay here."""
    log = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *given: to(tensor, *(v for v in given if v != "cuda")))
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: log.append("wait"), elapsed_time=lambda _: 2.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    for name, value in {
        "is_available": True,
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 1000,
        "max_memory_allocated": 5000,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: log.append(value) or value)
    parts = [part for part in device.make_parts("torch", quick=True) if part["dtype"] == "bfloat16"]
    patterns = ["F.cross_entropy", "lsce", "lsce, in place", "lsce linear", "flash*"]
    said = []
    task = device_worker.Task("torch", "cuda", parts, patterns, {}, 1, 1, 1, True)
    device_worker._Worker(task, said.append).run()
    found = [part | message for part, message in zip(parts, (each for each in said if "rows" in each), strict=True)]
    assert [part["stage"] for part in found] == ["check", "check", "time", "time"]
    for part in found:
        assert [row.get("failed") for row in part["rows"]] == [None] * len(part["rows"])
        assert {"F.cross_entropy"} < {*names_of(part)}
    times = [row for part in found if part["stage"] == "time" for row in part["rows"]]
    assert {(row["median_ms"], row["memory"]) for row in times} == {(2.0, 4000)}
    assert device_report.wrong_of_ours(found) == []
    limits = device.limits_of("cuda", "NVIDIA H100 80GB HBM3")
    tables = device_report.tables({"device cuda": found, "limits": dict(vars(limits))})
    assert [table.rows[0][4] for table in tables if "÷ first" in table.headings] == ["0 %", "0 %"]


@pytest.mark.slow
def test_the_way_of_a_tpu_on_a_cpu(monkeypatch):
    """The same in JAX: its CPU takes the place of the TPU."""
    cpu = jax.devices()[0]
    monkeypatch.setattr(jax, "devices", lambda *_: [cpu])
    parts = [part for part in device.make_parts("jax", quick=True) if part["dtype"] == "bfloat16"]
    said = []
    patterns = ["Optax one-hot", "lsce", "lsce linear", "lsce pallas"]
    task = device_worker.Task("jax", "tpu", parts, patterns, {}, 1, 1, 1, True)
    device_worker._Worker(task, said.append).run()
    found = [part | message for part, message in zip(parts, (each for each in said if "rows" in each), strict=True)]
    failed = [(row["name"], row["failed"]) for part in found for row in part["rows"] if "failed" in row]
    assert {name for name, _ in failed} == {"lsce pallas"}
    assert all("cannot compute this call: it runs on TPUs" in reason for _, reason in failed)
    assert device_report.wrong_of_ours(found) == []


def test_our_losses_must_be_within_their_bounds():
    ours = {"name": "lsce", "ours": True, "timed": {"status": "rounded"}}
    assert device_report.wrong_of_ours([{**SMALL, "rows": [ours]}]) == ["lsce (torch, dense, float32)"]
    assert device_report.wrong_of_ours([{**SMALL, "rows": [ours | {"ours": False}]}]) == []


PROCESS = """
import json, os, sys, time
task = json.loads(sys.argv[1])
say = lambda **content: print(json.dumps(content), flush=True)
say(card="Card")
print("noise")
for part in task["parts"]:
    say(part=part["number"], now=None)
    if part.get("unable"):
        sys.exit(5)
    failed = task["failed"].get(str(part["number"]), {})
    for name in ("right", "kills", "hangs", "spoils"):
        if name in failed:
            continue
        say(part=part["number"], now=name)
        if name == "kills":
            os.kill(os.getpid(), 9)
        if name == "hangs":
            time.sleep(60)
        if name == "spoils":
            say(unusable="an illegal memory access")
            sys.exit(3)
    say(rows=[{"name": name, "failed": reason} for name, reason in failed.items()], missing={})
"""


def test_a_process_that_ends_is_started_again(monkeypatch):
    monkeypatch.setattr(device, "PATIENCE", 3.0)
    parts = [{"number": 0}, {"number": 1, "unable": True}, {"number": 2}]
    found = list(device.measure("torch", "cpu", parts, (sys.executable, "-c", PROCESS)))
    reasons = [
        {"name": "kills", "failed": "it ended the process: signal 9"},
        {"name": "hangs", "failed": "it ended the process: no answer in 3 s"},
        {"name": "spoils", "failed": "an illegal memory access"},
    ]
    assert found == [
        {"card": "Card"},
        {"number": 0, "rows": reasons, "missing": {}},
        {"number": 1, "unable": True, "rows": [], "missing": {}, "problem": "it ended the process: exit code 5"},
        {"number": 2, "rows": reasons, "missing": {}},
    ]


def test_a_process_that_does_not_start():
    command = (sys.executable, "-c", "import sys; sys.exit(4)")
    reason = "torch on cuda: the process ended, exit code 4"
    assert list(device.measure("torch", "cuda", [{"number": 0}], command)) == [{"absent": reason}]
    command = (sys.executable, "-c", "import sys; sys.exit('one\\ntwo')")
    reason = "torch on cuda: the process ended, exit code 1: two"
    assert list(device.measure("torch", "cuda", [{"number": 0}], command)) == [{"absent": reason}]


# --- Records and pages ----------------------------------------------------------------------------------------------


@pytest.fixture
def docs(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.pages.keep.DOCS", tmp_path)
    begin, end = (f"<!-- benchmarks device cuda: {each} -->" for each in ("begin", "end"))
    (tmp_path / "gpu.md").write_text(f"before\n{begin}\nold\n{end}\nafter", encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_the_record_grows_with_each_part(quick, docs, monkeypatch):
    parts = copy.deepcopy(quick[1]["device cpu"])
    record, card = docs / "figures/device-cuda/nvidia-b200.json", CARDS["gpu-b200"].name
    sizes = []

    def measure(framework, name, made, **options):
        yield {"card": card}
        for part in (part for part in parts if part["framework"] == framework):
            yield part
            sizes.append(len(json.loads(record.read_text(encoding="utf-8"))["device cuda"]))

    monkeypatch.setattr(device, "measure", measure)
    result = run("device", "cuda", "--write")
    assert result.exit_code == 0, result.output
    assert sizes == [*range(1, len(parts) + 1)]
    figures = json.loads(record.read_text(encoding="utf-8"))
    assert figures["machine"]["device"] == f"cuda: {card}"
    assert figures["limits"]["bandwidth"] == LIMITS["gpu-b200"].bandwidth
    page = (docs / "gpu.md").read_text(encoding="utf-8")
    assert page.startswith(f"before\n<!-- benchmarks device cuda: begin -->\n### {card}\n\n`make bench-cuda`: date ")
    assert page.endswith(f"{report.page_blocks([figures])['device cuda']}\n<!-- benchmarks device cuda: end -->\nafter")
    assert page.count("**torch**") == page.count("**JAX under jit**") == 2
    (first,) = (
        part for part in parts if (part["framework"], part["stage"], part["dtype"]) == ("jax", "time", "float32")
    )
    row = next(row for row in first["rows"] if row["name"] == "lsce")
    share = 100 * 2 * 16 * 1000 * 4 / LIMITS["gpu-b200"].bandwidth / (row["median_ms"] / 1e3)
    ratio = row["median_ms"] / first["rows"][0]["median_ms"]
    assert re.search(rf"^\| lsce \| .* \| {ratio:.2f} \({share:.0f} %\) \|", page, re.MULTILINE)


@pytest.mark.parametrize(
    ("kind", "dtype", "shape", "limits"),
    [
        ("dense", "float32", [16, 32], {"bandwidth": 2 * 16 * 32 * 4e3}),
        ("dense", "bfloat16", [16, 32], {"bandwidth": 2 * 16 * 32 * 2e3}),
        ("linear", "bfloat16", [8, 4, 32], {"matrix": {"bfloat16": 6 * 8 * 4 * 32e3}}),
    ],
)
def test_the_share_of_the_limit(kind, dtype, shape, limits):
    """At these limits the least time is 1 ms."""
    row = {"name": "F.cross_entropy", "ours": False, "median_ms": 2.0, "memory": 0}
    part = SMALL | {"kind": kind, "dtype": dtype, "shape": shape, "rows": [row], "missing": {}}
    limits = {"bandwidth": 1.0, "matrix": {"bfloat16": 1.0}, "source": "a page", **limits}
    table = device_report.time_table(part, [part], limits)
    assert table.rows == [("F.cross_entropy", "?", "2.00", "1.00", "50 %", "0.00")]
    (page,) = device_report.page_tables({"device cuda": [part], "limits": limits})
    assert page.rows == [("F.cross_entropy", "2.00 ms (50 %)?", "0.00 MB")]


def test_a_wrong_loss_of_ours_fails_the_command(docs, monkeypatch):
    row = {"name": "lsce", "ours": True, "smoothing": 0.1, "status": "wrong", "share": 2.0, "no_result": {}}
    row["cases"] = {"uniform_mean": {"status": "wrong", "share": 2.0, "reason": "loss: 1.0"}}
    part = {**SMALL, "stage": "check", "rows": [row], "missing": {}}
    monkeypatch.setattr(device, "measure", lambda *_, **__: iter([{"card": "Card"}, part]))
    result = run("device", "cuda", "--framework", "torch", "--write")
    assert result.exit_code == 1
    assert "outside of their bounds: lsce (torch, dense, float32)" in result.stdout
    assert (docs / "figures/device-cuda/card.json").is_file()


def test_limits_are_those_of_the_very_card():
    assert device.limits_of("cuda", "NVIDIA H100 80GB HBM3") == LIMITS["gpu-h100"]
    assert device.limits_of("cuda", "NVIDIA GeForce RTX 2060") is None
    assert device.limits_of("tpu", "TPU v6 lite") == LIMITS["tpu-v6e"]
    assert device.limits_of("tpu", "TPU v99") is None
    assert device.limits_of("cpu", "") is None


# --- Before anything is measured ------------------------------------------------------------------------------------


def test_a_library_that_cannot_be_installed_does_not_stop_the_others(monkeypatch):
    asked = []

    def pip(command, **options):
        asked.append(command)
        bad = any("quack" in part for part in command)
        return SimpleNamespace(returncode=int(bad), stderr="Looking\nERROR: no wheel for it\nmore")

    monkeypatch.setattr(device.subprocess, "run", pip)
    assert device.install("cuda") == {"quack-kernels": "pip cannot install it: ERROR: no wheel for it"}
    assert [
        part for command in asked for part in command if part in device.requirements("cuda")
    ] == device.requirements("cuda")
    kept = [command for command in asked if "--constraint" in command]
    assert len(kept) == len(device.requirements("cuda")) - 1
    assert all("--no-deps" in command for command in asked if command not in kept and "flash" in "".join(command))


def test_requirements_are_the_libraries_of_the_losses():
    names = {re.split(r"[<>=]", line)[0] for line in device.requirements("cuda") + device.requirements("tpu")}
    assert names <= {*device.LIBRARIES}
    assert all(">=" in line for line in device.requirements("cuda") + device.requirements("tpu"))


def test_a_library_that_cannot_be_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "looks_for_a_device.py").write_text("raise OSError('no libcuda.so')\n", encoding="utf-8")
    with pytest.raises(UnavailableError, match=r"name cannot be imported: OSError: no libcuda\.so"):
        load("looks_for_a_device", "name")
    with pytest.raises(UnavailableError, match="name is not installed"):
        load("no_such_library.part", "name")


def test_a_gpu_that_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(present.shutil, "which", lambda name: None)
    assert present.missing_gpu(tmp_path) == (
        "no GPU: neither /dev/nvidia0 (NVIDIA), /dev/kfd (AMD) nor nvidia-smi is on this machine"
    )
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    assert present.missing_gpu(tmp_path) is None


@pytest.mark.parametrize(("code", "output", "found"), [(0, "GPU 0: NVIDIA H100", True), (9, "no driver", False)])
def test_what_nvidia_smi_says(code, output, found, tmp_path, monkeypatch):
    monkeypatch.setattr(present.shutil, "which", lambda name: name)
    done = SimpleNamespace(returncode=code, stdout=output, stderr="")
    monkeypatch.setattr(present.subprocess, "run", lambda *_, **__: done)
    assert present.missing_gpu(tmp_path) == (None if found else "no GPU: nvidia-smi lists none (no driver)")


def test_a_tpu_that_is_there(tmp_path):
    assert present.missing_tpu(tmp_path) == "no TPU: neither /dev/accel0 nor a TPU on the PCI bus is on this machine"
    bus = tmp_path / "sys/bus/pci/devices/0000:00:04.0"
    bus.mkdir(parents=True)
    (bus / "vendor").write_text("0x1ae0\n")
    (bus / "device").write_text("0x0042\n")  # a network card
    assert present.missing_tpu(tmp_path) is not None
    (bus / "device").write_text("0x006f\n")
    assert present.missing_tpu(tmp_path) is None
    bus.joinpath("vendor").write_text("0x10de\n")
    assert present.missing_tpu(tmp_path) is not None
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/accel0").touch()
    assert present.missing_tpu(tmp_path) is None


@pytest.mark.parametrize("name", ["cuda", "tpu"])
def test_the_exit_code_without_a_device(name, monkeypatch, capsys):
    monkeypatch.setattr(present.sys, "argv", ["present", name])
    monkeypatch.setitem(present.MISSING, name, lambda: "no such device")
    assert present.main() == 2
    assert capsys.readouterr().err == "no such device\n"
    monkeypatch.setitem(present.MISSING, name, lambda: None)
    assert present.main() == 0


@pytest.mark.parametrize("name", ["cuda", "tpu"])
def test_make_looks_for_the_device_before_it_installs(name):
    done = subprocess.run(
        ["make", "--dry-run", f"bench-{name}", "PYTHON=some-python"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stdout.splitlines() if not line.startswith("make")]
    assert lines[0] == f"some-python -m benchmarks.present {name}"
    assert lines[-1].endswith(f"/python -m benchmarks device {name} --install --write ")


def test_looking_for_a_device_needs_nothing_installed():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import benchmarks.present; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"numpy", "torch", "jax", "rich", "typer"} & set(loaded.split())


def test_arguments_are_the_same_in_both_frameworks():
    rows = checks.timed_rows("bfloat16", 0.1, 50)
    logits, labels = on_torch.dense_arguments(rows, 16, "cpu")
    others = on_jax.dense_arguments(rows, 16, "cpu")
    np.testing.assert_array_equal(logits.detach().double().numpy(), np.asarray(others[0], np.float64))
    np.testing.assert_array_equal(labels.numpy(), np.asarray(others[1]))
