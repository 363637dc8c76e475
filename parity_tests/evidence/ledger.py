"""What is known of each adapter, device and dtype, and how it is known.

Standard library only: the pytest plugin loads this in sessions that have nothing to do with losses.
"""

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Literal

from parity_tests.evidence.environment import installed_versions

Kind = Literal["executed", "replayed", "interpreted", "compiled", "not run"]
# From the strongest to the weakest.
KINDS: tuple[Kind, ...] = ("executed", "replayed", "interpreted", "compiled", "not run")

# In the order that tables have. The same as `adapters.DEVICES` and `precision.DTYPES`, whose modules load NumPy.
DEVICES = ("cpu", "cuda", "tpu")
DTYPES = ("float64", "float32", "bfloat16", "float16")

# Whose versions a ledger keeps.
PACKAGES = ("jax", "flax", "optax", "torch", "numpy")

Key = tuple[str, str, str]


@dataclass(frozen=True, order=True)
class Evidence:
    """How something is known.

    Args:
        adapter: name of the adapter; it starts with its framework, as in "jax-fused".
        device: "cpu", "cuda" or "tpu".
        dtype: of the logits.
        kind: ran on that device ("executed"), values recorded on another machine were held against it ("replayed"), a
            kernel ran in its framework's interpreter ("interpreted"), the device's compiler accepted it ("compiled"),
            or none of these ("not run").
        detail: what the table adds, such as the card's name.

    Raises:
        ValueError: a field is no text or empty, or there is no such device or kind.
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
        if self.device not in DEVICES:
            raise ValueError(f"there is no device {self.device!r}; the devices are {', '.join(DEVICES)}")
        if self.kind not in KINDS:
            raise ValueError(f"there is no kind of evidence {self.kind!r}; the kinds are {', '.join(KINDS)}")

    @property
    def key(self) -> Key:
        """What it is evidence for."""
        return self.adapter, self.device, self.dtype

    @property
    def framework(self) -> str:
        """The framework that the adapter's name starts with."""
        return framework_of(self.adapter)


@dataclass(frozen=True)
class Session:
    """What a session found, or several with the same versions.

    Args:
        versions: of Python and of packages, by name.
        evidence: what it found.
    """

    versions: Mapping[str, str]
    evidence: frozenset[Evidence]


def framework_of(adapter: str) -> str:
    """Return the framework that an adapter's name starts with.

    Example:
        >>> framework_of("jax-fused-eager")
        'jax'
    """
    return adapter.partition("-")[0]


def session_versions() -> dict[str, str]:
    """Return the versions of Python and of those of `PACKAGES` that are installed."""
    return {"python": platform.python_version(), **installed_versions(PACKAGES)}


def merge(sessions: Iterable[Session]) -> list[Session]:
    """Put together the evidence of sessions with the same versions; in order of their first appearance."""
    merged: dict[frozenset[tuple[str, str]], Session] = {}
    for session in sessions:
        versions = frozenset(session.versions.items())
        known = merged[versions].evidence if versions in merged else frozenset()
        merged[versions] = Session(session.versions, known | session.evidence)
    return list(merged.values())


def strongest(evidence: Iterable[Evidence]) -> dict[Key, tuple[Kind, list[str]]]:
    """Return the strongest kind that is known of each adapter, device and dtype, and the details of all of that kind.

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


# --- Files ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Session]:
    """Return what a file holds that `write` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no ledger.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [
            Session(dict(each["versions"]), frozenset(Evidence(**entry) for entry in each["evidence"]))
            for each in content["sessions"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no ledger as --parity-ledger writes it ({type(error).__name__}: {error})"
        ) from error


def write(path: Path, sessions: Iterable[Session]) -> None:
    """Write a file, the same for the same evidence; a line for each piece, so that a diff shows gains and losses."""
    blocks = []
    for session in sessions:
        entries = ",\n".join(f"    {json.dumps(asdict(entry))}" for entry in sorted(session.evidence))
        blocks.append(f'  {{\n   "versions": {json.dumps(session.versions)},\n   "evidence": [\n{entries}\n   ]\n  }}')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{\n "sessions": [\n' + ",\n".join(blocks) + "\n ]\n}\n", encoding="utf-8")


# --- Tables ---------------------------------------------------------------------------------------------------------


def in_order(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """Return names without repetition, those of `order` first, the others by the alphabet."""
    return sorted(set(names), key=lambda name: (order.index(name) if name in order else len(order), name))


def table(cells: Mapping[Key, str]) -> list[str]:
    """Return lines for a terminal: a row for each adapter and device, a column for each dtype."""
    dtypes = in_order((dtype for _, _, dtype in cells), DTYPES)
    pairs = sorted({key[:2] for key in cells}, key=lambda pair: (pair[0], DEVICES.index(pair[1])))
    rows = [["adapter", "device", *dtypes]]
    rows += [[*pair, *(cells.get((*pair, dtype), "not run") for dtype in dtypes)] for pair in pairs]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def matrix(sessions: Sequence[Session]) -> str:
    """Return the support matrix in Markdown, and the versions that it holds for.

    Adapters of a framework share a row where everything is equal, and so do dtypes. What is not in the ledger is not
    run: every adapter in it is shown for every dtype in it.
    """
    found = strongest(entry for session in sessions for entry in session.evidence)
    dtypes = in_order((dtype for _, _, dtype in found), DTYPES)
    rows: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for adapter in sorted({adapter for adapter, _, _ in found}):
        dtypes_of: dict[tuple[str, ...], list[str]] = {}
        for dtype in dtypes:
            cells = tuple(_cell(*found.get((adapter, device, dtype), ("not run", []))) for device in DEVICES)
            dtypes_of.setdefault(cells, []).append(dtype)
        for cells, equal in dtypes_of.items():
            rows.setdefault((framework_of(adapter), ", ".join(equal), cells), []).append(f"`{adapter}`")
    lines = [f"| adapter | dtypes | {' | '.join(map(str.upper, DEVICES))} |", "|---" * (2 + len(DEVICES)) + "|"]
    lines += [f"| {', '.join(names)} | {equal} | {' | '.join(cells)} |" for (_, equal, cells), names in rows.items()]
    return "\n".join([*lines, "", *_versions(sessions)])


def _cell(kind: Kind, details: list[str]) -> str:
    text = f"{kind} ({', '.join(details)})" if details else kind
    return " ".join(text.replace("|", "\\|").split())


def _versions(sessions: Sequence[Session]) -> list[str]:
    """Return a line for each session, kind and device, which says how much of what is known that session found."""
    lines = []
    for kind in KINDS[:-1]:
        for device in DEVICES:
            keys = [
                {entry.key for entry in session.evidence if (entry.kind, entry.device) == (kind, device)}
                for session in sessions
            ]
            total = len(set().union(*keys))
            for session, own in zip(sessions, keys, strict=True):
                if own:
                    versions = ", ".join(f"{name} {text}" for name, text in session.versions.items())
                    part = "" if len(own) == total else f", {len(own)} of {total} combinations of adapter and dtype"
                    lines.append(f"- {kind} ({device.upper()}) with {versions}{part}")
    return lines
