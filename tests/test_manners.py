"""What new users type, and what they read: other libraries' names, wrong values, arrays for options, bad labels.

Each message is the same in both packages, but where a package's names differ.
"""

import importlib
import inspect
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mypy import api as mypy
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import lsce_jax
import lsce_jax.kernels
import lsce_jax.metrics
import lsce_torch
import lsce_torch.kernels
import lsce_torch.metrics
from lsce_jax import keywords as jax_keywords
from lsce_spec import CONVENTIONS, ConventionName, hints
from lsce_spec.hints import for_choice, for_keyword
from lsce_spec.keywords import parameters_of
from lsce_torch import keywords as torch_keywords
from tests.both import raised

TYPING = Path(__file__).parent / "typing"

LOGITS, LABELS = np.zeros((4, 3), np.float32), np.array([0, 1, 2, 0])
HIDDEN, KERNEL = np.zeros((4, 2), np.float32), np.zeros((2, 3), np.float32)
IN_JAX = {"lsce_jax": lsce_jax, "logits": LOGITS, "labels": LABELS, "hidden": HIDDEN, "weight": KERNEL, "np": np}
IN_TORCH = {name: torch.from_numpy(value) for name, value in IN_JAX.items() if isinstance(value, np.ndarray)}
IN_TORCH |= {"lsce_torch": lsce_torch, "torch": torch, "weight": torch.from_numpy(KERNEL.T)}


def answer(typed: str) -> str:
    """Return the TypeError or ValueError for what a user types."""
    problem = raised(lambda: eval(typed, IN_JAX if "lsce_jax" in typed else IN_TORCH))
    assert isinstance(problem, TypeError | ValueError), problem
    return str(problem)


# --- Names of other libraries ---------------------------------------------------------------------------------------

