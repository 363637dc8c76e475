"""`compare`: a correct pair agrees, a wrong one does not and is named."""

import json
import re
from collections import Counter
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result as CommandResult

from parity_tests.faults.dense import FAULTS, evaluate
from parity_tests.faults.linear import wrong_result
from parity_tests.faults.sharded import sharded_faults
from parity_tests.losses.user_losses import SpecificationError, find, parse_options
from parity_tests.meta.running import invoke
from parity_tests.studies.diagnosis import Candidate, Diagnosis, departures, faults_as_candidates
from parity_tests.studies.power import HARMLESS
from parity_tests.studies.probes import Question, plain_cases
from parity_tests.truth.cases import make_case

# What a user brings: right and wrong losses in both frameworks, each by its own formula.
LOSSES = """
import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F

calls = 0

def jax_uniform(logits, labels, e=0.1):
    log_p = jax.nn.log_softmax(logits)
    q = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype) * (1 - e) + e / logits.shape[-1]
    return -(q * log_p).sum(-1).mean()

def jax_rows(logits, labels, e=0.1):
    log_p = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    return -((1 - e) * own + e * log_p.mean(-1))

def jax_ignoring(logits, labels, e=0.1):
    counted = labels != -100
    return jnp.where(counted, jax_rows(logits, jnp.where(counted, labels, 0), e), 0).sum() / len(labels)

def non_target(logits, labels, e=0.1):
    log_p = F.log_softmax(logits, -1)
    own = log_p.gather(1, labels[:, None])[:, 0]
    return -((1 - e) * own + e / (logits.shape[-1] - 1) * (log_p.sum(-1) - own)).mean()

def summed(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum")

def kl(logits, labels, e=0.1):
    q = F.one_hot(labels, logits.shape[-1]) * (1 - e) + e / logits.shape[-1]
    return F.kl_div(F.log_softmax(logits, -1), q, reduction="batchmean")

def detached(logits, labels, e=0.1):
    log_p = F.log_softmax(logits, -1)
    return -((1 - e) * log_p.gather(1, labels[:, None])[:, 0] + e * log_p.mean(-1).detach()).mean()

def low_precision(logits, labels):
    return F.cross_entropy(logits.bfloat16().float(), labels, label_smoothing=0.1)

def label_not_shared(logits, labels, e=0.1):
    q = torch.full_like(logits, e / logits.shape[-1]).scatter(1, labels[:, None], 1 - e)
    return -(q * F.log_softmax(logits, -1)).sum(-1).mean()

def unsmoothed(logits, labels):
    return F.cross_entropy(logits, labels)

def from_probabilities(logits, labels, e=0.1):
    p = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    q = F.one_hot(labels, logits.shape[-1]) * (1 - e) + e / logits.shape[-1]
    return -(q * torch.log(p)).sum(-1).mean()

def scaled(logits, labels):
    return 1.5 * F.cross_entropy(logits, labels, label_smoothing=0.1)

def over_seven(logits, labels):
    return summed(logits, labels) / 7

def linear_over_seven(hidden, weight, labels):
    return over_seven(hidden @ weight.T, labels)

def linear(hidden, weight, labels):
    return F.cross_entropy(hidden @ weight.T, labels, label_smoothing=0.1)

def jax_linear(hidden, weight, labels, e=0.1):
    return jax_uniform(hidden @ weight, labels, e)

class Transposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        return hidden @ weight.T
    @staticmethod
    def backward(ctx, gradient):
        hidden, weight = ctx.saved_tensors
        return gradient @ weight.T, gradient.T @ hidden

def transposed(hidden, weight, labels):
    return F.cross_entropy(Transposed.apply(hidden, weight), labels, label_smoothing=0.1)

def raises(logits, labels):
    raise RuntimeError("out of luck")

def raises_sometimes(logits, labels):
    if logits.shape[-1] == 33:
        raise RuntimeError("too wide")
    return F.cross_entropy(logits, labels, label_smoothing=0.1)

def not_a_number(logits, labels):
    return F.cross_entropy(logits, labels) * float("nan")

def twice_unsmoothed(logits, labels):
    return 2 * F.cross_entropy(logits, labels)

def dropped(logits, labels):
    return F.cross_entropy(F.dropout(logits, 0.1), labels, label_smoothing=0.1)

def column(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")[:, None]

def without_gradient(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.1).detach()

class Weighted(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight
    def forward(self, logits, labels):
        return F.cross_entropy(logits, labels, self.weight)

def exits(logits, labels):
    raise SystemExit(0)

def pair(logits, labels):
    return F.cross_entropy(logits, labels), logits

def times(logits, labels, c):
    return c * F.cross_entropy(logits, labels, label_smoothing=0.1)

def in_float64(logits, labels):
    return F.cross_entropy(logits.double(), labels, label_smoothing=0.1)

def finite_only(logits, labels):
    if not torch.isfinite(logits).all():
        raise ValueError("infinite")
    return F.cross_entropy(logits, labels, label_smoothing=0.1)

def turns_gradients_off(logits, labels):
    torch.set_grad_enabled(False)
    return F.cross_entropy(logits, labels, label_smoothing=0.1)

def jax_rows_ignoring(logits, labels, e=0.1):
    counted = labels != -100
    return jnp.where(counted, jax_rows(logits, jnp.where(counted, labels, 0), e), 0)

class Raising:
    def __init__(self):
        raise AttributeError("made of nothing")

number = 3
"""


