"""Notebooks with what their cells print: executed when the site is built, in a folder that is thrown away."""

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tools.site.sources import ROOT

# Takes minutes even on a CPU, and is of use on a GPU or TPU only. The site shows it as it is; a slow test runs it.
AS_THEY_ARE = {"your_device.ipynb"}
# The cell that says where the project is. Its place is another while the notebook runs here.
SOURCE = 'SOURCE = ".."'


def execute(text: str, timeout: int = 600) -> str:
    """Return a notebook with the outputs of its cells.

    Args:
        text: the notebook.
        timeout: seconds for each cell.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raises an exception.
    """
    notebook = nbformat.reads(text, as_version=4)
    here = f"SOURCE = {str(ROOT)!r}"
    for cell in notebook.cells:
        cell.source = cell.source.replace(SOURCE, here)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": folder}}).execute()
        without_paths = {here: SOURCE, f"{ROOT}/": "", str(ROOT): "lsce", str(Path(folder)): "."}
    written: str = nbformat.writes(notebook)
    for old, new in without_paths.items():
        written = written.replace(_in_json(old), _in_json(new))
    return written


def _in_json(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
