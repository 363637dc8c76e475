"""Is the built site whole? Every link and anchor inside it must lead somewhere, and no page loads from another site."""

from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit


class Page(NamedTuple):
    """What a page offers and asks for.

    Args:
        anchors: what a link may name after `#`.
        links: where it leads to, and the files that it shows or loads.
        loaded: those of the links that a browser follows by itself.
    """

    anchors: frozenset[str]
    links: tuple[str, ...]
    loaded: tuple[str, ...]


_NOT_LOADED = ("canonical", "next", "prev", "search", "index", "author", "copyright")


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep anchors and links."""
        given = {name: value for name, value in attrs if value}
        self.anchors |= {given[name] for name in ("id", "name") if name in given and tag != "meta"}
        self.links += [given[name] for name in ("href", "src") if name in given]
        if "src" in given:
            self.loaded.append(given["src"])
        elif tag == "link" and "href" in given and given.get("rel") not in _NOT_LOADED:
            self.loaded.append(given["href"])


def read(html: str) -> Page:
    """Return anchors and links of a page."""
    reader = _Reader()
    reader.feed(html)
    return Page(frozenset(reader.anchors), tuple(reader.links), tuple(reader.loaded))


def broken_links(folder: Path) -> list[str]:
    """Return the links inside a folder of HTML pages that lead nowhere or load from another site, in words."""
    paths = (path for path in sorted(folder.rglob("*.html")) if "_static" not in path.parts)  # templates of the theme
    pages = {path: read(path.read_text(encoding="utf-8")) for path in paths}
    found = []
    for path, page in pages.items():
        found += [
            f"{path.relative_to(folder)}: loads {link} from another site" for link in page.loaded if _is_away(link)
        ]
        for link in page.links:
            parts = urlsplit(link)
            if _is_away(link) or parts.scheme or link == "#":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            if not target.is_file():
                found.append(f"{path.relative_to(folder)}: {link} is not there")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{path.relative_to(folder)}: {link} has no such anchor")
    return found


def _is_away(link: str) -> bool:
    return bool(urlsplit(link).netloc)
