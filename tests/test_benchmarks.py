"""The benchmarks: that each row is there, that memory is measured right, and that turns are taken. No speed is held."""

import io
import json
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn import functional as F
from typer.testing import CliRunner

from benchmarks import __main__ as main
from benchmarks import logit_scale
from benchmarks.__main__ import QUICK_LINEAR_SHAPE, QUICK_SCALING_SHAPES, QUICK_SHAPE, app
from benchmarks.engines import calls_jax, calls_torch, in_turns, on_jax, on_torch, tpu
from benchmarks.engines.timing import Case, LinearShape, Schedule, Shape, time_in_turns
from benchmarks.pages import device_report, report
from benchmarks.pages.keep import DOCS, PAGES
from benchmarks.pages.tables import print_table
from parity_tests.evidence.cards import AbsentError
from parity_tests.evidence.pages import replace_block


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})


def quick_run(tmp_path_factory, *arguments):
    path = tmp_path_factory.mktemp("benchmarks") / "figures.json"
    result = run(*arguments, "--quick", "--calls", 2, "--json", path)
    assert result.exit_code == 0, result.output
    output = result.stdout.replace(f"wrote {path}", "")
    assert max(map(len, output.splitlines())) <= 80
    return output, json.loads(path.read_text(encoding="utf-8"))


def here(framework, form, shown):
    """Return the names of a list that are not compiled and not missing here."""
    return [name for name, (loss, _) in in_turns.available(framework, form, shown).items() if not loss.compiled]


@pytest.mark.parametrize(
    ("command", "shape"),
    [("dense", QUICK_SHAPE.sizes), pytest.param("linear", QUICK_LINEAR_SHAPE, marks=pytest.mark.slow)],
)
def test_every_row_is_printed_and_has_figures(command, shape, tmp_path_factory):
    output, figures = quick_run(tmp_path_factory, command)
    tables = figures[command]
    assert [(table["framework"], table.get("allocator")) for table in tables] == [
        ("jax", None),
        ("torch", None),
        ("torch", "kept"),
    ]
    for table in tables:
        assert table["shape"] == list(shape)
        assert [row["name"] for row in table["rows"]] == here(table["framework"], command, command)
        for row in table["rows"]:
            assert re.search(rf"^{re.escape(row['name'])}( +[\d.]+){{6}} *$", output, re.MULTILINE)
            assert len(row["seconds"]) == 1
            assert all(seconds > 0 for seconds in row["seconds"])
            assert row["memory"] >= 0
    assert {"date", "cpu", "cores", "jax", "torch", "optax"} <= figures["machine"].keys()


@pytest.mark.slow
def test_every_number_of_rows_is_printed(tmp_path_factory):
    output, figures = quick_run(tmp_path_factory, "linear", "--scaling")
    assert [table["framework"] for table in figures["scaling"]] == ["jax", "torch"]
    for table in figures["scaling"]:
        assert [row["name"] for row in table["rows"]] == [str(shape.rows) for shape in QUICK_SCALING_SHAPES]
        for row in table["rows"]:
            assert len(re.findall(rf"^{row['name']}(?: +[\d.]+){{5}} *$", output, re.MULTILINE)) == 2
            assert row["memory"] > 0


@pytest.mark.slow
def test_every_row_of_added_smoothing_is_printed(tmp_path_factory):
    output, figures = quick_run(tmp_path_factory, "smoothing")
    for table in figures["smoothing"]:
        names = here(table["framework"], "linear", "smoothing")
        assert [row["name"] for row in table["rows"]] == [name for name in names for _ in range(2)]
        assert table["errors"].keys() == {*names, "lsce linear, smoothed itself", "lsce, of all logits"}
        for name, errors in table["errors"].items():
            assert re.search(rf"^{re.escape(name)}( +[\d.]+){{6}} *$", output, re.MULTILINE) or name not in names
            assert re.search(rf"^{re.escape(name)}( +[\de.-]+){{3}} *$", output, re.MULTILINE)
            # Of a mean: bfloat16 keeps 8 bits, and each gradient is rounded a few times.
            assert 0 < max(errors) < 2.0**-5


