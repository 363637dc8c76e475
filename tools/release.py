"""May a tag be published? The version stands in pyproject.toml alone; the tag and CHANGELOG.md must fit it.

    python -m tools.release v0.1.0      exit code 1 if that tag may not be published, with the reasons

`release.yml` runs this before anything else. Standard library only.
"""

import datetime
import re
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")  # of Keep a Changelog 1.1.0


class Entry(NamedTuple):
    """A section of the changelog.

    Args:
        version: such as "0.1.0", or None for what is not released.
        date: of the release, or None.
        kinds: its headings.
        lines: how many changes it lists.
    """

    version: str | None
    date: datetime.date | None
    kinds: tuple[str, ...]
    lines: int


def version(root: Path = ROOT) -> str:
    """Return the version in pyproject.toml."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["version"])


def numbers(release: str) -> tuple[int, ...]:
    """Return the three numbers of a version or a tag, or nothing if it is neither.

    Example:
        >>> numbers("v0.10.2"), numbers("0.9.0"), numbers("main")
        ((0, 10, 2), (0, 9, 0), ())
    """
    found = re.fullmatch(r"v?(\d+)\.(\d+)\.(\d+)", release)
    return tuple(map(int, found.groups())) if found else ()


def read_changelog(text: str) -> list[Entry]:
    """Return the sections of a changelog, from top to bottom.

    Raises:
        ValueError: a heading has another form than Keep a Changelog wants, or versions are not in order.
    """
    entries = []
    for heading, body in re.findall(r"^## (.*)\n((?:(?!## ).*\n?)*)", text, re.MULTILINE):
        found = re.fullmatch(r"Unreleased|(\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)", heading)
        if not found:
            raise ValueError(f"CHANGELOG.md: expected '## Unreleased' or '## 1.2.3 - 2026-01-31', found '## {heading}'")
        kinds = tuple(re.findall(r"^### (.*)$", body, re.MULTILINE))
        if others := [kind for kind in kinds if kind not in KINDS]:
            raise ValueError(f"CHANGELOG.md: '### {others[0]}' is none of {', '.join(KINDS)}")
        date = datetime.date.fromisoformat(found[2]) if found[2] else None
        entries.append(Entry(found[1], date, kinds, len(re.findall("^- ", body, re.MULTILINE))))
    order = [numbers(entry.version) if entry.version else (sys.maxsize,) for entry in entries]
    if order != sorted(set(order), reverse=True):
        raise ValueError("CHANGELOG.md: versions go from the newest to the oldest, each once, Unreleased first")
    return entries


def problems(tag: str, stated: str, changelog: str) -> list[str]:
    """Return why a tag may not be published, in words; nothing if it may.

    Args:
        tag: such as "v0.1.0".
        stated: the version in pyproject.toml.
        changelog: the text of CHANGELOG.md.
    """
    found = [] if tag == f"v{stated}" else [f"the tag is {tag}, and pyproject.toml has the version {stated}"]
    released = next((entry for entry in read_changelog(changelog) if entry.version), None)
    if released is None or released.version != stated:
        newest = "none" if released is None else released.version
        found.append(f"the newest release in CHANGELOG.md is {newest}: '## {stated} - DATE' is missing")
    elif not released.lines:
        found.append(f"CHANGELOG.md lists no change for {stated}")
    return found


def main(arguments: list[str]) -> int:
    """Return the exit code."""
    if len(arguments) != 1:
        print("usage: python -m tools.release TAG", file=sys.stderr)
        return 2
    try:
        found = problems(arguments[0], version(), (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    except ValueError as error:
        found = [str(error)]
    print("\n".join(found) or f"{arguments[0]} may be published")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