DENSE = "label_smoothed_cross_entropy(logits, labels, "
LINEAR = "linear_label_smoothed_cross_entropy(hidden, weight, labels, "
LAYERED = "LinearLabelSmoothedCrossEntropyLoss()(hidden, weight, labels, "
# The names that other libraries have for an argument, a value that it may take, and what is said behind its name.
SYNONYMS = {
    "smoothing": ("label_smoothing eps epsilon alpha smothing", 0.2, ""),
    "class_weight": ("weight ce_weight", None, ""),
    "where": ("mask padding_mask valid", None, " True keeps a row."),
    "ignore_index": ("ignore_label padding_idx ignore_idx", 0, ""),
    "axis": ("dim class_axis", 1, ""),
    "z_loss": ("lse_square_scale z_loss_weight z_loss_coef", 0.0, ""),
    "softcap": ("logit_cap final_logit_softcapping", 30.0, ""),
    "denominator": ("num_items_in_batch", 4, ""),
}
OF_MODULE = "It is an option of the module: pass it where the module is made."
TYPED = [
    # what follows the package's name, and the end of the message
    *((f"{DENSE}{theirs}={value})", f"Did you mean {ours!r}?{more}")
      for ours, (names, value, more) in SYNONYMS.items() for theirs in names.split()),
    (f"{DENSE}q=0.2)", "help(label_smoothed_cross_entropy) lists the names."),
    (f"{DENSE}from_logits=True)", "log-probabilities are logits too."),
    (f"{DENSE}chunk_size=4)", "chunk_size belongs to the linear loss, linear_label_smoothed_cross_entropy."),
    *((f"{DENSE}{name}=None)", "whose names begin with vocab_parallel_.") for name in ("process_group", "axis_name")),
    ("label_smoothed_cross_entropy(input=logits, target=labels)", "Did you mean 'logits'?"),
    (f"{LINEAR}ce_weight=None)", "Did you mean 'class_weight'?"),
    (f"{LINEAR}filter_eps=1e-4)", "Did you mean 'gradient_filter'?"),
    (f"{LINEAR}dim=1)", "label_smoothed_cross_entropy takes axis."),
    (f"{LINEAR}shift=True)", "Shift before the call: logits[:, :-1] and labels[:, 1:]."),
    ("linear_label_smoothed_cross_entropy(_input=hidden, lin_weight=weight, target=labels)", "Did you mean 'hidden'?"),
    ("LinearLabelSmoothedCrossEntropyLoss(label_smoothing=0.1)", "Did you mean 'smoothing'?"),
    ("LinearLabelSmoothedCrossEntropyLoss(where=None)", "Pass where to each call of the module."),
    (f"{LAYERED}mask=None)", "Did you mean 'where'? True keeps a row."),
    (f"{LAYERED}class_weight=None)", OF_MODULE),
    ("CELossWithLabelSmoothing(smoothing=0.1)", "Did you mean 'label_smooth'?"),
    ("CELossWithLabelSmoothing(num_classes=3)", "Did you mean 'class_num'?"),
    ("CELossWithLabelSmoothing(0.1, 3)(logits, target=labels)", "Did you mean 'labels'?"),
    ("LabelSmoothedCrossEntropyLoss(denominator=3)", "Pass denominator to each call of the module."),
    ("LabelSmoothedCrossEntropyLoss(lse_square_scale=1e-4)", "Did you mean 'z_loss'?"),
    # values
    (f"{DENSE}reduction='avg')", "Choose one of: 'none', 'sum', 'mean'. Did you mean 'mean'?"),
    (f"{DENSE}reduction='batchmean')", "pass reduction='mean' and that number as denominator."),
    (f"{DENSE}reduction='valid')", "for another number pass denominator."),
    (f"{DENSE}reduction=None)", "Did you mean 'none'?"),
    (f"{DENSE}convention='fairseq')", "Did you mean 'non_target'?"),
    (f"{DENSE}convention='torch')", "Did you mean 'uniform'?"),
    (f"{DENSE}implementation='Fused')", "Did you mean 'fused'?"),
]  # fmt: skip
TYPED_IN_ONE = [
    ("lsce_jax.LabelSmoothedCrossEntropyLoss(eps=0.1)", "got an unexpected keyword argument 'eps'. "
                                                        "Did you mean 'smoothing'?"),
    (f"lsce_jax.{DENSE}inplace_backward=True)", "logits are donated, with donate_argnums."),
    ("lsce_jax.LabelSmoothedCrossEntropyLoss(label_smoothing=0.1)", "Did you mean 'smoothing'?"),
    ("lsce_jax.LabelSmoothedCrossEntropyLoss(weight=None)", "Did you mean 'class_weight'?"),
    ("lsce_jax.LabelSmoothedCrossEntropyLoss()(logits, labels, reduction='mean')", OF_MODULE),
    # torch's names where torch's function or module is meant
    ("lsce_torch.LabelSmoothedCrossEntropyLoss(smoothing=0.1)", "Did you mean 'label_smoothing'?"),
    ("lsce_torch.LabelSmoothedCrossEntropyLoss(class_weight=None)", "Did you mean 'weight'?"),
    ("lsce_torch.LabelSmoothedCrossEntropyLoss(axis=-1)", "label_smoothed_cross_entropy takes axis."),
    ("lsce_torch.LabelSmoothedCrossEntropyLoss()(logits=logits, labels=labels)", "Did you mean 'input'?"),
    ("lsce_torch.LabelSmoothedCrossEntropyLoss()(logits, labels, label_smoothing=0.1)", "Did you mean 'smoothing'?"),
    ("lsce_torch.cross_entropy(logits, labels, smoothing=0.1)", "Did you mean 'label_smoothing'?"),
    ("lsce_torch.cross_entropy(logits, labels=labels)", "Did you mean 'target'?"),
    ("lsce_torch.cross_entropy(logits, labels, dim=1)", "label_smoothed_cross_entropy takes axis."),
    (f"lsce_torch.{LINEAR}inplace_backward=True)", "logits are donated, with donate_argnums."),
    # places instead of names
    ("lsce_torch.LabelSmoothedCrossEntropyLoss()(logits, labels, 0.1)", "write smoothing=0.1."),
    ("lsce_torch.cross_entropy(logits, labels, *[None] * 6, 'clamp')",
     "reduction and label_smoothing by position. Options are keyword-only: write convention='clamp'."),
    ("lsce_jax.LabelSmoothedCrossEntropyLoss(0.1, 'clamp')", "write convention='clamp'."),
    ("lsce_jax.label_smoothed_cross_entropy(logits, labels, lsce_jax.Convention('c', max, min))",
     "write convention=...."),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "end"), TYPED)
def test_what_both_packages_answer(typed: str, end: str) -> None:
    answers = [answer(f"{package}.{typed}") for package in ("lsce_jax", "lsce_torch")]
    without_kernels = [text.replace(", 'pallas'", "").replace(", 'triton'", "") for text in answers]
    # The call of a module has another name.
    assert len({text.replace("__call__", "forward") for text in without_kernels}) == 1
    assert answers[0].endswith(end)


@pytest.mark.parametrize(("typed", "end"), TYPED_IN_ONE)
def test_what_one_package_answers(typed: str, end: str) -> None:
    assert answer(typed).endswith(end)


def groups(table: str) -> list[list[str]]:
    return [line.split() for line in table.strip().replace("\n  ", " ").splitlines()]


def every_parameter() -> set[str]:
    """Return the names of the arguments of all public functions and modules."""
    names: set[str] = set()
    for package in (lsce_jax, lsce_torch):
        for name in package.__all__:
            public = getattr(package, name)
            functions = [public.__init__, public.__call__] if inspect.isclass(public) else [public]
            functions += [public.forward] if hasattr(public, "forward") else []
            for function in functions:
                names |= set(inspect.signature(function).parameters)
    return names


