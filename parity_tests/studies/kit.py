"""The kit: what one machine with a device can tell of the losses, in a folder that another checkout can check.

`kit.json` says what agreed there, and has the fingerprints and the benchmarks. The results themselves are in bundles
beside it, one for each dtype. So nobody has to believe what `kit.json` says: `evidence_of` computes the truths again,
takes the bounds from the table of devices as it is today, and compares every recorded result anew.

Refused, with the reason: a kit that was edited or damaged (SHA-256 of `kit.json`, of each bundle and of its arrays), of
another version of lsce, with cases that this checkout makes otherwise, or without all cases.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from parity_tests.evidence.environment import installed_versions
from parity_tests.evidence.ledger import DEVICES, PACKAGES, Evidence, Session
from parity_tests.json_files import check_form, read_json
from parity_tests.losses.adapters import Adapter
from parity_tests.losses.registry import ELSEWHERE, ENTRIES
from parity_tests.studies.bundle import MANIFEST, Bundle, RecordedAdapter, read_bundle
from parity_tests.studies.replays import truth_of_today
from parity_tests.studies.sealed_folders import RecordingError
from parity_tests.studies.verdicts import Outcome, examine
from parity_tests.texts import one_line
from parity_tests.truth.cases import Case
from parity_tests.truth.devices import device_of_kind, of_own_losses
from parity_tests.truth.files import write_whole
from parity_tests.truth.linear_cases import all_case_names

FORMAT = 1
REPORT = "kit.json"
AGAIN = "Make the kit again."

# Every adapter but those of programs for other platforms, which belong to the CPU.
ADAPTERS = tuple(name for name in ENTRIES if not name.endswith(ELSEWHERE))
COMPILED = "-compiled"  # torch.compile takes seconds for each combination of options
# The cases that tell most losses apart.
FEW_CASES = (
    "uniform_mean",
    "large_offset",
    "dominant",
    "at_optimum",
    "ties_max_sup",
    "minus_infinity",
    "minus_infinity_unsmoothed",
    "class_mask_near_one",
    "ignored",
    "where_soft",
    "bad_labels",
    "everything",
    "axis_in_the_middle",
    "no_rows",
)


class KitError(ValueError):
    """A kit cannot be read or trusted; the message says why, and what to do, in one line."""

    def __init__(self, message: str) -> None:
        """Take the message; what it quotes of a file may have any characters."""
        super().__init__(one_line(message))


_FORM = {
    "date": str,
    "commit": (None, str),
    "device": str,
    "cards": {str: str},
    "bundles": {str: str},
    "environment": {"versions": {str: str}, ...: None},
    ...: None,  # what was measured, which is not read
}


@dataclass(frozen=True)
class Line:
    """What an adapter did in the cases of one dtype.

    Args:
        adapter, dtype: their names.
        ours: whether it must agree; a peer is shown for comparison.
        cases: number of cases that it was called in.
        agree: in how many it is within its bounds.
        share: its largest share of a bound; inf for a failure.
        worst: the case of that share.
        reason: what is wrong there; empty if nothing is.
    """

    adapter: str
    dtype: str
    ours: bool
    cases: int
    agree: int
    share: float
    worst: str
    reason: str

    @property
    def is_right(self) -> bool:
        """Whether it was called, and every case agrees."""
        return self.cases == self.agree > 0


def takes(adapter: Adapter, case: Case) -> bool:
    """Return whether an adapter is called in a case: what torch compiles in few of them."""
    return not adapter.name.endswith(COMPILED) or case.name in FEW_CASES


def lines_of(bundle: Bundle) -> list[Line]:
    """Return what the adapters of a bundle did, by its own truths and bounds."""
    return _lines(
        (each.case, examine(adapter, each.case, each.truth)) for each in bundle.records for adapter in _all(bundle)
    )


def _all(bundle: Bundle) -> list[RecordedAdapter]:
    return list(bundle.adapters.values())


def _lines(outcomes: Iterable[tuple[Case, Outcome]]) -> list[Line]:
    by_adapter: dict[tuple[str, str], list[Outcome]] = {}
    for case, outcome in outcomes:
        if outcome.status != "unsupported":
            by_adapter.setdefault((outcome.adapter, case.dtype), []).append(outcome)
    return [_line(name, dtype, found) for (name, dtype), found in by_adapter.items()]


def _line(name: str, dtype: str, outcomes: Sequence[Outcome]) -> Line:
    agree = sum(outcome.status == "agree" for outcome in outcomes)
    worst = max(outcomes, key=_share)
    reason = "" if worst.status == "agree" else str(worst.comparison or worst.reason)
    return Line(name, dtype, _is_ours(name), len(outcomes), agree, _share(worst), worst.case, reason)


def _share(outcome: Outcome) -> float:
    return outcome.comparison.share if outcome.comparison else float("inf")


# --- Files ----------------------------------------------------------------------------------------------------------


def bundle_folder(folder: Path, dtype: str) -> Path:
    """Return where the bundle of a dtype is."""
    return folder / f"bundle-{dtype}"


def write_kit(folder: Path, content: dict[str, Any], dtypes: Iterable[str]) -> None:
    """Write `kit.json` beside the bundles of some dtypes.

    Raises:
        OSError: it cannot be written.
    """
    bundles = {dtype: _sha256(bundle_folder(folder, dtype) / MANIFEST) for dtype in dtypes}
    kit = {"command": "kit", "format": FORMAT, **content, "bundles": bundles}
    kit["sha256"] = _digest(kit)
    write_whole(folder / REPORT, json.dumps(kit, indent=1) + "\n")


def is_kit(path: Path) -> bool:
    """Return whether a path is the folder or the file of a kit."""
    return path.is_dir() or path.name == REPORT


def read_kit(path: Path) -> tuple[dict[str, Any], list[Bundle]]:
    """Return what `kit.json` says, and the bundles beside it, after checking every hash and the version of lsce.

    Args:
        path: the folder of the kit, or its `kit.json`.

    Raises:
        KitError: it is no kit, was changed after it was written, or is of another version of lsce.
    """
    file = path / REPORT if path.is_dir() else path
    try:
        kit = read_json(file)
        if kit["format"] != FORMAT:
            raise KitError(f"{file} has format {kit['format']}, this lsce reads format {FORMAT}. {AGAIN}")
        if kit["sha256"] != _digest({name: value for name, value in kit.items() if name != "sha256"}):
            raise KitError(f"{file} was edited or damaged: it does not fit its SHA-256. Copy it again.")
        check_form(kit, _FORM)
        if kit["device"] not in DEVICES:
            raise ValueError(f"the devices are {', '.join(DEVICES)}, not {kit['device']!r}")
        bundles = [_read_part(file.parent, dtype, digest) for dtype, digest in kit["bundles"].items()]
        there = kit["environment"]["versions"]["lsce"]
    except OSError as error:
        hint = "Make one with `lsce-parity kit DIR`."
        if file.with_name(MANIFEST).is_file():
            hint = "That is a bundle, which `lsce-parity replay` reads."
        raise KitError(f"there is no kit: {file}: {error.strerror}. {hint}") from error
    except KitError:
        raise
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise KitError(f"{file} is not what `lsce-parity kit` writes ({type(error).__name__}: {error})") from error
    here = installed_versions(["lsce"]).get("lsce")
    if there != here:
        raise KitError(
            f"{file} is of lsce {there}, this is lsce {here}. Check that version out, or make the kit again."
        )
    if not bundles:
        raise KitError(f"{file} has no results. {AGAIN}")
    return kit, bundles


def _read_part(folder: Path, dtype: str, digest: str) -> Bundle:
    part = bundle_folder(folder, dtype)
    try:
        bundle = read_bundle(part)
    except RecordingError as error:
        raise KitError(str(error)) from error
    if _sha256(part / MANIFEST) != digest:
        raise KitError(
            f"{part} is of another kit: it does not fit the SHA-256 in {REPORT}. Copy the whole folder again."
        )
    return bundle


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(kit: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(kit, sort_keys=True).encode()).hexdigest()


# --- Evidence -------------------------------------------------------------------------------------------------------


def evidence_of(kit: dict[str, Any], bundles: Sequence[Bundle]) -> Iterator[tuple[Bundle, Session, list[Line]]]:
    """Yield for each bundle what it proves, and what the adapters did by the truths and bounds of today.

    An adapter was executed in a dtype if all its results there agree.

    Raises:
        KitError: a bundle lacks cases, or has another case than this checkout makes of that name.
    """
    device, cards = kit["device"], kit["cards"]
    for bundle in bundles:
        _check_whole(bundle)
        _check_cards(bundle, cards)
        ours = [
            _with_bounds_of_today(adapter, cards[adapter.framework])
            for name, adapter in bundle.adapters.items()
            if name in ENTRIES and _is_ours(name)
        ]
        try:
            truths = [(each.case, truth_of_today(each)) for each in bundle.records]
        except RecordingError as error:
            raise KitError(str(error)) from error
        lines = _lines((case, examine(adapter, case, truth)) for case, truth in truths for adapter in ours)
        evidence = frozenset(
            Evidence(line.adapter, device, line.dtype, "executed", cards[bundle.adapters[line.adapter].framework])
            for line in lines
            if line.is_right
        )
        yield bundle, Session(_versions(bundle.environment), evidence, kit["date"]), lines


def _is_ours(name: str) -> bool:
    return name not in ENTRIES or ENTRIES[name].kind == "ours"


def _check_whole(bundle: Bundle) -> None:
    """Check that every case is there: one case alone is no evidence."""
    missing = set(all_case_names()) - {case.name for case in bundle.cases}
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise KitError(
            f"the kit has {len(bundle.cases)} cases in {bundle.cases[0].dtype}; {some} and others are missing. "
            "Evidence needs all: make the kit again, without --quick and --case."
        )


def _check_cards(bundle: Bundle, cards: Mapping[str, str]) -> None:
    missing = {each.framework for name, each in bundle.adapters.items() if name in ENTRIES} - cards.keys()
    if missing:
        raise KitError(f"the kit does not say on which card {', '.join(sorted(missing))} ran. {AGAIN}")


def _with_bounds_of_today(adapter: RecordedAdapter, card: str) -> RecordedAdapter:
    """Return the adapter with the bounds of its card, from the table of devices as it is today."""
    device = device_of_kind(adapter.framework, adapter.device, card)
    arithmetic = replace(of_own_losses(device.arithmetic, device.family), narrow=adapter.arithmetic.narrow)
    return replace(adapter, arithmetic=arithmetic)


def _versions(environment: dict[str, Any]) -> dict[str, str]:
    versions = environment["versions"]
    return {"python": environment["python"], **{name: versions[name] for name in PACKAGES if name in versions}}


def as_json(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """Return lines for JSON, with an infinite share as text."""
    return [{**asdict(line), "share": line.share if line.share < float("inf") else "inf"} for line in lines]
