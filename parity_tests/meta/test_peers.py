"""Other libraries' losses as adapters: right where the library is right, and what it gets wrong stays visible."""

import importlib
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from lsce_spec.extras import install
from parity_tests.losses.adapters import Adapter, LossError, UnavailableError
from parity_tests.losses.peers import PeerAdapter, WorkerAdapter
from parity_tests.losses.registry import ENTRIES, FaultyAdapter, make_adapter
from parity_tests.meta.running import run_code
from parity_tests.studies.verdicts import examine
from parity_tests.truth.cases import Case, case_names, make_case
from parity_tests.truth.comparison import Result
from parity_tests.truth.oracle import Truth, solve
from parity_tests.truth.precision import round_to

# In these a library has what the case asks for, and float32 is enough for its formula.
PLAIN = {
    "torch-cross-entropy": [
        "uniform_none",
        "uniform_sum",
        "uniform_mean",
        "soft_uniform",
        "large_offset",
        "class_weight",
        "class_weight_soft",
        "axis_first",
        "no_batch",
    ],
    "torch-cross-entropy-compiled": ["uniform_mean"],
    "torch-timm": ["uniform_mean", "one_row", "near_uniform"],
    "torch-keras": ["uniform_none", "uniform_sum", "uniform_mean", "soft_uniform", "labels_int8"],
    "jax-keras": ["uniform_none", "uniform_sum", "uniform_mean", "soft_uniform", "where"],
    "jax-optax": [
        "uniform_sum",
        "uniform_mean",
        "soft_uniform",
        "class_mask",
        "where",
        "axis_in_the_middle",
        "axis_first",
        "no_batch",
        "labels_int32",
    ],
    "jax-optax-integer": ["smoothing_0_uniform", "minus_infinity_unsmoothed"],
    "jax-t5x": [
        "uniform_none",
        "non_target_sum",
        "non_target_mean",
        "z_loss",
        "subtract_entropy",
        "where",
        "labels_int8",
    ],
}

# What the libraries do: peer, case, dtype, and what the report says of it.
FINDINGS = [
    # 1 + 3e-9 is 1 before the logarithm.
    ("torch-cross-entropy", "dominant", "float32", r"loss\[3\]: -?0\.0 \| true 2.279"),
    ("jax-optax-integer", "dominant", "float32", r"loss\[3\]: 0\.0 \| true 2.279"),
    # The mean over nothing.
    ("torch-cross-entropy", "all_ignored", "float32", r"loss: nan \| true 0.0"),
    ("torch-cross-entropy", "no_rows", "float32", r"loss: nan \| true 0.0"),
    ("torch-timm", "no_rows", "float32", r"loss: nan \| true 0.0"),
    # A NaN in an ignored row gets into its gradient.
    ("torch-cross-entropy", "ignored", "float32", r"gradient\[1, 0\]: nan \| true 0.0"),
    # At 256k classes the backward pass of log_softmax loses 4e-4 in its sum over the classes.
    ("torch-cross-entropy", "wide", "float32", r"gradient\[0, \d+\]: 0.000187\d+ \| true 0.0001872"),
    # jax.nn.one_hot compares in the labels' own dtype, so that int8 and uint8 labels mark class k + 256 as well.
    ("jax-optax", "labels_int8", "float32", r"gradient\[\d, 2\d\d\]: -0\.89"),
    ("jax-keras", "labels_uint8", "float32", r"gradient\[\d, 2\d\d\]: -0\.89"),
    # 0 * inf.
    ("torch-keras", "minus_infinity_unsmoothed", "float32", r"loss\[0\]: nan"),
    ("jax-t5x", "minus_infinity_unsmoothed", "float32", r"loss\[0\]: nan"),
    # No scalar comes out of a mean over no rows.
    ("jax-keras", "no_rows", "float32", r"ShapeError: the loss has shape \[0\]"),
    # keras.ops.one_hot rejects a label that is no class on torch, and lets it pass on JAX.
    ("torch-keras", "where", "float32", "Class values must be smaller than num_classes"),
    # Its division in the mean loses float64 on torch; the sum keeps it.
    ("torch-keras", "uniform_mean", "float64", "loss in float32"),
    # e / (K - 1) of one class.
    ("jax-t5x", "classes_1", "float32", "ZeroDivisionError"),
    # Narrow logits: the loss is rounded to their dtype.
    ("torch-cross-entropy", "uniform_mean", "bfloat16", "loss in bfloat16"),
    ("torch-timm", "uniform_mean", "bfloat16", "loss in bfloat16"),
    ("jax-optax", "uniform_mean", "bfloat16", "loss in bfloat16"),
    # Or only the steps on the way to it are.
    ("jax-t5x", "uniform_mean", "bfloat16", r"loss: 2\.308\d+ \| true 2\.3090"),
]

