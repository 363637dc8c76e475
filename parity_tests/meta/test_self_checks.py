"""The checks without an oracle pass our losses, reject the mutants, and need nothing but one framework and NumPy."""

import importlib
import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lsce_jax
import lsce_torch
from parity_tests import self_checks
from parity_tests.faults.dense import FAULTS
from parity_tests.faults.sharded import SHARDED_FAULTS
from parity_tests.meta.running import invoke, run_code
from parity_tests.self_checks import (
    CHECKS,
    SMOOTHING,
    CheckOutcome,
    Evaluation,
    Rows,
    Subject,
    agreement,
    main,
    make_rows,
    make_subject,
    run,
    run_checks,
    share,
    torch_evaluate,
    upstream,
)
from parity_tests.studies.self_check_power import check_fault, evaluate_fault, faults_caught
from parity_tests.truth.precision import DTYPES, FORMATS, round_to

LOSSES = {"jax": lsce_jax.label_smoothed_cross_entropy, "torch": lsce_torch.label_smoothed_cross_entropy}

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_framework = pytest.mark.parametrize("framework", LOSSES)


@cache
def subject(framework: str) -> Subject:
    return make_subject(framework, LOSSES[framework], "cpu", compile_it=False)


def with_verdict(outcomes: list[CheckOutcome], verdict: str) -> set[str]:
    return {outcome.check for outcome in outcomes if outcome.verdict == verdict}


@each_dtype
@each_framework
@pytest.mark.slow
def test_ours_passes(framework: str, dtype: str) -> None:
    outcomes = run_checks(subject(framework), dtype)
    print("\n".join(self_checks.table(outcomes)))
    left_out = {"upcast"} if dtype in {"float64", "float32"} else set()
    left_out |= {"compiled"} if framework == "torch" else set()
    assert with_verdict(outcomes, "not applicable") == left_out
    assert with_verdict(outcomes, "agree") == set(CHECKS) - left_out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@each_framework
def test_ours_upcasts_to_the_bit_on_cpus(framework: str, dtype: str) -> None:
    """More than `upcast` asks of a device: equal losses, and gradients that are equal once they are rounded."""
    for rows in make_rows(dtype):
        narrow, wide = (run(subject(framework).evaluate, rows, SMOOTHING, each) for each in (dtype, "float32"))
        factors = upstream(narrow.loss.shape)[:, None]
        np.testing.assert_array_equal(narrow.loss, wide.loss)
        np.testing.assert_array_equal(narrow.gradient * factors, self_checks.round_to(wide.gradient * factors, dtype))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compiled() -> None:
    compiled = torch_evaluate(lsce_torch.label_smoothed_cross_entropy, "cpu", compile_it=True)
    both = Subject(subject("torch").evaluate, other=compiled)
    assert CHECKS["compiled"](both, make_rows("float32")[1], "float32") <= 1


# What each check is for. It may reject more.
MEANT_FOR = {
    "row_sum": {"zero_non_target_gradient", "padding_joins", "last_block_dropped", "stale_lse"},
    "shift": {"maximum_kept", "padding_joins"},
    "permutation": {"last_block_dropped", "pad_class_left_out", "local_mean", "sharded_own_smoothing"},
    "linear_uniform": {"unsmoothed_loss", "bfloat16_loss", "entropy_subtracted"},
    "linear_non_target": {"unsmoothed_loss", "bfloat16_loss", "entropy_subtracted"},
    "label_forgotten": {"other_off", "unsmoothed_gradient", "local_classes", "label_without_share", "label_kept_whole"},
    "conventions": {"other_off", "local_classes", "label_without_share", "label_kept_whole"},
    "plain_cross_entropy": {
        "zero_gradient",
        "gradient_sign",
        "label_off_by_one",
        "base_two",
        "bfloat16_sum",
        "sharded_log_devices",
    },
    "parts": {"stale_lse", "upstream_ignored"},
    "mean": {"sum_for_mean", "all_rows_counted", "gradient_of_sum"},
    "rows_left_out": {"ignored_rows_leak"},
    "compiled": {"other_off", "zero_gradient", "bfloat16_loss"},
}
# Narrow logits only.
MEANT_FOR_NARROW = {"upcast": {"padding_joins", "stale_lse"}}
# Faults of options that no check uses: class weights, class masks, prior, z-loss, softcap, entropy, Max Suppression;
# and of a loss near 0, where the frameworks' own cross-entropy has the same fault.
OUT_OF_REACH = {
    "weight_not_in_smoothing",
    "weight_not_in_denominator",
    "z_loss_gradient",
    "z_loss_slightly_off",
    "softcap_derivative",
    "softcap_slightly_off",
    "entropy_kept",
    "entropy_slightly_off",
    "max_sup_at_label",
    "max_sup_first",
    "prior_ignored",
    "masked_classes_smoothed",
    "first_class_mask",
    "log_for_log1p",
}


