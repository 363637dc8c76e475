"""What two losses are asked, and the two losses made ready to be asked: checks, batches of the user's, reductions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from lsce_spec import CONVENTIONS, ConventionName, check_smoothing, find_convention
from parity_tests.losses.adapters import Adapter
from parity_tests.losses.user_losses import find_reduction, is_user_loss, keep_shape, take_mean
from parity_tests.studies.pairs import Side
from parity_tests.studies.probes import LABEL_KINDS, LOGIT_KINDS, NUM_CLASSES, LabelKind, LogitKind, Question
from parity_tests.texts import did_you_mean
from parity_tests.truth.batches import MOST_LOGITS, Batch, BatchError, make_batch, read_batch
from parity_tests.truth.cases import Case, LinearCase


def make_question(  # noqa: PLR0913 - each option of the command line is a parameter
    *,
    smoothing: float | None = None,
    convention: str | None = None,
    reduction: str | None = None,
    classes: Sequence[int] | None = None,
    ignore_index: int | None = None,
    z_loss: float | None = None,
    softcap: float | None = None,
    subtract_entropy: bool = False,
    linear: bool = False,
    logits_are: str = "logits",
    labels_are: str = "classes",
) -> Question:
    """Return the question that the options of `lsce-parity compare` ask. None stands for what is not given.

    Raises:
        ValueError, TypeError: an option is out of range, or two do not go together; the message names the options of
            the command line.
    """
    told = (smoothing, convention, reduction, z_loss, softcap, subtract_entropy or None)
    question = Question(
        smoothing=0.1 if smoothing is None else smoothing,
        convention=convention,
        reduction=reduction or "mean",
        num_classes=tuple(classes or NUM_CLASSES),
        ignore_index=ignore_index,
        z_loss=z_loss or 0.0,
        softcap=softcap,
        subtract_entropy=subtract_entropy,
        linear=linear,
        logit_kind=cast("LogitKind", logits_are),
        label_kind=cast("LabelKind", labels_are),
        chosen=any(value is not None for value in told),
    )
    _check_kinds(question)
    check_smoothing(question.smoothing)
    _check_convention(question.convention or "uniform")
    if question.softcap is not None and not 0 < question.softcap < float("inf"):
        raise ValueError(f"softcap must be above 0 and finite, got {question.softcap}")
    if not 0 <= question.z_loss < float("inf"):
        raise ValueError(f"z_loss must be at least 0 and finite, got {question.z_loss}")
    if question.ignore_index is not None and abs(question.ignore_index) >= 2**31:
        raise ValueError(f"ignore_index must fit in 32 bits, got {question.ignore_index}")
    if question.reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, got {question.reduction!r}")
    return question


def _check_convention(name: str) -> None:
    try:
        find_convention(cast("ConventionName", name))
    except (TypeError, ValueError) as error:
        if "Did you mean" in str(error):
            raise
        raise ValueError(f"{error}{did_you_mean(name, CONVENTIONS)}") from None


def _check_kinds(question: Question) -> None:
    for option, given, kinds in (
        ("--logits-are", question.logit_kind, LOGIT_KINDS),
        ("--labels-are", question.label_kind, LABEL_KINDS),
    ):
        if given not in kinds:
            raise ValueError(f"{option} must be one of {', '.join(kinds)}, got {given!r}")
    if question.label_kind != "classes" and question.ignore_index is not None:
        raise ValueError(f"--ignore-index is for class labels, not for --labels-are {question.label_kind}")
    if not question.has_oracle and question.linear:
        raise ValueError("--linear is for logits and class labels: leave out --logits-are and --labels-are")
    if not question.has_oracle and question.chosen:
        raise ValueError(
            "no true values are known of such losses: leave out --smoothing, --convention, --reduction, --z-loss, "
            "--softcap and --subtract-entropy"
        )


def check_pair(question: Question, names: Sequence[str], *, drawn: bool) -> None:
    """Raise ValueError if losses of these names cannot be asked this.

    Args:
        question: the question.
        names: their names, by which losses of the harness are known.
        drawn: whether the user chose what cases are drawn, by --classes or --ignore-index.
    """
    users = [is_user_loss(name) for name in names]
    if not question.has_oracle and not all(users):
        if question.beyond:
            raise ValueError(f"both losses must be your own, torch:... or jax:...: {question.beyond}")
        raise ValueError("--logits-are and --labels-are are for two losses of your own: torch:... or jax:...")
    if not any(users) and (question.chosen or drawn):
        raise ValueError(
            "these losses take all options and are compared in every named case: leave out --classes, --ignore-index "
            "and the options that define the reference"
        )


# --- Batches of the user's --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Own:
    """Batches of the user's, as cases.

    Args:
        cases: one for each batch.
        shapes: the leading shape of a batch, by its number of rows.
        per_row: names of further arrays that have a value for each row.
    """

    cases: tuple[Case, ...]
    shapes: Mapping[int, tuple[int, ...]]
    per_row: frozenset[str]

    @property
    def arrays(self) -> tuple[str, ...]:
        """The names of arrays besides inputs and labels, which losses take by keyword."""
        where = ["where"] if any(case.where is not None for case in self.cases) else []
        return tuple(dict.fromkeys([*where, *(name for case in self.cases for name in case.keywords)]))


def take_batches(question: Question, given: Sequence[Any]) -> tuple[Question, Own]:
    """Return the question for batches of the user's, and the batches.

    Args:
        question: the question.
        given: paths of files, or mappings of names to arrays.

    Raises:
        BatchError: one cannot be read, is no batch, or does not fit the question or another batch.
    """
    batches = [_take(each, i, question.ignore_index) for i, each in enumerate(given)]
    linear = {isinstance(batch.case, LinearCase) for batch in batches}
    shapes: dict[int, tuple[int, ...]] = {}
    for batch in batches:
        rows = batch.case.labels.shape[0]
        if shapes.setdefault(rows, batch.shape) != batch.shape or len(linear) > 1:
            raise BatchError("the batches have different shapes of the same number of rows: compare them one by one")
    beyond = _beyond([batch.case for batch in batches])
    if beyond and question.chosen:
        raise BatchError(
            f"{beyond}: leave out --smoothing, --convention, --reduction, --z-loss, --softcap and --subtract-entropy"
        )
    question = replace(question, linear=linear == {True}, beyond=beyond)
    cases = [
        replace(batch.case, smoothing=question.smoothing, options={**batch.case.options, **question.options})
        for batch in batches
    ]
    return question, Own(tuple(cases), shapes, frozenset().union(*(batch.per_row for batch in batches)))


def _take(given: Any, i: int, ignore_index: int | None) -> Batch:
    if not isinstance(given, Mapping):
        return read_batch(given, ignore_index)
    return make_batch(given, f"batch {i}" if i else "batch", ignore_index)


def _beyond(cases: Sequence[Case]) -> str:
    """Return why no true values are known for these inputs, or an empty string."""
    if names := sorted({name for case in cases for name in case.keywords}):
        return f"no true values are known for losses that take {', '.join(names)}"
    if any(case.labels.dtype.kind == "f" for case in cases):
        return "no true values are known for labels [N, K]"
    if (size := sum(case.logits.size for case in cases)) > MOST_LOGITS:
        return f"true values are computed for at most {MOST_LOGITS} logits, and there are {size}"
    return ""


# --- Sides ------------------------------------------------------------------------------------------------------------


def make_sides(
    adapters: Sequence[Adapter],
    cases: Sequence[Case],
    question: Question,
    own: Own | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Side, Side]:
    """Return both losses with their reductions. A loss per row is averaged if the other loss is a scalar.

    Args:
        adapters: the two losses.
        cases: cases to find the reductions with.
        question: the question.
        own: the user's batches.
        say: called with what was done to a loss.
    """
    found = [reduction_of(adapter, cases, own, say) if is_user_loss(adapter.name) else None for adapter in adapters]
    if "mean" in found:
        for adapter, reduction in zip(adapters, found, strict=True):
            if reduction in ("none", "elements"):
                unit = "row" if reduction == "none" else "logit"
                say(f"{adapter.name} returns a loss per {unit}: its mean is compared.")
                take_mean(adapter, question.ignore_index)
    if adapters[0].name == adapters[1].name and all(is_user_loss(each.name) for each in adapters):
        for letter, adapter in zip("AB", adapters, strict=True):
            adapter.name += f" ({letter})"  # reports tell losses apart by their names
    # A loss that gave nothing has no reduction.
    common = next((each for each in ("mean", "none", "elements") if each in found), "none")
    first, second = (Side(adapter, common if is_user_loss(adapter.name) else None) for adapter in adapters)
    return first, second


def reduction_of(adapter: Any, cases: Sequence[Case], own: Own | None, say: Callable[[str], None]) -> str | None:
    """Return the reduction of a user's loss, which is called with its batches' leading shapes if it takes no rows."""
    found = find_reduction(adapter, cases)
    if found is not None or own is None or all(len(shape) == 1 for shape in own.shapes.values()):
        return found
    of_rows = adapter.loss
    keep_shape(adapter, own.shapes, own.per_row)
    found = find_reduction(adapter, cases)
    if found is None:
        adapter.loss = of_rows
    else:
        shapes = " and ".join(str(list(shape)) for shape in own.shapes.values())
        say(f"{adapter.name} does not take rows: it gets the leading shape {shapes} of your batch.")
    return found