def test_each_name_is_in_the_tables_once_and_ours_are_ours() -> None:
    for table in (hints._SYNONYMS, hints._LAYER_SYNONYMS):
        names = [name for group in groups(table) for name in group]
        assert len(names) == len(set(names))
        assert {group[0] for group in groups(table)} <= every_parameter()
    ours = {group[0] for group in groups(hints._SYNONYMS)}
    assert set(hints._PER_CALL) | set(hints._PER_MODULE.split()) | set(hints._LINEAR_ONLY) <= every_parameter()
    # Advice is read where no function takes a name of the same meaning.
    assert not {name for group in groups(hints._SYNONYMS) for name in group[1:]} & set(hints.ADVICE)
    of_some = {"reduce", "size_average", "differentiable"}
    assert {name for name in hints.ADVICE if name in every_parameter()} <= ours | of_some
    for text in hints.ADVICE.values():
        assert text.endswith(".")


@pytest.mark.parametrize("group", groups(hints._SYNONYMS), ids=lambda group: group[0])
def test_other_names_lead_to_ours(group: list[str]) -> None:
    accepted = {"logits", "labels", *parameters_of(torch_keywords.DenseLossKeywords), "chunk_size", "gradient_filter"}
    accepted |= {"class_num", "axis_name"}
    for theirs in group[1:]:
        assert for_keyword(theirs, accepted, "loss").startswith(f"Did you mean {group[0]!r}?")


@pytest.mark.parametrize(
    "theirs", [F.cross_entropy, optax.softmax_cross_entropy, optax.smooth_labels, torch.nn.KLDivLoss]
)
def test_every_argument_of_the_frameworks_has_an_answer(theirs: Callable[..., Any]) -> None:
    accepted = ("logits", "labels", *parameters_of(jax_keywords.DenseLossKeywords))
    for name in inspect.signature(theirs).parameters:
        if name not in (*accepted, "log_target"):
            assert "lists the names" not in for_keyword(name, accepted, "loss"), name


def test_values_of_other_libraries_lead_to_ours() -> None:
    for convention, libraries in hints.CONVENTIONS.items():
        assert convention in CONVENTIONS
        for library in libraries:
            assert for_choice("convention", library, CONVENTIONS) == f"Did you mean {convention!r}?"
    assert for_choice("convention", "nothing like it", CONVENTIONS) == ""


# --- Places instead of names ----------------------------------------------------------------------------------------

PLACED = [
    *(
        (f"{DENSE}{given})", f"takes only logits and labels by position. Options are keyword-only: write {end}.")
        for given, end in (
            ("0.1", "smoothing=0.1"),
            ("'mean'", "reduction='mean'"),
            ("'avg'", "reduction='avg'"),
            ("'fairseq'", "convention='fairseq'"),
            ("'fused'", "implementation='fused'"),
            ("'raise'", "bad_labels='raise'"),
            ("'?'", "convention='?' or reduction='?'"),
            ("-100", "ignore_index=-100"),
            ("255", "ignore_index=255 or denominator=255"),
            ("-1", "axis=-1 or ignore_index=-1"),
            ("1", "smoothing=1 or axis=1 or ignore_index=1"),
            ("30.0", "softcap=30.0 or denominator=30.0"),
            ("labels > 0", "where=... or class_mask=..."),
            ("logits[0]", "class_weight=... or prior=..."),
            ("logits.sum()", "smoothing=... or denominator=..."),
        )
    ),
    (f"{LINEAR}hidden[:, 0])", "write bias=... or class_weight=... or prior=...."),
    (f"{LINEAR}0.1, 'mean')", "takes only hidden, weight and labels by position. Options are keyword-only: "
                              "write smoothing=0.1."),
    ("LinearLabelSmoothedCrossEntropyLoss(0.1, 'sum')", "write reduction='sum'."),
    ("LinearLabelSmoothedCrossEntropyLoss()(hidden, weight, labels, 0.1)", "write smoothing=0.1."),
    ("CELossWithLabelSmoothing(0.1, 3, 'uniform')", "takes only label_smooth and class_num by position. "
                                                    "Options are keyword-only: write convention='uniform'."),
    ("CELossWithLabelSmoothing(0.1, 3)(logits, labels, 0.1)", "takes only logits and labels by position. "
                                                              "It has no options."),
    ("mean_denominator(labels, -100)", "takes only labels by position. Options are keyword-only: "
                                       "write ignore_index=-100."),
    ("add_smoothing(hidden[:, 0], hidden[:, 0], hidden[:, 0], 0.1)", "write smoothing=0.1."),
    ("linear_add_smoothing(hidden[:, 0], hidden, weight, labels, 0.1)", "write smoothing=0.1."),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "end"), PLACED)
def test_options_without_a_name(typed: str, end: str) -> None:
    answers = [answer(f"{package}.{typed}") for package in ("lsce_jax", "lsce_torch")]
    assert answers[0].replace("__call__", "forward") == answers[1]
    assert answers[0].endswith(end)


