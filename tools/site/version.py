"""The version of the project, which pyproject.toml states and nothing else, and the versions that are published."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

NEWEST = "dev"  # the folder of the default branch


def version(root: Path) -> str:
    """Return the version in pyproject.toml."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["version"])


def released(root: Path) -> list[str]:
    """Return the tags of releases, newest first; none where there is no git."""
    try:
        listed = subprocess.run(
            ["git", "-C", str(root), "tag", "--list", "v*"], capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []
    return sorted((tag for tag in listed if _numbers(tag)), key=_numbers, reverse=True)


def _numbers(tag: str) -> tuple[int, ...]:
    found = re.fullmatch(r"v(\d+)\.(\d+)\.(\d+)", tag)
    return tuple(map(int, found.groups())) if found else ()


def switcher(site: str, folders: list[str]) -> str:
    """Return the list of versions that the theme's menu reads, as JSON.

    Args:
        site: the address of the site.
        folders: the folders of the versions on the site, such as "v0.1.0" and "dev".
    """
    tags = sorted((folder for folder in folders if _numbers(folder)), key=_numbers, reverse=True)
    entries = [
        {"name": f"{tag} (stable)" if i == 0 else tag, "version": tag, "url": f"{site}/{tag}/", "preferred": i == 0}
        for i, tag in enumerate(tags)
    ]
    if NEWEST in folders:
        entries.append({"name": NEWEST, "version": NEWEST, "url": f"{site}/{NEWEST}/", "preferred": False})
    return json.dumps(entries, indent=2) + "\n"


def page(root: Path, site: str) -> str:
    """Return the Markdown page that lists the versions.

    Args:
        root: the repository, whose tags are read.
        site: where the versions are published, or nothing.
    """
    lines = [
        "# Versions",
        "",
        f"These pages describe version {version(root)} as it is in the source from which they were built.",
        "",
        "Each release is a tag such as `v1.2.3`, and has these pages in a folder of that name beside this one.",
        f"`{NEWEST}` is the default branch. The [changelog](/changelog.md) says what has changed in each.",
        "",
    ]
    tags = released(root)
    if tags:
        folders = [*tags, NEWEST]
        lines += [f"- [{folder}]({site}/{folder}/)" if site else f"- {folder}" for folder in folders]
    else:
        lines.append("Nothing has been released yet.")
    return "\n".join(lines) + "\n"
