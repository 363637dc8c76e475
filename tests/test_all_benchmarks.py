"""`make bench` and `benchmarks compare`: what is compared, measured, written and said. No speed is held."""

import copy
import json
import re
from importlib import metadata
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as main
from benchmarks.engines import (
    calls_jax,
    calls_torch,
    checks,
    device_worker,
    environments,
    everything,
    machine,
    on_jax,
    on_torch,
    sessions,
)
from benchmarks.engines.losses import Loss, losses
from benchmarks.engines.sessions import SESSIONS
from benchmarks.pages import all_report, keep, plots, records, report
from benchmarks.pages.tables import markdown
from parity_tests.losses.adapters import UnavailableError
from parity_tests.truth.cases import make_case

BASELINES = {"torch": "F.cross_entropy", "jax": "Optax one-hot"}
SMOOTHED = calls_torch.cross_entropy("cpu", label_smoothing=0.1)


def run(*arguments):
    return CliRunner().invoke(main.app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})


# --- A record that nobody measured ----------------------------------------------------------------------------------


def row(name, seconds, ours=False, smoothing=0.1, **more):
    times = {"seconds": seconds, "least_seconds": min(seconds), "median_ms": 1e3 * float(np.median(seconds))}
    return {"name": name, "ours": ours, "smoothing": smoothing, **times, **more}


def make_part(stage, rows, kind="dense", dtype="float32", shape=(1024, 32768), **more):
    shape = [] if stage == "check" else list(shape)
    return {"framework": "torch", "stage": stage, "kind": kind, "dtype": dtype, "shape": shape, "rows": rows} | {
        "missing": {},
        **more,
    }


FIRST, SECOND, OURS, PLAIN = "F.cross_entropy", "timm", "lsce", "F.cross_entropy*"
SECONDS = {FIRST: [1.0, 1.1, 1.0], SECOND: [0.4, 0.45, 0.4], OURS: [0.5, 0.55, 0.52], PLAIN: [0.3, 0.31, 0.3]}
MEMORY = {FIRST: 400e6, SECOND: 100e6, OURS: 134e6, PLAIN: 133e6}
ULPS = {FIRST: (3.0, 0.5), SECOND: (1.0, 0.2), OURS: (2.0, 0.4), PLAIN: (2.5, 0.5)}


def make_record(seconds=SECONDS, status=None):
    def rows(of):
        return [
            {"name": name, "ours": name == OURS, "smoothing": 0.0 if name == PLAIN else 0.1, **of(name)}
            for name in seconds
        ]

    def timed(factor=1.0):
        return rows(lambda name: row(name, [factor * each for each in seconds[name]]) | {"ours": name == OURS})

    def checked(name):
        given = (status or {}).get(name, "agrees")
        worst, median = ULPS[name]
        ulps = {"worst_ulps": worst, "median_ulps": median}
        cases = {"wide": {"status": "agrees", "share": 0.5, "reason": "", "worst_ulps": 3.5}}
        return {"status": given, "share": 0.5, "loss_error": 1e-7, "cases": cases, **ulps}

    smoothings = {name: 0.0 if name == PLAIN else 0.1 for name in seconds}
    parts = [
        make_part("check", rows(checked)),
        make_part("check", rows(checked), dtype="bfloat16"),
        make_part("memory", rows(lambda name: {"memory": MEMORY[name]})),
        make_part(
            "time",
            [each | {"alone": row("", [0.5 * one for one in each["seconds"]])} for each in timed()],
            floors={"read": {"seconds": [0.1] * 3}, "read and write": {"seconds": [0.25] * 3}},
        ),
    ]
    for grows, size in ((grows, size) for grows in ("rows", "classes") for size in (16, 1024)):
        shape = (size, 1024) if grows == "rows" else (1024, size)
        floors = {"read": {"seconds": [size * 1e-6]}, "read and write": {"seconds": [size * 1e-6]}}
        parts.append(make_part("time", timed(size / 1024), shape=shape, grows=grows, floors=floors))
    for part in parts:
        for each in part["rows"]:
            each["smoothing"] = smoothings[each["name"]]
    session = {"name": "torch", "framework": "torch", "versions": {"torch": "2.15.0"}, "parts": parts}
    absent = {"Tokamax": "pip cannot install it"}
    imports = [{"module": "torch", "after": "", "seconds": 2.0}]
    record = {"rounds": 3, "quick": False, "sessions": [session], "absent": absent, "imports": imports}
    return {"machine": {"date": "2026-11-27", "cpu": "A CPU", "cores": 2}, "all": record}


