"""Prints the map of the house, from the files and their imports; on the site it is a page.

python -m tools.house            print the map, the layers and the size of each room
python -m tools.house --write    write the layers into CONTRIBUTING.md
"""

import ast
import io
import subprocess
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path

import grimp

from parity_tests.evidence.pages import write_block

ROOT = Path(__file__).parents[1]
PACKAGES = ("lsce_spec", "lsce_jax", "lsce_torch", "lsce_cost", "lsce_parity", "parity_tests", "examples", "benchmarks")
TESTS = ("parity_tests.suite", "parity_tests.meta")  # imported by nothing
LONG = 60  # lines of a function


# --- The map --------------------------------------------------------------------------------------------------------


def house_map() -> str:
    """Return a line for each Python file, below its folder: the first sentence of its docstring."""
    folders: dict[Path, list[Path]] = {}
    for path in files():
        folders.setdefault(path.parent, []).append(path)
    blocks = []
    for folder, paths in folders.items():
        summaries = {path.name: summary(path) for path in paths}
        about = summaries.pop("__init__.py", "")
        title = "The root" if folder == Path() else f"`{folder}/`"
        lines = [f"- `{name}`: {text}" for name, text in summaries.items()]
        wrapped = [textwrap.fill(line, 120, subsequent_indent="  ", break_on_hyphens=False) for line in lines]
        blocks.append("\n".join([textwrap.fill(f"**{title}** {about}".rstrip(), 120), "", *wrapped]))
    return "\n\n".join(blocks)


def files() -> list[Path]:
    """Return the Python files of the repository, relative to its root."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(path) for path in sorted(listed.stdout.split())]


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


# --- The rooms --------------------------------------------------------------------------------------------------------


def room_of(path: Path) -> str:
    """Return the room that a file counts in: a package, or a part of the harness."""
    if path.parts[0] != "parity_tests":
        return path.parts[0] if path.parts[1:] else "the root"
    return f"parity_tests/{path.parts[1]}" if path.parts[1] in ("suite", "meta") else "parity_tests, without its tests"


def code_lines(source: str) -> int:
    """Return how many lines hold code: neither blank, nor comments, nor docstrings."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = {
        number for token in tokens if token.type not in silent for number in range(token.start[0], token.end[0] + 1)
    }
    return len(lines - {number for first, last in _docstrings(source) for number in range(first, last + 1)})


def _docstrings(source: str) -> Iterator[tuple[int, int]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and type(first.value.value) is str:
                yield first.lineno, first.end_lineno or first.lineno


def long_functions(source: str) -> int:
    """Return how many functions have more than `LONG` lines."""
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return sum((node.end_lineno or 0) - node.lineno + 1 > LONG for node in functions)


def rooms() -> str:
    """Return a table of the rooms as Markdown: lines, lines of code, long functions."""
    found: dict[str, list[int]] = {}
    for path in files():
        source = (ROOT / path).read_text(encoding="utf-8")
        for total in (found.setdefault(room_of(path), [0, 0, 0]), found.setdefault("together", [0, 0, 0])):
            for i, number in enumerate((len(source.splitlines()), code_lines(source), long_functions(source))):
                total[i] += number
    found["together"] = found.pop("together")
    heading = f"| room | lines of Python | of code | functions over {LONG} lines |\n|---|---:|---:|---:|\n"
    return heading + "\n".join(f"| {room} | {' | '.join(map(str, numbers))} |" for room, numbers in found.items())


# --- The page ---------------------------------------------------------------------------------------------------------


def page() -> str:
    """Return the page of the site: the layers, the size of the rooms, and a line for each file."""
    about = "What each file is for, in its own first sentence; how large each room is; and who imports whom."
    parts = ["# The map of the house", about, "## Layers", picture(), "## Rooms", rooms(), "## Files", house_map()]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Print the page, or write the layers into CONTRIBUTING.md."""
    if "--write" in sys.argv[1:]:
        write_block(ROOT / "CONTRIBUTING.md", "tools.house layers", picture())
    else:
        print(page())


if __name__ == "__main__":
    main()