def test_any_other_value_without_a_name() -> None:
    text = answer(f"lsce_torch.{DENSE}None)")
    assert "Write the name of the option: smoothing, convention, prior, axis, " in text


@pytest.mark.parametrize("name", [name for name in lsce_jax.__all__ if "cross_entropy" in name])
def test_too_many_and_too_few_operands_of_every_loss(name: str) -> None:
    for package in (lsce_jax, lsce_torch):
        function = getattr(package, name)
        operands = [LOGITS] * 3 if "linear" in name else [LOGITS] * 2
        assert "keyword-only: write smoothing=0.1." in str(raised(lambda f=function, o=operands: f(*o, 0.1)))
    if name.startswith("vocab_parallel"):
        problem = raised(lambda: getattr(lsce_jax, name)(*operands))
        assert "is missing 'axis_name'. Pass the name of the mesh axis" in str(problem)
        assert answer(f"lsce_jax.{name}({'hidden, ' * ('linear' in name)}weight, labels, 'model')").endswith(
            "write axis_name='model' or convention='model' or reduction='model'."
        )


@pytest.mark.parametrize("package", [lsce_jax, lsce_torch])
def test_metrics_take_no_operands_by_position(package: Any) -> None:
    names = IN_JAX if package is lsce_jax else IN_TORCH
    _, stats = package.label_smoothed_cross_entropy_with_stats(names["logits"], names["labels"])
    for name in ("MeanLoss", "Accuracy", "Perplexity"):  # the last two inherit it
        text = str(raised(partial(getattr(package.metrics, name)().update, stats)))
        assert text.endswith(f"{name}.update() takes nothing by position. Options are keyword-only: write stats=....")


ROWS = "hidden[:, 0]"
LAYERS, EXIST = "linear_add_smoothing takes nll, hidden, weight and labels.", "of logits that exist."
OF_THE_OTHER = [
    (f"add_smoothing({ROWS}, hidden, weight, labels)", LAYERS),
    (f"add_smoothing({ROWS}, hidden, weight)", LAYERS),
    (f"add_smoothing({ROWS}, hidden, weight, bias=None)", LAYERS),
    (f"add_smoothing(nll={ROWS}, hidden=hidden, weight=weight, labels=labels)", LAYERS),
    (f"linear_add_smoothing({ROWS}, {ROWS}, {ROWS})", f"add_smoothing takes nll, label_logit and mean_logit, {EXIST}"),
    (f"linear_add_smoothing({ROWS}, label_logit={ROWS}, mean_logit={ROWS})", EXIST),
    (f"linear_add_smoothing({ROWS}, hidden, weight, labels, num_classes=3)", EXIST),
    (f"linear_add_smoothing({ROWS}, {ROWS}, {ROWS}, labels)",
     "If they are the label_logit and mean_logit of each row, call add_smoothing."),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "end"), OF_THE_OTHER)
def test_operands_of_the_other_smoothing(typed: str, end: str) -> None:
    answers = {answer(f"{package}.{typed}").replace("[3, 2]", "[2, 3]") for package in ("lsce_jax", "lsce_torch")}
    assert len(answers) == 1
    assert answers.pop().endswith(end)


# --- Types ----------------------------------------------------------------------------------------------------------


def test_types_are_the_names_at_run_time() -> None:
    assert get_args(ConventionName) == tuple(CONVENTIONS) == tuple(each.name for each in CONVENTIONS.values())
    for keywords, kernels in ((jax_keywords, lsce_jax.kernels), (torch_keywords, lsce_torch.kernels)):
        typed = parameters_of(keywords.DenseLossKeywords)["implementation"].annotation
        names = [name for part in get_args(typed) for name in get_args(part)]
        assert tuple(names) == kernels.IMPLEMENTATIONS
    typed = parameters_of(torch_keywords.LinearLossKeywords)["implementation"].annotation
    names = [name for part in get_args(typed) for name in get_args(part)]
    assert tuple(names) == lsce_torch.kernels.LINEAR_IMPLEMENTATIONS


@pytest.fixture(scope="module")
def found_by_mypy(request: pytest.FixtureRequest) -> dict[str, dict[int, list[str]]]:
    """Return what mypy --strict finds in the files of tests/typing, by file and line."""
    cache = getattr(request.config, "cache", None)  # none with -p no:cacheprovider
    folder = str(cache.mkdir("mypy")) if cache is not None else os.devnull
    options = ["--strict", "--config-file=", "--follow-imports=silent", "--hide-error-context", "--cache-dir", folder]
    files = sorted(map(str, TYPING.glob("*.py")))
    output, problem, _ = mypy.run([*options, "--show-absolute-path", *files])
    assert not problem
    found: dict[str, dict[int, list[str]]] = {Path(file).name: {} for file in files}
    for file, line, text in re.findall(r"^(.+?):(\d+): error: (.*)$", output, flags=re.MULTILINE):
        found[Path(file).name].setdefault(int(line), []).append(text)
    return found