each_plain_case = pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, cases in PLAIN.items() for case in cases]
)


@cache
def peer(name: str) -> Adapter:
    return make_adapter(name)


@cache
def truth(name: str, dtype: str) -> Truth:
    return solve(make_case(name, dtype))


def test_every_peer_is_tested() -> None:
    assert {entry.name for entry in ENTRIES.values() if entry.kind == "peer"} == {*PLAIN, "jax-torchax"}


@each_plain_case
@pytest.mark.slow
def test_right_in_float32(name: str, case: str) -> None:
    outcome = examine(peer(name), make_case(case, "float32"), truth(case, "float32"))
    assert outcome.status == "agree", (outcome.reason, str(outcome.comparison))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * ("keras" in name)) for name in PLAIN])
def test_wrong_logits_are_found(name: str) -> None:
    """The check above is no formality: logits that are a thousandth too large are found, in each peer."""
    case, expected = make_case(PLAIN[name][0], "float32"), truth(PLAIN[name][0], "float32")
    scaled = replace(case, logits=round_to(case.logits * 1.001, "float32"))
    assert examine(peer(name), scaled, expected).status == "disagree"


@pytest.mark.parametrize(("name", "case", "dtype", "report"), FINDINGS)
def test_findings(name: str, case: str, dtype: str, report: str) -> None:
    outcome = examine(peer(name), make_case(case, dtype), truth(case, dtype))
    assert outcome.status in ("disagree", "failed")
    assert re.search(report, f"{outcome.reason} {outcome.comparison}"), outcome


@pytest.mark.parametrize("name", ["jax-keras", "torch-keras"])
def test_keras_with_narrow_logits(name: str) -> None:
    """Keras computes in float32 whatever the logits, and so is as accurate as ours."""
    outcome = examine(peer(name), make_case("uniform_mean", "bfloat16"), truth("uniform_mean", "bfloat16"))
    assert outcome.status == "agree", str(outcome.comparison)
    assert outcome.result is not None
    assert outcome.result.loss_dtype == "float32"


@pytest.mark.parametrize("name", ["jax-keras", "torch-keras"])
def test_keras_smooths_with_the_size_of_the_last_dimension(name: str) -> None:
    """With its classes elsewhere Keras takes e over the size of the last dimension, and is right without smoothing."""
    case = make_case("axis_first", "float32")
    assert examine(peer(name), case, truth("axis_first", "float32")).status == "disagree"
    plain = replace(case, smoothing=0.0)
    assert examine(peer(name), plain, solve(plain)).status == "agree"


def test_t5x_smoothing_of_one() -> None:
    """0 log 0 in the entropy that it subtracts."""
    options = {"convention": "non_target", "subtract_entropy": True}
    case = replace(make_case("uniform_none", "float32"), smoothing=1.0, options=options)
    outcome = examine(peer("jax-t5x"), case, solve(case))
    assert outcome.result is not None
    assert np.isnan(outcome.result.loss).all()
    assert not np.isnan(outcome.result.gradient).any()


SMOOTHING_OF_ONE = replace(make_case("uniform_mean", "float32"), smoothing=1.0)


