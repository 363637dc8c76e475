"""Sphinx's source folder, from the files of the repository.

The Markdown pages are written for readers of the repository. Here they get the names that they have on the site, their
links are adapted, and marks in comments are replaced by what only a build can make:

    <!-- site sections -->                                         cards that lead to the sections
    <!-- site targets -->                                          the plot of the targets
    <!-- site gallery: begin --> ... <!-- site gallery: end -->    cards with pictures, in place of a table
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from tools.repository import is_relative, path_of, rename_links, source_link
from tools.site.sections import HOME, MADE, OTHER_NOTEBOOKS, SECTIONS, Section

ROOT = Path(__file__).parents[2]
CODE = {".py": "python", ".toml": "toml", ".yml": "yaml", ".json": "json"}
_COMMENT = re.compile(r"^( *)(```+|~~~+).*?^ *\2[`~]* *$|<!--.*?-->\n?", re.MULTILINE | re.DOTALL)


class SiteError(Exception):
    """What is wrong with a page, in words for the terminal."""


class Published(NamedTuple):
    """Where the repository is published.

    Args:
        url: its address, or None if it is not known.
        ref: the tag or commit that links to the source point to.
    """

    url: str | None
    ref: str


# --- Names ----------------------------------------------------------------------------------------------------------


def pages(root: Path = ROOT) -> dict[str, Section]:
    """Return the sections by key, with every page of the repository in one of them.

    Raises:
        SiteError: a page is in no section, or a section names a page that is not there.
    """
    found = {path.name for path in (root / "docs").glob("*.md")}
    found |= {path.name for path in root.glob("*.md")} - {HOME}
    notebooks = {f"notebooks/{path.name}" for path in (root / "notebooks").glob("*.ipynb")}
    listed = [page for section in SECTIONS.values() for page in section.pages if page not in MADE]
    if unlisted := sorted(found - {*listed}):
        raise SiteError(f"in no section of tools/site/sections.py: {', '.join(unlisted)}. Add each to one.")
    if missing := sorted({page for page in listed if not page.startswith("notebooks/")} - found):
        raise SiteError(f"in a section of tools/site/sections.py, but not there: {', '.join(missing)}")
    sections = {
        key: section._replace(pages=tuple(p for p in section.pages if not p.startswith("notebooks/") or p in notebooks))
        for key, section in SECTIONS.items()
    }
    others = tuple(sorted(notebooks - {*listed}))
    sections[OTHER_NOTEBOOKS] = sections[OTHER_NOTEBOOKS]._replace(pages=sections[OTHER_NOTEBOOKS].pages + others)
    return sections


def path_in_repository(page: str) -> str:
    """Return the path of a page that a section lists."""
    is_in_docs = "/" not in page and (ROOT / "docs" / page).is_file()
    return f"docs/{page}" if is_in_docs else page


def name_on_site(path: str) -> str | None:
    """Return the path below Sphinx's source folder of a file that is on the site, or None for other files.

    Example:
        >>> name_on_site("docs/options.md"), name_on_site("README.md"), name_on_site("lsce_jax/fused.py")
        ('options.md', 'index.md', None)
    """
    if path == HOME:
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.endswith(".md") and "/" not in path:
        return path.lower()
    return path if path.startswith("notebooks/") else None


# --- Content --------------------------------------------------------------------------------------------------------


def adapt(text: str, page: str, published: Published) -> str:
    """Return the Markdown of a page with links that are right on the site, and without comments.

    Args:
        text: the page.
        page: its path in the repository.
        published: where the source is, for links to files that are not on the site.

    Raises:
        SiteError: a link leads to a file that is not there.
    """

    def rename(target: str) -> str:
        if not is_relative(target):
            return target
        path, anchor = path_of(target, page)
        if not (ROOT / path).exists():
            raise SiteError(f"{page} links to {target}, which is not there")
        name = name_on_site(path)
        if name is None:
            return source_link(published.url, path + anchor, published.ref) if published.url else f"/source/{path}.md"
        return f"/{name}{anchor}"

    return without_comments(rename_links(text, rename))


def without_comments(text: str) -> str:
    """Return Markdown without comments; what looks like one in a block of code stays."""
    return _COMMENT.sub(lambda found: found[0] if found[2] else "", text)


def replace_mark(text: str, mark: str, replacement: str | Callable[[str], str]) -> str:
    """Return a page with something else in place of a mark, or of what stands between its two comments.

    Args:
        text: the page.
        mark: as in `<!-- site MARK -->`, or `<!-- site MARK: begin -->` and `<!-- site MARK: end -->`.
        replacement: a text, or a function of what stands between.

    Raises:
        SiteError: the page has no such mark, or several.
    """
    pattern = re.compile(rf"<!-- site {mark}(?: -->|: begin -->\n(.*?)<!-- site {mark}: end -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise SiteError(f"expected one mark <!-- site {mark} -->, found {len(pattern.findall(text))}")
    return pattern.sub(lambda found: replacement if isinstance(replacement, str) else replacement(found[1] or ""), text)


def adapt_notebook(text: str, page: str, published: Published) -> str:
    """Return a notebook whose text has links that are right on the site."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            source = adapt("".join(cell["source"]), page, published)
            cell["source"] = source.splitlines(keepends=True)
    # Without a kernel nothing says that there are lines for the shell.
    notebook["metadata"].setdefault("language_info", {"name": "python"}).setdefault("pygments_lexer", "ipython3")
    return json.dumps(notebook, indent=1)


