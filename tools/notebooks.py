"""Execute the notebooks and store what their cells print, without what tells of this machine or of this run.

    python -m tools.notebooks                      all of notebooks/, some minutes
    python -m tools.notebooks same_loss

The site shows the notebooks as they are stored; `tests/test_notebooks.py` compares them in kind with a fresh run.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
# The cell that says where lsce is. Its place is another while the notebook runs here.
SOURCE = 'SOURCE = ".."'
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# tqdm misses widgets, which notebooks have elsewhere.
_TQDM = re.compile(r"^.*TqdmWarning: .*\n.*\n", re.MULTILINE)
# A cell with this tag shows times: they are stored as dots, and a fresh run is not held to its text.
TIMES = "times"
# The line that describes the machine, torch's log, and bars.
_MACHINE = re.compile(r"^(date \d{4}-.*|The machine was busy .*|[WI]\d{4} \d\d:.*|.*━.*)\n", re.MULTILINE)
_IN_A_TABLE = re.compile(r"(?<=\s\s)\d+(\.\d+)?\b")
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def execute(notebook: NotebookNode, folder: Path, timeout: int = 1200) -> NotebookNode:
    """Return a notebook with the outputs of its cells.

    Args:
        notebook: is not changed.
        folder: where the cells run; an empty one.
        timeout: seconds for each cell.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raises an exception.
    """
    made: NotebookNode = nbformat.from_dict(notebook)
    sources = [cell.source for cell in made.cells]
    for cell in made.cells:
        cell.source = cell.source.replace(SOURCE, f"SOURCE = {str(ROOT)!r}")
    resources = {"metadata": {"path": str(folder)}}
    # With more threads they wait for each other where a core is taken.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "160"}
    NotebookClient(made, timeout=timeout, record_timing=False, resources=resources).execute(env=environment)
    names = {
        **{f"{ROOT}/": "", str(ROOT): "lsce", sys.executable: "python"},
        **{str(folder.resolve()): ".", str(folder): "."},
    }
    for cell, source in zip(made.cells, sources, strict=True):
        cell.source = source
        if cell.cell_type == "code":
            outputs = [_cleaned(output, names) for output in _joined(cell.outputs)]
            cell.outputs = [output for output in outputs if output is not None]
            if TIMES in cell.metadata.get("tags", ()):
                for output in cell.outputs:
                    output.text = without_times(output.text)
    made.metadata = nbformat.from_dict(notebook.metadata)  # without the version of this Python
    return made


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Return outputs with what was printed in one piece, however many messages it came in."""
    made: list[NotebookNode] = []
    for output in outputs:
        same = made and output.output_type == made[-1].output_type == "stream" and output.name == made[-1].name
        if same:
            made[-1].text += output.text
        else:
            made.append(output)
    return made


def _cleaned(output: NotebookNode, names: dict[str, str]) -> NotebookNode | None:
    """Return an output without colours, lines that were overwritten, and names of folders; None if it is empty."""

    def clean(text: str) -> str:
        text = _TQDM.sub("", _ANSI.sub("", text)).replace("\r\n", "\n")
        text = re.sub(r"^.*\r(?!\n)", "", text, flags=re.MULTILINE)
        for old, new in names.items():
            text = text.replace(old, new)
        return text

    if output.output_type == "stream":
        output.text = clean(output.text)
        return output if output.text else None
    for kind, data in output.get("data", {}).items():
        if kind.startswith("text/"):
            output.data[kind] = clean(data)
    return output


def without_times(text: str) -> str:
    r"""Return what a command printed without the machine it ran on, and with dots for the numbers in its tables.

    Example:
        >>> without_times("date 2026-12-03, cores 2\nloss   0.74  21")
        'loss   ·.··  ··'
    """
    return _IN_A_TABLE.sub(lambda found: re.sub(r"\d", "·", found[0]), _MACHINE.sub("", text))


def kinds(cell: NotebookNode) -> list[tuple[str, ...]]:
    """Return what a cell shows, without the numbers in it: the type of each output, and its text or its media types."""
    if TIMES in cell.metadata.get("tags", ()):
        return [(output.output_type, output.name) for output in cell.outputs]
    return [
        ("stream", output.name, _masked(output.text))
        if output.output_type == "stream"
        else (
            output.output_type,
            *sorted(output.get("data", {})),
            _masked(output.get("data", {}).get("text/plain", "")),
        )
        for output in cell.outputs
    ]


def _masked(text: str) -> str:
    """Return a text with one sign for each number, and one space for each gap: a column is as wide as its numbers."""
    return re.sub(r"[ \t─-]+", " ", _NUMBER.sub("#", text))


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description="Execute notebooks, and store them with their outputs.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NOTEBOOKS)}; all by default")
    names = parser.parse_args().names or [*NOTEBOOKS]
    if unknown := [name for name in names if name not in NOTEBOOKS]:
        parser.error(f"there is no notebook {unknown[0]}")
    for name in names:
        path = NOTEBOOKS[name]
        print(f"executing {path.relative_to(ROOT)}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(execute(nbformat.read(path, as_version=4), Path(folder)), path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