@pytest.fixture(autouse=True)
def _users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brought_losses.py").write_text(LOSSES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def compare(*arguments: str) -> CommandResult:
    """Return the result of `compare`, with `t:` and `j:` for the users' module in torch and in JAX."""
    users = {"t:": "torch:brought_losses:", "j:": "jax:brought_losses:"}
    named = [users[each[:2]] + each[2:] if each[:2] in users else each for each in arguments]
    of_users = any(each.startswith(("torch:", "jax:")) for each in named) and "--classes" not in arguments
    return invoke("compare", *named, *(("--classes", "10") if of_users else ()))


def slow(*row: Any) -> Any:
    return pytest.param(*row, marks=pytest.mark.slow)


SMOOTHED = "torch:torch.nn:CrossEntropyLoss --a label_smoothing=0.1"
CORRECT = [
    "AGREE in 9 cases: values and gradients are the same up to rounding.", "Both compute: uniform convention, mean."
]  # fmt: skip
SHARDS = "{}:parity_tests.meta.losses_of_shards:{} oracle --classes 8 --classes 16"
# Arguments, exit code, and what is printed, as often as it stands here. What stands behind NOT is not printed.
NOT = "NOT"
COMPARISONS = [
    # Correct pairs.
    *((f"{first} j:jax_uniform", 0, [*CORRECT, NOT, "known difference"])
      for first in (SMOOTHED, "j:jax_rows", "oracle")),
    slow("jax-fused j:jax_uniform", 0, CORRECT),
    slow("torch:torch.nn.functional:cross_entropy j:jax_uniform --a label_smoothing=0.1", 0, CORRECT),
    slow("torch:lsce_torch:label_smoothed_cross_entropy j:jax_uniform", 0, CORRECT),
    *((f"t:linear {second} --linear", 0, ["AGREE in 8 cases: values and gradients are the same", CORRECT[1]])
      for second in ("j:jax_linear", "torch-linear-chunked", "oracle")),
    ("t:non_target torch-fused --convention non_target", 0, ["Both compute: non_target convention"]),
    # A wrong loss is named.
    *(row(f"t:{name} j:jax_uniform --convention uniform", 1, ["DISAGREE", f"known difference: {fault}\n"])
      for name, fault, row in (
          ("non_target", "other_off", slow), ("detached", "smoothing_detached", pytest.param),
          ("summed", "sum_for_mean", slow), ("kl", "entropy_subtracted", slow),
          ("low_precision", "bfloat16_logits", slow), ("label_not_shared", "label_without_share", slow),
          # Its logarithm is that of 1 + tiny, which shows where there is no smoothing.
          ("unsmoothed", "no_smoothing, log_for_log1p", slow),
      )),
    ("t:transposed oracle --linear --convention uniform", 1,
     ["known difference: linear_weight_transposed\n", "values: the same", "gradients: DIFFERENT"]),
    *((f"oracle mutant:{fault}", 1, [f"known difference: {fault}\n"])
      for fault in ("other_off", "zero_non_target_gradient", "prior_ignored")),
    *(row(SHARDS.format(framework, loss), 1, [f"known difference: {fault}\n"])
      for framework, loss, fault, row in (
          ("torch", "megatron", "sharded_own_smoothing", pytest.param),
          ("torch", "added_up", "sharded_cotangents:8", lambda arguments, *rest: (f"{arguments} --a ranks=8", *rest)),
          ("torch", "megatron", "sharded_own_smoothing:4", lambda arguments, *rest: slow(f"{arguments} --a ranks=4",
                                                                                         *rest)),
          ("torch", "own_number_of_classes", "local_classes", slow), ("torch", "own_mean", "local_mean", slow),
          ("torch", "without_constant", "sharded_constant", slow), ("jax", "gathered", "sharded_log_devices", slow),
      )),
    slow("jax-sharded:7 torch-sharded:4", 0, ["\nAGREE in "]),  # in other numbers of shards than by default
    slow("mutant:sharded_cotangents:4 torch-linear-sharded:2", 1, ["known difference: sharded_cotangents:4\n"]),
    # A sum that is divided by a constant is not the mean.
    ("t:over_seven oracle --classes 33 --classes 10", 1,
     ["values: DIFFERENT", "spread, N = 13, K = ", "float32; A is off"]),
    ("t:linear_over_seven oracle --linear", 1, ["values: DIFFERENT", "spread, N = 13, K = ", "float32; A is off"]),
    # Both are wrong in the same way: whether they are right was said, or was not.
    ("t:non_target t:non_target", 0, ["AGREE"]),
    ("t:non_target t:non_target --convention uniform", 1, ["values: the same", *2 * ["known difference: other_off\n"]]),
    *(slow(f"t:{pair} t:{pair} {options}", int(bool(options)), ["AGREE"])
      for pair, options in (("summed", ""), ("summed", "--reduction mean"), ("summed", "--smoothing 0.3"),
                            ("scaled", ""), ("scaled", "--convention uniform"))),
    # Which part differs.
    ("t:kl oracle", 1, ["values: DIFFERENT", "gradients: the same"]),
    ("t:detached oracle", 1, ["values: the same", "gradients: DIFFERENT"]),
    # What a loss computes, where it is none that is known.
    ("t:scaled oracle", 1, ["computes: uniform convention, smoothing 0.1, 1.5 times the mean"]),
    ("t:from_probabilities oracle", 1, ["computes: uniform convention, mean; in the edge cases something else",
                                        "large logits, N = 7, K = 10"]),
    ("t:in_float64 oracle", 1, ["loss in float64, gradient in float32; expected float32, float32"]),
    ("t:times t:times --a c=1e-5 --b c=1e-5", 0,
     ["AGREE in 9 cases: ", "Both compute: uniform convention, smoothing 0.1, 1e-05 times the mean.",
      NOT, "known here"]),
    ("t:times t:times --a c=1e-5 --b c=1.0001e-5", 1, []),
    ("torch:torch.nn.functional:cross_entropy torch:torch.nn.functional:cross_entropy", 0,
     ["Both compute: no smoothing, mean."]),
    ("torch:torch.nn.functional:cross_entropy t:twice_unsmoothed", 1, ["(A is taken as right)", *5 * ["B is off"],
                                                                       NOT, "only"]),
    # Rows that do not count. Where all are ignored, the mean of torch is NaN.
    slow(f"{SMOOTHED} torch-fused --ignore-index -100", 1, ["DISAGREE in 1 of 10 cases"]),
    slow("j:jax_ignoring torch-fused --ignore-index -100", 1, ["known difference: all_rows_counted\n"]),
    (f"{SMOOTHED} j:jax_rows_ignoring --ignore-index -100", None, ["values: the same", NOT, "all_rows_counted"]),
    # Losses that fail, in some cases or in all.
    ("t:finite_only t:finite_only", 1, ["A failed in 1 of 9 cases: ValueError: infinite",
                                        "B failed in 1 of 9 cases: ValueError: infinite", "values: the same"]),
    ("t:raises_sometimes oracle --classes 10 --classes 33", 1,
     ["failed in 9 of 18 cases: RuntimeError: too wide", "computes: uniform convention, mean\n", "values: the same"]),
    ("t:linear torch-fused --linear", 2, ["NO VERDICT in 0 cases"]),
    *((f"t:{name} j:jax_uniform", 2, ["NO VERDICT in 9 cases", f"failed in 9 of 9 cases: {said}"]) for name, said in (
        ("raises", "RuntimeError: out of luck"), ("exits", "SystemExit: 0"),
        ("column", "ShapeError: the loss has shape [7, 1], expected []"),
        ("pair", "ShapeError: the loss is a tuple; a scalar or a loss per row is expected"),
        ("without_gradient", "LossError: the loss has no gradient"),
    )),
    ("t:turns_gradients_off torch:torch.nn.functional:cross_entropy", None, [NOT, "B failed"]),
    # Options reach the loss.
    (f"t:Weighted oracle --a weight={[1.0] * 9 + [3.0]} --smoothing 0".replace(", ", ","), 1, ["DIFFERENT"]),
    (f"t:Weighted oracle --a weight={[1.0] * 10} --smoothing 0.0".replace(", ", ","), None,
     ["known difference: log_for_log1p\n"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "lines"), COMPARISONS)
def test_what_a_comparison_says(arguments: str, code: int | None, lines: list[str]) -> None:
    outcome = compare(*arguments.split())
    assert outcome.exit_code == code or code is None, outcome.output
    end = lines.index(NOT) if NOT in lines else len(lines)
    for line, times in Counter(lines[:end]).items():
        found = outcome.output.count(line)
        assert found == times if times > 1 else found, (line, outcome.output)
    assert [line for line in lines[end + 1 :] if line in outcome.output] == [], outcome.output


def test_without_a_convention_the_second_loss_is_held_against_the_first() -> None:
    lines = compare("t:non_target", "j:jax_uniform").output.splitlines()
    assert lines[-3:] == [
        "DISAGREE in 9 of 9 cases: values and gradients differ (A is taken as right).",
        "The mistake is in B (jax_uniform): uniform convention, not non_target.",
        "Change in B: make the target 1-e at the label, e/(K-1) elsewhere (smoothing e).",
    ]
    assert max(map(len, lines[-3:])) <= 80


@pytest.mark.parametrize(("pair", "factors", "off"), [
    ("j:jax_uniform t:scaled", (1, 1.5), "B is off"),
    ("t:scaled oracle", (1.5, 1), "A is off"),
    ("t:scaled t:times --b c=3", (1.5, 3), "both are off"),
])  # fmt: skip
def test_both_values_and_the_true_one_are_shown(pair: str, factors: tuple[float, float], off: str) -> None:
    outcome = compare(*pair.split(), "--convention", "uniform")
    shown = re.findall(r"A (\S+) \| B (\S+) \| true (\S+)\n", outcome.output)
    assert len(shown) == 5
    assert outcome.output.count(f", float32; {off}\n") == 5
    for values in shown:
        a, b, true = map(float, values)
        assert (a / true, b / true) == pytest.approx(factors, rel=1e-5)
    assert "expected" not in outcome.output


def test_without_a_known_loss_no_value_is_called_true(tmp_path: Path) -> None:
    file, folder = tmp_path / "pair.json", tmp_path / "page"
    outcome = compare("t:scaled", "t:times", "--b", "c=3", "--json", str(file), "--report", str(folder))
    assert outcome.exit_code == 1, outcome.output
    assert len(re.findall(r"A \S+ \| B \S+\n", outcome.output)) == 5
    content = json.loads(file.read_text())
    assert content["definition"] is None
    assert content["survey"]["outcomes"] == []
    assert {each["blame"] for each in content["survey"]["differences"]} == {None}
    assert {each["worst"]["true"] for each in content["survey"]["differences"]} == {None}
    page = (folder / "index.html").read_text()
    assert "which of them is right is not known" in page
    for text in (outcome.output, page):
        assert not re.search(r"true \S*\d|expected|off\b|At fault|bounds of the truth", text)


@pytest.mark.parametrize(("second", "code", "finding"), [
    ("j:jax_uniform", 1, "NaN where there is none: torch:brought_losses:not_a_number in plain, N = 7"),
    ("t:not_a_number", 2, "cannot be said: A has no finite loss in any ordinary case"),
])  # fmt: skip
def test_nan_agrees_with_nothing(second: str, code: int, finding: str, tmp_path: Path) -> None:
    outcome = compare("t:not_a_number", second, "--report", str(tmp_path))
    assert outcome.exit_code == code, outcome.output
    for text in (outcome.output, (tmp_path / "index.html").read_text()):
        assert finding in text


@pytest.mark.parametrize("second", ["oracle", pytest.param("j:jax_uniform", marks=pytest.mark.slow)])
def test_a_random_loss_gets_no_verdict(second: str, tmp_path: Path) -> None:
    outcome = compare("t:dropped", second, "--json", str(tmp_path / "found.json"))
    assert outcome.exit_code == 2, outcome.output
    assert "cannot be said: A is random: two calls with the same inputs differ" in outcome.output
    assert "values:" not in outcome.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["agrees"], found["values_agree"], found["gradients_agree"]) == (None, None, None)