@each_dtype
@pytest.mark.slow
def test_mutants_are_rejected(dtype: str) -> None:
    narrow = dtype in {"bfloat16", "float16"}
    sound = check_fault(None, dtype)
    assert with_verdict(sound, "agree") == set(CHECKS) - (set() if narrow else {"upcast"}), sound
    caught = faults_caught(dtype)
    for check, faults in caught.items():
        print(f"{dtype} {check}: {', '.join(faults)}")
    for check, faults in {**MEANT_FOR, **(MEANT_FOR_NARROW if narrow else {})}.items():
        assert faults <= set(caught[check]), check
    rejected = {fault for check, faults in caught.items() if check != "compiled" for fault in faults}
    # Rounding to bfloat16 does nothing to what is in bfloat16 already.
    harmless = {"bfloat16_logits", "bfloat16_gradient"} if dtype == "bfloat16" else set()
    assert {*FAULTS, *SHARDED_FAULTS} - rejected == OUT_OF_REACH | harmless


def test_every_check_is_meant_for_something() -> None:
    assert {*MEANT_FOR, *MEANT_FOR_NARROW} == set(CHECKS)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, *, smoothing: float) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")


def test_options_that_a_loss_lacks_are_named() -> None:
    outcomes = run_checks(make_subject("torch", cross_entropy, "cpu", compile_it=False), "float32")
    assert with_verdict(outcomes, "not applicable") == {
        "linear_non_target", "conventions", "mean", "rows_left_out", "upcast", "compiled",
    }  # fmt: skip
    reasons = {outcome.check: outcome.detail for outcome in outcomes}
    assert reasons["conventions"] == "the loss has no argument 'convention'"
    assert reasons["mean"] == "the loss has no argument 'reduction'"
    assert reasons["rows_left_out"] == "the loss has no argument 'where'"


def test_finds_that_torch_returns_narrow_losses() -> None:
    """The loss that torch has of bfloat16 logits is rounded to bfloat16, and its gradient is computed from that."""
    outcomes = run_checks(make_subject("torch", cross_entropy, "cpu", compile_it=False), "bfloat16")
    assert {"plain_cross_entropy", "upcast"} <= with_verdict(outcomes, "disagree")


def test_numbers_out_of_place_are_infinite_errors() -> None:
    empty = np.zeros((0, 3))

    def losses(*values: float) -> Evaluation:
        return Evaluation(np.array(values), empty)

    allowed, infinite = losses(1.0), losses(np.inf)
    assert share(losses(2.0), losses(2.5), allowed) == 0.5
    assert share(losses(np.nan), losses(np.nan), allowed) == np.inf
    assert share(losses(np.inf), losses(2.5), allowed) == np.inf
    assert share(losses(np.inf), losses(np.inf), allowed) == np.inf
    assert share(losses(np.inf), losses(np.inf), infinite) == 0
    assert share(losses(2.0), losses(2.0), infinite) == np.inf
    assert share(losses(np.inf), losses(-np.inf), infinite) == np.inf
    assert share(losses(2.0), losses(2.0 + 2**-50), losses(0.0)) == np.inf
    assert share(losses(2.0), losses(2.0), losses(0.0)) == 0


def test_batches_hold_numbers_of_their_dtype() -> None:
    for dtype, (bits, smallest) in self_checks.FORMATS.items():
        assert (2.0**-bits, 2.0**smallest) == (FORMATS[dtype].roundoff, FORMATS[dtype].smallest_normal)
        for rows in make_rows(dtype):
            np.testing.assert_array_equal(rows.logits, round_to(rows.logits, dtype))
        values = np.random.default_rng(0).normal(size=500) * 10.0 ** np.arange(-6, 4).repeat(50)
        np.testing.assert_array_equal(self_checks.round_to(values, dtype), round_to(values, dtype))


def test_a_loss_that_raises_fails_its_check_alone() -> None:
    sound = evaluate_fault(None)

    def fragile(logits: Any, labels: Any, **options: Any) -> Evaluation:
        if options.get("reduction") == "mean":
            raise RuntimeError("no mean today\nand a long trace")
        return sound(logits, labels, **options)

    outcomes = run_checks(Subject(fragile), "float32")
    assert with_verdict(outcomes, "failed") == {"mean"}
    assert [o.detail for o in outcomes if o.check == "mean"] == ["near_uniform_2: RuntimeError: no mean today"]
    assert with_verdict(outcomes, "not applicable") == {"plain_cross_entropy", "upcast", "compiled"}


def test_wrong_shape_is_no_broadcast() -> None:
    def one_for_all(logits: Any, labels: Any, **options: Any) -> Evaluation:
        return Evaluation(np.asarray(1.0), np.zeros_like(logits))

    rows = Rows("two", np.zeros((2, 3)), np.array([0, 1]))
    with pytest.raises(ValueError, match=r"the loss has shape \[\], expected \[2\]"):
        run(one_for_all, rows, SMOOTHING, "float32")