@pytest.mark.slow
def test_right_uses_pass(found_by_mypy: dict[str, dict[int, list[str]]]) -> None:
    assert found_by_mypy["right_uses.py"] == {}


@pytest.mark.slow
def test_each_wrong_use_fails(found_by_mypy: dict[str, dict[int, list[str]]]) -> None:
    found = found_by_mypy["wrong_uses.py"]
    lines = (TYPING / "wrong_uses.py").read_text().splitlines()
    expected = {number: line.split("# error: ")[1] for number, line in enumerate(lines, 1) if "# error: " in line}
    uses = [number for number, line in enumerate(lines, 1) if line.startswith("    lsce_")]
    assert list(expected) == uses
    assert found.keys() == expected.keys()
    for number, wanted in expected.items():
        code, _, words = wanted.partition(" ")
        assert found[number][0].endswith(f"[{code}]"), (number, found[number])
        assert words in found[number][0], (number, found[number])


# --- Arrays where plain values are needed ---------------------------------------------------------------------------

PLAIN = {"axis": 1, "ignore_index": -100, "z_loss": 1e-4, "softcap": 30.0, "subtract_entropy": True}
PLAIN |= dict.fromkeys(("convention", "reduction", "bad_labels", "implementation"), 0)
PLAIN_OF_LINEAR = {"chunk_size": 2, "recompute": True, "gradient_filter": 0.1}
ARRAYS = {
    "smoothing": np.float32(0.1),
    "prior": np.full(3, 1 / 3, np.float32),
    "where": np.ones(4, bool),
    "class_weight": np.ones(3, np.float32),
    "class_mask": np.ones(3, bool),
    "denominator": np.float32(4),
}
SAYS = (
    r"{} must be a plain Python value, which no array or tensor is, got \w+. Of a tensor pass .item\(\), outside of "
    r"torch.compile; under jax.jit name the argument in static_argnames, or close over the value."
)


def test_each_option_is_tried_as_an_array() -> None:
    assert set(PLAIN) | set(ARRAYS) == set(parameters_of(jax_keywords.DenseLossKeywords))
    linear = set(parameters_of(jax_keywords.LinearLossKeywords))
    assert set(PLAIN_OF_LINEAR) == linear - set(PLAIN) - set(ARRAYS) - {"bias"}


def losses_with(name: str) -> list[Callable[[Any], Any]]:
    """Return functions of an option's value: the loss of JAX, and that of torch."""
    fixed = {} if name == "reduction" else {"reduction": "mean"}
    loss, operands = "label_smoothed_cross_entropy", ("logits", "labels")
    if name in PLAIN_OF_LINEAR:
        loss, operands = f"linear_{loss}", ("hidden", "weight", "labels")
    return [
        lambda value, of=of, package=package: getattr(of[package], loss)(
            *(of[each] for each in operands), **{name: value}, **fixed
        )
        for of, package in ((IN_JAX, "lsce_jax"), (IN_TORCH, "lsce_torch"))
    ]


@pytest.mark.parametrize("name", [*PLAIN, *PLAIN_OF_LINEAR])
def test_options_that_no_array_can_be(name: str) -> None:
    value = {**PLAIN, **PLAIN_OF_LINEAR}[name]
    in_jax, in_torch = losses_with(name)
    for call in (
        lambda: in_jax(jnp.asarray(value)), lambda: jax.jit(in_jax)(value), lambda: in_torch(torch.as_tensor(value))
    ):  # fmt: skip
        problem = raised(call)
        assert isinstance(problem, TypeError)
        assert re.fullmatch(SAYS.format(name), str(problem))
    torch._dynamo.reset()
    compiled = torch.compile(in_torch, backend="eager", fullgraph=True)
    assert re.search(SAYS.format(name), str(raised(lambda: compiled(torch.as_tensor(value)))))


@pytest.mark.parametrize("name", ARRAYS)
def test_options_that_may_be_traced(name: str) -> None:
    in_jax, in_torch = losses_with(name)
    assert np.isfinite(jax.jit(in_jax)(ARRAYS[name])).all()
    torch._dynamo.reset()
    compiled = torch.compile(in_torch, backend="eager", fullgraph=True)
    assert compiled(torch.as_tensor(ARRAYS[name])).isfinite().all()


def test_static_argnames_are_the_cure() -> None:
    loss = jax.jit(lsce_jax.label_smoothed_cross_entropy, static_argnames=("reduction", "z_loss", "axis"))
    assert np.isfinite(loss(LOGITS, LABELS, reduction="mean", z_loss=1e-4, axis=1))
    assert "static_argnames" in str(
        raised(lambda: jax.jit(lsce_jax.label_smoothed_cross_entropy)(LOGITS, LABELS, axis=1))
    )