def test_another_formula_outranks_roundings() -> None:
    brought = "torch:parity_tests.meta.losses_brought_to_torch:focal"
    outcome = compare(brought, "torch:torch.nn:CrossEntropyLoss", "--classes", "3")
    assert "The mistake is in B (CrossEntropyLoss): no focal gamma." in outcome.output
    stages = re.findall(r"^stage (\d) of at most (\d): ", outcome.stderr, re.MULTILINE)
    assert [int(number) for number, _ in stages] == list(range(1, len(stages) + 1))
    assert len(stages) <= int(stages[0][1])


@pytest.mark.parametrize(("arguments", "message"), [
    ("t:nothing oracle", "brought_losses has no nothing"),
    ("t:number oracle", "cannot be called: it is a int"),
    ("torch:no_such_module:loss oracle", "importing no_such_module raised ModuleNotFoundError"),
    ("torch:brought_losses oracle", "expected torch:package.module:name or jax:package.module:name"),
    ("torch-fusd oracle", "there is no adapter 'torch-fusd'; did you mean torch-fused"),
    ("mutant:unheard_of oracle", "there is no mutant 'unheard_of'; the mutants are zero_gradient"),
    ("oracle oracle --a e=1", "options are for losses of your own"),
    ("t:kl oracle --a e", "an option must be like smoothing=0.1, got 'e'"),
    ("t:kl oracle --a E=1", "does not take these options: got an unexpected keyword"),
    ("t:Weighted oracle", "does not take these options"),
    ("t:Raising oracle", "making torch:brought_losses:Raising raised AttributeError: made of"),
    ("oracle oracle --softcap -3", "softcap must be above 0"),
    ("oracle oracle --z-loss nan", "z_loss must be at least 0"),
    ("oracle oracle --smoothing 0.3", "these losses take all options"),
    ("t:kl oracle --device banana", "there is no device 'banana'"),
    ("oracle oracle --smoothing 1.5", "smoothing must be"),
    ("oracle oracle --convention unifrom", "unifrom"),
    ("oracle oracle --reduction none", "reduction must be mean or sum"),
    ("oracle oracle --dtype float8", "there is no dtype 'float8' here; did you mean float64"),
])  # fmt: skip
def test_what_cannot_be_compared(arguments: str, message: str) -> None:
    outcome = compare(*arguments.split())
    assert outcome.exit_code == 2, outcome.output
    assert "cannot run: " in outcome.output
    assert message in outcome.output


