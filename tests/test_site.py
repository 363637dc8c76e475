"""What `make docs` makes of pages, docstrings and pictures before Sphinx sees them; `make docs` checks the rest."""

import json
import re
from pathlib import Path

import pytest

import lsce_jax
import lsce_parity
import lsce_spec
import lsce_torch
from lsce_spec import CONVENTIONS
from tools.release import version
from tools.site import api, commands, gallery, sources, targets
from tools.site import version as versions
from tools.site.check import broken_links, read
from tools.site.sections import HOME, MADE, SECTIONS
from tools.site.sources import ROOT, Published, SiteError, adapt

UNKNOWN, KNOWN = Published(None, "HEAD"), Published("https://example.com/o/n", "v1.0.0")


# --- Pages ----------------------------------------------------------------------------------------------------------


def test_every_page_is_in_a_section_once() -> None:
    listed = [page for section in sources.pages().values() for page in section.pages]
    assert len(listed) == len({*listed})
    on_disk = {path.name for path in (ROOT / "docs").glob("*.md")} | {p.name for p in ROOT.glob("*.md")} - {HOME}
    assert on_disk <= {*listed}
    assert {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")} <= {*listed}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a folder with empty pages in the places of those that the sections list, and without notebooks."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "notebooks").mkdir()
    for page in (page for section in SECTIONS.values() for page in section.pages):
        if page.endswith(".md") and page not in MADE:
            (tmp_path / ("" if page[0].isupper() else "docs") / page).touch()
    return tmp_path


def test_pages_and_sections_must_be_the_same(repository: Path) -> None:
    (repository / "notebooks" / "mine.ipynb").touch()  # which finds its place by itself
    listed = sources.pages(repository)
    assert (
        [page for section in listed.values() for page in section.pages if ".ipynb" in page]
        == [listed["start"].pages[-1]]
        == ["notebooks/mine.ipynb"]
    )
    (repository / "docs" / "forgotten.md").touch()
    with pytest.raises(SiteError, match=r"in no section of tools/site/sections.py: forgotten.md"):
        sources.pages(repository)
    (repository / "docs" / "forgotten.md").unlink()
    (repository / "docs" / "options.md").unlink()
    with pytest.raises(SiteError, match=r"but not there: options.md"):
        sources.pages(repository)


@pytest.mark.parametrize(
    ("target", "unknown", "known"),
    [
        ("docs/options.md#axis", "/options.md#axis", "/options.md#axis"),
        ("CONTRIBUTING.md", "/contributing.md", "/contributing.md"),
        ("docs/images/digits_parity.png", "/images/digits_parity.png", "/images/digits_parity.png"),
        ("lsce_jax/fused.py", "/source/lsce_jax/fused.py.md", "https://example.com/o/n/blob/v1.0.0/lsce_jax/fused.py"),
        ("https://example.com/x", "https://example.com/x", "https://example.com/x"),
        ("#here", "#here", "#here"),
    ],
)
def test_links(target: str, unknown: str, known: str) -> None:
    assert adapt(f"[a `b`]({target})", "README.md", UNKNOWN) == f"[a `b`]({unknown})"
    assert adapt(f"[a `b`]({target})", "README.md", KNOWN) == f"[a `b`]({known})"


def test_links_from_docs_and_from_notebooks() -> None:
    assert adapt("[a](../README.md#install) [b](linear.md)", "docs/options.md", KNOWN) == (
        "[a](/index.md#install) [b](/linear.md)"
    )
    notebook = json.dumps(
        {"metadata": {}, "cells": [{"cell_type": "markdown", "source": ["[a](../docs/linear.md)\n", "b"]}]}
    )
    cells = json.loads(sources.adapt_notebook(notebook, "notebooks/x.ipynb", KNOWN))["cells"]
    assert cells[0]["source"] == ["[a](/linear.md)\n", "b"]


def test_a_link_to_nothing_is_named() -> None:
    with pytest.raises(SiteError, match=r"docs/options.md links to nothing.md, which is not there"):
        adapt("[a](nothing.md)", "docs/options.md", UNKNOWN)


def test_code_stays_as_it_is() -> None:
    code = "```python\nx[0](nothing.md)  # <!-- no comment -->\n```\n"
    assert adapt(f"a\n{code}<!-- a\ncomment -->\nb `[c](d.md)`\n", "README.md", UNKNOWN) == f"a\n{code}b `[c](d.md)`\n"


def test_marks() -> None:
    assert sources.replace_mark("a\n<!-- site x -->\nb", "x", "new") == "a\nnew\nb"
    between = "a\n<!-- site x: begin -->\n1\n<!-- site x: end -->\nb"
    assert sources.replace_mark(between, "x", lambda text: text.replace("1", "2")) == "a\n2\n\nb"
    for text in ("a", "<!-- site x --> <!-- site x -->"):
        with pytest.raises(SiteError, match="expected one mark"):
            sources.replace_mark(text, "x", "")