# --- What is timed --------------------------------------------------------------------------------------------------


def bounds(hidden, weight, labels, smoothing):
    """Return how far two losses, and their gradients, may be apart in float32: twice the first-order error of each.

    A logit is off by D roundings of its terms, which moves a probability by that and by its mean over the classes.
    """
    u, (rows, features), classes = 2.0**-24, hidden.shape, weight.shape[1]
    logits, of_logit = hidden @ weight, u * features * np.abs(hidden) @ np.abs(weight)
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    q = np.full_like(p, smoothing / classes)
    q[np.arange(rows), labels] += 1 - smoothing
    loss = -(q * np.log(p)).sum(axis=-1).mean()
    of_sum = (p * of_logit).sum(axis=-1, keepdims=True)
    # The sums of 40 classes are up to 6 deep, as are those of the products; 300 rows are 9 deep.
    of_logits = (p * (of_logit + of_sum + 16 * u) + 8 * u * q) / rows
    size = (p + q) / rows
    return (
        2 * ((np.abs(p - q) * of_logit).sum(axis=-1).mean() + 24 * u * loss),
        2 * (of_logits + 6 * u * size) @ np.abs(weight).T,
        2 * np.abs(hidden).T @ (of_logits + 9 * u * size),
    )


def assert_within(actual, expected, bound, name=""):
    error = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))
    assert np.all(error <= bound), (name, np.max(error / bound))


@pytest.mark.slow
def test_linear_losses_are_the_same():
    shape = LinearShape(300, 2, 40)  # in chunks of which the last is not full
    hidden, weight, labels, smoothing = on_jax.linear_arguments(shape, "float32", "cpu")
    allowed = bounds(*(np.asarray(a, np.float64) for a in (hidden, weight)), np.asarray(labels), float(smoothing))
    of_torch = [torch.tensor(np.asarray(a)).requires_grad_() for a in (hidden, weight.T)]
    results = {}
    for name, (loss, function) in in_turns.available("jax", "linear", "linear").items():
        if not loss.floor:
            results[f"jax, {name}"] = on_jax.results_of(function, (hidden, weight, labels, smoothing), wide=False)
    for name, (loss, function) in in_turns.available("torch", "linear", "linear").items():
        if not loss.floor and loss.smoothing:
            output, *gradients = on_torch.loss_and_gradients(
                function, *of_torch, torch.tensor(np.asarray(labels)).long(), num_floats=2
            )
            of_output = (output[0] if isinstance(output, tuple) else output).detach()
            results[f"torch, {name}"] = [of_output, gradients[0], gradients[1].T]
    expected = results["jax, lse form"]
    for name, actual in results.items():
        for one, other, bound in zip(actual, expected, allowed, strict=True):
            assert_within(one, other, bound, name)
    # Smoothing that is off by a hundredth of itself is seen in both gradients.
    wrong = on_jax.results_of(
        in_turns.available("jax", "linear", "linear")["lse form"][1],
        (hidden, weight, labels, 1.01 * smoothing),
        wide=False,
    )
    for one, other, bound in zip(wrong[1:], expected[1:], allowed[1:], strict=True):
        with pytest.raises(AssertionError):
            assert_within(one, other, bound)


def test_floors_compute_the_products():
    hidden, weight, labels, smoothing = on_jax.linear_arguments(LinearShape(300, 8, 40), "float32", "cpu")
    others = on_torch.linear_arguments(LinearShape(300, 8, 40), "float32", "cpu")
    of_torch = [array.T for array in calls_torch.products("cpu")(*others)]
    for (h, w), products in (
        ((hidden, weight), calls_jax.products("cpu")(hidden, weight, labels, smoothing)),
        ((others[0].detach(), others[1].detach().T), (of_torch[0].T, of_torch[1])),
    ):
        h, w = np.asarray(h, np.float64), np.asarray(w, np.float64)  # noqa: PLW2901
        logits, terms = h @ w, np.abs(h) @ np.abs(w)
        for product, expected, size, depth in (
            (products[0], logits @ w.T, terms @ np.abs(w).T, 40),
            (products[1], h.T @ logits, np.abs(h).T @ terms, 300),
        ):
            # The logits' 8 roundings, and those of the second sum.
            assert_within(product, expected, 2.0**-24 * (8 + depth) * size)


