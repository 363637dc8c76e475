"""`run`, `adapters` and `power` on the command line."""

import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import lsce_torch
from parity_tests.commands import common
from parity_tests.faults.dense import evaluate
from parity_tests.losses import registry
from parity_tests.losses.adapters import Adapter, TorchAdapter, UnavailableError
from parity_tests.losses.registry import ENTRIES, Entry, FaultyAdapter
from parity_tests.meta.running import invoke
from parity_tests.studies.survey import Member, survey
from parity_tests.studies.verdicts import Outcome, examine
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.cases import Case, make_case
from parity_tests.truth.comparison import AnyResult, Result, against_each_other
from parity_tests.truth.linear_cases import default_case_names
from parity_tests.truth.oracle import solve
from parity_tests.truth.precision import DTYPES


def test_ours_agree() -> None:
    outcome = invoke(
        "run", "--adapter", "*-fused", "--case", "uniform_mean", "--case", "class_mask*", "--dtype", "float32"
    )
    assert outcome.exit_code == 0, outcome.output
    assert "AGREE: 2 adapters, 18 results, 9 of them in pairs, at most 0." in outcome.output


def test_a_mutant_does_not() -> None:
    arguments = ("run", "--adapter", "oracle", "--adapter", "mutant:stale_lse", "--case", "uniform_*")
    outcome = invoke(*arguments, "--dtype", "float32")
    assert outcome.exit_code == 1, outcome.output
    assert "mutant:stale_lse in uniform_none float32: " in outcome.output
    assert "its inputs: shape of the logits: [7, 11]; " in outcome.output
    assert "DISAGREE: 3 results and 0 pairs of them (2 adapters, 6 results" in outcome.output


def test_linear_adapters_are_held_against_each_other(tmp_path: Path) -> None:
    file, page = tmp_path / "run.json", tmp_path / "page"
    arguments = ("--adapter", "*-linear-chunked", "--adapter", "mutant:linear_strided_rows", "--adapter", "torch-fused")
    outcome = invoke(
        "run", *arguments, "--case", "linear_sum", "--dtype", "bfloat16", "--json", str(file), "--report", str(page)
    )
    assert outcome.exit_code == 1, outcome.output
    assert "mutant:linear_strided_rows in linear_sum bfloat16: " in outcome.output
    assert "DISAGREE: 1 result and 0 pairs of them (3 adapters, 3 results, 1 of them in pairs)" in outcome.output
    content = json.loads(file.read_text())["survey"]
    statuses = {each["adapter"]: each["status"] for each in content["outcomes"]}
    assert statuses["torch-fused"] == "unsupported"
    assert set(content["differences"][0]["shares"]) == {"loss", "hidden", "weight", "bias"}
    assert "bias 0." in (page / "index.html").read_text()


def test_the_frameworks_own_loss_is_shown_beside() -> None:
    outcome = invoke("run", "--adapter", "torch-fused", "--adapter", "torch-cross-entropy", "--case", "dominant")
    assert outcome.exit_code == 0, outcome.output
    assert "torch-fused is as close to the truth as torch-cross-entropy, or closer, in 4 of 4" in outcome.output


@pytest.mark.parametrize(("arguments", "message"), [
    (["--adapter", "jax-fusd"], "there is no adapter 'jax-fusd'"),
    (["--case", "nothing*"], "no case is called nothing*; the cases are classes_1, "),
    (["--dtype", "int8"], "there is no dtype 'int8'"),
    (["--adapter", "torch-fused", "--device", "tpu"], "torch-fused: torch finds no tpu device"),
    (["--adapter", "torch-sharded:5"], "torch-sharded:N takes an N from 1 to 4, got '5'"),
    (["--adapter", "jax-linear-sharded:"], "jax-linear-sharded:N takes an N from 1 to 8, got ''"),
    (["--adapter", "jax-sharded", "--device", "cuda"], "divides the classes over virtual devices on the CPU"),
    (["--adapter", "torch-sharded", "--device-model", "tpu-v5e"], "or runs in a process of its own"),
    (["--adapter", "torch-cross-entropy", "--case", "where"], "no adapter can handle these cases"),
])  # fmt: skip
def test_what_cannot_run(arguments: list[str], message: str) -> None:
    outcome = invoke("run", *arguments)
    assert outcome.exit_code == 2, outcome.output
    assert message in outcome.output