def test_what_a_card_says() -> None:
    text = "# Title\n\n| a | b |\n|---|---|\n\n`It` is [new](new.md). It has more.\n"
    assert sources.title_and_summary(text) == ("Title", "`It` is new.")


def test_source_pages_show_the_whole_file() -> None:
    page = sources.source_page("tools/site/sources.py")
    assert page.count((ROOT / "tools/site/sources.py").read_text(encoding="utf-8")) == 1
    fence = re.findall(r"^`{4,}", page, re.MULTILINE)
    assert len(fence) == 2
    assert sources.linked_sources([f"[a](/source/{'x.py'}.md)"]) == {"x.py"}


# --- API ------------------------------------------------------------------------------------------------------------


def public_names() -> dict[str, str]:
    """Return where each public name must be documented, by package and name, without asking the code under test."""
    found = {}
    for package in (lsce_jax, lsce_torch, lsce_parity):
        for name in package.__all__:
            own = getattr(package, name).__module__.partition(".")[0] != "lsce_spec"
            found[f"{package.__name__}.{name}"] = f"{package.__name__ if own else 'lsce_spec'}.{name}"
    modules = {"lsce_jax.metrics": lsce_jax, "lsce_torch.metrics": lsce_torch, "lsce_torch.trainers": lsce_torch}
    for module, package in modules.items():
        values = vars(getattr(package, module.rpartition(".")[2]))
        own = [name for name, value in values.items() if getattr(value, "__module__", "") == module]
        found |= {f"{module}.{name}": f"{module}.{name}" for name in own if not name.startswith("_")}
    submodules = {path.stem for path in Path(lsce_spec.__file__).parent.glob("*.py")}
    names = {name for name in vars(lsce_spec) if not name.startswith("_")} - submodules
    return found | {f"lsce_spec.{name}": f"lsce_spec.{name}" for name in names}


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """Return the API pages."""
    return api.pages()


def test_every_public_name_has_an_entry_and_a_line_in_its_table(pages: dict[str, str]) -> None:
    text = "\n".join(pages.values())
    entries = re.findall(r"^\.\. auto\w+:: (\S+)$", text, re.MULTILINE)
    entries += [
        f"{m}.{name}" for name, m in re.findall(r"^\.\. py:data:: (\S+)\n   :module: (\S+)$", text, re.MULTILINE)
    ]
    assert sorted(entries) == sorted({*public_names().values()})
    for name, documented in public_names().items():
        module, _, short = name.rpartition(".")
        assert f":py:obj:`{short} <{documented}>`" in pages[f"api/{module}.rst"], name
    assert {public.full_name for public in api.all_public_names()} == {*entries}


def test_both_packages_point_at_each_other(pages: dict[str, str]) -> None:
    for name in set(lsce_jax.__all__) & set(lsce_torch.__all__):
        if getattr(lsce_jax, name) is not getattr(lsce_torch, name):
            assert f"In PyTorch: :py:obj:`lsce_torch.{name}`" in pages[f"api/lsce_jax/{name}.rst"]
            assert f"In JAX: :py:obj:`lsce_jax.{name}`" in pages[f"api/lsce_torch/{name}.rst"]
    assert "In JAX: :py:obj:`lsce_jax.label_smoothed_cross_entropy`" in pages["api/lsce_torch/cross_entropy.rst"]
    assert "In JAX: :py:obj:`lsce_jax.metrics.MeanLoss`" in pages["api/lsce_torch.metrics.rst"]


@pytest.mark.parametrize(("value", "parts"), [
    (lsce_jax.label_smoothed_cross_entropy, [
        "(logits: Float[ArrayLike, '...'], ", "*, smoothing: float | Float[ArrayLike, '...'] = 0.1, ",
    ]),
    (lsce_torch.LabelSmoothedCrossEntropyLoss, ["(weight: Float[Tensor, ' K'] | None = None, "]),
    (lsce_torch.vocab_parallel_label_smoothed_cross_entropy, ["group: ProcessGroup | None = None"]),
    (lsce_jax.LossStats, ["valid: Bool[Array, '*batch'])"]),
    (lsce_parity.compare_losses, ["(first: Loss, second: Loss, **options: Unpack[CompareOptions])"]),
    (lsce_parity.BatchError, ["None"]),
])  # fmt: skip
def test_signatures(value: object, parts: list[str]) -> None:
    assert all(part in str(api.signature(value)) for part in parts)