# --- Memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "gradients"),
    [
        (lambda z, _: z.exp().sum(), 2),  # exp, which is kept, and the gradient
        (lambda z, _: (z.exp() * z).sum(), 4),  # exp kept; gradients of the sum: of one factor, the other, together
        (F.cross_entropy, 3),  # log-softmax, its gradient, the gradient
        (calls_torch.cross_entropy("cpu", label_smoothing=0.1), 3),
    ],
)
def test_peak_memory(function, gradients):
    logits, labels = torch.zeros(64, 1000, requires_grad=True), torch.zeros(64, dtype=torch.int64)
    run = partial(on_torch.loss_and_gradients, function, num_floats=1)
    case = Case("", run, lambda: (logits, labels))
    assert on_torch.peak_bytes(case) / (4 * 64 * 1000) == pytest.approx(gradients, abs=0.01)


def test_peak_memory_within_an_operation():
    # A sum of bytes makes integers of eight bytes of them first; the second sum has the memory of the first.
    case = Case("", lambda bytes_: (bytes_.sum(), bytes_.sum()), lambda: (torch.zeros(10**6, dtype=torch.uint8),))
    assert on_torch.peak_bytes(case) == pytest.approx(8 * 10**6, abs=1000)


@pytest.mark.parametrize(
    ("name", "logits", "chunks", "gradients"),
    [
        ("F.cross_entropy, smoothed", 3, 0, 0),  # the gradients of the layer come when two of these are gone
        ("lsce fused", 2, 0, 0),
        ("lsce linear", 0, 1, 1),
        ("lsce linear, recompute", 0, 1, 1),
        ("lsce linear, none then mean", 0, 1, 1),
    ],
)
def test_peak_memory_of_the_linear_loss(name, logits, chunks, gradients):
    shape = LinearShape(2048, 16, 20000)
    loss, function = in_turns.available("torch", "linear", "linear")[name]
    arguments = on_torch.linear_arguments(shape, "float32", "cpu")
    case = on_torch.program(loss, function, arguments, "cpu", linear=True).case
    chunk_bytes = 4 * 256 * shape.classes
    expected = logits * shape.logits_bytes + chunks * chunk_bytes + gradients * shape.gradient_bytes
    assert on_torch.peak_bytes(case) == pytest.approx(expected, rel=0.05)


# --- Time -----------------------------------------------------------------------------------------------------------


def test_turns():
    log = []

    def case(name):
        return Case(name, log.append, lambda: (log.append("prepare") or name,))

    timed = time_in_turns([case("a"), case("b")], Schedule(rounds=2, calls=3))
    assert log == 2 * (4 * ["prepare", "a"] + 4 * ["prepare", "b"])
    assert [len(of_case.seconds) for of_case in timed] == [2, 2]
    assert all(of_case.least_seconds <= min(of_case.seconds) for of_case in timed)


def test_page_faults() -> None:
    """A fresh tensor of 64 MiB has pages of 4 KiB, or of 2 MiB where the system gives those."""
    case = Case("", lambda: torch.zeros(2**24).fill_(1), tuple)
    (timed,) = time_in_turns([case], Schedule(rounds=1, calls=2))
    assert 32 <= timed.faults <= 2**14 + 1000
    (idle,) = time_in_turns([Case("", lambda: None, tuple)], Schedule(rounds=1, calls=2))
    assert idle.faults < 10


# --- The command line -----------------------------------------------------------------------------------------------


