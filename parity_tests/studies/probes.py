"""The inputs that two losses are compared in, for losses that take only logits, or a linear layer, and labels."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import chain, repeat
from typing import Any, Literal, get_args

import numpy as np

from parity_tests.truth.cases import Case, LinearCase, random_case, soft_labels
from parity_tests.truth.linear_cases import with_logits
from parity_tests.truth.precision import FloatArray, round_to

# With one number of rows, a sum divided by a constant would pass as the mean, and a loss that is right for one row, or
# for a fixed batch, as right. JAX compiles for each shape, so only a few cases have other numbers of rows.
NUM_ROWS = 7
OTHER_NUM_ROWS = ({"spread": 13, "near uniform": 1, "ties": 64}, {"spread": 1, "near uniform": 5}, {"near uniform": 2})
NUM_CLASSES = (2, 10, 130)
# Cases that many losses do not handle. If nothing explains a loss, it is diagnosed again without these cases.
EDGES = frozenset({"large logits", "large offset", "minus infinity", "small loss", "all ignored"})
# What a loss takes for logits and for labels, if not logits and class labels.
LogitKind = Literal["logits", "cosines", "log_probabilities", "probabilities"]
LabelKind = Literal["classes", "multi_hot", "probabilities", "logits"]
# Cases that are not drawn for other labels, whose losses are NaN or infinite there; and those for other logits.
OF_LOGITS = (frozenset({"minus infinity"}), EDGES)
LOGIT_KINDS, LABEL_KINDS = get_args(LogitKind), get_args(LabelKind)


@dataclass(frozen=True)
class Question:
    """The computation expected of both losses; the options are those of `label_smoothed_cross_entropy`.

    Args:
        smoothing: the smoothing that both were given, or have built in.
        convention: the expected convention; None for that of the first loss, if both are a user's.
        reduction: the expected reduction of a loss that returns a scalar: "mean" or "sum".
        num_classes: numbers of classes to try.
        ignore_index, z_loss, softcap, subtract_entropy: other options that both were given.
        linear: whether both take a linear layer, (hidden, weight, labels), and not (logits, labels).
        logit_kind: what the losses take in place of logits: "cosines", numbers in [-1, 1]; "log_probabilities" or
            "probabilities", of a softmax.
        label_kind: what they take in place of class labels [N]: [N, K] arrays of the dtype of the logits,
            "multi_hot", zeros and ones; "probabilities", each row of which sums to 1; "logits", those of a teacher.
        chosen: whether the user chose any of the options; if not, the first loss is the reference.
        beyond: why no true values are known for a batch of the user's; empty if they are, or there is none.
    """

    smoothing: float = 0.1
    convention: str | None = None
    reduction: str = "mean"
    num_classes: tuple[int, ...] = NUM_CLASSES
    ignore_index: int | None = None
    z_loss: float = 0.0
    softcap: float | None = None
    subtract_entropy: bool = False
    linear: bool = False
    logit_kind: LogitKind = "logits"
    label_kind: LabelKind = "classes"
    chosen: bool = False
    beyond: str = ""

    @property
    def has_oracle(self) -> bool:
        """Whether the oracle has losses of such inputs."""
        return (self.logit_kind, self.label_kind) == ("logits", "classes") and not self.beyond

    @property
    def options(self) -> dict[str, Any]:
        """The options that every case has."""
        options = {name: getattr(self, name) for name in ("z_loss", "softcap", "subtract_entropy")}
        given = {name: value for name, value in options.items() if value}
        return given if self.ignore_index is None else {**given, "ignore_index": self.ignore_index}


def plain_cases(question: Question, dtype: str) -> list[Case]:
    """Return cases of logits [N, K], or hidden [N, D] and weight, with only the options of the question."""
    cases = []
    for num_classes, num_rows in zip(question.num_classes, chain(OTHER_NUM_ROWS, repeat({})), strict=False):
        generator = np.random.default_rng(num_classes)
        for name, logits, labels in _inputs(generator, num_classes, question, dtype):
            rows = slice(num_rows.get(name, NUM_ROWS))
            case = random_case(dtype, generator, rows.stop, num_classes, labels=labels[rows], options=question.options)
            case = replace(case, logits=round_to(logits[rows], dtype), smoothing=question.smoothing)
            if question.linear and not np.isfinite(logits).all():
                continue
            if not question.has_oracle:
                if name in OF_LOGITS[question.logit_kind != "logits"]:
                    continue
                case = _of_kinds(case, question, generator)
            case = _in_layer(case, generator) if question.linear else case
            cases.append(replace(case, name=f"{name}, N = {rows.stop}, K = {num_classes}"))
    return cases


def _of_kinds(case: Case, question: Question, generator: np.random.Generator) -> Case:
    """Return a case with what these losses take for logits and labels."""
    shape = case.logits.shape
    shifted = case.logits - case.logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    logits = {
        "logits": case.logits,
        "cosines": np.tanh(case.logits),
        "log_probabilities": log_p,
        "probabilities": np.exp(log_p),
    }[question.logit_kind]
    labels = {
        "classes": case.labels,
        # Few labels in most rows, none in some.
        "multi_hot": (generator.random(shape) < generator.random((shape[0], 1)) / 2).astype(np.float64),
        "probabilities": soft_labels(case.dtype, generator, shape),
        "logits": round_to(2 * generator.normal(size=shape), case.dtype),
    }[question.label_kind]
    return replace(case, logits=round_to(logits, case.dtype), labels=labels)


def _in_layer(case: Case, generator: np.random.Generator) -> LinearCase:
    """Return a linear case with the logits of a case, up to rounding: the weight is a random rotation."""
    rotation, _ = np.linalg.qr(generator.normal(size=(case.num_classes, case.num_classes)))
    hidden, weight = round_to(case.logits @ rotation.T, case.dtype), round_to(rotation, case.dtype)
    given: dict[str, Any] = {each.name: getattr(case, each.name) for each in fields(case)}
    layer: dict[str, Any] = {"hidden": hidden, "weight": weight, "weight_dtype": case.dtype, "chunk_size": 3}
    return with_logits(LinearCase(**given, **layer))


def _inputs(
    generator: np.random.Generator, num_classes: int, question: Question, dtype: str
) -> Iterator[tuple[str, FloatArray, Any]]:
    most_rows = max(NUM_ROWS, *OTHER_NUM_ROWS[0].values())
    labels = generator.integers(num_classes, size=most_rows)
    rows = np.arange(most_rows)
    normal = generator.normal(size=(most_rows, num_classes))
    kept = labels.copy()
    if question.ignore_index is not None:
        kept[1::3] = question.ignore_index
        yield "all ignored", normal, np.full(most_rows, question.ignore_index)
    yield "plain", 2 * normal, kept
    yield "spread", 10 * normal, kept
    yield "near uniform", 0.05 * normal, kept
    optimum = np.full((most_rows, num_classes), np.log(question.smoothing / num_classes + 1e-3))
    optimum[rows, labels] = np.log(1 - question.smoothing + question.smoothing / num_classes + 1e-3)
    yield "near the optimum", optimum + 0.01 * normal, kept
    yield "ties", np.round(normal), kept
    yield "large logits", 1e4 * normal, kept
    yield "large offset", normal + (1e6 if dtype == "float64" else 1e3), kept
    small = 0.1 * normal
    small[rows, labels] = 20
    yield "small loss", small, kept
    infinite = 2 * normal
    infinite[rows[:3], (labels[:3] + 1) % num_classes] = -np.inf
    yield "minus infinity", infinite, kept


def is_edge(case: Case) -> bool:
    """Return whether many losses do not handle a case of `plain_cases`."""
    return is_edge_name(case.name)


def is_edge_name(name: str) -> bool:
    """Return whether many losses do not handle the case of `plain_cases` with that name."""
    return name.partition(",")[0] in EDGES
