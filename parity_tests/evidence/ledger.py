"""The ledger: for each adapter, device and dtype, the evidence that it is right.

Standard library only: the pytest plugin loads this in sessions that have nothing to do with losses.
"""

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from textwrap import wrap
from typing import Literal

from parity_tests.evidence.environment import installed_versions
from parity_tests.json_files import Optional, check_form, read_json
from parity_tests.texts import one_line

Kind = Literal["executed", "replayed", "interpreted", "simulated", "compiled", "not run"]
# From the strongest to the weakest.
KINDS: tuple[Kind, ...] = ("executed", "replayed", "interpreted", "simulated", "compiled", "not run")

# In the order of the tables. The same as `adapters.DEVICES` and `precision.DTYPES`, whose modules load NumPy.
DEVICES = ("cpu", "cuda", "tpu")
# With those for which losses are only compiled: no test runs there, and the support matrix has no column for them.
FAMILIES = (*DEVICES, "rocm")
DTYPES = ("float64", "float32", "bfloat16", "float16")

# A ledger keeps the versions of these packages.
PACKAGES = ("jax", "flax", "optax", "torch", "numpy", "libtpu")

Key = tuple[str, str, str]


@dataclass(frozen=True, order=True)
class Evidence:
    """A piece of evidence.

    Args:
        adapter: name of the adapter; it starts with its framework, as in "jax-fused".
        device: "cpu", "cuda", "tpu", or "rocm", for which losses are only compiled.
        dtype: of the logits.
        kind: ran on that device ("executed"), values recorded on another machine agreed with it ("replayed"), the
            program for that device ran in an interpreter ("interpreted"), or with the errors that the device's
            arithmetic may have ("simulated"), the device's compiler accepted it ("compiled"), or none of these
            ("not run").
        detail: a detail for the table, such as the name of the card.

    Raises:
        ValueError: a field is empty or not a string, there is no such device or kind, or the device has no such kind.
    """

    adapter: str
    device: str
    dtype: str
    kind: Kind
    detail: str = ""

    def __post_init__(self) -> None:
        """Check the fields: they come from tests and from files."""
        if not all(isinstance(field, str) for field in astuple(self)):
            raise ValueError(f"evidence consists of texts, got {astuple(self)}")
        if not (self.adapter and self.dtype):
            raise ValueError(f"evidence names an adapter and a dtype, got {astuple(self)}")
        if self.device not in FAMILIES:
            raise ValueError(f"there is no device {self.device!r}; the devices are {', '.join(FAMILIES)}")
        if self.device not in DEVICES and self.kind != "compiled":
            raise ValueError(f"for {self.device} losses are only compiled, got {self.kind!r}")
        if self.kind not in KINDS:
            raise ValueError(f"there is no kind of evidence {self.kind!r}; the kinds are {', '.join(KINDS)}")

    @property
    def key(self) -> Key:
        """The adapter, device and dtype."""
        return self.adapter, self.device, self.dtype

    @property
    def framework(self) -> str:
        """The framework that the adapter's name starts with."""
        return framework_of(self.adapter)


@dataclass(frozen=True)
class Session:
    """The evidence of one session, or of several with the same versions.

    Args:
        versions: versions of Python and packages, by name.
        evidence: the evidence.
        date: when it was found, the last day of several; as in 2026-11-26. Empty if it is not known.
    """

    versions: Mapping[str, str]
    evidence: frozenset[Evidence]
    date: str = ""


def framework_of(adapter: str) -> str:
    """Return the framework that an adapter's name starts with.

    Example:
        >>> framework_of("jax-fused-eager")
        'jax'
    """
    return adapter.partition("-")[0]


