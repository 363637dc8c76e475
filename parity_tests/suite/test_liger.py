"""Liger's own kernels beside our loss, as docs/migrating.md says which of its arguments are which of ours.

Triton's interpreter runs them on the CPU, in a process of its own, since Triton reads TRITON_INTERPRET when it is
loaded. It takes no `weight` and no `softcap` of Liger, which are numbers there and tensors on a GPU;
tests/test_arguments.py has the formula.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lsce_torch import label_smoothed_cross_entropy_with_stats, linear_label_smoothed_cross_entropy
from parity_tests.losses.adapters import TorchAdapter
from parity_tests.truth.arithmetic import any_order
from parity_tests.truth.bounds import Bound, error_bound
from parity_tests.truth.cases import Case
from parity_tests.truth.oracle import solve

pytestmark = [
    pytest.mark.devices,
    pytest.mark.skipif(
        importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel (make install-devices)"
    ),
]

_GENERATOR = np.random.default_rng(0)
HIDDEN = _GENERATOR.integers(-1, 2, (9, 6)).astype(np.float32)
WEIGHT = (_GENERATOR.integers(-16, 17, (7, 6)) / 8).astype(np.float32)
LOGITS = HIDDEN @ WEIGHT.T  # exact, whatever the order of the sums
LABELS = np.array([3, 0, 6, 1, -100, 2, 5, 0, -100])
LABELS[1:3] = LOGITS[1:3].argmax(-1)  # two that are right
COUNT = int((LABELS != -100).sum())

# Liger's arguments, and ours.
CALLS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"label_smoothing": 0.125}, {"smoothing": 0.125}),
    ({"lse_square_scale": 0.0625}, {"smoothing": 0.0, "z_loss": 0.0625}),
    ({"label_smoothing": 0.25, "reduction": "sum"}, {"smoothing": 0.25, "reduction": "sum"}),
    ({"ignore_index": 0}, {"smoothing": 0.0, "ignore_index": 0}),
]
SCRIPT = """
import sys
import numpy as np, torch
from liger_kernel.transformers import LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss

calls = {calls!r}
data = np.load(sys.argv[1])
results = {{}}
for number, arguments in enumerate(calls):
    labels = torch.from_numpy(data["labels"])
    labels = labels.where(labels >= 0, arguments.get("ignore_index", -100))
    logits = torch.from_numpy(data["logits"]).requires_grad_()
    asked = dict.fromkeys(("return_z_loss", "return_token_accuracy", "return_predicted_tokens"), True)
    output = LigerCrossEntropyLoss(**arguments, **asked)(logits * 1.0, labels)  # it overwrites what it is given
    output.loss.backward()
    results[f"dense {{number}}"] = output.loss.detach()
    results[f"dense gradient {{number}}"] = logits.grad
    results[f"z_loss {{number}}"] = output.z_loss.detach()
    results[f"accuracy {{number}}"] = output.token_accuracy.detach()
    results[f"predicted {{number}}"] = output.predicted_tokens
    hidden, weight = (torch.from_numpy(data[name]).requires_grad_() for name in ("hidden", "weight"))
    loss = LigerFusedLinearCrossEntropyLoss(**arguments)(weight, hidden, labels)
    loss.backward()
    results[f"linear {{number}}"] = loss.detach()
    results[f"hidden {{number}}"], results[f"weight {{number}}"] = hidden.grad, weight.grad
np.savez(sys.argv[2], **{{name: value.numpy() for name, value in results.items()}})
"""


@pytest.fixture(scope="module")
def liger(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what Liger's kernels compute in each call."""
    folder = tmp_path_factory.mktemp("liger")
    given, computed = folder / "given.npz", folder / "computed.npz"
    np.savez(given, logits=LOGITS, labels=LABELS, hidden=HIDDEN, weight=WEIGHT)
    script = SCRIPT.format(calls=[theirs for theirs, _ in CALLS])
    paths = [str(Path(__file__).parents[2]), *sys.path]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", script, str(given), str(computed)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return dict(np.load(computed))


def labels_for(options: dict[str, Any]) -> np.ndarray:
    return np.where(LABELS < 0, options["ignore_index"], LABELS)