SHAPE_ERROR = "'--shape': must be like 1024x32768, or 4x21x65536 for images, got '{}'."
LAYER_ERROR = "'--shape': must be like 2048x512x50257, got '{}'."
ALL_ERROR = "keeps the figures of all losses"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        *((f"dense --shape {each}", 2, SHAPE_ERROR.format(each)) for each in ["1024", "0x10", "10x", "axb", "1x1x1x1"]),
        *((f"linear --shape {each}", 2, LAYER_ERROR.format(each)) for each in ["8x5", "0x1x1", "axbxc", "1x2x3x4"]),
        ("linear --scaling --shape 8x8x8", 2, "'--scaling': has shapes of its own"),
        ("device cpu --write", 2, "leave '--write' out"),
        ("device cpu --install", 2, "is for cuda and tpu"),
        ("device tpu --framework torch", 2, "torch is not measured on a tpu"),
        *((f"all --write {each}", 2, ALL_ERROR) for each in ("--quick", "--session torch", "--only lsce")),
        ("all --session keras", 2, "there is no session 'keras'"),
        ("scaling --rows 63 --mesh 2x4", 1, "63 rows cannot be divided over 2 devices"),
        ("scaling --rows 64 --mesh 4x4", 1, "4 x 4 are more than the 8 virtual devices of a CPU"),
        ("scaling --rows 64 --target tpu-v9", 1, "there is no target 'tpu-v9'"),
        ("scaling --rows 64 --mesh 4", 2, "must be like 4x4"),
        ("scaling --quick --write", 2, "keeps the figures of the page's sizes"),
    ],
)
def test_errors_of_the_command_line(arguments, code, message):
    result = run(*arguments.split())
    assert result.exit_code == code
    assert message in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize("command", ["tpu", "tpu-exp"])