def session_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed `PACKAGES`."""
    return {"python": platform.python_version(), **installed_versions(PACKAGES)}


def merge(sessions: Iterable[Session]) -> list[Session]:
    """Merge the evidence of sessions with the same versions, in order of first appearance."""
    merged: dict[frozenset[tuple[str, str]], Session] = {}
    for session in sessions:
        versions = frozenset(session.versions.items())
        known = merged.get(versions, Session(session.versions, frozenset()))
        date = max(known.date, session.date)
        merged[versions] = Session(session.versions, known.evidence | session.evidence, date)
    return list(merged.values())


def strongest(evidence: Iterable[Evidence]) -> dict[Key, tuple[Kind, list[str]]]:
    """Return the strongest kind of evidence for each adapter, device and dtype, with all details of that kind.

    Example:
        >>> weak = Evidence("jax-fused", "tpu", "bfloat16", "not run")
        >>> strong = [Evidence("jax-fused", "tpu", "bfloat16", "compiled", detail) for detail in ("v5e", "v6e")]
        >>> strongest([weak, *strong])
        {('jax-fused', 'tpu', 'bfloat16'): ('compiled', ['v5e', 'v6e'])}
    """
    found: dict[Key, tuple[Kind, list[str]]] = {}
    for entry in sorted(evidence, key=lambda entry: (KINDS.index(entry.kind), entry)):
        kind, details = found.setdefault(entry.key, (entry.kind, []))
        if entry.kind == kind and entry.detail and entry.detail not in details:
            details.append(entry.detail)
    return found


_EVIDENCE = {"adapter": str, "device": str, "dtype": str, "kind": str, "detail": Optional(str)}
_FORM = {"sessions": [{"versions": {str: str}, "date": Optional(str), "evidence": [_EVIDENCE]}]}

# --- Files ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Session]:
    """Return the sessions in a file that `write` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no ledger.
    """
    try:
        content = read_json(path)
        check_form(content, _FORM)
        return [
            Session(each["versions"], frozenset(Evidence(**entry) for entry in each["evidence"]), each.get("date", ""))
            for each in content["sessions"]
        ]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no ledger as --parity-ledger writes it: {one_line(str(error))}") from error


def write(path: Path, sessions: Iterable[Session]) -> None:
    """Write a file, identical for identical evidence, one piece a line, so that a diff shows gains and losses."""
    blocks = []
    for session in sessions:
        entries = ",\n".join(f"    {json.dumps(asdict(entry))}" for entry in sorted(session.evidence))
        head = f'"date": {json.dumps(session.date)},\n   "versions": {json.dumps(session.versions)}'
        blocks.append(f'  {{\n   {head},\n   "evidence": [\n{entries}\n   ]\n  }}')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{\n "sessions": [\n' + ",\n".join(blocks) + "\n ]\n}\n", encoding="utf-8")


# --- Tables ---------------------------------------------------------------------------------------------------------


def in_order(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """Return the distinct names: first those in `order`, then the others alphabetically."""
    return sorted(set(names), key=lambda name: (order.index(name) if name in order else len(order), name))


def table(cells: Mapping[Key, str]) -> list[str]:
    """Return lines for a terminal: a row for each adapter and device, a column for each dtype."""
    dtypes = in_order((dtype for _, _, dtype in cells), DTYPES)
    pairs = sorted({key[:2] for key in cells}, key=lambda pair: (pair[0], FAMILIES.index(pair[1])))
    rows = [["adapter", "device", *dtypes]]
    rows += [[*pair, *(cells.get((*pair, dtype), "not run") for dtype in dtypes)] for pair in pairs]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def matrix(sessions: Sequence[Session]) -> str:
    """Return the support matrix in Markdown, and the versions that it was found with.

    A cell has every kind of evidence, the strongest first; "executed" has no need of others. Adapters of a framework
    with equal cells share a row, and so do dtypes. A combination of adapter and dtype that the ledger lacks is shown as
    not run.
    """
    found = by_kind(entry for session in sessions for entry in session.evidence)
    dtypes = in_order((dtype for _, _, dtype in found), DTYPES)
    rows: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for adapter in sorted({adapter for adapter, _, _ in found}):
        dtypes_of: dict[tuple[str, ...], list[str]] = {}
        for dtype in dtypes:
            cells = tuple(_cell(found.get((adapter, device, dtype), {})) for device in DEVICES)
            dtypes_of.setdefault(cells, []).append(dtype)
        for cells, equal in dtypes_of.items():
            rows.setdefault((framework_of(adapter), ", ".join(equal), cells), []).append(f"`{adapter}`")
    lines = [f"| adapter | dtypes | {' | '.join(map(str.upper, DEVICES))} |", "|---" * (2 + len(DEVICES)) + "|"]
    lines += [f"| {', '.join(names)} | {equal} | {' | '.join(cells)} |" for (_, equal, cells), names in rows.items()]
    return "\n".join([*lines, "", *_versions(sessions)])


def details(sessions: Sequence[Session]) -> str:
    """Return a table in Markdown of all evidence: for each kind and device, which adapters in which dtypes.

    Devices for which the evidence is the same share a row.
    """
    adapters_on: dict[tuple[Kind, str, str], dict[str, set[str]]] = {}
    for entry in sorted(entry for session in sessions for entry in session.evidence):
        if entry.kind == "not run":
            continue
        of_device = adapters_on.setdefault((entry.kind, entry.device, entry.detail), {})
        of_device.setdefault(entry.adapter, set()).add(entry.dtype)
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for kind, device, detail in sorted(
        adapters_on, key=lambda key: (KINDS.index(key[0]), FAMILIES.index(key[1]), key[2])
    ):
        with_dtypes: dict[tuple[str, str], list[str]] = {}
        for adapter, dtypes in adapters_on[kind, device, detail].items():
            key = framework_of(adapter), ", ".join(in_order(dtypes, DTYPES))
            with_dtypes.setdefault(key, []).append(f"`{adapter}`")
        for (_, dtypes_text), names in with_dtypes.items():
            rows.setdefault((kind, device, ", ".join(names), dtypes_text), []).append(detail or device)
    lines = ["| evidence | for | adapters | dtypes |", "|---|---|---|---|"]
    lines += [
        f"| {kind} | {_on_a_line(', '.join(named))} | {names} | {dtypes_text} |"
        for (kind, _, names, dtypes_text), named in rows.items()
    ]
    return "\n".join([*lines, "", *_versions(sessions)])


def by_kind(evidence: Iterable[Evidence]) -> dict[Key, dict[Kind, list[str]]]:
    """Return the details of each kind of evidence, the strongest first, for each adapter, device and dtype."""
    found: dict[Key, dict[Kind, list[str]]] = {}
    for entry in sorted(evidence, key=lambda entry: (KINDS.index(entry.kind), entry)):
        of_kind = found.setdefault(entry.key, {}).setdefault(entry.kind, [])
        if entry.detail and entry.detail not in of_kind:
            of_kind.append(entry.detail)
    return found


def _cell(kinds: Mapping[Kind, Sequence[str]]) -> str:
    """Return the kinds, and the names of the cards that it was executed on; other devices are in `details`."""
    if "executed" in kinds:
        names = kinds["executed"]
        return _on_a_line(f"executed ({', '.join(names)})" if names else "executed")
    return ", ".join(kind for kind in kinds if kind != "not run") or "not run"


def _on_a_line(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _versions(sessions: Sequence[Session]) -> list[str]:
    """Return a line for each session: the kinds and devices of its evidence, its date and versions.

    Where other sessions have more evidence of a kind for a device, the line says how much this one has.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for kind in KINDS[:-1]:
        for device in FAMILIES:
            keys = [
                {entry.key for entry in session.evidence if (entry.kind, entry.device) == (kind, device)}
                for session in sessions
            ]
            total = len(set().union(*keys))
            for session, own in zip(sessions, keys, strict=True):
                if own:
                    versions = ", ".join(f"{name} {text}" for name, text in session.versions.items())
                    date = f" {session.date}," if session.date else ""
                    part = "" if len(own) == total else f", {len(own)} of {total} combinations of adapter and dtype"
                    kinds_of = found.setdefault(f"{date} with {versions}{part}", {})
                    kinds_of.setdefault(kind, []).append(device.upper())
    lines = []
    for of_session, kinds in found.items():
        named = ", ".join(f"{kind} ({', '.join(devices)})" for kind, devices in kinds.items())
        lines += wrap(f"- {named}:{of_session}", 120, subsequent_indent="  ", break_on_hyphens=False)
    return lines
