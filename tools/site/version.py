"""The versions that are published: the list for the menu of the theme, and the page that lists them.

python -m tools.site.version ADDRESS FOLDER      write versions.json for the folders of versions in FOLDER
"""

import json
import subprocess
import sys
from pathlib import Path

from tools.release import numbers, version

NEWEST = "dev"  # the folder of the default branch


def released(root: Path) -> list[str]:
    """Return the tags of releases, newest first; none where there is no git."""
    try:
        listed = subprocess.run(
            ["git", "-C", str(root), "tag", "--list", "v*"], capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []
    return sorted((tag for tag in listed if numbers(tag)), key=numbers, reverse=True)


def switcher(site: str, folders: list[str]) -> str:
    """Return the list of versions that the theme's menu reads, as JSON.

    Args:
        site: the address of the site.
        folders: the folders of the versions on the site, such as "v0.1.0" and "dev".
    """
    tags = sorted((folder for folder in folders if numbers(folder)), key=numbers, reverse=True)
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


def main(site: str, folder: Path) -> None:
    """Write the list for the menu, and a first page that leads to the newest release, or to the default branch."""
    folders = sorted(path.name for path in folder.iterdir() if (path / "index.html").is_file())
    listed = switcher(site.rstrip("/"), folders)
    (folder / "versions.json").write_text(listed, encoding="utf-8")
    first = json.loads(listed)[0]["version"]
    redirect = f'<!doctype html><meta http-equiv="refresh" content="0; url={first}/"><a href="{first}/">lsce</a>\n'
    (folder / "index.html").write_text(redirect, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