def test_by_default_what_is_slow_stays_away_and_peers_are_called_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {
        name: Entry(name, "numpy", kind, lambda device, name=name: Named(name))
        for name, kind in (("jax-fused", "ours"), ("jax-fused-eager", "ours"), ("torch-keras", "peer"))
    }
    monkeypatch.setattr("parity_tests.commands.run.ENTRIES", made)
    monkeypatch.setattr(registry, "ENTRIES", made)
    file = tmp_path / "run.json"

    def called(*arguments: str, case: tuple[str, ...] = ("--case", "ties")) -> set[tuple[str, str]]:
        outcome = invoke("run", *case, "--json", str(file), *arguments)
        assert outcome.exit_code == 0, outcome.output
        outcomes = json.loads(file.read_text())["survey"]["outcomes"]
        shown = {(each["adapter"], each["dtype"]) for each in outcomes if each["status"] != "unsupported"}
        assert shown == set(Named.calls)
        Named.calls.clear()
        return shown

    ours = {("jax-fused", dtype) for dtype in DTYPES}
    assert called() == ours | {("torch-keras", "float32")}
    monkeypatch.setattr("parity_tests.commands.common.default_case_names", lambda: ["ties"])
    assert called(case=()) == {("jax-fused", "float32"), ("jax-fused", "bfloat16"), ("torch-keras", "float32")}
    assert called("--dtype", "float16") == {("jax-fused", "float16"), ("torch-keras", "float16")}
    assert called("--adapter", "torch-keras") == {("torch-keras", dtype) for dtype in DTYPES}
    assert called("--adapter", "*-eager") == {("jax-fused-eager", dtype) for dtype in DTYPES}


class Named(FaultyAdapter):
    """The sound loss under another name, which notes its calls."""

    calls: ClassVar[list[tuple[str, str]]] = []
    concurrent = True

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __call__(self, case: Case) -> AnyResult:
        self.calls.append((self.name, case.dtype))
        return super().__call__(case)


def test_lines_of_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "SECONDS_OF_LINE", 0.05)
    monkeypatch.setattr(FaultyAdapter, "__call__", lambda adapter, case: time.sleep(0.2) or evaluate(case))
    outcome = invoke("run", "--adapter", "numpy", "--case", "ties", "--case", "dominant", "--dtype", "float32")
    assert outcome.exit_code == 0, outcome.output
    assert "cases 0 of 2, 00:00 elapsed\n" in outcome.stderr
    assert "cases 1 of 2, 00:00 elapsed\n" in outcome.stderr
    assert "elapsed" not in outcome.stdout
    for thread in threading.enumerate():
        if thread.name == "progress":
            thread.join(5)
            assert not thread.is_alive()


def test_what_is_quick_shows_no_progress() -> None:
    outcome = invoke("run", "--adapter", "numpy", "--case", "ties")
    assert "elapsed" not in outcome.output


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes Rich take any stream for a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(common, "SECONDS_OF_LINE", 0.01)
    for _ in common.track(range(2), 2, "cases"):
        time.sleep(0.2)
    shown = capsys.readouterr().err
    assert "━" in shown
    assert "1/2" in shown
    assert "elapsed" not in shown


def test_json_and_report(tmp_path: Path) -> None:
    file, page = tmp_path / "run.json", tmp_path / "page"
    arguments = ("--adapter", "numpy", "--case", "minus_infinity", "--case", "bad_labels", "--dtype", "float32")
    outcome = invoke("run", *arguments, "--json", str(file), "--report", str(page))
    assert outcome.exit_code == 0, outcome.output
    content = json.loads(file.read_text())
    assert [each["status"] for each in content["survey"]["outcomes"]] == ["agree", "agree"]
    assert "AGREE" in (page / "index.html").read_text()


class Broken:
    """An adapter that misbehaves in the way that it is told."""

    framework, device = "numpy", "cpu"

    def __init__(self, how: str) -> None:
        self.how, self.name, self.arithmetic = how, f"broken:{how}", FaultyAdapter().arithmetic

    def unsupported(self, case: object) -> str | None:
        return None

    def __call__(self, case: object) -> Result:
        sound = evaluate(make_case("uniform_mean", "float32"))
        if self.how == "raises":
            raise ValueError("first line\nsecond line")
        if self.how == "silent":
            raise KeyError
        if self.how == "nan":
            return Result(sound.loss * float("nan"), sound.gradient, "float32", "float32")
        if self.how == "shape":
            return Result(sound.loss, sound.gradient[:, :-1], "float32", "float32")
        return Result(sound.loss, sound.gradient, "bfloat16", "float32")


@pytest.mark.parametrize(("how", "status", "reason"), [
    ("raises", "failed", "ValueError: first line"),
    ("silent", "failed", "KeyError: no message"),
    ("nan", "disagree", None),
    ("shape", "disagree", "loss of shape [], gradient [7, 10]; expected [], [7, 11]"),
    ("dtype", "disagree", "loss in bfloat16, gradient in float32; expected float32, float32"),
])  # fmt: skip
def test_a_broken_adapter_does_not_end_the_run(how: str, status: str, reason: str | None) -> None:
    found = survey(_members(Broken(how), FaultyAdapter()), [make_case("uniform_mean", "float32")])
    broken, sound = found.outcomes
    assert (broken.status, broken.reason) == (status, reason)
    assert sound.status == "agree"
    assert not found.agrees
    assert [each.adapter for each in found.evidence()] == ["numpy"]


def test_neither_of_two_shapes_is_expected() -> None:
    case = make_case("uniform_mean", "float32")
    results = evaluate(case), Broken("shape")(case)
    comparison = against_each_other(case, solve(case), results, (Arithmetic(), Arithmetic()))
    assert comparison.problem == "loss of shape [], gradient [7, 11]; the other has [], [7, 10]"


