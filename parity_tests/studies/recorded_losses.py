"""A user's loss, recorded on one machine with one framework, to be held against another on a machine with the other.

A recording is a folder of `sealed_folders`, with the bits of the inputs and of every result. It has what `compare`
needs of a loss: the results in the dtypes of the cases, and in float64 and float32, and how far they move when the
logits move by rounding steps, or the results of its operations; so that the verdict is the one that both losses would
get on one machine.

A loss that returns one value for each row or logit is recorded once more as its mean, for another that is a scalar.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from parity_tests.evidence.environment import describe_environment
from parity_tests.json_files import NUMBER, check_form
from parity_tests.losses.adapters import Adapter
from parity_tests.losses.user_losses import is_user_loss, take_mean
from parity_tests.studies.bundle import (
    CASE_FORM,
    ENVIRONMENT_FORM,
    RecordedAdapter,
    arithmetic_from_json,
    arithmetic_to_json,
    case_from_arrays,
    case_to_arrays,
    result_from_arrays,
    result_to_arrays,
)
from parity_tests.studies.pairs import Side
from parity_tests.studies.probes import Question, is_edge
from parity_tests.studies.questions import Own, reduction_of
from parity_tests.studies.sameness import PRECISIONS, RecordedRuns, Runs
from parity_tests.studies.sealed_folders import Arrays, RecordingError, by_folder, read_sealed, write_sealed
from parity_tests.studies.verdicts import attempt
from parity_tests.texts import count_of
from parity_tests.truth.cases import Case
from parity_tests.truth.comparison import AnyResult, Parts
from parity_tests.truth.precision import FORMATS

MANIFEST = "loss.json"
# The wide dtypes in which a loss is run, and the narrowest that it may compute in there.
WIDE = ("float64", "float32")
_QUESTION = {
    "smoothing": NUMBER,
    "convention": (None, str),
    "reduction": str,
    "num_classes": [int],
    "ignore_index": (None, int),
    "z_loss": NUMBER,
    "softcap": (None, *NUMBER),
    "subtract_entropy": bool,
    "linear": bool,
    "logit_kind": str,
    "label_kind": str,
    "chosen": bool,
    "beyond": str,
}
_FORM = {
    "name": str,
    "framework": str,
    "device": str,
    "arithmetic": dict,
    "question": _QUESTION,
    "own": (None, dict),
    "cases": [{**CASE_FORM, "keywords": [str]}],
    "reduction": str,
    "sides": {str: {"results": list, "wide": {str: {"results": list, "precision": str, "random": bool}}}},
    "environment": ENVIRONMENT_FORM,
}


@dataclass(frozen=True)
class Recording:
    """A recorded loss.

    Args:
        cases: the inputs.
        question: what it was asked.
        own: the user's batches, if these are the cases.
        reduction: what it returns: "none", "mean" or "elements".
        sides: the results, by reduction: that of the loss, and "mean".
        environment: the result of `describe_environment` where it was recorded.
    """

    cases: tuple[Case, ...]
    question: Question
    own: Own | None
    reduction: str
    sides: dict[str, Side]
    environment: dict[str, Any]


# --- Recording --------------------------------------------------------------------------------------------------------


def record_loss(
    folder: Path,
    adapter: Adapter,
    cases: Sequence[Case],
    question: Question,
    own: Own | None,
    announce: Callable[[str], None] = lambda text: None,
) -> None:
    """Run a user's loss, and write the recording.

    Args:
        folder: the folder, which is created.
        adapter: the loss.
        cases: the cases, without a reduction.
        question: what is asked.
        own: the user's batches, if these are the cases.
        announce: called with what is done, before it starts.

    Raises:
        RecordingError: the loss returns neither a scalar, nor a value for each row or logit, in any case.
        OSError: the folder cannot be written.
    """
    reduction = reduction_of(adapter, [case for case in cases if not is_edge(case)], own, announce)
    if reduction is None:
        reasons = {each for each in (attempt(adapter, case) for case in cases[:1]) if isinstance(each, str)}
        raise RecordingError(f"{adapter.name} gives no loss that can be recorded: {'; '.join(reasons)}")
    arrays: Arrays = {}
    entries = []
    for i, case in enumerate(cases):
        entry, inputs = case_to_arrays(case)
        entries.append({**entry, "keywords": list(case.keywords)})
        arrays |= {f"cases/{i}/{name}": array for name, array in inputs.items()}
        arrays |= {f"keywords/{i}/{name}": array for name, array in case.keywords.items()}
    sides = {}
    for each in dict.fromkeys((reduction, "mean")):
        announce(
            f"running {adapter.name} in {count_of(len(cases), 'case')}{'' if each == reduction else ', as its mean'}"
        )
        if each != reduction:
            take_mean(adapter, question.ignore_index)
        sides[each], found = _take_apart(adapter, [_reduced(case, each) for case in cases], each)
        arrays |= found
    content = {
        "name": adapter.name,
        "framework": adapter.framework,
        "device": adapter.device,
        "arithmetic": arithmetic_to_json(adapter.arithmetic),
        "question": asdict(question),
        "own": None
        if own is None
        else {"shapes": [[rows, shape] for rows, shape in own.shapes.items()], "per_row": sorted(own.per_row)},
        "cases": entries,
        "reduction": reduction,
        "sides": sides,
        "environment": describe_environment(),
    }
    write_sealed(folder, MANIFEST, content, arrays)


def _reduced(case: Case, reduction: str) -> Case:
    return replace(case, options={**case.options, "reduction": reduction})


def _take_apart(adapter: Adapter, cases: Sequence[Case], reduction: str) -> tuple[dict[str, Any], Arrays]:
    """Return the results of a loss, and how far they move, as JSON values and as arrays."""
    narrow, arrays = _results_apart([attempt(adapter, case) for case in cases], f"results/{reduction}")
    wide = {}
    for dtype in WIDE:
        runs = Runs(adapter, cases, lambda case: not is_edge(case), dtype)
        path = f"{dtype}/{reduction}"
        entries, found = _results_apart(runs.results, path)
        arrays |= found
        for i in (i for i, result in enumerate(runs.results) if not isinstance(result, str)):
            for name in PRECISIONS:
                moved = runs.moved(i, FORMATS[name].roundoff)
                arrays |= {f"{path}/{i}/moved in {name}/{part}": np.asarray(values) for part, values in moved.items()}
            noise = runs.noise(i, FORMATS[runs.precision].roundoff)
            arrays |= {f"{path}/{i}/noise/{part}": np.asarray(values) for part, values in noise.items()}
        wide[dtype] = {"results": entries, "precision": runs.precision, "random": runs.is_random()}
    return {"results": narrow, "wide": wide}, arrays


def _results_apart(results: Sequence[AnyResult | str], path: str) -> tuple[list[Any], Arrays]:
    arrays = {
        f"{path}/{i}/{part}": values
        for i, result in enumerate(results)
        if not isinstance(result, str)
        for part, values in result_to_arrays(result).items()
    }
    return [result if isinstance(result, str) else result.dtypes for result in results], arrays


# --- Reading ----------------------------------------------------------------------------------------------------------


def read_recording(folder: Path) -> Recording:
    """Return the recording in a folder, after checking its hashes.

    Raises:
        RecordingError: there is none, or it was changed after it was written.
    """
    return read_sealed(folder, MANIFEST, "loss", _put_together)


def _put_together(content: dict[str, Any], arrays: Arrays) -> Recording:
    check_form(content, _FORM)
    folders = by_folder(arrays)
    cases = []
    for i, entry in enumerate(content["cases"]):
        names = entry.pop("keywords")
        case = case_from_arrays(entry, folders[f"cases/{i}"])
        cases.append(replace(case, keywords={name: folders[f"keywords/{i}"][name] for name in names}))
    given = {**content["question"], "num_classes": tuple(content["question"]["num_classes"])}
    own = content["own"]
    if own is not None:
        shapes = {rows: tuple(shape) for rows, shape in own["shapes"]}
        own = Own(tuple(cases), shapes, frozenset(own["per_row"]))
    sides = {name: _side(content, name, entry, cases, folders) for name, entry in content["sides"].items()}
    environment = content["environment"]
    return Recording(tuple(cases), Question(**given), own, content["reduction"], sides, environment)


def _side(
    content: dict[str, Any], reduction: str, entry: dict[str, Any], cases: Sequence[Case], folders: dict[str, Arrays]
) -> Side:
    arithmetic = arithmetic_from_json(content["arithmetic"])
    adapter = RecordedAdapter(f"{content['name']} (recorded)", content["framework"], content["device"], arithmetic)
    reduced = [_reduced(case, reduction) for case in cases]
    results = _results(entry["results"], f"results/{reduction}", folders)
    for case, result in zip(reduced, results, strict=True):
        key = case.name, case.dtype
        if isinstance(result, str):
            adapter.failures[key] = result
        else:
            adapter.results[key] = result
    wide: dict[str, Runs] = {}
    for dtype, found in entry["wide"].items():
        path = f"{dtype}/{reduction}"
        of_wide = _results(found["results"], path, folders)
        moved: dict[tuple[int, float], Parts] = {
            (i, FORMATS[name].roundoff): folders[f"{path}/{i}/moved in {name}"]
            for i, result in enumerate(of_wide)
            if not isinstance(result, str)
            for name in PRECISIONS
        }
        noise: dict[int, Parts] = {
            i: folders[f"{path}/{i}/noise"] for i, result in enumerate(of_wide) if not isinstance(result, str)
        }
        for i, parts in [*((i, parts) for (i, _), parts in moved.items()), *noise.items()]:
            result = of_wide[i]
            if isinstance(result, str) or _shapes(parts) != _shapes(result.parts):
                raise ValueError(f"what moves in case {i} does not fit its result")
        wide[dtype] = RecordedRuns(
            adapter,
            reduced,
            lambda case: not is_edge(case),
            dtype,
            results=of_wide,
            moved=moved,
            noise=noise,
            precision=found["precision"],
            random=found["random"],
        )
    return Side(adapter, reduction, wide)


def _shapes(parts: Parts) -> dict[str, tuple[int, ...]]:
    return {part: values.shape for part, values in parts.items()}


def _results(entries: Sequence[Any], path: str, folders: dict[str, Arrays]) -> list[AnyResult | str]:
    return [
        entry if isinstance(entry, str) else result_from_arrays(folders[f"{path}/{i}"], entry)
        for i, entry in enumerate(entries)
    ]


# --- Against a loss of this machine -----------------------------------------------------------------------------------


def sides_of(recording: Recording, adapter: Adapter, say: Callable[[str], None]) -> tuple[Side, Side]:
    """Return a recorded loss and one of this machine, with the reduction that both have.

    Args:
        recording: the recorded loss.
        adapter: the other.
        say: called with what was done to a loss.
    """
    found = None
    if is_user_loss(adapter.name):
        found = reduction_of(adapter, [case for case in recording.cases if not is_edge(case)], recording.own, say)
    common = "mean" if "mean" in (recording.reduction, found) else recording.reduction
    if common == "mean" and found in ("none", "elements"):
        say(f"{adapter.name} returns a loss per {'row' if found == 'none' else 'logit'}: its mean is compared.")
        take_mean(adapter, recording.question.ignore_index)
    if common != recording.reduction:
        say(f"The mean of {recording.sides[common].adapter.name} is compared: {adapter.name} is a scalar.")
    return recording.sides[common], Side(adapter, common if is_user_loss(adapter.name) else None)