# --- Where others are better ----------------------------------------------------------------------------------------


def lost_of(figures):
    return [(each.place, each.name, each.smoothed) for each in records.lost(figures["all"])]


def test_a_ratio_is_that_of_rounds():
    assert records.ratio_of([1.0, 4.0, 3.0], [1.0, 2.0, 2.0]) == (1.5, 1.0, 2.0, 3)


def test_what_is_better_than_ours_is_listed():
    grown = [f"torch, {shape} f32, loss and gradient" for shape in ("16 x 1024", "1024 x 16", *["1024 x 1024"] * 2)]
    places = [*(f"torch, 1024 x 32768 f32, {measure}" for measure in records.MEASURES), *grown]
    times = [(place, SECOND, True) for place in places]
    plain = [(place, PLAIN, False) for place in places]
    others = [(f"torch, dense, {dtype}, worst error of the gradient", SECOND, True) for dtype in ("f32", "bf16")]
    # 1 MB less than ours is what a few pages are.
    memory = [("torch, dense, f32, memory", SECOND, True)]
    assert sorted(lost_of(make_record())) == sorted(times + plain + others + memory)


def test_what_is_faster_in_some_rounds_only_is_not_listed():
    figures = make_record(SECONDS | {SECOND: [0.4, 0.45, 0.53]})
    assert [name for place, name, _ in lost_of(figures) if "loss" in place] == [PLAIN] * 6


def test_what_is_wrong_is_not_listed():
    figures = make_record(status={SECOND: "wrong"})
    assert [name for place, name, _ in lost_of(figures) if "loss" in place] == [PLAIN] * 6


def test_the_fastest_of_ours_counts():
    figures = make_record()
    for part in figures["all"]["sessions"][0]["parts"][3:]:
        alone = {} if "grows" in part else {"alone": row("", [0.1] * 3)}
        part["rows"].append(row("lsce, in place", [1e-3] * 3, ours=True, **alone))
    assert not [place for place, *_ in lost_of(figures) if "loss" in place]


# --- Tables, page and pictures --------------------------------------------------------------------------------------


def test_tables_of_a_terminal():
    tables = {table.title: table for table in all_report.tables(make_record())}
    times = [table for table in all_report.tables(make_record()) if table.title.endswith("float32: time")]
    assert [table.headings[0] for table in times] == ["loss alone", "loss and gradient"]
    alone, both = ({name: cells for name, *cells in table.rows} for table in times)
    assert both[OURS] == ["", "520", "0.50", "48 %", ""]
    assert both["floor: read and write"][1] == "250"
    assert alone["floor: read"][1] == "100"
    assert alone[FIRST][1:4] == ["500", "1.00", "20 %"]
    assert both[FIRST][1:4] == ["1000", "1.00", "25 %"]
    memory = tables["torch: dense, 1024 x 32768, float32: memory"]
    assert {name: cells for name, *cells in memory.rows}[FIRST] == ["400", "2.98"]
    grown = tables["torch: loss and gradient where rows grow, float32: ns for a logit"]
    assert grown.headings == ("loss", "16", "1024")
    assert grown.rows[0] == (FIRST, *["954"] * 2)  # 1 s / 1024 for a row of 1024


def test_losses_that_are_wrong_have_no_ratio():
    figures = make_record(status={SECOND: "wrong"})
    both = [table for table in all_report.tables(figures) if table.title.endswith("float32: time")][1]
    assert {name: cells for name, *cells in both.rows}[SECOND][:3] == ["wrong", "400", "–"]
    page = report.page_blocks([figures])["all"]
    assert re.search(r"^\| timm \| wrong \|$", page, re.MULTILINE)