def test_tpu_without_its_compiler(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    result = run(command)
    assert result.exit_code == 1
    assert "pip install 'libtpu==" in result.stderr


@pytest.mark.parametrize("what", ["dense", "linear"])
def test_no_framework_finds_the_device(what, monkeypatch):
    monkeypatch.setattr(main, "find_device", no_card)
    result = run(what, "--device", "cuda")
    assert result.exit_code == 1
    assert "not measured: jax finds no cuda device" in result.stdout


def no_card(framework, device):
    raise AbsentError(f"{framework} finds no {device} device")


@pytest.mark.parametrize("what", ["dense", "linear"])
def test_what_finds_the_device_is_measured_there(what, monkeypatch, tmp_path):
    monkeypatch.setattr(main, "find_device", lambda name, device: "TPU v0" if name == "jax" else no_card(name, device))
    measure, places = getattr(in_turns, f"measure_{what}"), []

    def measured(framework, size, schedule, device, *others):
        places.append(device)
        return measure(framework, size, schedule, "cpu", *others)

    monkeypatch.setattr(in_turns, f"measure_{what}", measured)
    result = run(what, "--quick", "--device", "tpu", "--json", tmp_path / "figures.json")
    assert result.exit_code == 0, result.output
    assert "not measured: torch finds no tpu device" in result.stdout
    assert places == ["tpu"]
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert [table["framework"] for table in figures[what]] == ["jax"]
    assert report.record_path(DOCS, figures) == DOCS / what / "tpu-v0.json"
    page = report.page_blocks([figures])[what]
    assert page.startswith("### TPU v0\n")
    assert f"benchmarks {what} --device tpu --write`" in page


def test_the_clock_of_a_card_waits_for_it(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 2.5  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("empty"))
    case = Case("", log.append, lambda: ("run",), clock=on_torch.clock_of("cuda"))
    (timed,) = time_in_turns([case], Schedule(rounds=1, calls=1))
    assert log == 2 * ["empty", "record", "run", "record", "wait"]
    assert timed.seconds == [2.5e-3]
    assert on_torch.clock_of("cpu") is None


def test_table_of_the_linear_loss_on_tpus():
    output = io.StringIO()
    costs = [
        tpu.LinearCost(topology, name, "float32", temp, 3e10, 1.5e13)._asdict()
        for name in tpu.LINEAR_LOSSES
        for topology, temp in (("v5e:2x2", 3 * 10**9), ("v6e:2x2", 10**9))
    ]
    table = report.linear_tpu_table(costs, tpu.LINEAR_SHAPE, tpu.linear_chunk_bytes())
    print_table(table, Console(file=output, width=80))
    number = len(tpu.LINEAR_LOSSES)
    for row in (["6.8"], [r"3\.00 / 30\.0"], [r"1\.00 / 30\.0"]):
        assert re.search(" +".join(row * number) + " *$", output.getvalue(), re.MULTILINE)
    assert "the weight's gradient takes 1074 MB, " in output.getvalue()


def test_table_of_bundles():
    counts = {"exp as it is": 2_000_000, "accuracy=HIGHEST": 5_000_000}
    costs = [{"topology": "v5e:2x2", "name": name, "bundles": count} for name, count in counts.items()]
    assert report.bundle_table(costs).rows == [("v5e:2x2", "2.00", "5.00", "2.50")]


def test_table_of_accesses_on_gpus():
    shape = Shape(8192, 1000)
    counts = [
        {"card": card, "name": "plain", "shape": shape, "dtype": dtype, "launches": 7, "moved": moved}
        for card, dtype, moved in (
            ("gpu-a100", "bfloat16", 4.04),
            ("gpu-b200", "bfloat16", 7.04),
            ("gpu-a100", "float32", 4.02),
            ("gpu-b200", "float32", 4.03),
        )
    ]
    table = report.gpu_moves_table(counts)
    assert table.headings == ("loss and gradient", "1000 bf16", "1000 f32")
    assert table.rows == [("plain", "4.0/7.0 in 7", "4.0 in 7")]
    assert "where gpu-a100, gpu-b200 differ" in table.legend


@pytest.mark.parametrize("name", tpu.LINEAR_LOSSES)
def test_losses_of_narrow_arrays_are_wide(name):
    hidden, weight = jax.ShapeDtypeStruct((8, 4), jnp.bfloat16), jax.ShapeDtypeStruct((4, 6), jnp.bfloat16)
    labels, smoothing = jax.ShapeDtypeStruct((8,), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    loss, gradients = jax.eval_shape(
        on_jax.with_gradients(tpu.LINEAR_LOSSES[name], linear=True), hidden, weight, labels, smoothing
    )
    assert loss.dtype == jnp.float32
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.bfloat16]


@pytest.mark.parametrize(("framework", "other"), [("jax", "torch"), ("torch", "jax")])
@pytest.mark.slow
def test_a_framework_is_measured_without_the_other(framework, other):
    code = (
        "import sys, benchmarks.__main__\n"
        "from benchmarks.engines.in_turns import available, engine\n"
        f"engine({framework!r})\n"
        f"[available({framework!r}, form, form) for form in ('dense', 'linear')]\n"
        f"assert {other!r} not in sys.modules"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


def test_trained_logits_have_small_losses():
    logits, labels = on_torch.random_logits(Shape(8, 10), "cpu", trained=True)
    assert F.cross_entropy(logits, labels) < 1e-9


# --- The pages ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_writing_a_page(monkeypatch, tmp_path):
    for page in set(PAGES.values()):
        blocks = [block for block in PAGES if PAGES[block] == page]
        lines = [f"<!-- benchmarks {block}: begin -->\nold\n<!-- benchmarks {block}: end -->" for block in blocks]
        (tmp_path / page).write_text("\n".join(["before", *lines, "after"]), encoding="utf-8")
    monkeypatch.setattr("benchmarks.pages.keep.DOCS", tmp_path)
    assert run("dense", "--quick", "--calls", 1, "--framework", "torch", "--write").exit_code == 0
    page = (tmp_path / PAGES["dense"]).read_text(encoding="utf-8")
    assert page.startswith(
        f"before\n<!-- benchmarks dense: begin -->\n### {report.describe_machine()['cpu']}\n\n"
        "`.venv/bin/python -m benchmarks dense --write`: date "
    )
    assert page.endswith("after")
    assert "| lsce fused |" in page
    assert page.count("old") == 2  # the blocks of other commands
    (record,) = (tmp_path / "figures" / "dense").glob("*.json")
    assert json.loads(record.read_text())["dense"][0]["framework"] == "torch"
    # Figures of another machine stay.
    other = json.loads(record.read_text())
    other["machine"]["cpu"] = "Another CPU"
    record.with_name("another-cpu.json").write_text(json.dumps(other), encoding="utf-8")
    assert run("dense", "--quick", "--calls", 1, "--framework", "torch", "--write").exit_code == 0
    assert (tmp_path / PAGES["dense"]).read_text(encoding="utf-8").count("| lsce fused |") == 2 * page.count(
        "| lsce fused |"
    )
    (tmp_path / PAGES["dense"]).write_text("no comments", encoding="utf-8")
    result = run("dense", "--quick", "--calls", 1, "--framework", "torch", "--write")
    assert "each of these lines once" in str(result.exception)


def records():
    """Return the records in docs/figures: for each command those of all machines."""
    folders = [DOCS / "figures", *sorted((DOCS / "figures").glob("*/"))]
    return [
        [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))] for folder in folders
    ]