def bounds(options: dict[str, Any], liger_too: bool = True) -> tuple[np.ndarray, Bound]:
    """Return the true gradient, and the bound of our error, plus that of Liger's kernel.

    It multiplies gaps by log2(e) before exp2, adds up the classes in any order, and subtracts the label's logit and the
    mean of the logits from lse, which rounds numbers of their size and not of the loss's: 2 |lse| + 4 |z_y| + (K + 3) e
    mean |z| units of roundoff more (docs/numerics.md). The products double the error of each gap, and those of softmax
    and target are no more than ours.
    """
    keywords = {name: value for name, value in options.items() if name != "smoothing"}
    labels = labels_for(options)
    case = Case("Liger", "float32", LOGITS.astype(np.float64), labels, keywords, options["smoothing"])
    truth, arithmetic = solve(case), TorchAdapter().arithmetic
    ours = error_bound(case, truth, arithmetic)
    if not liger_too:
        return truth.gradient.high, ours
    theirs = error_bound(case, truth, type(arithmetic)(depth=any_order))
    size, lse = np.abs(LOGITS).mean(-1), np.abs(np.logaddexp.reduce(LOGITS.astype(np.float64), axis=-1))
    of_label = np.abs(np.take_along_axis(LOGITS, np.maximum(labels, 0)[:, None], -1)[:, 0])
    more = 2.0**-24 * (2 * lse + 4 * of_label + (LOGITS.shape[1] + 3) * options["smoothing"] * size)
    scale = 1.0 if options["reduction"] == "sum" else 1 / truth.counted.sum()
    loss = ours.loss + 2 * theirs.loss + scale * more[truth.counted].sum()
    return truth.gradient.high, Bound(loss, ours.gradient + 2 * theirs.gradient)


def within(found: Any, expected: Any, bound: Any) -> bool:
    return bool(np.all(np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64)) <= bound))


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_dense(liger: dict[str, Any], number: int) -> None:
    options = {"ignore_index": -100, "reduction": "mean", **CALLS[number][1]}
    _, bound = bounds(options)
    labels = torch.from_numpy(labels_for(options))
    for change, right in ((0.0, True), (1e-3, False)):
        logits = torch.from_numpy(LOGITS).requires_grad_()
        loss, stats = label_smoothed_cross_entropy_with_stats(
            logits, labels, **{**options, "smoothing": options["smoothing"] + change}
        )
        loss.backward()
        assert within(loss.detach(), liger[f"dense {number}"], bound.loss) == right
        assert within(logits.grad, liger[f"dense gradient {number}"], bound.gradient) == right
    count = stats.valid.sum() if options["reduction"] == "mean" else 1
    rounding = 16 * 2.0**-24 * np.abs(liger[f"z_loss {number}"])
    assert within(stats.z.sum() / count, liger[f"z_loss {number}"], rounding)
    assert within(stats.correct.sum() / stats.valid.sum(), liger[f"accuracy {number}"], 2.0**-24)
    assert np.array_equal(stats.prediction, liger[f"predicted {number}"])


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_linear(liger: dict[str, Any], number: int) -> None:
    """The bound of the logits' gradient, carried through the sums of the layer's gradients, on either side."""
    options = {"ignore_index": -100, "reduction": "mean", **CALLS[number][1]}
    gradient, bound = bounds(options)
    size = bound.gradient + 2 * (len(LABELS) + LOGITS.shape[1] + 2) * 2.0**-24 * np.abs(gradient)
    of_hidden, of_weight = size @ np.abs(WEIGHT), size.T @ np.abs(HIDDEN)
    labels = torch.from_numpy(labels_for(options))
    for change, right in ((0.0, True), (1e-3, False)):
        hidden, weight = (torch.from_numpy(value).requires_grad_() for value in (HIDDEN, WEIGHT))
        changed = {**options, "smoothing": options["smoothing"] + change}
        loss = linear_label_smoothed_cross_entropy(hidden, weight, labels, **changed)
        loss.backward()
        assert within(loss.detach(), liger[f"linear {number}"], bound.loss) == right
        assert within(hidden.grad, liger[f"hidden {number}"], of_hidden) == right
        assert within(weight.grad, liger[f"weight {number}"], of_weight) == right