def test_the_page():
    figures = make_record()
    figures["all"]["sessions"][0]["parts"][3]["missing"] = {"Liger": sessions.NEEDS_GPU, "a": "why"}
    page = report.page_blocks([figures])["all"]
    assert page.startswith("### A CPU\n\n`make bench`: date 2026-11-27, cpu A CPU, cores 2.\n\n![")
    for kind in all_report.PICTURES:
        assert f"](images/bench-a-cpu-{kind}.png)" in page
    assert "**torch: loss and gradient (torch 2.15.0)**" in page
    assert "| F.cross_entropy | 1000 ms (25 %) |" in page
    assert "| lsce | 0.50 (48 %) |" in page
    assert f"| bf16 | f32, {make_case('wide', 'float32').logits.shape[-1]} classes | loss" in page
    assert "| lsce | 134 MB | 2.0, 0.40 | 2.0, 0.40 | 3.50 | 1e-07 | 1e-07 | – | – |" in page
    assert "- torch, 1024 x 32768 f32, loss and gradient: `timm` takes 0.80 (0.77-0.82) of the time of `lsce`" in page
    assert "- torch, dense, f32, memory: `timm` takes 100 MB, `lsce` 134 MB" in page
    assert "- torch, dense, f32, worst error of the gradient: `timm` is off by 1.00 ULP, `lsce` by 2.00" in page
    assert "- Tokamax: pip cannot install it\n- torch: a is not here: why\n" in page
    assert "\n- torch: GPU: needs one, and make bench-cuda: Liger." in page
    assert "| Liger | needs a GPU |" in page
    assert max(len(line) for line in page.splitlines() if not line.startswith(("|", "!["))) <= 120


def test_pictures(tmp_path):
    drawn = plots.draw(make_record(), tmp_path, "a-cpu")
    assert [path.name for path in drawn] == [f"bench-a-cpu-{kind}.png" for kind in all_report.PICTURES]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_records_in_the_docs_have_their_pictures():
    for path in (keep.DOCS / "figures/all").glob("*.json"):
        for kind in all_report.PICTURES:
            assert (keep.DOCS / "images" / all_report.picture_file(path.stem, kind)).is_file()


def test_a_record_is_written_into_the_page(tmp_path, monkeypatch):
    (tmp_path / "benchmarks.md").write_text("<!-- benchmarks all: begin -->\n<!-- benchmarks all: end -->\n")
    (tmp_path / "record.json").write_text(json.dumps(make_record()))
    monkeypatch.setattr(keep, "DOCS", tmp_path)
    result = run("all", "--from", tmp_path / "record.json", "--write")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "figures/all/a-cpu.json").read_text()) == make_record()
    assert "#### Where it loses" in (tmp_path / "benchmarks.md").read_text()
    assert len(list((tmp_path / "images").glob("bench-a-cpu-*.png"))) == 3


def test_some_sessions_are_measured_again(tmp_path, monkeypatch):
    old, newer = make_record(), make_record(SECONDS | {OURS: [0.25] * 3})
    kept = {**old["all"]["sessions"][0], "name": "JAX"}
    old["all"]["sessions"].append(kept)
    newer["machine"] |= {"date": "2026-11-28", "commit": "abc"}
    (tmp_path / "old.json").write_text(json.dumps(old), encoding="utf-8")
    monkeypatch.setattr(main, "_measured", lambda *_: newer)
    monkeypatch.setattr(report, "describe_machine", lambda: {"cpu": "A CPU"})
    arguments = ("all", "--from", tmp_path / "old.json", "--session", "torch", "--json", tmp_path / "new.json")
    assert run(*arguments).exit_code == 0
    figures = json.loads((tmp_path / "new.json").read_text(encoding="utf-8"))
    assert run("all", "--from", tmp_path / "old.json", "--only", "lsce").exit_code == 2  # nothing would be measured
    measured = {"measured": "measured on 2026-11-28, commit abc"}
    assert figures["all"]["sessions"] == [newer["all"]["sessions"][0] | measured, kept]
    assert {**figures, "all": None} == {**old, "all": None}
    page = report.page_blocks([figures])["all"]
    assert "**torch: loss and gradient (torch 2.15.0; measured on 2026-11-28, commit abc)**" in page
    assert "**JAX: loss and gradient (torch 2.15.0)**" in page
    monkeypatch.setattr(report, "describe_machine", lambda: {"cpu": "Another"})
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert "is a record of A CPU, and this is Another." in " ".join(refused.stderr.replace("│", " ").split())