def test_docstrings() -> None:
    known = {public.full_name: public for public in api.all_public_names()}
    lines = ["See `LossStats` and `axis`; :math:`q`.", "", "Example: a title.", "    >>> 1"]
    api.process_docstring(known, "lsce_jax.LossStats", lines)
    seen = "See :py:obj:`LossStats <lsce_jax.LossStats>` and ``axis``; :math:`q`."
    assert lines == [seen, "", "Example:", "    a title.", "", "    >>> 1"]
    lines = ["Args:", "    one, two,", "        three: see there."]
    api.process_docstring(known, "lsce_torch.LossStats", lines)
    assert lines == ["Args:", "    one, two, three: see there."]


def test_every_command_has_its_help() -> None:
    page = commands.page()
    names = commands.subcommands(commands.PROGRAMS["lsce-parity"])
    assert {"compare", "trajectory", "run", "peer-tests"} <= {*names}
    for name in names:
        assert f"\nlsce-parity {name}\n^^^^" in page
        assert f"Usage: lsce-parity {name} [OPTIONS]" in page
    assert "Usage: lsce-cost [OPTIONS]" in page
    assert not commands.subcommands(commands.PROGRAMS["lsce-cost"])


# --- What only a build can make -------------------------------------------------------------------------------------


def test_gallery_shows_every_example() -> None:
    table = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    shown = gallery.examples(table)
    scripts = {script for example in shown for script in example.scripts}
    assert {path.stem for path in (ROOT / "examples").glob("jax_*.py")} - scripts == {"jax_ported_loss"}
    assert {path.stem for path in (ROOT / "examples").glob("torch_*.py")} - scripts == {"torch_original_loss"}
    assert {f"{path.parent.name}.{path.stem}" for path in (ROOT / "examples").glob("*/train*.py")} <= scripts
    assert [example.task for example in shown if example.picture is None] == []
    cards = gallery.cards(table, KNOWN)
    assert "[`jax_digits`](https://example.com/o/n/blob/HEAD/examples/jax_digits.py)" in cards.replace("v1.0.0", "HEAD")
    assert "](/source/examples/jax_digits.py.md)" in gallery.cards(table, UNKNOWN)
    with pytest.raises(SiteError, match=r"names jax_dreams, but there is no examples/jax_dreams.py"):
        gallery.examples("| `jax_dreams` | what it dreams |\n")


def test_targets() -> None:
    """Each of them sums to 1; computed here from the formulas of docs/conventions.md."""
    assert [targets.target(convention, 0.2).sum() for convention in CONVENTIONS.values()] == pytest.approx([1] * 4)
    assert targets.target(CONVENTIONS["max_sup"], 0.2) == pytest.approx([0.04, -0.16, 0.04, 1.04, 0.04])


def test_pictures_of_the_targets() -> None:
    drawn = targets.pictures()
    assert {*drawn} == {f"{name}-{theme}.svg" for name in targets.FIGURES for theme in targets.INK}
    assert drawn == targets.pictures()  # Sphinx builds again what has changed
    named = re.findall(r"/images/(\S+\.svg)", targets.markdown())
    assert sorted(named) == sorted(drawn)


def test_versions(tmp_path: Path) -> None:
    listed = json.loads(versions.switcher("https://example.com", ["dev", "v0.9.0", "v0.10.0", "assets"]))
    assert [entry["version"] for entry in listed] == ["v0.10.0", "v0.9.0", "dev"]
    assert listed[0] == {
        "name": "v0.10.0 (stable)",
        "version": "v0.10.0",
        "url": "https://example.com/v0.10.0/",
        "preferred": True,
    }
    for folder in ("dev", "v0.1.0", "unfinished"):
        (tmp_path / folder).mkdir()
        if folder != "unfinished":
            (tmp_path / folder / "index.html").touch()
    versions.main("https://example.com/", tmp_path)
    assert 'content="0; url=v0.1.0/"' in (tmp_path / "index.html").read_text()
    assert [entry["version"] for entry in json.loads((tmp_path / "versions.json").read_text())] == ["v0.1.0", "dev"]
    assert f"version {version()} " in versions.page(ROOT, "")


# --- The check of the built site ------------------------------------------------------------------------------------


def test_broken_links(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "index.html").write_text(
        '<h1 id="top"></h1><a href="a/b.html#there">1</a><a href="a/b.html#gone">2</a><a href="a/c.html">3</a>'
        '<a href="#top">4</a><a href="#bottom">5</a><img src="x.png"><a href="https://example.com/d">6</a>'
        '<a href="#">7</a><script src="https://example.com/e.js"></script><link rel="canonical" href="//example.com/f">'
    )
    (tmp_path / "a" / "b.html").write_text('<a name="there"></a><a href="../index.html?x=1#top">1</a>')
    assert broken_links(tmp_path) == [
        "index.html: loads https://example.com/e.js from another site",
        "index.html: a/b.html#gone has no such anchor",
        "index.html: a/c.html is not there",
        "index.html: #bottom has no such anchor",
        "index.html: x.png is not there",
    ]
    assert read('<meta name="viewport"><p id="a">').anchors == {"a"}
