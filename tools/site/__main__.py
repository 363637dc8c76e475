"""Build the site into out/site/html, strictly, and check it. `make docs` runs the code of the pages first, then this.

python -m tools.site
python -m tools.site --external     look up the addresses of other sites, too; needs a network
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import build_main
from sphinx.util.inventory import InventoryFile

from tools import house
from tools.repository import repository_url
from tools.site import api, commands, gallery, targets, version
from tools.site.check import broken_links
from tools.site.sections import HOME, SECTIONS, Section
from tools.site.sources import (
    ROOT,
    Published,
    SiteError,
    adapt,
    adapt_notebook,
    card,
    entry_of,
    first_markdown,
    grid,
    linked_sources,
    name_on_site,
    pages,
    path_in_repository,
    replace_mark,
    section_page,
    source_page,
    toctree,
)

OUTPUT = ROOT / "out" / "site"
CONFIGURATION = Path(__file__).parent


# --- Pages ----------------------------------------------------------------------------------------------------------


def write_sources(folder: Path, published: Published, site: str) -> None:
    """Write Sphinx's source folder.

    Args:
        folder: where it will be.
        published: where the source is published.
        site: where this site will be published, or nothing.
    """
    sections = pages()
    texts = markdown_pages(sections, published, site)
    for page, notebook in notebook_pages(sections, published).items():
        texts[page] = first_markdown(notebook)
        write(folder / page, notebook)
    for key, section in sections.items():
        if len(section.pages) > 1:
            listed = {page: texts[str(name_on_site(path_in_repository(page)))] for page in section.pages}
            texts[f"{key}/index.md"] = section_page(section, listed)
    for path in linked_sources(texts.values()):
        texts[f"source/{path}.md"] = source_page(path)
    for name, text in {**texts, **api.pages(), "api/commands.rst": commands.page()}.items():
        if not name.endswith(".ipynb"):
            write(folder / name, text)
    for name, picture in targets.pictures().items():
        write(folder / "images" / name, picture)
    for pattern in ("*.json", "images/**/*.png"):
        for path in (ROOT / "docs").glob(pattern):
            write(folder / path.relative_to(ROOT / "docs"), path.read_bytes())


def write(path: Path, content: str | bytes) -> None:
    """Write a file, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def notebook_pages(sections: dict[str, Section], published: Published) -> dict[str, str]:
    """Return the notebooks of the site, as they are stored, by path below Sphinx's source folder."""
    made = {}
    for page in sorted(page for section in sections.values() for page in section.pages if page.endswith(".ipynb")):
        made[page] = adapt_notebook((ROOT / page).read_text(encoding="utf-8"), page, published)
    return made


def markdown_pages(sections: dict[str, Section], published: Published, site: str) -> dict[str, str]:
    """Return the Markdown pages of the site, by path below Sphinx's source folder."""
    made = {"versions.md": version.page(ROOT, site), "house.md": house.page()}
    for page in {page for section in sections.values() for page in section.pages if page.endswith(".md")} - {*made}:
        path = path_in_repository(page)
        made[str(name_on_site(path))] = _marks_replaced(path, published)
    made["index.md"] = (
        _marks_replaced(HOME, published)
        + "\n"
        + toctree(f"{section.title} <{entry_of(key, section)}>" for key, section in sections.items())
    )
    return made


def _marks_replaced(path: str, published: Published) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    if path == HOME:
        cards = (
            card(section.title, section.about, entry_of(key, section))
            for key, section in SECTIONS.items()
            if key != "project"
        )
        text = replace_mark(text, "sections", grid(cards))
    elif path == "docs/conventions.md":
        text = replace_mark(text, "targets", targets.markdown())
    elif path == "docs/examples.md":
        text = replace_mark(text, "gallery", lambda table: gallery.cards(table, published))
    return adapt(text, path, published)


# --- Building and checking ------------------------------------------------------------------------------------------


def sphinx(builder: str) -> None:
    """Run one of Sphinx's builders, for which every warning is an error.

    Raises:
        SiteError: there were warnings.
    """
    options = ["--fail-on-warning", "--nitpicky", "--quiet", "--builder", builder, "--conf-dir", str(CONFIGURATION)]
    if build_main([*options, str(OUTPUT / "source"), str(OUTPUT / builder)]):
        raise SiteError(f"Sphinx has found what is said above; lines are those of the pages in {OUTPUT / 'source'}")


def check() -> None:
    """Raise SiteError if a link or anchor leads nowhere, or a public name has no entry."""
    html = OUTPUT / "html"
    inventory = InventoryFile.loads((html / "objects.inv").read_bytes(), uri="")
    known = {name for kind, entries in inventory.data.items() if kind.startswith("py:") for name in entries}
    missing = {public.full_name for public in api.all_public_names()} - known
    found = [*broken_links(html), *(f"no entry for {name}" for name in sorted(missing))]
    if found:
        raise SiteError("\n".join(found))


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description="Build the site into out/site/html, strictly, and check it.")
    parser.add_argument("--external", action="store_true", help="look up links to other sites, too")
    arguments = parser.parse_args()
    shutil.rmtree(OUTPUT, ignore_errors=True)  # what is no longer made must not seem to be there
    site = os.environ.get("LSCE_SITE_URL", "").rstrip("/")
    published = Published(repository_url(ROOT), os.environ.get("LSCE_REPOSITORY_REF") or "HEAD")
    try:
        write_sources(OUTPUT / "source", published, site)
        sphinx("html")
        check()
        if arguments.external:
            sphinx("linkcheck")
    except SiteError as error:
        print(f"FAILED {error}", file=sys.stderr)
        return 1
    if published.url is None:
        print("No LSCE_REPOSITORY_URL and no git remote `origin` with an address: links to the source stay on the site")
    if not arguments.external:
        print("Links to other sites were not looked up: --external (LINKS=external of make) does")
    print(f"{OUTPUT.relative_to(ROOT) / 'html' / 'index.html'}: links, anchors and public names are complete")
    return 0


if __name__ == "__main__":
    sys.exit(main())