def test_hints_under_compilation() -> None:
    """Names are checked within jit and torch.compile too, and right calls compile whole."""
    assert "'smoothing'" in str(
        raised(lambda: jax.jit(lambda z: lsce_jax.label_smoothed_cross_entropy(z, LABELS, eps=0.1))(LOGITS))
    )
    module = lsce_torch.LabelSmoothedCrossEntropyLoss(label_smoothing=0.1)
    logits, labels = IN_TORCH["logits"], IN_TORCH["labels"]
    compiled = torch.compile(lambda z: module(z, labels, where=labels > 0), backend="eager", fullgraph=True)
    assert compiled(logits).isfinite()
    wrong = torch.compile(lambda z: module(z, labels, mask=labels > 0), backend="eager", fullgraph=True)
    assert "Did you mean 'where'?" in str(raised(lambda: wrong(logits)))
    for options, words in (
        ({"smothing": 0.1}, "unexpected keyword argument 'smothing'"),
        ({"reduction": "avg"}, "Did you mean 'mean'?"),
        ({"reduction": "summ"}, "unknown reduction 'summ'"),
        ({"convention": "keras"}, "Did you mean 'uniform'?"),
    ):
        torch._dynamo.reset()
        wrong = torch.compile(
            lambda z, o=options: lsce_torch.label_smoothed_cross_entropy(z, labels, **o),
            backend="eager",
            fullgraph=True,
        )
        assert words in str(raised(lambda wrong=wrong: wrong(logits)))


# --- Labels that are no class ---------------------------------------------------------------------------------------

PADDED = np.array([0, -100, 1, -100])
HALF = "2 of 4 labels are no class, and make the loss NaN: -100, expected 0 to 2. To leave such rows out pass"


MEAN = {"reduction": "mean"}


def each_loss() -> Iterator[Any]:
    for package, of, convert in ((lsce_jax, IN_JAX, np.asarray), (lsce_torch, IN_TORCH, torch.from_numpy)):
        z, layer = of["logits"], (of["hidden"], of["weight"])
        module_options = {"ignore_index": None} if package is lsce_torch else MEAN
        calls = {
            "dense": partial(package.label_smoothed_cross_entropy, z, **MEAN),
            "stats": lambda y, f=package.label_smoothed_cross_entropy_with_stats, z=z, **o: f(z, y, **MEAN, **o)[0],
            "linear": partial(package.linear_label_smoothed_cross_entropy, *layer, **MEAN),
            "module": partial(package.LabelSmoothedCrossEntropyLoss(**module_options), z),
            "linear module": partial(package.LinearLabelSmoothedCrossEntropyLoss(**MEAN), *layer),
            "original": partial(package.CELossWithLabelSmoothing(0.1, 3), z),
            "added": lambda y, f=package.linear_add_smoothing, z=z, layer=layer, **o: f(z[:, 0], *layer, y, **o).sum(),
        }
        for name, call in calls.items():
            yield pytest.param(
                lambda y, call=call, convert=convert, **o: call(convert(y), **o), id=f"{package.__name__} {name}"
            )
    yield pytest.param(
        lambda y: lsce_torch.cross_entropy(IN_TORCH["logits"], torch.from_numpy(y), ignore_index=-7), id="torch drop-in"
    )


@pytest.mark.parametrize("loss", list(each_loss()))
def test_bad_labels_are_pointed_out_where_the_loss_is_called(loss: Callable[..., Any]) -> None:
    with pytest.warns(UserWarning, match=HALF) as caught:
        assert np.isnan(float(loss(PADDED)))
    assert [Path(warning.filename).name for warning in caught] == ["test_manners.py"]


def top_k_of_masked(framework: Any, names: dict[str, Any], labels: Any, *, counted: Any) -> None:
    loss = framework.label_smoothed_cross_entropy_with_stats
    _, stats = loss(names["logits"], labels, ignore_index=-100)
    metrics = importlib.import_module(f"{framework.__name__}.metrics")
    metrics.TopKAccuracy(k=1).update(stats=stats, mask=counted, logits=names["logits"], labels=labels)