@pytest.mark.parametrize(("arguments", "message"), [
    (["torch", "--loss", "nowhere"], "write package.module:name"),
    (["torch", "--loss", "no_such_module:loss"], "No module named 'no_such_module'"),
    (["torch", "--loss", "math:no_such_name"], "no attribute 'no_such_name'"),
    (["torch", "--loss", "statistics:mean"], "the loss has no argument 'smoothing'"),
    (["torch", "--device", "tpux"], "tpux"),
    (["jax", "--device", "tpux"], "tpux"),
])  # fmt: skip
def test_what_cannot_run(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("cannot run: ")
    assert message in said.err
    assert not said.out


# Runs the file as a script in a folder where only NumPy and one framework can be imported.
SCRIPT = """
import runpy, sys
sys.argv = ["self_checks.py", *{arguments!r}]
runpy.run_path("self_checks.py", run_name="__main__")
"""
HARNESS = ("parity_tests", "lsce_jax", "lsce_torch", "lsce_spec", "mpmath", "typer", "rich")
OTHERS = {"torch": ("jax", "jaxlib", "flax", "optax", "ml_dtypes"), "jax": ("torch",)}
OWN_LOSS = {
    "torch": """
import torch
def loss(logits, labels, *, smoothing):
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_p = torch.log_softmax(logits, -1)
    nll = -log_p.gather(-1, labels[:, None])[:, 0]
    return nll if smoothing == 0 else (1 - smoothing) * nll - smoothing * log_p.mean(-1)
""",
    "jax": """
import jax
def loss(logits, labels, *, smoothing):
    logits = logits.astype(jax.numpy.promote_types(logits.dtype, "float32"))
    log_p = jax.nn.log_softmax(logits)
    nll = -jax.numpy.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    return nll if smoothing == 0 else (1 - smoothing) * nll - smoothing * log_p.mean(-1)
""",
}


def run_alone(folder: Path, framework: str, loss: str, blocked: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    shutil.copy(self_checks.__file__, folder / "self_checks.py")
    (folder / "mine.py").write_text(loss, encoding="utf-8")
    arguments = [framework, "--loss", "mine:loss", "--dtype", "float32"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return run_code(SCRIPT.format(arguments=arguments), blocked, cwd=folder, env=clean)


@each_framework
@pytest.mark.slow
def test_works_alone(framework: str, tmp_path: Path) -> None:
    outcome = run_alone(tmp_path, framework, OWN_LOSS[framework], (*HARNESS, *OTHERS[framework]))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "rows_left_out                     not applicable the loss has no argument 'where'" in outcome.stdout


def test_fails_alone(tmp_path: Path) -> None:
    """The famous slip: the label gets no share of the smoothing."""
    wrong = OWN_LOSS["torch"].replace("log_p.mean(-1)", "(log_p.sum(-1) + nll) / (log_p.shape[-1] - 1)")
    outcome = run_alone(tmp_path, "torch", wrong, (*HARNESS, *OTHERS["torch"]))
    assert outcome.returncode == 1, outcome.stdout + outcome.stderr
    disagree = {line.split()[1] for line in outcome.stdout.splitlines() if "disagree" in line}
    assert disagree == {"label_forgotten"}


def test_cannot_run_alone(tmp_path: Path) -> None:
    missing = run_alone(tmp_path, "torch", OWN_LOSS["torch"], ("torch",))
    assert missing.returncode == 2
    assert "cannot run: No module named 'torch'" in missing.stderr
    broken = run_alone(tmp_path, "torch", "def loss(logits, labels, *, smoothing):\n    raise TypeError('no')", HARNESS)
    assert broken.returncode == 2
    assert "cannot run: no check got a result" in broken.stderr


# --- As a command -----------------------------------------------------------------------------------------------------

USERS = """
import torch
import torch.nn.functional as F

def right(logits, labels, smoothing):
    return F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")

def scaled(logits, labels, smoothing, scale=1.0):
    return scale * right(logits, labels, smoothing)

def plain(logits, labels):
    return F.cross_entropy(logits, labels)
"""


def test_a_users_loss_is_checked_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "self_checked.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    right = invoke("self-check", "torch:self_checked:right", "--dtype", "float32", "--json", "found.json")
    expected = run_checks(make_subject("torch", importlib.import_module("self_checked").right, "cpu", False), "float32")
    assert right.exit_code == (0 if agreement(expected) else 1), right.output
    found = json.loads(Path("found.json").read_text())["outcomes"]
    assert [each["verdict"] for each in found] == [each.verdict for each in expected]
    wrong = invoke("self-check", "torch:self_checked:scaled", "--dtype", "float32", "--a", "scale=1.01")
    assert wrong.exit_code == 1, wrong.output
    assert wrong.output.count("disagree") > right.output.count("disagree")
    for loss, message in (("plain", "has no argument 'smoothing', which the checks vary"), ("none", "has no none")):
        outcome = invoke("self-check", f"torch:self_checked:{loss}")
        assert outcome.exit_code == 2
        assert message in outcome.output
    assert "RuntimeError" in invoke("self-check", "torch:self_checked:right", "--device", "tpu").output