def test_json_and_page(tmp_path: Path) -> None:
    """What the terminal says is on the page, in the same order."""
    file, folder = tmp_path / "new" / "pair.json", tmp_path / "page"
    shown = compare("t:non_target", "oracle", "--json", str(file), "--report", str(folder)).stdout

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    content = json.loads(file.read_text(), parse_constant=refuse)
    assert content["agrees"] is content["values_agree"] is content["gradients_agree"] is False
    assert [reading["mutants"] for reading in content["readings"]] == [["other_off"], []]
    assert len(content["survey"]["differences"]) == 9
    worst = content["survey"]["differences"][0]["worst"]
    assert "label" in worst["inputs"]
    assert worst["other"] == pytest.approx(worst["true"], rel=1e-6)
    assert worst["value"] != pytest.approx(worst["true"], rel=1e-3)
    assert content["survey"]["outcomes"][0]["worst"]["part"] in ("loss", "gradient")
    assert "torch" in content["environment"]["versions"]

    page = (folder / "index.html").read_text().replace("<wbr>", "")
    assert "<strong>DISAGREE</strong>" in page
    texts = [line.strip() for line in shown.partition("The largest, in units")[0].splitlines()[:-1] if line.strip()]
    assert len(texts) > 8
    for line in texts:
        assert re.sub("^([AB])  ", r"\1: ", line) in unescape(page)
    values = re.findall(r"A \S+ \| B \S+ \| true \S+(?=\n)", shown)
    assert len(values) == 5
    assert re.findall(r"A \S+ \| B \S+ \| true [^<\s]+(?=<)", page)[:5] == values