@pytest.mark.parametrize(("name", "case", "reason"), [
    ("torch-cross-entropy", make_case("z_loss", "float32"), "has no z_loss"),
    ("torch-cross-entropy", make_case("bad_labels", "float32"), "has no bad labels"),
    ("torch-cross-entropy", make_case("labels_int8", "float32"), "has no narrow labels"),
    ("torch-cross-entropy-compiled", make_case("uniform_none", "float32"), None),
    ("torch-timm", make_case("uniform_sum", "float32"), "has no reduction='sum'"),
    ("torch-timm", make_case("soft_uniform", "float32"), "has no soft labels"),
    ("torch-timm", SMOOTHING_OF_ONE, "takes a smoothing below 1 only"),
    ("torch-keras", make_case("classes_1", "float32"), "takes two classes or more"),
    ("jax-keras", make_case("class_weight", "float32"), "has no class_weight, ignore_index"),
    ("jax-optax", make_case("non_target_mean", "float32"), "has no non_target convention"),
    ("jax-optax-integer", make_case("uniform_mean", "float32"), "has no smoothing"),
    ("jax-optax-integer", make_case("axis_in_the_middle", "float32"), "has no smoothing per row"),
    ("jax-t5x", make_case("soft_uniform", "float32"), "has no soft labels"),
])  # fmt: skip
def test_unsupported(name: str, case: Case, reason: str | None) -> None:
    assert peer(name).unsupported(case) == reason


class Trap(FaultyAdapter):
    """Must not be called."""

    def __call__(self, case: Case) -> Result:
        """Raise."""
        raise AssertionError("called")


def test_what_is_refused_is_not_called() -> None:
    case, expected = make_case("uniform_mean", "float32"), truth("uniform_mean", "float32")
    refusing = examine(PeerAdapter(Trap(), lambda case: "cannot"), case, expected)
    assert (refusing.status, refusing.reason) == ("unsupported", "cannot")
    assert examine(PeerAdapter(Trap()), case, expected).reason == "AssertionError: called"


def test_options_that_ask_for_nothing() -> None:
    """They are no arguments of the library."""
    options = {"z_loss": 0.0, "softcap": None, "subtract_entropy": False, "bad_labels": "nan", "reduction": "mean"}
    case = replace(make_case("uniform_mean", "float32"), options=options)
    assert examine(peer("torch-timm"), case, solve(case)).status == "agree"


def test_strict_promotion_is_no_fault_of_a_peer() -> None:
    """T5X compares [N, 1] with [K], and multiplies bfloat16 with float32. JAX is set to reject both in these tests."""
    case, adapter = make_case("uniform_mean", "bfloat16"), peer("jax-t5x")
    assert isinstance(adapter, PeerAdapter)
    for _ in range(2):
        with pytest.raises(Exception, match="jax_numpy_rank_promotion"):
            adapter.adapter(case)
        assert adapter(case).loss_dtype == "float32"


def test_torchax() -> None:
    """Our torch module on JAX, in every case; or the message that says what to install."""
    try:
        importlib.import_module("torchax.interop")
    except Exception:
        with pytest.raises(UnavailableError, match=r"torchax.* Run: pip install .*torch"):
            make_adapter("jax-torchax")
        return
    outcomes = [examine(peer("jax-torchax"), make_case(n, "float32"), truth(n, "float32")) for n in case_names()]
    assert not [outcome for outcome in outcomes if outcome.status != "agree"]


# Processes.


class Reader(FaultyAdapter):
    """Right if the environment of its process is as it should be."""

    def __call__(self, case: Case) -> Result:
        """Return loss and gradient, or raise what cannot be sent between processes."""
        if os.environ.get("PEER_TEST") != "on":
            raise UnsendableError("PEER_TEST is not on", len(case.name))
        return super().__call__(case)


class UnsendableError(Exception):
    """An exception that pickle cannot make again."""

    def __init__(self, text: str, number: int) -> None:
        """Take more than is kept."""
        super().__init__(text)


def test_worker() -> None:
    case, expected = make_case("uniform_mean", "float32"), truth("uniform_mean", "float32")
    worker = WorkerAdapter(Reader, {"PEER_TEST": "on"})
    assert examine(worker, case, expected).status == "agree"
    assert "PEER_TEST" not in os.environ

    assert worker._pool is not None
    (process,) = worker._pool._processes
    os.kill(process, signal.SIGKILL)
    with pytest.raises(LossError, match="the process of numpy ended"):
        worker(case)
    assert examine(worker, case, expected).status == "agree"

    failing = WorkerAdapter(Reader, {})
    for _ in range(2):
        with pytest.raises(LossError, match="UnsendableError: PEER_TEST is not on"):
            failing(case)


