"""Compare two losses in a test suite of one's own: `lsce_parity` has these names.

from lsce_parity import assert_same_loss

def test_port():
    assert_same_loss(torch_loss, jax_loss, labels_are="multi_hot", dtype="bfloat16")
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from parity_tests.losses.adapters import Adapter, UnavailableError
from parity_tests.losses.callables import FrameworkError, framework_of, name_of
from parity_tests.losses.user_losses import FRAMEWORKS, SpecificationError, adapt, load_adapter
from parity_tests.report.pairs import lines_of, verdict_lines
from parity_tests.studies.pairs import Pair, compare_sides, make_tolerance
from parity_tests.studies.probes import plain_cases
from parity_tests.studies.questions import check_pair, make_question, make_sides, take_batches
from parity_tests.truth.precision import DTYPES

__all__ = [
    "CompareOptions",
    "Comparison",
    "FrameworkError",
    "NoVerdictError",
    "SpecificationError",
    "UnavailableError",
    "assert_same_loss",
    "compare_losses",
]

Loss = Callable[..., Any] | str
OF_THE_QUESTION = inspect.signature(make_question).parameters.keys() - {"classes"}
Inputs = str | Path | Mapping[str, Any]


class NoVerdictError(Exception):
    """It cannot be said whether two losses agree; the message says why."""


class CompareOptions(TypedDict, total=False):
    """What `compare_losses` and `assert_same_loss` take by keyword: the options of `lsce-parity compare`.

    Args:
        frameworks: "torch" or "jax" for each loss; found from the loss if it is not given.
        options: keyword arguments for each loss.
        dtype: of the logits, or several; by default "float32".
        device: "cpu", "cuda" or "tpu".
        classes: numbers of classes to draw cases for.
        ignore_index: label that both ignore.
        logits_are: "logits", "cosines", "log_probabilities" or "probabilities".
        labels_are: "classes", "multi_hot", "probabilities" or "logits".
        linear: whether both are called as loss(hidden, weight, labels).
        inputs: a batch of your own, or several, in place of the drawn cases: the path of a file that `save_batch`
            wrote, or a mapping of names to arrays.
        smoothing, convention, reduction, z_loss, softcap, subtract_entropy: what is right, where the true values are to
            decide; otherwise the first loss is the reference, if it is known.
        rtol, atol: what is allowed in place of what rounding explains.
    """

    frameworks: tuple[str | None, str | None]
    options: tuple[Mapping[str, Any], Mapping[str, Any]]
    dtype: str | Sequence[str]
    device: str
    classes: int | Sequence[int]
    ignore_index: int | None
    logits_are: str
    labels_are: str
    linear: bool
    inputs: Inputs | Sequence[Inputs] | None
    smoothing: float | None
    convention: str | None
    reduction: str | None
    z_loss: float | None
    softcap: float | None
    subtract_entropy: bool
    rtol: float | None
    atol: float | None


@dataclass(frozen=True)
class Comparison:
    """The comparison of two losses.

    Args:
        pair: all that was found.
    """

    pair: Pair

    @property
    def agrees(self) -> bool | None:
        """Whether the two agree; None if it cannot be said."""
        return self.pair.agrees

    @property
    def verdict(self) -> str:
        """One of "AGREE", "DISAGREE" and "NO VERDICT"."""
        return self.pair.verdict

    def lines(self) -> list[str]:
        """Return the report, the verdict first."""
        return [*verdict_lines(self.pair), "", *lines_of(self.pair)]

    def __str__(self) -> str:
        """Return the report as text."""
        return "\n".join(self.lines())


def compare_losses(first: Loss, second: Loss, **options: Unpack[CompareOptions]) -> Comparison:
    """Return the comparison of two losses, values and gradients, as `lsce-parity compare` makes it.

    Args:
        first: a function of (logits [N, K], labels [N]) of torch or JAX that returns a scalar, a loss per row or one
            per logit; or a class of such; or a text such as "torch:package.module:name" or "oracle", as for the command
            line. The logits come in the dtype of the comparison; the gradients are computed here.
        second: the other.
        options: see `CompareOptions`.

    Raises:
        FrameworkError: it cannot be told whether a callable takes arrays of torch or of JAX.
        SpecificationError: a text names no loss, or a loss does not take its options.
        UnavailableError: a framework or device is not on this machine.
        BatchError: `inputs` cannot be read, or are no batch.
        ValueError, TypeError: an option is out of range, unknown, or does not go with another.

    Example:
        >>> import torch
        >>> def rows(logits, labels):
        ...     return -torch.log_softmax(logits, -1)[torch.arange(len(labels)), labels]
        >>> compare_losses(rows, torch.nn.functional.cross_entropy, classes=3).verdict
        'AGREE'
    """
    if unknown := options.keys() - CompareOptions.__annotations__.keys():
        known = ", ".join(CompareOptions.__annotations__)
        raise TypeError(f"there is no option {', '.join(sorted(unknown))}; the options are {known}")
    dtypes = _several(options.get("dtype", "float32"))
    if wrong := [dtype for dtype in dtypes if dtype not in DTYPES]:
        raise ValueError(f"there is no dtype {wrong[0]!r} here; the dtypes are {', '.join(DTYPES)}")
    try:
        return Comparison(_compare(first, second, dtypes, options))
    except ValueError as error:
        raise type(error)(_as_keywords(str(error))) from None


def assert_same_loss(first: Loss, second: Loss, **options: Unpack[CompareOptions]) -> None:
    """Assert that two losses agree, values and gradients, within what rounding explains.

    Args:
        first: as in `compare_losses`.
        second: the other.
        options: see `CompareOptions`.

    Raises:
        AssertionError: they differ; the message is the report, with the values of A, of B, and the true ones where they
            are known.
        NoVerdictError: it cannot be said; the message says why.
        ValueError, TypeError, UnavailableError: as in `compare_losses`.

    Example:
        >>> import torch
        >>> assert_same_loss(torch.nn.CrossEntropyLoss, torch.nn.functional.cross_entropy, classes=3)
        >>> smoothed = torch.nn.CrossEntropyLoss(label_smoothing=0.2)
        >>> assert_same_loss(torch.nn.CrossEntropyLoss, smoothed, classes=10)
        Traceback (most recent call last):
            ...
        AssertionError: DISAGREE in 9 of 9 cases: ...
    """
    __tracebackhide__ = True
    found = compare_losses(first, second, **options)
    if found.agrees is None:
        raise NoVerdictError(str(found))
    if not found.agrees:
        raise AssertionError(str(found))


def _compare(first: Loss, second: Loss, dtypes: tuple[str, ...], options: CompareOptions) -> Pair:
    classes = options.get("classes")
    sizes = [classes] if isinstance(classes, int) else classes
    given: dict[str, Any] = {name: value for name, value in options.items() if name in OF_THE_QUESTION}
    question = make_question(classes=sizes, **given)
    own = None
    inputs = options.get("inputs")
    if inputs is not None:
        if clash := sorted(options.keys() & {"classes", "dtype", "logits_are", "labels_are"}):
            raise ValueError(f"--inputs says it all: leave out {', '.join(clash)}")
        question, own = take_batches(question, [inputs] if isinstance(inputs, str | Path | Mapping) else list(inputs))
    frameworks = options.get("frameworks", (None, None))
    keywords, device = options.get("options", ({}, {})), options.get("device", "cpu")
    adapters = [
        _adapter(loss, framework, own_options, device, question.linear, own.arrays if own else ())
        for loss, framework, own_options in zip((first, second), frameworks, keywords, strict=True)
    ]
    chose = sizes is not None or (question.ignore_index is not None and own is None)
    check_pair(question, [each.name for each in adapters], drawn=chose)
    probes = [case for case in plain_cases(question, dtypes[0]) if case.name.startswith("plain")]
    sides = make_sides(adapters, own.cases if own else probes, question, own)
    tolerance = make_tolerance(options.get("rtol"), options.get("atol"))
    return compare_sides(*sides, question, dtypes, tolerance, batches=own.cases if own else ())


def _adapter(
    loss: Loss,
    framework: str | None,
    options: Mapping[str, Any],
    device: str,
    linear: bool,
    arrays: Sequence[str],
) -> Adapter:
    if isinstance(loss, str):
        return load_adapter(loss, options, device, linear=linear, arrays=arrays)
    if not callable(loss):
        raise TypeError(f"a loss is a callable, or a text such as torch:package.module:name; got {loss!r}")
    if framework is None:
        try:
            framework = framework_of(loss)
        except FrameworkError as error:
            raise FrameworkError(f'{error}. Pass frameworks=("torch", "jax"), one for each loss') from None
    if framework not in FRAMEWORKS:
        raise ValueError(f"frameworks are torch and jax, got {framework!r}")
    return adapt(loss, framework, f"{framework}:{name_of(loss)}", options, device, linear, arrays)


def _several(dtypes: str | Sequence[str]) -> tuple[str, ...]:
    return (dtypes,) if isinstance(dtypes, str) else tuple(dtypes)


def _as_keywords(text: str) -> str:
    """Return a message that speaks of the command line with the names of keyword arguments."""
    return re.sub(r"--([a-z][a-z-]*)", lambda found: found[1].replace("-", "_"), text)
