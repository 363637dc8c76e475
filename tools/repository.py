"""Where the project is published, from the environment or from git, and links that point there.

No file of the project holds the address. It comes from LSCE_REPOSITORY_URL, which the workflows set to the repository
that they run in, or else from the git remote `origin`. LSCE_REPOSITORY_REF is the tag that links point to; without it
they point to HEAD, the newest commit of the default branch. LSCE_SITE_URL is where the documentation is published.
Standard library only: `hatch_metadata.py` runs this in the environment that builds the package.
"""

import os
import posixpath
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

PICTURES = (".png", ".svg", ".jpg", ".gif", ".webp")
# Code is matched first, so that brackets and parentheses in it are no links. `](` also ends a text that holds code.
_LINK = re.compile(
    r"(?P<code>^ *(?P<fence>```+|~~~+).*?^ *(?P=fence)[`~]* *$|(?<!`)(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))"
    r"|\]\((?P<target>[^()\s]+)\)",
    re.MULTILINE | re.DOTALL,
)


def repository_url(root: Path, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the address of the repository for a browser, or None if it is not known.

    Raises:
        ValueError: LSCE_REPOSITORY_URL is no address of a repository.
    """
    given = environment.get("LSCE_REPOSITORY_URL", "")
    if given:
        address = web_address(given)
        if address is None:
            raise ValueError(f"LSCE_REPOSITORY_URL is {given!r}; expected an address such as https://HOST/OWNER/NAME")
        return address
    # The sources may have been unpacked below a repository of something else, whose address would be wrong.
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():
        return None
    return web_address(_git(root, "remote", "get-url", "origin") or "")


def web_address(remote: str) -> str | None:
    """Return the address for a browser of what `git clone` takes, without user names, passwords and `.git`.

    Example:
        >>> web_address("git@example.com:owner/name.git")
        'https://example.com/owner/name'
        >>> web_address("/home/somebody/name")
    """
    parts = urlsplit(remote)
    if parts.scheme in ("http", "https") and parts.hostname:
        host = parts.hostname if parts.port is None else f"{parts.hostname}:{parts.port}"
        scheme, path = parts.scheme, parts.path
    elif parts.scheme == "ssh" and parts.hostname:
        scheme, host, path = "https", parts.hostname, parts.path
    elif found := re.fullmatch(r"[\w.-]+@([\w.-]+):(?!/)(.+)", remote):
        scheme, host, path = "https", *found.groups()
    else:
        return None
    path = path.strip("/").removesuffix(".git")
    return f"{scheme}://{host}/{path}" if path else None


def source_link(url: str, path: str, ref: str = "HEAD") -> str:
    """Return the address of a file in the repository: of the page that shows it, or of a picture itself.

    Example:
        >>> source_link("https://example.com/owner/name", "docs/options.md#axis")
        'https://example.com/owner/name/blob/HEAD/docs/options.md#axis'
    """
    kind = "raw" if path.endswith(PICTURES) else "blob"
    return f"{url}/{kind}/{ref}/{path}"


def rename_links(text: str, rename: Callable[[str], str]) -> str:
    """Return Markdown with another target for each link and picture. What stands in code is no link.

    Example:
        >>> rename_links("[one](a.md) and `[no](b.md)`", str.upper)
        '[one](A.MD) and `[no](b.md)`'
    """
    return _LINK.sub(lambda found: found[0] if found["code"] else f"]({rename(found['target'])})", text)


def is_relative(target: str) -> bool:
    """Return whether a link leads to another file of the repository."""
    parts = urlsplit(target)
    return not parts.scheme and not parts.netloc and bool(parts.path) and not parts.path.startswith("/")


def path_of(target: str, page: str) -> tuple[str, str]:
    """Return the path in the repository that a relative link of a page leads to, and its anchor, `#` included.

    Example:
        >>> path_of("../README.md#install", "docs/options.md")
        ('README.md', '#install')
    """
    path, hash_sign, anchor = target.partition("#")
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), path)), hash_sign + anchor


def relative_links(text: str) -> list[str]:
    """Return the targets of links and pictures in Markdown that lead to files beside it.

    Example:
        >>> relative_links("[one](a.md), [two](https://example.com), [three](#here)")
        ['a.md']
    """
    found: list[str] = []
    rename_links(text, lambda target: found.append(target) or target if is_relative(target) else target)
    return found


def with_absolute_links(text: str, page: str, url: str, ref: str) -> str:
    """Return the Markdown of a page with links that work from anywhere.

    Args:
        text: the page.
        page: its path in the repository.
        url: the address of the repository.
        ref: the tag or commit that links point to.
    """

    def absolute(target: str) -> str:
        return source_link(url, "".join(path_of(target, page)), ref) if is_relative(target) else target

    return rename_links(text, absolute)


def project_urls(url: str | None, site: str | None, ref: str) -> dict[str, str]:
    """Return the addresses for the metadata of the package, by label."""
    urls = {}
    if site:
        urls["Documentation"] = site
    if url:
        urls.setdefault("Documentation", f"{url}/tree/{ref}/docs")
        urls |= {"Source": url, "Issues": f"{url}/issues", "Changelog": source_link(url, "CHANGELOG.md", ref)}
    return urls


def _git(root: Path, *arguments: str) -> str | None:
    """Return what git prints, or None if it fails or is not there."""
    try:
        found = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