# --- Two records ----------------------------------------------------------------------------------------------------


def compared(tmp_path, old, new, *options):
    for name, figures in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(figures), encoding="utf-8")
    return run("compare", tmp_path / "old.json", tmp_path / "new.json", *options)


def with_ours(*factors):
    """Return a record in which each round of ours takes so many times as long."""
    return make_record(SECONDS | {OURS: [f * s for f, s in zip(factors, SECONDS[OURS], strict=True)]})


@pytest.mark.parametrize(
    ("factors", "options", "code"),
    [
        ((1, 1, 1), (), 0),
        ((1.3, 1.2, 1.25), (), 1),
        ((1.3, 1.0, 1.25), (), 0),  # one round is as fast as before
        ((1.04, 1.1, 1.04), (), 0),  # within the noise of the old record
        ((1.06, 1.07, 1.06), ("--tolerance", 0.1), 0),
        ((1.06, 1.07, 1.06), ("--tolerance", 0.01), 1),
        ((0.5, 0.5, 0.5), (), 0),
    ],
)
def test_growth_beyond_noise(factors, options, code, tmp_path):
    result = compared(tmp_path, make_record(), with_ours(*factors), *options)
    assert result.exit_code == code, result.output
    assert ("Slower than before" in result.stdout) == (code == 1)
    assert ("Faster than before" in result.stdout) == (factors == (0.5, 0.5, 0.5))
    assert re.search(r"^5 ratios: ", result.stdout, re.MULTILINE)


def test_a_slower_machine_changes_nothing(tmp_path):
    slower = make_record({name: [3 * each for each in seconds] for name, seconds in SECONDS.items()})
    slower["machine"]["cpu"] = "Another"
    result = compared(tmp_path, make_record(), slower)
    assert result.exit_code == 0
    assert "Two machines: A CPU and Another." in result.stdout


def without_rounds(figures):
    return make_record({name: seconds[:2] for name, seconds in SECONDS.items()})


def without_ours(figures):
    for part in figures["all"]["sessions"][0]["parts"]:
        part["rows"] = [each for each in part["rows"] if not each["ours"]]
    return figures


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_rounds, "2 rounds do not tell noise from a change: measure with --rounds 3 or more"),
        (without_ours, "the two records have no loss at the same size in common"),
        (lambda _: {"machine": {"cpu": "A CPU"}}, "holds no record of python -m benchmarks all: all is missing"),
        (lambda _: [], "holds no record of python -m benchmarks all: it must be an object, got a list"),
    ],
)
def test_records_that_cannot_be_compared(change, message, tmp_path):
    result = compared(tmp_path, make_record(), change(make_record()))
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")


# --- The machine ----------------------------------------------------------------------------------------------------


# Linux counts the memory of a process in steps of up to 64 pages for each thread; allocators keep a few MB.
STEP, KEPT = 2**20, 2**22


def test_peak_memory_is_that_of_the_process():
    size = 2**26
    found = machine.peak_of(lambda: np.ones(size, np.uint8))
    assert size - STEP <= found <= size + KEPT
    assert machine.peak_of(lambda: None) <= KEPT


def test_floors_read_and_write_all():
    found = machine.floors(2**20)
    assert list(found) == ["read", "read and write"]
    for case in found.values():
        case.run(*case.arguments())
        assert case.is_floor


def test_floors_of_many_bytes_are_scaled(monkeypatch):
    monkeypatch.setattr(machine, "LARGEST", 2**20)
    monkeypatch.setattr(machine, "host_clock", lambda call: (call(), 2.0))
    case = machine.floors(2**22)["read"]
    assert case.clock(case.run)[1] == 8.0