@pytest.mark.parametrize("framework", [lsce_jax, lsce_torch])
def test_metrics_point_out_the_bad_labels_of_their_rows(framework: Any) -> None:
    names, convert = (IN_JAX, np.asarray) if framework is lsce_jax else (IN_TORCH, torch.from_numpy)
    left_out, bad = convert(PADDED), convert(np.array([0, -100, 5, 1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        top_k_of_masked(framework, names, left_out, counted=None)
    with pytest.warns(UserWarning, match="1 of 4 labels are no class") as caught:
        top_k_of_masked(framework, names, bad, counted=None)
    assert len(caught) == 2  # of the loss and of the metric
    assert {Path(warning.filename).name for warning in caught} == {"test_manners.py"}
    with pytest.warns(UserWarning, match="1 of 4 labels are no class") as caught:
        top_k_of_masked(framework, names, bad, counted=convert(np.array([True, True, False, True])))
    assert len(caught) == 1  # of the loss, since the metric takes other rows


def test_shards_point_out_bad_labels() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    loss, logits = lsce_torch.vocab_parallel_label_smoothed_cross_entropy, IN_TORCH["logits"]
    of_layer = lsce_torch.vocab_parallel_linear_label_smoothed_cross_entropy
    labels, mask = torch.from_numpy(PADDED), torch.tensor([True, True, False])
    try:
        for call in (
            lambda: loss(logits, labels),
            lambda: of_layer(IN_TORCH["hidden"], IN_TORCH["weight"], labels),
        ):
            with pytest.warns(UserWarning, match=HALF) as caught:
                assert call().isnan()
            assert [Path(warning.filename).name for warning in caught] == ["test_manners.py"]
        with pytest.warns(UserWarning, match="1 of 4 labels are no class.* inside class_mask. Allow"):
            assert loss(logits, IN_TORCH["labels"], class_mask=mask).isnan()
    finally:
        dist.destroy_process_group()


MASK = {"class_mask": np.array([True, True, False])}
CAUSES = [
    # labels, options, what is bad, and the cure
    ([1, 2, 3, 3], {}, "2 of 4 .*: 3, expected 0 to 2. ", "Labels run from 1 to 3: subtract 1."),
    ([-100, 1, 2, 3], {"ignore_index": -100}, "1 of 4 .*: 3, ", "Labels run from 1 to 3: subtract 1."),
    ([0, 2, 3, 3], {}, "2 of 4 .*: 3, ", "Labels run from 0 to 3 for 3 classes: does the last layer have enough "),
    ([0, 7, 3, 3], {}, "3 of 4 .*: from 3 to 7, ", "Labels run from 0 to 7 for 3 classes: "),
    ([0, 7, -1, 2], {}, "2 of 4 .*: from -1 to 7, ", "Labels run from -1 to 7 for 3 classes: "),
    ([0, 1, 2, -1], {}, "1 of 4 .*: -1, ", "To leave such rows out pass ignore_index=-1 or where."),
    ([0, 255, 2, 255], {}, "2 of 4 .*: 255, ", "To leave such rows out pass ignore_index=255 or where."),
    ([0, -1, -100, -100], {"ignore_index": -100}, "1 of 4 .*: -1, ", "ignore_index=-1, in place of -100, or where"),
    ([0, -1, -2, -2], {}, "3 of 4 .*: from -2 to -1, ", "To leave such rows out pass where=labels >= 0."),
    ([0, 1, 2, 2], MASK, "2 of 4 .*: 2, expected 0 to 2, inside class_mask. ",
     "Allow these classes in class_mask, or leave such rows out with where."),
]  # fmt: skip


@pytest.mark.parametrize("package", ["jax", "torch"])
@pytest.mark.parametrize(("labels", "options", "found", "cure"), CAUSES)
def test_the_cause_is_named(package: str, labels: list[int], options: dict[str, Any], found: str, cure: str) -> None:
    given = np.array(labels, np.uint8 if min(labels) >= 0 else np.int16)
    if package == "jax":
        loss, logits = lsce_jax.label_smoothed_cross_entropy, LOGITS
    else:
        loss, logits, given = lsce_torch.label_smoothed_cross_entropy, IN_TORCH["logits"], torch.from_numpy(given)
        options = {key: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for key, v in options.items()}
    with pytest.warns(UserWarning, match=found + ".*" + re.escape(cure)):
        loss(logits, given, **options)


@pytest.mark.parametrize("loss", list(each_loss()))
def test_each_line_is_warned_once(loss: Callable[..., Any]) -> None:
    """Whatever the numbers in the text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for number in (1, 2, 3):
            labels = np.where(np.arange(4) < number, -100, 0)
            loss(labels)
    assert len(caught) == 1, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("loss", list(each_loss()))
def test_no_word_where_nothing_is_wrong(loss: Callable[..., Any], request: pytest.FixtureRequest) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isfinite(float(loss(LABELS)))
        if not {"original", "drop-in"} & set(request.node.callspec.id.split()):
            kind = torch.from_numpy if type(loss(LABELS)) is torch.Tensor else np.asarray
            assert np.isfinite(float(loss(PADDED, where=kind(PADDED >= 0))))


@pytest.mark.parametrize("framework", [lsce_jax, lsce_torch])
def test_no_word_where_no_row_counts_or_an_error_says_it(framework: Any) -> None:
    names, convert = (IN_JAX, np.asarray) if framework is lsce_jax else (IN_TORCH, torch.from_numpy)
    loss, labels = framework.label_smoothed_cross_entropy, convert(PADDED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loss(names["logits"], labels, reduction="mean", denominator=0) == 0
        assert framework.mean_denominator(labels) == 4
        with pytest.raises(IndexError, match="To leave such rows out pass ignore_index=-100 or where"):
            loss(names["logits"], labels, bad_labels="raise")


def test_no_word_under_transforms() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loss = lsce_jax.label_smoothed_cross_entropy
        assert np.isnan(jax.jit(loss)(LOGITS, PADDED)).any()
        assert np.isnan(jax.jit(lambda z: loss(z, PADDED))(LOGITS)).any()
        assert np.isnan(jax.vmap(loss)(LOGITS, PADDED)).any()
        padded, torch_loss = torch.from_numpy(PADDED), lsce_torch.label_smoothed_cross_entropy
        torch._dynamo.reset()
        compiled = torch.compile(torch_loss, backend="eager", fullgraph=True)
        assert compiled(IN_TORCH["logits"], padded).isnan()
        assert torch.func.vmap(torch_loss)(IN_TORCH["logits"], padded).isnan().any()
        traced = make_fx(lambda z, y: torch_loss(z, labels=y))(IN_TORCH["logits"], padded)
        assert traced(IN_TORCH["logits"], padded).isnan()
        torch_loss(IN_TORCH["logits"].to("meta"), padded.to("meta"))
        with FakeTensorMode() as mode:
            torch_loss(mode.from_tensor(IN_TORCH["logits"]), mode.from_tensor(padded))
        module = lsce_torch.LabelSmoothedCrossEntropyLoss(ignore_index=None)
        program = torch.export.export(module, (IN_TORCH["logits"], padded))
        assert program.module()(IN_TORCH["logits"], padded).isnan()


@pytest.mark.parametrize(("framework", "grad"), [(lsce_jax, jax.grad), (lsce_torch, torch.func.grad)])
def test_labels_at_hand_are_looked_at_where_logits_are_differentiated(framework: Any, grad: Any) -> None:
    logits, labels = (LOGITS, PADDED) if framework is lsce_jax else (IN_TORCH["logits"], torch.from_numpy(PADDED))
    gradient = grad(lambda z: framework.label_smoothed_cross_entropy(z, labels, reduction="mean"))
    with pytest.warns(UserWarning, match=HALF) as caught:
        gradient(logits)
    assert [Path(warning.filename).name for warning in caught] == ["test_manners.py"]


def test_labels_may_be_traced_where_the_bad_ones_are_known() -> None:
    """As where a user's custom_jvp calls jax.jvp of the loss, and is differentiated."""

    def loss(logits: jax.Array) -> jax.Array:
        return lsce_jax.label_smoothed_cross_entropy(logits, jnp.asarray(LABELS), reduction="mean", softcap=3.0)

    of_user = jax.custom_jvp(loss)
    of_user.defjvp(lambda primals, tangents: jax.jvp(loss, primals, tangents))
    _, pullback = jax.vjp(of_user, jnp.asarray(LOGITS))
    np.testing.assert_array_equal(pullback(jnp.float32(1))[0], jax.grad(loss)(jnp.asarray(LOGITS)))


# --- A user's first script ------------------------------------------------------------------------------------------

SCRIPT = """
import {package}, {array} as np

logits, labels = np.zeros((4, 3)), np.{make}([0, -100, 1, -100])

def attempt(function, *arguments, **options):
    try:
        return function(*arguments, **options)
    except (TypeError, ValueError) as problem:
        print(problem)

attempt({package}.label_smoothed_cross_entropy, logits, labels, label_smoothing=0.1)
attempt({package}.label_smoothed_cross_entropy, logits, labels, smoothing=0.1, reduction="avg")
attempt({package}.label_smoothed_cross_entropy, logits, labels, smoothing=0.1, reduction="mean")
loss = attempt({package}.label_smoothed_cross_entropy, logits, labels, ignore_index=-100, reduction="mean")
print(f"{{loss:.4f}}", [name for name in dir({package}) if "smooth" in name.lower()][:2])
"""


@pytest.mark.parametrize(
    ("package", "array", "make"), [("lsce_jax", "jax.numpy", "array"), ("lsce_torch", "torch", "tensor")]
)
def test_a_first_script(package: str, array: str, make: str) -> None:
    script = SCRIPT.format(package=package, array=array, make=make)
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.splitlines() == [
        "label_smoothed_cross_entropy() got an unexpected keyword argument 'label_smoothing'. "
        "Did you mean 'smoothing'?",
        "unknown reduction 'avg'. Choose one of: 'none', 'sum', 'mean'. Did you mean 'mean'?",
        "1.0986 ['CELossWithLabelSmoothing', 'LabelSmoothedCrossEntropyLoss']",
    ]
    assert outcome.stderr.count(f"UserWarning: {HALF}") == 1
