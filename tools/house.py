"""Writes the map and the picture of the layers into CONTRIBUTING.md, from the files and their imports.

python -m tools.house            print both
python -m tools.house --write    write them into the page
"""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import grimp

from parity_tests.evidence.pages import write_block

ROOT = Path(__file__).parents[1]
PACKAGES = ("lsce_spec", "lsce_jax", "lsce_torch", "lsce_parity", "parity_tests", "examples", "benchmarks")
TESTS = ("parity_tests.suite", "parity_tests.meta")  # imported by nothing


# --- The map --------------------------------------------------------------------------------------------------------


def house_map() -> str:
    """Return a line for each Python file, below its folder: the first sentence of its docstring."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    folders: dict[Path, list[Path]] = {}
    for path in map(Path, sorted(listed.stdout.split())):
        folders.setdefault(path.parent, []).append(path)
    blocks = []
    for folder, files in folders.items():
        summaries = {path.name: summary(path) for path in files}
        about = summaries.pop("__init__.py", "")
        title = "The root" if folder == Path() else f"`{folder}/`"
        lines = [f"- `{name}`: {text}" for name, text in summaries.items()]
        wrapped = [textwrap.fill(line, 120, subsequent_indent="  ", break_on_hyphens=False) for line in lines]
        blocks.append("\n".join([textwrap.fill(f"**{title}** {about}".rstrip(), 120), "", *wrapped]))
    return "\n\n".join(blocks)


def summary(path: Path) -> str:
    """Return the first paragraph of a module's docstring."""
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


# --- The layers -----------------------------------------------------------------------------------------------------


def part_of(module: str) -> str:
    """Return the part that a module belongs to: a room or a file of the harness, or another package."""
    names = module.split(".")
    return ".".join(names[:2]) if names[0] == "parity_tests" else names[0]


def arrows() -> dict[str, set[str]]:
    """Return the parts that each part imports directly."""
    graph = grimp.build_graph(*PACKAGES)
    found: dict[str, set[str]] = {}
    for module in graph.modules:
        importer = part_of(module)
        if importer not in {"parity_tests", *TESTS}:
            imported = {part_of(other) for other in graph.find_modules_directly_imported_by(module)}
            found.setdefault(importer, set()).update(imported - {importer})
    return found


def levels(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return the parts from top to bottom: each part stands above all that it imports.

    Raises:
        ValueError: parts import each other in a circle.
    """
    remaining, found = dict(imports), []
    while remaining:
        level = sorted(part for part, imported in remaining.items() if not imported & remaining.keys())
        if not level:
            raise ValueError(f"these import each other: {', '.join(sorted(remaining))}")
        found.insert(0, level)
        remaining = {part: imported for part, imported in remaining.items() if part not in level}
    return found


def picture() -> str:
    """Return the arrows as text, a block for each level."""
    imports = arrows()
    by_level = levels(imports)
    order = [part for level in by_level for part in level]
    width = max(map(len, order))
    blocks = []
    for level in by_level:
        lines = []
        for part in level:
            imported = [name.removeprefix("parity_tests.") for name in order if name in imports[part]]
            lines.append(f"{part.ljust(width)}  ->  {', '.join(imported)}" if imported else part)
        blocks.append("\n".join(lines))
    return "```text\n" + "\n\n".join(blocks) + "\n```"


def main() -> None:
    """Print the blocks, or write them."""
    for block, text in {"layers": picture(), "map": house_map()}.items():
        if "--write" in sys.argv[1:]:
            write_block(ROOT / "CONTRIBUTING.md", f"tools.house {block}", text)
        else:
            print(text, end="\n\n")


if __name__ == "__main__":
    main()