@pytest.mark.parametrize(("need", "fits"), [(None, True), (3.0, True), (3.1, False)])
def test_what_does_not_fit_is_left_out(need, fits, monkeypatch):
    part = {"shape": [1024, 2**18], "dtype": "bfloat16"}  # half a GiB
    monkeypatch.setattr(machine, "free_memory", lambda: int(2.51 * 2**30))
    if fits:
        machine.check_fits(need, part)
    else:
        with pytest.raises(machine.DoesNotFitError, match=r"needs about 1\.7 GB beyond the logits, and 2\.7 GB are"):
            machine.check_fits(need, part)


# --- Sessions and losses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_the_first_loss_and_ours_are_in_every_session(session):
    for kind in session.kinds:
        found = losses(session.framework, kind, session.name)
        names = [loss.name for loss in found]
        assert names[0] == BASELINES[session.framework]
        assert len(names) == len({*names})
        assert {loss.ours for loss in found} == {True, False}
        # Besides the first, each session has what it is there for.
        assert any(not loss.ours for loss in found[1:])


def test_sessions_are_selected_by_name():
    assert [session.name for session in everything.selected(["Keras*"])] == ["Keras on torch", "Keras on JAX"]
    assert len(everything.selected([])) == len(SESSIONS)
    with pytest.raises(ValueError, match=r"there is no session 'keras'; the sessions are torch, JAX, "):
        everything.selected(["keras"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["clamped one-hot module", "lsce, clamp", "timm"])
def test_losses_of_torch_are_right(name, dtype):
    (loss,) = (each for each in losses("torch", "dense", "torch", dtype=dtype) if each.name == name)
    adapter = on_torch.adapter(loss, loss.make(), "cpu", linear=False)
    cases = list(checks.make_cases(False, dtype, loss.smoothing, True, loss.options))
    statuses = {verdict.status for verdict in checks.check(adapter, cases).values()}
    assert statuses == ({checks.AGREES} if dtype == "float32" or loss.ours else {checks.ROUNDED})
    if loss.options and dtype == "float32":  # another convention is seen, which the rounding of bfloat16 may hide
        wrong = checks.check(adapter, list(checks.make_cases(False, dtype, loss.smoothing, True)))
        assert checks.WRONG in {verdict.status for verdict in wrong.values()}


@pytest.mark.parametrize("name", ["T5X, MaxText formula, z-loss", "lsce, z-loss"])
def test_losses_of_jax_are_right(name):
    (loss,) = (each for each in losses("jax", "dense", "JAX") if each.name == name)
    adapter = on_jax.adapter(loss, loss.make(), "cpu", linear=False)
    case = next(checks.make_cases(False, "float32", loss.smoothing, True, loss.options))
    with on_jax.settings():
        assert checks.check(adapter, [case])[case.name].status == checks.AGREES
        wrong = next(checks.make_cases(False, "float32", loss.smoothing, True, {"convention": "non_target"}))
        assert checks.check(adapter, [wrong])[wrong.name].status == checks.WRONG  # without the z-loss


def test_the_accuracy_of_a_loss():
    loss = Loss("loss", lambda: None)
    # 2^-10 of a number is 2^13 to 2^14 of its ULPs; p and q do not cancel in most entries.
    for factor, least, most in ((1.0, 0.0, 2.0**10), (1 + 2.0**-10, 2.0**12, 2.0**15)):
        function = lambda logits, labels, factor=factor: factor * SMOOTHED(logits, labels)  # noqa: E731
        adapter = on_torch.adapter(loss, function, "cpu", linear=False)
        verdict = checks.check(adapter, list(checks.make_cases(False, "float32", 0.1, True)))["uniform_mean"]
        found = device_worker._accuracy([verdict])
        assert least < found["median_ulps"] < found["worst_ulps"] < most
        assert found["loss_error"] == pytest.approx(factor - 1, abs=1e-6)


def test_keras_says_which_backend_it_needs(monkeypatch):
    keras = SimpleNamespace(backend=SimpleNamespace(backend=lambda: "tensorflow"))
    for calls in (calls_torch, calls_jax):
        monkeypatch.setattr(calls, "load", lambda *_: keras)
        with pytest.raises(UnavailableError, match=r"KERAS_BACKEND must be (torch|jax) when it is imported"):
            calls.keras("cpu")


def test_a_torch_without_the_linear_loss_is_named(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    (loss,) = (each for each in losses("torch", "linear", "torch") if each.name == "F.linear_cross_entropy")
    with pytest.raises(UnavailableError, match=r"torch \S+ has none; torch 2\.13 brought it"):
        loss.make()


# --- The worker -----------------------------------------------------------------------------------------------------


def work(monkeypatch, part, found):
    monkeypatch.setattr(device_worker, "losses", lambda *_: found)
    said = []
    task = device_worker.Task("torch", "cpu", [part], ["*"], {}, 2, 1, 1, True, session="torch")
    device_worker._Worker(task, said.append).run()
    return said[-1]


PART = {"number": 0, "framework": "torch", "kind": "dense", "dtype": "float32", "shape": [16, 32]}


def test_time_alone_and_floors(monkeypatch):
    part = PART | {"stage": "time", "alone": True, "with_floors": True, "schedule": [3, 2], "needs": {"first": 1.0}}
    calls = []

    def loss(logits, labels):
        calls.append(torch.is_grad_enabled())
        return SMOOTHED(logits, labels)

    found = work(monkeypatch, part, [Loss("first", lambda: loss), Loss("compiled", lambda: 1 / 0, compiled=True)])
    (first,) = found["rows"]  # a quick run leaves out what is compiled
    assert len(first["seconds"]) == len(first["alone"]["seconds"]) == 3
    assert first["timed"]["status"] == "agrees"
    assert "memory" not in first
    assert set(found["floors"]) == {"read", "read and write"}
    assert calls.count(True) == calls.count(False) == 1 + 3 * (1 + 2)


def test_what_does_not_fit_is_not_run(monkeypatch):
    part = PART | {"stage": "time", "needs": {"large": 1e9}, "schedule": [1, 1]}
    large, small = work(monkeypatch, part, [Loss("large", lambda: None), Loss("small", lambda: SMOOTHED)])["rows"]
    assert re.fullmatch(r"needs about 2048\.0 GB beyond the logits, and \S+ GB are free", large["failed"])
    assert small["seconds"]


def test_memory_of_a_loss(monkeypatch):
    def loss(logits, labels):
        return SMOOTHED(logits, labels) + 0 * torch.ones(2**24).sum()

    (found,) = work(monkeypatch, PART | {"stage": "memory"}, [Loss("large", lambda: loss)])["rows"]
    assert 2**26 - STEP <= found["memory"] <= 2**26 + 2 * KEPT


# --- Environments ---------------------------------------------------------------------------------------------------


def test_a_quick_run_installs_nothing(tmp_path):
    with pytest.raises(environments.InstallError, match=r"^nothing>=1 has no environment yet: leave --quick out"):
        environments.python_of("a", ["nothing>=1"], False, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_an_environment_is_made_once_and_finds_what_is_here(tmp_path):
    python = environments.python_of("a", ["numpy"], True, tmp_path)  # which is here already
    found = environments.versions_in(python, ["numpy", "no-such-thing"])
    assert found == {"numpy": np.__version__}
    made = (tmp_path / "a/pyvenv.cfg").stat().st_mtime_ns
    assert environments.python_of("a", ["numpy"], False, tmp_path) == python
    assert (tmp_path / "a/pyvenv.cfg").stat().st_mtime_ns == made
    with pytest.raises(environments.InstallError, match="ERROR"):
        environments.python_of("a", ["./no-such-folder"], True, tmp_path)


# --- The whole program ----------------------------------------------------------------------------------------------


def test_modules_that_cannot_be_imported_are_named(monkeypatch):
    monkeypatch.setattr(everything, "IMPORTS", (("no_such_module", ""), ("json", "")))
    missing, known = everything.import_times(quick=True)
    assert missing["failed"] == "ModuleNotFoundError: No module named 'no_such_module'"
    assert known["seconds"] > 0
    table = all_report.import_table({"imports": [missing, known]})
    assert table.rows[0] == ("no_such_module", "–", "–")


@pytest.mark.slow
@pytest.mark.parametrize("session", ["torch", "Keras on JAX"])
def test_a_quick_run(session, tmp_path):
    path = tmp_path / "figures.json"
    result = run("all", "--quick", "--rounds", 3, "--session", session, "--json", path)
    assert result.exit_code == 0, result.output
    output = result.stdout.replace(f"wrote {path}", "")
    assert max(map(len, output.splitlines())) <= 80
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert main._read_record(path) == figures
    (found,) = figures["all"]["sessions"]
    chosen = next(each for each in SESSIONS if each.name == session)
    assert found["versions"].keys() == {*chosen.libraries}
    for part in found["parts"]:
        of_session = losses(chosen.framework, part["kind"], session, dtype=part["dtype"])
        names = [loss.name for loss in of_session if not loss.compiled]
        if part["stage"] != "memory":
            assert [each["name"] for each in part["rows"]] == [name for name in names if name not in part["missing"]]
        for each in part["rows"]:
            assert "failed" not in each, each
            if part["stage"] == "time":
                assert len(each["seconds"]) == 3
                assert ("alone" in each) == (part["kind"] == "dense")
    assert {part["stage"] for part in found["parts"]} == {"check", "memory", "time"}
    assert compared(tmp_path, figures, copy.deepcopy(figures)).exit_code == 0
    report_of_page = [markdown(part) for part in all_report.page_parts(figures, "a") if not isinstance(part, str)]
    assert any("| lsce |" in text for text in report_of_page)


def test_numbers_of_jax_are_those_of_its_compiler():
    loss = Loss("loss", lambda: None)
    arguments = (jnp.ones((8, 4), jnp.float32), jnp.zeros(8, jnp.int32), jnp.float32(0.1))
    function = losses("jax", "dense", "JAX")[0].make()
    with on_jax.settings():
        facts = on_jax.program(loss, function, arguments, "cpu", False).facts()
    assert facts["compile_s"] > 0
    assert facts["moved"] >= 2 * 8 * 4 * 4  # reads the logits, writes the gradient
    assert facts["memory"] >= 0


def test_every_size_is_a_multiple_of_the_rows_that_repeat():
    for session in SESSIONS:
        for part in sessions.time_parts(session, False, 5):
            assert part["kind"] == "linear" or part["shape"][0] % checks.REPEATED == 0
            assert part["schedule"][0] >= records.LEAST_ROUNDS


def test_needs_are_those_of_a_dtype(monkeypatch):
    """A loss that computes in float32 takes twice as many multiples of bfloat16 logits."""
    session = next(each for each in SESSIONS if each.name == sessions.KERAS_TORCH)
    memory = {"float32": 3 * 10**8, "bfloat16": 2 * 10**8}

    def found(framework, device, parts, *given, **options):
        for part in parts:
            rows = [row("lsce", [1.0] * 3, ours=True, memory=memory[part["dtype"]])]
            yield {**part, "rows": rows, "missing": {}}

    monkeypatch.setattr(everything.device, "measure", found)
    parts = [each for each in everything.measure(session, ["*"], 5, quick=False) if each.get("stage") == "time"]
    logits = 1024 * 32768
    for part in parts:
        size = {"float32": 4, "bfloat16": 2}[part["dtype"]] * logits
        assert part["needs"] == {"lsce": memory[part["dtype"]] / size}
    assert {part["dtype"] for part in parts} == memory.keys()


def test_a_session_that_does_not_start_is_absent(monkeypatch):
    monkeypatch.setattr(everything.device, "measure", lambda *_, **__: iter([{"absent": "why"}]))
    session = next(each for each in SESSIONS if each.name == "torch")
    versions, absent = everything.measure(session, ["*"], 5, quick=True)
    assert versions["versions"]["torch"] == metadata.version("torch")
    assert absent == {"absent": "why"}