def record_blocks():
    """Return the tables of each block."""
    return [
        pytest.param(block, text, id=block)
        for of_command in records()
        for block, text in report.page_blocks(of_command).items()
    ]


def empty_blocks():
    """Return the blocks of devices that have no record yet."""
    return sorted({*device_report.BLOCKS} - {parameters.id for parameters in record_blocks()})


@pytest.mark.parametrize(("block", "tables"), record_blocks())
def test_the_page_has_the_tables_of_the_record(block, tables):
    page = (DOCS / PAGES[block]).read_text(encoding="utf-8")
    assert replace_block(page, f"benchmarks {block}", tables) == page


@pytest.mark.parametrize("block", empty_blocks())
def test_the_page_says_that_there_is_no_record(block):
    page = (DOCS / PAGES[block]).read_text(encoding="utf-8")
    assert replace_block(page, f"benchmarks {block}", device_report.without_record(block)) == page


def test_every_block_has_a_record_or_says_that_it_has_none():
    assert sorted([parameters.id for parameters in record_blocks()] + empty_blocks()) == sorted(PAGES)


def test_readme_has_the_range_of_the_records():
    """The time of the fused loss at 1024 x 32768, relative to the first, over all machines and both allocators."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for figures in (figures for of_command in records() for figures in of_command):
        for table in figures.get("dense", ()):
            if table["shape"] == [1024, 32768]:
                times = {row["name"]: row["median_ms"] for row in table["rows"]}
                key = table["framework"], table.get("allocator", "default")
                ratios.setdefault(key, []).append(times["lsce fused"] / next(iter(times.values())))
    assert {*ratios} == {("torch", "default"), ("torch", "kept"), ("jax", "default")}
    assert all(len(of) > 1 for of in ratios.values())
    default, kept, of_jax = (f"{min(of):.2f} to {max(of):.2f}" for _, of in sorted(ratios.items(), key=_torch_first))
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert f"| {default} ({kept} with kept pages) in torch, {of_jax} in JAX |" in text


def _torch_first(ratio):
    (framework, allocator), _ = ratio
    return framework != "torch", allocator


def test_logit_scale(capsys):
    logit_scale.main(["--quick"])
    output = capsys.readouterr().out
    for framework in ("jax", "torch"):
        assert f"{framework}: loss and gradients" in output
    assert output.count("dense loss, of logits, 32 x 50") == output.count("linear loss, of features, 32 x 50") == 2