def source_page(path: str) -> str:
    """Return a page that shows a file of the repository, for when there is no address to link to."""
    text = (ROOT / path).read_text(encoding="utf-8")
    fence = "`" * (max((len(run) for run in re.findall(r"`+", text)), default=0) + 3)
    return f"---\norphan: true\n---\n\n# {path}\n\n{fence}{CODE.get(Path(path).suffix, 'text')}\n{text}\n{fence}\n"


def linked_sources(texts: Iterable[str]) -> set[str]:
    """Return the paths whose source pages some texts link to."""
    return {path for text in texts for path in re.findall(r"\]\(/source/([^)#]+)\.md\)", text)}


# --- Sections -------------------------------------------------------------------------------------------------------


def title_and_summary(text: str) -> tuple[str, str]:
    """Return the title of a page, and the first sentence below it as plain Markdown."""
    title, _, body = text.partition("# ")[2].partition("\n")
    paragraphs = (block.strip() for block in body.split("\n\n"))
    prose = next((block for block in paragraphs if re.match(r"[A-Z*`\[]", block)), "")
    sentence = re.split(r"(?<=[.?:])\s", " ".join(prose.split()))[0]
    without_links = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", sentence)
    return title.strip(), re.sub(r":$", ".", without_links)


def first_markdown(text: str) -> str:
    """Return the Markdown cells of a notebook, one after the other."""
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def card(title: str, text: str, link: str) -> str:
    """Return a card that is a link to a page."""
    return f":::{{grid-item-card}} {title}\n:link: {link}\n:link-type: doc\n\n{text}\n:::\n"


def grid(cards: Iterable[str], columns: int = 3) -> str:
    """Return cards side by side: one a row on a phone, up to `columns` on a wide screen."""
    return f"::::{{grid}} 1 2 2 {columns}\n:gutter: 3\n\n" + "\n".join(cards) + "::::\n"


def toctree(names: Iterable[str]) -> str:
    """Return what makes pages the children of a page in the navigation."""
    return "```{toctree}\n:hidden:\n\n" + "".join(f"{name}\n" for name in names) + "```\n"


def document(page: str) -> str:
    """Return Sphinx's name of a page that a section lists: its path on the site without suffix.

    Example:
        >>> document("options.md"), document("CHANGELOG.md"), document("notebooks/same_loss.ipynb")
        ('/options', '/changelog', '/notebooks/same_loss')
    """
    name = name_on_site(path_in_repository(page)) or page
    return "/" + name.rpartition(".")[0]


def entry_of(key: str, section: Section) -> str:
    """Return the document that a section starts with: its only page, or the list of its pages."""
    return document(section.pages[0]) if len(section.pages) == 1 else f"/{key}/index"


def section_page(section: Section, texts: Mapping[str, str]) -> str:
    """Return the page of a section: for each of its pages a card with title and first sentence.

    Args:
        section: the section.
        texts: the Markdown of its pages, by the name that the section lists.
    """
    cards = [card(*title_and_summary(texts[page]), document(page)) for page in section.pages]
    return f"# {section.title}\n\n{section.about}\n\n{grid(cards)}\n{toctree(map(document, section.pages))}"