def _members(*adapters: Adapter) -> dict[str, Member]:
    """Return two adapters as twins, or one alone."""
    names = [adapter.name for adapter in adapters]
    return {name: Member(each, True, twin) for name, each, twin in zip(names, adapters, names[::-1], strict=True)}


def test_blame() -> None:
    """Of two that differ, the one outside of the truth's bounds is named."""
    found = survey(_members(FaultyAdapter(), FaultyAdapter("other_off")), [make_case("uniform_mean", "float32")])
    assert [each.blame for each in found.differences] == [("mutant:other_off",)]
    both = _members(FaultyAdapter("stale_lse"), FaultyAdapter("other_off"))
    (difference,) = survey(both, [make_case("uniform_mean", "float32")]).differences
    assert set(difference.blame or ()) == {"mutant:stale_lse", "mutant:other_off"}
    assert not difference.agrees


def squeezing(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Drop dimensions of size 1, as `squeeze()` does that was written for [N, 1]."""
    return lsce_torch.label_smoothed_cross_entropy(logits.squeeze(), labels.squeeze(), **options)


def of_one_block(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Leave out the rows after the 32nd."""
    where = torch.arange(len(labels)) < 32
    return lsce_torch.label_smoothed_cross_entropy(logits, labels, where=where, **options)


@pytest.mark.parametrize(("loss", "wrong"), [(squeezing, {"classes_1", "classes_31"}), (of_one_block, {"classes_8"})])
def test_losses_that_are_right_for_some_numbers_of_rows(loss: Callable[..., Tensor], wrong: set[str]) -> None:
    adapter = TorchAdapter()
    adapter.take(loss)
    names = [name for name in default_case_names() if name == "one_row" or name.startswith("classes_")]
    cases = [make_case(name, "float32") for name in names]
    found = {case.name for case in cases if examine(adapter, case, solve(case)).status != "agree"}
    assert found == wrong
    assert {len(case.rows().labels) for case in cases} == {1, 2, 5, 64}


def test_nothing_called_is_no_agreement() -> None:
    assert not survey({}, []).agrees


def test_worst_element_is_where_the_error_was_put() -> None:
    case = make_case("classes_9", "float32")
    truth, sound = solve(case), evaluate(case)
    gradient = sound.gradient.copy()
    gradient[3, 5] *= 1 + 1e-4

    class Off(Broken):
        def __call__(self, case: object) -> Result:
            return Result(sound.loss, gradient, "float32", "float32")

    found = survey(_members(Off("off")), [case])
    (outcome,) = found.outcomes
    assert isinstance(outcome, Outcome)
    assert outcome.comparison is not None
    worst = outcome.comparison.worst
    assert worst is not None
    assert (worst.part, worst.index) == ("gradient", (3, 5))
    assert worst.value == gradient[3, 5]
    assert worst.true == truth.gradient.high[3, 5]
    assert worst.other is None
    assert worst.share > 1


def test_adapters_are_listed_with_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(device: str) -> FaultyAdapter:
        raise UnavailableError("somelib is not installed. Run: pip install somelib")

    monkeypatch.setattr(registry, "ENTRIES", ENTRIES)
    monkeypatch.setitem(ENTRIES, "jax-somelib", Entry("jax-somelib", "jax", "peer", missing))
    outcome = invoke("adapters")
    assert outcome.exit_code == 0
    assert re.search(
        r"^jax-somelib .* no, reason (\d+) *$(?s:.*)^reason \1: somelib is not installed", outcome.output, re.M
    )
    outcome = invoke("run", "--adapter", "jax-some*", "--adapter", "oracle", "--case", "one_row", "--dtype", "float32")
    assert outcome.exit_code == 0
    assert "not here: jax-somelib (somelib is not installed." in outcome.output
    outcome = invoke("run", "--adapter", "jax-somelib", "--case", "one_row")
    assert outcome.exit_code == 2


@pytest.mark.slow
def test_power_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "power.json"
    outcome = invoke(
        "power", "--fault", "stale_lse", "--fault", "bfloat16_l*", "--dtype", "float32", "--json", str(file)
    )
    assert outcome.exit_code == 0, outcome.output
    assert "ALL REJECTED: 3 faults at float32, and in trainings" in outcome.output
    assert {each["fault"] for each in json.loads(file.read_text())["trials"]} == {
        "stale_lse",
        "bfloat16_loss",
        "bfloat16_logits",
    }
    monkeypatch.setattr("parity_tests.studies.power.EXCUSED", {})
    outcome = invoke("power", "--fault", "zero_gradient", "--dtype", "float32")
    assert outcome.exit_code == 1
    assert "zero_gradient survives oracle at float32: accepted in at_optimum" in outcome.output
    assert "1 SURVIVE: 1 fault at float32" in outcome.output
    assert invoke("power", "--fault", "nothing").exit_code == 2