def test_a_loss_against_itself_is_two_on_the_page(tmp_path: Path) -> None:
    compare("t:non_target", "t:non_target", "--convention", "uniform", "--report", str(tmp_path))
    page = (tmp_path / "index.html").read_text()
    table = page.split("<h2>Both against the true values</h2>")[1].split("</table>")[0]
    assert re.findall(r'<span class="name">(\w+)</span>', table) == ["A", "B"]
    assert table.count(">disagrees<") == 2


# Cases that between them show every fault.
SHOWING = (
    *("everything", "class_mask", "class_weight", "ignored", "dominant", "large_logits", "minus_infinity", "softcap"),
    *("ties_max_sup", "max_sup_none", "prior_distribution", "classes_9", "subtract_entropy", "z_loss", "uniform_mean"),
    *("non_target_mean", "large_offset", "class_mask_of_groups"),
)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def of_everything(request: pytest.FixtureRequest) -> tuple[str, Diagnosis]:
    cases = [make_case(name, request.param) for name in SHOWING]
    return request.param, Diagnosis(cases, faults_as_candidates())


@pytest.mark.parametrize("fault", [*FAULTS, *sharded_faults()])
def test_every_mutant_is_named(fault: str, of_everything: tuple[str, Diagnosis]) -> None:
    """By a comparison of losses that take all options: the best explanation is the fault, or one that is the same."""
    dtype, diagnosis = of_everything
    results = [wrong_result(case, fault) for case in diagnosis.cases]
    found = diagnosis.explain(results, Candidate())
    if (fault, dtype) in HARMLESS:
        assert [each.candidate.fault for each in found] == [None]
    else:
        assert found[0].candidate.fault == fault


