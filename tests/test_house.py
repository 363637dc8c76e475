"""CONTRIBUTING.md and the map tell the truth about the files and their imports; lines of prose fit on a screen."""

import re
import subprocess
from pathlib import PurePosixPath

import pytest

from parity_tests.evidence.pages import replace_block
from tools.house import ROOT, code_lines, files, house_map, levels, long_functions, part_of, picture

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PAGES = sorted(path for folder in (ROOT, ROOT / "docs") for path in folder.glob("*.md"))


def test_the_layers_are_what_the_files_give() -> None:
    updated = replace_block(CONTRIBUTING, "tools.house layers", picture())
    assert updated == CONTRIBUTING, "run: .venv/bin/python -m tools.house --write"
    assert len(CONTRIBUTING.splitlines()) <= 200


def test_the_packages_import_in_sight_of_the_contracts() -> None:
    # Import-linter does not see what is imported by a string.
    for path in files():
        if path.parts[0].startswith("lsce_"):
            assert "import_module(" not in (ROOT / path).read_text(encoding="utf-8"), path


def test_every_file_says_what_it_is_for() -> None:
    assert not re.findall(r"^- `\S+\.py`: *$", house_map(), re.MULTILINE)


def test_paths_that_are_named_are_there() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = {str(folder) for path in listed for folder in PurePosixPath(path).parents}
    for page in PAGES:
        for path in re.findall(r"`((?:parity_tests|lsce_\w+|docs|benchmarks|tools)/[\w./]+)`", page.read_text()):
            assert path in listed or path.rstrip("/") in folders, f"{page.name}: {path}"


def test_levels() -> None:
    assert levels({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == [["a"], ["b"], ["c"]]
    assert part_of("parity_tests.truth.bounds") == "parity_tests.truth"
    assert part_of("lsce_jax.fused") == "lsce_jax"
    with pytest.raises(ValueError, match="import each other: a, b"):
        levels({"a": {"b"}, "b": {"a"}})


def test_sizes() -> None:
    source = (
        '"""Title.\n\nMore."""\n\n# Why.\nx = """one\ntwo"""  # two lines\n\ndef f():\n    """What."""\n    return x\n'
    )
    assert (code_lines(source), long_functions(source)) == (4, 0)
    assert long_functions("def f():\n" + 60 * "    x = 1\n") == 1


def long_lines(text: str) -> list[str]:
    """Return the lines of prose over 120 characters: no tables, code, formulas or links that cannot be broken."""
    prose = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    return [line for line in prose.splitlines() if len(line) > 120 and not re.match(r"\s*(\||\$\$|!\[|<)", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_of_prose(page) -> None:
    assert long_lines(page.read_text(encoding="utf-8")) == []


def test_long_lines_are_found() -> None:
    long = "word " * 30
    assert long_lines(f"short\n{long}\n```text\n{long}\n```\n| {long} |\n") == [long]