def test_keras_stays_out_of_this_process() -> None:
    """Its backend is that of the process."""
    assert examine(peer("jax-keras"), make_case("uniform_mean", "float32"), truth("uniform_mean", "float32"))
    assert "keras" not in sys.modules
    with pytest.raises(UnavailableError, match="runs on the CPU only here, not on cuda"):
        make_adapter("jax-keras", "cuda")


# With JAX loaded, a pool that nothing shuts down before the interpreter ends prints an error then.
END = """
import jax
from parity_tests.truth.cases import make_case
from parity_tests.losses.peers import WorkerAdapter
from parity_tests.losses.registry import OracleAdapter
if __name__ == "__main__":
    adapter = WorkerAdapter(OracleAdapter, {})
    print(adapter(make_case("uniform_mean", "float64")).loss)
"""


def test_the_worker_ends_with_the_program(tmp_path: Path) -> None:
    """Quietly, though nothing ends it but the end of the script."""
    script = tmp_path / "end.py"
    script.write_text(END, encoding="utf-8")
    command = [sys.executable, "-W", "error", str(script)]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert float(outcome.stdout) == truth("uniform_mean", "float64").loss.high


# Libraries that are missing.

MAKE = """
from parity_tests.losses.adapters import UnavailableError
from parity_tests.losses.registry import make_adapter
for name in {names!r}:
    try:
        print(name, "is", make_adapter(name).name)
    except UnavailableError as error:
        print(name, error)
"""


def made_without(blocked: tuple[str, ...], names: tuple[str, ...]) -> list[str]:
    outcome = run_code(MAKE.format(names=names), blocked)
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout.splitlines()


def test_missing_libraries() -> None:
    names = ("torch-timm", "torch-keras", "jax-keras", "jax-optax", "jax-optax-integer", "jax-torchax")
    assert made_without(("timm", "keras", "optax", "torchax"), (*names, "jax-t5x", "torch-cross-entropy")) == [
        f"torch-timm timm is not installed. Run: {install('torch,peers')}",
        f"torch-keras keras is not installed. Run: {install('torch,peers')}",
        f"jax-keras keras is not installed. Run: {install('jax,peers')}",
        f"jax-optax optax is not installed. Run: {install('jax')}",
        f"jax-optax-integer optax is not installed. Run: {install('jax')}",
        f"jax-torchax torchax is not installed. Run: {install('jax,torch', also='torchax')}",
        "jax-t5x is jax-t5x",
        "torch-cross-entropy is torch-cross-entropy",
    ]


def test_missing_frameworks() -> None:
    assert made_without(
        ("torch",), ("torch-cross-entropy", "torch-cross-entropy-compiled", "torch-timm", "jax-t5x")
    ) == [
        f"torch-cross-entropy torch is not installed. Run: {install('torch')}",
        f"torch-cross-entropy-compiled torch is not installed. Run: {install('torch')}",
        f"torch-timm torch is not installed. Run: {install('torch,peers')}",
        "jax-t5x is jax-t5x",
    ]
    assert made_without(("jax", "jaxlib"), ("jax-t5x", "jax-optax", "jax-keras", "torch-cross-entropy")) == [
        f"jax-t5x jax is not installed. Run: {install('jax')}",
        f"jax-optax jax is not installed. Run: {install('jax')}",
        f"jax-keras jax is not installed. Run: {install('jax')}",
        "torch-cross-entropy is torch-cross-entropy",
    ]


def test_listing_loads_nothing() -> None:
    code = "import sys, parity_tests.losses.registry\nprint([n for n in {!r} if n in sys.modules])"
    libraries = ["torch", "jax", "optax", "keras", "timm", "torchax"]
    outcome = run_code(code.format(libraries))
    assert outcome.stdout.strip() == "[]", outcome.stderr
