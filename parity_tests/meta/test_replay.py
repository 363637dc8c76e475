"""Replays: stale bundles are refused, wrong results are rejected here and in the bundle, and evidence is kept apart."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lsce_spec import NON_TARGET
from parity_tests.evidence.ledger import Evidence
from parity_tests.losses import registry
from parity_tests.losses.registry import FaultyAdapter, make_adapter
from parity_tests.meta.bundles import GOLDEN, run
from parity_tests.studies import replays
from parity_tests.studies.bundle import Bundle, RecordedAdapter, read_bundle, record, write_bundle
from parity_tests.studies.replays import replay
from parity_tests.studies.sealed_folders import RecordingError
from parity_tests.studies.survey import make_cases
from parity_tests.truth import oracle
from parity_tests.truth.arithmetic import Arithmetic
from parity_tests.truth.cases import Case, make_case
from parity_tests.truth.linear_cases import make_linear_case
from parity_tests.truth.oracle import Exact


def test_a_linear_bundle_is_replayed(linear: Path) -> None:
    bundle = read_bundle(linear)
    ours = make_adapter("torch-linear-chunked")
    assert bundle.adapters[ours.name].arithmetic == ours.arithmetic
    found = replay(bundle, [ours, FaultyAdapter()])
    assert found.agrees, [str(line) for line in found.lines() if not line.agrees]
    assert [line.cases for line in found.lines()] == [len(bundle.cases)] * 5
    wrong = replay(bundle, [FaultyAdapter("linear_weight_of_last_chunk")])
    assert [line.here for line in wrong.lines() if not line.agrees] == ["mutant:linear_weight_of_last_chunk"] * 2


@pytest.mark.parametrize("name", ["somebody", "mutant:nothing"])
def test_an_adapter_that_is_not_known_here_is_an_error(name: str, original: Path) -> None:
    bundle = read_bundle(original)
    bundle.adapters[name] = RecordedAdapter(name, "numpy", "cpu", Arithmetic())
    with pytest.raises(RecordingError, match="adapter that is not known here"):
        replay(bundle, [FaultyAdapter()])


# Stale bundles.


def test_a_case_that_is_made_otherwise_is_stale(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = read_bundle(original)
    for changes in (
        {"logits": lambda case: np.nextafter(case.logits, 0)},
        {"labels": lambda case: case.labels.astype(np.int32)},
        {"options": lambda case: {**case.options, "z_loss": 0.1}},
        {"smoothing": lambda case: 0.25},
    ):
        name = next(iter(changes))

        def other(case: str, dtype: str, changes: Any = changes, name: str = name) -> Case:
            made = make_case(case, dtype)
            values = changes[name](made)
            return replace(made, **{name: np.zeros_like(values) if name == "logits" else values})

        monkeypatch.setattr(replays, "make_any_case", other)
        with pytest.raises(RecordingError, match=f"this checkout makes case 'ties' in bfloat16 with other {name}"):
            replay(bundle, [])
    monkeypatch.setattr(replays, "all_case_names", list)
    assert replay(bundle, []).agrees  # a case of no name that is made here stands for itself


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_a_linear_case_that_is_made_otherwise_is_stale(
    name: str, linear: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(case: str, dtype: str) -> Case:
        made = make_linear_case(case, dtype)
        values = getattr(made, name)
        return made if values is None else replace(made, **{name: np.zeros_like(values)})

    monkeypatch.setattr(replays, "make_any_case", other)
    with pytest.raises(RecordingError, match=f"makes case 'linear_sum' in float16 with other {name}"):
        replay(read_bundle(linear), [])


def test_another_definition_is_stale(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "find_convention", lambda name: NON_TARGET)
    done = run("replay", original, "--adapter", "numpy")
    assert done.exit_code == 2
    assert "stale: the definition now gives another truth for case 'ties' in bfloat16" in done.stderr


def with_loss(bundle: Bundle, change: Callable[[Exact], Exact]) -> Bundle:
    first = bundle.records[0]
    return replace(bundle, records=[replace(first, truth=replace(first.truth, loss=change(first.truth.loss)))])


def test_a_truth_that_is_off_by_one_bit_is_stale(original: Path) -> None:
    """Also with hashes that fit, in the lower of the two numbers that it is kept as, and in what bounds are made of."""
    bundle = read_bundle(original)
    replay(with_loss(bundle, lambda loss: loss), [])
    for change in (
        lambda loss: replace(loss, high=np.nextafter(loss.high, 0)),
        lambda loss: replace(loss, low=np.nextafter(loss.low, 0)),
    ):
        with pytest.raises(RecordingError, match="stale: the definition"):
            replay(with_loss(bundle, change), [])
    first = bundle.records[0]
    truth = replace(first.truth, probabilities=np.nextafter(first.truth.probabilities, 1))
    with pytest.raises(RecordingError, match="stale: the definition"):
        replay(replace(bundle, records=[replace(first, truth=truth)]), [])


def test_a_linear_truth_that_is_off_by_one_bit_is_stale(linear: Path) -> None:
    bundle = read_bundle(linear)
    first = bundle.records[0]
    assert isinstance(first.truth, oracle.LinearTruth)
    weight = replace(first.truth.weight, low=np.nextafter(first.truth.weight.low, 1))
    with pytest.raises(RecordingError, match="stale: the definition"):
        replay(replace(bundle, records=[replace(first, truth=replace(first.truth, weight=weight))]), [])


def test_a_wide_truth_may_differ_by_what_float64_explains() -> None:
    logits = np.random.default_rng(0).integers(-8, 8, (1, oracle.WIDE + 1)) / 4
    bundle = record([], [Case("wide one", "float32", logits, np.array([7]))])
    replay(with_loss(bundle, lambda loss: replace(loss, high=np.nextafter(loss.high, 0))), [])
    with pytest.raises(RecordingError, match="stale: the definition"):
        replay(with_loss(bundle, lambda loss: replace(loss, high=loss.high * (1 + 2**-30))), [])


# Verdicts.


def test_a_wrong_result_that_was_recorded_is_rejected(tmp_path: Path) -> None:
    folder, json_file = tmp_path / "bundle", tmp_path / "replay.json"
    options = ("--adapter", "mutant:other_off", "--adapter", "oracle", "--case", "uniform_*", "--dtype", "float32")
    recorded = run("record", folder, *options)
    assert recorded.exit_code == 1, recorded.output
    assert "recorded mutant:other_off against the truth, uniform_" in recorded.stdout
    assert "oracle against" not in recorded.stdout
    replayed = run("replay", folder, "--adapter", "numpy", "--json", json_file)
    assert replayed.exit_code == 1, replayed.output
    assert "recorded mutant:other_off against the truth, uniform_" in replayed.stdout
    assert "numpy (A) against recorded mutant:other_off (B), " in replayed.stdout
    assert "DISAGREE: 3 recorded cases" in replayed.stdout
    content = json.loads(json_file.read_text())
    assert not content["agrees"]
    evidence = {each["adapter"]: each["kind"] for each in content["evidence"]}
    assert evidence == {"numpy": "executed", "oracle": "replayed"}


def test_a_wrong_adapter_here_is_rejected(original: Path) -> None:
    done = run("replay", original, "--adapter", "mutant:gradient_sign")
    assert done.exit_code == 1
    assert "mutant:gradient_sign against the truth" in done.stdout
    assert "mutant:gradient_sign (A) against recorded oracle (B), " in done.stdout
    found = replay(read_bundle(original), [FaultyAdapter("gradient_sign")])
    # What was recorded agrees with the truth, but not with what ran here.
    assert [line.here for line in found.lines() if not line.agrees] == ["mutant:gradient_sign"] * 3
    assert found.evidence() == []


def test_evidence_is_by_dtype_and_device() -> None:
    bundle = record([FaultyAdapter()], make_cases(["ties"], ["float32", "float16"]))
    recorded = bundle.adapters["numpy"]
    recorded.device = "cuda"
    key = ("ties", "float16")
    recorded.results[key] = replace(recorded.results[key], gradient=-recorded.results[key].gradient)
    detail = f"numpy {np.__version__}"
    assert replay(bundle, [FaultyAdapter()]).evidence() == [
        Evidence("numpy", "cpu", "float32", "executed"),
        Evidence("numpy", "cuda", "float32", "replayed", detail),
        Evidence("numpy", "cpu", "float16", "executed"),
    ]
    # Nothing ran here, so nothing was replayed.
    assert replay(bundle, []).evidence() == []


class Failing(FaultyAdapter):
    """Raises."""

    def __call__(self, case: Case) -> Any:
        """Raise."""
        raise RuntimeError("out of memory")


class Lacking(FaultyAdapter):
    """Lacks what every case needs."""

    def unsupported(self, case: Case) -> str | None:
        """Return what it lacks."""
        return "has no ties"


def test_failures_are_recorded_and_count(tmp_path: Path) -> None:
    write_bundle(tmp_path, record([Failing()], make_cases(["ties"], ["float32"])))
    found = replay(read_bundle(tmp_path), [make_adapter("oracle")])
    wrong = [line for line in found.lines() if not line.agrees]
    expected = "recorded numpy against the truth, ties in float32: LossError: when it was recorded: "
    assert [str(line) for line in wrong] == [expected + "RuntimeError: out of memory"]
    assert wrong[0].share == np.inf


def test_what_was_not_called_is_no_failure_and_no_evidence(
    tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(tmp_path, record([Lacking()], make_cases(["ties"], ["float32"])))
    found = replay(read_bundle(tmp_path), [make_adapter("oracle")])
    assert found.agrees
    assert [line.cases for line in found.lines()] == [1, 0, 0]
    assert [each.adapter for each in found.evidence()] == ["oracle"]
    monkeypatch.setattr(registry, "FaultyAdapter", Lacking)
    done = run("replay", original, "--adapter", "numpy")
    assert done.exit_code == 2
    assert "no recorded case can be asked of numpy" in done.stderr


@pytest.mark.parametrize(("arguments", "message"), [
    (("replay", "nowhere"), "no bundle can be read in nowhere: manifest.json: No such file"),
    (("replay", GOLDEN / "cpu_float64", "--adapter", "nobody"), "there is no adapter 'nobody'"),
    (("replay", GOLDEN / "cpu_float64", "--device", "abacus"), "there is no device 'abacus'"),
    (("replay", GOLDEN / "cpu_float64", "--device", "tpu"), "finds no tpu device on this machine"),
    (("replay", GOLDEN / "cpu_float64", "--adapter", "torch-fused", "--device", "tpu"), "torch finds no tpu device"),
    (("record", "new", "--case", "no such case"), "no case is called no such case"),
    (("record", "new", "--dtype", "float8"), "there is no dtype 'float8'"),
    (("record", "new", "--adapter", "nobody"), "there is no adapter 'nobody'"),
    (("record", "new", "--device", "tpu", "--adapter", "torch-fused"), "torch finds no tpu device"),
])  # fmt: skip
def test_what_cannot_run(
    arguments: tuple[str | Path, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