def test_sound_results_are_explained_without_a_fault(of_everything: tuple[str, Diagnosis]) -> None:
    _, diagnosis = of_everything
    found = diagnosis.explain([evaluate(case) for case in diagnosis.cases], Candidate())
    assert [each.candidate.fault for each in found] == [None]
    assert found[0].exact


def test_departures() -> None:
    right = Candidate("uniform", "mean", False)
    assert departures(right, right) == []
    assert departures(Candidate("clamp", "mean", False), right) == ["other_off"]
    assert departures(Candidate("clamp", "mean", False), Candidate("non_target", "mean", False)) == ["clamp_convention"]
    wrong = Candidate("none", "sum", True, "stale_lse")
    assert departures(wrong, right) == ["no_smoothing", "sum_for_mean", "entropy_subtracted", "stale_lse"]


def test_plain_cases_hold_what_they_promise() -> None:
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        cases = plain_cases(Question(smoothing=0.2, num_classes=(1, 5, 6), ignore_index=-7, z_loss=0.1), dtype)
        assert len({case.name for case in cases}) == len(cases) == 30
        assert all(case.options == {"ignore_index": -7, "z_loss": 0.1} for case in cases)
        assert all(case.smoothing == 0.2 for case in cases)
        shapes = {(case.num_classes, len(case.labels)) for case in cases}
        assert shapes == {(1, 1), (1, 7), (1, 13), (1, 64), (5, 1), (5, 5), (5, 7), (6, 2), (6, 7)}


def test_what_is_found() -> None:
    assert find("torch:torch.nn.functional:cross_entropy") is torch.nn.functional.cross_entropy
    assert find("jax:brought_losses:Weighted.forward")
    with pytest.raises(SpecificationError, match="has no Weighted"):
        find("torch:brought_losses:Weighted.backward")
    assert parse_options([]) == {}
    assert parse_options(["a=", "b=x=y", "c=null"]) == {"a": "", "b": "x=y", "c": None}


@pytest.mark.slow
def test_the_pages_show_the_verdict_of_the_ports() -> None:
    """The commands of README and docs, as a reader types them, and the three lines that they show."""
    root = Path(__file__).parents[2]
    readme, page = ((root / name).read_text(encoding="utf-8") for name in ("README.md", "docs/parity.md"))
    commands = re.findall(r"```console\n\$ lsce-parity (.*)\n\.\.\.\n((?:.+\n){3})```", readme + page)
    assert len(commands) == 2
    for command, lines in commands:
        outcome = invoke(*command.split())
        assert outcome.exit_code == 1, outcome.output
        assert outcome.output.splitlines()[-3:] == lines.splitlines()
    command, lines = commands[0]
    assert lines in page
    outcome = invoke(*command.replace("first_try", "ported").split())
    assert outcome.exit_code == 0, outcome.output
    assert "\n".join(outcome.output.splitlines()[-3:]) in page
